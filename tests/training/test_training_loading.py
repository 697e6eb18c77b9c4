"""Base from a file: its dtype is retained where memory is short, its encoders are loaded only while needed."""

from __future__ import annotations

import gc
import platform
import shutil
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from comfyui_controlnext.controlnext_core.checkpoint import Header
from comfyui_controlnext.tests.fixtures.training_fixtures import (
    CPU,
    Watcher,
    frozen,
    gradients_of,
    loop_on,
    same,
    small,
    take_steps,
    train_in,
)
from comfyui_controlnext.tools import tiny_models
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.comfy

MIB = 2**20


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small SD1.5 in fp16, as most checkpoints: UNet, autoencoder and text encoder in one safetensors file."""
    folder = tmp_path_factory.mktemp("base")
    made = tiny_models.make_sd15(folder / "sd15.ckpt")
    tensors = torch.load(made, weights_only=True)["state_dict"]
    path = folder / "sd15.safetensors"
    save_file({name: tensor.half().contiguous().clone() for name, tensor in tensors.items()}, path)
    return path


def loaded(file: Path, **settings: Any) -> Any:
    from comfyui_controlnext.controlnext_training.base_model.base_files import load_base

    return load_base(small(base=str(file), **settings), file.parent)


def nbytes(module: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in frozen(module).values())


@pytest.mark.parametrize(("variant", "trainable"), [("sd15", "to_out"), ("sd15", "all"), ("xs", "none")])
def test_in_the_files_own_bits_the_same_is_learned(file: Path, variant: str, trainable: str) -> None:
    """Weights in fp16 are widened by the host to fp32 on a CPU.

    With checkpointing each is widened when it is used: as exact.
    """
    settings = {"variant": variant, "trainable": trainable, "learning_rate": 1e-3}
    bases = [loaded(file, checkpointing=on) for on in (False, True)]
    stored = [{p.dtype for p in base.model.model.diffusion_model.parameters()} for base in bases]
    assert stored == [{torch.float32}, {torch.float16}]
    assert bases[0].identity("model") == bases[1].identity("model")
    wide, narrow = (
        loop_on(base, small(checkpointing=on, **settings)) for base, on in zip(bases, (False, True), strict=True)
    )
    assert nbytes(narrow.controlled.unet) < 0.51 * nbytes(wide.controlled.unet)
    assert take_steps(wide, 2) == take_steps(narrow, 2)
    assert same(gradients_of(wide), gradients_of(narrow)) and same(wide.parameters, narrow.parameters)


def test_a_lora_in_the_base_is_not_rounded_to_the_files_bits(file: Path, tiny: Any) -> None:
    import comfy.sd

    lora = load_file(tiny.models / "loras" / tiny.names["lora"])
    unets = []
    for on in (False, True):
        base = loaded(file, checkpointing=on)
        with torch.inference_mode():
            base.model, _ = comfy.sd.load_lora_for_models(base.model, None, lora, 0.8, 0.0)
        unets.append(loop_on(base, small(checkpointing=on, trainable="none")).controlled.unet)
    wide, narrow = (dict(unet.named_parameters()) for unet in unets)
    assert {p.dtype for p in narrow.values()} == {torch.float16, torch.float32}
    assert same(wide, {name: p.float() for name, p in narrow.items()})


def test_what_no_layer_casts_is_widened_at_once(tmp_path: Path) -> None:
    """Mixing factors of SVD, which no layer casts, are widened when loaded; in fp16 they would differ."""
    import comfy.sd
    from comfyui_controlnext.controlnext_training.base_model.trainable_copy import training_unet

    path = tiny_models.make_svd(tmp_path / "svd.ckpt", vision=False)
    options = {"dtype": torch.float16}
    with torch.inference_mode():
        model = comfy.sd.load_checkpoint_guess_config(str(path), output_vae=False, model_options=options)[0]
    for name, parameter in model.model.diffusion_model.named_parameters():
        if name.endswith("mix_factor"):
            parameter.data = parameter.data.half()  # the host keeps them in fp32; others may not
    narrow = training_unet(model, torch.float32, CPU, narrow=True)
    found = {name: p.dtype for name, p in narrow.named_parameters()}
    alone = [name for name in found if name.endswith("mix_factor")]
    assert alone and {found.pop(name) for name in alone} == {torch.float32}
    assert set(found.values()) == {torch.float16}
    wide = training_unet(model, torch.float32, CPU)
    given = {
        "x": torch.randn(2, 8, 8, 8),
        "timesteps": torch.full((2,), 0.3),
        "context": torch.randn(2, 1, 1024),
        "y": torch.randn(2, 768),
        "num_video_frames": 2,
        "image_only_indicator": torch.zeros(1, 2),
    }
    with torch.no_grad():
        assert torch.equal(narrow(**given), wide(**given))


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ({"F16"}, torch.float16),
        ({"BF16"}, torch.bfloat16),
        ({"F32"}, None),
        ({"F16", "F32"}, None),
        ({"F8_E4M3"}, torch.float8_e4m3fn),
        ({"F8_E4M3", "F32"}, None),
        (set(), None),
    ],
    ids=lambda value: "+".join(sorted(value)) or "none" if isinstance(value, set) else str(value),
)
def test_only_a_network_that_is_of_one_dtype_throughout_is_kept_in_it(dtypes: set[str], expected: Any) -> None:
    """Elsewhere than on a CPU the host keeps halves by itself, and fp8 only where it must."""
    from comfyui_controlnext.controlnext_training.base_model.base_files import UNET_PREFIX, own_dtype

    found = {f"{UNET_PREFIX}{number}": dtype for number, dtype in enumerate(sorted(dtypes))}
    header = Header(Path("x"), {}, {**found, "first_stage_model.x": "F32"})
    assert own_dtype(header, on_cpu=True) is expected
    assert own_dtype(header, on_cpu=False) is (expected if expected is torch.float8_e4m3fn else None)


class Looking(Watcher):
    """Observer that records at each step which encoders are in memory, and acts after the first."""

    def __init__(self, base: Any, then: Any = lambda: None) -> None:
        super().__init__()
        self.base, self.then = base, then
        self.held: list[bool] = []
        self.models = [weakref.ref(base.vae.first_stage_model), weakref.ref(base.clip.cond_stage_model)]

    def progress(self, step: int, steps: int, text: str) -> None:
        super().progress(step, steps, text)
        if text.startswith("step "):
            self.held.append(any(model() is not None for model in self.models))
            if step == 1:
                self.then()


def count_reads(base: Any) -> list[str]:
    """Count the reads of files from now on."""
    reads: list[str] = []
    read = base.read_again
    base.read_again = lambda name: (reads.append(name), read(name))[1]
    return reads


def test_encoders_are_in_memory_only_while_they_are_needed(file: Path, tmp_path: Path) -> None:
    """Read again for the pictures of a validation; what is trained is what it is with encoders that stay."""
    config = small(base=str(file), steps=2, validate_every=1, validation_samples=1, trainable="none")
    staying, base = loaded(file), loaded(file)
    staying.read_again = None
    expected = load_file(train_in(tmp_path / "staying", staying, config))
    assert staying.vae is not None
    reads, watch = count_reads(base), Looking(base)
    found = load_file(train_in(tmp_path / "released", base, config, watch))
    assert watch.held == [False] * 2
    assert reads == ["vae", "vae"] and base.vae is None and base.clip is None
    assert same(found, expected)
    again = load_file(train_in(tmp_path / "again", base, replace(config, validate_every=0)))
    assert same(again, expected), "a base without its encoders starts a run as well"


def test_what_is_lost_on_the_way_is_encoded_again(file: Path, tmp_path: Path) -> None:
    base = loaded(file)
    config = small(base=str(file), steps=5, trainable="none", cache=True)
    reads = count_reads(base)
    watch = Looking(base, lambda: shutil.rmtree(tmp_path / "lost" / "cache"))
    found = load_file(train_in(tmp_path / "lost", base, config, watch))
    assert sorted(set(reads)) == ["clip", "vae"] and len(reads) == 2
    assert same(found, load_file(train_in(tmp_path / "kept", loaded(file), config)))


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="is about glibc")
def test_memory_that_nobody_holds_goes_back_to_the_system() -> None:
    from comfyui_controlnext.controlnext_training.base_model.encode import make_room

    process = psutil.Process()
    pieces = [bytes(100_000) for _ in range(2000)]
    pin = bytes(100_000)
    gc.collect()
    full = process.memory_info().rss
    del pieces
    make_room(CPU)
    assert full - process.memory_info().rss > 150 * MIB
    assert len(pin) == 100_000

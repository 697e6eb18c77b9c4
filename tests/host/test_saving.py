"""Save ControlNeXt: saved files load again with the same effect."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.controlnext_core import checkpoint
from comfyui_controlnext.controlnext_core.checkpoint import CheckpointError
from comfyui_controlnext.tests.fixtures.lazy_layers import EITHER_WAY
from comfyui_controlnext.tests.fixtures.sampling_fixtures import REASSOCIATED, Studio, demo_pair, picture, relative
from comfyui_controlnext.tools.tiny_models import make_controlnext
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

pytestmark = [pytest.mark.comfy, EITHER_WAY]


@pytest.fixture(autouse=True)
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Output folder of the host, with a name that careless code mishandles."""
    import folder_paths

    folder = tmp_path / "out put \u00fc"
    monkeypatch.setattr(folder_paths, "output_directory", str(folder))
    return folder


def save(control: Any, model: Any = None, layout: str = "single", dtype: str = "fp32", prefix: str = "cn/mine") -> Path:
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.saving import save_control

    return save_control(control, model, prefix, layout, dtype)


def run(studio: Studio, loaded: Any) -> Tensor:
    return studio.sample(studio.ours(loaded.model, loaded.control, picture()))


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


@pytest.mark.parametrize("layout", ["single", "published"])
def test_a_saved_control_gives_the_same_latents(studio: Studio, output: Path, layout: str) -> None:
    loaded = demo_pair(studio)
    path = save(loaded.control, loaded.model, layout)
    assert path.is_relative_to(output / "cn")
    again = studio.load(path, "auto")
    assert torch.equal(run(studio, again), run(studio, loaded))
    assert len(again.model.patches) == len(loaded.model.patches) > 0
    assert again.control.net.uid == loaded.control.net.uid
    names = {p.name for p in path.parent.iterdir()}
    assert names == ({path.name} if layout == "single" else {"controlnet.safetensors", "unet.safetensors"})


def test_the_lora_layout_of_a_unet_control_loads_here_and_in_the_stock_loader(studio: Studio) -> None:
    """Differences of weights and of biases."""
    import comfy.sd
    import comfy.utils

    loaded = demo_pair(studio)
    path = save(loaded.control, loaded.model, "lora")
    lora = path.parent / "lora.safetensors"
    assert [name for name in load_file(lora) if name.endswith(".bias.diff")]
    again = studio.load(path, "auto")
    assert torch.equal(run(studio, again), run(studio, loaded))
    alone = studio.load(path, "none")
    stock, _ = comfy.sd.load_lora_for_models(alone.model, None, comfy.utils.load_torch_file(str(lora)), 1.0, 0.0)
    assert torch.equal(studio.sample(studio.ours(stock, alone.control, picture())), run(studio, loaded))


def test_the_encoder_alone_is_saved_under_the_published_names(studio: Studio) -> None:
    loaded = studio.load()
    original = load_file(studio.files / "gen2.safetensors")
    for layout in ("single", "published"):
        path = save(loaded.control, None, layout)
        saved = load_file(path)
        assert saved.keys() == original.keys()
        assert all(torch.equal(saved[name], original[name]) for name in original)


def test_the_strength_at_which_weights_were_put_on_is_saved_with_them(studio: Studio) -> None:
    loaded = demo_pair(studio)
    control = studio.files / "pair" / "controlnet.safetensors"
    weaker = studio.load(control, "auto", weights_strength=0.3)
    again = studio.load(save(weaker.control, weaker.model), "auto")
    assert relative(run(studio, again), run(studio, weaker)) < REASSOCIATED
    assert relative(run(studio, again), run(studio, loaded)) > 0.001
    twice = studio.load(control, "auto", weaker.model, weights_strength=0.5)  # two loaders, one behind the other
    again = studio.load(save(twice.control, twice.model), "auto")
    assert relative(run(studio, again), run(studio, twice)) < REASSOCIATED


def test_a_lora_is_never_saved(studio: Studio, tiny: Any) -> None:
    import comfy.sd
    import comfy.utils

    lora = comfy.utils.load_torch_file(str(tiny.models / "loras" / tiny.names["lora"]))
    loaded = demo_pair(studio)
    with_lora, _ = comfy.sd.load_lora_for_models(loaded.model, None, lora, 1.0, 0.0)
    assert len(with_lora.patches) > len(loaded.model.patches)
    without, including = load_file(save(loaded.control, loaded.model)), load_file(save(loaded.control, with_lora))
    assert without.keys() == including.keys()
    assert all(torch.equal(without[name], including[name]) for name in without)
    only_lora, _ = comfy.sd.load_lora_for_models(studio.model, None, lora, 1.0, 0.0)
    assert not [n for n in load_file(save(loaded.control, only_lora)) if n.startswith("unet.")]


@pytest.mark.parametrize(("dtype", "stored"), [("fp16", "F16"), ("bf16", "BF16"), ("fp32", "F32")])
def test_the_dtype_is_the_one_asked_for(studio: Studio, dtype: str, stored: str) -> None:
    loaded = demo_pair(studio)
    path = save(loaded.control, loaded.model, dtype=dtype)
    header = json.loads(path.read_bytes()[8:][: int.from_bytes(path.read_bytes()[:8], "little")])
    assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == {stored}
    assert run(studio, studio.load(path, "auto")).isfinite().all()


def test_metadata_says_what_it_is_and_is_honoured(studio: Studio) -> None:
    loaded = demo_pair(studio)
    single = metadata_of(save(loaded.control, loaded.model))
    assert single["controlnext.spec"] == "sd15" and single["controlnext.weights_kind"] == "difference"
    assert single["modelspec.architecture"] == "stable-diffusion-v1/controlnext"
    assert single["modelspec.sai_model_spec"] and single["modelspec.title"]
    assert "controlnet.safetensors" in single["controlnext.sources"]
    assert "controlnext.gain" not in single  # none was trained
    path = save(loaded.control, loaded.model, "published")
    assert metadata_of(path)["controlnext.weights_file"] == "unet.safetensors"
    assert metadata_of(path.with_name("unet.safetensors"))["controlnext.weights_kind"] == "difference"


def test_a_trained_gain_survives_saving(studio: Studio, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = make_controlnext(tmp_path / "trained.safetensors", "gen2")
    save_file(load_file(path), path, {"controlnext.spec": "sd15", "controlnext.gain": "0.37"})
    loaded = studio.load(path)
    again = studio.load(save(loaded.control))
    assert again.control.net.spec.fusion.gain.factor == 0.37
    assert torch.equal(run(studio, again), run(studio, loaded))


@pytest.mark.parametrize("layout", ["single", "published"])
def test_a_second_save_takes_another_name(studio: Studio, layout: str) -> None:
    loaded = demo_pair(studio)
    first = save(loaded.control, loaded.model, layout)
    before = first.read_bytes()
    paths = {first, save(loaded.control, None, layout), save(loaded.control, None, "single")}
    assert len(paths) == 3 and all(path.is_file() for path in paths)
    assert first.read_bytes() == before


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
    ids=["from the writer", "from the system"],
)
def test_a_full_disk_leaves_nothing_half_written_and_says_so(
    studio: Studio, monkeypatch: pytest.MonkeyPatch, output: Path, error: Exception
) -> None:
    loaded = demo_pair(studio)

    def fails(tensors: Any, path: str, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(checkpoint, "save_file", fails)
    for layout in ("single", "published"):
        with pytest.raises(CheckpointError, match=r"mine_\d+_.*could not be saved \(.*No space left.*Free some disk"):
            save(loaded.control, loaded.model, layout)
    assert [path for path in output.rglob("*") if path.is_file()] == []


def test_a_layout_of_another_method_is_refused(studio: Studio, output: Path) -> None:
    with pytest.raises(ValueError, match=r"layout: xs_official is for ControlNet-XS"):
        save(studio.load().control, None, "xs_official")
    assert not output.exists()

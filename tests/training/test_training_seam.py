"""From the trainer to the loader: trained weights are saved, loaded, applied and sampled bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.controlnext_core import checkpoint
from comfyui_controlnext.controlnext_core.checkpoint import peek
from comfyui_controlnext.controlnext_core.detection import read_control_file
from comfyui_controlnext.controlnext_core.key_maps import unet_key_map
from comfyui_controlnext.controlnext_core.specs import Family
from comfyui_controlnext.controlnext_training.base_model.controlled import Controlled, Sizes
from comfyui_controlnext.controlnext_training.base_model.trainable_copy import plain_attention
from comfyui_controlnext.controlnext_training.base_model.trained_families import FAMILIES
from comfyui_controlnext.controlnext_training.distributed import ProcessGroup
from comfyui_controlnext.controlnext_training.results import finished_file, name_run
from comfyui_controlnext.tests.fixtures.sampling_fixtures import CELLS, picture, relative
from comfyui_controlnext.tests.fixtures.training_fixtures import CPU, SIDE, host_weights, run_in, same, shaken, small
from comfyui_controlnext.tools import tiny_models
from safetensors.torch import load_file
from torch import Tensor, nn

pytestmark = pytest.mark.comfy

FRAMES = 3
LEARNED_GAIN = 5e-6
"""Relative difference where the gain is a tensor with a gradient in training and a number in sampling."""
MAKERS = {
    "sd15": tiny_models.make_sd15,
    "sdxl": lambda path: tiny_models.make_sdxl(path, clip=False),
    "svd_v2": lambda path: tiny_models.make_svd(path, vision=False),
    "sd15_legacy": tiny_models.make_sd15_deep,
    "svd_v1": tiny_models.make_svd_deep,
}
CONTEXT = {"sd15": (77, 768), "sdxl": (77, 2048), "svd_v2": (1, 1024), "sd15_legacy": (77, 768), "svd_v1": (1, 1024)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """MODEL of a variant's base, by name; each loaded once, and one held at a time."""
    import comfy.sd

    folder, held = tmp_path_factory.mktemp("bases"), {}

    def load(variant: str) -> Any:
        if variant not in held:
            held.clear()
            path = MAKERS[variant](folder / f"{variant}.ckpt")
            with torch.inference_mode():
                held[variant] = comfy.sd.load_checkpoint_guess_config(str(path), output_vae=False, output_clip=False)[0]
        return held[variant]

    return load


@dataclass
class Case:
    """Sample of a variant: its prompt as the host's CONDITIONING and in the trainer's form, and its hint."""

    conditioning: Any
    given: dict[str, Tensor]
    hint: Tensor
    frames: int

    @property
    def planes(self) -> Tensor:
        """Planes (frames, 3, H, W) in the memory layout of the trainer's samples: the layout decides the kernel, and so
        the bits.
        """
        return self.hint.movedim(-1, 1).contiguous()

    @classmethod
    def of(cls, variant: str) -> Case:
        g = torch.Generator().manual_seed(4)
        frames = FRAMES if variant.startswith("svd") else 1
        tokens, width = CONTEXT[variant]
        given = {"context": torch.randn(1, tokens, width, generator=g)}
        extra: dict[str, Any] = {}
        if variant == "sdxl":
            given["pooled"] = torch.randn(1, 1280, generator=g)
            extra = {"pooled_output": given["pooled"]}
        if frames > 1:
            given["concat"] = torch.randn(1, 4, CELLS, CELLS, generator=g)
            extra = {"concat_latent_image": given["concat"], **FAMILIES[Family.SVD].constants}
        return cls([[given["context"], extra]], given, torch.cat([picture(n) for n in range(frames)]), frames)


def trained(model: Any, variant: str, **settings: Any) -> Controlled:
    """Control with random differences in every weight, as if trained."""
    controlled = Controlled(model, small(variant=variant, **settings), torch.float32, CPU)
    shaken({n: p for n, p in controlled.net.named_parameters() if n != "scale"})
    shaken(controlled.differences.parameters)
    return controlled


def saved(controlled: Controlled, model: Any, folder: Path, variant: str, **settings: Any) -> Path:
    from comfyui_controlnext.controlnext_training.base_model.encode import BaseWithEncoders

    run = run_in(folder, BaseWithEncoders(model, None))
    run.folder.mkdir(parents=True)
    name_run(run)
    return finished_file(controlled, small(variant=variant, **settings), run, [1.0, 0.5], ProcessGroup())


def first_step(model: Any, case: Case) -> dict[str, Tensor]:
    """Inputs of the model in the stock KSampler's first step, and its output, with torch's attention."""
    import nodes as host_nodes

    seen: dict[str, Tensor] = {}

    def look(apply_model: Any, given: dict[str, Any]) -> Tensor:
        found = apply_model(given["input"], given["timestep"], **given["c"])
        seen.update(x=given["input"].clone(), sigma=given["timestep"].clone(), answer=found.clone())
        return found

    watched = model.clone()
    watched.set_model_unet_function_wrapper(look)
    options = watched.model_options["transformer_options"]
    watched.model_options["transformer_options"] = {**options, "optimized_attention_override": plain_attention}
    outputs: list[Tensor] = []
    handle = model.model.diffusion_model.register_forward_hook(lambda _, given, out: outputs.append(out.clone()))
    latent = {"samples": torch.zeros(case.frames, 4, CELLS, CELLS)}
    conditions = (case.conditioning, case.conditioning)
    with torch.inference_mode():
        host_nodes.KSampler().sample(watched, 1, 1, 1.0, "euler", "normal", *conditions, latent)
    handle.remove()
    return {name: tensor.clone() for name, tensor in seen.items()} | {"output": outputs[0].clone()}


def in_training(controlled: Controlled, case: Case, seen: dict[str, Tensor], strength: float = 1.0) -> Tensor:
    square = Sizes((SIDE, SIDE), (0, 0), (SIDE, SIDE))
    conditions = [controlled.conditions(seen["x"], case.given, square)]
    with torch.no_grad():
        return controlled(seen["x"], seen["sigma"], conditions, case.planes, strength)


def applied(model: Any, control: Any, hint: Tensor) -> Any:
    from comfyui_controlnext.nodes.apply import ControlNeXtApply

    with torch.inference_mode():
        return ControlNeXtApply.execute(model, control, hint, 1.0, 0.0, 1.0, None)[0]


def loaded_from(path: Path, model: Any, **options: Any) -> Any:
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.loading import load_controlnext

    with torch.inference_mode():
        return load_controlnext(model, path, **options)


def aligned(net: nn.Module) -> None:
    """Copy weights from a mapped file to newly allocated memory: kernels round depending on the alignment."""
    with torch.inference_mode():
        for parameter in net.parameters():
            parameter.data = parameter.data.clone()


def effective_weights(model: Any) -> dict[str, Tensor]:
    """Weights with which the host samples, differences included."""
    import comfy.model_management

    with torch.inference_mode():
        comfy.model_management.load_models_gpu([model], force_full_load=True)
        return {name: tensor.clone() for name, tensor in host_weights(model).items()}


def weights_in_training(controlled: Controlled) -> dict[str, Tensor]:
    unet, found = controlled.unet, {}
    for name in unet_key_map(controlled.facts.config).values():
        path, _, leaf = name.rpartition(".")
        found[name] = getattr(unet.get_submodule(path), leaf).detach()
    return found


@pytest.mark.parametrize("layout", ["single", "published"])
@pytest.mark.parametrize("variant", ["sd15", "sdxl", "svd_v2"])
def test_the_file_is_what_was_trained(models: Any, tmp_path: Path, variant: str, layout: str) -> None:
    model, case = models(variant), Case.of(variant)
    controlled = trained(model, variant, layout=layout)
    path = saved(controlled, model, tmp_path, variant, layout=layout)
    loaded = loaded_from(path, model, variant="svd_v2" if variant == "svd_v2" else "auto")
    assert loaded.control.net.spec == controlled.control.spec
    assert same(dict(loaded.control.net.patcher.model.state_dict()), dict(controlled.net.state_dict()))
    assert same(effective_weights(loaded.model), weights_in_training(controlled))
    aligned(loaded.control.net.patcher.model)
    seen = first_step(applied(loaded.model, loaded.control, case.hint), case)
    found = in_training(controlled, case, seen)
    assert torch.equal(found, seen["output"])
    assert relative(in_training(controlled, case, seen, 0.0), seen["output"]) > 1e-3, "the control is heard"


def test_svd_is_told_the_numbers_of_the_released_trainer(models: Any) -> None:
    """Frames per second less one, motion and noise of the reference frame: 6, 127, 0.02."""
    model, case = models("svd_v2"), Case.of("svd_v2")
    controlled = Controlled(model, small(variant="svd_v2", trainable="none"), torch.float32, CPU)
    square = Sizes((SIDE, SIDE), (0, 0), (SIDE, SIDE))
    found = controlled.conditions(torch.zeros(FRAMES, 4, CELLS, CELLS), case.given, square)["y"].cond
    expected = torch.cat([model.model.embedder(torch.tensor([number])) for number in (6.0, 127.0, 0.02)])
    assert torch.equal(found.flatten(), expected.flatten())


@pytest.mark.parametrize("own_time", [False, True])
def test_the_file_of_a_control_net_xs_is_what_was_trained(
    models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_time: bool
) -> None:
    import comfy.ldm.modules.attention as host_attention
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.xs_loading import load_controlnet_xs

    monkeypatch.setattr(host_attention, "optimized_attention", host_attention.attention_pytorch)
    model, case = models("sd15"), Case.of("sd15")
    controlled = trained(model, "xs", xs_own_time=own_time)
    path = saved(controlled, model, tmp_path, "xs")
    with torch.inference_mode():
        control = load_controlnet_xs(path).control
    assert same(dict(control.loaded.net.state_dict()), dict(controlled.net.state_dict()))
    aligned(control.loaded.net)
    seen = first_step(applied(model, control, case.hint), case)
    assert torch.equal(in_training(controlled, case, seen), seen["output"])
    assert relative(in_training(controlled, case, seen, 0.0), seen["output"]) > 1e-3


@pytest.mark.parametrize("variant", ["sd15_legacy", "svd_v1"])
def test_a_learned_scale_trains_and_is_what_the_loader_uses(models: Any, tmp_path: Path, variant: str) -> None:
    model, case = models(variant), Case.of(variant)
    controlled = trained(model, variant, trainable="none")
    with torch.no_grad():
        controlled.net.scale.fill_(0.7)
    square = Sizes((SIDE, SIDE), (0, 0), (SIDE, SIDE))
    noisy = torch.randn(case.frames, 4, CELLS, CELLS, generator=torch.Generator().manual_seed(2))
    conditions = [controlled.conditions(noisy, case.given, square)]
    out = controlled(noisy, torch.ones(case.frames), conditions, case.planes)
    (slope,) = torch.autograd.grad(out.square().mean(), [controlled.net.scale])
    assert float(slope.abs()) > 0
    loaded = loaded_from(saved(controlled, model, tmp_path, variant), model)
    assert loaded.control.scale == pytest.approx(0.7) and loaded.control.net.spec.name == variant
    aligned(loaded.control.net.patcher.model)
    seen = first_step(applied(loaded.model, loaded.control, case.hint), case)
    assert relative(in_training(controlled, case, seen), seen["output"]) < LEARNED_GAIN


@pytest.mark.parametrize(("fusion", "gain"), [("paper", 0.35), ("add", 0.0), ("zero_conv", 2.0)])
def test_the_way_of_joining_and_the_gain_are_in_the_file(models: Any, tmp_path: Path, fusion: str, gain: float) -> None:
    model, case = models("sd15"), Case.of("sd15")
    settings = {"trainable": "none", "fusion": fusion, "gain": gain}
    controlled = trained(model, "sd15", **settings)
    path = saved(controlled, model, tmp_path, "sd15", **settings)
    loaded = loaded_from(path, model)
    assert loaded.control.net.spec == controlled.control.spec
    assert not loaded.model.patches and not any(name.startswith("unet") for name in load_file(path))
    aligned(loaded.control.net.patcher.model)
    seen = first_step(applied(loaded.model, loaded.control, case.hint), case)
    assert torch.equal(in_training(controlled, case, seen), seen["output"])


def test_the_published_layout_is_what_the_authors_scripts_read(models: Any, tmp_path: Path) -> None:
    """A folder with controlnet.safetensors and unet.safetensors; the latter is added to the weights of its names."""
    model = models("sd15")
    controlled = trained(model, "sd15", layout="published")
    path = saved(controlled, model, tmp_path, "sd15", layout="published", save_dtype="fp16")
    assert path == tmp_path / "out" / "control" / "controlnet.safetensors"
    encoder, added = load_file(path), load_file(path.with_name("unet.safetensors"))
    reference = load_file(tiny_models.make_controlnext(tmp_path / "gen2.safetensors", "gen2"))
    assert {n: t.shape for n, t in encoder.items()} == {n: t.shape for n, t in reference.items()}
    assert {t.dtype for t in (*encoder.values(), *added.values())} == {torch.float16}
    key_map = unet_key_map(controlled.facts.config)
    assert added.keys() == {name for name in key_map if "to_out" in name}
    assert all(name.startswith(("down_blocks.", "mid_block.", "up_blocks.")) for name in added)
    for name, tensor in added.items():
        assert torch.equal(tensor, controlled.differences.parameters[key_map[name]].detach().half())
    assert peek(path.with_name("unet.safetensors")).metadata["format"] == "pt"


def test_the_metadata_says_how_the_file_was_made(models: Any, tmp_path: Path) -> None:
    model = models("sd15")
    base = str(tmp_path / "base.safetensors")
    path = saved(trained(model, "sd15", gain=0.35), model, tmp_path, "sd15", gain=0.35, base=base)
    found = peek(path).metadata
    assert found["controlnext.spec"] == "sd15" and float(found["controlnext.gain"]) == 0.35
    assert found["controlnext.steps"] == "3" and float(found["controlnext.loss"]) == 0.75
    assert found["controlnext.base"] == f"tiny {base_identity(model)}"
    assert str(tmp_path) not in str(found), "who shares a file does not tell where things lie"
    assert '"base": "base.safetensors"' in found["controlnext.recipe"]
    assert '"gain": 0.35' in found["controlnext.recipe"] and found["controlnext.weights_kind"] == "difference"
    assert read_control_file(peek(path)).metadata.gain == 0.35


def base_identity(model: Any) -> str:
    from comfyui_controlnext.controlnext_training.base_model.encode import BaseWithEncoders

    return BaseWithEncoders(model, None).identity("model")


def test_a_file_of_another_run_is_never_replaced(models: Any, tmp_path: Path) -> None:
    model = models("sd15")
    controlled = trained(model, "sd15", trainable="none")
    taken = checkpoint.save(tmp_path / "out" / "control.safetensors", {"mine": torch.zeros(1)}, {})
    assert saved(controlled, model, tmp_path, "sd15", trainable="none").name == "control_2.safetensors"
    assert load_file(taken).keys() == {"mine"}

"""From the trainer to the loader on transformers: the stock sampler runs the trained control, low rank included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.controlnext_core import checkpoint
from comfyui_controlnext.controlnext_training.base_model.controlled import Controlled, Sizes
from comfyui_controlnext.controlnext_training.base_model.trainable_copy import plain_attention
from comfyui_controlnext.tests.fixtures.narrow_training import CLIP_FRAMES, CLIPS, FAMILIES, config_for, narrow_base
from comfyui_controlnext.tests.fixtures.sampling_fixtures import picture, relative
from comfyui_controlnext.tests.fixtures.training_fixtures import CPU, SIDE, same, shaken
from comfyui_controlnext.tests.fixtures.transformer_fixtures import NARROW, WIDTH
from comfyui_controlnext.tests.training.test_training_seam import aligned, applied, loaded_from, saved
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

pytestmark = pytest.mark.comfy

FUSED = 1e-5
"""Relative difference on a later host, whose sampling uses operators without a gradient."""
TOKENS = 7


def given_to(family: str) -> dict[str, Tensor]:
    """Text in the trainer's form."""
    row, generator = NARROW[family], torch.Generator().manual_seed(4)
    found = {"context": torch.randn(1, TOKENS, row.text, generator=generator)}
    return found | ({"pooled": torch.randn(1, row.pooled, generator=generator)} if row.pooled else {})


def hint_of(family: str) -> Tensor:
    """Hint as an IMAGE (F, H, W, 3): a picture, or a clip whose picture moves."""
    count = CLIP_FRAMES if family in CLIPS else 1
    return torch.cat([picture().roll(3 * number, 2) for number in range(count)])


def first_step(model: Any, family: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inputs of the model in the stock KSampler's first step, and the network's own output, with torch's attention.

    The first step of a flow is at sigma 1; the output is negated where the host does so after the network.
    """
    import nodes as host_nodes

    seen: dict[str, Tensor] = {}

    def look(apply_model: Any, args: dict[str, Any]) -> Tensor:
        found = apply_model(args["input"], args["timestep"], **args["c"])
        seen.update(x=args["input"].clone(), sigma=args["timestep"].clone(), denoised=found.clone())
        return found

    watched = model.clone()
    watched.set_model_unet_function_wrapper(look)
    options = watched.model_options["transformer_options"]
    watched.model_options["transformer_options"] = {**options, "optimized_attention_override": plain_attention}
    row, frames = NARROW[family], hint_of(family).shape[0]
    length = ((frames - 1) // 4 + 1,) if row.frames else ()
    side = SIDE // row.pixels
    latent = {"samples": torch.zeros(1, row.channels, *length, side, side)}
    conditions = [[given["context"], {"pooled_output": given.get("pooled"), "guidance": 3.5}]]
    if family == "chroma":
        conditions[0][1].pop("guidance")  # type: ignore[attr-defined]
    with torch.inference_mode():
        host_nodes.KSampler().sample(watched, 1, 1, 1.0, "euler", "normal", conditions, conditions, latent)
    return {name: tensor.clone() for name, tensor in seen.items()}


def in_training(
    controlled: Controlled, family: str, given: dict[str, Tensor], seen: dict[str, Tensor], strength: float = 1.0
) -> Tensor:
    square = Sizes((SIDE, SIDE), (0, 0), (SIDE, SIDE))
    conditions = [controlled.conditions(seen["x"], given, square, 3.5)]
    hint = hint_of(family).movedim(-1, 1).contiguous()
    with torch.no_grad():
        return controlled.denoised(seen["x"], seen["sigma"], conditions, hint, strength)


def check_the_seam(family: str, folder: Path, exact: bool, **settings: Any) -> Path:
    model = narrow_base(family).model
    controlled = Controlled(model, config_for(family, **settings), torch.float32, CPU)
    shaken(dict(controlled.net.named_parameters()))
    shaken(controlled.differences.parameters)
    path = saved(controlled, model, folder, family, **settings)
    loaded = loaded_from(path, model)
    assert loaded.control.net.spec == controlled.control.spec
    assert same(dict(loaded.control.net.patcher.model.state_dict()), dict(controlled.net.state_dict()))
    aligned(loaded.control.net.patcher.model)
    given = given_to(family)
    seen = first_step(applied(loaded.model, loaded.control, hint_of(family)), family, given)
    found = in_training(controlled, family, given, seen)
    assert torch.equal(found, seen["denoised"]) if exact else relative(found, seen["denoised"]) < FUSED
    assert relative(in_training(controlled, family, given, seen, 0.0), seen["denoised"]) > 1e-3, "the control is heard"
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_is_what_was_trained(family: str, tmp_path: Path, pinned_host: bool) -> None:
    path = check_the_seam(family, tmp_path, pinned_host)
    with safe_open(path, "pt") as file:
        names, metadata = list(file.keys()), file.metadata()
    assert sum(name.startswith("base.") and name.endswith(".up") for name in names) >= 2
    assert (metadata["controlnext.spec"], metadata["controlnext.rank"]) == (family, "16")


@pytest.mark.parametrize("settings", [{"rank": 0}, {"rank": 4, "layout": "lora"}, {"trainable": "none"}], ids=str)
def test_other_ranks_and_layouts_are_what_was_trained(
    tmp_path: Path, pinned_host: bool, settings: dict[str, Any]
) -> None:
    path = check_the_seam("sd3", tmp_path, pinned_host, **settings)
    assert (path.name == "controlnet.safetensors") == ("layout" in settings)


@pytest.mark.parametrize(
    ("family", "settings"),
    [("flux", {"rank": 8}), ("chroma", {}), ("flux", {"rank": 0, "blocks": "single"}), ("chroma", {"layout": "lora"})],
    ids=str,
)
def test_parts_of_fused_weights_are_what_was_trained(
    family: str, settings: dict[str, Any], tmp_path: Path, pinned_host: bool
) -> None:
    path = check_the_seam(family, tmp_path, pinned_host, trainable="single_too", **settings)
    with safe_open(path, "pt") as file:
        slices = json.loads(file.metadata().get("controlnext.slices", "{}"))
    parts = {f"single_blocks.{block}.linear2.weight": [1, 0, WIDTH] for block in range(2)}
    assert slices == ({} if "layout" in settings else parts)


@pytest.mark.parametrize("family", ["lumina2", "z_image"])
def test_values_of_fused_weights_are_what_was_trained(family: str, tmp_path: Path, pinned_host: bool) -> None:
    """Values in the narrow Lumina2: two heads of queries share one of keys and values, of 64 numbers."""
    path = check_the_seam(family, tmp_path, pinned_host, trainable="values_too", rank=8)
    with safe_open(path, "pt") as file:
        slices = json.loads(file.metadata()["controlnext.slices"])
    rows = [0, 192, 64] if family == "lumina2" else [0, 512, 256]
    assert slices == {f"layers.{block}.attention.qkv.weight": rows for block in range(2)}


def test_a_run_goes_on_where_a_file_ends(tmp_path: Path) -> None:
    from comfyui_controlnext.controlnext_training.config import ConfigError

    model = narrow_base("flux").model
    first = Controlled(model, config_for("flux"), torch.float32, CPU)
    shaken(first.differences.parameters)
    path = saved(first, model, tmp_path, "flux")
    again = Controlled(model, config_for("flux", init_control=str(path), seed=5), torch.float32, CPU)
    assert same(again.differences.tensors(), first.differences.tensors())
    assert same(dict(again.net.state_dict()), dict(first.net.state_dict()))
    with pytest.raises(ConfigError, match="init_control: .*Set trainable, blocks and rank as they"):
        Controlled(model, config_for("flux", init_control=str(path), rank=4), torch.float32, CPU)


def test_a_run_goes_on_where_a_file_of_parts_ends(tmp_path: Path) -> None:
    from comfyui_controlnext.controlnext_training.config import ConfigError

    model, settings = narrow_base("flux").model, {"trainable": "single_too", "blocks": "single.1"}
    first = Controlled(model, config_for("flux", **settings), torch.float32, CPU)
    shaken(first.differences.parameters)
    path = saved(first, model, tmp_path, "flux", **settings)
    again = Controlled(model, config_for("flux", **settings, init_control=str(path), seed=5), torch.float32, CPU)
    assert same(again.differences.tensors(), first.differences.tensors())
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    metadata["controlnext.slices"] = json.dumps({"single_blocks.1.linear2.weight": (1, 8, WIDTH)})
    moved = checkpoint.save(tmp_path / "moved.safetensors", load_file(path), metadata)
    with pytest.raises(ConfigError, match="changes 1 weights that do not train"):
        Controlled(model, config_for("flux", **settings, init_control=str(moved)), torch.float32, CPU)

"""UNet weights of a control on a real MODEL: the sums formed by the host, together with LoRAs, in every base dtype."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.controlnext_core.checkpoint import CheckpointError
from comfyui_controlnext.tests.fixtures.lazy_layers import EITHER_WAY
from comfyui_controlnext.tests.fixtures.sampling_fixtures import REASSOCIATED, Studio, picture, relative
from comfyui_controlnext.tools import tiny_models
from safetensors.torch import load_file, save_file
from torch import Tensor

pytestmark = pytest.mark.comfy

FP16_STEP = 2**-11
"""Largest relative rounding error of fp16."""


def host_names() -> dict[str, str]:
    """Published name -> the host's, from the layout of the tiny UNet."""
    names = {}
    for ldm, diffusers, _ in tiny_models.attention_layers(tiny_models.LAYOUTS["sd15"]):
        for attention in ("attn1", "attn2"):
            for leaf in ("weight", "bias"):
                tail = f"{attention}.to_out.0.{leaf}"
                names[f"{diffusers}.{tail}"] = f"diffusion_model.{ldm}.{tail}"
    return names


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoder in one folder, with a difference file in another."""
    folder = tmp_path_factory.mktemp("differences")
    tiny_models.make_controlnext(folder / "control.safetensors", "gen2")
    return tiny_models.make_unet_difference(folder / "unet.safetensors")


@pytest.fixture
def loads(studio: Studio, differences: Path) -> Iterator[Any]:
    """Load the control with `weights` in place of the difference file: (file, model, **options) -> Loaded."""

    def load(weights: Path = differences, model: Any = None, **options: Any) -> Any:
        folder = weights.parent / f"control of {weights.stem}"
        if not folder.is_dir():
            tiny_models.make_controlnext(folder / "control.safetensors", "gen2")
            (folder / "unet.safetensors").write_bytes(weights.read_bytes())
        return studio.load(folder / "control.safetensors", "auto", model, **options)

    yield load
    weights_in_use(studio.model)  # leaves the base unpatched


def weights_in_use(model: Any) -> dict[str, Tensor]:
    """Copies of the weights with which the host would sample now."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([model], force_full_load=True)
    return {name: model.model.get_parameter(name).detach().clone() for name in host_names().values()}


@EITHER_WAY
def test_the_sum_is_base_plus_strength_times_difference(studio: Studio, loads: Any, differences: Path) -> None:
    base = {f"diffusion_model.{name}": t for name, t in tiny_models.unet_tensors("sd15").items()}
    published = load_file(differences)
    assert set(published) == set(host_names())
    for strength in (1.0, 0.5, -1.0, 2.0):
        found = weights_in_use(loads(weights_strength=strength).model)
        for name, host_name in host_names().items():
            expected = base[host_name].float() + strength * published[name].float()
            torch.testing.assert_close(found[host_name], expected, rtol=1e-6, atol=1e-7)


def test_strength_zero_is_bitwise_the_base(studio: Studio, plain: Tensor, loads: Any) -> None:
    loaded = loads(weights_strength=0.0)
    assert not loaded.model.patches and "off (strength 0)" in loaded.report
    assert torch.equal(studio.sample(loaded.model), plain)


@EITHER_WAY
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_full_weights_act_as_the_differences_that_they_hold(
    studio: Studio, plain: Tensor, loads: Any, tmp_path: Path, dtype: torch.dtype
) -> None:
    base = tiny_models.unet_tensors("sd15")
    full = tiny_models.make_unet_difference(tmp_path / "full.safetensors", kind="full", dtype=dtype, base=base)
    by_difference, by_full = loads(), loads(full)
    assert "difference" in by_difference.report and "full" in by_full.report
    ours, theirs = weights_in_use(by_full.model), weights_in_use(by_difference.model)
    for name in ours:
        spread = float(theirs[name].abs().max())
        assert float((ours[name] - theirs[name]).abs().max()) <= FP16_STEP * spread, name
    found, expected = studio.sample(by_full.model), studio.sample(by_difference.model)
    assert relative(found, expected) < 2e-3
    assert relative(expected, plain) > 0.02


def with_lora(model: Any, tiny: Any) -> Any:
    import comfy.sd
    import comfy.utils

    lora = comfy.utils.load_torch_file(str(tiny.models / "loras" / tiny.names["lora"]))
    return comfy.sd.load_lora_for_models(model, None, lora, 0.8, 0.0)[0]


def test_a_lora_before_or_after_gives_the_same_sum(studio: Studio, loads: Any, tiny: Any) -> None:
    before = loads(model=with_lora(studio.model, tiny)).model
    after = with_lora(loads().model, tiny)
    alone = weights_in_use(loads().model)
    first, last = weights_in_use(before), weights_in_use(after)
    for name in first:
        torch.testing.assert_close(first[name], last[name], rtol=1e-6, atol=1e-6)
    changed = [name for name in first if relative(first[name], alone[name]) > 0.01]
    assert changed and all(name.endswith("weight") for name in changed)
    assert relative(studio.sample(before), studio.sample(after)) < REASSOCIATED


@pytest.mark.parametrize("onto", ["base", "lora model"])
def test_full_weights_are_compared_with_the_unpatched_base_even_after_a_lora_run(
    studio: Studio, loads: Any, tiny: Any, tmp_path: Path, onto: str
) -> None:
    """The host patches in place, so that after a run the model's own tensors hold the LoRA."""
    base = tiny_models.unet_tensors("sd15")
    full = tiny_models.make_unet_difference(tmp_path / "full.safetensors", kind="full", base=base)
    fresh = loads(full).model
    lora_model = with_lora(studio.model, tiny)
    studio.sample(lora_model, steps=1)
    name = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_out.0.weight"
    held = studio.model.model.get_parameter(name)
    assert relative(held, base[name.removeprefix("diffusion_model.")].float()) > 0.1, "the LoRA is not in the weights"
    second = loads(full, model=studio.model if onto == "base" else lora_model).model
    assert fresh.patches
    for key, (*_, ours) in fresh.patches.items():
        strength, (difference,), *_ = second.patches[key][-1]
        assert strength == 1.0 and torch.equal(difference, ours[1][0]), key


@pytest.mark.parametrize(
    ("dtype", "gain_tolerance"),
    [
        (torch.float16, 1e-3),
        (torch.bfloat16, 1e-2),
        (torch.float8_e4m3fn, None),  # added in each forward: tests/host/test_unet_quantised.py has the effect
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["difference", "full"])
def test_bases_of_other_dtypes_take_the_weights(
    studio: Studio,
    loads: Any,
    tiny: Any,
    tmp_path: Path,
    differences: Path,
    dtype: Any,
    gain_tolerance: float | None,
    kind: str,
) -> None:
    import comfy.sd

    path = tiny.models / "checkpoints" / tiny.names["checkpoint"]
    options = {"model_options": {"dtype": dtype}}
    model = comfy.sd.load_checkpoint_guess_config(str(path), output_vae=False, output_clip=False, **options)[0]
    file = differences
    if kind == "full":
        base = tiny_models.unet_tensors("sd15")
        file = tiny_models.make_unet_difference(tmp_path / "full.safetensors", kind="full", base=base)
    before = weights_in_use(model)
    assert {t.dtype for name, t in before.items() if name.endswith("weight")} == {dtype}
    loaded = loads(file, model)
    assert f"; {kind}, " in loaded.report
    after = weights_in_use(loaded.model)
    published = load_file(differences)
    dots, sizes = 0.0, 0.0
    for name, host_name in host_names().items():
        difference = published[name].double()
        dots += float((difference * (after[host_name].double() - before[host_name].double())).sum())
        sizes += float(difference.square().sum())
    if gain_tolerance is None:
        assert dots == 0 and "added in each forward as the model is quantised" in loaded.report
    else:
        assert dots / sizes == pytest.approx(1.0, abs=gain_tolerance)
    controlled = studio.ours(loaded.model, loaded.control, picture())
    latents = studio.sample(controlled, steps=1)
    assert latents.isfinite().all()
    assert relative(latents, studio.sample(model, steps=1)) > 0.01


def test_differences_of_zero_are_left_out(studio: Studio, loads: Any, differences: Path, tmp_path: Path) -> None:
    tensors = load_file(differences)
    zeroed = sorted(tensors)[:3]
    tensors |= {name: torch.zeros_like(tensors[name]) for name in zeroed}
    save_file(tensors, tmp_path / "sparse.safetensors")
    loaded = loads(tmp_path / "sparse.safetensors")
    assert set(loaded.model.patches) == {host_names()[name] for name in tensors.keys() - set(zeroed)}
    assert f"{len(tensors) - 3} of {len(tensors)} tensors" in loaded.report


def test_weights_of_another_family_are_refused_and_change_nothing(
    studio: Studio, plain: Tensor, loads: Any, tmp_path: Path
) -> None:
    sdxl = tiny_models.make_unet_difference(tmp_path / "sdxl.safetensors", unet="sdxl")
    patches = {name: len(p) for name, p in studio.model.patches.items()}
    with pytest.raises(CheckpointError, match=r"unet\.safetensors: .*names that the connected model does not have"):
        loads(sdxl)
    assert {name: len(p) for name, p in studio.model.patches.items()} == patches
    assert torch.equal(studio.sample(), plain)


def test_a_run_without_the_weights_afterwards_is_bitwise_as_before(studio: Studio, plain: Tensor, loads: Any) -> None:
    assert relative(studio.sample(loads().model), plain) > 0.02
    assert torch.equal(studio.sample(), plain)


def test_the_stated_kind_is_taken_at_its_word(studio: Studio, loads: Any, differences: Path) -> None:
    """Differences said to be full weights take the place of the base's."""
    found = weights_in_use(loads(weights_kind="full").model)
    published = load_file(differences)
    for name, host_name in host_names().items():
        torch.testing.assert_close(found[host_name], published[name].float(), rtol=0, atol=5e-4)

"""Whole-model parity on transformers: the host's model with this pack's control against the reference's hook."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from comfyui_controlnext.controlnext_core.specs import SPECS, Halves
from comfyui_controlnext.tests.fixtures.transformer_fixtures import NARROW, inputs, narrow_model
from comfyui_controlnext.tests.references import reference_controlnext as released
from comfyui_controlnext.tests.references import reference_transformers as reference
from torch import Tensor

log = logging.getLogger(__name__)
pytestmark = pytest.mark.comfy

TOLERANCE = 1e-4  # fp32
SIZES = ((8, 8), (6, 10), (9, 11))
"""Sizes in latent cells; the last pair is odd, so that the host pads its tokens."""
HALVES = {1: [1, 0], 3: [0]}
TEXTS = (7, 40)
"""Numbers of tokens of the prompt, below and above the multiple to which Z-Image pads."""
STRENGTH, SIGMA = 0.8, 0.6
FAMILIES = tuple(name for name, spec in SPECS.items() if spec.on_transformer)
each = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@functools.cache
def weights(family: str, seed: int = 11) -> dict[str, Tensor]:
    return released.random_weights(reference.FAMILIES[family].build, seed=seed, out=NARROW[family].width)


@pytest.fixture(scope="module")
def control_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Control of a family, from a file."""
    from comfyui_controlnext.controlnext_core import checkpoint
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.loading import load_control
    from comfyui_controlnext.controlnext_core.detection import read_control_file

    @functools.cache
    def load(family: str, seed: int = 11) -> Any:
        path = tmp_path_factory.mktemp("controls") / "x.safetensors"
        checkpoint.save(path, weights(family, seed), {"controlnext.spec": family})
        return load_control(read_control_file(checkpoint.peek(path)), SPECS[family].family)

    return load


def forward(family: str, given: Any, options: dict[str, Any], control: Any = None) -> Tensor:
    """Output of the host's model for the latent: its denoised latent converted to the velocity."""
    model, stock = narrow_model(family), None
    if control is not None:
        control.pre_run(model, model.model_sampling.percent_to_sigma)
        stock = control.get_control(given.x, given.sigma, given.more, len(options["cond_or_uncond"]), options)
    denoised = model.apply_model(
        given.x, given.sigma, c_crossattn=given.context, control=stock, transformer_options=options, **given.more
    )
    if control is not None:
        control.cleanup()
    return (given.x - denoised) / SIGMA


def relative(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


def hints(count: int, size: tuple[int, int], seed: int = 5, pixels: int = 8) -> Tensor:
    return torch.rand(count, 3, pixels * size[0], pixels * size[1], generator=torch.Generator().manual_seed(seed))


def compare(family: str, control: Any, size: tuple[int, int], batch: int, text: int, references: int = 0) -> float:
    """Assert parity; returns the relative difference of the whole output."""
    chunks = HALVES[batch]
    rows = batch * len(chunks)
    given = inputs(family, size, rows, text, SIGMA, references=references)
    options: dict[str, Any] = {"cond_or_uncond": chunks, "sigmas": given.sigma}
    hint = hints(batch, size, pixels=NARROW[family].pixels)
    bare = forward(family, given, dict(options))
    found = forward(family, given, dict(options), control.copy().set_cond_hint(hint, STRENGTH, (0.0, 1.0)))
    build = reference.FAMILIES[family].build
    encoded = reference.encode(weights(family), hint, SIGMA, reference.grid_of(size), build).repeat(len(chunks), 1, 1)
    terms = [reference.Term(encoded, torch.full((rows,), STRENGTH))]
    with reference.controlled(narrow_model(family), family, text, size, terms, references):
        expected = forward(family, given, dict(options))
    effect = (expected - bare).double()
    assert float(effect.norm() / expected.double().norm()) > 0.01, "the control does too little to be measured"
    assert float((found - bare - effect).norm() / effect.norm()) < 10 * TOLERANCE
    assert torch.equal(forward(family, given, dict(options)), bare), "something was left behind"
    return relative(found, expected)


@pytest.mark.parametrize("others", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("size", SIZES, ids=str)
@each
def test_the_model_agrees_with_the_released_rule(
    family: str, size: tuple[int, int], others: bool, control_of: Any
) -> None:
    """Pairs of sizes and texts: one text per batch, in turn from size to size; `others` are the other pairs."""
    texts = TEXTS if others is bool(SIZES.index(size) % 2) else TEXTS[::-1]
    pairs = zip(HALVES, texts, strict=True)
    worst = max(compare(family, control_of(family), size, batch, text) for batch, text in pairs)
    log.info("%s: relative difference %.1e", family, worst)
    assert worst < TOLERANCE


@pytest.mark.parametrize("family", [name for name in FAMILIES if NARROW[name].references])
def test_tokens_of_reference_pictures_are_left_alone(family: str, control_of: Any) -> None:
    assert compare(family, control_of(family), SIZES[2], 1, TEXTS[0], references=2) < TOLERANCE


def test_z_image_omni_gets_the_control_on_its_own_picture(control_of: Any, pinned_host: bool) -> None:
    """Newer hosts put the tokens of reference pictures between the text's and the picture's."""
    if pinned_host:
        pytest.skip("ComfyUI 0.3.75 knows no reference pictures of Z-Image")
    assert compare("z_image", control_of("z_image"), SIZES[2], 1, TEXTS[0], references=2) < TOLERANCE


@each
def test_several_controls_each_measure_the_same_tokens_in_any_order(family: str, control_of: Any) -> None:
    size, text = SIZES[2], TEXTS[0]
    given, grid = inputs(family, size, 2, text, SIGMA), reference.grid_of(size)
    options: dict[str, Any] = {"cond_or_uncond": [1, 0], "sigmas": given.sigma}
    hint, build = hints(1, size, pixels=NARROW[family].pixels), reference.FAMILIES[family].build
    masks = [torch.rand(1, 1, 9, 11, generator=torch.Generator().manual_seed(2)), None]
    ours = [
        control_of(family, seed).copy().with_options(masks=() if mask is None else (mask,))
        for seed, mask in zip((11, 12), masks, strict=True)
    ]
    for control, strength in zip(ours, (0.7, 0.4), strict=True):
        control.set_cond_hint(hint, strength, (0.0, 1.0))
    ours[0].set_previous_controlnet(ours[1])
    found = forward(family, given, dict(options), ours[0])
    ours[0].set_previous_controlnet(None)
    ours[1].set_previous_controlnet(ours[0])
    assert torch.equal(forward(family, given, dict(options), ours[1]), found)
    terms = [
        reference.Term(reference.encode(weights(family, seed), hint, SIGMA, grid, build).repeat(2, 1, 1), gain, mask)
        for seed, gain, mask in zip((11, 12), (torch.full((2,), 0.7), torch.full((2,), 0.4)), masks, strict=True)
    ]
    with reference.controlled(narrow_model(family), family, text, size, terms):
        expected = forward(family, given, dict(options))
    assert relative(found, expected) < TOLERANCE


@each
def test_one_half_of_the_guidance_alone(family: str, control_of: Any) -> None:
    size, text = SIZES[0], TEXTS[1]
    given = inputs(family, size, 2, text, SIGMA)
    options: dict[str, Any] = {"cond_or_uncond": [1, 0], "sigmas": given.sigma}
    control = control_of(family).copy().with_options(apply_to=Halves.POSITIVE)
    found = forward(family, given, dict(options), control.set_cond_hint(hints(1, size), 1.0, (0.0, 1.0)))
    bare = forward(family, given, dict(options))
    both = forward(family, given, dict(options), control_of(family).copy().set_cond_hint(hints(1, size), 1.0, (0, 1)))
    assert torch.equal(found[:1], bare[:1]) and relative(found[1:], both[1:]) < 1e-5
    assert relative(found[1:], bare[1:]) > 0.01

"""Slices of fused weights in named subsets, against the inputs and outputs of the host's attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfyui_controlnext.controlnext_core.specs import SPECS
from comfyui_controlnext.tests.fixtures.transformer_fixtures import inputs
from comfyui_controlnext.tests.fixtures.transformer_stage import FAMILIES, in_turn
from torch import Tensor

pytestmark = pytest.mark.comfy


def slice_of(at: Any, subset: str, name: str) -> tuple[int, int, int]:
    """Slice (dim, start, length) of a weight in a subset; `all` and expressions cover whole weights."""
    from comfyui_controlnext.controlnext_core.comfy_adapter.bases.table import BASES

    (base,) = (base for base in BASES if base.family is SPECS[at.family].family)
    shapes = {name: tensor.shape for name, tensor in at.model.model.diffusion_model.named_parameters()}
    assert base.slices("all", shapes, [name]) == {} == base.slices("re:attn", shapes, [name])
    return base.slices(subset, shapes, [name])[name]


def through_attention(at: Any, attention: Any) -> None:
    """Run one forward of the host's model with this attention function (the host's, q, k, v, ...)."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([at.model])
    given = inputs(at.family, (8, 8))
    options = {"cond_or_uncond": [0], "sigmas": given.sigma, "optimized_attention_override": attention}
    at.model.model.apply_model(
        given.x, given.sigma, c_crossattn=given.context, transformer_options=options, **given.more
    )


@pytest.mark.parametrize("family", ["flux", "chroma"])
def test_the_first_columns_of_a_single_blocks_output_read_the_attention(family: str, stage: Any) -> None:
    """Input of the fused layer in the host's block, against the output of its attention."""
    at = stage(family)
    attended: list[Tensor] = []
    read: list[Tensor] = []

    def attention(function: Any, *args: Any, **more: Any) -> Tensor:
        attended.append(function(*args, **more))
        return attended[-1]

    layer = at.model.model.diffusion_model.single_blocks[1].linear2
    watching = layer.register_forward_pre_hook(lambda module, given: read.append(given[0]))
    try:
        through_attention(at, attention)
    finally:
        watching.remove()
    dim, start, length = slice_of(at, "single_too", "single_blocks.1.linear2.weight")
    assert dim == 1 and torch.equal(read[0].narrow(-1, start, length), attended[-1])


@pytest.mark.parametrize("family", ["lumina2", "z_image"])
def test_the_last_rows_of_a_fused_weight_make_the_values(family: str, stage: Any) -> None:
    """Output of the fused layer, against the values of the host's attention: one head of them for several queries'."""
    at = stage(family)
    values: list[Tensor] = []
    made: list[Tensor] = []

    def attention(function: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **more: Any) -> Tensor:
        values.append(v)
        return function(q, k, v, *args, **more)

    layer = at.model.model.diffusion_model.layers[1].attention.qkv
    watching = layer.register_forward_hook(lambda module, given, out: made.append(out))
    try:
        through_attention(at, attention)
    finally:
        watching.remove()
    dim, start, length = slice_of(at, "values_too", "layers.1.attention.qkv.weight")
    expected = values[-1].movedim(1, 2)  # (rows, tokens, heads, channels)
    heads = made[0].narrow(-1, start, length).unflatten(-1, (-1, expected.shape[-1]))
    assert dim == 0 and torch.equal(heads.repeat_interleave(expected.shape[2] // heads.shape[2], dim=2), expected)


def test_the_short_suite_has_every_family_and_every_value() -> None:
    for values in (["a", "b"], ["a", "b", "c"], list("abcdefghi")):
        cases = in_turn("x", values).mark.args[1]
        short = [case.values for case in cases if not case.marks]
        assert {family for family, _ in short} == set(FAMILIES) and {value for _, value in short} == set(values)
        assert len(short) == len(values) + len(FAMILIES) - 1 and len(cases) == len(values) * len(FAMILIES)

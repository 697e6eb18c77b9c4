"""Low-rank differences: their maths, their names in files, the host's LoRA form, subsets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from comfyui_controlnext.controlnext_core import checkpoint
from comfyui_controlnext.controlnext_core.checkpoint import CheckpointError
from comfyui_controlnext.controlnext_core.low_rank import (
    LowRank,
    as_lora,
    chosen_names,
    from_lora,
    is_lora,
    low_rank_parameters,
    read_differences,
    summed,
    whole,
    written,
)
from torch import Tensor

OUT, IN, RANK = 12, 20, 3
A, B, C = "blocks.0.proj.weight", "blocks.1.proj.weight", "blocks.2.fused.weight"
SHAPES = {A: (OUT, IN), B: (OUT, IN), C: (OUT, 4 * IN)}
COLUMNS = (1, IN, 2 * IN)
"""Slice of C to which its difference applies: the second and third of four parts."""


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shape_of(name: str) -> torch.Size | None:
    bare = name.removeprefix("diffusion_model.")
    return torch.Size(SHAPES[bare]) if name != bare and bare in SHAPES else None


@pytest.fixture
def stored() -> dict[str, Tensor]:
    """Differences: a low-rank one, a full one, and a low-rank one of a slice."""
    return {
        f"{A}.up": numbers(0, OUT, RANK),
        f"{A}.down": numbers(1, RANK, IN),
        B: numbers(2, OUT, IN),
        f"{C}.up": numbers(3, OUT, RANK),
        f"{C}.down": numbers(4, RANK, 2 * IN),
    }


def read(tensors: dict[str, Tensor]) -> dict:
    return read_differences(tensors, {C: COLUMNS}, shape_of, "a file")


def test_what_is_read_is_the_product_of_the_factors_under_the_hosts_names(stored: dict[str, Tensor]) -> None:
    found = read(stored)
    assert list(found) == [f"diffusion_model.{A}", f"diffusion_model.{B}", (f"diffusion_model.{C}", COLUMNS)]
    expected = torch.einsum("or,ri->oi", stored[f"{A}.up"].double(), stored[f"{A}.down"].double())
    torch.testing.assert_close(whole(found[f"diffusion_model.{A}"]).double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(whole(found[f"diffusion_model.{B}"]), stored[B])


def test_a_file_round_trips_bit_for_bit(stored: dict[str, Tensor]) -> None:
    tensors, slices = written(read(stored))
    assert slices == {C: COLUMNS} and tensors.keys() == stored.keys()
    assert all(torch.equal(tensors[name], stored[name]) for name in stored)


def test_the_lora_form_round_trips_and_a_slice_becomes_the_whole_weight(stored: dict[str, Tensor]) -> None:
    found = read(stored)
    lora = as_lora(found, shape_of)
    assert is_lora(lora) and not is_lora(stored) and not is_lora([])
    again = read_differences(from_lora(lora, shape_of), {}, shape_of, "a LoRA")
    for name in (A, B):
        key = f"diffusion_model.{name}"
        assert torch.equal(whole(again[key]), whole(found[key]))
    embedded = whole(again[f"diffusion_model.{C}"])
    expected = torch.zeros(SHAPES[C])
    expected[:, IN : 3 * IN] = whole(found[(f"diffusion_model.{C}", COLUMNS)])
    torch.testing.assert_close(embedded, expected, rtol=1e-6, atol=1e-6)
    assert not embedded[:, :IN].any() and not embedded[:, 3 * IN :].any()


def test_a_bias_and_a_parameter_outside_of_layers_keep_their_names_in_the_lora_form() -> None:
    shapes = SHAPES | {name: torch.Size([OUT]) for name in ("blocks.0.a.bias", "pad_token")}
    differences = {f"diffusion_model.{name}": numbers(3, *shape) for name, shape in shapes.items()}

    def shape(name: str) -> torch.Size | None:
        bare = name.removeprefix("diffusion_model.")
        return torch.Size(shapes[bare]) if bare in shapes else None

    lora = as_lora(differences, shape)
    assert {"diffusion_model.blocks.0.a.bias.diff", "diffusion_model.pad_token.diff"} < lora.keys() and is_lora(lora)
    again = read_differences(from_lora(lora, shape), {}, shape, "a LoRA")
    assert again.keys() == differences.keys()
    assert all(torch.equal(whole(again[name]), differences[name]) for name in differences)


@pytest.mark.parametrize("low_rank", [True, False])
def test_a_slice_of_rows_is_embedded_too(low_rank: bool) -> None:
    difference = LowRank(numbers(0, 4, 2), numbers(1, 2, IN)) if low_rank else numbers(0, 4, IN)
    lora = as_lora({(f"diffusion_model.{A}", (0, 8, 4)): difference}, shape_of)
    found = whole(read_differences(from_lora(lora, shape_of), {}, shape_of, "a LoRA")[f"diffusion_model.{A}"])
    assert torch.equal(found[8:], whole(difference)) and not found[:8].any()


def test_sums_scale_and_keep_low_ranks_low(stored: dict[str, Tensor]) -> None:
    key = f"diffusion_model.{A}"
    one, other = {key: read(stored)[key]}, {key: LowRank(numbers(7, OUT, 2), numbers(8, 2, IN))}
    total = summed([(one, 0.5), (other, -2.0)])[key]
    assert isinstance(total, LowRank) and total.rank == RANK + 2
    torch.testing.assert_close(total.whole(), 0.5 * whole(one[key]) - 2 * whole(other[key]), rtol=1e-5, atol=1e-5)
    mixed = summed([(one, 1.0), ({key: stored[B]}, 3.0)])[key]
    torch.testing.assert_close(whole(mixed), whole(one[key]) + 3 * stored[B], rtol=1e-5, atol=1e-5)


def test_zero_differences_are_left_out_and_nothing_else_is_an_error(stored: dict[str, Tensor]) -> None:
    silent = {**stored, f"{A}.up": torch.zeros(OUT, RANK)}
    assert f"diffusion_model.{A}" not in read(silent)
    with pytest.raises(CheckpointError, match="nothing to apply.*weights_name to none"):
        read({B: torch.zeros(OUT, IN)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({f"{A}.up": None}, "needs either a whole difference or both .up and .down; found blocks.0.proj.weight.down"),
        ({A: numbers(0, OUT, IN)}, "needs either a whole difference or both"),
        ({f"{A}.up": numbers(0, OUT, RANK + 1)}, r"has factors \[12, 4\] and \[3, 20\]"),
        ({f"{A}.up": numbers(0, OUT + 1, RANK)}, r"has shape \[13, 20\], the connected model \[12, 20\]"),
        ({"blocks.9.proj.weight": numbers(0, OUT, IN)}, "1 names that the connected model does not have: blocks.9"),
        ({B: torch.full((OUT, IN), float("nan"))}, "'blocks.1.proj.weight' holds NaN"),
        ({f"{C}.down": numbers(0, RANK, IN)}, r"has shape \[12, 20\], the connected model \[12, 40\]"),
    ],
)
def test_what_is_wrong_is_named(stored: dict[str, Tensor], change: dict[str, Tensor | None], words: str) -> None:
    changed = {name: t for name, t in {**stored, **change}.items() if t is not None}
    with pytest.raises(CheckpointError, match=words):
        read(changed)


def test_a_slice_outside_the_weight_is_named(stored: dict[str, Tensor]) -> None:
    with pytest.raises(CheckpointError, match=r"its slice \[1, 70, 40\] .* is not inside .*\[12, 80\]"):
        read_differences(stored, {C: (1, 70, 40)}, shape_of, "a file")


def test_two_parts_of_one_weight_do_not_fit_into_a_file() -> None:
    halves = {(f"diffusion_model.{C}", (1, start, IN)): numbers(start, OUT, IN) for start in (0, IN)}
    with pytest.raises(CheckpointError, match="two parts of one weight"):
        written(halves)


def test_subsets_are_of_the_first_blocks() -> None:
    names = [f"blocks.{i}.attn.proj.weight" for i in range(12)] + [
        "blocks.0.attn.proj.bias",
        "x.blocks.1.attn.proj.weight",
    ]
    pattern = r"^blocks\.\d+\.attn\.proj\.weight$"
    assert chosen_names(names, pattern, None) == names[:12]
    assert chosen_names(names, pattern, 2) == names[:2]
    assert low_rank_parameters([torch.Size((5, 7)), torch.Size((2, 3))], 4) == 4 * 12 + 4 * 5
    assert low_rank_parameters([torch.Size((5, 7))], 0) == 35


def test_half_precision_is_kept_and_other_formats_become_fp32(tmp_path: Path) -> None:
    half = {f"{A}.up": numbers(0, OUT, RANK).half(), f"{A}.down": numbers(1, RANK, IN).half()}
    path = checkpoint.save(tmp_path / "x.safetensors", half, {})
    found = read(checkpoint.load(path))[f"diffusion_model.{A}"]
    assert isinstance(found, LowRank) and found.up.dtype == torch.float16
    double = read({B: numbers(0, OUT, IN).double()})[f"diffusion_model.{B}"]
    assert isinstance(double, Tensor) and double.dtype == torch.float32

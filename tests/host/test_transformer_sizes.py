"""Size of every family's default differences with its encoder: at most 16 MiB in fp16, from published shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfyui_controlnext.controlnext_core.low_rank import chosen_names, low_rank_parameters, sliced
from comfyui_controlnext.controlnext_core.specs import SPECS, config_of
from comfyui_controlnext.models.controlnext import ControlNeXt
from comfyui_controlnext.tests.fixtures.transformer_files import SMALL, shapes_of

pytestmark = pytest.mark.comfy
LIMIT = 16 * 2**20
HEADER = 64 * 1024
"""Upper limit in bytes for names, shapes and metadata in a file."""


def sd3(depth: int, second_attention: int = 0) -> dict[str, Any]:
    embedder = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 64 * depth}}
    return {
        "depth": depth,
        "context_embedder_config": embedder,
        "x_block_self_attn_layers": list(range(second_attention)),
    }


# published size -> family, what it has more than the family's small file, its width, weights of the default subset
PUBLISHED: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "SD3-medium": ("sd3", sd3(24), 1536, 24),
    "SD3.5-medium": ("sd3", sd3(24, 13), 1536, 37),
    "SD3.5-large": ("sd3", sd3(38), 2432, 38),
    "Flux.1": ("flux", {"depth": 19, "depth_single_blocks": 38}, 3072, 19),
    "Chroma": ("chroma", {"depth": 19, "depth_single_blocks": 38}, 3072, 19),
    "Qwen-Image": ("qwen_image", {"num_layers": 60}, 3072, 30),
    "Lumina2": ("lumina2", {"n_layers": 26}, 2304, 26),
    "Z-Image": ("z_image", {"n_layers": 30}, 3840, 30),
    "Wan 2.1 1.3B": ("wan", {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30}, 1536, 20),
    "Wan 2.1 14B": ("wan", {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}, 5120, 20),
    "Wan 2.2 5B": ("wan_5b", {"dim": 3072, "ffn_dim": 14336, "num_heads": 24, "num_layers": 30}, 3072, 15),
}


def counted(size: str, pinned: bool) -> tuple[Any, dict[str, torch.Size], int]:
    """Row of the base, shapes of its weights, and number of values in the encoder, of a published size."""
    from comfyui_controlnext.controlnext_core.comfy_adapter.bases.transformers import TRANSFORMERS

    family, more, width, _ = PUBLISHED[size]
    spec, small = SPECS[family], SMALL[family]
    shapes = shapes_of(small.network, small.config | ({} if pinned else small.later) | more)
    encoder = ControlNeXt(config_of(spec, width), dtype=torch.float16, device="meta")
    row = next(base for base in TRANSFORMERS if base.family is spec.family)
    return row, shapes, sum(p.numel() for p in encoder.parameters())


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_default_fits_into_sixteen_mebibytes(size: str, pinned_host: bool) -> None:
    family, _, width, count = PUBLISHED[size]
    default = SPECS[family].differences
    assert default is not None
    base, shapes, numbers = counted(size, pinned_host)
    names = chosen_names(shapes, base.trainable[default.subset], default.blocks)
    assert len(names) == count and {tuple(shapes[name]) for name in names} == {(width, width)}
    numbers += low_rank_parameters((shapes[name] for name in names), default.rank)
    assert 2 * numbers + HEADER < LIMIT, f"{2 * numbers / 2**20:.1f} MiB"


@pytest.mark.parametrize("size", ["Flux.1", "Chroma"])
def test_single_blocks_fit_as_well_at_half_the_rank(size: str, pinned_host: bool) -> None:
    """Attention's columns of each single block, 3072 of 15360: 14.1 MB at rank 8, and 19.7 at rank 16."""
    base, shapes, encoder = counted(size, pinned_host)
    names = chosen_names(shapes, base.trainable["single_too"], None)
    slices = base.slices("single_too", shapes, names)
    assert len(names) == 19 + 38 and set(slices.values()) == {(1, 0, 3072)}
    assert sorted(slices) == sorted(f"single_blocks.{block}.linear2.weight" for block in range(38))
    assert {tuple(shapes[name]) for name in slices} == {(3072, 15360)}
    parts = [sliced(shapes[name], slices.get(name)) for name in names]
    megabytes = [2 * (encoder + low_rank_parameters(parts, rank)) / 1e6 for rank in (8, 16)]
    assert megabytes == pytest.approx([14.1, 19.7], abs=0.05)
    assert 1e6 * megabytes[0] + HEADER < LIMIT < 1e6 * megabytes[1]


@pytest.mark.parametrize(
    ("size", "rows", "expected"), [("Z-Image", (7680, 3840), 16.2), ("Lumina2", (3072, 768), 11.3)]
)
def test_values_fit_as_well_at_half_the_rank(
    size: str, rows: tuple[int, int], expected: float, pinned_host: bool
) -> None:
    """Values only, 3840 rows of 11520 and 768 of 3840, at rank 8."""
    base, shapes, encoder = counted(size, pinned_host)
    names = chosen_names(shapes, base.trainable["values_too"], None)
    slices = base.slices("values_too", shapes, names)
    assert set(slices.values()) == {(0, *rows)} and len(names) == 2 * len(slices)
    numbers = encoder + low_rank_parameters([sliced(shapes[name], slices.get(name)) for name in names], 8)
    assert 2 * numbers / 1e6 == pytest.approx(expected, abs=0.05)
    assert 2 * numbers + HEADER < LIMIT

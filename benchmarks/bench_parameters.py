"""Parameters of each control, trained and in total, beside the paper's table 5: counted from shapes in seconds.

    python run.py bench parameters

ControlNeXt trains its encoder and a subset of the base's weights, which adds no parameters for the latter; a ControlNet
adds a copy of the base's encoder.
"""

from __future__ import annotations

import runpy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

if __package__ in (None, ""):
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "_alias.py"))

from comfyui_controlnext.benchmarks.host_start import begin  # noqa: E402
from comfyui_controlnext.benchmarks.real_size import make_stock, make_unet, make_xs  # noqa: E402
from comfyui_controlnext.benchmarks.recording import append_table  # noqa: E402
from comfyui_controlnext.controlnext_core.key_maps import unet_key_map  # noqa: E402
from comfyui_controlnext.controlnext_core.specs import SPECS, config_of  # noqa: E402
from comfyui_controlnext.controlnext_training.trainables import selected  # noqa: E402
from comfyui_controlnext.models.controlnext import ControlNeXt  # noqa: E402

HEAD = ("base", "control", "learnable, M", "of the paper", "total, M", "of the paper", "learnable of a ControlNet's")
PAPER = {"sd15": (361, 1220), "sdxl": (1251, 3818), "svd": (682, 2206)}
"""Learnable and total parameters of a ControlNet, in millions. Source: arXiv 2408.06070, table 5."""


@dataclass(frozen=True)
class ParameterRow:
    """Row of a ControlNeXt: base, row of SPECS, subset of the base that trains, and the paper's
    figures, in millions.
    """

    base: str
    variant: str
    trainable: str
    paper: tuple[int, int] | None = None
    """Parameters (learnable, total) in the paper, in millions."""


ROWS = (
    ParameterRow("sd15", "sd15_legacy", "to_out", (30, 865)),
    ParameterRow("sd15", "sd15", "to_out"),
    ParameterRow("sdxl", "sdxl_july", "attn2_to_out", (108, 2573)),
    ParameterRow("sdxl", "sdxl", "attn2_to_out"),
    ParameterRow("svd", "svd_v1", "to_out", (55, 1530)),
    ParameterRow("svd", "svd_v2", "all"),
)
"""Variants with the paper's figures, and those that the authors train and publish today."""
XS = {"sd15": ("sd15_53m",), "sdxl": ("sdxl_48m", "sdxl_20m"), "svd": ()}


def sizes_of(base: str) -> tuple[dict[str, int], dict[str, str]]:
    """Pair (number of values of each tensor of the base's UNet by host name, published name -> host name)."""
    model = make_unet(base, torch.float16, "meta").model
    sizes = {name: value.numel() for name, value in model.diffusion_model.state_dict().items()}
    return sizes, unet_key_map(model.model_config.unet_config)


def controlnext(row: ParameterRow, sizes: dict[str, int], key_map: dict[str, str]) -> tuple[int, int]:
    """Parameters (learnable, total) of a ControlNeXt."""
    encoder = ControlNeXt(config_of(SPECS[row.variant]), device="meta")
    own = numbers(encoder)
    subset = sum(sizes[name] for name in selected(key_map, row.trainable, ""))
    return own + subset, own + sum(sizes.values())


def stock(base: str) -> int:
    """Number of parameters of a stock ControlNet."""
    return numbers(make_stock(make_unet(base, torch.float16, "meta"), torch.float16, "meta").control_model)


def numbers(network: nn.Module) -> int:
    """Number of parameters, counted by name: networks of real size share one tensor among those of a shape."""
    return sum(value.numel() for value in network.state_dict().values())


def table(folder: Path) -> list[tuple[str, ...]]:
    """Rows of the table. folder: for the files through which controls are made."""
    rows: list[tuple[str, ...]] = []
    for base, (learnable_paper, total_paper) in PAPER.items():
        sizes, key_map = sizes_of(base)
        whole, image = sum(sizes.values()), base != "svd"
        copy = stock(base) if image else 0  # the host has no stock ControlNet for video
        copied = f"{copy / 1e6:.1f}" if image else "", f"{(copy + whole) / 1e6:.1f}" if image else ""
        rows.append((base, "ControlNet", copied[0], str(learnable_paper), copied[1], str(total_paper), ""))
        against = copy or learnable_paper * 1e6
        for row in (row for row in ROWS if row.base == base):
            learnable, total = controlnext(row, sizes, key_map)
            paper = tuple(map(str, row.paper)) if row.paper else ("", "")
            title = f"ControlNeXt {row.variant}, {row.trainable}"
            cells = (f"{learnable / 1e6:.1f}", paper[0], f"{total / 1e6:.1f}", paper[1])
            rows.append((base, title, *cells, f"{learnable / against:.1%}"))
        for release in XS[base]:
            own = numbers(make_xs(release, folder).get_models()[0].model)
            cells = (f"{own / 1e6:.1f}", "", f"{(own + whole) / 1e6:.1f}", "")
            rows.append((base, f"ControlNet-XS {release}", *cells, f"{own / against:.1%}"))
    return rows


def main() -> None:
    options = begin(__doc__ or "")
    rows = table(options.scratch)
    append_table("parameters", "Table 5", HEAD, rows, "counted, not timed", options.json, not options.quick)


if __name__ == "__main__":
    main()

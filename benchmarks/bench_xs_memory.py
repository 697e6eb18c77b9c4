"""Memory of a ControlNet-XS beside the base: per latent cell in a forward, per pixel for its hint.

    python benchmarks/bench_xs_memory.py

Counted as in bench_video_memory.py, on torch's `meta` device, for the released sizes. Scratch space of attention and
convolutions is not included. The constants of the formula are in controlnext_core/memory.py.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

if __package__ in (None, ""):
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "_alias.py"))

from comfyui_controlnext.benchmarks.bench_video_memory import DTYPES, Allocations  # noqa: E402
from comfyui_controlnext.benchmarks.recording import Report  # noqa: E402
from comfyui_controlnext.controlnext_core.checkpoint import Header  # noqa: E402
from comfyui_controlnext.controlnext_core.memory import xs_numbers_per_cell, xs_numbers_per_pixel  # noqa: E402
from comfyui_controlnext.controlnext_core.xs_detection import read_xs_file  # noqa: E402
from comfyui_controlnext.controlnext_core.xs_specs import NORM_RULES, XSShape, build_config, heads_of  # noqa: E402
from comfyui_controlnext.models.controlnet_xs import DOWN, ControlNetXS, Walk  # noqa: E402
from comfyui_controlnext.tools.tiny_models import RELEASED_XS, xs_shapes  # noqa: E402

TOKENS = 77
SIZES = ((512, 512), (1024, 1024))


class Fp32Norm(nn.GroupNorm):
    """Group norm in fp32, as the loader makes it for streams with few channels."""

    def forward(self, h: Tensor) -> Tensor:
        """Normalise h: (B, C, H, W) in fp32. Returns the same shape in h's dtype."""
        return super().forward(h.float()).to(h.dtype)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention that allocates only its result, as kernels do that need no table of all pairs."""
    return torch.empty_like(q)


def released_shape(name: str) -> XSShape:
    """Shape of a released size, as detected from its file."""
    return read_xs_file(Header(Path(name), xs_shapes(RELEASED_XS[name]), {})).shape


def network(shape: XSShape, dtype: torch.dtype, heads: tuple[int, ...] = (), device: str = "meta") -> ControlNetXS:
    """Control stream of a shape, with the loader's norms."""
    norm = Fp32Norm if shape.fp32_norms else nn.GroupNorm
    layers = SimpleNamespace(Conv2d=nn.Conv2d, Linear=nn.Linear, LayerNorm=nn.LayerNorm, GroupNorm=norm)
    config = build_config(shape, heads_of(shape, heads, "benchmark"), NORM_RULES["official"])
    net = ControlNetXS(config, dtype, device, layers, fused_attention).eval().requires_grad_(False)
    for module in net.modules():
        if isinstance(module, Fp32Norm):
            module.float()
    return net


def numbers_per_pixel(shape: XSShape, dtype: torch.dtype, height: int, width: int, rows: int = 1) -> float:
    """Peak number of values alive per hint pixel while hints are encoded."""
    net = network(shape, dtype)
    with torch.no_grad(), Allocations(net.parameters()) as allocations:
        hint = torch.zeros(rows, 3, height, width, dtype=dtype, device="meta")
        net.encode_hint(hint)
    return allocations.peak / (rows * height * width * dtype.itemsize)


def numbers_per_cell(
    shape: XSShape,
    dtype: torch.dtype,
    height: int,
    width: int,
    rows: int = 2,
    heads: tuple[int, ...] = (),
    device: str = "meta",
) -> float:
    """Peak number of values alive per latent cell and row in a forward, under a mask; the base's are not counted.

    height, width: of the picture in pixels.
    """
    net, cells = network(shape, dtype, heads, device), (height // 8, width // 8)

    def of_base(channels: int, size: tuple[int, int] = (1, 1)) -> Tensor:
        return torch.zeros(rows, channels, *size, dtype=dtype, device=device)

    sizes = [cells]
    for block in net.config.encoder[1:]:
        height, width = sizes[-1]
        sizes.append((-(-height // 2), -(-width // 2)) if block.kind == DOWN else (height, width))
    encoder = [of_base(block.base_ch, size) for block, size in zip(net.config.encoder, sizes, strict=True)]
    decoder = [of_base(channels, size) for channels, size in zip(net.config.decoder, reversed(sizes), strict=True)]
    x, hint, mask = of_base(4, cells), of_base(net.config.hint[-1], cells), of_base(1)
    emb, context = of_base(shape.time_dim).flatten(1), of_base(TOKENS, (shape.context_dim, 1))[..., 0]

    def add(correction: Tensor, h: Tensor) -> Tensor:
        delta = correction * 0.5
        delta = delta * mask
        return delta + h

    with torch.no_grad(), Allocations([*net.parameters(), *encoder, *decoder, x, hint, mask, emb, context]) as counted:
        walk = Walk(net, x, hint)
        for i, h in enumerate(encoder):
            correction = walk.encode(i, emb, context)
            if correction is not None:
                add(correction, h)
            del correction
            walk.take_base(i, h)
        add(walk.middle(emb, context), encoder[-1])
        for j, h in enumerate(decoder):
            add(walk.decode(j), h)
    return counted.peak / (rows * cells[0] * cells[1] * dtype.itemsize)


def main() -> None:
    report = Report("xs_memory")
    report.line("numbers of the compute dtype: per pixel of the hint, and per latent cell and row of the batch")
    heads = [f"{h}x{w} {str(dtype).removeprefix('torch.float')}" for h, w in SIZES for dtype in DTYPES]
    report.line(f"{'size':10}{'hint':>8}{'rule':>6}" + "".join(f"{head:>14}{'rule':>8}" for head in heads))
    for name in RELEASED_XS:
        shape = released_shape(name)
        config = network(shape, torch.float32).config
        row = f"{name:10}{numbers_per_pixel(shape, torch.float16, 512, 512):8.1f}{xs_numbers_per_pixel(config):6}"
        for size in SIZES:
            for dtype in DTYPES:
                rule = xs_numbers_per_cell(config, shape.fp32_norms and dtype != torch.float32)
                row += f"{numbers_per_cell(shape, dtype, *size):14.1f}{rule:8.1f}"
        report.line(row)
    report.save()


if __name__ == "__main__":
    main()

"""Loss curve as a figure of matplotlib, where that is installed; its global state is neither used nor changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

    from .plots import Line, Names, Point

DPI = 100
"""Pixels per inch: sizes of text are in points of 1/72 inch."""


def curve_figure(
    lines: Sequence[Line], ends: Point, size: tuple[int, int], thick: Sequence[str], dotted: Sequence[str], names: Names
) -> Any:
    """Draw a matplotlib Figure of size (width, height) in pixels. Raises ImportError where matplotlib is not installed.

    ends: lowest and highest value of the frame; thick, dotted: names of the lines to draw so.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(size[0] / DPI, size[1] / DPI), dpi=DPI, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    for name, points, color in lines:
        if points:
            axes.plot(
                *zip(*points, strict=True),
                label=f"{name} (last {points[-1][1]:.4g})",
                color=[part / 255 for part in color],
                linewidth=2.2 if name in thick else 1.2,
                marker="o" if name in dotted or len(points) == 1 else None,
                markersize=5,
            )
    axes.set_ylim(ends)
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    axes.ticklabel_format(axis="both", useOffset=False, style="plain" if ends[1] > 1e-3 else "sci")
    axes.set_title(names.title, fontsize=13, loc="left", fontweight="bold")
    axes.set_xlabel(names.x, fontsize=10)
    axes.set_ylabel(names.y, fontsize=10)
    axes.grid(axis="y", color="0.88", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=10)
    engine: Any = figure.get_layout_engine()
    engine.set(w_pad=0.12, h_pad=0.1)
    return figure


def as_picture(figure: Any) -> Image:
    """Convert a figure to an RGB picture of PIL."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())

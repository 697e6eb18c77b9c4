"""Loss curve as a figure of matplotlib: its lines, names and legend, and the fallback drawing."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
from comfyui_controlnext.controlnext_training import plots
from comfyui_controlnext.controlnext_training.figure import as_picture, curve_figure
from comfyui_controlnext.controlnext_training.plots import BARE, MEAN, RAW, SMOOTH, VALIDATION, WITH, loss_curve

pytest.importorskip("matplotlib", reason="a requirement of training")

STEPS, LOSSES = [10, 20, 30, 40], [0.5, 0.3, math.nan, 0.2]


def figure_of(monkeypatch: pytest.MonkeyPatch, **given: Any) -> Any:
    made: list[Any] = []

    def kept(*arguments: Any) -> Any:
        made.append(curve_figure(*arguments))
        return made[-1]

    monkeypatch.setattr(plots, "curve_figure", kept)
    loss_curve(STEPS, LOSSES, [(20, 0.25), (40, 0.15)], without=[(20, 0.35), (40, 0.4)], **given)
    (figure,) = made
    return figure


def test_the_figure_holds_every_line_with_its_points_and_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    axes = figure_of(monkeypatch).axes[0]
    found = {tuple(round(255 * part) for part in line.get_color()): line.get_xydata().tolist() for line in axes.lines}
    assert found[RAW] == [[10, 0.5], [20, 0.3], [40, 0.2]]
    assert found[VALIDATION] == [[20, 0.25], [40, 0.15]] and found[BARE] == [[20, 0.35], [40, 0.4]]
    assert [x for x, _ in found[SMOOTH]] == [10, 20, 40]
    low, high = axes.get_ylim()
    assert low < 0.15 and high > 0.5


def test_title_axes_units_and_legend_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = figure_of(monkeypatch)
    axes, (legend,) = figure.axes[0], figure.legends
    assert axes.get_title(loc="left") == "Training loss"
    assert axes.get_xlabel() == "step of the optimizer"
    assert axes.get_ylabel() == "weighted mean squared error (no unit)"
    assert [text.get_text() for text in legend.get_texts()] == [
        "mean of the steps since the last line (last 0.2)",
        "smoothed mean (last 0.2)",
        "validation with the control (last 0.15)",
        "validation without it (last 0.4)",
    ]
    box = legend.get_window_extent()
    assert box.y1 < axes.get_window_extent().y0 and box.x0 >= 0 and box.x1 <= figure.bbox.width, "it covers no line"


def nearest(image: Any, color: tuple[int, int, int]) -> int:
    """Smallest difference of a pixel from a colour, summed over the channels."""
    return int(np.abs(np.asarray(image).reshape(-1, 3).astype(int) - color).sum(axis=1).min())


def test_the_picture_has_the_size_and_the_colours() -> None:
    image = loss_curve(STEPS, LOSSES, [(20, 0.25)], (800, 450))
    assert image.size == (800, 450) and image.mode == "RGB"
    assert all(nearest(image, color) == 0 for color in (SMOOTH, VALIDATION))


def test_matplotlibs_global_state_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    loss_curve(STEPS, LOSSES)
    assert "matplotlib.pyplot" not in sys.modules and dict(matplotlib.rcParams) == before


def test_without_matplotlib_the_pack_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = loss_curve(STEPS, LOSSES)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    drawn = loss_curve(STEPS, LOSSES)
    assert drawn.size == figure.size and drawn.tobytes() != figure.tobytes()


@pytest.mark.parametrize("losses", [[1e-9, 3e-9], [1e12, 2e-9], [-3.0, -2.0], [0.0, 0.0]], ids=str)
def test_odd_losses_are_drawn(losses: list[float]) -> None:
    lines = ((MEAN, list(zip([1.0, 2.0], losses, strict=True)), RAW), (WITH, [], VALIDATION))
    ends = plots._range([], losses)
    picture = as_picture(curve_figure(lines, ends, (640, 400), (), (), plots.NAMES))
    assert nearest(picture, RAW) < 60, "a thin line is mixed with the white around it"

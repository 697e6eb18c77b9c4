"""ControlNet-XS on the host's own UNet, one forward at a time, against the plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.controlnext_core import checkpoint
from comfyui_controlnext.tests.xs_fixtures import SD_LIKE, SDXL_LIKE, Forward, hint_for, make_file, shape_of
from torch import Tensor

pytestmark = pytest.mark.comfy

PARITY = 1e-5
"""Largest difference to the plain loop, in fp32, of outputs with a standard deviation of about 1."""

WIDTHS = {"27 and 22 groups": (22, 24, 24), "28 and 24 groups": (24, 32, 32), "4 groups": (4, 8, 16)}


@pytest.fixture(autouse=True)
def inference() -> Any:
    with torch.inference_mode():
        yield


def load(path: Path, hint: Tensor, strength: float = 1.0, **options: Any) -> Any:
    from comfyui_controlnext.controlnext_core.comfy_adapter.xs_loading import load_controlnet_xs

    control = load_controlnet_xs(path).control
    return control.with_options(**options).set_cond_hint(hint, strength, (0.0, 1.0))


def worst(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("own_time", [False, True], ids=["base_time", "own_time"])
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS.keys())
@pytest.mark.parametrize(("config", "labels"), [(SD_LIKE, False), (SDXL_LIKE, True)], ids=["12_blocks", "9_blocks_y"])
def test_a_forward_equals_the_plain_loop(
    config: dict[str, Any], labels: bool, widths: tuple[int, ...], own_time: bool, scale: float, tmp_path: Path
) -> None:
    forward = Forward.make(config, labels=labels)
    levels = len(config["channel_mult"])
    path = make_file(tmp_path / "xs.safetensors", shape_of(config, (*widths, widths[-1])[:levels], own_time))
    hint = hint_for(forward.x)
    expected = forward.plain_loop(checkpoint.load(path), hint, scale=scale)
    assert worst(forward.run(load(path, hint, scale)), expected) < PARITY
    if scale:
        assert worst(expected, forward.plain_loop(None, hint)) > 0.1

"""Latents sampled tile by tile in another pack's wrapper: each tile gets its part of the hint, once.

The wrapper does what that of ComfyUI-TiledDiffusion does: for each batch of tiles it leaves the tiles of the hint in
the control's `cond_hint` and calls the control again, with the options of the whole forward.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from comfyui_controlnext.tests.fixtures.sampling_fixtures import (
    CELLS,
    REASSOCIATED,
    Studio,
    counted_calls,
    picture,
    relative,
)
from comfyui_controlnext.tools import tiny_models
from torch import Tensor

pytestmark = pytest.mark.comfy

SIDE = 2 * CELLS
Corner = tuple[int, int]
CORNERS: list[Corner] = [(top, left) for top in (0, CELLS) for left in (0, CELLS)]


def cut(whole: Tensor, corner: Corner, ratio: int = 1) -> Tensor:
    """Tile of a map (rows, C, ratio * SIDE, ratio * SIDE)."""
    top, left = (ratio * place for place in corner)
    return whole[..., top : top + ratio * CELLS, left : left + ratio * CELLS]


def chain(control: Any) -> list[Any]:
    """Control with those before it."""
    return [] if control is None else [control, *chain(control.previous_controlnet)]


@dataclass
class TileByTile:
    """Wrapper of the model's forward. reference: makes the control of one tile, with its part of the hint alone."""

    together: int
    reference: Callable[[Corner], Any] | None = None
    hints: dict[Any, Tensor] = field(default_factory=dict)
    differences: list[float] = field(default_factory=list)
    """Relative difference of each tile's output to that of the tile as a latent of its own."""

    def __call__(self, model_function: Any, given: dict[str, Any]) -> Tensor:
        x, t, c = given["input"], given["timestep"], given["c"]
        before, total = dict(c["transformer_options"]), torch.zeros_like(x)
        for start in range(0, len(CORNERS), self.together):
            corners = CORNERS[start : start + self.together]
            tiles, times = torch.cat([cut(x, corner) for corner in corners]), t.repeat(len(corners))
            changed = {key: value.repeat(len(corners), 1, 1) for key, value in c.items() if key == "c_crossattn"}
            if "control" in c:
                changed["control"] = self.controlled(c, tiles, times, corners)
            out = model_function(tiles, times, **{**c, **changed})
            for corner, part in zip(corners, out.chunk(len(corners)), strict=True):
                cut(total, corner).copy_(part)
                if self.reference is not None:
                    alone = self.alone(model_function, cut(x, corner), t, c, before, self.reference(corner))
                    self.differences.append(relative(part, alone))
        return total

    def controlled(self, c: dict[str, Any], tiles: Tensor, times: Tensor, corners: Sequence[Corner]) -> Any:
        """Result of the control for these tiles."""
        for control in chain(c["control"]):
            key = (id(control), tuple(corners), len(tiles))
            if key not in self.hints:
                rows = len(tiles) // len(corners)
                hint = control.preprocess_image(control.cond_hint_original)
                hint = hint.repeat(rows // len(hint), 1, 1, 1)
                self.hints[key] = torch.cat([cut(hint, corner, control.compression_ratio) for corner in corners])
            control.cond_hint = self.hints[key]
        options = c["transformer_options"]
        return c["control"].get_control_orig(tiles, times, c, len(options["cond_or_uncond"]), options)

    @staticmethod
    def alone(model_function: Any, x: Tensor, t: Tensor, c: dict[str, Any], options: Any, control: Any) -> Tensor:
        """Output of one tile as a latent of its own, with a control made for it."""
        options = dict(options)
        if control is not None:
            control.get_control(x.contiguous(), t, c, len(options["cond_or_uncond"]), options)
        return model_function(x.contiguous(), t, **{**c, "control": None, "transformer_options": options})


def on_call(model: Any, wrapper: Any) -> Any:
    """MODEL with this wrapper."""
    tiled = model.clone()
    tiled.set_model_unet_function_wrapper(wrapper)
    tiled.model_options["tiled_diffusion"] = True
    return tiled


def replaced(conds: Sequence[Any]) -> Sequence[Any]:
    """Conditionings whose controls answer the host with themselves and wait for the wrapper."""
    for control in {id(each[1]["control"]): each[1]["control"] for cond in conds for each in cond}.values():
        control.get_control_orig = control.get_control
        control.get_control = lambda *given, control=control, **others: control
    return conds


def load_xs(studio: Studio) -> Any:
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.xs_loading import load_controlnet_xs

    path = studio.files / "tiled xs.safetensors"
    return load_controlnet_xs(path if path.exists() else tiny_models.make_controlnet_xs(path, own_time=True)).control


def half_mask(count: int = 1) -> Tensor:
    """Mask with a slope across the whole picture."""
    slope = torch.linspace(0, 1, 8 * SIDE).repeat(8 * SIDE, 1)
    return torch.stack([slope, slope.T, slope.flip(1)][:count])


@pytest.mark.parametrize(
    ("kind", "apply_to", "masked", "batch", "together"),
    [
        ("gen2", "both", False, 1, 1),
        ("gen2", "positive", True, 2, 3),
        ("xs", "both", False, 1, 3),
        ("xs", "negative", True, 2, 1),
    ],
)
def test_each_tile_is_what_it_is_alone_with_its_part_of_hint_and_mask(
    studio: Studio, kind: str, apply_to: str, masked: bool, batch: int, together: int
) -> None:
    loaded = studio.load().control if kind == "gen2" else load_xs(studio)
    hint, mask = picture(count=batch, side=8 * SIDE), half_mask() if masked else None
    made: dict[Corner, Any] = {}

    def reference(corner: Corner) -> Any:
        if corner not in made:
            own = None if mask is None else cut(mask, corner, 8)
            control = studio.options(loaded, apply_to, own).copy()
            control.set_cond_hint(cut(hint.movedim(-1, 1), corner, 8).contiguous(), 0.8)
            control.pre_run(studio.model.model, studio.model.model.model_sampling.percent_to_sigma)
            made[corner] = control
        return made[corner]

    wrapper = TileByTile(together, reference)
    conds = replaced(studio.stock(studio.options(loaded, apply_to, mask), hint, 0.8))
    found = studio.sample(on_call(studio.model, wrapper), *conds, cells=SIDE, batch=batch)
    assert len(wrapper.differences) == 2 * len(CORNERS) and max(wrapper.differences) < REASSOCIATED, wrapper.differences
    without = studio.sample(on_call(studio.model, TileByTile(together)), cells=SIDE, batch=batch)
    assert relative(found, without) > 0.01


def test_controls_in_a_chain_are_each_added_once(studio: Studio) -> None:
    """One after the other and all at once: tiles of which each is added once are the same in any batch."""
    controls = (studio.load().control, load_xs(studio))
    results = []
    for together in (1, 4):
        conds = studio.stock(controls[0], picture(side=8 * SIDE))
        conds = replaced(studio.apply_to(*conds, controls[1], picture(1, side=8 * SIDE), 0.7, 0.0, 1.0))
        results.append(studio.sample(on_call(studio.model, TileByTile(together)), *conds, cells=SIDE))
    assert relative(results[0], results[1]) < REASSOCIATED
    alone = replaced(studio.stock(controls[0], picture(side=8 * SIDE)))
    assert relative(results[0], studio.sample(on_call(studio.model, TileByTile(4)), *alone, cells=SIDE)) > 0.01


def test_a_tile_is_encoded_once_for_both_halves_and_again_only_for_other_timesteps(studio: Studio) -> None:
    loaded = studio.load()
    conds = replaced(studio.stock(loaded.control, picture(side=8 * SIDE)))
    with counted_calls(loaded) as encoded:
        studio.sample(on_call(loaded.model, TileByTile(1)), *conds, cells=SIDE, steps=3)
    assert encoded == [1] * 3 * len(CORNERS)
    with counted_calls(loaded) as encoded:
        studio.sample(on_call(loaded.model, TileByTile(1)), *conds, cells=SIDE, steps=3, seed=2)
    assert encoded == []


def test_the_run_after_one_with_tiles_gets_the_whole_hint(studio: Studio) -> None:
    """Also after a run that was cut off, whose tiles the host leaves in place."""
    loaded, hint = studio.load(), picture(side=8 * CELLS)
    conds = replaced(studio.stock(loaded.control, hint))
    (control,) = {id(each[1]["control"]): each[1]["control"] for cond in conds for each in cond}.values()
    expected = studio.sample(loaded.model, *studio.stock(loaded.control, hint))
    control.cond_hint = torch.zeros(2, 3, 8 * CELLS, 8 * CELLS)
    control.get_control = control.get_control_orig
    assert torch.equal(studio.sample(loaded.model, *conds), expected)
    assert control.run is None


def test_what_was_known_of_tiles_goes_with_a_cancelled_run(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that stay in place, as in the pack's node, after Cancel in the second step; then a run with other steps."""
    loaded, steps = studio.load(), iter(range(99))
    wrapper, made = TileByTile(4), []
    parted, kind = type(loaded.control).of_tiles, type(loaded.control)

    def noted(control: Any, x: Tensor) -> Any:
        found = parted(control, x)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(kind, "of_tiles", noted)

    def until_cancel(model_function: Any, given: dict[str, Any]) -> Tensor:
        if next(steps) == 1:
            raise InterruptedError
        return wrapper(model_function, given)

    conds = replaced(studio.stock(loaded.control, picture(side=8 * SIDE), 1.0, 0.0, 0.6))
    with pytest.raises(InterruptedError):
        studio.sample(on_call(loaded.model, until_cancel), *conds, cells=SIDE, steps=2)
    gc.collect()  # the traceback held the forward
    assert made and not [reference for reference in made if reference() is not None]
    found = studio.sample(on_call(loaded.model, wrapper), *conds, cells=SIDE, steps=3)
    fresh = replaced(studio.stock(loaded.control, picture(side=8 * SIDE), 1.0, 0.0, 0.6))
    assert torch.equal(found, studio.sample(on_call(loaded.model, TileByTile(4)), *fresh, cells=SIDE, steps=3))


def test_a_control_that_nobody_holds_is_gone_at_once(studio: Studio) -> None:
    """No garbage collection is needed: its network and hint would take memory until then."""
    control = studio.options(studio.load().control)
    gone = weakref.ref(control)
    del control
    assert gone() is None


@pytest.mark.parametrize("kind", ["gen2", "xs"])
def test_tiles_of_a_control_on_the_model_are_warned_of_once(
    studio: Studio, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = studio.load().control if kind == "gen2" else load_xs(studio)
    model = studio.ours(studio.model, loaded, picture(side=8 * SIDE))
    studio.sample(model, cells=SIDE)
    assert "tiles" not in caplog.text
    studio.sample(on_call(model, TileByTile(2)), cells=SIDE)
    (line,) = [record.getMessage() for record in caplog.records if "tiles" in record.getMessage()]
    assert "every tile gets the whole hint" in line and loaded.name in line

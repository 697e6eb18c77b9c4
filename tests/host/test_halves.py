"""Halves of the guidance that get a control, under plain guidance and under guiders that number differently."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfyui_controlnext.tests.fixtures.sampling_fixtures import REASSOCIATED, Studio, picture, relative
from torch import Tensor

pytestmark = pytest.mark.comfy

POSITIVE, NEGATIVE = (True, False), (False, True)


def wired(studio: Studio, control: Any, halves: tuple[bool, bool]) -> tuple[Any, Any]:
    """Stock Apply node connected to these halves only: (positive, negative)."""
    controlled = studio.stock(control, picture())
    bare = studio.positive, studio.negative
    return tuple(c if wanted else b for c, b, wanted in zip(controlled, bare, halves, strict=True))


@pytest.mark.parametrize(("apply_to", "halves"), [("positive", POSITIVE), ("negative", NEGATIVE)])
def test_a_half_is_what_wiring_the_stock_node_to_that_half_gives(
    studio: Studio, plain: Tensor, apply_to: str, halves: tuple[bool, bool]
) -> None:
    loaded = studio.load()
    expected = studio.sample(loaded.model, *wired(studio, loaded.control, halves))
    control = studio.options(loaded.control, apply_to)
    through_stock, through_ours = studio.through_both(loaded, picture(), control)
    assert relative(through_stock, expected) < REASSOCIATED
    assert torch.equal(through_stock, through_ours)
    on_its_own_half = studio.sample(loaded.model, *wired(studio, control, halves))
    assert relative(on_its_own_half, expected) < REASSOCIATED
    both = studio.sample(studio.ours(loaded.model, loaded.control, picture()))
    for other in (plain, both):
        assert relative(expected, other) > 0.01


def test_auto_is_both_for_sd15(studio: Studio) -> None:
    loaded = studio.load()
    auto = studio.sample(studio.ours(loaded.model, loaded.control, picture()))
    both = studio.options(loaded.control, "both")
    assert torch.equal(studio.sample(studio.ours(loaded.model, both, picture())), auto)


@pytest.mark.parametrize(("apply_to", "halves"), [("positive", NEGATIVE), ("negative", POSITIVE)])
def test_nothing_in_common_with_the_wiring_warns_and_changes_nothing(
    studio: Studio, plain: Tensor, apply_to: str, halves: tuple[bool, bool], caplog: pytest.LogCaptureFixture
) -> None:
    loaded = studio.load()
    conds = wired(studio, studio.options(loaded.control, apply_to), halves)
    assert relative(studio.sample(loaded.model, *conds), plain) < REASSOCIATED
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "gen2.safetensors" in warning.getMessage() and f"apply_to={apply_to}" in warning.getMessage()


def test_a_control_with_an_effect_does_not_warn(studio: Studio, caplog: pytest.LogCaptureFixture) -> None:
    loaded = studio.load()
    for apply_to in ("auto", "positive", "negative"):
        control = studio.options(loaded.control, apply_to)
        studio.sample(studio.ours(loaded.model, control, picture(), 1.0, 0.0, 0.5))
    assert not [record for record in caplog.records if record.levelname != "DEBUG" and "controlnext" in record.name]


def test_without_guidance_the_positive_half_is_all_there_is(studio: Studio, caplog: pytest.LogCaptureFixture) -> None:
    """Negative conditionings are left out by the host at cfg 1."""
    loaded = studio.load()

    def at_cfg_one(apply_to: str) -> Tensor:
        control = studio.options(loaded.control, apply_to)
        conds = studio.stock(control, picture())
        through_stock = studio.sample(loaded.model, *conds, cfg=1.0)
        assert torch.equal(through_stock, studio.sample(studio.ours(loaded.model, control, picture()), cfg=1.0))
        return through_stock

    plain = studio.sample(cfg=1.0)
    both = at_cfg_one("both")
    assert relative(both, plain) > 0.01
    assert torch.equal(at_cfg_one("positive"), both)
    assert not caplog.records
    assert torch.equal(at_cfg_one("negative"), plain)
    assert len(caplog.records) == 2 and "had no effect" in caplog.text


def other_guidance(studio: Studio, name: str, model: Any, positive: Any, negative: Any) -> Tensor:
    """Sample two steps under a guider or a guidance node of the host."""
    from comfy_extras import nodes_custom_sampler, nodes_pag, nodes_perpneg, nodes_sag

    if name == "DualCFG":
        guider = nodes_custom_sampler.DualCFGGuider.execute(model, positive, positive, negative, 4.0, 3.0, "regular")
        return studio.guide(guider[0])
    if name == "PerpNeg":
        guider = nodes_perpneg.PerpNegGuider.execute(model, positive, negative, negative, 4.0, 1.0)
        return studio.guide(guider[0])
    node = {"SAG": nodes_sag.SelfAttentionGuidance, "PAG": nodes_pag.PerturbedAttentionGuidance}[name]
    settings = {"SAG": (0.5, 2.0), "PAG": (3.0,)}[name]
    return studio.sample(node.execute(model, *settings)[0], positive, negative)


@pytest.mark.parametrize("guidance", ["DualCFG", "PerpNeg", "SAG", "PAG"])
@pytest.mark.parametrize("door", ["stock", "ours"])
def test_guiders_that_number_halves_otherwise_give_both_and_one_log_line(
    studio: Studio, guidance: str, door: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    loaded = studio.load()

    def run(control: Any) -> Tensor:
        if door == "stock":
            return other_guidance(studio, guidance, loaded.model, *studio.stock(control, picture()))
        model = studio.ours(loaded.model, control, picture())
        return other_guidance(studio, guidance, model, studio.positive, studio.negative)

    both = run(loaded.control)
    caplog.clear()
    found = run(studio.options(loaded.control, "positive"))
    lines = [record.getMessage() for record in caplog.records if "controlnext" in record.name]
    assert len(lines) == 1 and "apply_to=positive cannot be followed" in lines[0], lines
    plain = other_guidance(studio, guidance, studio.model, studio.positive, studio.negative)
    assert found.isfinite().all() and relative(both, plain) > 0.01
    if guidance in ("DualCFG", "PerpNeg"):
        assert torch.equal(found, both)
    else:  # these guide plainly first, where the halves are known, and add a pass of their own
        assert relative(found, both) > 0.001 and relative(found, plain) > 0.001


def test_a_third_number_is_no_half_even_where_nobody_has_counted_the_places() -> None:
    """A sampler that calls the model past the host's batching leaves no count of conditionings."""
    from comfyui_controlnext.controlnext_core.comfy_adapter.sampling.halves import CONDS_KEY, is_plain

    assert is_plain({"cond_or_uncond": [1, 0]}) and is_plain({})
    assert not is_plain({"cond_or_uncond": [0, 1, 2]})
    assert not is_plain({"cond_or_uncond": [0], CONDS_KEY: 1})

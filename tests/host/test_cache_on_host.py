"""Feature cache with the real samplers: runs of the encoder are counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfyui_controlnext.tests.fixtures.lazy_layers import EITHER_WAY
from comfyui_controlnext.tests.fixtures.sampling_fixtures import CELLS, Studio, counted_calls, picture
from torch import Tensor

pytestmark = pytest.mark.comfy

STEPS = 2


def through_stock(studio: Studio, loaded: Any, hint: Tensor, strength: float = 1.0, **settings: Any) -> Tensor:
    positive = settings.pop("positive", studio.positive)
    conds = studio.apply_to(positive, studio.negative, loaded.control, hint, strength, 0.0, 1.0)
    return studio.sample(loaded.model, *conds, **{"steps": STEPS, **settings})


def through_ours(studio: Studio, loaded: Any, hint: Tensor, strength: float = 1.0, **settings: Any) -> Tensor:
    model = studio.ours(loaded.model, loaded.control, hint, strength)
    return studio.sample(model, **{"steps": STEPS, **settings})


DOORS = pytest.mark.parametrize("door", [through_stock, through_ours])


@EITHER_WAY
@DOORS
def test_a_run_encodes_once_per_step_and_later_runs_with_the_same_hint_never(studio: Studio, door: Any) -> None:
    loaded = studio.load()
    with counted_calls(loaded) as calls:
        first = door(studio, loaded, picture())
        assert calls == [1] * STEPS  # one row for both halves
        door(studio, loaded, picture(), seed=99)
        door(studio, loaded, picture(), strength=0.4)
        door(studio, loaded, picture(), cfg=1.0)
        door(studio, loaded, picture(), positive=studio.encode("a dog"))
        assert calls == [1] * STEPS
        assert torch.equal(door(studio, loaded, picture()), first)
        assert calls == [1] * STEPS


@EITHER_WAY
def test_the_doors_share_what_is_kept(studio: Studio) -> None:
    loaded = studio.load()
    with counted_calls(loaded) as calls:
        through_stock(studio, loaded, picture())
        through_ours(studio, loaded, picture())
        assert calls == [1] * STEPS


@EITHER_WAY
def test_the_same_weights_under_another_name_are_the_same_encoder(studio: Studio) -> None:
    """Executing the loader again makes a new network; what the old one gave still holds."""
    import shutil

    loaded = studio.load()
    through_ours(studio, loaded, picture())
    shutil.copyfile(studio.files / "gen2.safetensors", studio.files / "copy.safetensors")
    again = studio.load("copy.safetensors")
    with counted_calls(again) as calls:
        through_ours(studio, again, picture())
        assert calls == []


@DOORS
@pytest.mark.parametrize("change", ["hint", "size", "steps", "encoder"])
def test_another_hint_size_schedule_or_encoder_is_encoded_anew(studio: Studio, door: Any, change: str) -> None:
    loaded = first = studio.load()
    door(studio, first, picture())
    settings: dict[str, Any] = {}
    hint = picture()
    if change == "hint":
        hint[0, 0, 0, 0] += 1 / 255
    elif change == "size":
        settings["cells"] = CELLS // 2
    elif change == "steps":
        settings["steps"] = STEPS + 1
    else:
        loaded = studio.load("other.safetensors")
    with counted_calls(loaded) as calls:
        found = door(studio, loaded, hint, **settings)
    assert len(calls) == (1 if change == "steps" else STEPS)  # first and last timestep of both schedules are the same
    studio.cache.clear()
    assert torch.equal(door(studio, loaded, hint, **settings), found)


def test_latents_that_share_a_size_at_the_site_do_not_share_features(studio: Studio) -> None:
    """9 and 10 cells are 5 at the site, but the hint is scaled to 72 and to 80 pixels."""
    loaded = studio.load()
    fresh = through_ours(studio, loaded, picture(), steps=1, cells=10)
    studio.cache.clear()
    through_ours(studio, loaded, picture(), steps=1, cells=9)
    assert torch.equal(through_ours(studio, loaded, picture(), steps=1, cells=10), fresh)


def test_another_compute_dtype_is_encoded_anew(studio: Studio) -> None:
    from comfy_extras.nodes_model_advanced import ModelComputeDtype

    loaded = studio.load()
    full = through_ours(studio, loaded, picture(), steps=1, cells=4)
    (brain,) = ModelComputeDtype().patch(loaded.model, "bf16")
    with counted_calls(loaded) as calls:
        found = studio.sample(studio.ours(brain, loaded.control, picture()), steps=1, cells=4)
        assert calls == [1]
    assert not torch.equal(found, full)


@EITHER_WAY
def test_a_changed_encoder_file_is_encoded_anew(studio: Studio, tmp_path: Any) -> None:
    from comfyui_controlnext.tools.tiny_models import make_controlnext

    path = make_controlnext(tmp_path / "control.safetensors", "gen2", seed=3)
    old = studio.load(path)  # held: what a network left goes when it goes
    before = through_ours(studio, old, picture())
    make_controlnext(path, "gen2", seed=4)
    new = studio.load(path)
    with counted_calls(new) as calls:
        after = through_ours(studio, new, picture())
        assert len(calls) == STEPS
    assert not torch.equal(before, after)


def test_a_hint_written_to_after_apply_does_not_reach_a_later_apply(studio: Studio) -> None:
    """Hints are known by their content, not by the object that holds them."""
    loaded = studio.load()
    hint = picture()
    through_stock(studio, loaded, hint)
    hint[:, : 4 * CELLS] = 0
    found = through_stock(studio, loaded, hint)
    assert torch.equal(found, through_ours(studio, loaded, hint.clone()))
    studio.cache.clear()
    assert torch.equal(found, through_ours(studio, loaded, hint))


@DOORS
def test_unloading_all_models_empties_what_is_kept(studio: Studio, door: Any) -> None:
    import comfy.model_management

    loaded = studio.load()
    door(studio, loaded, picture())
    assert len(studio.cache) == STEPS and sum(studio.cache.used.values()) > 0
    comfy.model_management.unload_all_models()
    assert len(studio.cache) == 0 and sum(studio.cache.used.values()) == 0
    with counted_calls(loaded) as calls:
        door(studio, loaded, picture())
        assert len(calls) == STEPS


def test_what_a_control_left_goes_with_the_control(studio: Studio) -> None:
    import gc

    import comfy.model_management

    loaded = studio.load()
    through_ours(studio, loaded, picture())
    assert len(studio.cache) == STEPS
    del loaded
    comfy.model_management.cleanup_models_gc()
    gc.collect()
    comfy.model_management.cleanup_models()
    assert len(studio.cache) == 0


@DOORS
def test_a_budget_that_is_too_small_keeps_the_earliest_steps_and_the_latents(studio: Studio, door: Any) -> None:
    loaded = studio.load()
    expected = door(studio, loaded, picture())
    entry = sum(studio.cache.used.values()) // STEPS
    studio.cache.clear()
    studio.cache.budgets = {"device": 0, "host": entry + entry // 2}
    with counted_calls(loaded) as calls:
        assert torch.equal(door(studio, loaded, picture()), expected)
        assert len(calls) == STEPS and len(studio.cache) == 1
        assert torch.equal(door(studio, loaded, picture()), expected)
        assert len(calls) == STEPS + 1  # the last step alone
        door(studio, loaded, picture(7))  # another hint takes the room of the older one
        assert len(calls) == 2 * STEPS + 1 and len(studio.cache) == 1
        assert torch.equal(door(studio, loaded, picture()), expected)
        assert len(calls) == 3 * STEPS + 1


@DOORS
def test_without_any_room_the_latents_are_the_same(studio: Studio, door: Any) -> None:
    loaded = studio.load()
    hints = picture(count=2)
    expected = door(studio, loaded, hints, batch=2)
    again = door(studio, loaded, hints, batch=2)
    studio.cache.clear()
    studio.cache.budgets = {"device": 0, "host": 0}
    with counted_calls(loaded) as calls:
        found = door(studio, loaded, hints, batch=2)
        assert calls == [2] * STEPS and len(studio.cache) == 0
    assert torch.equal(found, expected) and torch.equal(again, expected)


@DOORS
def test_what_no_timestep_changes_is_done_once_a_run(
    studio: Studio, door: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = studio.load()
    network = loaded.control.net.patcher.model
    begun: list[int] = []
    begin = network.begin
    monkeypatch.setattr(network, "begin", lambda hint: (begun.append(hint.shape[0]), begin(hint))[1])
    door(studio, loaded, picture(), steps=4)
    assert begun == [1]
    door(studio, loaded, picture(), steps=4, seed=3)
    assert begun == [1]


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_2m", "euler_ancestral"])
def test_every_sampler_gives_the_same_with_and_without_room(studio: Studio, sampler: str) -> None:
    """Some ask for noise levels between those of the schedule, which are encoded when they come."""
    loaded = studio.load()
    with counted_calls(loaded) as calls:
        kept = through_ours(studio, loaded, picture(), sampler=sampler, steps=3)
        passes = len(calls)
        again = through_ours(studio, loaded, picture(), sampler=sampler, steps=3)
        assert len(calls) == passes
    studio.cache.clear()
    studio.cache.budgets = {"device": 0, "host": 0}
    assert torch.equal(through_ours(studio, loaded, picture(), sampler=sampler, steps=3), kept)
    assert torch.equal(again, kept)


def test_timesteps_outside_the_range_are_not_encoded_ahead(studio: Studio) -> None:
    loaded = studio.load()
    for start, end, steps_inside in ((0.0, 0.5, 2), (0.5, 1.0, 2), (0.0, 1.0, 4)):
        studio.cache.clear()
        with counted_calls(loaded) as calls:
            conds = studio.stock(loaded.control, picture(), 1.0, start, end)
            studio.sample(loaded.model, *conds, steps=4)
            assert calls == [1] * steps_inside


def test_an_image_to_image_run_encodes_its_own_part_of_the_schedule(studio: Studio) -> None:
    import nodes as host_nodes

    loaded = studio.load()
    model = studio.ours(loaded.model, loaded.control, picture())
    latent = {"samples": torch.zeros(1, 4, CELLS, CELLS)}
    conds = (studio.positive, studio.negative)
    with counted_calls(loaded) as calls:
        host_nodes.KSampler().sample(model, 1, 3, 4.0, "euler", "normal", *conds, latent, denoise=0.5)
        assert calls == [1] * 3


@DOORS
def test_a_cancelled_run_encodes_no_further(studio: Studio, door: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.model_management as management

    loaded = studio.load()
    network = loaded.control.net.patcher.model
    finish, passes = network.finish, []

    def cancel(begun: Any, timestep: Tensor) -> Tensor:
        passes.append(timestep)
        management.interrupt_current_processing()
        return finish(begun, timestep)

    monkeypatch.setattr(network, "finish", cancel)
    with pytest.raises(management.InterruptProcessingException):
        door(studio, loaded, picture(), steps=4)
    assert len(passes) == 1
    management.interrupt_current_processing(False)


@pytest.mark.parametrize("controls", [1, 3])
def test_a_step_of_a_second_run_costs_three_launches_and_two_for_each_further_control(
    studio: Studio, controls: int
) -> None:
    """Counted as operations; and the host waits for the device once a forward, however many controls there are."""
    from comfyui_controlnext.benchmarks.counting import Operations

    conds = (studio.positive, studio.negative)
    loaded = [studio.load(name) for name in ("gen2.safetensors", "other.safetensors", "gen2.safetensors")[:controls]]
    for number, one in enumerate(loaded):
        conds = studio.apply_to(*conds, one.control, picture(number))

    def operations(steps: int, *given: Any) -> Any:
        studio.sample(studio.model, *given, steps=steps)
        with Operations() as found:
            studio.sample(studio.model, *given, steps=steps)
        return found.names

    def of_a_step(*given: Any) -> Any:
        long, short = operations(4, *given), operations(3, *given)
        long.subtract(short)
        return long

    bare, ours = of_a_step(), of_a_step(*conds)
    ours.subtract(bare)
    nothing = ("to", "flatten", "unflatten")  # of the same dtype and device, and views, in inference mode
    more = {name: number for name, number in ours.items() if number and name not in nothing}
    assert sum(more.pop(name, 0) for name in ("item", "_local_scalar_dense")) == 1, "the sigma, for all controls"
    assert more == {"std_mean": 1, "add": controls, "addcmul": controls}

"""Interruptions of sampling in a forward, in an encoder's pass or while features are cached: the state stays
consistent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.controlnext_core.feature_cache import FeatureCache
from comfyui_controlnext.tests.fixtures.sampling_fixtures import Studio, picture
from comfyui_controlnext.tools import tiny_models
from torch import Tensor

pytestmark = pytest.mark.comfy

CELLS, STEPS = 4, 2


class Cut(BaseException):
    """Interruption of later hosts, which is not an Exception."""


def cancel() -> BaseException:
    """Interruption of the host's layers; an Exception or a BaseException, depending on the host."""
    import comfy.model_management

    return comfy.model_management.InterruptProcessingException()


def out_of_memory() -> BaseException:
    """Error of a device without memory, in the host's form."""
    import comfy.model_management

    return comfy.model_management.OOM_EXCEPTION("memory ran out")


ERRORS: dict[str, Callable[[], BaseException]] = {
    "cancel": cancel,
    "out_of_memory": out_of_memory,
    "ctrl_c": KeyboardInterrupt,
    "exit": SystemExit,
    "other": Cut,
}


class Trap:
    """Trap that raises at the n-th call of the wrapped function."""

    def __init__(self, inner: Callable[..., Any], error: BaseException, at: int) -> None:
        self.inner, self.error, self.left = inner, error, at

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise self.error
        return self.inner(*args, **kwargs)


def lay(patch: pytest.MonkeyPatch, owner: Any, name: str, error: BaseException, at: int = 1) -> None:
    patch.setattr(owner, name, Trap(getattr(owner, name), error, at))


def in_a_forward(patch: pytest.MonkeyPatch, studio: Studio, control: Any, error: BaseException) -> None:
    """Interrupt the second step's forward, after the block at which a control acts."""
    lay(patch, studio.model.model.diffusion_model.output_blocks[-1][0], "forward", error, 2)


def in_the_encoder(patch: pytest.MonkeyPatch, studio: Studio, control: Any, error: BaseException) -> None:
    """Interrupt the encoder's second timestep; for ControlNet-XS its only pass."""
    net = control.get_models()[-1].model
    if hasattr(net, "finish"):
        lay(patch, net, "finish", error, 2)
    else:
        lay(patch, net, "encode_hint", error)


def in_the_cache(patch: pytest.MonkeyPatch, studio: Studio, control: Any, error: BaseException) -> None:
    """Interrupt while features are cached."""
    lay(patch, studio.cache, "_make_room", error)


PLACES = {"forward": in_a_forward, "encoder": in_the_encoder, "cache": in_the_cache}


@pytest.fixture(scope="module")
def xs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make_controlnet_xs(tmp_path_factory.mktemp("xs") / "xs.safetensors", own_time=True)


@pytest.fixture(params=["controlnext", "xs"])
def control(request: pytest.FixtureRequest, studio: Studio, xs_file: Path) -> Iterator[Any]:
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.xs_loading import load_controlnet_xs

    yield studio.load().control if request.param == "controlnext" else load_controlnet_xs(xs_file).control


def on_the_model(model: Any) -> dict[str, Any]:
    """Traces that a run could leave on a MODEL."""
    callbacks = {kind: {k: v for k, v in named.items() if v} for kind, named in model.callbacks.items()}
    return {
        "callbacks": {kind: named for kind, named in callbacks.items() if named},
        "wrappers": {kind: {k: len(v) for k, v in named.items()} for kind, named in model.wrappers.items()},
        "options": repr(model.model_options),
        "weights": {name: len(patches) for name, patches in model.patches.items()},
        "hooks": (model.hook_mode, len(model.hook_patches), len(model.injections)),
        "patcher": model.model.current_patcher,
    }


def entries(cache: FeatureCache) -> int:
    """Bytes of the cached entries, which must equal the cache's own count."""
    return sum(tensor.nbytes for group in cache._groups.values() for tensor in group.entries.values())


@pytest.mark.parametrize("door", ["stock", "ours"])
@pytest.mark.parametrize("place", list(PLACES))
def test_a_run_that_is_cut_off_leaves_nothing_and_the_next_is_the_same_in_every_bit(
    studio: Studio, control: Any, door: str, place: str
) -> None:
    hint = picture(side=8 * CELLS)
    if door == "stock":
        model, conds = studio.model, studio.stock(control, hint)
        used = [cond[0][1]["control"] for cond in conds]
    else:
        model, conds = studio.ours(studio.model, control, hint), ()
        used = [door.control for door in doors_of(model)]

    def sample() -> Tensor:
        return studio.sample(model, *conds, cells=CELLS, steps=STEPS)

    before = on_the_model(model)
    expected = sample()
    for make in ERRORS.values():
        error = make()
        studio.cache.clear()
        with pytest.MonkeyPatch.context() as patch:
            PLACES[place](patch, studio, control, error)
            with pytest.raises(type(error)):
                sample()
        assert all(one.run is None for one in used), "hints, masks and features of the run are let go"
        assert on_the_model(model) == before
        assert entries(studio.cache) == sum(studio.cache.used.values())
        assert torch.equal(sample(), expected)
        assert all(one.run is None for one in used) and on_the_model(model) == before


def doors_of(model: Any) -> list[Any]:
    """MODEL doors on a model."""
    from comfy.patcher_extension import WrappersMP

    found = [getattr(wrapper, "__self__", None) for wrapper in model.get_all_wrappers(WrappersMP.APPLY_MODEL)]
    return [door for door in found if hasattr(door, "control")]


def test_a_run_that_is_cut_off_says_nothing_of_controls_without_effect(
    studio: Studio, control: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The first forward ends before the control's place: that is no fault of the control."""
    hint = picture(side=8 * CELLS)
    model = studio.ours(studio.model, control, hint)
    with pytest.MonkeyPatch.context() as patch:
        lay(patch, studio.model.model.diffusion_model.time_embed, "forward", Cut())
        for given in ((model,), (studio.model, *studio.stock(control, hint))):
            with pytest.raises(Cut):
                studio.sample(*given, cells=CELLS, steps=STEPS)
            patch.undo()
            lay(patch, studio.model.model.diffusion_model.time_embed, "forward", Cut())
    assert "had no effect" not in caplog.text

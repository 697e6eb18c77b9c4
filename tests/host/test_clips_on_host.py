"""Controls of clips in the host's sampler: both doors, windows of latent frames, and no traces left."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comfyui_controlnext.controlnext_core.comfy_adapter.sampling.next_control import ControlNeXtControl
from comfyui_controlnext.tests.fixtures.sampling_fixtures import relative
from comfyui_controlnext.tests.fixtures.transformer_stage import CELLS, TransformerStage
from comfyui_controlnext.tests.references import reference_controlnext as released
from comfyui_controlnext.tests.references import reference_transformers as reference
from torch import Tensor

pytestmark = pytest.mark.comfy

LENGTH, FRAMES = 5, 17
"""Latent frames of a clip, and its frames."""
WINDOW, OVERLAP = 3, 1
"""Length and overlap of windows in latent frames."""
TOLERANCE = 1e-4  # fp32
both = pytest.mark.parametrize("model", ["wan", "wan_5b"])


def video(count: int = FRAMES, seed: int = 5) -> Tensor:
    """IMAGE (count, H, W, 3) of a clip's hint."""
    return torch.rand(count, 8 * CELLS, 8 * CELLS, 3, generator=torch.Generator().manual_seed(seed))


def sample(at: TransformerStage, model: Any = None, conds: Any = None, **settings: Any) -> Tensor:
    return at.sample(model, conds, length=LENGTH, **settings)


@both
@pytest.mark.parametrize("settings", [(1.0, 0.0, 1.0), (0.6, 0.0, 0.5)], ids=str)
def test_both_doors_give_equal_clips(model: str, settings: tuple[float, ...], stage: Any) -> None:
    at = stage(model)
    control = at.load().control
    through_stock = sample(at, conds=at.stock(control, video(), *settings))
    assert torch.equal(through_stock, sample(at, at.ours(control, video(), *settings)))
    assert relative(through_stock, sample(at)) > 0.01
    assert relative(through_stock, sample(at, at.ours(control, video().flip(0), *settings))) > 0.01


@both
def test_no_control_is_the_plain_clip_bit_for_bit(model: str, stage: Any) -> None:
    at = stage(model)
    control, plain = at.load().control, sample(at)
    for settings in ((0.0, 0.0, 1.0), (1.0, 1.0, 1.0)):  # no strength; no step lies so late
        assert torch.equal(sample(at, conds=at.stock(control, video(), *settings)), plain)
        assert torch.equal(sample(at, at.ours(control, video(), *settings)), plain)
    assert torch.equal(sample(at, at.ours(control, video(), mask=torch.zeros(FRAMES, 16, 16))), plain)
    whole = sample(at, at.ours(control, video()))
    assert torch.equal(sample(at, at.ours(control, video(), mask=torch.ones(FRAMES, 16, 16))), whole)
    assert torch.equal(sample(at), plain)


def test_options_of_a_clip_are_the_same_through_both_doors(stage: Any) -> None:
    """A mask that leaves out the last latent frame, one half of the guidance, a schedule; two controls in any order."""
    at = stage("wan")
    mask = torch.ones(FRAMES, 16, 16)
    mask[-4:] = 0
    one = at.options(at.load().control, apply_to="positive", mask=mask, schedule="0:1, 0.6:0.5, 1:0")
    other = at.load(seed=12).control
    through_stock = sample(at, conds=at.stock(one, video()))
    assert torch.equal(through_stock, sample(at, at.ours(one, video())))
    assert relative(through_stock, sample(at, at.ours(at.load().control, video()))) > 0.003
    forth, back = (
        sample(at, at.ours(last, video(), model=at.ours(first, video())))
        for first, last in ((one, other), (other, one))
    )
    assert torch.equal(forth, back) and relative(forth, through_stock) > 0.003


def test_every_clip_of_a_batch_gets_the_hint(stage: Any) -> None:
    at = stage("wan")
    control = at.load().control
    together = sample(at, at.ours(control, video()), batch=2)
    for i in range(2):
        assert relative(together[i : i + 1], sample(at, at.ours(control, video()), first=i)) < 1e-4


def test_the_encoder_sees_each_frame_once_a_step_and_never_in_a_second_run(stage: Any) -> None:
    at = stage("wan")
    loaded = at.load()
    net, seen = loaded.control.net.patcher.model, []
    narrow = net.narrow
    net.narrow = lambda begun, time: (seen.append((float(time), len(begun.shortcut))), narrow(begun, time))[1]
    try:
        first = sample(at, at.ours(loaded.control, video()))
        once = list(seen)
        second = sample(at, at.ours(loaded.control, video()))
    finally:
        del net.narrow
    times = dict.fromkeys(time for time, _ in once)
    assert len(times) == 2 and all(sum(n for t, n in once if t == time) == FRAMES for time in times)
    assert seen == once and torch.equal(first, second)


def windowed(at: TransformerStage, schedule: str, model: Any = None, **more: Any) -> Any:
    """MODEL with the host's windows along latent frames."""
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    inputs = {
        "model": model or at.model,
        "context_length": WINDOW,
        "context_overlap": OVERLAP,
        "context_schedule": schedule,
        "context_stride": 1,
        "closed_loop": schedule == "looped_uniform",
        "fuse_method": "pyramid",
        "dim": 2,
    }
    later = {"freenoise": False} if "freenoise" in _inputs_of(ContextWindowsManualNode) else {}
    return ContextWindowsManualNode.execute(**inputs, **later, **more)[0]


def _inputs_of(node: Any) -> set[str]:
    return {item.id for item in node.define_schema().inputs}


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int] | None, int, float, Tensor]]:
    """Record of each call of a control: the window, the latent frames, sigma, and its addition."""
    seen: list[tuple[list[int] | None, int, float, Tensor]] = []
    term: Callable[..., Any] = ControlNeXtControl.term

    def spy(self: Any, h: Tensor, options: Any, *, x: Tensor, sigma: float, strength: float) -> Any:
        found = term(self, h, options, x=x, sigma=sigma, strength=strength)
        window = options.get("context_window")
        frames = None
        if window is not None:
            anchor = getattr(window, "causal_anchor_index", None)
            frames = [*([] if anchor is None else [anchor]), *window.index_list]
        seen.append((frames, x.shape[2], sigma, found.control))
        return found

    monkeypatch.setattr(ControlNeXtControl, "term", spy)
    return seen


@pytest.mark.parametrize("schedule", ["standard_static", "standard_uniform", "looped_uniform", "batched"])
def test_every_window_of_the_host_sees_the_hints_of_its_own_frames(
    schedule: str, stage: Any, spied: list[Any], pinned_host: bool
) -> None:
    at = stage("wan")
    control = at.load().control
    through_ours = sample(at, at.ours(control, video(), model=windowed(at, schedule)))
    asked = list(spied)
    assert torch.equal(through_ours, sample(at, windowed(at, schedule), at.stock(control, video())))
    assert relative(through_ours, sample(at, windowed(at, schedule))) > 0.01
    windows = {tuple(frames) for frames, *_ in asked}
    assert len(windows) > 1 and {frame for window in windows for frame in window} == set(range(LENGTH))
    with_anchor = any(len(window) == WINDOW + 1 for window in windows)
    assert with_anchor is (not pinned_host and schedule != "batched"), "0.33 puts an anchor before overlapping windows"
    weights = released.random_weights(reference.BUILD, seed=11, out=at.row.width)
    hint, grid = video().movedim(-1, 1), reference.grid_of((CELLS, CELLS))
    for frames, length, sigma, found in asked:
        assert len(frames) == length
        c = reference.encode_clip("wan", weights, hint, sigma, grid, frames)
        wanted = (c - c.mean()) / c.std()
        assert relative(found.flatten(2).transpose(1, 2), wanted) < TOLERANCE, frames


def test_every_window_of_the_host_has_the_masks_of_its_own_frames(stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[tuple[int, ...], Tensor] = {}
    term: Callable[..., Any] = ControlNeXtControl.term

    def spy(self: Any, h: Tensor, options: Any, **given: Any) -> Any:
        found, window = term(self, h, options, **given), options["context_window"]
        anchor = getattr(window, "causal_anchor_index", None)
        seen[(*([] if anchor is None else [anchor]), *window.index_list)] = found.mask
        return found

    monkeypatch.setattr(ControlNeXtControl, "term", spy)
    at, side = stage("wan"), CELLS // 2
    mask = torch.rand(FRAMES, 16, 16, generator=torch.Generator().manual_seed(4))
    sample(at, at.ours(at.load().control, video(), mask=mask, model=windowed(at, "standard_static")))
    assert len(seen) > 1
    sized = torch.nn.functional.avg_pool2d(mask[:, None], 16 // side)
    for frames, found in seen.items():
        parts = [sized[:1] if k == 0 else sized[4 * k - 3 : 4 * k + 1].mean(0, keepdim=True) for k in frames]
        torch.testing.assert_close(found, torch.cat(parts, dim=-2), rtol=1e-6, atol=1e-6)


def test_a_short_hint_is_held_inside_windows_and_the_log_says_so(
    stage: Any, spied: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    at = stage("wan")
    with caplog.at_level(logging.WARNING):
        sample(at, at.ours(at.load().control, video(6), model=windowed(at, "standard_static")))
    said = [record.getMessage() for record in caplog.records if "frames" in record.getMessage()]
    assert len(said) == 1 and "the hint has 6 frames, the clip at least" in said[0]
    last = next(found for frames, *_, found in spied if frames[-1] == LENGTH - 1)
    per_frame = last.unflatten(2, (-1, CELLS // 2))[0]
    assert torch.equal(per_frame[:, -1], per_frame[:, -2])


def test_the_packs_own_windows_refuse_clips_in_one_latent(stage: Any) -> None:
    from comfyui_controlnext.nodes.video import ControlNeXtVideoWindows

    with pytest.raises(ValueError, match="Wan, whose frames are inside one latent.* WAN Context Windows"):
        ControlNeXtVideoWindows.execute(stage("wan").model, 14, 4, "standard_static", "pyramid")


def test_kinds_of_wan_with_other_frames_in_front_are_of_no_family() -> None:
    from types import SimpleNamespace

    from comfyui_controlnext.controlnext_core.comfy_adapter.bases.table import loaded_base

    def family(**config: Any) -> str:
        config = {"image_model": "wan2.1", "model_type": "t2v", "out_dim": 16} | config
        network = SimpleNamespace(dim=128)
        facts = SimpleNamespace(unet_config=config)
        return loaded_base(SimpleNamespace(diffusion_model=network, model_config=facts)).family.name

    assert [family(), family(out_dim=48), family(model_type="vace")] == ["WAN", "WAN_5B", "WAN"]
    assert [family(model_type=kind) for kind in ("scail", "wandancer", "animate2")] == ["OTHER"] * 3


@pytest.mark.parametrize("name", ["Wan 2.1 1.3B", "Wan 2.1 14B", "Wan 2.2 5B"])
def test_the_memory_formula_of_clips_is_what_is_counted(name: str) -> None:
    """Formula against shapes; the map before projection has 256 channels, and 81 frames of 480p for 30 steps fit the
    cache's budgets.
    """
    from comfyui_controlnext.benchmarks.bench_clip_memory import CLIP, memory_of
    from comfyui_controlnext.controlnext_core.feature_cache import DEVICE_BUDGET, HOST_BUDGET, pinned_bytes

    memory = memory_of(name)
    assert memory.wide == pytest.approx(memory.wide_formula, rel=1e-6)  # and a few numbers for moments
    frames, height, width = CLIP
    cell = 32 if name.endswith("5B") else 16
    length = 1 + (frames - 1) // 4
    assert memory.kept == 2 * 256 * length * (height // cell) * (width // cell)
    per_map = memory.kept // length
    assert DEVICE_BUDGET // per_map + HOST_BUDGET // pinned_bytes(per_map) >= 30 * length


def test_the_host_is_asked_for_the_frames_of_a_latent_frame_together(stage: Any) -> None:
    from comfyui_controlnext.controlnext_core.memory import NUMBERS_PER_PIXEL, wide_bytes
    from comfyui_controlnext.controlnext_core.specs import SPECS

    control = stage("wan").load().control
    side = 720
    frame = NUMBERS_PER_PIXEL["gen2"] * side * side * 2
    for frames, in_a_pass in ((1, 1), (5, 4), (81, 4)):
        asked = control.copy().set_cond_hint(torch.zeros(1, 1, 1, 1).expand(frames, 3, side, side))
        wide = wide_bytes(SPECS["wan"], 128, side, side, 2) * (1 + -(-(frames - 1) // 4))
        assert asked.inference_memory_requirements(torch.float16) == max(in_a_pass * frame, wide), frames

"""Training on clips that are one latent: samples, the control's hints, and a run whose loss falls."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.tests.fixtures.narrow_training import (
    CLIP_FRAMES,
    CLIPS,
    MovingScenes,
    config_for,
    drawn_batch,
    narrow_base,
    scenes,
    train_narrow,
)
from comfyui_controlnext.tests.fixtures.narrow_umt5 import make_umt5
from comfyui_controlnext.tests.fixtures.training_fixtures import SIDE, Watcher, loop_on, shaken
from comfyui_controlnext.tests.fixtures.transformer_files import make_small, make_vae
from comfyui_controlnext.tests.fixtures.transformer_fixtures import NARROW
from comfyui_controlnext.tests.references import reference_transformers as reference

pytestmark = pytest.mark.comfy

REASSOCIATED = 1e-5
"""Relative difference of results from other batches."""


def loop_of(family: str, **settings: Any) -> Any:
    return loop_on(narrow_base(family), config_for(family, **settings), scenes(4, family))


@pytest.mark.parametrize("family", CLIPS)
def test_a_clip_is_one_row_with_a_hint_for_each_frame(family: str) -> None:
    row, batch = NARROW[family], drawn_batch(loop_of(family), 2)
    side = SIDE // row.pixels
    assert batch.latent.shape == batch.noise.shape == (2, row.channels, 2, side, side)
    assert batch.hint.shape == (2 * CLIP_FRAMES, 3, SIDE, SIDE) and batch.sigma.shape == (2,)


def test_a_clip_is_encoded_whole_and_once() -> None:
    """A causal autoencoder sees earlier frames: the latent of a frame depends on its place in the clip."""
    base, seen = narrow_base("wan"), []
    store = loop_of("wan").samples.store
    from comfyui_controlnext.controlnext_training.encoded import MemoryCache, Store

    encode = base.vae.encode
    base.vae.encode = lambda frames: (seen.append(len(frames)), encode(frames))[1]
    try:
        fresh = Store(base, store.data, store.config, MemoryCache())
        first, again = (fresh.sample(0, position).latent for position in (0, 7))
    finally:
        del base.vae.encode
    assert seen == [CLIP_FRAMES] and torch.equal(first, again)


def test_a_frame_of_the_hint_is_heard_in_its_own_latent_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps before the statistics change only in the group of the changed frame."""
    controlled = (loop := loop_of("wan")).controlled
    batch, seen = drawn_batch(loop, 1), []
    project = controlled.net.project
    monkeypatch.setattr(controlled.net, "project", lambda narrow: (seen.append(narrow.detach()), project(narrow))[1])
    for changed in (None, 0, 3):
        hint = batch.hint.clone()
        if changed is not None:
            hint[changed] = 1 - hint[changed]
        with torch.no_grad():
            controlled(batch.noise, batch.sigma, batch.conditions, hint)
    plain, first, later = (maps[0].unflatten(1, (2, -1)) for maps in seen)  # (C, T, h, w)
    for found, place in ((first, 0), (later, 1)):
        assert not torch.equal(found[:, place], plain[:, place])
        assert torch.equal(found[:, 1 - place], plain[:, 1 - place])


def test_passes_of_the_encoder_do_not_change_the_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    from comfyui_controlnext.controlnext_training.base_model import clip_encoding

    controlled = (loop := loop_of("wan")).controlled
    shaken(loop.parameters, 0.01)
    batch, found = drawn_batch(loop, 1), []
    for at_once in (8, 1):
        monkeypatch.setattr(clip_encoding, "rows_at_once", lambda row_bytes, at_once=at_once: at_once)
        with torch.no_grad():
            found.append(controlled(batch.noise, batch.sigma, batch.conditions, batch.hint))
    torch.testing.assert_close(*found, rtol=REASSOCIATED, atol=REASSOCIATED)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_clip_is_given_the_rule_over_all_its_own_frames(checkpointing: bool) -> None:
    """Two clips at levels of their own, against the statement in references: one mean and deviation a clip."""
    from comfyui_controlnext.controlnext_core.latent_clips import Clip
    from comfyui_controlnext.controlnext_core.specs import SPECS
    from comfyui_controlnext.controlnext_training.base_model.clip_encoding import ClipEncoding

    net, batch = (loop := loop_of("wan")).controlled.net, drawn_batch(loop, 2)
    weights = {name: tensor.detach() for name, tensor in net.state_dict().items()}
    sigmas, side = (0.3, 0.8), SIDE // 16
    times = 1000 * torch.tensor(sigmas)
    encoding = ClipEncoding(net, SPECS["wan"], checkpointing)
    found = encoding.encode(batch.hint, times, (2 * side, side), Clip(2, 4), 2)
    for row, sigma in enumerate(sigmas):
        own = batch.hint[row * CLIP_FRAMES : (row + 1) * CLIP_FRAMES]
        raw = reference.encode_clip("wan", weights, own, sigma, (side, side), [0, 1])
        wanted = ((raw - raw.mean()) / raw.std())[0]
        torch.testing.assert_close(found[row].flatten(1).T, wanted, rtol=1e-4, atol=1e-4)
    found.square().mean().backward()
    assert all(p.grad is not None for name, p in net.named_parameters() if name.startswith("embedding"))


def test_a_region_of_the_loss_is_averaged_over_the_frames_of_a_latent_frame() -> None:
    from comfyui_controlnext.controlnext_training.objective import OBJECTIVES, loss
    from comfyui_controlnext.controlnext_training.step import _region

    sample = loop_of("wan").samples.store.sample(0, 0)
    mask = torch.zeros(CLIP_FRAMES, SIDE, SIDE)
    mask[0, :8, :8], mask[1, :8, 8:16], mask[4, :4, 8:16] = 1, 1, 1
    region = _region([replace(sample, mask=mask)], config_for("wan", mask_weight=2.0), sample.latent)
    assert region is not None and region.shape == (1, 1, 2, SIDE // 8, SIDE // 8)
    expected = torch.ones(2, SIDE // 8, SIDE // 8)
    expected[0, 0, 0] += 2
    expected[1, 0, 1] += 2 * (1 + 0.5) / 4
    torch.testing.assert_close(region[0, 0], expected)
    z, n = torch.zeros_like(sample.latent), torch.ones_like(sample.latent)
    weighed = loss(torch.zeros_like(z), z, n, torch.tensor([0.5]), OBJECTIVES["flow"], region=region)
    assert float(weighed) == pytest.approx(float(expected.mean()))


def test_a_picture_trains_as_a_clip_of_one_frame() -> None:
    from comfyui_controlnext.tests.fixtures.training_fixtures import drawn, gradients_of

    loop = loop_on(narrow_base("wan"), config_for("wan", clip_frames=1), drawn())
    assert drawn_batch(loop, 1).latent.shape == (1, 16, 1, SIDE // 8, SIDE // 8)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients_of(loop).values())


def test_a_validation_shows_the_middle_frame_and_measures_the_clip(tmp_path: Path) -> None:
    from comfyui_controlnext.controlnext_training import journal
    from comfyui_controlnext.tests.fixtures.training_fixtures import run_in

    watch = Watcher()
    train_narrow(tmp_path, "wan", watch, steps=1, validate_every=1, validation_samples=1, validation_cfg=1.0)
    (grid,) = watch.pictures
    assert grid.width > 4 * SIDE - 1
    found = journal.read(run_in(tmp_path, narrow_base("wan")).folder, "validation", "distance")
    assert len(found) == 1 and 0 < next(iter(found.values())) < 10


def test_a_base_from_files_has_the_encoders_of_wan(
    tmp_path: Path, pinned_host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host's own autoencoder and its own umt5, both narrow, from their files."""
    from comfy.text_encoders.wan import UMT5XXlModel
    from comfyui_controlnext.controlnext_training.base_model.base_files import load_base
    from comfyui_controlnext.tests.fixtures.training_fixtures import take_steps

    data = scenes(4, "wan")
    make_small(tmp_path / "wan.pt", "wan", pinned_host)
    make_vae(tmp_path / "vae.safetensors", "wan")
    make_umt5(tmp_path / "umt5.safetensors", list(data.captions), monkeypatch)
    config = config_for("wan", base="wan.pt", vae="vae.safetensors", clip=("umt5.safetensors",))
    base = load_base(config, tmp_path)
    base.check()
    assert isinstance(base.clip.cond_stage_model.umt5xxl, UMT5XXlModel)
    clip = torch.rand(CLIP_FRAMES, SIDE, SIDE, 3, generator=torch.Generator().manual_seed(0))
    latent = base.latent(clip)
    assert latent.shape == (1, 16, 2, SIDE // 8, SIDE // 8) and base.picture(latent).shape == clip.shape
    assert base.latent(clip[:1]).shape == (1, 16, 1, SIDE // 8, SIDE // 8)
    first = base.latent(clip.roll(1, 0))[:, :, 1], latent[:, :, 1]
    assert not torch.equal(*first), "a latent frame is of its own frames"
    loop = loop_on(base, config, data)
    texts = [loop.samples.store.sample(index, index).given["context"] for index in range(2)]
    assert all(text.shape == (1, 512, 4096) and bool(text.isfinite().all()) for text in texts)
    used = [int(text.any(-1).sum()) for text in texts]
    assert 3 < min(used) < 100 and not torch.equal(*texts), "the host puts zeros behind a caption"
    (loss,) = take_steps(loop, 1)
    assert 0 < loss < 100


class LitScenes(MovingScenes):
    """Clips that are black or white in each half of each latent frame; the hint is the clip, and says where.

    Noise hides it: of the highest levels alone the hint tells which clip it is.
    """

    LIT = (((1, 0), (0, 1)), ((0, 1), (1, 0)), ((1, 1), (0, 0)), ((0, 0), (1, 1)))
    """Clip -> latent frame -> half, left and right."""

    def frame_keys(self, index: int, seed: int = 0, position: int = 0, variant: int = 0) -> tuple[str, ...]:
        return tuple(f"lit {key}" for key in super().frame_keys(index))

    def load(self, index: int, seed: int = 0, position: int = 0) -> Any:
        first, second = torch.tensor(self.LIT[index], dtype=torch.float32)
        halves = torch.stack([first, *[second] * (self.frames - 1)]).repeat_interleave(SIDE // 2, 1)
        lit = halves[:, None, :, None].expand(-1, SIDE, -1, 3).contiguous()
        return replace(super().load(index), frames=lit, hints=lit, mask=None, frame_keys=self.frame_keys(index))


FALLEN = 0.7
"""Largest ratio of the loss after training to the loss before it, with the clip's own hint. The ratio stays above this
with another clip's hint, without the control, and after runs that see no hint or a wrong one."""
STEPS = {"wan": 10, "wan_5b": 20}
"""Steps of such a run, of one clip each; 5B has an encoder of one stage more."""


class LitRun:
    """A run on such clips, and its loss at fixed noise and levels."""

    def __init__(self, family: str, **settings: Any) -> None:
        rates: dict[str, Any] = {"learning_rate": 5e-3, "control_learning_rate": 2e-3}
        self.steps = STEPS[family]
        config = config_for(family, **{"steps": self.steps, "sigma_min": 0.9} | rates | settings)
        self.loop = loop_on(narrow_base(family), config, LitScenes(4, CLIP_FRAMES))
        self.batch = drawn_batch(self.loop, 4)
        self.before = self.loss()

    def loss(self, others: bool = False, strength: float = 1.0) -> float:
        """others: each clip is given the hint of another one."""
        from comfyui_controlnext.controlnext_training.step import losses

        hint = self.batch.hint.roll(CLIP_FRAMES, 0) if others else self.batch.hint
        batch = replace(self.batch, hint=hint)
        with torch.no_grad():
            return float(losses(self.loop.controlled, batch, self.loop.objective, self.loop.config, strength).mean())

    def train(self) -> None:
        from comfyui_controlnext.tests.fixtures.training_fixtures import take_steps

        take_steps(self.loop, self.steps)


@pytest.mark.parametrize("family", ["wan", pytest.param("wan_5b", marks=pytest.mark.long)])
def test_a_tiny_run_learns_the_hints_of_its_clips(family: str) -> None:
    """The loss falls with the clip's own hint, and neither with another's nor without the control."""
    run = LitRun(family)
    run.train()
    assert run.loss() < FALLEN * run.before, (run.loss(), run.before)
    assert run.loss(others=True) > run.before
    assert run.loss(strength=0.0) > 0.9 * run.before


@pytest.mark.long
@pytest.mark.parametrize("family", CLIPS)
@pytest.mark.parametrize("kept_back", ["control", "own hints", "steps"])
def test_a_run_without_its_hints_does_not_learn_them(
    kept_back: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control switched off in training, hints of any of the clips in it, or a learning rate near zero."""
    run = LitRun(family, **({"learning_rate": 1e-9, "control_learning_rate": 1e-9} if kept_back == "steps" else {}))
    with monkeypatch.context() as inside:
        given = run.loop.controlled.forward
        hints, drawn = run.batch.hint.unflatten(0, (4, -1)), torch.Generator().manual_seed(0)

        def wrong(x: Any, sigma: Any, conditions: Any, hint: Any, strength: float = 1.0) -> Any:
            if kept_back == "control":
                return given(x, sigma, conditions, hint, 0.0)
            return given(x, sigma, conditions, hints[torch.randint(4, (), generator=drawn)], strength)

        if kept_back != "steps":
            inside.setattr(run.loop.controlled, "forward", wrong)
        run.train()
    assert run.loss() > FALLEN * run.before

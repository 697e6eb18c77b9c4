"""Training on clips that are one latent: what a sample is, what the control hears, and a run whose loss falls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.tests.fixtures.narrow_training import (
    CLIP_FRAMES,
    CLIPS,
    Words,
    config_for,
    drawn_batch,
    narrow_base,
    scenes,
    train_narrow,
)
from comfyui_controlnext.tests.fixtures.training_fixtures import SIDE, Watcher, loop_on, shaken
from comfyui_controlnext.tests.fixtures.transformer_files import make_small, make_vae
from comfyui_controlnext.tests.fixtures.transformer_fixtures import NARROW

pytestmark = pytest.mark.comfy

REASSOCIATED = 1e-5
"""Relative difference of other batches."""


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
    """Before the statistics of the whole: the narrow maps change where the group of a changed frame is."""
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


def test_a_region_of_the_loss_is_averaged_over_the_frames_of_a_latent_frame() -> None:
    from comfyui_controlnext.controlnext_training.objective import OBJECTIVES, loss
    from comfyui_controlnext.controlnext_training.step import _region

    sample = loop_of("wan").samples.store.sample(0, 0)
    mask = torch.zeros(CLIP_FRAMES, SIDE, SIDE)
    mask[0, :8, :8], mask[1, :8, 8:16], mask[4, :4, 8:16] = 1, 1, 1
    from dataclasses import replace

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
    """The host's own autoencoder, narrow, from its file; the text encoder is too large, and its kind is asked."""
    import comfy.sd
    from comfyui_controlnext.controlnext_training.base_model.base_files import load_base
    from comfyui_controlnext.tests.fixtures.training_fixtures import take_steps

    make_small(tmp_path / "wan.pt", "wan", pinned_host)
    make_vae(tmp_path / "vae.safetensors", "wan")
    (tmp_path / "umt5.safetensors").write_bytes(b"")
    kinds: list[Any] = []
    words = Words(4096, None, 0)
    monkeypatch.setattr(comfy.sd, "load_clip", lambda paths, folders, clip_type: (kinds.append(clip_type), words)[1])
    config = config_for("wan", base="wan.pt", vae="vae.safetensors", clip=("umt5.safetensors",))
    base = load_base(config, tmp_path)
    base.check()
    assert kinds == [comfy.sd.CLIPType.WAN]
    clip = torch.rand(CLIP_FRAMES, SIDE, SIDE, 3, generator=torch.Generator().manual_seed(0))
    latent = base.latent(clip)
    assert latent.shape == (1, 16, 2, SIDE // 8, SIDE // 8) and base.picture(latent).shape == clip.shape
    assert base.latent(clip[:1]).shape == (1, 16, 1, SIDE // 8, SIDE // 8)
    first = base.latent(clip.roll(1, 0))[:, :, 1], latent[:, :, 1]
    assert not torch.equal(*first), "a latent frame is of its own frames"
    (loss,) = take_steps(loop_on(base, config, scenes(4, "wan")), 1)
    assert 0 < loss < 100


@pytest.mark.long
@pytest.mark.parametrize("family", CLIPS)
def test_the_loss_of_a_tiny_run_falls(family: str) -> None:
    """At fixed noise and levels, over clips that train: the control learns more of them than the bare base knows."""
    from comfyui_controlnext.controlnext_training.step import losses
    from comfyui_controlnext.tests.fixtures.training_fixtures import take_steps

    loop = loop_of(family, steps=40, batch_size=2, learning_rate=2e-3, control_learning_rate=2e-3)
    batch = drawn_batch(loop, 4)

    def measured() -> float:
        with torch.no_grad():
            return float(losses(loop.controlled, batch, loop.objective, loop.config).mean())

    before = measured()
    take_steps(loop, 40)
    assert measured() < 0.9 * before

"""Rows of trained families: the required encoders, and the error for a family without a row."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from comfyui_controlnext.controlnext_core.specs import SPECS, Family
from comfyui_controlnext.controlnext_training.choices import VARIANTS
from comfyui_controlnext.controlnext_training.config import ConfigError
from comfyui_controlnext.tests.fixtures.sampling_fixtures import Studio
from comfyui_controlnext.tests.fixtures.training_fixtures import base_of, small
from torch import nn

pytestmark = pytest.mark.comfy

ASKED_FOR = {
    "vae": "vae: the checkpoint holds none",
    "clip": "clip: this base needs its text",
    "vision": "clip_vision: this base needs its image encoder",
}


def test_every_variant_is_for_a_family_that_can_be_trained() -> None:
    from comfyui_controlnext.controlnext_training.base_model.trained_families import FAMILIES

    assert {SPECS[name].family for name in VARIANTS if name in SPECS} <= FAMILIES.keys()
    frames = {family.value: row.frames(small(clip_frames=5)) for family, row in FAMILIES.items()}
    assert frames == dict.fromkeys(frames, 1) | {"SVD": 5, "Wan": 5, "Wan 2.2 5B": 5}


@pytest.mark.parametrize(("frames", "right"), [(14, "13 or 17"), (2, "1 or 5"), (17, ""), (1, "")])
def test_clips_of_one_latent_have_as_many_frames_as_latents_stand_for(frames: int, right: str) -> None:
    from comfyui_controlnext.controlnext_training.base_model.trained_families import FAMILIES

    row, config = FAMILIES[Family.WAN], small(clip_frames=frames)
    if right:
        with pytest.raises(ConfigError, match=f"clip_frames: {frames} do not fill .* Set {right}."):
            row.frames(config)
    else:
        assert row.frames(config) == frames


@pytest.mark.parametrize(
    ("family", "needed"),
    [(Family.SD15, {"vae", "clip"}), (Family.SDXL, {"vae", "clip"}), (Family.SVD, {"vae", "vision"})],
)
def test_each_encoder_of_a_family_is_asked_for_and_no_other(
    loaded_studio: Studio, monkeypatch: pytest.MonkeyPatch, family: Family, needed: set[str]
) -> None:
    from comfyui_controlnext.controlnext_training.base_model.encode import BaseWithEncoders
    from comfyui_controlnext.controlnext_training.base_model.trained_families import FAMILIES

    monkeypatch.setattr(BaseWithEncoders, "family", FAMILIES[family])
    for name in ("vae", "clip", "vision"):
        base = base_of(loaded_studio)
        base.vision = object()
        setattr(base, name, None)
        if name in needed:
            with pytest.raises(ConfigError, match=ASKED_FOR[name]):
                base.check()
        else:
            base.check()


def test_a_network_of_another_family_is_named(loaded_studio: Studio) -> None:
    from comfyui_controlnext.controlnext_training.base_model.trained_families import FAMILIES, family_of

    other: Any = SimpleNamespace(
        model=SimpleNamespace(diffusion_model=nn.Linear(1, 1), model_config=SimpleNamespace(unet_config={}))
    )
    with pytest.raises(ValueError, match="is a Linear of another family, and training needs one of SD1.5, SD2.1, SDXL"):
        family_of(other)
    assert family_of(loaded_studio.model) is FAMILIES[Family.SD15]

"""Image to video of Wan in training: the first frame of a clip is a condition, as the host's own node makes it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfyui_controlnext.tests.fixtures.narrow_training import (
    CLIP_FRAMES,
    AveragingClips,
    Words,
    as_patcher,
    config_for,
    drawn_batch,
    scenes,
)
from comfyui_controlnext.tests.fixtures.training_fixtures import CPU, SIDE, gradients_of, loop_on
from comfyui_controlnext.tests.fixtures.transformer_fixtures import NARROW, narrow_model
from torch import Tensor, nn

pytestmark = pytest.mark.comfy
CLIP_WIDTH = 1280
"""Width of CLIP's tokens in Wan 2.1."""


class Eyes:
    """An image encoder with the interface of the host's: each quarter of the picture is a token, through one matrix."""

    def __init__(self) -> None:
        self.model = nn.Linear(3, CLIP_WIDTH, bias=False)
        self.model.weight.data.copy_(torch.randn(CLIP_WIDTH, 3, generator=torch.Generator().manual_seed(0)))

    def encode_image(self, image: Tensor, crop: bool = True) -> Any:
        image = image[:, SIDE // 4 : -SIDE // 4, SIDE // 4 : -SIDE // 4] if crop else image
        quarters = nn.functional.adaptive_avg_pool2d(image.movedim(-1, 1), 2).flatten(2).movedim(1, 2)
        return SimpleNamespace(penultimate_hidden_states=self.model(quarters).detach())


def base_of(version: str, with_eyes: bool = True) -> Any:
    """A narrow base of image to video: Wan 2.1 is given CLIP's tokens as well, Wan 2.2 14B has no place for them."""
    from comfyui_controlnext.controlnext_training.base_model.encode import BaseWithEncoders

    model = narrow_model("wan_i2v") if version == "2.1" else narrow_model("wan", changes=(("in_dim", 36),))
    vae, words = AveragingClips(model, 16, 8, 20), Words(NARROW["wan"].text, None, 20)
    return BaseWithEncoders(as_patcher(model), vae, words, Eyes() if with_eyes and version == "2.1" else None)


def loop_of(base: Any, **settings: Any) -> Any:
    return loop_on(base, config_for("wan", **settings), scenes(4, "wan"))


both = pytest.mark.parametrize("version", ["2.1", "2.2"])


@both
def test_conditions_are_those_of_the_hosts_node_to_the_bit(version: str) -> None:
    from comfy_extras.nodes_wan import WanImageToVideo
    from comfyui_controlnext.controlnext_training.step import conditions_of

    base = base_of(version)
    loop = loop_of(base)
    sample = loop.samples.store.sample(0, 0)
    frames = loop.samples.store.data.load(0).frames
    seen = base.vision.encode_image(frames[:1], crop=False) if version == "2.1" else None
    text = [[sample.given["context"], {}]]
    positive, negative, _ = WanImageToVideo.execute(
        text, text, base.vae, SIDE, SIDE, CLIP_FRAMES, 1, start_image=frames[:1], clip_vision_output=seen
    ).result
    store, controlled = loop.samples.store, loop.controlled
    for side, given in ((positive, sample.given), (negative, store.empty(sample))):
        host = base.model.model.extra_conds(
            noise=sample.latent, device=CPU, cross_attn=given["context"], latent_image=sample.latent, **side[0][1]
        )
        found = conditions_of(sample, given, controlled)
        assert found["c_concat"].cond.shape == (1, 20, 2, SIDE // 8, SIDE // 8)
        names = {"c_concat", "c_crossattn"} | ({"clip_fea"} if version == "2.1" else set())
        assert names <= host.keys() and ("clip_fea" in found) is (version == "2.1")
        for name in names:
            assert torch.equal(found[name].cond, host[name].cond), name
    again = conditions_of(sample, sample.given, controlled)
    assert torch.equal(again["c_concat"].cond, found["c_concat"].cond), "the host does not write into what is kept"


@both
def test_the_first_frame_is_heard_and_has_its_gradients(version: str) -> None:
    loop = loop_of(base_of(version), batch_size=2)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients_of(loop).values())
    batch = drawn_batch(loop, 2)
    outputs = []
    for rolled in (0, 1):
        conditions = [
            one | {"c_concat": other["c_concat"]}
            for one, other in zip(batch.conditions, [batch.conditions[(i + rolled) % 2] for i in range(2)], strict=True)
        ]
        with torch.no_grad():
            outputs.append(loop.controlled(batch.noise, batch.sigma, conditions, batch.hint))
    assert (outputs[0] - outputs[1]).abs().max() > 0.01 * outputs[0].abs().max()


@both
def test_first_frames_are_encoded_before_the_first_step(version: str) -> None:
    """The text encoder, which is large, can leave: no step meets a frame that was not encoded."""
    from comfyui_controlnext.controlnext_training.distributed import ProcessGroup
    from comfyui_controlnext.controlnext_training.encoded import MemoryCache, Store
    from comfyui_controlnext.tests.fixtures.training_fixtures import Watcher

    base = base_of(version)
    store = Store(base, scenes(2, "wan"), config_for("wan", caption_dropout=0.5), MemoryCache())
    usable, broken = store.prepare(range(2), ProcessGroup(), Watcher())
    assert usable == [0, 1] and not broken
    base.read_again = lambda name: pytest.fail(f"{name} was wanted again")
    base.release_unused()
    assert base.vae is None and base.clip is None
    for position in range(8):
        given = store.sample(position % 2, position).given
        assert {"context", "concat", "concat_mask"} <= given.keys()


def test_a_base_that_sees_the_frame_needs_the_encoder_that_sees() -> None:
    from comfyui_controlnext.controlnext_training.config import ConfigError

    base_of("2.2", with_eyes=False).check()
    base_of("2.1").check()
    with pytest.raises(ConfigError, match=r"clip_vision: .* Load CLIP Vision for Wan 2\.1"):
        base_of("2.1", with_eyes=False).check()


def test_first_frames_of_clips_of_several_lengths_are_kept_apart() -> None:
    """Gray frames follow, and the autoencoder makes more latent frames of more of them."""
    base = base_of("2.2")
    conditioning = base.family.conditioning
    keys = {conditioning.frame_key(base, ("first", *["later"] * more)) for more in (0, 4, 8)}
    assert len(keys) == 3


def test_text_to_video_has_no_start_image() -> None:
    from comfyui_controlnext.tests.fixtures.narrow_training import narrow_base

    for family in ("wan", "wan_5b"):
        base = narrow_base(family)
        assert base.family.conditioning.frame_key(base, ("first",)) is None
        assert "concat" not in loop_on(base, config_for(family), scenes(4, family)).samples.store.sample(0, 0).given

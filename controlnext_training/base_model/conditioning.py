"""Conditions of a sample: encoding of its caption or its reference frame, and drop-out.

Encoded conditions are tensors by name, on the CPU: `context` (1, T, D), the tokens that cross attention reads;
`pooled` (1, P), one vector for the whole caption; `mask` (1, T), 0 where the context is padding, and absent where it is
not padded; `concat` (1, C, H/8, W/8), or (1, C, T, H/8, W/8) of a clip, latents beside the noisy ones; `concat_mask`
(1, 1, T, H/8, W/8), 0 where these show a picture that is given; `image` (1, N, D), a picture's tokens of CLIP. A
context keeps the length its encoder gave it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..data.samples import digest
from ..seeding import generator

Tensors = dict[str, Tensor]
Cached = Callable[[str, Callable[[], Tensors]], Tensors]
"""(key, encode) -> the tensors cached under the key; `encode` is called and its result cached where they are
missing."""

HOST_NAMES = {
    "context": "cross_attn",
    "pooled": "pooled_output",
    "mask": "attention_mask",
    "concat": "concat_latent_image",
    "concat_mask": "concat_mask",
    "image": "clip_vision_output",
}
"""Name of an encoded condition -> the argument of the host's `extra_conds` that takes it."""
GRAY = 0.5
"""Frames of Wan's image to video that are not given. Source: the host's WanImageToVideo."""
AUGMENTATION = 0.02
"""Standard deviation of the noise on SVD's reference frame. Source: the released trainer."""


class Encoders(Protocol):
    """Interface of a base model as far as conditions need it."""

    def encoder(self, name: str) -> Any:
        """Encoder of the host: `vae`, `clip` or `vision`."""

    def identity(self, part: str) -> str:
        """Identity of the weights of `vae`, `text` or `vision`."""


class Sample(Protocol):
    """Interface of a sample as far as conditions need it."""

    @property
    def caption(self) -> str: ...
    @property
    def frames(self) -> Tensor:
        """Frames (F, H, W, 3); they may be read from their files at this point."""

    @property
    def frame_keys(self) -> tuple[str, ...]: ...


class Conditioning(Protocol):
    """Kind of conditions. `cached` caches encoded tensors; `rate` is the drop-out probability of the recipe."""

    @property
    def encoded_while_training(self) -> bool:
        """True: some conditions are first known at a step, so the encoders stay loaded.

        False: `prepare` encodes all of them.
        """

    def frame_key(self, base: Encoders, frames: Sequence[str]) -> str | None:
        """Key under which what is encoded of a sample's frames is cached; None: no frame is looked at."""

    def prepare(self, base: Encoders, cached: Cached, caption: str) -> None:
        """Encode all conditions of a sample that are known before the first step; '' is for dropped captions."""

    def encode(self, base: Encoders, cached: Cached, sample: Sample, drop: float, rate: float) -> Tensors:
        """Conditions of a sample. drop: uniform in [0, 1), decides together with `rate` which
        conditions are dropped.
        """

    def empty(self, base: Encoders, cached: Cached, like: Tensors) -> Tensors:
        """Conditions for the unconditional side of classifier-free guidance; like: the conditions of the sample."""


class Caption:
    """Conditions from text:

    `context` and, where the text encoder has one, `pooled`. A dropped caption is the empty one.
    """

    encoded_while_training = False

    def frame_key(self, base: Encoders, frames: Sequence[str]) -> str | None:
        """Key of a frame's tensors; None: captions are the only conditions."""
        return None

    def prepare(self, base: Encoders, cached: Cached, caption: str) -> None:
        """Encode the caption."""
        self.text(base, cached, caption)

    def encode(self, base: Encoders, cached: Cached, sample: Sample, drop: float, rate: float) -> Tensors:
        """Tensors of the caption, or those of the empty caption where `drop` is below `rate`."""
        return self.text(base, cached, "" if drop < rate else sample.caption)

    def empty(self, base: Encoders, cached: Cached, like: Tensors) -> Tensors:
        """Tensors of the empty caption."""
        return self.text(base, cached, "")

    def text(self, base: Encoders, cached: Cached, caption: str) -> Tensors:
        """Tensors of a caption."""
        key = f"text-{base.identity('text')}-{digest(caption)}"
        return cached(key, lambda: encode_text(base.encoder("clip"), caption))


class StartImage(Caption):
    """Conditions of Wan's image to video: the caption, and a clip's first frame as the host's WanImageToVideo gives it.

    A dropped caption keeps the frame, and so does the unconditional side.
    """

    def __init__(self, sees: bool) -> None:
        """sees: True for a base that is also given the frame's tokens of CLIP (Wan 2.1), False for Wan 2.2."""
        self.sees = sees

    def frame_key(self, base: Encoders, frames: Sequence[str]) -> str:
        """Key of a clip's first frame, which is encoded at the head of as many gray ones as follow it."""
        vision = f"{base.identity('vision')}-" if self.sees else ""
        return f"start-{vision}{base.identity('vae')}-{len(frames)}-{frames[0]}"

    def encode(self, base: Encoders, cached: Cached, sample: Sample, drop: float, rate: float) -> Tensors:
        """The caption's tensors, as for `Caption`, with those of the first frame."""

        def start() -> Tensors:
            seen = encode_seen(base.encoder("vision"), sample.frames[:1]) if self.sees else {}
            return encode_start(base.encoder("vae"), sample.frames) | seen

        found = cached(self.frame_key(base, sample.frame_keys), start)
        return super().encode(base, cached, sample, drop, rate) | found

    def empty(self, base: Encoders, cached: Cached, like: Tensors) -> Tensors:
        """The tensors of the empty caption, and the sample's own of its first frame."""
        start = {name: tensor for name, tensor in like.items() if name in ("concat", "concat_mask", "image")}
        return super().empty(base, cached, like) | start


class ReferenceFrame:
    """Conditions of SVD: the first frame of a clip, encoded by CLIP vision (`context`) and as a latent (`concat`).

    A clip draws another reference frame at each position of the run, so frames are encoded while training.
    """

    encoded_while_training = True

    def frame_key(self, base: Encoders, frames: Sequence[str]) -> str:
        """Key of the first frame's tensors, by both encoders that see it."""
        return f"reference-{base.identity('vision')}-{base.identity('vae')}-{frames[0]}"

    def prepare(self, base: Encoders, cached: Cached, caption: str) -> None:
        """No operation: the frame is not known before it is drawn."""

    def encode(self, base: Encoders, cached: Cached, sample: Sample, drop: float, rate: float) -> Tensors:
        """Conditions of a frame. Drop-out: drop < 2 rate zeroes `context`, rate <= drop < 3 rate zeroes `concat`.

        Source of these intervals: the released SVD trainer.
        """
        found = self.reference(base, cached, sample)
        if drop < 2 * rate:
            found = {**found, "context": torch.zeros_like(found["context"])}
        if rate <= drop < 3 * rate:
            found = {**found, "concat": torch.zeros_like(found["concat"])}
        return found

    def empty(self, base: Encoders, cached: Cached, like: Tensors) -> Tensors:
        """Zeros in place of the frame's tensors."""
        return {name: torch.zeros_like(tensor) for name, tensor in like.items()}

    def reference(self, base: Encoders, cached: Cached, sample: Sample) -> Tensors:
        """Tensors of a clip's first frame. Its noise depends only on the frame's key."""

        def encode() -> Tensors:
            frame = sample.frames[:1]
            noise = torch.randn(frame.shape, generator=generator(0, f"augmentation {sample.frame_keys[0]}", 0))
            return encode_reference(base.encoder("vision"), base.encoder("vae"), frame, AUGMENTATION * noise)

        return cached(self.frame_key(base, sample.frame_keys), encode)


def encode_text(clip: Any, caption: str) -> Tensors:
    """Encode a caption with the host's text encoder: `context`, and `pooled` and `mask` where it has them.

    All are fp32 except the mask: the host recognises a mask of zeros and ones by its integer dtype.
    """
    with torch.inference_mode():
        given = clip.encode_from_tokens(clip.tokenize(caption), return_dict=True)
    found = {"context": given["cond"], "pooled": given.get("pooled_output"), "mask": given.get("attention_mask")}
    return {
        name: (tensor.float() if tensor.is_floating_point() else tensor).cpu().clone()
        for name, tensor in found.items()
        if tensor is not None
    }


def encode_reference(vision: Any, vae: Any, frame: Tensor, noise: Tensor) -> Tensors:
    """Encode a frame (1, H, W, 3) in [0, 1]: `context` and unscaled `concat`, fp32; noise is added before `vae`
    encodes.

    Source: the host's SVD_img2vid_Conditioning.
    """
    with torch.inference_mode():
        embeds = vision.encode_image(frame).image_embeds.unsqueeze(0)
        concat = vae.encode(frame + noise)
    return {"context": embeds.float().cpu().clone(), "concat": concat.float().cpu().clone()}


def encode_start(vae: Any, frames: Tensor) -> Tensors:
    """Unscaled `concat` and `concat_mask` of the first of a clip's frames (4n + 1, H, W, 3) in [0, 1], fp32.

    Source: the host's WanImageToVideo, for a start image of this size.
    """
    clip = torch.full_like(frames, GRAY)
    clip[:1] = frames[:1]
    with torch.inference_mode():
        latent = vae.encode(clip).float().cpu().clone()
    mask = torch.ones(1, 1, *latent.shape[2:])
    mask[:, :, 0] = 0
    return {"concat": latent, "concat_mask": mask}


def encode_seen(vision: Any, frame: Tensor) -> Tensors:
    """`image`, the tokens of a frame (1, H, W, 3) in [0, 1] that Wan 2.1 reads; the whole frame, nothing cut off."""
    with torch.inference_mode():
        tokens = vision.encode_image(frame, crop=False).penultimate_hidden_states
    return {"image": tokens.float().cpu().clone()}


def host_arguments(encoded: Mapping[str, Tensor]) -> dict[str, Any]:
    """Encoded conditions under the names of the host's `extra_conds`."""
    given: dict[str, Any] = {HOST_NAMES[name]: tensor for name, tensor in encoded.items()}
    if "image" in encoded:
        given[HOST_NAMES["image"]] = SimpleNamespace(penultimate_hidden_states=encoded["image"])
    return given

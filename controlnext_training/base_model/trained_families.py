"""Table of how each family of base models is trained: one row per family, the only place that distinguishes them.

A new family is a row of FAMILIES, and new kinds of conditions are a class in `conditioning`. The network's places and
names are rows of the inference side, and the maths of its objective is in `objective`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from comfy.ldm.flux.layers import DoubleStreamBlock, SingleStreamBlock
from comfy.ldm.lumina.model import JointTransformerBlock
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.ldm.modules.diffusionmodules.mmdit import JointBlock
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from comfy.ldm.qwen_image.model import QwenImageTransformerBlock
from comfy.ldm.wan.model import WanAttentionBlock
from comfy.model_base import ModelType
from comfy.model_patcher import ModelPatcher
from torch import nn

from ...controlnext_core.comfy_adapter.bases.table import loaded_base
from ...controlnext_core.families import FAMILIES as KNOWN
from ...controlnext_core.specs import Family
from ..config import ConfigError, TrainConfig
from .conditioning import Caption, Conditioning, ReferenceFrame, StartImage


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedFamily:
    """Facts about the training of one family of base models."""

    encoders: tuple[str, ...]
    """Fields of `BaseWithEncoders` that a run needs: `vae`, and `clip` or `vision`."""
    conditioning: Conditioning
    """Conditions of this family's samples, encoded with these encoders."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the host's `extra_conds` that are the same for every sample."""
    clips: bool = False
    """True: a sample is a clip. False: a sample is one picture."""
    frames_in_latent: int | None = None
    """Frames of each latent frame after the first, where a clip is one latent and one batch item; None: each frame is a
    batch item."""
    timesteps: str = "uniform"
    """Key of TIMESTEP_DISTRIBUTIONS that `timesteps = auto` selects."""
    blocks: tuple[type[nn.Module], ...]
    """Types of the network's blocks; `checkpointing` recomputes them in the backward pass."""
    writes_in_place: bool = False
    """True: these blocks add in place to their input. False: they make new tensors."""
    guided: bool = False
    """True: the network has a guidance scale as an input, with which it was distilled. False: it has none."""
    inside: float = 0.0
    """Number of values per token and channel that one block stores while it is recomputed; 0: not counted. See
    `memory_estimate`."""
    inside_mlp: float = 0.0
    """Numbers for each token and channel of the MLP's inner width, beside `inside`; for families of several ratios."""
    clip_type: str = ""
    """Host's name (`comfy.sd.CLIPType`) of the text encoders, where they are separate files."""

    def frames(self, config: TrainConfig) -> int:
        """Number of frames of one sample. Raises ConfigError for a length that clips of this family cannot have."""
        if not self.clips:
            return 1
        each, count = self.frames_in_latent or 1, config.clip_frames
        if (count - 1) % each:
            low = (count - 1) // each * each + 1
            raise ConfigError(
                f"clip_frames: {count} do not fill this base's latent frames, of which the first has 1 frame and the "
                f"others have {each}. Set {low} or {low + each}."
            )
        return count

    @property
    def one_latent(self) -> bool:
        """True: a clip is one latent, encoded from all frames together. False: each frame is a latent."""
        return self.frames_in_latent is not None


_UNET_BLOCKS = (ResBlock, BasicTransformerBlock)
_PICTURES = TrainedFamily(encoders=("vae", "clip"), conditioning=Caption(), blocks=_UNET_BLOCKS)
_SVD = TrainedFamily(
    encoders=("vae", "vision"),
    conditioning=ReferenceFrame(),
    # The host takes one off fps. Source: the released trainer's time ids (6, 127, 0.02).
    constants={"fps": 7, "motion_bucket_id": 127, "augmentation_level": 0.02},
    clips=True,
    timesteps="svd_cosine",
    blocks=_UNET_BLOCKS,
)


def _transformer(block: type[nn.Module], *others: type[nn.Module], **facts: Any) -> TrainedFamily:
    """Noise levels: Esser et al. 2024 (SD3), 3.1: logit-normal, then the model's shift, which is in its table."""
    return TrainedFamily(
        encoders=("vae", "clip"),
        conditioning=Caption(),
        timesteps="logit_normal",
        blocks=(block, *others),
        **facts,
    )


def _wan(family: Family) -> TrainedFamily:
    return _transformer(
        WanAttentionBlock,
        clips=True,
        frames_in_latent=KNOWN[family].frames,
        clip_type="WAN",
        inside=15.0,
        inside_mlp=3.1,
    )


_STREAMS = (DoubleStreamBlock, SingleStreamBlock)

FAMILIES: dict[Family, TrainedFamily] = {
    Family.SD15: _PICTURES,
    Family.SD21: _PICTURES,
    Family.SDXL: _PICTURES,
    Family.SVD: _SVD,
    Family.SD3: _transformer(JointBlock, clip_type="SD3", inside=36.5),
    Family.FLUX: _transformer(*_STREAMS, writes_in_place=True, guided=True, clip_type="FLUX", inside=27.5),
    Family.CHROMA: _transformer(*_STREAMS, writes_in_place=True, clip_type="CHROMA", inside=27.5),
    Family.QWEN_IMAGE: _transformer(QwenImageTransformerBlock, clip_type="QWEN_IMAGE", inside=22.0),
    Family.LUMINA2: _transformer(JointTransformerBlock, clip_type="LUMINA2", inside=36.5),
    Family.Z_IMAGE: _transformer(JointTransformerBlock, clip_type="LUMINA2", inside=34.0),
    Family.WAN: _wan(Family.WAN),
    Family.WAN_5B: _wan(Family.WAN_5B),
}

PREDICTS = {
    ModelType.EPS: "epsilon",
    ModelType.V_PREDICTION: "v",
    ModelType.V_PREDICTION_EDM: "edm",
    ModelType.FLOW: "flow",
    ModelType.FLUX: "flow",
}
"""Host's type of model -> key of OBJECTIVES: the network's output. A family may have models of several types."""


def family_of(model: ModelPatcher) -> TrainedFamily:
    """The row of a MODEL's family, with a start image for a base of image to video.

    Raises ValueError for a family that cannot be trained.
    """
    found = FAMILIES.get(loaded_base(model.model).family)
    if found is None:
        known = ", ".join(family.value for family in FAMILIES)
        raise ValueError(
            f"the connected model is a {type(model.model.diffusion_model).__name__} of another family, and training "
            f"needs one of {known}. Connect a checkpoint of one of these."
        )
    return _with_start_image(found, model.model) if found.one_latent else found


MASK_CHANNELS = 4
"""Mask channels in the input of Wan's image to video, one a frame of a latent frame; the start image is beside them."""


def _with_start_image(row: TrainedFamily, base: Any) -> TrainedFamily:
    network, channels = base.diffusion_model, base.latent_format.latent_channels
    if network.patch_embedding.weight.shape[1] != 2 * channels + MASK_CHANNELS:
        return row
    sees = getattr(network, "img_emb", None) is not None
    encoders = (*row.encoders, *(("vision",) if sees else ()))
    return replace(row, conditioning=StartImage(sees), encoders=encoders)

"""Training of each family of base models: one row per family, the only place where training tells them apart.

A new family is a row of FAMILIES, and new kinds of conditions are a class in `conditioning`. The network's places and
names are the inference side's rows, and the maths of its objective is in `objective`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from comfy.model_base import ModelType
from comfy.model_patcher import ModelPatcher
from torch import nn

from ...controlnext_core.comfy_adapter.bases.table import loaded_base
from ...controlnext_core.specs import Family
from ..config import TrainConfig
from .conditioning import Caption, Conditioning, ReferenceFrame


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedFamily:
    """The training of one family of base models."""

    encoders: tuple[str, ...]
    """Fields of `BaseWithEncoders` that a run needs: `vae`, and `clip` or `vision`."""
    conditioning: Conditioning
    """Makes a sample's conditions with those encoders."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the host's `extra_conds` that are the same for every sample."""
    clips: bool = False
    """True: a sample is a clip, and its frames follow each other as rows. False: a sample is one picture."""
    timesteps: str = "uniform"
    """Key of TIMESTEP_LAWS that `timesteps = auto` stands for."""
    checkpointed: tuple[type[nn.Module], ...]
    """Blocks of the network whose insides `checkpointing` computes again in the backward pass."""

    def frames(self, config: TrainConfig) -> int:
        """Frames of one sample."""
        return config.clip_frames if self.clips else 1


_UNET_BLOCKS = (ResBlock, BasicTransformerBlock)
_PICTURES = TrainedFamily(encoders=("vae", "clip"), conditioning=Caption(), checkpointed=_UNET_BLOCKS)
_SVD = TrainedFamily(
    encoders=("vae", "vision"),
    conditioning=ReferenceFrame(),
    # The host takes one off fps. Source: the released trainer's time ids (6, 127, 0.02).
    constants={"fps": 7, "motion_bucket_id": 127, "augmentation_level": 0.02},
    clips=True,
    timesteps="svd_cosine",
    checkpointed=_UNET_BLOCKS,
)

FAMILIES: dict[Family, TrainedFamily] = {
    Family.SD15: _PICTURES,
    Family.SD21: _PICTURES,
    Family.SDXL: _PICTURES,
    Family.SVD: _SVD,
}

PREDICTS = {
    ModelType.EPS: "epsilon",
    ModelType.V_PREDICTION: "v",
    ModelType.V_PREDICTION_EDM: "edm",
    ModelType.FLOW: "flow",
}
"""The host's kind of model -> key of OBJECTIVES: the network's output. A family may have models of several kinds."""


def family_of(model: ModelPatcher) -> TrainedFamily:
    """The row of a MODEL's family. Raises ValueError for a family that cannot be trained."""
    found = FAMILIES.get(loaded_base(model.model).family)
    if found is None:
        known = ", ".join(family.value for family in FAMILIES)
        raise ValueError(
            f"the connected model is a {type(model.model.diffusion_model).__name__} of another family, and training "
            f"needs one of {known}. Connect a checkpoint of one of these."
        )
    return found

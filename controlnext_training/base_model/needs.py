"""Memory estimate for a step of a run on a transformer, from the sizes of the run's networks and samples."""

from __future__ import annotations

from collections.abc import Mapping

import comfy.model_management
import torch
from torch import Tensor, nn

from ...controlnext_core.comfy_adapter.bases.tokens import PATCH
from ...controlnext_core.latent_clips import Clip
from ...controlnext_core.specs import SPECS
from ..config import TrainConfig
from ..memory_estimate import Need, StepShape, advice, needed, offloaded
from .clip_encoding import latent_frames_at_once
from .controlled import Controlled


def step_shape(
    controlled: Controlled, latent: Tensor, given: Mapping[str, Tensor], hint: Tensor, config: TrainConfig
) -> StepShape | None:
    """Sizes of a step whose samples are like this one; None for a family whose memory was not counted.

    latent: (F, C, ..., H, W); given: the encoded conditions; hint: (F, 3, 8H, 8W), of a clip all its frames.
    """
    family = controlled.family
    if not family.inside:
        return None
    height, width = latent.shape[-2:]
    tokens = -(-height // PATCH) * -(-width // PATCH)
    pixels, frames_in_pass = int(hint.shape[-1] * hint.shape[-2]), 0
    text = given.get("context")
    if family.frames_in_latent is not None:
        clip = Clip(int(latent.shape[2]), family.frames_in_latent)
        tokens *= clip.length
        at_once = latent_frames_at_once(SPECS[config.variant], pixels, controlled.dtype.itemsize, clip)
        frames_in_pass = min(at_once * clip.frames, len(hint))
    elif text is not None:
        tokens += int(text.shape[-2])
    channels = max(place.width for place in controlled.facts.places.values())
    frozen = _frozen_bytes(controlled.unet, controlled.device, config.offload)
    return StepShape(
        rows=config.batch_size,
        tokens=tokens,
        width=channels,
        blocks=controlled.blocks,
        inside=family.inside + family.inside_mlp * widest(controlled.unet, family.blocks) / channels,
        pixels=pixels,
        itemsize=controlled.dtype.itemsize,
        frozen=offloaded(frozen, controlled.blocks) if config.offload else frozen,
        largest=max(tensor.numel() for tensor in controlled.unet.parameters()),
        trained=sum(p.numel() for p in (*controlled.net.parameters(), *controlled.differences.parameters.values())),
        frames_in_pass=frames_in_pass,
    )


def widest(network: nn.Module, kinds: tuple[type[nn.Module], ...]) -> int:
    """Most outputs of a matrix in blocks of these kinds: the inner width of the MLP."""
    blocks = (module for module in network.modules() if isinstance(module, kinds))
    return max(weight.shape[0] for block in blocks for weight in block.parameters() if weight.ndim == 2)


def _frozen_bytes(network: nn.Module, device: torch.device, everywhere: bool) -> int:
    """Bytes of the frozen tensors on the device; everywhere=True also counts those in host memory, False does not."""
    tensors = [*network.parameters(), *network.buffers()]
    return sum(t.nbytes for t in tensors if not t.requires_grad and (everywhere or t.device == device))


def estimate_step(step: StepShape, config: TrainConfig, device: torch.device) -> tuple[Need, str]:
    """(memory estimate of a step; a line for the log, which names the setting to change where the device has less
    memory).
    """
    need = needed(step)
    available = int(comfy.model_management.get_total_memory(device))
    change = advice(step, config.offload, available)
    return need, f"a step is estimated to need {need}; the device has {available / 2**30:.1f} GiB. {change}".strip()

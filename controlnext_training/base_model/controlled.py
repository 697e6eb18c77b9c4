"""Base model and control as one module: noisy latents and conditions in, the raw network output for the loss out."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from comfy.conds import CONDCrossAttn
from comfy.model_patcher import ModelPatcher
from comfy.model_sampling import CONST
from comfy.samplers import cond_cat
from torch import Tensor, nn

from ...controlnext_core.comfy_adapter.bases.base import LoadedBase
from ...controlnext_core.comfy_adapter.bases.forward_options import TransformerOptions
from ...controlnext_core.comfy_adapter.bases.table import loaded_base
from ...controlnext_core.key_maps import KeyMap
from ...controlnext_core.low_rank import name_of, whole
from ...controlnext_core.specs import SPECS
from ...controlnext_core.unet_weights import published_names
from ..choices import rank_of
from ..config import TrainConfig
from ..trainables import Differences, selected, train_differences
from .blocks import host_in_training, prepare_blocks
from .conditioning import host_arguments
from .controls import TrainedControl, check_base, new_control, start_from
from .trainable_copy import plain_attention, training_unet
from .trained_families import PREDICTS, TrainedFamily, family_of

Conditions = dict[str, Any]
"""Result of the host's `extra_conds` for one sample: name -> its COND object."""


class _RawOutput:
    """Model sampling of the base, except that `calculate_denoised` returns the network's output."""

    def __init__(self, model_sampling: Any) -> None:
        self._inner = model_sampling

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def calculate_denoised(self, sigma: Tensor, output: Tensor, x: Tensor) -> Tensor:
        return output


@dataclass(frozen=True)
class Sizes:
    """Sizes in pixels that condition a picture."""

    original: tuple[int, int]
    """Size (height, width) of the picture before it was resized."""
    crop: tuple[int, int]
    """Offset (top, left) of the crop."""
    target: tuple[int, int]
    """Size (height, width) of the training picture."""


def check_fits(model: ModelPatcher, config: TrainConfig) -> None:
    """Raise ConfigError or ValueError where the control is for another base; called before samples are encoded."""
    check_base(config, loaded_base(model.model))


class Controlled(nn.Module):
    """Trainable copy of a base model with its control, called through the host's own path from latents to an output."""

    def __init__(self, model: ModelPatcher, config: TrainConfig, dtype: torch.dtype, device: torch.device) -> None:
        """Raise ConfigError or ValueError where the configuration does not fit the base; `model` is not modified."""
        super().__init__()
        self.facts: LoadedBase = loaded_base(model.model)
        self.family: TrainedFamily = family_of(model)
        self.device, self.dtype, self.guidance = device, dtype, config.guidance
        self.control: TrainedControl = new_control(config, self.facts, device)
        stored_on = torch.device("cpu") if config.offload else device
        self.unet = training_unet(model, dtype, stored_on, narrow=config.checkpointing)
        trains_base = self.control.trains_base
        names = names_that_train(self.facts, self.unet, config) if trains_base else []
        rank = rank_of(config.variant, config.rank)
        slices = self.facts.row.slices(config.trainable, shapes_of(self.unet), names)
        self.differences: Differences = train_differences(self.unet, names, device, rank, config.seed, slices)
        if config.init_control and trains_base:
            start_from(self.differences, Path(config.init_control), self.facts, model)
        fetched_on = device if config.offload else None
        family = self.family
        self.blocks = prepare_blocks(
            self.unet, family.blocks, config.checkpointing, family.writes_in_place, fetched_on, config.compile
        )
        self.net = self.control.net
        # not sub-modules: they belong to the host, and contain the network again
        sampling = _sampling_of(model)
        self._shells = (
            _shell(model.model, self.unet, _RawOutput(sampling), dtype, device),
            _shell(model.model, self.unet, sampling, dtype, device),
        )

    @property
    def key_map(self) -> KeyMap:
        """Published name of each weight -> its name in this base.

        Raises ValueError for a family without published names.
        """
        return self.facts.key_map()

    @property
    def base(self) -> Any:
        """Host's BaseModel around the training network."""
        return self._shells[1]

    @property
    def predicts(self) -> str:
        """Key of OBJECTIVES: the parameterisation of this base's output."""
        return PREDICTS[self.base.model_type]

    def forward(
        self, noisy: Tensor, sigma: Tensor, conditions: Sequence[Conditions], hint: Tensor, strength: float = 1.0
    ) -> Tensor:
        """Output of the network for noisy (rows, C, H, W), or (rows, C, T, H, W) of clips, at sigma (rows,), in fp32.

        conditions: one per sample, whose rows follow each other; hint: (rows, 3, 8H, 8W) in [0, 1], for clips one for
        each frame of each row. At strength 0 the control does not run.
        """
        return self._call(self._shells[0], noisy, sigma, conditions, hint, strength)

    def denoised(
        self, noisy: Tensor, sigma: Tensor, conditions: Sequence[Conditions], hint: Tensor, strength: float = 1.0
    ) -> Tensor:
        """Estimate of the clean latents, as for the host's samplers; arguments as for `forward`."""
        return self._call(self._shells[1], noisy, sigma, conditions, hint, strength)

    def _call(
        self, shell: Any, noisy: Tensor, sigma: Tensor, conditions: Sequence[Conditions], hint: Tensor, strength: float
    ) -> Tensor:
        """Run one forward of the host for all samples, or one for each group of samples whose conditions can be
        batched.
        """
        ready = _ready(conditions, noisy.shape[0] // len(conditions), noisy.device)
        parts = []
        with host_in_training():
            for samples in joined(ready):
                x, levels, hints = (_of(samples, tensor, len(ready)) for tensor in (noisy, sigma, hint))
                parts.append(self._together(shell, x, levels, ready[samples], hints, strength))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _together(
        self, shell: Any, noisy: Tensor, sigma: Tensor, ready: Sequence[Conditions], hint: Tensor, strength: float
    ) -> Tensor:
        options: TransformerOptions = {"optimized_attention_override": plain_attention}
        if strength:
            alone = len(ready) == 1  # all rows have one timestep, which is embedded once, as in inference
            timesteps = self.facts.row.encoder_time(shell.model_sampling, sigma[:1] if alone else sigma).float()
            self.control.join(options, tuple(noisy.shape), hint, timesteps, strength)
        return shell.apply_model(noisy, sigma, transformer_options=options, **cond_cat(ready))

    def conditions(
        self, latent: Tensor, encoded: Mapping[str, Tensor], sizes: Sizes, guidance: float | None = None
    ) -> Conditions:
        """Conditions of one sample in the host's form.

        latent: (rows, C, H, W) or (rows, C, T, H, W), only its shape is used; encoded: the tensors of the family's
        conditioning; guidance: scale for a guidance-distilled base, None: the configuration's.
        """
        given: dict[str, Any] = {
            "noise": latent,
            "device": latent.device,
            "height": sizes.original[0],
            "width": sizes.original[1],
            "crop_h": sizes.crop[0],
            "crop_w": sizes.crop[1],
            "target_height": sizes.target[0],
            "target_width": sizes.target[1],
            "latent_image": torch.zeros_like(latent),
            "pooled_output": None,  # for text encoders without one; some families read it all the same
        }
        if self.family.guided:
            given["guidance"] = self.guidance if guidance is None else guidance
        return self.base.extra_conds(**(given | host_arguments(encoded)), **self.family.constants)

    def published_differences(self) -> dict[str, Tensor]:
        """Trained differences of the base's weights under published names, in fp32 on the CPU."""
        host = {name_of(key): whole(difference) for key, difference in self.differences.by_weight().items()}
        return published_names(host, self.key_map) if host else {}


def names_that_train(facts: LoadedBase, network: nn.Module, config: TrainConfig) -> list[str]:
    """Host names of the base's tensors that a configuration trains, sorted. Raises ConfigError."""
    own = SPECS[config.variant].differences if config.variant in SPECS else None
    if own is None:
        return selected(facts.key_map(), config.trainable, config.blocks)
    row = facts.row
    blocks = config.blocks or (f"joint.0-{own.blocks - 1}" if own.blocks else "")
    names = {name: name for name, _ in network.named_parameters()}
    return selected(names, config.trainable, blocks, row.trainable, row.sides)


def shapes_of(network: nn.Module) -> dict[str, torch.Size]:
    """Shapes of a network's weights by name."""
    return {name: parameter.shape for name, parameter in network.named_parameters()}


def _ready(conditions: Sequence[Conditions], rows: int, device: torch.device) -> list[Conditions]:
    """Conditions of each sample, repeated for its rows."""
    return [
        {name: cond.process_cond(batch_size=rows, device=device, area=None) for name, cond in one.items()}
        for one in conditions
    ]


def _of(samples: slice, tensor: Tensor, count: int) -> Tensor:
    """Slice of a tensor for some of `count` samples, which have equal parts of its first dimension."""
    each = len(tensor) // count
    return tensor[samples.start * each : samples.stop * each]


def joined(conditions: Sequence[Conditions]) -> list[slice]:
    """Groups of neighbouring samples whose conditions the host can batch: texts of one length, and equal constants.

    Texts for cross attention are repeated to one length by the host.
    """
    starts = [0]
    for place in range(1, len(conditions)):
        if not _join(conditions[place - 1], conditions[place]):
            starts.append(place)
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], len(conditions)], strict=True)]


def _join(one: Conditions, other: Conditions) -> bool:
    return one.keys() == other.keys() and all(
        isinstance(cond, CONDCrossAttn) or cond.can_concat(other[name]) for name, cond in one.items()
    )


def _sampling_of(model: ModelPatcher) -> Any:
    """Model sampling of the MODEL; for a flow model with the shift set by a node."""
    patched = model.get_model_object("model_sampling")
    return patched if isinstance(patched, CONST) else model.model.model_sampling


def _shell(base: Any, unet: nn.Module, sampling: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Host's BaseModel around another network and model sampling. Parts shared with `base` are not modified.

    Relies on these attributes of the host: the sub-modules `diffusion_model` and `model_sampling` by their names, and
    `manual_cast_dtype`, `device` and `current_patcher`, which `apply_model` and `extra_conds` read.
    """
    shell = copy.copy(base)
    shell._modules = dict(base._modules)
    shell._modules["diffusion_model"] = unet
    shell.__dict__["manual_cast_dtype"] = dtype
    shell.__dict__["device"] = device
    shell.__dict__["current_patcher"] = None
    del shell._modules["model_sampling"]
    shell.__dict__["model_sampling"] = sampling
    return shell

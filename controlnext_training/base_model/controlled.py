"""The base with its control as one module: noisy latents and conditions in, the UNet's own output out, from which the
objective makes a loss."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.samplers import cond_cat
from torch import Tensor, nn

from ...controlnext_core.comfy_adapter.bases.base import LoadedBase
from ...controlnext_core.comfy_adapter.bases.table import loaded_base
from ...controlnext_core.comfy_adapter.files.weights import base_weights
from ...controlnext_core.key_maps import KeyMap
from ...controlnext_core.unet_weights import published_names
from ..config import TrainConfig
from ..trainables import Differences, selected, train_differences
from .conditioning import host_arguments
from .controls import MakeControl, TrainedControl, check_base, new_control, start_from
from .families import PREDICTS, TrainedFamily, family_of
from .unet import checkpoint_blocks, plain_attention, training_unet

Conditions = dict[str, Any]
"""Result of the host's `extra_conds` for one sample: name -> its COND object."""


class _RawOutput:
    """The base's model sampling, except that `calculate_denoised` returns the network's output."""

    def __init__(self, model_sampling: Any) -> None:
        self._inner = model_sampling

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def calculate_denoised(self, sigma: Tensor, output: Tensor, x: Tensor) -> Tensor:
        return output


@dataclass(frozen=True)
class Sizes:
    """Sizes in a picture's conditions, in pixels."""

    original: tuple[int, int]
    """(height, width) before it was resized."""
    crop: tuple[int, int]
    """(top, left)"""
    target: tuple[int, int]
    """(height, width) of the picture that trains."""


def check_fits(model: ModelPatcher, config: TrainConfig) -> None:
    """Raise ConfigError or ValueError where the control is for another base; called before anything is encoded."""
    check_base(config, loaded_base(model.model))


class Controlled(nn.Module):
    """The trainable copy of a base model, its control, and the host's own way from latents to an output."""

    def __init__(
        self,
        model: ModelPatcher,
        config: TrainConfig,
        dtype: torch.dtype,
        device: torch.device,
        make: MakeControl = new_control,
    ) -> None:
        """Raises ConfigError or ValueError where the configuration does not fit the base; `model` is only read."""
        super().__init__()
        self.facts: LoadedBase = loaded_base(model.model)
        self.family: TrainedFamily = family_of(model)
        self.device, self.dtype = device, dtype
        self.control: TrainedControl = make(config, self.facts, device)
        self.key_map: KeyMap = self.facts.key_map()
        stored_on = torch.device("cpu") if config.offload else device
        self.unet = training_unet(model, dtype, stored_on, narrow=config.checkpointing)
        trains_base = self.control.trains_base
        names = selected(self.key_map, config.trainable, config.blocks) if trains_base else []
        self.differences: Differences = train_differences(self.unet, names, device)
        if config.init_control and trains_base:
            start_from(self.differences, Path(config.init_control), self.key_map, base_weights(model))
        if config.checkpointing:
            checkpoint_blocks(self.unet, self.family.checkpointed)
        self.net = self.control.net
        # not sub-modules: they are the host's, and hold the UNet again
        self._shells = (
            _shell(model.model, self.unet, dtype, device, raw=True),
            _shell(model.model, self.unet, dtype, device),
        )

    @property
    def base(self) -> Any:
        """The host's BaseModel with the training UNet inside."""
        return self._shells[1]

    @property
    def predicts(self) -> str:
        """Key of OBJECTIVES: the parameterisation of this base's UNet."""
        return PREDICTS[self.base.model_type]

    def forward(
        self, noisy: Tensor, sigma: Tensor, conditions: Sequence[Conditions], hint: Tensor, strength: float = 1.0
    ) -> Tensor:
        """The UNet's output for noisy (rows, C, H, W) at sigma (rows,), in fp32.

        conditions: one per sample, whose rows follow each other; hint: (rows, 3, 8H, 8W) in [0, 1]. At strength 0
        the control does not run.
        """
        return self._call(self._shells[0], noisy, sigma, conditions, hint, strength)

    def denoised(
        self, noisy: Tensor, sigma: Tensor, conditions: Sequence[Conditions], hint: Tensor, strength: float = 1.0
    ) -> Tensor:
        """Estimate of the clean latents, as the host's samplers take it; arguments as for `forward`."""
        return self._call(self._shells[1], noisy, sigma, conditions, hint, strength)

    def _call(
        self, shell: Any, noisy: Tensor, sigma: Tensor, conditions: Sequence[Conditions], hint: Tensor, strength: float
    ) -> Tensor:
        options: dict[str, Any] = {"optimized_attention_override": plain_attention}
        if strength:
            alone = len(conditions) == 1  # all rows are of one time, and it is embedded once, as in inference
            timesteps = self.facts.row.encoder_time(shell.model_sampling, sigma[:1] if alone else sigma).float()
            self.control.join(options, tuple(noisy.shape), hint, timesteps, strength)
        rows = noisy.shape[0] // len(conditions)
        ready = [
            {name: cond.process_cond(batch_size=rows, device=noisy.device, area=None) for name, cond in one.items()}
            for one in conditions
        ]
        return shell.apply_model(noisy, sigma, transformer_options=options, **cond_cat(ready))

    def conditions(self, latent: Tensor, encoded: Mapping[str, Tensor], sizes: Sizes) -> Conditions:
        """The host's conditions of one sample.

        latent: (rows, C, H, W), for its shape; encoded: the tensors of the family's conditioning.
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
        }
        return self.base.extra_conds(**given, **host_arguments(encoded), **self.family.constants)

    def published_differences(self) -> dict[str, Tensor]:
        """Learned differences of the base's weights under published names, in fp32 on the CPU."""
        host = {name: t.cpu() for name, t in self.differences.tensors().items()}
        return published_names(host, self.key_map) if host else {}


def _shell(base: Any, unet: nn.Module, dtype: torch.dtype, device: torch.device, raw: bool = False) -> Any:
    """The host's BaseModel around another UNet. Everything shared with `base` is only read.

    Relies on these attributes of the host: the sub-modules `diffusion_model` and `model_sampling` by their names in
    `_modules`, and `manual_cast_dtype`, `device` and `current_patcher`, which `apply_model` and `extra_conds` read.
    """
    shell = copy.copy(base)
    shell._modules = dict(base._modules)
    shell._modules["diffusion_model"] = unet
    shell.__dict__["manual_cast_dtype"] = dtype
    shell.__dict__["device"] = device
    shell.__dict__["current_patcher"] = None
    if raw:
        del shell._modules["model_sampling"]
        shell.__dict__["model_sampling"] = _RawOutput(base.model_sampling)
    return shell

"""Checks of a run before samples are encoded: all that the configuration names exists and fits the base."""

from __future__ import annotations

from pathlib import Path

import torch
from comfy.model_patcher import ModelPatcher

from ...controlnext_core.comfy_adapter.bases.table import loaded_base
from ...controlnext_core.encodable import cut
from ..choices import XS
from ..config import ConfigError, TrainConfig
from ..optimizers import check_optimizer
from .controlled import check_fits, names_that_train
from .controls import new_control
from .encode import BaseWithEncoders, device_of_host


def check_before(base: BaseWithEncoders, config: TrainConfig) -> None:
    """Raise ConfigError, CheckpointError or ValueError for faults that a run would otherwise meet after hours of
    encoding.

    Checked are the control's family, the encoders, `trainable` with `blocks`, `init_control`, the optimizer and
    `compile`.
    """
    check_fits(base.model, config)
    base.check()
    base_trains = config.variant != XS and config.trainable != "none"
    rates = [config.control_learning_rate, *([config.learning_rate] if base_trains else [])]
    check_optimizer(config.optimizer, rates)
    _check_selection(base.model, config)
    _check_start(base.model, config)
    if config.compile:
        _check_compile(device_of_host())


def _check_selection(model: ModelPatcher, config: TrainConfig) -> None:
    if config.variant != XS:
        names_that_train(loaded_base(model.model), model.model.diffusion_model, config)


def _check_start(model: ModelPatcher, config: TrainConfig) -> None:
    """Read the control file of `init_control` into a control, which is dropped."""
    if not config.init_control:
        return
    if not Path(config.init_control).is_file():
        raise ConfigError(
            f"init_control: {config.init_control} is not a file. Set it to a control file, relative to the recipe's "
            "folder, or leave it empty to start from fresh weights."
        )
    new_control(config, loaded_base(model.model), torch.device("cpu"))


def _check_compile(device: torch.device) -> None:
    """Compile one line. Raises ConfigError where that fails."""
    try:
        torch.compile(lambda x: 2 * x + 1, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # torch, its backend and the compiler raise errors of many types
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(
            f"compile: torch.compile does not work here ({cut(reason)}). Install a C++ compiler, and triton for an "
            "NVIDIA GPU, or set compile = false."
        ) from error

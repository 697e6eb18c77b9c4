"""MODEL door: a control on every conditioning of a model, through the same engine as the CONTROL_NET door."""

from __future__ import annotations

from typing import Any

import torch
from comfy.controlnet import ControlBase
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ..bases.forward_options import TransformerOptions
from ..bases.table import loaded_base
from ..bases.tokens import note_reference
from ..feedback import warn_if_tiled
from .halves import add_places_wrapper
from .host_control import HostControl
from .next_forward import KEY
from .run_state import sigma_of


def attach(model: ModelPatcher, control: HostControl) -> ModelPatcher:
    """Clone `model` so that every forward of the clone gets this control; `model` itself is unchanged.

    control: with its hint set. Raises ValueError where control and model do not match.
    """
    control.check(loaded_base(model.model))
    controlled = model.clone()
    door = _Door(control)
    controlled.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, door.sample)
    controlled.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, door.prepare_sampling)
    controlled.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, door.apply_model)
    if control.extra_hooks is not None:
        add_places_wrapper(controlled)
    companions = controlled.get_additional_models_with_key(KEY)
    controlled.set_additional_models(KEY, [*companions, *control.get_models()])
    return controlled


class _WorkingMemory(ControlBase):
    """Placeholder in a conditioning for a control of a MODEL: the host counts its memory, but finds no network to load.

    The network is among the MODEL's additional models, which the host copies to further devices by itself.
    """

    def __init__(self, control: HostControl) -> None:
        super().__init__()
        self.control = control

    def inference_memory_requirements(self, dtype: torch.dtype) -> int:
        """Bytes of working memory, counted once for all devices."""
        return self.control.inference_memory_requirements(dtype)

    def deepclone_multigpu(self, load_device: torch.device, autoregister: bool = False) -> _WorkingMemory:
        """Copy for another device: the same object, since it holds no network."""
        return self


class _Door:
    """Wrappers that apply one control during sampling."""

    def __init__(self, control: HostControl) -> None:
        self.control = control
        self.memory = _WorkingMemory(control)
        self.size: tuple[int, ...] = ()
        """Height and width of the latent of this run; empty where unknown."""

    def control_beside(self, base: Any) -> HostControl:
        """Control for this base model: itself, or its copy for this run with the network of the same device.

        base: the model that a forward runs on. The host makes another one, with other additional models, for each
        device.
        """
        network = _same_network(getattr(base, "current_patcher", None), self.control.network)
        if network is None or network.model is self.control.network.model:
            return self.control
        clones = self.control.multigpu_clones
        if network.load_device not in clones:
            clones[network.load_device] = self.control.with_network(network)
        return clones[network.load_device]

    def sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """OUTER_SAMPLE wrapper: releases the control's run at the end, also after an exception."""
        try:
            return executor(*args, **kwargs)
        finally:
            self.control.cleanup()
            self.control.multigpu_clones.clear()

    def prepare_sampling(
        self, executor: Any, model: Any, noise_shape: Any, conds: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """PREPARE_SAMPLING wrapper: makes the host count this control's working memory like that of a conditioning's
        control.
        """
        self.size = tuple(noise_shape[-2:])
        counted = {**conds, KEY: [*conds.get(KEY, []), {"control": self.memory}]}
        real_model, _, models = executor(model, noise_shape, counted, *args, **kwargs)
        return real_model, conds, models

    def apply_model(
        self,
        executor: Any,
        x: Any,
        t: Any,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: TransformerOptions | None = None,
        **kwargs: Any,
    ) -> Any:
        """APPLY_MODEL wrapper: joins this forward, in a copy of its options."""
        base = executor.class_obj
        ours = self.control_beside(base)
        if ours.run is None:
            ours.pre_run(base, base.model_sampling.percent_to_sigma)
        options: TransformerOptions = {**(transformer_options or {})}
        note_reference(options, kwargs)
        if "tiled_diffusion" in getattr(getattr(base, "current_patcher", None), "model_options", {}):
            warn_if_tiled(ours.name, x.shape, self.size)
        ours.add_to(options, x, sigma_of(t, options), self)
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)


def _same_network(patcher: ModelPatcher | None, network: ModelPatcher) -> ModelPatcher | None:
    """Clone or copy of this network among a patcher's additional models; None without one."""
    beside = [] if patcher is None else patcher.get_additional_models_with_key(KEY)
    origin = getattr(network, "clone_base_uuid", None)  # hosts with one device do not have it
    for other in beside:
        if other.model is network.model or (origin is not None and other.clone_base_uuid == origin):
            return other
    return None

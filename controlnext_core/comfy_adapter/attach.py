"""The MODEL door: a control on every conditioning of a model, through the same engine as the CONTROL_NET door."""

from __future__ import annotations

from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from .base_facts import base_facts
from .collector import KEY
from .halves import add_places_wrapper
from .host_control import HostControl
from .run_state import sigma_of


def attach(model: ModelPatcher, control: HostControl) -> ModelPatcher:
    """A clone of `model` whose every forward gets this control; `model` itself is untouched.

    control: with its hint set. Raises ValueError where control and model do not go together.
    """
    control.check(base_facts(model.model))
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


class _Door:
    """Wrappers around one control."""

    def __init__(self, control: HostControl) -> None:
        self.control = control

    def sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """OUTER_SAMPLE: whatever happens inside, the control lets go of the run afterwards."""
        self.control.run = None
        try:
            return executor(*args, **kwargs)
        finally:
            self.control.cleanup()

    def prepare_sampling(
        self, executor: Any, model: Any, noise_shape: Any, conds: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """PREPARE_SAMPLING: the host counts this control's working memory as that of one on a conditioning."""
        counted = {**conds, KEY: [*conds.get(KEY, []), {"control": self.control}]}
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
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """APPLY_MODEL: join this forward, in options of its own."""
        if self.control.run is None:
            base = executor.class_obj
            self.control.pre_run(base, base.model_sampling.percent_to_sigma)
        options = dict(transformer_options or {})
        self.control.add_to(options, x, sigma_of(t, options))
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

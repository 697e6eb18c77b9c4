"""Small ControlNet-XS files, beside small UNets of the host's own class, for tests that drive one forward."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from comfyui_controlnext.controlnext_core import xs_convert, xs_specs
from comfyui_controlnext.models.controlnet_xs import ControlNetXS
from comfyui_controlnext.tests import reference_xs as reference
from torch import Tensor, nn

TEXT = 16
WIDTH = 32
LABELS = 24
BASE_HEADS = 4
TO_BASE = 0.3
"""Gain of what the base gets: strong, without driving random networks into chaos."""

SD_LIKE = {
    "model_channels": WIDTH,
    "channel_mult": (1, 2, 2, 2),
    "num_res_blocks": [2, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "use_linear_in_transformer": False,
}
"""12 encoder blocks."""
SDXL_LIKE = {
    "model_channels": WIDTH,
    "channel_mult": (1, 2, 2),
    "num_res_blocks": [2, 2, 2],
    "transformer_depth": [0, 0, 1, 1, 2, 2],
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
    "transformer_depth_middle": 2,
    "use_linear_in_transformer": True,
}
"""9 encoder blocks."""


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, biases and norms too, so that no term can hide behind a zero or a one."""
    generator = torch.Generator().manual_seed(seed)
    norms = {id(m.weight) for m in module.modules() if isinstance(m, (nn.GroupNorm, nn.LayerNorm))}
    with torch.no_grad():
        for parameter in module.parameters():
            numbers = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(numbers * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(0.1 * numbers + (1.0 if id(parameter) in norms else 0.0))
    return module


def host_unet(config: dict[str, Any], in_channels: int = 4, labels: bool = False, seed: int = 0) -> Any:
    """A UNet of the host, in fp32, with random weights."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    lists = {key: list(value) for key, value in config.items() if key.startswith("transformer_depth_output")}
    unet = UNetModel(
        image_size=8,
        in_channels=in_channels,
        out_channels=4,
        num_heads=BASE_HEADS,
        context_dim=TEXT,
        use_spatial_transformer=True,
        legacy=False,
        dtype=torch.float32,
        operations=comfy.ops.disable_weight_init,
        **{"num_classes": "sequential", "adm_in_channels": LABELS} if labels else {},
        **{**config, "transformer_depth": list(config["transformer_depth"]), **lists},
    )
    return randomise(unet.eval().requires_grad_(False), seed)


def shape_of(
    config: dict[str, Any], widths: tuple[int, ...], own_time: bool = False, text: int = TEXT
) -> xs_specs.XSShape:
    """A control stream with these widths beside a base."""
    return xs_specs.design({**config, "context_dim": text}, own_time=own_time, widths=widths)


def make_file(
    path: Path,
    shape: xs_specs.XSShape,
    heads: tuple[int, ...] = (2,),
    norm_rule: str = "official",
    layout: str = "xs_official",
    seed: int = 1,
) -> Path:
    """A random ControlNet-XS of this shape, saved with its heads and its norm rule."""
    numbers = xs_specs.heads_of(shape, heads, "test")
    net = randomise(ControlNetXS(xs_specs.build_config(shape, numbers, xs_specs.NORM_RULES[norm_rule])), seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "to_base" in name:
                parameter.mul_(TO_BASE)
    return xs_convert.write(path, net.state_dict(), shape, numbers, norm_rule, layout)


@dataclass
class Forward:
    """One forward of a UNet: the same inputs for the host with our patches and for the plain loop."""

    unet: Any
    config: dict[str, Any]
    x: Tensor
    t: Tensor
    context: Tensor
    y: Tensor | None

    @classmethod
    def make(
        cls, config: dict[str, Any], size: tuple[int, int] = (16, 16), rows: int = 2, labels: bool = False, **unet: Any
    ) -> Forward:
        g = torch.Generator().manual_seed(5)
        built = host_unet(config, labels=labels, **unet)
        return cls(
            built,
            {**config, "context_dim": TEXT},
            torch.randn(rows, built.in_channels, *size, generator=g),
            torch.full((rows,), 601.0),
            torch.randn(rows, 5, TEXT, generator=g),
            torch.randn(rows, LABELS, generator=g) if labels else None,
        )

    @property
    def base(self) -> Any:
        """Stand-in for the model that the host hands to `pre_run`; its sigmas are timesteps."""
        sampling = SimpleNamespace(timestep=lambda sigma: sigma, percent_to_sigma=lambda p: 1000.0 * (1 - p))
        return SimpleNamespace(
            diffusion_model=self.unet,
            model_config=SimpleNamespace(unet_config=self.config),
            model_sampling=sampling,
        )

    def options(self, *controls: Any, **options: Any) -> dict[str, Any]:
        """transformer_options with every control in them."""
        found = {"cond_or_uncond": [0], "sigmas": self.t[:1], **options}
        for control in controls:
            control.pre_run(self.base, self.base.model_sampling.percent_to_sigma)
            control.add_to(found, self.x, float(self.t[0]))
        return found

    def run(self, *controls: Any, **options: Any) -> Tensor:
        """The host's forward with these controls."""
        return self.unet(self.x, self.t, self.context, self.y, transformer_options=self.options(*controls, **options))

    def plain_loop(self, weights: dict[str, Tensor] | None, hint: Tensor, heads: int = 2, **settings: Any) -> Tensor:
        """The reference; weights of the control in the released names."""
        base = reference.Network(self.unet.state_dict(), heads=lambda inner: BASE_HEADS)
        control = None if weights is None else reference.Network(weights, heads=lambda inner: heads)
        return reference.forward(base, control, self.x, self.t, self.context, hint, y=self.y, **settings)


def hint_for(x: Tensor, count: int = 1, seed: int = 3) -> Tensor:
    """(count, 3, 8H, 8W) in [0, 1]."""
    size = (count, 3, 8 * x.shape[-2], 8 * x.shape[-1])
    return torch.rand(size, generator=torch.Generator().manual_seed(seed))

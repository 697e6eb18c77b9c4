"""A stock-style ControlNet in the trainer's loop: a trainable copy of the base's encoder behind zero convolutions.

The network is the host's own class, started from the base's weights as diffusers' `from_unet` does; what is new starts
at random but for the zero convolutions, of which the last of the hint's stem is one. Source: ControlNet (arXiv
2302.05543). The trainer does not know it: `train.train` is given `copy_of(base)` to make the control.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.cldm.cldm
import comfy.ops
import torch
from comfy.ldm.modules.attention import CrossAttention
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor, nn

from ..controlnext_core import checkpoint
from ..controlnext_core.comfy_adapter.bases.base import LoadedBase
from ..controlnext_core.comfy_adapter.bases.forward_options import TransformerOptions
from ..controlnext_training.base_model.controls import MakeControl
from ..controlnext_training.base_model.trainable_copy import plain_attention
from ..controlnext_training.config import TrainConfig
from ..controlnext_training.trainables import Differences
from .real_size import NOT_STOCK

KEY = "stock_copy"
COPIED = ("time_embed.", "label_emb.", "input_blocks.", "middle_block.")
"""Names that the copy and the base share."""


def copy_of(base: Any) -> MakeControl:
    """A function that makes the copy of this MODEL's encoder."""

    def make(config: TrainConfig, facts: LoadedBase, device: torch.device) -> StockCopy:
        return StockCopy(base, config.seed, device)

    return make


class StockCopy:
    """The control of `TrainedControl`; its residuals reach the base's UNet as the host's own do."""

    trains_base = False

    def __init__(self, base: Any, seed: int, device: torch.device) -> None:
        source = base.model.diffusion_model.state_dict()
        shape = {k: v for k, v in base.model.model_config.unet_config.items() if k not in NOT_STOCK}
        shape.pop("transformer_depth_output", None)  # of the decoder, which is not copied
        shape |= {"dtype": torch.float32, "device": "cpu", "operations": comfy.ops.manual_cast}
        self.net: nn.Module = comfy.cldm.cldm.ControlNet(**shape, hint_channels=3)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name, module in self.net.named_modules():
                if isinstance(module, nn.Conv2d) and not name.startswith(COPIED):
                    nn.Conv2d.reset_parameters(module)  # the host's layers start with whatever is in memory
            for module in (self.net.zero_convs, self.net.middle_block_out, self.net.input_hint_block[-1]):
                for parameter in module.parameters():
                    parameter.zero_()
            for name, parameter in self.net.named_parameters():
                if name.startswith(COPIED):
                    parameter.copy_(source[name].float())
        for module in self.net.modules():
            if isinstance(module, CrossAttention):
                module.register_forward_pre_hook(_attend_as_the_base, with_kwargs=True)
        self.net.to(device).train().requires_grad_(True)

    def join(
        self, options: TransformerOptions, latent: tuple[int, ...], hint: Tensor, timesteps: Tensor, strength: float
    ) -> None:
        def run(unet: Any, x: Tensor, t: Tensor, context: Tensor, y: Any, control: Any, *rest: Any, **more: Any) -> Any:
            found = self.net(x, hint.to(x.dtype), t, context, y=y)
            control = {part: [strength * residual for residual in found[part]] for part in ("middle", "output")}
            return unet(x, t, context, y, control, *rest, **more)

        add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, run, options, is_model_options=False)

    def save(
        self, stem: Path, differences: Differences, layout: str, dtype: torch.dtype, facts: Mapping[str, str]
    ) -> Path:
        """The host's names, as its own loader takes them. differences: none, since the base does not train."""
        path = stem.with_name(f"{stem.name}.safetensors")
        tensors = {name: tensor.detach().to("cpu", dtype) for name, tensor in self.net.state_dict().items()}
        checkpoint.save(path, tensors, facts)
        return path

    def check(self, header: checkpoint.Header) -> None:
        """A stock file needs none of this pack's loaders."""


def _attend_as_the_base(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """With the function that the trainer gives the base: others have another speed, and not all a gradient."""
    return given, {**named, "transformer_options": {"optimized_attention_override": plain_attention}}

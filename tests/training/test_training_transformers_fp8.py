"""Base in fp8, one byte per weight: the trained control equals that of the rounded weights in fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfyui_controlnext.tests.fixtures.narrow_training import base_on, config_for, scenes
from comfyui_controlnext.tests.fixtures.training_fixtures import loop_on, same, take_steps
from comfyui_controlnext.tests.fixtures.transformer_fixtures import narrow_model

pytestmark = pytest.mark.comfy

FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["sd3", "flux", "qwen_image", "z_image", "wan"])
def test_it_is_the_control_of_the_rounded_weights(family: str, checkpointing: bool) -> None:
    """Results are equal to the bit: widening fp8 does not round, and the products are the same."""
    rounded: Any = narrow_model.__wrapped__(family)  # one that no other test has
    stored_in_fp8 = narrow_model(family, FP8).diffusion_model.state_dict()
    rounded.diffusion_model.load_state_dict({name: tensor.float() for name, tensor in stored_in_fp8.items()})
    losses, weights, stored = [], [], []
    for model in (rounded, narrow_model(family, FP8)):
        loop = loop_on(base_on(model, family), config_for(family, checkpointing=checkpointing), scenes(4, family))
        losses.append(take_steps(loop, 3))
        weights.append(dict(loop.parameters))
        inside = loop.controlled.unet.named_parameters()
        stored.append({p.dtype for n, p in inside if n.endswith(("qkv.weight", "self_attn.q.weight"))})
    assert losses[0] == losses[1] and same(*weights)
    assert stored[1] <= {FP8 if checkpointing else torch.float32}

"""Other controls for the same transformers, of published size on `meta`: their work at every step.

The classes are the host's. The autoencoder's pass over their hints is not counted: it runs once per hint.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from .real_transformers import LATENT_CHANNELS, META, TransformerScene

RunOnce = Callable[[], Any]


class _Network:
    """Stand-in for the host's patcher of a network, and for the autoencoder, which is not called."""

    def __init__(self, model: Any = None) -> None:
        self.model = model

    def spacial_compression_encode(self) -> int:
        return 8


def _of_host(module: str, name: str) -> Any:
    """Class that newer hosts have; raises ImportError or AttributeError elsewhere."""
    return getattr(importlib.import_module(module), name)


def _settings(scene: TransformerScene) -> dict[str, Any]:
    import comfy.ops

    return {"dtype": scene.dtype, "device": META, "operations": comfy.ops.disable_weight_init}


def _config(scene: TransformerScene, **changes: Any) -> dict[str, Any]:
    left_out = ("image_model", "dtype")
    return {n: v for n, v in scene.model.model_config.unet_config.items() if n not in left_out} | changes


def _controlnet(scene: TransformerScene, network: Any) -> RunOnce:
    """Forward of the base, preceded by a ControlNet as the host runs it."""
    time, text, hint = torch.zeros(1, device=META), scene.tensor(*scene.row.text), scene.latent
    base = scene.forward()

    def run() -> Any:
        network(x=scene.latent, timesteps=time, context=text, hint=hint, **scene.conditions())
        return base()

    return run


def sd3_controlnet(scene: TransformerScene, blocks: int) -> RunOnce:
    from comfy.cldm.mmdit import ControlNet

    return _controlnet(scene, ControlNet(num_blocks=blocks, **_config(scene), **_settings(scene)))


def flux_union(scene: TransformerScene, double: int, single: int) -> RunOnce:
    from comfy.ldm.flux.controlnet import ControlNetFlux

    config = _config(scene, depth=double, depth_single_blocks=single)
    more = {"latent_input": True, "control_latent_channels": LATENT_CHANNELS}
    return _controlnet(scene, ControlNetFlux(**config, **more, **_settings(scene)))


def qwen_union(scene: TransformerScene, blocks: int) -> RunOnce:
    from comfy.ldm.qwen_image.controlnet import QwenImageControlNetModel

    return _controlnet(scene, QwenImageControlNetModel(**_config(scene, num_layers=blocks), **_settings(scene)))


def qwen_fun(scene: TransformerScene) -> RunOnce:
    kind = _of_host("comfy.ldm.qwen_image.controlnet", "QwenImageFunControlNetModel")
    network = kind(**_settings(scene))
    return _controlnet(scene, functools.partial(network, base_model=scene.model.diffusion_model))


def qwen_diffsynth(scene: TransformerScene) -> RunOnce:
    from comfy_extras.nodes_model_patch import DiffSynthCnetPatch, QwenImageBlockWiseControlNet

    with META:  # its norms get no device argument
        network = QwenImageBlockWiseControlNet(**_settings(scene)).to(scene.dtype)
    patch = DiffSynthCnetPatch.__new__(DiffSynthCnetPatch)
    tokens = (scene.side // 16) ** 2
    vars(patch).update(
        model_patch=_Network(network),
        vae=_Network(),
        strength=1.0,
        encoded_image=scene.tensor(tokens, scene.row.width),
        encoded_image_size=(scene.side, scene.side),
    )
    return scene.forward(options={"patches": {"double_block": [patch]}})


def z_fun(scene: TransformerScene, **config: Any) -> RunOnce:
    network = _of_host("comfy.ldm.lumina.controlnet", "ZImage_Control")(**config, **_settings(scene))
    channels, cells = LATENT_CHANNELS + config.get("additional_in_dim", 0), scene.side // 8
    kind = _of_host("comfy_extras.nodes_model_patch", "ZImageControlPatch")
    patch = kind.__new__(kind)
    vars(patch).update(
        model_patch=_Network(network),
        vae=_Network(),
        strength=1.0,
        encoded_image=scene.tensor(channels, cells, cells),
        encoded_image_size=(scene.side, scene.side),
        temp_data=None,
    )
    return scene.forward(options={"patches": {"double_block": [patch], "noise_refiner": [patch]}})


OTHERS: dict[str, dict[str, Callable[[TransformerScene], RunOnce]]] = {
    "SD3-medium": {"ControlNet, 12 of 24 blocks": functools.partial(sd3_controlnet, blocks=12)},
    "Flux.1": {
        "union, 5 + 10 blocks": functools.partial(flux_union, double=5, single=10),
        "union pro 2.0, 6 + 0 blocks": functools.partial(flux_union, double=6, single=0),
    },
    "Qwen-Image": {
        "union, 5 blocks": functools.partial(qwen_union, blocks=5),
        "DiffSynth block-wise": qwen_diffsynth,
        "Fun, 5 blocks": qwen_fun,
    },
    "Z-Image": {
        "Fun, 6 blocks": z_fun,
        "Fun 2.1, 15 + 2 blocks": functools.partial(
            z_fun, n_control_layers=15, additional_in_dim=17, refiner_control=True
        ),
    },
}
"""Size -> name of a control -> one forward with it; ImportError or AttributeError where the host lacks it."""

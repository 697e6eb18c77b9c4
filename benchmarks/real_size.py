"""Networks of real size, managed by the host, with random weights: parameters of one shape share one tensor.

Times and multiply-adds are those of the real networks; SDXL takes 0.8 GB instead of 10.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..controlnext_core import checkpoint
from ..controlnext_core.detection import read_control_file
from ..controlnext_core.specs import SPECS
from ..tools.tiny_models import LAYOUTS, RELEASED_XS, make_controlnext, unet_shapes, xs_shapes
from ..tools.tiny_models.layouts import UNetLayout
from ..tools.tiny_models.storage import random_tensor, save

UNETS: dict[str, UNetLayout] = {
    "sd15": LAYOUTS["sd15_full"],
    "sdxl": RELEASED_XS["sdxl_48m"].unet,
    "svd": replace(
        LAYOUTS["svd"],
        channel_mult=(1, 2, 4, 4),
        depth_out=(0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1),
    ),
}
XS = dict(RELEASED_XS)
"""Name of a released ControlNet-XS -> its size."""
FILES = {"gen1a": "sd15_legacy", "gen1a_norm": "sdxl_june", "gen1b": "sdxl_july", "gen1b_scale": "svd_v1"}
"""Build -> name of its published file in tools/tiny_models; the second generation has one for all."""
NOT_STOCK = ("out_channels", "use_temporal_resblock", "use_temporal_attention")


def shrink() -> None:
    """Replace the real networks by small ones of the same kinds, to check that a benchmark runs."""
    UNETS.update({name: LAYOUTS[name] for name in UNETS})
    for name, size in XS.items():
        unet = UNETS.get(name.partition("_")[0], size.unet)
        XS[name] = replace(size, unet=unet, widths=(32,) * len(unet.channel_mult))


def fits(name: str, small: bool) -> bool:
    """True: the networks have a site for that control.

    False: small networks lack that of a first-generation row of SPECS.
    """
    return not small or name not in SPECS or SPECS[name].build.startswith("gen2")


def share_weights(network: nn.Module, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Fill every parameter; those of one shape share one tensor. Norms only normalise."""
    shared: dict[tuple[Any, ...], nn.Parameter] = {}
    for module in network.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            key = (tuple(parameter.shape), name in ("weight", "scale"))
            if key not in shared:
                shared[key] = nn.Parameter(_numbers(*key, device).to(dtype), requires_grad=False)
            module._parameters[name] = shared[key]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta and torch.device(device).type != "meta":
                module._buffers[name] = _numbers(tuple(buffer.shape), False, device).to(dtype)


def _numbers(shape: tuple[int, ...], weight: bool, device: torch.device | str) -> Tensor:
    if len(shape) < 2:
        return torch.full(shape, float(weight), device=device)
    if torch.device(device).type == "meta":
        return torch.empty(shape, device=device)
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator) * torch.Size(shape[1:]).numel() ** -0.5


def make_unet(name: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """MODEL of that real UNet (a key of UNETS), in the form of the host's loaders. device: of the weights."""
    import comfy.model_detection
    import comfy.model_management
    import comfy.model_patcher

    shapes = unet_shapes(UNETS[name])
    names = {key: torch.empty(shape, dtype=dtype, device="meta") for key, shape in shapes.items()}
    config = comfy.model_detection.model_config_from_unet(names, "")
    config.set_inference_dtype(dtype, None)
    model = config.get_model(names, "", device="meta")
    share_weights(model.diffusion_model, dtype, device)
    model.device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def save_sd15(path: Path, dtype: torch.dtype) -> Path:
    """Save a random SD1.5 checkpoint of real size: UNet, autoencoder and text encoder.

    dtype: one of a single byte applies only to the UNet's matrices, the rest is then in fp16.
    """
    import comfy.sd1_clip
    from comfy.ldm.models.autoencoder import AutoencoderKL

    sizes = {"ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "in_channels": 3, "out_ch": 3, "z_channels": 4}
    more = {"double_z": True, "resolution": 256, "attn_resolutions": [], "dropout": 0.0}
    with torch.device("meta"):
        vae = AutoencoderKL(ddconfig={**sizes, **more}, embed_dim=4)
        text = comfy.sd1_clip.SDClipModel(device="meta", dtype=dtype)
    shapes = {f"model.diffusion_model.{name}": shape for name, shape in unet_shapes(UNETS["sd15"]).items()}
    shapes |= {f"first_stage_model.{name}": tuple(t.shape) for name, t in vae.state_dict().items()}
    for name, tensor in text.state_dict().items():
        if name.startswith("transformer.text_model."):
            shapes[f"cond_stage_model.{name}"] = tuple(tensor.shape)

    def of(name: str, shape: tuple[int, ...]) -> torch.dtype:
        narrow = name.startswith("model.") and len(shape) > 1
        return dtype if narrow or dtype.itemsize > 1 else torch.float16

    tensors = {name: _numbers(shape, name.endswith("weight"), "cpu") for name, shape in shapes.items()}
    return save(path, {name: tensor.to(of(name, tuple(tensor.shape))) for name, tensor in tensors.items()})


def make_control(variant: str, folder: Path, seed: int = 0, width: int | None = None) -> Any:
    """ControlNeXt of that row of SPECS, made through a file and the loader. width: output channels,
    None for the row's.
    """
    from ..controlnext_core.comfy_adapter.files.loading import load_control

    spec = SPECS[variant]
    path = folder / f"{variant}_{seed}.safetensors"
    make_controlnext(path, FILES.get(spec.build, "gen2"), seed=seed, out_channels=width)
    return load_control(read_control_file(checkpoint.peek(path)), spec.family, variant)


def make_xs(release: str, folder: Path) -> Any:
    """ControlNet-XS of a released size (a key of XS), made through a file and the loader."""
    from ..controlnext_core.comfy_adapter.files.xs_loading import load_controlnet_xs

    path = folder / f"{release}.safetensors"
    tensors = {}
    for name, shape in xs_shapes(XS[release]).items():
        if len(shape) < 2:
            tensors[name] = torch.full(shape, float(name.endswith("weight"))).half()
        else:
            tensors[name] = random_tensor(name, shape, torch.Size(shape[1:]).numel() ** -0.5, 0).half()
    return load_controlnet_xs(save(path, tensors)).control


def make_stock(unet: Any, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """Stock ControlNet for that MODEL: a copy of its encoder, in the host's class."""
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.model_management
    import comfy.ops

    config = {key: value for key, value in unet.model.model_config.unet_config.items() if key not in NOT_STOCK}
    config |= {"dtype": dtype, "device": "meta", "hint_channels": 3, "operations": comfy.ops.disable_weight_init}
    config.pop("transformer_depth_output", None)
    network = comfy.cldm.cldm.ControlNet(**config)
    share_weights(network, dtype, device)
    return comfy.controlnet.ControlNet(network, load_device=comfy.model_management.get_torch_device())

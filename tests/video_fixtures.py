"""A toy of Stable Video Diffusion, twice (the host's and diffusers', one set of weights), and sampling it in-process.

Three levels, temporal layers on, a tenth of the published width: one forward of 9 frames takes 0.1 s. The encoders
are the published ones at full size but for their last convolution, which has the toy's width at the site.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.tests import reference_controlnext as reference
from comfyui_controlnext.tests.sampling_fixtures import counted_passes
from torch import Tensor, nn

VARIANTS = ("svd_v1", "svd_v2", "svd_v2_padded")
WIDTH, MIDDLE_WIDTH, CONTEXT = 32, 64, 16
LEARNED_SCALE = 0.8
CELLS = 4
"""Side of the latents: pictures of 32 x 32, on which the encoders and all levels still work."""
HOST_CONFIG: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 8,
    "out_channels": 4,
    "model_channels": WIDTH,
    "num_res_blocks": [1, 1, 1],
    "channel_mult": [1, 2, 2],
    "transformer_depth": [1, 1, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 0, 0],
    "context_dim": CONTEXT,
    "adm_in_channels": 768,
    "num_classes": "sequential",
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "use_temporal_attention": True,
    "use_temporal_resblock": True,
    "extra_ff_mix_layer": True,
    "use_spatial_context": True,
    "video_kernel_size": [3, 1, 1],
    "merge_strategy": "learned_with_images",
    "merge_factor": 0.0,
    "disable_temporal_crossattention": False,
    "legacy": False,
    "dtype": torch.float32,
}
PUBLISHED_CONFIG: dict[str, Any] = {
    "block_out_channels": (WIDTH, MIDDLE_WIDTH, MIDDLE_WIDTH),
    "down_block_types": ("CrossAttnDownBlockSpatioTemporal",) * 2 + ("DownBlockSpatioTemporal",),
    "up_block_types": ("UpBlockSpatioTemporal",) + ("CrossAttnUpBlockSpatioTemporal",) * 2,
    "layers_per_block": 1,
    "cross_attention_dim": CONTEXT,
    "num_attention_heads": (2, 4, 4),  # heads of 16 channels
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 768,
}
HEAD_CHANNELS = 16


@dataclass(frozen=True)
class BothToys:
    """The toy twice, with the same weights."""

    host: Any
    """The host's BaseModel."""
    diffusers: nn.Module


@functools.cache
def base() -> BothToys:
    """diffusers' random weights with every bias, norm and mix moved, under our names in the host's model."""
    import comfy.model_base
    import comfy.supported_models
    from comfyui_controlnext.controlnext_core.key_maps import unet_key_map
    from diffusers import UNetSpatioTemporalConditionModel

    torch.manual_seed(0)
    theirs = UNetSpatioTemporalConditionModel(**PUBLISHED_CONFIG).eval().requires_grad_(False)
    for parameter in theirs.parameters():
        parameter.add_(0.03 * torch.randn_like(parameter))
    config = comfy.supported_models.SVD_img2vid(HOST_CONFIG)
    config.unet_config["num_head_channels"] = HEAD_CHANNELS
    host = comfy.model_base.SVD_img2vid(config)
    names = unet_key_map(HOST_CONFIG)  # checked elsewhere, name by name
    host.diffusion_model.load_state_dict({names[n]: t.clone() for n, t in theirs.state_dict().items()}, strict=True)
    for name, module in theirs.named_modules():
        if isinstance(module, nn.GroupNorm):  # diffusers' have another eps in some blocks: 4e-5 of the output
            module.eps = host.diffusion_model.get_submodule(names[f"{name}.weight"].removesuffix(".weight")).eps
    return BothToys(host.eval().requires_grad_(False), theirs)


def patcher_of(network: Any) -> Any:
    """A ModelPatcher around a model of the host, or around a network."""
    import comfy.model_patcher

    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(network, load_device=cpu, offload_device=cpu)


_patcher = functools.cache(lambda: patcher_of(base().host))


def toy_patcher() -> Any:
    """The toy as a MODEL."""
    return _patcher().clone()


def out_channels(name: str) -> int:
    return MIDDLE_WIDTH if reference.VARIANTS[name].site == "before middle" else WIDTH


@functools.cache
def encoder_weights(name: str) -> dict[str, Tensor]:
    """The encoder of a variant, as a file holds it."""
    return reference.random_weights(
        reference.VARIANTS[name].build, seed=11, out=out_channels(name), scale=LEARNED_SCALE
    )


@functools.cache
def control_file(name: str) -> Path:
    """The file of `encoder_weights`; it says nothing of the variant."""
    from comfyui_controlnext.controlnext_core import checkpoint

    folder = Path(tempfile.mkdtemp(prefix="controlnext-video-"))
    return checkpoint.save(folder / f"{name}.safetensors", encoder_weights(name), {})


@functools.cache
def control(name: str) -> Any:
    """The variant as a CONTROL_NET: file, detection, loader."""
    from comfyui_controlnext.controlnext_core import checkpoint
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.loading import load_control
    from comfyui_controlnext.controlnext_core.detection import read_control_file
    from comfyui_controlnext.controlnext_core.specs import Family

    file = read_control_file(checkpoint.peek(control_file(name)))
    loaded = load_control(file, Family.SVD, "auto" if name != "svd_v2_padded" else name)
    assert loaded.net.spec.name == name
    return loaded


def hints(count: int, cells: tuple[int, int] = (CELLS, CELLS), seed: int = 3) -> Tensor:
    """One picture per frame as an IMAGE, (count, H, W, 3): coarse random shapes, no two alike."""
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    size = (8 * cells[0], 8 * cells[1])
    return torch.nn.functional.interpolate(coarse, size=size, mode="bilinear").movedim(1, -1).contiguous()


def conditioning(
    images: int = 1, cells: tuple[int, int] = (CELLS, CELLS), seed: int = 5
) -> tuple[list[Any], list[Any]]:
    """(positive, negative) as SVD_img2vid_Conditioning gives them. images: latents of the start image, 1 or frames."""
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(1, 1, CONTEXT, generator=generator)
    latent = torch.randn(images, 4, *cells, generator=generator)
    common = {"motion_bucket_id": 127, "fps": 6, "augmentation_level": 0.0}
    return (
        [[pooled, {**common, "concat_latent_image": latent}]],
        [[torch.zeros_like(pooled), {**common, "concat_latent_image": torch.zeros_like(latent)}]],
    )


def sample(
    model: Any,
    frames: int,
    steps: int = 2,
    conds: Any = None,
    cfg: float = 2.5,
    sampler: str = "euler",
    seed: int = 1,
    cells: tuple[int, int] = (CELLS, CELLS),
) -> Tensor:
    """The stock KSampler on a video: latents (frames, 4, h, w)."""
    import nodes as host_nodes

    positive, negative = conds or conditioning()
    latent = {"samples": torch.zeros(frames, 4, *cells)}
    (result,) = host_nodes.KSampler().sample(model, seed, steps, cfg, sampler, "karras", positive, negative, latent)
    return result["samples"]


def windowed(
    model: Any,
    length: int = 4,
    overlap: int = 1,
    schedule: str = "standard_static",
    fuse: str = "flat",
    repeat_first_hint: bool = False,
) -> Any:
    """The node ControlNeXtVideoWindows: a MODEL."""
    from comfyui_controlnext.nodes.video import ControlNeXtVideoWindows

    return ControlNeXtVideoWindows.execute(model, length, overlap, schedule, fuse, repeat_first_hint)[0]


def controlled(model: Any, name: str, images: Tensor, strength: float = 1.0, **options: Any) -> Any:
    """The node ControlNeXtApply: a MODEL."""
    from comfyui_controlnext.nodes.apply import ControlNeXtApply

    return ControlNeXtApply.execute(model, options.get("control") or control(name), images, strength, 0.0, 1.0)[0]


def stock_apply(conds: Any, name: str, images: Tensor, strength: float = 1.0, **options: Any) -> Any:
    """The stock Apply node on both halves: (positive, negative)."""
    import nodes as host_nodes

    node = host_nodes.ControlNetApplyAdvanced()
    return node.apply_controlnet(*conds, options.get("control") or control(name), images, strength, 0.0, 1.0)


def recorded_outputs(model: Any, run: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Result of `run`, and the UNet's output in each forward."""
    outputs: list[Tensor] = []
    unet = model.model.diffusion_model
    handle = unet.register_forward_hook(lambda _, inputs, output: outputs.append(output.detach().clone()))
    try:
        return run(), outputs
    finally:
        handle.remove()


@contextmanager
def seen_hints() -> Iterator[list[dict[str, Any]]]:
    """One entry per forward: the frames of its window, and the hint that each of them gets."""
    from comfyui_controlnext.controlnext_core.comfy_adapter.sampling.next_control import ControlNeXtControl

    seen: list[dict[str, Any]] = []
    term = ControlNeXtControl.term
    features = ControlNeXtControl.features

    def record_window(self: Any, h: Tensor, transformer_options: dict[str, Any], **more: Any) -> Any:
        window = transformer_options.get("context_window")
        seen.append({"frames": list(window.index_list) if window else None, "sigma": more["sigma"]})
        return term(self, h, transformer_options, **more)

    def record_rows(self: Any, rows: tuple[int, ...], *args: Any) -> Tensor:
        seen[-1]["hints"] = list(rows)
        return features(self, rows, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ControlNeXtControl, "term", record_window)
        patch.setattr(ControlNeXtControl, "features", record_rows)
        yield seen


def encoded_frames(name: str) -> AbstractContextManager[list[int]]:
    """Rows of every pass of the encoder."""
    return counted_passes(control(name).net.patcher.model)


@contextmanager
def seen_windows(model: Any) -> Iterator[list[list[int]]]:
    """Frames of every window that the model's handler makes, in order."""
    windows: list[list[int]] = []
    handler = type(model.model_options["context_handler"])
    get = handler.get_context_windows

    def note(self: Any, *args: Any) -> Any:
        made = get(self, *args)
        windows.extend(list(window.index_list) for window in made)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handler, "get_context_windows", note)
        yield windows


def one_run() -> Iterator[None]:
    """One run of the host, in inference mode, with nothing cached, as an autouse fixture of these tests makes it."""
    from comfyui_controlnext.controlnext_core.comfy_adapter.sampling.features import CACHE

    CACHE.clear()
    with torch.inference_mode():
        yield
    CACHE.clear()

"""Key maps against the published classes (diffusers) and the host's network, built without weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from comfyui_controlnext.controlnext_core.checkpoint import CheckpointError
from comfyui_controlnext.controlnext_core.key_maps import (
    PUBLISHED_PREFIXES,
    Target,
    mmdit_key_map,
    strip_prefix,
    unet_key_map,
)
from comfyui_controlnext.controlnext_core.unet_weights import WeightsKind, host_differences
from torch import Tensor, nn

Config = dict[str, Any]
Build = Callable[..., nn.Module]


def unet(resnets: list[int], mult: list[int], down: list[int], middle: int, up: list[int], **more: Any) -> Config:
    """Configuration of a UNet in the host's form, as its model detection writes it."""
    config = {"in_channels": 4, "out_channels": 4, "model_channels": 32, "context_dim": 16, "adm_in_channels": None}
    shape = {"num_res_blocks": resnets, "channel_mult": mult, "transformer_depth": down}
    depths = {"transformer_depth_middle": middle, "transformer_depth_output": up}
    return config | shape | depths | {"use_temporal_attention": False, "use_temporal_resblock": False} | more


def video(**more: Any) -> Config:
    """Settings that the host's detection adds for SVD."""
    flags = {"use_temporal_resblock": True, "use_temporal_attention": True, "use_linear_in_transformer": True}
    mixing = {"extra_ff_mix_layer": True, "use_spatial_context": True, "video_kernel_size": [3, 1, 1]}
    merge = {"merge_strategy": "learned_with_images", "merge_factor": 0.0, "disable_temporal_crossattention": False}
    return flags | mixing | merge | {"num_classes": "sequential"} | more


def published(transformers: str, widths: tuple[int, ...], kind: str = "2D", **more: Any) -> Config:
    """Published configuration. transformers: y or n for each level, from the highest resolution down."""
    down = tuple(f"{'CrossAttn' * (level == 'y')}DownBlock{kind}" for level in transformers)
    up = tuple(name.replace("Down", "Up") for name in reversed(down))
    return {"block_out_channels": widths, "down_block_types": down, "up_block_types": up, **more}


XL = {"num_classes": "sequential", "use_linear_in_transformer": True}
XL_PUBLISHED = {"addition_embed_type": "text_time", "use_linear_projection": True}
SIZE = {"addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816, "cross_attention_dim": 2048}

SD15 = unet([2] * 4, [1, 2, 4, 4], [1] * 6 + [0] * 2, 1, [1] * 9 + [0] * 3, context_dim=768, num_heads=8)
SDXL = unet([2] * 3, [1, 2, 4], [0, 0, 2, 2, 10, 10], 10, [0] * 3 + [2] * 3 + [10] * 3, num_head_channels=64, **XL)
SD15 |= {"model_channels": 320}
SDXL |= {"model_channels": 320, "context_dim": 2048, "adm_in_channels": 2816}
SVD = SD15 | video(in_channels=8, context_dim=1024, num_heads=-1, num_head_channels=64, adm_in_channels=768)
SDXL_PUBLISHED = published("nyy", (320, 640, 1280), transformer_layers_per_block=(1, 2, 10), **XL_PUBLISHED, **SIZE)
SDXL_PUBLISHED |= {"attention_head_dim": (5, 10, 20)}

# tiny networks that run on a CPU in a moment
SIDES = (32, 64)
TINY = {"addition_time_embed_dim": 8, "cross_attention_dim": 16}
TINY_SD15 = unet([1, 1], [1, 2], [1, 0], 1, [1, 1, 0, 0], num_heads=2)
TINY_SDXL = unet([2, 2], [1, 2], [0, 0, 2, 2], 2, [0, 0, 0, 2, 2, 2], num_head_channels=16, adm_in_channels=72, **XL)
TINY_SVD = TINY_SD15 | video(in_channels=8, adm_in_channels=24, num_heads=-1, num_head_channels=16)
TINY_SD15_PUBLISHED = published("yn", SIDES, layers_per_block=1, attention_head_dim=2, **TINY)
TINY_SDXL_PUBLISHED = published("ny", SIDES, attention_head_dim=(2, 4), **XL_PUBLISHED, **TINY)
TINY_SDXL_PUBLISHED |= {"transformer_layers_per_block": (1, 2), "projection_class_embeddings_input_dim": 72}
TINY_SVD_PUBLISHED = published("yn", SIDES, "SpatioTemporal", layers_per_block=1, num_attention_heads=(2, 4), **TINY)
TINY_SVD_PUBLISHED |= {"projection_class_embeddings_input_dim": 24, "num_frames": 3}

IMAGE, VIDEO = "UNet2DConditionModel", "UNetSpatioTemporalConditionModel"
ONE_RESNET, NO_MIDDLE = {"mid_block_type": "UNetMidBlock2D"}, {"mid_block_type": None}
PAIRS = {
    "sd15": (SD15, IMAGE, {"cross_attention_dim": 768, "attention_head_dim": 8}, 686),
    "sdxl": (SDXL, IMAGE, SDXL_PUBLISHED, 1680),
    "svd": (SVD, VIDEO, {}, 1428),
    "tiny_sd15": (TINY_SD15, IMAGE, TINY_SD15_PUBLISHED, None),
    "tiny_sdxl": (TINY_SDXL, IMAGE, TINY_SDXL_PUBLISHED, None),
    "tiny_svd": (TINY_SVD, VIDEO, TINY_SVD_PUBLISHED, None),
    "one_resnet": (TINY_SD15 | {"transformer_depth_middle": -1}, IMAGE, TINY_SD15_PUBLISHED | ONE_RESNET, None),
    "no_middle": (TINY_SD15 | {"transformer_depth_middle": -2}, IMAGE, TINY_SD15_PUBLISHED | NO_MIDDLE, None),
}


@pytest.fixture(scope="module")
def diffusers() -> ModuleType:
    """Published classes, the independent reference."""
    return importlib.import_module("diffusers")


@pytest.fixture(scope="module")
def build_unet() -> Build:
    """Build the host's UNet for a configuration."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    def build(config: Config, device: str = "meta") -> nn.Module:
        fixed = {"image_size": 32, "use_spatial_transformer": True, "legacy": False, "dtype": torch.float32}
        return UNetModel(**config, **fixed, device=device, operations=comfy.ops.disable_weight_init).eval()

    return build


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.comfy
@pytest.mark.parametrize(("config", "kind", "published_config", "count"), PAIRS.values(), ids=PAIRS)
def test_map_pairs_every_published_name_with_a_host_name_of_its_shape(
    config: Config, kind: str, published_config: Config, count: int | None, diffusers: ModuleType, build_unet: Build
) -> None:
    with torch.device("meta"):
        theirs = shapes(getattr(diffusers, kind)(**published_config))
    hosts, names = shapes(build_unet(config)), unet_key_map(config)
    assert names.keys() == theirs.keys()
    assert set(names.values()) == hosts.keys() and len(set(names.values())) == len(names)
    assert {name: hosts[names[name]] for name in names} == theirs
    assert count is None or len(names) == count


# what no published class builds, against the host alone: uneven levels, transformers in some resnets only
HOST_ONLY = {
    "uneven_resnets": unet([1, 3, 2], [1, 2, 2], [1, 0, 1, 2, 0, 1], 0, [1, 0, 0, 1, 0, 2, 1, 1, 0], num_heads=2),
    "one_level": unet([2], [1], [1, 1], 1, [1, 1, 1], num_heads=2),
    "narrowing": unet([1, 1], [3, 1], [1, 1], 1, [1, 1, 1, 1], num_heads=2),
    "ssd_1b": unet([2] * 3, [1, 2, 4], [0, 0, 2, 2, 4, 4], -1, [0, 0, 0, 1, 1, 2, 10, 4, 4], num_head_channels=16),
    "no_cross_attention_in_time": TINY_SVD | {"disable_temporal_crossattention": True},
}


@pytest.mark.comfy
@pytest.mark.parametrize("config", HOST_ONLY.values(), ids=HOST_ONLY)
def test_map_reaches_every_tensor_of_the_host_once(config: Config, build_unet: Build) -> None:
    values = list(unet_key_map(config).values())
    assert set(values) == shapes(build_unet(config)).keys() and len(set(values)) == len(values)


@pytest.mark.comfy
@pytest.mark.parametrize("config", [SD15, SDXL, TINY_SD15, TINY_SDXL], ids=["sd15", "sdxl", "tiny_sd15", "tiny_sdxl"])
def test_map_agrees_with_the_hosts_own(config: Config) -> None:
    from comfy.utils import unet_to_diffusers

    theirs = unet_to_diffusers(config)
    assert {name: theirs.get(name) for name in unet_key_map(config)} == unet_key_map(config)


@pytest.mark.parametrize("config", [{}, {"depth": 24}, {**SD15, "transformer_depth_middle": None}])
def test_no_unet_is_refused_with_what_it_lacks(config: Config) -> None:
    with pytest.raises(ValueError, match=r"lacks .*transformer_depth_middle.* Connect an SD1.5, SDXL or SVD model"):
        unet_key_map(config)


def test_depths_that_do_not_fit_the_levels_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"\(4, 7, 12\) entries, expected \(4, 8, 12\) for channel_mult \[1, 2, 4, 4\]"
    ):
        unet_key_map(SD15 | {"transformer_depth": [1] * 7})


# values: the same random weights on both sides must give the same output


def randomised(module: nn.Module) -> nn.Module:
    """Randomise every parameter (none left at 0 or 1), scaled to hold activations near 1."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = noise / fan_in**0.5 + (1.0 if parameter.ndim == 1 else 0.0)
    return module.eval()


def converted(original: nn.Module, config: Config, build_unet: Build) -> nn.Module:
    names = unet_key_map(config)
    network = build_unet(config, device="cpu")
    network.load_state_dict({names[name]: t for name, t in original.state_dict().items()}, strict=True)
    return network


@pytest.fixture
def inputs() -> SimpleNamespace:
    """Inputs: six latents (two videos of three frames) of 16 x 16, their contexts and vector conditions."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    timestep = torch.tensor([601.0] * 6)
    return SimpleNamespace(x=noise(6, 8, 16, 16), context=noise(6, 5, 16), timestep=timestep, pooled=noise(6, 24))


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Assert equality within 1e-4 of the output's size: both sum the same numbers in another order."""
    assert found.shape == expected.shape and expected.std() > 1e-2
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.comfy
def test_sd15_weights_act_the_same_in_the_host(
    diffusers: ModuleType, build_unet: Build, inputs: SimpleNamespace
) -> None:
    original = randomised(diffusers.UNet2DConditionModel(**TINY_SD15_PUBLISHED))
    network, x = converted(original, TINY_SD15, build_unet), inputs.x[:, :4]
    expected = original(x, inputs.timestep, inputs.context).sample
    assert_same(network(x, inputs.timestep, inputs.context), expected)


@pytest.mark.comfy
def test_sdxl_weights_act_the_same_in_the_host(
    diffusers: ModuleType, build_unet: Build, inputs: SimpleNamespace
) -> None:
    original = randomised(diffusers.UNet2DConditionModel(**TINY_SDXL_PUBLISHED))
    network, x = converted(original, TINY_SDXL, build_unet), inputs.x[:, :4]
    time_ids = torch.arange(36.0).reshape(6, 6)
    added = {"text_embeds": inputs.pooled, "time_ids": time_ids}
    expected = original(x, inputs.timestep, inputs.context, added_cond_kwargs=added).sample
    y = torch.cat([inputs.pooled, original.add_time_proj(time_ids.flatten()).reshape(6, 48)], 1)
    assert_same(network(x, inputs.timestep, inputs.context, y=y), expected)


@pytest.mark.comfy
def test_svd_weights_act_the_same_in_the_host(
    diffusers: ModuleType, build_unet: Build, inputs: SimpleNamespace
) -> None:
    original = randomised(diffusers.UNetSpatioTemporalConditionModel(**TINY_SVD_PUBLISHED))
    network = converted(original, TINY_SVD, build_unet)
    context = inputs.context[::3, :1]
    ids = torch.tensor([[6.0, 127.0, 0.02], [7.0, 30.0, 0.1]])
    videos = inputs.x.reshape(2, 3, 8, 16, 16)
    expected = original(videos, torch.tensor(0.4), context, added_time_ids=ids).sample.flatten(0, 1)
    y = original.add_time_proj(ids.flatten()).reshape(2, 24).repeat_interleave(3, 0)
    found = network(inputs.x, torch.full((6,), 0.4), context.repeat_interleave(3, 0), y=y, num_video_frames=3)
    assert_same(found, expected)


# SD3: width, blocks, and what SD3.5 adds

QK_NORM, DUAL = {"qk_norm": "rms_norm"}, tuple(range(13))
MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "joint_attention_dim": 4096}
MEDIUM |= {"pooled_projection_dim": 2048, "pos_embed_max_size": 192}
TINY_MEDIUM = {"num_layers": 3, "num_attention_heads": 2, "caption_projection_dim": 128, "joint_attention_dim": 32}
TINY_MEDIUM |= {"pooled_projection_dim": 24, "pos_embed_max_size": 12, "sample_size": 16}
TRANSFORMERS = {
    "sd3_medium": (MEDIUM, {"depth": 24}, 683),
    "sd35_medium": (
        MEDIUM | QK_NORM | {"dual_attention_layers": DUAL},
        {"depth": 24, "qk_norm": True, "dual_attention": DUAL},
        None,
    ),
    "tiny_with_more_blocks_than_heads": (TINY_MEDIUM | QK_NORM, {"depth": 2, "num_blocks": 3, "qk_norm": True}, None),
}


def host_mmdit(config: Config, sizes: Config, device: str = "meta") -> nn.Module:
    """SD3 transformer of the host with the sizes of a published configuration."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    side = sizes["pos_embed_max_size"]
    params = {"in_features": sizes["joint_attention_dim"], "out_features": sizes["caption_projection_dim"]}
    more = {"qk_norm": "rms" if config.get("qk_norm") else None, "num_patches": side**2, "pos_embed_max_size": side}
    network = OpenAISignatureMMDITWrapper(
        input_size=None,
        in_channels=16,
        depth=config["depth"],
        num_blocks=config.get("num_blocks"),
        x_block_self_attn_layers=list(config.get("dual_attention", ())),
        adm_in_channels=sizes["pooled_projection_dim"],
        context_embedder_config={"target": "torch.nn.Linear", "params": params},
        dtype=torch.float32,
        device=device,
        operations=comfy.ops.disable_weight_init,
        **more,
    )
    return network.eval()


@pytest.mark.comfy
@pytest.mark.parametrize(("sizes", "config", "count"), TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_sd3_map_fills_every_host_tensor_with_published_ones(
    sizes: Config, config: Config, count: int | None, diffusers: ModuleType
) -> None:
    with torch.device("meta"):
        theirs = shapes(diffusers.SD3Transformer2DModel(in_channels=16, **sizes))
    hosts, targets = shapes(host_mmdit(config, sizes)), mmdit_key_map(**config)
    assert targets.keys() == theirs.keys() and count in (None, len(targets))
    filled: dict[str, int] = {}
    for name, target in targets.items():
        rows = hosts[target.name][0] if target.slice is None else target.slice[2]
        assert theirs[name] == (rows, *hosts[target.name][1:]), name
        filled[target.name] = filled.get(target.name, 0) + rows
    assert filled == {name: shape[0] for name, shape in hosts.items()}


@pytest.mark.comfy
@pytest.mark.parametrize("config", [{"depth": 24}, TRANSFORMERS["sd35_medium"][1]], ids=["sd3_medium", "sd35_medium"])
def test_sd3_map_agrees_with_the_hosts_own(config: Config) -> None:
    from comfy.utils import mmdit_to_diffusers

    theirs, special = mmdit_to_diffusers(config), 0
    for name, target in mmdit_key_map(**config).items():
        entry = theirs[name] if isinstance(theirs[name], tuple) else (theirs[name],)
        assert target == Target(entry[0], *entry[1:2], swap_halves=len(entry) > 2), name
        special += len(entry) > 1
    assert special == 292 or len(config) > 1


@pytest.mark.comfy
def test_sd3_weights_act_the_same_in_the_host(diffusers: ModuleType, inputs: SimpleNamespace) -> None:
    original = randomised(diffusers.SD3Transformer2DModel(in_channels=16, **TINY_MEDIUM | QK_NORM))
    config = {"depth": 2, "num_blocks": 3, "qk_norm": True}
    network, file = host_mmdit(config, TINY_MEDIUM, "cpu"), original.state_dict()
    zeros = {f"diffusion_model.{name}": torch.zeros_like(t) for name, t in network.state_dict().items()}
    found = host_differences(file, mmdit_key_map(**config), zeros.get, WeightsKind.DIFFERENCE)
    network.load_state_dict({name.removeprefix("diffusion_model."): t for name, t in found.items()}, strict=True)
    x, context = inputs.x.reshape(3, 16, 16, 16), inputs.context.reshape(3, 5, 32)
    expected = original(x, context, inputs.pooled[:3], inputs.timestep[:3]).sample
    assert_same(network(x, inputs.timestep[:3], context, y=inputs.pooled[:3]), expected)


# names of a file

BARE = ["down_blocks.0.resnets.0.conv1.weight", "conv_in.bias"]


@pytest.mark.parametrize("prefix", ["", *PUBLISHED_PREFIXES, "module.unet.", "module.model.diffusion_model."])
def test_outer_prefixes_are_stripped(prefix: str) -> None:
    assert strip_prefix(prefix + name for name in BARE) == {prefix + name: name for name in BARE}


@pytest.mark.parametrize("names", [[*BARE, "unet.conv_in.weight"], ["module.unet.a", "module.b"]])
def test_a_prefix_on_some_names_only_is_refused_and_named(names: list[str]) -> None:
    with pytest.raises(
        CheckpointError, match=r"^cat\.bin: some names begin with 'unet\.', \d do not: .*save each part"
    ):
        strip_prefix(names, source="cat.bin")

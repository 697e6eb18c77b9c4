"""Names against both sides: the published classes (diffusers) and the host's own network, built without weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
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
from torch import Tensor, nn

Config = dict[str, Any]

CROSS, PLAIN, UP_CROSS, UP_PLAIN = "CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"
VIDEO_CROSS, VIDEO_PLAIN = "CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"
VIDEO_UP_CROSS, VIDEO_UP_PLAIN = "CrossAttnUpBlockSpatioTemporal", "UpBlockSpatioTemporal"


def unet(resnets: list[int], mult: list[int], down: list[int], middle: int, up: list[int], **more: Any) -> Config:
    """The host's configuration of a UNet, as its model detection writes it."""
    config = {"in_channels": 4, "out_channels": 4, "model_channels": 32, "context_dim": 16, "adm_in_channels": None}
    shape = {"num_res_blocks": resnets, "channel_mult": mult, "transformer_depth": down}
    depths = {"transformer_depth_middle": middle, "transformer_depth_output": up}
    return config | shape | depths | {"use_temporal_attention": False, "use_temporal_resblock": False} | more


def video(**more: Any) -> Config:
    """What the host's detection adds for SVD."""
    flags = {"use_temporal_resblock": True, "use_temporal_attention": True, "use_linear_in_transformer": True}
    mixing = {"extra_ff_mix_layer": True, "use_spatial_context": True, "video_kernel_size": [3, 1, 1]}
    merge = {"merge_strategy": "learned_with_images", "merge_factor": 0.0, "disable_temporal_crossattention": False}
    return flags | mixing | merge | {"num_classes": "sequential"} | more


FOUR, SIDE = [1, 2, 4, 4], {"model_channels": 320}
SD15 = unet([2] * 4, FOUR, [1] * 6 + [0] * 2, 1, [1] * 9 + [0] * 3, context_dim=768, num_heads=8, **SIDE)
SDXL = unet(
    [2] * 3,
    [1, 2, 4],
    [0, 0, 2, 2, 10, 10],
    10,
    [0, 0, 0, 2, 2, 2, 10, 10, 10],
    context_dim=2048,
    num_head_channels=64,
    adm_in_channels=2816,
    num_classes="sequential",
    use_linear_in_transformer=True,
    **SIDE,
)
SVD = SD15 | video(in_channels=8, context_dim=1024, num_heads=-1, num_head_channels=64, adm_in_channels=768)

SD15_PUBLISHED = {"cross_attention_dim": 768, "attention_head_dim": 8}
SDXL_PUBLISHED = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": (PLAIN, CROSS, CROSS),
    "up_block_types": (UP_CROSS, UP_CROSS, UP_PLAIN),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}

# tiny networks that run on a CPU in a moment: the host's configuration and the published one
TINY_SD15 = unet([1, 1], [1, 2], [1, 0], 1, [1, 1, 0, 0], num_heads=2)
TINY_SD15_PUBLISHED = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": (CROSS, PLAIN),
    "up_block_types": (UP_PLAIN, UP_CROSS),
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
}
TINY_SDXL = unet(
    [2, 2],
    [1, 2],
    [0, 0, 2, 2],
    2,
    [0, 0, 0, 2, 2, 2],
    num_head_channels=16,
    adm_in_channels=72,
    num_classes="sequential",
    use_linear_in_transformer=True,
)
TINY_SDXL_PUBLISHED = {
    "block_out_channels": (32, 64),
    "layers_per_block": 2,
    "down_block_types": (PLAIN, CROSS),
    "up_block_types": (UP_CROSS, UP_PLAIN),
    "transformer_layers_per_block": (1, 2),
    "cross_attention_dim": 16,
    "attention_head_dim": (2, 4),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 72,
    "use_linear_projection": True,
}
TINY_SVD = TINY_SD15 | video(in_channels=8, adm_in_channels=24, num_heads=-1, num_head_channels=16)
TINY_SVD_PUBLISHED = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": (VIDEO_CROSS, VIDEO_PLAIN),
    "up_block_types": (VIDEO_UP_PLAIN, VIDEO_UP_CROSS),
    "cross_attention_dim": 16,
    "num_attention_heads": (2, 4),
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24,
    "num_frames": 3,
}
IMAGE, VIDEO = "UNet2DConditionModel", "UNetSpatioTemporalConditionModel"
PAIRS = [
    pytest.param(SD15, IMAGE, SD15_PUBLISHED, 686, id="sd15"),
    pytest.param(SDXL, IMAGE, SDXL_PUBLISHED, 1680, id="sdxl"),
    pytest.param(SVD, VIDEO, {}, 1428, id="svd"),
    pytest.param(TINY_SD15, IMAGE, TINY_SD15_PUBLISHED, None, id="tiny_sd15"),
    pytest.param(TINY_SDXL, IMAGE, TINY_SDXL_PUBLISHED, None, id="tiny_sdxl"),
    pytest.param(TINY_SVD, VIDEO, TINY_SVD_PUBLISHED, None, id="tiny_svd"),
    pytest.param(
        TINY_SD15 | {"transformer_depth_middle": -1},
        IMAGE,
        TINY_SD15_PUBLISHED | {"mid_block_type": "UNetMidBlock2D"},
        None,
        id="middle_of_one_resnet",
    ),
    pytest.param(
        TINY_SD15 | {"transformer_depth_middle": -2},
        IMAGE,
        TINY_SD15_PUBLISHED | {"mid_block_type": None},
        None,
        id="no_middle",
    ),
]


@pytest.fixture(scope="module")
def diffusers() -> ModuleType:
    """The published classes. Two torchvision operators are declared where the build lacks them."""
    if not find_spec("diffusers"):
        pytest.skip("needs diffusers, the independent reference")
    import diffusers

    return diffusers


@pytest.fixture(scope="module")
def host() -> Callable[..., nn.Module]:
    """Builds the host's UNet for a configuration."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    def build(config: Config, device: str = "meta") -> nn.Module:
        fixed = {"image_size": 32, "use_spatial_transformer": True, "legacy": False, "dtype": torch.float32}
        return UNetModel(**config, **fixed, device=device, operations=comfy.ops.disable_weight_init).eval()

    return build


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.comfy
@pytest.mark.parametrize(("config", "kind", "published_config", "count"), PAIRS)
def test_map_pairs_every_published_name_with_a_host_name_of_its_shape(
    config: Config, kind: str, published_config: Config, count: int | None, diffusers: ModuleType, host: Any
) -> None:
    with torch.device("meta"):
        published = shapes(getattr(diffusers, kind)(**published_config))
    hosts, names = shapes(host(config)), unet_key_map(config)
    assert names.keys() == published.keys()
    assert set(names.values()) == hosts.keys() and len(set(names.values())) == len(names)
    assert {name: hosts[names[name]] for name in names} == published
    assert count is None or len(names) == count


# what no published class builds, against the host alone: uneven levels, transformers in some resnets only
HOST_ONLY = {
    "uneven_resnets": unet([1, 3, 2], [1, 2, 2], [1, 0, 1, 2, 0, 1], 0, [1, 0, 0, 1, 0, 2, 1, 1, 0], num_heads=2),
    "one_level": unet([2], [1], [1, 1], 1, [1, 1, 1], num_heads=2),
    "narrowing": unet([1, 1], [3, 1], [1, 1], 1, [1, 1, 1, 1], num_heads=2),
    "ssd_1b_depths": SDXL
    | {
        "transformer_depth": [0, 0, 2, 2, 4, 4],
        "transformer_depth_output": [0, 0, 0, 1, 1, 2, 10, 4, 4],
        "transformer_depth_middle": -1,
    },
    "video_without_cross_attention_in_time": TINY_SVD | {"disable_temporal_crossattention": True},
}


@pytest.mark.comfy
@pytest.mark.parametrize("config", HOST_ONLY.values(), ids=HOST_ONLY.keys())
def test_map_reaches_every_tensor_of_the_host_once(config: Config, host: Any) -> None:
    values = list(unet_key_map(config).values())
    assert set(values) == shapes(host(config)).keys() and len(set(values)) == len(values)


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
    """Every parameter random (none left at 0 or 1), scaled to keep activations near 1."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = noise / fan_in**0.5 + (1.0 if parameter.ndim == 1 else 0.0)
    return module.eval()


def converted(published: nn.Module, config: Config, host: Any) -> nn.Module:
    names = unet_key_map(config)
    network = host(config, device="cpu")
    network.load_state_dict({names[name]: t for name, t in published.state_dict().items()}, strict=True)
    return network


@pytest.fixture
def inputs() -> SimpleNamespace:
    """Six latents (two videos of three frames) of 16 x 16, their contexts and vector conditions."""
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
    """Within 1e-4 of the output's own size: both sum the same numbers in another order."""
    assert found.shape == expected.shape and expected.std() > 1e-2
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.comfy
def test_sd15_weights_act_the_same_in_the_host(diffusers: ModuleType, host: Any, inputs: SimpleNamespace) -> None:
    published = randomised(diffusers.UNet2DConditionModel(**TINY_SD15_PUBLISHED))
    network, x = converted(published, TINY_SD15, host), inputs.x[:, :4]
    expected = published(x, inputs.timestep, inputs.context).sample
    assert_same(network(x, inputs.timestep, inputs.context), expected)


@pytest.mark.comfy
def test_sdxl_weights_act_the_same_in_the_host(diffusers: ModuleType, host: Any, inputs: SimpleNamespace) -> None:
    published = randomised(diffusers.UNet2DConditionModel(**TINY_SDXL_PUBLISHED))
    network, x = converted(published, TINY_SDXL, host), inputs.x[:, :4]
    time_ids = torch.arange(36.0).reshape(6, 6)
    added = {"text_embeds": inputs.pooled, "time_ids": time_ids}
    expected = published(x, inputs.timestep, inputs.context, added_cond_kwargs=added).sample
    y = torch.cat([inputs.pooled, published.add_time_proj(time_ids.flatten()).reshape(6, 48)], 1)
    assert_same(network(x, inputs.timestep, inputs.context, y=y), expected)


@pytest.mark.comfy
def test_svd_weights_act_the_same_in_the_host(diffusers: ModuleType, host: Any, inputs: SimpleNamespace) -> None:
    published = randomised(diffusers.UNetSpatioTemporalConditionModel(**TINY_SVD_PUBLISHED))
    network = converted(published, TINY_SVD, host)
    context = inputs.context[::3, :1]
    ids = torch.tensor([[6.0, 127.0, 0.02], [7.0, 30.0, 0.1]])
    videos = inputs.x.reshape(2, 3, 8, 16, 16)
    expected = published(videos, torch.tensor(0.4), context, added_time_ids=ids).sample.flatten(0, 1)
    y = published.add_time_proj(ids.flatten()).reshape(2, 24).repeat_interleave(3, 0)
    found = network(inputs.x, torch.full((6,), 0.4), context.repeat_interleave(3, 0), y=y, num_video_frames=3)
    assert_same(found, expected)


# SD3

SD3 = {"num_attention_heads": 24, "caption_projection_dim": 1536, "joint_attention_dim": 4096}
SD3 |= {"num_layers": 24, "pooled_projection_dim": 2048, "pos_embed_max_size": 192}
TRANSFORMERS = [
    pytest.param(SD3, {"depth": 24}, 683, id="sd3_medium"),
    pytest.param(
        SD3 | {"qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13)), "pos_embed_max_size": 384},
        {"depth": 24, "qk_norm": True, "dual_attention": range(13)},
        None,
        id="sd35_medium",
    ),
    pytest.param(
        SD3 | {"qk_norm": "rms_norm", "num_layers": 5, "num_attention_heads": 4, "caption_projection_dim": 256},
        {"depth": 4, "num_blocks": 5, "qk_norm": True},
        None,
        id="more_blocks_than_heads",
    ),
]


def host_mmdit(config: Config, published: Config, device: str = "meta") -> nn.Module:
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    depth, side = config["depth"], published["pos_embed_max_size"]
    params = {"in_features": published["joint_attention_dim"], "out_features": 64 * depth}
    network = OpenAISignatureMMDITWrapper(
        input_size=None,
        in_channels=16,
        depth=depth,
        num_blocks=config.get("num_blocks"),
        qk_norm="rms" if config.get("qk_norm") else None,
        x_block_self_attn_layers=list(config.get("dual_attention", ())),
        adm_in_channels=published["pooled_projection_dim"],
        context_embedder_config={"target": "torch.nn.Linear", "params": params},
        num_patches=side**2,
        pos_embed_max_size=side,
        dtype=torch.float32,
        device=device,
        operations=comfy.ops.disable_weight_init,
    )
    return network.eval()


@pytest.mark.comfy
@pytest.mark.parametrize(("published_config", "config", "count"), TRANSFORMERS)
def test_sd3_map_fills_every_host_tensor_with_the_published_ones(
    published_config: Config, config: Config, count: int | None, diffusers: ModuleType
) -> None:
    with torch.device("meta"):
        published = shapes(diffusers.SD3Transformer2DModel(in_channels=16, **published_config))
    hosts, targets = shapes(host_mmdit(config, published_config)), mmdit_key_map(**config)
    assert targets.keys() == published.keys() and count in (None, len(targets))
    filled: dict[str, int] = {}
    for name, target in targets.items():
        rows = hosts[target.name][0] if target.slice is None else target.slice[2]
        assert published[name] == (rows, *hosts[target.name][1:]), name
        filled[target.name] = filled.get(target.name, 0) + rows
    assert filled == {name: shape[0] for name, shape in hosts.items()}


@pytest.mark.comfy
@pytest.mark.parametrize(("published_config", "config", "count"), TRANSFORMERS[:2])
def test_sd3_map_agrees_with_the_hosts_own(published_config: Config, config: Config, count: int | None) -> None:
    from comfy.utils import mmdit_to_diffusers

    theirs = mmdit_to_diffusers(config)
    special = 0
    for name, target in mmdit_key_map(**config).items():
        entry = theirs[name] if isinstance(theirs[name], tuple) else (theirs[name],)
        assert target == Target(entry[0], *entry[1:2], swap_halves=len(entry) > 2), name
        special += len(entry) > 1
    assert count is None or special == 292


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

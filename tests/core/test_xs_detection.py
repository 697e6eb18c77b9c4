"""Detection of ControlNet-XS files by their headers: formats, prefixes, leftovers, sizes, heads,
norm rules, refusals.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from comfyui_controlnext.controlnext_core.checkpoint import Header
from comfyui_controlnext.controlnext_core.detection import DetectionError, read_control_file
from comfyui_controlnext.controlnext_core.xs_detection import HEADS_KEY, NORM_KEY, is_xs, read_xs_file
from comfyui_controlnext.controlnext_core.xs_key_maps import DIFFUSERS, OFFICIAL, from_ours, to_ours
from comfyui_controlnext.controlnext_core.xs_specs import RELEASES, XSRelease, parse_heads, released_as
from comfyui_controlnext.models.controlnet_xs import ControlNetXS
from comfyui_controlnext.tools import tiny_models

Shapes = dict[str, tuple[int, ...]]
BY_NAME = {release.name: release for release in RELEASES}
TENSORS = {"sd15_53m": 398, "sd21_14m": 402, "sdxl_20m": 882, "sdxl_48m": 886}
HEADS = {"sd15_53m": {8}, "sd21_14m": {1, 2}, "sdxl_20m": {1}, "sdxl_48m": {1, 2}}
"""Heads from the released configurations: 8 heads; widths 4, 8 and twice 8; 32 and 64; 64 and twice 64."""


def header(shapes: Shapes, **metadata: str) -> Header:
    return Header(Path("file.safetensors"), shapes, dict.fromkeys(shapes, "F32"), metadata)


def released(name: str) -> Shapes:
    return tiny_models.xs_shapes(tiny_models.RELEASED_XS[name])


def as_adapter(shapes: Shapes) -> Shapes:
    file = read_xs_file(header(shapes))
    names = from_ours(file.names, file.shape.layout, DIFFUSERS)
    return {names[ours]: shapes[stored] for ours, stored in file.names.items()}


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)
def test_every_released_size_fills_its_network_exactly(release: XSRelease) -> None:
    shapes = released(release.name)
    assert len(shapes) == TENSORS[release.name]
    for found in (shapes, as_adapter(shapes)):
        file = read_xs_file(header(found))
        net = ControlNetXS(file.config(), device="meta")
        assert {n: tuple(t.shape) for n, t in net.state_dict().items()} == {
            ours: found[stored] for ours, stored in file.names.items()
        }
        assert sum(parameter.numel() for parameter in net.parameters()) == release.parameters
        assert released_as(file.shape) == release
        assert file.family is release.family
        assert set(file.heads()) - {0} == HEADS[release.name]
        assert file.norm_rule().name == OFFICIAL


@pytest.mark.parametrize("name", TENSORS)
def test_groups_are_the_largest_divisor_up_to_32(name: str) -> None:
    config = read_xs_file(header(released(name))).config()
    found = {part.groups for part in (*config.encoder, *config.middle) if part.kind == "res"}
    assert (
        found
        == {
            "sd15_53m": {(32, 32)},
            "sd21_14m": {(27, 4), (27, 8), (27, 16), (16, 16)},
            "sdxl_20m": {(28, 16), (28, 32), (32, 32)},
            "sdxl_48m": {(32, 32)},
        }[name]
    )


@pytest.mark.parametrize("name", TENSORS)
def test_maps_between_the_formats_are_bijections(name: str) -> None:
    shapes = released(name)
    layout = read_xs_file(header(shapes)).shape.layout
    ours = to_ours(shapes, layout, OFFICIAL)
    for format in (OFFICIAL, DIFFUSERS):
        there = from_ours(ours, layout, format)
        assert len(set(there.values())) == len(there) == len(shapes)
        assert to_ours(there.values(), layout, format) == {n: there[n] for n in ours}
    assert from_ours(ours, layout, OFFICIAL) == ours


def test_names_in_the_adapter_are_those_of_the_published_table() -> None:
    """Pairs written down from the description of the formats, one of every kind."""
    layout = read_xs_file(header(released("sdxl_48m"))).shape.layout
    ours = to_ours(released("sdxl_48m"), layout, OFFICIAL)
    official = {stored: name for name, stored in ours.items()}
    adapter = from_ours(ours, layout, DIFFUSERS)
    for released_name, adapters in {
        "control_model.input_blocks.0.0.weight": "conv_in.weight",
        "control_model.time_embed.2.bias": "time_embedding.linear_2.bias",
        "input_hint_block.0.weight": "controlnet_cond_embedding.conv_in.weight",
        "input_hint_block.8.weight": "controlnet_cond_embedding.blocks.3.weight",
        "input_hint_block.14.bias": "controlnet_cond_embedding.conv_out.bias",
        "enc_zero_convs_out.0.0.weight": "control_to_base_for_conv_in.weight",
        "control_model.input_blocks.4.0.emb_layers.1.weight": "down_blocks.1.resnets.0.time_emb_proj.weight",
        "control_model.input_blocks.8.0.skip_connection.bias": "down_blocks.2.resnets.1.conv_shortcut.bias",
        "control_model.input_blocks.7.1.transformer_blocks.9.attn2.to_out.0.weight": (
            "down_blocks.2.attentions.0.transformer_blocks.9.attn2.to_out.0.weight"
        ),
        "control_model.input_blocks.6.0.op.weight": "down_blocks.1.downsamplers.conv.weight",
        "enc_zero_convs_in.3.0.weight": "down_blocks.1.base_to_ctrl.0.weight",
        "enc_zero_convs_in.8.0.weight": "mid_block.base_to_ctrl.weight",
        "enc_zero_convs_out.6.0.weight": "down_blocks.1.ctrl_to_base.2.weight",
        "control_model.middle_block.2.out_layers.3.weight": "mid_block.midblock.resnets.1.conv2.weight",
        "middle_block_out.0.bias": "mid_block.ctrl_to_base.bias",
        "dec_zero_convs_out.7.0.weight": "up_connections.2.ctrl_to_base.1.weight",
    }.items():
        assert adapter[official[released_name]] == adapters


@pytest.mark.parametrize("prefix", ["", "control_model.", "model.", "module.engine."])
def test_prefixes_and_leftovers_of_whole_engines_are_put_aside(prefix: str) -> None:
    shapes = {prefix + name: shape for name, shape in released("sdxl_48m").items()}
    extra: Shapes = {
        f"{prefix}scale_list": (19,),
        f"{prefix}control_model.label_emb.0.0.weight": (1280, 2816),
        f"{prefix}diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
    }
    if prefix:
        extra |= {"first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3), "alphas_cumprod": (1000,)}
    file = read_xs_file(header(shapes | extra))
    assert set(file.names.values()) == set(shapes)
    assert released_as(file.shape) is BY_NAME["sdxl_48m"]


def test_type_a_has_no_connections_in_the_encoder() -> None:
    shapes = {n: s for n, s in released("sd15_53m").items() if not n.startswith("enc_zero_convs_out")}
    assert not read_xs_file(header(shapes)).shape.layout.adds_in_encoder


def without(*starts: str) -> Shapes:
    return {name: shape for name, shape in released("sd15_53m").items() if not name.startswith(starts)}


WRONG: dict[str, tuple[Shapes, str]] = {
    "type C": (released("sd15_53m") | {"middle_block_in.0.weight": (256, 1280, 1, 1)}, "type C.*decoder of its own"),
    "pruned late blocks": (
        without("control_model.input_blocks.11.", "enc_zero_convs_in.11."),
        "4 unexpected.*damaged, pruned",
    ),
    "no middle": (without("control_model.middle_block."), "pruned or incomplete"),
    "no decoder connections": (
        without("dec_zero_convs_out."),
        "pruned or incomplete.*no dec_zero_convs_out.0.0.weight",
    ),
    "a tensor missing": (
        without("control_model.input_blocks.4.0.out_layers.3.bias"),
        "1 missing: control_model.input_blocks.4.0.out_layers.3.bias",
    ),
    "an unknown tensor": (released("sd15_53m") | {"surprise.weight": (1,)}, "1 unexpected: surprise.weight"),
    "a wrong shape": (
        released("sd15_53m") | {"enc_zero_convs_in.2.0.weight": (300, 300, 1, 1)},
        "of another shape",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_not_whole_is_refused_in_words(kind: str) -> None:
    shapes, words = WRONG[kind]
    with pytest.raises(DetectionError, match=words) as error:
        read_xs_file(header(shapes))
    assert str(error.value).startswith("file.safetensors: ")


def test_other_files_are_told_apart_both_ways() -> None:
    controlnext = tiny_models.controlnext_shapes("gen2")
    with pytest.raises(DetectionError, match="is not a ControlNet-XS. It is a ControlNeXt.*Load ControlNeXt"):
        read_xs_file(header(controlnext))
    with pytest.raises(DetectionError, match="is not a ControlNet-XS. It is a LoRA"):
        read_xs_file(header({"lora_unet_x.lora_up.weight": (4, 4)}))
    for shapes in (released("sdxl_20m"), as_adapter(released("sdxl_20m"))):
        assert is_xs(shapes)
        with pytest.raises(DetectionError, match="is a ControlNet-XS.*Load ControlNet-XS"):
            read_control_file(header(shapes))
    assert not is_xs(controlnext)
    assert not is_xs({"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)})


def narrower(shapes: Shapes, widths: dict[int, int]) -> Shapes:
    """Adapter whose attentions are cut to a multiple of diffusers' default heads: another inner width."""
    result = {}
    for name, shape in shapes.items():
        if ".attentions." in name:
            leaf = name.split("attentions.0.")[-1].split("attentions.1.")[-1]
            keep = leaf in ("norm.weight", "norm.bias", "proj_out.bias")
            shape = shape if keep else tuple(_cut(size, widths) for size in shape)
            if leaf.startswith("proj_in.weight"):
                shape = (shape[0], shapes[name][1])
            if leaf.startswith("proj_out.weight"):
                shape = (shapes[name][0], shape[1])
        result[name] = shape
    return result


def _cut(size: int, widths: dict[int, int]) -> int:
    for width, inner in widths.items():
        for times in (1, 4, 8):
            if size == times * width:
                return times * inner
    return size


def test_heads_of_diffusers_defaults_follow_from_the_inner_width() -> None:
    """Heads of from_unet(SDXL, 0.1) are 5, 10, 20 by default: attentions 60 and 120 wide on 64, 128 channels."""
    shapes = narrower(as_adapter(released("sdxl_48m")), {64: 60, 128: 120})
    file = read_xs_file(header(shapes))
    assert set(file.shape.inner) == {0, 60, 120}
    assert file.heads() == (0, 0, 0, 0, 10, 10, 0, 20, 20, 20)


def test_heads_come_from_the_user_then_the_metadata_then_the_table() -> None:
    shapes = released("sdxl_48m")
    said = read_xs_file(header(shapes, **{HEADS_KEY: "1,2,4"}))
    assert said.heads("1,1,8")[-1] == 8
    assert said.heads()[-1] == 4
    assert read_xs_file(header(shapes)).heads(beside="1,1,1")[-1] == 1
    with pytest.raises(DetectionError, match="7 attention heads on level 1.*set num_heads"):
        said.heads("1,7,7")
    unknown = {n: (s[0], 640) if "attn2.to_k" in n or "attn2.to_v" in n else s for n, s in shapes.items()}
    with pytest.raises(DetectionError, match="no known number of attention heads.*set num_heads"):
        read_xs_file(header(unknown)).heads()


@pytest.mark.parametrize("text", ["a", "1,,2", "0", "1,-2", "1.5"])
def test_num_heads_must_be_a_list_of_numbers(text: str) -> None:
    with pytest.raises(ValueError, match="num_heads: .*whole numbers"):
        parse_heads(text)


def test_the_norm_rule_is_the_users_then_the_metadatas_then_by_origin() -> None:
    shapes = released("sdxl_48m")
    own_size = tiny_models.xs_shapes(tiny_models.XSSize(tiny_models.RELEASED_XS["sdxl_48m"].unet, (48, 96, 192), True))
    assert read_xs_file(header(shapes)).norm_rule().name == OFFICIAL
    assert read_xs_file(header(as_adapter(shapes))).norm_rule().name == OFFICIAL
    assert read_xs_file(header(own_size)).norm_rule().name == OFFICIAL
    assert read_xs_file(header(as_adapter(own_size))).norm_rule().name == DIFFUSERS
    assert read_xs_file(header(as_adapter(own_size), **{NORM_KEY: OFFICIAL})).norm_rule().name == OFFICIAL
    assert read_xs_file(header(shapes)).norm_rule(DIFFUSERS).name == DIFFUSERS
    with pytest.raises(DetectionError, match="its metadata says .*'other'"):
        read_xs_file(header(shapes, **{NORM_KEY: "other"})).norm_rule()

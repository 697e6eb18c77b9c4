"""Table of base models: the row of a model, its places, and the form of a place."""

from __future__ import annotations

import copy
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfyui_controlnext.controlnext_core.families import CONTEXT_FAMILIES, FAMILIES
from comfyui_controlnext.controlnext_core.injection import Term, fuse
from comfyui_controlnext.controlnext_core.key_maps import as_target, unet_key_map
from comfyui_controlnext.controlnext_core.specs import SPECS, Family, Fusion, Site
from comfyui_controlnext.tests.core.test_key_maps import SD15, SDXL, SVD
from comfyui_controlnext.tests.fixtures import video_fixtures as video
from comfyui_controlnext.tests.fixtures.sampling_fixtures import REASSOCIATED, Studio, relative
from comfyui_controlnext.tests.fixtures.transformer_fixtures import NARROW, narrow_model
from comfyui_controlnext.tests.fixtures.transformer_stage import FAMILIES as FAMILIES_ON_TRANSFORMERS
from comfyui_controlnext.tests.host import test_parity as parity
from torch import Tensor

pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("ignore:::diffusers")]


def loaded(model: Any) -> Any:
    from comfyui_controlnext.controlnext_core.comfy_adapter.bases.table import loaded_base

    return loaded_base(model)


def test_the_families_of_the_table_are_those_of_the_controls() -> None:
    assert {spec.family for spec in SPECS.values()} | {Family.SD21} == FAMILIES.keys()
    for spec in SPECS.values():
        assert spec.fusion.site in FAMILIES[spec.family].cells
    assert CONTEXT_FAMILIES == {768: Family.SD15, 1024: Family.SD21, 2048: Family.SDXL}


@pytest.mark.parametrize("family", FAMILIES_ON_TRANSFORMERS)
def test_a_network_that_another_pack_put_in_place_of_the_hosts_is_refused_in_words(family: str) -> None:
    """Nunchaku keeps the host's configuration and has none of its blocks."""
    from comfyui_controlnext.controlnext_core.comfy_adapter.bases.base import check_pair

    host, spec = narrow_model(family), SPECS[family]
    assert loaded(host).family is spec.family
    other = loaded(SimpleNamespace(model_config=host.model_config, diffusion_model=torch.nn.Linear(1, 1)))
    assert other.family is Family.OTHER and not other.places
    with pytest.raises(ValueError, match=rf"^x: is a {re.escape(spec.family.value)} control .* the connected model is"):
        check_pair(other, spec, NARROW[family].width, "x")


def host_of(family: Family) -> Any:
    return video.base().host if family is Family.SVD else parity.base(family.value).host


@pytest.mark.parametrize("family", [Family.SD15, Family.SDXL, Family.SVD])
def test_a_model_has_the_row_of_its_family_and_places_of_their_true_size(family: Family) -> None:
    """Seen by torch hooks on the blocks that the released code names."""
    model = host_of(family)
    base = loaded(model)
    assert base.family is family and base.places.keys() == set(Site) - {Site.AFTER_JOINT_0}
    unet, sizes = model.diffusion_model, {}
    first_down = len(model.model_config.unet_config["transformer_depth"]) // len(unet.channel_mult) + 1
    blocks = {
        Site.AFTER_CONV_IN: unet.input_blocks[0],
        Site.AFTER_DOWN_0: unet.input_blocks[first_down],
        Site.BEFORE_MIDDLE: unet.input_blocks[-1],
        Site.AFTER_MIDDLE: unet.middle_block,
    }
    for site, block in blocks.items():
        side, number = base.places[site].block
        assert (side, number) == ("output", 0) if site is Site.AFTER_MIDDLE else unet.input_blocks[number] is block
    handles = [
        block.register_forward_hook(lambda _, args, out, site=site: sizes.update({site: out.shape}))
        for site, block in blocks.items()
    ]
    config = model.model_config.unet_config
    more: dict[str, Any] = {"num_video_frames": 2} if family is Family.SVD else {}
    if config.get("adm_in_channels"):
        more["y"] = torch.zeros(2, config["adm_in_channels"])
    x = torch.zeros(2, config["in_channels"], 16, 16)
    try:
        with torch.inference_mode():
            unet(x, torch.ones(2), torch.zeros(2, 3, config["context_dim"]), **more)
    finally:
        for handle in handles:
            handle.remove()
    for site, shape in sizes.items():
        place = base.places[site]
        assert place.width == shape[1]
        assert FAMILIES[family].pixels * 16 // place.cell == shape[-1], site
    if len(unet.channel_mult) == {Family.SD15: 4, Family.SDXL: 3, Family.SVD: 4}[family]:
        assert {site: place.cell for site, place in base.places.items()} == FAMILIES[family].cells


def test_a_model_of_another_kind_has_no_place(studio: Studio) -> None:
    other = SimpleNamespace(diffusion_model=torch.nn.Linear(1, 1), model_config=SimpleNamespace(unet_config={}))
    base = loaded(other)
    assert base.family is Family.OTHER and not base.places
    with pytest.raises(ValueError, match="no family that controls are made for"):
        base.key_map()
    assert loaded(studio.model.model).family is Family.SD15


@pytest.mark.parametrize("config", [SD15, SDXL, SVD], ids=["sd15", "sdxl", "svd"])
@pytest.mark.parametrize("subset", ["none", "to_out", "attn2_to_out", "up_to_out", "all"])
def test_a_subset_by_host_names_is_what_the_released_trainers_choose_by_published_names(
    subset: str, config: dict[str, Any]
) -> None:
    from comfyui_controlnext.controlnext_core.comfy_adapter.bases.unet import UNETS

    published = {
        "none": lambda name: False,
        "to_out": lambda name: "to_out" in name,
        "attn2_to_out": lambda name: "attn2" in name and "to_out" in name,
        "up_to_out": lambda name: name.startswith("up_blocks.") and "to_out" in name,
        "all": lambda name: True,
    }[subset]
    key_map = unet_key_map(config)
    expected = {as_target(host).name for name, host in key_map.items() if published(name)}
    for base in UNETS:
        pattern = re.compile(base.trainable[subset])
        assert {as_target(host).name for host in key_map.values() if pattern.search(as_target(host).name)} == expected
        assert all(any(key.startswith(side) for key in map(str, key_map.values())) for side in base.sides.values())


# a place whose features are tokens: the picture's stand between others, and a sample is a clip


def token_place(first: int, seen: list[Any]) -> Any:
    """Place after block 0 of a transformer: (B, N, C) tokens, those of the latent's cells from `first` on."""
    from comfyui_controlnext.controlnext_core.comfy_adapter.bases.base import AddControls, Forward, Place
    from comfyui_controlnext.controlnext_core.comfy_adapter.bases.forward_options import TransformerOptions

    def door(options: TransformerOptions, block: Any, add: AddControls) -> None:
        options["slot"] = lambda tokens, offset: add(tokens, options, offset=offset)

    def count(forward: Forward) -> int:
        seen.append((forward.latent, dict(forward.given)))
        return forward.latent[-3] * forward.latent[-2] * forward.latent[-1] // 4

    def to_map(tokens: Tensor, forward: Forward) -> Tensor:
        frames, width = forward.latent[-3], forward.latent[-1] // 2
        part = tokens[:, first : first + count(forward)]
        return part.mT.unflatten(2, (-1, width)).unflatten(2, (frames, -1)).flatten(2, 3)

    def from_map(added: Tensor, tokens: Tensor, forward: Forward) -> Tensor:
        end = first + count(forward)
        return torch.cat([tokens[:, :first], added.flatten(2).mT, tokens[:, end:]], dim=1)

    return Place(door=door, block=("double_block", 0), width=6, cell=16, to_map=to_map, from_map=from_map)


def test_a_place_of_tokens_takes_controls_as_a_map_does() -> None:
    """Statistics over (N, C) of the picture's tokens only; the other tokens are unchanged."""
    from comfyui_controlnext.controlnext_core.comfy_adapter.sampling.next_forward import Job, collect

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 3 + 24 + 5, 6, generator=generator)
    before = tokens.clone()
    controls = [torch.randn(1, 6, 3 * 2, 4, generator=generator) for _ in range(2)]
    fusion = Fusion(site=Site.AFTER_CONV_IN, pool_first=True, eps=1e-12)
    seen: list[Any] = []
    options: dict[str, Any] = {}
    maps: list[Tensor] = []
    for number, control in enumerate(controls):

        def term(h: Tensor, given: Any, control: Tensor = control) -> Term:
            maps.append(h)
            return Term(control, (0.7,), fusion)

        collect(options, token_place(3, seen), (2, 16, 3, 4, 8), Job((number,), term, object()))
    found = options["slot"](tokens, 3)
    assert [h.shape for h in maps] == [(2, 6, 6, 4)] * 2 and maps[0] is maps[1]
    picture = tokens[:, 3:27]
    mean, std = picture.mean(dim=(1, 2), keepdim=True), picture.std(dim=(1, 2), keepdim=True)
    expected = picture + sum(0.7 * (control.flatten(2).mT * std + mean) for control in controls)
    assert relative(found[:, 3:27], expected) < REASSOCIATED
    assert torch.equal(found[:, :3], tokens[:, :3]) and torch.equal(found[:, 27:], tokens[:, 27:])
    assert torch.equal(tokens, before)
    assert seen[0] == ((2, 16, 3, 4, 8), {"offset": 3})
    assert fuse(maps[0], [Term(controls[0], (0.0,), fusion)]).equal(maps[0])


# the doors of a UNet


def test_a_door_keeps_the_patches_of_others_and_replaces_its_own() -> None:
    from comfyui_controlnext.controlnext_core.comfy_adapter.bases.base import Place
    from comfyui_controlnext.controlnext_core.comfy_adapter.bases.unet import AFTER_SKIP, after_input_block
    from comfyui_controlnext.controlnext_core.comfy_adapter.sampling.next_forward import KEY, Job, collect

    def other(h: Tensor, options: Any) -> Tensor:
        return h

    mine = {AFTER_SKIP: [other]}
    options: dict[str, Any] = {"patches": mine}
    first, second = (Place(door=after_input_block, block=("input", number), width=4, cell=8) for number in (0, 1))
    owner = object()
    for place, of in ((first, owner), (second, owner), (first, object()), (first, owner)):
        collect(options, place, (1, 4, 8, 8), Job((), lambda h, given: None, of))
    assert mine == {AFTER_SKIP: [other]}
    patches = options["patches"][AFTER_SKIP]
    assert [getattr(patch, "__self__", None) and patch.__self__.block for patch in patches] == [
        ("input", 0),
        ("input", 1),
        None,
    ]
    assert {block: len(collector.jobs) for block, collector in options[KEY].items()} == {
        ("input", 0): 2,
        ("input", 1): 1,
    }
    copied = copy.deepcopy(options)
    assert copied[KEY][("input", 0)] is options[KEY][("input", 0)]

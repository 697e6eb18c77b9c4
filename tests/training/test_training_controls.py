"""Control in training: its initial state, how it joins a forward, and files to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.controlnext_core import checkpoint
from comfyui_controlnext.controlnext_training.config import ConfigError
from comfyui_controlnext.controlnext_training.train import Stopped
from comfyui_controlnext.tests.fixtures.lazy_layers import EITHER_WAY, WHOLE_ALONE
from comfyui_controlnext.tests.fixtures.sampling_fixtures import Studio, relative
from comfyui_controlnext.tests.fixtures.training_fixtures import (
    Watcher,
    base_of,
    gradients_of,
    loop_on,
    same,
    small,
    take_steps,
    train_in,
)
from comfyui_controlnext.tests.training.test_training_base import Forward, controlled_on
from comfyui_controlnext.tools import tiny_models
from safetensors.torch import load_file

pytestmark = [pytest.mark.comfy, EITHER_WAY]


@pytest.mark.parametrize("settings", [{"fusion": "zero_conv"}, {"variant": "xs"}], ids=str)
def test_a_zero_convolution_starts_exactly_as_the_base(loaded_studio: Studio, settings: dict[str, str]) -> None:
    controlled = controlled_on(loaded_studio.model, **settings)
    given = Forward.on(controlled)
    with torch.no_grad():
        assert torch.equal(given.through(controlled), given.through(controlled, 0.0))
    loop = loop_on(base_of(loaded_studio), small(**settings))
    take_steps(loop, 1)
    with torch.no_grad():
        assert not torch.equal(given.through(loop.controlled), given.through(loop.controlled, 0.0))


@pytest.mark.parametrize("fusion", ["released", "paper", "add"])
def test_the_other_ways_of_joining_are_heard_from_the_start_and_differ(loaded_studio: Studio, fusion: str) -> None:
    outs = {}
    for name in (fusion, "zero_conv"):
        controlled = controlled_on(loaded_studio.model, fusion=name)
        given = Forward.on(controlled)
        with torch.no_grad():
            outs[name] = given.through(controlled)
    assert relative(outs[fusion], outs["zero_conv"]) > 1e-3
    gradients = gradients_of(loop_on(base_of(loaded_studio), small(fusion=fusion)))
    assert all(bool(gradient.any()) for gradient in gradients.values())


def test_cross_normalisation_gives_the_control_the_moments_of_the_features(
    loaded_studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    from comfyui_controlnext.controlnext_core.comfy_adapter.sampling import next_forward

    seen: list[tuple[Any, Any]] = []
    fuse = next_forward.fuse
    monkeypatch.setattr(next_forward, "fuse", lambda h, terms: (seen.append((h, fuse(h, terms))), seen[-1][1])[1])
    controlled = controlled_on(loaded_studio.model, gain=0.35)
    given = Forward.on(controlled)
    with torch.no_grad():
        given.through(controlled)
    (h, fused) = seen[0]
    added = (fused - h).flatten(1)
    torch.testing.assert_close(added.std(dim=1), 0.35 * h.flatten(1).std(dim=1), rtol=1e-4, atol=0)
    torch.testing.assert_close(added.mean(dim=1), 0.35 * h.flatten(1).mean(dim=1), rtol=1e-3, atol=1e-5)


def test_the_gain_scales_what_is_added_and_is_the_variants_own_unless_set(loaded_studio: Studio) -> None:
    own = controlled_on(loaded_studio.model)
    assert own.control.spec.fusion.gain.factor == 1.0
    outs = []
    for settings in ({}, {"gain": 1.0}, {"gain": 0.35}):
        controlled = controlled_on(loaded_studio.model, **settings)
        given = Forward.on(controlled)
        with torch.no_grad():
            outs.append(given.through(controlled, 0.35 if settings == {} else 1.0))
    assert torch.equal(outs[0], outs[2]), "strength and gain are one factor"
    assert not torch.equal(outs[0], outs[1])


def test_fresh_weights_depend_on_the_seed_alone(loaded_studio: Studio) -> None:
    for variant in ("sd15", "xs"):
        weights = []
        for seed, noise in ((3, 1), (3, 2), (4, 1)):
            torch.manual_seed(noise)
            weights.append(dict(controlled_on(loaded_studio.model, variant=variant, seed=seed).net.state_dict()))
            found = float(torch.rand(()))
            torch.manual_seed(noise)
            assert found == float(torch.rand(())), "and use up no other numbers"
        assert same(weights[0], weights[1]) and not same(weights[0], weights[2])


@WHOLE_ALONE
def test_a_run_goes_on_where_a_file_ends(loaded_studio: Studio, tmp_path: Path) -> None:
    """The encoder and the differences of an earlier run are the start of the next, for both layouts."""
    base = base_of(loaded_studio)
    for layout in ("single", "published"):
        first = train_in(tmp_path / layout, base, small(steps=1, layout=layout))
        loop = loop_on(base, small(init_control=str(first)))
        bundled = load_file(first)
        added = bundled if layout == "single" else load_file(first.with_name("unet.safetensors"))
        found = loop.controlled.published_differences()
        stored = {name.removeprefix("unet."): tensor for name, tensor in added.items() if "to_out" in name}
        assert same(found, stored) and any(bool(t.any()) for t in found.values())
        encoder = {n.removeprefix("controlnext."): t for n, t in bundled.items() if not n.startswith("unet.")}
        assert same(dict(loop.controlled.net.state_dict()), encoder)


@WHOLE_ALONE
def test_a_file_that_changes_weights_which_do_not_train_is_refused(loaded_studio: Studio, tmp_path: Path) -> None:
    base = base_of(loaded_studio)
    first = train_in(tmp_path, base, small(steps=1))
    for settings in ({"trainable": "none"}, {"trainable": "attn2_to_out"}, {"blocks": "input"}):
        with pytest.raises(ConfigError, match=r"init_control: .* changes \d+ weights that do not train here"):
            loop_on(base, small(init_control=str(first), **settings))
    wider = loop_on(base, small(init_control=str(first), trainable="re:to_(out|v)"))
    moved = {name for name, t in wider.controlled.published_differences().items() if bool(t.any())}
    assert moved and all("to_out" in name for name in moved)


@WHOLE_ALONE
def test_an_encoder_of_another_variant_and_a_stream_of_another_size_are_refused(
    loaded_studio: Studio, tmp_path: Path
) -> None:
    base = base_of(loaded_studio)
    other = tiny_models.make_controlnext(tmp_path / "legacy.safetensors", "sd15_legacy")
    with pytest.raises(ConfigError, match="init_control: .* is a sd15_legacy, and variant is sd15. Choose the same"):
        loop_on(base, small(init_control=str(other)))
    stream = train_in(tmp_path, base, small(variant="xs", steps=1, xs_ratio=0.1))
    again = loop_on(base, small(variant="xs", init_control=str(stream)))
    assert len(again.parameters) > 100
    with pytest.raises(ConfigError, match=r"init_control: .* has channels .* and xs_ratio makes .* Set xs_ratio"):
        loop_on(base, small(variant="xs", init_control=str(stream), xs_ratio=0.2))


def test_a_file_that_is_absent_is_named(loaded_studio: Studio, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, checkpoint.CheckpointError), match=r"absent\.safetensors"):
        loop_on(base_of(loaded_studio), small(init_control=str(tmp_path / "absent.safetensors")))


@WHOLE_ALONE
def test_a_resumed_run_does_not_begin_again_with_its_file(loaded_studio: Studio, tiny: Any, tmp_path: Path) -> None:
    base = base_of(loaded_studio)
    config = small(steps=2, init_control=str(tiny.models / "controlnext" / tiny.names["control"]))
    whole = train_in(tmp_path / "whole", base, config)
    with pytest.raises(Stopped):
        train_in(tmp_path / "parts", base, config, Watcher(stop_at=1))
    assert same(load_file(train_in(tmp_path / "parts", base, config)), load_file(whole))


def test_hints_have_the_layout_of_the_quicker_kernels_and_the_same_features() -> None:
    """Contiguous where a gradient is wanted, channels last elsewhere; the features differ by rounding alone."""
    from comfyui_controlnext.controlnext_core.specs import SPECS, config_of
    from comfyui_controlnext.controlnext_training.base_model.clip_encoding import quick_layout
    from comfyui_controlnext.models.controlnext import ControlNeXt

    torch.manual_seed(0)
    net, hint = ControlNeXt(config_of(SPECS["sd15"])), torch.rand(2, 3, 32, 48)
    trained = quick_layout(hint.contiguous(memory_format=torch.channels_last))
    with torch.no_grad():
        used = quick_layout(hint)
        assert used.is_contiguous(memory_format=torch.channels_last) and trained.is_contiguous()
        found = [net(planes, torch.tensor([500.0])) for planes in (trained, used)]
    assert torch.equal(trained, used)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)

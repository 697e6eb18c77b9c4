"""Sampling on several devices at once (MultiGPU CFG Split): a network, a run and features for each of them.

The second device is `cpu:1`: one more device to the host, whose thread for it then works on the same processor.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from comfyui_controlnext.tests.fixtures.sampling_fixtures import Studio, forbid_batching, picture, relative
from comfyui_controlnext.tools import tiny_models
from torch import Tensor

pytestmark = pytest.mark.comfy

FIRST, SECOND = torch.device("cpu"), torch.device("cpu", 1)
KINDS = pytest.mark.parametrize("kind", ["controlnext", "xs"])
APPLY_TO = pytest.mark.parametrize("apply_to", ["both", "positive"])


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    """Node MultiGPU CFG Split, on a machine with two devices: MODEL -> MODEL."""
    reason = "this ComfyUI samples on one device alone (no comfy.multigpu)"
    multigpu = pytest.importorskip("comfy.multigpu", reason=reason)
    monkeypatch.setattr("comfy.model_management.get_all_torch_devices", lambda *args, **kwargs: [FIRST, SECOND])
    return lambda model: multigpu.create_multigpu_deepclones(model, 2)


def load(studio: Studio, kind: str) -> Any:
    """CONTROL_NET of a kind.

    Its weights are aligned in memory like those of a copy: a CPU rounds differently with the alignment of the file.
    """
    if kind == "controlnext":
        control = studio.load().control
    else:
        from comfyui_controlnext.controlnext_core.comfy_adapter.files.xs_loading import load_controlnet_xs

        path = studio.files / "xs_own_time.safetensors"
        file = path if path.exists() else tiny_models.make_controlnet_xs(path, own_time=True)
        control = load_controlnet_xs(file).control
    for parameter in control.network.model.parameters():
        parameter.data = parameter.data.clone()
    return control


@contextmanager
def seen_devices(studio: Studio) -> Any:
    """Device and network of each forward of a control, by its thread."""
    from comfyui_controlnext.controlnext_core.comfy_adapter.sampling.host_control import HostControl

    seen: list[tuple[Any, Any]] = []
    add_to = HostControl.add_to

    def noted(self: Any, transformer_options: dict[str, Any], *args: Any) -> None:
        seen.append((transformer_options.get("multigpu_thread_device"), self.network))
        add_to(self, transformer_options, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostControl, "add_to", noted)
        yield seen


def assert_each_device_ran_its_own(seen: list[tuple[Any, Any]]) -> None:
    assert {device for device, _ in seen} == {FIRST, SECOND}
    assert all(network.load_device == device for device, network in seen)
    assert len({id(network.model) for _, network in seen}) == 2


@KINDS
@APPLY_TO
@pytest.mark.parametrize("door", ["stock", "apply, then split", "split, then apply"])
def test_two_devices_give_the_bits_of_one(
    studio: Studio,
    plain: Tensor,
    several: Callable[[Any], Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    apply_to: str,
    door: str,
) -> None:
    control = studio.options(load(studio, kind), apply_to)
    forbid_batching(monkeypatch)  # as each device gets one half
    expected = studio.sample(None, *studio.stock(control, picture()))
    with seen_devices(studio) as seen:
        if door == "stock":
            found = studio.sample(several(studio.model), *studio.stock(control, picture()))
        elif door == "apply, then split":
            found = studio.sample(several(studio.ours(studio.model, control, picture())))
        else:
            found = studio.sample(studio.ours(several(studio.model), control, picture()))
    assert_each_device_ran_its_own(seen)
    assert torch.equal(found, expected)
    assert relative(found, plain) > 0.01
    assert "had no effect" not in caplog.text


def test_a_chain_and_a_second_run_on_two_devices(
    studio: Studio, several: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Controls of both kinds behind one another, in range for a part of the steps; the networks are copied once."""
    forbid_batching(monkeypatch)
    encoder, xs = load(studio, "controlnext"), load(studio, "xs")
    once = studio.stock(encoder, picture(), 1.0, 0.0, 0.6)
    chain = studio.apply_to(*once, xs, picture(1))
    expected = studio.sample(None, *chain, steps=3)
    model = several(studio.model)
    with seen_devices(studio) as seen:
        assert torch.equal(studio.sample(model, *chain, steps=3), expected)
        assert torch.equal(studio.sample(model, *chain, steps=3), expected)
    networks = {id(network.model) for device, network in seen if device == SECOND}
    assert len(networks) == 2 and all(network.load_device == device for device, network in seen)


def test_a_control_without_effect_on_any_device_says_so_once(
    studio: Studio, several: Callable[[Any], Any], caplog: pytest.LogCaptureFixture
) -> None:
    positive = studio.stock(studio.options(load(studio, "controlnext"), "negative"), picture())[0]
    studio.sample(several(studio.model), positive, studio.negative)
    assert caplog.text.count("had no effect") == 1


@KINDS
def test_a_controlled_model_moves_to_another_device(studio: Studio, several: Callable[[Any], Any], kind: str) -> None:
    """Model moved by the node Select Model Device."""
    model = studio.ours(studio.model, load(studio, kind), picture())
    expected = studio.sample(model)
    moved = model.deepclone_multigpu(new_load_device=SECOND)
    with seen_devices(studio) as seen:
        assert torch.equal(studio.sample(moved), expected)
    assert {network.load_device for _, network in seen} == {SECOND}


@KINDS
def test_a_copy_for_a_device_has_its_own_network_and_run(studio: Studio, kind: str) -> None:
    """Copy made by the method that hosts with several devices call; runs on every host."""
    control = load(studio, kind)
    applied = studio.stock(control, picture())[0][0][1]["control"]
    clone = applied.deepclone_multigpu(SECOND, autoregister=True)
    assert applied.multigpu_clones == {SECOND: clone} and type(clone) is type(applied)
    assert clone.network.load_device == SECOND and applied.network.load_device == FIRST
    own, theirs = (dict(c.network.model.named_parameters()) for c in (clone, applied))
    assert own.keys() == theirs.keys()
    for name, parameter in own.items():
        assert torch.equal(parameter, theirs[name]) and parameter.data_ptr() != theirs[name].data_ptr()
        assert not parameter.requires_grad
    assert applied.copy().deepclone_multigpu(SECOND).network is clone.network  # one for all controls of this file
    assert not control.multigpu_clones and not applied.copy().multigpu_clones

    base = studio.model.model
    for each in (applied, clone):
        each.pre_run(base, base.model_sampling.percent_to_sigma)
    assert clone.run is not None and clone.run is not applied.run
    applied.cleanup()
    assert clone.run is None and applied.run is None


@KINDS
def test_a_network_is_handed_over_as_the_host_hands_over_its_own(
    studio: Studio, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Patcher of the network: for dynamic VRAM where the host has it on, and plain where the host requests that."""
    from comfy import model_patcher

    if not hasattr(model_patcher, "CoreModelPatcher"):
        pytest.skip("this ComfyUI has one kind of patcher alone (no comfy.model_patcher.CoreModelPatcher)")

    class Core(model_patcher.ModelPatcher):
        pass

    monkeypatch.setattr(model_patcher, "CoreModelPatcher", Core)
    network = load(studio, kind).network
    make, arguments = network.cached_patcher_init
    assert type(network) is Core and type(make(*arguments)) is Core
    assert type(make(*arguments, disable_dynamic=True)) is model_patcher.ModelPatcher


def test_what_one_device_made_is_not_given_to_another(studio: Studio) -> None:
    """Separate caches: a copy to host memory may be in progress on one device; and unloading a network drops only its
    features.
    """
    from comfyui_controlnext.controlnext_core.comfy_adapter.sampling.features import drop_features, group_of

    control = load(studio, "controlnext")
    clone = control.deepclone_multigpu(SECOND)
    uid, value = control.net.uid, torch.zeros(4)
    groups = [group_of(uid, "a hint", network) for network in (control.network, clone.network)]
    assert studio.cache.put(groups[0], 1, value) and not studio.cache.holds(groups[1], 1)
    assert studio.cache.put(groups[1], 1, value)
    drop_features(uid, clone.network)
    assert studio.cache.holds(groups[0], 1) and not studio.cache.holds(groups[1], 1)
    studio.cache.drop(uid)
    assert not studio.cache.holds(groups[0], 1)

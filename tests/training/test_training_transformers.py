"""Training on diffusion transformers: exact gradients, only the listed weights, and resumed runs equal to uninterrupted
ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.tests.fixtures.narrow_training import (
    FAMILIES,
    PICTURES,
    config_for,
    drawn_batch,
    narrow_base,
    on_the_host,
    scenes,
    train_narrow,
)
from comfyui_controlnext.tests.fixtures.training_fixtures import (
    Watcher,
    frozen,
    gradients_of,
    hashes,
    host_weights,
    loop_on,
    run_in,
    same,
    shaken,
    take_steps,
)
from comfyui_controlnext.tests.references.reference_transformers import FAMILIES as REFERENCES
from comfyui_controlnext.tests.training.test_training_base import slope
from safetensors.torch import load_file
from torch import Tensor

pytestmark = pytest.mark.comfy

each = pytest.mark.parametrize("family", FAMILIES)
REASSOCIATED, FUSED = 1e-5, 1e-5
"""Relative differences of results from other batches, and from operators that a later host has fused."""
STEP, CENTRAL = 2e-4, 5e-3
"""Change of the loss of a central difference in fp32, and its relative error there; see `test_training_base`."""


def loop_of(family: str, **settings: Any) -> Any:
    return loop_on(narrow_base(family), config_for(family, **settings), scenes(4, family))


@each
def test_gradients_with_checkpointing_are_those_without_to_the_bit(family: str) -> None:
    found = []
    for recompute in (False, True):
        loop = loop_of(family, batch_size=2, checkpointing=recompute)
        shaken(loop.parameters, 0.01)
        found.append(gradients_of(loop))
    assert same(*found) and all(bool(gradient.any()) for gradient in found[0].values())


@each
def test_blocks_made_ready_for_training_give_what_the_host_gives(family: str, pinned_host: bool) -> None:
    """Residuals that are answered by new tensors, and operators with a gradient: the same numbers."""
    controlled = (loop := loop_of(family)).controlled
    batch = drawn_batch(loop, 1)
    expected = on_the_host(narrow_base(family).model.model, batch)
    with torch.no_grad():
        found = controlled.denoised(batch.noise, batch.sigma, batch.conditions, batch.hint, 0.0)
    if pinned_host:
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=FUSED, atol=FUSED)


@pytest.mark.parametrize("family", ["sd3", "flux", "qwen_image", "lumina2", "wan"])
def test_gradients_are_the_slopes_of_the_loss(family: str) -> None:
    """Gradients of the encoder and of the differences, along the gradient. One family of each kind of block."""
    loop = loop_of(family, batch_size=2, checkpointing=True)
    shaken(loop.parameters, 0.01)
    batch = drawn_batch(loop, 2)
    target = torch.randn(batch.noise.shape, generator=torch.Generator().manual_seed(9))

    def loss() -> Tensor:
        out = loop.controlled(batch.noise, batch.sigma, batch.conditions, batch.hint)
        return (out - target).double().square().mean()

    gradients = dict(zip(loop.parameters, torch.autograd.grad(loss(), list(loop.parameters.values())), strict=True))
    for part in ("control.", "unet."):
        chosen = [name for name in loop.parameters if name.startswith(part)]
        length = torch.stack([gradients[name].norm() for name in chosen]).norm()
        direction = [gradients[name] / length for name in chosen]
        step = STEP / min(1.0, float(length))
        found = slope(loss, [loop.parameters[name].data for name in chosen], direction, step)
        assert found == pytest.approx(float(length), rel=CENTRAL), part


def of_reference(family: str) -> list[str]:
    """Attention output projections of the picture in the narrow model."""
    name = REFERENCES[family].differences
    more = ["joint_blocks.0.x_block.attn2.proj.weight"] if family == "sd3" else []
    return sorted([name.replace("N", str(block)) for block in range(2)] + more)


@each
def test_only_the_listed_weights_change(family: str) -> None:
    base = narrow_base(family)
    loop = loop_of(family)
    listed = [f"unet.{name}.{end}" for name in of_reference(family) for end in ("up", "down")]
    encoder = [f"control.{name}" for name, _ in loop.controlled.net.named_parameters()]
    assert sorted(loop.parameters) == sorted(listed + encoder)
    before, start = hashes(frozen(loop.controlled)), hashes(loop.parameters)
    before_host = hashes(host_weights(base.model))
    take_steps(loop, 2)  # in the first the factors that start at zero move alone
    after = hashes(loop.parameters)
    assert [name for name in loop.parameters if after[name] == start[name]] == []
    assert hashes(frozen(loop.controlled)) == before and len(before) > 30
    assert hashes(host_weights(base.model)) == before_host and not base.model.patches
    rest = frozen(loop.controlled)
    assert all(tensor.grad is None and not tensor.requires_grad for tensor in rest.values())


@pytest.mark.parametrize(
    ("settings", "ends", "shape"),
    [
        ({}, (".up", ".down"), (16, 128)),
        ({"rank": 4}, (".up", ".down"), (4, 128)),
        ({"rank": 0}, ("",), (128, 128)),
        ({"rank": 128}, ("",), (128, 128)),
    ],
    ids=str,
)
def test_the_rank_decides_what_a_difference_is(settings: dict[str, Any], ends: tuple[str, ...], shape: Any) -> None:
    parameters = loop_of("sd3", **settings).parameters
    names = {f"unet.{name}{end}" for name in of_reference("sd3") for end in ends}
    assert {name for name in parameters if name.startswith("unet.")} == names
    assert {tuple(parameters[name].shape) for name in names if not name.endswith(".up")} == {shape}


def test_blocks_and_subsets_are_those_of_the_family() -> None:
    from comfyui_controlnext.controlnext_training.config import ConfigError

    def trained(family: str, **settings: Any) -> set[str]:
        parameters = loop_of(family, **settings).parameters
        return {n.removeprefix("unet.").rpartition(".")[0] for n in parameters if n.endswith(".up")}

    assert trained("sd3", blocks="joint.1") == {"joint_blocks.1.x_block.attn.proj.weight"}
    assert {name.split(".")[0] for name in trained("z_image", trainable="refiners_too")} == {"layers", "noise_refiner"}
    assert trained("z_image", trainable="refiners_too", blocks="refiner.0") == {"noise_refiner.0.attention.out.weight"}
    assert trained("flux", trainable=r"re:linear2\.weight", blocks="single.0") == {"single_blocks.0.linear2.weight"}
    assert trained("chroma", trainable="single_too", blocks="single.1") == {"single_blocks.1.linear2.weight"}
    values = {f"layers.1.attention.{part}.weight" for part in ("out", "qkv")}
    assert trained("lumina2", trainable="values_too", blocks="joint.1") == values
    with pytest.raises(ConfigError, match="trainable: this base has no 'single_too'. Choose none, to_out, all"):
        loop_of("sd3", trainable="single_too")
    with pytest.raises(ConfigError, match="blocks: this base has no blocks named double. Choose joint"):
        loop_of("sd3", blocks="double.0")
    with pytest.raises(ConfigError, match="selects none of the"):
        loop_of("sd3", blocks="joint.7")


STOPPED = {"steps": 4, "batch_size": 2, "ema_decay": 0.5, "checkpointing": True}


@pytest.mark.parametrize(
    ("family", "settings"), [("sd3", {}), ("wan", {"steps": 2, "batch_size": 1, "mask_weight": 2.0})], ids=str
)
def test_a_stopped_run_goes_on_to_the_same_file(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Whole, and stopped in the middle: the weights, their average and the file are equal in every bit."""
    from comfyui_controlnext.controlnext_training.train import Stopped

    settings = STOPPED | settings
    whole = train_narrow(tmp_path / "whole", family, **settings)
    with pytest.raises(Stopped):
        train_narrow(tmp_path / "parts", family, Watcher(stop_at=settings["steps"] // 2), **settings)
    again = train_narrow(tmp_path / "parts", family, **settings)
    assert same(load_file(again), load_file(whole))


def test_the_file_holds_the_average(tmp_path: Path) -> None:
    files = [train_narrow(tmp_path / str(ema), "sd3", **STOPPED | {"steps": 2, "ema_decay": ema}) for ema in (0.5, 0.0)]
    assert not same(*map(load_file, files))


def test_states_from_before_a_setting_was_there_go_on(tmp_path: Path) -> None:
    """Settings that an old state lacks have their default, with which it was run; another value is another run's."""
    from comfyui_controlnext.controlnext_training.config import ConfigError
    from comfyui_controlnext.controlnext_training.train import Stopped

    whole = train_narrow(tmp_path / "whole", "sd3", steps=2)
    with pytest.raises(Stopped):
        train_narrow(tmp_path / "parts", "sd3", Watcher(stop_at=1), steps=2)
    (facts,) = run_in(tmp_path / "parts", narrow_base("sd3")).folder.glob("state-*/state.json")
    state = json.loads(facts.read_text("utf-8"))
    for key in ("rank", "guidance", "validation_guidance"):
        del state["config"][key]
    facts.write_text(json.dumps(state), "utf-8")
    with pytest.raises(ConfigError, match="rank was -1 and is 4"):
        train_narrow(tmp_path / "parts", "sd3", steps=2, rank=4)
    assert same(load_file(train_narrow(tmp_path / "parts", "sd3", steps=2)), load_file(whole))


@pytest.mark.parametrize("family", ["sd3", "lumina2", "wan"])
def test_captions_of_unequal_length_train_in_one_batch(family: str) -> None:
    """Nothing is padded: samples that the host cannot join are computed one after the other."""
    loop = loop_of(family)
    batch = drawn_batch(loop, 4)
    lengths = {int(one["c_crossattn"].cond.shape[1]) for one in batch.conditions}
    assert len(lengths) > 1
    with torch.no_grad():
        together = loop.controlled(batch.noise, batch.sigma, batch.conditions, batch.hint)
        for row in range(4):
            one, each = slice(row, row + 1), len(batch.hint) // 4
            hint = batch.hint[row * each : (row + 1) * each]
            alone = loop.controlled(batch.noise[one], batch.sigma[one], batch.conditions[one], hint)
            torch.testing.assert_close(together[one], alone, rtol=REASSOCIATED, atol=REASSOCIATED)


def medians(sampling: Callable[[Any], Any] | None = None) -> float:
    """Median noise level of the distribution from which a run on SD3 draws."""
    base = narrow_base("sd3")
    if sampling is not None:
        from comfyui_controlnext.tests.fixtures.narrow_training import with_model

        base = with_model(base, sampling(base.model))
    return float(loop_on(base, config_for("sd3"), scenes()).objective.sigma([0.5]))


def test_noise_levels_are_logit_normal_with_the_shift_of_the_patched_model() -> None:
    """s' = a s / (1 + (a - 1) s) of s = 0.5, a = 3 for SD3 and what a node has set: Esser et al. 2024, equation 23."""
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    assert medians() == pytest.approx(0.75, abs=1e-3)
    assert medians(lambda model: ModelSamplingSD3().patch(model, 5.0)[0]) == pytest.approx(5 / 6, abs=1e-3)
    sigma = loop_of("sd3").objective.sigma(torch.linspace(0.0005, 0.9995, 1000).tolist()).double()
    unshifted = sigma / (3 - 2 * sigma)
    logits = (unshifted / (1 - unshifted)).clamp(min=1e-6).log()
    assert float(logits[10:-10].mean()) == pytest.approx(0, abs=0.02)
    assert float(logits[10:-10].std()) == pytest.approx(0.94, abs=0.02), "a standard normal without its tails"


def test_a_distilled_base_is_told_its_guidance() -> None:
    from comfyui_controlnext.controlnext_training.step import conditions_of

    loop = loop_of("flux", guidance=1.5)
    sample = loop.samples.store.sample(0, 0)
    for guidance, expected in ((None, 1.5), (3.5, 3.5)):
        told = conditions_of(sample, sample.given, loop.controlled, guidance)["guidance"].cond
        assert told.tolist() == [expected]
    loop = loop_of("sd3")
    assert "guidance" not in conditions_of(loop.samples.store.sample(0, 0), sample.given, loop.controlled)


def test_the_hosts_switch_for_training_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch of the host is restored, also after an error; hosts without the switch do not get one."""
    import comfy.model_management
    from comfyui_controlnext.controlnext_training.base_model.blocks import host_in_training

    monkeypatch.setattr(comfy.model_management, "in_training", False, raising=False)
    with pytest.raises(KeyError), host_in_training():
        assert comfy.model_management.in_training is True
        raise KeyError
    assert comfy.model_management.in_training is False
    monkeypatch.delattr(comfy.model_management, "in_training")
    with host_in_training():
        assert not hasattr(comfy.model_management, "in_training")


def test_a_text_keeps_its_length_its_mask_and_its_pooled_vector() -> None:
    from comfyui_controlnext.controlnext_training.base_model.conditioning import encode_text

    class Encoder:
        def tokenize(self, text: str) -> str:
            return text

        def encode_from_tokens(self, tokens: str, return_dict: bool) -> dict[str, Any]:
            mask = torch.tensor([[1, 1, 0]])
            return {"cond": torch.ones(1, 3, 5).half(), "pooled_output": None, "attention_mask": mask}

    found = encode_text(Encoder(), "a b c")
    assert found["context"].shape == (1, 3, 5) and found["context"].dtype is torch.float32
    assert found["mask"].dtype is torch.int64 and found["mask"].tolist() == [[1, 1, 0]], "ones and zeros stay such"
    assert found.keys() == {"context", "mask"}


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in ("sd3", "z_image") else pytest.mark.long) for name in PICTURES]
)
def test_steps_in_bf16_are_near_those_in_fp32(family: str) -> None:
    """The base computes in bf16; what trains stays in fp32."""
    losses = []
    for precision in ("fp32", "bf16"):
        loop = loop_of(family, precision=precision, batch_size=2, checkpointing=True)
        losses.append(take_steps(loop, 2))
        assert {parameter.dtype for parameter in loop.parameters.values()} == {torch.float32}
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[1] != losses[0]

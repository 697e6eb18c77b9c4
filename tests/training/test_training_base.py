"""Base in training against the host: the same output, right gradients, and the MODEL's LoRAs included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.benchmarks.bench_video_memory import Allocations
from comfyui_controlnext.controlnext_training.base_model.controlled import Controlled, Sizes
from comfyui_controlnext.controlnext_training.base_model.trainable_copy import plain_attention
from comfyui_controlnext.controlnext_training.config import ConfigError
from comfyui_controlnext.tests.fixtures.lazy_layers import EITHER_WAY, WHOLE_ALONE
from comfyui_controlnext.tests.fixtures.sampling_fixtures import CELLS, Studio, picture, relative
from comfyui_controlnext.tests.fixtures.training_fixtures import (
    CPU,
    SIDE,
    base_of,
    gradients_of,
    host_weights,
    loop_on,
    same,
    shaken,
    small,
)
from comfyui_controlnext.tools import tiny_models
from safetensors.torch import load_file
from torch import Tensor

pytestmark = [pytest.mark.comfy, EITHER_WAY]

SQUARE = Sizes((SIDE, SIDE), (0, 0), (SIDE, SIDE))
STEP, CENTRAL = 2e-4, 5e-3
"""Step of a central difference in fp32: where rounding and curvature are about equal, and its relative error there
(measured: 1.5e-3 at 3e-4, 4e-4 at 1e-4)."""


def controlled_on(model: Any, **settings: Any) -> Controlled:
    return Controlled(model, small(**settings), torch.float32, CPU)


@dataclass
class Forward:
    """Inputs of one forward: two samples with different noise, prompt and hint."""

    noisy: Tensor
    sigma: Tensor
    conditions: list[Any]
    hint: Tensor

    @classmethod
    def on(cls, controlled: Controlled, context: int = 768, pooled: int = 0) -> Forward:
        g = torch.Generator().manual_seed(3)
        latent = torch.randn(1, 4, CELLS, CELLS, generator=g)

        def given() -> dict[str, Tensor]:
            found = {"context": torch.randn(1, 77, context, generator=g)}
            return found | ({"pooled": torch.randn(1, pooled, generator=g)} if pooled else {})

        return cls(
            3 * torch.randn(2, 4, CELLS, CELLS, generator=g),
            torch.tensor([2.5, 0.7]),
            [controlled.conditions(latent, given(), SQUARE) for _ in range(2)],
            torch.cat([picture(seed).movedim(-1, 1) for seed in (1, 2)]),
        )

    def through(self, controlled: Controlled, strength: float = 1.0) -> Tensor:
        return controlled(self.noisy, self.sigma, self.conditions, self.hint, strength)


def seen_by_the_host(model: Any, conditioning: Any, sample: Callable[..., Any]) -> dict[str, Any]:
    """Inputs and outputs of the model in the first step of the host's ordinary sampling."""
    seen: dict[str, Any] = {}

    def look(apply_model: Any, given: dict[str, Any]) -> Tensor:
        found = apply_model(given["input"], given["timestep"], **given["c"])
        seen.setdefault("x", given["input"].clone())
        seen.setdefault("sigma", given["timestep"].clone())
        seen.setdefault("denoised", found.clone())
        return found

    watched = model.clone()
    watched.set_model_unet_function_wrapper(look)
    watched.model_options["transformer_options"]["optimized_attention_override"] = plain_attention
    with torch.inference_mode():
        sample(watched, conditioning, conditioning, steps=1, cfg=1.0)
    return {name: tensor.clone() for name, tensor in seen.items()}


def test_at_strength_zero_it_is_what_the_host_samples_with(loaded_studio: Studio) -> None:
    seen = seen_by_the_host(loaded_studio.model, loaded_studio.positive, loaded_studio.sample)
    controlled = controlled_on(loaded_studio.model)
    ((context, _),) = loaded_studio.positive
    conditions = [controlled.conditions(seen["x"], {"context": context.clone()}, SQUARE)]
    hint = picture().movedim(-1, 1)
    with torch.no_grad():
        found = controlled.denoised(seen["x"], seen["sigma"], conditions, hint, 0.0)
        raw = controlled(seen["x"], seen["sigma"], conditions, hint, 0.0)
    assert torch.equal(found, seen["denoised"])
    expected = seen["x"] - seen["sigma"].view(-1, 1, 1, 1) * raw
    assert relative(expected, found) < 1e-6, "what it gives back is the network's own output, here of an epsilon model"


def test_the_base_of_sdxl_knows_the_size_of_the_picture(loaded_sdxl: Any) -> None:
    """Size, crop and target change the output as they do in the host's own text encoder node for SDXL."""
    controlled = controlled_on(loaded_sdxl, variant="sdxl", trainable="none")
    g = torch.Generator().manual_seed(0)
    latent, context = torch.randn(1, 4, CELLS, CELLS, generator=g), torch.randn(1, 77, 2048, generator=g)
    pooled, sigma = torch.randn(1, 1280, generator=g), torch.tensor([1.0])
    given = {"context": context, "pooled": pooled}
    told = Sizes((999, 777), (8, 16), (96, 80))
    extra = {"height": 999, "width": 777, "crop_h": 8, "crop_w": 16, "target_height": 96, "target_width": 80}
    conditions = controlled.conditions(latent, given, told)
    assert torch.equal(conditions["y"].cond, loaded_sdxl.model.encode_adm(pooled_output=pooled, device=CPU, **extra))
    hint = picture().movedim(-1, 1)
    with torch.no_grad():
        found = controlled(latent, sigma, [conditions], hint, 0.0)
        assert not torch.equal(
            found, controlled(latent, sigma, [controlled.conditions(latent, given, SQUARE)], hint, 0.0)
        )


@pytest.fixture(scope="module")
def loaded_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import comfy.sd

    path = tiny_models.make_sdxl(tmp_path_factory.mktemp("sdxl") / "sdxl.ckpt", clip=False)
    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(str(path), output_vae=False, output_clip=False)[0]


def test_samples_of_a_batch_do_not_see_each_other(loaded_studio: Studio) -> None:
    controlled = controlled_on(loaded_studio.model)
    shaken(controlled.differences.parameters)
    given = Forward.on(controlled)
    with torch.no_grad():
        both = given.through(controlled)
        for row in range(2):
            alone = Forward(
                given.noisy[row : row + 1],
                given.sigma[row : row + 1],
                [given.conditions[row]],
                given.hint[row : row + 1],
            )
            assert relative(both[row], alone.through(controlled)[0]) < 1e-5


def slope(value: Callable[[], Tensor], moved: list[Tensor], direction: list[Tensor], step: float) -> float:
    """Central difference of a scalar along a direction."""
    values = []
    with torch.no_grad():
        for sign in (1, -2):
            for tensor, part in zip(moved, direction, strict=True):
                tensor.add_(part, alpha=sign * step)
            values.append(float(value().double()))
        for tensor, part in zip(moved, direction, strict=True):
            tensor.add_(part, alpha=step)
    return (values[0] - values[1]) / (2 * step)


@pytest.mark.parametrize("variant", ["sd15", "xs"])
def test_gradients_are_the_slopes_of_the_loss(loaded_studio: Studio, variant: str) -> None:
    """Slopes along the gradient itself, and along it in only the encoder or the differences: all
    parts must be right.
    """
    controlled = controlled_on(loaded_studio.model, variant=variant, trainable="to_out")
    named = {f"control.{n}": p for n, p in controlled.net.named_parameters()}
    named |= {f"unet.{n}": p for n, p in controlled.differences.parameters.items()}
    shaken(named, 0.01)
    given = Forward.on(controlled)
    target = torch.randn(given.noisy.shape, generator=torch.Generator().manual_seed(9))

    def loss() -> Tensor:
        return (given.through(controlled) - target).double().square().mean()

    gradients = dict(zip(named, torch.autograd.grad(loss(), list(named.values())), strict=True))
    for part in ("control.", "unet."):
        chosen = [name for name in named if name.startswith(part)]
        if not chosen:
            continue
        length = torch.stack([gradients[name].norm() for name in chosen]).norm()
        direction = [gradients[name] / length for name in chosen]
        found = slope(loss, [named[name].data for name in chosen], direction, STEP)
        assert found == pytest.approx(float(length), rel=CENTRAL), part


@WHOLE_ALONE
@pytest.mark.parametrize("variant", ["sd15", "xs"])
@pytest.mark.parametrize("settings", [{"checkpointing": True}, {"checkpointing": True, "offload": True}], ids=str)
def test_less_memory_gives_the_same_gradients(loaded_studio: Studio, variant: str, settings: dict[str, bool]) -> None:
    base = base_of(loaded_studio)
    found = []
    for more in ({}, settings):
        loop = loop_on(base, small(variant=variant, **more))
        shaken(loop.parameters, 0.01)
        found.append(gradients_of(loop))
    assert same(*found)


def test_checkpointing_keeps_less_for_the_backward_pass(loaded_studio: Studio) -> None:
    kept = []
    for checkpointing in (False, True):
        controlled = controlled_on(loaded_studio.model, checkpointing=checkpointing)
        given, held = Forward.on(controlled), [0]

        def pack(tensor: Tensor, held: list[int] = held) -> Tensor:
            held[0] += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            given.through(controlled)
        kept.append(held[0])
    assert kept[1] < 0.5 * kept[0]


def test_checkpointing_keeps_little_of_the_encoder(loaded_studio: Studio) -> None:
    kept = []
    for checkpointing in (False, True):
        control: Any = controlled_on(loaded_studio.model, checkpointing=checkpointing).control
        hint = picture().movedim(-1, 1).contiguous()
        with Allocations([hint, *control.net.parameters()]) as made:
            encoded = control._encode(hint, torch.ones(1), (CELLS // 2, CELLS // 2))
        kept.append(sum(size for reference, size in made.live.values() if not reference.expired()))
        assert encoded.requires_grad
    assert kept[1] < 0.3 * kept[0]


def test_the_trainer_trains_on_the_patched_weights(loaded_studio: Studio, tiny: Any) -> None:
    """A LoRA on the MODEL is in the base as the host would have it, and is no part of what trains or is saved."""
    import comfy.model_management
    import comfy.sd

    with torch.inference_mode():
        lora = load_file(tiny.models / "loras" / tiny.names["lora"])
        patched, _ = comfy.sd.load_lora_for_models(loaded_studio.model, None, lora, 0.8, 0.0)
        comfy.model_management.load_models_gpu([patched], force_full_load=True)
        in_use = {name: tensor.clone() for name, tensor in host_weights(patched).items()}
        comfy.model_management.load_models_gpu([loaded_studio.model], force_full_load=True)
        without = {name: tensor.clone() for name, tensor in host_weights(loaded_studio.model).items()}
    changed = {name for name in in_use if not torch.equal(in_use[name], without[name])}
    assert len(changed) > 5
    controlled = controlled_on(patched)
    weights = {
        name: controlled.unet.get_parameter(name) for name in in_use if name not in controlled.differences.parameters
    }
    for name in controlled.differences.parameters:
        path, _, leaf = name.rpartition(".")
        weights[name] = getattr(controlled.unet.get_submodule(path), leaf)
    assert same(weights, in_use)
    assert not any(bool(t.any()) for t in controlled.published_differences().values())
    shaken(controlled.differences.parameters)
    given = Forward.on(controlled)
    given.through(controlled).sum().backward()
    assert same(host_weights(loaded_studio.model), without), "the host's weights are only read"


def test_a_model_of_another_kind_and_a_missing_encoder_are_refused(loaded_studio: Studio, loaded_sdxl: Any) -> None:
    with pytest.raises(ValueError, match="sd15"):
        controlled_on(loaded_sdxl, variant="sd15")
    with pytest.raises(ValueError, match="sdxl"):
        controlled_on(loaded_studio.model, variant="sdxl")
    base = base_of(loaded_studio)
    base.clip = None
    with pytest.raises(ConfigError, match="clip: this base needs its text encoder"):
        base.check()
    base.vae = None
    with pytest.raises(ConfigError, match="vae: the checkpoint holds none"):
        base.check()


def test_a_file_of_a_lora_is_part_of_the_identity_of_no_base(loaded_studio: Studio, tmp_path: Path) -> None:
    """States are of a checkpoint; other weights have another identity, the same have the same."""
    import comfy.sd

    other = tiny_models.make_sd15(tmp_path / "other.ckpt", seed=1)
    with torch.inference_mode():
        model = comfy.sd.load_checkpoint_guess_config(str(other), output_vae=False, output_clip=False)[0]
    mine = base_of(loaded_studio)
    assert (
        mine.identity("model")
        == base_of(loaded_studio).identity("model")
        != base_of(loaded_studio, model).identity("model")
    )
    assert mine.identity("vae") != mine.identity("text")

"""Sampling on the real host in this process: a small checkpoint, its prompts, and both doors of a control.

Sizes are in latent cells: 8 is a picture of 64 x 64 pixels. Everything runs on the CPU in fp32 unless a test says
otherwise, so that "equal" can mean bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

CELLS = 8
SEED = 1
REASSOCIATED = 1e-5
"""Relative difference of runs that add the same fp32 numbers in another order or in other batches."""


def relative(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|."""
    return float((found - expected).norm() / expected.norm())


def picture(seed: int = 0, count: int = 1, channels: int = 3, side: int = 8 * CELLS) -> Tensor:
    """A hint as an IMAGE, (count, side, side, channels) in [0, 1]: smooth random shapes."""
    coarse = torch.rand(count, channels, 5, 5, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear").movedim(1, -1).contiguous()


@dataclass
class Studio:
    """A loaded SD1.5 checkpoint and everything needed to sample it, with and without control."""

    files: Path
    model: Any
    clip: Any
    vae: Any
    positive: Any
    negative: Any
    cache: Any
    """The features kept between runs."""

    def encode(self, text: str) -> Any:
        """A prompt as CONDITIONING."""
        import nodes as host_nodes

        return host_nodes.CLIPTextEncode().encode(self.clip, text)[0]

    def load(self, control: str = "gen2.safetensors", weights: str = "none", model: Any = None, **options: Any) -> Any:
        """Load ControlNeXt on the checkpoint, without UNet weights unless told."""
        from comfyui_controlnext.controlnext_core.comfy_adapter.files.loading import load_controlnext

        return load_controlnext(model or self.model, self.files / control, weights, **options)

    def sample(
        self,
        model: Any = None,
        positive: Any = None,
        negative: Any = None,
        *,
        seed: int = SEED,
        steps: int = 2,
        cfg: float = 4.0,
        cells: int = CELLS,
        batch: int = 1,
        first: int = 0,
        sampler: str = "euler",
        latent: Tensor | None = None,
    ) -> Tensor:
        """KSampler: latents (batch, 4, cells, cells). `first`: the noise of which image of a larger batch to use."""
        import nodes as host_nodes

        start = torch.zeros(batch, 4, cells, cells) if latent is None else latent
        whole = {"samples": start, "batch_index": list(range(first, first + batch))}
        conds = (positive or self.positive, negative or self.negative)
        (result,) = host_nodes.KSampler().sample(
            model or self.model, seed, steps, cfg, sampler, "normal", *conds, whole
        )
        return result["samples"]

    def guide(self, guider: Any, steps: int = 2) -> Tensor:
        """SamplerCustomAdvanced's work with any guider: latents of one image."""
        import comfy.samplers

        sigmas = comfy.samplers.calculate_sigmas(self.model.get_model_object("model_sampling"), "normal", steps)
        noise = torch.randn(1, 4, CELLS, CELLS, generator=torch.Generator().manual_seed(SEED))
        return guider.sample(noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas, seed=SEED)

    def stock(self, control: Any, hint: Tensor, strength: float = 1.0, start: float = 0.0, end: float = 1.0) -> Any:
        """The stock Apply node on both prompts: (positive, negative)."""
        return self.apply_to(self.positive, self.negative, control, hint, strength, start, end)

    def apply_to(self, positive: Any, negative: Any, control: Any, hint: Tensor, *settings: float) -> Any:
        """The stock Apply node on any pair of conditionings."""
        import nodes as host_nodes

        return host_nodes.ControlNetApplyAdvanced().apply_controlnet(
            positive, negative, control, hint, *(settings or (1.0, 0.0, 1.0))
        )

    def ours(
        self,
        model: Any,
        control: Any,
        hint: Tensor,
        strength: float = 1.0,
        start: float = 0.0,
        end: float = 1.0,
        mask: Tensor | None = None,
    ) -> Any:
        """The node ControlNeXtApply: a MODEL."""
        from comfyui_controlnext.nodes.apply import ControlNeXtApply

        return ControlNeXtApply.execute(model, control, hint, strength, start, end, mask)[0]

    def options(self, control: Any, apply_to: str = "auto", mask: Tensor | None = None, schedule: str = "") -> Any:
        """The node ControlNeXtOptions: a CONTROL_NET."""
        from comfyui_controlnext.nodes.apply import ControlNeXtOptions

        return ControlNeXtOptions.execute(control, apply_to, mask, schedule)[0]

    def through_both(self, loaded: Any, hint: Tensor, control: Any = None, **settings: float) -> tuple[Tensor, Tensor]:
        """Latents of the same control through (the stock Apply node, ControlNeXtApply)."""
        control = control or loaded.control
        conds = self.stock(control, hint, **settings)
        return self.sample(loaded.model, *conds), self.sample(self.ours(loaded.model, control, hint, **settings))


def make_files(folder: Path) -> Path:
    """The control files that several tests use."""
    from comfyui_controlnext.tools import tiny_models

    tiny_models.make_controlnext(folder / "gen2.safetensors", "gen2")
    tiny_models.make_controlnext(folder / "other.safetensors", "gen2", seed=7)
    return folder


def demo_pair(studio: Studio, model: Any = None) -> Any:
    """An encoder with its UNet weights beside it, loaded on the checkpoint or on `model`."""
    from comfyui_controlnext.tools.tiny_models import make_controlnext, make_unet_difference

    folder = studio.files / "pair"
    if not folder.is_dir():
        make_controlnext(folder / "controlnet.safetensors", "gen2")
        make_unet_difference(folder / "unet.safetensors")
    return studio.load("pair/controlnet.safetensors", "auto", model)


@pytest.fixture(scope="session")
def loaded_studio(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Studio:
    """The checkpoint, loaded once per session."""
    import comfy.sd
    from comfyui_controlnext.controlnext_core.comfy_adapter.sampling.features import CACHE

    import nodes as host_nodes

    path = tiny.models / "checkpoints" / tiny.names["checkpoint"]
    with torch.inference_mode():
        model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(path), output_vae=True, output_clip=True)
        prompts = [host_nodes.CLIPTextEncode().encode(clip, text)[0] for text in ("a cat", "")]
    return Studio(make_files(tmp_path_factory.mktemp("controls")), model, clip, vae, *prompts, CACHE)


@pytest.fixture
def studio(loaded_studio: Studio) -> Iterator[Studio]:
    """The studio as one run of the host finds it: inference mode, nothing cached, every line still unlogged."""
    from comfyui_controlnext.controlnext_core.comfy_adapter import feedback

    budgets = dict(loaded_studio.cache.budgets)
    loaded_studio.cache.clear()
    feedback.log_once.cache_clear()
    with torch.inference_mode():
        yield loaded_studio
    loaded_studio.cache.budgets = budgets


@pytest.fixture
def plain(studio: Studio) -> Tensor:
    """Result of the checkpoint without control."""
    return studio.sample()


def forbid_batching(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the host run conditionings one after another, as on a device with no memory for two."""
    import comfy.model_base

    monkeypatch.setattr(comfy.model_base.BaseModel, "memory_required", lambda self, *args, **kwargs: 1e30)


def counted_calls(loaded: Any) -> AbstractContextManager[list[int]]:
    """Rows that the encoder is given, one entry per pass for a timestep."""
    return counted_passes(loaded.control.net.patcher.model)


@contextmanager
def counted_passes(net: Any) -> Iterator[list[int]]:
    """As `counted_calls`, of a network."""
    calls: list[int] = []
    finish = net.finish

    def counted(begun: Any, timestep: Tensor) -> Tensor:
        calls.append(begun.first_half.shape[0])
        return finish(begun, timestep)

    net.finish = counted
    try:
        yield calls
    finally:
        del net.finish

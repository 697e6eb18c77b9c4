"""Transformers in the host's sampler: a narrow model of each family, its prompts, its controls and both doors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.controlnext_core import checkpoint
from comfyui_controlnext.controlnext_core.specs import SPECS
from comfyui_controlnext.tests import reference_controlnext as released
from comfyui_controlnext.tests import reference_transformers as reference
from comfyui_controlnext.tests.transformer_fixtures import NARROW, narrow_model
from torch import Tensor

FAMILIES = tuple(name for name, spec in SPECS.items() if spec.on_transformer)
CELLS = 8
each = pytest.mark.parametrize("family", FAMILIES)


def in_turn(name: str, values: Sequence[Any], families: Sequence[str] = FAMILIES) -> pytest.MarkDecorator:
    """Every family with every value of this argument: the first family with all of them, each other with one in turn.

    The rest is `long`: for values whose way through the code is the same in every family.
    """
    return pytest.mark.parametrize(
        ("family", name),
        [
            pytest.param(
                family,
                value,
                marks=() if not place or index == place % len(values) else pytest.mark.long,
                id=f"{family}-{value}",
            )
            for place, family in enumerate(families)
            for index, value in enumerate(values)
        ],
    )


class TransformerStage:
    """A family's narrow model as a MODEL, its prompts, and a control of it."""

    def __init__(self, family: str, folder: Path) -> None:
        from comfy.model_patcher import ModelPatcher

        self.family, self.row, self.folder = family, NARROW[family], folder
        self.model = ModelPatcher(narrow_model(family), torch.device("cpu"), torch.device("cpu"))
        self.positive, self.negative = self.prompt(7, 1), self.prompt(9, 2)

    def prompt(self, tokens: int, seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        text = torch.randn(1, tokens, self.row.text, generator=generator)
        pooled = torch.randn(1, self.row.pooled, generator=generator) if self.row.pooled else None
        return [[text, {"pooled_output": pooled}]]

    def file(self, seed: int = 11, weights: dict[str, Tensor] | None = None, slices: str = "{}") -> Path:
        path = self.folder / f"{self.family} {seed} {bool(weights)}.safetensors"
        if not weights and path.exists():  # nothing else is in it
            return path
        encoder = _encoder(reference.FAMILIES[self.family].build, seed, self.row.width)
        if weights:
            encoder = {f"controlnext.{name}": tensor for name, tensor in encoder.items()}
            encoder |= {f"base.{name}": tensor for name, tensor in weights.items()}
        return checkpoint.save(path, encoder, {"controlnext.spec": self.family, "controlnext.slices": slices})

    def load(
        self,
        seed: int = 11,
        model: Any = None,
        weights: dict[str, Tensor] | None = None,
        slices: str = "{}",
        **options: Any,
    ) -> Any:
        from comfyui_controlnext.controlnext_core.comfy_adapter.files.loading import load_controlnext

        return load_controlnext(model or self.model, self.file(seed, weights, slices), **options)

    def sample(
        self,
        model: Any = None,
        conds: Any = None,
        *,
        steps: int = 2,
        cfg: float = 3.0,
        batch: int = 1,
        first: int = 0,
        length: int = 1,
    ) -> Tensor:
        """length: latent frames, where the family has some."""
        import nodes as host_nodes

        frames = (length,) if self.row.frames else ()
        latent = torch.zeros(batch, self.row.channels, *frames, CELLS, CELLS)
        whole = {"samples": latent, "batch_index": list(range(first, first + batch))}
        positive, negative = conds or (self.positive, self.negative)
        (result,) = host_nodes.KSampler().sample(
            model or self.model, 1, steps, cfg, "euler", "normal", positive, negative, whole
        )
        return result["samples"]

    def guide(self, guider: Any, steps: int = 2) -> Tensor:
        """Latents of one picture, sampled with a guider as SamplerCustomAdvanced does."""
        import comfy.samplers

        sigmas = comfy.samplers.calculate_sigmas(self.model.get_model_object("model_sampling"), "normal", steps)
        frames = (1,) if self.row.frames else ()
        noise = torch.randn(1, self.row.channels, *frames, CELLS, CELLS, generator=torch.Generator().manual_seed(1))
        return guider.sample(noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas, seed=1)

    def stock(self, control: Any, hint: Tensor, *settings: float) -> Any:
        import nodes as host_nodes

        return host_nodes.ControlNetApplyAdvanced().apply_controlnet(
            self.positive, self.negative, control, hint, *(settings or (1.0, 0.0, 1.0))
        )

    def ours(self, control: Any, hint: Tensor, *settings: float, model: Any = None, mask: Tensor | None = None) -> Any:
        from comfyui_controlnext.nodes.apply import ControlNeXtApply

        return ControlNeXtApply.execute(model or self.model, control, hint, *(settings or (1.0, 0.0, 1.0)), mask)[0]

    def options(self, control: Any, apply_to: str = "auto", mask: Tensor | None = None, schedule: str = "") -> Any:
        """The node ControlNeXtOptions: a CONTROL_NET."""
        from comfyui_controlnext.nodes.apply import ControlNeXtOptions

        return ControlNeXtOptions.execute(control, apply_to, mask, schedule)[0]


@functools.cache
def _encoder(build: str, seed: int, width: int) -> dict[str, Tensor]:
    return released.random_weights(build, seed=seed, out=width)


@functools.cache
def _stage(family: str, folder: Path) -> TransformerStage:
    return TransformerStage(family, folder)


@pytest.fixture(scope="session")
def stage_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("controls")


@pytest.fixture
def stage(stage_folder: Path) -> Iterator[Callable[[str], TransformerStage]]:
    """A family's stage as a run of the host finds it: inference mode, nothing cached, every line still unlogged."""
    from comfyui_controlnext.controlnext_core.comfy_adapter import feedback
    from comfyui_controlnext.controlnext_core.comfy_adapter.sampling.features import CACHE

    CACHE.clear()
    feedback.log_once.cache_clear()
    with torch.inference_mode():
        yield lambda family: _stage(family, stage_folder)

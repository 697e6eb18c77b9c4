"""ControlNet-XS at the released sizes through the loader, and on a small SDXL through the host's sampler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.controlnext_core.xs_specs import RELEASES, XSRelease
from comfyui_controlnext.tests.fixtures.sampling_fixtures import picture, relative
from comfyui_controlnext.tools import tiny_models
from comfyui_controlnext.tools.tiny_models.storage import Pools, save
from comfyui_controlnext.tools.tiny_models.text_and_vae import fill
from torch import Tensor

pytestmark = pytest.mark.comfy


def load(path: Path) -> Any:
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.xs_loading import load_controlnet_xs

    return load_controlnet_xs(path)


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)
def test_every_released_size_loads_strictly(release: XSRelease, tmp_path: Path) -> None:
    """Full shapes, in a file whose tensors share their storage."""
    shapes = tiny_models.xs_shapes(tiny_models.RELEASED_XS[release.name])
    loaded = load(save(tmp_path / "xs.ckpt", fill(Pools(0), shapes)))
    parameters = list(loaded.control.loaded.net.parameters())
    assert sum(parameter.numel() for parameter in parameters) == release.parameters
    assert not any(parameter.is_meta for parameter in parameters)
    assert f"released size {release.name}" in loaded.report


@torch.inference_mode()
def test_sdxl_with_an_own_time_embedding_beside_its_labels(tmp_path: Path) -> None:
    """The pooled text goes into the labels, which are added after the time embeddings were mixed."""
    import comfy.sd
    from comfyui_controlnext.nodes.apply import ControlNeXtApply

    import nodes as host_nodes

    path = tiny_models.make_sdxl(tmp_path / "sdxl.ckpt", clip=False)
    model = comfy.sd.load_checkpoint_guess_config(str(path), output_vae=False, output_clip=False)[0]
    control = load(tiny_models.make_controlnet_xs(tmp_path / "xs.safetensors", "sdxl", own_time=True)).control
    g = torch.Generator().manual_seed(0)
    prompts = [
        [[torch.randn(1, 77, 2048, generator=g), {"pooled_output": torch.randn(1, 1280, generator=g)}]] for _ in "pn"
    ]

    def sample(model: Any, conds: Any) -> Tensor:
        latent = {"samples": torch.zeros(1, 4, 8, 8)}
        return host_nodes.KSampler().sample(model, 1, 2, 4.0, "euler", "normal", *conds, latent)[0]["samples"]

    plain = sample(model, prompts)
    stock = host_nodes.ControlNetApplyAdvanced().apply_controlnet(*prompts, control, picture(), 0.7, 0.0, 1.0)
    controlled = sample(model, stock)
    assert torch.equal(
        controlled, sample(ControlNeXtApply.execute(model, control, picture(), 0.7, 0.0, 1.0)[0], prompts)
    )
    assert relative(controlled, plain) > 0.01
    assert torch.equal(sample(model, prompts), plain)

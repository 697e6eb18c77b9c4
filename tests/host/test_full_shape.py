"""Full size: SD1.5's whole UNet and a released encoder's shapes, through the stock loader."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.tests.fixtures.sampling_fixtures import Studio, picture, relative
from comfyui_controlnext.tools import tiny_models
from torch import Tensor

pytestmark = pytest.mark.comfy

PARAMETERS = 859_520_964


@pytest.fixture
def whole_unet(studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """MODEL from the stock UNet loader, freed afterwards: it takes 3.4 GB."""
    import comfy.model_management
    import folder_paths

    import nodes as host_nodes

    tiny_models.make_sd15_full_unet(tmp_path / "whole.pt")
    table = {**folder_paths.folder_names_and_paths, "diffusion_models": ([str(tmp_path)], {".pt"})}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", table)
    loaded = [host_nodes.UNETLoader().load_unet("whole.pt", "default")[0]]
    yield loaded[0]
    loaded.clear()
    comfy.model_management.unload_all_models()
    gc.collect()


def test_one_controlled_step_of_the_whole_sd15_unet(
    studio: Studio, whole_unet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from comfyui_controlnext.controlnext_core.comfy_adapter.sampling import next_forward

    unet = whole_unet.model.diffusion_model
    assert sum(p.numel() for p in unet.parameters()) == PARAMETERS
    loaded = studio.load(model=whole_unet)
    added: list[Tensor] = []
    fuse = next_forward.fuse
    monkeypatch.setattr(next_forward, "fuse", lambda h, terms: (added.append(fuse(h, terms)), added[-1])[1])
    received: list[Tensor] = []
    after_the_downsampler = unet.input_blocks[4][0]
    handle = after_the_downsampler.register_forward_pre_hook(lambda _, inputs: received.append(inputs[0]))
    found = studio.sample(studio.ours(loaded.model, loaded.control, picture()), steps=1)
    handle.remove()
    assert [tuple(h.shape) for h in added] == [(2, 320, 4, 4)]
    assert torch.equal(received[0], added[0])
    assert found.isfinite().all()
    assert relative(found, studio.sample(whole_unet, steps=1)) > 1e-4

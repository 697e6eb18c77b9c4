"""Interrupted training on a transformer saves the complete steps, and ends as an uninterrupted run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from comfyui_controlnext.controlnext_training.base_model.controlled import Controlled
from comfyui_controlnext.controlnext_training.train import Stopped
from comfyui_controlnext.tests.fixtures.narrow_training import narrow_base, train_narrow
from comfyui_controlnext.tests.fixtures.training_fixtures import Watcher, same, same_nested
from comfyui_controlnext.tests.host.test_interruptions import ERRORS
from comfyui_controlnext.tests.training.test_training_interruptions import last, lay_in_class
from safetensors.torch import load_file

pytestmark = pytest.mark.comfy

SETTINGS: dict[str, Any] = {
    "steps": 4,
    "batch_size": 2,
    "ema_decay": 0.9,
    "checkpointing": True,
    "validate_every": 3,
    "validation_samples": 1,
    "validation_steps": 1,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    train_narrow(folder, "sd3", **SETTINGS)
    return folder


def cut(folder: Path, owner: type, name: str, error: str, at: int) -> Watcher:
    """Run that ends with that error in the n-th call of a method; returns its messages."""
    watch = Watcher()
    with pytest.MonkeyPatch.context() as patch:
        lay_in_class(patch, owner, name, ERRORS[error](), at)
        with pytest.raises(Stopped if error == "cancel" else type(ERRORS[error]())) as raised:
            train_narrow(folder, "sd3", watch, **SETTINGS)
    watch.said.append(str(raised.value))
    return watch


@pytest.mark.parametrize(("first", "second"), [("cancel", "exit"), ("ctrl_c", "cancel")])
def test_cut_off_in_a_block_and_in_a_validation_it_ends_as_if_nobody_had(
    whole: Path, tmp_path: Path, first: str, second: str
) -> None:
    """Interruptions in a block's forward, in or before the recomputation of a backward pass, and
    during the pictures.
    """
    block = type(narrow_base("sd3").model.model.diffusion_model.joint_blocks[0])
    calls = 2 * 2  # of a step: two blocks, each again in the backward pass; more where captions differ in length
    watch = cut(tmp_path, block, "forward", first, 3 * calls)
    done = last(tmp_path).step
    assert 1 <= done <= 2 and watch.logged(f"stopped after {done} steps; saved in ")
    watch = cut(tmp_path, Controlled, "denoised", second, 2)  # averaged weights are in
    assert last(tmp_path).step == 3 and watch.logged("stopped after 3 steps; saved in ")
    path = train_narrow(tmp_path, "sd3", **SETTINGS)
    assert same_nested(last(tmp_path).optimizer(), last(whole).optimizer())
    for part in ("weights", "ema", "losses"):
        assert same(last(tmp_path).tensors(part), last(whole).tensors(part)), part
    assert same(load_file(path), load_file(whole / "out" / "control.safetensors"))

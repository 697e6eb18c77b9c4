"""Bases whose files are in fp8, scaled fp8 or int8: loaded by the host's own loader, named, and trained."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.tests.fixtures.narrow_training import base_on, narrow_base
from comfyui_controlnext.tests.fixtures.quantised_fixtures import FP8, SCALED, _stored, formats, quantised_model
from comfyui_controlnext.tests.fixtures.training_fixtures import drawn, loop_on, same, small, take_steps
from comfyui_controlnext.tools.tiny_models.storage import Pools, save
from comfyui_controlnext.tools.tiny_models.text_and_vae import clip_l, taesd
from comfyui_controlnext.tools.tiny_models.tiny_sd3 import CHANNELS, LATENT_SCALE, LATENT_SHIFT, sd3_tensors
from safetensors.torch import save_file
from torch import Tensor

pytestmark = pytest.mark.comfy

PLAIN, MIXED, INT8 = "fp8_e4m3fn", "float8_e4m3fn", "int8_tensorwise"
FILES = (PLAIN, SCALED, MIXED, INT8)
ROUNDING, TRAINED = 1e-5, 1e-4
"""Relative errors of a loss, and of a trained tensor after three steps of Adam, which divides small gradients by
their own size: the host may multiply in another order."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the encoders' files, to which networks are added."""
    folder = tmp_path_factory.mktemp("modèles")
    save(folder / "text.pt", clip_l(Pools(0), "text_model."))
    tensors = taesd(Pools(0), "", LATENT_SCALE, LATENT_SHIFT, CHANNELS)
    save(folder / "vae.safetensors", {name: tensor.contiguous().clone() for name, tensor in tensors.items()})
    return folder


def matrices(state: dict[str, Tensor], kind: str) -> list[str]:
    """Linear layers that a file has in this format: in scaled fp8 all, in others those of the blocks."""
    start = "" if kind == SCALED else "joint_blocks."
    return [n for n, t in state.items() if n.startswith(start) and n.endswith(".weight") and t.ndim == 2]


def stored_as(kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of a file of this kind, and their values in fp32."""
    state = {name: tensor.float() for name, tensor in sd3_tensors().items()}
    if kind == PLAIN:
        narrow = {name: tensor.to(FP8) for name, tensor in state.items()}
        return narrow, {name: tensor.float() for name, tensor in narrow.items()}
    stored, numbers = dict(state), dict(state)
    for name in matrices(state, kind):
        made = _stored(name, state[name], kind, pinned=False)
        ends = ("scale_weight",) if kind == SCALED else ("weight_scale",)
        scale = made[f"{name.removesuffix('.weight')}.{ends[0]}"]
        stored |= made
        numbers[name] = made[name].float() * scale.float()
    if kind == SCALED:
        stored["scaled_fp8"] = torch.zeros(2, dtype=FP8)
    return stored, numbers


def loaded(folder: Path, network: Path, checkpointing: bool) -> Any:
    from comfyui_controlnext.controlnext_training.base_model.base_files import load_base

    files: dict[str, Any] = {"base": network.name, "clip": ("text.pt",), "vae": "vae.safetensors"}
    return load_base(small(variant="sd3", checkpointing=checkpointing, **files), folder)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", FILES)
def test_the_control_is_that_of_the_numbers_in_fp32(
    kind: str, checkpointing: bool, folder: Path, pinned_host: bool
) -> None:
    """A whole file in that format, and one of the same numbers in fp32: losses and trained weights are equal."""
    if pinned_host and kind in (MIXED, INT8):
        pytest.skip("this host reads no such file")
    stored, numbers = stored_as(kind)
    losses, weights, held = [], [], []
    for name, tensors in (("stored", stored), ("numbers", numbers)):
        save_file(tensors, folder / f"{kind}_{name}.safetensors")
        base = loaded(folder, folder / f"{kind}_{name}.safetensors", checkpointing)
        base.identity("model")
        settings = {"variant": "sd3", "checkpointing": checkpointing, "learning_rate": 1e-3}
        loop = loop_on(base, small(**settings), drawn())
        losses.append(take_steps(loop, 3))
        weights.append({name: parameter.detach() for name, parameter in loop.parameters.items()})
        held.append(bytes_of_blocks(loop.controlled.unet))
    assert losses[0] == pytest.approx(losses[1], rel=ROUNDING)
    for name, tensor in weights[0].items():
        expected = weights[1][name]
        assert float((tensor - expected).norm()) <= TRAINED * max(float(expected.norm()), 1.0), name
    assert held[0] == held[1] / (4 if checkpointing else 1)


def bytes_of_blocks(network: Any) -> int:
    """Bytes of the frozen matrices of the blocks, those under a trained difference included."""
    tensors = [*network.named_parameters(), *network.named_buffers()]
    return sum(
        t.nbytes
        for n, t in tensors
        if n.startswith("joint_blocks.") and t.ndim == 2 and n.endswith((".weight", ".base"))
    )


def today(model: Any) -> str:
    """Identity of a plain model by its first definition, stated again: names, shapes and 64 numbers of each."""
    digest, state = hashlib.blake2b(digest_size=12), model.model.diffusion_model.state_dict()
    for name in sorted(state):
        flat = state[name].reshape(-1)
        digest.update(f"diffusion_model.{name}{list(state[name].shape)}".encode())
        digest.update(flat[:: max(1, flat.numel() // 64)][:64].float().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("family", ["sd3", "qwen_image"])
def test_the_name_of_a_plain_base_is_the_one_it_has_always_had(family: str) -> None:
    """Cached samples and saved runs go by it."""
    base = narrow_base(family)
    assert base_on(base.model.model, family).identity("model") == today(base.model)


@pytest.mark.parametrize("kind", [PLAIN, SCALED, MIXED, "float8_e5m2", "nvfp4", "mxfp8", INT8, "convrot_w4a4"])
def test_a_quantised_base_has_a_name_of_its_numbers(kind: str, pinned_host: bool) -> None:
    if kind not in formats(pinned_host):
        pytest.skip(f"this host has no {kind}")
    names = []
    for change in (0.0, 0.0, 1.0):
        model = quantised_model("z_image", kind, pinned_host)
        bias = next(p for n, p in model.diffusion_model.named_parameters() if n.endswith("norm1.weight"))
        before = bias.data.clone()
        bias.data.copy_(before.float() + change)
        names.append(base_on(model, "z_image").identity("model"))
        bias.data.copy_(before)  # a model of plain fp8 is shared by tests
    assert names[0] == names[1] != names[2]


@pytest.mark.parametrize("kind", [SCALED, MIXED, "float8_e5m2", INT8, "nvfp4", "mxfp8"])
def test_the_network_in_training_computes_with_the_hosts_numbers(kind: str, pinned_host: bool) -> None:
    """Gradients are equal in every bit for every format, stored in a byte or widened."""
    from comfyui_controlnext.tests.fixtures.narrow_training import config_for, scenes
    from comfyui_controlnext.tests.fixtures.training_fixtures import gradients_of

    if kind not in formats(pinned_host):
        pytest.skip(f"this host has no {kind}")
    found, stored = [], []
    for checkpointing in (False, True):
        base = base_on(quantised_model("z_image", kind, pinned_host), "z_image")
        loop = loop_on(base, config_for("z_image", checkpointing=checkpointing), scenes())
        found.append(gradients_of(loop))
        weights = [p for n, p in loop.controlled.unet.named_parameters() if n.endswith("attention.qkv.weight")]
        stored.append({p.dtype.itemsize for p in weights})
    assert same(*found) and stored[0] == {4}
    assert stored[1] == ({4} if kind in ("nvfp4", "mxfp8") else {1})

"""Base of a transformer from files: one for all, or separate network, text encoders and autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.controlnext_training.config import ConfigError
from comfyui_controlnext.tests.fixtures.training_fixtures import drawn, loop_on, same, small, take_steps
from comfyui_controlnext.tools.tiny_models.storage import Pools, save
from comfyui_controlnext.tools.tiny_models.text_and_vae import clip_l, taesd
from comfyui_controlnext.tools.tiny_models.tiny_sd3 import (
    CHANNELS,
    LATENT_SCALE,
    LATENT_SHIFT,
    POOLED,
    make_sd3,
    sd3_shapes,
    sd3_tensors,
)

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with everything in one file, and each part in a separate one."""
    folder = tmp_path_factory.mktemp("modèles")
    make_sd3(folder / "all.ckpt")
    save(folder / "network.safetensors", sd3_tensors())
    save(folder / "text.pt", clip_l(Pools(0), "text_model."))
    tensors = taesd(Pools(0), "", LATENT_SCALE, LATENT_SHIFT, CHANNELS)
    save(folder / "vae.safetensors", {name: tensor.contiguous().clone() for name, tensor in tensors.items()})
    return folder


APART: dict[str, Any] = {"base": "network.safetensors", "clip": ("text.pt",), "vae": "vae.safetensors"}


def loaded(folder: Path, **settings: Any) -> Any:
    from comfyui_controlnext.controlnext_training.base_model.base_files import load_base

    return load_base(small(variant="sd3", **settings), folder)


def test_the_shapes_are_those_of_the_hosts_network() -> None:
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    config: dict[str, Any] = {
        "in_channels": 16,
        "out_channels": 16,
        "depth": 2,
        "input_size": None,
        "adm_in_channels": POOLED,
        "context_embedder_config": {
            "target": "torch.nn.Linear",
            "params": {"in_features": 4096, "out_features": 128},
        },
        "num_patches": 1024,
        "pos_embed_max_size": 32,
        "qk_norm": "rms",
    }
    build = {"device": "meta", "dtype": torch.float32, "operations": comfy.ops.disable_weight_init}
    host = OpenAISignatureMMDITWrapper(**config, **build)
    assert {name: tuple(t.shape) for name, t in host.state_dict().items()} == sd3_shapes()


def test_one_file_and_three_give_the_same_and_encoders_come_back(folder: Path) -> None:
    one, three = loaded(folder, base="all.ckpt"), loaded(folder, **APART)
    for base in (one, three):
        base.check()
    for part in ("model", "vae"):
        assert one.identity(part) == three.identity(part), part
    text = three.clip.encode_from_tokens(three.clip.tokenize("a red house"), return_dict=True)
    assert (text["cond"].shape[-1], text["pooled_output"].shape[-1]) == (4096, 2048)
    three.release()
    assert (three.vae, three.clip) == (None, None)
    again = three.encoder("clip")
    found = again.encode_from_tokens(again.tokenize("a red house"), return_dict=True)
    assert torch.equal(found["cond"], text["cond"])
    picture = torch.rand(1, 64, 64, 3)
    assert torch.equal(three.latent(picture), one.latent(picture))


def test_steps_in_the_files_own_bits_are_steps_in_fp32(folder: Path) -> None:
    losses, weights = [], []
    for checkpointing in (False, True):
        settings = {"variant": "sd3", "checkpointing": checkpointing, "learning_rate": 1e-3}
        loop = loop_on(loaded(folder, checkpointing=checkpointing, **APART), small(**settings), drawn())
        losses.append(take_steps(loop, 2))
        weights.append(loop.parameters)
        stored = {p.dtype for n, p in loop.controlled.unet.named_parameters() if n.endswith("fc1.weight")}
        assert stored == {torch.float16 if checkpointing else torch.float32}
    assert losses[0] == losses[1] and same(*weights)


def test_a_missing_encoder_is_asked_for(folder: Path) -> None:
    for name, message in (
        ("clip", "clip: this base needs its text encoder. .* or set clip to its files"),
        ("vae", "vae: "),
    ):
        with pytest.raises(ConfigError, match=message):
            loaded(folder, **{key: value for key, value in APART.items() if key != name}).check()
    with pytest.raises(ConfigError, match="clip: neither .*absent.safetensors .* text_encoders folder"):
        loaded(folder, **APART | {"clip": ("absent.safetensors",)})

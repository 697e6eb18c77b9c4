"""Demo weights: the parts that must be exact, and the checkpoint in the host's loaders."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from comfyui_controlnext.controlnext_core import picturebook
from comfyui_controlnext.tools.demo_weights import (
    assembling,
    mmdit,
    painter,
    picture_style,
    running,
    shipped,
    unet_base,
    widening,
)
from comfyui_controlnext.tools.demo_weights import autoencoder as ae
from comfyui_controlnext.tools.demo_weights.muon import Muon
from comfyui_controlnext.tools.demo_weights.text_encoder import text_encoder
from comfyui_controlnext.tools.tiny_models.storage import Pools
from comfyui_controlnext.tools.tiny_models.text_and_vae import taesd
from safetensors.torch import load_file
from torch import Tensor, nn

pytestmark = pytest.mark.comfy

WORDS = "a red circle and a blue square on a gray background"
SWAPPED = "a blue circle and a red square on a gray background"
CIRCLE, SQUARE, END, PAD = 3, 7, 12, 13  # places in either, after the start token


@pytest.fixture(scope="module")
def narrow() -> nn.Module:
    """Narrow UNet with random weights."""
    unet = unet_base.new_unet().requires_grad_(False)
    random = torch.Generator().manual_seed(1)
    for value in unet.parameters():
        value.add_(torch.randn(value.shape, generator=random) * (value[0].numel() ** -0.5 if value.ndim > 1 else 0.1))
    return unet


@pytest.fixture(scope="module")
def loaded(narrow: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """Model, clip and vae of the assembled checkpoint, from the loader behind CheckpointLoaderSimple."""
    import comfy.sd

    weights = {name: value.half() for name, value in ae.whole(dict(ae.new_autoencoder().state_dict())).items()}
    path = tmp_path_factory.mktemp("demo") / "base.ckpt"
    assembling.write_checkpoint(path, widening.widen(narrow.state_dict()), weights)
    return comfy.sd.load_checkpoint_guess_config(str(path))[:3]


@torch.no_grad()
def output(unet: nn.Module) -> Tensor:
    random = torch.Generator().manual_seed(2)
    x, words = torch.randn(2, 4, 8, 8, generator=random), torch.randn(2, 77, 768, generator=random)
    return unet(x, torch.tensor([10.0, 800.0]), words, transformer_options=unet_base._options())


def test_the_wide_network_is_detected_as_sd15_and_computes_what_the_narrow_one_does(
    narrow: nn.Module, loaded: tuple[Any, Any, Any]
) -> None:
    model = loaded[0].model
    assert type(model.model_config).__name__ == "SD15"
    assert model.model_config.unet_config["model_channels"] == 2 * unet_base.LAYOUT["model_channels"]
    wide = output(model.diffusion_model.float())
    assert wide.std() > 0.1
    torch.testing.assert_close(wide, output(narrow), atol=2e-5, rtol=0)


def test_a_pair_of_channels_shares_its_weight_unevenly(narrow: nn.Module) -> None:
    name = "input_blocks.1.0.in_layers.2.weight"
    wide = widening.widen(narrow.state_dict())[name]
    share = (wide[:, ::2] / wide.unflatten(1, (-1, 2)).sum(2)).flatten()
    assert share.min() >= 0.24 and share.max() <= 0.76 and share.std() > 0.1


def test_the_lora_that_the_host_applies_is_the_one_that_trained() -> None:
    """Output of the training network with its parametrisations, and of the host's with the file as a stock LoRA."""
    import comfy.lora

    network = mmdit.new_mmdit().requires_grad_(False)
    random = torch.Generator().manual_seed(3)
    for value in network.parameters():
        value.add_(torch.randn(value.shape, generator=random) * 0.05)
    model = _Patched(network)
    text = {"words": torch.randn(2, 9, mmdit.WIDTH, generator=random), "lengths": torch.tensor([9, 7])}
    text["pooled"] = torch.randn(2, mmdit.WIDTH, generator=random)
    x, s = torch.randn(2, mmdit.CHANNELS, 8, 8, generator=random), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        plain = mmdit.predict(network, x, s, text)
        copied = {name: value.clone() for name, value in network.state_dict().items()}
        low_ranks = picture_style.add_low_rank(network, 4)
        before = {name: value.clone() for name, value in copied.items()}
        for low_rank in low_ranks.values():
            low_rank.up.data.normal_(std=0.1, generator=random)
        changed = mmdit.predict(network, x, s, text)
        names = comfy.lora.model_lora_keys_unet(model, {})
        loaded = comfy.lora.load_lora(picture_style.lora_file(low_ranks), names, log_missing=True)
        assert {key.removeprefix("diffusion_model.").removesuffix(".weight") for key in loaded} == low_ranks.keys()
        for key, patch in loaded.items():
            name = key.removeprefix("diffusion_model.")
            copied[name] = comfy.lora.calculate_weight([(1.0, patch, 1.0, None, None)], copied[name], key)
        other = mmdit.new_mmdit()
        other.load_state_dict(copied)
        found = mmdit.predict(other, x, s, text)
    assert (changed - plain).abs().max() > 0.1
    torch.testing.assert_close(found, changed, atol=1e-2, rtol=0)  # the file is in fp16
    fine_tune = assembling.merged(before, picture_style.lora_file(low_ranks))
    torch.testing.assert_close(fine_tune, copied, atol=1e-5, rtol=1e-5)
    assert sum(not torch.equal(fine_tune[name], value) for name, value in before.items()) == len(low_ranks)


class _Patched:
    """Model with the parts that the host's `model_lora_keys_unet` reads: names of tensors, and a configuration."""

    def __init__(self, network: nn.Module) -> None:
        self._names = {f"diffusion_model.{name}": value for name, value in network.state_dict().items()}
        self.model_config = SimpleNamespace(unet_config={})

    def state_dict(self) -> dict[str, Tensor]:
        return self._names


def test_dusk_is_violet_above_and_red_below_and_keeps_what_is_drawn() -> None:
    plain = picturebook.draw(3, 1, 192).image
    dusk = picture_style.at_dusk(plain)
    assert dusk.shape == plain.shape and dusk.dtype == plain.dtype
    white = picture_style.at_dusk(np.full((4, 4, 3), 255, np.uint8))
    assert white[0, 0].tolist() == [153, 107, 207] and white[3, 3].tolist() == [255, 163, 143]
    light = np.asarray([0.299, 0.587, 0.114])
    assert np.corrcoef((plain @ light).flatten(), (dusk @ light).flatten())[0, 1] > 0.9


def test_random_light_differs_by_picture_channel_and_height_and_is_repeated_by_its_seed() -> None:
    white = torch.full((16, 3, 9, 4), 255, dtype=torch.uint8)
    lit = ae.in_random_light(white, torch.Generator().manual_seed(1))
    assert lit.dtype == torch.uint8 and lit.shape == white.shape
    assert torch.equal(lit, ae.in_random_light(white, torch.Generator().manual_seed(1)))
    top, middle, bottom = (lit[:, :, row, 0].double() for row in (0, 4, 8))
    assert ((lit == lit[..., :1]).all()) and len(top.flatten().unique()) > 20 and (top - bottom).abs().max() > 60
    assert top.min() >= 255 * ae.DARKEST - 1 and bottom.min() >= 255 * ae.DARKEST - 1
    unclipped = (top < 255) & (bottom < 255)
    torch.testing.assert_close(middle[unclipped], (top + bottom)[unclipped] / 2, atol=1.0, rtol=0)
    black = ae.in_random_light(torch.zeros_like(white), torch.Generator().manual_seed(2)).double()
    assert 0 < black.max() <= 255 * ae.HAZE + 1 and (black == black[:, :, :1, :1]).all()


@pytest.mark.parametrize("module", [ae, painter], ids=["4 channels", "16 channels"])
def test_a_decoder_is_trained_on_alone_with_pictures_in_other_light(
    module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(running, "FOLDER", tmp_path)
    monkeypatch.setattr(module, "PICTURES", 2)
    monkeypatch.setattr(ae, "BATCH", 3)
    seen: list[Tensor] = []
    crops = ae.crops

    def recorded(drawn: list[Tensor], count: int, random: torch.Generator) -> Tensor:
        seen.extend(drawn)
        return crops(drawn, count, random)

    monkeypatch.setattr(ae, "crops", recorded)
    file = module.train_decoder(steps=2)
    start = shipped.read_packed(shipped.SHIPPED / (shipped.AUTOENCODER if module is ae else shipped.PAINTER))[0]
    trained = load_file(file)
    changed = {name for name, value in trained.items() if name in start and not torch.equal(value, start[name])}
    assert changed and all(name.startswith("taesd_decoder") for name in changed), changed
    assert [len(pictures) for pictures in seen[:3]] == [2, 2, 2]
    light, plain = seen[2].double(), seen[0].double()
    assert light.shape == plain.shape and (light.mean((2, 3)) - plain.mean((2, 3))).abs().max() > 10


def test_a_print_has_four_inks_and_keeps_what_is_drawn() -> None:
    gray = np.linspace(0, 255, 256).round().astype(np.uint8)[None, :, None].repeat(3, axis=2)
    printed = picture_style.as_print(gray)[0].astype(int)
    assert printed[0].tolist() == [22, 30, 70] and printed[-1].tolist() == [253, 246, 222]
    assert printed[30].tolist() == [22, 30, 70]  # at DARK
    assert (np.diff(printed, axis=0) >= 0).all() and (np.abs(printed - [34, 110, 140]).max(1) <= 1).any()
    plain = picturebook.draw(3, 1, 192).image
    light = np.asarray(picture_style.LUMINANCE)
    assert np.corrcoef((plain @ light).flatten(), (picture_style.as_print(plain) @ light).flatten())[0, 1] > 0.95


def test_a_word_says_what_stood_before_it_and_the_end_says_everything(loaded: tuple[Any, Any, Any]) -> None:
    clip = loaded[1]
    one, two, other = (
        unet_base.context(clip, text) for text in (WORDS, SWAPPED, "a pink triangle on a black background")
    )
    away = (one - two).square().mean(1).sqrt()
    assert away[CIRCLE] > 0.4 and away[SQUARE] > 0.4  # the same word behind another colour
    assert away[0] == 0
    assert (one - other)[PAD].square().mean().sqrt() > 0.1
    assert 0.8 < one.std() < 1.1


def test_the_text_encoder_is_the_same_in_every_file() -> None:
    """Encoder in a separate file, with which the base trains, equals that in its checkpoint."""
    alone, inside = text_encoder("text_model."), text_encoder(assembling.TEXT_PREFIX)
    assert {name.removeprefix(assembling.TEXT_PREFIX) for name in inside} == {
        n.removeprefix("text_model.") for n in alone
    }
    for name, value in alone.items():
        assert torch.equal(value, inside[assembling.TEXT_PREFIX + name.removeprefix("text_model.")]), name


def test_many_captions_at_once_are_what_the_stock_node_encodes(loaded: tuple[Any, Any, Any]) -> None:
    clip = loaded[1]
    torch.testing.assert_close(
        unet_base.contexts_of(clip, [WORDS, ""])[1], unet_base.context(clip, ""), atol=1e-5, rtol=0
    )


def test_latents_are_as_the_unet_sees_them(loaded: tuple[Any, Any, Any]) -> None:
    """The host multiplies what its VAE encodes by the latent format's factor; the training does not."""
    model, _, vae = loaded
    start = ae.new_autoencoder().requires_grad_(False)
    picture = torch.from_numpy(unet_base.draw(0, 0, 64).image)[None].float() / 255
    seen = model.model.process_latent_in(vae.encode(picture))
    torch.testing.assert_close(seen, ae.encode(start, picture.permute(0, 3, 1, 2)), atol=0.02, rtol=0)


def test_idle_blocks_of_the_autoencoder_pass_what_enters() -> None:
    from comfy.taesd.taesd import TAESD

    start = ae.new_autoencoder().requires_grad_(False)
    whole = TAESD()
    whole.load_state_dict(ae.whole(dict(start.state_dict())))
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        torch.testing.assert_close(
            whole.taesd_decoder(whole.taesd_encoder(picture)), ae.decode(start, ae.encode(start, picture))
        )
    assert len(taesd(Pools(0), "", 1.0)) > len(start.state_dict())


def test_the_autoencoder_starts_from_the_principal_components_of_the_wider_one() -> None:
    wide = painter.new_painter().requires_grad_(False)
    random = torch.Generator().manual_seed(6)
    for name in ("taesd_encoder.14.weight", "taesd_decoder.1.weight"):
        wide.get_parameter(name).normal_(std=0.1, generator=random)
    pictures = torch.rand(6, 3, 64, 64, generator=random)
    latents = ae.encode(wide, pictures)
    narrow = ae.new_autoencoder().requires_grad_(False)
    narrow.load_state_dict(ae.narrowed(dict(wide.state_dict()), latents))
    found = ae.encode(narrow, pictures)
    rows = found.transpose(0, 1).flatten(1)
    torch.testing.assert_close(torch.cov(rows), torch.eye(ae.CHANNELS), atol=1e-3, rtol=0)
    torch.testing.assert_close(rows.mean(1), torch.zeros(ae.CHANNELS), atol=1e-3, rtol=0)
    centred = latents - latents.mean((0, 2, 3), keepdim=True)
    _, values, vectors = torch.linalg.svd(centred.transpose(0, 1).flatten(1).T, full_matrices=False)
    kept = vectors[: ae.CHANNELS]
    projected = torch.einsum("nchw,kc,kd->ndhw", centred, kept, kept) + latents.mean((0, 2, 3), keepdim=True)
    first, wider = narrow.get_submodule("taesd_decoder.1"), wide.get_submodule("taesd_decoder.1")
    inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))  # the border sees zeros in place of the mean
    torch.testing.assert_close(first(found)[inner], wider(projected)[inner], atol=1e-4, rtol=1e-4)


def test_every_second_noise_level_of_the_base_decides_edges_and_colors(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Tensor] = {}

    def predict(unet: nn.Module, x: Tensor, sigma: Tensor, times: Tensor, contexts: Tensor) -> Tensor:
        seen.update(sigma=sigma, times=times)
        return x

    monkeypatch.setattr(unet_base, "predict", predict)
    table = unet_base.sigmas()
    unet_base.loss_at(nn.Identity(), torch.zeros(64, 4, 8, 8), torch.zeros(0), table, torch.Generator().manual_seed(0))
    assert torch.equal(seen["sigma"], table[seen["times"]])
    low, high = unet_base.MIDDLE
    middle = seen["sigma"][1::2]
    assert middle.min() >= low and middle.max() <= high * 1.02 and middle.log().std() > 0.5
    assert torch.equal(seen["times"][::2] * 64 // len(table), torch.arange(0, 64, 2))


def test_the_error_of_the_base_is_that_of_a_velocity_between_latents_and_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Tensor] = {}
    random = torch.Generator().manual_seed(3)
    z, guess = torch.randn(24, 4, 8, 8, generator=random), torch.randn(24, 4, 8, 8, generator=random)

    def predict(unet: nn.Module, x: Tensor, sigma: Tensor, times: Tensor, contexts: Tensor) -> Tensor:
        seen.update(x=x.double(), sigma=sigma.double().view(-1, 1, 1, 1))
        return guess

    monkeypatch.setattr(unet_base, "predict", predict)
    found = unet_base.loss_at(nn.Identity(), z, torch.zeros(0), unet_base.sigmas(), random)
    x, sigma = seen["x"], seen["sigma"]
    noise, share = (x - z) / sigma, sigma / (1 + sigma)
    between, clean = (1 - share) * z + share * noise, x - sigma * guess
    error = (between - clean) / share - (noise - z)
    assert found.item() == pytest.approx(error.square().mean().item(), rel=1e-3)


def test_a_slice_resumes_and_the_next_begins_at_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(running.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(running, "SAVE_EVERY", 0.0)

    def begin() -> tuple[running.Slice, nn.Module]:
        torch.manual_seed(8)
        model = nn.Linear(4, 4)
        stage = running.StageRun("trial", tmp_path)
        return running.Slice(stage, model, Muon(model.named_parameters(), 0.02, 0.1, ("weight",)), 0.9), model

    def train(seconds: float, stop: int | None = None) -> tuple[running.Slice, nn.Module]:
        run, model = begin()
        run.go_on(seconds, tmp_path / "none")
        for step in run.steps(seconds, lambda: (model(torch.eye(4)) - torch.eye(4)).square().mean()):
            if step == stop:
                break
        return run, model

    stopped, before = train(500.0, stop=3)
    resumed, model = begin()
    resumed.go_on(500.0, tmp_path / "none")
    assert (resumed.step, resumed.number, resumed.first) == (3, 0, 0) and resumed.spent == stopped.spent > 0
    torch.testing.assert_close(model.state_dict(), before.state_dict(), atol=0, rtol=0)
    assert torch.equal(resumed.average.weights["weight"], stopped.average.weights["weight"])
    following, _ = begin()
    following.go_on(resumed.spent, tmp_path / "none")
    assert (following.step, following.number, following.first, following.spent) == (3, 1, 3, 0.0)


def test_a_stage_keeps_its_state_and_waits_while_the_file_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = running.StageRun("trial", tmp_path)
    assert stage.load() is None
    stage.save({"step": 3, "weight": torch.ones(2)})
    state = running.StageRun("trial", tmp_path).load()
    assert state is not None and state["step"] == 3
    switch = tmp_path / "PAUSE"
    switch.touch()
    monkeypatch.setenv(running.PAUSE_VARIABLE, str(switch))
    monkeypatch.setattr(running.time, "sleep", lambda seconds: switch.unlink())
    assert running.wait_while_paused() == 2.0
    assert running.wait_while_paused() == 0.0

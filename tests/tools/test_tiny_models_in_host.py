"""Tiny model files in the real host: its loaders accept them, the networks are stable, and controls have an effect."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.tests.fixtures.wrong_files import make_wrong_files
from comfyui_controlnext.tools import tiny_models as tm
from safetensors.torch import load_file
from torch import Tensor

pytestmark = pytest.mark.comfy

MEGABYTE = 1_000_000
# file: (the host's class of its configuration, makes it); the encoders that cost seconds are left out
CHECKPOINTS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "sd15": ("SD15", tm.make_sd15),
    "sd15_inpaint": ("SD15", tm.make_sd15_inpaint),
    "sd15_deep": ("SD15", tm.make_sd15_deep),
    "sdxl": ("Segmind_Vega", lambda path: tm.make_sdxl(path, clip=False)),
    "svd": ("SVD_img2vid", lambda path: tm.make_svd(path, vision=False)),
}
HEAVY_CHECKPOINTS = {
    "sdxl_deep": ("KOALA_700M", tm.make_sdxl_deep),
    "svd_deep": ("SVD_img2vid", tm.make_svd_deep),
}
FRAMES = 2


def relative(new: Tensor, old: Tensor) -> float:
    return float((new - old).norm() / old.norm())


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Load (model, clip, vae) by name with the host's checkpoint loader; each file once."""
    import comfy.sd

    loaded: dict[str, Any] = {}

    def _load(name: str) -> Any:
        if name not in loaded:
            make = (CHECKPOINTS | HEAVY_CHECKPOINTS)[name][1]
            path = make(tmp_path_factory.mktemp("checkpoint") / f"{name}.ckpt")
            loaded[name] = comfy.sd.load_checkpoint_guess_config(str(path), output_clip=name == "sd15")[:3]
        return loaded[name]

    return _load


def predict(model: Any, seed: int = 0, level: float = 500.0, context_seed: int = 0, size: int = 8) -> Tensor:
    """Raw prediction of the UNet for one sample (SVD: FRAMES frames): (B, 4, size, size)."""
    config = model.model.model_config.unet_config
    rows = FRAMES if config["use_temporal_attention"] else 1
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, config["in_channels"], size, size, generator=generator)
    words = torch.Generator().manual_seed(context_seed)
    context = torch.randn(1, 77, config["context_dim"], generator=words).expand(rows, -1, -1)
    more: dict[str, Any] = {}
    if config["adm_in_channels"] is not None:
        more["y"] = torch.randn(1, config["adm_in_channels"], generator=words).expand(rows, -1)
    if rows > 1:
        more |= {"num_video_frames": rows, "image_only_indicator": torch.zeros(1, rows)}
    with torch.inference_mode():
        return model.model.diffusion_model(x, torch.full((rows,), level), context, **more)


def check_unet(model: Any, name: str, config_class: str) -> None:
    """Check the detected class, that every tensor is loaded, and a finite prediction that depends on all inputs."""
    from comfy.model_base import SDXL

    network = model.model.diffusion_model
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    assert type(model.model.model_config).__name__ == config_class
    assert isinstance(model.model, SDXL) == name.startswith("sdxl")
    assert shapes == tm.unet_shapes(tm.LAYOUTS[name])

    largest = [0.0]

    def watch(_module: Any, _inputs: Any, output: Tensor) -> None:
        largest[0] = max(largest[0], float(output.abs().max()))

    hooks = [module.register_forward_hook(watch) for module in network.modules() if not [*module.children()]]
    out = predict(model)
    for hook in hooks:
        hook.remove()
    assert bool(out.isfinite().all()) and 0.1 < float(out.std()) < 3
    assert largest[0] < 1000  # fp16 ends at 65504
    assert relative(predict(model, seed=1), out) > 0.1
    assert relative(predict(model, level=20.0), out) > 0.01
    assert relative(predict(model, context_seed=1), out) > 0.01


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_host_finds_the_family_and_the_prediction_is_sound(name: str, load: Callable[[str], Any]) -> None:
    check_unet(load(name)[0], name, CHECKPOINTS[name][0])


@pytest.mark.long
@pytest.mark.parametrize("name", HEAVY_CHECKPOINTS)
def test_the_host_finds_the_family_of_the_wide_ones(name: str, load: Callable[[str], Any]) -> None:
    check_unet(load(name)[0], name, HEAVY_CHECKPOINTS[name][0])
    width = load(name)[0].model.diffusion_model.middle_block[0].out_channels
    assert width == 1280


@pytest.mark.parametrize("name", ["sd15", "sd15_deep", "sd15_full", "sdxl", "sdxl_deep"])
def test_attention_names_agree_with_the_host(name: str) -> None:
    from comfy.model_detection import detect_unet_config
    from comfy.utils import unet_to_diffusers

    meta = {key: torch.empty(shape, device="meta") for key, shape in tm.unet_shapes(tm.LAYOUTS[name]).items()}
    host_names = unet_to_diffusers(detect_unet_config(meta, ""))
    ours = {theirs: ldm for ldm, theirs, _ in tm.attention_layers(tm.LAYOUTS[name])}
    tail = ".attn1.to_q.weight"
    theirs = {key.removesuffix(tail): value.removesuffix(tail) for key, value in host_names.items() if tail in key}
    assert ours == theirs


def test_the_full_unet_is_sd15s(tmp_path: Path) -> None:
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from comfy.model_detection import detect_unet_config, model_config_from_unet_config

    tensors = torch.load(tm.make_sd15_full_unet(tmp_path / "unet.pt"), weights_only=True)
    config = model_config_from_unet_config(detect_unet_config(tensors, ""))
    with torch.device("meta"):
        network = UNetModel(**config.unet_config, operations=comfy.ops.disable_weight_init)
    assert type(config).__name__ == "SD15"
    assert {k: v.shape for k, v in network.state_dict().items()} == {k: v.shape for k, v in tensors.items()}
    assert sum(value.numel() for value in tensors.values()) == 859_520_964


@pytest.mark.long
def test_the_full_unet_predicts(tmp_path: Path) -> None:
    import comfy.sd

    model = comfy.sd.load_diffusion_model(str(tm.make_sd15_full_unet(tmp_path / "unet.pt")))
    out = predict(model)
    assert bool(out.isfinite().all()) and 0.1 < float(out.std()) < 3


@pytest.mark.long
def test_the_big_encoders_encode(tmp_path: Path) -> None:
    """CLIP-L with CLIP-G of SDXL, and CLIP-H vision of SVD: full size, seconds per prompt or image."""
    import comfy.sd

    _, clip, _, _ = comfy.sd.load_checkpoint_guess_config(str(tm.make_sdxl(tmp_path / "sdxl.ckpt")))
    words, pooled = clip.encode_from_tokens(clip.tokenize("a red house"), return_pooled=True)
    others, _ = clip.encode_from_tokens(clip.tokenize("the blue sea"), return_pooled=True)
    assert (words.shape, pooled.shape) == ((1, 77, 2048), (1, 1280))
    assert bool(words.isfinite().all()) and relative(others, words) > 0.1

    path = tm.make_svd(tmp_path / "svd.ckpt")
    vision = comfy.sd.load_checkpoint_guess_config(str(path), output_clip=False, output_clipvision=True)[3]
    embedded = vision.encode_image(torch.rand(1, 64, 64, 3))["image_embeds"]
    assert embedded.shape == (1, 1024) and bool(embedded.isfinite().all())


def test_the_autoencoder_keeps_colours(load: Callable[[str], Any]) -> None:
    vae = load("sd15")[2]
    image = torch.tensor([0.9, 0.2, 0.1]).expand(1, 64, 64, 3).clone()
    image[:, :, 32:] = torch.tensor([0.1, 0.3, 0.8])
    latent = vae.encode(image)
    decoded = vae.decode(latent).detach()
    assert latent.shape == (1, 4, 8, 8)
    torch.testing.assert_close(decoded[:, 20:44, 4:20], image[:, 20:44, 4:20], rtol=0, atol=0.08)
    torch.testing.assert_close(decoded[:, 20:44, 44:60], image[:, 20:44, 44:60], rtol=0, atol=0.08)


@pytest.fixture(scope="module")
def sample(load: Callable[[str], Any]) -> Callable[..., Tensor]:
    """Sample three steps with the tiny SD1.5 at 128 px; control is applied to both prompts."""
    import comfy.sample

    base, clip, _ = load("sd15")
    prompts = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a red house", "blurred")]

    def _sample(model: Any = base, control: Any = None, control_hint: Tensor | None = None) -> Tensor:
        extra = {}
        if control is not None:
            extra = {"control": control.copy().set_cond_hint(control_hint), "control_apply_to_uncond": False}
        positive, negative = ([[cond, {**rest, **extra}] for cond, rest in prompt] for prompt in prompts)
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            return comfy.sample.sample(
                model, noise, 3, 5.0, "euler", "normal", positive, negative, torch.zeros_like(noise), disable_pbar=True
            )

    return _sample


@pytest.fixture(scope="module")
def bare(sample: Callable[..., Tensor]) -> Tensor:
    """Latent without any control."""
    return sample()


def test_sampling_ends_in_the_range_of_pictures(load: Callable[[str], Any], bare: Tensor) -> None:
    image = load("sd15")[2].decode(bare).detach()
    assert 0.3 < float(bare.std()) * 0.18215 < 3
    assert float(image.std()) > 0.1
    assert float(((image > 0) & (image < 1)).float().mean()) > 0.7  # little is cut off


def test_the_stock_controlnet_follows_its_hint(tmp_path: Path, sample: Callable[..., Tensor], bare: Tensor) -> None:
    import comfy.controlnet

    path = tm.make_stock_controlnet(tmp_path / "controlnet.pth")
    control = comfy.controlnet.load_controlnet(str(path))
    hint = torch.zeros(1, 3, 128, 128)
    hint[:, :, 32:96, 32:96] = 1
    first, second = sample(control=control, control_hint=hint), sample(control=control, control_hint=1 - hint)
    assert path.stat().st_size < 2 * MEGABYTE
    assert 0.05 < relative(first, bare) < 2
    assert relative(second, first) > 0.05


@pytest.mark.parametrize("unet", ["sd15_deep", "sdxl"])
def test_the_other_stock_controlnets_fit_their_unets(unet: str, tmp_path: Path) -> None:
    import comfy.controlnet

    control = comfy.controlnet.load_controlnet(str(tm.make_stock_controlnet(tmp_path / "controlnet.pth", unet)))
    layout = tm.LAYOUTS[unet]
    x, hint = torch.randn(1, 4, 8, 8), torch.rand(1, 3, 64, 64)
    y = None if layout.adm_channels is None else torch.randn(1, layout.adm_channels)
    with torch.inference_mode():
        out = control.control_model(x, hint, torch.tensor([500.0]), torch.randn(1, 77, layout.context_dim), y=y)
    features = [*out["output"], *out["middle"]]
    assert len(out["output"]) == len(layout.channel_mult) * (layout.num_res_blocks + 1)
    assert out["middle"][0].shape[1] == layout.channel_mult[-1] * 320
    assert all(0.01 < float(feature.std()) < 3 for feature in features)


def test_every_key_of_the_lora_is_used_and_it_shows(
    tmp_path: Path,
    load: Callable[[str], Any],
    sample: Callable[..., Tensor],
    bare: Tensor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import comfy.sd

    model = load("sd15")[0]
    lora = load_file(tm.make_lora(tmp_path / "lora.safetensors"))
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    assert len(patched.patches) == len(lora) // 3
    assert not [record for record in caplog.records if "lora" in record.message.lower()]
    assert relative(sample(patched), bare) > 0.05


def test_a_difference_goes_onto_the_model_and_shows(
    tmp_path: Path, load: Callable[[str], Any], sample: Callable[..., Tensor], bare: Tensor
) -> None:
    from comfy.utils import unet_to_diffusers

    model = load("sd15")[0].clone()
    host_names = unet_to_diffusers(model.model.model_config.unet_config)
    tensors = load_file(tm.make_unet_difference(tmp_path / "unet.safetensors"))
    patches = {f"diffusion_model.{host_names[name]}": (value,) for name, value in tensors.items()}
    assert len(model.add_patches(patches)) == len(tensors)
    assert relative(sample(model), bare) > 0.01


def test_the_host_knows_the_sound_wrong_files(tmp_path: Path) -> None:
    import comfy.controlnet

    files = make_wrong_files(tmp_path)
    adapter = comfy.controlnet.load_controlnet(str(files["t2i_adapter"]))
    stock = comfy.controlnet.load_controlnet(str(files["stock_controlnet"]))
    assert isinstance(adapter, comfy.controlnet.T2IAdapter)
    assert isinstance(stock, comfy.controlnet.ControlNet)
    assert comfy.controlnet.load_controlnet(str(files["controlnet_xs"])) is None

"""Scenes, measures and small models of the benchmark `video_outpainting`, and its command."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from comfyui_controlnext.benchmarks import outpainting_base, outpainting_scenes, video_outpainting
from comfyui_controlnext.tools import bench, cli


def test_a_scene_depends_on_its_seed_and_number_alone() -> None:
    first, again = (outpainting_scenes.draw(3, 7, 96, 5) for _ in range(2))
    assert first.frames.shape == (5, 96, 96, 3) and np.array_equal(first.frames, again.frames)
    assert first.caption == again.caption != ""
    others = [outpainting_scenes.draw(3, 8, 96, 5), outpainting_scenes.draw(4, 7, 96, 5)]
    assert all(not np.array_equal(first.frames, other.frames) for other in others)


def test_the_camera_brings_into_view_what_was_beside_the_frame() -> None:
    """The ground of a frame is that of the next one, moved by the pan; what comes in was outside."""
    scene = outpainting_scenes._World(outpainting_scenes.SETTINGS["meadow"], outpainting_scenes.Numbers("a"))
    scene.pan, scene.things = 4.0, []
    one, other = (scene.frame(96, index)[64:].astype(int) for index in (0, 1))  # below the hills, which move slower
    inner = np.abs(one[:, 8:-4] - other[:, 4:-8])
    assert inner.max() <= 2 < np.abs(one - other).max()


def test_every_caption_is_of_words_that_the_text_encoder_has() -> None:
    words = outpainting_base.Words()
    captions = {outpainting_scenes.draw(1, number, 32, 1).caption for number in range(40)}
    assert len(captions) > 20
    for caption in captions:
        found = words.encode_from_tokens(words.tokenize(caption))["cond"]
        spoken = int((found[0].abs().sum(-1) > 0).sum())
        assert found.shape == (1, outpainting_base.PHRASES, outpainting_base.TEXT)
        assert spoken == len(caption.split(", ")) <= outpainting_base.PHRASES


def test_figures_are_those_of_the_painted_part() -> None:
    clip = np.random.default_rng(0).random((5, 32, 32, 3)).astype(np.float32)
    outside = np.zeros((32, 32), bool)
    outside[:, 20:] = True
    inside = clip.copy()
    inside[:, :, :8] = 0  # far enough that no window of SSIM reaches it
    moved = clip.copy()
    moved[1::2, :, 20:] += 0.1
    found = video_outpainting.figures_of({"inside": inside, "moved": moved, "clip": clip}, outside)
    assert found["inside"]["PSNR"] == pytest.approx(120) and found["inside"]["SSIM"] == pytest.approx(1)
    assert found["moved"]["PSNR"] == pytest.approx(-10 * np.log10(2 * 0.01 / 5), abs=1e-3)
    assert found["inside"]["temporal distance"] == pytest.approx(0)
    assert found["moved"]["temporal distance"] == pytest.approx(25.5, abs=1e-3)


class RecordingPainter:
    """Painter whose clips are white, and which records what each was given."""

    def __init__(self) -> None:
        self.vae = self
        self.given: list[tuple[bool, bool]] = []

    def draw(self, caption: str, seed: int, hint: Any = None, known: Any = None) -> np.ndarray:
        self.given.append((hint is not None, known is not None))
        if hint is not None and known is not None:
            assert known[0] is hint
        return np.ones((outpainting_base.FRAMES, outpainting_base.SIDE, outpainting_base.SIDE, 3), np.float32)

    def encode(self, clip: torch.Tensor) -> torch.Tensor:
        return clip

    def decode(self, latent: torch.Tensor) -> np.ndarray:
        return latent.numpy()


def test_rows_keep_the_known_part_and_say_how_they_were_made() -> None:
    painter = RecordingPainter()
    rows, outside = video_outpainting.rows_of(cast(Any, painter), 3)
    assert painter.given == [(False, False), (False, True), (True, False), (True, True)]
    assert 0.2 < outside.mean() < 0.8
    for row in ("border", "base alone", "base, noise mask", "ControlNeXt", "ControlNeXt, noise mask", "hint"):
        assert np.array_equal(rows[row][:, ~outside], rows["clip"][:, ~outside]), row
    assert (rows["ControlNeXt"][:, outside] == 1).all() and np.ptp(rows["hint"][:, outside]) == 0
    assert np.array_equal(rows["autoencoder"], rows["clip"])


def test_the_command_hands_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: dict[str, list[str]] = {}
    monkeypatch.setattr(bench, "_run", lambda name, arguments: started.update({name: arguments}) or 0)
    given = ["--parts", "control,measure", "--steps", "7", "--scenes", "3", "--cfg", "2", "--start", "a.safetensors"]
    options = cli.parse(["bench", "video_outpainting", *given])
    assert bench.run_benchmarks(options, lambda: tmp_path) == 0
    parsed = video_outpainting.parse(started["video_outpainting"])
    assert (parsed.parts, parsed.steps, parsed.scenes, parsed.cfg) == (("control", "measure"), 7, 3, 2.0)
    assert parsed.start == Path("a.safetensors").resolve()
    assert "video_outpainting" in bench.ON_REQUEST and "video_outpainting" not in bench.BENCHMARKS


def test_no_clip_that_is_measured_trains() -> None:
    assert len({outpainting_base.SEED, video_outpainting.UNSEEN, video_outpainting.MEASURED}) == 3


@pytest.mark.comfy
def test_the_autoencoder_becomes_a_file_of_the_hosts_with_its_latents(host: Path, tmp_path: Path) -> None:
    """Idle blocks add nothing, and the latents are scaled as Wan 2.1's: the host's VAE and its format undo that."""
    import comfy.sd
    from comfyui_controlnext.tools.tiny_models.storage import save

    model = outpainting_base.new_autoencoder()
    random = torch.Generator().manual_seed(0)
    for value in model.parameters():
        value.data.add_(0.05 * torch.randn(value.shape, generator=random))
    weights = dict(model.named_parameters())
    path = save(tmp_path / "vae.safetensors", {k: v.detach() for k, v in outpainting_base.whole(weights).items()})
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(path)))
    frames = torch.rand(5, 32, 32, 3, generator=random)
    with torch.inference_mode():
        own = model.encode(2 * frames.movedim(-1, 0)[None] - 1)
        loaded = outpainting_base.latent_of(vae, frames)
        decoded = (model.decode(own) / 2 + 0.5).clamp(0, 1)[0].movedim(0, -1)
        quick = outpainting_base.latent_of(outpainting_base.QuickEncoder(path), frames)
        torch.testing.assert_close(loaded, own, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(quick, own, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(vae.decode(vae.encode(frames))[0], decoded, rtol=1e-4, atol=1e-4)


@pytest.mark.comfy
def test_the_base_becomes_a_file_that_the_host_takes_for_wan(host: Path, tmp_path: Path) -> None:
    import comfy.sd
    from comfyui_controlnext.tools.tiny_models.storage import save

    model = outpainting_base.new_base()
    path = save(tmp_path / "wan.safetensors", {name: value.detach() for name, value in model.named_parameters()})
    loaded: Any = comfy.sd.load_diffusion_model(str(path)).model
    assert type(loaded).__name__ == "WAN21" and loaded.diffusion_model.dim == outpainting_base.WIDTH == 128
    state = loaded.diffusion_model.state_dict()
    assert all(torch.equal(state[name].float(), value) for name, value in model.named_parameters())


@pytest.mark.comfy
def test_the_base_goes_on_from_its_file(host: Path, tmp_path: Path) -> None:
    """Without time for a step, the written file has the weights of the one that was there; a step changes them."""
    from comfyui_controlnext.tools.tiny_models.storage import save
    from safetensors.torch import load_file

    autoencoder = outpainting_base.whole(dict(outpainting_base.new_autoencoder().named_parameters()))
    made = {name: value.detach() for name, value in autoencoder.items()}
    save(tmp_path / "autoencoder" / outpainting_base.VAE_FILE, made)
    fresh = load_file(outpainting_base.train_base(tmp_path, 1e-9, 1))
    changed = {name: value + 0.25 for name, value in fresh.items()}
    save(tmp_path / "base" / outpainting_base.BASE_FILE, changed)
    found = load_file(outpainting_base.train_base(tmp_path, 1e-9, 1))
    assert found.keys() == changed.keys() and all(torch.equal(found[name], changed[name]) for name in found)
    stepped = load_file(outpainting_base.train_base(tmp_path, 0.05, 1))  # time for a step or a few
    assert all(value.isfinite().all() for value in stepped.values())
    assert any(not torch.equal(stepped[name], found[name]) for name in found)


@pytest.mark.comfy
@pytest.mark.long
def test_all_parts_run(host: Path, tmp_path: Path) -> None:
    """In a process of its own, as `run.py bench` starts it."""
    import subprocess
    import sys

    command = [
        sys.executable,
        video_outpainting.__file__,
        "--comfyui",
        str(host),
        "--quick",
        "--cpu",
        "--folder",
        str(tmp_path),
    ]
    subprocess.run(command, check=True, timeout=1200)
    figures = (tmp_path / "figures.md").read_text("utf-8")
    assert "| ControlNeXt |" in figures and "| ControlNeXt, noise mask |" in figures
    assert (tmp_path / "evidence_outpainting.webp").stat().st_size > 1000
    assert (tmp_path / "channels.json").is_file()

"""Video outpainting on a small base of Wan's shape, after table 4 of the paper: trained and measured on drawn clips.

    python run.py bench video_outpainting                     # trains all, about three hours of two cores, and measures
    python run.py bench video_outpainting --parts measure     # with what is there

Parts: `vae` and `base` (outpainting_base.py) for a given time each, `control` from the recipe wan_outpaint, `channel`
its first steps with the mask as a fourth channel of the hint, for the loss beside the control's, and `measure`. Clips
that no training saw, in the part outside the kept rectangle, against the true clip: PSNR in dB, SSIM of luminance, and
the temporal distance: mean absolute difference of the changes from frame to frame, in levels of 255. Row `border`: the
edge of the rectangle continued. Rows `base alone` and `base, noise mask`: the base without control, from noise, and
with the host's noise mask, which puts the known part back at each step; `ControlNeXt` and `ControlNeXt, noise mask`
likewise with the control. Row `autoencoder`: encoded and decoded. Rows that sample share seeds, steps and guidance.
"""

from __future__ import annotations

import argparse
import functools
import json
import runpy
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

if __package__ in (None, ""):
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "_alias.py"))

from comfyui_controlnext.benchmarks import outpainting_base as made  # noqa: E402
from comfyui_controlnext.benchmarks.host_start import bring_in  # noqa: E402
from comfyui_controlnext.benchmarks.super_resolution import psnr, ssim_map, table  # noqa: E402
from comfyui_controlnext.controlnext_core.fidelity import OUTPAINT_GRAY  # noqa: E402
from comfyui_controlnext.controlnext_training.data.outpainting import kept_rectangle  # noqa: E402
from comfyui_controlnext.tools.environment import ROOT  # noqa: E402

FOLDER = ROOT / ".cache" / "video_outpainting"
RECIPE = ROOT / "controlnext_training" / "recipes" / "wan_outpaint.toml"
PARTS = ("vae", "base", "control", "channel", "measure")
MINUTES = {"vae": 25.0, "base": 70.0}
STEPS, COMPARED, VALIDATED = 2800, 300, 300
"""Steps of the control, those after which it is compared with the fourth channel, and those between validations."""
TRAINED, HELD_OUT, SCENES = 960, 8, 96
"""Clips that train the control, that its validations see, and that are measured."""
UNSEEN, MEASURED = 20, 21
"""Seeds of scenes for the validations and for the measurement."""
SETTINGS: dict[str, Any] = {
    **{
        "resolution": made.SIDE,
        "buckets": False,
        "bucket_step": 32,
        "clip_frames": made.FRAMES,
        "batch_size": 4,
        "accumulation": 1,
    },
    **{"trainable": r"re:^blocks\.\d+\.self_attn\.[qkvo]\.weight$", "rank": 0, "blocks": "joint"},
    **{"learning_rate": 1e-3, "control_learning_rate": 2e-3, "schedule": "cosine", "warmup_steps": 20},
    **{"ema_decay": 0.99, "precision": "fp32", "checkpointing": False, "save_every": 100, "validation_cfg": 1.0},
    **{"validation_samples": HELD_OUT, "validation_steps": 2, "caption_dropout": 0.1},
}
CFG = 1.0
SAMPLER: dict[str, Any] = {"steps": 20, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
SHOWN, ENLARGED = 4, 2
"""Clips in the strip of frames, and how many times their size they are shown in."""
CONTROL, FOURTH = "outpainting_control", "outpainting_fourth_channel"

Clips = dict[str, np.ndarray]
"""Row -> a clip, (F, H, W, 3) floats in 0..1."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True, metavar="PATH", help="the ComfyUI to train in")
    parser.add_argument("--parts", default=",".join(PARTS), metavar="WORD,..", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--steps", type=int, metavar="N", help=f"of the control's training; default {STEPS}")
    parser.add_argument("--start", type=Path, metavar="FILE", help="a control that the control's training goes on from")
    parser.add_argument("--scenes", type=int, default=SCENES, metavar="N", help="how many clips are measured")
    parser.add_argument("--cfg", type=float, default=CFG, metavar="NUMBER", help=f"guidance; default {CFG}")
    parser.add_argument("--folder", type=Path, default=FOLDER, metavar="FOLDER", help="where all of it is kept")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="of the CPU; default all")
    parser.add_argument("--cpu", action="store_true", help="use the CPU even where there is a GPU")
    parser.add_argument("--quick", action="store_true", help="a few steps: that it runs, not what comes of it")
    options = parser.parse_args(arguments)
    options.parts = tuple(filter(None, options.parts.split(",")))
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"--parts {unknown[0]}: there are {', '.join(PARTS)}")
    options.minutes, options.clips, options.compared = dict(MINUTES), made.CLIPS, COMPARED
    options.trained, options.cropped = TRAINED, made.CROPPED
    if options.quick:
        options.minutes = dict.fromkeys(MINUTES, 0.05)
        options.clips, options.cropped, options.compared, options.trained = 24, 8, 2, 8
        options.steps, options.scenes = options.steps or 2, min(options.scenes, 1)
    options.steps = options.steps or STEPS
    options.folder = options.folder.resolve()
    return options


def vae_file(folder: Path) -> Path:
    return folder / "autoencoder" / made.VAE_FILE


def base_file(folder: Path) -> Path:
    return folder / "base" / made.BASE_FILE


def load_vae(folder: Path) -> Any:
    """The host's VAE of the trained file."""
    import comfy.sd
    import comfy.utils

    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(_there(vae_file(folder)))))


def load_base(folder: Path) -> Any:
    """MODEL of the trained file, with the shift of its training."""
    import comfy.sd
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    model = comfy.sd.load_diffusion_model(str(_there(base_file(folder))))
    return ModelSamplingSD3().patch(model, made.SHIFT)[0]


def _there(path: Path) -> Path:
    if not path.is_file():
        raise SystemExit(f"{path} is missing: run the parts before it first.")
    return path


def write_clips(folder: Path, count: int, seed: int) -> Path:
    """Clips as folders of frames with their captions, as the trainer reads them."""
    from PIL import Image

    for number in range(count):
        own = folder / f"{number:04d}"
        if (caption := own / "0.txt").is_file():  # of the first frame, and so of the clip
            continue
        own.mkdir(parents=True, exist_ok=True)
        frames, text = made.clip(number, seed)
        for place, frame in enumerate(frames.numpy()):
            Image.fromarray(frame).save(own / f"{place}.png")
        caption.write_text(text, "utf-8")
    return folder


def train_control(options: argparse.Namespace, name: str, steps: int) -> Path:
    """Train the recipe on the small base; the trained file."""
    from comfyui_controlnext.controlnext_training.base_model.encode import BaseWithEncoders
    from comfyui_controlnext.controlnext_training.command import Console, open_data, run_of
    from comfyui_controlnext.controlnext_training.config_files import make_config, read_recipe
    from comfyui_controlnext.controlnext_training.train import train

    folder = options.folder
    seen = write_clips(folder / f"clips_{options.trained}", options.trained, made.SEED)
    unseen = write_clips(folder / "held_out", HELD_OUT, UNSEEN)
    own: dict[str, Any] = {"output_name": name, "steps": steps, "validate_every": min(steps, VALIDATED)}
    own |= {"data": (str(seen),), "validation_data": (str(unseen),), "base": str(base_file(folder))}
    own |= {"runs_folder": str(folder / "runs"), "output_folder": str(folder / "controlnext")}
    if name == FOURTH:  # a few steps, compared with the first of the control's, whose rate has hardly fallen by then
        own["schedule"] = "constant"
    elif options.start:
        own["init_control"] = str(options.start.resolve())
    config = make_config(SETTINGS | own, read_recipe(RECIPE))
    base = BaseWithEncoders(load_base(folder), load_vae(folder), made.Words())
    console = Console()
    with console.listening():
        data, held_out = (open_data(source, config, made.FRAMES) for source in (config.data, config.validation_data))
        return train(base, data, held_out, config, run_of(config, base), console)


def with_mask_channel() -> ExitStack:
    """Context in which encoders take the mask of the area to paint as a fourth channel, for this comparison only."""
    from comfyui_controlnext.models import controlnext

    stem, begin = controlnext._stem, controlnext.ControlNeXt.begin

    def wider(config: Any, operations: Any, factory: dict[str, Any]) -> Any:
        layers = stem(config, operations, factory)
        layers[0] = operations.Conv2d(4, controlnext.STEM_CHANNELS, 3, stride=2, padding=1, **factory)
        return layers

    def begun(self: Any, hint: Tensor) -> Any:
        gray = ((hint - OUTPAINT_GRAY).abs() < 1 / 255).all(1, keepdim=True)
        return begin(self, torch.cat([hint, gray.to(hint.dtype)], 1))

    stack = ExitStack()
    stack.enter_context(patch.object(controlnext, "_stem", wider))
    stack.enter_context(patch.object(controlnext.ControlNeXt, "begin", begun))
    return stack


def compare(options: argparse.Namespace) -> None:
    """Loss of held-out clips at fixed noise after COMPARED steps: gray alone, and the mask as a fourth channel."""
    from comfyui_controlnext.controlnext_core.checkpoint import CheckpointError
    from comfyui_controlnext.controlnext_training import journal

    with with_mask_channel():
        try:
            train_control(options, FOURTH, options.compared)
        except CheckpointError as error:  # no loader takes four channels, so that the trained file is refused
            print(error)
    found = {}
    for name in (CONTROL, FOURTH):
        values = {
            key: journal.read(options.folder / "runs" / name, "validation", key) for key in ("loss", "loss_without")
        }
        found[name] = {key: steps.get(options.compared) for key, steps in values.items()}
    (options.folder / "channels.json").write_text(json.dumps(found, indent=1), "utf-8")
    print(json.dumps(found, indent=1))


class Painter:
    """The base with and without the control, through the host's own nodes."""

    def __init__(self, folder: Path, cfg: float) -> None:
        from comfyui_controlnext.controlnext_core.comfy_adapter.files.loading import load_controlnext

        self.vae, self.words, self.cfg = load_vae(folder), made.Words(), cfg
        self.base = load_base(folder)
        self.loaded = load_controlnext(self.base, _there(folder / "controlnext" / f"{CONTROL}.safetensors"))

    def draw(
        self, caption: str, seed: int, hint: Tensor | None = None, known: tuple[Tensor, Tensor] | None = None
    ) -> np.ndarray:
        """A clip. hint: (F, H, W, 3), None for the base alone; known: a clip as hint, (H, W) with 1 where to paint."""
        import nodes

        cells = made.SIDE // 8
        latent: dict[str, Any] = {"samples": torch.zeros(1, made.CHANNELS, 1 + (made.FRAMES - 1) // 4, cells, cells)}
        model, positive, negative = self.base, self._conditioning(caption), self._conditioning("")
        if known is not None:
            latent = {"samples": self.vae.encode(known[0]), "noise_mask": known[1][None, None]}
        if hint is not None:
            model = self.loaded.model
            positive, negative = nodes.ControlNetApplyAdvanced().apply_controlnet(
                positive, negative, self.loaded.control, hint, 1.0, 0.0, 1.0
            )
        sampled = nodes.common_ksampler(
            model, seed, SAMPLER["steps"], self.cfg, SAMPLER["sampler_name"], SAMPLER["scheduler"],
            positive, negative, latent, denoise=SAMPLER["denoise"],
        )[0]["samples"]  # fmt: skip
        return self.decode(sampled)

    def decode(self, latent: Tensor) -> np.ndarray:
        return self.vae.decode(latent)[0].clamp(0, 1).numpy()

    def _conditioning(self, caption: str) -> Any:
        return [[self.words.encode_from_tokens(self.words.tokenize(caption))["cond"], {}]]


def rows_of(painter: Painter, number: int) -> tuple[Clips, np.ndarray]:
    """Every row of one clip, and the (H, W) mask of what is painted. All rows but the last two show the kept part."""
    frames, caption = made.clip(number, MEASURED)
    clip = frames.float() / 255
    top, bottom, left, right = kept_rectangle(made.SIDE, made.SIDE, f"measured {number}")
    outside = torch.ones(made.SIDE, made.SIDE)
    outside[top:bottom, left:right] = 0
    hint = torch.where(outside[..., None] > 0, torch.full_like(clip, OUTPAINT_GRAY), clip)
    around = ((0, 0), (top, made.SIDE - bottom), (left, made.SIDE - right), (0, 0))
    rows = {
        "border": np.pad(clip[:, top:bottom, left:right].numpy(), around, mode="edge"),
        "base alone": painter.draw(caption, number),
        "base, noise mask": painter.draw(caption, number, known=(hint, outside)),
        "ControlNeXt": painter.draw(caption, number, hint),
        "ControlNeXt, noise mask": painter.draw(caption, number, hint, (hint, outside)),
    }
    kept = outside.numpy()[None, ..., None] == 0
    rows = {row: np.where(kept, clip.numpy(), picture) for row, picture in rows.items()}
    rows |= {"hint": hint.numpy(), "autoencoder": painter.decode(painter.vae.encode(clip)), "clip": clip.numpy()}
    return rows, outside.numpy() > 0


def figures_of(rows: Clips, outside: np.ndarray) -> dict[str, dict[str, float]]:
    """Figures of each row in the painted part, against the true clip."""
    wanted = rows["clip"]

    def similarity(clip: np.ndarray) -> float:
        maps = [ssim_map(*pair)[outside].mean() for pair in zip(clip, wanted, strict=True)]
        return float(np.mean(maps))

    figures: dict[str, Callable[[np.ndarray], float]] = {
        "PSNR": lambda clip: psnr(clip[:, outside], wanted[:, outside]),
        "SSIM": similarity,
        "temporal distance": lambda clip: temporal_distance(clip[:, outside], wanted[:, outside]),
    }
    measured = [row for row in rows if row not in ("hint", "clip")]
    return {row: {name: measure(rows[row]) for name, measure in figures.items()} for row in measured}


def temporal_distance(clip: np.ndarray, wanted: np.ndarray) -> float:
    """Mean absolute difference of the changes from frame to frame, in levels of 255. Both: frames first, in 0..1."""
    return float(255 * np.abs(np.diff(clip, axis=0) - np.diff(wanted, axis=0)).mean())


def strip(scenes: list[Clips], path: Path) -> None:
    """For each clip its first, middle and last frame in six rows, beside one another, enlarged."""
    from PIL import Image

    shown = ("hint", "border", "base, noise mask", "ControlNeXt", "ControlNeXt, noise mask", "clip")
    lines = []
    for rows in scenes[:SHOWN]:
        for place in (0, made.FRAMES // 2, made.FRAMES - 1):
            lines.append(np.concatenate([rows[row][place] for row in shown], axis=1))
    image = Image.fromarray((255 * np.concatenate(lines, axis=0) + 0.5).astype(np.uint8))
    image.resize((ENLARGED * image.width, ENLARGED * image.height), Image.Resampling.NEAREST).save(
        path, "WEBP", quality=85
    )


def measure(options: argparse.Namespace) -> None:
    """Figures and pictures; their files hold those of the clips so far."""
    found: list[dict[str, dict[str, float]]] = []
    scenes: list[Clips] = []
    with torch.inference_mode():
        painter = Painter(options.folder, options.cfg)
        for number in range(options.scenes):
            rows, outside = rows_of(painter, number)
            scenes.append(rows)
            found.append(figures_of(rows, outside))
            (options.folder / "figures.json").write_text(json.dumps(found, indent=1), "utf-8")
            strip(scenes, options.folder / "evidence_outpainting.webp")
    text = "\n".join(table(found))
    (options.folder / "figures.md").write_text(text + "\n", "utf-8")
    print(text)


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    bring_in(options.comfyui.resolve(), options.cpu or not torch.cuda.is_available(), options.folder)
    work: dict[str, Callable[[], Any]] = {
        "vae": lambda: made.train_autoencoder(options.folder, 60 * options.minutes["vae"], options.cropped),
        "base": lambda: made.train_base(options.folder, 60 * options.minutes["base"], options.clips),
        "control": functools.partial(train_control, options, CONTROL, options.steps),
        "channel": functools.partial(compare, options),
        "measure": functools.partial(measure, options),
    }
    for part in options.parts:
        work[part]()


if __name__ == "__main__":
    main()

"""Super-resolution on the demo's base of SD3's shape, after table 2 of the paper: trained and measured on drawn scenes.

    python run.py bench super_resolution                      # trains 500 steps, most of an hour, and measures
    python run.py bench super_resolution --parts measure      # with the existing control
    python run.py bench super_resolution --parts tiles        # a picture larger than a pass, in tiles

The hint is the picture after the degradation of the trainer's data (blur, shrunk 2 to 4 times, noise, JPEG, enlarged by
cubic interpolation); that picture itself is the row `bicubic`. Scenes are unseen; each row is compared with the
picture: PSNR in dB, SSIM of luminance (Wang et al. 2004: Gaussian of 1.5 pixels, constants 0.01 and 0.03), F1 of canny
edges (2 pixels), and the distance of features: root mean square difference of the latents of the base's autoencoder.
The row `autoencoder` is the picture encoded and decoded, the best that the base can reach.
"""

from __future__ import annotations

import argparse
import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

if __package__ in (None, ""):
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "_alias.py"))

from comfyui_controlnext.benchmarks.host_start import bring_in  # noqa: E402
from comfyui_controlnext.controlnext_core.fidelity import edge_f1  # noqa: E402
from comfyui_controlnext.controlnext_core.hints import HINTS  # noqa: E402
from comfyui_controlnext.controlnext_core.hints.picture import luminance  # noqa: E402
from comfyui_controlnext.controlnext_core.opencv import require_opencv  # noqa: E402
from comfyui_controlnext.tools.demo_weights import shipped  # noqa: E402
from comfyui_controlnext.tools.environment import ROOT  # noqa: E402

FOLDER = ROOT / ".cache" / "super_resolution"
RECIPE = ROOT / "controlnext_training" / "recipes" / "picture_sharp.toml"
PARTS = ("train", "measure", "tiles")
SEED, SCENES = 62, 16
"""Seed and number of the measured scenes; those of seed 61 train."""
SAMPLER: dict[str, Any] = {"steps": 20, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
LARGE, OVERLAP, DENOISE = 224, 32, 0.6
"""Sides and overlap of the part tiles, and the denoise strength of its last row."""
SHOWN = 4
"""Number of scenes in the strip of pictures."""
WINDOW, K1, K2 = 1.5, 0.01, 0.03
"""Constants of SSIM: standard deviation in pixels, K1 and K2."""

Rows = dict[str, np.ndarray]
"""Row -> picture, (H, W, 3) floats in 0..1."""


def psnr(picture: np.ndarray, wanted: np.ndarray) -> float:
    """Peak signal to noise ratio in dB of two pictures in 0..1."""
    return float(-10 * np.log10(max(float(np.square(picture - wanted).mean()), 1e-12)))


def ssim(picture: np.ndarray, wanted: np.ndarray) -> float:
    """Structural similarity of the luminance of two pictures in 0..1, its mean over all pixels."""
    return float(ssim_map(picture, wanted).mean())


def ssim_map(picture: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Structural similarity of the luminance of two pictures (H, W, 3) in 0..1, (H, W)."""
    x, y = (luminance(one).astype(np.float64) for one in (picture, wanted))
    mean_x, mean_y = _smooth(x), _smooth(y)
    var_x, var_y = _smooth(x * x) - mean_x**2, _smooth(y * y) - mean_y**2
    both = _smooth(x * y) - mean_x * mean_y
    light = (2 * mean_x * mean_y + K1**2) / (mean_x**2 + mean_y**2 + K1**2)
    similarity: np.ndarray = light * (2 * both + K2**2) / (var_x + var_y + K2**2)
    return similarity


def _smooth(values: np.ndarray) -> np.ndarray:
    cv2 = require_opencv()
    return cv2.GaussianBlur(values, (11, 11), WINDOW, borderType=cv2.BORDER_REFLECT)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True, metavar="PATH", help="the ComfyUI to train in")
    parser.add_argument("--parts", default=",".join(PARTS), metavar="WORD,..", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--base", type=Path, metavar="FILE", help="checkpoint to train on; default the demo's")
    parser.add_argument("--steps", type=int, metavar="N", help="of the training; default the recipe's")
    parser.add_argument("--batch", type=int, metavar="N", help="pictures of a step; default the recipe's")
    parser.add_argument("--scenes", type=int, default=SCENES, metavar="N", help="how many scenes are measured")
    parser.add_argument("--folder", type=Path, default=FOLDER, metavar="FOLDER", help="where all of it is kept")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="of the CPU; default all")
    parser.add_argument("--cpu", action="store_true", help="use the CPU even where there is a GPU")
    parser.add_argument("--quick", action="store_true", help="a few steps: that it runs, not what comes of it")
    options = parser.parse_args(arguments)
    options.parts = tuple(filter(None, options.parts.split(",")))
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"--parts {unknown[0]}: there are {', '.join(PARTS)}")
    if options.quick:
        options.steps, options.scenes = options.steps or 2, min(options.scenes, 2)
    options.folder = options.folder.resolve()
    return options


def train(options: argparse.Namespace, base: Path, control: Path) -> None:
    """Train the recipe, or resume it."""
    from comfyui_controlnext.controlnext_training.command import run_config
    from comfyui_controlnext.controlnext_training.config_files import make_config, read_recipe

    given: dict[str, Any] = {"base": str(base), "init_control": str(control)}
    given |= {key: value for key, value in (("steps", options.steps), ("batch_size", options.batch)) if value}
    run_config(make_config(given, read_recipe(RECIPE)), RECIPE.parent)


class Painter:
    """Base with its control, through the host's nodes."""

    def __init__(self, base: Path, control: Path) -> None:
        import comfy.sd
        from comfyui_controlnext.controlnext_core.comfy_adapter.files.loading import load_controlnext

        self.model, self.clip, self.vae, _ = comfy.sd.load_checkpoint_guess_config(str(base))
        self.loaded = load_controlnext(self.model, control)
        self.words: dict[str, Any] = {}

    def prompt(self, text: str) -> Any:
        import nodes

        if text not in self.words:
            self.words[text] = nodes.CLIPTextEncode().encode(self.clip, text)[0]
        return self.words[text]

    def draw(self, caption: str, side: int, hint: np.ndarray | None, seed: int) -> np.ndarray:
        """Draw the picture of a caption; hint: None for the base only."""
        latent = torch.zeros(1, 16, side // 8, side // 8)
        hints = None if hint is None else torch.from_numpy(hint)[None]
        return self.decode(self.sampled(caption, hints, latent, seed, SAMPLER["denoise"]))

    def draw_tiles(self, caption: str, side: int, hint: np.ndarray, seed: int, denoise: float) -> np.ndarray:
        """Draw a picture in tiles, each with its part of the hint as hint and as initial latent."""
        from comfyui_controlnext.controlnext_core.tiles import merge, split

        tiles, layout = split(torch.from_numpy(hint)[None], side, side, OVERLAP)
        sampled = self.sampled(caption, tiles, self.vae.encode(tiles), seed, denoise)
        return merge([self.vae.decode(sampled)], layout)[0].clamp(0, 1).numpy()

    def sampled(
        self, caption: str, hints: torch.Tensor | None, latent: torch.Tensor, seed: int, denoise: float
    ) -> torch.Tensor:
        """Sample latents from these; hints: one for each, or None for the base only."""
        from comfyui_controlnext.nodes.apply import ControlNeXtApply

        import nodes

        model = self.model
        if hints is not None:
            model = ControlNeXtApply.execute(self.loaded.model, self.loaded.control, hints, 1.0, 0.0, 1.0, None)[0]
        words, empty = self.prompt(caption), self.prompt("")
        settings = (SAMPLER[key] for key in ("steps", "cfg", "sampler_name", "scheduler"))
        (found,) = nodes.KSampler().sample(model, seed, *settings, words, empty, {"samples": latent}, denoise)
        return found["samples"]

    def latent(self, picture: np.ndarray) -> torch.Tensor:
        return self.vae.encode(torch.from_numpy(picture.astype(np.float32))[None])

    def decode(self, latent: torch.Tensor) -> np.ndarray:
        return self.vae.decode(latent)[0].float().clamp(0, 1).cpu().numpy()


def rows_of(painter: Painter, number: int, side: int) -> Rows:
    """Rows of a scene; the first is the picture itself."""
    from comfyui_controlnext.controlnext_core.picturebook import draw
    from comfyui_controlnext.controlnext_training.data.degraded import low_resolution

    scene = draw(SEED, number, side)
    picture = scene.image.astype(np.float32) / 255
    hint = low_resolution(picture)
    return {
        "picture": picture,
        "bicubic": hint,
        "base alone": painter.draw(scene.caption, side, None, number),
        "ControlNeXt": painter.draw(scene.caption, side, hint, number),
        "autoencoder": painter.decode(painter.latent(picture)),
    }


def large_rows_of(painter: Painter, number: int, side: int) -> Rows:
    """Rows of a larger scene: in one pass, and in tiles of `side`.

    The row `bicubic, decoded` shows the share of the autoencoder, which was trained on such pictures, in the figures.
    """
    from comfyui_controlnext.controlnext_core.picturebook import draw
    from comfyui_controlnext.controlnext_training.data.degraded import low_resolution

    scene = draw(SEED, number, LARGE)
    picture = scene.image.astype(np.float32) / 255
    hint = low_resolution(picture)
    return {
        "picture": picture,
        "bicubic": hint,
        "bicubic, decoded": painter.decode(painter.latent(hint)),
        "one pass": painter.draw(scene.caption, LARGE, hint, number),
        "tiles": painter.draw_tiles(scene.caption, side, hint, number, SAMPLER["denoise"]),
        f"tiles, denoise {DENOISE}": painter.draw_tiles(scene.caption, side, hint, number, DENOISE),
        "autoencoder": painter.decode(painter.latent(picture)),
    }


def figures_of(painter: Painter, rows: Rows) -> dict[str, dict[str, float]]:
    """Figures of each row against the picture."""
    wanted = rows["picture"]
    edges, features = HINTS["canny"](wanted), painter.latent(wanted)

    def distance(picture: np.ndarray) -> float:
        return float((painter.latent(picture) - features).square().mean().sqrt())

    figures: dict[str, Callable[[np.ndarray], float]] = {
        "PSNR": lambda picture: psnr(picture, wanted),
        "SSIM": lambda picture: ssim(picture, wanted),
        "edge F1": lambda picture: edge_f1(picture, edges),
        "distance": distance,
    }
    kept = [row for row in rows if row != "picture"]
    return {row: {name: measure(rows[row]) for name, measure in figures.items()} for row in kept}


def table(found: list[dict[str, dict[str, float]]]) -> list[str]:
    """Means over the scenes, as a table in Markdown."""
    names = list(next(iter(found[0].values())))
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for row in found[0]:
        means = [float(np.mean([scene[row][name] for scene in found])) for name in names]
        lines.append(f"| {row} | {' | '.join(f'{mean:.1f}' if mean > 5 else f'{mean:.2f}' for mean in means)} |")
    return lines


def strip(scenes: list[Rows], path: Path, shown: tuple[str, ...]) -> None:
    """Draw a line of pictures for each scene, with these rows."""
    from PIL import Image

    lines = [np.concatenate([rows[row] for row in shown], axis=1) for rows in scenes[:SHOWN]]
    whole = np.concatenate(lines, axis=0)
    Image.fromarray((255 * whole + 0.5).astype(np.uint8)).save(path, "WEBP", quality=85)


ROWS: dict[str, tuple[Callable[[Painter, int, int], Rows], str, str, tuple[str, ...]]] = {
    "measure": (rows_of, "figures", "evidence_sharp", ("bicubic", "base alone", "ControlNeXt", "picture")),
    "tiles": (
        large_rows_of,
        "figures_tiles",
        "evidence_tiles",
        ("bicubic", "one pass", "tiles", f"tiles, denoise {DENOISE}", "picture"),
    ),
}
"""Part -> function that draws its rows, file names of its figures and of its pictures, and the rows in the latter."""


def measure(options: argparse.Namespace, base: Path, part: str) -> None:
    """Measure the trained control: figures and pictures are written after each scene."""
    from comfyui_controlnext.controlnext_training.config_files import read_recipe

    control = options.folder / "models" / "controlnext" / "picture_sharp.safetensors"
    if not control.is_file():
        raise SystemExit(f"{control} is missing: run the part train first.")
    drawing, figures, pictures, shown = ROWS[part]
    side = int(read_recipe(RECIPE)["resolution"])
    with torch.inference_mode():
        painter = Painter(base, control)
        scenes: list[Rows] = []
        found: list[dict[str, dict[str, float]]] = []
        for number in range(options.scenes):
            scenes.append(drawing(painter, number, side))
            found.append(figures_of(painter, scenes[-1]))
            (options.folder / f"{figures}.json").write_text(json.dumps(found, indent=1), "utf-8")
            strip(scenes, options.folder / f"{pictures}.webp", shown)
    text = "\n".join(table(found))
    (options.folder / f"{figures}.md").write_text(text + "\n", "utf-8")
    print(text)


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    bring_in(options.comfyui.resolve(), options.cpu or not torch.cuda.is_available(), options.folder)
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.folders import register_folder

    register_folder()  # for the trained file
    models = shipped.install(options.folder, (shipped.PICTUREBOOK, shipped.PICTURE_EDGES))
    base = (options.base or models / "checkpoints" / shipped.PICTUREBOOK).resolve()
    if "train" in options.parts:
        train(options, base, models / "controlnext" / shipped.PICTURE_EDGES)
    for part in filter(ROWS.__contains__, options.parts):
        measure(options, base, part)


if __name__ == "__main__":
    main()

"""Trained controls with what they never met: another control, a LoRA, another fine-tune of the base.

The paper's figures 8, 9 and 11 on the demo's own weights, through the host's own nodes in this process, over scenes
that no training saw.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..controlnext_core.fidelity import ON, boundary_f1, dilated, edge_f1, mask_iou
from ..controlnext_core.hints import HINTS
from ..controlnext_core.hints.picture import luminance
from ..controlnext_core.picturebook import Picture
from ..controlnext_training.plots import Cell, picture_grid
from ..controlnext_training.synthetic import draw
from ..tools.demo_boards import SCENE_SEED, SEED, SHAPES, Hint, draw_hint
from ..tools.demo_sheet import CFG
from ..tools.demo_weights.other_base import OTHER, in_negative, make_other_base
from ..tools.demo_weights.shipped import CHECKPOINT, EDGES, FOLDERS, LORA, MASK, XS, install
from ..tools.demo_weights.style import at_night
from .recording import facts

COUNT = 8
"""Scenes of each row; those with shapes that do not touch, so that each can have a hint of its own."""
BAND = 10.0
"""Pixels around an outline where edges count as meant for it."""
SHAPE = 0.12
"""A pixel whose colour is farther than this from the background's, in any channel, is part of a shape."""
SHOWN = 3
FILE = "pairs.json"
TOGETHER, ELSEWHERE = "figure 11", "figures 8 and 9"
SHEETS = {TOGETHER: "evidence_together.png", ELSEWHERE: "evidence_elsewhere.png"}
"""Group of rows -> its pictures beside the page."""

Array = np.ndarray


@dataclass(frozen=True)
class Use:
    """One row: what is used together."""

    title: str
    group: str
    """Of the table: `figure 11`, ..."""
    edges: str = ""
    """The control that gets outlines; empty for none."""
    split: bool = False
    """Outlines of one shape alone."""
    mask: bool = False
    """The other shapes' mask goes to the control for masks."""
    lora: bool = False
    base: str = CHECKPOINT


USES = (
    Use("neither", TOGETHER),
    Use("edges of one shape", TOGETHER, edges=EDGES, split=True),
    Use("mask of the others", TOGETHER, mask=True),
    Use("both", TOGETHER, edges=EDGES, split=True, mask=True),
    Use("the demo's base, no control", ELSEWHERE),
    Use("the demo's base, ControlNeXt", ELSEWHERE, edges=EDGES),
    Use("with a LoRA for night, no control", ELSEWHERE, lora=True),
    Use("with a LoRA for night, ControlNeXt", ELSEWHERE, edges=EDGES, lora=True),
    Use("with a LoRA for night, ControlNet-XS", ELSEWHERE, edges=XS, lora=True),
    Use("another fine-tune, no control", ELSEWHERE, base=OTHER),
    Use("another fine-tune, ControlNeXt", ELSEWHERE, edges=EDGES, base=OTHER),
    Use("another fine-tune, ControlNet-XS", ELSEWHERE, edges=XS, base=OTHER),
)


class Studio:
    """The host's nodes, with checkpoints and conditionings loaded once."""

    def __init__(self, models: Path) -> None:
        import comfy.utils

        from ..controlnext_core.comfy_adapter.files.folders import register_folder

        register_folder()
        comfy.utils.PROGRESS_BAR_ENABLED = False
        self.models = models
        self.checkpoint = functools.cache(self._checkpoint)

    def _checkpoint(self, name: str) -> Any:
        import nodes as host_nodes

        return host_nodes.CheckpointLoaderSimple().load_checkpoint(name)

    def file(self, name: str) -> Path:
        return self.models / FOLDERS[name] / name

    @torch.inference_mode()
    def picture(self, use: Use, hint: Hint, seed: int) -> Array:
        """(H, W, 3) in [0, 1]: what KSampler and VAEDecode make of it."""
        import nodes as host_nodes

        model, clip, vae = self.checkpoint(use.base)
        if use.lora:
            (model,) = host_nodes.LoraLoaderModelOnly().load_lora_model_only(model, LORA, 1.0)
        conds = [host_nodes.CLIPTextEncode().encode(clip, text)[0] for text in (hint.caption, "")]
        for name, shown in self._controls(use, hint):
            model, control = self._load(name, model)
            given = torch.from_numpy(shown)[None].float() / 255
            conds = host_nodes.ControlNetApplyAdvanced().apply_controlnet(*conds, control, given, 1.0, 0.0, 1.0)
        latent = {"samples": torch.zeros(1, 4, SHAPES.side // 8, SHAPES.side // 8)}
        (sampled,) = host_nodes.KSampler().sample(model, seed, SHAPES.steps, CFG, "euler", "normal", *conds, latent)
        (decoded,) = host_nodes.VAEDecode().decode(vae, sampled)
        return decoded[0].float().cpu().numpy()

    def _controls(self, use: Use, hint: Hint) -> list[tuple[str, Array]]:
        outlines = [(use.edges, hint.some_edges if use.split else hint.edges)] if use.edges else []
        return outlines + ([(MASK, hint.other_mask)] if use.mask else [])

    def _load(self, name: str, model: Any) -> tuple[Any, Any]:
        """(model, control)"""
        from ..controlnext_core.comfy_adapter.files.loading import load_controlnext
        from ..controlnext_core.comfy_adapter.files.xs_loading import load_controlnet_xs

        if name == XS:
            return model, load_controlnet_xs(self.file(name)).control
        loaded = load_controlnext(model, self.file(name), "auto")
        return loaded.model, loaded.control

    @torch.inference_mode()
    def latent(self, picture: Array) -> Tensor:
        """(1, 4, h, w) of a picture in [0, 1], by the demo's autoencoder."""
        return self.checkpoint(CHECKPOINT)[2].encode(torch.from_numpy(picture).float()[None]).float()


def scenes() -> list[int]:
    """Indices of the first COUNT scenes of which a part can be told from the rest."""
    found = [index for index in range(10 * COUNT) if draw_hint(SHAPES, index).other_mask.any()]
    return found[:COUNT]


def near_f1(picture: Array, outlines: Array) -> float:
    """F1 of the picture's edges against outlines (H, W, 3), bytes, of what lies within BAND of them."""
    wanted = luminance(outlines / 255.0)
    found = luminance(HINTS["canny"](picture)) * dilated(wanted >= ON, BAND)
    return boundary_f1(found, wanted)


def elsewhere_iou(picture: Array, scene: Picture, mask: Array) -> float:
    """IoU of what is no background and mask (H, W, 3), bytes; around the shapes that are not in it nothing counts."""
    rest = (scene.mask > 127) & (mask[..., 0] <= 127)
    outside = ~dilated(rest, BAND)
    return mask_iou((no_background(picture) & outside).astype(np.float64), (mask[..., 0] / 255.0) * outside)


def no_background(picture: Array) -> Array:
    """(H, W) bool: where the colour is not that of most of the picture's rim."""
    rim = np.concatenate([part.reshape(-1, 3) for part in (picture[:4], picture[-4:], picture[:, :4], picture[:, -4:])])
    return np.abs(picture - np.median(rim, axis=0)).max(axis=-1) > SHAPE


STYLES: dict[str, Callable[[Picture], Array]] = {"night": at_night, "negative": in_negative}


def style_of(use: Use) -> str:
    return "night" if use.lora else "negative" if use.base == OTHER else ""


def in_style(studio: Studio, picture: Array, scene: Picture, style: str) -> float:
    """1 where the picture's latent is nearer to the scene in that style than to the scene as the base knows it."""
    latent = studio.latent(picture)
    plain, styled = (studio.latent(image / 255.0) for image in (scene.image, STYLES[style](scene)))
    return float((latent - styled).square().mean() < (latent - plain).square().mean())


def measure(studio: Studio, use: Use, indices: list[int]) -> tuple[dict[str, float], list[Array]]:
    """(means over the scenes, pictures)"""
    values: dict[str, list[float]] = {"f1": [], "near_f1": [], "iou": [], "in_style": []}
    pictures = []
    for index in indices:
        scene, hint = draw(SCENE_SEED, index, SHAPES.side), draw_hint(SHAPES, index)
        picture = studio.picture(use, hint, SEED + index)
        pictures.append(picture)
        values["f1"].append(edge_f1(picture, hint.edges / 255.0))
        values["near_f1"].append(near_f1(picture, hint.some_edges))
        values["iou"].append(elsewhere_iou(picture, scene, hint.other_mask))
        if style_of(use):
            values["in_style"].append(in_style(studio, picture, scene, style_of(use)))
    return {name: float(np.mean(found)) for name, found in values.items() if found}, pictures


def run(folder: Path, pictures_folder: Path | None, quick: bool = False) -> list[dict[str, Any]]:
    """Sample every row; keep the figures in FILE, and the pictures as SHEETS where a folder is given for them.

    folder: where the demo is unpacked.
    """
    models = install(folder)
    make_other_base(models / FOLDERS[CHECKPOINT] / OTHER, steps=2 if quick else None)
    studio, indices, rows = Studio(models), scenes()[: 2 if quick else COUNT], []
    drawn: dict[str, list[list[Cell]]] = {group: _hint_cells(group, indices[:SHOWN]) for group in SHEETS}
    for use in USES:
        figures, pictures = measure(studio, use, indices)
        rows.append({"group": use.group, "title": use.title, "style": style_of(use), **figures})
        print(json.dumps(rows[-1]), flush=True)
        for cells, picture in zip(drawn[use.group], pictures, strict=False):  # more pictures than are shown
            cells.append(Cell(torch.from_numpy(picture), use.title))
    (folder / FILE).write_text(json.dumps({"rows": rows, "scenes": len(indices), "facts": facts()}, indent=1), "utf-8")
    if pictures_folder is not None:
        for group, sheet in drawn.items():
            picture_grid(sheet, side=112).quantize(96).save(pictures_folder / SHEETS[group], optimize=True)
    return rows


def _hint_cells(group: str, indices: list[int]) -> list[list[Cell]]:
    """The hints that a row of the sheet begins with, one row per scene."""

    def cell(picture: Array, title: str) -> Cell:
        return Cell(torch.from_numpy(picture).float() / 255, title)

    hints = [draw_hint(SHAPES, index) for index in indices]
    if group == TOGETHER:
        return [[cell(h.some_edges, "edges of one shape"), cell(h.other_mask, "mask of the others")] for h in hints]
    return [[cell(h.edges, "outlines")] for h in hints]


def tables(rows: list[Mapping[str, Any]]) -> dict[str, tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    """Name -> (head, rows), from what `run` kept."""

    def cell(row: Mapping[str, Any], name: str) -> str:
        return f"{row[name]:.2f}" if name in row else ""

    together = [row for row in rows if row["group"] == TOGETHER]
    elsewhere = [row for row in rows if row["group"] == ELSEWHERE]
    return {
        "together": (
            ("used", "edges of the one shape, F1", "mask of the others, IoU", "all outlines, F1"),
            [(r["title"], cell(r, "near_f1"), cell(r, "iou"), cell(r, "f1")) for r in together],
        ),
        "elsewhere": (
            ("used", "edge F1", "pictures in the other style"),
            [(r["title"], cell(r, "f1"), f"{r['in_style']:.0%}" if "in_style" in r else "") for r in elsewhere],
        ),
    }

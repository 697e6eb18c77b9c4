"""Dataset nodes: pictures with hints, from a folder or from other nodes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ...controlnext_core.comfy_adapter.control_node import ControlNode
from ...controlnext_core.comfy_adapter.feedback import report as show_report
from ...controlnext_core.encodable import cut, encodable
from ..base_model.base_files import runs_folder
from ..choices import reference_of
from ..command import INDEX, open_data
from ..config import SETTINGS, ConfigError, TrainConfig
from ..config_files import make_config
from ..data.contact_sheet import contact_sheet
from ..data.report import report
from ..data.samples import PAIRED, ControlDataset
from ..data.tensors import TensorDataset
from ..drawn import HINTS_OF, SCHEMES, is_drawn

ROOTS_VARIABLE = "CONTROLNEXT_DATA_ROOTS"
"""Environment variable: further folders that datasets may be read from, separated as in PATH."""

LISTED, LISTED_DEPTH, LISTED_SUFFIXES = 200, 2, (".tar", ".jsonl", ".parquet")
"""Limits of the folder widget's choices: their number per root, the depth below it, and the suffixes of files besides
folders."""

Dataset = io.Custom("CONTROL_DATASET")


@dataclass(frozen=True)
class Files:
    """Dataset of files as a CONTROL_DATASET, opened when the trainer knows whether it needs pictures or clips."""

    settings: Mapping[str, Any]
    """Settings by their keys in TrainConfig."""
    roots: tuple[Path, ...]

    def open(self, config: TrainConfig, frames: int = 1) -> ControlDataset:
        """Open the dataset, with samples of `frames` frames."""
        return open_data(config.data, config, frames, runs_folder() / INDEX, self.roots, _stop_if_cancelled)


@dataclass(frozen=True)
class Images:
    """Dataset of images from the graph as a CONTROL_DATASET."""

    images: Tensor
    hints: Tensor
    captions: tuple[str, ...]
    settings: Mapping[str, Any]

    def open(self, config: TrainConfig, frames: int = 1) -> ControlDataset:
        """Open the dataset, with samples of `frames` frames."""
        return TensorDataset(
            self.images,
            self.hints,
            self.captions,
            clip_frames=frames,
            clip_stride=config.clip_stride,
            reference=reference_of(config.variant),
        )


def _stop_if_cancelled(done: int, total: int) -> None:
    comfy.model_management.throw_exception_if_processing_interrupted()


def allowed_roots() -> tuple[Path, ...]:
    """Folders that a dataset may be in: the host's input folder and those of the environment variable."""
    added = [Path(part) for part in os.environ.get(ROOTS_VARIABLE, "").split(os.pathsep) if part]
    return (Path(folder_paths.get_input_directory()), *added)


def data_choices() -> list[str]:
    """Choices of the folder widget: contents of the allowed roots, by name, then pictures that the project draws."""
    input_folder, *others = allowed_roots()
    found = [path.relative_to(input_folder).as_posix() for path in _data_below(input_folder)]
    found += [str(path) for root in others for path in (root, *_data_below(root))]
    return [*found, *(f"{scheme}:{hint}:200" for scheme in reversed(SCHEMES) for hint in HINTS_OF[scheme])]


def _data_below(root: Path, depth: int = LISTED_DEPTH) -> list[Path]:
    """Folders, tables and tar shards below a folder, sorted, without hidden ones; empty where it cannot be read."""
    try:
        entries = sorted(path for path in root.iterdir() if not path.name.startswith("."))
        found: list[Path] = []
        for path in entries:
            if path.is_dir():
                found += [path, *(_data_below(path, depth - 1) if depth > 1 else [])]
            elif path.suffix.lower() in LISTED_SUFFIXES:
                found.append(path)
    except OSError:
        return []
    return found[:LISTED]


def source_of(folder: str) -> str:
    """Data source for a value of the folder widget: a path, or a drawn source. Raises ConfigError."""
    return folder if is_drawn(folder) else str(find_folder(folder))


def find_folder(name: str) -> Path:
    """Path of a dataset: absolute, or below one of the allowed roots. Raises ConfigError naming the roots."""
    roots = allowed_roots()
    candidates = [Path(name)] if Path(name).is_absolute() else [root / name for root in roots]
    for path in candidates:
        if name and _is_inside(path, roots):
            return path
    raise ConfigError(
        f"folder: {cut(repr(name))} is not there, or not in {' or '.join(str(root) for root in roots)}. Put "
        "the pictures into a folder below ComfyUI's input folder and write its name, or list its parent in "
        f"{ROOTS_VARIABLE}."
    )


def _is_inside(path: Path, roots: Sequence[Path]) -> bool:
    """True: the path exists in one of the roots. False: it does not, or the system refuses the name."""
    try:
        return any(path.resolve().is_relative_to(root.resolve()) for root in roots) and path.exists()
    except (OSError, RuntimeError, ValueError):
        return False


class ControlDatasetFolder(ControlNode):
    """Node for a dataset of pictures with hints from a folder."""

    SEARCH = ("train", "dataset", "controlnet", "lora")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ControlDatasetFolder",
            display_name="Control Dataset (folder)",
            category="ControlNeXt/training",
            description="Pictures to train a control on, from a folder, a metadata.jsonl or tar shards; with their "
            "own hint pictures, or with hints drawn from them. Shows what it found.",
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=data_choices(),
                    tooltip="A folder in ComfyUI's input folder, or in a folder listed in the environment variable "
                    f"{ROOTS_VARIABLE}; press R after adding one. images/ and hints/ side by side, or 1.png beside "
                    "1_hint.png. picturebook:edges:200 draws 200 illustrations with their edges (or mask, depth), "
                    "synthetic:edges:200 plain shapes.",
                ),
                io.Combo.Input(
                    "hint", options=list(SETTINGS["hint"].choices), default=PAIRED, tooltip=SETTINGS["hint"].doc
                ),
                io.Int.Input("resolution", default=512, min=64, max=4096, step=8, tooltip=SETTINGS["resolution"].doc),
                io.Boolean.Input("buckets", default=True, optional=True, tooltip=SETTINGS["buckets"].doc),
                io.String.Input(
                    "caption_extension", default=".txt", optional=True, tooltip=SETTINGS["caption_extension"].doc
                ),
            ],
            outputs=[Dataset.Output(display_name="dataset", tooltip="For Train Control.")],
        )

    @classmethod
    def validate_inputs(cls, folder: str | None = None, input_types: Any = None) -> bool | str:
        """Accept folders that are not listed, and connected texts: `execute` reports what is wrong with them."""
        return True

    @classmethod
    def fingerprint_inputs(cls, folder: str, **others: Any) -> Any:
        """Value that changes when a file below the folder does."""
        try:
            path = find_folder(folder)
            files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
            return [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        except (ConfigError, OSError, RuntimeError):  # the node itself reports the fault, where the user sees it
            return folder

    @classmethod
    def execute(
        cls, folder: str, hint: str, resolution: int, buckets: bool = True, caption_extension: str = ".txt"
    ) -> io.NodeOutput:
        settings = {
            "data": (source_of(folder),),
            "hint": hint,
            "resolution": resolution,
            "bucket_step": _step_for(resolution),
            "buckets": buckets,
            "caption_extension": caption_extension,
        }
        files = Files(settings, allowed_roots())
        opened = files.open(make_config(settings))
        sheet = ui.PreviewImage(as_image(contact_sheet(opened)), cls=cls).as_dict()
        return io.NodeOutput(files, ui={**sheet, **show_report(report(opened).text)})


class ControlDatasetImages(ControlNode):
    """Node for a dataset of pictures with hints from the graph."""

    SEARCH = ("train", "dataset", "controlnet", "lora")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ControlDatasetImages",
            display_name="Control Dataset (images)",
            category="ControlNeXt/training",
            description="Images of the graph and the hints that belong to them, to train a control on.",
            inputs=[
                io.Image.Input("images", tooltip="Pictures that the control has to lead to."),
                io.Image.Input("hints", tooltip="One hint per image, in the same order."),
                io.String.Input(
                    "captions",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="One line per image, or one line for all, or nothing.",
                ),
            ],
            outputs=[Dataset.Output(display_name="dataset", tooltip="For Train Control.")],
        )

    @classmethod
    def execute(cls, images: Tensor, hints: Tensor, captions: str = "") -> io.NodeOutput:
        with torch.inference_mode(False):  # tensors made in inference mode cannot be part of a gradient
            kept = images.cpu().clone(), hints.cpu().clone()
        lines = tuple(line.strip() for line in encodable(captions).splitlines() if line.strip())
        dataset = Images(*kept, lines, {"hint": PAIRED})
        dataset.open(TrainConfig())  # complains here about what does not fit
        return io.NodeOutput(dataset)


def as_image(picture: Any) -> Tensor:
    """A PIL image as an IMAGE, (1, H, W, 3) in [0, 1]."""
    import numpy as np

    return torch.from_numpy(np.asarray(picture.convert("RGB")).copy()).float()[None] / 255


def _step_for(resolution: int) -> int:
    """Bucket step for a resolution: 64, or the largest power of two below that divides it."""
    return next(step for step in (64, 32, 16, 8) if resolution % step == 0)

"""Node of the trainer; `train.train` does the work."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import torch
from comfy_api.latest import io, ui

from ...controlnext_core.comfy_adapter.control_node import ControlNode
from .. import state
from ..base_model.controls import load_trained
from ..base_model.encode import BaseWithEncoders
from ..command import run_of
from ..config import SETTINGS, ConfigError, TrainConfig
from ..config_files import make_config, parse_recipe
from ..permission import refusal
from ..results import RunFiles, show_curve
from ..train import Stopped, train
from .datasets import Dataset, Files, Images, as_image
from .observer import NodeObserver

FROM_INPUTS = ("base", "clip", "vae", "data", "validation_data")
"""Keys of a recipe that are inputs of the node."""
NO_PRESET = "none"
RECIPES = Path(__file__).parents[1] / "recipes"
PRESETS = (
    NO_PRESET,
    *sorted(path.stem for path in RECIPES.glob("*.toml") if not path.stem.startswith(("demo_", "picture_"))),
)
"""Choices of the preset: the recipes of the pack by name, without those for the demo's bases."""
FOLDERS = ("output_folder", "runs_folder", "cache_folder")


def recipe_of_node(text: str) -> dict[str, Any]:
    """Settings of a recipe that a node accepts: a graph must not write outside of the host's folders.

    Folders are relative to the host's output folder and must be below it, or below models/controlnext; a file to start
    from must be in models/controlnext. Raises ConfigError.
    """
    settings = {key: value for key, value in parse_recipe(text).items() if key not in FROM_INPUTS}
    output = Path(folder_paths.get_output_directory())
    roots = [output, *map(Path, folder_paths.get_folder_paths("controlnext"))]
    for key in FOLDERS:
        if settings.get(key):
            folder = Path(os.path.abspath(output / settings[key]))
            if not any(folder.is_relative_to(os.path.abspath(root)) for root in roots):
                raise ConfigError(
                    f"{key}: {settings[key]!r} is outside of {output}. Name a folder below it (a link is fine), or "
                    "train with run.py train."
                )
            settings[key] = str(folder)
    if settings.get("init_control"):
        found = folder_paths.get_full_path("controlnext", settings["init_control"])
        if found is None:
            raise ConfigError(
                f"init_control: {settings['init_control']!r} is not in models/controlnext. Put the file there and "
                "write its name."
            )
        settings["init_control"] = found
    return settings


def config_of_node(
    text: str, preset: str | None, widgets: Mapping[str, Any], dataset: Mapping[str, Any]
) -> TrainConfig:
    """Configuration of the node's run. text: of the config box; widgets, dataset: settings from the two nodes.

    Precedence: the config box, the widgets (with a preset only those that were changed), the dataset, the preset.
    Raises ConfigError.
    """
    recipe = recipe_of_node(text)
    if preset in (None, NO_PRESET):
        return make_config(recipe, widgets, dataset)
    if preset not in PRESETS:
        raise ConfigError(f"preset: {preset!r} is unknown. Choose one of {', '.join(PRESETS)}.")
    changed = {key: value for key, value in widgets.items() if value != getattr(TrainConfig(), key)}
    return make_config(recipe, changed, dataset, recipe_of_node((RECIPES / f"{preset}.toml").read_text("utf-8")))


class ControlNeXtTrain(ControlNode):
    """Node that trains a ControlNeXt or a ControlNet-XS and loads the saved file."""

    SEARCH = ("train", "fine-tune", "controlnet", "lora")

    @classmethod
    def define_schema(cls) -> io.Schema:
        defaults = TrainConfig()
        rate = {"min": 0.0, "max": 1.0, "step": 1e-7, "round": 1e-10}
        return io.Schema(
            node_id="ControlNeXtTrain",
            display_name="Train Control",
            category="ControlNeXt/training",
            description="Trains a ControlNeXt or a ControlNet-XS on this model and loads the saved file. Cancel saves "
            "first; queue again to go on. The results are in models/controlnext, the run in "
            "output/controlnext_training.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="The base, with the LoRAs that the control shall know. It is only read."
                ),
                io.Vae.Input("vae", tooltip="The base's VAE."),
                Dataset.Input("dataset", tooltip="From a Control Dataset node."),
                io.Combo.Input(
                    "variant",
                    options=list(SETTINGS["variant"].choices),
                    default=defaults.variant,
                    tooltip="Kind of control, after the model: sd15 for SD1.5, sdxl for SDXL, svd_v2 for SVD; sd3, "
                    "flux and so on by name. xs: a ControlNet-XS for SD1.5, SD2.1 or SDXL. Endings such as _legacy, "
                    "_june and _v1 repeat older releases; new controls need none.",
                ),
                io.Int.Input("steps", default=defaults.steps, min=1, max=10_000_000, tooltip=SETTINGS["steps"].doc),
                io.Int.Input(
                    "batch_size", default=defaults.batch_size, min=1, max=4096, tooltip=SETTINGS["batch_size"].doc
                ),
                io.Float.Input(
                    "learning_rate", default=defaults.learning_rate, **rate, tooltip=SETTINGS["learning_rate"].doc
                ),
                io.Float.Input(
                    "control_learning_rate",
                    default=defaults.control_learning_rate,
                    **rate,
                    tooltip=SETTINGS["control_learning_rate"].doc,
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip=SETTINGS["seed"].doc,
                ),
                io.String.Input("output_name", default=defaults.output_name, tooltip=SETTINGS["output_name"].doc),
                io.Clip.Input("clip", optional=True, tooltip="The base's text encoders; SVD has none."),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="The base's image encoder (SVD, and Wan 2.1 for image to video).",
                ),
                io.String.Input(
                    "config",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip='Further settings as a recipe (TOML), such as trainable = "to_out". They win over the '
                    "widgets; the recipes of the pack are in controlnext_training/recipes.",
                ),
                io.Boolean.Input("resume", default=True, optional=True, tooltip=SETTINGS["resume"].doc),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default=NO_PRESET,
                    optional=True,
                    tooltip="A recipe of the pack to start from. Widgets that you change, the dataset and the config "
                    "box win over it.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with the trained weights of the base, read from the saved file."),
                io.ControlNet.Output(tooltip="The trained control, read from the saved file."),
                io.LossMap.Output(tooltip="The loss of every step, for Plot Loss Graph."),
                io.String.Output(display_name="path", tooltip="The saved file."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(
        cls, variant: str | None = None, config: str | None = None, preset: str | None = None
    ) -> bool | str:
        refused = refusal()
        if refused:
            return refused
        try:
            config_of_node(config or "", preset, {} if variant is None else {"variant": variant}, {})
        except ConfigError as error:
            return f"config: {error}"
        return True

    @classmethod
    def execute(
        cls,
        model: Any,
        vae: Any,
        dataset: Files | Images,
        variant: str,
        steps: int,
        batch_size: int,
        learning_rate: float,
        control_learning_rate: float,
        seed: int,
        output_name: str,
        clip: Any = None,
        clip_vision: Any = None,
        config: str = "",
        resume: bool = True,
        preset: str = NO_PRESET,
    ) -> io.NodeOutput:
        widgets = {
            "variant": variant,
            "steps": steps,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "control_learning_rate": control_learning_rate,
            "seed": seed,
            "output_name": output_name,
            "resume": resume,
        }
        refused = refusal()  # a graph may reach a node without being queued, as from a pack that expands it
        if refused:
            raise ConfigError(refused)
        settings = config_of_node(config, preset, widgets, dataset.settings)
        base = BaseWithEncoders(model, vae, clip, clip_vision)
        observer = NodeObserver(cls.hidden.unique_id)
        run, frames = run_of(settings, base), base.family.frames(settings)
        with torch.inference_mode(False), torch.enable_grad():
            try:
                path = train(base, dataset.open(settings, frames), None, settings, run, observer)
            except Stopped as stopped:
                observer.say(str(stopped))
                comfy.model_management.interrupt_current_processing(False)
                raise comfy.model_management.InterruptProcessingException from stopped
        return io.NodeOutput(
            *load_trained(model, path, settings), _losses(run), str(path), ui=_results(run, observer, cls)
        )


def _losses(run: RunFiles) -> dict[str, list[float]]:
    """Losses of every step, in the form of the host's trainer."""
    found = state.latest(run.folder)
    return {"loss": [] if found is None else found.tensors("losses")["loss"].tolist()}


def _results(run: RunFiles, observer: NodeObserver, cls: type[io.ComfyNode]) -> Any:
    """Loss curve and last grid, shown on the node."""
    from PIL import Image as Pictures

    shown: Sequence[Any] = [Pictures.open(show_curve(run)), *([observer.shown] if observer.shown else [])]
    side = max(max(picture.size) for picture in shown)
    sheets = [as_image(_padded(picture, side)) for picture in shown]
    return ui.PreviewImage(torch.cat(sheets), cls=cls)


def _padded(picture: Any, side: int) -> Any:
    from PIL import Image as Pictures

    scale = side / max(picture.size)
    size = round(picture.width * scale), round(picture.height * scale)
    sheet = Pictures.new("RGB", (side, side), "white")
    filled = picture.convert("RGB").resize(size, Pictures.Resampling.LANCZOS)
    sheet.paste(filled, ((side - size[0]) // 2, (side - size[1]) // 2))
    return sheet

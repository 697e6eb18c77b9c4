"""`python run.py train`: a training run in this process, with ComfyUI's models and without its server.

Standard library only until `run_train`, which a Python without torch does not reach.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from .comfy_server import COMFY_BASE, device_arguments
from .environment import PATIENT_THREADS, ROOT, SetupError
from .launcher import allow_missing_torchaudio, declare_missing_torchvision_ops
from .quiet_start import quiet_logging

RECIPES = ROOT / "controlnext_training" / "recipes"

TINY = "tiny_sd3.ckpt"
"""Base with random weights for `tiny_transformer.toml`, made where it is missing, in a folder that the loaders do not
list."""
BEFORE_RECIPE = ("comfyui", "comfyui_release", "venv", "cpu")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options before the settings; the settings need torch and are parsed once it can be imported."""
    parser.add_argument("--cpu", action="store_true", help="use the CPU even where there is a GPU")
    parser.usage = "run.py train [--comfyui PATH] [--cpu] CONFIG.toml [--SETTING VALUE ...]"
    listing = ", ".join(sorted(path.name for path in RECIPES.glob("*.toml")))
    parser.epilog = f"Recipes in controlnext_training/recipes: {listing}."
    parser.add_argument("recipe", type=Path, metavar="CONFIG.toml", help="a recipe, such as those below")
    parser.add_argument(
        "settings",
        nargs=argparse.REMAINDER,
        metavar="SETTINGS",
        help="keys of the recipe as flags, such as --steps 1000 --no-resume; CONFIG.toml --help lists them",
    )


def _name(flag: str) -> str:
    return flag.lstrip("-").partition("=")[0].replace("-", "_")


def check_order(options: argparse.Namespace) -> None:
    """Raise SetupError for an option of run.py among the settings, before anything is installed or downloaded."""
    for flag in options.settings:
        if flag.startswith("--") and _name(flag) in BEFORE_RECIPE:
            raise SetupError(f"{flag}: stands before CONFIG.toml. Type run.py train {flag} ... CONFIG.toml")


def settings(given: list[str]) -> dict[str, object]:
    """Settings given after the recipe. --help prints the list of all settings and ends the process."""
    from ..controlnext_training.config_files import add_flags, checked, flags_given

    parser = argparse.ArgumentParser("run.py train CONFIG.toml", usage="run.py train CONFIG.toml [--SETTING VALUE ...]")
    add_flags(parser)
    options, unknown = parser.parse_known_args(given)
    if unknown:
        name = _name(unknown[0])
        if not unknown[0].startswith("-"):
            raise SetupError(f"{unknown[0]!r} after CONFIG.toml is not understood. Write settings as --steps 1000")
        checked(name, None)  # raises an error that suggests a setting
    return flags_given(options)


def bring_in_host(host: Path, base: Path, cpu: bool) -> None:
    """Make ComfyUI importable here, with its models and results in `base`, and the further model folders of its
    configuration.
    """
    declare_missing_torchvision_ops()
    allow_missing_torchaudio()
    sys.path.insert(0, str(host))
    from comfy.cli_args import args

    args.cpu = "--cpu" in device_arguments(cpu)
    args.base_directory = str(base)
    more = host / "extra_model_paths.yaml"
    if base == host and more.is_file():  # as the host's main.py
        from utils.extra_config import load_extra_path_config

        load_extra_path_config(str(more))
    from ..controlnext_core.comfy_adapter.files.folders import register_folder

    register_folder()


def tiny_base() -> Path:
    """Path of the file TINY in this clone, made where it is missing."""
    from .tiny_models.tiny_sd3 import make_sd3

    path = COMFY_BASE / "tiny" / TINY
    return path if path.is_file() else make_sd3(path)


def run_train(options: argparse.Namespace, host: Path, own: bool) -> int:
    """Train; returns 0 when the file is written, 130 when the run was stopped and saved.

    own: True means that the host is the user's; False: this project's. Raises SetupError with the fault and its remedy.
    """
    for name, value in PATIENT_THREADS.items():  # before torch is imported and reads them
        os.environ.setdefault(name, value)
    from ..controlnext_training.config_files import make_config, read_recipe
    from .demo_weights.shipped import CHECKPOINT, SOURCES, install

    recipe = options.recipe.resolve()
    base = host if own else COMFY_BASE
    try:
        config = make_config(settings(options.settings), read_recipe(recipe))
        if not own or config.base in SOURCES:
            install(COMFY_BASE, (config.base if config.base in SOURCES else CHECKPOINT,))
        if config.base in SOURCES:
            config = replace(config, base=str(COMFY_BASE / "models" / "checkpoints" / config.base))
        elif config.base == TINY:
            config = replace(config, base=str(tiny_base()))
        quiet_logging(ROOT, COMFY_BASE / "train.log")
        bring_in_host(host, base, options.cpu)
        from ..controlnext_training.command import run_config
        from ..controlnext_training.train import Stopped, TrainingError
        from .reader_processes import readers_of

        try:
            path = run_config(config, recipe.parent, readers_of)
            if os.environ.get("RANK", "0") == "0":  # only one of several processes prints
                print(path)
        except Stopped as stopped:
            print(stopped)
            return 130
        except TrainingError as error:
            raise SetupError(str(error)) from error
    except ValueError as error:  # of the configuration, the data or a file: their messages say what to do
        raise SetupError(str(error)) from error
    return 0

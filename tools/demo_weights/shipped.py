"""Weights of the demo: in the form in which they come with the project, and as files for the host's loaders.

`demo/weights` holds them in 8 or 6 bits (packing.py), the UNet at half its width (widening.py) and without its text
encoder, whose weights are computed (text_encoder.py). `install` writes the files for stock nodes and this pack's;
`ship_base`, `ship_pictures` and `ship_controls` fill the folder from trained files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from ..comfy_server import COMFY_BASE
from ..environment import ROOT, SetupError
from ..tiny_models.storage import save, write_atomically
from . import autoencoder, painter, unet_base
from .assembling import merged, write_checkpoint, write_sd3_checkpoint
from .mmdit import as_the_host_loads
from .packing import pack, unpack
from .running import FOLDER
from .widening import widen

SHIPPED = ROOT / "demo" / "weights"
UNET, AUTOENCODER = "picturebook_unet.safetensors", "picturebook_unet_autoencoder.safetensors"
CHECKPOINT = "picturebook_sd15.ckpt"
MMDIT, PAINTER = "picturebook_mmdit.safetensors", "picturebook_autoencoder.safetensors"
PICTUREBOOK = "picturebook_sd3.ckpt"
XS = "picture_xs_edges.safetensors"
PICTURE_EDGES, PICTURE_MASK = "picture_edges.safetensors", "picture_mask.safetensors"
PICTURE_DEPTH, PICTURE_POSE = "picture_depth.safetensors", "picture_pose.safetensors"
PICTURE_LORA, PICTURE_PRINT = "picture_dusk.safetensors", "picture_print.safetensors"
PRINTBOOK = "picturebook_print_sd3.ckpt"
"""Fine-tune of PICTUREBOOK."""
FOLDERS = {
    **dict.fromkeys((PICTUREBOOK, PRINTBOOK, CHECKPOINT), "checkpoints"),
    **dict.fromkeys((PICTURE_EDGES, PICTURE_MASK, PICTURE_DEPTH, PICTURE_POSE, XS), "controlnext"),
    PICTURE_LORA: "loras",
}
"""File of the demo -> its folder below `models`."""
SOURCES = {CHECKPOINT: (UNET, AUTOENCODER), PICTUREBOOK: (MMDIT, PAINTER), PRINTBOOK: (MMDIT, PAINTER, PICTURE_PRINT)}
"""Checkpoint -> its source files."""
RECIPES = {XS: "demo_xs"}
"""Trained control of the UNet -> its recipe, which is also the name of its result."""
PICTURE_RECIPES = {
    PICTURE_EDGES: "picture_edges",
    PICTURE_MASK: "picture_mask",
    PICTURE_DEPTH: "picture_depth",
    PICTURE_POSE: "picture_pose",
}
"""Trained control of the base of SD3's shape -> its recipe, which is also the name of its result."""
CONTROL_BITS = 6
"""Bits of a control's packed weight; the other files have 8."""
STAMP = "demo.json"


def install(base: Path, names: Iterable[str] = tuple(FOLDERS), shipped: Path = SHIPPED) -> Path:
    """Write these files of FOLDERS into `base`/models, unless they exist and are current; returns `base`/models.

    Raises SetupError for a file that did not come with the project.
    """
    models = base / "models"
    stamp = models / STAMP
    versions = json.loads(stamp.read_text("utf-8")) if stamp.is_file() else {}
    for name in names:
        path, version = models / FOLDERS[name] / name, _version(name, shipped)
        if path.is_file() and versions.get(name) == version:
            continue
        if name == CHECKPOINT:
            wide = {key: value.half() for key, value in widen(read_packed(shipped / UNET)[0]).items()}
            write_checkpoint(path, wide, autoencoder.whole(read_packed(shipped / AUTOENCODER)[0]))
        elif name in (PICTUREBOOK, PRINTBOOK):
            network = read_packed(shipped / MMDIT)[0]
            if name == PRINTBOOK:
                network = merged(network, read_packed(shipped / PICTURE_PRINT)[0])
            write_sd3_checkpoint(path, as_the_host_loads(network), autoencoder.whole(read_packed(shipped / PAINTER)[0]))
        else:
            save(path, *read_packed(shipped / name))
        versions[name] = version
        text = json.dumps(versions, indent=1)
        write_atomically(stamp, lambda file, text=text: file.write_text(text, "utf-8"))  # type: ignore[misc]
    return models


def ship_base(folder: Path = FOLDER, shipped: Path = SHIPPED) -> Path:
    """Pack the UNet base and its autoencoder, where the stages left them in `folder`, into `shipped`."""
    better = folder / "decoder" / autoencoder.FILE
    made = {
        AUTOENCODER: better if better.is_file() else folder / "autoencoder" / autoencoder.FILE,
        UNET: folder / "base" / unet_base.FILE,
    }
    return _ship({name: _load(path) for name, path in made.items() if path.is_file()}, shipped)


def ship_pictures(folder: Path = FOLDER, shipped: Path = SHIPPED) -> Path:
    """Pack the available parts of the picturebook (autoencoder, base, controls, LoRA and fine-tune) into `shipped`."""
    better = folder / "painter_decoder" / painter.FILE
    made = {
        PAINTER: better if better.is_file() else folder / "painter" / painter.FILE,
        MMDIT: folder / "picture_base" / MMDIT,
    }
    made[PICTURE_LORA] = folder / "picture_dusk" / PICTURE_LORA
    made[PICTURE_PRINT] = folder / "picture_print" / PICTURE_PRINT
    _ship({name: _load(path) for name, path in made.items() if path.is_file()}, shipped)
    controls = {name: _trained(recipe) for name, recipe in PICTURE_RECIPES.items()}
    return _ship({name: _load(path) for name, path in controls.items() if path.is_file()}, shipped, CONTROL_BITS)


def train_controls(recipes: Iterable[str] = tuple(RECIPES.values()), base: str = CHECKPOINT) -> Path:
    """Train the controls of these recipes on the shipped base, or resume; returns the folder of the trained files."""
    from ...controlnext_training.command import run_config
    from ...controlnext_training.config_files import make_config, read_recipe

    models = install(COMFY_BASE, (base,))
    for recipe in recipes:
        path = ROOT / "controlnext_training" / "recipes" / f"{recipe}.toml"
        run_config(make_config({"base": str(models / "checkpoints" / base)}, read_recipe(path)), path.parent)
    return models / "controlnext"


def ship_controls(shipped: Path = SHIPPED) -> Path:
    """Pack the controls that `run.py train` made of RECIPES into `shipped`."""
    return _ship({name: _load(_trained(recipe)) for name, recipe in RECIPES.items()}, shipped, CONTROL_BITS)


def _trained(recipe: str) -> Path:
    return COMFY_BASE / "models" / "controlnext" / f"{recipe}.safetensors"


def ship_one(trained: Path, target: Path) -> Path:
    """Pack one trained file in 8 bits."""
    tensors, metadata = _load(trained)
    return save(target, pack(tensors), metadata)


def _ship(content: Mapping[str, tuple[dict[str, Tensor], dict[str, str]]], shipped: Path, bits: int = 8) -> Path:
    for name, (tensors, metadata) in content.items():
        save(shipped / name, pack(tensors, bits), metadata)
    return shipped


def read_packed(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors in fp16 and metadata of a packed file."""
    tensors, metadata = _load(path)
    return unpack(tensors), metadata


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise SetupError(
            f"{path} is missing. It comes with the repository (git checkout -- demo/weights); who trains the demo's "
            "weights again runs the stages of `run.py train-demo` in order."
        )
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _version(name: str, shipped: Path) -> str:
    """Version of the file's sources and of the code that unpacks them."""
    digest = hashlib.sha256()
    sources = [shipped / source for source in SOURCES.get(name, (name,))]
    for path in (*filter(Path.is_file, sources), *sorted(Path(__file__).parent.glob("*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()

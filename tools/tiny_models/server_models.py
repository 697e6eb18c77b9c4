"""Model folder of the tests' server."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from .checkpoints import make_sd15
from .storage import write_atomically
from .tiny_controls import make_controlnext, make_lora, make_stock_controlnet, make_unet_difference
from .tiny_sd3 import make_sd3

STAMP = "tiny_models.version"
MAKERS: dict[str, tuple[str, str, Callable[[Path], Path]]] = {
    "checkpoint": ("checkpoints", "tiny_sd15.ckpt", make_sd15),
    "transformer": ("checkpoints", "tiny_sd3.ckpt", make_sd3),
    "control": ("controlnext", "demo/controlnet.safetensors", lambda path: make_controlnext(path, "gen2")),
    "weights": ("controlnext", "demo/unet.safetensors", make_unet_difference),
    "lora": ("loras", "tiny_lora.safetensors", make_lora),
    "stock_control": ("controlnet", "tiny_controlnet.pth", make_stock_controlnet),
}
"""Role -> folder below `models`, file name, maker. All weights are random."""


def make_demo_models(base_dir: Path) -> dict[str, str]:
    """Fill `base_dir`/models and return the file names in the form of the host's widgets.

    Existing files are not replaced, unless the makers have changed: the stamp file holds the hash of their source.
    """
    models = Path(base_dir) / "models"
    stamp = models / STAMP
    version = _version()
    current = stamp.is_file() and stamp.read_text("utf-8") == version
    for folder, name, make in MAKERS.values():
        path = models / folder / name
        if not (current and path.is_file()):
            make(path)
    write_atomically(stamp, lambda file: file.write_text(version, "utf-8"))
    return {key: str(Path(name)) for key, (_, name, _) in MAKERS.items()}


def remove_demo_models(base_dir: Path) -> None:
    """Delete the random weights that an earlier version of this project wrote to `base_dir`/models.

    The stamp file marks models of this project; without it nothing is deleted.
    """
    models = Path(base_dir) / "models"
    if not (models / STAMP).is_file():
        return
    for folder, name, _ in MAKERS.values():
        (models / folder / name).unlink(missing_ok=True)
    (models / STAMP).unlink()


def _version() -> str:
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()

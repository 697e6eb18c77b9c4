"""Opens hostile cases in a process with limits, a line of JSON for each: `child.py FOLDER SEED PART:FIRST:COUNT ...`.

A part with `@host` or `@diffusers` behind its name is opened by their readers of weight files, for comparison.

A case ends well where it is opened, or refused by an error of the pack that names the file and is short.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
MEMORY = 2 << 30
"""Bytes of address space beyond what the process has before the first case."""
SECONDS = 10.0
"""Seconds of processor time for a case; the sound ones take a tenth of a second."""
MAX_MESSAGE = 4000


def limit() -> None:
    """Limit memory to MEMORY, and processor time to far more than is needed."""
    try:
        import resource
    except ImportError:  # Windows
        return
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def open_weights(path: Path) -> None:
    """Open a weight file with all functions of the pack that need no host."""
    from comfyui_controlnext.controlnext_core import checkpoint
    from comfyui_controlnext.controlnext_core.detection import read_control_file
    from comfyui_controlnext.controlnext_core.finite import check_weights
    from comfyui_controlnext.controlnext_core.published_unets import unet_config_of
    from comfyui_controlnext.controlnext_core.xs_detection import read_xs_file

    header = checkpoint.peek(path)
    refusals: list[checkpoint.CheckpointError] = []
    readers: tuple[Callable[[], Any], ...] = (
        lambda: read_control_file(header),
        lambda: read_xs_file(header).config(),
        lambda: unet_config_of(header.shapes, str(path)),
    )
    for read in readers:
        try:
            read()
        except checkpoint.CheckpointError as error:
            refusals.append(error)
    check_weights(checkpoint.load(path), str(path))
    if len(refusals) == len(readers):
        raise max(refusals, key=lambda error: len(str(error)))


def open_tensors(path: Path) -> None:
    """Names and values of a torch file, for any network."""
    from comfyui_controlnext.controlnext_core import checkpoint

    header = checkpoint.peek(path)
    assert {name: tuple(tensor.shape) for name, tensor in checkpoint.load(path).items()} == header.shapes


def open_recipe(path: Path) -> None:
    from comfyui_controlnext.controlnext_core.key_maps import unet_key_map
    from comfyui_controlnext.controlnext_training.config_files import make_config, read_recipe
    from comfyui_controlnext.controlnext_training.trainables import selected

    config = make_config(read_recipe(path))
    selected(unet_key_map(SD15), config.trainable, config.blocks)


SD15: dict[str, Any] = {
    "channel_mult": (1, 2, 4, 4),
    "num_res_blocks": [2, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
}


def open_folder(path: Path) -> None:
    from comfyui_controlnext.controlnext_training.data import open_dataset
    from comfyui_controlnext.controlnext_training.data.samples import BrokenSample

    data = open_dataset([path], hint="canny", resolution=64, bucket_step=64, roots=[path])
    for number in range(len(data)):
        try:
            data.load(number)
        except BrokenSample:
            continue


def host_loader(folder: Path) -> Callable[[Path], None]:
    """Load ControlNeXt on a tiny model in the real host."""
    import torch
    from comfyui_controlnext.tests import conftest  # noqa: F401  # brings in the host
    from comfyui_controlnext.tools.tiny_models import make_sd15

    path = make_sd15(folder / "sd15.ckpt")
    import comfy.sd
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.loading import load_controlnext

    with torch.inference_mode():
        model = comfy.sd.load_checkpoint_guess_config(str(path), output_vae=False, output_clip=False)[0]

    def load(case: Path) -> None:
        with torch.inference_mode():
            load_controlnext(model, case)

    return load


def others_loader(name: str) -> Callable[[Path], None]:
    """Reader of weight files that the host, or diffusers, uses for downloaded files."""
    if name == "diffusers":
        from diffusers.models.model_loading_utils import load_state_dict

        return lambda path: load_state_dict(str(path))
    from comfyui_controlnext.tests import conftest

    assert conftest.HOST, "CONTROLNEXT_COMFYUI names the host"  # importing conftest has brought it in
    import comfy.utils

    return lambda path: comfy.utils.load_torch_file(str(path), safe_load=True)


def allowed() -> tuple[type[Exception], ...]:
    from comfyui_controlnext.controlnext_core.checkpoint import CheckpointError
    from comfyui_controlnext.controlnext_training.config import ConfigError
    from comfyui_controlnext.controlnext_training.data.samples import DatasetError

    return CheckpointError, ConfigError, DatasetError


def outcome(read: Callable[[Path], None], path: Path, known: tuple[type[Exception], ...]) -> dict[str, Any]:
    """Result of a case: `opened`, `refused`, or a fault."""
    from comfyui_controlnext.controlnext_core.encodable import make_encodable

    started = time.process_time()
    try:
        read(path)
        found = {"end": "opened"}
    except known as error:
        text = str(make_encodable(error))  # as the class of all nodes does it
        named = path.name in text or path.suffix == ".toml"
        found = {"end": "refused" if named and len(text) < MAX_MESSAGE else "unnamed", "text": text[:500]}
    except ValueError as error:  # of the base's own check
        named = path.name in str(error)
        found = {"end": "refused" if named else f"raw {type(error).__name__}", "text": ascii(str(error)[:300])}
    except Exception as error:
        found = {"end": f"raw {type(error).__name__}", "text": ascii(str(error)[:300])}
    seconds = time.process_time() - started
    return {**found, "end": found["end"] if seconds < SECONDS else "slow", "seconds": round(seconds, 3)}


def main(folder: Path, seed: int, *parts: str) -> None:
    runpy.run_path(str(ROOT / "_alias.py"))
    from comfyui_controlnext.tests.host.hostile.mutator import MAKERS, rng_of

    readers = {"safetensors": open_weights, "torch": open_tensors, "recipes": open_recipe, "data": open_folder}
    if any(part.startswith("loader:") for part in parts):
        readers["loader"] = host_loader(folder)
    for part in {text.partition(":")[0] for text in parts if "@" in text}:
        readers[part] = others_loader(part.partition("@")[2])
    known = allowed()
    limit()
    for part, first, count in (text.split(":") for text in parts):
        made = part.partition("@")[0]
        for number in range(int(first), int(first) + int(count)):
            say({"begun": number, "part": part})
            path = MAKERS[made](folder / f"case{number}", rng_of(made, seed, number))
            say({"number": number, "part": part, **outcome(readers[part], path, known)})
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def say(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])

"""`python run.py comfy`: a real ComfyUI with the pack, for use in a browser."""

import contextlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from .comfy_client import Workflow
from .comfy_server import COMFY_BASE, ComfyServer, device_arguments, prepare_base, require_free_port
from .environment import ROOT
from .quiet_start import Follower, QuietStart

PHOTOGRAPH = ROOT / "demo" / "astronaut.jpg"
PICTURES, PICTURES_SIDE, PICTURES_SEED = 12, 512, 77
"""Number, side and seed of the drawn pictures in the folder of the training template."""


def for_this_system(workflow: Any) -> Workflow:
    """Workflow with `folder/file` names in the form of this system's host (backslashes on Windows)."""
    import os

    adapted = json.loads(json.dumps(workflow))
    for node in adapted.values():
        for name, value in node["inputs"].items():
            if name.endswith("_name") and isinstance(value, str):
                node["inputs"][name] = value.replace("/", os.sep)
    return adapted


def fill(base: Path) -> None:
    """Install the demo's models and inputs for every template in a base directory; random weights of earlier versions
    of this project are deleted.
    """
    from .demo_weights.shipped import install
    from .tiny_models.server_models import remove_demo_models
    from .workflows.training_graphs import FOLDER

    prepare_base(base)
    remove_demo_models(base)
    install(base)
    shutil.copyfile(PHOTOGRAPH, base / "input" / PHOTOGRAPH.name)
    draw_pictures(base / "input" / FOLDER)


def draw_pictures(folder: Path) -> None:
    """Draw pictures with captions to train on, unless the folder exists."""
    from PIL import Image

    from ..controlnext_core.picturebook import draw

    if folder.exists():
        return
    folder.mkdir(parents=True)
    for index in range(PICTURES):
        picture = draw(PICTURES_SEED, index, PICTURES_SIDE)
        Image.fromarray(picture.image).save(folder / f"{index + 1}.png")
        (folder / f"{index + 1}.txt").write_text(picture.caption + "\n", "utf-8")


def serve(host: Path, port: int, models: Path | None, cpu: bool) -> int:
    """Run the server in the foreground until Ctrl-C; returns its exit status. models: a further folder of the user's,
    also listed.
    """
    require_free_port(port)
    base = COMFY_BASE
    fill(base)
    log = base / "server.log"
    arguments = device_arguments(cpu)
    server = ComfyServer.start(host, base, port=port, models=models, arguments=arguments, log=log, wait=False)
    quiet = QuietStart(ROOT)
    console = Follower(log, quiet, lambda text: print(text, end="", flush=True))
    console.start()
    try:
        server.wait_until_ready()
        server.require_pack(ROOT)
        print(f"\nComfyUI with the pack: http://{server.address}   (Ctrl-C stops it)")
        print("Besides the stock nodes only this pack's are loaded.")
        print(f"First picture: Templates, {ROOT.name} under Extensions, 'Demo, runs now', Run.")
        if quiet.hidden:
            print(f"{quiet.hidden} notices of parts that are not needed here are in {log}.")
        print(f"Put models into {base / 'models'}; results appear in {base / 'output'}.\n", flush=True)
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return server.process.wait(0.5)  # on Windows a wait without limit does not notice Ctrl-C
    except KeyboardInterrupt:
        server.stop()
        return 0
    finally:
        server.stop()
        console.stop()

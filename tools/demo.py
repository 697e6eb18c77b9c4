"""`python run.py comfy`, the pack in a real ComfyUI for a person, and what it shares with the demo (demo_sheet.py)."""

import contextlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from .comfy_client import Workflow
from .comfy_server import COMFY_BASE, ComfyServer, device_arguments, prepare_base, require_free_port
from .environment import ROOT
from .tiny_models import make_demo_models

PHOTOGRAPH = ROOT / "demo" / "astronaut.jpg"


def for_this_system(workflow: Any) -> Workflow:
    """The workflow with `folder/file` names as this system's host lists them (backslashes on Windows)."""
    import os

    adapted = json.loads(json.dumps(workflow))
    for node in adapted.values():
        for name, value in node["inputs"].items():
            if name.endswith("_name") and isinstance(value, str):
                node["inputs"][name] = value.replace("/", os.sep)
    return adapted


def serve(host: Path, port: int, models: Path | None, cpu: bool) -> int:
    """Run the server in the foreground until Ctrl-C; return its exit status. models: the person's own, also listed."""
    require_free_port(port)
    from .demo_sheet import demo_hints, uploads
    from .demo_weights.shipped import install

    base = COMFY_BASE
    prepare_base(base)
    make_demo_models(base)
    install(base)
    shutil.copyfile(PHOTOGRAPH, base / "input" / PHOTOGRAPH.name)
    for name, content in uploads(demo_hints()).items():
        (base / "input" / name).write_bytes(content)
    server = ComfyServer.start(host, base, port=port, models=models, arguments=device_arguments(cpu), wait=False)
    try:
        server.wait_until_ready()
        print(f"\nComfyUI with the pack: http://{server.address}   (Ctrl-C stops it)")
        print("Besides the stock nodes only this pack's are loaded.")
        print(f"Put models into {base / 'models'}; results appear in {base / 'output'}.\n", flush=True)
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return server.process.wait(0.5)  # on Windows a wait without limit does not notice Ctrl-C
    except KeyboardInterrupt:
        server.stop()
        return 0
    finally:
        server.stop()

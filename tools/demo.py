"""`python run.py demo` and `python run.py comfy`: the pack in a real ComfyUI, once by itself and once for a person.

The demo's workflow saves three pictures: its SaveImage nodes' prefixes end in the names of PANELS. The models are small
random ones made here, so the pictures show that the control acts, not what trained weights paint.
"""

import contextlib
import io
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from .comfy_client import Run, Workflow
from .comfy_server import ComfyServer, fresh_base, prepare_base, require_free_port
from .environment import ROOT
from .tiny_models import make_demo_models

WORKFLOW = ROOT / "example_workflows" / "api" / "demo_sd15_canny.json"
PHOTOGRAPH = ROOT / "demo" / "astronaut.jpg"
PANELS = ("hint", "without_control", "with_control")


def device_arguments(cpu: bool) -> list[str]:
    """main.py's options for the device: the CPU if asked for or if torch sees nothing better."""
    import torch

    mps = torch.backends.mps.is_available()
    xpu = hasattr(torch, "xpu") and torch.xpu.is_available()
    return [] if not cpu and (torch.cuda.is_available() or mps or xpu) else ["--cpu"]


def for_this_system(workflow: Any) -> Workflow:
    """The workflow with `folder/file` names as this system's host lists them (backslashes on Windows)."""
    import os

    adapted = json.loads(json.dumps(workflow))
    for node in adapted.values():
        for name, value in node["inputs"].items():
            if name.endswith("_name") and isinstance(value, str):
                node["inputs"][name] = value.replace("/", os.sep)
    return adapted


class Progress:
    """Prints one line when a node starts and one per sampling step. workflow: to name the nodes."""

    def __init__(self, workflow: Workflow) -> None:
        self.workflow = workflow
        self.started = time.monotonic()

    def __call__(self, kind: str, data: dict[str, Any]) -> None:
        """As `on_event` of ComfyClient.run."""
        node = data.get("node")
        if node is None or kind not in ("executing", "progress"):
            return
        name = self.workflow[node]["class_type"]
        step = f"  {data['value']}/{data['max']}" if kind == "progress" else ""
        print(f"  {time.monotonic() - self.started:6.1f} s  {name}{step}", flush=True)


def pick_panels(workflow: Workflow, run: Run, server: ComfyServer) -> dict[str, bytes]:
    """{name in PANELS: PNG} from the SaveImage nodes of the finished workflow."""
    found: dict[str, bytes] = {}
    for node_id, node in workflow.items():
        panel = str(node["inputs"].get("filename_prefix", "")).rpartition("/")[2]
        if panel in PANELS and node_id in run.outputs:
            found[panel] = server.image(run.outputs[node_id]["images"][0])
    if len(found) != len(PANELS):
        raise KeyError(f"{WORKFLOW}: it saves {sorted(found)}, expected SaveImage prefixes ending in {PANELS}")
    return found


def contact_sheet(panels: dict[str, bytes]) -> bytes:
    """One PNG with the pictures side by side under their names, scaled to the first one's height."""
    from PIL import Image, ImageDraw, ImageFont

    pictures = {name: Image.open(io.BytesIO(content)).convert("RGB") for name, content in panels.items()}
    height, margin, label = max(256, next(iter(pictures.values())).height), 12, 32
    scaled = {name: item.resize((item.width * height // item.height, height)) for name, item in pictures.items()}
    width = sum(item.width + margin for item in scaled.values()) + margin
    sheet = Image.new("RGB", (width, height + label + margin), "white")
    draw, font, left = ImageDraw.Draw(sheet), ImageFont.load_default(size=18), margin
    for name, picture in scaled.items():
        draw.text((left, 6), name.replace("_", " "), fill="black", font=font)
        sheet.paste(picture, (left, label))
        left += picture.width + margin
    stream = io.BytesIO()
    sheet.save(stream, "PNG")
    return stream.getvalue()


def run_demo(host: Path, cpu: bool, output: Path = ROOT / "demo_output") -> Path:
    """Queue the demo's workflow in `host`, save its pictures and a contact sheet; return the sheet's path."""
    started = time.monotonic()
    base = fresh_base(ROOT / ".host" / "base-demo")
    print("Making small models with random weights.", flush=True)
    make_demo_models(base)
    print(f"Starting ComfyUI of {host}.", flush=True)
    arguments = [*device_arguments(cpu), "--disable-api-nodes"]
    with ComfyServer.start(host, base, arguments=arguments, log=base / "server.log") as server:
        print(f"  {time.monotonic() - started:6.1f} s  it answers at http://{server.address}", flush=True)
        server.upload_image(PHOTOGRAPH)
        workflow = for_this_system(json.loads(WORKFLOW.read_text(encoding="utf-8")))
        run = server.run(workflow, Progress(workflow))
        panels = pick_panels(workflow, run, server)
    output.mkdir(exist_ok=True)
    ordered = {name: panels[name] for name in PANELS}
    for name, content in {**ordered, "contact_sheet": contact_sheet(ordered)}.items():
        (output / f"{name}.png").write_bytes(content)
    sheet = output / "contact_sheet.png"
    print(f"Done in {time.monotonic() - started:.1f} s: {sheet}\n(random weights: look for the control's effect)")
    return sheet


def serve(host: Path, port: int, models: Path | None, cpu: bool) -> int:
    """Run the server in the foreground until Ctrl-C; return its exit status. models: the person's own, also listed."""
    require_free_port(port)
    base = ROOT / ".host" / "base-comfy"
    prepare_base(base)
    make_demo_models(base)
    shutil.copyfile(PHOTOGRAPH, base / "input" / PHOTOGRAPH.name)
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

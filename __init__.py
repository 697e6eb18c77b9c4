"""ComfyUI-ControlNeXt: entry point for the host. No logic; the nodes are in `nodes/`."""

import importlib.util
import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).with_name("_alias.py")))

WEB_DIRECTORY = "./web"
NODE_CLASS_MAPPINGS: dict[str, type] = {}

if importlib.util.find_spec("comfy"):  # without the host (pytest imports this file) there is nothing to register
    from comfyui_controlnext.nodes import NODE_CLASS_MAPPINGS as _nodes

    NODE_CLASS_MAPPINGS.update(_nodes)

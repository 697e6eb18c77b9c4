"""ComfyUI-ControlNeXt: entry point for the host. No logic; the nodes are in `nodes/`."""

import importlib.util
import os
import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).with_name("_alias.py")))

WEB_DIRECTORY = "./web"
NODE_CLASS_MAPPINGS: dict[str, type] = {}

# without the host (pytest imports this file) there is nothing to register
if importlib.util.find_spec("comfy"):
    from comfyui_controlnext import nodes
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.folders import register_folder
    from comfyui_controlnext.controlnext_core.comfy_adapter.page_files import serve_page_files

    register_folder()
    serve_page_files(Path(__file__).parent)
    NODE_CLASS_MAPPINGS.update(nodes.NODE_CLASS_MAPPINGS)
    if os.environ.get("CONTROLNEXT_TRAINING", "1") != "0":
        from comfyui_controlnext import controlnext_training

        NODE_CLASS_MAPPINGS.update(controlnext_training.NODE_CLASS_MAPPINGS)

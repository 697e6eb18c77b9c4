"""Training of ControlNeXt and ControlNet-XS: in the graph, over the API, and with `python run.py train`.

A separate pack in the same clone: the root registers its nodes unless CONTROLNEXT_TRAINING=0.
"""

import importlib.util
import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parents[1] / "_alias.py"))

NODE_CLASS_MAPPINGS: dict[str, type] = {}

# without the host there are no nodes; the rest of the pack works without it
if importlib.util.find_spec("comfy_api"):
    from comfyui_controlnext.controlnext_training.nodes import NODE_CLASS_MAPPINGS as _NODES

    NODE_CLASS_MAPPINGS.update(_NODES)

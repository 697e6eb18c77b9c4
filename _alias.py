"""Give this folder its one import name, `comfyui_controlnext`.

ComfyUI names a custom node pack after its path, and `nodes` and `models` already exist in the host, so every
entry point runs this file (`runpy.run_path`) and then imports `comfyui_controlnext.*`. It imports nothing of the pack.
"""

import sys
import types
from pathlib import Path

NAME = "comfyui_controlnext"
ROOT = Path(__file__).resolve().parent

if NAME not in sys.modules:
    _module = types.ModuleType(NAME, "ControlNeXt and ControlNet-XS for ComfyUI.")
    _module.__path__ = [str(ROOT)]
    sys.modules[NAME] = _module
elif [str(ROOT)] != list(sys.modules[NAME].__path__):
    raise ImportError(
        f"{ROOT}: another copy of this pack is already loaded from {sys.modules[NAME].__path__[0]}. "
        "Keep one copy in custom_nodes, remove the other, restart ComfyUI."
    )

"""Write locales/en/nodeDefs.json: `python tools/make_locales.py [ADDRESS]`

ADDRESS is a running ComfyUI with this pack (default 127.0.0.1:8188). The English texts are those of the nodes; other
languages are written by hand to the same keys. Tests fail where the English file differs or another one lacks a key.
"""

import json
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "_alias.py"))

from comfyui_controlnext.tools.comfy_client import ComfyClient, ComfyError  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
CATEGORY = "ControlNeXt"
PATH = ROOT / "locales" / "en" / "nodeDefs.json"


def own_nodes(object_info: Mapping[str, Any]) -> dict[str, Any]:
    """Descriptions of this pack's nodes, from a host."""
    return {name: info for name, info in object_info.items() if info["category"].split("/")[0] == CATEGORY}


def node_texts(info: Mapping[str, Any]) -> dict[str, Any]:
    """One entry of nodeDefs.json, as the page reads it."""
    inputs = {
        name: {"name": name, "tooltip": options[0]["tooltip"]}
        for part in ("required", "optional")
        for name, (_, *options) in info["input"].get(part, {}).items()
    }
    outputs = {
        str(index): {"name": name, "tooltip": tooltip}
        for index, (name, tooltip) in enumerate(zip(info["output_name"], info["output_tooltips"], strict=True))
    }
    return {
        "display_name": info["display_name"],
        "description": info["description"],
        "inputs": inputs,
        "outputs": outputs,
    }


def english(object_info: Mapping[str, Any]) -> str:
    """The text of locales/en/nodeDefs.json. Raises KeyError where an input has no tooltip."""
    texts = {name: node_texts(info) for name, info in sorted(own_nodes(object_info).items())}
    return json.dumps(texts, indent=2, ensure_ascii=False) + "\n"


def main(address: str = "127.0.0.1:8188") -> None:
    """Ask the server at `address` for its nodes and write the file."""
    PATH.parent.mkdir(parents=True, exist_ok=True)
    PATH.write_text(english(ComfyClient(address).object_info()), encoding="utf-8", newline="\n")
    print(PATH.relative_to(ROOT))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:2])
    except ComfyError as error:
        sys.exit(str(error))

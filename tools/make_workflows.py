"""Write example_workflows/ and subgraphs/: `python tools/make_workflows.py [ADDRESS]`

ADDRESS is a running ComfyUI with this pack (default 127.0.0.1:8188, started by `python run.py comfy`); only its list of
nodes is read. Each workflow is described once, in tools/workflows/; a test fails where the files differ.
"""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

if __package__ in (None, ""):
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "_alias.py"))

from comfyui_controlnext.tools.comfy_client import ComfyClient, ComfyError  # noqa: E402
from comfyui_controlnext.tools.workflow_blueprints import Blueprint, blueprint_format  # noqa: E402
from comfyui_controlnext.tools.workflow_graph import ObjectInfo, Workflow, api_format, page_format  # noqa: E402
from comfyui_controlnext.tools.workflows import (
    blueprints,
    clip_graphs,
    demo_graphs,
    image_graphs,
    training_graphs,
    wan_graphs,
    xs_graphs,
)  # noqa: E402

FOLDER = Path(__file__).resolve().parents[1] / "example_workflows"
WORKFLOWS: tuple[Callable[[], Workflow], ...] = (
    demo_graphs.demo,
    demo_graphs.demo_train,
    demo_graphs.demo_tiles,
    image_graphs.sd15_canny,
    image_graphs.sd15_depth,
    image_graphs.sd15_depth_in_mask,
    image_graphs.sd15_pose,
    image_graphs.sd15_pose_positive,
    image_graphs.sd15_mask,
    image_graphs.sd35_canny,
    image_graphs.sdxl_canny,
    image_graphs.sdxl_second_pass,
    image_graphs.sdxl_depth,
    image_graphs.sdxl_lora_two_controls,
    xs_graphs.xs_sd15_canny,
    xs_graphs.xs_sdxl_canny,
    xs_graphs.xs_sdxl_depth,
    xs_graphs.xs_sdxl_two,
    xs_graphs.xs_controlnext_lora,
    clip_graphs.svd_short_clip,
    clip_graphs.svd_long_clip,
    wan_graphs.wan_pose,
    wan_graphs.wan_depth,
    wan_graphs.wan_outpaint,
    training_graphs.train_sd15,
    training_graphs.train_sd35,
)
BLUEPRINTS: tuple[Callable[[], Blueprint], ...] = (blueprints.controlnext_from_picture, blueprints.xs_from_picture)
SUBGRAPHS = FOLDER.with_name("subgraphs")


def files(object_info: ObjectInfo) -> dict[Path, str]:
    """Files that this script writes, with their texts."""
    written: dict[Path, str] = {}
    for describe in WORKFLOWS:
        workflow = describe()
        for path, made in (
            (FOLDER / f"{workflow.title}.json", page_format),
            (FOLDER / "api" / f"{workflow.name}.json", api_format),
        ):
            written[path] = _text(made(workflow, object_info))
    for blueprint in (describe() for describe in BLUEPRINTS):
        written[SUBGRAPHS / f"{blueprint.inner.title}.json"] = _text(blueprint_format(blueprint, object_info))
    return written


def _text(graph: object) -> str:
    return json.dumps(graph, indent=2, ensure_ascii=False) + "\n"


def main(address: str = "127.0.0.1:8188") -> None:
    """Ask the server at `address` for its nodes and write the files."""
    for path, text in files(ComfyClient(address).object_info()).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
        print(path.relative_to(FOLDER.parent))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:2])
    except ComfyError as error:
        sys.exit(str(error))

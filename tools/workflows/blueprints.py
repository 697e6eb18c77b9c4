"""Subgraph blueprints: a picture in, a controlled MODEL out, in one node."""

from ..workflow_blueprints import Blueprint
from ..workflow_graph import Node, Workflow
from ..workflow_layout import Column
from .image_graphs import SDXL_CANNY
from .xs_graphs import XS_SDXL_CANNY

LOADING, APPLYING = range(2)
ARRANGEMENT = (Column((LOADING,), 1), Column((APPLYING,), 1))


def _canny(workflow: Workflow) -> Node:
    return workflow.add(LOADING, "Canny", low_threshold=0.2, high_threshold=0.5)


def controlnext_from_picture() -> Blueprint:
    """Blueprint that controls MODEL with the edges of a picture through ControlNeXt, with its UNet weights."""
    workflow = Workflow(
        "controlnext_from_picture", "Control from a picture (ControlNeXt canny)", ("", ""), arrangement=ARRANGEMENT
    )
    encoder = SDXL_CANNY[0]
    canny = _canny(workflow)
    loader = workflow.add(LOADING, "ControlNeXtLoader", control_name=encoder.name, weights_name="auto")
    applied = workflow.add(
        APPLYING,
        "ControlNeXtApply",
        model=loader["MODEL"],
        control_net=loader["CONTROL_NET"],
        image=canny["IMAGE"],
        strength=0.35,
    )
    return Blueprint(
        workflow,
        "Draws the edges of a picture and controls MODEL with them, by ControlNeXt.",
        {
            "model": (loader, "model"),
            "image": (canny, "image"),
            "control_name": (loader, "control_name"),
            "weights_name": (loader, "weights_name"),
            "strength": (applied, "strength"),
            "low_threshold": (canny, "low_threshold"),
            "high_threshold": (canny, "high_threshold"),
        },
        {"MODEL": applied["MODEL"], "hint": canny["IMAGE"]},
    )


def xs_from_picture() -> Blueprint:
    """Blueprint that controls MODEL with the edges of a picture through ControlNet-XS."""
    workflow = Workflow(
        "xs_from_picture", "Control from a picture (ControlNet-XS canny)", ("", ""), arrangement=ARRANGEMENT
    )
    canny = _canny(workflow)
    loader = workflow.add(LOADING, "ControlNetXSLoader", control_name=XS_SDXL_CANNY.name)
    applied = workflow.add(
        APPLYING, "ControlNeXtApply", control_net=loader["CONTROL_NET"], image=canny["IMAGE"], strength=1.0
    )
    return Blueprint(
        workflow,
        "Draws the edges of a picture and controls MODEL with them, by ControlNet-XS.",
        {
            "model": (applied, "model"),
            "image": (canny, "image"),
            "control_name": (loader, "control_name"),
            "strength": (applied, "strength"),
            "low_threshold": (canny, "low_threshold"),
            "high_threshold": (canny, "high_threshold"),
        },
        {"MODEL": applied["MODEL"], "hint": canny["IMAGE"]},
    )

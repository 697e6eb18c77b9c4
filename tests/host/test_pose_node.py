"""Node ControlNeXtPoseAlign in the real host: registered, described, and its frames work with stock nodes."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.comfy
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def node() -> Any:
    from comfyui_controlnext.nodes import NODE_CLASS_MAPPINGS

    return NODE_CLASS_MAPPINGS["ControlNeXtPoseAlign"]


def pose_frame(shift: float) -> dict[str, Any]:
    """Frame with a line of body points down a 64x128 picture."""
    points = [value for index in range(18) for value in (20.0 + index + shift, 10.0 + 6 * index, 1.0)]
    return {"people": [{"pose_keypoints_2d": points}], "canvas_width": 64, "canvas_height": 128}


def test_inputs_outputs_and_category_are_the_public_ones(node: Any) -> None:
    inputs = node.INPUT_TYPES()["required"]
    assert {name: spec[0] for name, spec in inputs.items()} == {
        "reference_pose": "POSE_KEYPOINT",
        "driving_poses": "POSE_KEYPOINT",
        "width": "INT",
        "height": "INT",
    }
    assert list(node.RETURN_TYPES) == ["IMAGE"]
    assert node.CATEGORY == "ControlNeXt/hints"


def test_everything_has_a_tooltip_and_the_node_a_help_page(node: Any) -> None:
    schema = node.define_schema()
    assert schema.node_id == "ControlNeXtPoseAlign"
    for port in (*schema.inputs, *schema.outputs):
        assert port.tooltip
    page = (ROOT / "web" / "docs" / "ControlNeXtPoseAlign.md").read_text(encoding="utf-8")
    for port in schema.inputs:
        assert port.id in page


def test_the_reference_comes_first_as_float_images(node: Any) -> None:
    (images,) = node.execute([pose_frame(0)], [pose_frame(9), pose_frame(9)], 64, 128).result
    assert images.shape == (3, 128, 64, 3)
    assert images.dtype == torch.float32
    assert 0 <= float(images.min()) < 0.5 < float(images.max()) <= 1
    assert torch.equal(images[0], images[1])  # the shift is undone
    assert torch.equal(images[1], images[2])


def test_errors_reach_the_user(node: Any) -> None:
    with pytest.raises(ValueError, match="width: 60 must be a multiple of 8"):
        node.execute([pose_frame(0)], [pose_frame(0)], 60, 128)
    with pytest.raises(ValueError, match="driving_poses: has no frames"):
        node.execute([pose_frame(0)], [], 64, 128)

"""Sample inputs and their node: every kind in any size, and the required content of the pictures."""

from typing import Any

import numpy as np
import pytest
from comfyui_controlnext.controlnext_core.hints import sample_inputs
from comfyui_controlnext.controlnext_core.hints.sample_inputs import CLIPS, KINDS, PHOTOGRAPH, SCENE_NAMES, sample
from comfyui_controlnext.controlnext_core.picturebook import draw
from PIL import Image

SIZES = ((128, 128), (96, 160), (160, 96))
FRAMES = 6


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_the_size_and_frames_that_were_asked_for(kind: str, size: tuple[int, int]) -> None:
    found = sample(kind, size, frames=FRAMES)
    frames = FRAMES if kind in CLIPS else 1
    assert found.images.shape == (frames, size[1], size[0], 3) and found.masks.shape == (frames, size[1], size[0])
    assert found.images.dtype == found.masks.dtype == np.float32
    for values in (found.images, found.masks):
        assert values.min() >= 0 and values.max() <= 1 and np.ptp(values) > 0.3
    if kind in CLIPS:
        assert np.abs(found.images[0] - found.images[-1]).max() > 0.1, "it moves"


@pytest.mark.parametrize("scene", SCENE_NAMES)
def test_hints_of_a_scene_lie_on_each_other(scene: str) -> None:
    edges, mask, depth = (sample(kind, (128, 128), scene) for kind in ("edges", "mask", "depth"))
    things = mask.images[0, ..., 0] > 0.5
    assert np.array_equal(mask.images[0, ..., 0], mask.masks[0]) and np.array_equal(edges.masks, mask.masks)
    border = things ^ np.roll(things, 1, 1)
    lines = edges.images[0].max(-1) > 0.2
    near_a_line = lines | np.roll(lines, 1, 1) | np.roll(lines, -1, 1) | np.roll(lines, 1, 0) | np.roll(lines, -1, 0)
    assert near_a_line[border].mean() > 0.9
    assert depth.images[0][things].mean() > depth.images[0][~things].mean() + 0.1, "things are near"


def test_scenes_are_pages_of_the_picturebook() -> None:
    seed, index = sample_inputs.SCENES["house"]
    picture = draw(seed, index, (96, 160))
    assert "house" in picture.caption
    assert np.array_equal(sample("edges", (160, 96)).images[0], picture.hint("edges") / np.float32(255))
    for name, (seed, index) in sample_inputs.SCENES.items():
        assert name in draw(seed, index, 64).caption


def test_a_clip_begins_at_its_still_end_and_repeats() -> None:
    moving = sample("clip", (128, 96), frames=2 * sample_inputs.PERIOD + 1)
    assert np.array_equal(moving.images[0], moving.images[-1])
    assert np.abs(moving.images[0] - moving.images[sample_inputs.PERIOD]).mean() > 0.05
    depth = sample("depth_clip", (128, 96), frames=2)
    assert np.array_equal(depth.masks[1], moving.masks[1]), "the same camera"
    poses = sample("pose_clip", (96, 96), frames=sample_inputs.PERIOD + 1)
    assert np.abs(poses.images[0] - poses.images[-1]).max() < 0.02


def test_the_photograph_fills_the_frame_from_its_middle() -> None:
    with Image.open(PHOTOGRAPH) as file:
        whole = file.convert("RGB")
    tall = sample("photo", (144, 256)).images[0]
    expected = whole.resize((256, 256), Image.Resampling.LANCZOS).crop((56, 0, 200, 256))
    assert np.abs(tall - np.asarray(expected) / 255).mean() < 0.02
    whole_mask = sample("photo", (512, 512)).masks[0]
    assert whole_mask[120, 225] == 1 and whole_mask[400, 150] == 1, "face and suit"
    assert whole_mask[100, 420] == 0 and whole_mask[100, 40] == 0, "rocket and flag"


def test_poses_lie_on_the_person_of_the_photograph() -> None:
    size = (288, 512)
    pose, photo = sample("pose_clip", size, frames=1), sample("photo", size)
    drawn = pose.masks[0] > 0
    assert drawn.sum() > 200 and photo.masks[0][drawn].mean() > 0.98


def test_a_pose_for_images_has_the_common_colours_and_one_for_video_the_exchanged_ones() -> None:
    still, moving = sample("pose", (512, 512)).images[0], sample("pose_clip", (512, 512), frames=1).images[0]
    right, left = (256 - 44, 136), (256 + 43, 136)  # shoulders, 0.085 of the height from the middle
    nose = {"pose": still[87, 256], "pose_clip": moving[122, 224]}
    assert nose["pose"][0] > 0.8 > 0.2 > nose["pose"][2], "red"
    assert nose["pose_clip"][2] > nose["pose_clip"][0], "blue"
    assert not np.array_equal(still[right[1], right[0]], still[left[1], left[0]]), "sides differ"


@pytest.mark.parametrize("given", [{"kind": "nose"}, {"scene": "moon"}])
def test_unknown_names_are_refused(given: dict[str, str]) -> None:
    (name,) = given
    with pytest.raises(ValueError, match=rf"{name}: '{given[name]}' is unknown\. Choose one of .*, "):
        sample(**{"kind": "edges", "size": (64, 64), **given})


@pytest.mark.comfy
def test_the_node_gives_image_and_mask() -> None:
    from comfyui_controlnext.nodes import NODE_CLASS_MAPPINGS

    node: Any = NODE_CLASS_MAPPINGS["ControlNeXtSampleInputs"]
    schema = node.define_schema()
    assert [entry.id for entry in schema.inputs] == ["kind", "width", "height", "scene", "frames"]
    assert [entry.io_type for entry in schema.outputs] == ["IMAGE", "MASK"]
    assert schema.inputs[0].options == list(KINDS) and schema.inputs[1].default == schema.inputs[2].default == 512
    image, mask = node.execute("pose_clip", 96, 64, frames=2).result
    assert image.shape == (2, 64, 96, 3) and mask.shape == (2, 64, 96)
    assert node.validate_inputs("edges", "house") is True
    assert "nose" in node.validate_inputs("nose", "house") and "moon" in node.validate_inputs("edges", "moon")

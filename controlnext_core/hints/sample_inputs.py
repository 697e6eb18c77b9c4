"""Sample inputs that come with the pack: hints, a photograph and clips, so that any graph can be tried at once.

Scenes are drawn by the picturebook and from hand-placed shapes, poses from keypoints in this file; the photograph is
the only image file. Sizes are (width, height) in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..picturebook import Picture, draw
from ..picturebook.canvas import Canvas, ellipse, polygon, smooth
from ..picturebook.colors import COLORS
from .pose import FACE_POINTS, HAND_POINTS, Pose, cover
from .pose_drawing import draw_poses, draw_sticks

PHOTOGRAPH = Path(__file__).resolve().parents[2] / "demo" / "astronaut.jpg"
SCENES = {"house": (0, 0), "boat": (2, 1), "cat": (1, 5), "fish": (3, 0), "flower": (2, 4)}
"""Name of a scene -> seed and number in the picturebook."""
SHAPES = "shapes"
"""Name of the scene with a triangle and two circles, on which the demo's controls were trained."""
SCENE_NAMES = (*SCENES, SHAPES)
PERIOD = 24
"""Period, in frames, of the movement of a clip."""

_STANDING = (  # x from the middle, y from the top, in heights of the picture
    *((0.0, 0.17), (0.0, 0.26), (-0.085, 0.265), (-0.125, 0.375), (-0.1, 0.475), (0.085, 0.265), (0.165, 0.205)),
    *((0.205, 0.1), (-0.05, 0.51), (-0.06, 0.70), (-0.075, 0.89), (0.05, 0.51), (0.075, 0.695), (0.085, 0.885)),
    *((-0.018, 0.155), (0.018, 0.155), (-0.04, 0.165), (0.04, 0.165)),
)
_PORTRAIT = (  # x, y in pixels of the photograph; None: outside of it or hidden
    *((224, 122), (213, 258), (92, 276), (52, 432), None, (334, 272), None, None, None, None, None, None, None, None),
    *((203, 100), (246, 103), (176, 116), (273, 120)),
)
_PERSON = (  # outline of the person in the photograph
    *((20, 540), (20, 430), (42, 330), (70, 262), (115, 215), (132, 172), (180, 150), (172, 118), (154, 96), (156, 62)),
    *((190, 24), (240, 12), (284, 36), (302, 80), (292, 112), (270, 138), (262, 178), (300, 220), (336, 258)),
    *((356, 300), (362, 344), (318, 372), (286, 440), (280, 540)),
)


@dataclass(frozen=True, slots=True)
class Sample:
    """Frames of one sample input; a still picture has one."""

    images: np.ndarray
    """Pictures (F, H, W, 3), float32 RGB in 0..1."""
    masks: np.ndarray
    """Masks (F, H, W), float32 in 0..1: the things of a scene, the person of the photograph, the drawn part of a
    pose."""


def sample(kind: str, size: tuple[int, int], scene: str = "house", frames: int = PERIOD) -> Sample:
    """Draw the sample input of a kind, a key of KINDS.

    scene: one of SCENE_NAMES, for kinds that are drawn from one; frames: length of a clip. Raises ValueError for
    unknown names.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: {kind!r} is unknown. Choose one of {', '.join(KINDS)}.")
    if scene not in SCENE_NAMES:
        raise ValueError(f"scene: {scene!r} is unknown. Choose one of {', '.join(SCENE_NAMES)}.")
    return KINDS[kind](size, scene, frames)


def _picture(scene: str, size: tuple[int, int]) -> Picture:
    width, height = size
    return _shapes(width, height) if scene == SHAPES else draw(*SCENES[scene], (height, width))


def _shapes(width: int, height: int) -> Picture:
    canvas = Canvas(height, width)
    canvas.vertical(0, canvas.height, (COLORS["yellow"], COLORS["yellow"]), (13, 90))
    left, top = canvas.width / 2 - 0.5, canvas.height / 2 - 0.5
    canvas.is_thing = True
    placed = (
        ("white", ellipse(0.17, 0.62, 0.14, 0.14), 130),
        ("red", ellipse(0.73, 0.67, 0.22, 0.22), 175),
        ("pink", polygon((0.31, 0.42), (0.48, 0.17), (0.60, 0.47)), 220),
    )
    for color, points, canvas.near in placed:
        canvas.shape(points + (left, top), COLORS[color])
    caption = "a pink triangle, a red circle and a white circle on a yellow background"
    return Picture(canvas.image, canvas.edges, canvas.mask, canvas.depth, caption)


def _hint(name: str) -> Callable[[tuple[int, int], str, int], Sample]:
    def still(size: tuple[int, int], scene: str, frames: int) -> Sample:
        picture = _picture(scene, size)
        return Sample(_floats(picture.hint(name))[None], _floats(picture.mask)[None])

    return still


def _moving(name: str) -> Callable[[tuple[int, int], str, int], Sample]:
    """Clip of a camera that moves along a wider drawing and back; name: "image" or a hint."""

    def clip(size: tuple[int, int], scene: str, frames: int) -> Sample:
        width, height = size
        beside = width // 4
        wide = _picture(scene, (width + beside, height))
        plane = wide.image if name == "image" else wide.hint(name)
        starts = [round(beside * (1 - math.cos(math.pi * frame / PERIOD)) / 2) for frame in range(frames)]
        images = np.stack([_floats(plane[:, start : start + width]) for start in starts])
        return Sample(images, np.stack([_floats(wide.mask[:, start : start + width]) for start in starts]))

    return clip


def _photo(size: tuple[int, int], scene: str, frames: int) -> Sample:
    from PIL import Image

    with Image.open(PHOTOGRAPH) as file:
        whole = file.convert("RGB")
    placed = cover(whole.width / whole.height, size)
    scale = placed.scale / whole.height
    box = [-placed.shift[0] / scale, -placed.shift[1] / scale]
    box += [box[0] + size[0] / scale, box[1] + size[1] / scale]
    image = np.asarray(whole.resize(size, Image.Resampling.LANCZOS, tuple(box)))
    person = Canvas(size[1], size[0])
    person.is_thing = True
    points = smooth(np.asarray(_PERSON, np.float64)) * scale + placed.shift
    person.shape(points / min(size), (255, 255, 255), 0)
    return Sample(_floats(image)[None], _floats(person.mask)[None])


def _pose(size: tuple[int, int], scene: str, frames: int) -> Sample:
    """Pose of a standing, waving person with the sticks and colours of other OpenPose pictures, for
    controls on images.
    """
    width, height = size
    points = np.asarray(_STANDING) * height + (width / 2, 0)
    return _drawn(_floats(draw_sticks([points], size))[None])


def _pose_clip(size: tuple[int, int], scene: str, frames: int) -> Sample:
    """Pose clip of the person in the photograph, who turns the head and sways; drawn as the SVD
    controls expect poses.
    """
    seen = np.asarray([point is not None for point in _PORTRAIT], np.float64)
    points = np.asarray([point or (0, 0) for point in _PORTRAIT], np.float64) / 512
    placed = cover(1.0, size)
    poses = [_person(_swayed(points, frame), seen).moved(placed.scale, placed.shift) for frame in range(frames)]
    return _drawn(draw_poses(poses, size))


def _swayed(points: np.ndarray, frame: int) -> np.ndarray:
    """Points (18, 2) of the portrait at a frame; frame 0 is the portrait itself."""
    phase = math.sin(2 * math.pi * frame / PERIOD)
    neck = points[1]
    head = np.isin(np.arange(len(points)), (0, 14, 15, 16, 17))
    turned = np.where(head[:, None], _turned(points, neck, 0.16 * phase), points)
    return _turned(turned, np.asarray([neck[0], 1.2]), 0.05 * phase)


def _turned(points: np.ndarray, center: np.ndarray, angle: float) -> np.ndarray:
    cosine, sine = math.cos(angle), math.sin(angle)
    return (points - center) @ np.asarray([[cosine, sine], [-sine, cosine]]) + center


def _person(points: np.ndarray, seen: np.ndarray) -> Pose:
    """Pose with body points (18, 2), of which `seen` (18,) are known, without face and hands."""
    body = np.concatenate([points * seen[:, None], seen[:, None]], axis=1)
    return Pose(body, np.zeros((FACE_POINTS, 3)), np.zeros((2, HAND_POINTS, 3)))


def _drawn(images: np.ndarray) -> Sample:
    return Sample(images, (images.max(-1) > 0).astype(np.float32))


def _floats(picture: np.ndarray) -> np.ndarray:
    return picture.astype(np.float32) / 255


KINDS: dict[str, Callable[[tuple[int, int], str, int], Sample]] = {
    "edges": _hint("edges"),
    "depth": _hint("depth"),
    "mask": _hint("mask"),
    "pose": _pose,
    "photo": _photo,
    "pose_clip": _pose_clip,
    "depth_clip": _moving("depth"),
    "clip": _moving("image"),
}
"""Kind of sample (public name) -> drawing function of (size, scene, frames)."""
CLIPS = ("pose_clip", "depth_clip", "clip")

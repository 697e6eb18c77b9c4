"""A standing person as OpenPose JSON, whole or changed, for the tests of poses."""

import copy
import math
from typing import Any

SIZE = (192, 320)
PARTS = {
    "pose_keypoints_2d": 18,
    "face_keypoints_2d": 68,
    "hand_left_keypoints_2d": 21,
    "hand_right_keypoints_2d": 21,
}
# a standing person: x from the body's axis, y from the top, in a picture 320 high
STANDING = [
    *((0, 50), (0, 75), (-22, 77), (-33, 110), (-38, 140), (22, 77), (38, 106), (30, 138)),
    *((-13, 147), (-15, 203), (-16, 260), (13, 147), (17, 203), (16, 260)),
    *((-5, 45), (5, 45), (-11, 48), (11, 48)),
]


def person(scale: float = 1.0, shift: tuple[float, float] = (96.0, 0.0)) -> dict[str, list[float]]:
    """A standing person with face and hands in pixels: `scale` times the figure above, then shifted."""
    face = [(12 * math.cos(i), 50 + 15 * math.sin(i)) for i in range(68)]
    hands = [[(x + math.cos(i) * i / 3, y + 2 + i % 5 * 3) for i in range(21)] for x, y in (STANDING[7], STANDING[4])]
    points = dict(zip(PARTS, (STANDING, face, *hands), strict=True))
    return {
        key: [value for x, y in part for value in (scale * x + shift[0], scale * y + shift[1], 1.0)]
        for key, part in points.items()
    }


def frame(*people: dict[str, Any], canvas: tuple[int, int] = SIZE) -> dict[str, Any]:
    return {"people": list(people), "canvas_width": canvas[0], "canvas_height": canvas[1]}


def changed(entry: dict[str, Any], key: str, point: int, **values: float) -> dict[str, Any]:
    """The person with x, y or c of one point replaced."""
    entry = copy.deepcopy(entry)
    for name, value in values.items():
        entry[key][3 * point + "xyc".index(name)] = value
    return entry

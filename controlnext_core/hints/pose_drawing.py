"""Drawing of poses in the style of the released SVD controls.

Everything is drawn with hard edges and fixed widths on a canvas whose short side is 2160 pixels and then scaled down by
linear interpolation, so that widths follow the frame. Source: the pose drawing released with ControlNeXt SVD-v2. One
difference to other OpenPose pictures matters: red and blue are exchanged (a blue nose). The released drawing swaps
them, the clips published with the first generation have it too, and the encoders were trained on it.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence

import numpy as np

from ..opencv import require_opencv
from .pose import BODY_POINTS, SEEN, Pose

CANVAS_SHORT_SIDE = 2160
STICK_CANVAS = 512
"""Shorter side, in pixels, at which sticks have the 8 pixels of other OpenPose pictures."""
STICK_HALF_WIDTH = 4
STICK_BRIGHTNESS = 0.6
BODY_RADIUS = 4
HAND_RADIUS = 4
HAND_LINE = 2
FACE_RADIUS = 3
"""Widths and radii in canvas pixels."""

LIMBS = (
    *((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7)),  # shoulders and arms
    *((1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13)),  # legs
    *((1, 0), (0, 14), (14, 16), (0, 15), (15, 17)),  # neck and head
)
"""Pairs of body points joined by a stick, in the order of drawing and of COLOURS."""
COLOURS = tuple(
    tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(number / BODY_POINTS, 1.0, 1.0))
    for number in range(BODY_POINTS)
)
"""Colours of OpenPose, 18 hues 20 degrees apart: one per body point and per limb, before red and blue are exchanged."""
HAND_EDGES = tuple((tip - 1 if tip % 4 != 1 else 0, tip) for tip in range(1, 21))
"""Pairs of hand points joined by a bone: five fingers of four bones, all from the wrist (point 0)."""
HAND_POINT_COLOUR = (0, 0, 255)
REACH = 8
"""Largest distance of a drawn point, in canvas sides; farther points are clipped to it, within OpenCV's integers."""


def draw_poses(poses: Sequence[Pose], size: tuple[int, int]) -> np.ndarray:
    """Draw poses in pixels of the frame: (F, height, width, 3) float32 RGB in 0..1 on black.

    size: (width, height) in pixels. Memory beside the result: one canvas, 14 MB times the aspect ratio.
    """
    cv2 = require_opencv()

    width, height = size
    ratio = CANVAS_SHORT_SIDE / min(size)
    canvas = np.zeros((int(height * ratio), int(width * ratio), 3), dtype=np.uint8)
    frames = np.empty((len(poses), height, width, 3), dtype=np.float32)
    for frame, pose in zip(frames, poses, strict=True):
        canvas[:] = 0
        draw_pose(canvas, pose.moved(ratio, np.zeros(2)))
        small = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_LINEAR)
        np.divide(cv2.cvtColor(small, cv2.COLOR_BGR2RGB), np.float32(255), out=frame)  # red and blue exchanged
    return frames


def draw_sticks(people: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Draw body points (18, 2) in pixels, all seen, with the sticks and colours of other OpenPose pictures.

    For controls on images. size: (width, height) in pixels. Returns (height, width, 3) uint8 RGB; black without people.
    """
    cv2 = require_opencv()

    width, height = size
    ratio = STICK_CANVAS / min(size)
    canvas = np.zeros((round(height * ratio), round(width * ratio), 3), np.uint8)
    for points in people:
        draw_body(canvas, points * ratio, np.ones(len(points)))
    way = cv2.INTER_AREA if ratio > 1 else cv2.INTER_LINEAR
    return cv2.resize(canvas, size, interpolation=way)


def draw_pose(canvas: np.ndarray, pose: Pose) -> None:
    """Draw body, hands and face in OpenPose's colours. canvas: (H, W, 3) uint8, modified; pose in its pixels."""
    reach = REACH * np.array(canvas.shape[1::-1])

    def within_reach(points: np.ndarray) -> np.ndarray:
        return points[:, :2].clip(-reach, reach)

    draw_body(canvas, within_reach(pose.body), pose.body[:, 2])
    for hand in pose.hands:
        draw_hand(canvas, within_reach(hand), hand[:, 2])
    draw_face(canvas, within_reach(pose.face), pose.face[:, 2])


def draw_body(canvas: np.ndarray, xy: np.ndarray, confidence: np.ndarray) -> None:
    """Draw sticks as darkened filled ellipses, joints over them. xy:

    (18, 2) pixels; confidence: (18,), drawn from SEEN on.
    """
    cv2 = require_opencv()

    for (start, end), colour in zip(LIMBS, COLOURS, strict=False):
        if min(confidence[start], confidence[end]) < SEEN:
            continue
        (x0, y0), (x1, y1) = xy[start].tolist(), xy[end].tolist()
        axes = (int(math.hypot(x1 - x0, y1 - y0) / 2), STICK_HALF_WIDTH)
        angle = int(math.degrees(math.atan2(y0 - y1, x0 - x1)))
        outline = cv2.ellipse2Poly(pixel(((x0 + x1) / 2, (y0 + y1) / 2)), axes, angle, 0, 360, 1)
        dark = shaded(shaded(colour, confidence[start] * confidence[end]), STICK_BRIGHTNESS)
        cv2.fillConvexPoly(canvas, np.array(outline), dark)
    for point, colour, sure in zip(xy, COLOURS, confidence, strict=True):
        if sure >= SEEN:
            cv2.circle(canvas, pixel(point), BODY_RADIUS, shaded(colour, sure), thickness=-1)


def draw_hand(canvas: np.ndarray, xy: np.ndarray, confidence: np.ndarray) -> None:
    """Draw bones in the colours of the rainbow, points over them. xy:

    (21, 2) pixels; confidence: (21,), drawn above 0.
    """
    cv2 = require_opencv()

    for number, (start, end) in enumerate(HAND_EDGES):
        sure = confidence[start] * confidence[end]
        if sure > 0:
            hue = colorsys.hsv_to_rgb(number / len(HAND_EDGES), 1.0, 1.0)
            colour = [channel * int(sure * 255) for channel in hue]
            cv2.line(canvas, pixel(xy[start]), pixel(xy[end]), colour, thickness=HAND_LINE)
    for point, sure in zip(xy, confidence, strict=True):
        if sure > 0:
            cv2.circle(canvas, pixel(point), HAND_RADIUS, shaded(HAND_POINT_COLOUR, sure), thickness=-1)


def draw_face(canvas: np.ndarray, xy: np.ndarray, confidence: np.ndarray) -> None:
    """Draw a face as white points. xy: (68, 2) pixels; confidence: (68,), drawn above 0."""
    cv2 = require_opencv()

    for point, sure in zip(xy, confidence, strict=True):
        if sure > 0:
            cv2.circle(canvas, pixel(point), FACE_RADIUS, shaded((255, 255, 255), sure), thickness=-1)


def shaded(colour: Sequence[float], brightness: float) -> tuple[int, ...]:
    """Colour times a brightness in 0..1, rounded down as in the released drawing."""
    return tuple(int(channel * brightness) for channel in colour)


def pixel(point: Sequence[float]) -> tuple[int, int]:
    """Canvas pixel that contains (x, y); tolerance 1e-6, as fractions and pixels round differently."""
    return math.floor(point[0] + 1e-6), math.floor(point[1] + 1e-6)

"""OpenPose keypoints: read what pose estimators emit, choose a person, align a driving clip to a reference pose.

# F frames; a point is (x, y, confidence), confidence 0..1, all zero = not seen
Poses as read are in units of their canvas' height (x and y alike, so pixels of the picture are square); placed
poses are in pixels of the output frame.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import encodable

logger = encodable.logger(__name__)

BODY_POINTS = 18
FACE_POINTS = 68
HAND_POINTS = 21
BODY_25_TO_18 = (*range(8), *range(9, 19))
"""Indices of OpenPose's 25-point body that make the 18-point one: all but the mid hip and the feet, in the same
order."""
BODY_LAYOUTS: dict[int, Sequence[int]] = {18: range(BODY_POINTS), 25: BODY_25_TO_18}
FACE_LAYOUTS: dict[int, Sequence[int]] = {68: range(FACE_POINTS), 70: range(FACE_POINTS)}  # 70: two pupils at the end
HAND_LAYOUTS: dict[int, Sequence[int]] = {21: range(HAND_POINTS)}

SEEN = 0.3
"""Smallest confidence of a body point that is drawn or fitted. Source: the drawing code released with SVD-v2."""
FIT_POINTS = (0, 1, 2, 5, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17)
"""Indices of the body points that are fitted: all but elbows and wrists, which move most. Source: SVD-v2's pose
preprocessing."""
NORMALISED_LIMIT = 2.0
"""Largest coordinate read as a fraction of the canvas (points just outside it exceed 1); larger ones are pixels."""
NUMBERS = (int, float, np.integer, np.floating)
LARGEST_SIDE = 10**6  # pixels of a canvas
FARTHEST = 100.0  # canvases from the origin; a number beyond is no point of a person
MIN_SIDE = 64
SIDE_STEP = 8


@dataclass(frozen=True, slots=True)
class Pose:
    """Pose of one person. The unit of x and y is the caller's: canvas heights as read, output pixels once placed."""

    body: np.ndarray
    """(18, 3) in OpenPose's COCO order."""
    face: np.ndarray
    """(68, 3)"""
    hands: np.ndarray
    """(2, 21, 3), left first."""

    def moved(self, scale: float, shift: np.ndarray) -> Pose:
        """Pose with every point at scale * (x, y) + shift; shift: (2,). Points that were not seen stay all zero."""

        def move(points: np.ndarray) -> np.ndarray:
            xy, confidence = points[..., :2], points[..., 2:]
            return np.concatenate([np.where(confidence > 0, xy * scale + shift, 0.0), confidence], axis=-1)

        return Pose(move(self.body), move(self.face), move(self.hands))


@dataclass(frozen=True, slots=True)
class PoseFrame:
    """People seen in one frame, in units of the canvas' height."""

    people: tuple[Pose, ...]
    aspect: float
    """Aspect ratio of the canvas, width / height; 1 where nobody is seen."""


@dataclass(frozen=True, slots=True)
class Alignment:
    """Transformation reference = scale * driving + shift; scale in output pixels per canvas height, shift (2,) in
    pixels.
    """

    scale: float
    shift: np.ndarray


def parse_frames(value: Any, name: str) -> list[PoseFrame]:
    """Parse POSE_KEYPOINT values into one PoseFrame per frame.

    value: OpenPose JSON per frame (`people`, `canvas_width`, `canvas_height`) as a list, one dictionary, or JSON text
    of either. Coordinates are pixels or fractions of the canvas, decided per array by NORMALISED_LIMIT. Bodies of 18 or
    25 points, faces of 68 or 70, hands of 21; an array may be missing, None or empty. Raises ValueError starting with
    `name` for any other value, and for an empty list.
    """
    items = _from_json(value, name) if isinstance(value, str) else value
    items = [items] if isinstance(items, Mapping) else items
    if not isinstance(items, Sequence):
        raise ValueError(
            f"{name}: is {type(items).__name__}, not a list of poses. Connect a pose estimator's keypoints."
        )
    if not items:
        raise ValueError(f"{name}: has no frames. Connect the POSE_KEYPOINT of a pose estimator that got images.")
    return [_parse_frame(item, f"{name}: frame {index}") for index, item in enumerate(items)]


def _from_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: is text but not JSON ({error}). Use OpenPose JSON.") from None


def _parse_frame(item: Any, where: str) -> PoseFrame:
    frame = _from_json(item, where) if isinstance(item, str) else item
    if not isinstance(frame, Mapping) or not isinstance(frame.get("people"), Sequence):
        hint = "animals are not supported" if isinstance(frame, Mapping) and "animals" in frame else "not OpenPose JSON"
        raise ValueError(f"{where}: has no list of `people` ({hint}). Use the keypoints of a human pose estimator.")
    if not frame["people"]:
        return PoseFrame((), 1.0)
    canvas = np.array([_canvas_side(frame, side, where) for side in ("canvas_width", "canvas_height")])
    people = [_parse_person(person, canvas, f"{where}, person {n}") for n, person in enumerate(frame["people"])]
    return PoseFrame(tuple(pose for pose in people if pose is not None), float(canvas[0] / canvas[1]))


def _canvas_side(frame: Mapping[str, Any], key: str, where: str) -> float:
    side = frame.get(key)
    if isinstance(side, bool) or not isinstance(side, NUMBERS) or not 0 < side <= LARGEST_SIDE:
        raise ValueError(f"{where}: {key} is {_said(side)}. It must hold the pixels of the picture the pose is from.")
    return float(side)


def _said(value: Any) -> str:
    try:
        return encodable.cut(repr(value))
    except ValueError:  # Python writes no whole number of more digits than 4,300
        return "a number of thousands of digits"


def _parse_person(person: Any, canvas: np.ndarray, where: str) -> Pose | None:
    """Pose in canvas heights; None if no point is seen."""
    if not isinstance(person, Mapping):
        raise ValueError(f"{where}: is {type(person).__name__}, not a dictionary of keypoints. Use OpenPose JSON.")

    def part(key: str, layouts: dict[int, Sequence[int]]) -> np.ndarray:
        return _parse_points(person.get(key), layouts, canvas, f"{where}, {key}")

    hands = [part(f"hand_{side}_keypoints_2d", HAND_LAYOUTS) for side in ("left", "right")]
    body = part("pose_keypoints_2d", BODY_LAYOUTS)
    pose = Pose(body, part("face_keypoints_2d", FACE_LAYOUTS), np.stack(hands))
    return pose if any(points[..., 2].any() for points in (pose.body, pose.face, pose.hands)) else None


def _parse_points(value: Any, layouts: dict[int, Sequence[int]], canvas: np.ndarray, where: str) -> np.ndarray:
    """Points from x, y, confidence, flat or nested -> (N, 3) in canvas heights, N the layout's; unseen points all zero.

    canvas: (2,) width and height. Unseen points are confidences of 0 or less, values that are not finite, points
    farther than FARTHEST canvases away, the origin, and (-1, -1) pixels, which one estimator writes with full
    confidence.
    """
    wanted = len(next(iter(layouts.values())))
    try:
        points = np.asarray([] if value is None else value, dtype=np.float64).reshape(-1, 3)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: is not a list of x, y, confidence per point. Use OpenPose JSON.") from None
    if len(points) == 0:
        return np.zeros((wanted, 3))
    if len(points) not in layouts:
        counts = " or ".join(map(str, layouts))
        raise ValueError(f"{where}: has {len(points)} points, expected {counts}. Use OpenPose's COCO layout.")
    points = points[list(layouts[len(points)])]
    xy, confidence = points[:, :2], points[:, 2:]
    near = (np.abs(xy) <= FARTHEST * canvas).all(axis=1, keepdims=True)
    seen = np.isfinite(points).all(axis=1, keepdims=True) & near & (confidence > 0) & xy.any(axis=1, keepdims=True)
    xy, confidence = np.where(seen, xy, 0.0), np.where(seen, confidence.clip(max=1.0), 0.0)
    pixels = xy * canvas if np.abs(xy).max() <= NORMALISED_LIMIT else xy
    confidence = np.where((np.abs(pixels + 1) < 1e-2).all(axis=1, keepdims=True), 0.0, confidence)
    return np.concatenate([pixels / canvas[1], confidence], axis=1) * (confidence > 0)


def dominant_person(frame: PoseFrame) -> Pose | None:
    """Person with the largest product of body box and mean body confidence; without bodies, the
    most confident person.
    """

    def weight(pose: Pose) -> tuple[float, float]:
        body = pose.body[pose.body[:, 2] >= SEEN]
        area = float(np.ptp(body[:, :2], axis=0).prod()) if len(body) else 0.0
        total = sum(float(points[..., 2].sum()) for points in (pose.body, pose.face, pose.hands))
        return area * float(pose.body[:, 2].mean()), total

    return max(frame.people, key=weight, default=None)


def cover(aspect: float, size: tuple[int, int]) -> Alignment:
    """Scale and crop with which a picture of this aspect ratio fills (width, height) pixels, centred.

    The released scripts, and the stock SVD conditioning node, do the same to the reference image.
    """
    width, height = size
    scale = max(width / aspect, height)
    return Alignment(scale, np.array([width - scale * aspect, height - scale]) / 2)


def fit_alignment(reference: np.ndarray, driving: np.ndarray) -> Alignment:
    """Least-squares scale and shift that bring driving bodies onto the reference body.

    reference: (18, 3) in output pixels; driving: (F, 18, 3) in canvas heights. Over all pairs (frame f, point j of
    FIT_POINTS) in which both are seen, with y the driving and r the reference coordinates:

        scale   = sum (y - mean y) (r_y - mean r_y) / sum (y - mean y)^2      a line of degree 1, r_y against y
        shift_y = mean r_y - scale * mean y
        shift_x = mean (r_x - scale * x)                                      same scale: the picture keeps its aspect

    In coordinates from 0 to 1 this is the published a_x = a_y * (w_driving / h_driving) * (h / w).
    Raises ValueError if fewer than two different heights are shared, or if the fit would turn the person over.
    Source: ControlNeXt SVD-v2, pose preprocessing.
    """
    points = list(FIT_POINTS)
    pairs = (driving[:, points, 2] >= SEEN) & (reference[points, 2] >= SEEN)  # (F, 14)
    x, y = driving[:, points, 0][pairs], driving[:, points, 1][pairs]
    target = np.broadcast_to(reference[points, :2], (len(driving), len(points), 2))[pairs]  # (pairs, 2)
    shared = int(pairs.any(axis=0).sum())
    if shared < 2 or np.ptp(y) < 1e-6:
        raise ValueError(
            f"driving_poses: share {shared} of the {len(points)} body points used for alignment (head, neck, "
            "shoulders, hips, knees, ankles) with reference_pose; two at different heights are needed. Use a reference "
            "image and a clip that show the same parts of the body."
        )
    centred = y - y.mean()
    scale = float((centred * (target[:, 1] - target[:, 1].mean())).sum() / (centred**2).sum())
    if scale <= 0:
        raise ValueError(
            f"driving_poses: the best fit to reference_pose has scale {scale:.3g}, which would turn the person over. "
            "Use a reference image in which the person is upright as in the clip."
        )
    return Alignment(scale, np.array([(target[:, 0] - scale * x).mean(), target[:, 1].mean() - scale * y.mean()]))


def hold_missing(poses: Sequence[Pose | None], name: str) -> list[Pose]:
    """Fill frames without a person from the frame before, at the start from the next one; logs which.

    Raises ValueError if no frame has a person.
    """
    found = [index for index, pose in enumerate(poses) if pose is not None]
    if not found:
        raise ValueError(
            f"{name}: no person in any of {len(poses)} frames. Use a clip in which the pose estimator finds someone."
        )
    held = [index for index, pose in enumerate(poses) if pose is None]
    if held:
        logger.warning(
            "%s: no person in frames %s (the first is 0); each holds the pose of the frame before it, at the start of "
            "the clip of the next one",
            name,
            _ranges(held),
        )
    filled: list[Pose] = []
    last = poses[found[0]]
    for pose in poses:
        last = pose if pose is not None else last
        assert last is not None, "a frame with a person was found above"
        filled.append(last)
    return filled


def _ranges(indices: Sequence[int]) -> str:
    """Rising numbers as text: 0, 1, 2, 7 -> `0-2, 7`."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def align_poses(reference_pose: Any, driving_poses: Any, size: tuple[int, int]) -> list[Pose]:
    """Poses in pixels of the output frame: the reference pose, then every driving pose aligned to it, 1 + F in total.

    reference_pose, driving_poses: POSE_KEYPOINT, see `parse_frames`; of the reference, the first frame. size: (width,
    height) in pixels, multiples of 8 and at least 64. Raises ValueError naming the input: a wrong size, no frames, no
    person in the reference, too few shared points.
    """
    check_size(size)
    reference_frames = parse_frames(reference_pose, "reference_pose")
    driving_frames = parse_frames(driving_poses, "driving_poses")
    if len(reference_frames) > 1:
        logger.warning("reference_pose: has %d frames; the first is used", len(reference_frames))
    chosen = dominant_person(reference_frames[0])
    if chosen is None:
        raise ValueError(
            "reference_pose: no person in it. Use a reference image in which the pose estimator finds someone."
        )
    placed = cover(reference_frames[0].aspect, size)
    reference = chosen.moved(placed.scale, placed.shift)

    crowded = [index for index, frame in enumerate(driving_frames) if len(frame.people) > 1]
    if crowded:
        logger.info("driving_poses: several people in %d frames; the largest and surest is used", len(crowded))
    driving = [dominant_person(frame) for frame in driving_frames]
    filled = hold_missing(driving, "driving_poses")
    fitted = fit_alignment(reference.body, np.stack([pose.body for pose in driving if pose is not None]))
    return [reference, *(pose.moved(fitted.scale, fitted.shift) for pose in filled)]


def check_size(size: tuple[int, int]) -> None:
    """Raise ValueError unless both sides are multiples of 8 pixels and at least 64."""
    for name, side in zip(("width", "height"), size, strict=True):
        if side % SIDE_STEP or side < MIN_SIDE:
            raise ValueError(
                f"{name}: {side} must be a multiple of {SIDE_STEP} and at least {MIN_SIDE}; use the video's."
            )

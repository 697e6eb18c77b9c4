"""Drawing of poses: colours, sizes, order, and the exchange of red and blue in the released drawing."""

from typing import Any

import numpy as np
import pytest
from comfyui_controlnext.controlnext_core.hints.pose import Pose, align_poses, parse_frames
from comfyui_controlnext.controlnext_core.hints.pose_drawing import draw_pose, draw_poses
from comfyui_controlnext.tests.fixtures.pose_fixtures import SIZE, changed, frame, person


def pose_in(one: dict[str, Any], size: tuple[int, int]) -> Pose:
    """Person in pixels of a frame of this size, as a Pose in these pixels."""
    (read,) = parse_frames([frame(one, canvas=size)], "poses")
    return read.people[0].moved(size[1], np.zeros(2))


def drawn(one: dict[str, Any]) -> np.ndarray:
    """Drawing (H, W, 3) of a person given in pixels of the canvas of 1000x2000, in RGB as the encoder gets it."""
    canvas = np.zeros((1000, 2000, 3), dtype=np.uint8)
    draw_pose(canvas, pose_in(one, (2000, 1000)))
    return canvas[..., ::-1]


def body_only(points: dict[int, tuple[float, float, float]]) -> dict[str, Any]:
    flat = np.zeros((18, 3))
    for index, point in points.items():
        flat[index] = point
    return {"pose_keypoints_2d": flat.ravel().tolist()}


OPENPOSE = [  # written out, since the code computes it; red and blue are exchanged below
    *((255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0), (0, 255, 85)),
    *((0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255), (170, 0, 255)),
    *((255, 0, 255), (255, 0, 170), (255, 0, 85)),
]


@pytest.mark.parametrize("confidence", [1.0, 0.5])
def test_each_joint_has_its_colour_times_confidence_with_red_and_blue_exchanged(confidence: float) -> None:
    places = {index: (100.0 + 100 * index, 700.0, confidence) for index in range(18)}
    for index in range(18):  # one at a time: no sticks
        picture = drawn(body_only({index: places[index]}))
        expected = [int(channel * confidence) for channel in OPENPOSE[index][::-1]]
        np.testing.assert_allclose(picture[700, 100 + 100 * index], expected, atol=1e-3)
        assert np.flatnonzero(picture[700].any(axis=-1)).tolist() == list(range(96 + 100 * index, 105 + 100 * index))
        assert np.flatnonzero(picture[:, 100 + 100 * index].any(axis=-1)).tolist() == list(range(696, 705))


def test_sticks_are_darkened_and_multiplied_by_both_confidences() -> None:
    # neck to nose is the 13th stick; half width 4
    picture = drawn(body_only({1: (500.0, 900.0, 0.8), 0: (500.0, 300.0, 0.5)}))
    colour = [int(int(channel * 0.8 * 0.5) * 0.6) for channel in OPENPOSE[12][::-1]]
    np.testing.assert_allclose(picture[600, 500], colour, atol=1e-3)
    assert colour == [61, 0, 0]
    assert np.flatnonzero(picture[600].any(axis=-1)).tolist() == list(range(496, 505))
    np.testing.assert_allclose(picture[300, 500], [0, 0, 127], atol=1e-3)  # joints lie over sticks


@pytest.mark.parametrize(
    ("stick", "ends"),
    list(
        enumerate(
            [
                *((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13)),
                *((1, 0), (0, 14), (14, 16), (0, 15), (15, 17)),
            ]
        )
    ),
)
def test_each_stick_joins_its_points_in_its_colour(stick: int, ends: tuple[int, int]) -> None:
    picture = drawn(body_only({ends[0]: (300.0, 400.0, 1.0), ends[1]: (600.0, 800.0, 1.0)}))
    np.testing.assert_allclose(picture[600, 450], [int(c * 0.6) for c in OPENPOSE[stick][::-1]], atol=1e-3)


def test_body_points_below_the_threshold_are_not_drawn() -> None:
    picture = drawn(body_only({1: (500.0, 900.0, 1.0), 0: (500.0, 300.0, 0.29)}))
    assert not picture[:890].any()
    assert picture[900, 500].any()


def test_face_points_are_white_times_confidence() -> None:
    face = np.zeros((68, 3))
    face[:2] = (700, 500, 1.0), (800, 500, 0.2)
    picture = drawn({"face_keypoints_2d": face.ravel().tolist()})
    np.testing.assert_allclose(picture[500, 700], [255] * 3, atol=1e-3)
    np.testing.assert_allclose(picture[500, 800], [51] * 3, atol=1e-3)
    assert np.flatnonzero(picture[500].any(axis=-1)).tolist() == [*range(697, 704), *range(797, 804)]


def test_hands_have_red_points_and_rainbow_bones() -> None:
    hand = np.array([(700.0, 500.0, 1.0)] + [(600 + 30 * (i % 4), 300 + 40 * (i // 4), 1.0) for i in range(20)])
    picture = drawn({"hand_left_keypoints_2d": hand.ravel().tolist()})
    for x, y, _ in hand:
        np.testing.assert_allclose(picture[int(y), int(x)], [255, 0, 0], atol=1e-3)
    for number, (start, end) in enumerate([(1, 2), (2, 3), (3, 4)], start=1):  # bones of the first finger
        middle = (hand[start, :2] + hand[end, :2]) / 2
        hue = number / 20 * 6  # between red and yellow: red full, green rising
        red, green, blue = picture[int(middle[1]), int(middle[0])]
        assert (round(blue), round(red)) == (255, 0)
        assert green == pytest.approx(hue * 255, abs=1)


def test_a_frame_is_the_2160_canvas_scaled_down_with_red_and_blue_exchanged() -> None:
    canvas = np.zeros((2160, 2160, 3), dtype=np.uint8)
    draw_pose(canvas, pose_in(person(5.0, (1000.0, 200.0)), (2160, 2160)))
    fifth = draw_poses([pose_in(person(1.0, (200.0, 40.0)), (432, 432))], (432, 432))[0]
    # linear interpolation by a whole odd factor reads the middle pixel
    np.testing.assert_allclose(fifth * 255, canvas[2::5, 2::5, ::-1], atol=1e-3)
    nose = draw_poses([pose_in(body_only({0: (1000.0, 700.0, 1.0)}), (2160, 2160))], (2160, 2160))[0]
    np.testing.assert_array_equal(nose[700, 1000], [0, 0, 1])  # blue, as in the published pose clips


def test_frames_are_float_rgb_within_0_and_1() -> None:
    frames = draw_poses(align_poses([frame(person())], [frame(person())] * 2, SIZE), SIZE)
    assert frames.shape == (3, SIZE[1], SIZE[0], 3)
    assert frames.dtype == np.float32
    assert frames.min() == 0
    assert frames.max() == 1
    np.testing.assert_array_equal(frames[0], frames[1])


def test_nothing_of_a_frame_is_left_in_the_next() -> None:
    poses = [pose_in(person(1.0, (x, 0.0)), SIZE) for x in (60.0, 130.0)]
    together, alone = draw_poses(poses, SIZE), draw_poses(poses[1:], SIZE)
    np.testing.assert_array_equal(together[1], alone[0])


def test_points_far_outside_are_harmless() -> None:
    far = changed(person(), "pose_keypoints_2d", 4, x=1e12, y=-1e12)
    far = changed(far, "hand_right_keypoints_2d", 20, x=-1e12, y=1e12)
    picture = drawn(far)
    assert np.isfinite(picture).all()
    assert picture.any()

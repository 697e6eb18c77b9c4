"""Poses: reading OpenPose JSON, choosing people, filling gaps, alignment against np.polyfit."""

import copy
import json
import logging
import math
from typing import Any

import numpy as np
import pytest
from comfyui_controlnext.controlnext_core.hints.pose import (
    Alignment,
    Pose,
    align_poses,
    cover,
    dominant_person,
    fit_alignment,
    parse_frames,
)
from comfyui_controlnext.controlnext_core.hints.pose_drawing import draw_poses
from comfyui_controlnext.tests.fixtures.pose_fixtures import PARTS, SIZE, changed, frame, person

FITTED = [0, 1, 2, 5, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17]


def as_fractions(entry: dict[str, Any]) -> dict[str, Any]:
    entry = copy.deepcopy(entry)
    for one in entry["people"]:
        for values in one.values():
            for index in range(0, len(values), 3):
                values[index] /= entry["canvas_width"]
                values[index + 1] /= entry["canvas_height"]
    return entry


def points_of(pose: Pose) -> np.ndarray:
    return np.concatenate([pose.body, pose.face, pose.hands.reshape(-1, 3)])


# reading


def test_both_coordinate_conventions_give_the_same_picture() -> None:
    driving = frame(person(0.7, (260.0, 20.0)), canvas=(512, 384))
    pixels = draw_poses(align_poses([frame(person())], [driving], SIZE), SIZE)
    fractions = draw_poses(align_poses([as_fractions(frame(person()))], [as_fractions(driving)], SIZE), SIZE)
    assert pixels.any()
    np.testing.assert_array_equal(pixels, fractions)


def test_conventions_may_differ_between_the_lists_of_one_person() -> None:
    mixed = frame(person())
    mixed["people"][0]["pose_keypoints_2d"] = as_fractions(mixed)["people"][0]["pose_keypoints_2d"]
    a, b = (parse_frames([entry], "poses")[0].people[0] for entry in (frame(person()), mixed))
    np.testing.assert_allclose(points_of(a), points_of(b), atol=1e-12)


def test_fractions_outside_the_canvas_stay_fractions() -> None:
    below = as_fractions(frame(changed(person(), "pose_keypoints_2d", 10, y=1.3 * SIZE[1])))
    assert parse_frames([below], "poses")[0].people[0].body[10, 1] == pytest.approx(1.3)


@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: [f], lambda f: (f,), json.dumps, lambda f: json.dumps([f])])
def test_a_dictionary_a_list_and_json_text_read_alike(wrap: Any) -> None:
    (read,) = parse_frames(wrap(frame(person())), "poses")
    expected = np.reshape(person()["pose_keypoints_2d"], (18, 3)) / [SIZE[1], SIZE[1], 1]
    np.testing.assert_allclose(read.people[0].body, expected, rtol=1e-12)
    assert read.aspect == pytest.approx(SIZE[0] / SIZE[1])


def test_nested_points_read_like_flat_ones() -> None:
    nested = {key: np.reshape(values, (-1, 3)).tolist() for key, values in person().items()}
    a, b = (parse_frames([frame(one)], "poses")[0].people[0] for one in (person(), nested))
    np.testing.assert_array_equal(points_of(a), points_of(b))


def test_a_25_point_body_loses_mid_hip_and_feet() -> None:
    flat = np.reshape(person()["pose_keypoints_2d"], (18, 3))
    extra = np.full((1, 3), 9.0)
    body_25 = np.concatenate([flat[:8], extra, flat[8:], np.repeat(extra, 6, axis=0)])
    longer = {**person(), "pose_keypoints_2d": body_25.ravel().tolist()}
    a, b = (parse_frames([frame(one)], "poses")[0].people[0] for one in (person(), longer))
    np.testing.assert_array_equal(a.body, b.body)


def test_the_pupils_of_a_70_point_face_are_left_out() -> None:
    longer = {**person(), "face_keypoints_2d": person()["face_keypoints_2d"] + [5.0, 5.0, 1.0] * 2}
    a, b = (parse_frames([frame(one)], "poses")[0].people[0] for one in (person(), longer))
    np.testing.assert_array_equal(a.face, b.face)


@pytest.mark.parametrize("missing", [None, [], "absent", [0.0] * 63])
def test_a_part_may_be_missing(missing: Any) -> None:
    one = {**person(), "hand_left_keypoints_2d": missing}
    if missing == "absent":
        del one["hand_left_keypoints_2d"]
    pose = parse_frames([frame(one)], "poses")[0].people[0]
    assert not pose.hands[0].any()
    assert pose.hands[1, :, 2].all()


@pytest.mark.parametrize(
    "values",
    [
        {"c": 0.0},
        {"c": -1.0},
        {"c": math.nan},
        {"x": math.nan},
        {"y": math.inf},
        {"x": 1e308},
        {"y": -1e308, "c": 1e308},
        {"x": 0.0, "y": 0.0},
        {"x": -1.0, "y": -1.0},
    ],
)
def test_a_point_that_was_not_seen_is_all_zero(values: dict[str, float]) -> None:
    one = changed(person(), "hand_right_keypoints_2d", 3, **values)
    pose = parse_frames([frame(one)], "poses")[0].people[0]
    assert not pose.hands[1, 3].any()
    assert np.isfinite(points_of(pose)).all()
    assert np.count_nonzero(points_of(pose)[:, 2]) == sum(PARTS.values()) - 1


def test_a_confidence_above_one_counts_as_one() -> None:
    pose = parse_frames([frame(changed(person(), "pose_keypoints_2d", 3, c=1.7))], "poses")[0].people[0]
    assert pose.body[3, 2] == 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "driving_poses: has no frames"),
        ("[]", "driving_poses: has no frames"),
        ("{", "driving_poses: is text but not JSON"),
        (3, "driving_poses: is int"),
        ([{"version": "ap10k", "animals": []}], "driving_poses: frame 0: .*animals are not supported"),
        ([{"people": [person()]}], "driving_poses: frame 0: canvas_width is None"),
        ([frame(person(), canvas=(0, 10))], "canvas_width is 0"),
        ([frame(person(), canvas=(10, 1e308))], "canvas_height is 1e[+]308"),
        ([frame(person(), canvas=(10**5000, 10))], "canvas_width is"),
        ([frame(), frame({"pose_keypoints_2d": [1.0] * 51})], "frame 1, person 0, pose_keypoints_2d: has 17 points"),
        ([frame({"pose_keypoints_2d": [1.0] * 50})], "pose_keypoints_2d: is not a list of x, y, confidence"),
        ([frame({"pose_keypoints_2d": 7})], "pose_keypoints_2d: is not a list of x, y, confidence"),
        ([frame({"hand_left_keypoints_2d": ["a", "b", "c"]})], "hand_left_keypoints_2d: is not a list"),
        ([frame(person()), None], "driving_poses: frame 1: has no list of `people`"),
    ],
)
def test_errors_name_the_input_and_the_place(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        align_poses([frame(person())], value, SIZE)


# choosing and holding


def test_the_larger_person_is_chosen_and_of_equal_size_the_surer_one() -> None:
    large, small, faint = person(1.0), person(0.5), person(1.0, (90.0, 0.0))
    faint["pose_keypoints_2d"][2::3] = [0.4] * 18
    for people, expected in (((small, large), large), ((faint, large), large), ((large, faint, small), large)):
        pose = dominant_person(parse_frames([frame(*people)], "poses")[0])
        assert pose is not None
        np.testing.assert_allclose(pose.body[:, 0] * SIZE[1], expected["pose_keypoints_2d"][::3])
    assert dominant_person(parse_frames([frame()], "poses")[0]) is None


def test_frames_without_a_person_are_held_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    nobody = {key: [0.0] * 3 * count for key, count in PARTS.items()}
    left, right = frame(person(1.0, (80.0, 0.0))), frame(person(1.0, (110.0, 0.0)))
    driving = [frame(), frame(nobody), left, frame(), frame(), right, frame()]
    with caplog.at_level(logging.WARNING):
        reference, *poses = align_poses([frame(person())], driving, SIZE)
    xs = [float(pose.body[0, 0]) for pose in poses]
    a, b = xs[2], xs[5]
    assert b - a == pytest.approx(30)
    assert xs == [a, a, a, a, a, b, b]
    assert "driving_poses: no person in frames 0-1, 3-4, 6 (the first is 0)" in caplog.text


def test_a_whole_clip_or_a_reference_without_people_stops_with_its_name() -> None:
    with pytest.raises(ValueError, match="driving_poses: no person in any of 2 frames. Use a clip"):
        align_poses([frame(person())], [frame(), frame()], SIZE)
    with pytest.raises(ValueError, match="reference_pose: no person in it. Use a reference image"):
        align_poses([frame()], [frame(person())], SIZE)
    with pytest.raises(ValueError, match="reference_pose: has no frames"):
        align_poses([], [frame(person())], SIZE)


@pytest.mark.parametrize(
    ("size", "name"), [((100, 320), "width: 100"), ((192, 56), "height: 56"), ((0, 64), "width: 0")]
)
def test_sizes_are_multiples_of_8_from_64(size: tuple[int, int], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a multiple of 8 and at least 64"):
        align_poses([frame(person())], [frame(person())], size)


# alignment


def test_a_known_scale_and_shift_is_undone_exactly() -> None:
    driving = [frame(person(0.6, (300.0, 40.0)), canvas=(640, 360))] * 3
    reference, *poses = align_poses([frame(person(1.1, (90.0, -8.0)))], driving, SIZE)
    assert len(poses) == 3
    for pose in poses:
        np.testing.assert_allclose(points_of(pose), points_of(reference), atol=1e-9)


def test_frames_of_different_canvas_sizes_are_one_clip() -> None:
    driving = [
        frame(person(0.6, (300.0, 40.0)), canvas=(640, 360)),
        frame(person(1.2, (600.0, 80.0)), canvas=(1280, 720)),
    ]
    _, small, large = align_poses([frame(person())], driving, SIZE)
    np.testing.assert_allclose(points_of(small), points_of(large), atol=1e-9)


def random_bodies(seed: int, count: int) -> np.ndarray:
    bodies = np.random.default_rng(seed).uniform(0.1, 0.9, (count, 18, 3))
    bodies[..., 1] += np.arange(18) % 14 * 0.3  # lets the fit have a clear direction
    bodies[..., 2] = 1
    return bodies


def test_the_fit_is_polyfit_of_y_and_the_aspect_relation_in_fractions_of_the_canvas() -> None:
    (w, h), (driving_w, driving_h) = SIZE, (640, 360)
    reference, driving = random_bodies(0, 1)[0], random_bodies(1, 5)  # both in fractions of their picture
    ref, drv = reference[FITTED], driving[:, FITTED]
    slope_y, shift_y = np.polyfit(drv[..., 1].ravel(), np.tile(ref[:, 1], 5), 1)
    slope_x = slope_y * (driving_w / driving_h) * (h / w)
    shift_x = np.mean(np.tile(ref[:, 0], 5) - slope_x * drv[..., 0].ravel())

    in_heights = driving * [driving_w / driving_h, 1, 1]
    fitted = fit_alignment(reference * [w, h, 1], in_heights)
    ours = (in_heights[..., :2] * fitted.scale + fitted.shift) / [w, h]
    np.testing.assert_allclose(ours, driving[..., :2] * [slope_x, slope_y] + [shift_x, shift_y], rtol=1e-9, atol=1e-9)


def test_the_fit_sees_only_points_that_both_show() -> None:
    reference, driving = random_bodies(2, 1)[0], random_bodies(3, 4)
    reference[[0, 9], 2] = 0, 0.29
    driving[1, 12], driving[2, [1, 2], 2] = 0, 0.1
    mask = np.ones((4, 18), dtype=bool)
    mask[:, [3, 4, 6, 7, 0, 9]] = False
    mask[1, 12] = mask[2, 1] = mask[2, 2] = False
    scale, shift_y = np.polyfit(driving[..., 1][mask], np.tile(reference[:, 1], (4, 1))[mask], 1)
    shift_x = np.mean(np.tile(reference[:, 0], (4, 1))[mask] - scale * driving[..., 0][mask])
    fitted = fit_alignment(reference, driving)
    np.testing.assert_allclose([fitted.scale, *fitted.shift], [scale, shift_x, shift_y], rtol=1e-9)


def test_held_frames_do_not_weigh_in_the_fit() -> None:
    driving = [frame(person(0.8)), frame(person(1.2, (80.0, 9.0)))]
    plain = align_poses([frame(person())], driving, SIZE)
    held = align_poses([frame(person())], [driving[0], frame(), frame(), driving[1]], SIZE)
    np.testing.assert_array_equal(points_of(plain[1]), points_of(held[1]))


@pytest.mark.parametrize(
    ("canvas", "expected"),
    [
        (SIZE, Alignment(320.0, np.zeros(2))),
        ((1000, 500), Alignment(320.0, np.array([-224.0, 0.0]))),  # 640x320, 224 cut from either side
        ((96, 320), Alignment(640.0, np.array([0.0, -160.0]))),  # 192x640
    ],
)
def test_the_reference_is_placed_as_the_image_is(canvas: tuple[int, int], expected: Alignment) -> None:
    placed = cover(canvas[0] / canvas[1], SIZE)
    assert placed.scale == pytest.approx(expected.scale)
    np.testing.assert_allclose(placed.shift, expected.shift, atol=1e-9)


def only(entry: dict[str, Any], points: set[int]) -> dict[str, Any]:
    for point in set(range(18)) - points:
        entry = changed(entry, "pose_keypoints_2d", point, c=0.0)
    return entry


def test_too_little_in_common_and_upside_down_are_refused() -> None:
    head, legs = only(person(), {0, 14, 15, 16, 17}), only(person(), {8, 9, 10})
    with pytest.raises(ValueError, match="share 0 of the 14 body points .* Use a reference image and a clip"):
        align_poses([frame(head)], [frame(legs)], SIZE)
    noses = [frame(only(person(1.0, (96.0, y)), {0})) for y in (0.0, 9.0)]
    with pytest.raises(ValueError, match="share 1 of the 14"):
        align_poses([frame(person())], noses, SIZE)
    level = [frame(only(person(), {14, 15}))]
    with pytest.raises(ValueError, match="share 2 of the 14 .* two at different heights"):
        align_poses([frame(person())], level, SIZE)
    with pytest.raises(ValueError, match="driving_poses: .* would turn the person over"):
        align_poses([frame(person())], [frame(person(-1.0, (96.0, 310.0)))], SIZE)


def test_the_inputs_are_left_as_they_were() -> None:
    reference, driving = [frame(person())], [frame(person(0.5)), frame()]
    before = copy.deepcopy((reference, driving))
    align_poses(reference, driving, SIZE)
    assert (reference, driving) == before

"""Drawing of a child in any pose from its joints: the same joints make the pose hint.

Lengths are in heights of the child, who stands on (0, 0) and looks out of the picture, so that the child's right side
is on the left. Angles are in degrees: 0 hangs straight down, 90 points sideways away from the body, 180 up.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from .canvas import FINE, Numbers, Points, ellipse, polygon, ribbon, smooth
from .colors import INK, Color, darker, lighter
from .things import Kind, Pen

HEAD, NECK, SHOULDER, HIP = 0.145, 0.32, (0.115, 0.335), (0.064, 0.57)
"""Radius of the head; crown to neck; shoulders and hips: half their distance, and from the crown down."""
UPPER_ARM, FOREARM, THIGH, SHIN = 0.145, 0.135, 0.185, 0.185
TROUSERS: Color = (86, 106, 158)
SHOES: Color = (92, 66, 74)
LOOKS: dict[str, tuple[Color, Color]] = {
    "blond": ((250, 214, 184), (240, 196, 104)),
    "ginger": ((252, 222, 198), (206, 98, 58)),
    "brown-haired": ((222, 168, 124), (122, 76, 56)),
    "black-haired": ((160, 108, 80), (62, 50, 58)),
}
"""Word in captions -> colours of skin and hair."""


def joints(numbers: Numbers) -> Points:
    """Body points (18, 2) of a random pose, in OpenPose's order; the lower foot stands at y = 0, up is negative."""
    right, left = _side(-1, numbers), _side(1, numbers)
    face = polygon((-0.045, -0.015), (0.045, -0.015), (-HEAD * 0.95, 0), (HEAD * 0.95, 0)) + (0, HEAD)
    points = np.concatenate([[[0, HEAD + 0.02], [0, NECK]], right[:3], left[:3], right[3:], left[3:], face])
    return np.asarray(points - (0, max(right[5][1], left[5][1]) + 0.035))


def _side(sign: int, numbers: Numbers) -> Points:
    """Shoulder, elbow, wrist, hip, knee and ankle of one side; sign: -1 for the child's right."""
    arm, leg = numbers.between(8, 140), numbers.between(2, 24)
    bend = numbers.between(-25, 90) if arm > 60 else numbers.between(-10, 60)
    lifted = numbers.next() < 0.2
    thigh, knee = (numbers.between(40, 75), numbers.between(-80, -20)) if lifted else (leg, numbers.between(-12, 8))
    shoulder, hip = np.asarray((sign * SHOULDER[0], SHOULDER[1])), np.asarray((sign * HIP[0], HIP[1]))
    elbow, ankle_from = shoulder + _way(sign, arm, UPPER_ARM), hip + _way(sign, thigh, THIGH)
    wrist, ankle = elbow + _way(sign, arm + bend, FOREARM), ankle_from + _way(sign, thigh + knee, SHIN)
    return np.stack([shoulder, elbow, wrist, hip, ankle_from, ankle])


def _way(sign: int, angle: float, length: float) -> Points:
    turn = np.deg2rad(angle)
    return length * np.asarray((sign * np.sin(turn), np.cos(turn)))


def child(pen: Pen, color: Color, numbers: Numbers, look: str = "blond", is_girl: bool = False) -> None:
    """Draw a child whose shirt has the colour, and record its joints on the canvas. look: one of LOOKS."""
    pen = replace(pen, mirrored=False)
    skin, hair = LOOKS[look]
    body = joints(numbers)
    pen.note(body)
    nose, neck = body[0], body[1]
    for hip, knee, ankle in (body[8:11], body[11:14]):
        foot = ellipse(ankle[0] + 0.02 * np.sign(ankle[0]), ankle[1] + 0.01, 0.06, 0.032)
        pen.shape(foot, SHOES, FINE, False)
        pen.shape(ribbon(smooth(np.stack([hip, knee, ankle]), False, 2), 0.05), TROUSERS, shaded=False)
    pen.shape(_shirt(body), color)
    for shoulder, elbow, wrist in (body[2:5], body[5:8]):
        hand = wrist + 0.025 * (wrist - elbow) / FOREARM
        pen.shape(ellipse(hand[0], hand[1], 0.042, 0.042), skin, FINE, False)
        sleeve = ribbon(smooth(np.stack([shoulder, elbow, wrist]), False, 2)[:-1], 0.038)
        pen.shape(sleeve, lighter(color, 0.2), FINE, False)
    center = nose - (0, 0.02)
    pen.shape(ellipse(neck[0], neck[1] - 0.02, 0.04, 0.05), darker(skin, 0.12), FINE, False)
    if is_girl:
        _bunches(pen, center, hair)
    pen.shape(ellipse(center[0], center[1], HEAD, HEAD), skin)
    _face(pen, center, hair)


def _shirt(body: Points) -> Points:
    """Outline of a shirt, from the shoulders to below the hips."""
    (left, top), (right, _), hips = body[2], body[5], body[8][1] + 0.03
    return smooth(
        polygon((left - 0.025, top - 0.02), (right + 0.025, top - 0.02), (0.11, hips), (-0.11, hips)), True, 1
    )


def _bunches(pen: Pen, center: Points, hair: Color) -> None:
    """Bunches of a girl's hair, on both sides of the head."""
    for side in (-1, 1):
        pen.shape(ellipse(center[0] + side * (HEAD + 0.03), center[1] - 0.01, 0.06, 0.085), hair, FINE, False)


def _face(pen: Pen, center: Points, hair: Color) -> None:
    x, y = center
    fringe = np.concatenate([ellipse(x, y, HEAD, HEAD, 0.5, 1.0), polygon((x + 0.05, y - 0.05), (x - 0.08, y - 0.045))])
    pen.shape(fringe, hair, FINE, False)
    for side in (-1, 1):
        pen.shape(ellipse(x + side * 0.055, y + 0.01, 0.02, 0.027), INK, 0, False)
    pen.line(ellipse(x, y + 0.055, 0.05, 0.034, 0.05, 0.45), 0.011, INK, False)


SHIRTS = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink", "white")
CHILDREN: dict[str, Kind] = {
    f"{look} {name}": Kind(partial(child, look=look, is_girl=name == "girl"), SHIRTS, 0.4)
    for look in LOOKS
    for name in ("boy", "girl")
}
"""Name in captions, such as 'blond boy' -> kind."""

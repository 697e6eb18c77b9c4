"""Complete pictures: a place, one to three things in it, a caption and hints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..hints.pose_drawing import draw_sticks
from .canvas import FINE, LINE, Array, Canvas, Numbers, box, ellipse, lobes, polygon, smooth
from .children import CHILDREN
from .colors import COLORS, DEEP, MEADOW, SAND, SEA, SKIES, SNOW, TABLE, WALLS, Color, darker, lighter, mix
from .things import THINGS, Kind, Pen, potted_flower

PLANES = ("edges", "mask", "depth")
"""Names of the hints that every picture stores as one plane."""
HINTS = (*PLANES, "pose")
"""Names of the hints of a picture; the pose is black without people."""
Kinds = tuple[tuple[str, ...], ...]
"""Groups of kinds that stand beside each other; a picture has one or two of a group."""
ON_MEADOWS: Kinds = (("house", "tree"), ("tree", "mushroom", "flower"), ("cat", "house", "flower"))
IN_ROOMS: Kinds = (("cat", "flower"), ("cup", "flower"), ("cat",), ("cup", "cat"), ("mushroom", "cup"))
CHILD = "child"  # among kinds: any of CHILDREN
PLAYING: Kinds = ((CHILD,), (CHILD, CHILD), (CHILD, "cat"), (CHILD, "flower"))
FAR, NEAR = 24, 235  # depth of a sky and of the nearest thing

DRAWN: dict[str, Kind] = {**THINGS, **CHILDREN}


@dataclass(frozen=True, slots=True)
class Picture:
    """Picture with its caption, hints and body points. All arrays are uint8."""

    image: Array
    """Colours (H, W, 3)."""
    edges: Array
    """Visible outlines (H, W), white on black."""
    mask: Array
    """Mask (H, W), 255 inside the things that the caption names."""
    depth: Array
    """Depth (H, W), bright is near."""
    caption: str
    people: tuple[Array, ...] = ()
    """Body points (18, 2) of each person, in pixels, x and y, in OpenPose's order."""

    def hint(self, name: str) -> Array:
        """Hint (H, W, 3) of one of HINTS. Raises ValueError for another name."""
        if name not in HINTS:
            raise ValueError(f"hint: {name!r} is unknown. A drawn picture has {', '.join(HINTS)}.")
        if name == "pose":
            return draw_sticks(self.people, self.image.shape[1::-1])
        return np.repeat(getattr(self, name)[..., None], 3, axis=2)


@dataclass(frozen=True, slots=True)
class Item:
    """Thing in its place. x, y: where it stands, in units of the shorter side; size: its height."""

    kind: str
    color: str
    x: float
    y: float
    size: float

    def named(self) -> str:
        if self.kind in CHILDREN:
            return f"{_article(self.kind)} in {_article(self.color)} shirt"
        return f"{_article(self.color)} {self.kind}"


SceneDrawer = Callable[[Canvas, Numbers], tuple[list[Item], str]]


def draw(seed: int, index: int, size: int | tuple[int, int]) -> Picture:
    """Draw picture `index` of a series; size: the side of a square, or (H, W), in pixels."""
    return _draw(f"picturebook/{seed}/{index}", size, PLACES)


def draw_children(seed: int, index: int, size: int | tuple[int, int]) -> Picture:
    """Draw picture `index` of a series with one or two children each, whose pose is known; size: as for `draw`."""
    return _draw(f"children/{seed}/{index}", size, PLAYGROUNDS)


def _draw(name: str, size: int | tuple[int, int], places: tuple[SceneDrawer, ...]) -> Picture:
    height, width = (size, size) if isinstance(size, int) else size
    numbers = Numbers(name)
    canvas = Canvas(height, width)
    place = numbers.pick(places)
    items, where = place(canvas, numbers)
    caption = f"{_and([item.named() for item in items])} {where}"
    people = tuple(points * canvas.side for points in canvas.people)
    return Picture(canvas.image, canvas.edges, canvas.mask, canvas.depth, caption, people)


def _meadow(canvas: Canvas, numbers: Numbers, kinds: Kinds = ON_MEADOWS) -> tuple[list[Item], str]:
    sky, horizon = _sky(canvas, numbers), numbers.between(0.56, 0.64) * canvas.height
    ground = numbers.pick(kinds)
    items = _row(canvas, numbers, ground, numbers.between(0.86, 0.92) * canvas.height, (0.46, 0.62))
    items = _above(canvas, numbers, items, horizon, ("sun", "balloon", "mountain"))
    behind = [item for item in items if item.kind in ("sun", "balloon", "mountain")]
    _clouds(canvas, numbers, items)
    _draw_items(canvas, numbers, behind, 60)
    hill = numbers.between(-0.05, 0.05)
    canvas.near, canvas.is_thing = 96, False
    far = smooth(
        polygon(
            (-0.3, 2),
            (-0.3, horizon + hill),
            (canvas.width * 0.3, horizon - hill - 0.04),
            (canvas.width * 0.7, horizon + hill),
            (canvas.width + 0.3, horizon - hill),
            (canvas.width + 0.3, 2),
        ),
        True,
        3,
    )
    canvas.shape(far, MEADOW[0])
    canvas.near = 130
    low = horizon + 0.13
    near = smooth(
        polygon(
            (-0.3, 2),
            (-0.3, low),
            (canvas.width * 0.4, low + 0.05),
            (canvas.width * 0.75, low - 0.03),
            (canvas.width + 0.3, low + 0.03),
            (canvas.width + 0.3, 2),
        ),
        True,
        3,
    )
    canvas.shape(near, MEADOW[1])
    _grass(canvas, numbers, low + 0.1)
    front = [item for item in items if item not in behind]
    _shadows(canvas, front, darker(MEADOW[1], 0.25))
    _draw_items(canvas, numbers, front, NEAR)
    return items, f"on a meadow under a {sky} sky"


def _sea(canvas: Canvas, numbers: Numbers) -> tuple[list[Item], str]:
    sky, horizon = _sky(canvas, numbers), numbers.between(0.5, 0.58) * canvas.height
    main = numbers.pick((("boat",), ("boat",), ("lighthouse", "boat")))
    items = _row(canvas, numbers, main, numbers.between(0.76, 0.84) * canvas.height, (0.52, 0.66))
    items = _above(canvas, numbers, items, horizon, ("sun", "balloon", "mountain"))
    behind = [item for item in items if item.kind in ("sun", "balloon", "mountain")]
    _clouds(canvas, numbers, items)
    _draw_items(canvas, numbers, behind, 60)
    canvas.vertical(horizon, canvas.height, SEA, (80, 190))
    canvas.line(polygon((-0.1, horizon), (canvas.width + 0.1, horizon)), LINE)
    _draw_items(canvas, numbers, [item for item in items if item not in behind], NEAR)
    canvas.near, canvas.is_thing = 215, False
    for row in range(3):
        y = items[0].y + 0.015 + 0.085 * row
        _wave(canvas, y, numbers.next(), mix(SEA[0], SEA[1], 0.3 + 0.3 * row))
    return items, f"on the sea under a {sky} sky"


def _underwater(canvas: Canvas, numbers: Numbers) -> tuple[list[Item], str]:
    canvas.vertical(0, canvas.height, DEEP, (FAR, 110))
    floor = numbers.between(0.84, 0.9) * canvas.height
    canvas.near = 150
    for place in range(3):
        _weed(canvas, numbers, (place + numbers.between(0.2, 0.8)) / 3 * canvas.width, floor + 0.05)
    sand = smooth(
        polygon(
            (-0.2, 2),
            (-0.2, floor),
            (canvas.width * 0.5, floor + 0.04),
            (canvas.width + 0.2, floor - 0.02),
            (canvas.width + 0.2, 2),
        ),
        True,
        3,
    )
    canvas.shape(sand, SAND)
    count = numbers.pick((1, 1, 2, 2, 3))
    items = []
    colors = list(THINGS["fish"].colors)
    for place in range(count):
        size = numbers.between(*((0.56, 0.74), (0.36, 0.46), (0.3, 0.36))[count - 1])
        y = (0.47, (0.3, 0.62)[place % 2], (0.2, 0.45, 0.7)[place])[count - 1] * canvas.height
        x = (0.5 if count == 1 else (0.36, 0.62, 0.38)[place]) * canvas.width + numbers.between(-0.06, 0.06)
        color = numbers.pick(colors)
        colors.remove(color)
        items.append(Item("fish", color, x, y + size * 0.5, size))
    for _ in range(5):
        x, y, size = (
            numbers.between(0.05, 0.95) * canvas.width,
            numbers.between(0.06, 0.7),
            numbers.between(0.012, 0.026),
        )
        canvas.line(ellipse(x, y, size, size), FINE, lighter(DEEP[0], 0.7), False)
    _draw_items(canvas, numbers, items, NEAR)
    return items, "under water"


def _room(canvas: Canvas, numbers: Numbers, kinds: Kinds = IN_ROOMS) -> tuple[list[Item], str]:
    wall = numbers.pick(WALLS)
    color = WALLS[wall]
    edge = numbers.between(0.7, 0.76) * canvas.height
    canvas.vertical(0, edge, (color, color), (40, 40))
    _paper(canvas, numbers, color, edge)
    canvas.vertical(edge, canvas.height, (lighter(TABLE, 0.15), TABLE), (120, 200))
    canvas.line(polygon((-0.1, edge), (canvas.width + 0.1, edge)), LINE)
    items = _row(canvas, numbers, numbers.pick(kinds), edge + numbers.between(0.1, 0.16), (0.56, 0.7))
    _shadows(canvas, items, darker(TABLE, 0.2))
    _draw_items(canvas, numbers, items, NEAR, potted=True)
    return items, f"in front of a {wall} wall"


PLACES: tuple[SceneDrawer, ...] = (_meadow, _sea, _underwater, _room, _meadow)
PLAYGROUNDS: tuple[SceneDrawer, ...] = (partial(_meadow, kinds=PLAYING), partial(_room, kinds=PLAYING))


def _row(canvas: Canvas, numbers: Numbers, kinds: tuple[str, ...], y: float, sizes: tuple[float, float]) -> list[Item]:
    """One or two of `kinds` side by side on the ground."""
    count = min(len(kinds), numbers.pick((1, 2, 2)))
    first = int(numbers.next() * len(kinds))
    chosen = [kinds[(first + place) % len(kinds)] for place in range(count)]
    if CHILD in kinds and CHILD not in chosen:
        chosen[0] = CHILD
    chosen = [numbers.pick(CHILDREN) if kind == CHILD else kind for kind in chosen]
    items, used = [], set()
    for place, kind in enumerate(chosen):
        color = numbers.pick([name for name in DRAWN[kind].colors if name not in used])
        used.add(color)
        low, high = sizes
        size = numbers.between(low, high) * (1 if count == 1 else 0.8)
        size *= {"mushroom": 0.85, "cup": 0.85, "flower": 1.0, "cat": 1.0}.get(kind, 1.4 if kind in CHILDREN else 1.0)
        center = 0.5 if count == 1 else (0.29, 0.73)[place]
        x = center * canvas.width + numbers.between(-0.07, 0.07) * (1 if count == 1 else 0.5)
        items.append(Item(kind, color, x, y + numbers.between(-0.02, 0.02), size))
    return items


def _above(canvas: Canvas, numbers: Numbers, items: list[Item], horizon: float, kinds: tuple[str, ...]) -> list[Item]:
    """Add nothing, or one of `kinds` above the horizon, where there is room."""
    if numbers.next() < 0.35:
        return items
    kind = numbers.pick(kinds)
    color = numbers.pick([name for name in DRAWN[kind].colors if all(name != item.color for item in items)])
    if kind == "mountain":
        size, x = numbers.between(0.36, 0.46), numbers.between(0.35, 0.65) * canvas.width
        return [*items, Item(kind, color, x, horizon + 0.06, size)]
    size = numbers.between(0.24, 0.3)
    side = numbers.pick((0.17, 0.83)) if len(items) == 1 else numbers.pick((0.17, 0.5, 0.83))
    y = 0.05 + size + numbers.between(0, 0.03)
    return [*items, Item(kind, color, side * canvas.width, y, size)]


def _shadows(canvas: Canvas, items: list[Item], color: Color) -> None:
    canvas.near = 140
    for item in items:
        wide = item.size * DRAWN[item.kind].half * (0.55 if item.kind in ("tree", "flower", "mushroom") else 1.0)
        canvas.shape(ellipse(item.x + 0.015, item.y, wide * 1.05, 0.024), color, 0)


def _draw_items(canvas: Canvas, numbers: Numbers, items: list[Item], near: int, potted: bool = False) -> None:
    canvas.is_thing = True
    for item in items:
        canvas.near = near
        pen = Pen(canvas, item.x, item.y, item.size, numbers.next() < 0.5)
        painter = potted_flower if potted and item.kind == "flower" else DRAWN[item.kind].draw
        painter(pen, COLORS[item.color], numbers)
    canvas.is_thing = False


def _sky(canvas: Canvas, numbers: Numbers) -> str:
    name = numbers.pick(SKIES)
    canvas.vertical(0, canvas.height, SKIES[name], (FAR, FAR + 16))
    return name


def _clouds(canvas: Canvas, numbers: Numbers, items: list[Item]) -> None:
    canvas.near, canvas.is_thing = 40, False
    taken = [item.x / canvas.width for item in items if item.kind in ("sun", "balloon")]
    places = [place for place in (0.18, 0.5, 0.82) if all(abs(place - other) > 0.2 for other in taken)]
    for _ in range(numbers.pick((1, 2, 2))):
        place = numbers.pick(places)
        places.remove(place)
        x, y = (place + numbers.between(-0.07, 0.07)) * canvas.width, numbers.between(0.09, 0.25)
        wide = numbers.between(0.11, 0.16)
        top = lobes(x, y, wide, wide * 0.45, 5, 0.2, 0.3)
        top[:, 1] = np.minimum(top[:, 1], y + wide * 0.2)
        canvas.shape(top, SNOW, FINE)


def _grass(canvas: Canvas, numbers: Numbers, top: float) -> None:
    for _ in range(7):
        x, y = numbers.between(0.03, 0.97) * canvas.width, numbers.between(top, canvas.height - 0.02)
        for lean in (-0.012, 0.012):
            canvas.line(polygon((x, y), (x + lean, y - 0.028)), 0.006, darker(MEADOW[1], 0.3), False)


def _wave(canvas: Canvas, y: float, phase: float, color: Color) -> None:
    x = np.linspace(-0.1, canvas.width + 0.1, 60)
    crest = np.stack([x, y + 0.012 * np.sin(2 * np.pi * (x * 4.5 + phase))], axis=1)
    canvas.shape(np.concatenate([crest, polygon((canvas.width + 0.1, 2), (-0.1, 2))]), color, FINE)


def _weed(canvas: Canvas, numbers: Numbers, x: float, y: float) -> None:
    high = numbers.between(0.18, 0.34)
    steps = np.linspace(0, 1, 24)
    sway = 0.025 * np.sin(steps * 7 + numbers.next() * 6)
    half = 0.034 * (1 - steps * 0.85)
    spine = np.stack([x + sway, y - high * steps], axis=1)
    left, right = spine - np.stack([half, 0 * half], 1), spine + np.stack([half, 0 * half], 1)
    canvas.shape(np.concatenate([left, right[::-1]]), numbers.pick(((84, 164, 120), (60, 140, 120))), FINE)


def _paper(canvas: Canvas, numbers: Numbers, color: Color, edge: float) -> None:
    """Wallpaper: stripes, dots or nothing."""
    kind, pattern = numbers.pick((0, 1, 2)), lighter(color, 0.3)
    canvas.near = 40
    if kind == 0:
        for x in np.arange(0.0, canvas.width, 0.125):
            canvas.shape(box(x, 0, x + 0.0625, edge), pattern, 0)
    if kind == 1:
        for row, y in enumerate(np.arange(0.05, edge - 0.03, 0.115)):
            for x in np.arange(0.06 + 0.0575 * (row % 2), canvas.width, 0.115):
                canvas.shape(ellipse(x, y, 0.013, 0.013), pattern, 0)


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _and(parts: list[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"

"""Outlines of the shapes, each stretched to reach from -1 to 1 on both axes."""

import math
from collections.abc import Iterable

Point = tuple[float, float]


def _around(angles: Iterable[float], radii: Iterable[float]) -> list[Point]:
    """Points at the given angles (turns, clockwise from the top) and distances."""
    return [
        (radius * math.sin(math.tau * angle), -radius * math.cos(math.tau * angle))
        for angle, radius in zip(angles, radii, strict=True)
    ]


def _heart() -> list[Point]:
    turns = [math.tau * step / 64 for step in range(64)]
    return [
        (
            16 * math.sin(t) ** 3,
            5 * math.cos(2 * t) + 2 * math.cos(3 * t) + math.cos(4 * t) - 13 * math.cos(t),
        )
        for t in turns
    ]


def _cross(half_arm: float) -> list[Point]:
    a = half_arm
    corner = [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a)]
    return corner + [(-x, -y) for x, y in corner]


def _fill_box(points: list[Point]) -> list[Point]:
    """Stretch an outline to reach from -1 to 1 on both axes."""
    xs, ys = zip(*points, strict=True)
    return [
        (
            2 * (x - min(xs)) / (max(xs) - min(xs)) - 1,
            2 * (y - min(ys)) / (max(ys) - min(ys)) - 1,
        )
        for x, y in points
    ]


OUTLINES: dict[str, list[Point]] = {
    "circle": _fill_box(_around([step / 64 for step in range(64)], [1] * 64)),
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "triangle": [(0, -1), (1, 1), (-1, 1)],
    "star": _fill_box(_around([step / 10 for step in range(10)], [1, 0.48] * 5)),
    "heart": _fill_box(_heart()),
    "cross": _cross(0.36),
}

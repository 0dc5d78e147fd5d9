"""Score a picture against a scene by plain image processing: nothing here is learned."""

import functools
import itertools
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from sd3min.training.scenes import BACKGROUNDS, COLOURS, SHAPES, Box, Scene, paint

UNKNOWN = "unknown"
PALETTE = {**COLOURS, **BACKGROUNDS}
BORDER = 2  # pixels of frame that settle the background
FOREGROUND_DISTANCE = 60  # from the background's colour; the closest object colour is at 122
COLOUR_DISTANCE = 90  # farther than this from every palette colour is no palette colour
MINIMUM_AREA = 0.005  # of the picture; the smallest star covers six times as much
MINIMUM_OVERLAP = 0.85  # the wrong shape reaches 0.83, the right one 0.92 in a blurred picture
ZOOM = 4  # of the masks on which shapes are compared


@dataclass(frozen=True)
class Found:
    """One object of a picture: overlap is that with its shape's template, lengths in pixels."""

    colour: str
    shape: str
    overlap: float
    centre: tuple[float, float]
    area: float


@dataclass(frozen=True)
class Verdict:
    """Which parts of a scene a picture shows."""

    count: bool
    colour: bool
    shape: bool
    relation: bool
    background: bool

    @property
    def right(self) -> bool:
        """Whether the objects are as the scene has them; the background is not asked for."""
        return self.count and self.colour and self.shape and self.relation


def _nearest(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index in PALETTE of the colour nearest to each pixel, and the distance to it."""
    palette = np.array(list(PALETTE.values()), dtype=np.float32)
    distances = np.linalg.norm(pixels[:, None] - palette, axis=-1)
    return distances.argmin(axis=1), distances.min(axis=1)


def _background(pixels: np.ndarray) -> tuple[str, np.ndarray]:
    """The palette name commonest along the border, and the median colour of its pixels there."""
    frame = np.ones(pixels.shape[:2], dtype=bool)
    frame[BORDER:-BORDER, BORDER:-BORDER] = False
    border = pixels[frame]
    nearest, _ = _nearest(border)
    commonest = np.bincount(nearest).argmax()
    return list(PALETTE)[commonest], np.median(border[nearest == commonest], axis=0)


def _neighbours(grid: np.ndarray) -> list[np.ndarray]:
    """The grid moved by one cell in each of the four directions, with zeros moving in."""
    padded = np.pad(grid, 1)
    return [padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]


def components(mask: np.ndarray) -> list[np.ndarray]:
    """Split a mask into its connected parts, by spreading the largest label of each part."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        spread = np.maximum.reduce([labels, *_neighbours(labels)]) * mask
        if np.array_equal(spread, labels):
            return [labels == label for label in np.unique(labels) if label]
        labels = spread


def _centroid(mask: np.ndarray) -> tuple[float, float]:
    rows, columns = np.nonzero(mask)
    return float(columns.mean()) + 0.5, float(rows.mean()) + 0.5


def _paint_mask(shape: str, box: Box, size: tuple[int, int]) -> np.ndarray:
    image = Image.new("1", size)
    paint(ImageDraw.Draw(image), shape, box, 1)
    return np.asarray(image)


@functools.cache
def _moments(shape: str) -> tuple[float, float, float]:
    """The part of its box that a shape fills, and its centroid from the box's centre in widths."""
    mask = _paint_mask(shape, (128, 128, 256), (256, 256))
    x, y = _centroid(mask)
    return float(mask.mean()), x / 256 - 0.5, y / 256 - 0.5


def _overlap(mask: np.ndarray, shape: str) -> float:
    """Intersection over union of a mask and the shape with the same area and centroid."""
    x, y = _centroid(mask)
    fill, right, down = _moments(shape)
    across = (mask.sum() / fill) ** 0.5
    box = (x - right * across, y - down * across, across)
    template = _paint_mask(shape, box, mask.shape[::-1])
    return float((mask & template).sum() / (mask | template).sum())


def _outline(coverage: np.ndarray) -> np.ndarray:
    """The mask, ZOOM times enlarged, of where an object covers more than half."""
    height, width = coverage.shape
    image = Image.fromarray((coverage * 255).round().astype(np.uint8))
    enlarged = image.resize((width * ZOOM, height * ZOOM), Image.Resampling.BILINEAR)
    return np.asarray(enlarged) > 127


def _describe(pixels: np.ndarray, part: np.ndarray, background: np.ndarray) -> Found:
    """Describe one connected part; its edge, mixed with the background, has no say in colour."""
    inner = np.logical_and.reduce([part, *_neighbours(part)])
    own = np.median(pixels[inner if inner.any() else part], axis=0)
    index, distance = (result[0] for result in _nearest(own[None]))
    colour = list(PALETTE)[index] if distance <= COLOUR_DISTANCE else UNKNOWN

    from_own = np.linalg.norm(pixels - own, axis=-1)
    from_background = np.linalg.norm(pixels - background, axis=-1)
    grown = np.logical_or.reduce([part, *_neighbours(part)])
    mask = _outline(grown * from_background / (from_background + from_own + 1e-6))
    overlaps = {shape: _overlap(mask, shape) for shape in SHAPES}
    best = max(overlaps, key=overlaps.__getitem__)
    shape = best if overlaps[best] >= MINIMUM_OVERLAP else UNKNOWN
    x, y = _centroid(mask)
    area = float(mask.sum()) / ZOOM**2
    return Found(colour, shape, overlaps[best], (x / ZOOM, y / ZOOM), area)


def find(image: Image.Image) -> tuple[list[Found], str]:
    """Find the objects of a picture and the name of its background's colour."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    name, background = _background(pixels)
    mask = np.linalg.norm(pixels - background, axis=-1) > FOREGROUND_DISTANCE
    parts = [part for part in components(mask) if part.sum() >= MINIMUM_AREA * mask.size]
    return [_describe(pixels, part, background) for part in parts], name


def relation_between(first: Found, second: Found) -> str:
    """Name where the first object lies from the second, along the axis that parts them most."""
    right = first.centre[0] - second.centre[0]
    down = first.centre[1] - second.centre[1]
    if abs(down) > abs(right):
        return "below" if down > 0 else "above"
    return "right of" if right > 0 else "left of"


def _compare(found: tuple[Found, ...], scene: Scene) -> tuple[bool, bool, bool]:
    """Whether colours, shapes and relation fit when the objects are the scene's in this order."""
    pairs = list(zip(found, scene.things, strict=True))
    colour = all(seen.colour == thing.colour for seen, thing in pairs)
    shape = all(seen.shape == thing.shape for seen, thing in pairs)
    if scene.relation is None:
        return colour, shape, colour and shape
    return colour, shape, relation_between(*found) == scene.relation


def judge(image: Image.Image, scene: Scene) -> Verdict:
    """Judge a picture; with a wrong count of objects, nothing but the background can be right.

    Objects are matched with the scene's things by colour first, then by shape, then by relation.
    A single object has its relation right when its colour and shape are.
    """
    found, background = find(image)
    on_background = background == scene.background
    if len(found) != len(scene.things):
        return Verdict(False, False, False, False, on_background)
    best = max(_compare(order, scene) for order in itertools.permutations(found))
    return Verdict(True, *best, on_background)

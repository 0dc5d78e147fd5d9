"""Score a picture against a scene by plain image processing: nothing here is learned.

What stands out from the colour of the border falls into parts. Each part is laid on a canvas, moved
and stretched so that its middle and its area are always the same, and is compared there with all
that it could be: every coloured shape and every object, drawn on the same background.
"""

import functools
import itertools
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from sd3min.training.scenes import (
    BACKGROUNDS,
    COLOURS,
    LAYOUT_SIZE,
    NOUNS,
    OVERSAMPLING,
    THINGS,
    Scene,
    Thing,
    paint,
)

UNKNOWN = "unknown"
BORDER = 3  # pixels of frame that settle the background
FAINTEST, CLEAREST = 30, 50  # distances from the background between which a colour comes to count
BLOCK = 2  # pixels across the cells on which parts are told apart
MINIMUM_AREA = 0.004  # of the picture; the smallest thing covers ten times as much
COLOUR_DISTANCE = 90  # farther than this from every colour of the shapes is none of them
CANVAS = 32  # pixels across
ROOM = 2.4  # square roots of a part's area from side to side of the canvas
SOFTNESS = 0.7  # pixels of the canvas; blurs away how soft the picture is
SCALES = (0.9, 0.95, 1.0, 1.05)  # that are tried, since softness makes a part larger
FARTHEST = 0.4  # from a template; soft drawn things reach 0.38, the house on cream, as a rule 0.1
MARGIN = 0.6  # of the distance to the second-nearest; half of each of two things has 0.7 to 1


class Box(NamedTuple):
    """A rectangle of pixels or blocks; the far ends are outside of it."""

    top: int
    bottom: int
    left: int
    right: int

    def touches(self, other: "Box") -> bool:
        """Whether no row and no column lies between two boxes."""
        apart = self.top > other.bottom or other.top > self.bottom
        return not (apart or self.left > other.right or other.left > self.right)

    def joined(self, other: "Box") -> "Box":
        """The smallest box around both."""
        starts, ends = map(min, self[::2], other[::2]), map(max, self[1::2], other[1::2])
        (top, left), (bottom, right) = starts, ends
        return Box(top, bottom, left, right)

    def wider(self, margin: int) -> "Box":
        """The box with a margin, where a picture begins at 0."""
        top, left = (max(start - margin, 0) for start in self[::2])
        return Box(top, self.bottom + margin, left, self.right + margin)


@dataclass(frozen=True)
class Found:
    """One part of a picture. Centre (x, y) of its area, area and box are in pixels; the distance to
    the nearest template is 0 for its equal and 1 for an empty place."""

    noun: str
    colour: str | None
    centre: tuple[float, float]
    area: float
    distance: float
    box: Box


@dataclass(frozen=True)
class Verdict:
    """Which aspects of a scene a picture has right: every thing's noun, every shape's colour, every
    relation."""

    count: bool
    noun: bool
    colour: bool
    relation: bool
    background: bool

    @property
    def right(self) -> bool:
        """Whether the things are as the scene has them; the background is not asked for."""
        return self.count and self.noun and self.colour and self.relation


def _find_background(pixels: np.ndarray) -> tuple[str, np.ndarray]:
    """The background nearest to the median colour along the border, and that colour."""
    frame = np.ones(pixels.shape[:2], dtype=bool)
    frame[BORDER:-BORDER, BORDER:-BORDER] = False
    colour = np.median(pixels[frame], axis=0)
    return _nearest(colour, BACKGROUNDS)[0], colour


def _nearest(colour: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> tuple[str, float]:
    """The palette's name for the colour nearest to one, and the distance to it."""
    distances = np.linalg.norm(np.array(list(palette.values())) - colour, axis=-1)
    return list(palette)[distances.argmin()], float(distances.min())


def _stand_out(pixels: np.ndarray, background: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What each pixel differs by from the background, nothing where it is much like it, and how far
    it counts as part of a thing, from 0 to 1."""
    relief = pixels - background.astype(np.float32)
    counts = (np.linalg.norm(relief, axis=-1) - FAINTEST) / (CLEAREST - FAINTEST)
    counts = counts.clip(0, 1)
    return relief * counts[..., None], counts


# --- parts -----------------------------------------------------------------------------------


def _spread(labels: np.ndarray) -> np.ndarray:
    """The largest label among each cell and its eight neighbours."""
    rows = np.pad(labels, 1)
    rows = np.maximum(np.maximum(rows[:-2], rows[1:-1]), rows[2:])
    return np.maximum(np.maximum(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:])


def _connected(mask: np.ndarray) -> list[Box]:
    """Boxes of a mask's connected parts, by spreading the largest label of each part."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while not np.array_equal(wider := _spread(labels) * mask, labels):
        labels = wider
    boxes = []
    for label in np.unique(labels[mask]):
        rows, columns = np.nonzero(labels == label)
        boxes.append(Box(rows.min(), rows.max() + 1, columns.min(), columns.max() + 1))
    return boxes


def _parts(counts: np.ndarray) -> list[Box]:
    """Boxes around a picture's parts; a box that touches another is one with it, since an object
    may have the background's colour in its middle."""
    height, width = counts.shape
    padded = np.pad(counts, ((0, -height % BLOCK), (0, -width % BLOCK)))
    blocks = padded.reshape(-(-height // BLOCK), BLOCK, -1, BLOCK).max(axis=(1, 3)) > 0.5
    parts: list[Box] = []
    for box in _connected(blocks):
        while near := [part for part in parts if part.touches(box)]:
            parts = [part for part in parts if part not in near]
            box = functools.reduce(Box.joined, near, box)
        parts.append(box)
    return [Box(*(BLOCK * end for end in part)) for part in parts]


# --- templates -------------------------------------------------------------------------------


def _filled(counts: np.ndarray) -> np.ndarray:
    """The counts without what is lower than something on all four sides."""
    sides = [np.maximum.accumulate(counts, axis) for axis in (0, 1)]
    sides += [np.flip(np.maximum.accumulate(np.flip(counts, a), a), a) for a in (0, 1)]
    return np.minimum.reduce(sides)


def _sampling(middle: float, scale: float, length: int) -> np.ndarray:
    """Weights [CANVAS, length] of the pixels along one axis in each row of a soft canvas."""
    places = middle + scale * (np.arange(CANVAS) - (CANVAS - 1) / 2)
    away = (np.arange(length) + 0.5 - places[:, None]) / (SOFTNESS * scale)
    weights = np.exp(-(away**2) / 2) / (SOFTNESS * scale * (2 * np.pi) ** 0.5)
    return weights.astype(np.float32)


class Laid(NamedTuple):
    """A part on the canvas at each scale, [scales, values], and where it lay in its box."""

    centre: tuple[float, float]
    area: float
    canvases: np.ndarray


def _lay_out(relief: np.ndarray, counts: np.ndarray, scales: Collection[float]) -> Laid:
    """Lay a part on the canvas with its middle in the middle, its area that of all parts."""
    filled = _filled(counts)
    area, (height, width) = float(filled.sum()), filled.shape
    x = float(filled.sum(axis=0) @ (np.arange(width) + 0.5)) / area
    y = float(filled.sum(axis=1) @ (np.arange(height) + 0.5)) / area
    canvases = []
    for scale in (scale * ROOM * area**0.5 / CANVAS for scale in scales):
        rows = _sampling(y, scale, height) @ relief.reshape(height, -1)
        canvas = _sampling(x, scale, width) @ rows.reshape(CANVAS, width, 3)
        canvases.append(canvas.ravel())
    return Laid((x, y), area, np.stack(canvases))


def _template(thing: Thing, background: str) -> np.ndarray:
    """A thing on the canvas."""
    side = LAYOUT_SIZE * OVERSAMPLING
    picture = Image.new("RGB", (side, side), BACKGROUNDS[background])
    paint(picture, thing, (side / 2, side / 2, side / 2))
    pixels = np.asarray(picture.reduce(OVERSAMPLING), dtype=np.float32)
    return _lay_out(*_stand_out(pixels, np.array(BACKGROUNDS[background])), (1.0,)).canvases[0]


@functools.cache
def _templates(background: str, extra: tuple[str, ...]) -> tuple[list[Thing], np.ndarray]:
    """All that may be found on a background, and the templates."""
    things = THINGS + [Thing(noun) for noun in extra]
    return things, np.stack([_template(thing, background) for thing in things])


def _compare(canvases: np.ndarray, templates: np.ndarray) -> np.ndarray:
    """Distance of each template to the canvas that is nearest to it, in lengths of the template."""
    length = np.square(templates).sum(axis=1)
    squares = np.square(canvases).sum(axis=1)[:, None] + length - 2 * canvases @ templates.T
    return np.sqrt(squares.min(axis=0).clip(0) / length)


# --- things ----------------------------------------------------------------------------------


def _describe(
    box: Box,
    pixels: np.ndarray,
    relief: np.ndarray,
    counts: np.ndarray,
    known: tuple[list[Thing], np.ndarray],
) -> Found:
    """Say what one part is. One that is no thing may still have the colour of a shape."""
    things, templates = known
    (x, y), area, canvases = _lay_out(relief, counts, SCALES)
    centre = box.left + x, box.top + y
    distances = _compare(canvases, templates)
    best, second = distances.argsort()[:2]
    distance = float(distances[best])
    if distance <= FARTHEST and distance <= MARGIN * distances[second]:
        return Found(things[best].noun, things[best].colour, centre, area, distance, box)
    colour, away = _nearest(np.median(pixels[counts > 0.5], axis=0), COLOURS)
    return Found(UNKNOWN, colour if away <= COLOUR_DISTANCE else None, centre, area, distance, box)


def find(image: Image.Image, extra: Collection[str] = ()) -> tuple[list[Found], str]:
    """Find the things of a picture, also the objects that `extra` names, and its background."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    background, colour = _find_background(pixels)
    relief, counts = _stand_out(pixels, colour)
    known = _templates(background, tuple(extra))
    found = []
    for part in _parts(counts):
        box = part.wider(BLOCK)
        inside = slice(box.top, box.bottom), slice(box.left, box.right)
        if counts[inside].sum() >= MINIMUM_AREA * counts.size:
            found.append(_describe(box, pixels[inside], relief[inside], counts[inside], known))
    return found, background


def relation_between(first: Found, second: Found) -> str:
    """Name where the first thing lies from the second, along the axis that parts them most."""
    right = first.centre[0] - second.centre[0]
    down = first.centre[1] - second.centre[1]
    if abs(down) > abs(right):
        return "below" if down > 0 else "above"
    return "right of" if right > 0 else "left of"


def _fit(found: tuple[Found, ...], scene: Scene) -> tuple[bool, bool, bool]:
    """Whether nouns, colours and relations fit when the things are the scene's in this order."""
    pairs = list(zip(found, scene.things, strict=True))
    relations = [relation_between(found[0], other) for other in found[1:]]
    return (
        all(seen.noun == thing.noun for seen, thing in pairs),
        all(seen.colour == thing.colour for seen, thing in pairs if thing.colour),
        relations == [relation for relation, _ in scene.others],
    )


def judge(image: Image.Image, scene: Scene) -> Verdict:
    """Judge a picture; with a wrong count of things, nothing but the background can be right.

    Things are matched with the scene's by noun first, then by colour, then by relation. A single
    thing has no relation to be wrong, and objects have no colour to be wrong. An object that
    training does not show is looked for where the scene has it.
    """
    unseen = [thing.noun for thing in scene.things if thing.noun not in NOUNS]
    found, background = find(image, unseen)
    on_background = background == scene.background
    if len(found) != len(scene.things):
        return Verdict(False, False, False, False, on_background)
    best = max(_fit(order, scene) for order in itertools.permutations(found))
    return Verdict(True, *best, on_background)

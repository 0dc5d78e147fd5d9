"""Scenes of one or two coloured shapes, drawn at run time and described exactly by a caption.

Some colour-shape pairs and some arrangements of shapes are held out of training; they are listed
in ``held_out.json``, which ``python -m sd3min.training.scenes`` writes.
"""

import functools
import json
import math
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

RGB = tuple[int, int, int]
Point = tuple[float, float]
Box = tuple[float, float, float]

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
COLOURS: dict[str, RGB] = {
    "red": (220, 25, 30),
    "green": (20, 160, 40),
    "blue": (20, 60, 230),
    "yellow": (255, 225, 30),
    "orange": (255, 140, 10),
    "purple": (150, 20, 180),
    "cyan": (30, 210, 230),
    "pink": (255, 125, 195),
}
BACKGROUNDS: dict[str, RGB] = {
    "white": (255, 255, 255),
    "gray": (128, 128, 128),
    "black": (0, 0, 0),
}
MIRRORED = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
RELATIONS = tuple(MIRRORED)
TWO_THINGS = 0.75
HELD_OUT_FILE = Path(__file__).with_name("held_out.json")

# All lengths are in pixels of a picture LAYOUT_SIZE across; other sizes scale them.
LAYOUT_SIZE = 64
MARGIN = 2
OVERSAMPLING = 4

_CAPTION = re.compile(
    r"an? (?P<colour>\w+) (?P<shape>\w+)"
    rf"(?: (?P<relation>{'|'.join(RELATIONS)}) an? (?P<colour2>\w+) (?P<shape2>\w+))?"
    r" on (?P<background>\w+)"
)


@dataclass(frozen=True)
class Thing:
    """One coloured shape."""

    colour: str
    shape: str

    def __post_init__(self) -> None:
        """Refuse an unknown colour or shape."""
        if self.colour not in COLOURS:
            raise ValueError(f"{self.colour!r} is not one of the colours {', '.join(COLOURS)}")
        if self.shape not in SHAPES:
            raise ValueError(f"{self.shape!r} is not one of the shapes {', '.join(SHAPES)}")

    def __str__(self) -> str:
        """Name the thing as held_out.json does: "red circle"."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One thing, or two things of different colours in a relation, on a plain background."""

    first: Thing
    relation: str | None
    second: Thing | None
    background: str

    def __post_init__(self) -> None:
        """Refuse an unknown relation or background, and two things of one colour."""
        if self.background not in BACKGROUNDS:
            names = ", ".join(BACKGROUNDS)
            raise ValueError(f"{self.background!r} is not one of the backgrounds {names}")
        if (self.relation is None) != (self.second is None):
            raise ValueError("a relation and a second thing go together")
        if self.relation is not None and self.relation not in RELATIONS:
            names = ", ".join(RELATIONS)
            raise ValueError(f"{self.relation!r} is not one of the relations {names}")
        if self.second is not None and self.first.colour == self.second.colour:
            raise ValueError(f"both things are {self.first.colour}, but they must differ in colour")

    @property
    def things(self) -> tuple[Thing, ...]:
        """The one or two things of the scene."""
        return (self.first,) if self.second is None else (self.first, self.second)

    @property
    def triple(self) -> str | None:
        """The relation between the shapes, "circle above square"; None for a single thing."""
        if self.second is None:
            return None
        return f"{self.first.shape} {self.relation} {self.second.shape}"

    @property
    def caption(self) -> str:
        """The scene in words: "a red circle above a blue square on gray"."""
        words = f" {self.relation} ".join(_with_article(thing) for thing in self.things)
        return f"{words} on {self.background}"


def _with_article(thing: Thing) -> str:
    article = "an" if thing.colour == "orange" else "a"
    return f"{article} {thing}"


def parse(caption: str) -> Scene:
    """Read the scene back from its caption; ValueError says what is wrong with the caption."""
    match = _CAPTION.fullmatch(caption)
    if match is None:
        raise ValueError(
            f"{caption!r} does not read like 'a red circle above a blue square on gray' "
            "or 'a red circle on gray'"
        )
    second = Thing(match["colour2"], match["shape2"]) if match["relation"] else None
    scene = Scene(
        Thing(match["colour"], match["shape"]), match["relation"], second, match["background"]
    )
    if scene.caption != caption:
        raise ValueError(f"{caption!r} should be written {scene.caption!r}")
    return scene


# --- drawing ---------------------------------------------------------------------------------


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


def paint(pen: ImageDraw.ImageDraw, shape: str, box: Box, fill: RGB | int) -> None:
    """Fill a shape whose box is given by its centre x, centre y and width."""
    x, y, across = box
    half = across / 2
    pen.polygon([(x + half * px, y + half * py) for px, py in OUTLINES[shape]], fill=fill)


def _near_centre(rng: random.Random, jitter: float) -> float:
    return LAYOUT_SIZE / 2 + rng.uniform(-jitter, jitter)


def _place_one(rng: random.Random) -> list[Box]:
    return [(_near_centre(rng, 4), _near_centre(rng, 4), rng.uniform(28, 34))]


def _place_two(relation: str, rng: random.Random) -> list[Box]:
    """Boxes of the first and the second thing, apart along the axis of their relation."""
    sizes = [rng.uniform(21, 25), rng.uniform(21, 25)]
    middle, half = _near_centre(rng, 1.5), rng.uniform(14, 15)
    along = [middle - half, middle + half]
    if relation in ("below", "right of"):
        along.reverse()
    aside = [_near_centre(rng, 3), _near_centre(rng, 3)]
    if relation in ("above", "below"):
        return list(zip(aside, along, sizes, strict=True))
    return list(zip(along, aside, sizes, strict=True))


def draw(scene: Scene, rng: random.Random, size: int = LAYOUT_SIZE) -> Image.Image:
    """Draw the scene as an RGB picture; rng settles where the things lie and how large they are."""
    boxes = _place_one(rng) if scene.relation is None else _place_two(scene.relation, rng)
    large = size * OVERSAMPLING
    picture = Image.new("RGB", (large, large), BACKGROUNDS[scene.background])
    pen = ImageDraw.Draw(picture)
    for thing, box in zip(scene.things, boxes, strict=True):
        x, y, across = (length * large / LAYOUT_SIZE for length in box)
        paint(pen, thing.shape, (x, y, across), COLOURS[thing.colour])
    return picture.reduce(OVERSAMPLING)


# --- the split -------------------------------------------------------------------------------


def choose_held_out() -> dict[str, list[str]]:
    """Choose what training never shows: 6 colour-shape pairs and 9 arrangements of two shapes.

    An arrangement is a triple and its mirror ("circle above square", "square below circle"), so
    there are 18 triples. Every shape lies in one pair and fills three places in arrangements.
    """
    rng = random.Random(2)
    colours = rng.sample(list(COLOURS), len(SHAPES))
    pairs = [str(Thing(*pair)) for pair in zip(colours, SHAPES, strict=True)]
    triples: set[str] = set()
    while len(triples) < 18:
        places = rng.sample(SHAPES * 3, 18)
        triples = set()
        for index in range(9):
            first, second = places[2 * index : 2 * index + 2]
            relation = "above" if index % 2 == 0 else "left of"
            triples |= {f"{first} {relation} {second}", f"{second} {MIRRORED[relation]} {first}"}
    return {"pairs": sorted(pairs), "triples": sorted(triples)}


@functools.cache
def held_out() -> dict[str, list[str]]:
    """Read the held-out pairs and triples from held_out.json."""
    return json.loads(HELD_OUT_FILE.read_text())


def count_held_out_pairs(scene: Scene) -> int:
    """How many of the scene's things have a held-out pair of colour and shape."""
    return sum(str(thing) in held_out()["pairs"] for thing in scene.things)


def has_held_out_triple(scene: Scene) -> bool:
    """Whether the scene's shapes stand in a held-out relation."""
    return scene.triple in held_out()["triples"]


def is_held_out(scene: Scene) -> bool:
    """Whether training must never show the scene."""
    return count_held_out_pairs(scene) > 0 or has_held_out_triple(scene)


# --- samplers --------------------------------------------------------------------------------


def _scene_that(fits: Callable[[Scene], bool], rng: random.Random, two: bool) -> Scene:
    """Draw scenes of one or two things until one fits."""
    while True:
        background = rng.choice(list(BACKGROUNDS))
        colours = rng.sample(list(COLOURS), 2)
        first, second = (Thing(colour, rng.choice(SHAPES)) for colour in colours)
        if two:
            scene = Scene(first, rng.choice(RELATIONS), second, background)
        else:
            scene = Scene(first, None, None, background)
        if fits(scene):
            return scene


def random_scene(rng: random.Random, two: float = TWO_THINGS) -> Scene:
    """Draw a scene for training, with two things at the given probability."""
    return _scene_that(KINDS["seen"], rng, rng.random() < two)


KINDS: dict[str, Callable[[Scene], bool]] = {
    "seen": lambda scene: not is_held_out(scene),
    "pairs": lambda scene: count_held_out_pairs(scene) == 1 and not has_held_out_triple(scene),
    "triples": lambda scene: count_held_out_pairs(scene) == 0 and has_held_out_triple(scene),
}
MOST_PROMPTS = 1000


def prompts(kind: str, count: int) -> list[Scene]:
    """List distinct scenes for evaluation, the same at every call.

    Kind "seen" has what training shows, "pairs" one held-out pair of colour and shape in each
    scene, and "triples" a held-out relation between two shapes; all else in them is seen.
    """
    if count > MOST_PROMPTS:
        raise ValueError(f"there are at most {MOST_PROMPTS} prompts of a kind, not {count}")
    rng = random.Random(f"prompts of kind {kind}")
    chosen: dict[Scene, None] = {}
    while len(chosen) < count:
        two = kind == "triples" or rng.random() < TWO_THINGS
        chosen[_scene_that(KINDS[kind], rng, two)] = None
    return list(chosen)


def training_caption(scene: Scene, rng: random.Random) -> str:
    """Caption the scene, one time in ten without the background and one without articles."""
    choice = rng.random()
    if choice < 0.1:
        return scene.caption.removesuffix(f" on {scene.background}")
    if choice < 0.2:
        words = f" {scene.relation} ".join(str(thing) for thing in scene.things)
        return f"{words} on {scene.background}"
    return scene.caption


if __name__ == "__main__":
    HELD_OUT_FILE.write_text(json.dumps(choose_held_out(), indent=2) + "\n")

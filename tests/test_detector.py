"""The detector accepts pictures that show their scene, and only those."""

import io
import itertools
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from sd3min.training import captions, detector, scenes
from sd3min.training.detector import UNKNOWN, Verdict, judge
from sd3min.training.scenes import (
    BACKGROUNDS,
    COLOURS,
    MIRRORED,
    OBJECTS,
    RELATIONS,
    SHAPES,
    UNSEEN_OBJECTS,
    VERTICAL,
    Scene,
    Thing,
)

SIDE = scenes.LAYOUT_SIZE
GOOD = Verdict(True, True, True, True, True)


def clean(picture: Image.Image) -> Image.Image:
    return picture


def soft(picture: Image.Image, radius: float = 1.0) -> Image.Image:
    """Blurred, as JPEG keeps it, and with noise of a few levels: as generated pictures are."""
    file = io.BytesIO()
    picture.filter(ImageFilter.GaussianBlur(radius)).save(file, "JPEG", quality=75)
    rng = np.random.default_rng(len(file.getvalue()))
    pixels = np.array(Image.open(file), dtype=float)
    pixels += rng.normal(0, 4, pixels.shape)
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def softer(picture: Image.Image) -> Image.Image:
    return soft(picture, 1.5)


def with_thing(scene: Scene, index: int, thing: Thing) -> Scene:
    """The scene with another thing in one place."""
    if index == 0:
        return replace(scene, first=thing)
    others = list(scene.others)
    others[index - 1] = (others[index - 1][0], thing)
    return replace(scene, others=tuple(others))


def with_relations(scene: Scene, change: Callable[[int, str], str]) -> Scene:
    others = [(change(i, relation), thing) for i, (relation, thing) in enumerate(scene.others)]
    return replace(scene, others=tuple(others))


def is_free(scene: Scene, thing: Thing) -> bool:
    """Whether no thing of the scene has the thing's colour or noun."""
    return (thing.colour or thing.noun) not in [t.colour or t.noun for t in scene.things]


def wrong_colour(scene: Scene, rng: random.Random) -> Image.Image | None:
    places = [i for i, thing in enumerate(scene.things) if thing.colour]
    if not places:
        return None
    index = rng.choice(places)
    noun = scene.things[index].noun
    free = [t for t in scenes.THINGS if t.noun == noun and is_free(scene, t)]
    return scenes.draw(with_thing(scene, index, rng.choice(free)), rng)


def wrong_shape(scene: Scene, rng: random.Random) -> Image.Image | None:
    places = [i for i, thing in enumerate(scene.things) if thing.colour]
    if not places:
        return None
    index = rng.choice(places)
    thing = scene.things[index]
    shape = rng.choice([shape for shape in SHAPES if shape != thing.noun])
    return scenes.draw(with_thing(scene, index, Thing(shape, thing.colour)), rng)


def another_object(scene: Scene, rng: random.Random) -> Image.Image | None:
    places = [i for i, thing in enumerate(scene.things) if not thing.colour]
    if not places:
        return None
    free = [Thing(noun) for noun in OBJECTS if is_free(scene, Thing(noun))]
    return scenes.draw(with_thing(scene, rng.choice(places), rng.choice(free)), rng)


def swapped_things(scene: Scene, rng: random.Random) -> Image.Image | None:
    """The first thing in another's place, and that one in its."""
    if not scene.others:
        return None
    index = rng.randrange(len(scene.others))
    others = list(scene.others)
    relation, first = others[index]
    others[index] = (relation, scene.first)
    return scenes.draw(replace(scene, first=first, others=tuple(others)), rng)


def wrong_relation(scene: Scene, rng: random.Random) -> Image.Image | None:
    """One thing on the other side of the first."""
    if not scene.others:
        return None
    turned = rng.randrange(len(scene.others))
    wrong = with_relations(scene, lambda i, r: MIRRORED[r] if i == turned else r)
    return scenes.draw(wrong, rng)


def mirrored(scene: Scene, rng: random.Random) -> Image.Image | None:
    """Every thing on the other side of the first."""
    if not scene.others:
        return None
    return scenes.draw(with_relations(scene, lambda _, r: MIRRORED[r]), rng)


def other_axis(scene: Scene, rng: random.Random) -> Image.Image | None:
    if not scene.others:
        return None
    turn = {"above": "left of", "left of": "above", "below": "right of", "right of": "below"}
    return scenes.draw(with_relations(scene, lambda _, r: turn[r]), rng)


def missing_thing(scene: Scene, rng: random.Random) -> Image.Image | None:
    if not scene.others:
        return None
    return scenes.draw(replace(scene, others=scene.others[:-1]), rng)


def one_too_many(scene: Scene, rng: random.Random) -> Image.Image | None:
    """The scene with one more thing where there is room."""
    if len(scene.things) == 3:
        return None
    if not scene.others:
        picture = scenes.draw(scene, rng)
        scenes.paint(picture, rng.choice(scenes.THINGS), (18, 18, 24))
        return picture
    free = [thing for thing in scenes.THINGS if is_free(scene, thing)]
    vertical = scene.others[0][0] in VERTICAL
    other = (rng.choice(scenes.AXES[int(vertical)]), rng.choice(free))
    return scenes.draw(replace(scene, others=(*scene.others, other)), rng)


def blank(scene: Scene, _: random.Random) -> Image.Image:
    return Image.new("RGB", (SIDE, SIDE), BACKGROUNDS[scene.background])


def noise(_: Scene, rng: random.Random) -> Image.Image:
    return Image.frombytes("RGB", (SIDE, SIDE), rng.randbytes(SIDE * SIDE * 3))


def blend(scene: Scene, rng: random.Random) -> Image.Image:
    """Half of a thing and half of another in its place."""
    index = rng.randrange(len(scene.things))
    free = [thing for thing in scenes.THINGS if is_free(scene, thing)]
    other, seed = with_thing(scene, index, rng.choice(free)), rng.random()
    pictures = [scenes.draw(s, random.Random(seed)) for s in (scene, other)]
    return Image.blend(*pictures, 0.5)


def faded(scene: Scene, rng: random.Random) -> Image.Image:
    return Image.blend(scenes.draw(scene, rng), blank(scene, rng), 0.5)


def half_drawn(scene: Scene, rng: random.Random) -> Image.Image:
    """One thing without its upper half."""
    seed, ground = rng.random(), blank(scene, rng)
    picture = scenes.draw(scene, random.Random(seed))
    things = zip(scene.things, scenes.place(scene, random.Random(seed)), strict=True)
    alone = ground.copy()
    scenes.paint(alone, *rng.choice(list(things)))
    left, top, right, bottom = ImageChops.difference(alone, ground).getbbox()
    picture.paste(ground.getpixel((0, 0)), (left - 1, top - 1, right + 1, (top + bottom) // 2))
    return picture


WRONG = (
    wrong_colour,
    wrong_shape,
    another_object,
    swapped_things,
    wrong_relation,
    mirrored,
    other_axis,
    missing_thing,
    one_too_many,
    blank,
    noise,
    blend,
    faded,
    half_drawn,
)


@pytest.fixture(scope="module")
def drawn() -> list[tuple[Scene, Image.Image]]:
    """Five hundred scenes of all kinds and their pictures."""
    rng = random.Random(0)
    counts = {"seen": 300, "pairs": 100, "triples": 100}
    chosen = [scene for kind, count in counts.items() for scene in scenes.prompts(kind, count)]
    return [(scene, scenes.draw(scene, rng)) for scene in chosen]


@pytest.mark.parametrize(("finish", "count"), [(clean, 500), (soft, 500), (softer, 100)])
def test_pictures_of_a_scene_are_right(drawn, finish, count):
    wrong = [scene for scene, picture in drawn[-count:] if judge(finish(picture), scene) != GOOD]
    assert len(wrong) <= 0.01 * count, [captions.caption(scene) for scene in wrong]


@pytest.mark.parametrize("spoil", WRONG)
@pytest.mark.parametrize("count", [50, pytest.param(500, marks=pytest.mark.slow)])
def test_pictures_of_something_else_are_wrong(spoil, count):
    """Every other one is soft."""
    rng, finishes = random.Random(1), itertools.cycle([clean, soft])
    candidates = scenes.prompts("seen", 3 * count)
    spoilt = ((scene, spoil(scene, rng)) for scene in candidates)
    some = list(itertools.islice(((s, p) for s, p in spoilt if p), count))
    assert len(some) == count
    passed = [scene for scene, picture in some if judge(next(finishes)(picture), scene).right]
    assert len(passed) <= 0.01 * count, [captions.caption(scene) for scene in passed]


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_every_thing_is_found_on_every_background(background):
    rng = random.Random(2)
    for one, two in zip(scenes.THINGS[::2], scenes.THINGS[1::2], strict=True):
        scene = Scene(one, (("above", two),), background)
        assert judge(soft(scenes.draw(scene, rng)), scene) == GOOD, scene
        single = Scene(rng.choice([one, two]), (), background)
        assert judge(scenes.draw(single, rng), single) == GOOD, single


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_templates_are_well_apart(background):
    """None is nearer to another than twice what is let pass as equal."""
    things, templates = detector._templates(background, tuple(UNSEEN_OBJECTS))
    apart = np.stack([detector._compare(one[None], templates) for one in templates])
    np.fill_diagonal(apart, 1)
    assert len(things) == 48 + 24 + 3
    one, two = np.unravel_index(apart.argmin(), apart.shape)
    assert apart.min() > 0.15, (things[one], things[two])


@pytest.mark.parametrize("noun", UNSEEN_OBJECTS)
def test_an_object_for_fine_tuning_is_found_when_it_is_asked_for(noun):
    rng = random.Random(3)
    for background in BACKGROUNDS:
        scene = Scene(Thing(noun), (("above", Thing("cat")),), background)
        picture = soft(scenes.draw(scene, rng))
        assert judge(picture, scene) == GOOD
        (found, cat), _ = detector.find(picture)
        assert (found.noun, cat.noun) == (UNKNOWN, "cat")
        (found, cat), _ = detector.find(picture, [noun])
        assert (found.noun, cat.noun) == (noun, "cat")


def test_each_fault_is_reported_by_its_name():
    rng = random.Random(4)
    scene = captions.parse("a red star above a blue square and left of a cat on gray")

    def verdict(caption: str) -> Verdict:
        return judge(scenes.draw(captions.parse(caption), rng), scene)

    one, two, three = "a red star", "a blue square", "a cat"
    assert verdict(f"{one} above {two} and left of {three} on gray") == GOOD
    assert verdict(f"{one} left of {three} and above {two} on gray") == GOOD
    colour = verdict(f"{one} above a green square and left of {three} on gray")
    assert colour == replace(GOOD, colour=False)
    noun = verdict(f"{one} above a blue heart and left of {three} on gray")
    assert noun == replace(GOOD, noun=False)
    assert verdict(f"{one} above {two} and left of a dog on gray") == replace(GOOD, noun=False)
    relation = replace(GOOD, relation=False)
    assert verdict(f"{one} below {two} and left of {three} on gray") == relation
    assert verdict(f"{one} left of {two} and above {three} on gray") == relation
    assert not verdict(f"{one} above {two} on gray").count
    elsewhere = verdict(f"{one} above {two} and left of {three} on black")
    assert elsewhere == replace(GOOD, background=False)
    assert elsewhere.right


def test_relations_follow_the_axis_that_parts_the_centres_most():
    def found(x: float, y: float) -> detector.Found:
        return detector.Found("cat", None, (x, y), 100.0, 0.0, detector.Box(0, 10, 0, 10))

    middle = found(50, 50)
    for relation, (x, y) in zip(RELATIONS, [(60, 20), (40, 90), (10, 80), (85, 20)], strict=True):
        assert detector.relation_between(found(x, y), middle) == relation
        assert detector.relation_between(middle, found(x, y)) == MIRRORED[relation]


def test_found_things_are_where_they_were_painted():
    picture = Image.new("RGB", (SIDE, SIDE), BACKGROUNDS["white"])
    scenes.paint(picture, Thing("square", "green"), (40, 80, 40))
    (found,), background = detector.find(picture)
    assert (found.colour, found.noun, background) == ("green", "square", "white")
    assert found.box == pytest.approx((60, 100, 20, 60), abs=4)
    assert found.centre == pytest.approx((40, 80), abs=1)
    assert found.area == pytest.approx(1600, rel=0.08)
    assert found.distance < 0.1


@pytest.mark.parametrize("size", [64, 97, 128, 200])
def test_pictures_of_other_sizes_are_judged_too(size):
    rng = random.Random(5)
    chosen = scenes.prompts("seen", 30)
    right = [judge(scenes.draw(s, rng, 2 * size).resize((size, size)), s).right for s in chosen]
    assert all(right)


def test_specks_are_no_things_and_odd_blobs_are_nothing_known():
    picture = Image.new("RGB", (SIDE, SIDE), BACKGROUNDS["white"])
    pen = ImageDraw.Draw(picture)
    pen.rectangle((10, 10, 15, 15), COLOURS["red"])
    pen.rectangle((20, 60, 100, 72), COLOURS["blue"])
    (found,), _ = detector.find(picture)
    assert (found.colour, found.noun) == ("blue", UNKNOWN)


def test_a_colour_outside_the_palette_is_none():
    picture = Image.new("RGB", (SIDE, SIDE), BACKGROUNDS["white"])
    scenes.paint_shape(picture, "circle", (34, 64, 44), (110, 120, 30))
    scenes.paint_shape(picture, "circle", (94, 64, 44), BACKGROUNDS["black"])
    assert [(f.noun, f.colour) for f in detector.find(picture)[0]] == [(UNKNOWN, None)] * 2


def test_boxes_that_touch_are_one_part_and_a_row_between_makes_two():
    counts = np.zeros((40, 40))
    counts[4:10, 4:30] = counts[12:20, 20:30] = 1  # two pixels, one block, between them
    counts[26:30, 4:8] = 1
    boxes = detector._parts(counts)
    assert sorted(boxes) == [(4, 10, 4, 30), (12, 20, 20, 30), (26, 30, 4, 8)]
    counts[10:14, 4:8] = 1  # now the first reaches past the second's upper edge
    assert sorted(detector._parts(counts)) == [(4, 20, 4, 30), (26, 30, 4, 8)]

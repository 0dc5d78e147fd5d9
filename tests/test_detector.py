"""The detector accepts pictures that show their scene, and only those."""

import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from sd3min.training import detector, scenes
from sd3min.training.scenes import BACKGROUNDS, COLOURS, MIRRORED, SHAPES, Scene, Thing


def clean(picture: Image.Image, _: np.random.Generator) -> Image.Image:
    return picture


def blurred_and_noisy(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    pixels = np.array(picture.filter(ImageFilter.GaussianBlur(0.7)), dtype=float)
    pixels += rng.normal(0, 6, pixels.shape)
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def wrong_colour(scene: Scene, rng: random.Random) -> Image.Image:
    used = [thing.colour for thing in scene.things]
    colour = rng.choice([colour for colour in COLOURS if colour not in used])
    return scenes.draw(replace(scene, first=Thing(colour, scene.first.shape)), rng)


def wrong_shape(scene: Scene, rng: random.Random) -> Image.Image:
    shape = rng.choice([shape for shape in SHAPES if shape != scene.second.shape])
    return scenes.draw(replace(scene, second=Thing(scene.second.colour, shape)), rng)


def swapped_colours(scene: Scene, rng: random.Random) -> Image.Image:
    first = Thing(scene.second.colour, scene.first.shape)
    second = Thing(scene.first.colour, scene.second.shape)
    return scenes.draw(replace(scene, first=first, second=second), rng)


def swapped_relation(scene: Scene, rng: random.Random) -> Image.Image:
    return scenes.draw(replace(scene, relation=MIRRORED[scene.relation]), rng)


def other_axis(scene: Scene, rng: random.Random) -> Image.Image:
    vertical = scene.relation in ("above", "below")
    return scenes.draw(replace(scene, relation="left of" if vertical else "above"), rng)


def missing_object(scene: Scene, rng: random.Random) -> Image.Image:
    return scenes.draw(Scene(scene.first, None, None, scene.background), rng)


def extra_object(scene: Scene, rng: random.Random) -> Image.Image:
    """Add a small third thing in an empty corner."""
    picture = scenes.draw(scene, rng)
    corners = [(0, 0), (50, 0), (0, 50), (50, 50)]
    x, y = next(
        (x, y)
        for x, y in rng.sample(corners, 4)
        if len(picture.crop((x, y, x + 14, y + 14)).getcolors()) == 1
    )
    box = (x + 7, y + 7, rng.uniform(8, 11))
    scenes.paint(ImageDraw.Draw(picture), scene.first.shape, box, COLOURS[scene.first.colour])
    return picture


def blank(scene: Scene, _: random.Random) -> Image.Image:
    return Image.new("RGB", (64, 64), BACKGROUNDS[scene.background])


def noise(_: Scene, rng: random.Random) -> Image.Image:
    return Image.frombytes("RGB", (64, 64), rng.randbytes(64 * 64 * 3))


@pytest.mark.parametrize("finish", [clean, blurred_and_noisy])
@pytest.mark.parametrize(("kind", "count"), [("seen", 300), ("pairs", 100), ("triples", 100)])
def test_pictures_of_a_scene_are_right(kind, count, finish):
    rng, noise_rng = random.Random(0), np.random.default_rng(0)
    verdicts = [
        detector.judge(finish(scenes.draw(scene, rng), noise_rng), scene)
        for scene in scenes.prompts(kind, count)
    ]
    assert np.mean([verdict.right and verdict.background for verdict in verdicts]) >= 0.99


@pytest.mark.parametrize(
    "spoil",
    [
        wrong_colour,
        wrong_shape,
        swapped_relation,
        other_axis,
        missing_object,
        extra_object,
        blank,
        noise,
    ],
)
def test_pictures_of_something_else_are_wrong(spoil):
    rng = random.Random(1)
    pairs = [scene for scene in scenes.prompts("seen", 200) if scene.second][:100]
    assert len(pairs) == 100
    wrong = [not detector.judge(spoil(scene, rng), scene).right for scene in pairs]
    assert np.mean(wrong) >= 0.99


def test_colours_on_the_wrong_shapes_are_wrong():
    rng = random.Random(2)
    chosen = [
        scene
        for scene in scenes.prompts("seen", 100)
        if scene.second and scene.first.shape != scene.second.shape
    ]
    assert not any(
        detector.judge(swapped_colours(scene, rng), scene).right for scene in chosen[:50]
    )


def test_a_second_thing_makes_a_picture_of_one_thing_wrong():
    rng = random.Random(3)
    for scene in scenes.prompts("triples", 50):
        single = Scene(scene.first, None, None, scene.background)
        assert not detector.judge(scenes.draw(scene, rng), single).count


def test_each_fault_is_reported_by_its_name():
    rng = random.Random(4)
    scene = scenes.parse("a red star above a blue square on gray")

    def verdict(caption: str) -> detector.Verdict:
        return detector.judge(scenes.draw(scenes.parse(caption), rng), scene)

    good = detector.Verdict(True, True, True, True, True)
    assert verdict("a red star above a blue square on gray") == good
    assert verdict("a blue square below a red star on gray") == good
    assert verdict("a red star above a green square on gray") == replace(good, colour=False)
    assert verdict("a red star above a blue heart on gray") == replace(good, shape=False)
    assert verdict("a red star below a blue square on gray") == replace(good, relation=False)
    elsewhere = verdict("a red star above a blue square on black")
    assert elsewhere == replace(good, background=False)
    assert elsewhere.right


def test_found_objects_are_where_they_were_painted():
    picture = Image.new("RGB", (64, 64), BACKGROUNDS["white"])
    scenes.paint(ImageDraw.Draw(picture), "square", (20, 40, 20), COLOURS["green"])
    (found,), background = detector.find(picture)
    assert (found.colour, found.shape, background) == ("green", "square", "white")
    assert found.centre == pytest.approx((20, 40), abs=1)
    assert found.area == pytest.approx(400, rel=0.12)
    assert found.overlap > 0.95


def test_specks_are_no_objects_and_odd_blobs_are_no_shapes():
    picture = Image.new("RGB", (64, 64), BACKGROUNDS["white"])
    pen = ImageDraw.Draw(picture)
    pen.rectangle((3, 3, 5, 5), COLOURS["red"])
    pen.rectangle((10, 30, 50, 36), COLOURS["blue"])
    (found,), _ = detector.find(picture)
    assert (found.colour, found.shape) == ("blue", detector.UNKNOWN)


def test_a_colour_outside_the_palette_is_unknown_and_a_hole_has_no_object_colour():
    picture = Image.new("RGB", (64, 64), BACKGROUNDS["white"])
    pen = ImageDraw.Draw(picture)
    scenes.paint(pen, "circle", (18, 32, 22), (110, 120, 30))
    scenes.paint(pen, "circle", (46, 32, 22), BACKGROUNDS["black"])
    colours = {found.colour for found in detector.find(picture)[0]}
    assert colours == {detector.UNKNOWN, "black"}


def test_components_are_the_parts_that_touch_by_an_edge():
    mask = np.array([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 1, 1]], dtype=bool)
    parts = detector.components(mask)
    assert sorted(int(part.sum()) for part in parts) == [3, 3]
    assert np.array_equal(np.logical_or.reduce(parts), mask)
    assert detector.components(np.zeros((3, 3), dtype=bool)) == []

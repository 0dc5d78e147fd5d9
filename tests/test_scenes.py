"""The scenes, their captions, their pictures and the split between seen and held-out ones."""

import itertools
import json
import random

import numpy as np
import pytest

from sd3min.training import scenes
from sd3min.training.scenes import BACKGROUNDS, COLOURS, MIRRORED, RELATIONS, SHAPES, Scene, Thing

CIRCLE = Thing("red", "circle")
SQUARE = Thing("blue", "square")


def every_pair() -> list[Thing]:
    return [Thing(*pair) for pair in itertools.product(COLOURS, SHAPES)]


def shapes_only(first: str, relation: str, second: str) -> Scene:
    return Scene(Thing("red", first), relation, Thing("blue", second), "white")


def test_captions_read_as_english():
    assert Scene(CIRCLE, "above", SQUARE, "gray").caption == (
        "a red circle above a blue square on gray"
    )
    assert Scene(Thing("orange", "star"), None, None, "black").caption == "an orange star on black"


def test_parse_is_the_inverse_of_caption():
    for kind in scenes.KINDS:
        for scene in scenes.prompts(kind, 200):
            assert scenes.parse(scene.caption) == scene


@pytest.mark.parametrize(
    ("caption", "complaint"),
    [
        ("a photo of a cat", "does not read like"),
        ("a red circle", "does not read like"),
        ("a red circle near a blue square on gray", "does not read like"),
        ("a brown circle on gray", "'brown' is not one of the colours"),
        ("a red hexagon on gray", "'hexagon' is not one of the shapes"),
        ("a red circle on green", "'green' is not one of the backgrounds"),
        ("a red circle above a red square on gray", "must differ in colour"),
        ("an red circle on gray", "should be written 'a red circle on gray'"),
    ],
)
def test_parse_says_what_is_wrong_with_a_caption(caption, complaint):
    with pytest.raises(ValueError, match=complaint):
        scenes.parse(caption)


def test_a_scene_cannot_have_half_a_relation_or_an_unknown_one():
    with pytest.raises(ValueError, match="go together"):
        Scene(CIRCLE, "above", None, "gray")
    with pytest.raises(ValueError, match="not one of the relations"):
        Scene(CIRCLE, "near", SQUARE, "gray")


def distance(colours: tuple[scenes.RGB, scenes.RGB]) -> float:
    return float(np.linalg.norm(np.subtract(*colours)))


def test_colours_are_far_from_each_other_and_farther_from_the_backgrounds():
    assert min(map(distance, itertools.combinations(COLOURS.values(), 2))) > 85
    behind = itertools.product(COLOURS.values(), BACKGROUNDS.values())
    assert min(map(distance, behind)) > 110


@pytest.mark.parametrize("size", [32, 64, 96])
def test_pictures_keep_a_margin_and_a_plain_background(size):
    rng = random.Random(0)
    margin = size * scenes.MARGIN // scenes.LAYOUT_SIZE
    for scene in scenes.prompts("seen", 100):
        picture = scenes.draw(scene, rng, size)
        assert (picture.mode, picture.size) == ("RGB", (size, size))
        objects = np.any(np.array(picture) != BACKGROUNDS[scene.background], axis=-1)
        objects[margin:-margin, margin:-margin] = False
        assert not objects.any()


def test_two_things_have_two_rows_of_background_between_them_and_line_up():
    rng = random.Random(1)
    for scene in scenes.prompts("triples", 200):
        pixels = np.array(scenes.draw(scene, rng)).astype(int)
        masks = [
            np.linalg.norm(pixels - COLOURS[thing.colour], axis=-1) < 20 for thing in scene.things
        ]
        empty = (pixels == BACKGROUNDS[scene.background]).all(axis=-1)
        vertical = scene.relation in ("above", "below")
        first, second = (mask.any(axis=1 if vertical else 0).nonzero()[0] for mask in masks)
        if scene.relation in ("below", "right of"):
            first, second = second, first
        between = empty.all(axis=1 if vertical else 0)[first.max() : second.min()]
        assert between.sum() >= 2
        centres = [np.ptp(mask.nonzero()[1 if vertical else 0]) / 2 for mask in masks]
        starts = [mask.nonzero()[1 if vertical else 0].min() for mask in masks]
        assert abs(centres[0] + starts[0] - centres[1] - starts[1]) <= 8


def test_the_same_seed_draws_the_same_picture():
    scene = Scene(CIRCLE, "above", SQUARE, "gray")
    first, again = (scenes.draw(scene, random.Random(3)).tobytes() for _ in range(2))
    assert first == again
    assert first != scenes.draw(scene, random.Random(4)).tobytes()


def test_the_split_file_is_what_the_generator_writes():
    assert json.loads(scenes.HELD_OUT_FILE.read_text()) == scenes.choose_held_out()


def test_one_colour_of_every_shape_is_held_out_and_no_colour_twice():
    out = [thing for thing in every_pair() if str(thing) in scenes.held_out()["pairs"]]
    assert sorted(thing.shape for thing in out) == sorted(SHAPES)
    assert len({thing.colour for thing in out}) == len(out) >= 0.1 * len(every_pair())


def test_an_eighth_of_the_triples_is_held_out_together_with_their_mirrors():
    out = [
        triple
        for triple in itertools.product(SHAPES, RELATIONS, SHAPES)
        if scenes.has_held_out_triple(shapes_only(*triple))
    ]
    assert len(out) == 18
    for first, relation, second in out:
        assert (second, MIRRORED[relation], first) in out
    places = [shape for first, _, second in out for shape in (first, second)]
    assert all(places.count(shape) == 6 for shape in SHAPES)
    assert {relation for _, relation, _ in out} == set(RELATIONS)


def test_training_scenes_hold_nothing_out_and_show_all_the_rest():
    rng = random.Random(5)
    drawn = [scenes.random_scene(rng) for _ in range(5000)]
    assert not any(scenes.is_held_out(scene) for scene in drawn)
    assert len({thing for scene in drawn for thing in scene.things}) == 48 - 6
    assert len({scene.triple for scene in drawn if scene.triple}) == 144 - 18
    assert np.mean([scene.second is not None for scene in drawn]) == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize(
    ("kind", "pairs", "triple"), [("seen", 0, False), ("pairs", 1, False), ("triples", 0, True)]
)
def test_prompts_are_distinct_fixed_and_of_their_kind(kind, pairs, triple):
    chosen = scenes.prompts(kind, 300)
    assert chosen == scenes.prompts(kind, 300)
    assert chosen[:100] == scenes.prompts(kind, 100)
    assert len(set(chosen)) == 300
    for scene in chosen:
        assert scenes.count_held_out_pairs(scene) == pairs
        assert scenes.has_held_out_triple(scene) == triple


def test_too_many_prompts_are_refused():
    with pytest.raises(ValueError, match="at most 1000"):
        scenes.prompts("seen", 1001)


def test_training_captions_drop_the_background_or_the_articles_one_time_in_ten():
    rng = random.Random(6)
    scene = Scene(CIRCLE, "above", Thing("orange", "square"), "gray")
    captions = [scenes.training_caption(scene, rng) for _ in range(2000)]
    shares = {caption: captions.count(caption) / len(captions) for caption in set(captions)}
    assert shares == {
        "a red circle above an orange square on gray": pytest.approx(0.8, abs=0.03),
        "a red circle above an orange square": pytest.approx(0.1, abs=0.03),
        "red circle above orange square on gray": pytest.approx(0.1, abs=0.03),
    }

"""The scenes, their captions, their pictures and the split between seen and held-out ones."""

import itertools
import json
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops

from sd3min.training import captions, scenes
from sd3min.training.scenes import (
    AXES,
    BACKGROUNDS,
    COLOURS,
    KINDS,
    MIRRORED,
    NOUNS,
    RELATIONS,
    SHAPES,
    THINGS,
    UNSEEN_OBJECTS,
    VERTICAL,
    Scene,
    Thing,
)

SIDE = scenes.LAYOUT_SIZE
MOST_WORDS = 22  # what the encoders have room for, besides start and end
CIRCLE, SQUARE, CAT = Thing("circle", "red"), Thing("square", "blue"), Thing("cat")


@st.composite
def any_scene(draw, most: int = 3) -> Scene:
    """Every scene that there may be, held-out ones too."""
    chosen = st.lists(
        st.sampled_from(THINGS), min_size=1, max_size=most, unique_by=lambda t: t.colour or t.noun
    )
    first, *others = draw(chosen)
    axes = draw(st.permutations(AXES))
    relations = [draw(st.sampled_from(axis)) for axis in axes[: len(others)]]
    pairs = tuple(zip(relations, others, strict=True))
    return Scene(first, pairs, draw(st.sampled_from(list(BACKGROUNDS))))


# --- words -----------------------------------------------------------------------------------


def test_captions_read_as_english():
    one = Scene(Thing("star", "orange"), (), "black")
    assert captions.caption(one) == "an orange star on black"
    three = Scene(CAT, (("above", CIRCLE), ("left of", Thing("apple"))), "gray")
    assert captions.caption(three) == "a cat above a red circle and left of an apple on gray"


@settings(deadline=None, max_examples=40)
@given(any_scene())
def test_parse_is_the_inverse_of_caption(scene):
    assert captions.parse(captions.caption(scene)) == scene


@settings(deadline=None, max_examples=40)
@given(any_scene(), st.integers(0, 1000))
def test_natural_words_mean_the_same_scene(scene, seed):
    """A background that is not mentioned is taken to be white."""
    words = captions.worded(scene, random.Random(seed))
    read = captions.parse(words)
    told = " on " in words
    assert read == (scene if told else replace(scene, background="white"))


@settings(deadline=None, max_examples=40)
@given(any_scene(), st.integers(0, 1000))
def test_words_are_few_and_all_in_the_vocabulary(scene, seed):
    for words in (captions.caption(scene), captions.worded(scene, random.Random(seed))):
        assert set(words.split()) <= set(captions.vocabulary())
        assert len(words.split()) <= MOST_WORDS


@settings(deadline=None, max_examples=40)
@given(any_scene())
def test_capitals_spaces_and_a_full_stop_do_not_matter(scene):
    assert captions.parse(f"  {captions.caption(scene).capitalize()}. ") == scene


def test_the_longest_words_fit_what_the_encoders_read():
    colour, relation, ground = "purple", "left of", "gray"
    scene = Scene(
        Thing("circle", colour),
        ((relation, Thing("square", "orange")), ("above", Thing("star", "yellow"))),
        ground,
    )
    rng = random.Random(7)
    worded = [captions.worded(scene, rng) for _ in range(300)]
    assert max(len(words.split()) for words in worded) <= MOST_WORDS


def test_the_vocabulary_has_every_word_once():
    words = captions.vocabulary()
    assert len(words) == len(set(words))
    assert all(word == word.lower() and word.isalpha() for word in words)
    said = {word for words in captions.SYNONYMS.values() for w in words for word in w.split()}
    assert said | {*COLOURS, *NOUNS, *BACKGROUNDS, captions.SPARE} <= set(words)


def test_synonyms_are_said_and_mean_one_name_each():
    every = [word for words in captions.SYNONYMS.values() for word in words]
    assert len(every) == len(set(every))
    scene = Scene(Thing("car"), (("left of", Thing("star", "purple")),), "gray")
    read = [captions.worded(scene, random.Random(seed)) for seed in range(400)]
    for word in ("automobile", "violet", "grey", "to the left of", "background", "there is"):
        assert any(word in words for words in read), word


def test_articles_openings_and_backgrounds_are_left_out_now_and_then():
    scene, rng = Scene(CIRCLE, (("above", CAT),), "black"), random.Random(8)
    read = [captions.worded(scene, rng) for _ in range(600)]
    shares = {
        "no article": np.mean([not words.startswith(("a ", "there")) for words in read]),
        "no background": np.mean([" on " not in words for words in read]),
        "background said": np.mean([words.endswith("background") for words in read]),
        "opening": np.mean([words.startswith(("a picture", "there")) for words in read]),
    }
    assert shares == {
        "no article": pytest.approx(0.1, abs=0.03),
        "no background": pytest.approx(0.1, abs=0.03),
        "background said": pytest.approx(0.3, abs=0.04),
        "opening": pytest.approx(0.9 * 0.3 * 2 / 3, abs=0.04),
    }


@pytest.mark.parametrize(
    ("caption", "complaint"),
    [
        ("", "does not read like"),
        ("on gray", "does not read like"),
        ("a photo of a cat", "does not read like"),
        ("a red circle near a blue square on gray", "does not read like"),
        ("a cat above a dog above a pig on gray", "does not read like"),
        ("a cat above a dog and a pig on gray", "does not read like"),
        ("a cat and left of a dog on gray", "'and' before its first relation"),
        ("a brown circle on gray", "a circle is red, .*, not 'brown'"),
        ("a circle on gray", "a circle is red, .*, not None"),
        ("a red hexagon on gray", "'hexagon' is not one of"),
        ("a red cat on gray", "a cat has its own colours and cannot be red"),
        ("a cat on green", "'green' is not one of the backgrounds"),
        ("a red circle above a red square on gray", "must differ in colour"),
        ("a cat above a kitten on gray", "must differ in colour or be other objects"),
        ("a cat above a dog and below a pig on gray", "one must be left or right"),
        ("a teapot of porcelain on gray", "does not read like"),
    ],
)
def test_parse_says_what_is_wrong_with_a_caption(caption, complaint):
    with pytest.raises(ValueError, match=complaint) as told:
        captions.parse(caption)
    assert "\n" not in str(told.value)


@settings(deadline=None, max_examples=40)
@given(st.text(st.sampled_from(sorted({*"ab .\n", "é"})), max_size=20))
def test_odd_letters_are_refused_in_a_sentence(words):
    with pytest.raises(ValueError, match=r"does not read like|is not one of"):
        captions.parse(words)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(captions.vocabulary()), max_size=12))
def test_any_words_in_any_order_make_a_scene_or_a_sentence(words):
    try:
        scene = captions.parse(" ".join(words))
    except ValueError as told:
        assert str(told)
    else:
        assert captions.parse(captions.caption(scene)) == scene


# --- scenes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "complaint"),
    [
        ((CIRCLE, (("near", SQUARE),), "gray"), "'near' is not one of above, below, left of"),
        ((CIRCLE, (), "green"), "'green' is not one of the backgrounds white, "),
        ((CIRCLE, (("above", Thing("star", "red")),), "gray"), "must differ in colour"),
        ((CAT, (("above", CAT),), "gray"), "must differ in colour or be other objects"),
        ((CAT, (("above", CIRCLE), ("below", SQUARE)), "gray"), "one must be left or right"),
        (
            (CAT, (("above", CIRCLE), ("left of", SQUARE), ("below", Thing("dog"))), "gray"),
            "at most 3 things, not 4",
        ),
    ],
)
def test_scenes_that_cannot_be_drawn_are_refused(parts, complaint):
    with pytest.raises(ValueError, match=complaint):
        Scene(*parts)


@pytest.mark.parametrize(
    ("parts", "complaint"),
    [
        (("circle",), "a circle is red, green, .*, not None"),
        (("circle", "brown"), "not 'brown'"),
        (("cat", "red"), "a cat has its own colours and cannot be red"),
        (("hexagon", "red"), "'hexagon' is not one of circle, "),
        (("",), "'' is not one of"),
    ],
)
def test_things_that_there_are_not_are_refused(parts, complaint):
    with pytest.raises(ValueError, match=complaint):
        Thing(*parts)


def test_objects_for_fine_tuning_are_things_but_never_in_training():
    for noun in UNSEEN_OBJECTS:
        assert str(Thing(noun)) == noun
        assert noun not in NOUNS and noun not in captions.vocabulary()
        scene = captions.parse(f"a {noun} above a cat on gray")
        assert scene.first == Thing(noun)


# --- pictures --------------------------------------------------------------------------------


def distance(colours: tuple[scenes.RGB, scenes.RGB]) -> float:
    return float(np.linalg.norm(np.subtract(*colours)))


def test_colours_are_far_from_each_other_and_from_the_backgrounds():
    assert min(map(distance, itertools.combinations(COLOURS.values(), 2))) > 85
    behind = itertools.product(COLOURS.values(), BACKGROUNDS.values())
    assert min(map(distance, behind)) > 110


@settings(deadline=None, max_examples=40)
@given(any_scene(), st.integers(0, 1000))
def test_boxes_lie_inside_apart_and_as_the_relations_say(scene, seed):
    boxes = scenes.place(scene, random.Random(seed))
    assert len(boxes) == len(scene.things)
    for x, y, across in boxes:
        assert min(x, y, SIDE - x, SIDE - y) - across / 2 >= 4
    for (x1, y1, one), (x2, y2, two) in itertools.combinations(boxes, 2):
        assert max(abs(x1 - x2), abs(y1 - y2)) - (one + two) / 2 >= 3
    for (relation, _), (x, y, _) in zip(scene.others, boxes[1:], strict=True):
        right, down = boxes[0][0] - x, boxes[0][1] - y
        along, across = (down, right) if relation in VERTICAL else (right, down)
        assert abs(along) >= 4 * abs(across)
        assert (along > 0) == (relation in ("below", "right of"))


@pytest.mark.parametrize("size", [64, 128, 160])
def test_pictures_have_things_in_their_boxes_and_a_plain_background(size):
    rng = random.Random(0)
    for scene in scenes.prompts("seen", 20):
        seed = rng.random()
        picture = scenes.draw(scene, random.Random(seed), size)
        assert (picture.mode, picture.size) == ("RGB", (size, size))
        inside = np.zeros((size, size), dtype=bool)
        for box in scenes.place(scene, random.Random(seed)):
            x, y, half = (length * size / SIDE for length in (box[0], box[1], box[2] / 2))
            rows, columns = (slice(int(m - half) - 1, int(m + half) + 3) for m in (y, x))
            drawn = (np.array(picture)[rows, columns] != BACKGROUNDS[scene.background]).any(-1)
            assert drawn.mean() > 0.1
            inside[rows, columns] = True
        outside = np.array(picture)[~inside]
        assert (outside == BACKGROUNDS[scene.background]).all()


@pytest.mark.parametrize("thing", THINGS, ids=str)
def test_every_thing_nearly_fills_its_box(thing):
    ground = Image.new("RGB", (SIDE, SIDE), (1, 2, 3))
    picture = ground.copy()
    scenes.paint(picture, thing, (70, 60, 80))
    left, top, right, bottom = ImageChops.difference(picture, ground).getbbox()
    assert left >= 29 and top >= 19 and right <= 112 and bottom <= 102
    assert max(right - left, bottom - top) >= 0.9 * 80
    assert min(right - left, bottom - top) >= 0.5 * 80


def test_the_same_seed_draws_the_same_picture():
    scene = Scene(CIRCLE, (("above", CAT),), "gray")
    first, again = (scenes.draw(scene, random.Random(3)).tobytes() for _ in range(2))
    assert first == again
    assert first != scenes.draw(scene, random.Random(4)).tobytes()


# --- the split -------------------------------------------------------------------------------


def test_the_split_file_is_what_the_generator_writes():
    assert json.loads(scenes.HELD_OUT_FILE.read_text()) == scenes.choose_held_out()


def test_one_colour_of_every_shape_is_held_out_and_no_colour_twice():
    out = [thing for thing in THINGS if str(thing) in scenes.held_out()["pairs"]]
    assert len(out) == len(scenes.held_out()["pairs"]) == len(SHAPES)
    assert {thing.noun for thing in out} == set(SHAPES)
    assert len({thing.colour for thing in out}) == len(out)


def test_an_eighth_of_the_arrangements_is_held_out_together_with_their_mirrors():
    arrangements = [f"{a} {r} {b}" for a, r, b in itertools.product(NOUNS, RELATIONS, NOUNS)]
    out = scenes.held_out()["triples"]
    assert out <= set(arrangements)
    assert len(out) == pytest.approx(len(arrangements) / 8, abs=4)
    for one, relation, two in itertools.product(NOUNS, RELATIONS, NOUNS):
        mirror = f"{two} {MIRRORED[relation]} {one}"
        assert (f"{one} {relation} {two}" in out) == (mirror in out)


def test_every_noun_is_seen_in_each_relation_to_others():
    out = scenes.held_out()["triples"]
    for noun, relation in itertools.product(NOUNS, RELATIONS):
        assert sum(f"{noun} {relation} {two}" not in out for two in NOUNS) > len(NOUNS) / 2


def test_training_scenes_hold_nothing_out_and_show_all_the_rest():
    rng = random.Random(5)
    drawn = [scenes.random_scene(rng) for _ in range(2000)]
    assert not any(scenes.is_held_out(scene) for scene in drawn)
    assert len({thing for scene in drawn for thing in scene.things}) == len(THINGS) - len(SHAPES)
    assert {scene.background for scene in drawn} == set(BACKGROUNDS)
    assert {r for scene in drawn for r, _ in scene.others} == set(RELATIONS)
    counts = [len(scene.things) for scene in drawn]
    for count, share in scenes.TRAINED_COUNTS.items():
        assert counts.count(count) / len(counts) == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize(
    ("kind", "held"), [("seen", (0, 0)), ("pairs", (1, 0)), ("triples", (0, 1))]
)
def test_prompts_are_distinct_fixed_and_of_their_kind(kind, held):
    chosen = scenes.prompts(kind, 300)
    assert chosen == scenes.prompts(kind, 300)
    assert chosen[:100] == scenes.prompts(kind, 100)
    assert len(set(chosen)) == 300
    for scene in chosen:
        counted = scenes.count_held_out_pairs(scene), scenes.count_held_out_triples(scene)
        assert counted == held
        assert KINDS[kind](scene)
    assert {len(scene.things) for scene in chosen} == ({2, 3} if kind == "triples" else {1, 2, 3})


def test_another_kind_of_prompts_is_refused():
    with pytest.raises(ValueError, match="'unseen' is not one of the kinds seen, pairs, triples"):
        scenes.prompts("unseen", 1)

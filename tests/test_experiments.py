"""The experiments of `tools/`: what they ask for, and the tables that they write."""

import dataclasses
import random
import runpy
from pathlib import Path

import numpy as np
import pytest

from sd3min.training import captions, scenes
from sd3min.training.detector import judge

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def dreambooth():
    """The functions of `tools/dreambooth.py`."""
    return runpy.run_path(str(ROOT / "tools" / "dreambooth.py"))


@pytest.fixture(scope="module")
def densities():
    """The functions of `tools/densities.py`."""
    return runpy.run_path(str(ROOT / "tools" / "densities.py"))


def test_the_class_stands_with_another_object_in_scenes_that_training_shows(dreambooth):
    found = dreambooth["of_class"](50, "asked")
    assert len(set(found)) == 50 and found == dreambooth["of_class"](50, "asked")
    for scene in found:
        objects = [thing.noun for thing in scene.things if thing.colour is None]
        assert "cat" in objects and len(objects) > 1 and not scenes.is_held_out(scene)


def test_the_new_object_takes_the_place_of_its_class_and_has_a_name_of_its_own(dreambooth):
    cat, tree = scenes.Thing("cat"), scenes.Thing("tree")
    scene = scenes.Scene(tree, (("above", cat), ("left of", scenes.Thing("star", "red"))), "gray")
    changed = dreambooth["with_subject"](scene, "unicorn")
    assert [thing.noun for thing in changed.things] == ["tree", "unicorn", "star"]
    assert changed.triples == ["tree above unicorn", "tree left of star"]
    said = "a tree above a sks and left of a red star on gray"
    assert dreambooth["said"](changed) == said
    assert dreambooth["said"](scene) == said.replace("sks", "cat")


def test_the_five_pictures_have_five_places_and_grounds_and_nothing_that_is_held_out(dreambooth):
    shown = dreambooth["shown"]("robot")
    assert len({scene.background for scene in shown}) == len(shown) == 5
    assert len({(len(s.things), [t.noun for t in s.things].index("robot")) for s in shown}) >= 4
    known = [captions.parse(words) for words in dreambooth["SHOWN"]]
    assert not any(scenes.is_held_out(scene) for scene in known)
    asked = {scene.with_things(scene.things) for scene in dreambooth["of_class"](200, "asked")}
    assert not asked & set(known)  # which would only be remembered


@pytest.mark.parametrize("noun", scenes.UNSEEN_OBJECTS)
def test_the_object_is_cut_out_without_its_ground_and_with_what_is_seen_through_it(
    dreambooth, noun
):
    for i, scene in enumerate(dreambooth["shown"](noun)):
        cut = dreambooth["cut_out"](scenes.draw(scene, random.Random(i)))
        outline = np.asarray(cut)[..., 3]
        assert set(np.unique(outline)) == {0, 255} and cut.size == (dreambooth["SIDE"],) * 2
        assert not any(edge.any() for edge in (*outline[[0, -1]], *outline[:, [0, -1]].T))
        if noun != "robot":  # whose white teeth are part of it on white too
            continue
        rows = [np.flatnonzero(row) for row in outline if row.any()]
        assert sum(len(r) < r[-1] - r[0] + 1 for r in rows) < 8


def test_the_object_is_pasted_in_the_place_of_its_class_and_nowhere_else(dreambooth):
    cut = dreambooth["cut_out"](scenes.draw(dreambooth["shown"]("robot")[0], random.Random(0)))
    for i, scene in enumerate(dreambooth["of_class"](12, "pasted")):
        before = scenes.draw(scene, random.Random(i))
        after = dreambooth["paste"](cut, before)
        assert judge(after, dreambooth["with_subject"](scene, "robot")).right
        rows, columns = np.nonzero((np.asarray(after) != np.asarray(before)).any(axis=-1))
        side = dreambooth["SIDE"]
        assert np.ptp(rows) < side and np.ptp(columns) < side


def test_pictures_are_pasted_with_captions_of_the_object(dreambooth, tmp_path):
    folder = tmp_path / "pictures"
    dreambooth["write_pictures"]("robot", folder)
    asked = dreambooth["of_class"](4, "pasted")
    alone = scenes.Scene(scenes.Thing("cat"), (), "white")
    known = [(scenes.draw(scene, random.Random(0)), scene) for scene in (alone, *asked)]
    pasted = dreambooth["write_pasted"]("robot", known, folder)
    assert len(pasted) == len(asked)  # a large one alone stays as it is
    files = sorted(folder.glob("pasted-*.txt"))
    assert len(files) == 4 and all("sks" in file.read_text() for file in files)
    assert len(list(folder.glob("*.png"))) == 5 + 4


def test_nothing_that_is_asked_for_is_among_what_is_learnt(dreambooth, tmp_path):
    asked = [*dreambooth["of_class"](100, "asked"), *scenes.prompts("seen", 100)]
    wanted = []

    class Pipe:
        def __call__(self, words, **_):
            wanted.extend(captions.parse(told) for told in words)
            drawn = [captions.parse(told) for told in words]
            return [scenes.draw(scene, random.Random(0)) for scene in drawn]

    known = dreambooth["keep_known"](Pipe(), tmp_path / "known", asked)
    assert len(wanted) == dreambooth["KEPT"] and len(known) > 0.98 * len(wanted)
    mirrored = [
        scenes.Scene(thing, ((scenes.MIRRORED[relation], scene.first),), scene.background)
        for scene in asked
        if len(scene.others) == 1
        for relation, thing in scene.others
    ]
    swapped = [dataclasses.replace(scene, others=scene.others[::-1]) for scene in asked]
    assert not {*asked, *mirrored, *swapped} & set(wanted)


def test_labels_of_the_densities_are_three_and_0_is_for_none(densities):
    scene = scenes.Scene(scenes.Thing(list(scenes.SHAPES)[1], "green"), (), "cream")
    assert densities["labels"]([scene]).tolist() == [[2, 2, 2]]
    assert len(set(map(tuple, densities["labels"](densities["ALL"]).tolist()))) == 6 * 8 * 6


def test_the_object_is_named_now_first_and_now_last(dreambooth):
    robot, tree = scenes.Thing("robot"), scenes.Thing("tree")
    scene = scenes.Scene(tree, (("above", robot),), "gray")
    told = dreambooth["told"](scene)
    assert len(set(told)) > 6 and all(
        "a sks" in f"a {words}" and "robot" not in words for words in told
    )
    places = {words.index("sks") < words.index("tree") for words in told}
    assert places == {True, False}
    read = {captions.parse(words.replace("sks", "cat")) for words in told}
    assert {s.first.noun for s in read} == {"tree", "cat"}
    assert {r for s in read for r, _ in s.others} == {"above", "below"}


def test_the_table_of_dreambooth_has_both_sides_of_every_kind_of_prompt(dreambooth):
    learnt, plain = {"with the object": 0.825, "without either": 0.96}, {"with the object": 0.0}
    figures = {
        "prompts": 40,
        "right": learnt,
        "right without the LoRA": plain | {"without either": 1},
    }
    head, _, *lines = dreambooth["table"](figures).splitlines()
    assert head == "| 40 prompts | with the LoRA | without |"
    assert lines == ["| with the object | 82.5% | 0.0% |", "| without either | 96.0% | 100.0% |"]


def test_the_table_of_densities_has_means_over_seeds_beside_the_papers_ranks(densities, tmp_path):
    figures = {"right in 5 steps": 0.25, "right in 28 steps": 0.5, "path over distance": 1.5}
    runs = [
        {"density": name, "seed": seed, "validation loss": 0.2 + seed / 10, "validation": [0.1] * 8}
        | figures
        for name in densities["RANKS"]
        for seed in range(3)
    ]
    results = {"ranks": densities["RANKS"], "runs": runs}
    head, _, first, *others = densities["table"](results).splitlines()
    assert head.count("|") == first.count("|") == 9 and len(others) == 4
    assert first.startswith("| uniform | 0.300 ± 0.100 | 0.250 ± 0.000 | 0.500 ± 0.000 | 1.500 ± 0")
    densities["plot"](results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000

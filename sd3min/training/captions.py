"""Scenes in words: one plain way to say each, many natural ones, and the way back."""

import random
import re

from sd3min.training.scenes import BACKGROUNDS, COLOURS, NOUNS, RELATIONS, Scene, Thing

LENGTH = 24  # tokens that have room for any caption, with the marks of start and end
SPARE = "sks"  # as the guides to fine-tuning have it
OPENINGS = ("", "a picture of ", "there is ")
SYNONYMS = {
    "above": ("above", "over"),
    "below": ("below", "under"),
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "cat": ("cat", "kitten"),
    "dog": ("dog", "puppy"),
    "car": ("car", "automobile"),
    "gift": ("gift", "present"),
    "house": ("house", "home"),
    "purple": ("purple", "violet"),
    "gray": ("gray", "grey"),
}
MEANT = {word: name for name, words in SYNONYMS.items() for word in words}

_RELATION = "|".join(word for name in RELATIONS for word in reversed(SYNONYMS[name]))
_WORD = r"(?!(?:on|and)\b)\w+"
_THING = rf"(?:an? )?({_WORD}(?: {_WORD})?)"
_CAPTION = re.compile(
    rf"(?:{'|'.join(OPENINGS[1:])})?{_THING}(?: ({_RELATION}) {_THING})?"
    rf"(?: and ({_RELATION}) {_THING})?(?: on (?:an? )?(\w+)(?: background)?)?"
)


def with_article(words: str) -> str:
    """The words with "a" or "an" before them."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def caption(scene: Scene) -> str:
    """The scene in the plainest words: "a cat above a red circle and left of a tree on gray"."""
    relations = [f" {r} {with_article(str(thing))}" for r, thing in scene.others]
    return f"{with_article(str(scene.first))}{' and'.join(relations)} on {scene.background}"


def _said(name: str, rng: random.Random) -> str:
    """A word for a name, the plain one half the time."""
    words = SYNONYMS.get(name, (name,))
    return words[0] if rng.random() < 0.5 else rng.choice(words)


def worded(scene: Scene, rng: random.Random) -> str:
    """The scene as somebody might say it: with synonyms, an opening or none, and now and then
    without articles or background."""
    articles = rng.random() >= 0.1

    def named(thing: Thing) -> str:
        words = " ".join(_said(word, rng) for word in str(thing).split())
        return with_article(words) if articles else words

    opening = rng.choice(OPENINGS) if articles and rng.random() < 0.3 else ""
    relations = [f" {_said(r, rng)} {named(thing)}" for r, thing in scene.others]
    words = f"{opening}{named(scene.first)}{' and'.join(relations)}"
    choice, ground = rng.random(), _said(scene.background, rng)
    if choice < 0.1:
        return words
    return f"{words} on a {ground} background" if choice < 0.4 else f"{words} on {ground}"


def _thing(words: str) -> Thing:
    """The thing that words without their article name."""
    *colour, noun = (MEANT.get(word, word) for word in words.split())
    return Thing(noun, *colour)


def parse(words: str) -> Scene:
    """Read a scene back from its caption, without a background from white; ValueError says what is
    wrong with the caption."""
    match = _CAPTION.fullmatch(words.strip().lower().rstrip("."))
    if match is None:
        raise ValueError(
            f"{words!r} does not read like 'a cat above a red circle and left of a tree on gray'"
        )
    first, r1, second, r2, third, background = match.groups()
    if r2 and not r1:
        raise ValueError(f"{words!r} has 'and' before its first relation")
    others = [(MEANT[r], _thing(name)) for r, name in ((r1, second), (r2, third)) if r]
    ground = MEANT.get(background, background) if background else "white"
    return Scene(_thing(first), tuple(others), ground)


def vocabulary() -> list[str]:
    """Every word that a caption may have, once, and a spare one for a thing to be named later."""
    names = [*COLOURS, *NOUNS, *BACKGROUNDS, *RELATIONS]
    said = [words for name in names for words in SYNONYMS.get(name, (name,))]
    words = [word for told in (*said, *OPENINGS) for word in told.split()]
    return list(dict.fromkeys(["a", "an", "on", "and", "background", *words, SPARE]))

"""T5's first lesson: to read where a thing stands and what colour it has, from captions alone.

The T5 of Stable Diffusion 3 had read a great deal of text before it met a picture, and was not
trained further. This one is taught, in a minute, what its captions are about: at the word that
names a thing a linear layer, thrown away afterwards, must tell how that thing stands to the first,
and its colour.
"""

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd3min.text_encoders import TextEncoders
from sd3min.training import captions, scenes
from sd3min.training.trainer import Losses, Task

# What the first thing is to the others, on both axes; what another is to the first, on one.
PLACES = [(height, side) for height in ("", *scenes.AXES[0]) for side in ("", *scenes.AXES[1])]
HUES = ["", *scenes.COLOURS]  # none for an object, which has its own
QUESTIONS = (PLACES, HUES)
IGNORED = -100  # PyTorch's sign for a place in a target that does not count


def place(relations: list[str]) -> int:
    """The number in PLACES of relations, at most one on each axis."""
    height, side = (next((r for r in relations if r in axis), "") for axis in scenes.AXES)
    return PLACES.index((height, side))


def targets(scene: scenes.Scene, caption: str, length: int) -> list[tuple[int, int]]:
    """Place and colour of the thing that each word of a caption names; IGNORED for other words."""
    relations = [relation for relation, _ in scene.others]
    places = [place(relations), *(place([scenes.MIRRORED[r]]) for r in relations)]
    found = [(IGNORED, IGNORED)] * length
    words = [captions.MEANT.get(word, word) for word in caption.lower().split()]
    after = 0
    for thing, number in zip(scene.things, places, strict=True):
        after = words.index(thing.noun, after) + 1
        found[after - 1] = number, HUES.index(thing.colour or "")
    return found


class Reading(Task):
    """Text encoders, of which T5 is taught, and the layer that answers for it."""

    def __init__(self, encoders: TextEncoders, batch: int):
        super().__init__()
        self.t5, self.encoders, self.batch = encoders.t5, [encoders], batch  # not all to be trained
        self.answer = nn.Linear(encoders.context_width, sum(map(len, QUESTIONS)))

    def answers(self, read: list[str]) -> tuple[Tensor, ...]:
        """What every word of T5 is taken to say to each question: logits [b, l, answers]."""
        encoders = self.encoders[0]
        answers = self.answer(encoders.t5_rows(read, encoders.t5_length)).float()
        return answers.split([len(question) for question in QUESTIONS], dim=-1)

    def forward(self, step: int, part: slice) -> Losses:
        """Cross-entropy of the answers to captions of seen scenes; the step decides them."""
        rng = random.Random(f"reading {step}")
        wanted = [scenes.random_scene(rng) for _ in range(self.batch)]
        read = [captions.worded(scene, rng) for scene in wanted]
        pairs = zip(self.answers(read[part]), self.expected(wanted[part], read[part]), strict=True)
        losses = [F.cross_entropy(said.mT, right, reduction="none") for said, right in pairs]
        return Losses(torch.stack(losses).sum(dim=(0, 2)))

    def expected(self, wanted: list[scenes.Scene], read: list[str]) -> tuple[Tensor, ...]:
        """The right answers to each question: [b, l]."""
        length = self.encoders[0].t5_length
        pairs = zip(wanted, read, strict=True)
        return torch.tensor([targets(*pair, length) for pair in pairs]).unbind(dim=-1)

    @torch.no_grad()
    def right_answers(self, wanted: list[scenes.Scene]) -> float:
        """The share of scenes in which all is right of every thing."""
        read = [captions.caption(scene) for scene in wanted]
        pairs = zip(self.answers(read), self.expected(wanted, read), strict=True)
        right = [((said.argmax(-1) == told) | (told == IGNORED)).all(dim=1) for said, told in pairs]
        return torch.stack(right).all(dim=0).float().mean().item()

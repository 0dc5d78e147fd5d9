"""T5's first lesson: to read where a thing stands, from captions alone.

The T5 of Stable Diffusion 3 had read a great deal of text before it met a picture, and was not
trained further. This one is taught, in a minute, what its captions are about: at the word that
names a thing a linear layer, thrown away afterwards, must tell how that thing stands to the first.
"""

import random

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sd3min.text_encoders import TextEncoders
from sd3min.training import captions, scenes
from sd3min.training.trainer import Losses, Task

# What the first thing is to the others, on both axes; what another is to the first, on one.
PLACES = [(height, side) for height in ("", *scenes.AXES[0]) for side in ("", *scenes.AXES[1])]
IGNORED = -100  # PyTorch's sign for a place in a target that does not count


def place(relations: list[str]) -> int:
    """The number in PLACES of relations, at most one on each axis."""
    height, side = (next((r for r in relations if r in axis), "") for axis in scenes.AXES)
    return PLACES.index((height, side))


def targets(scene: scenes.Scene, caption: str, length: int) -> list[int]:
    """The place of the thing that each word of a caption names; IGNORED for other words."""
    relations = [relation for relation, _ in scene.others]
    places = [place(relations), *(place([scenes.MIRRORED[r]]) for r in relations)]
    found, words = [IGNORED] * length, [captions.MEANT.get(w, w) for w in caption.lower().split()]
    after = 0
    for thing, number in zip(scene.things, places, strict=True):
        after = words.index(thing.noun, after) + 1
        found[after - 1] = number
    return found


class Reading(Task):
    """Text encoders, of which T5 is taught, and the layer that answers for it."""

    def __init__(self, encoders: TextEncoders, batch: int):
        super().__init__()
        self.t5, self.encoders, self.batch = encoders.t5, [encoders], batch  # not all to be trained
        self.answer = nn.Linear(encoders.context_width, len(PLACES))

    def answers(self, read: list[str]) -> Float[Tensor, "b l places"]:
        """What every word of T5 is taken to stand for."""
        encoders = self.encoders[0]
        return self.answer(encoders.t5_rows(read, encoders.t5_length)).float()

    def forward(self, step: int, part: slice) -> Losses:
        """Cross-entropy of the places in captions of seen scenes; the step decides them."""
        rng = random.Random(f"reading {step}")
        wanted = [scenes.random_scene(rng) for _ in range(self.batch)]
        read = [captions.worded(scene, rng) for scene in wanted]
        answers = self.answers(read[part])
        expected = [
            targets(scene, caption, answers.shape[1])
            for scene, caption in zip(wanted[part], read[part], strict=True)
        ]
        losses = F.cross_entropy(answers.mT, torch.tensor(expected), reduction="none")
        return Losses(losses.sum(dim=1))

    @torch.no_grad()
    def right_answers(self, wanted: list[scenes.Scene]) -> float:
        """The share of scenes in which every thing is found where it stands."""
        read = [captions.caption(scene) for scene in wanted]
        answers = self.answers(read).argmax(dim=-1)
        pairs = zip(wanted, read, strict=True)
        expected = torch.tensor([targets(s, c, answers.shape[1]) for s, c in pairs])
        return ((answers == expected) | (expected == IGNORED)).all(dim=1).float().mean().item()

"""T5's first lesson: to read where a thing stands, from captions alone.

The T5 of Stable Diffusion 3 had read a great deal of text before it met a picture, and was not
trained further. This one is taught, in minutes, what its captions are about: at the words that name
a thing a linear layer, thrown away afterwards, must tell where that thing stands.
"""

import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sd3min.text_encoders import TextEncoders
from sd3min.training import scenes

PLACES = (None, *scenes.RELATIONS)  # of a thing, to the other one; None where it is alone
IGNORED = -100  # PyTorch's sign for a place in a target that does not count


class Lesson(nn.Module):
    """Text encoders, of which T5 is taught, and the layer that answers for it."""

    def __init__(self, encoders: TextEncoders):
        super().__init__()
        self.encoders = encoders
        self.length = encoders.t5_length
        self.answer = nn.Linear(encoders.context_width, len(PLACES))

    def forward(self, captions: Sequence[str]) -> Float[Tensor, "b l places"]:
        """What every word of T5 is taken to stand for."""
        return self.answer(self.encoders.t5_rows(captions, self.length))


def targets(scene: scenes.Scene, caption: str, length: int) -> list[int]:
    """The number in PLACES of each word of a caption, each a token; IGNORED for other words."""
    words, found = caption.lower().split(), [IGNORED] * length
    mirrored = scenes.MIRRORED.get(scene.relation or "")
    for thing, relation in zip(scene.things, (scene.relation, mirrored), strict=False):
        place = words.index(thing.colour)
        found[place] = found[place + 1] = PLACES.index(relation)
    return found


def reading_loss(lesson: Lesson, batch: int, step: int) -> Tensor:
    """Cross-entropy of the places in a batch of captions of seen scenes; `step` decides them."""
    rng = random.Random(f"reading {step}")
    wanted = [scenes.random_scene(rng) for _ in range(batch)]
    captions = [scenes.training_caption(scene, rng) for scene in wanted]
    expected = [
        targets(scene, caption, lesson.length)
        for scene, caption in zip(wanted, captions, strict=True)
    ]
    answers = lesson(captions).float()
    return F.cross_entropy(
        answers.flatten(0, 1), torch.tensor(expected).flatten(), ignore_index=IGNORED
    )


def right_answers(lesson: Lesson, wanted: Sequence[scenes.Scene]) -> float:
    """The share of scenes in which every thing is found where it stands."""
    captions = [scene.caption for scene in wanted]
    with torch.no_grad():
        answers = lesson(captions).argmax(dim=-1)
    expected = torch.tensor(
        [targets(s, c, lesson.length) for s, c in zip(wanted, captions, strict=True)]
    )
    return ((answers == expected) | (expected == IGNORED)).all(dim=1).float().mean().item()

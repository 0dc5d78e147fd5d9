"""Why is my picture different? Each choice on which two implementations differ, measured alone."""

import dataclasses
import warnings
from copy import deepcopy
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from sd3min.checkpoint import Checkpoint
from sd3min.config import released_name
from sd3min.conventions import Conventions, find_conventions, reasons
from sd3min.pipeline import Pipeline, assemble
from sd3min.text_encoders import TextEncoders

PROMPT = "a red circle above a blue square on gray!"
PICTURES = 4  # of each situation
SITUATIONS = {  # where a choice shows; all others show in text to image
    "t5_grows": "a prompt of 360 words",
    "t5_characters": "a prompt of 360 words",
    "without_t5": "T5 left out",
    "start": "image to image, 20 steps at strength 0.8",
    "start_sample": "image to image, 20 steps at strength 0.8",
    "latents": "bfloat16",
}


class Difference(NamedTuple):
    """A choice on which two conventions differ, and what it alone changes, in levels of 255."""

    choice: str
    a: Any
    b: Any
    reason: str
    situation: str
    mean: float
    largest: int
    share: float  # of the values that change


def explain(
    a: str | Conventions,
    b: str | Conventions,
    pipe: Pipeline | None = None,
    size: tuple[int, int] | None = None,
    progress: bool = True,
) -> list[Difference]:
    """What two conventions differ in, the choice that changes a picture most first.

    Each choice is measured alone: pictures as `a` makes them, against the same with this one choice
    as in `b`. The pictures are sd3-tiny's, or those of `pipe`, of its own size or of another width
    and height. What shows only in some pictures is measured in those: see `SITUATIONS`.
    """
    pipe = pipe or assemble(Checkpoint.open())
    model = released_name(pipe.config)
    one, other = (as_used(find_conventions(given), model) for given in (a, b))
    made: dict[str, np.ndarray] = {}
    rows = []
    names = [name for name in reasons() if getattr(one, name) != getattr(other, name)]
    for name in tqdm(names, disable=not progress):
        situation = SITUATIONS.get(name, "text to image")
        if situation not in made:
            made[situation] = pictures(pipe, situation, one, size)
        values = getattr(one, name), getattr(other, name)
        changed = pictures(pipe, situation, dataclasses.replace(one, **{name: values[1]}), size)
        levels = np.abs(changed - made[situation])
        figures = levels.mean().item(), levels.max().item(), (levels > 0).mean().item()
        rows.append(Difference(name, *values, reasons()[name], situation, *figures))
    return sorted(rows, key=lambda row: -row.mean)


def as_used(conventions: Conventions, model: str | None) -> Conventions:
    """Conventions as they are for one model."""
    return dataclasses.replace(conventions, of_model={}, **conventions.settings(model))


def pictures(
    pipe: Pipeline, situation: str, conventions: Conventions, size: tuple[int, int] | None
) -> np.ndarray:
    """The levels of a few pictures, as conventions have them made in a situation."""
    width, height = size or (pipe.defaults.width, pipe.defaults.height)
    call: dict[str, Any] = {"width": width, "height": height, "prompt": PROMPT}
    call |= {"num_images": PICTURES, "seed": 0, "conventions": conventions, "progress": False}
    if situation == "a prompt of 360 words":
        call["prompt"] = " ".join([PROMPT] * 40)
    elif situation == "T5 left out":
        pipe = without_t5(pipe)
    elif situation == "bfloat16":
        pipe = in_bfloat16(pipe)
    elif situation.startswith("image to image"):
        call |= {"init_image": start(width, height), "steps": 20, "strength": 0.8}
    with warnings.catch_warnings(action="ignore"):  # of a prompt that is cut
        return np.stack([np.asarray(image, dtype=int) for image in pipe(**call)])


def start(width: int, height: int) -> Image.Image:
    """A picture to start from: a red disc on a ground that fades from blue to green."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    ground = np.stack([0 * x, x, 1 - x], axis=-1)
    disc = ((x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.1)[..., None]
    return Image.fromarray((255 * np.where(disc, [1.0, 0.2, 0.1], ground)).astype(np.uint8))


def without_t5(pipe: Pipeline) -> Pipeline:
    """The same pipeline without its T5."""
    whole = pipe.text_encoders
    lengths = {"context_width": whole.context_width, "t5_length": whole.t5_length}
    encoders = TextEncoders(whole.clip_l, whole.clip_g, None, whole.tokenizers, **lengths)
    return Pipeline(pipe.mmdit, pipe.autoencoder, encoders, pipe.defaults)


def in_bfloat16(pipe: Pipeline) -> Pipeline:
    """The same pipeline in bfloat16, a copy if it is in another type."""
    if pipe.dtype == torch.bfloat16:
        return pipe
    parts = pipe.mmdit, pipe.autoencoder, pipe.text_encoders
    mmdit, autoencoder, encoders = deepcopy(parts)
    return Pipeline(mmdit.bfloat16(), autoencoder.bfloat16(), encoders.bfloat16(), pipe.defaults)

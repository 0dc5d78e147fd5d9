"""What a picture is made with: the settings of a call, completed, and checked before any work.

Everything here is a sentence about a value that makes no sense; nothing is computed.
"""

import dataclasses
import math
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, NamedTuple, cast

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from sd3min import flow
from sd3min.config import SIZE_STEP, Defaults, MMDiTConfig, Refusal, released_name
from sd3min.conventions import DIFFUSERS, WITHOUT_T5, Conventions, find_conventions


def is_whole(value: Any, least: int, most: float = math.inf) -> bool:
    """Whether a value is a whole number between two others, both included."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    return whole and least <= int(value) <= most


def is_number(value: Any, least: float, most: float) -> bool:
    """Whether a value is a number between two others, both included; NaN never is."""
    return isinstance(value, Real) and bool(least <= cast(float, value) <= most)


def is_text(value: Any) -> bool:
    """Whether a value is text that a tokenizer can read: half a surrogate pair is not."""
    return isinstance(value, str) and value.encode(errors="replace").decode() == value


def is_one_of(value: Any, names: Iterable[str]) -> bool:
    """Whether a value is one of several names."""
    return isinstance(value, str) and value in names


def is_side(value: Any) -> bool:
    """Whether a value is the side of a picture: whole patches of latents."""
    return is_whole(value, SIZE_STEP) and bool(value % SIZE_STEP == 0)


def nearest_side(value: Any) -> int:
    """The side of a picture that is nearest to a value."""
    steps = round(value / SIZE_STEP) if is_number(value, 0, 2**31) else 1
    return SIZE_STEP * max(1, steps)


def is_descending(values: Any) -> bool:
    """Whether values are times of a run: from at most 1 down to more than 0."""
    numbers = list(values) if isinstance(values, Sequence) else []
    return all(is_number(value, 0, 1) for value in numbers) and all(
        above >= below > 0 for above, below in pairwise([1.0, *(numbers or [0])])
    )


@dataclass(frozen=True)
class Settings:
    """What decides a picture besides the weights, the prompt and the seed."""

    width: int  # pixels
    height: int
    steps: int
    guidance_scale: float  # 1 or less: no guidance
    shift: float
    t5_length: int  # rows that T5 adds to the context
    schedule: str = "official"
    sampler: str = "euler"
    sigmas: Sequence[float] | None = None  # times before the shift, in place of `steps`
    strength: float = 0.6  # image-to-image: 1 forgets the starting picture
    keep_unmasked: bool = True  # inpainting: the pixels outside the mask are the starting picture's
    without_t5: str = "zeros"  # what stands for T5 where it was left out
    conventions: Conventions = DIFFUSERS  # what else decides

    def __post_init__(self) -> None:
        """Refuse the first value that makes no sense."""
        side = f"a multiple of {SIZE_STEP} pixels; the nearest is"
        rules = {
            "width": (is_side(self.width), f"{side} {nearest_side(self.width)}"),
            "height": (is_side(self.height), f"{side} {nearest_side(self.height)}"),
            "steps": (is_whole(self.steps, 1, 1000), "a whole number from 1 to 1000"),
            "guidance_scale": (is_number(self.guidance_scale, 0, 1000), "a number from 0 to 1000"),
            "shift": (is_number(self.shift, 0.001, 1000), "a number from 0.001 to 1000"),
            "t5_length": (is_whole(self.t5_length, 1, 4096), "a whole number from 1 to 4096"),
            "schedule": (
                is_one_of(self.schedule, flow.SCHEDULES),
                f"one of {', '.join(flow.SCHEDULES)}",
            ),
            "sampler": (
                is_one_of(self.sampler, flow.SAMPLERS),
                f"one of {', '.join(flow.SAMPLERS)}",
            ),
            "sigmas": (
                self.sigmas is None or is_descending(self.sigmas),
                "a row of times that falls from at most 1 to above 0",
            ),
            "strength": (
                is_number(self.strength, 0, 1) and self.strength > 0,
                "a number above 0 and at most 1",
            ),
            "keep_unmasked": (isinstance(self.keep_unmasked, bool), "True or False"),
            "without_t5": (
                is_one_of(self.without_t5, WITHOUT_T5),
                f"one of {', '.join(WITHOUT_T5)}",
            ),
        }
        for name, (fits, wanted) in rules.items():
            if not fits:
                raise Refusal(f"{name} {getattr(self, name)} is not {wanted}")

    def times(self, partly: bool = False) -> Float[Tensor, " times"]:
        """Times of the run, from noise to data, and a last 0.

        `partly`, for image-to-image, skips the first steps and keeps about `strength` of them, as
        many as the conventions keep.
        """
        count = len(self.sigmas) if self.sigmas else self.steps
        made, skipped = self.split(count) if partly else (count, 0)
        times = flow.sigmas(self.sigmas or made, self.shift, self.schedule)
        return times[min(skipped, made - 1) :]

    def split(self, steps: int) -> tuple[int, int]:
        """Steps of image-to-image's schedule, and how many of the first ones are skipped."""
        if self.conventions.start == "steps/strength" and not self.sigmas:
            made = int(steps / max(self.strength, 0.001))
            return made, made - steps
        if self.conventions.start == "steps*(1 - strength)":
            return steps, int(steps * (1 - self.strength))
        return steps, int(steps - min(steps * self.strength, steps))


def pair_prompts(
    prompt: str | Sequence[str], negative: str | Sequence[str], num_images: int
) -> tuple[list[str], list[str]]:
    """The prompt and the negative prompt of every picture; refused where there is none for each."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    negatives = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
    if not prompts:
        raise Refusal("the list of prompts is empty: pass at least one")
    if not all(is_text(text) for text in prompts + negatives):
        raise Refusal(f"prompts {prompts} and negative prompts {negatives} are not all texts")
    if len(negatives) != len(prompts):
        counts = f"{len(negatives)} negative prompts were given for {len(prompts)} prompts"
        raise Refusal(f"{counts}: pass one, or one for each")
    if not is_whole(num_images, 1):
        raise Refusal(f"num_images {num_images} is not a whole number of at least 1")
    pairs = [pair for pair in zip(prompts, negatives, strict=True) for _ in range(num_images)]
    return [prompt for prompt, _ in pairs], [negative for _, negative in pairs]


def picture_seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """One seed for each picture: those given, or a row from the one given or a random one on;
    refused where they are not as many, or not from 0 to 2^63 − 1.
    """
    if seed is None:
        seed = secrets.randbelow(2**31)
    seeds = list(seed) if isinstance(seed, Sequence) else [seed + i for i in range(count)]
    if len(seeds) != count:
        mend = "pass one for each, or a single number"
        raise Refusal(f"{len(seeds)} seeds were given for {count} pictures: {mend}")
    if not all(is_whole(value, 0, 2**63 - 1) for value in seeds):
        raise Refusal(f"seed {seed} is not a whole number from 0 to 2^63 - 1")
    return seeds


class Call(NamedTuple):
    """A call that was checked: the texts and the seed of every picture, and the settings of all."""

    prompts: list[str]
    negatives: list[str]
    seeds: list[int]
    settings: Settings


def check_images(init_image: Any, mask_image: Any) -> None:
    """Refuse a starting picture or a mask of the wrong kind or size."""
    for name, image in (("init_image", init_image), ("mask_image", mask_image)):
        if not isinstance(image, Image.Image | None):
            raise Refusal(f"{name} is of type {type(image).__name__}: pass a PIL picture")
    if mask_image is None:
        return
    if init_image is None:
        raise Refusal("mask_image says what to repaint of a starting picture: pass init_image too")
    if mask_image.size != init_image.size:
        sizes = ["{}x{}".format(*image.size) for image in (mask_image, init_image)]
        mend = "pass a mask of the same size"
        raise Refusal(f"mask_image is {sizes[0]} and init_image {sizes[1]} pixels: {mend}")
    levels = mask_image.mode in ("1", "L", "P", "RGB", "LA", "PA", "RGBA")
    if not levels or mask_image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
        mend = "pass grey levels without transparency, white where to repaint"
        raise Refusal(f"mask_image of mode {mask_image.mode} cannot be read as a mask: {mend}")


def check_call(
    config: MMDiTConfig,
    defaults: Defaults,
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str] = "",
    num_images: int = 1,
    seed: int | Sequence[int] | None = None,
    init_image: Image.Image | None = None,
    mask_image: Image.Image | None = None,
    conventions: str | Conventions | None = None,
    **settings: Any,
) -> Call:
    """Complete and check what a pipeline is called with; nothing is loaded or computed for it.

    A setting left out is the asked-for conventions', else the weights' own.
    """
    prompts, negatives = pair_prompts(prompt, negative_prompt, num_images)
    seeds = picture_seeds(seed, len(prompts))
    if init_image is not None or mask_image is not None:
        check_images(init_image, mask_image)
    values = dataclasses.asdict(defaults)
    if conventions is not None:
        asked = find_conventions(conventions)
        values |= asked.settings(released_name(config)) | {"conventions": asked}
    if init_image is not None:
        values |= {"width": init_image.width, "height": init_image.height}
    values |= {name: value for name, value in settings.items() if value is not None}
    known = Settings.__dataclass_fields__
    unknown = values.keys() - known.keys()
    if unknown:
        raise Refusal(f"setting {', '.join(unknown)} is not one of {', '.join(known)}")
    complete = Settings(**values)
    if max(complete.width, complete.height) > config.largest_side:
        size = f"{complete.width}x{complete.height}"
        limit = f"pass at most {config.largest_side} pixels a side"
        raise Refusal(f"{size} is beyond the model's positional table: {limit}")
    return Call(prompts, negatives, seeds, complete)

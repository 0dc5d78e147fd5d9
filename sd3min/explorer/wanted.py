"""What the page asks for: one picture's settings, within limits that the page states."""

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from PIL import Image

from sd3min.config import Defaults, MMDiTConfig, Refusal
from sd3min.pipeline import Pipeline
from sd3min.settings import Call, check_call

PROMPT, SEED = "a green circle below a red heart on white", 2  # of a page that was just opened
MOST_STEPS = 100
LEAST_SIDE = 512  # pixels a side that every model may draw, if its positional table allows it
MOST_SEED = 2**31 - 1  # of the dice


class Limits(NamedTuple):
    """The most that one picture may ask for."""

    steps: int
    side: int  # pixels

    @classmethod
    def of(cls, config: MMDiTConfig, defaults: Defaults) -> "Limits":
        """A model's limits: its own size is always within them."""
        own = max(defaults.width, defaults.height)
        side = min(max(LEAST_SIDE, own), config.largest_side)
        return cls(max(MOST_STEPS, defaults.steps), side)

    def __str__(self) -> str:
        return f"at most {self.steps} steps and {self.side} pixels a side"


@dataclass(frozen=True)
class Wanted:
    """What one picture is to be made with; what is None is the weights' own."""

    prompt: str
    seed: int
    width: int | None = None  # pixels
    height: int | None = None
    init_image: Image.Image | None = None
    strength: float | None = None
    negative_prompt: str = ""
    steps: int | None = None
    guidance_scale: float | None = None
    shift: float | None = None
    sampler: str | None = None
    dropped: tuple[str, ...] = ()  # names of encoders

    def call(self) -> dict[str, Any]:
        """The arguments of a pipeline's call; a strength goes with a starting picture alone."""
        call = {name: value for name, value in vars(self).items() if value is not None}
        del call["dropped"]
        if self.init_image is None:
            call.pop("strength", None)
        return call

    def told(self, defaults: Defaults) -> dict[str, Any]:
        """Those that have to be said to somebody who has the weights."""
        usual = vars(defaults) | {"negative_prompt": "", "sampler": "euler"}
        sized = ("width", "height") if self.init_image else ()
        return {
            name: value
            for name, value in self.call().items()
            if name in ("seed", *sized) or name not in usual or usual[name] != value
        }

    def check(self, pipe: Pipeline, limits: Limits) -> Call:
        """The checked call. Raises Refusal where a value makes no sense or is beyond the limits."""
        call = check_call(pipe.config, pipe.defaults, **self.call())
        settings = call.settings
        size = f"{settings.width}x{settings.height}"
        if max(settings.width, settings.height) > limits.side:
            raise Refusal(f"{size} is beyond this page: ask for {limits}")
        if settings.steps > limits.steps:
            raise Refusal(f"{settings.steps} steps are beyond this page: ask for {limits}")
        return call


class Word(NamedTuple):
    """A word of a prompt, and where its letters begin and end."""

    text: str
    start: int
    end: int


def words(prompt: str) -> list[Word]:
    """The words of a prompt, in order; one that is there twice is two."""
    found = re.finditer(r"\w+(?:['’-]\w+)*", prompt)
    return [Word(match[0], *match.span()) for match in found]

"""What can be said of a checkpoint without another program: sizes, values, positions, pictures."""

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from sd3min.autoencoder import Autoencoder
from sd3min.checkpoint import Checkpoint
from sd3min.config import PRESETS, Defaults
from sd3min.mmdit import MMDiT, position_table
from sd3min.parts import TITLES, Part
from sd3min.pipeline import to_tensor
from sd3min.probes.precision import computing_in
from sd3min.training import captions, scenes

LEAST_PSNR = 20.0  # dB; sd3-tiny has 31, and an autoencoder of other weights below 10
ALONE = ("sizes", "values", "positions", "pictures")  # what is checked without diffusers
ENCODERS = {"clip_l", "clip_g", "t5"}
RELEASED = {  # parameters of the released models
    "SD3-medium": 2_028_328_000,
    "SD3.5-medium": 2_243_171_520,
    "SD3.5-large": 8_056_627_520,
}


class Check(NamedTuple):
    """One line of the table."""

    part: str
    what: str
    passed: bool | None = None  # None: nothing was found out
    note: str = ""
    tensors: int | None = None
    parameters: int | None = None
    single: float | None = None  # difference from diffusers in float32, relative to the largest
    double: float | None = None  # and in float64
    pictures: Sequence[Image.Image] = ()  # ours and diffusers'

    @property
    def compared(self) -> bool:
        """Whether it is a comparison with diffusers."""
        return self.what not in ALONE

    @property
    def verdict(self) -> str:
        """In a word, and why."""
        word = {True: "passed", False: "FAILED", None: "not compared"}[self.passed]
        return f"{word}: {self.note}" if self.note else word


def working_type(parts: Sequence[Part]) -> torch.dtype:
    """The narrowest type that holds what is stored: a file in it is mapped and not copied."""
    stored = {tensor.dtype for part in parts for tensor in part.tensors.values()}
    if stored <= {"F16", "F8_E4M3"}:
        return torch.float16
    return torch.bfloat16 if stored <= {"BF16", "F8_E4M3", "F8_E5M2"} else torch.float32


def load(opened: Checkpoint, name: str) -> Any:
    """A part as it is stored, on the CPU."""
    return opened.load(name, working_type([opened.parts[name]]), torch.device("cpu"))


def drawn_picture() -> Float[Tensor, "1 3 128 128"]:
    """A scene of two shapes, 128x128; objects would ask for the pictures that training needs."""
    scene = captions.parse("a red heart above a blue square on gray")
    return to_tensor(scenes.draw(scene, random.Random(1)))


def size_check(part: Part) -> Check:
    """Names and shapes are those of the module; of a released size, the count is the released."""
    part.skeleton()
    title, counted = TITLES[part.name], part.parameters
    known = (name for name, preset in PRESETS.items() if preset == part.config)
    name = next(known, None)
    note = f"{name}, as released" if name else "names and shapes fit each other"
    passed = name is None or counted == RELEASED[name]
    if not passed:
        note = f"{name} has {RELEASED[str(name)]:,} parameters"
    return Check(title, "sizes", passed, note, len(part.tensors), counted)


def value_check(title: str, module: nn.Module) -> Check:
    """All values are numbers."""
    wrong = {
        name: int((~torch.isfinite(tensor)).sum())
        for name, tensor in module.state_dict().items()
        if not torch.isfinite(tensor).all()
    }
    first = next(iter(wrong), "")
    more = f" and {len(wrong) - 1} more tensors" if len(wrong) > 1 else ""
    note = f"{wrong[first]:,} values of {first}{more} are no numbers" if wrong else "all finite"
    return Check(title, "values", not wrong, note)


def position_check(mmdit: MMDiT, defaults: Defaults) -> Check:
    """The positional table is the formula's: the official one, or one of the model's own size."""
    config, stored = mmdit.config, mmdit.pos_embed
    side = max(defaults.width, defaults.height)
    rounding = torch.finfo(stored.dtype).eps
    errors = {
        words: (stored.float() - position_table(config.width, config.grid, *sizes)).abs().max()
        for words, sizes in {
            "the paper's for 1024 pixels after 256": (1024, 256),
            f"the paper's for {side} pixels from the first": (side, side),
        }.items()
    }
    words = min(errors, key=lambda known: float(errors[known].nan_to_num(math.inf)))
    passed = bool(errors[words] <= rounding)
    far = f"{errors[words]:.1e} from {words}"
    return Check(TITLES["mmdit"], "positions", passed, words if passed else far)


def reconstruction_check(autoencoder: Autoencoder) -> Check:
    """A drawn picture survives encoding and decoding."""
    image = drawn_picture()
    with computing_in(torch.float32, autoencoder):
        error = (autoencoder.decode(autoencoder.encode(image)).clamp(-1, 1) - image).pow(2).mean()
    psnr = 10 * math.log10(4 / max(float(error), 1e-12)) if torch.isfinite(error) else math.nan
    note = f"a drawn picture comes back at {psnr:.1f} dB"
    note += "" if psnr >= LEAST_PSNR else f", below {LEAST_PSNR:.0f}"
    return Check(TITLES["autoencoder"], "pictures", psnr >= LEAST_PSNR, note)


def alone(opened: Checkpoint, name: str) -> Iterator[Check]:
    """All checks of one part, which is loaded for them and let go."""
    yield size_check(opened.parts[name])
    module = load(opened, name)
    yield value_check(TITLES[name], module)
    if isinstance(module, MMDiT):
        yield position_check(module, opened.defaults)
    if isinstance(module, Autoencoder):
        yield reconstruction_check(module)

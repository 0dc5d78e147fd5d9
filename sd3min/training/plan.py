"""A plan for training a whole model, as a TOML file says it (`sd3-tiny.toml`)."""

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from sd3min.config import (
    LATENT_DOWNSCALING,
    AutoencoderConfig,
    CLIPConfig,
    Defaults,
    MMDiTConfig,
    Refusal,
    T5Config,
)
from sd3min.densities import check_shift
from sd3min.settings import check_call
from sd3min.training import captions, records, scenes
from sd3min.training.recipe import Recipe

STAGES = ("reconstruction", "decoder", "reading", "flow")


@dataclass(frozen=True)
class Plan:
    """What to make and how, as the TOML file has it."""

    depth: int  # of the MMDiT
    autoencoder: AutoencoderConfig
    clip: dict[str, int]  # sizes of both CLIPs
    t5: dict[str, int]
    pictures: int  # drawn and encoded once for the flow
    training_shift: float  # of times in training: where things stand is decided at high noise
    defaults: Defaults  # settings that the weights bring along
    recipes: dict[str, Recipe]  # of the stages reconstruction, decoder, reading and flow
    look_every: int  # steps between sample pictures
    prompts: list[str]  # of the sample pictures

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """Read a TOML file; Refusal names what is wrong in it."""
        try:
            return filled(cls, tomllib.loads(records.read(path)), "")
        except tomllib.TOMLDecodeError as error:
            raise Refusal(f"{path} is not TOML: {error}") from None
        except Refusal as refusal:
            raise Refusal(f"{path} is not a plan for training: {refusal}") from None

    def __post_init__(self) -> None:
        if missing := [name for name in STAGES if name not in self.recipes]:
            raise Refusal(f"recipes lack {', '.join(missing)}")
        if unknown := [name for name in self.recipes if name not in STAGES]:
            raise Refusal(f"recipes are of {', '.join(STAGES)}, not of {', '.join(unknown)}")
        if self.recipes["flow"].batch % 2:
            raise Refusal("the flow's batch must be even: each picture has two noises")
        self.check_pictures()
        sizes = {"clip": CLIPConfig, "t5": T5Config}
        for name, kind in sizes.items():
            told = getattr(self, name)
            if misnamed := told.keys() & {"vocabulary", "length"}:
                raise Refusal(f"{name} has {', '.join(misnamed)}, which the tokenizers decide")
            filled(kind, {"vocabulary": 1, **told}, f"{name}.")
        check_shift(self.training_shift)
        check_call(MMDiTConfig(self.depth), self.defaults, "")
        sizes = {"depth": self.depth, "pictures": self.pictures, "look_every": self.look_every}
        sizes |= {f"{part}.{n}": v for part in ("clip", "t5") for n, v in vars(self)[part].items()}
        for name, value in sizes.items():
            if value < 1:
                raise Refusal(f"{name} of {value} must be at least 1")
        if 2 * self.clip["width"] > self.t5["width"]:
            raise Refusal(f"t5.width of {self.t5['width']} has no room for both CLIPs' columns")

    def check_pictures(self) -> None:
        """Refuse defaults and an autoencoder that do not fit the scenes that are drawn."""
        side, own = scenes.LAYOUT_SIZE, (self.defaults.width, self.defaults.height)
        if own != (side, side):
            raise Refusal(f"defaults are {own[0]}x{own[1]}, and scenes are drawn at {side}x{side}")
        if self.defaults.t5_length != captions.LENGTH:
            told = f"defaults.t5_length of {self.defaults.t5_length}"
            raise Refusal(f"{told} must be {captions.LENGTH}, the longest caption's tokens")
        smaller = 2 ** (len(self.autoencoder.widths) - 1)
        if smaller != LATENT_DOWNSCALING:
            raise Refusal(
                f"autoencoder.widths makes latents of 1/{smaller} of a picture's side: "
                f"1/{LATENT_DOWNSCALING} are needed, as 4 widths give"
            )


def filled(kind: Any, told: Any, place: str) -> Any:
    """A value of a type from what TOML tells; Refusal names the entry that does not fit."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(told, dict):
            raise Refusal(f"{place.rstrip('.')} must be a section, not {told!r}")
        fields = {field.name: field for field in dataclasses.fields(kind)}
        types = get_type_hints(kind)
        if unknown := [name for name in told if name not in fields]:
            raise Refusal(f"{place}{unknown[0]} is not one of {', '.join(fields)}")
        needed = [n for n, f in fields.items() if f.default is dataclasses.MISSING]
        if missing := [name for name in needed if name not in told]:
            raise Refusal(f"{place}{missing[0]} is missing")
        return kind(**{n: filled(types[n], v, f"{place}{n}.") for n, v in told.items()})
    name, origin, inner = place.rstrip("."), get_origin(kind), get_args(kind)
    if origin is dict and isinstance(told, dict):
        return {key: filled(inner[1], value, f"{place}{key}.") for key, value in told.items()}
    if origin in (list, tuple) and isinstance(told, list):
        return origin(filled(inner[0], value, place) for value in told)
    if kind is float and type(told) is int:
        return float(told)
    if origin is not None or type(told) is not kind:
        wanted = {int: "a whole number", float: "a number", str: "a text"}.get(kind, "a list")
        raise Refusal(f"{name} must be {wanted}, not {told!r}")
    return told

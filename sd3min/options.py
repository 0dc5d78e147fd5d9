"""What the options of commands hold: texts, numbers, sizes and pictures, each refused if it is not.

A command is a function that adds its options to a parser, and one that runs it.
"""

import argparse
import re
from pathlib import Path
from typing import NoReturn

from PIL import Image, ImageOps

from sd3min.config import Refusal


class Parser(argparse.ArgumentParser):
    """A parser that refuses in one sentence."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print under a page of usage."""
        raise Refusal(f"{message} (see {self.prog} --help)")


def text(value: str) -> str:
    """A prompt; refused where a terminal hands it over in another encoding than UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{value!r} is not text in UTF-8") from None
    return value


def whole(value: str) -> int:
    """A whole number; refused otherwise."""
    try:
        return int(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is not a whole number") from None


def number(value: str) -> float:
    """A number; refused otherwise."""
    try:
        return float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is not a number") from None


def size(value: str) -> tuple[int, int]:
    """Width and height in pixels from "WxH"; refused otherwise."""
    found = re.fullmatch(r"(\d{1,9})x(\d{1,9})", value)
    if not found:
        raise argparse.ArgumentTypeError(f"{value!r} is not a size such as 1024x768")
    return int(found[1]), int(found[2])


def length(value: str) -> int:
    """Bytes from "5GB" or "500MB"; refused otherwise."""
    found = re.fullmatch(r"(\d{1,9})([KMG])B", value.upper())
    if not found or int(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{value!r} is not a length such as 5GB or 500MB")
    return int(found[1]) * {"K": 1_000, "M": 1_000_000, "G": 1_000_000_000}[found[2]]


def lora(value: str) -> tuple[Path, float]:
    """A file and how much it counts, from "FILE:0.8" or "FILE", which may have colons itself."""
    path, colon, scale = value.rpartition(":")
    try:
        return (Path(path), float(scale)) if colon and path else (Path(value), 1.0)
    except ValueError:
        return Path(value), 1.0


def open_image(path: Path, option: str = "--init-image", mode: str | None = "RGB") -> Image.Image:
    """A picture file, turned upright, in a mode or in its own; refused where it cannot be read."""
    if not path.exists():
        raise Refusal(f"{option} {path} does not exist: pass the path of a picture")
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            return upright.convert(mode) if mode else upright
    except Exception:  # whatever the file holds
        raise Refusal(
            f"{option} {path} is not a picture that can be read: pass a PNG or a JPEG"
        ) from None

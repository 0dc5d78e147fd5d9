"""What a picture says of itself: written into its PNG, and read back to make it again."""

import hashlib
import json
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

import sd3min
from sd3min.config import Refusal

KEY = "sd3min"  # of the PNG's text
NUMBER, OPTIONAL_TEXT = (int, float), (str, type(None))
TYPES: dict[
    str, tuple[type, ...]
] = {  # of a record's values; those up to `weights` are in every one
    "prompt": (str,),
    "negative_prompt": (str,),
    "seed": (int,),
    "width": (int,),
    "height": (int,),
    "steps": (int,),
    "guidance_scale": NUMBER,
    "shift": NUMBER,
    "t5_length": (int,),
    "versions": (dict,),
    "weights": (str,),
    "schedule": (str,),
    "sampler": (str,),
    "sigmas": (list, type(None)),
    "strength": NUMBER,
    "keep_unmasked": (bool,),
    "without_t5": (str,),
    "conventions": (str,),
    "init_image": OPTIONAL_TEXT,
    "mask_image": OPTIONAL_TEXT,
    "t5": (bool, str),
    "mmdit": OPTIONAL_TEXT,
    "dtype": (str,),
    "loras": (list,),
}
NEEDED = list(TYPES)[: list(TYPES).index("weights") + 1]
AROUND = (  # what is no call's
    *("versions", "weights", "init_image", "mask_image"),
    *("t5", "mmdit", "dtype", "loras"),
)
LONG = 100  # characters of a value that no record has, but for prompts


class Record(NamedTuple):
    """What made a picture: `pipe(**record.call)` makes it again, given the pictures it names."""

    call: dict[str, Any]  # prompt, negative_prompt, seed and settings
    versions: dict[str, str]
    weights: str  # `checkpoint.fingerprint` of the file
    init_image: str | None  # SHA-256 of the pixels of the picture that it was made from
    mask_image: str | None
    t5: bool | str | None  # whether it was there, or in which eight bits
    mmdit: str | None  # as `load` has it
    dtype: str | None
    loras: Sequence[tuple[str, str, float]] | None  # file, its fingerprint, and how much it counts

    def check_image(self, name: str, image: Image.Image | None, given: str) -> None:
        """Refuse where an `init_image` or `mask_image`, given by some words, is not the one that
        the record names.
        """
        wanted, mode = getattr(self, name), {"init_image": "RGB", "mask_image": "L"}[name]
        if wanted is None or pixel_hash(image, mode) == wanted:
            return
        mend = f"the {name.replace('_', ' ')} of SHA-256 {wanted} as {given.split(' ')[0]}"
        if image is None:
            raise Refusal(f"the picture was made from another: pass {mend}")
        raise Refusal(f"{given} is not what the picture was made from: pass {mend}")


def current_versions() -> dict[str, str]:
    """Versions of what computes a picture."""
    read = {"transformers": metadata.version("transformers")}  # importing it takes a second
    return {"sd3min": sd3min.__version__, "torch": torch.__version__} | read


def pixel_hash(image: Image.Image | None, mode: str = "RGB") -> str | None:
    """SHA-256 of a picture's size and pixels, in RGB or, for masks, in grey (mode L)."""
    if image is None:
        return None
    size = f"{mode} {image.width}x{image.height} ".encode()
    return hashlib.sha256(size + image.convert(mode).tobytes()).hexdigest()


def dumps(record: dict[str, Any]) -> str:
    """A record as text; NumPy's numbers are numbers."""
    return json.dumps(record, ensure_ascii=False, default=lambda value: value.item())


def read_record(path: str | Path) -> Record:
    """The record of a PNG that sd3min wrote.

    Refuses where there is none, or where it is damaged; whether its settings make sense is for the
    call to say.
    """
    try:
        with Image.open(path) as image:
            text = image.info.get(KEY)
    except FileNotFoundError:
        raise Refusal(f"{path} does not exist: pass a picture that sd3min made") from None
    except Exception:  # whatever the file holds
        raise Refusal(f"{path} is not a picture that can be read: pass a PNG") from None
    if text is None:
        raise Refusal(f"{path} holds no record of sd3min: pass a PNG that sd3min wrote")
    return parse(text, path)


def parse(text: Any, path: str | Path) -> Record:
    """A record from a PNG's text, whatever that is; refused where a value cannot be."""
    try:
        values: Any = json.loads(text)
        wrong = [name for name in NEEDED if name not in values]
        wrong += [name for name, value in values.items() if not is_sound(name, value)]
    except (AttributeError, TypeError, ValueError, RecursionError):
        values, wrong = {}, ["every value"]
    if wrong:
        mend = "pass a PNG as sd3min wrote it"
        raise Refusal(f"the record of {path} is damaged in {', '.join(wrong)[:LONG]}: {mend}")
    call = {name: value for name, value in values.items() if name not in AROUND}
    return Record(call, **{name: values.get(name) for name in AROUND})


def is_sound(name: str, value: Any) -> bool:
    """Whether a record may hold a value: of a known name, of its type, and not too long."""
    known = type(value) in TYPES.get(name, ())
    if name == "loras":
        return known and all(is_lora(lora) for lora in value)
    if isinstance(value, list):
        return known and all(type(part) in NUMBER for part in value)
    if isinstance(value, dict):
        return known and all(type(part) is str and len(part) < LONG for part in value.values())
    return known and (name.endswith("prompt") or len(str(value)) < LONG)


def is_lora(value: Any) -> bool:
    """Whether this is the name of a file, a fingerprint and a number."""
    named = isinstance(value, list) and list(map(type, value[:2])) == [str, str]
    return named and len(value) == 3 and type(value[2]) in NUMBER and len(str(value)) < 5 * LONG

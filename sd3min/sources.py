"""Which parts a path holds: an official file, a file of one part, or a folder of either kind.

The names in the headers tell it: official files have a prefix for each part, files of one part have
none, and diffusers has other names for the MMDiT and the autoencoder.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from sd3min.config import CLIP_L, Refusal
from sd3min.formats import Recipe, numbers, recipes
from sd3min.parts import DERIVED, PREFIXES, TITLES, Part
from sd3min.stored import AnyStored, Joined, Stored, read_header

FOLDERS = {  # of a diffusers checkpoint
    "transformer": "mmdit",
    "vae": "autoencoder",
    "text_encoder": "clip_l",
    "text_encoder_2": "clip_g",
    "text_encoder_3": "t5",
}
MARKS = {  # how some names begin in each part, and in no other architecture
    "mmdit": "joint_blocks.",
    "autoencoder": "decoder.up.",
    "clip_l": "text_model.",
    "clip_g": "text_model.",
    "t5": "encoder.block.",
}
DIFFUSERS_MARKS = {"mmdit": "transformer_blocks.", "autoencoder": "decoder.up_blocks."}
UNUSED = ("position_ids", "logit_scale", "spiece_model", "scaled_fp8", "scale_input")
SCALE, WEIGHT = ".scale_weight", ".weight"  # scaled fp8: one beside the other
STRANGERS = {  # what a file is that holds such names
    "lora": "a LoRA",
    "input_blocks.": "Stable Diffusion 1, 2 or XL",
    "double_blocks.": "Flux",
    "control": "a ControlNet",
}


class Source(NamedTuple):
    """Files that belong together: one, or the shards that an index lists."""

    path: Path  # to name in messages
    files: Sequence[Path]
    part: str = ""  # where the folder's name tells it


class Found(NamedTuple):
    """What was found at a path: the parts and the files' metadata."""

    parts: dict[str, Part]
    metadata: dict[str, str]


def open_path(path: Path) -> Found:
    """The parts that a file or a folder holds; only headers are read.

    Raises Refusal where a file is damaged or of something else, and where two hold the same part.
    """
    parts, metadata = {}, {}
    for source in sources(path):
        found = open_source(source)
        if twice := parts.keys() & found.parts.keys():
            name = min(twice)
            raise Refusal(
                f"{parts[name].path} and {source.path} both hold the {TITLES[name]}: "
                "pass the files that are meant, one by one, in place of their folder"
            )
        parts |= found.parts
        metadata |= found.metadata
    return Found({name: parts[name] for name in TITLES if name in parts}, metadata)


def sources(path: Path) -> list[Source]:
    """The files at a path, grouped: of a diffusers folder, of a folder of files, or one file."""
    if not is_folder(path):
        return [Source(path, [path])]
    named = [path / name for name in FOLDERS if (path / name).is_dir()]
    folders = named or [path, path / "text_encoders"]
    found = [
        Source(source.path, source.files, FOLDERS[folder.name] if named else "")
        for folder in folders
        for source in grouped(folder)
    ]
    if not found:
        raise Refusal(
            f"{path} holds no .safetensors files: pass an official file, a folder of such files or "
            "a diffusers folder"
        )
    return found


def is_folder(path: Path) -> bool:
    """Whether a path is a folder; one that cannot be looked at is none."""
    try:
        return path.is_dir()
    except OSError:
        return False


def grouped(folder: Path) -> list[Source]:
    """The safetensors files of a folder; those in float16 only where the plain ones are missing."""
    shards = {path: index_files(path) for path in sorted(folder.glob("*.safetensors.index*.json"))}
    listed = {file for files in shards.values() for file in files}
    singles = [path for path in sorted(folder.glob("[!.]*.safetensors")) if path not in listed]
    found = [Source(path, files) for path, files in shards.items()]
    found += [Source(path, [path]) for path in singles]
    plain = {stem(source.path) for source in found if ".fp16" not in source.path.name}
    return [s for s in found if ".fp16" not in s.path.name or stem(s.path) not in plain]


def stem(path: Path) -> str:
    """What the plain files and their variant in float16 have in common."""
    return path.name.partition(".")[0]


def index_files(path: Path) -> list[Path]:
    """The shards that an index lists, each of which is there."""
    try:
        names = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        if not names or any(name != Path(name).name for name in names):
            raise ValueError("names of files elsewhere")
    except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError):
        raise Refusal(f"{path} is no index of shards: copy or download it again") from None
    if missing := [name for name in names if not (path.parent / name).exists()]:
        raise Refusal(f"{path} lists {', '.join(missing)}, not there: copy or download it too")
    return [path.parent / name for name in names]


def open_source(source: Source) -> Found:
    """The parts that one file or a group of shards holds."""
    stored, metadata = {}, {}
    for file in source.files:
        tensors, said = read_header(file)
        stored |= {tensor.name: tensor for tensor in tensors}
        metadata |= said
    if not stored:
        raise Refusal(f"{source.path} holds no tensors: pass an official Stable Diffusion 3 file")
    extras = {name: t for name, t in stored.items() if name.endswith(UNUSED)}
    found: dict[str, dict[str, Stored]] = {}
    for name, tensor in scaled({n: t for n, t in stored.items() if n not in extras}).items():
        part = next((p for p, start in PREFIXES.items() if name.startswith(start)), "")
        found.setdefault(part, {})[name.removeprefix(PREFIXES.get(part, ""))] = tensor
    if "" in found and (part := source.part or bare_part(found[""])) not in found:
        found[part] = found.pop("")
    for part, tensors in found.items():
        marks = (MARKS.get(part), DIFFUSERS_MARKS.get(part))
        if not any(name.startswith(mark) for mark in marks if mark for name in tensors):
            raise stranger(source.path, next(iter(tensors.values())).name)
    parts = {name: make_part(name, source.path, found[name]) for name in TITLES if name in found}
    for name, tensor in extras.items():
        place = next((p for p, start in PREFIXES.items() if name.startswith(start)), "")
        if owner := parts.get(place) or (next(iter(parts.values())) if len(parts) == 1 else None):
            owner.extras[name.removeprefix(PREFIXES.get(place, ""))] = tensor
    return Found(parts, metadata)


def stranger(path: Path, name: str) -> Refusal:
    """The sentence about a file of something else."""
    looks = next((f"{kind}, as it " for mark, kind in STRANGERS.items() if mark in name), "")
    return Refusal(
        f"{path} {looks and 'looks like '}{looks}holds {name}, which is in no official Stable "
        "Diffusion 3 file: pass one of those"
    )


def scaled(stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """Scaled fp8: every weight takes in the scale that lies beside it."""
    scales = {
        name.removesuffix(SCALE) + WEIGHT: tensor
        for name, tensor in stored.items()
        if name.endswith(SCALE) and name.removesuffix(SCALE) + WEIGHT in stored
    }
    taken = {scale.name for scale in scales.values()}
    return {
        name: replace(tensor, scale=scales.get(name))
        for name, tensor in stored.items()
        if name not in taken
    }


def bare_part(tensors: Mapping[str, Stored]) -> str:
    """The part whose names have no prefix; of the CLIPs, CLIP-L is 768 wide or does not project."""
    marks = [*MARKS.items(), *DIFFUSERS_MARKS.items()]
    part = next((p for p, mark in marks if any(n.startswith(mark) for n in tensors)), "")
    projection = tensors.get("text_projection.weight")
    if part == "clip_l" and projection and projection.shape[:1] != [CLIP_L.width]:
        return "clip_g"
    return part


def make_part(name: str, path: Path, stored: dict[str, Stored]) -> Part:
    """A part of stored tensors, under official names."""
    tensors: dict[str, AnyStored] = dict(stored)
    known: Mapping[str, Recipe] = {}
    mark = DIFFUSERS_MARKS.get(name)
    if mark and any(own.startswith(mark) for own in stored):
        tensors, known = renamed(stored)
    extras = {}
    if name == "clip_l" and DERIVED[name] in stored:
        tensors.pop(DERIVED[name])
        extras[DERIVED[name]] = stored[DERIVED[name]]
    if name == "t5" and (embedding := tensors.pop(DERIVED[name], None)):
        if "shared.weight" in stored:
            extras[DERIVED[name]] = stored[DERIVED[name]]
        tensors.setdefault("shared.weight", embedding)
    return Part(name, path, tensors, extras, known)


def renamed(stored: dict[str, Stored]) -> tuple[dict[str, AnyStored], dict[str, Recipe]]:
    """diffusers' tensors under official names, with the table; those that do not fit it as is."""
    known = recipes(numbers({name: tensor.shape for name, tensor in stored.items()}))
    left, made = dict(stored), {}
    for official, recipe in known.items():
        pieces = [stored[name] for name in recipe.names if name in stored]
        shapes = {tuple(piece.shape) for piece in pieces}
        if len(pieces) == len(recipe.names) and len(shapes) == 1:
            made[official] = Joined.of(official, pieces, recipe.make)
            for piece in pieces:
                del left[piece.name]
    return made | left, known

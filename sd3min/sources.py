"""Which parts a path holds: an official file, a file of one part, or a folder of either kind.

The names in the headers tell it: official files have a prefix for each part, files of one part have
none, and diffusers has other names for the MMDiT and the autoencoder.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from sd3min.config import CLIP_L, Refusal
from sd3min.formats import Recipe, numbers, recipes
from sd3min.parts import DERIVED, PREFIXES, TITLES, Part, Unfit, some, unfitness
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
FP16 = ".fp16"  # in the names of files of that variant
QUANTISED = (".comfy_quant", ".weight_scale", ".absmax", ".SCB")  # kinds that are not read
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
    """The files at a path, grouped: of a diffusers folder, a folder or one; refused if none."""
    if not is_folder(path):
        return [Source(path, [path], FOLDERS.get(path.parent.name, ""))]
    named = [path / name for name in FOLDERS if is_folder(path / name)]
    folders = named or [path, path / "text_encoders"]
    found = [source for folder in folders for source in grouped(folder)]
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
    part = FOLDERS.get(folder.name, "")
    indices = sorted(folder.glob("*.safetensors.index*.json"))
    groups = [Source(index, shards(index), part) for index in indices]
    taken = {file for group in groups for file in group.files}
    files = sorted(set(folder.glob("[!.]*.safetensors")) - taken)
    if stray := next((file for file in files if re.search(r"-\d+-of-\d+\.", file.name)), None):
        raise Refusal(f"{stray} is a shard that no index beside it lists: copy the index too")
    groups = [group for group in groups if group.files]
    groups += [Source(file, [file], part) for file in files]
    plain = {stem(group.path) for group in groups if FP16 not in group.path.name}
    return [g for g in groups if FP16 not in g.path.name or stem(g.path) not in plain]


def stem(path: Path) -> str:
    """What the names of plain files and of their variant in float16 begin with."""
    return re.split(r"\.fp16|\.safetensors", path.name)[0]


def shards(index: Path) -> list[Path]:
    """The files that an index lists; none if no single one is there, as where only the variant in
    float16 was downloaded.
    """
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if any(name != Path(name).name for name in names):
            raise ValueError("files of another folder")
        missing = [name for name in names if not (index.parent / name).exists()]
    except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError):
        raise Refusal(f"{index} is no index of shards: copy or download it again") from None
    if 0 < len(missing) < len(names):
        raise Refusal(f"{index} lists {', '.join(missing)}, missing there: copy or download it too")
    return [index.parent / name for name in names if not missing]


def open_source(source: Source) -> Found:
    """The parts that one file or a group of shards holds; refused where tensors are of none."""
    stored, metadata = {}, {}
    for file in source.files:
        tensors, said = read_header(file)
        if twice := stored.keys() & {tensor.name for tensor in tensors}:
            raise Refusal(f"two shards of {source.path} hold {min(twice)}: download them again")
        stored |= {tensor.name: tensor for tensor in tensors}
        metadata |= said
    if not stored:
        raise Refusal(f"{source.path} holds no tensors: pass an official Stable Diffusion 3 file")
    if quantised := [name for name in stored if name.endswith(QUANTISED)]:
        mend = "pass a file in float16, bfloat16 or fp8, plain or with scale_weight"
        raise Refusal(f"{source.path} is quantised in a way not read ({some(quantised)}): {mend}")
    extras = {name: t for name, t in stored.items() if name.rpartition(".")[2] in UNUSED}
    found = by_part(scaled({n: t for n, t in stored.items() if n not in extras}))
    projects = "" in found and source.part == "clip_l"
    if "" in found and (part := source.part or bare_part(found[""])) not in found:
        found[part] = found.pop("")
    known = {name for name, tensors in found.items() if name and is_part(name, tensors)}
    parts = {
        name: make_part(name, source.path, found[name], projects)
        for name in TITLES
        if name in known
    }
    if strange := [t.name for name in found if name not in known for t in found[name].values()]:
        raise unknown(source.path, strange, parts)
    for place, tensors in by_part(extras).items():
        if owner := parts.get(place) or (next(iter(parts.values())) if len(parts) == 1 else None):
            owner.extras.update(tensors)
    return Found(parts, metadata)


def by_part(stored: Mapping[str, Stored]) -> dict[str, dict[str, Stored]]:
    """Tensors by the part that their prefix tells, "" where there is none; without it."""
    found: dict[str, dict[str, Stored]] = {}
    for name, tensor in stored.items():
        part = next((p for p, start in PREFIXES.items() if name.startswith(start)), "")
        found.setdefault(part, {})[name.removeprefix(PREFIXES.get(part, ""))] = tensor
    return found


def is_part(part: str, names: Iterable[str]) -> bool:
    """Whether these are names of the part, official or diffusers'."""
    marks = tuple(table[part] for table in (MARKS, DIFFUSERS_MARKS) if part in table)
    return any(name.startswith(marks) for name in names)


def unknown(path: Path, names: list[str], parts: Mapping[str, Part]) -> Refusal:
    """The refusal of a file with tensors of nothing known, and what else is wrong with it."""
    kinds = (kind for mark, kind in STRANGERS.items() if any(mark in name for name in names))
    looks = f"looks like {kind} and " if not parts and (kind := next(kinds, "")) else ""
    which = "which is" if len(names) == 1 else "which are"
    fault = f"{path} {looks}holds {some(names)}, {which} in no official Stable Diffusion 3 file"
    faults = unfitness(parts.values())
    return Unfit(fault, *faults) if parts else Refusal(f"{fault}: pass one of those")


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


def make_part(name: str, path: Path, stored: dict[str, Stored], projects: bool = False) -> Part:
    """A part of stored tensors, under official names.

    A CLIP-L `projects` its pooled vector where diffusers does: with what a folder of diffusers has
    for it. The official code does not, and passes over what a file has.
    """
    tensors, known = dict[str, AnyStored](stored), {}
    if name in DIFFUSERS_MARKS and any(own.startswith(DIFFUSERS_MARKS[name]) for own in stored):
        tensors, known = renamed(stored)
    extras = {}
    unread = name == "t5" or (name == "clip_l" and not projects)
    if unread and (derived := DERIVED[name]) in stored:
        extras[derived] = stored[derived]
        del tensors[derived]
    if name == "t5" and "shared.weight" not in tensors and extras:
        tensors["shared.weight"] = extras.pop(DERIVED[name])
    return Part(name, path, tensors, extras, known)


def renamed(stored: dict[str, Stored]) -> tuple[dict[str, AnyStored], dict[str, Recipe]]:
    """diffusers' tensors under official names, with the table; those that do not fit it as is."""
    known = recipes(numbers({name: tensor.shape for name, tensor in stored.items()}))
    left, made = dict[str, AnyStored](stored), dict[str, AnyStored]()
    for official, recipe in known.items():
        pieces = [stored[name] for name in recipe.names if name in stored]
        shapes = {tuple(piece.shape) for piece in pieces}
        if len(pieces) == len(recipe.names) and len(shapes) == 1 and shapes != {()}:
            made[official] = Joined.of(official, pieces, recipe.back)
            for name in recipe.names:
                del left[name]
    return left | made, known

"""Official single file to diffusers folder and back: every tensor as it was, one at a time.

Scaled fp8 alone, which diffusers does not know, becomes the float32 that it stands for. An official
file can lack what a folder needs, name its tensors without a prefix or hold some that a folder has
no place for. So beside the parts a folder gets a small file, `official.safetensors`: its
metadata is the official file's and says which names that had, and its tensors are what was left.
"""

import json
import shutil
import warnings
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from sd3min.checkpoint import DEFAULTS, AnyPath, AnyPaths, Checkpoint, read_defaults
from sd3min.config import MMDiTConfig, Refusal
from sd3min.folder import COMPONENTS, component_config, model_index, scheduler_config
from sd3min.formats import SUFFIXES, Row, rows
from sd3min.mmdit import position_table
from sd3min.parts import DERIVED, PREFIXES, TITLES, Part
from sd3min.stored import AnyStored, Stored, read_header
from sd3min.writer import TYPES, Lazy, new, write_json, write_shards, write_tensors

RECORD = "official.safetensors"
NAMES = "sd3min.official"  # metadata of the record: names in the official file, and prefixed ones
TABLE = PREFIXES["mmdit"] + DERIVED["mmdit"]
OTHER_FORMATS = (".bin", ".ckpt", ".gguf", ".pt", ".pth")
PROJECTION = DERIVED["clip_l"]

Tensors = dict[str, Lazy]


def convert(
    source: AnyPaths,
    target: AnyPath,
    text_encoders: AnyPaths | None = None,
    tokenizers: AnyPath | None = None,
    shard_size: int | None = None,
    progress: bool = True,
) -> Path:
    """Write what `source` holds to `target`: an official single file where that name ends in
    .safetensors, else a diffusers folder.

    `text_encoders`: files of encoders to put in too. `tokenizers`: the folder that holds
    `tokenizer`, `tokenizer_2` and `tokenizer_3`, by default the source's; only a diffusers folder
    gets them. `shard_size`: bytes above which a part of a folder is split, by default 10 GB, and
    5 GB for text encoders. Raises Refusal where a file does not fit or the target exists; nothing
    half-written is left.
    """
    target = Path(target)
    single = target.suffix == ".safetensors"
    if target.suffix in OTHER_FORMATS:
        raise Refusal(f"{target} is named like another format: end it with .safetensors")
    options = {"tokenizers": tokenizers, "shard_size": shard_size}
    if single and (given := [name for name, value in options.items() if value is not None]):
        mend = "leave that out, or pass the name of a folder"
        raise Refusal(f"{target} is a single file, which takes no {' and no '.join(given)}: {mend}")
    opened = Checkpoint.open(source, text_encoders, tokenizers)
    opened.require(list(opened.parts))
    if scaled := [TITLES[name] for name, part in opened.parts.items() if is_scaled(part)]:
        said = "is multiplied and written in float32, four times as long"
        warnings.warn(f"scaled fp8 of {', '.join(scaled)} {said}", stacklevel=2)
    if single:
        to_file(opened, target, progress)
    else:
        to_folder(opened, target, shard_size, progress)
    return target


def to_file(opened: Checkpoint, target: Path, progress: bool) -> None:
    """Write an official single file."""
    tensors, metadata = official_tensors(opened), opened.metadata
    if (opened.path / RECORD).is_file():
        tensors, metadata = restored(tensors, opened.path)
    metadata = with_shift(metadata, opened)
    needed = sum(tensor.bytes for tensor in tensors.values())
    with new(target, needed) as file, progress_bar(needed, target, progress) as bar:
        write_tensors(file, tensors, metadata, bar.update)


def with_shift(metadata: dict[str, str], opened: Checkpoint) -> dict[str, str]:
    """Metadata with the shift of a folder's scheduler, where it says another one."""
    shift = opened.defaults.shift
    if read_defaults(opened.path, metadata).shift == shift:
        return metadata
    said = json.loads(metadata.get(DEFAULTS, "{}")) | {"shift": shift}
    return metadata | {DEFAULTS: json.dumps(said)}


def to_folder(opened: Checkpoint, target: Path, shard_size: int | None, progress: bool) -> None:
    """Write a diffusers folder."""
    for name in opened.parts:
        if COMPONENTS[name].tokenizer:
            opened.load_tokenizer(name)  # refused where diffusers could not load it either
    contents = {name: diffusers_tensors(part) for name, part in opened.parts.items()}
    kept, metadata = record(opened)
    everything = [tensor for tensors in (*contents.values(), kept) for tensor in tensors.values()]
    needed = sum(tensor.bytes for tensor in everything)
    with new(target, needed) as folder, progress_bar(needed, target, progress) as bar:
        folder.mkdir()
        for name, tensors in contents.items():
            component = COMPONENTS[name]
            place, limit = folder / component.folder, shard_size or component.shard
            place.mkdir()
            write_json(place / "config.json", component_config(opened.parts[name], opened.defaults))
            said = {"format": "pt"} | (opened.metadata if name == "mmdit" else {})
            write_shards(place, component.stem, tensors, said, limit, bar.update)
            if component.tokenizer:
                files = component.tokenizer[0]
                shutil.copytree(opened.tokenizers / files, folder / files)
        (folder / "scheduler").mkdir()
        schedule = scheduler_config(opened.defaults)
        write_json(folder / "scheduler" / "scheduler_config.json", schedule)
        write_json(folder / "model_index.json", model_index(opened.parts))
        if metadata:
            write_tensors(folder / RECORD, kept, metadata, bar.update)


def lazy(stored: AnyStored) -> Lazy:
    """A tensor to be written as stored or times its scale; refused where that would lose."""
    if stored.scale is not None:
        return Lazy(stored.shape, "F32", partial(stored.load, torch.float32, torch.device("cpu")))
    if stored.dtype not in TYPES:
        raise Refusal(
            f"{stored.paths[0]} has {stored.name} in {stored.dtype}, which cannot be converted "
            "without loss: pass a file in float16 or bfloat16"
        )
    return Lazy(stored.shape, stored.dtype, stored.read)


def own_tensors(part: Part) -> Tensors:
    """A part's tensors by their official names, with those that no module takes."""
    return {name: lazy(stored) for name, stored in (part.tensors | kept_extras(part)).items()}


def kept_extras(part: Part) -> dict[str, Stored]:
    """What no module takes, without the marks of scaled fp8 where it is written as float32."""
    marks = ("scaled_fp8", "scale_input") if is_scaled(part) else ()
    return {name: t for name, t in part.extras.items() if name.rpartition(".")[2] not in marks}


def is_scaled(part: Part) -> bool:
    """Whether a part has scaled fp8."""
    return any(tensor.scale is not None for tensor in part.tensors.values())


def official_tensors(opened: Checkpoint) -> Tensors:
    """The tensors of an official file of all parts; refused where it cannot say what they are."""
    tensors = {
        PREFIXES[name] + official: tensor
        for name, part in opened.parts.items()
        for official, tensor in own_tensors(part).items()
    }
    part = opened.parts.get("clip_l")
    if part and PROJECTION in part.tensors:
        values = part.tensors[PROJECTION].load(torch.float32, torch.device("cpu"))
        if not torch.equal(values, torch.eye(part.config.width)):
            raise Refusal(
                f"the CLIP-L in {part.path} projects its pooled vector, which no official file can "
                "say: pass a folder where text_projection.weight is the identity"
            )
        del tensors[PREFIXES["clip_l"] + PROJECTION]
    return tensors


def diffusers_tensors(part: Part) -> Tensors:
    """A part's tensors as diffusers names and shapes them, with those that it cannot do without."""
    tensors, config = own_tensors(part), part.config
    if part.name == "clip_l" and PROJECTION not in part.tensors:
        dtype = tensors["text_model.embeddings.token_embedding.weight"].dtype
        read = partial(torch.eye, config.width, dtype=TYPES[dtype])
        tensors[PROJECTION] = Lazy([config.width] * 2, dtype, read)
    if COMPONENTS[part.name].tokenizer:
        return tensors  # text encoders have the same names in both
    if part.name == "mmdit" and DERIVED["mmdit"] not in tensors:
        dtype = tensors["x_embedder.proj.weight"].dtype
        shape = [1, config.grid**2, config.width]
        read = partial(computed_table, config, TYPES[dtype])
        tensors[DERIVED["mmdit"]] = Lazy(shape, dtype, read)
    named = {}
    for row in rows(config):
        for suffix in SUFFIXES:
            if tensor := tensors.pop(row.official + suffix, None):
                named |= pieces(row, suffix, tensor)
    return named | tensors


def computed_table(config: MMDiTConfig, dtype: torch.dtype) -> Tensor:
    """The positional table of a file that leaves it out."""
    return position_table(config.width, config.grid).to(dtype)


def pieces(row: Row, suffix: str, tensor: Lazy) -> Tensors:
    """diffusers' tensors for an official one; each reads it when its turn comes."""

    def split(whole: Tensor) -> tuple[Tensor, ...]:
        return row.there(whole).chunk(len(row.diffusers))

    def piece(i: int) -> Tensor:
        return split(tensor.read())[i]

    shapes = [list(made.shape) for made in split(torch.empty(tensor.shape, device="meta"))]
    return {
        name + suffix: Lazy(shape, tensor.dtype, partial(piece, i))
        for i, (name, shape) in enumerate(zip(row.diffusers, shapes, strict=True))
    }


def record(opened: Checkpoint) -> tuple[Tensors, dict[str, str]]:
    """What a folder cannot say of its official file: tensors without a place, and metadata."""
    if opened.path.is_dir():
        stored, metadata = read_record(opened.path)
        return {tensor.name: lazy(tensor) for tensor in stored}, metadata
    stored, metadata = read_header(opened.path)
    places = {
        tensor.name: PREFIXES[name] + official
        for name, part in opened.parts.items()
        for official, tensor in (part.tensors | part.extras).items()
        if (name, official) != ("clip_l", PROJECTION)
    }
    if not places.keys() <= {tensor.name for tensor in stored}:
        return {}, metadata  # parts of several files come back as one
    if any(is_scaled(part) for part in opened.parts.values()):
        return {}, metadata  # the scales have no place any more
    names = {tensor.name: places.get(tensor.name, "") for tensor in stored}
    kept = {tensor.name: lazy(tensor) for tensor in stored if tensor.name not in places}
    return kept, metadata | {NAMES: json.dumps(names)}


def read_record(folder: Path) -> tuple[list[Stored], dict[str, str]]:
    """The record of a folder that was converted; nothing where there is none."""
    path = folder / RECORD
    return read_header(path) if path.is_file() else ([], {})


def restored(tensors: Tensors, folder: Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors under the names of the file that a folder was made of, and its metadata.

    A folder whose parts were changed since then keeps the usual names. Refused where the record is
    damaged.
    """
    stored, metadata = read_record(folder)
    kept = {tensor.name: lazy(tensor) for tensor in stored}
    try:
        names = json.loads(metadata.pop(NAMES, "{}"))
        taken = {place for place in names.values() if place}
        if taken <= tensors.keys() <= taken | {TABLE}:
            tensors = {n: tensors[place] if place else kept[n] for n, place in names.items()}
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        mend = "remove it, or copy the folder again"
        raise Refusal(f"{folder / RECORD} is damaged: {mend}") from None
    return tensors, metadata


def progress_bar(total: int, target: Path, shown: bool) -> tqdm:
    """Bytes written so far."""
    return tqdm(total=total, unit="B", unit_scale=True, desc=target.name, disable=not shown)

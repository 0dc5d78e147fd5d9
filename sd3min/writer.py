"""Safetensors files written one tensor at a time: the header first, then each tensor as it is made.

A file is its header's length in 8 bytes, the header in JSON, and the tensors' bytes without a gap.
What is written appears under its name when it is whole, and not at all if anything fails.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sd3min.config import Refusal
from sd3min.files import whole
from sd3min.stored import TYPES

HEADER_STEP = 8  # bytes that a header's length is a multiple of, so that the tensors are aligned


class Lazy(NamedTuple):
    """A tensor that is known by its shape and type, and made when asked for."""

    shape: Sequence[int]
    dtype: str
    read: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """Its length in a file."""
        return torch.Size(self.shape).numel() * TYPES[self.dtype].itemsize


def header(tensors: Mapping[str, Lazy], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a file that holds the tensors in this order."""
    described: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.bytes
        described[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    return packed(described)


def packed(described: Mapping[str, object]) -> bytes:
    """A header of these entries."""
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % HEADER_STEP)
    return struct.pack("<Q", len(text)) + text


def content(name: str, tensor: Lazy) -> memoryview:
    """A tensor's bytes; an error where it is not as announced."""
    made = tensor.read()
    if (list(made.shape), made.dtype) != (list(tensor.shape), TYPES[tensor.dtype]):
        raise RuntimeError(f"{name} is {made.dtype} {list(made.shape)} and not as announced")
    return made.contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_tensors(
    path: Path,
    tensors: Mapping[str, Lazy],
    metadata: Mapping[str, str],
    on_write: Callable[[int], object] = lambda count: None,
) -> None:
    """Write a safetensors file, the widest types first; `on_write` is told the bytes of each."""
    widest_first = sorted(tensors.items(), key=lambda item: -TYPES[item[1].dtype].itemsize)
    with path.open("wb") as file:
        file.write(header(dict(widest_first), metadata))
        for name, tensor in widest_first:
            file.write(content(name, tensor))
            on_write(tensor.bytes)


def split(tensors: Mapping[str, Lazy], limit: int) -> list[dict[str, Lazy]]:
    """Shards in order: each is filled until the next tensor would make it longer than `limit`."""
    shards: list[dict[str, Lazy]] = [{}]
    length = 0
    for name, tensor in tensors.items():
        if shards[-1] and length + tensor.bytes > limit:
            shards.append({})
            length = 0
        shards[-1][name] = tensor
        length += tensor.bytes
    return shards


def write_shards(
    folder: Path,
    stem: str,
    tensors: Mapping[str, Lazy],
    metadata: Mapping[str, str],
    limit: int,
    on_write: Callable[[int], object] = lambda count: None,
) -> None:
    """Write one file, or shards of at most `limit` bytes and the index that says where each is."""
    shards = split(tensors, limit)
    if len(shards) == 1:
        write_tensors(folder / f"{stem}.safetensors", tensors, metadata, on_write)
        return
    places = {}
    for i, shard in enumerate(shards, 1):
        file = f"{stem}-{i:05}-of-{len(shards):05}.safetensors"
        write_tensors(folder / file, shard, metadata, on_write)
        places |= dict.fromkeys(shard, file)
    total = sum(tensor.bytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    write_json(folder / f"{stem}.safetensors.index.json", index)


def write_json(path: Path, value: object) -> None:
    """Write JSON as diffusers does: indented, with a line break at the end."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextmanager
def new(target: Path, needed: int = 0) -> Iterator[Path]:
    """A name beside `target` to write a file or a folder of `needed` bytes to.

    It takes the target's name at the end, and is gone if anything fails; what exists is not
    replaced. Refused where the target exists, its disk is too full or writing fails.
    """
    if os.path.lexists(target):
        raise Refusal(f"{target} exists: remove it first, or pass another name")
    try:
        free = shutil.disk_usage(target.parent).free
        if needed > free:
            sizes = f"{needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB left"
            raise Refusal(f"{target} needs {sizes}: make room, or pass a place on another disk")
        with whole(target) as part:
            yield part
    except OSError as error:
        reason = error.strerror or error
        raise Refusal(f"{target} cannot be written ({reason}): pass another place") from None

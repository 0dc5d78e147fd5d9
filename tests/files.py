"""Safetensors files for the tests: sparse ones of any size, and the layouts of the official."""

import gzip
import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

SHARED = Path(__file__).parents[2] / "shared"
MANIFESTS = SHARED / "official_manifests.json.gz"
TOKENIZERS = SHARED / "tokenizers"
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1}


def sparse(
    path: Path,
    shapes: Mapping[str, Sequence[int]],
    dtype: str = "F16",
    others: Mapping[str, str] | None = None,
) -> Path:
    """Write a file of zeros: a header, and a hole of the tensors' length.

    `others`: the types of tensors whose names begin so.
    """
    header, end = {}, 0
    for name, shape in shapes.items():
        given = (kind for start, kind in (others or {}).items() if name.startswith(start))
        kind = next(given, dtype)
        start, end = end, end + BYTES[kind] * math.prod(shape)
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    return write_header(path, json.dumps(header).encode(), end)


def write_header(path: Path, header: bytes, length: int = 0) -> Path:
    """Write a header as it is, and a hole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + length)
    return path


def manifests() -> dict[str, dict[str, list[int]]]:
    """Names and shapes of every tensor of the official files, where the list is at hand."""
    return json.loads(gzip.decompress(MANIFESTS.read_bytes())) if MANIFESTS.is_file() else {}

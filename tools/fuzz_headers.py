"""Open damaged safetensors files, thousands of them: python tools/fuzz_headers.py [--count 10000].

Every file starts as a sound official one of small random networks and is damaged in one to three
ways: bytes flipped, the header's length wrong, its JSON changed, the file cut or longer. Opening
and loading it must either work or end in a Refusal: another error, or more memory than the file is
long, stops the run with the seed of the file.
"""

import argparse
import json
import random
import resource
import struct
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1] / "tests"))

import small

from sd3min.checkpoint import Checkpoint
from sd3min.config import LONGEST_SENTENCE, Refusal

SLACK = 64 << 20  # bytes by which the process may grow beside what it maps of the file
VALUES: list[Any] = [
    *(None, True, -1, 0, 1, 2**31, 2**63, 2**64, 1e300, "", "F8_E4M3", "F64", "I8", "Q4_0"),
    *([], {}, [0], [-1], [2**40, 2**40], [1.5], ["1"], [[1]], "\ud800", "x" * 5000),
]


def sound_file(folder: Path) -> bytes:
    """An official file with all parts."""
    path = small.save_official(small.pipeline(folder), folder / "sound.safetensors")
    return path.read_bytes()


def flip_bytes(header: bytes, body: bytes, rng: random.Random) -> tuple[bytes, bytes]:
    """A few bytes of the header become others."""
    changed = bytearray(header)
    for _ in range(rng.choice((1, 2, 8, 64)) if header else 0):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed), body


def change_json(header: bytes, body: bytes, rng: random.Random) -> tuple[bytes, bytes]:
    """A tensor's entry, or one of its values, becomes something else, goes or is doubled."""
    try:
        entries = json.loads(header)
        name = rng.choice(list(entries))
        entry = entries[name]
        kind = rng.randrange(6)
        if kind == 0:
            del entries[name]
        elif kind == 1:
            entries[name + rng.choice((".", "x", "\0", ".scale_weight"))] = entries.pop(name)
        elif kind == 2:
            entries[name] = rng.choice(VALUES)
        elif kind == 3:
            entry[rng.choice(list(entry))] = rng.choice(VALUES)
        elif kind == 4:
            values = entry[rng.choice(("shape", "data_offsets"))]
            values[rng.randrange(len(values))] = rng.choice(VALUES)
        else:
            entry["shape"] = rng.choice((entry["shape"][::-1], [*entry["shape"], 1], [1]))
        return json.dumps(entries).encode(), body
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError):
        return header, body  # damaged before


def cut_or_lengthen(header: bytes, body: bytes, rng: random.Random) -> tuple[bytes, bytes]:
    """Less of the tensors' values than the header says, or more."""
    return header, rng.choice((body[: rng.randrange(len(body) + 1)], body + bytes(64), b""))


def nest(header: bytes, body: bytes, rng: random.Random) -> tuple[bytes, bytes]:
    """JSON as deep as the header is long, or metadata that is not text."""
    deep = b"[" * rng.choice((100, 100_000))
    odd = b'{"__metadata__":{"sd3min.defaults":"' + deep + b'"},' + header[1:]
    return rng.choice((deep, odd, b'{"__metadata__":' + deep + b"}", b"{}", b"", b"null")), body


DAMAGES: list[Callable[..., tuple[bytes, bytes]]] = [
    flip_bytes,
    change_json,
    change_json,
    cut_or_lengthen,
    nest,
]


def damaged(sound: bytes, seed: int) -> bytes:
    """The file of a seed."""
    rng = random.Random(seed)
    (length,) = struct.unpack("<Q", sound[:8])
    header, body = sound[8 : 8 + length], sound[8 + length :]
    for _ in range(rng.choice((1, 1, 2, 3))):
        header, body = rng.choice(DAMAGES)(header, body, rng)
    said = len(header)
    if rng.random() < 0.1:
        said = rng.choice((0, 1, said - 1, said + 1, 2**31, 2**63, 2**64 - 1))
    return struct.pack("<Q", max(said, 0)) + header + body


def outcome(path: Path) -> str:
    """Open a file and load all that it holds: "loaded", or "refused"."""
    try:
        opened = Checkpoint.open(path)
        opened.require(list(opened.parts))
        for name in opened.parts:
            opened.load(name, torch.float32, torch.device("cpu"))
    except Refusal as refusal:
        if "\n" in str(refusal) or len(str(refusal)) > LONGEST_SENTENCE + 3:
            raise ValueError(f"no sentence: {refusal}") from None
        return "refused"
    return "loaded"


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fuzz(count: int, first: int = 0) -> Counter[str]:
    """How many files of so many seeds were loaded and refused."""
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(temporary)
        sound, path = sound_file(folder), folder / "damaged.safetensors"
        path.write_bytes(sound)
        if outcome(path) != "loaded":
            raise ValueError("the file is refused before it was damaged")
        most = peak() + len(sound) + SLACK
        for seed in tqdm(range(first, first + count), unit="file"):
            path.unlink()
            path.write_bytes(damaged(sound, seed))
            try:
                found[outcome(path)] += 1
            except Exception as error:
                raise RuntimeError(f"the file of seed {seed} is not refused") from error
            if peak() > most:
                raise RuntimeError(f"the file of seed {seed} takes more memory than it is long")
    return found


def main() -> None:
    """Damage, open and count."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=10_000, help="of files")
    parser.add_argument("--first", type=int, default=0, help="seed of the first file")
    arguments = parser.parse_args()
    found = fuzz(arguments.count, arguments.first)
    print(", ".join(f"{count:,} files {what}" for what, count in found.items()))


if __name__ == "__main__":
    main()

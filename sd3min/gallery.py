"""Many pictures: a folder with one for every line of a file, made by one process or by many.

A picture's number in the list decides its file and its seed, and nothing else does: neither what
was made before it nor who makes it. Each PNG says what made it, so the folder alone tells what is
still missing, and processes that share a list need not speak to each other.
"""

import hashlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from sd3min import pipeline, record
from sd3min.config import Refusal
from sd3min.files import whole
from sd3min.pipeline import Pipeline
from sd3min.settings import Call, is_whole

MANIFEST = "manifest.jsonl"
PNG_END = b"IEND\xaeB`\x82"  # the last chunk's name and checksum


def read_prompts(path: Path) -> list[str]:
    """The lines of a file: the number of a line is that of its picture; refused if one is blank."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text in UTF-8"
        raise Refusal(f"--prompts {path} cannot be read ({reason}): pass a text file") from None
    lines = lines[:-1] if not lines[-1] else lines
    if not lines:
        raise Refusal(f"--prompts {path} is empty: pass a file with one prompt a line")
    blank = next((i for i, line in enumerate(lines, 1) if not line.strip()), None)
    if blank:
        raise Refusal(f"line {blank} of --prompts {path} is blank: remove it")
    return lines


def check_batch(batch: int) -> int:
    """Pictures at once; refused if there are none."""
    if not is_whole(batch, 1):
        raise Refusal(f"--batch {batch} is not a whole number of at least 1")
    return batch


def check_folder(folder: Path) -> None:
    """Make a folder, whose own folder is there, and refuse one that cannot be written to."""
    try:
        folder.mkdir(exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = error.strerror or error
        raise Refusal(f"--out-dir {folder} cannot be written ({reason}): pass another") from None


def share() -> tuple[int, int]:
    """This process's number and how many there are: RANK and WORLD_SIZE, refused if they err."""
    texts = [os.environ.get(name, value) for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"))]
    if not all(text.isdecimal() for text in texts) or int(texts[0]) >= int(texts[1]):
        mend = "start with torchrun or accelerate launch, or unset both"
        raise Refusal(f"RANK {texts[0]} and WORLD_SIZE {texts[1]} name no process: {mend}")
    return int(texts[0]), int(texts[1])


def records(call: Call, common: dict[str, Any]) -> list[dict[str, Any]]:
    """What every picture of a call says of itself, but for the versions; `common` is for all."""
    common = vars(call.settings) | {"conventions": call.settings.conventions.name} | common
    return [
        json.loads(record.dumps({"prompt": p, "negative_prompt": n, "seed": s} | common))
        for p, n, s in zip(call.prompts, call.negatives, call.seeds, strict=True)
    ]


def said(content: bytes) -> dict[str, Any] | None:
    """What a picture's file says of it, or that it says nothing; None where it is damaged."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            text: Any = image.info.get(record.KEY)
            image.verify()  # the checksum of every chunk but the last
            if image.format == "PNG" and not content.endswith(PNG_END):
                return None
    except Exception:  # whatever the file holds
        return None
    try:
        return dict(json.loads(text))
    except (TypeError, ValueError, RecursionError):
        return {}


@dataclass(frozen=True)
class Gallery:
    """A folder and the pictures that it is to hold, each by its record."""

    folder: Path
    records: Sequence[dict[str, Any]]

    def path(self, i: int) -> Path:
        """The file of picture i."""
        return self.folder / f"{i:06}.png"

    def made(self, i: int) -> str | None:
        """SHA-256 of picture i's file; nothing where it is missing or damaged.

        Refuses where the file is whole and holds another picture.
        """
        try:
            content = self.path(i).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            reason = f"{self.path(i)} cannot be read ({error.strerror or error})"
            raise Refusal(f"{reason}: move it away, or pass another --out-dir") from None
        found = said(content)
        if found is None:
            return None
        for name, value in self.records[i].items():
            if found.get(name) != value:
                other = f"{self.path(i)} is there with {name} {found.get(name)!r}, not {value!r}"
                raise Refusal(f"{other}: move it away, or pass another --out-dir")
        return hashlib.sha256(content).hexdigest()

    def make(
        self,
        load: Callable[[], Pipeline],
        call: dict[str, Any],
        batch: int,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        """Make a process's share of what is missing, `batch` pictures at a time.

        `call` is what a pipeline's call is given besides prompts and seeds. A pipeline is loaded
        only where there is something to make.
        """
        own = range(len(self.records))[rank::processes]
        missing = [i for i in range(len(self.records)) if self.made(i) is None and i in own]
        if not missing:
            return
        if processes > 1 and torch.cuda.is_available():
            own_rank = int(os.environ.get("LOCAL_RANK", rank))
            torch.cuda.set_device(own_rank % torch.cuda.device_count())
        pipe = load()
        quiet = rank > 0 or not sys.stderr.isatty()
        done = len(own) - len(missing)
        with tqdm(total=len(own), initial=done, unit="picture", disable=quiet) as bar:
            for first in range(0, len(missing), batch):
                numbers = missing[first : first + batch]
                for i, image in zip(numbers, self.pictures(pipe, call, numbers), strict=True):
                    pipeline.save(image, self.path(i))
                    bar.update()

    def pictures(
        self, pipe: Pipeline, call: dict[str, Any], numbers: Sequence[int]
    ) -> list[Image.Image]:
        """Pictures of some numbers, in one batch."""
        names = ("prompt", "negative_prompt", "seed")
        own = {name: [self.records[i][name] for i in numbers] for name in names}
        given: dict[str, Any] = call | own | {"num_images": 1, "progress": False}
        return pipe(**given)

    def write_manifest(self) -> Path | None:
        """Once every picture is there, list them: prompt, seed, file and SHA-256, one a line.

        The process that ends last finds all of them; should two, they write the same.
        """
        hashes = [self.made(i) for i in range(len(self.records))]
        if None in hashes:
            return None
        lines = [
            json.dumps(
                {
                    "prompt": own["prompt"],
                    "seed": own["seed"],
                    "file": self.path(i).name,
                    "sha256": found,
                },
                ensure_ascii=False,
            )
            for i, (own, found) in enumerate(zip(self.records, hashes, strict=True))
        ]
        path = self.folder / MANIFEST
        try:
            with whole(path) as part:
                part.write_text("\n".join(lines) + "\n", encoding="utf-8")
        except OSError as error:
            raise Refusal(f"{path} cannot be written: {error.strerror or error}") from None
        return path

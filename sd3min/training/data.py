"""Pictures with captions from a folder or from a dataset, fitted into buckets of nearly their own
shape, and their latents kept on disk by content."""

import hashlib
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from sd3min.autoencoder import Autoencoder
from sd3min.config import Refusal
from sd3min.files import whole
from sd3min.pipeline import to_tensor
from sd3min.training import records

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
SIDE = 16  # pixels that the sides of a picture are multiples of
MOST_STRETCH = 2.0  # of a bucket: the longer side over the shorter


@dataclass(frozen=True)
class Example:
    """A picture, as a file or in memory, and what is said of it."""

    picture: Path | Image.Image
    caption: str
    name: str

    def open(self) -> Image.Image:
        """The picture in RGB, upright, on white where it can be seen through; Refusal names one
        that cannot be read."""
        try:
            image = self.picture
            image = Image.open(image) if isinstance(image, Path) else image
            return opaque(ImageOps.exif_transpose(image))
        except Exception as error:  # of many kinds, by what the file holds
            told = f"{error}" or type(error).__name__
            raise Refusal(f"the picture {self.name} cannot be read: {told}") from None


def opaque(image: Image.Image) -> Image.Image:
    """The picture in RGB; what is behind the transparent is white, as on a page."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def captions_of(folder: Path) -> dict[str, str]:
    """What the lines of a folder's metadata.jsonl say: file_name and text, as in datasets; also
    caption or prompt."""
    path, found = folder / "metadata.jsonl", {}
    if not path.exists():
        return {}
    for number, line in enumerate(records.read(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            told = json.loads(line)
            name = told["file_name"]
            words = next(told[key] for key in ("text", "caption", "prompt") if key in told)
            if not isinstance(name, str) or not isinstance(words, str):
                raise TypeError("not texts")
        except (ValueError, KeyError, TypeError, StopIteration, RecursionError):
            raise Refusal(
                f"{path}, line {number}, must be JSON with file_name and text: {line[:80]!r}"
            ) from None
        found[name] = words
    return found


def read_folder(folder: Path, caption: str | None = None) -> list[Example]:
    """Pictures of a folder, in the order of their names, each with its caption: of the .txt beside
    it, of metadata.jsonl, or `caption`, in this order."""
    if not folder.is_dir():
        raise Refusal(f"{folder} is not a folder of pictures")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise Refusal(f"{folder} has no pictures ({', '.join(sorted(SUFFIXES))})")
    told, examples = captions_of(folder), []
    for path in paths:
        name = path.relative_to(folder).as_posix()
        text = path.with_suffix(".txt")
        words = records.read(text).strip() if text.exists() else told.get(name, caption)
        if words is None:
            raise Refusal(
                f"{path} has no caption: write {text.name} beside it, a line in metadata.jsonl, "
                "or give one prompt for all"
            )
        examples.append(Example(path, words, str(path)))
    missing = sorted(set(told) - {path.relative_to(folder).as_posix() for path in paths})
    if missing:
        raise Refusal(f"metadata.jsonl names pictures that are not there: {', '.join(missing[:5])}")
    return examples


def read_dataset(
    name: str, picture: str = "image", text: str | None = None, caption: str | None = None
) -> list[Example]:
    """The pictures of a Hugging Face dataset's split "train", by name or folder, with `text` as the
    column of captions, or one caption for all."""
    rows = opened(name)
    for column in (picture, text):
        if column is not None and column not in rows.column_names:
            raise Refusal(f"the dataset {name} has no column {column!r}: {rows.column_names}")
    if text is None and caption is None:
        raise Refusal(f"name the dataset's column of captions, or one prompt for all: {name}")
    try:
        found: list[tuple[Any, Any]] = [
            (row[picture], row[text] if text else caption) for row in rows
        ]
    except Exception as error:  # of many kinds, by what the rows hold
        raise Refusal(f"the pictures of the dataset {name} cannot be read: {error}") from None
    for i, (image, words) in enumerate(found):
        if not isinstance(image, Image.Image):
            raise Refusal(f"the dataset {name} has no picture in row {i}: {image!r}")
        if not isinstance(words, str):
            raise Refusal(f"the dataset {name} has no text as the caption of row {i}: {words!r}")
    return [Example(image, words, f"{name}, row {i}") for i, (image, words) in enumerate(found)]


def opened(name: str) -> Any:
    """A dataset's split "train", as saved on disk or as `load_dataset` finds it."""
    try:
        import datasets
    except ImportError:
        raise Refusal(f"the dataset {name} needs datasets: pip install datasets") from None
    try:
        if (Path(name) / "dataset_dict.json").exists():
            return datasets.DatasetDict.load_from_disk(name)["train"]
        if (Path(name) / "dataset_info.json").exists():
            return datasets.Dataset.load_from_disk(name)
        return datasets.load_dataset(name, split="train")
    except Exception as error:  # of many kinds, by where the dataset is sought
        raise Refusal(f"the dataset {name} cannot be loaded: {error}") from None


def bucket(width: int, height: int, resolution: int) -> tuple[int, int]:
    """Sides nearest to a picture's shape, multiples of 16, of about resolution² pixels at most."""
    stretch = min(max(width / height, 1 / MOST_STRETCH), MOST_STRETCH)
    across = round(resolution * math.sqrt(stretch) / SIDE) * SIDE
    down = max(SIDE, resolution * resolution // across // SIDE * SIDE)
    return across, down


def fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture scaled to cover a size and cut at its middle."""
    return ImageOps.fit(image, size, Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class Encoded:
    """Posteriors of examples of one size, in the order of their indices."""

    size: tuple[int, int]
    indices: list[int]
    mean: torch.Tensor
    logvar: torch.Tensor


def encoder_digest(autoencoder: Autoencoder) -> str:
    """SHA-256 of the encoder's weights."""
    digest = hashlib.sha256()
    for name, tensor in autoencoder.encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


class LatentCache:
    """Posteriors of pictures, kept in a folder by what decides them: pixels and autoencoder."""

    def __init__(self, autoencoder: Autoencoder, folder: Path):
        self.autoencoder, self.folder = autoencoder, folder
        self.key = f"{encoder_digest(autoencoder)} {next(autoencoder.parameters()).dtype}"

    def path(self, image: Image.Image) -> Path:
        """The file of a picture's posterior."""
        digest = hashlib.sha256(f"{self.key} {image.size}".encode())
        digest.update(image.tobytes())
        return self.folder / f"{digest.hexdigest()}.safetensors"

    @torch.no_grad()
    def posterior(self, image: Image.Image) -> dict[str, torch.Tensor]:
        """Mean and log-variance, [c, h, w] each, in float32; encoded where they are not kept."""
        path = self.path(image)
        try:
            return load_file(path)
        except (OSError, SafetensorError):
            parameter = next(self.autoencoder.parameters())
            moments = self.autoencoder.moments(to_tensor(image).to(parameter))
            found = {
                name: m[0].float().cpu().contiguous()
                for name, m in zip(("mean", "logvar"), moments, strict=True)
            }
            self.write(path, found)
            return found

    def write(self, path: Path, tensors: dict[str, torch.Tensor]) -> None:
        """Keep a posterior, whole or not at all."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with whole(path) as part:
                save_file(tensors, part)
        except (OSError, SafetensorError) as error:
            raise Refusal(f"{path} cannot be written: {error}") from None

    def encode(self, examples: Sequence[Example], resolution: int) -> list[Encoded]:
        """All examples' posteriors, by bucket."""
        found: dict[tuple[int, int], list[tuple[int, dict[str, torch.Tensor]]]] = {}
        for i, example in enumerate(tqdm(examples, desc="latents", leave=False)):
            image = example.open()
            size = bucket(*image.size, resolution)
            found.setdefault(size, []).append((i, self.posterior(fitted(image, size))))
        return [
            Encoded(
                size,
                [i for i, _ in members],
                torch.stack([posterior["mean"] for _, posterior in members]),
                torch.stack([posterior["logvar"] for _, posterior in members]),
            )
            for size, members in sorted(found.items(), key=lambda pair: pair[0])
        ]


@lru_cache(maxsize=4)
def order(sizes: tuple[int, ...], batch: int, seed: int, epoch: int) -> list[tuple[int, list[int]]]:
    """An epoch's batches: of each the bucket and the places in it."""
    rng = random.Random(f"{seed} {epoch}")
    orders = [rng.sample(range(size), size) for size in sizes]
    starts = [(which, start) for which, size in enumerate(sizes) for start in range(0, size, batch)]
    return [
        (which, [orders[which][i % sizes[which]] for i in range(start, start + batch)])
        for which, start in rng.sample(starts, len(starts))
    ]


def batches(sizes: Sequence[int], batch: int, seed: int, step: int) -> tuple[int, list[int]]:
    """The bucket of a step's batch and the places in it, of buckets of some sizes.

    Every example comes once in an epoch, in an order by chance; a bucket's last batch is filled up
    from its start.
    """
    epoch, number = divmod(step, sum(math.ceil(size / batch) for size in sizes))
    return order(tuple(sizes), batch, seed, epoch)[number]

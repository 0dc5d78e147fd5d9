"""Prompts' embeddings kept on disk: the second run of a prompt loads no text encoder.

One safetensors file for each prompt, named by the SHA-256 of all that decides what the encoders
make of it. A prompt is encoded alone, since the last bits depend on what else is in a batch.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from sd3min.checkpoint import TOKENIZERS, Checkpoint, fingerprint
from sd3min.conventions import DIFFUSERS, Conventions
from sd3min.files import whole
from sd3min.text_encoders import Conditioning, TextEncoders

READ = ("t5_grows", "t5_characters", "clip_g_exclamation")  # conventions that encoders read
LAYOUT = 1  # of the files; counts up when a file of another time would be misread


class Entry(NamedTuple):
    """What is kept of one prompt: its embedding, and the warnings that it was cut."""

    embedding: Conditioning
    cuts: list[str]


def sha256(*parts: object) -> str:
    """SHA-256 of values that JSON can tell apart."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def encoders_key(
    opened: Checkpoint, dtype: torch.dtype, t5: bool | str = True, device: str = "cpu"
) -> str:
    """What the text encoders of opened files are known by: samples of those files, all of their
    tokenizers', the type, the LoRAs, the kind of device and whose modules they become; `t5` may
    name a type of its own.
    """
    names = [name for name in opened.parts if name in TOKENIZERS and (t5 or name != "t5")]
    paths = dict.fromkeys(path for name in names for path in opened.parts[name].paths)
    folders = [opened.tokenizer_folder(name) for name in names]
    loras = [opened.parts[name].loras for name in names]
    files = [path for folder in folders for path in sorted(folder.iterdir()) if path.is_file()]
    return sha256(
        names,
        [fingerprint(path) for path in paths],
        [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files],
        opened.context_width(),
        str(dtype),
        t5,
        *([loras] if any(loras) else []),
        *([device] if device != "cpu" else []),
        *(["without transformers"] if any(opened.parts[name].make for name in names) else []),
    )


def digest(entry: Entry) -> str:
    """SHA-256 of an entry's content, by which damage shows."""
    found = hashlib.sha256(json.dumps(entry.cuts).encode())
    for tensor in entry.embedding:
        found.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def read(path: Path) -> Entry | None:
    """The entry in a file; nothing where there is none or it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            embedding = Conditioning(file.get_tensor("context"), file.get_tensor("pooled"))
            cuts, expected = json.loads(file.metadata()["entry"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
    entry = Entry(embedding, cuts)
    return entry if digest(entry) == expected else None


def write(path: Path, entry: Entry) -> None:
    """Write an entry whole or not at all; a folder that takes nothing costs a warning."""
    tensors = {name: tensor.contiguous() for name, tensor in entry.embedding._asdict().items()}
    metadata = {"entry": json.dumps([entry.cuts, digest(entry)])}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as part:
            part.write_bytes(save(tensors, metadata))
    except OSError as error:
        warnings.warn(f"{path} cannot be written: {error.strerror or error}", stacklevel=2)


@contextmanager
def held_back() -> Iterator[list[str]]:
    """The texts of the warnings to a user; they are held back, and others go their way."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    for warning in caught:
        if warning.category is UserWarning:
            texts.append(str(warning.message))
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )


class CachedEncoders:
    """Text encoders that are loaded only for prompts that are not in the cache."""

    def __init__(
        self,
        load: Callable[[], TextEncoders],
        folder: str | Path,
        key: str,
        t5: bool = True,
        t5_length: int = 256,
        clip_length: int = 77,
        device: str | torch.device = "cpu",
    ):
        """`load` gives the encoders that `key` stands for, with or without `t5`, for the time of a
        call; `t5_length` and `clip_length` are the rows that they give, and they go to `device`.
        """
        self.load, self.folder, self.key = load, Path(folder), key
        self.has_t5, self.t5_length, self.clip_length = t5, t5_length, clip_length
        self.device = torch.device(device)

    @classmethod
    def of(
        cls,
        opened: Checkpoint,
        folder: str | Path,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        t5: bool | str = True,
        load: Callable[[], TextEncoders] | None = None,
    ) -> "CachedEncoders":
        """A cache for the encoders of opened files, which `load` may load in its own way."""
        load = load or partial(opened.load_text_encoders, dtype, torch.device(device), bool(t5))
        lengths = opened.defaults.t5_length, opened.parts["clip_l"].config.length
        key = encoders_key(opened, dtype, t5, torch.device(device).type)
        return cls(load, folder, key, bool(t5), *lengths, device)

    def encode(
        self,
        prompts: Sequence[str],
        t5_length: int | None = None,
        without_t5: str = "zeros",
        conventions: Conventions = DIFFUSERS,
    ) -> Conditioning:
        """Context and pooled vector of each prompt, as `TextEncoders.encode` gives them."""
        load, length = cache(self.load), t5_length or self.t5_length

        def entry(prompt: str, length: int) -> Entry:
            return self.entry(load, prompt, length, without_t5, conventions)

        entries = [entry(prompt, length) for prompt in prompts]
        for text in dict.fromkeys(text for each in entries for text in each.cuts):
            warnings.warn(text, stacklevel=2)
        rows = max(each.embedding.context.shape[1] for each in entries)
        for i, prompt in enumerate(prompts):
            if entries[i].embedding.context.shape[1] < rows:  # T5 grows with a longer neighbour
                entries[i] = entry(prompt, rows - self.clip_length)
        contexts, pooled = zip(*(each.embedding for each in entries), strict=True)
        return Conditioning(torch.cat(contexts).to(self.device), torch.cat(pooled).to(self.device))

    @torch.no_grad()
    def entry(
        self,
        load: Callable[[], TextEncoders],
        prompt: str,
        length: int,
        without_t5: str,
        conventions: Conventions,
    ) -> Entry:
        """What is kept of a prompt; where nothing is, it is encoded and written."""
        path = self.path(prompt, length, without_t5, conventions)
        entry = read(path)
        if entry is None:
            encoders = load()
            with held_back() as cuts:
                made = encoders.encode([prompt], length, without_t5, conventions)
            entry = Entry(Conditioning(*(part.cpu() for part in made)), cuts)
            write(path, entry)
        return entry

    def path(self, prompt: str, length: int, without_t5: str, conventions: Conventions) -> Path:
        """The file of a prompt."""
        read = {name: getattr(conventions, name) for name in READ}
        instead = None if self.has_t5 else without_t5
        name = sha256(LAYOUT, self.key, self.has_t5, prompt, length, instead, read)
        return self.folder / f"{name}.safetensors"

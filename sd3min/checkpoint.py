"""Files and folders to modules, with their tokenizers and defaults.

Which parts a path holds is told by `sources`; here those of several paths are put together, checked
against each other, and loaded to a type and a device.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sd3min import hub
from sd3min.autoencoder import Autoencoder
from sd3min.config import T5_XXL, Defaults, MMDiTConfig, Refusal, released_name
from sd3min.folder import read_shift
from sd3min.mmdit import MMDiT
from sd3min.parts import PREFIXES, TITLES, LoRAOrigin, Part, Unfit, fill, unfitness
from sd3min.sources import is_folder, open_path
from sd3min.text_encoders import PreTrainedTokenizerBase, TextEncoders

__all__ = [
    "PREFIXES",
    "TITLES",
    "AnyPath",
    "AnyPaths",
    "Checkpoint",
    "fill",
    "fingerprint",
    "load_autoencoder",
    "load_mmdit",
    "load_text_encoders",
]

TOKENIZERS = {  # folders of a diffusers checkpoint, and transformers' classes
    "clip_l": ("tokenizer", "CLIPTokenizer"),
    "clip_g": ("tokenizer_2", "CLIPTokenizer"),
    "t5": ("tokenizer_3", "T5Tokenizer"),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEFAULTS = "sd3min.defaults"  # metadata: settings where a call leaves them open, in JSON
SMALL = 200_000_000  # parameters up to which float32 is the default

AnyPath = str | Path
AnyPaths = AnyPath | Sequence[AnyPath]


def read_defaults(path: Path, metadata: Mapping[str, str]) -> Defaults:
    """The settings that a file's metadata asks for; refused where it is damaged."""
    try:
        values = json.loads(metadata.get(DEFAULTS, "{}"))
        if not all(type(value) in (int, float) for value in values.values()):
            raise TypeError("not all numbers")
        return Defaults(**values)
    except (AttributeError, TypeError, ValueError, RecursionError):
        raise Refusal(
            f"the metadata {DEFAULTS} of {path} cannot be read: copy or download it again"
        ) from None


def fingerprint(path: AnyPath) -> str:
    """SHA-256 of a file's size and 64 samples of 1 MiB, which is all of one of up to 64 MiB."""
    size = Path(path).stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for i in range(64):
            file.seek(size * i // 64)
            digest.update(file.read(1 << 20))
    return digest.hexdigest()


@dataclass(frozen=True)
class Checkpoint:
    """Opened files: their parts, the settings they ask for, and where their tokenizers are."""

    path: Path
    parts: dict[str, Part]
    metadata: dict[str, str]
    defaults: Defaults
    tokenizers: Path

    @classmethod
    def open(
        cls,
        path: AnyPaths | None = None,
        text_encoders: AnyPaths | None = None,
        tokenizers: AnyPath | None = None,
        wanted: Sequence[str] = tuple(TITLES),
    ) -> "Checkpoint":
        """Read the headers of a file or a folder, or of several; of sd3-tiny where none is named.

        Where several hold the same part, the last one's counts, and `text_encoders` after all. The
        shift of a diffusers folder's scheduler comes before that of metadata. Of names on the hub
        the parts that are `wanted` are downloaded.
        """
        encoders = {}
        asked = [name for name in wanted if name in TOKENIZERS]
        for place in on_disk(listed(text_encoders), asked, False).paths:
            found = {n: p for n, p in open_path(place).parts.items() if n in TOKENIZERS}
            if not found:
                raise Refusal(f"{place} holds no text encoder: leave it out")
            encoders |= found
        left = [name for name in wanted if name not in encoders]
        paths, folder = on_disk(listed(path) or [tiny()], left, tokenizers is None)
        parts, metadata, shift = {}, {}, None
        for place in paths:
            found = open_path(place)
            parts |= found.parts
            metadata |= found.metadata
            shift = read_shift(place) or shift
        parts |= encoders
        parts = {name: parts[name] for name in TITLES if name in parts}
        defaults = read_defaults(paths[0], metadata)
        defaults = replace(defaults, shift=shift or defaults.shift)
        return cls(paths[0], parts, metadata, defaults, Path(tokenizers or folder))

    def require(self, names: Sequence[str]) -> None:
        """Refuse where parts are missing, or damaged: then with the faults of all."""
        self.require_presence(names)
        if faults := unfitness(self.parts[name] for name in names):
            raise Unfit(*faults)

    def require_presence(self, names: Sequence[str]) -> None:
        """Refuse where parts are missing."""
        missing = [name for name in names if name not in self.parts]
        if missing:
            titles = ", ".join(TITLES[name] for name in missing)
            encoders = all(name in TOKENIZERS for name in missing)
            mend = f"name the files of {titles} too" if encoders else "pass one that holds it"
            without = ", or go without T5" if missing == ["t5"] else ""
            bare = encoders and len(missing) > 1 and not self.parts.keys() & TOKENIZERS
            lacks = "without text encoders" if bare else f"and lacks {titles}"
            raise Refusal(f"{self.path} {self.described()} {lacks}: {mend}{without}")

    def described(self) -> str:
        """Which model this is, or which parts of one."""
        if "mmdit" not in self.parts:
            return f"holds {', '.join(TITLES[name] for name in self.parts)}"
        name = released_name(self.parts["mmdit"].config)
        return f"is {name or 'a Stable Diffusion 3 of no released size'}"

    def placement(
        self, device: str | torch.device | None, dtype: str | torch.dtype | None
    ) -> tuple[torch.dtype, torch.device]:
        """The type and device to load to: small models in float32, others as stored on a GPU."""
        device = usable_device(device)
        if dtype is not None:
            return usable_dtype(dtype), device
        largest = max(self.parts.values(), key=lambda part: part.parameters)
        main = self.parts.get("mmdit", largest)
        if main.parameters <= SMALL:
            return torch.float32, device
        stored = next(iter(main.tensors.values())).dtype
        kept = {"F32": torch.float32, "F16": torch.float16}.get(stored, torch.bfloat16)
        return (torch.bfloat16 if device.type == "cpu" else kept), device

    def load(self, name: str, dtype: torch.dtype, device: torch.device) -> Any:
        """One part as a module."""
        self.require_presence([name])
        return self.parts[name].load(dtype, device)

    def load_text_encoders(
        self, dtype: torch.dtype, device: torch.device, t5: bool = True
    ) -> TextEncoders:
        """All text encoders with their tokenizers; without T5 its rows are zeros."""
        names = encoder_names(t5)
        self.require(names)
        width = self.context_width()
        tokenizers = [self.load_tokenizer(name) for name in names]
        models = [self.load(name, dtype, device) for name in names]
        clip_l, clip_g, last = [*models, None][:3]
        return TextEncoders(clip_l, clip_g, last, tokenizers, width, self.defaults.t5_length)

    def fingerprint(self) -> str:
        """The fingerprint of the file, or of the fingerprints of all."""
        paths = dict.fromkeys(path for part in self.parts.values() for path in part.paths)
        prints = [fingerprint(path) for path in paths]
        return (
            prints[0] if len(prints) == 1 else hashlib.sha256("".join(prints).encode()).hexdigest()
        )

    @property
    def loras(self) -> tuple[LoRAOrigin, ...]:
        """The LoRAs that its parts are changed by."""
        return tuple(dict.fromkeys(lora for part in self.parts.values() for lora in part.loras))

    def context_width(self) -> int:
        """Width of the context; refused where the encoders fit neither each other nor the MMDiT."""
        configs = {name: part.config for name, part in self.parts.items()}
        clip_l, clip_g, t5 = configs["clip_l"], configs["clip_g"], configs.get("t5")
        pooled = clip_l.width + clip_g.width
        width = (t5 or T5_XXL).width
        mmdit = configs.get("mmdit", MMDiTConfig(1, width, pooled))
        fits = [
            clip_l.length == clip_g.length,
            pooled == mmdit.pooled_width,
            pooled <= mmdit.context_width,
            t5 is None or t5.width == mmdit.context_width,
        ]
        if not all(fits):
            raise Refusal(
                f"the text encoders given with {self.path} do not fit it or each other: "
                "pass those that it was trained with"
            )
        return mmdit.context_width

    def load_tokenizer(self, name: str, read: Callable[[str, Path], Any] | None = None) -> Any:
        """An encoder's tokenizer, which transformers or `read` reads from its folder; refused where
        it is of another vocabulary.
        """
        folder, vocabulary = self.tokenizer_folder(name), self.parts[name].config.vocabulary
        try:
            tokenizer = (read or pretrained)(name, folder)
        except Exception:  # whatever the files hold
            raise self.no_tokenizer(name) from None
        # T5's table has spare rows; a tokenizer of missing files has a few tokens and no error
        if not 0.99 * vocabulary <= len(tokenizer) <= vocabulary:
            raise self.no_tokenizer(name)
        return tokenizer

    def tokenizer_folder(self, name: str) -> Path:
        """The folder of an encoder's tokenizer; refused where there is none."""
        folder = self.tokenizers / TOKENIZERS[name][0]
        if not folder.is_dir():
            raise self.no_tokenizer(name)
        return folder

    def no_tokenizer(self, name: str) -> Refusal:
        """What is said where an encoder's tokenizer is not in its folder."""
        vocabulary = self.parts[name].config.vocabulary
        places = ", ".join(place for place, _ in TOKENIZERS.values())
        return Refusal(
            f"{self.tokenizers / TOKENIZERS[name][0]} is not {TITLES[name]}'s tokenizer of "
            f"{vocabulary:,} tokens: "
            f"name the folder that holds {places}"
        )


def on_disk(paths: Sequence[Path], parts: Sequence[str], tokenizers: bool) -> hub.Fetched:
    """Paths, with names on the hub downloaded, and the folder of the first one's tokenizers."""
    found, folders = [], []
    for path in paths:
        if hub.is_remote(path):
            fetched = hub.fetch(str(path), parts, tokenizers)
        else:
            fetched = hub.Fetched([path], path if is_folder(path) else path.parent)
        found += fetched.paths
        folders.append(fetched.tokenizers)
    return hub.Fetched(found, next(iter(folders), Path()))


def pretrained(name: str, folder: Path) -> PreTrainedTokenizerBase:
    """An encoder's tokenizer as transformers reads it."""
    import transformers

    return getattr(transformers, TOKENIZERS[name][1]).from_pretrained(folder)


def part_names(t5: bool) -> list[str]:
    """The parts of a whole model, with or without T5."""
    return [name for name in TITLES if t5 or name != "t5"]


def encoder_names(t5: bool) -> list[str]:
    """The text encoders of a whole model, with or without T5."""
    return [name for name in part_names(t5) if name in TOKENIZERS]


def listed(paths: AnyPaths | None) -> list[Path]:
    """One path or several as a list."""
    given = [paths] if isinstance(paths, str | Path) else paths or []
    return [Path(path) for path in given]


def tiny() -> Path:
    """The folder of sd3-tiny, installed or beside a checkout's package; refused where it is not."""
    package = Path(__file__).parent
    places = [top / "weights/sd3-tiny/sd3-tiny.safetensors" for top in (package, package.parent)]
    found = [place for place in places if place.is_file()]
    if not found:
        mend = "install sd3min again, or pass the path of other weights"
        raise Refusal(f"sd3-tiny is not at {places[0]}: {mend}")
    return found[0]


def usable_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or a GPU where there is one; refused where this machine lacks it."""
    try:
        with warnings.catch_warnings(action="ignore"):
            chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            torch.zeros(1, device=chosen).cpu()
    except (RuntimeError, AssertionError, ImportError):
        mend = "pass cpu, or cuda where PyTorch sees a GPU"
        raise Refusal(f"device {device} cannot be used here: {mend}") from None
    return chosen


def usable_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """float32, float16 or bfloat16, by name or as PyTorch's type; others are refused."""
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if chosen not in DTYPES:
        raise Refusal(f"dtype {dtype} is not one of float32, bfloat16, float16")
    return chosen


def load_mmdit(
    path: AnyPaths | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> MMDiT:
    """The MMDiT of a file or folder, alone."""
    checkpoint = Checkpoint.open(path, wanted=["mmdit"])
    return checkpoint.load("mmdit", *checkpoint.placement(device, dtype))


def load_autoencoder(
    path: AnyPaths | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> Autoencoder:
    """The autoencoder of a file or folder, alone."""
    checkpoint = Checkpoint.open(path, wanted=["autoencoder"])
    return checkpoint.load("autoencoder", *checkpoint.placement(device, dtype))


def load_text_encoders(
    path: AnyPaths | None = None,
    tokenizers: AnyPath | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    t5: bool = True,
) -> TextEncoders:
    """The text encoders of a file or folder, or of several, alone."""
    names = encoder_names(t5)
    checkpoint = Checkpoint.open(path, tokenizers=tokenizers, wanted=names)
    return checkpoint.load_text_encoders(*checkpoint.placement(device, dtype), t5)

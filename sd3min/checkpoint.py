"""Safetensors in, modules out: strictly, and without a second copy in memory.

A part is built on the meta device, where tensors have shapes and no storage, and filled from the memory-mapped file.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTokenizer, PreTrainedTokenizerBase, T5Tokenizer

from sd3min import text_encoders as encoders
from sd3min.autoencoder import Autoencoder
from sd3min.config import (
    T5_XXL,
    AutoencoderConfig,
    CLIPConfig,
    Defaults,
    MMDiTConfig,
    Refusal,
    T5Config,
)
from sd3min.mmdit import MMDiT, position_table
from sd3min.text_encoders import TextEncoders

PREFIXES = {
    "mmdit": "model.diffusion_model.",
    "autoencoder": "first_stage_model.",
    "clip_l": "text_encoders.clip_l.transformer.",
    "clip_g": "text_encoders.clip_g.transformer.",
    "t5": "text_encoders.t5xxl.transformer.",
}
TITLES = {
    "mmdit": "MMDiT",
    "autoencoder": "autoencoder",
    "clip_l": "CLIP-L",
    "clip_g": "CLIP-G",
    "t5": "T5",
}
MARKS = {  # a tensor that tells a part from every other architecture's
    "mmdit": "joint_blocks.0.x_block.attn.qkv.weight",
    "autoencoder": "encoder.down.0.block.0.conv1.weight",
    "clip_l": "text_model.embeddings.position_embedding.weight",
    "clip_g": "text_model.embeddings.position_embedding.weight",
    "t5": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
}
DERIVED = {"text_model.embeddings.position_ids"}  # some files store it, none needs it
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMALL = 200_000_000  # parameters up to which float32 is the default on a CPU

AnyPath = str | Path
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Part:
    """One part's tensors in one file: names as the module has them, names in the file, shapes and dtypes."""

    name: str
    path: Path
    stored: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Number of values, the positional table's included."""
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())

    def without(self, names: Collection[str]) -> "Part":
        """The same part less some tensors."""
        stored, shapes, dtypes = (
            {name: value for name, value in table.items() if name not in names}
            for table in (self.stored, self.shapes, self.dtypes)
        )
        return Part(self.name, self.path, stored, shapes, dtypes)

    def read(self, dtype: torch.dtype | None, device: torch.device) -> dict[str, Tensor]:
        """The tensors, mapped from the file, converted where another type or device is asked for."""
        with safe_open(self.path, framework="pt") as file:
            tensors = {name: file.get_tensor(stored) for name, stored in self.stored.items()}
        return {name: tensor.to(device, dtype) for name, tensor in tensors.items()}


def sort_names(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Which part each tensor of a file belongs to, and its name there; a bare file holds one part, told by its mark."""
    names = list(names)
    prefixes = dict(PREFIXES)
    if not any(name.startswith(tuple(PREFIXES.values())) for name in names):
        bare = [part for part, mark in MARKS.items() if mark in names]
        clip = "clip_g" if "text_projection.weight" in names else "clip_l"
        prefixes = {part: "" for part in bare if not part.startswith("clip") or part == clip}
    owners = {}
    for name in names:
        found = [
            (part, name[len(prefix) :])
            for part, prefix in prefixes.items()
            if name.startswith(prefix)
        ]
        owners[name] = found[0] if found else ("", name)
    return owners


def open_file(path: AnyPath) -> tuple[dict[str, Part], dict[str, str]]:
    """The parts that a safetensors file holds, and its metadata; only the header is read."""
    path = Path(path)
    if not path.is_file():
        raise Refusal(f"{path} is not a file: pass the path of a .safetensors file")
    if path.stat().st_size == 0:
        raise Refusal(f"{path} is empty: copy or download it again")
    parts: dict[str, Part] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for stored, (owner, name) in sort_names(file.keys()).items():
                part = parts.setdefault(owner, Part(owner, path))
                part.stored[name] = stored
                part.shapes[name] = file.get_slice(stored).get_shape()
                part.dtypes[name] = file.get_slice(stored).get_dtype()
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise Refusal(
            f"{path} is truncated or is not a safetensors file ({error}): copy or download it again"
        ) from None
    strangers = parts.pop("", None)
    if strangers or any(MARKS[name] not in part.shapes for name, part in parts.items()):
        example = next(iter((strangers or next(iter(parts.values()))).stored.values()))
        raise Refusal(
            f"{path} is not a Stable Diffusion 3 file: it holds tensors such as {example}"
        )
    return parts, metadata


def fingerprint(path: AnyPath) -> str:
    """SHA-256 of a file's size, of its first MiB and of 64 samples of 64 KiB: tells weights apart in no time at any size."""
    size = Path(path).stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        digest.update(file.read(1 << 20))
        for i in range(64):
            file.seek(size * i // 64)
            digest.update(file.read(1 << 16))
    return digest.hexdigest()


def compare(part: Part, expected: Mapping[str, Tensor]) -> None:
    """Refuse a part with a tensor missing, extra or of another shape."""
    shapes = {name: list(tensor.shape) for name, tensor in expected.items()}
    faults = {
        "missing": sorted(shapes.keys() - part.shapes.keys()),
        "not known": sorted(part.shapes.keys() - shapes.keys()),
        "of another shape": [
            f"{name} {part.shapes[name]} for {shape}"
            for name, shape in shapes.items()
            if part.shapes.get(name, shape) != shape
        ],
    }
    told = [
        f"{kind}: {', '.join(names[:5])}{' …' * (len(names) > 5)}"
        for kind, names in faults.items()
        if names
    ]
    if told:
        raise Refusal(f"{part.path} does not fit its {TITLES[part.name]}: {'; '.join(told)}")


def fill(module: M, tensors: Mapping[str, Tensor]) -> M:
    """Give a module that was built on the meta device its tensors, every one of them, ready for inference."""
    module.load_state_dict(tensors, strict=True, assign=True)
    for child in (
        module.modules()
    ):  # CLIP's row numbers are in no state dict; left on meta they would read garbage
        if isinstance(getattr(child, "position_ids", None), Tensor):
            device = next(iter(tensors.values())).device
            child.position_ids = torch.arange(child.position_ids.shape[-1], device=device)[None]
    left = [
        name
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
        if tensor.is_meta
    ]
    if left:
        raise RuntimeError(f"nothing was loaded into {left}")
    return module.eval().requires_grad_(False)


def build(
    part: Part,
    make: Callable[[], M],
    derived: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: torch.device,
) -> M:
    """Make a module on the meta device and fill it from a part's tensors and those derived beside them."""
    with torch.device("meta"):
        module = make()
    part = part.without(DERIVED | derived.keys())
    compare(
        part, {name: tensor for name, tensor in module.state_dict().items() if name not in derived}
    )
    extra = {name: tensor.to(device, dtype) for name, tensor in derived.items()}
    return fill(module, part.read(dtype, device) | extra)


def mmdit_from(part: Part, dtype: torch.dtype, device: torch.device) -> MMDiT:
    """The MMDiT; a file without a positional table gets the paper's."""
    config = MMDiTConfig.from_shapes(part.shapes)
    derived = (
        {}
        if "pos_embed" in part.shapes
        else {"pos_embed": position_table(config.width, config.grid)}
    )
    return build(part, lambda: MMDiT(config), derived, dtype, device)


def autoencoder_from(part: Part, dtype: torch.dtype, device: torch.device) -> Autoencoder:
    """The autoencoder."""
    config = AutoencoderConfig.from_shapes(part.shapes)
    return build(part, lambda: Autoencoder(config), {}, dtype, device)


def clip_from(part: Part, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A CLIP text encoder; CLIP-L's pooled vector is not projected, so its projection is the identity."""
    config = CLIPConfig.from_shapes(part.shapes)
    derived = {"text_projection.weight": torch.eye(config.width)} if part.name == "clip_l" else {}
    return build(part, lambda: encoders.clip(config, part.name), derived, dtype, device)


def t5_from(part: Part, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """T5's encoder; its embedding has two names, and a file may hold either or both."""
    config = T5Config.from_shapes(part.shapes)
    names = ("shared.weight", "encoder.embed_tokens.weight")
    there = next(name for name in names if name in part.shapes)
    tensor = part.read(None, torch.device("cpu"))[there]
    derived = {name: tensor for name in names if name not in part.shapes}
    model = build(part, lambda: encoders.t5(config), derived, dtype, device)
    model.encoder.embed_tokens.weight = model.shared.weight
    return model


MAKERS = {
    "mmdit": mmdit_from,
    "autoencoder": autoencoder_from,
    "clip_l": clip_from,
    "clip_g": clip_from,
    "t5": t5_from,
}


@dataclass(frozen=True)
class Checkpoint:
    """One or more opened files: their parts, the settings they ask for, and where their tokenizers are."""

    path: Path
    parts: dict[str, Part]
    defaults: Defaults
    tokenizers: Path

    @classmethod
    def open(
        cls,
        path: AnyPath | None = None,
        text_encoders: AnyPath | Sequence[AnyPath] | None = None,
        tokenizers: AnyPath | None = None,
    ) -> "Checkpoint":
        """Read the headers of an official file (sd3-tiny where none is named) and of separate text encoders' files."""
        path = Path(path) if path else tiny()
        more = (
            [text_encoders] if isinstance(text_encoders, str | Path) else list(text_encoders or [])
        )
        parts, metadata = open_file(path)
        for other in more:
            parts |= open_file(other)[0]
        defaults = Defaults(**json.loads(metadata.get("sd3min.defaults", "{}")))
        return cls(path, parts, defaults, Path(tokenizers or path.parent))

    def require(self, names: Iterable[str]) -> None:
        """Refuse where a part is missing."""
        missing = [name for name in names if name not in self.parts]
        if missing:
            titles = ", ".join(TITLES[name] for name in missing)
            held = ", ".join(TITLES[name] for name in self.parts)
            separate = any(name in ("clip_l", "clip_g", "t5") for name in missing)
            mend = "pass their files as text_encoders" if separate else "pass a file that holds it"
            without = ", or t5=False to go without T5" if missing == ["t5"] else ""
            raise Refusal(f"{self.path} holds {held} and lacks {titles}: {mend}{without}")

    def placement(
        self, device: str | torch.device | None, dtype: str | torch.dtype | None
    ) -> tuple[torch.dtype, torch.device]:
        """The type and device to load to: float32 for small files; bfloat16 on a CPU, and on a GPU the type as stored."""
        device = usable_device(device)
        if dtype is not None:
            return usable_dtype(dtype), device
        largest = max(self.parts.values(), key=lambda part: part.parameters)
        if largest.parameters <= SMALL:
            return torch.float32, device
        stored = {"F32": torch.float32, "F16": torch.float16}.get(
            next(iter(largest.dtypes.values())), torch.bfloat16
        )
        return (torch.bfloat16 if device.type == "cpu" else stored), device

    def load(self, name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """One part as a module."""
        self.require([name])
        return MAKERS[name](self.parts[name], dtype, device)

    def load_tokenizers(self, t5: bool = True) -> list[PreTrainedTokenizerBase]:
        """CLIP-L's, CLIP-G's and T5's tokenizers, from the folders of a diffusers checkpoint."""
        classes = {"tokenizer": CLIPTokenizer, "tokenizer_2": CLIPTokenizer}
        classes |= {"tokenizer_3": T5Tokenizer} if t5 else {}
        missing = [name for name in classes if not (self.tokenizers / name).is_dir()]
        if missing:
            raise Refusal(
                f"{self.tokenizers} lacks the folder {', '.join(missing)}: pass the folder that holds "
                f"{', '.join(classes)} as tokenizers"
            )
        return [kind.from_pretrained(self.tokenizers / name) for name, kind in classes.items()]

    def load_text_encoders(
        self, dtype: torch.dtype, device: torch.device, t5: bool = True
    ) -> TextEncoders:
        """All text encoders with their tokenizers; without T5 its rows are zeros."""
        self.require(["clip_l", "clip_g", *(["t5"] if t5 else [])])
        tokenizers = self.load_tokenizers(t5)
        width = (
            T5Config.from_shapes(self.parts["t5"].shapes).width
            if "t5" in self.parts
            else T5_XXL.width
        )
        if "mmdit" in self.parts:
            width = MMDiTConfig.from_shapes(self.parts["mmdit"].shapes).context_width
        models = [
            self.load(name, dtype, device) for name in ("clip_l", "clip_g", *(["t5"] if t5 else []))
        ]
        return TextEncoders(
            models[0],
            models[1],
            models[2] if t5 else None,
            tokenizers,
            width,
            self.defaults.t5_length,
        )


def tiny() -> Path:
    """The shipped sd3-tiny: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    places = [
        folder / "weights" / "sd3-tiny" / "sd3-tiny.safetensors"
        for folder in (package, package.parent)
    ]
    found = [place for place in places if place.is_file()]
    if not found:
        raise Refusal(
            f"sd3-tiny is not at {places[0]}: install sd3min again, or pass the path of other weights"
        )
    return found[0]


def usable_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or a GPU where there is one; refused where this machine lacks it."""
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise Refusal(
            f"device {device} cannot be used here: pass cpu, or cuda where PyTorch sees a GPU"
        ) from None
    return chosen


def usable_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """float32, float16 or bfloat16, by name or as PyTorch's type."""
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if chosen not in DTYPES:
        raise Refusal(f"dtype {dtype} is not one of float32, bfloat16, float16")
    return chosen


def load_mmdit(
    path: AnyPath | None = None, device: str | None = None, dtype: str | None = None
) -> MMDiT:
    """The MMDiT of a file, alone."""
    checkpoint = Checkpoint.open(path)
    return checkpoint.load("mmdit", *checkpoint.placement(device, dtype))


def load_autoencoder(
    path: AnyPath | None = None, device: str | None = None, dtype: str | None = None
) -> Autoencoder:
    """The autoencoder of a file, alone."""
    checkpoint = Checkpoint.open(path)
    return checkpoint.load("autoencoder", *checkpoint.placement(device, dtype))


def load_text_encoders(
    path: AnyPath | Sequence[AnyPath] | None = None,
    tokenizers: AnyPath | None = None,
    device: str | None = None,
    dtype: str | None = None,
    t5: bool = True,
) -> TextEncoders:
    """The text encoders of one or several files, alone."""
    first, *more = [path] if isinstance(path, str | Path | None) else path
    checkpoint = Checkpoint.open(first, more, tokenizers)
    return checkpoint.load_text_encoders(*checkpoint.placement(device, dtype), t5)

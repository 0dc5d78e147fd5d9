"""Tensors that are known by a file's header, and read when asked.

A safetensors file begins with the names, types and shapes of its tensors. That is enough to find
out which model it holds and whether anything is missing; the values stay in the file, which the
operating system maps into memory and reads page by page where they are used.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sd3min.config import Refusal

Read = Callable[[str], Tensor]
TYPES = {  # by the names that safetensors gives them
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: what the header says of it, and where its values are."""

    name: str  # as the file has it
    shape: list[int]
    dtype: str  # as safetensors calls it: F16, BF16, F8_E4M3, …
    path: Path
    reader: Read = dataclasses.field(repr=False, compare=False)
    scale: "Stored | None" = None  # what its values are to be multiplied by, in scaled fp8

    @property
    def paths(self) -> list[Path]:
        """The file."""
        return [self.path]

    @property
    def pieces(self) -> "tuple[Stored, ...]":
        """Itself, as one that is not joined of several."""
        return (self,)

    @property
    def bytes(self) -> int:
        """Its length in the file."""
        return torch.Size(self.shape).numel() * TYPES[self.dtype].itemsize

    def read(self) -> Tensor:
        """The values as they are stored, mapped from the file; a scale is not applied."""
        return self.reader(self.name)

    def values(self) -> Tensor:
        """What the tensor stands for: as stored, or in float32 where a scale applies."""
        values = self.read()
        return values if self.scale is None else values.float() * self.scale.read().float()

    def load(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The values in a type to work in: the file's own memory where that fits, else converted.

        Scaled fp8 is multiplied in float32 and rounded once, to `dtype`.
        """
        return self.values().to(device, dtype)


@dataclass(frozen=True)
class Joined:
    """A tensor that is stored in another form: in pieces, reshaped, or with its halves swapped."""

    name: str
    shape: list[int]  # once it is made
    dtype: str  # the pieces', or all of them where they differ
    pieces: tuple[Stored, ...]  # one below the other
    back: Callable[[Tensor], Tensor] = dataclasses.field(repr=False, compare=False)

    @classmethod
    def of(cls, name: str, pieces: Sequence[Stored], back: Callable[[Tensor], Tensor]) -> "Joined":
        """Find out the shape without reading; `back` makes the tensor of the pieces together."""
        whole = torch.cat([torch.empty(piece.shape, device="meta") for piece in pieces])
        dtype = "+".join(dict.fromkeys(piece.dtype for piece in pieces))
        return cls(name, list(back(whole).shape), dtype, tuple(pieces), back)

    @property
    def paths(self) -> list[Path]:
        """The files of the pieces."""
        return list(dict.fromkeys(piece.path for piece in self.pieces))

    @property
    def scale(self) -> Stored | None:
        """A piece's scale, where the pieces have any."""
        return next((piece.scale for piece in self.pieces if piece.scale), None)

    def read(self) -> Tensor:
        """The values in the type they are stored in; scales are not applied."""
        pieces = [piece.read() for piece in self.pieces]
        return self.back(torch.cat(pieces) if len(pieces) > 1 else pieces[0])

    def load(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The values in a type to work in; each piece goes straight to its place in the whole."""
        first, *others = self.pieces
        if not others:
            return self.back(first.load(dtype, device))
        height = sum(piece.shape[0] for piece in self.pieces)
        whole = torch.empty(height, *first.shape[1:], dtype=dtype, device=device)
        places = whole.split([piece.shape[0] for piece in self.pieces])
        for place, piece in zip(places, self.pieces, strict=True):
            place.copy_(piece.values())
        return self.back(whole)


@dataclass(frozen=True)
class Changed:
    """A stored tensor that something is done to whenever it is read."""

    base: "AnyStored"
    change: Callable[[Tensor], Tensor] = dataclasses.field(repr=False, compare=False)
    scale: None = None  # which the values have taken in

    @property
    def name(self) -> str:
        """As the file has it."""
        return self.base.name

    @property
    def shape(self) -> list[int]:
        """The shape, which no change touches."""
        return self.base.shape

    @property
    def dtype(self) -> str:
        """What the unchanged values are stored as."""
        return self.base.dtype

    @property
    def paths(self) -> list[Path]:
        """The files of the unchanged values."""
        return self.base.paths

    @property
    def pieces(self) -> tuple[Stored, ...]:
        """What is stored of the unchanged values."""
        return self.base.pieces

    def read(self) -> Tensor:
        """The changed values in float32."""
        return self.load(torch.float32, torch.device("cpu"))

    def values(self) -> Tensor:
        """The same."""
        return self.read()

    def load(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The changed values in a type to work in, rounded once, from float32 or float64."""
        exact = torch.promote_types(dtype, torch.float32)
        return self.change(self.base.load(exact, device)).to(dtype)


AnyStored = Stored | Joined | Changed


def read_header(path: Path) -> tuple[list[Stored], dict[str, str]]:
    """A safetensors file's tensors, mapped and not read, and its metadata; refused if damaged."""
    try:
        if not path.exists():
            mend = "pass the path of weights, or a name on the hub such as stabilityai/NAME"
            raise Refusal(f"{path} does not exist: {mend}")
        if not path.is_file():
            raise Refusal(f"{path} is not a file: pass the path of a .safetensors file")
        if path.stat().st_size == 0:
            raise Refusal(f"{path} is empty: copy or download it again")
        file = safe_open(path, framework="pt")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        stored = [
            Stored(name, tensor.get_shape(), tensor.get_dtype(), path, file.get_tensor)
            for name, tensor in slices.items()
        ]
        return stored, file.metadata() or {}
    except OSError as error:
        raise Refusal(
            f"{path} cannot be read ({error.strerror or error}): pass a file that can"
        ) from None
    except SafetensorError as error:
        raise Refusal(
            f"{path} is truncated or no safetensors file ({error}): copy or download it again"
        ) from None

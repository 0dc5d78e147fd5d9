"""Layers that are read from the file while the one before them computes, and dropped after use.

A worker reads layer i + 1, and converts its tensors, while layer i is used: there is memory for two
layers, however many there are, and they take turns in it. The file is read and not mapped, so that
none of its pages count as this process's. Where the layers go to a GPU, the worker copies from
pinned memory on a stream of its own, and waits for that alone.
"""

import json
import re
import struct
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from sd3min.fast import kernels
from sd3min.fast.blocks import MODULATION
from sd3min.fast.native import trim
from sd3min.parts import Part, fill, kept_type
from sd3min.stored import TYPES, AnyStored, Changed, Joined, Stored

M = TypeVar("M", bound=nn.Module)
CPU = torch.device("cpu")
PIECE = 1 << 18  # values that are converted at a time
LAYERS = {  # their names, with the number that says whose turn it is; T5's are halves of a block
    "mmdit": r"joint_blocks\.(\d+)",
    "clip_l": r"text_model\.encoder\.layers\.(\d+)",
    "clip_g": r"text_model\.encoder\.layers\.(\d+)",
    "t5": r"encoder\.block\.\d+\.layer\.(\d+)",
}
TABLES = {  # what gives a row for each token, by all its names
    "clip_l": ("text_model.embeddings.token_embedding",),
    "clip_g": ("text_model.embeddings.token_embedding",),
    "t5": ("shared", "encoder.embed_tokens"),
}


class Ahead(Generic[M]):
    """Modules in a row, gone through again and again, each made while the one before it is used."""

    def __init__(self, make: Callable[[int], M], length: int, device: torch.device):
        self.make, self.length = make, length
        self.worker = ThreadPoolExecutor(1)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.coming: dict[int, Future[M]] = {}

    def __iter__(self) -> Iterator[M]:
        """From the first to the last."""
        for i in range(self.length):
            yield self.take(i)

    def take(self, i: int) -> M:
        """Module i, which is there or on its way if they are taken in order."""
        ready = self.coming.pop(i, None) or self.send(i)
        module = ready.result()
        self.coming.clear()
        if i + 1 < self.length:
            self.coming[i + 1] = self.send(i + 1)
        return module

    def send(self, i: int) -> Future[M]:
        """Let the worker make module i, after all that the GPU was given to do until now."""
        busy = self.stream and torch.cuda.current_stream(self.stream.device)
        until_now = busy.record_event() if busy else None
        return self.worker.submit(self.made, i, until_now)

    def made(self, i: int, until_now: Any) -> M:
        """What the worker does."""
        if self.stream and until_now:
            self.stream.wait_event(until_now)
        with torch.no_grad(), torch.cuda.stream(self.stream):  # of None does nothing
            return self.make(i)


def places(path: Path) -> dict[str, tuple[int, int]]:
    """Where each tensor of a safetensors file begins, and how many bytes it has."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    spans = {name: said["data_offsets"] for name, said in header.items() if "data_offsets" in said}
    return {name: (8 + length + start, end - start) for name, (start, end) in spans.items()}


def read_fully(file: FileIO, place: Tensor) -> None:
    """Fill a tensor on the CPU with the bytes that come next."""
    left = place.view(torch.uint8).numpy().data
    while left and (more := file.readinto(left)):
        left = left[more:]


def unmapped(part: Part, device: torch.device) -> Part:
    """The same part, whose tensors are read into memory of their own: pinned, for a GPU."""
    spans = {path: places(path) for path in part.paths}

    def read_apart(stored: Stored) -> Stored:
        start, _ = spans[stored.path][stored.name]

        def read(_: str) -> Tensor:
            count, pinned = torch.Size(stored.shape).numel(), device.type == "cuda"
            values = torch.empty(count, dtype=TYPES[stored.dtype], pin_memory=pinned)
            with stored.path.open("rb", buffering=0) as file:
                file.seek(start)
                read_fully(file, values)
            return values.view(stored.shape)

        scale = stored.scale and read_apart(stored.scale)
        return replace(stored, reader=read, scale=scale)

    def tensor_apart(tensor: AnyStored) -> AnyStored:
        if isinstance(tensor, Changed):
            return replace(tensor, base=tensor_apart(tensor.base))
        if isinstance(tensor, Joined):
            return replace(tensor, pieces=tuple(map(read_apart, tensor.pieces)))
        return read_apart(tensor)

    return replace(part, tensors={n: tensor_apart(tensor) for n, tensor in part.tensors.items()})


class Turns:
    """Reads a part's tensors. Those of a layer are put where those of the last but one are."""

    def __init__(self, part: Part, dtype: torch.dtype, device: torch.device):
        self.part, self.dtype, self.device = unmapped(part, device), dtype, device
        self.starts = {
            path: {name: start for name, (start, _) in places(path).items()} for path in part.paths
        }
        self.places: dict[str, Tensor] = {}

    def __call__(self, name: str) -> Tensor:
        """A tensor by its official name; those of no layer, and modulation, are made anew."""
        layer = re.match(rf"{LAYERS[self.part.name]}\.", name)
        if layer is None or MODULATION in name:
            return self.part.tensor(name, self.dtype, self.device)
        turn = f"{int(layer[1]) % 2} {name[layer.end() :]}"
        stored, dtype = self.part.tensors[name], kept_type(name, self.dtype)
        place = self.places.get(turn)
        if place is None or list(place.shape) != stored.shape:
            place = self.places[turn] = torch.empty(stored.shape, dtype=dtype, device=self.device)
        if not isinstance(stored, Stored):
            return place.copy_(stored.load(dtype, CPU))
        if stored.scale or self.device.type != "cpu":
            return place.copy_(stored.values())
        self.pour(stored, place.view(-1))
        return place

    def pour(self, stored: Stored, place: Tensor) -> None:
        """Read a tensor to its place; what is to be converted goes through a piece of cache."""
        kind = TYPES[stored.dtype]
        with stored.path.open("rb", buffering=0) as file:
            file.seek(self.starts[stored.path][stored.name])
            if kind == place.dtype:
                read_fully(file, place)
                return
            room = torch.empty(PIECE, dtype=kind)
            for piece in place.split(PIECE):
                read_fully(file, room[: len(piece)])
                kernels.put_(piece, room[: len(piece)])


class FileEmbedding(nn.Module):
    """An embedding whose rows are looked up in the mapped file."""

    def __init__(self, table: AnyStored, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.table = table
        self.weight = nn.Parameter(  # no rows: it tells the type and the device
            torch.empty(0, table.shape[1], dtype=dtype, device=device), requires_grad=False
        )

    def forward(self, ids: Tensor) -> Tensor:
        """One row for each id."""
        rows = self.table.read()[ids.cpu()]
        if self.table.scale is not None:
            rows = rows.float() * self.table.scale.read().float()
        return rows.to(self.weight)


def streamed_encoder(part: Part, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A text encoder with two of its layers in memory at a time, and some rows of its table."""
    module, tables = part.skeleton(), TABLES[part.name]
    layers = {n: m for n, m in module.named_modules() if re.fullmatch(LAYERS[part.name], n)}
    for name in (*layers, *tables):
        module.set_submodule(name, nn.Identity())
    fill(module, {name: part.tensor(name, dtype, device) for name in module.state_dict()})
    rows = FileEmbedding(part.tensors[f"{tables[0]}.weight"], dtype, device)
    for name in tables:
        module.set_submodule(name, rows)

    read, names = Turns(part, dtype, device), list(layers)
    places: Any = [weakref.ref(layer) for layer in layers.values()]  # or they live in a circle

    def filled(i: int) -> nn.Module:
        layer = places[i]()
        return fill(layer, {name: read(f"{names[i]}.{name}") for name in layer.state_dict()})

    ahead = Ahead(filled, len(layers), device)

    def begin(i: int, *_: Any) -> None:
        ahead.take(i)

    def end(layer: nn.Module, *_: Any) -> None:
        layer.to("meta")
        trim()

    for i, (name, layer) in enumerate(layers.items()):
        layer.register_forward_pre_hook(partial(begin, i))
        layer.register_forward_hook(end)
        module.set_submodule(name, layer)
    return module

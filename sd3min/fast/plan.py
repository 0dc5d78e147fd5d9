"""What is in memory at each stage of a picture, told by the headers of the files alone."""

import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sd3min.checkpoint import TOKENIZERS, Checkpoint, part_names
from sd3min.config import CLIP_L, HEAD_WIDTH, SIZE_STEP
from sd3min.fast.blocks import MODULATION
from sd3min.fast.encoders import without_transformers
from sd3min.fast.mapped import IN_PLACE
from sd3min.fast.stream import LAYERS, TABLES
from sd3min.fast.t5 import LINEAR
from sd3min.parts import DERIVED, TITLES, Part, kept_type
from sd3min.settings import Settings
from sd3min.stored import TYPES, AnyStored, Changed, Joined, Stored

PROCESS = 330_000_000  # bytes that Python, libraries, tokenizers and room of the allocator take
HEAD = ("stage", "weights", "mapped", "working", "type", "weights are")
STRIPS = 1.75  # of the widest channels at full size, when it decodes in strips, measured
MAPS = 6  # of the widest channels at full size that decoding holds at once, measured
PARTS = 6  # of a stream's modulation, whose weights are there for a moment
WAYS = {
    "plain": "whole",
    "for runs": "whole, without modulation",
    "int8 for runs": "in 8 bits, without modulation",
    "strips": "whole, and decode in strips",
    "streamed": "two layers at a time",
    "mapped": "one block at a time, where it is mapped",
}
KEPT = {
    "int8 for runs": torch.int8,
    "int8": torch.int8,
    "bnb": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
TOKENS = 8  # times the width that a token takes in a block: itself, q k v, and twice what follows


@dataclass(frozen=True)
class Stage:
    """A part while it is in use, in bytes."""

    title: str
    weights: int  # of the process's own
    mapped: int  # pages of the file, which the system drops when it is in need
    working: int  # what is computed, estimated from its shapes
    dtype: str
    source: str  # how the weights come to be there

    @property
    def cells(self) -> tuple[str, ...]:
        """A line of the table."""
        figures = map(gigabytes, (self.weights, self.mapped, self.working))
        return self.title, *figures, self.dtype, self.source


@dataclass(frozen=True)
class Plan:
    """The stages in their order, and whether the parts of all are kept."""

    stages: tuple[Stage, ...]
    keeps: bool
    program: int  # bytes that are there before anything is loaded

    @property
    def peak(self) -> int:
        """Most bytes of the process's own."""
        if self.keeps:
            weights = sum(stage.weights for stage in self.stages)
            return self.program + weights + max(stage.working for stage in self.stages)
        return self.program + max(stage.weights + stage.working for stage in self.stages)

    def __str__(self) -> str:
        """The table."""
        rows = [HEAD, *(stage.cells for stage in self.stages)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
        kept = "all parts stay" if self.keeps else "one part at a time"
        program = f", of which {gigabytes(self.program)} is the program" if self.program else ""
        lines.append(f"{kept}: at most {gigabytes(self.peak)}{program}, and what is mapped")
        return "\n".join(line.rstrip() for line in lines)


def gigabytes(count: int) -> str:
    """Bytes in words."""
    return f"{count / 1e9:.2f} GB"


def outline(opened: Checkpoint) -> Checkpoint:
    """What a plan needs of opened files, which does not hold them open."""

    def closed(tensor: AnyStored) -> AnyStored:
        if isinstance(tensor, Changed):
            return replace(tensor, base=closed(tensor.base), change=unread)
        if isinstance(tensor, Joined):
            return replace(tensor, pieces=tuple(map(apart, tensor.pieces)), back=unread)
        return apart(tensor)

    def apart(stored: Stored) -> Stored:
        return replace(stored, reader=unread, scale=stored.scale and apart(stored.scale))

    def headers(part: Part) -> Part:
        tensors = {name: closed(tensor) for name, tensor in part.tensors.items()}
        return replace(part, tensors=tensors, extras={}, recipes={})

    return replace(opened, parts={name: headers(part) for name, part in opened.parts.items()})


def unread(_: Any) -> Tensor:
    """What is asked for the values of a tensor that only its shape is known of."""
    raise RuntimeError("an outline has no values")


def plan(
    opened: Checkpoint,
    settings: Settings,
    dtype: torch.dtype,
    device: torch.device,
    t5: bool | str = True,
    memory: str | None = None,
    pictures: int = 1,
    mmdit: str | None = None,
) -> Plan:
    """What will be in memory, the CPU's or that of another device, while pictures are made."""
    opened = without_transformers(opened)
    batch = pictures * (2 if settings.guidance_scale > 1 else 1)
    order = [name for name in (*TOKENIZERS, "mmdit", "autoencoder") if name in part_names(bool(t5))]
    stages = []
    for name in order:
        part, how = opened.parts[name], way(name, t5, memory, mmdit, device)
        own, mapped = held(part, dtype, device, how)
        work = working(part, settings, pictures if name == "autoencoder" else batch, how)
        stored = "+".join(sorted({tensor.dtype for tensor in part.tensors.values()}))
        typed = str(dtype).removeprefix("torch.")
        source = f"{WAYS.get(how, how)}, of {stored}"
        stages.append(Stage(TITLES[name], own, mapped, work * dtype.itemsize, typed, source))
    return Plan(tuple(stages), memory in (None, "fast"), PROCESS * (device.type == "cpu"))


def way(
    name: str, t5: bool | str, memory: str | None, mmdit: str | None, device: torch.device
) -> str:
    """How a part is held: "plain", one of `WAYS`, or a kind of eight bits."""
    if memory and name == "autoencoder":
        return "strips"
    if memory == "stream":
        return "mapped" if name == "mmdit" and device.type == "cpu" else "streamed"
    if name == "t5" and isinstance(t5, str):
        return t5
    if name == "mmdit" and memory:
        return "int8 for runs" if mmdit else "for runs"
    return "plain"


def held(part: Part, dtype: torch.dtype, device: torch.device, how: str) -> tuple[int, int]:
    """What a part's weights take: of the process's own, and mapped."""
    shapes = {name: tensor.shape for name, tensor in part.skeleton().state_dict().items()}
    own, mapped, layers, blocks = 0, 0, Counter[tuple[str, str]](), Counter[str]()
    for name, shape in shapes.items():
        layer = re.match(LAYERS.get(part.name, "no layer") + r"\.", name)
        eight = layer and len(shape) == 2 if part.name == "mmdit" else LINEAR.search(name)
        kept = KEPT[how] if how in KEPT and eight else kept_type(name, dtype)
        count = shape.numel() * kept.itemsize
        if name == DERIVED["t5"] or (layer and how != "plain" and MODULATION in name):
            continue  # another name of a table; what is read when it is needed
        if how == "strips" and name.endswith("upsample.conv.weight"):
            count = count * 16 // 9  # four convolutions of 2x2 for one of 3x3
        if how == "streamed" and layer:
            layers[layer[0], layer[1]] += count
        elif how == "mapped" and IN_PLACE.match(name):
            blocks[name.split(".")[1]] += sum(piece.bytes for piece in part.tensors[name].pieces)
        elif how == "streamed" and name.removesuffix(".weight") in TABLES.get(part.name, ()):
            continue  # looked up in the file
        elif fits(part, name, kept, device) and not rewritten(name, shape, layer, how, dtype):
            mapped += count
        else:
            own += count
    turns = [
        max((n for (_, i), n in layers.items() if int(i) % 2 == turn), default=0) for turn in (0, 1)
    ]
    return own + sum(turns), mapped + max(blocks.values(), default=0)


def fits(part: Part, name: str, kept: torch.dtype, device: torch.device) -> bool:
    """Whether a tensor is used where it is in the file."""
    stored = part.tensors.get(name)
    if not isinstance(stored, Stored) or device.type != "cpu":
        return False
    if kept == KEPT["fp8"]:  # whose scale, if it has one, is kept beside it
        return stored.dtype.startswith("F8")
    return not stored.scale and TYPES[stored.dtype] == kept


def rewritten(
    name: str, shape: torch.Size, layer: re.Match[str] | None, how: str, dtype: torch.dtype
) -> bool:
    """Whether a way writes a tensor anew that it could use where it is: a decoder in the order of
    channels, or a product's weights in oneDNN's order.
    """
    if how == "strips":
        return name.startswith("decoder.")
    if how == "for runs":
        return bool(layer) and len(shape) == 2 and dtype == torch.bfloat16
    return how == "mapped"


def working(part: Part, settings: Settings, batch: int, how: str) -> int:
    """How many values are there at once while a batch is computed, besides the weights."""
    config, pixels = part.config, settings.width * settings.height
    if how == "strips":  # one picture after the other
        return int(STRIPS * pixels * config.widths[1])
    if part.name == "autoencoder":
        return MAPS * batch * pixels * config.widths[1]
    if part.name == "mmdit":
        rows = pixels // SIZE_STEP**2 + settings.t5_length + CLIP_L.length
        modulation = 0 if how == "plain" else 2 * PARTS * config.width**2  # read, and converted
        return TOKENS * batch * rows * config.width + modulation
    rows = settings.t5_length if part.name == "t5" else config.length
    heads = config.width // HEAD_WIDTH
    return batch * rows * (TOKENS * config.width + 3 * config.mlp_width + 2 * heads * rows)

"""Blocks whose weights stay in the file, and are multiplied where the system maps its pages.

The system is asked to read the pages of the next block while this one computes, and to take a
block's out of this process after it. Nothing is copied or converted that a product would not have
to read anyway.
"""

import mmap
import os
import re
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from sd3min.fast import kernels
from sd3min.fast.blocks import FastBlock
from sd3min.fast.mmdit import FastMMDiT
from sd3min.fast.stream import CPU, places, unmapped
from sd3min.parts import Part
from sd3min.stored import TYPES, Changed, Stored

IN_PLACE = re.compile(r"joint_blocks\.\d+\..*\.(qkv|proj|fc1|fc2)\.weight$")


class Pages:
    """A safetensors file, mapped; of its pages those are in memory that are in use."""

    def __init__(self, path: Path):
        self.file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.file)
        self.memory = mmap.mmap(self.file, 0, access=mmap.ACCESS_COPY)
        self.places = places(path)

    def read(self, stored: Stored) -> Tensor:
        """A tensor's values where they are, its scale applied if it has one."""
        start, _ = self.places[stored.name]
        count = torch.Size(stored.shape).numel()
        flat = torch.frombuffer(self.memory, dtype=TYPES[stored.dtype], count=count, offset=start)
        values = flat.view(stored.shape)
        return values if stored.scale is None else values.float() * stored.scale.read().float()

    def fetch(self, stored: Stored) -> None:
        """Have a tensor's pages read from the disk, as far as the system does that ahead."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.file, *self.places[stored.name], os.POSIX_FADV_WILLNEED)

    def drop(self, stored: Stored) -> None:
        """Take a tensor's pages out of this process; the system may keep them for the next time."""
        if hasattr(mmap, "MADV_DONTNEED"):
            start, length = self.places[stored.name]
            over = start % mmap.PAGESIZE
            self.memory.madvise(mmap.MADV_DONTNEED, start - over, length + over)


class MappedLinear(nn.Module):
    """A layer whose weights are where the file is mapped."""

    def __init__(self, pieces: list[tuple[Pages, Stored]], bias: Tensor):
        super().__init__()
        self.pieces = pieces
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """[…, inputs] to […, outputs]."""
        return kernels.linear(x, [pages.read(stored) for pages, stored in self.pieces], self.bias)


class ChangedLinear(MappedLinear):
    """A layer whose weights are changed, by a LoRA, whenever they are read."""

    def __init__(self, pieces: list[tuple[Pages, Stored]], bias: Tensor, changed: Changed):
        super().__init__(pieces, bias)
        self.changed = changed

    def forward(self, x: Tensor) -> Tensor:
        """[…, inputs] to […, outputs]."""
        return kernels.linear(x, [self.changed.load(x.dtype, CPU)], self.bias)


class MappedBlocks:
    """Blocks one after the other, again and again."""

    def __init__(self, blocks: list[FastBlock]):
        self.blocks, self.worker = blocks, ThreadPoolExecutor(1)

    def __iter__(self) -> Iterator[FastBlock]:
        """From the first to the last, of which the first comes next."""
        for block, after in zip(self.blocks, [*self.blocks[1:], self.blocks[0]], strict=True):
            self.worker.submit(each_piece, after, Pages.fetch)
            try:
                yield block
            finally:
                each_piece(block, Pages.drop)


def each_piece(block: nn.Module, do: Callable[[Pages, Stored], None]) -> None:
    """Do something with all weights of a block."""
    for layer in block.modules():
        for pages, stored in layer.pieces if isinstance(layer, MappedLinear) else ():
            do(pages, stored)


def mapped_network(part: Part, dtype: torch.dtype) -> FastMMDiT:
    """The MMDiT for runs, on the CPU."""
    pages, own = {path: Pages(path) for path in part.paths}, unmapped(part, CPU)

    def read(name: str) -> Tensor:
        if IN_PLACE.match(name):
            return torch.empty(part.tensors[name].shape, device="meta")
        return own.tensor(name, dtype, CPU)

    def from_file(block: FastBlock, index: int) -> FastBlock:
        layers = [(n, layer) for n, layer in block.named_modules() if isinstance(layer, nn.Linear)]
        for name, layer in layers:
            stored = own.tensors[f"joint_blocks.{index}.{name}.weight"]
            pieces = [(pages[piece.path], piece) for piece in stored.pieces]
            if isinstance(stored, Changed):
                mapped = ChangedLinear(pieces, layer.bias, stored)
            else:
                mapped = MappedLinear(pieces, layer.bias)
            block.set_submodule(name, mapped)
        return block

    def blocks(make: Callable[[int], FastBlock], depth: int) -> MappedBlocks:
        return MappedBlocks([from_file(make(index), index) for index in range(depth)])

    return FastMMDiT(part.config, read, make=lambda linear: linear, sequence=blocks)

"""A network in another precision than its weights are stored in, one block at a time.

Weights in float16 or float32 are numbers of float64 too: a network can be run in float64 with what
a file holds, and needs no second copy of it. Only the block that runs is converted.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

WHOLE = 250_000_000  # parameters of a module that is converted as one


def own_tensors(module: nn.Module) -> list[Tensor]:
    """Floating-point weights and buffers, those of submodules included."""
    tensors = [*module.parameters(), *module.buffers()]
    return [tensor for tensor in tensors if tensor.is_floating_point()]


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost blocks of a large module: what its lists of modules hold."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from blocks(child)


def apart(module: nn.Module) -> list[nn.Module]:
    """The blocks that are converted one at a time: those of a module that is large."""
    small = sum(tensor.numel() for tensor in own_tensors(module)) <= WHOLE
    return [] if small else list(blocks(module))


def kept(module: nn.Module) -> list[Tensor]:
    """The tensors of a module that are in none of those blocks."""
    later = {tensor for block in apart(module) for tensor in own_tensors(block)}
    return [tensor for tensor in own_tensors(module) if tensor not in later]


def needed(dtype: torch.dtype, *modules: nn.Module) -> int:
    """Bytes that `computing_in` takes beside the stored tensors."""

    def size(tensors: list[Tensor]) -> int:
        return sum(tensor.numel() for tensor in tensors if tensor.dtype != dtype) * dtype.itemsize

    largest = [size(own_tensors(block)) for module in modules for block in apart(module)]
    return sum(size(kept(module)) for module in modules) + max(largest, default=0)


def available() -> float:
    """Bytes of memory that are free or would be, where the system tells."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvail"))
    except (OSError, StopIteration, ValueError):
        known = {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= getattr(os, "sysconf_names", {}).keys()
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else 0
        return pages or float("inf")


@contextmanager
def computing_in(dtype: torch.dtype, *modules: nn.Module) -> Iterator[None]:
    """Have modules compute in `dtype`, exactly as if they had been converted, in little memory.

    A small module is converted at once, and of a large one all that is in no block; a block when it
    is called, until it returns. Afterwards every tensor is what it was.
    """
    stored: dict[Tensor, Tensor] = {}

    def convert(tensors: list[Tensor]) -> None:
        for tensor in tensors:
            if tensor.dtype != dtype:
                stored[tensor] = tensor.data
                tensor.data = tensor.data.to(dtype)

    def enter(block: nn.Module, *_: object) -> None:
        convert(own_tensors(block))

    def leave(block: nn.Module, *_: object) -> None:
        for tensor in own_tensors(block):
            if tensor in stored:
                tensor.data = stored.pop(tensor)

    hooks = []
    for module in modules:
        convert(kept(module))
        for block in apart(module):
            hooks += [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for tensor, original in stored.items():
            tensor.data = original

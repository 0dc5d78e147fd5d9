"""A network in another precision than its weights are stored in, one block at a time.

Weights in float16 or float32 are numbers of float64 too: a network can be run in float64 with what
a file holds, and needs no second copy of it. Only the block that runs is converted.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

WHOLE = 250_000_000  # parameters of a module that is converted as one


def own_tensors(module: nn.Module, inside: bool = True) -> list[Tensor]:
    """Floating-point weights and buffers, those of submodules included or not."""
    tensors = [*module.parameters(inside), *module.buffers(inside)]
    return [tensor for tensor in tensors if tensor.is_floating_point()]


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost blocks of a large module: what its lists of modules hold."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from blocks(child)


@contextmanager
def computing_in(dtype: torch.dtype, *modules: nn.Module) -> Iterator[None]:
    """Have modules compute in `dtype`, exactly as if they had been converted, in little memory.

    A small module is converted at once, and of a large one all that is in no block; a block when it
    is called, until it returns. Afterwards every tensor is what it was.
    """
    stored: dict[Tensor, Tensor] = {}

    def widen(module: nn.Module, *_: object) -> None:
        for tensor in own_tensors(module):
            if tensor.dtype != dtype:
                stored[tensor] = tensor.data
                tensor.data = tensor.data.to(dtype)

    def restore(module: nn.Module, *_: object) -> None:
        for tensor in own_tensors(module):
            if tensor in stored:
                tensor.data = stored.pop(tensor)

    hooks = []
    for module in modules:
        small = sum(tensor.numel() for tensor in own_tensors(module)) <= WHOLE
        apart = [] if small else list(blocks(module))
        later = {tensor for block in apart for tensor in own_tensors(block)}
        for tensor in own_tensors(module):
            if tensor not in later and tensor.dtype != dtype:
                stored[tensor] = tensor.data
                tensor.data = tensor.data.to(dtype)
        for block in apart:
            hooks += [block.register_forward_pre_hook(widen), block.register_forward_hook(restore)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for tensor, original in stored.items():
            tensor.data = original

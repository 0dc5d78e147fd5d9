"""Trained parts written as official files have them."""

from functools import partial
from pathlib import Path

import torch
from torch import nn

from sd3min.checkpoint import PREFIXES
from sd3min.writer import TYPES, Lazy, new, write_tensors


def save_part(module: nn.Module, part: str, path: Path) -> None:
    """Write a part's tensors under its official prefix, whole or not at all."""
    kinds = {dtype: kind for kind, dtype in TYPES.items()}
    tensors = {
        f"{PREFIXES[part]}{name}": Lazy(
            list(tensor.shape), kinds[tensor.dtype], partial(torch.Tensor.cpu, tensor.detach())
        )
        for name, tensor in module.state_dict().items()
    }
    with new(path, sum(tensor.bytes for tensor in tensors.values())) as file:
        write_tensors(file, tensors, {"format": "pt"})

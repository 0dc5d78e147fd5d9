"""Trained parts written as official files have them."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import nn

from sd3min.checkpoint import PREFIXES
from sd3min.parts import DERIVED
from sd3min.writer import TYPES, Lazy, new, write_tensors


def save_parts(
    modules: Mapping[str, nn.Module],
    path: Path,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write parts' tensors under their official prefixes, whole or not at all, in their own type
    or in another. Official files lack CLIP-L's projection, the identity, and T5's second table.
    """
    tensors = {
        f"{PREFIXES[part]}{name}": tensor.detach()
        for part, module in modules.items()
        for name, tensor in module.state_dict().items()
        if part == "mmdit" or name != DERIVED.get(part)
    }
    kinds = {dtype: kind for kind, dtype in TYPES.items()}
    lazy = {
        name: Lazy(
            list(tensor.shape),
            kinds[dtype or tensor.dtype],
            partial(tensor.to, "cpu", dtype or tensor.dtype),
        )
        for name, tensor in sorted(tensors.items())
    }
    with new(path, sum(tensor.bytes for tensor in lazy.values())) as file:
        write_tensors(file, lazy, metadata or {"format": "pt"})

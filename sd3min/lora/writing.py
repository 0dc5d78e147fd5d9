"""LoRA files, written as diffusers or kohya have them."""

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sd3min.config import Refusal
from sd3min.lora.layers import LowRank
from sd3min.lora.model import LoRA
from sd3min.lora.names import DIFFUSERS, KOHYA, Layer
from sd3min.lora.reading import ADAPTERS
from sd3min.writer import TYPES, Lazy, new, write_tensors


def save(lora: LoRA, path: str | Path, dialect: str = "diffusers") -> None:
    """Write a LoRA as diffusers' `load_lora_weights` reads it, or as "kohya".

    The scale that it has now goes into alpha. The file is written whole or not at all, and replaces
    none. Raises Refusal where the dialect cannot say what the LoRA has.
    """
    writers = {"diffusers": diffusers_tensors, "kohya": kohya_tensors}
    if dialect not in writers:
        raise Refusal(f"dialect {dialect} is not one of {', '.join(writers)}")
    tensors, metadata = writers[dialect](lora)
    stored = {name: value.detach().contiguous() for name, value in tensors.items()}
    kinds = {dtype: kind for kind, dtype in TYPES.items()}
    lazy = {
        name: Lazy(list(value.shape), kinds[value.dtype], partial(torch.Tensor.cpu, value))
        for name, value in stored.items()
    }
    with new(Path(path), sum(tensor.bytes for tensor in lazy.values())) as file:
        write_tensors(file, lazy, {"format": "pt"} | metadata)


Written = tuple[dict[str, Tensor], dict[str, str]]


def diffusers_tensors(lora: LoRA) -> Written:
    """Tensors by PEFT's names, and the settings without which diffusers takes alpha for the rank.

    A change of q, k and v together is three that share A. Refused where that cannot be said.
    """
    starts, tensors = DIFFUSERS.starts, dict[str, Tensor]()
    alphas: dict[str, dict[str, tuple[int, float]]] = {}
    for layer, low_rank in tables_joined(lora):
        if layer.table:
            table = f"{starts[layer.part]}{layer.name}.lora_embedding"
            tensors |= {f"{table}_A": low_rank.up.T, f"{table}_B": low_rank.down.T}
            own = alphas.setdefault(starts[layer.part], {})
            own[layer.name] = (low_rank.rank, low_rank.scale * low_rank.alpha)
            continue
        for name, up, lengths in named_pieces(layer, low_rank):
            stem = f"{starts[layer.part]}{name}"
            if f"{stem}.lora_A.weight" in tensors:
                raise Refusal(f"the LoRA changes {name} twice, which diffusers cannot say")
            tensors |= {f"{stem}.lora_A.weight": low_rank.down, f"{stem}.lora_B.weight": up}
            if lengths is not None:
                tensors[f"{stem}.lora_magnitude_vector"] = lengths.flatten()
            own = alphas.setdefault(starts[layer.part], {})
            own[name] = (low_rank.rank, low_rank.scale * low_rank.alpha)
    settings = {}
    for start, own in alphas.items():
        rank, alpha = next(iter(own.values()))
        dora = {f"{start}{name}.lora_magnitude_vector" in tensors for name in own}
        if len(dora) > 1:
            raise Refusal("DoRA changes some layers alone, which diffusers cannot say")
        settings |= {
            f"{start}r": rank,
            f"{start}lora_alpha": alpha,
            f"{start}rank_pattern": {n: r for n, (r, _) in own.items() if r != rank},
            f"{start}alpha_pattern": {n: a for n, (_, a) in own.items() if a != alpha},
            f"{start}target_modules": list(own),
            f"{start}use_dora": dora.pop(),
        }
    return tensors, {ADAPTERS: json.dumps(settings, indent=2, sort_keys=True)}


def tables_joined(lora: Iterable[tuple[Layer, LowRank]]) -> Iterator[tuple[Layer, LowRank]]:
    """Layers with their changes, all of a table's as one."""
    tables = dict[Layer, list[LowRank]]()
    for layer, change in lora:
        if layer.table:
            tables.setdefault(layer, []).append(change)
        else:
            yield layer, change
    yield from ((layer, joined(layer, changes)) for layer, changes in tables.items())


def named_pieces(layer: Layer, low_rank: LowRank) -> list[tuple[str, Tensor, Tensor | None]]:
    """diffusers' names for the rows of a change, with B and DoRA's lengths of each; refused
    where it has no names."""
    up, lengths = low_rank.up, low_rank.magnitude
    if layer.convolution:
        raise Refusal(f"{layer.name} is a convolution: save as kohya")
    if low_rank.rows != layer.whole:
        name = next(name for name in layer.pieces if layer.rows(name) == low_rank.rows)
        return [(name, up, lengths)]
    if lengths is not None and lengths.shape[1] != 1:
        raise Refusal(f"{layer.name} has DoRA's lengths of columns: save as kohya")
    ups = layer.there(up).chunk(len(layer.pieces))
    parts = [None] * len(ups) if lengths is None else layer.there(lengths).chunk(len(ups))
    return list(zip(layer.pieces, ups, parts, strict=True))


def kohya_tensors(lora: LoRA) -> Written:
    """Tensors by kohya's names, in which q, k and v are one layer."""
    groups = dict[Layer, list[LowRank]]()
    for layer, low_rank in lora:
        if layer.table:
            raise Refusal("the LoRA has rows of words, which kohya cannot say: save as diffusers")
        groups.setdefault(layer, []).append(low_rank)
    tensors = {}
    for layer, changes in groups.items():
        ((stem, _),) = KOHYA.stems(layer)
        whole = joined(layer, changes)
        tensors |= {f"{stem}.lora_down.weight": whole.down, f"{stem}.lora_up.weight": whole.up}
        tensors[f"{stem}.alpha"] = torch.tensor(whole.scale * whole.alpha)
        if whole.magnitude is not None:
            tensors[f"{stem}.dora_scale"] = whole.magnitude
    return tensors, {}


def joined(layer: Layer, changes: Sequence[LowRank]) -> LowRank:
    """Changes of some rows as one of all rows, whose rank is the sum: B is of blocks, with zeros
    where a change has no rows.
    """
    if len(changes) == 1 and changes[0].rows == layer.whole:
        return changes[0]
    changes = sorted(changes, key=lambda change: change.rows.start)
    lengths: list[Tensor] = [c.magnitude for c in changes if c.magnitude is not None]
    ends = [0, *(change.rows.stop for change in changes)]
    tiled = ends == [*(change.rows.start for change in changes), layer.height]
    if lengths and not (tiled and len(lengths) == len(changes)):
        raise Refusal(f"DoRA changes some rows of {layer.name} alone, which kohya cannot say")
    down = torch.cat([change.down for change in changes])
    up, first = down.new_zeros(layer.height, len(down)), 0
    for change in changes:
        up[change.rows, first : first + change.rank] = change.up * change.factor
        first += change.rank
    return LowRank(down, up, len(down), layer.whole, torch.cat(lengths) if lengths else None)

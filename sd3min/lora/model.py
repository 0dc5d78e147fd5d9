"""A LoRA of a whole model: made anew for training, put beside layers, merged and taken out."""

import fnmatch
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from sd3min.config import Refusal
from sd3min.lora.layers import Adapted, LoRAEmbedding, LoRALinear, LowRank
from sd3min.lora.names import Layer, layers
from sd3min.parts import TITLES, some

Modules = Mapping[str, nn.Module]  # by their parts: mmdit, clip_l, clip_g, t5
TARGETS = (  # diffusers': attention's projections, of both streams and of CLIP
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
)


class LoRA(nn.Module):
    """Changes of layers, which train, move and are saved together."""

    def __init__(self, changes: Iterable[tuple[Layer, LowRank]]):
        super().__init__()
        places, made = list(zip(*changes, strict=True)) or ((), ())
        self.layers: Sequence[Layer] = places
        self.changes = nn.ModuleList(made)

    def __iter__(self) -> Iterator[tuple[Layer, LowRank]]:
        """Each layer with its change."""
        for layer, change in zip(self.layers, self.changes, strict=True):
            assert isinstance(change, LowRank)
            yield layer, change

    def set_scale(self, scale: float) -> "LoRA":
        """How much all changes count; refused if it is no number."""
        if not math.isfinite(scale):
            raise Refusal(f"a LoRA's scale of {scale} is not a number: pass one such as 0.8")
        for _, change in self:
            change.scale = float(scale)
        return self

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """For a while nothing is changed."""
        scales = [change.scale for _, change in self]
        self.set_scale(0.0)
        try:
            yield
        finally:
            for (_, change), scale in zip(self, scales, strict=True):
                change.scale = scale


def add(
    modules: Modules,
    rank: int = 4,
    alpha: float | None = None,
    targets: Sequence[str] | None = None,
    generator: torch.Generator | None = None,
) -> LoRA:
    """Put a new LoRA beside the layers of modules, and freeze everything but it.

    `alpha` is the rank where it is left out. `targets`, by default `TARGETS`, are ends of names,
    diffusers' or official, in which * stands for anything: "attn.to_q" is the query rows of a fused
    layer, "attn.qkv" all of them under one pair of matrices. A text encoder of which they name
    nothing has `TARGETS`, as diffusers' training has it. A is normal with deviation 1/rank and B
    zero, as PEFT's "gaussian" has it, both at least in float32. Raises Refusal where a target finds
    nothing.
    """
    alpha = rank if alpha is None else alpha
    if rank < 1 or not math.isfinite(alpha) or alpha == 0:
        raise Refusal(
            f"rank {rank} and alpha {alpha} make no LoRA: pass a rank of at least 1, and an alpha "
            "that is not 0"
        )
    found = [
        (layer, rows)
        for part, module in modules.items()
        for layer, rows in chosen(part, module, targets)
    ]
    known = [name for layer, _ in found for name in (layer.name, *layer.pieces)]
    if idle := [target for target in targets or () if not matched(target, known)]:
        raise Refusal(f"target {some(idle)} is the end of no layer's name: pass one as attn.to_q")
    if not found:
        raise Refusal(f"no layer of {', '.join(modules)} is a target: pass names of layers")

    def change(layer: Layer, rows: slice) -> LowRank:
        weight = modules[layer.part].get_parameter(f"{layer.name}.weight")
        dtype = torch.promote_types(weight.dtype, torch.float32)
        down = torch.randn(rank, layer.width, generator=generator, dtype=dtype) / rank
        up = torch.zeros(rows.stop - rows.start, rank, dtype=dtype)
        return LowRank(down.to(weight.device), up.to(weight.device), alpha, rows)

    made = LoRA((layer, change(layer, rows)) for layer, rows in found)
    attach(modules, made)
    for module in modules.values():
        module.requires_grad_(False)
    return made.requires_grad_(True)


class Word(NamedTuple):
    """A word to be learnt: its id in a table of tokens, and those that it begins as the mean of."""

    id: int
    like: Sequence[int]


def add_words(modules: Modules, words: Mapping[str, Sequence[Word]], faster: float = 1.0) -> LoRA:
    """Put a change beside the rows of words in CLIPs' tables of tokens (textual inversion, Gal et
    al. 2022), of which A alone is trained: the row's difference, over B.

    `words` has them by part; they learn `faster` than a LoRA at the same rate, as much as B is.
    """
    made = []
    for part, wanted in words.items():
        layer = next(layer for layer in layers(part, shapes(modules[part])) if layer.table)
        table = modules[part].get_parameter(f"{layer.name}.weight").detach()
        table = table.to(torch.promote_types(table.dtype, torch.float32))
        for word in wanted:
            start = table[list(word.like)].mean(dim=0) - table[word.id] if word.like else 0.0
            down, up = (torch.zeros_like(table[:1]) + start) / faster, table.new_ones(1, 1) * faster
            made.append((layer, LowRank(down, up, 1.0, slice(word.id, word.id + 1))))
    lora = attach(modules, LoRA(made))
    for _, change in lora:
        change.up.requires_grad_(False)
    return lora


def chosen(
    part: str, module: nn.Module, targets: Sequence[str] | None
) -> list[tuple[Layer, slice]]:
    """The linear layers of a part that targets name, and the rows of each; but CLIP-L's projection,
    which is the identity and in no official file.
    """
    linear = [
        layer
        for layer in layers(part, shapes(module))
        if isinstance(module.get_submodule(layer.name), nn.Linear)
        and (part, layer.name) != ("clip_l", "text_projection")
    ]

    def named(wanted: Sequence[str]) -> list[tuple[Layer, slice]]:
        return [(layer, rows) for layer in linear for rows in targeted(layer, wanted)]

    found = named(TARGETS if targets is None else targets)
    return found if found or part == "mmdit" else named(TARGETS)


def shapes(module: nn.Module) -> dict[str, list[int]]:
    """The shapes of a module's tensors."""
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def matched(target: str, names: Iterable[str]) -> bool:
    """Whether a target is the end of one of the names."""
    return any(fnmatch.fnmatchcase(f".{name}", f"*.{target}") for name in names)


def targeted(layer: Layer, targets: Sequence[str]) -> list[slice]:
    """The rows of a layer that targets name: all of them at once, or one piece or more."""
    if any(matched(target, [layer.name]) for target in targets):
        return [layer.whole]
    pieces = [name for name in layer.pieces if any(matched(target, [name]) for target in targets)]
    return [layer.rows(name) for name in pieces]


def attach(modules: Modules, lora: LoRA, scale: float = 1.0) -> LoRA:
    """Put a LoRA beside the layers of modules, which compute with it from now on, and return it.

    Raises Refusal where a module is missing, a change is merged or a layer is none for a LoRA.
    """
    lora.set_scale(scale)
    for layer in lora.layers:
        if layer.part not in modules:
            raise Refusal(f"the LoRA changes {TITLES[layer.part]}: pass it as {layer.part} too")
        module = modules[layer.part].get_submodule(layer.name)
        if not isinstance(module, nn.Linear | nn.Embedding):
            raise Refusal(f"{layer.name} is a convolution: load the LoRA with the weights")
        if isinstance(module, Adapted) and module.kept is not None:
            raise Refusal(f"{layer.name} has LoRAs that are merged: unmerge them first")
        if isinstance(module, Adapted) and any(c in module.changes for c in lora.changes):
            raise Refusal(f"{layer.name} has this LoRA already: detach it first, or read it again")
    for layer, change in lora:
        module = modules[layer.part].get_submodule(layer.name)
        if not isinstance(module, Adapted):
            if isinstance(module, nn.Embedding):
                module = LoRAEmbedding(module)
            else:
                assert isinstance(module, nn.Linear)
                module = LoRALinear(module)
            modules[layer.part].set_submodule(layer.name, module)
        module.loras.append(change)
    return lora


def detach(modules: Modules, lora: LoRA) -> None:
    """Take a LoRA out; a layer without any is a plain one again."""
    unmerge(modules)
    gone = {id(change) for _, change in lora}
    for layer, _ in lora:
        module = modules[layer.part].get_submodule(layer.name)
        if isinstance(module, Adapted):
            module.loras = nn.ModuleList(c for c in module.changes if id(c) not in gone)
            if not module.changes:
                modules[layer.part].set_submodule(layer.name, module.plain())


def adapted(modules: Modules) -> list[Adapted]:
    """The layers that have LoRAs beside them."""
    found = [child for module in modules.values() for child in module.modules()]
    return [child for child in found if isinstance(child, Adapted)]


def merge(modules: Modules) -> None:
    """Put all LoRAs into the weights, which costs a copy of those."""
    for layer in adapted(modules):
        layer.merge()


def unmerge(modules: Modules) -> None:
    """Give the weights back as they were, bit for bit."""
    for layer in adapted(modules):
        layer.unmerge()

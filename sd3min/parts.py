"""The five parts of a model, and how one becomes a module: strictly, and without a copy.

A part is built on the meta device, where tensors have shapes and no storage, compared with the file
tensor by tensor, and then given the file's own memory-mapped tensors.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from sd3min.autoencoder import Autoencoder
from sd3min.config import (
    AutoencoderConfig,
    CLIPConfig,
    MMDiTConfig,
    Refusal,
    T5Config,
    released_name,
)
from sd3min.formats import Recipe
from sd3min.mmdit import MMDiT, position_table
from sd3min.stored import AnyStored, Stored
from sd3min.text_encoders import clip, t5

TITLES = {
    "mmdit": "MMDiT",
    "autoencoder": "autoencoder",
    "clip_l": "CLIP-L",
    "clip_g": "CLIP-G",
    "t5": "T5",
}
PREFIXES = {
    "mmdit": "model.diffusion_model.",
    "autoencoder": "first_stage_model.",
    "clip_l": "text_encoders.clip_l.transformer.",
    "clip_g": "text_encoders.clip_g.transformer.",
    "t5": "text_encoders.t5xxl.transformer.",
}
DERIVED = {  # what a module has and its file need not
    "mmdit": "pos_embed",  # computed as the paper does
    "clip_l": "text_projection.weight",  # the identity: the pooled vector is not projected
    "t5": "encoder.embed_tokens.weight",  # another name of shared.weight
}
CONFIGS = {
    "mmdit": MMDiTConfig,
    "autoencoder": AutoencoderConfig,
    "clip_l": CLIPConfig,
    "clip_g": CLIPConfig,
    "t5": T5Config,
}
MODULES: dict[str, Callable[[Any], nn.Module]] = {
    "mmdit": MMDiT,
    "autoencoder": Autoencoder,
    "clip_l": partial(clip, part="clip_l"),
    "clip_g": partial(clip, part="clip_g"),
    "t5": t5,
}
STORED_TYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
MOST = 3  # names that a sentence lists

M = TypeVar("M", bound=nn.Module)


class Unfit(Refusal):
    """Parts that cannot be used, each with what is wrong with it."""

    def __init__(self, *faults: str):
        self.faults = faults
        super().__init__(f"{'; '.join(faults)}: copy or download the file again, or pass another")


class LoRAOrigin(NamedTuple):
    """A LoRA by the name of its file, that file's fingerprint, and how much it counts."""

    name: str
    fingerprint: str
    scale: float


@dataclass(frozen=True)
class Part:
    """One part of a model: its tensors under the official names, whatever their files call them."""

    name: str
    path: Path  # the file that holds it, or the index of several
    tensors: dict[str, AnyStored]
    extras: dict[str, Stored] = field(default_factory=dict)  # known by name, but in no module
    recipes: Mapping[str, Recipe] = field(default_factory=dict)  # where the names are diffusers'
    loras: tuple[LoRAOrigin, ...] = ()  # that its tensors are changed by
    make: Callable[[Any], nn.Module] | None = None  # its module, where not the plain one

    @property
    def shapes(self) -> dict[str, list[int]]:
        """The tensors' shapes."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @property
    def paths(self) -> list[Path]:
        """The files that hold it."""
        return sorted({path for tensor in self.tensors.values() for path in tensor.paths})

    @property
    def parameters(self) -> int:
        """Number of values, the positional table's left out."""
        return sum(
            torch.Size(shape).numel() for name, shape in self.shapes.items() if name != "pos_embed"
        )

    @property
    def config(self) -> Any:
        """The sizes that the shapes tell; `Unfit` where they are of no such network."""
        shapes = self.shapes
        try:
            config = CONFIGS[self.name].from_shapes(shapes)
            width = shapes["x_embedder.proj.weight"][0] if self.name == "mmdit" else None
        except KeyError as error:
            raise self.unfit(f"lacks {', '.join(self.known_as(error.args[0]))}") from None
        except (IndexError, ValueError):
            raise self.unfit("has tensors of impossible shapes") from None
        if width is not None and width != config.width:
            raise self.unfit(f"is {width} wide, which is not 64 x its depth of {config.depth}")
        return config

    def known_as(self, name: str) -> tuple[str, ...]:
        """What the files call an official tensor: another name, or several."""
        return self.recipes[name].names if name in self.recipes else (name,)

    def skeleton(self) -> nn.Module:
        """The module on the meta device; refused unless the file's tensors are exactly its own."""
        config = self.config
        try:
            with torch.device("meta"):
                module = (self.make or MODULES[self.name])(config)
        except (ArithmeticError, RuntimeError, TypeError, ValueError):
            raise self.unfit(f"has sizes that cannot be: {config}") from None
        shapes = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
        if faults := self.faults(shapes):
            released = released_name(config) if self.name == "mmdit" else ""
            looks = f"looks like {released}'s and " if released else ""
            raise self.unfit(looks + ", ".join(faults))
        return module

    def faults(self, shapes: Mapping[str, list[int]]) -> list[str]:
        """What keeps the tensors from being just those of these shapes, in words."""
        missing = sorted(shapes.keys() - {DERIVED.get(self.name)} - self.tensors.keys())
        named = [self.known_as(name) for name in missing]
        pieces = [own for names in named for own in names]
        lacks = [own for own in pieces if own not in self.tensors]
        odd = [name for name in self.tensors if name not in shapes and name not in pieces]
        known = {name: tensor for name, tensor in self.tensors.items() if name in shapes}
        untyped = [f"{n} as {t.dtype}" for n, t in known.items() if t.dtype not in STORED_TYPES]
        misshapen = [
            f"{', '.join(self.known_as(name))} of shape {tensor.shape} and not {shapes[name]}"
            for name, tensor in known.items()
            if tensor.shape != shapes[name]
        ]
        misshapen += [
            f"{', '.join(names)} of shapes that do not fit together"
            for names in named
            if not set(names) & set(lacks)
        ]
        misshapen += [
            f"{scale.name} of shape {scale.shape} and not of one value"
            for tensor in known.values()
            if (scale := tensor.scale) and torch.Size(scale.shape).numel() != 1
        ]
        does = "does" if len(odd) == 1 else "do"
        found = {
            f"lacks {some(lacks)}": lacks,
            f"has {some(odd)}, which {does} not belong there": odd,
            f"has {some(misshapen)}": misshapen,
            f"has {some(untyped)}, no plain floating-point type": untyped,
        }
        return [words for words, faults in found.items() if faults]

    def unfit(self, fault: str) -> "Unfit":
        """What is raised about a part that cannot be used."""
        return Unfit(f"the {TITLES[self.name]} in {self.path} {fault}")

    def tensor(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """One tensor of the module: mapped from the file where type and device fit, else converted,
        or derived where the file need not have it.
        """
        if name in self.tensors:
            return self.tensors[name].load(kept_type(name, dtype), device)
        if name == DERIVED["mmdit"]:
            return position_table(self.config.width, self.config.grid).to(device, dtype)
        if name == DERIVED["clip_l"]:
            return torch.eye(self.config.width).to(device, dtype)
        raise KeyError(f"the {TITLES[self.name]} in {self.path} has no {name}")

    def load(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """The module, filled."""
        module = self.skeleton()
        twin = DERIVED["t5"]
        tensors = {n: self.tensor(n, dtype, device) for n in module.state_dict() if n != twin}
        if self.name == "t5":
            tensors[twin] = tensors["shared.weight"]
            module.set_submodule("encoder.embed_tokens", module.get_submodule("shared"))
        return fill(module, tensors)


def unfitness(parts: Iterable[Part]) -> list[str]:
    """What keeps parts from being used, a fault of each; empty where all fit."""
    faults = []
    for part in parts:
        try:
            part.skeleton()
        except Unfit as unfit:
            faults += unfit.faults
    return faults


def some(items: Sequence[str]) -> str:
    """The first of a list, and how many more there are."""
    more = f" and {len(items) - MOST} more" if len(items) > MOST else ""
    return ", ".join(items[:MOST]) + more


def kept_type(name: str, dtype: torch.dtype) -> torch.dtype:
    """The type to load to: T5's `wo` overflows float16 and stays in float32, as in transformers."""
    return torch.float32 if dtype == torch.float16 and name.endswith(".wo.weight") else dtype


def fill(module: M, tensors: Mapping[str, Tensor]) -> M:
    """Give a module on the meta device its tensors, for inference; RuntimeError if not all."""
    module.load_state_dict(tensors, strict=True, assign=True)
    for child in module.modules():  # CLIP's row numbers are in no file; from meta it reads garbage
        places = getattr(child, "position_ids", None)
        if isinstance(places, Tensor):
            device = next(iter(tensors.values())).device
            child.position_ids = torch.arange(places.shape[-1], device=device)[None]
    everything = [*module.named_parameters(), *module.named_buffers()]
    left = [name for name, tensor in everything if tensor.is_meta]
    if left:
        raise RuntimeError(f"nothing was loaded into {left}")
    return module.eval().requires_grad_(False)  # eval: T5 would drop values at random

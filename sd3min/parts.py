"""What a safetensors file holds, and how a part of it becomes a module: strictly, without a copy.

A part is built on the meta device, where tensors have shapes and no storage, compared with the file
tensor by tensor, and then given the file's own memory-mapped tensors.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import T5EncoderModel

from sd3min.autoencoder import Autoencoder
from sd3min.config import (
    CLIP_L,
    AutoencoderConfig,
    CLIPConfig,
    MMDiTConfig,
    Refusal,
    T5Config,
)
from sd3min.mmdit import MMDiT, position_table
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
MARKS = {  # how some names begin in each part, and in no other architecture
    "mmdit": "joint_blocks.",
    "autoencoder": "decoder.up.",
    "clip_l": "text_model.",
    "clip_g": "text_model.",
    "t5": "encoder.block.",
}
DERIVED = {  # what a module has and its file need not
    "mmdit": "pos_embed",  # computed as the paper does
    "clip_l": "text_projection.weight",  # the identity, as CLIP-L's pooled vector is not projected
    "t5": "encoder.embed_tokens.weight",  # another name of shared.weight
}
UNUSED = ("position_ids", "logit_scale", "spiece_model")  # some files hold them, no module does
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

M = TypeVar("M", bound=nn.Module)


class Stored(NamedTuple):
    """A tensor in a file, as the header describes it."""

    name: str
    shape: list[int]
    dtype: str


@dataclass(frozen=True)
class Part:
    """One part in one file: its tensors, by the names that the module gives them."""

    name: str
    path: Path
    tensors: dict[str, Stored]

    @property
    def shapes(self) -> dict[str, list[int]]:
        """The tensors' shapes."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @property
    def parameters(self) -> int:
        """Number of values, the positional table's left out."""
        return sum(
            torch.Size(shape).numel() for name, shape in self.shapes.items() if name != "pos_embed"
        )

    @property
    def config(self) -> Any:
        """The sizes that the shapes tell."""
        shapes = self.shapes
        try:
            config = CONFIGS[self.name].from_shapes(shapes)
            width = shapes["x_embedder.proj.weight"][0] if self.name == "mmdit" else None
        except KeyError as error:
            raise self.refusal(f"lacks {error.args[0]}") from None
        except (IndexError, ValueError):
            raise self.refusal("has tensors of impossible shapes") from None
        if width is not None and width != config.width:
            raise self.refusal(f"is {width} wide, which is not 64 x its depth of {config.depth}")
        return config

    def skeleton(self) -> nn.Module:
        """The module on the meta device; refused unless the file's tensors are exactly its own."""
        config = self.config
        try:
            with torch.device("meta"):
                module = MODULES[self.name](config)
        except (ArithmeticError, RuntimeError, TypeError, ValueError):
            raise self.refusal(f"has sizes that cannot be: {config}") from None
        shapes = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
        required = shapes.keys() - {DERIVED.get(self.name)}
        faults = [f"lacks {name}" for name in sorted(required - self.tensors.keys())]
        for name, (_, shape, dtype) in self.tensors.items():
            if name not in shapes:
                faults.append(f"has {name}, which does not belong there")
            elif shape != shapes[name]:
                faults.append(f"has {name} of shape {shape} and not {shapes[name]}")
            elif dtype not in STORED_TYPES:
                faults.append(f"has {name} as {dtype}, which is no plain floating-point type")
        if faults:
            more = f", and {len(faults) - 3} more faults" if len(faults) > 3 else ""
            raise self.refusal(", ".join(faults[:3]) + more)
        return module

    def refusal(self, fault: str) -> Refusal:
        """The sentence about a part that cannot be used."""
        title = TITLES[self.name]
        return Refusal(
            f"the {title} in {self.path} {fault}: copy or download the file again, or pass another"
        )

    def read(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """The tensors, mapped from the file where type and device fit, else converted singly."""
        with safe_open(self.path, framework="pt") as file:
            return {
                name: file.get_tensor(stored.name).to(device, kept_type(name, dtype))
                for name, stored in self.tensors.items()
            }

    def load(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """The module, filled."""
        module, config = self.skeleton(), self.config
        tensors = self.read(dtype, device)
        if self.name == "mmdit" and "pos_embed" not in tensors:
            table = position_table(config.width, config.grid)
            tensors["pos_embed"] = table.to(device, dtype)
        if self.name == "clip_l":
            tensors["text_projection.weight"] = torch.eye(config.width).to(device, dtype)
        if isinstance(module, T5EncoderModel):
            tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
            module.encoder.embed_tokens = module.shared
        return fill(module, tensors)


def kept_type(name: str, dtype: torch.dtype) -> torch.dtype:
    """The type to load to: T5's `wo` overflows float16 and stays in float32, as in transformers."""
    return torch.float32 if dtype == torch.float16 and name.endswith(".wo.weight") else dtype


def fill(module: M, tensors: Mapping[str, Tensor]) -> M:
    """Give a module that was built on the meta device all its tensors, ready for inference."""
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


def read_header(path: Path) -> tuple[list[Stored], dict[str, str]]:
    """What a safetensors file says about its tensors, and its metadata."""
    try:
        if not path.exists():
            raise Refusal(f"{path} does not exist: pass the path of a .safetensors file")
        if not path.is_file():
            raise Refusal(f"{path} is not a file: pass the path of a .safetensors file")
        if path.stat().st_size == 0:
            raise Refusal(f"{path} is empty: copy or download it again")
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            stored = [
                Stored(name, tensor.get_shape(), tensor.get_dtype())
                for name, tensor in slices.items()
                if not name.endswith(UNUSED)
            ]
            return stored, file.metadata() or {}
    except OSError as error:
        raise Refusal(
            f"{path} cannot be read ({error.strerror or error}): pass a file that can"
        ) from None
    except SafetensorError as error:
        raise Refusal(
            f"{path} is truncated or no safetensors file ({error}): copy or download it again"
        ) from None


def bare_part(tensors: Mapping[str, Stored]) -> str:
    """The part whose names have no prefix; of the CLIPs, CLIP-L is 768 wide or does not project."""
    part = next((p for p, mark in MARKS.items() if any(n.startswith(mark) for n in tensors)), "")
    projection = tensors.get("text_projection.weight")
    if part == "clip_l" and projection and projection.shape[:1] != [CLIP_L.width]:
        return "clip_g"
    return part


def open_file(path: str | Path) -> tuple[dict[str, Part], dict[str, str]]:
    """The parts that a safetensors file holds, and its metadata; only the header is read."""
    path = Path(path)
    stored, metadata = read_header(path)
    if not stored:
        raise Refusal(f"{path} holds no tensors: pass an official Stable Diffusion 3 file")
    found: dict[str, dict[str, Stored]] = {}
    for tensor in stored:
        part = next((p for p, start in PREFIXES.items() if tensor.name.startswith(start)), "")
        found.setdefault(part, {})[tensor.name.removeprefix(PREFIXES.get(part, ""))] = tensor
    if "" in found and (part := bare_part(found[""])) not in found:
        found[part] = found.pop("")
    for part, tensors in found.items():
        if not part or not any(name.startswith(MARKS[part]) for name in tensors):
            stranger = next(iter(tensors.values())).name
            raise Refusal(
                f"{path} holds {stranger}, which is in no official Stable Diffusion 3 file: "
                "pass one of those"
            )
    if "clip_l" in found:
        found["clip_l"].pop(DERIVED["clip_l"], None)
    if "t5" in found and (embedding := found["t5"].pop(DERIVED["t5"], None)):
        found["t5"].setdefault("shared.weight", embedding)
    parts = {part: Part(part, path, found[part]) for part in TITLES if part in found}
    return parts, metadata

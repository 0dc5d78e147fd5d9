"""T5 in eight bits: its linear layers, nearly all of its 4.7 billion values, at a byte each.

They are converted to the working type where they are used, so that what is saved is memory and not
time. A layer is made as soon as its tensor is read: T5 is never whole in a longer type.
"""

import importlib
import importlib.util
import logging
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd3min.config import Refusal
from sd3min.parts import DERIVED, Part, fill, kept_type

LINEAR = re.compile(r"\.(q|k|v|o|wi_0|wi_1|wo)\.weight$")  # of T5, and of nothing else in it
Make = Callable[[Part, str, torch.dtype, torch.device], nn.Module]


class Int8Weight(nn.Module):
    """A linear layer whose weights alone have 8 bits: whole numbers from −127 to 127, and for each
    row what they are to be multiplied by.

    `weight` is in int8; transformers asks for it, and leaves the input as it is.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor):
        super().__init__()
        largest = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-30)
        self.dtype = weight.dtype
        self.register_buffer("weight", (weight.float() * (127 / largest)).round().to(torch.int8))
        self.register_buffer("scale", (largest[:, 0] * (128 / 127)))

    def forward(self, x: Tensor) -> Tensor:
        """[…, inputs] to […, outputs]; 128ths keep the sums of float16 within its range."""
        made = F.linear(x.to(self.dtype) / 128, self.weight.to(self.dtype))
        return (made * self.scale).to(self.dtype)


class Fp8Linear(nn.Module):
    """Values in fp8 as they are stored, with the scale of the whole tensor if there is one."""

    weight = None  # of which transformers would take the type
    values: Tensor
    scale: Tensor | None

    def __init__(self, values: Tensor, scale: Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """[…, inputs] to […, outputs]."""
        weight = self.values if self.scale is None else self.values.float() * self.scale.float()
        return F.linear(x.to(self.dtype), weight.to(self.dtype))


def int8(part: Part, name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A layer in int8, of a weight in any type."""
    return Int8Weight(part.tensor(name, dtype, device))


def fp8(part: Part, name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A layer in fp8, of a weight that is stored so; others stay in the working type."""
    stored = part.tensors[name]
    scale = stored.scale and stored.scale.read().reshape(()).to(device)
    return Fp8Linear(stored.read().to(device), scale, kept_type(name, dtype))


def bnb(part: Part, name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A layer of bitsandbytes (Dettmers et al. 2022, "LLM.int8()")."""
    theirs: Any = importlib.import_module("bitsandbytes.nn")

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of every conversion
    weight = part.tensor(name, dtype, device)
    rows, inputs = weight.shape
    layer: Any = theirs.Linear8bitLt(inputs, rows, False, has_fp16_weights=False, device="meta")
    layer.weight = theirs.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
    return layer.to(device)


KINDS: dict[str, Make] = {"int8": int8, "fp8": fp8, "bnb": bnb}


def check(part: Part, kind: str) -> None:
    """Refuse a kind that there is not, or not here, or not of this file."""
    if kind not in KINDS:
        raise Refusal(f"t5 {kind} is not one of True, False, {', '.join(KINDS)}")
    if kind == "bnb" and not importlib.util.find_spec("bitsandbytes"):
        raise Refusal("t5 bnb needs bitsandbytes: pip install sd3min[quant], or pass t5 int8")
    types = {tensor.dtype for name, tensor in part.tensors.items() if name.endswith(".wo.weight")}
    if kind == "fp8" and not all(dtype.startswith("F8") for dtype in types):
        raise Refusal(
            f"t5 fp8 keeps what is stored in fp8, and the T5 in {part.path} is in "
            f"{'+'.join(sorted(types))}: pass its file in fp8, or t5 int8"
        )


def load_t5(part: Part, dtype: torch.dtype, device: torch.device, kind: str) -> nn.Module:
    """The encoder, its linear layers of a kind."""
    module = part.skeleton()
    linear = [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]
    for name in linear:
        module.set_submodule(name, nn.Identity())
    twin = DERIVED["t5"]
    tensors = {n: part.tensor(n, dtype, device) for n in module.state_dict() if n != twin}
    tensors[twin] = tensors["shared.weight"]
    module.set_submodule("encoder.embed_tokens", module.get_submodule("shared"))
    fill(module, tensors)
    for name in linear:
        module.set_submodule(name, KINDS[kind](part, f"{name}.weight", dtype, device))
    return module.requires_grad_(False)

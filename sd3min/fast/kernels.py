"""What lies between the linear layers of a joint block.

Each function is a line or two of PyTorch, for every device and type. In bfloat16 on a CPU it is a
loop of `kernels.c` instead, where a C compiler is found.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from sd3min import mmdit
from sd3min.config import HEAD_WIDTH
from sd3min.fast import native

Tokens = Float[Tensor, "b n d"]
Rows = Float[Tensor, "b d"]


def modulate(tokens: Tokens, shift: Rows, scale: Rows) -> Tokens:
    """Normalise every token, then scale and shift it: `mmdit.modulate`."""
    if not native.serves(tokens):
        return mmdit.modulate(tokens, shift[:, None], scale[:, None])
    out = torch.empty_like(tokens)
    sizes = *tokens.shape, shift.stride(0)
    native.call("modulate", out, tokens, shift, scale, *sizes, mmdit.NORM_EPS)
    return out


def add_gated_(tokens: Tokens, gate: Rows, update: Tokens) -> Tokens:
    """tokens + gate·update, in the memory of the tokens."""
    if not native.serves(tokens):
        return tokens.addcmul_(gate[:, None], update)
    native.call("add_gated", tokens, gate, update.contiguous(), *tokens.shape, gate.stride(0))
    return tokens


def gelu_(hidden: Tensor) -> Tensor:
    """GELU with tanh of […], which may use the memory of its input."""
    if not native.serves(hidden):
        return F.gelu(hidden, approximate="tanh")
    native.call("gelu", hidden, hidden.numel())
    return hidden


def activate(x: Float[Tensor, "b d h w"], scale: Tensor, shift: Tensor) -> Tensor:
    """SiLU of x·scale + shift, each [d], rounded once."""
    places = rearrange(x, "b d h w -> b h w d")
    if not native.serves(places):
        return F.silu(places * scale + shift).to(x.dtype).permute(0, 3, 1, 2)
    out = torch.empty_like(places)
    native.call("activate", out, places, scale, shift, places.shape[:3].numel(), x.shape[1])
    return out.permute(0, 3, 1, 2)


def normalise_heads(qkv: Tensor, ln_q: nn.Module, ln_k: nn.Module) -> Tensor:
    """Queries, keys and values [b, n, 3·d]: norms of each head's queries and keys, where the model
    has them (§5.3.2, Fig. 5).
    """
    if not isinstance(ln_q, nn.RMSNorm) or not isinstance(ln_k, nn.RMSNorm):
        return qkv
    if native.serves(qkv):
        rows, heads = qkv.shape[:2].numel(), qkv.shape[2] // (3 * HEAD_WIDTH)
        weights = ln_q.weight, ln_k.weight
        native.call("normalise_heads", qkv, *weights, rows, heads, mmdit.NORM_EPS)
        return qkv
    q, k, v = rearrange(qkv, "b n (three a e) -> three b n a e", three=3, e=HEAD_WIDTH)
    return rearrange([ln_q(q), ln_k(k), v], "three b n a e -> b n (three a e)")


def attention(qkv: Float[Tensor, "b n d3"], repeats: int = 1) -> Tokens:
    """Attention among all tokens, the last of which may stand for several equal ones.

    A key that is there m times adds m equal terms to the sums of the softmax: in the loop one term,
    exp(s + ln m).
    """
    if native.serves(qkv):
        return joint_attention(qkv[:, :0], qkv, repeats)[1]
    q, k, v = split_heads(qkv)
    if repeats > 1:  # ln m as a mask would be rounded in bfloat16
        more = qkv[:, -1:].expand(-1, repeats - 1, -1)
        _, k, v = split_heads(torch.cat([qkv, more], dim=1))
    mixed = F.scaled_dot_product_attention(q, k, v)
    return rearrange(mixed, "b a n e -> b n (a e)")


def split_heads(qkv: Float[Tensor, "b n d3"]) -> Float[Tensor, "three b a n e"]:
    """Queries, keys and values of each head."""
    return rearrange(qkv, "b n (three a e) -> three b a n e", three=3, e=HEAD_WIDTH)


def joint_attention(
    context_qkv: Float[Tensor, "b l d3"], image_qkv: Float[Tensor, "b n d3"], repeats: int = 1
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b n d"]]:
    """Attention of both streams among both; `repeats` counts the last row of the context."""
    rows = context_qkv.shape[1], image_qkv.shape[1]
    if native.serves(image_qkv):
        batch, _, width = image_qkv.shape
        to_context, to_image = (image_qkv.new_empty(batch, count, width // 3) for count in rows)
        last = math.log(repeats) * HEAD_WIDTH**0.5  # the scores are scaled after it is added
        sizes = batch, *rows, width // (3 * HEAD_WIDTH)
        native.call("attention", to_context, to_image, context_qkv, image_qkv, *sizes, last)
        return to_context, to_image
    both = torch.cat([image_qkv, context_qkv], dim=1)  # the context last, for its last row
    to_image, to_context = attention(both, repeats).split(rows[::-1], dim=1)
    return to_context, to_image


def rotation() -> Float[Tensor, "64 64"]:
    """The orthogonal Hadamard matrix of 64 rows, which is its own inverse."""
    matrix = torch.ones(1, 1)
    for _ in range(6):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / 8


def rotate(x: Tensor) -> Tensor:
    """[…, i], i in pieces of 64, each rotated, so that a value that stands out is spread."""
    return (x.unflatten(-1, (-1, 64)) @ rotation().to(x)).flatten(-2)


def quantise(x: Tensor) -> tuple[Tensor, Float[Tensor, "... 1"]]:
    """Rows […, i] rotated, as whole numbers of ±127, and what each is to be multiplied by."""
    if native.serves(x) and x.shape[-1] % 64 == 0:
        whole = torch.empty_like(x, dtype=torch.int8)
        scales = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
        native.call("quantise", whole, scales, x, scales.numel(), x.shape[-1])
        return whole, scales
    exact = rotate(x.float())
    scales = exact.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return (exact / scales).round().to(torch.int8), scales


def rescale_(y: Tensor, scales: Float[Tensor, "... 1"], bias: Tensor) -> Tensor:
    """y·scales + bias of y […, o] and bias [o], which may use the memory of y."""
    if not native.serves(y):
        return (y * scales + bias).to(bias.dtype)
    native.call("rescale", y, scales, bias, y.shape[:-1].numel(), y.shape[-1])
    return y


def linear(x: Float[Tensor, "... i"], pieces: Sequence[Tensor], bias: Tensor) -> Tensor:
    """x·Wᵀ + bias, of weights in pieces, one below the other, in whatever type they are stored."""
    out = x.new_empty(*x.shape[:-1], len(bias))
    lengths = [len(piece) for piece in pieces]
    places, biases = out.split(lengths, dim=-1), bias.split(lengths)
    for place, weight, own in zip(places, pieces, biases, strict=True):
        even = x.shape[-1] % 32 == len(own) % 32 == 0
        if even and native.serves(x) and weight.dtype in (torch.bfloat16, torch.float16):
            sizes = x.shape[:-1].numel(), x.shape[-1], len(own), len(bias)
            native.call("linear", place, x, weight, own, *sizes, weight.dtype == torch.float16)
        else:
            place.copy_(F.linear(x, weight.to(x.dtype), own))
    return out


def put_(place: Tensor, values: Tensor) -> None:
    """place[:] = values, of any type; float16 to bfloat16 without the help of other threads."""
    if values.dtype == torch.float16 and values.is_contiguous() and native.serves(place):
        native.call("shorten", place, values, values.numel())
    else:
        place.copy_(values)

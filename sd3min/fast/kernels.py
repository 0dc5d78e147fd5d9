"""What lies between the linear layers of a joint block.

Each function is a line or two of PyTorch, for every device and type. In bfloat16 on a CPU it is a
loop of `kernels.c` instead, where a C compiler is found.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from sd3min import mmdit
from sd3min.config import HEAD_WIDTH

Tokens = Float[Tensor, "b n d"]
Rows = Float[Tensor, "b d"]


def modulate(tokens: Tokens, shift: Rows, scale: Rows) -> Tokens:
    """Normalise every token, then scale and shift it: `mmdit.modulate`."""
    return mmdit.modulate(tokens, shift[:, None], scale[:, None])


def add_gated_(tokens: Tokens, gate: Rows, update: Tokens) -> Tokens:
    """tokens + gate·update, in the memory of the tokens."""
    return tokens.addcmul_(gate[:, None], update)


def gelu_(hidden: Tensor) -> Tensor:
    """GELU with tanh, which may use the memory of its input."""
    return F.gelu(hidden, approximate="tanh")


def normalise_heads(qkv: Tensor, ln_q: nn.Module, ln_k: nn.Module) -> Tensor:
    """Norms of each head's queries and keys, where the model has them (§5.3.2, Fig. 5)."""
    if not isinstance(ln_q, nn.RMSNorm):
        return qkv
    q, k, v = rearrange(qkv, "b n (three a e) -> three b n a e", three=3, e=HEAD_WIDTH)
    return rearrange([ln_q(q), ln_k(k), v], "three b n a e -> b n (three a e)")


def attention(qkv: Float[Tensor, "b n d3"], repeats: int = 1) -> Tokens:
    """Attention among all tokens, the last of which may stand for several equal ones.

    A key that is there m times adds m equal terms to the sums of the softmax: one of exp(s + ln m).
    """
    q, k, v = rearrange(qkv, "b n (three a e) -> three b a n e", three=3, e=HEAD_WIDTH)
    mask = None
    if repeats > 1:
        mask = torch.zeros(1, k.shape[-2], dtype=qkv.dtype, device=qkv.device)
        mask[0, -1] = math.log(repeats)
    return rearrange(F.scaled_dot_product_attention(q, k, v, mask), "b a n e -> b n (a e)")


def joint_attention(
    context_qkv: Float[Tensor, "b l d3"], image_qkv: Float[Tensor, "b n d3"], repeats: int = 1
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b n d"]]:
    """Attention of both streams among both; `repeats` counts the last row of the context."""
    rows = [image_qkv.shape[1], context_qkv.shape[1]]  # the context last, for its last row
    to_image, to_context = attention(torch.cat([image_qkv, context_qkv], 1), repeats).split(rows, 1)
    return to_context, to_image

"""The text encoders without transformers, whose import takes longer than a small picture.

CLIP's and T5's forward passes, for inference, in modules whose tensors have the names of
transformers' own.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from sd3min.checkpoint import Checkpoint
from sd3min.config import HEAD_WIDTH, CLIPConfig, T5Config

FARTHEST = 128  # tokens apart from which on T5 tells no distances
EPSILON = 1e-6  # of T5's norm
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "clip_l": lambda x: x * torch.sigmoid(1.702 * x),
    "clip_g": F.gelu,
}


class CLIPOutputs(NamedTuple):
    """The streams before and after the last layer, and the pooled vector, projected."""

    hidden_states: tuple[Float[Tensor, "b n d"], Float[Tensor, "b n d"]]
    text_embeds: Float[Tensor, "b d"]


class T5Outputs(NamedTuple):
    """T5's rows."""

    last_hidden_state: Float[Tensor, "b n d"]


def embedding(rows: int, width: int) -> nn.Embedding:
    """A table that is not drawn at random: for that PyTorch imports its compiler where there is no
    memory to draw into.
    """
    return nn.Embedding.from_pretrained(torch.empty(rows, width))


def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Float[Tensor, "b n d"]:
    """Attention in heads of 64."""
    q, k, v = (rearrange(each, "b n (h c) -> b h n c", c=HEAD_WIDTH) for each in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v, **options), "b h n c -> b n (h c)")


class CLIPAttention(nn.Module):
    """Attention to what came before."""

    def __init__(self, width: int):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Each row from those up to it."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.out_proj(attend(q, k, v, is_causal=True))


class CLIPLayer(nn.Module):
    """Attention and MLP, each after a norm."""

    def __init__(self, config: CLIPConfig, activation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.self_attn = CLIPAttention(config.width)
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(config.width) for _ in range(2))
        fc1 = nn.Linear(config.width, config.mlp_width)
        self.mlp = nn.ModuleDict({"fc1": fc1, "fc2": nn.Linear(config.mlp_width, config.width)})
        self.activation = activation

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """The stream, one layer further."""
        x = x + self.self_attn(self.layer_norm1(x))
        hidden = self.activation(self.mlp["fc1"](self.layer_norm2(x)))
        return x + self.mlp["fc2"](hidden)


class CLIP(nn.Module):
    """A CLIP text encoder, `part` "clip_l" or "clip_g" (Radford et al. 2021)."""

    def __init__(self, config: CLIPConfig, part: str):
        """ValueError where heads do not make up the width."""
        super().__init__()
        if not config.width or config.width % HEAD_WIDTH:
            raise ValueError(f"{config.width} is no multiple of {HEAD_WIDTH}")
        rows = {
            "token_embedding": embedding(config.vocabulary, config.width),
            "position_embedding": embedding(config.length, config.width),
        }
        layers = [CLIPLayer(config, ACTIVATIONS[part]) for _ in range(config.layers)]
        self.text_model: Any = nn.Module()
        self.text_model.embeddings = nn.ModuleDict(rows)
        self.text_model.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.text_model.final_layer_norm = nn.LayerNorm(config.width)
        self.text_projection = nn.Linear(config.width, config.width, bias=False)
        self.config = CLIPLength(config.length)

    @property
    def device(self) -> torch.device:
        """Where ids are to be."""
        return self.text_projection.weight.device

    def forward(self, ids: Int[Tensor, "b n"], output_hidden_states: bool = True) -> CLIPOutputs:
        """The last two streams, whether or not they are asked for; pooled at the largest id."""
        rows, layers = self.text_model.embeddings, list(self.text_model.encoder["layers"])
        places = torch.arange(ids.shape[1], device=ids.device)
        x = before = rows["token_embedding"](ids) + rows["position_embedding"](places)
        for layer in layers:
            x, before = layer(x), x
        ends = self.text_model.final_layer_norm(x)[torch.arange(len(ids)), ids.argmax(dim=1)]
        return CLIPOutputs((before, x), self.text_projection(ends))


class CLIPLength(NamedTuple):
    """What is asked of a CLIP's config: rows that it takes."""

    max_position_embeddings: int


class RMSNorm(nn.Module):
    """T5's norm, computed in float32 or better, and scaled."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """In the type of the scales."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = F.rms_norm(wide, wide.shape[-1:], eps=EPSILON)
        return self.weight * normed.to(self.weight.dtype)


class T5Attention(nn.Module):
    """Attention without a scale, whose logits know how far tokens are apart."""

    def __init__(self, config: T5Config, first: bool):
        super().__init__()
        inner = config.heads * HEAD_WIDTH
        self.q, self.k, self.v = (nn.Linear(config.width, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, config.width, bias=False)
        if first:
            self.relative_attention_bias = embedding(config.distances, config.heads)

    def forward(self, x: Float[Tensor, "b n d"], bias: Tensor) -> Float[Tensor, "b n d"]:
        """Each row from all."""
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o(attend(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0))

    def bias(self, length: int) -> Float[Tensor, "1 h n n"]:
        """What the first layer adds to the logits of all: a value for each bucket of distances."""
        table = self.relative_attention_bias
        places = torch.arange(length, device=table.weight.device)
        found = table(distance_buckets(places[None] - places[:, None], table.num_embeddings))
        return rearrange(found, "q k h -> 1 h q k")


def distance_buckets(distances: Int[Tensor, "q k"], buckets: int) -> Int[Tensor, "q k"]:
    """Half of the buckets for tokens that follow, of each half the first half for one distance
    each, and the others in powers up to `FARTHEST` (Raffel et al. 2020, §2.1).
    """
    side = buckets // 2
    near, apart = side // 2, distances.abs()
    power = torch.log(apart.clamp(min=1).float() / near) / math.log(FARTHEST / near)
    far = (near + (power * (side - near)).long()).clamp(max=side - 1)
    return torch.where(apart < near, apart, far) + side * (distances > 0)


class T5AttentionHalf(nn.Module):
    """The first half of a T5's block."""

    def __init__(self, config: T5Config, first: bool):
        super().__init__()
        self.SelfAttention = T5Attention(config, first)
        self.layer_norm = RMSNorm(config.width)

    def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """The stream, and the bias of distances, which the first block makes."""
        bias = self.SelfAttention.bias(x.shape[1]) if bias is None else bias
        return bounded(x + self.SelfAttention(self.layer_norm(x), bias)), bias


def bounded(x: Tensor) -> Tensor:
    """A stream of float16 without infinities, as transformers has it."""
    if x.dtype != torch.float16:
        return x
    most = torch.finfo(x.dtype).max - (1000 if x.isinf().any() else 0)
    return x.clamp(-most, most)


class T5MLPHalf(nn.Module):
    """The second half: a gated MLP (Shazeer 2020)."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.DenseReluDense: Any = nn.Module()
        wide = {name: nn.Linear(config.width, config.mlp_width, False) for name in ("wi_0", "wi_1")}
        for name, layer in {**wide, "wo": nn.Linear(config.mlp_width, config.width, False)}.items():
            self.DenseReluDense.add_module(name, layer)
        self.layer_norm = RMSNorm(config.width)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """The stream; under float16 the last layer stays in float32, and so does what follows."""
        normed, mlp = self.layer_norm(x), self.DenseReluDense
        hidden = F.gelu(mlp.wi_0(normed), approximate="tanh") * mlp.wi_1(normed)
        weight = mlp.wo.weight  # none, or whole numbers, where the layer takes any type
        if isinstance(weight, Tensor) and weight.is_floating_point():
            hidden = hidden.to(weight.dtype)
        return x + mlp.wo(hidden)


class T5(nn.Module):
    """The encoder half of a T5 v1.1 (Raffel et al. 2020)."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.shared = embedding(config.vocabulary, config.width)
        self.encoder: Any = nn.Module()
        self.encoder.embed_tokens = embedding(config.vocabulary, config.width)
        self.encoder.block = nn.ModuleList()
        for index in range(config.layers):
            halves = [T5AttentionHalf(config, index == 0), T5MLPHalf(config)]
            self.encoder.block.append(nn.ModuleDict({"layer": nn.ModuleList(halves)}))
        self.encoder.final_layer_norm = RMSNorm(config.width)

    @property
    def device(self) -> torch.device:
        """Where ids are to be."""
        return self.encoder.final_layer_norm.weight.device

    def forward(self, ids: Int[Tensor, "b n"]) -> T5Outputs:
        """Rows of all tokens, padding attended to."""
        x, bias = self.shared(ids), None
        for block in self.encoder.block:
            attention, mlp = block["layer"]
            x, bias = attention(x, bias)
            x = mlp(x)
        return T5Outputs(self.encoder.final_layer_norm(x))


ENCODERS: dict[str, Callable[[Any], nn.Module]] = {
    "clip_l": partial(CLIP, part="clip_l"),
    "clip_g": partial(CLIP, part="clip_g"),
    "t5": T5,
}


def without_transformers(opened: Checkpoint) -> Checkpoint:
    """The same files, whose text encoders become these modules."""
    parts = {n: replace(part, make=ENCODERS.get(n)) for n, part in opened.parts.items()}
    return replace(opened, parts=parts)

"""The autoencoder's decoder in strips of rows: quicker, and small at any size.

The same function as `autoencoder.Decoder`, with the same weights, by four means:

- strips lie in memory place by place, all channels of a place together, as the processor's
  convolutions want them;
- a layer takes a map's strips one by one and leaves nothing of them behind, so that a map and what
  becomes of it are never both whole, and what is worked on stays in the caches;
- what a group normalisation needs to know of the whole map, the mean and variance of each channel,
  is gathered while the map grows;
- a 3×3 convolution after every place was repeated four times is four 2×2 convolutions of the small
  map, one for each place of a block of four: less than half of the products.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn

from sd3min.autoencoder import Decoder, Images, Latents, ResidualBlock, SelfAttention
from sd3min.fast import kernels
from sd3min.fast.native import trim

Strip = Float[Tensor, "1 d _ w"]  # of any number of rows

TAPS = [[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]]
"""Rows of a kernel that meet the same row of the small map: [row of the block, small row, row]."""


class Map:
    """A feature map: its strips from above to below, and the mean and variance of its channels, in
    float32 or, for strips of float64, in float64.
    """

    def __init__(self, strips: Iterable[Strip] = ()):
        self.strips: list[Strip] = []
        self.rows, self.mean, self.variance = 0, torch.zeros(()), torch.zeros(())
        for strip in strips:
            self.append(strip)

    def append(self, strip: Strip) -> None:
        """Let the map grow by a strip."""
        exact = torch.promote_types(strip.dtype, torch.float32)
        unused, unused_too = strip.new_zeros(2, strip.shape[1], dtype=exact)
        mean, variance = torch.batch_norm_update_stats(strip, unused, unused_too, 0.0)
        self.strips.append(strip)
        self.rows += strip.shape[2]
        share, offset = strip.shape[2] / self.rows, mean - self.mean
        self.mean = self.mean + share * offset
        change = variance - self.variance + (1 - share) * offset**2
        self.variance = self.variance + share * change

    def normalisation(self, norm: nn.GroupNorm) -> Callable[[Strip], Strip]:
        """What a group normalisation of the whole map does to a part of it: since mean and variance
        are known, a batch normalisation at rest.
        """
        mean, variance = self.grouped(norm)
        weight, bias = norm.weight.to(mean), norm.bias.to(mean)
        return lambda strip: F.batch_norm(strip, mean, variance, weight, bias, eps=norm.eps)

    def activation(self, norm: nn.GroupNorm) -> Callable[[Strip], Strip]:
        """The same and SiLU, rounded once."""
        mean, variance = self.grouped(norm)
        scale = norm.weight.to(mean) / (variance + norm.eps).sqrt()
        shift = norm.bias.to(mean) - mean * scale
        return lambda strip: kernels.activate(strip, scale, shift)

    def grouped(self, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
        """Mean and variance of each channel's group."""
        means, variances = (
            rearrange(part, "(g d) -> g d", g=norm.num_groups)
            for part in (self.mean, self.variance)
        )
        mean = means.mean(dim=1, keepdim=True)
        variance = (variances + (means - mean) ** 2).mean(dim=1, keepdim=True)
        return mean.expand_as(means).flatten(), variance.expand_as(means).flatten()


def framed(strips: list[Strip], do: Callable[[Strip], Strip]) -> Iterator[tuple[Strip, Strip]]:
    """Each strip, taken off the list, and what `do` makes of it and of the next row on either side,
    or zeros beyond the edge.
    """
    edge = torch.zeros_like(strips[0][:, :, :1])
    above = edge
    while strips:
        strip = strips.pop(0)
        below = do(strips[0][:, :, :1]) if strips else edge
        frame = torch.cat([above, do(strip), below], dim=2)
        above = frame[:, :, -2:-1].clone()
        yield strip, frame


def convolved(norm: nn.GroupNorm, conv: nn.Conv2d, x: Map) -> Iterator[tuple[Strip, Strip]]:
    """Each strip, which the map no longer holds, and what normalisation, SiLU and a 3×3 convolution
    make of it.
    """
    for strip, frame in framed(x.strips, x.activation(norm)):
        yield strip, F.conv2d(frame, conv.weight, conv.bias, padding=(0, 1))


def residual(block: ResidualBlock, x: Map) -> Map:
    """A residual block, in place of its input or of its shortcut."""
    shortcuts, hidden, out = [], Map(), Map()
    for strip, outcome in convolved(block.norm1, block.conv1, x):
        hidden.append(outcome)
        shortcuts.append(block.nin_shortcut(strip))
    for _, outcome in convolved(block.norm2, block.conv2, hidden):
        out.append(shortcuts.pop(0).add_(outcome))
    return out


def linear(conv: nn.Conv2d, places: Float[Tensor, "... d"]) -> Float[Tensor, "... o"]:
    """A 1×1 convolution of places whose channels come last."""
    return F.linear(places, conv.weight.flatten(1), conv.bias)


def attend(attention: SelfAttention, x: Map) -> Map:
    """Attention among all places, in place of its input."""
    normed = x.normalisation(attention.norm)
    places = [rearrange(normed(strip), "1 d h w -> 1 1 (h w) d") for strip in x.strips]
    k, v = (
        torch.cat([linear(part, some) for some in places], dim=2)
        for part in (attention.k, attention.v)
    )
    out = Map()
    for strip, some in zip(x.strips, places, strict=True):
        attended = F.scaled_dot_product_attention(linear(attention.q, some), k, v)
        rows = linear(attention.proj_out, attended)
        out.append(strip.add_(rearrange(rows, "1 1 (h w) d -> 1 d h w", w=strip.shape[3])))
    return out


class Upsample(nn.Module):
    """A 3×3 convolution of a map that has every place of a small map four times."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        taps = torch.tensor(TAPS, dtype=torch.float64, device=conv.weight.device)
        kernels = einsum(conv.weight.double(), taps, taps, "o i y x, a p y, b q x -> a b o p q i")
        kernels = kernels.contiguous().to(conv.weight.dtype)
        self.weight = nn.Parameter(rearrange(kernels, "a b o p q i -> a b o i p q"), False)
        self.bias, self.width = conv.bias, conv.out_channels

    def forward(self, x: Map) -> Map:
        """A map of twice the size, in strips of twice the rows."""
        large = Map()
        for strip, frame in framed(x.strips, lambda strip: strip):
            rows, w = strip.shape[2:]
            blocks = strip.new_empty(1, 2 * rows, 2 * w, self.width).permute(0, 3, 1, 2)
            for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)):
                near = frame[:, :, a : a + rows + 1]
                places = F.conv2d(near, self.weight[a, b], self.bias, padding=(0, 1))
                blocks[:, :, a::2, b::2] = places[..., b : b + w]
            large.append(blocks)
        return large


class FastDecoder(nn.Module):
    """The function of a plain decoder, with copies of its weights."""

    def __init__(self, decoder: Decoder):
        super().__init__()
        own: Any = copy.deepcopy(decoder)
        own.to(memory_format=torch.channels_last)
        for level in own.up[1:]:
            level.upsample = Upsample(level.upsample.conv)
        self.conv_in, self.mid, self.up = own.conv_in, own.mid, own.up
        self.norm_out, self.conv_out = own.norm_out, own.conv_out

    @torch.no_grad()
    def forward(self, latents: Latents, rows: int | None = 8) -> Images:
        """Latents, neither scaled nor shifted, to pictures in −1 to 1, one after the other.

        `rows`: of latents, worked on at a time; None for all.
        """
        return torch.cat([self.picture(one, rows or one.shape[2]) for one in latents.split(1)])

    def picture(self, latents: Float[Tensor, "1 c h w"], rows: int) -> Float[Tensor, "1 3 H W"]:
        """One picture."""
        x = self.middle(latents, rows)
        level: Any
        for level in reversed(self.up):
            for block in level.block:
                x = residual(block, x)
            if hasattr(level, "upsample"):
                x = level.upsample(x)
                trim()
        strips = [strip for _, strip in convolved(self.norm_out, self.conv_out, x)]
        return torch.cat(strips, dim=2).contiguous()

    def middle(self, latents: Float[Tensor, "1 c h w"], rows: int) -> Map:
        """The blocks at the smallest size."""
        mid: Any = self.mid
        hidden = self.conv_in(latents.contiguous(memory_format=torch.channels_last))
        x = residual(mid.block_1, Map(hidden.split(rows, dim=2)))
        return residual(mid.block_2, attend(mid.attn_1, x))

"""The autoencoder's decoder in strips of rows: quicker, and small at any size.

The same function as `autoencoder.Decoder`, with the same weights, by four means:

- maps lie in memory place by place, all channels of a place together, as the processor's
  convolutions want them;
- every layer runs over strips of rows that stay in its caches, and a block's outcome takes the
  place of what lies between its convolutions;
- what a group normalisation needs to know of the whole map, the mean and variance of each channel,
  is gathered while the map is written;
- a 3×3 convolution after every place was repeated four times is four 2×2 convolutions of the small
  map, one for each place of a block of four: less than half of the products.
"""

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn

from sd3min.autoencoder import Decoder, Images, Latents, ResidualBlock, SelfAttention

Features = Float[Tensor, "1 d h w"]
Strip = Float[Tensor, "1 d rows w"]

TAPS = [[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]]
"""Rows of a kernel that meet the same row of the small map: [row of the block, small row, row]."""


class Map:
    """A feature map in memory, channels last, written strip by strip; meanwhile the mean and the
    variance of each channel are gathered, in float32 or, for a map of float64, in float64.
    """

    def __init__(self, values: Features):
        self.values = values
        self.height, self.width = values.shape[2:]
        exact = torch.promote_types(values.dtype, torch.float32)
        self.mean, self.variance = values.new_zeros(2, values.shape[1], dtype=exact)
        self.rows = 0  # that the two speak of

    @classmethod
    def empty(cls, bias: Float[Tensor, " d"], height: int, width: int) -> "Map":
        """Room for what a convolution with this bias gives."""
        layout = {"dtype": bias.dtype, "device": bias.device, "memory_format": torch.channels_last}
        return cls(torch.empty(1, len(bias), height, width, **layout))

    def strip(self, top: int, bottom: int) -> Strip:
        """Rows from `top` to before `bottom`."""
        return self.values[:, :, top:bottom]

    def wrote(self, top: int, bottom: int) -> None:
        """Take rows that now have their values into account."""
        unused = torch.zeros_like(self.mean), torch.ones_like(self.mean)
        mean, variance = torch.batch_norm_update_stats(self.strip(top, bottom), *unused, 0.0)
        self.rows += bottom - top
        share, offset = (bottom - top) / self.rows, mean - self.mean
        self.mean += share * offset
        self.variance += share * (variance - self.variance + (1 - share) * offset**2)

    def statistics(self, groups: int) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
        """Mean and variance of the group that each channel belongs to."""
        means, variances = (
            rearrange(part, "(g d) -> g d", g=groups) for part in (self.mean, self.variance)
        )
        mean = means.mean(dim=1, keepdim=True)
        variance = (variances + (means - mean) ** 2).mean(dim=1, keepdim=True)
        return mean.expand_as(means).flatten(), variance.expand_as(means).flatten()


def strips(height: int, rows: int) -> Iterator[tuple[int, int]]:
    """First row of each strip, and the row after its last."""
    return ((top, min(top + rows, height)) for top in range(0, height, rows))


def convolved(
    norm: nn.GroupNorm, conv: nn.Conv2d, x: Map, rows: int
) -> Iterator[tuple[int, int, Strip]]:
    """First row, row after the last and outcome, after normalisation, SiLU and 3×3 convolution, of
    each strip, over whose rows of `x` the caller may write.

    A group normalisation whose mean and variance are known is a batch normalisation at rest.
    """
    mean, variance = x.statistics(norm.num_groups)
    given = {"weight": norm.weight.to(mean), "bias": norm.bias.to(mean), "eps": norm.eps}
    edge = torch.zeros_like(x.strip(0, 1))
    before, done = edge, 0  # activated rows that the next strip begins with, and how many are done
    for top, bottom in strips(x.height, rows):
        until = min(bottom + 1, x.height)
        new = F.silu(F.batch_norm(x.strip(done, until), mean, variance, **given), inplace=True)
        activated = torch.cat([before, new] + [edge] * (bottom == x.height), dim=2)
        before, done = activated[:, :, -2:].clone(), until
        yield top, bottom, F.conv2d(activated, conv.weight, conv.bias, padding=(0, 1))


def residual(block: ResidualBlock, x: Map, rows: int) -> Map:
    """A residual block, in the room of what lies between its convolutions."""
    hidden = Map.empty(block.conv1.bias, x.height, x.width)
    for top, bottom, strip in convolved(block.norm1, block.conv1, x, rows):
        hidden.strip(top, bottom).copy_(strip)
        hidden.wrote(top, bottom)
    out = Map(hidden.values)
    for top, bottom, strip in convolved(block.norm2, block.conv2, hidden, rows):
        shortcut = block.nin_shortcut(x.strip(top, bottom))
        torch.add(shortcut, strip, out=out.strip(top, bottom))
        out.wrote(top, bottom)
    return out


def linear(conv: nn.Conv2d, places: Float[Tensor, "... d"]) -> Float[Tensor, "... o"]:
    """A 1×1 convolution of places whose channels come last."""
    return F.linear(places, conv.weight.flatten(1), conv.bias)


def attend(attention: SelfAttention, x: Map, rows: int) -> Map:
    """Attention among all places, in place."""
    normed = rearrange(attention.norm(x.values), "1 d h w -> 1 1 h w d")
    k, v = (linear(part, normed.flatten(2, 3)) for part in (attention.k, attention.v))
    out = Map(x.values)
    for top, bottom in strips(x.height, rows):
        q = linear(attention.q, normed[:, :, top:bottom].flatten(2, 3))
        strip = linear(attention.proj_out, F.scaled_dot_product_attention(q, k, v))
        out.strip(top, bottom).add_(rearrange(strip, "1 1 (h w) d -> 1 d h w", w=x.width))
        out.wrote(top, bottom)
    return out


class Upsample(nn.Module):
    """A 3×3 convolution of a map that has every place of a small map four times."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        taps = torch.tensor(TAPS, dtype=torch.float64, device=conv.weight.device)
        kernels = einsum(conv.weight.double(), taps, taps, "o i y x, a p y, b q x -> a b o p q i")
        kernels = kernels.contiguous().to(conv.weight.dtype)
        self.weight = nn.Parameter(rearrange(kernels, "a b o p q i -> a b o i p q"), False)
        self.bias = conv.bias

    def forward(self, small: Map, rows: int) -> Map:
        """A map of twice the size."""
        large = Map.empty(self.bias, 2 * small.height, 2 * small.width)
        for top, bottom in strips(small.height, rows):
            near = small.strip(max(top - 1, 0), bottom + 1)
            if top == 0 or bottom == small.height:
                near = F.pad(near, (0, 0, top == 0, bottom == small.height))
            blocks = large.strip(2 * top, 2 * bottom)
            for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)):
                around = near[:, :, a : a + bottom - top + 1]
                places = F.conv2d(around, self.weight[a, b], self.bias, padding=(0, 1))
                blocks[:, :, a::2, b::2] = places[..., b : b + small.width]
            large.wrote(2 * top, 2 * bottom)
        return large


class FastDecoder(nn.Module):
    """The function of a plain decoder, with copies of its weights."""

    def __init__(self, decoder: Decoder):
        super().__init__()
        decoder = copy.deepcopy(decoder).to(memory_format=torch.channels_last)
        self.conv_in, self.mid = decoder.conv_in, decoder.mid
        self.up = decoder.up
        for level in decoder.up[1:]:
            level.upsample = Upsample(level.upsample.conv)
        self.norm_out, self.conv_out = decoder.norm_out, decoder.conv_out

    @torch.no_grad()
    def forward(self, latents: Latents, rows: int | None = 32) -> Images:
        """Latents, neither scaled nor shifted, to pictures in −1 to 1, one after the other.

        `rows`: of every map, worked on at a time; None for all.
        """
        rows = rows or 8 * latents.shape[2]
        return torch.cat([self.picture(one, rows) for one in latents.split(1)])

    def picture(self, latents: Float[Tensor, "1 c h w"], rows: int) -> Float[Tensor, "1 3 H W"]:
        """One picture."""
        x = self.smallest(latents, rows)
        for level in reversed(self.up):
            for block in level.block:
                x = residual(block, x, rows)
            if hasattr(level, "upsample"):
                x = level.upsample(x, rows)
        last = convolved(self.norm_out, self.conv_out, x, rows)
        return torch.cat([strip for _, _, strip in last], dim=2).contiguous()

    def smallest(self, latents: Float[Tensor, "1 c h w"], rows: int) -> Map:
        """The map at the latents' size."""
        x = Map(self.conv_in(latents.contiguous(memory_format=torch.channels_last)))
        x.wrote(0, x.height)
        x = attend(self.mid.attn_1, residual(self.mid.block_1, x, rows), rows)
        return residual(self.mid.block_2, x, rows)

"""The autoencoder's decoder in strips of rows: quicker, and small at any size.

The same function as `autoencoder.Decoder`, with the same weights, by five means:

- maps lie in memory place by place, all channels of a place together, as the processor's
  convolutions want them;
- every layer runs over strips of rows that stay in its caches, and adds to its input in place;
- what a group normalisation needs to know of the whole map, the mean and variance of each channel,
  is gathered while the map is written;
- a 3×3 convolution after every place was repeated four times is four 2×2 convolutions of the small
  map, one for each place of a block of four: less than half of the products;
- an upsampled map is never whole in memory: its strips are computed when they are asked for.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn

from sd3min.autoencoder import Decoder, Images, Latents, ResidualBlock, SelfAttention

Features = Float[Tensor, "1 d h w"]
Strip = Float[Tensor, "1 d rows w"]

TAPS = [[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]]
"""Rows of a kernel that meet the same row of the small map: [row of the block, small row, row]."""


class Statistics:
    """Mean and variance of a map's channels, gathered strip by strip."""

    def __init__(self):
        self.strips: list[tuple[int, Tensor, Tensor]] = []

    def add(self, strip: Strip) -> None:
        """Take one more strip into account, in float32 or, for a map in float64, in float64."""
        exact = torch.promote_types(strip.dtype, torch.float32)
        unused = torch.zeros(2, strip.shape[1], dtype=exact, device=strip.device)
        self.strips.append((strip.shape[2], *torch.batch_norm_update_stats(strip, *unused, 0.0)))

    def of_groups(self, groups: int) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
        """Mean and variance of each channel's group, over the whole map."""
        rows, *parts = zip(*self.strips, strict=True)
        means, variances = (rearrange(torch.stack(p), "s (g d) -> s g d", g=groups) for p in parts)
        weights = torch.tensor(rows).to(means)[:, None, None] / (sum(rows) * means.shape[2])
        mean = reduce(weights * means, "s g d -> g 1", "sum")
        variance = reduce(weights * (variances + (means - mean) ** 2), "s g d -> g 1", "sum")
        each = means.shape[2]
        return mean.expand(-1, each).flatten(), variance.expand(-1, each).flatten()


class Source(Protocol):
    """A map whose rows can be asked for, and its statistics."""

    statistics: Statistics
    shape: torch.Size

    def strip(self, top: int, bottom: int) -> Strip:
        """Rows from `top` to before `bottom`, those beyond the map left out."""
        ...


class Kept:
    """A map in memory, whose last values come strip by strip."""

    def __init__(self, values: Features):
        self.values, self.shape = values, values.shape
        self.statistics = Statistics()

    @classmethod
    def room(cls, weight: Tensor, h: int, w: int) -> "Kept":
        """Room for what a convolution with this weight gives."""
        return cls(rearrange(weight.new_empty(1, h, w, len(weight)), "1 h w d -> 1 d h w"))

    def strip(self, top: int, bottom: int) -> Strip:
        """Rows from `top` to before `bottom`, those beyond the map left out."""
        return self.values[:, :, max(top, 0) : bottom]

    def write(self, top: int, rows: Strip) -> None:
        """Put rows in their place, for good."""
        self.strip(top, top + rows.shape[2]).copy_(rows)
        self.statistics.add(rows)

    def add(self, top: int, rows: Strip) -> None:
        """Add rows to those in their place, for good."""
        self.statistics.add(self.strip(top, top + rows.shape[2]).add_(rows))


class UpsampledConvolution(nn.Module):
    """A 3×3 convolution of a map that repeats every place of a small map four times."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        taps = torch.tensor(TAPS, dtype=torch.float64, device=conv.weight.device)
        kernels = einsum(conv.weight.double(), taps, taps, "o i y x, a p y, b q x -> a b o i p q")
        self.weight = nn.Parameter(kernels.to(conv.weight.dtype), requires_grad=False)
        self.bias = conv.bias

    def forward(self, small: Features, top: int, bottom: int) -> Strip:
        """Rows from `top` to before `bottom` of the large map."""
        first, last = top // 2, (bottom + 1) // 2
        near = small[:, :, max(first - 1, 0) : last + 1]
        near = F.pad(near, (0, 0, first == 0, last == small.shape[2]))
        w = small.shape[3]
        large = small.new_empty(1, 2 * (last - first), 2 * w, small.shape[1])
        large = rearrange(large, "1 h w d -> 1 d h w")
        for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)):
            rows = near[:, :, a : a + last - first + 1]
            place = F.conv2d(rows, self.weight[a, b], self.bias, padding=(0, 1))
            large[:, :, a::2, b::2] = place[..., b : b + w]
        return large[:, :, top - 2 * first : bottom - 2 * first]


class Upsampled:
    """A map of twice the size after a convolution, computed where it is asked for."""

    def __init__(self, conv: UpsampledConvolution, small: Features, rows: int):
        self.conv, self.small = conv, small
        _, width, h, w = small.shape
        self.shape = torch.Size((1, width, 2 * h, 2 * w))
        self.statistics = Statistics()
        for top, bottom in strips(2 * h, rows):
            self.statistics.add(self.strip(top, bottom))

    def strip(self, top: int, bottom: int) -> Strip:
        """Rows from `top` to before `bottom`, those beyond the map left out."""
        return self.conv(self.small, max(top, 0), min(bottom, self.shape[2]))


def strips(height: int, rows: int) -> Iterator[tuple[int, int]]:
    """First row of each strip, and the row after its last."""
    return ((top, min(top + rows, height)) for top in range(0, height, rows))


def convolve(
    norm: nn.GroupNorm, conv: nn.Conv2d, source: Source, rows: int
) -> Iterator[tuple[int, Strip, Strip]]:
    """Normalisation, SiLU and 3×3 convolution: first row, rows of the source and outcome of each
    strip.

    A group normalisation whose mean and variance are known is a batch normalisation at rest.
    """
    height = source.shape[2]
    mean, variance = source.statistics.of_groups(norm.num_groups)
    weight, bias = norm.weight.to(mean), norm.bias.to(mean)
    for top, bottom in strips(height, rows):
        strip = source.strip(top - 1, bottom + 1)
        hidden = F.batch_norm(strip, mean, variance, weight, bias, eps=norm.eps)
        above, below = top == 0, bottom == height
        hidden = F.pad(F.silu(hidden, inplace=True), (0, 0, above, below))
        own = strip[:, :, 1 - above :][:, :, : bottom - top]
        yield top, own, F.conv2d(hidden, conv.weight, conv.bias, padding=(0, 1))


def residual(block: ResidualBlock, x: Source, rows: int) -> Kept:
    """A residual block; where its input is in memory and as wide as its outcome, in place."""
    h, w = x.shape[2:]
    in_place = isinstance(x, Kept) and isinstance(block.nin_shortcut, nn.Identity)
    out = Kept(x.values) if in_place else Kept.room(block.conv2.weight, h, w)
    hidden = Kept.room(block.conv1.weight, h, w)
    for top, own, convolved in convolve(block.norm1, block.conv1, x, rows):
        hidden.write(top, convolved)
        if not in_place:
            out.strip(top, top + own.shape[2]).copy_(block.nin_shortcut(own))
    for top, _, convolved in convolve(block.norm2, block.conv2, hidden, rows):
        out.add(top, convolved)
    return out


def linear(conv: nn.Conv2d, places: Float[Tensor, "... d"]) -> Float[Tensor, "... o"]:
    """A 1×1 convolution of places whose channels come last."""
    return F.linear(places, conv.weight.flatten(1), conv.bias)


def attend(attention: SelfAttention, x: Kept) -> Kept:
    """Attention among all places, added in place."""
    places = rearrange(attention.norm(x.values), "1 d h w -> 1 1 (h w) d")
    q, k, v = (linear(part, places) for part in (attention.q, attention.k, attention.v))
    out = linear(attention.proj_out, F.scaled_dot_product_attention(q, k, v))
    attended = Kept(x.values)
    attended.add(0, rearrange(out, "1 1 (h w) d -> 1 d h w", h=x.shape[2]))
    return attended


class FastDecoder(nn.Module):
    """The function of a plain decoder, by its own weights.

    It is made anew when they change: the upsampling convolutions' kernels are sums of theirs.
    """

    def __init__(self, decoder: Decoder):
        super().__init__()
        self.decoder = decoder
        self.upsample = nn.ModuleList(
            UpsampledConvolution(level.upsample.conv) if i > 0 else nn.Identity()
            for i, level in enumerate(decoder.up)
        )

    @torch.no_grad()
    def forward(self, latents: Latents, rows: int | None = None) -> Images:
        """Latents, neither scaled nor shifted, to pictures in −1 to 1, one after the other.

        `rows`: of every map, that are worked on at a time; by default all of them.
        """
        rows = rows or 8 * latents.shape[2]
        return torch.cat([self.picture(one, rows) for one in latents.split(1)])

    def picture(self, latents: Float[Tensor, "1 c h w"], rows: int) -> Float[Tensor, "1 3 H W"]:
        """One picture."""
        x = self.smallest(latents, rows)
        for level, upsample in reversed(list(zip(self.decoder.up, self.upsample, strict=True))):
            for block in level.block:
                x = residual(block, x, rows)
            if isinstance(upsample, UpsampledConvolution):
                x = Upsampled(upsample, x.values, rows)
        last = convolve(self.decoder.norm_out, self.decoder.conv_out, x, rows)
        return torch.cat([strip for _, _, strip in last], dim=2).contiguous()

    def smallest(self, latents: Float[Tensor, "1 c h w"], rows: int) -> Kept:
        """The map at the latents' size."""
        conv, mid = self.decoder.conv_in, self.decoder.mid
        latents = latents.contiguous(memory_format=torch.channels_last)
        x = Kept.room(conv.weight, *latents.shape[2:])
        x.write(0, conv(latents))
        return residual(mid.block_2, attend(mid.attn_1, residual(mid.block_1, x, rows)), rows)

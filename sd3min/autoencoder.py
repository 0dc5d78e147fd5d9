"""The autoencoder: pictures to latents of 16 channels at an eighth of the size, and back (paper
§5.2.1, Table 3).

The attributes' names are the official tensors' names. The latents' scale and shift live here and
nowhere else.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from sd3min.config import LATENT_CHANNELS, AutoencoderConfig

SCALE = 1.5305  # 1 / standard deviation of the official encoder's latents
SHIFT = 0.0609  # their mean

Images = Float[Tensor, "b 3 H W"]
Latents = Float[Tensor, "b c h w"]


def norm(width: int) -> nn.GroupNorm:
    """Group normalisation as everywhere in this network."""
    return nn.GroupNorm(32, width, eps=1e-6)


def posterior_sample(mean: Latents, logvar: Latents, generator: torch.Generator) -> Latents:
    """A sample of N(mean, exp(logvar)), scaled and shifted; the noise is the CPU's, in float32."""
    noise = torch.randn(mean.shape, generator=generator).to(mean)
    return (mean + torch.exp(0.5 * logvar) * noise - SHIFT) * SCALE


class ResidualBlock(nn.Module):
    """Two convolutions, each after a normalisation and a SiLU, beside a shortcut."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.norm1 = norm(inputs)
        self.conv1 = nn.Conv2d(inputs, width, 3, padding=1)
        self.norm2 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.nin_shortcut = nn.Identity() if inputs == width else nn.Conv2d(inputs, width, 1)

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o h w"]:
        """Features to features."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(hidden)))


class SelfAttention(nn.Module):
    """One head of attention among all places of the smallest feature map."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h w"]:
        """Features to features."""
        normed = self.norm(x)
        q, k, v = (
            rearrange(part(normed), "b d h w -> b 1 (h w) d") for part in (self.q, self.k, self.v)
        )
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(attended, "b 1 (h w) d -> b d h w", h=x.shape[2]))


class Downsample(nn.Module):
    """Half the size: a strided convolution, padded to the right and below only."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Float[Tensor, "b d h w"]) -> Tensor:
        """[b, d, h, w] to [b, d, h/2, w/2]."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the size: every place four times, then a convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Float[Tensor, "b d h w"]) -> Tensor:
        """[b, d, h, w] to [b, d, 2·h, 2·w]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def level(inputs: int, width: int, blocks: int, **resample: nn.Module) -> nn.Sequential:
    """Residual blocks at one size, then perhaps one resampling layer under its official name."""
    residual = (ResidualBlock(inputs if j == 0 else width, width) for j in range(blocks))
    return nn.Sequential(OrderedDict(block=nn.Sequential(*residual), **resample))


def middle(width: int) -> nn.Sequential:
    """The blocks at the smallest size."""
    return nn.Sequential(
        OrderedDict(
            block_1=ResidualBlock(width, width),
            attn_1=SelfAttention(width),
            block_2=ResidualBlock(width, width),
        )
    )


class Encoder(nn.Module):
    """Pictures to the mean and log variance of their latents."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths, last = config.widths, len(config.widths) - 1
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.Sequential(
            *(
                level(
                    inputs,
                    width,
                    config.blocks,
                    **({"downsample": Downsample(width)} if i < last else {}),
                )
                for i, (inputs, width) in enumerate(zip(widths[:1] + widths, widths, strict=False))
            )
        )
        self.mid = middle(widths[-1])
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * LATENT_CHANNELS, 3, padding=1)

    def forward(self, images: Images) -> Float[Tensor, "b moments h w"]:
        """Both halves in one tensor, means first."""
        hidden = self.mid(self.down(self.conv_in(images)))
        return self.conv_out(F.silu(self.norm_out(hidden)))


class Decoder(nn.Module):
    """Latents to pictures, through the levels from the last, the smallest, to the first."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(LATENT_CHANNELS, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1])
        self.up = nn.ModuleList(
            level(
                inputs, width, config.blocks + 1, **({"upsample": Upsample(width)} if i > 0 else {})
            )
            for i, (inputs, width) in enumerate(zip(widths[1:] + widths[-1:], widths, strict=True))
        )
        self.norm_out = norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, latents: Latents) -> Images:
        """Latents, neither scaled nor shifted, to pictures in −1 to 1."""
        hidden = self.mid(self.conv_in(latents))
        for up in reversed(self.up):
            hidden = up(hidden)
        return self.conv_out(F.silu(self.norm_out(hidden)))


class Autoencoder(nn.Module):
    """Encoder and decoder, and the normalisation of the latents between them (App. B.2)."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def moments(self, images: Images) -> tuple[Latents, Latents]:
        """Mean and log variance of the latents of pictures in −1 to 1, before scale and shift."""
        mean, logvar = self.encoder(images).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode(self, images: Images, generator: torch.Generator | None = None) -> Latents:
        """Scaled and shifted latents of pictures in −1 to 1: the mode, or a seeded sample."""
        mean, logvar = self.moments(images)
        if generator is None:
            return (mean - SHIFT) * SCALE
        return posterior_sample(mean, logvar, generator)

    def decode(self, latents: Latents) -> Images:
        """Pictures, about −1 to 1, of scaled and shifted latents."""
        return self.decoder(latents / SCALE + SHIFT)

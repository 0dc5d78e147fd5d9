"""The multimodal diffusion transformer of Fig. 2, from the top of the figure to its bottom.

Text and image tokens have weights of their own everywhere and meet only in attention. The
attributes' names are the official tensors' names, so that a printed model reads like the listing of
an official file: `x` is the image there.
"""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from sd3min.config import HEAD_WIDTH, LATENT_CHANNELS, PATCH, MMDiTConfig

NORM_EPS = 1e-6
SINUSOIDS = 256  # channels of the raw timestep embedding


def sinusoid(timesteps: Float[Tensor, " b"], width: int = SINUSOIDS) -> Float[Tensor, "b {width}"]:
    """Cosines, then sines, of the timestep (0 to 1000) at `width / 2` frequencies from 1 down to
    1/10,000.

    Always in float32 and in this order of operations, in every precision of the network: the
    arguments reach 1000, so that the last bits decide the fourth digit of the cosines.
    """
    half = width // 2
    frequencies = torch.exp(
        -math.log(10_000) * torch.arange(half, device=timesteps.device).float() / half
    )
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_table(
    width: int, grid: int, resolution: int = 1024, pretrained: int = 256
) -> Float[Tensor, "1 {grid*grid} {width}"]:
    """Sinusoidal positions of a grid of patches (§5.3.2, "Positional Encodings for Varying Aspect
    Ratios").

    A patch in row or column i of N stands at (i − (N − s)/2)·`pretrained`/`resolution`, where s is
    the number of patches along `resolution` pixels: the centre of the table covers the positions of
    the pretraining grid, more finely. The first half of the channels encodes the column, the second
    the row; each half is sines, then cosines. Differs from the paper: one square table serves all
    sizes, where the paper's is as high and as wide as the training pictures are at most.
    """
    side = resolution // (8 * PATCH)
    places = (torch.arange(grid).double() - (grid - side) / 2) * pretrained / resolution
    frequencies = 10_000 ** -(torch.arange(width // 4).double() / (width // 4))
    angles = places[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=-1)
    columns, rows = axis.expand(grid, -1, -1), axis[:, None].expand(-1, grid, -1)
    return rearrange(torch.cat([columns, rows], dim=-1), "h w d -> 1 (h w) d").float()


def modulate(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalise tokens [b, n, d], then scale and shift [b, 1, d] them ("Mod" in Fig. 2b)."""
    return F.layer_norm(tokens, tokens.shape[-1:], eps=NORM_EPS) * (1 + scale) + shift


def modulation(width: int, parts: int) -> nn.Sequential:
    """SiLU and the linear layer that makes `parts` shifts, scales and gates from the condition."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))


def unpatchify(patches: Float[Tensor, "b n o"], h: int) -> Float[Tensor, "b c H W"]:
    """`h` rows of patches, each (p q c), to latents."""
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=h, p=PATCH, q=PATCH)


class PatchEmbedding(nn.Module):
    """2x2 patches of the latents, flattened row by row and projected to tokens (§4)."""

    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Conv2d(LATENT_CHANNELS, width, kernel_size=PATCH, stride=PATCH)

    def forward(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Latents to tokens."""
        return rearrange(self.proj(latents), "b d h w -> b (h w) d").contiguous()


class Embedding(nn.Module):
    """Two linear layers around a SiLU, for the time's sinusoid or the pooled text (Fig. 2a)."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, features: Float[Tensor, "b i"]) -> Float[Tensor, "b d"]:
        """Features to their part of the condition."""
        return self.mlp(features)


class Heads(nn.Module):
    """Queries, keys and values in heads of 64, normalised in some models (§5.3.2, Fig. 5)."""

    def __init__(self, width: int, qk_norm: bool):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.ln_q = nn.RMSNorm(HEAD_WIDTH, eps=NORM_EPS) if qk_norm else nn.Identity()
        self.ln_k = nn.RMSNorm(HEAD_WIDTH, eps=NORM_EPS) if qk_norm else nn.Identity()

    def forward(self, tokens: Float[Tensor, "b n d"]) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens to q, k, v, each [b a n e]."""
        q, k, v = rearrange(
            self.qkv(tokens), "b n (three a e) -> three b a n e", three=3, e=HEAD_WIDTH
        )
        return self.ln_q(q), self.ln_k(k), v


class Attention(Heads):
    """The same with the projection that follows attention."""

    def __init__(self, width: int, qk_norm: bool):
        super().__init__(width, qk_norm)
        self.proj = nn.Linear(width, width)


class Stream(nn.Module):
    """One modality's side of a joint block (Fig. 2b): opened before attention, closed after it."""

    def __init__(self, width: int, qk_norm: bool, parts: int = 6):
        super().__init__()
        self.parts = parts
        self.attn = Attention(width, qk_norm)
        self.mlp = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(width, 4 * width),
                act=nn.GELU("tanh"),
                fc2=nn.Linear(4 * width, width),
            )
        )
        self.adaLN_modulation = modulation(width, parts)

    def open(self, tokens: Tensor, cond: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """q, k, v [b, a, n, e] of the modulated tokens [b, n, d], and what `close` will need."""
        shift, scale, *rest = self.adaLN_modulation(cond)[:, None].chunk(self.parts, dim=-1)
        return self.attn(modulate(tokens, shift, scale)), rest

    def close(self, tokens: Tensor, attended: Tensor, rest: list[Tensor]) -> Tensor:
        """Tokens and what they attended to, [b, n, d] both, through both gated residuals."""
        gate, shift_mlp, scale_mlp, gate_mlp = rest
        tokens = tokens + gate * self.attn.proj(attended)
        return tokens + gate_mlp * self.mlp(modulate(tokens, shift_mlp, scale_mlp))


class DualStream(Stream):
    """SD3.5-medium's image stream: beside the joint attention a second one, of the image alone.

    Differs from the paper: its block has the joint attention alone (Fig. 2b).
    """

    def __init__(self, width: int, qk_norm: bool):
        super().__init__(width, qk_norm, parts=9)
        self.attn2 = Attention(width, qk_norm)

    def open(self, tokens: Tensor, cond: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """As above; the second attention reads the same tokens under the last three parts."""
        qkv, rest = super().open(tokens, cond)
        shift, scale, gate = rest[-3:]
        alone = F.scaled_dot_product_attention(*self.attn2(modulate(tokens, shift, scale)))
        return qkv, [*rest[:-3], gate * self.attn2.proj(rearrange(alone, "b a n e -> b n (a e)"))]

    def close(self, tokens: Tensor, attended: Tensor, rest: list[Tensor]) -> Tensor:
        """As above, with the second attention's residual."""
        return super().close(tokens + rest[-1], attended, rest[:-1])


class LastContextStream(nn.Module):
    """The text's side of the last block: it is attended to, and nobody reads it afterwards."""

    def __init__(self, width: int, qk_norm: bool):
        super().__init__()
        self.attn = Heads(width, qk_norm)
        self.adaLN_modulation = modulation(width, parts=2)

    def open(self, tokens: Tensor, cond: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """Queries, keys and values of the modulated tokens."""
        shift, scale = self.adaLN_modulation(cond)[:, None].chunk(2, dim=-1)
        return self.attn(modulate(tokens, shift, scale)), []

    def close(self, tokens: Tensor, attended: Tensor, rest: list[Tensor]) -> Tensor:
        """The tokens as they came."""
        return tokens


class JointBlock(nn.Module):
    """Two transformers, one for each modality, joined for the attention (§4, Fig. 2b)."""

    def __init__(self, context_block: Stream | LastContextStream, x_block: Stream):
        super().__init__()
        self.context_block = context_block
        self.x_block = x_block

    def forward(
        self,
        context: Float[Tensor, "b l d"],
        image: Float[Tensor, "b n d"],
        cond: Float[Tensor, "b d"],
    ) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b n d"]]:
        """Both streams, one block further."""
        context_qkv, context_rest = self.context_block.open(context, cond)
        image_qkv, image_rest = self.x_block.open(image, cond)

        q, k, v = (torch.cat(both, dim=2) for both in zip(context_qkv, image_qkv, strict=True))
        attended = rearrange(F.scaled_dot_product_attention(q, k, v), "b a n e -> b n (a e)")
        to_context, to_image = attended.split([context.shape[1], image.shape[1]], dim=1)

        context = self.context_block.close(context, to_context, context_rest)
        image = self.x_block.close(image, to_image, image_rest)
        return context, image


def joint_block(config: MMDiTConfig, index: int) -> JointBlock:
    """A block with the streams that its place in the network asks for."""
    width, norm = config.width, config.qk_norm
    return JointBlock(
        (LastContextStream if index == config.depth - 1 else Stream)(width, norm),
        (DualStream if index < config.dual_blocks else Stream)(width, norm),
    )


class FinalLayer(nn.Module):
    """Modulation and projection back to the channels of a patch (Fig. 2a, "Modulation, Linear")."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, PATCH * PATCH * LATENT_CHANNELS)
        self.adaLN_modulation = modulation(width, parts=2)

    def forward(
        self, image: Float[Tensor, "b n d"], cond: Float[Tensor, "b d"]
    ) -> Float[Tensor, "b n o"]:
        """Tokens to patches."""
        shift, scale = self.adaLN_modulation(cond)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(image, shift, scale))


class MMDiT(nn.Module):
    """The network v_Θ(z_t, t, c_ctxt, c_vec) of Fig. 2a."""

    pos_embed: Tensor

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.config = config
        width = config.width
        self.x_embedder = PatchEmbedding(width)
        table = torch.empty(1, config.grid**2, width)  # enough where only shapes are wanted
        table = table if table.is_meta else position_table(width, config.grid)
        self.register_buffer("pos_embed", table)
        self.t_embedder = Embedding(SINUSOIDS, width)
        self.y_embedder = Embedding(config.pooled_width, width)
        self.context_embedder = nn.Linear(config.context_width, width)
        self.joint_blocks = nn.ModuleList(joint_block(config, i) for i in range(config.depth))
        self.final_layer = FinalLayer(width)

    def positions(self, h: int, w: int) -> Float[Tensor, "1 n d"]:
        """The centre `h` x `w` patches of the positional table."""
        grid = self.config.grid
        table = rearrange(self.pos_embed, "1 (rows columns) d -> 1 rows columns d", rows=grid)
        top, left = (grid - h) // 2, (grid - w) // 2
        return rearrange(table[:, top : top + h, left : left + w], "1 h w d -> 1 (h w) d")

    def forward(
        self,
        latents: Float[Tensor, "b c h w"],
        timesteps: Float[Tensor, " b"],
        context: Float[Tensor, "b l i"],
        pooled: Float[Tensor, "b p"],
    ) -> Float[Tensor, "b c h w"]:
        """The velocity at latents and timesteps in 0 to 1000, given the text's two encodings."""
        h, w = latents.shape[-2] // PATCH, latents.shape[-1] // PATCH
        # fmt: off
        image = self.x_embedder(latents) + self.positions(h, w)          # b n d
        context = self.context_embedder(context)                         # b l d
        time = self.t_embedder(sinusoid(timesteps).to(latents.dtype))    # b d
        cond = time + self.y_embedder(pooled)                            # b d
        # fmt: on

        for block in self.joint_blocks:
            context, image = block(context, image, cond)

        return unpatchify(self.final_layer(image, cond), h)

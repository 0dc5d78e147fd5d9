"""Rungs 2 and 4: our modules and diffusers' on the same tensors, in float32, float64 and bfloat16.

At the official widths the weights are random and one model is in memory at a time: it is built on
the meta device, filled, shares its tensors with diffusers' twin, and runs in float64 block by
block.
"""

import statistics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import oracle
import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer, T5EncoderModel, T5Tokenizer

from sd3min import text_encoders
from sd3min.autoencoder import Autoencoder
from sd3min.config import (
    CLIP_G,
    CLIP_L,
    SD3_5_LARGE,
    SD3_5_MEDIUM,
    SD3_MEDIUM,
    T5_XXL,
    AutoencoderConfig,
    MMDiTConfig,
    T5Config,
)
from sd3min.mmdit import MMDiT, position_table
from sd3min.parts import fill
from sd3min.probes import twins
from sd3min.probes.precision import computing_in
from sd3min.text_encoders import TextEncoders

TOKENIZERS = Path(__file__).parents[3] / "shared" / "tokenizers"
PROMPTS = ["a photo of a cat holding a sign that says hello world!", ""]
FIVE_PROMPTS = [*PROMPTS, "a red circle", "snow in May, oil on canvas", "a dog! a dog! a dog!"]
SINGLE, DOUBLE, HALF = torch.float32, torch.float64, torch.bfloat16


@dataclass(frozen=True)
class Shallow(MMDiTConfig):
    """The first and last blocks of SD3.5-large, at its full width."""

    width = SD3_5_LARGE.width


VARIANTS = {
    "SD3-medium": SD3_MEDIUM,
    "SD3.5-medium": SD3_5_MEDIUM,
    "SD3.5-large at depth 4": Shallow(depth=4, qk_norm=True),
}


class Figures(NamedTuple):
    """One part in float32 and float64: largest differences, relative to the largest value."""

    title: str
    parameters: int
    apart: float  # ours from diffusers', float32
    ours: float  # ours in float32 from ours in float64
    theirs: float  # diffusers' in float32 from ours in float64
    double: float  # ours from diffusers', float64
    double_allowed: float
    nudged: float  # ours with one tensor nudged from diffusers', float32

    @property
    def allowed(self) -> float:
        """In float32: 1e-5, or 1.1 times diffusers' own distance from float64."""
        return max(oracle.RUNG_2, 1.1 * self.theirs)


class HalfFigures(NamedTuple):
    """One part in bfloat16: relative L2 errors against float64, one for each input."""

    title: str
    parameters: int
    ours: list[float]
    theirs: list[float]

    @property
    def ratio(self) -> float:
        """Our median error over diffusers'."""
        return statistics.median(self.ours) / statistics.median(self.theirs)


def random_tensors(module: nn.Module, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """A random tensor for every parameter, scaled so that activations stay of order one."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, parameter in module.named_parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 16
        values = torch.randn(parameter.shape, generator=generator).mul_(fan_in**-0.5)
        is_norm = parameter.dim() == 1 and name.endswith("weight")
        tensors[name] = (values + 1 if is_norm else values).to(dtype)
    return tensors


def build(make: Callable[[], nn.Module], dtype: torch.dtype = SINGLE, seed: int = 0):
    """A module with random weights, made without its initial ones."""
    with torch.device("meta"):
        module = make()
    tensors = random_tensors(module, dtype, seed)
    if isinstance(module, MMDiT):
        table = position_table(module.config.width, module.config.grid)
        tensors["pos_embed"] = table.to(dtype)
    if isinstance(module, T5EncoderModel):
        tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
        module.encoder.embed_tokens = module.shared
    return fill(module, tensors)


def size(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def relative(ours: Tensor, theirs: Tensor) -> float:
    """max |a - b| / max |b|, in float64."""
    return oracle.relative(ours.double(), theirs.double())


def distances(outputs: Tensor, exact: Tensor) -> list[float]:
    """Relative L2 error of each item of a batch."""
    difference = (outputs.double() - exact).flatten(1).norm(dim=1)
    return (difference / exact.flatten(1).norm(dim=1)).tolist()


Outputs = dict[str, Tensor]


class Pair(NamedTuple):
    """Ours and diffusers' modules on the same tensors, and what each makes of the same inputs."""

    ours: dict[str, list[nn.Module]]  # by the titles of what they make
    theirs: list[nn.Module]
    run_ours: Callable[[torch.dtype], Outputs]
    run_theirs: Callable[[torch.dtype], Outputs]
    nudges: list[nn.Parameter]  # of ours: one for each title, and each must show
    double_allowed: float = oracle.RUNG_1

    @property
    def modules(self) -> list[nn.Module]:
        return list({id(part): part for parts in self.ours.values() for part in parts}.values())

    def exact(self) -> Outputs:
        """Ours in float64."""
        with computing_in(DOUBLE, *self.modules):
            return self.run_ours(DOUBLE)

    def nudged(self) -> Outputs:
        """Ours with copies of some tensors nudged; diffusers' are not touched."""
        kept = [parameter.data for parameter in self.nudges]
        generator = torch.Generator().manual_seed(9)
        for parameter in self.nudges:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data + 0.05 * parameter.data.std() * noise
        outputs = self.run_ours(SINGLE)
        for parameter, data in zip(self.nudges, kept, strict=True):
            parameter.data = data
        return outputs

    def figures(self) -> Iterator[Figures]:
        """Rung 2."""
        single, other, exact = self.run_ours(SINGLE), self.run_theirs(SINGLE), self.exact()
        with computing_in(DOUBLE, *self.theirs):
            other_exact = self.run_theirs(DOUBLE)
        nudged = self.nudged()
        for title, parts in self.ours.items():
            yield Figures(
                title,
                size(*parts),
                relative(single[title], other[title]),
                relative(single[title], exact[title]),
                relative(other[title], exact[title]),
                relative(exact[title], other_exact[title]),
                self.double_allowed,
                relative(nudged[title], other[title]),
            )

    def half_figures(self) -> Iterator[HalfFigures]:
        """Rung 4, of a pair whose weights are in bfloat16."""
        half, other, exact = self.run_ours(HALF), self.run_theirs(HALF), self.exact()
        for title, parts in self.ours.items():
            errors = (distances(side[title], exact[title]) for side in (half, other))
            yield HalfFigures(title, size(*parts), *errors)


def mmdit_pair(mmdit: MMDiT, title: str, batch: int = 2) -> Pair:
    """Latents of 16x24 and 20 rows of text."""
    config, stored = mmdit.config, mmdit.pos_embed.dtype
    model, title = twins.transformer(mmdit), f"MMDiT, {title}"
    generator = torch.Generator().manual_seed(7)
    latents = torch.randn(batch, 16, 16, 24, generator=generator).to(stored)
    timesteps = torch.tensor([937.0, 512.25, 8.9375, 250.0, 718.5])[:batch]
    context = torch.randn(batch, 20, config.context_width, generator=generator).to(stored)
    pooled = torch.randn(batch, config.pooled_width, generator=generator).to(stored)

    def ours(dtype: torch.dtype) -> Outputs:
        return {title: mmdit(latents.to(dtype), timesteps, context.to(dtype), pooled.to(dtype))}

    def theirs(dtype: torch.dtype) -> Outputs:
        given = latents.to(dtype), context.to(dtype), pooled.to(dtype), timesteps
        return {title: model(*given, return_dict=False)[0]}

    nudge = mmdit.joint_blocks[0].context_block.mlp.fc1.weight
    allowed = oracle.RUNG_1_QK_NORM if config.qk_norm else oracle.RUNG_1
    return Pair({title: [mmdit]}, [model], ours, theirs, [nudge], allowed)


def autoencoder_pair(autoencoder: Autoencoder, side: int, batch: int = 1) -> Pair:
    """Moments of pictures, and pictures of latents."""
    vae, stored = twins.vae(autoencoder), autoencoder.encoder.conv_in.weight.dtype
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(batch, 3, side, side, generator=generator).to(stored) * 2 - 1
    latents = torch.randn(batch, 16, side // 8, side // 8, generator=generator).to(stored)
    encode, decode = (f"autoencoder, {what} {side}x{side}" for what in ("encode", "decode"))

    def ours(dtype: torch.dtype) -> Outputs:
        return {
            encode: torch.cat(autoencoder.moments(images.to(dtype)), dim=1),
            decode: autoencoder.decode(latents.to(dtype)),
        }

    def theirs(dtype: torch.dtype) -> Outputs:
        posterior = vae.encode(images.to(dtype)).latent_dist
        unscaled = latents.to(dtype) / vae.config.scaling_factor + vae.config.shift_factor
        return {
            encode: torch.cat([posterior.mean, posterior.logvar], dim=1),
            decode: vae.decode(unscaled).sample,
        }

    nudges = [half.mid.attn_1.v.weight for half in (autoencoder.encoder, autoencoder.decoder)]
    sides = {encode: [autoencoder.encoder], decode: [autoencoder.decoder]}
    return Pair(sides, [vae], ours, theirs, nudges)


def text_pair(encoders: TextEncoders, prompts: list[str] = PROMPTS) -> Pair:
    """What `encode_prompt` gives of raw strings, each encoder's rows and pooled vector apart."""
    pipe = twins.pipeline(encoders)
    clip_l, clip_g, t5 = encoders.clip_l, encoders.clip_g, encoders.t5
    rows, left = clip_l.config.max_position_embeddings, clip_l.config.hidden_size
    both, length = left + clip_g.config.hidden_size, encoders.t5_length
    depth = f"T5 of width {t5.config.d_model} at depth {t5.config.num_layers}"
    parts = {"CLIP-L": [clip_l], "CLIP-G": [clip_g], depth: [t5]}

    def split(context: Tensor, pooled: Tensor) -> Outputs:
        clips = torch.cat([context[:, :rows, :both], pooled[:, None]], dim=1)
        return dict(
            zip(parts, (clips[..., :left], clips[..., left:], context[:, rows:]), strict=True)
        )

    def theirs(_: torch.dtype) -> Outputs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            context, _, pooled, _ = pipe.encode_prompt(
                prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=length
            )
        return split(context, pooled)

    def ours(_: torch.dtype) -> Outputs:
        return split(*encoders.encode(prompts))

    nudges = [clip.text_model.encoder.layers[1].mlp.fc1.weight for clip in (clip_l, clip_g)]
    nudges.append(t5.encoder.block[1].layer[1].DenseReluDense.wi_0.weight)
    others = [pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3]
    return Pair(parts, others, ours, theirs, nudges)


def encoders_at_full_width(dtype: torch.dtype = SINGLE) -> TextEncoders:
    """CLIP-L and CLIP-G whole, T5-XXL at depth 2, with the official tokenizers."""
    shallow = T5Config(2, T5_XXL.width, T5_XXL.mlp_width, T5_XXL.heads)
    clip_l = build(lambda: text_encoders.clip(CLIP_L, "clip_l"), dtype, 1)
    clip_l.text_projection.weight.data = torch.eye(CLIP_L.width, dtype=dtype)
    clip_g = build(lambda: text_encoders.clip(CLIP_G, "clip_g"), dtype, 2)
    t5 = build(lambda: text_encoders.t5(shallow), dtype, 3)
    kinds = {"tokenizer": CLIPTokenizer, "tokenizer_2": CLIPTokenizer, "tokenizer_3": T5Tokenizer}
    tokenizers = [kind.from_pretrained(TOKENIZERS / name) for name, kind in kinds.items()]
    return TextEncoders(clip_l, clip_g, t5, tokenizers, T5_XXL.width, 77)


def variant_pair(variant: str, batch: int, dtype: torch.dtype) -> Pair:
    """An MMDiT of official size."""
    return mmdit_pair(build(lambda: MMDiT(VARIANTS[variant]), dtype), variant, batch)


def official_autoencoder(dtype: torch.dtype) -> Autoencoder:
    return build(lambda: Autoencoder(AutoencoderConfig()), dtype)


FULL_SINGLE: dict[str, Callable[[], Pair]] = {
    "text encoders": lambda: text_pair(encoders_at_full_width()),
    "autoencoder": lambda: autoencoder_pair(official_autoencoder(SINGLE), 256),
    **{name: partial(variant_pair, name, 2, SINGLE) for name in reversed(VARIANTS)},
}
FULL_HALF: dict[str, Callable[[], Pair]] = {
    "text encoders": lambda: text_pair(encoders_at_full_width(HALF), FIVE_PROMPTS),
    "autoencoder": lambda: autoencoder_pair(official_autoencoder(HALF), 128, 5),
    **{name: partial(variant_pair, name, 5, HALF) for name in reversed(VARIANTS)},
}

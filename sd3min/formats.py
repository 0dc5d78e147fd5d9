"""The tables of names: what diffusers calls the tensors of an official file, in both directions.

Three things change besides names: the fused q, k, v are three tensors there; the 1x1 convolutions
of the autoencoder's attention are linear layers; and where only a scale and a shift come from the
condition, diffusers has the scale first.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sd3min.config import AutoencoderConfig, MMDiTConfig, Shapes, count

Tensors = dict[str, Tensor]
SUFFIXES = ("", ".weight", ".bias")


class Row(NamedTuple):
    """An official module or tensor, diffusers' in its place, and how values are carried over."""

    official: str
    diffusers: tuple[str, ...]
    there: Callable[[Tensor], Tensor] = lambda tensor: tensor
    back: Callable[[Tensor], Tensor] = lambda tensor: tensor


def swap_halves(tensor: Tensor) -> Tensor:
    """Shift and scale change places."""
    return torch.cat(tensor.chunk(2)[::-1])


def to_linear(tensor: Tensor) -> Tensor:
    """The weight of a 1x1 convolution as a linear layer's; a bias as it is."""
    return tensor.flatten(1) if tensor.dim() == 4 else tensor


def to_convolution(tensor: Tensor) -> Tensor:
    """The weight of a linear layer as a 1x1 convolution's; a bias as it is."""
    return tensor[..., None, None] if tensor.dim() == 2 else tensor


def attention_rows(
    official: str, diffusers: str, qkv: tuple[str, ...], out: str, norms: str
) -> Iterator[Row]:
    """One stream's attention."""
    yield Row(f"{official}.qkv", tuple(f"{diffusers}.{name}" for name in qkv))
    yield Row(f"{official}.proj", (f"{diffusers}.{out}",))
    yield Row(f"{official}.ln_q", (f"{diffusers}.{norms}_q",))
    yield Row(f"{official}.ln_k", (f"{diffusers}.{norms}_k",))


def mmdit_rows(config: MMDiTConfig) -> Iterator[Row]:
    """The table of the MMDiT; rows of layers that a model lacks find nothing to rename."""
    yield Row("pos_embed", ("pos_embed.pos_embed",))
    yield Row("x_embedder.proj", ("pos_embed.proj",))
    yield Row("context_embedder", ("context_embedder",))
    for official, diffusers in (
        ("t_embedder", "timestep_embedder"),
        ("y_embedder", "text_embedder"),
    ):
        yield Row(f"{official}.mlp.0", (f"time_text_embed.{diffusers}.linear_1",))
        yield Row(f"{official}.mlp.2", (f"time_text_embed.{diffusers}.linear_2",))

    own, added = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
    for i in range(config.depth):
        block = f"transformer_blocks.{i}"
        image, context = f"joint_blocks.{i}.x_block", f"joint_blocks.{i}.context_block"
        last = (swap_halves, swap_halves) if i == config.depth - 1 else ()
        yield from attention_rows(f"{image}.attn", f"{block}.attn", own, "to_out.0", "norm")
        yield from attention_rows(f"{image}.attn2", f"{block}.attn2", own, "to_out.0", "norm")
        yield from attention_rows(
            f"{context}.attn", f"{block}.attn", added, "to_add_out", "norm_added"
        )
        yield Row(f"{image}.adaLN_modulation.1", (f"{block}.norm1.linear",))
        yield Row(f"{context}.adaLN_modulation.1", (f"{block}.norm1_context.linear",), *last)
        for official, diffusers in ((image, "ff"), (context, "ff_context")):
            yield Row(f"{official}.mlp.fc1", (f"{block}.{diffusers}.net.0.proj",))
            yield Row(f"{official}.mlp.fc2", (f"{block}.{diffusers}.net.2",))

    yield Row("final_layer.linear", ("proj_out",))
    yield Row("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap_halves, swap_halves)


def residual_rows(official: str, diffusers: str) -> Iterator[Row]:
    """One residual block of the autoencoder."""
    for name in ("norm1", "conv1", "norm2", "conv2"):
        yield Row(f"{official}.{name}", (f"{diffusers}.{name}",))
    yield Row(f"{official}.nin_shortcut", (f"{diffusers}.conv_shortcut",))


def autoencoder_rows(config: AutoencoderConfig) -> Iterator[Row]:
    """The table of the autoencoder; diffusers counts the decoder's levels as they run."""
    levels = len(config.widths)
    for half in ("encoder", "decoder"):
        yield Row(f"{half}.conv_in", (f"{half}.conv_in",))
        yield Row(f"{half}.norm_out", (f"{half}.conv_norm_out",))
        yield Row(f"{half}.conv_out", (f"{half}.conv_out",))
        yield from residual_rows(f"{half}.mid.block_1", f"{half}.mid_block.resnets.0")
        yield from residual_rows(f"{half}.mid.block_2", f"{half}.mid_block.resnets.1")
        official, diffusers = f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0"
        yield Row(f"{official}.norm", (f"{diffusers}.group_norm",))
        for name, other in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
            yield Row(f"{official}.{name}", (f"{diffusers}.{other}",), to_linear, to_convolution)
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        yield Row(f"encoder.down.{level}.downsample.conv", (f"{down}.downsamplers.0.conv",))
        yield Row(f"decoder.up.{level}.upsample.conv", (f"{up}.upsamplers.0.conv",))
        for j in range(config.blocks + 1):
            yield from residual_rows(f"encoder.down.{level}.block.{j}", f"{down}.resnets.{j}")
            yield from residual_rows(f"decoder.up.{level}.block.{j}", f"{up}.resnets.{j}")


def rows(config: MMDiTConfig | AutoencoderConfig) -> Iterator[Row]:
    """The table of a network."""
    return mmdit_rows(config) if isinstance(config, MMDiTConfig) else autoencoder_rows(config)


class Recipe(NamedTuple):
    """How an official tensor is made of diffusers': those of these names, one below the other."""

    names: tuple[str, ...]
    back: Callable[[Tensor], Tensor]


def recipes(config: MMDiTConfig | AutoencoderConfig) -> dict[str, Recipe]:
    """A recipe for every official tensor that the table knows, whether a model has it or not."""
    return {
        row.official + suffix: Recipe(tuple(name + suffix for name in row.diffusers), row.back)
        for row in rows(config)
        for suffix in SUFFIXES
    }


def numbers(shapes: Shapes) -> MMDiTConfig | AutoencoderConfig:
    """As much of a config as the tables ask for, counted in diffusers' names: the depth, or how
    many levels and blocks there are.
    """
    if depth := count(shapes, r"transformer_blocks\.(\d+)\."):
        return MMDiTConfig(depth)
    levels = count(shapes, r"encoder\.down_blocks\.(\d+)\.")
    blocks = count(shapes, r"encoder\.down_blocks\.0\.resnets\.(\d+)\.")
    return AutoencoderConfig((0,) * levels, blocks)


def to_diffusers(tensors: Tensors, config: MMDiTConfig | AutoencoderConfig) -> Tensors:
    """Official names to diffusers'; a tensor that the table does not know is a KeyError."""
    left, named = dict(tensors), {}
    for row in rows(config):
        for suffix in SUFFIXES:
            tensor = left.pop(row.official + suffix, None)
            if tensor is not None:
                pieces = row.there(tensor).chunk(len(row.diffusers))
                named |= {
                    name + suffix: piece for name, piece in zip(row.diffusers, pieces, strict=True)
                }
    if left:
        raise KeyError(f"no diffusers names are known for {', '.join(sorted(left))}")
    return named

"""What a part does, seen by leaving it out: an encoder, a block, a head of attention, a word."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sd3min.config import HEAD_WIDTH, Refusal
from sd3min.mmdit import JointBlock
from sd3min.pipeline import Pipeline
from sd3min.text_encoders import Conditioning, TextEncoders

ENCODERS = ("clip_l", "clip_g", "t5")


@dataclass(frozen=True)
class Ablation:
    """A picture with everything, one without a part, and how much they differ, of 255 levels."""

    whole: Image.Image
    without: Image.Image

    @property
    def change(self) -> float:
        """Mean difference of the values."""
        whole, without = (np.asarray(p, dtype=np.float32) for p in (self.whole, self.without))
        return float(np.abs(whole - without).mean())


def silent(
    encode: Any, encoders: TextEncoders, names: Sequence[str], *args: Any, **kwargs: Any
) -> Conditioning:
    """What encoders say, with zeros in the place of some of them."""
    context, pooled = (part.clone() for part in encode(*args, **kwargs))
    width, rows = encoders.clip_l.config.hidden_size, encoders.clip_l.config.max_position_embeddings
    both = width + encoders.clip_g.config.hidden_size
    if "t5" in names:
        context[:, rows:] = 0
    for name, columns in (("clip_l", slice(0, width)), ("clip_g", slice(width, both))):
        if name in names:
            context[:, :rows, columns] = 0
            pooled[:, columns] = 0
    return Conditioning(context, pooled)


@contextmanager
def without_encoder(pipe: Pipeline, *names: str) -> Iterator[None]:
    """The encoders say nothing: zeros in their place, in rows and pooled vector."""
    for name in names:
        if name not in ENCODERS:
            raise Refusal(f"{name!r} is not one of the encoders {', '.join(ENCODERS)}")
    encoders: Any = pipe.text_encoders
    encoders.encode = partial(silent, encoders.encode, encoders, names)
    try:
        yield
    finally:
        del encoders.encode


@contextmanager
def without_block(pipe: Pipeline, layer: int) -> Iterator[None]:
    """A joint block passes both streams on as they came."""

    def pass_on(block: JointBlock, inputs: tuple[Tensor, ...], output: Any) -> Any:
        return inputs[0], inputs[1]

    handle = find_block(pipe, layer).register_forward_hook(pass_on)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def without_head(pipe: Pipeline, layer: int, head: int) -> Iterator[None]:
    """A head of a block's joint attention reads nothing: zeros for its values."""
    block = find_block(pipe, layer)
    heads = pipe.config.width // HEAD_WIDTH
    if not 0 <= head < heads:
        raise Refusal(f"head {head} is not one of 0 to {heads - 1}")

    def silence(module: Any, inputs: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        q, k, v = output
        v = v.clone()
        v[:, head] = 0
        return q, k, v

    streams = (block.context_block, block.x_block)
    handles = [stream.attn.register_forward_hook(silence) for stream in streams]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def find_block(pipe: Pipeline, layer: int) -> JointBlock:
    """A joint block by its number."""
    if not 0 <= layer < pipe.config.depth:
        raise Refusal(f"layer {layer} is not one of 0 to {pipe.config.depth - 1}")
    block = pipe.mmdit.joint_blocks[layer]
    assert isinstance(block, JointBlock)
    return block


def without_word(prompt: str, word: str) -> str:
    """The prompt without a word."""
    rest = [each for each in prompt.split() if each.strip(".,;:!?").lower() != word.lower()]
    if len(rest) == len(prompt.split()):
        raise Refusal(f"the prompt {prompt!r} has no word {word!r}")
    return " ".join(rest)


@torch.no_grad()
def ablate(
    pipe: Pipeline,
    prompt: str,
    seed: int = 0,
    *,
    encoder: str | None = None,
    block: int | None = None,
    head: tuple[int, int] | None = None,
    word: str | None = None,
    **settings: Any,
) -> Ablation:
    """A picture with and without one part: an encoder by name, a block by number, a head by layer
    and number, or a word of the prompt. Raises Refusal unless just one is named.
    """
    parts = {"encoder": encoder, "block": block, "head": head, "word": word}
    if sum(part is not None for part in parts.values()) != 1:
        raise Refusal(f"name one part to leave out: {', '.join(parts)}")
    (whole,) = pipe(prompt, seed=seed, progress=False, **settings)
    if word is not None:
        (without,) = pipe(without_word(prompt, word), seed=seed, progress=False, **settings)
        return Ablation(whole, without)
    if encoder is not None:
        left_out = without_encoder(pipe, encoder)
    elif block is not None:
        left_out = without_block(pipe, block)
    else:
        left_out = without_head(pipe, *head)
    with left_out:
        (without,) = pipe(prompt, seed=seed, progress=False, **settings)
    return Ablation(whole, without)

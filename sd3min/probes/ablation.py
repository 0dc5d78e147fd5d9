"""What a part does, seen by leaving it out: an encoder, a block, a head of attention, a word."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
from sd3min.probes.attention import spans
from sd3min.probes.hooks import hooked, plain
from sd3min.text_encoders import Conditioning
from sd3min.training.conditioning import Layout, leave_out

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


def silent(encode: Any, layout: Layout, kept: Tensor, *args: Any, **kwargs: Any) -> Conditioning:
    """What encoders say, with zeros in the place of those that are not kept."""
    said = encode(*args, **kwargs)
    return leave_out(layout, said, kept.expand(len(said.pooled), -1))


@contextmanager
def without_encoder(pipe: Pipeline, *names: str) -> Iterator[None]:
    """Encoders say nothing: zeros in their place, in rows and pooled vector, as in training with
    encoders left out (App. B.3), and for T5 in Fig. 9 (§5.3.3).
    """
    for name in names:
        if name not in ENCODERS:
            raise Refusal(f"{name!r} is not one of the encoders {', '.join(ENCODERS)}")
    encoders: Any = plain(pipe)[1]
    kept = torch.tensor([[float(each not in names) for each in ENCODERS]])
    encoders.encode = partial(silent, encoders.encode, Layout.heard(encoders), kept)
    try:
        yield
    finally:
        del encoders.encode


@contextmanager
def without_block(pipe: Pipeline, layer: int) -> Iterator[None]:
    """A joint block passes both streams on as they came."""

    def pass_on(block: JointBlock, inputs: tuple[Tensor, ...], output: Any) -> Any:
        return inputs[0], inputs[1]

    with hooked([find_block(pipe, layer)], pass_on):
        yield


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

    with hooked([block.context_block.attn, block.x_block.attn], silence):
        yield


def find_block(pipe: Pipeline, layer: int) -> JointBlock:
    """A joint block by its number, from 0; refused where there is none."""
    blocks = plain(pipe)[0].joint_blocks
    if not 0 <= layer < len(blocks):
        raise Refusal(f"layer {layer} is not one of 0 to {len(blocks) - 1}")
    block = blocks[layer]
    assert isinstance(block, JointBlock)
    return block


def without_word(prompt: str, word: str) -> str:
    """The prompt without a word, wherever it stands, or without several in a row; refused where it
    has none such.
    """
    for start, end in reversed(spans(prompt, word)):
        prompt = prompt[:start] + prompt[end:]
    return " ".join(prompt.split())


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
    left_out: AbstractContextManager[None] = nullcontext()
    if encoder is not None:
        left_out = without_encoder(pipe, encoder)
    if block is not None:
        left_out = without_block(pipe, block)
    if head is not None:
        left_out = without_head(pipe, *head)
    rest = prompt if word is None else without_word(prompt, word)
    with left_out:
        without, *_ = pipe(rest, seed=seed, progress=False, **settings)
    whole, *_ = pipe(prompt, seed=seed, progress=False, **settings)
    return Ablation(whole, without)

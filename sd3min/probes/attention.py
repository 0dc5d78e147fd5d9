"""What joint attention looks at: how much of it crosses between text and image, how sharp it is,
and where in the picture a word is read (paper §4, Fig. 2b).

Queries and keys are overheard where the heads make them, and the attention computed a second time
beside the network's own, a few rows at a time: the output of the network stays the same to the
bit, and no map of all tokens to all tokens is kept.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from sd3min import flow
from sd3min.config import HEAD_WIDTH, PATCH, Refusal
from sd3min.conventions import DIFFUSERS, Conventions
from sd3min.mmdit import JointBlock, MMDiT
from sd3min.pipeline import Pipeline
from sd3min.probes.hooks import plain
from sd3min.probes.named import Named
from sd3min.settings import check_call

QUADRANTS = ("text to text", "text to image", "image to text", "image to image")
ROWS = 512  # of queries at a time


@dataclass
class Seen:
    """What one block's attention did in one pass, of the pictures that were asked for."""

    quadrants: Tensor  # [picture, head, 4]: shares of attention, by who asks
    entropy: Tensor  # [picture, head, 2]: of text's and of image's queries, in nats
    largest: Tensor  # [picture, head]: logit
    heat: Tensor  # [picture, head, word, place]: how much each patch reads each word


@dataclass
class Attention:
    """What the joint attention of a run did, by step and layer, for the prompts' own pass."""

    words: tuple[str, ...]
    rows: list[list[int]]  # of the context that belong to each word
    guided: bool = True
    size: tuple[int, int] = (0, 0)  # of the picture, in patches
    passes: list[list[Seen]] = field(default_factory=list)

    def stacked(self, name: str, *axes: str) -> Named:
        """One figure of all steps and layers."""
        if not self.passes:
            raise Refusal("nothing was drawn while attention was watched")
        layers = [torch.stack([getattr(s, name) for s in seen]) for seen in self.passes]
        return Named(torch.stack(layers), ("step", "layer", "picture", "head", *axes))

    @property
    def quadrants(self) -> Named:
        """Share of text's attention that goes to text and to image, and of image's likewise."""
        return self.stacked("quadrants", "quadrant")

    @property
    def entropy(self) -> Named:
        """Mean entropy in nats, of text's queries and of the image's."""
        return self.stacked("entropy", "asking")

    @property
    def largest_logit(self) -> Named:
        """The largest logit: what q/k normalisation bounds (§5.3.2, Fig. 5)."""
        return self.stacked("largest")

    def heat(self, word: str) -> Named:
        """How much each patch of the picture reads a word, [step, layer, picture, head, h, w].

        The shares of the word's rows, CLIP's and T5's, are added up.
        """
        if word not in self.words:
            raise Refusal(f"the word {word!r} was not watched: {', '.join(self.words) or 'none'}")
        heat = self.stacked("heat", "word", "place").values[..., self.words.index(word), :]
        whole = rearrange(heat, "... (h w) -> ... h w", h=self.size[0])
        return Named(whole, ("step", "layer", "picture", "head", "row", "column"))


def spans(prompt: str, word: str) -> list[tuple[int, int]]:
    """Where a word, or several in a row, stand in a prompt, in capitals or not; Refusal where
    they do not.
    """
    before, after = (r"\b" if re.match(r"\w", end) else "" for end in (word[:1], word[-1:]))
    pattern = f"{before}{re.escape(word)}{after}"
    found = [each.span() for each in re.finditer(pattern, prompt, re.IGNORECASE)]
    if not found or not word.strip():
        raise Refusal(f"the prompt {prompt!r} has no word {word!r}")
    return found


def word_rows(
    pipe: Pipeline,
    prompt: str,
    word: str,
    t5_length: int | None = None,
    conventions: Conventions = DIFFUSERS,
) -> list[int]:
    """The rows of the context in which encoders read a word of a prompt: CLIP's, then T5's.

    A word that comes twice has the rows of both; name more words in a row for one of them. Raises
    Refusal where the prompt lacks it or every encoder cuts it off.
    """
    places, (_, encoders) = spans(prompt, word), plain(pipe)
    clip_length = encoders.clip_l.config.max_position_embeddings
    own = conventions.clip_g_exclamation == "padding"
    reads = [(0, 0, clip_length), (1 if own else 0, 0, clip_length)]
    if encoders.has_t5:
        reads.append((2, clip_length, t5_length or encoders.t5_length))
    found: set[int] = set()
    for index, first, length in reads:
        shown = prompt[: conventions.t5_characters] if index == 2 else prompt
        tokens = encoders.tokenizers[index](shown, return_offsets_mapping=True, verbose=False)
        offsets = tokens["offset_mapping"]
        if len(offsets) > length and not (index == 2 and conventions.t5_grows):
            offsets = offsets[: length - 1]  # the last place belongs to the end of the text
        found |= {
            first + i
            for i, (a, b) in enumerate(offsets)
            if any(a < end and b > start and a < b for start, end in places)
        }
    if not found:
        raise Refusal(f"the word {word!r} is cut off from {prompt!r}: shorten the prompt")
    return sorted(found)


def looked(q: Tensor, k: Tensor, texts: int, words: Sequence[Sequence[int]]) -> Seen:
    """What attention from q to k did; the first `texts` tokens are the text's."""
    sums = torch.zeros(*q.shape[:2], 2, 2)
    entropy = torch.zeros(*q.shape[:2], 2)
    largest = torch.full(q.shape[:2], -torch.inf)
    heat = []
    for first, side in ((0, 0), (texts, 1)):
        queries = q[:, :, first : texts if side == 0 else None]
        for rows in queries.split(ROWS, dim=2):
            logits = (rows.float() @ k.float().mT) / HEAD_WIDTH**0.5
            shares = logits.softmax(dim=-1)
            largest = torch.maximum(largest, logits.amax(dim=(2, 3)).cpu())
            to_text = shares[..., :texts].sum(dim=(2, 3)).cpu()
            to_image = shares[..., texts:].sum(dim=(2, 3)).cpu()
            sums[:, :, side] += torch.stack([to_text, to_image], dim=-1) / queries.shape[2]
            nats = torch.special.entr(shares).sum(dim=(2, 3)).cpu()
            entropy[:, :, side] += nats / queries.shape[2]
            if side == 1:
                columns = [shares[..., list(rows_)].sum(dim=-1) for rows_ in words]
                shape = (*shares.shape[:2], 0, shares.shape[2])
                heat.append(torch.stack(columns, dim=2).cpu() if columns else torch.zeros(shape))
    return Seen(sums.flatten(2), entropy, largest, torch.cat(heat, dim=-1))


def listen(block: Any, record: Attention, current: list[Seen]) -> Iterator[Any]:
    """Hooks that overhear a joint block's queries and keys, and add what its attention does."""
    heard: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
            q, k, _ = output
            heard[name] = q, k

        return hook

    def after(module: JointBlock, inputs: Any, output: Any) -> None:
        pairs = zip(heard["context"], heard["image"], strict=True)
        q, k = (torch.cat(both, dim=2) for both in pairs)
        if record.guided:
            q, k = (each.chunk(2)[1] for each in (q, k))
        current.append(looked(q, k, heard["context"][0].shape[2], record.rows))
        heard.clear()

    yield block.context_block.attn.register_forward_hook(keep("context"))
    yield block.x_block.attn.register_forward_hook(keep("image"))
    yield block.register_forward_hook(after)


@contextmanager
def overheard(mmdit: MMDiT, record: Attention) -> Iterator[None]:
    """Every pass of a network adds what each of its blocks' attention did."""
    current: list[Seen] = []

    def begin(module: MMDiT, inputs: tuple[Tensor, ...]) -> None:
        height, width = inputs[0].shape[-2:]
        record.size = height // PATCH, width // PATCH
        current.clear()

    def finish(module: MMDiT, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        record.passes.append(list(current))

    hooks = [hook for block in mmdit.joint_blocks for hook in listen(block, record, current)]
    hooks += [mmdit.register_forward_pre_hook(begin), mmdit.register_forward_hook(finish)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def attention(
    pipe: Pipeline,
    prompt: str,
    words: Sequence[str] = (),
    seed: int = 0,
    on_step: Callable[[flow.Step], None] | None = None,
    **settings: Any,
) -> tuple[Image.Image, Attention]:
    """A picture of a prompt, and what the joint attention did while it was drawn.

    `words` of the prompt are those whose heat over the picture is kept. Settings are those of a
    call; of several pictures the first is returned, and all are watched. Raises Refusal where the
    prompt lacks a word, and for pipelines under a plan of memory, whose networks are other modules.
    """
    mmdit, _ = plain(pipe)
    settings["seed"] = seed
    chosen = check_call(pipe.config, pipe.defaults, prompt, **settings).settings
    read = partial(word_rows, pipe, prompt, t5_length=chosen.t5_length)
    rows = [read(word, conventions=chosen.conventions) for word in words]
    record = Attention(tuple(words), rows, guided=chosen.guidance_scale > 1)
    with overheard(mmdit, record):
        image, *_ = pipe(prompt, progress=False, on_step=on_step, **settings)
    return image, record

"""Small tokenizers of the kinds that Stable Diffusion 3 reads with, learnt from the scenes'
captions.

Byte-level BPE for both CLIPs (the end of the text has the largest id; CLIP-L pads with it, CLIP-G
with id 0, "!") and a unigram model for T5 (padding 0, end 1, unknown 2). Every word of the captions
is one token; other words fall apart.
"""

from collections import Counter
from collections.abc import Iterable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer, T5Tokenizer

from sd3min.checkpoint import TOKENIZERS
from sd3min.training import captions
from sd3min.training.records import whole

START, END = "<|startoftext|>", "<|endoftext|>"
FOLDERS = tuple(folder for folder, _ in TOKENIZERS.values())
WORDS = captions.vocabulary()


def byte_letters() -> list[str]:
    """GPT-2's printable letter for each byte, in CLIP's order, where "!" comes first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def merged(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    """A word's pieces with every occurrence of a pair joined."""
    joined: list[str] = []
    for piece in pieces:
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


def learn_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, the most frequent pair first, until every word is one piece."""
    split = {word: [*word[:-1], f"{word[-1]}</w>"] for word in words}
    merges = []
    while pairs := Counter(pair for pieces in split.values() for pair in pairwise(pieces)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        split = {word: merged(pieces, best) for word, pieces in split.items()}
        merges.append(best)
    return merges


def save_clip(folder: Path, pad: str, length: int) -> None:
    """Write a CLIP tokenizer into a folder."""
    letters, merges = byte_letters(), learn_merges(WORDS)
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    vocab = {token: i for i, token in enumerate([*tokens, START, END])}
    given: Any = merges  # transformers takes pairs and is annotated for texts
    tokenizer = CLIPTokenizer(vocab=vocab, merges=given, pad_token=pad, model_max_length=length)
    tokenizer.save_pretrained(folder)


def save_t5(folder: Path, length: int) -> None:
    """Write a T5 tokenizer into a folder; it tells capitals, so every word may begin with one."""
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words = [
        (f"▁{word}", -4.0)
        for word in dict.fromkeys([*WORDS, *(word.capitalize() for word in WORDS)])
    ]
    letters = [("▁", -8.0), *((chr(code), -10.0) for code in range(33, 127))]
    T5Tokenizer(
        vocab=[*specials, *words, *letters], extra_ids=0, model_max_length=length
    ).save_pretrained(folder)


def save_tokenizers(folder: Path, length: int = captions.LENGTH) -> None:
    """Write CLIP-L's, CLIP-G's and T5's tokenizers into their folders, those that are not there."""
    makers = (partial(save_clip, pad=END), partial(save_clip, pad="!"), save_t5)
    for name, make in zip(FOLDERS, makers, strict=True):
        if not (folder / name).exists():
            with whole(folder / name) as part:
                make(part, length=length)

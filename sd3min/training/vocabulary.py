"""Small tokenizers of the kinds that Stable Diffusion 3 reads with, learnt from the scenes'
captions.

Byte-level BPE for both CLIPs (the end of the text has the largest id; CLIP-L pads with it, CLIP-G
with id 0, "!") and a unigram model for T5 (padding 0, end 1, unknown 2). Every word of the captions
is one token; other words fall apart.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5Tokenizer

from sd3min.training.scenes import BACKGROUNDS, COLOURS, RELATIONS, SHAPES

START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 16  # tokens that each encoder reads
WORDS = [
    "a",
    "an",
    "on",
    *COLOURS,
    *SHAPES,
    *BACKGROUNDS,
    *(word for r in RELATIONS for word in r.split()),
]


def byte_letters() -> list[str]:
    """GPT-2's printable letter for each byte, in CLIP's order, where "!" comes first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def save_clip(folder: Path, pad: str) -> None:
    """Write a CLIP tokenizer into a folder."""
    letters = byte_letters()
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.train_from_iterator(sorted(set(WORDS)), trainer)
    merges: Any = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        *dict.fromkeys("".join(pair) for pair in merges),
    ]
    vocab = {token: i for i, token in enumerate([*dict.fromkeys(tokens), START, END])}
    CLIPTokenizer(
        vocab=vocab, merges=merges, pad_token=pad, model_max_length=LENGTH
    ).save_pretrained(folder)


def save_t5(folder: Path) -> None:
    """Write a T5 tokenizer into a folder: unlike CLIP's it tells capitals, so that words may begin
    with one.
    """
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words = [
        (f"▁{word}", -4.0)
        for word in dict.fromkeys([*WORDS, *(word.capitalize() for word in WORDS)])
    ]
    letters = [("▁", -8.0), *((chr(code), -10.0) for code in range(33, 127))]
    T5Tokenizer(
        vocab=[*specials, *words, *letters], extra_ids=0, model_max_length=LENGTH
    ).save_pretrained(folder)


def save_tokenizers(folder: Path) -> None:
    """Write all three tokenizers as folders `tokenizer`, `tokenizer_2` and `tokenizer_3`."""
    save_clip(folder / "tokenizer", pad=END)
    save_clip(folder / "tokenizer_2", pad="!")
    save_t5(folder / "tokenizer_3")

"""`sd3min verify`: a reader's own files, checked alone and against diffusers, part by part.

Works on files of any size in little memory: the tensors stay in the mapped file, both sides use
the same ones, and a block is converted to float32 or float64 when it runs.
"""

import logging
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch

from sd3min.checkpoint import AnyPath, AnyPaths, Checkpoint
from sd3min.probes.checks import ENCODERS, Check, alone


def find_comparisons() -> Any:
    """The module that compares with diffusers; None where that is not installed."""
    quiet = logging.getLogger("transformers")
    level = quiet.level
    quiet.setLevel(logging.ERROR)  # it tells of image processors, which nothing here uses
    try:
        return import_module("sd3min.probes.comparisons")
    except ImportError:
        return None
    finally:
        quiet.setLevel(level)


@torch.no_grad()
def verify(
    path: AnyPaths | None = None,
    text_encoders: AnyPaths | None = None,
    tokenizers: AnyPath | None = None,
) -> Iterator[Check]:
    """The lines of the table, as they are found out; arguments are those of `sd3min.load`.

    Without diffusers only what the files say themselves is checked. Raises Refusal, before any
    work, where they cannot be used at all.
    """
    opened = Checkpoint.open(path, text_encoders, tokenizers)
    opened.require(list(opened.parts))
    comparisons = find_comparisons()
    if comparisons and {"clip_l", "clip_g"} <= opened.parts.keys():
        opened.context_width()
        for name in ENCODERS & opened.parts.keys():
            opened.load_tokenizer(name)

    for name in opened.parts:
        yield from alone(opened, name)
    if comparisons:
        yield from comparisons.compare(opened)
    else:
        why = "diffusers cannot be imported; install it with pip install diffusers"
        yield Check("all", "diffusers", None, why)

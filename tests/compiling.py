"""Compile a small random model, in a process without the tests' shape checks, which are no graph.

python tests/compiling.py VARIANT BACKEND DTYPE COUNT prints, in JSON, of each network at so
many sizes, how many graphs were compiled for it and how far the outcome is from the plain one's.
"""

import copy
import json
import sys
import tempfile
from pathlib import Path

import small
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from sd3min.fast.compiled import compile_
from sd3min.pipeline import Pipeline

SIZES = [(2, 8, 12), (2, 12, 8), (2, 10, 16), (3, 10, 10)]  # batch, height and width of latents


def make(variant: str, dtype: torch.dtype) -> Pipeline:
    """A small pipeline in one type."""
    with tempfile.TemporaryDirectory() as folder:
        pipe = small.pipeline(Path(folder), small.VARIANTS[variant])
    parts = pipe.mmdit.to(dtype), pipe.autoencoder.to(dtype), pipe.text_encoders.to(dtype)
    return Pipeline(*parts, pipe.defaults)


def calls(b: int, h: int, w: int, dtype: torch.dtype) -> dict:
    """Each network as a function of the pipeline, on random inputs of a size."""
    generator = torch.Generator().manual_seed(h)
    shapes = [(b, 16, h, w), (b,), (b, 9, 320), (b, 192)]
    drawn = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    drawn[1] = 1000 * drawn[1].sigmoid()
    return {
        "mmdit": lambda pipe: pipe.mmdit(*drawn),
        "decoder": lambda pipe: pipe.autoencoder.decode(drawn[0]),
    }


@torch.no_grad()
def main(variant: str, backend: str, dtype_name: str, count: str) -> None:
    """Compare."""
    dtype, found = getattr(torch, dtype_name), {"mmdit": [], "decoder": []}
    counter = CompileCounterWithBackend(backend)
    plain = make(variant, dtype)
    compiled = compile_(copy.deepcopy(plain), backend=counter)
    for size in SIZES[: int(count)]:
        for name, call in calls(*size, dtype).items():
            before, expected = counter.frame_count, call(plain)
            apart = (call(compiled) - expected).abs().max() / expected.abs().max()
            found[name].append([counter.frame_count - before, apart.item()])
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Plans of memory at full official size, each in a process of its own that is watched."""

from pathlib import Path

import files
import pytest
import watched

MAKE = """
import sys
import torch
import sd3min

model, t5, tokenizers, size, memory = sys.argv[1:]
pipe = sd3min.load([model, *filter(None, [t5])], tokenizers=tokenizers, memory=memory, t5=bool(t5))
assert pipe.dtype == torch.bfloat16
size = int(size)
print(pipe.plan(width=size, height=size).peak)
pipe("a red circle", seed=1, steps=1, width=size, height=size, progress=False)
"""
SD3, T5 = "sd3_medium_incl_clips.safetensors", "text_encoders/t5xxl_fp16.safetensors"
NEAR = 0.15  # of what is measured, that a plan may be off

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's counts"),
    pytest.mark.skipif(not files.manifests(), reason="the official lists are not here"),
    pytest.mark.skipif(
        not files.TOKENIZERS.is_dir(), reason="the official tokenizers are not here"
    ),
]


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    folder = tmp_path_factory.mktemp("official")
    return lambda name: files.sparse(folder / Path(name).name, files.manifests()[name])


@pytest.mark.parametrize(
    ("memory", "size", "with_t5", "kind", "most"),
    [
        ("resident", 512, False, "private", 3.6e9),
        ("stream", 512, False, "resident", 1.5e9),
        ("stream", 512, True, "resident", 1.5e9),
    ],
)
def test_sd3_medium_stays_within_its_plan(memory, size, with_t5, kind, most, sparse):
    t5 = sparse(T5) if with_t5 else ""
    peaks = watched.run(MAKE, sparse(SD3), t5, files.TOKENIZERS, size, memory)
    said = int(peaks.printed)
    print(f"{memory}: {peaks['private'] / 1e9:.2f} GB private, {peaks['resident'] / 1e9:.2f} GB ")
    assert abs(said - peaks["private"]) < NEAR * peaks["private"]
    assert peaks[kind] < most

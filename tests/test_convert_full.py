"""Conversion at full official size: the configs fit, and memory holds one tensor at a time."""

import math
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import files
import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from sd3min import convert, folder, writer
from sd3min.checkpoint import Checkpoint
from sd3min.parts import DERIVED

MEASURE = """
import re, sys
from pathlib import Path
from sd3min import convert, writer

def private():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def watched(name, tensor):
    global peak
    made = content(name, tensor)
    peak = max(peak, private())
    return made

content, writer.content = writer.content, watched
before = peak = private()
convert.convert(sys.argv[1], sys.argv[2], progress=False)
print((peak - before) * 1024)
"""
OVERHEAD = 32e6  # bytes that headers, names and modules on the meta device take


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """Sparse files of zeros with the names and shapes of the official ones."""
    names = files.manifests()
    if not names:
        pytest.skip("the official files' list of tensors is not at hand")
    place = tmp_path_factory.mktemp("official")

    def make(name):
        return files.sparse(place / name.replace("/", "-"), names[name])

    yield make
    shutil.rmtree(place)


def meta_shapes(build):
    with torch.device("meta"):
        return {name: list(tensor.shape) for name, tensor in build().state_dict().items()}


def built(settings):
    """The module that diffusers or transformers makes of a config."""
    if settings.get("_class_name") == "AutoencoderKL":
        return AutoencoderKL.from_config(settings)
    if settings.get("_class_name") == "SD3Transformer2DModel":
        return SD3Transformer2DModel.from_config(settings)
    if settings["architectures"] == ["T5EncoderModel"]:
        return T5EncoderModel(T5Config.from_dict(settings))
    return CLIPTextModelWithProjection(CLIPTextConfig.from_dict(settings))


@pytest.mark.parametrize(
    "name",
    [
        "sd3_medium.safetensors",
        "sd3.5_medium.safetensors",
        "sd3.5_large.safetensors",
        "sd3_medium_incl_clips.safetensors",
        "sd3_medium_incl_clips_t5xxlfp16.safetensors",
        "text_encoders/clip_l.safetensors",
        "text_encoders/clip_g.safetensors",
        "text_encoders/t5xxl_fp16.safetensors",
    ],
)
def test_official_files_become_what_diffusers_builds_of_their_configs(name, official):
    opened = Checkpoint.open(official(name))
    for part in opened.parts.values():
        settings = folder.component_config(part, opened.defaults)
        wanted = meta_shapes(lambda settings=settings: built(settings))
        made = convert.diffusers_tensors(part)
        assert {n: list(tensor.shape) for n, tensor in made.items()} == wanted
        assert {tensor.dtype for tensor in made.values()} == {"F16"}


def test_the_largest_parts_are_split_as_the_released_folders_are(official):
    t5 = official("text_encoders/t5xxl_fp16.safetensors")
    opened, counts = Checkpoint.open(official("sd3.5_large.safetensors"), t5), {}
    for name, part in opened.parts.items():
        tensors = convert.diffusers_tensors(part)
        tensors.pop(DERIVED["t5"], None)
        counts[name] = len(writer.split(tensors, folder.COMPONENTS[name].shard))
    assert counts == {"mmdit": 2, "autoencoder": 1, "t5": 2}


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs Linux's account of memory"
)
def test_sd3_medium_goes_there_and_back_at_full_size_in_the_memory_of_a_tensor(official, tmp_path):
    source = official("sd3_medium.safetensors")
    shapes = files.manifests()["sd3_medium.safetensors"]
    largest = max(2 * math.prod(shape) for shape in shapes.values())
    mark(source)
    for target, given in (("folder", source), ("back.safetensors", tmp_path / "folder")):
        command = [sys.executable, "-c", MEASURE, str(given), str(tmp_path / target)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peak = int(done.stdout)
        print(f"to {target}: {peak / 1e6:.1f} MB private; a tensor has {largest / 1e6:.1f} MB")
        assert peak < largest + OVERHEAD
    shutil.rmtree(tmp_path / "folder")
    assert_same_tensors(tmp_path / "back.safetensors", source)


def mark(path):
    """Write a few different bytes at the start of every MiB of a sparse file's tensors."""
    size = path.stat().st_size
    with path.open("rb+") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        for i, place in enumerate(range(8 + length, size - 64, 1 << 20)):
            file.seek(place)
            file.write(struct.pack("<Q", i + 1))


def assert_same_tensors(one, other):
    with safe_open(one, "pt") as ours, safe_open(other, "pt") as theirs:
        assert set(ours.keys()) == set(theirs.keys())
        for name in ours.keys():  # noqa: SIM118
            a, b = ours.get_tensor(name), theirs.get_tensor(name)
            assert a.dtype == b.dtype and a.shape == b.shape
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name

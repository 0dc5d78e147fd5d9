"""The shipped sd3-tiny: an official file in small, and as good as it is said to be."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sd3min
from sd3min.checkpoint import Checkpoint
from sd3min.pipeline import to_pictures
from sd3min.probes.ablation import ENCODERS
from sd3min.training import captions, images, scenes
from sd3min.training.detector import judge

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "weights" / "sd3-tiny"
FIGURES = json.loads((FOLDER / "accuracy.json").read_text())
MEASURED = FIGURES["measured"]
LARGEST_FILE = 60_000_000  # bytes


@pytest.fixture(scope="module")
def pipe():
    return sd3min.load()


def draw(pipe, wanted):
    """How many pictures of scenes are right, their seeds the scenes' places."""
    pictures = pipe([captions.caption(scene) for scene in wanted], seed=0, progress=False)
    return sum(judge(p, scene).right for p, scene in zip(pictures, wanted, strict=True))


def test_it_is_a_complete_official_file_in_half_precision():
    opened = Checkpoint.open()
    assert opened.path.parent == FOLDER
    opened.require(["mmdit", "autoencoder", "clip_l", "clip_g", "t5"])
    types = {tensor.dtype for part in opened.parts.values() for tensor in part.tensors.values()}
    assert types == {"F16"}
    assert opened.path.stat().st_size < LARGEST_FILE
    assert opened.defaults.t5_length == opened.parts["clip_l"].config.length == 24


def test_the_official_scale_and_shift_normalise_its_latents(pipe):
    wanted = scenes.prompts("seen", 240)
    pictures = images.drawn(wanted, random.Random(0))
    with torch.no_grad():
        latents = pipe.autoencoder.encode(pictures)
    assert latents.mean().abs() < 0.05
    assert latents.std().item() == pytest.approx(1, abs=0.1)


def test_its_posteriors_are_narrow(pipe):
    """Else fine-tuning on their samples would learn noise."""
    _, logvar = pipe.autoencoder.moments(images.batch("some", 2))
    width = torch.tensor(images.WIDTH)
    assert torch.allclose(torch.exp(logvar / 2), width, rtol=1e-2)  # of half precision


def test_ends_of_text_have_the_largest_id_and_clip_g_pads_with_zero(pipe):
    clip_l, clip_g, _ = pipe.text_encoders.tokenizers
    end = len(clip_l) - 1
    assert clip_l("a").input_ids[-1] == clip_g("a").input_ids[-1] == end
    assert clip_l.pad_token_id == end and clip_g.pad_token_id == 0


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_it_draws_what_was_asked_for(pipe, kind):
    right = draw(pipe, scenes.prompts(kind, 20))
    assert right >= 20 * MEASURED[kind]["right"] - 4  # twice the spread of twenty throws


def test_its_autoencoder_keeps_the_shapes(pipe):
    wanted = scenes.prompts("triples", 20)
    pictures = images.drawn(wanted, random.Random(1))
    with torch.no_grad():
        kept = to_pictures(pipe.autoencoder.decode(pipe.autoencoder.encode(pictures)))
    assert sum(judge(p, scene).right for p, scene in zip(kept, wanted, strict=True)) >= 19


def test_figures_are_of_these_weights(pipe):
    assert FIGURES["weights"] == pipe.weights


def test_measured_accuracy_is_what_was_aimed_at():
    assert FIGURES["count"] == 1000
    seen, pairs, triples = (MEASURED[kind]["right"] for kind in scenes.KINDS)
    assert seen >= 0.98 and (pairs + triples) / 2 >= 0.95
    assert pairs >= 0.93 and triples >= 0.97
    for kind in scenes.KINDS:
        assert MEASURED[kind]["ground"] >= 0.99
        assert MEASURED[f"{kind}, 8 steps"]["right"] >= MEASURED[kind]["right"] - 0.03
    assert MEASURED["reconstruction"]["psnr"] >= 30


@pytest.mark.parametrize("name", ENCODERS)
def test_text_encoders_are_needed(name):
    """Shuffling any one's weights costs five points or more."""
    assert MEASURED[f"shuffled/{name}"]["right"] <= MEASURED["whole"]["right"] - 0.05


@pytest.mark.parametrize("name", ENCODERS)
def test_every_text_encoder_can_be_left_out(name):
    """With zeros in its place the others are asked for everything."""
    assert MEASURED[f"without/{name}"]["right"] >= MEASURED["whole"]["right"] - 0.1


def test_the_demo_gives_the_committed_picture(pipe):
    command = re.search(r'generate "(.+)" --seed (\d+)', (ROOT / "Makefile").read_text())
    prompt, seed = command[1], int(command[2])
    found = np.asarray(pipe(prompt, seed=seed, progress=False)[0]).astype(int)
    with Image.open(ROOT / "weights" / "figures" / "demo.png") as committed:
        difference = np.abs(found - np.asarray(committed))
    assert difference.mean() < 1  # of 255 levels; other processors round differently
    assert judge(Image.fromarray(found.astype(np.uint8)), captions.parse(prompt)).right


def test_it_draws_without_t5_too():
    pipe = sd3min.load(t5=False)
    right = draw(pipe, scenes.prompts("seen", 20))
    assert right >= 20 * MEASURED["without/t5"]["right"] - 5

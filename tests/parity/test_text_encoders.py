"""Text conditioning equals diffusers' `encode_prompt`, from raw strings."""

import warnings
from pathlib import Path

import oracle
import pytest
import small
import torch
from transformers import CLIPTokenizer, T5Tokenizer

from sd3min.pipeline import Pipeline

REAL = Path(__file__).parents[3] / "shared" / "tokenizers"
PROMPTS = {
    "plain": ["a photo of a cat"],
    "empty": [""],
    "exclamation": ["a cat! really!! a red circle!"],
    "long": ["a red circle above a blue square on gray, " * 30],
    "batch": ["a red circle", "", "An orange heart left of a pink star on white, " * 12],
    "unusual": ["naïve café — 猫 🙂 <|endoftext|> x"],
}


@pytest.fixture(scope="module", params=["small tokenizers", "real tokenizers"])
def pipes(request, tmp_path_factory):
    if request.param == "small tokenizers":
        tokenizers, length = small.tokenizers(tmp_path_factory.mktemp("tokenizers")), 16
    elif REAL.is_dir():
        tokenizers = [
            CLIPTokenizer.from_pretrained(REAL / "tokenizer"),
            CLIPTokenizer.from_pretrained(REAL / "tokenizer_2"),
            T5Tokenizer.from_pretrained(REAL / "tokenizer_3"),
        ]
        length = 77
    else:
        pytest.skip("the official tokenizers are not here")
    encoders = small.encoders(tokenizers, length).double()
    ours = Pipeline(small.mmdit().double(), small.autoencoder().double(), encoders, small.DEFAULTS)
    return ours, oracle.pipeline(ours)


def both(pipes, prompts, t5_length):
    ours, theirs = pipes
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        conditioning = ours.encode_prompt(prompts, t5_length)
        expected = theirs.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=t5_length
        )
    return conditioning, (expected[0], expected[2])


@pytest.mark.parametrize("t5_length", [16, 77, 256])
@pytest.mark.parametrize("kind", PROMPTS)
def test_context_and_pooled_equal_diffusers_in_float64(pipes, kind, t5_length):
    (context, pooled), (their_context, their_pooled) = both(pipes, PROMPTS[kind], t5_length)
    assert oracle.relative(context, their_context) < oracle.RUNG_1
    assert oracle.relative(pooled, their_pooled) < oracle.RUNG_1


def test_without_t5_its_rows_are_zeros_as_in_diffusers(pipes):
    whole, _ = pipes
    encoders = whole.text_encoders
    t5, encoders.t5 = encoders.t5, None
    try:
        pipes = whole, oracle.pipeline(whole)
        (context, pooled), (their_context, their_pooled) = both(pipes, PROMPTS["batch"], 256)
    finally:
        encoders.t5 = t5
    assert context.shape[1] == encoders.clip_l.config.max_position_embeddings + 256
    assert context[:, -256:].abs().max() == 0
    assert oracle.relative(context, their_context) < oracle.RUNG_1
    assert oracle.relative(pooled, their_pooled) < oracle.RUNG_1

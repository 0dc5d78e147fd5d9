"""Tokenizers of the plans of memory say what transformers' do, whatever is in their files."""

import dataclasses
import json
import shutil
import warnings

import files
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import sd3min
from sd3min import checkpoint, text_encoders
from sd3min.checkpoint import TOKENIZERS, Checkpoint
from sd3min.fast import tokens

TEXTS = st.lists(
    st.text()
    | st.text(st.sampled_from("aet !'’0é 猫🙂\n<|>"))
    | st.sampled_from(["<|endoftext|>", "<|startoftext|> a", "</s>", "<pad> x", "a</s>b"])
    | st.sampled_from(["cat's!", "<extra_id_0> a", "ﬁne ½ Å"]),
    min_size=1,
    max_size=3,
)
ODD = ["a", "", "a cat! x", "\x850 a", "<|endoftext|> naïve café — 猫 🙂 </s> <extra_id_0> x"]
real = pytest.mark.skipif(not files.TOKENIZERS.is_dir(), reason="the official ones are not here")


@pytest.fixture(scope="module")
def tiny():
    """The folder of sd3-tiny's tokenizers."""
    return Checkpoint.open().tokenizers


def theirs_in(folder, name):
    """A tokenizer as transformers reads it."""
    return checkpoint.pretrained(name, folder / TOKENIZERS[name][0])


def ours_in(folder, name):
    """A tokenizer by its files, if it is one of those."""
    return tokens.FileTokenizer.of(folder / TOKENIZERS[name][0], TOKENIZERS[name][1])


def same_tokens(ours, theirs, texts, length):
    """Whether ids, their places and what is cut and padded are the same."""
    found, expected = (
        each(texts, return_offsets_mapping=True, verbose=False) for each in (ours, theirs)
    )
    assert found.input_ids == expected.input_ids
    places = [[tuple(place) for place in each] for each in expected.offset_mapping]
    assert [[tuple(place) for place in each] for each in found.offset_mapping] == places
    assert (len(ours), ours.pad_token_id) == (len(theirs), theirs.pad_token_id)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = text_encoders.token_ids(ours, texts, length, "it")
    assert len(caught) == any(len(row) > length for row in found.input_ids)
    padded = theirs(
        texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    assert torch.equal(rows, padded.input_ids)
    with warnings.catch_warnings(action="ignore"):
        zeros = text_encoders.token_ids(ours, texts, length, "it", zero_padding=True)
    assert torch.equal(zeros, padded.input_ids * padded.attention_mask)


@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_those_of_sd3_tiny_equal_transformers(name, tiny):
    ours, theirs = ours_in(tiny, name), theirs_in(tiny, name)

    @settings(max_examples=200, deadline=None)
    @given(TEXTS)
    def equal(texts):
        same_tokens(ours, theirs, texts, 7)

    equal()
    same_tokens(ours, theirs, ODD, 7)


@real
@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_official_ones_are_read_by_transformers(name):
    assert ours_in(files.TOKENIZERS, name) is None


@real
@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_official_ones_that_transformers_5_wrote_equal_it(name, tmp_path):
    there = tmp_path / TOKENIZERS[name][0]
    theirs_in(files.TOKENIZERS, name).save_pretrained(there)
    ours, theirs = ours_in(tmp_path, name), theirs_in(tmp_path, name)
    same_tokens(ours, theirs, ODD, 9)


@real
def test_one_of_another_class_is_read_by_transformers(tmp_path):
    """Its `tokenizer.json` takes U+0085 for an unknown token, and T5Tokenizer for a space."""
    there = tmp_path / TOKENIZERS["t5"][0]
    place = files.TOKENIZERS / TOKENIZERS["t5"][0]
    transformers.PreTrainedTokenizerFast.from_pretrained(place).save_pretrained(there)
    assert json.loads((there / "tokenizer_config.json").read_text())["backend"] == "tokenizers"
    assert ours_in(tmp_path, "t5") is None


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pad_token": "!"},  # of a CLIP-L, where it is none of the special tokens
        {"pad_token": None},
        {"pad_token": "<none>"},
        {"eos_token": "a</w>"},
        {"backend": None},
        {"tokenizer_class": "T5Tokenizer"},
        {"extra_special_tokens": ["cat"]},
        None,
    ],
)
def test_what_the_config_says_counts_as_in_transformers(changes, tiny, tmp_path):
    there = tmp_path / "tokenizer"
    shutil.copytree(tiny / "tokenizer", there)
    config = there / "tokenizer_config.json"
    said = json.loads(config.read_text()) | (changes or {})
    config.write_text(json.dumps({name: value for name, value in said.items() if value}))
    if changes is None:
        config.unlink()
    opened = dataclasses.replace(Checkpoint.open(), tokenizers=tmp_path)
    try:
        theirs = opened.load_tokenizer("clip_l")
    except sd3min.Refusal:
        with pytest.raises(sd3min.Refusal, match="is not CLIP-L's tokenizer of"):
            tokens.load_tokenizer(opened, "clip_l")
        return
    ours = tokens.load_tokenizer(opened, "clip_l")
    assert isinstance(ours, tokens.FileTokenizer) == (changes == {})
    assert ours.pad_token_id == theirs.pad_token_id
    assert ours(ODD).input_ids == theirs(ODD).input_ids


@pytest.mark.parametrize("damage", ["no JSON", "[]", "3"])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "tokenizer.json"])
def test_a_damaged_one_is_refused(file, damage, tiny, tmp_path):
    shutil.copytree(tiny / "tokenizer", tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / file).write_text(damage)
    opened = dataclasses.replace(Checkpoint.open(), tokenizers=tmp_path)
    with pytest.raises(sd3min.Refusal, match="is not CLIP-L's tokenizer of"):
        tokens.load_tokenizer(opened, "clip_l")


def test_one_that_cuts_and_pads_by_itself_does_neither(tiny, tmp_path):
    shutil.copytree(tiny / "tokenizer", tmp_path / "tokenizer")
    place = tmp_path / "tokenizer" / "tokenizer.json"
    rules = json.loads(place.read_text())
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None}
    pad |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
    rules |= {"truncation": cut, "padding": pad}
    place.write_text(json.dumps(rules))
    texts = ["a", "a red circle on white, above a blue square and a cat"]
    found, plain = (ours_in(top, "clip_l")(texts) for top in (tmp_path, tiny))
    assert found == plain
    assert len(plain.input_ids[0]) < 4 and len(plain.input_ids[1]) > 9


def test_one_text_alone_is_no_list_of_letters(tiny):
    with pytest.raises(TypeError, match="a list of texts"):
        ours_in(tiny, "clip_l")("a cat")

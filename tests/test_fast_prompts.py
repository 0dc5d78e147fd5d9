"""Prompts' embeddings on disk are the encoders' own, bit for bit."""

import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sd3min
from sd3min.checkpoint import Checkpoint
from sd3min.config import Refusal
from sd3min.conventions import COMFYUI, DIFFUSERS
from sd3min.fast.encoders import without_transformers
from sd3min.fast.prompts import CachedEncoders, encoders_key, read

SHORT, OTHER = "a red circle on white", "an orange heart!"
LONG = "a red circle above a blue square on gray left of an orange heart below a pink star " * 2


@pytest.fixture(scope="module")
def opened():
    return Checkpoint.open()


@pytest.fixture(scope="module")
def encoders(opened):
    return opened.load_text_encoders(torch.float32, torch.device("cpu"))


@pytest.fixture
def loads():
    return []


@pytest.fixture
def make(opened, encoders, tmp_path, loads):
    """Makes a cache in the test's folder, as if in another process: `loads` counts for all."""

    def made(key="a", t5=True, encoders=encoders):
        def load():
            loads.append(encoders)
            return encoders

        return CachedEncoders(load, tmp_path / "cache", key, t5, 24, 24)

    return made


def alone(encoders, prompts, *args):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = [encoders.encode([prompt], *args) for prompt in prompts]
    return [torch.cat(part) for part in zip(*made, strict=True)]


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def told(cache, prompts, *args):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cache.encode(prompts, *args)
    return [str(warning.message) for warning in caught]


def test_the_second_run_loads_nothing_and_gives_the_same_bits(make, encoders, loads):
    expected = alone(encoders, [SHORT, "", OTHER])
    assert_same(make().encode([SHORT, "", OTHER]), expected)
    assert len(loads) == 1
    assert_same(make().encode([SHORT, "", OTHER]), expected)
    assert len(loads) == 1


def test_bits_do_not_depend_on_the_batch_and_only_what_is_missing_is_encoded(
    make, encoders, loads, monkeypatch
):
    make().encode([SHORT])
    seen, encode = [], encoders.encode
    monkeypatch.setattr(
        encoders, "encode", lambda prompts, *args: (seen.append(prompts), encode(prompts, *args))[1]
    )
    found = make().encode([OTHER, SHORT, "", OTHER])
    assert seen == [[OTHER], [""]]
    monkeypatch.undo()
    assert_same(found, alone(encoders, [OTHER, SHORT, "", OTHER]))


def test_bfloat16_comes_back_as_it_was(make, opened, loads):
    short = opened.load_text_encoders(torch.bfloat16, torch.device("cpu"))
    for _ in range(2):
        assert_same(make(encoders=short).encode([SHORT]), alone(short, [SHORT]))
    assert len(loads) == 1


@pytest.mark.parametrize(
    "call",
    [
        (OTHER,),
        (SHORT, 20),
        (SHORT, None, "zeros", replace(DIFFUSERS, clip_g_exclamation="word")),
        (SHORT, None, "zeros", replace(DIFFUSERS, t5_characters=5)),
        (SHORT, None, "zeros", replace(DIFFUSERS, t5_grows=True)),
    ],
)
def test_what_decides_the_embedding_is_told_apart(make, encoders, loads, call):
    make().encode([SHORT])
    for count in (2, 2):
        found = make().encode([call[0]], *call[1:])
        assert_same(found, alone(encoders, [call[0]], *call[1:]))
        assert len(loads) == count


def test_other_encoders_are_told_apart_by_their_key(make, opened, loads):
    make().encode([SHORT])
    short = opened.load_text_encoders(torch.bfloat16, torch.device("cpu"))
    assert_same(make("b", encoders=short).encode([SHORT]), alone(short, [SHORT]))
    assert len(loads) == 2


def test_what_does_not_decide_it_is_not(make, loads):
    make().encode([SHORT])
    make().encode([SHORT], 24, "omit", replace(DIFFUSERS, name="mine", steps=3))
    assert len(loads) == 1


def test_without_t5_what_stands_for_it_counts(make, opened, loads):
    bare = opened.load_text_encoders(torch.float32, torch.device("cpu"), t5=False)
    make().encode([SHORT])
    for without in ("zeros", "paper", "omit") * 2:
        found = make(t5=False, encoders=bare).encode([SHORT], 20, without)
        assert_same(found, alone(bare, [SHORT], 20, without))
    assert len(loads) == 1 + 3


def test_where_t5_grows_the_rows_are_those_of_the_batch(make, encoders, loads):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = encoders.encode([SHORT, LONG], None, "zeros", COMFYUI)
        for _ in range(2):
            found = make().encode([SHORT, LONG], None, "zeros", COMFYUI)
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
            assert len(loads) == 1
    assert found.context.shape[1] > 24 + 24


def test_a_cut_prompt_warns_from_the_cache_as_it_did(make, encoders, loads):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        encoders.encode([LONG])
    expected = [str(warning.message) for warning in caught]
    assert len(expected) == 3
    assert told(make(), [LONG, SHORT]) == expected
    assert told(make(), [LONG, SHORT]) == expected
    assert told(make(), [SHORT]) == []
    assert len(loads) == 1


@pytest.mark.parametrize("damage", ["cut short", "empty", "one bit", "other file"])
def test_a_damaged_file_is_ignored_and_written_again(make, encoders, loads, tmp_path, damage):
    make().encode([SHORT])
    (path,) = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()
    flipped = whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:]
    damaged = {"cut short": whole[:-7], "empty": b"", "one bit": flipped, "other file": b"x" * 99}
    path.write_bytes(damaged[damage])
    assert read(path) is None
    assert_same(make().encode([SHORT]), alone(encoders, [SHORT]))
    assert path.read_bytes() == whole and len(loads) == 2
    assert [path] == list((tmp_path / "cache").iterdir())


def test_a_folder_that_takes_nothing_costs_a_warning_and_no_picture(make, encoders, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.warns(UserWarning, match="cannot be written"):
        found = make().encode([SHORT])
    assert_same(found, alone(encoders, [SHORT]))


def test_the_key_is_that_of_files_tokenizers_and_type(opened, tmp_path):
    def key(dtype=torch.float32, t5=True, device="cpu"):
        return encoders_key(Checkpoint.open(tmp_path / "copy"), dtype, t5, device)

    shutil.copytree(opened.path.parent, tmp_path / "copy")
    keys = [key(), key(torch.bfloat16), key(t5=False), key(t5="int8"), key(device="cuda")]
    assert len(set(keys)) == 5
    assert key() == keys[0] == encoders_key(opened, torch.float32)
    vocabulary = next((tmp_path / "copy" / "tokenizer_2").glob("*.json"))
    original = vocabulary.read_text()
    vocabulary.write_text(original + "\n")
    assert key() != keys[0]
    vocabulary.write_text(original)
    with open(tmp_path / "copy" / "sd3-tiny.safetensors", "r+b") as file:
        file.seek(1 << 19)
        byte = file.read(1)[0]
        file.seek(1 << 19)
        file.write(bytes([byte ^ 1]))
    assert key() != keys[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoders_of_a_plan_and_plain_ones_share_no_entries(opened, dtype):
    """Which differ in their last bits."""
    plan = without_transformers(opened)
    assert encoders_key(plan, dtype) != encoders_key(opened, dtype)
    assert encoders_key(plan, dtype) == encoders_key(without_transformers(plan), dtype)


def test_a_cache_of_opened_files_is_theirs(opened, encoders, tmp_path):
    cache = CachedEncoders.of(opened, tmp_path, torch.float32)
    assert cache.has_t5
    assert_same(cache.encode([SHORT]), alone(encoders, [SHORT]))


def test_tokenizers_that_are_not_there_are_refused_with_a_cache_too(opened, tmp_path):
    with pytest.raises(Refusal, match=r"is not CLIP-L's tokenizer of .* name the folder"):
        sd3min.load(opened.path, tokenizers=tmp_path, memory="resident", cache=tmp_path / "cache")


def test_damaged_encoders_are_told_of_when_they_are_needed(opened, tmp_path):
    """All of them in one sentence, before anything is loaded; a prompt in the cache needs none."""
    call = {"steps": 1, "seed": 0, "progress": False}
    given = {"memory": "resident", "cache": tmp_path / "cache", "dtype": "float32"}
    tensors = load_file(opened.path)
    for part in ("clip_l", "t5xxl"):
        name = next(n for n in tensors if part in n and "layer_norm" in n)
        tensors[name] = tensors[name][:-1].clone()
    with safe_open(opened.path, "pt") as file:
        metadata = file.metadata()
    shutil.copytree(opened.path.parent, tmp_path / "copy")
    save_file(tensors, tmp_path / "copy" / opened.path.name, metadata)
    with pytest.raises(Refusal, match=r"CLIP-L.*T5"):
        sd3min.load(tmp_path / "copy", memory="resident")
    pipe = sd3min.load(tmp_path / "copy", **given)
    with pytest.raises(Refusal, match=r"CLIP-L.*T5"):
        pipe(SHORT, **call)
    assert not pipe.stages.held
    pipe.text_encoders.key = "as if they were whole"
    whole = sd3min.load(opened.path, **given)
    whole.text_encoders.key = pipe.text_encoders.key
    assert whole(SHORT, **call)[0].tobytes() == pipe(SHORT, **call)[0].tobytes()

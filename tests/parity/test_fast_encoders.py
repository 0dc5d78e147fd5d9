"""The encoders of the plans of memory equal transformers', and so do their tokenizers."""

import dataclasses
import json
import shutil

import files
import pytest
import small
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.models.t5.modeling_t5 import T5Attention, T5LayerNorm

import sd3min
from sd3min import text_encoders
from sd3min.checkpoint import TOKENIZERS, Checkpoint
from sd3min.config import CLIPConfig, T5Config
from sd3min.fast import encoders
from sd3min.fast.stream import streamed_encoder
from sd3min.fast.t5 import load_t5

CPU = torch.device("cpu")
NONE = '{"backend": "tokenizers", "pad_token": "<none>"}'
CLIP = CLIPConfig(layers=3, width=128, mlp_width=200, vocabulary=99, length=13)
T5 = T5Config(layers=3, width=192, mlp_width=256, heads=4, vocabulary=99)
TEXTS = st.lists(
    st.text()
    | st.text(st.sampled_from("aet !'’0é 猫🙂\n<|>"))
    | st.sampled_from(
        ["<|endoftext|>", "<|startoftext|> a", "</s>", "<pad> x", "a</s>b", "cat's!"]
    ),
    min_size=1,
    max_size=3,
)


class Exact(nn.Module):
    """T5's norm in float64; transformers' takes the variance in float32."""

    def __init__(self, norm):
        super().__init__()
        self.weight = norm.weight

    def forward(self, x):
        return self.weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def ids(config, rows=3, length=13):
    return torch.randint(0, config.vocabulary, (rows, length), generator=torch.manual_seed(5))


def twins(theirs, ours):
    """Both with the same random weights in float64."""
    theirs, ours = small.randomise(theirs, 3).double().eval(), ours.double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


@pytest.mark.parametrize("part", ["clip_l", "clip_g"])
def test_a_clip_equals_transformers_in_float64(part):
    theirs, ours = twins(text_encoders.clip(CLIP, part), encoders.CLIP(CLIP, part))
    asked = ids(CLIP)
    with torch.no_grad():
        expected, found = theirs(asked, output_hidden_states=True), ours(asked)
    for place in (-1, -2):
        right = expected.hidden_states[place]
        torch.testing.assert_close(found.hidden_states[place], right, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.text_embeds, expected.text_embeds, rtol=1e-12, atol=1e-12)


def test_a_clip_pools_where_the_largest_id_stands_first():
    theirs, ours = twins(text_encoders.clip(CLIP, "clip_l"), encoders.CLIP(CLIP, "clip_l"))
    asked = torch.tensor([[1, 98, 3, 98, 4], [98, 2, 3, 4, 5], [1, 2, 3, 4, 98]])
    with torch.no_grad():
        pooled = ours(asked).text_embeds
        torch.testing.assert_close(pooled, theirs(asked).text_embeds, rtol=1e-12, atol=1e-12)
        alone = torch.cat([ours(asked[:1, :2]).text_embeds, ours(asked[1:2, :1]).text_embeds])
    torch.testing.assert_close(pooled[:2], alone, rtol=1e-9, atol=1e-9)


def test_t5_equals_transformers_in_float64():
    theirs, ours = twins(text_encoders.t5(T5), encoders.T5(T5))
    norms = [name for name, module in theirs.named_modules() if isinstance(module, T5LayerNorm)]
    assert len(norms) == 2 * T5.layers + 1
    for name in norms:
        theirs.set_submodule(name, Exact(theirs.get_submodule(name)))
    asked = ids(T5, length=301)  # farther apart than distances are told
    with torch.no_grad():
        expected, found = theirs(asked).last_hidden_state, ours(asked).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("buckets", [8, 32])
def test_distances_fall_into_t5s_buckets(buckets):
    distances = torch.arange(-600, 601)[None]
    expected = T5Attention._relative_position_bucket(distances, True, buckets, encoders.FARTHEST)
    assert torch.equal(encoders.distance_buckets(distances, buckets), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_parts_of_a_file_equal_transformers_in_every_type(name, dtype, whole):
    part = Checkpoint.open(whole).parts[name]
    quick = dataclasses.replace(part, make=encoders.MODULES[name])
    asked, rows = ids(part.config, length=16), {}
    makes = {
        "exact": lambda: part.load(torch.float64, CPU),
        "theirs": lambda: part.load(dtype, CPU),
        "ours": lambda: quick.load(dtype, CPU),
        "streamed": lambda: streamed_encoder(quick, dtype, CPU),
    }
    for kind, make in makes.items():
        module = make()
        assert module.device == CPU
        with torch.no_grad():
            made = module(asked) if name == "t5" else module(asked, output_hidden_states=True)
        rows[kind] = made.last_hidden_state if name == "t5" else made.hidden_states[-2]
    apart = {kind: (x.double() - rows["exact"]).norm().item() for kind, x in rows.items()}
    assert rows["ours"].dtype == rows["theirs"].dtype
    assert apart["ours"] <= 1.1 * apart["theirs"]  # as near to what is exact
    assert torch.equal(rows["streamed"], rows["ours"])


@pytest.mark.parametrize("kind", ["int8", "bnb", "fp8"])
def test_t5_in_eight_bits_is_that_of_transformers_modules(kind, whole, tmp_path):
    if kind == "bnb":
        pytest.importorskip("bitsandbytes")
    opened = Checkpoint.open(whole)
    if kind == "fp8":
        opened = Checkpoint.open(in_fp8(opened, tmp_path / "fp8.safetensors"))
    part = opened.parts["t5"]
    quick = dataclasses.replace(part, make=encoders.T5)
    asked = ids(part.config, length=16)
    with torch.no_grad():
        theirs, ours = (load_t5(each, torch.float32, CPU, kind)(asked) for each in (part, quick))
    expected, found = theirs.last_hidden_state, ours.last_hidden_state
    near = 1e-5 if kind == "fp8" else 5e-3  # where it rounds, a last bit more may be a level more
    assert (found - expected).norm() < near * expected.norm()


def in_fp8(opened, path):
    """A file of T5 alone whose linear layers are in fp8."""
    from safetensors.torch import save_file

    from sd3min.fast.t5 import LINEAR
    from sd3min.parts import PREFIXES

    part = opened.parts["t5"]
    tensors = {name: part.tensor(name, torch.float32, CPU) for name in part.tensors}
    eight = {n: t.to(torch.float8_e4m3fn) for n, t in tensors.items() if LINEAR.search(n)}
    save_file({PREFIXES["t5"] + n: t for n, t in (tensors | eight).items()}, path)
    return path


def read(folder, name):
    """A tokenizer twice: by its file, and by transformers."""
    there = folder / TOKENIZERS[name][0]
    kind = getattr(transformers, TOKENIZERS[name][1])
    return encoders.FileTokenizer(there), kind.from_pretrained(there)


def same_tokens(ours, theirs, texts, length):
    """Whether ids, their places and what is cut and padded are the same."""
    found, expected = ours(texts), theirs(texts, return_offsets_mapping=True, verbose=False)
    assert found.input_ids == expected.input_ids
    assert found["offset_mapping"] == [list(map(tuple, each)) for each in expected.offset_mapping]
    assert (len(ours), ours.pad_token_id) == (len(theirs), theirs.pad_token_id)
    with pytest.warns() if any(len(row) > length for row in found.input_ids) else nothing():
        rows = text_encoders.token_ids(ours, texts, length, "it")
    padded = theirs(
        texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    assert torch.equal(rows, padded.input_ids)


class nothing:
    """No warning is expected."""

    def __enter__(self): ...

    def __exit__(self, *_): ...


@pytest.fixture(scope="module")
def tiny():
    """The folder of sd3-tiny's tokenizers."""
    return Checkpoint.open().tokenizers


def equal_tokens(ours, theirs, length):
    """Whether they say the same of all texts."""

    @settings(max_examples=200, deadline=None)
    @given(TEXTS)
    def equal(texts):
        same_tokens(ours, theirs, texts, length)

    equal()


@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_tokenizers_of_sd3_tiny_equal_transformers(name, tiny):
    equal_tokens(*read(tiny, name), length=7)


@pytest.mark.skipif(not files.TOKENIZERS.is_dir(), reason="the official tokenizers are not here")
def test_official_tokenizers_are_read_by_transformers(bare):
    """T5's `tokenizer.json` takes U+0085 for an unknown token, and transformers for a space."""
    opened = dataclasses.replace(bare, tokenizers=files.TOKENIZERS)
    assert isinstance(encoders.load_tokenizer(opened, "clip_l"), transformers.CLIPTokenizer)
    theirs = encoders.load_tokenizer(opened, "t5")
    assert isinstance(theirs, transformers.T5Tokenizer)
    ours = encoders.FileTokenizer(files.TOKENIZERS / "tokenizer_3")
    assert ours(["\x850"]).input_ids != theirs(["\x850"]).input_ids


@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_tokenizers_of_sd3_tiny_are_read_by_their_files(name, tiny):
    opened = dataclasses.replace(Checkpoint.open(), tokenizers=tiny)
    assert isinstance(encoders.load_tokenizer(opened, name), encoders.FileTokenizer)


@pytest.fixture
def bare(tmp_path):
    """Official files of zeros."""
    if not files.manifests():
        pytest.skip("the official lists are not here")
    lists = files.manifests()
    clips = files.sparse(tmp_path / "a.safetensors", lists["sd3_medium_incl_clips.safetensors"])
    t5 = files.sparse(tmp_path / "b.safetensors", lists["text_encoders/t5xxl_fp16.safetensors"])
    return Checkpoint.open([clips, t5])


@pytest.mark.parametrize("damage", ['{"backend": "tokenizers"}', "no JSON", "[]", NONE])
def test_a_damaged_tokenizer_is_refused(damage, tiny, tmp_path):
    shutil.copytree(tiny / "tokenizer", tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(damage)
    opened = dataclasses.replace(Checkpoint.open(), tokenizers=tmp_path)
    with pytest.raises(sd3min.Refusal, match="is not CLIP-L's tokenizer of"):
        encoders.load_tokenizer(opened, "clip_l")


def test_a_tokenizer_that_cuts_and_pads_by_itself_does_neither(tiny, tmp_path):
    shutil.copytree(tiny / "tokenizer", tmp_path / "tokenizer")
    place = tmp_path / "tokenizer" / "tokenizer.json"
    rules = json.loads(place.read_text())
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None}
    pad |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
    rules |= {"truncation": cut, "padding": pad}
    place.write_text(json.dumps(rules))
    texts = ["a", "a red circle on white, above a blue square and a cat"]
    found, plain = (encoders.FileTokenizer(top / "tokenizer")(texts) for top in (tmp_path, tiny))
    assert found == plain
    assert len(plain.input_ids[0]) < 4 and len(plain.input_ids[1]) > 9

"""The encoders of the plans of memory equal transformers', and so do their tokenizers."""

import dataclasses

import pytest
import small
import torch
from torch import nn
from transformers.models.t5.modeling_t5 import T5Attention, T5LayerNorm

from sd3min import text_encoders
from sd3min.checkpoint import TOKENIZERS, Checkpoint
from sd3min.config import CLIPConfig, T5Config
from sd3min.fast import encoders
from sd3min.fast.stream import streamed_encoder
from sd3min.fast.t5 import load_t5

CPU = torch.device("cpu")
CLIP = CLIPConfig(layers=3, width=128, mlp_width=200, vocabulary=99, length=13)
T5 = T5Config(layers=3, width=192, mlp_width=256, heads=4, vocabulary=99)


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


@pytest.mark.parametrize("factor", [1.0, 3e4])
def test_t5_has_no_infinities_in_float16(factor):
    theirs, ours = text_encoders.t5(T5).eval(), encoders.T5(T5)
    small.randomise(theirs, 3)
    theirs.encoder.block[0].layer[0].SelfAttention.o.weight.data *= factor
    ours.load_state_dict(theirs.state_dict())
    for each in (theirs, ours):
        each.half()
        for block in each.encoder.block:
            (block.layer if each is theirs else block["layer"])[1].DenseReluDense.wo.float()
    with torch.no_grad():
        expected, found = (each(ids(T5)).last_hidden_state for each in (theirs, ours))
    assert expected.isfinite().all()
    assert (found - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("width", [0, 32, 96])
def test_a_clip_whose_heads_do_not_make_up_its_width_is_refused(width):
    with pytest.raises(ValueError, match="no multiple of 64"):
        encoders.CLIP(dataclasses.replace(CLIP, width=width), "clip_l")


@pytest.mark.parametrize("buckets", [8, 32])
def test_distances_fall_into_t5s_buckets(buckets):
    distances = torch.arange(-600, 601)[None]
    expected = T5Attention._relative_position_bucket(distances, True, buckets, encoders.FARTHEST)
    assert torch.equal(encoders.distance_buckets(distances, buckets), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_parts_of_a_file_equal_transformers_in_every_type(name, dtype, whole):
    part = Checkpoint.open(whole).parts[name]
    quick = dataclasses.replace(part, make=encoders.ENCODERS[name])
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
        whats = [made.last_hidden_state] if name == "t5" else [made.hidden_states[-2]]
        rows[kind] = whats if name == "t5" else [*whats, made.text_embeds]
    for exact, theirs, ours, streamed in zip(*rows.values(), strict=True):
        assert ours.dtype == theirs.dtype
        limit = 1.1 if ours.ndim == 3 else 1.5  # of few values
        assert (ours - exact).norm() <= limit * (theirs - exact).norm()  # as near to what is exact
        assert torch.equal(streamed, ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["int8", "bnb", "fp8"])
def test_t5_in_eight_bits_is_that_of_transformers_modules(kind, dtype, whole, tmp_path):
    if kind == "bnb":
        pytest.importorskip("bitsandbytes")
    opened = Checkpoint.open(whole)
    if kind == "fp8":
        opened = Checkpoint.open(in_fp8(opened, tmp_path / "fp8.safetensors"))
    part = opened.parts["t5"]
    quick = dataclasses.replace(part, make=encoders.T5)
    asked = ids(part.config, length=16)
    makes = {
        "exact": lambda: load_t5(part, torch.float32, CPU, "fp8" if kind == "fp8" else "int8"),
        "theirs": lambda: load_t5(part, dtype, CPU, kind),
        "ours": lambda: load_t5(quick, dtype, CPU, kind),
    }
    with torch.no_grad():
        rows = {name: make()(asked).last_hidden_state for name, make in makes.items()}
    apart = {name: (x.double() - rows["exact"]).norm().item() for name, x in rows.items()}
    assert rows["ours"].dtype == rows["theirs"].dtype
    if dtype == torch.float32:  # where it rounds, a last bit more may be a level more
        near = 1e-5 if kind == "fp8" else 5e-3
        assert (rows["ours"] - rows["theirs"]).norm() < near * rows["exact"].norm()
    else:
        assert apart["ours"] <= 1.1 * apart["theirs"]


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

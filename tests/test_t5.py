"""T5 in eight bits: what it says is near what it says in full, and nearer than the eight bits."""

import re

import pytest
import small
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import sd3min
from sd3min.checkpoint import Checkpoint
from sd3min.config import Refusal
from sd3min.fast import plan, t5
from sd3min.parts import PREFIXES

CPU = torch.device("cpu")
IDS = torch.tensor([[3, 6, 17, 42, 5, 1], [7, 7, 2, 1, 0, 0], [9, 30, 4, 5, 6, 1]])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    return small.save_official(small.pipeline(folder), folder / "whole.safetensors")


@pytest.fixture(scope="module")
def in_fp8(whole, tmp_path_factory):
    """The same file with a T5 in fp8, half of it scaled."""
    tensors = load_file(whole)
    for name in [n for n in tensors if n.startswith(PREFIXES["t5"])]:
        scaled = name.endswith((".wo.weight", ".q.weight"))
        scale = tensors[name].abs().max() / 448 if scaled else torch.tensor(1.0)
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        if scaled:
            tensors[name.removesuffix("weight") + "scale_weight"] = scale
    path = tmp_path_factory.mktemp("fp8") / "fp8.safetensors"
    save_file(tensors, path, {"sd3min.defaults": "{}"})
    return path


def part(path):
    return Checkpoint.open(path).parts["t5"]


def error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def test_int8_is_the_nearest_of_255_values_in_every_row():
    weight = torch.randn(5, 40, dtype=torch.float64) * torch.tensor([1e-6, 0.1, 1, 30, 0])[:, None]
    layer = t5.Int8Weight(weight)
    step = weight.abs().amax(1) / 127
    made = layer.weight * step[:, None]
    assert layer.weight.dtype == torch.int8
    assert ((made - weight).abs() <= step[:, None] / 2 * (1 + 1e-6)).all()
    x = torch.randn(3, 2, 40, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.linear(x, made), rtol=1e-6, atol=1e-12)


def test_int8_in_float16_does_not_overflow_where_float16_itself_does_not():
    weight = torch.full((1, 4096), 0.01, dtype=torch.float16)
    x = torch.full((1, 4096), 8.0, dtype=torch.float16)  # 127 · 8 · 4096 is above 65,504
    assert F.linear(x, weight).item() == pytest.approx(328, abs=1)
    assert t5.Int8Weight(weight)(x).item() == pytest.approx(328, abs=1)


def rounded(model, held):
    """A T5 in float64 whose linear layers hold the values that eight bits stand for."""
    model = model.double()
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            largest = layer.weight.abs().amax(1, keepdim=True)
            layer.weight.copy_(held.get_submodule(name).weight * largest / 127)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_says_what_its_weights_stand_for(dtype, whole):
    plain = part(whole).load(dtype, CPU)
    model = t5.load_t5(part(whole), dtype, CPU, "int8")
    assert (model.device, model.dtype) == (CPU, dtype)
    made, unrounded = (m(IDS).last_hidden_state for m in (model, plain))
    assert made.dtype == unrounded.dtype
    exact = part(whole).load(torch.float64, CPU)(IDS).last_hidden_state
    expected = rounded(part(whole).load(dtype, CPU), model)(IDS).last_hidden_state
    assert error(expected, exact) > 0.01  # int8 can be told from what it stands for
    assert error(made, expected) < 1e-5 + 1.5 * error(unrounded, exact)
    types = {tensor.dtype for n, tensor in model.state_dict().items() if t5.LINEAR.search(n)}
    assert types == {torch.int8}


def test_bitsandbytes_is_off_by_as_much(whole):
    pytest.importorskip("bitsandbytes")
    exact = part(whole).load(torch.float64, CPU)(IDS).last_hidden_state
    ours, theirs = (t5.load_t5(part(whole), torch.float32, CPU, kind) for kind in ("int8", "bnb"))
    off = error(ours(IDS).last_hidden_state, exact)
    assert off / 2 < error(theirs(IDS).last_hidden_state, exact) < 2 * off
    types = {tensor.dtype for n, tensor in theirs.named_parameters() if t5.LINEAR.search(n)}
    assert types == {torch.int8}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp8_stays_fp8_and_says_the_same_to_the_bit(dtype, in_fp8):
    plain = part(in_fp8).load(dtype, CPU)(IDS).last_hidden_state
    model = t5.load_t5(part(in_fp8), dtype, CPU, "fp8")
    torch.testing.assert_close(model(IDS).last_hidden_state, plain, rtol=0, atol=0)
    held = [layer for layer in model.modules() if isinstance(layer, t5.Fp8Linear)]
    assert len(held) == 14 and not [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert {layer.values.dtype for layer in held} == {torch.float8_e4m3fn}
    assert sum(layer.scale is not None for layer in held) == 4


def test_what_stays_fp8_is_mapped_with_a_scale_or_without(in_fp8):
    _, mapped = plan.held(part(in_fp8), torch.bfloat16, CPU, "fp8")
    stored = part(in_fp8).tensors
    assert mapped == sum(
        torch.Size(t.shape).numel() for n, t in stored.items() if t5.LINEAR.search(n)
    )


def test_no_tensor_of_the_working_type_is_left_but_norms_and_tables(whole):
    model = t5.load_t5(part(whole), torch.bfloat16, CPU, "int8")
    long = [n for n, p in model.named_parameters() if p.dim() > 1]
    assert all(re.search("shared|embed_tokens|relative_attention_bias", name) for name in long)


@pytest.mark.parametrize("memory", [None, "resident", "fast"])
def test_a_pipeline_takes_it(memory, whole):
    pipe = sd3min.load(whole, memory=memory, t5="int8")
    plain = sd3min.load(whole)
    one, other = (p.encode_prompt(["a red circle"]).context for p in (pipe, plain))
    length = plain.text_encoders.clip_l.config.max_position_embeddings
    torch.testing.assert_close(one[:, :length], other[:, :length], rtol=0, atol=0)
    assert error(one[:, length:], other[:, length:]) > 0.001
    pipe("a red circle", steps=1, progress=False)


def test_kinds_that_cannot_be_are_refused(whole, in_fp8, monkeypatch):
    def refused(words, **given):
        with pytest.raises(Refusal, match=words):
            sd3min.load(given.pop("path", whole), **given)

    refused("t5 int4 is not one of True, False, int8, fp8, bnb", t5="int4")
    refused("fp8 keeps what is stored in fp8, and the T5 in .* is in F32: pass", t5="fp8")
    refused("leave it out under memory stream", t5="int8", memory="stream")
    sd3min.load(in_fp8, tokenizers=whole.parent, t5="fp8")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(r"t5 bnb needs bitsandbytes: pip install sd3min\[quant\]", t5="bnb")

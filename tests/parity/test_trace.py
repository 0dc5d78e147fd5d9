"""Traces name every tensor alike on both sides, and the first that differs is the break."""

import linecache
import re

import oracle
import pytest
import small
import torch

from sd3min import mmdit as mmdit_module
from sd3min import probes
from sd3min.config import Refusal
from sd3min.mmdit import MMDiT
from sd3min.probes.trace import tensors_of

LARGE = small.VARIANTS["SD3.5-large"]
ROUNDED = 2e-7  # diffusers' q/k norm, tensor by tensor


def equal(a, b):
    """Whether two results are the same to the bit."""
    found = [tensors_of(side) for side in (a, b)]
    return found[0] and all(torch.equal(*pair) for pair in zip(*found, strict=True))


def inputs(model):
    """Our arguments and diffusers'."""
    latents, timesteps, context, pooled = given = oracle.inputs(model)
    return given, (latents, context, pooled, timesteps)


def traces(ours, theirs):
    given, their_given = inputs(ours)
    return probes.trace(ours, *given), probes.trace(theirs, *their_given)


def source(place):
    """The lines of code that a place names, innermost first."""
    found = re.findall(r"(sd3min/\S+\.py):(\d+) in", place)
    root = mmdit_module.__file__.rpartition("sd3min/")[0]
    return [linecache.getline(root + file, int(line)) for file, line in found]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def pair():
    ours = small.mmdit(LARGE).double()
    return ours, oracle.transformer(ours)


@pytest.mark.parametrize("variant", small.VARIANTS)
def test_a_trace_leaves_the_velocity_as_it_is_to_the_bit(variant):
    ours = small.mmdit(small.VARIANTS[variant]).double()
    theirs = oracle.transformer(ours)
    for model, given in zip((ours, theirs), inputs(ours), strict=True):
        traced = probes.trace(model, *given)
        assert equal(traced.output, model(*given))
        assert torch.equal(traced.tensors["output"], tensors_of(traced.output)[0])


def test_a_trace_leaves_pictures_latents_and_conditioning_as_they_are(tmp_path):
    pipe = small.pipeline(tmp_path)
    vae = oracle.vae(pipe.autoencoder)
    images = torch.rand(1, 3, 32, 48) * 2 - 1
    latents = pipe.autoencoder.encode(images)
    for call, given in (
        (pipe.autoencoder.encode, images),
        (pipe.autoencoder.decode, latents),
        (vae.decode, latents),
        (pipe.text_encoders.encode, ["a red circle", ""]),
    ):
        assert equal(probes.trace(call, given).output, call(given))


@pytest.mark.parametrize("variant", small.VARIANTS)
def test_every_tensor_of_the_mmdit_has_one_name_and_agrees(variant):
    ours = small.mmdit(small.VARIANTS[variant]).double()
    a, b = traces(ours, oracle.transformer(ours))
    last = f"joint_blocks.{ours.config.depth - 1}.out.context"
    assert set(a.tensors) - set(b.tensors) == {last}, "diffusers drops it, and nothing else"
    assert set(b.tensors) <= set(a.tensors)
    weights = {name.rpartition(".")[0] for name, _ in ours.named_parameters()}
    assert {name.removesuffix(".out") for name in a.tensors} >= weights
    tolerance = ROUNDED if ours.config.qk_norm else oracle.RUNG_1
    assert probes.first_difference(a, b, tolerance) is None
    assert probes.first_difference(b, a, tolerance) is None


def test_every_tensor_of_the_autoencoder_has_one_name_and_agrees():
    ours = small.autoencoder().double()
    vae, images = oracle.vae(ours), torch.rand(2, 3, 48, 80).double()
    latents = torch.randn(2, 16, 6, 10).double()
    unscaled = latents / vae.config.scaling_factor + vae.config.shift_factor
    encoded = probes.trace(ours.encode, images), probes.trace(vae.encode, images)
    decoded = probes.trace(ours.decode, latents), probes.trace(vae.decode, unscaled)
    for a, b in (encoded, decoded):
        assert set(a.tensors) - {"output"} == set(b.tensors) - {"output"}
        assert probes.first_difference(a, b, oracle.RUNG_1) is None
    assert "output" in decoded[1].tensors


def swap_halves(linear):
    for tensor in (linear.weight, linear.bias):
        tensor.copy_(torch.cat(tensor.chunk(2)[::-1]))


def swap_shift_and_scale(linear):
    for tensor in (linear.weight, linear.bias):
        shift, scale, *rest = tensor.clone().chunk(6)
        tensor.copy_(torch.cat([scale, shift, *rest]))


def swap(first, second):
    kept = first.weight.clone()
    first.weight.copy_(second.weight)
    second.weight.copy_(kept)


BREAKS = {  # in diffusers' copy, and the tensor where it shows first
    "shift and scale of a block": (
        lambda model: swap_shift_and_scale(model.transformer_blocks[1].norm1.linear),
        "joint_blocks.1.x_block.adaLN_modulation.1.out",
    ),
    "halves of the last context block": (
        lambda model: swap_halves(model.transformer_blocks[2].norm1_context.linear),
        "joint_blocks.2.context_block.adaLN_modulation.1.out",
    ),
    "halves of the final layer": (
        lambda model: swap_halves(model.norm_out.linear),
        "final_layer.adaLN_modulation.1.out",
    ),
    "rows of the MLP": (
        lambda model: swap_halves(model.transformer_blocks[0].ff.net[0].proj),
        "joint_blocks.0.x_block.mlp.fc1.out",
    ),
    "queries and keys": (
        lambda model: swap(
            model.transformer_blocks[1].attn.to_q, model.transformer_blocks[1].attn.to_k
        ),
        "joint_blocks.1.x_block.attn.qkv.out",
    ),
    "keys and values of the text": (
        lambda model: swap(
            model.transformer_blocks[2].attn.add_k_proj, model.transformer_blocks[2].attn.add_v_proj
        ),
        "joint_blocks.2.context_block.attn.qkv.out",
    ),
    "the norms of queries and keys": (
        lambda model: swap(
            model.transformer_blocks[1].attn.norm_added_q,
            model.transformer_blocks[1].attn.norm_added_k,
        ),
        "joint_blocks.1.context_block.attn.ln_q.out",
    ),
    "rows and columns of the positions": (
        lambda model: model.pos_embed.pos_embed.copy_(
            model.pos_embed.pos_embed.clone().roll(LARGE.width // 2, -1)
        ),
        "joint_blocks.0.in.image",
    ),
    "time and text": (
        lambda model: swap(
            model.time_text_embed.timestep_embedder.linear_2,
            model.time_text_embed.text_embedder.linear_2,
        ),
        "t_embedder.mlp.2.out",
    ),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_two_things_swapped_in_diffusers_copy_are_found(pair, broken):
    ours, theirs = pair
    break_it, name = BREAKS[broken]
    assert probes.first_difference(*traces(ours, theirs), ROUNDED) is None
    break_it(theirs)
    found = probes.first_difference(*traces(ours, theirs), ROUNDED)
    assert found.name == name
    assert found.error > 1e-3
    assert found.place.startswith("sd3min/mmdit.py:")
    backwards = probes.first_difference(*reversed(traces(ours, theirs)), ROUNDED)
    assert backwards.place.startswith("sd3min/mmdit.py:")


def without_one(tokens, shift, scale):
    return torch.nn.functional.layer_norm(tokens, tokens.shape[-1:], eps=1e-6) * scale + shift


def unscaled(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0)


def test_a_wrong_modulation_here_is_found_on_the_line_that_asks_for_it(pair, monkeypatch):
    ours, theirs = pair
    monkeypatch.setattr(mmdit_module, "modulate", without_one)
    found = probes.first_difference(*traces(ours, theirs), ROUNDED)
    assert found.name == "joint_blocks.0.context_block.attn.qkv.in"
    assert found.place.endswith("in Stream.open")
    assert "self.qkv(tokens)" in source(found.place)[0]
    assert "modulate(tokens, shift, scale)" in source(found.place)[1]


def test_a_wrong_attention_here_is_found_in_the_block_that_attends(pair, monkeypatch):
    ours, theirs = pair

    class Attending:
        scaled_dot_product_attention = staticmethod(unscaled)
        layer_norm = staticmethod(torch.nn.functional.layer_norm)

    monkeypatch.setattr(mmdit_module, "F", Attending)
    found = probes.first_difference(*traces(ours, theirs), ROUNDED)
    assert found.name == "joint_blocks.0.context_block.attn.proj.in"
    assert found.place.endswith("in JointBlock.forward")
    assert "attn.proj(attended)" in source(found.place)[0]
    assert "context_block.close(" in source(found.place)[1]


def test_a_corner_crop_of_the_positions_here_is_found_before_the_first_block(pair, monkeypatch):
    ours, theirs = pair
    monkeypatch.setattr(
        MMDiT,
        "positions",
        lambda self, h, w: self.pos_embed.unflatten(1, (self.config.grid, -1))[:, :h, :w].flatten(
            1, 2
        ),
    )
    found = probes.first_difference(*traces(ours, theirs), ROUNDED)
    assert found.name == "joint_blocks.0.in.image"
    assert found.place.endswith("in MMDiT.forward")
    assert "block(context, image, cond)" in source(found.place)[0]


def test_a_break_in_the_autoencoder_is_found():
    ours = small.autoencoder().double()
    vae, images = oracle.vae(ours), torch.rand(1, 3, 32, 48).double()
    attention = vae.encoder.mid_block.attentions[0]
    swap(attention.to_q, attention.to_v)
    vae.encoder.conv_out.bias += 1
    found = probes.first_difference(
        probes.trace(ours.encode, images), probes.trace(vae.encode, images), oracle.RUNG_1
    )
    assert found.name == "encoder.mid.attn_1.q.out"
    assert "in SelfAttention.forward" in found.place


def test_a_break_in_a_text_encoder_is_found(tmp_path):
    encoders = small.encoders(small.tokenizers(tmp_path))
    whole = probes.trace(encoders.encode, ["a red circle"])
    encoders.t5.encoder.block[1].layer[1].DenseReluDense.wi_0.weight.data *= 1.01
    found = probes.first_difference(probes.trace(encoders.encode, ["a red circle"]), whole)
    assert found.name == "t5.encoder.block.1.layer.1.DenseReluDense.wi_0.out"
    assert "in TextEncoders.t5_rows" in found.place


def test_a_module_that_runs_twice_has_two_tensors(pair):
    ours, _ = pair
    (latents, timesteps, context, pooled), _ = inputs(ours)

    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mmdit = ours

        def forward(self, *given):
            return ours(ours(*given), *given[1:])

    tensors = probes.trace(Twice(), latents, timesteps, context, pooled).tensors
    first, second = tensors["mmdit.x_embedder.proj.in"], tensors["mmdit.x_embedder.proj.in (2)"]
    assert torch.equal(first, latents)
    assert torch.equal(second, ours(latents, timesteps, context, pooled))


def test_what_is_no_number_or_of_another_shape_is_a_difference():
    wrong = torch.tensor([1.0, float("nan")])
    a, b = probes.Trace({"x": torch.ones(2)}, {"x": ""}), probes.Trace({"x": wrong}, {"x": ""})
    for pair in ((a, b), (b, a), (b, b)):
        assert probes.first_difference(*pair).error == float("inf")
    longer = probes.Trace({"x": torch.ones(3)}, {"x": ""})
    assert probes.first_difference(a, longer).error == float("inf")
    assert probes.first_difference(a, a) is None


def test_a_trace_of_no_network_and_two_with_nothing_in_common_are_refused(pair):
    with pytest.raises(Refusal, match="is no network: pass one"):
        probes.trace(print, "hello")
    empty = probes.Trace()
    with pytest.raises(Refusal, match="have no tensor in common"):
        probes.first_difference(empty, traces(*pair)[0])


def test_a_call_that_fails_leaves_no_hooks(pair):
    ours, _ = pair
    given, _ = inputs(ours)
    with pytest.raises(RuntimeError, match="channels"):
        probes.trace(ours, given[0][:, :3], *given[1:])
    hooks = [m for m in ours.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []

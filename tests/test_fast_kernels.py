"""The loops in C compute what the lines of PyTorch beside them do."""

import ctypes
import warnings

import pytest
import torch
from torch import nn

from sd3min.fast import kernels, native
from sd3min.fast.linear import Int8Linear, packed
from sd3min.fast.native import library as compiled

WITHOUT_TILES = (*native.FLAGS, "-mno-amx-tile", "-mno-amx-bf16", "-mno-amx-int8")
B = torch.bfloat16


def library(flags=native.FLAGS) -> ctypes.CDLL | None:
    try:
        return native.loaded(native.compiled(flags))
    except Exception:
        return None


needs_library = pytest.mark.skipif(library() is None, reason="needs a C compiler and AVX512-BF16")


@pytest.fixture(params=["AMX if there is", "AVX512"])
def _library(request, monkeypatch):
    flags = native.FLAGS if request.param == "AMX if there is" else WITHOUT_TILES
    monkeypatch.setattr(native, "library", lambda: library(flags))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(B)


def error(a: torch.Tensor, exact: torch.Tensor) -> float:
    return ((a.double() - exact).norm() / exact.norm()).item()


def compare(function, *tensors, limit: float = 1.05) -> None:
    """In C, the error against float64 is at most 1.05 times that of PyTorch in bfloat16."""
    exact = function(*(t.double() if isinstance(t, torch.Tensor) else t for t in tensors))
    in_c = function(*(t.clone() if isinstance(t, torch.Tensor) else t for t in tensors))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "serves", lambda tensor: False)
        in_torch = function(*(t.clone() if isinstance(t, torch.Tensor) else t for t in tensors))
    for a, b, right in zip(*map(listed, (in_c, in_torch, exact)), strict=True):
        assert a.dtype == B
        assert error(a, right) <= limit * error(b, right)
        assert (a.double() - right).abs().max() <= 2 * (b.double() - right).abs().max()


def listed(result):
    return [result] if isinstance(result, torch.Tensor) else result


@needs_library
@pytest.mark.usefixtures("_library")
class TestLoops:
    def test_modulate_with_parts_of_a_larger_row(self):
        parts = random(3, 6, 192, seed=1)
        tokens = 3 * random(3, 37, 192) + 1
        compare(lambda x, p: kernels.modulate(x, p[:, 4], p[:, 1]), tokens, parts)

    def test_norms_of_tiny_values_are_held_by_epsilon(self):
        tokens, norm = random(2, 5, 64) / 1000, nn.RMSNorm(64, eps=1e-6).to(B)
        compare(kernels.modulate, tokens, random(2, 64), random(2, 64))
        qkv = random(2, 5, 192) / 1000
        compare(lambda x: kernels.normalise_heads(x, norm.to(x.dtype), norm.to(x.dtype)), qkv)

    def test_modulate_of_a_large_mean(self):
        compare(kernels.modulate, random(2, 5, 64) + 40, random(2, 64), random(2, 64))

    def test_add_gated(self):
        parts = random(3, 6, 128, seed=1)
        tokens, update = random(3, 11, 128), random(3, 11, 128, seed=2)
        compare(lambda x, p, u: kernels.add_gated_(x, p[:, 2], u), tokens, parts, update)

    def test_add_gated_writes_over_the_tokens(self):
        tokens = random(2, 3, 64)
        assert kernels.add_gated_(tokens, random(2, 64), tokens.clone()).data_ptr() == (
            tokens.data_ptr()
        )

    def test_gelu_far_out(self):
        compare(kernels.gelu_, 4 * random(3, 7, 96))
        ends = torch.tensor([-1e38, -90.0, -12.0, -0.0, 0.0, 12.0, 90.0, 1e38] * 2, dtype=B)
        expected = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 12.0, 90.0, 1e38] * 2, dtype=B)
        assert torch.equal(kernels.gelu_(ends).abs(), expected)

    def test_activation_of_channels(self):
        x = 3 * random(2, 48, 5, 7).to(memory_format=torch.channels_last)
        scale, shift = random(48, seed=1).float(), random(48, seed=2).float()
        exact = torch.nn.functional.silu(
            x.double() * scale[:, None, None].double() + shift[:, None, None].double()
        )
        made = kernels.activate(x, scale, shift)
        assert made.dtype == B and error(made, exact) < 2**-8
        assert (made.double() - exact).abs().max() <= 2**-8 * exact.abs().max()

    def test_norms_of_heads(self):
        ln_q, ln_k = nn.RMSNorm(64, eps=1e-6), nn.RMSNorm(64, eps=1e-6)
        weights = random(64, seed=3) + 1, random(64, seed=4)

        def normalise(qkv, q, k):
            ln_q.weight.data, ln_k.weight.data = q, k
            return kernels.normalise_heads(qkv, ln_q, ln_k)

        compare(normalise, random(3, 5, 3 * 128), *weights)

    @pytest.mark.parametrize("repeats", [1, 9])
    @pytest.mark.parametrize(
        ("batch", "text", "patches", "heads"),
        [(3, 7, 12, 2), (1, 1, 1, 1), (2, 0, 255, 1), (1, 33, 480, 3), (2, 256, 257, 2)],
    )
    def test_attention_of_odd_lengths(self, batch, text, patches, heads, repeats):
        context, image = (random(batch, rows, 192 * heads, seed=rows) for rows in (text, patches))

        def joint(context, image):
            made = kernels.joint_attention(context, image, repeats)
            return [part for part in made if part.numel()]

        compare(joint, context, image)

    def test_attention_to_one_key_alone(self):
        qkv = random(1, 300, 192)
        qkv[:, 41, 64:128] *= 60  # scores in the thousands
        compare(kernels.attention, qkv)

    def test_attention_counts_the_last_row_as_often_as_it_stood_there(self):
        context, image = random(2, 9, 384), random(2, 50, 384, seed=1)
        context[:, 4:] = context[:, 4:5]
        whole = kernels.joint_attention(context.double(), image.double())
        merged = kernels.joint_attention(context[:, :5].contiguous(), image, repeats=5)
        assert error(merged[0], whole[0][:, :5]) < 2**-8
        assert error(merged[1], whole[1]) < 2**-8

    def test_rows_of_8_bits_equal_pytorchs(self):
        x = random(3, 5, 192) * torch.logspace(-6, 6, 15).reshape(3, 5, 1).to(B)
        x[1, 2] = 0
        whole, scales = kernels.quantise(x)
        expected, right = kernels.quantise(x.float())
        assert (whole.int() - expected.int()).abs().max() <= 1  # a sum in another order
        assert (whole != expected).float().mean() < 1e-2
        torch.testing.assert_close(scales, right, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("place", [0, 70, 191])
    def test_a_row_with_no_number_stays_none(self, place):
        x = random(2, 192)
        x[1, place] = torch.nan
        _, scales = kernels.quantise(x)
        assert scales[0].isfinite() and scales[1].isnan()

    @pytest.mark.parametrize("count", [1, 15, 16, 1000003])
    def test_float16_becomes_bfloat16_as_pytorch_rounds(self, count):
        halves = torch.randn(count).half() * 1000
        ends = torch.tensor([6e-8, -6e-8, 65504.0, torch.inf, -torch.inf, -0.0]).half()
        halves[: len(ends)] = ends[:count]
        place = torch.empty(count, dtype=B)
        kernels.put_(place, halves)
        assert torch.equal(place, halves.to(B))

    @pytest.mark.parametrize("stored", [B, torch.float16])
    @pytest.mark.parametrize(
        ("rows", "inputs", "heights"),
        [(1, 32, (32,)), (37, 192, (64, 32, 64)), (96, 64, (8192,)), (33, 6144, (160,))],
    )
    def test_linear_layers_of_stored_weights(self, stored, rows, inputs, heights):
        pieces = [random(n, inputs, seed=i).to(stored) for i, n in enumerate(heights)]
        x, bias = random(3, rows, inputs), 9 * random(sum(heights), seed=9)
        compare(lambda x, bias, *weights: kernels.linear(x, weights, bias), x, bias, *pieces)

    def test_linear_layers_round_float16_as_pytorch(self):
        weight = torch.tensor([1.00390625, 65504.0, -6e-8, 1.01171875]).half().repeat(32, 8)
        x, bias = torch.eye(32).to(B), torch.zeros(32).to(B)
        assert torch.equal(kernels.linear(x, [weight], bias), weight.to(B).T)

    def test_rescale(self):
        scales = random(3, 5, 1).float()
        compare(lambda y, bias: kernels.rescale_(y, scales, bias), random(3, 5, 96), random(96))


def test_tensors_that_are_not_one_row_after_the_other_are_left_to_pytorch():
    tokens = random(2, 64, 9).transpose(1, 2)
    assert not native.serves(tokens)
    gate, update = random(2, 64), random(2, 9, 64)
    expected = (tokens.double() + gate.double()[:, None] * update.double()).to(B)
    assert error(kernels.add_gated_(tokens, gate, update), expected.double()) < 2**-7


def test_rows_that_are_no_multiple_of_16_are_left_to_pytorch():
    assert not native.serves(random(3, 24))
    x = random(2, 24, 5, 7).to(memory_format=torch.channels_last)
    made = kernels.activate(x, torch.full((24,), 2.0), torch.ones(24))
    assert error(made, nn.functional.silu(2 * x.double() + 1)) < 2**-8


def test_without_a_compiler_there_is_one_warning_and_pytorch(monkeypatch):
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    compiled.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=r"would do faster \(there is no C compiler\)"):
            assert not native.serves(random(3, 16))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert kernels.gelu_(random(3, 16)).dtype == B
    finally:
        compiled.cache_clear()


def test_a_rotation_is_its_own_inverse_and_spreads_a_large_value():
    x = torch.randn(2, 128).double()
    torch.testing.assert_close(kernels.rotate(kernels.rotate(x)), x, rtol=0, atol=1e-14)
    single = torch.zeros(128)
    single[70] = 80.0
    assert kernels.rotate(single).abs().tolist() == [0.0] * 64 + [10.0] * 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, B, torch.float16])
@pytest.mark.parametrize("planted", [1, 50])
def test_linear_layers_of_8_bits(dtype, planted):
    """With activations of which one channel is 50 times the others, and with none."""
    linear = nn.Linear(192, 320).to(dtype).requires_grad_(False)
    x = random(3, 37, 192).to(dtype)
    x[..., 5] *= planted
    exact = x.double() @ linear.weight.double().T + linear.bias.double()
    assert error(Int8Linear(linear)(x), exact) < 0.012


def test_sums_of_8_bits_stay_within_float16():
    linear = nn.Linear(1536, 32).half().requires_grad_(False)
    linear.weight.copy_(linear.weight[:, :1])  # all products of one sign
    x = torch.ones(2, 1536).half()
    exact = x.double() @ linear.weight.double().T + linear.bias.double()
    assert error(Int8Linear(linear)(x), exact) < 0.012


@pytest.mark.parametrize("signed", [True, False])
def test_the_product_of_eight_bits_is_exact(signed, monkeypatch):
    linear = nn.Linear(192, 320).requires_grad_(False)
    layer, (weight, scales) = Int8Linear(linear), kernels.quantise(linear.weight)
    x = torch.randint(-127, 128, (5, 192), dtype=torch.int8)
    monkeypatch.setattr("sd3min.fast.linear.SIGNED", signed)
    exact = (x.double() @ weight.double().T) * scales.double().T
    torch.testing.assert_close(layer.product(x, torch.float32).double(), exact, rtol=1e-6, atol=0)
    assert exact.abs().max() > 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, B])
def test_packed_linear_layers(dtype):
    linear = nn.Linear(192, 320).to(dtype).requires_grad_(False)
    x = random(3, 37, 192).to(dtype)
    torch.testing.assert_close(packed(linear)(x), linear(x))


def test_where_onednn_has_no_bfloat16_layers_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    linear = nn.Linear(64, 32).to(B)
    assert packed(linear) is linear


def test_without_the_loops_equal_keys_count_exactly_as_often(monkeypatch):
    """In bfloat16, in which the logarithm of 256 is 0.25 % too small."""
    monkeypatch.setattr(native, "serves", lambda tensor: False)
    qkv = random(2, 257, 192)
    qkv[:, :, 64:128] = 0  # all keys weigh the same
    qkv[:, -1, 128:] = 4
    more = qkv[:, -1:].expand(-1, 255, -1)
    exact = kernels.attention(torch.cat([qkv, more], dim=1).double())[:, :257]
    assert error(kernels.attention(qkv, repeats=256), exact) < 2**-9


def test_widths_that_the_loops_do_not_take_are_left_to_pytorch():
    x, weight, bias = random(3, 48), random(16, 48), random(16)
    torch.testing.assert_close(
        kernels.linear(x, [weight], bias), nn.functional.linear(x, weight, bias)
    )
    with pytest.raises(RuntimeError, match="unflatten"):
        kernels.quantise(random(3, 80))


def test_without_a_home_there_is_one_warning_and_pytorch(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(native.Path, "home", homeless)
    compiled.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="would do faster"):
            assert not native.serves(random(3, 16))
    finally:
        compiled.cache_clear()

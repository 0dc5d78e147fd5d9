import math

import pytest
import small
import torch
import torch.nn.functional as F

from sd3min.config import HEAD_WIDTH
from sd3min.mmdit import (
    FinalLayer,
    JointBlock,
    LastContextStream,
    MMDiT,
    Stream,
    modulate,
    position_table,
    sinusoid,
)

EXACT = {"rtol": 0, "atol": 1e-12}  # float64


def tokens(count, width, batch=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, count, width, generator=generator, dtype=torch.float64)


def condition(width, batch=3):
    return tokens(1, width, batch, seed=9)[:, 0]


def block(width=128, last=False):
    context = (LastContextStream if last else Stream)(width, False)
    return small.randomise(JointBlock(context, Stream(width, False))).double()


def test_sinusoid_is_cosines_then_sines_from_the_highest_frequency_down():
    found = sinusoid(torch.tensor([0.0, 1.0, 1000.0]))
    assert found.dtype == torch.float32
    assert torch.equal(found[0], torch.cat([torch.ones(128), torch.zeros(128)]))
    assert found[1, 0].item() == pytest.approx(math.cos(1))
    assert found[1, 128].item() == pytest.approx(math.sin(1))
    lowest = math.exp(-math.log(10_000) * 127 / 128)
    assert found[2, 127].item() == pytest.approx(math.cos(1000 * lowest), abs=1e-6)


def table(width=64, **sizes):
    grid = sizes["grid"]
    return position_table(width, **sizes).reshape(grid, grid, width)


def test_first_half_of_position_embedding_is_horizontal():
    places = table(grid=8)
    columns, rows = places[..., :32], places[..., 32:]
    assert torch.equal(columns, columns[:1].expand(8, -1, -1))
    assert torch.equal(rows, rows[:, :1].expand(-1, 8, -1))
    assert not torch.equal(columns[0, 0], columns[0, 1])
    assert not torch.equal(rows[0, 0], rows[1, 0])


@pytest.mark.parametrize(("grid", "first", "last"), [(192, -16.0, 31.75), (384, -40.0, 55.75)])
def test_position_table_has_the_official_ends(grid, first, last):
    """The first channel of the columns is the sine of the place itself (its frequency is 1)."""
    sines = table(8, grid=grid)[0, :, 0]
    assert sines[0].item() == pytest.approx(math.sin(first), abs=1e-6)
    assert sines[-1].item() == pytest.approx(math.sin(last), abs=1e-6)
    cosines = table(8, grid=grid)[0, :, 2]
    assert cosines[0].item() == pytest.approx(math.cos(first), abs=1e-6)


def test_centre_of_the_position_table_is_the_pretraining_grid_refined():
    """1024 pixels lie on 0 to 15.75 in steps of a quarter, the grid of 256 pixels."""
    centre = table(8, grid=192)[64:128, 64:128]
    expected = torch.arange(64).double() / 4
    torch.testing.assert_close(centre[0, :, 0].double(), expected.sin(), rtol=0, atol=1e-6)
    torch.testing.assert_close(centre[:, 0, 4].double(), expected.sin(), rtol=0, atol=1e-6)


def test_crop_is_centred():
    model = small.mmdit()  # a grid of 12
    whole = model.pos_embed.reshape(12, 12, -1)
    found = model.positions(3, 6).reshape(3, 6, -1)
    assert torch.equal(found, whole[4:7, 3:9])


def test_modulate_normalises_scales_and_shifts():
    x, shift, scale = tokens(5, 64), condition(64)[:, None], condition(64)[:, None] * 2
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    expected = (x - mean) / (variance + 1e-6).sqrt() * (1 + scale) + shift
    torch.testing.assert_close(modulate(x, shift, scale), expected, **EXACT)


def test_zero_modulation_makes_a_block_the_identity():
    joint = block()
    for stream in (joint.context_block, joint.x_block):
        for parameter in stream.adaLN_modulation.parameters():
            parameter.data.zero_()
    context, image = tokens(4, 128), tokens(6, 128, seed=1)
    new_context, new_image = joint(context, image, condition(128))
    assert torch.equal(new_context, context)
    assert torch.equal(new_image, image)


def test_last_block_leaves_the_text_and_still_reads_it():
    joint, cond = block(last=True), condition(128)
    context, image = tokens(4, 128), tokens(6, 128, seed=1)
    new_context, new_image = joint(context, image, cond)
    assert torch.equal(new_context, context)
    assert not torch.allclose(joint(context + 1, image, cond)[1], new_image + 1)
    moved = joint(context * 2 + tokens(4, 128, seed=5), image, cond)[1]
    assert (moved - new_image).abs().max() > 1e-3


def alone(stream, x, cond):
    """One modality's transformer on its own, for a stream whose attention is only its own."""
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = stream.adaLN_modulation(cond)[
        :, None
    ].chunk(6, -1)
    q, k, v = stream.attn(modulate(x, shift, scale))
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = x + gate * stream.attn.proj(attended)
    return x + gate_mlp * stream.mlp(modulate(x, shift_mlp, scale_mlp))


def test_joint_block_equals_two_transformers_when_attention_is_masked_apart(monkeypatch):
    joint, cond = block(), condition(128)
    context, image = tokens(4, 128), tokens(6, 128, seed=1)
    expected = alone(joint.context_block, context, cond), alone(joint.x_block, image, cond)
    assert not torch.allclose(joint(context, image, cond)[1], expected[1])

    attend = F.scaled_dot_product_attention
    is_text = torch.arange(10) < 4  # text stands before image
    apart = is_text[:, None] == is_text[None, :]
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: attend(q, k, v, apart))
    found = joint(context, image, cond)
    torch.testing.assert_close(found[0], expected[0], **EXACT)
    torch.testing.assert_close(found[1], expected[1], **EXACT)


def test_attention_does_not_depend_on_the_order_of_text_tokens():
    joint, cond = block(), condition(128)
    context, image = tokens(4, 128), tokens(6, 128, seed=1)
    turned = joint(context.flip(1), image, cond)
    found = joint(context, image, cond)
    torch.testing.assert_close(turned[1], found[1], **EXACT)
    torch.testing.assert_close(turned[0].flip(1), found[0], **EXACT)


def test_depth_decides_width_and_heads():
    for config in small.VARIANTS.values():
        with torch.device("meta"):
            model = MMDiT(config)
        assert model.final_layer.linear.in_features == 64 * config.depth
        q, _, _ = (
            small.randomise(model.to_empty(device="cpu"))
            .joint_blocks[0]
            .x_block.attn(torch.zeros(1, 2, config.width))
        )
        assert q.shape == (1, config.depth, 2, HEAD_WIDTH)


def test_unpatchify_puts_every_patch_back_in_its_place():
    """Patches that hold their own number come out as squares of 2x2 in reading order."""
    model = small.mmdit().double()

    class Numbers(FinalLayer):
        def forward(self, image, cond):
            places = torch.arange(image.shape[1]).double()
            channels = torch.arange(64).double() / 100
            return (places[:, None] + channels).expand(len(image), -1, -1)

    model.final_layer = Numbers(model.config.width)
    config = model.config
    found = model(
        torch.zeros(1, 16, 4, 6).double(),
        torch.tensor([1.0]),
        torch.zeros(1, 2, config.context_width).double(),
        torch.zeros(1, config.pooled_width).double(),
    )
    row, column, dy, dx, channel = 1, 2, 1, 0, 5
    expected = row * 3 + column + ((dy * 2 + dx) * 16 + channel) / 100
    assert found[0, channel, 2 * row + dy, 2 * column + dx].item() == pytest.approx(expected)

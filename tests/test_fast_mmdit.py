"""The MMDiT for one run equals the plain one."""

import pytest
import small
import torch

from sd3min.fast import blocks
from sd3min.fast.mmdit import STEPS_AHEAD, FastMMDiT
from sd3min.mmdit import MMDiT
from sd3min.text_encoders import Conditioning

TIMES = torch.tensor([1000.0, 803.7, 1.3])
EXACT = 1e-10  # in float64, as on the first rung of the ladder


def inputs(model: MMDiT, h: int, w: int, zeros: int = 0, batch: int = 3):
    generator = torch.Generator().manual_seed(h)
    config, kind = model.config, {"generator": generator, "dtype": model.pos_embed.dtype}
    context = torch.randn(batch, 11, config.context_width, **kind)
    context[:, 11 - zeros :] = 0
    pooled = torch.randn(batch, config.pooled_width, **kind)
    return torch.randn(batch, 16, h, w, **kind), Conditioning(context, pooled)


def plain(model: MMDiT, latents, text: Conditioning, i: int = 1):
    return model(latents, TIMES[i].expand(len(latents)), *text)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("zeros", [0, 1, 2, 7])
@pytest.mark.parametrize("variant", small.VARIANTS)
def test_float64_equals_the_plain_network(variant, zeros):
    model = small.mmdit(small.VARIANTS[variant]).double()
    for h, w in ((6, 10), (14, 2)):
        latents, text = inputs(model, h, w, zeros)
        run = FastMMDiT.of(model).prepare(text, TIMES)
        assert run.context.shape[1] == 11 - max(zeros - 1, 0)
        for i in (2, 0, 1, 1):
            assert relative(run(latents, i), plain(model, latents, text, i)) < EXACT


def test_many_rows_go_through_the_mlp_in_pieces(monkeypatch):
    """As those of 1024x1024 do."""
    monkeypatch.setattr(blocks, "ROWS", 7)
    model = small.mmdit(small.VARIANTS["SD3.5-medium"]).double()
    latents, text = inputs(model, 6, 10)
    run = FastMMDiT.of(model).prepare(text, TIMES)
    assert relative(run(latents, 1), plain(model, latents, text)) < EXACT


def test_rows_that_are_zeros_in_one_picture_only_are_not_merged():
    model = small.mmdit().double()
    latents, text = inputs(model, 6, 10)
    text.context[0, 5:] = 0
    text.context[2, 9:] = 0
    run = FastMMDiT.of(model).prepare(text, TIMES)
    assert run.repeats == 1
    assert relative(run(latents, 1), plain(model, latents, text)) < EXACT


def test_a_context_of_zeros_alone_is_one_row():
    model = small.mmdit().double()
    latents, text = inputs(model, 6, 10, zeros=11)
    run = FastMMDiT.of(model).prepare(text, TIMES)
    assert (run.repeats, run.context.shape[1]) == (11, 1)
    assert relative(run(latents, 1), plain(model, latents, text)) < EXACT


def test_modulation_of_more_steps_than_are_kept():
    model = small.mmdit().double()
    latents, text = inputs(model, 4, 6, batch=1)
    times = torch.linspace(1000, 1, 2 * STEPS_AHEAD + 3)
    run = FastMMDiT.of(model).prepare(text, times)
    for i in (0, STEPS_AHEAD - 1, STEPS_AHEAD, 2 * STEPS_AHEAD + 2, 5):
        expected = model(latents, times[i].expand(1), *text)
        assert relative(run(latents, i), expected) < EXACT

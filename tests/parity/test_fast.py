"""Rung 4 for the fast network: in bfloat16 it errs no more than diffusers, in 8 bits a little."""

import statistics

import oracle
import pairs
import pytest
import small
import torch

from sd3min.fast.linear import Int8Linear, packed
from sd3min.fast.mmdit import FastMMDiT
from sd3min.mmdit import MMDiT
from sd3min.probes import twins
from sd3min.probes.precision import computing_in
from sd3min.text_encoders import Conditioning

EIGHT_BITS = 0.03  # relative L2 error of a velocity with all linear layers of the blocks in 8 bits


def errors(mmdit: MMDiT, make, repeated: int) -> tuple[list[float], list[float]]:
    """Of five inputs: the fast network's and diffusers' relative L2 distances from float64."""
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(5, 16, 14, 22, generator=generator).bfloat16()
    context = torch.randn(5, 21, mmdit.config.context_width, generator=generator).bfloat16()
    context[:, 21 - repeated :] = 0
    pooled = torch.randn(5, mmdit.config.pooled_width, generator=generator).bfloat16()
    times = torch.full((5,), 718.5)
    with computing_in(torch.float64, mmdit):
        exact = mmdit(latents.double(), times, context.double(), pooled.double())
    theirs = oracle.velocity(twins.transformer(mmdit), latents, times, context, pooled)
    fast = FastMMDiT.of(mmdit, make).prepare(Conditioning(context, pooled), times[:1])
    ours = fast(latents, 0)
    return pairs.distances(ours, exact), pairs.distances(theirs, exact)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("repeated", [0, 9])
@pytest.mark.parametrize("variant", small.VARIANTS)
def test_bfloat16_errs_no_more_than_diffusers(variant, repeated):
    ours, theirs = errors(small.mmdit(small.VARIANTS[variant]).bfloat16(), packed, repeated)
    assert min(ours) > 1e-4, "the comparison cannot fail"
    assert statistics.median(ours) <= oracle.RUNG_4 * statistics.median(theirs)


@pytest.mark.parametrize("variant", small.VARIANTS)
def test_8_bits_err_within_their_bound(variant):
    ours, theirs = errors(small.mmdit(small.VARIANTS[variant]).bfloat16(), Int8Linear, 0)
    assert statistics.median(theirs) < statistics.median(ours) < EIGHT_BITS


@pytest.mark.slow
@pytest.mark.parametrize("make", [packed, Int8Linear])
@pytest.mark.parametrize("variant", pairs.VARIANTS)
def test_at_full_width(variant, make):
    mmdit = pairs.build(lambda: MMDiT(pairs.VARIANTS[variant]), torch.bfloat16)
    ours, theirs = errors(mmdit, make, 9)
    print(f"{variant} {make.__name__}: {statistics.median(ours):.2e}", end=" ")
    print(f"diffusers {statistics.median(theirs):.2e}")
    allowed = oracle.RUNG_4 * statistics.median(theirs) if make is packed else EIGHT_BITS
    assert statistics.median(ours) <= allowed

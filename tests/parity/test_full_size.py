"""Rungs 2 and 4 at the official widths, with random weights: minutes, and up to 11 GB of memory."""

import gc

import oracle
import pairs
import pytest
import torch

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _one_at_a_time():
    with torch.no_grad():
        yield
    gc.collect()


def made(build, name):
    if name == "text encoders" and not pairs.TOKENIZERS.is_dir():
        pytest.skip("the official tokenizers are not here")
    return build[name]()


@pytest.mark.parametrize("name", pairs.FULL_SINGLE)
def test_float32_and_float64_at_full_width_equal_diffusers(name):
    for figures in made(pairs.FULL_SINGLE, name).figures():
        assert figures.apart <= figures.allowed, figures
        assert figures.double <= figures.double_allowed, figures
        assert figures.nudged > 10 * figures.allowed, "the comparison cannot fail"


@pytest.mark.parametrize("name", pairs.FULL_HALF)
def test_bfloat16_at_full_width_errs_no_more_than_diffusers(name):
    for figures in made(pairs.FULL_HALF, name).half_figures():
        assert min(figures.ours) > 1e-4, "the comparison cannot fail"
        assert figures.ratio <= oracle.RUNG_4, figures

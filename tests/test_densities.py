"""Densities of times: each pdf against integrals, its own samples and its closed form."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from sd3min import flow
from sd3min.config import Refusal
from sd3min.densities import MODE_BOUNDS, CosMap, LogitNormal, Mode, Shifted, Uniform, mode_map

LOW, HIGH = MODE_BOUNDS
PLAIN = [
    Uniform(),
    LogitNormal(),
    LogitNormal(0.5, 0.6),
    LogitNormal(-0.5, 1.0),
    Mode(1.29),
    Mode(0.0),
    Mode(-0.7),
    CosMap(),
]
DENSITIES = [*PLAIN, *(Shifted(density, 3.0) for density in PLAIN), Shifted(Mode(1.5), 0.4)]
UNLIKELY = 1e-3  # a right density is refused this often; the seed is fixed
SAMPLES = 20_000


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pdf(density):
    """The density as a function of one number."""
    return lambda t: density.pdf(torch.tensor(t, dtype=torch.float64)).item()


def cdf(density, cells=4000):
    """The integral of the pdf up to given times, by Gauss's rule in every cell and between."""
    edges = torch.linspace(0, 1, cells + 1, dtype=torch.float64)
    nodes, weights = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(5))
    points = edges[:-1, None] + (nodes + 1) / 2 / cells
    masses = (density.pdf(points) * weights).sum(dim=1) / 2 / cells
    below = torch.cat([torch.zeros(1, dtype=torch.float64), masses.cumsum(0)])
    return lambda t: torch.from_numpy(np.interp(t, edges, below)).numpy()


@pytest.mark.parametrize("density", [*DENSITIES, Mode(LOW), Mode(HIGH)], ids=str)
def test_a_pdf_is_positive_and_integrates_to_one(density):
    """At its bounds the mode's density has a pole: at both ends, or in the middle."""
    bound = {LOW: 2e-4, HIGH: 1e-4}.get(getattr(density, "scale", None), 1e-8)
    t = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    assert (density.pdf(t) > 0).all()
    whole, _ = integrate.quad(pdf(density), 0, 1, points=[0.5], limit=400)
    assert whole == pytest.approx(1, abs=bound)


@pytest.mark.parametrize("density", DENSITIES, ids=str)
def test_samples_agree_with_the_pdf(density):
    found = density.sample(SAMPLES, seeded())
    assert found.dtype == torch.float32 and found.shape == (SAMPLES,)
    assert ((found >= 0) & (found <= 1)).all()
    assert stats.kstest(found.double().numpy(), cdf(density)).pvalue > UNLIKELY


@pytest.mark.parametrize("density", DENSITIES, ids=str)
def test_samples_depend_on_the_generator_alone(density):
    assert torch.equal(density.sample(7, seeded(1)), density.sample(7, seeded(1)))
    assert not torch.equal(density.sample(7, seeded(1)), density.sample(7, seeded(2)))


def test_a_wrong_density_does_not_agree_with_the_samples():
    """The test above can tell neighbours apart."""
    found = LogitNormal(0.0, 1.0).sample(SAMPLES, seeded()).double().numpy()
    for other in (LogitNormal(0.1, 1.0), LogitNormal(0.0, 1.1), Mode(1.29), CosMap()):
        assert stats.kstest(found, cdf(other)).pvalue < 1e-6


def test_logit_normal_is_eq_19():
    """Against SciPy's normal density of logit t, by change of variables."""
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    expected = stats.norm.pdf(torch.logit(t).numpy(), 0.5, 0.6) / (t * (1 - t)).numpy()
    torch.testing.assert_close(LogitNormal(0.5, 0.6).pdf(t), torch.from_numpy(expected))
    assert LogitNormal().pdf(torch.tensor([0.0, 1.0])).tolist() == [0, 0]


def test_a_positive_mean_favours_noise():
    t = LogitNormal(1.0, 1.0).sample(SAMPLES, seeded())
    assert t.median().item() == pytest.approx(1 / (1 + math.exp(-1)), abs=0.01)


def test_modes_density_is_the_slope_of_its_inverse_map():
    density, u = Mode(1.29), torch.linspace(0.01, 0.99, 99, dtype=torch.float64, requires_grad=True)
    t = mode_map(u, 1.29)
    (slope,) = torch.autograd.grad(t.sum(), u)
    torch.testing.assert_close(density.pdf(t.detach()), -1 / slope, rtol=1e-12, atol=0)


def test_a_mode_of_scale_zero_is_uniform_and_a_positive_one_favours_the_middle():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(Mode(0.0).pdf(t), torch.ones_like(t))
    middle, edge = Mode(1.29).pdf(torch.tensor([0.5, 0.0], dtype=torch.float64))
    assert middle > 3 and edge == pytest.approx(1 / 2.29)


@pytest.mark.parametrize(
    ("scale", "falls"),
    [
        (LOW, True),
        (LOW - 1e-4, False),
        (HIGH, True),
        (HIGH + 1e-4, False),
        (0.0, True),
        (1.29, True),
    ],
)
def test_modes_map_falls_exactly_within_its_bounds(scale, falls):
    """The slope, by autograd, on times that hold both ends and the middle, where it turns first."""
    u = torch.linspace(0, 1, 2001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(mode_map(u, scale).sum(), u)
    assert (slope.max().item() <= 1e-12) == falls
    if falls:
        assert Mode(scale).sample(3, seeded()).shape == (3,)
    else:
        with pytest.raises(Refusal, match="is not a number from -1 to"):
            Mode(scale)


def test_cosmap_gives_the_cosine_schedules_signal_to_noise():
    """(1 − t)/t = cos(πu/2)/sin(πu/2), which Eq. 21 solves, on the u that were drawn."""
    u = torch.rand(1000, generator=seeded())
    t = CosMap().sample(1000, seeded())
    angle = math.pi / 2 * u
    torch.testing.assert_close(t * angle.cos(), (1 - t) * angle.sin())


def test_shift_moves_the_median_by_eq_23():
    """A monotone map moves quantiles: a half becomes three quarters at shift 3."""
    density = Shifted(LogitNormal(), 3.0)
    for value, expected in ((0.5, 0.75), (0.9, flow.shift_times(0.9, 3.0))):
        before = torch.quantile(LogitNormal().sample(SAMPLES, seeded()), value)
        after = torch.quantile(density.sample(SAMPLES, seeded()), value)
        shifted = flow.shift_times(before.item(), 3.0)
        assert after.item() == pytest.approx(shifted, abs=1e-4)
        assert value > 0.5 or after.item() == pytest.approx(expected, abs=0.01)
    below, _ = integrate.quad(pdf(density), 0, 0.75)
    assert below == pytest.approx(0.5, abs=1e-9)


def test_shifted_logit_normal_is_logit_normal_with_another_mean():
    """The shift adds log α to the logit, so rf/lognorm(m, s) becomes lognorm(m + log α, s)."""
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    shifted = Shifted(LogitNormal(0.3, 0.8), 3.0)
    torch.testing.assert_close(shifted.pdf(t), LogitNormal(0.3 + math.log(3), 0.8).pdf(t))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: LogitNormal(0.0, 0.0), "mean 0.0 and scale 0.0 make no distribution"),
        (lambda: LogitNormal(math.nan), "mean nan and scale 1.0 make no distribution"),
        (lambda: Mode(1.76), "mode scale 1.76 is not a number from -1 to 2/"),
        (lambda: Mode(math.nan), "mode scale nan is not"),
        (lambda: Shifted(Uniform(), 0.0), "shift 0.0 is not a number above 0"),
        (lambda: Shifted(Uniform(), math.inf), "shift inf is not a number above 0"),
    ],
)
def test_what_makes_no_density_is_refused(wrong, said):
    with pytest.raises(Refusal, match=said):
        wrong()

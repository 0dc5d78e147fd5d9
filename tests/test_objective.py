"""Objectives against the peers' own formulas, written out with diffusers' own functions."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)
from scipy import special, stats

from sd3min import flow
from sd3min.config import Refusal
from sd3min.densities import CosMap, LogitNormal, Mode, Shifted, Uniform
from sd3min.training import objective
from sd3min.training.objective import (
    OBJECTIVES,
    SCHEMES,
    LossByTime,
    validation_losses,
    velocity_errors,
)

EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64 on both sides
ROUNDED = {"rtol": 2e-7, "atol": 0}  # diffusers rounds the weight of sigma_sqrt to float32
BATCH = 5


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def given():
    """Data, noise and the weights of a network, in float64."""
    draws = [torch.randn(BATCH, 16, 6, 10, generator=seeded(i)).double() for i in range(2)]
    mixing = torch.randn(16, 16, generator=seeded(2)).double().requires_grad_()
    return *draws, mixing


def network(mixing):
    """A velocity that is neither linear in the latents nor blind to the time."""
    return lambda z, t: torch.einsum("bchw,cd->bdhw", z, mixing).tanh() + z * t[:, None, None, None]


def loss_and_gradient(loss, mixing):
    (gradient,) = torch.autograd.grad(loss, mixing)
    return loss.detach(), gradient


def ours(made, sigmas):
    """The loss and gradient of an objective at given times."""
    data, noise, mixing = given()
    return loss_and_gradient(made.loss(network(mixing), data, noise, sigmas), mixing)


def preconditioned_loss(sigmas, weighting, preconditioned=True):
    """What both peers compute: the network's output becomes data, and is compared with data."""
    data, noise, mixing = given()
    column = sigmas[:, None, None, None]
    noisy = (1.0 - column) * data + column * noise
    output = network(mixing)(noisy, sigmas)
    target = noise - data
    if preconditioned:
        output, target = output * (-column) + noisy, data
    squared = weighting[:, None, None, None] * (output - target) ** 2
    return loss_and_gradient(squared.reshape(BATCH, -1).mean(1).mean(), mixing)


def diffusers_sigmas(scheme, count, generator, mean=0.0, std=1.0):
    """diffusers' draw: an index into its scheduler's table, and the σ that belongs there."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    u = compute_density_for_timestep_sampling(
        scheme, count, logit_mean=mean, logit_std=std, mode_scale=1.29, generator=generator
    )
    indices = (u * scheduler.config.num_train_timesteps).long()
    timesteps = scheduler.timesteps[indices]
    places = [(scheduler.timesteps == t).nonzero().item() for t in timesteps]
    return scheduler.sigmas[places]


def kohya_sigmas(scheme, shift, generator):
    """kohya's draw (its `get_noisy_model_input_and_timesteps`)."""
    u = compute_density_for_timestep_sampling(
        scheme, BATCH, logit_mean=0.0, logit_std=1.0, mode_scale=1.29, generator=generator
    )
    u = (u * shift) / (1 + (shift - 1) * u)
    return (u * 1000).long() / 1000


@pytest.mark.parametrize("scheme", SCHEMES)
def test_times_of_diffusers_are_those_of_its_table(scheme):
    found = OBJECTIVES["diffusers"](scheme).times.sample(500, seeded())
    expected = diffusers_sigmas(scheme, 500, seeded())
    torch.testing.assert_close(found, expected, rtol=2e-7, atol=0)
    assert found.unique().numel() > 200


@pytest.mark.parametrize("preconditioned", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_diffusers_objective_is_its_own_formula(scheme, preconditioned):
    sigmas = diffusers_sigmas(scheme, BATCH, seeded()).double()
    weighting = compute_loss_weighting_for_sd3(scheme, sigmas)
    expected = preconditioned_loss(sigmas, weighting, preconditioned)
    found = ours(OBJECTIVES["diffusers"](scheme, preconditioned=preconditioned), sigmas)
    close = ROUNDED if scheme == "sigma_sqrt" else EXACT
    for mine, theirs in zip(found, expected, strict=True):
        scale = theirs.abs().max()
        torch.testing.assert_close(mine / scale, theirs / scale, **{**close, "atol": close["rtol"]})


@pytest.mark.parametrize("preconditioned", [True, False])
def test_sigma_sqrt_is_exact_where_its_weight_is_not_rounded(preconditioned):
    """Its weight, σ⁻², undoes the preconditioning: the paper's own loss at diffusers' times."""
    sigmas = diffusers_sigmas("sigma_sqrt", BATCH, seeded()).double()
    expected = preconditioned_loss(sigmas, sigmas**-2.0, preconditioned)
    made = OBJECTIVES["diffusers"]("sigma_sqrt", preconditioned=preconditioned)
    for mine, theirs in zip(ours(made, sigmas), expected, strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)
    if preconditioned:
        for mine, theirs in zip(ours(OBJECTIVES["paper"](), sigmas), expected, strict=True):
            torch.testing.assert_close(mine, theirs, **EXACT)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("scheme", ["uniform", *SCHEMES])
def test_kohyas_objective_is_its_own_formula(scheme, shift):
    made = OBJECTIVES["kohya"](scheme, shift)
    sigmas = kohya_sigmas(scheme, shift, seeded(3))
    torch.testing.assert_close(made.times.sample(BATCH, seeded(3)), sigmas, rtol=2e-7, atol=0)
    sigmas = sigmas.double()
    exact = sigmas**-2.0 if scheme == "sigma_sqrt" else None  # before diffusers rounds it
    weighting = compute_loss_weighting_for_sd3(scheme, sigmas) if exact is None else exact
    expected = preconditioned_loss(sigmas, weighting)
    for mine, theirs in zip(ours(made, sigmas), expected, strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)


def test_the_papers_loss_is_the_plain_velocity_error():
    data, noise, mixing = given()
    sigmas = torch.tensor([0.1, 0.3, 0.5, 0.7, 1.0], dtype=torch.float64)
    column = sigmas[:, None, None, None]
    output = network(mixing)((1 - column) * data + column * noise, sigmas)
    expected = loss_and_gradient(torch.nn.functional.mse_loss(output, noise - data), mixing)
    for mine, theirs in zip(ours(OBJECTIVES["paper"](), sigmas), expected, strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)


def test_the_papers_times_are_its_density_shifted():
    assert OBJECTIVES["paper"]().times == Shifted(LogitNormal(), 3.0)
    assert OBJECTIVES["paper"](Mode(1.29), 1.0).times == Shifted(Mode(1.29), 1.0)


def test_defaults_are_the_peers_own():
    assert OBJECTIVES["diffusers"]().times == objective.CountedDown(LogitNormal(0, 1), 3.0)
    assert OBJECTIVES["kohya"]().times == objective.CountedUp(Uniform(), 1.0)
    assert OBJECTIVES["diffusers"]().weight == OBJECTIVES["kohya"]().weight == objective.Weight(2)


@pytest.mark.parametrize("mean", [-0.8, 0.0, 0.8])
def test_the_mean_of_diffusers_has_the_opposite_sign_of_the_papers(mean):
    """Its times, spread evenly over their thousandths, are the paper's with the mean negated."""
    drawn = OBJECTIVES["diffusers"](mean=mean).times.sample(20_000, seeded()).double()
    spread = torch.rand(len(drawn), generator=seeded(1), dtype=torch.float64) / 1000
    unshifted = flow.shift_times(drawn, 1 / 3.0) - spread

    def p_value(sign):
        normal = stats.norm(sign * mean, 1.0)
        return stats.kstest(torch.logit(unshifted).numpy(), normal.cdf).pvalue

    assert p_value(-1) > 1e-3
    assert mean == 0 or p_value(+1) < 1e-6


def test_squared_noise_levels_say_where_fine_tuning_spends_its_loss():
    """E[σ²] and E[σ³]/E[σ²] of all three, by integrals over the normal and the uniform density.

    diffusers' errors count at σ = 0.79 in the mean, kohya's at 0.75: layout before detail.
    """

    def level(power, shift):
        return stats.norm.expect(lambda u: flow.shift_times(special.expit(u), shift) ** power)

    expected = {
        "diffusers": (level(2, 3.0), level(3, 3.0)),
        "kohya": (1 / 3, 1 / 4),
        "paper": (level(2, 1.0), level(3, 1.0)),
    }
    for name, levels in expected.items():
        made = OBJECTIVES[name](shift=1.0) if name == "paper" else OBJECTIVES[name]()
        t = made.times.sample(400_000, seeded()).double()
        found = (t**2).mean().item(), (t**3).mean().item()
        assert found == pytest.approx(levels, abs=2e-3), name
    squared, cubed = expected["diffusers"]
    assert cubed / squared == pytest.approx(0.79, abs=0.005)


def test_cosmaps_weight_is_its_density():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(CosMap().pdf(t), compute_loss_weighting_for_sd3("cosmap", t))


@pytest.mark.parametrize("made", [OBJECTIVES["diffusers"], OBJECTIVES["kohya"]])
def test_an_unknown_scheme_is_refused(made):
    with pytest.raises(Refusal, match="weighting scheme min_snr is not one of sigma_sqrt, logit"):
        made("min_snr")


@pytest.mark.parametrize("name", ["paper", "diffusers", "kohya"])
def test_a_shift_that_maps_no_times_is_refused(name):
    for shift in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(Refusal, match=rf"shift {shift} is not a number above 0"):
            OBJECTIVES[name](shift=shift)


def test_a_mode_scale_counts_in_its_scheme_alone():
    assert OBJECTIVES["diffusers"]("mode", mode_scale=1.0).times.density == Mode(1.0)
    with pytest.raises(Refusal, match=r"mode scale 2\.0"):
        OBJECTIVES["kohya"]("mode", mode_scale=2.0)
    OBJECTIVES["kohya"]("none", mode_scale=2.0)


def test_kohyas_loss_at_time_zero_is_no_nan():
    """⌊1000·u⌋ may be 0, where σ⁻² alone has no value."""
    data, noise, mixing = given()
    loss = OBJECTIVES["kohya"]("sigma_sqrt").loss(network(mixing), data, noise, torch.zeros(BATCH))
    assert loss.isfinite() and loss > 0


def test_errors_of_latents_in_bfloat16_are_measured_in_float32():
    data, noise = (x.bfloat16() for x in given()[:2])
    t = torch.full((BATCH,), 0.5)
    found = velocity_errors(lambda z, t: z.bfloat16(), data, noise, t)
    latents = flow.interpolate(data, noise, t[:, None, None, None]).bfloat16()
    expected = (latents.float() - (noise - data).float()).square().mean(dim=(1, 2, 3))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_validation_is_the_loss_at_eight_equidistant_times():
    """Where the data are 0 and the velocity is z_t = t·ε, the error is (1 − t)²·|ε|²."""
    data, noise = torch.zeros(3, 16, 2, 4), torch.randn(3, 16, 2, 4, generator=seeded())
    seen = []

    def velocity(z, t):
        seen.append(t)
        return z

    found = validation_losses(velocity, data, noise)
    times = torch.stack(seen)
    assert times.shape == (8, 3)
    torch.testing.assert_close(times[:, 0], (2 * torch.arange(8) + 1) / 16)
    assert (times == times[:, :1]).all()
    torch.testing.assert_close(found, (1 - times[:, 0]) ** 2 * noise.square().mean())
    assert not found.requires_grad


def test_loss_by_time_is_the_mean_of_every_bin_and_adds_up_over_processes():
    whole, parts = LossByTime(4), [LossByTime(4), LossByTime(4)]
    t = torch.tensor([0.0, 0.2, 0.25, 0.9, 1.0])
    errors = torch.tensor([1.0, 3.0, 5.0, 7.0, 8.0], requires_grad=True)
    whole.add(errors, t)
    assert whole.means() == [2.0, 5.0, None, 7.5]
    parts[0].add(errors[:2], t[:2])
    parts[1].add(errors[2:], t[2:])
    parts[0].totals += parts[1].totals
    assert parts[0].means() == whole.means()

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from sd3min import flow


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_path_starts_at_data_and_ends_at_noise():
    data, noise = random(2, 16, 4, 4), random(2, 16, 4, 4, seed=1)
    assert torch.equal(flow.interpolate(data, noise, 0.0), data)
    assert torch.equal(flow.interpolate(data, noise, 1.0), noise)


def test_velocity_target_is_the_derivative_of_the_path():
    data, noise = random(1, 16, 2, 2), random(1, 16, 2, 2, seed=1)
    ahead, behind = (flow.interpolate(data, noise, t) for t in (0.5001, 0.4999))
    torch.testing.assert_close((ahead - behind) / 0.0002, flow.velocity_target(data, noise))


def test_denoise_finds_the_data_from_any_time():
    data, noise = random(1, 16, 2, 2), random(1, 16, 2, 2, seed=1)
    for t in (0.1, 0.7, 1.0):
        z = flow.interpolate(data, noise, t)
        torch.testing.assert_close(flow.denoise(z, noise - data, t), data)


def test_shift_is_eq_23():
    t, m, n = 0.3, 4096.0, 1024.0
    root = math.sqrt(m / n)
    assert flow.shift_times(t, root) == pytest.approx(root * t / (1 + (root - 1) * t))
    assert flow.shift_times(0.0, 3.0) == 0.0
    assert flow.shift_times(1.0, 3.0) == 1.0
    assert flow.shift_times(0.4, 1.0) == 0.4


def test_shift_moves_log_signal_to_noise_by_minus_two_log_alpha():
    def log_snr(t):
        return 2 * math.log((1 - t) / t)

    moved = log_snr(flow.shift_times(0.37, 3.0)) - log_snr(0.37)
    assert moved == pytest.approx(-2 * math.log(3.0))


def test_schedule_falls_from_noise_to_data():
    for name in flow.SCHEDULES:
        times = flow.sigmas(28, 3.0, name)
        assert times.dtype == torch.float32 and len(times) == 29
        assert times[0] == 1.0 and times[-1] == 0.0
        assert (times.diff() < 0).all()


def test_double_shift_ends_higher_than_single_shift():
    """The figures of the official code for 28 steps at shift 3 (its last time is not 3/1002)."""
    assert flow.sigmas(28, 3.0)[-2].item() == pytest.approx(0.00892857, abs=1e-7)
    assert flow.sigmas(28, 3.0, "single_shift")[-2].item() == pytest.approx(3 / 1002, abs=1e-7)


def test_euler_is_exact_in_one_step_on_a_straight_line():
    data, noise = random(2, 16, 4, 6).float(), random(2, 16, 4, 6, seed=1).float()
    for steps in (1, 7):
        found = flow.sample(lambda z, t: noise - data, noise, flow.sigmas(steps))
        torch.testing.assert_close(found, data, rtol=1e-5, atol=1e-5)


def test_euler_error_halves_with_twice_the_steps():
    """First order, on dz/dt = z, whose solution is known: z(0) = z(1)/e."""
    noise = torch.ones(1, 16, 2, 2)

    def error(steps):
        times = torch.linspace(1, 0, steps + 1)
        return abs(flow.sample(lambda z, t: z, noise, times)[0, 0, 0, 0].item() - math.exp(-1))

    assert error(200) / error(100) == pytest.approx(0.5, abs=0.01)


def solve(sampler, steps):
    """z(0) of dz/dt = z, whose data pointed at, z − t·z, changes along the way."""
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    noise = torch.ones(1, 16, 2, 2, dtype=torch.float64)
    return flow.sample(lambda z, t: z, noise, times, sampler)[0, 0, 0, 0].item()


def test_dpmpp_2m_converges_faster_than_euler():
    """Second order but for its first and last step: twice the steps leave less than a third."""

    def error(sampler, steps):
        return abs(solve(sampler, steps) - math.exp(-1))

    assert error("dpmpp_2m", 20) < error("euler", 20) / 4
    assert error("dpmpp_2m", 80) / error("dpmpp_2m", 40) < 1 / 3
    assert error("euler", 80) / error("euler", 40) > 0.45


def test_dpmpp_2m_begins_and_ends_with_a_step_of_euler():
    noise, times = random(2, 16, 2, 3).float(), flow.sigmas(5)

    def velocity(z, t):
        return torch.sin(3 * z) + t

    euler, multistep = (
        list(flow.steps(velocity, noise, times, sampler)) for sampler in ("euler", "dpmpp_2m")
    )
    assert torch.equal(euler[0].next_latents, multistep[0].next_latents)
    assert (euler[1].next_latents - multistep[1].next_latents).abs().max() > 1e-3
    assert torch.equal(multistep[-1].next_latents, euler_step(multistep[-1], 0.0))


def euler_step(step, t_next):
    return step.latents + (t_next - step.t) * step.velocity


def dpmpp_2m_in_numpy(velocity, latents, times):
    """DPM-Solver++(2M), Lu et al. 2022, in the variables of k-diffusion: λ = −ln t."""
    before = None
    for i in range(len(times) - 1):
        t, following = times[i], times[i + 1]
        denoised = latents - t * velocity(latents, t)
        target = denoised
        if before is not None and following > 0:
            h, h_before = np.log(t) - np.log(following), np.log(times[i - 1]) - np.log(t)
            half = h / h_before / 2
            target = (1 + half) * denoised - half * before
        latents = following / t * latents + (1 - following / t) * target
        before = denoised
    return latents


@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_dpmpp_2m_equals_its_formula(steps):
    noise, times = random(1, 16, 2, 3), flow.sigmas(steps)
    expected = dpmpp_2m_in_numpy(
        lambda z, t: np.sin(3 * z) + t, noise.numpy(), times.double().numpy()
    )
    found = flow.sample(lambda z, t: torch.sin(3 * z) + t, noise, times.double(), "dpmpp_2m")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_dpmpp_2m_takes_times_that_are_given_twice():
    times = torch.tensor([1.0, 0.8, 0.8, 0.5, 0.5, 0.2, 0.0])
    found = flow.sample(lambda z, t: torch.sin(3 * z), random(1, 16, 2, 3), times, "dpmpp_2m")
    assert found.isfinite().all()


def test_guidance_of_the_denoised_is_guidance_of_the_velocity():
    latents, t = random(3, 16, 2, 2), torch.tensor(0.3, dtype=torch.float64)

    def velocity(z, t):
        return torch.cat([torch.sin(z[:3]), torch.cos(z[3:])])

    ours, official = (guide(velocity, 4.5)(latents, t) for guide in flow.GUIDANCE.values())
    torch.testing.assert_close(official, ours, rtol=1e-12, atol=1e-12)
    assert not torch.equal(official, ours)


def test_latents_can_be_changed_between_steps():
    seen = []

    def between(latents, t):
        seen.append(t.item())
        return latents + 1

    noise, times = random(1, 16, 2, 2).float(), flow.sigmas(3)
    run = list(flow.steps(lambda z, t: 0 * z, noise, times, between=between))
    assert seen == times[1:].tolist()
    torch.testing.assert_close(run[-1].next_latents, noise + 3)


def test_steps_give_every_time_and_chain_their_latents():
    noise, times = random(1, 16, 2, 2).float(), flow.sigmas(5)
    seen = list(flow.steps(lambda z, t: z * t, noise, times))
    assert [step.i for step in seen] == list(range(5))
    assert torch.equal(torch.stack([step.t for step in seen]), times[:-1])
    for before, after in pairwise(seen):
        assert torch.equal(before.next_latents, after.latents)
    first = seen[0]
    torch.testing.assert_close(first.denoised, noise - first.t * first.velocity)
    assert torch.equal(flow.sample(lambda z, t: z * t, noise, times), seen[-1].next_latents)


def test_latents_stay_float32_between_steps_of_a_float64_network():
    steps = flow.steps(lambda z, t: z.double() * t, random(1, 16, 2, 2).float(), flow.sigmas(3))
    assert {step.next_latents.dtype for step in steps} == {torch.float32}


def two_sided(z, t):
    """A velocity that answers 1 to the first half of the batch and 3 to the second."""
    return torch.cat([torch.full_like(half, v) for half, v in zip(z.chunk(2), (1, 3), strict=True)])


@pytest.mark.parametrize("scale", [1.5, 2.0, 7.0])
def test_guidance_leads_away_from_the_negative(scale):
    guided = flow.guide(two_sided, scale)(random(3, 16, 2, 2), torch.tensor(0.5))
    torch.testing.assert_close(guided, torch.full_like(guided, 1 + scale * 2))


@pytest.mark.parametrize("guide", flow.GUIDANCE.values())
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_guidance_of_one_or_less_is_the_conditional_alone(scale, guide):
    def velocity(z, t):
        return z + 1

    assert guide(velocity, scale) is velocity


def test_guidance_is_one_batched_pass():
    batches = []

    def velocity(z, t):
        batches.append(len(z))
        return z

    flow.guide(velocity, 4.0)(random(3, 16, 2, 2), torch.tensor(0.5))
    assert batches == [6]


def test_schedule_accepts_own_times_before_the_shift():
    found = flow.sigmas([1.0, 0.75, 0.5, 0.25], 3.0)
    np.testing.assert_allclose(found, [1.0, 0.9, 0.75, 0.5, 0.0], atol=1e-7)

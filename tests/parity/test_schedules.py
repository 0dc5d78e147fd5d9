"""The times of a run equal those of diffusers' FlowMatchEulerDiscreteScheduler."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from sd3min import flow

ONE_ULP = 1.2e-7  # the same float64 arithmetic, cast to float32
SHIFTS, STEPS = (1.0, 3.0, 6.0), (1, 4, 28, 50)


def scheduler(shift: float, **given) -> FlowMatchEulerDiscreteScheduler:
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(**given)
    return theirs


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", STEPS)
def test_official_schedule_equals_diffusers(steps, shift):
    theirs, ours = scheduler(shift, num_inference_steps=steps), flow.sigmas(steps, shift)
    torch.testing.assert_close(ours, theirs.sigmas, rtol=0, atol=ONE_ULP)
    timesteps = flow.TRAINED_TIMES * ours[:-1]
    torch.testing.assert_close(timesteps, theirs.timesteps, rtol=0, atol=1000 * ONE_ULP)


@pytest.mark.parametrize("shift", SHIFTS)
def test_own_sigmas_are_shifted_as_in_diffusers(shift):
    given = [1.0, 0.75, 0.5, 0.25, 0.01]
    theirs = scheduler(shift, sigmas=given).sigmas
    torch.testing.assert_close(flow.sigmas(given, shift), theirs, rtol=0, atol=ONE_ULP)


@pytest.mark.parametrize("steps", STEPS)
def test_single_shift_schedule_is_diffusers_with_the_shift_set_later(steps):
    """`set_shift` leaves the ends of the schedule where a shift of 1 put them."""
    theirs = FlowMatchEulerDiscreteScheduler(shift=1.0)
    theirs.set_shift(3.0)
    theirs.set_timesteps(steps)
    ours = flow.sigmas(steps, 3.0, "single_shift")
    torch.testing.assert_close(ours, theirs.sigmas, rtol=0, atol=ONE_ULP)


def test_euler_steps_equal_diffusers():
    theirs = scheduler(3.0, num_inference_steps=6)
    noise = torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(0))

    def velocity(z, t):
        return torch.sin(3 * z) + t

    expected = noise
    for t in theirs.timesteps:
        expected = theirs.step(velocity(expected, t / 1000), t, expected, return_dict=False)[0]
    ours = flow.sample(velocity, noise, flow.sigmas(6, 3.0))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)

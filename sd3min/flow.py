"""Rectified flow: the straight path from data to noise, and the way back.

Time t runs from 0 (data) to 1 (noise). On a straight path the noise level σ of other papers is t
itself. Everything here is a function of tensors, or of a function `velocity(latents, t)`; no
network is known.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

TRAINED_TIMES = 1000  # times that the networks were trained on, and the unit of their input: 1000·t

Latents = Float[Tensor, "b c h w"]
Velocity = Callable[[Tensor, Tensor], Tensor]
T = TypeVar("T", float, np.ndarray, Tensor)


def interpolate(data: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
    """z_t = (1 − t)·x0 + t·ε, the straight path (paper §3, "Rectified Flow", Eq. 13)."""
    return (1 - t) * data + t * noise


def velocity_target(data: Tensor, noise: Tensor) -> Tensor:
    """dz_t/dt = ε − x0: the velocity of one path (Eq. 5), here straight, and what the network is to
    give on average over all (paper §2, Eq. 8).
    """
    return noise - data


def denoise(latents: Tensor, velocity: Tensor, t: Tensor | float) -> Tensor:
    """x0 = z_t − t·v: the data that the velocity points at, where the straight path has t = 0."""
    return latents - t * velocity


def shift_times(t: T, shift: float) -> T:
    """t ↦ α·t / (1 + (α − 1)·t), as more pixels need more noise (paper §5.3.2, Eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def official_times(steps: int, shift: float) -> np.ndarray:
    """Times before the shift, as the official code and diffusers place them: from t = 1 down to
    shift(1/1000).

    The last time is the smallest trained one *after* its shift, and the whole row is then shifted
    once more. This double shift looks like an oversight, but every released picture was made with
    it: at shift 3 and 28 steps the last step starts from t = 0.0089 and not from 0.0030. Differs
    from the paper: there times are shifted once (§5.3.2), as `single_shift_times` has it.
    """
    first, last = shift_times(np.array([1.0, 1 / TRAINED_TIMES], dtype=np.float32), shift)
    return (
        np.linspace(float(first) * TRAINED_TIMES, float(last) * TRAINED_TIMES, steps)
        / TRAINED_TIMES
    )


def single_shift_times(steps: int, shift: float) -> np.ndarray:
    """Times before the shift, evenly from t = 1 down to the smallest trained one, 1/1000."""
    return np.linspace(1.0, 1 / TRAINED_TIMES, steps)


SCHEDULES = {"official": official_times, "single_shift": single_shift_times}


def sigmas(
    steps: int | Sequence[float], shift: float = 3.0, schedule: str = "official"
) -> Float[Tensor, " times"]:
    """Times of a run in float32, from noise to data: `steps` of them and a last 0.

    A sequence in place of a number gives the times themselves, before the shift, as in diffusers.
    Raises KeyError where the schedule is none of `SCHEDULES`.
    """
    if isinstance(steps, Sequence):
        times = np.array(steps, dtype=np.float32)
    else:
        times = SCHEDULES[schedule](steps, shift)
    return torch.tensor([*shift_times(times, shift), 0.0], dtype=torch.float32)


def guide(velocity: Velocity, scale: float) -> Velocity:
    """Classifier-free guidance: v = v₋ + s·(v₊ − v₋), both from one pass over a doubled batch.

    `velocity` sees the latents twice: its first half must answer to the negative prompt, the second
    to the prompt. A scale of 1 or less leaves the conditional alone, and `velocity` sees the
    latents once.
    """
    if scale <= 1:
        return velocity

    def guided(latents: Tensor, t: Tensor) -> Tensor:
        negative, positive = velocity(torch.cat([latents, latents]), t).chunk(2)
        return negative + scale * (positive - negative)

    return guided


def guide_denoised(velocity: Velocity, scale: float) -> Velocity:
    """Guidance as the official code has it: of the data pointed at, x0 = x0₋ + s·(x0₊ − x0₋).

    The velocity that points there is `guide`'s but for rounding.
    """
    if scale <= 1:
        return velocity

    def guided(latents: Tensor, t: Tensor) -> Tensor:
        velocities = velocity(torch.cat([latents, latents]), t).chunk(2)
        negative, positive = (denoise(latents, v, t) for v in velocities)
        return (latents - (negative + (positive - negative) * scale)) / t

    return guided


GUIDANCE = {"velocity": guide, "denoised": guide_denoised}


class Step(NamedTuple):
    """One step of a run, taken at time t: where it started, what was predicted, where it led."""

    i: int
    t: Tensor
    latents: Tensor
    velocity: Tensor
    denoised: Tensor  # the data that the velocity points at
    next_latents: Tensor


def euler(
    latents: Tensor, velocity: Tensor, t: Tensor, t_next: Tensor, before: Step | None = None
) -> Tensor:
    """One step along the tangent, dz = v·dt (paper §2, Eq. 1)."""
    return latents + (t_next - t) * velocity


def dpmpp_2m(
    latents: Tensor, velocity: Tensor, t: Tensor, t_next: Tensor, before: Step | None = None
) -> Tensor:
    """One step of DPM-Solver++(2M) as sd3.5 and k-diffusion have it, with λ = −ln t.

    z' = (t'/t)·z + (1 − t'/t)·x̄0, where x̄0 = x0 + (x0 − x0 before)·(λ' − λ) / (2·(λ − λ before))
    is the data pointed at, carried on to the middle of the step. Without that term this is Euler's
    step, as the first one and the last are. diffusers' solver of that name takes λ = ln((1 − t)/t).
    """
    if before is None or before.t == t or t_next == 0:
        return euler(latents, velocity, t, t_next)
    denoised = denoise(latents, velocity, t)
    weight = torch.log(t / t_next) / torch.log(before.t / t) / 2
    ahead = denoised + weight * (denoised - before.denoised)
    return t_next / t * latents + (1 - t_next / t) * ahead


SAMPLERS = {"euler": euler, "dpmpp_2m": dpmpp_2m}


def steps(
    velocity: Velocity,
    noise: Tensor,
    sigmas: Tensor,
    sampler: str = "euler",
    between: Velocity | None = None,
) -> Iterator[Step]:
    """Follow the velocity from the first time to the last, giving every step as it is taken.

    A step is taken in float32 or better, and its latents have the type of the noise. `between` may
    change those that a step leads to, given them and their time.
    """
    latents, before = noise, None
    for i, (t, t_next) in enumerate(pairwise(sigmas)):
        v = velocity(latents, t)
        exact = latents.to(torch.promote_types(latents.dtype, torch.float32))
        following = SAMPLERS[sampler](exact, v, t, t_next, before).to(noise.dtype)
        following = between(following, t_next) if between else following
        before = Step(i, t, latents, v, denoise(exact, v, t), following)
        yield before
        latents = following


def sample(velocity: Velocity, noise: Latents, sigmas: Tensor, sampler: str = "euler") -> Latents:
    """Solve dz = v(z, t)·dt from noise to data."""
    return [step.next_latents for step in steps(velocity, noise, sigmas, sampler)][-1]

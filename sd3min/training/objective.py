"""What training makes small: the paper's flow matching, and what diffusers and kohya make of it.

Every objective is the mean of w(t)·|v(z_t, t) − (ε − x0)|² over times drawn by some rule. The
peers write it otherwise, and train at other times; `diffusers` and `kohya` say which.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from sd3min import flow
from sd3min.config import Refusal
from sd3min.densities import (
    CosMap,
    Density,
    LogitNormal,
    Mode,
    Shifted,
    Times,
    Uniform,
    check_shift,
)

SCHEMES = ("sigma_sqrt", "logit_normal", "mode", "cosmap", "none")  # of diffusers and kohya
VALIDATION_TIMES = 8


def velocity_errors(
    velocity: flow.Velocity,
    data: flow.Latents,
    noise: flow.Latents,
    t: Float[Tensor, " b"],
    teacher: flow.Velocity | None = None,
) -> Float[Tensor, " b"]:
    """Mean of |v(z_t, t) − (ε − x0)|² over each picture's values, in float32 or better.

    With a `teacher` it is the mean of |v(z_t, t) − teacher(z_t, t)|².
    """
    latents = flow.interpolate(data, noise, t[:, None, None, None])
    predicted = velocity(latents, t)  # first, since autocast keeps the casts that it makes
    exact = predicted.to(torch.promote_types(predicted.dtype, torch.float32))
    target = teacher(latents, t) if teacher else flow.velocity_target(data, noise)
    return (exact - target).square().mean(dim=(1, 2, 3))


def flow_matching_loss(
    velocity: flow.Velocity, data: flow.Latents, noise: flow.Latents, t: Float[Tensor, " b"]
) -> Tensor:
    """Mean of |v(z_t, t) − (ε − x0)|² over all values of all pictures, one number (§2, Eq. 8)."""
    return velocity_errors(velocity, data, noise, t).mean()


@dataclass(frozen=True)
class Weight:
    """w(t) = t^power · π(t) of a density; 1 where nothing is given."""

    power: int = 0
    density: Density = field(default_factory=Uniform)

    def __call__(self, t: Tensor) -> Tensor:
        """The weight of every time."""
        return t**self.power * self.density.pdf(t)


@dataclass(frozen=True)
class Objective:
    """Which times are trained on, and how much an error counts at each."""

    times: Times
    weight: Weight = field(default_factory=Weight)

    def weighted(self, errors: Float[Tensor, " b"], t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """The loss of every picture, from its `velocity_errors`."""
        return self.weight(t) * errors

    def loss(
        self,
        velocity: flow.Velocity,
        data: flow.Latents,
        noise: flow.Latents,
        t: Float[Tensor, " b"],
    ) -> Tensor:
        """The mean loss, one number, of pictures at times that `times` drew."""
        return self.weighted(velocity_errors(velocity, data, noise, t), t).mean()


def paper(density: Density | None = None, shift: float = 3.0) -> Objective:
    """Conditional flow matching at shifted times, by default rf/lognorm(0, 1) (§3.1; Eq. 23)."""
    return Objective(Shifted(density or LogitNormal(), shift))


@dataclass(frozen=True)
class CountedDown:
    """diffusers' times: u in whole thousandths counts down from noise, and is then shifted.

    A small u is a time near noise: a density's times come out reflected, 1 − u.
    """

    density: Density
    shift: float

    def __post_init__(self) -> None:
        """Refuse a shift that is none."""
        check_shift(self.shift)

    def sample(self, count: int, generator: Generator) -> Float[Tensor, " count"]:
        """σ of entry ⌊1000·u⌋ of the scheduler's table, which falls from 1."""
        index = (flow.TRAINED_TIMES * self.density.sample(count, generator)).long()
        return flow.shift_times((flow.TRAINED_TIMES - index) / flow.TRAINED_TIMES, self.shift)


@dataclass(frozen=True)
class CountedUp:
    """kohya's times: u is shifted, then cut to whole thousandths."""

    density: Density
    shift: float

    def __post_init__(self) -> None:
        """Refuse a shift that is none."""
        check_shift(self.shift)

    def sample(self, count: int, generator: Generator) -> Float[Tensor, " count"]:
        """σ = ⌊1000·shift(u)⌋ / 1000."""
        u = flow.shift_times(self.density.sample(count, generator), self.shift)
        return (flow.TRAINED_TIMES * u).long() / flow.TRAINED_TIMES


def scheme_density(scheme: str, mean: float, scale: float, mode_scale: float) -> Density:
    """The density of u under a scheme of diffusers and kohya; refused if not of `SCHEMES`."""
    if scheme not in SCHEMES:
        raise Refusal(f"weighting scheme {scheme} is not one of {', '.join(SCHEMES)}")
    if scheme == "logit_normal":
        return LogitNormal(mean, scale)
    return Mode(mode_scale) if scheme == "mode" else Uniform()


def scheme_weight(scheme: str, preconditioned: bool) -> Weight:
    """What a weighting scheme makes an error of the velocity count.

    Preconditioned, the network's output becomes the data that it points at, z − σ·v, and the error
    of that is σ times the velocity's. `sigma_sqrt` is σ⁻²: it undoes the preconditioning.
    """
    power = 2 * preconditioned - 2 * (scheme == "sigma_sqrt")
    return Weight(power, CosMap()) if scheme == "cosmap" else Weight(power)


def diffusers(
    scheme: str = "logit_normal",
    shift: float = 3.0,
    preconditioned: bool = True,
    mean: float = 0.0,
    scale: float = 1.0,
    mode_scale: float = 1.29,
) -> Objective:
    """The objective of diffusers' `train_dreambooth_lora_sd3.py`, with its options' defaults.

    Its schemes `sigma_sqrt` and `cosmap` weigh uniform times; `mode` and `logit_normal` choose
    times, and its mean has the opposite sign of the paper's.
    """
    density = scheme_density(scheme, mean, scale, mode_scale)
    return Objective(CountedDown(density, shift), scheme_weight(scheme, preconditioned))


def kohya(
    scheme: str = "uniform",
    shift: float = 1.0,
    mean: float = 0.0,
    scale: float = 1.0,
    mode_scale: float = 1.29,
) -> Objective:
    """The objective of kohya's `sd3_train_network.py`: always preconditioned, `uniform` for
    diffusers' `none`.
    """
    scheme = "none" if scheme == "uniform" else scheme
    density = scheme_density(scheme, mean, scale, mode_scale)
    return Objective(CountedUp(density, shift), scheme_weight(scheme, preconditioned=True))


OBJECTIVES = {"paper": paper, "diffusers": diffusers, "kohya": kohya}


@torch.no_grad()
def validation_losses(
    velocity: flow.Velocity, data: flow.Latents, noise: flow.Latents, count: int = VALIDATION_TIMES
) -> Float[Tensor, " times"]:
    """Flow-matching loss at equidistant times, the same noise at each; their mean is the paper's
    validation loss (§5.3.3; App. B.3), which follows human preference.

    Differs from the paper: the times are the middles of `count` equal parts of [0, 1], where the
    paper spaces eight equally and leaves the last, t = 1, out of the mean. At t = 0 there would be
    the noise's variance, which no network can lower.
    """
    times = (torch.arange(count, device=data.device) + 0.5) / count
    losses = [flow_matching_loss(velocity, data, noise, t.expand(len(data))) for t in times]
    return torch.stack(losses)


def validation_figures(losses: Float[Tensor, " times"]) -> dict[str, float]:
    """A validation loss and its part at each of its equidistant times, by the names of logs."""
    times = [(i + 0.5) / len(losses) for i in range(len(losses))]
    by_time = {f"validation_t{t:g}": m for t, m in zip(times, losses.tolist(), strict=True)}
    return {"validation": losses.mean().item()} | by_time


class LossByTime:
    """Mean errors in equal bins of t, gathered over steps.

    `totals` [2, bins] holds sums and counts in float64: those of several processes add up.
    """

    def __init__(self, bins: int = VALIDATION_TIMES):
        self.totals = torch.zeros(2, bins, dtype=torch.float64)

    def add(self, errors: Float[Tensor, " b"], t: Float[Tensor, " b"]) -> None:
        """Take in the errors of a batch; t = 1 belongs to the last bin."""
        bins = self.totals.shape[1]
        places = (t.cpu() * bins).long().clamp(max=bins - 1)
        values = errors.detach().cpu().double()
        self.totals.index_add_(1, places, torch.stack([values, torch.ones_like(values)]))

    def means(self) -> list[float | None]:
        """Mean of each bin, nothing where it is empty."""
        sums, counts = self.totals.tolist()
        return [s / n if n else None for s, n in zip(sums, counts, strict=True)]

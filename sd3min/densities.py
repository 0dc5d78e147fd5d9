"""How often each time is trained on: densities of t in [0, 1] (paper §3.1), and their shift.

Uniform times spend too much on the ends of the path, where the velocity is easy: it is the mean of
the data at t = 1 and of the noise at t = 0. The paper's densities favour its middle.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from sd3min import flow
from sd3min.config import Refusal

MODE_BOUNDS = (-1.0, 2 / (math.pi - 2))  # of s, between which the mode's map is monotone
HALVINGS = 53  # of the interval in which a map is inverted: float64 can tell no more


@runtime_checkable
class Times(Protocol):
    """A rule by which times are drawn."""

    def sample(self, count: int, generator: Generator) -> Float[Tensor, " count"]:
        """Times in float32, drawn by the generator alone."""
        ...


@runtime_checkable
class Density(Times, Protocol):
    """Times that have a density."""

    def pdf(self, t: Tensor) -> Tensor:
        """Density π(t) of times of any shape, which integrates to one over [0, 1]."""
        ...


@dataclass(frozen=True)
class Uniform:
    """Every time alike: π(t) = 1, the paper's plain `rf`."""

    def sample(self, count: int, generator: Generator) -> Float[Tensor, " count"]:
        """t = u, u ~ U(0, 1)."""
        return torch.rand(count, generator=generator)

    def pdf(self, t: Tensor) -> Tensor:
        """π(t) = 1."""
        return torch.ones_like(t)


@dataclass(frozen=True)
class LogitNormal:
    """`rf/lognorm(mean, scale)`, most often near t = sigmoid(mean) (paper §3.1, Eq. 19).

    A mean below zero favours data, one above it noise. The ends have no density.
    """

    mean: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what is no normal distribution."""
        if not (math.isfinite(self.mean) and 0 < self.scale < math.inf):
            given = f"logit-normal mean {self.mean} and scale {self.scale}"
            raise Refusal(f"{given} make no distribution: pass numbers, the scale above 0")

    def sample(self, count: int, generator: Generator) -> Float[Tensor, " count"]:
        """t = sigmoid(u), u ~ N(mean, scale²)."""
        return (self.mean + self.scale * torch.randn(count, generator=generator)).sigmoid()

    def pdf(self, t: Tensor) -> Tensor:
        """π(t) = exp(−(logit t − m)² / 2s²) / (s·√2π · t·(1 − t)); 0 at the ends."""
        normal = torch.exp(-(((torch.logit(t) - self.mean) / self.scale) ** 2) / 2)
        return (normal / (self.scale * math.sqrt(2 * math.pi) * t * (1 - t))).nan_to_num(nan=0.0)


def mode_map(u: Tensor, scale: float) -> Tensor:
    """f(u; s) = 1 − u − s·(cos²(π·u/2) − 1 + u), from 1 at u = 0 to 0 at u = 1 (§3.1, Eq. 20)."""
    return 1 - u - scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)


@dataclass(frozen=True)
class Mode:
    """`rf/mode(scale)`: heavy tails about t = 1/2, favoured where s > 0 (paper §3.1, Eq. 20).

    The map falls for −1 ≤ s ≤ 2/(π − 2) alone; outside, its times have no such density.
    """

    scale: float = 1.29

    def __post_init__(self) -> None:
        """Refuse a scale whose map turns back."""
        low, high = MODE_BOUNDS
        if not low <= self.scale <= high:
            wanted = f"a number from {low:g} to 2/(pi - 2) = {high:.4f}"
            raise Refusal(f"mode scale {self.scale} is not {wanted}, where its map is monotone")

    def sample(self, count: int, generator: Generator) -> Float[Tensor, " count"]:
        """t = f(u; s), u ~ U(0, 1)."""
        return mode_map(torch.rand(count, generator=generator), self.scale)

    def pdf(self, t: Tensor) -> Tensor:
        """π(t) = |d f⁻¹(t) / dt|, which has no closed form: f is inverted by halving."""
        low, high = torch.zeros_like(t), torch.ones_like(t)
        for _ in range(HALVINGS):
            u = (low + high) / 2
            before = mode_map(u, self.scale) > t
            low, high = torch.where(before, u, low), torch.where(before, high, u)
        slope = 1 + self.scale - self.scale * math.pi / 2 * torch.sin(math.pi * (low + high) / 2)
        return 1 / slope


@dataclass(frozen=True)
class CosMap:
    """Times whose signal-to-noise ratio is distributed as the cosine schedule's (paper §3.1,
    Eq. 21).
    """

    def sample(self, count: int, generator: Generator) -> Float[Tensor, " count"]:
        """t = 1 − 1/(tan(π·u/2) + 1), u ~ U(0, 1) (Eq. 21)."""
        return 1 - 1 / (torch.tan(math.pi / 2 * torch.rand(count, generator=generator)) + 1)

    def pdf(self, t: Tensor) -> Tensor:
        """π(t) = 2 / (π − 2π·t + 2π·t²) (Eq. 22)."""
        return 2 / (math.pi * (1 - 2 * t + 2 * t**2))


def check_shift(shift: float) -> None:
    """Refuse a shift that is no monotone map of [0, 1]."""
    if not 0 < shift < math.inf:
        raise Refusal(f"shift {shift} is not a number above 0")


@dataclass(frozen=True)
class Shifted:
    """Another density's times after the resolution shift (paper §5.3.2, Eq. 23)."""

    density: Density
    shift: float

    def __post_init__(self) -> None:
        """Refuse a shift that is none."""
        check_shift(self.shift)

    def sample(self, count: int, generator: Generator) -> Float[Tensor, " count"]:
        """t = shift(u), u drawn from the density."""
        return flow.shift_times(self.density.sample(count, generator), self.shift)

    def pdf(self, t: Tensor) -> Tensor:
        """π(t) = π₀(u)·du/dt at u = shift⁻¹(t), which is the shift by 1/α."""
        inverse = 1 / self.shift
        slope = inverse / (1 + (inverse - 1) * t) ** 2
        return self.density.pdf(flow.shift_times(t, inverse)) * slope

"""A recipe of training: how long, how fast and how carefully."""

import math
from dataclasses import dataclass
from datetime import timedelta

from sd3min.config import Refusal

PATIENCE = timedelta(hours=12)  # of processes that wait while the first makes what all need
PRECISIONS = ("bf16", "fp16", "no")  # as accelerate names them; "no" is float32


@dataclass(frozen=True)
class Recipe:
    """How long, how fast and how carefully to train; the optimizer is AdamW, with ε as in the paper
    (§5.3.2). Raises Refusal where a value makes no sense.
    """

    steps: int
    learning_rate: float
    batch: int = 64  # of all processes and accumulated parts together
    accumulation: int = 1  # parts that a process cuts its share of a batch into
    warmup: int = 200  # steps over which the rate rises
    decay: float = 0.25  # of the steps, at the end, over which it falls to zero
    betas: tuple[float, float] = (0.9, 0.99)
    epsilon: float = 1e-15
    weight_decay: float = 0.01
    clip: float = 1.0  # largest norm of a gradient
    average: float = 0.0  # decay of the weights' moving average; 0 for none
    precision: str = "bf16"  # of the arithmetic; or "no" for float32
    save_every: int = 250

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulation", "save_every"):
            if getattr(self, name) < 1:
                raise Refusal(f"{name} of {getattr(self, name)} must be at least 1")
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise Refusal(f"{name} of {getattr(self, name)} is not a number above 0")
        if self.warmup < 0:
            raise Refusal(f"warmup of {self.warmup} must be 0 steps or more")
        for name in ("decay", "weight_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise Refusal(f"{name} of {getattr(self, name)} must be from 0 to 1")
        if not 0 <= self.average < 1:
            raise Refusal(f"average of {self.average} must be at least 0 and below 1")
        if self.precision not in PRECISIONS:
            raise Refusal(f"precision {self.precision} is not one of {', '.join(PRECISIONS)}")

    def rate(self, step: int) -> float:
        """Learning rate of a step, relative to the highest: up, level, and down to zero."""
        falling = max(1, round(self.steps * self.decay))
        return min(1.0, (step + 1) / max(1, self.warmup), (self.steps - step) / falling)

    def shares(self, rank: int, processes: int) -> list[slice]:
        """The parts of a batch that a process works through, one after the other."""
        parts = processes * self.accumulation
        if self.batch % parts:
            raise Refusal(
                f"a batch of {self.batch} does not divide among {processes} processes of "
                f"{self.accumulation} parts each; choose a multiple of {parts}"
            )
        size = self.batch // parts
        first = rank * self.accumulation
        return [slice(i * size, (i + 1) * size) for i in range(first, first + self.accumulation)]

"""The moving average of weights while they are trained, which often draws better than the last."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class Average:
    """w̄ ← d·w̄ + (1 − d)·w after every step, d at first smaller; a decay of 0 keeps no average."""

    def __init__(self, weights: Mapping[str, Tensor], decay: float):
        self.decay, self.steps = decay, 0
        self.live = dict(weights) if decay else {}
        self.kept = {name: p.detach().clone() for name, p in self.live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Follow the weights by one step."""
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 10))
        for name, parameter in self.live.items():
            self.kept[name].lerp_(parameter, 1 - decay)

    def state_dict(self) -> dict[str, object]:
        """What a checkpoint keeps."""
        return {"kept": self.kept, "steps": self.steps}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Go on from a checkpoint's average; ValueError where it is of other weights."""
        if state["kept"].keys() != self.kept.keys():
            raise ValueError("the checkpoint keeps an average of other weights, or none")
        self.steps = state["steps"]
        for name, tensor in state["kept"].items():
            self.kept[name].copy_(tensor)

    @torch.no_grad()
    def settle(self) -> None:
        """Leave the average in the weights' place for good."""
        for name, parameter in self.live.items():
            parameter.copy_(self.kept[name])

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The average in the weights' place for a while, then the weights again."""
        before: dict[str, Tensor] = {n: p.detach().clone() for n, p in self.live.items()}
        self.settle()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.live.items():
                    parameter.copy_(before[name])

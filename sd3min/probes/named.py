"""Tensors whose axes have names."""

from typing import NamedTuple

from torch import Tensor


class Named(NamedTuple):
    """A tensor, and what each of its axes counts."""

    values: Tensor
    axes: tuple[str, ...]

    def __str__(self) -> str:
        sides = zip(self.axes, self.values.shape, strict=True)
        return ", ".join(f"{axis} {size}" for axis, size in sides)

    def mean(self, *axes: str) -> "Named":
        """The mean over some axes, which are gone then."""
        dims = [self.axes.index(axis) for axis in axes]
        rest = tuple(axis for axis in self.axes if axis not in axes)
        return Named(self.values.mean(dim=dims), rest)

    def at(self, **places: int) -> "Named":
        """One place on some axes, which are gone then."""
        index = tuple(places.get(axis, slice(None)) for axis in self.axes)
        return Named(self.values[index], tuple(a for a in self.axes if a not in places))

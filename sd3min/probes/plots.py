"""Figures of what the probes saw, fit for a paper: each returns a matplotlib figure to save."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from sd3min.pipeline import Pipeline
from sd3min.probes.attention import QUADRANTS, Attention
from sd3min.probes.named import Named
from sd3min.probes.path import Path
from sd3min.probes.streams import PARTS

BROAD = 1.6  # inches of a small picture


def row_of(count: int, height: float = BROAD) -> tuple[Figure, Any]:
    """A figure with small square axes side by side."""
    figure = Figure(figsize=(BROAD * count, height + 0.3), layout="constrained")
    return figure, np.atleast_1d(figure.subplots(1, count))


def picture_on(axes: Any, picture: Image.Image, title: str) -> None:
    """A picture without ticks, under its title."""
    axes.imshow(np.asarray(picture), interpolation="nearest")
    axes.set_title(title, fontsize=8)
    axes.set_axis_off()


def heat(picture: Image.Image, seen: Attention, layer: int | None = None) -> Figure:
    """The picture, and beside it where each watched word was read, over steps, heads and layers."""
    figure, places = row_of(1 + len(seen.words))
    picture_on(places[0], picture, "picture")
    grey = np.asarray(picture.convert("L"))
    for axes, word in zip(places[1:], seen.words, strict=True):
        found = seen.heat(word) if layer is None else seen.heat(word).at(layer=layer)
        rest = tuple(a for a in found.axes if a not in ("row", "column"))
        values = found.mean(*rest).values.numpy()
        extent = (0, picture.width, picture.height, 0)
        axes.imshow(grey, cmap="gray", vmin=0, vmax=255, extent=extent)
        axes.imshow(values, cmap="inferno", alpha=0.75, extent=extent, interpolation="bilinear")
        axes.set_title(word, fontsize=8)
        axes.set_axis_off()
    return figure


def grid_of(values: np.ndarray, rows: str, columns: str, colours: str, title: str) -> Figure:
    """A table of values in colours."""
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest")
    axes.set(xlabel=columns, ylabel=rows, title=title)
    figure.colorbar(shown, label=colours)
    return figure


def quadrants(seen: Attention) -> Figure:
    """Shares of attention by layer and step, for each pair of streams."""
    means = seen.quadrants.mean("picture", "head").values.numpy()
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    drawn = []
    for i, (axes, name) in enumerate(zip(figure.subplots(1, 4), QUADRANTS, strict=True)):
        drawn.append(axes.imshow(means[..., i].T, aspect="auto", vmin=0, vmax=1, cmap="viridis"))
        axes.set(title=name, xlabel="step", ylabel="" if i else "layer")
        axes.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(drawn[0], ax=figure.axes, label="share of attention")
    return figure


def entropy(seen: Attention) -> Figure:
    """Entropy of the image's attention and the largest logit, by layer, over steps."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    sharp = seen.entropy.mean("picture", "head").values[..., 1].numpy()
    largest = seen.largest_logit.values.amax(dim=(2, 3)).numpy()
    for layer in range(sharp.shape[1]):
        left.plot(sharp[:, layer], label=f"layer {layer}")
        right.plot(largest[:, layer])
    left.set(xlabel="step", ylabel="entropy of image's queries, nats")
    right.set(xlabel="step", ylabel="largest logit")
    left.legend(frameon=False, fontsize=7)
    return figure


def steps(pipe: Pipeline, walked: Path, count: int = 8) -> Figure:
    """What was pointed at in some steps from the first to the last, decoded."""
    pictures = walked.pictures(pipe)
    chosen = np.unique(np.linspace(0, len(pictures) - 1, count).round().astype(int))
    figure, places = row_of(len(chosen))
    for axes, i in zip(places, chosen, strict=True):
        picture_on(axes, pictures[i], f"t = {walked.times[i]:.2f}")
    return figure


def speeds(walked: Path) -> Figure:
    """The velocity's size and how far it turns, over time."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    times = walked.times.numpy()
    left.plot(times[:-1], walked.speeds.values.numpy())
    left.set(xlabel="t", ylabel="velocity, root mean square")
    right.plot(times[1:-1], walked.turns.values.numpy())
    right.set(xlabel="t", ylabel="cosine to the step before")
    for axes in (left, right):
        axes.invert_xaxis()
    return figure


def modulation(found: Named, times: Sequence[float]) -> Figure:
    """Size of every part of the modulation by layer, a line for each time."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    values = found.values.numpy()
    for i, axes in enumerate(figure.subplots(2, 3, sharex=True).flat):
        for place, t in enumerate(times):
            axes.plot(values[place, :, i], label=f"t = {t:.2f}")
        axes.set(title=PARTS[i], xlabel="layer")
    figure.axes[0].legend(frameon=False, fontsize=7)
    return figure


def similarity(found: Named, layer: int = -1) -> Figure:
    """Cosines between the tokens of a layer."""
    values = found.values[layer, 0].numpy()
    return grid_of(values, "token", "token", "cosine", f"layer {range(len(found.values))[layer]}")

"""Curves of a run's figures."""

import json
from pathlib import Path

import numpy as np

WINDOW = 50  # steps over which curves are smoothed


def smoothed(values: list[float]) -> np.ndarray:
    """Means of as many values before each, the value itself included."""
    sums = np.cumsum([0.0, *values])
    first = np.maximum(np.arange(len(values)) - WINDOW + 1, 0)
    return (sums[1:] - sums[first]) / (np.arange(len(values)) - first + 1)


def draw(log: Path, path: Path) -> None:
    """Draw the losses of a `metrics.jsonl`: on the whole, by time where they are told so, and the
    validation's."""
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in log.read_text().splitlines()]
    known = sorted({name for line in lines for name in line})
    names = [name for name in known if name.startswith("loss")]
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for name in names:
        told = [(line["step"], line[name]) for line in lines if name in line]
        steps, values = zip(*told, strict=True)
        label = name.replace("loss_t", "from t = ")
        axes.plot(steps, smoothed(list(values)), label=label, linewidth=2 if name == "loss" else 1)
    if "validation" in known:  # rare and steady: drawn as it is
        told = [(line["step"], line["validation"]) for line in lines if "validation" in line]
        axes.plot(*zip(*told, strict=True), label="validation", marker="o", color="black")
    axes.set(xlabel="step", ylabel=f"loss, mean of {WINDOW} steps", yscale="log")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120, format="png")

"""Which times to train on: the paper's Table 1 in small (§5.1). Equal networks see equal
batches, and only the density of times differs.

    python tools/densities.py --work FOLDER [--weights FILE] [--out FILE]

The task is a part of sd3-tiny's, and no text is read: scenes of one shape, told by the labels of
shape, colour and ground, whose embeddings are learnt, in the latents of sd3-tiny's autoencoder.
The network is an MMDiT of depth 3; a tenth of the labels is left out for guidance. Each density is
trained with three seeds. Measured are the validation loss at eight equidistant times on other
pictures of the same labels, the share of pictures that the detector finds right in 5 and in 28
guided steps, and how straight the paths are without guidance: their length over the distance of
their ends. Runs that are done are kept in FOLDER.
"""

import argparse
import dataclasses
import itertools
import json
import random
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

import sd3min
from sd3min import flow
from sd3min.autoencoder import Autoencoder
from sd3min.checkpoint import fingerprint, tiny
from sd3min.config import MMDiTConfig
from sd3min.densities import CosMap, LogitNormal, Mode, Times, Uniform
from sd3min.files import whole
from sd3min.mmdit import MMDiT, position_table
from sd3min.pipeline import to_pictures
from sd3min.training import records, scenes
from sd3min.training.detector import judge
from sd3min.training.images import drawn
from sd3min.training.objective import validation_losses, velocity_errors
from sd3min.training.trainer import Losses, Recipe, Task, fit

DENSITIES: dict[str, Times] = {
    "uniform": Uniform(),
    "logit-normal(0, 1)": LogitNormal(0.0, 1.0),
    "logit-normal(0.5, 0.6)": LogitNormal(0.5, 0.6),
    "mode(1.29)": Mode(1.29),
    "CosMap": CosMap(),
}
RANKS = {  # Table 1: over all settings, with 5 steps, with 50 steps
    "uniform": (5.67, 6.50, 5.75),
    "logit-normal(0, 1)": (1.54, 1.25, 1.50),
    "logit-normal(0.5, 0.6)": (2.71, 8.50, 1.00),
    "mode(1.29)": (2.75, 3.25, 3.00),
    "CosMap": (4.13, 3.75, 4.00),
}
FIGURES = Path(__file__).parents[1] / "weights" / "figures"
SEEDS = 3
DEPTH, LABEL_WIDTH = 3, 64
NO_LABELS, GUIDANCE = 0.1, 3.0
TRAINED, VALIDATED = 4096, 256  # pictures
CHUNK = 64  # pictures that are encoded or decoded at once
STEPS = 5, 28
MEASURED = {  # and whether more is better
    "validation loss": False,
    "right in 5 steps": True,
    "right in 28 steps": True,
    "path over distance": False,
}
LABELS = list(scenes.SHAPES), list(scenes.COLOURS), list(scenes.BACKGROUNDS)
ALL = [
    scenes.Scene(scenes.Thing(shape, colour), (), background)
    for shape, colour, background in itertools.product(*LABELS)
]
RECIPE = Recipe(steps=1000, learning_rate=1e-3, batch=64, warmup=100, average=0.99, save_every=500)


def labels(wanted: Iterable[scenes.Scene]) -> Tensor:
    """Numbers of each scene's shape, colour and background, [b, 3]; 0 is for no label."""
    told = [(scene.first.noun, str(scene.first.colour), scene.background) for scene in wanted]
    return torch.tensor(
        [[1 + known.index(n) for known, n in zip(LABELS, names, strict=True)] for names in told]
    )


class Labelled(nn.Module):
    """An MMDiT that is told labels: each is a row of the context, their mean is pooled."""

    def __init__(self):
        super().__init__()
        config = MMDiTConfig(DEPTH, context_width=LABEL_WIDTH, pooled_width=LABEL_WIDTH, grid=8)
        self.mmdit = MMDiT(config)
        self.labels = nn.ModuleList(nn.Embedding(1 + len(known), LABEL_WIDTH) for known in LABELS)
        self.mmdit.pos_embed.copy_(position_table(config.width, 8, 128, 128))
        for name, parameter in self.mmdit.named_parameters():
            if "adaLN_modulation" in name or "final_layer.linear" in name:
                nn.init.zeros_(parameter)
        self.compiled = torch.compile(self.mmdit.forward)

    def velocity(self, labels: Tensor) -> flow.Velocity:
        """The velocity of pictures of these labels."""
        told = zip(self.labels, labels.T, strict=True)
        rows = torch.stack([embedding(numbers) for embedding, numbers in told], dim=1)

        def velocity(z: Tensor, t: Tensor) -> Tensor:
            times = (flow.TRAINED_TIMES * t).expand(len(z))
            return self.compiled(z, times, rows, rows.mean(dim=1))

        return velocity


class Labels(Task):
    """Flow matching with times of one density."""

    def __init__(self, times: Times, latents: Tensor, labels: Tensor, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.network = Labelled()
        self.times, self.latents, self.labels, self.seed = times, latents, labels, seed

    def forward(self, step: int, part: slice) -> Losses:
        """Losses of a part of a step's batch; seed and step decide every draw but the density."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + step)
        indices = torch.randint(len(self.latents), (RECIPE.batch,), generator=generator)
        data = self.latents[indices]
        told = self.labels[indices] * (torch.rand(len(data), 1, generator=generator) >= NO_LABELS)
        noise = torch.randn(data.shape, generator=generator)
        t = self.times.sample(len(data), generator)[part]
        velocity = self.network.velocity(told[part])
        return Losses(velocity_errors(velocity, data[part], noise[part], t), t)


@torch.no_grad()
def encoded(autoencoder: Autoencoder, seed: str, count: int) -> tuple[Tensor, Tensor]:
    """Latents and labels of random scenes of one shape."""
    rng = random.Random(seed)
    wanted = rng.choices(ALL, k=count)
    chunks = [wanted[i : i + CHUNK] for i in range(0, count, CHUNK)]
    latents = [autoencoder.encode(drawn(chunk, rng)) for chunk in chunks]
    return torch.cat(latents), labels(wanted)


def equal(steps: int) -> Tensor:
    """Times of so many equal steps, from 1 to 0."""
    return torch.linspace(1, 0, steps + 1)


@torch.no_grad()
def measure(network: Labelled, autoencoder: Autoencoder, validation: tuple[Tensor, Tensor]) -> dict:
    """All figures of a trained network."""
    latents, told = validation
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    losses = validation_losses(network.velocity(told), latents, noise)
    start = torch.randn((len(ALL), *latents.shape[1:]), generator=torch.Generator().manual_seed(1))
    wanted, figures = labels(ALL), {}
    doubled = network.velocity(torch.cat([torch.zeros_like(wanted), wanted]))
    guided, alone = flow.guide(doubled, GUIDANCE), network.velocity(wanted)
    for steps in STEPS:
        latents = flow.sample(guided, start, equal(steps)).split(CHUNK)
        pictures = [p for part in latents for p in to_pictures(autoencoder.decode(part))]
        right = [judge(p, scene).right for p, scene in zip(pictures, ALL, strict=True)]
        figures[f"right in {steps} steps"] = sum(right) / len(right)
    lengths, end = torch.zeros(len(start)), start
    for step in flow.steps(alone, start, equal(50)):
        end = step.next_latents
        lengths += (end - step.latents).flatten(1).norm(dim=1)
    distance = (end - start).flatten(1).norm(dim=1)
    return figures | {
        "validation": losses.tolist(),
        "validation loss": losses.mean().item(),
        "path over distance": (lengths / distance).mean().item(),
    }


def summary(results: dict, name: str, figure: str) -> tuple[float, float]:
    """Mean of a figure over the seeds, and how far the seeds lie apart."""
    found = [run[figure] for run in results["runs"] if run["density"] == name]
    return sum(found) / len(found), max(found) - min(found)


def table(results: dict) -> str:
    """Means over the seeds, with the distance of the farthest two, beside the paper's ranks."""
    ranks = ("rank in Table 1", "with 5 steps", "with 50")
    lines = [f"| times | {' | '.join((*MEASURED, *ranks))} |"]
    lines.append("|---" * (1 + len(MEASURED) + len(ranks)) + "|")
    for name, placed in results["ranks"].items():
        found = [summary(results, name, figure) for figure in MEASURED]
        cells = [f"{mean:.3f} ± {apart / 2:.3f}" for mean, apart in found]
        lines.append(f"| {' | '.join([name, *cells, *map(str, placed)])} |")
    return "\n".join(lines)


def plot(results: dict, path: Path) -> None:
    """Every run a dot, by density and figure; and the validation loss over time."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(MEASURED) + 1, figsize=(15, 3), layout="constrained")
    for panel, (name, more) in zip(panels, MEASURED.items(), strict=False):
        for row, density in enumerate(results["ranks"]):
            values = [run[name] for run in results["runs"] if run["density"] == density]
            panel.scatter(values, [row] * len(values), s=18, alpha=0.7)
            panel.scatter(sum(values) / len(values), row, marker="|", s=200, color="black")
        panel.set_title(f"{name} ({'more' if more else 'less'} is better)", fontsize=9)
        names = list(results["ranks"]) if panel is panels[0] else []
        panel.set_yticks(range(len(names)), names)
        panel.invert_yaxis()
        panel.locator_params(axis="x", nbins=4)
    for density in results["ranks"]:
        losses = [run["validation"] for run in results["runs"] if run["density"] == density]
        means = torch.tensor(losses).mean(dim=0)
        times = (torch.arange(len(means)) + 0.5) / len(means)
        panels[-1].plot(times, means, marker=".", label=density)
    panels[-1].set(xlabel="t", title="validation loss")
    panels[-1].legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train and measure what is not there yet; write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--weights", type=Path, help="of the autoencoder (default: sd3-tiny)")
    parser.add_argument("--out", type=Path, default=FIGURES / "densities.json")
    arguments = parser.parse_args()
    autoencoder = sd3min.load_autoencoder(arguments.weights, device="cpu")
    recipe = dataclasses.asdict(RECIPE) | {"weights": fingerprint(arguments.weights or tiny())}
    recipe |= {
        "guidance": GUIDANCE,
        "depth": DEPTH,
        "labels": LABEL_WIDTH,
        "pictures": [TRAINED, VALIDATED],
    }
    records.make(arguments.work)
    records.settle(arguments.work / "recipe.json", recipe)
    training = encoded(autoencoder, "trained", TRAINED)
    validation = encoded(autoencoder, "validated", VALIDATED)
    runs = []
    for seed, (name, density) in itertools.product(range(SEEDS), DENSITIES.items()):
        folder = arguments.work / f"{name} {seed}"
        done = folder / "figures.json"
        if not done.exists():
            task = Labels(density, *training, seed)
            fit(task, RECIPE, folder)
            with whole(done) as part:
                part.write_text(json.dumps(measure(task.network, autoencoder, validation)))
        runs.append({"density": name, "seed": seed} | json.loads(done.read_text()))
    results = {"recipe": recipe, "ranks": RANKS, "runs": runs}
    with whole(arguments.out) as part:
        part.write_text(json.dumps(results, indent=2) + "\n")
    plot(results, arguments.out.with_suffix(".png"))
    print(table(results))


if __name__ == "__main__":
    main()

"""The training loop: one script for one process and for several.

A task's loss at step i depends on i alone: its data, noise and times are drawn from seeds made of
i, for the whole batch, of which every process takes its part. So several processes follow one
process's losses, and a run that was killed goes on exactly as it would have.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from sd3min.config import Refusal
from sd3min.training import curves
from sd3min.training.ema import Average


class Losses(NamedTuple):
    """Losses of the examples of a part of a batch, and the times that they were taken at."""

    values: Tensor
    times: Tensor | None = None


class Task(nn.Module):
    """Something to learn: `forward(step, part)` gives the losses of that part of a step's batch."""

    def forward(self, step: int, part: slice) -> Losses:
        """Losses of the examples `part` of the batch of a step."""
        raise TypeError(f"{type(self).__name__} does not say what its losses are")

    def describe(self, step: int) -> str:
        """Name the batch of a step, for a message."""
        return f"batch {step}"


@dataclass(frozen=True)
class Recipe:
    """How long, how fast and how carefully to train; the optimizer is AdamW, with ε as in the paper
    (App. B.3)."""

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

    def rate(self, step: int) -> float:
        """Learning rate of a step, relative to the highest: up, level, and down to zero."""
        falling = max(1, round(self.steps * self.decay))
        return min(1.0, (step + 1) / max(1, self.warmup), (self.steps - step) / falling)


def save(state: object, path: Path) -> None:
    """Write a checkpoint whole or not at all; Refusal says so where the disk is full."""
    part = path.with_suffix(".part")
    try:
        with part.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch's writer makes the one into the other
        part.unlink(missing_ok=True)
        raise OSError(
            f"could not write the checkpoint {path}, the last one stays: {error}"
        ) from error
    os.replace(part, path)


def shares(recipe: Recipe, rank: int, processes: int) -> list[slice]:
    """The parts of a batch that a process works through, one after the other."""
    parts = processes * recipe.accumulation
    if recipe.batch % parts:
        raise Refusal(
            f"a batch of {recipe.batch} does not divide among {processes} processes of "
            f"{recipe.accumulation} parts each; choose a multiple of {parts}"
        )
    size = recipe.batch // parts
    first = rank * recipe.accumulation
    return [slice(i * size, (i + 1) * size) for i in range(first, first + recipe.accumulation)]


def by_time(values: Tensor, times: Tensor, bins: int = 4) -> dict[str, float]:
    """Mean loss of the examples whose time lies in each of some equal bins from 0 to 1."""
    index = (times * bins).long().clamp(max=bins - 1)
    means = {i: values[index == i].double().mean().item() for i in range(bins)}
    return {f"loss_t{i / bins:g}": mean for i, mean in means.items() if not math.isnan(mean)}


class Run:
    """A task on its way: trained weights, optimizer and step, kept together in one file."""

    def __init__(self, task: Task, recipe: Recipe, path: Path):
        self.recipe, self.path, self.step = recipe, path, 0
        self.accelerator = Accelerator(mixed_precision=recipe.precision)
        self.trained = {n: p for n, p in task.named_parameters() if p.requires_grad}
        self.parameters = list(self.trained.values())
        optimizer = torch.optim.AdamW(
            self.parameters,
            lr=0.0,
            betas=recipe.betas,
            eps=recipe.epsilon,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self.task = task
        self.average = Average(self.trained, recipe.average)
        self.model, self.optimizer = self.accelerator.prepare(task, optimizer)
        self.parts = shares(recipe, self.accelerator.process_index, self.accelerator.num_processes)
        if path.exists():
            self._resume()

    def _resume(self) -> None:
        """Go on from the checkpoint; Refusal where it is of another task."""
        state = torch.load(self.path, map_location="cpu")
        fits = {n: p.shape for n, p in self.trained.items()}
        if {n: p.shape for n, p in state["trained"].items()} != fits:
            raise Refusal(f"{self.path} is of another run: name another folder, or remove it")
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(state["trained"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.load_state_dict(state["average"])
        self.step = state["step"]

    def save(self) -> None:
        """Write the checkpoint, from the first process."""
        if self.accelerator.is_main_process:
            state = {
                "trained": {name: p.detach() for name, p in self.trained.items()},
                "optimizer": self.optimizer.state_dict(),
                "average": self.average.state_dict(),
                "step": self.step,
            }
            save(state, self.path)
        self.accelerator.wait_for_everyone()

    def losses(self) -> Losses:
        """Losses of this process's share of the step's batch, with their gradient left behind."""
        parts = []
        for i, part in enumerate(self.parts):
            last = i == len(self.parts) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                with self.accelerator.autocast():
                    found = self.model(self.step, part)
                self.accelerator.backward(found.values.mean() / len(self.parts))
            parts.append(found)
        values = torch.cat([part.values.detach() for part in parts])
        times = [part.times for part in parts if part.times is not None]
        return Losses(values, torch.cat(times) if times else None)

    def advance(self) -> dict[str, float]:
        """Take one step; figures of it for the log."""
        began = time.monotonic()
        rate = self.recipe.learning_rate * self.recipe.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses = self.losses()
        values = self.accelerator.gather(losses.values)
        loss = values.double().mean().item()
        if not math.isfinite(loss):
            where = self.task.describe(self.step)
            raise Refusal(f"the loss is {loss} at step {self.step}, on {where}: lower the rate")
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update()
        figures = {"step": self.step, "loss": loss, "rate": rate, "norm": float(norm)}
        if losses.times is not None:
            figures |= by_time(values, self.accelerator.gather(losses.times))
        self.step += 1
        return figures | {"seconds": round(time.monotonic() - began, 3)}


def open_log(path: Path, step: int) -> Path:
    """Forget what a log says of the steps from `step` on."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] < step]
    path.write_text("".join(f"{line}\n" for line in kept))
    return path


def open_board(folder: Path) -> Any:
    """Where TensorBoard finds the figures; Refusal where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise Refusal("TensorBoard is not installed: pip install tensorboard") from None
    return SummaryWriter(str(folder / "tensorboard"))


def fit(
    task: Task,
    recipe: Recipe,
    folder: Path,
    look: Callable[[int], None] = lambda step: None,
    look_every: int = 1000,
    tensorboard: bool = False,
) -> None:
    """Train a task; a run that was begun in `folder` goes on from its checkpoint.

    The folder gets `checkpoint.pt`, and `metrics.jsonl` with a line a step: loss, rate, gradient's
    norm, seconds, and the loss by time; `metrics.png` draws them. `look(step)` is called now and
    then, with the averaged weights in place where there are any.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(task, recipe, folder / "checkpoint.pt")
    main = run.accelerator.is_main_process
    log = open_log(folder / "metrics.jsonl", run.step) if main else Path(os.devnull)
    board = open_board(folder) if tensorboard and main else None
    bar = tqdm(total=recipe.steps, initial=run.step, desc=folder.name, disable=not main)
    with log.open("a", buffering=1) as lines, bar:
        while run.step < recipe.steps:
            figures = run.advance()
            lines.write(json.dumps(figures) + "\n")
            if board is not None:
                for name, value in figures.items():
                    board.add_scalar(name, value, run.step)
            bar.set_postfix(loss=f"{figures['loss']:.4f}", refresh=False)
            bar.update()
            if run.step % recipe.save_every == 0 or run.step == recipe.steps:
                run.save()
            if main and (run.step % look_every == 0 or run.step == recipe.steps):
                curves.draw(log, folder / "metrics.png")
                with run.average.in_place():
                    look(run.step)
    run.average.settle()

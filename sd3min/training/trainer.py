"""The training loop: one script for one process and for several.

A task's loss at step i depends on i alone: its data, noise and times are drawn from seeds made of
i, for the whole batch, of which every process takes its part. So several processes follow one
process's losses, and a run that was killed goes on exactly as it would have.
"""

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from tqdm import tqdm

from sd3min.config import Refusal
from sd3min.training import records
from sd3min.training.ema import Average
from sd3min.training.recipe import Recipe


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


class Watch(NamedTuple):
    """What is done every so many steps with the averaged weights in place; its figures are kept."""

    every: int
    look: Callable[[int], Mapping[str, float]]


class Run:
    """A task on its way: trained weights, optimizer and step, kept together in one file."""

    def __init__(self, task: Task, recipe: Recipe, path: Path):
        self.task, self.recipe, self.path, self.step = task, recipe, path, 0
        on_cpu = all(parameter.device.type == "cpu" for parameter in task.parameters())
        AcceleratorState._reset_state()  # of a run before, which may have had another precision
        self.accelerator: Any = Accelerator(mixed_precision=recipe.precision, cpu=on_cpu)
        optimizer = torch.optim.AdamW(
            [parameter for parameter in task.parameters() if parameter.requires_grad],
            lr=0.0,
            betas=recipe.betas,
            eps=recipe.epsilon,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self.model, self.optimizer = self.accelerator.prepare(task, optimizer)
        self.scaler = self.accelerator.scaler  # of losses in fp16
        self.trained = {n: p for n, p in task.named_parameters() if p.requires_grad}
        self.average = Average(self.trained, recipe.average)
        self.parts = recipe.shares(self.accelerator.process_index, self.accelerator.num_processes)
        if path.exists():
            self._resume()

    def _resume(self) -> None:
        """Go on from the checkpoint; Refusal where it is of another task."""
        state, fits = records.load(self.path), {n: p.shape for n, p in self.trained.items()}
        try:
            if {n: p.shape for n, p in state["trained"].items()} != fits:
                raise ValueError("other weights")
            with torch.no_grad():
                for name, parameter in self.trained.items():
                    parameter.copy_(state["trained"][name])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average.load_state_dict(state["average"])
            if self.scaler is not None:
                self.scaler.load_state_dict(state["scaler"])
            self.step = state["step"]
        except (AttributeError, KeyError, TypeError, ValueError):
            raise Refusal(
                f"{self.path} is of another run: name another folder, or remove it"
            ) from None
        if self.step > self.recipe.steps:
            raise Refusal(
                f"{self.path} has gone {self.step} steps, and {self.recipe.steps} are asked for: "
                "ask for more, or name another folder"
            )

    def save(self) -> None:
        """Write the checkpoint, from the first process."""
        if self.accelerator.is_main_process:
            state = {
                "trained": {name: p.detach() for name, p in self.trained.items()},
                "optimizer": self.optimizer.state_dict(),
                "average": self.average.state_dict(),
                "scaler": self.scaler and self.scaler.state_dict(),
                "step": self.step,
            }
            records.save(state, self.path)
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
        self.check("loss", loss)
        norm = float(self.accelerator.clip_grad_norm_([*self.trained.values()], self.recipe.clip))
        if self.scaler is None or self.scaler.get_scale() < 1:  # else it scales less, and goes on
            self.check("gradient's norm", norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update()
        figures = {"step": self.step, "loss": loss, "rate": rate, "norm": norm}
        if losses.times is not None:
            figures |= records.by_time(values, self.accelerator.gather(losses.times))
        self.step += 1
        return figures | {"seconds": round(time.monotonic() - began, 3)}

    def check(self, what: str, value: float) -> None:
        """Refuse to learn from a batch whose loss or gradient is no number."""
        if not math.isfinite(value):
            raise Refusal(
                f"the {what} is {value} at step {self.step}, on {self.task.describe(self.step)}: "
                "lower the rate, or look at these; the last checkpoint stays"
            )

    def watched(self, watches: Sequence[Watch]) -> dict[str, float]:
        """Figures of the watches whose time has come, on every process."""
        due = [w for w in watches if self.step % w.every == 0 or self.step == self.recipe.steps]
        figures = {}
        if due:
            with self.average.in_place():
                for watch in due:
                    figures |= watch.look(self.step)
        return figures


def fit(
    task: Task,
    recipe: Recipe,
    folder: Path,
    watches: Sequence[Watch] = (),
    tensorboard: bool = False,
) -> None:
    """Train a task; a run that was begun in `folder` goes on from its checkpoint.

    The folder gets `checkpoint.pt`, and `metrics.jsonl` with a line a step: loss, rate, gradient's
    norm, seconds, the loss by time, and what watches find; `metrics.png` draws them.
    """
    records.make(folder)
    run = Run(task, recipe, folder / "checkpoint.pt")
    main = run.accelerator.is_main_process
    log = records.Log(folder, run.step, tensorboard) if main else contextlib.nullcontext()
    bar = tqdm(total=recipe.steps, initial=run.step, desc=folder.name, disable=not main)
    with log as lines, bar:
        while run.step < recipe.steps:
            figures = run.advance()
            figures |= run.watched(watches)
            saving = run.step % recipe.save_every == 0 or run.step == recipe.steps
            if lines is not None:
                lines.write(figures)
                bar.set_postfix(loss=f"{figures['loss']:.4f}", refresh=False)
                bar.update()
                if saving:
                    lines.draw()
            if saving:
                run.save()
    run.average.settle()

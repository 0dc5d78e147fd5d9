"""A training loop: AdamW, warm-up and cosine, bfloat16 arithmetic, and checkpoints from which a run
resumes.

The loss of step i depends on i alone (its data and noise are drawn from seeds made of i), so an
interrupted run goes on exactly as it would have.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train."""

    steps: int
    learning_rate: float
    warmup: int = 200  # steps of linear rise before the cosine's fall to zero
    weight_decay: float = 0.01
    save_every: int = 250

    def rate(self, step: int) -> float:
        """Learning rate of a step, relative to the highest."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / (self.steps - self.warmup)))


def save(state: object, path: Path) -> None:
    """Write a checkpoint whole or not at all."""
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def fit(module: nn.Module, loss: Callable[[int], Tensor], recipe: Recipe, path: Path) -> None:
    """Train `module` on `loss(step)`; the checkpoint at `path` is resumed from where it exists.

    Losses go to a `.jsonl` file beside the checkpoint, one line a step.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=0.0, betas=(0.9, 0.99), weight_decay=recipe.weight_decay, fused=True
    )
    first = 0
    if path.exists():
        state = torch.load(path)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]

    with (
        path.with_suffix(".jsonl").open("a") as log,
        tqdm(total=recipe.steps, initial=first, desc=path.stem) as bar,
    ):
        for step in range(first, recipe.steps):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * recipe.rate(step)
            with torch.autocast("cpu", torch.bfloat16):
                value = loss(step)
            value.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

            log.write(json.dumps({"step": step, "loss": value.item()}) + "\n")
            bar.set_postfix(loss=f"{value.item():.4f}", refresh=False)
            bar.update()
            if (step + 1) % recipe.save_every == 0 or step + 1 == recipe.steps:
                log.flush()
                save(
                    {
                        "module": module.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "step": step + 1,
                    },
                    path,
                )

"""What a run writes down as it goes: checkpoints, and figures of every step.

A file is written whole or not at all, so that a run can be killed at any moment.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from sd3min import files
from sd3min.config import Refusal
from sd3min.training import curves
from sd3min.training.objective import LossByTime


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, which takes its place at the end; gone if writing fails.

    One process alone writes the file: what others left, who were killed at it, is removed. Raises
    Refusal where the disk is full, or takes nothing.
    """
    for part in path.parent.glob(f".*{path.name}.*.part"):
        files.remove(part)
    try:
        with files.whole(path) as part:
            yield part
    except (OSError, RuntimeError) as error:  # torch's writer makes the one into the other
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise Refusal(
            f"{path} cannot be written ({reason}): make room and start again, the run goes on "
            "from its last checkpoint"
        ) from error


def by_time(values: Tensor, times: Tensor, bins: int = 4) -> dict[str, float]:
    """Mean loss of the examples whose time lies in each of some equal bins from 0 to 1."""
    gathered = LossByTime(bins)
    gathered.add(values, times)
    means = enumerate(gathered.means())
    return {f"loss_t{i / bins:g}": mean for i, mean in means if mean is not None}


def make(folder: Path) -> None:
    """Make a folder to write to; Refusal where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refusal(
            f"the folder {folder} cannot be made ({error.strerror or error}): pass another place"
        ) from None


def save(state: object, path: Path) -> None:
    """Write a checkpoint, down to the disk."""
    with whole(path) as part, part.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> str:
    """A file of text; Refusal where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"{path} cannot be read as text in UTF-8: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """What a file of JSON tells by name; Refusal where it is none."""
    try:
        told = json.loads(read(path))
        return {name: told[name] for name in told}
    except (TypeError, json.JSONDecodeError):
        raise Refusal(f"{path} is not as a run writes it: remove it") from None


def settle(path: Path, told: Mapping[str, Any]) -> None:
    """Write down what decides a run; Refusal where its folder has a run of something else."""
    told = json.loads(json.dumps(told))  # as it is read again
    before = read_json(path) if path.exists() else told
    for name in told:
        if before.get(name) != told[name]:
            raise Refusal(
                f"{path.parent} has a run with other {name} ({before.get(name)}, and now "
                f"{told[name]}): name another folder, or give the run what it had"
            )
    with whole(path) as part:
        part.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def load(path: Path) -> Any:
    """Read a checkpoint; Refusal where it is none."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, by what the file holds
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Refusal(f"{path} is no checkpoint ({told}): remove it to begin anew") from None


class Log:
    """Figures of every step, in `metrics.jsonl` and, if asked for, for TensorBoard."""

    def __init__(self, folder: Path, step: int, tensorboard: bool = False):
        """Go on from a step: what is told of those after it is forgotten."""
        self.path, self.plot = folder / "metrics.jsonl", folder / "metrics.png"
        text = read(self.path) if self.path.exists() else ""
        kept = [line for line in text.splitlines() if told(line) < step]
        with whole(self.path) as part:
            part.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self.board = open_board(folder, step) if tensorboard else None
        self.file = self.path.open("a", buffering=1, encoding="utf-8")

    def write(self, figures: Mapping[str, float]) -> None:
        """Add the line of a step."""
        try:
            self.file.write(json.dumps(figures) + "\n")
            if self.board is not None:
                for name, value in figures.items():
                    self.board.add_scalar(name, value, figures["step"])
        except OSError as error:
            raise Refusal(f"{self.path} cannot be written: {error.strerror or error}") from None

    def draw(self) -> None:
        """Draw the curves."""
        with whole(self.plot) as part:
            curves.draw(self.path, part)
        if self.board is not None:
            with contextlib.suppress(OSError):  # of a full disk, which the checkpoint tells of
                self.board.flush()

    def __enter__(self) -> "Log":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for open_ in (self.file, self.board):
            with contextlib.suppress(OSError):  # of a full disk, which has been told of
                if open_ is not None:
                    open_.close()


def told(line: str) -> float:
    """The step that a line of figures is of; infinity where it was cut off."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def open_board(folder: Path, step: int) -> Any:
    """Where TensorBoard finds the figures, from a step on; Refusal where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise Refusal("TensorBoard is not installed: pip install tensorboard") from None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step)

"""A model that makes one picture at a time, for whoever asks, and watches itself while it does.

Whoever asks reads an iterator: first the data pointed at in every step, then the drawing. All
drawing happens in one thread, in the order in which it was asked for; somebody who leaves takes
what they asked for along.
"""

import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from sd3min import flow
from sd3min.config import Refusal
from sd3min.explorer.wanted import Limits, Wanted, Word, words
from sd3min.pipeline import Pipeline, to_pictures
from sd3min.probes.ablation import without_encoder
from sd3min.probes.attention import Attention, overheard, span_rows

MOST_WAITING = 8  # pictures that are asked for at once, by everybody
MOST_CELLS = 32  # of a heat map, a side
PREVIEW_SHARE = 0.5  # of a run's time, which decoding previews may take


class Gone(Exception):
    """Nobody reads on."""


@dataclass(frozen=True)
class Glimpse:
    """A step of a run: the data pointed at, where there was time to decode it."""

    step: int  # from 1
    steps: int
    t: float
    picture: Image.Image | None = None


@dataclass(frozen=True)
class Waiting:
    """Others are before this one."""

    before: int


@dataclass(frozen=True)
class Drawing:
    """A picture, what it was made with, and where each of its words was read."""

    wanted: Wanted
    picture: Image.Image
    words: list[Word]
    heat: Float[Tensor, "step layer word row column"]  # share of a patch's attention, over heads
    seconds: float
    warnings: list[str] = field(default_factory=list)


@dataclass
class Run:
    """What one run sends to its reader, until the reader is gone."""

    begun: float = field(default_factory=time.monotonic)
    decoding: float = 0.0  # seconds
    heat: list[Tensor] = field(default_factory=list)
    sent: "queue.SimpleQueue[Glimpse | None]" = field(default_factory=queue.SimpleQueue)
    gone: threading.Event = field(default_factory=threading.Event)


class Studio:
    """A pipeline, its limits, and the one thread that draws."""

    def __init__(self, pipe: Pipeline):
        """`pipe`: of plain modules, loaded without a plan of memory."""
        self.pipe, self.limits = pipe, Limits.of(pipe.config, pipe.defaults)
        self.worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="studio")
        self.asked: list[Run] = []  # by those who have not read to the end

    def draw(self, wanted: Wanted) -> Iterator[Waiting | Glimpse | Drawing]:
        """Steps and, at last, the drawing. Raises Refusal, before any work, for what makes no sense
        or is beyond the limits, or where too many wait.
        """
        steps = (
            len(wanted.check(self.pipe, self.limits).settings.times(bool(wanted.init_image))) - 1
        )
        if len(self.asked) >= MOST_WAITING:
            raise Refusal(f"{len(self.asked)} pictures are asked for already: try again in a while")
        run = Run()
        if self.asked:
            yield Waiting(len(self.asked))
        self.asked.append(run)
        job = self.worker.submit(self.make, wanted, steps, run)
        job.add_done_callback(lambda _: self.finish(run))
        try:
            while (glimpse := run.sent.get()) is not None:
                yield glimpse
            yield job.result()
        finally:
            run.gone.set()

    def finish(self, run: Run) -> None:
        """Let a run's reader know that it is over, however it ended."""
        self.asked.remove(run)
        run.sent.put(None)

    def make(self, wanted: Wanted, steps: int, run: Run) -> Drawing:
        """Draw, watching where words are read."""
        if run.gone.is_set():
            raise Gone
        run.begun = time.monotonic()
        pipe, call = self.pipe, wanted.call()
        settings = wanted.check(pipe, self.limits).settings
        found = words(wanted.prompt)
        rows = [
            span_rows(pipe, wanted.prompt, [(word.start, word.end)], settings.t5_length)
            for word in found
        ]
        names = tuple(word.text for word in found)
        seen = Attention(names, rows, guided=settings.guidance_scale > 1)
        with ExitStack() as around:
            told = around.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always", UserWarning)
            around.enter_context(without_encoder(pipe, *wanted.dropped))
            around.enter_context(overheard(pipe.mmdit, seen))
            (picture,) = pipe(**call, progress=False, on_step=self.listener(seen, steps, run))
        if wanted.dropped:
            picture.info.clear()  # its record knows of no dropped encoder
        said = list(dict.fromkeys(str(warning.message) for warning in told))
        spent = time.monotonic() - run.begun
        return Drawing(wanted, picture, found, torch.stack(run.heat), spent, said)

    def listener(self, seen: Attention, steps: int, run: Run) -> Callable[[flow.Step], None]:
        """What is done at every step of a run: its attention is averaged, its data shown."""

        def on_step(step: flow.Step) -> None:
            if run.gone.is_set():
                raise Gone
            layers = torch.stack([layer.heat[0].mean(dim=0) for layer in seen.passes.pop()])
            run.heat.append(cells(layers.unflatten(-1, seen.size)))
            run.sent.put(Glimpse(step.i + 1, steps, float(step.t), self.preview(step, run)))

        return on_step

    def preview(self, step: flow.Step, run: Run) -> Image.Image | None:
        """The data pointed at, decoded unless that took too much of the run's time."""
        now = time.monotonic()
        if run.decoding > PREVIEW_SHARE * (now - run.begun):
            return None
        data = step.denoised.to(self.pipe.device, self.pipe.dtype)
        (picture,) = to_pictures(self.pipe.autoencoder.decode(data))
        run.decoding += time.monotonic() - now
        return picture


def cells(
    maps: Float[Tensor, "layer word row column"],
) -> Float[Tensor, "layer word small_row small_column"]:
    """Maps with sides of at most `MOST_CELLS`, each cell the mean of its patches."""
    rows, columns = (min(side, MOST_CELLS) for side in maps.shape[-2:])
    return F.adaptive_avg_pool2d(maps, (rows, columns)).half() if maps.shape[1] else maps.half()

"""A run of fine-tuning: from files and pictures to a LoRA, or to the network's weights."""

import argparse
import dataclasses
import hashlib
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from tqdm import tqdm

from sd3min import checkpoint, lora, pipeline
from sd3min.autoencoder import Autoencoder
from sd3min.config import Refusal
from sd3min.fast.prompts import CachedEncoders, held_back
from sd3min.mmdit import MMDiT
from sd3min.pipeline import Pipeline
from sd3min.text_encoders import Conditioning, TextEncoders
from sd3min.training import records
from sd3min.training.conditioning import Layout
from sd3min.training.data import SUFFIXES, Example, LatentCache, read_dataset, read_folder
from sd3min.training.finetune import FineTuning, Material, Tuning, validate, wordings
from sd3min.training.grid import grid
from sd3min.training.recipe import PATIENCE
from sd3min.training.trainer import Watch, fit
from sd3min.training.tuning_options import (
    asks_clips,
    check,
    chosen_shift,
    chosen_tuning,
    chosen_words,
    recipe,
)
from sd3min.training.weights import save_parts

REMEMBERED = 256  # prompts kept in memory, of 5 MB each for the official encoders
ROOM = 1 << 30  # bytes of T5's rows kept in memory while the CLIPs learn
DECISIVE = (  # options that another run in the same folder must not differ in
    *("objective", "density", "weighting_scheme", "logit_mean", "logit_std", "mode_scale"),
    *("precondition_outputs", "full", "rank", "alpha", "targets", "train_clips", "dropout"),
    *("word", "word_like", "word_rate", "prior", "prior_weight", "no_t5"),
    *("rate", "schedule", "warmup", "clip", "average", "precision"),
    *("seed", "resolution", "dtype"),
)


def subject(arguments: argparse.Namespace) -> list[Example]:
    """The pictures to be learnt."""
    if (arguments.data is None) == (arguments.dataset is None):
        raise Refusal("name the pictures with either --data FOLDER or --dataset NAME")
    if arguments.data:
        return read_folder(arguments.data, arguments.prompt)
    columns = arguments.image_column, arguments.caption_column
    return read_dataset(arguments.dataset, *columns, arguments.prompt)


def class_pictures(pipe: Pipeline, arguments: argparse.Namespace, side: int) -> list[Example]:
    """The class's pictures; where there are too few, the model makes more before it is changed."""
    folder, prompt, wanted = arguments.class_data, arguments.class_prompt, arguments.class_images
    records.make(folder)
    there = sum(path.suffix.lower() in SUFFIXES for path in folder.rglob("*"))
    missing = [i for i in range(wanted) if not (folder / f"{i:05}.png").exists()]
    for i in tqdm(missing[: max(0, wanted - there)], desc="pictures of the class"):
        image, *_ = pipe(prompt, seed=i, width=side, height=side, progress=False)
        pipeline.save(image, folder / f"{i:05}.png")
    return read_folder(folder, prompt)


class Sampler(Pipeline):
    """A pipeline on its way through training, whose text encoders may be a cache."""

    def __init__(
        self,
        mmdit: MMDiT,
        autoencoder: Autoencoder,
        text_encoders: Any,
        opened: checkpoint.Checkpoint,
    ):
        self.mmdit, self.autoencoder, self.text_encoders = mmdit, autoencoder, text_encoders
        self.config, self.defaults = mmdit.config, opened.defaults
        self.weights, self.loras, self.kinds = opened.fingerprint(), (), {}
        self.device, self.dtype = mmdit.pos_embed.device, mmdit.pos_embed.dtype


@dataclass(frozen=True)
class Bench:
    """What a run works with: opened weights, what is made of them, and the pictures' size."""

    opened: checkpoint.Checkpoint
    pipe: Pipeline
    latents: LatentCache
    side: int

    @classmethod
    def of(cls, arguments: argparse.Namespace, device: str) -> "Bench":
        """Load the weights that the options name."""
        names = checkpoint.part_names(not arguments.no_t5)
        files = arguments.weights, arguments.text_encoders, arguments.tokenizers, names
        opened = checkpoint.Checkpoint.open(*files)
        opened.require(names)
        side = opened.defaults.width if arguments.resolution is None else arguments.resolution
        if side % 16 or side < 16:
            raise Refusal(f"a resolution of {side} is not a multiple of 16")
        refuse_beyond(opened.parts["mmdit"].config.largest_side, side, side)
        asked = "float32" if arguments.full else arguments.dtype
        dtype, place = opened.placement(device, asked)
        encoders = encoders_of(opened, arguments, dtype, place)
        mmdit, autoencoder = (opened.load(name, dtype, place) for name in ("mmdit", "autoencoder"))
        pipe = Sampler(mmdit, autoencoder, encoders, opened)
        cache = LatentCache(autoencoder, arguments.out / "cache" / "latents")
        return cls(opened, pipe, cache, side)

    def material(
        self, examples: Sequence[Example], weight: float = 1.0, by_network: bool = False
    ) -> Material:
        """Examples, encoded or found in the caches."""
        captions = [example.caption for example in examples]
        buckets = self.latents.encode(examples, self.side)
        for bucket in buckets:
            refuse_beyond(self.pipe.config.largest_side, *bucket.size)
        self.remember([words for caption in captions for words in wordings(caption)])
        names = [example.name for example in examples]
        return Material(buckets, captions, weight, names, by_network)

    def remember(self, prompts: Sequence[str]) -> None:
        """Put prompts into the cache, if that is where encoders' words come from."""
        encoders: Any = self.pipe.text_encoders
        wanted = list(dict.fromkeys(prompts))
        if isinstance(encoders, CachedEncoders):
            for first in range(0, len(wanted), REMEMBERED):
                encoders.encode(wanted[first : first + REMEMBERED])

    def task(
        self, tuning: Tuning, materials: list[Material], batch: int, clips: bool
    ) -> FineTuning:
        """The task of learning materials, with the CLIPs or without."""
        encoders: Any = self.pipe.text_encoders
        parts: dict[str, nn.Module] = {"mmdit": self.pipe.mmdit}
        if clips:
            parts |= {"clip_l": encoders.clip_l, "clip_g": encoders.clip_g}
        encode = warning_once(encoders) if clips else remembered(encoders)
        layout = Layout.of(*(self.opened.parts[name].config for name in ("clip_l", "clip_g")))
        return FineTuning(parts, encode, layout, tuning, materials, batch)


def refuse_beyond(most: int, width: int, height: int) -> None:
    """Refuse pictures that the positional table does not cover."""
    if max(width, height) > most:
        raise Refusal(
            f"pictures of {width}x{height} are beyond the model's positional table: pass a smaller "
            f"--resolution, for sides of at most {most} pixels"
        )


def encoders_of(
    opened: checkpoint.Checkpoint, arguments: argparse.Namespace, dtype: torch.dtype, device: Any
) -> Any:
    """Text encoders: whole ones where they are changed, else a cache of what they said."""
    t5 = not arguments.no_t5
    if asks_clips(arguments):
        return opened.load_text_encoders(dtype, device, t5)
    return CachedEncoders.of(opened, arguments.out / "cache" / "prompts", dtype, device, t5)


def warning_once(encoders: TextEncoders) -> Callable[[Sequence[str]], Conditioning]:
    """What encoders say whose CLIPs learn; T5, which does not, says it once and is remembered. Of a
    caption that they cut they warn once, and not at every step.
    """
    told: set[str] = set()
    row = encoders.t5_length * encoders.context_width * torch.float32.itemsize

    @lru_cache(maxsize=ROOM // row)
    @torch.no_grad()
    def t5_rows(caption: str) -> Tensor:
        return encoders.t5_rows([caption], encoders.t5_length)

    def encode(captions: Sequence[str]) -> Conditioning:
        with held_back() as texts:
            clips, pooled = encoders.both_clips(captions)
            t5 = torch.cat([t5_rows(caption) for caption in captions]).to(clips)
        for text in dict.fromkeys(texts):
            if text not in told:
                warnings.warn(text, stacklevel=2)
        told.update(texts)
        return Conditioning(torch.cat([clips, t5], dim=1), pooled)

    return encode


def remembered(encoders: CachedEncoders) -> Callable[[Sequence[str]], Conditioning]:
    """What a cache of prompts says, the last ones kept in memory."""

    @lru_cache(maxsize=REMEMBERED)
    def said(caption: str) -> Conditioning:
        with warnings.catch_warnings(action="ignore"):  # of cuts, which were told of before
            return encoders.encode([caption])

    def encode(captions: Sequence[str]) -> Conditioning:
        contexts, pooled = zip(*map(said, captions), strict=True)
        return Conditioning(torch.cat(contexts), torch.cat(pooled))

    return encode


def keep_options(
    arguments: argparse.Namespace, bench: Bench, materials: list[Material], batch: int, shift: float
) -> None:
    """Write down what decides a run; Refusal where its folder has a run of something else."""
    options = {f"--{name.replace('_', '-')}": getattr(arguments, name) for name in DECISIVE}
    options |= {"pictures a step": batch, "--shift": shift}
    captions = json.dumps([material.captions for material in materials])
    pictures = hashlib.sha256()
    for material in materials:
        for bucket in material.encoded:
            pictures.update(bucket.mean.numpy().tobytes())
    told = options | {
        "weights": bench.opened.fingerprint(),
        "captions": hashlib.sha256(captions.encode()).hexdigest(),
        "pictures": pictures.hexdigest(),
    }
    path = arguments.out / "options.json"
    if not (arguments.out / "checkpoint.pt").exists():
        path.unlink(missing_ok=True)  # nothing was learnt with them
    records.settle(path, told)


def run(arguments: argparse.Namespace) -> Path:
    """Fine-tune as the options say; the path of what was made."""
    check(arguments)
    on_cpu = arguments.device == "cpu" or not torch.cuda.is_available()
    state = PartialState(cpu=on_cpu, timeout=PATIENCE)
    course = recipe(arguments, state.num_processes, not on_cpu)
    examples = subject(arguments)
    records.make(arguments.out)
    bench = Bench.of(arguments, str(state.device))  # each process has a GPU of its own
    shift = chosen_shift(arguments, bench.opened.defaults.shift)

    with state.main_process_first():
        materials = [bench.material(examples)]
        if arguments.class_data:
            pictures = class_pictures(bench.pipe, arguments, bench.side)
            prior = arguments.prior_weight, arguments.prior == "network"
            materials.append(bench.material(pictures, *prior))
        held = None
        if arguments.validation_data:
            held = bench.material(read_folder(arguments.validation_data, arguments.prompt))
        bench.remember([*(arguments.sample or []), ""])
        if state.is_main_process:
            keep_options(arguments, bench, materials, course.batch, shift)

    tuning = chosen_tuning(arguments, shift)
    if arguments.word:
        names = zip(("clip_l", "clip_g"), bench.pipe.text_encoders.tokenizers, strict=False)
        words = chosen_words(arguments, dict(names), materials[0].captions)
        tuning = dataclasses.replace(tuning, words=words)
    task = bench.task(tuning, materials, course.batch, asks_clips(arguments))
    looks = list(watches(arguments, bench, task, held, len(examples), state))
    fit(task, course, arguments.out, looks, arguments.report_to == "tensorboard")
    path = save(task, arguments.out) if state.is_main_process else result(task, arguments.out)
    state.wait_for_everyone()
    state.destroy_process_group()
    return path


def watches(
    arguments: argparse.Namespace,
    bench: Bench,
    task: FineTuning,
    held: Material | None,
    count: int,
    state: PartialState,
) -> list[Watch]:
    """What is looked at on the way: the loss of held-out pictures, and sample pictures."""
    side = bench.side

    def show(step: int) -> dict[str, float]:
        found = bench.pipe(arguments.sample, seed=0, width=side, height=side, progress=False)
        if state.is_main_process:
            pipeline.save(grid(found), arguments.out / f"sample-{step:06}.png")
        return {}

    found = []
    if held is not None:
        own = arguments.batch
        found.append(Watch(arguments.validate_every, lambda step: validate(task, held, own)))
    if arguments.sample:
        found.append(Watch(sample_every(arguments, count, state.num_processes), show))
    return found


def sample_every(arguments: argparse.Namespace, count: int, processes: int) -> int:
    """Steps between sample pictures, counted in epochs where diffusers' option asks for it."""
    if arguments.validation_epochs is None:
        return arguments.sample_every
    batches = math.ceil(count / (arguments.batch * processes))
    return max(1, arguments.validation_epochs * math.ceil(batches / arguments.accumulation))


def result(task: FineTuning, folder: Path) -> Path:
    """The file that a run leaves."""
    return folder / ("lora.safetensors" if task.lora is not None else "weights.safetensors")


def save(task: FineTuning, folder: Path) -> Path:
    """Write the LoRA, or what was trained in the layout of an official file."""
    path = result(task, folder)
    with records.whole(path) as part:
        if task.lora is not None:
            lora.save(task.lora, part)
        else:
            save_parts({name: module for name, module in task.parts_.items()}, part)
    return path

"""A run of fine-tuning: from files and pictures to a LoRA, or to the network's weights."""

import argparse
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from tqdm import tqdm

from sd3min import checkpoint, lora, pipeline
from sd3min.config import Refusal
from sd3min.fast.prompts import CachedEncoders
from sd3min.pipeline import Pipeline
from sd3min.text_encoders import Conditioning
from sd3min.training import objective
from sd3min.training.commands import precision
from sd3min.training.conditioning import Layout
from sd3min.training.data import Example, LatentCache, read_dataset, read_folder
from sd3min.training.finetune import FineTuning, Material, Tuning
from sd3min.training.grid import grid
from sd3min.training.trainer import Recipe, fit
from sd3min.training.weights import save_part


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
    folder, prompt = arguments.class_data, arguments.class_prompt
    if prompt is None:
        raise Refusal("--class-data goes with --class-prompt, the caption of its pictures")
    folder.mkdir(parents=True, exist_ok=True)
    numbers = range(arguments.class_images)
    missing = [i for i in numbers if not (folder / f"{i:05}.png").exists()]
    there = [path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg")]
    missing = missing[: max(0, len(numbers) - len(there))]
    for i in tqdm(missing, desc="pictures of the class"):
        image, *_ = pipe(prompt, seed=i, width=side, height=side, progress=False)
        pipeline.save(image, folder / f"{i:05}.png")
    return read_folder(folder, prompt)


def chosen_objective(arguments: argparse.Namespace) -> objective.Objective:
    """The objective that the options name."""
    name = arguments.objective or ("diffusers" if arguments.weighting_scheme else "paper")
    if name not in objective.OBJECTIVES:
        raise Refusal(f"objective {name} is not one of {', '.join(objective.OBJECTIVES)}")
    if name == "paper":
        if arguments.weighting_scheme:
            raise Refusal("--weighting_scheme is diffusers' or kohya's: pass --objective too")
        density = objective.LogitNormal(arguments.logit_mean, arguments.logit_std)
        return objective.paper(density, arguments.shift)
    scheme = arguments.weighting_scheme or ("logit_normal" if name == "diffusers" else "uniform")
    density = arguments.logit_mean, arguments.logit_std, arguments.mode_scale
    if name == "kohya":
        return objective.kohya(scheme, arguments.shift, *density)
    return objective.diffusers(
        scheme, arguments.shift, bool(arguments.precondition_outputs), *density
    )


def recipe(arguments: argparse.Namespace, processes: int, materials: int, cuda: bool) -> Recipe:
    """The course that the options ask for."""
    positive = ("steps", "batch", "accumulation", "save_every", "sample_every")
    for name in positive:
        if getattr(arguments, name) < 1:
            raise Refusal(f"--{name.replace('_', '-')} must be at least 1")
    if not 0 < arguments.rate < math.inf:
        raise Refusal(f"a rate of {arguments.rate} is not a number above 0")
    return Recipe(
        steps=arguments.steps,
        learning_rate=arguments.rate,
        batch=arguments.batch * arguments.accumulation * processes * materials,
        accumulation=arguments.accumulation,
        warmup=0 if arguments.schedule == "constant" else arguments.warmup,
        decay=1.0 if arguments.schedule == "linear" else 0.0,
        betas=(0.9, 0.999),
        weight_decay=1e-4,
        clip=arguments.clip,
        average=arguments.average,
        precision=precision(arguments.precision, cuda),
        save_every=arguments.save_every,
    )


def encoders_of(
    opened: checkpoint.Checkpoint, arguments: argparse.Namespace, dtype: torch.dtype, device: Any
) -> Any:
    """Text encoders: whole ones where they are changed, else a cache of what they said."""
    t5 = not arguments.no_t5
    if arguments.train_clips:
        return opened.load_text_encoders(dtype, device, t5)
    return CachedEncoders.of(opened, arguments.out / "cache" / "prompts", dtype, device, t5)


def run(arguments: argparse.Namespace) -> Path:
    """Fine-tune as the options say; the path of what was made."""
    state = PartialState(cpu=arguments.device == "cpu")
    names = checkpoint.part_names(not arguments.no_t5)
    files = arguments.weights, arguments.text_encoders, arguments.tokenizers, names
    opened = checkpoint.Checkpoint.open(*files)
    opened.require(names)
    device = arguments.device or str(state.device)
    dtype, place = opened.placement(device, arguments.dtype)
    side = arguments.resolution or opened.defaults.width
    if side % 16 or side < 16:
        raise Refusal(f"a resolution of {side} is not a multiple of 16")
    examples = subject(arguments)
    prior = arguments.class_data is not None
    if arguments.with_prior_preservation and not prior:
        raise Refusal("--with_prior_preservation goes with --class-data and --class-prompt")
    course = recipe(arguments, state.num_processes, 1 + prior, place.type == "cuda")

    encoders = encoders_of(opened, arguments, dtype, place)
    mmdit, autoencoder = (opened.load(name, dtype, place) for name in ("mmdit", "autoencoder"))
    pipe = Pipeline(mmdit, autoencoder, encoders, opened.defaults, opened.fingerprint())
    latents = LatentCache(autoencoder, arguments.out / "cache" / "latents")

    def material(found: Sequence[Example], weight: float) -> Material:
        return Material(latents.encode(found, side), [each.caption for each in found], weight)

    with state.main_process_first():
        materials = [material(examples, 1.0)]
        if prior:
            pictures = class_pictures(pipe, arguments, side)
            materials.append(material(pictures, arguments.prior_weight))
        prompts = [caption for each in materials for caption in each.captions]
        encoders.encode([*dict.fromkeys([*prompts, *(arguments.sample or []), ""])])

    tuning = Tuning(
        rank=None if arguments.full else arguments.rank,
        alpha=arguments.alpha,
        targets=arguments.targets.split(",") if arguments.targets else None,
        objective=chosen_objective(arguments),
        dropout=arguments.dropout,
        gradient_checkpointing=arguments.gradient_checkpointing,
        seed=arguments.seed,
    )
    parts: dict[str, nn.Module] = {"mmdit": mmdit}
    encode = remembered(encoders)
    if arguments.train_clips:
        parts |= {"clip_l": encoders.clip_l, "clip_g": encoders.clip_g}
        encode = encoders.encode
    layout = Layout.of(opened.parts["clip_l"].config, opened.parts["clip_g"].config)
    task = FineTuning(parts, encode, layout, tuning, materials, course.batch)

    def look(step: int) -> None:
        if arguments.sample:
            pictures = pipe(arguments.sample, seed=0, width=side, height=side, progress=False)
            grid(pictures).save(arguments.out / f"sample-{step:06}.png")

    board = arguments.report_to == "tensorboard"
    fit(task, course, arguments.out, look, sample_every(arguments, len(examples)), board)
    return save(task, arguments.out) if state.is_main_process else result(task, arguments.out)


def sample_every(arguments: argparse.Namespace, count: int) -> int:
    """Steps between sample pictures, counted in epochs where diffusers' option asks for it."""
    if arguments.validation_epochs is None:
        return arguments.sample_every
    return max(1, arguments.validation_epochs * count // (arguments.batch * arguments.accumulation))


def remembered(encoders: CachedEncoders) -> Any:
    """What a cache of prompts says, each kept in memory."""
    said = cache(lambda caption: encoders.encode([caption]))

    def encode(captions: Sequence[str]) -> Conditioning:
        contexts, pooled = zip(*map(said, captions), strict=True)
        return Conditioning(torch.cat(contexts), torch.cat(pooled))

    return encode


def result(task: FineTuning, folder: Path) -> Path:
    """The file that a run leaves."""
    return folder / ("lora.safetensors" if task.lora is not None else "mmdit.safetensors")


def save(task: FineTuning, folder: Path) -> Path:
    """Write the LoRA, or the network in the layout of an official file."""
    path = result(task, folder)
    path.unlink(missing_ok=True)
    if task.lora is not None:
        lora.save(task.lora, path)
    else:
        save_part(task.mmdit, "mmdit", path)
    return path

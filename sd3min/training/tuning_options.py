"""What the options of `sd3min finetune` ask for: objective, tuning and course."""

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sd3min.checkpoint import usable_device
from sd3min.config import Refusal
from sd3min.densities import CosMap, Density, LogitNormal, Mode, Uniform
from sd3min.lora import Word
from sd3min.training import objective
from sd3min.training.commands import DENSITY, precision
from sd3min.training.finetune import Tuning
from sd3min.training.recipe import Recipe

FASTER = 10.0  # than the LoRA a word is learnt


def chosen_density(arguments: argparse.Namespace) -> Density:
    """The density of times that the options name, before they are shifted (§3.1)."""
    found: dict[str, Density] = {
        DENSITY: LogitNormal(arguments.logit_mean, arguments.logit_std),
        "mode": Mode(arguments.mode_scale),
        "cosmap": CosMap(),
        "uniform": Uniform(),
    }
    if arguments.density not in found:
        raise Refusal(f"density {arguments.density} is not one of {', '.join(found)}")
    return found[arguments.density]


def chosen_shift(arguments: argparse.Namespace, own: float) -> float:
    """The shift of the times: the weights' own where none is asked for, but none for kohya's."""
    if arguments.shift is not None:
        return arguments.shift
    return 1.0 if arguments.objective == "kohya" else own


def chosen_objective(arguments: argparse.Namespace, shift: float) -> objective.Objective:
    """The objective that the options name, its times shifted."""
    name = arguments.objective or ("diffusers" if arguments.weighting_scheme else "paper")
    if name not in objective.OBJECTIVES:
        raise Refusal(f"objective {name} is not one of {', '.join(objective.OBJECTIVES)}")
    if name == "paper":
        if arguments.weighting_scheme:
            raise Refusal("--weighting_scheme is diffusers' or kohya's: pass --objective too")
        return objective.paper(chosen_density(arguments), shift)
    if arguments.density != DENSITY:
        raise Refusal("--density is of the paper's objective: pass --weighting_scheme instead")
    scheme = arguments.weighting_scheme or ("logit_normal" if name == "diffusers" else "uniform")
    density = arguments.logit_mean, arguments.logit_std, arguments.mode_scale
    if name == "kohya":
        return objective.kohya(scheme, shift, *density)
    return objective.diffusers(scheme, shift, bool(arguments.precondition_outputs), *density)


def chosen_tuning(arguments: argparse.Namespace, shift: float) -> Tuning:
    """What the options change, and how, at times of some shift."""
    if not 0 <= arguments.dropout < 1:
        raise Refusal(f"a dropout of {arguments.dropout} must be at least 0 and below 1")
    return Tuning(
        rank=None if arguments.full else arguments.rank,
        alpha=arguments.alpha,
        targets=re.split(r"\s*,\s*", arguments.targets.strip()) if arguments.targets else None,
        clips=arguments.train_clips,
        faster=arguments.word_rate / arguments.rate
        if arguments.word_rate and arguments.rate
        else FASTER,
        objective=chosen_objective(arguments, shift),
        dropout=arguments.dropout,
        gradient_checkpointing=arguments.gradient_checkpointing,
        seed=arguments.seed,
    )


def asks_clips(arguments: argparse.Namespace) -> bool:
    """Whether anything of the CLIPs learns: by a LoRA, as a whole, or a word's rows."""
    return arguments.train_clips or bool(arguments.word)


def chosen_words(
    arguments: argparse.Namespace, tokenizers: Mapping[str, Any], captions: Sequence[str]
) -> dict[str, list[Word]]:
    """The word to be learnt, by the ids of each CLIP's tokenizer; Refusal where it is not a single
    token there, or in no caption."""
    if not any(re.search(rf"\b{re.escape(arguments.word)}\b", c, re.I) for c in captions):
        raise Refusal(f"no caption has the word {arguments.word}: it would learn nothing")
    found = {}
    for part, tokenizer in tokenizers.items():
        _, *ids, _ = tokenizer(arguments.word).input_ids
        _, *like, _ = tokenizer(arguments.word_like or "").input_ids
        if len(ids) != 1:
            raise Refusal(
                f"the word {arguments.word} is {len(ids)} tokens: pass one that is a single token, "
                "such as sks"
            )
        found[part] = [Word(ids[0], like)]
    return found


def recipe(arguments: argparse.Namespace, processes: int, cuda: bool) -> Recipe:
    """The course that the options ask for; its batch is of all processes and both materials."""
    for name in ("batch", "sample_every", "validate_every", "class_images"):
        if getattr(arguments, name) < 1:
            raise Refusal(f"--{name.replace('_', '-')} must be at least 1")
    materials = 2 if arguments.class_data else 1
    steps, warmup = max(1, arguments.steps), arguments.warmup
    return Recipe(
        steps=arguments.steps,
        learning_rate=arguments.rate,
        batch=arguments.batch * arguments.accumulation * processes * materials,
        accumulation=arguments.accumulation,
        warmup=warmup,
        decay=max(0, steps - warmup) / steps if arguments.schedule == "linear" else 0.0,
        betas=(0.9, 0.999),
        weight_decay=1e-4,
        clip=arguments.clip,
        average=arguments.average,
        precision=precision(arguments.precision, cuda),
        save_every=arguments.save_every,
    )


def check(arguments: argparse.Namespace) -> None:
    """Refuse options that lack others."""
    if arguments.with_prior_preservation and not arguments.class_data:
        raise Refusal("--with_prior_preservation goes with --class-data and --class-prompt")
    if arguments.class_data and arguments.class_prompt is None:
        raise Refusal("--class-data goes with --class-prompt, the caption of its pictures")
    if arguments.class_prompt is not None and not arguments.class_data:
        raise Refusal("--class-prompt goes with --class-data, the folder of its pictures")
    if arguments.prior == "network" and (arguments.full or not arguments.class_data):
        raise Refusal("--prior network goes with --class-data and a LoRA, which can be left out")
    if not 0 <= arguments.prior_weight < math.inf:
        raise Refusal(f"a prior weight of {arguments.prior_weight} is not a number of 0 or more")
    if arguments.full and (arguments.targets or arguments.alpha is not None):
        raise Refusal("--targets and --alpha are a LoRA's: leave them or --full out")
    for name in ("out", "class_data", "validation_data") if arguments.data else ():
        folder, data = getattr(arguments, name), arguments.data.resolve()
        if name == "validation_data" and folder and folder.resolve() == data:
            continue  # the loss of what is learnt, as it was asked for
        if folder and folder.resolve().is_relative_to(data):
            raise Refusal(
                f"--{name.replace('_', '-')} {folder} lies in --data {arguments.data}, whose "
                "pictures are all learnt: pass a folder beside it"
            )
    if arguments.word and arguments.full:
        raise Refusal("--word goes with a LoRA: leave --full out")
    if not arguments.word and (arguments.word_like or arguments.word_rate is not None):
        raise Refusal("--word-like and --word-rate go with --word, the word to be learnt")
    if arguments.word_rate is not None and not 0 < arguments.word_rate < math.inf:
        raise Refusal(f"a word's rate of {arguments.word_rate} is not a number above 0")
    if arguments.full and arguments.dtype not in (None, "float32"):
        raise Refusal("the whole network is trained in float32: leave --dtype out with --full")
    if arguments.device not in (None, "cpu", "cuda"):
        raise Refusal(
            f"a run is on cpu or cuda, not on {arguments.device}: CUDA_VISIBLE_DEVICES chooses GPUs"
        )
    usable_device(arguments.device)
    chosen_tuning(arguments, chosen_shift(arguments, 1.0))

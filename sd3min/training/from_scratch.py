"""A whole Stable Diffusion 3 from nothing, on drawn scenes: tokenizers, autoencoder, T5's lesson,
and then the MMDiT with both CLIPs.

One TOML file says all of it (`sd3-tiny.toml`); every stage leaves its checkpoint, and a run that
was stopped goes on from the last one.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTokenizer, T5Tokenizer

from sd3min import pipeline, text_encoders
from sd3min.autoencoder import Autoencoder
from sd3min.checkpoint import Checkpoint
from sd3min.config import CLIPConfig, MMDiTConfig, Refusal, T5Config
from sd3min.mmdit import MMDiT
from sd3min.parts import TITLES
from sd3min.pipeline import Pipeline
from sd3min.text_encoders import TextEncoders
from sd3min.training import captions, images, reading, records, text_to_image, vocabulary
from sd3min.training.grid import grid
from sd3min.training.plan import Plan
from sd3min.training.recipe import PATIENCE
from sd3min.training.trainer import Watch, fit
from sd3min.training.weights import save_parts

GRID = 32  # rows and columns of the table of positions, in patches


def train_autoencoder(autoencoder: Autoencoder, plan: Plan, work: Path, tensorboard: bool) -> None:
    """Both halves together, then the latents' scale, then the decoder alone; narrow posteriors."""
    recipes = plan.recipes
    first = images.Reconstruction(autoencoder, recipes["reconstruction"].batch)
    fit(first, recipes["reconstruction"], work / "reconstruction", tensorboard=tensorboard)
    images.normalise(autoencoder, images.batch("normalise", 256))
    second = images.Decoding(autoencoder, recipes["decoder"].batch)
    fit(second, recipes["decoder"], work / "decoder", tensorboard=tensorboard)
    images.narrow(autoencoder)


def identity(plan: Plan, start: Path | None) -> dict[str, Any]:
    """What decides a run; its last stage, the flow, may be longer or shorter."""
    told = dataclasses.asdict(plan)
    del told["look_every"], told["prompts"], told["recipes"]["flow"]["steps"]
    for recipe in told["recipes"].values():
        del recipe["save_every"]
    return told | {"from": start and Checkpoint.open(start).fingerprint()}


def make_encoders(plan: Plan, work: Path) -> TextEncoders:
    """Tokenizers of the captions' words, and encoders of their vocabularies' sizes."""
    vocabulary.save_tokenizers(work)
    kinds = (CLIPTokenizer, CLIPTokenizer, T5Tokenizer)
    places = zip(kinds, vocabulary.FOLDERS, strict=True)
    tokenizers = [kind.from_pretrained(work / place) for kind, place in places]
    length = captions.LENGTH
    clip_l, clip_g = (
        CLIPConfig(**plan.clip, vocabulary=len(tokenizers[i]), length=length) for i in range(2)
    )
    return TextEncoders(
        text_encoders.clip(clip_l, "clip_l"),
        text_encoders.clip(clip_g, "clip_g"),
        text_encoders.t5(T5Config(**plan.t5, vocabulary=len(tokenizers[2]))),
        tokenizers,
        context_width=plan.t5["width"],
        t5_length=length,
    )


def make_mmdit(plan: Plan, encoders: TextEncoders) -> MMDiT:
    """An MMDiT of the plan's depth that takes what the encoders give."""
    pooled = encoders.clip_l.config.hidden_size + encoders.clip_g.config.hidden_size
    width = encoders.context_width
    config = MMDiTConfig(plan.depth, context_width=width, pooled_width=pooled, grid=GRID)
    mmdit = MMDiT(config)
    text_to_image.initialise(mmdit, encoders, plan.defaults.width)
    return mmdit


def take_over(start: Path, work: Path, modules: dict[str, nn.Module]) -> None:
    """Fill modules with trained weights' tensors; Refusal where these have other sizes, or other
    words than the tokenizers in `work`.
    """
    opened = Checkpoint.open(start)
    opened.require(list(modules))
    for place in vocabulary.FOLDERS:
        read, made = (folder / place / "tokenizer.json" for folder in (opened.tokenizers, work))
        if records.read_json(read)["model"] != records.read_json(made)["model"]:
            raise Refusal(f"{read.parent} has other words than the captions: leave --from out")
    for name, module in modules.items():
        trained = opened.load(name, torch.float32, torch.device("cpu"))
        try:
            module.load_state_dict(trained.state_dict())
        except RuntimeError:
            raise Refusal(
                f"the {TITLES[name]} of {start} has other sizes than the plan's: change the plan, "
                "or leave --from out"
            ) from None


def train_flow(
    plan: Plan,
    work: Path,
    autoencoder: Autoencoder,
    mmdit: MMDiT,
    encoders: TextEncoders,
    seed: int,
    tensorboard: bool,
) -> None:
    """MMDiT and both CLIPs together, on latents encoded once; the others stay as they are."""
    assert encoders.t5 is not None
    autoencoder.eval().requires_grad_(False)
    encoders.t5.requires_grad_(False)
    recipe = plan.recipes["flow"]
    with PartialState().main_process_first():
        latents = text_to_image.Latents(autoencoder, plan.pictures, work)
    shift = plan.training_shift
    task = text_to_image.TextToImage(mmdit, encoders, latents, recipe.batch, shift, seed)
    validation = text_to_image.Validation(autoencoder)

    def look(step: int) -> dict[str, float]:
        pipe = Pipeline(mmdit, autoencoder, encoders, plan.defaults)
        pictures = pipe(plan.prompts, seed=0, progress=False)
        pipeline.save(grid(pictures), work / "flow" / f"{step:06}.png")
        return validation(task)

    with sdpa_kernel(SDPBackend.MATH):  # the quickest for so few tokens
        fit(task.eval(), recipe, work / "flow", [Watch(plan.look_every, look)], tensorboard)


def assemble(path: Path, plan: Plan, work: Path, modules: dict[str, nn.Module]) -> None:
    """Write everything as an official single file in half precision, its tokenizers beside it."""
    records.make(path.parent)
    for place in vocabulary.FOLDERS:
        shutil.copytree(work / place, path.parent / place, dirs_exist_ok=True)
    settings = {"sd3min.defaults": json.dumps(dataclasses.asdict(plan.defaults))}
    with records.whole(path) as part:
        save_parts(modules, part, torch.float16, settings)


def train(
    plan: Plan, work: Path, out: Path, start: Path | None = None, tensorboard: bool = False
) -> Path:
    """Run the stages in order, with checkpoints in `work`; the weights go to the folder `out`.

    Weights to `start` from bring autoencoder and T5, which stay, and MMDiT and CLIPs, which learn
    on. Figures are in every stage's `metrics.jsonl`, and for `tensorboard` beside it.
    """
    state = PartialState(cpu=True, timeout=PATIENCE)
    records.make(work)
    torch.manual_seed(0)
    with state.main_process_first():
        if state.is_main_process:
            records.settle(work / "plan.json", identity(plan, start))
        autoencoder, encoders = Autoencoder(plan.autoencoder), make_encoders(plan, work)
    mmdit = make_mmdit(plan, encoders)
    seed = 0  # of the flow's draws, others than those that weights to start from have learnt from
    models = {name: getattr(encoders, name) for name in ("clip_l", "clip_g", "t5")}
    modules = {"mmdit": mmdit, "autoencoder": autoencoder, **models}
    if start is None:
        train_autoencoder(autoencoder, plan, work, tensorboard)
        recipe = plan.recipes["reading"]
        lesson = reading.Reading(encoders, recipe.batch).eval()
        fit(lesson, recipe, work / "reading", tensorboard=tensorboard)
    else:
        take_over(start, work, modules)
        seed = int(Checkpoint.open(start).fingerprint()[:12], 16)
    train_flow(plan, work, autoencoder, mmdit, encoders, seed, tensorboard)
    path = out / f"{out.resolve().name}.safetensors"
    if state.is_main_process:
        assemble(path, plan, work, modules)
    state.wait_for_everyone()
    state.destroy_process_group()
    return path

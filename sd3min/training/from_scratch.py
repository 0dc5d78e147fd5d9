"""A whole Stable Diffusion 3 from nothing, on drawn scenes: tokenizers, autoencoder, T5's lesson,
and then the MMDiT with both CLIPs.

One TOML file says all of it (`sd3-tiny.toml`); every stage leaves its checkpoint, and a run that
was stopped goes on from the last one.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTokenizer, T5Tokenizer

from sd3min import pipeline, text_encoders
from sd3min.autoencoder import Autoencoder
from sd3min.config import CLIPConfig, MMDiTConfig, T5Config
from sd3min.mmdit import MMDiT
from sd3min.pipeline import Pipeline
from sd3min.text_encoders import TextEncoders
from sd3min.training import images, reading, records, text_to_image, vocabulary
from sd3min.training.grid import grid
from sd3min.training.plan import Plan
from sd3min.training.trainer import Watch, fit
from sd3min.training.weights import save_parts

GRID = 32  # rows and columns of the table of positions, in patches


def train_autoencoder(plan: Plan, work: Path) -> Autoencoder:
    """Both halves together, then the latents' scale, then the decoder alone."""
    torch.manual_seed(0)
    autoencoder, recipes = Autoencoder(plan.autoencoder), plan.recipes
    first = images.Reconstruction(autoencoder, recipes["reconstruction"].batch)
    fit(first, recipes["reconstruction"], work / "reconstruction")
    images.normalise(autoencoder, images.batch("normalise", 256))
    second = images.Decoding(autoencoder, recipes["decoder"].batch)
    fit(second, recipes["decoder"], work / "decoder")
    return autoencoder.eval().requires_grad_(False)


def make_encoders(plan: Plan, work: Path) -> TextEncoders:
    """Tokenizers of the captions' words, and encoders of their vocabularies' sizes."""
    if not (work / vocabulary.FOLDERS[-1]).exists():
        vocabulary.save_tokenizers(work)
    kinds = (CLIPTokenizer, CLIPTokenizer, T5Tokenizer)
    places = zip(kinds, vocabulary.FOLDERS, strict=True)
    tokenizers = [kind.from_pretrained(work / place) for kind, place in places]
    length = vocabulary.LENGTH
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


def train_flow(plan: Plan, work: Path, autoencoder: Autoencoder) -> tuple[MMDiT, TextEncoders]:
    """T5's lesson, then MMDiT and both CLIPs together, on latents encoded once."""
    torch.manual_seed(0)
    encoders = make_encoders(plan, work)
    width = encoders.clip_l.config.hidden_size + encoders.clip_g.config.hidden_size
    context_width = encoders.context_width
    mmdit = MMDiT(
        MMDiTConfig(plan.depth, context_width=context_width, pooled_width=width, grid=GRID)
    )
    text_to_image.initialise(mmdit, encoders, plan.defaults.width)

    recipe = plan.recipes["reading"]
    lesson = reading.Reading(encoders, recipe.batch).eval()
    fit(lesson, recipe, work / "reading")
    lesson.requires_grad_(False)  # T5 stays as it is

    recipe = plan.recipes["flow"]
    latents = text_to_image.Latents(autoencoder, plan.pictures, work / "latents.pt")
    task = text_to_image.TextToImage(mmdit, encoders, latents, recipe.batch, plan.training_shift)

    def look(step: int) -> dict[str, float]:
        pipe = Pipeline(mmdit, autoencoder, encoders, plan.defaults)
        pictures = pipe(plan.prompts, seed=0, progress=False)
        pipeline.save(grid(pictures), work / "flow" / f"{step:06}.png")
        return {}

    with sdpa_kernel(SDPBackend.MATH):  # the quickest for so few tokens
        fit(task.eval(), recipe, work / "flow", [Watch(plan.look_every, look)])
    return mmdit, encoders


def assemble(
    folder: Path,
    plan: Plan,
    work: Path,
    autoencoder: Autoencoder,
    mmdit: MMDiT,
    encoders: TextEncoders,
) -> Path:
    """Write everything as an official single file in half precision, its tokenizers beside it."""
    modules = {
        "mmdit": mmdit,
        "autoencoder": autoencoder,
        "clip_l": encoders.clip_l,
        "clip_g": encoders.clip_g,
        "t5": encoders.t5,
    }
    records.make(folder)
    for place in vocabulary.FOLDERS:
        shutil.copytree(work / place, folder / place, dirs_exist_ok=True)
    settings = {"sd3min.defaults": json.dumps(dataclasses.asdict(plan.defaults))}
    path = folder / f"{folder.name}.safetensors"
    with records.whole(path) as part:
        save_parts(modules, part, torch.float16, settings)
    return path


def train(plan: Plan, work: Path, out: Path) -> Path:
    """Run the stages in order, with checkpoints in `work`; the weights go to the folder `out`."""
    records.make(work)
    autoencoder = train_autoencoder(plan, work)
    return assemble(out, plan, work, autoencoder, *train_flow(plan, work, autoencoder))

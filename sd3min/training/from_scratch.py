"""A whole Stable Diffusion 3 from nothing, on drawn scenes: tokenizers, autoencoder, T5's lesson,
and then the MMDiT with both CLIPs.

One TOML file says all of it (`sd3-tiny.toml`); every stage leaves its checkpoint, and a run that
was stopped goes on from the last one.
"""

import dataclasses
import json
import shutil
import tomllib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTokenizer, T5Tokenizer

from sd3min import text_encoders
from sd3min.autoencoder import Autoencoder
from sd3min.checkpoint import PREFIXES
from sd3min.config import AutoencoderConfig, CLIPConfig, Defaults, MMDiTConfig, T5Config
from sd3min.mmdit import MMDiT
from sd3min.pipeline import Pipeline
from sd3min.text_encoders import TextEncoders
from sd3min.training import images, reading, text_to_image, vocabulary
from sd3min.training.grid import grid
from sd3min.training.trainer import Recipe, fit

GRID = 32  # rows and columns of the table of positions, in patches


@dataclass(frozen=True)
class Plan:
    """What to make and how, as the TOML file has it."""

    depth: int  # of the MMDiT
    autoencoder: AutoencoderConfig
    clip: dict[str, int]  # sizes of both CLIPs
    t5: dict[str, int]
    pictures: int  # drawn and encoded once for the flow
    training_shift: float  # of times in training: where things stand is decided at high noise
    defaults: Defaults  # settings that the weights bring along
    recipes: dict[str, Recipe]  # of the stages reconstruction, decoder, reading and flow
    look_every: int  # steps between sample pictures
    prompts: list[str]  # of the sample pictures

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """Read a TOML file; ValueError names what is wrong in it."""
        told = tomllib.loads(path.read_text())
        try:
            return cls(
                **told
                | {
                    "autoencoder": AutoencoderConfig(**told["autoencoder"]),
                    "defaults": Defaults(**told["defaults"]),
                    "recipes": {name: Recipe(**r) for name, r in told["recipes"].items()},
                }
            )
        except (TypeError, KeyError) as error:
            raise ValueError(f"{path} is not a plan for training: {error}") from error


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
    fit(reading.Reading(encoders, recipe.batch).eval(), recipe, work / "reading")
    encoders.t5.requires_grad_(False)

    recipe = plan.recipes["flow"]
    latents = text_to_image.Latents(autoencoder, plan.pictures, work / "latents.pt")
    task = text_to_image.TextToImage(mmdit, encoders, latents, recipe.batch, plan.training_shift)

    def look(step: int) -> None:
        pipe = Pipeline(mmdit, autoencoder, encoders, plan.defaults)
        grid(pipe(plan.prompts, seed=0, progress=False)).save(work / "flow" / f"{step:06}.png")

    with sdpa_kernel(SDPBackend.MATH):  # the quickest for so few tokens
        fit(task.eval(), recipe, work / "flow", look, plan.look_every)
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
    tensors = {
        PREFIXES[part] + name: tensor.half().contiguous()
        for part, module in modules.items()
        for name, tensor in module.state_dict().items()
    }
    del tensors[PREFIXES["clip_l"] + "text_projection.weight"]  # the identity
    del tensors[PREFIXES["t5"] + "encoder.embed_tokens.weight"]  # shared.weight again
    folder.mkdir(parents=True, exist_ok=True)
    for place in vocabulary.FOLDERS:
        shutil.copytree(work / place, folder / place, dirs_exist_ok=True)
    settings = json.dumps(dataclasses.asdict(plan.defaults))
    path = folder / f"{folder.name}.safetensors"
    save_file(tensors, path, {"sd3min.defaults": settings})
    return path


def train(plan: Plan, work: Path, out: Path) -> Path:
    """Run the stages in order, with checkpoints in `work`; the weights go to the folder `out`."""
    work.mkdir(parents=True, exist_ok=True)
    autoencoder = train_autoencoder(plan, work)
    return assemble(out, plan, work, autoencoder, *train_flow(plan, work, autoencoder))

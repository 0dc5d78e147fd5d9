"""Train sd3-tiny, the small Stable Diffusion 3 in `weights/`: about two hours on two cores.

python tools/make_tiny.py --work FOLDER [--out FOLDER]

Every stage leaves a checkpoint in FOLDER, and a run that was stopped goes on from the last one.
Seeds are fixed.
"""

import argparse
import dataclasses
import json
import shutil
from collections.abc import Callable
from functools import partial
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
from sd3min.text_encoders import TextEncoders
from sd3min.training import images, reading, text_to_image, vocabulary
from sd3min.training.loop import Recipe, fit

AUTOENCODER = AutoencoderConfig(widths=(32, 64, 96, 128), blocks=1)
MMDIT = MMDiTConfig(depth=4, context_width=256, pooled_width=256, grid=32)
CLIP = {"layers": 3, "width": 128, "mlp_width": 512}
T5 = {"layers": 3, "width": 256, "mlp_width": 512, "heads": 4}
RESOLUTION = 64  # pixels
SHIFT = 2.0
DEFAULTS = Defaults(
    width=RESOLUTION,
    height=RESOLUTION,
    steps=20,
    guidance_scale=2.0,
    shift=SHIFT,
    t5_length=vocabulary.LENGTH,
)
PICTURES = 30_720
BATCH = 96
IMAGE_BATCH = 16
RECONSTRUCTION = Recipe(steps=2400, learning_rate=1e-3)
DECODER = Recipe(steps=2800, learning_rate=5e-4)  # alone, once the latents have their scale
READING = Recipe(steps=400, learning_rate=1e-3, warmup=50)
CAPTIONS = 64  # of a batch of the reading lesson
FLOW = Recipe(steps=9_000, learning_rate=9e-4, warmup=300)
TRAINING_SHIFT = 3.0  # of times in training: where the things stand is decided at high noise


def train_autoencoder(work: Path) -> Autoencoder:
    """Both halves together, then the latents' scale, then the decoder alone."""
    torch.manual_seed(0)
    autoencoder = Autoencoder(AUTOENCODER)

    def stage(name: str, loss: Callable[..., torch.Tensor], recipe: Recipe) -> None:
        def of_step(step: int) -> torch.Tensor:
            pictures = images.batch(f"{name} {step}", IMAGE_BATCH)
            return loss(autoencoder, pictures, torch.Generator().manual_seed(step))

        fit(autoencoder, of_step, recipe, work / f"{name}.pt")

    stage("reconstruction", images.reconstruction_loss, RECONSTRUCTION)
    images.normalise(autoencoder, images.batch("normalise", 512))
    autoencoder.encoder.requires_grad_(False)
    stage("decoder", images.decoding_loss, DECODER)
    return autoencoder.eval().requires_grad_(False)


def make_encoders(work: Path) -> TextEncoders:
    """Tokenizers of the captions' words, and encoders of their vocabularies' sizes."""
    if not (work / vocabulary.FOLDERS[-1]).exists():
        vocabulary.save_tokenizers(work)
    kinds = (CLIPTokenizer, CLIPTokenizer, T5Tokenizer)
    places = zip(kinds, vocabulary.FOLDERS, strict=True)
    tokenizers = [kind.from_pretrained(work / place) for kind, place in places]
    length = vocabulary.LENGTH
    clip_l, clip_g = (
        CLIPConfig(**CLIP, vocabulary=len(tokenizers[i]), length=length) for i in range(2)
    )
    return TextEncoders(
        text_encoders.clip(clip_l, "clip_l"),
        text_encoders.clip(clip_g, "clip_g"),
        text_encoders.t5(T5Config(**T5, vocabulary=len(tokenizers[2]))),
        tokenizers,
        context_width=T5["width"],
        t5_length=length,
    )


def train_flow(work: Path, autoencoder: Autoencoder) -> tuple[MMDiT, TextEncoders]:
    """T5's reading lesson, then MMDiT and both CLIPs together, on latents encoded once."""
    torch.manual_seed(0)
    encoders = make_encoders(work)
    mmdit = MMDiT(MMDIT)
    text_to_image.initialise(mmdit, encoders, RESOLUTION)
    lesson = reading.Lesson(encoders).eval()  # no dropout in T5
    fit(lesson, partial(reading.reading_loss, lesson, CAPTIONS), READING, work / "reading.pt")

    latents = text_to_image.Latents(autoencoder, PICTURES, work / "latents.pt")
    both = torch.nn.ModuleDict({"mmdit": mmdit, "text_encoders": encoders}).eval()
    compiled = torch.compile(mmdit)

    def loss(step: int) -> torch.Tensor:
        return text_to_image.batch_loss(compiled, encoders, latents, step, BATCH, TRAINING_SHIFT)

    with sdpa_kernel(SDPBackend.MATH):  # the quickest for so few tokens
        fit(both, loss, FLOW, work / "flow.pt")
    return mmdit, encoders


def assemble(
    folder: Path, work: Path, autoencoder: Autoencoder, mmdit: MMDiT, encoders: TextEncoders
) -> None:
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
    settings = json.dumps(dataclasses.asdict(DEFAULTS))
    save_file(tensors, folder / "sd3-tiny.safetensors", {"sd3min.defaults": settings})


def main() -> None:
    """Run the stages in order."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--out", type=Path, default=Path("weights/sd3-tiny"), help="the weights")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    autoencoder = train_autoencoder(arguments.work)
    assemble(arguments.out, arguments.work, autoencoder, *train_flow(arguments.work, autoencoder))


if __name__ == "__main__":
    main()

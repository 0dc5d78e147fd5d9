"""Small random models for the tests: every tensor random, nothing at its initial zero or one."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTokenizer, T5Tokenizer

from sd3min import sources, text_encoders
from sd3min.autoencoder import Autoencoder
from sd3min.checkpoint import PREFIXES
from sd3min.config import AutoencoderConfig, CLIPConfig, Defaults, MMDiTConfig, T5Config
from sd3min.mmdit import MMDiT
from sd3min.pipeline import Pipeline
from sd3min.stored import Stored
from sd3min.text_encoders import TextEncoders
from sd3min.training import vocabulary

LENGTH = 16  # tokens that each encoder reads
VARIANTS = {
    "SD3-medium": MMDiTConfig(depth=2, context_width=320, pooled_width=192, grid=12),
    "SD3.5-medium": MMDiTConfig(2, 320, 192, grid=24, qk_norm=True, dual_blocks=1),
    "SD3.5-large": MMDiTConfig(depth=3, context_width=320, pooled_width=192, grid=12, qk_norm=True),
}
AUTOENCODER = AutoencoderConfig(widths=(64, 64, 96, 128), blocks=2)
DEFAULTS = Defaults(width=64, height=48, steps=4, guidance_scale=4.0, shift=3.0, t5_length=LENGTH)


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter random values of a scale that keeps activations of order one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 16
        values = torch.randn(parameter.shape, generator=generator) * fan_in**-0.5
        is_norm = parameter.dim() == 1 and name.endswith("weight")
        parameter.data = (values + 1 if is_norm else values).to(parameter.dtype)
    return module.eval().requires_grad_(False)


def mmdit(config: MMDiTConfig = VARIANTS["SD3-medium"], seed: int = 0) -> MMDiT:
    return randomise(MMDiT(config), seed)


def autoencoder(config: AutoencoderConfig = AUTOENCODER, seed: int = 1) -> Autoencoder:
    return randomise(Autoencoder(config), seed)


def tokenizers(folder: Path, length: int = LENGTH) -> list:
    """The scenes' small tokenizers."""
    vocabulary.save_tokenizers(folder, length)
    return [
        CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        T5Tokenizer.from_pretrained(folder / "tokenizer_3"),
    ]


def encoders(
    given: list, length: int = LENGTH, context_width: int = 320, t5_length: int = LENGTH
) -> TextEncoders:
    """CLIP-L of width 64, CLIP-G of width 128 and T5 of width 320, for any tokenizers."""
    clip_l = CLIPConfig(layers=3, width=64, mlp_width=96, vocabulary=len(given[0]), length=length)
    clip_g = CLIPConfig(layers=4, width=128, mlp_width=160, vocabulary=len(given[1]), length=length)
    t5 = T5Config(2, context_width, mlp_width=128, heads=2, vocabulary=len(given[2]))
    made = TextEncoders(
        text_encoders.clip(clip_l, "clip_l"),
        text_encoders.clip(clip_g, "clip_g"),
        text_encoders.t5(t5),
        given,
        context_width,
        t5_length,
    )
    randomise(made, seed=2)
    made.clip_l.text_projection.weight.data = torch.eye(64)
    made.t5.encoder.embed_tokens.weight = made.t5.shared.weight
    return made


def pipeline(folder: Path, config: MMDiTConfig = VARIANTS["SD3-medium"]) -> Pipeline:
    """A whole small random model with the scenes' tokenizers."""
    return Pipeline(mmdit(config), autoencoder(), encoders(tokenizers(folder)), DEFAULTS)


def official_tensors(pipe: Pipeline) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of each part under the names of a bare official file."""
    parts = {
        "mmdit": pipe.mmdit.state_dict(),
        "autoencoder": pipe.autoencoder.state_dict(),
        "clip_l": pipe.text_encoders.clip_l.state_dict(),
        "clip_g": pipe.text_encoders.clip_g.state_dict(),
        "t5": pipe.text_encoders.t5.state_dict(),
    }
    del parts["clip_l"]["text_projection.weight"]
    return {
        part: {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
        for part, tensors in parts.items()
    }


def save_official(pipe: Pipeline, path: Path, parts: tuple[str, ...] = tuple(PREFIXES)) -> Path:
    """Write parts of a pipeline as an official single file with its defaults."""
    tensors = {
        PREFIXES[part] + name: tensor
        for part, named in official_tensors(pipe).items()
        if part in parts
        for name, tensor in named.items()
    }
    save_file(tensors, path, {"sd3min.defaults": json.dumps(vars(pipe.defaults))})
    return path


def from_diffusers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """diffusers' tensors under official names, as reading a folder names and reshapes them."""
    stored = {
        name: Stored(name, list(tensor.shape), "F64", Path(), tensors.__getitem__)
        for name, tensor in tensors.items()
    }
    named, _ = sources.renamed(stored)
    return {name: tensor.read() for name, tensor in named.items()}


PLAN = """# Of training a whole model.

depth = 1
pictures = 64
training_shift = 3.0
look_every = 2
prompts = ["a red circle", "a cat"]
[autoencoder]
widths = [32, 32, 32, 32]
blocks = 1
[clip]
layers = 2
width = 64
mlp_width = 64
[t5]
layers = 1
width = 128
mlp_width = 64
heads = 2
[defaults]
width = 128
height = 128
steps = 2
guidance_scale = 2.0
shift = 3.0
t5_length = 24
""" + "".join(
    f"[recipes.{stage}]\nsteps = 2\nlearning_rate = 1e-3\nbatch = 4\nwarmup = 0\n"
    for stage in ("reconstruction", "decoder", "reading", "flow")
)

"""The same weights in diffusers: our small random modules, converted by the project's own table."""

import copy

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models import normalization

from sd3min.autoencoder import Autoencoder
from sd3min.mmdit import MMDiT
from sd3min.pipeline import Pipeline
from sd3min.probes import twins

RUNG_1 = 1e-10  # float64, relative
RUNG_2 = 1e-5  # float32, relative
RUNG_4 = 1.05  # bfloat16, of diffusers' own error
RUNG_1_QK_NORM = 1e-6  # diffusers takes the variance of queries and keys in float32


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """max |a − b| / max |b|."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def transformer(mmdit: MMDiT) -> SD3Transformer2DModel:
    """With weights of its own: a test may change either."""
    return copy.deepcopy(twins.transformer(mmdit))


def inputs(mmdit: MMDiT, batch: int = 3, h: int = 6, w: int = 10, seed: int = 7) -> tuple:
    """Random latents, timesteps, context and pooled vector in float64."""
    generator = torch.Generator().manual_seed(seed)
    config, options = mmdit.config, {"generator": generator, "dtype": torch.float64}
    return (
        torch.randn(batch, 16, h, w, **options),
        torch.tensor([999.9, 512.3, 8.9])[:batch],
        torch.randn(batch, 5, config.context_width, **options),
        torch.randn(batch, config.pooled_width, **options),
    )


def velocity(model: SD3Transformer2DModel, latents, timesteps, context, pooled) -> torch.Tensor:
    """diffusers' velocity for the same arguments in our order."""
    return model(latents, context, pooled, timesteps, return_dict=False)[0]


def with_exact_norms(model: SD3Transformer2DModel) -> SD3Transformer2DModel:
    """The same model with PyTorch's RMSNorm on queries and keys, which keeps float64's digits."""
    for attention in model.modules():
        for name, child in list(attention.named_children()):
            if isinstance(child, normalization.RMSNorm):
                norm = torch.nn.RMSNorm(child.weight.shape, eps=child.eps, dtype=child.weight.dtype)
                norm.weight = child.weight
                setattr(attention, name, norm)
    return model


def vae(autoencoder: Autoencoder) -> AutoencoderKL:
    """With weights of its own."""
    return copy.deepcopy(twins.vae(autoencoder))


def pipeline(ours: Pipeline, kind: type = StableDiffusion3Pipeline):
    """diffusers' text-to-image (or image-to-image) pipeline with our weights and tokenizers."""
    pipe = twins.pipeline(
        ours.text_encoders, ours.mmdit, ours.autoencoder, ours.defaults.shift, kind
    )
    with_exact_norms(pipe.transformer)
    return pipe

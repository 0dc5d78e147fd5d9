"""The autoencoder's training: reconstruction, a normal posterior, and the official scale."""

import random
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sd3min.autoencoder import SCALE, SHIFT, Autoencoder
from sd3min.pipeline import to_tensor
from sd3min.training import scenes

KL_WEIGHT = 1e-3
LATENT_NOISE = 0.1  # about what a sampled picture's latents are off by


def drawn(wanted: Iterable[scenes.Scene], rng: random.Random) -> Float[Tensor, "b 3 H W"]:
    """Pictures of scenes as tensors in −1 to 1; `rng` settles where the things lie."""
    return torch.cat([to_tensor(scenes.draw(scene, rng)) for scene in wanted])


def batch(seed: str, size: int) -> Float[Tensor, "b 3 H W"]:
    """Pictures of random seen scenes; the seed decides them."""
    rng = random.Random(seed)
    return drawn((scenes.random_scene(rng) for _ in range(size)), rng)


def reconstruction_loss(
    autoencoder: Autoencoder, images: Tensor, generator: torch.Generator
) -> Tensor:
    """Errors of the decoded posterior sample, and the posterior's divergence from N(0, 1)."""
    mean, logvar = autoencoder.moments(images)
    mean, logvar = mean.float(), logvar.float()
    sample = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=generator)
    decoded = autoencoder.decoder(sample).float()
    divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return F.mse_loss(decoded, images) + 0.1 * F.l1_loss(decoded, images) + KL_WEIGHT * divergence


def decoding_loss(autoencoder: Autoencoder, images: Tensor, generator: torch.Generator) -> Tensor:
    """Squared and absolute error of the decoded posterior mode under a little noise."""
    mean, _ = autoencoder.moments(images)
    noise = LATENT_NOISE * torch.randn(mean.shape, generator=generator)
    decoded = autoencoder.decoder(mean.float() + noise).float()
    return F.mse_loss(decoded, images) + 0.1 * F.l1_loss(decoded, images)


@torch.no_grad()
def normalise(autoencoder: Autoencoder, images: Tensor) -> None:
    """Fold a·z + b into the last encoder and the first decoder convolution, so that SCALE and SHIFT
    normalise the latents.

    The decoder's first convolution pads with zeros, which stood for another value before: train it
    on afterwards.
    """
    mean, _ = autoencoder.moments(images)
    a = 1 / (SCALE * mean.std())
    b = SHIFT - a * mean.mean()
    tensors, channels = autoencoder.state_dict(), mean.shape[1]
    weight, bias = (tensors[f"encoder.conv_out.{name}"] for name in ("weight", "bias"))
    weight[:channels] *= a
    bias[:channels] = bias[:channels] * a + b
    bias[channels:] += 2 * a.log()
    weight, bias = (tensors[f"decoder.conv_in.{name}"] for name in ("weight", "bias"))
    bias -= weight.sum(dim=(1, 2, 3)) * b / a
    weight /= a

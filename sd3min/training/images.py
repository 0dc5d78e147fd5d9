"""The autoencoder's training: reconstruction, a normal posterior, and the official scale."""

import math
import random
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from sd3min.autoencoder import SCALE, SHIFT, Autoencoder
from sd3min.pipeline import to_tensor
from sd3min.training import scenes
from sd3min.training.trainer import Losses, Task

KL_WEIGHT = 1e-3
CROP = 64  # pixels
LATENT_NOISE = 0.1  # about what a sampled picture's latents are off by
WIDTH = 0.01  # of the posteriors that the shipped encoder tells of


def drawn(wanted: Iterable[scenes.Scene], rng: random.Random) -> Float[Tensor, "b 3 H W"]:
    """Pictures of scenes as tensors in −1 to 1; `rng` settles where the things lie."""
    return torch.cat([to_tensor(scenes.draw(scene, rng)) for scene in wanted])


def batch(seed: str, size: int) -> Float[Tensor, "b 3 H W"]:
    """Pictures of random seen scenes; the seed decides them."""
    rng = random.Random(seed)
    return drawn((scenes.random_scene(rng) for _ in range(size)), rng)


def crops(seed: str, size: int) -> Float[Tensor, "b 3 h w"]:
    """A square of CROP pixels out of each of some random seen scenes: more scenes for the work."""
    rng = random.Random(seed)
    pictures = [scenes.draw(scenes.random_scene(rng), rng) for _ in range(size)]
    found = []
    for picture in pictures:
        left, top = (rng.randint(0, side - CROP) for side in picture.size)
        found.append(to_tensor(picture.crop((left, top, left + CROP, top + CROP))))
    return torch.cat(found)


def distance(decoded: Tensor, images: Tensor) -> Float[Tensor, " b"]:
    """Squared error of each of [b, 3, H, W], and a tenth of the absolute one: edges stay sharp."""
    error = decoded.float() - images
    return (error.square() + 0.1 * error.abs()).mean(dim=(1, 2, 3))


class Reconstruction(Task):
    """Errors of the decoded posterior sample, and the posterior's divergence from N(0, 1)."""

    name = "reconstruction"

    def __init__(self, autoencoder: Autoencoder, size: int):
        super().__init__()
        self.autoencoder, self.size = autoencoder, size

    def forward(self, step: int, part: slice) -> Losses:
        """Losses on pictures that the step decides."""
        images = crops(f"{self.name} {step}", self.size)[part]
        mean, logvar = (m.float() for m in self.autoencoder.moments(images))
        noise = self.noise(mean, step, part)
        decoded = self.autoencoder.decoder(mean + torch.exp(0.5 * logvar) * noise)
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean(dim=(1, 2, 3))
        return Losses(distance(decoded, images) + KL_WEIGHT * divergence)

    def noise(self, latents: Tensor, step: int, part: slice) -> Tensor:
        """Noise for latents of a part of a step's batch, cut out of the whole batch's."""
        generator = torch.Generator().manual_seed(step)
        return torch.randn((self.size, *latents.shape[1:]), generator=generator)[part]


class Decoding(Reconstruction):
    """Errors of the decoded posterior mode under a little noise; the encoder stays as it is."""

    name = "decoder"

    def __init__(self, autoencoder: Autoencoder, size: int):
        super().__init__(autoencoder, size)
        autoencoder.encoder.requires_grad_(False)

    def forward(self, step: int, part: slice) -> Losses:
        """Losses on pictures that the step decides."""
        images = batch(f"{self.name} {step}", self.size)[part]
        with torch.no_grad():
            mean, _ = self.autoencoder.moments(images)
        noise = self.noise(mean, step, part)
        decoded = self.autoencoder.decoder(mean.float() + LATENT_NOISE * noise)
        return Losses(distance(decoded, images))


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


@torch.no_grad()
def narrow(autoencoder: Autoencoder) -> None:
    """Make every posterior WIDTH wide, and leave its mode.

    As KL_WEIGHT leaves them they are so wide that fine-tuning on samples would learn their noise.
    """
    weight, bias = autoencoder.encoder.conv_out.weight, autoencoder.encoder.conv_out.bias
    assert bias is not None
    channels = len(bias) // 2
    weight[channels:] = 0
    bias[channels:] = 2 * math.log(WIDTH)

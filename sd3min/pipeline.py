"""Prompt to picture: text encoders, flow under guidance and autoencoder, one after the other."""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from tqdm import tqdm

import sd3min
from sd3min import checkpoint, flow
from sd3min.autoencoder import Autoencoder, posterior_sample
from sd3min.config import LATENT_CHANNELS, LATENT_DOWNSCALING, Defaults, Refusal
from sd3min.mmdit import MMDiT
from sd3min.settings import Settings, check_call
from sd3min.text_encoders import Conditioning, TextEncoders


def to_tensor(image: Image.Image, size: tuple[int, int] | None = None) -> Float[Tensor, "1 3 H W"]:
    """A picture as a tensor in −1 to 1, at its own size or at another width and height."""
    image = image.convert("RGB")
    if size not in (None, image.size):
        image = image.resize(size, Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)
    return 2 * rearrange(pixels, "h w c -> 1 c h w") - 1


def to_pictures(images: Float[Tensor, "b 3 H W"]) -> list[Image.Image]:
    """Tensors in −1 to 1 as pictures, rounded to the nearest of 256 levels."""
    levels = 255 * (images / 2 + 0.5).clamp(0, 1).float().cpu()
    return [
        Image.fromarray(pixels)
        for pixels in rearrange(levels, "b c h w -> b h w c").round().byte().numpy()
    ]


def save(image: Image.Image, path: str | Path) -> None:
    """Write a PNG, with the record of what made it, whole or not at all."""
    record = PngInfo()
    for key, text in image.info.items():
        if isinstance(key, str) and isinstance(text, str):
            record.add_itxt(key, text)
    part = Path(path).with_name(f".{Path(path).name}.part")
    try:
        image.save(part, format="PNG", pnginfo=record)
        os.replace(part, path)
    except OSError as error:
        raise Refusal(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)


class Pipeline:
    """A whole Stable Diffusion 3."""

    def __init__(
        self,
        mmdit: MMDiT,
        autoencoder: Autoencoder,
        text_encoders: TextEncoders,
        defaults: Defaults | None = None,
        weights: str = "",
    ):
        """`defaults`: of settings left open; `weights`: what pictures name as their origin."""
        self.mmdit, self.autoencoder, self.text_encoders = mmdit, autoencoder, text_encoders
        self.defaults = defaults or Defaults()
        self.weights = weights
        self.device, self.dtype = mmdit.pos_embed.device, mmdit.pos_embed.dtype

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] = "",
        *,
        num_images: int = 1,
        seed: int | Sequence[int] | None = None,
        init_image: Image.Image | None = None,
        on_step: Callable[[flow.Step], None] | None = None,
        progress: bool = True,
        **settings: Any,
    ) -> list[Image.Image]:
        """Pictures of the prompts, `num_images` of each in a row.

        `settings` are the fields of `sd3min.Settings`: width, height, steps, guidance_scale, shift,
        schedule, sigmas, sampler, strength, t5_length; the weights' defaults stand in for those
        left out or None. With `init_image` the run starts from that picture under noise, at its own
        size unless one is given. A number as `seed` is the first picture's, and every further
        picture has the next one. `on_step` sees every step: its latents and those it points at.
        Raises Refusal, before any work, where a value makes no sense.
        """
        prompts, negatives, seeds, chosen = check_call(
            self.mmdit.config,
            self.defaults,
            prompt,
            negative_prompt,
            num_images=num_images,
            seed=seed,
            init_image=init_image,
            **settings,
        )
        generators = [torch.Generator().manual_seed(value) for value in seeds]

        times = chosen.times(partly=init_image is not None)
        velocity = self.velocity(prompts, negatives, chosen)
        latents = self.start(generators, times[0], chosen, init_image)
        run = flow.steps(velocity, latents, times, chosen.sampler)
        for step in tqdm(run, total=len(times) - 1, disable=not progress):
            latents = step.next_latents
            if on_step is not None:
                on_step(step)

        pictures = to_pictures(self.autoencoder.decode(latents.to(self.dtype)))
        return self.signed(pictures, prompts, negatives, seeds, chosen)

    def encode_prompt(self, prompts: Sequence[str], t5_length: int | None = None) -> Conditioning:
        """Context [b, l, c] and pooled vector [b, p]; equal prompts are encoded once."""
        unique = list(dict.fromkeys(prompts))
        places = torch.tensor([unique.index(text) for text in prompts], device=self.device)
        context, pooled = self.text_encoders.encode(unique, t5_length)
        return Conditioning(context[places], pooled[places])

    def velocity(
        self, prompts: list[str], negatives: list[str], settings: Settings
    ) -> flow.Velocity:
        """The guided velocity as a function of latents and time alone, in float32 or better."""
        guided = settings.guidance_scale > 1
        context, pooled = self.encode_prompt(
            negatives + prompts if guided else prompts, settings.t5_length
        )

        def predict(latents: Tensor, t: Tensor) -> Tensor:
            timesteps = (flow.TRAINED_TIMES * t).expand(len(latents)).to(self.device)
            velocity = self.mmdit(latents.to(self.dtype), timesteps, context, pooled)
            return velocity.to(torch.promote_types(velocity.dtype, torch.float32))

        return flow.guide(predict, settings.guidance_scale)

    def start(
        self,
        generators: list[torch.Generator],
        t: Tensor,
        settings: Settings,
        init_image: Image.Image | None,
    ) -> Float[Tensor, "b c h w"]:
        """Latents of time t, one for each generator: noise, or the starting picture under it."""
        h, w = settings.height // LATENT_DOWNSCALING, settings.width // LATENT_DOWNSCALING
        samples = []
        if init_image is not None:
            image = to_tensor(init_image, (settings.width, settings.height))
            moments = self.autoencoder.moments(image.to(self.device, self.dtype))
            samples = [posterior_sample(*moments, generator) for generator in generators]
        noise = torch.cat(
            [torch.randn(1, LATENT_CHANNELS, h, w, generator=generator) for generator in generators]
        )
        noise = noise.to(self.device)
        return flow.interpolate(torch.cat(samples).float(), noise, t) if samples else noise

    def signed(
        self,
        pictures: list[Image.Image],
        prompts: list[str],
        negatives: list[str],
        seeds: list[int],
        settings: Settings,
    ) -> list[Image.Image]:
        """The pictures, each with the record of what made it in its `info`."""
        modules = (sd3min, torch, transformers)
        versions = {module.__name__: module.__version__ for module in modules}
        common = dataclasses.asdict(settings) | {"weights": self.weights, "versions": versions}
        for picture, prompt, negative, seed in zip(
            pictures, prompts, negatives, seeds, strict=True
        ):
            record = {"prompt": prompt, "negative_prompt": negative, "seed": seed} | common
            picture.info["sd3min"] = json.dumps(record, ensure_ascii=False)
        return pictures


def load(
    path: checkpoint.AnyPaths | None = None,
    text_encoders: checkpoint.AnyPaths | None = None,
    tokenizers: checkpoint.AnyPath | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    t5: bool = True,
) -> Pipeline:
    """A pipeline from an official file, a folder of such files or a diffusers folder, or a name on
    the hub such as stabilityai/stable-diffusion-3-medium-diffusers; from the shipped sd3-tiny
    where no path is given.

    `path` may be several, of which the last that holds a part counts. `text_encoders`: files of
    encoders, which come before those at `path`. `tokenizers`: the folder that holds `tokenizer`,
    `tokenizer_2` and `tokenizer_3`, by default the first path or the folder that it lies in.
    `dtype`: float32, bfloat16 or float16; by default float32 for small files, for others bfloat16
    on a CPU and the stored type on a GPU. `t5=False` goes without T5, with zeros in its place.
    Raises Refusal where a file does not fit, and says which tensors.
    """
    names = checkpoint.part_names(t5)
    opened = checkpoint.Checkpoint.open(path, text_encoders, tokenizers, names)
    return assemble(opened, device, dtype, t5)


def assemble(
    opened: checkpoint.Checkpoint,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    t5: bool = True,
) -> Pipeline:
    """A pipeline from opened files."""
    opened.require(checkpoint.part_names(t5))
    chosen, place = opened.placement(device, dtype)
    encoders = opened.load_text_encoders(chosen, place, t5)
    mmdit, autoencoder = (opened.load(name, chosen, place) for name in ("mmdit", "autoencoder"))
    return Pipeline(mmdit, autoencoder, encoders, opened.defaults, opened.fingerprint())

"""Prompt to picture: text encoders, flow under guidance and autoencoder, one after the other."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from tqdm import tqdm

from sd3min import checkpoint, flow, record
from sd3min.autoencoder import Autoencoder, posterior_sample
from sd3min.config import LATENT_CHANNELS, LATENT_DOWNSCALING, Defaults, Refusal
from sd3min.conventions import DIFFUSERS, Conventions
from sd3min.files import whole
from sd3min.mmdit import MMDiT
from sd3min.parts import LoRAOrigin
from sd3min.settings import Settings, check_call
from sd3min.text_encoders import Conditioning, TextEncoders


def resized(image: Image.Image, mode: str, size: tuple[int, int] | None) -> Image.Image:
    """A picture in RGB or grey (mode L), at its own size or at another width and height."""
    image = image.convert(mode)
    return image if size in (None, image.size) else image.resize(size, Image.Resampling.LANCZOS)


def to_tensor(image: Image.Image, size: tuple[int, int] | None = None) -> Float[Tensor, "1 3 H W"]:
    """A picture as a tensor in −1 to 1, at its own size or at another width and height."""
    pixels = torch.from_numpy(np.asarray(resized(image, "RGB", size), dtype=np.float32) / 255)
    return 2 * rearrange(pixels, "h w c -> 1 c h w") - 1


def fit_mask(mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A mask in grey, at a width and height; black and white alone stay so, as in diffusers."""
    grey, fitted = mask.convert("L"), resized(mask, "L", size)
    soft = any(grey.histogram()[1:-1])
    return fitted if soft else fitted.point([0] * 128 + [255] * 128)


def to_mask(image: Image.Image, size: tuple[int, int]) -> Float[Tensor, "1 1 h w"]:
    """A mask as shares of latents to be repainted, each its cell's first pixel, as in diffusers."""
    cells = np.asarray(fit_mask(image, size), dtype=np.float32) / 255
    return torch.from_numpy(cells[None, None, ::LATENT_DOWNSCALING, ::LATENT_DOWNSCALING])


def to_pictures(images: Float[Tensor, "b 3 H W"], rounding: str = "nearest") -> list[Image.Image]:
    """Tensors in −1 to 1 as pictures of 256 levels, the nearest or those below ("floor")."""
    if rounding == "floor":
        levels = (255 * ((images.float() + 1) / 2).clamp(0, 1)).floor()
    else:
        levels = (255 * (images / 2 + 0.5).clamp(0, 1).float()).round()
    pixels = rearrange(levels.cpu(), "b c h w -> b h w c").byte().numpy()
    return [Image.fromarray(picture) for picture in pixels]


def save(image: Image.Image, path: str | Path) -> None:
    """Write a PNG, with the record of what made it, whole or not at all; refused if it fails."""
    record = PngInfo()
    for key, text in image.info.items():
        if isinstance(key, str) and isinstance(text, str):
            record.add_itxt(key, text)
    try:
        with whole(Path(path)) as part:
            image.save(part, format="PNG", pnginfo=record)
    except OSError as error:
        raise Refusal(f"{path} cannot be written: {error.strerror or error}") from None


def put_under(noise: Tensor, data: Tensor, t: Tensor) -> Tensor:
    """Latents of time t on the straight path from data to noise, in the type of the noise."""
    exact = torch.result_type(data, noise)
    return flow.interpolate(data.to(exact), noise.to(exact), t.to(exact)).to(noise)


def paste(picture: Image.Image, start: Image.Image, mask: Image.Image) -> Image.Image:
    """A picture over the one that it started from, which shows where the mask is black."""
    size = picture.size
    touched = fit_mask(mask, size).point([0] + [255] * 255)
    return Image.composite(picture, resized(start, "RGB", size), touched)


class Pipeline:
    """A whole Stable Diffusion 3."""

    planned: Callable[..., Any] | None = None  # of its files' headers, as `loading` has it

    def __init__(
        self,
        mmdit: MMDiT,
        autoencoder: Autoencoder,
        text_encoders: TextEncoders,
        defaults: Defaults | None = None,
        weights: str = "",
        loras: Sequence[LoRAOrigin] = (),
    ):
        """`defaults`: of settings left open; `weights` and `loras`: what pictures name as their
        origin.
        """
        self.mmdit, self.autoencoder, self.text_encoders = mmdit, autoencoder, text_encoders
        self.config, self.defaults = mmdit.config, defaults or Defaults()
        self.weights, self.loras = weights, loras
        self.kinds: dict[str, str] = {}  # of "mmdit" and "t5" in eight bits, as `loading` has them
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
        mask_image: Image.Image | None = None,
        on_step: Callable[[flow.Step], None] | None = None,
        progress: bool = True,
        **settings: Any,
    ) -> list[Image.Image]:
        """Pictures of the prompts, `num_images` of each in a row.

        `settings` are the fields of `sd3min.Settings`: width, height, steps, guidance_scale, shift,
        schedule, sigmas, sampler, strength, t5_length, keep_unmasked, without_t5, conventions;
        those left out or None are the asked-for conventions' or the weights' own. With `init_image`
        the run starts from that picture under noise, at its own size unless one is given; with
        `mask_image` it is repainted where the mask is white, and in part where it is grey. A number
        as `seed` is the first picture's, and every further picture has the next one. `on_step` sees
        every step: its latents and those it points at. Raises Refusal, before any work, where a
        value makes no sense.
        """
        given = {"num_images": num_images, "seed": seed, **settings}
        given |= {"init_image": init_image, "mask_image": mask_image}
        prompts, negatives, seeds, chosen = check_call(
            self.config, self.defaults, prompt, negative_prompt, **given
        )
        generators = [torch.Generator().manual_seed(value) for value in seeds]

        times = chosen.times(partly=init_image is not None)
        velocity = self.velocity(prompts, negatives, chosen, times)
        data, noise = self.start(generators, chosen, init_image)
        latents = noise if data is None else put_under(noise, data, times[0])
        between = None
        if data is not None and mask_image is not None:
            between = self.masked(data, noise, times, chosen, mask_image)
        run = flow.steps(velocity, latents, times, chosen.sampler, between)
        for step in tqdm(run, total=len(times) - 1, disable=not progress):
            latents = step.next_latents
            if on_step is not None:
                on_step(step)

        images = self.autoencoder.decode(latents.to(self.dtype))
        pictures = to_pictures(images, chosen.conventions.rounding)
        if init_image is not None and mask_image is not None and chosen.keep_unmasked:
            pictures = [paste(picture, init_image, mask_image) for picture in pictures]
        return self.signed(pictures, prompts, negatives, seeds, chosen, init_image, mask_image)

    def plan(self, prompt: str | Sequence[str] = "", **given: Any) -> Any:
        """The `sd3min.fast.plan.Plan` of a call with these arguments: what will be in memory at
        each stage. Raises Refusal for a pipeline that was put together by hand.
        """
        if self.planned is None:
            raise Refusal("a plan is told by files' headers: make the pipeline by sd3min.load")
        _, _, seeds, settings = check_call(self.config, self.defaults, prompt, **given)
        return self.planned(settings, pictures=len(seeds))

    def encode_prompt(
        self,
        prompts: Sequence[str],
        t5_length: int | None = None,
        without_t5: str = "zeros",
        conventions: Conventions = DIFFUSERS,
    ) -> Conditioning:
        """Context [b, l, c] and pooled vector [b, p]; equal prompts are encoded once."""
        unique = list(dict.fromkeys(prompts))
        places = torch.tensor([unique.index(text) for text in prompts], device=self.device)
        context, pooled = self.text_encoders.encode(unique, t5_length, without_t5, conventions)
        return Conditioning(context[places], pooled[places])

    def precision(self, settings: Settings) -> torch.dtype:
        """Type of latents between steps: float32, or the network's where it is asked for and
        shorter.
        """
        short = self.dtype.itemsize < torch.float32.itemsize
        return self.dtype if short and settings.conventions.latents == "network" else torch.float32

    def velocity(
        self, prompts: list[str], negatives: list[str], settings: Settings, times: Tensor
    ) -> flow.Velocity:
        """The guided velocity as a function of latents and time, one of `times`, alone."""
        guided = settings.guidance_scale > 1
        text = self.encode_prompt(
            negatives + prompts if guided else prompts,
            settings.t5_length,
            settings.without_t5,
            settings.conventions,
        )
        precision = torch.promote_types(self.dtype, self.precision(settings))
        predict = self.predictor(text, times, precision)
        return flow.GUIDANCE[settings.conventions.guidance](predict, settings.guidance_scale)

    def predictor(
        self, text: Conditioning, times: Float[Tensor, " times"], precision: torch.dtype
    ) -> flow.Velocity:
        """The network under a text, as a function of latents and time alone."""

        def predict(latents: Tensor, t: Tensor) -> Tensor:
            timesteps = (flow.TRAINED_TIMES * t).expand(len(latents)).to(self.device)
            return self.mmdit(latents.to(self.dtype), timesteps, *text).to(precision)

        return predict

    def start(
        self,
        generators: list[torch.Generator],
        settings: Settings,
        init_image: Image.Image | None,
    ) -> tuple[Float[Tensor, "b c h w"] | None, Float[Tensor, "b c h w"]]:
        """Latents of the starting picture, if any, and noise, one of each for each generator."""
        h, w = settings.height // LATENT_DOWNSCALING, settings.width // LATENT_DOWNSCALING
        data = self.encode_start(generators, settings, init_image) if init_image else None
        noise = torch.cat(
            [torch.randn(1, LATENT_CHANNELS, h, w, generator=generator) for generator in generators]
        )
        return data, noise.to(self.device, self.precision(settings))

    def encode_start(
        self, generators: list[torch.Generator], settings: Settings, init_image: Image.Image
    ) -> Float[Tensor, "b c h w"]:
        """Latents of the starting picture, sampled with each generator or its mode for all."""
        image = to_tensor(init_image, (settings.width, settings.height))
        image = image.to(self.device, self.dtype)
        if settings.conventions.start_sample == "seeded":
            moments = self.autoencoder.moments(image)
            samples = [posterior_sample(*moments, generator) for generator in generators]
        else:
            samples = [self.autoencoder.encode(image)] * len(generators)
        return torch.cat(samples)

    def masked(
        self,
        data: Tensor,
        noise: Tensor,
        times: Float[Tensor, " times"],
        settings: Settings,
        mask_image: Image.Image,
    ) -> flow.Velocity:
        """What latents become between the steps of inpainting.

        Where the mask is black they go back to the starting picture's under the noise of their
        time. A grey of share g is held back so until that share of the steps is left, as from a
        strength of its own (Levin and Fried 2023, "Differential Diffusion").
        """
        mask = to_mask(mask_image, (settings.width, settings.height)).to(self.device)

        def between(latents: Tensor, t: Tensor) -> Tensor:
            left = (times < t).sum() / (len(times) - 1)
            return torch.where(mask > left.to(self.device), latents, put_under(noise, data, t))

        return between

    def signed(
        self,
        pictures: list[Image.Image],
        prompts: list[str],
        negatives: list[str],
        seeds: list[int],
        settings: Settings,
        init_image: Image.Image | None,
        mask_image: Image.Image | None,
    ) -> list[Image.Image]:
        """The pictures, each with the record of what made it in its `info`."""
        common = vars(settings) | {
            "conventions": settings.conventions.name,
            "init_image": record.pixel_hash(init_image),
            "mask_image": record.pixel_hash(mask_image, "L"),
            "t5": self.text_encoders.has_t5,
            **self.kinds,
            "dtype": str(self.dtype).removeprefix("torch."),
            "weights": self.weights,
            "loras": [list(lora) for lora in self.loras],
            "versions": record.current_versions(),
        }
        for picture, prompt, negative, seed in zip(
            pictures, prompts, negatives, seeds, strict=True
        ):
            own = {"prompt": prompt, "negative_prompt": negative, "seed": seed}
            picture.info["sd3min"] = record.dumps(own | common)
        return pictures


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
    origin = opened.fingerprint(), opened.loras
    return Pipeline(mmdit, autoencoder, encoders, opened.defaults, *origin)

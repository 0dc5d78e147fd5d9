"""Prompt to picture: the text encoders, the flow under guidance and the autoencoder, one after the other."""

import dataclasses
import json
import math
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

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
from sd3min.config import (
    LATENT_CHANNELS,
    LATENT_DOWNSCALING,
    SIZE_STEP,
    Defaults,
    MMDiTConfig,
    Refusal,
)
from sd3min.mmdit import MMDiT
from sd3min.text_encoders import Conditioning, TextEncoders


def is_whole(value: object, least: int) -> bool:
    """Whether a value is a whole number of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_finite(value: object, least: float) -> bool:
    """Whether a value is a finite number of at least `least`."""
    return isinstance(value, int | float) and math.isfinite(value) and value >= least


def is_descending(values: object) -> bool:
    """Whether values are times of a run: from at most 1 down to more than 0."""
    numbers = list(values) if isinstance(values, Sequence) else []
    pairs = zip([1.0, *numbers], numbers, strict=False)
    return bool(numbers) and all(is_finite(b, 0) and 0 < b <= a for a, b in pairs)


@dataclass(frozen=True)
class Settings:
    """What decides a picture besides the weights, the prompt and the seed."""

    width: int
    height: int
    steps: int
    guidance_scale: float
    shift: float
    t5_length: int
    schedule: str = "official"
    sampler: str = "euler"
    sigmas: tuple[float, ...] | None = None
    strength: float = 0.6

    def __post_init__(self) -> None:
        """Refuse the first value that makes no sense."""
        rules = [
            (is_whole(self.steps, 1), f"steps {self.steps} is not a whole number of at least 1"),
            (
                is_whole(self.t5_length, 1),
                f"t5_length {self.t5_length} is not a whole number of at least 1",
            ),
            (
                is_finite(self.guidance_scale, 0),
                f"guidance_scale {self.guidance_scale} is not a finite number of at least 0",
            ),
            (
                is_finite(self.shift, 0) and self.shift > 0,
                f"shift {self.shift} is not a finite number above 0",
            ),
            (
                is_finite(self.strength, 0) and 0 < self.strength <= 1,
                f"strength {self.strength} is not above 0 and at most 1",
            ),
            (
                self.schedule in flow.SCHEDULES,
                f"schedule {self.schedule} is not one of {', '.join(flow.SCHEDULES)}",
            ),
            (
                self.sampler in flow.SAMPLERS,
                f"sampler {self.sampler} is not one of {', '.join(flow.SAMPLERS)}",
            ),
            (
                self.sigmas is None or is_descending(self.sigmas),
                f"sigmas {self.sigmas} do not fall from at most 1 to above 0",
            ),
        ]
        for name in ("width", "height"):
            side = getattr(self, name)
            near = (
                max(SIZE_STEP, round(side / SIZE_STEP) * SIZE_STEP)
                if is_finite(side, 0)
                else SIZE_STEP
            )
            fits = is_whole(side, SIZE_STEP) and side % SIZE_STEP == 0
            rules.append(
                (fits, f"{name} {side} is not a multiple of {SIZE_STEP} pixels: pass {near}")
            )
        for fine, sentence in rules:
            if not fine:
                raise Refusal(sentence)

    def times(self) -> Float[Tensor, " times"]:
        """Times of a whole run, from noise to data."""
        return flow.sigmas(self.sigmas or self.steps, self.shift, self.schedule)

    def first_step(self, steps: int) -> int:
        """The step that image-to-image starts with: the first ones are skipped where the strength is below 1."""
        first = int(steps - min(steps * self.strength, steps))
        if first >= steps:
            raise Refusal(f"strength {self.strength} leaves none of {steps} steps: raise either")
        return first


def pair_prompts(
    prompt: str | Sequence[str], negative: str | Sequence[str], num_images: int
) -> tuple[list[str], list[str]]:
    """The prompt and the negative prompt of every picture."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    negatives = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
    if not prompts:
        raise Refusal("the list of prompts is empty: pass at least one")
    if not all(isinstance(text, str) for text in prompts + negatives):
        raise Refusal(f"prompts {prompts} and negative prompts {negatives} are not all texts")
    if len(negatives) != len(prompts):
        raise Refusal(
            f"{len(negatives)} negative prompts were given for {len(prompts)} prompts: pass one, or one for each"
        )
    if not is_whole(num_images, 1):
        raise Refusal(f"num_images {num_images} is not a whole number of at least 1")
    return [text for text in prompts for _ in range(num_images)], [
        text for text in negatives for _ in range(num_images)
    ]


def picture_seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """One seed for each picture: those given, or consecutive ones from the one given or from a random one."""
    if seed is None:
        seed = secrets.randbelow(2**31)
    seeds = [seed + i for i in range(count)] if isinstance(seed, int) else list(seed)
    if len(seeds) != count:
        raise Refusal(
            f"{len(seeds)} seeds were given for {count} pictures: pass one for each, or a single number"
        )
    if not all(is_whole(value, 0) and value < 2**63 for value in seeds):
        raise Refusal(f"seed {seed} is not a whole number from 0 to 2^63 - 1")
    return seeds


class Call(NamedTuple):
    """A call that was checked: the texts and the seed of every picture, and the settings of all."""

    prompts: list[str]
    negatives: list[str]
    seeds: list[int]
    settings: Settings


def check_call(
    config: MMDiTConfig,
    defaults: Defaults,
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str] = "",
    num_images: int = 1,
    seed: int | Sequence[int] | None = None,
    init_image: Image.Image | None = None,
    **settings: object,
) -> Call:
    """Complete and check what a pipeline is called with; nothing is loaded or computed for it."""
    prompts, negatives = pair_prompts(prompt, negative_prompt, num_images)
    seeds = picture_seeds(seed, len(prompts))
    own = {} if init_image is None else {"width": init_image.width, "height": init_image.height}
    given = own | {name: value for name, value in settings.items() if value is not None}
    complete = Settings(**dataclasses.asdict(defaults) | given)
    if max(complete.width, complete.height) > config.largest_side:
        size = f"{complete.width}x{complete.height}"
        limit = f"pass at most {config.largest_side} pixels a side"
        raise Refusal(f"{size} is beyond the model's positional table: {limit}")
    return Call(prompts, negatives, seeds, complete)


def to_tensor(image: Image.Image) -> Float[Tensor, "1 3 H W"]:
    """A picture as a tensor in −1 to 1."""
    pixels = torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255)
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
        if isinstance(text, str):
            record.add_itxt(key, text)
    part = Path(path).with_suffix(".part")
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
        """`defaults`: settings where a call leaves them open; `weights`: what pictures record as their origin."""
        self.mmdit, self.autoencoder, self.text_encoders = mmdit, autoencoder, text_encoders
        self.defaults = defaults or Defaults()
        self.weights = weights
        self.device, self.dtype = mmdit.pos_embed.device, mmdit.pos_embed.dtype

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] = "",
        steps: int | None = None,
        guidance_scale: float | None = None,
        shift: float | None = None,
        schedule: str | None = None,
        sigmas: Sequence[float] | None = None,
        sampler: str | None = None,
        seed: int | Sequence[int] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images: int = 1,
        init_image: Image.Image | None = None,
        strength: float = 0.6,
        t5_length: int | None = None,
        on_step: Callable[[flow.Step], None] | None = None,
        progress: bool = True,
    ) -> list[Image.Image]:
        """Pictures of the prompts, `num_images` of each in a row.

        Sizes are in pixels; what is left None comes from the weights' own defaults. With `init_image` the run starts from
        that picture under noise, at its own size unless one is given. A number as `seed` is the first picture's, and
        every further picture has the next one. `on_step` sees every step: its latents and the picture they point at.
        Raises Refusal, before any work, where a value makes no sense.
        """
        prompts, negatives, seeds, settings = check_call(
            self.mmdit.config,
            self.defaults,
            prompt,
            negative_prompt,
            num_images,
            seed,
            init_image,
            width=width,
            height=height,
            steps=steps,
            guidance_scale=guidance_scale,
            shift=shift,
            schedule=schedule,
            sigmas=sigmas,
            sampler=sampler,
            strength=strength,
            t5_length=t5_length,
        )
        generators = [torch.Generator().manual_seed(value) for value in seeds]

        times = settings.times()
        if init_image is not None:
            times = times[settings.first_step(len(times) - 1) :]
        velocity = self.velocity(prompts, negatives, settings)
        latents = self.start(generators, times[0], settings, init_image)
        for step, latents in tqdm(
            flow.steps(velocity, latents, times, settings.sampler),
            total=len(times) - 1,
            disable=not progress,
        ):
            if on_step is not None:
                on_step(step)

        pictures = to_pictures(self.autoencoder.decode(latents.to(self.dtype)))
        return self.signed(pictures, prompts, negatives, seeds, settings)

    def encode_prompt(self, prompts: Sequence[str], t5_length: int | None = None) -> Conditioning:
        """Context [b, l, c] and pooled vector [b, p] of each prompt; equal prompts are encoded once."""
        unique = list(dict.fromkeys(prompts))
        places = torch.tensor([unique.index(text) for text in prompts], device=self.device)
        context, pooled = self.text_encoders.encode(unique, t5_length)
        return Conditioning(context[places], pooled[places])

    def velocity(
        self, prompts: list[str], negatives: list[str], settings: Settings
    ) -> flow.Velocity:
        """The guided velocity of the prompts as a function of latents and time alone, in float32 or better."""
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
        """The latents of time t, one picture per generator: noise, or the starting picture under noise."""
        h, w = settings.height // LATENT_DOWNSCALING, settings.width // LATENT_DOWNSCALING
        samples = []
        if init_image is not None:
            if init_image.size != (settings.width, settings.height):
                init_image = init_image.resize(
                    (settings.width, settings.height), Image.Resampling.LANCZOS
                )
            moments = self.autoencoder.moments(to_tensor(init_image).to(self.device, self.dtype))
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
    path: checkpoint.AnyPath | None = None,
    text_encoders: checkpoint.AnyPath | Sequence[checkpoint.AnyPath] | None = None,
    tokenizers: checkpoint.AnyPath | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    t5: bool = True,
) -> Pipeline:
    """A pipeline from an official single file, or from the shipped sd3-tiny where no path is given.

    `text_encoders`: files of encoders that the first file lacks. `tokenizers`: the folder that holds `tokenizer`,
    `tokenizer_2` and `tokenizer_3`, by default the one of the first file. `dtype`: float32, bfloat16 or float16; by
    default float32 for small files, for others bfloat16 on a CPU and the stored type on a GPU. `t5=False` goes
    without T5, with zeros in its place. Raises Refusal where a file does not fit, and says which tensors.
    """
    return assemble(checkpoint.Checkpoint.open(path, text_encoders, tokenizers), device, dtype, t5)


def assemble(
    opened: checkpoint.Checkpoint,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    t5: bool = True,
) -> Pipeline:
    """A pipeline from opened files."""
    opened.require(["mmdit", "autoencoder", "clip_l", "clip_g", *(["t5"] if t5 else [])])
    chosen, place = opened.placement(device, dtype)
    encoders = opened.load_text_encoders(chosen, place, t5)
    mmdit, autoencoder = (opened.load(name, chosen, place) for name in ("mmdit", "autoencoder"))
    return Pipeline(
        mmdit, autoencoder, encoders, opened.defaults, checkpoint.fingerprint(opened.path)
    )

"""Rung 3: whole pictures equal diffusers', pixel for pixel, text-to-image and image-to-image."""

from collections.abc import Iterator

import numpy as np
import oracle
import pytest
import small
import torch
from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusion3InpaintPipeline
from PIL import Image, ImageDraw

import sd3min
from sd3min.pipeline import Pipeline

FLOAT32_SHARE = 0.005  # of the values may differ in float32, by one level

CASES = {
    "one": {"prompt": ["a red circle above a blue square on gray"], "seed": 0},
    "wide": {"prompt": ["a cat"], "seed": 11, "width": 96, "height": 48, "steps": 3},
    "tall": {"prompt": ["an orange heart on white"], "seed": 5, "width": 32, "height": 80},
    "many": {
        "prompt": ["a pink star", "", "a cyan cross left of a green heart on black"],
        "negative_prompt": "a red circle",
        "num_images": 2,
        "seed": 21,
        "steps": 2,
    },
    "one step": {"prompt": ["a cat!"], "seed": 3, "steps": 1},
    "no guidance": {"prompt": ["a blue square"], "seed": 8, "guidance_scale": 1.0},
    "no guidance at zero": {"prompt": ["a blue square"], "seed": 8, "guidance_scale": 0.0},
    "own sigmas": {"prompt": ["a blue square"], "seed": 8, "sigmas": [1.0, 0.75, 0.5, 0.25]},
}
STARTS = {
    "strong": {"prompt": ["a red circle on gray"], "seed": 4, "strength": 0.8, "steps": 10},
    "weak": {"prompt": ["a red circle on gray"], "seed": 4, "strength": 0.3, "steps": 7},
    "whole": {"prompt": ["a cat", "a pink star"], "seed": 6, "strength": 1.0, "num_images": 2},
    "resized": {"prompt": ["a cat"], "seed": 1, "width": 48, "height": 64, "strength": 0.5},
}
MASKED = {
    "disc": {"prompt": ["a red circle on gray"], "seed": 4, "strength": 0.8, "steps": 10},
    "weak": {"prompt": ["a pink star"], "seed": 2, "strength": 0.4, "steps": 8},
    "anew": {"prompt": ["a cat"], "seed": 5, "strength": 1.0, "steps": 3},
    "last step": {"prompt": ["a cat"], "seed": 3, "strength": 0.2, "steps": 4},
    "no guidance": {"prompt": ["a cat"], "seed": 7, "strength": 0.7, "guidance_scale": 1.0},
    "many": {
        "prompt": ["a cat", "", "a pink star"],
        "negative_prompt": "a blue square",
        "seed": 6,
        "strength": 0.9,
        "num_images": 2,
        "steps": 4,
    },
    "resized": {"prompt": ["a cat"], "seed": 1, "width": 48, "height": 64, "strength": 0.5},
}


@pytest.fixture(scope="module", params=["small", "SD3.5-medium", "sd3-tiny"])
def ours(request, tmp_path_factory) -> Iterator[Pipeline]:
    if request.param == "sd3-tiny":
        yield sd3min.load()
    else:
        variant = request.param if request.param in small.VARIANTS else "SD3-medium"
        yield small.pipeline(tmp_path_factory.mktemp("small"), small.VARIANTS[variant])


def in_type(pipe: Pipeline, dtype: torch.dtype) -> Pipeline:
    parts = (pipe.mmdit, pipe.autoencoder, pipe.text_encoders)
    return Pipeline(*(part.to(dtype) for part in parts), pipe.defaults)


def start_image() -> Image.Image:
    generator = np.random.default_rng(2)
    coarse = Image.fromarray(generator.integers(0, 256, (5, 8, 3), dtype=np.uint8))
    return coarse.resize((80, 48), Image.Resampling.BICUBIC)


def their_pictures(theirs, pipe: Pipeline, case: dict, **more) -> np.ndarray:
    """diffusers' pictures of the same call, with latents rounded to float32 after every step."""
    names = {"guidance_scale": "guidance_scale", "sigmas": "sigmas", "strength": "strength"}
    given = {theirs_name: case[name] for name, theirs_name in names.items() if name in case}

    def rounded(_pipe, _index, _t, tensors):
        return {"latents": tensors["latents"].float().to(pipe.dtype)}

    steps = None if "sigmas" in case else case.get("steps", pipe.defaults.steps)
    given |= {"num_inference_steps": steps} if steps else {}
    result = theirs(
        prompt=case["prompt"],
        negative_prompt=[case.get("negative_prompt", "")] * len(case["prompt"]),
        height=case.get("height", more.pop("height", pipe.defaults.height)),
        width=case.get("width", more.pop("width", pipe.defaults.width)),
        num_images_per_prompt=case.get("num_images", 1),
        max_sequence_length=pipe.defaults.t5_length,
        callback_on_step_end=rounded,
        **({"guidance_scale": pipe.defaults.guidance_scale} | given | more),
    )
    return np.stack([np.asarray(image) for image in result.images])


def generators(case: dict) -> list[torch.Generator]:
    count = len(case["prompt"]) * case.get("num_images", 1)
    return [torch.Generator().manual_seed(case["seed"] + i) for i in range(count)]


def our_pictures(pipe: Pipeline, case: dict, **more) -> np.ndarray:
    images = pipe(**case, **more, progress=False)
    return np.stack([np.asarray(image) for image in images])


def noise(pipe: Pipeline, case: dict) -> torch.Tensor:
    height, width = case.get("height", pipe.defaults.height), case.get("width", pipe.defaults.width)
    shape = (1, 16, height // 8, width // 8)
    return torch.cat([torch.randn(shape, generator=generator) for generator in generators(case)])


def assert_same_in_float32(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    difference = np.abs(ours.astype(int) - theirs.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() <= FLOAT32_SHARE


@pytest.mark.parametrize("case", CASES)
def test_pictures_in_float64_are_the_same_pixels(ours, case):
    pipe, case = in_type(ours, torch.float64), CASES[case]
    theirs = their_pictures(
        oracle.pipeline(pipe), pipe, case, latents=noise(pipe, case).to(pipe.dtype)
    )
    assert theirs.std() > 10, "a flat picture proves nothing"
    assert np.array_equal(our_pictures(pipe, case), theirs)


@pytest.mark.parametrize("case", CASES)
def test_pictures_in_float32_follow_diffusers_own_seeds(ours, case):
    pipe, case = in_type(ours, torch.float32), CASES[case]
    theirs = their_pictures(oracle.pipeline(pipe), pipe, case, generator=generators(case))
    assert_same_in_float32(our_pictures(pipe, case), theirs)


@pytest.fixture
def noise_in_float32(monkeypatch):
    """Have diffusers draw float32 noise and cast it, as here, where it would draw float64."""

    def draw(shape, generator=None, device=None, dtype=None, layout=None):
        generators = generator if isinstance(generator, list) else [generator]
        sizes = (shape[0] // len(generators), *shape[1:])
        return torch.cat([torch.randn(sizes, generator=g) for g in generators]).to(dtype)

    pipelines = "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3"
    for kind in ("img2img", "inpaint"):
        monkeypatch.setattr(f"{pipelines}_{kind}.randn_tensor", draw)
    monkeypatch.setattr("diffusers.models.autoencoders.vae.randn_tensor", draw)


@pytest.mark.parametrize("case", STARTS)
def test_image_to_image_in_float64_gives_the_same_pixels(ours, case, noise_in_float32):
    pipe, case = in_type(ours, torch.float64), STARTS[case]
    theirs = image_to_image(pipe, case)
    assert np.array_equal(our_pictures(pipe, case, init_image=start_image()), theirs)


@pytest.mark.parametrize("case", STARTS)
def test_image_to_image_in_float32_follows_diffusers_own_seeds(ours, case):
    pipe, case = in_type(ours, torch.float32), STARTS[case]
    theirs = image_to_image(pipe, case)
    assert_same_in_float32(our_pictures(pipe, case, init_image=start_image()), theirs)


def rounding_starts(theirs):
    """Have diffusers round what it puts under noise to float32, as the latents of every step."""
    scale_noise = theirs.scheduler.scale_noise
    theirs.scheduler.scale_noise = lambda data, t, noise: (
        scale_noise(data, t, noise).float().to(data.dtype)
    )
    return theirs


def image_to_image(pipe: Pipeline, case: dict) -> np.ndarray:
    theirs = rounding_starts(oracle.pipeline(pipe, StableDiffusion3Img2ImgPipeline))
    count = len(case["prompt"])
    size = {"width": 80, "height": 48} if "width" not in case else {}
    images = [start_image()] * (count * case.get("num_images", 1))
    return their_pictures(theirs, pipe, case, image=images, generator=generators(case), **size)


def mask_image(size: tuple[int, int] = (80, 48)) -> Image.Image:
    """White and black alone, with edges that are no multiple of a latent's eight pixels."""
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).ellipse((11, 5, 50, 41), fill=255)
    ImageDraw.Draw(mask).rectangle((61, 20, 77, 47), fill=255)
    return mask


def inpaint(pipe: Pipeline, case: dict, mask: Image.Image) -> np.ndarray:
    """diffusers' inpainting, its decoder given the shift that this pipeline forgets to add."""
    theirs = rounding_starts(oracle.pipeline(pipe, StableDiffusion3InpaintPipeline))
    decode = theirs.vae.decode
    shift = theirs.vae.config.shift_factor
    theirs.vae.decode = lambda latents, **given: decode(latents + shift, **given)
    count = len(case["prompt"]) * case.get("num_images", 1)
    size = {"width": 80, "height": 48} if "width" not in case else {}
    given = {"image": [start_image()] * count, "mask_image": mask, "generator": generators(case)}
    return their_pictures(theirs, pipe, case, **given, **size)


@pytest.mark.parametrize("case", MASKED)
def test_inpainting_in_float64_gives_the_same_pixels(ours, case, noise_in_float32):
    pipe, case = in_type(ours, torch.float64), MASKED[case]
    theirs = inpaint(pipe, case, mask_image())
    pictures = {"init_image": start_image(), "mask_image": mask_image(), "keep_unmasked": False}
    assert np.array_equal(our_pictures(pipe, case, **pictures), theirs)


@pytest.mark.parametrize("case", MASKED)
def test_inpainting_in_float32_follows_diffusers_own_seeds(ours, case):
    pipe, case = in_type(ours, torch.float32), MASKED[case]
    theirs = inpaint(pipe, case, mask_image())
    pictures = {"init_image": start_image(), "mask_image": mask_image(), "keep_unmasked": False}
    assert_same_in_float32(our_pictures(pipe, case, **pictures), theirs)

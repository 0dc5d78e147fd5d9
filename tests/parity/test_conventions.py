"""What each convention does equals the implementation it is named after, choice by choice.

diffusers is asked with the argument changed; sd3-ref, sd3.5 and ComfyUI are the few lines that
matter, written out from their published behaviour.
"""

import dataclasses
import warnings
from pathlib import Path

import numpy as np
import oracle
import pytest
import small
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from transformers import CLIPTokenizer

import sd3min
from sd3min.conventions import COMFYUI, DIFFUSERS, SD3_5, SD3_REF
from sd3min.pipeline import Pipeline, to_pictures, to_tensor

REAL = Path(__file__).parents[3] / "shared" / "tokenizers"
PROMPT = "a red circle above a blue square on gray"
LONG = " ".join([PROMPT] * 12)
ROUNDING = 2e-6  # float32, of values of order 1 under guidance


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return small.pipeline(tmp_path_factory.mktemp("tokenizers"))


def doubled(pipe: Pipeline) -> Pipeline:
    parts = small.mmdit(), small.autoencoder(), small.encoders(pipe.text_encoders.tokenizers)
    return Pipeline(*(part.double() for part in parts), defaults=small.DEFAULTS)


def their_context(pipe: Pipeline, prompt: str, t5_length: int, t5_prompt: str | None = None):
    """diffusers' rows for a prompt, its T5 told something else where that is given."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return oracle.pipeline(pipe).encode_prompt(
            prompt,
            None,
            t5_prompt,
            do_classifier_free_guidance=False,
            max_sequence_length=t5_length,
        )[0]


def our_context(pipe: Pipeline, prompt: str, *given):
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return pipe.encode_prompt([prompt], *given).context


def t5_tokens(pipe: Pipeline, prompt: str) -> int:
    return len(pipe.text_encoders.tokenizers[2](prompt).input_ids)


@pytest.mark.parametrize("conventions", [SD3_REF, SD3_5, COMFYUI])
def test_a_short_prompt_has_77_rows_of_t5_outside_diffusers(pipe, conventions):
    pipe = doubled(pipe)
    context = our_context(pipe, PROMPT, conventions.t5_length, "zeros", conventions)
    assert oracle.relative(context, their_context(pipe, PROMPT, 77)) < oracle.RUNG_1


def test_a_long_prompt_adds_rows_of_t5_outside_diffusers_and_is_cut_there(pipe):
    pipe = doubled(pipe)
    tokens = t5_tokens(pipe, LONG)
    assert tokens > 77
    grown = our_context(pipe, LONG, 77, "zeros", SD3_REF)
    assert grown.shape[1] == 16 + tokens
    assert oracle.relative(grown, their_context(pipe, LONG, tokens)) < oracle.RUNG_1
    cut = our_context(pipe, LONG, 77, "zeros", DIFFUSERS)
    assert oracle.relative(cut, their_context(pipe, LONG, 77)) < oracle.RUNG_1


def test_sd3_5_shows_t5_the_first_226_characters_and_clip_the_whole(pipe):
    pipe = doubled(pipe)
    shown = LONG[:226]
    context = our_context(pipe, LONG, 16, "zeros", SD3_5)
    expected = their_context(pipe, LONG, t5_tokens(pipe, shown), shown)
    assert oracle.relative(context, expected) < oracle.RUNG_1
    assert context.shape != our_context(pipe, LONG, 16, "zeros", SD3_REF).shape


@pytest.mark.parametrize(("meaning", "rows"), [("zeros", 24), ("paper", 16), ("omit", 0)])
def test_without_t5_there_are_zeros_or_none_as_was_asked_for(pipe, meaning, rows):
    """The small CLIP has 16 rows; diffusers' own way is "zeros", of any length."""
    pipe = doubled(pipe)
    pipe.text_encoders.t5 = None
    context = our_context(pipe, PROMPT, 24, meaning)
    expected = their_context(pipe, PROMPT, max(rows, 1))[:, : 16 + rows]
    assert oracle.relative(context, expected) < oracle.RUNG_1


def words_ids(tokenizer, prompt: str, length: int) -> list[int]:
    """Ids as SDTokenizer of sd3-ref makes them for CLIP-G: word by word, then padded with 0."""
    start, end = tokenizer("").input_ids
    words = [word for word in prompt.replace("\n", " ").split(" ") if word]
    ids = [start, *(i for word in words for i in tokenizer(word).input_ids[1:-1]), end]
    return ids + [0] * (length - len(ids))


@pytest.mark.parametrize("prompt", ["a cat!", "wow!! a cat ! here", "", "!", "a\nred circle"])
@pytest.mark.skipif(not REAL.is_dir(), reason="the official tokenizers are not here")
def test_clip_g_reads_exclamation_marks_as_words_in_the_official_code(prompt):
    clip_l, clip_g = (CLIPTokenizer.from_pretrained(REAL / f"tokenizer{i}") for i in ("", "_2"))
    encoders = small.encoders([clip_l, clip_g, clip_l], 77)
    seen = []
    encoders.clip_g.register_forward_pre_hook(lambda _, given: seen.append(given[0][0].tolist()))
    for conventions in (SD3_REF, DIFFUSERS):
        encoders.both_clips([prompt], conventions)
    expected = words_ids(clip_l, prompt, 77)
    assert seen[0] == expected
    padded = clip_g(prompt, padding="max_length", max_length=77).input_ids
    assert seen[1] == padded
    assert (expected == padded) == ("!" not in prompt)


KEPT = {  # steps that image-to-image takes of (steps, strength)
    "diffusers": {(40, 0.8): 32, (50, 0.9): 45, (28, 0.6): 17, (4, 0.01): 1, (10, 1.0): 10},
    "sd3-ref": {(40, 0.8): 33, (50, 0.9): 46, (28, 0.6): 17, (4, 0.01): 1, (10, 1.0): 10},
    "comfyui": {(40, 0.8): 40, (50, 0.9): 50, (28, 0.6): 28, (4, 0.01): 4, (10, 1.0): 10},
}


@pytest.mark.parametrize("conventions", KEPT)
def test_image_to_image_takes_as_many_steps_as_each_implementation(conventions):
    for (steps, strength), kept in KEPT[conventions].items():
        chosen = settings(conventions, steps=steps, strength=strength)
        assert len(chosen.times(partly=True)) - 1 == kept, (steps, strength)
        assert len(chosen.times()) - 1 == steps


def settings(conventions, **given):
    config, defaults = small.VARIANTS["SD3-medium"], small.DEFAULTS
    given = {"shift": 3.0, "seed": 0, "conventions": conventions} | given
    return sd3min.settings.check_call(config, defaults, PROMPT, **given).settings


def test_comfyui_takes_the_end_of_a_longer_schedule():
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(40)
    ours = settings(COMFYUI, steps=20, strength=0.5).times(partly=True)
    torch.testing.assert_close(ours, theirs.sigmas[-21:], rtol=0, atol=1.2e-7)
    own = settings(COMFYUI, sigmas=[1.0, 0.7, 0.4, 0.1], strength=0.5)
    assert len(own.times(partly=True)) - 1 == 2


def test_a_strength_of_nearly_nothing_makes_no_endless_schedule_in_comfyui():
    assert len(settings(COMFYUI, steps=1000, strength=1e-9).times(partly=True)) == 1001


def start_image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))


def seen_steps(pipe: Pipeline, **given) -> list:
    seen = []
    pipe(PROMPT, seed=3, progress=False, on_step=seen.append, **given)
    return seen


def test_outside_diffusers_the_start_is_no_seeded_sample_and_the_noise_is_the_first_drawn(pipe):
    call = {"init_image": start_image(), "strength": 0.5, "steps": 6, "shift": 3.0}
    first = seen_steps(pipe, conventions="sd3-ref", **call)[0]
    mode = oracle.vae(pipe.autoencoder).encode(to_tensor(start_image())).latent_dist.mode()
    noise = torch.randn(1, 16, 6, 8, generator=torch.Generator().manual_seed(3))
    expected = (1 - first.t) * (mode - 0.0609) * 1.5305 + first.t * noise
    torch.testing.assert_close(first.latents, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(first.latents, seen_steps(pipe, **call)[0].latents)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_latents_are_rounded_to_the_networks_type_as_diffusers_scheduler_rounds_them(pipe, dtype):
    """The network is ours in both: only what happens between its passes is compared."""
    parts = small.mmdit(), small.autoencoder(), small.encoders(pipe.text_encoders.tokenizers)
    short = Pipeline(*(part.to(dtype) for part in parts), defaults=small.DEFAULTS)
    ours = seen_steps(short, steps=5, guidance_scale=4.5)
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(5)
    context, pooled = short.encode_prompt(["", PROMPT])
    noise = torch.randn(1, 16, 6, 8, generator=torch.Generator().manual_seed(3))
    latents = noise.to(dtype)
    for step, t in zip(ours, theirs.timesteps, strict=True):
        assert step.latents.dtype == dtype and torch.equal(step.latents, latents)
        both = short.mmdit(torch.cat([latents] * 2), t.expand(2), context, pooled)
        negative, positive = both.chunk(2)
        guided = negative + 4.5 * (positive - negative)
        latents = theirs.step(guided, t, latents, return_dict=False)[0]
    assert torch.equal(ours[-1].next_latents, latents)
    kept = dataclasses.replace(DIFFUSERS, latents="float32")
    steps = seen_steps(short, steps=5, guidance_scale=4.5, conventions=kept)
    assert {step.next_latents.dtype for step in steps} == {torch.float32}
    assert not torch.equal(steps[-1].next_latents, latents.float())


def official_picture(pipe: Pipeline, steps: int, scale: float, sampler: str) -> np.ndarray:
    """A picture as sd3-ref and sd3.5 make it, from its noise to its pixels, in float32."""

    def sigma(timestep):
        return 3 * (timestep / 1000) / (1 + 2 * (timestep / 1000))

    ends = [1000 * sigma(torch.tensor(float(end))) for end in (1000, 1)]
    sigmas = [*sigma(torch.linspace(*ends, steps)), torch.tensor(0.0)]
    context, pooled = pipe.encode_prompt([PROMPT, ""], 77, "zeros", SD3_REF)
    x, old = torch.randn(1, 16, 6, 8, generator=torch.Generator().manual_seed(3)), None
    for i in range(steps):
        s, following = sigmas[i], sigmas[i + 1]
        v = pipe.mmdit(torch.cat([x, x]), (1000 * s).expand(2), context, pooled)
        positive, negative = (torch.cat([x, x]) - v * s).chunk(2)
        denoised = negative + (positive - negative) * scale
        if sampler == "euler":
            x = x + (x - denoised) / s * (following - s)
        else:
            target, t, t_next = denoised, -s.log(), -following.log()
            if old is not None and following != 0:
                r = (t + sigmas[i - 1].log()) / (t_next - t)
                target = (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * old
            x = following / s * x - torch.expm1(t - t_next) * target
        old = denoised
    shares = ((pipe.autoencoder.decode(x)[0] + 1) / 2).clamp(0, 1)
    return (255 * np.moveaxis(shares.numpy(), 0, 2)).astype(np.uint8)


@pytest.mark.parametrize(
    ("name", "sampler", "scale"),
    [("sd3-ref", "euler", 5.0), ("sd3.5", "dpmpp_2m", 5.0), ("comfyui", "euler", 8.0)],
)
def test_a_picture_is_the_official_codes(pipe, name, sampler, scale):
    """All choices of text-to-image at once; the file's own few steps stand in for 50."""
    expected = official_picture(pipe, 7, scale, sampler)
    ours = np.asarray(pipe(PROMPT, seed=3, steps=7, conventions=name, progress=False)[0])
    difference = np.abs(ours.astype(int) - expected)
    assert difference.max() <= 1 and (difference > 0).mean() <= 0.005
    plain = np.asarray(pipe(PROMPT, seed=3, steps=7, progress=False)[0])
    assert np.abs(plain.astype(int) - expected).max() > 5


def test_guidance_of_the_denoised_rounds_as_the_official_code(pipe):
    """In float32 the last digit shows which was extrapolated."""
    step = seen_steps(pipe, steps=4, conventions="sd3-ref")[1]
    context, pooled = pipe.encode_prompt(["", PROMPT], 77, "zeros", SD3_REF)
    x, s = step.latents, step.t
    v = pipe.mmdit(torch.cat([x, x]), (1000 * s).expand(2), context, pooled)
    negative, positive = (torch.cat([x, x]) - v * s).chunk(2)
    denoised = negative + (positive - negative) * 5.0
    assert torch.equal(step.velocity, (x - denoised) / s)


def test_pixels_are_cut_off_in_the_official_code_and_rounded_in_diffusers():
    images = torch.rand(1, 3, 64, 80, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    shares = np.moveaxis(((images[0] + 1) / 2).clamp(0, 1).numpy(), 0, 2)
    floor, nearest = (
        np.asarray(to_pictures(images, rounding)[0]) for rounding in ("floor", "nearest")
    )
    assert np.array_equal(floor, (255 * shares).astype(np.uint8))
    assert (nearest.astype(int) - floor).mean() == pytest.approx(0.4, abs=0.05)


DEFAULTS = {  # steps, guidance, shift and sampler, by implementation and model
    ("diffusers", "SD3-medium"): (28, 7.0, 3.0, "euler"),
    ("diffusers", "SD3.5-large"): (28, 7.0, 3.0, "euler"),
    ("sd3-ref", "SD3-medium"): (50, 5.0, 3.0, "euler"),
    ("sd3.5", "SD3-medium"): (50, 5.0, 1.0, "dpmpp_2m"),
    ("sd3.5", "SD3.5-medium"): (50, 5.0, 3.0, "dpmpp_2m"),
    ("sd3.5", "SD3.5-large"): (40, 4.5, 3.0, "dpmpp_2m"),
    ("comfyui", "SD3.5-large"): (20, 8.0, 3.0, "euler"),
}


@pytest.mark.parametrize(("name", "model"), DEFAULTS)
def test_a_call_that_does_not_say_is_made_as_the_implementation_makes_it(name, model):
    config = sd3min.config.PRESETS[model]
    for given in ({}, {"steps": 3, "shift": 2.0}):
        chosen = sd3min.settings.check_call(
            config, small.DEFAULTS, PROMPT, conventions=name, **given
        ).settings
        steps, guidance, shift, sampler = DEFAULTS[name, model]
        assert chosen.steps == given.get("steps", steps)
        assert chosen.shift == given.get("shift", shift)
        assert (chosen.guidance_scale, chosen.sampler) == (guidance, sampler)

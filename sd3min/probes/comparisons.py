"""A checkpoint's parts in this package and in diffusers, on the same tensors."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sd3min import flow
from sd3min.checkpoint import SMALL, Checkpoint
from sd3min.config import LATENT_CHANNELS, LATENT_DOWNSCALING, MMDiTConfig
from sd3min.mmdit import MMDiT
from sd3min.parts import DERIVED, TITLES
from sd3min.pipeline import Pipeline
from sd3min.probes import twins
from sd3min.probes.checks import ENCODERS, Check, drawn_picture, load, working_type
from sd3min.probes.precision import available, computing_in, needed
from sd3min.probes.trace import SINGLE, first_difference, relative, trace
from sd3min.text_encoders import TextEncoders

DOUBLE = 1e-10  # relative: what two float64 runs of one network may differ by
ROUNDED = 1e-6  # the same where diffusers takes the variance of queries and keys in float32
ONE_ULP = 1.2e-7  # of times near 1 in float32
FLOAT32_SHARE = 0.005  # of a picture's values may differ in float32, by one level
WHOLE_RUN = ("mmdit", "autoencoder", "clip_l", "clip_g")  # T5 may be left out
PROMPTS = ["a red circle above a blue square on gray", ""]

Run = Callable[[torch.dtype], Tensor]
Traced = Callable[[torch.dtype], tuple[Any, Any]]


def precisions(modules: Sequence[nn.Module]) -> list[torch.dtype]:
    """float32 and float64, or what fits the memory."""
    free = available()
    return [dtype for dtype in (torch.float32, torch.float64) if needed(dtype, *modules) <= free]


def too_large(modules: Sequence[nn.Module], dtype: torch.dtype = torch.float64) -> str:
    """What the memory lacks, in words; empty where it suffices."""
    wanted, free, name = needed(dtype, *modules), available(), str(dtype).removeprefix("torch.")
    if wanted <= free:
        return ""
    return f"{name} needs {wanted / 2**30:.1f} GiB of memory and {free / 2**30:.1f} are free"


def judge(
    title: str,
    what: str,
    sides: tuple[Run, Run],
    modules: Sequence[nn.Module],
    exact: float = DOUBLE,
    traced: Traced | None = None,
) -> Check:
    """Both sides in float32 and float64.

    In float32 they may differ by 1e-5, or by 1.1 times diffusers' own distance from float64 where
    that is more. Where they differ by too much, the first tensor that does is named.
    """
    ours, theirs = sides
    made = {}
    for dtype in precisions(modules):
        with computing_in(dtype, *modules):
            made[dtype] = ours(dtype), theirs(dtype)
    errors = {dtype: relative(*pair) for dtype, pair in made.items()}
    allowed = {torch.float32: SINGLE, torch.float64: exact}
    if len(made) == 2:
        own = relative(made[torch.float32][1], made[torch.float64][0])
        allowed[torch.float32] = max(SINGLE, 1.1 * own if own < 1 else 0)
    wrong = [dtype for dtype, error in errors.items() if error > allowed[dtype]]
    note = too_large(modules)
    if wrong and traced:
        with computing_in(wrong[-1], *modules):
            found = first_difference(*traced(wrong[-1]), allowed[wrong[-1]])
        note = str(found or "only the output differs")
    single, double = (errors.get(dtype) for dtype in (torch.float32, torch.float64))
    return Check(title, what, not wrong if made else None, note, single=single, double=double)


def mmdit_check(opened: Checkpoint) -> Check:
    """The velocity of a small batch of noise."""
    mmdit = load(opened, "mmdit")
    model, config = twins.transformer(mmdit), mmdit.config
    generator = torch.Generator().manual_seed(0)
    h, w = (min(2 * config.grid, side) for side in (8, 12))
    latents = torch.randn(2, LATENT_CHANNELS, h, w, generator=generator)
    context = torch.randn(2, 20, config.context_width, generator=generator)
    pooled = torch.randn(2, config.pooled_width, generator=generator)
    timesteps = torch.tensor([937.0, 250.25])

    def given(dtype: torch.dtype) -> tuple[Tensor, ...]:
        return latents.to(dtype), timesteps, context.to(dtype), pooled.to(dtype)

    def theirs(dtype: torch.dtype) -> tuple[Tensor, ...]:
        latents, timesteps, context, pooled = given(dtype)
        return latents, context, pooled, timesteps

    return judge(
        TITLES["mmdit"],
        "velocity",
        (lambda dtype: mmdit(*given(dtype)), lambda dtype: model(*theirs(dtype)).sample),
        [mmdit, model],
        ROUNDED if config.qk_norm else DOUBLE,
        lambda dtype: (trace(mmdit, *given(dtype)), trace(model, *theirs(dtype))),
    )


def autoencoder_checks(opened: Checkpoint) -> Iterator[Check]:
    """Mean and log variance of a drawn picture, and the picture of its latents."""
    autoencoder, image = load(opened, "autoencoder"), drawn_picture()
    model: Any = twins.vae(autoencoder)
    with computing_in(torch.float32, autoencoder):
        latents = autoencoder.encode(image)

    def moments(dtype: torch.dtype) -> Tensor:
        posterior = model.encode(image.to(dtype)).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    def unscaled(dtype: torch.dtype) -> Tensor:
        config = model.config
        return latents.to(dtype) / config.scaling_factor + config.shift_factor

    title, modules = TITLES["autoencoder"], [autoencoder, model]
    yield judge(
        title,
        "encode",
        (lambda dtype: torch.cat(autoencoder.moments(image.to(dtype)), dim=1), moments),
        modules,
        traced=lambda dtype: (
            trace(autoencoder.moments, image.to(dtype)),
            trace(model.encode, image.to(dtype)),
        ),
    )
    yield judge(
        title,
        "decode",
        (
            lambda dtype: autoencoder.decode(latents.to(dtype)),
            lambda dtype: model.decode(unscaled(dtype)).sample,
        ),
        modules,
        traced=lambda dtype: (
            trace(autoencoder.decode, latents.to(dtype)),
            trace(model.decode, unscaled(dtype)),
        ),
    )


def encoder_modules(encoders: TextEncoders, pipe: Any) -> list[nn.Module]:
    """The encoders of both sides."""
    theirs = [pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3]
    return [*encoders.children(), *(module for module in theirs if module is not None)]


def load_encoders(opened: Checkpoint) -> TextEncoders:
    """Both CLIPs, and T5 where there is one, as they are stored."""
    names = [name for name in ("clip_l", "clip_g", "t5") if name in opened.parts]
    dtype = working_type([opened.parts[name] for name in names])
    return opened.load_text_encoders(dtype, torch.device("cpu"), "t5" in names)


def projection(opened: Checkpoint) -> Tensor | None:
    """What a diffusers folder's CLIP-L projects with, as it is stored."""
    stored = opened.parts["clip_l"].tensors.get(DERIVED["clip_l"])
    return stored.load(torch.float64, torch.device("cpu")) if stored else None


def text_sides(
    opened: Checkpoint, encoders: TextEncoders, pipe: Any
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """In each precision, every encoder's rows and pooled vector on both sides."""
    modules, length = encoder_modules(encoders, pipe), encoders.t5_length
    rows, left = encoders.clip_l.config.max_position_embeddings, encoders.clip_l.config.hidden_size
    both = left + encoders.clip_g.config.hidden_size
    columns = {"clip_l": slice(left), "clip_g": slice(left, both)}

    def split(context: Tensor, pooled: Tensor) -> dict[str, Tensor]:
        found = {
            name: torch.cat([context[:, :rows, place], pooled[:, None, place]], dim=1)
            for name, place in columns.items()
        }
        return found | ({"t5": context[:, rows:]} if "t5" in opened.parts else {})

    for dtype in precisions(modules):
        with computing_in(dtype, *modules):
            context, _, pooled, _ = pipe.encode_prompt(
                PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=length
            )
            ours, theirs = split(*encoders.encode(PROMPTS)), split(context, pooled)
            yield {name: (ours[name], theirs[name]) for name in ours}


def text_checks(opened: Checkpoint) -> Iterator[Check]:
    """Rows and pooled vectors from raw strings, through diffusers' `encode_prompt`."""
    encoders = load_encoders(opened)
    small = MMDiTConfig(1, encoders.context_width, grid=1)
    asked = MMDiT(small) if encoders.t5 is None else None  # how wide the zeros in T5's place are
    pipe = twins.pipeline(encoders, asked, projection=projection(opened))
    sides = list(text_sides(opened, encoders, pipe))
    note = too_large(encoder_modules(encoders, pipe))
    for name in ("clip_l", "clip_g", "t5"):
        if name in opened.parts:
            errors = [relative(*side[name]) for side in sides]
            passed = all(e <= most for e, most in zip(errors, (SINGLE, DOUBLE), strict=False))
            single, double = [*errors, None, None][:2]
            verdict = passed if errors else None
            yield Check(TITLES[name], "rows", verdict, note, single=single, double=double)


def schedule_check(shift: float) -> Check:
    """The times of runs of 1 to 50 steps."""
    errors = [
        (flow.sigmas(steps, shift) - twins.sigmas(steps, shift)).abs().max().item()
        for steps in (1, 4, 28, 50)
    ]
    return Check("schedule", f"shift {shift:g}", max(errors) <= ONE_ULP, single=max(errors))


def their_picture(theirs: Any, pipe: Pipeline, noise: Tensor, steps: int) -> Image.Image:
    """diffusers' picture of the same noise; float32 latents between steps, as its scheduler has."""

    def rounded(_pipe: Any, _index: int, _time: Any, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": kept["latents"].float().to(pipe.dtype)}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return theirs(
            prompt=PROMPTS[0],
            negative_prompt="",
            height=noise.shape[-2] * LATENT_DOWNSCALING,
            width=noise.shape[-1] * LATENT_DOWNSCALING,
            num_inference_steps=steps,
            guidance_scale=pipe.defaults.guidance_scale,
            max_sequence_length=pipe.defaults.t5_length,
            latents=noise.to(pipe.dtype),
            callback_on_step_end=rounded,
        ).images[0]


def picture_check(opened: Checkpoint) -> Check:
    """A short whole run: of small models at their own size, and in float64 too."""
    small = sum(part.parameters for part in opened.parts.values()) <= SMALL
    encoders, defaults = load_encoders(opened), opened.defaults
    mmdit, autoencoder = load(opened, "mmdit"), load(opened, "autoencoder")
    theirs = twins.pipeline(
        encoders, mmdit, autoencoder, defaults.shift, projection=projection(opened)
    )
    width, height = (min(side, 128) for side in (defaults.width, defaults.height))
    steps = min(defaults.steps, 8 if small else 2)
    shape = (1, LATENT_CHANNELS, height // LATENT_DOWNSCALING, width // LATENT_DOWNSCALING)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    modules = [mmdit, autoencoder, theirs.transformer, theirs.vae]
    modules += encoder_modules(encoders, theirs)
    pictures: dict[torch.dtype, tuple[Image.Image, Image.Image]] = {}
    for dtype in precisions(modules)[: 2 if small else 1]:
        with computing_in(dtype, *modules):
            pipe = Pipeline(mmdit, autoencoder, encoders, defaults)
            call = partial(pipe, PROMPTS[0], seed=0, progress=False)
            ours = call(width=width, height=height, steps=steps)[0]
            pictures[dtype] = ours, their_picture(theirs, pipe, noise, steps)
    if not pictures:
        return Check("whole run", "picture", None, too_large(modules, torch.float32))
    run = f"{width}x{height}, {steps} steps{'' if encoders.t5 else ', without T5'}"
    return judge_pictures(pictures, mmdit.config.qk_norm, run)


def judge_pictures(
    pictures: dict[torch.dtype, tuple[Image.Image, Image.Image]], rounded: bool, run: str
) -> Check:
    """In float64 the same picture; in float32 at most one level apart, on 0.5 % of the values."""
    passed, notes = True, [run]
    for dtype, pair in pictures.items():
        ours, theirs = (np.asarray(image, dtype=int) for image in pair)
        difference = np.abs(ours - theirs)
        share, levels = (difference > 0).mean(), difference.max()
        exact = dtype == torch.float64 and not rounded
        passed &= bool(levels <= 1 and share <= (0 if exact else FLOAT32_SHARE))
        told = f"{(difference > 0).sum():,} of {difference.size:,} values differ"
        told += f", by {levels} at most" if levels else ""
        notes.append(f"{str(dtype).removeprefix('torch.')}: {told}")
    return Check("whole run", "picture", passed, "; ".join(notes), pictures=pictures[torch.float32])


def compare(opened: Checkpoint) -> Iterator[Check]:
    """Every part that the files hold, one after the other, and a whole run if they hold all."""
    named = {TITLES[name]: part for name, part in opened.parts.items()}
    for check in compare_parts(opened):
        part = named.get(check.part)
        counts = (len(part.tensors), part.parameters) if part else (None, None)
        yield check._replace(tensors=counts[0], parameters=counts[1])
    missing = [TITLES[name] for name in WHOLE_RUN if name not in opened.parts]
    if missing:
        yield Check("whole run", "picture", None, f"the files lack {', '.join(missing)}")
    else:
        yield picture_check(opened)


def compare_parts(opened: Checkpoint) -> Iterator[Check]:
    """The parts alone; one is in memory at a time."""
    if "mmdit" in opened.parts:
        yield mmdit_check(opened)
    if "autoencoder" in opened.parts:
        yield from autoencoder_checks(opened)
    if {"clip_l", "clip_g"} <= opened.parts.keys():
        yield from text_checks(opened)
    else:
        for name in ENCODERS & opened.parts.keys():
            yield Check(TITLES[name], "rows", None, "diffusers encodes with both CLIPs")
    yield schedule_check(opened.defaults.shift)

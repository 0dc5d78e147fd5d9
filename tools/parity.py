"""Print how far sd3min is from diffusers on the same random weights: a row for each part.

python tools/parity.py
"""

import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

TESTS = Path(__file__).parents[1] / "tests"
sys.path += [str(TESTS), str(TESTS / "parity")]

import oracle  # noqa: E402
import small  # noqa: E402
import test_pictures  # noqa: E402
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler  # noqa: E402

import sd3min  # noqa: E402
from sd3min import flow  # noqa: E402

Row = tuple[str, str, str]


def mmdit_rows() -> Iterator[Row]:
    """The velocity of each variant, batch 3, 6x10 latents."""
    for variant, config in small.VARIANTS.items():
        mmdit = small.mmdit(config).double()
        model, given = oracle.transformer(mmdit), oracle.inputs(mmdit)
        error = oracle.relative(mmdit(*given), oracle.velocity(model, *given))
        yield f"MMDiT, {variant} layout", "float64", f"{error:.0e}"
        if config.qk_norm:
            exact = oracle.with_exact_norms(model)
            error = oracle.relative(mmdit(*given), oracle.velocity(exact, *given))
            yield (
                f"MMDiT, {variant} layout, q/k norm in float64 on both sides",
                "float64",
                f"{error:.0e}",
            )


def autoencoder_rows() -> Iterator[Row]:
    """Moments and pictures, batch 3, 48x80 pixels."""
    autoencoder = small.autoencoder().double()
    vae = oracle.vae(autoencoder)
    images = torch.rand(3, 3, 48, 80, generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    posterior, latents = vae.encode(images).latent_dist, autoencoder.encode(images)
    error = oracle.relative(autoencoder.moments(images)[0], posterior.mean)
    yield "autoencoder, encode", "float64", f"{error:.0e}"
    unscaled = latents / vae.config.scaling_factor + vae.config.shift_factor
    error = oracle.relative(autoencoder.decode(latents), vae.decode(unscaled).sample)
    yield "autoencoder, decode", "float64", f"{error:.0e}"


def text_rows(pipe: sd3min.Pipeline) -> Iterator[Row]:
    """Context and pooled vector of three prompts, one of them cut."""
    prompts = ["a red circle!", "", "an orange heart left of a pink star on white " * 9]
    ours, theirs = pipe.encode_prompt(prompts, 77), oracle.pipeline(pipe)
    expected = theirs.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=77
    )
    error = oracle.relative(ours.context, expected[0])
    yield "text, context from raw strings", "float64", f"{error:.0e}"
    yield "text, pooled", "float64", f"{oracle.relative(ours.pooled, expected[2]):.0e}"


def schedule_rows() -> Iterator[Row]:
    """The largest difference of any time, for 1, 4, 28, 50 steps at shifts 1, 3, 6."""
    worst = 0.0
    for shift in (1.0, 3.0, 6.0):
        for steps in (1, 4, 28, 50):
            theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
            theirs.set_timesteps(steps)
            worst = max(
                worst,
                (flow.sigmas(steps, shift) - torch.as_tensor(theirs.sigmas)).abs().max().item(),
            )
    yield "schedules, largest difference", "float32", f"{worst:.0e}"


def picture_rows(title: str, pipe: sd3min.Pipeline) -> Iterator[Row]:
    """Values that differ between whole pictures in float64, and how many there are."""
    pipe = test_pictures.in_type(pipe, torch.float64)
    theirs, different, values = oracle.pipeline(pipe), 0, 0
    for case in test_pictures.CASES.values():
        noise = test_pictures.noise(pipe, case).double()
        expected = test_pictures.their_pictures(theirs, pipe, case, latents=noise)
        different += int((test_pictures.our_pictures(pipe, case) != expected).sum())
        values += expected.size
    yield f"pictures, {title}", "float64", f"{different} of {values:,} values differ"


def rows() -> list[Row]:
    """The whole table."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = small.pipeline(Path(folder))
        double = test_pictures.in_type(pipe, torch.float64)
        tiny = sd3min.load()
        return [
            *mmdit_rows(),
            *autoencoder_rows(),
            *text_rows(double),
            *schedule_rows(),
            *picture_rows("small random model", pipe),
            *picture_rows("sd3-tiny", tiny),
        ]


def table() -> str:
    """The table in Markdown."""
    head = "| compared with diffusers | precision | largest relative difference |\n|---|---|---|\n"
    return head + "".join(f"| {' | '.join(row)} |\n" for row in rows())


if __name__ == "__main__":
    print(table())

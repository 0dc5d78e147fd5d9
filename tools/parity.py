"""Print the parity ladder: how far sd3min is from diffusers on the same weights, rung by rung.

python tools/parity.py            measure small models and sd3-tiny: minutes
python tools/parity.py --full     measure the official widths first: a quarter of an hour, 11 GB

What was measured at full width is kept in `tools/full_size.json` and shown by both.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

TESTS = Path(__file__).parents[1] / "tests"
KEPT = Path(__file__).with_name("full_size.json")
sys.path += [str(TESTS), str(TESTS / "parity")]

import numpy as np  # noqa: E402
import oracle  # noqa: E402
import pairs  # noqa: E402
import small  # noqa: E402
import test_half  # noqa: E402
import test_pictures  # noqa: E402

import sd3min  # noqa: E402
from sd3min import flow, probes  # noqa: E402
from sd3min.probes import twins  # noqa: E402

Row = tuple[str, ...]  # rung, what is compared, precision, difference, what the rung allows
HEAD = ("rung", "compared with diffusers", "precision", "largest relative difference", "allowed")


def exact_row(title: str, error: float, allowed: float = oracle.RUNG_1) -> Row:
    """A row of the first rung."""
    return "1", title, "float64", f"{error:.0e}", f"{allowed:.0e}"


def mmdit_rows() -> Iterator[Row]:
    """The velocity of each variant, batch 3, 6x10 latents."""
    for variant, config in small.VARIANTS.items():
        mmdit, title = small.mmdit(config).double(), f"MMDiT, {variant} layout"
        model, given = oracle.transformer(mmdit), oracle.inputs(mmdit)
        allowed = oracle.RUNG_1_QK_NORM if config.qk_norm else oracle.RUNG_1
        error = oracle.relative(mmdit(*given), oracle.velocity(model, *given))
        yield exact_row(title, error, allowed)
        if config.qk_norm:
            exact = oracle.with_exact_norms(model)
            error = oracle.relative(mmdit(*given), oracle.velocity(exact, *given))
            yield exact_row(f"{title}, q/k norm in float64 on both sides", error)


def autoencoder_rows() -> Iterator[Row]:
    """Moments and pictures, batch 3, 48x80 pixels."""
    autoencoder = small.autoencoder().double()
    vae = oracle.vae(autoencoder)
    images = torch.rand(3, 3, 48, 80, generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    posterior, latents = vae.encode(images).latent_dist, autoencoder.encode(images)
    error = oracle.relative(autoencoder.moments(images)[0], posterior.mean)
    yield exact_row("autoencoder, encode", error)
    unscaled = latents / vae.config.scaling_factor + vae.config.shift_factor
    error = oracle.relative(autoencoder.decode(latents), vae.decode(unscaled).sample)
    yield exact_row("autoencoder, decode", error)


def text_rows(pipe: sd3min.Pipeline) -> Iterator[Row]:
    """Context and pooled vector of three prompts, one of them cut."""
    prompts = ["a red circle!", "", "an orange heart left of a pink star on white " * 9]
    ours, theirs = pipe.encode_prompt(prompts, 77), oracle.pipeline(pipe)
    expected = theirs.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=77
    )
    error = oracle.relative(ours.context, expected[0])
    yield exact_row("text, context from raw strings", error)
    yield exact_row("text, pooled", oracle.relative(ours.pooled, expected[2]))


def schedule_row() -> Row:
    """The largest difference of any time, for 1, 4, 28, 50 steps at shifts 1, 3, 6."""
    worst = max(
        (flow.sigmas(steps, shift) - twins.sigmas(steps, shift)).abs().max().item()
        for shift in (1.0, 3.0, 6.0)
        for steps in (1, 4, 28, 50)
    )
    return "1", "schedules, largest difference", "float32", f"{worst:.0e}", "1e-07"


def picture_rows(title: str, pipe: sd3min.Pipeline) -> Iterator[Row]:
    """Values that differ between whole pictures, and how many there are."""
    for dtype, allowed in ((torch.float64, "none"), (torch.float32, "0.5 %, by 1 level")):
        pipe = test_pictures.in_type(pipe, dtype)
        theirs, different, values = oracle.pipeline(pipe), 0, 0
        for case in test_pictures.CASES.values():
            noise = test_pictures.noise(pipe, case).to(dtype)
            expected = test_pictures.their_pictures(theirs, pipe, case, latents=noise)
            ours = test_pictures.our_pictures(pipe, case).astype(int)
            assert np.abs(ours - expected).max() <= 1
            different += int((ours != expected).sum())
            values += expected.size
        precision = str(dtype).removeprefix("torch.")
        yield "3", f"pictures, {title}", precision, f"{different} of {values:,} values", allowed


def half_row(figures: pairs.HalfFigures, title: str) -> Row:
    """A row of the fourth rung: our error against float64, as a multiple of diffusers'."""
    error = f"{figures.ratio:.2f} x diffusers' own error of {statistics.median(figures.theirs):.1e}"
    return "4", title, "bfloat16", error, f"{oracle.RUNG_4} x"


def half_rows(folder: Path) -> Iterator[Row]:
    """Small models in bfloat16; the error is the median of five inputs'."""
    for part, build in test_half.BUILDS.items():
        for figures in build(torch.bfloat16, folder).half_figures():
            layout = f", {part} layout" if figures.title.startswith("MMDiT") else ""
            yield half_row(figures, figures.title.removesuffix(", small") + layout)


def verify_row() -> Row:
    """The shipped weights under `sd3min verify`."""
    checks = list(probes.verify())
    passed = sum(check.passed is True for check in checks)
    return "5", "sd3min verify, sd3-tiny", "both", f"{passed} of {len(checks)} passed", "all"


def measure_full_size() -> None:
    """Measure the official widths, and keep what was found after each model."""
    kept: dict[str, list[dict]] = {"single": [], "half": []}
    for kind, builds in (("single", pairs.FULL_SINGLE), ("half", pairs.FULL_HALF)):
        for build in builds.values():
            pair = build()
            found = pair.figures() if kind == "single" else pair.half_figures()
            kept[kind] += [figures._asdict() for figures in found]
            KEPT.write_text(json.dumps(kept, indent=1) + "\n")
            del pair, found
            gc.collect()


def full_size_rows() -> Iterator[Row]:
    """What was measured at the official widths."""
    kept = json.loads(KEPT.read_text())
    for figures in (pairs.Figures(**row) for row in kept["single"]):
        title = f"{figures.title}, {figures.parameters:,} parameters"
        yield "2", title, "float32", f"{figures.apart:.0e}", f"{figures.allowed:.0e}"
        yield exact_row(title, figures.double, figures.double_allowed)
    for figures in (pairs.HalfFigures(**row) for row in kept["half"]):
        yield half_row(figures, f"{figures.title}, {figures.parameters:,} parameters")


def rows() -> list[Row]:
    """The whole table, by rungs; the official widths last in each."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = small.pipeline(Path(folder))
        found = [
            *mmdit_rows(),
            *autoencoder_rows(),
            *text_rows(test_pictures.in_type(pipe, torch.float64)),
            schedule_row(),
            *picture_rows("small random model", pipe),
            *picture_rows("sd3-tiny", sd3min.load()),
            *half_rows(Path(folder)),
            verify_row(),
            *full_size_rows(),
        ]
    return sorted(found, key=lambda row: row[0])


def table() -> str:
    """The table in Markdown."""
    lines = [HEAD, ("---",) * len(HEAD), *rows()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="measure the official widths first")
    if parser.parse_args().full:
        with torch.no_grad():
            measure_full_size()
    print(table())

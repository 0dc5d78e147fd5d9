"""Draw the README's pictures and write its tables: python tools/figures.py.

In `weights/figures`, `grid.png` shows the first prompts of each kind, their indices as seeds,
`demo.png` the picture of `make demo`,
`curves.png` what `tools/measure_tiny.py` measured into `weights/sd3-tiny/accuracy.json`, and
`training.png` the losses that `weights/sd3-tiny/training.json` has of the shipped weights.
"""

import json
import random
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import bench
import bench_t5
import densities
import dreambooth
import int8_errors
import matplotlib.pyplot as plt
import parity
import profile_step
import reading_cost
from matplotlib.layout_engine import ConstrainedLayoutEngine

import sd3min
from sd3min.training import captions, scenes

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "weights" / "figures"
ACCURACY = ROOT / "weights" / "sd3-tiny" / "accuracy.json"
TRAINING = ROOT / "weights" / "sd3-tiny" / "training.json"
ROWS = {
    "seen": "what training showed",
    "pairs": "a pair of colour and shape that it never showed",
    "triples": "an arrangement of two things that it never showed",
}
ASPECTS = {"right": "all right", "noun": "things", "colour": "colours", "relation": "relations"}
GROUND = "ground, where named"  # which the others leave aside
STYLES = ("o-", "^:", "s:", "d:")  # of the curves, one an aspect
SPEEDS = (bench.RESULTS, bench.RESULTS.with_name("bench_amx.json"))
PEERS = tuple(bench.RESULTS.with_name(f"bench_{name}.json") for name in ("openvino", "cpp"))
ENCODERS = {"clip_l": "CLIP-L", "clip_g": "CLIP-G", "t5": "T5"}
COLUMNS = 6
EXPLAINED = ("diffusers", "sd3-ref")


def percent(value: float) -> str:
    """A share in per cent."""
    return f"{100 * value:.1f} %"


def together(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Shares over the prompts of several figures."""

    def mean(aspect: str, of: str) -> float:
        return sum(row[aspect] * row[of] for row in rows) / sum(row[of] for row in rows)

    shares = {aspect: mean(aspect, "prompts") for aspect in ASPECTS}
    return shares | {"ground": mean("ground", "grounds")}


def accuracy_table(figures: Mapping[str, Any]) -> str:
    """How often sd3-tiny's pictures show what was asked for, in Markdown."""
    measured = figures["measured"]
    seen, pairs, triples = (measured[kind] for kind in ROWS)
    quick = [measured[f"{kind}, 8 steps"] for kind in ROWS]
    kept, held_out = measured["reconstruction"], pairs["prompts"] + triples["prompts"]
    rows = {
        f"{seen['prompts']:,} seen prompts": seen,
        f"{held_out:,} held-out prompts": together([pairs, triples]),
        f"{pairs['prompts']:,} of them with a held-out colour-shape pair": pairs,
        f"{triples['prompts']:,} with a held-out relation of two things": triples,
        "the same seen prompts in 8 steps": quick[0],
        "the same held-out prompts in 8 steps": together(quick[1:]),
        f"{kept['prompts']:,} drawn scenes through the autoencoder alone, "
        f"{kept['psnr']:.1f} dB": kept,
    }
    lines = [f"| | {' | '.join([*ASPECTS.values(), GROUND])} |", "|---" * (2 + len(ASPECTS)) + "|"]
    for title, row in rows.items():
        cells = [percent(row[aspect]) for aspect in (*ASPECTS, "ground")]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join([*lines, *things_lines(measured)])


def things_lines(measured: Mapping[str, Any]) -> list[str]:
    """Rows of the accuracy table by the number of things, seen and held out together."""
    lines = []
    for things, title in {"1": "one thing", "2": "two things", "3": "three things"}.items():
        rows = [measured[kind]["things"] for kind in ROWS]
        rows = [row[things] for row in rows if things in row]
        prompts = sum(row["count"] for row in rows)
        right = sum(row["count"] * row["right"] for row in rows) / prompts
        lines.append(f"| {prompts:,} of all prompts, with {title} | {percent(right)} | | | | |")
    return lines


def ablation_table(figures: Mapping[str, Any]) -> str:
    """What each text encoder is worth, in Markdown."""
    measured = figures["measured"]
    rows = {"all three encoders": measured["whole"]}
    rows |= {f"without {title}": measured[f"without/{name}"] for name, title in ENCODERS.items()}
    for name, title in ENCODERS.items():
        rows[f"{title}'s weights shuffled"] = measured[f"shuffled/{name}"]
    for form in group(measured, "forms"):
        rows[f"all three encoders, {form}"] = measured[f"forms/{form}"]
    prompts = measured["whole"]["prompts"]
    head = f"| {prompts:,} prompts, half of them held out | all right |\n|---|---|"
    lines = [f"| {title} | {percent(row['right'])} |" for title, row in rows.items()]
    return "\n".join([head, *lines])


def group(measured: Mapping[str, Any], name: str) -> dict[str, Mapping[str, Any]]:
    """The figures of a group such as "steps", by what they were measured at."""
    start = f"{name}/"
    return {key.removeprefix(start): row for key, row in measured.items() if key.startswith(start)}


def cost_table() -> str:
    """What there is to read, in Markdown."""
    cost = reading_cost.measure()
    rows = {"**sd3min**": (sum(cost.statements.values()), len(cost.frames))} | reading_cost.OTHERS
    lines = ["| | statements | own frames to softmax |", "|---|---|---|"]
    lines += [f"| {name} | {count:,} | {frames or '–'} |" for name, (count, frames) in rows.items()]
    return "\n".join(lines)


def speed_table(*machines: Path) -> str:
    """How quick it is beside diffusers on machines that results are of, in Markdown."""
    results = [json.loads(path.read_text()) for path in machines]
    return "\n\n".join(f"{each['processor']}:\n\n{bench.table(each)}" for each in results)


def explain_table() -> str:
    """What diffusers and the official code differ in, and what each alone changes, in Markdown."""
    a, b = EXPLAINED
    lines = [f"| choice | {a} | {b} | pictures | values changed | on average | at most |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in sd3min.explain(a, b):
        values = f"{row.a} | {row.b} | {row.situation} | {percent(row.share)}"
        lines.append(f"| {row.choice} | {values} | {row.mean:.2f} | {row.largest} |")
    return "\n".join(lines)


def draw_grid() -> None:
    """The first prompts of each kind, nothing picked."""
    pipe = sd3min.load()
    figure, axes = plt.subplots(
        len(ROWS), COLUMNS, figsize=(10.5, 7), dpi=120, layout=ConstrainedLayoutEngine(h_pad=0.12)
    )
    for row, (kind, title) in zip(axes, ROWS.items(), strict=True):
        chosen = enumerate(scenes.prompts(kind, COLUMNS))
        wanted = [captions.worded(scene, random.Random(index)) for index, scene in chosen]
        pictures = pipe(wanted, seed=0, progress=False)
        for place, prompt, picture in zip(row, wanted, pictures, strict=True):
            place.imshow(picture, interpolation="nearest")
            place.set_xticks([])
            place.set_yticks([])
            place.set_xlabel("\n".join(textwrap.wrap(prompt, 26)), fontsize=7.5)
        look = {"transform": row[0].transAxes, "fontsize": 9.5, "fontweight": "bold"}
        row[0].text(0, 1.05, title, in_layout=False, **look)
    figure.savefig(FIGURES / "grid.png", bbox_inches="tight", pad_inches=0.25)


def draw_demo() -> None:
    """The picture of `make demo`, for comparison."""
    command = re.search(r'generate "(.+)" --seed (\d+)', (ROOT / "Makefile").read_text())
    if command is None:
        raise ValueError("the Makefile has no demo with a prompt and a seed")
    picture = sd3min.load()(command[1], seed=int(command[2]), progress=False)[0]
    sd3min.save(picture, FIGURES / "demo.png")


def draw_curves(figures: Mapping[str, Any]) -> None:
    """Accuracy against guidance scale and against steps."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), dpi=110, sharey=True)
    for place, name in zip(axes, ("guidance", "steps"), strict=True):
        rows = group(figures["measured"], name)
        settings = sorted(rows, key=float)
        for (aspect, title), style in zip(ASPECTS.items(), STYLES, strict=True):
            values = [100 * rows[setting][aspect] for setting in settings]
            width = 2 if aspect == "right" else 1
            place.plot([float(x) for x in settings], values, style, label=title, linewidth=width)
        place.set_xlabel({"guidance": "guidance scale", "steps": "Euler steps"}[name])
        place.grid(alpha=0.3)
    prompts = next(iter(group(figures["measured"], "steps").values()))["prompts"]
    axes[0].set_ylabel(f"% of {prompts} prompts")
    axes[0].set_ylim(0, 102)
    axes[1].legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(FIGURES / "curves.png")


def draw_training(sittings: Sequence[Mapping[str, Any]]) -> None:
    """The flow's loss over all steps, and of the last sitting by time."""
    figure, (whole, last) = plt.subplots(1, 2, figsize=(9, 3), dpi=110, layout="constrained")
    start = 0
    for i, sitting in enumerate(sittings):
        steps = [start + (j + 1) * sitting["every"] for j in range(len(sitting["loss"]))]
        whole.plot(steps, sitting["loss"], linewidth=1, label=f"{i + 1}: {sitting['title']}")
        start = steps[-1]
    whole.set(xlabel="step of 64 latents", ylabel="loss", yscale="log")
    whole.legend(fontsize=7, frameon=False)
    every, by_time = sittings[-1]["every"], sittings[-1]["by time"]
    for title, losses in by_time.items():
        steps = [(j + 1) * every for j in range(len(losses))]
        last.plot(steps, losses, linewidth=1, label=f"t from {title}")
    last.set(xlabel=f"step of sitting {len(sittings)}", yscale="log")
    last.legend(fontsize=7, frameon=False)
    for place in (whole, last):
        place.grid(alpha=0.3, which="both")
    figure.savefig(FIGURES / "training.png")


def fill_in(text: str, tables: Mapping[str, str]) -> str:
    """A text with every table between its two marks replaced."""
    for name, table in tables.items():
        marks = f"<!-- {name} -->", f"<!-- /{name} -->"
        pattern = f"{re.escape(marks[0])}.*?{re.escape(marks[1])}"
        text, found = re.subn(pattern, f"{marks[0]}\n{table}\n{marks[1]}", text, flags=re.DOTALL)
        if found != 1:
            raise ValueError(f"the mark {marks[0]} stands {found} times in the text, not once")
    return text


def main() -> None:
    """Draw and write everything."""
    FIGURES.mkdir(exist_ok=True)
    figures = json.loads(ACCURACY.read_text())
    draw_demo()
    draw_grid()
    draw_curves(figures)
    draw_training(json.loads(TRAINING.read_text()))
    tables = {
        "accuracy": accuracy_table(figures),
        "ablation": ablation_table(figures),
        "cost": cost_table(),
        "speed": speed_table(*SPEEDS),
        "peers": speed_table(*PEERS),
        "profile": profile_step.table(json.loads(profile_step.RESULTS.read_text())),
        "int8": int8_errors.table(json.loads(int8_errors.RESULTS.read_text())),
        "t5": bench_t5.table(json.loads(bench_t5.RESULTS.read_text())),
        "dreambooth": dreambooth.table(json.loads((FIGURES / "dreambooth.json").read_text())),
        "densities": densities.table(json.loads((FIGURES / "densities.json").read_text())),
        "explain": explain_table(),
        "parity": parity.table().strip(),
    }
    readme = ROOT / "README.md"
    readme.write_text(fill_in(readme.read_text(), tables))


if __name__ == "__main__":
    main()

"""Draw the README's pictures and write its tables: python tools/figures.py.

In `weights/figures`, `grid.png` shows the first prompts of each kind, their indices as seeds,
`demo.png` the picture of `make demo`, and
`curves.png` what `tools/measure_tiny.py` measured into `weights/sd3-tiny/accuracy.json`.
"""

import json
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import bench
import matplotlib.pyplot as plt
import parity
import reading_cost

import sd3min
from sd3min.training import scenes

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "weights" / "figures"
ACCURACY = ROOT / "weights" / "sd3-tiny" / "accuracy.json"
ROWS = {
    "seen": "colour-shape pairs and relations seen in training",
    "pairs": "a colour-shape pair held out of training",
    "triples": "a relation of two shapes held out of training",
}
COLUMNS = 6
EXPLAINED = ("diffusers", "sd3-ref")


def percent(value: float) -> str:
    """A share in per cent."""
    return f"{100 * value:.1f} %"


def accuracy_table(figures: Mapping[str, Any]) -> str:
    """How often sd3-tiny's pictures show what was asked for, in Markdown."""
    count, psnr = figures["count"], figures["reconstruction"]["psnr"]
    rows = {
        f"{count} seen prompts": figures["seen"],
        f"{count} held-out prompts": figures["held out"],
        f"{count // 2} of them with a held-out colour-shape pair": figures["held-out pairs"],
        f"{count - count // 2} with a held-out relation triple": figures["held-out triples"],
        f"{count} drawn scenes through the autoencoder alone, {psnr:.1f} dB": figures[
            "reconstruction"
        ],
    }
    lines = ["| | all right | colour | shape | relation |", "|---|---|---|---|---|"]
    for title, row in rows.items():
        cells = (percent(row[aspect]) for aspect in ("right", "colour", "shape", "relation"))
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ablation_table(figures: Mapping[str, Any]) -> str:
    """What each text encoder is worth, in Markdown."""
    rows = {"all three encoders": figures["whole"], "without T5": figures["without T5"]}
    titles = {"clip_l": "CLIP-L", "clip_g": "CLIP-G", "t5": "T5"}
    rows |= {f"{titles[name]}'s weights shuffled": row for name, row in figures["shuffled"].items()}
    rows |= {f"all three encoders, {form}": row for form, row in figures["forms"].items()}
    head = (
        f"| {figures['ablation prompts']} prompts, half of them held out | all right |\n|---|---|"
    )
    lines = [f"| {title} | {percent(row['right'])} |" for title, row in rows.items()]
    return "\n".join([head, *lines])


def cost_table() -> str:
    """What there is to read, in Markdown."""
    cost = reading_cost.measure()
    rows = {"**sd3min**": (sum(cost.statements.values()), len(cost.frames))} | reading_cost.OTHERS
    lines = ["| | statements | own frames to softmax |", "|---|---|---|"]
    lines += [f"| {name} | {count:,} | {frames or '–'} |" for name, (count, frames) in rows.items()]
    return "\n".join(lines)


def speed_table(results: Mapping[str, Any]) -> str:
    """How quick it is beside diffusers, in Markdown."""
    return bench.table(results)


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
    figure, axes = plt.subplots(len(ROWS), COLUMNS, figsize=(11, 6), dpi=110)
    for row, (kind, title) in zip(axes, ROWS.items(), strict=True):
        wanted = [scene.caption for scene in scenes.prompts(kind, COLUMNS)]
        pictures = pipe(wanted, seed=0, progress=False)
        for place, prompt, picture in zip(row, wanted, pictures, strict=True):
            place.imshow(picture, interpolation="nearest")
            place.set_xticks([])
            place.set_yticks([])
            place.set_xlabel("\n".join(textwrap.wrap(prompt, 24)), fontsize=8.5)
        row[0].set_title(title, loc="left", fontsize=10, fontweight="bold")
    figure.tight_layout(h_pad=0.6)
    figure.savefig(FIGURES / "grid.png")


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
        settings = [float(value) for value in figures[name]]
        for aspect, style in (
            ("right", "o-"),
            ("colour", "s:"),
            ("shape", "^:"),
            ("relation", "d:"),
        ):
            values = [100 * row[aspect] for row in figures[name].values()]
            title = "all right" if aspect == "right" else aspect
            place.plot(
                settings, values, style, label=title, linewidth=2 if aspect == "right" else 1
            )
        place.set_xlabel({"guidance": "guidance scale", "steps": "Euler steps"}[name])
        place.grid(alpha=0.3)
    axes[0].set_ylabel(f"% of {figures['curve prompts']} prompts")
    axes[0].set_ylim(0, 102)
    axes[1].legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(FIGURES / "curves.png")


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
    draw_grid()
    draw_demo()
    draw_curves(figures)
    tables = {
        "accuracy": accuracy_table(figures),
        "ablation": ablation_table(figures),
        "cost": cost_table(),
        "speed": speed_table(json.loads(bench.RESULTS.read_text())),
        "explain": explain_table(),
        "parity": parity.table().strip(),
    }
    readme = ROOT / "README.md"
    readme.write_text(fill_in(readme.read_text(), tables))


if __name__ == "__main__":
    main()

"""Break the package on purpose: does a test notice, and what does the mistake do to a picture?

python tools/mutations.py [--only TEXT] [--out FOLDER]

Each of `mutations.toml` is a mistake that an implementation of Stable Diffusion 3 can make and
still draw pictures. It is made in a copy, one at a time; the tests that should notice are run
there, and the outputs of `outputs.py` are compared with the right ones. FOLDER receives the tables
as `mutations.md` and the broken pictures beside it. The exit code is 1 where a mutation survives.
All of them take about 40 minutes.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
COPIED = ("sd3min", "tests", "pyproject.toml", "README.md")
LINKED = ("weights", "../shared")  # read only; the second where it is: some tests use it
SMALL = ("-k", "not sd3-tiny")  # small random models notice as much, and sooner
PICTURES = ("test_pipeline.py", "parity/test_conventions.py", "parity/test_pictures.py")
TESTS = {  # by the file that is changed; those that are quick come first
    "mmdit.py": ("test_mmdit.py", "parity/test_mmdit.py"),
    "autoencoder.py": ("test_autoencoder.py", "parity/test_autoencoder.py"),
    "text_encoders.py": (
        "test_text_encoders.py",
        "parity/test_text_encoders.py",
        "parity/test_conventions.py",
    ),
    "flow.py": ("test_flow.py", *PICTURES),
    "settings.py": ("test_settings.py", *PICTURES),
    "formats.py": ("parity/test_mmdit.py",),
    "stored.py": ("test_official_files.py",),
    "parts.py": ("test_official_files.py",),
    "pipeline.py": PICTURES,
}
SHOWN = 1.0  # levels of 255, on average, from which a broken picture is worth a look
COLUMNS = 9  # of the sheet of broken pictures

Outputs = Mapping[str, np.ndarray]


class Mutation(NamedTuple):
    """A mistake: what it is, why it is easy to make, and the text that another one replaces."""

    file: str
    title: str
    why: str
    old: str
    new: str


class Effect(NamedTuple):
    """What a mistake does, and who notices."""

    caught: str  # name of the first test that fails, or nothing
    output: str  # the output of a network that changes most
    change: float  # of it: |a − b| / |b|
    levels: float  # of 255, by which sd3-tiny's two pictures change on average, the larger one
    picture: np.ndarray  # the one that changes more, [h, w, 3]


def catalogue() -> list[Mutation]:
    """All mutations of `mutations.toml`."""
    rows = tomllib.loads((ROOT / "tools" / "mutations.toml").read_text())["mutation"]
    return [Mutation(**row) for row in rows]


INTRODUCTION = """# Mistakes

Written by `python tools/mutations.py --out weights/figures`. Every row is one mistake, made on
purpose in a copy of the package. The third column is the output of a small random network, in
float64, that changes most, and by how much (relative norm); the fourth how far the values of
sd3-tiny's picture move on average; the last the first test that fails. Many mistakes leave
plausible pictures, and some leave the very same one: looking at pictures finds few of them.

Under each file stand the pictures that its mistakes visibly change.
"""


def copy_project(folder: Path) -> None:
    """Copy what the tests need, and link what they only read."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy(source, folder / name)
    for name in LINKED:
        if (ROOT / name).exists():
            (folder / name).symlink_to((ROOT / name).resolve())


def existing(folder: Path, files: Iterable[str]) -> list[str]:
    """The test files of the mutated files, each once."""
    tests = dict.fromkeys(f"tests/{test}" for file in files for test in TESTS[file])
    return [test for test in tests if (folder / test).exists()]


def environment(folder: Path) -> dict[str, str]:
    """The environment in which the package of a folder is imported."""
    return os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}


def first_failure(folder: Path, tests: Sequence[str]) -> str:
    """Run tests in a copy; the name of the first that fails, or nothing."""
    command = [sys.executable, "-m", "pytest", "-xq", "-p", "no:cacheprovider", *SMALL, *tests]
    done = subprocess.run(
        command, cwd=folder, env=environment(folder), capture_output=True, text=True
    )
    failed = re.search(r"^(?:FAILED|ERROR) \S+?::(.+?)(?: - |$)", done.stdout, re.MULTILINE)
    if done.returncode not in (0, 1) or (done.returncode == 1 and not failed):
        sys.exit(f"the tests {', '.join(tests)} did not run:\n{done.stdout}{done.stderr}")
    return failed[1] if failed else ""


def outputs(folder: Path) -> Outputs:
    """What the package in a folder computes; nothing where it stops with an error."""
    file = folder / "outputs.npz"
    command = [sys.executable, str(ROOT / "tools" / "outputs.py"), str(file)]
    done = subprocess.run(command, env=environment(folder), capture_output=True)
    if done.returncode:
        return {}
    with np.load(file) as found:
        return dict(found)


def compare(found: Outputs, right: Outputs, caught: str) -> Effect:
    """How far a broken package's outputs are from the right ones."""
    if not found:
        return Effect(caught, "", 0.0, 0.0, np.zeros(0))
    changes = {
        name: float(np.linalg.norm(found[name] - value) / np.linalg.norm(value))
        if found[name].shape == value.shape
        else np.inf
        for name, value in right.items()
        if value.dtype != np.uint8
    }
    pictures = {
        name: np.abs(found[name].astype(float) - value).mean()
        for name, value in right.items()
        if value.dtype == np.uint8
    }
    output, picture = max(changes, key=changes.__getitem__), max(pictures, key=pictures.__getitem__)
    return Effect(caught, output, changes[output], pictures[picture], found[picture])


def mutate(folder: Path, mutation: Mutation, right: Outputs) -> Effect:
    """Make one mistake in a copy, run its tests, compare its outputs, and undo it."""
    path = folder / "sd3min" / mutation.file
    text = path.read_text()
    path.write_text(text.replace(mutation.old, mutation.new))
    try:
        caught = first_failure(folder, existing(folder, [mutation.file]))
        return compare(outputs(folder), right, caught)
    finally:
        path.write_text(text)


def check_texts(folder: Path, mutations: Sequence[Mutation]) -> None:
    """Stop where the text that a mutation replaces is not in its file exactly once."""
    for mutation in mutations:
        found = (folder / "sd3min" / mutation.file).read_text().count(mutation.old)
        if found != 1:
            sys.exit(f"{mutation.title}: found {found} times in {mutation.file}: {mutation.old}")


def table(effects: Mapping[Mutation, Effect]) -> str:
    """The mutations and their effects in Markdown."""
    lines = [
        "| mistake | why it is easy to make | output that changes most | sd3-tiny's picture "
        "| caught by |",
        "|---|---|---|---|---|",
    ]
    for mutation, effect in effects.items():
        changed = f"{effect.output}: {effect.change:.1g}" if effect.change else "none"
        levels = f"{effect.levels:.1f} of 255" if effect.levels else "the same"
        if not effect.output:
            changed, levels = "stops with an error", "none"
        caught = f"`{effect.caught}`" if effect.caught else "**nobody**"
        cells = (mutation.title, mutation.why, changed, levels, caught)
        lines.append(f"| {' | '.join(cell.replace('|', '∣') for cell in cells)} |")
    return "\n".join(lines)


def draw(effects: Mapping[Mutation, Effect], path: Path) -> None:
    """The pictures of the mutations that show."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    shown = [(m, e) for m, e in effects.items() if e.levels >= SHOWN]
    rows = max(1, -(-len(shown) // COLUMNS))
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(1.35 * COLUMNS, 1.75 * rows), dpi=110)
    for place in axes.flat:
        place.axis("off")
    for place, (mutation, effect) in zip(axes.flat, shown, strict=False):
        place.imshow(effect.picture, interpolation="nearest")
        place.set_title("\n".join(textwrap.wrap(mutation.title, 22)), fontsize=6.5)
    figure.tight_layout(pad=0.4)
    figure.savefig(path, bbox_inches="tight")


def write(effects: Mapping[Mutation, Effect], folder: Path) -> None:
    """Write the table of each file and its sheet of pictures."""
    sections = [INTRODUCTION]
    for file in dict.fromkeys(mutation.file for mutation in effects):
        own = {mutation: effect for mutation, effect in effects.items() if mutation.file == file}
        sections.append(f"## {file}\n\n{table(own)}\n")
        if any(effect.levels >= SHOWN for effect in own.values()):
            sheet = f"mutations-{Path(file).stem}.png"
            draw(own, folder / sheet)
            sections.append(f"![The demo's picture under mistakes in {file}]({sheet})\n")
    (folder / "mutations.md").write_text("\n".join(sections))


def main() -> None:
    """Check that the tests pass as they are, then print what each mutation does."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="those whose file or title contains this text")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of the table and the pictures")
    arguments = parser.parse_args()
    only = arguments.only
    mutations = [made for made in catalogue() if only in f"{made.file} {made.title}"]
    if not mutations:
        sys.exit(f"no mutation's file or title contains {only!r}")
    effects: dict[Mutation, Effect] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "project"
        folder.mkdir()
        copy_project(folder)
        check_texts(folder, mutations)
        tests = existing(folder, [mutation.file for mutation in mutations])
        if failed := first_failure(folder, tests):
            sys.exit(f"{failed} fails without any mutation")
        right = outputs(folder)
        if not right:
            sys.exit("outputs.py stops with an error without any mutation")
        for mutation in tqdm(mutations, unit="mutation"):
            effects[mutation] = mutate(folder, mutation, right)
            if not effects[mutation].caught:
                tqdm.write(f"SURVIVED: {mutation.title}")

    print(table(effects))
    survivors = sum(not effect.caught for effect in effects.values())
    print(f"\n{len(mutations)} mutations, {survivors} survived")
    if arguments.out is not None:
        write(effects, arguments.out)
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main()

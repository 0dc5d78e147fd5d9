"""Time a picture by sd3-tiny from a fresh process, beside diffusers: python tools/bench_startup.py.

Every run is a process of its own, from its start to its end, and all take turns; medians count. The
picture is the same one: sd3-tiny's, which diffusers reads from the folder that `sd3min convert`
writes of it. diffusers is told what sd3-tiny's metadata tell sd3min: steps, guidance, shift, size,
rows of T5; in float32. One side has the prompt's embedding in a cache, from a run before. The
stages are those of Python, by the clock, and what is missing to the whole is the interpreter's
start and end. Writes tools/startup.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sd3min import checkpoint
from sd3min.convert import convert

RESULTS = Path(__file__).with_name("startup.json")
PROMPT = "a green circle below a red heart on white"
STAGED = """
import json, time
marks = [time.perf_counter()]
def mark(): marks.append(time.perf_counter())
{}
print(json.dumps([after - before for before, after in zip(marks, marks[1:])]))
"""
OWN = """
import torch; mark()
import sd3min; mark()
pipe = sd3min.load(**{options}); mark()
images = pipe({prompt!r}, seed=1, progress=False); mark()
sd3min.save(images[0], {out!r}); mark()
"""
DIFFUSERS = """
import torch; mark()
from diffusers import StableDiffusion3Pipeline; mark()
pipe = StableDiffusion3Pipeline.from_pretrained({folder!r}, torch_dtype=torch.float32)
pipe.set_progress_bar_config(disable=True); mark()
images = pipe({prompt!r}, **{defaults}, generator=torch.Generator().manual_seed(1)).images; mark()
images[0].save({out!r}); mark()
"""
STAGES = ("import torch", "import the package", "load", "make the picture", "save")


def commands(folder: Path) -> dict[str, list[str]]:
    """What each side runs, in a folder that holds the converted weights."""
    python = [sys.executable, "-W", "ignore"]
    own = checkpoint.Checkpoint.open().defaults
    defaults = {
        "num_inference_steps": own.steps,
        "guidance_scale": own.guidance_scale,
        "width": own.width,
        "height": own.height,
        "max_sequence_length": own.t5_length,
    }

    def staged(script: str, out: str, **options: str) -> list[str]:
        paths = {"folder": str(folder / "diffusers"), "out": str(folder / out), "options": options}
        given = {"prompt": PROMPT, "defaults": defaults} | paths
        return [*python, "-c", STAGED.format(script.format(**given))]

    generate = [*python, "-m", "sd3min", "generate", PROMPT, "--seed", "1"]
    return {
        "import torch": [*python, "-c", "import torch"],
        "import sd3min": [*python, "-c", "import torch, sd3min"],
        "sd3min generate": [*generate, "--out", str(folder / "command.png")],
        "sd3min": staged(OWN, "own.png"),
        "sd3min, fast": staged(OWN, "fast.png", memory="fast"),
        "sd3min, prompt cached": staged(
            OWN, "cached.png", memory="fast", cache=str(folder / "prompts")
        ),
        "diffusers": staged(DIFFUSERS, "theirs.png"),
    }


def run(command: list[str]) -> dict[str, Any]:
    """Seconds of the clock and of the processor, and those of the stages where there are any."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    began, used = time.perf_counter(), os.times()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    seconds, after = time.perf_counter() - began, os.times()
    busy = after.children_user - used.children_user + after.children_system - used.children_system
    last = done.stdout.splitlines()[-1:]
    stages = json.loads(last[0]) if last and last[0].startswith("[") else []
    return {"seconds": seconds, "processor": busy, "stages": stages}


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    """Medians of every side, taking turns, after one round that warms up."""
    sides = commands(folder)
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for i in range(rounds + 1):
        for side, command in sides.items():
            result = run(command)
            if i:
                found[side].append(result)
    return {
        side: {
            "seconds": statistics.median(r["seconds"] for r in runs),
            "spread": [min(r["seconds"] for r in runs), max(r["seconds"] for r in runs)],
            "processor": statistics.median(r["processor"] for r in runs),
            "stages": [
                statistics.median(s) for s in zip(*(r["stages"] for r in runs), strict=True)
            ],
        }
        for side, runs in found.items()
    }


def levels_apart(folder: Path) -> int:
    """How far the pictures are apart at most, of 255 levels."""
    names = ("own.png", "command.png", "fast.png", "cached.png", "theirs.png")
    own, *others = (np.asarray(Image.open(folder / name)).astype(int) for name in names)
    return max(int(np.abs(own - other).max()) for other in others)


def table(sides: Mapping[str, Any]) -> str:
    """The comparison in Markdown."""
    lines = ["| fresh process | seconds | processor | of diffusers |", "|---|---|---|---|"]
    whole = sides["diffusers"]["seconds"]
    for side, row in sides.items():
        times = f"{row['seconds']:.2f} | {row['processor']:.2f}"
        lines.append(f"| {side} | {times} | {row['seconds'] / whole:.2f} |")
    staged = {side: row["stages"] for side, row in sides.items() if row["stages"]}
    lines += ["", f"| stage | {' | '.join(staged)} |", "|---" * (1 + len(staged)) + "|"]
    for stage, *seconds in zip(STAGES, *staged.values(), strict=True):
        lines.append(f"| {stage} | {' | '.join(f'{each:.2f}' for each in seconds)} |")
    beyond = sides["import sd3min"]["seconds"] - sides["import torch"]["seconds"]
    return "\n".join([*lines, "", f"`import sd3min` takes {beyond:.2f} s beyond `import torch`."])


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        convert(checkpoint.tiny(), folder / "diffusers", progress=False)
        sides = measure(folder, arguments.rounds)
        apart = levels_apart(folder)
    results = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    results |= {"levels apart": apart, "sides": sides}
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(sides))
    print(f"The pictures are at most {apart} levels of 255 apart.")


if __name__ == "__main__":
    main()

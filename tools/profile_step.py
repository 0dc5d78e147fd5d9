"""Where the time of a step goes: python tools/profile_step.py [--depth 4] [--sizes 512 1024].

Guided steps of SD3-medium's width with 333 rows of text, random weights in bfloat16, under
PyTorch's profiler: what each operator took without those that it called, sd3min's own loops in C
among them. Sides take turns by the step; shares and ratios count, seconds belong to the machine.
Writes tools/profile.json.
"""

import argparse
import functools
import gc
import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from bench import processor
from bench_sides import SIDES, Work
from torch.profiler import ProfilerActivity, profile, record_function

from sd3min.fast import native

RESULTS = Path(__file__).with_name("profile.json")
COMPARED = ("diffusers", "plain", "fast", "int8")
OWN = "sd3min::"  # before the names of the loops in C
GROUPS = {  # what an operator's name has in it, the first that fits
    "attention": ("scaled_dot_product", "flash_attention", f"{OWN}attention"),
    "linear layers": ("mm", "linear", "convolution"),
    "to and from 8 bits": ("quantise", "rescale"),
}
REST = "all else"


def group(operator: str) -> str:
    """What kind of work an operator is."""
    return next((kind for kind, parts in GROUPS.items() if any(p in operator for p in parts)), REST)


def recorded() -> None:
    """Let the profiler see the loops in C by their names."""
    plain = native.call

    @functools.wraps(plain)
    def call(name: str, *arguments: Any) -> None:
        with record_function(OWN + name):
            plain(name, *arguments)

    native.call = call


@torch.no_grad()
def seconds(work: Work) -> dict[str, float]:
    """Seconds of every operator in one step, without those that it calls."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        work()
    return {e.key: e.self_cpu_time_total / 1e6 for e in profiler.key_averages()}


def measure(size: int, depth: int, rounds: int) -> dict[str, dict[str, float]]:
    """The median seconds of every side's operators, those of less than a thousandth left out."""
    works = {name: SIDES[name](depth).step(size) for name in COMPARED}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in works}
    for turn in range(rounds + 1):  # the first warms up
        for name, work in works.items():
            spent = seconds(work)
            if turn:
                found[name].append(spent)
    del works
    gc.collect()
    medians = {}
    for name, runs in found.items():
        operators = dict.fromkeys(operator for run in runs for operator in run)
        spent = {o: statistics.median(run.get(o, 0.0) for run in runs) for o in operators}
        whole = sum(spent.values())
        kept = {o: round(s, 4) for o, s in spent.items() if s >= whole / 1000}
        medians[name] = dict(sorted(kept.items(), key=lambda item: -item[1]))
    return medians


def grouped(operators: Mapping[str, float]) -> dict[str, float]:
    """Seconds by kind of work."""
    found = dict.fromkeys((*GROUPS, REST), 0.0)
    for operator, spent in operators.items():
        found[group(operator)] += spent
    return found


def table(results: Mapping[str, Any]) -> str:
    """Time by kind of work, in parts of diffusers' whole step, in Markdown."""
    kinds = " | ".join((*GROUPS, REST))
    lines = [f"| step | | {kinds} | together |", "|---" * (len(GROUPS) + 4) + "|"]
    for size, sides in results["sizes"].items():
        whole = sum(sides["diffusers"].values())
        for side, operators in sides.items():
            shares = [spent / whole for spent in grouped(operators).values()]
            cells = [f"{share:.0%}" if share else "–" for share in (*shares, sum(shares))]
            lines.append(f"| {size} | {side} | {' | '.join(cells)} |")
    return "\n".join(lines)


def arguments(given: Iterable[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(None if given is None else list(given))


def main(given: Iterable[str] | None = None) -> None:
    """Measure, write and print."""
    asked = arguments(given)
    recorded()
    results = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "depth": asked.depth,
        "sizes": {str(size): measure(size, asked.depth, asked.rounds) for size in asked.sizes},
    }
    asked.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()

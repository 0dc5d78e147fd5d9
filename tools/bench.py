"""Time sd3min beside its peers on this machine: python tools/bench.py [--depth 24] [--rounds 5].

Each side is a process of its own (tools/bench_sides.py) with random bfloat16 weights of official
width, and all take turns, so that whatever else the machine does meets all of them. Medians and
ratios count; seconds belong to the machine. Peers that are not installed are left out: diffusers
comes with `pip install -e .[dev]`, OpenVINO with `pip install openvino`, stable-diffusion.cpp with
`pip install cyllama`. `--work "step 512"` puts that row alone anew; `--sides fast stream --work
"step 512" "step 1024" --scaling-depth 0 --out tools/bench_stream.json` is what reading from the
file costs.

GFLOP/s are those of the plain network's products, depth·(24·d²·T + 4·T²·d) for T tokens of d
channels of each picture, whatever a side does to need fewer, beside the most that one product
reaches here. Writes tools/bench.json and, in weights/figures, bench.png.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sd3min.config import HEAD_WIDTH
from sd3min.fast import kernels
from sd3min.fast.linear import Int8Linear, packed

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "tools" / "bench.json"
WIDTH, TEXT = 1536, 333
PEERS = {
    "diffusers": "diffusers",
    "diffusers, channels last": "diffusers",
    "diffusers, compiled": "diffusers",
    "OpenVINO": "openvino",
    "stable-diffusion.cpp": "cyllama",
}
DEFAULT = ["diffusers", "plain", "fast", "int8", "diffusers, channels last"]
STEPS_ALONE = ("int8", "stream", "OpenVINO", "stable-diffusion.cpp")  # with no decoder of their own
DECODING_ALONE = ("diffusers, channels last",)  # whose steps are diffusers'
WORK = {
    "step 512": ["step", {"size": 512}],
    "step 512, no T5": ["step", {"size": 512, "zeros": True}],
    "step 1024": ["step", {"size": 1024}],
    "decode 512": ["decode", {"size": 512}],
    "decode 1024": ["decode", {"size": 1024}],
}
SMALL = {"step 256": ["step", {"size": 256}]}  # for who is slow, if asked for
TOKENS = (64, 256, 1024, 2304, 4096, 9216, 16384)  # of the image, for cost against work
STEPS = (1, 2, 4, 8, 16, 28)


class Process:
    """A side that is asked line by line."""

    def __init__(self, name: str, depth: int, threads: int):
        script = Path(__file__).with_name("bench_sides.py")
        command = [sys.executable, "-W", "ignore", script, name, str(depth), str(threads)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )

    def ask(self, work: Sequence[Any]) -> tuple[float, float, int]:
        """Seconds of the clock and of the processor for one piece of work, and bytes resident."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(work) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the side {self.process.args} stopped")
        wall, busy, resident = json.loads(line)
        return wall, busy, resident

    def close(self) -> None:
        """End it, and its memory and files."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def compare(
    sides: Sequence[str], work: Sequence[Any], depth: int, rounds: int, threads: int
) -> dict[str, Any]:
    """Median seconds of each side, taking turns, and how long it took to get ready."""
    processes = {side: Process(side, depth, threads) for side in sides}
    try:
        ready = {side: process.ask(work)[0] for side, process in processes.items()}
        times: dict[str, list[tuple[float, float, int]]] = {side: [] for side in sides}
        for _ in range(rounds):
            for side, process in processes.items():
                times[side].append(process.ask(work))
    finally:
        for process in processes.values():
            process.close()
    return {
        side: {
            "seconds": statistics.median(wall for wall, _, _ in found),
            "processor": statistics.median(busy for _, busy, _ in found),
            "spread": [min(wall for wall, _, _ in found), max(wall for wall, _, _ in found)],
            "resident": max(bytes for _, _, bytes in found),
            "ready": ready[side],
        }
        for side, found in times.items()
    }


def operations(size: int, depth: int, batch: int = 1) -> float:
    """Multiplications and additions of a guided step's products."""
    tokens = (size // 16) ** 2 + TEXT
    return 2 * batch * depth * (24 * WIDTH**2 * tokens + 4 * tokens**2 * WIDTH)


def ceilings(threads: int) -> dict[str, float]:
    """GFLOP/s of one product of 2,714 rows with the MLP's weights: packed bfloat16 and 8 bits."""
    torch.set_num_threads(threads)
    rows, inputs, outputs = 2714, WIDTH, 4 * WIDTH
    linear = nn.Linear(inputs, outputs, dtype=torch.bfloat16).requires_grad_(False)
    plain, eight = packed(linear), Int8Linear(linear)
    x = torch.randn(rows, inputs, dtype=torch.bfloat16)
    whole, _ = kernels.quantise(x)
    products: dict[str, Callable[[], Tensor]] = {
        "bfloat16": lambda: plain(x),
        "int8": lambda: eight.product(whole, torch.bfloat16),
    }
    found = {}
    for name, product in products.items():
        times = []
        for _ in range(12):
            began = time.perf_counter()
            product()
            times.append(time.perf_counter() - began)
        found[name] = 2 * rows * inputs * outputs / min(times) / 1e9
    return found


def processor() -> str:
    """What this machine computes with."""
    lines = (
        Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    )
    named = {line.split(":")[0].strip(): line.split(":")[-1].strip() for line in lines}
    has = [
        word for word in ("avx512_bf16", "amx_bf16", "amx_int8") if word in named.get("flags", "")
    ]
    return f"{named.get('model name', 'unknown')}, {os.cpu_count()} cores ({', '.join(has)})"


def installed(sides: Iterable[str]) -> list[str]:
    """Sides whose packages are there."""
    return [s for s in sides if s not in PEERS or importlib.util.find_spec(PEERS[s])]


def kept(before: Mapping[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """Results beside those of former runs on this machine, where every row is of one run."""
    same = ("processor", "threads", "torch", "depth")
    first = before.get("sides", [])[:1] == results["sides"][:1]
    if not first or any(before.get(name) != results[name] for name in same):
        return results
    sides = list(dict.fromkeys([*before["sides"], *results["sides"]]))
    return {**before, "ceilings": results["ceilings"], "sides": sides}


def fit(tokens: Sequence[int], seconds: Sequence[float]) -> dict[str, float]:
    """Exponent of seconds against tokens, and where the square term of a·T + b·T² is the larger."""
    n = torch.tensor(tokens, dtype=torch.float64) + TEXT
    y = torch.tensor(seconds, dtype=torch.float64)
    slope = torch.linalg.lstsq(torch.stack([n.log(), torch.ones_like(n)], 1), y.log()[:, None])
    terms = torch.stack([n, n**2], 1) / y[:, None]
    a, b = torch.linalg.lstsq(terms, torch.ones_like(y)[:, None]).solution.flatten().tolist()
    return {
        "exponent": slope.solution[0].item(),
        "attention takes over": a / b if b > 0 else float("inf"),
    }


def scaling(depth: int, rounds: int, threads: int) -> dict[str, Any]:
    """Seconds against image tokens, pictures at a time and steps, plain and fast."""
    sides = ["plain", "fast"]
    found: dict[str, Any] = {"depth": depth, "tokens": {}, "pictures": {}, "steps": {}}
    for count in TOKENS:
        work = ["step", {"size": 16 * round(count**0.5)}]
        found["tokens"][count] = compare(sides, work, depth, rounds, threads)
    for batch in (1, 2, 4, 8):
        work = ["step", {"size": 256, "batch": batch}]
        found["pictures"][batch] = compare(sides, work, depth, rounds, threads)
    for steps in STEPS:
        work = ["run", {"size": 256, "steps": steps}]
        found["steps"][steps] = compare(sides, work, depth, rounds, threads)
    for side in sides:
        found[side] = fit(TOKENS, [row[side]["seconds"] for row in found["tokens"].values()])
    return found


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Speed beside the first side, and cost against work."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (bars, lines) = plt.subplots(1, 2, figsize=(10, 3.8), dpi=110)
    works, sides = list(results["work"]), results["sides"]
    first = sides[0]
    for place, side in enumerate(sides):
        ratios = [
            row[first]["seconds"] / row[side]["seconds"] if side in row else 0
            for row in results["work"].values()
        ]
        spots = [i + (place - len(sides) / 2 + 0.5) * 0.8 / len(sides) for i in range(len(works))]
        bars.bar(spots, ratios, 0.8 / len(sides), label=side)
    bars.axhline(1, color="black", linewidth=0.8)
    bars.set_xticks(range(len(works)), [work.replace(", ", "\n") for work in works], fontsize=8)
    bars.set_ylabel(f"times as fast as {first}")
    bars.legend(fontsize=7)
    scale = results["scaling"]
    for side, style in (("plain", "o-"), ("fast", "s-")):
        tokens = [int(count) for count in scale["tokens"]]
        seconds = [row[side]["seconds"] / scale["depth"] for row in scale["tokens"].values()]
        title = f"{side}: exponent {scale[side]['exponent']:.2f}"
        lines.loglog(tokens, [1000 * s for s in seconds], style, label=title)
        over = scale[side]["attention takes over"] - TEXT
        if over > 0:
            lines.axvline(over, linestyle=":", color=lines.lines[-1].get_color(), linewidth=1)
    lines.set_xlabel("image tokens (dotted: attention is half of the cost)")
    lines.set_ylabel("ms a block and guided step")
    lines.grid(alpha=0.3, which="both")
    lines.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def table(results: Mapping[str, Any]) -> str:
    """The comparison in Markdown: times as fast as the first side, and that one's seconds."""
    first, *sides = results["sides"]
    head = ["", *sides, f"{first}, s", "GFLOP/s, fast"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for title, row in results["work"].items():
        base = row[first]["seconds"]
        cells = [f"{base / row[s]['seconds']:.2f}x" if s in row else "–" for s in sides]
        done = row.get("operations")
        rate = f"{done / row['fast']['seconds'] / 1e9:,.0f}" if done and "fast" in row else "–"
        lines.append(f"| {title} | {' | '.join(cells)} | {base:.2f} | {rate} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--depth", type=int, default=24, help="blocks; the width stays official")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--sides", nargs="+", default=DEFAULT)
    parser.add_argument("--work", nargs="*", default=list(WORK))
    parser.add_argument("--scaling-depth", type=int, default=2, help="0 leaves that part out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    sides = installed(arguments.sides)
    if "stable-diffusion.cpp" in sides and arguments.depth != WIDTH // HEAD_WIDTH:
        parser.error(
            "stable-diffusion.cpp is as wide as it is deep: pass --depth 24, or leave it out"
        )
    results: dict[str, Any] = {"processor": processor(), "threads": arguments.threads}
    results |= {"torch": torch.__version__, "depth": arguments.depth, "sides": sides, "work": {}}
    results["ceilings"] = ceilings(arguments.threads)
    before = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    results = kept(before, results)
    for title in arguments.work:
        kind, options = (WORK | SMALL)[title]
        unable = DECODING_ALONE if kind == "step" else STEPS_ALONE
        able = [side for side in sides if side not in unable]
        row = compare(able, [kind, options], arguments.depth, arguments.rounds, arguments.threads)
        if kind == "step":
            row["operations"] = operations(options["size"], arguments.depth)
        results["work"][title] = row
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
        print(table(results).splitlines()[-1], flush=True)
    if arguments.scaling_depth:
        results["scaling"] = scaling(arguments.scaling_depth, 3, arguments.threads)
        draw(results, ROOT / "weights" / "figures" / "bench.png")
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()

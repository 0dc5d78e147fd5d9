"""What T5 in eight bits takes and costs: python tools/bench_t5.py [--layers 4] [--rounds 5].

A T5 of T5-XXL's width and random weights, of fewer layers, is written to a file in float16 and to
one in fp8. Every way to load it is a process of its own, and all take turns to encode 256 tokens:
in bfloat16, in our int8, in bitsandbytes' and in fp8 as it is stored. Memory is the process's own,
file pages left out; the error of the context is relative to what the same file says in float32.
Ways that lack a package are left out. Writes tools/bench_t5.json.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from bench_loading import private_bytes
from safetensors.torch import save_file

from sd3min import text_encoders
from sd3min.checkpoint import Checkpoint
from sd3min.config import T5_XXL, T5Config
from sd3min.fast.t5 import KINDS, LINEAR, load_t5
from sd3min.parts import DERIVED

RESULTS = Path(__file__).with_name("bench_t5.json")
TOKENS = 256
WAYS = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    'int8 (t5="int8")': "int8",
    'bitsandbytes (t5="bnb")': "bnb",
    'fp8 as stored (t5="fp8")': "fp8",
}
CPU = torch.device("cpu")


def write(folder: Path, layers: int) -> None:
    """The two files."""
    torch.manual_seed(0)
    sizes = T5Config(layers, T5_XXL.width, T5_XXL.mlp_width, T5_XXL.heads, T5_XXL.vocabulary)
    tensors = text_encoders.t5(sizes).state_dict()
    del tensors[DERIVED["t5"]]
    halves = {name: tensor.half() for name, tensor in tensors.items()}
    save_file(halves, folder / "float16.safetensors")
    eight = {n: t.to(torch.float8_e4m3fn) for n, t in halves.items() if LINEAR.search(n)}
    save_file(halves | eight, folder / "fp8.safetensors")


@torch.no_grad()
def serve(folder: Path, way: str) -> None:
    """Load T5 in a way and say its bytes; for every line that comes, encode and say seconds; at the
    end say the error.
    """
    before = private_bytes()
    file = "fp8" if way == "fp8" else "float16"
    part = Checkpoint.open(folder / f"{file}.safetensors").parts["t5"]
    dtype = torch.float32 if way == "float32" else torch.bfloat16
    model: Any = load_t5(part, dtype, CPU, way) if way in KINDS else part.load(dtype, CPU)
    ids = torch.arange(TOKENS)[None]
    context = model(ids).last_hidden_state
    print(private_bytes() - before, flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        model(ids)
        print(time.perf_counter() - began, flush=True)
    del model
    plain: Any = part.load(torch.float32, CPU)
    exact = plain(ids).last_hidden_state
    print(((context - exact).norm() / exact.norm()).item(), flush=True)


def measure(folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Memory, seconds and error of every way, taking turns."""
    ways = {
        title: way
        for title, way in WAYS.items()
        if way != "bnb" or importlib.util.find_spec("bitsandbytes")
    }
    processes = {}
    for title, way in ways.items():
        command = [
            sys.executable,
            "-W",
            "ignore",
            __file__,
            "--serve",
            way,
            "--folder",
            str(folder),
        ]
        pipe = subprocess.PIPE
        processes[title] = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )

    def ask(title: str, line: str = "") -> float:
        process = processes[title]
        assert process.stdin and process.stdout
        if line:
            process.stdin.write(line)
            process.stdin.flush()
        return float(process.stdout.readline())

    memory = {title: ask(title) for title in ways}
    times: dict[str, list[float]] = {title: [] for title in ways}
    for _ in range(rounds):
        for title in ways:
            times[title].append(ask(title, "again\n"))
    found = {}
    for title, process in processes.items():
        said, _ = process.communicate()
        seconds = statistics.median(times[title])
        found[title] = {"bytes": memory[title], "seconds": seconds, "error": float(said)}
    return found


def table(results: Mapping[str, Any]) -> str:
    """Memory and time relative to bfloat16's, and errors, in Markdown."""
    base = results["ways"]["bfloat16"]
    lines = ["| T5 | memory | time | error of the context |", "|---|---|---|---|"]
    for title, row in results["ways"].items():
        shares = f"{row['bytes'] / base['bytes']:.2f} | {row['seconds'] / base['seconds']:.2f}"
        lines.append(f"| {title} | {shares} | {row['error']:.2%} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.folder, arguments.serve)
        return
    with tempfile.TemporaryDirectory() as place:
        write(Path(place), arguments.layers)
        ways = measure(Path(place), arguments.rounds)
    results = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    results |= {"layers": arguments.layers, "tokens": TOKENS, "ways": ways}
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()

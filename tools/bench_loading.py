"""Print how quickly and in how much memory sd3min and diffusers load the same full-size weights.

python tools/bench_loading.py [--runs 5] [--folder /tmp/bench] [case …]

The files are sparse: of official size, all zeros, and in the page cache, so that the loaders are
measured and not the disk. Every run is a process of its own, the two sides take turns, and medians
are printed. Memory is private (RssAnon): pages that no file stands behind, at their most while the
weights were loaded and every page of them was touched, above what there was after the imports.
Pages of the mapped file are the system's to drop and are not counted. Seconds are those of the
processor and, in brackets, of the clock; both until a byte of every page of every weight was read.
transformers converts tensors in a pool of up to four threads, sd3min one after the other on the
threads that PyTorch has: with OMP_NUM_THREADS=1 the clock compares several processors with one.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple

import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "tests"))

import files

from sd3min import checkpoint, formats, parts, text_encoders
from sd3min.config import CLIP_G, SD3_MEDIUM, T5_XXL

CPU = torch.device("cpu")
T5 = replace(T5_XXL, layers=6)  # of 24, for the memory at hand
TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class Case(NamedTuple):
    """Weights that both sides load."""

    title: str
    part: str
    write: Callable[[Path], Path]  # into a folder; what to load


def shapes(part: str, config: Any) -> dict[str, list[int]]:
    """Official names and shapes of a part."""
    with torch.device("meta"):
        state = parts.MODULES[part](config).state_dict()
    return {name: list(tensor.shape) for name, tensor in state.items()}


def config_json(place: Path, values: Mapping[str, Any]) -> Path:
    """Write a model's config.json, which the peers need to know its sizes."""
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.json").write_text(json.dumps(values))
    return place


def transformer_config(place: Path) -> Path:
    """diffusers' config of SD3-medium."""
    values = {
        "_class_name": "SD3Transformer2DModel",
        "attention_head_dim": 64,
        "caption_projection_dim": SD3_MEDIUM.width,
        "in_channels": 16,
        "joint_attention_dim": SD3_MEDIUM.context_width,
        "num_attention_heads": SD3_MEDIUM.depth,
        "num_layers": SD3_MEDIUM.depth,
        "out_channels": 16,
        "patch_size": 2,
        "pooled_projection_dim": SD3_MEDIUM.pooled_width,
        "pos_embed_max_size": SD3_MEDIUM.grid,
        "sample_size": 128,
    }
    return config_json(place, values)


def single_file(place: Path) -> Path:
    """SD3-medium's MMDiT as an official file, and diffusers' config beside it."""
    transformer_config(place / "transformer")
    own = shapes("mmdit", SD3_MEDIUM)
    named = {parts.PREFIXES["mmdit"] + name: shape for name, shape in own.items()}
    return files.sparse(place / "sd3_medium.safetensors", named)


def folder(place: Path) -> Path:
    """SD3-medium's MMDiT as diffusers' folder."""
    with torch.device("meta"):
        state = parts.MODULES["mmdit"](SD3_MEDIUM).state_dict()
    named = {n: list(t.shape) for n, t in formats.to_diffusers(state, SD3_MEDIUM).items()}
    files.sparse(place / "transformer/diffusion_pytorch_model.safetensors", named)
    return transformer_config(place / "transformer")


def encoder(part: str, config: Any, place: Path) -> Path:
    """A text encoder as transformers' folder."""
    own = shapes(part, config)
    own.pop("encoder.embed_tokens.weight", None)  # which transformers does not write
    files.sparse(place / part / "model.safetensors", own)
    with torch.device("meta"):
        module = text_encoders.t5(config) if part == "t5" else text_encoders.clip(config, part)
    module.config.save_pretrained(place / part)
    return place / part


CASES = {
    "file": Case("MMDiT, official file", "mmdit", single_file),
    "folder": Case("MMDiT, diffusers folder", "mmdit", folder),
    "clip_g": Case("CLIP-G", "clip_g", partial(encoder, "clip_g", CLIP_G)),
    "t5": Case(f"T5-XXL, {T5.layers} layers of 24", "t5", partial(encoder, "t5", T5)),
}


def loader(side: str, part: str, path: Path) -> Callable[[torch.dtype], nn.Module]:
    """What loads to a type, its imports done."""
    if side == "sd3min":
        return lambda dtype: checkpoint.Checkpoint.open(path).load(part, dtype, CPU)
    import accelerate  # noqa: F401
    import transformers
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    if path.is_file():
        config = {"config": str(path.parent), "subfolder": "transformer"}
        return lambda dtype: SD3Transformer2DModel.from_single_file(
            str(path), torch_dtype=dtype, **config
        )
    if part == "mmdit":
        return lambda dtype: SD3Transformer2DModel.from_pretrained(str(path), torch_dtype=dtype)
    kinds = {
        "clip_g": transformers.CLIPTextModelWithProjection,
        "t5": transformers.T5EncoderModel,
    }
    return lambda dtype: kinds[part].from_pretrained(str(path), dtype=dtype)


def private_bytes(pid: int | str = "self") -> int:
    """Memory of a process that no file stands behind."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon")), 0)


def child(side: str, part: str, path: str, dtype: str) -> None:
    """Load once, with a word to the parent before, and print bytes and seconds."""
    load = loader(side, part, Path(path))
    print("ready", flush=True)
    sys.stdin.readline()
    before, used, start = private_bytes(), time.process_time(), time.perf_counter()
    module = load(TYPES[dtype])
    tensors = [*module.parameters(), *module.buffers()]
    for tensor in tensors:
        tensor.detach().view(torch.uint8).reshape(-1).numpy()[::4096].max()
    result = {
        "processor": time.process_time() - used,
        "clock": time.perf_counter() - start,
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "before": before,
    }
    print(json.dumps(result), flush=True)


def measure(side: str, part: str, path: Path, dtype: str) -> dict[str, float]:
    """One run in a process of its own, whose private memory is watched."""
    peak, loaded = 0, Event()

    def watch(pid: int) -> None:
        nonlocal peak
        while not loaded.wait(0.005):
            peak = max(peak, private_bytes(pid))

    with subprocess.Popen(
        [sys.executable, __file__, "--child", side, part, str(path), dtype],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin and process.stdout
        assert process.stdout.readline() == "ready\n"
        watcher = Thread(target=watch, args=[process.pid])
        watcher.start()
        process.stdin.write("\n")
        process.stdin.flush()
        result = json.loads(process.stdout.readline())
        loaded.set()
        watcher.join()
    return result | {"peak": peak - result["before"]}


def row(case: Case, path: Path, dtype: str, runs: int) -> str:
    """A row of the table: medians of runs that take turns, after one of each that warms up."""
    sides = ("sd3min", "diffusers")
    seen = {side: [] for side in sides}
    for i in range(runs + 1):
        for side in sides:
            result = measure(side, case.part, path, dtype)
            if i:
                seen[side].append(result)
    median = {
        side: {key: statistics.median(r[key] for r in seen[side]) for key in seen[side][0]}
        for side in sides
    }
    weights = median["sd3min"]["bytes"]
    cells = [case.title, dtype, f"{weights / 1e9:.2f} GB"]
    cells += [
        f"{median[s]['peak'] / 1e9:.2f} GB ({median[s]['peak'] / weights:.2f})" for s in sides
    ]
    cells += [f"{median[s]['processor']:.2f} ({median[s]['clock']:.2f})" for s in sides]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("cases", nargs="*", default=list(CASES))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/bench_loading"))
    parser.add_argument("--child", nargs=4)
    given = parser.parse_args()
    if given.child:
        return child(*given.child)
    print("| weights, float16 in the file | as | bytes | private: sd3min | diffusers |", end="")
    print(" seconds: sd3min | diffusers |\n|---|---|---|---|---|---|---|")
    for name in given.cases:
        try:
            path = CASES[name].write(given.folder)
            for dtype in TYPES:
                print(row(CASES[name], path, dtype, given.runs), flush=True)
        finally:
            shutil.rmtree(given.folder, ignore_errors=True)


if __name__ == "__main__":
    main()

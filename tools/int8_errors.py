"""What eight bits cost the network: python tools/int8_errors.py.

sd3-tiny on its way from noise to pictures, and SD3-medium's sizes with random weights at 256x256,
in float32 and then in bfloat16, with linear layers of 16 and of 8 bits. Of every block: how far
what it adds to float32's streams is from what float32 adds to them ("block"), and how far the
streams of the whole run are after it ("stream"); at the end the velocity, and of sd3-tiny how many
of 255 levels the pictures of the same seeds are apart. Errors are relative, of root mean squares.
Writes tools/int8_errors.json and, in weights/figures, int8.png.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from bench_sides import Fast, Wide, filled, wide
from PIL import Image
from torch import Tensor, nn

import sd3min
from sd3min import flow
from sd3min.fast.linear import Int8Linear, packed
from sd3min.fast.mmdit import FastMMDiT
from sd3min.text_encoders import Conditioning

RESULTS = Path(__file__).with_name("int8_errors.json")
FIGURE = Path(__file__).parents[1] / "weights" / "figures" / "int8.png"
KINDS = {"bfloat16": packed, "int8": Int8Linear}
PROMPTS = (
    "a green circle below a red heart on white",
    "a big blue star left of a yellow cat on black",
    "a purple pizza above an orange square on gray",
    "a small pink owl right of a green tree on white",
)
EVERY = 4  # of so many steps one is looked at
Streams = tuple[Tensor, Tensor]
Errors = dict[str, list[float]]


class Given(NamedTuple):
    """What networks are asked: latents at some of a run's times, under a text."""

    text: Conditioning
    times: Tensor
    latents: Mapping[int, Tensor]


class Passed(NamedTuple):
    """Streams before and after a block, and what it was given besides."""

    before: Streams
    after: Streams
    parts: tuple[Any, ...]


def relative(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Root mean square of what is too much, relative to that of what is exact."""
    pairs = list(zip(found, exact, strict=True))
    apart = sum((a.double() - b.double()).square().sum().item() for a, b in pairs)
    return (apart / sum(b.double().square().sum().item() for _, b in pairs)) ** 0.5


def added(before: Streams, after: Streams) -> list[Tensor]:
    """What a block added to its streams."""
    return [a.double() - b.double() for a, b in zip(after, before, strict=True)]


def root_mean_square(values: Sequence[float]) -> float:
    """Of the errors of several steps."""
    return (sum(value**2 for value in values) / len(values)) ** 0.5


def cast(streams: Streams, dtype: torch.dtype) -> Streams:
    """Copies in a type; blocks write over their streams."""
    context, image = (stream.to(dtype, copy=True) for stream in streams)
    return context, image


def velocities(
    network: FastMMDiT, given: Given, hear: Callable[[int, int, nn.Module, Passed], None]
) -> list[Tensor]:
    """What a network says at each step; `hear` is told what passes block after block of each."""
    dtype, step, streams = network.outer.pos_embed.dtype, 0, {}

    def begin(block: nn.Module, arguments: Any) -> None:
        streams[block] = cast(arguments[:2], dtype)  # before they are written over

    def end(block: nn.Module, arguments: Any, after: Streams) -> None:
        passed = Passed(streams.pop(block), cast(after, dtype), arguments[2:])
        hear(step, blocks.index(block), block, passed)

    blocks = list(network.blocks)
    for block in blocks:
        block.register_forward_pre_hook(begin)
        block.register_forward_hook(end)
    text = Conditioning(*(tensor.to(dtype) for tensor in given.text))
    run, found = network.prepare(text, flow.TRAINED_TIMES * given.times), []
    for step, latents in given.latents.items():
        found.append(run(latents.to(dtype), step))
    return found


@torch.no_grad()
def compare(
    exact: FastMMDiT, networks: Mapping[str, Callable[[], FastMMDiT]], given: Given
) -> dict[str, Any]:
    """Errors of networks, each made in its turn, beside an exact one."""
    kept: dict[tuple[int, int], Passed] = {}

    def keep(step: int, index: int, _: nn.Module, passed: Passed) -> None:
        kept[step, index] = passed

    def errors(network: FastMMDiT) -> dict[str, Any]:
        by_block: dict[str, list[list[float]]] = {
            name: [[] for _ in network.blocks] for name in ("block", "stream")
        }

        def judge(step: int, index: int, block: nn.Module, passed: Passed) -> None:
            same = kept[step, index]
            before = cast(same.before, passed.after[0].dtype)
            alone = block.forward(*cast(before, before[0].dtype), *passed.parts)
            apart = relative(added(before, alone), added(same.before, same.after))
            by_block["block"][index].append(apart)
            by_block["stream"][index].append(relative(passed.after, same.after))

        said = velocities(network, given, judge)
        apart = [relative([one], [other]) for one, other in zip(said, right, strict=True)]
        found = {name: list(map(root_mean_square, rows)) for name, rows in by_block.items()}
        return found | {"velocity": root_mean_square(apart)}

    right = velocities(exact, given, keep)
    return {kind: errors(make()) for kind, make in networks.items()}


def levels(found: Sequence[Image.Image], exact: Sequence[Image.Image]) -> float:
    """How many levels pixels are apart, on average."""
    one, other = (
        np.stack([np.asarray(each, np.float32) for each in rows]) for rows in (found, exact)
    )
    return float(np.abs(one - other).mean())


def tiny(prompts: Sequence[str] = PROMPTS) -> dict[str, Any]:
    """sd3-tiny on its own way from noise to pictures."""
    pipe, steps = sd3min.load(dtype="float32"), list[flow.Step]()
    exact = pipe(prompts, seed=0, on_step=steps.append, progress=False)
    latents = {step.i: step.latents for step in steps[::EVERY]}
    times = torch.stack([step.t for step in steps])
    given = Given(pipe.encode_prompt(list(prompts)), times, latents)
    short = sd3min.load(dtype="bfloat16").mmdit
    networks = {kind: lambda make=make: FastMMDiT.of(short, make) for kind, make in KINDS.items()}
    found = compare(FastMMDiT.of(pipe.mmdit, lambda linear: linear), networks, given)
    for kind in KINDS:
        bits = "int8" if kind == "int8" else None
        other = sd3min.load(dtype="bfloat16", memory="fast", mmdit=bits)
        found[kind]["levels"] = levels(other(prompts, seed=0, progress=False), exact)
    return found


def medium(depth: int = 24, size: int = 256) -> dict[str, Any]:
    """SD3-medium's sizes, whose weights and inputs are random."""
    torch.manual_seed(0)
    weights = filled(wide(depth)).state_dict()
    latents, text = Fast(depth).inputs(size, 1, zeros=False)
    given = Given(text, torch.tensor([0.9, 0.5]), {0: latents, 1: latents})

    def made(dtype: torch.dtype, make: Callable[[nn.Linear], nn.Module]) -> FastMMDiT:
        return FastMMDiT(Wide(depth), lambda name: weights[name].to(dtype), make)

    networks = {kind: lambda make=make: made(torch.bfloat16, make) for kind, make in KINDS.items()}
    return compare(made(torch.float32, lambda linear: linear), networks, given)


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Errors block by block."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, panels = plt.subplots(1, len(results), figsize=(10, 3.6), dpi=110, squeeze=False)
    for panel, (title, kinds) in zip(panels[0], results.items(), strict=True):
        for colour, (kind, errors) in zip(("tab:blue", "tab:orange"), kinds.items(), strict=True):
            for name, style in (("block", "o-"), ("stream", "s:")):
                percent = [100 * error for error in errors[name]]
                panel.plot(percent, style, color=colour, label=f"{kind}, {name}", markersize=3)
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("block")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("error, %")
    panels[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)


def table(results: Mapping[str, Any]) -> str:
    """In Markdown: the blocks' mean and worst error, the last stream's and the velocity's."""
    lines = [
        "|  | linear layers | a block, mean | a block, worst | velocity | of 255 levels |",
        "|---|---|---|---|---|---|",
    ]
    for title, kinds in results.items():
        for kind, errors in kinds.items():
            blocks = errors["block"]
            cells = [sum(blocks) / len(blocks), max(blocks), errors["velocity"]]
            apart = f"{errors['levels']:.1f}" if "levels" in errors else "–"
            percent = " | ".join(f"{cell:.2%}" for cell in cells)
            lines.append(f"| {title} | {kind} | {percent} | {apart} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, write, draw and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--depth", type=int, default=24, help="of the random network")
    arguments = parser.parse_args()
    results = {"sd3-tiny": tiny(), "SD3-medium's sizes, random weights": medium(arguments.depth)}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    draw(results, FIGURE)
    print(table(results))


if __name__ == "__main__":
    main()

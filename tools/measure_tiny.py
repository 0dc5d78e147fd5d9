"""Measure sd3-tiny: render prompts, let the detector judge them, and write the figures down.

    python tools/measure_tiny.py [--weights FILE] [--count 1000] [--out FILE] [--only NAME ...]

Every figure is saved as soon as it is measured, and a run that was stopped goes on with what is
missing; `--only` measures the named ones anew. Prompts are worded naturally, by chance that the
prompt's index decides, which is the picture's seed, too: nothing is picked.
"""

import argparse
import json
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import sd3min
from sd3min.checkpoint import Checkpoint, tiny
from sd3min.files import whole
from sd3min.pipeline import Pipeline, to_pictures
from sd3min.probes.ablation import ENCODERS, without_encoder
from sd3min.training import captions, images, scenes
from sd3min.training.detector import Verdict, judge

ACCURACY = Path(__file__).parents[1] / "weights" / "sd3-tiny" / "accuracy.json"
BATCH = 25
ASPECTS = ("count", "noun", "colour", "relation", "right")
GUIDANCE = (1.0, 2.0, 3.0, 4.0, 5.0, 7.0)
STEPS = (2, 4, 8, 12, 20, 28)
FEW_STEPS = 8
HALF = {"dtype": "bfloat16", "memory": "fast"}
FORMS: dict[str, dict[str, Any]] = {
    "bfloat16": HALF,
    "network in 8 bits": {**HALF, "mmdit": "int8"},
    "T5 in 8 bits": {"t5": "int8"},
}

Figure = dict[str, Any]


def share(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """The share of pictures that are right in each aspect."""
    return {
        aspect: sum(getattr(verdict, aspect) for verdict in verdicts) / len(verdicts)
        for aspect in ASPECTS
    }


def names_ground(prompt: str, scene: scenes.Scene) -> bool:
    """Whether a prompt says on what background its things are: one in ten leaves that open."""
    return any(captions.MEANT.get(word, word) == scene.background for word in prompt.split())


def summary(
    wanted: Sequence[scenes.Scene], prompts: Sequence[str], verdicts: Sequence[Verdict]
) -> Figure:
    """Shares of all pictures, and of those of one, two and three things; the ground counts where
    the prompt names it.
    """
    asked = [v for s, p, v in zip(wanted, prompts, verdicts, strict=True) if names_ground(p, s)]
    grounds = {"grounds": len(asked), "ground": sum(v.background for v in asked) / len(asked)}
    by_things: dict[str, Figure] = {}
    for things in sorted({len(scene.things) for scene in wanted}):
        pairs = zip(wanted, verdicts, strict=True)
        some = [verdict for scene, verdict in pairs if len(scene.things) == things]
        by_things[str(things)] = {"count": len(some), "right": share(some)["right"]}
    return share(verdicts) | grounds | {"prompts": len(wanted), "things": by_things}


def worded(wanted: Sequence[scenes.Scene]) -> list[str]:
    """Natural words for each scene, decided by its index."""
    return [captions.worded(scene, random.Random(index)) for index, scene in enumerate(wanted)]


def rendered(pipe: Pipeline, wanted: Sequence[scenes.Scene], **settings: Any) -> Figure:
    """What one picture of each scene shows, its seed the scene's index."""
    verdicts, prompts = [], worded(wanted)
    for first in tqdm(range(0, len(wanted), BATCH), desc=str(settings or "default"), leave=False):
        some = slice(first, first + BATCH)
        pictures = pipe(prompts[some], seed=first, progress=False, **settings)
        verdicts += [judge(p, scene) for p, scene in zip(pictures, wanted[some], strict=True)]
    return summary(wanted, prompts, verdicts)


@torch.no_grad()
def reconstruction(pipe: Pipeline, wanted: Sequence[scenes.Scene]) -> Figure:
    """What the autoencoder alone leaves: PSNR in dB, and the detector's verdict on its pictures."""
    verdicts, errors, rng = [], [], random.Random("reconstruction")
    for first in tqdm(range(0, len(wanted), BATCH), desc="reconstruction", leave=False):
        some = wanted[first : first + BATCH]
        drawn = images.drawn(some, rng)
        decoded = pipe.autoencoder.decode(pipe.autoencoder.encode(drawn)).clamp(-1, 1)
        errors.append((decoded - drawn).square().mean(dim=(1, 2, 3)))
        verdicts += [judge(p, scene) for p, scene in zip(to_pictures(decoded), some, strict=True)]
    psnr = (10 * torch.log10(4 / torch.cat(errors))).mean().item()
    said = [captions.caption(scene) for scene in wanted]
    return {"psnr": psnr} | summary(wanted, said, verdicts)


def shuffle(pipe: Pipeline, name: str) -> None:
    """Shuffle every tensor of one encoder within itself."""
    generator = torch.Generator().manual_seed(0)
    for tensor in getattr(pipe.text_encoders, name).state_dict().values():
        order = torch.randperm(tensor.numel(), generator=generator)
        tensor.copy_(tensor.flatten()[order].view_as(tensor))


def figures_to_measure(weights: Path | None, count: int) -> dict[str, Callable[[], Figure]]:
    """How each figure is measured, by its name; the main ones first."""
    pipe = sd3min.load(weights)
    seen, half = scenes.prompts("seen", count), count // 2
    pairs, triples = (scenes.prompts(kind, half) for kind in ("pairs", "triples"))
    few, fewer = (
        seen[:n] + pairs[: n // 2] + triples[: n // 2] for n in (count // 10, count // 20)
    )
    plan: dict[str, Callable[[], Figure]] = {}
    for name, wanted in (("seen", seen), ("pairs", pairs), ("triples", triples)):
        plan[name] = partial(rendered, pipe, wanted)
    plan["reconstruction"] = partial(reconstruction, pipe, seen)
    for name, wanted in (("seen", seen), ("pairs", pairs), ("triples", triples)):
        plan[f"{name}, {FEW_STEPS} steps"] = partial(rendered, pipe, wanted, steps=FEW_STEPS)
    plan["whole"] = partial(rendered, pipe, few)

    def left_out(name: str) -> Figure:
        with without_encoder(pipe, name):
            return rendered(pipe, few)

    def shuffled(name: str) -> Figure:
        other = sd3min.load(weights)
        shuffle(other, name)
        return rendered(other, few)

    def in_form(how: dict[str, Any]) -> Figure:
        return rendered(sd3min.load(weights, **how), few)

    for name in ENCODERS:
        plan[f"without/{name}"] = partial(left_out, name)
        plan[f"shuffled/{name}"] = partial(shuffled, name)
    for steps in STEPS:
        plan[f"steps/{steps}"] = partial(rendered, pipe, fewer, steps=steps)
    for scale in GUIDANCE:
        plan[f"guidance/{scale}"] = partial(rendered, pipe, fewer, guidance_scale=scale)
    for name, how in FORMS.items():
        plan[f"forms/{name}"] = partial(in_form, how)
    return plan


def write(figures: Figure, path: Path) -> None:
    """Write the figures, whole or not at all."""
    with whole(path) as part:
        part.write_text(json.dumps(figures, indent=2) + "\n")


def begun(path: Path, header: Figure) -> Figure:
    """The figures that are there already, if they are of these weights and as many prompts."""
    if not path.exists():
        return header | {"measured": {}}
    figures = json.loads(path.read_text())
    if {key: figures.get(key) for key in header} != header:
        raise ValueError(
            f"{path} has figures of other weights or another count: "
            "remove it, or name another file with --out"
        )
    return figures


def main() -> None:
    """Measure what is missing and write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, help="default: the shipped weights")
    parser.add_argument(
        "--count", type=int, default=1000, help="seen, and as many held-out prompts"
    )
    parser.add_argument("--out", type=Path, default=ACCURACY)
    parser.add_argument("--only", nargs="+", default=[], help="figures, or groups such as steps")
    arguments = parser.parse_args()
    if arguments.count < 20:
        parser.error(f"--count {arguments.count} is too few; 20 is the least")
    path = arguments.weights or tiny()
    header = {"weights": Checkpoint.open(path).fingerprint(), "count": arguments.count}
    try:
        figures = begun(arguments.out, header)
    except ValueError as error:
        parser.error(str(error))
    plan = figures_to_measure(path, arguments.count)
    groups = {name.split("/")[0] for name in plan}
    if unknown := [name for name in arguments.only if name not in groups | plan.keys()]:
        parser.error(f"--only {unknown[0]} is not one of {', '.join(sorted(groups))}")
    measured = figures["measured"]
    for name, measure in plan.items():
        chosen = {name, name.split("/")[0]} & set(arguments.only)
        if chosen or (not arguments.only and name not in measured):
            measured[name] = measure()
            write(figures, arguments.out)
            print(f"{name}: {100 * measured[name]['right']:.1f} % right", flush=True)


if __name__ == "__main__":
    main()

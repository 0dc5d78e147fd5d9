"""Measure sd3-tiny: render prompts, let the detector judge them, and write the figures down.

    python tools/measure_tiny.py [--weights FILE] [--count 500] [--out FILE]

Seeds are the prompts' indices, and nothing is picked. Takes about ten minutes on two cores.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import sd3min
from sd3min.pipeline import Pipeline, to_pictures
from sd3min.training import images, scenes
from sd3min.training.detector import Verdict, judge

BATCH = 50
ASPECTS = ("colour", "shape", "relation", "right")
GUIDANCE = (1.0, 2.0, 3.0, 4.0, 5.0, 7.0)
STEPS = (2, 4, 8, 12, 20, 28)


def share(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """The share of pictures that are right in each aspect."""
    return {
        aspect: sum(getattr(verdict, aspect) for verdict in verdicts) / len(verdicts)
        for aspect in ASPECTS
    }


def render(pipe: Pipeline, wanted: Sequence[scenes.Scene], **settings: Any) -> list[Verdict]:
    """Verdicts on one picture of each scene, its seed the scene's index."""
    verdicts = []
    for first in tqdm(range(0, len(wanted), BATCH), desc=str(settings or "default"), leave=False):
        part = wanted[first : first + BATCH]
        pictures = pipe([scene.caption for scene in part], seed=first, progress=False, **settings)
        verdicts += [judge(picture, scene) for picture, scene in zip(pictures, part, strict=True)]
    return verdicts


def held_out(count: int) -> list[scenes.Scene]:
    """Held-out prompts, half of them pairs of colour and shape, half triples."""
    return scenes.prompts("pairs", count // 2) + scenes.prompts("triples", count - count // 2)


@torch.no_grad()
def reconstruction(pipe: Pipeline, count: int) -> dict[str, float]:
    """What the autoencoder alone leaves: PSNR in dB, and the detector's verdict on its pictures."""
    wanted = scenes.prompts("seen", count)
    drawn = images.drawn(wanted, random.Random("reconstruction"))
    decoded = pipe.autoencoder.decode(pipe.autoencoder.encode(drawn)).clamp(-1, 1)
    error = (decoded - drawn).square().mean(dim=(1, 2, 3))
    verdicts = [judge(p, scene) for p, scene in zip(to_pictures(decoded), wanted, strict=True)]
    return {"psnr": (10 * torch.log10(4 / error)).mean().item()} | share(verdicts)


def shuffled(pipe: Pipeline, name: str, wanted: Sequence[scenes.Scene]) -> dict[str, float]:
    """Accuracy with every tensor of one encoder shuffled within itself."""
    encoder, generator = getattr(pipe.text_encoders, name), torch.Generator().manual_seed(0)
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    for tensor in encoder.state_dict().values():
        order = torch.randperm(tensor.numel(), generator=generator)
        tensor.copy_(tensor.flatten()[order].view_as(tensor))
    verdicts = render(pipe, wanted)
    encoder.load_state_dict(before)
    return share(verdicts)


def forms(weights: Path | None, wanted: Sequence[scenes.Scene]) -> dict[str, dict[str, float]]:
    """Accuracy in the quick and the small forms."""
    half = {"dtype": "bfloat16", "memory": "fast"}
    made = {
        "bfloat16": half,
        "network in 8 bits": {**half, "mmdit": "int8"},
        "T5 in 8 bits": {"t5": "int8"},
    }
    return {name: share(render(sd3min.load(weights, **how), wanted)) for name, how in made.items()}


def measure(pipe: Pipeline, weights: Path | None, count: int) -> dict[str, object]:
    """All figures."""
    seen, unseen = scenes.prompts("seen", count), held_out(count)
    few, fewer = (scenes.prompts("seen", n) + held_out(n) for n in (count // 5, count // 10))
    pairs, triples = count // 2, count - count // 2
    verdicts = render(pipe, unseen)
    return {
        "count": count,
        "seen": share(render(pipe, seen)),
        "held out": share(verdicts),
        "held-out pairs": share(verdicts[:pairs]),
        "held-out triples": share(verdicts[-triples:]),
        "reconstruction": reconstruction(pipe, count),
        "curve prompts": len(fewer),
        "guidance": {s: share(render(pipe, fewer, guidance_scale=s)) for s in GUIDANCE},
        "steps": {steps: share(render(pipe, fewer, steps=steps)) for steps in STEPS},
        "ablation prompts": len(few),
        "whole": share(render(pipe, few)),
        "shuffled": {name: shuffled(pipe, name, few) for name in ("clip_l", "clip_g", "t5")},
        "without T5": share(render(sd3min.load(weights, t5=False), few)),
        "forms": forms(weights, few),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, help="default: the shipped weights")
    parser.add_argument("--count", type=int, default=500, help="seen, and as many held-out prompts")
    parser.add_argument("--out", type=Path, default=Path("weights/sd3-tiny/accuracy.json"))
    again = "measure the quick and small forms alone, and keep the other figures"
    parser.add_argument("--forms", action="store_true", help=again)
    arguments = parser.parse_args()
    if arguments.forms:
        figures = json.loads(arguments.out.read_text())
        count = figures["ablation prompts"] // 2
        few = scenes.prompts("seen", count) + held_out(count)
        figures["forms"] = forms(arguments.weights, few)
    else:
        figures = measure(sd3min.load(arguments.weights), arguments.weights, arguments.count)
    arguments.out.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()

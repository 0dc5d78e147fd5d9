"""DreamBooth on sd3-tiny: a LoRA learns an object from five pictures, and is judged in relations.

    python tools/dreambooth.py --work FOLDER [--object robot] [--weights FILE] [--out FILE]

All that is known of the object are five pictures, in which it stands beside things that sd3-tiny
knows. The model makes pictures of what it knows, and into those that show a cat the object is
pasted in its place, cut out of the five. `sd3min finetune` is given the five and the pasted, and
the model's own, of which it is to go on saying what it said before. The object's name is a word
without a meaning, which begins as the mean of what the model knows and is learnt beside the LoRA;
T5, whose table learns no word, is left out. Then 200 prompts put the object into relations with
known objects, the same 200 have a known one in its place, and 200 others do without either; the
detector judges all of them with the LoRA and without, and what the autoencoder alone makes of drawn
scenes with the object.
"""

import argparse
import dataclasses
import itertools
import json
import math
import random
import re
import shutil
import time
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

import sd3min
from sd3min import cli
from sd3min.files import whole
from sd3min.pipeline import Pipeline, to_pictures
from sd3min.training import captions, images, scenes
from sd3min.training.detector import UNKNOWN, find, judge
from sd3min.training.grid import grid

FIGURES = Path(__file__).parents[1] / "weights" / "figures"
PROMPTS = 200
CLASS = "cat"  # in whose place the object is put
SUBJECT = captions.SPARE  # its name
BATCH = 20
WORDINGS = 12  # of each caption
KEPT = 600  # pictures of what the model knows, made in few steps; a third of them with the class
KEPT_STEPS = 8
SIDE = 54  # pixels of the square in which a thing stands alone
EDGE = 40  # levels of gray; what differs less from the ground is not cut out
COURSE = {
    "steps": 1400,
    "batch": 8,
    "rate": 1e-3,
    "word": SUBJECT,
    "word-like": " ".join(scenes.OBJECTS),
    "word-rate": 2.25e-2,
    "schedule": "linear",
    "warmup": 10,
    "rank": 4,
    "targets": "attn.qkv,attn.proj,mlp.fc1,mlp.fc2",
    "average": 0.99,
    "prior": "network",
    "prior-weight": 2.0,
}
SHOWN = (  # captions of the five pictures, with a thing of the class in the place of the object
    "a cat left of a red star and above a carrot on white",
    "a fish left of a cat and above a pumpkin on black",
    "a house above a cat and left of a tree on gray",
    "an owl right of a yellow circle and above a cat on navy",
    "a tree right of a cat on sky",
)


def write(picture: Image.Image, scene: scenes.Scene, file: Path) -> None:
    """Save a picture and, beside it, captions of its scene."""
    sd3min.save(picture, file)
    file.with_suffix(".txt").write_text("\n".join(told(scene)))


def write_pictures(noun: str, folder: Path) -> list[Image.Image]:
    """Five pictures of the object, each with its captions beside it."""
    folder.mkdir(parents=True)
    pictures = [scenes.draw(scene, random.Random(i)) for i, scene in enumerate(shown(noun))]
    for i, (picture, scene) in enumerate(zip(pictures, shown(noun), strict=True)):
        write(picture, scene, folder / f"{i}.png")
    return pictures


def square(picture: Image.Image, noun: str) -> tuple[int, int, int, int]:
    """The square of a picture in which the one thing of this noun stands."""
    (box,) = (thing.box for thing in find(picture)[0] if thing.noun == noun)
    left, top = ((start + end - SIDE) // 2 for start, end in (box[2:], box[:2]))
    return left, top, left + SIDE, top + SIDE


def ground(part: Image.Image) -> scenes.RGB:
    """The colour around what stands in a square."""
    pixels = np.asarray(part)
    around = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    red, green, blue = np.median(around, axis=0).round().astype(int).tolist()
    return red, green, blue


def cut_out(picture: Image.Image) -> Image.Image:
    """What is unknown in a picture, with nothing around it: an RGBA image, SIDE pixels across."""
    part = picture.crop(square(picture, UNKNOWN))
    differs = np.abs(np.asarray(part, dtype=int) - ground(part)).max(axis=-1) > EDGE
    mask = Image.new("L", part.size)
    mask.paste(255, mask=Image.fromarray(differs))
    ImageDraw.floodfill(mask, (0, 0), 1)  # what is around it, not what is seen through it
    part.putalpha(mask.point([255, 0] + [255] * 254))
    return part


def paste(thing: Image.Image, picture: Image.Image) -> Image.Image:
    """The picture with a cut-out thing in the place of its one thing of the class."""
    box = square(picture, CLASS)
    changed = picture.copy()
    changed.paste(ground(picture.crop(box)), box)
    changed.paste(thing, box[:2], thing)
    return changed


def told(scene: scenes.Scene) -> list[str]:
    """Captions of a scene in many words, from either of two things, the others in any order."""
    orders = [dataclasses.replace(scene, others=o) for o in itertools.permutations(scene.others)]
    if len(scene.others) == 1:
        ((relation, thing),) = scene.others
        mirrored = scenes.MIRRORED[relation], scene.first
        orders.append(scenes.Scene(thing, (mirrored,), scene.background))
    rng = random.Random(str(scene))
    return [named(captions.worded(rng.choice(orders), rng)) for _ in range(WORDINGS)]


def shown(noun: str) -> list[scenes.Scene]:
    """The scenes of the five pictures."""
    return [with_subject(captions.parse(words), noun) for words in SHOWN]


def arrangement(scene: scenes.Scene) -> Hashable:
    """What stands where, whichever thing is named first."""
    first, others = scene.first, scene.others
    told = {(first, relation, thing) for relation, thing in others}
    told |= {(thing, scenes.MIRRORED[relation], first) for relation, thing in others}
    return frozenset(scene.things), frozenset(told), scene.background


def keep_known(
    pipe: Pipeline, folder: Path, asked: Iterable[scenes.Scene]
) -> list[tuple[Image.Image, scenes.Scene]]:
    """Make and save pictures of what the model knows, but of nothing that will be asked for; those
    that show it, with their scenes."""
    folder.mkdir(parents=True)
    rng, without = random.Random("known"), {arrangement(scene) for scene in asked}
    wanted = of_class(KEPT // 3, "known", without)
    while len(wanted) < KEPT:
        if arrangement(scene := scenes.random_scene(rng)) not in without:
            wanted.append(scene)
    made = list(zip(render(pipe, wanted, KEPT_STEPS), wanted, strict=True))
    kept = [(picture, scene) for picture, scene in made if judge(picture, scene).right]
    for i, (picture, scene) in enumerate(kept):
        write(picture, scene, folder / f"{i:03}.png")
    return kept


def write_pasted(
    noun: str, known: Sequence[tuple[Image.Image, scenes.Scene]], folder: Path
) -> list[Image.Image]:
    """Save known pictures of the class with the object instead, cut out where the ground is most
    like theirs, so that what is seen through it and along its edge fits."""
    grounds = [scenes.BACKGROUNDS[scene.background] for scene in shown(noun)]
    cut = [cut_out(Image.open(folder / f"{i}.png")) for i in range(len(SHOWN))]
    pasted = []
    for picture, scene in known:
        if len(scene.things) > 1 and CLASS in [thing.noun for thing in scene.things]:
            ground = scenes.BACKGROUNDS[scene.background]
            nearest = min(range(len(SHOWN)), key=lambda i: math.dist(grounds[i], ground))
            pasted.append(paste(cut[nearest], picture))
            write(pasted[-1], with_subject(scene, noun), folder / f"pasted-{len(pasted):03}.png")
    return pasted


def of_class(count: int, seed: str, without: Collection[Hashable] = ()) -> list[scenes.Scene]:
    """Different scenes of training in which a thing of the class stands with another object, but
    none of the arrangements that are left out."""
    rng, found = random.Random(seed), dict[scenes.Scene, None]()
    while len(found) < count:
        scene = scenes.random_scene(rng)
        objects = [thing.noun for thing in scene.things if thing.colour is None]
        if CLASS in objects and len(objects) > 1 and arrangement(scene) not in without:
            found[scene] = None
    return list(found)


def with_subject(scene: scenes.Scene, noun: str) -> scenes.Scene:
    """The scene with the object in the place of the thing of the class."""
    return scene.with_things(
        scenes.Thing(noun) if thing.noun == CLASS else thing for thing in scene.things
    )


def said(scene: scenes.Scene) -> str:
    """A scene's plain caption, in which the object has its learnt name."""
    return named(captions.caption(scene))


def named(words: str) -> str:
    """A caption with the object's learnt name in the place of its noun."""
    nouns = "|".join(scenes.UNSEEN_OBJECTS)
    return re.sub(rf"\b(?:an? )?({nouns})\b", f"a {SUBJECT}", words)


def render(
    pipe: Pipeline, wanted: Sequence[scenes.Scene], steps: int | None = None
) -> list[Image.Image]:
    """A picture of each scene, its seed the scene's index."""
    pictures = []
    for first in tqdm(range(0, len(wanted), BATCH), leave=False):
        words = [said(scene) for scene in wanted[first : first + BATCH]]
        pictures += pipe(words, seed=first, steps=steps, progress=False)
    return pictures


@torch.no_grad()
def reconstructed(pipe: Pipeline, wanted: Sequence[scenes.Scene]) -> list[Image.Image]:
    """Drawn scenes after the autoencoder alone, which has never seen the object either."""
    rng, pictures = random.Random("drawn"), []
    for first in range(0, len(wanted), BATCH):
        drawn = images.drawn(wanted[first : first + BATCH], rng)
        pictures += to_pictures(pipe.autoencoder.decode(pipe.autoencoder.encode(drawn)))
    return pictures


def right(pictures: Sequence, wanted: Sequence[scenes.Scene]) -> float:
    """The share of pictures that are right."""
    return sum(judge(p, s).right for p, s in zip(pictures, wanted, strict=True)) / len(wanted)


def finetune(weights: Path | None, work: Path, kept: int) -> None:
    """Train the LoRA; so many pictures are kept."""
    options = [f"--{name}={value}" for name, value in COURSE.items()]
    given = ["--weights", str(weights)] if weights else []
    data = ["--data", str(work / "pictures"), "--class-data", str(work / "known")]
    captioned = ["--class-prompt", f"a {CLASS}"]  # unheard: all have captions of their own
    data += [*captioned, "--class-images", str(kept)]
    if cli.main(["finetune", *given, *data, *options, "--no-t5", "--out", str(work / "run")]):
        raise SystemExit(1)


def table(figures: Mapping[str, Any]) -> str:
    """How many pictures are right with the LoRA and without it, in Markdown."""
    learnt, plain = figures["right"], figures["right without the LoRA"]
    lines = [f"| {figures['prompts']} prompts | with the LoRA | without |", "|---|---|---|"]
    lines += [f"| {name} | {learnt[name]:.1%} | {plain[name]:.1%} |" for name in learnt]
    return "\n".join(lines)


def main() -> None:
    """Fine-tune, judge and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="the run goes into a new folder")
    parser.add_argument("--object", choices=scenes.UNSEEN_OBJECTS, default="robot")
    parser.add_argument("--weights", type=Path, help="default: the shipped weights")
    parser.add_argument("--out", type=Path, default=FIGURES / "dreambooth.json")
    arguments = parser.parse_args()
    noun, work = arguments.object, arguments.work / f"dreambooth-{arguments.object}"
    shutil.rmtree(work, ignore_errors=True)
    ordinary = of_class(PROMPTS, "asked")
    asked = {
        "with the object": [with_subject(scene, noun) for scene in ordinary],
        f"with a {CLASS} instead": ordinary,
        "without either": scenes.prompts("seen", PROMPTS),
    }
    plain = sd3min.load(arguments.weights, t5=False)
    five = write_pictures(noun, work / "pictures")
    began = time.monotonic()
    known = keep_known(plain, work / "known", [*ordinary, *asked["without either"]])
    pasted = write_pasted(noun, known, work / "pictures")
    finetune(arguments.weights, work, len(known))
    minutes = (time.monotonic() - began) / 60
    lora = work / "run" / "lora.safetensors"

    tuned = sd3min.load(arguments.weights, t5=False, lora=lora)
    made = {name: render(tuned, wanted) for name, wanted in asked.items()}
    drawn = reconstructed(plain, asked["with the object"])
    figures = {
        "weights": plain.weights,
        "object": noun,
        "course": COURSE,
        "minutes": round(minutes, 1),
        "threads": torch.get_num_threads(),
        "bytes": lora.stat().st_size,
        "prompts": PROMPTS,
        "right": {name: right(made[name], wanted) for name, wanted in asked.items()},
        "right without the LoRA": {
            name: right(render(plain, wanted), wanted) for name, wanted in asked.items()
        },
        "pictures that were kept": len(known),
        "pictures that were pasted": len(pasted),
        "right of drawn scenes after the autoencoder": right(drawn, asked["with the object"]),
    }
    with whole(arguments.out) as part:
        part.write_text(json.dumps(figures, indent=2) + "\n")
    sheet = grid([*five, *pasted[:5], *made["with the object"][:10]], columns=5)
    sd3min.save(sheet, arguments.out.with_suffix(".png"))
    print(json.dumps(figures, indent=2))
    print(table(figures))


if __name__ == "__main__":
    main()

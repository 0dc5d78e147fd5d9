"""DreamBooth on sd3-tiny: a LoRA learns an object from five pictures, and is judged in relations.

    python tools/dreambooth.py --work FOLDER [--object robot] [--weights FILE] [--out FILE]

Five pictures of one object that sd3-tiny was never shown, each on another background, are what
`sd3min finetune` is given, with pictures of the class that the model makes itself. Then 200 prompts
put the object into relations with known things, 200 others do without it, and 100 ask for the plain
class; the detector judges all of them with the LoRA and without.
"""

import argparse
import dataclasses
import json
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

import sd3min
from sd3min import cli
from sd3min.pipeline import Pipeline
from sd3min.training import captions, scenes
from sd3min.training.detector import judge
from sd3min.training.grid import grid

FIGURES = Path(__file__).parents[1] / "weights" / "figures"
PROMPTS = 200
CLASS = "cat"  # what the object is called a kind of: its place in a caption, and its shape
SUBJECT = f"{captions.SPARE} {CLASS}"
BATCH = 20
COURSE = {"steps": 400, "batch": 4, "rate": 1e-3, "rank": 4, "class-images": 60}


def instance(noun: str, number: int) -> scenes.Scene:
    """A scene of the object alone."""
    return scenes.Scene(scenes.Thing(noun), (), list(scenes.BACKGROUNDS)[number])


def write_pictures(noun: str, folder: Path) -> None:
    """Five pictures of the object, each with its caption beside it."""
    folder.mkdir(parents=True)
    for i in range(5):
        scene = instance(noun, i)
        scenes.draw(scene, random.Random(i)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {SUBJECT} on {scene.background}")


def with_subject(noun: str, count: int) -> list[scenes.Scene]:
    """Scenes of the object and one or two known things, in relations."""
    rng, found = random.Random(f"with {noun}"), []
    while len(found) < count:
        scene = scenes.random_scene(rng)
        plain = scenes.Scene(scenes.Thing(CLASS), scene.others, scene.background)
        known = CLASS not in [thing.noun for thing in scene.things]
        if scene.others and known and not scenes.is_held_out(plain):
            found.append(dataclasses.replace(plain, first=scenes.Thing(noun)))
    return found


def of_class(count: int) -> list[scenes.Scene]:
    """Scenes of training in which there is a plain thing of the class."""
    rng, found = random.Random("of the class"), []
    while len(found) < count:
        scene = scenes.random_scene(rng)
        if CLASS in [thing.noun for thing in scene.things]:
            found.append(scene)
    return found


def said(scene: scenes.Scene, noun: str) -> str:
    """A scene's caption, in which the object has its learnt name."""
    return captions.caption(scene).replace(captions.with_article(noun), f"a {SUBJECT}")


def render(pipe: Pipeline, wanted: Sequence[scenes.Scene], noun: str) -> list:
    """A picture of each scene, its seed the scene's index."""
    pictures = []
    for first in tqdm(range(0, len(wanted), BATCH), leave=False):
        words = [said(scene, noun) for scene in wanted[first : first + BATCH]]
        pictures += pipe(words, seed=first, progress=False)
    return pictures


def right(pictures: Sequence, wanted: Sequence[scenes.Scene]) -> float:
    """The share of pictures that are right."""
    return sum(judge(p, s).right for p, s in zip(pictures, wanted, strict=True)) / len(wanted)


def finetune(weights: Path | None, work: Path) -> float:
    """Train the LoRA, after the class's pictures are made; minutes that both took."""
    began = time.monotonic()
    options = [f"--{name}={value}" for name, value in COURSE.items()]
    given = ["--weights", str(weights)] if weights else []
    data = ["--data", str(work / "pictures"), "--class-data", str(work / "class")]
    call = ["finetune", *given, *data, "--class-prompt", f"a {CLASS}", *options]
    if cli.main([*call, "--train-clips", "--out", str(work / "run")]):
        raise SystemExit(1)
    return (time.monotonic() - began) / 60


def main() -> None:
    """Fine-tune, judge and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of the run")
    parser.add_argument("--object", choices=scenes.UNSEEN_OBJECTS, default="robot")
    parser.add_argument("--weights", type=Path, help="default: the shipped weights")
    parser.add_argument("--out", type=Path, default=FIGURES / "dreambooth.json")
    arguments = parser.parse_args()
    noun, work = arguments.object, arguments.work
    for folder in ("pictures", "class", "run"):
        shutil.rmtree(work / folder, ignore_errors=True)
    write_pictures(noun, work / "pictures")
    minutes = finetune(arguments.weights, work)
    lora = work / "run" / "lora.safetensors"

    plain, tuned = sd3min.load(arguments.weights), sd3min.load(arguments.weights, lora=lora)
    asked = {
        "with the object": with_subject(noun, PROMPTS),
        "without it": scenes.prompts("seen", PROMPTS),
        "of its class": of_class(PROMPTS // 2),
    }
    figures = {
        "object": noun,
        "course": COURSE,
        "minutes": round(minutes, 1),
        "bytes": lora.stat().st_size,
    }
    made = {name: render(tuned, wanted, noun) for name, wanted in asked.items()}
    for name, wanted in asked.items():
        figures[name] = right(made[name], wanted)
        figures[f"{name}, no LoRA"] = right(render(plain, wanted, noun), wanted)
    arguments.out.write_text(json.dumps(figures, indent=2) + "\n")
    learnt = [scenes.draw(instance(noun, i), random.Random(i)) for i in range(5)]
    shown = grid([*learnt, *made["with the object"][:10]], columns=5)
    shown.save(arguments.out.with_suffix(".png"))
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()

"""The command `sd3min generate`: pictures of prompts, of pictures, and of pictures' own records."""

import argparse
import os
import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from sd3min import checkpoint, flow, gallery, loading, options, pipeline
from sd3min.config import Refusal
from sd3min.conventions import CONVENTIONS, WITHOUT_T5
from sd3min.files import LONGEST
from sd3min.lora import merged
from sd3min.record import Record, current_versions, pixel_hash, read_record
from sd3min.settings import check_call

MOST_PICTURES = 100  # of one run: their numbers have two digits


def add_generate(parser: argparse.ArgumentParser) -> None:
    """The options of `sd3min generate`."""
    parser.set_defaults(run=run_generate)
    add = parser.add_argument
    add("prompt", type=options.text, nargs="*", help="what to show; several make several pictures")
    add("--negative", type=options.text, metavar="TEXT", help="what guidance leads away from")
    like = "PNG to make again from its own record; other options change what they say"
    add("--like", type=Path, metavar="PNG", help=like)
    add_weights(parser)
    add_settings(parser)
    add(
        "--seed", type=options.whole, help="of the first picture; others count up (default: random)"
    )
    add("--num-images", type=options.whole, help="pictures of each prompt (default: 1)")
    out = "PNG to write; several pictures are numbered (default: named after the prompt)"
    add("--out", type=Path, metavar="PNG", help=out)
    add_gallery(parser)


def add_gallery(parser: argparse.ArgumentParser) -> None:
    """Options of many pictures."""
    add = parser.add_argument_group("many pictures").add_argument
    prompts = "text with one prompt a line; picture i has the seed --seed (default: 0) + i"
    add("--prompts", type=Path, metavar="FILE", help=prompts)
    folder = "holds 000000.png and so on; what is there already is not made again"
    add("--out-dir", type=Path, metavar="FOLDER", help=folder)
    batch = "pictures at once (default: 1, which makes each as it is alone, bit for bit)"
    add("--batch", type=options.whole, metavar="NUMBER", help=batch)


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Options of what is loaded, and how."""
    add_files(parser)
    add_placement(parser)
    folder = "keep prompts' embeddings, so that the next run of a prompt loads no text encoder"
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help=folder)
    modes = (
        "the plain networks through torch.compile: default, or max-autotune, which takes minutes"
    )
    parser.add_argument("--compile", metavar="MODE", help=modes)


def add_files(parser: argparse.ArgumentParser) -> None:
    """Options of the files that are loaded."""
    add = parser.add_argument_group("weights").add_argument
    weights = "official files, folders or names on the hub, the last that holds a part counting"
    add("--weights", type=Path, nargs="+", metavar="PATH", help=f"{weights} (default: sd3-tiny)")
    encoders = "files of encoders that --weights lacks"
    add("--text-encoders", type=Path, nargs="+", metavar="PATH", help=encoders)
    tokenizers = "holds tokenizer, tokenizer_2, tokenizer_3 (default: beside the weights)"
    add("--tokenizers", type=Path, metavar="FOLDER", help=tokenizers)
    lora = "file of a LoRA, and how much it counts (default: 1); may be given several times"
    add("--lora", type=options.lora, action="append", metavar="FILE:SCALE", help=lora)


def add_placement(parser: argparse.ArgumentParser) -> None:
    """Options of how it is loaded."""
    t5 = parser.add_mutually_exclusive_group()
    t5.add_argument("--no-t5", action="store_true", help="leave T5 out: zeros in its place")
    kinds = "keep T5 in eight bits: int8, bnb (bitsandbytes'), or fp8, of a file in fp8"
    t5.add_argument("--t5", metavar="KIND", help=kinds)
    plans = "one part at a time (resident), two layers at a time (stream), or all, quick (fast)"
    parser.add_argument("--memory", metavar="PLAN", help=plans)
    parser.add_argument("--mmdit", metavar="KIND", help="int8: linear layers in eight bits")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16")
    parser.add_argument("--device", help="cpu, cuda, …")


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Options that a call of a pipeline has by the same names, or by the names of pictures."""
    add = parser.add_argument_group("settings (default: the conventions' or the weights' own)")
    option = add.add_argument
    conventions = f"do as another implementation does: {', '.join(CONVENTIONS)}"
    option("--conventions", metavar="NAME", help=conventions)
    option("--size", type=options.size, metavar="WxH", help="in pixels, multiples of 16")
    option("--steps", type=options.whole, help="steps of the sampler")
    guidance = "guidance scale; 1 or less turns guidance off"
    option("--guidance", type=options.number, dest="guidance_scale", help=guidance)
    option("--shift", type=options.number, help="resolution shift of the schedule")
    option("--schedule", help=" or ".join(flow.SCHEDULES))
    option("--sampler", help=" or ".join(flow.SAMPLERS))
    option("--t5-length", type=options.whole, metavar="ROWS", help="rows that T5 adds")
    option("--without-t5", help=f"what stands for T5 under --no-t5: {', '.join(WITHOUT_T5)}")
    option("--init-image", type=Path, metavar="FILE", help="picture to start from")
    strength = "how far to leave it, above 0 and at most 1 (default: 0.6)"
    option("--strength", type=options.number, help=strength)
    mask = "of the size of --init-image: white is repainted, black kept, grey in between"
    option("--mask", type=Path, metavar="FILE", help=mask)
    keep = "paste the starting picture's own pixels back where the mask is black (default: yes)"
    option("--keep-unmasked", action=argparse.BooleanOptionalAction, help=keep)


def targets(out: Path | None, prompt: str, count: int) -> list[Path]:
    """A file name for every picture, each of which can be written."""
    name = re.sub(r"\W+", "-", prompt.lower()).strip("-").encode()[:60].decode(errors="ignore")
    out = out or Path(f"{name or 'picture'}.png")
    if count > MOST_PICTURES:
        raise Refusal(f"{count} pictures are too many for one run: ask for {MOST_PICTURES} at most")
    if out.suffix.lower() != ".png":
        raise Refusal(f"--out {out} is not the name of a PNG: end it with .png")
    paths = [out] if count == 1 else [out.with_stem(f"{out.stem}-{i:02}") for i in range(count)]
    try:
        folder = next((path for path in paths if path.is_dir()), None)
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as error:
        reason = error.strerror or error
        raise Refusal(f"--out {out} cannot be written ({reason}): pass another") from None
    if folder:
        raise Refusal(f"--out {folder} is a folder: pass the name of a PNG")
    if len(os.fsencode(paths[-1].name)) > LONGEST:
        raise Refusal(f"--out {out} is too long a name: pass one of {LONGEST} bytes at most")
    return paths


def given_call(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the command line says of a pipeline's call, its pictures left out."""
    width, height = arguments.size or (None, None)
    same = ("guidance_scale", "steps", "shift", "schedule", "sampler", "strength", "seed")
    same += ("num_images", "t5_length", "without_t5", "keep_unmasked", "conventions")
    call = {name: getattr(arguments, name) for name in same}
    call |= {"width": width, "height": height, "negative_prompt": arguments.negative}
    call |= {"prompt": arguments.prompt or None}
    return {name: value for name, value in call.items() if value is not None}


def given_pictures(arguments: argparse.Namespace, record: Record | None) -> dict[str, Any]:
    """The starting picture and the mask, which have to be those that a record names."""
    start, mask = arguments.init_image, arguments.mask
    pictures = {
        "init_image": options.open_image(start) if start else None,
        "mask_image": options.open_image(mask, "--mask", mode=None) if mask else None,
    }
    if record:
        record.check_image("init_image", pictures["init_image"], f"--init-image {start}")
        record.check_image("mask_image", pictures["mask_image"], f"--mask {mask}")
    if start is None and arguments.strength is not None:
        raise Refusal("--strength says how far to leave --init-image: pass both or neither")
    if start is None and mask is not None:
        raise Refusal("--mask says what to repaint of --init-image: pass both or neither")
    return pictures


def check_origin(
    record: Record, arguments: argparse.Namespace, opened: checkpoint.Checkpoint
) -> None:
    """Refuse, or warn where they were asked for, other weights; warn of other versions."""
    found = opened.fingerprint()
    if found != record.weights:
        other = f"{arguments.like} was made with weights of fingerprint {record.weights[:16]}"
        if arguments.weights is None:
            raise Refusal(f"{other} and not with {opened.path}: name theirs with --weights")
        warnings.warn(
            f"{other}, {opened.path} has {found[:16]}: another picture", UserWarning, stacklevel=2
        )
    for name, version in current_versions().items():
        if record.versions.get(name) != version:
            then = f"{arguments.like} was made with {name} {record.versions.get(name)}"
            warnings.warn(f"{then}, this is {version}: pixels may differ", stacklevel=2)


def check_gallery(arguments: argparse.Namespace) -> None:
    """Refuse options that go with one picture, or with many, alone."""
    if not arguments.prompts or not arguments.out_dir:
        raise Refusal("--prompts, --out-dir and --batch go together: pass the first two at least")
    for given, option in ((arguments.prompt, "a prompt"), (arguments.like, "--like")):
        if given:
            raise Refusal(f"--prompts names a file of prompts: leave out {option}")
    if arguments.out:
        raise Refusal(f"--out {arguments.out} is for a prompt: name a folder with --out-dir")


def open_weights(arguments: argparse.Namespace, t5: bool) -> checkpoint.Checkpoint:
    """The headers of the weights."""
    opened = checkpoint.Checkpoint.open(
        arguments.weights,
        arguments.text_encoders,
        arguments.tokenizers,
        checkpoint.part_names(t5),
    )
    opened.require(["mmdit"])
    return opened


def run_gallery(arguments: argparse.Namespace) -> None:
    """Make the pictures of a file of prompts that are not there yet, and list all when they are."""
    check_gallery(arguments)
    batch = gallery.check_batch(1 if arguments.batch is None else arguments.batch)
    rank, processes = gallery.share()
    prompts = gallery.read_prompts(arguments.prompts)
    call: dict[str, Any] = {"seed": 0} | given_call(arguments) | {"prompt": prompts}
    call |= given_pictures(arguments, None)
    t5 = arguments.t5 or not arguments.no_t5
    opened = open_weights(arguments, bool(t5))
    checked = check_call(opened.parts["mmdit"].config, opened.defaults, **call)
    place = arguments.device, arguments.dtype
    how = t5, arguments.memory, arguments.mmdit, arguments.cache
    loading.check(opened, *how, arguments.lora, arguments.compile)
    opened = merged(opened, arguments.lora, checkpoint.part_names(bool(t5)))
    dtype, _ = opened.placement(*place)
    common = {
        "init_image": pixel_hash(call["init_image"]),
        "mask_image": pixel_hash(call["mask_image"], "L"),
        "t5": t5,
        "mmdit": arguments.mmdit,
        "dtype": str(dtype).removeprefix("torch."),
        "weights": opened.fingerprint(),
        "loras": [list(lora) for lora in opened.loras],
    }
    gallery.check_folder(arguments.out_dir)
    pictures = gallery.Gallery(arguments.out_dir, gallery.records(checked, common))
    last = None, arguments.compile  # the LoRAs are merged
    pictures.make(
        lambda: loading.assemble(opened, *place, *how, *last), call, batch, rank, processes
    )
    manifest = pictures.write_manifest()
    if manifest:
        print(manifest)


def find_loras(record: Record, picture: Path) -> list[tuple[Path, float]]:
    """The LoRAs that a picture was made with, here or beside it."""
    found = []
    for name, fingerprint, scale in record.loras or ():
        places = [
            place
            for place in (Path(Path(name).name), picture.parent / Path(name).name)
            if place.is_file()
        ]
        path = next((p for p in places if checkpoint.fingerprint(p) == fingerprint), None)
        if path is None:
            made = f"{picture} was made with the LoRA {name} of fingerprint {fingerprint[:16]}"
            raise Refusal(f"{made}, which is not here: pass it as --lora FILE:{scale:g}")
        found.append((path, scale))
    return found


def check_loras(record: Record, picture: Path, pipe: pipeline.Pipeline) -> None:
    """Warn of other LoRAs than a picture was made with."""
    made = sorted((fingerprint, scale) for _, fingerprint, scale in record.loras or ())
    if made != sorted((lora.fingerprint, lora.scale) for lora in pipe.loras):
        warnings.warn(f"{picture} was made with other LoRAs: another picture", stacklevel=2)


def run_generate(arguments: argparse.Namespace) -> None:
    """Make pictures and say where they are; everything is checked before the weights are read."""
    if arguments.prompts or arguments.out_dir or arguments.batch is not None:
        return run_gallery(arguments)
    record = read_record(arguments.like) if arguments.like else None
    call: dict[str, Any] = record.call if record else {}
    call = call | given_call(arguments)
    if arguments.steps is not None:
        call.pop("sigmas", None)  # of a record, which stand in the place of steps
    if "prompt" not in call:
        raise Refusal("the following arguments are required: prompt (see sd3min generate --help)")
    call |= given_pictures(arguments, record)
    prompts = [call["prompt"]] if isinstance(call["prompt"], str) else call["prompt"]
    again = Path(f"{arguments.like.stem}-again.png") if record else None
    count = len(prompts) * max(call.get("num_images", 1), 1)
    paths = targets(arguments.out or again, prompts[0], count)
    dtype, t5 = arguments.dtype, arguments.t5 or not arguments.no_t5
    memory, mmdit = arguments.memory, arguments.mmdit
    if record:
        dtype, mmdit = dtype or record.dtype, mmdit or record.mmdit
        if record.t5 is not None and not arguments.t5 and not arguments.no_t5:
            t5 = record.t5
        memory = memory or ("resident" if mmdit else None)  # as kinds of network need
    opened = open_weights(arguments, bool(t5))
    check_call(opened.parts["mmdit"].config, opened.defaults, **call)
    if record:
        check_origin(record, arguments, opened)
    loras = arguments.lora or (find_loras(record, arguments.like) if record else None)
    how = memory, mmdit, arguments.cache, loras, arguments.compile
    pipe = loading.assemble(opened, arguments.device, dtype, t5, *how)
    if record:
        check_loras(record, arguments.like, pipe)
    for image, path in zip(pipe(**call, progress=sys.stderr.isatty()), paths, strict=True):
        pipeline.save(image, path)
        print(path)

"""The commands: `sd3min generate` makes pictures, `sd3min inspect` says what a file holds, `sd3min
verify` checks it.

A call that cannot be carried out ends before any work, with exit code 2 and one sentence.
"""

import argparse
import io
import os
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from PIL import Image, ImageOps

from sd3min import checkpoint, flow, pipeline, probes
from sd3min.config import PRESETS, Refusal
from sd3min.parts import TITLES, Part
from sd3min.probes import report, table
from sd3min.settings import check_call

MOST_PICTURES = 100  # of one run: their numbers have two digits


class Parser(argparse.ArgumentParser):
    """A parser that refuses in one sentence."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print under a page of usage."""
        raise Refusal(f"{message} (see {self.prog} --help)")


def text(value: str) -> str:
    """A prompt, which a terminal may hand over in another encoding than UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{value!r} is not text in UTF-8") from None
    return value


def whole(value: str) -> int:
    """A whole number."""
    try:
        return int(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is not a whole number") from None


def number(value: str) -> float:
    """A number."""
    try:
        return float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is not a number") from None


def size(value: str) -> tuple[int, int]:
    """Width and height from "WxH"."""
    found = re.fullmatch(r"(\d{1,9})x(\d{1,9})", value)
    if not found:
        raise argparse.ArgumentTypeError(f"{value!r} is not a size such as 1024x768")
    return int(found[1]), int(found[2])


def make_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = Parser(prog="sd3min", description="Stable Diffusion 3, small enough to read.")
    commands = parser.add_subparsers(metavar="command", parser_class=Parser)
    add_generate(commands.add_parser("generate", help="make pictures of prompts"))
    add_inspect(commands.add_parser("inspect", help="say what a file holds"))
    add_verify(commands.add_parser("verify", help="check a file, part by part, against diffusers"))
    return parser


def add_generate(parser: argparse.ArgumentParser) -> None:
    """The options of `sd3min generate`."""
    parser.set_defaults(run=run_generate)
    add = parser.add_argument
    add("prompt", type=text, nargs="+", help="what to show; several make several pictures")
    add("--negative", type=text, default="", metavar="TEXT", help="what guidance leads away from")
    add("--weights", type=Path, metavar="FILE", help="official file (default: sd3-tiny)")
    encoders = "files of encoders that --weights lacks"
    add("--text-encoders", type=Path, nargs="+", metavar="FILE", help=encoders)
    tokenizers = "holds tokenizer, tokenizer_2, tokenizer_3 (default: beside the weights)"
    add("--tokenizers", type=Path, metavar="FOLDER", help=tokenizers)
    add("--no-t5", action="store_true", help="leave T5 out: zeros in its place")
    add("--dtype", help="float32, bfloat16 or float16")
    add("--device", help="cpu, cuda, …")
    add("--steps", type=whole, help="steps of the sampler")
    add("--guidance", type=number, help="guidance scale; 1 or less turns guidance off")
    add("--shift", type=number, help="resolution shift of the schedule")
    add("--schedule", help=" or ".join(flow.SCHEDULES))
    add("--sampler", help=" or ".join(flow.SAMPLERS))
    add("--seed", type=whole, help="of the first picture; others count up (default: random)")
    add("--size", type=size, metavar="WxH", help="in pixels, multiples of 16")
    add("--num-images", type=whole, default=1, help="pictures of each prompt")
    add("--init-image", type=Path, metavar="FILE", help="picture to start from")
    strength = "how far to leave it, above 0 and at most 1 (default: 0.6)"
    add("--strength", type=number, help=strength)
    out = "PNG to write; several pictures are numbered (default: named after the prompt)"
    add("--out", type=Path, metavar="PNG", help=out)


def add_inspect(parser: argparse.ArgumentParser) -> None:
    """The options of `sd3min inspect`."""
    parser.set_defaults(run=run_inspect)
    parser.add_argument("path", type=Path, nargs="?", help="official file (default: sd3-tiny)")


def add_verify(parser: argparse.ArgumentParser) -> None:
    """The options of `sd3min verify`."""
    parser.set_defaults(run=run_verify)
    add = parser.add_argument
    add("path", type=Path, nargs="?", help="official file (default: sd3-tiny)")
    encoders = "files of encoders that the first lacks"
    add("--text-encoders", type=Path, nargs="+", metavar="FILE", help=encoders)
    tokenizers = "holds tokenizer, tokenizer_2, tokenizer_3 (default: beside the file)"
    add("--tokenizers", type=Path, metavar="FOLDER", help=tokenizers)
    add("--report", type=Path, metavar="HTML", help="page to write, with both pictures")


def targets(out: Path | None, prompt: str, count: int) -> list[Path]:
    """A file name for every picture, each of which can be written."""
    name = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60] or "picture"
    out = out or Path(f"{name}.png")
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
    return paths


def open_image(path: Path) -> Image.Image:
    """A picture file, read whole and turned upright."""
    if not path.exists():
        raise Refusal(f"--init-image {path} does not exist: pass the path of a picture")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception:  # whatever the file holds
        raise Refusal(
            f"--init-image {path} is not a picture that can be read: pass a PNG or a JPEG"
        ) from None


def run_generate(arguments: argparse.Namespace) -> None:
    """Make pictures and say where they are; everything is checked before the weights are read."""
    if arguments.strength is not None and arguments.init_image is None:
        raise Refusal("--strength says how far to leave --init-image: pass both or neither")
    count = len(arguments.prompt) * max(arguments.num_images, 1)
    paths = targets(arguments.out, arguments.prompt[0], count)
    opened = checkpoint.Checkpoint.open(
        arguments.weights, arguments.text_encoders, arguments.tokenizers
    )
    opened.require(["mmdit"])
    width, height = arguments.size or (None, None)
    call = {
        "prompt": arguments.prompt,
        "negative_prompt": arguments.negative,
        "num_images": arguments.num_images,
        "seed": arguments.seed,
        "init_image": open_image(arguments.init_image) if arguments.init_image else None,
        "width": width,
        "height": height,
        "steps": arguments.steps,
        "guidance_scale": arguments.guidance,
        "shift": arguments.shift,
        "schedule": arguments.schedule,
        "sampler": arguments.sampler,
        "strength": arguments.strength,
    }
    check_call(opened.parts["mmdit"].config, opened.defaults, **call)
    pipe = pipeline.assemble(opened, arguments.device, arguments.dtype, not arguments.no_t5)
    for image, path in zip(pipe(**call, progress=sys.stderr.isatty()), paths, strict=True):
        pipeline.save(image, path)
        print(path)


def sizes(part: Part) -> str:
    """A part's sizes in words."""
    config = part.config
    if part.name == "mmdit":
        known = (name for name, preset in PRESETS.items() if preset == config)
        name = next(known, "of no released size")
        return f"{name}, depth {config.depth}, positions {config.grid}x{config.grid}"
    if part.name == "autoencoder":
        return f"widths {', '.join(map(str, config.widths))}"
    return f"{config.layers} layers, width {config.width}, vocabulary {config.vocabulary}"


def run_inspect(arguments: argparse.Namespace) -> None:
    """Print a line for each part, and what is missing for a picture."""
    opened = checkpoint.Checkpoint.open(arguments.path)
    lines = [str(opened.path)]
    for part in opened.parts.values():
        part.skeleton()
        types = Counter(tensor.dtype for tensor in part.tensors.values())
        stored = ", ".join(f"{count} tensors in {dtype}" for dtype, count in types.items())
        counted = f"{TITLES[part.name]:12} {part.parameters:>13,} parameters"
        lines.append(f"  {counted}, {stored}: {sizes(part)}")
    missing = [title for name, title in TITLES.items() if name not in opened.parts]
    print("\n".join([*lines, f"  missing: {', '.join(missing) or 'nothing'}"]))


def run_verify(arguments: argparse.Namespace) -> int:
    """Print the table line by line; 1 where a line failed."""
    if arguments.report:
        report.check_target(arguments.report)
    given = arguments.path, arguments.text_encoders, arguments.tokenizers
    checks = []
    for check in probes.verify(*given):
        lines = [] if checks else [table.line(table.HEAD)]
        checks.append(check)
        print(*lines, table.line(table.cells(check)), sep="\n", flush=True)
    failed = [check for check in checks if check.passed is False]
    found = "nothing failed" if not failed else f"{len(failed)} of {len(checks)} checks failed"
    print(found)
    if arguments.report:
        path = checkpoint.Checkpoint.open(*given).path
        page = report.page(f"{path.name}: {found}", report.versions(), checks)
        report.write(arguments.report, page)
        print(arguments.report)
    return 1 if failed else 0


def say(message: object, *_: object) -> None:
    """Print a refusal or a warning as one line."""
    print("sd3min:", *str(message).split(), file=sys.stderr)


def run(arguments: Sequence[str] | None) -> int:
    """Run a command; returns the exit code."""
    parsed = make_parser().parse_args(arguments)
    if "run" not in parsed:
        raise Refusal("no command was given: pass generate or inspect (see sd3min --help)")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # of a file name that it cannot show
    code = parsed.run(parsed) or 0
    sys.stdout.flush()
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = say
            return run(arguments)
    except Refusal as refusal:
        say(refusal)
        return 2
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except BrokenPipeError:  # nobody reads on: what is left to print goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate" not in str(error):
            raise
        say("the memory does not suffice: pass a smaller --size, fewer images or --dtype bfloat16")
        return 2

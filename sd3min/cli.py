"""The commands: `sd3min generate` makes pictures, `sd3min inspect` says what a file holds.

A call that cannot be carried out ends with exit code 2 and one sentence.
"""

import argparse
import re
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from PIL import Image, UnidentifiedImageError

from sd3min import checkpoint, pipeline
from sd3min.config import PRESETS, AutoencoderConfig, CLIPConfig, MMDiTConfig, Refusal, T5Config


class Parser(argparse.ArgumentParser):
    """A parser that refuses in one sentence."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print under a page of usage."""
        raise Refusal(f"{message} (see {self.prog} --help)")


def size(text: str) -> tuple[int, int]:
    """Width and height from "WxH"."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 1024x768")
    return int(found[1]), int(found[2])


def make_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = Parser(prog="sd3min", description="Stable Diffusion 3, small enough to read.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)

    generate = commands.add_parser("generate", help="make pictures of prompts")
    generate.set_defaults(run=run_generate)
    generate.add_argument(
        "prompt", nargs="+", help="what to show; several prompts make several pictures"
    )
    generate.add_argument("--negative", default="", help="what guidance leads away from")
    generate.add_argument(
        "--weights", type=Path, help="official single file (default: the shipped sd3-tiny)"
    )
    generate.add_argument(
        "--text-encoders", type=Path, nargs="+", help="files of encoders that --weights lacks"
    )
    generate.add_argument(
        "--tokenizers", type=Path, help="folder with tokenizer, tokenizer_2, tokenizer_3"
    )
    generate.add_argument("--steps", type=int, help="Euler steps")
    generate.add_argument(
        "--guidance", type=float, help="guidance scale; 1 or less turns guidance off"
    )
    generate.add_argument("--shift", type=float, help="resolution shift of the schedule")
    generate.add_argument("--schedule", help="official or single_shift")
    generate.add_argument("--sampler", help="euler")
    generate.add_argument(
        "--seed", type=int, help="of the first picture; later ones count up (default: random)"
    )
    generate.add_argument(
        "--size", type=size, default=(None, None), help="WxH in pixels, multiples of 16"
    )
    generate.add_argument("--num-images", type=int, default=1, help="pictures of each prompt")
    generate.add_argument("--init-image", type=Path, help="picture to start from")
    generate.add_argument(
        "--strength", type=float, default=0.6, help="how far to leave it, above 0 and at most 1"
    )
    generate.add_argument("--no-t5", action="store_true", help="leave T5 out: zeros in its place")
    generate.add_argument("--dtype", help="float32, bfloat16 or float16")
    generate.add_argument("--device", help="cpu, cuda, …")
    generate.add_argument(
        "--out", type=Path, help="PNG to write; several pictures are numbered (default: the prompt)"
    )

    inspect = commands.add_parser("inspect", help="say what a file holds")
    inspect.set_defaults(run=run_inspect)
    inspect.add_argument(
        "path", type=Path, nargs="?", help="a .safetensors file (default: the shipped sd3-tiny)"
    )
    return parser


def open_image(path: Path) -> Image.Image:
    """A picture file, read whole."""
    try:
        image = Image.open(path)
        image.load()
    except FileNotFoundError:
        raise Refusal(f"{path} does not exist: pass the path of a picture") from None
    except (OSError, UnidentifiedImageError):
        raise Refusal(f"{path} is not a picture that can be read") from None
    return image


def targets(out: Path | None, prompts: Sequence[str], count: int) -> list[Path]:
    """A file name for every picture."""
    out = out or Path(
        re.sub(r"\W+", "-", prompts[0].lower()).strip("-")[:60] or "picture"
    ).with_suffix(".png")
    if not out.parent.is_dir():
        raise Refusal(f"the folder {out.parent} does not exist: make it first")
    if out.suffix.lower() != ".png" or out.is_dir():
        raise Refusal(f"{out} is not the name of a PNG: end it with .png")
    return [out] if count == 1 else [out.with_stem(f"{out.stem}-{i:02}") for i in range(count)]


def run_generate(arguments: argparse.Namespace) -> None:
    """Make pictures and say where they are; everything is checked before the weights are loaded."""
    paths = targets(arguments.out, arguments.prompt, len(arguments.prompt) * arguments.num_images)
    opened = checkpoint.Checkpoint.open(
        arguments.weights, arguments.text_encoders, arguments.tokenizers
    )
    opened.require(["mmdit"])
    call = {
        "prompt": arguments.prompt,
        "negative_prompt": arguments.negative,
        "num_images": arguments.num_images,
        "seed": arguments.seed,
        "init_image": open_image(arguments.init_image) if arguments.init_image else None,
        "width": arguments.size[0],
        "height": arguments.size[1],
        "steps": arguments.steps,
        "guidance_scale": arguments.guidance,
        "shift": arguments.shift,
        "schedule": arguments.schedule,
        "sampler": arguments.sampler,
        "strength": arguments.strength,
    }
    config = MMDiTConfig.from_shapes(opened.parts["mmdit"].shapes)
    pipeline.check_call(config, opened.defaults, **call)
    pipe = pipeline.assemble(opened, arguments.device, arguments.dtype, not arguments.no_t5)
    for image, path in zip(pipe(**call), paths, strict=True):
        pipeline.save(image, path)
        print(path)


def sizes(part: checkpoint.Part) -> str:
    """A part's sizes in words."""
    if part.name == "mmdit":
        config = MMDiTConfig.from_shapes(part.shapes)
        known = next(
            (name for name, preset in PRESETS.items() if preset == config), "of no released size"
        )
        return f"{known}: depth {config.depth}, width {config.width}, positions {config.grid}x{config.grid}"
    if part.name == "autoencoder":
        return f"widths {', '.join(map(str, AutoencoderConfig.from_shapes(part.shapes).widths))}"
    config = (T5Config if part.name == "t5" else CLIPConfig).from_shapes(part.shapes)
    return f"{config.layers} layers, width {config.width}, vocabulary {config.vocabulary}"


def run_inspect(arguments: argparse.Namespace) -> None:
    """Print a line for each part, and what is missing for a picture."""
    opened = checkpoint.Checkpoint.open(arguments.path)
    print(opened.path)
    for name, part in opened.parts.items():
        types = ", ".join(f"{kind} x{n}" for kind, n in Counter(part.dtypes.values()).items())
        title = checkpoint.TITLES[name]
        print(
            f"  {title:12} {part.parameters:>14,} values in {len(part.shapes):>4} tensors ({types}); {sizes(part)}"
        )
    missing = [title for name, title in checkpoint.TITLES.items() if name not in opened.parts]
    print(f"  missing: {', '.join(missing) or 'nothing'}")


def show_warning(message: Warning | str, *_: object) -> None:
    """Print a warning as one line."""
    print(f"sd3min: {message}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    warnings.showwarning = show_warning
    try:
        parsed = make_parser().parse_args(arguments)
        parsed.run(parsed)
    except Refusal as refusal:
        print(f"sd3min: {refusal}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sd3min: interrupted", file=sys.stderr)
        return 130
    return 0

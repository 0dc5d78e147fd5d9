"""The commands: `sd3min generate` makes pictures, `inspect` says what a file holds, `plan` what
memory a run will take, `convert` writes a file in the other layout, `verify` checks it against
diffusers, `explain` says why two implementations make different pictures, `train` and `finetune`
make weights and LoRAs, and `explore` opens a page.

A call that cannot be carried out ends before any work, with exit code 2 and one sentence.
"""

import argparse
import contextlib
import io
import os
import sys
import tempfile
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from sd3min import checkpoint, hub, loading, lora, options, pipeline, probes
from sd3min.config import Refusal, released_name
from sd3min.conventions import CONVENTIONS, find_conventions
from sd3min.convert import convert
from sd3min.differences import PICTURES, Difference, explain
from sd3min.explorer.commands import add_explore
from sd3min.fast.plan import plan
from sd3min.fast.stages import MEMORY
from sd3min.generate import add_generate, add_placement
from sd3min.parts import TITLES, Part
from sd3min.probes import report, table
from sd3min.settings import check_call
from sd3min.training.commands import add_finetune, add_train


def make_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = options.Parser(prog="sd3min", description="Stable Diffusion 3, small enough to read.")
    parser.set_defaults(smaller="pass a smaller --size, fewer images or --dtype bfloat16")
    commands = parser.add_subparsers(metavar="command", parser_class=options.Parser)
    add_generate(commands.add_parser("generate", help="make pictures of prompts"))
    add_inspect(commands.add_parser("inspect", help="say what a file holds"))
    add_plan(commands.add_parser("plan", help="say what will be in memory, stage by stage"))
    layouts = "official single file to diffusers folder, or back"
    add_convert(commands.add_parser("convert", help=layouts))
    add_verify(commands.add_parser("verify", help="check a file, part by part, against diffusers"))
    add_explain(commands.add_parser("explain", help="say what two implementations differ in"))
    add_train(commands.add_parser("train", help="train a small model from nothing"))
    add_finetune(commands.add_parser("finetune", help="teach a model from pictures, as a LoRA"))
    add_explore(commands.add_parser("explore", help="open a local page to draw and look inside"))
    return parser


def add_inspect(parser: argparse.ArgumentParser) -> None:
    """The options of `sd3min inspect`."""
    parser.set_defaults(run=run_inspect)
    paths = "official files, folders or names on the hub: headers are read (default: sd3-tiny)"
    parser.add_argument("path", type=Path, nargs="*", help=paths)


def add_plan(parser: argparse.ArgumentParser) -> None:
    """The options of `sd3min plan`."""
    parser.set_defaults(run=run_plan)
    add = parser.add_argument
    add("path", type=Path, nargs="*", help="official files or folders (default: sd3-tiny)")
    add_placement(parser)
    add("--size", type=options.size, metavar="WxH", help="of the picture (default: the weights')")
    add("--num-images", type=options.whole, default=1, help="pictures at once (default: 1)")


def add_convert(parser: argparse.ArgumentParser) -> None:
    """The options of `sd3min convert`."""
    parser.set_defaults(run=run_convert)
    add = parser.add_argument
    add("source", type=Path, help="official file or diffusers folder")
    target = "official file to write if it ends in .safetensors, else diffusers folder"
    add("target", type=Path, help=target)
    encoders = "files of encoders to put in too"
    add("--text-encoders", type=Path, nargs="+", metavar="FILE", help=encoders)
    tokenizers = "holds tokenizer, tokenizer_2, tokenizer_3 (default: beside the source)"
    add("--tokenizers", type=Path, metavar="FOLDER", help=tokenizers)
    size = "split a part that is longer (default: 10GB, text encoders 5GB)"
    add("--shard-size", type=options.length, metavar="LENGTH", help=size)


def add_verify(parser: argparse.ArgumentParser) -> None:
    """The options of `sd3min verify`."""
    parser.set_defaults(run=run_verify)
    add = parser.add_argument
    add("path", type=Path, nargs="*", help="official files or folders (default: sd3-tiny)")
    encoders = "files of encoders that the first lacks"
    add("--text-encoders", type=Path, nargs="+", metavar="FILE", help=encoders)
    tokenizers = "holds tokenizer, tokenizer_2, tokenizer_3 (default: beside the file)"
    add("--tokenizers", type=Path, metavar="FOLDER", help=tokenizers)
    add("--report", type=Path, metavar="HTML", help="page to write, with both pictures")


def add_explain(parser: argparse.ArgumentParser) -> None:
    """The options of `sd3min explain`."""
    parser.set_defaults(run=run_explain)
    names = f"one of {', '.join(CONVENTIONS)}"
    parser.add_argument("a", metavar="A", help=names)
    parser.add_argument("b", metavar="B", help=names)
    weights = "official file to measure with (default: sd3-tiny)"
    parser.add_argument("--weights", type=Path, metavar="FILE", help=weights)
    size = "of the pictures, in pixels (default: the weights' own)"
    parser.add_argument("--size", type=options.size, metavar="WxH", help=size)


def sizes(part: Part) -> str:
    """A part's sizes in words."""
    config = part.config
    if part.name == "mmdit":
        name = released_name(config) or "of no released size"
        return f"{name}, depth {config.depth}, positions {config.grid}x{config.grid}"
    if part.name == "autoencoder":
        return f"widths {', '.join(map(str, config.widths))}"
    return f"{config.layers} layers, width {config.width}, vocabulary {config.vocabulary}"


def types(part: Part) -> str:
    """How many tensors of a part are stored in which type."""
    kinds = Counter(t.dtype + (" with a scale" * bool(t.scale)) for t in part.tensors.values())
    return ", ".join(f"{count} tensors in {kind}" for kind, count in kinds.items())


@contextlib.contextmanager
def outlined(
    paths: Sequence[Path], parts: list[str]
) -> Iterator[tuple[checkpoint.Checkpoint, str]]:
    """Opened headers of what holds the parts; of names on the hub nothing else is downloaded.

    Also the beginning of paths that no sentence shall show, of the folder with those headers.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            found = [hub.outline(path, parts, Path(folder)) for path in paths]
            every = [path for paths in found for path in paths]
            yield checkpoint.Checkpoint.open(every, wanted=parts), folder + os.sep
        except Refusal as refusal:
            raise Refusal(str(refusal).replace(folder + os.sep, "")) from None


def run_inspect(arguments: argparse.Namespace) -> None:
    """Print a line for each part, where it is, and what is missing for a picture; or of LoRAs."""
    if arguments.path and all(map(lora.is_lora, arguments.path)):
        print("\n".join(map(lora.summary, arguments.path)))
        return
    with outlined(arguments.path, list(TITLES)) as (opened, folder):
        opened.require(list(opened.parts))
        print(described_parts(opened).replace(folder, ""))


def described_parts(opened: checkpoint.Checkpoint) -> str:
    """What an opened checkpoint holds, in lines."""
    lines = [str(opened.path)]
    for part in opened.parts.values():
        counted = f"{TITLES[part.name]:12} {part.parameters:>13,} parameters"
        lines.append(f"  {counted}, {types(part)}: {sizes(part)}")
        if part.paths != [opened.path]:
            lines += [f"  {'':12} in {os.path.relpath(p, opened.path)}" for p in part.paths]
        if part.extras:
            lines.append(f"  {'':12} passed over: {', '.join(sorted(part.extras))}")
    missing = [title for name, title in TITLES.items() if name not in opened.parts]
    return "\n".join([*lines, f"  missing: {', '.join(missing) or 'nothing'}"])


def run_plan(arguments: argparse.Namespace) -> None:
    """Print the plan that was asked for, or every plan; only headers are read."""
    t5 = arguments.t5 or not arguments.no_t5
    names = checkpoint.part_names(bool(t5))
    with outlined(arguments.path, names) as (opened, _):
        plans = (arguments.memory,) if arguments.memory else MEMORY
        for memory in plans:
            if arguments.memory is None and memory == "stream":  # which has no parts of 8 bits
                loading.check(opened, bool(t5), memory)
            else:
                loading.check(opened, t5, memory, arguments.mmdit)
        placed = opened.placement(arguments.device, arguments.dtype)
        width, height = arguments.size or (None, None)
        config, count = opened.parts["mmdit"].config, arguments.num_images
        call = {"width": width, "height": height, "num_images": count}
        *_, settings = check_call(config, opened.defaults, "", **call)
        tables = [
            f"{memory}\n{plan(opened, settings, *placed, t5, memory, count, arguments.mmdit)}"
            for memory in plans
        ]
        print("\n\n".join(tables))


def run_convert(arguments: argparse.Namespace) -> None:
    """Write the other layout and say where."""
    print(
        convert(
            arguments.source,
            arguments.target,
            arguments.text_encoders,
            arguments.tokenizers,
            arguments.shard_size,
            progress=sys.stderr.isatty(),
        )
    )


def run_verify(arguments: argparse.Namespace) -> int:
    """Print the table line by line; 1 where a line failed."""
    if arguments.report:
        report.check_target(arguments.report)
    given = arguments.path or None, arguments.text_encoders, arguments.tokenizers
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


def run_explain(arguments: argparse.Namespace) -> None:
    """Print each choice that two conventions differ in, what it changes alone, and why."""
    a, b = (find_conventions(name).name for name in (arguments.a, arguments.b))
    opened = checkpoint.Checkpoint.open(arguments.weights)
    opened.require(["mmdit"])
    width, height = arguments.size or (None, None)
    check_call(opened.parts["mmdit"].config, opened.defaults, "", width=width, height=height)
    pipe = pipeline.assemble(opened)
    rows = explain(a, b, pipe, arguments.size, progress=sys.stderr.isatty())
    counted = f"{len(rows)} choices" if len(rows) != 1 else "1 choice"
    print(f"{a} and {b} differ in {counted}.")
    if rows:
        print(f"What each alone changes, of 255 levels, in {PICTURES} pictures as {a} makes them:")
    for row in rows:
        print("\n" + described(row, a, b))


def described(row: Difference, a: str, b: str) -> str:
    """A difference in a few lines."""
    changed = f"{row.share:.2%} of the values change, by {row.mean:.3f} on average"
    lines = [
        f"{row.choice}: {row.a} in {a}, {row.b} in {b}",
        f"  {row.situation}: {changed} and {row.largest} at most",
        textwrap.fill(row.reason, 96, initial_indent="  ", subsequent_indent="  "),
    ]
    return "\n".join(lines)


def say(message: object, *_: object) -> None:
    """Print a refusal or a warning as one line."""
    print("sd3min:", *str(message).split(), file=sys.stderr)


def run(arguments: Sequence[str] | None) -> int:
    """Run a command; returns the exit code, 2 where the call was refused."""
    parsed = make_parser().parse_args(arguments)
    if "run" not in parsed:
        raise Refusal("no command was given: see sd3min --help")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # of a file name that it cannot show
    try:
        code = parsed.run(parsed) or 0
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate" not in str(error):
            raise
        raise Refusal(f"the memory does not suffice: {parsed.smaller}") from error
    sys.stdout.flush()
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code, 2 where the call was refused."""
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

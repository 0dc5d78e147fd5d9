"""Count what a reader reads to follow one picture: python tools/reading_cost.py.

A small random model is built and makes one picture, with guidance and stubbed tokenizers. Every
function of the package that ran is read whole, and so is the header of its class: its bases and its
fields. What counts is a statement as Python parses it, docstrings excluded. Loading, training and
the constants of modules do not count.
"""

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple
from unittest import mock

import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase

import sd3min
from sd3min import text_encoders
from sd3min.autoencoder import Autoencoder
from sd3min.config import AutoencoderConfig, CLIPConfig, Defaults, MMDiTConfig, T5Config
from sd3min.mmdit import MMDiT
from sd3min.pipeline import Pipeline
from sd3min.text_encoders import TextEncoders

PACKAGE = Path(sd3min.__file__).parent
OTHERS = {  # statements, and own frames from the entry to softmax
    "sd3-ref": (940, 11),
    "sd3-ref without its own encoders": (617, 11),
    "flux, encoders from transformers": (637, 5),
    "diffusers with transformers": (3681, None),
}
LENGTH = 8  # tokens of a prompt


class Cost(NamedTuple):
    """Statements to read, by module, and the own functions between the entry and softmax."""

    statements: dict[str, int]
    frames: list[str]


class StubTokenizer(PreTrainedTokenizerBase):
    """A tokenizer without a vocabulary: every prompt has the same ids."""

    pad_token_id = 0

    def __init__(self) -> None:
        """Nothing to read."""

    def __call__(self, *arguments: Any, **_: Any) -> BatchEncoding:
        """As many ids as an encoder reads."""
        (prompts,) = arguments
        ids = [list(range(LENGTH)) for _ in prompts]
        offsets = [[(0, 0)] * LENGTH for _ in prompts]
        return BatchEncoding({"input_ids": ids, "offset_mapping": offsets})


def make_picture() -> None:
    """Build a small random model and let it make a picture of 16 x 16 pixels."""
    clip = CLIPConfig(layers=2, width=64, mlp_width=64, vocabulary=LENGTH, length=LENGTH)
    t5 = T5Config(layers=1, width=128, mlp_width=64, heads=1, vocabulary=LENGTH)
    encoders = TextEncoders(
        text_encoders.clip(clip, "clip_l"),
        text_encoders.clip(clip, "clip_g"),
        text_encoders.t5(t5),
        [StubTokenizer() for _ in range(3)],
        context_width=128,
        t5_length=LENGTH,
    )
    pipe = Pipeline(
        MMDiT(MMDiTConfig(depth=2, context_width=128, pooled_width=128, grid=4)),
        Autoencoder(AutoencoderConfig(widths=(32, 32, 32, 32), blocks=1)),
        encoders,
        Defaults(width=16, height=16, steps=2, t5_length=LENGTH),
    )
    pipe("a red circle", negative_prompt="blue", seed=0, progress=False)


def is_own(code: CodeType) -> bool:
    """Whether a function is the package's, its training excluded."""
    path = Path(code.co_filename)
    return path.is_relative_to(PACKAGE) and not path.is_relative_to(PACKAGE / "training")


@contextmanager
def noting_calls(codes: set[CodeType], made: set[tuple[str, str]]) -> Iterator[None]:
    """Collect the own functions that run and the own classes whose generated methods run."""

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and is_own(frame.f_code):
            codes.add(frame.f_code)
        elif event == "call" and frame.f_code.co_filename == "<string>" and frame.f_locals:
            first = next(iter(frame.f_locals.values()))
            owner = first if isinstance(first, type) else type(first)
            made.add((owner.__module__, owner.__qualname__))

    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(None)


@contextmanager
def noting_softmax(stacks: list[list[str]]) -> Iterator[None]:
    """Collect the own functions on the stack at every attention that the MMDiT computes."""
    attention = torch.nn.functional.scaled_dot_product_attention

    def noted(*arguments: Any, **options: Any) -> torch.Tensor:
        frame: FrameType | None = sys._getframe(1)
        stack: list[str] = []
        if frame.f_globals["__name__"] == MMDiT.__module__:
            while frame is not None:
                stack += [frame.f_code.co_qualname] if is_own(frame.f_code) else []
                frame = frame.f_back
            stacks.append(stack[::-1])
        return attention(*arguments, **options)

    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", noted):
        yield


def is_docstring(node: ast.stmt) -> bool:
    """Whether a statement is a text that does nothing."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def read_statements(
    path: Path, ran: set[tuple[str, int]], made: set[str]
) -> Iterator[tuple[int, int]]:
    """Line and column of every statement of a module that is read, some more than once."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(path.read_text())):
        read: list[ast.AST] = []
        if isinstance(node, functions) and (node.name, first_line(node)) in ran:
            read = list(ast.walk(node))
        elif isinstance(node, ast.ClassDef):
            methods = [part for part in node.body if isinstance(part, functions)]
            if node.name in made or any((m.name, first_line(m)) in ran for m in methods):
                read = [node, *(part for part in node.body if not isinstance(part, functions))]
        for part in read:
            if isinstance(part, ast.stmt) and not is_docstring(part):
                yield part.lineno, part.col_offset


def first_line(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The line that a function's code begins with: its first decorator's, where it has one."""
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def measure() -> Cost:
    """Make a picture, and count what it took."""
    codes: set[CodeType] = set()
    made: set[tuple[str, str]] = set()
    stacks: list[list[str]] = []
    with noting_calls(codes, made), noting_softmax(stacks):
        make_picture()

    statements: Counter[str] = Counter()
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        ran = {(c.co_name, c.co_firstlineno) for c in codes if c.co_filename == str(path)}
        names = {name for owner, name in made if owner == f"sd3min.{module}"}
        statements[module] = len(set(read_statements(path, ran, names)))
    return Cost(dict(+statements), max(stacks, key=len))


def main() -> None:
    """Print the counts beside those of other implementations."""
    cost = measure()
    for module, count in sorted(cost.statements.items(), key=lambda item: -item[1]):
        print(f"{module:36}{count:>12,}")
    print(f"\n{'':36}{'statements':>12}{'frames to softmax':>20}")
    ours = {"sd3min": (sum(cost.statements.values()), len(cost.frames))}
    for name, (count, frames) in (ours | OTHERS).items():
        print(f"{name:36}{count:>12,}{frames or '-':>20}")
    print(f"\nframes: {' > '.join(cost.frames)}")


if __name__ == "__main__":
    main()

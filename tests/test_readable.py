"""The promise to the reader: how much there is to read, in what order, and in what state."""

import ast
import importlib
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sd3min

ROOT = Path(__file__).parents[1]
PACKAGE = Path(sd3min.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MOST_STATEMENTS = 600  # from the prompt to the picture
MOST_FRAMES = 6  # own functions from the entry to softmax
MOST_LINES = 350  # of a module
MOST_FUNCTION_LINES = 40  # from `def` to the end, its docstring excluded
LAYERS = (  # a module imports only from those above it
    "config",
    "conventions",
    "flow",
    "densities",
    "settings",
    "record",
    "files",
    "mmdit",
    "autoencoder",
    "text_encoders",
    "formats",
    "stored",
    "writer",
    "parts",
    "sources",
    "folder",
    "hub",
    "checkpoint",
    "lora",
    "convert",
    "pipeline",
    "differences",
    "fast",
    "loading",
    "options",
    "training",
    "probes",
    "gallery",
    "generate",
    "explorer",
    "cli",
)
PLACES = {  # where the paper says what a function computes
    "flow.euler": "§2, Eq. 1",
    "flow.interpolate": "§3",
    "flow.velocity_target": "§2, Eq. 8",
    "flow.shift_times": "§5.3.2, Eq. 23",
    "densities.LogitNormal": "§3.1, Eq. 19",
    "densities.mode_map": "§3.1, Eq. 20",
    "densities.CosMap": "§3.1, Eq. 21",
    "densities.Shifted": "§5.3.2, Eq. 23",
    "training.objective.flow_matching_loss": "§2, Eq. 8",
    "mmdit.position_table": "§5.3.2",
    "mmdit.Heads": "§5.3.2, Fig. 5",
    "mmdit.JointBlock": "§4, Fig. 2b",
    "mmdit.FinalLayer": "Fig. 2a",
    "text_encoders": "§4, App. B.2",
    "autoencoder": "§5.2.1, Table 3",
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def code_lines(function: ast.FunctionDef) -> int:
    first = function.body[0]
    docstring = first.end_lineno - first.lineno + 1 if ast.get_docstring(function) else 0
    return function.end_lineno - function.lineno + 1 - docstring


def own_imports(tree: ast.Module) -> Iterator[str]:
    """Names below `sd3min` that a module imports, or reads from the package itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name[7:] for name in node.names if name.name.startswith("sd3min."))
        elif isinstance(node, ast.ImportFrom) and node.module == "sd3min":
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sd3min."):
            yield node.module[7:]
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield "." * node.level
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield from [node.attr] if node.value.id == "sd3min" else []


def out_of_order(name: str, tree: ast.Module) -> list[str]:
    """Imports that the layers do not allow; the modules of one folder may import each other."""
    layer, inside, _ = name.partition(".")
    allowed = {"__version__", *LAYERS[: LAYERS.index(layer)], *([layer] if inside else [])}
    return [
        f"{name} imports {own}" for own in own_imports(tree) if own.split(".")[0] not in allowed
    ]


def run_tool(*command: str) -> None:
    """Run a program that is installed beside Python, and fail with what it prints."""
    program = shutil.which(command[0], path=Path(sys.executable).parent)
    if program is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run([program, *command[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_picture_is_followed_through_few_statements_and_frames():
    cost = runpy.run_path(str(ROOT / "tools" / "reading_cost.py"))["measure"]()
    assert 0 < sum(cost.statements.values()) < MOST_STATEMENTS
    assert cost.frames[0] == "Pipeline.__call__"
    assert len(cost.frames) <= MOST_FRAMES


def test_every_module_is_short():
    lengths = {module_name(path): len(path.read_text().splitlines()) for path in FILES}
    assert not {name: lines for name, lines in lengths.items() if lines > MOST_LINES}


def test_every_function_is_short():
    lengths = {
        f"{module_name(path)}.{node.name}": code_lines(node)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert not {name: lines for name, lines in lengths.items() if lines > MOST_FUNCTION_LINES}


def test_modules_import_only_what_a_reader_has_read_before():
    modules = {module_name(path): ast.parse(path.read_text()) for path in FILES}
    exempt = ("__init__", "__main__", "training.__main__")
    assert not [
        wrong
        for name, tree in modules.items()
        if name not in exempt
        for wrong in out_of_order(name, tree)
    ]


@pytest.mark.parametrize(("name", "place"), PLACES.items())
def test_code_says_where_the_paper_has_it(name, place):
    module, _, item = name.rpartition(".")
    try:
        documented = importlib.import_module(f"sd3min.{name}")
    except ModuleNotFoundError:
        documented = getattr(importlib.import_module(f"sd3min.{module}"), item)
    assert place in " ".join(documented.__doc__.split())


def test_ruff_finds_nothing():
    run_tool("ruff", "check")


def test_ruff_would_format_nothing():
    run_tool("ruff", "format", "--check")


def test_the_type_checker_finds_nothing():
    run_tool("basedpyright")

"""The notebooks run from top to bottom, and stay as small as they promise."""

import ast
import re
import runpy
from pathlib import Path

import pytest

pytest.importorskip("ipykernel")
jupytext = pytest.importorskip("jupytext")
pytest.importorskip("nbclient")

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "notebooks").glob("*.py"))
TOOL = runpy.run_path(str(ROOT / "tools" / "notebooks.py"))
MOST_CELLS = 30
MOST_BYTES = 400_000  # with outputs
LONG = {"07_guidance_and_samplers", "10_fine_tune"}  # half of the seconds of all

each_notebook = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
each_to_run = pytest.mark.parametrize(
    "source",
    [
        pytest.param(source, id=source.stem, marks=[pytest.mark.slow] * (source.stem in LONG))
        for source in SOURCES
    ],
)


def code_of(cells):
    return [cell for cell in cells if cell.cell_type == "code"]


def imported(tree: ast.Module) -> set[str]:
    """Top-level packages that a program imports."""
    names = [
        name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names
    ]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


def is_check(statement: ast.stmt) -> bool:
    """Whether a statement is an assert or a call of an `assert_…` function, or ends in one."""
    if isinstance(statement, ast.With | ast.For | ast.If):
        return is_check(statement.body[-1])
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        return ast.unparse(statement.value.func).rpartition(".")[2].startswith("assert_")
    return isinstance(statement, ast.Assert)


def drawn(notebook) -> int:
    """Pictures among a notebook's outputs."""
    outputs = [output for cell in code_of(notebook.cells) for output in cell.outputs]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_the_eleven_notebooks_are_numbered_in_a_row():
    assert [source.stem[:3] for source in SOURCES] == [f"{i:02}_" for i in range(1, 12)]
    titles = [jupytext.read(source).cells[0].source.splitlines()[0] for source in SOURCES]
    assert [title.split()[1] for title in titles] == [f"{i}." for i in range(1, 12)]
    assert {source.stem for source in SOURCES} >= LONG


@each_notebook
def test_a_notebook_is_small_imports_the_package_and_ends_in_an_assertion(source):
    cells = jupytext.read(source).cells
    tree = ast.parse("\n".join(cell.source for cell in code_of(cells)))
    assert len(cells) < MOST_CELLS
    assert not [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    assert "sd3min" in imported(tree)
    assert is_check(tree.body[-1])


@each_notebook
def test_every_exercise_has_an_answer_that_is_hidden_and_checked(source):
    """The code after an exercise, with helpers that it needs."""
    cells = jupytext.read(source).cells
    exercises = [i for i, cell in enumerate(cells) if "## Exercise" in cell.source]
    assert 2 <= len(exercises) <= 3
    for number, i in enumerate(exercises, 1):
        assert f"## Exercise {number}" in cells[i].source
        answer = cells[i + 1]
        assert answer.cell_type == "code" and answer.source.startswith("# answer")
        assert answer.metadata["jupyter"]["source_hidden"]
        assert any(is_check(node) for node in ast.parse(answer.source).body)


@each_notebook
def test_a_notebook_is_committed_with_the_outputs_of_its_source(source):
    path = source.with_suffix(".ipynb")
    executed = TOOL["nbformat"].read(path, 4)
    of_source = [(cell.cell_type, cell.source) for cell in jupytext.read(source).cells]
    assert [(cell.cell_type, cell.source) for cell in executed.cells] == of_source
    assert all(cell.execution_count for cell in code_of(executed.cells))
    assert drawn(executed) and path.stat().st_size < MOST_BYTES


@each_to_run
def test_a_notebook_runs_and_draws(source):
    notebook = TOOL["lighten"](TOOL["execute"](source))
    assert drawn(notebook)
    assert len(TOOL["nbformat"].writes(notebook)) < MOST_BYTES


@pytest.mark.slow
def test_the_last_notebook_is_complete_where_there_are_weights(monkeypatch):
    """sd3-tiny standing for the official ones."""
    weights = ROOT / "weights" / "sd3-tiny"
    monkeypatch.setenv("SD3MIN_WEIGHTS", str(next(weights.glob("*.safetensors"))))
    notebook = TOOL["execute"](SOURCES[-1])
    said = " ".join(str(output) for cell in code_of(notebook.cells) for output in cell.outputs)
    assert "Skipped" not in said and len(re.findall("passed", said)) > 5
    assert drawn(notebook) == 2


def test_without_weights_the_last_notebook_says_so_once(monkeypatch):
    monkeypatch.delenv("SD3MIN_WEIGHTS", raising=False)
    cells = code_of(jupytext.read(SOURCES[-1]).cells)
    assert sum('print("The official weights are not here' in cell.source for cell in cells) == 1

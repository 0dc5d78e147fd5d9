"""The notebooks run from top to bottom, and stay as small as they promise."""

import ast
from pathlib import Path

import pytest

pytest.importorskip("ipykernel")
jupytext = pytest.importorskip("jupytext")
nbclient = pytest.importorskip("nbclient")

SOURCES = sorted((Path(__file__).parents[1] / "notebooks").glob("*.py"))
MOST_CELLS = 20
SECONDS = 300  # for one cell

each_notebook = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)


def imported(tree: ast.Module) -> set[str]:
    """Top-level packages that a program imports."""
    names = [
        name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names
    ]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


def is_assertion(statement: ast.stmt) -> bool:
    """Whether a statement is an assert or a call of an `assert_…` function."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        return ast.unparse(statement.value.func).rpartition(".")[2].startswith("assert_")
    return isinstance(statement, ast.Assert)


def test_there_are_notebooks():
    assert SOURCES


@each_notebook
def test_a_notebook_is_small_imports_the_package_and_ends_in_an_assertion(source):
    cells = jupytext.read(source).cells
    tree = ast.parse("\n".join(cell.source for cell in cells if cell.cell_type == "code"))
    assert len(cells) < MOST_CELLS
    assert not [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    assert "sd3min" in imported(tree)
    assert is_assertion(tree.body[-1])


@each_notebook
def test_a_notebook_runs_and_draws(source, tmp_path):
    jupytext.write(jupytext.read(source), tmp_path / f"{source.stem}.ipynb")
    notebook = jupytext.read(tmp_path / f"{source.stem}.ipynb")
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=SECONDS, resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)

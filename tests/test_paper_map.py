"""The paper's items and the docstrings that cite them fit each other."""

import ast
import re
import runpy
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def paper_map():
    """The functions of `tools/paper_map.py`."""
    return runpy.run_path(str(ROOT / "tools" / "paper_map.py"))


@pytest.fixture(scope="module")
def items(paper_map):
    return paper_map["read_items"]()


@pytest.fixture(scope="module")
def places(paper_map):
    return paper_map["places"]()


def test_every_citation_names_something_that_the_paper_has(items, places):
    assert not {(p.name, ref) for p in places for ref in p.refs if ref not in items}


def test_what_is_called_implemented_is_cited(items, places):
    cited = {ref for place in places for ref in place.refs}
    assert not [ref for ref, item in items.items() if not item.why and ref not in cited]


def test_what_is_said_to_be_absent_is_cited_nowhere(items, places):
    assert not {(p.name, ref) for p in places for ref in p.refs if ref in items and items[ref].why}


def test_equations_figures_and_tables_are_listed_without_a_gap_in_the_papers_order(items):
    for kind, count in {"Eq.": 25, "Tab.": 7, "Alg.": 2}.items():
        wanted = [f"{kind} {number}" for number in range(1, count + 1)]
        assert [ref for ref in items if ref.startswith(kind)] == wanted
    figures = [ref for ref in items if re.fullmatch(r"Fig\. \d+", ref)]
    assert figures == [f"Fig. {number}" for number in range(1, 18)]


def test_citations_are_read_in_every_form(paper_map):
    docstring = """One (§3.1, Eqs. 19 to 21; Table 3), two (Figs. 2a and 2b; App.
    B.2), one again (§3.1), another paper (Liu et al. 2024, Eq. 99), its section (§88 there)."""
    assert paper_map["cited"](docstring) == (
        *("§3.1", "Eq. 19", "Eq. 20", "Eq. 21", "Tab. 3"),
        *("Fig. 2a", "Fig. 2b", "App. B.2"),
    )


def test_differences_are_whole_sentences(paper_map, places):
    text = "First. Differs from the paper: it does so (App. B.3), see Eq. 8. Last."
    assert paper_map["DIFFERS"].findall(text) == [
        "Differs from the paper: it does so (App. B.3), see Eq. 8."
    ]
    sentences = [words for place in places for words in place.differs]
    written = sum(
        (ast.get_docstring(node) or "").count("Differs")
        for folder in ("sd3min", "tools")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "paper_map.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    )
    assert len(sentences) == written > 0


def test_a_line_is_that_of_the_definition(places):
    for place in places:
        line = (ROOT / place.file).read_text().splitlines()[place.line - 1]
        name = place.name.rpartition(".")[2]
        whole = place.file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        assert place.name == whole or re.match(rf"\s*(?:def|class) {name}\b", line), place


def test_the_page_has_every_item_and_every_place(paper_map, items, places):
    page = paper_map["render"](lambda file, line: f"{file}:{line}")
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    for ref in items:
        assert sum(row.startswith(f"| {ref} |") for row in rows) == 1, ref
    for place in places:
        assert f"[`{place.short}`]({place.file}:{place.line})" in page
        for ref in place.refs:
            (row,) = (row for row in rows if row.startswith(f"| {ref} |"))
            assert f"`{place.short}`" in row, textwrap.shorten(row, 200)

"""What the README says is what was measured."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def figures():
    """The functions of `tools/figures.py`."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        return runpy.run_path(str(ROOT / "tools" / "figures.py"))
    finally:
        sys.path.pop(0)


def block(name):
    return re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", README, re.DOTALL)[1]


def test_accuracy_tables_are_the_measured_figures(figures):
    measured = json.loads((ROOT / "weights" / "sd3-tiny" / "accuracy.json").read_text())
    assert block("accuracy") == figures["accuracy_table"](measured)
    assert block("ablation") == figures["ablation_table"](measured)


def test_reading_cost_is_what_is_counted_now(figures):
    assert block("cost") == figures["cost_table"]()


def test_parity_table_keeps_within_the_ladder():
    rows = [line.split(" | ") for line in block("parity").splitlines()[2:]]
    assert len(rows) >= 10
    for title, precision, error in rows:
        if "values differ" in error:
            assert error.startswith("0 of "), title
        elif "schedules" in title:
            assert precision == "float32" and float(error.strip(" |")) < 2e-7
        else:
            rounded = "SD3.5" in title and "both sides" not in title
            assert float(error.strip(" |")) < (1e-6 if rounded else 1e-10), title


def test_every_file_that_is_named_exists():
    named = re.findall(r"`((?:sd3min|tools|notebooks|weights)/[\w./-]+)`", README)
    named += re.findall(r"\]\((?!https?:)([\w./-]+)\)", README)
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_command_that_is_named_exists():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"`?make (\w+)", README):
        if target not in ("are",):
            assert target in targets

"""What the README says is what was measured."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from sd3min import conventions

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


def test_speeds_are_the_measured_figures(figures):
    assert block("speed") == figures["speed_table"](*figures["SPEEDS"])
    assert block("peers") == figures["speed_table"](*figures["PEERS"])
    here = json.loads((ROOT / "tools" / "bench.json").read_text())
    assert here["depth"] == 24 and here["processor"] in block("speed")


def test_a_step_spends_its_time_as_was_measured(figures):
    measured = json.loads((ROOT / "tools" / "profile.json").read_text())
    assert block("profile") == figures["profile_step"].table(measured)


def test_eight_bits_err_as_was_measured(figures):
    measured = json.loads((ROOT / "tools" / "int8_errors.json").read_text())
    assert block("int8") == figures["int8_errors"].table(measured)


def test_the_cost_of_streaming_is_what_was_measured():
    work = json.loads((ROOT / "tools" / "bench_stream.json").read_text())["work"]
    small, large = (
        f"{work[step]['stream']['seconds'] / work[step]['fast']['seconds']:.2f} times"
        for step in ("step 512", "step 1024")
    )
    assert f"a step takes {small} as long, {large} at 1024x1024" in README


def test_t5_in_eight_bits_is_what_was_measured(figures):
    measured = json.loads((ROOT / "tools" / "bench_t5.json").read_text())
    assert block("t5") == figures["bench_t5"].table(measured)


def test_start_up_is_what_was_measured():
    sides = json.loads((ROOT / "tools" / "startup.json").read_text())["sides"]
    seconds = {name: side["seconds"] for name, side in sides.items()}
    assert "adds less than 0.3 s to `import torch`" in README
    assert seconds["import sd3min"] - seconds["import torch"] < 0.3
    quick, plain = (seconds[side] / seconds["diffusers"] for side in ("sd3min, fast", "sd3min"))
    assert quick < 0.5
    assert f"takes {quick:.2f} of diffusers' time under" in README
    assert f"and {plain:.2f} of it with plain modules" in README


def test_the_densities_are_what_was_measured(figures):
    measured = json.loads((ROOT / "weights" / "figures" / "densities.json").read_text())
    assert block("densities") == figures["densities"].table(measured)


def test_dreambooth_is_what_was_measured(figures):
    measured = json.loads((ROOT / "weights" / "figures" / "dreambooth.json").read_text())
    assert block("dreambooth") == figures["dreambooth"].table(measured)
    spent = f"{measured['minutes']} minutes on {measured['threads']} cores"
    assert f"{spent} and in {measured['bytes'] / 1e6:.2f} MB" in README


def test_reading_cost_is_what_is_counted_now(figures):
    assert block("cost") == figures["cost_table"]()


def test_parity_table_keeps_within_the_ladder():
    rows = [line.strip("| ").split(" | ") for line in block("parity").splitlines()[2:]]
    assert {row[0] for row in rows} == set("12345")
    for rung, title, _, found, allowed in rows:
        if rung in "12":
            assert float(found) <= float(allowed), title
        elif rung == "3":
            different, values = re.match(r"([\d,]+) of ([\d,]+) values", found).groups()
            share = int(different.replace(",", "")) / int(values.replace(",", ""))
            assert share <= (0 if allowed == "none" else 0.005), title
        elif rung == "4":
            assert float(found.split(" x ")[0]) <= float(allowed.split(" x")[0]), title
        else:
            passed, count = re.match(r"(\d+) of (\d+) passed", found).groups()
            assert passed == count, title


def test_explained_choices_are_those_that_differ(figures):
    a, b = (conventions.find_conventions(name) for name in figures["EXPLAINED"])
    rows = [line.strip("| ").split(" | ") for line in block("explain").splitlines()[2:]]
    found = {row[0]: (row[1], row[2]) for row in rows}
    assert found == {
        name: (str(getattr(a, name)), str(getattr(b, name)))
        for name in conventions.reasons()
        if getattr(a, name) != getattr(b, name)
    }


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

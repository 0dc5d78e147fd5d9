"""Damaged files are refused in a sentence, whatever the damage; the tool tries ten thousand."""

import runpy
from pathlib import Path

FUZZ = runpy.run_path(str(Path(__file__).parents[1] / "tools" / "fuzz_headers.py"))


def test_two_hundred_damaged_files_are_loaded_or_refused_in_a_sentence():
    found = FUZZ["fuzz"](200)
    assert found.total() == 200
    assert found["refused"] > 100 and found["loaded"] > 0

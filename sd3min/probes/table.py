"""The table of checks as text."""

from collections.abc import Sequence

from sd3min.probes.checks import Check

HEAD = ("part", "check", "tensors", "parameters", "float32", "float64", "verdict")
WIDTHS = (11, 9, 7, 13, 7, 7, 0)


def cells(check: Check) -> tuple[str, ...]:
    """A line's cells as text."""
    counts = ("" if count is None else f"{count:,}" for count in (check.tensors, check.parameters))
    errors = (
        "" if error is None else f"{error:.0e}" if error else "0"
        for error in (check.single, check.double)
    )
    return check.part, check.what, *counts, *errors, check.verdict


def line(texts: Sequence[str]) -> str:
    """Cells in columns."""
    columns = enumerate(zip(texts, WIDTHS, strict=True))
    return "  ".join(f"{t:>{w}}" if 2 <= i <= 5 else f"{t:<{w}}" for i, (t, w) in columns)

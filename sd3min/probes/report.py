"""The page that `sd3min verify --report` writes: the table, both pictures and their difference.

On a narrow screen a line of the table is a paragraph, with the names of its numbers.
"""

import base64
import html
import io
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sd3min.config import Refusal
from sd3min.files import whole
from sd3min.probes.checks import Check
from sd3min.probes.table import HEAD, cells

STYLE = """
:root { color-scheme: light dark; --ink: #1c1b22; --soft: #66636f; --line: #e5e2eb; --page: #f7f6f9;
  --card: #fff; --good: #17784a; --bad: #bb3127; }
@media (prefers-color-scheme: dark) { :root { --ink: #eceaf2; --soft: #a5a1b1; --line: #35323e;
  --page: #141318; --card: #1d1b22; --good: #64d19a; --bad: #ff8f83; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 3.5rem 1.5rem 4rem; background: var(--page);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; }
header { border-left: 4px solid var(--good); padding-left: 1.1rem; }
header.failed { border-color: var(--bad); }
h1 { margin: 0; font-size: 2rem; line-height: 1.2; letter-spacing: -0.02em; }
h2 { margin: 2.75rem 0 0; font-size: 1.1rem; }
p { margin: 0.25rem 0 0; color: var(--soft); font-size: 0.92rem; overflow-wrap: anywhere; }
header p:first-of-type { color: var(--ink); font-size: 1rem; }
table { width: 100%; margin-top: 0.9rem; border-spacing: 0; background: var(--card);
  border: 1px solid var(--line); border-radius: 10px; font-size: 0.92rem; overflow: hidden; }
th, td { padding: 0.5rem 1rem; text-align: left; vertical-align: baseline; }
th { color: var(--soft); font-weight: 500; font-size: 0.8rem; }
td { border-top: 1px solid var(--line); }
.number { text-align: right; white-space: nowrap; }
.part { font-weight: 600; white-space: nowrap; }
.verdict { width: 99%; overflow-wrap: anywhere; }
.verdict span { margin-left: 0.3em; color: var(--soft); }
.verdict b::before { content: "\\2713\\a0"; }
.verdict b { color: var(--good); font-weight: 500; }
.FAILED b { color: var(--bad); font-weight: 700; } .FAILED b::before { content: "\\2717\\a0"; }
.not b { color: var(--soft); } .not b::before { content: "\\2013\\a0"; }
tr.FAILED { background: color-mix(in srgb, var(--bad) 9%, transparent); }
.pictures { display: grid; grid-template-columns: repeat(3, 1fr); gap: 1.25rem;
  margin-top: 0.9rem; }
figure { margin: 0; }
img { display: block; width: 100%; border-radius: 10px; image-rendering: pixelated;
  border: 1px solid var(--line); }
figcaption { margin-top: 0.5rem; color: var(--soft); font-size: 0.88rem; }
@media (max-width: 46rem) {
  body { padding: 2rem 1rem 3rem; }
  h1 { font-size: 1.6rem; }
  thead { display: none; }
  table, tbody { display: block; }
  tr { display: flex; flex-wrap: wrap; gap: 0 0.9rem; padding: 0.6rem 0.9rem; }
  tr + tr { border-top: 1px solid var(--line); }
  td { display: block; padding: 0; border: 0; }
  td:empty { display: none; }
  .verdict { width: 100%; order: 1; }
  .number { order: 2; color: var(--soft); font-size: 0.85rem; }
  .number::before { content: attr(data-label) " "; }
  .pictures { grid-template-columns: 1fr 1fr; gap: 0.9rem; }
  figure:last-child { grid-column: 1 / -1; }
}
"""
GROUPS = {  # of checks, by whether diffusers took part: a heading, and what the numbers are
    False: ("The files alone", "Names, shapes and values, and what they say without diffusers."),
    True: (
        "The same tensors in diffusers",
        "float32, float64: the largest difference of both programs, relative to the largest value.",
    ),
}


def check_target(path: Path) -> None:
    """Refuse a page that could not be written."""
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        reason = error.strerror or error
        raise Refusal(f"--report {path} cannot be written ({reason}): pass another") from None
    if path.is_dir() or path.suffix.lower() != ".html":
        raise Refusal(f"--report {path} is not the name of a page: end it with .html")


def difference(ours: Image.Image, theirs: Image.Image) -> tuple[Image.Image, str]:
    """What two pictures differ by, amplified so that the largest difference is white."""
    levels = np.abs(np.asarray(ours, dtype=int) - np.asarray(theirs, dtype=int))
    if not levels.max():
        return Image.fromarray(levels.astype(np.uint8)), "difference: none, all values are equal"
    factor = 255 // int(levels.max())
    told = f"difference, amplified {factor} times: {(levels > 0).sum():,} of {levels.size:,} values"
    return Image.fromarray((levels * factor).astype(np.uint8)), told


def versions() -> str:
    """The programs that were compared."""
    names = ("sd3min", "torch", "transformers", "diffusers")
    installed = {name: sys.modules[name].__version__ for name in names if sys.modules.get(name)}
    return ", ".join(f"{name} {version}" for name, version in installed.items())


def figure(image: Image.Image, caption: str) -> str:
    """A picture inside the page."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    data = base64.b64encode(file.getvalue()).decode()
    text = html.escape(caption)
    return (
        f'<figure><img alt="{text}" src="data:image/png;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def row(check: Check, shown: Sequence[int]) -> str:
    """A line of a table, of the columns that it shows."""
    texts = [html.escape(text) for text in cells(check)]
    kinds = {0: "part", 1: "check"}
    made = "".join(
        f'<td class="{kinds.get(i, "number")}" data-label="{HEAD[i]}">{texts[i]}</td>'
        for i in shown
    )
    word, _, note = texts[-1].partition(": ")
    verdict = f"<b>{word}</b>" + (f" <span>{note}</span>" if note else "")
    kind = word.partition(" ")[0]
    return f'<tr class="{kind}">{made}<td class="verdict">{verdict}</td></tr>'


def section(checks: Sequence[Check], compared: bool) -> str:
    """A heading and a table; columns without a number are left out."""
    chosen = [check for check in checks if check.compared == compared]
    if not chosen:
        return ""
    filled = [any(column) for column in zip(*map(cells, chosen), strict=True)]
    shown = [i for i in range(len(HEAD) - 1) if filled[i]]
    head = "".join(f'<th class="{"number" if i > 1 else ""}">{HEAD[i]}</th>' for i in shown)
    title, told = GROUPS[compared]
    return (
        f"<h2>{title}</h2><p>{told}</p><table><thead><tr>{head}<th>{HEAD[-1]}</th></tr></thead>"
        f"<tbody>{''.join(row(check, shown) for check in chosen)}</tbody></table>"
    )


def pictures(checks: Sequence[Check]) -> str:
    """Both programs' picture, and their difference."""
    for check in checks:
        if check.pictures:
            ours, theirs = check.pictures
            shown, told = difference(ours, theirs)
            captions = ((ours, "sd3min"), (theirs, "diffusers"), (shown, told))
            figures = "".join(figure(image, caption) for image, caption in captions)
            words = "A short run of both in float32, from the same noise."
            return f'<h2>The picture</h2><p>{words}</p><div class="pictures">{figures}</div>'
    return ""


def page(title: str, subtitle: str, checks: Sequence[Check]) -> str:
    """The whole page, with nothing outside it. `title`: a path, a colon and what was found."""
    name, _, found = title.rpartition(": ")
    failed = ' class="failed"' if any(check.passed is False for check in checks) else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<header{failed}><h1>{html.escape(found[:1].upper() + found[1:])}</h1>"
        f"<p>{html.escape(name)}</p><p>{html.escape(subtitle)}</p></header><main>"
        f"{section(checks, False)}{section(checks, True)}{pictures(checks)}</main></body></html>\n"
    )


def write(path: Path, text: str) -> None:
    """Write a page whole or not at all; refused where it cannot be written."""
    try:
        with whole(path) as part:
            part.write_text(text, encoding="utf-8")
    except OSError as error:
        reason = error.strerror or error
        raise Refusal(f"--report {path} cannot be written ({reason}): pass another") from None

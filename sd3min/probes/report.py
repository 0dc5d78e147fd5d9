"""The page that `sd3min verify --report` writes: the table, both pictures and their difference."""

import base64
import html
import io
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sd3min.config import Refusal
from sd3min.probes.checks import Check
from sd3min.probes.table import HEAD, cells

STYLE = """
:root { color-scheme: light dark; --ink: #1c1b22; --soft: #6b6875; --line: #e3e0ea; --page: #fbfafc;
  --card: #fff; --good: #1a7f4b; --bad: #c0362c; }
@media (prefers-color-scheme: dark) { :root { --ink: #eceaf2; --soft: #a19dad; --line: #34313d;
  --page: #16151a; --card: #1f1d25; --good: #5fcf96; --bad: #ff8a7d; } }
body { margin: 0 auto; max-width: 66rem; padding: 3.5rem 1.5rem; background: var(--page);
  color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.9rem; letter-spacing: -0.02em; text-wrap: balance; }
p { margin: 0.4rem 0 2rem; color: var(--soft); overflow-wrap: anywhere; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: 12px; }
table { border-collapse: collapse; width: 100%; font-size: 0.92rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: 0.55rem 0.9rem; text-align: left; white-space: nowrap; }
td:last-child { white-space: normal; min-width: 17rem; }
th { color: var(--soft); font-weight: 500; font-size: 0.8rem; }
td { border-top: 1px solid var(--line); }
th:nth-child(n+3):nth-child(-n+6), td:nth-child(n+3):nth-child(-n+6) { text-align: right; }
.passed { color: var(--good); } .FAILED { color: var(--bad); font-weight: 600; }
.not { color: var(--soft); }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr));
  gap: 1.25rem; margin-top: 2.5rem; }
figure { margin: 0; } img { width: 100%; border-radius: 12px; image-rendering: pixelated;
  border: 1px solid var(--line); box-sizing: border-box; }
figcaption { margin-top: 0.5rem; color: var(--soft); font-size: 0.88rem; }
"""


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


def row(check: Check) -> str:
    """A line of the table."""
    *texts, verdict = (html.escape(text) for text in cells(check))
    word = verdict.partition(":")[0].partition(" ")[0]
    return f"<tr>{''.join(f'<td>{t}</td>' for t in texts)}<td class='{word}'>{verdict}</td></tr>"


def page(title: str, subtitle: str, checks: Sequence[Check]) -> str:
    """The whole page, with nothing outside it."""
    head = "".join(f"<th>{text}</th>" for text in HEAD)
    figures = ""
    for check in checks:
        if check.pictures:
            ours, theirs = check.pictures
            shown, told = difference(ours, theirs)
            captions = ((ours, "sd3min, float32"), (theirs, "diffusers, float32"), (shown, told))
            figures = "".join(figure(image, caption) for image, caption in captions)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<h1>{html.escape(title)}</h1><p>{html.escape(subtitle)}</p>"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(row(check) for check in checks)}</tbody></table></div>"
        f'<div class="pictures">{figures}</div></body></html>\n'
    )


def write(path: Path, text: str) -> None:
    """Write a page whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        reason = error.strerror or error
        raise Refusal(f"--report {path} cannot be written ({reason}): pass another") from None
    finally:
        part.unlink(missing_ok=True)

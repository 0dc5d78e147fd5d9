"""The page's own HTML: pictures with their captions, and what is said under them."""

import base64
import html
import io
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sd3min.explorer.heat import LEAST_SIDE, heat, over
from sd3min.explorer.studio import Drawing, Glimpse, Waiting
from sd3min.parts import TITLES
from sd3min.pipeline import Pipeline
from sd3min.probes.ablation import Ablation
from sd3min.probes.report import difference

COLUMNS = ("picture", "other settings")
COPY = """element.addEventListener("click", (event) => {
  const button = event.target.closest("button"), code = button?.parentElement.querySelector("code");
  if (!code) return;
  getSelection().selectAllChildren(code);
  if (!navigator.clipboard) return;
  navigator.clipboard.writeText(code.textContent).then(() => { button.textContent = "Copied"; });
});"""


@dataclass(frozen=True)
class Shown:
    """What a visitor's page shows: a drawing, and perhaps one with other settings."""

    first: Drawing
    second: Drawing | None = None

    @property
    def drawings(self) -> list[Drawing]:
        """One drawing or both."""
        return [self.first, *([self.second] if self.second else [])]


@dataclass(frozen=True)
class Look:
    """What is looked at: a word by its number, in a layer and a step; None is the picture, or all
    layers, or all steps."""

    word: int | None = None
    layer: int | None = None
    step: int | None = None


def data_address(picture: Image.Image) -> str:
    """A PNG inside the page, with the record of what made it."""
    file, record = io.BytesIO(), PngInfo()
    for key, text in picture.info.items():
        if isinstance(key, str) and isinstance(text, str):
            record.add_itxt(key, text)
    picture.save(file, format="PNG", pnginfo=record)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def figure(picture: Image.Image, caption: str, kind: str, told: str = "") -> str:
    """A picture over its caption; `told` is what stands for it where it cannot be seen."""
    width, height = picture.size
    kind += " small" if max(picture.size) < LEAST_SIDE else ""
    return (
        f'<figure class="{kind}"><img src="{data_address(picture)}" '
        f'alt="{html.escape(told or caption)}" width="{width}" height="{height}" '
        f'style="aspect-ratio: {width} / {height}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def row(figures: list[str]) -> str:
    """Figures side by side."""
    return f'<div class="figures count-{len(figures)}">{"".join(figures)}</div>'


def file_name(drawing: Drawing) -> str:
    """What a saved picture is called."""
    name = re.sub(r"\W+", "-", drawing.wanted.prompt.lower()).strip("-")[:60] or "picture"
    return f"{name}-{drawing.wanted.seed}.png"


def facts(drawing: Drawing) -> str:
    """What a drawing was made with, in short."""
    asked = drawing.wanted
    told = [f"seed {asked.seed}", f"{len(drawing.heat)} steps"]
    if asked.guidance_scale is not None:
        told.append(f"guidance {asked.guidance_scale:g}")
    told += [f"without {TITLES[name]}" for name in asked.dropped]
    return ", ".join(told)


def looked_at(drawing: Drawing, look: Look) -> str:
    """A drawing's figure: the picture, or a word's heat over it."""
    if look.word is None:
        made = f"{drawing.wanted.prompt}, {facts(drawing)}"
        return figure(drawing.picture, facts(drawing), "picture", made)
    values = heat(drawing, look.word, look.layer, look.step)
    word = drawing.words[look.word].text
    if not values.any():
        return figure(drawing.picture, f"“{word}” was cut off: no encoder read it", "heat")
    times = float(values.max() / values.mean())
    told = f"where “{word}” was read, at most {times:.1f} times the mean"
    return figure(over(drawing.picture, values), told, "heat")


def formed(drawings: list[Drawing], picture: Image.Image) -> str:
    """The drawings that are done, and the next one as it forms."""
    now = figure(picture, "the picture that the velocity points at", "glimpse")
    return row([*(looked_at(drawing, Look()) for drawing in drawings), now])


def stage(shown: Shown, look: Look) -> str:
    """All figures: one drawing, or two and their difference."""
    figures = [looked_at(drawing, look) for drawing in shown.drawings]
    if shown.second:
        both = shown.first.picture, shown.second.picture
        told = f"difference: {Ablation(*both).change:.1f} of 255 levels on average"
        figures.append(figure(difference(*both)[0], told, "difference"))
    return row(figures)


def said(seen: Waiting | Glimpse, column: str = "") -> str:
    """How far the run of a column has come."""
    if isinstance(seen, Waiting):
        before = "one picture is" if seen.before == 1 else f"{seen.before} pictures are"
        return line(f"{before} before yours")
    share = f'<progress max="{seen.steps}" value="{seen.step}"></progress>'
    words = f"step {seen.step} of {seen.steps}, t = {seen.t:.2f}"
    return line(f"{column}: {words}" if column else words, after=share)


def done(shown: Shown) -> str:
    """How long it took, what was warned of, and where the files are to be had."""
    seconds = sum(drawing.seconds for drawing in shown.drawings)
    links = [
        f'<a download="{html.escape(file_name(drawing))}" href="{data_address(drawing.picture)}">'
        f"{text}</a>"
        for drawing, text in zip(
            shown.drawings, ("Save the picture", "Save the other"), strict=False
        )
    ]
    warned = {text: None for drawing in shown.drawings for text in drawing.warnings}
    lines = line(f"drawn in {seconds:.1f} s", after=" ".join(links))
    return lines + "".join(line(text, "warning") for text in warned)


def line(text: str, kind: str = "", after: str = "") -> str:
    """A sentence, and HTML after it."""
    return f'<p class="{kind}"><span>{html.escape(text)}</span>{after}</p>'


def header(pipe: Pipeline, name: str) -> str:
    """The page's title, and which model draws."""
    config, defaults = pipe.config, pipe.defaults
    size = f"{defaults.width} × {defaults.height} pixels"
    facts = f"{name}, {config.depth} joint blocks, {size}"
    return f"<header><h1>sd3min</h1><p>{html.escape(facts)}</p></header>"


def welcome(pipe: Pipeline) -> str:
    """What the page shows before the first picture: noise, as every run begins."""
    random, size = np.random.default_rng(0), (pipe.defaults.height, pipe.defaults.width)
    levels = random.normal(150, 26, (*size, 1)) + random.normal(0, 12, (*size, 3))
    noise = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
    return row([figure(noise, "t = 1, where every run begins", "noise")])


def recipe(programs: list[str], commands: list[str]) -> str:
    """What made the drawings, to be copied."""
    python, command = "\n\n".join(programs), "\n".join(commands)
    return (
        "<details><summary>What made it</summary>"
        f"{copied('Python', python)}{copied('Command', command)}</details>"
    )


def copied(title: str, text: str) -> str:
    """A text with a button that copies it."""
    return (
        f'<h2>{title}</h2><div class="copied"><pre><code>{html.escape(text)}</code></pre>'
        '<button type="button">Copy</button></div>'
    )

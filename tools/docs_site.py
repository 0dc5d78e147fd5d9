"""What MkDocs asks while it builds the site of `docs/mkdocs.yml`: pages that are made of code.

`make docs` runs it. The README, the executed notebooks and every module become pages as they are;
the paper map, the options and the conventions become tables. None of these pages is kept in a file.
"""

import argparse
import base64
import posixpath
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import paper_map
import torch
from latex2mathml.converter import convert as latex_to_mathml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from sd3min import cli, conventions
from sd3min.config import MMDiTConfig
from sd3min.lora import names
from sd3min.mmdit import MMDiT
from sd3min.training import peer_options

ROOT = Path(__file__).parents[1]
INCLUDED = {  # files of the repository that are pages, whole
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "weights/README.md": "weights.md",
    "weights/figures/mutations.md": "mutations.md",
}
COPIED = ("LICENSE", "NOTICE", "CITATION.cff")
GROUPS = {  # pages of the reference, and the modules on each; the last has all others
    "flow": ("Flow", ("flow", "densities")),
    "network": ("Networks", ("mmdit", "autoencoder", "text_encoders", "config")),
    "pipeline": ("Pipeline", ("pipeline", "loading", "settings", "record")),
    "conventions": ("Conventions", ("conventions", "differences")),
    "files": (
        "Files",
        (
            *("checkpoint", "parts", "sources", "stored", "writer"),
            *("formats", "folder", "hub", "convert"),
        ),
    ),
    "lora": ("LoRA", ("lora",)),
    "training": ("Training", ("training",)),
    "probes": ("Probes", ("probes",)),
    "fast": ("Fast and small", ("fast",)),
    "commands": ("Commands", ()),
}
LINK = re.compile(r"(?<=\]\()([^()\s]+)(?=\))")
IN_CODE = re.compile(r"(?<![\[`])`((?:sd3min|tools|notebooks)/[\w/]+\.py)`(?![\]`])")
FORMULA = re.compile(
    r"(?P<code>`+.*?`+)|\$\$(?P<block>.+?)\$\$|\$(?=\S)(?P<inline>[^$]+?)(?<=\S)\$", re.DOTALL
)
FENCE = "~" * 8


def modules() -> list[str]:
    """Dotted names of all modules, packages included, in the order of their files."""
    files = (path.relative_to(ROOT).with_suffix("") for path in (ROOT / "sd3min").rglob("*.py"))
    names = (".".join(file.parts).removesuffix(".__init__") for file in sorted(files))
    return [name for name in names if not name.endswith(".__main__")]


def grouped() -> dict[str, list[str]]:
    """The modules on each page of the reference."""
    left = [name for name in modules() if name != "sd3min"]
    pages = {}
    for page, (_, heads) in GROUPS.items():
        taken = [n for head in heads for n in left if f"{n}.".startswith(f"sd3min.{head}.")]
        pages[page] = taken or left
        left = [name for name in left if name not in taken]
    return pages


def source_page(file: str, line: int | None = None) -> str:
    """The address in the site of a source file, or of a line of it."""
    return f"source/{file}.md" + (f"#__codelineno-0-{line}" if line else "")


def address(target: str, folder: str) -> str:
    """Where a link of an included file leads in the site; links elsewhere stay as they are."""
    if "://" in target or target.startswith("#"):
        return target
    file = posixpath.normpath(posixpath.join(folder, target))
    page = INCLUDED.get(file) or (source_page(file) if file.endswith(".py") else file)
    return re.sub(r"\.ipynb$", ".md", page.removeprefix("docs/pages/"))


def included(file: str) -> str:
    """A file of the repository as a page, its links led to other pages."""
    folder = posixpath.dirname(file)
    text = LINK.sub(lambda link: address(link[1], folder), (ROOT / file).read_text("utf-8"))
    return IN_CODE.sub(linked, text)


def linked(code: re.Match[str]) -> str:
    """The name of a source file with a link to it, if there is such a file."""
    return f"[{code[0]}]({source_page(code[1])})" if (ROOT / code[1]).exists() else code[0]


def listing(path: Path) -> str:
    """A source file as a page, every line with an address."""
    head = f"---\ntitle: {path.name}\nsearch: {{exclude: true}}\nhide: [navigation, toc]\n---\n"
    title = path.relative_to(ROOT).as_posix()
    code = f"{FENCE} {{ .python linenums=1 }}\n{path.read_text('utf-8')}\n{FENCE}"
    return f"{head}\n# {title}\n\n{code}\n"


def with_formulas(markdown: str) -> str:
    """A text whose formulas in LaTeX are MathML, which browsers draw without a program."""

    def formula(found: re.Match[str]) -> str:
        if found["code"]:
            return found["code"]
        display = "block" if found["block"] else "inline"
        return latex_to_mathml((found["block"] or found["inline"]).strip(), display=display)

    return FORMULA.sub(formula, markdown)


def fenced(text: str, language: str) -> str:
    """Code, or what it prints."""
    return f"{FENCE}{language}\n{text.rstrip()}\n{FENCE}"


def pictures(cell: Any) -> list[bytes]:
    """What a cell of an executed notebook draws, in PNG."""
    drawn = (output.get("data", {}).get("image/png") for output in cell.get("outputs", ()))
    return [base64.b64decode(picture) for picture in drawn if picture]


def code_cell(cell: Any, stem: str) -> str:
    """A cell's code, what it printed and what it drew; answers to exercises are folded away."""
    printed = "".join(output.get("text", "") for output in cell.get("outputs", ()))
    parts = [fenced(cell.source, "python"), *([fenced(printed, "text")] if printed else [])]
    parts += [f"![]({stem}-{cell.id}-{i}.png)" for i in range(len(pictures(cell)))]
    whole = "\n\n".join(parts)
    if not cell.metadata.get("jupyter", {}).get("source_hidden"):
        return whole
    title = "Answer" if cell.source.startswith("# answer") else "Hidden"
    return f'??? note "{title}"\n\n{textwrap.indent(whole, "    ")}'


def notebook(path: Path) -> dict[str, str | bytes]:
    """A notebook as a page, with its pictures."""
    place = f"notebooks/{path.stem}"
    cells = nbformat.read(path, nbformat.NO_CONVERT).cells
    parts = (
        with_formulas(cell.source) if cell.cell_type == "markdown" else code_cell(cell, path.stem)
        for cell in cells
    )
    run = f"Run it: open `{place}.ipynb` in Jupyter; its source is `{place}.py`."
    drawn: dict[str, str | bytes] = {
        f"{place}-{cell.id}-{i}.png": picture
        for cell in cells
        for i, picture in enumerate(pictures(cell))
    }
    return drawn | {f"{place}.md": "\n\n".join((*parts, run))}


def reference(page: str, names: list[str]) -> str:
    """A page of the reference: every module with a link to its source."""
    parts = [f"# {GROUPS[page][0]}"]
    for name in names:
        file = Path(*name.split("."))
        folder = (ROOT / file).is_dir()
        source = file / "__init__.py" if folder else file.with_suffix(".py")
        show = "\n    options:\n      members: false" if folder else ""
        parts += [f"::: {name}{show}", f"[Source](../{source_page(source.as_posix())})"]
    return "\n\n".join(parts)


def options(parser: argparse.ArgumentParser) -> Iterator[tuple[str, ...]]:
    """Rows of a command's arguments: names and what they are."""
    for action in parser._actions:
        if action.dest != "help" and action.help != argparse.SUPPRESS:
            names = action.option_strings or [str(action.metavar or action.dest)]
            yield ", ".join(f"`{name}`" for name in names), cell(action.help or "")


def cell(text: str) -> str:
    """A text within a table."""
    return text.replace("|", "\\|").replace("%%", "%").replace("*", "\\*").replace("<", "&lt;")


def commands() -> dict[str, argparse.ArgumentParser]:
    """The parser of every command."""
    actions = cli.make_parser()._actions
    (found,) = (a for a in actions if isinstance(a, argparse._SubParsersAction))
    return found.choices


def commands_page() -> str:
    """All commands with all options."""
    parts = ["# Commands", "The same as `sd3min COMMAND --help`; a call that cannot be carried out"]
    parts[1] += " ends before any work, with exit code 2 and one sentence."
    for name, parser in commands().items():
        parts += [f"## sd3min {name}", paper_map.table(("option", "what it is"), options(parser))]
    return "\n\n".join(parts)


def diffusers_options() -> str:
    """diffusers' options and ours for the same."""
    return peer_options.table(commands()["finetune"])


def conventions_table() -> str:
    """Every choice by implementation, with what it does."""
    known = conventions.CONVENTIONS.values()
    rows = (
        (f"`{name}`", *(cell(str(getattr(one, name))) for one in known), cell(reason))
        for name, reason in conventions.reasons().items()
    )
    return paper_map.table(("choice", *conventions.CONVENTIONS, "what it does"), rows)


def dialects_table() -> str:
    """What each kind of LoRA file calls a query of block 3."""
    with torch.device("meta"):
        mmdit = MMDiT(MMDiTConfig(depth=4, grid=16, pooled_width=8, context_width=8))
    shapes = {name: list(tensor.shape) for name, tensor in mmdit.state_dict().items()}
    every = {layer.name: layer for layer in names.layers("mmdit", shapes)}
    layer = every["joint_blocks.3.x_block.attn.qkv"]
    rows = ((one.title, f"`{next(one.stems(layer))[0]}`") for one in names.DIALECTS)
    return paper_map.table(("kind", "name"), rows)


TABLES = {
    "diffusers-options": diffusers_options,
    "conventions": conventions_table,
    "dialects": dialects_table,
}


def made() -> dict[str, str | bytes]:
    """All generated pages and pictures by their address."""
    pages: dict[str, str | bytes] = {page: included(file) for file, page in INCLUDED.items()}
    pages["paper.md"] = paper_map.render(source_page)
    pages["commands.md"] = commands_page()
    pages |= {f"reference/{page}.md": reference(page, names) for page, names in grouped().items()}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        pages |= notebook(path)
    for folder in ("sd3min", "tools", "notebooks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            pages[source_page(path.relative_to(ROOT).as_posix())] = listing(path)
    return pages


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lay out the site."""
    notebooks = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    guides = ("generate", "memory", "finetune", "lora", "official", "conventions")
    config.nav = [
        {"Home": "index.md"},
        {"The paper": "paper.md"},
        {"Guides": [*(f"guides/{guide}.md" for guide in guides), "commands.md"]},
        {"Notebooks": [f"notebooks/{name}.md" for name in notebooks]},
        {"Reference": [{GROUPS[page][0]: f"reference/{page}.md"} for page in GROUPS]},
        {"More": ["weights.md", "mutations.md", "contributing.md"]},
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, the pictures and the texts of the licence."""
    for address_, content in made().items():
        files.append(File.generated(config, address_, content=content))
    pictures = (ROOT / "weights" / "figures").glob("*.png")
    copied = (*pictures, *(ROOT / name for name in COPIED))
    for path in copied:
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Put tables where a page asks for them; a page alone in its tab needs no list of pages."""
    if page.file.src_uri in ("index.md", "paper.md"):
        page.meta["hide"] = ["navigation"]
    return re.sub(r"<!-- table: ([\w-]+) -->.*", lambda found: TABLES[found[1]](), markdown)

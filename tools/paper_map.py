"""The paper, line by line: which function computes what of it, and what of it no function does.

`python tools/paper_map.py > map.md` prints the page of the docs with links to files of this
repository, seen from the folder `docs`. Docstrings say where the paper has what they describe;
`docs/paper.toml` says what the paper has.
"""

import ast
import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("sd3min", "tools")
OTHERS = re.compile(r"\([^()]*\b(?:et al\.|there\b)[^()]*\)")  # citations of other papers
CITATION = re.compile(
    r"§(?P<section>\d+(?:\.\d+)*)"
    r"|(?P<kind>Eqs?\.|Figs?\.|Tabs?\.|Table|Alg\.|App\.) (?P<first>[A-E]?[\d.]*\d[ab]?|[A-E])"
    r"(?:(?:[-–]| to )(?P<last>\d+)| and (?P<also>\d+[ab]?))?"
)
KINDS = {"Eqs.": "Eq.", "Figs.": "Fig.", "Tabs.": "Tab.", "Table": "Tab."}
DIFFERS = re.compile(
    r"(Differs from the paper\b.*?(?<!App)(?<!Eq)(?<!Eqs)(?<!Fig)(?<!Tab)\.)(?=\s|$)"
)

Link = Callable[[str, int], str]


@dataclass(frozen=True)
class Item:
    """Something that the paper has: its place, a title, and why it is not here, if it is not."""

    ref: str
    title: str
    why: str = ""


@dataclass(frozen=True)
class Place:
    """A definition, or a whole file, and what its docstring says of the paper."""

    file: str
    line: int
    name: str
    refs: tuple[str, ...]
    differs: tuple[str, ...]

    @property
    def short(self) -> str:
        """The name without the package's."""
        return self.name.removeprefix("sd3min.")


def read_items() -> dict[str, Item]:
    """What the paper has, in its order."""
    with (ROOT / "docs" / "paper.toml").open("rb") as file:
        return {ref: Item(ref, **item) for ref, item in tomllib.load(file).items()}


def cited(docstring: str) -> tuple[str, ...]:
    """The paper's items that a docstring cites, each once; those of other papers left out."""
    text = OTHERS.sub("", " ".join(docstring.split()))
    refs = []
    for match in CITATION.finditer(text):
        if match["section"]:
            refs.append(f"§{match['section']}")
            continue
        kind = KINDS.get(match["kind"], match["kind"])
        refs.append(f"{kind} {match['first']}")
        if match["last"]:
            following = range(int(match["first"]) + 1, int(match["last"]) + 1)
            refs += [f"{kind} {number}" for number in following]
        refs += [f"{kind} {match['also']}"] if match["also"] else []
    return tuple(dict.fromkeys(refs))


def definitions(node: ast.AST, name: str) -> Iterator[tuple[str, int, str]]:
    """Dotted name, line and docstring of a module and all that is defined in it."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
        yield name, getattr(node, "lineno", 1), ast.get_docstring(node) or ""
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef):
                yield from definitions(child, f"{name}.{child.name}")


def places(folders: tuple[str, ...] = FOLDERS) -> list[Place]:
    """All definitions that cite the paper, file by file."""
    found = []
    for path in (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))):
        file = path.relative_to(ROOT)
        module = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
        for name, line, docstring in definitions(ast.parse(path.read_text("utf-8")), module):
            differs = tuple(DIFFERS.findall(" ".join(docstring.split())))
            place = Place(file.as_posix(), line, name, cited(docstring), differs)
            found += [place] if place.refs or differs else []
    return found


def table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows))


def render(link: Link) -> str:
    """The page, in Markdown; `link` gives the address of a line of a file."""
    items, found = read_items(), places()

    def where(place: Place) -> str:
        return f"[`{place.short}`]({link(place.file, place.line)})"

    here = (
        (item.ref, item.title, "<br>".join(where(p) for p in found if item.ref in p.refs))
        for item in items.values()
        if not item.why
    )
    absent = ((item.ref, item.title, item.why) for item in items.values() if item.why)
    files = ((where(place), ", ".join(place.refs)) for place in found if place.refs)
    differs = [f"- {where(place)}: {words}" for place in found for words in place.differs]
    return "\n\n".join(
        (
            "# The paper, line by line",
            "What [Esser et al. 2024](https://arxiv.org/abs/2403.03206) says, and the function "
            "that computes it. Both tables are made from the docstrings, which cite the paper "
            "where they follow it.",
            "## By the paper",
            table(("paper", "what it is", "in this code"), here),
            "## By this code",
            table(("in this code", "paper"), files),
            "## What differs from the paper",
            "\n".join(differs),
            "## What of the paper is not here",
            table(("paper", "what it is", "why not"), absent),
            "The paper's text itself names Equations 1, 5, 6, 8, 10, 23 and 27 to 36 by their "
            "numbers. The others are counted between those; of the three lines between Equations "
            "10 and 13 only two have numbers, and counting does not tell which.",
        )
    )


if __name__ == "__main__":
    print(render(lambda file, line: f"../{file}#L{line}"))

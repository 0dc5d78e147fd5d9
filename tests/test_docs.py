"""The site is built without a warning, asks the net for nothing, and its links lead somewhere."""

import argparse
import os
import re
import subprocess
import sys
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
import yaml

import sd3min
from sd3min import cli

ROOT = Path(__file__).parents[1]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
FETCHED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}


class Page(HTMLParser):
    """What a page has addresses for, links to, and fetches."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.fetched = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids |= {given[key] for key in ("id", "name") if given.get(key)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if FETCHED.get(tag) in given and given.get("rel") not in ("canonical", "prev", "next"):
            self.fetched.append(given[FETCHED[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site's pages by path."""
    folder = tmp_path_factory.mktemp("site")
    command = ["mkdocs", "build", "--strict", "--config-file", "docs/mkdocs.yml"]
    done = subprocess.run(
        [sys.executable, "-m", *command, "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    return {path: Page(path.read_text()) for path in folder.rglob("*.html")}, folder


@pytest.mark.slow
def test_the_site_fetches_nothing_from_elsewhere(site):
    pages, folder = site
    assert not {
        (path.name, url) for path, page in pages.items() for url in page.fetched if "//" in url
    }
    for style in folder.rglob("*.css"):
        assert not re.findall(r"url\(['\"]?(?:https?:)?//[^)]*", style.read_text()), style


@pytest.mark.slow
def test_every_link_within_the_site_leads_somewhere(site):
    pages, _ = site
    broken = defaultdict(list)
    for path, page in pages.items():
        if path.name == "404.html":
            continue
        for link in [*page.links, *page.fetched]:
            target, anchor = urldefrag(link)
            if urlsplit(target).scheme:
                continue
            place = (path.parent / unquote(target)).resolve() if target else path
            if place.is_dir():
                place = place / "index.html"
            if not place.exists() or (anchor and anchor not in pages[place].ids):
                broken[path.name].append(link)
    assert not dict(broken)


@pytest.mark.slow
def test_the_paper_map_leads_to_the_lines_of_definitions(site):
    pages, folder = site
    links = [urldefrag(link) for link in pages[folder / "paper.html"].links]
    lines = [(page, anchor) for page, anchor in links if anchor.startswith("__codelineno")]
    assert len(lines) > 50
    for page, anchor in lines:
        file = ROOT / page.removeprefix("source/").removesuffix(".html")
        line = file.read_text().splitlines()[int(anchor.rpartition("-")[2]) - 1]
        assert re.match(r'\s*(def|class) |"""', line), (page, anchor)


@pytest.mark.slow
def test_formulas_of_the_notebooks_are_drawn(site):
    _, folder = site
    texts = [path.read_text() for path in (folder / "notebooks").glob("*.html")]
    assert sum(text.count("<math") for text in texts) > 50
    assert not any("$$" in text or "\\frac" in text for text in texts)


@pytest.mark.slow
def test_every_module_and_command_is_described(site):
    pages, folder = site
    described = set().union(*(pages[path].ids for path in (folder / "reference").glob("*.html")))
    files = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "sd3min").rglob("*.py")]
    modules = {".".join(file.parts).removesuffix(".__init__") for file in files}
    assert modules - {"sd3min", "sd3min.__main__", "sd3min.training.__main__"} <= described
    assert {"sd3min-generate", "sd3min-finetune"} <= pages[folder / "commands.html"].ids


def test_commands_in_the_guides_are_understood():
    (found,) = (a for a in cli.make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    command = re.compile(rf"sd3min ({'|'.join(found.choices)})\b(.*)")
    written = []
    for path in [*(ROOT / "docs" / "pages").rglob("*.md"), ROOT / "CONTRIBUTING.md"]:
        written += command.findall(path.read_text())
    assert len(written) > 15
    for name, rest in written:
        used = set(re.findall(r"(?<!\S)--[\w-]+", rest.partition("#")[0]))
        known = {option for a in found.choices[name]._actions for option in a.option_strings}
        assert used <= known, (name, used - known)


def test_the_citation_is_of_this_version_and_of_the_paper():
    assert CITATION["version"] == sd3min.__version__
    assert CITATION["cff-version"] == "1.2.0" and CITATION["license"] == "Apache-2.0"
    assert {"title", "authors", "message"} <= set(CITATION)
    (paper,) = CITATION["references"]
    assert paper["url"].endswith("2403.03206") and len(paper["authors"]) == 17


def test_the_licence_is_what_the_package_says():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license"] == CITATION["license"]
    for name in project["license-files"]:
        assert (ROOT / name).stat().st_size > 0
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text()

"""The site of the documentation: it builds without a warning, leads nowhere that is not there, and loads nothing from
other servers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from perpetune.cli import costs, hub, learn, look, run, serving, use
from site_pages import changelog, on_page_markdown

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
MADE = {"changelog.md", "examples.md"}


class Page(HTMLParser):
    """What a page holds: its anchors, where its links lead, and what it loads."""

    def __init__(self, text: str):
        super().__init__()
        self.anchors, self.links, self.loads = set[str](), list[str](), list[str]()
        self.feed(text)
        styles = re.findall(r"(?:url\(|@import )[\"']?([^\"')]+)", text)
        self.loads += [place for place in styles if not place.startswith("#")]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if (tag == "a" and "href" in given) or (tag == "link" and given.get("rel") in ("canonical", "next", "prev")):
            self.links.append(given["href"])
        else:
            self.loads += [given[name] for name in ("src", "href", "data", "poster") if name in given and tag != "a"]


def broken(site: Path) -> list[str]:
    """Each link to a page or an anchor that is not there, and all that is loaded from elsewhere or is not there."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html") if path.name != "404.html"}
    return [line for path, page in pages.items() for line in _broken(path, page, pages)]


def _broken(path: Path, page: Page, pages: dict[Path, Page]) -> Iterator[str]:
    for link in [*page.links, *page.loads]:
        parts = urlsplit(link)
        if link.startswith("data:") or (parts.scheme and link in page.links):
            continue
        there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        there = there / "index.html" if there.is_dir() else there
        if parts.scheme or parts.netloc or not there.is_file():
            yield f"{path.name}: {link} {'is loaded from another place' if parts.netloc else 'is not there'}"
        elif parts.fragment and there in pages and unquote(parts.fragment) not in pages[there].anchors:
            yield f"{path.name}: {link} has no such anchor"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built from a folder that is no clone of git."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", ROOT / "mkdocs.yml", "-d", folder],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


def test_each_link_and_anchor_is_there_and_nothing_comes_from_elsewhere(site: Path) -> None:
    assert broken(site) == []
    assert len(list(site.rglob("*.html"))) > 35


def test_what_is_broken_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        "<link rel=stylesheet href=https://fonts.example/f.css><script src=//cdn.example/x.js></script><img src=no.png>"
        "<style>@import 'https://fonts.example/g.css';</style><a href=b.html>b</a><a href=b.html#x>x</a>"
        "<a href=b.html#y>y</a><a href=c.html>c</a><a href=https://example.org>away</a>"
    )
    (tmp_path / "b.html").write_text("<p id=x>b</p>")
    assert broken(tmp_path) == [
        "a.html: b.html#y has no such anchor",
        "a.html: c.html is not there",
        "a.html: https://fonts.example/f.css is loaded from another place",
        "a.html: //cdn.example/x.js is loaded from another place",
        "a.html: no.png is not there",
        "a.html: https://fonts.example/g.css is loaded from another place",
    ]


def _named(nav: object) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, dict):
        for item in nav.values():
            yield from _named(item)
    elif isinstance(nav, list):
        for item in nav:
            yield from _named(item)


def test_each_page_has_its_place() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = list(_named(yaml.safe_load(text[text.index("nav:") : text.index("theme:")])["nav"]))
    there = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert sorted(named) == sorted(there | MADE)


def test_the_command_line_has_each_verb_with_each_option(site: Path) -> None:
    import typer

    from perpetune.cli import app

    page = (site / "reference" / "cli.html").read_text(encoding="utf-8")
    verbs = [verb.__name__ for module in (run, learn, costs, use, serving, hub, look) for verb in module.VERBS]
    commands = getattr(typer.main.get_command(app), "commands", {})
    assert sorted(verbs) == sorted(commands)
    for verb in verbs:
        assert f'id="perpetune-{verb}"' in page
        part = page.partition(f'id="perpetune-{verb}"')[2].partition("<h3")[0]
        assert not [
            name for option in commands[verb].params for name in option.opts if name[0] == "-" and name not in part
        ]


def test_the_reference_has_the_public_names(site: Path) -> None:
    import perpetune

    anchors = set().union(*(Page(p.read_text(encoding="utf-8")).anchors for p in (site / "reference").glob("*.html")))
    assert [name for name in perpetune.__all__ if f"perpetune.{name}" not in anchors] == ["__version__"]


@pytest.mark.parametrize("name", ["index.md", "which-method.md"])
def test_figures_in_tables_are_those_of_the_results(name: str) -> None:
    results = (DOCS / "results.md").read_text(encoding="utf-8")
    rows = [line for line in (DOCS / name).read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    figures = [figure for row in rows for figure in re.findall(r"\d+\.\d+(?: ± \d+\.\d+)?", row)]
    assert len(figures) >= 4
    assert [figure for figure in figures if figure not in results] == []


def test_links_of_the_repository_lead_to_files() -> None:
    pages = [*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md"]
    links = [
        (page.name, link)
        for page in pages
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
        if "://" not in link and not (page.parent / link).exists()
    ]
    assert links == []


def test_links_out_of_the_docs_lead_to_pages_of_the_site() -> None:
    page: Any = SimpleNamespace(file=SimpleNamespace(src_uri="tutorials/x.md"))
    found = on_page_markdown("[a](../../examples/trainer.py), [b](../../CHANGELOG.md), [c](../protect.md)", page)
    assert found == "[a](../examples.md#trainerpy), [b](../changelog.md), [c](../protect.md)"
    assert "](docs/" not in changelog()


@pytest.mark.slow
@pytest.mark.browser
def test_the_search_works_without_a_server(site: Path, chromium: str) -> None:
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000", "--dump-dom"]
    done = subprocess.run(
        [*command, f"{(site / 'index.html').as_uri()}?q=forget"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert re.search(r"\d+ matching documents", done.stdout)

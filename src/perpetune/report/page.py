"""Write reports as files: one HTML page that needs no other file, the same in Markdown, and the figures as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perpetune.files import on_lines, write_file
from perpetune.plain import Malformed, read_json
from perpetune.report import form, html, markdown, palette
from perpetune.report.blocks import Banner, Page
from perpetune.report.compare import compare
from perpetune.report.comparison import comparison_page
from perpetune.report.document import choices, setting
from perpetune.report.results_schema import Results, checked
from perpetune.report.sections import classes, collect, curves, problems, zero_shot
from perpetune.report.sections.headroom import Headroom

if TYPE_CHECKING:
    import jinja2


def write_report(results: Mapping[str, Any], folder: Path, found: Sequence[Headroom] = ()) -> list[Path]:
    """Write `report.html`, `report.json` and `report.md` into `folder`; return their paths in this order.

    The page opens offline, because its styles, drawings and short script are inside it. Each file is written under
    another name first and then renamed, so a report is never incomplete.

    Args:
        results: a results document, see `results_schema.Results`.
        folder: the folder; it is made if it does not exist.
        found: the headroom of the run's stream, compared with other runs (`headroom_beside`).

    Raises:
        StateError: `results` is not a results document.
    """
    run = checked(results)
    if found:
        run["headroom"] = list(found)
    page = run_page(run)
    derived: dict[str, Any] = {"curves": asdict(curves.curves(run))}
    derived |= {"classes": [asdict(row) for row in classes.class_rows(run)]}
    files = {
        "report.html": _rendered(page),
        "report.json": _json({**run, **derived}),
        "report.md": markdown.page(page),
    }
    return _write(files, folder)


def run_page(run: Results) -> Page:
    """The page of one run: its title, its choices and its sections."""
    tasks, learned = form.plural(len(run["tasks"]), "task"), form.plural(len(run["cells"]), "task")
    incomplete = f"This run is not complete; its figures are of the {learned} learned so far."
    made_by = f"Made by perpetune {run['versions'].get('perpetune', '')}".rstrip()
    return Page(
        kind="perpetune report",
        title=run["name"],
        lead=f"{setting(run).capitalize()} learning of {tasks}, seed {run['seed']}",
        sections=collect(run),
        chips=[*choices(run["recipe"]).items(), ("device", run["device"])],
        banners=[*zero_shot.banner(run), *([] if run["complete"] else [Banner(incomplete)]), *problems.banner(run)],
        footer=f"{made_by} from one file; nothing on this page is loaded from elsewhere.",
    )


def headroom_beside(
    run: tuple[str, Mapping[str, Any]], others: Sequence[tuple[str, Mapping[str, Any]]]
) -> list[Headroom]:
    """The headroom of the stream that `run` learned, with the runs among `others` on the same stream; empty if unknown.

    Args:
        run: the user's name for the run, and its results document.
        others: the same for other runs, on any stream.
    """
    named = [run, *others]
    streams = compare([results for _, results in named], [name for name, _ in named])["headroom"]
    return [one for one in streams if run[0] in one["runs"]]


def write_comparison(runs: Sequence[tuple[str, Mapping[str, Any]]], folder: Path, name: str = "compare") -> list[Path]:
    """Write `compare.html`, `compare.json` and `compare.md` into `folder`; return their paths in this order.

    Args:
        runs: for each run the user's name for it (such as its folder), and its results document.
        folder: the folder; it is made if it does not exist.
        name: the name of the files, without the suffix.

    Raises:
        StateError: a document is not a results document.
    """
    comparison = compare([run for _, run in runs], [name for name, _ in runs])
    page = comparison_page(comparison)
    files = {
        f"{name}.html": _rendered(page),
        f"{name}.json": _json(comparison),
        f"{name}.md": markdown.page(page),
    }
    return _write(files, folder)


def is_comparison(path: Path) -> bool:
    """Whether `path` is a file from `write_comparison`, with a name that the command line uses."""
    if path.stem not in ("compare", "comparison") or not path.is_file():
        return False
    if path.suffix != ".json":
        return path.suffix in (".html", ".md")
    try:
        document = read_json(path)
    except (OSError, Malformed):
        return False
    return isinstance(document, dict) and "rows" in document and "cells" not in document


def _rendered(page: Page) -> str:
    """The page as one HTML file."""
    titled = [section for section in page.sections if section.heading]
    untitled = [section for section in page.sections if not section.heading]
    return _environment().get_template("page.html").render(page=page, titled=titled, untitled=untitled)


def _environment() -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("perpetune.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"colours_css": palette.colours_css, "drawn": html.section}
    return environment


def _json(document: Mapping[str, Any]) -> str:
    """Of a table each row is a line: it has as many cells as there are tasks."""
    return on_lines(document, 2, finite=True) + "\n"


def _write(files: Mapping[str, str], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        # A file name that is not UTF-8 contains lone surrogates, which cannot be encoded.
        write_file(folder / name, text.encode("utf-8", "backslashreplace"))
    return [folder / name for name in files]

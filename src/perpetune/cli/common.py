"""Functions that several verbs use."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perpetune.cli.lines import Lines, LineView
from perpetune.cli.output import encodable

if TYPE_CHECKING:
    from perpetune.learner import Learner


def print_json(value: Any) -> None:
    """Print a value as JSON. Letters that the output's encoding lacks become JSON's own escapes, so no name changes."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    print(text if encodable(text) else json.dumps(value, indent=2))


def watched(quiet: bool, folder: Path, out: Lines | None) -> Any:
    """What shows a verb that learns, as a context: lines of JSON, a drawing on the terminal, or nothing."""
    if out is not None and not quiet:
        return nullcontext(LineView(out, folder))
    from perpetune.cli.live import watch

    return watch(quiet or out is not None, folder)


def finish(learner: Learner, results: dict[str, Any], out: Lines | None) -> None:
    """Print the figures and write the report. If several processes learn, only the first one does."""
    from perpetune.report import write_report

    if learner.runtime.rank != 0:
        return
    folder = learner.state.folder
    write_report(results, folder)
    if out is not None:
        out.emit("done", results=results, report=str(folder / "report.html"))
    else:
        from perpetune.cli.live import show_results

        show_results(results)
        print(f"report: {folder / 'report.html'}")

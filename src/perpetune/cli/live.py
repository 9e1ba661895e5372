"""The terminal output during learning: a line for each task, a progress bar, and after each task its accuracies with
their changes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from perpetune.report import form, write_report
from perpetune.report.compare import Comparison
from perpetune.report.comparison import compare_table, effects_text
from perpetune.report.document import learn_seconds
from perpetune.report.sections import collect
from perpetune.report.sections.headroom import Headroom, in_terminal
from perpetune.report.terminal import after_task, drawn, short_line, show, summary
from perpetune.runtime import Silent

if TYPE_CHECKING:
    from perpetune.cli.jobs import Event, Job
    from perpetune.report.results_schema import Results


@contextlib.contextmanager
def watch(quiet: bool, folder: Path | None = None) -> Iterator[Any]:
    """A `perpetune.runtime.Progress` that draws on the terminal. If several processes learn, only one of them draws.

    Args:
        quiet: draw nothing.
        folder: the state folder; its report is written after each task, before the task's results are printed.
    """
    import os

    if quiet or os.environ.get("RANK", "0") != "0":
        yield Silent()
        return
    console = Console(highlight=False)
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        yield Live(console, bars, folder)


def print_line(console: Console, line: Text | str) -> None:
    """Print one line. It is wrapped on a terminal only: in a file, a line that is cut in two is not found again."""
    console.print(line, soft_wrap=not console.is_terminal)


class Live:
    """Draws the progress of one run on the terminal. `perpetune.runtime.Progress` documents the methods."""

    def __init__(self, console: Console, bars: Progress, folder: Path | None = None):
        self.console, self.bars, self.folder = console, bars, folder
        self.bar = bars.add_task("", total=None, facts="", visible=False)
        self.epochs, self.started, self.images, self.loss = 1, time.perf_counter(), 0, ""

    def note(self, message: str) -> None:
        print_line(self.console, Text(f"note: {message}", style="yellow"))

    def task(self, index: int, name: str, classes: int, examples: int) -> None:
        known = f"{classes} class{'es' if classes != 1 else ''}, " if classes else ""
        facts = f"  {known}{examples} training examples"
        print_line(self.console, Text.assemble((f"task {index + 1} {name}", "bold"), facts))

    def phase(self, phase: str, steps: int, epochs: int, done: int) -> None:
        self.epochs, self.started, self.images, self.loss = epochs, time.perf_counter(), 0, ""
        self.bars.reset(self.bar, description=phase, total=steps, completed=done, facts="", visible=True)

    def step(self, done: int, epoch: int, loss: float | None, images: int) -> None:
        self.images += images
        if loss is not None:
            self.loss = f"loss {loss:.3f}  "
        speed = self.images / max(1e-9, time.perf_counter() - self.started)
        facts = f"epoch {epoch + 1}/{self.epochs}  {self.loss}{speed:.0f} examples/s"
        self.bars.update(self.bar, completed=done, facts=facts)

    def results(self, results: dict[str, Any]) -> None:
        if self.folder is not None:
            write_report(results, self.folder)
        self.bars.update(self.bar, visible=False, refresh=True)
        for line in after_task(collect(cast("Results", results))):
            print_line(self.console, line)


class RunLines:
    """Shows the progress of several runs: one line for each learned task and one for each finished run.

    Args:
        quiet: print nothing.
        names: the names of all runs.
        done: the number of runs that were complete before.
    """

    def __init__(self, quiet: bool, names: Sequence[str], done: int):
        self.quiet, self.console = quiet, Console(highlight=False)
        self.width, self.total, self.ended = max(map(len, names)), len(names), done
        if done and not quiet:
            print_line(self.console, Text(f"{done} of {form.plural(self.total, 'run')} already complete", "dim"))

    def tell(self, job: Job, event: Event) -> None:
        """Print a line for an event of a run; `perpetune.cli.jobs` has the events."""
        kind = event["event"]
        self.ended += kind in ("done", "failed")
        if self.quiet:
            return
        count = f"  [{self.ended}/{self.total}]"
        line = Text(f"{job.name:<{self.width}}  ")
        if kind == "task":
            line.append_text(short_line(collect(event["results"])))
        elif kind == "done":
            seconds = form.duration(learn_seconds(event["results"]))
            line.append("done", "bold green").append(f": {self._figures(event['results'])}, {seconds}{count}")
        elif kind == "failed":
            line.append("failed", "bold red").append(count)
        else:
            line.append(f"note: {event['message']}", "yellow")
        print_line(self.console, line)

    def _figures(self, results: Results) -> str:
        metrics = results["metrics"]
        final, lost = form.percent(metrics["final_accuracy"]), form.percent(metrics["forgetting"])
        return f"final {final} %, forgetting {lost}"


def show_results(results: dict[str, Any]) -> None:
    """Print the accuracy matrix, the figures below it, and the lines that other sections of the report have."""
    console = Console(highlight=False)
    console.print()
    show(console, summary(collect(cast("Results", results)), console.width))


def show_comparison(comparison: Comparison) -> None:
    """Print several runs in one table, and the notes that help to read it."""
    console = Console(highlight=False)
    console.print(compare_table(comparison, console.width))
    if comparison["effects"]:
        console.print(effects_text(comparison))
    for note in comparison["notes"]:
        print_line(console, Text(f"note: {note}", style="yellow"))


def show_headroom(streams: Sequence[Headroom]) -> None:
    """Print how much there was to win over not learning, which run is missing to know this, and in the last lines how
    much each run has won."""
    console = Console(highlight=False)
    show(console, drawn(in_terminal(streams), console.width))

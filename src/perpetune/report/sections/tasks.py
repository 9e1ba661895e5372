"""The section about each task: its classes, its examples, and its accuracy when learned and now."""

from __future__ import annotations

from dataclasses import dataclass

from perpetune.numerics.metrics import accuracies, task_forgetting
from perpetune.report import form
from perpetune.report.blocks import Block, Cell, Column, Columns, Heading, Rows, Table, keyed
from perpetune.report.document import classed, scores
from perpetune.report.results_schema import Results

NAMED = 12  # classes of one task whose names are shown at once


@dataclass(frozen=True)
class TaskRow:
    """One task: its accuracy just after it was learned, its accuracy now, and its loss since the best value (shares).
    `score` is the name of its score, if answers are not just right or wrong."""

    number: int
    name: str
    classes: list[str]
    train: int
    test: int
    learned: float | None
    now: float | None
    forgotten: float | None
    score: str
    sample: bool = False


def section(results: Results) -> list[Block]:
    scored, has_classes = any(scores(results)), classed(results)
    columns: Columns = ["task"]
    columns += [Column("score", left=True)] if scored else []
    columns += [Column("classes", left=True)] if has_classes else []
    columns += ["train", "test", "when learned, %", "now, %", "forgotten, points"]
    rows: Rows = [
        [
            keyed(f"{row.number} {row.name}", row.number),
            *([Cell(row.score)] if scored else []),
            *([_classes(row.classes)] if has_classes else []),
            keyed(form.count(row.train), row.train),
            keyed(form.count(row.test), row.test),
            *(keyed(mark + form.percent(value), value) for mark, value in shown(row)),
        ]
        for row in task_rows(results)
    ]
    return [Heading("Tasks"), Table(columns, rows, sortable=True, limit=30, noun="task")]


def shown(row: TaskRow) -> list[tuple[str, float | None]]:
    """The figures of a task, each with `~` before it if it is of a sample of the test data."""
    later = "~" if row.sample else ""
    return [("", row.learned), (later if row.now is not None else "", row.now), (later, row.forgotten)]


def task_rows(results: Results) -> list[TaskRow]:
    A, measured = accuracies(results["cells"]), scores(results)
    rows = []
    for j, task in enumerate(results["tasks"]):
        seen = [row[j] if j < len(row) else None for row in A[j:]]
        learned, now = (seen[0], seen[-1]) if seen else (None, None)
        lost = task_forgetting(A, j) if len(seen) > 1 else None
        about = (j + 1, task["name"], task["classes"], task["train"], task["test"])
        part = any(cell and "of" in cell for row in results["cells"][j:] for cell in row[j : j + 1])
        rows.append(TaskRow(*about, learned, now, lost, measured[j], part))
    return rows


def _classes(names: list[str]) -> Cell:
    return Cell(", ".join(names), len(names), fold=f"{len(names)} classes" if len(names) > NAMED else "")

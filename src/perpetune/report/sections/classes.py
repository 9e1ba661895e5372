"""The section about each class: its right answers after its task and now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from perpetune.numerics.metrics import per_class_counts, seen_cells
from perpetune.report import form
from perpetune.report.blocks import Block, Column, Columns, Heading, Rows, Table, Text, keyed
from perpetune.report.document import classed, sampled
from perpetune.report.results_schema import Results

VISIBLE_CHANGE = 0.0005


@dataclass(frozen=True)
class ClassRow:
    """One class, over all learned tasks that have it: the right answers (or the sum of scores) and the test examples
    now, the accuracy just after learning, the accuracy now, and the difference."""

    name: str
    tasks: list[int]
    correct: float
    total: int
    learned: float | None
    now: float | None
    change: float | None


def section(results: Results) -> list[Block] | None:
    if not classed(results):
        return None
    columns: Columns = [
        Column("class", left=True),
        "task",
        "right",
        "of",
        "when learned, %",
        "now, %",
        "change, points",
    ]
    rows: Rows = [
        [
            row.name,
            keyed(_numbers(row.tasks), row.tasks[0] if row.tasks else None),
            keyed(form.right(row.correct), row.correct),
            keyed(form.count(row.total), row.total),
            keyed(form.percent(row.learned), row.learned),
            keyed(form.percent(row.now), row.now, bar=row.now or 0.0),
            keyed(form.points(row.change), row.change, style=_direction(row.change)),
        ]
        for row in class_rows(results)
    ]
    part = " Earlier tasks were asked with samples of their test data." if sampled(results) else ""
    note = Text(f"Every learned class: just after its task, and now.{part}")
    return [Heading("Classes"), note, Table(columns, rows, sortable=True, limit=40, noun="class")]


def class_rows(results: Results) -> list[ClassRow]:
    """The classes in the stream's order, without those that have no measured cell."""
    cells = results["cells"]
    diagonal = [cell for i, row in enumerate(cells) if i < len(row) and (cell := row[i]) is not None]
    now, learned = per_class_counts(seen_cells(cells)), per_class_counts(diagonal)
    members: dict[str, list[int]] = {}
    for task in results["tasks"][: len(cells)]:
        for name in task["classes"]:
            members.setdefault(name, []).append(task["index"] + 1)
    rows = []
    for name in dict.fromkeys([*members, *now]):
        if name not in now:
            continue
        correct, total = now[name]
        after, before = _share(correct, total), _share(*learned.get(name, (0, 0)))
        change = None if after is None or before is None else after - before
        rows.append(ClassRow(name, members.get(name, []), correct, total, before, after, change))
    return rows


def _numbers(tasks: list[int]) -> str:
    return ", ".join(map(str, tasks[:3])) + (", …" if len(tasks) > 3 else "")


def _direction(change: float | None) -> Literal["", "up", "down"]:
    if change is None or abs(change) <= VISIBLE_CHANGE:
        return ""
    return "up" if change > 0 else "down"


def _share(correct: float, total: int) -> float | None:
    return correct / total if total else None

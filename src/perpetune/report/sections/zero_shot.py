"""What the model still knows of things that it did not learn: tasks before their turn, and exams of others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perpetune.report import form
from perpetune.report.blocks import Banner, Block, Brief, Cell, Column, Columns, Heading, Rows, Table, Text
from perpetune.report.results_schema import Results

MEANING = (
    "What the model knew before its first task, and how much of it is left: the share of right answers in % on tasks "
    "that were not learned yet and on exams that are never learned. In brackets: the change against before, in points. "
    "The worst comes first."
)
LOST = 0.05  # a loss of so much is said at the top of the page
EXAM = "exam "


@dataclass(frozen=True)
class Row:
    """One task or exam: its share of right answers before the first task and in each round, None if it is not measured.

    Attributes:
        worst: the greatest loss against before; zero or less. None if nothing was measured afterwards.
    """

    name: str
    before: float
    after: Sequence[float | None]

    @property
    def worst(self) -> float | None:
        return min((now - self.before for now in self.after if now is not None), default=None)

    @property
    def last(self) -> float | None:
        """The last change that was measured."""
        return next((now - self.before for now in reversed(self.after) if now is not None), None)


def section(results: Results) -> list[Block] | None:
    found = rows(results)
    if not found:
        return None
    numbers = [task["name"] for task in results["tasks"]][: len(results["cells"])]
    columns: Columns = [
        Column("asked", left=True),
        Column("before", hint="before the first task"),
        *(Column(f"after {name}") for name in numbers),
        Column("worst", hint="the greatest loss against before, in points"),
    ]
    table: Rows = [
        [row.name, form.percent(row.before), *(_shown(row, now) for now in row.after), _change(row.worst)]
        for row in found
    ]
    return [
        Heading("Zero-shot: what it still knows", "Zero-shot"),
        Text(MEANING),
        *([Text(said, warning=True)] if (said := lost(results)) else []),
        Table(columns, table, limit=30, noun="row", wrap=True),
        *_brief(found),
    ]


def rows(results: Mapping[str, Any]) -> list[Row]:
    """All that was asked before the first task and again later without having been learned, the worst loss first."""
    rounds = range(len(results["cells"]))
    begun, later = _rounds(results, "unlearned"), _rounds(results, "exams")
    asked = {
        f"{kind}{name}": (ways, name) for ways, kind in ((begun, ""), (later, EXAM)) for name in ways.get(None, {})
    }
    found = []
    for label, (ways, name) in asked.items():
        before = share(ways[None][name])
        after = [share(ways.get(number, {}).get(name)) for number in rounds]
        if before is not None and any(now is not None for now in after):
            found.append(Row(label, before, after))
    return sorted(found, key=lambda row: row.worst or 0.0)


def share(values: Mapping[str, Any] | None) -> float | None:
    """The share of right answers in a cell of a task or in the numbers of an exam; None if there is none."""
    if not values:
        return None
    if "total" in values:
        return float(values["correct"] / values["total"]) if values["total"] else None
    return values.get("accuracy")


def lost(results: Mapping[str, Any]) -> str:
    """One sentence about the worst loss, if it is of five points or more; else empty."""
    worst = next(iter(rows(results)), None)
    if worst is None or worst.worst is None or worst.worst > -LOST:
        return ""
    number = next(i for i, now in enumerate(worst.after) if now is not None and now - worst.before == worst.worst)
    now, task = worst.after[number], results["tasks"][number]["name"]
    return (
        f"Zero-shot lost: {worst.name} fell from {form.percent(worst.before)} % to {form.percent(now)} % after {task} "
        f"({form.points(worst.worst)} points)"
    )


def banner(results: Mapping[str, Any]) -> list[Banner]:
    """The worst loss, for the top of the page."""
    return [Banner(said, link="zero_shot")] if (said := lost(results)) else []


def _rounds(results: Mapping[str, Any], key: str) -> dict[int | None, Mapping[str, Any]]:
    return {entry["task"]: entry["of"] for entry in results.get(key, [])}


def _shown(row: Row, now: float | None) -> Cell:
    if now is None:
        return Cell(form.ABSENT, key="")
    return Cell(f"{form.percent(now)} ({form.points(now - row.before)})", key=now)


def _change(change: float | None) -> Cell:
    style: Any = "" if not change else "down" if change < 0 else "up"
    return Cell(form.points(change), key=change, style=style)


def _brief(found: Sequence[Row]) -> list[Block]:
    """One line: the mean of the last changes, and the worst loss."""
    changes = [row.last for row in found if row.last is not None]
    worst = found[0]
    mean = sum(changes) / len(changes)
    text = f"change {form.points(mean)} points in the mean, worst {worst.name} {form.points(worst.worst)}"
    return [Brief("zero-shot", text, warning=(worst.worst or 0.0) <= -LOST)]

"""The accuracy matrix cell by cell, ready to be shown: text, colour, what a reader learns on hover."""

from __future__ import annotations

from dataclasses import dataclass

from perpetune.numerics.metrics import accuracies, final_accuracy
from perpetune.report import form
from perpetune.report.palette import heat_level
from perpetune.report.results_schema import Results

LARGE = 8  # up to this many tasks: large cells
ROOMY = 12  # more than this: whole per cents and small cells
READABLE = 30  # more than this: a picture of the whole first, the numbers on demand


@dataclass(frozen=True)
class MatrixCell:
    """One measured cell. `kind` is `learned` on the diagonal, `ahead` above it (a task not yet
    learned), else `kept`."""

    text: str
    level: int
    kind: str
    title: str


@dataclass(frozen=True)
class MatrixRow:
    """The cells after one task, None where nothing was measured, and their mean over tasks learned."""

    number: int
    name: str
    mean: str
    cells: list[MatrixCell | None]


@dataclass(frozen=True)
class MatrixTable:
    rows: list[MatrixRow]
    names: list[str]
    change: list[str]  # of each task learned, from right after learning to now, in points
    style: str  # of the table: large, dense or neither
    numbered: bool  # columns are headed by numbers, for want of room
    folded: bool


def matrix_table(results: Results) -> MatrixTable:
    names = [task["name"] for task in results["tasks"]]
    A = accuracies(results["cells"])
    digits = 1 if len(names) <= ROOMY else 0
    rows = []
    for i, row in enumerate(A):
        cells = [_cell(results, A, i, j, digits) if j < len(row) else None for j in range(len(names))]
        rows.append(MatrixRow(i + 1, names[i], form.percent(final_accuracy(A[: i + 1]), digits), cells))
    change = [form.points(_since_learned(A, j), digits) for j in range(len(A) - 1)]
    style = "large" if len(names) <= LARGE else "dense" if len(names) > ROOMY else ""
    return MatrixTable(rows, names, change, style, style == "dense", len(names) > READABLE)


def _cell(results: Results, A: list[list[float | None]], i: int, j: int, digits: int) -> MatrixCell | None:
    value, counts = A[i][j], results["cells"][i][j]
    if value is None or counts is None:
        return None
    names = [task["name"] for task in results["tasks"]]
    counted = f"{form.right(counts['correct'])} of {form.count(counts['total'])} {counts.get('score', 'right')}"
    title = f"{names[j]} after {names[i]}: {counted}"
    before = A[i - 1][j] if i > j and j < len(A[i - 1]) else None
    if before is not None:
        title += f", {form.points(value - before)} points since {names[i - 1]}"
    kind = "learned" if i == j else "ahead" if j > i else "kept"
    return MatrixCell(form.percent(value, digits), heat_level(value), kind, title)


def _since_learned(A: list[list[float | None]], j: int) -> float | None:
    first = A[j][j] if j < len(A[j]) else None
    now = A[-1][j] if j < len(A[-1]) else None
    return None if first is None or now is None else now - first

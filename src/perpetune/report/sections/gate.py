"""Gates: how often a head that falls back on names lets what it has learned speak, and how often that is right."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from perpetune.report import form
from perpetune.report.blocks import Block, Brief, Column, Columns, Heading, Rows, Table, Text
from perpetune.report.results_schema import Results

MEANING = (
    "A gate decides for each image whether what was learned may answer. Open: the share of test images, in %, for "
    "which it may. On learned tasks this should be high, and low on tasks that are not learned yet, because these are "
    "answered by names alone. Right: the share of right answers among them."
)


def section(results: Results) -> list[Block] | None:
    names = [task["name"] for task in results["tasks"]]
    ahead = {entry["task"]: entry["of"] for entry in results.get("unlearned", []) if entry["task"] is not None}
    table: Rows = []
    brief: list[Block] = []
    for number, row in enumerate(results["cells"]):
        learned = [cell for cell in row[: number + 1] if cell]
        later = [cell for cell in ahead.get(number, {}).values() if cell]
        for gate in dict.fromkeys(gate for cell in [*learned, *later] for gate in cell.get("gates", {})):
            here, there = _sums(learned, gate), _sums(later, gate)
            line = [_share(*pair) for some in (here, there) for pair in ((some[0], some[2]), (some[1], some[0]))]
            table.append([f"{number + 1} {names[number]}", gate, *map(form.percent, line)])
            text = f"{gate} on {form.percent(line[0])} % of learned tasks, right in {form.percent(line[1])} % of these"
            brief = [Brief("gate", text)]
    if not table:
        return None
    columns: Columns = [
        Column("after", left=True),
        Column("gate", left=True),
        *(Column(title) for title in ("open, learned", "right, learned", "open, not learned", "right, not learned")),
    ]
    return [Heading("Gate"), Text(MEANING), Table(columns, table, limit=30, noun="row", wrap=True), *brief]


def _sums(cells: Iterable[Mapping[str, Any]], gate: str) -> tuple[int, int, int]:
    """How often the gate was open, how often the answer was right then, and the number of images."""
    known = [(*cell["gates"][gate], cell["total"]) for cell in cells if gate in cell.get("gates", {})]
    return sum(k[0] for k in known), sum(k[1] for k in known), sum(k[2] for k in known)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None

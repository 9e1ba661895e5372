"""What the gate said of each update that had one: what was known before and after, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from perpetune.report import form
from perpetune.report.blocks import Block, Brief, Cell, Column, Columns, Heading, Only, Rows, Table, Text
from perpetune.report.results_schema import Results

MEANING = (
    "Before and after the update the model was asked with the same test examples; figures in %. An update is refused "
    "where a figure falls by more than the bar and the fall is more than chance: one-sided sign test on the examples "
    "whose answer changed, at 5 % for all earlier tasks together, and at 5 % for the single figures (Holm)."
)
VERDICTS = {True: "accepted", False: "refused"}


def section(results: Results) -> list[Block] | None:
    gates = results.get("gates", [])
    if not gates:
        return None
    blocks: list[Block] = [Heading("Gate of updates", "Updates"), Text(MEANING)]
    for gate in gates:
        name = results["tasks"][gate["task"]]["name"]
        table = _table(gate)
        blocks += [Text(said(name, gate), warning=not gate["accepted"]), table]
        if not gate["accepted"]:
            blocks.append(Only("terminal", [table]))
    last = gates[-1]
    line = said(results["tasks"][last["task"]]["name"], last)
    return [*blocks, Brief("update", line, warning=not last["accepted"])]


def said(name: str, gate: Mapping[str, Any]) -> str:
    """One sentence about an update."""
    verdict = f"{name} was {VERDICTS[gate['accepted']]} (bar {gate['max_drop']:g} points)"
    if gate["reason"]:
        return f"{verdict}: the gate cannot judge it, because {gate['reason']}."
    worst = max(gate["rows"], key=lambda row: row["drop"])
    if worst["drop"] <= 0:
        return f"{verdict}: nothing fell."
    fell = f"the largest fall is {worst['name']}, {worst['drop']:.1f} points"
    if gate["accepted"]:
        return f"{verdict}: {fell}."
    count = sum(row["fails"] for row in gate["rows"])
    return (
        f"{verdict}: {form.plural(count, 'figure')} failed, {fell}. The smallest bar that accepts it is "
        f"{gate['needs']:g} points."
    )


def _table(gate: Mapping[str, Any]) -> Table:
    columns: Columns = [
        Column("what", left=True),
        *(Column(title) for title in ("examples", "before", "after", "change", "lost", "won", "chance")),
        Column("says", left=True),
    ]
    rows: Rows = [
        [
            row["name"],
            form.count(row["examples"]),
            form.percent(row["before"]),
            form.percent(row["after"]),
            Cell(form.points(row["after"] - row["before"]), style="down" if row["fails"] else ""),
            "–" if "lost" not in row else str(row["lost"]),
            "–" if "gained" not in row else str(row["gained"]),
            f"{row['chance']:.3f}",
            _verdict(row),
        ]
        for row in gate["rows"]
    ]
    return Table(columns, rows, wrap=True)


def _verdict(row: Mapping[str, Any]) -> str:
    if row["fails"]:
        return "fails"
    if not row["enough"]:
        return "too few examples to tell"
    if row["falls"]:
        return "falls, within the bar"
    return "may be chance" if row["drop"] > 0 else "holds"

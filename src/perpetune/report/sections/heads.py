"""The section about heads that are solved from statistics. It shows the facts that no other section reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from perpetune.report import form
from perpetune.report.blocks import Block, Brief, Column, Columns, Heading, Table, Text
from perpetune.report.results_schema import Results, as_number, facts_of

MEANING = (
    "Some heads are not trained on examples but solved from sums over them, or (drawn) trained on features drawn from "
    "what the sums say; the loss is then the mean of the last epoch. This table has their facts after each task. The "
    "share is the penalty divided by the mean of the features’ sums of squares. The degrees of freedom say how many of "
    "the features the penalty leaves in use. The error is the share of the classes’ variation that predictions for "
    "unseen examples would miss, estimated from the training data only."
)
COLUMNS = {  # the facts with a column, and the column's heading
    "kind": "kind",
    "rows": "examples",
    "dim": "features",
    "penalty": "penalty",
    "share": "share",
    "freedom": "degrees of freedom",
    "error": "error",
    "scale": "scale",
    "solver": "solved (factorisations)",
    "bytes": "statistics",
}
SHOWN = {*COLUMNS, "factorisations", "warning"}  # a warning is in the list of the run's warnings


@dataclass(frozen=True)
class HeadRow:
    """One head after one task: `texts` has the cells in the order of the columns, `more` the facts without a column."""

    number: int
    task: str
    head: str
    texts: list[str]
    more: str


def section(results: Results) -> list[Block] | None:
    listed = rows(results)
    if not listed:
        return None
    more = any(row.more for row in listed)
    columns: Columns = [Column("after", left=True), Column("head", left=True), *headings(results)]
    columns += [Column("more", left=True)] if more else []
    texts = [[f"{row.number} {row.task}", row.head, *row.texts, *([row.more] if more else [])] for row in listed]
    table = Table(columns, texts, limit=30, noun="solution", wrap=True)
    briefs = [Brief(f"head {name}", text, when="end") for name, text in told(results)]
    return [Heading("Heads solved from statistics", "Heads"), Text(MEANING), table, *briefs]


def entries(results: Mapping[str, Any]) -> list[tuple[int, str, Mapping[str, Any]]]:
    """(index of the task, name of the head, its facts) for each head with facts, after each task."""
    return [(task, name, facts) for task, name, facts in facts_of(results) if facts]


def headings(results: Mapping[str, Any]) -> list[str]:
    """The headings of the columns that any head fills."""
    return [COLUMNS[key] for key in _keys(results)]


def rows(results: Mapping[str, Any]) -> list[HeadRow]:
    keys = _keys(results)
    return [
        HeadRow(
            task + 1,
            results["tasks"][task]["name"],
            name,
            [_text(key, facts) for key in keys],
            ", ".join(f"{key} {_plain(value)}" for key, value in facts.items() if key not in SHOWN),
        )
        for task, name, facts in entries(results)
    ]


def told(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """For each head after the last task its name and its facts: `slow`, and `ridge, 2,000 examples, penalty 12.3`."""
    listed = entries(results)
    return [(name, _told(facts)) for task, name, facts in listed if task == listed[-1][0]]


def _told(facts: Mapping[str, Any]) -> str:
    parts = [_text("kind", facts)] if "kind" in facts else []
    parts += [f"{_text('rows', facts)} example{'' if facts['rows'] == 1 else 's'}"] if "rows" in facts else []
    parts += [f"penalty {_text('penalty', facts)}"] if facts.get("penalty") is not None else []
    parts += [f"{_text('freedom', facts)} degrees of freedom"] if facts.get("freedom") is not None else []
    parts += [f"{key} {_plain(value)}" for key, value in facts.items() if key not in SHOWN]
    return ", ".join(parts)


def _keys(results: Mapping[str, Any]) -> list[str]:
    filled = {key for _, _, facts in entries(results) for key, value in facts.items() if value is not None}
    return [key for key in COLUMNS if key in filled]


def _text(key: str, facts: Mapping[str, Any]) -> str:
    value = facts.get(key)
    number = as_number(value)
    if number is not None and key in ("rows", "dim"):
        return form.count(number)
    if number is not None and key == "bytes":
        return form.size(number)
    if key == "solver" and isinstance(value, str) and isinstance(times := facts.get("factorisations"), int):
        return f"{value} ({times})"
    return _plain(value)


def _plain(value: object) -> str:
    if value is None:
        return form.ABSENT
    number = as_number(value)
    return form.setting(value) if number is None else form.number(number)

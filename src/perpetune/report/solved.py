"""Heads that are solved from statistics: what each tells of its last solution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from perpetune.report import form, tree

MEANING = (
    "What the heads that are computed from sums over examples, not trained, say of themselves after each task. A share "
    "is the penalty relative to the mean size of a feature’s sum of squares; degrees of freedom are how many of the "
    "features the penalty leaves in use; the error is the share of the classes’ variation that predictions for unseen "
    "examples would miss, estimated from training data alone."
)
COLUMNS = {  # facts that have a column, and its heading
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
SHOWN = {*COLUMNS, "factorisations", "warning"}  # a warning is among the run's


@dataclass(frozen=True)
class HeadRow:
    """One head after one task; `texts` in the order of the columns, `more` is what has no column."""

    number: int
    task: str
    head: str
    texts: list[str]
    more: str


def entries(results: Mapping[str, Any]) -> list[tuple[int, str, Mapping[str, Any]]]:
    """(index of the task, name of the head, its facts) of each head that tells any, after each task."""
    listed = sorted(results.get("facts", []), key=lambda entry: entry["task"])
    return [
        (entry["task"], name, facts)
        for entry in listed
        for name, facts in entry["of"].items()
        if facts and not tree.is_tree(facts)
    ]


def headings(results: Mapping[str, Any]) -> list[str]:
    """Of the columns that any head fills."""
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


def told(results: Mapping[str, Any]) -> list[str]:
    """`slow: ridge, 2,000 examples, penalty 12.3, 313 degrees of freedom`, for each head, of the last task."""
    found = entries(results)
    return [f"{name}: {_told(facts)}" for task, name, facts in found if task == found[-1][0]]


def _told(facts: Mapping[str, Any]) -> str:
    parts = [_text("kind", facts)] if "kind" in facts else []
    parts += [f"{_text('rows', facts)} example{'' if facts['rows'] == 1 else 's'}"] if "rows" in facts else []
    parts += [f"penalty {_text('penalty', facts)}"] if facts.get("penalty") is not None else []
    parts += [f"{_text('freedom', facts)} degrees of freedom"] if facts.get("freedom") is not None else []
    parts += [f"{key} {_plain(value)}" for key, value in facts.items() if key not in SHOWN]
    return ", ".join(parts)


def _keys(results: Mapping[str, Any]) -> list[str]:
    there = {key for _, _, facts in entries(results) for key, value in facts.items() if value is not None}
    return [key for key in COLUMNS if key in there]


def _text(key: str, facts: Mapping[str, Any]) -> str:
    value = facts.get(key)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and key in ("rows", "dim"):
        return form.count(value)
    if number and key == "bytes":
        return form.size(value)
    if key == "solver" and isinstance(value, str) and isinstance(times := facts.get("factorisations"), int):
        return f"{value} ({times})"
    return _plain(value)


def _plain(value: object) -> str:
    if value is None:
        return form.ABSENT
    if isinstance(value, int | float) and not isinstance(value, bool):
        return form.number(value)
    return form.setting(value)

"""What the model was asked beside its tasks: each exam before the first task and after every task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from perpetune.report.blocks import Block, Brief, Column, Columns, Heading, Rows, Table, Text
from perpetune.report.results_schema import Results
from perpetune.report.sections import recognition, retrieval

ELSEWHERE = {*retrieval.NAMES, *recognition.SHARES, *recognition.NUMBERS, "threshold"}  # sections of their own
MEANING = "Questions beside the tasks. The model learns nothing from them. The columns say when they were asked."


def section(results: Results) -> list[Block] | None:
    rounds = results.get("exams", [])
    every = ((exam, value) for entry in rounds for exam, of in entry["of"].items() for value in of)
    names = list(dict.fromkeys((exam, value) for exam, value in every if value not in ELSEWHERE))
    if not names:
        return None
    columns: Columns = [
        Column("exam", left=True),
        Column("value", left=True),
        *(_when(results, entry) for entry in rounds),
    ]
    rows: Rows = [
        [exam, value, *(_shown(entry["of"].get(exam, {}).get(value)) for entry in rounds)] for exam, value in names
    ]
    return [Heading("Exams", "Exams"), Text(MEANING), Table(columns, rows), *_brief(rounds)]


def _when(results: Results, entry: Mapping[str, Any]) -> str:
    return "before" if entry["task"] is None else f"after {results['tasks'][entry['task']]['name']}"


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _brief(rounds: list[Any]) -> list[Block]:
    """One line with the numbers of the last round."""
    last = rounds[-1]["of"]
    shown = ((exam, value, number) for exam, of in last.items() for value, number in of.items())
    said = [f"{exam} {value} {number:.3f}" for exam, value, number in shown if value not in ELSEWHERE]
    return [Brief("exams", ", ".join(said))] if said else []

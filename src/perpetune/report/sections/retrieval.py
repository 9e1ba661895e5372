"""Whether pictures find their captions and captions their pictures, before the first task and after each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from perpetune.report import form
from perpetune.report.blocks import Block, Brief, Cell, Column, Columns, Heading, Rows, Table, Text
from perpetune.report.results_schema import Results

MEANING = (
    "How often, in %, one of a picture’s own captions is among the first 1, 5 or 10 of all captions, and the same from "
    "a caption to its pictures. A tie counts against the model. Foils: how often the true caption scores higher than "
    "the same caption with one noun exchanged."
)
NAMES = {
    **{f"image_to_text_r{k}": f"picture → text R@{k}" for k in (1, 5, 10)},
    **{f"text_to_image_r{k}": f"text → picture R@{k}" for k in (1, 5, 10)},
    "foils": "foils",
}


def section(results: Results) -> list[Block] | None:
    rounds = results.get("exams", [])
    asked = [
        (exam, key, label)
        for exam in dict.fromkeys(exam for entry in rounds for exam in entry["of"])
        for key, label in NAMES.items()
        if any(key in entry["of"].get(exam, {}) for entry in rounds)
    ]
    if not asked:
        return None
    columns: Columns = [Column("exam", left=True), Column("measure", left=True), *(when(results, e) for e in rounds)]
    table: Rows = [
        [exam, label, *(shown(entry["of"].get(exam, {}).get(key)) for entry in rounds)] for exam, key, label in asked
    ]
    ends = [entry["of"] for entry in (rounds[0], rounds[-1])]
    said = [
        f"{exam} {label} {' → '.join(form.percent(of.get(exam, {}).get(key)) for of in ends)}"
        for exam, key, label in asked
        if key.endswith("_r1")
    ]
    return [
        Heading("Retrieval"),
        Text(MEANING),
        Table(columns, table, limit=30, noun="row", wrap=True),
        Brief("retrieval", ", ".join(said), when="end"),
    ]


def when(results: Results, entry: Mapping[str, Any]) -> Column:
    """The heading of a round of exams."""
    return Column("before" if entry["task"] is None else f"after {results['tasks'][entry['task']]['name']}")


def shown(value: float | None) -> Cell:
    return Cell(form.percent(value), key="" if value is None else value)

"""Transfer, Avg and Last, the figures of continual learning of models that know names, beside the usual ones."""

from __future__ import annotations

from perpetune.report import form
from perpetune.report.blocks import Block, Brief, Column, Columns, Heading, Rows, Table, Text
from perpetune.report.results_schema import Results

FIGURES = (
    ("transfer", "Transfer", "mean on tasks before they are learned: over earlier rows of a column, then over columns"),
    ("average", "Avg", "mean over all cells of the matrix, above its diagonal too"),
    ("last", "Last", "mean of the last row"),
)
ASKED = {
    "task": "Only the classes of the asked task could be answered, learned or not.",
    "class": "All classes of the stream could be answered at every moment, learned or not.",
    "domain": "All classes of the stream could be answered at every moment, learned or not.",
}
OTHERS = (
    "These are other figures than average and final accuracy above, which count learned tasks only. Untouched is a "
    "model that stays as it was before the first task."
)


def section(results: Results) -> list[Block] | None:
    found = results.get("zero_shot")
    if found is None:
        return None
    columns: Columns = [
        Column("figure", left=True),
        Column("%"),
        Column("untouched, %"),
        Column("change, points"),
        Column("meaning", left=True),
    ]
    table: Rows = []
    for key, label, meaning in FIGURES:
        value, before = found[key], found["before"].get(key)  # type: ignore[literal-required]
        change = None if value is None or before is None else value - before
        table.append([label, form.percent(value), form.percent(before), form.points(change), meaning])
    mean, worst = form.points(found["kept_mean"]), form.points(found["kept_worst"])
    kept = (
        f"Before their turn, tasks changed by {mean} points in the mean against the untouched model, {worst} at worst."
    )
    text = ", ".join(f"{label} {form.percent(found[key])}" for key, label, _ in FIGURES)  # type: ignore[literal-required]
    return [
        Heading("Transfer, Avg, Last", "Transfer"),
        Text(f"{ASKED.get(results['setting'], '')} {OTHERS}".strip()),
        Table(columns, table, wrap=True),
        *([Text(kept)] if found["kept_mean"] is not None else []),
        Brief("unlearned too", text, when="end"),
    ]

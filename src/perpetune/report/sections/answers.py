"""The section about other ways to answer: their accuracy beside the method's answer, and the gauges of the method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from perpetune.numerics import metrics
from perpetune.numerics.metrics import Metrics, accuracies, final_accuracy, over_time, summarise, whole_rows
from perpetune.report import form
from perpetune.report.blocks import Block, Brief, Cell, Chart, Column, Columns, Heading, Pair, Panel, Rows, Table, Text
from perpetune.report.document import left_out, measure
from perpetune.report.palette import LIGHT_LINES
from perpetune.report.results_schema import Results
from perpetune.report.sections.curves import MEAN
from perpetune.report.svg import Line

MEANING = (
    "The method can answer in several ways. Each way was tested on the same data. The first way is the method’s "
    "answer; all other figures of this report are about it."
)
ORACLE = "oracle head (diagnosis)"
ORACLE_MEANING = (
    "The oracle head is a diagnosis, not a result of the method. After training it was solved on the training data of "
    "all tasks so far, which the method does not keep, with today’s features. Its gain over the method’s answer shows "
    "how much the method’s own head misses. Its gain over a frozen model shows how much the tuned features are worth."
)
GAUGES = (
    "The gauges show how the method came to its answer. After each task: the mean over the test data of the new task, "
    "and the mean over the earlier tasks (each task has the same weight)."
)


@dataclass(frozen=True)
class Way:
    """One way to answer: its figures, and its mean accuracy on the tasks seen after each task."""

    name: str
    metrics: Metrics
    curve: list[float | None]


@dataclass(frozen=True)
class GaugeRow:
    """Each gauge after one task: its mean on that task and over the earlier tasks, in the order of `gauge_names`."""

    number: int
    task: str
    means: list[tuple[float | None, float | None]]


def section(results: Results) -> list[Block] | None:
    listed, gauges, blocks = ways(results), gauge_rows(results), list[Block]()
    if listed:
        styles = ["strong", *(f"l{i % len(LIGHT_LINES)}" for i in range(1, len(listed)))]
        what = measure(results)
        lines = [Line(way.name, way.curve, style) for way, style in zip(listed, styles, strict=False)]
        # The answer comes last, and so on top.
        chart = Chart(lines[::-1], f"Mean {what} on the tasks seen, by each way to answer")
        columns: Columns = [
            Column("way", left=True),
            *(Column(f"{when} {what}, %", short=f"{when}, %") for when in ("final", "average")),
            "forgetting, points",
        ]
        keys = ("final_accuracy", "average_accuracy", "forgetting")
        rows: Rows = [
            [Cell(way.name, swatch=style), *(form.percent(way.metrics[key]) for key in keys)]  # type: ignore[literal-required]
            for way, style in zip(listed, styles, strict=False)
        ]
        table = Panel([Table(columns, rows)], "Figures", "the headline figures, for each way")
        blocks += [Text(meaning(results)), Pair([Panel([chart], what.capitalize(), MEAN), table])]
        blocks.append(Brief("answers", told(results)))
    if gauges:
        lasts = gauges_told(results)
        headings = [f"{name}, {of}" for name in gauge_names(results) for of in ("new task", "earlier tasks")]
        texts = [
            [f"{row.number} {row.task}", *(form.thousandths(mean) for pair in row.means for mean in pair)]
            for row in gauges
        ]
        after = "; ".join(f"{name}: {text}" for name, text in lasts)
        blocks.append(Text(f"{GAUGES} After the last task: {after}."))
        blocks.append(Table([Column("after", left=True), *headings], texts, limit=30, noun="task"))
        blocks += [Brief(name, text) for name, text in lasts]
    return [Heading("Ways to answer"), *blocks] if blocks else None


def names(results: Mapping[str, Any]) -> list[str]:
    """The names of the other ways to answer, in the order of their first use; the oracle head comes last."""
    others = dict.fromkeys(name for row in results["cells"] for cell in row if cell for name in _others(cell))
    return sorted(others, key=lambda name: name == ORACLE)


def meaning(results: Mapping[str, Any]) -> str:
    """An explanation of the ways to answer; empty if there is no other way."""
    others = names(results)
    parts = [MEANING] if set(others) - {ORACLE} else []
    if ORACLE in others:
        oracle = oracle_head(results)
        trained = (
            f" Head {_head(results)} is trained by gradients, so the oracle uses head {oracle} with default options."
        )
        parts += [ORACLE_MEANING + (trained if oracle != _head(results) else "")]
    return " ".join(parts)


def oracle_head(results: Mapping[str, Any]) -> str | None:
    """The kind of the oracle head; None if there is none."""
    return next((c["oracle"]["head"] for row in results["cells"] for c in row if c and "oracle" in c), None)


def own_name(results: Mapping[str, Any]) -> str:
    """The name of the method's answer beside the other ways. The method gives it; older results do not have it."""
    way = next((cell["way"] for row in results["cells"] for cell in row if cell and cell.get("way")), None)
    return way or ("mixed" if len(set(names(results)) - {ORACLE}) > 1 else "answer")


def answered(results: Results, name: str) -> Results:
    """The run as if the method had answered that way; a cell without that way counts as not measured."""
    cells = [[_cell(cell, name) if cell else None for cell in row] for row in results["cells"]]
    metrics = summarise(cells, results["tasks"], left_out(results), [e["task"] for e in results.get("in_turn", [])])
    return cast(Results, {**results, "cells": cells, "metrics": metrics})


def ways(results: Results) -> list[Way]:
    """The method's answer, then the other ways; empty if there is no other way."""
    others = names(results)
    runs = {own_name(results): results, **{name: answered(results, name) for name in others}} if others else {}
    return [
        Way(name, run["metrics"], over_time(final_accuracy, whole_rows(accuracies(run["cells"]), left_out(run))))
        for name, run in runs.items()
    ]


def gauge_names(results: Mapping[str, Any]) -> list[str]:
    gauges = (name for row in results["cells"] for cell in row if cell for name in cell.get("gauges", {}))
    return list(dict.fromkeys(gauges))


def gauge_rows(results: Mapping[str, Any]) -> list[GaugeRow]:
    """The gauges after each task; empty if there are none."""
    gauges = gauge_names(results)
    rows = []
    for i, row in enumerate(results["cells"] if gauges else []):
        measured = [cell.get("gauges", {}) if cell else {} for cell in row[: i + 1]]
        means = [(_mean(measured[i:], name), _mean(measured[:i], name)) for name in gauges]
        rows.append(GaugeRow(i + 1, results["tasks"][i]["name"], means))
    return rows


def told(results: Results) -> str:
    """`mixed 81.0 %, slow 79.2 %, fast 80.1 %`: the mean over the tasks seen; empty if there is no other way."""
    return ", ".join(f"{way.name} {form.percent(way.metrics['final_accuracy'])} %" for way in ways(results))


def gauges_told(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """`fast weight` and `0.620 on the new task, 0.410 on earlier ones`, for each gauge, after the last task."""
    rows = gauge_rows(results)
    if not rows:
        return []
    lines = []
    for name, (new, old) in zip(gauge_names(results), rows[-1].means, strict=True):
        earlier = f", {form.thousandths(old)} on earlier ones" if old is not None else ""
        lines.append((name, f"{form.thousandths(new)} on the new task{earlier}"))
    return lines


def _others(cell: Mapping[str, Any]) -> Mapping[str, float]:
    others: Mapping[str, float] = cell.get("others", {})
    return {**others, ORACLE: cell["oracle"]["correct"]} if "oracle" in cell else others


def _head(results: Mapping[str, Any]) -> str:
    """The recipe's choice of a head."""
    head = results["recipe"].get("head")
    return str(head.get("name") if isinstance(head, Mapping) else head)


def _cell(cell: Mapping[str, Any], name: str) -> metrics.Cell | None:
    right = _others(cell).get(name)
    if right is None:
        return None
    answered: metrics.Cell = {"correct": right, "total": cell["total"], "per_class": {}}
    return {**answered, "score": cell["score"]} if "score" in cell else answered


def _mean(cells: list[dict[str, float]], name: str) -> float | None:
    values = [cell[name] for cell in cells if name in cell]
    return sum(values) / len(values) if values else None

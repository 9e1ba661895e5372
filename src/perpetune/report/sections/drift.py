"""The section about drift: how far the features of earlier tasks' test data have moved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from perpetune.report import form
from perpetune.report.blocks import Block, Brief, Column, Heading, Heat, HeatCell, HeatRow, Panel, Text
from perpetune.report.palette import heat_level
from perpetune.report.results_schema import Results
from perpetune.report.sections import protection

MEANING = (
    "How far the features of each earlier task’s test data (columns; a few examples of each task) have moved since the "
    "task was learned, after each task (rows). The figure is the mean distance between the old and the new feature, "
    "each scaled to length 1: 0 means that they are equal, 2 means that they are opposite."
)
CERTIFIED = (
    "The last columns have the certificate of protection: how far the outputs of the sites, inside the net, have moved "
    "on the training data. The drift shows the result at the end of the net."
)
STILL = "The features have not moved at all."


def section(results: Results) -> list[Block] | None:
    if not moved(results):
        return None
    last = told(results)
    note = Text(f"After the last task: {last}. {meaning(results)}" if last else meaning(results))
    tables = [] if still(results) else [Panel([table(results)])]
    return [Heading("Drift of old features", "Drift"), note, *tables, *([Brief("drift", last)] if last else [])]


def moved(results: Mapping[str, Any]) -> dict[int, dict[str, float]]:
    """For each task's index, the distances of the earlier tasks' features after that task, by task name."""
    listed = sorted(results.get("drift", []), key=lambda entry: entry["task"])
    return {entry["task"]: entry["of"] for entry in listed if entry["of"]}


def final(results: Mapping[str, Any]) -> float | None:
    """The mean distance over the earlier tasks, after the last task."""
    return _mean(moved(results).get(len(results["cells"]) - 1, {}))


def still(results: Mapping[str, Any]) -> bool:
    """Whether no feature has moved after any task."""
    return not any(value for of in moved(results).values() for value in of.values())


def table(results: Mapping[str, Any]) -> Heat:
    """The distances as a matrix, like the accuracy matrix. The darkest colour stands for the largest distance."""
    distances = moved(results)
    names = [task["name"] for task in results["tasks"]][: max(distances, default=0)]  # no task comes after the last one
    largest = max((value for of in distances.values() for value in of.values()), default=0.0)
    certificates = {entry["task"]: entry for entry in protection.after_tasks(results)}
    rows = []
    for i, of in distances.items():
        name, entry = results["tasks"][i]["name"], certificates.get(i)
        cells = [_cell(of.get(other), other, name, largest) for other in names]
        beside = [form.relative(entry[key], 1) if entry else form.ABSENT for key in ("median", "worst")]
        rows.append(HeatRow(str(i + 1), name, cells, form.thousandths(_mean(of)), beside if certificates else ()))
    hint = "certificate: outputs at the {} site"
    sites = [Column(f"outputs, {s} site", hint=hint.format(s), short=f"{s} site") for s in ("median", "worst")]
    mean = Column("mean", short="mean drift")
    return Heat("Drift of old features", "after", names, rows, mean, sites if certificates else ())


def told(results: Mapping[str, Any]) -> str:
    """`features of earlier tasks moved 0.012 (farthest task-1, 0.034)`, after the last task; empty if not measured."""
    of, mean = moved(results).get(len(results["cells"]) - 1, {}), final(results)
    if mean is None:
        return ""
    farthest = max(of, key=lambda name: of[name])
    more = f" (farthest {farthest}, {form.thousandths(of[farthest])})" if len(of) > 1 and of[farthest] else ""
    return f"features of earlier tasks moved {form.thousandths(mean)}{more}"


def meaning(results: Mapping[str, Any]) -> str:
    parts = [MEANING, *([CERTIFIED] if protection.after_tasks(results) else []), *([STILL] if still(results) else [])]
    return " ".join(parts)


def _cell(value: float | None, of: str, after: str, largest: float) -> HeatCell | None:
    if value is None:
        return None
    level = heat_level(value / largest if largest else 0.0)
    return HeatCell(form.thousandths(value), level, "kept", f"{of} after {after}: moved {form.thousandths(value)}")


def _mean(of: Mapping[str, float]) -> float | None:
    return sum(of.values()) / len(of) if of else None

"""Facts about a whole results document: what it measures, the recipe's choices, the costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from perpetune.report import form
from perpetune.report.results_schema import Results

BYTES_PER_PARAMETER = 4  # the backbone is compared as float32
SETTINGS = {"class": "class-incremental", "domain": "domain-incremental", "task": "task-incremental"}
AXES = ("backbone", "method", "pet", "protect", "average", "head")


def backbone_bytes(results: Results) -> int | None:
    parameters = results["backbone_parameters"]
    return None if parameters is None else parameters * BYTES_PER_PARAMETER


def learn_seconds(results: Results) -> float | None:
    return sum(t["learn_s"] for t in results["timings"]) if results["timings"] else None


def peak_memory(results: Results) -> int | None:
    return max((m for t in results["timings"] if (m := t["peak_memory_bytes"]) is not None), default=None)


def per_second(results: Results, key: Literal["images_per_s", "tokens_per_s"]) -> float | None:
    """The training speed over the whole run, in images (or other examples) or in tokens per second."""
    timed = [(t["learn_s"], speed) for t in results["timings"] if (speed := t.get(key)) is not None]
    seconds = sum(s for s, _ in timed)
    return sum(s * speed for s, speed in timed) / seconds if seconds else None


def left_out(results: Mapping[str, Any]) -> set[int]:
    """The numbers of the rows in which earlier tasks were not asked; the mean of such a row is not known."""
    return {int(entry["task"]) for entry in results.get("not_asked", [])}


def sampled(results: Mapping[str, Any]) -> bool:
    """Whether any cell is of a sample of a task's test data, or the last row of a part of the tasks."""
    if any(entry["task"] == len(results["cells"]) - 1 for entry in results.get("in_turn", [])):
        return True
    return any("of" in cell for row in results["cells"] for cell in row if cell)


def examples(results: Mapping[str, Any]) -> str:
    """The word for the run's examples, from the backbone's view; in older documents the head shows it."""
    if results.get("examples"):
        return str(results["examples"])
    head = results["recipe"].get("head")
    name = head.get("name") if isinstance(head, Mapping) else head
    return "examples" if name == "lm" else "images"


def scores(results: Mapping[str, Any]) -> list[str]:
    """The name of each task's score; empty if answers are right or wrong, or if nothing is measured."""
    rows, columns = results["cells"], range(len(results["tasks"]))
    return [next((row[j].get("score", "") for row in rows if j < len(row) and row[j]), "") for j in columns]


def classed(results: Mapping[str, Any]) -> bool:
    """Whether any task has classes. If no task has classes, all answers are free text."""
    return any(task["classes"] for task in results["tasks"])


def measure(results: Mapping[str, Any]) -> str:
    """The word for the figures: `score` if any task has a score, else `accuracy`."""
    return "score" if any(scores(results)) else "accuracy"


def choices(recipe: Mapping[str, Any]) -> dict[str, str]:
    """The name of the recipe's choice on each axis, without axes that are absent or empty."""
    chosen = {}
    for axis in AXES:
        value = recipe.get(axis)
        name = value.get("name") if isinstance(value, Mapping) else value
        if axis == "protect" and isinstance(value, Mapping):
            controlled = {"random": "random directions, ", "none": "only measured, "}
            name = f"{controlled.get(value.get('directions', ''), '')}energy {form.setting(value.get('energy'))}"
        if axis == "average" and isinstance(value, Mapping):
            given = "keep" if value.get("keep") is not None else "weight"
            name = f"{given} {form.setting(value.get(given))}, {value.get('answer')}"
        if isinstance(name, str) and name:
            chosen[axis] = name
    return chosen


def setting(results: Results) -> str:
    """The setting in words: which labels the model must tell apart. For texts it is `task after task`."""
    if examples(results) == "images":
        return SETTINGS.get(results["setting"], results["setting"])
    return "task after task"

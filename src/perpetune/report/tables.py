"""From a results document to the rows that every report shows: tasks, classes, storage, time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from perpetune.numerics.metrics import (
    accuracies,
    final_accuracy,
    forgetting,
    over_time,
    per_class_counts,
    seen_cells,
    task_forgetting,
)
from perpetune.report import form
from perpetune.report.results_schema import Results

BYTES_PER_PARAMETER = 4  # the backbone is compared as float32
AXES = ("backbone", "method", "pet", "protect", "head")


@dataclass(frozen=True)
class TaskRow:
    """One task: accuracy right after it was learned, now, and lost since it was best (shares). `score` is what it is
    measured by where answers are not right or wrong."""

    number: int
    name: str
    classes: list[str]
    train: int
    test: int
    learned: float | None
    now: float | None
    forgotten: float | None
    score: str


@dataclass(frozen=True)
class ClassRow:
    """One class over all tasks learned that have it: right answers (or the sum of scores) and test
    examples now, accuracy right after learning, accuracy now, and the difference."""

    name: str
    tasks: list[int]
    correct: float
    total: int
    learned: float | None
    now: float | None
    change: float | None


@dataclass(frozen=True)
class StorageRow:
    """One kind of file: bytes of the last task's, and of all tasks together."""

    kind: str
    last: int
    total: int


@dataclass(frozen=True)
class Curves:
    """Figures as they stood after each task: one value per task learned; `tasks[j]` holds task j's
    accuracy after each task, None before it was learned."""

    accuracy: list[float | None]
    forgetting: list[float | None]
    tasks: list[list[float | None]]


def curves(results: Results) -> Curves:
    A = accuracies(results["cells"])
    tasks = [[row[j] if i >= j and j < len(row) else None for i, row in enumerate(A)] for j in range(len(A))]
    return Curves(over_time(final_accuracy, A), over_time(forgetting, A), tasks)


def task_rows(results: Results) -> list[TaskRow]:
    A, measured = accuracies(results["cells"]), scores(results)
    rows = []
    for j, task in enumerate(results["tasks"]):
        seen = [row[j] if j < len(row) else None for row in A[j:]]
        learned, now = (seen[0], seen[-1]) if seen else (None, None)
        lost = task_forgetting(A, j) if len(seen) > 1 else None
        about = (j + 1, task["name"], task["classes"], task["train"], task["test"])
        rows.append(TaskRow(*about, learned, now, lost, measured[j]))
    return rows


def class_rows(results: Results) -> list[ClassRow]:
    """Classes in the order in which the stream brings them; those without a measured cell are absent."""
    cells = results["cells"]
    diagonal = [cell for i, row in enumerate(cells) if i < len(row) and (cell := row[i]) is not None]
    now, learned = per_class_counts(seen_cells(cells)), per_class_counts(diagonal)
    members: dict[str, list[int]] = {}
    for task in results["tasks"][: len(cells)]:
        for name in task["classes"]:
            members.setdefault(name, []).append(task["index"] + 1)
    rows = []
    for name in dict.fromkeys([*members, *now]):
        if name not in now:
            continue
        correct, total = now[name]
        after, before = _share(correct, total), _share(*learned.get(name, (0, 0)))
        change = None if after is None or before is None else after - before
        rows.append(ClassRow(name, members.get(name, []), correct, total, before, after, change))
    return rows


def storage_rows(results: Results) -> list[StorageRow]:
    """Kinds of file in the order in which they first occur."""
    entries = sorted(results["storage"], key=lambda entry: entry["task"])
    kinds = dict.fromkeys(kind for entry in entries for kind in entry if kind != "task")
    return [StorageRow(k, entries[-1].get(k, 0), sum(entry.get(k, 0) for entry in entries)) for k in kinds]


def stored_bytes(results: Results) -> int:
    return sum(row.total for row in storage_rows(results))


def backbone_bytes(results: Results) -> int | None:
    parameters = results["backbone_parameters"]
    return None if parameters is None else parameters * BYTES_PER_PARAMETER


def learn_seconds(results: Results) -> float | None:
    return sum(t["learn_s"] for t in results["timings"]) if results["timings"] else None


def peak_memory(results: Results) -> int | None:
    return max((m for t in results["timings"] if (m := t["peak_memory_bytes"]) is not None), default=None)


def per_second(results: Results, key: Literal["images_per_s", "tokens_per_s"]) -> float | None:
    """Training throughput over the whole run, of the tasks that trained on images (or other examples), or on tokens."""
    timed = [(t["learn_s"], speed) for t in results["timings"] if (speed := t.get(key)) is not None]
    seconds = sum(s for s, _ in timed)
    return sum(s * speed for s, speed in timed) / seconds if seconds else None


def examples(results: Mapping[str, Any]) -> str:
    """What the run learns from, as its backbone's view calls it; older documents do not say it, and their head does."""
    if results.get("examples"):
        return str(results["examples"])
    head = results["recipe"].get("head")
    name = head.get("name") if isinstance(head, Mapping) else head
    return "examples" if name == "lm" else "images"


def scores(results: Mapping[str, Any]) -> list[str]:
    """What scores each task's answers; empty where they are right or wrong, or nothing is measured."""
    rows, columns = results["cells"], range(len(results["tasks"]))
    return [next((row[j].get("score", "") for row in rows if j < len(row) and row[j]), "") for j in columns]


def classed(results: Mapping[str, Any]) -> bool:
    """Whether any task has classes; where none has, all answers are free text."""
    return any(task["classes"] for task in results["tasks"])


def measure(results: Mapping[str, Any]) -> str:
    """What the figures are: `score` where any task has one, else `accuracy`."""
    return "score" if any(scores(results)) else "accuracy"


def choices(recipe: Mapping[str, Any]) -> dict[str, str]:
    """The recipe's choice on each axis, by name; an axis that is absent or empty is left out."""
    chosen = {}
    for axis in AXES:
        value = recipe.get(axis)
        name = value.get("name") if isinstance(value, Mapping) else value
        if axis == "protect" and isinstance(value, Mapping):
            controlled = {"random": "random directions, ", "none": "only measured, "}
            name = f"{controlled.get(value.get('directions', ''), '')}energy {form.setting(value.get('energy'))}"
        if isinstance(name, str) and name:
            chosen[axis] = name
    return chosen


def recipe_yaml(recipe: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=100)


def _share(correct: float, total: int) -> float | None:
    return correct / total if total else None

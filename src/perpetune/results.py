"""What a state folder says of its run, as one plain document: for reports, comparisons and the live view."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType
from typing import Any

from perpetune.errors import StateError
from perpetune.numerics.metrics import Rows, accuracy, summarise
from perpetune.numerics.transfer import summarise as summarise_transfer
from perpetune.snapshot import FILES, FIXED
from perpetune.state import DOCUMENTS, Committed, State

Documents = Mapping[str, Mapping[str, Any]]
"""What a commit stores of a task in JSON, by the name of the file."""
PACKAGES = ("perpetune", "torch", "transformers", "timm", "accelerate", "numpy", "safetensors")


@functools.cache
def versions() -> Mapping[str, str]:
    """Versions of the interpreter and of the installed packages that decide numbers."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return MappingProxyType(found)


class Results(dict[str, Any]):
    """A results document. Its `cells`, one for each two tasks, are made when somebody reads them for the first time.

    A month of a state with a thousand tasks needs few of them, and a table of a million takes as long as the rest of a
    commit. In all else it is a dict, also for `json` and `**`; a copy of it is a plain one.

    Args:
        parts: the other entries, and `cells` in its place with any value.
        cells: makes them.
    """

    def __init__(self, parts: Mapping[str, Any], cells: Callable[[], list[list[Any]]]):
        super().__init__(parts)
        self._make: Callable[[], list[list[Any]]] | None = cells

    def made(self) -> Results:
        """The same, with its cells."""
        if self._make is not None:
            make, self._make = self._make, None
            dict.__setitem__(self, "cells", make())
        return self

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(key) if key != "cells" else dict.__getitem__(self.made(), key)

    def get(self, key: str, default: Any = None) -> Any:
        return dict.get(self.made() if key == "cells" else self, key, default)

    def __eq__(self, other: object) -> bool:
        other = other.made() if isinstance(other, Results) else other
        return dict.__eq__(self.made(), other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __reduce__(self) -> Any:
        return dict, (dict(self.made()),)


def _of_the_whole(name: str) -> Any:
    method: Callable[..., Any] = getattr(dict, name)

    @functools.wraps(method)
    def whole(self: Results, *given: Any, **named: Any) -> Any:
        return method(self.made(), *given, **named)

    return whole


# `__iter__` too: a class without its own is read past `__getitem__` by `dict` and by `**`.
for _name in (
    "__iter__", "__repr__", "__setitem__", "__delitem__", "__or__", "__ior__", "items", "values", "copy", "pop",
    "popitem", "setdefault", "update", "clear",
):  # fmt: skip
    setattr(Results, _name, _of_the_whole(_name))


def read_results(state: State, candidate: Documents | None = None) -> dict[str, Any]:
    """The results document; `perpetune.report` renders it and names its fields. Its parts are shared with other
    documents of the same state: do not change them.

    Args:
        candidate: of a task that is not committed, the documents that its commit would store; it is counted as the last
            one.
    """
    if candidate is None:
        found = state.together(_Found, _Found.add)
    else:
        found = _Found()
        for committed in state.committed:
            found.add(committed)
        found.put(_parts(len(found.tasks), [candidate[name] for name in DOCUMENTS], "the candidate"))
    found.look_at_disks(state.committed)
    journal = state.journal()
    begun: dict[str, Any] = next((e for e in reversed(journal) if e["event"] == "run begun"), {})
    backbone, tasks, joined = state.backbone, list(found.tasks), {key: list(of) for key, of in found.joined.items()}
    left_out, in_turn = joined["not_asked"], joined["in_turn"]
    parts = {
        "format": 1,
        "name": state.recipe.name,
        "setting": state.recipe.setting,
        "seed": state.recipe.seed,
        "tasks": tasks,
        "cells": None,
        "metrics": summarise(
            found.cells,
            _candidates(tasks, found.ahead) if state.recipe.setting == "class" else tasks,
            [entry["task"] for entry in left_out],
            [entry["task"] for entry in in_turn],
            found.rows,
            found.whole,
        ),
        **({"not_asked": left_out} if left_out else {}),
        **({"in_turn": in_turn} if in_turn else {}),
        "timings": found.timings(journal),
        "storage": [one for one in found.storage if one],
        "disk": [one for one in found.disk if one],
        "protection": joined["protection"],
        "facts": list(found.facts),
        "drift": list(found.drift),
        **{name: joined[name] for name in ("exams", "gates", "forgot") if joined[name]},
        **_zero_shot(tasks, found),
        "examples": backbone.get("examples"),
        "trainable_parameters": backbone.get("trainable_parameters"),
        "backbone_parameters": backbone.get("parameters"),
        "bad_files": joined["bad"],
        "warnings": list(found.warnings),
        "recipe": state.recipe.model_dump(mode="json"),
        "versions": begun.get("versions", {}),
        "device": begun.get("device", ""),
        "complete": begun.get("tasks") is None or len(tasks) >= begun["tasks"],
        "extra": {},
    }
    return Results(parts, partial(_square, found.cells, len(tasks)))


def _square(rows: Sequence[Sequence[Any]], count: int) -> list[list[Any]]:
    """The cells of the first tasks: rows of one length. What tasks after them add stands behind these."""
    return [[*row[:count], *[None] * (count - len(row))] for row in rows[:count]]


class _Found:
    """What the documents of all tasks say. A task is added once, and adding it costs what its documents hold."""

    def __init__(self) -> None:
        self.tasks: list[dict[str, Any]] = []
        self.cells: list[list[Any]] = []
        """Of each task a row that ends with its last cell."""
        self.rows, self.whole = Rows(), Rows()
        self.ahead: list[dict[str, Any]] = []
        """The cells of tasks that were asked before they were learned; none if nothing was before the first task."""
        self.facts: list[dict[str, Any]] = []
        self.drift: list[dict[str, Any]] = []
        self.storage: list[dict[str, Any] | None] = []
        self.disk: list[dict[str, Any] | None] = []
        self.warnings: dict[str, None] = {}
        self.joined: dict[str, list[Any]] = {
            key: [] for key in ("not_asked", "in_turn", "exams", "protection", "gates", "forgot", "bad")
        }
        self._timings: list[dict[str, Any]] = []
        self._heard = 0  # lines of the journal that were read for them
        self._place: dict[str, int] = {}
        self._early: dict[str, list[tuple[int, Any, float | None]]] = {}  # cells of tasks that were not learned then
        self._looked: list[Committed | None] = []

    def add(self, committed: Committed) -> None:
        """Add a task that is committed."""
        self.put(committed.once("results", tuple(DOCUMENTS), partial(_results_of, committed)))

    def put(self, one: Mapping[str, Any]) -> None:
        """Add what `_parts` found of the next task."""
        index, name = len(self.tasks), one["task"]["name"]
        self.tasks.append(one["task"])
        self._place[name] = index
        for row, cell, right in self._early.pop(name, ()):
            self._set(row, index, cell, right)
        self.cells.append([])
        self.rows.append({})
        for other, cell in one["cells"].items():
            right = one["accuracies"].get(other)
            if other in self._place:
                self._set(index, self._place[other], cell, right)
            else:
                self._early.setdefault(other, []).append((index, cell, right))
        self.whole.append({} if one["not_asked"] else self.rows[-1])
        if one["before"]:
            self.ahead.append({"task": None, "of": one["before"]})
        unlearned = {other: cell for other, cell in one["cells"].items() if other not in self._place}
        if self.ahead and unlearned:
            self.ahead.append({"task": index, "of": unlearned})
        self.facts.append(one["facts"])
        self.drift.append(one["drift"])
        self.storage.append(None)
        self.disk.append(None)
        self._looked.append(None)
        self.warnings.update(dict.fromkeys(one["warnings"]))
        for key, of in self.joined.items():
            of += one[key]
        self._timings.append(one["timing"])

    def _set(self, row: int, column: int, cell: Any, right: float | None) -> None:
        line = self.cells[row]
        line += [None] * (column + 1 - len(line))
        line[column] = cell
        if right is not None:
            self.rows[row][column] = right

    def timings(self, journal: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """How long each task took, with what only the journal says."""
        for event in journal[self._heard :]:
            if event["event"] == "task timed" and event["name"] in self._place:
                index = self._place[event["name"]]
                self._timings[index] = {**self._timings[index], **{k: event[k] for k in ("commit_s", "report_s")}}
        self._heard = len(journal)
        return list(self._timings)

    def look_at_disks(self, tasks: Sequence[Committed]) -> None:
        """Find what each task takes on the disk, where it was pruned since that was found last."""
        for index in [i for i, (now, then) in enumerate(zip(tasks, self._looked, strict=False)) if now is not then]:
            self.storage[index], self.disk[index] = _disk_of(tasks[index])
            self._looked[index] = tasks[index]


def _results_of(committed: Committed) -> dict[str, Any]:
    """What the documents of one task say, in the parts of a results document."""
    return _parts(committed.index, [committed.parsed(name) for name in DOCUMENTS], str(committed.folder))


def _disk_of(committed: Committed) -> tuple[dict[str, Any], dict[str, Any]]:
    """The sizes of a task's files, and the bytes of tensors in its folder."""
    sizes, tensors = committed.stored()
    index = committed.index
    return {"task": index, **{n: sizes[n] for n in (*FILES, *FIXED) if n in sizes}}, {"task": index, "bytes": tensors}


def _parts(index: int, documents: Sequence[Mapping[str, Any]], where: str) -> dict[str, Any]:
    """What the documents of a task say, without what it stores."""
    task, metrics, timing = documents
    try:
        exams = [(None, metrics.get("exams_before")), (index, metrics.get("exams"))]
        return {
            "task": {k: task[k] for k in ("index", "name", "classes", "train", "test", "fingerprint")},
            "cells": dict(metrics["cells"]),
            "accuracies": {name: a for name, cell in metrics["cells"].items() if (a := accuracy(cell)) is not None},
            "before": metrics.get("cells_before"),
            "exams": [{"task": number, "of": taken} for number, taken in exams if taken],
            "protection": [{"task": index, **found} for found in metrics.get("protection", [])],
            "facts": {"task": index, "of": metrics.get("facts", {})},
            "drift": {"task": index, "of": metrics.get("drift", {})},
            "timing": {"task": index, **timing},
            "not_asked": [{"task": index, "of": list(of)} for of in [metrics.get("not_asked")] if of],
            "in_turn": [{"task": index, "count": count} for count in [metrics.get("unasked")] if count],
            "gates": [{"task": index, **gate} for gate in [metrics.get("gate")] if gate],
            "forgot": [{"task": index, **forgot} for forgot in [task.get("forgot")] if forgot is not None],
            "bad": [{"task": index, **_file_and_reason(entry)} for entry in task["bad"]],
            "warnings": list(task["warnings"]),
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StateError(f"{where} does not hold what a task leaves there: {error!r}") from None


def _candidates(tasks: Sequence[Mapping[str, Any]], ahead: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The tasks with the classes among which they were asked. If tasks are asked ahead, it is the whole stream's."""
    if not ahead:
        return tasks
    every = {name for task in tasks for name in task["classes"]}
    every |= {name for cell in ahead[0]["of"].values() if cell for name in cell["per_class"]}
    return [{"classes": sorted(every)} for _ in tasks]


def _zero_shot(tasks: Sequence[Mapping[str, Any]], found: _Found) -> dict[str, Any]:
    """What is known of tasks that were asked before they were learned, and the figures of it; nothing if none was."""
    if not found.ahead:
        return {}
    before = [found.ahead[0]["of"].get(task["name"]) for task in tasks]
    cells = _square(found.cells, len(tasks))
    return {"unlearned": list(found.ahead), "zero_shot": summarise_transfer(cells, [before])}


def _file_and_reason(entry: str) -> dict[str, str]:
    """The parts of `file: reason`."""
    file, _, reason = entry.partition(": ")
    return {"file": file, "reason": reason}

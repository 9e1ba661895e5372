"""What a state folder says of its run, as one plain document: for reports, comparisons and the live view."""

from __future__ import annotations

import functools
import platform
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType
from typing import Any

from perpetune.errors import StateError
from perpetune.numerics.metrics import Cells, Rows, accuracy, summarise
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


def read_results(state: State, candidate: Documents | None = None) -> dict[str, Any]:
    """The results document; `perpetune.report` renders it and names its fields. Its parts are shared with other
    documents of the same state: do not change them.

    Args:
        candidate: of a task that is not committed, the documents that its commit would store; it is counted as the last
            one.
    """
    journal = state.journal()
    timed = {e["name"]: {k: e[k] for k in ("commit_s", "report_s")} for e in journal if e["event"] == "task timed"}
    found = [
        committed.once("results", tuple(DOCUMENTS), partial(_results_of, committed)) for committed in state.committed
    ]
    if candidate is not None:
        found.append(_parts(len(found), [candidate[name] for name in DOCUMENTS], "the candidate"))
    tasks = [one["task"] for one in found]
    place = {task["name"]: column for column, task in enumerate(tasks)}
    cells = _matrix([one["cells"] for one in found], place)
    rows = Rows({place[n]: a for n, a in one["accuracies"].items() if n in place} for one in found)
    timings = [{**one["timing"], **timed.get(one["task"]["name"], {})} for one in found]
    ahead = _ahead(found)
    left_out, in_turn, exams = (_joined(found, key) for key in ("not_asked", "in_turn", "exams"))
    begun: dict[str, Any] = next((e for e in reversed(journal) if e["event"] == "run begun"), {})
    backbone = state.backbone
    return {
        "format": 1,
        "name": state.recipe.name,
        "setting": state.recipe.setting,
        "seed": state.recipe.seed,
        "tasks": tasks,
        "cells": cells,
        "metrics": summarise(
            cells,
            _candidates(tasks, ahead) if state.recipe.setting == "class" else tasks,
            [entry["task"] for entry in left_out],
            [entry["task"] for entry in in_turn],
            rows,
        ),
        **({"not_asked": left_out} if left_out else {}),
        **({"in_turn": in_turn} if in_turn else {}),
        "timings": timings,
        "storage": [one["storage"] for one in found if one["storage"]],
        "disk": [one["disk"] for one in found if one["disk"]],
        "protection": _joined(found, "protection"),
        "facts": [one["facts"] for one in found],
        "drift": [one["drift"] for one in found],
        **({"exams": exams} if exams else {}),
        **{name: some for name in ("gates", "forgot") if (some := _joined(found, name))},
        **_zero_shot(tasks, cells, ahead),
        "examples": backbone.get("examples"),
        "trainable_parameters": backbone.get("trainable_parameters"),
        "backbone_parameters": backbone.get("parameters"),
        "bad_files": _joined(found, "bad"),
        "warnings": list(dict.fromkeys(_joined(found, "warnings"))),
        "recipe": state.recipe.model_dump(mode="json"),
        "versions": begun.get("versions", {}),
        "device": begun.get("device", ""),
        "complete": begun.get("tasks") is None or len(tasks) >= begun["tasks"],
        "extra": {},
    }


def _results_of(committed: Committed) -> dict[str, Any]:
    """What the documents of one task say, in the parts of a results document."""
    sizes, tensors = committed.stored()
    found = _parts(committed.index, [committed.parsed(name) for name in DOCUMENTS], str(committed.folder))
    found["storage"] = {"task": committed.index, **{n: sizes[n] for n in (*FILES, *FIXED) if n in sizes}}
    found["disk"] = {"task": committed.index, "bytes": tensors}
    return found


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
            "storage": None,
            "disk": None,
            "bad": [{"task": index, **_file_and_reason(entry)} for entry in task["bad"]],
            "warnings": list(task["warnings"]),
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StateError(f"{where} does not hold what a task leaves there: {error!r}") from None


def _joined(found: Sequence[Mapping[str, Any]], key: str) -> list[Any]:
    return [entry for one in found for entry in one[key]]


def _ahead(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The cells of tasks that were asked before they were learned; none if nothing was asked before the first task."""
    ahead, known = list[dict[str, Any]](), set[str]()
    for index, one in enumerate(found):
        known.add(one["task"]["name"])
        if one["before"]:
            ahead.append({"task": None, "of": one["before"]})
        if ahead and (unlearned := {name: cell for name, cell in one["cells"].items() if name not in known}):
            ahead.append({"task": index, "of": unlearned})
    return ahead


def _matrix(rows: Sequence[Mapping[str, Any]], place: Mapping[str, int]) -> list[list[Any]]:
    """Rows of cells with a column for each place; None where a row has no such cell."""
    cells = []
    for row in rows:
        line: list[Any] = [None] * len(place)
        for name, cell in row.items():
            if name in place:
                line[place[name]] = cell
        cells.append(line)
    return cells


def _candidates(tasks: Sequence[Mapping[str, Any]], ahead: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The tasks with the classes among which they were asked. If tasks are asked ahead, it is the whole stream's."""
    if not ahead:
        return tasks
    every = {name for task in tasks for name in task["classes"]}
    every |= {name for cell in ahead[0]["of"].values() if cell for name in cell["per_class"]}
    return [{"classes": sorted(every)} for _ in tasks]


def _zero_shot(tasks: Sequence[Mapping[str, Any]], cells: Cells, ahead: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is known of tasks that were asked before they were learned, and the figures of it; nothing if none was."""
    if not ahead:
        return {}
    before = [ahead[0]["of"].get(task["name"]) for task in tasks]
    return {"unlearned": list(ahead), "zero_shot": summarise_transfer(cells, [before])}


def _file_and_reason(entry: str) -> dict[str, str]:
    """The parts of `file: reason`."""
    file, _, reason = entry.partition(": ")
    return {"file": file, "reason": reason}

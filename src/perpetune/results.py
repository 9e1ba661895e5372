"""What a state folder says of its run, as one plain document: for reports, comparisons and the live view."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from perpetune.errors import StateError
from perpetune.numerics.metrics import Cells, summarise
from perpetune.numerics.transfer import summarise as summarise_transfer
from perpetune.snapshot import FILES, FIXED
from perpetune.state import DOCUMENTS, State

PACKAGES = ("perpetune", "torch", "transformers", "timm", "accelerate", "numpy", "safetensors")


def versions() -> dict[str, str]:
    """Versions of the interpreter and of the installed packages that decide numbers."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def read_results(state: State) -> dict[str, Any]:
    """The results document; `perpetune.report` renders it and names its fields."""
    tasks, rows, timings, storage, disk = [], [], [], [], []
    protection: list[dict[str, Any]] = []
    facts, drift, exams = [], [], list[dict[str, Any]]()
    ahead: list[dict[str, Any]] = []
    bad: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    journal = state.journal()
    timed = {e["name"]: {k: e[k] for k in ("commit_s", "report_s")} for e in journal if e["event"] == "task timed"}
    warnings: list[str] = []
    for committed in state.committed:
        files, (sizes, tensors) = committed.read(*DOCUMENTS), committed.stored()
        task, metrics, timing = (committed.document(files, name) for name in DOCUMENTS)
        try:
            tasks.append({k: task[k] for k in ("index", "name", "classes", "train", "test", "fingerprint")})
            rows.append(dict(metrics["cells"]))
            protection += [{"task": committed.index, **found} for found in metrics.get("protection", [])]
            facts.append({"task": committed.index, "of": metrics.get("facts", {})})
            known = {t["name"] for t in tasks}
            if zero := metrics.get("cells_before"):
                ahead.append({"task": None, "of": zero})
            if ahead and (unlearned := {name: cell for name, cell in rows[-1].items() if name not in known}):
                ahead.append({"task": committed.index, "of": unlearned})
            if before := metrics.get("exams_before"):
                exams.append({"task": None, "of": before})
            if after := metrics.get("exams"):
                exams.append({"task": committed.index, "of": after})
            drift.append({"task": committed.index, "of": metrics.get("drift", {})})
            timings.append({"task": committed.index, **timing, **timed.get(committed.name, {})})
            if not_asked := metrics.get("not_asked"):
                left_out.append({"task": committed.index, "of": list(not_asked)})
            storage.append({"task": committed.index, **{n: sizes[n] for n in (*FILES, *FIXED) if n in sizes}})
            disk.append({"task": committed.index, "bytes": tensors})
            bad += [{"task": committed.index, **_file_and_reason(entry)} for entry in task["bad"]]
            warnings += task["warnings"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StateError(f"{committed.folder} does not hold what a task leaves there: {error!r}") from None
    cells = [[row.get(t["name"]) for t in tasks] for row in rows]
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
        ),
        **({"not_asked": left_out} if left_out else {}),
        "timings": timings,
        "storage": storage,
        "disk": disk,
        "protection": protection,
        "facts": facts,
        "drift": drift,
        **({"exams": exams} if exams else {}),
        **_zero_shot(tasks, cells, ahead),
        "examples": backbone.get("examples"),
        "trainable_parameters": backbone.get("trainable_parameters"),
        "backbone_parameters": backbone.get("parameters"),
        "bad_files": bad,
        "warnings": list(dict.fromkeys(warnings)),
        "recipe": state.recipe.model_dump(mode="json"),
        "versions": begun.get("versions", {}),
        "device": begun.get("device", ""),
        "complete": begun.get("tasks") is None or len(tasks) >= begun["tasks"],
        "extra": {},
    }


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

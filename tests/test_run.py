"""What the loop over tasks does with a checkpoint whose recipe has changed since, and what it tells of each task."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from test_faults import learned as committed_files
from tiny import picture_folder, recipe, seal, split_folder, task_files, vit_folder

from perpetune.drifting import FEATURES
from perpetune.errors import Interrupted, StateError
from perpetune.files import read_folder, to_json, write_folder
from perpetune.heads import NCM
from perpetune.learner import Learner
from perpetune.report import checked
from perpetune.results import read_results
from perpetune.runtime import Silent
from perpetune.snapshot import SUMS
from perpetune.state import State

RECIPE = {
    "backbone": "perpetune:micro",
    "pet": {"name": "lora", "rank": 2, "blocks": [-1]},
    "train": {"epochs": 2, "batch_size": 4, "lr": 0.01},
    "data": "digits",
    "stream": {"classes_per_task": 2, "class_order": ["0", "1"], "train_per_class": 8, "test_per_class": 2},
    "run": {"device": "cpu", "checkpoint_every": 1},
}


class StopsAt(Silent):
    """A watcher that asks for a stop, as a scheduler does."""

    def __init__(self, step: int):
        self.at = step

    def step(self, done: int, epoch: int, loss: float | None, images: int) -> None:
        if done == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


def learned(folder: Path) -> bytes:
    return task_files(folder / "tasks" / "0000-0-1")["pet.safetensors"]


def test_a_checkpoint_made_with_another_learning_rate_is_not_gone_on_with(tmp_path: Path) -> None:
    """The way out of a loss that is not finite is a lower `train.lr` in recipe.yaml, so the new one has to count."""
    with pytest.raises(Interrupted):
        Learner(RECIPE, tmp_path / "half", progress=StopsAt(3)).run()
    recipe = tmp_path / "half" / "recipe.yaml"
    text = recipe.read_text()
    assert "lr: 0.01" in text
    recipe.write_text(text.replace("lr: 0.01", "lr: 0.001"))
    Learner.load(tmp_path / "half").resume()
    Learner({**RECIPE, "train": {**RECIPE["train"], "lr": 0.001}}, tmp_path / "whole").run()
    assert learned(tmp_path / "half") == learned(tmp_path / "whole")


# -- drift of features, facts of heads ----------------------------------------------------------------


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vit_folder(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks, the second of which has no test pictures."""
    folder = split_folder(tmp_path_factory.mktemp("data"), "abcdef", 4, 3)
    for label in "cd":
        shutil.rmtree(folder / "test" / label)
    return folder


@pytest.fixture(scope="module")
def tuned(vit: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state of three tasks with a head of statistics."""
    folder = tmp_path_factory.mktemp("tuned") / "state"
    Learner(recipe(vit, data, head="ncm"), folder).run()
    return folder


def metrics(state: Path) -> list[dict[str, Any]]:
    return [task.json("metrics.json") for task in State(state).committed]


def test_frozen_features_do_not_drift_and_tuned_ones_do(vit: Path, data: Path, tuned: Path, tmp_path: Path) -> None:
    Learner(recipe(vit, data, method="frozen", pet="none", head="ncm"), tmp_path / "frozen").run()
    found = {
        name: [m.get("drift") for m in metrics(path)] for name, path in {"f": tmp_path / "frozen", "t": tuned}.items()
    }
    assert found["f"] == [None, {"a-b": 0.0}, {"a-b": 0.0}], "and of a task without test pictures nothing is known"
    assert found["t"][0] is None
    assert [list(moved) for moved in found["t"][1:]] == [["a-b"], ["a-b"]]
    assert all(0 < moved["a-b"] <= 2 for moved in found["t"][1:])
    assert [FEATURES in task.sizes() for task in State(tuned).committed] == [True, False, True]
    results = checked(read_results(State(tuned)))
    assert [entry["of"] for entry in results["drift"]] == [{}, *found["t"][1:]]


class StopsInThird(Silent):
    """Asks for a stop at the first step of the third task, once."""

    third = False

    def task(self, index: int, name: str, classes: int, examples: int) -> None:
        self.third = index == 2

    def step(self, done: int, epoch: int, loss: float | None, images: int) -> None:
        if self.third:
            self.third = False
            os.kill(os.getpid(), signal.SIGTERM)


def test_drift_is_the_same_after_a_stop(vit: Path, data: Path, tuned: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with pytest.raises(Interrupted):
        Learner(recipe(vit, data, head="ncm"), state, progress=StopsInThird()).run()
    assert len(State(state).committed) == 2
    Learner.load(state).resume()
    assert metrics(state) == metrics(tuned)
    assert committed_files(state) == committed_files(tuned)


def rewritten(task: Path, drop: set[str], metrics: dict[str, Any]) -> None:
    """Make a committed task's folder anew without some files, with other metrics."""
    files = {name: content for name, content in read_folder(task).items() if name not in drop}
    shutil.rmtree(task)
    write_folder(task, {**files, "metrics.json": to_json(metrics)})
    seal(task.parent.parent)


def test_a_state_from_before_drift_was_measured_goes_on(tuned: Path, tmp_path: Path) -> None:
    """Of its tasks no features were kept, so that only those of the new ones can be seen to move."""
    state = shutil.copytree(tuned, tmp_path / "state")
    State(state).rollback("c-d")
    for task in State(state).committed:
        rewritten(task.folder, {FEATURES}, {"cells": task.json("metrics.json")["cells"]})
    older = checked(read_results(State(state)))
    assert not any(entry["of"] for entry in [*older["drift"], *older["facts"]])
    learner = Learner.load(state)
    assert learner.evaluate() is not None
    learner.resume()
    for labels in ("ag", "bh"):
        picture_folder(tmp_path / labels / "train", labels, 4)
        picture_folder(tmp_path / labels / "test", labels, 2, first=1000)
        learner.learn(tmp_path / labels, name=labels)
    assert [list(m.get("drift", {})) for m in metrics(state)] == [[], [], [], ["e-f"], ["e-f", "ag"]]
    assert [m["cells"] for m in metrics(state)][:3] == [m["cells"] for m in metrics(tuned)]


def test_what_is_told_of_a_run_is_read_without_what_it_has_learned(tuned: Path, tmp_path: Path) -> None:
    state = State(shutil.copytree(tuned, tmp_path / "state"))
    whole = read_results(state)
    torn = state.committed[-1].folder / "pack.safetensors"
    assert whole["storage"][-1][SUMS] == len(state.committed[-1].read(SUMS)[SUMS])
    torn.write_bytes(torn.read_bytes()[:-3])
    assert read_results(state) == whole
    with pytest.raises(StateError, match=r"pack\.safetensors"):
        Learner.load(state.folder)
    torn.unlink()
    assert read_results(state) == whole
    with pytest.raises(StateError, match=r"pack\.safetensors"):
        Learner.load(state.folder)


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_facts_of_heads_are_stored_and_their_warnings_told(
    vit: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def facts(self: NCM) -> dict[str, Any]:
        rows = int(self.counts.sum())
        return {"rows": rows, "warning": "too many rows" if rows > 10 else None}

    monkeypatch.setattr(NCM, "facts", facts)
    told = Notes()
    results = Learner(
        recipe(vit, data, method="frozen", pet="none", head="ncm"), tmp_path / "state", progress=told
    ).run()
    wanted = [{"model.head": {"rows": n, "warning": "too many rows" if n > 10 else None}} for n in (8, 16, 24)]
    assert [m["facts"] for m in metrics(tmp_path / "state")] == wanted
    assert [entry["of"] for entry in results["facts"]] == wanted
    warnings = ["task c-d: too many rows", "task e-f: too many rows"]
    assert [note for note in told.notes if "rows" in note] == warnings
    assert [warning for warning in results["warnings"] if "rows" in warning] == warnings
    tasks = [json.loads((t.folder / "task.json").read_text()) for t in State(tmp_path / "state").committed]
    assert [[w for w in t["warnings"] if "rows" in w] for t in tasks] == [[], warnings[:1], warnings[1:]]

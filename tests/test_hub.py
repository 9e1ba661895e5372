"""States on the hub and back, against a double of its HTTP interface."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_double import TOKEN, Double
from test_faults import one_line
from test_gate import everything
from tiny import fits_schema, picture_folder, recipe, vit_folder, written
from warm import Warm

import perpetune
from perpetune.cli import call
from perpetune.errors import HubError, StateError, UsageError
from perpetune.hub import remote
from perpetune.learner import Learner
from perpetune.state import State

REPO = "me/birds"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state after one month, and one of the same after two; `other` has another second month."""
    root = tmp_path_factory.mktemp("hub")
    vit_folder(root / "vit")
    for name, classes in {"m1": ("cat", "dog"), "m2": ("fox", "owl"), "m3": ("hen", "cow")}.items():
        picture_folder(root / name, classes, 8)
    content = recipe(root / "vit", train={"epochs": 1, "batch_size": 8}, stream={})
    Learner(content, root / "one").learn(root / "m1")
    for name, data in {"two": "m2", "other": "m3"}.items():
        shutil.copytree(root / "one", root / name)
        Learner.load(root / name).learn(root / data)
    return root


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Double]:
    from huggingface_hub import constants

    double = Double()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", double.url)
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", double.url + template)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield double
    double.close()
    assert not any(TOKEN in path for _, path in double.asked)


def copied(world: Path, tmp_path: Path, name: str, to: str = "birds") -> Path:
    return Path(shutil.copytree(world / name, tmp_path / to))


def committed(state: Path) -> dict[str, bytes]:
    """The files of a state that are pushed."""
    names = ("recipe.yaml", "backbone.json", "journal.jsonl", "tasks/")
    return {name: content for name, content in everything(state).items() if name.startswith(names)}


def answers(state: Path, world: Path) -> list[Any]:
    return [p.classes for p in Learner.load(state).predict(sorted((world / "m2").rglob("*.png")))]


def test_there_and_back(world: Path, hub: Double, tmp_path: Path) -> None:
    state = copied(world, tmp_path, "two")
    (state / "notes.txt").write_text("mine")
    before = everything(state)
    done = perpetune.push(state, REPO)
    assert everything(state) == before
    assert hub.repos[REPO].private
    assert len(hub.repos[REPO].commits) == 2
    there = {path: c for path, c in hub.repos[REPO].files.items() if path not in (".gitattributes", "README.md")}
    assert there == committed(state)
    assert done.files == len(there) + 1
    got = perpetune.pull(REPO, tmp_path / "elsewhere" / "birds")
    assert everything(tmp_path / "elsewhere" / "birds") == committed(state)
    assert got.tasks == ["m1", "m2"]
    assert got.bytes == sum(map(len, there.values()))
    assert os.listdir(tmp_path / "elsewhere") == ["birds"]
    assert answers(tmp_path / "elsewhere" / "birds", world) == answers(state, world)

"""A state is told where its model and its data lie now; fingerprints make sure that they are the same ones."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
from tiny import chiefly, every, picture_folder, recipe, split_folder, task_files, vit_folder

from perpetune import Learner
from perpetune.cli import call
from perpetune.errors import Interrupted, StateError
from perpetune.runtime import Silent


@pytest.fixture
def world(tmp_path: Path) -> Path:
    vit_folder(tmp_path / "model")
    picture_folder(tmp_path / "months" / "m1", ("ant", "bee"), 5)
    made = Learner(recipe(tmp_path / "model"), tmp_path / "s")
    made.learn(tmp_path / "months" / "m1")
    return tmp_path


def test_a_model_that_moved(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = str(world / "months" / "m1" / "ant" / "0.png")
    before = Learner.load(world / "s").predict(picture)[0].classes
    (world / "model").rename(world / "elsewhere")
    capsys.readouterr()
    assert call(["predict", str(world / "s"), picture]) == 2
    assert f"say where: `perpetune relocate {world / 's'} --model folder:PATH`" in capsys.readouterr().err
    other = vit_folder(world / "other", seed=1)
    tree = {p: p.read_bytes() for p in (world / "s").rglob("*") if p.is_file()}
    assert call(["relocate", str(world / "s"), "--model", f"folder:{other}"]) == 1
    assert "has other weights than the model" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in (world / "s").rglob("*") if p.is_file()} == tree
    assert call(["relocate", str(world / "s"), "--model", f"folder:{world / 'elsewhere'}"]) == 0
    assert Learner.load(world / "s").predict(picture)[0].classes == before
    Learner.load(world / "s").learn(picture_folder(world / "months" / "m2", ("cat", "dog"), 5))
    capsys.readouterr()
    assert call(["log", str(world / "s"), "--json"]) == 0
    assert [e["event"] for e in json.loads(capsys.readouterr().out)].count("relocated") == 1


def test_data_that_moved(world: Path) -> None:
    before = Learner.load(world / "s").evaluate()
    (world / "months").rename(world / "archive")
    assert Learner.load(world / "s").evaluate() == {"m1": None}
    assert call(["relocate", str(world / "s"), "--data", f"{world / 'months'}={world / 'archive'}"]) == 0
    assert Learner.load(world / "s").evaluate() == before
    (world / "archive" / "m1" / "ant" / "0.png").unlink()
    assert Learner.load(world / "s").evaluate() == {"m1": None}


def test_a_stream_that_moved(world: Path) -> None:
    split_folder(world / "images", ("cat", "dog", "fox", "owl"), 4, 2)
    Learner(recipe(world / "model", world / "images"), world / "run").run()
    before = Learner.load(world / "run").evaluate()
    (world / "images").rename(world / "pictures")
    assert call(["relocate", str(world / "run"), "--data", f"{world / 'images'}={world / 'pictures'}"]) == 0
    assert Learner.load(world / "run").evaluate() == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "say what lies elsewhere now"),
        (["--data", "x"], "as OLD=NEW"),
        (["--data", "=x"], "as OLD=NEW"),
        (["--data", "a=/nowhere/at/all"], "no such file or folder"),
        (["--model", "folder:/nowhere/at/all"], "no such folder"),
    ],
)
def test_what_cannot_be_relocated(
    arguments: list[str], says: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(["relocate", str(world / "s"), *arguments]) == 2
    assert says in capsys.readouterr().err


def test_no_state(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="does not exist"):
        Learner.relocate(tmp_path / "none", model="perpetune:micro")


# -- in the middle of a task --------------------------------------------------------------------------------


class StopsOnce(Silent):
    """Asks for a stop after the second step of task `cd`, once."""

    def __init__(self) -> None:
        self.here, self.left = False, 2

    def task(self, index: int, name: str, classes: int, examples: int) -> None:
        self.here = name in ("cd", "c-d")

    def step(self, done: int, epoch: int, loss: float | None, images: int) -> None:
        self.left -= self.here
        if self.here and self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)


class Counts(Silent):
    """Counts the steps that are made."""

    def __init__(self) -> None:
        self.steps = 0

    def step(self, done: int, epoch: int, loss: float | None, images: int) -> None:
        self.steps += 1


def tensors(state: Path) -> dict[str, str]:
    """A hash of each file of tensors of the last task."""
    files = task_files(max((state / "tasks").iterdir()))
    return {name: hashlib.sha256(files[name]).hexdigest() for name in sorted(files) if name.endswith(".safetensors")}


def interrupted(world: Path, kind: str, whole: bool) -> Path:
    """A state that is stopped in its second task, or was never stopped; its data in `images` or `months`."""
    folder = world / ("whole" if whole else "stopped")
    more: dict[str, Any] = {"train": {"epochs": 2, "batch_size": 4, "lr": 0.01}}
    reference = {"protect": {"energy": 0.9, "reference": {"path": str(world / "months" / "m1")}}}
    progress = Silent() if whole else StopsOnce()
    if kind == "run":
        made = Learner(recipe(world / "model", world / "images", **more), folder, progress=progress)
        steps = [made.run]
    else:
        own = recipe(world / "model", **more, **(reference if kind == "protected" else {}))
        made = Learner({**own, "stream": {}}, folder, progress=progress)
        steps = [lambda: made.learn(world / "months" / "ab"), lambda: made.learn(world / "months" / "cd")]
    try:
        for step in steps:
            step()
    except Interrupted:
        assert not whole
    return folder


@pytest.mark.parametrize("what", every(["both", "model", "data"], 3))
@pytest.mark.parametrize("kind", chiefly(["run", "update", "protected"], ["run", "protected"]))
def test_a_checkpoint_survives(kind: str, what: str, world: Path) -> None:
    split_folder(world / "images", ("a", "b", "c", "d"), 6, 2)
    for name in ("ab", "cd"):
        picture_folder(world / "months" / name, list(name), 8)
    whole = tensors(interrupted(world, kind, whole=True))
    state = interrupted(world, kind, whole=False)
    assert len(list((state / "tasks").iterdir())) == 1
    asked = ["relocate", str(state)]
    if what != "data":
        (world / "model").rename(world / "elsewhere")
        asked += ["--model", f"folder:{world / 'elsewhere'}"]
    if what != "model":
        old, new = ("images", "pictures") if kind == "run" else ("months", "archive")
        (world / old).rename(world / new)
        asked += ["--data", f"{world / old}={world / new}"]
    assert call(asked) == 0
    counts = Counts()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="discarded")
        learner = Learner.load(state, progress=counts)
        learner.resume()
    assert [t.name for t in learner.state.committed][1] in ("cd", "c-d")
    assert tensors(state) == whole
    total = {"run": 6, "update": 8, "protected": 8}[kind]
    assert 0 < counts.steps < total


def test_a_checkpoint_of_another_training_is_discarded_and_said(world: Path) -> None:
    for name in ("ab", "cd"):
        picture_folder(world / "months" / name, list(name), 8)
    state = interrupted(world, "update", whole=False)
    path = state / "recipe.yaml"
    path.write_text(path.read_text().replace("lr: 0.01", "lr: 0.02"))
    (world / "model").rename(world / "elsewhere")
    assert call(["relocate", str(state), "--model", f"folder:{world / 'elsewhere'}"]) == 0
    with pytest.warns(
        UserWarning,
        match=r"discarded: task cd, .*step \d+ of phase train, because the training options changed; task cd begins",
    ):
        Learner.load(state).resume()

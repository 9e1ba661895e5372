"""A state is told where its model and its data lie now; fingerprints make sure that they are the same ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import picture_folder, recipe, split_folder, vit_folder

from perpetune import Learner
from perpetune.cli import call
from perpetune.errors import StateError


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

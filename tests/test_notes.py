"""What verbs without progress say: why a task has no test data, and which classes were never learned."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import picture_folder, recipe, vit_folder, written

from perpetune import Learner
from perpetune.cli import call


@pytest.fixture
def world(tmp_path: Path) -> Path:
    vit_folder(tmp_path / "model")
    picture_folder(tmp_path / "m1", ("ant", "bee"), 5)
    picture_folder(tmp_path / "m2", ("cat", "dog"), 5)
    content = recipe(tmp_path / "model", pet="none", method="frozen", head="ridge")
    made = Learner({k: v for k, v in content.items() if k != "train"}, tmp_path / "s")
    made.learn(tmp_path / "m1")
    made.learn(tmp_path / "m2")
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[str, list[str]]:
    """What a verb printed, and its notes: lines on standard error, or events."""
    capsys.readouterr()
    assert call([str(a) for a in arguments]) == 0
    out, err = capsys.readouterr()
    if "--json" in arguments:
        assert err == ""
        return out, [f"perpetune: note: {line['message']}" for line in written(out, "note")]
    return out, err.splitlines()


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_evaluate_says_why_there_is_no_test_data(
    form: tuple[str, ...], world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, notes = said(capsys, "evaluate", world / "s", *form)
    assert notes == []
    shutil.rmtree(world / "m1")
    picture_folder(world / "m2", ("cat", "dog"), 1, first=70)
    out, notes = said(capsys, "evaluate", world / "s", *form)
    assert len(notes) == 2
    assert notes[0].startswith("perpetune: note: task m1 is not evaluated, its data are gone: ")
    assert str(world / "m1") in notes[0]
    assert notes[1].startswith("perpetune: note: task m2 is not evaluated: its data at ")
    assert notes[1].endswith("changed since it was learned")
    if form:
        assert written(out, "done")[0]["cells"] == {"m1": None, "m2": None}
    else:
        assert out.count("no test data") == 2


def test_a_task_without_test_data_is_said(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Learner.load(world / "s").learn(picture_folder(world / "m3", ("eel", "fox"), 3), holdout=0.0)
    _, notes = said(capsys, "evaluate", world / "s")
    assert notes == ["perpetune: note: task m3 is not evaluated, it was learned without test data"]


def test_classes_that_were_never_learned(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = picture_folder(world / "other", ("bee", "Ant", "cow"), (2, 3, 4))
    out, notes = said(capsys, "evaluate", world / "s", "--data", data)
    assert notes == [
        "perpetune: note: 2 of 3 classes were never learned, so none of their 7 test examples can be right: Ant, cow"
    ]
    assert "/9" in out

"""Exams: asked before the first task and after each, kept in the results, and nothing is learned from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_language_run import capitals, colors, write
from tiny import picture_folder, recipe, split_folder, tiny_language_model, vit_folder
from torch import Tensor

from perpetune.cli import call
from perpetune.errors import DataError, UsageError
from perpetune.evaluate import evaluate
from perpetune.exams import Exam
from perpetune.heads.ncm import NCM
from perpetune.learner import Learner
from perpetune.report import write_report
from perpetune.results import read_results
from perpetune.snapshot import snapshot


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vit_folder(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return split_folder(tmp_path_factory.mktemp("data"), "abcd", 6, 3)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of known and unknown classes in another light."""
    return picture_folder(tmp_path_factory.mktemp("elsewhere"), "abx", 4, "dusk", first=500)


def exam(path: Path, **options: Any) -> dict[str, Any]:
    return {"name": "dataset", "source": {"name": "folder", "path": str(path)}, **options}


@pytest.fixture(scope="module")
def learner(vit: Path, data: Path, elsewhere: Path, tmp_path_factory: pytest.TempPathFactory) -> Learner:
    content = recipe(vit, data, head="ncm", exams={"dusk": exam(elsewhere), "few": exam(elsewhere, among="own")})
    learner = Learner(content, tmp_path_factory.mktemp("run") / "state")
    learner.run()
    return learner


def test_they_are_taken_after_each_task_and_kept(learner: Learner) -> None:
    results = read_results(learner.state)
    rounds = results["exams"]
    assert [entry["task"] for entry in rounds] == [0, 1], "before the first task no class is known"
    for entry in rounds:
        assert set(entry["of"]) == {"dusk", "few"}
        for values in entry["of"].values():
            assert 0 <= values["accuracy"] <= 1
    own, seen = (rounds[-1]["of"][name]["accuracy"] for name in ("few", "dusk"))
    assert own >= seen, "fewer classes compete"


def test_they_change_nothing_of_what_is_learned(learner: Learner, vit: Path, data: Path, tmp_path: Path) -> None:
    other = Learner(recipe(vit, data, head="ncm"), tmp_path / "state")
    other.run()
    assert snapshot(other.method) == snapshot(learner.method)
    assert "exams" not in read_results(other.state)


def test_the_report_shows_them(learner: Learner, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    html, _, md = (path.read_text("utf-8") for path in write_report(read_results(learner.state), tmp_path))
    assert '<section id="exams"' in html
    assert "| dusk | accuracy |" in md
    assert "after c-d" in md
    assert call(["methods"]) == 0
    assert "dataset" in capsys.readouterr().out


def test_a_resumed_run_and_an_update_take_them_too(learner: Learner, data: Path, tmp_path: Path) -> None:
    loaded = Learner.load(learner.state.folder)
    loaded.learn(picture_folder(tmp_path / "new", "xy", 5))
    rounds = read_results(loaded.state)["exams"]
    assert [entry["task"] for entry in rounds] == [0, 1, 2]
    assert rounds[-1]["of"]["few"]["accuracy"] > 0


def test_a_language_model_is_asked_before_its_first_task(tmp_path: Path) -> None:
    write(tmp_path / "texts" / "colors" / "train.jsonl", colors(range(9)))
    write(tmp_path / "general.jsonl", capitals(range(6)))
    write(tmp_path / "choice.jsonl", colors(range(20, 26)))
    source = {"name": "text", "path": str(tmp_path / "general.jsonl"), "score": "rouge_l"}
    content = {
        "setting": "task",
        "backbone": f"hf:{tiny_language_model(tmp_path / 'llama')}",
        "head": {"name": "lm", "max_new_tokens": 4},
        "train": {"epochs": 1, "batch_size": 4},
        "data": {"name": "text", "path": str(tmp_path / "texts")},
        "exams": {
            "general": {"name": "dataset", "source": source},
            "choice": {"name": "dataset", "source": str(tmp_path / "choice.jsonl")},
        },
        "run": {"device": "cpu"},
    }
    learner = Learner(content, tmp_path / "state")
    learner.run()
    before, after = read_results(learner.state)["exams"]
    assert (before["task"], after["task"]) == (None, 0)
    assert set(before["of"]) == {"general", "choice"}
    assert list(before["of"]["general"]) == ["rouge_l"]
    assert list(before["of"]["choice"]) in (["accuracy"], ["exact_match"])


def test_bad_exams_end_a_run_before_it_begins(vit: Path, data: Path, tmp_path: Path) -> None:
    for exams, why in {
        "missing": ({"far": exam(tmp_path / "nowhere")}, "nowhere"),
        "kind": ({"far": {"name": "quiz"}}, "exams: there is no 'quiz'"),
        "option": ({"far": {**exam(data), "amongst": "own"}}, "amongst is not an option"),
        "name": ({"a/b": exam(data)}, "cannot name a suite of exams"),
    }.values():
        with pytest.raises((UsageError, DataError), match=why):
            Learner(recipe(vit, data, exams=exams), tmp_path / "state").run()
        assert not list(tmp_path.glob("state/tasks/*"))


class ReadsNames(NCM):
    """Answers with any class: by the length of its name."""

    any_class = True

    def among(self, features: Tensor, classes: Any) -> Tensor:
        return torch.tensor([[float(len(c)) for c in classes]]).expand(len(features), -1)


def test_a_head_that_reads_names_is_asked_among_classes_it_has_not_learned(
    vit: Path, data: Path, tmp_path: Path
) -> None:
    learner = Learner(recipe(vit, data, head=f"{__name__}:ReadsNames"), tmp_path / "state")
    picture_folder(tmp_path / "names", ("cat", "elephant"), 3)
    task = learner._tasks.whole(tmp_path / "names")
    assert Exam("names", task, "own").taken(learner.method, 4) == {"accuracy": 0.5}
    assert Exam("names", task).taken(learner.method, 4) == {}, "no class was learned"
    learner.run()
    found = evaluate(learner.method, task, among="own", batch_size=4)
    assert found is not None
    assert found["per_class"] == {"cat": [0, 3], "elephant": [3, 3]}


def test_a_judge_has_to_give_numbers(learner: Learner) -> None:
    task = learner._tasks.exams[0].task
    with pytest.raises(UsageError, match="exam odd: it is nan; a finite number is expected"):
        Exam("odd", task, judge=lambda *_: {"it": float("nan")}).taken(learner.method, 4)

"""Another package adds a suite of exams with a judge of its own: retrieval by features."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny import picture_folder, recipe, split_folder, vit_folder

from perpetune.errors import UsageError
from perpetune.learner import Learner
from perpetune.report import write_report
from perpetune.results import read_results

CODE = '''
import torch
from perpetune.exams import Exam, Suite
from perpetune.tasks import evaluation_batches


def recall(method, exam, batch_size):
    """How often the nearest other picture is of the same class."""
    batches = list(evaluation_batches(exam.task.test.questions(), batch_size, exam.task.runtime))
    with torch.no_grad():
        features = torch.cat([method.features(batch.inputs) for batch in batches])
    targets = torch.cat([batch.targets for batch in batches])
    near = torch.cdist(features, features).fill_diagonal_(torch.inf).argmin(1)
    return {"recall_at_1": float((targets[near] == targets).double().mean())}


class Retrieval(Suite):
    """Nearest neighbours in one or several folders."""

    def __init__(self, *, paths: list[str], worst: bool = False):
        self.paths = paths

    def exams(self, name, opened):
        return [Exam(f"{name}/{number}", opened(path), judge=recall) for number, path in enumerate(self.paths)]


class Twins(Retrieval):
    """Two of one name."""

    def exams(self, name, opened):
        return [Exam("twin", opened(path), judge=recall) for path in self.paths * 2]
'''


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "site" / "library-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: library\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[perpetune.exams]\nneighbours = library:Retrieval\ntwins = library:Twins\n")
    (tmp_path / "site" / "library.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "library", raising=False)


def test_it_is_taken_before_the_first_task_and_after_each_and_shown(tmp_path: Path) -> None:
    data, vit = split_folder(tmp_path / "data", "abcd", 6, 3), vit_folder(tmp_path / "vit")
    asked = [str(picture_folder(tmp_path / "one", "xyz", 4)), str(picture_folder(tmp_path / "two", "abx", 4))]
    content = recipe(vit, data, exams={"near": {"name": "neighbours", "paths": asked}})
    learner = Learner(content, tmp_path / "state")
    learner.run()
    rounds = read_results(learner.state)["exams"]
    assert [entry["task"] for entry in rounds] == [None, 0, 1]
    for entry in rounds:
        assert list(entry["of"]) == ["near/0", "near/1"]
        assert all(0 <= values["recall_at_1"] <= 1 for values in entry["of"].values())
    html, _, md = (path.read_text("utf-8") for path in write_report(read_results(learner.state), tmp_path))
    assert "recall_at_1" in html
    assert "| near/0 | recall" in md.replace("\\_", "_")
    content["exams"]["near"]["name"] = "twins"
    with pytest.raises(UsageError, match="exams: two are called 'twin'; each needs a name of its own"):
        Learner(content, tmp_path / "other").run()

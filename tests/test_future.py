"""`evaluate.future`: tasks are asked before they are learned, and before the first task; nothing else changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import picture_folder, recipe, split_folder, vit_folder
from torch import Tensor

from perpetune.errors import UsageError
from perpetune.evaluate import evaluate
from perpetune.heads.ncm import NCM
from perpetune.learner import Learner
from perpetune.report import form, write_report
from perpetune.results import read_results
from perpetune.run import run
from perpetune.snapshot import snapshot
from perpetune.tasks import part


class ReadsNames(NCM):
    """Answers with any class: of those that it has not learned, by the sum of a picture's features and the name."""

    any_class = True

    def among(self, features: Tensor, classes: Sequence[str]) -> Tensor:
        names = torch.tensor([[ord(name[0]) % 7 + 0.1 * len(name)] for name in classes])
        scores = torch.cos(features.sum(1, keepdim=True).double() * 3 + names.T.double()).float()
        for column, name in enumerate(classes):
            if name in self.classes:
                scores[:, column] += self(features)[:, self.classes.index(name)]
        return scores

    def gates(self, features: Tensor, classes: Sequence[str]) -> dict[str, Tensor]:
        best = self.among(features, classes).argmax(1).tolist()
        return {"open": torch.tensor([classes[i] in self.classes for i in best])}


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vit_folder(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return split_folder(tmp_path_factory.mktemp("data"), ["ant", "bee", "cat", "dog", "elk", "fox"], 5, 4)


def content(vit: Path, data: Path, future: bool = True, **changes: Any) -> dict[str, Any]:
    head = f"{__name__}:ReadsNames"
    return recipe(vit, data, head=head, evaluate={"future": future, "batch_size": 5}, **changes)


@pytest.fixture(scope="module")
def learner(vit: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Learner:
    learner = Learner(content(vit, data), tmp_path_factory.mktemp("run") / "state")
    learner.run()
    return learner


NAMES = ["ant-bee", "cat-dog", "elk-fox"]


def test_every_cell_and_the_row_before_are_measured(learner: Learner) -> None:
    results = read_results(learner.state)
    assert [[cell["total"] for cell in row] for row in results["cells"]] == [[8] * 3] * 3
    assert [(entry["task"], list(entry["of"])) for entry in results["unlearned"]] == [
        (None, NAMES),
        (0, NAMES[1:]),
        (1, NAMES[2:]),
    ]
    A = [[cell["correct"] / 8 for cell in row] for row in results["cells"]]
    Z = [results["unlearned"][0]["of"][name]["correct"] / 8 for name in NAMES]
    found = results["zero_shot"]
    assert found["transfer"] == pytest.approx((A[0][1] + (A[0][2] + A[1][2]) / 2) / 2)
    assert found["average"] == pytest.approx(sum(map(sum, A)) / 9)
    assert found["last"] == pytest.approx(sum(A[2]) / 3)
    assert found["kept_worst"] == pytest.approx(min(A[0][1] - Z[1], A[0][2] - Z[2], A[1][2] - Z[2]))
    assert found["before"]["transfer"] == pytest.approx((Z[1] + Z[2]) / 2)
    chance = 1 / 6  # of all the names that may answer, not of the task's own two
    assert results["metrics"]["forward_transfer"] == pytest.approx((A[0][1] + A[1][2]) / 2 - chance)


def test_all_names_of_the_stream_may_answer(learner: Learner) -> None:
    """Counted again by hand after the last task, and before the first one by a new learner."""
    every = ["ant", "bee", "cat", "dog", "elk", "fox"]
    new = Learner(learner.recipe)
    last, first = (read_results(learner.state)[key] for key in ("cells", "unlearned"))
    for method, cells in ((learner.method, last[-1]), (new.method, list(first[0]["of"].values()))):
        for index, cell in enumerate(cells):
            task = learner._tasks._of_stream(index)
            assert task.test is not None
            pixels = torch.stack([task.test.load(i, None) for i in range(8)])
            with torch.no_grad():
                best = method.among(pixels, every).argmax(1).tolist()
            right = [every[b] == task.classes[t] for b, t in zip(best, task.test.targets, strict=True)]
            assert cell["correct"] == sum(right)
            goes = {name: sum(every[b] in name for b in best) for name in NAMES}
            assert cell["goes_to"] == {name: count for name, count in goes.items() if count}
            opened = [every[b] in method.classes for b in best]
            assert cell["gates"]["open"] == [sum(opened), sum(o and r for o, r in zip(opened, right, strict=True))]


def test_in_the_setting_task_the_names_of_the_asked_task_may_answer(vit: Path, data: Path, tmp_path: Path) -> None:
    learner = Learner(content(vit, data, setting="task"), tmp_path / "state")
    learner.run()
    results = read_results(learner.state)
    task = learner._tasks._of_stream(2)
    found = evaluate(learner.method, task, among="own", batch_size=8)
    assert found is not None
    assert results["cells"][2][2]["correct"] == found["correct"]
    assert "goes_to" not in results["cells"][0][2]
    new = Learner(learner.recipe)
    found = evaluate(new.method, task, among="own", batch_size=8)
    assert found is not None
    assert results["unlearned"][0]["of"]["elk-fox"]["correct"] == found["correct"]


def test_it_changes_nothing_of_what_is_learned(learner: Learner, vit: Path, data: Path, tmp_path: Path) -> None:
    other = Learner(content(vit, data, future=False), tmp_path / "state")
    other.run()
    assert snapshot(other.method) == snapshot(learner.method)
    results = read_results(other.state)
    assert not {"unlearned", "zero_shot"} & set(results)
    assert results["cells"][0][1:] == [None, None]


def test_answers_do_not_depend_on_labels_order_or_batches(learner: Learner) -> None:
    task, future = learner._tasks._of_stream(1), {name: tuple(name.split("-")) for name in NAMES}
    assert task.test is not None
    ask: dict[str, Any] = {"among": "seen", "future": future}
    whole = evaluate(learner.method, task, batch_size=8, **ask)
    turned = dataclasses.replace(task, test=part(task.test, range(7, -1, -1)))
    assert evaluate(learner.method, turned, batch_size=3, **ask) == whole


def test_a_stopped_run_has_the_columns_of_what_it_learned(vit: Path, data: Path, tmp_path: Path) -> None:
    learner = Learner(content(vit, data), tmp_path / "state")
    with learner._writing(tasks=3):
        run(learner.method, [learner._tasks.of_stream(0, [])], learner.state)
    results = read_results(learner.state)
    assert [t["name"] for t in results["tasks"]] == NAMES[:1]
    assert list(results["unlearned"][1]["of"]) == NAMES[1:]
    again = Learner.load(tmp_path / "state")
    again.run()
    whole = read_results(again.state)
    assert whole["cells"][0][1] == results["unlearned"][1]["of"]["cat-dog"]
    assert (whole["unlearned"][0], len(whole["cells"][0])) == (results["unlearned"][0], 3)


def test_an_update_goes_on(vit: Path, data: Path, tmp_path: Path) -> None:
    learner = Learner(content(vit, None, future=True), tmp_path / "state")
    learner.learn(picture_folder(tmp_path / "one", ["gnu", "hen"], 6))
    learner.learn(picture_folder(tmp_path / "two", ["ibis", "jay"], 6))
    results = read_results(learner.state)
    assert [list(entry["of"]) for entry in results["unlearned"]] == [["one"]]
    assert results["cells"][0][1] is None
    assert results["zero_shot"]["transfer"] is None


def test_a_head_that_knows_no_names_is_refused_before_the_run(vit: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"evaluate\.future asks about .* not learned yet, and head: ncm"):
        Learner(recipe(vit, data, head="ncm", evaluate={"future": True}), tmp_path / "state")
    assert not (tmp_path / "state").exists()


def page(learner: Learner, folder: Path, **changes: Any) -> str:
    """The report in Markdown."""
    return write_report({**read_results(learner.state), **changes}, folder)[2].read_text("utf-8")


def test_the_report_shows_transfer_attraction_and_gates(learner: Learner, tmp_path: Path) -> None:
    results, said = read_results(learner.state), page(learner, tmp_path)
    found = results["zero_shot"]
    for label, key in (("Transfer", "transfer"), ("Avg", "average"), ("Last", "last")):
        assert f"| {label} | {form.percent(found[key])} | {form.percent(found['before'][key])} |" in said
    assert "All classes of the stream could be answered at every moment" in said
    rows = results["cells"]
    drawn = [sum(row[j]["goes_to"].get("cat-dog", 0) for j in (0, 2)) / 16 for row in rows[:2]]
    assert f"| cat-dog | {form.percent(drawn[0])} | {form.percent(drawn[1])} |" in said
    opened = [sum(row[j]["gates"]["open"][0] for j in range(i + 1)) / (8 * (i + 1)) for i, row in enumerate(rows)]
    assert f"| 3 elk-fox | open | {form.percent(opened[2])} |" in said


def test_the_worst_loss_comes_first(learner: Learner, tmp_path: Path) -> None:
    """The page begins with it, and its section comes before all others."""

    def cell(correct: int) -> dict[str, Any]:
        return {"correct": correct, "total": 8, "per_class": {}}

    unlearned = [
        {"task": None, "of": {name: cell(6) for name in NAMES}},
        {"task": 0, "of": {"cat-dog": cell(5), "elk-fox": cell(7)}},
        {"task": 1, "of": {"elk-fox": cell(1)}},
    ]
    exams = [
        {"task": task, "of": {"suite": {"accuracy": share}}} for task, share in ((None, 0.6), (0, 0.59), (2, 0.61))
    ]
    said = page(learner, tmp_path, unlearned=unlearned, exams=exams)
    lost = "Zero-shot lost: elk-fox fell from 75.0 % to 12.5 % after cat-dog (−62.5 points)"
    assert lost in said.split("\n## ")[0]
    section = said.split("\n## ")[1]
    assert section.startswith("Zero-shot: what it still knows")
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    assert [row.split(" | ")[0] for row in rows] == ["| elk-fox", "| cat-dog", "| exam suite"]
    assert rows[0].endswith("| 87.5 (+12.5) | 12.5 (−62.5) | – | −62.5 |")
    calm = [{**entry, "of": {name: cell(6) for name in entry["of"]}} for entry in unlearned]
    assert "Zero-shot lost" not in page(learner, tmp_path, unlearned=calm, exams=exams)


def test_a_run_that_was_not_asked_has_no_such_sections(vit: Path, data: Path, tmp_path: Path) -> None:
    other = Learner(content(vit, data, future=False), tmp_path / "state")
    other.run()
    said = page(other, tmp_path)
    for title in ("Zero-shot", "Transfer, Avg, Last", "Retrieval", "False recognition", "## Gate"):
        assert title not in said

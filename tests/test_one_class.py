"""A month of one class: cross-entropy over one row is 0, so a trained head compares it with all classes seen before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import paired, picture_folder, recipe, tiny_language_model, vit_folder

from perpetune import Learner
from perpetune.runtime import Silent

TRAIN = {"epochs": 8, "batch_size": 4, "lr": 0.02}
HEADS = ("linear", "cosine")


class Told(Silent):
    """What is said, in order, beside the first step and the losses."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.losses: list[float] = []

    def note(self, message: str) -> None:
        self.said.append(message)

    def step(self, done: int, epoch: int, loss: float | None, images: int) -> None:
        self.said.append("step")
        self.losses += [loss] if loss is not None else []


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("one")
    vit_folder(root / "model")
    picture_folder(root / "two", ("ant", "bee"), 8)
    picture_folder(root / "one", ("cat",), 8)
    picture_folder(root / "again", ("bee",), 8, first=50)
    return root


def learner(world: Path, folder: Path, told: Told, **changes: Any) -> Learner:
    return Learner(recipe(world / "model", train=TRAIN, **changes), folder, progress=told)


@pytest.mark.parametrize(("method", "head"), paired(["finetune", "olora", {"name": "treelora"}], HEADS))
def test_one_class_is_learned_and_said_before(head: str, method: Any, world: Path, tmp_path: Path) -> None:
    told = Told()
    made = learner(world, tmp_path / "s", told, head=head, method=method)
    made.learn(world / "two")
    assert not any("one class" in said for said in told.said)
    rows = [p.detach().clone() for p in made.method.model.per_class()]
    told.said.clear(), told.losses.clear()
    made.learn(world / "one")
    assert "step" in told.said
    (note,) = [said for said in told.said if "one class" in said]
    assert note == (
        "task one: it has one class alone, 'cat'. Mask `task` would compare it with nothing, so it is compared with "
        "the 2 classes learned before; the head's rows for these do not change"
    )
    assert max(told.losses) > 0
    for before, after in zip(rows, made.method.model.per_class(), strict=True):
        assert torch.equal(before, after[:2])
    found = made.evaluate()["one"]
    assert found is not None
    assert found["correct"] == found["total"] > 0
    assert note in json.loads((tmp_path / "s" / "tasks" / "0001-one" / "task.json").read_bytes())["warnings"]


@pytest.mark.parametrize("head", HEADS)
def test_a_known_class_alone(head: str, world: Path, tmp_path: Path) -> None:
    told = Told()
    made = learner(world, tmp_path / "s", told, head=head)
    made.learn(world / "two")
    made.learn(world / "again")
    assert sum("'bee'" in said and "the one class learned before" in said for said in told.said) == 1
    found = made.evaluate()["again"]
    assert found is not None
    assert found["correct"] == found["total"]


@pytest.mark.parametrize(("mask", "head"), paired(["task", "seen", "none"], HEADS))
def test_the_first_month_has_one_class(head: str, mask: str, world: Path, tmp_path: Path) -> None:
    told = Told()
    made = learner(world, tmp_path / "s", told, head=head, method={"name": "finetune", "mask": mask})
    made.learn(world / "one")
    assert "no other was learned before: there is nothing to compare it with" in told.said[0]
    made.learn(world / "again")
    cells = made.evaluate()
    assert cells["again"] is not None
    assert cells["again"]["correct"] == cells["again"]["total"]


@pytest.mark.parametrize("mask", ["seen", "none"])
def test_with_another_mask_nothing_changes_and_nothing_is_said(mask: str, world: Path, tmp_path: Path) -> None:
    told = Told()
    made = learner(world, tmp_path / "s", told, method={"name": "finetune", "mask": mask})
    made.learn(world / "two")
    made.learn(world / "one")
    assert not any("one class" in said for said in told.said)


@pytest.mark.parametrize("head", ["ridge", "ncm"])
def test_a_head_with_sums_learns_one_class_and_the_pet_rests(head: str, world: Path, tmp_path: Path) -> None:
    told = Told()
    made = learner(world, tmp_path / "s", told, head=head)
    made.learn(world / "two")
    told.losses.clear()
    made.learn(world / "one")
    assert set(told.losses) == {0.0}
    assert any("so the pet is not trained" in said for said in told.said)
    found = made.evaluate()["one"]
    assert found is not None
    assert found["correct"] > 0


def test_one_class_of_texts(tmp_path: Path) -> None:
    tiny_language_model(tmp_path / "lm")
    told = Told()
    for name, options in (("two", ["yes", "no"]), ("one", ["maybe"])):
        rows = [
            {
                "prompt": f"{name} {n} {options[n % len(options)]}",
                "answer": options[n % len(options)],
                "options": options,
            }
            for n in range(10)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    made = learner(tmp_path, tmp_path / "s", told, backbone=f"folder:{tmp_path / 'lm'}", head="linear")
    made.learn(tmp_path / "two.jsonl")
    made.learn(tmp_path / "one.jsonl")
    assert any("it has one class alone, 'maybe'" in said for said in told.said)
    found = made.evaluate()["one"]
    assert found is not None
    assert found["correct"] == found["total"]

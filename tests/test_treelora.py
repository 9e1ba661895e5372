"""TreeLoRA on a tiny transformer: signatures are true gradients, the loss is what it says, and plain training is inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import recipe, split_folder, vit_folder
from torch import Tensor

from perpetune.learner import Learner
from perpetune.methods.finetune import FineTune
from perpetune.methods.treelora import TreeLoRA
from perpetune.pets import pets

CLASSES = ["a", "b", "c", "d", "e", "f"]


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vit_folder(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return split_folder(tmp_path_factory.mktemp("data"), CLASSES, 8, 4)


def learned(vit: Path, data: Path, method: dict[str, Any], folder: Path | None = None, **changes: Any) -> Learner:
    learner = Learner(recipe(vit, data, method=method, **changes), folder)
    learner.run()
    return learner


def weights(learner: Learner, name: str = "default") -> list[Tensor]:
    return [p.detach().clone() for pet in pets(learner.method, name) for p in pet.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_without_its_regulariser_and_from_the_last_adapter_it_is_plain_training(
    vit: Path, data: Path, accumulate: int
) -> None:
    """V12: bit for bit, after 24 updates."""
    train = {"epochs": 4, "batch_size": 8, "lr": 0.01, "accumulate": accumulate}
    plain = learned(vit, data, {"name": "finetune"}, train=train)
    tree = learned(vit, data, {"name": "treelora", "regularise": 0.0, "start": "last", "answer": "last"}, train=train)
    assert isinstance(plain.method, FineTune) and isinstance(tree.method, TreeLoRA)
    assert same(weights(plain), weights(tree))
    assert plain.evaluate() == {
        name: {k: v for k, v in (cell or {}).items() if k != "others"} for name, cell in tree.evaluate().items()
    }


@pytest.mark.parametrize("start", ["nearest", "last", "fresh"])
def test_it_learns_reloads_and_answers_in_three_ways(vit: Path, data: Path, tmp_path: Path, start: str) -> None:
    one = learned(vit, data, {"name": "treelora", "start": start}, tmp_path / "state")
    two = Learner.load(tmp_path / "state")
    assert one.evaluate() == two.evaluate()
    cell = two.evaluate()["a-b"]
    assert cell is not None and set(cell["others"]) == {"last", "merged"}
    assert isinstance(two.method, TreeLoRA)
    assert two.method.facts() == one.method.facts()
    assert two.method.tree.ids == (0, 1, 2)

"""benchmarks/pools.py: its parts run, and selectors that stand side by side choose as each does alone."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_pool import asked, pool

from perpetune.learning import learn_protected
from perpetune.methods.pool import Pool

SELECTIONS: dict[str, dict[str, Any]] = {
    "gaussian": {"name": "gaussian"},
    "keys": {"name": "keys", "start": "mean"},
    "drawn": {"name": "keys", "pull": 0.5},
    "centres": {"name": "centres", "count": 2},
    "random": {"name": "random"},
}
SMALL = {"classes_per_task": 2, "class_order": "sorted", "train_per_class": 2, "test_per_class": 1}
ONE: dict[str, Any] = {"train": {"epochs": 1, "batch_size": 4}, "stream": SMALL}


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import pools

    return pools


def test_selectors_side_by_side_choose_as_each_alone(pools: ModuleType) -> None:
    together, stream = pool({"select": "gaussian"}, head="ridge")
    together.selector = pools.Beside(together.model.backbone.width, SELECTIONS)
    for task in stream:
        learn_protected(together, task)
    for name, selection in SELECTIONS.items():
        alone, stream = pool({"select": selection}, head="ridge")
        for task in stream:
            learn_protected(alone, task)
        together.selector.asked = name
        one, other = together.chosen(asked()), alone.chosen(asked())
        assert one is not None
        assert other is not None
        assert torch.equal(one.index, other.index), name
        assert torch.equal(together.predict(asked()), alone.predict(asked())), name


def test_a_mixed_batch_is_measured(pools: ModuleType) -> None:
    found = pools.answering(["prefix"], [2], [2, 3], rounds=1)["results"]
    assert [(one["batch"], one["members"]) for one in found] == [(2, 2)]
    assert set(found[0]["ms"]) == {"one", "mixed", "grouped"}


def test_a_step_is_measured(pools: ModuleType) -> None:
    found = pools.stepping(["gaussian"], tasks=1, rounds=1, after=[0, 3], **ONE)
    pooled = {"gaussian", "gaussian, after 3"}
    assert set(found["seconds"]) == {"finetune", *pooled, *(f"queries of {name}" for name in pooled)}
    assert all(one["beyond_queries"] < one["ratio"] for one in found["results"])


def test_queries_are_compared_by_block(pools: ModuleType) -> None:
    found = pools.querying(["gaussian", "centres"], [0, 2], [0], **ONE)
    assert set(found) == {"gaussian", "centres"}
    assert all(0 <= share <= 100 for blocks in found.values() for share in blocks.values())
    assert set(found["gaussian"]) == {"0", "2"}


def test_accuracy_is_compared(pools: ModuleType) -> None:
    found = pools.comparing([0], ["linear", "ridge"], ["gaussian"], **ONE)
    names = {f"{h}, {a}, {s}" for h in ("linear", "ridge") for a in ("own", "all") for s in ("gaussian", pools.TRUE)}
    assert set(found["accuracy"]) == names | {"frozen"}
    assert set(found["right_member"]) == {"gaussian"}
    assert "ridge, all, gaussian, above linear" in found["accepted"]


def test_what_is_accepted(pools: ModuleType) -> None:
    found = {
        "ridge, own, gaussian": 95.5,
        "ridge, own, random": 15.9,
        "ridge, all, last": 91.4,
        "linear, all, last": 46.5,
    }
    assert pools.accepted(found) == {
        "ridge, own, gaussian": True,
        "ridge, own, random": False,
        "ridge, all, last, above linear": False,
    }


def test_it_is_a_pool(pools: ModuleType) -> None:
    method, tasks = pools.begun(pools.digits_recipe(method="pool", **ONE))
    assert isinstance(method, Pool)
    assert [task.classes for task in tasks] == [("0", "1"), ("2", "3"), ("4", "5"), ("6", "7"), ("8", "9")]

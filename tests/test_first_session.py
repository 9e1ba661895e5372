"""Tuning on the first task only: RanPAC and APER, and what plain tuning without protection does to a regression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from perpetune.check import Checker, Pictures, tiny_stream
from perpetune.check import probe as scores_of
from perpetune.errors import UsageError
from perpetune.heads import NCM, Ridge
from perpetune.learning import learn_protected
from perpetune.methods.base import Method
from perpetune.methods.first_session import FirstSession
from perpetune.pets import parameters, using
from perpetune.recipe import make_recipe
from perpetune.runtime import Runtime
from perpetune.snapshot import restore, snapshot
from perpetune.tasks import Task

RIDGE = {"name": "ridge", "projection": 50}


def made(name: str = "first_session", **changes: Any) -> Method:
    method = {"name": name, **changes.pop("options", {})}
    train = {"epochs": 2, "batch_size": 8, "lr": 0.01}
    content = {"method": method, "pet": {"name": "lora", "rank": 2}, "head": RIDGE, "train": train, **changes}
    return Checker(make_recipe(content)).make()


def taught(method: Method, tasks: Sequence[Task]) -> Method:
    for task in tasks:
        learn_protected(method, task)
    return method


def pixels_of(task: Task) -> Tensor:
    return torch.stack([task.train.load(i, None) for i in range(len(task.train))])


def features_of(method: Method, pixels: Tensor, pet: str | None) -> Tensor:
    assert isinstance(method, FirstSession)
    with torch.no_grad(), using(method.model, pet):
        return method.model.features(pixels)


def test_features_never_change_after_the_first_task() -> None:
    tasks, method = tiny_stream(Runtime()), made()
    new = torch.stack(Pictures("abcdef", 3, seed=7).pixels)
    start = [p.clone() for p in parameters(method, "default")]
    learn_protected(method, tasks[0])
    pet = [p.clone() for p in parameters(method, "default")]
    assert any(not torch.equal(a, b) for a, b in zip(start, pet, strict=True))
    before = method.features(new)
    for task in tasks[1:]:
        learn_protected(method, task)
        assert all(torch.equal(a, b) for a, b in zip(pet, parameters(method, "default"), strict=True))
        assert torch.equal(method.features(new), before)


def test_ranpac_is_one_regression_on_the_tuned_features_of_all_tasks() -> None:
    tasks = tiny_stream(Runtime())
    method = taught(made(), tasks)
    head = method.model.head
    assert isinstance(head, Ridge)
    h = torch.cat([head.expand(features_of(method, pixels_of(t), "default").double()) for t in tasks])
    targets = torch.tensor([head.classes.index(t.classes[y]) for t in tasks for y in t.train.targets])
    gram = h.mT @ h + float(head.chosen) * torch.eye(50, dtype=torch.float64)
    wanted = torch.linalg.solve(gram, h.mT @ F.one_hot(targets, 6).double())
    assert float((head.weight - wanted).norm()) < 1e-3 * float(wanted.norm())
    assert scores_of(method).argmax(1).tolist() == [i for i in range(6) for _ in range(3)]


def test_aper_compares_with_class_means_of_frozen_beside_tuned_features() -> None:
    tasks = tiny_stream(Runtime())
    method = taught(made(head="ncm", options={"concat": True}), tasks)
    assert isinstance(method, FirstSession)
    head = method.model.head
    assert isinstance(head, NCM)
    new = torch.stack(Pictures("abcdef", 3, seed=7).pixels)
    both = torch.cat([features_of(method, new, None), features_of(method, new, "default")], dim=1)
    assert torch.equal(method.features(new), both)
    assert not torch.allclose(both[:, :32], both[:, 32:])
    means = []
    for task in tasks:
        pixels = pixels_of(task)
        found = torch.cat([features_of(method, pixels, None), features_of(method, pixels, "default")], dim=1)
        targets = torch.tensor(task.train.targets)
        means += [found[targets == y].mean(0) for y in range(2)]
    wanted = head.scale * F.cosine_similarity(both[:, None], torch.stack(means)[None], dim=-1)
    with torch.no_grad():
        torch.testing.assert_close(method.predict(new), wanted, rtol=1e-4, atol=1e-4)
    assert head.probe.weight.shape == (6, 32), "the probe is trained on tuned features alone"


@pytest.mark.parametrize("changes", [{}, {"head": "ncm", "options": {"concat": True}}], ids=["ranpac", "aper"])
def test_it_comes_back_from_files_and_goes_on(changes: dict[str, Any]) -> None:
    tasks = tiny_stream(Runtime())
    one, other = taught(made(**changes), tasks[:2]), made(**changes)
    restore(other, snapshot(one), "memory")
    assert torch.equal(scores_of(one, "abcd"), scores_of(other, "abcd"))
    for method in (one, other):
        learn_protected(method, tasks[2])
    assert snapshot(one) == snapshot(other)


@pytest.mark.parametrize(("concat", "passes"), [(False, 1), (True, 2)])
def test_prediction_takes_no_more_passes_than_it_says(concat: bool, passes: int) -> None:
    method = taught(made(head="ncm", options={"concat": concat}), tiny_stream(Runtime())[:1])
    assert isinstance(method, FirstSession)
    seen: list[int] = []
    method.model.backbone.register_forward_hook(lambda *_: seen.append(1))
    scores_of(method, "ab")
    assert len(seen) == passes


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"head": "linear"},
            "method: first_session learns classes from statistics, but head linear does not: use ridge or ncm",
        ),
        (
            {"pet": "none"},
            "method: first_session trains a pet, but the recipe has none: name one, or use method: frozen",
        ),
    ],
)
def test_what_it_does_not_go_with(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError) as caught:
        made(**changes)
    assert str(caught.value) == told


def test_plain_tuning_leaves_the_sums_of_old_tasks_behind() -> None:
    """The control: with protection features of old tasks stay, and so do the sums made of them."""
    right, train = {}, {"epochs": 6, "batch_size": 8, "lr": 0.05}
    drift = {}
    for name, changes in (("plain", {}), ("protected", {"protect": {"energy": 0.999}})):
        tasks = tiny_stream(Runtime())
        method = made("finetune", train=train, **changes)
        learn_protected(method, tasks[0])
        old = torch.stack(Pictures("ab", 12, seed=7).pixels)
        before = method.features(old)
        for task in tasks[1:]:
            learn_protected(method, task)
        with torch.no_grad():
            drift[name] = float((method.features(old) - before).norm() / before.norm())
            found = method.predict(old).argmax(1)
        right[name] = float((found == torch.arange(2).repeat_interleave(12)).float().mean())
    assert drift["protected"] < 0.2 * drift["plain"]
    assert right["protected"] > right["plain"] + 0.2

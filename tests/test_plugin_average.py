"""Another package adds an average of the pets: it trains one set, answers with the other, and is protected."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import package

from perpetune.check import Checker, check_method
from perpetune.learning import learn_protected
from perpetune.recipe import make_recipe

CODE = """
import contextlib
import torch
import perpetune
from perpetune.fit import fit
from perpetune.methods.base import training
from perpetune.pets import copy_set, parameters, using


class Averaged(perpetune.Method):
    def __init__(self, model, *, train: perpetune.FitConfig, keep: float = 0.9):
        super().__init__(model)
        self.config, self.keep, self.answering = train, keep, "average"
        copy_set(model, "default", "average")

    def companions(self):
        return [*super().companions(), self.averaging]

    @contextlib.contextmanager
    def averaging(self, optimizer):
        hook = optimizer.register_step_post_hook(self.follow)
        yield
        hook.remove()

    @torch.no_grad()
    def follow(self, *_):
        for mean, now in zip(parameters(self.model, "average"), parameters(self.model, "default"), strict=True):
            mean.lerp_(now, 1 - self.keep)

    def learn(self, task):
        self.model.grow(task)
        with training(self.model):
            fit(self.loss, self.groups(self.config), task, self.config)
        if task.index == 0:  # what it was before is no protected point, so the average begins here
            copy_set(self.model, "default", "average")

    def loss(self, task, batch):
        with using(self.model, self.trained):
            return self.model.loss(task, batch)
"""


@pytest.fixture(autouse=True)
def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, monkeypatch, "tides", CODE)


@pytest.mark.parametrize("on", ["pictures", pytest.param("texts", marks=pytest.mark.slow)])
def test_it_keeps_the_contract_on_pictures_and_on_texts(on: str) -> None:
    assert {(o.on, o.fault) for o in check_method("tides:Averaged", on=on)} == {(on, None)}


def moved(protect: bool) -> float:
    """How far the features of the first task's classes move through the later tasks, as a share."""
    content = {"method": "tides:Averaged", "protect": {"energy": 0.999} if protect else None}
    checker = Checker(make_recipe({**content, "train": {"epochs": 3, "batch_size": 8, "lr": 0.01}}))
    method, (first, *rest), inputs = checker.make(), checker.stream(), checker.kind.asked("ab")
    learn_protected(method, first)
    before = method.features(inputs).detach().clone()
    for task in rest:
        learn_protected(method, task)
    return float((method.features(inputs) - before).norm() / before.norm())


def test_the_average_follows_the_protected_steps() -> None:
    held, free = moved(True), moved(False)
    assert 0 < held < 0.1 * free

"""Another package adds a pool: a shared set that protection holds, and private members that each example chooses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import package

from perpetune.check import Checker, check_method
from perpetune.learning import learn_protected
from perpetune.recipe import make_recipe

CODE = """
import torch
import perpetune
from perpetune.fit import fit
from perpetune.methods.base import training
from perpetune.pets import Choice, copy_set, using


class Pool(perpetune.Method):
    several = True

    def __init__(self, model, *, train: perpetune.FitConfig):
        super().__init__(model)
        self.config = train
        copy_set(model, "member", "other")
        self.trained, self.private = ("general",), ("member", "other")

    def chosen(self, inputs):
        index = (perpetune.Inputs.of(inputs).pixels.float().mean((1, 2, 3)) > 127).long()
        return ["general", Choice(("member", "other"), index[:, None])]

    def learn(self, task):
        self.model.grow(task)
        with training(self.model):
            fit(self.loss, self.groups(self.config, ["general", *self.private]), task, self.config)

    def loss(self, task, batch):
        with using(self.model, self.chosen(batch.inputs)):
            return self.model.loss(task, batch)

    def predict(self, inputs):
        with using(self.model, self.chosen(inputs)):
            return self.model.predict(inputs)

    def observe(self, inputs):
        with using(self.model, self.chosen(inputs)):
            self.model.observe(inputs)


class SharedPool(Pool):
    def __init__(self, model, *, train: perpetune.FitConfig):
        super().__init__(model, train=train)
        self.trained, self.private = ("general", "member", "other"), ()
        self.sometimes = ("member", "other")
"""
PETS = ["pet=none", "pets.general={name: lora, blocks: [0]}", "pets.member={name: prefix, blocks: [1], length: 3}"]


@pytest.fixture(autouse=True)
def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, monkeypatch, "lake", CODE)


@pytest.mark.parametrize(
    ("kind", "sets"),
    [pytest.param("Pool", {"general"}, marks=pytest.mark.slow), ("SharedPool", {"general", "member", "other"})],
)
def test_it_keeps_the_contract_and_what_is_shared_is_protected(kind: str, sets: set[str]) -> None:
    faults = [f"{o.rule}: {o.fault}" for o in check_method(f"lake:{kind}", PETS, on="pictures") if o.fault]
    assert faults == []
    content: dict[str, Any] = {"pets": {"general": "lora", "member": "prefix"}, "protect": {"energy": 0.9999}}
    checker = Checker(make_recipe({**content, "method": f"lake:{kind}"}))
    method, found = checker.make(), []
    for task in checker.stream():
        found = learn_protected(method, task)
    assert {site["site"].split("/")[-2] for site in found[-1]["sites"]} == sets
    assert found[-1]["worst"] < 0.1

"""How answers are judged and counted: sums over examples and over all processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from perpetune.errors import UsageError
from perpetune.methods.base import Method
from perpetune.runtime import Runtime
from perpetune.tasks import Batch, Task

Setting = Literal["class", "domain", "task"]
Among = Literal["seen", "task", "own"]
AMONG: Mapping[Setting, Among] = MappingProxyType({"class": "seen", "domain": "seen", "task": "task"})
Classes = Mapping[str, Sequence[str]]
"""The classes of each task of a stream, learned or not, by its name."""


class Sums:
    """Sums over examples by name, over all processes.

    The first process always has a batch; one without any does not know the names, and has nothing to add.

    Args:
        zero: a sum over no example.
    """

    def __init__(self, run: Runtime, zero: Tensor):
        self.run, self.zero = run, zero
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        self.sums[name] = value + self.sums.get(name, 0)

    def totals(self) -> dict[str, Any]:
        """The sums as plain numbers or lists."""
        names = self.run.of_first(list(self.sums))
        return {name: self.run.sum(self.sums.get(name, self.zero)).tolist() for name in names}


class Members:
    """How often each member was chosen, over all processes."""

    def __init__(self, run: Runtime):
        self.run = run
        self.names: list[str] = []
        self.counts = torch.zeros(0, dtype=torch.int64, device=run.device)

    def count(self, names: Sequence[str], index: Tensor) -> None:
        self.names = list(names)
        now = torch.bincount(index.flatten().to(self.run.device), minlength=len(names))
        self.counts = now if not len(self.counts) else self.counts + now

    def totals(self) -> dict[str, int]:
        """The counts of those that were chosen at all, by name."""
        names = self.run.of_first(self.names)
        if not names:
            return {}
        none = torch.zeros(len(names), dtype=torch.int64, device=self.run.device)
        counts = self.run.sum(self.counts if len(self.counts) else none).tolist()
        return {name: count for name, count in zip(names, counts, strict=True) if count}


class Choices:
    """1 where the best class is the right one, else 0.

    Args:
        learned: the classes that were learned, whose scores come.
        asked: the classes whose scores come instead, all of them to be compared.
    """

    score: str | None = None

    def __init__(self, learned: Sequence[str], task: Task, among: Among, asked: Sequence[str] | None = None):
        known, device = learned if asked is None else asked, task.runtime.device
        row = {name: i for i, name in enumerate(known)}
        self.rows = torch.tensor([row.get(name, -1) for name in task.classes], device=device)  # -1: never predicted
        self.allowed = torch.ones(len(known), dtype=torch.bool, device=device)
        if among != "seen" and asked is None:
            self.allowed[:] = False
            self.allowed[self.rows[self.rows >= 0]] = True

    def __call__(self, scores: Tensor, batch: Batch) -> Tensor:
        best = scores.float().masked_fill(~self.allowed, -torch.inf).argmax(1)
        return best == self.rows[batch.targets]


class Going:
    """How many answers go to the classes of each task.

    Attributes:
        apart: whether no class belongs to two tasks; otherwise there is nothing to count.
    """

    def __init__(self, tasks: Classes, asked: Sequence[str], device: torch.device):
        self.tasks = list(tasks)
        owner = {name: number for number, classes in enumerate(tasks.values()) for name in classes}
        self.apart = sum(map(len, tasks.values())) == len(owner)
        self.owner = torch.tensor([owner[name] for name in asked], device=device)
        self.counts = torch.zeros(len(tasks), dtype=torch.int64, device=device)

    def count(self, scores: Tensor) -> None:
        self.counts += torch.bincount(self.owner[scores.float().argmax(1)], minlength=len(self.tasks))


class Texts:
    """The score of each answer, or 1 where the best of the options is the right one, else 0."""

    def __init__(self, method: Method, task: Task):
        assert task.test is not None
        self.model = method.model
        try:
            self.judge = self.model.view.judge(task.test, task.score)
        except UsageError as error:
            raise UsageError(f"task {task.name}: {error}") from None
        self.score: str | None = task.score

    def __call__(self, scores: Tensor, batch: Batch) -> Tensor:
        assert batch.numbers is not None
        values = []
        for row, number in zip(scores, batch.numbers.tolist(), strict=True):
            answer: str | int = int(row.argmax()) if row.is_floating_point() else self.model.read(row)
            values.append(self.judge(number, answer))
        return torch.tensor(values, device=scores.device)


def whole(value: float) -> int | float:
    """A sum of zeros and ones as the whole number it is, any other to six places."""
    return int(value) if value == int(value) else round(value, 6)

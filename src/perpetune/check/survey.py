"""Where a method waits for a device while it learns tasks: in its steps, and in its passes over data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from perpetune.check.waits import DEVICE, Waits, on_stand
from perpetune.learning import learn_protected
from perpetune.methods.base import Method
from perpetune.runtime import Silent
from perpetune.tasks import Batch, Examples, Task


@dataclass(frozen=True)
class At:
    """What a method does.

    Attributes:
        task: the index of the task.
        within: the phase of `fit`; `before` or `after PHASE` outside of `fit`.
        number: of the step, from 1; outside of `fit` the number of batches that were loaded since then.
    """

    task: int
    within: str
    number: int

    @property
    def in_step(self) -> bool:
        return not self.within.startswith(("before", "after "))


class _Told(Silent):
    """Tells `Waits` where `fit` is."""

    def __init__(self, waits: Waits):
        self.waits, self.index, self.name, self.total = waits, 0, "", 0

    def phase(self, phase: str, steps: int, epochs: int, done: int) -> None:
        self.name, self.total = phase, steps
        self.waits.at = At(self.index, phase, done + 1)

    def step(self, done: int, epoch: int, loss: float | None, images: int) -> None:
        over = done == self.total
        self.waits.at = At(self.index, f"after {self.name}" if over else self.name, 0 if over else done + 1)


class _Counted(Examples):
    """Examples that tell `Waits` of each batch that is loaded outside of `fit`."""

    def __init__(self, examples: Examples, waits: Waits):
        self.__dict__.update(examples.__dict__)
        self._examples, self._waits = examples, waits

    def __len__(self) -> int:
        return len(self._examples)

    def load(self, index: int, seed: int | None) -> Any:
        return self._examples.load(index, seed)

    def collate(self, items: Any) -> Batch:
        at = self._waits.at
        if not at.in_step:
            self._waits.at = At(at.task, at.within, at.number + 1)
        return self._examples.collate(items)

    def questions(self) -> Examples:
        return _Counted(self._examples.questions(), self._waits)

    def text(self, index: int) -> Any:
        return self._examples.text(index)

    def captions(self, index: int) -> Any:
        return self._examples.captions(index)


def survey(method: Method, tasks: Sequence[Task], *, batch_size: int = 4) -> Waits:
    """Let a method learn tasks on the stand-in. `Wait.at` is an `At`.

    Args:
        method: a new one, on the CPU.
        tasks: with `run.device` as it may be; it is changed.
        batch_size: of passes over what is protected.
    """
    with Waits() as waits:
        waits.on = False
        on_stand(method)
        told = _Told(waits)
        for task in tasks:
            task.runtime.device, task.runtime.progress = DEVICE, told
            told.index, waits.at, waits.on = task.index, At(task.index, "before", 0), True
            learn_protected(method, replace(task, train=_Counted(task.train, waits)), batch_size=batch_size)
            waits.on = False
    return waits


def in_steps(waits: Waits, first: int = 3, last: int = 5) -> dict[str, int]:
    """How often each place waited in these steps of all phases of a `survey`."""
    return waits.count(lambda wait: wait.at.in_step and first <= wait.at.number <= last)


def in_batches(waits: Waits, least: int = 3) -> dict[str, int]:
    """How often each place waited in passes over data of a `survey`, if it waited in so many batches of one task."""
    batches: dict[tuple[str, int, str], set[int]] = {}
    for wait in waits.found:
        if not wait.at.in_step and wait.at.number:
            batches.setdefault((wait.where, wait.at.task, wait.at.within), set()).add(wait.at.number)
    many = {where for (where, *_), numbers in batches.items() if len(numbers) >= least}
    return waits.count(lambda wait: wait.where in many and not wait.at.in_step)

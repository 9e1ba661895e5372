"""The method `joint`: after each task it trains anew on all data so far. It is the upper bound for other methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from perpetune.errors import UsageError
from perpetune.fit import FitConfig
from perpetune.methods.base import Method
from perpetune.methods.finetune import FineTune
from perpetune.models.base import Model
from perpetune.pets import PET, pets
from perpetune.tasks import Pick, Task


class Joint(Method):
    """Trains on this task and all earlier ones together, each time from the initial parameters.

    Its result after task `t` is that of plain training on all data so far. No method that has to remember is expected
    to do better.

    Args:
        model: with one set of pets or several, or with none.
        train: how each union of tasks is trained; `epochs` counts passes over the union.
    """

    needs_earlier_data = True
    several = True
    unaveraged = "trains anew on all data, so an average has nothing to keep"
    unprotectable = "keeps all data, so there is nothing for protect: to keep"

    def __init__(self, model: Model, *, train: FitConfig):
        super().__init__(model)
        self.inner = FineTune(model, train=train, mask="none")
        self._start = [{k: v.clone() for k, v in pet.state_dict().items()} for pet in self._pets()]

    def learn(self, task: Task) -> None:
        if task.earlier is None:
            raise UsageError(
                "method: joint needs the data of all tasks, but an update has only the data of its own task: use "
                "`perpetune run`, or another method"
            )
        for pet, start in zip(self._pets(), self._start, strict=True):
            pet.load_state_dict(start)
        self.model.reset()
        self.inner.learn(union([*task.earlier, task]))

    def _pets(self) -> list[PET]:
        return [pet for name in self.trained for pet in pets(self.model, name)]


def union(tasks: Sequence[Task]) -> Task:
    """The last of the tasks, with the classes and the training data of all of them."""
    classes = tuple(dict.fromkeys(c for t in tasks for c in t.classes))
    every = [(k, i) for k, t in enumerate(tasks) for i in range(len(t.train))]
    train = Pick([t.train for t in tasks], every, [[classes.index(c) for c in t.classes] for t in tasks])
    return dataclasses.replace(tasks[-1], classes=classes, train=train)

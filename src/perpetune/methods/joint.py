"""All data seen so far, at once, from the start: the upper bound that keeps everything."""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from perpetune.errors import UsageError
from perpetune.fit import FitConfig
from perpetune.methods.base import Method
from perpetune.methods.finetune import FineTune
from perpetune.models.classifier import ImageClassifier
from perpetune.pets import PET, pets
from perpetune.tasks import Examples, Task, deterministic


class Joint(Method):
    """Trains on this task and all earlier ones together, from fresh parameters each time: the upper bound.

    What it reaches after task t is what plain training reaches when nothing has to be remembered.

    Args:
        model: with a pet injected under the name `default`, or with none.
        train: how each union is trained; `epochs` counts passes over the union.
    """

    needs_earlier_data = True

    def __init__(self, model: ImageClassifier, *, train: FitConfig):
        super().__init__(model)
        self.model: ImageClassifier = model
        self.inner = FineTune(model, train=train, mask="none")
        self.pet = self.inner.pet
        self._start = [{k: v.clone() for k, v in pet.state_dict().items()} for pet in self._pets()]

    def learn(self, task: Task) -> None:
        if task.earlier is None:
            raise UsageError(
                "method: joint needs the data of all tasks, and an update has only its own: use `perpetune run`, or "
                "another method"
            )
        for pet, start in zip(self._pets(), self._start, strict=True):
            pet.load_state_dict(start)
        self.model.head.reset()
        self.inner.learn(union([*task.earlier, task]))

    def _pets(self) -> list[PET]:
        return pets(self.model, self.pet) if self.pet else []


def union(tasks: Sequence[Task]) -> Task:
    """The last task with the classes and the training data of all of them."""
    classes = tuple(dict.fromkeys(c for t in tasks for c in t.classes))
    train = Together([t.train for t in tasks], [[classes.index(c) for c in t.classes] for t in tasks])
    return dataclasses.replace(tasks[-1], classes=classes, train=train)


class Together:
    """Several sets of examples one after the other; `maps[k][y]` is the common position of label y of set k."""

    def __init__(self, parts: Sequence[Examples], maps: Sequence[Sequence[int]]):
        self.parts = parts
        self.ends = list(accumulate(len(p) for p in parts))
        self.targets = [m[y] for p, m in zip(parts, maps, strict=True) for y in p.targets]
        self.deterministic = all(deterministic(p) for p in parts)

    def __len__(self) -> int:
        return self.ends[-1]

    def load(self, index: int, seed: int | None) -> Any:
        k = bisect_right(self.ends, index)
        return self.parts[k].load(index - (self.ends[k - 1] if k else 0), seed)

"""Cut tasks down to a few examples, and remember how many they had."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from perpetune.data.examples import TableSet
from perpetune.data.tasks import TaskData
from perpetune.seeding import generator
from perpetune.tasks import Pick, balanced


@dataclass(frozen=True)
class Sizes:
    """How many examples a task has, and its name."""

    name: str
    classes: int
    train: int
    validation: int
    test: int


@dataclass
class Sample:
    """Leaves each task at most some of its examples, balanced over its classes and drawn by the seed.

    Attributes:
        train: the most training examples of a task; each class keeps two, so there may be more.
        test: the most test examples, and the most for validation.
        seed: draws them.
        full: the sizes of the tasks before they were cut, by index.
    """

    train: int
    test: int
    seed: int
    full: dict[int, Sizes] = field(default_factory=dict)

    def __call__(self, data: TaskData) -> TaskData:
        count = [0 if part is None else len(part) for part in (data.train, data.validation, data.test)]
        self.full[data.index] = Sizes(data.name, len(data.classes), *count)
        least = 2 * len(data.classes)
        train = self._some(data, data.train, max(self.train, least))
        held = data.validation and self._some(data, data.validation, self.test)
        test = data.test and self._some(data, data.test, self.test)
        return dataclasses.replace(data, train=train, validation=held or None, test=test or None, warnings=[], bad=[])

    def _some(self, data: TaskData, examples: TableSet, count: int) -> TableSet:
        drawn = balanced(examples, count, generator(self.seed, "estimate", data.index))
        if not isinstance(drawn, Pick):
            return examples
        stay = {examples.rows[number] for _, number in drawn.picked}
        return examples.within(data.classes, {row for row in examples.rows if row not in stay})

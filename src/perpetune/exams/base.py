"""An exam as a value: questions, the classes that may answer them, and what the answers are worth."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from perpetune.errors import UsageError
from perpetune.evaluate import Among, evaluate
from perpetune.methods.base import Method
from perpetune.tasks import Task

Values = Mapping[str, float]
Opener = Callable[[str | Mapping[str, Any]], Task]
"""Makes a task of a data source, given as a recipe's `data:` section or as a path; its test data are the questions."""


def right_answers(method: Method, exam: Exam, batch_size: int) -> Values:
    """The share of right answers, or the mean score of answers in text under the name of the score; in [0, 1].

    Nothing is known before the first class is learned, unless the head can answer with classes that it has not learned.
    """
    model = method.model
    if model.chooses and not method.classes and not (exam.among == "own" and model.any_class):
        return {}
    cell = evaluate(method, exam.task, among=exam.among, batch_size=batch_size)
    if cell is None:
        return {}
    return {cell.get("score", "accuracy"): round(cell["correct"] / cell["total"], 6)}


@dataclass(frozen=True)
class Exam:
    """What a model is asked before its first task and after each, and which nothing is learned from.

    Attributes:
        name: unique in its recipe; letters, digits, `.`, `_`, `-` and `/`.
        task: its test data are the questions.
        among: the classes that may be answered: `seen`, all that were learned; `task`, those of the exam that were
            learned; `own`, those of the exam, learned or not, which a head that reads the names of classes can answer.
        judge: called as `judge(method, exam, batch_size)`: what the answers are worth, as numbers by name. It may ask
            the method whatever it likes; several processes call it alike.
        begun: the numbers of this exam before the first task; empty while they are found.
        trained: how many training examples each class has had so far, by its name.
    """

    name: str
    task: Task
    among: Among = "seen"
    judge: Callable[[Method, Exam, int], Values] = right_answers
    begun: Values = field(default_factory=dict)
    trained: Mapping[str, int] = field(default_factory=dict)

    def taken(self, method: Method, batch_size: int) -> dict[str, float]:
        """The numbers of this exam as the method stands; none where nothing can be asked yet.

        Raises:
            UsageError: the judge gives something that is no finite number.
        """
        values = dict(self.judge(method, self, batch_size))
        for name, value in values.items():
            if not math.isfinite(value):
                raise UsageError(f"exam {self.name}: {name} is {value!r}; a finite number is expected")
        return {name: float(value) for name, value in values.items()}


class Suite(ABC):
    """Some exams that belong together, as the section `exams:` of a recipe names them.

    Its keyword-only arguments are its options in a recipe. Other packages announce theirs as entry points
    `perpetune.exams`.
    """

    @abstractmethod
    def exams(self, name: str, opened: Opener) -> Sequence[Exam]:
        """The exams.

        Args:
            name: what the recipe calls the suite; the names of exams begin with it.
            opened: makes a task of a data source.

        Raises:
            UsageError, DataError: the data cannot be had.
        """


def take_all(
    exams: Sequence[Exam],
    method: Method,
    batch_size: int,
    begun: Mapping[str, Values] | None = None,
    trained: Mapping[str, int] | None = None,
) -> dict[str, dict[str, float]]:
    """The numbers of each exam that has some, by its name.

    Args:
        exams: the exams.
        method: what is asked.
        batch_size: examples in a forward pass.
        begun: the numbers of each exam before the first task, by its name.
        trained: how many training examples each class has had so far, by its name.
    """
    known, counts = begun or {}, trained or {}
    asked = [replace(exam, begun=known.get(exam.name, {}), trained=counts) for exam in exams]
    taken = {exam.name: exam.taken(method, batch_size) for exam in asked}
    return {name: values for name, values in taken.items() if values}

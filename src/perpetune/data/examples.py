"""Base classes for a kind of example: the examples of a task, and the view, which has all the code that differs between
kinds."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, ClassVar, Literal, TypeVar

from torch import Tensor

from perpetune.data.sources import Kind, Table
from perpetune.errors import UsageError
from perpetune.tasks import Batch, Examples, Item

Purpose = Literal["training", "validation", "test"]
Augment = Literal["none", "flip", "crop", "crop_flip"]
Depth = Literal["decode", "header"]
Judge = Callable[[int, "str | int"], float]
"""Gives the score in [0, 1] for (number of an example, answer); an answer is a text, or the position of an option."""
S = TypeVar("S", bound="TableSet")


class TableSet(Examples):
    """Examples of a task: some rows of a table.

    Args:
        table: the table.
        rows: numbers of rows in `table`.
        classes: the task's classes. They include the label of every row, unless the table allows answers in free text.
    """

    def __init__(self, table: Table, rows: Sequence[int], classes: Sequence[str]):
        position = {name: i for i, name in enumerate(classes)}
        self.table = table
        self.rows = rows
        self._classes = classes
        labels = [table.labels[row] for row in rows]
        self.targets = [position.get(label, 0) if table.free else position[label] for label in labels]

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """The example's name in messages: its path, or its file and row."""
        return self.table.name(self.rows[index])

    def look(self, row: int, depth: Depth) -> None:
        """Check that row of the table; DataError, with the row's name, if it cannot be used."""
        self.table.check(row, depth)

    def notes(self) -> list[str]:
        """Notes about examples that are used in a changed form, such as cut texts; called after `look`."""
        return []

    def within(self: S, classes: Sequence[str], without: Collection[int]) -> S:
        """The examples that fit `classes`, except the rows in `without`."""
        known = set(classes)
        rows = [row for row in self.rows if row not in without and self.table.fits(row, known)]
        return self._of(rows, classes)

    @abstractmethod
    def _of(self: S, rows: Sequence[int], classes: Sequence[str]) -> S:
        """A set of the same class and the same table, with other rows."""

    @abstractmethod
    def load(self, index: int, seed: int | None) -> Any:
        """Example `index` in the form for the model; DataError, with its name, if it cannot be used any more."""


@dataclass(frozen=True)
class Question:
    """One question of a user to a learner.

    Attributes:
        given: as they gave it: the path or number of a picture, or a prompt.
        item: the same as the view's `collate` takes it.
        options: the answers that stand to choice.
        cut: how many tokens were cut off on its left, because the model takes no more.
        left_out: what the model's chat form leaves out of it.
        own: takes a generated text, and gives the answer without the white space that is not its own.
    """

    given: Any
    item: Any
    options: tuple[str, ...] = ()
    cut: int = 0
    left_out: tuple[str, ...] = ()
    own: Callable[[str], str] = str


class View(ABC):
    """All code about one kind of example, in the form that one backbone takes.

    Each kind has one view, in its folder (`data/pictures`, `data/texts`). Code that needs something that differs
    between the kinds asks the backbone's view.
    """

    takes: ClassVar[Kind]
    """The name of the kind, as in sources."""
    noun: ClassVar[str]
    """The word for the examples in reports, in the plural."""
    verb: ClassVar[Literal["predict", "answer"]]
    """The method of a learner that users call for this kind."""
    ordered: ClassVar[bool] = False
    """Whether tokens have places in an order, so that none can be added between them."""
    today: date | None = None
    """The day that is today for examples that say it; None is the day of the call."""

    @property
    @abstractmethod
    def extent(self) -> str:
        """How much of one example the model takes, in a few words."""

    @property
    def dated(self) -> bool:
        """Whether what a model reads of an example may say which day it is."""
        return False

    @abstractmethod
    def examples(
        self, table: Table, rows: Sequence[int], classes: Sequence[str], purpose: Purpose, augment: Augment = "none"
    ) -> TableSet:
        """Rows of a table as examples for the backbone.

        Args:
            table: the table with the rows.
            rows: the numbers of the rows.
            classes: the task's classes.
            purpose: what the examples are for.
            augment: the random changes to a picture each time it is loaded with a seed.

        Raises:
            UsageError: the table has another kind of example.
        """

    @abstractmethod
    def collate(self, items: Sequence[Item]) -> Batch:
        """A batch of the `items`, each (loaded example, target, number)."""

    @abstractmethod
    def typed(self, inputs: Sequence[str]) -> Sequence[Any]:
        """Turn the arguments of a command into what `ask` takes.

        Raises:
            UsageError, DataError: an argument does not lead to a question.
        """

    def plain(self, path: str) -> bool:
        """Whether `typed` reads what lies at a path; otherwise a source of data has to."""
        return path == "-" or os.path.isfile(path)

    @abstractmethod
    def ask(
        self,
        given: Any,
        *,
        first: int = 0,
        options: Sequence[str] = (),
        choose: bool | None = None,
        unreadable: list[str] | None = None,
    ) -> list[Question]:
        """Turn what users give to a learner into questions.

        Args:
            given: several examples without labels.
            first: the number of the first example, for messages.
            options: the answers among which the model chooses, if the kind has options.
            choose: whether the model itself chooses among the options; None does as at evaluation.
            unreadable: a list that gets one line for each example that cannot be read. Without it, it is an error.

        Raises:
            UsageError: the backbone does not take such a value.
            DataError: an example cannot be read; the message names it.
        """

    def judge(self, examples: Examples, score: str | None) -> Judge:
        """A function that scores answers in text to `examples`.

        Args:
            examples: the examples that were asked.
            score: the name of a score in `numerics.text_scores`; None is exact match.

        Raises:
            UsageError: answers to examples of this kind are not texts.
        """
        raise UsageError(f"answers to {self.takes} are classes, not texts")

    def unlabelled(self, path: str) -> TableSet:
        """All examples in a folder, as examples of one class.

        Raises:
            UsageError: this kind has no folders of examples without labels, or the folder does not exist.
            DataError: the folder has no examples.
        """
        raise UsageError(f"a folder of pictures is needed, but the backbone takes {self.takes}")

    def cut_note(self, cuts: Sequence[int], of: int, what: str, *, asked: bool = True) -> str:
        """A note about examples that were cut.

        Args:
            cuts: for each cut example, the number of tokens that it lost.
            of: the number of all examples.
            what: the word for the examples.
            asked: whether an answer follows, for which the model needs room.
        """
        return f"{len(cuts)} of {of} {what} were cut, because they are longer than the model can take"

    def read_alone(self) -> None:  # noqa: B027  # most kinds read every example alone
        """From now on no answer follows an example, so an example may have the model's full length."""

    def constants(self) -> dict[str, Tensor]:
        """Tensors that the backbone needs on its device to read inputs, by name."""
        return {}

    def _refused(self, table: Table) -> UsageError:
        return UsageError(f"data: these are {table.gives}, but the backbone takes {self.takes}")

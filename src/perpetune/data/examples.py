"""The examples of one kind: rows of a table as a task has them, and the view, which is all that a kind knows."""

from __future__ import annotations

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
Judge = Callable[[int, "str | int"], float]
"""The score in [0, 1] of an answer to an example, by its number; the answer is a text, or the position of an option."""
S = TypeVar("S", bound="TableSet")


class TableSet(Examples):
    """Some rows of a table.

    Args:
        rows: the rows of `table`.
        classes: the task's classes; the label of every row is among them, or the table is one that has others.
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
        """The example as messages call it: its path, or file and row."""
        return self.table.name(self.rows[index])

    def look(self, row: int, depth: Literal["decode", "header"]) -> None:
        """DataError, which names it, when that row of the table cannot be used."""
        self.table.check(row, depth)

    def notes(self) -> list[str]:
        """What is to be said of examples that are used, but not as they are; after `look`."""
        return []

    def within(self: S, classes: Sequence[str], without: Collection[int]) -> S:
        """The rows that have a place among `classes` and are not in `without`."""
        known = set(classes)
        rows = [row for row in self.rows if row not in without and self.table.fits(row, known)]
        return self._of(rows, classes)

    @abstractmethod
    def _of(self: S, rows: Sequence[int], classes: Sequence[str]) -> S:
        """Other rows of the same table, seen in the same way."""

    @abstractmethod
    def load(self, index: int, seed: int | None) -> Any:
        """Example `index` as the model reads it; DataError naming it when it cannot be used any more."""


@dataclass(frozen=True)
class Question:
    """One thing that people ask a learner.

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
    """All that the library knows of one kind of example, as one backbone takes it.

    The folder of a kind (`data/pictures`, `data/texts`) has one of them; whoever needs something that differs between
    kinds asks the backbone's view.
    """

    takes: ClassVar[Kind]
    """The kind, as sources name it."""
    noun: ClassVar[str]
    """What reports call the examples, in the plural."""
    verb: ClassVar[Literal["predict", "answer"]]
    """The call of a learner that people use for it."""
    ordered: ClassVar[bool] = False
    """Whether tokens have places in an order, so that none can be added between them."""
    today: date | None = None
    """The day that is today for examples that say it; None is the day of the call."""

    @property
    @abstractmethod
    def extent(self) -> str:
        """How much a model takes of one example, in a few words."""

    @property
    def dated(self) -> bool:
        """Whether what a model reads of an example may say which day it is."""
        return False

    @abstractmethod
    def examples(
        self, table: Table, rows: Sequence[int], classes: Sequence[str], purpose: Purpose, augment: Augment = "none"
    ) -> TableSet:
        """Rows of a table as the backbone takes them.

        Args:
            table: has the rows.
            rows: by number.
            classes: of the task.
            purpose: what they are used for.
            augment: what is done at random to a picture each time it is loaded with a seed.

        Raises:
            UsageError: the table is of another kind.
        """

    @abstractmethod
    def collate(self, items: Sequence[Item]) -> Batch:
        """A batch of (loaded example, target, number)."""

    @abstractmethod
    def typed(self, inputs: Sequence[str]) -> Sequence[Any]:
        """What `ask` takes, from the arguments of a command.

        Raises:
            UsageError, DataError: an argument stands for nothing that can be asked.
        """

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
        """What people give to a learner, as questions.

        Args:
            given: several examples without labels.
            first: the number of the first, for messages.
            options: the answers that stand to choice, where the kind has such.
            choose: whether the answer is chosen among them by the model itself; None is as at evaluation.
            unreadable: takes a line for each example that cannot be read, instead of an error.

        Raises:
            UsageError: it is nothing that the backbone takes.
            DataError: an example cannot be read; names it.
        """

    def judge(self, examples: Examples, score: str | None) -> Judge:
        """What scores an answer in text to one of `examples`.

        Args:
            examples: what was asked.
            score: a name of `numerics.text_scores`; None is exact match.

        Raises:
            UsageError: answers to examples of this kind are no texts.
        """
        raise UsageError(f"answers to {self.takes} are classes, and not texts")

    def unlabelled(self, path: str) -> TableSet:
        """All examples in a folder, as examples of one class.

        Raises:
            UsageError: this kind has no folders of examples without labels, or there is no such folder.
            DataError: there is none.
        """
        raise UsageError(f"a folder of pictures, and the backbone takes {self.takes}")

    def cut_note(self, cuts: Sequence[int], of: int, what: str, *, asked: bool = True) -> str:
        """What is said of examples that were cut.

        Args:
            cuts: how many tokens each of them lost.
            of: how many examples there are.
            what: what they are called.
            asked: whether an answer follows, for which the model needs room.
        """
        return f"{len(cuts)} of {of} {what} were cut, for they are longer than the model takes"

    def read_alone(self) -> None:  # noqa: B027  # most kinds read every example alone
        """From now on nothing is said after an example: it may be as long as the model takes."""

    def constants(self) -> dict[str, Tensor]:
        """Tensors that the backbone keeps on its device to read inputs, by name."""
        return {}

    def _refused(self, table: Table) -> UsageError:
        return UsageError(f"data: these are {table.gives}, and the backbone takes {self.takes}")

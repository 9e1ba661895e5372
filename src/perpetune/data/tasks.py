"""The examples of one task, checked when the task is about to begin."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from perpetune.data.check import Depth, Report, find_bad
from perpetune.data.sources import PictureTable, Table
from perpetune.data.text import several
from perpetune.data.texts import TextTable
from perpetune.errors import DataError, UsageError
from perpetune.models.preprocess import Augment, Preprocess
from perpetune.models.texts import Encoded, Text, TextView
from perpetune.tasks import Collate

View = Preprocess | TextView
Purpose = Literal["training", "validation", "test"]
S = TypeVar("S", bound="TableSet")


class TableSet(ABC):
    """Some rows of a table as `perpetune.tasks.Examples`.

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
        self._targets = [position.get(label, 0) if table.free else position[label] for label in labels]

    @property
    def targets(self) -> Sequence[int]:
        return self._targets

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


class ImageSet(TableSet):
    """Pictures of a task.

    Args:
        view: from picture to pixels; with `augment` where an example is loaded with a seed.
    """

    table: PictureTable

    def __init__(
        self,
        table: PictureTable,
        rows: Sequence[int],
        classes: Sequence[str],
        view: Preprocess,
        augment: Augment = "none",
    ):
        super().__init__(table, rows, classes)
        self.view = view
        self.augment = augment

    @property
    def deterministic(self) -> bool:
        return self.augment == "none"

    def load(self, index: int, seed: int | None) -> Tensor:
        """uint8 `(3, S, S)`; DataError naming the picture if it cannot be read any more."""
        return self.view(self.table.open(self.rows[index]), self.augment, seed)

    def _of(self, rows: Sequence[int], classes: Sequence[str]) -> ImageSet:
        return ImageSet(self.table, rows, classes, self.view, self.augment)


@dataclass(frozen=True)
class _Kept:
    """An example in tokens, small enough to be kept: to find tokens anew takes as long as to learn from them on a GPU.

    Attributes:
        tokens: int32 `(N,)`; where an answer is learned, `~token`.
        asks: whether it is a question, without an answer.
        options, cut, dropped: as in `Encoded`.
    """

    tokens: Tensor
    asks: bool
    options: tuple[Tensor, ...]
    cut: int
    dropped: int

    def encoded(self) -> Encoded:
        """The example as a model takes it."""
        said = self.tokens < 0
        ids = torch.where(said, ~self.tokens, self.tokens).long()
        return Encoded(ids, None if self.asks else said, self.options, self.cut, self.dropped)


def _kept(found: Encoded, options: dict[tuple[int, ...], Tensor]) -> _Kept:
    """`found`, with the same tensors for the same options, which all questions of a task may have."""
    ids, asks = found.ids.int(), found.answer is None
    tokens = ids if found.answer is None else torch.where(found.answer, ~ids, ids)
    shared = tuple(options.setdefault(tuple(option.tolist()), option) for option in found.options)
    return _Kept(tokens, asks, shared, found.cut, found.dropped)


class TextSet(TableSet):
    """Texts of a task: with their answers, or for the test as questions.

    Args:
        view: from text to tokens.
        purpose: what for; those of the test are questions.
    """

    table: TextTable
    deterministic = True

    def __init__(self, table: TextTable, rows: Sequence[int], classes: Sequence[str], view: TextView, purpose: Purpose):
        super().__init__(table, rows, classes)
        self.view = view
        self.purpose: Purpose = purpose
        self._found: dict[int, _Kept] = {}  # by row of the table
        self._options: dict[tuple[int, ...], Tensor] = {}

    @property
    def collate(self) -> Collate:
        """Makes a batch of examples that were loaded."""
        return self.view.collate

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [len(self._tokens(row).tokens) for row in self.rows]

    @cached_property
    def weights(self) -> list[int] | None:
        """Tokens of each answer, with its end; None of questions."""
        return None if self.purpose == "test" else [int((self._tokens(row).tokens < 0).sum()) for row in self.rows]

    def questions(self) -> TextSet:
        """The same without their answers, as they are asked at prediction."""
        if self.purpose == "test":
            return self
        return TextSet(self.table, self.rows, self._classes, self.view, "test")

    def text(self, index: int) -> Text:
        """Example `index` as people wrote it."""
        return self.table.text(self.rows[index])

    def load(self, index: int, seed: int | None) -> Encoded:
        """Prompt and answer as tokens, of the test the prompt alone; the seed changes nothing."""
        return self._tokens(self.rows[index]).encoded()

    def look(self, row: int, depth: Literal["decode", "header"]) -> None:
        super().look(row, depth)
        if depth == "decode":
            self._tokens(row)

    def notes(self) -> list[str]:
        known = [kept for row in self.rows if (kept := self._found.get(row)) is not None]
        cuts = [kept.cut for kept in known if kept.cut]
        dropped = [kept.dropped for kept in known if kept.dropped]
        notes = []
        if len(known) < len(self.rows):
            notes.append(
                f"how many {self.purpose} prompts are cut is not known, for stream.check has not looked at "
                f"{len(self.rows) - len(known)} of {len(self.rows)}"
            )
        if cuts:
            room = ", with room for an answer," if self.purpose == "test" and self.view.answers else ""
            notes.append(
                f"{len(cuts)} of {len(self.rows)} {self.purpose} prompts{room} are longer than the model's "
                f"{self.view.max_length} tokens and were cut on the left (the longest by {max(cuts)})"
            )
        if dropped:
            notes.append(
                f"{sum(dropped)} earlier answers in {len(dropped)} of {len(self.rows)} {self.purpose} chats are not "
                "learned, for the model's chat template writes them otherwise than at the end of a chat"
            )
        return notes

    def _of(self, rows: Sequence[int], classes: Sequence[str]) -> TextSet:
        found = TextSet(self.table, rows, classes, self.view, self.purpose)
        found._found, found._options = self._found, self._options
        return found

    def _encoded(self, row: int) -> Encoded:
        text = self.table.text(row)
        try:
            return self.view.question(text) if self.purpose == "test" else self.view.sequence(text)
        except DataError as error:
            raise DataError(f"{self.table.name(row)}: {error}") from error

    def _tokens(self, row: int) -> _Kept:
        if row not in self._found:
            self._found[row] = _kept(self._encoded(row), self._options)
        return self._found[row]


def table_set(
    table: Table,
    rows: Sequence[int],
    classes: Sequence[str],
    view: View,
    purpose: Purpose,
    augment: Augment = "none",
) -> ImageSet | TextSet:
    """Rows of a table as the backbone takes them.

    Raises:
        UsageError: it takes another kind of data.
    """
    if isinstance(table, PictureTable) and isinstance(view, Preprocess):
        return ImageSet(table, rows, classes, view, augment)
    if isinstance(table, TextTable) and isinstance(view, TextView):
        return TextSet(table, rows, classes, view, purpose)
    raise UsageError(f"data: these are {table.gives}, and the backbone takes {view.takes}")


@dataclass
class TaskData:
    """What one task learns from and is scored on.

    Attributes:
        index: position in the stream, from 0.
        name: unique in the stream; letters, digits, `.`, `_` and `-` only.
        classes: of pictures the labels that occur in the training data, of texts the answers that stand to choice;
            targets are positions in it. Empty where answers are free text.
        train, validation, test: the examples; validation and test are None where there are none.
        score: how answers in text are scored, a name of `numerics.text_scores`; None is right or wrong.
        depth, max_bad: how `check` looks at them, and how many bad ones it tolerates.
        warnings: one line each.
        bad: `name: reason` of each example that `check` left out.
    """

    index: int
    name: str
    classes: tuple[str, ...]
    train: ImageSet | TextSet
    validation: ImageSet | TextSet | None = None
    test: ImageSet | TextSet | None = None
    score: str | None = None
    depth: Depth = "decode"
    max_bad: int = 10
    warnings: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    checked: bool = False

    def __post_init__(self) -> None:
        self._given = (self.classes, self.train, self.validation, self.test)

    def check(self, report: Report | None = None) -> None:
        """Look at each example, and leave out those that cannot be used; a second call does nothing.

        A class that is left without a training picture goes, with a warning. Of texts it is said how many were cut.

        Args:
            report: called now and then with the number of examples looked at and the number there are.

        Raises:
            DataError: more than `max_bad` examples are bad, or no training example is good.
        """
        if self.checked:
            return
        table = self.train.table
        parts = [self.train, self.validation, self.test]
        found = find_bad(parts, self.depth, self.max_bad, f"task {self.name}", report)
        bad = [reason for reasons in found for reason in reasons.values()]
        good = [row for row in self.train.rows if row not in found[0]]
        none = f"no training {table.noun} can be {table.use}"
        if not good:
            raise DataError(f"task {self.name}: {none}: {several(bad)}")
        used = table.classes(good)
        lost = [c for c in self.classes if c not in used]
        if bad:
            self.warnings.append(_unusable(self.name, table, bad))
        if lost:
            self.warnings.append(f"task {self.name}: left out, for {none}: {several(lost)}")
        self.bad = bad
        self.classes = tuple(c for c in self.classes if c in used)
        self.train = self.train.within(self.classes, found[0])
        self.validation = self.validation and (self.validation.within(self.classes, found[1]) or None)
        self.test = self.test and (self.test.within(self.classes, found[2]) or None)
        for part in (self.train, self.validation, self.test):
            self.warnings += [f"task {self.name}: {note}" for note in (part.notes() if part is not None else [])]
        self.checked = True

    def for_testing(self, classes: Sequence[str]) -> TaskData:
        """The task with its test examples checked alone; those of training are not looked at, and nobody should.

        Args:
            classes: those that were learned.

        Raises:
            DataError: more than `max_bad` test examples are bad.
        """
        (found,) = find_bad([self.test], self.depth, self.max_bad, f"task {self.name}")
        test = self.test and (self.test.within(classes, found) or None)
        warnings = [_unusable(self.name, self.train.table, list(found.values()))] if found else []
        warnings += [f"task {self.name}: {note}" for note in (test.notes() if test is not None else [])]
        return replace(
            self,
            classes=tuple(classes),
            train=self.train.within(classes, {}),
            validation=None,
            test=test,
            warnings=warnings,
            bad=list(found.values()),
            checked=True,
        )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the task as it was before `check`: of each part what makes its examples what they are; of files
        only keys, labels and sizes."""
        classes, *parts = self._given
        digest = hashlib.sha256(repr(classes).encode())
        for part in parts:
            digest.update(b"\x1d")
            if part is None:
                continue
            for row in part.rows:
                digest.update(part.table.digest(row))
        return digest.hexdigest()


def _unusable(task: str, table: Table, bad: Sequence[str]) -> str:
    return f"task {task}: {len(bad)} {table.noun}s cannot be {table.use} and are left out: {several(bad)}"

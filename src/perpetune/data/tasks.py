"""The pictures of one task, checked when the task is about to begin."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

from perpetune.data.check import Depth, Report, find_bad
from perpetune.data.sources import Table
from perpetune.data.text import several
from perpetune.errors import DataError
from perpetune.models.preprocess import Augment, Preprocess


class ImageSet:
    """Some rows of a table as `perpetune.tasks.Examples`.

    Args:
        rows: the rows of `table`.
        classes: the task's classes; the label of every row is among them.
        view: from picture to pixels; with `augment` where an example is loaded with a seed.
    """

    def __init__(
        self, table: Table, rows: Sequence[int], classes: Sequence[str], view: Preprocess, augment: Augment = "none"
    ):
        position = {name: i for i, name in enumerate(classes)}
        self.table = table
        self.rows = rows
        self.view = view
        self.augment = augment
        self._targets = [position[table.labels[row]] for row in rows]

    @property
    def targets(self) -> Sequence[int]:
        return self._targets

    @property
    def deterministic(self) -> bool:
        return self.augment == "none"

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """The example as messages call it: its path, or file and row."""
        return self.table.name(self.rows[index])

    def load(self, index: int, seed: int | None) -> Tensor:
        """uint8 `(3, S, S)`; DataError naming the picture if it cannot be read any more."""
        return self.view(self.table.open(self.rows[index]), self.augment, seed)

    def within(self, classes: Sequence[str], without: dict[int, str]) -> ImageSet:
        """The rows whose label is in `classes` and that are not in `without`."""
        known = set(classes)
        rows = [r for r in self.rows if r not in without and self.table.labels[r] in known]
        return ImageSet(self.table, rows, classes, self.view, self.augment)


@dataclass
class TaskData:
    """What one task learns from and is scored on.

    Attributes:
        index: position in the stream, from 0.
        name: unique in the stream; letters, digits, `.`, `_` and `-` only.
        classes: labels that occur in the training data; targets are positions in it.
        train, validation, test: the pictures; validation and test are None where there are none.
        depth, max_bad: how `check` looks at them, and how many bad ones it tolerates.
        warnings: one line each.
        bad: `name: reason` of each picture that `check` left out.
    """

    index: int
    name: str
    classes: tuple[str, ...]
    train: ImageSet
    validation: ImageSet | None = None
    test: ImageSet | None = None
    depth: Depth = "decode"
    max_bad: int = 10
    warnings: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    checked: bool = False

    def __post_init__(self) -> None:
        self._given = (self.classes, self.train, self.validation, self.test)

    def check(self, report: Report | None = None) -> None:
        """Look at each picture, in threads, and leave out those that cannot be read; a second call does nothing.

        A class that is left without a training picture goes, with a warning.

        Args:
            report: called now and then with the number of pictures looked at and the number there are.

        Raises:
            DataError: more than `max_bad` pictures are bad, or no training picture is good.
        """
        if self.checked:
            return
        parts = [self.train, self.validation, self.test]
        looked = [(p.table, p.rows) if p is not None else (self.train.table, []) for p in parts]
        found = find_bad(looked, self.depth, self.max_bad, f"task {self.name}", report)
        bad = [reason for reasons in found for reason in reasons.values()]
        labels = self.train.table.labels
        used = {labels[row] for row in self.train.rows if row not in found[0]}
        lost = [c for c in self.classes if c not in used]
        if not used:
            raise DataError(f"task {self.name}: no training picture can be read: {several(bad)}")
        if bad:
            self.warnings.append(_unreadable(self.name, bad))
        if lost:
            self.warnings.append(f"task {self.name}: left out, for no training picture can be read: {several(lost)}")
        self.bad = bad
        self.classes = tuple(c for c in self.classes if c in used)
        self.train = self.train.within(self.classes, found[0])
        self.validation = self.validation and (self.validation.within(self.classes, found[1]) or None)
        self.test = self.test and (self.test.within(self.classes, found[2]) or None)
        self.checked = True

    def for_testing(self, classes: Sequence[str]) -> TaskData:
        """The task with its test pictures checked alone; those of training are not looked at, and nobody should.

        Args:
            classes: those that were learned.

        Raises:
            DataError: more than `max_bad` test pictures are bad.
        """
        train, test = self.train.within(classes, {}), self.test
        if test is None:
            return replace(self, classes=tuple(classes), train=train, validation=None, warnings=[], checked=True)
        (found,) = find_bad([(test.table, test.rows)], self.depth, self.max_bad, f"task {self.name}")
        return replace(
            self,
            classes=tuple(classes),
            train=train,
            validation=None,
            test=test.within(classes, found) or None,
            warnings=[_unreadable(self.name, list(found.values()))] if found else [],
            bad=list(found.values()),
            checked=True,
        )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the task as it was before `check`: of each part the keys, labels and sizes of the
        pictures, and the contents of those that are not files of their own."""
        classes, *parts = self._given
        digest = hashlib.sha256(repr(classes).encode())
        for part in parts:
            digest.update(b"\x1d")
            if part is None:
                continue
            table = part.table
            for row in part.rows:
                digest.update(repr((table.key(row), table.labels[row], table.size(row))).encode())
                if not table.files:
                    digest.update(table.content(row))
        return digest.hexdigest()


def _unreadable(task: str, bad: Sequence[str]) -> str:
    return f"task {task}: {len(bad)} pictures cannot be read and are left out: {several(bad)}"

"""The examples of one task, checked when the task is about to begin."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from perpetune.data.check import Depth, Report, find_bad
from perpetune.data.examples import TableSet
from perpetune.data.names import several
from perpetune.data.sources import Table
from perpetune.errors import DataError


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
    train: TableSet
    validation: TableSet | None = None
    test: TableSet | None = None
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

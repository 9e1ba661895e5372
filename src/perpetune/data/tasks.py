"""The data of one task. Its examples are checked just before the task begins."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from perpetune.data.check import Depth, Report, contents, find_bad
from perpetune.data.examples import TableSet
from perpetune.data.names import several
from perpetune.data.sketch import sketch
from perpetune.data.sources import Table
from perpetune.errors import DataError


@dataclass
class TaskData:
    """The examples that one task learns from and is scored on.

    Attributes:
        index: the position in the stream, from 0.
        name: unique in the stream; has only letters, digits, `.`, `_` and `-`.
        classes: for pictures the labels in the training data, for texts the answers among which the model chooses.
            Targets are positions in it. Empty if answers are free text.
        train, validation, test: the examples; validation and test may be None.
        score: the name of the score for answers in text, in `numerics.text_scores`; None counts answers as right or
            wrong.
        depth: how deeply `check` looks at each example.
        max_bad: the number of bad examples that `check` tolerates.
        warnings: one line each.
        bad: for each example that `check` left out, a line `name: reason`.
        checked: whether `check` was called.
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
        """Check each example, and leave out those that cannot be used; a second call does nothing.

        A class without a usable training picture is left out, with a warning. A note says how many texts were cut.

        Args:
            report: is called now and then with the numbers of checked examples and of all examples.

        Raises:
            DataError: more than `max_bad` examples are bad, or no training example is good.
        """
        if self.checked:
            return
        table = self.train.table
        parts = [self.train, self.validation, self.test]
        bad_rows = find_bad(parts, self.depth, self.max_bad, f"task {self.name}", report)
        bad = [reason for reasons in bad_rows for reason in reasons.values()]
        good = [row for row in self.train.rows if row not in bad_rows[0]]
        none = f"no training {table.noun} can be {table.use}"
        if not good:
            raise DataError(f"task {self.name}: {none}: {several(bad)}")
        used = table.classes(good)
        lost = [c for c in self.classes if c not in used]
        if bad:
            self.warnings.append(_unusable(self.name, table, bad))
        if lost:
            self.warnings.append(f"task {self.name}: classes left out, because {none}: {several(lost)}")
        self.bad = bad
        self.classes = tuple(c for c in self.classes if c in used)
        self.train = self.train.within(self.classes, bad_rows[0])
        self.validation = self.validation and (self.validation.within(self.classes, bad_rows[1]) or None)
        self.test = self.test and (self.test.within(self.classes, bad_rows[2]) or None)
        for part in (self.train, self.validation, self.test):
            self.warnings += [f"task {self.name}: {note}" for note in (part.notes() if part is not None else [])]
        self.checked = True

    def for_testing(self, classes: Sequence[str]) -> TaskData:
        """The task with checked test examples. Its training examples are not checked; do not use them.

        Args:
            classes: the classes that were learned.

        Raises:
            DataError: more than `max_bad` test examples are bad.
        """
        (bad_rows,) = find_bad([self.test], self.depth, self.max_bad, f"task {self.name}")
        test = self.test and (self.test.within(classes, bad_rows) or None)
        warnings = [_unusable(self.name, self.train.table, list(bad_rows.values()))] if bad_rows else []
        warnings += [f"task {self.name}: {note}" for note in (test.notes() if test is not None else [])]
        return replace(
            self,
            classes=tuple(classes),
            train=self.train.within(classes, {}),
            validation=None,
            test=test,
            warnings=warnings,
            bad=list(bad_rows.values()),
            checked=True,
        )

    @cached_property
    def contents(self) -> dict[str, Any] | None:
        """What is stored of the contents of the examples, so that the same data are known again (`data.sketch`); None
        if `check` does not look at them.

        Test and validation examples count if they were drawn from the training data, because another share may be drawn
        from the same data the next time.
        """
        return None if self.hashes is None else sketch(self.hashes.values())

    @cached_property
    def hashes(self) -> dict[int, str] | None:
        """A hash of the content of each example by its row, as in `contents`."""
        if self.depth == "none":
            return None
        table, (_, *parts) = self.train.table, self._given
        rows = sorted({row for part in parts if part is not None and part.table is table for row in part.rows})
        return dict(zip(rows, contents(table, rows), strict=True))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the task as it was before `check`. It covers the content of all examples; of files only the keys,
        labels and sizes."""
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

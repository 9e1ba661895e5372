"""Examples that stand in two sets: the same file, or the same bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

from perpetune.data.check import in_threads
from perpetune.data.sources import Table

START = 4096  # bytes that are compared before whole examples are
Row = tuple[Table, int]


class Overlap:
    """Rows of tables, to be found among rows of another table.

    What is compared of a known row is read once, so a search takes time for the rows that are searched and for those
    that agree with them, and not for all that are known. Before two rows are said to be the same, both are read again.

    Args:
        contents: whether rows of the same bytes are the same; otherwise only rows of the same file are.
    """

    def __init__(self, contents: bool = True):
        self.contents = contents
        self._files: dict[Hashable, list[Row]] = {}
        self._sizes: dict[Hashable, list[Row]] = {}
        self._starts: dict[Row, bytes] = {}

    def add(self, table: Table, rows: Iterable[int]) -> None:
        """Make rows of a table known. Add each row once."""
        known = [(table, row) for row in rows]
        for row, identity in _values(known, _identity):
            self._files.setdefault(identity, []).append(row)
        for row, size in _values(known, _size) if self.contents else ():
            self._sizes.setdefault(size, []).append(row)

    def find(self, table: Table, rows: Iterable[int]) -> list[tuple[int, Row]]:
        """The known rows that are among `rows` of `table`.

        Bytes are compared by a hash, and only if the size and the first 4 KiB agree.

        Returns:
            For each known row that is there, the first of `rows` that equals it, and the known row; sorted by both
            numbers.
        """
        mine = [(table, row) for row in rows]
        found = self._same(mine, self._files, [_identity])
        if self.contents:
            found |= self._same(mine, self._sizes, [_size, _start, _whole])
        return sorted(((first, known) for known, first in found.items()), key=lambda pair: (pair[0], pair[1][1]))

    def _same(
        self, mine: Sequence[Row], index: dict[Hashable, list[Row]], steps: Sequence[Callable[[Row], Any]]
    ) -> dict[Row, int]:
        """The known rows that agree with one of `mine` in every step, each with the first row that it agrees with.

        Args:
            index: known rows by the value of the first step, as it was when they were added.
        """
        left = [pair for pair in _values(mine if index else (), steps[0]) if pair[1] in index]
        known = [row for value in dict.fromkeys(value for _, value in left) for row in index[value]]
        for step in steps:
            once = self._known_start if step is _start else step
            ours, theirs = dict(_values([row for row, _ in left], step)), dict(_values(known, once))
            common = set(ours.values()) & set(theirs.values())
            left = [(row, value) for row, value in ours.items() if value in common]
            known = [row for row, value in theirs.items() if value in common]
        first: dict[Hashable, int] = {}
        for (_, number), value in left:
            first.setdefault(value, number)
        return {row: first[theirs[row]] for row in known}

    def _known_start(self, row: Row) -> bytes:
        found = self._starts.get(row)
        if found is None:
            found = self._starts[row] = _start(row)
        return found


def find_overlap(
    train: Table,
    test: Table,
    contents: bool,
    *,
    train_rows: Iterable[int] | None = None,
    test_rows: Iterable[int] | None = None,
) -> list[tuple[int, int]]:
    """Pairs of a training row and a test row that are the same file, or (with `contents`) have the same bytes.

    Each test row is in one pair at most.

    Args:
        train_rows, test_rows: the rows to compare; default: all rows.
    """
    known = Overlap(contents)
    known.add(test, range(len(test)) if test_rows is None else test_rows)
    found = known.find(train, range(len(train)) if train_rows is None else train_rows)
    return [(first, row) for first, (_, row) in found]


def _values(rows: Sequence[Row], step: Callable[[Row], Any]) -> list[tuple[Row, Any]]:
    """The rows with their values in a step, without rows that have none."""
    values = in_threads(lambda i: step(rows[i]), range(len(rows)))
    return [(row, value) for row, value in zip(rows, values, strict=True) if value is not None]


def _identity(row: Row) -> tuple[int, int] | None:
    return row[0].identity(row[1])


def _size(row: Row) -> int | None:
    return row[0].size(row[1]) or None


def _start(row: Row) -> bytes:
    return hashlib.sha256(row[0].content(row[1], START)).digest()


def _whole(row: Row) -> bytes:
    return hashlib.sha256(row[0].content(row[1])).digest()

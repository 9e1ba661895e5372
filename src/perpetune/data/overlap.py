"""Examples that stand in two sets: the same file, or the same bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from perpetune.data.check import in_threads
from perpetune.data.sources import Table

START = 4096  # bytes that are compared before whole examples are
Row = tuple[Table, int]


class Overlap:
    """Rows of tables, to be found among rows of another table.

    What is compared of a known row is read once, so a search takes time for the rows that are searched and for those
    that equal them, and not for all that are known. Before two rows are said to be the same, both are read again.

    Args:
        contents: whether rows of the same bytes are the same; otherwise only rows of the same file are.
    """

    def __init__(self, contents: bool = True):
        self.contents = contents
        self._files: dict[Hashable, list[Row]] = {}
        self._unread: dict[int, list[Row]] = {}  # by their size, those whose start nobody has asked for yet
        self._starts: dict[tuple[int, bytes], list[Row]] = {}
        self._read: set[int] = set()  # the sizes that have a start

    def add(self, table: Table, rows: Iterable[int]) -> None:
        """Make rows of a table known. Add each row once."""
        known = [(table, row) for row in rows]
        for row, identity in _values(known, _identity):
            self._files.setdefault(identity, []).append(row)
        for row, size in _values(known, _size) if self.contents else ():
            self._unread.setdefault(size, []).append(row)

    def find(self, table: Table, rows: Iterable[int]) -> list[tuple[int, Row]]:
        """The known rows that are among `rows` of `table`.

        Bytes are compared by a hash, and only if the size and the first 4 KiB agree.

        Returns:
            For each known row that is there, the first of `rows` that equals it, and the known row; sorted by both
            numbers.
        """
        mine = [(table, row) for row in rows]
        found = _agreeing(_values(mine if self._files else (), _identity), self._files, _identity)
        if self.contents and (self._unread or self._starts):
            found |= _agreeing(self._starts_of(mine), self._starts, _whole)
        return sorted(((first, known) for known, first in found.items()), key=lambda pair: (pair[0], pair[1][1]))

    def _starts_of(self, mine: Sequence[Row]) -> list[tuple[Row, tuple[int, bytes]]]:
        """Size and start of those rows that have the size of a known row, whose starts are read if nobody has."""
        sizes = dict(_values(mine, _size))
        for size in set(sizes.values()) & self._unread.keys():
            rows = self._unread.pop(size)
            starts = dict(_values(rows, _start))
            for row, start in starts.items():
                self._starts.setdefault((size, start), []).append(row)
            self._read.add(size)
            if missing := [row for row in rows if row not in starts]:
                self._unread[size] = missing
        like = [row for row, size in sizes.items() if size in self._read]
        return [(row, (sizes[row], start)) for row, start in _values(like, _start)]


def _agreeing(
    mine: Iterable[tuple[Row, Hashable]], index: Mapping[Any, Sequence[Row]], last: Callable[[Row], Any]
) -> dict[Row, int]:
    """The known rows that agree with one of `mine`, each with the first row that it agrees with.

    Args:
        mine: rows, each with what known rows stand under in the index.
        last: what is read of both, after they agree in the index.
    """
    left = [(row, key) for row, key in mine if key in index]
    ours = dict(_values([row for row, _ in left], last))
    theirs = dict(_values(list(dict.fromkeys(known for _, key in left for known in index[key])), last))
    first: dict[Hashable, int] = {}
    for row, _ in left:
        if row in ours:
            first.setdefault(ours[row], row[1])
    return {row: first[value] for row, value in theirs.items() if value in first}


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


def _start(row: Row) -> bytes | None:
    return hashlib.sha256(row[0].content(row[1], START)).digest() if row[0].size(row[1]) else None


def _whole(row: Row) -> bytes | None:
    return hashlib.sha256(row[0].content(row[1])).digest() if row[0].size(row[1]) else None

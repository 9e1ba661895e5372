"""Check every example before a task trains on it: find examples that cannot be used, and examples in two splits."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal, Protocol, TypeVar

from perpetune.data.names import several
from perpetune.data.sketch import START, content_hash
from perpetune.data.sources import Table
from perpetune.errors import DataError

Depth = Literal["decode", "header", "none"]
Report = Callable[[int, int], None]  # takes the number of checked examples, and the number of all examples

_THREADS = min(8, os.cpu_count() or 1)
_CHUNK = 32  # the number of examples that a thread takes at once

T = TypeVar("T")


class Rows(Protocol):
    """Some rows of a table, and the method that checks each of them."""

    @property
    def table(self) -> Table: ...

    @property
    def rows(self) -> Sequence[int]: ...

    def look(self, row: int, depth: Literal["decode", "header"]) -> None:
        """Check that row of the table; DataError, with the row's name, if it cannot be used."""


def find_bad(
    parts: Sequence[Rows | None], depth: Depth, max_bad: int, where: str, report: Report | None = None
) -> list[dict[int, str]]:
    """For each part, the rows that cannot be used, each with the reason. The reason begins with the row's name.

    Args:
        parts: rows of tables; None stands for no rows.
        depth: how deeply each row is checked; `none` checks nothing.
        max_bad: the number of bad rows that is tolerated in all parts together.
        where: the beginning of the error message.
        report: is called now and then with the progress.

    Raises:
        DataError: more than `max_bad` rows are bad.
    """
    bad: list[dict[int, str]] = [{} for _ in parts]
    if depth == "none":
        return bad
    total, done = sum(len(part.rows) for part in parts if part is not None), 0
    reasons: list[str] = []
    for bad_rows, part in zip(bad, parts, strict=True):
        if part is None:
            continue
        look = partial(_fault, part, depth)
        faults = in_threads(look, part.rows) if part.table.threads else map(look, part.rows)
        for row, reason in zip(part.rows, faults, strict=True):
            done += 1
            if reason is not None:
                bad_rows[row] = reason
                reasons.append(reason)
            if len(reasons) > max_bad:
                raise DataError(
                    f"{where}: more than {max_bad} {part.table.noun}s are bad (stream.max_bad): {several(reasons)}"
                )
            if report is not None and (done % _CHUNK == 0 or done == total):
                report(done, total)
    return bad


def _fault(part: Rows, depth: Literal["decode", "header"], row: int) -> str | None:
    try:
        part.look(row, depth)
    except DataError as error:
        return str(error)
    return None


def in_threads(work: Callable[[int], T], rows: Sequence[int]) -> Iterator[T]:
    """The result of `work` for each row, in order. Rows are taken up only as the caller reads results, so it may stop
    early."""
    if len(rows) <= _CHUNK:  # all for one thread: this one
        yield from map(work, rows)
        return
    chunks = [rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)]
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(chunks), 4 * _THREADS):
            for results in pool.map(lambda chunk: [work(i) for i in chunk], chunks[start : start + 4 * _THREADS]):
                yield from results


def find_overlap(
    train: Table,
    test: Table,
    contents: bool,
    *,
    train_rows: Iterable[int] | None = None,
    test_rows: Iterable[int] | None = None,
) -> list[tuple[int, int]]:
    """Pairs of a training row and a test row that are the same file, or (with `contents`) have the same bytes.

    Each test row is in one pair at most. Bytes are compared by a hash, and only if the size and the first 4 KiB are
    equal.

    Args:
        train_rows, test_rows: the rows to compare; default: all rows.
    """
    left = list(range(len(train)) if train_rows is None else train_rows)
    right = list(range(len(test)) if test_rows is None else test_rows)
    matches = _matches(train, left, test, right, [_identity])
    if contents:
        matches |= _matches(train, left, test, right, [_size, _start, _whole])
    return sorted((a, b) for b, a in matches.items())


def contents(table: Table, rows: Sequence[int]) -> list[str]:
    """A hash of the content of each row."""
    look = partial(_hashed, table)
    return list(in_threads(look, rows) if table.threads else map(look, rows))


def _hashed(table: Table, i: int) -> str:
    return content_hash(table.size(i), table.content(i, START))


def find_twins(table: Table) -> list[list[int]]:
    """Groups of two or more rows with the same bytes; they are compared as in `find_overlap`."""
    left: dict[int, object] = dict.fromkeys(range(len(table)))
    for step in (_size, _start, _whole):
        left = _values(table, left, step)
        counts = Counter(left.values())
        left = {row: value for row, value in left.items() if counts[value] > 1}
    groups: dict[object, list[int]] = {}
    for row, value in left.items():
        groups.setdefault(value, []).append(row)
    return list(groups.values())


def one_file(table: Table) -> list[list[int]]:
    """The rows that are one file by several names, in groups of two and more."""
    rows: dict[object, list[int]] = {}
    for row, value in _values(table, range(len(table)) if table.files else (), _identity).items():
        rows.setdefault(value, []).append(row)
    return [group for group in rows.values() if len(group) > 1]


def contradicting(table: Table, groups: Iterable[Sequence[int]]) -> list[tuple[int, int]]:
    """Of each group of rows the first two that have different labels, but the same task or domain."""
    found = []
    for group in groups:
        first: dict[str, int] = {}
        for row in group:
            before = first.setdefault(table.groups[row] if table.groups is not None else "", row)
            if table.labels[before] != table.labels[row]:
                found.append((before, row))
                break
    return found


def _matches(
    train: Table,
    train_rows: Iterable[int],
    test: Table,
    test_rows: Iterable[int],
    steps: Sequence[Callable[[Table, int], object]],
) -> dict[int, int]:
    """For each test row that equals a training row in every step: the first such training row."""
    left: dict[int, object] = dict.fromkeys(train_rows)
    right: dict[int, object] = dict.fromkeys(test_rows)
    for step in steps:
        left, right = _values(train, left, step), _values(test, right, step)
        common = set(left.values()) & set(right.values())
        left = {row: value for row, value in left.items() if value in common}
        right = {row: value for row, value in right.items() if value in common}
    first = {value: row for row, value in reversed(left.items())}
    return {row: first[value] for row, value in right.items()}


def _values(table: Table, rows: Iterable[int], step: Callable[[Table, int], object]) -> dict[int, object]:
    chosen = list(rows)
    values = zip(chosen, in_threads(partial(step, table), chosen), strict=True)
    return {row: value for row, value in values if value is not None}


def _identity(table: Table, i: int) -> tuple[int, int] | None:
    return table.identity(i)


def _size(table: Table, i: int) -> int | None:
    return table.size(i) or None


def _start(table: Table, i: int) -> bytes:
    return hashlib.sha256(table.content(i, 4096)).digest()


def _whole(table: Table, i: int) -> bytes:
    return hashlib.sha256(table.content(i)).digest()

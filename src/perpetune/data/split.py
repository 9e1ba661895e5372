"""Divide examples and classes. A hash of each one's key decides.

So a choice does not depend on the order of files in a listing, and hardly on the other examples: if a class or some
pictures are added later, almost all earlier choices stay the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from perpetune.data.names import natural, several
from perpetune.errors import UsageError, closest
from perpetune.seeding import seed_of

Key = Callable[[int], str]


def by_label(rows: Iterable[int], labels: Sequence[str]) -> dict[str, list[int]]:
    """The rows of each label, in their order."""
    groups: dict[str, list[int]] = {}
    for row in rows:
        groups.setdefault(labels[row], []).append(row)
    return groups


def hold_out(
    rows: Iterable[int],
    labels: Sequence[str],
    key: Key,
    *,
    share: float,
    seed: int,
    purpose: str,
    twins: Iterable[Sequence[int]] = (),
) -> tuple[list[int], list[int]]:
    """Divide `rows` into two lists: the kept rows and the held-out rows, each in the given order.

    If a label has n rows, `share * n` of them (rounded) are held out, but at least 1 and at most n - 1. So a single row
    is always kept. Rows that are `twins` of each other count as one row and stay together. If twins have different
    labels, or one of them is not in `rows`, they are kept.
    """
    rows = list(rows)
    here = set(rows)
    together: dict[int, Sequence[int]] = {}
    apart: set[int] = set()  # rows that are not drawn, because they follow a twin or are kept
    for group in twins:
        first = min(group, key=lambda row: (key(row), row))
        apart.update(group)
        if here.issuperset(group) and len({labels[row] for row in group}) == 1:
            apart.remove(first)
            together[first] = group
    out: set[int] = set()
    for members in by_label((row for row in rows if row not in apart), labels).values():
        n = len(members)
        count = min(max(math.floor(share * n + 0.5), 1), n - 1) if share > 0 else 0
        for row in _ranked(members, key, seed, purpose)[:count]:
            out.update(together.get(row, (row,)))
    return [r for r in rows if r not in out], [r for r in rows if r in out]


def limit(
    rows: Iterable[int],
    labels: Sequence[str],
    key: Key,
    *,
    per_class: int | None,
    seed: int,
    purpose: str,
    in_all: int | None = None,
) -> list[int]:
    """Draw at most `per_class` rows of each label and at most `in_all` rows, by the seed; they stay in the given order.

    Rows under `in_all` are balanced over the labels. A larger limit takes the rows of a smaller limit, and more.
    """
    rows = list(rows)
    if per_class is None and in_all is None:
        return rows
    turns: list[tuple[int, int]] = []  # round by round: the first of each label, the second of each, …
    for members in by_label(rows, labels).values():
        turns += enumerate(_ranked(members, key, seed, purpose)[:per_class])
    if in_all is not None:
        drawn = {row: seed_of(seed, purpose, "round", key(row)) for _, row in turns}
        turns = sorted(turns, key=lambda turn: (turn[0], drawn[turn[1]], turn[1]))[:in_all]
    chosen = {row for _, row in turns}
    return [r for r in rows if r in chosen]


def _ranked(rows: Iterable[int], key: Key, seed: int, purpose: str) -> list[int]:
    return sorted(rows, key=lambda row: (seed_of(seed, purpose, key(row)), row))


def seeded_order(names: Iterable[str], seed: int, purpose: str = "class order") -> list[str]:
    """The `names` in an order that depends on the seed only, not on their given order."""
    return sorted(names, key=lambda name: (seed_of(seed, purpose, name), name))


def given_order(order: Sequence[str], names: Iterable[str], where: str, what: str) -> tuple[list[str], list[str]]:
    """Check `order` against the known `names`; return it, and a warning about names that are not in it.

    Args:
        where: the recipe's key, for messages.
        what: the word for the names, in the plural.

    Raises:
        UsageError: `order` has an unknown name, or has a name twice.
    """
    known = set(names)
    for name in order:
        if name not in known:
            raise UsageError(f"{where}: '{name}' is not among the {what} of the training data; {closest(name, known)}")
    twice = natural({name for name in order if order.count(name) > 1})
    if twice:
        raise UsageError(f"{where} has a name twice: {several(twice)}")
    left = natural(known - set(order))
    return list(order), [f"{where}: {what} left out: {several(left)}"] if left else []


def in_tasks(classes: Sequence[str], per_task: int | Sequence[int] | None) -> tuple[list[list[str]], list[str]]:
    """Cut `classes` into tasks, in their order; return the tasks and warnings.

    Raises:
        UsageError: `per_task` is missing, or does not fit the number of classes.
    """
    n = len(classes)
    where = "stream.classes_per_task"
    if per_task is None:
        raise UsageError(f"{where} is missing, but stream.by: class needs it; there are {n} classes")
    if isinstance(per_task, int):
        if per_task > n:
            raise UsageError(f"{where}: {per_task} is too large: there are only {n} classes")
        sizes = [min(per_task, n - start) for start in range(0, n, per_task)]
    else:
        sizes = list(per_task)
        if sum(sizes) != n:
            raise UsageError(f"{where}: {list(per_task)} adds up to {sum(sizes)}, but there are {n} classes")
    starts = [sum(sizes[:t]) for t in range(len(sizes))]
    tasks = [list(classes[start : start + size]) for start, size in zip(starts, sizes, strict=True)]
    if isinstance(per_task, int) and sizes[-1] < per_task:
        return tasks, [f"{where}: {n} classes in tasks of {per_task} leave {sizes[-1]} for the last task"]
    return tasks, []

"""What all committed tasks say together, to which each new task is added once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from perpetune.state.committed import Committed

A = TypeVar("A")


class Accumulated(Generic[A]):
    """An object that knows all committed tasks. Each task is added when it is first seen.

    It is made anew where a task that was added is no longer there, and where a later entry says what was forgotten.

    Args:
        empty: makes the object of no tasks.
        add: adds a task to it. It may read the task's documents, which stay as they are.
    """

    def __init__(self, empty: Callable[[], A], add: Callable[[A, Committed], None]):
        self._empty, self._add = empty, add
        self._made, self._commits = empty(), list[object]()

    def of(self, committed: Sequence[Committed]) -> A:
        """The object that knows these tasks and no others. The next call may change it."""
        known = len(self._commits)
        same = self._commits == [task.commit for task in committed[:known]]
        if not same or any(task.forgot is not None for task in committed[known:]):
            known = 0
        if known == 0:
            self._made, self._commits = self._empty(), []
        for task in committed[known:]:
            self._commits.append(None)  # an error in `add` leaves an object that is not used again
            self._add(self._made, task)
            self._commits[-1] = task.commit
        return self._made

"""Which data a task has seen, as a small sample of hashes of their contents.

The sample holds the smallest hashes (bottom-k: Broder 1997, "On the resemblance and containment of documents"). So two
tasks keep the same examples where they have the same, however these were cut into training and test data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

ALL = "contents.bin"
"""The file with the hashes of all examples of a task, where there are more than `KEPT`."""
KEPT = 256  # hashes of a task: 4 KiB of its `task.json`
START = 1 << 20  # bytes of an example that are hashed, with its size
DIGITS = 16  # of one hash, hexadecimal
ENOUGH = 16  # with fewer examples in common reach, a share says nothing
MOST = 0.5  # the share from which data are the same data again


def content_hash(size: int | None, start: bytes) -> str:
    """64 bits of an example, by its size and its first `START` bytes."""
    return hashlib.blake2b(start, digest_size=DIGITS // 2, key=str(size).encode()).hexdigest()


def sketch(hashes: Iterable[str]) -> dict[str, Any]:
    """The number of different hashes, and the smallest of them, one after the other in one text."""
    known = sorted(set(hashes))
    return {"count": len(known), "hashes": "".join(known[:KEPT])}


def packed(hashes: Iterable[str]) -> bytes | None:
    """All different hashes, 8 bytes each, in order: the file `ALL` of a task; None where the sketch holds all."""
    known = sorted(set(hashes))
    return bytes.fromhex("".join(known)) if len(known) > KEPT else None


def all_of(one: Mapping[str, Any] | None, content: bytes | None) -> set[str] | None:
    """All hashes of a task; None where nobody knows them, as of a task of an older version.

    Args:
        one: its sketch, if it has one.
        content: its file `ALL`, if it has one.
    """
    if content is not None:
        return set(_split(content.hex()))
    return set(_split(one["hashes"])) if one is not None and whole([one]) else None


class Samples:
    """The samples of many tasks, in which those of new data are looked up."""

    def __init__(self) -> None:
        self.sketches: dict[str, Mapping[str, Any]] = {}
        """By the name of the task."""
        self._having: dict[str, list[str]] = {}  # the names of the tasks that have a hash

    def add(self, name: str, one: Mapping[str, Any]) -> None:
        """Add the sketch of a task."""
        self.sketches[name] = one
        for value in _split(one["hashes"]):
            self._having.setdefault(value, []).append(name)

    def learned_before(self, new: Mapping[str, Any]) -> tuple[float, list[str]] | None:
        """The share of the new examples that the tasks have, and the names of these tasks; None if it is below `MOST`.

        A sample tells of every hash up to its largest one whether its task has it, or of all if it holds all. The share
        is that of the new hashes of which all tasks with some of them can tell.

        Args:
            new: the sketch of the new data.
        """
        mine = _split(new["hashes"])
        found = {value: self._having[value] for value in mine if value in self._having}
        having = {name for names in found.values() for name in names}
        reach = [self.sketches[name]["hashes"][-DIGITS:] for name in having if not whole([self.sketches[name]])]
        told = [value for value in mine if not reach or value <= min(reach)]
        seen = [value for value in told if value in found]
        if len(told) < min(ENOUGH, new["count"]) or not seen or len(seen) < MOST * len(told):
            return None
        names = {name for value in seen for name in found[value]}
        return len(seen) / len(told), [name for name in self.sketches if name in names]


def whole(sketches: Iterable[Mapping[str, Any]]) -> bool:
    """Whether the samples hold every hash, so that a share is exact."""
    return all(len(one["hashes"]) == DIGITS * one["count"] for one in sketches)


def _split(hashes: str) -> Sequence[str]:
    return [hashes[start : start + DIGITS] for start in range(0, len(hashes), DIGITS)]

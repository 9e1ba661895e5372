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


def learned_before(new: Mapping[str, Any], earlier: Mapping[str, Mapping[str, Any]]) -> tuple[float, list[str]] | None:
    """The share of the new examples that earlier tasks have, and the names of these tasks; None if it is below `MOST`.

    A sample tells of every hash up to its largest one whether its task has it, or of all if it holds all. The share is
    that of the new hashes of which all tasks with some of them can tell.

    Args:
        new: the sketch of the new data.
        earlier: the sketches of earlier tasks by name.
    """
    mine = _split(new["hashes"])
    samples = {name: set(_split(one["hashes"])) for name, one in earlier.items()}
    having = [name for name, sample in samples.items() if sample.intersection(mine)]
    reach = [max(samples[name]) for name in having if earlier[name]["count"] > len(samples[name])]
    told = [value for value in mine if not reach or value <= min(reach)]
    seen = [value for value in told if any(value in samples[name] for name in having)]
    if len(told) < min(ENOUGH, new["count"]) or not seen or len(seen) < MOST * len(told):
        return None
    return len(seen) / len(told), [name for name in having if samples[name].intersection(seen)]


def whole(sketches: Iterable[Mapping[str, Any]]) -> bool:
    """Whether the samples hold every hash, so that a share is exact."""
    return all(len(one["hashes"]) == DIGITS * one["count"] for one in sketches)


def _split(hashes: str) -> Sequence[str]:
    return [hashes[start : start + DIGITS] for start in range(0, len(hashes), DIGITS)]

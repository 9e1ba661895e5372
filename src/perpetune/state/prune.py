"""What of earlier tasks can be dropped, and how it is dropped so that a crash at any instant loses nothing.

A pruned task keeps its documents, and of its pack those pieces that later tasks refer to. Its folder is never absent
and never half: the new pack and index are written beside the old ones under other names, then a new manifest takes the
place of the old one in one step, then the files that it does not name are deleted. The journal holds three lines of it:


  1. `prune begun`, or the line of a commit with `oldest`: from now on the tasks before it cannot be gone back to
  2. `prune written`: the new files are on the disk; folders may have their old or their new manifest
  3. `pruned`: only the new files are left
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from perpetune.errors import StateError
from perpetune.files import (
    MANIFEST,
    check_no_link,
    entry_of,
    listed,
    manifest_of,
    replace_synced,
    write_synced,
)
from perpetune.snapshot import EARLIER
from perpetune.state.committed import LEARNED, TRACES, Committed, Tasks, find_tasks
from perpetune.state.journal import Chain, Journal
from perpetune.store import (
    AT_REST,
    INDEX,
    PACK,
    Held,
    Index,
    Piece,
    Rest,
    index_bytes,
    opened,
    pack_bytes,
    pieces_of,
    rest_file,
)

Keep = Literal["auto", "all"] | int
FLOOR = 16 * 10**6
"""Bytes that earlier tasks may always take of their own, under `auto`."""
SHARE = 0.75
"""If they take more, tasks are pruned until the rest takes at most this share: many at once, then none for a while. To
find out what a prune may drop, lists are read that name what all tasks have."""
WORTH = 0.25
"""A pack is written anew if at least this share of it comes free."""
_MANIFEST = re.compile(r"manifest\.\d+\.json")


def oldest_kept(keep: Keep, oldest: int, needs: int, frees: Sequence[int]) -> int:
    """The number of the first task that a state can go back to.

    Args:
        keep: of a recipe's `run.keep`.
        oldest: the number of the first task that it can go back to now.
        needs: the bytes that the newest task would need alone.
        frees: for each earlier task, the bytes that are needed for a rollback to it and for nothing else.
    """
    newest = len(frees)
    if keep == "all":
        return oldest
    if keep != "auto":
        return max(oldest, min(newest, newest + 1 - keep))
    most = max(FLOOR, needs)
    if sum(frees[oldest:]) <= most:
        return oldest
    total, first = 0, newest
    for index in range(newest - 1, oldest - 1, -1):
        total += frees[index]
        if total > SHARE * most and first < newest:
            break
        first = index
    return first


def what_stays(keep: Keep, tasks: Sequence[Committed], chain: Chain) -> dict[str, Any]:
    """What the journal's line about the commit of the last task says of earlier ones.

    Returns:
        `frees`: the bytes that are needed for a rollback to the task before and for nothing else; and, if the state can
        no longer go back to a task that it could go back to, `oldest` and `by`.
    """
    index, first = tasks[-1].index, chain.oldest
    if index == 0:
        return {}
    told = [said.frees for said in chain.said[1:index]]
    told += [None] * (index - len(told))  # the last one is new; None before it is of an older version
    frees = [0 if i < first else _alone(tasks, i) if n is None else n for i, n in enumerate(told)]
    oldest = oldest_kept(keep, first, _needs(tasks[-1]), frees)
    return {"frees": frees[-1]} | ({"oldest": oldest, "by": f"run.keep: {keep}"} if oldest > first else {})


def _alone(tasks: Sequence[Committed], index: int) -> int:
    """The bytes that a rollback to a task needs alone; 0 where damage hides it, so that it is kept."""
    try:
        return tasks[index].alone(tasks[index + 1])
    except StateError:
        return 0


def _needs(task: Committed) -> int:
    """The bytes that a task needs; 0 where damage hides it."""
    try:
        return task.needs()
    except StateError:
        return 0


@dataclass(frozen=True)
class Pruned:
    """What a prune did, or would do.

    Attributes:
        dropped: the names of the tasks that the state can no longer go back to.
        kept: the names of those that it can go back to.
        bytes: how many come free on the disk, but for the headers of packs.
    """

    dropped: list[str]
    kept: list[str]
    bytes: int


@dataclass(frozen=True)
class Change:
    """What a prune does to the folder of one task.

    Attributes:
        task: whose folder it is.
        drop: names of the files that go.
        index: the content of its new index; None if it was pruned before.
        pack: the pieces that its new pack has; None if the pack stays, with what nobody needs in it.
        frees: the bytes that come free, but for the headers of packs.
    """

    task: Committed
    drop: frozenset[str]
    index: bytes | None
    pack: frozenset[Piece] | None
    frees: int


def carry_out(folder: Path, journal: Journal, known: Tasks) -> None:
    """Drop what the journal of a state says is not kept, and end what a crash interrupted.

    Args:
        known: the tasks as they were found last; they are found again.

    Raises:
        OSError: the disk is full, or the like. Nothing is lost, and it can be done again.
        StateError: a folder is damaged.
    """
    chain = journal.chain()
    if chain.written is None and chain.pruned < chain.oldest < len(chain.said):
        tasks, number = find_tasks(folder, known.entries, chain, known), chain.oldest
        found = changes(tasks, chain.pruned, number, erase=any(t.forgot for t in tasks[chain.pruned : number + 1]))
        try:
            manifests = [write(change, number) for change in found]
        except (OSError, StateError):
            discard([change.task.folder for change in found])
            raise
        told = {"tasks": [change.task.index for change in found], "manifests": manifests, "oldest": number}
        journal.append("prune written", told)
        chain = journal.chain()
    if chain.written is not None:
        number, tasks = chain.written["oldest"], find_tasks(folder, known.entries, chain, known)
        for index in chain.written["tasks"]:
            if index < len(tasks):
                put_in_force(tasks[index].folder, number)
        journal.append("pruned", {"oldest": number})


def changes(tasks: Sequence[Committed], pruned: int, oldest: int, *, erase: bool = False) -> list[Change]:
    """What a prune does that makes `oldest` the first task that can be gone back to; nothing is written.

    Args:
        tasks: of the state.
        pruned: the number of the first task that was not pruned before.
        erase: whether something was forgotten: nothing stays that is not needed, also of what was pruned before.

    Raises:
        StateError: a folder is damaged, so nobody can say what is needed.
    """
    if not pruned < oldest < len(tasks):
        return []
    live = tasks[oldest].pieces()  # all that later tasks need of folders before it, for it has what they have of these
    before, after = (tasks[index].rest() for index in (pruned, oldest))
    loose = {piece.task for piece in tasks[pruned].pieces() - live}
    loose |= {held.task for name, held in before.items() if after.get(name) != held}
    first = 0 if erase else pruned
    touched = sorted({index for index in loose if index < pruned} | set(range(first, oldest)))
    found = [_change(tasks[index], live, _resting_in(after, index), index >= pruned, erase) for index in touched]
    return [change for change in found if change.drop]


def _resting_in(rest: Mapping[str, Rest], index: int) -> frozenset[str]:
    """The files of the sets at rest that task `index` stores."""
    return frozenset(rest_file(name) for name, held in rest.items() if held.task == index)


def _change(task: Committed, live: set[Piece], resting: frozenset[str], fresh: bool, erase: bool) -> Change:
    """What happens to a task of which later ones need the pieces `live` and the files `resting`."""
    entries = listed(task.folder, task.cure, task.manifests)
    drop, index, frees = set[str](), None, 0
    before = task.index_of(entries)
    now = Index({n: held if n in resting else Held(held.size, None) for n, held in before.items() if n != AT_REST})
    if fresh or now != before:
        held = {name: Held(size, None) for name, (size, _) in entries.items() if name in LEARNED}
        if total := before.resting.bytes:  # what they were stays known
            now[EARLIER] = Held(total + (now[EARLIER].size if EARLIER in now else 0), None)
        index = index_bytes(Index(held | now))
        drop = {name for name in entries if name in LEARNED or INDEX.fullmatch(name)}
        frees = sum(entries[name][0] for name in drop) - len(index)
    live = live | pieces_of(now, rest=True)
    pack, name = None, next(filter(PACK.fullmatch, entries), None)
    if name is not None:
        with opened(task) as held_now:
            sizes = held_now.sizes()
        needed = frozenset(piece for piece in live if piece.task == task.index and piece.sha256 in sizes)
        free = sum(sizes.values()) - sum(piece.size for piece in needed)
        if free >= WORTH * sum(sizes.values()) if not erase else free > 0:
            pack, drop, frees = needed, drop | {name}, frees + (free if needed else entries[name][0])
    if erase and (task.gone or not task.lost.isdisjoint(task.task()["classes"])):
        traces = TRACES & entries.keys()
        drop, frees = drop | traces, frees + sum(entries[name][0] for name in traces)
    return Change(task, frozenset(drop), index, pack, frees)


def write(change: Change, number: int) -> str:
    """Write the new files of a task beside the old ones, which stay in force; returns the hash of its new manifest.

    Args:
        number: stands in the names of the new files.
    """
    task, files = change.task, dict[str, bytes]()
    check_no_link(task.folder)
    if change.index is not None:
        files[f"tensors.{number}.json"] = change.index
    if change.pack:
        with opened(task) as held:
            made = pack_bytes({piece.sha256: held.read(piece).data for piece in sorted(change.pack)})
        files[f"pack.{number}.safetensors"] = made or b""
    entries = listed(task.folder, task.cure, task.manifests)
    kept = {name: entry for name, entry in entries.items() if name not in change.drop}
    manifest = manifest_of({**kept, **{name: entry_of(content) for name, content in files.items()}})
    files[f"manifest.{number}.json"] = manifest
    for name in files:
        (task.folder / name).unlink(missing_ok=True)  # of a prune that was killed here
    write_synced(task.folder, files)
    return entry_of(manifest)[1]


def put_in_force(folder: Path, number: int) -> None:
    """Put the manifest in force that `write` has written, and delete what it does not name. It may be done twice."""
    check_no_link(folder)
    if (folder / f"manifest.{number}.json").exists():
        replace_synced(folder / f"manifest.{number}.json", folder / MANIFEST)
    entries = listed(folder)
    for path in sorted(folder.iterdir()):
        if path.name not in entries and _ours(path.name):
            path.unlink()


def discard(folders: Sequence[Path]) -> None:
    """Delete what `write` has written, where an error came before it was put in force."""
    for folder in folders:
        with contextlib.suppress(OSError):
            entries: Mapping[str, object] = listed(folder)
            for path in folder.iterdir():
                if path.name not in entries and _ours(path.name):
                    path.unlink()


def _ours(name: str) -> bool:
    patterns = (INDEX, PACK, _MANIFEST)
    return name in LEARNED | TRACES or any(pattern.fullmatch(name) for pattern in patterns)

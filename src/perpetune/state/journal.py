"""The journal of a state folder: one line per event, and what the lines say together."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from perpetune.documents import EVENTS, fault_of
from perpetune.errors import StateError
from perpetune.files import check_no_link, write_file
from perpetune.plain import Malformed, parse_json, read_regular
from perpetune.state.lock import open_no_link

MOST_JOURNAL = 2**28  # bytes
RECENT = 10**8  # nanoseconds: file systems tell times in steps of up to some ten milliseconds


class Journal:
    """The file `journal.jsonl`. Lines that were read once are not parsed again while they stay as they are."""

    def __init__(self, path: Path):
        self.path = path
        self._known, self._lines, self._events = b"", 0, list[dict[str, Any]]()
        self._chain, self._folded, self._anew = Chain(), 0, 0
        self._seen: tuple[int, ...] | None = None
        self._whole = False  # whether `_events` are all, while the state is locked

    def append(self, event: str, facts: Mapping[str, Any]) -> None:
        """Add one line, and sync it to the disk."""
        line = {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "event": event, **facts}
        check_no_link(self.path)
        content = json.dumps(line, ensure_ascii=False).encode()
        whole, self._whole = self._whole, False
        with open(self.path, "ab", opener=open_no_link) as file:
            file.write(content + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if whole:
            self._lines += 1
            self._known += content + b"\n"
            self._events.append(self._event(content, self._lines))
            self._whole = True

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, nobody else writes to the file, which has no half line (`mend`); so it is read once."""
        self.events()
        self._whole = True
        try:
            yield
        finally:
            self._whole, self._seen = False, None

    def events(self) -> list[dict[str, Any]]:
        """All events, without a last line that a crash cut off.

        Raises:
            StateError: the file cannot be read, or a line is no event; the message names the line.
        """
        if self._whole:
            return list(self._events)
        seen = self._stamp()
        if seen is not None and seen == self._seen:
            return list(self._events)
        try:
            content = read_regular(self.path, MOST_JOURNAL) if os.path.lexists(self.path) else b""
        except OSError as error:
            raise StateError(f"{self.path} cannot be read ({error.strerror}): restore it from a backup") from None
        if not content.startswith(self._known):
            self._known, self._lines, self._events = b"", 0, []
            self._chain, self._folded, self._anew = Chain(), 0, self._anew + 1
        *lines, last = content[len(self._known) :].split(b"\n")
        events = [self._event(line, number) for number, line in enumerate(lines, self._lines + 1) if line.strip()]
        self._known, self._lines = content[: len(content) - len(last)], self._lines + len(lines)
        self._events = [*self._events, *events]
        if not last.strip():
            self._seen = seen
            return list(self._events)
        self._seen = None
        try:
            parse_json(last, finite=True)
        except Malformed:
            return list(self._events)
        return [*self._events, self._event(last, self._lines + 1)]

    def _stamp(self) -> tuple[int, ...] | None:
        """What tells that the file is as it was; None if it was written to so recently that its time may not tell."""
        try:
            found = os.stat(self.path, follow_symlinks=False)
        except OSError:
            return None
        if time.time_ns() - found.st_mtime_ns < RECENT:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def chain(self) -> Chain:
        """What the lines say together. The next call may change the object that this one gives."""
        if not self._whole:
            events = self.events()
            if len(events) > len(self._events):  # a last line without its end may still become another one
                return _folded(Chain(), events)
        self._chain = _folded(self._chain, self._events[self._folded :])
        self._folded = len(self._events)
        self._chain.stamp = self._anew, self._folded
        return self._chain

    def _event(self, line: bytes, number: int) -> dict[str, Any]:
        where = f"{self.path}, line {number}"
        try:
            event = parse_json(line, finite=True)
        except Malformed:
            event = None
        if not (isinstance(event, dict) and isinstance(event.get("event"), str)):
            raise StateError(f"{where}: not an event in JSON; restore the file or delete this line")
        if event["event"] in EVENTS and (fault := fault_of(EVENTS[event["event"]], event)):
            raise StateError(f"{where}: {event['event']}: {fault}; restore the file or delete this line")
        return event

    def mend(self) -> None:
        """Remove a last line that a crash cut off."""
        if self.path.exists():
            content = read_regular(self.path, MOST_JOURNAL)
            if content and not content.endswith(b"\n"):
                write_file(self.path, content[: content.rfind(b"\n") + 1])


@dataclass(frozen=True)
class Said:
    """What the journal says of one committed task. What a later line changes of it makes another object.

    Attributes:
        name: its name; None where the journal does not have it.
        manifest: the hash of its manifest; None where the journal does not have it.
        becomes: the hash of the manifest that a prune is putting in its place.
        frees: how many bytes its commit made needless but for a rollback to the task before it; None if nobody knows.
        pruned: by what it was pruned and when, if it was: the state cannot go back to it any more.
        forgot: what was forgotten by it, if it is no task.
        manifests: the hashes that its manifest may have; none where nobody knows.
        commit: stays the same object until the task is dropped, whatever is pruned of it.
    """

    name: str | None = None
    manifest: str | None = None
    becomes: str | None = None
    frees: int | None = None
    pruned: str = ""
    forgot: dict[str, Any] | None = None
    manifests: tuple[str, ...] = field(init=False, default=())
    commit: object = field(default_factory=object, repr=False, compare=False)

    def __post_init__(self) -> None:
        found = tuple(digest for digest in (self.manifest, self.becomes) if digest is not None)
        object.__setattr__(self, "manifests", found)


@dataclass
class Chain:
    """What the journal says was committed and not dropped again.

    Attributes:
        said: of each committed task.
        begun: number and name of the task that was begun last and neither committed nor dropped.
        keep: how many tasks a rollback keeps that was begun and did not end.
        pruned: how many of the first tasks hold no more than what later ones need.
        written: the `prune written` of a prune that did not end; None if there is none.
        stamp: of one journal, differs if lines came to it; None if it cannot be told.
    """

    said: list[Said] = field(default_factory=list)
    begun: tuple[int, str] | None = None
    keep: int | None = None
    pruned: int = 0
    written: dict[str, Any] | None = None
    stamp: tuple[int, int] | None = None

    @property
    def sealed(self) -> bool:
        """Whether any hash is known."""
        return any(said.manifest for said in self.said)

    @property
    def oldest(self) -> int:
        """The number of the first task that the state can go back to."""
        return next((i for i in range(self.pruned, len(self.said)) if not self.said[i].pruned), len(self.said))


def _folded(chain: Chain, events: Sequence[Mapping[str, Any]]) -> Chain:
    for event in events:
        if event["event"] in FOLDS:
            FOLDS[event["event"]](chain, event)
    return chain


def _begun(chain: Chain, event: Mapping[str, Any]) -> None:
    index = event["task"]
    chain.said += [Said() for _ in range(index - len(chain.said))]  # a journal whose first lines were cut off
    _cut(chain, index)
    chain.keep, chain.begun = None, (index, event["name"])


def _committed(chain: Chain, event: Mapping[str, Any]) -> None:
    _begun(chain, event)
    chain.said.append(Said(event["name"], event.get("manifest"), frees=event.get("frees"), forgot=event.get("forgot")))
    chain.begun = None
    _doomed(chain, event)


def _doomed(chain: Chain, event: Mapping[str, Any]) -> None:
    """The tasks before `oldest` can no longer be gone back to; their folders may be whole still."""
    for index in range(chain.pruned, min(event.get("oldest", 0), len(chain.said))):
        said = chain.said[index]
        if not said.pruned:
            chain.said[index] = replace(said, pruned=f"{event['by']}, {str(event.get('time', ''))[:10]}")


def _rollback_begun(chain: Chain, event: Mapping[str, Any]) -> None:
    chain.keep, chain.begun = event["keep"], None


def _rolled_back(chain: Chain, event: Mapping[str, Any]) -> None:
    chain.keep = chain.begun = None
    if event.get("keep") is not None:
        _cut(chain, event["keep"])
    else:
        chain.said = [said for said in chain.said if said.name not in event["dropped"]]


def _cut(chain: Chain, keep: int) -> None:
    del chain.said[keep:]
    chain.pruned = min(chain.pruned, len(chain.said))
    if chain.written is not None and chain.written["oldest"] > len(chain.said):
        chain.written = None


def _sealed(chain: Chain, event: Mapping[str, Any]) -> None:
    manifests = event["manifests"]
    chain.said += [Said() for _ in range(len(manifests) - len(chain.said))]
    chain.said[: len(manifests)] = [
        replace(said, manifest=manifest) for said, manifest in zip(chain.said, manifests, strict=False)
    ]


def _prune_written(chain: Chain, event: Mapping[str, Any]) -> None:
    chain.written = dict(event)
    for index, manifest in zip(event["tasks"], event["manifests"], strict=True):
        if index < len(chain.said):
            chain.said[index] = replace(chain.said[index], becomes=manifest)


def _pruned(chain: Chain, event: Mapping[str, Any]) -> None:
    chain.pruned, chain.written = min(event["oldest"], len(chain.said)), None
    for index, said in enumerate(chain.said):
        if said.becomes is not None:
            chain.said[index] = replace(said, manifest=said.becomes, becomes=None)


FOLDS = {
    "task begun": _begun,
    "task committed": _committed,
    "rollback begun": _rollback_begun,
    "rolled back": _rolled_back,
    "tasks sealed": _sealed,
    "prune begun": _doomed,
    "prune written": _prune_written,
    "pruned": _pruned,
}
"""What the events that decide which tasks are committed change of the chain."""

"""Tasks that have been learned and stored."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perpetune.documents import Document, Features, Metrics, Task, Timings, read_document
from perpetune.errors import StateError
from perpetune.files import MANIFEST, check_no_link, listed, read_listed
from perpetune.snapshot import EARLIER, EXTRA, FILES, FIXED
from perpetune.state.journal import Chain, Said
from perpetune.store import (
    AT_REST,
    INDEX,
    PACK,
    RESTING,
    Index,
    Piece,
    Rest,
    assemble,
    parse_index,
    parse_rest,
    pieces_of,
    rest_file,
    whole,
)

START = "start"  # the name of the state before the first task
LEARNED = frozenset((*FILES, *FIXED, EXTRA))
"""The files of a snapshot: what a rollback to the task needs, and no report."""
Stamps = tuple[Any, ...]
RECENT = 6  # tasks of which the index stays in memory: a commit asks for the last two, a prune for the first two
TRACES = frozenset(("features.safetensors", "features.json", "sample.safetensors", "contents.bin"))
"""Files with features and hashes of a task's examples, which go when the task is forgotten."""
DOCUMENTS: dict[str, type[Document]] = {"task.json": Task, "metrics.json": Metrics, "timings.json": Timings}
KINDS: dict[str, type[Document]] = {**DOCUMENTS, "features.json": Features}


@dataclass(frozen=True)
class Committed:
    """A task that has been learned and stored."""

    index: int
    name: str
    root: Path
    """The folder of all tasks."""
    entry: str
    """The name of its folder there."""
    before: str
    """The name of the task before it, or `start` where there is none, or none that a rollback can go to. A rollback to
    this name drops the task."""
    manifests: tuple[str, ...] = ()
    """The hashes that its manifest may have by the journal, two while it is being pruned; none where no line has it."""
    pruned: str = ""
    """By what it was pruned and when; empty if the state can go back to it."""
    forgot: Mapping[str, Any] | None = None
    """Of an entry that is no task, but says what was forgotten: `tasks` and `classes`, names of both."""
    all: Sequence[Committed] = field(default=(), repr=False, compare=False)
    """The tasks of the state; it may refer to tensors of earlier ones."""
    commit: object = field(default_factory=object, repr=False, compare=False)
    """Stays the same object while nothing but a prune has changed it."""
    _read: dict[str, tuple[Stamps, Any]] = field(default_factory=dict, repr=False, compare=False)
    """What was read and checked, with the stamps of its files at that time."""

    @property
    def gone(self) -> bool:
        """Whether it is no task that is known: it was forgotten, or it says what was forgotten."""
        return self.forgot is not None or any(self.name in forgot["tasks"] for forgot in self._forgot_since())

    @property
    def lost(self) -> frozenset[str]:
        """Classes that were forgotten since."""
        return frozenset(name for forgot in self._forgot_since() for name in forgot["classes"])

    def _forgot_since(self) -> list[Mapping[str, Any]]:
        """What later entries say was forgotten."""
        entries = self.all.forgetting if isinstance(self.all, Tasks) else self.all
        return [t.forgot for t in entries if t.forgot is not None and t.index > self.index]

    def classes(self) -> list[str]:
        """Its classes that are still known."""
        if self.gone:
            return []
        lost = self.lost
        return [name for name in self.task()["classes"] if name not in lost]

    @property
    def folder(self) -> Path:
        return self.root / self.entry

    def read(self, *only: str) -> dict[str, bytes]:
        """The contents of the task's files, by name; if names are given, only of those of them that exist.

        Raises:
            StateError: a file is missing, damaged, changed or pruned. The message names it and says what the user can
                do.
        """
        entries = self._listed()
        plain = {n: e for n, e in entries.items() if (n in only or not only) and not _stores(n)}
        files = read_listed(self.folder, plain, self.cure)
        if only and entries.keys() >= set(only):
            return files
        index = self.index_of(entries)
        names = [name for name in index if (name in only or not only) and name != AT_REST]
        files |= self._assembled(index, names)
        return files if only else files | self._rest_elsewhere(index)

    def _rest_elsewhere(self, index: Index) -> dict[str, bytes]:
        """The files of those sets at rest that earlier tasks store. Nothing but the pack is read of such a task."""
        by_task: dict[int, dict[str, Rest]] = {}
        for name, rest in self.rest(index).items():
            if rest.task != self.index:
                by_task.setdefault(rest.task, {})[rest_file(name)] = rest
        files: dict[str, bytes] = {}
        for at, wanted in by_task.items():
            if old := [file for file, rest in wanted.items() if not rest.sha256]:
                files |= self.all[at]._assembled(self.all[at].index_of(), old)
            if len(old) < len(wanted):
                files |= whole({f: rest.piece for f, rest in wanted.items() if rest.sha256}, self.all[at])
        return files

    def _assembled(self, index: Index, names: Sequence[str]) -> dict[str, bytes]:
        """The contents of some of the files in its index."""
        for name in names:
            if name not in index:
                raise StateError(f"{self.folder} holds no {name}, and a later task needs it: {self.cure}")
            if index[name].pieces is None:
                raise StateError(f"what {self.folder} held of the model was pruned ({self.pruned})")
        return assemble(index, names, self.all.__getitem__)

    def sizes(self) -> dict[str, int]:
        """The size of each of the task's files, in bytes, however little of it lies in its own folder."""
        return self.stored()[0]

    def stored(self) -> tuple[dict[str, int], int]:
        """The size of each of the task's files, in bytes; and the bytes of tensors that lie in its own folder."""
        found: tuple[dict[str, int], int] = self.once("stored", (), self._stored)
        return found

    def _stored(self) -> tuple[dict[str, int], int]:
        entries = self._listed()
        plain = {name: size for name, (size, _) in entries.items() if not _stores(name)}
        tensors = sum(size for name, (size, _) in entries.items() if name in LEARNED or PACK.fullmatch(name))
        index = self.index_of(entries)
        files = plain | {n: held.size for n, held in index.items() if not RESTING.fullmatch(n) and n != AT_REST}
        resting = index.resting.bytes
        return files | ({EARLIER: files.get(EARLIER, 0) + resting} if resting else {}), tensors

    def own(self) -> int:
        """The bytes of the task's folder."""
        return sum(size for size, _ in self._listed().values()) + (self.folder / MANIFEST).stat().st_size

    def time(self) -> float:
        """When the task was committed, or pruned after that, in seconds since 1970 by the clock of the disk."""
        return (self.folder / MANIFEST).stat().st_mtime

    def shared(self) -> int:
        """The bytes that the task needs from folders of earlier tasks."""
        index = self.index_of()
        return index.resting.elsewhere + sum(piece.size for piece in pieces_of(index) if piece.task != self.index)

    def needs(self) -> int:
        """The bytes that the task would need if no other task were there."""
        entries = self._listed()
        learned = sum(size for name, (size, _) in entries.items() if name in LEARNED)
        index = self.index_of(entries)
        return learned + index.resting.bytes + sum(piece.size for piece in pieces_of(index))

    def alone(self, after: Committed) -> int:
        """The bytes that are needed for a rollback to this task and for nothing else, if `after` is the next one."""
        entries = self._listed()
        mine = sum(size for name, (size, _) in entries.items() if name in LEARNED or INDEX.fullmatch(name))
        index, later = self.index_of(entries), after.index_of()
        rest, then = self.rest(index), after.rest(later)
        resting = sum(held.size for name, held in rest.items() if then.get(name) != held)
        return mine + resting + sum(piece.size for piece in pieces_of(index) - pieces_of(later))

    def pieces(self) -> set[Piece]:
        """The pieces of its tensors, in its own pack and in those of earlier tasks, without those of sets at rest; none
        for a task of an older version and for one that was pruned."""
        return pieces_of(self.index_of())

    def rest(self, index: Index | None = None) -> Mapping[str, Rest]:
        """The sets at rest that it has, each with the task that stores it; none once it was pruned. `index` is its
        own."""
        found: Mapping[str, Rest] = self._recent("rest", lambda: self._rest(index or self.index_of()))
        return found

    def has_rest(self, rest: Mapping[str, Rest]) -> None:
        """Take over the sets at rest that were written for the task just now, so that nobody has to read them."""
        self._recent("rest", lambda: rest)

    def _rest(self, index: Index) -> Mapping[str, Rest]:
        if AT_REST not in index:
            return index.rest
        content = self._assembled(index, [AT_REST])[AT_REST]
        return parse_rest(content, self.index, str(self.folder), self.cure)

    def index_of(self, entries: Mapping[str, tuple[int, str]] | None = None) -> Index:
        """Its files whose tensors are stored once. `entries` are those of its manifest."""
        found: Index = self._recent("index", lambda: self._index_of(entries))
        return found

    def _recent(self, key: str, make: Callable[[], Any]) -> Any:
        """The result of `make`; of the tasks that were asked last it is found again, under the terms of `once`. It is
        not kept of all, because it may grow with the tasks."""
        recent = self.all.recent if isinstance(self.all, Tasks) and self.all.locked and self.manifests else None
        if recent is None:
            return make()
        of_task = recent.pop((self.index, self.manifests), {})
        if key not in of_task:
            of_task[key] = make()
        recent[self.index, self.manifests] = of_task
        while len(recent) > RECENT:
            del recent[next(iter(recent))]
        return of_task[key]

    def _index_of(self, entries: Mapping[str, tuple[int, str]] | None) -> Index:
        entries = self._listed() if entries is None else entries
        name = next(filter(INDEX.fullmatch, entries), None)
        if name is None:
            return Index()
        content = read_listed(self.folder, {name: entries[name]}, self.cure)[name]
        return parse_index(content, self.index, str(self.folder / name), self.cure)

    def pack(self) -> str | None:
        """The path of its pack; None if it has none. The hashes of what is read of it say whether it is the right one,
        so the manifest is asked only where a crash in a prune left two, or where there is none."""
        folder = os.path.join(self.root, self.entry)
        try:
            names = [name for name in os.listdir(folder) if PACK.fullmatch(name)]
        except OSError:
            names = []
        if len(names) != 1:
            names = [name for name in self._listed() if PACK.fullmatch(name)]
        return os.path.join(folder, names[0]) if names else None

    def json(self, name: str) -> dict[str, Any]:
        """The object in one of the task's JSON files, checked against the manifest.

        Raises:
            StateError: the file is missing, damaged or changed, or holds no JSON object.
        """
        files = self.read(name)
        if name not in files:
            raise StateError(f"{self.folder / name} is missing: {self.cure}")
        return read_document(Document, files[name], str(self.folder / name), self.cure)

    def parsed(self, name: str) -> dict[str, Any]:
        """One of the task's documents, checked. While its file and the manifest stay as they are it is read once, so
        do not change the object.

        Raises:
            StateError: as of `document`.
        """
        found: dict[str, Any] = self.once(name, (name,), lambda: self.document(self.read(name), name))
        return found

    def has(self, name: str) -> bool:
        """Whether the task has a file of that name, by its manifest."""
        return name in self.once("listed", (), self._listed)

    def once(self, key: str, files: Sequence[str], make: Callable[[], Any]) -> Any:
        """The result of `make`, which is called again if one of these files, or the manifest, is not as it was.

        While the state is locked nobody else writes to it, and what was read is what the hash in the journal says; so
        files are not looked at again then.
        """
        before = self._read.get(key)
        trusted = isinstance(self.all, Tasks) and self.all.locked and self.manifests
        if trusted and before is not None and before[0][0] == trusted:
            return before[1]
        if not self._read:
            self._read["folder"] = (), os.path.join(self.root, self.entry, "")
        folder = self._read["folder"][1]
        stamps = self.manifests, *[_stamp(folder + name) for name in (*files, MANIFEST)]
        if before is not None and before[0] == stamps and None not in stamps:
            return before[1]
        made = make()
        self._read[key] = stamps, made
        return made

    def document(self, files: Mapping[str, bytes], name: str) -> dict[str, Any]:
        """The object in a JSON file of `files`, which `read` gave, once it is known to be what a commit writes.

        Raises:
            StateError: it is not; or it is of another task.
        """
        where = str(self.folder / name)
        if name not in files:
            raise StateError(f"{where} is missing: {self.cure}")
        found = read_document(KINDS[name], files[name], where, self.cure)
        if name == "task.json" and (found["index"], found["name"]) != (self.index, self.name):
            raise StateError(f"{where} is about task {found['index']}, {found['name']}: {self.cure}")
        return found

    def task(self) -> dict[str, Any]:
        """What is stored of the task beside what was learned (`task.json`), checked."""
        return self.parsed("task.json")

    @property
    def cure(self) -> str:
        """What the user can do about a damaged folder: the end of an error message."""
        drop = f"perpetune rollback {self.folder.parent.parent} --to {self.before}"
        return f"restore it from a backup, or roll back with `{drop}`"

    def __str__(self) -> str:
        return str(self.folder)

    def _listed(self) -> dict[str, tuple[int, str]]:
        return listed(self.folder, self.cure, self.manifests)


def entries_of(folder: Path) -> list[str]:
    """The names of what lies in the folder of all tasks of a state, sorted, without hidden ones.

    Raises:
        StateError: the folder is a link.
    """
    root = folder / "tasks"
    check_no_link(root)
    return sorted(entry for entry in os.listdir(root) if not entry.startswith(".")) if root.is_dir() else []


class Tasks(list[Committed]):
    """The tasks of a state."""

    def __init__(self) -> None:
        super().__init__()
        self.forgetting: list[Committed] = []
        """Those entries that are no tasks, but say what was forgotten."""
        self.entries: list[str] = []
        """The names of their folders, as they were given."""
        self.said: list[Said] = []
        """What the journal said of each of them."""
        self.locked = False
        """Whether this process has locked the state for writing."""
        self.recent: dict[tuple[int, tuple[str, ...]], dict[str, Any]] = {}
        """What was read of the indices of the tasks that were asked last, by the task's number and manifests."""


NOTHING = Said()
"""What the journal says of a task of which it has no line."""


def find_tasks(folder: Path, found: Sequence[str], chain: Chain, known: Tasks | None = None) -> Tasks:
    """The folders of tasks in a state folder, in order, each with what the journal says of it.

    Args:
        found: their names, as `entries_of` gives them.
        known: tasks that were found before. They become those that are found now, and the ones that are the same still
            stay the same objects.

    Raises:
        StateError: a task between others is missing, a task exists twice, or a folder's name is not that of a task.
    """
    root = folder / "tasks"
    tasks = Tasks() if known is None else known
    said = [*chain.said[: len(found)], *[NOTHING] * (len(found) - len(chain.said))]
    if tasks and tasks.entries == found:
        changed = {i for i, (now, then) in enumerate(zip(said, tasks.said, strict=True)) if now is not then}
        if not changed:
            return tasks
        ordered = [task.entry for task in tasks]
        anew = sorted(i for i in changed | {i + 1 for i in changed} if i < len(tasks))  # one says where to go back to
    else:
        ordered = _in_order(root, found)
        anew = list(range(len(ordered)))
    tasks.entries, tasks.said = [], []  # until all is done
    del tasks[len(ordered) :]
    for index in anew:
        before = START if index == 0 or said[index - 1].pruned else tasks[index - 1].name
        entry, of = ordered[index], said[index]
        old = tasks[index] if index < len(tasks) else None
        about = entry, before, of.manifests, of.pruned, of.forgot
        same = old is not None and (old.entry, old.before, old.manifests, old.pruned, old.forgot) == about
        if not same or (of is not NOTHING and tasks[index].commit is not of.commit):
            read = {} if old is None or old.entry != entry else old._read
            tasks[index : index + 1] = [_task(tasks, index, root, entry, before, of, read)]
    tasks.entries, tasks.said = list(found), said
    tasks.forgetting = [task for task in tasks if task.forgot is not None]
    return tasks


def _in_order(root: Path, found: Sequence[str]) -> list[str]:
    """The names of the folders of tasks, by the numbers of these."""
    entries: dict[int, str] = {}
    for entry in found:
        number, dash, name = entry.partition("-")
        if not (number.isdecimal() and len(number) < 10 and dash and name):
            raise StateError(
                f"{root / entry} is not the folder of a task (expected a name such as 0003-NAME): move it away"
            )
        other = entries.setdefault(int(number), entry)
        if other != entry:
            raise StateError(f"{root / entry} and {other} are both task {int(number)}: move one of them away")
    if len(entries) <= max(entries, default=-1):
        expected, index = next((e, i) for e, i in enumerate(sorted(entries)) if e != i)
        raise StateError(f"{root}: task {expected} is missing before {entries[index]}")
    return [entry for _, entry in sorted(entries.items())]


def _task(tasks: Tasks, index: int, root: Path, entry: str, before: str, said: Said, read: dict[str, Any]) -> Committed:
    about = entry.partition("-")[2], root, entry, before, said.manifests, said.pruned, said.forgot
    return Committed(index, *about, tasks, object() if said is NOTHING else said.commit, read)


def add_task(tasks: Tasks, root: Path, entry: str, said: Said) -> Committed:
    """Add the task whose folder in `root` has the name `entry` to those before it."""
    before = tasks[-1].name if tasks and not tasks[-1].pruned else START
    tasks.append(_task(tasks, len(tasks), root, entry, before, said, {}))
    tasks.entries.append(entry)
    tasks.said.append(said)
    if said.forgot is not None:
        tasks.forgetting.append(tasks[-1])
    return tasks[-1]


def check_tasks(folder: Path, tasks: Sequence[Committed], chain: Chain) -> None:
    """StateError if the folders of tasks are not those that the journal says were committed."""
    for task, said in zip(tasks, chain.said, strict=False):
        if said.name not in (None, task.name):
            raise StateError(
                f"{task.folder} is not what the journal says: task {task.index} is {said.name!r} there. Restore the "
                "folder from a backup"
            )
    for task in tasks[len(chain.said) :]:
        unfinished = chain.begun == (task.index, task.name)  # the crash came between the folder and the line
        if chain.sealed and not unfinished:
            raise StateError(
                f"{task.folder}: the journal says nothing of this task's commit: restore "
                f"{folder / 'journal.jsonl'} from a backup, or move the folder away"
            )
    lost = chain.said[len(tasks) :]
    if chain.keep is None and any(said.manifest for said in lost):
        index, name = len(tasks), lost[0].name
        to = tasks[-1].name if tasks and not tasks[-1].pruned else START
        raise StateError(
            f"{folder / 'tasks' / f'{index:04d}-{name}'} is missing, and the journal says that the task was "
            f"committed: restore it from a backup, or drop it with `perpetune rollback {folder} --to {to}`"
        )


def _stamp(path: str) -> tuple[int, ...] | None:
    """What tells that a file was exchanged or written to; None if it is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _stores(name: str) -> bool:
    return bool(INDEX.fullmatch(name) or PACK.fullmatch(name))

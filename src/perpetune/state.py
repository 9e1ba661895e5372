"""The state folder: it stores a tuned model, and everything that is needed to continue its training.

STATE/
  recipe.yaml         the resolved recipe
  backbone.json       the name and the fingerprint of the frozen weights
  journal.jsonl       one line per event; that of a commit holds the hash of the task's manifest
  tasks/0003-NAME/    one folder per committed task; it is complete, or it does not exist
  resume/             checkpoints of the unfinished task; the commit of the task deletes them
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timezone
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from perpetune.aside import clear_noted
from perpetune.documents import (
    EVENTS,
    Backbone,
    Document,
    Metrics,
    Position,
    Task,
    Timings,
    fault_of,
    read_document,
)
from perpetune.errors import StateError, UsageError, closest
from perpetune.files import (
    OURS,
    check_no_link,
    listed,
    manifest_digest,
    read_folder,
    remove_folder,
    remove_leftovers,
    to_json,
    write_file,
    write_folder,
)
from perpetune.methods.base import Method
from perpetune.plain import MOST_YAML, Malformed, parse_json, read_json, read_regular
from perpetune.recipe import Recipe, parse_recipe
from perpetune.snapshot import restore, restore_optimizer, snapshot, snapshot_optimizer

if TYPE_CHECKING:
    from accelerate import Accelerator

START = "start"  # the name of the state before the first task
MADE_BY = "recipe.json"  # in a task's folder: what of the recipe decides what its tensors mean, and how it learned
MOST_JOURNAL = 2**28  # bytes
DECIDES = {"backbone", "pet", "method", "head", "protect", "train", "seed"}
"""Sections of a recipe that decide a training."""
DOCUMENTS: dict[str, type[Document]] = {"task.json": Task, "metrics.json": Metrics, "timings.json": Timings}


@dataclass(frozen=True)
class Committed:
    """A task that has been learned and stored."""

    index: int
    name: str
    folder: Path
    before: str
    """The name of the task before it, or `start`. A rollback to this name drops the task."""
    manifest: str | None = None
    """The hash of its manifest in the journal's line of its commit; None where no line holds it."""

    def read(self, *only: str) -> dict[str, bytes]:
        """The contents of the task's files, by name; if names are given, only of those of them that exist.

        Raises:
            StateError: a file is missing, damaged or changed. The message names it and says what the user can do.
        """
        return read_folder(self.folder, self._cure, only or None, self.manifest)

    def sizes(self) -> dict[str, int]:
        """The size of each of the task's files, in bytes."""
        return {name: size for name, (size, _) in listed(self.folder, self._cure, self.manifest).items()}

    def json(self, name: str) -> dict[str, Any]:
        """The object in one of the task's JSON files, checked against the manifest.

        Raises:
            StateError: the file is missing, damaged or changed, or holds no JSON object.
        """
        files = self.read(name)
        if name not in files:
            raise StateError(f"{self.folder / name} is missing: {self._cure}")
        return read_document(Document, files[name], str(self.folder / name), self._cure)

    def document(self, files: Mapping[str, bytes], name: str) -> dict[str, Any]:
        """The object in a JSON file of `files`, which `read` gave, once it is known to be what a commit writes.

        Raises:
            StateError: it is not; or it is of another task.
        """
        where = str(self.folder / name)
        if name not in files:
            raise StateError(f"{where} is missing: {self._cure}")
        found = read_document(DOCUMENTS[name], files[name], where, self._cure)
        if name == "task.json" and (found["index"], found["name"]) != (self.index, self.name):
            raise StateError(f"{where} is about task {found['index']}, {found['name']}: {self._cure}")
        return found

    def task(self) -> dict[str, Any]:
        """What is stored of the task beside what was learned (`task.json`), checked."""
        return self.document(self.read("task.json"), "task.json")

    @property
    def _cure(self) -> str:
        drop = f"perpetune rollback {self.folder.parent.parent} --to {self.before}"
        return f"restore it from a backup, or roll back with `{drop}`"


@dataclass
class _Chain:
    """What the journal says.

    Attributes:
        said: of each committed task its name and the hash of its manifest; None where the journal does not have it.
        begun: number and name of the task that was begun last and neither committed nor dropped.
        keep: how many tasks a rollback keeps that was begun and did not end.
        sealed: whether any hash is known.
    """

    said: list[tuple[str | None, str | None]]
    begun: tuple[int, str] | None
    keep: int | None
    sealed: bool


class State:
    """An existing state folder. `State.create` makes one, `State(folder)` opens one.

    Raises:
        StateError: the folder is not a state folder, or its recipe is damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        if not (folder / "recipe.yaml").is_file():
            what = "is not a state folder (it has no recipe.yaml)" if folder.exists() else "does not exist"
            raise StateError(f"{folder} {what}: `perpetune init` or `perpetune run` makes one")
        try:
            text = read_regular(folder / "recipe.yaml", MOST_YAML).decode()
        except (OSError, UnicodeDecodeError):
            raise StateError(f"{folder / 'recipe.yaml'} cannot be read as text") from None
        try:
            self.recipe: Recipe = parse_recipe(text, str(folder / "recipe.yaml"))
        except UsageError as error:
            raise StateError(str(error)) from None
        if "checkpoint_every" not in self.recipe.run.model_fields_set:  # defaults must not fill up a torn recipe
            raise StateError(f"{folder / 'recipe.yaml'} is torn, its last key is missing: restore it from a backup")
        clear_noted(folder)  # every verb opens the state, so the next one after a killed export does this

    @classmethod
    def create(cls, folder: Path, recipe: Recipe, backbone: Mapping[str, Any]) -> State:
        """Make a new state folder without learned tasks.

        Raises:
            UsageError: `folder` already exists.
        """
        if folder.exists() and not (folder.is_dir() and _unused(folder)):
            raise UsageError(
                f"{folder} already exists: continue with `perpetune resume {folder}` or `perpetune update {folder}`, "
                "or choose another folder"
            )
        try:
            (folder / "tasks").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{folder} cannot be made: {error.strerror}") from None
        write_file(folder / "backbone.json", to_json(dict(backbone)))
        write_file(folder / "recipe.yaml", recipe.to_yaml().encode())  # last: this file makes the folder a state folder
        return cls(folder)

    @property
    def backbone(self) -> dict[str, Any]:
        """The name (`spec`) and the fingerprint of the frozen weights."""
        try:
            content = read_json(self.folder / "backbone.json", finite=True)
            fault = fault_of(Backbone, content) if isinstance(content, dict) else "it is no JSON object"
        except OSError as error:
            content, fault = {}, error.strerror or type(error).__name__
        except Malformed as error:
            content, fault = {}, str(error)
        if fault:
            where = self.folder / "backbone.json"
            raise StateError(f"{where} is missing or torn ({fault}): restore it from a backup")
        found: dict[str, Any] = content
        return found

    def relocate(self, recipe: Recipe | None, spec: str | None, data: tuple[str, str] | None) -> None:
        """Store that the model or data lie elsewhere now. Hold `writing` around it; nothing that was learned changes.

        Args:
            recipe: the recipe with the new places; None keeps it.
            spec: the new name of the backbone; None keeps it.
            data: the beginning of paths of tasks' data as it was, and as it is now.
        """
        if recipe is not None:
            self._relocate_checkpoints(recipe)
            write_file(self.folder / "recipe.yaml", recipe.to_yaml().encode())
            self.recipe = recipe
        if spec is not None:
            write_file(self.folder / "backbone.json", to_json({**self.backbone, "spec": spec}))
        self.log("relocated", **({"model": spec} if spec else {}), **({"data": list(data)} if data else {}))

    def _relocate_checkpoints(self, recipe: Recipe) -> None:
        """Make the checkpoints of the unfinished task go on under `recipe`: it differs in places alone."""
        path = self.folder / "resume" / "task.json"
        try:
            header = read_json(path)
            data, digest, world = header["data"].split("/")
        except (OSError, Malformed, LookupError, TypeError, ValueError, AttributeError):
            return  # there are none, or whoever reads them names the fault
        if digest == training_digest(self.recipe):
            write_file(path, to_json({**header, "data": f"{data}/{training_digest(recipe)}/{world}"}))

    @property
    def begun(self) -> date | None:
        """The day on which the state was made; None where nothing says it.

        States of earlier versions do not have it. For them it is the day of their journal's first line.

        Raises:
            StateError: `backbone.json` holds something else.
        """
        day = self.backbone.get("date")
        try:
            if day is not None:
                return date.fromisoformat(day)
        except ValueError:
            raise StateError(
                f"{self.folder / 'backbone.json'}: date is {day!r}, and no day such as 2026-01-31: restore it from a "
                "backup"
            ) from None
        journal = self.journal()
        return datetime.fromisoformat(journal[0]["time"]).date() if journal else None

    def moved(self) -> list[tuple[str, str]]:
        """The beginnings of paths of tasks' data that have changed, as they were and as they are, the oldest first."""
        events = [e["data"] for e in self.journal() if e.get("event") == "relocated" and "data" in e]
        return [(str(e[0]), str(e[1])) for e in events if isinstance(e, list) and len(e) == 2]

    # -- committed tasks ------------------------------------------------------------------------------

    @property
    def committed(self) -> list[Committed]:
        """The tasks learned so far, in order.

        Raises:
            StateError: a task between others is missing, a task exists twice, a folder's name is not that of a task, or
                the folders are not those that the journal says were committed.
        """
        chain = self._chain()
        tasks = self._folders(chain.said)
        for task in tasks[: len(chain.said)]:
            name = chain.said[task.index][0]
            if name not in (None, task.name):
                raise StateError(
                    f"{task.folder} is not what the journal says: task {task.index} is {name!r} there. Restore the "
                    "folder from a backup"
                )
        for task in tasks[len(chain.said) :]:
            unfinished = chain.begun == (task.index, task.name)  # the crash came between the folder and the line
            if chain.sealed and not unfinished:
                raise StateError(
                    f"{task.folder}: the journal says nothing of this task's commit: restore "
                    f"{self.folder / 'journal.jsonl'} from a backup, or move the folder away"
                )
        lost = chain.said[len(tasks) :]
        if chain.keep is None and any(manifest for _, manifest in lost):
            index, name = len(tasks), lost[0][0]
            raise StateError(
                f"{self.folder / 'tasks' / f'{index:04d}-{name}'} is missing, and the journal says that the task was "
                f"committed: restore it from a backup, or drop it with `perpetune rollback {self.folder} --to "
                f"{tasks[-1].name if tasks else START}`"
            )
        return tasks

    def _folders(self, said: Sequence[tuple[str | None, str | None]]) -> list[Committed]:
        """The folders of tasks, in order, each with the manifest that the journal has `said`."""
        check_no_link(self.folder / "tasks")
        folders: dict[int, Path] = {}
        for path in sorted((self.folder / "tasks").glob("[!.]*")):
            number, dash, name = path.name.partition("-")
            if not (number.isdecimal() and len(number) < 10 and dash and name):
                raise StateError(
                    f"{path} is not the folder of a task (expected a name such as 0003-NAME): move it away"
                )
            other = folders.setdefault(int(number), path)
            if other != path:
                raise StateError(f"{path} and {other.name} are both task {int(number)}: move one of them away")
        tasks: list[Committed] = []
        for expected, (index, path) in enumerate(sorted(folders.items())):
            if index != expected:
                raise StateError(f"{self.folder / 'tasks'}: task {expected} is missing before {path.name}")
            name, before = path.name.partition("-")[2], tasks[-1].name if tasks else START
            manifest = said[index][1] if index < len(said) else None
            tasks.append(Committed(index, name, path, before, manifest))
        return tasks

    def _chain(self) -> _Chain:
        """What the journal says was committed and not dropped again."""
        chain = _Chain([], None, None, False)
        for event in self.journal():
            kind, said = event["event"], chain.said
            if kind in ("task begun", "task committed"):
                index, name = event["task"], event["name"]
                said += [(None, None)] * (index - len(said))  # a journal whose first lines were cut off
                del said[index:]
                chain.keep, chain.begun = None, (index, name)
                if kind == "task committed":
                    said.append((name, event.get("manifest")))
                    chain.begun = None
            elif kind == "rollback begun":
                chain.keep, chain.begun = event["keep"], None
            elif kind == "rolled back":
                chain.keep = chain.begun = None
                keep, dropped = event.get("keep"), event["dropped"]
                said[:] = said[:keep] if keep is not None else [task for task in said if task[0] not in dropped]
            elif kind == "tasks sealed":
                for index, manifest in enumerate(event["manifests"][: len(said)]):
                    said[index] = (said[index][0], manifest)
                for manifest in event["manifests"][len(said) :]:
                    said.append((None, manifest))
        chain.sealed = any(manifest for _, manifest in chain.said)
        return chain

    def unchecked(self) -> str:
        """A line about tasks whose manifest no line of the journal names, as those of older versions; else empty."""
        begun = self._chain().begun  # a crash came before the line of its commit; the next writer adds that
        names = [t.name for t in self.committed if t.manifest is None and (t.index, t.name) != begun]
        if not names:
            return ""
        few = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        return (
            f"{self.folder}: the journal holds no hash of what was committed for {few}, as older versions wrote it, so "
            "nobody can say whether these folders were exchanged; the next update stores the hashes"
        )

    def load(self, method: Method, task: Committed | None = None) -> None:
        """Restore `method` to its state after `task`; by default after the last committed task."""
        tasks = self.committed
        task = task or (tasks[-1] if tasks else None)
        if task is not None:
            files = task.read()
            restore(method, files, str(task.folder))
            self._check_recipe(task, files)

    def commit(
        self,
        index: int,
        name: str,
        method: Method,
        documents: Mapping[str, Any],
        files: Mapping[str, bytes] = MappingProxyType({}),
    ) -> None:
        """Store a learned task in one step, with JSON documents and other files; then delete its checkpoints."""
        folder = self.folder / "tasks" / f"{index:04d}-{name}"
        check_no_link(folder.parent)
        made_by = {**_meaning(self.recipe), "training": _training(self.recipe), "model": _known(self.backbone)}
        documents = {**documents, MADE_BY: made_by}
        files = {**snapshot(method), **{file: to_json(content) for file, content in documents.items()}, **files}
        manifest = write_folder(folder, files)
        self.log("task committed", task=index, name=name, manifest=manifest)
        remove_folder(self.folder / "resume")

    def _check_recipe(self, task: Committed, files: Mapping[str, bytes]) -> None:
        """StateError if the recipe gives the stored tensors another meaning than when they were stored, or if
        `backbone.json` is another one."""
        if MADE_BY not in files:
            return  # a task of an older version
        then = read_document(Document, files[MADE_BY], str(task.folder / MADE_BY), task._cure)
        for key, before, after in _differences(then, _meaning(self.recipe)):
            raise StateError(
                f"{self.folder / 'recipe.yaml'}: {key} is {_short(after)}, and was {_short(before)} when task "
                f"{task.name} was learned: put it back, because the learned model means something else now"
            )
        here = _known(self.backbone)
        known = then.get("model", here)  # a task of an older version does not have it
        for key in sorted({*known, *here}):
            if known.get(key) != here.get(key):
                raise StateError(
                    f"{self.folder / 'backbone.json'}: {key} is {_short(here.get(key))}, and was "
                    f"{_short(known.get(key))} when task {task.name} was learned: restore it from a backup"
                )

    def edited(self) -> str:
        """A line about what of the recipe was changed since the last task was learned; empty if nothing was.

        How later tasks are learned may be changed in `recipe.yaml`, but not without a word: some options of a method
        also decide how it answers.
        """
        task = next(reversed(self.committed), None)
        files = task.read(MADE_BY) if task is not None else {}
        if task is None or MADE_BY not in files:
            return ""
        then = read_document(Document, files[MADE_BY], str(task.folder / MADE_BY), task._cure)
        found = list(_differences(then.get("training", {}), _training(self.recipe)))
        changes = [f"{key} is {_short(after)} (was {_short(before)})" for key, before, after in found]
        if not changes:
            return ""
        few = ", ".join(changes[:5]) + (f" and {len(changes) - 5} more" if len(changes) > 5 else "")
        return (
            f"{self.folder / 'recipe.yaml'} was changed since task {task.name} was learned: {few}; the model answers "
            "and learns by the file as it is now"
        )

    def rollback(self, to: str) -> list[str]:
        """Drop every task after `to`, and an unfinished one; return the names of the dropped tasks.

        Args:
            to: a task's name or its folder's name; or `start`, which drops all tasks.

        Raises:
            UsageError: there is no such task. A number alone is none: folders count from 0, and what is printed
                counts from 1.
        """
        tasks = self._folders(self._chain().said)  # what is missing or too much after `to` is dropped from the journal
        if to == START:
            keep = 0
        else:
            matches = [t for t in tasks if t.name == to] or [t for t in tasks if t.folder.name == to]
            if not matches:
                near = closest(to, [START, *(t.name for t in tasks)])
                meant = [f"task {to} is {t.name}" for t in tasks if to == str(t.index + 1)]
                meant += [f"the folder with {to} is {t.folder.name}" for t in tasks if to == str(t.index)]
                raise UsageError(
                    f"{self.folder} has no task {to!r}; "
                    + (f"a number is not taken for one: {', '.join(meant)}; give the name" if meant else near)
                )
            keep = matches[0].index + 1
        self._check_rollback(tasks, keep)
        opened, said = self.open_task(), self._chain().said
        dropped = [t.name for t in tasks[keep:]]
        gone = [name for name, _ in said[max(keep, len(tasks)) :] if name is not None]  # their folders are missing
        if dropped or gone or opened:
            self.log("rollback begun", to=to, keep=keep)
        remove_folder(self.folder / "resume")
        for task in reversed(tasks[keep:]):  # from the end, so that a crash leaves no gap between the tasks
            remove_folder(task.folder)
        if dropped or gone or opened:
            self.log("rolled back", to=to, dropped=[*dropped, *gone], keep=keep)
        return [*dropped, *gone]

    def _check_rollback(self, tasks: Sequence[Committed], keep: int) -> None:
        """StateError if a rollback could not end, or would leave a state that does not load; nothing is removed yet."""
        for path in (self.folder / "resume", *(task.folder for task in tasks[keep:])):
            check_no_link(path)
            if path.exists() and not path.is_dir():
                raise StateError(f"{path} is no folder: move it away")
        if keep:
            tasks[keep - 1].read()

    # -- journal --------------------------------------------------------------------------------------

    def log(self, event: str, **facts: Any) -> None:
        """Append one line to the journal."""
        line = {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "event": event, **facts}
        path = self.folder / "journal.jsonl"
        check_no_link(path)
        with open(path, "ab", opener=_no_link) as file:
            file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())

    def journal(self) -> list[dict[str, Any]]:
        """All events, without a last line that a crash cut off."""
        path = self.folder / "journal.jsonl"
        try:
            lines = read_regular(path, MOST_JOURNAL).split(b"\n") if os.path.lexists(path) else []
        except OSError as error:
            raise StateError(f"{path} cannot be read ({error.strerror}): restore it from a backup") from None
        events = []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                event = parse_json(line, finite=True)
            except Malformed:
                if number == len(lines):
                    break
                event = None
            if not (isinstance(event, dict) and isinstance(event.get("event"), str)):
                raise StateError(f"{path}, line {number}: not an event in JSON; restore the file or delete this line")
            if event["event"] in EVENTS and (fault := fault_of(EVENTS[event["event"]], event)):
                raise StateError(
                    f"{path}, line {number}: {event['event']}: {fault}; restore the file or delete this line"
                )
            events.append(event)
        return events

    def open_task(self) -> dict[str, Any] | None:
        """The journal's line of the unfinished task, which was begun but neither committed nor dropped; None if there
        is no such task."""
        begun = self._last_begun()
        return begun if begun and begun["task"] == len(self._folders(self._chain().said)) else None

    def _last_begun(self) -> dict[str, Any] | None:
        """The journal's line about the last task that was begun; None if a commit or a rollback came after it."""
        turns = ("task begun", "task committed", "rollback begun", "rolled back")
        last = next((e for e in reversed(self.journal()) if e["event"] in turns), None)
        return last if last and last["event"] == "task begun" else None

    # -- one writer at a time -------------------------------------------------------------------------

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Lock the folder for writing. First finish or remove what a crash left behind.

        Raises:
            StateError: another process is writing to the folder.
        """
        for name in (".lock", "journal.jsonl", "tasks", "resume"):
            check_no_link(self.folder / name)
        try:
            lock = _no_link(self.folder / ".lock", os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise StateError(f"{self.folder} cannot be changed: {error.strerror}") from None
        _held.add(lock)
        try:
            _lock(lock, self.folder)
            remove_leftovers(self.folder)
            remove_leftovers(self.folder / "tasks")
            self._mend_journal()
            self._finish_rollback()
            self._finish_commit()
            self._seal()
            yield
        finally:
            if lock in _held:  # not in a forked child, which has closed its copy of the lock
                _held.remove(lock)
                os.close(lock)

    def _mend_journal(self) -> None:
        path = self.folder / "journal.jsonl"
        if path.exists():
            content = read_regular(path, MOST_JOURNAL)
            if content and not content.endswith(b"\n"):
                write_file(path, content[: content.rfind(b"\n") + 1])

    def _finish_commit(self) -> None:
        """Finish a commit that a crash interrupted after the task's folder was renamed.

        Then the journal has no line about the commit, or useless checkpoints are left.
        """
        begun, tasks = self._last_begun(), self._folders(self._chain().said)  # faults are for those who read them
        if begun and tasks and (begun["task"], begun["name"]) == (tasks[-1].index, tasks[-1].name):
            manifest = manifest_digest(tasks[-1].folder)
            self.log("task committed", task=begun["task"], name=begun["name"], manifest=manifest)
        if self.open_task() is None:
            remove_folder(self.folder / "resume")

    def _finish_rollback(self) -> None:
        """Finish a rollback that a crash interrupted. It was asked for, and nobody wants half of it."""
        chain = self._chain()
        if chain.keep is None:
            return
        tasks = self._folders(chain.said)
        self._check_rollback(tasks, chain.keep)
        remove_folder(self.folder / "resume")
        for task in reversed(tasks[chain.keep :]):
            remove_folder(task.folder)
        dropped = [name for name, _ in chain.said[chain.keep :] if name is not None]
        to = tasks[chain.keep - 1].name if chain.keep else START
        self.log("rolled back", to=to, dropped=dropped, keep=chain.keep)

    def _seal(self) -> None:
        """Store the hashes of tasks that an older version committed, so that the chain can be checked from now on."""
        tasks = self._folders(self._chain().said)
        if any(task.manifest is None for task in tasks):
            manifests = [task.manifest or manifest_digest(task.folder) for task in tasks]
            self.log("tasks sealed", manifests=manifests)


def _unused(folder: Path) -> bool:
    """Whether a folder has nothing in it but the files of a `State.create` that crashed."""
    made = {"tasks", "backbone.json"}
    ours = all(path.name in made or OURS.fullmatch(path.name) for path in folder.iterdir())
    tasks = folder / "tasks"
    return ours and not tasks.is_symlink() and not any(tasks.glob("*"))


def training_digest(recipe: Recipe) -> str:
    """A hash of all in a recipe that decides a training: a checkpoint is of use with the same one only."""
    added = {name for name in ("pets", "average") if getattr(recipe, name)}  # others have the digest of before
    decides = recipe.model_dump_json(include=DECIDES | added)
    return hashlib.sha256(decides.encode()).hexdigest()


def _meaning(recipe: Recipe) -> dict[str, Any]:
    """The parts of a recipe that say what stored tensors mean. Where the model lies may change, and so may training."""
    plain = recipe.model_dump(mode="json", include={"backbone", "pet", "pets", "head", "method"})
    plain["backbone"] = {k: v for k, v in plain["backbone"].items() if k not in ("name", "gradient_checkpointing")}
    plain["method"] = {"name": plain["method"]["name"]}
    return plain


def _training(recipe: Recipe) -> dict[str, Any]:
    """The parts of a recipe that say how it goes on to learn, without places."""
    plain = recipe.model_dump(
        mode="json", include={"seed", "setting", "method", "protect", "online", "train", "stream", "evaluate"}
    )
    if plain["protect"] is not None and plain["protect"].get("reference"):
        given = plain["protect"]["reference"].items()
        plain["protect"]["reference"] = {
            k: v for k, v in given if k != "path" and not (k == "texts" and isinstance(v, str))
        }
    return {**plain, "run": {"precision": recipe.run.precision}}


def _known(backbone: Mapping[str, Any]) -> dict[str, Any]:
    """What `backbone.json` says, without the place of the model."""
    return {key: value for key, value in backbone.items() if key != "spec"}


def _short(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:60]


def _differences(then: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The keys that have another value now. Keys that one of them lacks are of another version, and no difference."""
    if isinstance(then, dict) and isinstance(now, dict):
        for name in sorted(then.keys() & now.keys()):
            yield from _differences(then[name], now[name], f"{key}.{name}" if key else name)
    elif then != now:
        yield key, then, now


def _no_link(path: str | Path, flags: int) -> int:
    """Open a file that is no link, to write to it."""
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise StateError(f"{path} is no file: move it away")
    return descriptor


_held: set[int] = set()  # file descriptors of the locks that this process has


def _let_go() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    # Otherwise a child process that loads images would keep the lock for seconds after its parent was killed.
    os.register_at_fork(after_in_child=_let_go)


def _lock(descriptor: int, folder: Path) -> None:
    if os.name != "posix":
        return
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released by the kernel however the process ends
    except OSError:
        raise StateError(f"another process is writing to {folder}: wait for it, or stop it") from None


def interrupted(folder: Path) -> str:
    """A task that was stopped in the middle, and where, as its checkpoints in STATE/resume say; else empty."""
    try:
        header = read_json(folder / "task.json")
        name = str(header["name"])
    except (OSError, Malformed, LookupError, TypeError):
        return ""
    newest, found = "", "before its first checkpoint"
    for path in folder.glob("[!.]*"):
        parts = re.fullmatch(r"(\d+)-(.+)-(?:step-(\d+)|finished)", path.name)
        if parts and path.name > newest:
            newest, step = path.name, parts[3]
            found = f"after step {int(step)} of phase {parts[2]}" if step else f"after phase {parts[2]}"
    return f"task {name}, stopped {found}"


DECIDED_BY = ("its data", "the training options", "the number of processes")
"""What a checkpoint inside a task belongs to."""


def _why(before: Any, now: Mapping[str, Any]) -> str:
    """Why checkpoints of a task are of no use to the task of the same name; empty for another task."""
    if not isinstance(before, dict) or any(before.get(key) != now[key] for key in ("task", "name")):
        return ""
    parts = zip(DECIDED_BY, str(before.get("data")).split("/"), str(now["data"]).split("/"), strict=False)
    changed = [what for what, old, new in parts if old != new]
    return f", because {' and '.join(changed)} changed" if changed else ""


class MidTask:
    """Checkpoints inside one task, in STATE/resume/: the finished phases, and the progress of the open one.

    After a crash, `run` calls the method's `learn` again. `learn` repeats its work between the calls of `fit`. A
    finished call of `fit` loads its result instead of training again; the interrupted call continues.

    Args:
        folder: STATE/resume.
        method: the method to save and restore.
        task: (index, name, the parts of `DECIDED_BY` with `/` between them). Checkpoints of any other task are deleted.
        every: optimizer steps between two checkpoints.
        writes: whether this process writes checkpoints; every process reads them.
    """

    def __init__(self, folder: Path, method: Method, task: tuple[int, str, str], every: int, *, writes: bool = True):
        self.folder, self.method, self.every, self.writes = folder, method, every, writes
        self.phase = ""
        self.position = 0
        self.optimizer: torch.optim.Optimizer | None = None
        self.accelerator: Accelerator | None = None
        self.seconds = 0.0
        """Seconds that earlier, interrupted attempts at this task had used at their last checkpoint."""
        self.images = 0
        """The number of examples trained on so far, with earlier attempts."""
        self.tokens = 0
        """The number of tokens of these examples, if they are texts."""
        self._began = time.perf_counter()
        self._cure = f"delete {folder}, and the task begins again"
        header = {"task": task[0], "name": task[1], "data": task[2]}
        path = folder / "task.json"
        check_no_link(folder)
        before = self._header(path) if path.is_file() else None
        if before != header:
            if writes:
                if discarded := interrupted(folder):
                    discarded += _why(before, header)
                    warnings.warn(f"discarded: {discarded}; task {task[1]} begins from its start", stacklevel=3)
                remove_folder(folder)
                folder.mkdir(parents=True)
                write_file(path, to_json(header))
        elif writes:
            remove_leftovers(folder)
        newest = max(self._saved(), key=lambda p: p.stat().st_mtime_ns, default=None)
        if newest is not None:
            position = self._place(newest, self._read(newest))
            self.seconds, self.images = float(position["seconds"]), int(position["images"])
            self.tokens = int(position.get("tokens", 0))

    def begin(self, phase: str, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> int | None:
        self.phase, self.optimizer, self.accelerator = phase, optimizer, accelerator
        number, self.position = self.position, self.position + 1
        finished = self.folder / f"{number:02d}-{phase}-finished"
        if finished.is_dir():
            restore(self.method, self._read(finished), str(finished), memory=False)
            return None
        open_ = self._newest_open()
        if open_ is None:
            return 0
        files, where = self._read(open_), str(open_)
        restore(self.method, files, where, memory=False)
        restore_optimizer(optimizer, files, where)
        place = self._place(open_, files)
        if accelerator.scaler is not None and place["scaler"] is not None:
            accelerator.scaler.load_state_dict(place["scaler"])
        return int(place["done"])

    def step(self, done: int, total: int, images: int, tokens: int, *, force: bool) -> None:
        self.images += images
        self.tokens += tokens
        if self.writes and (force or (done % self.every == 0 and done < total)):
            self._save(self.folder / f"{self.position - 1:02d}-{self.phase}-step-{done:09d}", done)

    def finish(self) -> None:
        if self.writes:
            self._save(self.folder / f"{self.position - 1:02d}-{self.phase}-finished", None)

    def _save(self, path: Path, done: int | None) -> None:
        assert self.optimizer is not None and self.accelerator is not None
        older = self._open()
        scaler = self.accelerator.scaler
        place = {
            "done": done,
            "seconds": self.seconds + time.perf_counter() - self._began,
            "images": self.images,
            "tokens": self.tokens,
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        files = {**snapshot(self.method, memory=False), "position.json": to_json(place)}
        if done is not None:
            files |= snapshot_optimizer(self.optimizer)
        if path in older:
            return
        write_folder(path, files)
        for old in older:
            remove_folder(old)

    def _header(self, path: Path) -> Any:
        try:
            return read_json(path)
        except (OSError, Malformed):
            raise StateError(f"{path} is torn: {self._cure}") from None

    def _place(self, path: Path, files: Mapping[str, bytes]) -> dict[str, Any]:
        """Where a checkpoint stands, from its files."""
        where = str(path / "position.json")
        if "position.json" not in files:
            raise StateError(f"{where} is missing: {self._cure}")
        return read_document(Position, files["position.json"], where, self._cure)

    def _read(self, path: Path) -> dict[str, bytes]:
        return read_folder(path, self._cure)

    def _saved(self) -> list[Path]:
        return [p for p in self.folder.glob("[!.]*") if p.is_dir()]

    def _open(self) -> list[Path]:
        prefix = f"{self.position - 1:02d}-{self.phase}-step-"
        return sorted(p for p in self._saved() if p.name.startswith(prefix))

    def _newest_open(self) -> Path | None:
        saved = self._open()
        return saved[-1] if saved else None

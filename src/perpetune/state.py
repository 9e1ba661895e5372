"""The state folder: it stores a tuned model, and everything that is needed to continue its training.

STATE/
  recipe.yaml         the resolved recipe
  backbone.json       the name and the fingerprint of the frozen weights
  journal.jsonl       one line per event
  tasks/0003-NAME/    one folder per committed task; it is complete, or it does not exist
  resume/             checkpoints of the unfinished task; the commit of the task deletes them
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime, timezone
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from perpetune.errors import StateError, UsageError, closest
from perpetune.files import listed, read_folder, remove_folder, remove_leftovers, to_json, write_file, write_folder
from perpetune.methods.base import Method
from perpetune.recipe import Recipe, parse_recipe
from perpetune.snapshot import restore, restore_optimizer, snapshot, snapshot_optimizer

if TYPE_CHECKING:
    from accelerate import Accelerator

START = "start"  # the name of the state before the first task


@dataclass(frozen=True)
class Committed:
    """A task that has been learned and stored."""

    index: int
    name: str
    folder: Path
    before: str
    """The name of the task before it, or `start`. A rollback to this name drops the task."""

    def read(self, *only: str) -> dict[str, bytes]:
        """The contents of the task's files, by name; if names are given, only of those of them that exist.

        Raises:
            StateError: a file is missing, damaged or changed. The message names it and says what the user can do.
        """
        return read_folder(self.folder, self._cure, only or None)

    def sizes(self) -> dict[str, int]:
        """The size of each of the task's files, in bytes."""
        return {name: size for name, (size, _) in listed(self.folder, self._cure).items()}

    def json(self, name: str) -> dict[str, Any]:
        """The content of one of the task's JSON files, checked against the manifest."""
        content: dict[str, Any] = json.loads(self.read(name)[name])
        return content

    @property
    def _cure(self) -> str:
        drop = f"perpetune rollback {self.folder.parent.parent} --to {self.before}"
        return f"restore it from a backup, or roll back with `{drop}`"


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
            text = (folder / "recipe.yaml").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise StateError(f"{folder / 'recipe.yaml'} cannot be read as text") from None
        try:
            self.recipe: Recipe = parse_recipe(text, str(folder / "recipe.yaml"))
        except UsageError as error:
            raise StateError(str(error)) from None
        if "checkpoint_every" not in self.recipe.run.model_fields_set:  # defaults must not fill up a torn recipe
            raise StateError(f"{folder / 'recipe.yaml'} is torn, its last key is missing: restore it from a backup")

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
            content: dict[str, Any] = json.loads((self.folder / "backbone.json").read_bytes())
            return {"spec": content["spec"], "fingerprint": content["fingerprint"], **content}
        except (OSError, ValueError, KeyError, TypeError):
            raise StateError(f"{self.folder / 'backbone.json'} is missing or torn: restore it from a backup") from None

    def relocate(self, recipe: Recipe | None, spec: str | None, data: tuple[str, str] | None) -> None:
        """Store that the model or data lie elsewhere now. Hold `writing` around it; nothing that was learned changes.

        Args:
            recipe: the recipe with the new places; None keeps it.
            spec: the new name of the backbone; None keeps it.
            data: the beginning of paths of tasks' data as it was, and as it is now.
        """
        if recipe is not None:
            write_file(self.folder / "recipe.yaml", recipe.to_yaml().encode())
            self.recipe = recipe
        if spec is not None:
            write_file(self.folder / "backbone.json", to_json({**self.backbone, "spec": spec}))
        self.log("relocated", **({"model": spec} if spec else {}), **({"data": list(data)} if data else {}))

    def moved(self) -> list[tuple[str, str]]:
        """The beginnings of paths of tasks' data that have changed, as they were and as they are, the oldest first."""
        events = [e["data"] for e in self.journal() if e.get("event") == "relocated" and "data" in e]
        return [(str(e[0]), str(e[1])) for e in events if isinstance(e, list) and len(e) == 2]

    # -- committed tasks ------------------------------------------------------------------------------

    @property
    def committed(self) -> list[Committed]:
        """The tasks learned so far, in order.

        Raises:
            StateError: a task between others is missing, a task exists twice, or a folder's name is not that of a task.
        """
        folders: dict[int, Path] = {}
        for path in sorted((self.folder / "tasks").glob("[!.]*")):
            number, dash, name = path.name.partition("-")
            if not (number.isdecimal() and dash and name):
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
            tasks.append(Committed(index, name, path, before))
        return tasks

    def load(self, method: Method, task: Committed | None = None) -> None:
        """Restore `method` to its state after `task`; by default after the last committed task."""
        task = task or (self.committed[-1] if self.committed else None)
        if task is not None:
            restore(method, task.read(), str(task.folder))

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
        files = {**snapshot(method), **{file: to_json(content) for file, content in documents.items()}, **files}
        write_folder(folder, files)
        self.log("task committed", task=index, name=name)
        remove_folder(self.folder / "resume")

    def rollback(self, to: str) -> list[str]:
        """Drop every task after `to`, and an unfinished one; return the names of the dropped tasks.

        Args:
            to: a task's name, its number or its folder's name; or `start`, which drops all tasks.
        """
        tasks = self.committed
        if to == START:
            keep = 0
        else:
            # A name counts before a number, because numbers may be names: tasks of digit images have such names.
            matches = [t for t in tasks if t.name == to] or [t for t in tasks if to in (str(t.index), t.folder.name)]
            if not matches:
                raise UsageError(f"{self.folder} has no task {to!r}; {closest(to, [START, *(t.name for t in tasks)])}")
            keep = matches[0].index + 1
        opened = self.open_task()
        remove_folder(self.folder / "resume")
        for task in reversed(tasks[keep:]):  # from the end, so that a crash leaves no gap between the tasks
            remove_folder(task.folder)
        dropped = [t.name for t in tasks[keep:]]
        if dropped or opened:
            self.log("rolled back", to=to, dropped=dropped)
        return dropped

    # -- journal --------------------------------------------------------------------------------------

    def log(self, event: str, **facts: Any) -> None:
        """Append one line to the journal."""
        line = {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "event": event, **facts}
        with open(self.folder / "journal.jsonl", "ab") as file:
            file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())

    def journal(self) -> list[dict[str, Any]]:
        """All events, without a last line that a crash cut off."""
        path = self.folder / "journal.jsonl"
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        events = []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                event = json.loads(line)
            except ValueError:
                if number == len(lines):
                    break
                event = None
            if not (isinstance(event, dict) and isinstance(event.get("event"), str)):
                raise StateError(f"{path}, line {number}: not an event in JSON; restore the file or delete this line")
            events.append(event)
        return events

    def open_task(self) -> dict[str, Any] | None:
        """The journal's line of the unfinished task, which was begun but neither committed nor dropped; None if there
        is no such task."""
        begun = self._last_begun()
        return begun if begun and begun["task"] == len(self.committed) else None

    def _last_begun(self) -> dict[str, Any] | None:
        """The journal's line about the last task that was begun; None if a commit or a rollback came after it."""
        turns = ("task begun", "task committed", "rolled back")
        last = next((e for e in reversed(self.journal()) if e["event"] in turns), None)
        return last if last and last["event"] == "task begun" else None

    # -- one writer at a time -------------------------------------------------------------------------

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Lock the folder for writing. First finish or remove what a crash left behind.

        Raises:
            StateError: another process is writing to the folder.
        """
        lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        _held.add(lock)
        try:
            _lock(lock, self.folder)
            remove_leftovers(self.folder)
            remove_leftovers(self.folder / "tasks")
            self._mend_journal()
            self._finish_commit()
            yield
        finally:
            if lock in _held:  # not in a forked child, which has closed its copy of the lock
                _held.remove(lock)
                os.close(lock)

    def _mend_journal(self) -> None:
        path = self.folder / "journal.jsonl"
        if path.exists():
            content = path.read_bytes()
            if content and not content.endswith(b"\n"):
                write_file(path, content[: content.rfind(b"\n") + 1])

    def _finish_commit(self) -> None:
        """Finish a commit that a crash interrupted after the task's folder was renamed.

        Then the journal has no line about the commit, or useless checkpoints are left.
        """
        begun, tasks = self._last_begun(), self.committed
        if begun and tasks and (begun["task"], begun["name"]) == (tasks[-1].index, tasks[-1].name):
            self.log("task committed", task=begun["task"], name=begun["name"])
        if self.open_task() is None:
            remove_folder(self.folder / "resume")


def _unused(folder: Path) -> bool:
    """Whether a folder has nothing in it but the files of a `State.create` that crashed."""
    made = {"tasks", "backbone.json", ".backbone.json.tmp", ".recipe.yaml.tmp"}
    return all(path.name in made for path in folder.iterdir()) and not any((folder / "tasks").glob("*"))


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


class MidTask:
    """Checkpoints inside one task, in STATE/resume/: the finished phases, and the progress of the open one.

    After a crash, `run` calls the method's `learn` again. `learn` repeats its work between the calls of `fit`. A
    finished call of `fit` loads its result instead of training again; the interrupted call continues.

    Args:
        folder: STATE/resume.
        method: the method to save and restore.
        task: (index, name, fingerprint of its data). Checkpoints of any other task are deleted.
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
        if not path.is_file() or self._header(path) != header:
            if writes:
                remove_folder(folder)
                folder.mkdir(parents=True)
                write_file(path, to_json(header))
        elif writes:
            remove_leftovers(folder)
        newest = max(self._saved(), key=lambda p: p.stat().st_mtime_ns, default=None)
        if newest is not None:
            position = json.loads(self._read(newest)["position.json"])
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
        place = json.loads(files["position.json"])
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
            return json.loads(path.read_bytes())
        except ValueError:
            raise StateError(f"{path} is torn: {self._cure}") from None

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

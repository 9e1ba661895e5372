"""The state folder: everything a tuned model is, and everything needed to go on with it.

    STATE/
      recipe.yaml         the resolved recipe
      backbone.json       which frozen weights it belongs to
      journal.jsonl       one line per event
      tasks/0003-NAME/    one folder per committed task, whole or not there
      resume/             checkpoints inside the task at hand; gone after its commit
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from perpetune.errors import StateError, UsageError, closest
from perpetune.files import read_folder, remove_folder, remove_leftovers, to_json, write_file, write_folder
from perpetune.methods.base import Method
from perpetune.recipe import Recipe, parse_recipe
from perpetune.snapshot import restore, restore_optimizer, snapshot, snapshot_optimizer

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Committed:
    """A task that has been learned and stored."""

    index: int
    name: str
    folder: Path

    def json(self, name: str) -> dict[str, Any]:
        """One of its JSON files, checked against the manifest."""
        content: dict[str, Any] = json.loads(read_folder(self.folder)[name])
        return content


class State:
    """A state folder that exists. Make one with `State.create`, open one with `State(folder)`.

    Raises:
        StateError: the folder is not a state, or what it holds is not one's.
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
        self.recipe: Recipe = parse_recipe(text, str(folder / "recipe.yaml"))

    @classmethod
    def create(cls, folder: Path, recipe: Recipe, backbone: Mapping[str, Any]) -> State:
        """A new state folder with nothing learned.

        Raises:
            UsageError: there is something at `folder` already.
        """
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(
                f"{folder} is there already: go on with `perpetune resume {folder}` or `perpetune update {folder}`, or "
                "choose another folder"
            )
        try:
            (folder / "tasks").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{folder} cannot be made: {error.strerror}") from None
        write_file(folder / "backbone.json", to_json(dict(backbone)))
        write_file(folder / "recipe.yaml", recipe.to_yaml().encode())  # last: it makes the folder a state
        return cls(folder)

    @property
    def backbone(self) -> dict[str, Any]:
        """Spec and fingerprint of the frozen weights."""
        try:
            content: dict[str, Any] = json.loads((self.folder / "backbone.json").read_bytes())
            return {"spec": content["spec"], "fingerprint": content["fingerprint"], **content}
        except (OSError, ValueError, KeyError, TypeError):
            raise StateError(f"{self.folder / 'backbone.json'} is missing or torn: restore it from a backup") from None

    # -- committed tasks ------------------------------------------------------------------------------

    @property
    def committed(self) -> list[Committed]:
        """The tasks learned so far, in order.

        Raises:
            StateError: one is missing in between, or a folder has no task's name.
        """
        found = []
        for path in sorted((self.folder / "tasks").glob("[!.]*")):
            number, dash, name = path.name.partition("-")
            if not (number.isdigit() and dash and name):
                raise StateError(f"{path} is not a task's folder (0003-NAME is expected): move it away")
            found.append(Committed(int(number), name, path))
        found.sort(key=lambda c: c.index)
        for expected, task in enumerate(found):
            if task.index != expected:
                raise StateError(f"{self.folder / 'tasks'}: task {expected} is missing before {task.folder.name}")
        return found

    def load(self, method: Method, task: Committed | None = None) -> None:
        """Put what the last committed task (or `task`) left into `method`."""
        task = task or (self.committed[-1] if self.committed else None)
        if task is not None:
            restore(method, read_folder(task.folder), str(task.folder))

    def commit(self, index: int, name: str, method: Method, documents: Mapping[str, Any]) -> Committed:
        """Store a learned task, in one step; its mid-task checkpoints go."""
        folder = self.folder / "tasks" / f"{index:04d}-{name}"
        files = {**snapshot(method), **{file: to_json(content) for file, content in documents.items()}}
        write_folder(folder, files)
        self.log("task committed", task=index, name=name)
        remove_folder(self.folder / "resume")
        return Committed(index, name, folder)

    def rollback(self, to: str) -> list[str]:
        """Drop every task after `to`, a task's name or number; returns the names dropped.

        `to` may be `start`, which drops all.
        """
        tasks = self.committed
        if to == "start":
            keep = 0
        else:
            found = [t for t in tasks if t.name == to or str(t.index) == to]
            if not found:
                raise UsageError(
                    f"{self.folder} has no task {to!r}; {closest(to, ['start', *(t.name for t in tasks)])}"
                )
            keep = found[0].index + 1
        remove_folder(self.folder / "resume")
        for task in reversed(tasks[keep:]):  # from the end, so a crash leaves a shorter state, never one with a gap
            remove_folder(task.folder)
        dropped = [t.name for t in tasks[keep:]]
        if dropped:
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
        """All events; a last line that a crash tore is left out."""
        path = self.folder / "journal.jsonl"
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        events = []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                events.append(json.loads(line))
            except ValueError:
                if number == len(lines):
                    break
                raise StateError(f"{path}, line {number}: not JSON; restore the file or delete that line") from None
        return events

    def open_task(self) -> dict[str, Any] | None:
        """The journal's line of the task that was begun and neither committed nor dropped, if there is one."""
        begun = next((e for e in reversed(self.journal()) if e["event"] in ("task begun", "rolled back")), None)
        return begun if begun and begun["event"] == "task begun" and begun["task"] == len(self.committed) else None

    # -- one writer at a time -------------------------------------------------------------------------

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the folder for writing, with the leftovers of a crash cleaned up first.

        Raises:
            StateError: another process writes to it.
        """
        with open(self.folder / ".lock", "wb") as lock:
            _lock(lock.fileno(), self.folder)
            remove_leftovers(self.folder)
            remove_leftovers(self.folder / "tasks")
            self._mend_journal()
            yield

    def _mend_journal(self) -> None:
        path = self.folder / "journal.jsonl"
        if path.exists():
            content = path.read_bytes()
            if content and not content.endswith(b"\n"):
                write_file(path, content[: content.rfind(b"\n") + 1])


def _lock(descriptor: int, folder: Path) -> None:
    if os.name != "posix":
        return
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released by the kernel however the process ends
    except OSError:
        raise StateError(f"{folder} is being written by another process: wait for it, or stop it") from None


class MidTask:
    """Checkpoints inside one task, in STATE/resume/: finished phases, and where the open one stands.

    `learn` is entered again after a crash. What it does between the calls of `fit` is repeated; each
    finished call of `fit` is replaced by loading what it had reached; the open one goes on.

    Args:
        folder: STATE/resume.
        method: what is saved and restored.
        task: (index, name, fingerprint of its data); checkpoints of any other are removed.
        every: optimizer steps between two checkpoints.
        writes: whether this process writes; all read.
    """

    def __init__(self, folder: Path, method: Method, task: tuple[int, str, str], every: int, *, writes: bool = True):
        self.folder, self.method, self.every, self.writes = folder, method, every, writes
        self.phase = ""
        self.position = 0
        self.optimizer: torch.optim.Optimizer | None = None
        self.accelerator: Accelerator | None = None
        self.seconds = 0.0
        """Time that earlier, interrupted attempts at this task had spent by their last checkpoint."""
        self.images = 0
        """Examples trained on so far, earlier attempts included."""
        self._began = time.perf_counter()
        header = {"task": task[0], "name": task[1], "data": task[2]}
        path = folder / "task.json"
        if not path.is_file() or json.loads(path.read_bytes()) != header:
            if writes:
                remove_folder(folder)
                folder.mkdir(parents=True)
                write_file(path, to_json(header))
        elif writes:
            remove_leftovers(folder)
        newest = max(self._saved(), key=lambda p: p.stat().st_mtime_ns, default=None)
        if newest is not None:
            position = json.loads(read_folder(newest)["position.json"])
            self.seconds, self.images = float(position["seconds"]), int(position["images"])

    def begin(self, phase: str, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> int | None:
        self.phase, self.optimizer, self.accelerator = phase, optimizer, accelerator
        number, self.position = self.position, self.position + 1
        finished = self.folder / f"{number:02d}-{phase}-finished"
        if finished.is_dir():
            restore(self.method, read_folder(finished), str(finished))
            return None
        open_ = self._newest_open()
        if open_ is None:
            return 0
        files, where = read_folder(open_), str(open_)
        restore(self.method, files, where)
        restore_optimizer(optimizer, files, where)
        place = json.loads(files["position.json"])
        if accelerator.scaler is not None and place["scaler"] is not None:
            accelerator.scaler.load_state_dict(place["scaler"])
        return int(place["done"])

    def step(self, done: int, total: int, images: int, *, force: bool) -> None:
        self.images += images
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
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        files = {**snapshot(self.method), "position.json": to_json(place)}
        if done is not None:
            files |= snapshot_optimizer(self.optimizer)
        if path in older:
            return
        write_folder(path, files)
        for old in older:
            remove_folder(old)

    def _saved(self) -> list[Path]:
        return [p for p in self.folder.glob("[!.]*") if p.is_dir()]

    def _open(self) -> list[Path]:
        prefix = f"{self.position - 1:02d}-{self.phase}-step-"
        return sorted(p for p in self._saved() if p.name.startswith(prefix))

    def _newest_open(self) -> Path | None:
        found = self._open()
        return found[-1] if found else None

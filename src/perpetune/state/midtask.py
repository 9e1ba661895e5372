"""Checkpoints inside one task."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from perpetune.documents import Position, read_document
from perpetune.errors import StateError
from perpetune.files import (
    check_no_link,
    read_folder,
    remove_folder,
    remove_leftovers,
    to_json,
    write_file,
    write_folder,
)
from perpetune.methods.base import Method
from perpetune.plain import Malformed, read_json
from perpetune.snapshot import restore, restore_optimizer, snapshot, snapshot_optimizer

if TYPE_CHECKING:
    from accelerate import Accelerator


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

"""Folders that are written aside, outside a state folder, and what a killed process left of them.

An export is written into `.NAME.RANDOM.tmp` beside its target and renamed at the end. While it is written, a file in it
is locked. The kernel lets go of a lock however its process ends, so a free lock says that nobody writes any more.
The state that is exported has a note of the folder, which is locked too. So the next verb on the state finds it.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from perpetune.errors import UsageError
from perpetune.files import about
from perpetune.plain import Malformed, read_json

WRITING = ".writing"  # the locked file beside a folder that is not complete
_ASIDE = re.compile(r"\.(.+)\.([0-9a-f]{16})\.tmp", re.DOTALL)
_NOTE = re.compile(r"\.export\.([0-9a-f]{16})\.json")


@contextlib.contextmanager
def written_aside(folder: Path, state: Path | None = None) -> Iterator[Path]:
    """Give an empty folder to write into, and rename it to `folder` at the end; after an error, delete it.

    Args:
        folder: what is made.
        state: a state folder that is to remember what is written, so that its next verb clears what a kill leaves.

    Raises:
        UsageError: `folder` exists and is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} already exists and is not empty; choose a new folder")
    clear_beside(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    name = secrets.token_hex(8)
    aside = folder.parent.resolve() / f".{folder.name}.{name}.tmp"
    with _noted(state, name, aside), _named_after(folder):
        aside.mkdir()
        marker = open(aside / WRITING, "xb")  # noqa: SIM115  the lock is held until the folder is complete
        try:
            _take(marker.fileno())
            (aside / "new").mkdir()
            yield aside / "new"
            if folder.is_dir():
                folder.rmdir()  # Windows cannot replace a folder, not even an empty one
            os.replace(aside / "new", folder)
        finally:
            marker.close()
            shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def _named_after(folder: Path) -> Iterator[None]:
    """Let an OSError name the folder that the user asked for, not the one that is written aside."""
    try:
        yield
    except OSError as error:
        raise about(error, folder) from None


@contextlib.contextmanager
def _noted(state: Path | None, name: str, aside: Path) -> Iterator[None]:
    """Keep a locked note of `aside` in a state folder meanwhile; none where nothing can be written there."""
    note = None
    with contextlib.suppress(OSError):
        note = open(state / f".export.{name}.json", "xb") if state is not None else None  # noqa: SIM115
    if note is None or state is None:
        yield
        return
    try:
        _take(note.fileno())
        note.write(json.dumps({"folder": str(aside), "host": platform.node()}).encode())
        note.flush()
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(note.name)
        note.close()


def clear_beside(folder: Path) -> None:
    """Delete what killed processes left that wrote aside for `folder`: the folders of ours whose lock is free."""
    for path in folder.parent.glob(".*.tmp") if folder.parent.is_dir() else ():
        named = _ASIDE.fullmatch(path.name)
        if named and named[1] == folder.name:
            _clear(path)


def clear_noted(state: Path) -> None:
    """Delete what killed exports of a state left, wherever it is, by the state's notes whose lock is free.

    A note alone is no reason to delete anything, for a stranger may have written it: the folder has a name of ours and
    holds a file of ours with a free lock, or nothing. Notes of another computer stay, for locks that are held there may
    not be seen here.
    """
    for path in state.glob(".export.*.json"):
        known = _NOTE.fullmatch(path.name)
        if known is None:
            continue
        with contextlib.suppress(OSError), _free(path):
            try:
                note = read_json(path)
                aside, host = Path(note["folder"]), note["host"]
            except (Malformed, LookupError, TypeError):  # killed before it was written: there is no folder yet
                path.unlink()
                continue
            named = _ASIDE.fullmatch(aside.name)
            if host == platform.node() and aside.is_absolute() and named and named[2] == known[1] and _clear(aside):
                path.unlink()


def _clear(path: Path) -> bool:
    """Delete a folder that was written aside, if nobody writes it any more; whether there is none now."""
    if not os.path.lexists(path):
        return True
    if path.is_symlink() or not path.is_dir():
        return False
    with contextlib.suppress(OSError):
        path.rmdir()  # killed before anything was in it
        return True
    with contextlib.suppress(OSError), _free(path / WRITING):  # an error: it is not ours, or it is being written
        shutil.rmtree(path, ignore_errors=True)
    return not path.exists()


@contextlib.contextmanager
def _free(path: Path) -> Iterator[None]:
    """Hold the lock of a file that is no link; OSError if there is no such file, or if another process has its lock."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    try:
        if not _take(descriptor):
            raise BlockingIOError(str(path))
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int) -> bool:
    """Take the lock of a file; False where another process has it, or where there are no such locks."""
    if os.name != "posix":
        return False
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released by the kernel however the process ends
    except OSError:
        return False
    return True

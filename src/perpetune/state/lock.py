"""One writer at a time: the lock of a state folder, which ends with its process."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from perpetune.errors import StateError


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a state folder.

    Raises:
        StateError: another process has it, or the folder cannot be changed.
    """
    try:
        lock = open_no_link(folder / ".lock", os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise StateError(f"{folder} cannot be changed: {error.strerror}") from None
    _held.add(lock)
    try:
        _lock(lock, folder)
        if not _is_at(lock, folder / ".lock"):
            raise StateError(f"another process has just replaced {folder}: give the same command again")
        yield
    finally:
        if lock in _held:  # not in a forked child, which has closed its copy of the lock
            _held.remove(lock)
            os.close(lock)


def open_no_link(path: str | Path, flags: int) -> int:
    """Open a file that is no link, to write to it."""
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise StateError(f"{path} is no file: move it away")
    return descriptor


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file still has its name: a pull can put another folder in the place of the one that it was in."""
    try:
        return os.name != "posix" or os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


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

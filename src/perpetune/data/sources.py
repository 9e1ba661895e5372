"""What every kind of data looks like from above: labelled examples by number, and where they come from."""

from __future__ import annotations

import errno
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from enum import IntEnum
from typing import ClassVar, Literal

from perpetune.data.names import printable
from perpetune.errors import DataError

Kind = Literal["pictures", "texts"]


class Table(ABC):
    """The labelled examples of one split, by number.

    Args:
        labels: class name of each example; `""` for an answer in free text, where the kind has such.
        groups: task or domain of each example, `""` where it is not given; None where there are none at all.
        warnings: one line each for what was left out on the way.
    """

    gives: ClassVar[Kind]
    noun: ClassVar[str]  #: one example, as messages call it
    use: ClassVar[str]  #: what cannot be done with a bad one: `read`
    files = False  #: each example is a file of its own
    threads: ClassVar[bool] = True  #: whether it helps to look at several at a time
    free: ClassVar[bool] = False  #: whether an example may have no class
    order: Sequence[str] = ()  #: groups in the order they come where nobody says otherwise; others by name after them

    def __init__(self, labels: Sequence[str], groups: Sequence[str] | None = None, warnings: Iterable[str] = ()):
        self.labels = labels
        self.groups = groups
        self.warnings = list(warnings)

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def name(self, i: int) -> str:
        """Example `i` as messages call it: its path, or file and row."""

    @abstractmethod
    def key(self, i: int) -> str:
        """What identifies example `i` wherever the data lie; seeded choices depend on it alone."""

    @abstractmethod
    def size(self, i: int) -> int | None:
        """Bytes that example `i` takes, None when it is not there."""

    @abstractmethod
    def content(self, i: int, limit: int = -1) -> bytes:
        """The first `limit` bytes of example `i`, all when negative; nothing when it is not there."""

    @abstractmethod
    def check(self, i: int, depth: Literal["decode", "header"]) -> None:
        """DataError, which names it, when example `i` cannot be used."""

    def identity(self, i: int) -> tuple[int, int] | None:
        """What is the same for two names of one file; None where there is no file."""
        return None

    def digest(self, i: int) -> bytes:
        """All that makes example `i` what it is, for a hash; of files only what a listing shows."""
        return repr((self.key(i), self.labels[i], self.size(i))).encode() + (b"" if self.files else self.content(i))

    def classes(self, rows: Iterable[int]) -> set[str]:
        """The classes that a task with these rows has."""
        return {self.labels[row] for row in rows}

    def fits(self, i: int, classes: Collection[str]) -> bool:
        """Whether example `i` has a place in a task of those classes."""
        return self.labels[i] in classes

    def score(self, rows: Iterable[int]) -> str | None:
        """How the answers to these rows are scored, by name; None is right or wrong."""
        return None


class Fit(IntEnum):
    """How sure a source is that a path is for it; the higher one gets it."""

    NO = 0
    ANY = 1  #: nothing speaks against it: any folder, any id of a data set
    NAME = 2  #: the name of the file, or of the files in the folder, says so
    MARK = 3  #: a file that only this source's folders have lies there
    CONTENT = 4  #: what stands in the files says so
    LAYOUT = 5  #: what stands in the files, and how they are named and lie, says so


class Source(ABC):
    """Where data come from. Keyword-only arguments of `__init__` are the recipe's keys under `data:`.

    Making one reads nothing; `train`, `validation` and `test` do.
    """

    gives: ClassVar[Kind] = "pictures"

    @classmethod
    def fits(cls, path: str, wanted: Kind | None = None) -> Fit:
        """How sure it is that `path` is for it, as its option `path`; looked at where nobody names a source.

        Args:
            path: a file, a folder, or a word that is neither.
            wanted: the kind of data that is expected, where that is known.
        """
        return Fit.NO

    @abstractmethod
    def train(self) -> Table:
        """The examples to learn from; DataError when they cannot be used."""

    @abstractmethod
    def test(self) -> Table | None:
        """The examples to evaluate on, None when the source has none."""

    def validation(self) -> Table | None:
        """The examples to choose by, None when the source sets none apart from those of the test."""
        return None


LFS = b"version https://git-lfs.github.com/spec/"
POINTER = "a Git LFS pointer, and not the file itself: run `git lfs pull` where it lies"
LONGEST = 4096  # characters of a label, a domain or a path


def is_pointer(start: bytes) -> bool:
    """Whether a file that begins so is what Git LFS puts in the place of a large one."""
    return start.startswith(LFS)


def file_start(path: str, size: int = len(LFS)) -> bytes:
    """The first bytes of a file; nothing where it cannot be read or is no regular file."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return b""
        with open(path, "rb") as file:
            return file.read(size)
    except (OSError, ValueError):
        return b""


def existing(path: str, what: str) -> str:
    """`path`, or DataError when nothing is there, or something that is neither a file nor a folder, such as a pipe."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        there = isinstance(error, OSError) and error.errno not in (errno.ENOENT, errno.ENOTDIR)
        reason = (
            (error.strerror or str(error)).lower() if isinstance(error, OSError) and there else "no such file or folder"
        )
        raise DataError(f"{what} {printable(path)}: {reason}") from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise DataError(f"{what} {printable(path)}: neither a file nor a folder")
    return path

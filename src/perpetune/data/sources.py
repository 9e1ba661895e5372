"""Base classes for all kinds of data: a table has labelled examples with numbers, a source gives the tables."""

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

Kind = Literal["pictures", "texts", "pictured"]
"""What an example is: a picture, a text, or a text with pictures in it."""


class Table(ABC):
    """The labelled examples of one split. Each has a number, from 0.

    Args:
        labels: the class name of each example; `""` for an answer in free text, if the kind has such answers.
        groups: the task or domain of each example, `""` if it is not known; None if the data have no groups.
        warnings: one line for each thing that was left out.
    """

    gives: ClassVar[Kind]
    noun: ClassVar[str]  #: the word for one example in messages
    use: ClassVar[str]  #: the verb for messages about bad examples, which cannot be `read`
    files = False  #: whether each example is a separate file
    threads: ClassVar[bool] = True  #: whether it is faster to check several examples at a time
    free: ClassVar[bool] = False  #: whether an example may have no class
    order: Sequence[str] = ()  #: the default order of the groups; groups that are not in it follow by name

    def __init__(self, labels: Sequence[str], groups: Sequence[str] | None = None, warnings: Iterable[str] = ()):
        self.labels = labels
        self.groups = groups
        self.warnings = list(warnings)

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def name(self, i: int) -> str:
        """The name of example `i` in messages: its path, or its file and row."""

    @abstractmethod
    def key(self, i: int) -> str:
        """An identifier of example `i`, the same wherever the data are stored; seeded choices depend only on it."""

    @abstractmethod
    def size(self, i: int) -> int | None:
        """The size of example `i` in bytes; None if it does not exist."""

    @abstractmethod
    def content(self, i: int, limit: int = -1) -> bytes:
        """The first `limit` bytes of example `i`, or all if `limit` is negative; no bytes if it does not exist."""

    @abstractmethod
    def check(self, i: int, depth: Literal["decode", "header"]) -> None:
        """Check example `i`; DataError, with its name, if it cannot be used."""

    def identity(self, i: int) -> tuple[int, int] | None:
        """A value that is equal for two names of the same file; None if the example is not a file."""
        return None

    def digest(self, i: int) -> bytes:
        """Bytes for a hash of example `i`: its key, label, size and content; for a file without the content."""
        return repr((self.key(i), self.labels[i], self.size(i))).encode() + (b"" if self.files else self.content(i))

    def classes(self, rows: Iterable[int]) -> set[str]:
        """The classes of a task with these rows."""
        return {self.labels[row] for row in rows}

    def fits(self, i: int, classes: Collection[str]) -> bool:
        """Whether example `i` can be in a task with these classes."""
        return self.labels[i] in classes

    def score(self, rows: Iterable[int]) -> str | None:
        """The name of the score for answers to these rows; None counts answers as right or wrong."""
        return None


class Fit(IntEnum):
    """How sure a source is that it can read a path. The source with the highest value gets the path."""

    NO = 0  #: the source cannot read it
    ANY = 1  #: nothing speaks against it: any folder, any id of a data set
    NAME = 2  #: the name of the file fits, or the names of the files in the folder
    MARK = 3  #: the folder has a file that only folders for this source have
    CONTENT = 4  #: the content of the files fits
    LAYOUT = 5  #: the content of the files fits, and so do their names and folders


class Source(ABC):
    """A source of data. The keyword-only arguments of `__init__` are the recipe's keys under `data:`.

    `__init__` reads no data; `train`, `validation` and `test` do.
    """

    gives: ClassVar[Kind] = "pictures"
    classed: ClassVar[bool] = True
    """Whether pictures have classes, by which a stream of them can be cut."""

    @classmethod
    def fits(cls, path: str, wanted: Kind | None = None) -> Fit:
        """How sure the source is that it can read `path`. The library asks this if the user has not named a source.

        Args:
            path: a value for the source's option `path`: a file, a folder, or any other word.
            wanted: the expected kind of data, if it is known.
        """
        return Fit.NO

    @abstractmethod
    def train(self) -> Table:
        """The examples to learn from; DataError if they cannot be used."""

    @abstractmethod
    def test(self) -> Table | None:
        """The examples to evaluate on; None if the source has none."""

    def validation(self) -> Table | None:
        """The validation examples, by which a method can choose; None if the source has none besides the test."""
        return None

    def without_labels(self) -> Source:
        """The same data for those who look at no label, so that none has to be there. By default labels are needed."""
        return self


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

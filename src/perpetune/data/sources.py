"""What every kind of data looks like from above: labelled examples by number; and pictures, opened one at a time."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from perpetune.data.pictures import list_folder, read_header, read_picture
from perpetune.data.text import printable
from perpetune.errors import DataError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image


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


class PictureTable(Table):
    """Labelled pictures, opened one at a time; only names and row numbers are kept, not pixels.

    A table of another kind of picture overrides `open` and, if `encoded` cannot give bytes, `probe`.
    """

    gives = "pictures"
    noun = "picture"
    use = "read"

    @abstractmethod
    def encoded(self, i: int) -> str | bytes:
        """Picture `i` as Pillow reads it: the path of a file, or the bytes of one."""

    def open(self, i: int) -> Image:
        """Picture `i` in RGB, as a person sees it; DataError naming it when it cannot be read."""
        return read_picture(self.encoded(i), self.name(i))

    def probe(self, i: int) -> None:
        """DataError when the header of picture `i` shows that it cannot be read."""
        read_header(self.encoded(i), self.name(i))

    def check(self, i: int, depth: Literal["decode", "header"]) -> None:
        if depth == "decode":
            self.open(i)
        else:
            self.probe(i)

    def identity(self, i: int) -> tuple[int, int] | None:
        path = self.encoded(i) if self.files else b""
        if isinstance(path, bytes):
            return None
        try:
            status = os.stat(path)
        except (OSError, ValueError):  # reported by `check`
            return None
        return status.st_dev, status.st_ino

    def size(self, i: int) -> int | None:
        encoded = self.encoded(i)
        if isinstance(encoded, bytes):
            return len(encoded)
        try:
            return os.stat(encoded).st_size
        except (OSError, ValueError):  # ValueError: a path with a NUL
            return None

    def content(self, i: int, limit: int = -1) -> bytes:
        encoded = self.encoded(i)
        if isinstance(encoded, bytes):
            return encoded if limit < 0 else encoded[:limit]
        try:
            with open(encoded, "rb") as file:
                return file.read(limit)
        except (OSError, ValueError):
            return b""


class FileTable(PictureTable):
    """Pictures in files.

    Args:
        root: folder that the files lie in; as the user wrote it, because messages repeat it.
        paths: relative to `root`, or absolute.
    """

    files = True

    def __init__(
        self,
        root: str,
        paths: Sequence[str],
        labels: Sequence[str],
        groups: Sequence[str] | None = None,
        warnings: Iterable[str] = (),
    ):
        super().__init__(labels, groups, warnings)
        self.root = root
        self.paths = paths

    def encoded(self, i: int) -> str:
        return os.path.join(self.root, self.paths[i])

    def name(self, i: int) -> str:
        return printable(self.encoded(i))

    def key(self, i: int) -> str:
        return printable(self.paths[i])


class MemoryTable(PictureTable):
    """Small pictures held as the bytes of picture files."""

    def __init__(self, contents: Sequence[bytes], labels: Sequence[str], keys: Sequence[str], origin: str):
        super().__init__(labels)
        self.contents = contents
        self.keys = keys
        self.origin = origin

    def encoded(self, i: int) -> bytes:
        return self.contents[i]

    def name(self, i: int) -> str:
        return f"{self.origin} picture {self.keys[i]}"

    def key(self, i: int) -> str:
        return self.keys[i]


class Source(ABC):
    """Where data come from. Keyword-only arguments of `__init__` are the recipe's keys under `data:`.

    Making one reads nothing; `train`, `validation` and `test` do.
    """

    gives: ClassVar[Kind] = "pictures"

    @abstractmethod
    def train(self) -> Table:
        """The examples to learn from; DataError when they cannot be used."""

    @abstractmethod
    def test(self) -> Table | None:
        """The examples to evaluate on, None when the source has none."""

    def validation(self) -> Table | None:
        """The examples to choose by, None when the source sets none apart from those of the test."""
        return None


def existing(path: str, what: str) -> str:
    """`path`, or DataError when nothing is there."""
    if not os.path.exists(path):
        raise DataError(f"{what} {printable(path)}: no such file or folder")
    return path


def guess_source(path: str, wanted: Kind | None = None) -> tuple[str, dict[str, Any]]:
    """Name and options of the source that fits what is at `path`.

    What is not there may be the word `digits`, or the id of a data set on the Hugging Face hub.

    Args:
        wanted: what it should be, where that is known: a file may look like either.

    Raises:
        UsageError: nothing fits.
    """
    from perpetune.data.text_files import guess_texts  # it is a source itself

    lower = path.lower()
    if os.path.exists(path) and (texts := guess_texts(path, sure=wanted == "texts")) is not None:
        return texts
    if os.path.isdir(path):
        if any(os.path.exists(os.path.join(path, f)) for f in ("dataset_dict.json", "dataset_info.json")):
            return "hf", {"path": path}
        parquet = any(f.endswith(".parquet") for f in os.listdir(path))
        return "parquet" if parquet and not list_folder(path)[0] else "folder", {"path": path}
    if lower.endswith((".csv", ".tsv", ".jsonl", ".ndjson")):
        return "manifest", {"path": path}
    if lower.endswith(".parquet"):
        return "parquet", {"path": path}
    if lower == "digits":
        return "digits", {}
    if not os.path.exists(path) and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path):
        return "hf", {"path": path}
    raise UsageError(
        f"{printable(path)}: expected a folder of class folders, a .csv or .jsonl manifest, a .parquet file, "
        "or the id of a Hugging Face data set"
    )

"""What every kind of data looks like from above: labelled pictures by number, opened one at a time."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from perpetune.data.pictures import list_folder, read_header, read_picture
from perpetune.data.text import printable
from perpetune.errors import DataError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image


class Table(ABC):
    """The labelled pictures of one split; only names and row numbers are kept, not pixels.

    A table of another kind of picture overrides `open` and, if `encoded` cannot give bytes, `probe`.

    Args:
        labels: class name of each picture.
        groups: task or domain of each picture, `""` where it is not given; None where there are none at all.
        warnings: one line each for what was left out on the way.
    """

    files = False  #: each picture is a file of its own

    def __init__(self, labels: Sequence[str], groups: Sequence[str] | None = None, warnings: Iterable[str] = ()):
        self.labels = labels
        self.groups = groups
        self.warnings = list(warnings)

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def encoded(self, i: int) -> str | bytes:
        """Picture `i` as Pillow reads it: the path of a file, or the bytes of one."""

    @abstractmethod
    def name(self, i: int) -> str:
        """Picture `i` as messages call it: its path, or file and row."""

    @abstractmethod
    def key(self, i: int) -> str:
        """What identifies picture `i` wherever the data lie; seeded choices depend on it alone."""

    def open(self, i: int) -> Image:
        """Picture `i` in RGB, as a person sees it; DataError naming it when it cannot be read."""
        return read_picture(self.encoded(i), self.name(i))

    def probe(self, i: int) -> None:
        """DataError when the header of picture `i` shows that it cannot be read."""
        read_header(self.encoded(i), self.name(i))

    def size(self, i: int) -> int | None:
        """Bytes that picture `i` takes, None when it is not there."""
        encoded = self.encoded(i)
        if isinstance(encoded, bytes):
            return len(encoded)
        try:
            return os.stat(encoded).st_size
        except (OSError, ValueError):  # ValueError: a path with a NUL
            return None

    def content(self, i: int, limit: int = -1) -> bytes:
        """The first `limit` bytes of picture `i`, all when negative; nothing when it is not there."""
        encoded = self.encoded(i)
        if isinstance(encoded, bytes):
            return encoded if limit < 0 else encoded[:limit]
        try:
            with open(encoded, "rb") as file:
                return file.read(limit)
        except (OSError, ValueError):
            return b""


class FileTable(Table):
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


class MemoryTable(Table):
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

    Making one reads nothing; `train` and `test` do.
    """

    @abstractmethod
    def train(self) -> Table:
        """The pictures to learn from; DataError when they cannot be used."""

    @abstractmethod
    def test(self) -> Table | None:
        """The pictures to evaluate on, None when the source has none."""


def existing(path: str, what: str) -> str:
    """`path`, or DataError when nothing is there."""
    if not os.path.exists(path):
        raise DataError(f"{what} {printable(path)}: no such file or folder")
    return path


def guess_source(path: str) -> tuple[str, dict[str, Any]]:
    """Name and options of the source that fits what is at `path`.

    What is not there may be the word `digits`, or the id of a data set on the Hugging Face hub.

    Raises:
        UsageError: nothing fits.
    """
    lower = path.lower()
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

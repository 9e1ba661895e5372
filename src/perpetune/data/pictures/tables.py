"""Tables of pictures. They open one picture at a time."""

from __future__ import annotations

import hashlib
import os
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from perpetune.data.names import printable
from perpetune.data.pictures.kept import Kept, Mark
from perpetune.data.pictures.read import LARGE, read_header, read_picture
from perpetune.data.sources import Table

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


class PictureTable(Table):
    """Labelled pictures that are opened one at a time. The table keeps names and row numbers, not pixels.

    A subclass for pictures in another form overrides `open` and, if `encoded` cannot give bytes, `probe`.
    """

    gives = "pictures"
    noun = "picture"
    use = "read"
    captioned: ClassVar[bool] = False  #: whether pictures have captions instead of a class

    def __init__(self, labels: Sequence[str], groups: Sequence[str] | None = None, warnings: Iterable[str] = ()):
        super().__init__(labels, groups, warnings)
        self.large: set[int] = set()  # what `check` found to have more than `LARGE` pixels
        self._seals: dict[int, tuple[tuple[int, ...], bytes]] = {}
        self.kept: Kept[Tensor] = Kept()
        self.decoded: Kept[Image] = Kept()

    @abstractmethod
    def encoded(self, i: int) -> str | bytes:
        """Picture `i` in the form that Pillow reads: the path of a file, or the bytes of a file."""

    def captions(self, i: int) -> Sequence[str]:
        """The captions of picture `i`; none if pictures have classes."""
        return ()

    def open(self, i: int) -> Image:
        """Picture `i` in RGB, as a person sees it; DataError, with its name, if it cannot be read."""
        return read_picture(self.encoded(i), self.name(i))

    def open_small(self, i: int, least: int) -> Image:
        """As `open`, but a large JPEG file may be read smaller; see `read_picture`."""
        if type(self).open is not PictureTable.open:  # pictures in another form
            return self.open(i)
        return read_picture(self.encoded(i), self.name(i), least)

    def probe(self, i: int) -> None:
        """Check the header of picture `i`; DataError if the picture cannot be read."""
        read_header(self.encoded(i), self.name(i))

    def check(self, i: int, depth: Literal["decode", "header"]) -> None:
        if depth == "decode":
            self.measured(i, self.open(i))
        else:
            self.probe(i)

    def measured(self, i: int, image: Image) -> None:
        """Note that picture `i` is large, if it is."""
        if image.width * image.height > LARGE:
            self.large.add(i)

    def mark(self, i: int) -> Mark | None:
        """What changes when the file of picture `i` changes; None if it cannot be read."""
        encoded = self.encoded(i)
        if isinstance(encoded, bytes):
            return ()
        try:
            told = os.stat(encoded)
        except (OSError, ValueError):
            return None
        return told.st_size, told.st_mtime_ns, told.st_ctime_ns, told.st_ino, told.st_dev

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

    def seal(self, i: int) -> bytes:
        """A hash of the whole content of picture `i`. A file is read again when its size, times or number have changed.

        Nothing, and no hash, if the file cannot be read.
        """
        known = self._seals.get(i)
        if known is not None and not known[0]:  # bytes in memory do not change
            return known[1]
        encoded, mark = self.encoded(i), tuple[int, ...]()
        if isinstance(encoded, str):
            try:
                told = os.stat(encoded)
            except (OSError, ValueError):
                return b""
            mark = told.st_size, told.st_mtime_ns, told.st_ctime_ns, told.st_ino, told.st_dev
        if known is None or known[0] != mark:
            known = self._seals[i] = mark, hashlib.sha256(self.content(i)).digest()
        return known[1]


class FileTable(PictureTable):
    """Pictures in files.

    Args:
        root: the folder of the files, in the user's spelling, because messages repeat it.
        paths: paths relative to `root`, or absolute paths.
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
    """Small pictures in memory, as the bytes of picture files."""

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

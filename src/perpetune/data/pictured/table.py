"""Tables of texts with pictures, and the examples of a task that come from them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from perpetune.data.names import printable
from perpetune.data.pictures.read import read_header, read_picture
from perpetune.data.texts.examples import Encoded, TextSet
from perpetune.data.texts.tables import TextTable

if TYPE_CHECKING:
    from PIL.Image import Image

    from perpetune.data.pictured.view import PicturedView


class PicturedTable(TextTable):
    """Texts of one split, each with its pictures: paths of files, or bytes out of parquet."""

    gives = "pictured"

    def check(self, i: int, depth: Literal["decode", "header"]) -> None:
        super().check(i, depth)
        for number in range(len(self.rows[i].pictures)):
            self._read(i, number, header=depth == "header")

    def open(self, i: int, number: int) -> Image:
        """Picture `number` of example `i`, in RGB; DataError, with the example's name, if it cannot be read."""
        image: Image = self._read(i, number)
        return image

    def size(self, i: int) -> int | None:
        if self.faults[i]:
            return None
        try:
            return len(super().content(i)) + sum(
                len(p) if isinstance(p, bytes) else os.path.getsize(p) for p in self.rows[i].pictures
            )
        except OSError:
            return None

    def content(self, i: int, limit: int = -1) -> bytes:
        """Prompt, answer and pictures as bytes; for a bad row its key."""
        whole = super().content(i)
        for picture in self.rows[i].pictures:
            if 0 <= limit <= len(whole):
                break
            whole += picture if isinstance(picture, bytes) else _bytes(picture)
        return whole if limit < 0 else whole[:limit]

    def digest(self, i: int) -> bytes:
        """As for texts; the key tells pictures apart, so their files are not read."""
        return repr((self.key(i), self.labels[i], self.size(i))).encode() + super().content(i)

    def _read(self, i: int, number: int, *, header: bool = False) -> Any:
        picture = self.rows[i].pictures[number]
        name = f"picture {number + 1}" if isinstance(picture, bytes) else printable(picture)
        name = f"{self.name(i)}: {name}"
        return (read_header if header else read_picture)(picture, name)


def _bytes(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


@dataclass(frozen=True)
class Shown:
    """One example with its pictures.

    Attributes:
        encoded: its tokens.
        pictures: uint8 `(3, S, S)` each.
    """

    encoded: Encoded
    pictures: tuple[Tensor, ...] = ()


def number_of(pixels: Tensor) -> int:
    """A number, not 0, that only pictures of equal pixels share."""
    digest = hashlib.blake2b(pixels.contiguous().numpy().tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True) or 1


class PicturedSet(TextSet):
    """Texts with pictures of a task. Pictures are never augmented: a text may speak of sides, places and colours."""

    table: PicturedTable
    view: PicturedView

    def questions(self) -> PicturedSet:
        if self.purpose == "test":
            return self
        return PicturedSet(self.table, self.rows, self._classes, self.view, "test")

    def load(self, index: int, seed: int | None) -> Shown:  # type: ignore[override]
        """The tokens and the pixels; DataError, with the example's name, if a picture cannot be read any more."""
        row = self.rows[index]
        count = len(self.table.rows[row].pictures)
        return Shown(super().load(index, seed), tuple(self.view.picture(self.table.open(row, k)) for k in range(count)))

    def _of(self, rows: Sequence[int], classes: Sequence[str]) -> PicturedSet:
        others = PicturedSet(self.table, rows, classes, self.view, self.purpose)
        others._found, others._options = self._found, self._options
        return others

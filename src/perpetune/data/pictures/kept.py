"""What a check has made of pictures, kept for the passes over the data that follow."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T", bound="Tensor | Image")
LIMIT = 2**27
"""Bytes that one table keeps: 890 pictures of 224 pixels, or 43,000 of 32; and as many bytes of pictures as they were
decoded, if a part of them is cut out at random: 178 of 500 x 375."""
Mark = tuple[int, ...]
"""What changes when a file changes; see `PictureTable.mark`."""


class Kept(Generic[T]):
    """Pixels or pictures by key, the newest of them, up to `limit` bytes. Each has the mark of the file that it was
    read from.

    Several threads may put. A copy for another process is empty.
    """

    def __init__(self, limit: int = LIMIT):
        self.limit = limit
        self.bytes = 0
        self._found: dict[Hashable, tuple[Mark, T]] = {}
        self._lock = threading.Lock()

    def put(self, key: Hashable, mark: Mark | None, value: T) -> None:
        if mark is None or _bytes(value) > self.limit:
            return
        with self._lock:
            before = self._found.pop(key, None)
            self.bytes += _bytes(value) - (_bytes(before[1]) if before is not None else 0)
            self._found[key] = mark, value
            while self.bytes > self.limit:  # a dictionary has its oldest entry first
                self.bytes -= _bytes(self._found.pop(next(iter(self._found)))[1])

    def get(self, key: Hashable, mark: Callable[[int], Mark | None], row: int) -> T | None:
        """The value of that key; None if there is none, or if `mark(row)` is no longer what it was."""
        found = self._found.get(key)
        return found[1] if found is not None and mark(row) == found[0] else None

    def __reduce__(self) -> Any:
        return Kept, (self.limit,)


def _bytes(value: Tensor | Image) -> int:
    if isinstance(value, Tensor):
        return value.untyped_storage().nbytes()  # a view keeps all that it is a part of
    return 4 * value.width * value.height  # Pillow's RGB has four bytes a pixel

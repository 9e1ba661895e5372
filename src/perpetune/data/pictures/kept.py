"""Pixels that a check has made of pictures, kept for the passes over the data that follow."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

LIMIT = 2**27
"""Bytes that one table keeps: 890 pictures of 224 pixels, or 43,000 of 32."""
Mark = tuple[int, ...]
"""What changes when a file changes; see `PictureTable.mark`."""


class Kept:
    """Pixels by key, the newest of them, up to `limit` bytes. Each has the mark of the file that it was read from.

    Several threads may put. A copy for another process is empty.
    """

    def __init__(self, limit: int = LIMIT):
        self.limit = limit
        self.bytes = 0
        self._pixels: dict[Hashable, tuple[Mark, Tensor]] = {}
        self._lock = threading.Lock()

    def put(self, key: Hashable, mark: Mark | None, pixels: Tensor) -> None:
        if mark is None or pixels.nbytes > self.limit:
            return
        with self._lock:
            before = self._pixels.pop(key, None)
            self.bytes += pixels.nbytes - (before[1].nbytes if before is not None else 0)
            self._pixels[key] = mark, pixels
            while self.bytes > self.limit:  # a dictionary has its oldest entry first
                self.bytes -= self._pixels.pop(next(iter(self._pixels)))[1].nbytes

    def get(self, key: Hashable, mark: Callable[[int], Mark | None], row: int) -> Tensor | None:
        """The pixels of that key; None if there are none, or if `mark(row)` is no longer what it was."""
        found = self._pixels.get(key)
        return found[1] if found is not None and mark(row) == found[0] else None

    def __reduce__(self) -> Any:
        return Kept, (self.limit,)

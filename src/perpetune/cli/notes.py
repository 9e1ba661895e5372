"""Notes of verbs that show no progress."""

from __future__ import annotations

import sys

from perpetune.runtime import Silent


class Notes(Silent):
    """A `perpetune.runtime.Progress` for verbs that show no progress: notes go to standard error, beside the result."""

    def note(self, message: str) -> None:
        print(f"perpetune: note: {' '.join(message.split())}", file=sys.stderr)

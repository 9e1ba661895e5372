"""Several processes that each hold a part of a frozen model, and how they come together without waiting for ever.

A block of such a model is whole only while all processes send each other their parts of it. But processes rarely do
the same: the last batch is in one of them alone, one has kept features and another has none, the first measures a
drift. If one asks for a part and another does not come, both wait for ever.

So each process says what it needs before it does anything together with the others: a part of a model, or that it has
come to a point where all meet, such as a sum over the processes. The part that the first of them asks for is what all
send next, also those that do not need it. A process that is at such a point goes on when all are there. So code needs
to know nothing of this, if it is right for several processes that hold the whole model each: every process comes to
the same sums in the same order.

A word is a number: that of a part, or one of `MEETS` and `ENDED`. Words are sent by gloo, so no process waits for its
device. `Runtime` calls `meet` before each message to all; without a shared model that does nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch import distributed as dist

from perpetune.errors import PerpetuneError

MEETS = -1
"""The word of a process that has come to a message that all take part in."""
ENDED = -2
"""The word of a process that ends."""


gathered = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13


class Part(Protocol):
    """What a process holds of one part of a model."""

    def send(self) -> None:
        """Send it to all processes, and drop what they send."""


class Meeting:
    """Where the processes come together; each has one (`meeting`), for all models that it shares with others."""

    def __init__(self) -> None:
        self.words = 0
        """How many words this process has said."""
        self.sent = 0
        """How many parts it has sent."""
        self.helped = 0
        """How many of these it did not need itself."""
        self._parts: weakref.WeakValueDictionary[int, Part] = weakref.WeakValueDictionary()
        self._count = 0
        self._group: Any = None
        self._process = 0

    @property
    def open(self) -> bool:
        """Whether this process shares a model with others."""
        return self._group is not None and self._process == os.getpid()  # a loader's process is a copy of this one

    def join(self, parts: Sequence[Part]) -> list[int]:
        """Add the parts of a model that this process holds; all processes call it alike.

        Returns:
            The number of each part, by which `gather` is asked for it. They are the same in all processes.
        """
        if not self.open:
            self._group, self._process = dist.new_group(backend="gloo"), os.getpid()
            atexit.register(self.end)
        self.meet()
        numbers = list(range(self._count, self._count + len(parts)))
        self._count += len(parts)
        self._parts.update(zip(numbers, parts, strict=True))
        return numbers

    def gather(self, number: int, output: Tensor, mine: Tensor, group: Any, async_op: bool = False) -> Any:
        """Fill `output` with what all processes hold of a part, as `torch.distributed.all_gather_single` does.

        Meanwhile this process also sends its share of the parts that others ask for.
        """
        while (next_ := self._next(number)) != number:
            assert next_ is not None  # it is asked for this part itself
            self._help(next_)
        self.sent += 1
        return gathered(output.view(torch.uint8), mine.view(torch.uint8), group=group, async_op=async_op)

    def meet(self) -> None:
        """Wait until all processes are here, and send the others what they need until then.

        Raises:
            PerpetuneError: another process has ended.
        """
        while self.open and (next_ := self._next(MEETS)) is not None:
            self._help(next_)

    def end(self) -> None:
        """Send the others what they need until they end too, or until one finds that this process has ended."""
        with contextlib.suppress(PerpetuneError):  # the process ends anyway, and the others say what has happened
            while self.open and (next_ := self._next(ENDED)) is not None:
                self._help(next_)
        self._group = None

    def _next(self, word: int) -> int | None:
        """Say a word, and hear which part is sent next; None if none is, because no process needs one."""
        said = torch.zeros(self._group.size(), dtype=torch.int64)
        self.words += 1
        try:
            gathered(said, torch.tensor([word]), group=self._group)
        except RuntimeError as error:
            self._group = None
            raise PerpetuneError(f"another process of this run does not answer any more ({_first(error)})") from error
        words = said.tolist()
        asked = [one for one in words if one >= 0]
        if asked:
            return int(asked[0])
        if word != ENDED and ENDED in words:
            self._group = None
            raise PerpetuneError(
                f"process {words.index(ENDED)} of {len(words)} has ended, and the others cannot go on without it: look "
                "at what it said"
            )
        return None

    def _help(self, number: int) -> None:
        """Send a part that others need."""
        part = self._parts.get(number)
        if part is None:
            raise PerpetuneError("another process uses a model that this process has given up: keep the learner here")
        part.send()
        self.sent, self.helped = self.sent + 1, self.helped + 1


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


meeting = Meeting()
"""Where this process meets the others."""

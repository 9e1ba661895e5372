"""Small batches: requests that come at the same time are answered in one pass of the model."""

from __future__ import annotations

import itertools
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from perpetune.answers import Prediction
from perpetune.serve.models import Models, Served


@dataclass(frozen=True)
class Answered:
    """The answer to one request.

    Attributes:
        served: what answered all of its pictures.
        classes: for each picture names with probabilities, the likeliest first.
    """

    served: Served
    classes: list[list[tuple[str, float]]]


@dataclass(eq=False)
class Asked:
    """The pictures of one request. One state answers all of them.

    Attributes:
        pixels: uint8 `(N, 3, S, S)`.
        top: how many names are wanted for each picture.
        names: the classes to choose among; None means the learned classes.
        answer: gets the answer, or what went wrong. If it is cancelled in time, nothing is computed.
    """

    pixels: Tensor
    top: int
    names: tuple[str, ...] | None
    answer: Future[Answered] = field(default_factory=Future)


class Batcher:
    """A thread that answers requests, several in one pass.

    Args:
        models: what answers.
        most: the number of pictures at which a batch is full. The pictures of a request are never cut apart here.
        wait: seconds that a batch that is not full waits for more.
        told: is called with the number of pictures and the seconds of each pass.
    """

    def __init__(self, models: Models, most: int, wait: float, told: Callable[[int, float], None] = lambda n, s: None):
        self.models, self.most, self.wait, self.told = models, most, wait, told
        self._queue: queue.SimpleQueue[Asked | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Answer what was put in before, then end."""
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def put(self, asked: Asked) -> Future[Answered]:
        """Let a request be answered; the result comes into its `answer`."""
        self._queue.put(asked)
        return asked.answer

    def _work(self) -> None:
        more = True
        while more:
            first = self._queue.get()
            if first is None:
                return
            batch, more = self._gathered(first)
            self._answer([asked for asked in batch if asked.answer.set_running_or_notify_cancel()])

    def _gathered(self, first: Asked) -> tuple[list[Asked], bool]:
        """The first request with those that come soon after it; and whether more may come at all."""
        batch, count, until = [first], len(first.pixels), time.monotonic() + self.wait
        while count < self.most:
            try:
                asked = self._queue.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if asked is None:
                return batch, False
            batch.append(asked)
            count += len(asked.pixels)
        return batch, True

    def _answer(self, batch: Sequence[Asked]) -> None:
        groups: dict[tuple[str, ...] | None, list[Asked]] = {}
        for asked in batch:
            groups.setdefault(asked.names, []).append(asked)
        for names, group in groups.items():
            began = time.perf_counter()
            try:
                with self.models.asked() as served:
                    pixels = torch.cat([asked.pixels for asked in group])
                    top = max(asked.top for asked in group)
                    found = served.trained.predict(pixels, top=top, names=names)
            except Exception as error:  # noqa: BLE001  whoever asked is told, and the next batch is answered
                for asked in group:
                    asked.answer.set_exception(error)
                continue
            self.told(len(pixels), time.perf_counter() - began)
            rest = iter(found)
            for asked in group:
                asked.answer.set_result(Answered(served, _first(rest, len(asked.pixels), asked.top)))


def _first(predictions: Iterator[Prediction], count: int, top: int) -> list[list[tuple[str, float]]]:
    """The classes of the next `count` predictions. A probability that is no number, as of a head that knows no example,
    becomes 0."""
    found = [one.classes[:top] for one in itertools.islice(predictions, count)]
    return [[(name, 0.0 if math.isnan(value) else value) for name, value in classes] for classes in found]

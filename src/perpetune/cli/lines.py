"""What long verbs write with `--json`: one JSON object a line on standard output, as things happen.

`perpetune.cli.events` has the schema, and docs/json.md tells users of it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from perpetune.cli.jobs import Event, Job

EVERY = 1.0  # seconds between two lines about steps


class Lines:
    """Writes events. The last line of a verb is `done`; or `failed`, if it ended with an error.

    Args:
        stream: where they go; None is standard output as it is now.
        mute: write nothing. If several processes learn together, only the first one writes.
    """

    def __init__(self, stream: TextIO | None = None, mute: bool = False):
        self.stream, self.mute = stream or sys.stdout, mute

    def emit(self, event: str, **facts: Any) -> None:
        """Write one event, so that whoever reads has it at once."""
        if self.mute:
            return
        content = {"event": event, **facts}
        text = json.dumps(content, ensure_ascii=False)
        try:
            text.encode(self.stream.encoding or "utf-8")
        except UnicodeEncodeError:
            text = json.dumps(content)
        self.stream.write(f"{text}\n")  # at once, for several threads write
        self.stream.flush()


_open: Lines | None = None


def lines(json: bool) -> Lines | None:
    """The writer of this command if it writes lines, else None.

    From now on a failure of the command is a line too, and what libraries print goes to standard error, not between the
    lines. `perpetune.cli.call` puts standard output back.
    """
    global _open
    _open = None
    if json:
        _open = Lines(mute=os.environ.get("RANK", "0") != "0")
        sys.stdout = sys.stderr
    return _open


def close() -> None:
    """Forget the writer of the last command: a new command begins."""
    global _open
    _open = None


def leave() -> None:
    """Send what libraries print while this process ends to standard error, if the command has written lines."""
    if _open is not None:
        sys.stdout = sys.stderr


def failed(message: str, code: int) -> None:
    """Write that the command failed, if it writes lines and its reader still reads."""
    if _open is not None:
        _open.emit("failed", message=message, code=code)


class LineView:
    """A `perpetune.runtime.Progress` that writes events. Steps are written once a second at most.

    Args:
        folder: the state folder; its report is written after each task, before the event says so.
    """

    def __init__(self, out: Lines, folder: Path | None = None):
        self.out, self.folder = out, folder
        self._phase, self._steps, self._images = "", 0, 0
        self._began = self._last = time.monotonic()
        self._loss: float | None = None

    def note(self, message: str) -> None:
        self.out.emit("note", message=" ".join(message.split()))

    def task(self, index: int, name: str, classes: int, examples: int) -> None:
        self.out.emit("task", index=index, name=name, classes=classes, examples=examples)

    def phase(self, phase: str, steps: int, epochs: int, done: int) -> None:
        self._phase, self._steps, self._images, self._loss = phase, steps, 0, None
        self._began = self._last = time.monotonic()
        self.out.emit("phase", phase=phase, steps=steps, epochs=epochs, done=done)

    def step(self, done: int, epoch: int, loss: float | None, images: int) -> None:
        self._images += images
        self._loss = self._loss if loss is None else loss
        now = time.monotonic()
        if now - self._last < EVERY and done < self._steps:
            return
        self._last = now
        speed = round(self._images / max(1e-9, now - self._began), 2)
        self.out.emit(
            "step", phase=self._phase, done=done, steps=self._steps, epoch=epoch, loss=self._loss, examples_per_s=speed
        )

    def results(self, results: dict[str, Any]) -> None:
        from perpetune.report import write_report

        if self.folder is not None:
            write_report(results, self.folder)
        self.out.emit("learned", **learned(results))


class LineRuns:
    """Writes the events of several runs; each names its run."""

    def __init__(self, out: Lines, complete: Sequence[tuple[Job, dict[str, Any]]]):
        self.out = out
        for job, results in complete:
            self._ended(job, results)

    def tell(self, job: Job, event: Event) -> None:
        """Write an event of a run; `perpetune.cli.jobs` has the events."""
        kind = event["event"]
        if kind == "task":
            self.out.emit("learned", run=job.name, **learned(event["results"]))
        elif kind == "done":
            self._ended(job, event["results"])
        elif kind == "failed":
            self.out.emit("run", run=job.name, folder=str(job.folder), message=event["message"])
        else:
            self.out.emit("note", run=job.name, message=event["message"])

    def _ended(self, job: Job, results: dict[str, Any]) -> None:
        self.out.emit("run", run=job.name, folder=str(job.folder), **_figures(results))


def learned(results: dict[str, Any]) -> dict[str, Any]:
    """The figures of a results document after its last task, for the event `learned`."""
    task, cell = results["tasks"][-1], results["cells"][-1][-1]
    own = cell["correct"] / cell["total"] if cell and cell["total"] else None
    return {"index": task["index"], "name": task["name"], "accuracy": own, **_figures(results)}


def _figures(results: dict[str, Any]) -> dict[str, Any]:
    return {name: results["metrics"][name] for name in ("final_accuracy", "average_accuracy", "forgetting")}

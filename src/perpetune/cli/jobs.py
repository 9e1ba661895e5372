"""Several runs, each in its own process and a few at a time. They can be stopped, and the same call continues them.

The parent process gives each child one run, as a line of JSON on the child's standard input. The child reports events
on its standard output, one line of JSON for each event. Each child has its own session, so that Ctrl-C reaches it only
once, through the parent. The parent keeps the child's standard input open as long as the parent lives. When standard
input ends, the child knows that its parent has ended, and stops with a checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from perpetune.cli.failure import unforeseen
from perpetune.errors import Interrupted, PerpetuneError, UsageError
from perpetune.stopping import stopping_signals

if TYPE_CHECKING:
    from perpetune.recipe import Recipe

CHILD = (sys.executable, "-m", "perpetune.cli.jobs")
Event = dict[str, Any]
Tell = Callable[["Job", Event], None]


@dataclass
class Job:
    """One run.

    Attributes:
        folder: the run's state folder. It may already hold a part of the run.
        device: the device on which the run continues, if it is another one than the run began on.
        failure: the reason why the run failed; None if it did not fail.
    """

    recipe: Recipe
    folder: Path
    device: str | None = None
    failure: str | None = None

    @property
    def name(self) -> str:
        return self.folder.name


@dataclass(eq=False)
class _Running:
    """A child process. `passed` is the number of signals that the parent has sent to it; `ended` is true when the child
    has reported the end of its run."""

    job: Job
    process: subprocess.Popen[str]
    passed: int = 0
    ended: bool = False


@dataclass
class _Stop:
    """The signals that this process received. It sends them on to the running children."""

    running: list[_Running] = field(default_factory=list)
    signals: list[int] = field(default_factory=list)

    def ask(self, signum: int, frame: Any) -> None:
        self.signals.append(signum)
        self.pass_on()

    def pass_on(self) -> None:
        for child in self.running:
            for signum in self.signals[child.passed :]:
                child.passed += 1
                _send(child.process, signum)


def plan(recipes: Sequence[Recipe], seeds: Sequence[int] | None, folder: Path, device: str | None) -> list[Job]:
    """Make a job for each recipe and each seed. The state folder of a job is `folder/NAME-sSEED`.

    Args:
        seeds: None takes the seed in each recipe.

    Raises:
        UsageError: two recipes have the same name, or a state folder in `folder` belongs to another recipe.
    """
    from perpetune.state import State

    names = [recipe.name for recipe in recipes]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise UsageError(f"two recipes have the name {twice!r} and would use the same folder: rename one of them")
    jobs = []
    for recipe in recipes:
        for seed in seeds if seeds is not None else [recipe.seed]:
            path = folder / f"{recipe.name}-s{seed}"
            job = Job(recipe.model_copy(update={"seed": seed}).anchored(), path, device)
            if (path / "recipe.yaml").is_file():
                other = _differs(State(path).recipe, job.recipe)
                if other:
                    raise UsageError(
                        f"{path} belongs to another recipe ({', '.join(other)} differ{'s' * (len(other) == 1)}): "
                        "choose another --out, or delete this folder"
                    )
            jobs.append(job)
    return jobs


def _differs(one: Recipe, other: Recipe) -> list[str]:
    """The sections whose difference changes what the two recipes learn. Device and threads do not change that."""
    a, b = one.model_dump(mode="json"), other.model_dump(mode="json")
    for content in (a, b):
        content["run"] = content["run"]["precision"]
        del content["description"]
    return [key for key in a if a[key] != b[key]]


def finished(job: Job) -> dict[str, Any] | None:
    """The results of a complete run; None if the run is not complete."""
    from perpetune.results import read_results
    from perpetune.state import State

    if not (job.folder / "recipe.yaml").is_file():
        return None
    results = read_results(State(job.folder))
    return results if results["complete"] and results["tasks"] else None


def run_all(jobs: Sequence[Job], at_once: int, tell: Tell) -> None:
    """Finish all runs, `at_once` of them at a time. If a run fails, its job's `failure` says why.

    Args:
        tell: is called with each event of each run.

    Raises:
        Interrupted: this process received a signal. The runs have stopped, each with a checkpoint.
    """
    waiting, events = list(jobs), queue.SimpleQueue[tuple[_Running, Event | None]]()
    with _signals() as stop:
        try:
            while waiting or stop.running:
                while waiting and len(stop.running) < at_once and not stop.signals:
                    stop.running.append(_start(waiting.pop(0), events))
                    stop.pass_on()  # signals that came while the child was starting
                if not stop.running:
                    break
                child, event = events.get()
                if event is None:
                    _let_go(child)
                    code = child.process.wait()
                    stop.running.remove(child)
                    if child.ended:
                        continue
                    event = {"event": "failed", "message": f"its process ended with {_named(code)}"}
                child.ended = event["event"] in ("done", "failed")
                if event["event"] == "failed":
                    if stop.signals:  # we asked the child to stop, so this is no failure
                        continue
                    child.job.failure = event["message"]
                tell(child.job, event)
        finally:
            for child in stop.running:  # after an error in this process, the children stop by themselves
                _let_go(child)
        if stop.signals:
            raise Interrupted(f"stopped by {signal.Signals(stop.signals[0]).name}", stop.signals[0])


@contextlib.contextmanager
def _signals() -> Iterator[_Stop]:
    """While this is open, a signal that would stop this process stops its children instead."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop.ask) for number in stopping_signals()}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _send(process: subprocess.Popen[str], signum: int) -> None:
    if os.name == "posix":
        process.send_signal(signum)
    else:
        process.terminate()


def _start(job: Job, events: queue.SimpleQueue[tuple[_Running, Event | None]]) -> _Running:
    process = subprocess.Popen(
        CHILD,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", start_new_session=True,
    )  # fmt: skip
    child = _Running(job, process)
    assert process.stdin is not None
    request = {"recipe": job.recipe.model_dump(mode="json"), "folder": str(job.folder), "device": job.device}
    with contextlib.suppress(BrokenPipeError):  # the child may have ended; `_listen` reports that
        print(json.dumps(request), file=process.stdin, flush=True)
    threading.Thread(target=_listen, args=(child, events), daemon=True).start()
    return child


def _let_go(child: _Running) -> None:
    """Close the child's standard input, which tells the child that it has no parent any more."""
    assert child.process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        child.process.stdin.close()


def _listen(child: _Running, events: queue.SimpleQueue[tuple[_Running, Event | None]]) -> None:
    """Put each event of a child into the queue, and None when the child has ended."""
    assert child.process.stdout is not None
    try:
        with child.process.stdout as lines:
            for line in lines:
                events.put((child, json.loads(line)))
    except ValueError:
        pass  # the child died in the middle of a line; its exit code will be reported
    finally:
        events.put((child, None))


def _named(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


# -- the child ----------------------------------------------------------------------------------------------


def main() -> int:
    """Finish the run that standard input describes, and return the exit code."""
    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        if hasattr(signal, name):  # as long as there is nothing to save
            signal.signal(getattr(signal, name), lambda signum, frame: sys.exit(128 + signum))
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # the text that libraries print must not go between the events
    try:
        return _answer(sys.stdin.readline(), events)
    except BrokenPipeError:  # the parent has ended; everything learned so far is stored
        os.dup2(os.open(os.devnull, os.O_WRONLY), events.fileno())  # takes the events that are not written yet
        return 1


def _answer(line: str, events: TextIO) -> int:
    """Finish the run that `line` describes, write its events to `events`, and return the exit code."""

    def emit(event: str, **facts: Any) -> None:
        print(json.dumps({"event": event, **facts}), file=events, flush=True)

    def warn(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        emit("note", message=" ".join(str(message).split()))

    warnings.showwarning = warn
    if not line.endswith("\n"):  # the parent ended while it was writing the line
        return 1
    request = json.loads(line)
    threading.Thread(target=_stop_without_parent, daemon=True).start()
    try:
        emit("done", results=_learn(request["recipe"], Path(request["folder"]), request["device"], _Lines(emit)))
    except PerpetuneError as error:
        if os.environ.get("PERPETUNE_DEBUG"):
            raise
        emit("failed", message=" ".join(str(error).split()))
        return error.exit_code
    except BrokenPipeError:
        raise
    except OSError as error:
        emit("failed", message=f"{error.filename or 'the system'}: {error.strerror or error}")
        return 1
    except Exception as error:
        if os.environ.get("PERPETUNE_DEBUG"):
            raise
        emit("failed", message=unforeseen(error))
        return 1
    return 0


def _stop_without_parent() -> None:
    """Wait until standard input ends, then stop this process with a signal."""
    os.read(0, 1)  # not `sys.stdin`, whose lock a thread must not hold at exit
    signal.raise_signal(signal.SIGTERM)


def _learn(content: dict[str, Any], folder: Path, device: str | None, view: _Lines) -> dict[str, Any]:
    from perpetune.learner import Learner
    from perpetune.recipe import make_recipe
    from perpetune.report import write_report

    if (folder / "recipe.yaml").is_file():
        results = Learner.load(folder, device=device, progress=view).resume()
    else:
        results = Learner(make_recipe(content), folder, progress=view).run()
    write_report(results, folder)
    return results


class _Lines:
    """A `perpetune.runtime.Progress` that reports each learned task to the parent."""

    def __init__(self, emit: Callable[..., None]):
        self.emit = emit

    def note(self, message: str) -> None:
        self.emit("note", message=message)

    def results(self, results: dict[str, Any]) -> None:
        self.emit("task", results=results)

    def task(self, index: int, name: str, classes: int, examples: int) -> None:
        pass

    def phase(self, phase: str, steps: int, epochs: int, done: int) -> None:
        pass

    def step(self, done: int, epoch: int, loss: float | None, images: int) -> None:
        pass


if __name__ == "__main__":
    sys.exit(main())

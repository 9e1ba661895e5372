"""Several runs, each in a process of its own and some at a time, that can be stopped and begun again.

The parent hands each child a run, a line of JSON on standard input; the child tells of it on standard output, a line
for each event. Children are in sessions of their own, so that Ctrl-C reaches them once, from the parent. The parent
keeps their standard input open as long as it lives: where that ends, it is gone, and they stop with a checkpoint.
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

from perpetune.errors import Interrupted, PerpetuneError, UsageError, out_of_memory

if TYPE_CHECKING:
    from perpetune.recipe import Recipe

CHILD = (sys.executable, "-m", "perpetune.cli.jobs")
Event = dict[str, Any]
Tell = Callable[["Job", Event], None]


@dataclass
class Job:
    """One run.

    Attributes:
        folder: its state folder, which may hold a part of it.
        device: where to go on, when it differs from where it began.
        failure: why it did not come to its end.
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
    """A child. `told` counts the signals passed on to it; `ended` is whether it has said how its run came out."""

    job: Job
    process: subprocess.Popen[str]
    told: int = 0
    ended: bool = False


@dataclass
class _Stop:
    """The signals that came, passed on to whoever runs."""

    running: list[_Running] = field(default_factory=list)
    signals: list[int] = field(default_factory=list)

    def ask(self, signum: int, frame: Any) -> None:
        self.signals.append(signum)
        self.pass_on()

    def pass_on(self) -> None:
        for child in self.running:
            for signum in self.signals[child.told :]:
                child.told += 1
                _send(child.process, signum)


def plan(recipes: Sequence[Recipe], seeds: Sequence[int] | None, folder: Path, device: str | None) -> list[Job]:
    """A run of each recipe with each seed (with its own, where `seeds` is None), in `folder/NAME-sSEED`.

    Raises:
        UsageError: two recipes have one name, or a state folder there belongs to another recipe.
    """
    from perpetune.state import State

    names = [recipe.name for recipe in recipes]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise UsageError(f"two recipes are called {twice!r}, and their folders would be the same: rename one")
    jobs = []
    for recipe in recipes:
        for seed in seeds if seeds is not None else [recipe.seed]:
            path = folder / f"{recipe.name}-s{seed}"
            job = Job(recipe.model_copy(update={"seed": seed}).anchored(), path, device)
            if (path / "recipe.yaml").is_file():
                other = _differs(State(path).recipe, job.recipe)
                if other:
                    raise UsageError(
                        f"{path} was begun with another recipe ({', '.join(other)} differ{'s' * (len(other) == 1)}): "
                        "choose another --out, or delete that folder"
                    )
            jobs.append(job)
    return jobs


def _differs(one: Recipe, other: Recipe) -> list[str]:
    """The sections in which two recipes learn something else; where a run happens is none of them."""
    a, b = one.model_dump(mode="json"), other.model_dump(mode="json")
    for content in (a, b):
        content["run"] = content["run"]["precision"]
        del content["description"]
    return [key for key in a if a[key] != b[key]]


def finished(job: Job) -> dict[str, Any] | None:
    """The results of a run that is complete; None where something is left to do."""
    from perpetune.results import read_results
    from perpetune.state import State

    if not (job.folder / "recipe.yaml").is_file():
        return None
    results = read_results(State(job.folder))
    return results if results["complete"] and results["tasks"] else None


def run_all(jobs: Sequence[Job], at_once: int, tell: Tell) -> None:
    """Bring the runs to their end, `at_once` at a time; why one failed is its `failure`.

    Args:
        tell: takes what the runs say of themselves.

    Raises:
        Interrupted: a signal came; the runs have stopped, each with a checkpoint.
    """
    waiting, events = list(jobs), queue.SimpleQueue[tuple[_Running, Event | None]]()
    with _signals() as stop:
        try:
            while waiting or stop.running:
                while waiting and len(stop.running) < at_once and not stop.signals:
                    stop.running.append(_start(waiting.pop(0), events))
                    stop.pass_on()  # what came while the child was begun
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
                    if stop.signals:  # as it was asked to
                        continue
                    child.job.failure = event["message"]
                tell(child.job, event)
        finally:
            for child in stop.running:  # after an error here they stop by themselves
                _let_go(child)
        if stop.signals:
            raise Interrupted(f"stopped by {signal.Signals(stop.signals[0]).name}", stop.signals[0])


@contextlib.contextmanager
def _signals() -> Iterator[_Stop]:
    """Signals that ask for a stop stop the children instead of this process."""
    from perpetune.learner import stopping_signals

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
    asked = {"recipe": job.recipe.model_dump(mode="json"), "folder": str(job.folder), "device": job.device}
    with contextlib.suppress(BrokenPipeError):  # it may be gone; its end tells of that
        print(json.dumps(asked), file=process.stdin, flush=True)
    threading.Thread(target=_listen, args=(child, events), daemon=True).start()
    return child


def _let_go(child: _Running) -> None:
    """Close what tells the child that its parent is there."""
    assert child.process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        child.process.stdin.close()


def _listen(child: _Running, events: queue.SimpleQueue[tuple[_Running, Event | None]]) -> None:
    """Pass on what a child says, and None once it has gone."""
    assert child.process.stdout is not None
    try:
        with child.process.stdout as lines:
            for line in lines:
                events.put((child, json.loads(line)))
    except ValueError:
        pass  # it died inside a line, and how it ended is what is told
    finally:
        events.put((child, None))


def _named(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


# -- the child ----------------------------------------------------------------------------------------------


def main() -> int:
    """Bring the run on standard input to its end."""
    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        if hasattr(signal, name):  # until there is something to save
            signal.signal(getattr(signal, name), lambda signum, frame: sys.exit(128 + signum))
    said = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no event
    try:
        return _answer(sys.stdin.readline(), said)
    except BrokenPipeError:  # the parent has gone; what was learned is stored
        os.dup2(os.open(os.devnull, os.O_WRONLY), said.fileno())  # where what is not written yet goes
        return 1


def _answer(line: str, said: TextIO) -> int:
    """Bring the run that `line` asks for to its end, telling of it to `said`; the exit code."""

    def emit(event: str, **facts: Any) -> None:
        print(json.dumps({"event": event, **facts}), file=said, flush=True)

    def warn(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        emit("note", message=" ".join(str(message).split()))

    warnings.showwarning = warn
    if not line.endswith("\n"):  # the parent went while it asked
        return 1
    asked = json.loads(line)
    threading.Thread(target=_stop_without_parent, daemon=True).start()
    try:
        emit("done", results=_learn(asked["recipe"], Path(asked["folder"]), asked["device"], _Lines(emit)))
    except PerpetuneError as error:
        if os.environ.get("PERPETUNE_DEBUG"):
            raise
        emit("failed", message=" ".join(str(error).split()))
        return error.exit_code
    except RuntimeError as error:
        if os.environ.get("PERPETUNE_DEBUG") or not out_of_memory(error):
            raise
        emit("failed", message=out_of_memory(error))
        return 1
    except BrokenPipeError:
        raise
    except OSError as error:
        emit("failed", message=f"{error.filename or 'the system'}: {error.strerror or error}")
        return 1
    return 0


def _stop_without_parent() -> None:
    """Ask this process to stop, as a signal does, once standard input ends."""
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
    """A `perpetune.runtime.Progress` that tells the parent of each task learned."""

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

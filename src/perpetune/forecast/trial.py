"""Learn some examples of the first tasks, by the code that a run has, and measure it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from perpetune.forecast.sample import Sample, Sizes
from perpetune.kept import FOLDER, NAME
from perpetune.learner import Learner
from perpetune.methods.base import Method
from perpetune.recipe import Recipe
from perpetune.runtime import Silent
from perpetune.step import Step
from perpetune.tasks import Task

PARTS = ("prepare", "learn", "new", "earlier", "drift", "oracle", "rest", "commit", "report", "other")
"""The parts of a task's time, whose sum it is. `rest` is what else its evaluation takes, such as exams; `other` is what
no clock inside the task sees."""
INSIDE = ("statistics", "protect")
"""Parts that lie inside `learn`."""
PAGES = ("report.html", "report.md", "report.json")


@dataclass(frozen=True)
class Counts:
    """What the cost of a task grows with.

    Attributes:
        index: the number of the task, from 0.
        checked: the examples that are looked at before it begins.
        train: those that it learns from; under a method that keeps old data those of all tasks so far.
        test: its test examples.
        others: how many other tasks are asked after it, and `asked` their test examples together.
        ahead: test examples of tasks that are asked before they are learned.
        seen: the training examples on which an oracle is solved after it.
        passes: the epochs of the task where the recipe lists them task by task, else 1.
    """

    index: int
    checked: int
    train: int
    test: int
    others: int
    asked: int
    ahead: int = 0
    seen: int = 0
    passes: float = 1.0


@dataclass
class Measured:
    """One task of a trial: its counts, the seconds of each part, and what it left on the disk.

    Attributes:
        seconds: by the clock of the trial, which may be that of the CPU.
        wall: all of it by the clock on the wall.
        phases: of each pass of training its optimizer steps and its epochs.
        own: bytes of the task's folder.
        needs: bytes that the task would need alone.
        alone, pruned: bytes that only a rollback to the task needs, and bytes of its folder without them; None for the
            last task of a trial.
        kept: how many sets of test features lie in the state after it, and their bytes together.
        pages: bytes of the report after it.
        tensors: bytes of all that the method holds beside the frozen model.
    """

    counts: Counts
    seconds: dict[str, float]
    wall: float
    phases: list[tuple[int, int]]
    own: int
    needs: int
    kept: tuple[int, int]
    pages: int
    tensors: int
    peak: int | None
    alone: int | None = None
    pruned: int | None = None


@dataclass
class Trial:
    """What a trial measured.

    Attributes:
        full: the sizes of all tasks before they were cut, by index.
        bytes: of the state folder after it, without what lies in `Measured`; and `all` of it.
    """

    tasks: list[Measured]
    full: dict[int, Sizes]
    bytes: int
    all: int

    @property
    def seconds(self) -> float:
        return sum(sum(task.seconds.values()) for task in self.tasks)


class Watch(Silent):
    """Counts the steps of passes of training, and writes the report after each task, as the verbs do."""

    def __init__(self) -> None:
        self.phases: list[tuple[int, int]] = []
        self.folder: Path | None = None
        self._open = (0, 0)

    def task(self, index: int, name: str, classes: int, examples: int) -> None:
        self.phases = []

    def phase(self, phase: str, steps: int, epochs: int, done: int) -> None:
        self._open = steps, epochs

    def step(self, done: int, epoch: int, loss: float | None, images: int) -> None:
        if loss is not None and done == self._open[0]:  # a pass without a loss trains nothing
            self.phases.append(self._open)

    def results(self, results: dict[str, Any]) -> None:
        from perpetune.report import write_report

        if self.folder is not None:
            write_report(results, self.folder)


def run_trial(
    learner: Learner, watch: Watch, folder: Path, sample: Sample, tasks: int, given: Mapping[str, Any]
) -> Trial:
    """Learn the first `tasks` tasks that the learner has not learned, each with what `sample` leaves of it.

    Args:
        folder: a copy of the learner's state, or a place where nothing is; it is changed.
        given: arguments of `Learner.steps`.
    """
    learner.rehearse(folder, sample)
    watch.folder = folder
    clock, found = learner.runtime.clock, list[Measured]()
    first = len(learner.state.committed)
    began, wall = clock(), time.perf_counter()
    for step in islice(learner.steps(**given), tasks):
        learner.learn_step(step)
        seconds, passed = clock() - began, time.perf_counter() - wall
        found.append(_measured(learner, watch, step, seconds, passed))
        began, wall = clock(), time.perf_counter()
    everything = _bytes(folder)
    committed = learner.state.committed
    rest = everything - sum(task.own() for task in committed) - found[-1].kept[1] - found[-1].pages
    for measured, task, after in zip(found, committed[first:-1], committed[first + 1 :], strict=False):
        measured.alone = task.alone(after)
    with learner.state.writing():
        learner.state.prune(1)
    for measured, task in zip(found[:-1], learner.state.committed[first:], strict=False):
        measured.pruned = task.own()
    return Trial(found, dict(sample.full), rest, everything)


def _measured(learner: Learner, watch: Watch, step: Step, seconds: float, wall: float) -> Measured:
    state = learner.state
    committed = state.committed[-1]
    timings = committed.parsed("timings.json")
    ended = next(e for e in reversed(state.journal()) if e["event"] == "task timed")
    parts = {name: float(timings.get(f"{name}_s", 0.0)) for name in ("prepare", "learn", "new", "earlier", "drift")}
    parts["oracle"] = float(timings.get("oracle_s", 0.0))
    parts["rest"] = timings["evaluate_s"] - sum(parts[name] for name in ("new", "earlier", "drift", "oracle"))
    parts |= {"commit": ended["commit_s"], "report": ended["report_s"]}
    parts["other"] = seconds - sum(parts.values())
    inside = {name: float(timings[f"{name}_s"]) for name in INSIDE}
    kept = [path.stat().st_size for path in (state.folder / FOLDER).glob("*") if NAME.fullmatch(path.name)]
    pages = [state.folder / name for name in PAGES]
    return Measured(
        counts_of(step, learner.recipe),
        {name: max(0.0, value) for name, value in parts.items()} | {f"in {k}": v for k, v in inside.items()},
        wall,
        list(watch.phases),
        committed.own(),
        committed.needs(),
        (len(kept), sum(kept)),
        sum(path.stat().st_size for path in pages if path.exists()),
        held_by(learner.method),
        timings["peak_memory_bytes"],
    )


def held_by(method: Method) -> int:
    """The bytes of all tensors of a method, those of sets at rest too, which are in none of its modules."""
    sizes = {tensor.data_ptr(): tensor.nbytes for tensor in [*method.parameters(), *method.buffers()]}
    for tensor in (t for resting in method.resting().values() for t in resting.tensors().values()):
        sizes.setdefault(tensor.untyped_storage().data_ptr(), tensor.nbytes)  # it may be a part of a buffer
    return sum(sizes.values())


def passes_of(recipe: Recipe, index: int) -> float:
    """The epochs of a task where the recipe lists them task by task; 1 where all tasks have the same."""
    return 1.0 if isinstance(recipe.train.epochs, int) else float(recipe.train.epochs_of(index))


def counts_of(step: Step, recipe: Recipe) -> Counts:
    """What the cost of a step grows with."""
    task = step.task
    checked = sum(len(part) for part in (task.train, task.validation, task.test) if part is not None)
    train = len(task.train) + sum(len(earlier.train) for earlier in task.earlier or ())
    asked = [_tests(other) for other in step.others]
    return Counts(
        task.index,
        checked,
        train,
        _tests(task),
        sum(count > 0 for count in asked),
        sum(asked),
        sum(map(_tests, step.ahead)),
        sum(len(seen.train) for seen in step.seen),
        passes_of(recipe, task.index),
    )


def _tests(task: Task) -> int:
    return len(task.test) if task.test is not None else 0


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

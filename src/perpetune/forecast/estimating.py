"""Estimate a run or an update from a few tasks that are learned on a few examples, in a folder that is thrown away."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from perpetune.errors import DataError, StateError, UsageError
from perpetune.forecast.extrapolate import Costs, bytes_each, disk, kept_bytes, planned, steps_of
from perpetune.forecast.sample import Sample, Sizes
from perpetune.forecast.trial import INSIDE, PARTS, Counts, Trial, Watch, run_trial
from perpetune.learner import Learner
from perpetune.recipe import Recipe, load_recipe, make_recipe, packaged
from perpetune.sequence import Data
from perpetune.state import State
from perpetune.tally import PROBE, SAMPLE
from perpetune.tasks import Task

TASKS = 3
"""Tasks of a stream that are tried. The first one may be learned in another way than later ones, and two later ones
show what grows."""
BUDGET = 6.0
"""Seconds that the trials may take where they are short: more examples measure better."""
SPREAD = {"seconds": 0.25, "memory": 0.25, "bytes": 0.1}
"""How far from the estimate the truth may be, as a share of it: the least that is said."""


def estimate(
    recipe: Recipe | dict[str, Any] | str | Path,
    data: Data | None = None,
    *,
    holdout: float = 0.2,
    options: Mapping[str, Any] | None = None,
    device: str | None = None,
    spent: tuple[float, float] = (0.0, 0.0),
) -> dict[str, Any]:
    """Say what a run or an update will take. Some examples of its first tasks are learned, up to three times, by the
    code that a run has. The state that this makes is thrown away, and nothing else is written.

    Args:
        recipe: a recipe as `Learner` takes it, for its whole stream; or a state folder, whose next update is meant.
        data: the data of one update, as `Learner.learn` takes it. With a recipe it is the first update of a new state.
        holdout: as in `Learner.learn`.
        options: as in `Learner.learn`.
        device: where to run; None takes the recipe's device.
        spent: seconds on the clock and of the CPU that this process has taken before, and that a run takes too.

    Returns:
        The document that docs/estimate.md describes.

    Raises:
        UsageError: the recipe or the folder cannot be used, there are no data, or several processes were started.
        DataError: the data cannot be used.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("an estimate runs in one process: start it without a launcher")
    if isinstance(data, Task):
        raise UsageError("an estimate reads some of the data: give a path, a data section or a source, not a task")
    began = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory(prefix="perpetune-estimate-") as place, _named(Path(place), str(recipe)):
        watch = Watch()
        learner = _learner(recipe, data, device, Path(place), watch)
        given = {} if data is None else {"data": data, "holdout": holdout, "options": options}
        start = time.perf_counter() - began[0] + spent[0], time.process_time() - began[1] + spent[1]
        on_cpu = learner.runtime.device.type == "cpu" and not learner.runtime.workers
        learner.runtime.clock = time.process_time if on_cpu else time.perf_counter
        trials = _Trials(learner, watch, Path(place), given)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of states that are thrown away
            trials.run()
        document = _document(learner, trials, start, on_cpu)
    if isinstance(recipe, str) and recipe in packaged() and Path(recipe).exists():
        document["guesses"].append(f"{recipe} is taken for the packaged recipe; the folder is ./{recipe}")
    document["took_s"] = round(time.perf_counter() - began[0], 3)
    return document


@contextlib.contextmanager
def _named(place: Path, name: str) -> Iterator[None]:
    """Inside, errors about the temporary folders name what the user gave."""
    try:
        yield
    except (DataError, StateError, UsageError) as error:
        text = re.sub(rf"{re.escape(str(place))}/(state|trial-\d+)", lambda _: name, str(error))
        raise type(error)(text) from error


def is_state(recipe: str | Path) -> bool:
    """Whether it is a state folder. A packaged recipe comes before a folder of its name."""
    return Path(recipe).is_dir() and str(recipe) not in packaged()


def _learner(
    recipe: Recipe | dict[str, Any] | str | Path, data: Data | None, device: str | None, place: Path, watch: Watch
) -> Learner:
    """The learner of which trials are made, over a copy of the state or a new one."""
    if isinstance(recipe, str | Path) and is_state(recipe):
        state = State(Path(recipe))
        if data is None:
            raise UsageError(f"{recipe} is a state: say with what it would be updated (--data)")
        _ = state.committed  # what is wrong with it is told with its own name
        copy = place / "state"
        shutil.copytree(recipe, copy, ignore=lambda *_: ["resume", ".lock"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they name the copy, and the update says them
            return Learner.load(copy, device=device, progress=watch)
    loaded = recipe if isinstance(recipe, Recipe) else None
    if loaded is None:
        loaded = make_recipe(recipe) if isinstance(recipe, dict) else load_recipe(str(recipe))
    if device is not None:
        loaded = loaded.model_copy(update={"run": loaded.run.model_copy(update={"device": device})})
    if data is not None:
        loaded = loaded.model_copy(update={"data": None})
    elif loaded.data is None:
        raise UsageError(f"recipe {loaded.name} has no data: say what it would learn (--data)")
    return Learner(loaded, place / "state", progress=watch)


class _Trials:
    """Up to four trials: a tiny one that warms everything up, a small one, again with more examples where that was
    quick, and one with twice the examples."""

    def __init__(self, learner: Learner, watch: Watch, place: Path, given: Mapping[str, Any]):
        self.learner, self.watch, self.place, self.given = learner, watch, place, given
        self.count = 0

    def run(self) -> None:
        recipe = self.learner.recipe
        cold = self._trial(0, 0, 1)
        self.full: dict[int, Sizes] = cold.full
        most = max(size.train for size in self.full.values())
        tests = max(size.test for size in self.full.values())
        batch, asked = recipe.train.batch_size, recipe.evaluate.batch_size
        n = max(1, min(batch * math.ceil(asked / 2 / batch), most // 2))
        m = max(1, min(asked // 2, tests // 2), min(PROBE, tests))  # a task stores features of its probe
        tasks = min(TASKS, len(self.full))
        self.small = self._trial(n, m, tasks)
        times = min(int(BUDGET / max(1e-3, self.small.seconds * (1 + 2 * max(1, tasks - 1) / tasks))), most // (2 * n))
        if times > 1:
            n, m = n * times, max(m, min(m * times, tests // 2))
            self.small = self._trial(n, m, tasks)
        self.large = self._trial(2 * n, 2 * m, max(1, tasks - 1))
        self.costs = Costs([*self.small.tasks, *self.large.tasks])
        counts = cold.tasks[0].counts
        expected = sum(value for part, value in self.costs.of(counts).items() if part in PARTS)
        self.warm_up = max(0.0, cold.seconds - expected)
        walls = [task for trial in (self.small, self.large) for task in trial.tasks]
        self.wall = sum(task.wall for task in walls) / max(1e-9, self.small.seconds + self.large.seconds)

    def _trial(self, train: int, test: int, tasks: int) -> Trial:
        folder = self.place / f"trial-{self.count}"
        self.count += 1
        if "data" in self.given:
            shutil.copytree(self.place / "state", folder)
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            sample = Sample(train, max(test, 1), self.learner.recipe.seed)
            return run_trial(self.learner, self.watch, folder, sample, tasks, self.given)


def _document(learner: Learner, trials: _Trials, start: tuple[float, float], on_cpu: bool) -> dict[str, Any]:
    recipe, costs, small, large = learner.recipe, trials.costs, trials.small, trials.large
    update = "data" in trials.given
    measured = [*small.tasks, *large.tasks]
    counts = (
        [_of_update(large, trials.full)]
        if update
        else planned(trials.full, recipe, keeps_data=learner.method.needs_earlier_data)
    )
    size = _bytes_of_update(counts[0], small, large) if update else disk(counts, recipe, small, large)
    tasks, own = [], 0.0
    for count, taken in zip(counts, size[1], strict=True):
        parts = costs.of(count)
        seconds = sum(parts[part] for part in PARTS)
        own += seconds
        tasks.append(
            {
                "index": count.index,
                "name": trials.full[count.index].name,
                "train": trials.full[count.index].train,
                "test": count.test,
                "steps": steps_of(count, measured),
                "seconds": round(seconds * trials.wall, 3),
                **{f"{part}_s": round(parts[part] * trials.wall, 3) for part in PARTS},
                **{f"{part}_s": round(parts[f"in {part}"] * trials.wall, 3) for part in INSIDE},
                "bytes": taken,
            }
        )
    last = costs.of(counts[-1])["report"]  # the verbs write it once more
    own += trials.warm_up + last
    wide = 2.0 if costs.growth else 1.0
    return {
        "format": 1,
        "recipe": recipe.name,
        "what": "update" if update else "run",
        "device": str(learner.runtime.device),
        "tasks": tasks,
        "start_s": round(start[0] + (trials.warm_up + last) * trials.wall, 3),
        "seconds": _range(start[0] + own * trials.wall, SPREAD["seconds"] * wide),
        "cpu_seconds": _range(start[1] + own, SPREAD["seconds"] * wide) if on_cpu else None,
        "memory": _memory(learner, trials, counts),
        "bytes": _range(size[0], SPREAD["bytes"]),
        "guesses": _guesses(learner, trials, counts),
        "tried": [
            {"train": task.counts.train, "test": task.counts.test, "task": task.counts.index} for task in measured
        ],
    }


def _of_update(large: Trial, full: Mapping[int, Sizes]) -> Counts:
    """The counts of an update's task, from those of the trial: what is asked of earlier tasks is the same."""
    tried = large.tasks[0].counts
    size = full[tried.index]
    checked = size.train + size.validation + size.test
    return Counts(tried.index, checked, size.train, size.test, tried.others, tried.asked, passes=tried.passes)


def _bytes_of_update(counts: Counts, small: Trial, large: Trial) -> tuple[int, list[int]]:
    one, two = small.tasks[0], large.tasks[0]
    tests = two.counts.test - one.counts.test
    kept = (two.kept[1] - one.kept[1]) / tests if tests else 0.0
    sampled = max(0, min(SAMPLE, counts.test) - min(SAMPLE, two.counts.test))
    own = round(bytes_each(one, two) * sampled)
    return large.all + int(kept * (counts.test - two.counts.test)) + own, [two.own + own]


def _memory(learner: Learner, trials: _Trials, counts: Sequence[Counts]) -> dict[str, Any] | None:
    """Peak memory: what the trials needed, and what later tasks add to the method and to the kept features."""
    peaks = [task.peak for trial in (trials.small, trials.large) for task in trial.tasks]
    known = [peak for peak in peaks if peak is not None]
    if not known:
        return None
    tasks = trials.small.tasks
    grows = max(0, tasks[2].tensors - tasks[1].tensors) * (len(counts) - len(tasks)) if len(tasks) > 2 else 0
    on_host = learner.runtime.device.type != "cuda"
    kept = 0 if len(counts) == 1 or not on_host else kept_bytes(counts, trials.small, learner.recipe.evaluate.keep)
    of = str(learner.runtime.device) if not on_host else "process"
    return {**_range(max(known) + grows + kept, SPREAD["memory"]), "of": of}


def _range(value: float, share: float) -> dict[str, Any]:
    """A value, and how far from it the truth may be."""
    digits: Callable[[float], Any] = round if isinstance(value, int) else lambda v: round(v, 3)
    return {"value": digits(value), "low": digits(value * (1 - share)), "high": digits(value * (1 + share))}


def _guesses(learner: Learner, trials: _Trials, counts: Sequence[Counts]) -> list[str]:
    """What is guessed, and not measured or counted, a sentence each."""
    recipe, found = learner.recipe, list[str]()
    tried = [task.counts for task in (*trials.small.tasks, *trials.large.tasks)]
    most = max(count.train for count in counts) / max(count.train for count in tried)
    if most > 1:
        found.append(f"time grows with the examples of a task: the largest has {most:.1f} times those of the trial")
    if len(counts) > len(trials.small.tasks):
        found.append(f"tasks after number {len(trials.small.tasks)} cost what the ones before say, by their examples")
    if trials.costs.growth:
        found.append(
            f"each later task takes {trials.costs.growth:.0%} longer to learn than the one before, as tasks 2 and 3 of "
            "the trial did"
        )
    if isinstance(recipe.train.epochs, list) and len(counts) > 2:
        found.append("a task with more epochs takes as many times the time to learn")
    if recipe.gate is not None:
        found.append("the gate of the recipe asks everything once more before an update, which is not counted")
    if isinstance(recipe.evaluate.earlier, int):
        found.append("earlier tasks are taken to be asked in full, and evaluate.earlier bounds this: it may take less")
    if learner.method.model.view.takes != "pictures":
        found.append("texts of a task are as long as those of the trial; a batch of longer ones needs more memory")
    found.append("seconds on the clock are for this machine as busy as it is now")
    return found

"""Figures of a run for TensorBoard, Weights & Biases, trackio and MLflow, by the trackers of accelerate.

A tracker listens to the progress of a run, as the terminal does. So nothing that is learned depends on it, and no step
waits for the device because of it: the loss comes late, when it has been read anyway. The position of every figure is
the number of training examples so far, so that a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from perpetune import registry
from perpetune.errors import MissingExtra, PerpetuneError, UsageError
from perpetune.recipe import Recipe
from perpetune.runtime import Progress, Runtime

FOLDER = "track"
"""The folder in the state folder that trackers write to, unless the user says otherwise."""
MODULES = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
    "mlflow": ("mlflow",),
}
"""The modules of each tracker; one of them has to be installed."""
QUIET = {
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_SILENT": "true",
    "WANDB_CONSOLE": "off",  # it would keep a copy of what the command prints
    "GRADIO_ANALYTICS_ENABLED": "False",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""What keeps these libraries from reporting to their makers; a value that the user has set stays."""
EVERY = 0.1  # seconds between two figures of the loss
METRICS = ("final_accuracy", "average_accuracy", "forgetting")
CERTIFICATE = ("room", "worst", "median")


def check(names: Sequence[str]) -> None:
    """Check that the trackers of a recipe can be used, before anything else is done.

    Raises:
        MissingExtra, UsageError: a package is not installed, or a class cannot be loaded or is no tracker.
    """
    for name in names:
        if name not in MODULES:
            _own(name)
        elif not any(importlib.util.find_spec(module) for module in MODULES[name]):
            if name == "tensorboard":
                raise MissingExtra("run.track: tensorboard", "track")
            raise UsageError(f"run.track: {name} needs a package that is not installed: pip install {name}")


@contextlib.contextmanager
def tracked(recipe: Recipe, runtime: Runtime, folder: Path, results: Callable[[], dict[str, Any]]) -> Iterator[None]:
    """Inside this context the trackers of a recipe get what the progress of a run gets.

    If several processes learn, the first one tracks. A tracker that fails is left out from then on, with a note: the
    learning goes on.

    Args:
        folder: the state folder.
        results: gives the results document so far.
    """
    names = recipe.run.track
    if not names or runtime.rank != 0:
        yield
        return
    place = folder / FOLDER
    with _surroundings(names, place):
        runtime.accelerator  # noqa: B018  trackers ask it whether this is the first process
        runtime.progress.note(_whereto(names, place, recipe.name))
        listener = Tracked(runtime, names, recipe, place, results())
        before, runtime.progress = runtime.progress, listener
        try:
            yield
        finally:
            runtime.progress = before
            listener.finish()


class Tracked:
    """A `perpetune.runtime.Progress` that gives figures to trackers, and everything to the progress behind it."""

    def __init__(self, runtime: Runtime, names: Sequence[str], recipe: Recipe, place: Path, results: dict[str, Any]):
        self.runtime = runtime
        self.shown: Progress = runtime.progress
        self.trackers: dict[str, Any] = {}
        self._before = _examples(results)  # training examples of committed tasks
        self._phase, self._total, self._last = "", 0, 0.0
        config = flat(recipe.model_dump(mode="json"))
        for name in names:
            self._try(name, lambda name=name: self._start(name, recipe.name, place, config))  # type: ignore[misc]

    def _start(self, name: str, project: str, place: Path, config: dict[str, Any]) -> None:
        kind = _kind(name)
        tracker = kind(project, str(place)) if kind.requires_logging_directory else kind(project)
        getattr(tracker, "start", lambda: None)()  # trackers of an older accelerate have started
        self.trackers[name] = tracker
        tracker.store_init_configuration(config)

    def _try(self, name: str, act: Callable[[], None]) -> None:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # standard output is for the results of a command
                act()
        except Exception as error:  # noqa: BLE001  whatever fails there, what is learned must not be lost
            self.trackers.pop(name, None)
            what = " ".join(str(error).split())[:200] or type(error).__name__
            self.shown.note(f"run.track: {name} failed, and gets no more figures: {what}")

    def log(self, figures: Mapping[str, float | None], at: int) -> None:
        """Give figures to all trackers; those that are None are left out."""
        known = {name: value for name, value in figures.items() if value is not None}
        for name, tracker in list(self.trackers.items()):
            self._try(name, lambda tracker=tracker: tracker.log(dict(known), step=at))  # type: ignore[misc]

    def finish(self) -> None:
        for name, tracker in list(self.trackers.items()):
            self._try(name, tracker.finish)

    # -- progress -------------------------------------------------------------------------------------

    def note(self, message: str) -> None:
        self.shown.note(message)

    def task(self, index: int, name: str, classes: int, examples: int) -> None:
        self.shown.task(index, name, classes, examples)

    def phase(self, phase: str, steps: int, epochs: int, done: int) -> None:
        self._phase, self._total, self._last = phase, steps, 0.0
        self.shown.phase(phase, steps, epochs, done)

    def step(self, done: int, epoch: int, loss: float | None, images: int) -> None:
        self.shown.step(done, epoch, loss, images)
        now = time.monotonic()
        if loss is None or (now - self._last < EVERY and done < self._total):
            return
        self._last = now
        here = self.runtime.checkpoints.images if self.runtime.checkpoints else 0  # without this step's
        self.log({f"loss/{self._phase}": loss}, self._before + here + images)

    def results(self, results: dict[str, Any]) -> None:
        self.shown.results(results)
        self._before = _examples(results)
        self.log(figures_of(results), self._before)


def figures_of(results: Mapping[str, Any]) -> dict[str, float | None]:
    """What a results document says after its last task: figures, the last row of the matrix, room under protection."""
    task = results["tasks"][-1]["index"]
    found: dict[str, float | None] = {f"metrics/{name}": results["metrics"][name] for name in METRICS}
    for one, cell in zip(results["tasks"], results["cells"][-1], strict=True):
        found[f"accuracy/{one['name']}"] = cell["correct"] / cell["total"] if cell and cell["total"] else None
    for certificate in results["protection"]:
        if certificate["task"] == task:
            found |= {f"protection/{name}": certificate.get(name) for name in CERTIFICATE}
    found["metrics/tasks"] = task + 1
    found["seconds/learn"] = results["timings"][-1]["learn_s"]
    return found


def flat(content: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """A recipe as one mapping of its keys (`train.lr`) to numbers and texts, as trackers take hyper-parameters."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{before}{key}.")
        elif isinstance(value, bool | int | float | str):
            found[before + key] = value
        else:
            found[before + key] = json.dumps(value, ensure_ascii=False)
    return found


def _examples(results: Mapping[str, Any]) -> int:
    """How many training examples the learned tasks took: those of all steps, or the task's own if it has no steps."""
    pairs = zip(results["tasks"], results["timings"], strict=True)
    return sum(int(timing.get("images") or task["train"]) for task, timing in pairs)


def _kind(name: str) -> Any:
    """The class of a tracker."""
    if name not in MODULES:
        return _own(name)
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    if name not in LOGGER_TYPE_TO_CLASS:
        raise PerpetuneError("the installed accelerate does not know it: pip install --upgrade accelerate")
    return LOGGER_TYPE_TO_CLASS[name]


def _own(path: str) -> Any:
    """The tracker at `PACKAGE.MODULE:CLASS`."""
    from accelerate.tracking import GeneralTracker

    kind = registry.load_dotted(path)
    if not (isinstance(kind, type) and issubclass(kind, GeneralTracker)):
        raise UsageError(f"run.track: {path} is not derived from accelerate.tracking.GeneralTracker")
    return kind


@contextlib.contextmanager
def _surroundings(names: Sequence[str], place: Path) -> Iterator[None]:
    """Environment variables by which these libraries write here and report nothing; those that are set stay."""
    local = {
        "wandb": {"WANDB_MODE": "offline", "WANDB_DIR": str(place)},
        "trackio": {"TRACKIO_DIR": str(place / "trackio")},
        "mlflow": {"MLFLOW_TRACKING_URI": f"sqlite:///{place / 'mlflow.db'}"},
    }
    wanted = {key: value for name in names for key, value in local.get(name, {}).items()} | QUIET
    added = {key: value for key, value in wanted.items() if key not in os.environ}
    place.mkdir(exist_ok=True)
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)


def _whereto(names: Sequence[str], place: Path, project: str) -> str:
    """A line that says where each tracker's data go."""
    told = []
    for name in names:
        if name == "tensorboard":
            told.append(f"tensorboard writes to {place / project}")
        elif name == "wandb":
            mode = os.environ["WANDB_MODE"]
            sent = "sends nothing (`wandb sync` does)" if mode == "offline" else f"goes by WANDB_MODE={mode}"
            told.append(f"wandb {sent} and writes to {os.environ['WANDB_DIR']}")
        elif name == "trackio":
            told.append(f"trackio writes to {os.environ['TRACKIO_DIR']}")
        elif name == "mlflow":
            told.append(f"mlflow writes to {os.environ['MLFLOW_TRACKING_URI']}")
        else:
            told.append(f"{name} is not perpetune's: it says itself where it writes")
    return f"run.track: {'; '.join(told)}"

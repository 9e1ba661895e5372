"""The library's front door: a recipe's model over its state folder."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from perpetune import registry
from perpetune.build import build_backbone, build_data, build_method, build_runtime
from perpetune.data.check import find_overlap
from perpetune.data.pictures import as_rgb, load_picture
from perpetune.data.sources import Source, guess_source
from perpetune.data.stream import Stream, StreamOptions, single_task
from perpetune.data.tasks import ImageSet, TaskData
from perpetune.data.text import safe_name, several, task_names
from perpetune.errors import DataError, Interrupted, StateError, UsageError
from perpetune.evaluate import evaluate
from perpetune.pets import PET, frozen
from perpetune.recipe import Recipe, load_recipe, make_recipe
from perpetune.results import read_results, versions
from perpetune.run import Step, run
from perpetune.runtime import Progress, Runtime, Silent
from perpetune.snapshot import restore, snapshot
from perpetune.state import START, Committed, State
from perpetune.tasks import Task

if TYPE_CHECKING:
    from PIL.Image import Image

Origin = dict[str, Any]  # where the data of an update came from: a data section and its holdout
STREAM = "stream"  # and of a run: the recipe's stream


@dataclass(frozen=True)
class Prediction:
    """What a learner says of one image: names with probabilities, the likeliest first."""

    image: str
    classes: list[tuple[str, float]]

    @property
    def name(self) -> str:
        return self.classes[0][0]


class Learner:
    """Keeps tuning one pretrained model as data arrive.

    Args:
        recipe: a `Recipe`, a mapping of its keys, the name of a packaged recipe, or a YAML file.
        folder: the state folder, which must not exist yet; None keeps it in a temporary one until `save`.
        progress: whoever watches; nobody by default.

    Raises:
        UsageError: the recipe or the folder cannot be used.
        DataError: the recipe's data cannot be used.
    """

    _stream: Stream | None

    def __init__(
        self,
        recipe: Recipe | dict[str, Any] | str | Path,
        folder: str | Path | None = None,
        *,
        progress: Progress | None = None,
    ):
        if isinstance(recipe, dict):
            recipe = make_recipe(recipe)
        elif not isinstance(recipe, Recipe):
            recipe = load_recipe(recipe)
        recipe = recipe.anchored()
        self._temporary = None if folder else tempfile.TemporaryDirectory(prefix="perpetune-")
        path = Path(folder) if folder else Path(str(self._temporary and self._temporary.name)) / recipe.name
        self._build(recipe, progress)
        if self._temporary and self.runtime.world > 1:
            raise UsageError("several processes share one state folder: give `folder` a path that all of them see")
        if recipe.data is not None:  # before the folder is made, so that data that cannot be used leave none
            self._stream = build_data(recipe, self.backbone)
        if self.runtime.rank == 0:
            State.create(path, recipe, self._model_document())
        self.runtime.accelerator.wait_for_everyone()
        self.state = State(path)

    @classmethod
    def load(cls, folder: str | Path, *, device: str | None = None, progress: Progress | None = None) -> Learner:
        """The learner that a state folder holds.

        Args:
            folder: the state folder.
            device: where to run, when it differs from the recipe's.

        Raises:
            StateError: the folder is torn, or its weights are not those of the recipe's backbone.
        """
        learner = cls.__new__(cls)
        learner._temporary = None
        learner.state = State(Path(folder))
        learner._build(learner.state.recipe, progress, device)
        known, found = learner.state.backbone["fingerprint"], learner._fingerprint
        if known != found:
            raise StateError(
                f"{folder} was made with other weights of {learner.recipe.backbone.name} (fingerprint {known[:12]}, "
                f"here {found[:12]}): bring back the checkpoint it was made with"
            )
        learner._reload()
        return learner

    def _build(self, recipe: Recipe, progress: Progress | None, device: str | None = None) -> None:
        self.recipe = recipe
        where = (
            recipe
            if device is None
            else recipe.model_copy(update={"run": recipe.run.model_copy(update={"device": device})})
        )
        self.runtime = build_runtime(where)
        self.runtime.progress = progress if progress and self.runtime.rank == 0 else Silent()
        self.backbone = build_backbone(recipe)
        self._fingerprint = self.backbone.fingerprint()
        self.method = build_method(recipe, self.backbone).to(self.runtime.device)
        self._new = snapshot(self.method)
        self._learned = ""  # the last task folder that is part of `method`
        self._halfway = False  # whether `method` was left inside a task
        self._stream = None
        self._tasks: dict[int, Task] = {}
        self._tests: dict[int, Task] = {}  # earlier tasks of which only the test is to be used

    def _model_document(self) -> dict[str, Any]:
        pets = [m for m in self.method.modules() if isinstance(m, PET)]
        return {
            "spec": self.backbone.spec,
            "fingerprint": self._fingerprint,
            "parameters": sum(t.numel() for t in frozen(self.backbone.net).values()),
            "trainable_parameters": sum(p.numel() for pet in pets for p in pet.parameters()),
        }

    # -- learning -------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Learn every task of the recipe's stream that is not learned yet; returns the results document.

        Raises:
            UsageError: the recipe names no data.
            Interrupted: a signal asked for a stop; `resume` goes on.
        """
        tasks = self.stream.tasks
        with self._writing(tasks=len(tasks)):
            for warning in self.stream.warnings:
                self.runtime.progress.note(warning)
            done = len(self.state.committed)
            run(self.method, (self._stream_step(i) for i in range(done, len(tasks))), self.state)
        return read_results(self.state)

    def learn(
        self, data: str | Path | dict[str, Any] | Source | Task, *, name: str | None = None, holdout: float = 0.2
    ) -> dict[str, Any]:
        """Learn one more batch of data as one task; returns the results document.

        Args:
            data: a folder, manifest, parquet file or dataset id; a `data:` section; a source; or a
                ready-made task. Earlier data are not read again, but for the held-out images of
                earlier tasks that are still where they were, which are evaluated.
            name: of the task; by default that of the folder or file, else `task-N`.
            holdout: share kept for testing where the data bring no test split.
        """
        if self.method.needs_earlier_data:
            raise UsageError(
                f"method: {self.recipe.method.name} needs the data of all tasks, and an update has only its own: use "
                "`perpetune run`, or another method"
            )
        index = len(self.state.committed)
        if self.recipe.data is not None and index < (planned := self._planned()):
            raise UsageError(
                f"{self.state.folder} has learned {index} of the {planned} tasks of its own stream: "
                f"finish them first with `perpetune resume {self.state.folder}`"
            )
        name = self._name(data, name, index)
        origin: Origin
        if isinstance(data, Task):
            task = dataclasses.replace(data, index=index, name=name, earlier=None, runtime=self.runtime)
            print_ = hashlib.sha256(repr(list(task.train.targets)).encode()).hexdigest()
            origin, fingerprint, bad, warnings = {"name": None}, print_, [], []
        else:
            origin = data if isinstance(data, dict) else {} if isinstance(data, Source) else _origin(data)
            origin = {**origin, "holdout": holdout}
            source = data if isinstance(data, Source) else _source(origin)
            found = self._checked(self._single(source, index, name, holdout))
            task, fingerprint, bad, warnings = self._as_task(found), found.fingerprint, found.bad, found.warnings
        self._tasks[index] = task
        with self._writing():
            others = [t for t in (self._past(c) for c in self.state.committed) if t is not None]
            leaks = self._leaks(task, others)
            for warning in leaks:
                self.runtime.progress.note(warning)
            document = _document(task, origin, fingerprint, bad, [*warnings, *leaks])
            run(self.method, [Step(task, others, document)], self.state)
        return read_results(self.state)

    def _name(self, data: str | Path | dict[str, Any] | Source | Task, asked: str | None, index: int) -> str:
        """The name of an update's task: the one asked for, made safe, or one that no task has yet."""
        taken = [t.name for t in self.state.committed]
        safe = safe_name(asked or "")
        if safe == START:
            raise UsageError(
                f"a task cannot be called {START!r}, `rollback --to {START}` drops all: choose another --name"
            )
        if safe in taken:
            raise UsageError(f"{self.state.folder} has a task {safe!r} already: choose another --name")
        if not safe and not asked and isinstance(data, (str, Path)):
            path = Path(data).expanduser().resolve()
            own = path.name if path.is_dir() else path.stem if path.is_file() else ""
            return task_names([own], first=index + 1, taken=taken)[0]
        return safe or task_names([""], first=index + 1, taken=taken)[0]

    def _leaks(self, task: Task, others: Sequence[Task]) -> list[str]:
        """A warning where pictures that `task` trains on are among the test pictures of the others."""
        found = []
        for other in others if self.recipe.stream.check != "none" else []:
            train, test = task.train, other.test
            if isinstance(train, ImageSet) and isinstance(test, ImageSet):
                pairs = find_overlap(train.table, test.table, True, train_rows=train.rows, test_rows=test.rows)
                found += [f"{train.table.name(a)} = {test.table.name(b)} (task {other.name})" for a, b in pairs]
        if not found:
            return []
        return [f"task {task.name} trains on {len(found)} test pictures of earlier tasks: {several(found)}"]

    def resume(self) -> dict[str, Any]:
        """Go on where an interrupted `run` or `learn` stopped; returns the results document."""
        opened = self.state.open_task()
        if opened is not None and opened["from"] != STREAM:
            if not opened["from"].get("name"):
                raise UsageError(
                    f"task {opened['name']} was given as a Python object: call `Learner.load(...).learn` with it again"
                )
            return self.learn(opened["from"], name=opened["name"], holdout=opened["from"]["holdout"])
        if self.recipe.data is None:
            if self.runtime.rank == 0:
                with self.state.writing():  # finishes what a crash left undone
                    pass
            return read_results(self.state)
        return self.run()

    def _planned(self) -> int:
        """How many tasks the recipe's stream has; once it was begun the journal knows, and the data may be gone."""
        begun = [e["tasks"] for e in self.state.journal() if e["event"] == "run begun" and "tasks" in e]
        return int(begun[-1]) if begun else len(self.stream.tasks)

    @property
    def stream(self) -> Stream:
        """The recipe's stream of tasks."""
        if self._stream is None:
            self._stream = build_data(self.recipe, self.backbone)
        return self._stream

    def _stream_step(self, index: int) -> Step:
        task, data = self._stream_task(index), self._checked(self.stream.tasks[index])
        others = [t for t in (self._past(c) for c in self.state.committed) if t is not None]
        if self.recipe.setting == "domain" and index + 1 < len(self.stream.tasks):
            others.append(self._stream_task(index + 1))  # its accuracy before it is learned: forward transfer
        warnings = self.stream.warnings if index == 0 else []
        return Step(task, others, _document(task, STREAM, data.fingerprint, data.bad, warnings))

    def _stream_task(self, index: int) -> Task:
        if index not in self._tasks:
            self._tasks[index] = self._as_task(self._checked(self.stream.tasks[index]))
        task = self._tasks[index]
        if self.method.needs_earlier_data:
            task = dataclasses.replace(task, earlier=tuple(self._stream_task(i) for i in range(index)))
        return task

    def _past(self, committed: Committed) -> Task | None:
        """An earlier task as far as its test data are still there, and what they were."""
        index = committed.index
        if index in self._tasks:
            return self._tasks[index]
        if index not in self._tests:
            document = committed.json("task.json")
            origin = document["from"]
            if origin != STREAM and not origin.get("name"):
                self.runtime.progress.note(f"task {committed.name} is not evaluated, it was given as a Python object")
                return None
            try:
                if origin == STREAM:
                    found = self.stream.tasks[index] if index < len(self.stream.tasks) else None
                else:
                    found = self._single(_source(origin), index, committed.name, origin["holdout"])
                if found is None or found.fingerprint != document["fingerprint"]:
                    self.runtime.progress.note(
                        f"task {committed.name} is not evaluated: its data at {self._place(origin)} changed since it "
                        "was learned"
                    )
                    return None
                found = self._checked(found, document["classes"])
            except (DataError, UsageError) as error:
                self.runtime.progress.note(f"task {committed.name} is not evaluated, its data are gone: {error}")
                return None
            self._tests[index] = dataclasses.replace(self._as_task(found), name=committed.name)
        return self._tests[index]

    def _place(self, origin: Origin | str) -> str:
        """Where data came from, for messages."""
        if isinstance(origin, dict):
            return str(origin.get("path", origin["name"]))
        data = self.recipe.data
        return str(data.options.get("path", data.name)) if data else "its stream"

    def _single(
        self, source: Source, index: int, name: str, holdout: float, options: StreamOptions | None = None
    ) -> TaskData:
        options, seed, view = options or self.recipe.stream, self.recipe.seed, self.backbone.preprocess
        return single_task(source, options, view, index=index, name=name, seed=seed, holdout=holdout)

    def _checked(self, data: TaskData, learned: Sequence[str] | None = None) -> TaskData:
        """`data` without the images that cannot be read; each is looked at once.

        With the classes that were `learned` of it, it is only tested on: its training images are not looked at.
        """
        if learned is not None:
            data = data.for_testing(learned)
        elif not data.checked:
            data.check()
        else:
            return data
        for warning in data.warnings:
            self.runtime.progress.note(warning)
        return data

    def _as_task(self, data: TaskData) -> Task:
        return Task(data.index, data.name, data.classes, data.train, data.validation, data.test, runtime=self.runtime)

    @contextlib.contextmanager
    def _writing(self, **facts: Any) -> Iterator[None]:
        """Hold the state folder, with signals turned into a checkpoint and an orderly stop."""
        with contextlib.ExitStack() as stack:
            if self.runtime.rank == 0:
                stack.enter_context(self.state.writing())
                if self._learned != self._last():
                    raise StateError(f"{self.state.folder} was changed after it was loaded here: load it again")
                device = str(self.runtime.device)
                self.state.log("run begun", versions=versions(), device=device, seed=self.recipe.seed, **facts)
            stack.enter_context(stop_signals(self.runtime))
            self._leave_halfway()
            self._halfway = True
            try:
                yield
                self._halfway = False
            except Interrupted as stop:
                told = f"{stop}; go on with `perpetune resume {self.state.folder}`"
                raise Interrupted(told, stop.signum) from stop
            finally:
                self._learned = self._last()

    def _last(self) -> str:
        tasks = self.state.committed
        return tasks[-1].folder.name if tasks else ""

    def _leave_halfway(self) -> None:
        """After a task that failed or was stopped, go back to the last commit."""
        if self._halfway:
            self._reload()
            self._halfway = False

    def _reload(self) -> None:
        """Make `method` what the last commit left, or what it was before the first."""
        tasks = self.state.committed
        if tasks:
            self.state.load(self.method, tasks[-1])
        else:
            restore(self.method, self._new, "a new model")
        self._learned = tasks[-1].folder.name if tasks else ""

    # -- using what was learned -----------------------------------------------------------------------

    @torch.no_grad()
    def predict(
        self,
        images: str | Path | Sequence[str | Path | Image] | Tensor,
        *,
        top: int = 5,
        unreadable: list[str] | None = None,
    ) -> list[Prediction]:
        """Names and probabilities for pictures.

        Args:
            images: a path, several paths or PIL images, or a uint8 tensor `(N, 3, S, S)` of the backbone's size.
            top: how many names for each.
            unreadable: takes a line for each picture that cannot be read, instead of an error; such a picture
                has no prediction.

        Raises:
            StateError: nothing is learned yet.
            UsageError: a tensor is not what the backbone takes.
            DataError: a picture cannot be read; names it.
        """
        self._need_classes()
        images = [images] if isinstance(images, (str, Path)) else images
        size, found = self.recipe.evaluate.batch_size, []
        for start in range(0, len(images), size):
            names, pixels = self._pixels(images[start : start + size], start, unreadable)
            if not names:
                continue
            with self.runtime.autocast():
                scores = self.method.predict(pixels.to(self.runtime.device))
            best = scores.float().softmax(1).topk(min(top, scores.shape[1]), dim=1)
            for name, values, rows in zip(names, best.values.tolist(), best.indices.tolist(), strict=True):
                pairs = [(self.method.classes[row], value) for row, value in zip(rows, values, strict=True)]
                found.append(Prediction(name, pairs))
        return found

    def _pixels(
        self, images: Sequence[str | Path | Image] | Tensor, start: int, unreadable: list[str] | None
    ) -> tuple[list[str], Tensor]:
        view = self.backbone.preprocess
        if isinstance(images, Tensor):
            if images.dtype != torch.uint8 or images.shape[1:] != (3, view.size, view.size):
                raise UsageError(
                    f"predict: a uint8 tensor (N, 3, {view.size}, {view.size}) is expected, "
                    f"got {images.dtype} {tuple(images.shape)}"
                )
            return [f"image {start + i}" for i in range(len(images))], images
        names, pixels = [], []
        for number, image in enumerate(images, start):
            try:
                loaded = load_picture(image, view) if isinstance(image, (str, Path)) else view(as_rgb(image))
            except DataError as error:
                if unreadable is None:
                    raise
                unreadable.append(str(error))
                continue
            pixels.append(loaded)
            names.append(str(image) if isinstance(image, (str, Path)) else f"image {number}")
        return names, torch.stack(pixels) if pixels else torch.empty(0)

    def evaluate(self, data: str | Path | Source | None = None) -> dict[str, dict[str, Any] | None]:
        """Counts of right predictions by task: on the test data of every learned task, or on `data`
        (its test split, or all of it where there is none).

        Raises:
            StateError: nothing is learned yet.
        """
        self._need_classes()
        setting, size = self.recipe.setting, self.recipe.evaluate.batch_size
        if data is None:
            tasks = {c.name: self._past(c) for c in self.state.committed}
        else:
            source = data if isinstance(data, Source) else _source(_origin(data))
            everything = {"validation": 0.0, "train_per_class": None, "test_per_class": None, "augment": "none"}
            options = self.recipe.stream.model_copy(update=everything)
            found = self._single(source, len(self.state.committed), "given", 0.0, options)
            task = self._as_task(self._checked(found, found.classes if found.test else None))
            tasks = {str(data): dataclasses.replace(task, test=task.test or task.train)}
        return {
            name: evaluate(self.method, task, setting=setting, batch_size=size) if task else None
            for name, task in tasks.items()
        }

    def _need_classes(self) -> None:
        self._leave_halfway()
        if not self.method.classes:
            raise StateError(f"{self.state.folder} has learned nothing yet: `perpetune update` or `run` it first")

    def save(self, folder: str | Path) -> Path:
        """Copy the state folder to `folder`, which must not exist."""
        folder = Path(folder)
        if folder.exists():
            raise UsageError(f"{folder} is there already: choose another folder")
        aside = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(self.state.folder, aside)
        aside.rename(folder)
        return folder


@contextlib.contextmanager
def stop_signals(runtime: Runtime) -> Iterator[None]:
    """SIGTERM and SIGINT ask the run to stop at the next step; a second one acts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[int] = []
    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def ask(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(number, before[number] or signal.SIG_DFL)

    for number in before:
        signal.signal(number, ask)
    runtime.stopping = lambda: asked[0] if asked else None
    try:
        yield
    finally:
        runtime.stopping = lambda: None
        for number, handler in before.items():
            signal.signal(number, handler)


def _document(
    task: Task, origin: Origin | str, fingerprint: str, bad: Sequence[str], warnings: Sequence[str]
) -> dict[str, Any]:
    """What is stored of a task beside what was learned."""
    return {
        "train": len(task.train),
        "validation": len(task.validation) if task.validation else 0,
        "test": len(task.test) if task.test else 0,
        "from": origin,
        "fingerprint": fingerprint,
        "bad": list(bad),
        "warnings": list(warnings),
    }


def _origin(data: str | Path) -> Origin:
    """The data section for a path or id; a path is made absolute, so that a later call finds it."""
    if not str(data):
        raise UsageError("data: the path is empty; a folder, manifest, parquet file or data set id is expected")
    path = Path(data).expanduser()
    place = str(path.resolve() if path.exists() else data)
    name, options = guess_source(place)
    return {"name": name, **options}


def _source(origin: Origin) -> Source:
    given = {k: v for k, v in origin.items() if k not in ("name", "holdout")}
    source: Source = registry.find("data", origin["name"])(**registry.options("data", origin["name"], given))
    return source

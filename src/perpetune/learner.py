"""`Learner`, the main class of the library: a recipe's model together with its state folder."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import shutil
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from perpetune import drifting, forgetting, oracle, tracking
from perpetune.build import build_backbone, build_method, build_runtime, described
from perpetune.data.examples import Question
from perpetune.data.names import printable, safe_name, several, task_names
from perpetune.data.pictures.view import PictureView
from perpetune.data.sources import Source
from perpetune.data.stream import Stream
from perpetune.data.tasks import TaskData
from perpetune.data.texts.chats import Messages
from perpetune.errors import Interrupted, StateError, UsageError, closest
from perpetune.evaluate import AMONG, How, ask, probe
from perpetune.kept import KeptFeatures, kept_features
from perpetune.models.compiled import Compiler, compile_blocks
from perpetune.models.sharded import ALONE, shard
from perpetune.month import month
from perpetune.pets import PET, frozen, using
from perpetune.recipe import Recipe, load_recipe, make_recipe
from perpetune.results import read_results, versions
from perpetune.run import Step, cells_of, measure, run
from perpetune.runtime import Progress, Runtime, Silent
from perpetune.sequence import STREAM, Cut, Data, TaskSequence, moved
from perpetune.snapshot import restore, snapshot
from perpetune.state import START, Pruned, State
from perpetune.tally import SAMPLE, probe_rows
from perpetune.tasks import Batch, Task, captioned
from perpetune.unlabelled import unlabelled

if TYPE_CHECKING:
    from PIL.Image import Image


D = TypeVar("D")
Prompt = str | Sequence[tuple[str, ...]] | Sequence[dict[str, Any]] | Mapping[str, Any]
"""A prompt for a language model: a text, or the messages of a chat. For a vision-language model also
`{"prompt": …, "images": […]}` or `{"messages": …, "images": […]}`, whose images are paths or PIL images."""


@dataclass(frozen=True)
class Prediction:
    """A learner's prediction for one image: `classes` has names with probabilities, the likeliest first."""

    image: str
    classes: list[tuple[str, float]]

    @property
    def name(self) -> str:
        return self.classes[0][0]


@dataclass(frozen=True)
class Answer:
    """A learner's answer to one prompt.

    Attributes:
        prompt: the prompt as the caller gave it.
        text: the answer.
        options: each option with its probability among the options, the likeliest first; empty for a generated answer.
        cut: the number of tokens that were cut off from the prompt's left, because the model cannot take more.
        left_out: what the model's chat template leaves out of the messages.
    """

    prompt: str | Messages
    text: str
    options: list[tuple[str, float]]
    cut: int = 0
    left_out: tuple[str, ...] = ()


class Learner:
    """Keeps tuning one pretrained model as data arrive.

    Args:
        recipe: a `Recipe`, a mapping of its keys, the name of a packaged recipe, or a YAML file.
        folder: the state folder to make; it must not exist yet. None makes a temporary one; `save` copies it.
        progress: shows the progress; by default nothing is shown.

    Raises:
        UsageError: the recipe or the folder cannot be used.
        DataError: the recipe's data cannot be used.
    """

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
        if recipe.evaluate.oracle and recipe.data is None:
            raise UsageError(oracle.NO_OLD_DATA)
        self._temporary = None if folder else tempfile.TemporaryDirectory(prefix="perpetune-")
        path = Path(folder) if folder else Path(str(self._temporary and self._temporary.name)) / recipe.name
        self._build(recipe, progress)
        self._need_others()
        with self.runtime.autocast():
            self.backbone.check()
        self._compile()
        if self._temporary and self.runtime.world > 1:
            raise UsageError("several processes must share one state folder: give `folder` a path that all of them see")
        if self.method.model.view.dated:
            self.method.model.view.today = date.fromisoformat(self.runtime.of_first(date.today().isoformat()))
        # Read the data before the folder is made, so that unusable data leave no folder behind.
        if recipe.data is not None:
            self._admit(self.stream.tasks)  # reads the data of the tasks
        self._tasks.reference  # noqa: B018  reads the reference data
        if self.runtime.rank == 0:
            State.create(path, recipe, self._model_document())
        self.runtime.wait()
        self.state = State(path)
        self._kept = self._kept_features()

    @classmethod
    def load(cls, folder: str | Path, *, device: str | None = None, progress: Progress | None = None) -> Learner:
        """Load the learner that a state folder stores.

        Args:
            folder: the state folder.
            device: the device to run on; None takes the recipe's device.

        Raises:
            StateError: the folder is damaged, or it was made with other weights of the backbone.
        """
        learner = cls.__new__(cls)
        learner._temporary = None
        learner.state = State(Path(folder))
        try:
            learner._build(learner.state.recipe, progress, device, learner.state.backbone)
        except UsageError as error:
            prefix, _, place = learner.state.recipe.backbone.name.partition(":")
            if prefix not in ("folder", "hf") or not Path(place).is_absolute() or Path(place).exists():
                raise
            cure = f"if the model lies elsewhere now, say where: `perpetune relocate {folder} --model {prefix}:PATH`"
            raise UsageError(f"{error}; {cure}") from error
        known, here = learner.state.backbone["fingerprint"], learner._fingerprint
        if known != here:
            raise StateError(
                f"{folder} was made with other weights of {learner.recipe.backbone.name} (their fingerprint is "
                f"{known[:12]}, here it is {here[:12]}): restore the checkpoint that it was made with"
            )
        if learner.method.model.view.dated:
            learner.method.model.view.today = learner.state.begun
        learner._kept = learner._kept_features()
        learner._tasks.moved = learner.state.moved()
        learner._reload()
        for line in (learner.state.unchecked(), learner.state.edited()):
            if line and learner.runtime.rank == 0:
                warnings.warn(line, stacklevel=2)
        learner._compile()
        return learner

    @staticmethod
    def relocate(folder: str | Path, *, model: str | None = None, data: tuple[str, str] | None = None) -> None:
        """Tell a state that its model, or data of its tasks, lie elsewhere now. Nothing that was learned changes.

        Args:
            folder: the state folder.
            model: the new name of the backbone, such as `folder:/models/vit`.
            data: a folder or file in which data of tasks were, and the place that they have now.

        Raises:
            UsageError: neither is given, or there is nothing at the new place.
            StateError: the weights of the model are not those that the state was made with.
        """
        state, spec = State(Path(folder)), None
        if model is None and data is None:
            raise UsageError("relocate: say what lies elsewhere now: model, data, or both")
        content = state.recipe.model_dump(mode="json")
        content["run"]["keep"] = state.keep  # written out now, also where an older version has left it open
        if data is not None:
            old, new = (str(Path(place).expanduser().absolute()) for place in data)
            if not Path(new).exists():
                raise UsageError(f"{new}: no such file or folder, so no data can have moved there")
            data = old, new
            for key in ("data", "exams", "protect"):
                content[key] = moved(content[key], [data])
        if model is not None:
            content["backbone"]["name"] = model
        recipe = make_recipe(content).anchored()
        if model is not None:
            backbone = build_backbone(recipe)
            spec, known, here = backbone.spec, state.backbone["fingerprint"], backbone.fingerprint()
            if known != here:
                raise StateError(
                    f"{model} has other weights than the model that {folder} was made with (their fingerprint is "
                    f"{known[:12]}, here it is {here[:12]}): nothing was changed"
                )
        with state.writing():
            state.relocate(recipe if recipe != state.recipe else None, spec, data)

    def prune(self, keep: int, *, dry_run: bool = False) -> Pruned:
        """Free the disk of what only a rollback to old tasks needs. Predictions, results and reports stay as they are.

        Args:
            keep: how many of the newest tasks can still be rolled back to, the newest one among them.
            dry_run: whether nothing is changed.

        Returns:
            The names of the tasks that are dropped and kept, and how many bytes come free.

        Raises:
            UsageError: `keep` is less than 1.
            StateError: another process writes to the state, or a folder is damaged.
        """
        if dry_run:
            return self.state.prune(keep, dry_run=True)
        with self.state.writing():
            return self.state.prune(keep, by=f"Learner.prune, keep {keep}")

    def _build(
        self,
        recipe: Recipe,
        progress: Progress | None,
        device: str | None = None,
        document: Mapping[str, Any] | None = None,
    ) -> None:
        """Make all that the recipe names; `document` is the `backbone.json` of a state that exists."""
        self.recipe = recipe
        tracking.check(recipe.run.track)
        where = (
            recipe
            if device is None
            else recipe.model_copy(update={"run": recipe.run.model_copy(update={"device": device})})
        )
        self.runtime = build_runtime(where)
        self.runtime.progress = progress if progress and self.runtime.rank == 0 else Silent()
        self._plain = None if document is None else document.get("plain")
        self.backbone = build_backbone(recipe, self._plain)
        self._fingerprint = self.backbone.fingerprint()
        if document is None:
            self._plain = described(recipe, self.backbone)
        elif self._plain is not None and self._fingerprint != document["fingerprint"]:  # its library knows more forms
            self.backbone = build_backbone(recipe)
            self._fingerprint = self.backbone.fingerprint()
        self.method = build_method(recipe, self.backbone)
        distinct = {(t.data_ptr(), t.numel()): t.numel() for t in frozen(self.backbone.net).values()}
        # A language model's output layer is often also its embedding: one tensor with two names, counted once.
        self._size = sum(distinct.values())
        self._shard()
        self.method.to(self.runtime.device)
        self._oracle_note = oracle.check(recipe, self.method) if recipe.evaluate.oracle else None
        if recipe.evaluate.future and self.method.model.chooses and not self.method.model.any_class:
            raise UsageError(
                f"evaluate.future asks about classes that are not learned yet, and head: {recipe.head.name} knows only "
                "those that it has learned: use a head that reads the names of classes, or leave evaluate.future out"
            )
        self._new = snapshot(self.method)
        self._learned = ""  # the last task folder that is part of `method`
        self._halfway = False  # whether `method` was left inside a task
        keeps_data = self.method.needs_earlier_data
        self._tasks = TaskSequence(recipe, self.method.model.view, self.runtime, keeps_data=keeps_data)

    def _kept_features(self) -> KeptFeatures:
        """The features of test data that the state folder keeps. Made when the weights are those of the fingerprint."""
        return kept_features(self.state.folder, self.recipe, self.backbone, self._fingerprint, self.runtime)

    def _compile(self) -> None:
        """Turn `run.compile` on, once the model is known to be sound: the first pass through it takes long."""
        wanted = self.recipe.run.compile
        if wanted and (note := compile_blocks(self.backbone, Compiler(None if wanted is True else wanted))):
            warnings.warn(note, stacklevel=3)

    def _shard(self) -> None:
        """With `run.shard`, leave this process its share of the frozen model, before anything lies on the device."""
        if self.recipe.run.shard == "fsdp" and self.runtime.world > 1:
            self.backbone.sharded = shard(self.backbone, self.runtime.device, self.runtime.world)
            if note := self.backbone.sharded.note:
                self.runtime.progress.note(note)

    def _need_others(self) -> None:
        """Raise UsageError if the recipe shares the model out and there is no other process to learn with."""
        if self.recipe.run.shard == "fsdp" and self.runtime.world == 1:
            raise UsageError(ALONE)

    def _model_document(self) -> dict[str, Any]:
        pets = [m for m in self.method.modules() if isinstance(m, PET)]
        today = self.method.model.view.today
        return {
            "spec": self.backbone.spec,
            "examples": self.method.model.view.noun,
            "fingerprint": self._fingerprint,
            "parameters": self._size,
            "trainable_parameters": sum(p.numel() for pet in pets for p in pet.parameters()),
            **({"date": today.isoformat()} if today is not None else {}),
            **({"plain": self._plain} if self._plain is not None else {}),
        }

    # -- learning -------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Learn every task of the recipe's stream that is not learned yet, and return the results document.

        Its parts are shared with later documents of this learner: copy them before you change them.

        Raises:
            UsageError: the recipe has no data.
            Interrupted: a signal asked the run to stop; `resume` continues it.
        """
        stream = self.stream
        count = len(stream.tasks)
        with self._writing(tasks=count):
            for warning in stream.warnings:
                self.runtime.progress.note(warning)
            if self._oracle_note:
                self.runtime.progress.note(self._oracle_note)
            done = len(self.state.committed)
            steps = (self._tasks.of_stream(i, self.state.committed) for i in range(done, count))
            run(self.method, steps, self.state, self._kept)
        return read_results(self.state)

    def learn(
        self,
        data: Data,
        *,
        name: str | None = None,
        holdout: float = 0.2,
        options: Mapping[str, Any] | None = None,
        max_drop: float | None = None,
    ) -> dict[str, Any]:
        """Learn one more batch of data as one task, and return the results document (as `run` does).

        Args:
            data: a folder, manifest, parquet file or dataset id; a `data:` section; a source; or a
                ready-made task. The training data of earlier tasks are not read again. The test data of earlier tasks
                are evaluated if they are still in their place.
            name: the name of the task; by default the name of the folder or file, else `task-N`.
            holdout: the share of the data that is kept for testing if the data have no test split.
            options: further keys of the data section for a path or id, such as `score` or `label_column`.
            max_drop: by how many points an earlier task's test data, or an exam, may fall (`perpetune.gate`). The task
                is learned aside, and becomes part of the state only if no more is lost. None takes the recipe's `gate`.

        Raises:
            Refused: more is lost; it has both results documents. The state is as it was, byte for byte.
        """
        bar = self._bar(max_drop)
        task, document = self._given(data, name, holdout, options)
        with self._writing(gated=bar is not None):
            step = self._tasks.of_update(task, document, self.state.committed, every=bar is not None)
            step = dataclasses.replace(step, gate=bar)
            run(self.method, [step], self.state, self._kept)
            return read_results(self.state)

    def _given(
        self, data: Data, name: str | None, holdout: float, options: Mapping[str, Any] | None
    ) -> tuple[Task, dict[str, Any]]:
        """The task that `learn` is asked to learn, checked, and what is stored of it."""
        if self.method.needs_earlier_data:
            raise UsageError(
                f"method: {self.recipe.method.name} needs the data of all tasks, but an update has the data of its own "
                "task only: use `perpetune run`, or another method"
            )
        if self.recipe.evaluate.oracle:
            raise UsageError(oracle.NO_OLD_DATA)
        index = len(self.state.committed)
        if self.recipe.data is not None and index < (planned := self._planned()):
            raise UsageError(
                f"{self.state.folder} has learned {index} of the {planned} tasks of its stream: "
                f"finish them first with `perpetune resume {self.state.folder}`"
            )
        asked, name = name, self._name(data, name, index)
        if asked and asked != name:
            self.runtime.progress.note(f"the task is called {name}, because '{printable(asked)}' cannot name a folder")
        task, document = self._tasks.given(self._with_options(data, options), index, name, holdout)
        self._admit([task])
        return task, document

    def month(
        self,
        data: str | Path | dict[str, Any] | Source,
        *,
        name: str | None = None,
        holdout: float = 0.2,
        options: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """What `learn` would find in the data; nothing is learned or written. The arguments are those of `learn`.

        Returns:
            Numbers of examples, new and known classes, copies of what was seen, and names that look like another
            spelling of a learned class; see `perpetune.month.month`.
        """
        index = len(self.state.committed)
        name = self._name(data, name, index)
        found = self._tasks.looked_at(self._with_options(data, options), index, name, holdout)
        self._admit([found])
        return month(found, self.state.committed)

    def _with_options(self, data: D, options: Mapping[str, Any] | None) -> D | dict[str, Any]:
        """The data section of a path or id with further keys; other data as they are."""
        if not options:
            return data
        if not isinstance(data, (str, Path)):
            raise UsageError("options need data that are a path or an id; put them into the data section instead")
        return self._tasks.origin(data, options)

    def _bar(self, max_drop: float | None) -> float | None:
        """The bar of an update's gate, in points; None if it has none."""
        if max_drop is None:
            return None if self.recipe.gate is None else self.recipe.gate.max_drop
        if not (math.isfinite(max_drop) and max_drop >= 0):
            raise UsageError(f"max_drop is {max_drop!r}: a number of points is expected, 0 or more")
        return float(max_drop)

    def _admit(self, tasks: Sequence[Task | TaskData]) -> None:
        """Check all tasks before the first one begins; UsageError if the model cannot learn one of them."""
        for task in tasks:
            if captioned(task.train):
                if self.recipe.evaluate.oracle:
                    raise UsageError(
                        f"evaluate.oracle solves a head of classes, and task {task.name} has captions: leave it out"
                    )
                self.method.model.admits_captions(task.name)
            else:
                self.method.model.admits(task.name, task.classes)

    def _name(self, data: Data, asked: str | None, index: int) -> str:
        """The name of an update's task: the requested name in safe characters, or a name that no task has yet."""
        taken = [t.name for t in self.state.committed]
        safe = safe_name(asked or "")
        if safe == START:
            raise UsageError(
                f"a task cannot have the name {START!r}, because `rollback --to {START}` drops all tasks: "
                "choose another --name"
            )
        if safe in taken:
            raise UsageError(f"{self.state.folder} already has a task {safe!r}: choose another --name")
        if not safe and not asked and isinstance(data, (str, Path)):
            path = Path(data).expanduser().resolve()
            own = path.name if path.is_dir() else path.stem if path.is_file() else ""
            return task_names([own], first=index + 1, taken=taken)[0]
        return safe or task_names([""], first=index + 1, taken=taken)[0]

    def forget(self, *, task: str | None = None, class_name: str | None = None) -> dict[str, Any]:
        """Take a task or a class out of the state again, exactly (`perpetune.forgetting`); return the results document.

        What only a rollback to earlier tasks needs goes with it, or it would bring the forgotten back.

        Args:
            task: the name of a task.
            class_name: the name of a class; give one of the two.

        Raises:
            UsageError: there is no such task or class; or it cannot be exact, and the message says what can be done
                instead. The state is as it was.
        """
        if (task is None) == (class_name is None):
            raise UsageError("forget: name a task or a class, one of the two")
        if self.runtime.world > 1:
            raise UsageError("forget: one process is enough")
        if self.recipe.data is not None and len(self.state.committed) < self._planned():
            raise UsageError(f"{self.state.folder} has not learned its stream: `perpetune resume {self.state.folder}`")
        opened = self.state.candidate() or self.state.open_task()
        if opened is not None and forgetting.MARK not in opened["from"]:
            raise UsageError(
                f"task {opened['name']} is not finished: `perpetune resume {self.state.folder}` finishes it first"
            )
        self._leave_halfway()
        asked = forgetting.Asked(task, class_name)
        with self.state.writing():
            if self._learned != self._last():
                raise StateError(f"{self.state.folder} was changed after this learner loaded it: load it again")
            found = forgetting.look_up(self.state, asked)
            self._halfway = True
            forgetting.take_out(self.method, self.state, found)
            self._commit_forgotten(asked, found)
            self._learned, self._halfway = self._last(), False
        return read_results(self.state)

    def _commit_forgotten(self, asked: forgetting.Asked, found: forgetting.Found) -> None:
        """Evaluate what is left, and store it as an entry of its own behind the tasks."""
        tasks, began = self.state.committed, time.perf_counter()
        wanted = [f"forgot-{asked.task or asked.name}"]
        entry = task_names(wanted, first=len(tasks) + 1, taken=[t.name for t in tasks])[0]
        document = forgetting.document(len(tasks), entry, asked, found)
        names, lost = {t.name for t in found.tasks}, set(found.classes)
        self._tasks.forget()
        there = [self._tasks.past(t, lost) for t in tasks if t.name not in names]
        others = [task for task in there if task is not None]
        how = How(AMONG[self.recipe.setting], self.recipe.evaluate.batch_size)
        with self._kept.at_work(self.runtime.device):
            cells = cells_of(measure(self.method, others, how))
        seconds = round(time.perf_counter() - began, 3)
        timings = {"learn_s": 0.0, "evaluate_s": seconds, "images": 0, "peak_memory_bytes": None, "images_per_s": None}
        about = {key: document[key] for key in ("fingerprint", "from")}
        self.state.log("task begun", task=len(tasks), name=entry, **about)
        documents = {"task.json": document, "metrics.json": {"cells": cells}, "timings.json": timings}
        self.state.commit(len(tasks), entry, self.method, documents)
        self._kept.settle()  # features of what was forgotten go, because nothing has asked for them
        self._tasks.forget()

    def resume(self) -> dict[str, Any]:
        """Continue an interrupted `run` or `learn` where it stopped, and return the results document."""
        opened = self.state.candidate() or self.state.open_task()
        if opened is not None and forgetting.MARK in opened["from"]:
            wanted = opened["from"][forgetting.MARK]
            return self.forget(task=wanted.get("task"), class_name=wanted.get("class"))
        if opened is not None and opened["from"] != STREAM:
            if not opened["from"].get("name"):
                raise UsageError(
                    f"the data of task {opened['name']} were a Python object: "
                    "call `Learner.load(...).learn` with it again"
                )
            origin = moved(opened["from"], self._tasks.moved)
            bar = (opened.get("gate") or {}).get("max_drop")
            return self.learn(origin, name=opened["name"], holdout=origin["holdout"], max_drop=bar)
        if self.recipe.data is None:
            if self.runtime.rank == 0:
                with self.state.writing():  # finishes an interrupted commit
                    pass
            return read_results(self.state)
        return self.run()

    @property
    def stream(self) -> Stream:
        """The recipe's stream of tasks."""
        return self._tasks.stream

    def _planned(self) -> int:
        """The number of tasks in the recipe's stream. If the run has begun, it is in the journal, and the data need not
        exist any more."""
        begun = [e["tasks"] for e in self.state.journal() if e["event"] == "run begun" and "tasks" in e]
        return int(begun[-1]) if begun else len(self.stream.tasks)

    @contextlib.contextmanager
    def _writing(self, *, gated: bool = False, **facts: Any) -> Iterator[None]:
        """Lock the state folder for writing; a signal leads to a checkpoint and then a stop.

        Args:
            gated: whether lines of the journal wait until a task is committed.
            facts: further facts of the journal's line.
        """
        self._need_others()
        with contextlib.ExitStack() as stack:
            if self.runtime.rank == 0:
                stack.enter_context(self.state.writing())
                if gated:
                    stack.enter_context(self.state.holding())
                if self._learned != self._last():
                    raise StateError(f"{self.state.folder} was changed after this learner loaded it: load it again")
                device = str(self.runtime.device)
                self.state.log("run begun", versions=dict(versions()), device=device, seed=self.recipe.seed, **facts)
            stack.enter_context(stop_signals(self.runtime))
            results = functools.partial(read_results, self.state)
            stack.enter_context(tracking.tracked(self.recipe, self.runtime, self.state.folder, results))
            self._leave_halfway()
            self._halfway = True
            try:
                yield
                self._halfway = False
            except Interrupted as stop:
                message = f"{stop}; continue with `perpetune resume {self.state.folder}`"
                raise Interrupted(message, stop.signum) from stop
            finally:
                self._learned = self._last()

    def _last(self) -> str:
        tasks = self.state.committed
        return tasks[-1].folder.name if tasks else ""

    def _leave_halfway(self) -> None:
        """If the last task failed or was stopped, restore the method as of the last commit."""
        if self._halfway:
            self._reload()
            self._halfway = False

    def _reload(self) -> None:
        """Restore `method` as of the last commit, or as it was before the first one."""
        tasks = self.state.committed
        if tasks:
            self.state.load(self.method, tasks[-1])
        else:
            restore(self.method, self._new, "a new model")
        self._learned = tasks[-1].folder.name if tasks else ""

    def rehearse(self, folder: Path, cut: Cut) -> None:
        """Go on in another state folder of this recipe, with some examples of each task. It is for estimates.

        Args:
            folder: a copy of this learner's state; or no folder yet, and an empty state is made.
            cut: gives the data that are learned in place of a task's data.
        """
        if not folder.exists():
            State.create(folder, self.recipe, self._model_document())
        self.state = State(folder)
        self._kept = self._kept_features()
        self._tasks = self._tasks.cut(cut)
        self._tasks.moved = self.state.moved()
        self._reload()

    def steps(
        self,
        data: Data | None = None,
        *,
        name: str | None = None,
        holdout: float = 0.2,
        options: Mapping[str, Any] | None = None,
    ) -> Iterator[Step]:
        """The tasks that `run` would learn from now on, or the one of `learn` with these arguments. Each is prepared
        when it is asked for, and `run.learn_task` has to learn it before the next one."""
        if data is None:
            for index in range(len(self.state.committed), len(self.stream.tasks)):
                yield self._tasks.of_stream(index, self.state.committed)
            return
        task, document = self._given(data, name, holdout, options)
        yield self._tasks.of_update(task, document, self.state.committed)

    def learn_step(self, step: Step) -> None:
        """Learn one task of `steps` and commit it, without the lock, the signals and the trackers of `run`."""
        run(self.method, [step], self.state, self._kept)

    def same_recipe(self) -> bool:
        """Whether the folder still holds the recipe and the model that this learner was loaded with."""
        state = State(self.state.folder)
        return state.recipe == self.state.recipe and state.backbone["fingerprint"] == self._fingerprint

    def refresh(self) -> None:
        """Take up what another process has committed to the folder, or has rolled back, since this learner read it.

        No other thread may use the learner meanwhile.

        Raises:
            StateError: the folder cannot be read, such as while it is being changed (call it again), or its recipe or
                model is another one (load it again).
        """
        if not self.same_recipe():
            raise StateError(f"{self.state.folder}: its recipe or its model was changed: load it again")
        self.state = State(self.state.folder)
        self._halfway = True  # until it is complete, nothing may be asked of it
        self._reload()
        self._halfway = False

    # -- using what was learned -----------------------------------------------------------------------

    @torch.no_grad()
    def predict(
        self,
        images: str | Path | Sequence[str | Path | Image] | Tensor,
        *,
        top: int = 5,
        unreadable: list[str] | None = None,
        names: Sequence[str] | None = None,
    ) -> list[Prediction]:
        """Names and probabilities for images. A language model has `answer` instead.

        Args:
            images: a path, several paths or PIL images, or a uint8 tensor `(N, 3, S, S)` with the backbone's size S.
            top: the number of names for each image.
            unreadable: a list that gets one line for each image that cannot be read. Such an image has no prediction.
                Without this list, it is an error.
            names: the classes to choose among, learned or not; for a head that knows classes by their names. It needs
                not have learned anything. None means the learned classes.

        Raises:
            StateError: the learner has not learned anything yet, and there are no names.
            UsageError: the head does not know classes by their names, a name is empty or given twice, or the tensor
                does not have the shape or type that the backbone takes.
            DataError: an image cannot be read; the message names it.
        """
        asked = None if names is None else self._named(names)
        self._need_learned("pictures", first=asked is None)
        images = [images] if isinstance(images, (str, Path)) else images
        size, predictions = self.recipe.evaluate.batch_size, []
        for start in range(0, len(images), size):
            some = self.method.model.view.ask(images[start : start + size], first=start, unreadable=unreadable)
            if not some:
                continue
            scores = self._asked(some) if asked is None else self._asked(some, asked)
            best = scores.float().softmax(1).topk(min(top, scores.shape[1]), dim=1)
            for question, values, rows in zip(some, best.values.tolist(), best.indices.tolist(), strict=True):
                classes = self.method.classes if asked is None else asked
                pairs = [(classes[row], value) for row, value in zip(rows, values, strict=True)]
                predictions.append(Prediction(question.given, pairs))
        return predictions

    def _named(self, names: Sequence[str]) -> list[str]:
        """The names, once it is known that the head can choose among them."""
        model = self.method.model
        if not (model.chooses and model.any_class):
            raise UsageError(
                "names need a head that knows classes by their names: head: text on a backbone of pictures and texts, "
                "such as CLIP"
            )
        found = [name.strip() for name in names]
        if not found or not all(found) or len(set(found)) < len(found):
            raise UsageError(f"names {list(names)}: expected different names, none of them empty")
        return found

    def match(self, images: Sequence[str | Path | Image], texts: Sequence[str]) -> Tensor:
        """How well each text describes each image: cosines `(images, texts)`, with the pets that answer in force.

        It need not have learned anything.

        Raises:
            UsageError: the backbone does not read texts beside pictures, or there is no text.
            DataError: an image cannot be read; the message names it.
        """
        return self._matched(images, texts, None)[1]

    def find(
        self, text: str, images: Sequence[str | Path], *, top: int = 10, unreadable: list[str] | None = None
    ) -> list[tuple[str, float]]:
        """The images that a text describes best: their paths and cosines, the best first. See `match`.

        Args:
            top: how many.
            unreadable: as in `predict`.
        """
        given, scores = self._matched(images, [text], unreadable)
        best = scores[:, 0].topk(min(top, len(given)))
        return [(given[i], value) for i, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)]

    @torch.no_grad()
    def _matched(
        self, images: Sequence[str | Path | Image], texts: Sequence[str], unreadable: list[str] | None
    ) -> tuple[list[str], Tensor]:
        """The names of the images that can be read, and their cosines with the texts."""
        side = self.backbone.texts
        if side is None:
            raise UsageError(f"{self.backbone.spec} reads no texts beside pictures: use a model such as CLIP")
        if not texts:
            raise UsageError("there is no text to compare with")
        self._leave_halfway()
        size, rows, given = self.recipe.evaluate.batch_size, list[Tensor](), list[str]()
        with self.runtime.autocast():
            with using(self.method.model, self.method.answering):
                words = F.normalize(side.of(list(texts)).float(), dim=-1)
            for start in range(0, len(images), size):
                some = self.method.model.view.ask(images[start : start + size], first=start, unreadable=unreadable)
                if not some:
                    continue
                given += [question.given for question in some]
                features = self.backbone.compared(self.method.features(self._batch(some).inputs))
                rows.append(F.normalize(features.float(), dim=-1) @ words.T)
        return given, torch.cat(rows) if rows else words.new_zeros(0, len(texts))

    def _asked(self, questions: Sequence[Question], names: Sequence[str] | None = None) -> Tensor:
        """The method's prediction for some questions, as one batch; among `names` if they are given."""
        inputs = self._batch(questions).inputs
        with self.runtime.autocast():
            return self.method.predict(inputs) if names is None else self.method.among(inputs, names)

    def _batch(self, questions: Sequence[Question]) -> Batch:
        items = [(question.item, 0, number) for number, question in enumerate(questions)]
        return self.method.model.view.collate(items).to(self.runtime.device)

    @torch.no_grad()
    def answer(
        self, prompts: str | Mapping[str, Any] | Sequence[Prompt], *, options: Sequence[str] | None = None
    ) -> list[Answer]:
        """The tuned language model's answers to prompts: a generated text, or the likeliest of some options.

        A model with a head of classes answers with the likeliest of the learned classes.

        Args:
            prompts: one prompt or several. A prompt is a text, or the messages of a chat as (role, content) or
                `{"role": …, "content": …}`. For a vision-language model see also `Prompt`.
            options: the answers among which the model chooses; with None it generates the answer. With a head of
                classes, options are some of the classes, and None means all of them.

        Raises:
            StateError: the learner has not learned anything yet.
            UsageError: the list of options is empty; or an option is empty, is in the list twice, or is not a learned
                class.
            DataError: a prompt cannot be put into the model's format; the message says which.
        """
        self._need_learned("texts")
        chosen = tuple(option.strip() for option in options or ())
        if options is not None and (not all(chosen) or len(set(chosen)) < max(1, len(chosen))):
            raise UsageError(f"options {list(options)}: expected different texts, none of them empty")
        known: dict[str, int] = {}
        if self.method.model.chooses:
            known = {name: row for row, name in enumerate(self.method.classes)}
            chosen = chosen or tuple(known)
            for option in chosen:
                if option not in known:
                    raise UsageError(f"options: {option!r} is not a learned class; {closest(option, known)}")
        several = [prompts] if isinstance(prompts, str | Mapping) else prompts
        questions = self.method.model.view.ask(several, options=chosen, choose=not known)
        size, answers = self.recipe.evaluate.batch_size, []
        for start in range(0, len(questions), size):
            some = questions[start : start + size]
            rows = self._asked(some)
            if known:
                rows = rows[:, [known[option] for option in chosen]]
            for question, row in zip(some, rows, strict=True):
                if not row.is_floating_point():
                    text = question.own(self.method.model.read(row))
                    answers.append(Answer(question.given, text, [], question.cut, question.left_out))
                    continue
                # a class without examples has the score -inf; if all have it, no class gets a probability
                shares = row.float().softmax(0).nan_to_num(0.0).tolist()
                pairs = sorted(zip(question.options, shares, strict=True), key=lambda pair: -pair[1])
                answers.append(Answer(question.given, pairs[0][0], pairs, question.cut, question.left_out))
        return answers

    @torch.no_grad()
    def drift(
        self,
        data: str | Path | Sequence[Any] | Tensor,
        *,
        level: float = 0.05,
        options: Mapping[str, Any] | None = None,
        unreadable: list[str] | None = None,
    ) -> dict[str, Any]:
        """Do examples without labels look like what was learned? If not, an update may be needed.

        Args:
            data: a path of what `predict`, `answer` or `learn` takes, or pictures or prompts. Labels are not looked at.
            level: the share of months like what was learned that may be flagged.
            options: further keys of the data section for a path or id, as in `learn`.
            unreadable: as in `predict`.

        Returns:
            `drift` (yes or no) and both tests, see `perpetune.drifting.compare`; and `tasks`, of how many kept examples
            of each task they were compared with.

        Raises:
            StateError: the learner has not learned anything yet, or keeps too few features of held-out examples.
            DataError: there are too few examples, or one cannot be read.
            UsageError: `level` is none.
        """
        drifting.check_level(level)
        self._need_learned()
        view, size = self.method.model.view, self.recipe.evaluate.batch_size
        known = self._known()
        given = unlabelled(data, view, self.runtime.progress.note, options)
        chosen = drifting.some(len(given), "new")
        if len(chosen) < len(given):
            self.runtime.progress.note(f"{len(chosen)} of {len(given)} {view.noun} are compared, drawn at random")
        names, parts = list[str](), list[Tensor]()
        for start in range(0, len(chosen), size):
            some, batch = given.batch(chosen[start : start + size], unreadable)
            if batch is not None:
                names += some
                parts.append(self._compared(batch.to(self.runtime.device)))
        every = torch.cat(list(known.values())) if known else torch.zeros(0, 1)
        new = torch.cat(parts) if parts else every[:0]
        found = drifting.compare(every[drifting.some(len(every), "known")], new, names, level, view.noun)
        return {**found, "tasks": {name: len(rows) for name, rows in known.items()}}

    def _compared(self, batch: Batch) -> Tensor:
        """Features of a batch, as they are compared with kept ones."""
        with self.runtime.autocast():
            return drifting.projected(F.normalize(self.method.features(batch.inputs).float(), dim=-1).cpu())

    def _known(self) -> dict[str, Tensor]:
        """What is kept of the features of each task, by its name, of tasks whose features are as they were. Of others
        they are computed again, if their test data are still there."""
        tasks, known = self.state.committed, dict[str, Tensor]()
        for task in tasks:
            if task.gone:
                continue
            kept, moved = drifting.stored(task), drifting.moved(task, tasks[-1])
            still = moved <= drifting.MOVED if moved is not None else not self.method.trained
            if kept is None or still:
                known |= {} if kept is None else {task.name: kept}
                continue
            past = self._tasks.past(task)
            rows = probe_rows(len(past.test), SAMPLE) if past is not None and past.test is not None else []
            if past is None or not rows:
                how = "nobody knows how far" if moved is None else f"by {moved:.2f}"
                self.runtime.progress.note(
                    f"task {task.name} is not compared with: its features have moved since it was learned ({how}), and "
                    "its test data are gone"
                )
                continue
            features = probe(self.method, past, rows)
            known |= {} if features is None else {task.name: drifting.projected(features)}
        return known

    def evaluate(
        self, data: str | Path | Source | None = None, *, options: Mapping[str, Any] | None = None
    ) -> dict[str, dict[str, Any] | None]:
        """The counts of right answers for each learned task on its test data, or on `data`.

        Args:
            data: labelled data; their test split is used, or all of them if there is none.
            options: further keys of the data section for a path or id, as in `learn`.

        Raises:
            StateError: the learner has not learned anything yet.
            UsageError: options without a path or id.
        """
        if options and not isinstance(data, (str, Path)):
            raise UsageError("options need data that are a path or an id")
        self._need_learned()
        setting, size = self.recipe.setting, self.recipe.evaluate.batch_size
        if data is None:
            tasks = {c.name: self._tasks.past(c) for c in self.state.committed if not c.gone}
            for name, task in tasks.items():
                if task is not None and not (task.test is not None and len(task.test)):
                    self.runtime.progress.note(f"task {name} is not evaluated, it was learned without test data")
        else:
            given = self._tasks.whole(data, options)
            self._note_unknown(given)
            tasks = {str(data): given}
        there = [task for task in tasks.values() if task is not None]
        with self._kept.at_work(self.runtime.device):
            asked = iter(ask(self.method, there, How(AMONG[setting], size)))
        return {name: next(asked).cell if task is not None else None for name, task in tasks.items()}

    def _note_unknown(self, task: Task) -> None:
        """Say which classes of `task` no answer can name, because they were never learned."""
        if not self.method.model.chooses or self.method.model.any_class:
            return
        known = set(self.method.classes)
        unknown = [name for name in task.classes if name not in known]
        if unknown:
            count = sum(task.classes[target] not in known for target in (task.test.targets if task.test else ()))
            self.runtime.progress.note(
                f"{len(unknown)} of {len(task.classes)} classes were never learned, so none of their {count} test "
                f"examples can be right: {several(unknown)}"
            )

    def _need_learned(self, takes: str | None = None, *, first: bool = True) -> None:
        """Raise an error if the model takes another kind of examples, or (with `first`) has learned nothing yet."""
        self._leave_halfway()
        kind = self.backbone.takes
        if takes is not None and takes != kind and (takes, kind) != ("texts", "pictured"):
            call = self.method.model.view.verb
            raise UsageError(f"{self.recipe.backbone.name} takes {kind}, not {takes}: call `{call}`")
        if first and not self.state.committed:
            raise StateError(f"{self.state.folder} has learned nothing yet: use `perpetune update` or `run` first")

    def export(
        self, folder: str | Path, *, to: str = "peft", images: str | Path | Sequence[str | Path] | None = None
    ) -> list[Path]:
        """Write what was learned for other programs, with a model card. docs/export.md describes the files.

        Args:
            folder: where to write; it must not exist, or be empty.
            to: `peft`, the adapter and the head; `merged`, a whole model of transformers or timm; `onnx`, one
                graph from pixels to scores, for pictures.
            images: files or folders of pictures, with which what is written is checked; None takes scikit-learn's
                handwritten digits.

        Returns:
            The paths of the written files.

        Raises:
            StateError: the learner has not learned anything yet.
            UsageError: the model cannot have this form; the message names one that works.
            PerpetuneError: what was written does not answer as the state does; it is not kept.
        """
        from perpetune.export import card_of, export_learned, pictures_for

        self._need_learned()
        pictures = None
        if images is not None:
            view = self.method.model.view
            if not isinstance(view, PictureView):
                raise UsageError(f"--images is for pictures, and {self.recipe.backbone.name} takes {view.noun}")
            pictures = pictures_for(view, [images] if isinstance(images, str | Path) else images)
        card = card_of(self.backbone, read_results(self.state), date.today())
        return export_learned(
            self.method, self.backbone, Path(folder), self.state.folder, to=to, pictures=pictures, card=card
        )

    def save(self, folder: str | Path) -> Path:
        """Copy the state folder to `folder`, which must not exist."""
        folder = Path(folder)
        if folder.exists():
            raise UsageError(f"{folder} already exists: choose another folder")
        aside = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(self.state.folder, aside)
        aside.rename(folder)
        return folder


def stopping_signals() -> list[int]:
    """The signals that ask a run to stop; without SIGHUP if it is ignored (under nohup) or unknown (on Windows)."""
    hangup = getattr(signal, "SIGHUP", None)
    heard = hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([hangup] if hangup is not None and heard else [])]


@contextlib.contextmanager
def stop_signals(runtime: Runtime) -> Iterator[None]:
    """In this context, SIGTERM, SIGINT and SIGHUP ask the run to stop at the next step; a second one acts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    before: dict[int, Any] = {number: signal.getsignal(number) for number in stopping_signals()}

    def ask(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(number, before[number] or signal.SIG_DFL)

    for number in before:
        signal.signal(number, ask)
    runtime.stopping = lambda: received[0] if received else None
    try:
        yield
    finally:
        runtime.stopping = lambda: None
        for number, handler in before.items():
            signal.signal(number, handler)

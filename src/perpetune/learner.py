"""`Learner`, the main class of the library: a recipe's model together with its state folder."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

from perpetune import forgetting, oracle, tracking
from perpetune.answers import Answer, Prediction, Prompt
from perpetune.build import build_backbone
from perpetune.data.names import printable, safe_name, task_names
from perpetune.data.sources import Source
from perpetune.data.stream import Stream
from perpetune.data.tasks import TaskData
from perpetune.errors import Interrupted, StateError, UsageError
from perpetune.evaluate import AMONG, How
from perpetune.models.sharded import ALONE
from perpetune.month import month
from perpetune.pets import PET
from perpetune.recipe import Recipe, load_recipe, make_recipe
from perpetune.results import read_results, versions
from perpetune.run import cells_of, measure, run
from perpetune.runtime import Progress
from perpetune.sequence import STREAM, Cut, Data, moved
from perpetune.state import START, Pruned, State
from perpetune.step import Step
from perpetune.stopping import stop_signals
from perpetune.tasks import Task, captioned
from perpetune.trained import Trained, mark_of

__all__ = ["Answer", "Learner", "Prediction", "Prompt"]

D = TypeVar("D")


class Learner(Trained):
    """Keeps tuning one pretrained model as data arrive.

    Args:
        recipe: a `Recipe`, a mapping of its keys, the name of a packaged recipe, or a YAML file.
        folder: the state folder to make; it must not exist yet. None makes a temporary one; `save` copies it.
        progress: shows the progress; by default nothing is shown.

    Raises:
        UsageError: the recipe or the folder cannot be used.
        DataError: the recipe's data cannot be used.
    """

    _temporary: tempfile.TemporaryDirectory[str] | None = None

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
            backbone = build_backbone(recipe, state.backbone.get("plain"))
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
        tracking.check(recipe.run.track)
        super()._build(recipe, progress, device, document)
        self._oracle_note = oracle.check(recipe, self.method) if recipe.evaluate.oracle else None
        if recipe.evaluate.future and self.method.model.chooses and not self.method.model.any_class:
            raise UsageError(
                f"evaluate.future asks about classes that are not learned yet, and head: {recipe.head.name} knows only "
                "those that it has learned: use a head that reads the names of classes, or leave evaluate.future out"
            )

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

    def _last(self) -> tuple[str, str]:
        return mark_of(self.state.committed)

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

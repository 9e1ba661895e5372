"""The tasks that a state learns: those of its recipe's stream, those that updates bring, and what is left of
earlier ones to test on."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from perpetune import registry
from perpetune.build import build_data
from perpetune.data.examples import TableSet, View
from perpetune.data.guess import guess_source
from perpetune.data.names import alike, several
from perpetune.data.overlap import Overlap
from perpetune.data.reference import reference_examples
from perpetune.data.sketch import ALL, Samples, packed, whole
from perpetune.data.sources import Kind, Source, Table
from perpetune.data.stream import Stream, StreamOptions, single_task
from perpetune.data.tasks import TaskData
from perpetune.errors import DataError, UsageError
from perpetune.exams.base import Exam, Suite
from perpetune.plain import names_in
from perpetune.recipe import Recipe
from perpetune.runtime import Runtime
from perpetune.state import Accumulated, Committed
from perpetune.step import Step
from perpetune.tasks import Examples, Task

ASKED = 16
"""The most earlier tasks that are asked after an update under `evaluate.earlier: auto`."""
FEW = 3
"""If the data of more earlier tasks are not there any more, one line says it of all."""
Data = str | Path | dict[str, Any] | Source | Task
Cut = Callable[[TaskData], TaskData]
Origin = dict[str, Any]  # where the data of an update came from: a data section and its holdout
STREAM = "stream"  # and of a run: the recipe's stream


class _Earlier:
    """What an update asks of all earlier tasks."""

    def __init__(self) -> None:
        self.classes: dict[str, None] = {}
        """Those that are known, in the order in which they were learned."""
        self.samples = Samples()
        self.alike: dict[str, list[str]] = {}
        """By the fingerprint of data the tasks that have learned such."""
        self.tested: list[tuple[int, str]] = []
        """Numbers and names of tasks with test data."""

    def add(self, committed: Committed) -> None:
        if committed.gone:
            return
        task, name = committed.task(), committed.name
        self.classes.update(dict.fromkeys(committed.classes()))
        self.alike.setdefault(task["fingerprint"], []).append(name)
        if contents := task.get("contents"):
            self.samples.add(name, contents)
        if task["test"]:
            self.tested.append((committed.index, name))


def _add_asked(asked: dict[str, int], committed: Committed) -> None:
    """Add the tasks that were asked after one: by the name of each, the number of the task after which it was last."""
    asked.update(dict.fromkeys(committed.parsed("metrics.json")["cells"], committed.index))


class TaskSequence:
    """Prepares tasks for `perpetune.run`; examples are checked when a task is asked for, once.

    Args:
        recipe: its `data:` and `stream:` sections say where tasks come from and how they are cut.
        view: says how pictures or texts are prepared.
        runtime: handed on with every task; told of everything that is left out.
        keeps_data: whether tasks bring all earlier ones along, as the upper bounds need.
        cut: gives the data that are learned in place of a task's data: for an estimate, some of its examples.
    """

    def __init__(self, recipe: Recipe, view: View, runtime: Runtime, *, keeps_data: bool, cut: Cut | None = None):
        self._cut = cut
        self.recipe, self.view, self.runtime, self.keeps_data = recipe, view, runtime, keeps_data
        self._stream: Stream | None = None
        self._whole: Stream | None = None  # where examples were cut off, the stream before that
        self._reference: tuple[TableSet, list[str]] | None = None
        self._tasks: dict[int, Task] = {}
        self._tests: dict[int, Task] = {}  # earlier tasks of which only the test is to be used
        self._files: dict[int, dict[str, bytes]] = {}  # what is stored with an update's task
        self._prepared: dict[int, float] = {}  # seconds that it took to prepare an update's task
        self._told = False  # whether a line has said that not all earlier tasks are asked
        self._tested = Overlap()  # the test examples of tasks that were asked
        self._rows: dict[int, tuple[str, Table, Sequence[int]]] = {}  # and whose they are
        self._missing: list[tuple[Committed, str]] | None = None  # tasks whose data are gone, and lines to be told
        self._earlier = Accumulated(_Earlier, _Earlier.add)
        self._asked_last = Accumulated(dict[str, int], _add_asked)

    @property
    def stream(self) -> Stream:
        """The recipe's stream of tasks."""
        if self._stream is None:
            self._stream = build_data(self.recipe, self.view)
        return self._stream

    def cut(self, cut: Cut) -> TaskSequence:
        """A new sequence of the same tasks, each with some of its examples. The data are not looked for again."""
        new = TaskSequence(self.recipe, self.view, self.runtime, keeps_data=self.keeps_data, cut=cut)
        new._reference = self._reference
        if self.recipe.data is not None:
            new._whole = stream = self._whole or self.stream
            new._stream = dataclasses.replace(stream, tasks=[cut(data) for data in stream.tasks])
        return new

    def of_stream(self, index: int, committed: Sequence[Committed]) -> Step:
        """Task `index` of the recipe's stream, evaluated on those `committed` too."""
        began = self.runtime.clock()
        step = self._step_of_stream(index, committed)
        return dataclasses.replace(step, prepared=self.runtime.clock() - began)

    def _step_of_stream(self, index: int, committed: Sequence[Committed]) -> Step:
        task, data = self._of_stream(index), self._checked(self.stream.tasks[index])
        others = [t for t in (self.past(c) for c in committed) if t is not None]
        future = self.recipe.evaluate.future
        if self.recipe.setting == "domain" and not future and index + 1 < len(self.stream.tasks):
            others.append(self._of_stream(index + 1))  # its accuracy before it is learned: forward transfer
        warnings = self.stream.warnings if index == 0 else []
        document = _document(task, STREAM, data.fingerprint, data.bad, warnings)
        first, last = (self._first(index), self._names(index)), index + 1 == len(self.stream.tasks)
        step = Step(task, others, document, *first, self._seen(index), self.exams, last=last)
        if not future:
            return step
        ahead = [self._of_stream(i) for i in range(index + 1, len(self.stream.tasks))]
        classes = {t.name: self._of_stream(i).classes for i, t in enumerate(self.stream.tasks)}
        return dataclasses.replace(step, ahead=ahead, future=classes)

    def _seen(self, index: int) -> list[Task]:
        """The tasks up to `index` with their training data, where the oracle head is to be solved on them after it."""
        wanted, last = self.recipe.evaluate.oracle, index + 1 == len(self.stream.tasks)
        return [self._of_stream(i) for i in range(index + 1)] if wanted is True or (wanted and last) else []

    def given(self, data: Data, index: int, name: str, holdout: float) -> tuple[Task, dict[str, Any]]:
        """The task that an update brings, and what is stored of it; `data` and `holdout` as in `Learner.learn`."""
        began = self.runtime.clock()
        found = self._given(data, index, name, holdout)
        self._prepared[index] = self.runtime.clock() - began
        return found

    def _given(self, data: Data, index: int, name: str, holdout: float) -> tuple[Task, dict[str, Any]]:
        if isinstance(data, Task):
            parts: tuple[object, ...] = (data.train, data.validation, data.test)
            for part in parts:
                if not isinstance(part, Examples | None):
                    kind = type(part).__name__
                    raise UsageError(f"task {data.name}: {kind} is not derived from perpetune.Examples")
            task = dataclasses.replace(data, index=index, name=name, earlier=None, runtime=self.runtime)
            fingerprint = hashlib.sha256(repr(list(task.train.targets)).encode()).hexdigest()
            document = _document(task, {"name": None}, fingerprint, [], [])
        else:
            source, origin = self._source_of(data, holdout)
            found = self._single(source, index, name, holdout)
            found = self._checked(found if self._cut is None else self._cut(found))
            whole_of = packed(found.hashes.values()) if found.hashes is not None else None
            self._files[index] = {ALL: whole_of} if whole_of is not None else {}
            task = self._as_task(found)
            document = _document(task, origin, found.fingerprint, found.bad, found.warnings)
            if found.contents is not None:
                document["contents"] = found.contents
        self._tasks[index] = task
        return task, document

    def _source_of(self, data: str | Path | dict[str, Any] | Source, holdout: float) -> tuple[Source, Origin]:
        origin: Origin = data if isinstance(data, dict) else {} if isinstance(data, Source) else self.origin(data)
        origin = {**origin, "holdout": holdout}
        return (data if isinstance(data, Source) else source_of(origin)), origin

    def looked_at(self, data: str | Path | dict[str, Any] | Source, index: int, name: str, holdout: float) -> TaskData:
        """The data that an update would learn, checked; nothing is learned of them."""
        return self._checked(self._single(self._source_of(data, holdout)[0], index, name, holdout))

    def of_update(
        self, task: Task, document: dict[str, Any], committed: Sequence[Committed], *, every: bool = False
    ) -> Step:
        """What `given` prepared, evaluated on the tasks `committed` too, whose test pictures it should not hold.

        Args:
            every: ask every earlier task, also where others would have to wait for their turn.
        """
        began = self.runtime.clock()
        step = self._step_of_update(task, document, committed, every)
        return dataclasses.replace(step, prepared=self._prepared[task.index] + self.runtime.clock() - began)

    def _step_of_update(
        self, task: Task, document: dict[str, Any], committed: Sequence[Committed], every: bool
    ) -> Step:
        earlier = self._earlier.of(committed)
        others, unasked = self._others(committed, earlier, every)
        known = earlier.classes
        found = [*_again(task, document, earlier), *_alike_before(task, known), *self._leaks(task, others)]
        for warning in found:
            self.runtime.progress.note(warning)
        for line in _new_classes(task, known):
            self.runtime.progress.note(line)
        document = {**document, "warnings": [*document["warnings"], *found]}
        first = self._first(task.index), self._names(task.index)
        files = self._files.get(task.index, {})
        step = Step(task, others, document, *first, exams=self.exams, unasked=unasked, files=files)
        if not self.recipe.evaluate.future:
            return step
        classes = {c.name: c.classes() for c in committed if not c.gone}
        return dataclasses.replace(step, future={**classes, task.name: task.classes})

    def _others(self, committed: Sequence[Committed], earlier: _Earlier, every: bool) -> tuple[list[Task], int]:
        """The earlier tasks that are asked after an update, as far as their test data are there, and how many others
        have to wait."""
        if every or self.recipe.evaluate.earlier != "auto" or len(committed) <= ASKED:
            return self._still_there(committed, len(committed)), 0
        tested, asked = len(earlier.tested), self._asked_last.of(committed)
        turns = sorted((asked.get(name, -1), index) for index, name in earlier.tested)
        found = self._still_there((committed[index] for _, index in turns), ASKED)
        unasked = tested - len(found)
        if unasked and not self._told:
            self._told = True
            self.runtime.progress.note(
                f"{len(found)} of {tested} earlier tasks are asked after each update from now on, those that were "
                "asked the longest time ago (evaluate.earlier: auto; `all` asks all)"
            )
        return sorted(found, key=lambda task: task.index), unasked

    def _still_there(self, committed: Iterable[Committed], most: int) -> list[Task]:
        """The first of some earlier tasks whose test data are still there; if many are not, one line says so."""
        found, self._missing = list[Task](), []
        try:
            for one in committed:
                if len(found) == most:
                    break
                if len(self._missing) >= FEW and self._vanished(one):  # to look for data takes a hundred times as long
                    self._missing.append((one, ""))
                elif (task := self.past(one)) is not None:
                    found.append(task)
        finally:
            missing, self._missing = self._missing, None
        if len(missing) <= FEW:
            lines = [line for _, line in missing]
        else:
            names = several([task.name for task, _ in sorted(missing, key=lambda one: one[0].index)])
            lines = [f"{len(missing)} earlier tasks are not evaluated: {names}; for example, {missing[0][1]}"]
        for line in lines:
            self.runtime.progress.note(line)
        return found

    def _vanished(self, committed: Committed) -> bool:
        """Whether the data of an update were in a folder or file that is not there any more."""
        origin = None if committed.gone else moved(committed.task()["from"], self.moved)
        path = origin.get("path") if isinstance(origin, dict) else None
        return isinstance(path, str) and os.path.isabs(path) and not os.path.exists(path)

    def _miss(self, committed: Committed, line: str) -> None:
        """Say that an earlier task is not evaluated: now, or with the others that are asked for."""
        if self._missing is None:
            self.runtime.progress.note(line)
        else:
            self._missing.append((committed, line))

    @property
    def reference(self) -> tuple[TableSet, list[str]] | None:
        """The recipe's reference pictures, with a line for each that cannot be read; None where it names none."""
        reference = self.recipe.protect.reference if self.recipe.protect else None
        if reference is not None and reference.path is not None and self._reference is None:
            self._reference = reference_examples(reference.path, self.view, self.recipe.stream)
        return self._reference

    def _names(self, index: int) -> list[str]:
        """The names whose texts are protected before task `index`: those of the reference, before the first."""
        reference = self.recipe.protect.reference if self.recipe.protect else None
        if index > 0 or reference is None or reference.weights:
            return []
        if reference.texts is not None:
            return names_in(reference.texts, "protect.reference.texts")
        vocabulary: str | list[str] = self.recipe.head.options.get("vocabulary") or []
        return names_in(vocabulary, "head: the vocabulary")

    def _first(self, index: int) -> TableSet | None:
        """What is protected before task `index`: reference pictures, before the first."""
        if index > 0 or self.reference is None:
            return None
        pictures, bad = self.reference
        for reason in bad:
            self.runtime.progress.note(f"protect.reference: left out, {reason}")
        return pictures

    @cached_property
    def exams(self) -> list[Exam]:
        """The exams of the recipe, whose data are looked at once.

        Raises:
            UsageError: two exams of one name, or data that are not there.
        """
        taken: dict[str, Exam] = {}
        for name, section in self.recipe.exams.items():
            options = registry.options("exams", section.name, section.options)
            suite: Suite = registry.find("exams", section.name)(**options)
            for exam in suite.exams(name, self._opened):
                if exam.name in taken:
                    raise UsageError(f"exams: two are called {exam.name!r}; each needs a name of its own")
                taken[exam.name] = dataclasses.replace(exam, task=self._asked(exam))
        return list(taken.values())

    def _opened(self, source: str | Mapping[str, Any]) -> Task:
        return self.whole(source if isinstance(source, str) else source_of(dict(source)))

    def _asked(self, exam: Exam) -> Task:
        if exam.task.test is None or not len(exam.task.test):
            raise UsageError(f"exam {exam.name}: there is nothing to ask, for its task has no test data")
        return dataclasses.replace(exam.task, runtime=self.runtime)

    def whole(self, data: str | Path | Source, options: Mapping[str, Any] | None = None) -> Task:
        """All of `data` as something to evaluate on: its test split, or everything where there is none.

        Args:
            data: where it is.
            options: further keys of the data section for a path or id.
        """
        source = data if isinstance(data, Source) else source_of(self.origin(data, options))
        limits = dict.fromkeys(("train_per_class", "test_per_class", "train_per_task", "test_per_task"))
        everything = {"validation": 0.0, **limits, "augment": "none"}
        found = self._single(source, 0, "given", 0.0, self.recipe.stream.model_copy(update=everything))
        task = self._as_task(self._checked(found, found.classes if found.test else None))
        return dataclasses.replace(task, test=task.test or task.train)

    def past(self, committed: Committed, without: Collection[str] = ()) -> Task | None:
        """An earlier task as far as its test data are still there, and what they were.

        Args:
            without: classes that are being forgotten.
        """
        index = committed.index
        if committed.gone:
            return None
        if index in self._tasks:
            return self._tasks[index]
        if index not in self._tests:
            document = committed.task()
            known = [name for name in committed.classes() if name not in without]
            if document["classes"] and not known:
                return None
            origin = moved(document["from"], self.moved)
            if origin != STREAM and not origin.get("name"):
                self._miss(committed, f"task {committed.name} is not evaluated, it was given as a Python object")
                return None
            try:
                if origin == STREAM:
                    found = self.stream.tasks[index] if index < len(self.stream.tasks) else None
                else:
                    found = self._single(source_of(origin), index, committed.name, origin["holdout"], fresh=False)
                if found is None or found.fingerprint != document["fingerprint"]:
                    where = self._place(origin)
                    line = f"task {committed.name} is not evaluated: its data at {where} changed since it was learned"
                    self._miss(committed, line)
                    return None
                found = self._checked(found, known)
            except (DataError, UsageError) as error:
                self._miss(
                    committed,
                    f"task {committed.name} is not evaluated, its data are gone: {error}; if they "
                    "lie elsewhere now, say where: `perpetune relocate STATE --data OLD=NEW`",
                )
                return None
            self._tests[index] = dataclasses.replace(self._as_task(found), name=committed.name)
        return self._tests[index]

    def forget(self) -> None:
        """Drop what was prepared of earlier tasks: some of it was forgotten."""
        self._tasks, self._tests = {}, {}

    moved: Sequence[tuple[str, str]] = ()
    """Beginnings of paths of tasks' data that have changed since they were learned, as they were and as they are."""

    def _leaks(self, task: Task, others: Sequence[Task]) -> list[str]:
        """A warning where examples that `task` trains on are among the test examples of the others, or of tasks that
        were asked before in this process."""
        train = task.train
        if self.recipe.stream.check == "none" or not isinstance(train, TableSet):
            return []
        for other in others:
            if isinstance(other.test, TableSet) and other.index not in self._rows:
                self._rows[other.index] = other.name, other.test.table, other.test.rows
                self._tested.add(other.test.table, other.test.rows)
        found = [
            f"{train.table.name(mine)} = {table.name(row)} (task {self._owner(table, row)})"
            for mine, (table, row) in self._tested.find(train.table, train.rows)
        ]
        if not found:
            return []
        return [f"task {task.name} trains on {len(found)} test {train.table.noun}s of earlier tasks: {several(found)}"]

    def _owner(self, table: Table, row: int) -> str:
        return next(name for name, its, rows in self._rows.values() if its is table and row in rows)

    def _of_stream(self, index: int) -> Task:
        if index not in self._tasks:
            self._tasks[index] = self._as_task(self._checked(self.stream.tasks[index]))
        task = self._tasks[index]
        if self.keeps_data:
            task = dataclasses.replace(task, earlier=tuple(self._of_stream(i) for i in range(index)))
        return task

    def origin(self, data: str | Path, options: Mapping[str, Any] | None = None) -> Origin:
        """The data section that a path or id stands for, with further keys of it; the key `name` names the reader."""
        return origin_of(data, self.view.takes, options)

    def _place(self, origin: Origin | str) -> str:
        """Where data came from, for messages."""
        if isinstance(origin, dict):
            return str(origin.get("path", origin["name"]))
        data = self.recipe.data
        return str(data.options.get("path", data.name)) if data else "its stream"

    def _single(
        self,
        source: Source,
        index: int,
        name: str,
        holdout: float,
        options: StreamOptions | None = None,
        fresh: bool = True,
    ) -> TaskData:
        options, seed, view = options or self.recipe.stream, self.recipe.seed, self.view
        return single_task(source, options, view, index=index, name=name, seed=seed, holdout=holdout, fresh=fresh)

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
        sets = (data.train, data.validation, data.test)
        return Task(data.index, data.name, data.classes, *sets, score=data.score, runtime=self.runtime)


def moved(value: Any, changes: Sequence[tuple[str, str]]) -> Any:
    """A data section, or any part of one, with each path that begins with an old place put into the new one."""
    if isinstance(value, dict):
        return {key: moved(part, changes) for key, part in value.items()}
    if isinstance(value, list):
        return [moved(part, changes) for part in value]
    for old, new in changes if isinstance(value, str) else ():
        if value == old or value.startswith(old.rstrip("/\\") + os.sep):
            value = new + value[len(old) :]
    return value


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


def _again(task: Task, document: dict[str, Any], earlier: _Earlier) -> list[str]:
    """A warning where the same data were learned before, however they were cut into training and test data."""
    if document["from"] == {"name": None}:  # of a Python object only the targets are known
        return []
    known, new = earlier.samples.sketches, document.get("contents")
    found = earlier.samples.learned_before(new) if new else None
    if new and found:
        (share, names), noun = found, task.train.table.noun if isinstance(task.train, TableSet) else "example"
        exact = whole([new, *(known[name] for name in names)])
        much = f"{share * new['count']:.0f} of {new['count']}" if exact else f"about {share:.0%} of the"
        return [f"task {task.name} learns again: {much} {noun}s were learned before, as task {several(names)}"]
    same = earlier.alike.get(document["fingerprint"], [])
    same = [name for name in same if not new or name not in known]  # else the contents are others
    return [f"data of the same names, labels and sizes were learned before, as task {several(same)}"] if same else []


def _alike_before(task: Task, known: Collection[str]) -> list[str]:
    """A warning where a class of the task is nearly called like one that was learned."""
    new = [name for name in task.classes if name not in known]
    pairs = alike(new, known) if new else []
    return [f"task {task.name} has new classes nearly called like earlier ones: {several(pairs)}"] if pairs else []


def _new_classes(task: Task, known: Collection[str]) -> list[str]:
    """A line that lists the classes that come with a later task; none where there is none."""
    new = [name for name in task.classes if name not in known]
    return [f"task {task.name} brings new classes: {several(new, 20)}"] if new and known else []


def origin_of(data: str | Path, wanted: Kind | None = None, options: Mapping[str, Any] | None = None) -> Origin:
    """The data section for a path or id; a path is made absolute, so that a later call finds it.

    What the path holds is not asked where the key `name` of the `options` says it.
    """
    if not str(data).strip():
        raise UsageError("data: the path is empty; a folder, manifest, parquet file or data set id is expected")
    path = Path(data).expanduser()
    place = str(path.resolve() if path.exists() else data)
    given = dict(options or {})
    if "name" in given:
        return {"path": place, **given}
    name, found = guess_source(place, registry.every("data"), wanted)
    return {"name": name, **found, **given}


def source_of(origin: Origin) -> Source:
    """The source that a data section names."""
    given = {k: v for k, v in origin.items() if k not in ("name", "holdout")}
    source: Source = registry.find("data", origin["name"])(**registry.options("data", origin["name"], given))
    return source

"""Cut a source into a stream of tasks: choose the classes and the examples of each task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from perpetune.data.check import Depth, contradicting, find_twins, one_file
from perpetune.data.examples import Augment, View
from perpetune.data.names import alike, natural, several, task_names
from perpetune.data.overlap import find_overlap
from perpetune.data.sources import Kind, Source, Table
from perpetune.data.split import by_label, given_order, hold_out, in_tasks, limit, seeded_order
from perpetune.data.tasks import TaskData
from perpetune.errors import DataError, UsageError

__all__ = ["Stream", "StreamOptions", "TaskData", "build_stream", "single_task"]


class StreamOptions(BaseModel):
    """How a source is cut into tasks: the recipe's keys under `stream:`.

    Attributes:
        by: `class` makes tasks of `classes_per_task` classes; `domain` or `task` makes one task for each domain or task
            that the source names. Default: `class` for pictures, `task` for texts and for pictures with captions, which
            cannot be cut by class.
        classes_per_task: one number for all tasks (the last task may be smaller), or a list with one for each task.
        class_order: `seeded` draws the order by the seed, `sorted` sorts by name, a list names the classes in their
            order and leaves the others out. With `seeded`, classes keep their order when other classes come or go. If
            tasks are not cut by class, this orders the classes inside each task, and `seeded` sorts by name.
        order: the order of domains or tasks: a list of names (the others are left out), or `seeded` to draw it by the
            seed. Default: the order of the benchmark, if the source is one, else by name.
        validation: the share of each class's training examples that is cut off for validation (`task.validation`), for
            methods that choose something by it. The built-in methods do not. If the source has validation examples, as
            TRACE has, nothing is cut off.
        holdout: the share of the training examples that becomes the test, if the source has no test examples.
        train_per_class, test_per_class: the largest number of examples of a class in a task; the seed draws them. The
            limit comes before validation is cut off. A source's own validation examples have the limit of the test.
        train_per_task, test_per_task: the largest number of examples of a task, balanced over its classes if it has
            classes.
        max_bad: if a task has more bad examples than this, the run stops.
        check: how bad examples are found before a task begins. `decode` decodes every picture and encodes every text;
            `header` reads only the headers of pictures and the rows of texts; `none` checks nothing.
        overlap: whether it is an error or a warning if a file is in train and in test, or has a copy with the same
            bytes there. Copies are searched unless `check` is `none`. For data that are not single files it is always a
            warning.
        augment: the random changes to a picture each time it is trained on. Texts are never changed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    by: Literal["class", "domain", "task"] | None = None
    classes_per_task: PositiveInt | Annotated[list[PositiveInt], Field(min_length=1)] | None = None
    class_order: Literal["seeded", "sorted"] | list[str] = "seeded"
    order: Literal["seeded"] | list[str] | None = None
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.0
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    train_per_class: PositiveInt | None = None
    test_per_class: PositiveInt | None = None
    train_per_task: PositiveInt | None = None
    test_per_task: PositiveInt | None = None
    max_bad: Annotated[int, Field(ge=0)] = 10
    check: Depth = "decode"
    overlap: Literal["error", "warn"] = "error"
    augment: Augment = "none"

    def fitted(self, gives: Kind, classed: bool = True) -> StreamOptions:
        """The same options for one kind of data, with its default for `by`.

        Args:
            gives: the kind.
            classed: whether pictures have classes (`Source.classed`).

        Raises:
            UsageError: an option does not exist for this kind.
        """
        if gives == "pictures" and classed:
            return self.model_copy(update={"by": self.by or "class"})
        if gives == "pictures":
            if self.by == "class" or self.classes_per_task is not None or not isinstance(self.class_order, str):
                raise UsageError("stream: these pictures have captions and no classes; cut them by task or domain")
            return self.model_copy(update={"by": self.by or "task"})
        if self.by == "class":
            raise UsageError("stream.by: class works with pictures only; cut texts by task or domain")
        if self.classes_per_task is not None:
            raise UsageError("stream.classes_per_task works with pictures only; cut texts by task or domain")
        if not isinstance(self.class_order, str):
            raise UsageError("stream.class_order works with pictures only; order texts with stream.order")
        if self.augment != "none":
            raise UsageError(f"stream.augment: {self.augment} works with pictures only; texts are never changed")
        return self.model_copy(update={"by": self.by or "task"})


@dataclass(frozen=True)
class Stream:
    """Tasks in the order of learning.

    Attributes:
        tasks: the tasks.
        classes: all classes, in the order of their first task.
        warnings: one line each. The warnings of `TaskData.check` are in the task.
    """

    tasks: list[TaskData]
    classes: tuple[str, ...]
    warnings: list[str]


@dataclass(frozen=True)
class _Tables:
    """The tables of a source; all have the same kind of example."""

    train: Table
    validation: Table | None
    test: Table | None

    @property
    def noun(self) -> str:
        return self.train.noun

    @cached_property
    def twins(self) -> list[list[int]]:
        """Training examples of the same bytes, in groups."""
        return find_twins(self.train)


@dataclass(frozen=True)
class _Part:
    """A task: its name, its classes, and its rows in each table."""

    name: str
    classes: Sequence[str]
    train: Sequence[int]
    validation: Sequence[int]
    test: Sequence[int]


def build_stream(source: Source, options: StreamOptions, view: View, *, seed: int) -> Stream:
    """The tasks that `options` cut from `source`. No example is opened before `TaskData.check`.

    Raises:
        UsageError: the options do not fit the data, or the data do not fit the backbone.
        DataError: the data cannot be used.
    """
    options = options.fitted(source.gives, source.classed)
    tables, warnings = _tables(source, options, view)
    warnings += _two_labels(tables, options) + _alike(tables.train)
    test = tables.test
    parts, more = _by_class(tables, options, seed) if options.by == "class" else _by_group(tables, options, seed)
    warnings += more
    if test is None and not options.holdout:
        warnings.append(f"there are no test {tables.noun}s, so nothing is evaluated: set data.test or stream.holdout")
    names = task_names(part.name for part in parts)
    cut = _Cut(tables, options, view, seed)
    tasks = [cut.task(i, name, part) for i, (name, part) in enumerate(zip(names, parts, strict=True))]
    if test is not None and len(test) and not any(task.test for task in tasks):
        raise DataError(f"no test {tables.noun} fits a task: train has {_what(tables.train)}, test has {_what(test)}")
    if test is not None or options.holdout:
        warnings += _untested(tasks)
    classes = tuple(dict.fromkeys(c for task in tasks for c in task.classes))
    return Stream(tasks, classes, warnings)


def single_task(
    source: Source,
    options: StreamOptions,
    view: View,
    *,
    index: int,
    name: str,
    seed: int,
    holdout: float,
    fresh: bool = True,
) -> TaskData:
    """All data of `source` as one task, for an update of a state with one more batch of data.

    The `options` that cut a stream into tasks are ignored.

    Args:
        index, name: of the task; the name is made safe for a folder.
        holdout: share of the examples of each class that becomes the test, where the source has none.
        fresh: whether they were never learned; of those that were, labels are not compared again, nor test examples
            with those for training: what was found was said then.
    """
    uncut = {"by": None, "classes_per_task": None, "class_order": "sorted", "order": None}
    options = options.model_copy(update={**uncut, "holdout": holdout}).fitted(source.gives, source.classed)
    tables, warnings = _tables(source, options, view, compare=fresh)
    if fresh:
        warnings += _two_labels(tables, options) + _alike(tables.train)
    rows = [range(len(table)) if table is not None else () for table in (tables.validation, tables.test)]
    part, left_out = _part(
        name, natural(tables.train.classes(range(len(tables.train)))), tables, range(len(tables.train)), *rows
    )
    task = _Cut(tables, options, view, seed).task(index, task_names([name], first=index + 1)[0], part)
    task.warnings += warnings + _foreign(left_out)
    if tables.test is not None or holdout:
        task.warnings += _untested([task])
    return task


def _tables(source: Source, options: StreamOptions, view: View, compare: bool = True) -> tuple[_Tables, list[str]]:
    """The tables and warnings, after all checks that need not open an example.

    Args:
        compare: whether test examples are looked for among those for training.
    """
    if source.gives != view.takes:
        raise UsageError(f"data: these are {source.gives}, but the backbone takes {view.takes}")
    tables = _Tables(source.train(), source.validation(), source.test())
    train, test = tables.train, tables.test
    if not len(train):
        raise DataError(f"there are no training {tables.noun}s")
    warnings = list(train.warnings)
    for table in (train, tables.validation, test):
        if table is None:
            continue
        warnings += [w for w in table.warnings if w not in warnings]
        unlabelled = [table.name(i) for i, label in enumerate(table.labels) if not label] if not table.free else []
        if unlabelled:
            raise DataError(f"these {table.noun}s have no label: {several(unlabelled)}")
    if tables.validation is not None and options.validation:
        warnings.append(f"stream.validation is not used, because the data have validation {tables.noun}s already")
    if test is not None and compare:
        warnings += _overlap(train, test, options)
    return tables, warnings


def _overlap(train: Table, test: Table, options: StreamOptions) -> list[str]:
    pairs = find_overlap(train, test, contents=options.check != "none")
    if not pairs:
        return []
    names = several([f"{test.name(b)} = {train.name(a)}" for a, b in pairs])
    line = f"{len(pairs)} test {test.noun}s are also training {train.noun}s: {names}"
    if options.overlap == "error" and train.files and test.files:
        raise DataError(f"{line}; remove them from one side, or set stream.overlap: warn")
    return [line]


def _two_labels(tables: _Tables, options: StreamOptions) -> list[str]:
    """A warning about pictures of the same bytes under two labels.

    Raises:
        DataError: one file has two labels.
    """
    if tables.train.gives != "pictures":
        return []
    for table in (tables.train, tables.test):
        pairs = contradicting(table, one_file(table)) if table is not None else []
        if table is not None and pairs:
            names = several([_labelled(table, a, b) for a, b in pairs])
            raise DataError(f"one file has two labels: {names}; remove it from one of them")
    train = tables.train
    pairs = contradicting(train, tables.twins) if options.check != "none" else []
    names = several([_labelled(train, a, b) for a, b in pairs])
    return [f"{len(pairs)} {train.noun}s are there under two labels, byte for byte: {names}"] if pairs else []


def _labelled(table: Table, first: int, second: int) -> str:
    labels = table.labels
    return f"{table.name(first)} ('{labels[first]}') = {table.name(second)} ('{labels[second]}')"


def _alike(table: Table) -> list[str]:
    """A warning about classes whose names differ only in case or spacing."""
    pairs = alike(table.classes(range(len(table))))
    return [f"classes whose names are nearly the same: {several(pairs)}"] if pairs else []


def _by_class(tables: _Tables, options: StreamOptions, seed: int) -> tuple[list[_Part], list[str]]:
    train = tables.train
    known = set(train.labels)
    classes, warnings = _sorted_classes(train, options)
    if options.class_order == "seeded":
        classes = seeded_order(known, seed)
    tasks, more = in_tasks(classes, options.classes_per_task)
    rows, held, tests = (
        by_label(range(len(table)), table.labels) if table is not None else {}
        for table in (train, tables.validation, tables.test)
    )
    short = max(map(len, tasks)) <= 3  # then a task's name is made of its classes
    parts = [
        _Part(
            "-".join(names) if short else f"task-{i}",
            names,
            *(sorted(row for name in names for row in there.get(name, ())) for there in (rows, held, tests)),
        )
        for i, names in enumerate(tasks, 1)
    ]
    return parts, warnings + more + _foreign(natural(set(tests) - known))


def _by_group(tables: _Tables, options: StreamOptions, seed: int) -> tuple[list[_Part], list[str]]:
    train, by = tables.train, options.by or "task"
    rows, held, tests = (
        by_label(range(len(table)), _groups(table, by)) if table is not None else {}
        for table in (train, tables.validation, tables.test)
    )
    classes, warnings = _sorted_classes(train, options)
    order = [*(name for name in train.order if name in rows), *natural(rows.keys() - set(train.order))]
    if options.order == "seeded":
        order = seeded_order(rows, seed, f"{by} order")
    elif options.order is not None:
        order, more = given_order(options.order, rows, "stream.order", f"{by}s")
        warnings += more
    strangers = natural(set(tests) - set(rows))
    if strangers:
        warnings.append(f"{by}s in test but not in train are left out: {several(strangers)}")
    parts, left_out = [], []
    for name in order:
        part, foreign = _part(name, classes, tables, rows[name], held.get(name, ()), tests.get(name, ()))
        if part.train:
            parts.append(part)
        left_out += [f"{name}/{label}" for label in foreign]
    return parts, warnings + _foreign(left_out)


def _part(
    name: str,
    classes: Sequence[str],
    tables: _Tables,
    rows: Sequence[int],
    held: Sequence[int],
    tests: Sequence[int],
) -> tuple[_Part, list[str]]:
    """A task with those `classes` that its training rows have; and the labels of test rows that do not fit the task."""
    used = tables.train.classes(rows)
    mine = [c for c in classes if c in used]
    known = set(mine)
    kept = [
        [row for row in some if table is not None and table.fits(row, known)]
        for table, some in ((tables.train, rows), (tables.validation, held), (tables.test, tests))
    ]
    test = tables.test
    foreign = {test.labels[r] for r in tests if not test.fits(r, used)} if test is not None else set()
    return _Part(name, mine, *kept), natural(foreign)


def _groups(table: Table, by: str) -> Sequence[str]:
    if table.groups is None:
        raise DataError(
            f"stream.by: {by} needs a {by} for each {table.noun}, but {table.name(0)} has none; "
            f"expected folders PATH/{by.upper()}/CLASS/PICTURE or a column {by}"
        )
    missing = [table.name(i) for i, group in enumerate(table.groups) if not group]
    if missing:
        raise DataError(f"stream.by: {by}: these have no {by}: {several(missing)}")
    return table.groups


def _sorted_classes(train: Table, options: StreamOptions) -> tuple[list[str], list[str]]:
    """The classes by name, or in the order that `class_order` gives; and warnings."""
    known = train.classes(range(len(train)))
    if isinstance(options.class_order, str):
        return natural(known), []
    return given_order(options.class_order, known, "stream.class_order", "classes")


def _foreign(labels: Sequence[str]) -> list[str]:
    return [f"classes in test but not in train; their test pictures are left out: {several(labels)}"] if labels else []


def _what(table: Table) -> str:
    """The names of a table's classes; for texts, of its tasks."""
    return several(natural(set(table.groups or ()) if table.free else set(table.labels)))


def _untested(tasks: Sequence[TaskData]) -> list[str]:
    labels = []
    for task in tasks:
        tested = set(task.test.targets) if task.test is not None else set()
        trained = set(task.train.targets)
        missing = [c for i, c in enumerate(task.classes) if i in trained and i not in tested]
        labels += [f"{c} (task {task.name})" if len(tasks) > 1 else c for c in missing]
    return [f"classes in train but not in test: {several(labels)}"] if labels else []


@dataclass(frozen=True)
class _Cut:
    """Makes a task from its rows: holds out the test, applies the limits, cuts off validation."""

    tables: _Tables
    options: StreamOptions
    view: View
    seed: int

    @cached_property
    def _twins(self) -> list[list[int]]:
        """Training examples of the same bytes, where some are about to be cut off from the others."""
        o, there = self.options, self.tables
        cuts = (o.validation and there.validation is None) or (there.test is None and o.holdout)
        return there.twins if cuts and o.check != "none" else []

    def task(self, index: int, name: str, part: _Part) -> TaskData:
        o, train, validation, test = self.options, self.tables.train, self.tables.validation, self.tables.test
        rows, held, tests = list(part.train), list(part.validation), list(part.test)
        if test is None:
            test = train
            rows, tests = self._hold_out(rows, o.holdout, "holdout")
        rows = self._limit(train, rows, o.train_per_class, o.train_per_task, "train limit")
        tests = self._limit(test, tests, o.test_per_class, o.test_per_task, "test limit")
        if validation is None:
            validation = train
            rows, held = self._hold_out(rows, o.validation, "validation")
        else:
            held = self._limit(validation, held, o.test_per_class, o.test_per_task, "validation limit")
        classes, view = part.classes, self.view
        return TaskData(
            index=index,
            name=name,
            classes=tuple(classes),
            train=view.examples(train, rows, classes, "training", o.augment),
            validation=view.examples(validation, held, classes, "validation") if held else None,
            test=view.examples(test, tests, classes, "test") if tests else None,
            score=train.score(part.train),
            depth=o.check,
            max_bad=o.max_bad,
        )

    def _hold_out(self, rows: Sequence[int], share: float, purpose: str) -> tuple[list[int], list[int]]:
        train = self.tables.train
        return hold_out(rows, train.labels, train.key, share=share, seed=self.seed, purpose=purpose, twins=self._twins)

    def _limit(
        self, table: Table, rows: Sequence[int], per_class: int | None, in_all: int | None, purpose: str
    ) -> list[int]:
        return limit(rows, table.labels, table.key, per_class=per_class, in_all=in_all, seed=self.seed, purpose=purpose)

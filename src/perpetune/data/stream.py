"""From a source to a stream: which classes and examples make up each task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from perpetune.data.check import Depth, contradicting, find_overlap, find_twins, one_file
from perpetune.data.examples import Augment, View
from perpetune.data.names import alike, natural, several, task_names
from perpetune.data.sources import Kind, Source, Table
from perpetune.data.split import by_label, given_order, hold_out, in_tasks, limit, seeded_order
from perpetune.data.tasks import TaskData
from perpetune.errors import DataError, UsageError

__all__ = ["Stream", "StreamOptions", "TaskData", "build_stream", "single_task"]


class StreamOptions(BaseModel):
    """How a source is cut into tasks: the recipe's keys under `stream:`.

    Attributes:
        by: `class`: tasks of `classes_per_task` classes; `domain` or `task`: one task for each domain or task
            that the source names. Default: `class` for pictures, `task` for texts, which are not cut by class.
        classes_per_task: one number (the last task may be smaller), or one for each task.
        class_order: drawn by the seed, sorted by name, or the names themselves; names that are missing are
            left out. A draw is the same for the classes that stay when others come or go. Tasks that are not
            cut by class list their classes by name, or in the order named here.
        order: of domains or tasks: the names themselves (those that are missing are left out), or drawn by the seed;
            default: that of a benchmark, else by name.
        validation: share of the training examples of each class that is cut off for validation: for methods
            that choose something by it (`task.validation`); those built in do not. A source that sets examples
            apart for it, as TRACE does, is not cut.
        holdout: share of them that becomes the test, where the source has no test examples.
        train_per_class, test_per_class: at most so many examples of a class in a task, drawn by the seed.
            The limit comes before validation is cut; validation examples that the source sets apart have that of
            the test.
        train_per_task, test_per_task: at most so many examples of a task, balanced over its classes, where it has
            classes.
        max_bad: more bad examples than this in a task stop the run.
        check: what is done to find them before a task begins: every picture is decoded and every text encoded, or
            only a picture's header read and a text's row looked at.
        overlap: whether a file that is in train and in test, or has a twin there, is an error. Twins are looked
            for unless `check` is none. Between data that are not single files they are only warned about.
        augment: what is done at random to a picture each time it is trained on. Nothing is done to texts.
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

    def fitted(self, gives: Kind) -> StreamOptions:
        """The same for one kind of data: what is left open is decided.

        Raises:
            UsageError: an option is not for this kind.
        """
        if gives == "pictures":
            return self.model_copy(update={"by": self.by or "class"})
        if self.by == "class":
            raise UsageError("stream.by: class is for pictures; texts are cut by task or domain")
        if self.classes_per_task is not None:
            raise UsageError("stream.classes_per_task is for pictures; texts are cut by task or domain")
        if not isinstance(self.class_order, str):
            raise UsageError("stream.class_order is for pictures; texts are put in order by stream.order")
        if self.augment != "none":
            raise UsageError(f"stream.augment: {self.augment} is for pictures; texts are learned as they are")
        return self.model_copy(update={"by": self.by or "task"})


@dataclass(frozen=True)
class Stream:
    """Tasks in the order they are learned.

    Attributes:
        classes: all classes, in the order they are first met.
        warnings: one line each; what `TaskData.check` finds is with the task.
    """

    tasks: list[TaskData]
    classes: tuple[str, ...]
    warnings: list[str]


@dataclass(frozen=True)
class _Tables:
    """What a source gives, all of one kind."""

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
    """Rows of a task in the tables."""

    name: str
    classes: Sequence[str]
    train: Sequence[int]
    validation: Sequence[int]
    test: Sequence[int]


def build_stream(source: Source, options: StreamOptions, view: View, *, seed: int) -> Stream:
    """The tasks that `options` cut from `source`. Examples are not looked at before `TaskData.check`.

    Raises:
        UsageError: the options do not fit the data, or the data do not fit the backbone.
        DataError: the data cannot be used.
    """
    options = options.fitted(source.gives)
    tables, warnings = _tables(source, options, view)
    warnings += _two_labels(tables, options) + _alike(tables.train)
    test = tables.test
    parts, more = _by_class(tables, options, seed) if options.by == "class" else _by_group(tables, options, seed)
    warnings += more
    if test is None and not options.holdout:
        warnings.append(f"there are no test {tables.noun}s, so nothing is evaluated; set data.test or stream.holdout")
    names = task_names(part.name for part in parts)
    cut = _Cut(tables, options, view, seed)
    tasks = [cut.task(i, name, part) for i, (name, part) in enumerate(zip(names, parts, strict=True))]
    if test is not None and len(test) and not any(task.test for task in tasks):
        raise DataError(
            f"no test {tables.noun} has a place in a task: train has {_what(tables.train)}, test has {_what(test)}"
        )
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
    """All of `source` as one task, for a state that is given one more batch of data.

    How `options` cut a stream into tasks is not asked for.

    Args:
        index, name: of the task; the name is made safe for a folder.
        holdout: share of the examples of each class that becomes the test, where the source has none.
        fresh: whether they were never learned; of those that were, labels are not compared again.
    """
    uncut = {"by": None, "classes_per_task": None, "class_order": "sorted", "order": None}
    options = options.model_copy(update={**uncut, "holdout": holdout}).fitted(source.gives)
    tables, warnings = _tables(source, options, view)
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


def _tables(source: Source, options: StreamOptions, view: View) -> tuple[_Tables, list[str]]:
    """The tables, after the checks that need no example to be looked at, and warnings."""
    if source.gives != view.takes:
        raise UsageError(f"data: these are {source.gives}, and the backbone takes {view.takes}")
    found = _Tables(source.train(), source.validation(), source.test())
    train, test = found.train, found.test
    if not len(train):
        raise DataError(f"there are no training {found.noun}s")
    warnings = list(train.warnings)
    for table in (train, found.validation, test):
        if table is None:
            continue
        warnings += [w for w in table.warnings if w not in warnings]
        unlabelled = [table.name(i) for i, label in enumerate(table.labels) if not label] if not table.free else []
        if unlabelled:
            raise DataError(f"no label: {several(unlabelled)}")
    if found.validation is not None and options.validation:
        warnings.append(f"stream.validation cuts nothing off: the data have validation {found.noun}s of their own")
    if test is not None:
        warnings += _overlap(train, test, options)
    return found, warnings


def _overlap(train: Table, test: Table, options: StreamOptions) -> list[str]:
    pairs = find_overlap(train, test, contents=options.check != "none")
    if not pairs:
        return []
    names = several([f"{test.name(b)} = {train.name(a)}" for a, b in pairs])
    line = f"{len(pairs)} test {test.noun}s are training {train.noun}s as well: {names}"
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
    short = max(map(len, tasks)) <= 3  # then the classes name the task
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
        warnings.append(f"{by} in test and not in train, left out: {several(strangers)}")
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
    """A task of those `classes` that are its training rows', and the labels of test rows that have no place in it."""
    there = tables.train.classes(rows)
    mine = [c for c in classes if c in there]
    known = set(mine)
    kept = [
        [row for row in some if table is not None and table.fits(row, known)]
        for table, some in ((tables.train, rows), (tables.validation, held), (tables.test, tests))
    ]
    test = tables.test
    foreign = {test.labels[r] for r in tests if not test.fits(r, there)} if test is not None else set()
    return _Part(name, mine, *kept), natural(foreign)


def _groups(table: Table, by: str) -> Sequence[str]:
    if table.groups is None:
        raise DataError(
            f"stream.by: {by} needs a {by} for each {table.noun}, but {table.name(0)} has none; "
            f"expected folders PATH/{by.upper()}/CLASS/PICTURE or a column {by}"
        )
    missing = [table.name(i) for i, group in enumerate(table.groups) if not group]
    if missing:
        raise DataError(f"stream.by: {by}: no {by} is given for {several(missing)}")
    return table.groups


def _sorted_classes(train: Table, options: StreamOptions) -> tuple[list[str], list[str]]:
    """The classes by name, or as `class_order` names them, and warnings."""
    known = train.classes(range(len(train)))
    if isinstance(options.class_order, str):
        return natural(known), []
    return given_order(options.class_order, known, "stream.class_order", "classes")


def _foreign(labels: Sequence[str]) -> list[str]:
    return [f"class in test and not in train, its test pictures are left out: {several(labels)}"] if labels else []


def _what(table: Table) -> str:
    """What there is in a table: its classes, or the tasks of answers in free text."""
    return several(natural(set(table.groups or ()) if table.free else set(table.labels)))


def _untested(tasks: Sequence[TaskData]) -> list[str]:
    labels = []
    for task in tasks:
        tested = set(task.test.targets) if task.test is not None else set()
        trained = set(task.train.targets)
        missing = [c for i, c in enumerate(task.classes) if i in trained and i not in tested]
        labels += [f"{c} (task {task.name})" if len(tasks) > 1 else c for c in missing]
    return [f"class in train and not in test: {several(labels)}"] if labels else []


@dataclass(frozen=True)
class _Cut:
    """Makes tasks out of rows: test, limits, validation."""

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
        o, train, own, test = self.options, self.tables.train, self.tables.validation, self.tables.test
        rows, held, tests = list(part.train), list(part.validation), list(part.test)
        if test is None:
            test = train
            rows, tests = self._hold_out(rows, o.holdout, "holdout")
        rows = self._limit(train, rows, o.train_per_class, o.train_per_task, "train limit")
        tests = self._limit(test, tests, o.test_per_class, o.test_per_task, "test limit")
        if own is None:
            own = train
            rows, held = self._hold_out(rows, o.validation, "validation")
        else:
            held = self._limit(own, held, o.test_per_class, o.test_per_task, "validation limit")
        classes, view = part.classes, self.view
        return TaskData(
            index=index,
            name=name,
            classes=tuple(classes),
            train=view.examples(train, rows, classes, "training", o.augment),
            validation=view.examples(own, held, classes, "validation") if held else None,
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

"""From a source to a stream: which classes and pictures make up each task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from perpetune.data.check import Depth, find_overlap, find_twins
from perpetune.data.sources import Source, Table
from perpetune.data.split import by_label, given_order, hold_out, in_tasks, limit, seeded_order
from perpetune.data.tasks import ImageSet, TaskData
from perpetune.data.text import natural, several, task_names
from perpetune.errors import DataError
from perpetune.models.preprocess import Augment, Preprocess

__all__ = ["Stream", "StreamOptions", "TaskData", "build_stream", "single_task"]


class StreamOptions(BaseModel):
    """How a source is cut into tasks: the recipe's keys under `stream:`.

    Attributes:
        by: `class`: tasks of `classes_per_task` classes; `domain` or `task`: one task for each domain or task
            that the source names.
        classes_per_task: one number (the last task may be smaller), or one for each task.
        class_order: drawn by the seed, sorted by name, or the names themselves; names that are missing are
            left out. A draw is the same for the classes that stay when others come or go. Tasks that are not
            cut by class list their classes by name, or in the order named here.
        order: of domains or tasks; default: by name. Names that are missing are left out.
        validation: share of the training pictures of each class that is cut off for validation: for methods
            that choose something by it (`task.validation`); those built in do not.
        holdout: share of them that becomes the test, where the source has no test pictures.
        train_per_class, test_per_class: at most so many pictures of a class in a task, drawn by the seed.
            The limit comes before validation is cut.
        max_bad: more bad pictures than this in a task stop the run.
        check: what is done to find them before a task begins: every picture is decoded, or its header read.
        overlap: whether a file that is in train and in test, or has a twin there, is an error. Twins are looked
            for unless `check` is none. Between data that are not single files they are only warned about.
        augment: what is done at random to a picture each time it is trained on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    by: Literal["class", "domain", "task"] = "class"
    classes_per_task: PositiveInt | Annotated[list[PositiveInt], Field(min_length=1)] | None = None
    class_order: Literal["seeded", "sorted"] | list[str] = "seeded"
    order: list[str] | None = None
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.0
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    train_per_class: PositiveInt | None = None
    test_per_class: PositiveInt | None = None
    max_bad: Annotated[int, Field(ge=0)] = 10
    check: Depth = "decode"
    overlap: Literal["error", "warn"] = "error"
    augment: Augment = "none"


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
class _Part:
    """Rows of a task in the two tables."""

    name: str
    classes: Sequence[str]
    train: Sequence[int]
    test: Sequence[int]


def build_stream(source: Source, options: StreamOptions, view: Preprocess, *, seed: int) -> Stream:
    """The tasks that `options` cut from `source`. Pictures are not looked at before `TaskData.check`.

    Raises:
        UsageError: the options do not fit the data.
        DataError: the data cannot be used.
    """
    train, test, warnings = _tables(source, options)
    if options.by == "class":
        parts, more = _by_class(train, test, options, seed)
    else:
        parts, more = _by_group(train, test, options)
    warnings += more
    if test is None and not options.holdout:
        warnings.append("there are no test pictures, so nothing is evaluated; set data.test or stream.holdout")
    names = task_names(part.name for part in parts)
    cut = _Cut(train, test, options, view, seed)
    tasks = [cut.task(i, name, part) for i, (name, part) in enumerate(zip(names, parts, strict=True))]
    if test is not None and len(test) and not any(task.test for task in tasks):
        raise DataError(
            f"no test picture has a place in a task: train has {several(natural(set(train.labels)))}, "
            f"test has {several(natural(set(test.labels)))}"
        )
    if test is not None or options.holdout:
        warnings += _untested(tasks)
    classes = tuple(dict.fromkeys(c for task in tasks for c in task.classes))
    return Stream(tasks, classes, warnings)


def single_task(
    source: Source, options: StreamOptions, view: Preprocess, *, index: int, name: str, seed: int, holdout: float
) -> TaskData:
    """All of `source` as one task, for a state that is given one more batch of data.

    How `options` cut a stream into tasks is not asked for.

    Args:
        index, name: of the task; the name is made safe for a folder.
        holdout: share of the pictures of each class that becomes the test, where the source has none.
    """
    uncut = {"by": "class", "classes_per_task": None, "class_order": "sorted", "order": None}
    options = options.model_copy(update={**uncut, "holdout": holdout})
    train, test, warnings = _tables(source, options)
    classes = natural(set(train.labels))
    part, left_out = _part(name, classes, range(len(train)), train, test, range(len(test) if test else 0))
    cut = _Cut(train, test, options, view, seed)
    task = cut.task(index, task_names([name], first=index + 1)[0], part)
    task.warnings += warnings + _foreign(left_out)
    if test is not None or holdout:
        task.warnings += _untested([task])
    return task


def _tables(source: Source, options: StreamOptions) -> tuple[Table, Table | None, list[str]]:
    """Both tables, after the checks that need no picture to be decoded, and warnings."""
    train, test = source.train(), source.test()
    if not len(train):
        raise DataError("there are no training pictures")
    warnings = list(train.warnings)
    for table in (train, test) if test is not None else (train,):
        unlabelled = [table.name(i) for i, label in enumerate(table.labels) if not label]
        if unlabelled:
            raise DataError(f"no label: {several(unlabelled)}")
    if test is not None:
        warnings += [w for w in test.warnings if w not in warnings]
        warnings += _overlap(train, test, options)
    return train, test, warnings


def _overlap(train: Table, test: Table, options: StreamOptions) -> list[str]:
    pairs = find_overlap(train, test, contents=options.check != "none")
    if not pairs:
        return []
    names = several([f"{test.name(b)} = {train.name(a)}" for a, b in pairs])
    line = f"{len(pairs)} test pictures are training pictures as well: {names}"
    if options.overlap == "error" and train.files and test.files:
        raise DataError(f"{line}; remove them from one side, or set stream.overlap: warn")
    return [line]


def _by_class(train: Table, test: Table | None, options: StreamOptions, seed: int) -> tuple[list[_Part], list[str]]:
    known = set(train.labels)
    classes, warnings = _sorted_classes(train, options)
    if options.class_order == "seeded":
        classes = seeded_order(known, seed)
    tasks, more = in_tasks(classes, options.classes_per_task)
    rows = by_label(range(len(train)), train.labels)
    tests = by_label(range(len(test)), test.labels) if test is not None else {}
    short = max(map(len, tasks)) <= 3  # then the classes name the task
    parts = [
        _Part(
            "-".join(names) if short else f"task-{i}",
            names,
            sorted(row for name in names for row in rows[name]),
            sorted(row for name in names for row in tests.get(name, ())),
        )
        for i, names in enumerate(tasks, 1)
    ]
    return parts, warnings + more + _foreign(natural(set(tests) - known))


def _by_group(train: Table, test: Table | None, options: StreamOptions) -> tuple[list[_Part], list[str]]:
    train_groups = _groups(train, options.by)
    test_groups = _groups(test, options.by) if test is not None else []
    rows = by_label(range(len(train)), train_groups)
    tests = by_label(range(len(test_groups)), test_groups)
    classes, warnings = _sorted_classes(train, options)
    order = natural(rows)
    if options.order is not None:
        order, more = given_order(options.order, rows, "stream.order", f"{options.by}s")
        warnings += more
    strangers = natural(set(tests) - set(rows))
    if strangers:
        warnings.append(f"{options.by} in test and not in train, left out: {several(strangers)}")
    parts, left_out = [], []
    for name in order:
        part, foreign = _part(name, classes, rows[name], train, test, tests.get(name, ()))
        if part.train:
            parts.append(part)
        left_out += [f"{name}/{label}" for label in foreign]
    return parts, warnings + _foreign(left_out)


def _part(
    name: str, classes: Sequence[str], rows: Sequence[int], train: Table, test: Table | None, tests: Sequence[int]
) -> tuple[_Part, list[str]]:
    """A task of those `classes` that occur in `rows`, and the labels of test rows that have no place in it."""
    there = {train.labels[row] for row in rows}
    mine = [c for c in classes if c in there]
    known = set(mine)
    kept = [r for r in tests if test is not None and test.labels[r] in known]
    foreign = natural({test.labels[r] for r in tests if test.labels[r] not in there}) if test is not None else []
    return _Part(name, mine, [r for r in rows if train.labels[r] in known], kept), foreign


def _groups(table: Table, by: str) -> Sequence[str]:
    if table.groups is None:
        raise DataError(
            f"stream.by: {by} needs a {by} for each picture, but {table.name(0)} has none; "
            f"expected folders PATH/{by.upper()}/CLASS/PICTURE or a column {by}"
        )
    missing = [table.name(i) for i, group in enumerate(table.groups) if not group]
    if missing:
        raise DataError(f"stream.by: {by}: no {by} is given for {several(missing)}")
    return table.groups


def _sorted_classes(train: Table, options: StreamOptions) -> tuple[list[str], list[str]]:
    """The classes by name, or as `class_order` names them, and warnings."""
    known = set(train.labels)
    if isinstance(options.class_order, str):
        return natural(known), []
    return given_order(options.class_order, known, "stream.class_order", "classes")


def _foreign(labels: Sequence[str]) -> list[str]:
    return [f"class in test and not in train, its test pictures are left out: {several(labels)}"] if labels else []


def _untested(tasks: Sequence[TaskData]) -> list[str]:
    labels = []
    for task in tasks:
        tested = set(task.test.targets) if task.test is not None else set()
        missing = [c for i, c in enumerate(task.classes) if i not in tested]
        labels += [f"{c} (task {task.name})" if len(tasks) > 1 else c for c in missing]
    return [f"class in train and not in test: {several(labels)}"] if labels else []


@dataclass(frozen=True)
class _Cut:
    """Makes tasks out of rows: test, limits, validation."""

    train: Table
    test: Table | None
    options: StreamOptions
    view: Preprocess
    seed: int

    @cached_property
    def _twins(self) -> list[list[int]]:
        """Training pictures of the same bytes, where some are about to be cut off from the others."""
        cuts = self.options.validation or (self.test is None and self.options.holdout)
        return find_twins(self.train) if cuts and self.options.check != "none" else []

    def task(self, index: int, name: str, part: _Part) -> TaskData:
        o, seed, labels, key = self.options, self.seed, self.train.labels, self.train.key
        rows, tests, table = list(part.train), list(part.test), self.test
        if table is None:
            table = self.train
            rows, tests = hold_out(rows, labels, key, share=o.holdout, seed=seed, purpose="holdout", twins=self._twins)
        rows = limit(rows, labels, key, per_class=o.train_per_class, seed=seed, purpose="train limit")
        tests = limit(tests, table.labels, table.key, per_class=o.test_per_class, seed=seed, purpose="test limit")
        rows, held = hold_out(rows, labels, key, share=o.validation, seed=seed, purpose="validation", twins=self._twins)
        return TaskData(
            index=index,
            name=name,
            classes=tuple(part.classes),
            train=ImageSet(self.train, rows, part.classes, self.view, o.augment),
            validation=ImageSet(self.train, held, part.classes, self.view) if held else None,
            test=ImageSet(table, tests, part.classes, self.view) if tests else None,
            depth=o.check,
            max_bad=o.max_bad,
        )

"""Texts in JSONL, JSON and parquet files, and the layouts of folders with such files."""

from __future__ import annotations

import os
import re
import zlib
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

from perpetune.data.columns import SPLITS, Split, group_column, split_of
from perpetune.data.names import label_of, natural, printable, several
from perpetune.data.parquet import read_schema
from perpetune.data.sheets import SHEETS, sheet_columns
from perpetune.data.sources import Fit, Kind, Source, existing
from perpetune.data.texts.chats import Messages, is_empty, unpacked
from perpetune.data.texts.layouts import CHATS, INSTRUCTION, Layout, layout_of
from perpetune.data.texts.records import MARK, PACKED, SUFFIXES, Record, open_text, read_records
from perpetune.data.texts.tables import Row, TextTable, common_options, key_of, text_in
from perpetune.errors import DataError, MissingExtra, UsageError, closest
from perpetune.numerics.text_scores import score_of

OPTIONS = "options"  # the default column with the answers among which the model chooses
_ORDER: tuple[Split, ...] = ("train", "validation", "test")
_TEXTS = {"prompt", INSTRUCTION, *CHATS}  # columns that say that rows are texts
_SHARD = re.compile(r"(.+)-\d+-of-\d+")  # train-00000-of-00002, as data sets are saved


@dataclass(frozen=True)
class TextFile:
    """A file of texts, its split and its task. None means that the rows may name it."""

    path: str
    split: Split | None
    task: str | None


@dataclass(frozen=True)
class Item:
    """A row, with its split and its task."""

    split: Split
    task: str
    row: Row


class TextSource(Source):
    """The common base of sources that read texts from files, in any layout.

    If a task has validation examples but no test examples, the validation examples are its test.
    """

    gives: ClassVar[Kind] = "texts"
    table: ClassVar[type[TextTable]] = TextTable
    """The class of its tables."""

    @abstractmethod
    def _items(self) -> Iterator[Item]:
        """All rows, in order."""

    def _scoring(self, tasks: Sequence[str]) -> Mapping[str, str]:
        """The name of the score for each task; other tasks have exact match."""
        return {}

    def _order(self, tasks: Sequence[str]) -> Sequence[str]:
        """The default order of the tasks."""
        return ()

    def _warnings(self) -> list[str]:
        """One line for each thing that was left out."""
        return []

    def _use(self, record: Record, used: Collection[str]) -> None:
        """Notes the columns of a row that hold something, and of which nothing is used."""
        for column, value in record.value.items():
            if column not in used and not is_empty(value):
                self._left.setdefault(column, None)

    def _unused_columns(self) -> list[str]:
        columns = [f"'{printable(column)}'" for column in self._left]
        return [f"columns that are not used: {several(columns, 20)}"] if columns else []

    @cached_property
    def _left(self) -> dict[str, None]:
        """The columns of which nothing is used, in order."""
        return {}

    def train(self) -> TextTable:
        table = self._tables.get("train")
        if table is None:
            raise DataError("there are no training examples")
        return table

    def validation(self) -> TextTable | None:
        return self._tables.get("validation")

    def test(self) -> TextTable | None:
        return self._tables.get("test")

    @cached_property
    def _tables(self) -> dict[Split, TextTable]:
        items = list(self._items())
        tested = {item.task for item in items if item.split == "test"}
        parts: dict[Split, list[Item]] = {}
        for item in items:
            spare = item.split == "validation" and item.task not in tested
            parts.setdefault("test" if spare else item.split, []).append(item)
        declared = common_options((item.task, item.row) for item in items)
        tasks = natural({item.task for item in items})
        scoring, order = self._scoring(tasks), self._order(tasks)
        return {
            split: self.table(
                [item.row for item in part],
                [item.task for item in part],
                declared,
                scoring,
                order,
                [*self._warnings(), *self._unused_columns()] if split == "train" else (),
            )
            for split, part in parts.items()
        }


class BenchmarkSource(TextSource):
    """The common base of benchmarks that are folders of tasks with an order and a score for each task.

    Args:
        path: the folder of the tasks.
        tasks: the tasks to read, in this order; None is those that are there, in the benchmark's order.
        score: other scores than the benchmark's, by task.

    Raises:
        UsageError: a score has no such name.
    """

    order: ClassVar[tuple[str, ...]]
    scores: ClassVar[Mapping[str, str]]

    def __init__(self, path: str, tasks: list[str] | None, score: dict[str, str] | None):
        self.path, self.tasks, self.score = path, tasks, score or {}
        for name in self.score.values():
            score_of(name)

    @property
    @abstractmethod
    def _found(self) -> tuple[list[TextFile], list[str]]:
        """The files, each with its split and its task, and one line for each thing that was left out."""

    def _scoring(self, tasks: Sequence[str]) -> Mapping[str, str]:
        for task in self.score:
            if task not in tasks:
                raise UsageError(f"data.score: there is no task '{task}'; {closest(task, tasks)}")
        return {**self.scores, **self.score}

    def _order(self, tasks: Sequence[str]) -> Sequence[str]:
        return self.tasks if self.tasks is not None else [task for task in self.order if task in tasks]

    def _warnings(self) -> list[str]:
        return self._found[1]


class FileSource(TextSource):
    """Texts in a `.jsonl`, `.json`, `.csv` or `.tsv` (also `.gz`) or `.parquet` file, or in a folder of such.

    A folder has `TASK.jsonl` files; or `TASK/train.jsonl`, if needed with `TASK/test.jsonl` and
    `TASK/validation.jsonl` (or `eval`, `dev`); or `train.jsonl` and `test.jsonl` of one task. Each may be `.json` or
    `.parquet`. A row has a prompt and an answer, or the messages of a chat whose last message is the answer. If a row
    has both, the messages are used. A CSV file has a header, and its cells may hold lists (messages, options) as JSON.
    In a folder, a CSV file counts if its header names a column of texts, or if its name is that of a split.

    Args:
        path: the file or folder.
        test: the file or folder with the test examples; default: the test split inside `path`, if any.
        prompt_column, answer_column, messages_column: the names of the columns.
        task_column: the column with the task; default: the column `task` or `domain`, if there is one. If the names of
            files give their task, a column is used only if it is named here.
        split_column: the column that says train, validation or test; default: the column `split`, if there is one and
            the names of files do not give the split.
        options: the answers among which the model chooses: a list for all rows, or the name of the column that has a
            list in each row. Default: the column `options`, if it has lists; `[]` means no options.
        instruction: a text that is put before each prompt, on a separate line; in a chat, before the user's first
            message.
        score: the name of the score for answers, or names by task. Default: exact_match.
    """

    def __init__(
        self,
        *,
        path: str,
        test: str | None = None,
        prompt_column: str = "prompt",
        answer_column: str = "answer",
        messages_column: str = "messages",
        input_column: str | None = None,
        system_column: str | None = None,
        history_column: str | None = None,
        tools_column: str | None = None,
        task_column: str | None = None,
        split_column: str | None = None,
        options: str | list[str] | None = None,
        instruction: str | None = None,
        score: str | dict[str, str] | None = None,
    ):
        self.path, self.test_path = path, test
        self.prompt_column, self.answer_column, self.messages_column = prompt_column, answer_column, messages_column
        self.input_column, self.system_column = input_column, system_column
        self.history_column, self.tools_column = history_column, tools_column
        self.task_column, self.split_column = task_column, split_column
        self.options, self.instruction, self.score = options, instruction, score
        self._unused: list[str] = []
        self._beyond: dict[str, bool] = {}  # of each chat that was read, by its place, whether it goes on
        for name in score.values() if isinstance(score, dict) else [score] if score else []:
            score_of(name)

    @classmethod
    def fits(cls, path: str, wanted: Kind | None = None) -> Fit:
        return Fit.CONTENT if os.path.exists(path) and holds_texts(path, sure=wanted == "texts") else Fit.NO

    def _items(self) -> Iterator[Item]:
        for file in self._found[0]:
            yield from self._rows(file)
        if self.test_path is not None:
            for file in text_files(existing(self.test_path, "file or folder of texts"), "test")[0]:
                yield from self._rows(file)

    def _scoring(self, tasks: Sequence[str]) -> Mapping[str, str]:
        if isinstance(self.score, dict):
            for task in self.score:
                if task not in tasks:
                    raise UsageError(f"data.score: there is no task '{task}'; {closest(task, tasks)}")
            return self.score
        return dict.fromkeys(tasks, self.score) if self.score else {}

    def _warnings(self) -> list[str]:
        beyond = sum(self._beyond.values())
        note = (
            [f"{beyond} of {len(self._beyond)} chats go on behind their last answer: nothing is learned of that"]
            if beyond
            else []
        )
        return self._found[1] + self._unused + note

    @cached_property
    def _found(self) -> tuple[list[TextFile], list[str]]:
        files, warnings = text_files(existing(self.path, "file or folder of texts"), "train")
        if self.test_path is not None:
            unused = [printable(f.path) for f in files if f.split == "test"]
            files = [f for f in files if f.split != "test"]
            warnings += [f"not used, because data.test is set: {several(unused)}"] if unused else []
        return files, warnings

    def _rows(self, file: TextFile) -> Iterator[Item]:
        """The rows of a file. A row that cannot be read gets the task of the row before, or of the first good row."""
        records, here = read_records(file.path), printable(file.path)
        columns = list(dict.fromkeys(c for record in records for c in record.value))
        layout = layout_of(
            columns,
            prompt=self.prompt_column,
            answer=self.answer_column,
            messages=self.messages_column,
            input=self.input_column,
            system=self.system_column,
            history=self.history_column,
            tools=self.tools_column,
        )
        self._need_columns(columns, layout, here)
        named = parts = None
        if (file.task is None or self.task_column is not None) and columns:
            named = group_column(columns, self.task_column, here, "task_column")
        if file.split is None and self.test_path is None:
            parts = self.split_column or ("split" if "split" in columns else None)
        tasks = [_task(record, named) if named else file.task or _stem(self.path) for record in records]
        task = next(filter(None, tasks), None) or file.task or _stem(self.path)
        options = self._options_of(records, here)
        asked = options if isinstance(options, str) else OPTIONS if self.options is None else None
        further = {column for column in (named, parts, asked) if column is not None}
        for record, own in zip(records, tasks, strict=True):
            task, split, row = own or task, file.split or "train", self._row(record, layout, options)
            self._use(record, layout.used(record.value) | further)
            if not record.fault:
                try:
                    if parts is not None:
                        split = split_of(record.value.get(parts), f"column '{parts}'")
                    if own is None:
                        raise DataError(f"no task (column '{named}')")
                except DataError as error:
                    row = Row(row.at, row.key, None, str(error))
            yield Item(split, task, row)

    def _need_columns(self, columns: Sequence[str], layout: Layout, here: str) -> None:
        """DataError when a column is in no row of a file; rows that lack one are bad rows."""
        if not columns:
            return
        if layout.messages not in columns:
            for column in (layout.prompt, layout.answer):
                if column not in columns:
                    raise DataError(
                        f"{here}: no column '{column}' and no column '{layout.messages}'; "
                        f"found: {several([printable(c) for c in columns], 20)}"
                    )
        more = (self.input_column, self.system_column, self.history_column, self.tools_column)
        for asked in (*more, self.split_column, self.options):
            if isinstance(asked, str) and asked not in columns:
                raise DataError(f"{here}: no column '{asked}'; found: {several([printable(c) for c in columns], 20)}")

    def _row(self, record: Record, layout: Layout, column: str | list[str]) -> Row:
        if record.fault:
            return Row(record.at, key_of(record.raw.decode(errors="backslashreplace")), None, record.fault)
        key = layout.key(record.value)
        try:
            text = layout.text(record.value)
            options = _options(record.value, column)
        except DataError as error:
            return Row(record.at, key, None, str(error))
        if not isinstance(text.prompt, str):
            self._beyond[record.at] = layout.goes_on(record.value)
        # Space at its ends does not make an option another one.
        said = text.answer.strip() if text.answer.strip() in options else text.answer
        return Row(record.at, key, replace(text, prompt=self._instructed(text.prompt), answer=said, options=options))

    def _options_of(self, records: Sequence[Record], here: str) -> str | list[str]:
        """The options of all rows in a file, or the column with the options of each row."""
        if self.options is not None:
            return self.options
        held = [unpacked(r.value[OPTIONS]) for r in records if r.value.get(OPTIONS) is not None]
        if any(isinstance(value, list) for value in held):
            return OPTIONS
        if held:
            self._unused.append(f"{here}: the column '{OPTIONS}' has no lists and is not used")
        return []

    def _instructed(self, prompt: str | Messages) -> str | Messages:
        """The prompt with the instruction before it. An empty prompt stays empty, so that `check` reports it."""
        if self.instruction is None:
            return prompt
        if isinstance(prompt, str):
            return f"{self.instruction}\n{prompt}" if prompt.strip() else prompt
        first = next((n for n, message in enumerate(prompt) if message[0] == "user"), None)
        return tuple(
            (message[0], f"{self.instruction}\n{message[1]}", *message[2:]) if n == first else message
            for n, message in enumerate(prompt)
        )


def _options(value: Mapping[str, Any], column: str | list[str]) -> tuple[str, ...]:
    """The options of a row: the given list, or the list in the given column.

    Raises:
        DataError: the column does not have a list of texts.
    """
    options = unpacked(value.get(column)) if isinstance(column, str) else column
    if not isinstance(options, list):
        kind = "nothing" if options is None else type(options).__name__
        raise DataError(f"the options (column '{column}') hold {kind}; expected a list of texts")
    return tuple(text_in(option, "option").strip() for option in options)


def text_files(path: str, wanted: Literal["train", "test"]) -> tuple[list[TextFile], list[str]]:
    """The files of texts at `path`, which is a file or a folder; and warnings.

    Args:
        wanted: `test` for the test files only, `train` for all files.

    Raises:
        DataError: there are no files, or a task or a split has several.
    """
    if not os.path.isdir(path):
        return [TextFile(path, "test" if wanted == "test" else None, None)], []
    here, files, folders = printable(path), *list_texts(path)
    splits = split_files(path, files)
    if wanted in splits or (wanted == "test" and "validation" in splits):
        unused = [f for f in files if _split_named(f) is None] + [
            f"{f}/" for f in folders if split_files(os.path.join(path, f))
        ]
        warnings = [f"{here}: not used beside {wanted}: {several([printable(f) for f in unused])}"] if unused else []
        return _of_splits(splits, None, wanted), warnings
    chosen: list[TextFile] = []
    entries: dict[str, list[str]] = {}  # the files and folders of each task
    lacking, unused = [], []
    for name in natural([*files, *folders]):
        inside = os.path.join(path, name)
        task = label_of(_stem(name) if name in files else name)
        within = [] if name in files else list_texts(inside)[0]
        parts = split_files(inside, within)
        if name in files and _split_named(name) is None:
            entries.setdefault(task, []).append(name)
            chosen.append(TextFile(inside, "test" if wanted == "test" else None, task))
        elif name in files:
            unused += [name] if wanted == "train" else []  # a test file without training data
        elif wanted in parts or (wanted == "test" and "validation" in parts):
            entries.setdefault(task, []).append(f"{name}/")
            chosen += _of_splits(parts, task, wanted)
            unused += [f"{name}/{file}" for file in within if _split_named(file) is None]
        elif within:
            lacking.append(f"{printable(name)}/")
    twice = [", ".join(printable(name) for name in names) for names in entries.values() if len(names) > 1]
    if twice:
        raise DataError(f"{here}: a task is in several places: {several(twice)}")
    if not chosen:
        present = several([printable(name) for name in natural([*files, *lacking])]) or "no file of texts"
        raise DataError(
            f"{here}: expected {wanted}.jsonl, TASK.jsonl or TASK/{wanted}.jsonl (or .json, .parquet); found: {present}"
        )
    warnings = [f"{here}: no {wanted} file in {several(lacking)}"] if lacking else []
    if unused:
        warnings.append(
            f"{here}: these files belong to no task and are not used: {several([printable(n) for n in unused])}"
        )
    return chosen, warnings


def split_files(folder: str, files: Sequence[str] | None = None) -> dict[Split, list[str]]:
    """The files in `folder` whose name is a split; several for one split if it is stored in parts.

    Raises:
        DataError: a split has two files that are not parts.
    """
    by_split: dict[Split, list[str]] = {}
    for name in list_texts(folder)[0] if files is None else files:
        split = _split_named(name)
        if split is not None:
            by_split.setdefault(split, []).append(name)
    for split, names in by_split.items():
        if len(names) > 1 and not all(_SHARD.fullmatch(_stem(n)) for n in names):
            raise DataError(f"{printable(folder)}: several files of the {split} split: {several(names)}")
    return {split: [os.path.join(folder, name) for name in names] for split, names in by_split.items()}


def _task(record: Record, column: str) -> str | None:
    """The task that a row names, None where it names none."""
    value = record.value.get(column)
    try:
        return None if isinstance(value, float) else label_of(text_in(value, "task")) or None
    except DataError:
        return None


def _of_splits(splits: Mapping[Split, Sequence[str]], task: str | None, wanted: str) -> list[TextFile]:
    """The files of one task. With `wanted` test, only those of its test, or of its validation if it has no test."""
    if wanted == "test":
        splits = {"test": splits.get("test") or splits["validation"]}
    return [TextFile(path, split, task) for split in _ORDER for path in splits.get(split, ())]


def _split_named(file: str) -> Split | None:
    """The split in a file's name; None if the name has no split."""
    stem = _stem(file)
    shard = _SHARD.fullmatch(stem)
    return SPLITS.get((shard[1] if shard else stem).lower())


def list_texts(folder: str) -> tuple[list[str], list[str]]:
    """The names of the files of texts in a folder, and of the folders in it, without hidden ones.

    Raises:
        DataError: the folder cannot be read.
    """
    files, folders = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    folders.append(entry.name)
                elif entry.name.lower().endswith(SUFFIXES) and _counts(entry.path):
                    files.append(entry.name)
    except OSError as error:
        raise DataError(f"{printable(folder)}: {(error.strerror or str(error)).lower()}") from error
    return natural(files), natural(folders)


def _counts(path: str) -> bool:
    """Whether a file in a folder is one of texts by its suffix; sheets are often of something else."""
    sheet = path.lower().removesuffix(PACKED).endswith(SHEETS)
    return not sheet or _split_named(os.path.basename(path)) is not None or _names_texts(path)


def _stem(path: str) -> str:
    """The last part of a path, without the suffix if it is that of a file of texts."""
    name = os.path.basename(os.path.abspath(path))
    suffix = next((suffix for suffix in reversed(SUFFIXES) if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(suffix)] or name


def holds_texts(path: str, *, sure: bool = False) -> bool:
    """Whether the file or folder `path` has texts. Of a folder, its files and the training files in its folders count.

    A `.json` file is one of texts; others are where their beginning names a column of texts: `prompt`, `messages`, or
    one of the other names of these.

    Args:
        sure: whether texts are expected, so that the source reads the file and reports what is wrong with it.

    Raises:
        DataError: a folder cannot be read.
    """
    if not os.path.isdir(path):
        lower = path.lower()
        if not lower.endswith(SUFFIXES) or lower.endswith((".json", f".json{PACKED}")):
            return lower.endswith(SUFFIXES)
        return _names_texts(path) or (sure and not {"path", "label"} <= _columns(path))
    files, folders = list_texts(path)
    candidates = [os.path.join(path, file) for file in files]
    for folder in folders:
        inner = list_texts(os.path.join(path, folder))[0]
        candidates += [os.path.join(path, folder, file) for file in inner if _split_named(file) == "train"][:1]
    return any(map(_names_texts, candidates)) or (sure and bool(candidates))


def _columns(path: str, looked: int = 1 << 16) -> set[str]:
    """The columns of a sheet; none of another file, and of one that cannot be read."""
    if not path.lower().removesuffix(PACKED).endswith(SHEETS):
        return set()
    try:
        with open_text(path) as file:
            return sheet_columns(file.read(looked))
    except (OSError, EOFError, zlib.error):
        return set()


def _names_texts(path: str, looked: int = 1 << 16) -> bool:
    """Whether the beginning of a file names a column of texts."""
    if path.lower().endswith(".parquet"):
        try:
            return not _TEXTS.isdisjoint(read_schema(path).names)
        except (DataError, MissingExtra):  # said by the source that is taken for it
            return False
    if path.lower().removesuffix(PACKED).endswith(SHEETS):
        return not _TEXTS.isdisjoint(_columns(path))
    try:
        with open_text(path) as file:
            start = file.read(looked)
    except (OSError, EOFError, zlib.error):
        return False
    start = start.removeprefix(MARK).lstrip()
    array = path.lower().removesuffix(PACKED).endswith(".json") or start.startswith(b"[")
    first = start if array else start.partition(b"\n")[0]
    return re.search(rb'"(%s)"\s*:' % "|".join(sorted(_TEXTS)).encode(), first) is not None

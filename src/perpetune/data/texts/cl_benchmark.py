"""The text classification tasks of the O-LoRA paper, in its folder layout (Wang et al. 2023, arXiv:2310.14152)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from perpetune.data.columns import Split
from perpetune.data.names import label_of, natural, printable, several
from perpetune.data.sources import Fit, Kind, existing
from perpetune.data.texts.files import Item, TextSource, list_texts, split_files
from perpetune.data.texts.records import Record, read_records
from perpetune.data.texts.tables import Row, Text, key_of, text_in
from perpetune.errors import DataError, UsageError, closest
from perpetune.plain import Malformed, read_json

LABELS = "labels.json"
INSTRUCTIONS = {
    "SC": "What is the sentiment of the following paragraph? Choose one from the option.",
    "TC": "What is the topic of the following paragraph? Choose one from the option.",
    "QQP": 'Whether the "first sentence" and the "second sentence" have the same meaning? Choose one from the option.',
    "BoolQA": "According to the following passage, is the question true or false? Choose one from the option.",
    "NLI": 'What is the logical relationship between the "sentence 1" and the "sentence 2"? '
    "Choose one from the option.",
    "MultiRC": "According to the following passage and question, is the candidate answer true or false? "
    "Choose one from the option.",
    "WiC": "Given a word and two sentences, whether the word is used with the same sense in both sentence? "
    "Choose one from the option.",
}


@dataclass(frozen=True)
class _Place:
    """A task's folder, with the names of the task and of its group."""

    group: str
    task: str
    folder: str


class ClBenchmarkSource(TextSource):
    """The O-LoRA benchmark: `PATH/GROUP/TASK/train.json`, `test.json` of `{sentence, label}`; `labels.json`.

    The prompt has the group's instruction, the options, the sentence, and `Answer:`; the answer is the label.
    The score is exact match. If there is no `test.json`, `dev.json` is the test. Otherwise `dev.json` is not used,
    because the benchmark publishes it as a copy of the test.

    Args:
        path: the folder of the groups, of one group, or of one task.
        tasks: the tasks to read, in this order; default: all tasks, by name.
        instructions: your own instructions, by group or by task. Built-in groups: SC, TC, QQP, BoolQA, NLI, MultiRC,
            WiC.
    """

    def __init__(self, *, path: str, tasks: list[str] | None = None, instructions: dict[str, str] | None = None):
        self.path, self.tasks, self.instructions = path, tasks, instructions or {}

    @classmethod
    def fits(cls, path: str, wanted: Kind | None = None) -> Fit:
        return Fit.LAYOUT if os.path.isdir(path) and _places(path) else Fit.NO

    def _items(self) -> Iterator[Item]:
        for place in self._places:
            options = _labels(os.path.join(place.folder, LABELS))
            opening = f"{self._instruction(place)}\nOption: {', '.join(options)}\n\n"
            files = split_files(place.folder)
            if "train" not in files:
                raise DataError(f"{printable(place.folder)}: no train.json beside {LABELS}")
            test = files.get("test") or files.get("validation") or []
            parts: tuple[tuple[Split, Sequence[str]], ...] = (("train", files["train"]), ("test", test))
            for split, paths in parts:
                for record in (record for path in paths for record in read_records(path)):
                    self._use(record, ("sentence", "label"))
                    yield Item(split, place.task, _row(record, opening, options))

    def _order(self, tasks: Sequence[str]) -> Sequence[str]:
        return self.tasks or ()

    def _instruction(self, place: _Place) -> str:
        known: Mapping[str, str] = {**INSTRUCTIONS, **self.instructions}
        for name in (place.task, place.group):
            if name in self.instructions or (name == place.group and name in known):
                return known[name]
        raise UsageError(
            f"data.instructions: the group '{place.group}' of task {place.task} has no instruction; "
            f"set data.instructions: {{{place.group}: ...}}"
        )

    @cached_property
    def _places(self) -> list[_Place]:
        """The folders of the tasks to read."""
        places = _places(existing(self.path, "folder"))
        by_task: dict[str, _Place] = {}
        for place in places:
            before = by_task.setdefault(place.task, place)
            if before is not place:
                raise DataError(f"task {place.task} is in two groups: {before.group} and {place.group}")
        if not places:
            raise DataError(f"{printable(self.path)}: expected GROUP/TASK/train.json with {LABELS} beside it")
        for task in self.tasks or ():
            if task not in by_task:
                raise UsageError(f"data.tasks: there is no task '{task}'; {closest(task, by_task)}")
        names = by_task.keys() | {place.group for place in places}
        for name in self.instructions:
            if name not in names:
                raise UsageError(f"data.instructions: there is no group or task '{name}'; {closest(name, names)}")
        return [by_task[task] for task in self.tasks] if self.tasks is not None else places


def _places(path: str) -> list[_Place]:
    """The folders of tasks: `path` itself, the folders in it, or the folders in these."""
    whole = os.path.abspath(path)
    group = os.path.basename(os.path.dirname(whole))
    places = [
        _Place(label_of(group), label_of(os.path.basename(whole)), path),
        *(_Place(label_of(os.path.basename(whole)), label_of(t), os.path.join(path, t)) for t in list_texts(path)[1]),
        *(
            _Place(label_of(g), label_of(t), os.path.join(path, g, t))
            for g in list_texts(path)[1]
            for t in list_texts(os.path.join(path, g))[1]
        ),
    ]
    return [p for p in places if os.path.exists(os.path.join(p.folder, LABELS)) and split_files(p.folder)]


def _labels(path: str) -> tuple[str, ...]:
    """The options of a task, in the file's order."""
    try:
        content = read_json(path)
    except (OSError, Malformed) as error:
        raise DataError(f"{printable(path)}: not a JSON array of labels: {error}") from error
    if not isinstance(content, list) or not content or not all(isinstance(x, str) and x.strip() for x in content):
        raise DataError(f"{printable(path)}: expected a JSON array of labels")
    labels = tuple(label.strip() for label in content)
    twice = natural({label for label in labels if labels.count(label) > 1})
    if twice:
        raise DataError(f"{printable(path)}: the array has a label twice: {several(twice)}")
    return labels


def _row(record: Record, opening: str, options: tuple[str, ...]) -> Row:
    if record.fault:
        return Row(record.at, key_of(record.raw.decode(errors="backslashreplace")), None, record.fault)
    sentence, label = record.value.get("sentence"), record.value.get("label")
    key = key_of(sentence, label)
    try:
        # The published files end each sentence with a line feed, `"Text: " + … + "\n"`; all else is the sentence.
        plain, said = text_in(sentence, "sentence").removesuffix("\n"), text_in(label, "label")
        if not plain.strip():
            raise DataError("the sentence is empty")
        said = said.strip() if said.strip() in options else said  # as in other files, space makes no other option
        return Row(record.at, key, Text(f"{opening}{plain}\nAnswer:", said, options))
    except DataError as error:
        return Row(record.at, key, None, str(error))

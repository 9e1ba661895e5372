"""TRACE, a benchmark of eight tasks for language models that keep learning (Wang et al. 2023, arXiv:2310.06762)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property

from perpetune.data.names import label_of, printable, several
from perpetune.data.sources import Fit, Kind, existing
from perpetune.data.texts.files import BenchmarkSource, Item, TextFile, holds_texts, list_texts, split_files, text_files
from perpetune.data.texts.records import Record, read_records
from perpetune.data.texts.tables import Row, Text, key_of, text_in
from perpetune.errors import DataError, UsageError, closest

ORDER = ("C-STANCE", "FOMC", "MeetingBank", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds", "20Minuten")
SCORES = {
    "C-STANCE": "accuracy",
    "FOMC": "accuracy",
    "MeetingBank": "rouge_l",
    "Py150": "code_similarity",
    "ScienceQA": "first_character",
    "NumGLUE-cm": "accuracy",
    "NumGLUE-ds": "accuracy",
    "20Minuten": "sari",
}
_REPLAY = "Lima"  # the benchmark includes it for methods that rehearse; it is not one of the tasks


class TraceSource(BenchmarkSource):
    """TRACE: `PATH/TASK/train.json`, `eval.json` (validation) and `test.json`, arrays of `{prompt, answer}`.

    The tasks have the benchmark's order (C-STANCE, FOMC, MeetingBank, Py150, ScienceQA, NumGLUE-cm, NumGLUE-ds,
    20Minuten) and its scores. Other tasks follow by name.

    Args:
        path: the folder of the tasks, or the folder of one task.
        tasks: the tasks to read, in this order; default: all except Lima, which is not a task of the benchmark.
        score: your own scores, by task.
    """

    order, scores = ORDER, SCORES

    def __init__(self, *, path: str, tasks: list[str] | None = None, score: dict[str, str] | None = None):
        super().__init__(path, tasks, score)

    @classmethod
    def fits(cls, path: str, wanted: Kind | None = None) -> Fit:
        if not holds_texts(path, sure=wanted == "texts") or not os.path.isdir(path):
            return Fit.NO
        files, folders = list_texts(path)
        one = label_of(os.path.basename(os.path.abspath(path))) in ORDER and "train" in split_files(path, files)
        return Fit.LAYOUT if one or (not files and not set(ORDER).isdisjoint(folders)) else Fit.NO

    def _items(self) -> Iterator[Item]:
        for file in self._found[0]:
            assert file.split is not None
            assert file.task is not None
            for record in read_records(file.path):
                self._use(record, ("prompt", "answer"))
                yield Item(file.split, file.task, _row(record))

    @cached_property
    def _found(self) -> tuple[list[TextFile], list[str]]:
        folder_name = label_of(os.path.basename(os.path.abspath(self.path)))
        files, warnings = text_files(existing(self.path, "folder"), "train")
        files = [TextFile(f.path, f.split, f.task or folder_name) for f in files]
        loose = [printable(f.path) for f in files if f.split is None]
        if loose:
            raise DataError(f"{printable(self.path)}: expected PATH/TASK/train.json; found: {several(loose)}")
        tasks = {f.task for f in files if f.task is not None}
        for task in self.tasks or ():
            if task not in tasks:
                raise UsageError(f"data.tasks: there is no task '{task}'; {closest(task, tasks)}")
        chosen = set(self.tasks) if self.tasks is not None else tasks - {_REPLAY}
        if self.tasks is None and _REPLAY in tasks:
            warnings.append(f"{printable(self.path)}: {_REPLAY} is left out, because it is not a task of the benchmark")
        return [f for f in files if f.task in chosen], warnings


def _row(record: Record) -> Row:
    if record.fault:
        return Row(record.at, key_of(record.raw.decode(errors="backslashreplace")), None, record.fault)
    prompt, answer = record.value.get("prompt"), record.value.get("answer")
    key = key_of(prompt, answer)
    try:
        return Row(record.at, key, Text(text_in(prompt, "prompt"), text_in(answer, "answer")))
    except DataError as error:
        return Row(record.at, key, None, str(error))

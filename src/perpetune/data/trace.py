"""TRACE, a benchmark of eight tasks for language models that keep learning (Wang et al. 2023, arXiv:2310.06762)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

from perpetune.data.records import Record, read_records
from perpetune.data.sources import existing
from perpetune.data.text import label_of, printable, several
from perpetune.data.text_files import Item, TextFile, TextSource, text_files
from perpetune.data.texts import Row, key_of, text_in
from perpetune.errors import DataError, UsageError, closest
from perpetune.models.texts import Text
from perpetune.numerics.text_scores import score_of

ORDER = ("C-STANCE", "FOMC", "MeetingBank", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds", "20Minuten")
TASKS = frozenset(ORDER)
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
_REPLAY = "Lima"  # comes with the benchmark for methods that rehearse, and is none of its tasks


class TraceSource(TextSource):
    """TRACE: `PATH/TASK/train.json`, `eval.json` (validation) and `test.json`, arrays of `{prompt, answer}`.

    Tasks come in the benchmark's order (C-STANCE, FOMC, MeetingBank, Py150, ScienceQA, NumGLUE-cm, NumGLUE-ds,
    20Minuten), others by name after them, and each is scored as there.

    Args:
        path: the folder of the tasks, or the folder of one.
        tasks: which of them, in this order; default: all but Lima, which is no task of the benchmark.
        score: other scores, by task.
    """

    def __init__(self, *, path: str, tasks: list[str] | None = None, score: dict[str, str] | None = None):
        self.path, self.tasks, self.score = path, tasks, score or {}
        for name in self.score.values():
            score_of(name)

    def _items(self) -> Iterator[Item]:
        for file in self._found[0]:
            assert file.split is not None
            assert file.task is not None
            for record in read_records(file.path):
                yield Item(file.split, file.task, _row(record))

    def _scoring(self, tasks: Sequence[str]) -> Mapping[str, str]:
        for task in self.score:
            if task not in tasks:
                raise UsageError(f"data.score: there is no task '{task}'; {closest(task, tasks)}")
        return {**SCORES, **self.score}

    def _order(self, tasks: Sequence[str]) -> Sequence[str]:
        return self.tasks if self.tasks is not None else [task for task in ORDER if task in tasks]

    def _warnings(self) -> list[str]:
        return self._found[1]

    @cached_property
    def _found(self) -> tuple[list[TextFile], list[str]]:
        own = label_of(os.path.basename(os.path.abspath(self.path)))
        files, warnings = text_files(existing(self.path, "folder"), "train")
        files = [TextFile(f.path, f.split, f.task or own) for f in files]
        loose = [printable(f.path) for f in files if f.split is None]
        if loose:
            raise DataError(f"{printable(self.path)}: expected PATH/TASK/train.json; found: {several(loose)}")
        there = {f.task for f in files if f.task is not None}
        for task in self.tasks or ():
            if task not in there:
                raise UsageError(f"data.tasks: there is no task '{task}'; {closest(task, there)}")
        chosen = set(self.tasks) if self.tasks is not None else there - {_REPLAY}
        if self.tasks is None and _REPLAY in there:
            warnings.append(f"{printable(self.path)}: {_REPLAY} is left out, for it is no task of the benchmark")
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

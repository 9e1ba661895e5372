"""CoIN, a benchmark of eight tasks for vision-language models that keep learning (Chen et al. 2024, 2403.08350)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property

from perpetune.data.names import label_of, several
from perpetune.data.pictured.files import ANSWERS, with_pictures
from perpetune.data.pictured.marks import IMAGES, shown_in
from perpetune.data.pictured.table import PicturedTable
from perpetune.data.sources import Fit, Kind, existing
from perpetune.data.texts.files import BenchmarkSource, Item, TextFile, list_texts, text_files
from perpetune.data.texts.layouts import layout_of
from perpetune.data.texts.records import Record, read_records
from perpetune.data.texts.tables import Row, key_of
from perpetune.errors import DataError, UsageError, closest

ORDER = ("ScienceQA", "TextVQA", "ImageNet", "GQA", "VizWiz", "Grounding", "VQAv2", "OCR-VQA")
SCORES = {
    "ScienceQA": "first_character",
    "TextVQA": "vqa",
    "ImageNet": "contains",
    "GQA": "exact_match",
    "VizWiz": "exact_match",
    "Grounding": "box",
    "VQAv2": "exact_match",
    "OCR-VQA": "exact_match",
}
PICTURES = "cl_dataset"  # the benchmark's folder of pictures
QUESTION = "text"  # the column of the question in its test files


class CoinSource(BenchmarkSource):
    """CoIN: `PATH/TASK/train.json` and `test.json`, as `Instruction_Original` and its like have them.

    Rows for training have `image` and `conversations`; those of the test `image`, `text` and `answer`. The tasks have
    the benchmark's order (ScienceQA, TextVQA, ImageNet, GQA, VizWiz, Grounding, VQAv2, OCR-VQA), and its scores
    without the faults of the released ones: an empty answer is never right, and a box that cannot be read is wrong.
    Other tasks follow by name, with exact match.

    Args:
        path: the folder of the tasks.
        images: the folder that paths of pictures are relative to; default: `cl_dataset` in `path` or beside it, or
            `path`.
        tasks: the tasks to read, in this order.
        score: your own scores, by task.
    """

    gives = "pictured"
    table = PicturedTable
    order, scores = ORDER, SCORES

    def __init__(
        self,
        *,
        path: str,
        images: str | None = None,
        tasks: list[str] | None = None,
        score: dict[str, str] | None = None,
    ):
        super().__init__(path, tasks, score)
        self.images = images
        if images is not None and not os.path.isdir(images):
            raise UsageError(f"data.images: {images} is no folder")

    @classmethod
    def fits(cls, path: str, wanted: Kind | None = None) -> Fit:
        if wanted != "pictured" or not os.path.isdir(path):
            return Fit.NO
        files, folders = list_texts(path)
        return Fit.LAYOUT if not files and {_known(folder) for folder in folders} & set(ORDER) else Fit.NO

    def _items(self) -> Iterator[Item]:
        for file in self._found[0]:
            assert file.split is not None
            assert file.task is not None
            for record in read_records(file.path):
                yield Item(file.split, _known(file.task), self._row(record))

    def _row(self, record: Record) -> Row:
        if record.fault:
            return Row(record.at, key_of(record.raw.decode(errors="backslashreplace")), None, record.fault)
        key = key_of(repr(record.value))
        try:
            value, pictures = shown_in(record.value, IMAGES, self._pictures)
            layout = layout_of(value.keys(), prompt=QUESTION)
            text = layout.text(value)
        except DataError as error:
            return Row(record.at, key, None, str(error))
        self._use(record, {*layout.used(value), *IMAGES, ANSWERS, "id", "question_id"})
        return with_pictures(Row(record.at, layout.key(value), text), text, value, pictures, self._pictures)

    @cached_property
    def _pictures(self) -> str:
        if self.images is not None:
            return self.images
        places = (
            os.path.join(self.path, PICTURES),
            os.path.join(os.path.dirname(os.path.abspath(self.path)), PICTURES),
        )
        return next((place for place in places if os.path.isdir(place)), self.path)

    @cached_property
    def _found(self) -> tuple[list[TextFile], list[str]]:
        files, warnings = text_files(existing(self.path, "folder"), "train")
        if self.tasks is None:
            return files, warnings
        known = {_known(f.task) for f in files if f.task is not None}
        for task in self.tasks:
            if task not in known:
                raise UsageError(f"data.tasks: there is no task '{task}'; {closest(task, known)}")
        left = sorted(known - set(self.tasks))
        warnings += [f"tasks that data.tasks does not name: {several(left)}"] if left else []
        return [f for f in files if f.task is not None and _known(f.task) in self.tasks], warnings


def _known(folder: str) -> str:
    """The benchmark's name of a task, however its folder writes it: `OCRVQA`."""
    plain = {name.replace("-", "").lower(): name for name in ORDER}
    return plain.get(folder.replace("-", "").replace("_", "").lower(), label_of(folder))

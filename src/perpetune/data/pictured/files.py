"""Texts with pictures in JSONL, JSON, CSV and parquet files, in the layouts that people have."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from perpetune.data.pictured.marks import IMAGES, MARK, shown_in, with_marks
from perpetune.data.pictured.table import PicturedTable
from perpetune.data.sources import Fit, Kind
from perpetune.data.texts.chats import is_empty, unpacked
from perpetune.data.texts.files import FileSource, Item, TextFile, holds_texts
from perpetune.data.texts.layouts import Layout
from perpetune.data.texts.records import Record
from perpetune.data.texts.tables import Row, Text, key_of, text_in
from perpetune.errors import DataError, UsageError

ANSWERS = "answers"  # the column of what several people answered


class PicturedSource(FileSource):
    """Texts with pictures, in the files and folders that texts are read from.

    A row has `image` or `images`: paths, relative to the file, or the bytes of files in parquet. Its text is `prompt`
    and `answer`, `messages` (whose parts may be pictures) or `conversations` as in LLaVA's files. A mark `<image>`
    stands in the prompt where a picture is; a prompt without marks gets them at its start. Rows without pictures are
    texts alone. A column `answers` may list what several people answered, for the score `vqa`.

    Args:
        path, test, prompt_column, answer_column, messages_column, input_column, system_column, history_column,
        tools_column, task_column, split_column, options, instruction, score: as for texts.
        image_column: the column of pictures; default: `image` or `images`.
        images: the folder that paths of pictures are relative to; default: that of the file.
    """

    gives = "pictured"
    table = PicturedTable

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
        image_column: str | None = None,
        images: str | None = None,
    ):
        super().__init__(
            path=path,
            test=test,
            prompt_column=prompt_column,
            answer_column=answer_column,
            messages_column=messages_column,
            input_column=input_column,
            system_column=system_column,
            history_column=history_column,
            tools_column=tools_column,
            task_column=task_column,
            split_column=split_column,
            options=options,
            instruction=instruction,
            score=score,
        )
        self.image_column, self.images = image_column, images
        self._folder = ""  # of the pictures of the file that is read now
        if images is not None and not os.path.isdir(images):
            raise UsageError(f"data.images: {images} is no folder")

    @classmethod
    def fits(cls, path: str, wanted: Kind | None = None) -> Fit:
        if wanted != "pictured" or not os.path.exists(path):
            return Fit.NO
        return Fit.CONTENT if holds_texts(path, sure=True) else Fit.NO

    def _rows(self, file: TextFile) -> Iterator[Item]:
        self._folder = self.images or os.path.dirname(file.path)
        yield from super()._rows(file)

    def _use(self, record: Record, used: Collection[str]) -> None:
        super()._use(record, {*used, *self._columns, ANSWERS})

    @property
    def _columns(self) -> tuple[str, ...]:
        return IMAGES if self.image_column is None else (self.image_column,)

    def _need_columns(self, columns: Sequence[str], layout: Layout, here: str) -> None:
        super()._need_columns(columns, layout, here)
        if self.image_column is not None and columns and self.image_column not in columns:
            raise DataError(f"{here}: no column '{self.image_column}'")

    def _row(self, record: Record, layout: Layout, column: str | list[str]) -> Row:
        if record.fault:
            return super()._row(record, layout, column)
        try:
            value, pictures = shown_in(record.value, self._columns, self._folder)
            if value.get(layout.messages) is not None and not is_empty(value.get(layout.answer)):
                raise DataError(
                    f"it has two answers, in '{layout.messages}' and in '{layout.answer}': one of them is expected"
                )
        except DataError as error:
            return Row(record.at, key_of(repr(record.value)), None, str(error))
        row = super()._row(replace(record, value=value), layout, column)
        return row if row.text is None else with_pictures(row, row.text, value, pictures, self._folder)


def with_pictures(
    row: Row, text: Text, value: Mapping[str, Any], pictures: tuple[str | bytes, ...], folder: str
) -> Row:
    """The row with its pictures, and with marks for them in its text.

    Args:
        value: its columns, for the answers of several people.
        folder: paths of pictures are relative to it; the key of the row must not depend on where it lies.
    """
    try:
        if MARK in text.answer or any(MARK in option for option in text.options):
            raise DataError(f"its answer holds the mark {MARK}; marks can stand in questions only")
        prompt = with_marks(text.prompt, len(pictures))
        references = _references(value.get(ANSWERS))
    except DataError as error:
        return Row(row.at, row.key, None, str(error))
    key = row.key
    if pictures:
        start = folder or "."
        shown = [os.path.relpath(p, start) if isinstance(p, str) else hashlib.sha256(p).hexdigest() for p in pictures]
        key = key_of(row.key, shown)
    text = replace(text, prompt=prompt, pictures=len(pictures), references=references)
    return Row(row.at, key, text, row.fault, pictures)


def _references(value: Any) -> tuple[str, ...]:
    """What several people answered: texts, or objects with an `answer` as in VQA's files."""
    listed = unpacked(value)
    if is_empty(listed):
        return ()
    if not isinstance(listed, list):
        raise DataError(f"the answers (column '{ANSWERS}') hold {type(listed).__name__}; expected a list of texts")
    return tuple(text_in(one.get("answer") if isinstance(one, Mapping) else one, "answer") for one in listed)

"""Pictures with captions: no classes, but one or more sentences for each picture."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from perpetune.data.columns import Split, group_column, missing_column, split_of, unused_columns
from perpetune.data.names import label_of, printable, several
from perpetune.data.parquet import read_columns, read_schema
from perpetune.data.pictures.arrow import ArrowTable, picture_column
from perpetune.data.pictures.rows import cell_text, read_rows
from perpetune.data.pictures.tables import FileTable, PictureTable
from perpetune.data.sources import Fit, Kind, Source, existing, file_start
from perpetune.errors import DataError

SCORE = "retrieval"  # what answers to captions are worth
LONGEST_CAPTION = 10_000  # characters


class Captioned(PictureTable):
    """A table of pictures with captions, which has no classes. It stands before the class of the pictures' form."""

    free = True
    captioned = True
    said: Sequence[tuple[str, ...]]
    """The captions of each picture."""

    def captions(self, i: int) -> Sequence[str]:
        return self.said[i]

    def digest(self, i: int) -> bytes:
        return super().digest(i) + repr(self.said[i]).encode()

    def classes(self, rows: Iterable[int]) -> set[str]:
        return set()

    def fits(self, i: int, classes: Collection[str]) -> bool:
        return True

    def score(self, rows: Iterable[int]) -> str:
        return SCORE


class CaptionFiles(Captioned, FileTable):
    """Pictures in files, with captions."""


class CaptionArrow(Captioned, ArrowTable):
    """Pictures in arrow columns, with captions."""


@dataclass(frozen=True)
class _Row:
    at: str
    split: Split
    path: str
    captions: tuple[str, ...]
    group: str


class CaptionSource(Source):
    """Pictures with captions: a JSONL, JSON or CSV file with the path of each picture, or a parquet file.

    A caption is a text, and several captions are a list of texts. If several rows name one picture, it has the captions
    of all of them. A picture's path is relative to the file. There are no classes: the stream is cut by task or domain,
    and without such a column everything is one task.

    Args:
        path: the file.
        test: the file of the test pictures; default: the rows with the split `test`, or `val` if there are none.
        image_column: the column with the picture: its path, or in parquet its bytes or `{bytes, path}`.
        caption_column: the column with the captions; default: `captions` or `caption`, whichever is there.
        group_column: the column with the task or domain; default: the column `task` or `domain`, if there is one.
        split_column: the column that says train, test or val; default: the column `split`, if there is one.
    """

    classed = False

    def __init__(
        self,
        *,
        path: str,
        test: str | None = None,
        image_column: str = "image",
        caption_column: str | None = None,
        group_column: str | None = None,
        split_column: str | None = None,
    ):
        self.path, self.test_path = path, test
        self.image_column, self.caption_column = image_column, caption_column
        self.group_column, self.split_column = group_column, split_column
        self._notes: dict[str, list[str]] = {}  # of each file, on its columns

    @classmethod
    def fits(cls, path: str, wanted: Kind | None = None) -> Fit:
        """Captions are known by their column, in the first line of a file of lines."""
        if not path.lower().endswith((".jsonl", ".ndjson", ".csv", ".tsv")):
            return Fit.NO
        start = file_start(path, 1 << 16).partition(b"\n")[0].lower()
        named = [name in start for name in (b"caption", b"image", b"label")]
        return Fit.CONTENT if named == [True, True, False] else Fit.NO

    def train(self) -> Captioned:
        table = self._table(self.path, ["train"])
        if not len(table):
            raise DataError(f"{printable(self.path)}: no row is in the train split")
        return table

    def test(self) -> Captioned | None:
        if self.test_path is not None:
            return self._table(self.test_path, ["train", "test", "validation"])
        splits = {row.split for row in self._rows}
        if not splits - {"train"}:
            return None
        table = self._table(self.path, ["test" if "test" in splits else "validation"])
        if {"test", "validation"} <= splits:
            held = sum(row.split == "validation" for row in self._rows)
            table.warnings.append(
                f"{printable(self.path)}: {held} validation rows are not used, because there are test rows"
            )
        return table

    @cached_property
    def _rows(self) -> list[_Row]:
        return self._read(self.path, split="train" if self.test_path is not None else None)

    def _read(self, path: str, split: Split | None) -> list[_Row]:
        here, parquet = printable(path), path.lower().endswith(".parquet")
        rows = _parquet_rows(path, self.image_column) if parquet else read_rows(existing(path, "file of captions"))
        columns = list(dict.fromkeys(column for _, row in rows for column in row))
        there = read_schema(path).names if parquet else columns
        caption, group, choice = self._columns(columns, here, there)
        self._notes[path] = unused_columns(there, (self.image_column, caption, group, choice), here)
        return [
            _Row(
                at,
                split or (split_of(row.get(choice), at) if choice is not None else "train"),
                "" if parquet else _path(row.get(self.image_column), self.image_column, at),
                _captions(row.get(caption), caption, at),
                label_of(cell_text(row.get(group), group, at)) if group is not None else "",
            )
            for at, row in rows
        ]

    def _columns(self, columns: Sequence[str], here: str, there: Sequence[str]) -> tuple[str, str | None, str | None]:
        """The columns of the captions, of the group and of the split; DataError if one is missing."""
        if self.image_column not in there:
            raise missing_column(there, self.image_column, "image_column", here)
        caption = self.caption_column or next((name for name in ("captions", "caption") if name in columns), "captions")
        if caption not in columns:
            raise missing_column(columns, caption, "caption_column", here)
        choice = self.split_column or ("split" if "split" in columns else None)
        if choice is not None and choice not in columns:
            raise missing_column(columns, choice, "split_column", here)
        return caption, group_column(columns, self.group_column, here), choice

    def _table(self, path: str, splits: Collection[Split]) -> Captioned:
        rows = self._rows if path == self.path else self._read(path, split="test")
        chosen = [number for number, row in enumerate(rows) if row.split in splits]
        make = self._of_parquet if path.lower().endswith(".parquet") else self._of_files
        table = make(path, rows, chosen)
        table.warnings += self._notes[path]
        twice = [table.name(i) for i, said in enumerate(table.said) if len(set(said)) < len(said)]
        if twice:
            table.said = [tuple(dict.fromkeys(said)) for said in table.said]
            table.warnings.append(
                f"{printable(path)}: a caption stands twice at {len(twice)} pictures and is used once: {several(twice)}"
            )
        return table

    def _of_parquet(self, path: str, rows: Sequence[_Row], chosen: Sequence[int]) -> CaptionArrow:
        images = read_columns(path, [self.image_column]).column(self.image_column)
        here, groups = printable(path), _groups([rows[number] for number in chosen])
        where = [os.path.dirname(os.path.abspath(path))]
        picked = images.take(list(chosen)) if chosen else images.slice(0, 0)
        table = CaptionArrow(
            [(here, picture_column(picked, here, self.image_column))], [""] * len(chosen), groups, where
        )
        table.said = [rows[number].captions for number in chosen]
        table.warnings += table.elsewhere()
        return table

    def _of_files(self, path: str, rows: Sequence[_Row], chosen: Sequence[int]) -> CaptionFiles:
        root = os.path.dirname(os.path.abspath(path))
        first: dict[tuple[str, str], _Row] = {}
        said: dict[tuple[str, str], list[str]] = {}
        for row in (rows[number] for number in chosen):
            place = (os.path.normpath(os.path.join(root, row.path)), row.group)
            first.setdefault(place, row)
            said.setdefault(place, []).extend(row.captions)
        kept = list(first.values())
        table = CaptionFiles(os.path.dirname(path), [row.path for row in kept], [""] * len(kept), _groups(kept))
        table.said = [tuple(captions) for captions in said.values()]
        return table


def _groups(rows: Sequence[_Row]) -> list[str]:
    """The task or domain of each row; without any, all are of one task."""
    named = any(row.group for row in rows)
    return [row.group if named else "captions" for row in rows]


def _path(value: Any, column: str, at: str) -> str:
    path = cell_text(value, column, at).strip()
    if not path:
        raise DataError(f"{at}: no picture (column '{column}')")
    return path


def _captions(value: Any, column: str, at: str) -> tuple[str, ...]:
    """The captions in a cell, without white space around them; DataError if there is none."""
    listed = value if isinstance(value, list | tuple) else [value]
    for caption in listed:
        if not isinstance(caption, str) or not caption.strip():
            raise DataError(
                f"{at}: column '{column}' holds {str(caption)[:40]!r}; a caption or a list of captions is expected"
            )
        if len(caption) > LONGEST_CAPTION:
            raise DataError(
                f"{at}: column '{column}' holds {len(caption)} characters; at most {LONGEST_CAPTION} are a caption"
            )
    if not listed:
        raise DataError(f"{at}: column '{column}' holds no caption")
    return tuple(caption.strip() for caption in listed)


def _parquet_rows(path: str, image: str) -> list[tuple[str, dict[str, Any]]]:
    """Each row of a parquet file without its picture, with its place."""
    names = [name for name in read_schema(path, "captions").names if name != image]
    rows = read_columns(path, names).to_pylist()
    if not rows:
        raise DataError(f"{printable(path)}: no rows")
    return [(f"{printable(path)} row {number}", row) for number, row in enumerate(rows)]

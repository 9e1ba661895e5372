"""Pictures in arrow tables and in parquet files."""

from __future__ import annotations

import bisect
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from perpetune.data.columns import class_names, group_column, named
from perpetune.data.names import natural, printable, several
from perpetune.data.parquet import read_columns, read_schema
from perpetune.data.pictures.read import list_folder
from perpetune.data.pictures.tables import PictureTable
from perpetune.data.sources import Fit, Kind, Source, existing
from perpetune.errors import DataError


@dataclass(frozen=True)
class Columns:
    """The names of the columns. Without `group`, a column `task` or `domain` is taken."""

    image: str = "image"
    label: str = "label"
    group: str | None = None


class ArrowTable(PictureTable):
    """Pictures in an arrow column, as bytes or as `{bytes, path}`; a row may have a path only.

    Args:
        parts: for each file or data set its name and its pictures, a `pyarrow.ChunkedArray`. The pictures are not
            copied; memory-mapped ones stay so.
    """

    def __init__(self, parts: Sequence[tuple[str, Any]], labels: Sequence[str], groups: Sequence[str] | None):
        super().__init__(labels, groups)
        self.parts = parts
        self._starts = [0, *itertools.accumulate(len(images) for _, images in parts)]

    def _cell(self, i: int) -> tuple[str, int, Any]:
        """The name of the part with row `i`, the row's number in the part, and the value of its cell."""
        part = bisect.bisect_right(self._starts, i) - 1
        name, images = self.parts[part]
        row = i - self._starts[part]
        return name, row, images[row].as_py()

    def encoded(self, i: int) -> str | bytes:
        cell = self._cell(i)[2]
        if isinstance(cell, dict):
            cell = cell.get("bytes") or cell.get("path")
        return cell or b""

    def name(self, i: int) -> str:
        name, row, cell = self._cell(i)
        path = cell.get("path") if isinstance(cell, dict) else None
        return f"{name} row {row}" + (f" ({printable(path)})" if path else "")

    def key(self, i: int) -> str:
        return str(i)


def arrow_table(parts: Sequence[tuple[str, Any]], columns: Columns, names: Sequence[str] | None = None) -> ArrowTable:
    """Make one table from arrow tables.

    Args:
        parts: for each arrow table its name for messages, and the table.
        names: class names for whole-number labels, for parts without class names.

    Raises:
        DataError: a column is missing or has an unusable type, or there are no rows.
    """
    images = []
    labels: list[str] = []
    groups: list[str] = []
    for where, table in parts:
        group = _present(table.column_names, columns, where)[1]
        image = table.column(columns.image)
        if not (_holds_pictures(image.type) or len(image) == 0):
            raise DataError(
                f"{where}: column '{columns.image}' is {image.type}; expected encoded pictures, "
                "binary or {bytes, path}"
            )
        images.append((where, image))
        known = class_names(table.schema, columns.label) or names
        labels += named(table.column(columns.label).to_pylist(), known, columns.label, where)
        if group is None:
            groups += [""] * len(image)
        else:
            groups += named(table.column(group).to_pylist(), class_names(table.schema, group), group, where)
    if not labels:
        raise DataError(f"{several([where for where, _ in parts])}: no rows")
    return ArrowTable(images, labels, groups if any(groups) else None)


def _present(names: Sequence[str], columns: Columns, where: str) -> tuple[list[str], str | None]:
    """The columns to read, and the name of the group column; DataError if a column is missing."""
    for column in (columns.image, columns.label):
        if column not in names:
            raise DataError(f"{where}: no column '{column}'; found: {several(names, 20)}")
    group = group_column(names, columns.group, where)
    return [name for name in (columns.image, columns.label, group) if name is not None], group


def _holds_pictures(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return "bytes" in [kind.field(i).name for i in range(kind.num_fields)]
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


class ParquetSource(Source):
    """Parquet files with a column of encoded pictures (`{bytes, path}` or bytes) and a column of labels.

    Args:
        path: a file, a list of files, or a folder with `train*.parquet` and `test*.parquet` (or `val*`).
        test: the file or files with the test pictures.
        image_column, label_column: the names of the columns. Whole-number labels get their names from the Hugging Face
            metadata of the file, else of the first training file, if there are any.
        group_column: the column with the task or domain; default: the column `task` or `domain`, if there is one.
    """

    def __init__(
        self,
        *,
        path: str | list[str],
        test: str | list[str] | None = None,
        image_column: str = "image",
        label_column: str = "label",
        group_column: str | None = None,
    ):
        self.path = path
        self.test_path = test
        self.columns = Columns(image_column, label_column, group_column)

    @classmethod
    def fits(cls, path: str, wanted: Kind | None = None) -> Fit:
        if not os.path.isdir(path):
            return Fit.NAME if path.lower().endswith(".parquet") else Fit.NO
        parquet = any(name.endswith(".parquet") for name in os.listdir(path))
        return Fit.NAME if parquet and not list_folder(path)[0] else Fit.NO

    def train(self) -> ArrowTable:
        train, _ = self._files()
        return self._table(train, train)

    def test(self) -> ArrowTable | None:
        train, test = self._files()
        both = [f for f in test if any(os.path.samefile(f, g) for g in train)]
        if both:
            raise DataError(f"the same file is in train and in test: {several([printable(f) for f in both])}")
        return self._table(test, train) if test else None

    def _table(self, files: Sequence[str], train: Sequence[str]) -> ArrowTable:
        parts = [(printable(file), _read(file, self.columns)) for file in files]
        return arrow_table(parts, self.columns, class_names(read_schema(train[0]), self.columns.label))

    def _files(self) -> tuple[list[str], list[str]]:
        """The files with the training pictures, and the files with the test pictures."""
        given = _listed(self.test_path) if self.test_path is not None else []
        if not isinstance(self.path, str) or not os.path.isdir(self.path):
            return _listed(self.path), given
        names = natural(f for f in os.listdir(self.path) if f.endswith(".parquet") and not f.startswith("."))
        split = {s: [os.path.join(self.path, f) for f in names if f.startswith(s)] for s in ("train", "test", "val")}
        if not split["train"]:
            raise DataError(f"{printable(self.path)}: no train*.parquet; found: {several(names) or 'no parquet file'}")
        return split["train"], given or split["test"] or split["val"]


def _listed(paths: str | list[str]) -> list[str]:
    files = [existing(path, "parquet file") for path in ([paths] if isinstance(paths, str) else paths)]
    if not files:
        raise DataError("data: parquet: the list of files is empty")
    return files


def _read(file: str, columns: Columns) -> Any:
    """Only the needed columns of a file, because other columns may be large."""
    return read_columns(file, _present(read_schema(file).names, columns, printable(file))[0])

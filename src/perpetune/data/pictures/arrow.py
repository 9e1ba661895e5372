"""Pictures in arrow tables and in parquet files."""

from __future__ import annotations

import bisect
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from perpetune.data.columns import (
    Split,
    class_names,
    group_column,
    missing_column,
    named,
    split_begun,
    split_named,
    splits_among,
    unused_columns,
)
from perpetune.data.names import label_of, natural, one_class, printable, several
from perpetune.data.parquet import read_columns, read_schema
from perpetune.data.pictures.read import holds_picture, list_folder
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
    """Pictures in an arrow column, as bytes, as `{bytes, path}` or as a path; a row may have a path only.

    A relative path goes by the folder of the file that it stands in. Where nothing is there, it goes by the folder
    where the command runs, as it did in earlier versions.

    Args:
        parts: name of each file or data set that rows come from, and its pictures, a `pyarrow.ChunkedArray`;
            they stay where they are, memory-mapped if they were.
        roots: the folder of each part; None is the one where the command runs.
    """

    def __init__(
        self,
        parts: Sequence[tuple[str, Any]],
        labels: Sequence[str],
        groups: Sequence[str] | None,
        roots: Sequence[str] | None = None,
    ):
        super().__init__(labels, groups)
        self.parts = parts
        self.roots = roots
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
            cell = cell.get("bytes") or self._placed(i, cell.get("path"))
        elif isinstance(cell, str):
            cell = self._placed(i, cell)
        return cell or b""

    def _placed(self, i: int, path: str | None) -> str | None:
        """A path that row `i` holds, by the folder of its file."""
        if not path or self.roots is None or os.path.isabs(path):
            return path
        beside = os.path.join(self.roots[bisect.bisect_right(self._starts, i) - 1], path)
        return path if os.path.exists(path) and not os.path.exists(beside) else beside

    def elsewhere(self) -> list[str]:
        """A line where the first relative path in the first rows is not beside its file, but found from here."""
        for i in range(min(len(self), 100)):
            name, _, cell = self._cell(i)
            path = _path_in(cell) if not (isinstance(cell, dict) and cell.get("bytes")) else None
            if path and not os.path.isabs(path):
                if self.roots is not None and self._placed(i, path) == path:
                    return [
                        f"{name}: {printable(path)} is not beside the file, and is taken from the folder where the "
                        "command runs; paths in a parquet file go by the file"
                    ]
                return []
        return []

    def name(self, i: int) -> str:
        name, row, cell = self._cell(i)
        path = _path_in(cell)
        return f"{name} row {row}" + (f" ({printable(path)})" if path else "")

    def key(self, i: int) -> str:
        return str(i)


def _path_in(cell: Any) -> str | None:
    """The path that a cell holds; None where it holds none."""
    path = cell.get("path") if isinstance(cell, dict) else cell
    return path if isinstance(path, str) and path else None


def arrow_table(
    parts: Sequence[tuple[str, Any]],
    columns: Columns,
    names: Sequence[str] | None = None,
    roots: Sequence[str] | None = None,
) -> ArrowTable:
    """One table out of arrow tables, each with the name it goes by.

    Args:
        names: class names for whole-number labels of parts that bring none.
        roots: the folder that relative paths in each part go by.

    Raises:
        DataError: a column is missing or has an unusable type, or there are no rows.
    """
    images = []
    labels: list[str] = []
    groups: list[str] = []
    for where, table in parts:
        group = _present(table.column_names, columns, where)[1]
        image = picture_column(table.column(columns.image), where, columns.image, paths=roots is not None)
        images.append((where, image))
        known = class_names(table.schema, columns.label) or names
        labels += named(table.column(columns.label).to_pylist(), known, columns.label, where)
        if group is None:
            groups += [""] * len(image)
        else:
            groups += named(table.column(group).to_pylist(), class_names(table.schema, group), group, where)
    if not labels:
        raise DataError(f"{several([where for where, _ in parts])}: no rows")
    here = several([where for where, _ in parts])
    table = ArrowTable(images, _tidy(labels), _tidy(groups) if any(groups) else None, roots)
    table.warnings += one_class(labels, f"{here}: column '{columns.label}'")
    table.warnings += one_class(groups, f"{here}: column '{columns.group or 'task or domain'}'")
    return table


def _tidy(names: Sequence[str]) -> list[str]:
    known = {name: label_of(name) for name in set(names)}
    return [known[name] for name in names]


def _present(found: Sequence[str], columns: Columns, where: str) -> tuple[list[str], str | None]:
    """The columns that are of use, and which of them is the group; DataError when one is missing."""
    for option, column in (("image_column", columns.image), ("label_column", columns.label)):
        if column not in found:
            raise missing_column(found, column, option, where)
    group = group_column(found, columns.group, where)
    return [name for name in (columns.image, columns.label, group) if name is not None], group


def picture_column(images: Any, where: str, column: str, *, paths: bool = False) -> Any:
    """`images`, a column of an arrow table, once it is known to hold encoded pictures; DataError if it does not.

    Args:
        paths: whether texts are the paths of pictures.
    """
    if not (_holds_pictures(images.type, paths) or len(images) == 0):
        also = ", or paths" if paths else ""
        raise DataError(
            f"{where}: column '{column}' is {images.type}; expected encoded pictures, binary or {{bytes, path}}{also}"
        )
    return images


def _holds_pictures(kind: Any, paths: bool) -> bool:
    """Whether values of an arrow type are pictures; with `paths`, texts are the paths of pictures."""
    import pyarrow as pa

    if paths and (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return True
    if paths and pa.types.is_dictionary(kind):
        return _holds_pictures(kind.value_type, paths)
    if pa.types.is_struct(kind):
        return "bytes" in [kind.field(i).name for i in range(kind.num_fields)]
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


class ParquetSource(Source):
    """Parquet files with a column of pictures (`{bytes, path}`, bytes, or paths) and a column of labels.

    Args:
        path: a file, a list of files, or a folder with `train*.parquet` and `test*.parquet` (or by another name in
            `columns.SPLITS`), in itself, in `data/`, or in folders `train/` and `test/`.
        test: file or files of the test pictures.
        image_column, label_column: what the columns are called. Whole-number labels take their names from
            the Hugging Face metadata of the file, else of the first training file, where there are any.
        group_column: the column with the task or domain; default: `task` or `domain`, whichever is there.
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
        return Fit.NAME if holds_parquet(path) and not holds_picture(path) else Fit.NO

    def train(self) -> ArrowTable:
        train, _, warnings = self._files
        table = self._table(train, train)
        names = read_schema(train[0]).names
        used = _present(names, self.columns, printable(train[0]))[0]
        table.warnings += warnings + unused_columns(names, used, printable(train[0]))
        return table

    def test(self) -> ArrowTable | None:
        train, test, _ = self._files
        both = [f for f in test if any(os.path.samefile(f, g) for g in train)]
        if both:
            raise DataError(f"the same file is in train and in test: {several([printable(f) for f in both])}")
        return self._table(test, train) if test else None

    def _table(self, files: Sequence[str], train: Sequence[str]) -> ArrowTable:
        parts = [(printable(file), _read(file, self.columns)) for file in files]
        roots = [os.path.dirname(os.path.abspath(file)) for file in files]
        table = arrow_table(parts, self.columns, class_names(read_schema(train[0]), self.columns.label), roots)
        table.warnings += table.elsewhere()
        return table

    @cached_property
    def _files(self) -> tuple[list[str], list[str], list[str]]:
        """Files of the training and of the test pictures, and a line on what is not used."""
        asked = _listed(self.test_path) if self.test_path is not None else []
        if not isinstance(self.path, str) or not os.path.isdir(self.path):
            return _listed(self.path), asked, []
        here, (found, others) = printable(self.path), parquet_files(self.path)
        if "train" not in found:
            names = natural(os.path.basename(f) for f in [f for files in found.values() for f in files] + others)
            raise DataError(f"{here}: no train*.parquet; found: {several(names) or 'no parquet file'}")
        kinds: tuple[Split, ...] = ("test", "validation")
        test = next((kind for kind in kinds if kind in found), None) if not asked else None
        left = others + [file for kind in kinds if kind in found and kind != test for file in found[kind]]
        names = [printable(os.path.relpath(file, self.path)) for file in left]
        warnings = [f"{here}: not used beside train: {several(names)}"] if left else []
        return found["train"], asked or (found[test] if test else []), warnings


def holds_parquet(path: str, depth: int = 2) -> bool:
    """Whether a parquet file lies in a folder, or so many folders deep in it."""
    files, folders = _listing(path)
    return bool(files) or (depth > 0 and any(holds_parquet(os.path.join(path, f), depth - 1) for f in folders))


def parquet_files(path: str) -> tuple[dict[Split, list[str]], list[str]]:
    """The parquet files of a folder by split, and those that are of none.

    Where none lies in the folder itself, they are looked for in folders that are named by a split, and in the only
    folder that holds any, such as `data/` of a data set's repository. Files without the name of a split, such as
    `0000.parquet`, are those of training where they are all there is.

    Raises:
        DataError: several folders hold some, and none of them is named by a split.
    """
    names, folders = _listing(path)
    if names:
        found: dict[Split, list[str]] = {}
        others: list[str] = []
        for name in names:
            split = split_begun(name)
            (others if split is None else found.setdefault(split, [])).append(os.path.join(path, name))
        return (found, others) if found else ({"train": others}, [])
    folders = [f for f in folders if holds_parquet(os.path.join(path, f))]
    splits = splits_among(folders)
    if splits:
        inside = {
            s: [os.path.join(path, f, n) for f in fs for n in _listing(os.path.join(path, f))[0]]
            for s, fs in splits.items()
        }
        return {s: files for s, files in inside.items() if files}, [
            os.path.join(path, f) for f in folders if not split_named(f)
        ]
    if len(folders) > 1:
        raise DataError(
            f"{printable(path)}: several folders of parquet files: {several([printable(f) for f in folders])}; "
            "name the one to use"
        )
    return parquet_files(os.path.join(path, folders[0])) if folders else ({}, [])


def _listing(path: str) -> tuple[list[str], list[str]]:
    """Names of the parquet files in a folder, and of the folders in it; hidden ones are left out."""
    folders, _, others = list_folder(path)
    return natural(name for name in others if name.lower().endswith(".parquet")), folders


def _listed(paths: str | list[str]) -> list[str]:
    files = [existing(path, "parquet file") for path in ([paths] if isinstance(paths, str) else paths)]
    if not files:
        raise DataError("data: parquet: the list of files is empty")
    return files


def _read(file: str, columns: Columns) -> Any:
    """Only the needed columns of a file, because other columns may be large."""
    return read_columns(file, _present(read_schema(file).names, columns, printable(file))[0])

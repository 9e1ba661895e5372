"""A list of pictures in a CSV or JSONL file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from perpetune.data.columns import Split, group_column, missing_column, split_of, unused_columns
from perpetune.data.names import label_of, natural, one_class, printable, several
from perpetune.data.pictures.rows import cell_text, read_rows
from perpetune.data.pictures.tables import FileTable
from perpetune.data.sources import Fit, Kind, Source, existing
from perpetune.errors import DataError, closest


@dataclass(frozen=True)
class _Record:
    at: str  # file and line
    split: Split
    path: str
    label: str
    group: str


class ManifestSource(Source):
    """A list of pictures: a CSV file, a JSONL file (one object a line) or a JSON array of objects.

    A CSV file has a header and commas, semicolons or tabs. A picture's path is relative to the manifest. Rows that
    repeat an earlier one are left out with a warning.

    Args:
        path: the manifest.
        test: the manifest of the test pictures; default: the rows with the split `test`, or `val` if there are none.
        path_column, label_column: the names of the columns.
        group_column: the column with the task or domain; default: the column `task` or `domain`, if there is one.
        split_column: the column that says train, test or val; default: the column `split`, if there is one.
        labels: the allowed labels; any other label is an error. Default: all labels are allowed.
    """

    def __init__(
        self,
        *,
        path: str,
        test: str | None = None,
        path_column: str = "path",
        label_column: str = "label",
        group_column: str | None = None,
        split_column: str | None = None,
        labels: list[str] | None = None,
    ):
        self.path = path
        self.test_path = test
        self.path_column = path_column
        self.label_column = label_column
        self.group_column = group_column
        self.split_column = split_column
        self._notes: dict[str, list[str]] = {}  # of each manifest, on its columns and the spelling of its names
        self.labels = None if labels is None else [label_of(label) for label in labels]

    def without_labels(self) -> ManifestSource:
        return ManifestSource(
            path=self.path,
            test=self.test_path,
            path_column=self.path_column,
            label_column=self.path_column,
            group_column=self.group_column,
            split_column=self.split_column,
        )

    @classmethod
    def fits(cls, path: str, wanted: Kind | None = None) -> Fit:
        suffixes = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")
        return Fit.NAME if path.lower().endswith(suffixes) and not os.path.isdir(path) else Fit.NO

    def train(self) -> FileTable:
        table = self._table(self.path, [r for r in self._records if r.split == "train"])
        if not len(table):
            raise DataError(f"{printable(self.path)}: no row is in the train split")
        if self.labels is not None:
            unused = natural(set(self.labels) - set(table.labels))
            if unused:
                table.warnings.append(f"{printable(self.path)}: no picture has the declared label {several(unused)}")
        return table

    def test(self) -> FileTable | None:
        if self.test_path is not None:
            return self._table(self.test_path, self._read(self.test_path, split="test"))
        tests = [r for r in self._records if r.split == "test"]
        held = [r for r in self._records if r.split == "validation"]
        if not tests and not held:
            return None
        table = self._table(self.path, tests or held)
        if tests and held:
            table.warnings.append(
                f"{printable(self.path)}: {len(held)} validation rows are not used, because there are test rows"
            )
        return table

    @cached_property
    def _records(self) -> list[_Record]:
        return self._read(self.path, split="train" if self.test_path is not None else None)

    def _read(self, path: str, split: Split | None) -> list[_Record]:
        """All rows. They are in `split`; if it is None, in the split of the split column, or else in train."""
        rows = read_rows(existing(path, "manifest"))
        here = printable(path)
        columns = list(dict.fromkeys(c for _, row in rows for c in row))
        for option, wanted in (
            ("path_column", self.path_column),
            ("label_column", self.label_column),
            ("split_column", self.split_column),
        ):
            if wanted is not None and wanted not in columns:
                raise missing_column(columns, wanted, option, here)
        group = group_column(columns, self.group_column, here)
        choice = self.split_column or ("split" if "split" in columns else None)
        if split is not None or choice is None:
            splits: list[Split] = [split or "train"] * len(rows)
        else:
            splits = [split_of(row.get(choice), at) for at, row in rows]
        if path not in self._notes:
            used = (self.path_column, self.label_column, group, choice if split is None else None)
            self._notes[path] = unused_columns(columns, used, here)
            named = (
                None if self.label_column == self.path_column else self.label_column
            )  # paths are no names of classes
            for column in (named, group):
                cells = (cell_text(row.get(column), column, at) for at, row in rows if column is not None)
                self._notes[path] += one_class(cells, f"{here}: column '{column}'")
        records = [
            _Record(
                at,
                part,
                cell_text(row.get(self.path_column), self.path_column, at).strip(),
                label_of(cell_text(row.get(self.label_column), self.label_column, at)),
                label_of(cell_text(row.get(group), group, at)) if group is not None else "",
            )
            for (at, row), part in zip(rows, splits, strict=True)
        ]
        self._check(records, here)
        return records

    def _check(self, records: Sequence[_Record], here: str) -> None:
        for what, column, lines in (
            ("path", self.path_column, [r.at for r in records if not r.path]),
            ("label", self.label_column, [r.at for r in records if not r.label]),
        ):
            if lines:
                raise DataError(f"no {what} (column '{column}') in {several(lines)}")
        if self.labels is not None:
            declared = set(self.labels)
            foreign = {r.label: r.at for r in reversed(records) if r.label not in declared}
            if foreign:
                names = several([f"'{label}' ({at})" for label, at in reversed(foreign.items())])
                near = closest(next(reversed(foreign)), declared)
                raise DataError(f"label not declared under data.labels: {names}; {near}")

    def _table(self, path: str, records: Sequence[_Record]) -> FileTable:
        first: dict[tuple[str, str], _Record] = {}
        root = os.path.dirname(os.path.abspath(path))
        for record in records:
            place = os.path.normpath(os.path.join(root, record.path))  # `./a.png` and `b/../a.png` are `a.png`
            before = first.setdefault((place, record.group), record)
            if before.label != record.label:
                raise DataError(
                    f"{record.at}: {printable(record.path)} has label '{record.label}', but '{before.label}' before "
                    f"({before.at})"
                )
        kept = list(first.values())
        grouped = any(r.group for r in kept)
        repeated = len(records) - len(kept)
        warnings = [f"{printable(path)}: {repeated} rows repeat an earlier row and are left out"] if repeated else []
        warnings += self._notes.get(path, [])
        return FileTable(
            os.path.dirname(path),
            [r.path for r in kept],
            [r.label for r in kept],
            [r.group for r in kept] if grouped else None,
            warnings,
        )

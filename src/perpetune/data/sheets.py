"""Rows of CSV and TSV files."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator
from typing import Any, TextIO

from perpetune.data.names import natural, several
from perpetune.errors import DataError

SHEETS = (".csv", ".tsv")


def encoding_of(start: bytes) -> str:
    """The encoding of a sheet or of other text that begins so: UTF-8, or UTF-16 as in Excel's "Unicode text"."""
    return "utf-16" if start[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def sheet_rows(file: TextIO, here: str, longest: int | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of named cells, each with its line. The delimiter is that of comma, semicolon and tab which the header has
    most often.

    What Excel leaves is no row and no column: a line `sep=;`, lines and columns of nothing.

    Args:
        file: opened with `newline=""`.
        longest: the most characters of a cell; None is what the `csv` module allows.

    Raises:
        DataError: there is no header, a column stands in it twice, or a row cannot be read.
    """
    header, start = file.readline(), 0
    delimiter = header[4:5] if header.lower().startswith("sep=") and len(header.strip()) == 5 else ""
    if delimiter:
        start = file.tell()
        header = file.readline()
    if not header.strip():
        raise DataError(f"{here}: no header line; expected columns such as path,label")
    file.seek(start)
    reader = csv.reader(file, delimiter=delimiter or max(",;\t", key=header.count), strict=True)
    above = 1 if delimiter else 0  # lines that the reader does not count
    with _allowed(longest):
        try:
            named = [c.strip() for c in next(reader)]
            columns = [name or f"(column {number})" for number, name in enumerate(named, 1)]
            twice = natural({c for c in columns if columns.count(c) > 1})
            if twice:
                raise DataError(f"{here}: the header has a column twice: {several(twice)}")
            for cells in reader:
                line = reader.line_num + above
                if not any(cell.strip() for cell in cells):
                    continue
                spare = cells[len(columns) :]
                if len(cells) < len(columns) or any(cell.strip() for cell in spare):
                    raise DataError(f"{here} line {line}: {len(cells)} cells; the header has {len(columns)}")
                pairs = zip(columns, named, cells, strict=False)
                yield f"line {line}", {column: cell for column, name, cell in pairs if name or cell.strip()}
        except csv.Error as error:
            raise DataError(f"{here} line {reader.line_num + above}: {error}") from error


def sheet_columns(start: bytes) -> set[str]:
    """The columns of the sheet that begins so; none if the beginning has no header."""
    lines = start.decode(encoding_of(start), errors="replace").splitlines()
    if lines and lines[0].lower().startswith("sep="):
        del lines[0]
    header = lines[0] if lines else ""
    try:
        cells = next(csv.reader([header], delimiter=max(",;\t", key=header.count)), [])
    except csv.Error:
        return set()
    return {cell.strip() for cell in cells}


@contextlib.contextmanager
def _allowed(longest: int | None) -> Iterator[None]:
    """Inside this context cells may have so many characters; the `csv` module has one bound for all readers."""
    before = csv.field_size_limit()
    if longest is not None:
        csv.field_size_limit(longest)
    try:
        yield
    finally:
        csv.field_size_limit(before)

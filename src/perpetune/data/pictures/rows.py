"""Rows of a CSV or JSONL file."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from typing import Any, TextIO

from perpetune.data.names import natural, printable, several
from perpetune.data.sources import LFS, LONGEST, POINTER, existing, is_pointer
from perpetune.errors import DataError
from perpetune.plain import Malformed, parse_json


def read_rows(path: str) -> list[tuple[str, dict[str, Any]]]:
    """Each row of a `.jsonl`, `.json` or CSV file with the place it stands at, for messages.

    A CSV file has a header. Its delimiter is that of comma, semicolon and tab which the header has most often.

    Raises:
        DataError: the file or a line cannot be read, or there are no rows.
    """
    here = printable(path)
    lower = path.lower()
    reader = _jsonl if lower.endswith((".jsonl", ".ndjson")) else _json if lower.endswith(".json") else _csv
    existing(path, "file")
    try:
        with open(path, "rb") as raw:
            start = raw.read(len(LFS))
        if is_pointer(start):
            raise DataError(f"{here}: {POINTER}")
        encoding = "utf-16" if start[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"  # Excel's "Unicode text"
        with open(path, encoding=encoding, newline="") as file:
            rows = [(f"{here} {place}", row) for place, row in reader(file, here)]
    except UnicodeError as error:
        place = f" (byte {error.start})" if isinstance(error, UnicodeDecodeError) else ""
        raise DataError(f"{here}: not {'UTF-16' if encoding == 'utf-16' else 'UTF-8'} text{place}") from error
    except OSError as error:
        raise DataError(f"{here}: {(error.strerror or str(error)).lower()}") from error
    if not rows:
        raise DataError(f"{here}: no rows")
    return rows


def cell_text(value: Any, column: str, at: str) -> str:
    """A cell as text; `""` if it is missing. Whole numbers are allowed, because classes often have numbers."""
    if value is None:
        return ""
    if isinstance(value, str):
        if len(value) > LONGEST:
            raise DataError(f"{at}: column '{column}' holds {len(value)} characters; at most {LONGEST} are a name")
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise DataError(f"{at}: column '{column}' holds {json.dumps(value)[:40]}; expected text or a whole number")


def _csv(file: TextIO, here: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of named cells. What Excel leaves is no row and no column: a line `sep=;`, lines and columns of nothing."""
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


def _jsonl(file: TextIO, here: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except Malformed as error:
            raise DataError(f"{here} line {number}: not JSON: {error}") from error
        yield f"line {number}", _object(row, f"{here} line {number}")


def _json(file: TextIO, here: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The items of an array; a file that begins with an object has one a line."""
    start = file.read(1)
    while start.isspace():
        start = file.read(1)
    file.seek(0)
    if start == "{":
        yield from _jsonl(file, here)
        return
    try:
        rows = parse_json(file.read())
    except Malformed as error:
        raise DataError(f"{here}: not JSON: {error}") from error
    if not isinstance(rows, list):
        raise DataError(f"{here}: expected an array of objects, or one object a line")
    for number, row in enumerate(rows, 1):
        yield f"item {number}", _object(row, f"{here} item {number}")


def _object(row: Any, at: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f'{at}: expected an object such as {{"path": "a.png", "label": "cat"}}')
    return row

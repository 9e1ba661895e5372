"""Rows of a CSV or JSONL file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TextIO

from perpetune.data.names import printable
from perpetune.data.sheets import encoding_of, sheet_rows
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
    reader = _jsonl if lower.endswith((".jsonl", ".ndjson")) else _json if lower.endswith(".json") else sheet_rows
    existing(path, "file")
    try:
        with open(path, "rb") as raw:
            start = raw.read(len(LFS))
        if is_pointer(start):
            raise DataError(f"{here}: {POINTER}")
        encoding = encoding_of(start)
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

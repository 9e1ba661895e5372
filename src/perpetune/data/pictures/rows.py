"""Rows of a CSV or JSONL file."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from typing import Any, TextIO

from perpetune.data.names import natural, printable, several
from perpetune.errors import DataError
from perpetune.plain import Malformed, parse_json


def read_rows(path: str) -> list[tuple[str, dict[str, Any]]]:
    """Each row of a `.jsonl` or CSV file with the place it stands at, for messages.

    A CSV file has a header; its delimiter is the one of comma, semicolon and tab that the header has most of.

    Raises:
        DataError: the file, or a line of it, cannot be read; or there is no row.
    """
    here = printable(path)
    reader = _jsonl if path.lower().endswith((".jsonl", ".ndjson")) else _csv
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = [(f"{here} line {number}", row) for number, row in reader(file, here)]
    except UnicodeDecodeError as error:
        raise DataError(f"{here}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise DataError(f"{here}: {(error.strerror or str(error)).lower()}") from error
    if not rows:
        raise DataError(f"{here}: no rows")
    return rows


def cell_text(value: Any, column: str, at: str) -> str:
    """A cell as text, `""` when it is missing; whole numbers are fine, because classes are often numbered."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise DataError(f"{at}: column '{column}' holds {json.dumps(value)[:40]}; expected text or a whole number")


def _csv(file: TextIO, here: str) -> Iterator[tuple[int, dict[str, Any]]]:
    header = file.readline()
    if not header.strip():
        raise DataError(f"{here}: no header line; expected columns such as path,label")
    file.seek(0)
    reader = csv.reader(file, delimiter=max(",;\t", key=header.count), strict=True)
    try:
        columns = [c.strip() for c in next(reader)]
        twice = natural({c for c in columns if columns.count(c) > 1})
        if twice:
            raise DataError(f"{here}: column named twice: {several(twice)}")
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(columns):
                raise DataError(f"{here} line {reader.line_num}: {len(cells)} cells; the header has {len(columns)}")
            yield reader.line_num, dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{here} line {reader.line_num}: {error}") from error


def _jsonl(file: TextIO, here: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except Malformed as error:
            raise DataError(f"{here} line {number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f'{here} line {number}: expected an object such as {{"path": "a.png", "label": "cat"}}')
        yield number, row

"""Rows of text files (JSONL, a JSON array, parquet), each with its place; a row that cannot be read keeps its place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from perpetune.data.names import printable
from perpetune.data.parquet import read_columns, read_schema
from perpetune.errors import DataError
from perpetune.plain import DECODER, Malformed, check_depth, parse_json

LINES = (".jsonl", ".ndjson")
SUFFIXES = (*LINES, ".json", ".parquet")


@dataclass(frozen=True)
class Record:
    """One row.

    Attributes:
        at: where it stands, for messages: file and line, item or row.
        value: its columns; empty where it cannot be read.
        fault: why not.
        raw: what stands there instead.
    """

    at: str
    value: dict[str, Any]
    fault: str = ""
    raw: bytes = b""


def read_records(path: str) -> list[Record]:
    """The rows of a file, by its suffix. Lines are counted from 1, and so are the items of an array; rows from 0.

    A `.json` file that begins with an object is taken for one object a line.

    Raises:
        DataError: the file cannot be read, an array breaks off, or there is no row.
    """
    lower, here = path.lower(), printable(path)
    if lower.endswith(".parquet"):
        rows = read_columns(path, read_schema(path, "text").names).to_pylist()
        found = [Record(f"{here} row {number}", row) for number, row in enumerate(rows)]
    elif lower.endswith(SUFFIXES):
        try:
            with open(path, "rb") as file:
                content = file.read().removeprefix(b"\xef\xbb\xbf")  # a byte order mark, as Windows puts it there
        except OSError as error:
            raise DataError(f"{here}: {(error.strerror or str(error)).lower()}") from error
        array = lower.endswith(".json") and not content.lstrip().startswith(b"{")
        found = list(_items(content, here) if array else _lines(content, here))
    else:
        raise DataError(f"{here}: expected a file that ends in {', '.join(SUFFIXES)}")
    if not found:
        raise DataError(f"{here}: no rows")
    return found


def _lines(content: bytes, here: str) -> Iterator[Record]:
    """One object a line; only a line feed ends a line, for texts may hold other line breaks."""
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        at = f"{here} line {number}"
        try:
            value = parse_json(line.decode())
        except UnicodeDecodeError as error:
            yield Record(at, {}, f"not UTF-8 text (byte {error.start})", line)
        except Malformed as error:
            yield Record(at, {}, f"not JSON: {error}", line)
        else:
            yield _record(at, value)


def _items(content: bytes, here: str) -> Iterator[Record]:
    """The items of an array, one after the other, so that what breaks off can be named."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{here}: not UTF-8 text (byte {error.start})") from error
    number, place = 0, _after_space(text, 0)
    if not text[place:]:
        return
    if text[place] != "[":
        raise DataError(f"{here}: expected an array of objects, or one object a line")
    place = _after_space(text, place + 1)
    after = text[place : place + 1]
    if after == "]":
        place = _after_space(text, place + 1)
    while after != "]":
        number += 1
        try:
            began = place
            value, place = DECODER.raw_decode(text, place)
            check_depth(text[began:place])
        except (ValueError, RecursionError) as error:
            raise DataError(f"{here} item {number}: not JSON: {error}") from error
        yield _record(f"{here} item {number}", value)
        place = _after_space(text, place)
        after = text[place : place + 1]
        if not after or after not in ",]":
            found = f"found {after!r}" if after else "the file ends"
            raise DataError(f"{here} item {number}: expected a comma or the end of the array after it, but {found}")
        place = _after_space(text, place + 1)
    if text[place:]:
        raise DataError(f"{here}: more follows after the end of the array: {text[place : place + 20]!r}")


def _after_space(text: str, place: int) -> int:
    while text[place : place + 1] in (" ", "\t", "\r", "\n"):
        place += 1
    return place


def _record(at: str, value: Any) -> Record:
    if isinstance(value, dict):
        return Record(at, value)
    fault = f"holds {type(value).__name__}; expected an object of columns"
    return Record(at, {}, fault, json.dumps(value).encode())

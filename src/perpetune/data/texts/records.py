"""Read the rows of text files (JSONL, a JSON array, parquet), each with its place. A bad row keeps its place too."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from perpetune.data.names import printable
from perpetune.data.parquet import read_columns, read_schema
from perpetune.data.sheets import SHEETS, encoding_of, sheet_rows
from perpetune.data.sources import POINTER, file_start, is_pointer
from perpetune.data.texts.chats import CHAT, is_message
from perpetune.data.texts.tables import Written
from perpetune.errors import DataError
from perpetune.plain import Malformed, check_depth, decoder_of, parse_json

DECODER = decoder_of(Written)  # a number is an answer as it is written
MARK = b"\xef\xbb\xbf"  # a byte order mark, as Windows puts it there
LINES = (".jsonl", ".ndjson")
PACKED = ".gz"
PLAIN = (*LINES, ".json", *SHEETS)
SUFFIXES = (*PLAIN, ".parquet", *(f"{suffix}{PACKED}" for suffix in PLAIN))
LONGEST_CELL = 10**7  # characters of a cell of a sheet


@dataclass(frozen=True)
class Record:
    """One row.

    Attributes:
        at: its place, for messages: file and line, item or row.
        value: its columns; empty if the row cannot be read.
        fault: the reason why it cannot be read; empty for a good row.
        raw: the bytes of a row that cannot be read.
    """

    at: str
    value: dict[str, Any]
    fault: str = ""
    raw: bytes = b""


def read_records(path: str) -> list[Record]:
    """The rows of a file; the suffix gives its format. Lines and items of arrays count from 1, parquet rows from 0.

    A `.json` file that begins with an object is taken for one object a line, and a `.jsonl` file that is one array of
    objects for an array. A list of messages is a row with the column `messages`: on a line, as an item, or as a whole
    array. A file that ends in `.gz` is unpacked. Empty cells of a CSV or TSV file hold nothing.

    Raises:
        DataError: the file cannot be read, an array ends too early, or there are no rows.
    """
    lower, here = path.lower(), printable(path)
    if lower.endswith(".parquet"):
        rows = _exactly(read_columns(path, read_schema(path, "text").names)).to_pylist()
        found = [Record(f"{here} row {number}", row) for number, row in enumerate(rows)]
    elif lower.endswith(SUFFIXES):
        if is_pointer(file_start(path)):
            raise DataError(f"{here}: {POINTER}")
        try:
            with open_text(path) as file:
                content = file.read().removeprefix(MARK)
        except (OSError, EOFError, zlib.error) as error:
            reason = error.strerror if isinstance(error, OSError) else None
            raise DataError(f"{here}: {(reason or str(error)).lower()}") from error
        if lower.removesuffix(PACKED).endswith(SHEETS):
            found = list(_cells(content, here))
        elif (
            _is_array(content) if lower.removesuffix(PACKED).endswith(LINES) else not content.lstrip().startswith(b"{")
        ):
            found = list(_items(content, here))
            if found and all(is_message(record.value) for record in found):  # one chat
                found = [Record(here, {CHAT: [record.value for record in found]})]
        else:
            found = list(_lines(content, here))
    else:
        raise DataError(f"{here}: expected a file that ends in {', '.join(SUFFIXES)}")
    if not found:
        raise DataError(f"{here}: no rows")
    return found


def _cells(content: bytes, here: str) -> Iterator[Record]:
    """The rows of a sheet."""
    encoding = encoding_of(content)
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(f"{here}: not {encoding.removesuffix('-sig').upper()} text (byte {error.start})") from error
    for place, row in sheet_rows(io.StringIO(text, newline=""), here, LONGEST_CELL):
        yield Record(f"{here} {place}", {column: cell or None for column, cell in row.items()})


def open_text(path: str) -> BinaryIO:
    """A file of texts, unpacked where it is packed; OSError when it cannot be opened."""
    if path.lower().endswith(PACKED):
        return cast(BinaryIO, gzip.open(path, "rb"))
    return open(path, "rb")


def _is_array(content: bytes) -> bool:
    """Whether a file of lines is an array of objects all the same."""
    start = content.lstrip()
    if not start.startswith(b"[") or not start[1:].lstrip().startswith(b"{"):
        return False
    first, _, rest = start.partition(b"\n")
    try:
        parse_json(first)
    except Malformed:
        return True  # it goes on in the next line
    return not rest.strip()


def _exactly(table: Any) -> Any:
    """A table with its numbers of 16 and 32 bits as they are written shortest: 0.1, and not 0.10000000149011612."""
    import pyarrow as pa

    for place, field in enumerate(table.schema):
        if pa.types.is_float16(field.type) or pa.types.is_float32(field.type):
            numbers = table.column(place).to_numpy(zero_copy_only=False)
            valid = table.column(place).is_valid().to_pylist()
            written = [float(str(number)) if there else None for number, there in zip(numbers, valid, strict=True)]
            table = table.set_column(place, field.name, pa.array(written, pa.float64()))
    return table


def _lines(content: bytes, here: str) -> Iterator[Record]:
    """One object on each line. Only a line feed ends a line, because texts may contain other line breaks."""
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        at = f"{here} line {number}"
        try:
            value = parse_json(line.decode(), decoder=DECODER)
        except UnicodeDecodeError as error:
            yield Record(at, {}, f"not UTF-8 text (byte {error.start})", line)
        except Malformed as error:
            yield Record(at, {}, f"not JSON: {error}", line)
        else:
            yield _record(at, value)


def _items(content: bytes, here: str) -> Iterator[Record]:
    """The items of an array, one by one, so that an error can name the bad item."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{here}: not UTF-8 text (byte {error.start})") from error
    number, place = 0, _after_space(text, 0)
    if not text[place:]:
        return
    if text[place] != "[":
        raise DataError(f"{here}: expected an array of objects, or one object on each line")
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
        raise DataError(f"{here}: there is text after the end of the array: {text[place : place + 20]!r}")


def _after_space(text: str, place: int) -> int:
    while text[place : place + 1] in (" ", "\t", "\r", "\n"):
        place += 1
    return place


def _record(at: str, value: Any) -> Record:
    if isinstance(value, dict):
        return Record(at, value)
    if isinstance(value, list) and value and all(map(is_message, value)):
        return Record(at, {CHAT: value})
    fault = f"holds {type(value).__name__}; expected an object of columns"
    return Record(at, {}, fault, json.dumps(value).encode())

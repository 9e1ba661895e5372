"""Read prompts that users give in a call, on a command line or in a file."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable
from typing import Any

from perpetune.data.names import printable, several
from perpetune.data.texts.chats import Messages, is_empty, messages_in, more_of
from perpetune.data.texts.layouts import layout_of
from perpetune.data.texts.records import SUFFIXES, Record, read_records
from perpetune.data.texts.tables import Text, fault_of
from perpetune.errors import DataError


def prompt_in(value: Any) -> str | Messages:
    """Check a prompt: a text, or the messages of a chat as `{role, content}` or (role, content).

    Raises:
        DataError: it is something else, or empty, or contains characters that cannot be encoded.
    """
    if isinstance(value, list | tuple):
        value = messages_in([_as_object(message) for message in value]) if value else ()
    elif not isinstance(value, str):
        raise DataError(f"a prompt is {type(value).__name__}; expected text, or a list of messages")
    fault = fault_of(Text(value, "?"))
    if fault:
        raise DataError(fault)
    prompt: str | Messages = value
    return prompt


def read_prompts(inputs: Iterable[str]) -> list[str | Messages]:
    """Read prompts from the arguments of a command.

    Args:
        inputs: each is a prompt; or a `.txt` file with one on each line, a `.jsonl`, `.json` or `.parquet` file with
            `prompt` or `messages` (an answer at their end is left out), or `-` for the lines of standard input. What
            is there as a file or a folder is never taken for a prompt.

    Raises:
        DataError: a file cannot be read, a row has no prompt, or there are no prompts.
    """
    prompts: list[str | Messages] = []
    left: dict[str, None] = {}
    for given in inputs:
        there = os.path.lexists(given)
        is_file = there or (given.lower().endswith((".txt", *SUFFIXES)) and len(given.split()) == 1)
        if there and not (given.lower().endswith((".txt", *SUFFIXES)) and os.path.isfile(given)):
            what = "is a folder; name the files in it" if os.path.isdir(given) else "is there"
            raise DataError(
                f"{printable(given)}: {what}, and prompts are read from {', '.join(('.txt', *SUFFIXES))} files; to ask "
                "these words themselves, give them on standard input, with - as the input"
            )
        if given == "-":
            prompts += [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
        elif not is_file:
            prompts.append(given)
        elif not os.path.isfile(given):
            raise DataError(f"{printable(given)}: no such file")
        elif given.lower().endswith(".txt"):
            try:
                with open(given, encoding="utf-8-sig") as file:
                    prompts += [line.rstrip("\n") for line in file if line.strip()]
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"{printable(given)}: cannot be read as UTF-8 text: {error}") from error
        else:
            for record in read_records(given):
                prompts.append(_prompt_in(record, left))
    if left:
        columns = several([f"'{printable(column)}'" for column in left], 20)
        warnings.warn(f"columns of the prompts' files that are not used: {columns}", stacklevel=2)
    if not any(prompts):
        raise DataError("there is no prompt")
    return prompts


def _as_object(message: Any) -> Any:
    """A message that is given as (role, content), or as `chats.Message`, as an object."""
    if isinstance(message, list | tuple) and len(message) == 2:
        return {"role": message[0], "content": message[1]}
    if isinstance(message, tuple) and len(message) == 3 and all(isinstance(part, str) for part in message):
        return {**more_of(message), "role": message[0], "content": message[1]}
    return message


def _prompt_in(record: Record, left: dict[str, None]) -> str | Messages:
    """The prompt of a row; its columns that are not used are added to those that are `left`."""
    try:
        if record.fault:
            raise DataError(record.fault)
        layout = layout_of(record.value.keys())
        prompt = prompt_in(layout.prompt_of(record.value))
        used = layout.used(record.value)
        left |= {column: None for column, v in record.value.items() if column not in used and not is_empty(v)}
    except DataError as error:
        raise DataError(f"{record.at}: {error}") from error
    return prompt

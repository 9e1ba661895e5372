"""Prompts as people give them: in a call, on a command line, in a file."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

from perpetune.data.names import printable
from perpetune.data.texts.records import SUFFIXES, Record, read_records
from perpetune.data.texts.tables import ASSISTANT, Messages, Text, fault_of, messages_in, text_in
from perpetune.errors import DataError


def prompt_in(value: Any) -> str | Messages:
    """A prompt as people write it: a text, or the messages of a chat as `{role, content}` or (role, content).

    Raises:
        DataError: it is something else, empty, or holds what cannot be encoded.
    """
    if isinstance(value, list | tuple):
        pairs = [isinstance(m, list | tuple) and len(m) == 2 for m in value]
        told = [{"role": m[0], "content": m[1]} if pair else m for m, pair in zip(value, pairs, strict=True)]
        value = messages_in(told) if told else ()
    elif not isinstance(value, str):
        raise DataError(f"a prompt is {type(value).__name__}; expected text, or a list of messages")
    fault = fault_of(Text(value, "?"))
    if fault:
        raise DataError(fault)
    prompt: str | Messages = value
    return prompt


def read_prompts(inputs: Iterable[str]) -> list[str | Messages]:
    """Prompts as a command is given them.

    Args:
        inputs: each is a prompt; or a `.txt` file with one on each line, a `.jsonl`, `.json` or `.parquet` file with
            `prompt` or `messages` (an answer at their end is left out), or `-` for the lines of standard input.

    Raises:
        DataError: a file cannot be read, a row holds no prompt, or there is none at all.
    """
    found: list[str | Messages] = []
    for given in inputs:
        is_file = given.lower().endswith((".txt", *SUFFIXES)) and (len(given.split()) == 1 or os.path.exists(given))
        if given == "-":
            found += [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
        elif not is_file:
            found.append(given)
        elif not os.path.isfile(given):
            raise DataError(f"{printable(given)}: no such file")
        elif given.lower().endswith(".txt"):
            try:
                with open(given, encoding="utf-8-sig") as file:
                    found += [line.rstrip("\n") for line in file if line.strip()]
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"{printable(given)}: cannot be read as UTF-8 text: {error}") from error
        else:
            found += [_prompt_in(record) for record in read_records(given)]
    if not any(found):
        raise DataError("no prompt is given")
    return found


def _prompt_in(record: Record) -> str | Messages:
    try:
        if record.fault:
            raise DataError(record.fault)
        if record.value.get("messages") is None:
            prompt: str | Messages = text_in(record.value.get("prompt"), "prompt")
        else:
            prompt = messages_in(record.value["messages"])
            if prompt[-1][0] == ASSISTANT:
                prompt = prompt[:-1]
        prompt = prompt_in(prompt)
    except DataError as error:
        raise DataError(f"{record.at}: {error}") from error
    return prompt

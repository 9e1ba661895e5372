"""Read prompts that users give in a call, on a command line or in a file."""

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
    """Check a prompt: a text, or the messages of a chat as `{role, content}` or (role, content).

    Raises:
        DataError: it is something else, or empty, or contains characters that cannot be encoded.
    """
    if isinstance(value, list | tuple):
        pairs = [isinstance(m, list | tuple) and len(m) == 2 for m in value]
        messages = [{"role": m[0], "content": m[1]} if pair else m for m, pair in zip(value, pairs, strict=True)]
        value = messages_in(messages) if messages else ()
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
        inputs: each is a prompt; or a `.txt` file with a prompt on each line; or a `.jsonl`, `.json` or `.parquet` file
            with `prompt` or `messages` (an answer at their end is left out); or `-` for the lines of standard input.

    Raises:
        DataError: a file cannot be read, a row has no prompt, or there are no prompts.
    """
    prompts: list[str | Messages] = []
    for given in inputs:
        is_file = given.lower().endswith((".txt", *SUFFIXES)) and (len(given.split()) == 1 or os.path.exists(given))
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
            prompts += [_prompt_in(record) for record in read_records(given)]
    if not any(prompts):
        raise DataError("there is no prompt")
    return prompts


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

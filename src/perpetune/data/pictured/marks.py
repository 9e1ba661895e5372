"""Marks: what stands in a text where a picture is; and the pictures that a row names."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perpetune.data.texts.chats import ASSISTANT, CHAT, Messages, is_empty, short, unpacked
from perpetune.data.texts.layouts import CHATS
from perpetune.errors import DataError

MARK = "<image>"
"""What people write where a picture is."""
IMAGES = ("image", "images")  # columns of pictures


@dataclass(frozen=True)
class Mark:
    """How a model writes a picture.

    Attributes:
        token: the token that stands `count` times for one picture.
        count: the number of embeddings of one picture.
        text: what the tokenizer makes that one token of.
        plain: how a prompt without a chat form writes a picture; `text` is in it.
        before, after: tokens around those of a picture that the chat form does not write.
        around: further tokens that belong to pictures, so that no cut takes them.
        first: whether pictures come before the text, then the token that opens it, and a line break ends it.
    """

    token: int
    count: int
    text: str
    plain: str
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    around: tuple[int, ...] = ()
    first: bool = False

    @property
    def kept(self) -> frozenset[int]:
        """The tokens that no cut takes."""
        return frozenset((self.token, *self.before, *self.after, *self.around))


def count_marks(prompt: str | Messages) -> int:
    """The number of marks in a prompt."""
    return prompt.count(MARK) if isinstance(prompt, str) else sum(message[1].count(MARK) for message in prompt)


def with_marks(prompt: str | Messages, pictures: int) -> str | Messages:
    """The prompt with as many marks as it has `pictures`.

    A prompt without a mark gets them at its start, on a line of their own; a chat gets them in the user's first
    message.

    Raises:
        DataError: it has another number of marks, a mark stands in an answer, or there is no message of the user.
    """
    marks = count_marks(prompt)
    if not isinstance(prompt, str) and any(MARK in text for role, text, *_ in prompt if role == ASSISTANT):
        raise DataError(f"an answer holds the mark {MARK}; marks can stand in questions only")
    if marks == pictures:
        return prompt
    if marks:
        raise DataError(f"it has {pictures} pictures and {marks} marks {MARK}; one mark for each picture is expected")
    start = MARK * pictures + "\n"
    if isinstance(prompt, str):
        return start + prompt if prompt.strip() else prompt
    first = next((number for number, message in enumerate(prompt) if message[0] == "user"), None)
    if first is None:
        raise DataError("it has a picture, and no message of the user that could show it")
    return tuple(
        (message[0], start + message[1], *message[2:]) if number == first else message
        for number, message in enumerate(prompt)
    )


def without_parts(value: Mapping[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """The columns of a row, with a mark for each part of a message that is a picture; and what these parts name.

    A part without a name of its own stands for the next picture of the row: for it the list holds None.

    Raises:
        DataError: a part is a picture in a form that is not known.
    """
    changed = dict(value)
    named: list[Any] = []
    for column in {CHAT, *CHATS, "prompt"} & value.keys():
        listed = unpacked(value[column])
        if not isinstance(listed, list):
            continue
        messages = []
        for number, message in enumerate(listed, 1):
            content = message.get("content") if isinstance(message, dict) else None
            if isinstance(content, list):
                parts = [_part(part, number, named) for part in content]
                message = {**message, "content": parts}
            messages.append(message)
        changed[column] = messages
    return changed, named


def _part(part: Any, number: int, named: list[Any]) -> Any:
    """A part of a message; a picture becomes its mark."""
    if not isinstance(part, dict) or part.get("type") not in ("image", "image_url"):
        if isinstance(part, dict):  # parquet gives every part all keys
            return {key: value for key, value in part.items() if value is not None}
        return part
    found = next((part[key] for key in ("image", "url", "path", "image_url") if part.get(key) is not None), None)
    if isinstance(found, Mapping) and "url" in found:
        found = found["url"]
    if isinstance(found, str) and found.startswith(("http://", "https://", "data:")):
        raise DataError(f"message {number} shows the picture {short(found)}: perpetune loads none, give a file")
    named.append(found)
    return {"type": "text", "text": MARK}


def pictures_of(listed: list[Any], named: list[Any]) -> list[Any]:
    """The pictures of an example: those of its columns, or those that the parts of its messages name.

    Raises:
        DataError: both name some, or some parts name theirs and others do not.
    """
    own = [picture for picture in named if picture is not None]
    if own and listed:
        raise DataError("parts of messages name pictures, and a column does too: one of them is expected")
    if own and len(own) < len(named):
        raise DataError("some parts of messages name their picture, and others do not")
    return own or listed


def shown_in(
    value: Mapping[str, Any], columns: Sequence[str], folder: str
) -> tuple[dict[str, Any], tuple[str | bytes, ...]]:
    """The columns of a row, with marks for pictures that are parts of messages; and its pictures.

    Args:
        columns: those that may hold pictures.
        folder: paths are relative to it.

    Raises:
        DataError: a picture is given in a form that is not known, or at two places.
    """
    changed, named = without_parts(value)
    listed: list[Any] = []
    for column in columns:
        found = unpacked(value.get(column))
        if is_empty(found):
            continue
        if listed:
            raise DataError(f"the columns {' and '.join(map(repr, columns))} both hold pictures: one is expected")
        listed = list(found) if isinstance(found, list) else [found]
    return changed, tuple(_picture(one, folder) for one in pictures_of(listed, named))


def _picture(given: Any, folder: str) -> str | bytes:
    """The path of a picture, or its bytes."""
    if isinstance(given, Mapping):
        given = given.get("bytes") or given.get("path")
    if isinstance(given, bytes | bytearray):
        return bytes(given)
    if not isinstance(given, str) or not given:
        kind = "nothing" if given is None else type(given).__name__
        raise DataError(f"a picture is {kind}; expected a path, or the bytes of a file")
    if given.startswith(("http://", "https://", "data:")):
        raise DataError(f"the picture {short(given)} lies elsewhere: perpetune loads none, give a file")
    return os.path.join(folder, os.path.expanduser(given))

"""Marks: what stands in a text where a picture is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from perpetune.data.texts.chats import ASSISTANT, CHAT, Messages, short, unpacked
from perpetune.data.texts.layouts import CHATS
from perpetune.errors import DataError

MARK = "<image>"
"""What people write where a picture is."""


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

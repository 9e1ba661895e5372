"""Messages of chats, in the forms that people have them: their roles, their texts, and what else they hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from perpetune.data.names import printable
from perpetune.errors import DataError
from perpetune.plain import Malformed, parse_json

Message = tuple[str, ...]
"""(role, content), or (role, content, more): `more` is a JSON object of what else the message holds."""
Messages = tuple[Message, ...]
"""In the order they were said."""
ASSISTANT = "assistant"
ROLES = ("system", "developer", "user", ASSISTANT, "tool")
CHAT = "messages"  # the column of a chat
LEARN = "learn"  # in `more`: false for an answer that is not to be learned
TOOLS = "tools"  # in `more` of the first message: the functions that the model may call
CALLS = "tool_calls"

_SPEAKERS = {  # ShareGPT's names of the roles
    "human": "user",
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "bing": ASSISTANT,
    "bard": ASSISTANT,
    "observation": "tool",
    "function_response": "tool",
}
_FLAGS = ("weight", "train", "loss")  # of OpenAI, axolotl and ms-swift
_FORM = "expected {role, content}"


def messages_in(value: Any) -> Messages:
    """The messages of a list of `{role, content}` or ShareGPT's `{from, value}`.

    They may be the JSON of such a list. Roles may have capitals. A content may be a list of parts that are texts. An
    assistant's message may have `tool_calls` and no content. What else a message holds is kept for the model's chat
    template. `weight: 0`, `train: false` or `loss: false` says of an answer that it is not learned.

    Raises:
        DataError: it is something else.
    """
    listed = unpacked(value)
    if not isinstance(listed, list):
        raise DataError(f"the messages hold {type(listed).__name__}; expected a list of {{role, content}}")
    if not listed:
        raise DataError("there are no messages")
    return tuple(_message(message, number) for number, message in enumerate(listed, 1))


def unpacked(value: Any) -> Any:
    """A list that a cell holds as JSON, as files without lists have it; any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return parse_json(value)
    except Malformed:
        return value


def is_message(value: Any) -> bool:
    """Whether a value is a message of a known role, and not a row of other columns."""
    return isinstance(value, dict) and _role(value) in ROLES and bool({"content", "value", CALLS} & value.keys())


def goes_on(value: Any) -> bool:
    """Whether a chat goes on behind its last answer; nothing is learned of that."""
    listed = unpacked(value)
    return isinstance(listed, list) and bool(listed) and _role(listed[-1]) not in (None, ASSISTANT)


def chat_of(messages: Messages) -> tuple[Messages, Message]:
    """The messages up to the answer, and the answer: the last that is the assistant's and to be learned.

    Raises:
        DataError: there is no answer, or none is to be learned.
    """
    if all(message[0] != ASSISTANT for message in messages):
        raise DataError(
            f"the last message is by {short(messages[-1][0])}; expected the {ASSISTANT}'s, which is the answer"
        )
    learned = [number for number, message in enumerate(messages) if message[0] == ASSISTANT and is_learned(message)]
    if not learned:
        raise DataError("no answer is to be learned: each has weight 0, or train or loss false")
    return messages[: learned[-1]], messages[learned[-1]]


def more_of(message: Message) -> dict[str, Any]:
    """What a message holds beside its role and its content."""
    found: dict[str, Any] = json.loads(message[2]) if len(message) > 2 else {}
    return found


def with_more(message: Message, **more: Any) -> Message:
    """The message with further things that it holds."""
    whole = more_of(message) | more
    return (*message[:2], json.dumps(whole, ensure_ascii=False)) if whole else message[:2]


def is_learned(message: Message) -> bool:
    """Whether a message that is the assistant's is to be learned."""
    return bool(more_of(message).get(LEARN, True))


def as_dict(message: Message) -> dict[str, Any]:
    """A message as chat templates take it."""
    return {"role": message[0], "content": message[1], **{k: v for k, v in more_of(message).items() if k != LEARN}}


def plain(message: Message) -> Message:
    """A message as people wrote it in a call: with its content alone where it holds nothing else."""
    return message if more_of(message) else message[:2]


def _message(value: Any, number: int) -> Message:
    if not isinstance(value, dict):
        raise DataError(f"message {number} is {type(value).__name__}; {_FORM}")
    who, what = ("from", "value") if value.get("role") is None and "from" in value else ("role", "content")
    role, content = _role(value), value.get(what)
    if role is None:
        raise DataError(f"message {number}: the {who} holds {_kind(value.get(who))}; expected text")
    more = {k: v for k, v in value.items() if k not in (who, what) and not is_empty(v)}
    if content is None and role == ASSISTANT and CALLS in more:
        content = ""
    text = content if isinstance(content, str) else _joined(content, f"message {number}: the {what}")
    if not _flag(more, role, number):
        more[LEARN] = False
    return with_more((role, text), **more)


def _role(value: Any) -> str | None:
    """The role of a message by its name in any case; a name that is no role as it is, and None without a name."""
    if not isinstance(value, dict):
        return None
    name = value.get("from") if value.get("role") is None else value["role"]
    if not isinstance(name, str):
        return None
    plain = name.strip().lower()
    role = _SPEAKERS.get(plain, plain)
    return role if role in ROLES else name


def _joined(content: Any, what: str) -> str:
    """The text of a content that is a list of parts."""
    if not isinstance(content, list) or not content:
        raise DataError(f"{what} holds {_kind(content)}; expected text")
    texts = []
    for number, part in enumerate(content, 1):
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else None
            found = short(kind) if isinstance(kind, str) and kind != "text" else type(part).__name__
            raise DataError(f"{what} has a part {number} that is {found}; expected text")
        texts.append(text)
    return "".join(texts)


def _flag(more: dict[str, Any], role: str, number: int) -> bool:
    """Whether a message is to be learned, by the keys in `more` that say so; they are taken out of it."""
    said: dict[str, bool] = {}
    for key in _FLAGS:
        value = more.get(key)
        if key == "loss" and not isinstance(value, bool):  # else it is some number that was measured
            continue
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise DataError(f"message {number}: its {key} is {short(str(value))}; expected 0 or 1, true or false")
        said[key] = bool(value)
        del more[key]
    if len(set(said.values())) > 1:
        raise DataError(f"message {number}: {' and '.join(said)} contradict each other")
    if role != ASSISTANT and (said.get("train") or said.get("loss")):
        raise DataError(f"message {number} of the role {short(role)} is to be learned; only answers can be")
    return all(said.values())


def is_empty(value: Any) -> bool:
    """Whether a cell holds nothing."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def parsed_tools(value: Any, column: str) -> list[Any]:
    """The functions in a cell, which may be a list or its JSON.

    Raises:
        DataError: it is something else.
    """
    found = value
    if isinstance(value, str):
        try:
            found = parse_json(value)
        except Malformed:
            found = None
    if not isinstance(found, list) or not all(isinstance(tool, Mapping) for tool in found):
        raise DataError(f"the tools (column '{printable(column)}') are no list of objects")
    return found


def short(text: str, length: int = 40) -> str:
    """A text for a message, in quotes."""
    told = printable(text)
    return f"'{told}'" if len(told) <= length else f"'{told[:length]}…'"


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__

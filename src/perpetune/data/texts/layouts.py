"""Which columns of a row hold what: prompt, input, answer, messages, system, history, tools."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from perpetune.data.texts.chats import (
    ASSISTANT,
    CHAT,
    TOOLS,
    Messages,
    chat_of,
    goes_on,
    is_empty,
    messages_in,
    parsed_tools,
    unpacked,
    with_more,
)
from perpetune.data.texts.tables import Text, key_of, text_in
from perpetune.errors import DataError

ANSWERS = ("answer", "completion", "response", "output")
CHATS = (CHAT, "conversations", "conversation")
INSTRUCTION = "instruction"  # Alpaca's prompt, to which further columns belong


@dataclass(frozen=True)
class Layout:
    """The names of the columns of a file; None where it has no such.

    Attributes:
        prompt, answer: the question and what is to be said.
        messages: a whole chat.
        input: text that belongs to the prompt, on lines of its own behind it.
        system: what the system says first.
        history: earlier turns, as pairs of a question and an answer.
        tools: the functions that the model may call.
    """

    prompt: str
    answer: str
    messages: str
    input: str | None = None
    system: str | None = None
    history: str | None = None
    tools: str | None = None

    def used(self, value: Mapping[str, Any]) -> set[str]:
        """The columns of a row that are used."""
        own = {self.messages} if value.get(self.messages) is not None else {self.prompt, self.answer, self.input or ""}
        return own | {column for column in (self.system, self.history, self.tools) if column}

    def key(self, value: Mapping[str, Any]) -> str:
        """The key of a row: see `Row`."""
        messages = value.get(self.messages)
        own = (value.get(self.prompt), value.get(self.answer)) if messages is None else (messages,)
        columns = (self.input if messages is None else None, self.system, self.history, self.tools)
        more = {column: value[column] for column in columns if column and not is_empty(value.get(column))}
        return key_of(*own, more) if more else key_of(*own)

    def goes_on(self, value: Mapping[str, Any]) -> bool:
        """Whether the chat of a row goes on behind its last answer."""
        if value.get(self.messages) is not None:
            return goes_on(value[self.messages])
        answer = value.get(self.answer)
        return isinstance(answer, list) and goes_on(answer)

    def prompt_of(self, value: Mapping[str, Any]) -> str | Messages:
        """The prompt of a row; an answer at the end of a chat is left out.

        Raises:
            DataError: it holds none.
        """
        if value.get(self.messages) is None:
            return self._around(value, self._prompt(value))
        messages = messages_in(value[self.messages])
        return self._around(value, messages[:-1] if messages[-1][0] == ASSISTANT else messages)

    def text(self, value: Mapping[str, Any]) -> Text:
        """The example of a row.

        Raises:
            DataError: it holds none.
        """
        if value.get(self.messages) is not None:
            prompt, said = chat_of(messages_in(value[self.messages]))
            return Text(self._around(value, prompt), said[1], more="".join(said[2:]))
        told, answer = self._prompt(value), value.get(self.answer)
        if isinstance(answer, list) and not isinstance(told, str):
            prompt, said = chat_of((*told, *messages_in(answer)))
            return Text(self._around(value, prompt), said[1], more="".join(said[2:]))
        return Text(self._around(value, told), text_in(answer, f"answer (column '{self.answer}')"))

    def _prompt(self, value: Mapping[str, Any]) -> str | Messages:
        """The prompt of a row without messages, with its input."""
        given = value.get(self.prompt)
        if isinstance(given, list) and given and all(isinstance(message, dict) for message in given):
            return messages_in(given)
        told = text_in(given, f"prompt (column '{self.prompt}')")
        if self.input is None or is_empty(value.get(self.input)):
            return told
        more = text_in(value[self.input], f"input (column '{self.input}')")
        return f"{told}\n{more}" if more.strip() else told

    def _around(self, value: Mapping[str, Any], prompt: str | Messages) -> str | Messages:
        """A prompt with the system's message, earlier turns and tools of its row."""
        system = self._cell(value, self.system)
        history = self._cell(value, self.history)
        tools = self._cell(value, self.tools)
        if system is None and history is None and tools is None:
            return prompt
        chat = (("user", prompt),) if isinstance(prompt, str) else prompt
        if not chat or (isinstance(prompt, str) and not prompt.strip()):
            return prompt  # which is found to be empty
        if history is not None:
            chat = (*_turns(history, str(self.history)), *chat)
        if system is not None:
            if any(message[0] in ("system", "developer") for message in chat):
                raise DataError(f"the column '{self.system}' and a message say what the system says")
            chat = (("system", text_in(system, f"system (column '{self.system}')")), *chat)
        if tools is not None:
            chat = (with_more(chat[0], **{TOOLS: parsed_tools(tools, str(self.tools))}), *chat[1:])
        return chat

    @staticmethod
    def _cell(value: Mapping[str, Any], column: str | None) -> Any:
        found = None if column is None else value.get(column)
        return None if is_empty(found) else found


def layout_of(
    columns: Collection[str],
    *,
    prompt: str = "prompt",
    answer: str = "answer",
    messages: str = "messages",
    input: str | None = None,  # noqa: A002  # what the column is called
    system: str | None = None,
    history: str | None = None,
    tools: str | None = None,
) -> Layout:
    """The layout of rows with such columns.

    Names that are not there, and are those that are expected where nobody says otherwise, are looked for under the
    other names that people use: `completion`, `response` and `output` for the answer, `conversations` for messages, and
    Alpaca's `instruction`. Columns `input`, `system`, `history` and `tools` belong to an instruction; `system` and
    `tools` to messages, too. Beside a `prompt` they are used where they are named.
    """
    if prompt == "prompt" and prompt not in columns and INSTRUCTION in columns:
        prompt = INSTRUCTION
    if answer == ANSWERS[0]:
        answer = next((name for name in ANSWERS if name in columns), answer)
    if messages == CHATS[0]:
        messages = next((name for name in CHATS if name in columns), messages)
    alpaca, chat = prompt == INSTRUCTION and prompt in columns, messages in columns

    def own(asked: str | None, name: str, belongs: bool) -> str | None:
        return asked or (name if belongs and name in columns else None)

    return Layout(
        prompt,
        answer,
        messages,
        own(input, "input", alpaca),
        own(system, "system", alpaca or chat),
        own(history, "history", alpaca),
        own(tools, "tools", alpaca or chat),
    )


def _turns(history: Any, column: str) -> Messages:
    """Earlier turns: pairs of a question and an answer."""
    history = unpacked(history)
    if not isinstance(history, list):
        raise DataError(f"the history (column '{column}') holds {type(history).__name__}; expected a list of pairs")
    turns: list[tuple[str, ...]] = []
    for number, pair in enumerate(history, 1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(
                f"the history (column '{column}'): its turn {number} is no pair of a question and an answer"
            )
        question, answer = (text_in(part, f"history (column '{column}')") for part in pair)
        turns += [("user", question), (ASSISTANT, answer)]
    return tuple(turns)

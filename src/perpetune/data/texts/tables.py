"""Tables of texts: prompts with their answers, each with the place it comes from."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from perpetune.data.names import natural, several
from perpetune.data.sources import Table
from perpetune.data.texts.chats import CALLS, ROLES, Messages, short
from perpetune.errors import DataError, UsageError

FREE = ""  # the label of an answer in free text
SCORE = "exact_match"  # of tasks whose source names no other


@dataclass(frozen=True)
class Text:
    """One example of text.

    Attributes:
        prompt: plain text, or the messages of a chat up to the answer.
        answer: what is to be said; empty where it is not known.
        options: the answers that stand to choice, where there are such.
        more: what the message with the answer holds beside it, as in `chats.Message`.
    """

    prompt: str | Messages
    answer: str = ""
    options: tuple[str, ...] = ()
    more: str = ""


@dataclass(frozen=True)
class Row:
    """One example and where it stands.

    Attributes:
        at: for messages: file and line, item or row.
        key: what identifies it wherever the file lies; seeded choices depend on it alone.
        text: None where there is none to be had.
        fault: why not.
    """

    at: str
    key: str
    text: Text | None
    fault: str = ""


class TextTable(Table):
    """The texts of one split.

    A bad row keeps its place in its task until `check` names it. A task is scored in one way. Its classes are the
    answers that stand to choice in all its examples; where they differ from one to the next, and where answers are free
    text, it has none.

    Args:
        rows: the examples.
        groups: the task of each.
        declared: the answers to choose from, by task; tasks of free text are not there.
        scoring: how a task is scored, by its name: names of `numerics.text_scores`.
        order: tasks in the order they come where nobody says otherwise.
        warnings: one line each.
    """

    gives = "texts"
    noun = "example"
    use = "used"
    threads = False  # tokenizers are not made for it, and there is no disk to wait for
    free = True

    def __init__(
        self,
        rows: Sequence[Row],
        groups: Sequence[str],
        declared: Mapping[str, Collection[str]] | None = None,
        scoring: Mapping[str, str] | None = None,
        order: Sequence[str] = (),
        warnings: Iterable[str] = (),
    ):
        self.rows = rows
        self.declared = declared or {}
        self.scoring = scoring or {}
        self.order = order
        chosen = {group for row, group in zip(rows, groups, strict=True) if row.text and row.text.options}
        self.faults = [
            row.fault or (_fault(row.text, group in chosen) if row.text else "no text")
            for row, group in zip(rows, groups, strict=True)
        ]
        labels = [
            row.text.answer if row.text and not fault and row.text.answer in self.declared.get(group, ()) else FREE
            for row, fault, group in zip(rows, self.faults, groups, strict=True)
        ]
        super().__init__(labels, groups, warnings)
        self.tasks = groups

    def text(self, i: int) -> Text:
        """Example `i`; DataError naming it when it is bad."""
        text = self.rows[i].text
        if text is None or self.faults[i]:
            raise DataError(f"{self.name(i)}: {self.faults[i]}")
        return text

    def check(self, i: int, depth: Literal["decode", "header"]) -> None:
        self.text(i)

    def name(self, i: int) -> str:
        return self.rows[i].at

    def key(self, i: int) -> str:
        return self.rows[i].key

    def size(self, i: int) -> int | None:
        return None if self.faults[i] else len(self.content(i))

    def content(self, i: int, limit: int = -1) -> bytes:
        """Prompt and answer as bytes; of a bad row its key."""
        text = self.rows[i].text
        said = [] if text is None else [text.prompt, text.answer, *([text.more] if text.more else ())]
        whole = _plain(said) if said and not self.faults[i] else self.key(i).encode()
        return whole if limit < 0 else whole[:limit]

    def digest(self, i: int) -> bytes:
        text = self.rows[i].text
        return super().digest(i) + _plain(text.options if text else ())

    def classes(self, rows: Iterable[int]) -> set[str]:
        tasks = {self.tasks[row] for row in rows}
        return {answer for task in tasks for answer in self.declared.get(task, ())}

    def fits(self, i: int, classes: Collection[str]) -> bool:
        return True

    def score(self, rows: Iterable[int]) -> str:
        """The one score of these rows; UsageError where their tasks have several."""
        ways: dict[str, str] = {}
        for row in rows:
            ways.setdefault(self.scoring.get(self.tasks[row], SCORE), self.tasks[row])
        if len(ways) > 1:
            said = several([f"{way} ({ways[way]})" for way in natural(ways)])
            raise UsageError(f"these data are scored in several ways: {said}; give one task at a time")
        return next(iter(ways), SCORE)


def _fault(text: Text, chosen: bool) -> str:
    """As `fault_of`; `chosen`: whether answers stand to choice in other examples of its task."""
    if chosen and not text.options:
        return "it has no options, and other examples of its task have"
    return fault_of(text)


def fault_of(text: Text) -> str:
    """Why `text` is no example to learn from, in a few words; empty where it is one."""
    if isinstance(text.prompt, str):
        if not text.prompt.strip():
            return "the prompt is empty"
        parts = [text.prompt]
    else:
        if not text.prompt:
            return "there is no message before the answer"
        for number, message in enumerate(text.prompt, 1):
            if message[0] not in ROLES:
                return f"message {number} has the role {short(message[0])}; expected one of {', '.join(ROLES)}"
        parts = [part for message in text.prompt for part in message[1:]]
    if not text.answer.strip() and not (text.more and json.loads(text.more).get(CALLS)):
        return "the answer is empty"
    for number, option in enumerate(text.options):
        if not option.strip():
            return "an option is empty"
        if option in text.options[:number]:
            return f"the option {short(option)} stands twice"
    if text.options and text.answer not in text.options:
        return f"the answer {short(text.answer)} is not among the options {several([short(o) for o in text.options])}"
    for what, part in (*(("prompt", part) for part in parts), ("answer", text.answer), ("answer", text.more)):
        try:
            part.encode()
        except UnicodeEncodeError as error:
            return f"the {what} holds half a character (a lone surrogate) at {error.start}"
    return ""


def common_options(rows: Iterable[tuple[str, Row]]) -> dict[str, tuple[str, ...]]:
    """By task the answers that stand to choice, where they are the same in all its examples: (task, row)."""
    found: dict[str, tuple[str, ...]] = {}
    for task, row in rows:
        if row.text is None:
            continue
        before = found.setdefault(task, row.text.options)
        if set(before) != set(row.text.options):
            found[task] = ()
    return {task: options for task, options in found.items() if options}


class Written(float):
    """A number with a fraction, and how it is written in its file: `2.50`."""

    written: str

    def __new__(cls, written: str) -> Written:
        number = super().__new__(cls, written)
        number.written = written
        return number


def key_of(*values: Any) -> str:
    """A name for an example that depends on what it says and not on where it stands."""
    return hashlib.sha256(_plain(values)).hexdigest()[:32]


def text_in(value: Any, what: str) -> str:
    """A cell as text; numbers are fine, for answers are often numbers. They are written as they stand in the file.

    Raises:
        DataError: there is none, it is of another type, or it is no number that can be written.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise DataError(f"the {what} is no number ({value})")
        return value.written if isinstance(value, Written) else str(value)
    if value is None:
        raise DataError(f"no {what}")
    raise DataError(f"the {what} holds {type(value).__name__}; expected text")


def _plain(value: Any) -> bytes:
    """Any cell as bytes, the same wherever it was read from."""
    return json.dumps(value, sort_keys=True, default=repr).encode()

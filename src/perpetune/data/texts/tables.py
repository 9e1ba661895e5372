"""Tables of texts: prompts with their answers, each with its place in the files."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from perpetune.data.names import natural, several
from perpetune.data.sources import Kind, Table
from perpetune.data.texts.chats import CALLS, ROLES, Messages, short
from perpetune.errors import DataError, UsageError

FREE = ""  # the label of an answer in free text
SCORE = "exact_match"  # the score of tasks whose source names no other score


@dataclass(frozen=True)
class Text:
    """One example of text.

    Attributes:
        prompt: plain text, or the messages of a chat up to the answer.
        answer: what is to be said; empty where it is not known.
        options: the answers that stand to choice, where there are such.
        more: what the message with the answer holds beside it, as in `chats.Message`.
        references: what several people answered, for scores that compare with all of them; empty if `answer` is all.
        pictures: the number of pictures that belong to the prompt; in it stands a mark for each.
    """

    prompt: str | Messages
    answer: str = ""
    options: tuple[str, ...] = ()
    more: str = ""
    references: tuple[str, ...] = ()
    pictures: int = 0


@dataclass(frozen=True)
class Row:
    """One example and its place.

    Attributes:
        at: the place, for messages: file and line, item or row.
        key: an identifier that does not depend on the place of the file; seeded choices depend only on it.
        text: the example; None if it cannot be read.
        fault: the reason why it cannot be read.
        pictures: of each picture its path, or the bytes of its file.
    """

    at: str
    key: str
    text: Text | None
    fault: str = ""
    pictures: tuple[str | bytes, ...] = ()


class TextTable(Table):
    """The texts of one split.

    A bad row stays in its task until `check` reports it. Each task has one score. If all examples of a task have the
    same options, these are its classes. If their options differ, or answers are free text, the task has no classes.

    Args:
        rows: the examples.
        groups: the task of each example.
        declared: the options of each task; tasks with free text are not in it.
        scoring: for each task the name of its score in `numerics.text_scores`.
        order: the default order of the tasks.
        warnings: one line each.
    """

    gives: ClassVar[Kind] = "texts"
    noun = "example"
    use = "used"
    threads = False  # tokenizers are not made for threads, and no example waits for the disk
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
        """Example `i`; DataError, with its name, if it is bad."""
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
        """The prompt and the answer as bytes; for a bad row its key."""
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
        """The name of the score for these rows; UsageError if their tasks have different scores."""
        ways: dict[str, str] = {}
        for row in rows:
            ways.setdefault(self.scoring.get(self.tasks[row], SCORE), self.tasks[row])
        if len(ways) > 1:
            listed = several([f"{way} ({ways[way]})" for way in natural(ways)])
            raise UsageError(f"these data have several scores: {listed}; give one task at a time")
        return next(iter(ways), SCORE)


def _fault(text: Text, chosen: bool) -> str:
    """As `fault_of`. `chosen` says whether other examples of its task have options."""
    if chosen and not text.options:
        return "it has no options, but other examples of its task have options"
    return fault_of(text)


def fault_of(text: Text) -> str:
    """The reason why the library cannot learn from `text`, in a few words; empty for a good example."""
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
    """The options of each task whose examples all have the same options. `rows` are pairs (task, row)."""
    by_task: dict[str, tuple[str, ...]] = {}
    for task, row in rows:
        if row.text is None:
            continue
        before = by_task.setdefault(task, row.text.options)
        if set(before) != set(row.text.options):
            by_task[task] = ()
    return {task: options for task, options in by_task.items() if options}


class Written(float):
    """A number with a fraction, and how it is written in its file: `2.50`."""

    written: str

    def __new__(cls, written: str) -> Written:
        number = super().__new__(cls, written)
        number.written = written
        return number


def key_of(*values: Any) -> str:
    """A key for an example that depends on its content, not on its place."""
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
    """Any cell as bytes, the same for every file format."""
    return json.dumps(value, sort_keys=True, default=repr).encode()

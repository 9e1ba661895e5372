"""The view of texts: it turns texts into a language model's input, and reads and judges the model's answers."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from perpetune.data.examples import Augment, Judge, Purpose, Question, View
from perpetune.data.sources import Kind, Table
from perpetune.data.texts.chats import ASSISTANT, LEARN, TOOLS, Message, Messages, as_dict, is_learned, more_of
from perpetune.data.texts.examples import Encoded, TextSet
from perpetune.data.texts.prompts import prompt_in, read_prompts
from perpetune.data.texts.tables import SCORE, Text, TextTable
from perpetune.data.texts.templates import NOW, pinned, render
from perpetune.errors import DataError, UsageError
from perpetune.numerics.text_scores import score_of
from perpetune.tasks import IGNORED, Batch, Examples, Inputs, Item

SOME_ANSWER = "a"  # stands where an answer is to come


@dataclass(frozen=True)
class _Span:
    """A range of characters that the model learns to say.

    Attributes:
        start: the beginning of the range; only space is between it and `content`.
        content: the beginning of the answer itself.
        stop: the end of the range.
    """

    start: int
    content: int
    stop: int


@dataclass(frozen=True)
class _Token:
    """A token, its first character, the character after its end, and whether the tokenizer `added` it to the text."""

    id: int
    start: int
    stop: int
    added: bool

    def within(self, span: _Span) -> bool:
        """Whether the token is in the span. A token that only joins the space before an answer to the prompt is not.

        For a token of space, some tokenizers give the same position as start and stop.
        """
        return not self.added and self.start < span.stop and (self.stop > span.content or self.start >= span.start)


@dataclass(frozen=True)
class _Whole:
    """A text as tokens.

    Attributes:
        ids: int64 `(N,)`.
        said: bool `(N,)`, true at those that are learned to be said.
        last: where the last answer begins.
        opening: how many open every text.
        dropped: earlier answers that are not learned.
        lost: what the chat form leaves out.
    """

    ids: Tensor
    said: Tensor
    last: int
    opening: int
    dropped: int = 0
    lost: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Rendered:
    """A text as the model reads it.

    Attributes:
        text: all of it.
        spans: where in it stands what is learned to be said; the answer last.
        dropped: how many earlier answers are not learned.
        lost: what the chat form leaves out.
    """

    text: str
    spans: tuple[_Span, ...]
    dropped: int = 0
    lost: tuple[str, ...] = ()


class TextView(View):
    """Turns texts into tokens and back.

    Where an answer begins is found by the characters that each token of the whole text covers: tokens of the answer
    alone can be others. Prompts and answers stay as they are. Between a plain prompt and its answer stands one space,
    unless the prompt ends in white space or the answer brings its own (one space, a tab or a line break). What is
    longer than the model takes loses the start of the prompt, never of the answer.

    Args:
        tokenizer: a fast tokenizer of transformers.
        max_length: tokens that the model takes, question and answer together.
        chat: whether plain prompts are put into the form of a chat too, as one message of the user.
        rows: the number of tokens that the model has a row for; None if it has one for every token.
    """

    takes: ClassVar[Kind] = "texts"
    noun = "examples"
    verb = "answer"
    ordered = True
    placeholder: int | None = None
    """The token that stands for what is no text; the model needs no row for it."""
    opened = False
    """Whether the form of a plain prompt has the tokens that open a text in it already."""

    def __init__(self, tokenizer: Any, *, max_length: int, chat: bool = False, rows: int | None = None):
        self.tokenizer, self.max_length, self.chat, self.rows = tokenizer, max_length, chat, rows
        self.room = 0
        """The number of tokens that a question leaves free for a generated answer."""
        self.chooses = True
        """Whether the model chooses among the options of a question; otherwise it generates the answer."""
        self.end: int | None = tokenizer.eos_token_id
        """The token that ends an answer; None if the model has no such token."""
        self.ends: set[int] = set() if self.end is None else {self.end}
        """Tokens at which a generated answer ends."""
        self.pad = next((t for t in (tokenizer.pad_token_id, self.end, tokenizer.unk_token_id) if t is not None), 0)
        """Stands where there is no token; what it is does not matter, for it is masked."""
        self.today: date | None = None

    @property
    def dated(self) -> bool:
        return NOW in str(self.tokenizer.chat_template or "")

    @property
    def template(self) -> str | None:
        """The chat template, with the day that is today for the examples."""
        found: str | None = self.tokenizer.chat_template and self.tokenizer.get_chat_template()
        return found if found is None or self.today is None else pinned(found, self.today)

    @property
    def opening(self) -> int:
        """The number of tokens with which every prompt begins, and which a cut leaves."""
        return self._asked(SOME_ANSWER).opening

    @property
    def answers(self) -> bool:
        """Whether an answer follows a question."""
        return self.chooses or self.room > 0

    def sequence(self, text: Text) -> Encoded:
        """The prompt, the answer and the end token, as tokens.

        Raises:
            DataError: the answer alone is too long for the model, or the messages do not fit the model's chat template.
        """
        whole = self._whole(text)
        over, last = len(whole.ids) - self.max_length, len(whole.ids) - whole.last
        if over <= 0:
            return Encoded(whole.ids, whole.said, dropped=whole.dropped, lost=whole.lost)
        if last > self.max_length - max(1, whole.opening):
            raise DataError(
                f"the answer alone has {last} tokens, but prompt and answer together can have only {self.max_length}"
            )
        kept = self._without(whole.ids, over, whole.opening, whole.last)
        said = whole.said[kept]
        said[0] = False  # of an earlier answer in a chat that was cut: nothing stands before it any more
        return Encoded(whole.ids[kept], said, cut=over, dropped=whole.dropped, lost=whole.lost)

    def question(self, text: Text, *, choose: bool | None = None) -> Encoded:
        """The prompt as tokens, and the tokens of each option as its answer.

        The prompt gets the tokens that it has in front of an answer. They may differ from its tokens alone: two line
        breaks are one token at the end of a text, and two tokens before a word.

        Args:
            choose: whether the model chooses among the text's options; None takes `chooses`.

        Raises:
            DataError: the prompt is empty, no room is left for an answer, or the messages do not fit the model's chat
                template.
        """
        given = text.options if (self.chooses if choose is None else choose) else ()
        wholes = [self._whole(Text(text.prompt, option)) for option in given] or [self._asked(text.prompt)]
        first = _shared(wholes)
        if not first or (isinstance(text.prompt, str) and not text.prompt.strip(" ")):
            raise DataError("the prompt is empty")
        ids = wholes[0].ids[:first]
        options = tuple(whole.ids[first:] for whole in wholes) if given else ()
        most = self.max_length - max((len(o) for o in options), default=self.room)
        if most < 1:
            raise DataError(
                f"an answer needs {self.max_length - most} tokens, but the model takes {self.max_length} tokens in all"
            )
        over = len(ids) - most
        if over > 0:
            ids = ids[self._without(ids, over, wholes[0].opening, len(ids))]
        around = ("", "") if given else self._around(text.prompt, wholes[0])
        return Encoded(ids, options=options, cut=max(0, over), lost=wholes[0].lost, around=around)

    def collate(self, items: Sequence[Item]) -> Batch:
        """A batch of the `items`, each (example, target, number), padded on the left so that all texts end together."""
        encoded: list[Encoded] = [e for e, _, _ in items]
        longest = max(len(e) for e in encoded)
        ids = torch.full((len(items), longest), self.pad, dtype=torch.int64)
        mask = torch.zeros(len(items), longest, dtype=torch.bool)
        labels = torch.full_like(ids, IGNORED) if encoded[0].answer is not None else None
        for row, e in enumerate(encoded):
            start = longest - len(e)
            ids[row, start:], mask[row, start:] = e.ids, True
            if labels is not None and e.answer is not None:
                labels[row, start:] = torch.where(e.answer, e.ids, IGNORED)
        learned = (labels != IGNORED).any(0) if labels is not None else torch.zeros(0)
        said = longest - int(learned.to(torch.uint8).argmax()) if learned.any() else 0
        targets = torch.tensor([t for _, t, _ in items], dtype=torch.int64)
        numbers = torch.tensor([n for _, _, n in items], dtype=torch.int64)
        options = self._options(encoded)
        return Batch(Inputs(ids=ids, mask=mask, labels=labels, options=options, said=said), targets, numbers)

    def _options(self, encoded: Sequence[Encoded]) -> Tensor | None:
        """The options of each question, `(B, K, M)`, with -100 after each option and in place of missing options."""
        count = max(len(e.options) for e in encoded)
        if not count:
            return None
        longest = max(len(o) for e in encoded for o in e.options)
        options = torch.full((len(encoded), count, longest), IGNORED, dtype=torch.int64)
        for row, e in enumerate(encoded):
            for k, tokens in enumerate(e.options):
                options[row, k, : len(tokens)] = tokens
        return options

    def decode(self, ids: Tensor) -> str:
        """The text of generated tokens `(N,)`, up to the first end, with all its white space.

        The space that the question has left to the answer is in it, too: see `Encoded.own`.
        """
        tokens = list(itertools.takewhile(lambda token: token not in self.ends, ids.tolist()))
        before, text = self._written(self._anchor), self._written([*self._anchor, *tokens])
        return text[len(before) :] if before and text.startswith(before) else self._written(tokens)

    @cached_property
    def _anchor(self) -> list[int]:
        """Tokens of a word: some tokenizers drop the space before the first token that they write, so that never is
        the answer's."""
        found: list[int] = self.tokenizer(SOME_ANSWER, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    def _written(self, tokens: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    @property
    def extent(self) -> str:
        return f"max_length={self.max_length}"

    def examples(
        self, table: Table, rows: Sequence[int], classes: Sequence[str], purpose: Purpose, augment: Augment = "none"
    ) -> TextSet:
        if not isinstance(table, TextTable):
            raise self._refused(table)
        return TextSet(table, rows, classes, self, purpose)

    def typed(self, inputs: Sequence[str]) -> list[str | Messages]:
        return read_prompts(inputs)

    def ask(
        self,
        given: Any,
        *,
        first: int = 0,
        options: Sequence[str] = (),
        choose: bool | None = None,
        unreadable: list[str] | None = None,
    ) -> list[Question]:
        """Turn prompts into questions, all with the same options."""
        asked = []
        for number, prompt in enumerate(given, first + 1):
            try:
                text = Text(prompt_in(prompt), options=tuple(options))
                encoded = self.question(text, choose=choose)
            except DataError as error:
                if unreadable is None:
                    raise DataError(f"prompt {number}: {error}") from error
                unreadable.append(f"prompt {number}: {error}")
                continue
            asked.append(Question(text.prompt, encoded, text.options, encoded.cut, encoded.lost, encoded.own))
        return asked

    def judge(self, examples: Examples, score: str | None) -> Judge:
        try:
            examples.text(0)
        except UsageError:
            raise UsageError("the backbone takes texts, but the test data are not texts") from None
        judged = score_of(score or SCORE)

        def judge(number: int, answer: str | int) -> float:
            text: Text = examples.text(number)
            if isinstance(answer, int):  # not by the score, because for some scores `A+` equals `A-`
                return float(text.options[answer] == text.answer)
            return judged(answer, text.references or text.answer, _last(text.prompt))

        return judge

    def read_alone(self) -> None:
        self.chooses, self.room = False, 0

    def cut_note(self, cuts: Sequence[int], of: int, what: str, *, asked: bool = True) -> str:
        room = ", with room for an answer," if asked and self.answers else ""
        return (
            f"{len(cuts)} of {of} {what}{room} are longer than the model's {self.max_length} tokens and were cut on "
            f"the left (the longest by {max(cuts)})"
        )

    def _whole(self, text: Text) -> _Whole:
        """Prompt and answer with its end, in tokens."""
        rendered = self._rendered(text)
        tokens, spans = self._tokens(rendered.text, text.prompt), rendered.spans
        while tokens and tokens[-1].added:  # the end that a tokenizer puts there; ours takes its place
            tokens.pop()
        said = [any(token.within(span) for span in spans) for token in tokens]
        last = next((i for i, token in enumerate(tokens) if token.within(spans[-1])), len(tokens))
        said[last:] = [not token.added for token in tokens[last:]]  # space at the end may have no characters
        ids = [token.id for token in tokens]
        if self.end is not None and (not ids or ids[-1] != self.end):
            ids, said = [*ids, self.end], [*said, True]
        elif ids:
            said[-1] = True  # the end token of the chat template
        said[0] = False  # no token before it can predict it
        opening = self._opening(tokens)
        tensors = torch.tensor(ids, dtype=torch.int64), torch.tensor(said)
        return _Whole(*tensors, max(1, last), opening, rendered.dropped, rendered.lost)

    def _asked(self, prompt: str | Messages) -> _Whole:
        """The prompt and a placeholder for the answer, as tokens."""
        asked = self._prompt(prompt)
        gap, place = ("", len(asked)) if self._is_chat(prompt) else _gap(asked, SOME_ANSWER)
        text = asked + gap + SOME_ANSWER
        span = _Span(place, len(text) - len(SOME_ANSWER), len(text))
        tokens = self._tokens(text, prompt)
        last = next((i for i, token in enumerate(tokens) if token.within(span)), len(tokens))
        ids = torch.tensor([token.id for token in tokens], dtype=torch.int64)
        lost = self._lost(_messages(prompt), asked, asking=True) if self._is_chat(prompt) else ()
        return _Whole(ids, torch.zeros(len(ids), dtype=torch.bool), last, self._opening(tokens), lost=lost)

    def _rendered(self, text: Text) -> _Rendered:
        if not self._is_chat(text.prompt):
            prompt = self._prompt(text.prompt)
            gap, place = _gap(prompt, text.answer)
            opened = prompt + gap
            whole = opened + text.answer
            return _Rendered(whole, (_Span(place, len(opened), len(whole)),))
        messages = [*_messages(text.prompt), (ASSISTANT, text.answer, *([text.more] if text.more else ()))]
        whole = self._told(messages)
        spans, trimmed = [], False
        answers = [turn for turn, message in enumerate(messages) if message[0] == ASSISTANT and turn]  # none opens it
        answers = [turn for turn in answers if is_learned(messages[turn])]
        for turn in answers:
            before, after = self._chat(messages[:turn], asking=True), self._told(messages[: turn + 1])
            # Some forms drop what earlier answers held (their reasoning): those are not learned then.
            if whole.startswith(before) and whole.startswith(after):
                spans.append(_Span(len(before), len(before), len(after)))
                trimmed = trimmed or _trimmed(messages[turn][1], after[len(before) :])
        lost = self._lost(messages, whole)
        if not spans or spans[-1].stop != len(whole):  # what it asks with is not what it puts before an answer
            changed = self._told([*messages[:-1], (ASSISTANT, _other(text.answer), *messages[-1][2:])])
            if whole == changed:
                raise DataError("the chat template leaves the answer out: another template or tokenizer is needed")
            pairs = enumerate(zip(whole, changed, strict=False))
            at = next((i for i, (one, another) in pairs if one != another), min(len(whole), len(changed)))
            spans.append(_Span(at, at, len(whole)))
        said = whole[spans[-1].content :]
        if not text.answer.strip() and lost:
            raise DataError(f"the answer is empty, for the model's chat template leaves out {' and '.join(lost)}")
        if trimmed or _trimmed(text.answer, said):
            lost = (*lost, "white space at the ends of answers")
        return _Rendered(whole, tuple(spans), len(answers) - len(spans), lost)

    def _lost(self, messages: Sequence[Message], whole: str, *, asking: bool = False) -> tuple[str, ...]:
        """What the chat form leaves out of `messages`, which it makes `whole` of: what makes no difference to it."""
        keys = dict.fromkeys(key for message in messages for key in more_of(message) if key != LEARN)
        parts: dict[str, list[Message]] = {
            f"the messages' {key}" if key != TOOLS else "the tools": [_without_key(m, key) for m in messages]
            for key in keys
        }
        for role in ("system", "developer", "tool"):
            silent = [m for m in messages if m[0] == role and m[1].strip() and m[1].strip() not in whole]
            if silent:
                parts[f"messages of the role {role}"] = [m for m in messages if m not in silent]
        lost = []
        for name, rest in parts.items():
            try:
                same = self._chat(rest, asking=True) if asking else self._told(rest)
            except DataError:  # so it makes a difference
                continue
            if same == whole:
                lost.append(name)
        return tuple(lost)

    def _told(self, messages: Sequence[Message]) -> str:
        """A chat that ends in an answer, without the white space that the chat form puts behind it."""
        whole = self._chat(messages, asking=False)
        role, answer, *more = messages[-1]
        if answer[-1:].isspace():  # then it is not all the form's
            other = self._chat([*messages[:-1], (role, _other(answer), *more)], asking=False)
            return whole[: len(whole) - (len(other) - len(other.rstrip()))]
        return whole.rstrip()

    def _around(self, prompt: str | Messages, asked: _Whole) -> tuple[str, str]:
        """White space that an answer to `prompt` begins and ends with, and which is not its own."""
        if not self._is_chat(prompt):
            rest = self.decode(asked.ids[asked.last :])
            lead = rest.removesuffix(SOME_ANSWER)
            return (lead if rest != lead and lead.isspace() else ""), ""
        try:
            whole, before = self._told([*_messages(prompt), (ASSISTANT, SOME_ANSWER)]), self._prompt(prompt)
        except DataError:  # asked again it would say nothing new, and it can be asked
            return "", ""
        rest = whole[len(before) :] if whole.startswith(before) else ""
        lead, found, tail = rest.partition(SOME_ANSWER)
        if not found or lead.strip():
            return "", ""
        return lead, tail[: len(tail) - len(tail.lstrip())]

    def _prompt(self, prompt: str | Messages) -> str:
        """What the model is asked, up to where the answer begins."""
        return self._chat(_messages(prompt), asking=True) if self._is_chat(prompt) else str(prompt)

    def _is_chat(self, prompt: str | Messages) -> bool:
        return self.chat or not isinstance(prompt, str)

    def _chat(self, messages: Sequence[Message], *, asking: bool) -> str:
        if not self.tokenizer.chat_template:
            raise DataError(
                "this model's tokenizer has no chat template, but messages need one: give rows with prompt and answer, "
                "or put a chat_template.jinja beside the tokenizer"
            )
        told = [self._spoken(message) for message in messages]
        tools = told[0].pop(TOOLS, None) if told else None
        if "developer" not in str(self.tokenizer.chat_template):  # the newer name of the system
            told = [{**message, "role": "system"} if message["role"] == "developer" else message for message in told]
        return render(self.tokenizer, told, tools=tools, asking=asking, today=self.today)

    def _spoken(self, message: Message) -> dict[str, Any]:
        """A message in the form in which the chat template takes it."""
        return as_dict(message)

    def _tokens(self, text: str, prompt: str | Messages) -> list[_Token]:
        """The tokens of a text. A chat template writes its special tokens into the text itself."""
        found = tokenized(
            self.tokenizer,
            text,
            add_special_tokens=not self._is_chat(prompt) and not self.opened,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
        )
        unknown = {i for i in found["input_ids"] if self.rows is not None and i >= self.rows and i != self.placeholder}
        if unknown:
            named = ", ".join(map(repr, self.tokenizer.convert_ids_to_tokens(sorted(unknown)[:3])))
            raise DataError(f"the tokenizer makes {named} of it, and the model's embedding has no row for that")
        columns = (found["input_ids"], found["offset_mapping"], found["special_tokens_mask"])
        return [_Token(int(i), int(a), int(b), bool(added)) for i, (a, b), added in zip(*columns, strict=True)]

    def _without(self, ids: Tensor, count: int, opening: int, stop: int) -> Tensor:
        """The positions that are left after a cut of `count` tokens on the left, behind the first `opening` tokens.

        Args:
            stop: where the prompt ends.
        """
        first = opening if len(ids) > count + opening else 0
        return torch.cat([torch.arange(first), torch.arange(first + count, len(ids))])

    def _opening(self, tokens: Sequence[_Token]) -> int:
        """The number of tokens with which every text begins, such as a begin-of-text token."""
        put = sum(1 for _ in itertools.takewhile(lambda token: token.added, tokens))
        return max(put, int(bool(tokens) and tokens[0].id == self.tokenizer.bos_token_id))


def tokenized(tokenizer: Any, text: str, **options: Any) -> Any:
    """What a tokenizer of transformers makes of a text.

    Raises:
        DataError: a pattern in its tokenizer.json takes too many steps. The library of patterns counts them.
    """
    try:
        return tokenizer(text, verbose=False, **options)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust; it is no `Exception`
            raise
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"the model's tokenizer fails (a pattern in its tokenizer.json?): {reason}") from error


def _shared(wholes: Sequence[_Whole]) -> int:
    """The number of first tokens, before the answers, that are the same in all of `wholes`."""
    first = min(whole.last for whole in wholes)
    same = [len(set(column)) == 1 for column in zip(*(whole.ids[:first].tolist() for whole in wholes), strict=True)]
    return [*same, False].index(False)


def _gap(prompt: str, answer: str) -> tuple[str, int]:
    """What is put between a plain prompt and its answer, and where the answer begins, with the space before it.

    The last space before an answer is one token with its first word in most tokenizers, so it is the answer's.
    """
    brings = answer[:1].isspace() and answer[:2] != "  "
    gap = "" if not prompt or prompt[-1].isspace() or brings else " "
    return gap, len(prompt) - prompt.endswith(" ")


def _trimmed(answer: str, said: str) -> bool:
    """Whether an answer has lost white space at its ends in what the chat form says."""
    return answer not in said and answer.strip() in said


def _other(answer: str) -> str:
    """An answer that begins otherwise."""
    return "0" if not answer.strip().startswith("0") else "1"


def _last(prompt: str | Messages) -> str:
    """The question as one text, which some scores need."""
    return prompt if isinstance(prompt, str) else prompt[-1][1]


def _without_key(message: Message, key: str) -> Message:
    more = more_of(message)
    more.pop(key, None)
    return (*message[:2], json.dumps(more, ensure_ascii=False)) if more else message[:2]


def _messages(prompt: str | Messages) -> list[Message]:
    return [("user", prompt)] if isinstance(prompt, str) else list(prompt)

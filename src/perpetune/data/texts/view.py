"""How texts become the input of a language model, and how its answers are read and judged."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perpetune.data.examples import Augment, Judge, Purpose, Question, View
from perpetune.data.sources import Table
from perpetune.data.texts.examples import Encoded, TextSet
from perpetune.data.texts.prompts import prompt_in, read_prompts
from perpetune.data.texts.tables import ASSISTANT, SCORE, Messages, Text, TextTable
from perpetune.errors import DataError, UsageError
from perpetune.numerics.text_scores import score_of
from perpetune.tasks import IGNORED, Batch, Examples, Inputs, Item

SOME_ANSWER = "a"  # stands where an answer is to come


@dataclass(frozen=True)
class _Span:
    """Characters that are learned to be said.

    Attributes:
        start: where they begin; what is between it and `content` is space.
        content: where the answer itself begins.
        stop: where they end.
    """

    start: int
    content: int
    stop: int


LONGEST = 10**7
"""Characters of the longest text that a chat template may make."""

REFUSED = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)
"""What a chat template may raise beside its own errors."""


@dataclass(frozen=True)
class _Token:
    """A token, from which to which character it goes, and whether the tokenizer has `added` it to the text."""

    id: int
    start: int
    stop: int
    added: bool

    def within(self, span: _Span) -> bool:
        """Whether it is one of the span's; one that only joins the space before an answer to the prompt is not.

        A token of space may be said to go from a place to the same place.
        """
        return not self.added and self.start < span.stop and (self.stop > span.content or self.start >= span.start)


@dataclass(frozen=True)
class _Whole:
    """A text in tokens.

    Attributes:
        ids: int64 `(N,)`.
        said: bool `(N,)`, true at those that are learned to be said.
        last: where the last answer begins.
        opening: how many open every text.
        dropped: earlier answers that are not learned.
    """

    ids: Tensor
    said: Tensor
    last: int
    opening: int
    dropped: int = 0


class TextView(View):
    """Texts to tokens and back.

    Where an answer begins is found by the characters that each token of the whole text covers: tokens of the answer
    alone can be others. Between a plain prompt and its answer stands one space, unless the prompt ends in a line
    break. What is longer than the model takes loses the start of the prompt, never of the answer.

    Args:
        tokenizer: a fast tokenizer of transformers.
        max_length: tokens that the model takes, question and answer together.
        chat: whether plain prompts are put into the form of a chat too, as one message of the user.
        rows: the number of tokens that the model has a row for; None if it has one for every token.
    """

    takes = "texts"
    noun = "examples"
    verb = "answer"
    ordered = True

    def __init__(self, tokenizer: Any, *, max_length: int, chat: bool = False, rows: int | None = None):
        self.tokenizer, self.max_length, self.chat, self.rows = tokenizer, max_length, chat, rows
        self.room = 0
        """Tokens that a question leaves free for an answer that is generated."""
        self.chooses = True
        """Whether the answers of questions with options are chosen among them; else they are generated too."""
        self.end: int | None = tokenizer.eos_token_id
        """The token that ends an answer; None where the model has none."""
        self.ends: set[int] = set() if self.end is None else {self.end}
        """Tokens at which a generated answer ends."""
        self.pad = next((t for t in (tokenizer.pad_token_id, self.end, tokenizer.unk_token_id) if t is not None), 0)
        """Stands where there is no token; what it is does not matter, for it is masked."""

    @property
    def answers(self) -> bool:
        """Whether something is said after a question."""
        return self.chooses or self.room > 0

    def sequence(self, text: Text) -> Encoded:
        """The prompt and the answer with its end.

        Raises:
            DataError: the answer alone is longer than the model takes, or the messages cannot be put into the model's
                chat form.
        """
        whole = self._whole(text)
        over, last = len(whole.ids) - self.max_length, len(whole.ids) - whole.last
        if over <= 0:
            return Encoded(whole.ids, whole.said, dropped=whole.dropped)
        if last > self.max_length - max(1, whole.opening):
            raise DataError(
                f"the answer alone has {last} tokens, and prompt and answer together may have {self.max_length}"
            )
        kept = _without(whole.ids, over, whole.opening)
        said = whole.said[kept]
        said[0] = False  # of an earlier answer in a chat that was cut: nothing stands before it any more
        return Encoded(whole.ids[kept], said, cut=over, dropped=whole.dropped)

    def question(self, text: Text, *, choose: bool | None = None) -> Encoded:
        """The prompt alone, and the tokens of each option as its answer.

        Tokens are those that the prompt has in front of an answer, which may be others than those that it has alone:
        two line breaks are one token at the end of a text, and two before a word.

        Args:
            choose: whether the answer is chosen among the text's options; None is what `chooses` says.

        Raises:
            DataError: the prompt is empty, no room is left for an answer, or the messages cannot be put into the
                model's chat form.
        """
        given = text.options if (self.chooses if choose is None else choose) else ()
        wholes = [self._whole(Text(text.prompt, option)) for option in given] or [self._asked(text.prompt)]
        first = _shared(wholes)
        if not first:
            raise DataError("the prompt is empty")
        ids = wholes[0].ids[:first]
        options = tuple(whole.ids[first:] for whole in wholes) if given else ()
        most = self.max_length - max((len(o) for o in options), default=self.room)
        if most < 1:
            raise DataError(f"an answer takes {self.max_length - most} tokens, and the model {self.max_length} in all")
        over = len(ids) - most
        if over > 0:
            ids = ids[_without(ids, over, wholes[0].opening)]
        return Encoded(ids, options=options, cut=max(0, over))

    def collate(self, items: Sequence[Item]) -> Batch:
        """A batch of (example, target, number), padded on the left, so that all answers end at the same place."""
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
        """The options of each question, `(B, K, M)`, with -100 after each and for those there are not."""
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
        """The text of generated tokens `(N,)`, up to the first end."""
        tokens = list(itertools.takewhile(lambda token: token not in self.ends, ids.tolist()))
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.strip()

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
        """Prompts as questions, each with the same options."""
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
            asked.append(Question(text.prompt, encoded, text.options, encoded.cut))
        return asked

    def judge(self, examples: Examples, score: str | None) -> Judge:
        try:
            examples.text(0)
        except UsageError:
            raise UsageError("the backbone takes texts, and its test data are none") from None
        judged = score_of(score or SCORE)

        def judge(number: int, answer: str | int) -> float:
            text: Text = examples.text(number)
            if isinstance(answer, int):  # not by the score, for which `A+` and `A-` may be the same
                return float(text.options[answer] == text.answer)
            return judged(answer, text.answer, _last(text.prompt))

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
        rendered, spans, dropped = self._rendered(text)
        tokens = self._tokens(rendered, text.prompt)
        while tokens and tokens[-1].added:  # the end that a tokenizer puts there; ours takes its place
            tokens.pop()
        said = [any(token.within(span) for span in spans) for token in tokens]
        last = next((i for i, token in enumerate(tokens) if token.within(spans[-1])), len(tokens))
        ids = [token.id for token in tokens]
        if self.end is not None and (not ids or ids[-1] != self.end):
            ids, said = [*ids, self.end], [*said, True]
        elif ids:
            said[-1] = True  # the end that the chat form puts there
        said[0] = False  # nothing stands before it that could say it
        opening = self._opening(tokens)
        return _Whole(torch.tensor(ids, dtype=torch.int64), torch.tensor(said), max(1, last), opening, dropped)

    def _asked(self, prompt: str | Messages) -> _Whole:
        """The prompt and the beginning of some answer, in tokens."""
        asked = self._prompt(prompt)
        text = asked + ("" if self._is_chat(prompt) else _gap(asked)) + SOME_ANSWER
        span = _Span(len(asked), len(text) - len(SOME_ANSWER), len(text))
        tokens = self._tokens(text, prompt)
        last = next((i for i, token in enumerate(tokens) if token.within(span)), len(tokens))
        ids = torch.tensor([token.id for token in tokens], dtype=torch.int64)
        return _Whole(ids, torch.zeros(len(ids), dtype=torch.bool), last, self._opening(tokens))

    def _rendered(self, text: Text) -> tuple[str, list[_Span], int]:
        """The whole text, where in it stands what is learned to be said, the answer last, and how many earlier answers
        are not learned."""
        answer = text.answer.strip(" ")
        if not self._is_chat(text.prompt):
            prompt = self._prompt(text.prompt)
            opened = prompt + _gap(prompt)
            whole = opened + answer
            return whole, [_Span(len(prompt), len(opened), len(whole))], 0
        messages = [*_messages(text.prompt), (ASSISTANT, answer)]
        whole = self._chat(messages, asking=False).rstrip()
        spans = []
        answers = [turn for turn, (role, _) in enumerate(messages) if role == ASSISTANT and turn]  # opening, it is none
        for turn in answers:
            before, after = self._chat(messages[:turn], asking=True), self._chat(messages[: turn + 1], asking=False)
            # Some forms drop what earlier answers held (their reasoning): those are not learned then.
            if whole.startswith(before) and whole.startswith(after.rstrip()):
                spans.append(_Span(len(before), len(before), len(after.rstrip())))
        if not spans or spans[-1].stop != len(whole):  # what it asks with is not what it puts before an answer
            other = "0" if not answer.strip().startswith("0") else "1"
            changed = self._chat([*messages[:-1], (ASSISTANT, other)], asking=False).rstrip()
            if whole == changed:
                raise DataError("the chat template leaves the answer out: another template or tokenizer is needed")
            pairs = enumerate(zip(whole, changed, strict=False))
            at = next((i for i, (one, another) in pairs if one != another), min(len(whole), len(changed)))
            spans.append(_Span(at, at, len(whole)))
        return whole, spans, len(answers) - len(spans)

    def _prompt(self, prompt: str | Messages) -> str:
        """What the model is asked, up to where the answer begins."""
        return self._chat(_messages(prompt), asking=True) if self._is_chat(prompt) else str(prompt).rstrip(" ")

    def _is_chat(self, prompt: str | Messages) -> bool:
        return self.chat or not isinstance(prompt, str)

    def _chat(self, messages: Sequence[tuple[str, str]], *, asking: bool) -> str:
        if not self.tokenizer.chat_template:
            raise DataError(
                "this model's tokenizer has no chat template, and messages need one: give rows of prompt and answer, "
                "or put a chat_template.jinja beside the tokenizer"
            )
        from jinja2 import TemplateError

        told = [{"role": role, "content": content} for role, content in messages]
        try:
            text: str = self.tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=asking)
        except (TemplateError, *REFUSED) as error:
            raise DataError(f"the model's chat template refuses the messages: {error}") from error
        if len(text) > LONGEST:
            raise DataError(f"the model's chat template makes {len(text)} characters of the messages")
        return text

    def _tokens(self, text: str, prompt: str | Messages) -> list[_Token]:
        """The tokens of a text; a chat form brings its special tokens itself."""
        found = self.tokenizer(
            text,
            add_special_tokens=not self._is_chat(prompt),
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            verbose=False,
        )
        unknown = {i for i in found["input_ids"] if self.rows is not None and i >= self.rows}
        if unknown:
            named = ", ".join(map(repr, self.tokenizer.convert_ids_to_tokens(sorted(unknown)[:3])))
            raise DataError(f"the tokenizer makes {named} of it, and the model's embedding has no row for that")
        columns = (found["input_ids"], found["offset_mapping"], found["special_tokens_mask"])
        return [_Token(int(i), int(a), int(b), bool(added)) for i, (a, b), added in zip(*columns, strict=True)]

    def _opening(self, tokens: Sequence[_Token]) -> int:
        """How many tokens every text opens with, whatever it says."""
        put = sum(1 for _ in itertools.takewhile(lambda token: token.added, tokens))
        return max(put, int(bool(tokens) and tokens[0].id == self.tokenizer.bos_token_id))


def _shared(wholes: Sequence[_Whole]) -> int:
    """How many tokens stand before the answers of all of `wholes`, and are the same in all."""
    first = min(whole.last for whole in wholes)
    same = [len(set(column)) == 1 for column in zip(*(whole.ids[:first].tolist() for whole in wholes), strict=True)]
    return [*same, False].index(False)


def _gap(prompt: str) -> str:
    """What stands between a plain prompt and its answer."""
    return "" if prompt.endswith("\n") or not prompt else " "


def _without(ids: Tensor, count: int, opening: int) -> Tensor:
    """Positions that are left when `count` tokens are cut off on the left, behind the `opening` ones."""
    first = opening if len(ids) > count + opening else 0
    return torch.cat([torch.arange(first), torch.arange(first + count, len(ids))])


def _last(prompt: str | Messages) -> str:
    """The question as one text: what some scores compare an answer with."""
    return prompt if isinstance(prompt, str) else prompt[-1][1]


def _messages(prompt: str | Messages) -> list[tuple[str, str]]:
    return [("user", prompt)] if isinstance(prompt, str) else list(prompt)

"""How texts become the input of a language model: the counterpart of `Preprocess`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from perpetune.errors import DataError
from perpetune.tasks import IGNORED, Batch, Tokens

Messages = tuple[tuple[str, str], ...]  # (role, content), in the order they were said
ASSISTANT = "assistant"


@dataclass(frozen=True)
class Text:
    """One example of text.

    Attributes:
        prompt: plain text, or the messages of a chat up to the answer.
        answer: what is to be said; empty where it is not known.
        options: the answers that stand to choice, where there are such.
    """

    prompt: str | Messages
    answer: str = ""
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Encoded:
    """One example as tokens.

    Attributes:
        ids: int64 `(N,)`.
        answer: bool `(N,)`, true at the tokens that are learned to be said; None for a question.
        options: the tokens of each option, int64, as they follow the question, with the end.
        cut: how many tokens of the prompt were cut off on its left, for the model takes no more.
    """

    ids: Tensor
    answer: Tensor | None = None
    options: tuple[Tensor, ...] = ()
    cut: int = 0

    def __len__(self) -> int:
        return len(self.ids)


class TextView:
    """Texts to tokens and back.

    Where an answer begins is found by the characters that each token of the whole text covers: tokens of the answer
    alone can be others. Between a plain prompt and its answer stands one space, unless the prompt ends in a line
    break. What is longer than the model takes loses the start of the prompt, never of the answer.

    Args:
        tokenizer: a fast tokenizer of transformers.
        max_length: tokens that the model takes, question and answer together.
        chat: whether plain prompts are put into the form of a chat too, as one message of the user.
    """

    takes: Literal["texts"] = "texts"

    def __init__(self, tokenizer: Any, *, max_length: int, chat: bool = False):
        self.tokenizer, self.max_length, self.chat = tokenizer, max_length, chat
        self.room = 0
        """Tokens that a question leaves free for an answer that is generated."""
        self.chooses = True
        """Whether the answers of questions with options are chosen among them; else they are generated too."""
        self.end: int | None = tokenizer.eos_token_id
        """The token that ends an answer; None where the model has none."""
        self.pad = next((t for t in (tokenizer.pad_token_id, self.end, tokenizer.unk_token_id) if t is not None), 0)
        """Stands where there is no token; what it is does not matter, for it is masked."""

    def sequence(self, text: Text) -> Encoded:
        """The prompt and the answer with its end.

        Raises:
            DataError: the answer alone is longer than the model takes, or the messages cannot be put into the model's
                chat form.
        """
        ids, answer = self._whole(text)
        over = len(ids) - self.max_length
        if over <= 0:
            return Encoded(ids, answer)
        if int(answer.sum()) >= self.max_length:
            raise DataError(
                f"the answer alone has {int(answer.sum())} tokens, and prompt and answer together may have "
                f"{self.max_length}"
            )
        kept = _without(ids, over, self._opening(text))
        return Encoded(ids[kept], answer[kept], cut=over)

    def question(self, text: Text) -> Encoded:
        """The prompt alone, and the tokens of each option as its answer."""
        ids = torch.tensor(self._tokens(self._prompt(text.prompt), text.prompt)[0], dtype=torch.int64)
        given = text.options if self.chooses else ()
        options = tuple(self._answer(Text(text.prompt, option)) for option in given)
        most = self.max_length - max((len(o) for o in options), default=self.room)
        if most < 1:
            raise DataError(f"an answer takes {self.max_length - most} tokens, and the model {self.max_length} in all")
        over = len(ids) - most
        if over > 0:
            ids = ids[_without(ids, over, self._opening(text))]
        return Encoded(ids, options=options, cut=max(0, over))

    def collate(self, items: Sequence[tuple[Encoded, int, int]]) -> Batch:
        """A batch of (example, target, number), padded on the left, so that all answers end at the same place."""
        encoded = [e for e, _, _ in items]
        longest = max(len(e) for e in encoded)
        ids = torch.full((len(items), longest), self.pad, dtype=torch.int64)
        mask = torch.zeros(len(items), longest, dtype=torch.bool)
        labels = torch.full_like(ids, IGNORED) if encoded[0].answer is not None else None
        for row, e in enumerate(encoded):
            start = longest - len(e)
            ids[row, start:], mask[row, start:] = e.ids, True
            if labels is not None and e.answer is not None:
                labels[row, start:] = torch.where(e.answer, e.ids, IGNORED)
        targets = torch.tensor([t for _, t, _ in items], dtype=torch.int64)
        numbers = torch.tensor([n for _, _, n in items], dtype=torch.int64)
        return Batch(Tokens(ids, mask, labels, self._options(encoded)), targets, numbers)

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
        tokens = ids.tolist()
        if self.end in tokens:
            tokens = tokens[: tokens.index(self.end)]
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text.strip()

    def _whole(self, text: Text) -> tuple[Tensor, Tensor]:
        """Tokens `(N,)` of prompt and answer, and which of them are learned to be said."""
        whole, spans = self._rendered(text)
        tokens, offsets = self._tokens(whole, text.prompt)
        said = [any(start < stop and stop > a and start < b for a, b in spans) for start, stop in offsets]
        if self.end is not None and (not tokens or tokens[-1] != self.end):
            tokens, said = [*tokens, self.end], [*said, True]
        elif tokens:
            said[-1] = True  # the end that the tokenizer or the chat form puts there
        if said:
            said[0] = False  # nothing stands before it that could say it
        return torch.tensor(tokens, dtype=torch.int64), torch.tensor(said, dtype=torch.bool)

    def _answer(self, text: Text) -> Tensor:
        ids, answer = self._whole(text)
        first = int(answer.nonzero()[0])
        return ids[first:]

    def _rendered(self, text: Text) -> tuple[str, list[tuple[int, int]]]:
        """The whole text, and from which to which character what is learned to be said goes."""
        if not self._is_chat(text.prompt):
            prompt = self._prompt(text.prompt)
            gap = "" if prompt.endswith("\n") or not prompt else " "
            whole = prompt + gap + text.answer.strip(" ")
            return whole, [(len(prompt), len(whole))]
        messages = [*_messages(text.prompt), (ASSISTANT, text.answer)]
        whole = self._chat(messages, asking=False).rstrip()
        spans = []
        for turn, (role, _) in enumerate(messages):
            if role != ASSISTANT:
                continue
            before, after = self._chat(messages[:turn], asking=True), self._chat(messages[: turn + 1], asking=False)
            # Some forms drop what earlier answers held (their reasoning): those are not learned then.
            if whole.startswith(before) and whole.startswith(after.rstrip()):
                spans.append((len(before), len(after.rstrip())))
        if not spans or spans[-1][1] != len(whole):
            at = whole.rfind(text.answer.strip())
            if at < 0:
                raise DataError("the chat template leaves the answer out: another template or tokenizer is needed")
            spans.append((at, len(whole)))
        return whole, spans

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
        except TemplateError as error:
            raise DataError(f"the model's chat template refuses the messages: {error}") from error
        return text

    def _tokens(self, text: str, prompt: str | Messages) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens, and from which to which character each goes; a chat form brings its special tokens itself."""
        found = self.tokenizer(
            text, add_special_tokens=not self._is_chat(prompt), return_offsets_mapping=True, verbose=False
        )
        return list(found["input_ids"]), [(int(a), int(b)) for a, b in found["offset_mapping"]]

    def _opening(self, text: Text) -> bool:
        """Whether the first token is one that the tokenizer opens every text with."""
        return not self._is_chat(text.prompt) and self.tokenizer.bos_token_id is not None


def _without(ids: Tensor, count: int, opening: bool) -> Tensor:
    """Positions that are left when `count` tokens are cut off on the left, behind the opening one."""
    first = 1 if opening and len(ids) > count + 1 else 0
    return torch.cat([torch.arange(first), torch.arange(first + count, len(ids))])


def _messages(prompt: str | Messages) -> list[tuple[str, str]]:
    return [("user", prompt)] if isinstance(prompt, str) else list(prompt)

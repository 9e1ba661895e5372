"""The texts of a task. Each text is encoded into tokens once."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from perpetune.data.examples import Purpose, TableSet
from perpetune.data.texts.tables import Text, TextTable
from perpetune.errors import DataError
from perpetune.tasks import Batch, Item

if TYPE_CHECKING:
    from perpetune.data.texts.view import TextView


@dataclass(frozen=True)
class Encoded:
    """One example as tokens.

    Attributes:
        ids: int64 `(N,)`.
        answer: bool `(N,)`, true at the tokens that are learned to be said; None for a question.
        options: the tokens of each option, int64, as they follow the question, with the end.
        cut: how many tokens of the prompt were cut off on its left, for the model takes no more.
        dropped: how many earlier answers of a chat are not learned, for the chat form writes them otherwise in the
            middle of a chat than at its end.
        lost: what the chat form leaves out of the messages.
        around: white space that a generated answer begins and ends with, and which is not its own: what stands between
            prompt and answer, or what the chat form puts there.
    """

    ids: Tensor
    answer: Tensor | None = None
    options: tuple[Tensor, ...] = ()
    cut: int = 0
    dropped: int = 0
    lost: tuple[str, ...] = ()
    around: tuple[str, str] = ("", "")

    def __len__(self) -> int:
        return len(self.ids)

    def own(self, text: str) -> str:
        """A generated text without the white space that is not its own."""
        return text.removeprefix(self.around[0]).removesuffix(self.around[1])


@dataclass(frozen=True)
class _Kept:
    """An example as tokens in a small form. It is kept, because encoding again takes as long as learning on a GPU.

    Attributes:
        tokens: int32 `(N,)`; where an answer is learned, `~token`.
        asks: whether it is a question, without an answer.
        options, cut, dropped, lost: as in `Encoded`.
    """

    tokens: Tensor
    asks: bool
    options: tuple[Tensor, ...]
    cut: int
    dropped: int
    lost: tuple[str, ...]

    def encoded(self) -> Encoded:
        """The example in the form that a model takes."""
        said = self.tokens < 0
        ids = torch.where(said, ~self.tokens, self.tokens).long()
        return Encoded(ids, None if self.asks else said, self.options, self.cut, self.dropped, self.lost)


def _kept(found: Encoded, options: dict[tuple[int, ...], Tensor]) -> _Kept:
    """`found`, with the same tensors for the same options, which all questions of a task may have."""
    ids, asks = found.ids.int(), found.answer is None
    tokens = ids if found.answer is None else torch.where(found.answer, ~ids, ids)
    shared = tuple(options.setdefault(tuple(option.tolist()), option) for option in found.options)
    return _Kept(tokens, asks, shared, found.cut, found.dropped, found.lost)


class TextSet(TableSet):
    """Texts of a task, with their answers; test examples are questions without answers.

    Args:
        view: turns texts into tokens.
        purpose: what the examples are for; `test` makes questions.
    """

    table: TextTable
    deterministic = True  # the seed of `load` changes nothing

    def __init__(self, table: TextTable, rows: Sequence[int], classes: Sequence[str], view: TextView, purpose: Purpose):
        super().__init__(table, rows, classes)
        self.view = view
        self.purpose: Purpose = purpose
        self._found: dict[int, _Kept] = {}  # by row of the table
        self._options: dict[tuple[int, ...], Tensor] = {}

    def collate(self, items: Sequence[Item]) -> Batch:
        return self.view.collate(items)

    @cached_property
    def lengths(self) -> list[int]:  # type: ignore[override]  # made at its first use
        """The number of tokens of each example."""
        return [len(self._tokens(row).tokens) for row in self.rows]

    @cached_property
    def weights(self) -> list[int] | None:  # type: ignore[override]
        """The number of tokens of each answer, with its end; None for questions."""
        return None if self.purpose == "test" else [int((self._tokens(row).tokens < 0).sum()) for row in self.rows]

    def questions(self) -> TextSet:
        """The same examples without their answers, as the model gets them at prediction."""
        if self.purpose == "test":
            return self
        return TextSet(self.table, self.rows, self._classes, self.view, "test")

    def text(self, index: int) -> Text:
        """The original text of example `index`."""
        return self.table.text(self.rows[index])

    def load(self, index: int, seed: int | None) -> Encoded:
        """The prompt and the answer as tokens, or for the test the prompt only. The seed changes nothing."""
        return self._tokens(self.rows[index]).encoded()

    def identity(self) -> str | None:
        return self._digest if type(self) is TextSet else None

    @cached_property
    def _digest(self) -> str:
        """A digest of the tokens of all examples and of their options, with the token that pads them."""
        digest = hashlib.sha256(f"{self.purpose} {self.view.pad}".encode())
        for row in self.rows:
            found = self._tokens(row)
            for tensor in (found.tokens, *found.options):
                digest.update(f" {tensor.dtype} {len(tensor)} ".encode())
                digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def look(self, row: int, depth: Literal["decode", "header"]) -> None:
        super().look(row, depth)
        if depth == "decode":
            self._tokens(row)

    def notes(self) -> list[str]:
        known = [kept for row in self.rows if (kept := self._found.get(row)) is not None]
        cuts = [kept.cut for kept in known if kept.cut]
        dropped = [kept.dropped for kept in known if kept.dropped]
        notes = []
        if len(known) < len(self.rows):
            notes.append(
                f"it is not known how many {self.purpose} prompts are cut, because stream.check has not encoded "
                f"{len(self.rows) - len(known)} of {len(self.rows)}"
            )
        if cuts:
            notes.append(
                self.view.cut_note(cuts, len(self.rows), f"{self.purpose} prompts", asked=self.purpose == "test")
            )
        if dropped:
            notes.append(
                f"{sum(dropped)} earlier answers in {len(dropped)} of {len(self.rows)} {self.purpose} chats are not "
                "learned, because the model's chat template writes them in another form than at the end of a chat"
            )
        lost = Counter(what for kept in known for what in kept.lost)
        notes += [
            f"in {count} of {len(self.rows)} {self.purpose} chats the model's chat template leaves out {what}"
            for what, count in lost.items()
        ]
        return notes

    def _of(self, rows: Sequence[int], classes: Sequence[str]) -> TextSet:
        others = TextSet(self.table, rows, classes, self.view, self.purpose)
        others._found, others._options = self._found, self._options
        return others

    def _encoded(self, row: int) -> Encoded:
        text = self.table.text(row)
        try:
            return self.view.question(text) if self.purpose == "test" else self.view.sequence(text)
        except DataError as error:
            raise DataError(f"{self.table.name(row)}: {error}") from error

    def _tokens(self, row: int) -> _Kept:
        if row not in self._found:
            self._found[row] = _kept(self._encoded(row), self._options)
        return self._found[row]

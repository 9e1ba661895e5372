"""The view of texts with pictures: it puts the tokens of pictures into those of texts, and the pixels beside them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perpetune.data.examples import Augment, Purpose, Question
from perpetune.data.names import printable, several
from perpetune.data.pictured.marks import (
    IMAGES,
    MARK,
    Mark,
    count_marks,
    pictures_of,
    shown_in,
    with_marks,
    without_parts,
)
from perpetune.data.pictured.table import PicturedSet, PicturedTable, Shown, number_of
from perpetune.data.pictures.read import as_rgb, is_picture, read_picture
from perpetune.data.pictures.view import PictureView
from perpetune.data.sources import Table
from perpetune.data.texts.chats import Message, Messages, as_dict, is_empty, messages_in
from perpetune.data.texts.examples import Encoded
from perpetune.data.texts.layouts import layout_of
from perpetune.data.texts.prompts import prompt_in, read_prompts
from perpetune.data.texts.records import SUFFIXES, read_records
from perpetune.data.texts.tables import Text
from perpetune.data.texts.templates import render
from perpetune.data.texts.view import TextView, _Token
from perpetune.errors import DataError, UsageError
from perpetune.tasks import Batch, Inputs, Item

PROBE = "perpetune"  # a word that shows whether a template writes the text of a message


class PicturedView(TextView):
    """Turns texts with pictures into tokens and pixels.

    A mark `<image>` stands in a prompt where a picture is. In the chat form or the plain form of the model it becomes
    the tokens of a picture. What is longer than the model takes loses words of the prompt, from its left, and never
    a picture.

    Args:
        tokenizer: a fast tokenizer of transformers. It makes one token of `mark.text`.
        picture: the pixels that the model expects.
        mark: how the model writes a picture.

    The other arguments are those of `TextView`.
    """

    takes = "pictured"

    def __init__(
        self,
        tokenizer: Any,
        *,
        picture: PictureView,
        mark: Mark,
        max_length: int,
        chat: bool = False,
        rows: int | None = None,
    ):
        super().__init__(tokenizer, max_length=max_length, chat=chat, rows=rows)
        self.picture, self.mark, self.placeholder, self.opened = picture, mark, mark.token, mark.first

    @property
    def extent(self) -> str:
        return f"{super().extent}, {self.picture.extent}"

    def constants(self) -> dict[str, Tensor]:
        return self.picture.constants()

    def sequence(self, text: Text) -> Encoded:
        self._check_marks(text)
        return self._counted(super().sequence(text), text)

    def question(self, text: Text, *, choose: bool | None = None) -> Encoded:
        self._check_marks(text)
        return self._counted(super().question(text, choose=choose), text)

    def collate(self, items: Sequence[Item]) -> Batch:
        batch = super().collate([(shown.encoded, target, number) for shown, target, number in items])
        most = max(len(shown.pictures) for shown, _, _ in items)
        if not most:
            return batch
        side = self.picture.size
        pixels = torch.zeros(len(items), most, 3, side, side, dtype=torch.uint8)
        shown_ = torch.zeros(len(items), most, dtype=torch.int64)
        for row, (shown, _, _) in enumerate(items):
            for k, picture in enumerate(shown.pictures):
                pixels[row, k], shown_[row, k] = picture, number_of(picture)
        inputs = Inputs(said=batch.inputs.said, **batch.inputs.tensors, pixels=pixels, shown=shown_)
        return Batch(inputs, batch.targets, batch.numbers)

    def examples(
        self, table: Table, rows: Sequence[int], classes: Sequence[str], purpose: Purpose, augment: Augment = "none"
    ) -> PicturedSet:
        if not isinstance(table, PicturedTable):
            raise self._refused(table)
        return PicturedSet(table, rows, classes, self, purpose)

    def typed(self, inputs: Sequence[str]) -> list[Any]:
        """Pictures and prompts in turn: a prompt is about the pictures that stand before it, as the next one is if no
        picture comes between them."""
        asked: list[Any] = []
        pictures: list[str] = []
        open_ = False  # whether a further picture belongs to those before it
        for given in inputs:
            if is_picture(given) and (os.path.lexists(given) or len(given.split()) == 1):
                if not os.path.isfile(given):
                    raise DataError(f"{printable(given)}: no such file")
                pictures = [*pictures, given] if open_ else [given]
                open_ = True
                continue
            open_ = False
            if given.lower().endswith(SUFFIXES) and os.path.isfile(given):
                asked += _asked_in(given, pictures)
            else:
                asked += [{"prompt": prompt, "images": list(pictures)} for prompt in read_prompts([given])]
        if open_ or not asked:
            about = f" about {', '.join(map(printable, pictures))}" if pictures else ""
            raise UsageError(f"there is no question{about}: give the picture, then the question")
        return asked

    def ask(
        self,
        given: Any,
        *,
        first: int = 0,
        options: Sequence[str] = (),
        choose: bool | None = None,
        unreadable: list[str] | None = None,
    ) -> list[Question]:
        """Turn prompts into questions. A prompt is a text or messages, or `{"prompt" or "messages", "images"}`; a
        picture is a path or a PIL image. The parts of messages may name their pictures."""
        asked = []
        for number, one in enumerate(given, first + 1):
            try:
                prompt, pictures = _asked_of(one)
                text = Text(with_marks(prompt, len(pictures)), options=tuple(options), pictures=len(pictures))
                encoded = self.question(text, choose=choose)
                pixels = tuple(self._pixels(picture) for picture in pictures)
            except DataError as error:
                if unreadable is None:
                    raise DataError(f"prompt {number}: {error}") from error
                unreadable.append(f"prompt {number}: {error}")
                continue
            item = Shown(encoded, pixels)
            asked.append(Question(text.prompt, item, text.options, encoded.cut, encoded.lost, encoded.own))
        return asked

    def _pixels(self, picture: Any) -> Tensor:
        if isinstance(picture, str | Path):
            return self.picture.load(picture)
        if isinstance(picture, bytes):
            return self.picture(read_picture(picture, "its picture"))
        if hasattr(picture, "getexif"):  # PIL's
            return self.picture(as_rgb(picture))
        raise DataError(f"a picture is {type(picture).__name__}; expected a path or a PIL image")

    def _check_marks(self, text: Text) -> None:
        marks = count_marks(text.prompt)
        if marks != text.pictures:
            raise DataError(f"it has {text.pictures} pictures and {marks} marks {MARK}; one for each is expected")

    def _counted(self, encoded: Encoded, text: Text) -> Encoded:
        """The tokens, once it is sure that they have the place that its pictures need."""
        places = int((encoded.ids == self.mark.token).sum())
        if places != text.pictures * self.mark.count:
            raise DataError(
                f"the model's form has {places} tokens for pictures, and {text.pictures} pictures need "
                f"{text.pictures * self.mark.count}: the text holds the model's own mark {self.mark.text}, or its chat "
                "template leaves pictures out"
            )
        return encoded

    # -- forms ----------------------------------------------------------------------------------------

    def _prompt(self, prompt: str | Messages) -> str:
        if self._is_chat(prompt):
            return super()._prompt(prompt)
        text = str(prompt)
        if not self.mark.first:
            return text.replace(MARK, self.mark.plain)
        parts = [part.strip("\n") for part in text.split(MARK)]
        begin = self.tokenizer.bos_token or ""
        return self.mark.plain * (len(parts) - 1) + begin + "".join(parts).removesuffix("\n") + "\n"

    def _spoken(self, message: Message) -> dict[str, Any]:
        told = as_dict(message)
        if not self._takes_parts:
            return {**told, "content": told["content"].replace(MARK, self.mark.plain)}
        parts: list[dict[str, str]] = []
        for number, text in enumerate(told["content"].split(MARK)):
            parts += [{"type": "image"}] if number else []
            parts += [{"type": "text", "text": text}] if text else []
        return {**told, "content": parts or [{"type": "text", "text": ""}]}

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the chat template takes messages of parts, as those of vision-language models do."""
        probe = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROBE}]}]
        try:
            told = render(self.tokenizer, probe, asking=True, today=self.today)
        except DataError:
            return False
        return self.mark.text in told and PROBE in told and "'type'" not in told

    def _tokens(self, text: str, prompt: str | Messages) -> list[_Token]:
        found: list[_Token] = []
        mark = self.mark
        whole = (*mark.before, *[mark.token] * mark.count, *mark.after)
        for token in super()._tokens(text, prompt):
            found += [replace(token, id=i) for i in whole] if token.id == mark.token else [token]
        return found

    def _without(self, ids: Tensor, count: int, opening: int, stop: int) -> Tensor:
        kept = torch.isin(ids, torch.tensor(sorted(self.mark.kept)))
        if not bool(kept.any()):
            return super()._without(ids, count, opening, stop)
        words = (~kept[:stop]).nonzero()[:, 0]
        words = words[words >= opening]
        if len(words) < count + 1:  # a word at least stays of the question
            pictures = int((ids == self.mark.token).sum()) // self.mark.count
            raise DataError(
                f"its {pictures} pictures need {pictures * self.mark.count} tokens, and prompt and answer together can "
                f"have only {self.max_length}: raise backbone.max_length, or give fewer pictures"
            )
        left = torch.ones(len(ids), dtype=torch.bool)
        left[words[:count]] = False
        return left.nonzero()[:, 0]


def _asked_in(path: str, before: Sequence[str]) -> list[dict[str, Any]]:
    """The questions in a file of rows with `prompt` or `messages`, and `image` or `images`.

    Args:
        before: the pictures that stand before the file; a row without its own is about them.
    """
    asked, left = [], dict[str, None]()
    for record in read_records(path):
        try:
            if record.fault:
                raise DataError(record.fault)
            value, pictures = shown_in(record.value, IMAGES, os.path.dirname(path))
            layout = layout_of(value.keys())
            prompt = prompt_in(layout.prompt_of(value))
        except DataError as error:
            raise DataError(f"{record.at}: {error}") from error
        used = {*layout.used(value), *IMAGES}
        left |= {column: None for column, cell in value.items() if column not in used and not is_empty(cell)}
        asked.append({"prompt": prompt, "images": list(pictures) or list(before)})
    if left:
        columns = several([f"'{printable(column)}'" for column in left], 20)
        warnings.warn(f"columns of the prompts' files that are not used: {columns}", stacklevel=4)
    return asked


def _asked_of(given: Any) -> tuple[str | Messages, list[Any]]:
    """The prompt and the pictures of what somebody asks.

    Raises:
        DataError: it has a form that is not known.
    """
    named: list[Any] = []
    if isinstance(given, Mapping):
        if unknown := sorted(set(given) - {"prompt", "messages", "image", "images"}):
            raise DataError(f"a question has {', '.join(map(repr, unknown))}; expected prompt or messages, and images")
        images = given.get("images", given.get("image"))
        listed = images if isinstance(images, list | tuple) else [] if images is None else [images]
        given = given.get("messages") if given.get("prompt") is None else given["prompt"]
    else:
        listed = []
    if isinstance(given, list | tuple) and given and all(isinstance(message, Mapping) for message in given):
        value, named = without_parts({"messages": [dict(message) for message in given]})
        prompt: str | Messages = prompt_in(messages_in(value["messages"]))
    else:
        prompt = prompt_in(given)
    return prompt, pictures_of(list(listed), named)

"""The text side of a dual encoder: strings in, features of the space that pictures and texts share out."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from perpetune.data.names import several
from perpetune.errors import UsageError
from perpetune.models.towers import towers
from perpetune.pets.base import PET, Slot, counting, outermost, slots
from perpetune.pets.context import MARK, Context, placing
from perpetune.tasks import Inputs

Tokenise = Callable[[Sequence[str]], tuple[list[list[int]], list[bool]]]
"""From texts to the tokens of each, without padding, and whether its end was cut off."""
Encode = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""From `(net, ids (n, N), mask (n, N))` to projected features `(n, D)`; the mask is true at tokens."""

PROBES = ("perpetune asks for a photo of a cat.", "Perpetune ASKS, of: naïve ёлки 猫 42!")
"""Texts that nobody else asks for. They show how a tokenizer works, and whether a tower can read its tokens."""


def wide(values: Tensor) -> Tensor:
    """`values` in float32, or in a wider type that they have already."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


class TextSide:
    """The part of a `Backbone` that reads texts. It owns no parameters: the tower belongs to the backbone's net.

    A copy of the backbone has a text side of its own, and a copy of anything else (a head) shares this one.

    Args:
        net: the net of the backbone, with both towers, `logit_scale` and possibly `logit_bias`.
        spec: the name of the backbone, for messages.
        dim: `D`, the width of the features.
        tokenise: turns texts into at most `length` tokens each.
        encode: computes the features.
        length: the most tokens of a text.
        rows: the number of tokens that the tower has a row for.
        pad: the token that fills up a text. Texts are padded on the right.
        fixed: whether every text is padded to `length`: the tower reads the last position, or has no mask at padding.
        masked: whether the tower ignores padding. If not, padding is part of every text.
        vocabulary: the number of each token, for the fingerprint.

    Raises:
        UsageError: the tokenizer does not fit the tower.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        spec: str,
        dim: int,
        tokenise: Tokenise,
        encode: Encode,
        length: int,
        rows: int,
        pad: int,
        fixed: bool = False,
        masked: bool = True,
        vocabulary: Mapping[str, int],
    ):
        self.net, self.spec, self.dim = net, spec, dim
        self.length, self.rows, self.pad, self.fixed, self.masked = length, rows, pad, fixed, masked
        self._tokenise, self._encode, self._vocabulary = tokenise, encode, vocabulary
        self._cut = set(PROBES)  # texts about which it was said that their end is cut off
        self._ends: tuple[int, int, int] | None = None
        self._paths: tuple[tuple[str, ...], str | None] | None = None
        self._tokens(PROBES)

    def inputs(self, strings: Sequence[str], device: torch.device | None = None) -> Inputs:
        """The tokens `ids` of texts, `(n, N)`, padded on the right, and their `mask`, true where a position counts.

        If a text begins with `[context]`, `context` is true at the positions of the vectors of the pet `context`. If a
        text is longer than the tower takes, its end is cut off, with a warning that names it once.

        Args:
            device: where the tensors are made; None is the device of the net.

        Raises:
            UsageError: a text is empty, has a token that the tower does not know, or `[context]` at a wrong place.
        """
        return self._padded(self._tokens(strings), self._marked(strings), device)

    def encode(self, inputs: Inputs) -> Tensor:
        """Features `(n, D)`, float32 or wider, projected, not normalised. Gradients flow to pets in the text tower."""
        mask = inputs.mask
        counts = mask
        if self.fixed:  # the last position is read even where it is padding
            counts = torch.cat([mask[:, :-1], torch.ones_like(mask[:, -1:])], dim=1)
        with counting(counts), placing(inputs.tensors.get("context")):
            return wide(self._encode(self.net, inputs.ids, mask))

    def of(self, strings: Sequence[str], batch: int = 64) -> Tensor:
        """Features `(n, D)` of texts, in their order, computed `batch` at a time. Texts of one length go together."""
        tokens, marked = self._tokens(strings), self._marked(strings)
        order = sorted(range(len(tokens)), key=lambda number: len(tokens[number]))
        parts = [
            self.encode(self._padded([tokens[n] for n in some], [marked[n] for n in some], None))
            for some in (order[start : start + batch] for start in range(0, len(order), batch))
        ]
        if not parts:
            return torch.zeros(0, self.dim, device=self.device)
        back = torch.empty(len(order), dtype=torch.int64)
        back[order] = torch.arange(len(order))
        return torch.cat(parts)[back.to(parts[0].device)]

    @property
    def scale(self) -> Tensor:
        """`e^τ`, a number: the factor of the pretrained model on the cosine of a picture and a text."""
        return self._number("logit_scale").exp()

    @property
    def bias(self) -> Tensor | None:
        """The number that SigLIP adds to this product; None in models without it."""
        return None if getattr(self.net, "logit_bias", None) is None else self._number("logit_bias")

    @property
    def device(self) -> torch.device:
        return self._number("logit_scale").device

    def _number(self, name: str) -> Tensor:
        value: Tensor = getattr(self.net, name)
        return wide(value.detach()).reshape(())

    def state(self) -> tuple[Any, ...]:
        """What pets do to texts now: where they are in force, and how often their values have changed.

        Empty if none is in force. Features of the same texts are the same as long as this is the same.
        """
        found: list[Any] = []
        for start in self._places()[0]:
            for path, slot in slots(outermost(self.net, start)):
                if slot.active is None:
                    continue
                names = [slot.active] if isinstance(slot.active, str) else [str(slot.active)]
                pets = [slot.pets[name] for name in names if name in slot.pets] or list(slot.pets.values())
                tensors = [t for pet in pets for t in (*pet.parameters(), *pet.buffers())]
                found.append((start, path, *names, *((id(t), t._version) for t in tensors)))
        return tuple(found)

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths in the net of what reads texts alone; one empty path if they are not known."""
        return self._places()[0]

    def _places(self) -> tuple[tuple[str, ...], str | None]:
        """The paths of what reads texts in the net, and that of its table of tokens, if it is known.

        They are looked up once, because every prediction asks, and no pet changes them.
        """
        if self._paths is None:
            tower = towers(self.net).get("text")
            part = None if tower is None else tower.part("embed")
            self._paths = ("",) if tower is None else tower.paths, None if part is None else part[0]
        return self._paths

    @property
    def contexts(self) -> list[Context]:
        """The contexts of all sets of pets, in force or not."""
        path = self._places()[1]
        slot = None if path is None else outermost(self.net, path)
        found: list[PET] = [slot.pet(name) for name in slot.pets] if isinstance(slot, Slot) else []
        return [pet for pet in found if isinstance(pet, Context)]

    @property
    def by_task(self) -> bool:
        """Whether each task has a context of its own."""
        return any(context.of_task for context in self.contexts)

    def words(self, text: str) -> list[int]:
        """The tokens of some words, without those that begin and end a text."""
        before, behind, _ = self._around()
        (ids,) = self._tokens([text])
        return ids[before : len(ids) - behind]

    def _around(self) -> tuple[int, int, int]:
        """How many tokens begin and end every text, and a token of an ordinary word."""
        if self._ends is None:
            nothing, word = self._tokenise(["", "x"])[0]
            before = next((n for n, (a, b) in enumerate(zip(nothing, word, strict=False)) if a != b), len(nothing))
            behind = len(nothing) - before
            self._ends = before, behind, word[len(word) - behind - 1]
        return self._ends

    @staticmethod
    def _marked(strings: Sequence[str]) -> list[bool]:
        """For each text whether it begins with `[context]`."""
        return [text.startswith(MARK) for text in strings]

    def _behind_context(self, ids: list[int], tokens: Sequence[int]) -> tuple[list[int], bool]:
        """The tokens of a text with those of a context before its words, and whether its end was cut off."""
        before, behind, _ = self._around()
        room = self.length - len(tokens)
        if room <= before + behind:
            raise UsageError(f"context: {len(tokens)} vectors leave no room; a text has {self.length} tokens")
        end = ids[len(ids) - behind :]
        kept = ids if len(ids) <= room else [*ids[: room - behind], *end]
        return [*kept[:before], *tokens, *kept[before:]], len(ids) > room

    def _context_tokens(self, strings: Sequence[str]) -> list[int] | None:
        """The tokens in place of `[context]`; the pet puts its vectors there. None if no text has it.

        Raises:
            UsageError: there is no context, or `[context]` is not at the beginning.
        """
        wrong = next((text for text in strings if text.rfind(MARK) > 0), None)
        if wrong is not None:
            raise UsageError(f"text {wrong!r}: {MARK} has to stand once, at the beginning")
        if not any(self._marked(strings)):
            return None
        if not self.contexts:
            raise UsageError(f"a text begins with {MARK}, and there is no pet that makes it: add pet: context")
        context = self.contexts[0]
        return self.words(context.words) if context.words else [self._around()[2]] * context.length

    def fingerprint(self) -> str:
        """SHA-256 over how texts become tokens. The weights of the tower are in the fingerprint of the backbone."""
        made = [self.length, self.pad, self.fixed, self.masked, self._tokenise(PROBES)[0], dict(self._vocabulary)]
        return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()

    def _tokens(self, strings: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, without padding."""
        placed = self._context_tokens(strings)
        bare = [text.removeprefix(MARK) for text in strings]
        for number, text in enumerate(bare):
            if not text.strip():
                raise UsageError(f"text {number} is empty: every class and every question needs a name or a sentence")
        if not strings:
            return []
        tokens, cut = self._tokenise(bare)
        for number, text in enumerate(strings) if placed else ():
            if placed and text.startswith(MARK):
                tokens[number], more = self._behind_context(tokens[number], placed)
                cut[number] = cut[number] or more
        for text, ids in zip(strings, tokens, strict=True):
            if ids and max(ids) >= self.rows:
                raise UsageError(
                    f"{self.spec}: its tokenizer turns {text!r} into token {max(ids)}, and its text tower knows "
                    f"{self.rows}: they do not belong together"
                )
        new = [text for text, is_cut in zip(strings, cut, strict=True) if is_cut and text not in self._cut]
        if new:
            self._cut.update(new)
            names = several([text if len(text) <= 60 else f"{text[:60]}…" for text in new])
            warnings.warn(
                f"{self.spec}: the text tower takes {self.length} tokens; longer texts lose their end: {names}",
                stacklevel=4,
            )
        return tokens

    def _padded(self, tokens: Sequence[list[int]], marked: Sequence[bool], device: torch.device | None) -> Inputs:
        width = self.length if self.fixed else max((len(ids) for ids in tokens), default=1)
        ids = torch.tensor([[*one, *[self.pad] * (width - len(one))] for one in tokens], dtype=torch.int64)
        ids = ids.reshape(len(tokens), width)
        lengths = torch.tensor([len(one) for one in tokens], dtype=torch.int64)
        mask = torch.arange(width) < (lengths if self.masked else torch.full_like(lengths, width))[:, None]
        device = device or self.device
        where = None
        if any(marked):
            start, place = self._around()[0], torch.arange(width)
            inside = (place >= start) & (place < start + self.contexts[0].length)
            where = inside & torch.tensor(marked)[:, None]
        return Inputs(ids=ids, mask=mask, context=where).to(device)

    def __deepcopy__(self, memo: dict[int, Any]) -> TextSide:
        """A text side for the copy of the net, if the net is copied too; else this one."""
        if id(self.net) not in memo:
            return self
        new = object.__new__(TextSide)
        new.__dict__.update(self.__dict__)
        new.net, new._cut = memo[id(self.net)], set(self._cut)
        return new

"""The pet `context`: trained vectors in place of the first words of a text."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from perpetune.errors import UsageError
from perpetune.numerics.handover import sent
from perpetune.numerics.projection import Site
from perpetune.pets.base import PET, Conditions, Place
from perpetune.pets.choice import Choice

MARK = "[context]"
"""What a template has at its beginning, where the vectors stand."""

_placed: ContextVar[Tensor | None] = ContextVar("_placed", default=None)


@contextlib.contextmanager
def placing(where: Tensor | None) -> Iterator[None]:
    """Inside this context a text tower reads texts that have their context at the true positions of `where (n, N)`.

    None means that none of the texts has one.
    """
    token = _placed.set(where)
    try:
        yield
    finally:
        _placed.reset(token)


class Context(PET):
    """Trained vectors `V (length, d)` in place of `[context]`, with which a template begins.

    CoOp, Zhou et al. 2022, arXiv:2109.01134. They stand behind the token that begins a text, if the tokenizer gives
    one. Texts without `[context]` are read as ever. The vectors are float32 whatever the type of the net.

    With `share: task` each task has vectors of its own, as in CLIP-PGP and S-Prompts: the head `text` keeps the texts
    that a task has made of its classes, and the next task starts from new vectors.

    Args:
        length: the number of vectors; None is 16, or the number of tokens of `init`.
        init: words whose tokens are the first values, such as `a photo of a`. None draws them.
        std: the standard deviation of drawn values.
        share: `all` tasks train the same vectors, or each `task` has its own.

    Raises:
        UsageError: an option is out of range, or the place is not the table of tokens of a text tower.
    """

    default_at: ClassVar[tuple[str, ...]] = ("text.embed",)

    def __init__(
        self,
        place: Place,
        generator: torch.Generator,
        *,
        length: int | None = None,
        init: str | None = None,
        std: float = 0.02,
        share: Literal["task", "all"] = "all",
    ):
        super().__init__()
        if place.roles != ("embed",) or place.words is None:
            where = f"{place.path} ({', '.join(place.roles)})"
            raise UsageError(
                f"context: {where} is not the table of tokens of a dual encoder's text tower: set at: text.embed"
            )
        words = None if init is None else list(place.words(init))
        if words is not None and not words:
            raise UsageError("context: init has no words: leave it out, or write some, such as `a photo of a`")
        given = len(words) if words is not None else 16
        if words is not None and length is not None and length != given:
            raise UsageError(f"context: init {init!r} has {given} tokens, and length is {length}: leave length out")
        self.length = given if length is None else length
        if self.length < 1:
            raise UsageError(f"context: length is {self.length}; at least 1 is expected")
        if not (std >= 0 and math.isfinite(std)):
            raise UsageError(f"context: std is {std}; a number of at least 0 is expected")
        self.words, self.of_task = init, share == "task"
        values = torch.randn(self.length, place.d_in, generator=generator) * std
        if words is not None:
            table = next(place.module.parameters())
            with torch.no_grad():
                values = place.module(torch.tensor(words, device=table.device)).float().cpu()
        self.vectors = nn.Parameter(values.clone())

    def forward(self, base: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = base(x, *args, **kwargs)  # (n, N, d)
        where = _placed.get()
        if where is None:
            return y
        places = where.cpu().flatten().nonzero().flatten()  # `where` is on the CPU, so the device is not asked
        rows = self.vectors.to(y.dtype).expand(len(places) // self.length, -1, -1)
        filled: Tensor = y.flatten(0, 1).index_copy(0, sent(places, y.device), rows.flatten(0, 1)).view_as(y)
        return filled

    def blend(self, members: Sequence[PET], choice: Choice) -> dict[str, Tensor]:
        """A choice may be in force while pictures are read; the texts of classes belong to no example."""
        raise UsageError("a context cannot be chosen for each example, because a class's text has no example")

    def sites(self, conditions: Conditions = "exact") -> list[Site]:
        """No linear condition keeps a text whose first vectors go through all blocks. With `share: task` none is
        needed, because the texts of earlier tasks are kept."""
        if self.of_task:
            return []
        raise UsageError(
            "context: with share: all there is no linear condition that keeps the texts of old classes; use share: "
            "task, or leave protect out"
        )

    def free(self, conditions: Conditions = "exact") -> list[nn.Parameter]:
        return [self.vectors] if self.of_task else []

    def extra_repr(self) -> str:
        return f"length={self.length}, d={self.vectors.shape[1]}, share={'task' if self.of_task else 'all'}"

"""Whether an export answers as the state does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perpetune.data.names import several
from perpetune.data.pictures.digits import DigitsSource
from perpetune.data.pictures.view import PictureView
from perpetune.errors import DataError, PerpetuneError, UsageError
from perpetune.methods.base import Method
from perpetune.tasks import Inputs

MOST = 500
"""The most pictures that an export is checked with."""
TOLERANCE = 1e-3
"""The largest difference of a score that is allowed."""
SIZES = (1, 7, 32)
"""The sizes of the batches, in turn, so that an export that takes one size alone does not pass."""


@dataclass(frozen=True)
class Agreement:
    """How an export answers beside the state.

    Attributes:
        pictures: how many were asked.
        difference: the largest difference of a score.
        others: how many pictures get another class although the scores of the two best differ by more than
            `TOLERANCE`.
    """

    pictures: int
    difference: float
    others: int

    @property
    def holds(self) -> bool:
        return self.difference <= TOLERANCE and not self.others

    def __str__(self) -> str:
        return (
            f"On {self.pictures} pictures the largest difference between a score of the export and of the state is "
            f"{self.difference:.2g}, and {self.others} pictures get another class"
        )


def pictures_for(view: PictureView, given: Sequence[str | Path] | None) -> Tensor:
    """Pixels, uint8 `(N, 3, S, S)`, of at most `MOST` pictures, evenly spaced over all that are given.

    Args:
        given: files of pictures, or folders of them; None takes scikit-learn's handwritten digits.

    Raises:
        UsageError: there is no picture.
        DataError: a picture cannot be read.
    """
    if given is None:
        table = DigitsSource().train()
        return torch.stack([view(table.open(row)) for row in _spread(len(table.labels))])
    files, unreadable = view.typed([str(one) for one in given]), list[str]()
    found = [q.item for q in view.ask([files[n] for n in _spread(len(files))], unreadable=unreadable)]
    if unreadable:
        raise DataError(f"{len(unreadable)} pictures to check the export with cannot be read: {several(unreadable)}")
    if not found:
        raise UsageError("--images: there is no picture to check the export with")
    return torch.stack(found)


def _spread(count: int) -> list[int]:
    few = min(count, MOST)
    return [n * count // few for n in range(few)]


@torch.no_grad()
def compared(method: Method, pictures: Tensor, theirs: Callable[[Tensor], Any], *, shift: bool = False) -> Agreement:
    """Ask the method and the export the same pictures.

    Args:
        pictures: uint8 `(N, 3, S, S)`.
        theirs: the export's scores `(B, C)` of a batch of them.
        shift: the export's scores may lack a number that all classes share.
    """
    difference, others = 0.0, 0
    for batch in _batches(pictures):
        ours = method.predict(Inputs(pixels=batch)).double()
        other = torch.as_tensor(theirs(batch)).double()
        seen = torch.isfinite(ours)
        if other.shape != ours.shape or not torch.equal(torch.isfinite(other), seen):
            return Agreement(len(pictures), float("inf"), len(pictures))
        gap = torch.where(seen, other - ours, 0.0)
        if shift:
            gap = torch.where(seen, gap - gap.sum(1, keepdim=True) / seen.sum(1, keepdim=True), 0.0)
        difference = max(difference, float(gap.abs().max()) if gap.numel() else 0.0)
        best = ours.topk(min(2, ours.shape[1]), dim=1)
        clear = best.values[:, 0] - best.values[:, -1] > TOLERANCE
        others += int((clear & (other.argmax(1) != best.indices[:, 0])).sum())
    return Agreement(len(pictures), difference, others)


def _batches(pictures: Tensor) -> Iterator[Tensor]:
    start, turn = 0, 0
    while start < len(pictures):
        size = SIZES[turn % len(SIZES)] if turn < len(SIZES) else SIZES[-1]
        yield pictures[start : start + size]
        start, turn = start + size, turn + 1


def need(agreement: Agreement, what: str) -> str:
    """The sentence about an agreement.

    Raises:
        PerpetuneError: the export does not answer as the state does.
    """
    if not agreement.holds:
        raise PerpetuneError(
            f"{what} does not answer as the state does, so it is not kept. {agreement} (allowed: {TOLERANCE:g} and 0)"
        )
    return f"{agreement}."

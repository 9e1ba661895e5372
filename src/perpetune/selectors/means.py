"""The selector `means`: the member to which the nearest class mean belongs."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from perpetune.heads.base import Head
from perpetune.heads.ncm import NCM
from perpetune.selectors.base import Chosen, Selector


class Means(Selector):
    """Chooses the member that has learned the class with the nearest mean query. TreeLoRA answers by it.

    Each member has a mean for each of its classes, so a class that comes back has one for each member.

    Args:
        metric: how near a mean is: by `cosine`, or by `euclidean` distance.
    """

    statistics: ClassVar[bool] = True
    by_member: ClassVar[bool] = True

    def __init__(self, dim: int, *, metric: Literal["cosine", "euclidean"] = "cosine"):
        super().__init__(dim)
        self.means = NCM(dim, metric=metric)

    def add(self, member: int, queries: Tensor, rows: Tensor, generator: torch.Generator) -> None:
        self.means.grow([row_name(*row) for row in self.rows[len(self.means.classes) :]], generator)
        self.means.observe(queries.float(), rows.to(self.means.counts.device))
        self.means.settle()

    def drop(self, member: int) -> None:
        gone = [row_name(one, name) for one, name in self.rows if one == member]
        super().drop(member)
        self.means.take_out(_none, gone, True)
        self.means.classes = [row_name(*row) for row in self.rows]

    @torch.no_grad()
    def choose(self, queries: Tensor) -> Chosen:
        owners = self.members_of_rows(queries.device)
        # The difference between two means can be too small for bf16.
        with torch.autocast(queries.device.type, enabled=False):
            queries, sources = queries.float(), (self.means.means, self.means.counts)
            if self.means.metric == "cosine":
                queries = F.normalize(queries, dim=-1)
            return Chosen(self.ranking.best(queries, sources, self._compared, len(owners), owners=owners))

    def _compared(self) -> tuple[Tensor, Tensor]:
        means = self.means.means
        if self.means.metric == "cosine":
            rows, offset = F.normalize(means, dim=-1), means.new_zeros(len(means))
        else:
            rows, offset = 2 * means, -means.square().sum(1)
        return rows, offset.masked_fill(self.means.counts == 0, -torch.inf)

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "means": len(self.rows)}


def _none() -> tuple[Head | None, Head]:
    raise AssertionError("class means need no part")


def row_name(member: int, name: str) -> str:
    """The name of a member's class in a head, where a class of two members is two classes."""
    return f"{member}/{name}"

"""The selector `gaussian`: the member to which the likeliest class belongs."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from perpetune.numerics.choosing import products
from perpetune.numerics.discriminant import Discriminant, discriminant
from perpetune.numerics.lowrank import moved_exactly
from perpetune.numerics.moments import Moments, pack, unpack
from perpetune.selectors.base import Chosen, Selector


class Gaussian(Selector):
    """Chooses the member that has learned the likeliest class, if all classes have one covariance.

    This is HiDe's task inference (Wang et al. 2023, arXiv:2310.07234; 2024, arXiv:2407.05229) in closed form. It keeps
    sums over queries: of each class of each member, and of their products over all. So tasks may come in any order,
    nothing is drawn, and nothing is trained.

    Args:
        shrink: how much of the unit matrix is added to the covariance, as a share of the mean variance.
    """

    statistics: ClassVar[bool] = True
    exact: ClassVar[tuple[str, ...]] = ("sums", "counts", "square")
    sums: Tensor
    counts: Tensor
    square: Tensor
    weight: Tensor
    offset: Tensor
    centre: Tensor

    def __init__(self, dim: int, *, shrink: Annotated[float, Field(gt=0)] = 0.01):
        super().__init__(dim)
        self.shrink = shrink
        self.register_buffer("sums", torch.zeros(0, dim, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("square", torch.zeros(dim * (dim + 1) // 2, dtype=torch.float64))  # packed
        self.register_buffer("weight", torch.zeros(0, dim))
        self.register_buffer("offset", torch.zeros(0))
        self.register_buffer("centre", torch.zeros(dim))

    def add(self, member: int, queries: Tensor, rows: Tensor, generator: torch.Generator) -> None:
        more = len(self.rows) - len(self.counts)
        self.sums, self.counts = F.pad(self.sums, (0, 0, 0, more)), F.pad(self.counts, (0, more))
        self.sums.index_add_(0, rows, moved_exactly(queries, self.sums))
        self.counts += torch.bincount(rows, minlength=len(self.counts))
        moments = Moments(self.dim)
        moments.update(queries)
        self.square += pack(moments.matrix[None])[0]
        if int(self.counts.sum()):
            solved = self.solved()
            self.centre = moved_exactly(solved.centre.float(), self.centre)
            self.weight = moved_exactly(solved.weight.float(), self.weight)
            self.offset = moved_exactly(solved.offset.float(), self.offset)

    def solved(self, centre: Tensor | None = None) -> Discriminant:
        """The discriminant of the classes in `rows`, in float64."""
        return discriminant(self.sums, self.counts, unpack(self.square[None], self.dim)[0], self.shrink, centre)

    def scores(self, queries: Tensor) -> Tensor:
        """Log-likelihoods `(B, R)` of the classes in `rows`, up to a constant of each query."""
        with torch.autocast(queries.device.type, enabled=False):
            return products(queries.float() - self.centre, self.weight) + self.offset

    @torch.no_grad()
    def choose(self, queries: Tensor) -> Chosen:
        owners = self.members_of_rows(queries.device)
        with torch.autocast(queries.device.type, enabled=False):
            queries, sources = queries.float() - self.centre, (self.weight, self.offset)
            return Chosen(self.ranking.best(queries, sources, lambda: sources, len(owners), owners=owners))

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "classes": len(self.rows), "queries": int(self.counts.sum())}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        super().set_extra_state(state)
        if len(self.counts) != (rows := len(self.rows)):
            self.sums, self.counts = self.sums.new_zeros(rows, self.dim), self.counts.new_zeros(rows)
            self.weight, self.offset = self.weight.new_zeros(rows, self.dim), self.offset.new_zeros(rows)

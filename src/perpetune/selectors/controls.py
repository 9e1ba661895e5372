"""Selectors that are controls for experiments: `random`, `last` and `vote`."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from perpetune.numerics.choosing import best, products
from perpetune.selectors.base import Chosen, Selector
from perpetune.selectors.keys import Keys

FINE = 1000  # a difference of this part of a query's length decides by chance between members


class Random(Selector):
    """A control: a member by chance, whatever it is good at.

    The chance lies in the query, so the same example always gets the same member, alone and in any batch: the digits
    behind the third one of the query's product with a drawn direction choose.

    Args:
        top: the number of members that act on an example, with numbers one after the other.
    """

    control: ClassVar[bool] = True
    direction: Tensor

    def __init__(self, dim: int, *, top: Annotated[int, Field(ge=1)] = 1):
        super().__init__(dim)
        self.top = top
        self.register_buffer("direction", torch.zeros(dim))

    def grow(self, members: int, generator: torch.Generator, queries: Tensor | None = None) -> None:
        if not self.members:
            self.direction = torch.randn(self.dim, generator=generator).to(self.direction)
        super().grow(members, generator, queries)

    @torch.no_grad()
    def choose(self, queries: Tensor) -> Chosen:
        self.ready(self.members)
        with torch.autocast(queries.device.type, enabled=False):
            fine = FINE * products(F.normalize(queries.to(self.direction), dim=-1), self.direction[None])
        first = ((fine - fine.floor()) * self.members).long().clamp(max=self.members - 1)
        others = torch.arange(min(self.top, self.members), device=queries.device)
        return Chosen((first + others) % self.members)


class Last(Selector):
    """A control: the newest member, whatever the query."""

    control: ClassVar[bool] = True

    def choose(self, queries: Tensor) -> Chosen:
        self.ready(self.members)
        return Chosen(torch.full((len(queries), 1), self.members - 1, device=queries.device))


class Vote(Keys):
    """A control: `keys` with the vote of the batch, as the released code of L2P has it.

    The members that are chosen most often act on all examples. So an answer depends on the companions of its example,
    and a batch of one task tells its task.
    """

    control: ClassVar[bool] = True

    def choose(self, queries: Tensor) -> Chosen:
        return self._voted(super().choose(queries))

    @torch.no_grad()
    def pick(self, queries: Tensor) -> Chosen:
        return self._voted(super().pick(queries)) if self.spread else self.choose(queries)

    def _voted(self, chosen: Chosen) -> Chosen:
        votes = torch.bincount(chosen.index.flatten(), minlength=self.members)
        return Chosen(best(votes[None].float(), self.top).expand(len(chosen.index), -1))

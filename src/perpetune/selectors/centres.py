"""The selector `centres`: the member with the nearest centre of its task's queries."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from perpetune.numerics.choosing import lowest
from perpetune.numerics.kmeans import kmeans
from perpetune.seeding import generator as generator_of
from perpetune.selectors.base import Chosen, Selector

Metric = Literal["l2", "l1"]


class Centres(Selector):
    """Groups the queries of each member by K-means, and chooses the member of the nearest centre: S-Prompts.

    Wang et al., NeurIPS 2022. Queries have length 1. If a member learns again, its new queries are grouped together
    with its old centres, each of which counts as much as the queries that it stands for.

    Args:
        count: the number of centres of a member; there are fewer if fewer queries differ.
        metric: the distance from a query to a centre. The released code of S-Prompts uses `l1`.
    """

    statistics: ClassVar[bool] = True
    by_member: ClassVar[bool] = True
    exact: ClassVar[tuple[str, ...]] = ("mass",)
    centres: Tensor
    of: Tensor
    mass: Tensor

    def __init__(self, dim: int, *, count: Annotated[int, Field(ge=1)] = 5, metric: Metric = "l2"):
        super().__init__(dim)
        self.count, self.metric = count, metric
        self.register_buffer("centres", torch.zeros(0, dim))
        self.register_buffer("of", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("mass", torch.zeros(0, dtype=torch.float64))

    def add(self, member: int, queries: Tensor, rows: Tensor, generator: torch.Generator) -> None:
        if not len(queries):
            return
        mine = (self.of == member).cpu()
        points = torch.cat([self.centres.cpu().double()[mine], F.normalize(queries.cpu().double(), dim=-1)])
        weights = torch.cat([self.mass[mine], torch.ones(len(queries), dtype=torch.float64)])
        # The same seed for every member, so that the order of tasks does not matter
        centres, mass = kmeans(points, weights, self.count, generator_of("centres"))
        others = torch.cat([self.of.cpu()[~mine], torch.full((len(centres),), member)])
        order = others.argsort(stable=True)
        self.centres = torch.cat([self.centres.cpu()[~mine], centres.float()])[order].to(self.centres)
        self.mass = torch.cat([self.mass[~mine], mass])[order]
        self.of = others[order].to(self.of)

    def drop(self, member: int) -> None:
        super().drop(member)
        stay = self.of != member
        self.centres, self.mass, self.of = self.centres[stay], self.mass[stay.cpu()], self.of[stay]
        self.of = self.of - (self.of > member).to(self.of)

    @torch.no_grad()
    def choose(self, queries: Tensor) -> Chosen:
        self.ready(len(self.of))
        with torch.autocast(queries.device.type, enabled=False):
            queries = F.normalize(queries.to(self.centres), dim=-1)
            if self.metric == "l1":
                return Chosen(lowest(-torch.cdist(queries, self.centres, p=1.0), self.of)[:, None])
            return Chosen(self.ranking.best(queries, (self.centres,), self._compared, len(self.of), owners=self.of))

    def _compared(self) -> tuple[Tensor, Tensor]:
        # The highest 2 q·c − ‖c‖² is the nearest centre.
        return 2 * self.centres, -self.centres.square().sum(1)

    def get_extra_state(self) -> dict[str, Any]:
        return {**super().get_extra_state(), "centres": len(self.of)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        super().set_extra_state(state)
        if len(self.of) != (count := int(state["centres"])):
            self.centres, self.of = self.centres.new_zeros(count, self.dim), self.of.new_zeros(count)
            self.mass = self.mass.new_zeros(count)

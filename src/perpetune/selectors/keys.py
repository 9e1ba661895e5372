"""The selector `keys`: the members whose learned keys are nearest to the query by cosine."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from perpetune.errors import UsageError
from perpetune.numerics.choosing import best, products
from perpetune.numerics.kmeans import kmeans
from perpetune.numerics.projection import Operand, Site
from perpetune.seeding import generator as generator_of
from perpetune.selectors.base import Chosen, Selector

SITE = "choice"
ENERGY = 0.999  # of the queries that protection holds at least; the directions that tell tasks apart are small ones


class Keys(Selector):
    """Chooses the members whose keys have the highest cosine with the query: L2P, DualPrompt.

    Wang et al., CVPR 2022, arXiv:2112.08654; ECCV 2022, arXiv:2204.04799. Each example chooses for itself, in training
    and at prediction. The loss draws the keys of the chosen members to the query.

    Args:
        top: the number of members that act on an example.
        pull: the factor of the loss `−pull · mean over examples of Σ cos(q, κ)` over the chosen members.
        spread: while training, `−spread · log(share)` is added to a cosine; `share` is the member's share of all use in
            training so far. 1 is what the paper of L2P describes; 0 adds nothing.
        start: where a new key starts: `drawn` from the uniform distribution in (−1, 1); at the `last` key; or at the
            `mean` of the task's queries, where the pull alone would lead. Several new members start at the centres of
            as many groups of queries.
    """

    learned: ClassVar[bool] = True
    kept: Tensor
    counts: Tensor

    def __init__(
        self,
        dim: int,
        *,
        top: Annotated[int, Field(ge=1)] = 1,
        pull: Annotated[float, Field(ge=0)] = 1.0,
        spread: Annotated[float, Field(ge=0)] = 0.0,
        start: Literal["drawn", "last", "mean"] = "drawn",
    ):
        super().__init__(dim)
        self.top, self.pull, self.spread, self.start = top, pull, spread, start
        self.needs_start = start == "mean"
        self._site_given = False
        # The keys of finished members are in no optimizer, for weight decay would move them.
        self.register_buffer("kept", torch.zeros(0, dim))
        self.fresh = nn.Parameter(torch.zeros(0, dim), requires_grad=False)
        self.register_buffer("counts", torch.zeros(0, dtype=torch.int64))

    @property
    def keys(self) -> Tensor:
        """All keys `(M, D)`."""
        return torch.cat([self.kept, self.fresh]) if len(self.kept) else self.fresh

    # -- growing and training -------------------------------------------------------------------------

    @torch.no_grad()
    def grow(self, members: int, generator: torch.Generator, queries: Tensor | None = None) -> None:
        new = members - self.members
        super().grow(members, generator, queries)
        if new <= 0:
            return
        if self.start == "mean":
            if queries is None or not len(queries):
                raise UsageError("select: keys start at the mean of the task's queries, and there are none")
            rows = self._groups(queries, new)
        elif self.start == "last" and len(self.keys):
            rows = self.keys[-1:].expand(new, -1)
        else:
            rows = 2 * torch.rand(new, self.dim, generator=generator) - 1
        self._set(self.kept, torch.cat([self.fresh.detach(), rows.to(self.fresh)]))
        self.counts = F.pad(self.counts, (0, new))

    def _groups(self, queries: Tensor, count: int) -> Tensor:
        points = F.normalize(queries.cpu().double(), dim=-1)
        if count == 1:
            return F.normalize(points.mean(0, keepdim=True), dim=-1)
        centres, _ = kmeans(points, points.new_ones(len(points)), count, generator_of("keys"))
        # Fewer queries may differ than there are keys
        return F.normalize(centres, dim=-1)[torch.arange(count) % len(centres)]

    @torch.no_grad()
    def start_at(self, queries: Tensor) -> None:
        self._set(self.kept, self._groups(queries, self.members).to(self.fresh))

    def _set(self, kept: Tensor, fresh: Tensor) -> None:
        """Change the tensors; the parameter stays the same object, because protection knows it."""
        self.kept, self.fresh.data, self.fresh.grad = kept.clone(), fresh.clone(), None

    def rest(self, members: int) -> None:
        finished = members - len(self.kept)
        if finished <= 0:
            return
        if self._site_given:
            raise UsageError(
                "select: keys of finished members rest, and `protect:` holds the keys as if all were shared: the "
                "method has to set `private` before"
            )
        fresh = self.fresh.detach()
        self._set(torch.cat([self.kept, fresh[:finished]]), fresh[finished:])

    def trained(self) -> list[nn.Parameter]:
        return [self.fresh] if len(self.fresh) else []

    def loss(self, queries: Tensor, chosen: Chosen) -> Tensor | None:
        if not self.pull:
            return None
        with torch.autocast(queries.device.type, enabled=False):
            keys = F.normalize(self.keys, dim=-1)[chosen.index]  # (B, k, D)
            cosines = (keys * F.normalize(queries.detach().to(keys), dim=-1)[:, None]).sum(-1)
            return -self.pull * cosines.sum(1).mean()

    def used(self, index: Tensor) -> None:
        self.counts += torch.bincount(index.flatten().to(self.counts.device), minlength=self.members)

    # -- choosing -------------------------------------------------------------------------------------

    def scores(self, queries: Tensor) -> Tensor:
        """Cosines `(B, M)`."""
        with torch.autocast(queries.device.type, enabled=False):
            return products(self._normal(queries), self._compared()[0])

    def _normal(self, queries: Tensor) -> Tensor:
        self.ready(self.members)
        normal = F.normalize(queries.to(self.fresh), dim=-1)
        self.seen(SITE, normal)
        return normal

    def _compared(self) -> tuple[Tensor, None]:
        return F.normalize(self.keys, dim=-1), None

    @torch.no_grad()
    def choose(self, queries: Tensor) -> Chosen:
        with torch.autocast(queries.device.type, enabled=False):
            normal, sources = self._normal(queries), (self.kept, self.fresh)
            return Chosen(self.ranking.best(normal, sources, self._compared, self.members, count=self.top))

    @torch.no_grad()
    def pick(self, queries: Tensor) -> Chosen:
        if not self.spread:
            return self.choose(queries)
        counts = self.counts.to(self.fresh)
        share = (counts + 1) / (counts.sum() + self.members)  # a member that was never used has a share too
        return Chosen(best(self.scores(queries) - self.spread * share.log(), self.top))

    # -- protection -----------------------------------------------------------------------------------

    def sites(self) -> list[Site]:
        if self.private:
            return []
        self._site_given = True
        return [Site(SITE, Operand(self.fresh, length=True), energy=ENERGY)]

    # -- reporting and storing ------------------------------------------------------------------------

    def warning(self, tasks: int) -> str | None:
        """A warning if few members were ever chosen in the training of `tasks` tasks, at least two."""
        chosen = int((self.counts > 0).sum())
        if self.private or tasks < 2 or chosen >= min(2 * self.top, self.members):
            return None
        return (
            f"select: keys have chosen {chosen} of {self.members} members in {tasks} tasks, so the others were not "
            "trained: set spread: 1, or start: mean"
        )

    def earlier(self) -> list[Tensor]:
        return [self.kept]

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "used": self.counts.tolist()}

    def get_extra_state(self) -> dict[str, Any]:
        return {**super().get_extra_state(), "kept": len(self.kept)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        super().set_extra_state(state)
        kept = int(state["kept"])
        if not 0 <= kept <= self.members:
            raise ValueError(f"{kept} keys rest, and there are {self.members}")
        if (len(self.kept), len(self.fresh)) != (kept, self.members - kept):
            self._set(self.kept.new_zeros(kept, self.dim), self.fresh.detach().new_zeros(self.members - kept, self.dim))
        if len(self.counts) != self.members:
            self.counts = self.counts.new_zeros(self.members)

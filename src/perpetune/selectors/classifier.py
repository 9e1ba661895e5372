"""The selector `classifier`: the member to which the class belongs that a head of perpetune answers with."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from perpetune.heads.base import Head
from perpetune.heads.drawn import Drawn
from perpetune.heads.ridge import Ridge
from perpetune.numerics.choosing import lowest
from perpetune.selectors.base import Chosen, Selector
from perpetune.selectors.means import row_name


class LearnedClasses(Selector):
    """Asks a head for the class of a query, and chooses the member that learned it.

    The classes of all members are compared; a class of two members is two classes.
    `ridge` is solved from sums over queries. `linear` is what HiDe publishes (Wang et al. 2023, arXiv:2310.07234): the
    head `drawn`, which trains a linear layer on queries that it draws from a Gaussian of each class of each member.

    Args:
        head: `ridge` or `linear`.
        covariance: for `linear`, what is kept of a Gaussian beside its mean: the variance of each number
            (`diagonal`), or the `full` covariance, `4 D²` bytes for each class.
        samples: for `linear`, the number of queries that are drawn from each Gaussian in an epoch.
        epochs: for `linear`, how many.
        batch_size: for `linear`, drawn queries in a step.
        lr: for `linear`, the learning rate at the start; it falls by half a cosine wave.
    """

    statistics: ClassVar[bool] = True

    def __init__(
        self,
        dim: int,
        *,
        head: Literal["ridge", "linear"] = "ridge",
        covariance: Literal["diagonal", "full"] = "diagonal",
        samples: Annotated[int, Field(ge=1)] = 120,
        epochs: Annotated[int, Field(ge=1)] = 30,
        batch_size: Annotated[int, Field(ge=1)] = 120,
        lr: Annotated[float, Field(gt=0)] = 0.005,
    ):
        super().__init__(dim)
        if head == "ridge":
            self.head: Head = Ridge(dim)
        else:
            self.head = Drawn(dim, covariance=covariance, samples=samples, epochs=epochs, batch_size=batch_size, lr=lr)

    def add(self, member: int, queries: Tensor, rows: Tensor, generator: torch.Generator) -> None:
        self.head.grow([row_name(*row) for row in self.rows], generator)
        self.head.expect(torch.bincount(rows, minlength=len(self.rows)))
        self.head.observe(queries.float(), rows.to(queries.device))
        self.head.flush()
        self.head.settle()

    @torch.no_grad()
    def choose(self, queries: Tensor) -> Chosen:
        owners = self.members_of_rows(queries.device)
        with torch.autocast(queries.device.type, enabled=False):
            queries = queries.float()

            def scores(which: Tensor) -> Tensor:
                some = queries[which]
                if some.device.type == "cpu" and len(some):  # one by one; see `products`
                    return torch.cat([self.head(query[None].clone()) for query in some])
                return self.head(some)  # type: ignore[no-any-return]

            if not isinstance(self.head, Ridge):
                return Chosen(lowest(scores(torch.arange(len(queries))), owners)[:, None])
            head, centred = self.head, queries - self.head.centre
            sources = (head.offset, head.weight, head.counts)
            return Chosen(
                self.ranking.best(centred, sources, self._compared, len(owners), owners=owners, scores=scores)
            )

    def _compared(self) -> tuple[Tensor, Tensor]:
        assert isinstance(self.head, Ridge)
        # One factor for all scores is left out: it is positive.
        return self.head.weight.mT, self.head.offset.masked_fill(self.head.counts == 0, -torch.inf)

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "classes": len(self.rows)}

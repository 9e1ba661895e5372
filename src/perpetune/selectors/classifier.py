"""The selector `classifier`: the member to which the class belongs that a head of perpetune answers with."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from perpetune.heads.base import Head
from perpetune.heads.linear import Linear
from perpetune.heads.ridge import Ridge
from perpetune.numerics.choosing import lowest
from perpetune.numerics.lowrank import moved_exactly
from perpetune.numerics.moments import Moments, pack, unpack
from perpetune.selectors.base import Chosen, Selector
from perpetune.selectors.means import row_name

FLOOR = 1e-4  # added to every variance of a drawn query, as HiDe's code does
MOMENTUM, DECAY = 0.9, 5e-4  # of the training of `linear`, as HiDe's code has them


class LearnedClasses(Selector):
    """Asks a head for the class of a query, and chooses the member that learned it.

    The classes of all members are compared; a class of two members is two classes.
    `ridge` is solved from sums over queries. `linear` is what HiDe publishes (Wang et al. 2023, arXiv:2310.07234): one
    Gaussian is kept for each class of each member; after each task queries are drawn from them, and a linear head is
    trained on these by SGD, from where it was.

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
    exact: ClassVar[tuple[str, ...]] = ("sums", "squares", "counts")
    sums: Tensor
    squares: Tensor
    counts: Tensor

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
        self.full = covariance == "full"
        self.samples, self.epochs, self.batch_size, self.lr = samples, epochs, batch_size, lr
        self.head: Head = Ridge(dim) if head == "ridge" else Linear(dim)
        self.drawn = head == "linear"
        self._width = 0 if not self.drawn else dim * (dim + 1) // 2 if self.full else dim
        self.register_buffer("sums", torch.zeros(0, dim if self.drawn else 0, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(0, self._width, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(0, dtype=torch.int64))

    def add(self, member: int, queries: Tensor, rows: Tensor, generator: torch.Generator) -> None:
        self.head.grow([row_name(*row) for row in self.rows], generator)
        if not self.drawn:
            self.head.expect(torch.bincount(rows, minlength=len(self.rows)))
            self.head.observe(queries.float(), rows.to(queries.device))
            self.head.flush()
            self.head.settle()
            return
        more = len(self.rows) - len(self.counts)
        self.sums, self.squares = (F.pad(t, (0, 0, 0, more)) for t in (self.sums, self.squares))
        self.counts = F.pad(self.counts, (0, more)) + torch.bincount(rows, minlength=len(self.rows))
        exact = moved_exactly(queries, self.sums)
        self.sums.index_add_(0, rows, exact)
        for row in rows.unique().tolist():
            mine = exact[rows == row]
            if self.full:
                moments = Moments(self.dim)
                moments.update(mine)
                self.squares[row] += pack(moments.matrix[None])[0]
            else:
                self.squares[row] += mine.square().sum(0)
        self._train(generator)

    def _gaussians(self) -> tuple[Tensor, Tensor]:
        """Means `(R, D)`, and what unit noise is multiplied by: `(R, D)`, or `(R, D, D)` if they are full. Float32."""
        counts = self.counts.clamp(min=1)[:, None]
        means = self.sums / counts
        if not self.full:
            return means.float(), (self.squares / counts - means.square()).clamp(min=0).add(FLOOR).sqrt().float()
        covariance = unpack(self.squares / counts, self.dim) - means[:, :, None] * means[:, None, :]
        values, vectors = torch.linalg.eigh(covariance)
        return means.float(), (vectors * values.clamp(min=0).add(FLOOR).sqrt()[:, None, :]).float()

    def _train(self, generator: torch.Generator) -> None:
        """Train the linear head on queries that are drawn from the Gaussians."""
        known = self.counts.nonzero().flatten()
        if not len(known):
            return
        means, spread = (values[known] for values in self._gaussians())
        device = next(self.head.parameters()).device
        parameters = list(self.head.parameters())
        optimizer = torch.optim.SGD(parameters, lr=self.lr, momentum=MOMENTUM, weight_decay=DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)
        self.head.requires_grad_(True)
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            for _ in range(self.epochs):
                noise = torch.randn(len(known), self.samples, self.dim, generator=generator)
                around = noise @ spread.mT if self.full else noise * spread[:, None]
                drawn = (means[:, None] + around).flatten(0, 1).to(device)
                order = torch.randperm(len(drawn), generator=generator).to(device)
                for part in order.split(self.batch_size):
                    scores = self.head(drawn[part])[:, known.to(device)]
                    loss = F.cross_entropy(scores, part // self.samples)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                schedule.step()
        self.head.requires_grad_(False)
        for p in parameters:
            p.grad = None

    @torch.no_grad()
    def choose(self, queries: Tensor) -> Chosen:
        owners = self.members_of_rows(queries.device)
        with torch.autocast(queries.device.type, enabled=False):
            queries = queries.float()
            if queries.device.type == "cpu" and len(queries):  # one by one; see `products`
                scores = torch.cat([self.head(query[None].clone()) for query in queries])
            else:
                scores = self.head(queries)
        if self.drawn:
            scores = scores.masked_fill((self.counts == 0).to(scores.device), -torch.inf)
        return Chosen(lowest(scores, owners)[:, None])

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "classes": len(self.rows)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        super().set_extra_state(state)
        rows = len(self.rows) if self.drawn else 0
        if len(self.counts) != rows:
            self.sums, self.squares = self.sums.new_zeros(rows, self.dim), self.squares.new_zeros(rows, self._width)
            self.counts = self.counts.new_zeros(rows)

"""The head `drawn`: a linear layer that is trained on features drawn from a Gaussian of each class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from perpetune.errors import PerpetuneError
from perpetune.heads.base import Folded, Head, alone, not_finite
from perpetune.heads.linear import Linear
from perpetune.numerics.exact import exactly
from perpetune.numerics.handover import Arrivals, sent
from perpetune.numerics.lowrank import moved_exactly
from perpetune.numerics.moments import Moments, pack, unpack
from perpetune.seeding import generator

FLOOR = 1e-4  # added to every variance of a drawn feature, as HiDe's code does
MOMENTUM, DECAY = 0.9, 5e-4  # of SGD, as HiDe's code has them
SUMS = ("sums", "squares")


class Drawn(Head):
    """Trains a linear layer on features that it draws from a Gaussian of each class.

    This is HiDe's task-adaptive prediction (Wang et al. 2023, arXiv:2310.07234; 2024, arXiv:2407.05229), to compare
    with `ridge`, which needs no draws. The head stores sums of features, sums of their squares and counts of each
    class, in float64, so the Gaussians depend on no order of batches and tasks. After each task it trains the layer
    by SGD, from where it was, on features of all classes learned so far. It uses all that it draws; HiDe's code uses
    `t / (t + 1)` of it. While features are trained, a linear probe gives the logits; it is not used at prediction. The
    layer's row of a new class starts at the probe's row if both read the same features, else at 0.

    Args:
        covariance: what is kept of a Gaussian beside its mean: the variance of each number (`diagonal`), or the `full`
            covariance, `4 D²` bytes for each class.
        samples: the number of features that are drawn from each Gaussian in an epoch; all are in memory at once.
        epochs: how many.
        batch_size: drawn features in a step.
        lr: the learning rate at the start; it falls by half a cosine wave.

    Raises:
        PerpetuneError: features are not finite, and then none of their batch is added to the sums; or the layer has
            become infinite in training, and then it is left as it was.
    """

    statistics: ClassVar[bool] = True
    sums: Tensor
    squares: Tensor
    counts: Tensor
    weight: Tensor
    bias: Tensor
    settled: Tensor

    def __init__(
        self,
        dim: int,
        *,
        covariance: Literal["diagonal", "full"] = "diagonal",
        samples: Annotated[int, Field(ge=1)] = 120,
        epochs: Annotated[int, Field(ge=1)] = 30,
        batch_size: Annotated[int, Field(ge=1)] = 120,
        lr: Annotated[float, Field(gt=0)] = 0.005,
    ):
        super().__init__(dim)
        self.full = covariance == "full"
        self.samples, self.epochs, self.batch_size, self.lr = samples, epochs, batch_size, lr
        self.probe, self.columns = Linear(dim), slice(None)
        self.seed: int | None = None
        """Of all draws; that of the generator which grew the head first."""
        self._facts: dict[str, Any] = {}
        self._arrivals = Arrivals()
        self.register_buffer("counts", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("settled", torch.zeros(0, dtype=torch.int64))  # the counts when the layer was last trained
        self.register_buffer("bias", torch.zeros(0))
        for name in (*SUMS, "weight"):
            self.register_buffer(name, torch.empty(0))
        self._size()

    @property
    def width(self) -> int:
        """The number of sums of squares of each class."""
        return self.dim * (self.dim + 1) // 2 if self.full else self.dim

    def _size(self) -> None:
        """Give the tensors of no class the width of the features."""
        device = self.bias.device
        self.sums = torch.zeros(0, self.dim, dtype=torch.float64)
        self.squares = torch.zeros(0, self.width, dtype=torch.float64)
        self.weight = torch.zeros(0, self.dim, device=device)

    # -- scores ---------------------------------------------------------------------------------------

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight, self.bias).masked_fill(self.counts == 0, -torch.inf)

    def logits(self, features: Tensor) -> Tensor:
        mine = features if features.shape[-1] == self.probe.dim else features[..., self.columns]
        logits: Tensor = self.probe(mine)
        return logits

    def folded(self) -> Folded:
        return Folded(self.weight.double(), self.bias.double().masked_fill(self.counts == 0, -torch.inf))

    # -- growing --------------------------------------------------------------------------------------

    def per_class(self) -> list[nn.Parameter]:
        return self.probe.per_class()

    def train_on(self, columns: slice) -> None:
        self.probe, self.columns = Linear(len(range(self.dim)[columns])), columns

    def widen(self, dim: int) -> None:
        super().widen(dim)
        self._size()

    def reset(self) -> None:
        super().reset()
        self.seed, self._facts = None, {}

    def resize(self, rows: int, generator: torch.Generator) -> None:
        if self.seed is None and rows:
            self.seed = generator.initial_seed()
        more = rows - len(self.counts)
        self.sums, self.squares, self.weight = (
            F.pad(t, (0, 0, 0, more)) for t in (self.sums, self.squares, self.weight)
        )
        self.counts, self.bias, self.settled = (F.pad(t, (0, more)) for t in (self.counts, self.bias, self.settled))
        self.probe.resize(rows, generator)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Drawn:
        # The sums stay on the CPU wherever the rest goes: Apple's GPUs have no float64.
        kept = {name: self._buffers.pop(name) for name in SUMS}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._buffers.update(kept)
        return self

    def get_extra_state(self) -> dict[str, Any]:
        return {**super().get_extra_state(), "seed": self.seed}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.seed = None if state["seed"] is None else int(state["seed"])
        super().set_extra_state(state)

    # -- statistics -----------------------------------------------------------------------------------

    def expect(self, counts: Tensor) -> None:
        self._arrivals.clear()  # of a pass that failed

    @torch.no_grad()
    def observe(self, features: Tensor, rows: Tensor) -> None:
        self._arrivals.put(features, rows)
        self._add_arrived()

    @torch.no_grad()
    def flush(self) -> None:
        self._add_arrived(all=True)

    def _add_arrived(self, *, all: bool = False) -> None:  # noqa: A002
        for features, rows in self._arrivals.take(all=all):
            if (fault := not_finite("drawn", self.classes, features, rows)) is not None:
                raise fault
            self._add(moved_exactly(features, self.sums), rows)

    def _add(self, exact: Tensor, of: Tensor) -> None:
        """Add features `(B, D)`, float64, of the rows `of (B,)`; both on the CPU."""
        self.sums.index_add_(0, of, exact)
        self.counts += sent(torch.bincount(of, minlength=len(self.counts)), self.counts.device)
        if not self.full:
            self.squares.index_add_(0, of, exact.square())
            return
        for row in of.unique().tolist():
            moments = Moments(self.dim)
            moments.update(exact[of == row])
            self.squares[row] += pack(moments.matrix[None])[0]

    def additive(self) -> list[Tensor]:
        return [self.sums, self.squares, self.counts]

    def gaussian(self, row: int) -> tuple[Tensor, Tensor]:
        """Mean `(D,)` of a class, and what unit noise is multiplied by, `(D,)` or, if it is full, `(D, D)`; float64."""
        count = int(self.counts[row])
        mean, square = self.sums[row] / count, self.squares[row] / count
        if not self.full:
            return mean, (square - mean.square()).clamp(min=0).add(FLOOR).sqrt()
        values, vectors = torch.linalg.eigh(unpack(square[None], self.dim)[0] - mean[:, None] * mean)
        return mean, vectors * values.clamp(min=0).add(FLOOR).sqrt()

    @torch.no_grad()
    def settle(self, total: Callable[[Tensor], Tensor] = alone) -> None:
        self.flush()
        known = self.counts.nonzero().flatten()
        if not len(known):
            return
        if self.probe.dim == self.dim:
            new = known[self.settled[known] == 0]
            self.weight[new] = self.probe.weight[new].to(self.weight)
            self.bias[new] = self.probe.bias[new].to(self.bias)
        weight, bias, loss = self._trained(known)
        if not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
            raise PerpetuneError(
                "head: drawn: its layer has become infinite in training on drawn features: lower lr of the head, or of "
                "select: classifier"
            )
        self.weight[known], self.bias[known] = weight.to(self.weight), bias.to(self.bias)
        self.settled.copy_(self.counts)
        size = sum(t.numel() * t.element_size() for t in self.additive())
        rows = int(self.counts.sum())
        self._facts = {"kind": "drawn", "rows": rows, "dim": self.dim, "loss": loss, "bytes": size}

    def _trained(self, known: Tensor) -> tuple[Tensor, Tensor, float]:
        """Weight and bias of the classes `known`, trained on draws, and the mean loss of the last epoch.

        The sums are those of all processes and the seed is the same on each, so all get the same bits.
        """
        device = self.weight.device
        found = [tuple(t.to(device, torch.float32) for t in self.gaussian(row)) for row in known.tolist()]
        means, spread = (torch.stack(parts) for parts in zip(*found, strict=True))
        rng = generator("drawn", self.seed or 0, int(self.counts.sum()))
        layer = [t[known].float().requires_grad_(True) for t in (self.weight, self.bias)]
        optimizer = torch.optim.SGD(layer, lr=self.lr, momentum=MOMENTUM, weight_decay=DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)
        with torch.enable_grad(), exactly(device):
            for _ in range(self.epochs):
                noise = torch.randn(len(known), self.samples, self.dim, generator=rng).to(device)
                around = noise @ spread.mT if self.full else noise * spread[:, None]
                drawn = (means[:, None] + around).flatten(0, 1)
                order = torch.randperm(len(drawn), generator=rng).to(device)
                losses = torch.zeros((), device=device)
                for part in order.split(self.batch_size):
                    loss = F.cross_entropy(F.linear(drawn[part], *layer), part // self.samples)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    losses += loss.detach() * len(part)
                schedule.step()
        weight, bias = (t.detach() for t in layer)
        return weight, bias, float(losses) / len(drawn)

    def facts(self) -> dict[str, Any]:
        return self._facts

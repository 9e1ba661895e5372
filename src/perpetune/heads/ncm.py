"""The head `ncm`: the nearest class mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perpetune.heads.base import Folded, Head, alone, carry_facts
from perpetune.heads.cosine import Cosine
from perpetune.numerics import carry as carrying
from perpetune.numerics.handover import Arrivals, sent
from perpetune.numerics.lowrank import moved_exactly
from perpetune.numerics.ridge import CONSTANT


class NCM(Head):
    """Predicts the class whose mean training feature is nearest.

    The head stores the sum of features and the number of examples of each class, in float64. A class that comes back
    (domain-incremental) continues its sum. As long as the features do not change, the result is exact for any order of
    batches and tasks. If a method changes the features, the means of earlier classes stay those of the old features,
    unless `carry` is on. While features are trained, a cosine probe gives the logits; it is not used at prediction.
    Mensink et al. 2013. SimpleCIL, arXiv:2303.07338, is this head on frozen features with `metric: cosine`.

    Args:
        metric: `cosine` (scores are `σ cos(f, μ_c)`) or `euclidean` (scores are `−σ ‖f − μ_c‖² / D`).
        scale: σ. It changes the probabilities that users see, but never the class with the highest score.
        carry: after training, move the sums of old classes as the new task's features have moved (`numerics.carry`).
            The head tests the map on classes that were left out of it, and moves the sums only if that gives a smaller
            error than to leave them.
    """

    statistics: ClassVar[bool] = True
    by_class: ClassVar[bool] = True
    sums: Tensor
    counts: Tensor
    means: Tensor

    def __init__(
        self, dim: int, *, metric: Literal["cosine", "euclidean"] = "cosine", scale: float = 16.0, carry: bool = False
    ):
        super().__init__(dim)
        self.metric, self.scale, self.carry = metric, scale, carry
        self._carried: dict[str, Any] = {}
        self._arrivals = Arrivals()
        self.probe = Cosine(dim, scale=scale)
        self.register_buffer("sums", torch.zeros(0, dim, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("means", torch.zeros(0, dim))

    def forward(self, features: Tensor) -> Tensor:
        if self.metric == "cosine":
            scores = F.normalize(features, dim=-1) @ F.normalize(self.means, dim=-1).T
        else:
            # ‖f − μ‖² = ‖f‖² − 2 f·μ + ‖μ‖², row by row, so the other examples of a batch have no effect.
            square = features.pow(2).sum(-1, keepdim=True) + self.means.pow(2).sum(-1)
            scores = (2 * features @ self.means.T - square) / self.dim
        return (self.scale * scores).masked_fill(self.counts == 0, -torch.inf)

    def logits(self, features: Tensor) -> Tensor:
        logits: Tensor = self.probe(features)
        return logits

    def per_class(self) -> list[nn.Parameter]:
        return self.probe.per_class()

    def resize(self, rows: int, generator: torch.Generator) -> None:
        more = rows - len(self.counts)
        self.sums = F.pad(self.sums, (0, 0, 0, more))
        self.counts = F.pad(self.counts, (0, more))
        self.means = F.pad(self.means, (0, 0, 0, more))
        self.probe.resize(rows, generator)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NCM:
        # The sums stay on the CPU wherever the rest goes: Apple's GPUs have no float64.
        sums = self._buffers.pop("sums")
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._buffers["sums"] = sums
        return self

    def expect(self, counts: Tensor) -> None:
        self._arrivals.clear()  # of a pass that failed

    @torch.no_grad()
    def observe(self, features: Tensor, rows: Tensor) -> None:
        self._arrivals.put(features, rows)
        self._add()

    @torch.no_grad()
    def flush(self) -> None:
        self._add(all=True)

    def _add(self, *, all: bool = False) -> None:  # noqa: A002
        for features, rows in self._arrivals.take(all=all):
            self.sums.index_add_(0, rows, moved_exactly(features, self.sums))
            self.counts += sent(torch.bincount(rows, minlength=len(self.counts)), self.counts.device)

    @torch.no_grad()
    def follow(self, before: Tensor, after: Tensor, targets: Tensor) -> None:
        if not int(self.counts.sum()):
            return
        first, then = (F.pad(moved_exactly(rows, self.sums), (0, 1), value=1.0) for rows in (before, after))
        variance = first.var(0)
        varies = variance > CONSTANT[torch.float64] * first.square().mean(0)
        scale = torch.where(varies, variance, 1.0).rsqrt() * varies
        scale[-1] = 1.0
        carry = carrying.follow(first, then, targets.to(first.device), scale, first[:, :-1].mean(0))
        self._carried = carry_facts(carry)
        if carry:
            self.sums = carry.of_rows(torch.cat([self.sums, moved_exactly(self.counts, self.sums)[:, None]], 1))[
                :, :-1
            ].contiguous()

    @torch.no_grad()
    def take_out(self, part: Callable[[], tuple[Head | None, Head]], gone: Sequence[str], whole: bool) -> None:
        if not whole:  # other classes have a part of the task too
            before, after = part()
            assert isinstance(after, NCM)
            assert before is None or isinstance(before, NCM)
            rows = len(after.counts)
            self.sums[:rows] -= after.sums
            self.counts[:rows] -= after.counts
            if before is not None:
                self.sums[: len(before.counts)] += before.sums
                self.counts[: len(before.counts)] += before.counts
        stay = self.leave_out(gone)
        self.sums, self.counts, self.means = self.sums[stay], self.counts[stay], self.means[stay]
        self.probe.keep_rows(stay)
        self.settle()

    def facts(self) -> dict[str, Any]:
        return {"kind": "ncm", **self._carried} if self._carried else {}

    def additive(self) -> list[Tensor]:
        return [self.sums, self.counts]

    def train_on(self, columns: slice) -> None:
        self.probe = self.probe.narrowed(columns)

    def widen(self, dim: int) -> None:
        super().widen(dim)
        self.sums, self.means = self.sums.new_zeros(0, dim), self.means.new_zeros(0, dim)

    def folded(self) -> Folded:
        means = self.means.double()
        if self.metric == "cosine":
            weight, bias = self.scale * F.normalize(means, dim=-1), means.new_zeros(len(means))
        else:  # without −σ ‖f‖² / D, which all classes share
            weight, bias = 2 * self.scale / self.dim * means, -self.scale / self.dim * means.pow(2).sum(-1)
        return Folded(weight, bias.masked_fill(self.counts == 0, -torch.inf), normalise=self.metric == "cosine")

    @torch.no_grad()
    def settle(self, total: Callable[[Tensor], Tensor] = alone) -> None:
        self.flush()
        counts = moved_exactly(self.counts.clamp(min=1).unsqueeze(1), self.sums)
        self.means = (self.sums / counts).to(self.means)

"""The head `linear`: a linear classifier."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perpetune.heads.base import Folded, Head, grow_rows


class Linear(Head):
    """Scores `f Wᵀ + b`. New rows start small and random; old rows keep their values.

    Args:
        std: standard deviation of a new class's weights.
    """

    def __init__(self, dim: int, *, std: float = 0.02):
        super().__init__(dim)
        self.std = std
        self.weight = nn.Parameter(torch.empty(0, dim), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight, self.bias)

    def folded(self) -> Folded:
        return Folded(self.weight.double(), self.bias.double())

    def per_class(self) -> list[nn.Parameter]:
        return [self.weight, self.bias]

    @property
    def apart(self) -> bool:
        return True

    def keep_rows(self, rows: Sequence[int]) -> None:
        self.weight = nn.Parameter(self.weight.detach()[list(rows)], requires_grad=False)
        self.bias = nn.Parameter(self.bias.detach()[list(rows)], requires_grad=False)

    def resize(self, rows: int, generator: torch.Generator) -> None:
        self.weight = nn.Parameter(grow_rows(self.weight, rows, generator, self.std), requires_grad=False)
        self.bias = nn.Parameter(F.pad(self.bias.detach(), (0, rows - len(self.bias))), requires_grad=False)

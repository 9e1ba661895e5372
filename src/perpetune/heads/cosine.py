"""The head `cosine`: scores by cosine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perpetune.heads.base import Folded, Head, grow_rows


class Cosine(Head):
    """Scores `σ · cos(f, w_c)` with learned directions `w_c`, so no class wins by the length of its row.

    Gidaris & Komodakis 2018, arXiv:1804.09458.

    Args:
        scale: σ at the start.
        learn_scale: train σ too. All classes share it, so a later task changes the scores of earlier classes, but
            not their order.
    """

    def __init__(self, dim: int, *, scale: float = 16.0, learn_scale: bool = False):
        super().__init__(dim)
        self.start, self.columns = float(scale), slice(None)
        self.weight = nn.Parameter(torch.empty(0, dim), requires_grad=False)
        if learn_scale:
            self.scale = nn.Parameter(torch.tensor(self.start), requires_grad=False)
        else:
            self.register_buffer("scale", torch.tensor(self.start))

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * F.normalize(self.read(features), dim=-1) @ F.normalize(self.weight, dim=-1).T

    def folded(self) -> Folded:
        rows = self.scale.double() * F.normalize(self.weight.double(), dim=-1)
        return Folded(rows, rows.new_zeros(len(rows)), normalise=True)

    def read(self, features: Tensor) -> Tensor:
        """The columns of features `(B, D)` that the head reads; features of its own width are returned unchanged."""
        return features if features.shape[-1] == self.weight.shape[1] else features[..., self.columns]

    def narrowed(self, columns: slice) -> Cosine:
        """A new head with the same options that reads only `columns` of the features."""
        learned = isinstance(self.scale, nn.Parameter)
        new = Cosine(len(range(self.dim)[columns]), scale=self.start, learn_scale=learned)
        new.columns = columns
        return new

    def reset(self) -> None:
        super().reset()
        with torch.no_grad():
            self.scale.fill_(self.start)

    def per_class(self) -> list[nn.Parameter]:
        return [self.weight]

    @property
    def apart(self) -> bool:
        return not isinstance(self.scale, nn.Parameter)  # which all classes share

    def keep_rows(self, rows: Sequence[int]) -> None:
        self.weight = nn.Parameter(self.weight.detach()[list(rows)], requires_grad=False)

    def resize(self, rows: int, generator: torch.Generator) -> None:
        self.weight = nn.Parameter(grow_rows(self.weight, rows, generator, 1.0), requires_grad=False)

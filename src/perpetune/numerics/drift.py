"""How far learning has moved the answers on old data, from second moments alone: the forgetting certificate."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from perpetune.numerics.moments import pack, unpack


class Drift:
    """The exact change of a linear map's outputs on all old data since each of them was learned.

    With `C_i` the second moment of task `i`'s inputs and `W_i` the map when it was learned, the summed square of
    the change is `E(W) = Σ_i tr((W − W_i) C_i (W − W_i)ᵀ)`. It is carried forward without the tasks: with
    `Δ = W − W_last`, `Y = Σ_i (W_last − W_i) C_i` and `C = Σ_i C_i`,

        `E(W) = E + 2⟨Δ, Y⟩ + tr(Δ C Δᵀ)`,

    so memory does not grow with their number. Exact where the inputs themselves are as they were.

    Args:
        heads, out, dim: maps `(heads, out, dim)`, whose figures are taken together.
    """

    def __init__(self, heads: int, out: int, dim: int):
        self.dim = dim
        self.total = torch.zeros(heads, dim * (dim + 1) // 2, dtype=torch.float64)
        """`C` of all data so far, packed."""
        self.last = torch.zeros(heads, out, dim, dtype=torch.float64)
        """`W` when data were last added."""
        self.cross = torch.zeros(heads, out, dim, dtype=torch.float64)
        """`Y`."""
        self.change = 0.0
        """`E`, at `last`."""
        self.output = 0.0
        """`Σ_i tr(W_i C_i W_iᵀ)`: the summed square of the outputs when they were learned."""
        self.count = 0
        """Vectors seen."""

    def measure(self, values: Tensor) -> tuple[float, float | None]:
        """Root-mean-square change of the outputs of the old data with `values (heads, out, dim)`: absolute, and
        relative to the outputs' own root mean square (None where those are zero)."""
        if self.count == 0:
            return 0.0, None
        change = self._change(values.detach().to(self.last))
        change = math.inf if math.isnan(change) else max(0.0, change)
        relative = math.sqrt(change / self.output) if self.output > 0 else None
        return math.sqrt(change / self.count), relative

    def advance(self, values: Tensor, moments: Tensor, count: int) -> None:
        """Data with `moments (heads, dim, dim)` were learned by `values`: from now on they are old."""
        values, moments = values.detach().to(self.last), moments.detach().to(self.last)
        if self.count:
            self.change = self._change(values)
            self.cross += (values - self.last) @ unpack(self.total, self.dim)
        self.last = values.clone()
        self.total += pack(moments)
        self.output += float(((values @ moments) * values).sum())
        self.count += count

    def _change(self, values: Tensor) -> float:
        moved = values - self.last
        square = ((moved @ unpack(self.total, self.dim)) * moved).sum()
        return self.change + float(2 * (moved * self.cross).sum() + square)

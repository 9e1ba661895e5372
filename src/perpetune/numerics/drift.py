"""The forgetting certificate: how far learning has moved the outputs on old data, from second moments alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from perpetune.numerics.lowrank import Factors, exact, inner, reduced, summed
from perpetune.numerics.moments import pack, unpack


class Drift:
    """The exact change of a linear map's outputs on all old data since these data were learned.

    Let `C_i` be the second moment of task `i`'s inputs and `W_i` the map when the task was learned. The summed square
    of the change is `E(W) = Σ_i tr((W − W_i) C_i (W − W_i)ᵀ)`. It is updated without the moments of single tasks: with
    `Δ = W − W_last`, `Y = Σ_i (W_last − W_i) C_i` and `C = Σ_i C_i`,

        `E(W) = E + 2⟨Δ, Y⟩ + tr(Δ C Δᵀ)`,

    so memory does not grow with the number of tasks. The result is exact if the inputs themselves have not changed.

    Args:
        heads, out, dim: the shape of the maps, `(heads, out, dim)`. The figures are for all heads together.
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
        """The number of vectors seen."""

    def measure(self, values: Tensor) -> tuple[float, float | None]:
        """The root-mean-square change of the outputs on old data if the map is `values (heads, out, dim)`.

        Returns:
            The absolute change, and the change relative to the root mean square of the outputs (None if that is zero).
        """
        return self._figures(lambda: self._change(values.detach().to(self.last)))

    def _figures(self, measured: Callable[[], float]) -> tuple[float, float | None]:
        if self.count == 0:
            return 0.0, None
        change = measured()
        change = math.inf if math.isnan(change) else max(0.0, change)
        relative = math.sqrt(change / self.output) if self.output > 0 else None
        return math.sqrt(change / self.count), relative

    def advance(self, values: Tensor, moments: Tensor, count: int) -> None:
        """Add data with `moments (heads, dim, dim)` that were learned with `values`; they are old data from now on."""
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


class ProductDrift(Drift):
    """`Drift` for a map that is given by its factors, `W = B A` with `B (out, k)` and `A (k, dim)`, of any rank.

    The map itself is never computed. `last` and `cross` are stored as factors too, one row `[b | a]` of `out + dim`
    numbers for each rank-one term `b aᵀ`. With each addition the rank of `Y` grows by at most the rank of the change of
    the map.

    Args:
        out, dim: the shape of the map.
    """

    def __init__(self, out: int, dim: int):
        super().__init__(1, 0, dim)
        self.out = out
        self.last = torch.zeros(0, out + dim, dtype=torch.float64)
        self.cross = torch.zeros(0, out + dim, dtype=torch.float64)

    def measure_product(self, values: Factors) -> tuple[float, float | None]:
        """As `measure`, for the map `B A`."""
        return self._figures(lambda: self._moved(values)[0])

    def advance_product(self, values: Factors, moments: Tensor, count: int) -> None:
        """As `advance`, with `moments (1, dim, dim)`."""
        values, moments = exact(values), moments.detach().to(self.last)
        if self.count:
            self.change, (b, a) = self._moved(values)
            self.cross = _rows(reduced(summed([self._factors(self.cross), (b, a @ unpack(self.total, self.dim)[0])])))
        b, a = reduced(values)
        self.last = _rows((b, a))
        self.total += pack(moments)
        self.output += float(inner((b, a @ moments[0]), (b, a)))
        self.count += count

    def _moved(self, values: Factors) -> tuple[float, Factors]:
        """`E` for the map `values`, and `Δ`."""
        b, a = self._factors(self.last)
        moved = reduced(summed([exact(values), (-b, a)]))  # equal parts cancel exactly
        square = inner((moved[0], moved[1] @ unpack(self.total, self.dim)[0]), moved)
        return self.change + float(2 * inner(moved, self._factors(self.cross)) + square), moved

    def _factors(self, rows: Tensor) -> Factors:
        return rows[:, : self.out].mT, rows[:, self.out :]


def _rows(factors: Factors) -> Tensor:
    return torch.cat([factors[0].mT, factors[1]], dim=1)

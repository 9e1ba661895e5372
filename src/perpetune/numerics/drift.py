"""How far learning has moved the answers on old data, from second moments alone: the forgetting certificate."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from perpetune.numerics.lowrank import Factors, exact, inner, reduced, summed
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
        return self._figures(lambda: self._change(values.detach().to(self.last)))

    def _figures(self, measured: Callable[[], float]) -> tuple[float, float | None]:
        if self.count == 0:
            return 0.0, None
        change = measured()
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


class ProductDrift(Drift):
    """The same of a map that is given by its factors, `W = B A` with `B (out, k)` and `A (k, dim)`, of any rank.

    The map itself is never made: `last` and `cross` are kept as factors too, one row `[b | a]` of `out + dim` numbers
    for each rank-one term `b aᵀ`. `Y` gains at most the rank of what was learned since data were last added.

    Args:
        out, dim: of the map.
    """

    def __init__(self, out: int, dim: int):
        super().__init__(1, 0, dim)
        self.out = out
        self.last = torch.zeros(0, out + dim, dtype=torch.float64)
        self.cross = torch.zeros(0, out + dim, dtype=torch.float64)

    def measure_product(self, values: Factors) -> tuple[float, float | None]:
        """As `measure`, of `B A`."""
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
        """`E` with `values`, and `Δ`."""
        b, a = self._factors(self.last)
        moved = reduced(summed([exact(values), (-b, a)]))  # else what is the same in both would leave its rounding
        square = inner((moved[0], moved[1] @ unpack(self.total, self.dim)[0]), moved)
        return self.change + float(2 * inner(moved, self._factors(self.cross)) + square), moved

    def _factors(self, rows: Tensor) -> Factors:
        return rows[:, : self.out].mT, rows[:, self.out :]


def _rows(factors: Factors) -> Tensor:
    return torch.cat([factors[0].mT, factors[1]], dim=1)

"""Streaming ridge regression from sums only: the classifier of RanPAC, arXiv:2307.02251, in float64 (safe.md §4.2).

Rows `h` are `M` wide, targets `y` are one-hot over `C` classes, `w` are the rows' weights (1 where there are none):

    G = Σ w h hᵀ,    Q = Σ w h yᵀ,    A = G + λI,    W = A⁻¹ Q.

`G` is kept packed, half of a dense matrix, and is only ever made dense in the one workspace that Cholesky's
factorisation then overwrites. Nothing here warns or knows of classes by name: that is `heads/ridge.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from perpetune.errors import PerpetuneError, UsageError
from perpetune.seeding import generator

BLOCK = 256  # rows of a packed block
ROWS = 512  # rows or columns converted to float64 at a time, so that memory does not grow with the batch
ESCALATIONS = 12
EXACT = 512  # up to this width all traces are exact instead of estimated
NEAR = 1.25  # rows per column up to which n − df is exact: it may be small beside an estimate's error
EVALUATIONS = 8
DECADE = math.log(10)


def packed_size(m: int) -> int:
    """The length of a packed symmetric `(m, m)` matrix: one half plus half a block."""
    return sum((stop - start) * stop for start, stop in _blocks(m))


def block_rows(packed: Tensor, m: int) -> Iterator[tuple[int, int, Tensor]]:
    """The packed matrix block by block: `(start, stop, G[start:stop, :stop])`, a contiguous view.

    Of a diagonal block the lower triangle counts.

    Raises:
        UsageError: `packed` is not a packed `(m, m)` matrix.
    """
    if packed.shape != (packed_size(m),):
        raise UsageError(f"a packed matrix of width {m} has {packed_size(m)} numbers, got {tuple(packed.shape)}")
    offset = 0
    for start, stop in _blocks(m):
        size = (stop - start) * stop
        yield start, stop, packed[offset : offset + size].view(stop - start, stop)
        offset += size


def add_gram(packed: Tensor, rows: Tensor, weights: Tensor | None) -> None:
    """Add `Σ w h hᵀ` of `rows (B, M)` in place; products are in float64, so neither TF32 nor autocast matters.

    Args:
        packed: packed `(M, M)`, float64.
        rows: `(B, M)` of any floating type.
        weights: `(B,)`, None for 1.

    Raises:
        UsageError: rows that are not finite; nothing is added then.
    """
    if not torch.isfinite(rows).all():
        raise UsageError("a ridge regression got rows that are not finite; their sums would be lost for good")
    for first in range(0, len(rows), ROWS):
        part = rows[first : first + ROWS].detach().to(packed)
        left = part if weights is None else part * weights[first : first + ROWS, None].to(packed)
        for start, stop, block in block_rows(packed, rows.shape[1]):
            block.addmm_(left[:, start:stop].mT, part[:, :stop])


def dense(packed: Tensor, m: int) -> Tensor:
    """The matrix `(m, m)`, exactly symmetric."""
    matrix = packed.new_empty(m, m)
    for start, stop, block in block_rows(packed, m):
        lower = block[:, start:].tril()
        matrix[start:stop, :start] = block[:, :start]
        matrix[:start, start:stop] = block[:, :start].mT
        matrix[start:stop, start:stop] = lower + lower.tril(-1).mT
    return matrix


def diagonal(packed: Tensor, m: int) -> Tensor:
    """The diagonal `(m,)`."""
    return torch.cat([block[:, start:].diagonal() for start, _, block in block_rows(packed, m)])


def trace(packed: Tensor, m: int) -> float:
    """`tr G = Σ w ‖h‖²`."""
    return float(diagonal(packed, m).sum())


@dataclass(frozen=True)
class Factor:
    """`A = G + λI = L Lᵀ`."""

    lower: Tensor
    """`L (M, M)`, float64, zero above its diagonal."""
    penalty: float
    """`λ`, after escalation."""

    def forward(self, right: Tensor) -> Tensor:
        """`L⁻¹ B` for `B (M, k)`."""
        solved: Tensor = torch.linalg.solve_triangular(self.lower, right, upper=False)
        return solved

    def backward(self, right: Tensor) -> Tensor:
        """`L⁻ᵀ B` for `B (M, k)`."""
        solved: Tensor = torch.linalg.solve_triangular(self.lower.mT, right, upper=True)
        return solved

    def solve(self, right: Tensor) -> Tensor:
        """`A⁻¹ B` for `B (M, k)`. (`torch.cholesky_solve` would copy the factor.)"""
        return self.backward(self.forward(right.to(self.lower)))

    def leverage(self, rows: Tensor) -> Tensor:
        """`hᵀ A⁻¹ h` of each of `rows (B, M)`: `(B,)`."""
        parts = [self.forward(part.to(self.lower).mT).square().sum(0) for part in rows.split(ROWS)]
        return torch.cat(parts)

    def inverse_trace(self) -> float:
        """`tr A⁻¹ = ‖L⁻¹‖²`, exact: as many products as the factorisation, and memory for one block of columns."""
        m = len(self.lower)
        blocks = list(_blocks(m))
        # by hand: solve_triangular would copy a triangle that is not a whole matrix
        own = [
            torch.linalg.solve_triangular(corner, torch.eye(len(corner), out=torch.empty_like(corner)), upper=False)
            for corner in (self.lower[start:stop, start:stop] for start, stop in blocks)
        ]
        space, total = self.lower.new_empty(m, BLOCK), 0.0
        for i, (first, end) in enumerate(blocks):
            columns = space[:, : end - first]
            columns[first:end] = own[i]
            for j, (start, stop) in enumerate(blocks[i + 1 :], i + 1):
                inside = self.lower[start:stop, first:start] @ columns[first:start]
                columns[start:stop].addmm_(own[j], inside, beta=0, alpha=-1)
            total += float(torch.linalg.vector_norm(columns[first:])) ** 2
        return total


def factor(packed: Tensor, m: int, penalty: float) -> Factor:
    """Cholesky's factor of `G + λI`, made in one dense workspace that becomes the factor.

    Where rounding has left the matrix not positive definite, `λ` is multiplied by ten, twelve times at most.

    Raises:
        UsageError: a penalty that is not a positive number.
        PerpetuneError: no such penalty makes it positive definite.
    """
    if not (penalty > 0 and math.isfinite(penalty)):
        raise UsageError(f"the penalty of a ridge regression is {penalty}; a positive number is expected")
    space, info = packed.new_empty(m, m), torch.empty((), dtype=torch.int32, device=packed.device)
    used = penalty
    for _ in range(ESCALATIONS + 1):
        for start, stop, block in block_rows(packed, m):
            space[start:stop, :stop] = block
        space.diagonal().add_(used)
        # LAPACK wants columns: the lower triangle of rows is the upper one of columns. Only `out` being the very
        # input, in this layout, is factored without a copy.
        columns = space.mT
        torch.linalg.cholesky_ex(columns, upper=True, out=(columns, info))
        # what is not finite in a row of L reaches that row's diagonal
        if int(info) == 0 and bool(torch.isfinite(space.diagonal()).all()):
            return Factor(space, used)
        used *= 10
    raise PerpetuneError(
        f"the Gram matrix ({m} wide) of a ridge regression is not positive definite with penalties from {penalty:.3g} "
        f"to {used / 10:.3g}; sums of finite features are, so the stored statistics are damaged"
    )


@dataclass(frozen=True)
class Fit:
    """Ridge weights for one penalty, with their generalised cross-validation: Golub, Heath & Wahba 1979,

        `GCV = (RSS / n) / (1 − df / n)²`, `RSS = Σ w ‖y − Wᵀh‖²`, `df = tr(G A⁻¹)`.

    A primal fit whose `df` is over 0.999 `n` repeats its rows, and `GCV` is a quotient of rounding errors: it is
    infinite there, with slope −1, which sends a search to higher penalties.
    """

    weights: Tensor
    """`W (M, C)`, float64."""
    penalty: float
    """`λ`, the one used."""
    gcv: float
    slope: float
    """`d log GCV / d log λ`."""
    freedom: float
    """`df`, the effective degrees of freedom."""
    factor: Factor | None = None
    """Of `A`; None where the fit is dual."""
    curvature: float = 0.0
    """`d² log GCV / d (log λ)²`."""


def primal(packed: Tensor, cross: Tensor, count: float, energy: float, penalty: float, *, probes: int = 48) -> Fit:
    """The fit from sums: one factorisation.

    With `RSS = energy − ⟨W, Q⟩ − λ‖W‖²` and `T = tr A⁻¹`: `dRSS/dλ = 2λ⟨W, A⁻¹W⟩`, `n − df = n − M + λT`,
    `dT/dλ = −tr A⁻²`, `d²T/dλ² = 2 tr A⁻³`. Wider than `EXACT`, the traces are estimated from random signs
    (Hutchinson 1990), the same for every penalty, so that the curve over penalties is smooth and its slope exact.
    With few rows, `T` is mostly the `(M − n) / λ` of directions without rows, and the error of an estimate of that
    would be larger than what is left of `n − df`: then `T` is computed. It cancels in the derivatives.

    Args:
        packed: `G`, packed `(M, M)`.
        cross: `Q (M, C)`, float64.
        count: `n`, the number of rows.
        energy: `Σ w ‖y‖²`, the sum of the weights.
        penalty: `λ`; escalated where `factor` does.
        probes: vectors of signs.

    Raises:
        UsageError: no rows yet, or a penalty that is not positive.
        PerpetuneError: `G + λI` cannot be factored.
    """
    if not (count > 0 and energy > 0):
        raise UsageError(f"a ridge regression needs rows, got {count:g} of summed weight {energy:g}")
    m, classes = cross.shape
    made = factor(packed, m, penalty)
    used = made.penalty
    if m <= EXACT:
        signs, share = torch.eye(m, dtype=torch.float64), 1.0
    else:
        drawn = torch.randint(0, 2, (m, probes), generator=generator("ridge", "probes", m))
        signs, share = drawn.double() * 2 - 1, 1 / probes
    half = made.forward(torch.cat([cross, signs.to(cross)], dim=1))
    full = made.backward(half)
    more = made.forward(full)
    last = made.backward(more[:, :classes])
    # a slice would keep the probes' memory, and columns are not what is stored
    weights = full[:, :classes].clone(memory_format=torch.contiguous_format)
    explained, inverse = _squares(half, classes, share)
    norm, inverse2 = _squares(full, classes, share)
    third, inverse3 = _squares(more, classes, share)
    fourth = float(last.square().sum())
    residual = max(energy - explained - used * norm, 1e-12 * energy)
    exact = made.inverse_trace() if m > EXACT and count < NEAR * m else inverse
    left = count - m + used * exact
    freedom = count - left
    if left < 1e-3 * count:
        return Fit(weights, used, math.inf, -1.0, min(freedom, 0.999 * count), made)
    upper = _in_logs(used, residual, 2 * used * third, 2 * third - 6 * used * fourth)
    below = _in_logs(used, left, inverse - used * inverse2, 2 * used * inverse3 - 2 * inverse2)
    gcv = residual * count / left**2
    slope, curvature = upper[0] - 2 * below[0], upper[1] - 2 * below[1]
    return Fit(weights, used, gcv, slope, freedom, made, curvature)


class Dual:
    """The same fit from the rows themselves: `K = H Hᵀ (n, n)`, one eigendecomposition for all penalties.

    Exact and well-conditioned down to interpolation, and the cheaper way where `n` is well below `M`. Rows and targets
    are multiplied by `√w`.

    Args:
        rows: `(n, M)` of any floating type; kept as they are.
        targets: `(n,)`, int64, below `classes`.
        classes: `C`.
        weights: `(n,)`, positive; None for 1.

    Raises:
        UsageError: no rows, rows that are not finite, a target out of range, or a weight that is not positive.
    """

    def __init__(self, rows: Tensor, targets: Tensor, classes: int, weights: Tensor | None):
        count = len(rows)
        if count == 0 or not torch.isfinite(rows).all():
            raise UsageError(
                f"a ridge regression needs finite rows, got {count}" + (" not all finite" if count else "")
            )
        if weights is not None and not bool((weights > 0).all()):
            raise UsageError("a ridge regression needs positive weights")
        self.rows = rows.detach()
        scale = (
            torch.ones(count, dtype=torch.float64, device=rows.device) if weights is None else weights.double().sqrt()
        )
        self.scale = scale[:, None]
        """`√w (n, 1)`."""
        self.targets = _one_hot(targets, classes).to(self.scale)
        """`(n, C)`."""
        kernel = self.scale.new_zeros(count, count)
        for _, part in self._columns():
            kernel.addmm_(part, part.mT)
        values, self.vectors = torch.linalg.eigh(kernel)
        self.values = values.clamp(min=0)
        self.turned = self.vectors.mT @ (self.scale * self.targets)
        """`Vᵀ √w Y (n, C)`."""

    def fit(self, penalty: float) -> Fit:
        """The fit for one penalty.

        With `α = (K + λI)⁻¹ √w Y` the residuals are `λα`, so `GCV = n ‖α‖² / tr²((K + λI)⁻¹)` and nothing cancels.

        Raises:
            UsageError: a penalty that is not a positive number.
        """
        inverse = self._inverse(penalty)
        inside = self.turned.square().sum(1)
        power = [float((inside * inverse**k).sum()) for k in (2, 3, 4)]
        trace_ = [float((inverse**k).sum()) for k in (1, 2, 3)]
        upper = _in_logs(penalty, power[0], -2 * power[1], 6 * power[2])
        below = _in_logs(penalty, trace_[0], -trace_[1], 2 * trace_[2])
        alpha = self.vectors @ (inverse[:, None] * self.turned)
        weights = alpha.new_empty(self.rows.shape[1], alpha.shape[1])
        for start, part in self._columns():
            weights[start : start + part.shape[1]] = part.mT @ alpha
        count = len(self.rows)
        return Fit(
            weights,
            penalty,
            count * power[0] / trace_[0] ** 2,
            upper[0] - 2 * below[0],
            float((self.values * inverse).sum()),
            curvature=upper[1] - 2 * below[1],
        )

    def leave_one_out(self, penalty: float) -> Tensor:
        """What each row's scores `(n, C)` were if it alone had not been learned: exact (PRESS, Allen 1974).

        Raises:
            UsageError: a penalty that is not a positive number.
        """
        inverse = self._inverse(penalty)
        alpha = self.vectors @ (inverse[:, None] * self.turned)
        own = self.vectors.square() @ inverse
        held_out: Tensor = self.targets - alpha / own[:, None] / self.scale
        return held_out

    def _inverse(self, penalty: float) -> Tensor:
        """Eigenvalues `(n,)` of `(K + λI)⁻¹`."""
        if not (penalty > 0 and math.isfinite(penalty)):
            raise UsageError(f"the penalty of a ridge regression is {penalty}; a positive number is expected")
        inverse: Tensor = 1 / (self.values + penalty)
        return inverse

    def _columns(self) -> Iterator[tuple[int, Tensor]]:
        """`√w H` some columns at a time, float64, each with where it starts."""
        for start in range(0, self.rows.shape[1], ROWS):
            yield start, self.rows[:, start : start + ROWS].to(self.scale) * self.scale


def leave_one_out(factor: Factor, weights: Tensor, rows: Tensor, targets: Tensor, row_weights: Tensor | None) -> Tensor:
    """Scores `(B, C)` of rows that are part of the sums, as if each alone were not: `(z − s y) / (1 − s)` with
    `s = w hᵀA⁻¹h`, exact (PRESS, Allen 1974).

    Args:
        factor: of `A`.
        weights: `W (M, C)` of the same sums and penalty.
        rows: `(B, M)` of any floating type.
        targets: `(B,)`, int64.
        row_weights: `(B,)`, None for 1.

    Raises:
        UsageError: a target out of range.
    """
    hot = _one_hot(targets, weights.shape[1]).to(weights)
    scores = torch.cat([part.to(weights) @ weights for part in rows.split(ROWS)])
    share = factor.leverage(rows)
    if row_weights is not None:
        share = share * row_weights.to(share)
    share = share.clamp(max=1 - 1e-12)[:, None]
    return (scores - share * hot) / (1 - share)


def choose(
    fit: Callable[[float], Fit],
    scale: float,
    start: float | None,
    lowest: float = 1e-9,
    highest: float = 1e2,
    tolerance: float = 0.005,
) -> tuple[Fit, int]:
    """The penalty `κ · scale` with the smallest GCV near where the search starts.

    Newton's steps on `log GCV` over `log λ` within a bracket from the slopes' signs. It ends where another step would
    gain less than `tolerance` of GCV, so a stream that starts at its last penalty usually pays one factorisation a
    task. Plateaus (tiny or huge penalties) are bent the other way and are left by decades. At no time are there two
    factors: where the best penalty was not the last one tried, it is fitted again.

    Args:
        fit: the fit for a penalty; what it returns is let go before it is called again.
        scale: `tr G / M`.
        start: a penalty `λ`, the last one chosen; None for `κ` = 1e-3.
        lowest, highest: bounds of `κ`.
        tolerance: a share of GCV.

    Returns:
        The fit, and how many were made.

    Raises:
        UsageError: a scale or start that is not positive.
    """
    first = 1e-3 * scale if start is None else start
    if not (0 < scale < math.inf and 0 < first < math.inf):
        raise UsageError(f"penalties start at {first} on a scale of {scale}; positive numbers are expected")
    low, high = math.log(lowest * scale), math.log(highest * scale)
    left, right = low, high  # GCV falls left of the minimum that is looked for, and rises right of it
    at, stride = min(max(math.log(first), low), high), DECADE
    tried: list[tuple[float, float]] = []
    last: Fit | None = None
    while len(tried) < EVALUATIONS:
        del last  # its factor goes before the next one is made
        last = fit(math.exp(at))
        at = math.log(last.penalty)
        tried.append((last.gcv, -last.penalty))  # of equals the higher penalty
        if last.slope < 0:
            left = max(left, at)
        else:
            right = min(right, at)
        if last.curvature > 0:
            step = -last.slope / last.curvature
            if -step * last.slope / 2 < tolerance:
                break
            step = min(max(step, -2 * DECADE), 2 * DECADE)
        else:
            step = math.copysign(stride, -last.slope)
            stride = 2 * DECADE
        if right - left < 0.1:
            break
        at += step
        if at <= left or at >= right:
            end = left if at <= left else right
            at = end if end in (low, high) else (left + right) / 2
    assert last is not None
    best = -min(tried)[1]
    if last.penalty == best:
        return last, len(tried)
    del last
    return fit(best), len(tried) + 1


def _blocks(m: int) -> Iterator[tuple[int, int]]:
    for start in range(0, m, BLOCK):
        yield start, min(start + BLOCK, m)


def _squares(columns: Tensor, classes: int, share: float) -> tuple[float, float]:
    """The summed squares of the first `classes` columns, and `share` of those of the others (a trace)."""
    sums = columns.square().sum(0)
    return float(sums[:classes].sum()), share * float(sums[classes:].sum())


def _in_logs(penalty: float, value: float, first: float, second: float) -> tuple[float, float]:
    """Slope and curvature of `log value` over `log λ`, from the derivatives of `value` by `λ`."""
    slope = penalty * first / value
    return slope, slope + penalty**2 * second / value - slope**2


def _one_hot(targets: Tensor, classes: int) -> Tensor:
    """`(n, C)` of `targets (n,)`."""
    if len(targets) and not (int(targets.min()) >= 0 and int(targets.max()) < classes):
        raise UsageError(f"targets from {int(targets.min())} to {int(targets.max())} for {classes} classes")
    return torch.nn.functional.one_hot(targets, classes)

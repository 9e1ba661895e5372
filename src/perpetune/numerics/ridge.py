"""Ridge regression from sums over rows: the classifier of RanPAC, arXiv:2307.02251, in float64.

Rows `h` have the width `M`, targets `y` are one-hot over `C` classes, and `w` are the weights of rows (1 without
weights):

    G = Σ w h hᵀ,    Q = Σ w h yᵀ,    A = G + λI,    W = A⁻¹ Q.

With an intercept the rows are `h = [z, 1]`. Then `G` contains the mean `m` and the deviation `s` of every column over
all rows so far. The regression is solved on `x = (z − m) / s`, with exactly the result of all rows at once
(`Standard`):

    W = (Gₓ + λI)⁻¹ Qₓ,    Gₓ = Σ w x xᵀ,    Qₓ = Σ w x yᵀ,    scores = Wᵀx + ȳ.

The intercept `ȳ`, the mean target, is not penalised.

`G` is stored packed, as half of a dense matrix. It is made dense only in one workspace, which Cholesky's factorisation
then overwrites. This module gives no warnings and does not know names of classes; `heads/ridge.py` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perpetune.errors import PerpetuneError, UsageError
from perpetune.seeding import generator

BLOCK = 256  # rows of a packed block
ROWS = 512  # rows or columns are converted to float64 in parts of this size, so memory does not grow with the batch
ESCALATIONS = 12  # how often a penalty is multiplied by ten at most
EXACT = 512  # up to this width all traces are computed exactly instead of estimated
NEAR = 1.25  # up to as many rows per column n − df is exact, because it may be smaller than an estimate's error
EVALUATIONS = 8  # the most penalties that a search tries
DECADE = math.log(10)
CLOSE = 0.025  # penalties whose logarithms differ by less count as the same
# If the variance of a column is at most this share of its mean square, it is the rounding error of the sums.
CONSTANT = {torch.float64: 1e-10, torch.float32: 1e-5}


def packed_size(m: int) -> int:
    """The length of a packed symmetric `(m, m)` matrix: one half plus half a block."""
    return sum((stop - start) * stop for start, stop in _blocks(m))


def block_rows(packed: Tensor, m: int) -> Iterator[tuple[int, int, Tensor]]:
    """The packed matrix block by block: `(start, stop, G[start:stop, :stop])`, a contiguous view.

    In a diagonal block only the lower triangle is valid.

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


def add_gram(packed: Tensor, rows: Tensor, weights: Tensor | None, *, checked: bool = False) -> None:
    """Add `Σ w h hᵀ` of `rows (B, M)` in place; products are in float64, so neither TF32 nor autocast matters.

    Args:
        packed: packed `(M, M)`, float64, or float32 for sums that are stored in half the space.
        rows: `(B, M)` of any floating type.
        weights: `(B,)`, None for 1.
        checked: whether the rows are known to be finite. To find that out, the program waits for a GPU.

    Raises:
        UsageError: rows are not finite; nothing is added then.
    """
    if not checked and not torch.isfinite(rows).all():
        raise UsageError("a ridge regression got rows that are not finite; they would destroy its sums")
    for first in range(0, len(rows), ROWS):
        part = rows[first : first + ROWS].detach().to(packed.device, torch.float64)
        left = part if weights is None else part * weights[first : first + ROWS, None].to(part)
        for start, stop, block in block_rows(packed, rows.shape[1]):
            if packed.dtype == torch.float64:
                block.addmm_(left[:, start:stop].mT, part[:, :stop])
            else:  # the sums are rounded only once for these rows
                block.copy_(torch.addmm(block.double(), left[:, start:stop].mT, part[:, :stop]))


def dense(packed: Tensor, m: int) -> Tensor:
    """The dense matrix `(m, m)`, exactly symmetric."""
    matrix = packed.new_empty(m, m, dtype=torch.float64)
    for start, stop, block in block_rows(packed.double(), m):
        lower = block[:, start:].tril()
        matrix[start:stop, :start] = block[:, :start]
        matrix[:start, start:stop] = block[:, :start].mT
        matrix[start:stop, start:stop] = lower + lower.tril(-1).mT
    return matrix


def pack(matrix: Tensor, packed: Tensor) -> None:
    """Write a symmetric `matrix (m, m)` into `packed`."""
    for start, stop, block in block_rows(packed, len(matrix)):
        block.copy_(matrix[start:stop, :stop])


def diagonal(packed: Tensor, m: int) -> Tensor:
    """The diagonal `(m,)`."""
    return torch.cat([block[:, start:].diagonal() for start, _, block in block_rows(packed, m)]).double()


def trace(packed: Tensor, m: int) -> float:
    """`tr G = Σ w ‖h‖²`."""
    return float(diagonal(packed, m).sum())


@dataclass(frozen=True)
class Standard:
    """The standardisation of rows `z (M,)`, `x = (z − m) / s`, computed from the sums alone."""

    mean: Tensor
    """`m (M,)`, float64."""
    inverse: Tensor
    """`1/s (M,)`; 0 for a column that is the same in all rows, which excludes it."""
    mass: float
    """`Σ w`."""
    target: Tensor
    """`ȳ (C,)`, the mean of the one-hot targets."""

    @classmethod
    def of(cls, packed: Tensor, cross: Tensor) -> Standard:
        """Compute it from the sums over rows `[z, 1]`.

        Args:
            packed: `G`, packed `(M + 1, M + 1)`.
            cross: `Q (M + 1, C)`.

        Raises:
            UsageError: there are no rows yet.
        """
        width = len(cross)
        *_, (_, _, block) = block_rows(packed, width)
        last = block[-1].double()
        mass = float(last[-1])
        if not mass > 0:
            raise UsageError(f"a ridge regression needs rows, got {mass:g} of them by weight")
        mean, square = last[:-1] / mass, diagonal(packed, width)[:-1] / mass
        variance = square - mean.square()
        varies = variance > CONSTANT[packed.dtype] * square
        return cls(mean, torch.where(varies, variance, 1.0).rsqrt() * varies, mass, cross[-1] / mass)

    def rows(self, z: Tensor) -> Tensor:
        """Standardise rows: `x (B, M)` from `z (B, M)`, float64."""
        return (z.to(self.mean) - self.mean) * self.inverse

    def cross(self, cross: Tensor) -> Tensor:
        """`Qₓ (M, C)` from `Q (M + 1, C)`."""
        return (cross[:-1] - self.mean[:, None] * cross[-1]) * self.inverse[:, None]

    @property
    def energy(self) -> float:
        """`Σ w ‖y − ȳ‖²`."""
        return self.mass * float(1 - self.target.square().sum())

    @property
    def unit(self) -> float:
        """`tr Gₓ / M`."""
        return self.mass * float((self.inverse > 0).double().mean())

    def fill(self, space: Tensor, packed: Tensor) -> None:
        """Write the lower half of `Gₓ` into `space (M, M)`."""
        m = len(self.mean)
        for start, stop, block in block_rows(packed, m + 1):
            end = min(stop, m)
            rows = space[start:end, :end]
            rows.copy_(block[: end - start, :end])
            rows.addr_(self.mean[start:end], self.mean[:end], alpha=-self.mass)
            rows.mul_(self.inverse[start:end, None]).mul_(self.inverse[:end])


@dataclass(frozen=True)
class Factor:
    """`A = G + λI = L Lᵀ`."""

    lower: Tensor
    """`L (M, M)`, float64, zero above its diagonal."""
    penalty: float
    """`λ`, after it was raised if that was necessary."""

    def forward(self, right: Tensor) -> Tensor:
        """`L⁻¹ B` for `B (M, k)`."""
        solved: Tensor = torch.linalg.solve_triangular(self.lower, right, upper=False)
        return solved

    def backward(self, right: Tensor) -> Tensor:
        """`L⁻ᵀ B` for `B (M, k)`."""
        solved: Tensor = torch.linalg.solve_triangular(self.lower.mT, right, upper=True)
        return solved

    def solve(self, right: Tensor) -> Tensor:
        """`A⁻¹ B` for `B (M, k)`. `torch.cholesky_solve` is not used, because it would copy the factor."""
        return self.backward(self.forward(right.to(self.lower)))

    def leverage(self, rows: Tensor) -> Tensor:
        """`hᵀ A⁻¹ h (B,)` for each of `rows (B, M)`."""
        parts = [self.forward(part.to(self.lower).mT).square().sum(0) for part in rows.split(ROWS)]
        return torch.cat(parts)

    def inverse_trace(self) -> float:
        """`tr A⁻¹ = ‖L⁻¹‖²`, exact. It takes as many products as the factorisation, and memory for one block of
        columns."""
        m = len(self.lower)
        blocks = list(_blocks(m))
        # The blocks are inverted one by one, because solve_triangular would copy a triangle inside a larger matrix.
        corners = [
            torch.linalg.solve_triangular(corner, torch.eye(len(corner), out=torch.empty_like(corner)), upper=False)
            for corner in (self.lower[start:stop, start:stop] for start, stop in blocks)
        ]
        space, total = self.lower.new_empty(m, BLOCK), 0.0
        for i, (first, end) in enumerate(blocks):
            columns = space[:, : end - first]
            columns[first:end] = corners[i]
            for j, (start, stop) in enumerate(blocks[i + 1 :], i + 1):
                inside = self.lower[start:stop, first:start] @ columns[first:start]
                columns[start:stop].addmm_(corners[j], inside, beta=0, alpha=-1)
            total += float(torch.linalg.vector_norm(columns[first:])) ** 2
        return total


def factor(packed: Tensor, m: int, penalty: float, standard: Standard | None = None) -> Factor:
    """Cholesky's factor of `G + λI`, computed in one dense workspace that becomes the factor.

    If rounding errors make the matrix not positive definite, `λ` is multiplied by ten, twelve times at most.

    Args:
        packed: packed `(m, m)`. With `standard` packed `(m + 1, m + 1)`, and the factor is that of `Gₓ + λI`.

    Raises:
        UsageError: the penalty is not a positive number.
        PerpetuneError: the matrix is not positive definite with any of these penalties.
    """
    if not (penalty > 0 and math.isfinite(penalty)):
        raise UsageError(f"the penalty of a ridge regression is {penalty}; a positive number is expected")
    space = packed.new_empty(m, m, dtype=torch.float64)
    info, used = torch.empty((), dtype=torch.int32, device=packed.device), penalty
    for _ in range(ESCALATIONS + 1):
        if standard is None:
            for start, stop, block in block_rows(packed, m):
                space[start:stop, :stop] = block
        else:
            standard.fill(space, packed)
        space.diagonal().add_(used)
        # LAPACK stores columns, so the lower triangle in rows is the upper one in columns. Torch factors without a copy
        # only if `out` is the input itself, in this layout.
        columns = space.mT
        torch.linalg.cholesky_ex(columns, upper=True, out=(columns, info))
        # A value that is not finite in a row of L makes the diagonal of that row not finite.
        if int(info) == 0 and bool(torch.isfinite(space.diagonal()).all()):
            return Factor(space, used)
        used *= 10
    raise PerpetuneError(
        f"the Gram matrix ({m} wide) of a ridge regression is not positive definite with penalties from {penalty:.3g} "
        f"to {used / 10:.3g}; with sums of finite features it would be, so the stored statistics are damaged"
    )


@dataclass(frozen=True)
class Fit:
    """Ridge weights for one penalty, with an estimate of their error on examples that they have not seen.

    Let `q` be the error of the prediction for each row if that row had been left out of the regression. The class with
    the highest score does not depend on the scale of the prediction `y − q`, so the error must not depend on it either.
    Otherwise classes with few rows would lead to a far too large penalty, which only makes predictions small. So

        error = min over a of Σ w ‖y − a (y − q)‖² / Σ w ‖y‖²,   error / (1 − error) = (E v − u²) / (E − u)²,
        E = Σ w ‖y‖²,  u = Σ w y·q,  v = Σ w ‖q‖².

    If the rows are available, `q = (y − Wᵀh) / (1 − w hᵀA⁻¹h)` is exact (Allen 1974). From sums alone the estimate is
    that of generalised cross-validation, `(y − Wᵀh) / ρ` with the mean `ρ = 1 − df/n` of the denominators (Golub, Heath
    & Wahba 1979). A `Sample` of rows corrects it: the odds of the error are multiplied by the ratio of the sample's
    exact odds to its estimated ones. Without a sample, and with fewer rows than columns, a few rows that occur twice
    spoil the estimate: their denominators are large and make `ρ` large, and all other rows, whose residuals are nearly
    zero, seem to be predicted well.

    `error` is infinite, with slope −1, in two cases: `E − u` is not positive (a left-out row gets no information about
    its class, as with a single row of every class, or pure interpolation), or `df` of a primal fit is over 0.999 `n`
    (then it is a quotient of rounding errors). This sends a search to higher penalties.
    """

    weights: Tensor
    """`W (M, C)`, float64."""
    penalty: float
    """`λ`, the penalty that was used."""
    error: float
    """From 0 to 1, or infinite."""
    slope: float
    """`d log(error / (1 − error)) / d log λ`."""
    curvature: float
    """`d² log(error / (1 − error)) / d (log λ)²`."""
    freedom: float
    """`df`, the effective degrees of freedom."""
    factor: Factor | None = None
    """The factor of `A`; None in a dual fit."""


@dataclass(frozen=True)
class Sample:
    """Some of the rows that are in the sums. They correct the estimated error; see `Fit`."""

    rows: Tensor
    """`(m, M)`, float64; `m` may be 0 in some of several processes."""
    targets: Tensor
    """`(m,)`, int64."""
    weights: Tensor
    """`(m,)`, float64."""
    total: Callable[[Tensor], Tensor]
    """Sums a tensor over processes, which have different rows."""


def primal(
    packed: Tensor,
    cross: Tensor,
    count: float,
    energy: float,
    penalty: float,
    *,
    sample: Sample | None = None,
    standard: Standard | None = None,
    probes: int = 48,
) -> Fit:
    """The fit from sums; takes one factorisation.

    With `e = Σ w y·(y − Wᵀh) = E − ⟨W, Q⟩`, `r = Σ w ‖y − Wᵀh‖² = e − λ‖W‖²` and `T = tr A⁻¹`: `u = e/ρ`, `v =
    r/ρ²`, `de/dλ = ‖W‖²`, `dr/dλ = 2λ⟨W, A⁻¹W⟩`, `n ρ = n − M + λT`, `dT/dλ = −tr A⁻²`, `d²T/dλ² = 2 tr A⁻³`. For
    widths above `EXACT` the traces are estimated with random signs (Hutchinson 1990). The signs are the same for every
    penalty, so that the curve over penalties is smooth and its slope is that of the curve. With few rows `T` is mostly
    `(M − n) / λ`, from directions without rows, and the error of an estimate would be larger than `n ρ`; then `T` is
    computed exactly. In the derivatives this large part cancels, so they stay estimates, exact to some per cent.

    With `standard` rows and targets are centred: the formulas hold for `x` and `y − ȳ`, and the intercept takes one
    degree of freedom, so `n ρ = n − 1 − M + λT`.

    Args:
        packed: `G`, packed `(M, M)`; with `standard` `(M + 1, M + 1)`.
        cross: `Q (M, C)`, float64; with `standard` `(M + 1, C)`.
        count: `n`, the number of rows.
        energy: `Σ w ‖y‖²`, the sum of the weights; ignored with `standard`, which gives its own.
        penalty: `λ`; raised if `factor` has to raise it.
        sample: rows `z`, not standardised, that correct the error.
        standard: the standardisation of rows; the weights are then those for `x`.
        probes: the number of vectors of random signs.

    Raises:
        UsageError: there are no rows yet, or the penalty is not positive.
        PerpetuneError: `G + λI` cannot be factored.
    """
    if not (count > 0 and energy > 0):
        raise UsageError(f"a ridge regression needs rows, got {count:g} of summed weight {energy:g}")
    if standard is not None:
        cross, energy = standard.cross(cross), standard.energy
    m, classes = cross.shape
    factored = factor(packed, m, penalty, standard)
    used = factored.penalty
    if m <= EXACT:
        signs, share = torch.eye(m, dtype=torch.float64), 1.0
    else:
        random = torch.randint(0, 2, (m, probes), generator=generator("ridge", "probes", m))
        signs, share = random.double() * 2 - 1, 1 / probes
    half = factored.forward(torch.cat([cross, signs.to(cross)], dim=1))
    full = factored.backward(half)
    more = factored.forward(full)
    last = factored.backward(more[:, :classes])
    # A slice would keep the memory of the columns of signs, and its layout is not the one that is stored.
    weights = full[:, :classes].clone(memory_format=torch.contiguous_format)
    explained, inverse = _squares(half, classes, share)
    norm, inverse2 = _squares(full, classes, share)
    third, inverse3 = _squares(more, classes, share)
    fourth = float(last.square().sum())
    exact = factored.inverse_trace() if m > EXACT and count < NEAR * m else inverse
    left = count - (standard is not None) - m + used * exact
    freedom = count - left
    if left < 1e-3 * count or not energy > 0:  # with one class there is nothing to distinguish
        return Fit(weights, used, math.inf, -1.0, 0.0, min(freedom, 0.999 * count), factored)
    unexplained = max(energy - explained, 1e-12 * energy)
    residual = max(unexplained - used * norm, 1e-12 * energy)
    spared = _curve(used, left / count, (inverse - used * inverse2) / count, 2 * (used * inverse3 - inverse2) / count)
    u = _curve(used, unexplained, norm, -2 * third) / spared
    v = _curve(used, residual, 2 * used * third, 2 * third - 6 * used * fourth) / spared / spared
    odds = _odds(energy, u, v)
    if odds is not None and sample is not None:
        odds = odds + _correction(factored, weights, last, spared, sample, standard)
    return Fit(weights, used, *_error(odds), freedom, factored)


def _correction(
    made: Factor, weights: Tensor, inverse: Tensor, spared: _Curve, sample: Sample, standard: Standard | None
) -> _Curve:
    """The log odds of a sample's exact error minus those of its estimated error.

    Args:
        inverse: `A⁻¹ W`.
        spared: `ρ`.

    With `b = A⁻¹ h`: `d hᵀb/dλ = −‖b‖²`, `d² hᵀb/dλ² = 2 bᵀA⁻¹b`, `d Wᵀh/dλ = −(A⁻¹W)ᵀh`, `d² Wᵀh/dλ² = 2 (A⁻¹W)ᵀb`.
    """
    rows, own = sample.rows, sample.weights[:, None]
    hot = _one_hot(sample.targets, weights.shape[1]).to(weights)
    if standard is not None:
        rows, hot = standard.rows(rows), hot - standard.target
    half = made.forward(rows.mT)
    full = made.backward(half)
    more = made.forward(full)
    powers = [part.square().sum(0)[:, None] for part in (half, full, more)]
    missed = _curve(made.penalty, hot - rows @ weights, rows @ inverse, -2 * full.mT @ inverse)
    always = 0.0 if standard is None else 1 / standard.mass  # the intercept's part of the leverage of each row
    kept = (1 - own * (powers[0] + always)).clamp(min=1e-12)
    left = _curve(made.penalty, kept, own * powers[1], -2 * own * powers[2])
    sums = [(own if standard is None else own * hot.square()).sum()[None]]
    for out in (missed / left, missed / spared):
        for curve in (out * hot, out * out):
            sums.append(torch.stack([(own * part).sum() for part in (curve.value, curve.first, curve.second)]))
    energy, *parts = sample.total(torch.cat(sums)).tolist()
    if energy <= 0:
        return _Curve(0.0)
    exact, rough = (_odds(energy, _Curve(*parts[i : i + 3]), _Curve(*parts[i + 3 : i + 6])) for i in (0, 6))
    if exact is None or rough is None:
        return _Curve(0.0)
    return exact - rough


class Dual:
    """The same fit from the rows themselves, by `K = H Hᵀ (n, n)`: one eigendecomposition for all penalties.

    It is exact and well-conditioned even for tiny penalties (interpolation), and cheaper if `n` is well below `M`.
    Rows and targets are multiplied by `√w`.

    Args:
        rows: `(n, M)` of any floating type; they are not converted.
        targets: `(n,)`, int64, below `classes`.
        classes: `C`.
        weights: `(n,)`, positive; None for 1.
        standard: the standardisation of these rows. Then targets are centred too, and the weights are those for `x`.

    Raises:
        UsageError: there are no rows, rows are not finite, a target is out of range, or a weight is not positive.
    """

    def __init__(
        self, rows: Tensor, targets: Tensor, classes: int, weights: Tensor | None, standard: Standard | None = None
    ):
        count = len(rows)
        if count == 0 or not torch.isfinite(rows).all():
            raise UsageError(
                f"a ridge regression needs finite rows, got {count}" + (" not all finite" if count else "")
            )
        if weights is not None and not bool((weights > 0).all()):
            raise UsageError("a ridge regression needs positive weights")
        self.rows, self.standard = rows.detach(), standard
        scale = (
            torch.ones(count, dtype=torch.float64, device=rows.device) if weights is None else weights.double().sqrt()
        )
        self.scale = scale[:, None]
        """`√w (n, 1)`."""
        self.targets = _one_hot(targets, classes).to(self.scale)
        """The targets `(n, C)`; with an intercept `y − ȳ`."""
        self.always = torch.zeros_like(self.scale)
        """The intercept's part of the leverage of each row, `(n, 1)`."""
        if standard is not None:
            self.targets = self.targets - standard.target
            self.always = self.scale.square() / standard.mass
        kernel = self.scale.new_zeros(count, count)
        for _, part in self._columns():
            kernel.addmm_(part, part.mT)
        self.lift = 0.0
        """A number that is added to the eigenvalue of the direction `√w`. Centred rows have no part in this direction,
        so its eigenvalue is only a rounding error, and dividing by it would be harmful. Centred targets have no part in
        it either, so the weights do not change."""
        if standard is not None:
            self.lift = float(kernel.diagonal().mean())
            kernel.addmm_(self.scale, self.scale.mT, alpha=self.lift / standard.mass)
        values, self.vectors = torch.linalg.eigh(kernel)
        self.values = values.clamp(min=0)
        self.turned = self.vectors.mT @ (self.scale * self.targets)
        """`Vᵀ √w Y (n, C)`."""

    def fit(self, penalty: float) -> Fit:
        """The fit for one penalty.

        With `α = (K + λI)⁻¹ √w Y`, `√w q = α / diag (K + λI)⁻¹` is exact for every row. With an intercept the
        denominator is the diagonal of `(K + λI)⁻¹` minus its part `w / (λ Σ w)` along `√w`.

        Raises:
            UsageError: the penalty is not a positive number.
        """
        inverse = self._inverse(penalty)
        powers = [inverse, -(inverse**2), 2 * inverse**3]
        squares = self.vectors.square()
        along = self.lift + penalty
        less = [self.always / along, -self.always / along**2, 2 * self.always / along**3]
        sure = [(squares @ power)[:, None] - one for power, one in zip(powers, less, strict=True)]
        own = _curve(penalty, sure[0].clamp(min=1e-12 / penalty), *sure[1:])
        alphas = _curve(penalty, *(self.vectors @ (power[:, None] * self.turned) for power in powers))
        alpha, missed = alphas.value, alphas / own
        energy = float(self.scale.square().sum()) if self.standard is None else self.standard.energy
        several = energy > 1e-12 * float(self.scale.square().sum())  # with one class there is nothing to distinguish
        odds = _odds(energy, (missed * (self.scale * self.targets)).sum(), (missed * missed).sum()) if several else None
        weights = alpha.new_empty(self.rows.shape[1], alpha.shape[1])
        for start, part in self._columns():
            weights[start : start + part.shape[1]] = part.mT @ alpha
        freedom = float((self.values * inverse).sum())
        if self.standard is not None:
            freedom += 1 - self.lift / along
        return Fit(weights, penalty, *_error(odds), freedom)

    def leave_one_out(self, penalty: float) -> Tensor:
        """The scores `(n, C)` that each row would get if it alone had not been learned; exact (PRESS, Allen 1974).

        Raises:
            UsageError: the penalty is not a positive number.
        """
        inverse = self._inverse(penalty)
        alpha = self.vectors @ (inverse[:, None] * self.turned)
        own = (self.vectors.square() @ inverse)[:, None] - self.always / (self.lift + penalty)
        held_out: Tensor = self.targets - alpha / own.clamp(min=1e-12 / penalty) / self.scale
        return held_out if self.standard is None else held_out + self.standard.target

    def _inverse(self, penalty: float) -> Tensor:
        """Eigenvalues `(n,)` of `(K + λI)⁻¹`."""
        if not (penalty > 0 and math.isfinite(penalty)):
            raise UsageError(f"the penalty of a ridge regression is {penalty}; a positive number is expected")
        inverse: Tensor = 1 / (self.values + penalty)
        return inverse

    def _columns(self) -> Iterator[tuple[int, Tensor]]:
        """`√w H` in groups of columns, float64, each with the index of its first column."""
        for start in range(0, self.rows.shape[1], ROWS):
            part = self.rows[:, start : start + ROWS].to(self.scale)
            if self.standard is not None:
                columns = slice(start, start + part.shape[1])
                part = (part - self.standard.mean[columns]) * self.standard.inverse[columns]
            yield start, part * self.scale


def leave_one_out(
    factor: Factor,
    weights: Tensor,
    rows: Tensor,
    targets: Tensor,
    row_weights: Tensor | None,
    standard: Standard | None = None,
) -> Tensor:
    """The scores `(B, C)` that rows of the sums would get if each of them alone were not in the sums.

    These are `(z − s y) / (1 − s)` with the present scores `z` and `s = w hᵀA⁻¹h`; exact (PRESS, Allen 1974).

    Args:
        factor: the factor of `A`.
        weights: `W (M, C)` of the same sums and penalty.
        rows: `(B, M)` of any floating type.
        targets: `(B,)`, int64.
        row_weights: `(B,)`, None for 1.
        standard: the standardisation of rows, if the weights are those for `x`; then `s` is `w (xᵀA⁻¹x + 1/Σw)`.

    Raises:
        UsageError: a target is out of range.
    """
    hot = _one_hot(targets, weights.shape[1]).to(weights)
    if standard is not None:
        rows = standard.rows(rows)
    scores = torch.cat([part.to(weights) @ weights for part in rows.split(ROWS)])
    share = factor.leverage(rows)
    if standard is not None:
        scores, share = scores + standard.target, share + 1 / standard.mass
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
    """Find the penalty `κ · scale` with the smallest error near the start of the search.

    The search takes Newton's steps on the log odds of the error as a function of `log λ`, within a bracket. It ends
    when another step would gain less than `tolerance`. So a stream that starts at its last penalty usually takes one
    factorisation a task. On plateaus (tiny or huge penalties) the curvature has the wrong sign, and the search takes
    steps of one or two decades. The bracket comes from values, not from slopes: with fewer rows than columns and a
    small penalty the slope is the difference of nearly equal numbers, one of which is estimated, so its sign may be
    wrong. After a step that made the error larger, the next step goes to the other side. Without a last penalty the
    search starts at a high one, where nothing cancels. If left-out rows get no information with any penalty, the result
    is the start. There are never two factors in memory: if the best penalty was not the last one tried, it is fitted
    again.

    Args:
        fit: computes the fit for a penalty; its result is deleted before the next call.
        scale: `tr G / M`.
        start: the last chosen penalty `λ`; None for `κ` = 1.
        lowest: the least `κ`.
        highest: the largest `κ`.
        tolerance: the least gain of a step, in log odds.

    Returns:
        The fit, and the number of fits that were computed.

    Raises:
        UsageError: the scale or the start is not positive.
    """
    first = scale if start is None else start
    if not (0 < scale < math.inf and 0 < first < math.inf):
        raise UsageError(f"penalties start at {first} on a scale of {scale}; positive numbers are expected")
    low, high = math.log(lowest * scale), math.log(highest * scale)
    at: float | None = min(max(math.log(first), low), high)
    search, tries = _Search(low, high, tolerance), 0
    last: Fit | None = None
    while at is not None and tries < EVALUATIONS:
        del last  # frees its factor before the next one is computed
        last, tries = fit(math.exp(at)), tries + 1
        search.tried.append(_Tried(math.log(last.penalty), last.error, last.slope, last.curvature))
        at = search.next()
    assert last is not None
    best = (search.best if math.isfinite(search.best.error) else search.tried[0]).at
    if math.log(last.penalty) == best:
        return last, tries
    del last
    return fit(math.exp(best)), tries + 1


@dataclass(frozen=True)
class _Tried:
    at: float
    """`log λ`."""
    error: float
    slope: float
    curvature: float


class _Search:
    """Chooses the next penalty for `choose`, from all penalties tried so far."""

    def __init__(self, low: float, high: float, tolerance: float):
        self.low, self.high, self.tolerance = low, high, tolerance
        self.tried: list[_Tried] = []
        self.stride = DECADE

    @property
    def best(self) -> _Tried:
        return min(self.tried, key=lambda one: (one.error, -one.at))  # of equal errors the one with the higher penalty

    def next(self) -> float | None:
        """The next `log λ`; None if no step would gain enough."""
        best = self.best
        left = max((one.at for one in self.tried if one.at < best.at), default=None)
        right = min((one.at for one in self.tried if one.at > best.at), default=None)
        side = math.copysign(1.0, -best.slope)
        if best.curvature > 0:
            step = -best.slope / best.curvature
            if abs(step * best.slope) / 2 < self.tolerance:
                return None
            step = min(max(step, -2 * DECADE), 2 * DECADE)
        else:
            step, self.stride = side * self.stride, 2 * DECADE
        ahead, behind = (right, left) if side > 0 else (left, right)
        if ahead is None or side * (ahead - best.at - step) > CLOSE:
            return self._within(best.at + step)
        if behind is None:  # the slope was wrong, or the minimum is near
            return self._within(best.at - side * DECADE)
        half = (ahead - best.at) / 2
        return best.at + half if abs(half * best.slope) > 4 * self.tolerance else None

    def _within(self, at: float) -> float | None:
        at = min(max(at, self.low), self.high)
        return at if all(abs(at - one.at) > CLOSE for one in self.tried) else None


def _blocks(m: int) -> Iterator[tuple[int, int]]:
    for start in range(0, m, BLOCK):
        yield start, min(start + BLOCK, m)


def _squares(columns: Tensor, classes: int, share: float) -> tuple[float, float]:
    """The summed squares of the first `classes` columns, and `share` of those of the others (a trace)."""
    sums = columns.square().sum(0)
    return float(sums[:classes].sum()), share * float(sums[classes:].sum())


@dataclass(frozen=True)
class _Curve:
    """The value of a function of `log λ` at one point, a number or a tensor, with its first and second derivative."""

    value: Any
    first: Any = 0.0
    second: Any = 0.0

    def __add__(self, other: _Curve) -> _Curve:
        return _Curve(self.value + other.value, self.first + other.first, self.second + other.second)

    def __sub__(self, other: _Curve) -> _Curve:
        return _Curve(self.value - other.value, self.first - other.first, self.second - other.second)

    def __mul__(self, other: _Curve | Tensor) -> _Curve:
        if isinstance(other, Tensor):
            return _Curve(self.value * other, self.first * other, self.second * other)
        return _Curve(
            self.value * other.value,
            self.first * other.value + self.value * other.first,
            self.second * other.value + 2 * self.first * other.first + self.value * other.second,
        )

    def __truediv__(self, other: _Curve) -> _Curve:
        value = self.value / other.value
        first = (self.first - value * other.first) / other.value
        return _Curve(value, first, (self.second - 2 * first * other.first - value * other.second) / other.value)

    def sum(self) -> _Curve:
        return _Curve(float(self.value.sum()), float(self.first.sum()), float(self.second.sum()))

    def log(self) -> _Curve:
        first = self.first / self.value
        return _Curve(math.log(self.value), first, self.second / self.value - first**2)


def _curve(penalty: float, value: Any, first: Any, second: Any) -> _Curve:
    """A `_Curve` from a value and its derivatives by `λ`."""
    return _Curve(value, penalty * first, penalty * first + penalty**2 * second)


def _odds(energy: float, u: _Curve, v: _Curve) -> _Curve | None:
    """The log odds of the error of a `Fit`; None if left-out rows get no information about their class."""
    whole = _Curve(energy)
    explained = whole - u
    if explained.value < 1e-6 * energy:
        return None
    odds = (whole * v - u * u) / (explained * explained)
    # Odds under 1e-12 are only rounding errors.
    return odds.log() if odds.value > 1e-12 else _Curve(math.log(1e-12))


def _error(odds: _Curve | None) -> tuple[float, float, float]:
    """The error of a `Fit` with its slope and curvature, from its log odds."""
    if odds is None:
        return math.inf, -1.0, 0.0
    return 1 / (1 + math.exp(-odds.value)), odds.first, odds.second


def _one_hot(targets: Tensor, classes: int) -> Tensor:
    """One-hot rows `(n, C)` for `targets (n,)`.

    Raises:
        UsageError: a target is out of range.
    """
    if len(targets) and not (int(targets.min()) >= 0 and int(targets.max()) < classes):
        raise UsageError(f"targets from {int(targets.min())} to {int(targets.max())} for {classes} classes")
    return torch.nn.functional.one_hot(targets, classes)

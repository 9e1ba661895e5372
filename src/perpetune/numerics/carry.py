"""Sums over old examples follow their features where training has moved those.

Old examples are gone; the new ones are seen twice, before and after training. What happened to their features is
learned as a linear map and done to the sums of the old ones: DPCR (He et al. 2025, arXiv:2503.05423), LDC (Gomez-Villa
et al. 2024, arXiv:2407.08536) and SDC (Yu et al. 2020, arXiv:2004.00440) are of this family.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PENALTIES = tuple(10.0**k for k in range(-13, 3))  # μ as shares of the kernel's mean diagonal
NOISE = 1e-5  # features are float32: what moves by a share up to this stays where it is, but for rounding
FOLDS = 5  # groups of classes that are left out in turn
SURE = 0.98  # the unexplained share below which a map is believed: leaving sums as they are has 1


@dataclass(frozen=True)
class Carry:
    """The map `h → h + h U V` of rows `h (M,)`.

    Attributes:
        left: `U (M, n)`, float64.
        right: `V (n, M)`, float64.
        penalty: `μ` as a share of the kernel's mean diagonal; None where the map does nothing.
        moved: how far training has moved the new rows: `‖after − before‖` as a share of the rows' own deviation.
        unexplained: the share of the movement of left-out classes that the map misses; 1 for no map.
    """

    left: Tensor
    right: Tensor
    penalty: float | None
    moved: float
    unexplained: float

    def __bool__(self) -> bool:
        """Whether it moves anything."""
        return self.penalty is not None

    def of_rows(self, rows: Tensor) -> Tensor:
        """`H (I + U V)` of sums of rows `H (k, M)`."""
        return rows + (rows @ self.left) @ self.right

    def of_gram(self, gram: Tensor) -> Tensor:
        """`(I + U V)ᵀ G (I + U V)` of `G = Σ h hᵀ (M, M)`, symmetric; written into `gram`."""
        through = gram @ self.left  # (M, n)
        inner = self.left.mT @ through
        cross = through + self.right.mT @ (inner / 2)  # half of the last term in each of two products
        gram.addmm_(cross, self.right)
        gram.addmm_(self.right.mT, cross.mT)
        return gram


def follow(before: Tensor, after: Tensor, groups: Tensor, scale: Tensor, centre: Tensor | None = None) -> Carry:
    """The map from the new task's rows before training to those after it.

    With `X = H M` the rows before, standardised, and `D = after − before`: `V = (X Xᵀ + μ I)⁻¹ D` and `U = M Xᵀ`.
    `μ` is what predicts the movement of left-out classes best, for the old rows are of other classes too; where no `μ`
    is better at that than no map, or there is but one class to learn from, or the rows have moved by no more than
    rounding (as behind a protection that lets nothing through), the map does nothing.

    Args:
        before, after: `(n, M)`, float64; with an intercept their last column is 1.
        groups: `(n,)`, int64, the classes.
        scale: `(M,)`: what columns are multiplied by to be of one size, 0 for one that takes no part.
        centre: `(M − 1,)`, subtracted from the others' columns before that, where the last is a constant 1.
    """
    moves = after - before
    if not bool(moves.any()):  # exactly inert
        return _nothing(before, 0.0)
    x = (before if centre is None else torch.cat([before[:, :-1] - centre, before[:, -1:]], 1)) * scale
    kernel, movement = x @ x.mT, (moves * scale) @ (moves * scale).mT
    centred = x - x.mean(0)
    own = float(centred.square().sum())
    moved = math.sqrt(float(movement.trace()) / own) if own > 0 else math.inf
    unit = float(kernel.diagonal().mean())
    folds = _folds(groups)
    if len(folds) < 2 or moved <= NOISE or not (unit > 0 and math.isfinite(moved)):
        return _nothing(before, moved)
    missed = torch.zeros(len(PENALTIES), dtype=torch.float64)
    for out in folds:
        missed += _missed(kernel, movement, out, unit)
    shares = missed / float(movement.trace())
    best = int((shares <= shares.min() + 1e-9).int().argmax())  # of those that rounding alone tells apart the smallest
    unexplained = max(0.0, float(shares[best]))
    if not unexplained < SURE:
        return _nothing(before, moved)
    share = PENALTIES[best]
    values, vectors = _spectrum(kernel)
    right = vectors @ ((vectors.mT @ moves) / (values + share * unit)[:, None])
    left = scale[:, None] * x.mT
    if centre is not None:
        left[-1] -= centre @ left[:-1]
    return Carry(left, right, share, moved, unexplained)


def _spectrum(kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues `(k,)` and eigenvectors `(n, k)`, without those that are rounding errors."""
    values, vectors = torch.linalg.eigh(kernel)
    there = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    return values[there], vectors[:, there]


def _nothing(rows: Tensor, moved: float) -> Carry:
    m = rows.shape[1]
    return Carry(rows.new_zeros(m, 0), rows.new_zeros(0, m), None, moved, 1.0)


def _folds(groups: Tensor) -> Sequence[Tensor]:
    """Masks `(n,)` of the classes that are left out together; none where there is one class alone."""
    classes = groups.unique()
    count = min(FOLDS, len(classes))
    return [] if count < 2 else [torch.isin(groups, classes[fold::count]) for fold in range(count)]


def _missed(kernel: Tensor, movement: Tensor, out: Tensor, unit: float) -> Tensor:
    """For each penalty `‖D_out − K_out,in (K_in + μI)⁻¹ D_in‖²`, from inner products alone."""
    inside = ~out
    values, vectors = _spectrum(kernel[inside][:, inside])
    reach = kernel[out][:, inside] @ vectors  # (o, i)
    cross = vectors.mT @ movement[inside][:, out]  # (i, o)
    square = vectors.mT @ movement[inside][:, inside] @ vectors
    own = float(movement[out][:, out].trace())
    found = []
    for share in PENALTIES:
        guess = reach / (values + share * unit)
        found.append(own - 2 * float((guess * cross.mT).sum()) + float(((guess @ square) * guess).sum()))
    return torch.tensor(found, dtype=torch.float64)

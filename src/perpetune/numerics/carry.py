"""Moves sums over the features of old examples when training has moved the features.

Old examples are not available any more. The features of the new ones are computed twice, before and after training. A
linear map from the first to the second is learned and applied to the sums over old examples. DPCR (He et al. 2025,
arXiv:2503.05423), LDC (Gomez-Villa et al. 2024, arXiv:2407.08536) and SDC (Yu et al. 2020, arXiv:2004.00440) are
methods of this kind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PENALTIES = tuple(10.0**k for k in range(-13, 3))  # μ as shares of the kernel's mean diagonal
NOISE = 1e-5  # a movement up to this share is the rounding of float32 features
FOLDS = 5  # the number of groups of classes; each is left out once
SURE = 0.98  # a map is used only if its unexplained share is below this; no map has the share 1


@dataclass(frozen=True)
class Carry:
    """The map `h → h + h U V` of rows `h (M,)`.

    Attributes:
        left: `U (M, n)`, float64.
        right: `V (n, M)`, float64.
        penalty: `μ` as a share of the kernel's mean diagonal; None if the map changes nothing.
        moved: how far training has moved the new rows: `‖after − before‖` as a share of the rows' own deviation.
        unexplained: the share of the movement of left-out classes that the map does not predict; 1 without a map.
    """

    left: Tensor
    right: Tensor
    penalty: float | None
    moved: float
    unexplained: float

    def __bool__(self) -> bool:
        """Whether the map changes anything."""
        return self.penalty is not None

    def of_rows(self, rows: Tensor) -> Tensor:
        """Apply the map to sums of rows `H (k, M)`: `H (I + U V)`."""
        return rows + (rows @ self.left) @ self.right

    def of_gram(self, gram: Tensor) -> Tensor:
        """Apply the map to the symmetric `G = Σ h hᵀ (M, M)`: `(I + U V)ᵀ G (I + U V)`, written into `gram`."""
        through = gram @ self.left  # (M, n)
        inner = self.left.mT @ through
        cross = through + self.right.mT @ (inner / 2)  # half of the last term in each of two products
        gram.addmm_(cross, self.right)
        gram.addmm_(self.right.mT, cross.mT)
        return gram


def follow(before: Tensor, after: Tensor, groups: Tensor, scale: Tensor, centre: Tensor | None = None) -> Carry:
    """Learn the map from the new task's rows before training to the rows after training.

    Let `X = H M` be the standardised rows before training and `D = after − before`. The map is
    `V = (X Xᵀ + μ I)⁻¹ D` and `U = M Xᵀ`. `μ` is the penalty that predicts the movement of left-out classes best,
    because the old rows belong to other classes too. The map changes nothing if no `μ` predicts better than no map, if
    there is only one class, or if the rows have moved only by rounding errors (as under full protection).

    Args:
        before, after: `(n, M)`, float64; with an intercept their last column is 1.
        groups: `(n,)`, int64, the classes.
        scale: `(M,)`, factors that give all columns the same size; 0 excludes a column.
        centre: `(M − 1,)`, subtracted from the columns before scaling if the last column is the constant 1.
    """
    moves = after - before
    if not bool(moves.any()):  # the features have not changed at all
        return _nothing(before, 0.0)
    x = (before if centre is None else torch.cat([before[:, :-1] - centre, before[:, -1:]], 1)) * scale
    kernel, movement = x @ x.mT, (moves * scale) @ (moves * scale).mT
    centred = x - x.mean(0)
    deviation = float(centred.square().sum())
    moved = math.sqrt(float(movement.trace()) / deviation) if deviation > 0 else math.inf
    unit = float(kernel.diagonal().mean())
    folds = _folds(groups)
    if len(folds) < 2 or moved <= NOISE or not (unit > 0 and math.isfinite(moved)):
        return _nothing(before, moved)
    missed = torch.zeros(len(PENALTIES), dtype=torch.float64)
    for out in folds:
        missed += _missed(kernel, movement, out, unit)
    shares = missed / float(movement.trace())
    # Of penalties that are equal up to rounding the smallest
    best = int((shares <= shares.min() + 1e-9).int().argmax())
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
    """Eigenvalues `(k,)` and eigenvectors `(n, k)`, without those that are only rounding errors."""
    values, vectors = torch.linalg.eigh(kernel)
    kept = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    return values[kept], vectors[:, kept]


def _nothing(rows: Tensor, moved: float) -> Carry:
    m = rows.shape[1]
    return Carry(rows.new_zeros(m, 0), rows.new_zeros(0, m), None, moved, 1.0)


def _folds(groups: Tensor) -> Sequence[Tensor]:
    """A mask `(n,)` for each group of classes that are left out together; empty if there is only one class."""
    classes = groups.unique()
    count = min(FOLDS, len(classes))
    return [] if count < 2 else [torch.isin(groups, classes[fold::count]) for fold in range(count)]


def _missed(kernel: Tensor, movement: Tensor, out: Tensor, unit: float) -> Tensor:
    """For each penalty the error on left-out rows, `‖D_out − K_out,in (K_in + μI)⁻¹ D_in‖²`, from inner products."""
    inside = ~out
    values, vectors = _spectrum(kernel[inside][:, inside])
    reach = kernel[out][:, inside] @ vectors  # (o, i)
    cross = vectors.mT @ movement[inside][:, out]  # (i, o)
    square = vectors.mT @ movement[inside][:, inside] @ vectors
    whole = float(movement[out][:, out].trace())
    errors = []
    for share in PENALTIES:
        guess = reach / (values + share * unit)
        errors.append(whole - 2 * float((guess * cross.mT).sum()) + float(((guess @ square) * guess).sum()))
    return torch.tensor(errors, dtype=torch.float64)

"""Linear discriminants of classes that share one covariance, from sums over rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Discriminant:
    """Scores `(q − m)ᵀ w_c + b_c` of rows `q (D,)`: the log-likelihood of a class up to a constant of the row.

    The rows and the means are measured from one centre `m`. This changes no comparison, and the scores keep the digits
    that a large common part of the rows would cost.
    """

    centre: Tensor
    """`m (D,)`."""
    weight: Tensor
    """`w (C, D)`."""
    offset: Tensor
    """`b (C,)`; -inf for a class without rows."""


def discriminant(
    sums: Tensor, counts: Tensor, square: Tensor, shrink: float, centre: Tensor | None = None
) -> Discriminant:
    """The discriminant from sums over rows, all float64.

    With `μ_c = s_c / n_c` and `Σ = (Q − Σ_c n_c μ_c μ_cᵀ) / n`:
    `Σ' = Σ + shrink · tr(Σ) / D · I`, `w_c = Σ'⁻¹ (μ_c − m)`, `b_c = −½ (μ_c − m)ᵀ w_c`. If all rows are at the means
    of their classes, `Σ'` is the unit matrix, and the nearest mean has the highest score.

    Args:
        sums: `s (C, D)`.
        counts: `n_c (C,)`.
        square: `Q (D, D)`, the sum of `q qᵀ` over all rows of all classes.
        shrink: how much of the unit matrix is added, as a share of the mean variance; positive.
        centre: `m (D,)`; None is the mean of all rows.
    """
    known = counts > 0
    counts = counts.to(sums)
    total = counts.sum()
    means = sums / counts.clamp(min=1)[:, None]
    middle = sums.sum(0) / total if centre is None else centre
    scatter = (square - (means * counts[:, None]).mT @ means) / total
    unit = float(scatter.trace()) / len(scatter)
    eye = torch.eye(len(scatter), dtype=sums.dtype)
    # What is left of the squares may be their rounding alone
    rounding = 1e2 * torch.finfo(sums.dtype).eps * float(square.trace() / total) / len(scatter)
    full = (scatter + scatter.mT) / 2 + shrink * unit * eye if unit > rounding else eye
    away = means - middle
    weight = torch.cholesky_solve(away.mT, torch.linalg.cholesky(full)).mT
    offset = (-0.5 * (away * weight).sum(1)).masked_fill(~known, -torch.inf)
    return Discriminant(middle, weight, offset)

"""Losses that compare a student's features with a teacher's, sample by sample or dimension by dimension.

These are losses of the slow and the fast learner of SAFE, Zhao et al. 2024, arXiv:2411.02175.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from perpetune.numerics.exact import exactly


def correlation_losses(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """`Σ_i (C_ii − 1)²` and `Σ_{i≠j} C_ij²` of the correlation `C = Σ_b ŝ_b t̂_bᵀ / B` of features `(B, D)`.

    Each sample is normalised; nothing is centred. The matrix `C (D, D)` is not computed, because
    `‖C‖² = Σ_bc (ŝ_b·ŝ_c)(t̂_b·t̂_c) / B²` takes only O(B² D). The first loss is in `[D − 2, D + 3]`, the second in
    `[0, 1]`.
    """
    s, t = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    diagonal = (s * t).mean(0)
    # Half precision is too coarse for the small difference of two sums
    with exactly(s.device):
        square = (s @ s.mT * (t @ t.mT)).sum() / len(s) ** 2
    return (diagonal - 1).pow(2).sum(), square - diagonal.pow(2).sum()


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """The mean over samples of `1 − cos(a_b, b_b)` for features `(B, D)`; 0 if all pairs are parallel."""
    return (1 - F.cosine_similarity(a, b, dim=-1)).mean()

"""How close a student's features are to a teacher's, sample by sample and dimension by dimension.

SAFE, Zhao et al. 2024, arXiv:2411.02175, the losses of its slow and of its fast learner.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def correlation_losses(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """`Σ_i (C_ii − 1)²` and `Σ_{i≠j} C_ij²` of the correlation `C = Σ_b ŝ_b t̂_bᵀ / B` of features `(B, D)`.

    Each sample is normalised; nothing is centred. `C (D, D)` is never made: `‖C‖² = Σ_bc (ŝ_b·ŝ_c)(t̂_b·t̂_c) / B²`,
    in O(B² D). The first lies in `[D − 2, D + 3]`, the second in `[0, 1]`.
    """
    s, t = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    diagonal = (s * t).mean(0)
    with torch.autocast(s.device.type, enabled=False):  # a small difference of two sums is not left to half precision
        square = (s @ s.mT * (t @ t.mT)).sum() / len(s) ** 2
    return (diagonal - 1).pow(2).sum(), square - diagonal.pow(2).sum()


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """The mean over samples of `1 − cos(a_b, b_b)`, for features `(B, D)`: 0 where they are parallel."""
    return (1 - F.cosine_similarity(a, b, dim=-1)).mean()

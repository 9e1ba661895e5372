"""Scores of members for queries, and the members with the highest ones, so that no query depends on its companions."""

from __future__ import annotations

import torch
from torch import Tensor


def products(rows: Tensor, matrix: Tensor) -> Tensor:
    """`rows @ matrix.T`, `(B, M)` from `(B, D)` and `(M, D)`.

    On the CPU, outside of training, each row is multiplied by itself: a product of matrices adds up in another order
    for another number of rows, and so the companions of a row would decide its last bits.
    """
    if rows.device.type != "cpu" or torch.is_grad_enabled() or not len(rows):
        return rows @ matrix.mT
    # A copy of a row starts at an aligned address; the order of additions may depend on that too.
    return torch.stack([matrix @ row.clone() for row in rows])


def best(scores: Tensor, count: int) -> Tensor:
    """Numbers of the `count` highest of `scores (B, M)`, the highest first and equal ones in order, int64 `(B, k)`.

    There are `k = min(count, M)`; a score that is no number is below all others.
    """
    scores = _ordered(scores)
    if count == 1:
        return lowest(scores, torch.arange(scores.shape[1], device=scores.device))[:, None]
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :count]


def lowest(scores: Tensor, owners: Tensor) -> Tensor:
    """The owner of the highest of `scores (B, R)` in each row; of owners with equal scores the lowest, int64 `(B,)`.

    Args:
        owners: int64 `(R,)`, not negative.
    """
    scores = _ordered(scores)
    return torch.where(scores == scores.amax(1, keepdim=True), owners, owners.max() + 1).amin(1)


def _ordered(scores: Tensor) -> Tensor:
    return scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)

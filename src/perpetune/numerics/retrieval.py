"""Retrieval between pictures and texts: recall at k, and the loss that trains for it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def wrong_above(scores: Tensor, own: Tensor, margin: float = 0.0) -> Tensor:
    """For each row the number of wrong columns that score at least as high as its best own column, int64 `(N,)`.

    A tie counts against the model, and so does a score that is no number. So a model whose scores are all equal finds
    nothing. A row without an own column has all columns above.

    Args:
        scores: `(N, M)`.
        own: bool `(N, M)`, the columns that belong to each row.
        margin: scores that differ by no more than this are a tie.
    """
    best = scores.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
    return (~(scores < best - margin) & ~own).sum(1)


def recall(scores: Tensor, own: Tensor, k: int, margin: float = 0.0) -> float:
    """Recall at k: the share of rows whose best own column is among the first k columns.

    A row is hit if fewer than `k` wrong columns score at least as high. For the other direction, transpose both.

    Args:
        scores, own, margin: as in `wrong_above`.
        k: at least 1.
    """
    return float((wrong_above(scores, own, margin) < k).double().mean())


def contrastive(logits: Tensor, matches: Tensor) -> Tensor:
    """The symmetric contrastive loss (InfoNCE) of `B` pictures and `B` texts, a scalar; the targets are shared.

    `(CE(logits, P) + CE(logitsᵀ, Q)) / 2`, where row i of `P` has 1/n at the n texts that match picture i, and row j of
    `Q` the same for text j. Where nothing repeats, `P` and `Q` are the diagonal. With the diagonal alone, a caption
    that stands twice in a batch would be pushed away from a picture that it describes.

    Args:
        logits: `(B, B)`, scaled scores of pictures (rows) and texts (columns).
        matches: bool `(B, B)`, whether a text describes a picture; each row and column has at least one.
    """
    shares = matches.to(logits.dtype)
    rows, columns = shares / shares.sum(1, keepdim=True), shares.T / shares.T.sum(1, keepdim=True)
    return (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, columns)) / 2

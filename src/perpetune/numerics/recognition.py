"""Whether a model of pictures and names sees what is not there: measures of false recognition without a language model.

The idea of asking for things that are present and for things that are absent is that of POPE (Li et al. 2023, arXiv
2305.10355). Here the answers are scores of pairs (picture, name), and the threshold between no and yes is that of the
untouched model.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def equal_error_threshold(present: Tensor, absent: Tensor) -> float:
    """The threshold at which the shares of missed and of false yes are nearest to each other; the lowest of several.

    Thresholds lie half way between neighbouring scores.

    Args:
        present, absent: scores `(P,)` and `(A,)` of pairs whose name is in the picture, and is not.
    """
    scores = torch.cat([present, absent]).double().sort().values
    between = (scores[1:] + scores[:-1]) / 2
    missed = torch.searchsorted(present.double().sort().values, between).double() / len(present)
    false = 1 - torch.searchsorted(absent.double().sort().values, between).double() / len(absent)
    return float(between[(missed - false).abs().argmin()])


def false_yes(absent: Tensor, threshold: float) -> float:
    """The share of absent names whose score reaches the threshold."""
    return float((absent.double() >= threshold).double().mean())


def missed_yes(present: Tensor, threshold: float) -> float:
    """The share of present names whose score does not reach the threshold."""
    return float((present.double() < threshold).double().mean())


def attraction(scores: Tensor, targets: Tensor, newest: Tensor) -> tuple[float, float]:
    """How much the newest classes draw to themselves: of pictures of other classes, the share that is answered with
    one of them, and the mean of their summed scores.

    Args:
        scores: `(N, C)`; probabilities, where the second number is to mean a share.
        targets: int64 `(N,)`.
        newest: int64, the columns of the newest classes.
    """
    other = ~torch.isin(targets, newest)
    drawn = torch.isin(scores.argmax(1), newest)[other]
    return float(drawn.double().mean()), float(scores[other][:, newest].sum(1).double().mean())


def modality_gap(pictures: Tensor, texts: Tensor) -> float:
    """`‖mean f̂ − mean t̂‖` of features `(N, D)` and `(M, D)`, each normalised to length 1; from 0 to 2.

    How near both kinds of features are to each other tells how much of the pretraining is left.
    """
    means = [F.normalize(some.double(), dim=-1).mean(0) for some in (pictures, texts)]
    return float((means[0] - means[1]).norm())

"""The answers of two classifiers joined: one knows any class by its name, an expert only learned ones.

The expert speaks only where the first one finds a learned class the likeliest: RAIL, Xu et al. 2024, arXiv:2406.18868.
So a picture of a class that was not learned is answered as before, after any number of tasks.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Gate = Literal["zero_shot", "none"]
STEP = 1e-6  # how far the best learned class stays below the best other one where the gate is shut


def class_texts(features: Tensor) -> Tensor:
    """`(C, D)` of length 1: the mean of each class's normalised texts, from features of its templates `(C, K, D)`.

    Each text is normalised before the mean, so a long one does not count for more.
    """
    return F.normalize(F.normalize(features, dim=-1).mean(1), dim=-1)


def gate_open(probabilities: Tensor, learned: Tensor, gate: Gate = "zero_shot") -> Tensor:
    """Bool `(B,)`: whether the expert may speak, because a learned class is the likeliest of all candidates."""
    if gate == "none":
        return torch.ones(len(probabilities), dtype=torch.bool, device=probabilities.device)
    rest = probabilities.clone()
    rest[:, learned] = -torch.inf
    return probabilities[:, learned].amax(1) >= rest.amax(1)


def fused(probabilities: Tensor, expert: Tensor, learned: Tensor, share: float, gate: Gate = "zero_shot") -> Tensor:
    """Scores `(B, K)` over all candidates, of which any columns may be left out afterwards.

    With `p` the probabilities, `h` the expert's scores and `β` the share, all candidates together are answered as RAIL
    answers: where the gate is open by `(1 − β) p + β h` (`h` is 0 for a class that was not learned), else by `p`. The
    scores of learned classes are shifted together, by one number for each row, so that among them the expert decides
    even where the gate is shut. A caller that asks only some of the classes gets what it would get if it had asked
    among them alone.

    Args:
        probabilities: `(B, K)` over the candidates.
        expert: `(B, L)`, scores near 0 and 1.
        learned: int64 `(L,)`, the columns of the classes that the expert knows.
        share: `β` in [0, 1]; with 0 the answer is that of the probabilities.
        gate: `none` lets the expert speak always.
    """
    if not len(learned) or share == 0:
        return probabilities
    others = torch.ones(probabilities.shape[1], dtype=torch.bool, device=probabilities.device)
    others[learned] = False
    p_learned, p_others = probabilities[:, learned], probabilities[:, others]
    joined = (1 - share) * p_learned + share * expert.to(probabilities)
    if not bool(others.any()):
        scores = torch.empty_like(probabilities)
        scores[:, learned] = joined
        return scores
    best, opened = p_others.amax(1), gate_open(probabilities, learned, gate)
    shift = (joined.amax(1) - best).clamp(min=0) + STEP
    scores = torch.empty_like(probabilities)
    scores[:, others] = torch.where(opened[:, None], (1 - share) * p_others, p_others)
    scores[:, learned] = joined - torch.where(opened, 0.0, shift)[:, None]
    return scores

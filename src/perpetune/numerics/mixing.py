"""One answer from two learners: the surer one counts more."""

from __future__ import annotations

import torch
from torch import Tensor

LOWEST = -1e30  # stands for the score −inf of a class without examples, where it is multiplied


def entropy(scores: Tensor) -> Tensor:
    """Entropy in nats, `(B,)`, of the softmax of `scores (B, C)`; a class of score −inf has no part in it."""
    log = scores.log_softmax(-1)
    return -(log.exp() * log.clamp(min=LOWEST)).sum(-1)


def mix(first: Tensor, second: Tensor, sharpness: float) -> tuple[Tensor, Tensor]:
    """`α z₁ + (1 − α) z₂` for scores `(B, C)`, and `α (B,)`: the softmax of `−γ` times the two entropies.

    `sharpness` is γ: 0 is the plain mean, and the larger it is, the more the learner of lower entropy decides.
    SAFE, Zhao et al. 2024, arXiv:2411.02175, section on inference.
    """
    both = torch.stack([entropy(first), entropy(second)])
    share = (-sharpness * both).softmax(0)[0]
    alpha = share.unsqueeze(-1)
    mixed = alpha * first.clamp(min=LOWEST) + (1 - alpha) * second.clamp(min=LOWEST)
    return mixed.masked_fill(first.isneginf() & second.isneginf(), -torch.inf), share

"""Mixes the scores of two learners; the learner with the lower entropy counts more."""

from __future__ import annotations

import torch
from torch import Tensor

LOWEST = -1e30  # replaces the score −inf of a class without examples in products


def entropy(scores: Tensor) -> Tensor:
    """Entropy in nats, `(B,)`, of the softmax of `scores (B, C)`. A class with the score −inf does not count."""
    log = scores.log_softmax(-1)
    return -(log.exp() * log.clamp(min=LOWEST)).sum(-1)


def mix(first: Tensor, second: Tensor, sharpness: float) -> tuple[Tensor, Tensor]:
    """The mixture `α z₁ + (1 − α) z₂` of scores `(B, C)`, and `α (B,)`, the softmax of `−γ` times the two entropies.

    SAFE, Zhao et al. 2024, arXiv:2411.02175, section on inference.

    Args:
        sharpness: γ. 0 gives the plain mean; the larger γ, the more the learner with the lower entropy decides.
    """
    both = torch.stack([entropy(first), entropy(second)])
    share = (-sharpness * both).softmax(0)[0]
    alpha = share.unsqueeze(-1)
    mixed = alpha * first.clamp(min=LOWEST) + (1 - alpha) * second.clamp(min=LOWEST)
    return mixed.masked_fill(first.isneginf() & second.isneginf(), -torch.inf), share

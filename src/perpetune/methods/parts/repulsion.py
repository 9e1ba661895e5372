"""A loss that pushes features from each other and from the mean features of earlier classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perpetune.heads.ncm import NCM

TEMPERATURE = 0.8


def repulsion(means: Tensor, features: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """`CE(Z Zᵀ / temperature, identity)` with the rows of `Z`: means `(C, D)` and features `(B, D)` of length 1.

    HiDe-Prompt, Wang et al. 2023, arXiv:2310.07234. Its released code leaves the rows as long as they are, so the loss
    depends on the scale of the features; on vectors of length 1 both are the same.
    """
    rows = F.normalize(torch.cat([means.to(features), features]), dim=-1)
    return F.cross_entropy(rows @ rows.mT / temperature, torch.arange(len(rows), device=rows.device))


class Repulsion(nn.Module):
    """The loss, with the mean features of all classes that were learned.

    The loss compares the examples that are computed at once. So it depends on how the examples of a step are divided
    among micro-batches and processes.

    Args:
        dim: width of the features.
        weight: factor on the loss.
    """

    def __init__(self, dim: int, weight: float):
        super().__init__()
        self.weight = weight
        self.means = NCM(dim)

    def grow(self, classes: Sequence[str], generator: torch.Generator) -> None:
        """Make room for the means of these classes."""
        self.means.grow(classes, generator)

    def loss(self, features: Tensor) -> Tensor:
        """The weighted loss of a batch of features `(B, D)`, a scalar."""
        return self.weight * repulsion(self.means.means, features.float())

"""K-means of weighted points, in float64. The order of the points does not matter."""

from __future__ import annotations

import torch
from torch import Tensor

STARTS = 4  # the best of so many starts is taken
ROUNDS = 100  # the most rounds of one start


def kmeans(points: Tensor, weights: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Centres of groups of points with a small `Σ w ‖x − c‖²`.

    Starts are drawn as in k-means++ (Arthur & Vassilvitskii 2007); then points and centres move in turns (Lloyd 1982).

    Args:
        points: `(N, D)`, float64 on the CPU, at least one.
        weights: positive `(N,)`.
        count: the number of centres; there are fewer if fewer points differ.

    Returns:
        The centres `(k, D)`, ordered by their first coordinate that differs, and the weights of their groups `(k,)`.
    """
    order = torch.argsort(points @ torch.linspace(1, 2, points.shape[1], dtype=points.dtype), stable=True)
    points, weights = points[order], weights[order]
    found: tuple[float, Tensor, Tensor] | None = None
    for _ in range(STARTS if count > 1 else 1):
        one = _from_start(points, weights, _start(points, weights, count, generator))
        if found is None or one[0] < found[0]:
            found = one
    assert found is not None
    _, centres, mass = found
    ranked = sorted(range(len(centres)), key=lambda k: centres[k].tolist())
    return centres[ranked], mass[ranked]


def _start(points: Tensor, weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Numbers of up to `count` different points, each drawn by its squared distance from those before it."""
    picked: list[int] = []
    chances = weights
    nearest = torch.full_like(weights, torch.inf)
    while len(picked) < count:
        picked.append(int(torch.multinomial(chances, 1, generator=generator)))
        nearest = torch.minimum(nearest, (points - points[picked[-1]]).square().sum(1))
        chances = weights * nearest
        if not float(chances.sum()) > 0:
            break
    return points[picked]


def _from_start(points: Tensor, weights: Tensor, centres: Tensor) -> tuple[float, Tensor, Tensor]:
    """The loss, the centres and the weights of their groups where rounds from `centres` come to rest."""
    square = points.square().sum(1)
    before: Tensor | None = None
    for _ in range(ROUNDS):
        distances = square[:, None] - 2 * points @ centres.mT + centres.square().sum(1)
        nearest = distances.argmin(1)
        if before is not None and torch.equal(nearest, before):
            break
        before = nearest
        mass = torch.zeros(len(centres), dtype=points.dtype).index_add_(0, nearest, weights)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points * weights[:, None])
        # A centre that has lost all its points stays where it is
        centres = torch.where(mass[:, None] > 0, sums / mass.clamp(min=torch.finfo(mass.dtype).tiny)[:, None], centres)
    assert before is not None
    mass = torch.zeros(len(centres), dtype=points.dtype).index_add_(0, before, weights)
    loss = float((weights * (points - centres[before]).square().sum(1)).sum())
    return loss, centres[mass > 0], mass[mass > 0]

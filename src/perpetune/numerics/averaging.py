"""The weight of the old average in a step, `θ* ← β old + (1 − β) θ`: fixed by what is kept, or computed in each step.

Notation, for each tensor: `g` the gradient at the step's start and `Δg` its change since the step before; `Δθ` the
step; `δ = θ − old`. All sizes are L1 norms.
"""

from __future__ import annotations

from torch import Tensor


def weight_that_keeps(keep: float, steps: int) -> float:
    """`β` with `β^steps = keep`: the start has the weight `keep` in the average after so many steps."""
    weight: float = keep ** (1 / steps)
    return weight


def published_weight(gradient: Tensor, change: Tensor, step: Tensor, distance: Tensor) -> Tensor:
    """LLaCA's weight `(‖g‖ + 1) ‖Δθ‖ / (‖δ‖ ‖Δg‖)`, arXiv:2410.10868, `(K,)`.

    Reconstructed: the second derivative of the paper is a difference quotient here. The `1` has no unit, so the weight
    depends on the scale of the loss, on the size of the tensor and on the learning rate.

    Args:
        gradient, change, step, distance: `‖g‖`, `‖Δg‖`, `‖Δθ‖` and `‖δ‖` of `K` tensors, `(K,)` each.
    """
    return (gradient + 1) * step / (distance * change)


def curvature_weight(gradient: Tensor, change: Tensor, step: Tensor, distance: Tensor, base: float) -> Tensor:
    """`(‖g‖/‖δ‖ + μ) / (h + μ)` with the curvature `h = ‖Δg‖/‖Δθ‖` and `μ = h base / (1 − base)`, `(K,)`.

    It minimises the loss to second order plus `½ μ ‖θ* − old‖²`. Since `μ` is a share of `h`, no scale of the loss or
    of the parameters changes it. It equals `base + (1 − base) ‖g‖/(h ‖δ‖)`, so it is `base` where the gradient is zero.
    """
    return base + (1 - base) * gradient * step / (distance * change)

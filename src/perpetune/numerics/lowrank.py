"""Matrices of low rank as their factors: `W = B A`, `B (o, r)` and `A (r, d)`. `W` itself is never made."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]  # B (..., o, r) and A (..., r, d)


def inner(left: Factors, right: Factors) -> Tensor:
    """`⟨B A, B' A'⟩ = tr((Bᵀ B')(A' Aᵀ))`, the inner product of all entries, `(...)`; ranks may differ."""
    (b, a), (b2, a2) = left, right
    return ((b.mT @ b2) * (a @ a2.mT)).sum((-2, -1))


def cosine(left: Factors, right: Factors, least: Tensor | float = 0.0) -> Tensor:
    """`⟨W, W'⟩ / (max(‖W‖, least) max(‖W'‖, least))`, `(...)`, in [-1, 1]; 0 where one is 0.

    The cosine where norms are at least `least`. Below, the result shrinks with the norm, and its gradient is at most
    `1 / least`: that of the cosine itself has no bound at zero, where rounding alone would decide on the direction.
    """
    tiny = torch.finfo(left[0].dtype).tiny ** 0.5  # so that not even the product of both slopes overflows
    own, other = (inner(one, one).clamp(min=least**2).clamp(min=tiny).sqrt() for one in (left, right))
    return inner(left, right) / own / other


def merged(parts: Sequence[Factors], weights: Sequence[float], rank: int) -> Factors:
    """Factors of rank `rank` nearest to the mean `Σ w_i B_i A_i / Σ w_i`, in the sum of squares of all entries.

    By the singular value decomposition of the small matrix between the orthonormal bases of all `B_i` and all `A_i`;
    the two factors get the roots of the singular values, and signs with which the largest entry of each column of `B`
    is positive: a decomposition leaves them to rounding, and processors differ in it. In float64 on the CPU, for
    Apple's GPUs have no such numbers; returned in the type and place of the first.
    """
    total = sum(weights)
    b = torch.cat([w / total * b.cpu().double() for w, (b, _) in zip(weights, parts, strict=True)], dim=-1)  # (o, Σ r)
    a = torch.cat([a.cpu().double() for _, a in parts], dim=-2)  # (Σ r, d)
    left, small_left = torch.linalg.qr(b)
    right, small_right = torch.linalg.qr(a.mT)
    u, values, v = torch.linalg.svd(small_left @ small_right.mT)
    kept = min(rank, len(values))
    roots, columns = values[:kept].sqrt(), left @ u[:, :kept]
    signs = columns.gather(0, columns.abs().argmax(0, keepdim=True)).sign()
    new_b, new_a = columns * signs * roots, (v[:kept] @ right.mT) * (signs * roots).mT
    if kept < rank:  # fewer directions than asked for
        new_b = torch.nn.functional.pad(new_b, (0, rank - kept))
        new_a = torch.nn.functional.pad(new_a, (0, 0, 0, rank - kept))
    return new_b.to(parts[0][0]), new_a.to(parts[0][1])


def exact(factors: Factors) -> Factors:
    """The same in float64 on the CPU, without a gradient."""
    b, a = factors
    return b.detach().cpu().double(), a.detach().cpu().double()  # not at once: see `moved_exactly`


def moved_exactly(rows: Tensor, like: Tensor) -> Tensor:
    """`rows` where `like` is, and then of its type: asked for both at once, torch converts before it moves, and Apple's
    GPUs have no float64."""
    return rows.to(like.device).to(like.dtype)


def summed(parts: Sequence[Factors]) -> Factors:
    """Factors of `Σ B_i A_i`: `[B_1 B_2 …]` and `[A_1; A_2; …]`."""
    return torch.cat([b for b, _ in parts], dim=-1), torch.cat([a for _, a in parts], dim=-2)


def reduced(factors: Factors, rank: int | None = None, moments: Tensor | None = None) -> Factors:
    """Factors `B (o, k)` and `A (k, d)` of the same matrix with the columns of `B` orthogonal, `k` its rank; float64.

    What is smaller than the rounding of `B` times that of `A` counts as zero, so parts that cancel each other vanish.

    Args:
        rank: the largest `k`. Where it is less than the matrix's rank, the result is the nearest of rank `k`.
        moments: `C (d, d)`; nearest is then meant on these inputs, `‖(W − W_k) C^½‖` (Eckart and Young, on `W C^½`).
    """
    b, a = exact(factors)
    left, small_left = torch.linalg.qr(b)
    right, small_right = torch.linalg.qr(a.mT)
    core = small_left @ small_right.mT
    u, values, v = torch.linalg.svd(core, full_matrices=False)
    rounding = max(b.shape[-1], 4) * torch.finfo(torch.float64).eps * float(small_left.norm() * small_right.norm())
    kept = int((values > rounding).sum())
    if rank is None or rank >= kept:
        return (left @ u[:, :kept]) * values[:kept], v[:kept] @ right.mT
    if moments is None:
        return (left @ u[:, :rank]) * values[:rank], v[:rank] @ right.mT
    seen = core @ (right.mT @ moments.to(core) @ right) @ core.mT
    most = torch.linalg.eigh((seen + seen.mT) / 2).eigenvectors.flip(1)[:, :rank]
    return left @ most, most.mT @ core @ right.mT

"""Matrices of low rank as their factors: `W = B A` with `B (o, r)` and `A (r, d)`. `W` itself is never computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]  # B (..., o, r) and A (..., r, d)


def inner(left: Factors, right: Factors) -> Tensor:
    """`⟨B A, B' A'⟩ = tr((Bᵀ B')(A' Aᵀ))`, the sum over all entries of their products, `(...)`; ranks may differ."""
    (b, a), (b2, a2) = left, right
    return ((b.mT @ b2) * (a @ a2.mT)).sum((-2, -1))


def cosine(left: Factors, right: Factors, least: Tensor | float = 0.0) -> Tensor:
    """`⟨W, W'⟩ / (max(‖W‖, least) max(‖W'‖, least))`, `(...)`, in [-1, 1]; 0 if one matrix is 0.

    This is the cosine if both norms are at least `least`. For smaller norms the result shrinks with the norm, and its
    gradient is at most `1 / least`. The gradient of the cosine itself has no bound near zero, where rounding errors
    decide the direction.
    """
    tiny = torch.finfo(left[0].dtype).tiny ** 0.5  # so that not even the product of both slopes overflows
    own, other = (inner(one, one).clamp(min=least**2).clamp(min=tiny).sqrt() for one in (left, right))
    return inner(left, right) / own / other


def merged(parts: Sequence[Factors], weights: Sequence[float], rank: int) -> Factors:
    """Factors of rank `rank` nearest to the mean `Σ w_i B_i A_i / Σ w_i`, in the sum of squares of all entries.

    They come from the singular value decomposition of the small matrix between the orthonormal bases of all `B_i` and
    all `A_i`. Each factor gets the roots of the singular values. The signs are chosen so that the largest entry of each
    column of `B` is positive, because in a decomposition they depend on the rounding of the processor. Computed in
    float64 on the CPU, because Apple's GPUs have no float64; returned in the type and on the device of the first part.
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
    if kept < rank:  # the matrices have fewer directions than `rank`
        new_b = torch.nn.functional.pad(new_b, (0, rank - kept))
        new_a = torch.nn.functional.pad(new_a, (0, 0, 0, rank - kept))
    return new_b.to(parts[0][0]), new_a.to(parts[0][1])


def exact(factors: Factors) -> Factors:
    """The factors in float64 on the CPU, without a gradient."""
    b, a = factors
    return b.detach().cpu().double(), a.detach().cpu().double()  # in two steps; see `moved_exactly`


def moved_exactly(rows: Tensor, like: Tensor) -> Tensor:
    """`rows` on the device of `like` and in its type.

    The move comes before the conversion. In one call torch would convert first, which fails on Apple's GPUs, because
    they have no float64.
    """
    return rows.to(like.device).to(like.dtype)


def summed(parts: Sequence[Factors]) -> Factors:
    """Factors of `Σ B_i A_i`: `[B_1 B_2 …]` and `[A_1; A_2; …]`."""
    return torch.cat([b for b, _ in parts], dim=-1), torch.cat([a for _, a in parts], dim=-2)


def reduced(factors: Factors, rank: int | None = None, moments: Tensor | None = None) -> Factors:
    """Factors `B (o, k)` and `A (k, d)` of the same matrix with orthogonal columns of `B`; `k` is its rank. In float64.

    Singular values smaller than the rounding errors of the factors count as zero, so parts that cancel each other
    vanish.

    Args:
        rank: the largest `k`. If the matrix has a higher rank, the result is the nearest matrix of rank `k`.
        moments: `C (d, d)`, the second moments of inputs. If given, nearest means nearest for these inputs, by
            `‖(W − W_k) C^½‖` (Eckart and Young, applied to `W C^½`).
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

"""Matrices of low rank as their factors: `W = B A` with `B (o, r)` and `A (r, d)`. `W` itself is never computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]  # B (..., o, r) and A (..., r, d)
TOGETHER = 128  # the rank of parts that are added to a sum of products at once: one large product costs less than many


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
    b, a = _joined(parts, [w / total for w in weights])
    left, small_left = torch.linalg.qr(b)
    right, small_right = torch.linalg.qr(a.mT)
    u, values, v = torch.linalg.svd(small_left @ small_right.mT)
    kept = min(rank, len(values))
    found = _balanced(left @ u[:, :kept], values[:kept], v[:kept] @ right.mT, rank)
    return found[0].to(parts[0][0]), found[1].to(parts[0][1])


class Merging:
    """The same mean as of `merged`, of parts that come one after another: what a new one costs does not grow with their
    number.

    As long as the parts together have a lower rank than their matrices can have, they are as small as their sum, and
    the mean is that of `merged` to the last bit. Then the sum of their products is kept instead, in float64. The last
    few parts are added to it together, always the same ones, so that the bits do not depend on when the mean was asked
    for.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._parts: list[Factors] = []
        """Those that are not in the sum; they must not change."""
        self._weights: list[float] = []
        self._total = 0.0
        self._like: Tensor | None = None

    def add(self, part: Factors, weight: float) -> None:
        """Add a part with a weight."""
        self._parts.append((part[0].detach(), part[1].detach()))
        self._weights.append(weight)
        self._total += weight
        self._like = part[0]
        most = min(part[0].shape[-2], part[1].shape[-1])
        if sum(b.shape[-1] for b, _ in self._parts) >= (most if self._sum is None else min(most, TOGETHER)):
            self._sum, self._parts, self._weights = self._whole(), [], []

    def mean(self, rank: int) -> Factors:
        """Factors of the mean, as of `merged`."""
        if self._sum is None or self._like is None:
            return merged(self._parts, self._weights, rank)
        u, values, v = torch.linalg.svd(self._whole() / self._total, full_matrices=False)
        kept = min(rank, len(values))
        found = _balanced(u[:, :kept], values[:kept], v[:kept], rank)
        return found[0].to(self._like), found[1].to(self._like)

    def _whole(self) -> Tensor:
        """The sum of all products."""
        if not self._parts:
            assert self._sum is not None
            return self._sum
        b, a = _joined(self._parts, self._weights)
        return b @ a if self._sum is None else torch.addmm(self._sum, b, a)


def _joined(parts: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Factors of `Σ w_i B_i A_i`, in float64 on the CPU."""
    b = torch.cat([w * b.cpu().double() for w, (b, _) in zip(weights, parts, strict=True)], dim=-1)  # (o, Σ r)
    return b, torch.cat([a.cpu().double() for _, a in parts], dim=-2)  # (Σ r, d)


def _balanced(columns: Tensor, values: Tensor, rows: Tensor, rank: int) -> Factors:
    """Factors of rank `rank` from parts of a singular value decomposition; each gets the roots of the values."""
    roots, signs = values.sqrt(), columns.gather(0, columns.abs().argmax(0, keepdim=True)).sign()
    b, a = columns * signs * roots, rows * (signs * roots).mT
    if len(values) < rank:  # the matrices have fewer directions than `rank`
        b = torch.nn.functional.pad(b, (0, rank - len(values)))
        a = torch.nn.functional.pad(a, (0, 0, 0, rank - len(values)))
    return b, a


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

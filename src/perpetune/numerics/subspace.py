"""The subspace that old features span; it grows task by task. This is Gradient Projection Memory, Saha et al. 2021,
arXiv:2103.09762, computed from second moments instead of samples."""

from __future__ import annotations

import torch
from torch import Tensor

from perpetune.errors import UsageError

SLACK = 1e-12  # a share of the energy; without it, rounding could add a column for a task that is added twice


class Subspace:
    """An orthonormal basis `U (m, k)` of directions that old features use; it only grows.

    The smaller one of `U` and its orthogonal complement is stored. So memory is at most `m²/2` numbers, and a
    projection takes at most `2 m²/2` products a row.

    Args:
        dim: `m`.
        alpha: None removes the directions completely. A number gives the soft variant, `I − U Λ Uᵀ` with the importance
            `λ_i = (α + 1) σ_i / (α σ_i + σ_max)`, summed over tasks up to 1: Saha & Roy 2023, arXiv:2302.01386.
    """

    def __init__(self, dim: int, alpha: float | None = None):
        self.dim, self.alpha = dim, alpha
        self.vectors = torch.zeros(dim, 0, dtype=torch.float64)
        """`U`, or the basis of the complement, `(m, min(k, m − k))` float64; always `U` in the soft variant."""
        self.complement = False
        """Whether `vectors` is the basis of the complement."""
        self.importance = torch.zeros(0, dtype=torch.float64)
        """The diagonal `(k,)` of `Λ`; empty unless the variant is soft."""

    @property
    def rank(self) -> int:
        """`k`, the number of protected directions."""
        columns = self.vectors.shape[1]
        return self.dim - columns if self.complement else columns

    @property
    def room(self) -> float:
        """`1 − k/m`, the share of free directions."""
        return 1 - self.rank / self.dim

    @property
    def basis(self) -> Tensor:
        """`U (m, k)`, float64, `UᵀU = I`."""
        return _rest(self.vectors) if self.complement else self.vectors

    @property
    def free(self) -> Tensor:
        """An orthonormal basis `(m, m − k)` of the complement."""
        return self.vectors if self.complement else _rest(self.vectors)

    def extend(self, moments: Tensor, energy: float) -> int:
        """Add as few directions as possible, so that the subspace contains the share `energy` of `moments`.

        Let `R = (I − UUᵀ) C (I − UUᵀ)` be the part of `C` outside of the subspace. The share inside is
        `a₀ = 1 − tr R / tr C`. Eigenvectors of `R` are added, the largest eigenvalues first, until
        `a₀ + Σ λ_j / tr C ≥ energy`. This is the criterion of Saha et al.: their energy is the sum of the squared
        singular values σ² of the features, and these are the eigenvalues of `C`. With `energy` 1 all directions are
        added whose eigenvalue is more than rounding errors.

        Args:
            moments: `C (m, m)`, the moment of one task's features.
            energy: a share from 0 (nothing is added) to 1.

        Returns:
            The number of directions added.

        Raises:
            UsageError: the moments have another shape or are not finite, or the energy is out of range.
        """
        if moments.shape != (self.dim, self.dim):
            raise UsageError(f"moments ({self.dim}, {self.dim}) are expected, got {tuple(moments.shape)}")
        if not 0 <= energy <= 1:
            raise UsageError(f"energy is {energy}; a share from 0 to 1 is expected")
        if not torch.isfinite(moments).all():
            raise UsageError("the moments are not finite")
        moments = moments.detach().to(self.vectors)
        total = float(moments.trace())
        if total <= 0:
            return 0
        free = self.free if self.rank else None
        residual = moments if free is None else free.mT @ moments @ free
        values, vectors = torch.linalg.eigh((residual + residual.mT) / 2)
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
        rounding = self.dim * torch.finfo(torch.float64).eps * total
        explained = (1 - float(values.sum()) / total) + values.cumsum(0) / total
        before = 1 - float(values.sum()) / total
        if energy == 1:
            added = int((values > rounding).sum())
        elif before >= energy - SLACK:
            added = 0
        else:
            enough = int((explained < energy - SLACK).sum()) + 1
            added = min(enough, int((values > rounding).sum()))
        self._add(vectors, added, free)
        if self.alpha is not None and self.rank:
            self._weigh(moments, added)
        return added

    def extend_random(self, count: int, generator: torch.Generator) -> None:
        """Add `count` random directions from the free ones, as a control of equal rank."""
        free = self.free if self.rank else None
        room = self.dim - self.rank
        drawn = torch.randn(room, room, generator=generator, dtype=torch.float64)
        added = min(count, room)
        self._add(torch.linalg.qr(drawn).Q, added, free)
        if self.alpha is not None:
            self.importance = torch.cat([self.importance, torch.ones(added, dtype=torch.float64)])

    def keep(self, x: Tensor, axis: int = -1) -> Tensor:
        """The part of `x` along `axis` that is in the subspace: `(x U) Uᵀ`, or `(x U) Λ Uᵀ` in the soft variant."""
        if self.complement:
            return x - self._through(x, axis)
        return self._through(x, axis)

    def remove(self, x: Tensor, axis: int = -1) -> Tensor:
        """`x` minus the part that `keep` returns, along `axis`: `x (I − UUᵀ)`."""
        if self.complement:
            return self._through(x, axis)
        return x - self._through(x, axis)

    def _through(self, x: Tensor, axis: int) -> Tensor:
        vectors = self.vectors.to(x)
        moved = x.movedim(axis, -1)
        inside = moved @ vectors
        if self.alpha is not None:
            inside = inside * self.importance.to(x)
        return (inside @ vectors.mT).movedim(-1, axis)

    def _add(self, directions: Tensor, count: int, free: Tensor | None) -> None:
        """Add the first `count` of `directions` to the subspace.

        Args:
            directions: an orthonormal basis of the free directions, in coordinates of `free`.
            free: a basis of the free directions; None if all are free.
        """
        if count == 0:
            return
        if free is not None:
            directions = free @ directions
        basis, rest = directions[:, :count], directions[:, count:]
        hard = self.alpha is None
        if hard and rest.shape[1] < self.dim / 2:
            self.vectors, self.complement = _orthonormal(rest), True
        else:
            self.vectors, self.complement = _orthonormal(torch.cat([self.basis, basis], dim=1)), False

    def _weigh(self, moments: Tensor, added: int) -> None:
        """Add the importance of the directions for the data of `moments`; the sum is at most 1."""
        sigma = (self.vectors * (moments @ self.vectors)).sum(0).clamp(min=0).sqrt()
        assert self.alpha is not None
        most = float(sigma.max())
        weight = (self.alpha + 1) * sigma / (self.alpha * sigma + most) if most > 0 else torch.zeros_like(sigma)
        old = torch.cat([self.importance, torch.zeros(added, dtype=torch.float64)])
        self.importance = (old + weight).clamp(max=1)


def _orthonormal(columns: Tensor) -> Tensor:
    """Make the columns orthonormal again, so that rounding errors do not add up over tasks. The span does not change,
    and the columns change only by rounding."""
    if columns.shape[1] == 0:
        return columns
    q, r = torch.linalg.qr(columns)
    kept: Tensor = q * r.diagonal().sign()
    return kept


def _rest(columns: Tensor) -> Tensor:
    """An orthonormal basis `(m, m − k)` of the complement of orthonormal `columns (m, k)`."""
    dim, count = columns.shape
    if count == 0:
        return torch.eye(dim, dtype=columns.dtype)
    rest: Tensor = torch.linalg.qr(columns, mode="complete").Q[:, count:]
    return rest

"""The subspace that old features span, grown task by task: Gradient Projection Memory, Saha et al. 2021,
arXiv:2103.09762, on second moments instead of samples (pgp-pegp.md §1.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from perpetune.errors import UsageError

SLACK = 1e-12  # of the energy: rounding must not make a task merged twice add a column


class Subspace:
    """An orthonormal basis `U (m, k)` of directions that old features use; it only grows.

    Of `U` and its orthogonal complement the smaller one is kept, so memory and the cost of a projection never
    exceed `m²/2` numbers and `2 m²/2` products a row.

    Args:
        dim: `m`.
        alpha: None removes the directions wholly. A number makes it the soft variant, `I − U Λ Uᵀ` with importance
            `λ_i = (α + 1) σ_i / (α σ_i + σ_max)`, summed over tasks up to 1: Saha & Roy 2023, arXiv:2302.01386.
    """

    def __init__(self, dim: int, alpha: float | None = None):
        self.dim, self.alpha = dim, alpha
        self.vectors = torch.zeros(dim, 0, dtype=torch.float64)
        """`U`, or the basis of the complement; `(m, min(k, m − k))` float64 (`U` where soft)."""
        self.complement = False
        """Whether `vectors` is the complement."""
        self.importance = torch.zeros(0, dtype=torch.float64)
        """`Λ`'s diagonal `(k,)`; empty where not soft."""

    @property
    def rank(self) -> int:
        """`k`, the directions protected."""
        columns = self.vectors.shape[1]
        return self.dim - columns if self.complement else columns

    @property
    def room(self) -> float:
        """`1 − k/m`, the share of directions that are still free."""
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
        """Add the fewest directions after which the share `energy` of `moments` lies in the subspace.

        `R = (I − UUᵀ) C (I − UUᵀ)`; the share explained already is `a₀ = 1 − tr R / tr C`; eigenvectors of `R` are
        added in descending order until `a₀ + Σ λ_j / tr C ≥ energy` (pgp-pegp.md §1.3, steps 2 and 3). Energy is
        σ² of the features, eigenvalues of `C`. With `energy` 1 all directions are added that hold more than rounding.

        Args:
            moments: `C (m, m)`, the moment of one task's features.
            energy: from 0 (nothing is added) to 1.

        Returns:
            The number of directions added.

        Raises:
            UsageError: moments of another shape, not finite, or an energy out of range.
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
        """Add `count` directions drawn at random from the free ones: the control of equal rank."""
        free = self.free if self.rank else None
        room = self.dim - self.rank
        drawn = torch.randn(room, room, generator=generator, dtype=torch.float64)
        added = min(count, room)
        self._add(torch.linalg.qr(drawn).Q, added, free)
        if self.alpha is not None:
            self.importance = torch.cat([self.importance, torch.ones(added, dtype=torch.float64)])

    def keep(self, x: Tensor, axis: int = -1) -> Tensor:
        """The part of `x` along `axis` that lies in the subspace: `(x U) Uᵀ` (`(x U) Λ Uᵀ` where soft)."""
        if self.complement:
            return x - self._through(x, axis)
        return self._through(x, axis)

    def remove(self, x: Tensor, axis: int = -1) -> Tensor:
        """`x` without what `keep` keeps, along `axis`: `x (I − UUᵀ)`."""
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
        """Move the first `count` of `directions`, an orthonormal basis within `free`, into the subspace."""
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
        """Importance of the directions for the data of `moments`, summed with what it was up to 1."""
        sigma = (self.vectors * (moments @ self.vectors)).sum(0).clamp(min=0).sqrt()
        assert self.alpha is not None
        most = float(sigma.max())
        weight = (self.alpha + 1) * sigma / (self.alpha * sigma + most) if most > 0 else torch.zeros_like(sigma)
        old = torch.cat([self.importance, torch.zeros(added, dtype=torch.float64)])
        self.importance = (old + weight).clamp(max=1)


def _orthonormal(columns: Tensor) -> Tensor:
    """The same span and, but for rounding, the same columns; rounding errors do not add up over the tasks."""
    if columns.shape[1] == 0:
        return columns
    q, r = torch.linalg.qr(columns)
    kept: Tensor = q * r.diagonal().sign()
    return kept


def _rest(columns: Tensor) -> Tensor:
    """An orthonormal basis of what is orthogonal to orthonormal `columns (m, k)`, `(m, m − k)`."""
    dim, count = columns.shape
    if count == 0:
        return torch.eye(dim, dtype=columns.dtype)
    rest: Tensor = torch.linalg.qr(columns, mode="complete").Q[:, count:]
    return rest

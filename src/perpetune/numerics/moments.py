"""Second moments of feature vectors, streamed: all that gradient projection keeps of old data."""

from __future__ import annotations

import torch
from torch import Tensor

from perpetune.errors import UsageError
from perpetune.numerics.lowrank import moved_exactly

ROWS = 512  # rows converted to float64 at a time, so that memory does not grow with the batch
STRIPES = 4  # in which the upper triangle is summed on a CPU: five eighths of the products of the whole square


class Moments:
    """The uncentred second moment `C = Σ a aᵀ` of vectors `a` of width `m`, in float64 (pgp-pegp.md §1.3, step 1).

    Only sums are kept: any number of vectors takes `O(m²)` memory, and neither their order nor how they are cut into
    batches matters, up to rounding.

    Args:
        dim: `m`.
        groups: `G`, for vectors that come in `G` kinds with a moment each (the heads of an attention);
            None for one kind.
        device: where the sums are; without float64 there (Apple's GPUs) they are on the CPU.
    """

    def __init__(self, dim: int, groups: int | None = None, device: torch.device | str | None = None):
        self.dim, self.groups, self.count = dim, groups, 0
        shape = (dim, dim) if groups is None else (groups, dim, dim)
        place = torch.device(device) if device is not None else torch.device("cpu")
        self.sums = torch.zeros(shape, dtype=torch.float64, device="cpu" if place.type == "mps" else place)
        """`C`, of which the upper triangle counts."""
        width = -(-dim // (STRIPES if self.sums.device.type == "cpu" and dim >= 64 * STRIPES else 1))
        self._stripes = [(start, min(start + width, dim)) for start in range(0, dim, width)]

    def update(self, rows: Tensor) -> None:
        """Add vectors: `rows` is `(n, m)`, or `(G, n, m)` with groups.

        Raises:
            UsageError: rows of another shape.
        """
        leading = () if self.groups is None else (self.groups,)
        if rows.dim() != len(leading) + 2 or rows.shape[:-2] != leading or rows.shape[-1] != self.dim:
            expected = ", ".join([*map(str, leading), "n", str(self.dim)])
            raise UsageError(f"moments of rows ({expected}) were asked for, got {tuple(rows.shape)}")
        for part in rows.detach().split(max(ROWS, self.dim), dim=-2):
            part = moved_exactly(part, self.sums)
            if self.groups is not None:
                self.sums.baddbmm_(part.mT, part)
                continue
            for start, stop in self._stripes:
                self.sums[start:stop, start:].addmm_(part[:, start:stop].mT, part[:, start:])
        self.count += rows.shape[-2]

    def merge(self, other: Moments) -> None:
        """Add what `other` has seen."""
        if other.sums.shape != self.sums.shape:
            raise UsageError(
                f"moments {tuple(other.sums.shape)} cannot be merged into moments {tuple(self.sums.shape)}"
            )
        self.sums += other.sums.to(self.sums)
        self.count += other.count

    @property
    def matrix(self) -> Tensor:
        """`C`, symmetric: `(m, m)` or `(G, m, m)`, float64."""
        upper = self.sums.triu()
        return upper + upper.triu(1).mT


def pack(matrix: Tensor) -> Tensor:
    """The upper triangles `(G, m (m + 1) / 2)` of symmetric matrices `(G, m, m)`."""
    row, column = torch.triu_indices(matrix.shape[-1], matrix.shape[-1], device=matrix.device)
    return matrix[:, row, column]


def unpack(packed: Tensor, dim: int) -> Tensor:
    """The symmetric matrices `(G, dim, dim)` that `pack` made `packed` of."""
    row, column = torch.triu_indices(dim, dim, device=packed.device)
    matrix = packed.new_empty(len(packed), dim, dim)
    matrix[:, row, column] = packed
    matrix[:, column, row] = packed
    return matrix

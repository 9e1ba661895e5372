"""Second moments of feature vectors, summed batch by batch. Gradient projection stores nothing else of old data."""

from __future__ import annotations

import torch
from torch import Tensor

from perpetune.errors import UsageError
from perpetune.numerics.lowrank import moved_exactly

ROWS = 512  # rows are converted to float64 in parts of this size, so that memory does not grow with the batch
STRIPES = 4  # on a CPU the upper triangle is summed in as many stripes, which takes 5/8 of the products of the square


class Moments:
    """The uncentred second moment `C = Σ a aᵀ` of vectors `a` of width `m`, in float64.

    GPM takes a singular value decomposition of a matrix of sampled features. `C` has the same left singular vectors
    and the squares of the singular values as eigenvalues, and it needs no samples. Only the sum is stored, so any
    number of vectors takes `O(m²)` memory. Up to rounding the result depends neither on the order of the vectors nor on
    their division into batches.

    Args:
        dim: `m`.
        groups: `G`, if the vectors are of `G` kinds with a moment for each (the heads of an attention); None for one
            kind.
        device: the device of the sums. If it has no float64 (Apple's GPUs), they are on the CPU.
    """

    def __init__(self, dim: int, groups: int | None = None, device: torch.device | str | None = None):
        self.dim, self.groups, self.count = dim, groups, 0
        shape = (dim, dim) if groups is None else (groups, dim, dim)
        place = torch.device(device) if device is not None else torch.device("cpu")
        self.sums = torch.zeros(shape, dtype=torch.float64, device="cpu" if place.type == "mps" else place)
        """`C`; only its upper triangle is valid."""
        width = -(-dim // (STRIPES if self.sums.device.type == "cpu" and dim >= 64 * STRIPES else 1))
        self._stripes = [(start, min(start + width, dim)) for start in range(0, dim, width)]

    def update(self, rows: Tensor) -> None:
        """Add vectors: `rows` is `(n, m)`, or `(G, n, m)` with groups.

        Raises:
            UsageError: the rows have another shape.
        """
        leading = () if self.groups is None else (self.groups,)
        if rows.dim() != len(leading) + 2 or rows.shape[:-2] != leading or rows.shape[-1] != self.dim:
            expected = ", ".join([*map(str, leading), "n", str(self.dim)])
            raise UsageError(f"moments expect rows of shape ({expected}), got {tuple(rows.shape)}")
        for part in rows.detach().split(max(ROWS, self.dim), dim=-2):
            part = moved_exactly(part, self.sums)
            if self.groups is not None:
                self.sums.baddbmm_(part.mT, part)
                continue
            for start, stop in self._stripes:
                self.sums[start:stop, start:].addmm_(part[:, start:stop].mT, part[:, start:])
        self.count += rows.shape[-2]

    def merge(self, other: Moments) -> None:
        """Add the sums of `other`.

        Raises:
            UsageError: the shapes differ.
        """
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
    """The symmetric matrices `(G, dim, dim)` from the upper triangles that `pack` returned."""
    row, column = torch.triu_indices(dim, dim, device=packed.device)
    matrix = packed.new_empty(len(packed), dim, dim)
    matrix[:, row, column] = packed
    matrix[:, column, row] = packed
    return matrix

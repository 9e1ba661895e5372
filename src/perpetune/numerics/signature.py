"""Signatures of tasks: mean gradients, sketched to a few numbers for each module, and the distance between them.

A signature is a matrix `(L, k)`: a row for each of `L` modules. Rows are compared by their L1 distance after each is
divided by its L1 norm, so that distances lie in [0, 1] whatever the loss is scaled by (treelora.md §5.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from perpetune.errors import UsageError
from perpetune.numerics.lowrank import moved_exactly
from perpetune.seeding import generator


class Sketch:
    """A linear map of `dim` numbers to `size`, which keeps inner products on average: a CountSketch (Charikar, Chen &
    Farach-Colton 2002) whose buckets are not drawn.

    Number `i` gets a random sign `s_i` and is added to bucket `i mod (size + 1)`, the last bucket to the first: signs,
    a fold and a sum. Still, over the signs,

        E ⟨Sx, Sy⟩ = Σ x_i y_i + Σ over i ≠ j in one bucket of x_i y_j E[s_i s_j] = ⟨x, y⟩

    since signs are independent. Drawn buckets would only guard the variance against large numbers that share a bucket.
    What repeats in a gradient are the columns of a matrix, and a period of `size + 1` puts those in all buckets where
    their number is a power of two, like the rank of a LoRA.

    Args:
        dim: numbers that are sketched, at least 1.
        size: numbers they become, at least 1. Shorter inputs are padded with zeros.
        seed: of the signs, which are the same on every machine. They take `dim` bytes.

    Raises:
        UsageError: a size that is not positive.
    """

    def __init__(self, dim: int, size: int = 256, seed: int = 0):
        if dim < 1 or size < 1:
            raise UsageError(f"a sketch of {dim} numbers to {size} was asked for; both have to be positive")
        self.dim, self.size = dim, size
        self.signs = torch.randint(0, 2, (dim,), generator=generator("sketch", seed, dim, size), dtype=torch.int8)
        """`s (dim,)`, int8, ±1; on the device of what was sketched last."""
        self.signs.mul_(2).sub_(1)

    def __call__(self, values: Tensor) -> Tensor:
        """The sketch of each row: `(dim,)` to `(size,)`, `(L, dim)` to `(L, size)`; float32, on the same device.

        Raises:
            UsageError: rows of another length.
        """
        if values.shape[-1:] != (self.dim,):
            raise UsageError(f"a sketch of rows of {self.dim} numbers was asked for, got {tuple(values.shape)}")
        if self.signs.device != values.device:
            self.signs = self.signs.to(values.device)
        signed = values.detach().float() * self.signs
        period = self.size + 1
        folded = torch.nn.functional.pad(signed, (0, -self.dim % period)).unflatten(-1, (-1, period)).sum(-2)
        sketch: Tensor = folded[..., : self.size].clone(memory_format=torch.contiguous_format)
        sketch[..., 0] += folded[..., -1]
        return sketch


class RunningMean(nn.Module):
    """The weighted mean of tensors that come one by one, as Welford 1962 updates it: no sum that grows, and
    micro-batches with their numbers of examples as weights give the mean of the whole batch. Float64 inside, and on the
    CPU wherever the rest of a model goes: Apple's GPUs have no float64.

    A module, so that it is stored with what holds it and goes on bit for bit.

    Args:
        shape: of the tensors, such as `(L, k)`.
    """

    mean: Tensor

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.weight = 0.0
        """Of all that was seen."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RunningMean:
        return self

    def update(self, values: Tensor, weight: float = 1) -> None:
        """Add `values`, the mean of `weight` examples. Whether they are finite is not looked at.

        Raises:
            UsageError: another shape, or a weight that is not a number ≥ 0. With weight 0 nothing is added.
        """
        if values.shape != self.mean.shape:
            raise UsageError(f"a mean of tensors {tuple(self.mean.shape)} was asked for, got {tuple(values.shape)}")
        if not (weight >= 0 and math.isfinite(weight)):
            raise UsageError(f"the weight of an observation is {weight}; a number of examples is expected")
        if weight == 0:
            return
        self.weight += weight
        self.mean.lerp_(moved_exactly(values.detach(), self.mean), weight / self.weight)

    @property
    def value(self) -> Tensor:
        """The mean in float32; zeros until something was seen."""
        return self.mean.float()

    def reset(self) -> None:
        """As if nothing had been seen."""
        self.mean.zero_()
        self.weight = 0.0

    def get_extra_state(self) -> dict[str, float]:
        return {"weight": self.weight}

    def set_extra_state(self, state: dict[str, float]) -> None:
        self.weight = float(state["weight"])


def normalised(rows: Tensor) -> Tensor:
    """Each row of `(..., k)` divided by its L1 norm, float32; rows of zeros stay.

    A positive factor of the input does not matter, not even one that lets a norm overflow.
    """
    rows = rows.detach().float()
    rows = rows / _divisor(rows.abs().amax(-1, keepdim=True))
    return rows / _divisor(rows.abs().sum(-1, keepdim=True))


def row_distances(u: Tensor, v: Tensor) -> Tensor:
    """`‖u_l − v_l‖₁ / 2` for each module: `(..., L)` from normalised `(..., L, k)`, broadcast; in [0, 1]."""
    return (u - v).abs_().sum(-1).div_(2).clamp_(max=1)


def distance(u: Tensor, v: Tensor) -> Tensor:
    """The mean over modules of `row_distances`: `(...)` from normalised `(..., L, k)`, broadcast.

    A metric with values in [0, 1]: 0 of equal signatures, 1 where no number of a row overlaps. (A row of zeros is at
    1/2 from every other one.)
    """
    rows = max(u.shape[-2], v.shape[-2])
    return (u - v).abs_().flatten(-2).sum(-1).div_(2 * rows).clamp_(max=1)


def _divisor(norm: Tensor) -> Tensor:
    """1 for 0, so that zeros stay zeros."""
    return norm.where(norm != 0, 1)

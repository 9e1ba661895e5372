"""Signatures of tasks: mean gradients, reduced to a few numbers for each module, and the distance between them.

A signature is a matrix `(L, k)` with a row for each of `L` modules. Each row is divided by its L1 norm, and rows are
compared by their L1 distance. So distances are in [0, 1] and do not depend on the scale of the loss.
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
    """A linear map of `dim` numbers to `size` numbers that keeps inner products on average: a CountSketch (Charikar,
    Chen & Farach-Colton 2002) whose buckets are fixed instead of random.

    Number `i` gets a random sign `s_i` and is added to bucket `i mod (size + 1)`; the last bucket is added to the
    first. Because the signs are independent, the expectation over the signs is still

        E ⟨Sx, Sy⟩ = Σ x_i y_i + Σ over i ≠ j in one bucket of x_i y_j E[s_i s_j] = ⟨x, y⟩.

    Random buckets would only lower the variance if large numbers share a bucket. In a gradient the columns of a matrix
    repeat with a period. If their number is a power of two, as the rank of a LoRA often is, a period of `size + 1`
    spreads each column over all buckets.

    Args:
        dim: the number of input values, at least 1.
        size: the number of output values, at least 1. Shorter inputs are padded with zeros.
        seed: the seed of the signs. They are the same on every machine and take `dim` bytes.

    Raises:
        UsageError: a size is not positive.
    """

    def __init__(self, dim: int, size: int = 256, seed: int = 0):
        if dim < 1 or size < 1:
            raise UsageError(f"a sketch reduces {dim} numbers to {size}; both have to be positive")
        self.dim, self.size = dim, size
        self.signs = torch.randint(0, 2, (dim,), generator=generator("sketch", seed, dim, size), dtype=torch.int8)
        """`s (dim,)`, int8, ±1; on the device of the last input."""
        self.signs.mul_(2).sub_(1)

    def __call__(self, values: Tensor) -> Tensor:
        """The sketch of each row: `(dim,)` to `(size,)`, `(L, dim)` to `(L, size)`; float32, on the same device.

        Raises:
            UsageError: the rows have another length.
        """
        if values.shape[-1:] != (self.dim,):
            raise UsageError(f"a sketch expects rows of {self.dim} numbers, got {tuple(values.shape)}")
        if self.signs.device != values.device:
            self.signs = self.signs.to(values.device)
        signed = values.detach().float() * self.signs
        period = self.size + 1
        folded = torch.nn.functional.pad(signed, (0, -self.dim % period)).unflatten(-1, (-1, period)).sum(-2)
        sketch: Tensor = folded[..., : self.size].clone(memory_format=torch.contiguous_format)
        sketch[..., 0] += folded[..., -1]
        return sketch


class RunningMean(nn.Module):
    """The weighted mean of tensors that come one by one, updated as in Welford 1962, so no sum grows.

    Micro-batches, weighted by their numbers of examples, give the mean of the whole batch. The mean is float64 on the
    CPU, wherever the model is, because Apple's GPUs have no float64. It is a module, so that its owner stores it and
    continues with the same bits.

    Args:
        shape: the shape of the tensors, such as `(L, k)`.
    """

    mean: Tensor

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.weight = 0.0
        """The sum of the weights so far."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RunningMean:
        return self

    def update(self, values: Tensor, weight: float = 1) -> None:
        """Add `values`, the mean of `weight` examples. Values that are not finite are not detected. Weight 0 adds
        nothing.

        Raises:
            UsageError: `values` has another shape, or the weight is not a number ≥ 0.
        """
        if values.shape != self.mean.shape:
            raise UsageError(f"a mean expects tensors {tuple(self.mean.shape)}, got {tuple(values.shape)}")
        if not (weight >= 0 and math.isfinite(weight)):
            raise UsageError(f"the weight of an observation is {weight}; a number of examples is expected")
        if weight == 0:
            return
        self.weight += weight
        self.mean.lerp_(moved_exactly(values.detach(), self.mean), weight / self.weight)

    @property
    def value(self) -> Tensor:
        """The mean in float32; zeros before the first `update`."""
        return self.mean.float()

    def reset(self) -> None:
        """Forget all updates."""
        self.mean.zero_()
        self.weight = 0.0

    def get_extra_state(self) -> dict[str, float]:
        return {"weight": self.weight}

    def set_extra_state(self, state: dict[str, float]) -> None:
        self.weight = float(state["weight"])


def normalised(rows: Tensor) -> Tensor:
    """Each row of `(..., k)` divided by its L1 norm, float32; rows of zeros stay zero.

    The result does not depend on a positive factor of the input, even if the norm overflows with it.
    """
    rows = rows.detach().float()
    rows = rows / _divisor(rows.abs().amax(-1, keepdim=True))
    return rows / _divisor(rows.abs().sum(-1, keepdim=True))


def row_distances(u: Tensor, v: Tensor) -> Tensor:
    """`‖u_l − v_l‖₁ / 2` for each module: `(..., L)` from normalised `(..., L, k)`, broadcast; in [0, 1]."""
    return (u - v).abs_().sum(-1).div_(2).clamp_(max=1)


def distance(u: Tensor, v: Tensor) -> Tensor:
    """The mean over modules of `row_distances`: `(...)` from normalised `(..., L, k)`, broadcast.

    It is a metric with values in [0, 1]: 0 for equal signatures, 1 if the two signatures have no position where both
    numbers have the same sign. (A row of zeros has the distance 1/2 from every other row.)
    """
    rows = max(u.shape[-2], v.shape[-2])
    return (u - v).abs_().flatten(-2).sum(-1).div_(2 * rows).clamp_(max=1)


def _divisor(norm: Tensor) -> Tensor:
    """The norm, or 1 if it is 0, so that rows of zeros stay zero."""
    return norm.where(norm != 0, 1)

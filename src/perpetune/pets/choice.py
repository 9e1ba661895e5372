"""A choice of PETs: which sets of PETs act on which example of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from perpetune.errors import UsageError
from perpetune.numerics.handover import sent

Join = Literal["sum", "beside"]


@dataclass(frozen=True, eq=False)
class Choice:
    """The sets of PETs that act on each example of a batch.

    While a choice is in force, the first axis of every tensor in the net lists the examples of `index` in the same
    order. A net may have several rows for each example (the windows of a picture); then they follow example by example.

    Attributes:
        members: names of sets. At one place their PETs have the same class and shapes.
        index: int64 `(B, k)`, positions in `members`: the `k` sets of each example.
        weight: `(B, k)`, the factor on what each set adds; None means 1.
        join: how the `k` sets of one example are joined. `sum`: their updates are added, and so are their tokens.
            `beside`: their tokens are placed side by side, as in L2P; the updates of PETs without tokens are still
            added.

    Raises:
        UsageError: an index points outside `members`, or the shapes do not match.
    """

    members: tuple[str, ...]
    index: Tensor
    weight: Tensor | None = None
    join: Join = "sum"

    def __post_init__(self) -> None:
        index, weight = self.index, self.weight
        if index.dim() != 2 or index.dtype != torch.int64 or not index.numel():
            raise UsageError(f"a choice of pets: index is {index.dtype} {tuple(index.shape)}; int64 (B, k) is expected")
        if weight is not None and weight.shape != index.shape:
            raise UsageError(
                f"a choice of pets: weight is {tuple(weight.shape)} and index {tuple(index.shape)}; the same shape is "
                "expected"
            )
        low, high = int(self._read.min()), int(self._read.max())
        if low < 0 or high >= len(self.members):
            raise UsageError(
                f"a choice of pets: index goes from {low} to {high}, and there are {len(self.members)} members"
            )

    def __len__(self) -> int:
        return len(self.index)

    @property
    def each(self) -> int:
        """`k`, the number of sets that act on one example."""
        return self.index.shape[1]

    @cached_property
    def _read(self) -> Tensor:
        """`index` on the CPU. Which sets act decides what is computed, so the device has to be asked, but only once."""
        return self.index.cpu()

    def narrowed(self) -> Choice | str:
        """The same choice with only the members that occur in it. If one member acts on all examples without a weight,
        the result is its name."""
        used, index = torch.unique(self._read, return_inverse=True)
        members: tuple[str, ...] = tuple(self.members[i] for i in used.tolist())
        if len(members) == 1 and self.each == 1 and self.weight is None:
            return members[0]
        new = Choice(members, index, self.weight, self.join)
        object.__setattr__(new, "index", sent(index, self.index.device))  # `_read` stays on the CPU
        return new

    @cached_property
    def _same(self) -> bool:
        """Whether all examples have the same members, several of them; their weights may differ."""
        return self.each > 1 and bool((self._read == self._read[:1]).all())

    def rows(self, x: Tensor) -> Tensor:
        """`x (B or a multiple of B, …, d)` in the shape `(B, n, d)`: the `n` rows of each example."""
        self.check(x)
        return x.reshape(len(self), -1, x.shape[-1])

    def check(self, x: Tensor) -> None:
        """Raise UsageError if the number of rows of `x` is not a multiple of the number of examples."""
        if len(x) % len(self):
            raise UsageError(
                f"a choice of pets is made for {len(self)} examples, but {len(x)} rows go through the net: run only "
                "the batch that the choice was made for inside `using`"
            )

    # -- values ---------------------------------------------------------------------------------------

    def picked(self, values: Sequence[Tensor]) -> Tensor:
        """`(B, k, …)`: for each example the values of its members. `values` has one tensor for each member."""
        return torch.stack(list(values))[sent(self.index, values[0].device)]

    def weighted(self, picked: Tensor) -> Tensor:
        """`picked (B, k, …)` times the weights, or `picked` itself if the choice has no weights."""
        if self.weight is None:
            return picked
        factor = self.weight.to(picked)
        return picked * factor.view(*factor.shape, *[1] * (picked.dim() - 2))

    def summed(self, values: Sequence[Tensor]) -> Tensor:
        """`(B, …)`: the weighted sum over the members of each example."""
        if self.weight is not None and self._same:  # all members at once, as in CODA: no copy for each example
            stacked = torch.stack(list(values))[sent(self.index[0], values[0].device)]
            joined: Tensor = (self.weight.to(stacked) @ stacked.flatten(1)).unflatten(1, stacked.shape[1:])
            return joined
        picked = self.weighted(self.picked(values))
        return picked[:, 0] if self.each == 1 else picked.sum(1)

    def tokens(self, values: Sequence[Tensor]) -> Tensor:
        """Tokens of each example, from the members' tokens `(L, d)`: `(B, L, d)`, or `(B, k L, d)` with `beside`."""
        if self.join == "sum":
            return self.summed(values)
        return self.weighted(self.picked(values)).flatten(1, 2)

    # -- what members see -----------------------------------------------------------------------------

    def examples_of(self, member: int, position: int) -> Tensor:
        """Numbers `(n,)` of the examples whose set at `position` is `member`, on the CPU."""
        examples: Tensor = (self._read[:, position] == member).nonzero().flatten()
        return examples

    def share(self, rows: Tensor, examples: Tensor) -> Tensor:
        """The rows of the given `examples`, taken from `rows (B or a multiple of B, …)`."""
        per = len(rows) // len(self)
        if per == 1:
            return rows.index_select(0, sent(examples, rows.device))
        grouped: Tensor = rows.unflatten(0, (len(self), per))
        return grouped.index_select(0, sent(examples, rows.device)).flatten(0, 1)

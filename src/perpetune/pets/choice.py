"""Which members of several sets of PETs act on which example of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from perpetune.errors import UsageError

Join = Literal["sum", "beside"]


@dataclass(frozen=True, eq=False)
class Choice:
    """For each example of a batch, the sets of PETs that act on it.

    What goes through the net while a choice is in force has the examples of `index` as its first axis, in their order;
    a net may put further rows there for each example (windows of a picture), one example after the other.

    Attributes:
        members: names of sets; at one place they are of one kind and shape.
        index: int64 `(B, k)`, positions in `members`: the `k` sets of each example.
        weight: `(B, k)`, a factor on what each of them adds; None is 1.
        join: how several sets of one example become one. `sum`: what they add is added up; tokens are summed. `beside`:
            their tokens stand one beside another, as in L2P; what adds no tokens is added up all the same.

    Raises:
        UsageError: an index outside of `members`, or shapes that do not go together.
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
        low, high = int(index.min()), int(index.max())
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

    def narrowed(self) -> Choice | str:
        """The same choice among the members that occur; the name alone where one acts on all examples as it is."""
        used, index = torch.unique(self.index, return_inverse=True)
        members: tuple[str, ...] = tuple(self.members[i] for i in used.tolist())
        if len(members) == 1 and self.each == 1 and self.weight is None:
            return members[0]
        return Choice(members, index, self.weight, self.join)

    def rows(self, x: Tensor) -> Tensor:
        """`x (B or a multiple of it, …, d)` as `(B, n, d)`: the rows of each example."""
        self.check(x)
        return x.reshape(len(self), -1, x.shape[-1])

    def check(self, x: Tensor) -> None:
        """UsageError if the rows of `x` cannot be those of the examples."""
        if len(x) % len(self):
            raise UsageError(
                f"a choice of pets is for {len(self)} examples, and {len(x)} rows go through the net: one batch is "
                "expected inside `using`"
            )

    # -- values ---------------------------------------------------------------------------------------

    def picked(self, values: Sequence[Tensor]) -> Tensor:
        """`(B, k, …)`: of the members' `values`, those of each example."""
        return torch.stack(list(values))[self.index.to(values[0].device)]

    def weighted(self, picked: Tensor) -> Tensor:
        """`picked (B, k, …)` times the weights, where there are any."""
        if self.weight is None:
            return picked
        factor = self.weight.to(picked)
        return picked * factor.view(*factor.shape, *[1] * (picked.dim() - 2))

    def summed(self, values: Sequence[Tensor]) -> Tensor:
        """`(B, …)`: the weighted sum over the members of each example."""
        picked = self.weighted(self.picked(values))
        return picked[:, 0] if self.each == 1 else picked.sum(1)

    def tokens(self, values: Sequence[Tensor]) -> Tensor:
        """`(B, L, d)`, or `(B, k L, d)` with `beside`: the tokens that each example gets, of members' `(L, d)`."""
        if self.join == "sum":
            return self.summed(values)
        return self.weighted(self.picked(values)).flatten(1, 2)

    # -- what members see -----------------------------------------------------------------------------

    def examples_of(self, member: int, position: int) -> Tensor:
        """Numbers of the examples `(n,)` whose set at that position is this member."""
        found: Tensor = (self.index[:, position] == member).nonzero().flatten()
        return found

    def share(self, rows: Tensor, examples: Tensor) -> Tensor:
        """Of `rows (B or a multiple of it, …)` those of some examples."""
        per = len(rows) // len(self)
        if per == 1:
            return rows.index_select(0, examples.to(rows.device))
        grouped: Tensor = rows.unflatten(0, (len(self), per))
        return grouped.index_select(0, examples.to(rows.device)).flatten(0, 1)

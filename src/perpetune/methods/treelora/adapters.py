"""The LoRAs of earlier tasks: the term that draws the trained LoRA to them, and their merging if there are too many."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from perpetune.methods.parts.bank import Bank, Kept, nothing, set_name
from perpetune.models.base import Model
from perpetune.numerics.exact import exactly
from perpetune.numerics.lowrank import Factors, Merging, cosine, inner, merged
from perpetune.numerics.similarity_tree import SimilarityTree
from perpetune.pets import LoRA, has_set

# A share of the root mean square of an update's norms. A module with a smaller norm counts less, because its direction
# is mostly chance.
LEAST = 0.1


class LoRABank(Bank):
    """A `Bank` of LoRAs. The number of each set is its number in the similarity tree.

    Args:
        model: the model, with the set `working` of LoRAs.
        working: the name of the set that is trained.
        budget: the most sets that are kept; None is all.
        beside: as of `Bank`.
    """

    def __init__(
        self, model: Model, working: str, budget: int | None, beside: Callable[[int], Mapping[str, Tensor]] = nothing
    ):
        super().__init__(model, working, beside=beside)
        self.budget = budget
        self.merged: str | None = None
        """The name of the set into which all are merged; None before that."""
        self._made = [_copied(pet.factors()) for pet in self._loras(working)]
        # Modules of one shape, and the LoRAs to which they are drawn
        self._target: list[tuple[list[int], Factors]] = []
        self._least = torch.zeros(())  # the least norm in `alignment`
        self._sums = _Sums()  # of the first so many kept sets

    def reset(self) -> None:
        """Give the working set the values that it had when the bank was made."""
        for pet, factors in zip(self._loras(self.working), self._made, strict=True):
            pet.set_factors(factors)

    def keep(self, slot: int, task: str, classes: Sequence[str], weight: int, *, source: str | None = None) -> None:
        """As in `Bank.keep`; the adapters to which the working set was drawn are dropped."""
        self._target = []
        super().keep(slot, task, classes, weight, source=source)

    # -- drawn towards another task's -----------------------------------------------------------------

    @torch.no_grad()
    def draw_to(self, helpers: Mapping[int, int]) -> None:
        """Set the adapters with which `alignment` compares the working set.

        Args:
            helpers: for each module (in the order of places and parts) the number of an adapter.
        """
        by_slot = {slot: self._flat(set_name(slot)) for slot in set(helpers.values())}
        shapes: dict[tuple[int, ...], list[int]] = {}
        for module, slot in sorted(helpers.items()):
            b, a = by_slot[slot][module]
            shapes.setdefault((*b.shape, *a.shape), []).append(module)
        self._target = [
            (modules, _stacked([by_slot[helpers[module]][module] for module in modules])) for modules in shapes.values()
        ]
        self._least = LEAST * torch.cat([inner(target, target) for _, target in self._target]).mean().sqrt()

    def alignment(self) -> Tensor:
        """The mean over modules of `cos(ΔW, ΔW')`, in [-1, 1]: `ΔW` is the update of the working set and `ΔW'` that of
        the adapter to which it is drawn.

        A norm counts as at least a tenth of the root mean square of the norms of `ΔW'` over modules.
        """
        working = self._flat(self.working)
        with exactly(working[0][0].device):
            each = [
                cosine(_stacked([working[module] for module in modules]), target, self._least)
                for modules, target in self._target
            ]
            return torch.cat(each).mean()

    # -- merging --------------------------------------------------------------------------------------

    def over(self, tree: SimilarityTree) -> tuple[int, int] | None:
        """The numbers of the two adapters to merge, those of the two nearest tasks; None within the budget."""
        if self.budget is None or len(self.kept) <= self.budget:
            return None
        distances = tree.distances.clone().fill_diagonal_(torch.inf)
        first, second = divmod(int(distances.argmin()), len(distances))
        return tree.ids[min(first, second)], tree.ids[max(first, second)]

    def merge(self, kept: int, gone: int) -> None:
        """Replace two adapters by their mean at the same rank, weighted by the numbers of their training examples.

        Args:
            kept: the number under which the mean is stored.
            gone: the number of the adapter that is removed.
        """
        self._mean([kept, gone], set_name(kept))
        self.reloaded()
        one, other = self.kept[kept], self.kept.pop(gone)
        classes = list(dict.fromkeys(one.classes + other.classes))
        self.kept[kept] = Kept(kept, one.tasks + other.tasks, classes, one.weight + other.weight)
        self._by_task = None
        self._remove(set_name(gone))

    @torch.no_grad()
    def merge_all(self, name: str) -> None:
        """Store the mean of all adapters as the set `name`. Only those are looked at that came since the last time."""
        if not has_set(self.model, name):
            self._put(self.working, name)
        self.merged = name
        for slot in [*self.kept][self._sums.count :]:
            factors = [pet.factors() for pet in self._loras(set_name(slot))]
            self._sums.add(factors, self._stored_rows(set_name(slot)), self.kept[slot].weight)
        for into, parts in zip(self._loras(name), self._sums.parts, strict=True):
            into.set_factors([part.mean(into.rank) for part in parts])
        self._store_rows(name, self._sums.mean_rows())

    def reloaded(self) -> None:
        """Note that sets have other values than before: their mean is computed anew, from all, when it is asked for."""
        self._sums = _Sums()

    @torch.no_grad()
    def _mean(self, among: Sequence[int], name: str) -> None:
        weights = [float(self.kept[slot].weight) for slot in among]
        sets = [self._loras(set_name(slot)) for slot in among]
        for place, into in enumerate(self._loras(name)):
            parts = [list(loras[place].factors()) for loras in sets]
            into.set_factors([merged(same, weights, into.rank) for same in zip(*parts, strict=True)])
        rows_of: dict[str, list[tuple[float, list[Tensor]]]] = {}
        for slot, share in zip(among, weights, strict=True):
            for c, row in self._stored_rows(set_name(slot)).items():
                rows_of.setdefault(c, []).append((share, row))
        self._store_rows(name, {c: _weighted(rows) for c, rows in rows_of.items()})

    # -- reporting and storing ------------------------------------------------------------------------

    def facts(self) -> list[dict[str, Any]]:
        """The tasks and the bytes of each kept adapter."""
        size = sum(p.numel() * p.element_size() for pet in self._loras(self.working) for p in pet.parameters())
        return [{"tasks": kept.tasks, "bytes": size} for kept in self.kept.values()]

    def names(self) -> list[str]:
        return [*super().names(), *([self.merged] if self.merged is not None else [])]

    def get_extra_state(self) -> dict[str, Any]:
        return {**super().get_extra_state(), "merged": self.merged}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        if self.merged is not None and state["merged"] is None and has_set(self.model, self.merged):
            self._remove(self.merged)
        self.merged = state["merged"]
        self.reloaded()
        super().set_extra_state(state)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRABank:
        self.reloaded()
        super()._apply(fn, recurse)
        return self

    def _loras(self, name: str) -> list[LoRA]:
        return [pet for pet in self._pets(name) if isinstance(pet, LoRA)]

    def _flat(self, name: str) -> list[Factors]:
        return [factors for pet in self._loras(name) for factors in pet.factors()]


class _Sums:
    """What the mean of sets is computed from, so that one more set costs the same however many there are. The sums
    depend on the sets and their order alone, not on when they were asked for."""

    def __init__(self) -> None:
        self.count = 0
        """The number of sets."""
        self.parts: list[list[Merging]] = []
        """For each place and each part of its LoRA."""
        self._rows: dict[str, tuple[float, list[Tensor], Sequence[Tensor]]] = {}

    def add(self, factors: Sequence[Sequence[Factors]], rows: Mapping[str, Sequence[Tensor]], weight: float) -> None:
        """Add a set with its rows of the head, by class."""
        self.parts = self.parts or [[Merging() for _ in parts] for parts in factors]
        for sums, parts in zip(self.parts, factors, strict=True):
            for one, part in zip(sums, parts, strict=True):
                one.add(part, weight)
        for c, given in rows.items():
            exact = [weight * row.cpu().double() for row in given]
            whole, sums_of, _ = self._rows.get(c, (0.0, [torch.zeros_like(row) for row in exact], ()))
            self._rows[c] = whole + weight, [a + b for a, b in zip(sums_of, exact, strict=True)], given
        self.count += 1

    def mean_rows(self) -> dict[str, list[Tensor]]:
        """For each class the mean of its rows."""
        return {
            c: [(row / whole).to(like) for row, like in zip(rows, given, strict=True)]
            for c, (whole, rows, given) in self._rows.items()
        }


def _stacked(factors: Sequence[Factors]) -> Factors:
    return torch.stack([b for b, _ in factors]), torch.stack([a for _, a in factors])


def _weighted(rows: Sequence[tuple[float, Sequence[Tensor]]]) -> list[Tensor]:
    """The weighted mean of the rows of one class."""
    whole = sum(share for share, _ in rows)
    return [
        torch.stack([share / whole * row for (share, _), row in zip(rows, same, strict=True)]).sum(0)
        for same in zip(*(row for _, row in rows), strict=True)
    ]


def _copied(factors: Sequence[Factors]) -> list[Factors]:
    return [(b.detach().clone(), a.detach().clone()) for b, a in factors]

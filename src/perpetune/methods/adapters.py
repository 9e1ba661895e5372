"""What earlier tasks have learned: LoRAs stored as sets on the same net, and the rows of the head that go with them;
merged when there are too many, used by inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from perpetune.models.base import Model
from perpetune.numerics.lowrank import Factors, cosine, inner, merged
from perpetune.numerics.similarity_tree import SimilarityTree
from perpetune.pets import LoRA, copy_set, pets, remove, slots, using
from perpetune.tasks import Inputs

LEAST = 0.1  # of the root mean square of an update's norms: where a module has less, its direction means little
ELSEWHERE = 1e4  # taken from the log-probability of a class that no task of the chosen adapter has


@dataclass
class Kept:
    """One adapter: its number, the tasks that it is of, their classes, and on how many examples it was trained."""

    slot: int
    tasks: list[str]
    classes: list[str]
    weight: int


class AdapterBank(nn.Module):
    """The adapters of earlier tasks: each a set of LoRAs on the net, named by its number in the similarity tree, and
    the rows that the head had for the classes of its tasks, for a later task that brings a class again changes its row.

    Args:
        model: with the set `working` of LoRAs, which is the one that is trained.
        working: its name.
        budget: adapters that are kept; None is all.
    """

    def __init__(self, model: Model, working: str, budget: int | None):
        super().__init__()
        self._models = (model,)  # not as a submodule: it is the method's already
        self.working, self.budget = working, budget
        self.kept: dict[int, Kept] = {}
        self.merged: str | None = None
        """The name of the set that all are merged into, where that was done."""
        self._rows: dict[str, list[str]] = {}  # the classes whose rows are stored with a set
        self._sets: dict[str, list[LoRA]] = {}  # found already: to look for them goes through the whole net
        self._made = [_copied(pet.factors()) for pet in self._loras(working)]
        self._target: list[tuple[list[int], Factors]] = []  # modules of one shape, and what they are drawn to
        self._least = torch.zeros(())  # norms in `alignment` are taken as at least this

    @property
    def model(self) -> Model:
        return self._models[0]

    def called(self, slot: int) -> str:
        """The tasks an adapter is of."""
        return " + ".join(self.kept[slot].tasks)

    def weight(self, slot: int) -> int:
        """On how many examples an adapter was trained."""
        return self.kept[slot].weight

    def by_task(self) -> dict[str, int]:
        """The adapter that holds what was learned of each task."""
        return {task: slot for slot, kept in self.kept.items() for task in kept.tasks}

    # -- the working set ------------------------------------------------------------------------------

    def load(self, slot: int) -> None:
        """Start from an adapter."""
        copy_set(self.model, set_name(slot), self.working)
        self._swap(set_name(slot))

    def reset(self) -> None:
        """Start as if newly made."""
        for pet, factors in zip(self._loras(self.working), self._made, strict=True):
            pet.set_factors(factors)

    def keep(self, slot: int, task: str, classes: Sequence[str], weight: int) -> None:
        """Store the working set as a task's adapter; what it was drawn to is let go."""
        self._target = []
        copy_set(self.model, self.working, set_name(slot))
        self.kept[slot] = Kept(slot, [task], list(classes), weight)
        self._store_rows(set_name(slot), {c: self._row(c) for c in classes} if self.model.per_class() else {})

    # -- drawn towards another task's -----------------------------------------------------------------

    @torch.no_grad()
    def draw_to(self, helpers: Mapping[int, int]) -> None:
        """What `alignment` compares with from now on: for each module (in the order of places and parts) an adapter."""
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
        """The mean over modules of `cos(ΔW, ΔW')` between the working set and what it is drawn to, in [-1, 1].

        A norm counts as at least a tenth of what those of `ΔW'` are in the root mean square over modules.
        """
        own = self._flat(self.working)
        with torch.autocast(own[0][0].device.type, enabled=False):
            each = [
                cosine(_stacked([own[module] for module in modules]), target, self._least)
                for modules, target in self._target
            ]
            return torch.cat(each).mean()

    # -- merging --------------------------------------------------------------------------------------

    def over(self, tree: SimilarityTree) -> tuple[int, int] | None:
        """The two adapters to merge: those of the nearest tasks; None while there are not too many."""
        if self.budget is None or len(self.kept) <= self.budget:
            return None
        distances = tree.distances.clone().fill_diagonal_(torch.inf)
        first, second = divmod(int(distances.argmin()), len(distances))
        return tree.ids[min(first, second)], tree.ids[max(first, second)]

    def merge(self, kept: int, gone: int) -> None:
        """Make two adapters one, their mean by the examples each was trained on, at the same rank."""
        self._mean([kept, gone], set_name(kept))
        one, other = self.kept[kept], self.kept.pop(gone)
        classes = list(dict.fromkeys(one.classes + other.classes))
        self.kept[kept] = Kept(kept, one.tasks + other.tasks, classes, one.weight + other.weight)
        self._remove(set_name(gone))

    def merge_all(self, name: str) -> None:
        """The mean of all adapters as a set of its own."""
        if name not in {n for _, slot in slots(self.model) for n in slot.pets}:
            copy_set(self.model, self.working, name)
        self.merged = name
        self._mean(list(self.kept), name)

    @torch.no_grad()
    def _mean(self, among: Sequence[int], name: str) -> None:
        weights = [float(self.kept[slot].weight) for slot in among]
        sets = [self._loras(set_name(slot)) for slot in among]
        for place, into in enumerate(self._loras(name)):
            parts = [list(loras[place].factors()) for loras in sets]
            into.set_factors([merged(same, weights, into.rank) for same in zip(*parts, strict=True)])
        found: dict[str, list[tuple[float, list[Tensor]]]] = {}
        for slot, share in zip(among, weights, strict=True):
            for c, row in self._stored_rows(set_name(slot)).items():
                found.setdefault(c, []).append((share, row))
        self._store_rows(name, {c: _weighted(rows) for c, rows in found.items()})

    # -- the head's rows ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def acting(self, name: str) -> Iterator[None]:
        """Inside, a set of LoRAs is in force, and so are the rows of the head that go with it."""
        before = self._swap(name)
        try:
            with using(self.model, name):
                yield
        finally:
            self._set_rows(self._rows.get(name, []), before)

    def _swap(self, name: str) -> list[Tensor]:
        """Put in the rows that are stored with a set; returns what was there."""
        classes = self._rows.get(name, [])
        index = [self.model.classes.index(c) for c in classes]
        before = [p.detach()[index].clone() for p in self.model.per_class()] if classes else []
        self._set_rows(classes, [getattr(self, key) for key in self._keys(name)] if classes else [])
        return before

    @torch.no_grad()
    def _set_rows(self, classes: Sequence[str], values: Sequence[Tensor]) -> None:
        index = [self.model.classes.index(c) for c in classes]
        for p, rows in zip(self.model.per_class(), values, strict=False):
            p[index] = rows

    def _row(self, name: str) -> list[Tensor]:
        """What the head has for a class at present."""
        at = self.model.classes.index(name)
        return [p.detach()[at].clone() for p in self.model.per_class()]

    def _stored_rows(self, name: str) -> dict[str, list[Tensor]]:
        tensors = [getattr(self, key) for key in self._keys(name)] if self._rows.get(name) else []
        return {c: [t[i] for t in tensors] for i, c in enumerate(self._rows.get(name, []))}

    def _store_rows(self, name: str, rows: Mapping[str, Sequence[Tensor]]) -> None:
        self._rows[name] = list(rows)
        for key, same in zip(self._keys(name), zip(*rows.values(), strict=True), strict=False):
            self.register_buffer(key, torch.stack(list(same)))

    def _keys(self, name: str) -> list[str]:
        """The buffers that hold a set's rows, one for each parameter of the head."""
        return [f"{name}-rows-{i}" for i in range(len(self.model.per_class()))]

    # -- predicting -----------------------------------------------------------------------------------

    def predict(self, inputs: Inputs, by: Sequence[int]) -> Tensor:
        """The prediction for each input by the adapter chosen for it, one of `by (B,)`.

        Where there are classes, those of the adapter's tasks come before all others.
        """

        def ask(slot: int, some: Inputs) -> Tensor:
            found = self.model.predict(some)
            if not self.model.classes:
                return found
            own = set(self.kept[slot].classes)
            away = torch.tensor([c not in own for c in self.model.classes], device=found.device)
            return found.log_softmax(-1) - ELSEWHERE * away

        return self._asked(inputs, by, ask)

    def features(self, inputs: Inputs, by: Sequence[int]) -> Tensor:
        """Features of each input by the adapter chosen for it."""
        return self._asked(inputs, by, lambda slot, some: self.model.features(some))

    def _asked(self, inputs: Inputs, by: Sequence[int], ask: Callable[[int, Inputs], Tensor]) -> Tensor:
        """What `ask(slot, inputs)` says with each adapter in force; narrower rows are filled up."""
        inputs, parts = Inputs.of(inputs), list[tuple[list[int], Tensor]]()
        for slot in sorted(set(by)):
            rows = [i for i, s in enumerate(by) if s == slot]
            with self.acting(set_name(slot)):
                parts.append((rows, ask(slot, inputs.rows(rows))))
        width, first = max(found.shape[1] for _, found in parts), parts[0][1]
        fill = -torch.inf if first.is_floating_point() else self.model.nothing
        whole = first.new_full((len(by), width), fill)
        for rows, found in parts:
            whole[rows, : found.shape[1]] = found
        return whole

    # -- telling and storing --------------------------------------------------------------------------

    def facts(self) -> list[dict[str, Any]]:
        size = sum(p.numel() * p.element_size() for pet in self._loras(self.working) for p in pet.parameters())
        return [{"tasks": kept.tasks, "bytes": size} for kept in self.kept.values()]

    def earlier(self) -> Iterator[Tensor]:
        """All that is kept beside the working set."""
        for name in [*map(set_name, self.kept), *([self.merged] if self.merged is not None else [])]:
            for pet in self._loras(name):
                yield from (*pet.parameters(), *pet.buffers())
        yield from self.buffers()

    def get_extra_state(self) -> dict[str, Any]:
        rows = {name: classes for name, classes in self._rows.items() if classes}
        return {"kept": [asdict(kept) for kept in self.kept.values()], "merged": self.merged, "rows": rows}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.kept = {entry["slot"]: Kept(**entry) for entry in state["kept"]}
        self.merged = state["merged"]
        wanted = {set_name(slot) for slot in self.kept} | ({self.merged} if self.merged is not None else set())
        there = {name for _, slot in slots(self.model) for name in slot.pets} - {self.working}
        for name in sorted(there - wanted):
            self._remove(name)
        for name in sorted(wanted - there):
            copy_set(self.model, self.working, name)
        for name in list(self._rows):
            self._forget_rows(name)
        for name, classes in state["rows"].items():
            self._store_rows(name, {c: [p.new_zeros(p.shape[1:]) for p in self.model.per_class()] for c in classes})

    def _forget_rows(self, name: str) -> None:
        self._rows.pop(name)
        for key in self._keys(name):
            self._buffers.pop(key, None)

    def _remove(self, name: str) -> None:
        remove(self.model, name)
        self._sets.pop(name, None)
        if name in self._rows:
            self._forget_rows(name)

    def _loras(self, name: str) -> list[LoRA]:
        if name not in self._sets:
            self._sets[name] = [pet for pet in pets(self.model, name) if isinstance(pet, LoRA)]
        return self._sets[name]

    def _flat(self, name: str) -> list[Factors]:
        return [factors for pet in self._loras(name) for factors in pet.factors()]


def set_name(slot: int) -> str:
    """What the set of LoRAs of an adapter is called on the net."""
    return f"task-{slot}"


def _stacked(factors: Sequence[Factors]) -> Factors:
    return torch.stack([b for b, _ in factors]), torch.stack([a for _, a in factors])


def _weighted(rows: Sequence[tuple[float, Sequence[Tensor]]]) -> list[Tensor]:
    """The mean of the rows of one class, by their weights."""
    whole = sum(share for share, _ in rows)
    return [
        torch.stack([share / whole * row for (share, _), row in zip(rows, same, strict=True)]).sum(0)
        for same in zip(*(row for _, row in rows), strict=True)
    ]


def _copied(factors: Sequence[Factors]) -> list[Factors]:
    return [(b.detach().clone(), a.detach().clone()) for b, a in factors]

"""A bank of earlier tasks: a set of pets for each task on the same net, and the rows of the head that belong to it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from perpetune.methods.base import Resting
from perpetune.models.base import Model
from perpetune.models.classifier import Classifier
from perpetune.pets import PET, Choice, Slot, copies_at_rest, copy_set, form, pets, remove, rest, sets, using
from perpetune.tasks import Inputs

ELSEWHERE = 1e4  # subtracted from the log-probability of a class that does not belong to the chosen set's tasks


@dataclass
class Kept:
    """One set of pets: its number, its tasks, their classes, and the number of examples on which it was trained."""

    slot: int
    tasks: list[str]
    classes: list[str]
    weight: int


def nothing(slot: int) -> Mapping[str, Tensor]:
    """Nothing is stored beside a set."""
    return {}


class Bank(nn.Module):
    """Sets of pets of earlier tasks on one net, each with a number.

    With each set the bank stores the rows of the head for the classes of its tasks, because a later task with the same
    class changes its row. The sets rest, and no tensor of the bank is a buffer, so what goes through the method's
    modules takes no time for them.

    Args:
        model: the model, with the set `working`.
        working: the name of the set that is trained.
        common: names of sets that are in force beside each set of the bank.
        beside: gives further tensors of the set with a number, which a state stores with it, by their paths in the
            method.
    """

    def __init__(
        self,
        model: Model,
        working: str,
        common: Sequence[str] = (),
        beside: Callable[[int], Mapping[str, Tensor]] = nothing,
    ):
        super().__init__()
        self._models = (model,)  # in a tuple, so that it is not a submodule: it is one of the method already
        self.working, self.common, self.beside = working, tuple(common), beside
        self.kept: dict[int, Kept] = {}
        self._rows: dict[str, list[str]] = {}  # for each set the classes whose rows are stored with it
        self._values: dict[str, list[Tensor]] = {}  # and these rows, one tensor for each parameter of the head
        self._resting: dict[str, Resting] = {}
        self._by_task: Mapping[str, int] | None = None
        # Caches, because a search for pets goes through the whole net.
        self._sets: dict[str, list[PET]] = {}
        self._forms: dict[str, tuple[Any, ...] | None] = {}

    @property
    def model(self) -> Model:
        return self._models[0]

    def called(self, slot: int) -> str:
        """The tasks of a set, as one text for people."""
        return " + ".join(self.kept[slot].tasks)

    def weight(self, slot: int) -> int:
        """The number of examples on which a set was trained."""
        return self.kept[slot].weight

    def by_task(self) -> Mapping[str, int]:
        """For each task, the number of its set. Asked for every batch, so it is made once for each change of `kept`."""
        if self._by_task is None:
            self._by_task = {task: slot for slot, kept in self.kept.items() for task in kept.tasks}
        return self._by_task

    # -- the working set ------------------------------------------------------------------------------

    def load(self, slot: int) -> None:
        """Copy a stored set, with its rows of the head, to the working set."""
        copy_set(self.model, set_name(slot), self.working)
        self._swap(set_name(slot))

    def keep(self, slot: int, task: str, classes: Sequence[str], weight: int, *, source: str | None = None) -> None:
        """Store a copy of the working set, with its rows of the head, for a task.

        Args:
            slot: the number of the new set.
            weight: the number of examples on which it was trained.
            source: the name of the set that is copied; None is the working set.
        """
        self._put(source or self.working, set_name(slot))
        self.kept[slot], self._by_task = Kept(slot, [task], list(classes), weight), None
        self._store_rows(set_name(slot), {c: self._row(c) for c in classes} if self.model.per_class() else {})

    def drop(self, slot: int) -> None:
        """Drop a set, and number those behind it anew, so that their numbers go on from 0."""
        rows, last = {one: self._stored_rows(set_name(one)) for one in self.kept}, max(self.kept)
        for one in range(slot, last):
            self._remove(set_name(one))
            self._put(set_name(one + 1), set_name(one))
            after = self.kept[one + 1]
            self.kept[one] = Kept(one, after.tasks, after.classes, after.weight)
            self._store_rows(set_name(one), rows[one + 1])
        self._remove(set_name(last))
        del self.kept[last]
        self._by_task = None

    # -- the head's rows ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def acting(self, name: str) -> Iterator[None]:
        """Inside this context a set of pets is in force, and the head has the rows that belong to it."""
        with self._with_rows(name), using(self.model, (*self.common, name)):
            yield

    @contextlib.contextmanager
    def _with_rows(self, name: str) -> Iterator[None]:
        """Inside this context the head has the rows that belong to a set."""
        before = self._swap(name)
        try:
            yield
        finally:
            self._set_rows(self._rows.get(name, []), before)

    def _swap(self, name: str) -> list[Tensor]:
        """Write the rows that are stored with a set into the head; returns the values they replace."""
        classes = self._rows.get(name, [])
        index = [self.model.classes.index(c) for c in classes]
        before = [p.detach()[index].clone() for p in self.model.per_class()] if classes else []
        self._set_rows(classes, self._values[name] if classes else [])
        return before

    @torch.no_grad()
    def _set_rows(self, classes: Sequence[str], values: Sequence[Tensor]) -> None:
        index = [self.model.classes.index(c) for c in classes]
        for p, rows in zip(self.model.per_class(), values, strict=False):
            p[index] = rows

    def _row(self, name: str) -> list[Tensor]:
        """The present row of the head for a class, from each of its parameters."""
        at = self.model.classes.index(name)
        return [p.detach()[at].clone() for p in self.model.per_class()]

    def _stored_rows(self, name: str) -> dict[str, list[Tensor]]:
        tensors = self._values.get(name, [])
        return {c: [t[i] for t in tensors] for i, c in enumerate(self._rows.get(name, []))}

    def _store_rows(self, name: str, rows: Mapping[str, Sequence[Tensor]]) -> None:
        self._rows[name] = list(rows)
        self._values[name] = [torch.stack(list(same)) for same in zip(*rows.values(), strict=True)]
        self._changed(name)

    def _put(self, source: str, name: str) -> None:
        """Store a copy of a set as the set `name`, at rest."""
        copy_set(self.model, source, name)
        rest(self.model, name)
        self._sets.pop(name, None)
        self._changed(name)

    def _changed(self, name: str) -> None:
        """Note that values of a set are others than before."""
        self._resting.pop(name, None)

    def renewed(self) -> None:
        """Note that values of all sets are others than before."""
        self._resting = {}

    # -- predicting -----------------------------------------------------------------------------------

    def predict(self, inputs: Inputs, by: Sequence[int], *, own: bool = True) -> Tensor:
        """The prediction for each input with the set chosen for it.

        Args:
            by: the number of the chosen set for each input, `(B,)`.
            own: for a classifier, give the classes of the set's tasks higher scores than all others.
        """
        model, asked = self.model, Inputs.of(inputs)
        if not isinstance(model, Classifier):
            if asked.options is None:  # generated answers have another length in each group
                return self._asked(asked, by, model.predict)
            return self._at_once(asked, by, model.predict)
        features = self.features(inputs, by)
        if not own and not any(self._rows.get(set_name(slot)) for slot in set(by)):
            return model.scores(features)
        whole = features.new_empty(len(by), len(model.classes), dtype=torch.float32)
        for slot, rows in _by_slot(by).items():
            with self._with_rows(set_name(slot)):
                scores = model.scores(features[rows])
            if not own:
                whole[rows] = scores
                continue
            of_set = set(self.kept[slot].classes)
            away = torch.tensor([c not in of_set for c in model.classes], device=scores.device)
            whole[rows] = scores.log_softmax(-1) - ELSEWHERE * away
        return whole

    def among(self, features: Tensor, by: Sequence[int], classes: Sequence[str]) -> Tensor:
        """Scores `(B, len(classes))` of features over these classes alone, with what belongs to the set chosen for
        each; only for a head that answers with any class."""
        assert isinstance(self.model, Classifier)
        whole = features.new_empty(len(by), len(classes), dtype=torch.float32)
        for slot, rows in _by_slot(by).items():
            with self.acting(set_name(slot)):
                whole[rows] = self.model.head.among(features[rows], classes).float()
        return whole

    def features(self, inputs: Inputs, by: Sequence[int]) -> Tensor:
        """Features of each input, computed with the set chosen for it."""
        return self._at_once(Inputs.of(inputs), by, self.model.features)

    def _at_once(self, inputs: Inputs, by: Sequence[int], ask: Callable[[Inputs], Tensor]) -> Tensor:
        """The result of `ask(inputs)` with the chosen set in force for each input.

        It takes one pass, or one pass for each set if the sets differ in shape.
        """
        used = sorted(set(by))
        names = tuple(map(set_name, used))
        if not self._alike(names):
            return self._asked(inputs, by, ask)
        place = {slot: position for position, slot in enumerate(used)}
        choice = Choice(names, torch.tensor([[place[slot]] for slot in by]))
        with using(self.model, (*self.common, choice)):
            return ask(inputs)

    def _alike(self, names: Sequence[str]) -> bool:
        """Whether the sets can act in one pass; asked for every batch, so each form is found once."""
        for name in names:
            if name not in self._forms:
                self._forms[name] = form(self.model, name)
        return self._forms[names[0]] is not None and len({self._forms[name] for name in names}) == 1

    def _asked(self, inputs: Inputs, by: Sequence[int], ask: Callable[[Inputs], Tensor]) -> Tensor:
        """The result of `ask(inputs)`, with one pass for each set; narrower rows are filled up."""
        parts: list[tuple[list[int], Tensor]] = []
        for slot, rows in _by_slot(by).items():
            with self.acting(set_name(slot)):
                parts.append((rows, ask(inputs.rows(rows))))
        width, first = max(part.shape[1] for _, part in parts), parts[0][1]
        fill = -torch.inf if first.is_floating_point() else self.model.nothing
        whole = first.new_full((len(by), width), fill)
        for rows, part in parts:
            whole[rows, : part.shape[1]] = part
        return whole

    # -- storing --------------------------------------------------------------------------

    def names(self) -> list[str]:
        """The names of the stored sets, without the working one."""
        return [set_name(slot) for slot in self.kept]

    def resting(self, model: str = "model", bank: str = "bank") -> Mapping[str, Resting]:
        """The stored sets by name. One whose values are as they were is the same object as before.

        Args:
            model, bank: the names under which the method has the model and the bank.
        """
        new = [name for name in self.names() if name not in self._resting]
        numbers = {set_name(slot): slot for slot in self.kept} if new else {}
        here = [(path, m) for path, m in self.model.named_modules() if isinstance(m, Slot)] if new else []
        for name in new:
            pets = {f"{model}.{path}.pets.{name}": slot.pet(name) for path, slot in here if name in slot.pets}
            rows = {f"{bank}.{name}-rows-{i}": rows for i, rows in enumerate(self._values.get(name, []))}
            self._resting[name] = Resting(pets, {**rows, **(self.beside(numbers[name]) if name in numbers else {})})
        return self._resting

    @property
    def keeps_earlier(self) -> bool:
        """Whether its extra state belongs to tensors of earlier tasks."""
        return any(self._values.values())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Bank:
        self._values = {name: [fn(rows) for rows in values] for name, values in self._values.items()}
        self._resting = {}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def get_extra_state(self) -> dict[str, Any]:
        rows = {name: classes for name, classes in self._rows.items() if classes}
        kept = [
            {"slot": k.slot, "tasks": k.tasks, "classes": k.classes, "weight": k.weight} for k in self.kept.values()
        ]
        return {"kept": kept, "rows": rows}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        before = set(self.names())
        self.kept, self._by_task = {entry["slot"]: Kept(**entry) for entry in state["kept"]}, None
        wanted, present = set(self.names()), set(sets(self.model))
        for name in sorted((before & present) - wanted):
            self._remove(name)
        if new := sorted(wanted - present):
            copies_at_rest(self.model, self.working, new)
        for name in new:
            self._sets.pop(name, None)
        self._rows, self._values, self._resting = {}, {}, {}
        for name, classes in state["rows"].items():
            self._store_rows(name, {c: [p.new_zeros(p.shape[1:]) for p in self.model.per_class()] for c in classes})

    def _remove(self, name: str) -> None:
        remove(self.model, name)
        self._sets.pop(name, None)
        self._forms.pop(name, None)
        self._rows.pop(name, None)
        self._values.pop(name, None)
        self._changed(name)

    def _pets(self, name: str) -> list[PET]:
        if name not in self._sets:
            self._sets[name] = pets(self.model, name)
        return self._sets[name]


def _by_slot(by: Sequence[int]) -> dict[int, list[int]]:
    """For each chosen set, the numbers of its inputs."""
    inputs_of: dict[int, list[int]] = {slot: [] for slot in sorted(set(by))}
    for number, slot in enumerate(by):
        inputs_of[slot].append(number)
    return inputs_of


def set_name(slot: int) -> str:
    """The name on the net of the set with that number."""
    return f"task-{slot}"

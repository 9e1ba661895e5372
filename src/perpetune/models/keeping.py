"""Features that are found again: what makes the features of an example, as a digest, and where a backbone looks first.

`Backbone.features` and `Backbone.query` are the only places where a net turns examples into features. While a `Keeper`
is at work they ask it first. So every method profits without a word of its own, and what is found again does not rest
on anyone's promise: the digest is of the values that are in force at that moment.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from perpetune.models.digest import digest_of
from perpetune.pets.base import PET, Slot, frozen, slots
from perpetune.pets.choice import Choice
from perpetune.tasks import Inputs

if TYPE_CHECKING:
    from perpetune.models.backbone import Backbone

ONCE = "!"  # begins a digest that holds for one batch alone
Key = tuple[str, str]
"""A table of features: the set of examples, and what makes their features."""


class NotKept(Exception):  # no error: it says that the examples have to be loaded
    """What was asked of examples that nobody has loaded is not known."""


class Unseen(Inputs):
    """Inputs that stand for some examples that nobody has loaded. They hold positions in the batch and nothing else.

    Whoever reads one of their tensors ends with `NotKept`, and is asked again with the examples themselves.
    """

    def __init__(self, places: Sequence[int]):
        self.places = list(places)
        self.said = 0

    @property
    def tensors(self) -> dict[str, Tensor]:  # type: ignore[override]
        raise NotKept

    def __len__(self) -> int:
        return len(self.places)

    def __contains__(self, name: str) -> bool:
        raise NotKept

    def __getitem__(self, name: str) -> Tensor:
        raise NotKept

    def rows(self, index: Sequence[int]) -> Unseen:
        return Unseen([self.places[i] for i in index])

    def __repr__(self) -> str:
        return f"Unseen({len(self)})"


@dataclass
class Table:
    """Features of a set of examples, on the CPU, as far as they are known.

    Attributes:
        rows: `(N, D)`.
        known: bool `(N,)`.
    """

    rows: Tensor
    known: Tensor

    @property
    def bytes(self) -> int:
        return self.rows.nbytes


@dataclass
class _Batch:
    """The batch that is asked about now.

    Attributes:
        examples: the digest of the set of examples; None if nothing may be kept of it.
        numbers: the position of each example in the set.
        count: the number of examples in the set.
        inputs: the loaded examples; None while nobody has loaded them.
        new: whether the set is of the task that was learned just now.
        only: whether a net that would have to compute ends with `NotKept`.
        seen: what the net has computed for this batch, by what made it.
    """

    examples: str | None
    numbers: list[int]
    count: int
    inputs: Inputs | None
    new: bool = False
    only: bool = False
    seen: dict[tuple[str, ...], Tensor] = field(default_factory=dict)


class Keeper:
    """Keeps features of sets of examples while what makes them is unchanged.

    Features of a task that was learned just now are kept. Those of other tasks are kept if the same values have made
    features before that were found again: where pets move with every task, nothing of earlier tasks is worth a place.

    Args:
        backbone: the backbone that asks; its frozen tensors are those of the fingerprint in the salt.
        salt: all that decides features beside the pets: the frozen weights, libraries, device, precision.
        most: bytes of tables that are kept.
    """

    def __init__(self, backbone: Backbone, salt: str, most: int):
        self.backbone, self.salt, self.most = backbone, salt, most
        self.tables: dict[Key, Table] = {}
        self.used: set[Key] = set()
        self.rested: set[str] = set()
        """What made features that were found again, so it is likely to make them once more."""
        self.left_out: set[Key] = set()
        """Tables for which there was no room in this evaluation."""
        self.computed = 0
        """Examples that a net has computed, each time counted."""
        self.found = 0
        """Examples whose features were found again."""
        self._makers: dict[str, set[tuple[int, str]]] = {}
        """For each set of examples what made features in this evaluation, with the first example of the batch."""
        self.same: bool | None = None
        """Whether the features of a method are those that its answers are made of; None until that was seen."""
        self._batch: _Batch | None = None
        self._device = torch.device("cpu")
        self._slots: list[tuple[str, Slot]] = []
        self._hashes: dict[tuple[Any, ...], str | None] = {}
        self._seen: list[tuple[PET, list[Tensor]]] = []
        self._resting: WeakKeyDictionary[PET, tuple[tuple[Any, ...], list[Tensor], str]] = WeakKeyDictionary()
        """Of pets at rest their digest, with what tells that they are the same: it stays from one evaluation to the
        next, because there is a set for each task."""
        self._first, self._frozen = _marks(backbone), ""

    # -- an evaluation --------------------------------------------------------------------------------

    @contextlib.contextmanager
    def at_work(self, device: torch.device) -> Iterator[None]:
        """Inside this context the backbone asks this keeper first. Pets are not put in or taken out meanwhile.

        The fingerprint of the frozen weights was read when the model was loaded. It is read again if tensors have been
        exchanged since then, as by `pets.fold`, or written to.

        Args:
            device: where features are asked for.
        """
        backbone = self.backbone
        before, backbone.keeper = backbone.keeper, self
        self._slots, self._hashes, self._device = _acting_slots(backbone), {}, device
        self._makers, self.same = {}, None
        self._frozen = "" if _marks(backbone) == self._first else backbone.fingerprint()
        try:
            yield
        finally:
            backbone.keeper, self._batch, self._slots, self._hashes, self._seen = before, None, [], {}, []

    @contextlib.contextmanager
    def asking(
        self, examples: str | None, numbers: Sequence[int], count: int, inputs: Inputs | None, new: bool = False
    ) -> Iterator[None]:
        """Inside this context one batch is asked about.

        Args:
            examples: the digest of the set of examples; None if nobody can say whether they are the same.
            numbers: the positions of the batch's examples in the set.
            count: the number of examples in the set.
            inputs: the loaded examples; None while nobody has loaded them.
            new: whether the set is of the task that was learned just now.
        """
        before, self._batch = self._batch, _Batch(examples, list(numbers), count, inputs, new)
        try:
            yield
        finally:
            self._batch = before

    @contextlib.contextmanager
    def only_known(self) -> Iterator[None]:
        """Inside this context a net that would have to compute ends with `NotKept`."""
        batch = self._batch
        before = batch is not None and batch.only
        if batch is not None:
            batch.only = True
        try:
            yield
        finally:
            if batch is not None:
                batch.only = before

    # -- what the backbone asks -----------------------------------------------------------------------

    def __call__(self, kind: str, inputs: Inputs, compute: Callable[[], Tensor]) -> Tensor:
        """The features `(B, D)` of inputs: those that are kept, or the result of `compute`.

        Args:
            kind: what is read of the net.
        """
        batch = self._batch
        places = _places(batch, inputs)
        if batch is None or places is None or torch.is_grad_enabled():
            return self._computed(inputs, compute)
        made = self._made(kind, len(places))
        if batch.examples is not None:
            alike = made is not None and len(set(made)) == 1 and len(places) == len(batch.numbers)
            maker = made[0] if made is not None and alike else ONCE
            self._makers.setdefault(batch.examples, set()).add((batch.numbers[0], maker))
        if made is None:
            return self._computed(inputs, compute)
        seen = batch.seen.get(made) if batch.inputs is not None else None
        if seen is not None:
            return seen.clone()
        found = self._look(batch, places, made)
        if found is None:
            found = self._computed(inputs, compute)
            self._note(batch, places, made, found)
        else:
            self.found += len(places)
        if batch.inputs is not None:
            batch.seen[made] = found.detach().clone()
        return found

    def _computed(self, inputs: Inputs, compute: Callable[[], Tensor]) -> Tensor:
        if isinstance(inputs, Unseen) or (self._batch is not None and self._batch.only):
            raise NotKept
        self.computed += len(inputs)
        return compute()

    @contextlib.contextmanager
    def comparing(self) -> Iterator[None]:
        """Inside this context the features of a batch are asked for, after its answers; afterwards `same` is known."""
        batch = self._batch
        before = set() if batch is None or batch.examples is None else set(self._makers.get(batch.examples, ()))
        yield
        after = before if batch is None or batch.examples is None else self._makers.get(batch.examples, set())
        self.same = self.same is not False and after == before and not any(one.startswith(ONCE) for _, one in after)

    def made_of(self, examples: str) -> str | None:
        """A digest of a set of examples and of all that made the features that were asked of it in this evaluation.

        None if nobody can say it, and where examples of one batch have features that were made in several ways.
        """
        makers = self._makers.get(examples)
        if not makers or any(maker.startswith(ONCE) for _, maker in makers):
            return None
        return _short(f"{examples} {sorted(makers)}")

    # -- tables ---------------------------------------------------------------------------------------

    def _look(self, batch: _Batch, places: Sequence[int], made: Sequence[str]) -> Tensor | None:
        """The kept features of these examples, each made by its own entry of `made`; None if one is not known."""
        if batch.examples is None:
            return None
        parts: list[tuple[list[int], Tensor]] = []
        for one, members in _grouped(made).items():
            table = self.table((batch.examples, one))
            numbers = [batch.numbers[places[i]] for i in members]
            if table is None or len(table.known) != batch.count or not bool(table.known[numbers].all()):
                return None
            parts.append((members, table.rows[numbers]))
        whole = parts[0][1].new_empty(len(places), parts[0][1].shape[1])
        for members, values in parts:
            if values.shape[1] != whole.shape[1] or values.dtype != whole.dtype:
                return None
            whole[members] = values
        self.used.update((batch.examples, one) for one in made)
        self.rested.update(made)
        return whole.to(self._device)

    def _note(self, batch: _Batch, places: Sequence[int], made: Sequence[str], features: Tensor) -> None:
        """Keep what was computed, if it is of a whole batch."""
        if batch.examples is None or batch.inputs is None or features.dim() != 2 or len(features) != len(places):
            return
        groups = {
            one: members
            for one, members in _grouped(made).items()
            if not one.startswith(ONCE) and (batch.new or one in self.rested)
        }
        here = features.detach().cpu() if groups else features
        for one, members in groups.items():
            key = batch.examples, one
            table = self.table(key)
            if table is None or table.rows.shape != (batch.count, here.shape[1]) or table.rows.dtype != here.dtype:
                table = Table(here.new_zeros(batch.count, here.shape[1]), torch.zeros(batch.count, dtype=torch.bool))
                if self.bytes + table.bytes > self.most:
                    self._make_room()
                if self.bytes + table.bytes > self.most:
                    self.left_out.add(key)
                    continue
                self.tables[key] = table
            numbers = [batch.numbers[places[i]] for i in members]
            table.rows[numbers], table.known[numbers] = here[members], True
            self.used.add(key)

    def _make_room(self) -> None:
        """Drop tables that this evaluation has not used: what is valid was looked at before anything was computed."""
        self.tables = {key: table for key, table in self.tables.items() if key in self.used}

    def table(self, key: Key) -> Table | None:
        """A table of features; None if there is none."""
        return self.tables.get(key)

    @property
    def bytes(self) -> int:
        return sum(table.bytes for table in self.tables.values())

    def drop(self, examples: str) -> None:
        """Forget a set of examples, because they have changed meanwhile."""
        for key in [key for key in self.tables if key[0] == examples]:
            del self.tables[key]
            self.used.discard(key)

    # -- what makes features --------------------------------------------------------------------------

    def _made(self, kind: str, count: int) -> tuple[str, ...] | None:
        """For each of `count` examples a digest of what makes its features now; None if nobody can say it."""
        active = [(path, slot, _as_tuple(slot.active)) for path, slot in self._slots if slot.active is not None]
        choices = list({id(one): one for _, _, ones in active for one in ones if isinstance(one, Choice)}.values())
        if any(len(choice) != count for choice in choices):
            return None
        if not choices:
            only = self._digest(kind, active, {})
            return None if only is None else (only,) * count
        if len(choices) > 1 or choices[0].weight is not None:
            told = [(c.members, c.index.tolist(), None if c.weight is None else c.weight.tolist()) for c in choices]
            only = self._digest(kind, active, {id(c): c.members for c in choices})
            return None if only is None else (f"{ONCE}{_short(f'{only} {told}')}",) * count
        choice, rows = choices[0], [tuple(row) for row in choices[0].index.tolist()]
        of = {row: self._digest(kind, active, {id(choice): [choice.members[i] for i in row]}) for row in set(rows)}
        found = tuple(one for row in rows if (one := of[row]) is not None)
        return found if len(found) == count else None

    def _digest(
        self, kind: str, active: Sequence[tuple[str, Slot, tuple[str | Choice, ...]]], chosen: dict[int, Any]
    ) -> str | None:
        made: list[str] = []
        for path, slot, ones in active:
            for one in ones:
                members: Sequence[str] = (one,) if isinstance(one, str) else chosen[id(one)]
                for name in members:
                    value = self._value(slot.pet(name), slot.pets.rests(name))
                    if value is None:
                        return None
                    made.append(f"{path} {value}")
                if isinstance(one, Choice) and len(members) > 1:
                    made.append(f"{path} {one.join} {len(members)}")
        key = ("digest", kind, *made)
        if key not in self._hashes:
            self._hashes[key] = _short(f"{self.salt} {self._frozen} {kind} {made}")
        return self._hashes[key]

    def _value(self, pet: PET, rests: bool) -> str | None:
        """A digest of a pet's values. It is made anew when a tensor was written to."""
        tensors = _tensors(pet)
        key = (id(pet), *((id(t), t._version) for t in tensors))
        if key not in self._hashes:
            known = self._resting.get(pet) if rests and not pet.training else None
            value = digest_of(pet) if known is None or known[0] != key else known[2]
            if rests and value is not None:
                self._resting[pet] = key, tensors, value
            self._hashes[key] = value
            self._seen.append((pet, tensors))  # as long as they live, no other object has their numbers
        return self._hashes[key]


def _tensors(pet: PET) -> list[Tensor]:
    """The parameters and buffers of a pet; asked for every batch, and torch's own way takes five times as long."""
    found: list[Tensor | None] = []
    waiting: list[nn.Module] = [pet]
    while waiting:
        module = waiting.pop()
        found += [*module._parameters.values(), *module._buffers.values()]
        waiting += [child for child in module._modules.values() if child is not None]
    return [tensor for tensor in found if tensor is not None]


def _places(batch: _Batch | None, inputs: Inputs) -> list[int] | None:
    """The positions in the batch of what is asked about; None if it is something else."""
    if isinstance(inputs, Unseen):
        return inputs.places
    if batch is None or inputs is not batch.inputs:
        return None
    return list(range(len(batch.numbers)))


def _grouped(made: Sequence[str]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for place, one in enumerate(made):
        groups.setdefault(one, []).append(place)
    return groups


def _as_tuple(active: Any) -> tuple[str | Choice, ...]:
    return active if isinstance(active, tuple) else (active,)


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _acting_slots(backbone: Backbone) -> list[tuple[str, Slot]]:
    """The slots whose pets can act on the features of examples: of a dual encoder not those of the tower for texts."""
    found = list(slots(backbone.net))
    side: Any = backbone.texts if backbone.takes == "pictures" else None
    others: Sequence[str] = getattr(side, "paths", ())  # another package's text side need not have it
    return [(p, s) for p, s in found if not any(o and (p == o or p.startswith(f"{o}.")) for o in others)]


def _marks(backbone: Backbone) -> list[tuple[str, int, int]]:
    """What tells that frozen tensors were exchanged or written to, without reading them."""
    named = sorted(frozen(backbone.net).items())
    here: list[tuple[str, Any]] = [(name, t.to_local() if hasattr(t, "to_local") else t) for name, t in named]
    return [(name, t.data_ptr(), t._version) for name, t in here]

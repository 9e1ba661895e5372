"""Parameter-efficient modules (PETs), and the slots of a frozen net in which they act.

A `Slot` takes the place of a frozen submodule. The active PET decides how that submodule is called, so a PET is a few
lines and knows nothing of the net. A net can carry several named sets of PETs. `using` puts one or several of them in
force; outside `using` none is in force.

Paths in this module name a submodule as if there were no slot around it: `blocks.0.attn.qkv`, wrapped or not.
"""

from __future__ import annotations

import contextlib
import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, Sequence, ValuesView
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, Protocol, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from perpetune.errors import UsageError, closest
from perpetune.numerics.lowrank import Factors
from perpetune.numerics.projection import Site
from perpetune.pets.choice import Choice

BARE = frozenset(vars(nn.Module()))  # attributes that every module has
TENSORS = ("_parameters", "_buffers")
COPIES = ("__copy__", "__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__getattribute__")
Conditions = Literal["exact", "paper"]
Module = TypeVar("Module", bound=nn.Module)
Active = str | Choice | tuple[str | Choice, ...] | None
"""The PETs in force in a slot: one by its name, a choice for each example, a tuple whose last one is the outermost, or
none."""
InForce = str | Choice | Sequence[str | Choice] | None
"""The sets of PETs in force in a net: one by its name, a choice for each example, several, or none."""


@dataclass(frozen=True)
class Place:
    """A frozen submodule that a PET can be put around.

    Attributes:
        path: its path in the net.
        module: the frozen submodule itself, never the slot around it.
        roles: what it does in the net, such as `("q", "v")`.
        parts: for a linear layer the slice of output rows of each role, in ascending order: two slices for q and v in
            a fused qkv, one slice of all rows for a layer with one role. Empty for other modules (a norm, a whole
            block).
        block: the number of its transformer block, from 0; -1 if it is in no block or the block is not known.
        d_in, d_out: widths of input and output.
        heads: the number of heads, if it is an attention or part of one; 0 if that is not known.
        depth: the number of transformer blocks in the net; 0 if that is not known.
        before: for the first block, the norm that tokens go through before it; None if there is none.
        words: for the table of tokens of a dual encoder's text tower: turns words into tokens, without those that begin
            and end a text.
    """

    path: str
    module: nn.Module
    roles: tuple[str, ...]
    parts: tuple[tuple[int, int], ...]
    block: int
    d_in: int
    d_out: int
    heads: int = 0
    depth: int = 0
    before: nn.Module | None = None
    words: Callable[[str], Sequence[int]] | None = None


class Pair(Protocol):
    """Two trained factors `A` and `B` that can be renewed.

    `renew` stores their product and starts a new pair. The stored product (the resting product) still acts, but it is
    never trained again.
    """

    @property
    def parts(self) -> Sequence[tuple[int, int]]:
        """The slices of output rows. Each has its own `B` and, in the same order, its own rows of `A`, as many as any
        other."""

    def trained(self) -> list[nn.Parameter]:
        """`A` and all `B`."""

    def product(self) -> Factors:
        """The whole update of the layer's weight, with the resting product: `B (o, k)` for the rows of its parts, and
        `A (k, d_in)`, with any `k`."""

    def renew(self, start: Tensor, rank: int | None = None, moments: Tensor | None = None) -> None:
        """Store the product as the resting one, set `A` to `start (P r, d_in)` and `B` to zero. No output changes.

        Args:
            rank: the highest rank of the resting product. If its rank is higher, the rest is cut off, and outputs do
                change.
            moments: second moments `(d_in, d_in)` of inputs; the cut changes the outputs for these as little as it can.
        """


class PET(nn.Module, ABC):
    """A small trainable module that decides how a frozen module is called.

    The library makes a PET by `cls(place, generator, **options)`. The class takes shapes from the place and draws its
    initial values from the generator alone. Its keyword-only arguments are its options in a recipe. A new PET leaves
    the output of `base` unchanged to the bit, unless it adds tokens.

    A PET that can be protected lists its `sites`, and its `forward` calls `seen` at each of them.
    """

    default_at: ClassVar[tuple[str, ...]] = ()  # the roles it is put at if the recipe names none
    adds_tokens: ClassVar[bool] = False  # whether it adds tokens to those of its input
    replaces_class_token: bool = False
    """Whether it puts something else in place of the net's class token; then the net needs to have one."""
    compiles: ClassVar[bool] = False
    """Whether its `forward` only computes with tensors, so that `run.compile` may compile it with its block."""
    of_task: bool = False
    """Whether each task has values of its own: the next one starts from new ones, and the head keeps what they made of
    the task's classes."""
    anew: Callable[[torch.Generator], PET] | None = None
    """Makes a pet of the same kind with the same options at the same place, with new initial values; None if the maker
    of the pet has not said how."""
    watch: Callable[..., None] | None = None
    """Called as `watch(site, rows)`, or as `watch(site, rows, examples)` if the rows belong to some examples only; then
    `examples (n,)` are their numbers."""

    @abstractmethod
    def forward(self, base: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The output that replaces `base(x, *args, **kwargs)`, of the same type and shape."""

    def sites(self, conditions: Conditions = "exact") -> list[Site]:
        """The sites where rows of features multiply parameters. Under protection a parameter at no site does not move.

        Args:
            conditions: `exact` keeps the outputs on the rows that were seen. `paper` uses equations 10 to 14 of PEGP
                (arXiv:2405.13383), for comparison.

        Raises:
            UsageError: the PET has no such conditions.
        """
        return []

    def free(self, conditions: Conditions = "exact") -> list[nn.Parameter]:
        """Parameters that these conditions do not restrict, although old outputs change with them."""
        return []

    def renewable(self) -> tuple[Site, Pair] | None:
        """The pair that can be renewed and the site of its `A`; None if the PET has no such pair.

        A renewed `A` is zero on the features of old tasks. Then old outputs stay whatever `B` becomes, so only `A`
        needs protection.
        """
        return None

    def make_room(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Resize tensors whose size can differ between tasks, before values are loaded.

        Args:
            shapes: the shape of each tensor that is about to be loaded, by its name.
        """

    def idle(self) -> list[str]:
        """Names of sites whose parameters have no effect now, because the next factor is zero. They may be moved."""
        return []

    def joined(self, pets: Sequence[PET]) -> None:
        """Check the set that the pet belongs to. Called once with all pets of the set, before any of them acts.

        Raises:
            UsageError: the set lacks a pet that this one needs.
        """

    def fold(self, base: nn.Module) -> nn.Module | None:
        """A new module that computes at prediction what `base` with this pet computes. It shares no values with either.

        None if there is no such module.
        """
        return None

    def seen(self, site: str, rows: Tensor) -> None:
        """Hand the rows at a site to `watch`: `(..., width)`, or `(B, groups, N, width)` if the site has groups."""
        if self.watch is not None:
            self.watch(site, rows.detach())

    # -- one member of several, chosen for each example -----------------------------------------------

    def blend(self, members: Sequence[PET], choice: Choice) -> dict[str, Tensor]:
        """Values for this pet's tensors, by their names. With them the pet treats each example as its members would.

        Each value has a leading axis of examples, `(B, …)`, and `forward` has to accept that.

        Args:
            members: the pets of `choice.members` at this place; this pet is the first.

        Raises:
            UsageError: pets of this kind cannot be chosen for each example.
        """
        raise UsageError(
            f"{type(self).__name__} cannot be chosen for each example, because its class has no `blend`; put one set "
            "in force for the whole batch"
        )

    def part_seen(self, site: str, rows: Tensor, position: int, choice: Choice) -> Tensor:
        """The part of `rows` at a site of the blended pet that the member at `position` of each example would see."""
        return rows

    def mixed(self, members: Sequence[PET], choice: Choice, base: Any, *args: Any, **kwargs: Any) -> Any:
        """The output that replaces `base(*args, **kwargs)` if each example has its own members."""
        choice.check(args[0])
        values = self.blend(members, choice)
        with self._watch_by_example(members, choice):
            return torch.func.functional_call(self, values, (base, *args), kwargs, strict=False)

    @contextlib.contextmanager
    def _watch_by_example(self, members: Sequence[PET], choice: Choice) -> Iterator[None]:
        """Inside this context each watched member reports the rows of its own examples."""
        before = self.watch
        watches = {number: member.watch for number, member in enumerate(members) if member.watch is not None}
        if not watches:
            yield
            return

        def shown(site: str, rows: Tensor) -> None:
            for number, watch in watches.items():
                for position in range(choice.each):
                    examples = choice.examples_of(number, position)
                    if len(examples):
                        mine = self.part_seen(site, choice.share(rows, examples), position, choice)
                        watch(site, mine, examples)

        self.watch = shown
        try:
            yield
        finally:
            self.watch = before


_counted: ContextVar[Tensor | None] = ContextVar("_counted", default=None)


@contextlib.contextmanager
def counting(mask: Tensor) -> Iterator[None]:
    """Inside this context a tower reads texts, and of its positions only those count for which `mask (B, N)` is true.

    A tower that is called with its own texts says so itself: the batch that is learned has another mask, or none.
    """
    token = _counted.set(mask)
    try:
        yield
    finally:
        _counted.reset(token)


def counted() -> Tensor | None:
    """The mask of the texts that a tower reads now; None outside of `counting`."""
    return _counted.get()


@dataclass(frozen=True)
class _TypeOnly:
    """The type of a weight. Code outside a slot may ask for the type, but must not use the weight."""

    dtype: torch.dtype


class Sets(nn.ModuleDict):
    """The PETs of a slot, by the names of their sets.

    A PET at rest is found here like any other. But it is no submodule, so what goes through all modules of a net (an
    optimizer, `train`, `state_dict`) does not see it and takes no time for it, however many there are.
    """

    def __init__(self) -> None:
        super().__init__()
        self._resting: dict[str, PET] = {}

    def rest(self, name: str) -> None:
        """Put a PET to rest: nothing trains it any more. One that rests already stays as it is."""
        if name in self._modules:
            pet = self._modules.pop(name)
            assert isinstance(pet, PET)
            self._resting[name] = pet

    def put_at_rest(self, name: str, pet: PET) -> None:
        """Put a PET in that is at rest from the beginning."""
        self._modules.pop(name, None)
        self._resting[name] = pet

    def rests(self, name: str) -> bool:
        """Whether a PET is here and at rest."""
        return name in self._resting

    def __getitem__(self, name: str) -> nn.Module:
        pet = self._resting.get(name)
        if pet is None:
            return super().__getitem__(name)
        if pet.training != self.training:
            pet.train(self.training)
        return pet

    def __setitem__(self, name: str, pet: nn.Module) -> None:
        self._resting.pop(name, None)
        super().__setitem__(name, pet)

    def __delitem__(self, name: str) -> None:
        if self._resting.pop(name, None) is None:
            super().__delitem__(name)

    def __contains__(self, name: object) -> bool:
        return name in self._modules or name in self._resting

    def __len__(self) -> int:
        return len(self._modules) + len(self._resting)

    def __iter__(self) -> Iterator[str]:
        return iter([*self._modules, *self._resting])

    def keys(self) -> KeysView[str]:
        return dict.fromkeys(self).keys()

    def values(self) -> ValuesView[nn.Module]:
        return {name: self[name] for name in self}.values()

    def items(self) -> ItemsView[str, nn.Module]:
        return {name: self[name] for name in self}.items()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Sets:
        for pet in self._resting.values():
            pet._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


class Slot(nn.Module):
    """Takes the place of `base` in the net. Calls it through the active PET, or directly if no PET is active.

    With several active PETs, the first calls the frozen submodule, and each of the others calls the one before it.

    A slot does not pass on attributes such as `weight`. Code that reads them instead of calling the module would leave
    the PET out without a sign; so it fails with an error. The `weight` of a patch embedding (a convolution, or a layer
    whose `asked_for_type` is true) is an exception: it has a `dtype` and nothing else, because transformers asks the
    patch embedding for the type of its input.
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.pets = Sets()
        self.active: Active = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not args and "hidden_states" in kwargs:  # transformers calls the attention of most language models like this
            args = (kwargs.pop("hidden_states"),)
        active = self.active
        if active is None:
            return self.base(*args, **kwargs)
        if isinstance(active, str):
            return self.pets[active](self.base, *args, **kwargs)
        call: Callable[..., Any] = self.base
        for one in active if isinstance(active, tuple) else (active,):
            call = partial(self._chosen(one) if isinstance(one, Choice) else self.pets[one], call)
        return call(*args, **kwargs)

    def _chosen(self, choice: Choice) -> Callable[..., Any]:
        """The PETs of a choice, joined into one function that calls its base."""
        members = [self.pet(name) for name in choice.members]
        return partial(members[0].mixed, members, choice)

    def __getattr__(self, name: str) -> Any:
        base = self._modules.get("base") if name == "weight" else None
        if isinstance(base, nn.Conv2d) or getattr(base, "asked_for_type", False):
            return _TypeOnly(getattr(base, "weight").dtype)  # noqa: B009
        return super().__getattr__(name)

    def pet(self, name: str) -> PET:
        """The PET of the set `name` in this slot.

        Raises:
            KeyError: the set has no PET in this slot.
        """
        pet = self.pets[name]
        assert isinstance(pet, PET)
        return pet

    def activate(self, wanted: Active) -> None:
        """Put in force those of the wanted PETs that this slot has.

        Raises:
            UsageError: the slot has some members of a choice and lacks others.
        """
        wanted_ones = wanted if isinstance(wanted, tuple) else () if wanted is None else (wanted,)
        present = tuple(one for one in wanted_ones if self._has(one))
        self.active = present if len(present) > 1 else present[0] if present else None

    def _has(self, wanted: str | Choice) -> bool:
        if isinstance(wanted, str):
            return wanted in self.pets
        present = [name for name in wanted.members if name in self.pets]
        if present and len(present) < len(wanted.members):
            lacking = next(name for name in wanted.members if name not in self.pets)
            raise UsageError(
                f"a choice of pets: set {present[0]!r} has a pet around {type(self.base).__name__} and set {lacking!r} "
                "has none: the sets of a choice need the same places"
            )
        return bool(present)


def inject(root: nn.Module, places: Sequence[Place], make: Callable[[Place], PET], name: str = "default") -> list[PET]:
    """Put a set of PETs around the submodules of `root` at `places`; a place may carry several sets.

    Returns:
        The new PETs, in the order of `places`, on the device and in the mode of the modules they wrap.

    Raises:
        UsageError: the name cannot be used or is taken, there is no place, or a place is not in `root`.
    """
    if not re.fullmatch(r"[\w-]+", name) or name in dir(nn.ModuleDict()):
        raise UsageError(
            f"{name!r} cannot name a set of pets: use letters, digits, '_' and '-', and no attribute of torch's "
            "ModuleDict"
        )
    if not places:
        raise UsageError("no place to put a pet: name at least one role and one block")
    taken = {path for path, slot in slots(root) if name in slot.pets}
    for place in places:
        if not place.path or submodule(root, place.path) is not place.module:
            raise UsageError(f"{place.path!r} does not lead to the module of its place in {type(root).__name__}")
        if place.path in taken:
            raise UsageError(f"{place.path} has a pet called {name!r} already; remove it or choose another name")
    made = [make(place) for place in places]
    for pet in made:
        pet.joined(made)
    for place, pet in zip(places, made, strict=True):
        slot, parameter = _slot_at(root, place.path), next(place.module.parameters(), None)
        slot.pets[name] = pet.train(slot.pets.training).to(None if parameter is None else parameter.device)
    return made


def copy_set(root: nn.Module, name: str, new: str) -> None:
    """Make the set `new` a copy of the set `name`: in every slot the same class of pet with the same values.

    If the set `new` exists already, its parameters keep their identity and get the values.

    Raises:
        UsageError: there is no set `name`; the message lists the sets that exist.
    """
    _known(root, name)
    # A pet may hold its place; the frozen modules in it do not belong to the pet and are not copied.
    memo = {id(module): module for _, module in walk(root)}
    for _, slot in slots(root):
        if name in slot.pets and new in slot.pets:
            slot.pets[new].load_state_dict(slot.pets[name].state_dict())
        elif name in slot.pets:
            slot.pets[new] = twin(slot.pet(name), dict(memo))


def copies_at_rest(root: nn.Module, name: str, new: Sequence[str]) -> None:
    """Make sets at rest that are copies of the set `name`, and walk through the net once for all of them.

    Args:
        new: their names. Sets that have these names already are replaced.

    Raises:
        UsageError: there is no set `name`; the message lists the sets that exist.
    """
    _known(root, name)
    memo = {id(module): module for _, module in walk(root)}
    for _, slot in slots(root):
        if name in slot.pets:
            pet = slot.pet(name)
            for one in new:
                slot.pets.put_at_rest(one, twin(pet, dict(memo)))


def twin(module: Module, memo: dict[int, Any]) -> Module:
    """What `copy.deepcopy(module, memo)` makes, in a third of the time: a state may have thousands of members.

    A module that has hooks, or its own way to be copied, is left to `copy.deepcopy`.
    """
    kind, hooks = type(module), (value for name, value in vars(module).items() if "hooks" in name)
    if (
        id(module) in memo
        or any(getattr(kind, n, None) is not getattr(nn.Module, n, None) for n in COPIES)
        or any(hooks)
    ):
        return copy.deepcopy(module, memo)
    made = memo[id(module)] = kind.__new__(kind)
    for name, value in vars(module).items():
        if name == "_modules":
            new = type(value)((key, child and twin(child, memo)) for key, child in value.items())
        elif name in TENSORS:
            new = type(value)((key, copy.deepcopy(tensor, memo)) for key, tensor in value.items())
        elif name in BARE and not value and isinstance(value, dict | set):  # most of them are empty
            new = type(value)()
        elif value is None or isinstance(value, bool | int | float | str):
            new = value
        else:
            new = copy.deepcopy(value, memo)
        made.__dict__[name] = new
    return made


def rest(root: nn.Module, name: str) -> None:
    """Put a set of PETs to rest (`Sets`): it can be in force, copied and removed as before, and is not trained again.

    Raises:
        UsageError: there is no such set; the message lists the sets that exist.
    """
    _known(root, name)
    for _, slot in slots(root):
        slot.pets.rest(name)


def draw_set(root: nn.Module, name: str, rng: torch.Generator, *, of_task: bool = False) -> None:
    """Give the pets of a set new initial values, as if the set were injected again.

    Args:
        of_task: only those pets of which each task has its own.

    Raises:
        UsageError: there is no such set, or its pets were injected by code that has not said how to make them.
    """
    for pet in pets(root, name):
        if of_task and not pet.of_task:
            continue
        if pet.anew is None:
            raise UsageError(
                f"the set of pets {name!r} cannot be drawn anew: {type(pet).__name__} has no `anew`, which the code "
                "that injects it has to set"
            )
        pet.load_state_dict(pet.anew(rng).state_dict())


def is_plain(base: nn.Module, kind: type[Module]) -> TypeGuard[Module]:
    """Whether `base` computes the same as torch's `kind` does from its weight and bias.

    A 4-bit linear layer or a weight-standardised convolution is a subclass of `kind` too, but computes something else.
    """
    return isinstance(base, kind) and type(base).forward is kind.forward


def with_values(base: Module, weight: Tensor, bias: Tensor | None) -> Module:
    """A frozen copy of a linear layer, convolution or norm with another weight and bias, in the same type."""
    new = copy.deepcopy(base)
    dtype = next((p.dtype for p in base.parameters()), weight.dtype)
    for name, values in (("weight", weight), ("bias", bias)):
        setattr(new, name, None if values is None else nn.Parameter(values.to(dtype), requires_grad=False))
    return new


def slots(root: nn.Module) -> Iterator[tuple[str, Slot]]:
    """Every slot in `root` with its path; outer slots come before inner ones."""
    return ((path, module) for path, module in walk(root, parents=True) if isinstance(module, Slot))


def sets(root: nn.Module) -> list[str]:
    """The names of the sets of PETs in `root`, ordered by their first place; at the same place the oldest is first."""
    return list(dict.fromkeys(name for _, slot in slots(root) for name in slot.pets))


def has_set(root: nn.Module, name: str, kind: type[PET] | None = None) -> bool:
    """Whether there is a set of PETs with that name. If `kind` is given, all its PETs have to be of that class."""
    if kind is None:  # a short cut, because this is called at every step and there may be many sets
        return any(name in slot.pets for _, slot in slots(root))
    pets = [slot.pets[name] for _, slot in slots(root) if name in slot.pets]
    return bool(pets) and all(isinstance(pet, kind) for pet in pets)


def form(root: nn.Module, name: str) -> tuple[Any, ...] | None:
    """The places of a set, the class of its pets, and their tensors' names, shapes and types.

    Sets of one form can be members of a `Choice`. None if a pet's class has no `blend`.
    """
    found: list[tuple[Any, ...]] = []
    for path, slot in slots(root):
        if name not in slot.pets:
            continue
        pet = slot.pet(name)
        if type(pet).blend is PET.blend:
            return None
        found.append((path, type(pet), *((key, tuple(t.shape), t.dtype) for key, t in pet.state_dict().items())))
    return tuple(found)


def blendable(root: nn.Module, names: Sequence[str]) -> bool:
    """Whether these sets can be members of a `Choice`: all have one form."""
    forms = {form(root, name) for name in names}
    return len(forms) == 1 and None not in forms


def pets(root: nn.Module, name: str) -> list[PET]:
    """The PETs of one set, in the order of their paths in the net.

    Raises:
        UsageError: there is no such set; the message lists the sets that exist.
    """
    _known(root, name)
    return [slot.pet(name) for _, slot in slots(root) if name in slot.pets]


def parameters(root: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameters of one set of PETs; raises UsageError if there is no such set."""
    return [p for pet in pets(root, name) for p in pet.parameters()]


def remove(root: nn.Module, name: str) -> None:
    """Take one set of PETs out. An empty slot is replaced by the frozen submodule that it held.

    Raises:
        UsageError: there is no such set; the message lists the sets that exist.
    """
    _known(root, name)
    for path, slot in [entry for entry in slots(root) if name in entry[1].pets]:
        del slot.pets[name]
        slot.activate(slot.active)
        if not slot.pets:
            _set_at(root, path, slot.base)


def fold(root: nn.Module, name: str) -> int:
    """Make one set of PETs part of the modules that they are put around, for prediction without PETs.

    A new module replaces each of these modules, and the set is gone afterwards. The tensors of the old modules are not
    written to. Use this for a net that only predicts. A method cannot go on with it, because the method looks for its
    set; and a method that also runs the net without pets (`concat` of `first_session`, SAFE's losses) would get the
    tuned net.

    Returns:
        The number of replaced modules.

    Raises:
        UsageError: there is no such set, a PET cannot be folded into its module, or a place carries other sets too.
            Nothing changes then.
    """
    _known(root, name)
    carriers = [(path, slot) for path, slot in slots(root) if name in slot.pets]
    new: list[nn.Module] = []
    for path, slot in carriers:
        if others := sorted(slot.pets.keys() - {name}):
            raise UsageError(f"{path} also carries the set of pets {others[0]!r}; remove it before {name!r} is folded")
        if any(hasattr(p, "placements") for p in slot.base.parameters()):
            raise UsageError(f"{path} is cut over processes (run.shard), so no pet is folded into it: use one process")
        with torch.no_grad():
            folded = slot.pet(name).fold(slot.base)
        if folded is None:
            pet, base = type(slot.pet(name)).__name__, type(slot.base).__name__
            raise UsageError(f"{path}: {pet} cannot be folded into {base}; predict with the set {name!r} in force")
        new.append(folded.train(slot.base.training))
    for (path, _), folded in zip(carriers, new, strict=True):
        _set_at(root, path, folded)
    return len(new)


@contextlib.contextmanager
def folding(root: nn.Module, name: str) -> Iterator[None]:
    """Inside this context one set of PETs is part of the modules that it is put around, and no other set is there.

    Afterwards everything is as it was. Raises UsageError as `fold`, but a place may carry other sets too.
    """
    _known(root, name)
    before = list(slots(root))
    try:
        for path, slot in reversed(before):  # inner slots first
            bare = slot.base
            if name in slot.pets:
                with torch.no_grad():
                    folded = slot.pet(name).fold(slot.base)
                if folded is None:
                    pet, base = type(slot.pet(name)).__name__, type(slot.base).__name__
                    raise UsageError(f"{path}: {pet} cannot be folded into {base}")
                bare = folded.train(slot.base.training)
            _set_at(root, path, bare)
        yield
    finally:
        for path, slot in before:
            _set_at(root, path, slot)


@contextlib.contextmanager
def using(root: nn.Module, names: InForce) -> Iterator[None]:
    """Inside this context the PETs of the named sets are in force and no others; None means the bare frozen net.

    With several sets all are in force. If more than one has a PET around the same submodule, the PET of the later set
    calls that of the earlier set as its base; so updates that are added, such as LoRA's, add up. A PET that needs to
    know the class of its base (a prompt in an attention) has to belong to the first set.

    With a `Choice` each example of the batch has its own sets, in one pass. If the choice leaves one set for all
    examples, that set is in force as if it were named.

    Raises:
        UsageError: there is no such set (the message lists the sets that exist), or the members of a choice have
            different places.
    """
    entries = (names,) if isinstance(names, str | Choice) else () if names is None else names
    before = [(slot, slot.active) for _, slot in slots(root)]
    for one in entries:
        for name in (one,) if isinstance(one, str) else one.members:
            _known(root, name, [slot for slot, _ in before])
    wanted = tuple(one if isinstance(one, str) else one.narrowed() for one in entries)
    try:
        for slot, _ in before:
            slot.activate(wanted)
        yield
    finally:
        for slot, active in before:
            slot.activate(active)


def submodule(root: nn.Module, path: str) -> nn.Module | None:
    """The frozen submodule at `path`, without the slot around it; None if there is none."""
    module = _bare(root)
    for part in path.split(".") if path else ():
        try:
            module = _bare(module.get_submodule(part))
        except AttributeError:
            return None
    return module


def frozen(root: nn.Module) -> dict[str, Tensor]:
    """The persistent tensors of `root` without its PETs, by the names they would have without slots."""
    tensors = {name: value for name, value in root.state_dict().items() if isinstance(value, Tensor)}
    wrapped = [path for path, module in root.named_modules() if isinstance(module, Slot)]
    for path in sorted(wrapped, key=len, reverse=True):  # inner slots first, because their names contain the outer ones
        start = f"{path}." if path else ""
        tensors = {
            start + name.removeprefix(f"{start}base.") if name.startswith(f"{start}base.") else name: value
            for name, value in tensors.items()
            if not name.startswith(f"{start}pets.")
        }
    return tensors


def _bare(module: nn.Module) -> nn.Module:
    return module.base if isinstance(module, Slot) else module


def walk(module: nn.Module, path: str = "", *, parents: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """Every module with its path. The module in a slot comes after the slot and has the same path.

    Args:
        parents: leave out those below `module` that have no modules in them; most have none.
    """
    waiting = [(path, module)]  # a list and no recursion, because every step of training walks through the net
    while waiting:
        path, module = waiting.pop()
        yield path, module
        if isinstance(module, Slot):
            waiting.append((path, module.base))
        elif module._modules:
            start = f"{path}." if path else ""
            children = [
                (name, child)
                for name, child in reversed(module._modules.items())
                if child is not None and (child._modules or not parents)
            ]
            waiting += {id(child): (start + name, child) for name, child in children}.values()  # each child once


def outermost(root: nn.Module, path: str) -> nn.Module:
    """The module that is called at `path`: the slot if there is one, else the submodule itself."""
    parent, _, leaf = path.rpartition(".")
    around = submodule(root, parent)
    assert around is not None
    return around.get_submodule(leaf)


def _slot_at(root: nn.Module, path: str) -> Slot:
    """The slot at `path`; a new one if there is none yet."""
    module = outermost(root, path)
    if isinstance(module, Slot):
        return module
    slot = Slot(module).train(module.training)
    _set_at(root, path, slot)
    return slot


def _set_at(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path`, in place of the slot or of the bare submodule there."""
    parent, _, leaf = path.rpartition(".")
    around = submodule(root, parent)
    assert around is not None
    setattr(around, leaf, module)


def _known(root: nn.Module, name: str, among: Sequence[Slot] | None = None) -> None:
    """UsageError if there is no such set. `among` are all slots, if they are known already."""
    if not (has_set(root, name) if among is None else any(name in slot.pets for slot in among)):
        raise UsageError(f"there is no set of pets called {name!r}; {closest(name, sorted(sets(root)))}")

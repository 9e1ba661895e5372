"""Parameter-efficient modules (PETs) and the slots of a frozen net they act in.

A `Slot` stands where a frozen submodule stood. The active PET decides how that submodule is called,
so a PET is a few lines and knows nothing of the net. A net can carry several named sets of PETs;
`using` says which one is in force, or which several, and none is unless it says so.

Paths in this module name a submodule as if no slot were there: `blocks.0.attn.qkv`, wrapped or not.
"""

from __future__ import annotations

import contextlib
import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, Protocol, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from perpetune.errors import UsageError, closest
from perpetune.numerics.lowrank import Factors
from perpetune.numerics.projection import Operand
from perpetune.pets.choice import Choice

Conditions = Literal["exact", "paper"]
Module = TypeVar("Module", bound=nn.Module)
Active = str | Choice | tuple[str | Choice, ...] | None
"""The PETs in force in a slot: one, those that were chosen for each example, several of which the last is the
outermost, or none."""
InForce = str | Choice | Sequence[str | Choice] | None
"""The sets of PETs in force in a net: one, a choice for each example, several, or none."""


@dataclass(frozen=True)
class Place:
    """A frozen submodule that a PET can stand around.

    Attributes:
        path: where it is in the net.
        module: the frozen submodule itself, never the slot around it.
        roles: what it does there, such as `("q", "v")`.
        parts: the slices of output rows that the roles stand for, ascending: two of a fused qkv for
            q and v, all rows of a linear of its own; empty for what is no linear (a norm, a whole block).
        block: which transformer block it is in, from 0; -1 where that is not known, or it is in none.
        d_in, d_out: widths of input and output.
        heads: heads of the attention that it is or is part of; 0 where that is not known.
        depth: number of transformer blocks in the net; 0 where that is not known.
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


@dataclass(frozen=True, eq=False)
class Site:
    """Where features meet parameters of a PET: what has to be known to keep old answers as they are.

    Attributes:
        name: of the site in its PET; the PET tells what it sees there by `seen(name, rows)`.
        operand: the parameters that the rows multiply, and on which axis.
        groups: kinds of rows, each with moments of its own; the operand's heads unless `lift` maps them.
        width: of the rows observed, without the constant 1 that meets a bias; None is the operand's.
        lift: moments of the rows that multiply the operand, `(heads, m, m)`, from those observed,
            `(groups, width, width)`; None where they are the same.
        always: whether every pass over data reaches it; else one that does not leaves it as it is.
    """

    name: str
    operand: Operand
    groups: int = 1
    width: int | None = None
    lift: Callable[[Tensor], Tensor] | None = None
    always: bool = True


class Pair(Protocol):
    """Two factors `A` and `B` that are trained, whose product may come to rest so that a new pair takes their place.

    What rests acts on, and is never trained again.
    """

    @property
    def parts(self) -> Sequence[tuple[int, int]]:
        """The slices of output rows that have a `B` each; the rows of `A` are theirs, part by part, of one rank."""

    def trained(self) -> list[nn.Parameter]:
        """`A` and all `B`."""

    def product(self) -> Factors:
        """All that it adds to the layer's weight, what rests included: `B (o, k)`, of the rows of its parts, and
        `A (k, d_in)`, for any `k`."""

    def renew(self, start: Tensor, rank: int | None = None, moments: Tensor | None = None) -> None:
        """The product comes to rest, `A` becomes `start (P r, d_in)` and `B` zero: no output changes.

        Args:
            rank: of what rests, at most; what is over it is cut off, which does change outputs.
            moments: `(d_in, d_in)` of the inputs on which the cut is to change as little as it can.
        """


class PET(nn.Module, ABC):
    """A small trainable module that decides how a frozen one is called.

    A concrete class is made as `cls(place, generator, **options)`: it takes shapes from the place,
    draws its initial values from the generator alone, and its keyword-only arguments are its options
    in a recipe. As made, it leaves the output of `base` bit for bit as it is, unless it adds tokens.

    To be protected it names its `sites`, and its `forward` calls `seen` at each of them.
    """

    default_at: ClassVar[tuple[str, ...]] = ()  # the roles it goes to unless told otherwise
    adds_tokens: ClassVar[bool] = False  # whether it puts tokens beside those of its input
    watch: Callable[..., None] | None = None
    """Called as `watch(site, rows)`; where the rows are not of all examples, with their numbers `(n,)` as a third."""

    @abstractmethod
    def forward(self, base: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What stands for `base(x, *args, **kwargs)`, of the same type and shape."""

    def sites(self, conditions: Conditions = "exact") -> list[Site]:
        """Where features meet its parameters; a parameter at no site is not protected but kept still.

        Args:
            conditions: `exact` keeps the outputs on the rows seen; `paper` is what PEGP (arXiv:2405.13383)
                states in equations 10 to 14, for comparison.

        Raises:
            UsageError: there are no such conditions for it.
        """
        return []

    def free(self, conditions: Conditions = "exact") -> list[nn.Parameter]:
        """Parameters that these conditions leave free to move, knowing that old outputs move with them."""
        return []

    def renewable(self) -> tuple[Site, Pair] | None:
        """The pair that can be renewed, and the site of its `A`, which is all that is held then; None where there is
        none.

        A new `A` is zero on what old tasks use, so whatever its `B` becomes, old outputs stay.
        """
        return None

    def make_room(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Give tensors that change their size between tasks that of those about to be loaded, by their names."""

    def idle(self) -> list[str]:
        """Sites whose values have no effect as things stand (what follows them is zero), so they may be moved."""
        return []

    def joined(self, pets: Sequence[PET]) -> None:
        """Told of all the pets of its set, itself among them, before any acts; UsageError if it lacks one it needs."""

    def fold(self, base: nn.Module) -> nn.Module | None:
        """A new module that computes at prediction what this pet makes of `base`, with values of its own.

        None where there is no such module.
        """
        return None

    def seen(self, site: str, rows: Tensor) -> None:
        """Show the watcher rows at a site: `(..., width)`, or `(B, groups, N, width)` where there are groups."""
        if self.watch is not None:
            self.watch(site, rows.detach())

    # -- one member of several, chosen for each example -----------------------------------------------

    def blend(self, members: Sequence[PET], choice: Choice) -> dict[str, Tensor]:
        """Values for this pet's tensors, by their names, with which it does for each example what its members would do.

        Each has a leading axis of examples, `(B, …)`, and `forward` has to take them so.

        Args:
            members: the pets of `choice.members` at this place, this one the first.

        Raises:
            UsageError: pets of this kind cannot be chosen for each example.
        """
        raise UsageError(
            f"{type(self).__name__} cannot be chosen for each example: its class has no `blend`; put one set in force "
            "for all of a batch"
        )

    def part_seen(self, site: str, rows: Tensor, position: int, choice: Choice) -> Tensor:
        """Of the rows at a site of the blended pet, those that the member at `position` of each example would see."""
        return rows

    def mixed(self, members: Sequence[PET], choice: Choice, base: Any, *args: Any, **kwargs: Any) -> Any:
        """What stands for `base(*args, **kwargs)` where each example has members of its own."""
        choice.check(args[0])
        values = self.blend(members, choice)
        with self._told_apart(members, choice):
            return torch.func.functional_call(self, values, (base, *args), kwargs, strict=False)

    @contextlib.contextmanager
    def _told_apart(self, members: Sequence[PET], choice: Choice) -> Iterator[None]:
        """Inside, each member that is watched shows the rows of its own examples."""
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


@dataclass(frozen=True)
class _TypeOnly:
    """What code may know of a weight that it must not use."""

    dtype: torch.dtype


class Slot(nn.Module):
    """Stands where `base` stood; calls it through the active PET, or plainly when there is none.

    Of several active PETs each calls the one before it as its base, the first the frozen submodule itself.

    It does not pass on attributes such as `weight`: code that reads them instead of calling the
    module would silently leave the PET out, and fails loudly this way. The `weight` of a convolution tells
    its type and no more, for transformers asks the patch embedding which type its input has to be of.
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.pets = nn.ModuleDict()
        self.active: Active = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not args and "hidden_states" in kwargs:  # so transformers calls the attention of most language models
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
        """The PETs of a choice as one that calls its base."""
        members = [self.pet(name) for name in choice.members]
        return partial(members[0].mixed, members, choice)

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and isinstance(base := self._modules.get("base"), nn.Conv2d):
            return _TypeOnly(base.weight.dtype)
        return super().__getattr__(name)

    def pet(self, name: str) -> PET:
        """The PET of that set.

        Raises:
            KeyError: the set has none here.
        """
        pet = self.pets[name]
        assert isinstance(pet, PET)
        return pet

    def activate(self, wanted: Active) -> None:
        """Put in force those of the PETs wanted that are here.

        Raises:
            UsageError: members of a choice of which some are here and some are not.
        """
        given = wanted if isinstance(wanted, tuple) else () if wanted is None else (wanted,)
        here = tuple(one for one in given if self._has(one))
        self.active = here if len(here) > 1 else here[0] if here else None

    def _has(self, wanted: str | Choice) -> bool:
        if isinstance(wanted, str):
            return wanted in self.pets
        here = [name for name in wanted.members if name in self.pets]
        if here and len(here) < len(wanted.members):
            lacking = next(name for name in wanted.members if name not in self.pets)
            raise UsageError(
                f"a choice of pets: {here[0]!r} has one around {type(self.base).__name__} and {lacking!r} has none: "
                "sets at the same places are expected"
            )
        return bool(here)


def inject(root: nn.Module, places: Sequence[Place], make: Callable[[Place], PET], name: str = "default") -> list[PET]:
    """Put a set of PETs around the submodules of `root` at `places`; a place may carry several sets.

    Returns:
        The new PETs, in the order of `places`, on the device and in the mode of what they wrap.

    Raises:
        UsageError: a name that cannot be used or is taken, no place, or a place that is not in `root`.
    """
    if not re.fullmatch(r"[\w-]+", name) or name in dir(nn.ModuleDict()):
        raise UsageError(f"{name!r} cannot name a set of pets: letters, digits, '_' and '-', but no word of torch's")
    if not places:
        raise UsageError("no place to put a pet: name at least one role and one block")
    taken = {path for path, slot in slots(root) if name in slot.pets}
    for place in places:
        if not place.path or submodule(root, place.path) is not place.module:
            raise UsageError(f"{place.path!r} is not the place of {type(root).__name__} it was found at")
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
    """Make the set `new` a copy of the set `name`: in every slot the same kind of pet with the same values.

    Where `new` is there already, its parameters stay the objects they are.

    Raises:
        UsageError: there is no set `name`; names those there are.
    """
    _known(root, name)
    for _, slot in slots(root):
        if name in slot.pets and new in slot.pets:
            slot.pets[new].load_state_dict(slot.pets[name].state_dict())
        elif name in slot.pets:
            # a pet may know the place it is at, and the frozen weights there are not its own
            slot.pets[new] = copy.deepcopy(slot.pets[name], {id(slot.base): slot.base})


def is_plain(base: nn.Module, kind: type[Module]) -> TypeGuard[Module]:
    """Whether `base` computes with its weight and bias what torch's `kind` does.

    A 4-bit linear or a weight-standardised convolution is of that class too, and computes something else.
    """
    return isinstance(base, kind) and type(base).forward is kind.forward


def with_values(base: Module, weight: Tensor, bias: Tensor | None) -> Module:
    """A frozen copy of a linear, convolution or norm with another weight and bias, in the type it has."""
    new = copy.deepcopy(base)
    dtype = next((p.dtype for p in base.parameters()), weight.dtype)
    for name, values in (("weight", weight), ("bias", bias)):
        setattr(new, name, None if values is None else nn.Parameter(values.to(dtype), requires_grad=False))
    return new


def slots(root: nn.Module) -> Iterator[tuple[str, Slot]]:
    """Every slot in `root` with its path, outer ones first."""
    return ((path, module) for path, module in walk(root) if isinstance(module, Slot))


def sets(root: nn.Module) -> list[str]:
    """The names of the sets of PETs in `root`: in the order of their first places, at one place the oldest first."""
    return list(dict.fromkeys(name for _, slot in slots(root) for name in slot.pets))


def has_set(root: nn.Module, name: str, kind: type[PET] | None = None) -> bool:
    """Whether there is a set of PETs with that name, all of that kind where one is given."""
    if kind is None:  # asked at every step, and there may be many sets
        return any(name in slot.pets for _, slot in slots(root))
    found = [slot.pets[name] for _, slot in slots(root) if name in slot.pets]
    return bool(found) and all(isinstance(pet, kind) for pet in found)


def blendable(root: nn.Module, names: Sequence[str]) -> bool:
    """Whether these sets can be members of a `Choice`: at the same places, of one kind and shape, with a `blend`."""
    for _, slot in slots(root):
        here = [slot.pet(name) for name in names if name in slot.pets]
        if here and (len(here) < len(names) or len({_form(pet) for pet in here}) > 1):
            return False
        if here and type(here[0]).blend is PET.blend:
            return False
    return True


def _form(pet: PET) -> tuple[Any, ...]:
    """What pets that are blended have in common."""
    return (type(pet), *((name, tuple(t.shape), t.dtype) for name, t in pet.state_dict().items()))


def pets(root: nn.Module, name: str) -> list[PET]:
    """The PETs of one set, in the order of their paths in the net.

    Raises:
        UsageError: there is no such set; names those there are.
    """
    _known(root, name)
    return [slot.pet(name) for _, slot in slots(root) if name in slot.pets]


def parameters(root: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameters of one set of PETs; UsageError when there is no such set."""
    return [p for pet in pets(root, name) for p in pet.parameters()]


def remove(root: nn.Module, name: str) -> None:
    """Take one set of PETs out; a slot left without any gives its place back to the frozen submodule.

    Raises:
        UsageError: there is no such set; names those there are.
    """
    _known(root, name)
    for path, slot in [found for found in slots(root) if name in found[1].pets]:
        del slot.pets[name]
        slot.activate(slot.active)
        if not slot.pets:
            _set_at(root, path, slot.base)


def fold(root: nn.Module, name: str) -> int:
    """Make one set of PETs part of the modules they stand around, for prediction without PETs.

    Where such a module stood there is a new one afterwards, and the set is gone. The tensors of the old ones are not
    written to. This is for a net that goes to work by itself: a method would look for its set in vain, and one that
    also asks the net without pets (`concat` of `first_session`, a loss that ties features to it) could not any more.

    Returns:
        How many modules were replaced.

    Raises:
        UsageError: there is no such set; a PET that cannot be folded into what it stands around; a place that
            carries other sets too. Then nothing is changed.
    """
    _known(root, name)
    found = [(path, slot) for path, slot in slots(root) if name in slot.pets]
    new: list[nn.Module] = []
    for path, slot in found:
        if others := sorted(slot.pets.keys() - {name}):
            raise UsageError(f"{path} also carries the set of pets {others[0]!r}; remove it before {name!r} is folded")
        with torch.no_grad():
            folded = slot.pet(name).fold(slot.base)
        if folded is None:
            pet, base = type(slot.pet(name)).__name__, type(slot.base).__name__
            raise UsageError(f"{path}: {pet} cannot be folded into {base}; predict with the set {name!r} in force")
        new.append(folded.train(slot.base.training))
    for (path, _), folded in zip(found, new, strict=True):
        _set_at(root, path, folded)
    return len(new)


@contextlib.contextmanager
def using(root: nn.Module, names: InForce) -> Iterator[None]:
    """Inside, the PETs of a set are in force and no others; None: the bare frozen net.

    Of several sets all are in force. Where more than one has a PET around the same submodule, the PET of the later set
    calls that of the earlier as its base, so updates that are added, such as LoRA's, add up. A PET that asks of which
    kind its base is (a prompt in attention) has to be of the first.

    With a `Choice` each example of the batch has sets of its own, in one pass; where it comes down to one set, that one
    is in force as by its name.

    Raises:
        UsageError: there is no such set; names those there are. Members of a choice that stand at other places.
    """
    given = (names,) if isinstance(names, str | Choice) else () if names is None else names
    for one in given:
        for name in (one,) if isinstance(one, str) else one.members:
            _known(root, name)
    wanted = tuple(one if isinstance(one, str) else one.narrowed() for one in given)
    before = [(slot, slot.active) for _, slot in slots(root)]
    try:
        for slot, _ in before:
            slot.activate(wanted)
        yield
    finally:
        for slot, active in before:
            slot.activate(active)


def submodule(root: nn.Module, path: str) -> nn.Module | None:
    """The frozen submodule at `path`, seen through slots; None where there is none."""
    module = _bare(root)
    for part in path.split(".") if path else ():
        try:
            module = _bare(module.get_submodule(part))
        except AttributeError:
            return None
    return module


def frozen(root: nn.Module) -> dict[str, Tensor]:
    """The persistent tensors of `root` without its PETs, by the names they have when there is no slot."""
    tensors = {name: value for name, value in root.state_dict().items() if isinstance(value, Tensor)}
    found = [path for path, module in root.named_modules() if isinstance(module, Slot)]
    for path in sorted(found, key=len, reverse=True):  # inner ones first: their names hold the outer ones'
        start = f"{path}." if path else ""
        tensors = {
            start + name.removeprefix(f"{start}base.") if name.startswith(f"{start}base.") else name: value
            for name, value in tensors.items()
            if not name.startswith(f"{start}pets.")
        }
    return tensors


def _bare(module: nn.Module) -> nn.Module:
    return module.base if isinstance(module, Slot) else module


def walk(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module with its path; what a slot holds comes after the slot, under the same path."""
    yield path, module
    if isinstance(module, Slot):
        yield from walk(module.base, path)
        return
    for name, child in module.named_children():
        yield from walk(child, f"{path}.{name}" if path else name)


def outermost(root: nn.Module, path: str) -> nn.Module:
    """What is called where `path` leads: the slot, where one stands there, else the submodule itself."""
    parent, _, leaf = path.rpartition(".")
    around = submodule(root, parent)
    assert around is not None
    return around.get_submodule(leaf)


def _slot_at(root: nn.Module, path: str) -> Slot:
    """The slot at `path`, made when there is none yet."""
    module = outermost(root, path)
    if isinstance(module, Slot):
        return module
    slot = Slot(module).train(module.training)
    _set_at(root, path, slot)
    return slot


def _set_at(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` where `path` leads, in place of a slot or of what stands there without one."""
    parent, _, leaf = path.rpartition(".")
    around = submodule(root, parent)
    assert around is not None
    setattr(around, leaf, module)


def _known(root: nn.Module, name: str) -> None:
    if not has_set(root, name):
        raise UsageError(f"there is no set of pets called {name!r}; {closest(name, sorted(sets(root)))}")

"""The sites of a model, where features meet trained parameters: in PETs, in selectors, and at trained linear layers.

Modules are compared by identity, never by name.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from perpetune.errors import UsageError
from perpetune.models.towers import towers
from perpetune.numerics.handover import sent
from perpetune.numerics.moments import Moments
from perpetune.numerics.projection import Operand, Site
from perpetune.pets.base import PET, Conditions, Pair, counted, slots
from perpetune.protection.renewal import PeftPair
from perpetune.selectors import Selector

Sum = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Watched:
    """A site with a name that is unique in the model, and the module that reports its rows.

    The module is a PET, a selector or a trained linear layer. If `pair` is given, the site is that of its `A`, and the
    measured values are the whole update that the pair adds to its layer. `tower` names what the tower reads in which
    the site is, `picture` or `text`, if that is known: no mask of a batch of texts touches rows of pictures. `base` is
    the frozen module around which the PET is.
    """

    name: str
    site: Site
    module: nn.Module
    pair: Pair | None = None
    tower: str | None = None
    base: nn.Module | None = None

    @property
    def set(self) -> str | None:
        """The set of PETs to which the site belongs; None for a selector and a linear layer."""
        return self.name.split("/")[-2] if isinstance(self.module, PET) else None

    @property
    def kind(self) -> str:
        """The site's name in its module, without a number: `down`, `up`, `keys`; `weight` for a linear layer."""
        return self.site.name.partition(".")[0]

    def values(self) -> Tensor:
        """A copy of the operand's present values, `(heads, out, m)`, float64 on the CPU."""
        tensors = [p.detach().cpu().to(torch.float64, copy=True) for p in self.site.operand.parameters]
        return self.site.operand.read(tensors)

    @torch.no_grad()
    def set_values(self, values: Tensor) -> None:
        """Overwrite the operand."""
        parameters = self.site.operand.parameters
        for parameter, value in zip(parameters, self.site.operand.split(values), strict=True):
            parameter.copy_(value)


def called(path: str) -> str:
    """The name of a module in messages; the model itself has an empty path."""
    return path or "the model"


def pet_sites(
    model: nn.Module,
    conditions: Conditions,
    only: Collection[str] | None = None,
    renew: Callable[[str], bool] = lambda _: False,
    sometimes: Collection[str] = (),
) -> tuple[list[Watched], list[nn.Parameter], list[nn.Parameter]]:
    """The sites of every PET and every selector in `model`.

    Args:
        only: the sets of PETs that count; None means all.
        renew: whether the PETs of a set are renewed before every task. Such a PET has only the site of its `A`.
        sometimes: sets that a task need not use, so a pass over its data may not reach their sites.

    Returns:
        The sites, the PETs' parameters that are at no site, and the parameters that may move freely. A selector's
        parameters that are at no site are free: no later task uses them.

    Raises:
        UsageError: a PET cannot be renewed.
    """
    watched: list[Watched] = []
    loose: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    tower_of = _towers(model)
    for path, slot in slots(model):
        tower = tower_of(path)
        for name in [name for name in slot.pets if only is None or name in only]:
            pet = slot.pet(name)
            if renew(name):
                site, pair = _renewable(pet)
                watched.append(Watched(f"{called(path)}/{name}/{site.name}", site, pet, pair, tower, slot.base))
                free += [p for p in pet.parameters() if p not in set(site.operand.parameters)]
                continue
            sites = pet.sites(conditions)
            if name in sometimes:
                sites = [replace(site, always=False) for site in sites]
            label = f"{called(path)}/{name}"
            watched += [Watched(f"{label}/{site.name}", site, pet, None, tower, slot.base) for site in sites]
            declared = pet.free(conditions)
            covered = {p for site in sites for p in site.operand.parameters}.union(declared)
            loose += [p for p in pet.parameters() if p not in covered]
            free += declared
    for path, selector in [(p, m) for p, m in model.named_modules() if isinstance(m, Selector)]:
        sites = selector.sites()
        watched += [Watched(f"{called(path)}/{site.name}", site, selector) for site in sites]
        held = {p for site in sites for p in site.operand.parameters}
        free += [p for p in selector.parameters() if p not in held]
    return watched, loose, free


def _renewable(pet: PET) -> tuple[Site, Pair]:
    pair = pet.renewable()
    if pair is None:
        raise UsageError(
            f"protect: renew is on, but {type(pet).__name__.lower()} cannot be renewed: use lora, or leave renew out"
        )
    return pair


def peft_pairs(model: nn.Module, skip: Container[nn.Module] = ()) -> dict[nn.Module, PeftPair]:
    """The trained pairs of plain LoRA by PEFT outside of `skip`, by the linear layer of their `A`.

    Raises:
        UsageError: an adapter is a variant of LoRA.
    """
    pairs: dict[nn.Module, PeftPair] = {}
    for path, layer in model.named_modules():
        downs, ups = getattr(layer, "lora_A", None), getattr(layer, "lora_B", None)
        if layer in skip or not (isinstance(downs, nn.ModuleDict) and isinstance(ups, nn.ModuleDict)):
            continue
        for adapter, down in downs.items():
            up = ups[adapter]
            trained = all(isinstance(m, nn.Linear) and m.weight.requires_grad for m in (down, up))
            if not trained or down in skip or up in skip:
                continue
            if adapter in getattr(layer, "lora_variant", ()):
                raise UsageError(
                    f"protect: renew is on, but {called(path)} is a variant of LoRA that cannot be renewed: use plain "
                    "LoRA, or leave it out with skip"
                )
            pairs[down] = PeftPair(layer, adapter)
    return pairs


def linear_sites(
    model: nn.Module, skip: Container[nn.Module] = (), pairs: Mapping[nn.Module, PeftPair] = MappingProxyType({})
) -> list[Watched]:
    """The sites of trained linear layers outside of PETs and of `skip`.

    A weight that another module shares (an output layer tied to the embedding) is not a site, because the outputs of
    the other module could not be kept. The `B` of a renewed pair is not a site either.

    Args:
        pairs: the pairs that are renewed, by the linear layer of their `A`.
    """
    inside = {m for pet in model.modules() if isinstance(pet, PET) for m in pet.modules()}
    inside |= {pair.b for pair in pairs.values()}
    owners = Counter(p for m in model.modules() for p in m._parameters.values() if p is not None)
    watched: list[Watched] = []
    tower_of = _towers(model)
    for path, module in model.named_modules():
        if module in inside or module in skip or not (axis := _axis(module)):
            continue
        weight, bias = module.weight, getattr(module, "bias", None)
        if not (isinstance(weight, nn.Parameter) and weight.requires_grad) or owners[weight] > 1:
            continue
        bias = bias if isinstance(bias, nn.Parameter) and bias.requires_grad and owners[bias] == 1 else None
        site = Site("weight", Operand(weight, bias, axis=axis[0]))
        watched.append(Watched(f"{called(path)}/weight", site, module, pairs.get(module), tower_of(path)))
    return watched


def _towers(model: nn.Module) -> Callable[[str], str | None]:
    """What the tower reads to which the module at a path belongs, in it or beside it; None if that is not known."""
    try:
        found = towers(model)
    except UsageError:
        return lambda _: None
    parts = {(name, role): tower.part(role) for name, tower in found.items() for role in tower.single()}
    beside = {part[0]: name for (name, _), part in parts.items() if part is not None}
    starts = sorted(((tower.path, name) for name, tower in found.items()), key=lambda entry: -len(entry[0]))

    def of(path: str) -> str | None:
        inside = (name for start, name in starts if not start or path == start or path.startswith(f"{start}."))
        return beside.get(path) or next(inside, None)

    return of


def _axis(module: nn.Module) -> tuple[Any, ...]:
    """The axis of its weight on which a linear layer meets its input; empty for other modules."""
    if isinstance(module, nn.Linear):
        return (1,)
    return (0,) if type(module).__name__ == "Conv1D" and hasattr(module, "nf") else ()  # transformers' GPT-2


_unseen: ContextVar[bool] = ContextVar("_unseen", default=False)


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """Inside this context no rows are added to any moments: a pass that other processes need is not a pass over data
    of this one."""
    token = _unseen.set(True)
    try:
        yield
    finally:
        _unseen.reset(token)


class Watch:
    """One pass over data: the moments of the rows at every site.

    Attributes:
        moments: the moments by the site's name; a site that saw nothing has no entry.
        mask: `(B, N)` of the present batch of texts, true for the tokens that count; None means all. It belongs to the
            tower that reads the batch: rows in a tower for pictures all count, and a tower that reads texts of its own
            (`pets.base.counting`) has its own mask. Rows without an axis of tokens (pooled features) all count, and so
            do rows with another number of tokens.
        feeds: if the output of a linear layer is the input of others (LoRA's A and B), the names of the others.
        elsewhere: the linear layers whose output is used by something else as well (`h + B(h)`). Recorded only if a
            watched layer is all zero, because it is not needed otherwise.
    """

    def __init__(self, sites: Sequence[Watched]):
        self.sites = sites
        self.moments: dict[str, Moments] = {}
        self.mask: Tensor | None = None
        self.feeds: dict[str, set[str]] = {}
        self.elsewhere: set[str] = set()
        self._inside = 0  # the number of watched layers that are computing now
        self._found: tuple[Tensor, Tensor] | None = None
        self._outputs: dict[int, tuple[weakref.ref[Tensor], str]] = {}

    @contextlib.contextmanager
    def on(self) -> Iterator[Watch]:
        """Inside this context the rows that reach the sites are added to the moments."""
        hooks: list[Any] = []
        reporting: dict[PET | Selector, dict[str, Watched]] = {}
        for watched in self.sites:
            if isinstance(watched.module, PET | Selector):
                reporting.setdefault(watched.module, {})[watched.site.name] = watched
            else:
                hooks.append(watched.module.register_forward_pre_hook(partial(self._into, watched), with_kwargs=True))
                hooks.append(watched.module.register_forward_hook(partial(self._out_of, watched)))
        try:
            for module, sites in reporting.items():
                module.watch = partial(self._reported, sites)
            linear = [w for w in self.sites if not isinstance(w.module, PET | Selector)]
            zero = any(not any(p.any() for p in w.site.operand.parameters) for w in linear)
            with _Uses(self) if zero else contextlib.nullcontext():
                yield self
        finally:
            for module in reporting:
                module.watch = None
            for hook in hooks:
                hook.remove()

    def add(self, watched: Watched, rows: Tensor, examples: Tensor | None = None) -> None:
        """Add rows at a site: `(..., width)`, or `(B, groups, N, width)`.

        Args:
            examples: the numbers, in the batch, of the examples to which the rows belong; None means all.
        """
        if _unseen.get():
            return
        mask = None if watched.tower == "picture" else self.mask if (own := counted()) is None else own
        if mask is not None and examples is not None:
            mask = mask[sent(examples, mask.device)]
        site, operand = watched.site, watched.site.operand
        groups = None if site.groups == 1 else site.groups
        if rows.dim() == 4:
            rows = rows.transpose(1, 2)  # (B, N, groups, width)
        if mask is not None and rows.dim() > 2 and rows.shape[:2] == mask.shape:
            rows = rows.flatten(0, 1)[self._counting(mask)]
        elif mask is not None and rows.dim() == 2 and mask.shape[1] > 1 and len(rows) == mask.numel():
            rows = rows[self._counting(mask)]  # some nets (OPT's MLP) join the tokens of all texts in one axis
        elif rows.dim() == 4:
            rows = rows.flatten(0, 1)
        rows = rows.transpose(0, 1) if groups else rows.reshape(-1, rows.shape[-1])
        if operand.bias is not None:
            rows = torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], dim=-1)
        if watched.name not in self.moments:
            self.moments[watched.name] = Moments(rows.shape[-1], groups, rows.device)
        self.moments[watched.name].update(rows)

    def _counting(self, mask: Tensor) -> Tensor:
        """The positions at which `mask (B, N)` is true, in the flattened mask. All sites of a pass share them, because
        their number has to be read from the device."""
        if self._found is None or self._found[0] is not mask:
            self._found = mask, mask.flatten().nonzero().flatten()
        return self._found[1]

    def merged(self, watched: Watched, total: Sum) -> tuple[Tensor, int]:
        """Moments `(heads, m, m)` of the rows that multiply the operand, and the number of rows, over all processes."""
        site, operand = watched.site, watched.site.operand
        width = site.width or operand.shape[2]
        empty = Moments(width, None if site.groups == 1 else site.groups, operand.weight.device)
        moments = self.moments.pop(watched.name, empty)
        count = int(total(torch.tensor(moments.count, device=moments.sums.device)))
        moments.sums = total(moments.sums)
        matrix = moments.matrix.cpu()
        matrix = matrix if matrix.dim() == 3 else matrix.unsqueeze(0)
        return (matrix if site.lift is None else site.lift(matrix).cpu()), count

    def _reported(self, sites: dict[str, Watched], name: str, rows: Tensor, examples: Tensor | None = None) -> None:
        if name in sites:
            self.add(sites[name], rows, examples)

    def _into(self, watched: Watched, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inside += 1
        rows = args[0] if args else next(iter(kwargs.values()))
        if (source := self._source(rows)) is not None:
            self.feeds.setdefault(source, set()).add(watched.name)
        self.add(watched, rows.detach())

    def _out_of(self, watched: Watched, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._inside -= 1
        self._outputs[id(output)] = (weakref.ref(output), watched.name)

    def _source(self, tensor: object) -> str | None:
        """The name of the linear layer whose output is `tensor`; None if there is none."""
        reference, name = self._outputs.get(id(tensor), (None, None))
        return name if reference is not None and reference() is tensor else None

    def used(self, values: Any) -> None:
        """Called for every operation with its inputs `values`; records outputs used outside of the watched layers."""
        if not self._inside:
            self.elsewhere.update(name for value in values if (name := self._source(value)) is not None)


class _Uses(TorchDispatchMode):
    """Reports every operation and its inputs to a `Watch`."""

    def __init__(self, watch: Watch):
        super().__init__()  # type: ignore[no-untyped-call] # torch gives it no types
        self.watch = watch

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.watch.used(tree_leaves((args, kwargs)))
        return func(*args, **(kwargs or {}))

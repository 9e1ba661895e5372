"""Where features meet trained parameters in a model: at the sites of its PETs, and at linear layers that are trained.

Everything is found by object, never by name.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from perpetune.errors import UsageError
from perpetune.numerics.moments import Moments
from perpetune.numerics.projection import Operand
from perpetune.pets.base import PET, Conditions, Pair, Site, slots
from perpetune.protection.renewal import PeftPair

Sum = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Watched:
    """A site, by a name unique in the model, and the module that shows its rows: a PET, or a trained linear layer.

    Where `pair` is given it is the site of its `A`, and what is measured is all that the pair adds to its layer.
    """

    name: str
    site: Site
    module: nn.Module
    pair: Pair | None = None

    @property
    def set(self) -> str | None:
        """The set of PETs that it is of; None for a linear layer."""
        return self.name.split("/")[-2] if isinstance(self.module, PET) else None

    @property
    def kind(self) -> str:
        """The site's name in its PET, without a number: `down`, `up`, `keys`; `weight` for a linear layer."""
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
    """What a module is called in names and messages; the model itself has no path."""
    return path or "the model"


def pet_sites(
    model: nn.Module,
    conditions: Conditions,
    only: Collection[str] | None = None,
    renew: Callable[[str], bool] = lambda _: False,
    sometimes: Collection[str] = (),
) -> tuple[list[Watched], list[nn.Parameter], list[nn.Parameter]]:
    """The sites of every PET in `model`; the PETs' parameters that are at none; those that are meant to be free.

    Args:
        only: the sets of PETs that count; None is all.
        renew: whether the PETs of a set are renewed before every task; each has the site of its `A` alone then.
        sometimes: sets that a task need not use, so that a pass over its data may not reach them.

    Raises:
        UsageError: a PET that cannot be renewed.
    """
    found: list[Watched] = []
    loose: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for path, slot in slots(model):
        for name in [name for name in slot.pets if only is None or name in only]:
            pet = slot.pet(name)
            if renew(name):
                site, pair = _renewable(pet)
                found.append(Watched(f"{called(path)}/{name}/{site.name}", site, pet, pair))
                free += [p for p in pet.parameters() if p not in set(site.operand.parameters)]
                continue
            sites = pet.sites(conditions)
            if name in sometimes:
                sites = [replace(site, always=False) for site in sites]
            found += [Watched(f"{called(path)}/{name}/{site.name}", site, pet) for site in sites]
            meant = pet.free(conditions)
            covered = {p for site in sites for p in site.operand.parameters}.union(meant)
            loose += [p for p in pet.parameters() if p not in covered]
            free += meant
    return found, loose, free


def _renewable(pet: PET) -> tuple[Site, Pair]:
    found = pet.renewable()
    if found is None:
        raise UsageError(
            f"protect: renew is on, and {type(pet).__name__.lower()} cannot be renewed: use lora, or leave renew out"
        )
    return found


def peft_pairs(model: nn.Module, skip: Container[nn.Module] = ()) -> dict[nn.Module, PeftPair]:
    """The pairs of plain LoRA by PEFT that are trained, by the linear layer that is their `A`, but for those in `skip`.

    Raises:
        UsageError: a variant of LoRA.
    """
    found: dict[nn.Module, PeftPair] = {}
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
                    f"protect: renew is on, and {called(path)} is a variant of LoRA that cannot be renewed: use plain "
                    "LoRA, or leave it out with skip"
                )
            found[down] = PeftPair(layer, adapter)
    return found


def linear_sites(
    model: nn.Module, skip: Container[nn.Module] = (), pairs: Mapping[nn.Module, PeftPair] = MappingProxyType({})
) -> list[Watched]:
    """Every linear layer outside of PETs whose weight is trained, but for those in `skip`.

    A weight that another module has too (an output layer tied to the embedding) is no site: what the other one makes
    of it cannot be held here. Nor is the `B` of `pairs` that are renewed, by their `A`.
    """
    inside = {m for pet in model.modules() if isinstance(pet, PET) for m in pet.modules()}
    inside |= {pair.b for pair in pairs.values()}
    owners = Counter(p for m in model.modules() for p in m._parameters.values() if p is not None)
    found: list[Watched] = []
    for path, module in model.named_modules():
        if module in inside or module in skip or not (axis := _axis(module)):
            continue
        weight, bias = module.weight, getattr(module, "bias", None)
        if not (isinstance(weight, nn.Parameter) and weight.requires_grad) or owners[weight] > 1:
            continue
        bias = bias if isinstance(bias, nn.Parameter) and bias.requires_grad and owners[bias] == 1 else None
        site = Site("weight", Operand(weight, bias, axis=axis[0]))
        found.append(Watched(f"{called(path)}/weight", site, module, pairs.get(module)))
    return found


def _axis(module: nn.Module) -> tuple[Any, ...]:
    """On which axis of its weight a linear layer meets its input; empty for anything else."""
    if isinstance(module, nn.Linear):
        return (1,)
    return (0,) if type(module).__name__ == "Conv1D" and hasattr(module, "nf") else ()  # transformers' GPT-2


class Watch:
    """One pass over data: the moments of the rows at every site.

    Attributes:
        moments: by the site's name; a site that saw nothing has none.
        mask: `(B, N)` of the batch at hand: tokens that count; None is all. Rows without an axis of tokens (of pooled
            features) all count, and so do those with another number of tokens.
        feeds: for linear layers whose output is another one's input (LoRA's A and B), the other's name.
        elsewhere: linear layers whose output something else uses as well (`h + B(h)`); known only where a watched
            layer is all zero, for nobody asks otherwise.
    """

    def __init__(self, sites: Sequence[Watched]):
        self.sites = sites
        self.moments: dict[str, Moments] = {}
        self.mask: Tensor | None = None
        self.feeds: dict[str, set[str]] = {}
        self.elsewhere: set[str] = set()
        self._inside = 0  # watched layers that are at work now
        self._outputs: dict[int, tuple[weakref.ref[Tensor], str]] = {}

    @contextlib.contextmanager
    def on(self) -> Iterator[Watch]:
        """Inside, what flows through the model is counted."""
        hooks: list[Any] = []
        pets: dict[PET, dict[str, Watched]] = {}
        for watched in self.sites:
            if isinstance(watched.module, PET):
                pets.setdefault(watched.module, {})[watched.site.name] = watched
            else:
                hooks.append(watched.module.register_forward_pre_hook(partial(self._into, watched), with_kwargs=True))
                hooks.append(watched.module.register_forward_hook(partial(self._out_of, watched)))
        try:
            for pet, sites in pets.items():
                pet.watch = partial(self._at_pet, sites)
            linear = [w for w in self.sites if not isinstance(w.module, PET)]
            zero = any(not any(p.any() for p in w.site.operand.parameters) for w in linear)
            with _Uses(self) if zero else contextlib.nullcontext():
                yield self
        finally:
            for pet in pets:
                pet.watch = None
            for hook in hooks:
                hook.remove()

    def add(self, watched: Watched, rows: Tensor, examples: Tensor | None = None) -> None:
        """Count rows at a site: `(..., width)`, or `(B, groups, N, width)`.

        Args:
            examples: numbers of the examples of the batch that the rows are of; None is all.
        """
        mask = self.mask if self.mask is None or examples is None else self.mask[examples.to(self.mask.device)]
        site, operand = watched.site, watched.site.operand
        groups = None if site.groups == 1 else site.groups
        if rows.dim() == 4:
            rows = rows.transpose(1, 2)  # (B, N, groups, width)
        if mask is not None and rows.dim() > 2 and rows.shape[:2] == mask.shape:
            rows = rows[mask]
        elif mask is not None and rows.dim() == 2 and mask.shape[1] > 1 and len(rows) == mask.numel():
            rows = rows[mask.flatten()]  # some nets (OPT's MLP) take the tokens of all texts as one
        elif rows.dim() == 4:
            rows = rows.flatten(0, 1)
        rows = rows.transpose(0, 1) if groups else rows.reshape(-1, rows.shape[-1])
        if operand.bias is not None:
            rows = torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], dim=-1)
        if watched.name not in self.moments:
            self.moments[watched.name] = Moments(rows.shape[-1], groups, rows.device)
        self.moments[watched.name].update(rows)

    def merged(self, watched: Watched, total: Sum) -> tuple[Tensor, int]:
        """Moments of the rows that multiply the operand, `(heads, m, m)`, and their number, over all processes."""
        site, operand = watched.site, watched.site.operand
        width = site.width or operand.shape[2]
        empty = Moments(width, None if site.groups == 1 else site.groups, operand.weight.device)
        moments = self.moments.pop(watched.name, empty)
        count = int(total(torch.tensor(moments.count, device=moments.sums.device)))
        moments.sums = total(moments.sums)
        matrix = moments.matrix.cpu()
        matrix = matrix if matrix.dim() == 3 else matrix.unsqueeze(0)
        return (matrix if site.lift is None else site.lift(matrix).cpu()), count

    def _at_pet(self, sites: dict[str, Watched], name: str, rows: Tensor, examples: Tensor | None = None) -> None:
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
        """The linear layer whose output `tensor` is."""
        reference, name = self._outputs.get(id(tensor), (None, None))
        return name if reference is not None and reference() is tensor else None

    def used(self, values: Any) -> None:
        """An operation outside of the watched layers takes `values`."""
        if not self._inside:
            self.elsewhere.update(name for value in values if (name := self._source(value)) is not None)


class _Uses(TorchDispatchMode):
    """Tells a `Watch` of every operation and what it takes."""

    def __init__(self, watch: Watch):
        super().__init__()  # type: ignore[no-untyped-call] # torch gives it no types
        self.watch = watch

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.watch.used(tree_leaves((args, kwargs)))
        return func(*args, **(kwargs or {}))

"""Gradient projection at the sites of one model: PGP, Qiao et al., ICLR 2024, and PEGP, arXiv:2405.13383.

This follows the papers; docs/design.md lists where their released code differs.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from perpetune.errors import PerpetuneError, UsageError
from perpetune.numerics.moments import pack, unpack
from perpetune.numerics.projection import Operand, ProjectedStep
from perpetune.numerics.subspace import SLACK, Subspace
from perpetune.pets.base import PET, is_plain, slots
from perpetune.protection.config import ProtectConfig
from perpetune.protection.memory import SiteMemory
from perpetune.protection.renewal import kaiming, leading_start, random_start
from perpetune.protection.sites import Sum, Watch, Watched
from perpetune.seeding import generator
from perpetune.selectors import Selector

Item = TypeVar("Item")
Certificate = dict[str, Any]


class Protection(nn.Module):
    """Keeps updates of trained parameters out of the directions that the features of old data use.

    After each task, `consolidate` runs the model on its data and adds the main directions of their features to the
    subspace of every site. `guard` keeps an optimizer's steps out of these subspaces. Before the first `consolidate`
    nothing is projected.

    Args:
        sites: the places where features meet parameters.
        config: the options of protection.
        still: parameters at no site. After the first `consolidate` they do not move at all.
        free: parameters that may move freely.
        seed: the seed of the random control.

    Raises:
        UsageError: there is no site, or `config.sites` names one that does not exist.
    """

    def __init__(
        self,
        sites: Sequence[Watched],
        config: ProtectConfig,
        *,
        still: Sequence[nn.Parameter] = (),
        free: Sequence[nn.Parameter] = (),
        seed: int = 0,
    ):
        super().__init__()
        kinds = list(dict.fromkeys(w.kind for w in sites))
        unknown = [name for name in config.sites or () if name not in kinds]
        if unknown or not sites:
            existing = ", ".join(kinds) or "none: put in a pet, or train a linear layer"
            fault = f"protect: there is no site {unknown[0]!r}" if unknown else "protect: nothing can be protected"
            raise UsageError(f"{fault}; sites here are {existing}")
        self.config, self.seed = config, seed
        self.sites = list(sites)
        self.still, self.free = list(still), list(free)
        self.consolidated = 0
        """The number of times that data were added."""
        self.renewed = 0
        """The value of `consolidated` when pairs were last renewed."""
        alpha = config.alpha if config.strength == "soft" else None
        self.memory = nn.ModuleDict(
            {_key(w.name): SiteMemory(*w.site.operand.shape, alpha, _measured(w)) for w in self.sites}
        )

    def of(self, watched: Watched) -> SiteMemory:
        """The memory of a site."""
        memory = self.memory[_key(watched.name)]
        assert isinstance(memory, SiteMemory)
        return memory

    # -- while training -------------------------------------------------------------------------------

    def guard(self, optimizer: torch.optim.Optimizer) -> ProjectedStep:
        """Keep the steps of `optimizer` out of the protected directions, until `remove` of the returned guard is
        called.

        Raises:
            UsageError: the shape of a parameter has changed since its features were added.
        """
        chosen, still = self.closed()
        return ProjectedStep(optimizer, chosen, still=still, project=self.config.project)

    def check_covers(self, optimizer: torch.optim.Optimizer, root: nn.Module, private: Collection[str] = ()) -> None:
        """Raise UsageError if `optimizer` trains a pet or a selector in `root` that is neither protected nor free.

        Args:
            private: names of sets of pets that may be trained without protection.
        """
        trained = {p for group in optimizer.param_groups for p in group["params"]}
        held = {p for w in self.sites for p in w.site.operand.parameters}.union(self.still, self.free)
        loose = trained - held  # the head's, and those of pets that nobody holds
        for _, slot in slots(root):
            for name in (name for name in slot.pets if name not in private):
                if loose.isdisjoint(slot.pet(name).parameters()):
                    continue
                guarded = sorted({w.set for w in self.sites if w.set is not None})
                raise UsageError(
                    f"protect: the optimizer trains the set of pets {name!r}, but protection holds "
                    f"{', '.join(map(repr, guarded)) or 'none'}: the method has to name in `trained` every set that it "
                    "trains, or in `private` one that no later task uses"
                )
        for path, selector in [(p, m) for p, m in root.named_modules() if isinstance(m, Selector)]:
            if not loose.isdisjoint(selector.parameters()):
                raise UsageError(
                    f"protect: the optimizer trains the selector {path or type(selector).__name__!r}, and protection "
                    "does not hold it: the method has to make it before its first task, and to keep its parameters"
                )

    def closed(self) -> tuple[list[tuple[Operand, list[Subspace]]], list[nn.Parameter]]:
        """The operands with the subspaces that are closed to updates now, and the parameters that may not move.

        Raises:
            UsageError: the shape of a parameter has changed since its features were added.
        """
        for watched in self.sites:
            self._check_shape(watched)
        chosen = [w for w in self.sites if self._chosen(w)]
        if self.config.directions == "none" or not any(self.of(w).rank for w in chosen):
            return [], []
        return [(w.site.operand, self._closed(w, self.of(w).subspaces)) for w in chosen], self.still

    def _closed(self, watched: Watched, subspaces: list[Subspace]) -> list[Subspace]:
        """The subspaces that are closed to updates: `subspaces` of the features, or random ones as a control."""
        if self.config.directions == "random":
            seeds = [generator(self.seed, "protect", watched.name, head) for head in range(len(subspaces))]
            return [random_like(s, rng) for s, rng in zip(subspaces, seeds, strict=True)]
        return subspaces

    def _chosen(self, watched: Watched) -> bool:
        return self.config.sites is None or watched.kind in self.config.sites

    def _check_shape(self, watched: Watched) -> None:
        memory = self.of(watched)
        now, then = watched.site.operand.shape, memory.shape
        if (now[0], now[2]) == (then[0], then[2]) and not then[1]:
            memory.make_room(now[1])  # of a selector that had no members yet
        elif now != then:
            raise UsageError(
                f"protect: {watched.name} has shape {now} now and had {then} when its features were added: a pet "
                "cannot change its shape under protection"
            )
        if not isinstance(watched.module, PET | Selector) and watched.module.weight is not watched.site.operand.weight:
            raise UsageError(
                f"protect: the weight of {watched.name} was replaced by another tensor, {watched.module.weight.shape}: "
                "change its values in place, or leave the layer out"
            )

    # -- after a task ---------------------------------------------------------------------------------

    def consolidate(
        self,
        batches: Iterable[Item],
        forward: Callable[[Item], object],
        *,
        mask: Callable[[Item], Tensor | None] = lambda _: None,
        total: Sum = lambda tensor: tensor,
    ) -> Certificate:
        """Protect the features that `forward` produces at the sites. One pass over `batches`, two if a site is idle.

        A site is idle while the next factor is zero (LoRA's A before the first step). Then its values are moved into
        the free directions. The outputs do not change, and the features at the next factor are zero, so all its
        directions stay free.

        Args:
            batches: data that was learned, or reference data. It may be read twice, so it must not be an iterator.
            forward: runs the model on a batch, in evaluation mode.
            mask: gives `(B, N)` of a batch, true for the tokens that count; None means all.
            total: sums a tensor over all processes.

        Returns:
            The certificate: how far the outputs on earlier data have moved, before these data were added.

        Raises:
            PerpetuneError: features or parameters are not finite, or a site saw no data. Nothing changes then.
            UsageError: the shape of a parameter has changed since its features were added, or `batches` is an iterator
                and has to be read twice.
        """
        for watched in self.sites:
            self._check_shape(watched)
        watch = self._look(self.sites, batches, forward, mask)
        waiting = self._idle(watch, total) if self.config.directions != "none" else []
        first = {w.name: self._gathered(watch, w, total) for w in waiting}
        as_made = {w.name: w.values() for w in waiting}
        traces: dict[str, Tensor] = {}
        with contextlib.ExitStack() as undo:
            if waiting:
                if iter(batches) is batches:
                    raise UsageError(
                        "protect: before the first step the data are read twice: give a list or a loader, not an "
                        "iterator"
                    )
                traces = {w.name: _traces(self._gathered(watch, w, total)[0]) for w in self.sites if w not in waiting}
                moved = {w: self._moved_free(w, first[w.name][0]) for w in waiting}
                for w, values in moved.items():
                    undo.callback(w.set_values, as_made[w.name])
                    w.set_values(values)
                watch = self._look([w for w in self.sites if w not in waiting], batches, forward, mask)
            gathered = {w.name: first.get(w.name) or self._gathered(watch, w, total) for w in self.sites}
            counts = {name: count for name, (_, count) in gathered.items()}
            certificate = self._certificate(max(counts.values()))
            energy = self._energy(self.consolidated)
            grown: dict[str, list[Subspace]] = {}
            packed: dict[str, Tensor] = {}
            # Nothing of the state changes in this loop, so it may fail. Each matrix of moments is freed as soon as its
            # basis is computed; only its packed half stays.
            for w in self.sites:
                moments, _ = gathered.pop(w.name)
                first.pop(w.name, None)
                grown[w.name] = self._grown(w, moments, energy, traces.get(w.name))
                packed[w.name] = pack(moments)
            undo.pop_all()
        for w in self.sites:
            memory = self.of(w)
            memory.subspaces = grown.pop(w.name)
            moments = unpack(packed.pop(w.name), memory.shape[2])
            if w.pair is not None:
                memory.learned_product(w.pair.product(), moments, counts[w.name])
                continue
            memory.learned(w.values(), moments, counts[w.name], usual=as_made.get(w.name))
        self.consolidated += 1
        return self._summed_up(certificate, energy)

    def consolidate_weights(
        self, whole: Callable[[nn.Module], contextlib.AbstractContextManager[None]] = lambda _: contextlib.nullcontext()
    ) -> Certificate:
        """Protect what the frozen layers know, without data: each PET sees the rows of its layer's weight `W`.

        Their moments are `Wᵀ W`, so the protected directions are the leading right singular vectors of `W`. That is
        what KeepLoRA and NuSA-CL keep.

        Args:
            whole: gives a context in which the weight of a frozen layer can be read.

        Raises:
            UsageError: a PET is not around a plain linear layer.
        """

        def show(_: None) -> None:
            for watched in (w for w in self.sites if isinstance(w.module, PET)):
                with contextlib.nullcontext() if watched.base is None else whole(watched.base):
                    watched.module(*_weight_rows(watched))

        return self.consolidate([None], show)

    def weights(self) -> dict[PET, tuple[nn.Module, Tensor]]:
        """For each PET the frozen layer and the rows `(n, d_in)` of its weight that the PET changes.

        Raises:
            UsageError: a PET is not around a plain linear layer.
        """
        return {w.module: _weight_rows(w) for w in self.sites if isinstance(w.module, PET)}

    @property
    def reads_texts(self) -> bool:
        """Whether a PET in a tower for texts is protected."""
        return any(w.tower == "text" and isinstance(w.module, PET) for w in self.sites)

    @property
    def reads_pictures(self) -> bool:
        """Whether a PET in a tower for pictures is protected."""
        return any(w.tower == "picture" and isinstance(w.module, PET) for w in self.sites)

    def _energy(self, added: int) -> float:
        """The energy for the data that are added as number `added`, from 0. Reference data do not count as a task."""
        reference = self.config.reference
        if reference is not None and added == 0 and reference.energy is not None:
            return reference.energy
        return self.config.energy_at(max(0, added - (reference is not None)))

    @torch.no_grad()
    def _look(
        self,
        sites: Sequence[Watched],
        batches: Iterable[Item],
        forward: Callable[[Item], object],
        mask: Callable[[Item], Tensor | None],
    ) -> Watch:
        watch = Watch(sites)
        with watch.on():
            for batch in batches:
                watch.mask = mask(batch)
                forward(batch)
        return watch

    def _gathered(self, watch: Watch, watched: Watched, total: Sum) -> tuple[Tensor, int]:
        moments, count = watch.merged(watched, total)
        # One key has no other to be compared with, so a pool of one member need not show it any query
        alone = watched.site.operand.length and watched.site.operand.shape[1] < 2
        if count == 0 and watched.site.always and not alone:
            if watched.tower == "text":
                raise PerpetuneError(
                    f"protect: {watched.name} is in the text tower and saw no text: give protect.reference.texts, use "
                    "a head that reads names (head: text), or leave pets out of this tower"
                )
            raise PerpetuneError(
                f"protect: {watched.name} saw no data, because the pass did not go through it: leave it out, or check "
                "the batches"
            )
        if not torch.isfinite(moments).all():
            raise PerpetuneError(
                f"protect: features at {watched.name} are not finite, so nothing was added: lower train.lr, or look "
                "for "
                "broken inputs"
            )
        return moments, count

    def _energy_at(self, watched: Watched, energy: float) -> float:
        """The energy that is protected at a site, if `energy` is that of all sites: 0 closes nothing anywhere."""
        if watched.tower == "text" and self.config.text_energy is not None:
            energy = self.config.text_energy
        return max(energy, watched.site.energy) if energy else energy

    def _grown(self, watched: Watched, moments: Tensor, energy: float, traces: Tensor | None = None) -> list[Subspace]:
        """The site's subspaces, extended by the main directions of `moments (heads, m, m)`.

        Args:
            traces: `(heads,)`, the traces of which `energy` is a share; None means those of `moments`. They differ if
                an idle site before this one was moved: then fewer features reach this site, and the others are
                protected already.
        """
        subspaces = [copy.copy(s) for s in self.of(watched).subspaces]
        energy = self._energy_at(watched, energy)
        rounding = _noise(watched)
        for head, (subspace, matrix) in enumerate(zip(subspaces, moments, strict=True)):
            share, left = energy, float(matrix.trace())
            if traces is not None:
                whole = float(traces[head])
                # Only rounding errors are left, and these are not features even with energy 1
                if left <= rounding * whole:
                    continue
                share = min(energy, max(0.0, 1 - (1 - energy) * whole / left))
            subspace.extend(matrix, share)
        return subspaces

    # -- before the next task -------------------------------------------------------------------------

    @property
    def waiting(self) -> bool:
        """Whether pairs have to be renewed before the next step: they hold what was learned, and `B` is not
        protected."""
        return bool(self.config.renew) and self.consolidated > self.renewed

    def renew_pairs(
        self,
        rng: torch.Generator,
        batches: Iterable[Item] = (),
        forward: Callable[[Item], object] = lambda _: None,
        *,
        mask: Callable[[Item], Tensor | None] = lambda _: None,
        total: Sum = lambda tensor: tensor,
    ) -> None:
        """Store the product of every pair, and start new pairs in the free directions. No output changes.

        If a site has no free directions, its new pair is zero and stays zero. If `config.rest` limits the rank of the
        stored product, old outputs do change; the next certificate includes this change.

        Args:
            rng: draws every new `A`; the same on all processes.
            batches: data of the next task, if `config.start` is `leading`.
            forward, mask, total: as for `consolidate`.

        Raises:
            PerpetuneError: features are not finite, or a site saw no data. Nothing changes then.
        """
        pairs = {w: w.pair for w in self.sites if w.pair is not None}
        inputs: dict[Watched, Tensor] = {}
        if self.config.start == "leading":
            watch = self._look(list(pairs), batches, forward, mask)
            inputs = {w: self._gathered(watch, w, total)[0][0] for w in pairs}
        for w, pair in pairs.items():
            memory = self.of(w)
            _, rows, dim = memory.shape
            drawn = kaiming(rows, dim, rng)
            held = self.config.directions != "none" and self._chosen(w)
            (closed,) = self._closed(w, memory.subspaces) if held else (None,)
            if w in inputs:
                start = leading_start(drawn, closed, inputs[w], len(pair.parts), _noise(w))
            else:
                start = random_start(drawn, closed)
            seen = unpack(memory.total, dim)[0] if self.config.rest is not None else None
            pair.renew(drawn.new_zeros(rows, dim) if start is None else start, self.config.rest, seen)
        self.renewed = self.consolidated

    # -- before the first step ------------------------------------------------------------------------

    def _idle(self, watch: Watch, total: Sum) -> list[Watched]:
        """Sites whose values have no effect yet on any process that has seen data."""
        by_name = {w.name: w for w in self.sites}
        votes = torch.zeros(2, len(self.sites))  # the numbers of processes that saw the site, and that saw it not idle
        for number, watched in enumerate(self.sites):
            if watched.pair is not None:
                idle = False  # a new A is drawn in the free directions before the next step
            elif isinstance(watched.module, PET):
                idle = watched.site.name in watched.module.idle()
            else:
                into = [by_name[name].site.operand for name in watch.feeds.get(watched.name, ())]
                zero = not any(p.any() for operand in into for p in operand.parameters)
                idle = bool(into) and zero and watched.name not in watch.elsewhere
            votes[0, number] = watched.name in watch.moments
            votes[1, number] = votes[0, number] * (not idle)
        saw, used = total(votes.to(self.sites[0].site.operand.weight.device)).cpu()
        return [w for w, s, u in zip(self.sites, saw, used, strict=True) if s and not u and self._chosen(w)]

    def _moved_free(self, watched: Watched, moments: Tensor) -> Tensor:
        """The site's values, projected into the directions that are free once `moments` are protected, with their old
        norm.

        Raises:
            PerpetuneError: no direction is free then.
        """
        values = watched.values()
        grown = self._grown(watched, moments, self._energy(self.consolidated))
        closed = self._closed(watched, grown)
        moved = torch.stack([s.remove(v) for s, v in zip(closed, values, strict=True)])
        norm = moved.norm()
        if norm <= 1e-6 * values.norm():
            raise PerpetuneError(
                f"protect: these data leave no free direction at {watched.name}, so nothing could be learned; lower "
                "protect.energy"
            )
        kept: Tensor = moved * (values.norm() / norm)
        return kept

    # -- certificate ----------------------------------------------------------------------------------

    def certificate(self) -> Certificate:
        """How far the outputs on all data added so far have moved since then, and the share of free directions."""
        return self._summed_up(self._certificate(0), self._energy(self.consolidated - 1))

    def _certificate(self, rows: int) -> Certificate:
        sites = []
        for watched in self.sites:
            memory = self.of(watched)
            values = (watched.values(),) if watched.pair is None else watched.pair.product()
            if not all(bool(torch.isfinite(v).all()) for v in values):
                raise PerpetuneError(f"protect: the values of {watched.name} are not finite: lower the learning rate")
            change, relative = memory.measure(*values)
            heads, _, dim = memory.shape
            sites.append({"site": watched.name, "change": change, "relative": relative, "directions": heads * dim})
        return {"rows": rows, "consolidated": self.consolidated, "sites": sites}

    def _summed_up(self, certificate: Certificate, energy: float) -> Certificate:
        """The certificate with the free share (`room`) and rank of each site, and with figures over all sites. The
        overall `room` counts only protected sites."""
        sites = certificate["sites"]
        for entry, w in zip(sites, self.sites, strict=True):
            entry["room"], entry["rank"] = self.of(w).room, self.of(w).rank
            if (held := self._energy_at(w, energy)) != energy:
                entry["energy"] = held
        moved = [s["relative"] for s in sites if s["relative"] is not None]
        closed = [s for s, w in zip(sites, self.sites, strict=True) if self._chosen(w)]
        return {
            "energy": energy,
            **certificate,
            "worst": max(moved, default=None),
            "median": statistics.median(moved) if moved else None,
            "room": statistics.fmean(s["room"] for s in closed),
            "full": [s["site"] for s in closed if s["rank"] == s["directions"]],
        }

    # -- state ----------------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, Any]:
        about = {"consolidated": self.consolidated}
        return {**about, "renewed": self.renewed} if self.config.renew else about

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.consolidated = int(state["consolidated"])
        self.renewed = int(state.get("renewed", 0))


def random_like(subspace: Subspace, rng: torch.Generator) -> Subspace:
    """A subspace of equal rank with directions drawn at random. With the same seed a larger one contains a smaller
    one."""
    drawn = Subspace(subspace.dim, subspace.alpha)
    drawn.extend_random(subspace.rank, rng)
    drawn.importance = subspace.importance
    return drawn


def _weight_rows(watched: Watched) -> tuple[nn.Module, Tensor]:
    base, parts = watched.base, getattr(watched.module, "parts", None)
    if base is None or not parts or not (is_plain(base, nn.Linear) or type(base).__name__ == "Conv1D"):
        raise UsageError(
            f"protect.reference: weights is for pets at linear layers, such as lora, and {watched.name} is around "
            f"{type(base).__name__}: give pictures and texts"
        )
    weight = base.get_parameter("weight").detach()
    weight = weight if is_plain(base, nn.Linear) else weight.mT  # a Conv1D stores it turned
    return base, torch.cat([weight[start:stop] for start, stop in parts])


def _measured(watched: Watched) -> int | None:
    """The number of rows of the pair's product, if the site measures that; None if it measures its operand."""
    return None if watched.pair is None else sum(stop - start for start, stop in watched.pair.parts)


def _noise(watched: Watched) -> float:
    """The share of the features' energy that may come from rounding alone.

    It is never protected, even with energy 1.
    """
    return max(SLACK, (100 * torch.finfo(watched.site.operand.weight.dtype).eps) ** 2)


def _traces(moments: Tensor) -> Tensor:
    """The traces `(heads,)` of matrices `(heads, m, m)`."""
    return moments.diagonal(dim1=-2, dim2=-1).sum(-1)


def _key(name: str) -> str:
    """A site's name as a name for a submodule, which must not have dots."""
    return name.replace(".", "|")

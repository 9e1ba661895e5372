"""Gradient projection over the sites of one model; PGP, Qiao et al., ICLR 2024, and PEGP, arXiv:2405.13383, as the
papers mean it (docs/design.md says where their released code differs)."""

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
from perpetune.pets.base import PET, parameters, sets
from perpetune.protection.config import ProtectConfig
from perpetune.protection.memory import SiteMemory
from perpetune.protection.renewal import kaiming, leading_start, random_start
from perpetune.protection.sites import Sum, Watch, Watched
from perpetune.seeding import generator

Item = TypeVar("Item")
Certificate = dict[str, Any]


class Protection(nn.Module):
    """Keeps trained parameters out of the directions that the features of old data use.

    After each task `consolidate` looks at its data once and adds their features' main directions to every site's
    subspace; `guard` keeps an optimizer's steps out of them. Until something was consolidated nothing is projected.

    Args:
        sites: where features meet parameters.
        config: how much is protected, and how.
        still: parameters at no site: once something is protected they do not move at all.
        free: parameters that are meant to move freely.
        seed: of the random control.

    Raises:
        UsageError: `config.sites` names none there are.
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
            there = ", ".join(kinds) or "none: put in a pet, or train a linear layer"
            named = f"protect: there is no site {unknown[0]!r}" if unknown else "protect: nothing can be protected"
            raise UsageError(f"{named}; sites here are {there}")
        self.config, self.seed = config, seed
        self.sites = list(sites)
        self.still, self.free = list(still), list(free)
        self.consolidated = 0
        """How often data were added."""
        self.renewed = 0
        """How often data had been added when pairs were last renewed."""
        alpha = config.alpha if config.strength == "soft" else None
        self.memory = nn.ModuleDict(
            {_key(w.name): SiteMemory(*w.site.operand.shape, alpha, _measured(w)) for w in self.sites}
        )

    def of(self, watched: Watched) -> SiteMemory:
        """What is kept of a site."""
        memory = self.memory[_key(watched.name)]
        assert isinstance(memory, SiteMemory)
        return memory

    # -- while training -------------------------------------------------------------------------------

    def guard(self, optimizer: torch.optim.Optimizer) -> ProjectedStep:
        """Keep the steps of `optimizer` out of what is protected, until `remove` is called on what is returned.

        Raises:
            UsageError: a parameter has another shape than when its features were added.
        """
        chosen, still = self.closed()
        return ProjectedStep(optimizer, chosen, still=still, project=self.config.project)

    def check_covers(self, optimizer: torch.optim.Optimizer, root: nn.Module, private: Collection[str] = ()) -> None:
        """UsageError if `optimizer` trains a pet of the model `root` that is neither held nor meant to be free.

        Args:
            private: names of sets of pets that may be trained without protection.
        """
        trained = {p for group in optimizer.param_groups for p in group["params"]}
        held = {p for w in self.sites for p in w.site.operand.parameters}.union(self.still, self.free)
        for name in (name for name in sets(root) if name not in private):
            if any(p in trained and p not in held for p in parameters(root, name)):
                guarded = sorted({w.set for w in self.sites if w.set is not None})
                raise UsageError(
                    f"protect: the optimizer trains the set of pets {name!r}, and protection holds "
                    f"{', '.join(map(repr, guarded)) or 'none'}: the method has to name in `trained` every set that it "
                    "trains, or in `private` one that no later task uses"
                )

    def closed(self) -> tuple[list[tuple[Operand, list[Subspace]]], list[nn.Parameter]]:
        """What updates are kept out of at present, and the parameters that may not move.

        Raises:
            UsageError: a parameter has another shape than when its features were added.
        """
        for watched in self.sites:
            self._check_shape(watched)
        chosen = [w for w in self.sites if self._chosen(w)]
        if self.config.directions == "none" or not any(self.of(w).rank for w in chosen):
            return [], []
        return [(w.site.operand, self._closed(w, self.of(w).subspaces)) for w in chosen], self.still

    def _closed(self, watched: Watched, subspaces: list[Subspace]) -> list[Subspace]:
        """The subspaces that updates are kept out of where `subspaces` are those of the features."""
        if self.config.directions == "random":
            seeds = [generator(self.seed, "protect", watched.name, head) for head in range(len(subspaces))]
            return [random_like(s, rng) for s, rng in zip(subspaces, seeds, strict=True)]
        return subspaces

    def _chosen(self, watched: Watched) -> bool:
        return self.config.sites is None or watched.kind in self.config.sites

    def _check_shape(self, watched: Watched) -> None:
        now, then = watched.site.operand.shape, self.of(watched).shape
        if now != then:
            raise UsageError(
                f"protect: {watched.name} is {now} now and was {then} when its features were added: a pet cannot "
                "change its shape under protection"
            )
        if not isinstance(watched.module, PET) and watched.module.weight is not watched.site.operand.weight:
            raise UsageError(
                f"protect: the weight of {watched.name} was replaced by another one, {watched.module.weight.shape}: "
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
        """Protect what `forward` shows at the sites: one pass over `batches`, two where a site is idle.

        A site is idle while what follows it is zero (LoRA's A before the first step). Its values are moved into the
        free directions then: the outputs do not change, and the zero matrix behind it keeps all its room.

        Args:
            batches: data that was learned, or reference data; to be gone through twice, not an iterator.
            forward: runs the model on a batch, in evaluation mode.
            mask: `(B, N)` of a batch: tokens that count; None is all.
            total: sums a tensor over all processes.

        Returns:
            The certificate: how far the outputs on earlier data have moved, before these data were added.

        Raises:
            PerpetuneError: features or parameters that are not finite, or a site that saw no data. Nothing has changed
                then.
            UsageError: a parameter has another shape than when its features were added; batches that are an iterator.
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
                        "protect: before the first step data are looked at twice: give a list or a loader, not an "
                        "iterator"
                    )
                traces = {w.name: _traces(self._gathered(watch, w, total)[0]) for w in self.sites if w not in waiting}
                moved = {w: self._moved_free(w, first[w.name][0]) for w in waiting}
                for w, values in moved.items():
                    undo.callback(w.set_values, as_made[w.name])
                    w.set_values(values)
                watch = self._look([w for w in self.sites if w not in waiting], batches, forward, mask)
            found = {w.name: first.get(w.name) or self._gathered(watch, w, total) for w in self.sites}
            counts = {name: count for name, (_, count) in found.items()}
            certificate = self._certificate(max(counts.values()))
            energy = self._energy(self.consolidated)
            grown: dict[str, list[Subspace]] = {}
            packed: dict[str, Tensor] = {}
            for w in self.sites:  # what takes time changes nothing yet, and half of the moments goes as bases come
                moments, _ = found.pop(w.name)
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

    def _energy(self, added: int) -> float:
        """The energy of the data added as number `added`, from 0; a recipe's reference data are no task."""
        return self.config.energy_at(max(0, added - (self.config.reference is not None)))

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
        if count == 0 and watched.site.always:
            raise PerpetuneError(
                f"protect: {watched.name} saw no data, for the pass did not go through it: leave it out, or check the "
                "batches"
            )
        if not torch.isfinite(moments).all():
            raise PerpetuneError(
                f"protect: features at {watched.name} are not finite; nothing was added: lower train.lr, or look for "
                "broken inputs"
            )
        return moments, count

    def _grown(self, watched: Watched, moments: Tensor, energy: float, traces: Tensor | None = None) -> list[Subspace]:
        """The site's subspaces with the directions that `moments (heads, m, m)` add.

        Args:
            traces: `(heads,)` of the moments that `energy` is a share of, where idle sites before this one let less
                of the features through since they were moved: what they hold back is protected already.
        """
        subspaces = [copy.copy(s) for s in self.of(watched).subspaces]
        rounding = _noise(watched)
        for head, (subspace, matrix) in enumerate(zip(subspaces, moments, strict=True)):
            share, left = energy, float(matrix.trace())
            if traces is not None:
                whole = float(traces[head])
                if left <= rounding * whole:  # directions of the noise are no features, not even with energy 1
                    continue
                share = min(energy, max(0.0, 1 - (1 - energy) * whole / left))
            subspace.extend(matrix, share)
        return subspaces

    # -- before the next task -------------------------------------------------------------------------

    @property
    def waiting(self) -> bool:
        """Whether pairs have to be renewed before the next step: what they hold now is old, and their `B` is free."""
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
        """Let what was learned rest, and start new pairs in the free directions; no output changes.

        Where a site has no free directions its new pair is zero and stays so. What rests is cut back where
        `config.rest` says so, and then old outputs do change by what the next certificate counts.

        Args:
            rng: draws every new `A`, the same on all processes.
            batches: of the data to be learned next, where `config.start` is `leading`.
            forward, mask, total: as for `consolidate`.

        Raises:
            PerpetuneError: features that are not finite, or a site that saw no data. Nothing has changed then.
        """
        pairs = {w: w.pair for w in self.sites if w.pair is not None}
        found: dict[Watched, Tensor] = {}
        if self.config.start == "leading":
            watch = self._look(list(pairs), batches, forward, mask)
            found = {w: self._gathered(watch, w, total)[0][0] for w in pairs}
        for w, pair in pairs.items():
            memory = self.of(w)
            _, rows, dim = memory.shape
            drawn = kaiming(rows, dim, rng)
            held = self.config.directions != "none" and self._chosen(w)
            (closed,) = self._closed(w, memory.subspaces) if held else (None,)
            if w in found:
                start = leading_start(drawn, closed, found[w], len(pair.parts), _noise(w))
            else:
                start = random_start(drawn, closed)
            seen = unpack(memory.total, dim)[0] if self.config.rest is not None else None
            pair.renew(drawn.new_zeros(rows, dim) if start is None else start, self.config.rest, seen)
        self.renewed = self.consolidated

    # -- before the first step ------------------------------------------------------------------------

    def _idle(self, watch: Watch, total: Sum) -> list[Watched]:
        """Sites whose values have no effect yet, on any process that saw data."""
        by_name = {w.name: w for w in self.sites}
        votes = torch.zeros(2, len(self.sites))  # processes that saw the site, and those that saw it used
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
        """The values in the directions that will be free once `moments` are protected, as large as they were."""
        values = watched.values()
        grown = self._grown(watched, moments, self._energy(self.consolidated))
        closed = self._closed(watched, grown)
        moved = torch.stack([s.remove(v) for s, v in zip(closed, values, strict=True)])
        norm = moved.norm()
        if norm <= 1e-6 * values.norm():
            raise PerpetuneError(
                f"protect: these data leave no room at {watched.name}: nothing could be learned; lower protect.energy"
            )
        kept: Tensor = moved * (values.norm() / norm)
        return kept

    # -- certificate ----------------------------------------------------------------------------------

    def certificate(self) -> Certificate:
        """How far the outputs on all data added so far have moved since, and the room that is left."""
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
        """With the room that is left at each site, and figures over them; room is that of those that are protected."""
        sites = certificate["sites"]
        for entry, w in zip(sites, self.sites, strict=True):
            entry["room"], entry["rank"] = self.of(w).room, self.of(w).rank
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
    """A subspace of equal rank with directions drawn at random; with the same seed a larger one holds a smaller."""
    drawn = Subspace(subspace.dim, subspace.alpha)
    drawn.extend_random(subspace.rank, rng)
    drawn.importance = subspace.importance
    return drawn


def _measured(watched: Watched) -> int | None:
    """Rows of the product that is measured at the site, where it is not the operand itself."""
    return None if watched.pair is None else sum(stop - start for start, stop in watched.pair.parts)


def _noise(watched: Watched) -> float:
    """The share of the features' energy that rounding alone may make, not even of which energy 1 is a share."""
    return max(SLACK, (100 * torch.finfo(watched.site.operand.weight.dtype).eps) ** 2)


def _traces(moments: Tensor) -> Tensor:
    """Of `(heads, m, m)`, `(heads,)`."""
    return moments.diagonal(dim1=-2, dim2=-1).sum(-1)


def _key(name: str) -> str:
    """A site's name as the name of a submodule, which has no dots."""
    return name.replace(".", "|")

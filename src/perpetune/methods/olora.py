"""O-LoRA: a new LoRA for each task. A loss keeps it orthogonal to the earlier ones, and all act together.

Wang et al., Findings of EMNLP 2023, arXiv:2310.14152.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from perpetune.errors import UsageError
from perpetune.fit import FitConfig, fit
from perpetune.methods.base import Method, Resting, training
from perpetune.methods.parts.stack import Stack, alike
from perpetune.models.base import Mask, Model
from perpetune.numerics.exact import exactly
from perpetune.numerics.lowrank import Factors
from perpetune.pets import LoRA, copy_set, has_set, pets, remove, slots, using
from perpetune.tasks import Batch, Inputs, Task

DEFAULT = "default"  # the set in force at prediction: the first task trains it, then the LoRAs of all tasks act in it
NEW = "new"  # the set that is trained, from the second task on

MOST = 10**6  # LoRAs that a state may name; a damaged one asks for no more memory than these

Weight = Annotated[float, Field(ge=0)]
Weights = Weight | Annotated[list[Weight], Field(min_length=1)]


class OLoRA(Method):
    """Trains a new LoRA for each task, orthogonal to the frozen ones of earlier tasks, and adds it to them.

    Every module computes with `W + s Σ_{i≤t} B_i A_i`. Task `t` draws a new `A_t`, starts `B_t` at zero and trains both
    on the loss

        task loss + λ1 Σ_modules Σ_{i<t} Σ_{jk} |(A_i A_tᵀ)_jk| + λ2 Σ_modules (‖A_t‖ + ‖B_t‖).

    The paper writes squares of the entries. Its released code sums absolute values; the paper's `λ1` and tables come
    from that code, so this method sums absolute values too. `λ2` is also that of the code, which sums the norms of the
    matrices, not their squares. A part of a fused layer (q of qkv) counts as a module. The frozen LoRAs act without
    dropout.

    The LoRAs of finished tasks stand in a `Stack`, and each is stored once, by its task. What acts of them at a layer
    is never larger than two matrices of the layer's size. Only the first penalty looks at each of them: one product
    for all modules of one shape.

    Args:
        model: with LoRA injected under the name `default`; the LoRA of each task has its rank.
        train: how each task is trained.
        mask: the classes that a classifier's loss compares; see `Classifier`.
        orthogonality: `λ1`. A list has one value for each task; the last value is used for all later tasks.
        shrink: `λ2`, given in the same way.

    Raises:
        UsageError: there is no pet, or the pet is not LoRA.
    """

    unprotectable = "trains a new LoRA for each task, and protect: cannot hold that: use finetune"

    def __init__(
        self,
        model: Model,
        *,
        train: FitConfig,
        mask: Mask = "task",
        orthogonality: Weights = 0.5,
        shrink: Weights = 0.0,
    ):
        super().__init__(model)
        tuned = pets(model, DEFAULT) if has_set(model, DEFAULT) else []
        if foreign := sorted({type(pet).__name__.lower() for pet in tuned if not isinstance(pet, LoRA)}):
            raise UsageError(f"method olora tunes LoRA, but the recipe has {foreign[0]}: use `pet: lora`")
        if not tuned:
            raise UsageError("method olora tunes LoRA, but the recipe has no pet: use `pet: lora`")
        model.compare(mask)
        self.train_config, self.orthogonality, self.shrink = train, orthogonality, shrink
        self.task_facts: dict[str, Any] = {}
        self._ranks = [pet.rank for pet in self._loras(DEFAULT)]
        placed = [path for path, slot in slots(model) if DEFAULT in slot.pets]
        self.stack = Stack("stack", dict(zip(placed, self._loras(DEFAULT), strict=True)))
        """The LoRAs of finished tasks."""
        self._joined = 0
        """While a state of an earlier version is loaded: how many tasks have their LoRAs in one, the set `default`."""

    # -- learning -------------------------------------------------------------------------------------

    def learn(self, task: Task) -> None:
        self.model.grow(task)
        config, trained = self.train_config, self._trained
        if trained == NEW:
            self._begin(task)
        try:
            following = self.model.following(task, config.batch_size, self._now)
            with following, training(self.model), self.model.resting(task):
                for frozen in pets(self.model, DEFAULT) if trained == NEW else ():
                    frozen.eval()
                fit(self.loss, self.groups(config, [trained]), task, config)
            self.task_facts = self._measured()
            self._add(trained)
        finally:  # a model with the set `new` could not load the state of the last finished task
            if trained == NEW:
                remove(self.model, NEW)
        with using(self.model, DEFAULT):
            self.model.summarise(task, config.batch_size)

    @property
    def _trained(self) -> str:
        return NEW if self.stack.count else DEFAULT

    @property
    def _acting(self) -> tuple[str, ...]:
        """The sets in force while a task is learned."""
        return (DEFAULT, NEW) if self.stack.count else (DEFAULT,)

    def loss(self, task: Task, batch: Batch) -> Tensor:
        with using(self.model, self._acting):
            loss = self.model.loss(task, batch)
        if self.stack.count and (weight := self._weight(self.orthogonality)):
            loss = loss + weight * self.overlap()
        if weight := self._weight(self.shrink):
            loss = loss + weight * self.size()
        return loss

    def _now(self, inputs: Inputs) -> Tensor:
        """Features with the new LoRA and the old ones in force."""
        with using(self.model, self._acting):
            return self.model.features(inputs)

    def overlap(self) -> Tensor:
        """`Σ |A_i A_tᵀ|` over modules, earlier tasks and entries, a scalar; 0 in the first task."""
        new = self._parts(self._trained)
        total = new[0][1].new_zeros(())
        with exactly(total.device):
            for modules, old in self.stack.downs():
                total = total + torch.bmm(old, torch.stack([new[m][1] for m in modules]).mT).abs().sum()
        return total

    def size(self) -> Tensor:
        """`Σ ‖A_t‖ + ‖B_t‖` over modules, a scalar."""
        matrices = [matrix for factors in self._parts(self._trained) for matrix in factors]
        norms = [
            torch.linalg.vector_norm(torch.stack([matrices[i] for i in group]), dim=(1, 2)).sum()
            for group in alike(matrix.shape for matrix in matrices)
        ]
        return torch.stack(norms).sum()

    def _weight(self, given: float | list[float]) -> float:
        """The weight for the present task."""
        return given[min(self.stack.count, len(given) - 1)] if isinstance(given, list) else given

    def _begin(self, task: Task) -> None:
        """Add a new LoRA to the model."""
        frozen = self._loras(DEFAULT)
        acting = [pet.leaned_on() for pet in frozen]
        for pet in frozen:
            pet.lean_on(None)  # what acts of earlier tasks is not copied
        copy_set(self.model, DEFAULT, NEW)
        for pet, (rest, dense) in zip(frozen, acting, strict=True):
            pet.lean_on(rest, dense)
        drawn = task.generator("lora")
        for pet, rank in zip(self._loras(NEW), self._ranks, strict=True):
            pet.resize(rank)
            pet.restart(drawn)

    def _add(self, trained: str) -> None:
        """Put the LoRA that was trained to those of earlier tasks, and let all of them act in `default`."""
        self.stack.append(self._parts(trained))
        acting = self._loras(DEFAULT)
        for pet in acting:
            pet.resize(0)
        self.stack.act(acting, added=True)

    # -- reporting and storing ------------------------------------------------------------------------

    @torch.no_grad()
    def _measured(self) -> dict[str, Any]:
        """Facts about the new LoRA, measured before it is put to the old ones."""
        earlier = self.stack.downs()
        if not earlier:
            return {"overlap": None, "mean_cosine": None}
        new = self._parts(NEW)
        cosines = [_cosines(old, torch.stack([new[m][1] for m in modules])).flatten() for modules, old in earlier]
        return {"overlap": float(self.overlap()), "mean_cosine": float(torch.cat(cosines).mean())}

    def facts(self) -> dict[str, Any]:
        """Under `olora`: the number of LoRAs; `Σ |A_i A_tᵀ|` at the end of the last task; the mean cosine of the
        principal angles between the rows of its `A` and those of all earlier ones; the bytes of all LoRAs."""
        counts = {"loras": self.stack.count, **self.task_facts, "adapter_bytes": self.stack.bytes()}
        return {**super().facts(), "olora": {"kind": "orthogonal adapters", **counts}}

    def resting(self) -> Mapping[str, Resting]:
        return self.stack.resting()

    def get_extra_state(self) -> dict[str, Any]:
        found = {"loras": self.stack.count, "told": self.task_facts}
        return {**found, "joined": self._joined} if self._joined else found

    def set_extra_state(self, state: dict[str, Any]) -> None:
        count, self._joined = _count(state["loras"]), _count(state.get("joined", 0))
        self.task_facts = dict(state["told"])
        self.stack.resize(count)
        for pet, rank in zip(self._loras(DEFAULT), self._ranks, strict=True):
            pet.resize(0 if count else rank * max(1, self._joined))
            pet.lean_on(None)

    def from_earlier(self, extra: dict[str, Any]) -> dict[str, str]:
        """Before LoRAs of tasks stood alone, the set `default` was all of them joined into one."""
        own = extra[""]
        if "tasks" in own:
            extra[""] = {"loras": 0, "told": own["told"], "joined": len(own["tasks"])}
        return {}

    def restored(self) -> None:
        loras = self._loras(DEFAULT)
        if self._joined:
            ranks = [rank for pet, rank in zip(loras, self._ranks, strict=True) for _ in pet.parts]
            whole = list(zip(self._parts(DEFAULT), ranks, strict=True))
            for start in range(self._joined):
                cut = [(b[:, start * r : (start + 1) * r], a[start * r : (start + 1) * r]) for (b, a), r in whole]
                self.stack.append(cut)
            for pet in loras:
                pet.resize(0)
            self._joined = 0
        self.stack.act(loras)

    def _loras(self, name: str) -> list[LoRA]:
        return [pet for pet in pets(self.model, name) if isinstance(pet, LoRA)]

    def _parts(self, name: str) -> list[Factors]:
        """`B` and `A` of every module of a set."""
        return [factors for pet in self._loras(name) for factors in pet.factors()]


def _count(value: Any) -> int:
    """A number of LoRAs that a state names; ValueError if it is none."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST:
        raise ValueError(f"{value!r} is no number of LoRAs")
    return value


def _cosines(old: Tensor, new: Tensor) -> Tensor:
    """Cosines of the principal angles between the spaces of the rows of `old (M, R, d)` and `new (M, r, d)`.

    As many old rows as there are directions count as the whole space, so no more of them are looked at.
    """
    old = old[:, : old.shape[2]]
    one, other = (torch.linalg.qr(rows.float().mT).Q for rows in (old, new))
    cosines: Tensor = torch.linalg.svdvals(one.mT @ other)
    return cosines.clamp(max=1)

"""O-LoRA: a new LoRA for each task. A loss keeps it orthogonal to the earlier ones, and all act together.

Wang et al., Findings of EMNLP 2023, arXiv:2310.14152.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from perpetune.errors import UsageError
from perpetune.fit import FitConfig, fit
from perpetune.methods.base import Method, training
from perpetune.models.base import Mask, Model
from perpetune.numerics.exact import exactly
from perpetune.numerics.lowrank import Factors
from perpetune.pets import LoRA, copy_set, has_set, parameters, pets, remove, using
from perpetune.tasks import Batch, Inputs, Task

DEFAULT = "default"  # the set in force at prediction: the LoRAs of all tasks, joined into one
NEW = "new"  # the set that is trained, from the second task on

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
        self.tasks: list[str] = []
        """The tasks whose LoRAs are joined in the set `default`, in the order of its rows of `A` in each part."""
        self.task_facts: dict[str, Any] = {}
        self._ranks = [pet.rank for pet in self._loras(DEFAULT)]
        self._old: list[tuple[list[int], Tensor]] = []

    # -- learning -------------------------------------------------------------------------------------

    def learn(self, task: Task) -> None:
        self.model.grow(task)
        config, trained = self.train_config, NEW if self.tasks else DEFAULT
        if trained == NEW:
            self._begin(task)
        try:
            following = self.model.following(task, config.batch_size, self._now)
            with following, training(self.model), self.model.resting(task):
                for frozen in pets(self.model, DEFAULT) if trained == NEW else ():
                    frozen.eval()
                fit(self.loss, self.groups(config, [trained]), task, config)
            self.task_facts = self._measured()
            if trained == NEW:
                self._add()
        finally:  # a model with the set `new` could not load the state of the last finished task
            self._old = []
            if trained == NEW:
                remove(self.model, NEW)
        self.tasks = [*self.tasks, task.name]
        with using(self.model, DEFAULT):
            self.model.summarise(task, config.batch_size)

    def loss(self, task: Task, batch: Batch) -> Tensor:
        with using(self.model, (DEFAULT, NEW) if self.tasks else DEFAULT):
            loss = self.model.loss(task, batch)
        if self._old and (weight := self._weight(self.orthogonality)):
            loss = loss + weight * self.overlap()
        if weight := self._weight(self.shrink):
            loss = loss + weight * self.size()
        return loss

    def _now(self, inputs: Inputs) -> Tensor:
        """Features with the new LoRA and the old ones in force."""
        with using(self.model, (DEFAULT, NEW) if self.tasks else DEFAULT):
            return self.model.features(inputs)

    def overlap(self) -> Tensor:
        """`Σ |A_i A_tᵀ|` over modules, earlier tasks and entries, a scalar; 0 in the first task."""
        new = self._parts(NEW if self.tasks else DEFAULT)
        total = new[0][1].new_zeros(())
        with exactly(total.device):
            for modules, old in self._old:
                total = total + torch.bmm(old, torch.stack([new[m][1] for m in modules]).mT).abs().sum()
        return total

    def size(self) -> Tensor:
        """`Σ ‖A_t‖ + ‖B_t‖` over modules, a scalar."""
        matrices = [matrix for factors in self._parts(NEW if self.tasks else DEFAULT) for matrix in factors]
        norms = [
            torch.linalg.vector_norm(torch.stack([matrices[i] for i in group]), dim=(1, 2)).sum()
            for group in _alike(matrices)
        ]
        return torch.stack(norms).sum()

    def _weight(self, given: float | list[float]) -> float:
        """The weight for the present task."""
        return given[min(len(self.tasks), len(given) - 1)] if isinstance(given, list) else given

    def _begin(self, task: Task) -> None:
        """Add a new LoRA to the model, and stack the old `A` to which it is kept orthogonal."""
        copy_set(self.model, DEFAULT, NEW)
        drawn = task.generator("lora")
        for pet, rank in zip(self._loras(NEW), self._ranks, strict=True):
            pet.resize(rank)
            pet.restart(drawn)
        old = [a.detach() for _, a in self._parts(DEFAULT)]
        self._old = [(group, torch.stack([old[m] for m in group])) for group in _alike(old)]

    @torch.no_grad()
    def _add(self) -> None:
        """Join the new LoRA with the old ones: `B A + B_t A_t = [B B_t] [A; A_t]`."""
        for old, new in zip(self._loras(DEFAULT), self._loras(NEW), strict=True):
            pairs = list(zip(old.factors(), new.factors(), strict=True))
            old.resize(old.rank + new.rank)
            old.set_factors([(torch.cat([b, b2], dim=1), torch.cat([a, a2])) for (b, a), (b2, a2) in pairs])

    # -- reporting and storing ------------------------------------------------------------------------

    @torch.no_grad()
    def _measured(self) -> dict[str, Any]:
        """Facts about the new LoRA, measured before it is joined with the old ones."""
        if not self._old:
            return {"overlap": None, "mean_cosine": None}
        new = self._parts(NEW)
        cosines = [_cosines(old, torch.stack([new[m][1] for m in modules])).flatten() for modules, old in self._old]
        return {"overlap": float(self.overlap()), "mean_cosine": float(torch.cat(cosines).mean())}

    def facts(self) -> dict[str, Any]:
        """Under `olora`: the number of LoRAs; `Σ |A_i A_tᵀ|` at the end of the last task; the mean cosine of the
        principal angles between the rows of its `A` and those of all earlier ones; the bytes of all LoRAs."""
        size = sum(p.numel() * p.element_size() for p in parameters(self.model, DEFAULT))
        facts = {"kind": "orthogonal adapters", "loras": len(self.tasks), **self.task_facts, "adapter_bytes": size}
        return {**super().facts(), "olora": facts}

    def get_extra_state(self) -> dict[str, Any]:
        return {"tasks": self.tasks, "told": self.task_facts}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.tasks, self.task_facts = list(state["tasks"]), dict(state["told"])
        for pet, rank in zip(self._loras(DEFAULT), self._ranks, strict=True):
            pet.resize(rank * max(1, len(self.tasks)))

    def _loras(self, name: str) -> list[LoRA]:
        return [pet for pet in pets(self.model, name) if isinstance(pet, LoRA)]

    def _parts(self, name: str) -> list[Factors]:
        """`B` and `A` of every module of a set."""
        return [factors for pet in self._loras(name) for factors in pet.factors()]


def _alike(matrices: Iterable[Tensor]) -> list[list[int]]:
    """The positions of the matrices, in one list for each shape."""
    shapes: dict[torch.Size, list[int]] = {}
    for position, matrix in enumerate(matrices):
        shapes.setdefault(matrix.shape, []).append(position)
    return list(shapes.values())


def _cosines(old: Tensor, new: Tensor) -> Tensor:
    """Cosines of the principal angles between the spaces of the rows of `old (M, R, d)` and `new (M, r, d)`."""
    one, other = (torch.linalg.qr(rows.float().mT).Q for rows in (old, new))
    cosines: Tensor = torch.linalg.svdvals(one.mT @ other)
    return cosines.clamp(max=1)

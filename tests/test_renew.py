"""Renewed protected LoRA: the pair of each task rests and a new one starts where old features do not reach
(shared/design/features.md §6, and its toy). Brute force in float64, and a control that must fail for each claim."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from perpetune.pets import Place, inject, using
from perpetune.pets.lora import LoRA
from perpetune.protection.config import ProtectConfig
from perpetune.protection.protection import Protection
from perpetune.protection.sites import pet_sites
from perpetune.seeding import generator, own_global_state

DIM, RANK = 64, 8
NEVER = {"directions": "none", "energy": 1.0, "renew": True}
RENEWED = {"energy": 1.0, "renew": True}


def drawn(*shape: int, seed: int | str = 0) -> Tensor:
    return torch.randn(*shape, generator=generator("renew", seed), dtype=torch.float64)


class Layer:
    """One frozen linear layer with a LoRA around it, and tasks of regression whose inputs fill a few directions."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float64,
        dim: int = DIM,
        parts: Sequence[tuple[int, int]] = ((0, DIM),),
        d_out: int = DIM,
        **protect: Any,
    ):
        with own_global_state("renew"):
            self.root = nn.Sequential(nn.Linear(dim, d_out, bias=False)).to(dtype)
        place = Place("0", self.root[0], ("q",), tuple(parts), 0, dim, d_out)
        options = {"rank": RANK, "alpha": RANK}
        (pet,) = inject(self.root, [place], lambda p: LoRA(p, generator("renew"), **options))
        assert isinstance(pet, LoRA)
        self.pet, self.dtype, self.dim = pet.to(dtype), dtype, dim
        config = ProtectConfig(**protect)
        sites, loose, _ = pet_sites(self.root, "exact", renew=config.renew)
        assert loose == []
        self.protection = Protection(sites, config)

    def inputs(self, task: int, rank: int = 6, rows: int = 200) -> Tensor:
        return (drawn(rows, rank, seed=f"x{task}") @ drawn(rank, self.dim, seed=f"d{task}") / rank**0.5).to(self.dtype)

    def targets(self, task: int, x: Tensor) -> Tensor:
        weight = self.root[0].base.weight.detach()
        change = 0.5 * drawn(*weight.shape, seed=f"y{task}").to(self.dtype) / DIM**0.5
        return x @ (weight + change).mT

    def outputs(self, x: Tensor) -> Tensor:
        with torch.no_grad(), using(self.root, "default"):
            found: Tensor = self.root(x)
        return found

    def renew(self, task: int, x: Tensor | None = None) -> None:
        if self.protection.waiting:
            with using(self.root, "default"):
                self.protection.renew(generator("start", task), [] if x is None else [x], self.root)

    def train(self, x: Tensor, y: Tensor, steps: int = 300, lr: float = 1e-2, decay: float = 0.0) -> None:
        optimizer = torch.optim.AdamW(self.pet.parameters(), lr=lr, weight_decay=decay)
        with self.protection.guard(optimizer), using(self.root, "default"):
            for _ in range(steps):
                optimizer.zero_grad()
                ((self.root(x) - y) ** 2).mean().backward()
                optimizer.step()

    def consolidate(self, x: Tensor) -> dict[str, Any]:
        with using(self.root, "default"):
            return self.protection.consolidate([x], self.root)

    def unlearned(self, x: Tensor, y: Tensor) -> float:
        before = x @ self.root[0].base.weight.detach().mT
        return float(((self.outputs(x) - y) ** 2).mean() / ((before - y) ** 2).mean())


def moved(now: Tensor, before: Tensor) -> float:
    return float((now - before).norm() / before.norm())


def through(layer: Layer, tasks: int, **inputs: Any) -> tuple[list[float], float, list[dict[str, Any]]]:
    """Learn the tasks: what is left unlearned right after each, the worst move of old outputs, the certificates."""
    left, old, certificates = [], [], []
    for task in range(tasks):
        x = layer.inputs(task, **inputs)
        y = layer.targets(task, x)
        layer.renew(task, x)
        layer.train(x, y)
        left.append(layer.unlearned(x, y))
        old.append((x, layer.outputs(x)))
        certificates.append(layer.consolidate(x))
    return left, max(moved(layer.outputs(x), before) for x, before in old[:-1]), certificates


def test_toy() -> None:
    left, drift, _ = through(Layer(energy=1.0), 3)
    print("pegp", left, drift)
    assert left[2] >= 0.8
    for start in ("random", "leading"):
        layer = Layer(**RENEWED, start=start)
        left, drift, certificates = through(layer, 8)
        print(start, left, drift, [c["worst"] for c in certificates])
        assert max(left) < 0.01
        assert drift < 1e-12
    _, drift, certificates = through(Layer(**NEVER), 3)
    print("not projected", drift, certificates[-1]["worst"])
    assert drift > 0.1

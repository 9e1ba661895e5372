"""Learned keys under protection: old queries choose as they did, because keys keep their direction there and length."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from test_treelora import domains
from tiny import package
from torch import Tensor, nn
from torch.nn import functional as F

from perpetune.check import Checker
from perpetune.errors import UsageError
from perpetune.fit import trainable
from perpetune.learning import learn_protected
from perpetune.numerics.choosing import best
from perpetune.numerics.moments import Moments
from perpetune.numerics.projection import Operand, ProjectedStep
from perpetune.numerics.subspace import Subspace
from perpetune.protection.config import ProtectConfig
from perpetune.protection.protection import Protection
from perpetune.protection.sites import Watched, pet_sites
from perpetune.recipe import make_recipe
from perpetune.seeding import generator
from perpetune.selectors.keys import ENERGY, Keys
from perpetune.selectors.weights import Weights
from perpetune.snapshot import restore, snapshot

WIDTH, MEMBERS = 24, 6


def cosines(queries: Tensor, keys: Tensor) -> Tensor:
    return F.normalize(queries, dim=-1) @ F.normalize(keys.detach(), dim=-1).mT


def queries_of(task: int, rank: int = 5, count: int = 60) -> Tensor:
    """Queries that fill `rank` directions, with a large one that all tasks share."""
    source = generator("queries", task)
    basis = torch.randn(rank, WIDTH, generator=source, dtype=torch.float64)
    common = torch.ones(WIDTH, dtype=torch.float64)
    return common + 0.3 * torch.randn(count, rank, generator=source, dtype=torch.float64) @ basis


def pool(**options: Any) -> Keys:
    keys = Keys(WIDTH, top=2, **options)
    keys.grow(MEMBERS, generator("keys"))
    return keys.double()


def protected(keys: nn.Module, **options: Any) -> Protection:
    sites, loose, free = pet_sites(keys, "exact")
    return Protection(sites, ProtectConfig(**options), still=loose, free=free)


def learn(keys: Keys, protection: Protection | None, queries: Tensor, steps: int = 200) -> None:
    """Train by the pull, with weight decay, and add the queries to the protection."""
    with trainable(keys.trained()):
        optimizer = torch.optim.AdamW(keys.trained(), lr=0.02, weight_decay=0.1)
        guard = protection.guard(optimizer) if protection is not None else None
        for step in range(steps):
            part = queries[(10 * step) % len(queries) :][:10]
            loss = keys.loss(part, keys.pick(part))
            assert loss is not None
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if guard is not None:
            guard.remove()
    if protection is not None:
        protection.consolidate([queries], keys.choose)


def without_length(protection: Protection) -> None:
    """The control: the same sites, without keeping the lengths of their rows."""
    protection.sites = [
        dataclasses.replace(
            w, site=dataclasses.replace(w.site, operand=dataclasses.replace(w.site.operand, length=False))
        )
        for w in protection.sites
    ]


def test_g8_a_projected_step_keeps_dot_products_and_only_lengths_keep_cosines() -> None:
    torch.manual_seed(0)
    queries = torch.randn(4, 2, dtype=torch.float64) @ torch.randn(2, 6, dtype=torch.float64)
    start, step = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    moments, subspace = Moments(6), Subspace(6)
    moments.update(queries)
    subspace.extend(moments.matrix, 1.0)
    assert subspace.rank == 2
    moved = {}
    for length in (False, True):
        keys = nn.Parameter(start.clone())
        optimizer = torch.optim.SGD([keys], lr=1.0)
        keys.grad = -step
        with ProjectedStep(optimizer, [(Operand(keys, length=length), [subspace])]):
            optimizer.step()
        moved[length] = keys.detach()
    assert float((queries @ (moved[False] - start).mT).abs().max()) < 4e-15
    assert float((queries @ (moved[True] - start).mT).abs().max()) < 4e-15
    old = cosines(queries, start)
    assert float((cosines(queries, moved[False]) - old).abs().max()) == pytest.approx(0.2780065, abs=5e-8)
    assert float((cosines(queries, moved[True]) - old).abs().max()) < 1e-15
    torch.testing.assert_close(moved[True].norm(dim=1), start.norm(dim=1), rtol=1e-14, atol=0)
    assert float((moved[True] - start).norm()) == pytest.approx(2.879, abs=5e-4)


@pytest.mark.parametrize(
    ("options", "control", "holds"),
    [
        ({}, None, True),
        ({"sites": ["choice"]}, None, True),
        ({}, without_length, False),
        ({"project": "gradient"}, None, False),
        ({"directions": "none"}, None, False),
        ({"directions": "random"}, None, False),
    ],
)
def test_v10_old_queries_choose_as_they_did(
    options: dict[str, Any], control: Callable[[Protection], None] | None, holds: bool
) -> None:
    keys = pool()
    protection = protected(keys, energy=1.0, **options)
    if control is not None:
        control(protection)
    old, then, start = [], [], keys.keys
    for task in range(4):
        learn(keys, protection, queries_of(task), 120 if task else 0)  # the first keys are as they were drawn
        old.append(queries_of(task))
        then.append(cosines(old[-1], keys.keys))
        start = keys.keys.detach().clone() if task == 0 else start
    moved = max(float((cosines(q, keys.keys) - c).abs().max()) for q, c in zip(old, then, strict=True))
    assert float((keys.keys - start).abs().max()) > 0.1, "the free part has learned"
    if not holds:
        assert moved > 1e-2
        return
    assert moved < 1e-12
    for queries, before in zip(old, then, strict=True):
        assert torch.equal(keys.choose(queries).index, best(before, 2))


def test_v10_in_float32_the_lengths_hold_to_rounding() -> None:
    keys = pool().float()
    protection = protected(keys, energy=1.0)
    learn(keys, protection, queries_of(0).float())
    before = keys.keys.detach().clone()
    learn(keys, protection, queries_of(1).float())
    torch.testing.assert_close(keys.keys.norm(dim=1), before.norm(dim=1), rtol=1e-5, atol=0)
    old = queries_of(0).float()
    assert float((cosines(old, keys.keys) - cosines(old, before)).abs().max()) < 1e-5


@pytest.mark.parametrize("strength", ["hard", "soft"])
def test_lengths_of_several_operands_in_one_stack_and_apart(strength: Literal["hard", "soft"]) -> None:
    """Two pools of one shape go through one product; rows without the flag do not join it."""
    both = nn.ModuleList([pool(), pool()])
    plain = nn.Parameter(torch.randn(MEMBERS, WIDTH, dtype=torch.float64, generator=generator("plain")))
    queries = queries_of(0)
    moments = Moments(WIDTH)
    moments.update(queries)
    subspace = Subspace(WIDTH, 10.0 if strength == "soft" else None)
    subspace.extend(moments.matrix, 1.0)
    operands = [Operand(both[0].fresh, length=True), Operand(plain), Operand(both[1].fresh, length=True)]  # type: ignore[arg-type]
    parameters = [operand.weight for operand in operands]
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    for number, p in enumerate(parameters):
        p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator("grad", number))
    with ProjectedStep(optimizer, [(operand, [subspace]) for operand in operands]):
        optimizer.step()
    free = subspace.free @ subspace.free.mT
    lengths = [
        ((p.detach() @ free).norm(dim=1), (b @ free).norm(dim=1)) for p, b in zip(parameters, before, strict=True)
    ]
    for number, (now, then) in enumerate(lengths):
        assert torch.allclose(now, then, rtol=1e-12) is (number != 1)


def test_keys_without_a_free_direction_stay_as_they_are() -> None:
    keys = pool()
    protection = protected(keys, energy=1.0)
    learn(keys, protection, torch.randn(100, WIDTH, dtype=torch.float64, generator=generator("all")))
    before = keys.keys.detach().clone()
    learn(keys, protection, queries_of(1))
    torch.testing.assert_close(keys.keys.detach(), before, rtol=1e-13, atol=1e-13)
    assert protection.certificate()["full"] == ["the model/choice"]


@pytest.mark.parametrize(("energy", "held"), [(0.5, ENERGY), (0.97, ENERGY), (0.9999, 0.9999), (1.0, 1.0), (0.0, 0.0)])
def test_keys_hold_more_energy_than_other_sites_need(energy: float, held: float) -> None:
    keys = pool()
    protection = protected(keys, energy=energy)
    queries = queries_of(0)
    certificate = protection.consolidate([queries], keys.choose)
    (site,) = certificate["sites"]
    normal = F.normalize(queries, dim=-1)
    moments, wanted = Moments(WIDTH), Subspace(WIDTH)
    moments.update(normal)
    wanted.extend(moments.matrix, held)
    assert site["rank"] == wanted.rank
    assert certificate["energy"] == energy
    assert site.get("energy", energy) == held


def test_at_the_energy_of_other_sites_choices_of_old_queries_change() -> None:
    """The control for the least energy: what tells tasks apart is a small part of the queries."""
    changed = {}
    for least in (0.97, ENERGY):
        keys = pool()
        protection = protected(keys, energy=0.97)
        for w in (sites := protection.sites):
            sites[sites.index(w)] = dataclasses.replace(w, site=dataclasses.replace(w.site, energy=least))
        old = torch.ones(WIDTH, dtype=torch.float64) + 0.1 * (queries_of(0) - 1)
        learn(keys, protection, old)
        before = keys.choose(old).index[:, 0]
        learn(keys, protection, queries_of(1))
        changed[least] = int((keys.choose(old).index[:, 0] != before).sum())
    assert changed[0.97] > 2 * changed[ENERGY], changed


# -- finding, covering, storing -----------------------------------------------------------------------


def test_what_a_selector_trains_is_held_or_free() -> None:
    root = nn.ModuleDict({"shared": pool(), "own": pool(), "weights": Weights(WIDTH)})
    root["own"].private = True  # type: ignore[assignment]
    sites, loose, free = pet_sites(root, "exact")
    assert [(w.name, w.kind, w.set) for w in sites] == [("shared/choice", "choice", None)]
    assert loose == []
    assert {id(p) for p in free} == {id(p) for name in ("own", "weights") for p in root[name].parameters()}
    protection = Protection(sites, ProtectConfig(), free=free)
    optimizer = torch.optim.AdamW(root.parameters())
    protection.check_covers(optimizer, root)
    root["late"] = pool()
    optimizer.add_param_group({"params": list(root["late"].parameters())})
    with pytest.raises(UsageError, match="trains the selector 'late', and protection does not hold it"):
        protection.check_covers(optimizer, root)


def test_keys_of_members_that_rest_are_private() -> None:
    keys = pool()
    keys.rest(2)  # nobody holds them
    keys = pool()
    protected(keys)
    with pytest.raises(UsageError, match="has to set `private` before"):
        keys.rest(2)
    keys = pool()
    keys.private = True
    assert keys.sites() == []
    keys.rest(2)


def test_one_key_needs_no_queries_and_several_do() -> None:
    keys = Keys(WIDTH)
    keys.grow(1, generator("keys"))
    protection = protected(keys)
    (site,) = protection.consolidate([queries_of(0)], lambda _: None)["sites"]
    assert site["rank"] == 0
    keys = Keys(WIDTH)
    protection = protected(keys)
    keys.grow(2, generator("keys"))  # after protection was made
    with pytest.raises(Exception, match="the model/choice saw no data"):
        protection.consolidate([queries_of(0)], lambda _: None)
    protection.consolidate([queries_of(0).float()], keys.choose)
    keys.grow(3, generator("more"))
    with pytest.raises(UsageError, match="has shape"):
        protection.closed()


def test_what_is_known_of_keys_is_stored_with_their_number() -> None:
    keys = pool()
    protection = protected(keys, energy=1.0)
    learn(keys, protection, queries_of(0))
    learn(keys, protection, queries_of(1), 50)
    empty = Keys(WIDTH, top=2).double()
    other = protected(empty, energy=1.0)
    empty.set_extra_state(json.loads(json.dumps(keys.get_extra_state())))
    for name, memory in other.memory.items():
        memory.set_extra_state(json.loads(json.dumps(protection.memory[name].get_extra_state())))
    other.set_extra_state(protection.get_extra_state())
    with torch.no_grad():
        for mine, theirs in zip([*empty.state_dict(keep_vars=True).values()], keys.state_dict().values(), strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(theirs)
        for mine, theirs in zip(other.buffers(), protection.buffers(), strict=True):
            mine.copy_(theirs)
    assert other.certificate() == protection.certificate()
    assert other.certificate()["worst"] < 1e-12
    learn(keys, protection, queries_of(2), 20)
    learn(empty, other, queries_of(2), 20)
    assert torch.equal(keys.keys, empty.keys)


METHOD = """
import torch
import perpetune
from perpetune.fit import fit
from perpetune.methods.base import training
from perpetune.pets import copy_set, Choice, using
from perpetune.selectors import Selection


class Pool(perpetune.Method):
    def __init__(self, model, *, train: perpetune.FitConfig, select: Selection = Selection(name="keys")):
        super().__init__(model)
        self.config, self.select = train, select.make(model.backbone.dim)
        for member in range(3):
            copy_set(model, "default", f"m{member}")
        self.members = ("m0", "m1", "m2")
        self.trained = self.sometimes = self.members

    def queries(self, inputs):
        with torch.no_grad(), using(self.model, None):
            return self.model.features(inputs).float()

    def learn(self, task):
        self.model.grow(task)
        self.select.grow(3, task.generator("keys"))
        with training(self.model):
            fit(self.loss, [*self.groups(self.config), (self.select.trained(), 0.05)], task, self.config)

    def choice(self, chosen):
        return Choice(self.members, chosen.index)

    def loss(self, task, batch):
        queries = self.queries(batch.inputs)
        chosen = self.select.pick(queries)
        with using(self.model, self.choice(chosen)):
            return self.model.loss(task, batch) + self.select.loss(queries, chosen)

    def predict(self, inputs):
        with using(self.model, self.choice(self.select.choose(self.queries(inputs)))):
            return self.model.predict(inputs)

    def observe(self, inputs):
        with using(self.model, self.choice(self.select.choose(self.queries(inputs)))):
            self.model.observe(inputs)
"""


def test_a_method_with_keys_is_protected_and_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, monkeypatch, "pond", METHOD)
    checker = Checker(make_recipe({"method": "pond:Pool", "pet": "lora", "protect": {"energy": 1.0}}))
    method = checker.make()
    found: list[Any] = []
    old: Any = None
    for task in domains([0, 1]):
        found = learn_protected(method, task)
        if old is None:
            old = torch.stack([task.train.load(i, None) for i in range(len(task.train))])
            then = method.select.scores(method.queries(old))  # type: ignore[operator, union-attr]
    (keys,) = [site for site in found[-1]["sites"] if site["site"] == "select/choice"]
    assert keys["relative"] < 1e-5
    now = method.select.scores(method.queries(old))  # type: ignore[operator, union-attr]
    assert float((now - then).abs().max()) < 1e-5
    other = checker.make()
    restore(other, snapshot(method), "memory")
    assert snapshot(other) == snapshot(method)
    learn_protected(other, domains([0, 1, 2])[2])


def test_the_watched_module_is_named() -> None:
    sites, _, _ = pet_sites(nn.ModuleDict({"select": pool()}), "exact")
    assert isinstance(sites[0], Watched)
    assert sites[0].values().shape == (1, MEMBERS, WIDTH)

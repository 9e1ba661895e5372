"""Ways in which protection once went wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import perpetune
from perpetune.errors import PerpetuneError, UsageError
from perpetune.numerics.subspace import Subspace
from perpetune.protection.config import ProtectConfig
from perpetune.protection.protection import Protection, random_like
from perpetune.protection.sites import Watch, linear_sites
from perpetune.recipe import make_recipe
from perpetune.seeding import generator


class Pair(nn.Module):
    """A LoRA by hand: `x + B A x`, B zero."""

    def __init__(self) -> None:
        super().__init__()
        self.A, self.B = nn.Linear(8, 4, bias=False), nn.Linear(4, 8, bias=False)
        with torch.no_grad():
            self.A.weight.copy_(torch.randn(4, 8, generator=generator("A")))
            self.B.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.B(self.A(x))


def narrow(seed: int = 0) -> Tensor:
    """Features `(64, 8)` in three directions."""
    rng = generator("narrow", seed)
    return torch.randn(64, 3, generator=rng) @ torch.randn(3, 8, generator=rng)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_parameters_that_are_not_finite_are_refused(value: float) -> None:
    model = nn.Linear(4, 2)
    protection = perpetune.protect(model)
    batches = [torch.randn(16, 4, generator=generator("x"))]
    protection.consolidate(batches)
    before = {name: v.clone() for name, v in protection.state_dict().items() if isinstance(v, Tensor)}
    good = model.weight.detach().clone()
    with torch.no_grad():
        model.weight[0, 0] = value
    for call in (lambda: protection.consolidate(batches), protection.report):
        with pytest.raises(PerpetuneError, match=r"values of .* are not finite"):
            call()
    assert "not finite" in str(protection)
    with torch.no_grad():
        model.weight.copy_(good)
    after = protection.state_dict()
    assert all(torch.equal(after[name], v) for name, v in before.items())
    assert protection.report()["worst"] == 0


def test_processes_agree_on_what_is_idle() -> None:
    model = Pair()
    protection = Protection(linear_sites(model), ProtectConfig(energy=1.0))
    seen = Watch(protection.sites)
    with seen.on(), torch.no_grad():
        model(narrow())
    votes: list[Tensor] = []

    def own(tensor: Tensor) -> Tensor:
        votes.append(tensor)
        return tensor

    assert [w.name for w in protection._idle(seen, own)] == ["A/weight"]
    # a process without data of its own comes to the same, once what the other one saw is added to it
    nothing = Watch(protection.sites)
    assert [w.name for w in protection._idle(nothing, lambda t: t + votes[0])] == ["A/weight"]
    assert protection._idle(nothing, own) == []


def moved_by_reference(directions: str) -> float:
    """How much of a moved A still meets the reference data, relative to what it was."""
    model, data = Pair(), narrow()
    before = model.A(data).norm()
    perpetune.protect(model, energy=1.0, directions=directions).consolidate([data])
    return (model.A(data).norm() / before).item()


def test_the_random_control_moves_an_idle_site_at_random() -> None:
    assert moved_by_reference("features") < 1e-5
    assert moved_by_reference("random") > 0.1
    assert moved_by_reference("none") == 1


def test_a_soft_random_control_is_as_soft() -> None:
    subspace = Subspace(8, alpha=2.0)
    data = narrow().double()
    subspace.extend(data.mT @ data, 1.0)
    drawn = random_like(subspace, generator("drawn"))
    assert torch.equal(drawn.importance, subspace.importance)
    assert drawn.importance.min() < 0.99
    assert drawn.rank == subspace.rank


@pytest.mark.parametrize("value", ["inf", "nan", "-inf"])
@pytest.mark.parametrize("key", ["alpha", "energy", "energy_rise"])
def test_numbers_have_to_be_finite(key: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"protect.{key}"):
        make_recipe({"protect": {key: float(value)}})


def test_no_site_is_no_protection() -> None:
    with pytest.raises(UsageError, match=r"protect\.sites"):
        make_recipe({"protect": {"sites": []}})


def test_room_is_that_of_the_sites_that_are_protected() -> None:
    model = Pair()
    with torch.no_grad():
        model.B.weight.fill_(1)
    sites = linear_sites(model)
    protection = Protection(sites, ProtectConfig(energy=1.0))
    protection._chosen = lambda watched: watched.name == "A/weight"  # type: ignore[method-assign]
    found = protection.consolidate([narrow()], model)
    rooms = {s["site"]: s["room"] for s in found["sites"]}
    assert found["room"] == rooms["A/weight"] != rooms["B/weight"]


def test_energy_0_leaves_everything_free() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    protection = perpetune.protect(model, energy=0.0)
    protection.consolidate([torch.randn(16, 4, generator=generator("x"))])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    protection.guard(optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(16, 4, generator=generator("y"))).pow(2).sum().backward()
    optimizer.step()
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))

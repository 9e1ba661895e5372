"""Averages of pets over steps: what the average is, what it changes, and that it is stored and protected."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_protection_state import StopAt, differing, learned
from tiny import chiefly, every, paired, recipe, split_folder, vit_folder
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from perpetune.averages.average import OUTSIDE, Average, stronger
from perpetune.averages.config import AverageConfig
from perpetune.build import build_method
from perpetune.check import Checker, check_method, rules
from perpetune.check.texts import TinyTexts
from perpetune.errors import Interrupted, UsageError
from perpetune.export import export_learned
from perpetune.learner import Learner
from perpetune.learning import learn_protected
from perpetune.methods.base import Method
from perpetune.numerics.averaging import curvature_weight, published_weight, weight_that_keeps
from perpetune.pets import LoRA, parameters, pets, sets, using
from perpetune.pets.base import Place, inject
from perpetune.protection.config import ProtectConfig
from perpetune.protection.protection import Protection
from perpetune.protection.sites import pet_sites
from perpetune.recipe import make_recipe
from perpetune.report import write_report
from perpetune.report.blocks import Table, Text
from perpetune.report.results_schema import checked, facts_of
from perpetune.report.sections import averages, collect
from perpetune.results import read_results
from perpetune.seeding import generator
from perpetune.state import State
from perpetune.tasks import Inputs

TRAIN = {"epochs": 2, "batch_size": 8, "lr": 0.01}


def checker(average: dict[str, Any] | None, **changes: Any) -> Checker:
    return Checker(make_recipe({"average": average, "train": TRAIN, **changes}))


def values(method: Method) -> list[Tensor]:
    """Copies of what is trained: the pets, then the head."""
    named = [p for name in method.trained for p in parameters(method.model, name)]
    return [p.detach().clone() for p in [*named, *method.model.trained()]]


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def stages(average: dict[str, Any] | None, **changes: Any) -> list[list[Tensor]]:
    """What the pets and the head are after each task."""
    made = checker(average, **changes)
    method, found = made.make(), []
    for task in made.stream():
        learn_protected(method, task)
        found.append(values(method))
    return found


class Trail:
    """The values that training went through: those at the start of each phase, and after each of its steps."""

    def __init__(self, method: Method, monkeypatch: pytest.MonkeyPatch):
        self.phases: list[list[list[Tensor]]] = []
        self.gradients: list[list[list[Tensor]]] = []
        before = method.companions()
        monkeypatch.setattr(method, "companions", lambda: [*before, self.beside])
        self.pets = [p for name in method.trained for p in parameters(method.model, name)]

    @contextlib.contextmanager
    def beside(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        self.phases.append([self.now()])
        self.gradients.append([])

        def after(*_: Any) -> None:
            self.phases[-1].append(self.now())
            self.gradients[-1].append([p.grad.clone() for p in self.pets if p.grad is not None])

        hook = optimizer.register_step_post_hook(after)
        yield
        hook.remove()

    def now(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.pets]


def traced(average: dict[str, Any], monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[Method, Trail]:
    """A method in float64 that has learned the stream, and the values that training went through."""
    made = checker(average, **changes)
    method = made.make().double()
    path = Trail(method, monkeypatch)
    for task in made.stream():
        learn_protected(method, task)
    return method, path


# -- what the average is ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("restart", "protect"), paired([True, False], [{"energy": 0.9}, None]))
def test_weight_0_is_plain_training_in_every_bit(restart: bool, protect: dict[str, Any] | None) -> None:
    bare = stages(None, protect=protect)
    found = stages({"weight": 0, "restart": restart, "first": 1}, protect=protect)
    assert all(same(a, b) for a, b in zip(found, bare, strict=True))


def test_weight_1_stays_at_the_start() -> None:
    """The control: with weight 0 the pets do move."""
    made = checker({"weight": 1, "first": 1})
    start = made.make()
    count = len(parameters(start.model, "default"))
    for found in stages({"weight": 1, "first": 1}):
        assert same(found[:count], values(start)[:count])
    assert not same(stages({"weight": 0, "first": 1})[0][:count], values(start)[:count])
    first, second, third = stages({"weight": 1})  # the first task that is averaged is the second one
    assert same(first[:count], third[:count])
    assert same(first[:count], second[:count])


@pytest.mark.parametrize(
    "weight", every([{"weight": "dynamic"}, {"weight": 0.9}, {"keep": 0.5, "over": "end"}, {"keep": 0.5}], 2)
)
def test_an_average_that_nobody_asks_changes_nothing(weight: dict[str, Any]) -> None:
    bare, found = stages(None), stages({**weight, "restart": False, "answer": "online"})
    assert all(same(a, b) for a, b in zip(found, bare, strict=True))
    other = stages({**weight, "restart": True, "answer": "online"})
    assert same(other[0], bare[0])
    assert not same(other[2], bare[2])  # the control: with a restart the run is another one


def closed_form(points: list[list[Tensor]], weight: float, start: list[Tensor] | None = None) -> list[Tensor]:
    """`β^n θ_0 + (1 − β) Σ β^(n−i) θ_i`."""
    first, *rest = points
    n = len(rest)
    found = [weight**n * t for t in (start or first)]
    for i, point in enumerate(rest, 1):
        found = [f + (1 - weight) * weight ** (n - i) * p for f, p in zip(found, point, strict=True)]
    return found


def close(one: Sequence[Tensor], other: Sequence[Tensor], atol: float) -> bool:
    return all(torch.allclose(a, b, rtol=0, atol=atol) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("weight", [{"weight": 0.9}, {"keep": 0.3}])
def test_it_is_the_closed_form_of_the_path(weight: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    method, path = traced(weight, monkeypatch)
    points = path.phases[-1]
    n = len(points) - 1
    beta = weight.get("weight") or weight_that_keeps(0.3, n)
    now = [p.detach() for p in path.pets]
    assert close(now, closed_form(points, beta), 1e-12)
    assert not close(now, closed_form(points[1:], beta), 1e-6)  # the control: an average that starts a step late
    kept = method.facts()["average"]["kept"]
    assert kept == pytest.approx(beta**n, rel=1e-5)
    starts = [phase[0] for phase in path.phases]
    assert close(starts[2], closed_form(path.phases[1], beta), 1e-12)


def test_without_restart_training_goes_on_where_it_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    method, path = traced({"weight": 0.9, "restart": False}, monkeypatch)
    for before, after in zip(path.phases, path.phases[1:], strict=False):
        assert same(before[-1], after[0])
    second = closed_form(path.phases[1], 0.9)
    third = closed_form(path.phases[2], 0.9, start=second)
    assert close([p.detach() for p in path.pets], third, 1e-12)
    restarted = closed_form(path.phases[2], 0.9)  # the control: an average without restart is no restart
    assert not close([p.detach() for p in path.pets], restarted, 1e-6)
    assert method.average is not None
    assert not close(values(method)[: len(path.pets)], path.phases[2][-1], 1e-6)


@pytest.mark.parametrize("each", [3, 12, 30])
def test_keep_means_the_same_for_every_length(each: int) -> None:
    made = checker({"keep": 0.5, "first": 1})
    method, (task, *_) = made.make(), made.stream()
    task = type(task)(0, task.name, task.classes, made.kind.examples(task.classes, each, 0), runtime=task.runtime)
    learn_protected(method, task)
    facts = method.facts()["average"]
    assert facts["steps"] == 2 * math.ceil(2 * each / 8)
    assert facts["kept"] == pytest.approx(0.5, rel=1e-5)


def test_golden_numbers_of_keep() -> None:
    assert weight_that_keeps(0.5, 35) == pytest.approx(0.9803906, abs=1e-7)
    left = [weight**steps for weight, steps in ((0.99, 69), (0.999, 693))]
    assert left == pytest.approx([0.4998, 0.4999], abs=5e-5)


def test_over_end_interpolates_once(monkeypatch: pytest.MonkeyPatch) -> None:
    method, path = traced({"keep": 0.3, "over": "end"}, monkeypatch)
    first, *_, last = path.phases[-1]
    middle = [0.3 * a + 0.7 * b for a, b in zip(first, last, strict=True)]
    assert close([p.detach() for p in path.pets], middle, 1e-14)
    facts = method.facts()["average"]
    assert (facts["rule"], facts["kept"], facts["steps"]) == ("end", 0.3, 1)


@pytest.mark.parametrize("head", [True, False])
def test_the_head_is_averaged_if_wanted(head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With weight 1 the rows stay as they were drawn; the control moves them."""
    made = checker({"weight": 1, "head": head, "first": 1})
    method, (task, *_) = made.make(), made.stream()
    drawn = copy.deepcopy(method.model)
    drawn.grow(task)
    learn_protected(method, task)
    assert same(method.model.trained(), drawn.trained()) is head


# -- the weight that is computed in each step ---------------------------------------------------------------------


def of(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def sizes(g: Tensor, before: Tensor, now: Tensor, then: Tensor, old: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.abs().sum() for t in (g, g - before, now - then, now - old))


def test_golden_numbers_of_the_published_weight() -> None:
    then, now, old = of(1, 2, 3), of(1.1, 1.8, 3), of(-1, 4, 5)
    weight = published_weight(*sizes(of(0.5, -0.1, 0.3), of(0.2, -0.4, 0.1), now, then, old))
    assert float(weight) == pytest.approx(0.1130952, abs=1e-7)
    mean = weight * old + (1 - weight) * now
    assert torch.allclose(mean, of(0.8625, 2.0488095, 3.2261905), atol=1e-7, rtol=0)


def quadratic(scale: float = 1.0, units: float = 1.0) -> tuple[Tensor, ...]:
    """`½ h (θ − 2.5)²` with h 4 at θ 3, from a step that came from 2.9, and an average at .5."""
    h, theta, least, old, then = 4 * scale / units**2, 3 * units, 2.5 * units, 0.5 * units, 2.9 * units
    return sizes(of(h * (theta - least)), of(h * (then - least)), of(theta), of(then), of(old))


def test_the_published_weight_is_the_argmin_of_its_derivation_and_depends_on_scales() -> None:
    g, h, delta = 2.0, 4.0, 2.5
    grid = torch.linspace(0, 1, 1_000_001, dtype=torch.float64)
    argmin = float(grid[(-g * grid * delta + 0.5 * h * (grid * delta) ** 2 + (1 - grid) * delta).argmin()])
    assert argmin == pytest.approx(0.3, abs=1e-6)
    assert float(published_weight(*quadratic())) == pytest.approx(0.3, abs=1e-12)
    assert float(published_weight(*quadratic(10))) == pytest.approx(0.21, abs=1e-12)
    assert float(published_weight(*quadratic(0.1))) == pytest.approx(1.2, abs=1e-12)
    assert float(published_weight(*quadratic(units=10))) == pytest.approx(1.2, abs=1e-12)


def test_the_form_without_a_scale_is_the_argmin_with_a_squared_term() -> None:
    """`base` .2 is a squared term μ of 1 beside a curvature of 4."""
    g, h, delta, mu = 2.0, 4.0, 2.5, 1.0
    grid = torch.linspace(0, 1, 1_000_001, dtype=torch.float64)
    stay = 0.5 * mu * ((1 - grid) * delta) ** 2
    argmin = float(grid[(-g * grid * delta + 0.5 * h * (grid * delta) ** 2 + stay).argmin()])
    assert argmin == pytest.approx(0.36, abs=1e-6)
    for scaled in (quadratic(), quadratic(10), quadratic(0.1), quadratic(units=10)):
        assert float(curvature_weight(*scaled, base=0.2)) == pytest.approx(0.36, abs=1e-12)
    _, *rest = quadratic()
    assert float(curvature_weight(of(0).sum(), *rest, base=0.2)) == pytest.approx(0.2, abs=1e-12)


@pytest.mark.parametrize("rule", ["dynamic", "curvature"])
def test_it_follows_the_path_with_its_own_weights(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, path = traced({"weight": rule}, monkeypatch, train={**TRAIN, "epochs": 4})
    points, gradients = path.phases[-1], path.gradients[-1]
    inside, total, logs, found = 0, 0.0, [0.0] * len(points[0]), []
    for k, start in enumerate(points[0]):
        mean = start.clone()
        for i in range(1, len(points)):
            now, then, g = points[i][k], points[i - 1][k], gradients[i - 1][k]
            beta = 0.99
            if i > 1:
                asked = sizes(g, gradients[i - 2][k], now, then, mean)
                given = published_weight(*asked) if rule == "dynamic" else curvature_weight(*asked, base=0.99)
                if 0 < float(given) < 1:
                    beta, inside = float(given), inside + 1
            mean = beta * mean + (1 - beta) * now
            total += beta
            logs[k] += math.log(beta)
        found.append(mean)
    assert close([p.detach() for p in path.pets], found, 1e-7)  # the weights are kept in float32
    count = len(points[0]) * (len(points) - 1)
    facts = method.facts()["average"]
    assert facts["rule"] == rule
    assert facts["weight"] == pytest.approx(total / count, rel=1e-4)
    assert facts["in_range"] == pytest.approx(inside / count, rel=1e-4)
    assert facts["kept"] == pytest.approx(sum(map(math.exp, logs)) / len(logs), rel=1e-3, abs=1e-12)
    assert 0 < facts["in_range"] < 1


def scaled_loss(rule: str, factor: float, monkeypatch: pytest.MonkeyPatch) -> float:
    """The mean weight in a run by SGD whose loss is larger and whose learning rate is smaller, so it goes the same
    way."""
    train = {**TRAIN, "optimizer": "sgd", "momentum": 0.0, "lr": 0.05 / factor}
    made = checker({"weight": rule}, train=train)
    method = made.make().double()
    plain = method.model.loss
    monkeypatch.setattr(method.model, "loss", lambda task, batch: factor * plain(task, batch))
    for task in made.stream():
        learn_protected(method, task)
    return float(method.facts()["average"]["weight"])


def test_only_the_published_weight_depends_on_the_scale_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    assert scaled_loss("curvature", 10, monkeypatch) == pytest.approx(
        scaled_loss("curvature", 1, monkeypatch), rel=1e-5
    )
    published = [scaled_loss("dynamic", factor, monkeypatch) for factor in (1.0, 10.0)]
    assert abs(published[0] - published[1]) > 0.01


# -- an average by itself -----------------------------------------------------------------------------------------


class Layers(nn.Module):
    """Linear layers, one after the other, each with a LoRA of full rank."""

    def __init__(self, depth: int = 1, width: int = 8, dtype: torch.dtype = torch.float64):
        super().__init__()
        rng = generator("layers")
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            layer.weight = nn.Parameter(torch.randn(width, width, generator=rng) / width**0.5, requires_grad=False)
        places = [
            Place(f"layers.{i}", layer, ("fc1",), ((0, width),), i, width, width) for i, layer in enumerate(self.layers)
        ]
        for pet in inject(self, places, lambda place: LoRA(place, rng, rank=width, alpha=width)):
            with torch.no_grad():
                pet.up[0].normal_(generator=rng)
        self.to(dtype)
        for _, slot in [(n, m) for n, m in self.named_modules() if type(m).__name__ == "Slot"]:
            slot.activate("default")

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x

    def parts(self) -> list[nn.Parameter]:
        return parameters(self, "default")


def averaged(net: nn.Module, **options: Any) -> Average:
    average = Average(net, ["default"], AverageConfig.model_validate({"first": 1, **options}))
    average.begin(0)
    return average


def test_a_pet_in_bfloat16_has_an_average_in_float32() -> None:
    net = Layers(dtype=torch.bfloat16)
    for p in net.parts():
        p.data.fill_(1.0)
    average = averaged(net, weight=0.999, restart=False, answer="online")
    kept = [p.detach().clone() for p in net.parts()]
    optimizer = torch.optim.SGD(net.parts(), lr=0.0)
    with average.beside(optimizer):
        for p in net.parts():
            p.data.fill_(1.01)
        offset = float(net.parts()[0][0, 0].detach()) - 1
        for _ in range(1000):
            optimizer.step()
            for one, p in zip(kept, net.parts(), strict=True):
                one.lerp_(p.detach(), 0.001)
    wanted = 1 + offset * (1 - 0.999**1000)
    means = [t for name, t in average.named_buffers() if name.startswith("average")]
    assert {t.dtype for t in means} == {torch.float32}
    assert all(float((t - wanted).abs().max()) < 1e-6 for t in means)
    assert all(float((t.float() - wanted).abs().max()) > 1e-3 for t in kept)  # the control: kept in bfloat16


def test_an_average_in_float32_is_not_rounded_between_tasks() -> None:
    """LAE's average lives on; the pet that holds it is narrower."""
    net = Layers(dtype=torch.bfloat16)
    for p in net.parts():
        p.data.fill_(1.0)
    average = averaged(net, weight=0.999, restart=False)
    for index in range(4):
        average.begin(index)
        optimizer = torch.optim.SGD(net.parts(), lr=0.0)
        with average.beside(optimizer):
            for p in net.parts():
                p.data.fill_(2.0)
            for _ in range(2):
                optimizer.step()
    (one, *_) = [t for name, t in average.named_buffers() if name.startswith("average")]
    assert float((one - (2 - 0.999**8)).abs().max()) < 1e-6


def protected(unprotected_start: bool, depth: int) -> float:
    """How far outputs on three protected inputs are from what they were, under the average of projected steps."""
    net, rng = Layers(depth=depth), generator("inputs")
    old, new, target = (torch.randn(n, 8, generator=rng, dtype=torch.float64) for n in (3, 20, 20))
    sites, loose, free = pet_sites(net, "exact", ["default"], lambda _: False, ())
    protection = Protection(sites, ProtectConfig(energy=1.0), still=loose, free=free)
    with torch.no_grad():
        before = net(old)
    protection.consolidate([old], net)
    average = averaged(net, weight=0.9)
    for p in net.parts():
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(net.parts(), lr=0.01)
    with protection.guard(optimizer), average.beside(optimizer):
        if unprotected_start:
            for name, tensor in average.named_buffers():
                if name.startswith("average"):
                    tensor.add_(0.01)
        for _ in range(20):
            optimizer.zero_grad()
            (net(new) - target).square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            assert float((net(new) - target).norm()) > 0
    with torch.no_grad():
        return float((net(old) - before).norm() / before.norm())


@pytest.mark.parametrize("depth", [1, 3])
def test_averages_of_protected_points_are_protected(depth: int) -> None:
    assert protected(False, depth) < 1e-8
    assert protected(True, depth) > 1e-3  # the control: one point that is not protected


def test_a_step_that_the_scaler_skips_is_not_averaged() -> None:
    net, x = Layers(dtype=torch.float32), torch.ones(4, 8)
    average = averaged(net, weight="dynamic")
    for p in net.parts():
        p.requires_grad_(True)
    optimizer = torch.optim.SGD(net.parts(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    counts, moved = [], []
    with average.beside(optimizer):
        for step in range(4):
            before = {name: t.clone() for name, t in average.named_buffers()}
            optimizer.zero_grad()
            scaler.scale(net(x).square().mean() * (float("inf") if step == 2 else 1)).backward()
            scaler.step(optimizer)
            scaler.update()
            counts.append(average.steps)
            now = dict(average.named_buffers())
            moved.append(any(not torch.equal(now[name], t) for name, t in before.items()))
    assert counts == [1, 2, 2, 3]
    assert moved == [True, True, False, True]


def test_what_a_computed_weight_needs_is_told() -> None:
    net = Layers()
    average, optimizer = averaged(net, weight="dynamic"), torch.optim.SGD(net.parts(), lr=0.1)
    with (
        pytest.raises(UsageError, match=r"average.weight: dynamic needs the gradient of every"),
        average.beside(optimizer),
    ):
        optimizer.step()
    closed = averaged(net, weight="curvature")
    with pytest.raises(UsageError, match="this optimizer is given a closure"), closed.beside(optimizer):
        optimizer.step(lambda: 0.0)
    with (
        pytest.raises(UsageError, match=r"average.keep needs the number of steps"),
        averaged(net, keep=0.5).beside(optimizer),
    ):
        pass


class NoSync(TorchDispatchMode):
    """Fails where a value goes from the device to the program."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("weight", [0.9, "dynamic", "curvature"])
def test_a_step_does_not_wait_for_the_device(weight: float | str) -> None:
    net, x = Layers(dtype=torch.float32), torch.ones(4, 8)
    average = averaged(net, weight=weight)
    for p in net.parts():
        p.requires_grad_(True)
    optimizer = torch.optim.SGD(net.parts(), lr=0.1)
    with average.beside(optimizer):
        for _ in range(3):
            net(x).square().mean().backward()
            with NoSync():
                optimizer.step()
    with pytest.raises(AssertionError), NoSync():  # the control
        float(x.sum())


# -- answers ------------------------------------------------------------------------------------------------------


def test_golden_numbers_of_both() -> None:
    both = stronger(of(2, 1, 0)[None], of(0, 3, 0)[None]).exp()
    assert torch.allclose(both, of(0.6652410, 0.9094430, 0.0900306)[None], atol=1e-7, rtol=0)


@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize("answer", ["average", "online", "both"])
def test_the_answers_are_those_of_the_two_sets(answer: str, restart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made = checker({"weight": 0.9, "restart": restart, "answer": answer})
    method = made.make()
    path = Trail(method, monkeypatch)
    inputs = made.kind.asked("abcdef")
    for task in made.stream():
        learn_protected(method, task)
    found = method.answers(inputs)
    ways = {found.name: found.scores, **found.others}
    assert set(ways) == {"average", "online", "both"}
    assert found.name == answer
    torch.testing.assert_close(method.predict(inputs), found.scores, rtol=0, atol=0)
    online = copy.deepcopy(method)
    online.average = None
    with torch.no_grad():
        for p, value in zip(parameters(online.model, "default"), path.phases[-1][-1], strict=True):
            p.copy_(value)
    torch.testing.assert_close(ways["online"], online.predict(inputs), rtol=0, atol=0)
    assert not torch.equal(ways["online"], ways["average"])
    most = torch.maximum(ways["online"].softmax(-1), ways["average"].softmax(-1))
    torch.testing.assert_close(ways["both"].exp(), most, rtol=0, atol=1e-7)


def test_both_is_the_answer_where_the_sets_are_equal() -> None:
    made = checker({"weight": 0, "restart": False, "answer": "both"})
    method = made.learned()
    inputs = made.kind.asked("abcdef")
    found = method.answers(inputs)
    torch.testing.assert_close(found.scores.exp(), found.others["online"].softmax(-1), rtol=0, atol=1e-7)


def test_before_the_first_average_all_answers_are_equal() -> None:
    made = checker({"weight": 0.9, "answer": "both"})
    method, (task, *_) = made.make(), made.stream()
    learn_protected(method, task)
    found = method.answers(made.kind.asked("ab"))
    torch.testing.assert_close(found.others["average"], found.others["online"], rtol=0, atol=0)
    assert "average" not in method.facts()


def test_a_head_that_is_solved_fits_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sums are of features under the average; the other ways, which it does not fit, are not shown."""
    made = checker({"keep": 0.5, "restart": False}, head="ncm")
    method = made.make()
    seen: list[Tensor] = []
    plain = type(method.model.head).observe
    monkeypatch.setattr(
        type(method.model.head), "observe", lambda head, f, rows: (seen.append(f.clone()), plain(head, f, rows))[1]
    )
    for task in made.stream():
        seen.clear()
        learn_protected(method, task)
        (batch, *_) = task.batches(8)
        torch.testing.assert_close(seen[0], method.features(batch.inputs).float(), rtol=0, atol=0)
    assert method.answers(made.kind.asked("ab")).others == {}


def texts(average: dict[str, Any]) -> tuple[Checker, Method]:
    made = Checker(make_recipe({"average": average, "train": TRAIN, "head": "lm"}), TinyTexts())
    return made, made.learned()


def test_both_answers_texts_by_options_and_generates_with_the_average() -> None:
    made, method = texts({"weight": 0.9, "restart": False, "answer": "both"})
    asked = Inputs.of(made.kind.asked("ab"))
    found = method.answers(asked)
    assert (found.name, set(found.others)) == ("both", {"average", "online"})
    most = torch.maximum(found.others["online"].softmax(-1), found.others["average"].softmax(-1))
    torch.testing.assert_close(found.scores.exp(), most, rtol=0, atol=1e-6)
    free = Inputs(ids=asked.ids, mask=asked.mask)
    found = method.answers(free)
    with using(method.model, "default"):
        tokens = method.model.predict(free)
    assert not tokens.is_floating_point()
    assert torch.equal(found.scores, tokens)
    assert torch.equal(method.predict(free), tokens)
    assert (found.name, set(found.others)) == ("average", {"online"})


# -- stored -------------------------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "keep": {"keep": 0.5},
    "dynamic": {"weight": "dynamic", "head": True},
    "curvature": {"weight": "curvature", "restart": False},
    "lae": {"weight": 0.9, "restart": False, "answer": "both"},
    "end": {"keep": 0.5, "over": "end"},
    "online": {"weight": 0.9, "answer": "online"},
}


class World:
    def __init__(self, root: Path):
        self.vit, self.data = vit_folder(root / "vit"), split_folder(root / "data", "abcdef", 5, 2)

    def recipe(self, **changes: Any) -> dict[str, Any]:
        return recipe(self.vit, self.data, **{"run": {"device": "cpu", "checkpoint_every": 2}, **changes})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("way", [w if n < 2 else pytest.param(w, marks=pytest.mark.slow) for n, w in enumerate(WAYS)])
def test_stopped_at_any_step_it_ends_with_the_same_bits(way: str, world: World, tmp_path: Path) -> None:
    """Answers beside each other and facts too; with head_first the task has two phases."""
    first = {"method": {"name": "finetune", "head_first": 0.5}} if way == "lae" else {}
    content = world.recipe(average=WAYS[way], train={**TRAIN, "epochs": 4, "batch_size": 4}, **first)
    Learner(content, tmp_path / "whole").run()
    phase, last = ("train", 6) if first else ("train", 12)
    stops = ((1, 1), (1, 4), (2, 3), (2, last))
    for task, step in {"keep": stops[1::2], "dynamic": stops[::2]}.get(way, stops):
        state = tmp_path / f"stopped-{task}-{step}"
        learner = Learner(content, state, progress=StopAt(task, phase, step))
        with pytest.raises(Interrupted):
            learner.run()
        Learner.load(state).resume()
        assert differing(state, tmp_path / "whole") == []


def test_it_ends_with_the_same_bits_in_one_process_and_after_training(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same learner goes on; and a run that is killed after training, before its task is stored, shows the same
    answers."""
    content = world.recipe(average={"keep": 0.5})
    Learner(content, tmp_path / "whole").run()
    learner = Learner(content, tmp_path / "again", progress=StopAt(2, "train", 3))
    with pytest.raises(Interrupted):
        learner.run()
    learner.resume()
    assert differing(tmp_path / "again", tmp_path / "whole") == []

    learner = Learner(content, tmp_path / "killed")
    commit = State.commit

    def killed(state: State, index: int, *rest: Any) -> None:
        if index == 2:
            raise KeyboardInterrupt
        commit(state, index, *rest)

    monkeypatch.setattr(State, "commit", killed)
    with pytest.raises(KeyboardInterrupt):
        learner.run()
    monkeypatch.setattr(State, "commit", commit)
    Learner.load(tmp_path / "killed").resume()
    assert differing(tmp_path / "killed", tmp_path / "whole") == []


def test_a_restarted_average_takes_no_room_between_tasks(world: World, tmp_path: Path) -> None:
    sizes_of: dict[str, int] = {}
    for name, average in {"none": None, **WAYS}.items():
        if name == "curvature":  # it keeps more than an average
            continue
        learner = Learner(world.recipe(average=average), tmp_path / name)
        learner.run()
        found = learned(tmp_path / name, "method.safetensors", "pet.safetensors")
        sizes_of[name] = sum(len(content) for content in found.values())
        if average is not None and name in ("lae", "online"):
            assert any("average" in key or "online" in key for key in dict(learner.method.named_buffers()))
    assert sizes_of["keep"] == sizes_of["dynamic"] == sizes_of["end"] == sizes_of["none"]
    assert sizes_of["lae"] > sizes_of["none"]


def test_within_a_task_it_takes_one_copy_more_and_two_where_it_computes_weights() -> None:
    net = Layers(dtype=torch.float32)
    whole = sum(p.numel() for p in net.parts())
    for weight, copies in ((0.9, 1), ("dynamic", 2)):
        average = averaged(net, weight=weight)
        for p in net.parts():
            p.requires_grad_(True)
        optimizer = torch.optim.SGD(net.parts(), lr=0.1)
        with average.beside(optimizer):
            net(torch.ones(2, 8)).sum().backward()
            optimizer.step()
            held = sum(t.numel() for t in average.buffers())
        assert copies * whole <= held <= copies * whole + 16


def test_the_run_reports_what_it_averaged(world: World, tmp_path: Path) -> None:
    learner = Learner(world.recipe(average={"keep": 0.5}), tmp_path / "state")
    results = learner.run()
    told = facts_of(results, "average")
    assert [task for task, _, _ in told] == [1, 2]
    for _, _, facts in told:
        assert facts["kept"] == pytest.approx(0.5, rel=1e-4)
        assert 0 < facts["gap"] < 10
    cells = [cell for row in results["cells"] for cell in row if cell]
    assert {cell["way"] for cell in cells} == {"average"}
    assert all(set(cell["others"]) == {"online", "both"} for cell in cells)
    assert read_results(State(tmp_path / "state")) == results
    (found,) = [section for section in collect(checked(results)) if section.name == "averages"]
    (table,) = [block for block in found.blocks if isinstance(block, Table)]
    assert table.columns[1:] == ["steps", "mean weight", "kept, %", "gap, %"]
    assert [row[0] for row in table.rows] == ["2 c-d", "3 e-f"]
    assert {row[3] for row in table.rows} == {"50.0"}
    write_report(results, tmp_path / "report")
    assert "Averages of the pets" in (tmp_path / "report" / "report.md").read_text()


def test_the_report_says_what_the_weight_is_and_what_is_not_shown() -> None:
    facts = {"kind": "average", "rule": "dynamic", "steps": 9, "weight": 0.66, "in_range": 0.63, "kept": 1e-6}
    solved = {**facts, "compared": False, "solved": True, "gap": None}
    drawn = {"tasks": [{"name": "a"}, {"name": "b"}], "facts": [{"task": 1, "of": {"average": solved}}]}
    blocks = averages.section(drawn)  # type: ignore[arg-type]
    assert blocks is not None
    (text,) = [block.text for block in blocks if isinstance(block, Text)]
    for sentence in (averages.PUBLISHED, averages.RANGE, averages.SOLVED):
        assert sentence in text
    for sentence in (averages.END, averages.GAP, averages.ANSWERS):
        assert sentence not in text
    broken = {"tasks": [{"name": "a"}], "facts": [{"task": 0, "of": {"average": {"kind": "average", "kept": "x"}}}]}
    assert averages.section(broken) is not None  # type: ignore[arg-type]


def test_the_gap_of_factors_is_that_of_dense_products(monkeypatch: pytest.MonkeyPatch) -> None:
    method, path = traced({"keep": 0.3, "over": "end"}, monkeypatch)
    first, *_, last = path.phases[-1]

    def products(point: list[Tensor]) -> Tensor:
        with torch.no_grad():
            for p, value in zip(path.pets, point, strict=True):
                p.copy_(value)
        loras = [pet for pet in pets(method.model, "default") if isinstance(pet, LoRA)]
        return torch.cat([(b @ a).detach().flatten() for pet in loras for b, a in pet.factors()])

    mean = [p.detach().clone() for p in path.pets]
    averaged_, start, end = products(mean), products(first), products(last)
    gap = (averaged_ - 0.3 * start - 0.7 * end).norm() / (averaged_ - start).norm()
    assert method.facts()["average"]["gap"] == pytest.approx(float(gap), rel=1e-5)
    assert checker({"keep": 0.5}, pet="adapter").learned().facts()["average"]["gap"] is None


@pytest.mark.parametrize("restart", [True, False])
def test_what_is_exported_is_the_average(restart: bool, tmp_path: Path) -> None:
    made = checker({"keep": 0.5, "restart": restart})
    method = made.learned()
    export_learned(method, made.backbone, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    (lora, *_) = [pet for pet in pets(method.model, "default") if isinstance(pet, LoRA)]
    _, down = lora.whole()
    assert any(torch.equal(t, down.detach()) for t in stored.values())
    both = checker({"keep": 0.5, "answer": "both"})
    with pytest.raises(UsageError, match=r"average.answer: both answers with the average and the online pets"):
        export_learned(both.learned(), both.backbone, tmp_path / "both")


# -- with which methods, pets and options -------------------------------------------------------------------------

CONTRACT = [
    ("finetune", ("average.keep=0.5",)),
    ("finetune", ("average.weight=dynamic", "average.head=true")),
    ("finetune", ("average.weight=curvature", "average.restart=false", "pet=adapter")),
    ("finetune", ("average={weight: 0.9, restart: false, answer: both}",)),
    ("finetune", ("average={weight: 0.9, restart: false, answer: both}", "head_first=0.5")),
    ("finetune", ("average={keep: 0.5, over: end, restart: false}", "head=ncm")),
    ("finetune", ("average={keep: 0.5, answer: both}", "pet=prefix")),
    ("finetune", ("average={keep: 0.5, answer: online}", "pet.name=prompt", "pet.deep=false", "pet.at=[block]")),
    ("finetune", ("average={weight: dynamic, first: 1}", "pet=ssf")),
    ("finetune", ("average={keep: 0.5, head: true, first: 1}", "pet=none")),
    ("finetune", ("average.keep=0.5", "protect.renew=true", "head=ncm")),
    ("finetune", ("average.weight=0.9", "head.name=ridge", "head.projection=40", "protect=true")),
    ("finetune", ("average.keep=0.5", "pets.low={name: lora, blocks: [0]}", "pets.high={name: adapter}", "pet=none")),
    ("olora", ("average={keep: 0.5}",)),
    ("treelora", ("average={keep: 0.5}",)),
    ("treelora", ("average={weight: dynamic}", "protect=true", "start=last", "answer=last")),
    ("safe", ("average={keep: 0.5}", "head.name=ridge", "head.projection=40")),
]


def holds(method: str, changes: tuple[str, ...], on: str | None) -> None:
    faults = [f"{o.rule}: {o.fault}" for o in check_method(method, changes, on=on) if o.fault is not None]
    assert faults == []


@pytest.mark.parametrize(("method", "changes"), chiefly([CONTRACT[i] for i in (0, 3)], [CONTRACT[3]]))
def test_the_contract_holds_with_an_average(method: str, changes: tuple[str, ...]) -> None:
    holds(method, changes, None)


@pytest.mark.parametrize(("method", "changes"), chiefly([CONTRACT[i] for i in (1, 5, 11)], [CONTRACT[5], CONTRACT[11]]))
def test_the_contract_holds_with_an_average_on_pictures(method: str, changes: tuple[str, ...]) -> None:
    holds(method, changes, "pictures")


@pytest.mark.slow
@pytest.mark.parametrize(("method", "changes"), CONTRACT)
def test_the_contract_holds_in_every_option(method: str, changes: tuple[str, ...]) -> None:
    holds(method, changes, None)


def test_protection_is_tested_with_an_average_and_a_leak_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "RULES", (rules.protection_protects,))
    (tested,) = check_method("finetune", ["average.keep=0.5"], "pictures")
    assert tested.left_out == ""
    (leak,) = check_method("finetune", ["average={keep: 0.5, restart: false}"], "pictures")
    assert "average and online pets differ on the data of their task" in leak.left_out
    quiet = ["average={keep: 0.5, restart: false, answer: online}"]
    assert [o.left_out for o in check_method("finetune", quiet, "pictures")] == [""]


def moves(pet: LoRA) -> bool:
    """Whether it changes its layer."""
    up, down = pet.whole()
    return bool((up @ down).any())


@pytest.mark.parametrize("method", ["olora", "treelora"])
def test_methods_with_a_set_for_each_task_keep_the_average(method: str) -> None:
    """With weight 1 from the first task on, no adapter moves from where its task began."""
    made = Checker(make_recipe({"method": method, "average": {"weight": 1, "first": 1}, "train": TRAIN}))
    learned_ = made.learned()
    for name in sets(learned_.model):
        for pet in pets(learned_.model, name):
            assert isinstance(pet, LoRA)
            assert not moves(pet)  # B starts at zero
    free = Checker(make_recipe({"method": method, "train": TRAIN})).learned()
    assert any(moves(pet) for name in sets(free.model) for pet in pets(free.model, name) if isinstance(pet, LoRA))
    assert learned_.answers(made.kind.asked("ab")).scores.shape[1] == 6


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"average": {}}, "give one of keep and weight"),
        ({"average": {"keep": 0.5, "weight": 0.9}}, "give one of keep and weight"),
        ({"average": {"weight": 0.9, "over": "end"}}, "over: end interpolates once"),
        ({"average": {"keep": 0.5, "base": 0.5}}, "base belongs to weight: curvature"),
        ({"average": {"keep": 0.5, "head": True, "restart": False}}, "head: true averages the head inside a task"),
        ({"average": {"keep": 1.5}}, "average.keep"),
        ({"average": {"weight": "magic"}}, "average.weight"),
        ({"method": "frozen", "head": "ncm"}, "method: frozen trains no pet"),
        ({"method": "joint"}, "method: joint trains anew on all data"),
        ({"method": "first_session", "head": "ridge"}, "method: first_session trains its pets in the first task alone"),
        ({"method": {"name": "finetune", "merge": 0.5}}, "method: finetune mixes a free copy in with merge"),
        ({"pet": "none"}, "there is no pet, so nothing is averaged: name a pet, or set average.head: true"),
        ({"pet": "none", "head": "ncm"}, "there is no pet, so nothing is averaged: name a pet, or leave average out"),
        ({"method": "olora", "average": {"keep": 0.5, "restart": False}}, "chooses where each task starts"),
        ({"method": "treelora", "average": {"keep": 0.5, "answer": "both"}}, "chooses where each task starts"),
        (
            {"average": {"keep": 0.5, "restart": False}, "protect": {"renew": True}},
            "protect.renew starts new pets before each task",
        ),
        (
            {"average": {"keep": 0.5, "answer": "both"}, "head": "ncm"},
            "average.answer: both needs a head that is trained",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(content: dict[str, Any], message: str) -> None:
    def build() -> None:
        made = Checker(make_recipe({"average": {"keep": 0.5}, **content}))
        build_method(made.recipe, made.kind.backbone())

    with pytest.raises(UsageError) as error:
        build()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def accumulated(parts: int, weight: dict[str, Any]) -> list[Tensor]:
    train = {**TRAIN, "optimizer": "sgd", "accumulate": parts}
    return stages({**weight}, train=train)[-1]


@pytest.mark.parametrize("weight", [{"keep": 0.5}, {"weight": "dynamic"}])
def test_micro_batches_do_not_change_the_average(weight: dict[str, Any]) -> None:
    whole = accumulated(1, weight)
    for parts in (2, 4):
        assert close(accumulated(parts, weight), whole, 1e-6)


def test_no_average_is_the_default_and_can_be_asked_for() -> None:
    assert make_recipe({}).average is None
    assert make_recipe({"average": "none"}).average is None
    assert make_recipe({"average": False}).average is None
    assert OUTSIDE == 0.99

"""Projected steps: whatever the optimizer, no step leads into a protected subspace. Against a dense
reference in float64; and the controls that must fail to protect."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from perpetune.errors import UsageError
from perpetune.numerics.moments import Moments
from perpetune.numerics.projection import Operand, ProjectedStep
from perpetune.numerics.subspace import Subspace
from perpetune.seeding import generator

SEEDS = st.integers(0, 2**31)
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.03, "momentum": 0.9, "nesterov": True}),
    "momentum-decay": (torch.optim.SGD, {"lr": 0.03, "momentum": 0.9, "weight_decay": 1e-2}),
    "adam": (torch.optim.Adam, {"lr": 0.05}),
    "adam-l2": (torch.optim.Adam, {"lr": 0.05, "weight_decay": 1e-2, "amsgrad": True}),
    "adamw": (torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.1}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.02}),
}
LOOPS: list[dict[str, bool]] = [{"foreach": False}, {"foreach": True}, {"fused": True}]
VARIANTS = [
    pytest.param(kind, {**options, **loop}, id=f"{name}-{next(iter(loop))}-{next(iter(loop.values()))}")
    for name, (kind, options) in OPTIMIZERS.items()
    for loop in LOOPS
    if not (name == "rmsprop" and "fused" in loop)  # torch has none
]
PLAIN = [pytest.param(kind, options, id=name) for name, (kind, options) in OPTIMIZERS.items()]


def randn(source: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=source, dtype=torch.float64)


def span(rows: Tensor, energy: float = 1.0, alpha: float | None = None) -> Subspace:
    """The subspace of features `(n, m)`."""
    seen = Moments(rows.shape[1])
    seen.update(rows)
    subspace = Subspace(rows.shape[1], alpha)
    subspace.extend(seen.matrix, energy)
    return subspace


def random_subspace(source: torch.Generator, dim: int, rank: int, soft: bool = False) -> Subspace:
    subspace = Subspace(dim, 1.0 if soft else None)
    subspace.extend_random(rank, source)
    if soft:
        subspace.importance = torch.rand(subspace.rank, generator=source, dtype=torch.float64)
    return subspace


def dense(subspace: Subspace) -> Tensor:
    """`I − U Λ Uᵀ (m, m)`."""
    U = subspace.basis
    weight = torch.ones(subspace.rank, dtype=U.dtype) if subspace.alpha is None else subspace.importance
    return torch.eye(subspace.dim, dtype=U.dtype) - U @ torch.diag(weight) @ U.mT


def make(kind: type[torch.optim.Optimizer], parameters: Any, options: dict[str, Any]) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = kind(parameters, **options)
    return optimizer


@dataclass
class Toy:
    """A linear layer that has learned old data of less than full rank, and gets new data to fit."""

    layer: nn.Linear
    old: Tensor
    new: Tensor
    target: Tensor
    subspace: Subspace

    @property
    def operand(self) -> Operand:
        return Operand(self.layer.weight, self.layer.bias)

    def train(self, optimizer: torch.optim.Optimizer, steps: int, each: Callable[[], None] = lambda: None) -> float:
        """The change of the outputs on old data, relative to what they were."""
        before = self.layer(self.old).detach()
        for _ in range(steps):
            optimizer.zero_grad()
            (self.layer(self.new) - self.target).square().mean().backward()
            nn.utils.clip_grad_norm_(self.layer.parameters(), 1.0)
            optimizer.step()
            each()
        return float((self.layer(self.old).detach() - before).norm() / before.norm())


def toy(dtype: torch.dtype = torch.float64, energy: float = 1.0, dim: int = 12, rank: int = 4) -> Toy:
    source = generator("projection", "toy")
    layer = nn.utils.skip_init(nn.Linear, dim, 5, dtype=dtype)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(0.1 * randn(source, *p.shape))
    old = (randn(source, 30, rank) @ randn(source, rank, dim) / math.sqrt(rank)).to(dtype)
    new, target = randn(source, 40, dim).to(dtype), randn(source, 40, 5).to(dtype)
    ones = torch.ones(len(old), 1, dtype=dtype)
    return Toy(layer, old, new, target, span(torch.cat([old, ones], dim=1), energy))


def joined(layer: nn.Linear) -> Tensor:
    """`[W, b]`."""
    return torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach().clone()


# -- what an optimizer cannot do -------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("kind", "options"), VARIANTS)
def test_no_step_of_any_optimizer_leads_into_the_subspace(
    kind: type[torch.optim.Optimizer], options: dict[str, Any], dtype: torch.dtype, tolerance: float
) -> None:
    """With clipped gradients too."""
    it = toy(dtype)
    optimizer = make(kind, it.layer.parameters(), options)
    last, shares = joined(it.layer), []

    def look() -> None:
        nonlocal last
        step = (joined(it.layer) - last).double()
        shares.append(float((step @ it.subspace.basis).norm() / step.norm()))
        last = joined(it.layer)

    with ProjectedStep(optimizer, [(it.operand, [it.subspace])]):
        it.train(optimizer, 20, look)
    assert max(shares) <= tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize(("kind", "options"), PLAIN)
def test_outputs_on_old_data_stay_after_many_steps(
    kind: type[torch.optim.Optimizer], options: dict[str, Any], dtype: torch.dtype, tolerance: float
) -> None:
    """The new data are learned as far as the free directions allow."""
    it = toy(dtype)
    optimizer = make(kind, it.layer.parameters(), options)
    began = float((it.layer(it.new).detach() - it.target).square().mean())
    with ProjectedStep(optimizer, [(it.operand, [it.subspace])]):
        assert it.train(optimizer, 200) <= tolerance
    assert float((it.layer(it.new).detach() - it.target).square().mean()) < 0.9 * began


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_a_cut_basis_bounds_the_change(energy: float) -> None:
    """`‖X ΔWᵀ‖ ≤ √(1 − ε) ‖X‖ ‖ΔW‖₂` for the sum of all steps."""
    it = toy(energy=energy)
    optimizer = torch.optim.AdamW(it.layer.parameters(), lr=0.05, weight_decay=0.1)
    before = joined(it.layer)
    with ProjectedStep(optimizer, [(it.operand, [it.subspace])]):
        it.train(optimizer, 50)
    X = torch.cat([it.old, torch.ones(len(it.old), 1, dtype=torch.float64)], dim=1)
    step = joined(it.layer) - before
    change = float((X @ step.mT).norm())
    assert 0 < change <= math.sqrt(1 - energy) * float(X.norm() * torch.linalg.matrix_norm(step, 2)) + 1e-10


# -- controls: these do not protect ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param(*OPTIMIZERS["adam"], id="adam"),
        pytest.param(*OPTIMIZERS["adamw"], id="adamw"),
        pytest.param(*OPTIMIZERS["momentum-decay"], id="momentum-decay"),
    ],
)
def test_projected_gradients_protect_nothing_under_adam_or_decay(
    kind: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    """The control: with only the gradient projected, Adam changes old outputs by 5.6e-1 and weight decay by 1.9e-2."""
    it = toy()
    optimizer = make(kind, it.layer.parameters(), options)
    with ProjectedStep(optimizer, [(it.operand, [it.subspace])], project="gradient"):
        assert it.train(optimizer, 200) > 1e-2


@pytest.mark.parametrize("name", ["sgd", "momentum"])
def test_projected_gradients_protect_under_sgd_without_decay(name: str) -> None:
    """The same table: there the papers' variant is exact."""
    it = toy()
    optimizer = make(OPTIMIZERS[name][0], it.layer.parameters(), OPTIMIZERS[name][1])
    with ProjectedStep(optimizer, [(it.operand, [it.subspace])], project="gradient"):
        assert it.train(optimizer, 200) <= 1e-12


@pytest.mark.parametrize("project", ["step", "gradient"])
def test_a_random_subspace_of_equal_rank_protects_nothing(project: Literal["step", "gradient"]) -> None:
    """Control: it is the directions that matter, not that there are fewer of them."""
    it = toy()
    drawn = Subspace(it.subspace.dim)
    drawn.extend_random(it.subspace.rank, generator("control"))
    assert drawn.rank == it.subspace.rank
    optimizer = torch.optim.SGD(it.layer.parameters(), lr=0.1)
    with ProjectedStep(optimizer, [(it.operand, [drawn])], project=project):
        assert it.train(optimizer, 200) > 1e-2


def test_a_subspace_of_sums_protects_neither() -> None:
    """Control, D3: features `x` and `p` added where they had to be stacked."""
    it = toy()
    source = generator("sums")
    other = randn(source, *it.old.shape)[: it.subspace.rank]
    it.old = it.old[: len(other)]
    operand = Operand(it.layer.weight)
    it.layer.bias.requires_grad_(False)
    changes = {}
    start = it.layer.weight.detach().clone()
    for name, rows in (("sum", it.old + other), ("stack", torch.cat([it.old, other]))):
        with torch.no_grad():
            it.layer.weight.copy_(start)
        optimizer = torch.optim.Adam([it.layer.weight], lr=0.05)
        with ProjectedStep(optimizer, [(operand, [span(rows)])]):
            changes[name] = it.train(optimizer, 100)
    assert changes["sum"] > 1e-2
    assert changes["stack"] <= 1e-12


# -- the ends of the scale -------------------------------------------------------------------------------


@pytest.mark.parametrize("project", ["step", "gradient"])
@pytest.mark.parametrize(("kind", "options"), PLAIN)
def test_nothing_protected_changes_no_bit(
    kind: type[torch.optim.Optimizer], options: dict[str, Any], project: Literal["step", "gradient"]
) -> None:
    """A subspace of rank 0, as before the end of the first task or with energy 0."""
    bits = []
    for guarded in (False, True):
        it = toy(torch.float32)
        optimizer = make(kind, it.layer.parameters(), options)
        empty = span(torch.cat([it.old, torch.ones(len(it.old), 1)], dim=1), energy=0.0)
        assert empty.rank == 0
        guard = ProjectedStep(optimizer, [(it.operand, [empty])] if guarded else [], project=project)
        it.train(optimizer, 15)
        guard.remove()
        bits.append(joined(it.layer))
    assert torch.equal(*bits)


@pytest.mark.parametrize(("kind", "options"), PLAIN)
def test_no_room_freezes_to_the_bit(kind: type[torch.optim.Optimizer], options: dict[str, Any]) -> None:
    """Features of full rank with energy 1; weight decay included."""
    it = toy(torch.float32)
    optimizer = make(kind, it.layer.parameters(), options)
    full = span(randn(generator("full"), 30, 13))
    assert full.room == 0
    before = joined(it.layer)
    with ProjectedStep(optimizer, [(it.operand, [full])]):
        it.train(optimizer, 15)
    assert torch.equal(joined(it.layer), before)


def test_one_head_without_room_is_frozen_beside_others() -> None:
    source = generator("heads")
    weight = nn.Parameter(randn(source, 4, 9).float())
    subspaces = [random_subspace(source, 4, rank) for rank in (4, 1, 0)]
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    before = weight.detach().clone()
    with ProjectedStep(optimizer, [(Operand(weight, axis=0, heads=3), subspaces)]):
        for _ in range(5):
            weight.grad = randn(source, 4, 9).float()
            optimizer.step()
    heads = (weight.detach() - before).unflatten(1, (3, 3))
    assert not heads[:, 0].any()
    assert heads[:, 1].any()
    assert heads[:, 2].any()


def test_still_parameters_do_not_move() -> None:
    source = generator("still")
    free, frozen, foreign = (nn.Parameter(randn(source, 3)) for _ in range(3))
    optimizer = torch.optim.AdamW([free, frozen], lr=0.1, weight_decay=0.5)
    before = [p.detach().clone() for p in (free, frozen)]
    with ProjectedStep(optimizer, [], still=[frozen, foreign]):
        for p in (free, frozen):
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert not torch.equal(free, before[0])
    assert torch.equal(frozen, before[1])


@pytest.mark.parametrize("project", ["step", "gradient"])
def test_still_parameters_stay_whatever_moves_without_a_gradient(project: Literal["step", "gradient"]) -> None:
    """Decay moves a parameter whose gradient is zero, and momentum from before the guard does."""
    source = generator("still")
    frozen = nn.Parameter(randn(source, 3))
    optimizer = torch.optim.AdamW([frozen], lr=0.1, weight_decay=0.5)
    frozen.grad = torch.ones_like(frozen)
    optimizer.step()
    before = frozen.detach().clone()
    with ProjectedStep(optimizer, [], still=[frozen], project=project):
        for _ in range(3):
            optimizer.step()
    assert torch.equal(frozen, before)


# -- operands --------------------------------------------------------------------------------------------


@st.composite
def operands(draw: st.DrawFn) -> Operand:
    """Every kind: either axis, several heads, with a bias and without."""
    axis: Literal[0, 1] = draw(st.sampled_from([0, 1]))
    heads, rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    source = generator("operand", draw(SEEDS))
    weight = nn.Parameter(randn(source, rows, heads * columns))
    biased = draw(st.booleans()) and (axis == 0 or heads == 1)
    bias = nn.Parameter(randn(source, heads * columns if axis == 0 else rows)) if biased else None
    return Operand(weight, bias, axis=axis, heads=heads)


@given(operands())
def test_what_is_read_is_written_back_the_same(operand: Operand) -> None:
    tensors = [p.detach() for p in operand.parameters]
    matrix = operand.read(tensors)
    assert matrix.shape == operand.shape
    for tensor, back in zip(tensors, operand.split(matrix), strict=True):
        assert torch.equal(tensor, back)


@given(operands(), SEEDS)
def test_an_operand_is_what_its_vectors_multiply(operand: Operand, seed: int) -> None:
    """`W a + b` of each head for axis 1 and `a W + b` for axis 0, with a 1 appended to `a` where there is a bias."""
    heads, out, m = operand.shape
    width = m - (operand.bias is not None)
    a = randn(generator(seed), heads, width)
    weight = operand.weight.detach()
    bias = operand.bias.detach() if operand.bias is not None else torch.zeros(heads * out, dtype=weight.dtype)
    columns = weight.split(weight.shape[1] // heads, dim=1)
    if operand.axis == 1:
        expected = torch.stack([part @ a[h] for h, part in enumerate(columns)])
        expected = expected + (bias if operand.bias is not None else 0)
    else:
        heads_of = zip(a, columns, bias.split(out), strict=True)
        expected = torch.stack([vector @ part + b for vector, part, b in heads_of])
    if operand.bias is not None:
        a = torch.cat([a, torch.ones(heads, 1, dtype=a.dtype)], dim=1)
    got = (operand.read([p.detach() for p in operand.parameters]) @ a[:, :, None])[:, :, 0]
    assert torch.allclose(got, expected, rtol=0, atol=1e-12)


Protected = tuple[Operand, list[Subspace]]


@st.composite
def protected(draw: st.DrawFn) -> Protected:
    operand = draw(operands())
    heads, _, m = operand.shape
    source, soft = generator("protected", draw(SEEDS)), draw(st.booleans())
    return operand, [random_subspace(source, m, draw(st.integers(0, m)), soft) for _ in range(heads)]


def by_hand(members: list[Protected], changes: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
    """One operand at a time, one head at a time, by dense projectors."""
    changes = dict(changes)
    for operand, subspaces in members:
        if not all(p in changes for p in operand.parameters):
            continue
        matrix = operand.read([changes[p] for p in operand.parameters])
        matrix = torch.stack([one @ dense(s) for one, s in zip(matrix, subspaces, strict=True)])
        changes.update(zip(operand.parameters, operand.split(matrix), strict=True))
    return changes


@settings(max_examples=100)
@given(st.lists(protected(), min_size=1, max_size=5), st.integers(1, 3), SEEDS, st.sampled_from(["step", "gradient"]))
def test_many_operands_at_once_equal_one_at_a_time(
    members: list[Protected], copies: int, seed: int, project: Literal["step", "gradient"]
) -> None:
    """All shapes, ranks, forms and numbers of heads together; some parameters without a gradient."""
    source = generator(seed)
    for operand, subspaces in list(members):  # of the same shape, so that they are stacked
        for _ in range(copies - 1):
            like = [nn.Parameter(randn(source, *p.shape)) for p in operand.parameters]
            twin = Operand(like[0], like[1] if len(like) > 1 else None, axis=operand.axis, heads=operand.heads)
            members.append((twin, list(reversed(subspaces))))
    parameters = [p for operand, _ in members for p in operand.parameters]
    grads = {}
    for operand, _ in members:
        if bool(torch.rand((), generator=source) < 0.8):
            grads.update({p: randn(source, *p.shape) for p in operand.parameters})
    before = [p.detach().clone() for p in parameters]
    for p, grad in grads.items():
        p.grad = grad.clone()
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    with ProjectedStep(optimizer, members, project=project):
        optimizer.step()
    expected = by_hand(members, grads)
    for p, old in zip(parameters, before, strict=True):
        step = expected.get(p, torch.zeros_like(old))
        assert torch.allclose(old - p.detach(), step, rtol=0, atol=1e-12)
        if p not in grads:
            assert torch.equal(p, old)
        elif project == "gradient":
            assert p.grad is not None
            assert torch.allclose(p.grad, step, rtol=0, atol=1e-12)


@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 4), st.booleans(), SEEDS, st.booleans())
def test_parameters_that_are_met_from_both_sides(
    length: int, heads: int, width: int, square: bool, seed: int, first: bool
) -> None:
    """`(I − Q) Δ (I − P)`, as for a prompt (keys on one side, values on the other), in either order.

    The two operands of a square prompt are of one shape, and still no stack may hold both.
    """
    source = generator(seed)
    dim = heads * width
    length = dim if square else length
    prompt = nn.Parameter(randn(source, length, dim))
    right = (Operand(prompt), [random_subspace(source, dim, dim // 2)])
    left = (
        Operand(prompt, axis=0, heads=heads),
        [random_subspace(source, length, length // 2) for _ in range(heads)],
    )
    other = nn.Parameter(randn(source, length, dim))  # in the stack of the first stage, and not in the second
    members = [right, left] if first else [left, right]
    members.insert(1, (Operand(other), [random_subspace(source, dim, dim)]))
    before, grad = prompt.detach().clone(), randn(source, length, dim)
    prompt.grad, other.grad = grad.clone(), grad.clone()
    optimizer = torch.optim.SGD([prompt, other], lr=1.0)
    with ProjectedStep(optimizer, members):
        optimizer.step()
    step = before - prompt.detach()
    assert torch.allclose(step, by_hand(members, {prompt: grad, other: grad})[prompt], rtol=0, atol=1e-12)
    if heads == 1:  # one subspace on each side: the order does not matter, and both conditions hold
        assert torch.allclose(step, dense(left[1][0]) @ grad @ dense(right[1][0]), rtol=0, atol=1e-12)
        assert float((step @ right[1][0].basis).norm()) <= 1e-12
        assert float((left[1][0].basis.mT @ step).norm()) <= 1e-12


# -- as part of somebody's loop --------------------------------------------------------------------------


def test_one_optimizer_step_with_the_gradient_projected_by_hand() -> None:
    """`project="gradient"` is Adam fed with `G (I − UUᵀ)`, to the last bits."""
    results = []
    for automatic in (True, False):
        it = toy()
        P = dense(it.subspace)
        optimizer = torch.optim.Adam(it.layer.parameters(), lr=0.05)
        guard = ProjectedStep(optimizer, [(it.operand, [it.subspace])] if automatic else [], project="gradient")
        for _ in range(20):
            optimizer.zero_grad()
            (it.layer(it.new) - it.target).square().mean().backward()
            if not automatic:
                assert it.layer.weight.grad is not None
                assert it.layer.bias.grad is not None
                both = torch.cat([it.layer.weight.grad, it.layer.bias.grad[:, None]], dim=1) @ P
                it.layer.weight.grad, it.layer.bias.grad = both[:, :-1].contiguous(), both[:, -1].contiguous()
            optimizer.step()
        guard.remove()
        results.append(joined(it.layer))
    assert torch.allclose(*results, rtol=0, atol=1e-9)


def test_it_is_gone_once_removed() -> None:
    bits = []
    for guarded in (False, True):
        it = toy()
        optimizer = torch.optim.AdamW(it.layer.parameters(), lr=0.05)
        if guarded:
            guard = ProjectedStep(optimizer, [(it.operand, [it.subspace])])
            guard.remove()
            guard.remove()
        it.train(optimizer, 5)
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
        bits.append(joined(it.layer))
    assert torch.equal(*bits)


def test_leaving_by_an_error_removes_it_too() -> None:
    it = toy()
    optimizer = torch.optim.SGD(it.layer.parameters(), lr=0.1)
    with pytest.raises(ZeroDivisionError), ProjectedStep(optimizer, [(it.operand, [it.subspace])]):
        raise ZeroDivisionError
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("project", ["step", "gradient"])
def test_a_step_that_a_scaler_skips_leaves_everything_as_it_is(
    project: Literal["step", "gradient"], fused: bool
) -> None:
    """A fused optimizer's step is called, and skips itself."""
    it = toy(torch.float32)
    optimizer = torch.optim.AdamW(it.layer.parameters(), lr=0.05, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    with ProjectedStep(optimizer, [(it.operand, [it.subspace])], project=project):
        for broken in (True, False):
            before = joined(it.layer)
            optimizer.zero_grad()
            scaler.scale((it.layer(it.new) - it.target).square().mean()).backward()
            if broken:
                assert it.layer.weight.grad is not None
                it.layer.weight.grad[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
            step = (joined(it.layer) - before).double()
            assert torch.equal(joined(it.layer), before) == broken
            assert any(float(state["step"]) for state in optimizer.state.values()) != broken
            if project == "step":
                assert float((step @ it.subspace.basis).norm()) <= 1e-5


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param(torch.optim.LBFGS, {"lr": 0.5, "max_iter": 4}, id="lbfgs"),
        pytest.param(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, id="sgd"),
    ],
)
def test_closures_are_projected_too(kind: type[torch.optim.Optimizer], options: dict[str, Any]) -> None:
    """The gradients of a closure are made within the step, so it is only the step that can be projected."""
    it = toy()
    optimizer = make(kind, it.layer.parameters(), options)
    before = it.layer(it.old).detach()

    def closure() -> float:
        optimizer.zero_grad()
        loss = (it.layer(it.new) - it.target).square().mean()
        loss.backward()
        return float(loss.detach())

    losses = []
    with ProjectedStep(optimizer, [(it.operand, [it.subspace])]):
        for _ in range(10):
            losses.append(closure())
            optimizer.step(closure)
    assert float((it.layer(it.old).detach() - before).norm() / before.norm()) <= 1e-12
    assert losses[-1] < losses[0]


def test_a_step_that_fails_does_not_spoil_the_next() -> None:
    it = toy()
    optimizer = torch.optim.SGD(it.layer.parameters(), lr=0.1)

    def closure() -> float:
        raise ZeroDivisionError

    before = it.layer(it.old).detach()
    with ProjectedStep(optimizer, [(it.operand, [it.subspace])]):
        with pytest.raises(ZeroDivisionError):
            optimizer.step(closure)
        with torch.no_grad():
            it.layer.weight.mul_(2)  # somebody else's doing, not the optimizer's
            it.layer.bias.mul_(2)
        it.train(optimizer, 5)
    assert torch.allclose(it.layer(it.old), 2 * before, rtol=0, atol=1e-12)


def test_several_groups_and_parameters_of_others() -> None:
    """What stands in the optimizer unprotected moves freely; what is protected elsewhere is no concern of it."""
    it = toy()
    loose, elsewhere = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 3))
    groups = [{"params": [it.layer.weight]}, {"params": [it.layer.bias, loose], "lr": 0.5}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    loose.grad = torch.ones(3)
    members = [(it.operand, [it.subspace]), (Operand(elsewhere), [random_subspace(generator(0), 3, 2)])]
    before = it.layer(it.old).detach()
    with ProjectedStep(optimizer, members):
        (it.layer(it.new) - it.target).square().mean().backward()
        optimizer.step()
    assert torch.allclose(loose, torch.full((3,), 0.5))
    assert torch.equal(elsewhere, torch.ones(2, 3))
    assert float((it.layer(it.old).detach() - before).norm()) <= 1e-12


@pytest.mark.parametrize("project", ["step", "gradient"])
def test_parameters_added_later_are_projected_too(project: Literal["step", "gradient"]) -> None:
    it = toy()
    loose, still = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([loose], lr=0.1)
    loose.grad, still.grad = torch.ones(3), torch.ones(3)
    with ProjectedStep(optimizer, [(it.operand, [it.subspace])], still=[still], project=project):
        optimizer.step()
        optimizer.add_param_group({"params": [*it.layer.parameters(), still], "momentum": 0.9})
        before = joined(it.layer)
        assert it.train(optimizer, 5) <= 1e-12
    assert not torch.equal(joined(it.layer), before)
    assert torch.equal(still, torch.ones(3))
    assert not torch.equal(loose, torch.ones(3))


def test_a_weight_added_without_its_bias_stops_the_step() -> None:
    it = toy()
    loose = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([loose], lr=0.1)
    with ProjectedStep(optimizer, [(it.operand, [it.subspace])]):
        optimizer.add_param_group({"params": [it.layer.weight]})
        loose.grad = torch.ones(3)
        for _ in range(2):
            with pytest.raises(UsageError, match="has only one of a protected weight and its bias"):
                optimizer.step()
    assert torch.equal(loose, torch.ones(3))


def test_subspaces_that_do_not_fit() -> None:
    weight = nn.Parameter(torch.ones(4, 6))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for subspaces in ([Subspace(6)], [Subspace(3), Subspace(2)]):
        with pytest.raises(UsageError) as error:
            ProjectedStep(optimizer, [(Operand(weight, heads=2), subspaces)])
        dims = sorted({s.dim for s in subspaces})
        assert str(error.value) == f"{len(subspaces)} subspaces of width {dims} do not fit 2 heads of width 3"
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("there", ["weight", "bias"])
def test_a_weight_without_its_bias_is_not_left_unprotected(there: str) -> None:
    it = toy()
    optimizer = torch.optim.SGD([getattr(it.layer, there)], lr=0.1)
    with pytest.raises(UsageError) as error:
        ProjectedStep(optimizer, [(it.operand, [it.subspace])])
    assert str(error.value).startswith("the optimizer has only one of a protected weight and its bias: ")
    assert "\n" not in str(error.value)

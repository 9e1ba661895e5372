"""The forgetting certificate against the change measured on the old data themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from perpetune.numerics.drift import Drift
from perpetune.numerics.moments import Moments
from perpetune.numerics.projection import Operand, ProjectedStep
from perpetune.numerics.subspace import Subspace
from perpetune.seeding import generator

SEEDS = st.integers(0, 2**31)


def randn(source: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=source, dtype=torch.float64)


def moments(rows: Tensor) -> Tensor:
    """`(heads, m, m)` of rows `(heads, n, m)`."""
    seen = Moments(rows.shape[-1], groups=len(rows))
    seen.update(rows)
    return seen.matrix


@dataclass(frozen=True)
class Past:
    """Inputs `(heads, n, m)` of each task, the maps `(heads, out, m)` that learned them, and the map of today."""

    inputs: list[Tensor]
    maps: list[Tensor]
    now: Tensor

    def drift(self) -> Drift:
        drift = Drift(*self.now.shape)
        for rows, values in zip(self.inputs, self.maps, strict=True):
            drift.advance(values, moments(rows), rows.shape[1])
        return drift

    def measured(self) -> tuple[float, float]:
        """The root-mean-square change of the outputs on all of the data, absolute and relative."""
        changes = outputs = count = 0.0
        for rows, values in zip(self.inputs, self.maps, strict=True):
            before, after = rows @ values.mT, rows @ self.now.mT  # (heads, n, out)
            changes += float((after - before).square().sum())
            outputs += float(before.square().sum())
            count += rows.shape[1]
        return math.sqrt(changes / count), math.sqrt(changes / outputs)


@st.composite
def pasts(draw: st.DrawFn) -> Past:
    heads, out, dim = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 6))
    source = generator("drift", draw(SEEDS))
    values, inputs, maps = randn(source, heads, out, dim), [], []
    for _ in range(draw(st.integers(1, 5))):
        inputs.append(randn(source, heads, draw(st.integers(1, 12)), dim) + draw(st.sampled_from([0.0, 3.0])))
        maps.append(values)
        values = values + draw(st.sampled_from([1.0, 1e-3])) * randn(source, heads, out, dim)
    return Past(inputs, maps, values)


@settings(max_examples=100)
@given(pasts())
def test_it_is_the_change_measured_on_the_old_data(past: Past) -> None:
    absolute, relative = past.drift().measure(past.now)
    expected = past.measured()
    assert absolute == pytest.approx(expected[0], rel=1e-6)
    assert relative == pytest.approx(expected[1], rel=1e-6)


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 4), SEEDS)
def test_a_linear_layer_with_its_bias(out: int, dim: int, tasks: int, seed: int) -> None:
    """The bias is what an appended 1 meets; outputs are those of `nn.Linear` itself."""
    source = generator(seed)
    layer = nn.utils.skip_init(nn.Linear, dim, out, dtype=torch.float64)
    operand = Operand(layer.weight, layer.bias)
    drift, old = Drift(*operand.shape), []
    for _ in range(tasks + 1):
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(randn(source, *p.shape))
        if len(old) == tasks:
            break
        rows = randn(source, 7, dim)
        old.append((rows, layer(rows).detach()))
        extended = torch.cat([rows, torch.ones(7, 1, dtype=rows.dtype)], dim=1)
        drift.advance(operand.read(operand.parameters), moments(extended[None]), len(rows))
    changes = torch.cat([layer(rows).detach() - before for rows, before in old])
    outputs = torch.cat([before for _, before in old])
    absolute, relative = drift.measure(operand.read(operand.parameters))
    assert absolute == pytest.approx(float(changes.square().sum(1).mean().sqrt()), rel=1e-6)
    assert relative == pytest.approx(float(changes.norm() / outputs.norm()), rel=1e-6)


@given(pasts())
def test_maps_that_never_moved_changed_nothing_at_all(past: Past) -> None:
    still = Past(past.inputs, [past.now] * len(past.inputs), past.now)
    assert still.drift().measure(past.now) == (0.0, 0.0)


@given(pasts())
def test_measuring_is_no_learning(past: Past) -> None:
    drift = past.drift()
    first = drift.measure(past.now)
    drift.measure(2 * past.now)
    assert drift.measure(past.now) == first


@pytest.mark.parametrize("seed", range(10))
def test_coming_back_is_no_change(seed: int) -> None:
    """Rounding may leave the square below zero; that is none."""
    source = generator("back", seed)
    home = randn(source, 1, 4, 5)
    drift = Drift(1, 4, 5)
    drift.advance(home, moments(randn(source, 1, 20, 5)), 20)
    for _ in range(3):
        drift.advance(home + randn(source, 1, 4, 5), torch.zeros(1, 5, 5, dtype=torch.float64), 0)
    for change in drift.measure(home):
        assert change is not None
        assert 0 <= change <= 1e-6


def test_protected_training_is_seen_not_to_forget_and_free_training_to_forget() -> None:
    source = generator("certificate")
    layer = nn.utils.skip_init(nn.Linear, 10, 4, bias=False, dtype=torch.float64)
    operand = Operand(layer.weight)
    figures = {}
    for protected in (True, False):
        with torch.no_grad():
            layer.weight.copy_(randn(source, 4, 10))
        drift, subspace = Drift(*operand.shape), Subspace(10)
        for _ in range(3):
            optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05, weight_decay=0.1)
            rows, target = randn(source, 20, 2) @ randn(source, 2, 10), randn(source, 20, 4)
            with ProjectedStep(optimizer, [(operand, [subspace])] if protected else []):
                for _ in range(20):
                    optimizer.zero_grad()
                    (layer(rows) - target).square().mean().backward()
                    optimizer.step()
            figures[protected] = drift.measure(operand.read([layer.weight]))
            drift.advance(operand.read([layer.weight]), moments(rows[None]), len(rows))
            subspace.extend(moments(rows[None])[0], 1.0)
    assert figures[True][1] is not None
    assert figures[True][1] <= 1e-7  # the root of rounding, for it is squares that are carried
    assert figures[False][1] is not None
    assert figures[False][1] > 1e-2


def test_nothing_old_nothing_changed() -> None:
    assert Drift(2, 3, 4).measure(torch.ones(2, 3, 4)) == (0.0, None)


def test_outputs_of_zero_have_no_relative_change() -> None:
    """As those of a matrix that starts at zero (LoRA's B)."""
    drift = Drift(1, 2, 3)
    drift.advance(torch.zeros(1, 2, 3), torch.eye(3)[None], 3)
    assert drift.measure(torch.zeros(1, 2, 3)) == (0.0, None)
    absolute, relative = drift.measure(torch.ones(1, 2, 3))
    assert absolute == pytest.approx(math.sqrt(2))  # each of 3 unit vectors moves 2 outputs by 1
    assert relative is None


def test_memory_does_not_grow_with_the_tasks() -> None:
    def size(drift: Drift) -> int:
        return sum(value.numel() if isinstance(value, Tensor) else 1 for value in vars(drift).values())

    source = generator("flat")
    drift = Drift(2, 3, 4)
    sizes = {size(drift)}
    for _ in range(30):
        drift.advance(randn(source, 2, 3, 4), moments(randn(source, 2, 6, 4)), 6)
        sizes.add(size(drift))
    assert sizes == {2 * (4 * 5 // 2) + 2 * (2 * 3 * 4) + 4}


def test_parameters_are_taken_as_numbers() -> None:
    """No graph is kept, and what is kept does not change with the parameter."""
    weight = nn.Parameter(randn(generator("graph"), 1, 2, 3))
    drift = Drift(1, 2, 3)
    for _ in range(2):
        drift.advance(weight, torch.eye(3, dtype=torch.float64)[None], 3)
        with torch.no_grad():
            weight.add_(1)
    assert not drift.last.requires_grad
    assert not drift.cross.requires_grad
    # The first 3 unit vectors are off by 2 in 2 outputs, the next 3 by 1.
    assert drift.measure(weight)[0] == pytest.approx(math.sqrt((3 * 2 * 4 + 3 * 2 * 1) / 6))


def test_float32_maps_are_measured_in_float64() -> None:
    source = generator("float32")
    rows, values = randn(source, 1, 50, 4), randn(source, 1, 3, 4).float()
    now = values + 1e-4 * randn(source, 1, 3, 4).float()
    drift = Drift(1, 3, 4)
    drift.advance(values, moments(rows), 50)
    expected = float((rows @ (now.double() - values.double()).mT).norm()) / math.sqrt(50)
    assert drift.measure(now)[0] == pytest.approx(expected, rel=1e-6)

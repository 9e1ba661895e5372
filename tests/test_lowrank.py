"""Low-rank arithmetic against the matrices themselves, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perpetune.numerics import lowrank
from perpetune.numerics.lowrank import Factors, Merging, cosine, inner, merged
from perpetune.seeding import generator


def factors(seed: int, o: int, d: int, r: int) -> Factors:
    rng = generator("lowrank", seed)
    return (
        torch.randn(o, r, generator=rng, dtype=torch.float64),
        torch.randn(r, d, generator=rng, dtype=torch.float64),
    )


sizes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 99), sizes)
def test_inner_products_and_cosines_are_those_of_the_matrices(seed: int, size: tuple[int, int, int, int]) -> None:
    o, d, r, r2 = size
    left, right = factors(seed, o, d, r), factors(seed + 1000, o, d, r2)
    w, w2 = left[0] @ left[1], right[0] @ right[1]
    torch.testing.assert_close(inner(left, right), (w * w2).sum())
    torch.testing.assert_close(cosine(left, right), (w * w2).sum() / (w.norm() * w2.norm()))
    assert cosine(left, left) <= 1 + 1e-12


@pytest.mark.parametrize("least", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_cosine_with_nothing_is_zero_and_its_gradient_finite(least: float, dtype: torch.dtype) -> None:
    b, a = (t.to(dtype) for t in factors(0, 5, 4, 2))
    for left, right in ((torch.zeros_like(b), b), (b.clone(), torch.zeros_like(b)), (torch.zeros_like(b),) * 2):
        own = left.clone().requires_grad_()
        value = cosine((own, a), (right, a), least)
        value.backward()
        assert value == 0
        assert own.grad is not None
        assert bool(torch.isfinite(own.grad).all())


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 99), sizes, st.floats(1e-6, 10), st.floats(1e-6, 10))
def test_below_a_norm_it_shrinks_and_its_slope_is_bounded(
    seed: int, size: tuple[int, int, int, int], small: float, other: float
) -> None:
    o, d, r, r2 = size
    left, right = factors(seed, o, d, r), factors(seed + 1000, o, d, r2)
    w, w2 = left[0] @ left[1], right[0] @ right[1]
    left, right = (left[0] * small / w.norm(), left[1]), (right[0] * other / w2.norm(), right[1])
    plain = float((w * w2).sum() / (w.norm() * w2.norm()))
    wanted = plain * min(1.0, small / 0.5) * min(1.0, other / 0.5)
    up = left[0].clone().requires_grad_()
    value = cosine((up, left[1]), right, 0.5)
    assert float(value.detach()) == pytest.approx(wanted, rel=1e-6, abs=1e-12)
    value.backward()
    assert up.grad is not None
    assert float(up.grad.norm()) <= float(torch.linalg.matrix_norm(left[1], 2)) * 2 / 0.5


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 99), sizes, st.integers(1, 6))
def test_merged_is_the_best_of_its_rank(seed: int, size: tuple[int, int, int, int], rank: int) -> None:
    o, d, r, r2 = size
    parts, weights = [factors(seed, o, d, r), factors(seed + 1000, o, d, r2)], [3.0, 1.0]
    mean = (3 * parts[0][0] @ parts[0][1] + parts[1][0] @ parts[1][1]) / 4
    b, a = merged(parts, weights, rank)
    assert (b.shape, a.shape) == ((o, rank), (rank, d))
    u, values, v = torch.linalg.svd(mean, full_matrices=False)
    best = (u[:, :rank] * values[:rank]) @ v[:rank]  # Eckart and Young
    torch.testing.assert_close((mean - b @ a).norm(), (mean - best).norm(), atol=1e-10, rtol=1e-6)


@pytest.mark.parametrize("together", [1, 5, 128])
@pytest.mark.parametrize("size", [(7, 5, 2), (5, 9, 1), (4, 4, 3)])
def test_parts_that_come_one_by_one_have_the_mean_of_all(
    size: tuple[int, int, int], together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked after each part, and only at the end with the same bits; a matrix has fewer ranks than the parts."""
    monkeypatch.setattr(lowrank, "TOGETHER", together)
    o, d, r = size
    parts, weights = [factors(seed, o, d, r) for seed in range(12)], [1.0 + seed % 4 for seed in range(12)]
    one_by_one, at_the_end = Merging(), Merging()
    for count, (part, weight) in enumerate(zip(parts, weights, strict=True), 1):
        one_by_one.add(part, weight)
        at_the_end.add(part, weight)
        b, a = one_by_one.mean(2)
        wanted = merged(parts[:count], weights[:count], 2)
        torch.testing.assert_close(b @ a, wanted[0] @ wanted[1])
        if count * r < min(o, d):
            assert all(torch.equal(found, exact) for found, exact in zip((b, a), wanted, strict=True))
    for found, exact in zip(at_the_end.mean(2), one_by_one.mean(2), strict=True):
        assert torch.equal(found, exact)


def test_one_alone_stays_what_it_is() -> None:
    b, a = factors(3, 6, 5, 2)
    new_b, new_a = merged([(b, a)], [7.0], 2)
    torch.testing.assert_close(new_b @ new_a, b @ a)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 99), sizes, st.integers(1, 6))
def test_signs_of_merged_factors_are_not_left_to_rounding(
    seed: int, size: tuple[int, int, int, int], rank: int
) -> None:
    o, d, r, r2 = size
    (b, a), (b2, a2) = factors(seed, o, d, r), factors(seed + 1000, o, d, r2)
    new_b, new_a = merged([(b, a), (b2, a2)], [3.0, 1.0], rank)
    used = new_b[:, new_b.norm(dim=0) > 1e-6]
    assert bool((used.amax(0) == used.abs().amax(0)).all())
    other_b, other_a = merged([(-b2, -a2), (-b, -a)], [1.0, 3.0], rank)  # the same mean from other numbers
    torch.testing.assert_close(other_b, new_b, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(other_a, new_a, atol=1e-6, rtol=1e-6)

"""The mixture of two learners by the entropy of their scores."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from perpetune.numerics.mixing import entropy, mix
from perpetune.seeding import generator

SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 7))
SEEDS = st.integers(0, 2**31)
GAMMAS = st.sampled_from([0.0, 0.3, 1.0, 7.0, 100.0])
NONE = -math.inf


def scores(shape: tuple[int, int], seed: int, *, absent: bool = False) -> Tensor:
    """Scores `(B, C)`; with `absent` that of a class is −inf, as of one without examples."""
    rng = generator("mixing", seed)
    drawn = torch.randn(shape, generator=rng, dtype=torch.float64) * 4
    if absent and shape[1] > 1:
        drawn[:, int(torch.randint(shape[1], (1,), generator=rng))] = NONE
    return drawn


def pair(shape: tuple[int, int], seed: int, *, absent: bool) -> tuple[Tensor, Tensor]:
    """Two learners' scores of the same examples; a class without examples is absent for both."""
    first, second = scores(shape, seed, absent=absent), scores(shape, seed + 1)
    return first, second.masked_fill(first.isneginf(), NONE)


def test_golden_values() -> None:
    """Values computed by hand."""
    fast = torch.tensor([[2.0, 0, 0], [1, 1.2, 0]], dtype=torch.float64)
    slow = torch.tensor([[0.0, 1, 0], [3, 0, 0]], dtype=torch.float64)
    close = {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(entropy(fast), torch.tensor([0.6655727, 0.9991155]).double(), **close)
    torch.testing.assert_close(entropy(slow), torch.tensor([0.9753278, 0.3665940]).double(), **close)
    mixed, share = mix(fast, slow, 1.0)
    torch.testing.assert_close(share, torch.tensor([0.5768255, 0.3469390]).double(), **close)
    wanted = torch.tensor([[1.1536510, 0.4231745, 0], [2.3061220, 0.4163268, 0]]).double()
    torch.testing.assert_close(mixed, wanted, **close)
    mixed, share = mix(fast, slow, 100.0)
    torch.testing.assert_close(mixed, torch.stack([fast[0], slow[1]]), **close)
    torch.testing.assert_close(share, torch.tensor([1.0, 0.0]).double(), **close)


@given(SHAPES, SEEDS, GAMMAS, st.booleans())
def test_it_is_the_formula(shape: tuple[int, int], seed: int, gamma: float, absent: bool) -> None:
    """Written out by hand: softmax, its entropy, weights by entropy, scores mixed."""
    first, second = pair(shape, seed, absent=absent)
    mixed, share = mix(first, second, gamma)
    for row in range(shape[0]):
        hs = []
        for z in (first[row], second[row]):
            p = z[~z.isneginf()].exp() / z[~z.isneginf()].exp().sum()
            hs.append(-float((p * p.log()).sum()))
        alpha = 1 / (1 + math.exp(gamma * (hs[0] - hs[1])))
        assert float(share[row]) == pytest.approx(alpha, abs=1e-9)
        wanted = alpha * first[row] + (1 - alpha) * second[row]
        kept = ~first[row].isneginf()
        torch.testing.assert_close(mixed[row][kept], wanted[kept], rtol=1e-9, atol=1e-9)
    assert torch.equal(mixed.isneginf(), first.isneginf()), "no class without examples gets a score, and no other loses"


@given(SHAPES, SEEDS, GAMMAS, st.booleans())
def test_swapped_learners_swap_their_weights(shape: tuple[int, int], seed: int, gamma: float, absent: bool) -> None:
    first, second = pair(shape, seed, absent=absent)
    mixed, share = mix(first, second, gamma)
    other, rest = mix(second, first, gamma)
    torch.testing.assert_close(share + rest, torch.ones(shape[0]).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(mixed, other, rtol=0, atol=1e-6)


@given(SHAPES, SEEDS, GAMMAS, st.floats(-50, 50))
def test_a_constant_on_one_learner_leaves_the_weights(
    shape: tuple[int, int], seed: int, gamma: float, constant: float
) -> None:
    first, second = pair(shape, seed, absent=False)
    torch.testing.assert_close(mix(first + constant, second, gamma)[1], mix(first, second, gamma)[1], rtol=0, atol=1e-6)


@given(SHAPES, SEEDS, GAMMAS, st.booleans())
def test_equal_answers_pass_through(shape: tuple[int, int], seed: int, gamma: float, absent: bool) -> None:
    first = scores(shape, seed, absent=absent)
    mixed, share = mix(first, first, gamma)
    assert torch.equal(share, torch.full_like(share, 0.5))
    assert torch.equal(mixed, first)


@given(SHAPES, SEEDS, st.booleans())
def test_no_sharpness_is_the_plain_mean(shape: tuple[int, int], seed: int, absent: bool) -> None:
    first, second = pair(shape, seed, absent=absent)
    torch.testing.assert_close(mix(first, second, 0.0)[0], (first + second) / 2, rtol=0, atol=1e-6)


@given(SHAPES, SEEDS, st.booleans())
def test_great_sharpness_picks_the_surer_one(shape: tuple[int, int], seed: int, absent: bool) -> None:
    first, second = pair(shape, seed, absent=absent)
    mixed, _ = mix(first, second, 1e6)
    gap = entropy(first) - entropy(second)
    for row in range(shape[0]):
        if abs(float(gap[row])) > 1e-4:
            torch.testing.assert_close(mixed[row], (second if gap[row] > 0 else first)[row], rtol=0, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 1e6])
def test_scores_of_any_size_stay_finite(gamma: float) -> None:
    """A sure learner's entropy is 0, not nan; half a score of −inf is not nan either."""
    first = torch.tensor([[3e4, 0.0, NONE], [1e-8, 0.0, NONE]])
    second = torch.tensor([[0.0, 3e4, NONE], [-3e4, 3e4, NONE]])
    mixed, share = mix(first, second, gamma)
    assert torch.isfinite(share).all()
    assert torch.isfinite(mixed[:, :2]).all()
    assert mixed[:, 2].isneginf().all()


def test_a_class_that_only_one_learner_knows_is_never_taken() -> None:
    """Its score cannot be compared, so it comes last, unless the other learner has no say."""
    first, second = torch.tensor([[5.0, 1.0]]), torch.tensor([[NONE, 1.0]])
    mixed, _ = mix(first, second, 1.0)
    assert int(mixed.argmax()) == 1
    assert torch.isfinite(mixed).all()

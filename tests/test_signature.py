"""Signatures: sketches are linear and keep inner products on average, running means do not depend on micro-batches,
and the distance is a metric in [0, 1]."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from perpetune.errors import UsageError
from perpetune.numerics.signature import RunningMean, Sketch, distance, normalised, row_distances
from perpetune.seeding import generator

SEEDS = st.integers(0, 2**31)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator("signature", seed, *shape))


def inner_products(x: Tensor, y: Tensor, size: int, seeds: int) -> Tensor:
    """Those of sketches under many seeds, `(seeds,)`."""
    pairs = [Sketch(len(x), size, seed)(torch.stack([x, y])) for seed in range(seeds)]
    return torch.stack([pair[0] @ pair[1] for pair in pairs])


class TestSketch:
    @pytest.mark.parametrize("dim", [1, 16, 17, 18, 300, 1000])
    def test_is_the_sum_of_signed_numbers_by_bucket(self, dim: int) -> None:
        sketch, x = Sketch(dim, 16, seed=3), randn(0, dim)
        expected = [0.0] * 16
        for i in range(dim):
            expected[i % 17 if i % 17 < 16 else 0] += float(x[i]) * int(sketch.signs[i])
        torch.testing.assert_close(sketch(x), torch.tensor(expected))

    @given(SEEDS, st.integers(1, 600), st.floats(-10, 10), st.floats(-10, 10))
    def test_is_linear(self, seed: int, dim: int, a: float, b: float) -> None:
        sketch, (x, y) = Sketch(dim, 32, seed), randn(seed, 2, dim)
        torch.testing.assert_close(sketch(a * x + b * y), a * sketch(x) + b * sketch(y), rtol=1e-4, atol=1e-3)

    def test_keeps_inner_products_on_average(self) -> None:
        x, y = randn(1, 2, 600)
        y = y + 0.5 * x
        found = inner_products(x, y, 64, 2000)
        assert abs(float(found.mean() - x @ y)) < 4 * float(found.std()) / 2000**0.5

    def test_variance_is_that_of_drawn_buckets_for_the_columns_of_a_matrix(self) -> None:
        column = torch.zeros(200, 8)
        column[:, 3] = randn(2, 200)
        x = column.flatten()
        found = inner_products(x, x, 64, 1000)
        drawn = 2 * float(x @ x) ** 2 / 64
        assert 0.5 < float(found.var()) / drawn < 1.5

    def test_signs_of_a_constant_would_not_do(self) -> None:
        """The control: without signs, unrelated vectors are not orthogonal."""
        x, y = randn(3, 2, 600).abs()
        y[::2], x[1::2] = 0, 0
        unsigned = torch.nn.functional.pad(torch.stack([x, y]), (0, -600 % 65)).unflatten(-1, (-1, 65)).sum(-2)
        assert float(unsigned[0] @ unsigned[1]) > 10
        found = inner_products(x, y, 64, 500)
        assert abs(float(found.mean())) < 4 * float(found.std()) / 500**0.5

    def test_sketches_many_at_once_in_float32(self) -> None:
        sketch, rows = Sketch(100, 16, seed=1), randn(4, 3, 100)
        made = sketch(rows.bfloat16())
        assert made.shape == (3, 16)
        assert made.dtype == torch.float32
        for row, one in zip(rows, sketch(rows), strict=True):
            assert torch.equal(sketch(row), one)

    def test_signs_are_bytes_and_the_same_on_every_machine(self) -> None:
        signs = Sketch(12, 4, seed=5).signs
        assert signs.dtype == torch.int8
        assert signs.tolist() == [1, -1, 1, -1, -1, 1, -1, -1, -1, -1, -1, -1]
        assert torch.equal(signs, Sketch(12, 4, seed=5).signs)
        assert not torch.equal(Sketch(99, 4, seed=5).signs, Sketch(99, 4, seed=6).signs)

    def test_does_not_touch_the_input_or_its_graph(self) -> None:
        x = randn(5, 20).requires_grad_()
        before = x.detach().clone()
        assert not Sketch(20, 32)(x).requires_grad
        assert torch.equal(x, before)

    def test_refuses_other_lengths_and_sizes(self) -> None:
        with pytest.raises(UsageError, match="rows of 10 numbers"):
            Sketch(10, 4)(torch.zeros(11))
        with pytest.raises(UsageError, match="positive"):
            Sketch(10, 0)


class TestRunningMean:
    @given(SEEDS, st.lists(st.integers(1, 9), min_size=1, max_size=8), st.sampled_from([1e-6, 1.0, 1e6]))
    def test_micro_batches_are_one_batch(self, seed: int, sizes: list[int], offset: float) -> None:
        """Compared with float64 too."""
        examples = offset + randn(seed, sum(sizes), 3, 8).double()
        whole, parts = RunningMean((3, 8)), RunningMean((3, 8))
        whole.update(examples.mean(0), len(examples))
        for part in examples.split(sizes):
            parts.update(part.mean(0), len(part))
        assert parts.weight == whole.weight == len(examples)
        torch.testing.assert_close(parts.mean, examples.mean(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(parts.value, whole.value)
        assert parts.value.dtype == torch.float32

    def test_bfloat16_does_not_stall(self) -> None:
        """What the released code does (D4): its sums stop growing."""
        mean, row = RunningMean((1, 4)), torch.full((1, 4), 0.01, dtype=torch.bfloat16)
        for _ in range(5000):
            mean.update(row)
        torch.testing.assert_close(mean.value, row.float())

    def test_goes_on_from_its_state(self) -> None:
        one, rows = RunningMean((2, 4)), randn(7, 6, 2, 4)
        for i, row in enumerate(rows[:3]):
            one.update(row, i + 1)
        other = RunningMean((2, 4))
        other.load_state_dict(one.state_dict())
        for mean in (one, other):
            for row in rows[3:]:
                mean.update(row, 2.5)
        assert torch.equal(one.mean, other.mean)
        assert one.weight == other.weight

    def test_reset_forgets(self) -> None:
        mean = RunningMean((1, 1))
        mean.update(torch.ones(1, 1))
        mean.reset()
        assert float(mean.value) == mean.weight == 0

    def test_weight_zero_adds_nothing(self) -> None:
        mean = RunningMean((1, 1))
        mean.update(torch.full((1, 1), torch.nan), 0)
        assert float(mean.value) == mean.weight == 0

    def test_refuses_what_is_no_observation(self) -> None:
        mean = RunningMean((2, 4))
        with pytest.raises(UsageError, match=r"\(2, 4\)"):
            mean.update(torch.zeros(2, 5))
        for weight in (-1.0, float("nan"), float("inf")):
            with pytest.raises(UsageError, match="weight"):
                mean.update(torch.zeros(2, 4), weight)


class TestDistance:
    @given(SEEDS)
    def test_is_a_metric_from_0_to_1(self, seed: int) -> None:
        u, v, w = normalised(randn(seed, 3, 4, 8) * (randn(seed + 1, 3, 4, 8) > 0))
        assert float(distance(u, u)) == 0
        assert torch.equal(distance(u, v), distance(v, u))
        assert 0 <= float(distance(u, v)) <= 1
        assert float(distance(u, w)) <= float(distance(u, v)) + float(distance(v, w)) + 1e-6

    def test_is_the_mean_of_the_modules(self) -> None:
        u, v = normalised(randn(0, 2, 5, 8))
        expected = [
            sum(abs(float(a) - float(b)) for a, b in zip(p, q, strict=True)) / 2 for p, q in zip(u, v, strict=True)
        ]
        torch.testing.assert_close(row_distances(u, v), torch.tensor(expected))
        torch.testing.assert_close(distance(u, v), torch.tensor(expected).mean())

    def test_many_at_once(self) -> None:
        points = normalised(randn(1, 7, 5, 8))
        far = distance(points, points[2])
        assert far.shape == (7,)
        assert torch.equal(far, torch.stack([distance(point, points[2]) for point in points]))
        assert row_distances(points, points[2]).shape == (7, 5)

    def test_ends_of_the_range(self) -> None:
        u, v = torch.eye(2)[:1], torch.eye(2)[1:]
        assert float(distance(u, v)) == float(distance(u, -u)) == 1
        assert float(distance(u, torch.zeros(1, 2))) == 0.5

    @pytest.mark.parametrize("factor", [1e-42, 1e-30, 3.0, 1e30, 1e37])
    def test_a_factor_does_not_matter(self, factor: float) -> None:
        """Also if a norm would overflow or vanish."""
        rows = torch.tensor([[1.0, -2.0, 4.0, 0.0] * 20])
        torch.testing.assert_close(
            normalised(factor * rows), normalised(rows), rtol=1e-2 if factor < 1e-38 else 1e-6, atol=0
        )

    def test_rows_of_zeros_stay(self) -> None:
        made = normalised(torch.tensor([[0.0, 0.0], [1.0, -3.0]]))
        assert made.tolist() == [[0, 0], [0.25, -0.75]]

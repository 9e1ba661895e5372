"""Second moments, streamed, against one product over all rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from perpetune.errors import UsageError
from perpetune.numerics import moments as moments_module
from perpetune.numerics.moments import Moments, pack, unpack
from perpetune.seeding import generator

SEEDS = st.integers(0, 2**31)


def rows_of(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator("moments", seed), dtype=torch.float64).to(dtype)


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-12) -> bool:
    return float((got - expected).norm()) <= tolerance * float(expected.norm())


@given(
    seed=SEEDS,
    dim=st.integers(1, 9),
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_streaming_equals_one_product(seed: int, dim: int, sizes: list[int], dtype: torch.dtype) -> None:
    """Rows of any precision are converted exactly and summed in float64."""
    rows = rows_of(seed, sum(sizes), dim, dtype=dtype)
    seen = Moments(dim)
    for part in rows.split(sizes):
        seen.update(part)
    exact = rows.double()
    assert seen.count == sum(sizes)
    assert seen.matrix.dtype == torch.float64
    assert close(seen.matrix, exact.mT @ exact)


@given(seed=SEEDS, dim=st.integers(1, 7), groups=st.integers(1, 4), sizes=st.lists(st.integers(1, 9), max_size=4))
def test_groups_are_moments_of_their_own(seed: int, dim: int, groups: int, sizes: list[int]) -> None:
    rows = rows_of(seed, groups, sum(sizes), dim)
    together = Moments(dim, groups)
    apart = [Moments(dim) for _ in range(groups)]
    for part in rows.split(sizes, dim=1) if sizes else ():
        together.update(part)
        for one, own in zip(apart, part, strict=True):
            one.update(own)
    assert together.count == sum(sizes)
    assert close(together.matrix, torch.stack([one.matrix for one in apart]))


@given(seed=SEEDS, dim=st.integers(1, 8), count=st.integers(1, 30), cut=st.integers(0, 30), data=st.data())
def test_neither_order_nor_cut_matter(seed: int, dim: int, count: int, cut: int, data: st.DataObject) -> None:
    rows = rows_of(seed, count, dim)
    straight, shuffled = Moments(dim), Moments(dim)
    straight.update(rows)
    order = data.draw(st.permutations(range(count)))
    for part in rows[list(order)].tensor_split([min(cut, count)]):
        shuffled.update(part)
    assert close(shuffled.matrix, straight.matrix)
    assert shuffled.count == straight.count


@given(seed=SEEDS, dim=st.integers(1, 8), sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5))
def test_merging_equals_seeing_all(seed: int, dim: int, sizes: list[int]) -> None:
    rows = rows_of(seed, sum(sizes), dim)
    whole, merged = Moments(dim), Moments(dim)
    whole.update(rows)
    for part in rows.split(sizes):
        other = Moments(dim)
        other.update(part)
        merged.merge(other)
    assert merged.count == whole.count
    assert close(merged.matrix, whole.matrix)


def test_many_rows_are_converted_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments_module, "ROWS", 4)
    rows = rows_of(0, 2, 11, 3, dtype=torch.float32)
    seen = Moments(3, groups=2)
    seen.update(rows)
    assert seen.count == 11
    assert close(seen.matrix, rows.double().mT @ rows.double())


@pytest.mark.parametrize("dim", [256, 259])
def test_wide_rows_are_summed_in_stripes(dim: int) -> None:
    """Only half of a wide matrix is summed; the whole is there, also after a merge."""
    rows = rows_of(4, 40, dim)
    seen, other = Moments(dim), Moments(dim)
    seen.update(rows[:25])
    other.update(rows[25:])
    seen.merge(other)
    assert seen.count == 40
    assert close(seen.matrix, rows.mT @ rows)
    assert torch.equal(seen.matrix, seen.matrix.mT)


def test_a_large_offset_keeps_its_digits() -> None:
    """What float32 sums would lose: many rows around a mean far from zero. They are not centred either."""
    rows = (rows_of(1, 5000, 3) + 100).float()
    seen = Moments(3)
    seen.update(rows)
    assert close(seen.matrix, rows.double().mT @ rows.double())
    assert not close((rows.mT @ rows).double(), seen.matrix, 1e-9)
    assert float(seen.matrix[0, 1]) / seen.count == pytest.approx(100**2, rel=0.01)


def test_rows_of_a_graph_and_views_are_taken_as_numbers() -> None:
    wide = rows_of(2, 6, 8).requires_grad_()
    seen = Moments(4)
    seen.update(wide[:, ::2])
    assert not seen.sums.requires_grad
    assert close(seen.matrix, (wide[:, ::2].mT @ wide[:, ::2]).detach())


def test_the_matrix_is_exactly_symmetric_and_its_own() -> None:
    seen = Moments(5)
    seen.update(rows_of(3, 40, 5))
    matrix = seen.matrix
    assert torch.equal(matrix, matrix.mT)
    matrix.zero_()
    assert float(seen.matrix.trace()) > 0


def test_memory_is_that_of_the_matrix() -> None:
    seen = Moments(5)
    for seed in range(20):
        seen.update(rows_of(seed, 7, 5))
    assert seen.sums.shape == (5, 5)
    assert seen.count == 140


@pytest.mark.parametrize(
    ("groups", "shape", "expected"),
    [
        (None, (4,), "moments expect rows of shape (n, 3), got (4,)"),
        (None, (4, 2), "moments expect rows of shape (n, 3), got (4, 2)"),
        (None, (2, 4, 3), "moments expect rows of shape (n, 3), got (2, 4, 3)"),
        (2, (4, 3), "moments expect rows of shape (2, n, 3), got (4, 3)"),
        (2, (3, 4, 3), "moments expect rows of shape (2, n, 3), got (3, 4, 3)"),
    ],
)
def test_rows_of_another_shape(groups: int | None, shape: tuple[int, ...], expected: str) -> None:
    seen = Moments(3, groups)
    with pytest.raises(UsageError) as error:
        seen.update(torch.ones(shape))
    assert str(error.value) == expected
    assert seen.count == 0
    assert not seen.sums.any()


def test_moments_of_another_shape_do_not_merge() -> None:
    seen = Moments(3)
    with pytest.raises(UsageError) as error:
        seen.merge(Moments(4))
    assert str(error.value) == "moments (4, 4) cannot be merged into moments (3, 3)"
    with pytest.raises(UsageError, match=r"moments \(1, 3, 3\) cannot be merged into moments \(3, 3\)"):
        seen.merge(Moments(3, groups=1))
    assert seen.count == 0


@given(seed=SEEDS, dim=st.integers(1, 9), groups=st.integers(1, 3))
def test_packing_keeps_every_number(seed: int, dim: int, groups: int) -> None:
    half = rows_of(seed, groups, dim, dim)
    matrix = half + half.mT
    packed = pack(matrix)
    assert packed.shape == (groups, dim * (dim + 1) // 2)
    assert torch.equal(unpack(packed, dim), matrix)

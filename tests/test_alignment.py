"""How far a student's features are from a teacher's measured by the losses of SAFE."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from perpetune.numerics.alignment import correlation_losses, cosine_distance
from perpetune.seeding import generator

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 12))
SEEDS = st.integers(0, 2**31)
STUDENT = torch.tensor([[1.0, 2, 2], [3, 0, 4]], dtype=torch.float64)
TEACHER = torch.tensor([[2.0, 1, 2], [0, 3, 4]], dtype=torch.float64)


def rows(shape: tuple[int, int], *purpose: int | str) -> Tensor:
    return torch.randn(shape, generator=generator("alignment", *purpose), dtype=torch.float64)


def by_hand(student: Tensor, teacher: Tensor) -> tuple[float, float]:
    """The two sums over `C`, made in full."""
    c = sum(
        torch.outer(s / s.norm(), t / t.norm()) for s, t in zip(student, teacher, strict=True)
    ) / len(student)  # fmt: skip
    square, diagonal = (c**2).sum(), c.diagonal()
    return float(((diagonal - 1) ** 2).sum()), float(square - (diagonal**2).sum())


def test_golden_values() -> None:
    """Values computed by hand. SAFE's released code sums the cosine distance over the batch; here it is the mean."""
    diagonal, rest = correlation_losses(STUDENT, TEACHER)
    assert float(diagonal) == pytest.approx(1.7898074, abs=1e-6)
    assert float(rest) == pytest.approx(0.4501926, abs=1e-6)
    assert float(cosine_distance(STUDENT, TEACHER)) == pytest.approx(0.4711111 / 2, abs=1e-6)


@given(SHAPES, SEEDS)
def test_the_correlation_need_not_be_made(shape: tuple[int, int], seed: int) -> None:
    student, teacher = rows(shape, "s", seed), rows(shape, "t", seed)
    diagonal, rest = correlation_losses(student, teacher)
    assert (float(diagonal), float(rest)) == pytest.approx(by_hand(student, teacher), abs=1e-6)
    own = F.normalize(student, dim=-1) * F.normalize(teacher, dim=-1)
    wanted = shape[1] - 2 * own.sum(-1).mean() + own.mean(0).square().sum()
    assert float(diagonal) == pytest.approx(float(wanted), abs=1e-6)


@given(SHAPES, SEEDS, st.sampled_from(["random", "same", "opposite", "one hot"]))
def test_the_losses_stay_in_their_ranges(shape: tuple[int, int], seed: int, kind: str) -> None:
    student = rows(shape, "s", seed)
    if kind == "one hot":
        student = torch.zeros(shape, dtype=torch.float64)
        student[:, 0] = 1
    teacher = {"same": student, "opposite": -student}.get(kind, rows(shape, "t", seed))
    if kind == "one hot":
        teacher = -student
    diagonal, rest = correlation_losses(student, teacher)
    d = shape[1]
    assert d - 2 - 1e-9 <= float(diagonal) <= d + 3 + 1e-9
    assert -1e-9 <= float(rest) <= 1 + 1e-9


@given(SHAPES, SEEDS)
def test_length_and_order_of_samples_do_not_matter(shape: tuple[int, int], seed: int) -> None:
    student, teacher = rows(shape, "s", seed), rows(shape, "t", seed)
    lengths = rows(shape, "l", seed)[:, :1].abs() + 0.1
    order = torch.randperm(shape[0], generator=generator("order", seed))
    whole = [*correlation_losses(student, teacher), cosine_distance(student, teacher)]
    for s, t in ((student * lengths, teacher), (student, teacher * lengths), (student[order], teacher[order])):
        other = [*correlation_losses(s, t), cosine_distance(s, t)]
        torch.testing.assert_close(torch.stack(other), torch.stack(whole), rtol=0, atol=1e-6)


def test_gradients_are_those_of_differences() -> None:
    student, teacher = rows((4, 5), "s").requires_grad_(), rows((4, 5), "t")
    for number in (0, 1):
        assert torch.autograd.gradcheck(lambda s, i=number: correlation_losses(s, teacher)[i], (student,))
    assert torch.autograd.gradcheck(lambda s: cosine_distance(s, teacher), (student,))


@given(SHAPES, SEEDS, st.floats(0.01, 100))
def test_the_distance_is_zero_only_for_parallel_features(shape: tuple[int, int], seed: int, length: float) -> None:
    student = rows(shape, "s", seed)
    assert float(cosine_distance(student, length * student)) == pytest.approx(0, abs=1e-12)
    if shape[1] > 1:
        turned = student.clone()
        turned[-1] = turned[-1].roll(1) + 0.5
        one = torch.nn.functional.cosine_similarity(student[-1], turned[-1], dim=0)
        assert float(cosine_distance(student, turned)) == pytest.approx(float(1 - one) / shape[0], abs=1e-9)
    assert float(cosine_distance(student, -student)) == pytest.approx(2, abs=1e-12)


def test_they_are_exact_where_the_run_is_in_half_precision() -> None:
    """The sum of squares is a small difference of large numbers: bfloat16 would leave three digits of it."""
    student, teacher = rows((16, 8), "s").float(), rows((16, 8), "t").float()
    whole = torch.stack(correlation_losses(student, teacher))
    with torch.autocast("cpu", torch.bfloat16):
        half = torch.stack(correlation_losses(student, teacher))
    torch.testing.assert_close(half, whole, rtol=0, atol=1e-6)

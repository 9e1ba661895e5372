"""Streaming ridge regression against brute force in float64."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import chiefly, every, paired
from torch import Tensor

from perpetune.errors import PerpetuneError, UsageError
from perpetune.heads.base import alone
from perpetune.numerics import ridge
from perpetune.numerics.ridge import Dual, Fit, choose, primal
from perpetune.seeding import generator

SEEDS = st.integers(0, 2**31)
WIDTHS = st.sampled_from([1, 2, 7, 40, 256, 257, 300])
KAPPAS = [10.0**e for e in (-6, -4, -3, -2, -1, 0, 1, 2)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator("ridge test", seed), dtype=torch.float64)


def positive(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, generator=generator("ridge weights", seed), dtype=torch.float64) + 0.2


def labels(count: int, classes: int, seed: int = 0) -> Tensor:
    return torch.randint(0, classes, (count,), generator=generator("ridge labels", seed))


def hot(targets: Tensor, classes: int) -> Tensor:
    return torch.eye(classes, dtype=torch.float64)[targets]


def clusters(
    count: int, width: int, classes: int, *, dim: int = 32, spread: float = 1.0, seed: int = 0, part: str = "train"
) -> tuple[Tensor, Tensor]:
    """Gaussian classes through a random projection with ReLU: rows `(count, width)` and targets."""
    centres = normal(classes, dim, seed=seed + 1)
    targets = torch.randint(0, classes, (count,), generator=generator("clusters", part, seed))
    noise = torch.randn(count, dim, generator=generator("noise", part, seed), dtype=torch.float64)
    features = centres[targets] + spread * noise
    return (features @ normal(dim, width, seed=seed + 2)).relu(), targets


class Sums:
    """What a head keeps: G packed, Q, the number of rows and the sum of their weights."""

    def __init__(self, width: int, classes: int, standard: bool = False):
        self.width, self.classes, self.standardises = width, classes, standard
        self.packed = torch.zeros(ridge.packed_size(width + standard), dtype=torch.float64)
        self.cross = torch.zeros(width + standard, classes, dtype=torch.float64)
        self.count, self.energy = 0, 0.0

    def add(self, rows: Tensor, targets: Tensor, weights: Tensor | None = None) -> Sums:
        own = torch.ones(len(rows), dtype=torch.float64) if weights is None else weights
        if self.standardises:
            rows = torch.nn.functional.pad(rows, (0, 1), value=1.0)
        ridge.add_gram(self.packed, rows, weights)
        self.cross += rows.double().mT @ (own[:, None] * hot(targets, self.classes))
        self.count += len(rows)
        self.energy += float(own.sum())
        return self

    @property
    def standard(self) -> ridge.Standard | None:
        return ridge.Standard.of(self.packed, self.cross) if self.standardises else None

    @property
    def scale(self) -> float:
        standard = self.standard
        return ridge.trace(self.packed, self.width) / self.width if standard is None else standard.unit

    def fit(self, penalty: float, sample: ridge.Sample | None = None) -> Fit:
        return primal(self.packed, self.cross, self.count, self.energy, penalty, sample=sample, standard=self.standard)

    def seen(self, rows: Tensor) -> Tensor:
        """Rows as the weights of a fit meet them."""
        standard = self.standard
        return rows if standard is None else standard.rows(rows)


def in_two_passes(rows: Tensor, targets: Tensor, classes: int, weights: Tensor | None) -> ridge.Standard:
    """How rows are standardised, from the rows themselves."""
    own = torch.ones(len(rows), dtype=torch.float64) if weights is None else weights
    share = (own / own.sum())[:, None]
    mean = (share * rows).sum(0)
    deviation = (share * (rows - mean).square()).sum(0).sqrt()
    inverse = torch.where(deviation > 1e-9, 1 / deviation, 0.0)
    return ridge.Standard(mean, inverse, float(own.sum()), (share * hot(targets, classes)).sum(0))


def joint(
    rows: Tensor,
    targets: Tensor,
    classes: int,
    penalty: float,
    weights: Tensor | None = None,
    standard: ridge.Standard | None = None,
) -> Tensor:
    """`W` by a dense solve over all rows.

    With `standard` rows are standardised by it, and there is a last row: an intercept that is not penalised.
    """
    own = torch.ones(len(rows), dtype=torch.float64) if weights is None else weights
    ridged = torch.full((rows.shape[1],), penalty, dtype=torch.float64)
    if standard is not None:
        rows = with_one((rows - standard.mean) * standard.inverse)
        ridged = torch.cat([ridged, ridged.new_zeros(1)])
    gram = rows.mT @ (own[:, None] * rows) + ridged.diag()
    return torch.linalg.solve(gram, rows.mT @ (own[:, None] * hot(targets, classes)))


def with_one(rows: Tensor) -> Tensor:
    return torch.nn.functional.pad(rows, (0, 1), value=1.0)


def brute_error(
    rows: Tensor,
    targets: Tensor,
    classes: int,
    penalty: float,
    weights: Tensor | None = None,
    *,
    exact: bool = False,
    of: Tensor | None = None,
    standard: ridge.Standard | None = None,
) -> float:
    """What predictions for left-out rows (or those numbered `of`) miss at their best scale, from the hat matrix.

    With `standard` of targets without their mean, by standardised rows and an intercept that is not penalised.
    """
    own = torch.ones(len(rows), dtype=torch.float64) if weights is None else weights
    wanted, ridged = hot(targets, classes), torch.full((rows.shape[1],), penalty, dtype=torch.float64)
    if standard is not None:
        rows = with_one((rows - standard.mean) * standard.inverse)
        wanted = wanted - standard.target
        ridged = torch.cat([ridged, ridged.new_zeros(1)])
    turned = own.sqrt()[:, None] * rows
    hat = turned @ torch.linalg.solve(turned.mT @ turned + ridged.diag(), turned.mT)
    wanted = own.sqrt()[:, None] * wanted
    left = 1 - hat.diagonal()[:, None] if exact else 1 - float(hat.trace()) / len(rows)
    left_out = wanted - (wanted - hat @ wanted) / left
    if of is not None:
        wanted, left_out = wanted[of], left_out[of]
    best = float((wanted * left_out).sum() / left_out.square().sum())
    assert best > 0
    return float((wanted - best * left_out).square().sum() / wanted.square().sum())


def odds(share: float) -> float:
    return share / (1 - share)


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


# The packed matrix.


@given(seed=SEEDS, width=WIDTHS, sizes=st.lists(st.integers(0, 9), min_size=1, max_size=4), weighted=st.booleans())
@settings(max_examples=30, deadline=None)
def test_packed_sums_are_the_gram_matrix(seed: int, width: int, sizes: list[int], weighted: bool) -> None:
    """Symmetric, positive semi-definite, with the right trace, however the rows are cut into batches."""
    rows = normal(sum(sizes), width, seed=seed)
    weights = positive(len(rows), seed) if weighted else torch.ones(len(rows), dtype=torch.float64)
    packed = torch.zeros(ridge.packed_size(width), dtype=torch.float64)
    for part, own in zip(rows.split(sizes), weights.split(sizes), strict=True):
        ridge.add_gram(packed, part, own if weighted else None)
    expected = rows.mT @ (weights[:, None] * rows)
    gram = ridge.dense(packed, width)
    assert torch.equal(gram, gram.mT)
    torch.testing.assert_close(gram, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(ridge.diagonal(packed, width), gram.diagonal())
    assert ridge.trace(packed, width) == pytest.approx(float((weights[:, None] * rows.square()).sum()), rel=1e-10)
    values = torch.linalg.eigvalsh(gram)
    assert float(values.min()) >= -1e-10 * max(float(values.max()), 0.0)


def test_packed_is_half_a_matrix_in_contiguous_blocks() -> None:
    packed = torch.zeros(ridge.packed_size(1000), dtype=torch.float64)
    spans = list(ridge.block_rows(packed, 1000))
    assert [(start, stop) for start, stop, _ in spans] == [(0, 256), (256, 512), (512, 768), (768, 1000)]
    assert all(block.is_contiguous() and block.shape == (stop - start, stop) for start, stop, block in spans)
    spans[-1][2].fill_(1)
    assert float(packed.sum()) == 232 * 1000
    assert ridge.packed_size(4000) < 0.54 * 4000**2


def test_products_are_in_float64() -> None:
    """Float32 rows are converted before they are multiplied, so their rounded products cannot enter."""
    rows = normal(70, 30).float()
    packed = torch.zeros(ridge.packed_size(30), dtype=torch.float64)
    ridge.add_gram(packed, rows, None)
    assert error(ridge.dense(packed, 30), rows.double().mT @ rows.double()) < 1e-14


def test_many_rows_are_added_in_parts() -> None:
    rows = normal(3 * ridge.ROWS // 2, 5)
    weights = positive(len(rows))
    packed = torch.zeros(ridge.packed_size(5), dtype=torch.float64)
    ridge.add_gram(packed, rows, weights)
    assert error(ridge.dense(packed, 5), rows.mT @ (weights[:, None] * rows)) < 1e-13


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_add_nothing(bad: float) -> None:
    packed = torch.zeros(ridge.packed_size(4), dtype=torch.float64)
    rows = normal(6, 4)
    rows[3, 2] = bad
    with pytest.raises(UsageError, match="not finite"):
        ridge.add_gram(packed, rows, None)
    assert not packed.any()


def test_a_packed_matrix_of_another_width_is_refused() -> None:
    with pytest.raises(UsageError, match="a packed matrix of width 5 has 25 numbers, got"):
        ridge.add_gram(torch.zeros(16, dtype=torch.float64), normal(2, 5), None)


# The solution.


def test_golden_value() -> None:
    """Safe.md §5.2."""
    rows = torch.tensor([[1.0, 0], [1, 1], [0, 2]])
    targets = torch.tensor([0, 1, 1])
    expected = torch.tensor([[0.35294118, 0.17647059, 0], [-0.05882353, 0.47058824, 0]], dtype=torch.float64)
    for fit in (Sums(2, 3).add(rows, targets).fit(1.0), Dual(rows, targets, 3, None).fit(1.0)):
        torch.testing.assert_close(fit.weights, expected, rtol=0, atol=1e-8)
        assert not fit.weights[:, 2].any()


@given(seed=SEEDS, data=st.data(), standard=st.booleans())
@settings(max_examples=15, deadline=None)
def test_streamed_is_joint_in_any_order(seed: int, data: st.DataObject, standard: bool) -> None:
    """Ten tasks of two classes each, tasks and batches in any order, equal one solve over all rows."""
    rows, targets = clusters(300, 40, 20, dim=16, seed=seed)
    weights = positive(300, seed)
    batch = data.draw(st.sampled_from([1, 7, 64, 300]))
    sums = Sums(40, 20, standard)
    for task in data.draw(st.permutations(range(10))):
        chosen = (targets // 2 == task).nonzero()[:, 0]
        chosen = chosen[torch.randperm(len(chosen), generator=generator("order", seed, task))]
        for part in chosen.split(batch):
            sums.add(rows[part], targets[part], weights[part])
    penalty = 1e-3 * sums.scale
    exactly = in_two_passes(rows, targets, 20, weights) if standard else None
    wanted = joint(rows, targets, 20, penalty, weights, exactly)
    assert error(sums.fit(penalty).weights, wanted[:40]) < 1e-8
    if exactly is not None and sums.standard is not None:
        for name in ("mean", "inverse", "target"):
            assert error(getattr(sums.standard, name), getattr(exactly, name)) < 1e-10
        torch.testing.assert_close(wanted[40], exactly.target, rtol=1e-8, atol=1e-10)
    whole = Sums(40, 20, standard).add(rows, targets, weights)
    assert error(sums.packed, whole.packed) < 1e-10
    assert error(sums.cross, whole.cross) < 1e-10


def test_unseen_classes_have_no_weights() -> None:
    rows, targets = clusters(50, 30, 4)
    weights = Sums(30, 9).add(rows, targets).fit(1.0).weights
    assert weights[:, :4].any(dim=0).all()
    assert not weights[:, 4:].any()


@pytest.mark.parametrize("kappa", KAPPAS)
def test_residual_of_the_normal_equations(kappa: float) -> None:
    rows, targets = clusters(500, 300, 8)
    sums = Sums(300, 8).add(rows, targets)
    fit = sums.fit(kappa * sums.scale)
    left = ridge.dense(sums.packed, 300) @ fit.weights + fit.penalty * fit.weights - sums.cross
    assert float(left.norm() / sums.cross.norm()) < 1e-10


def test_limits_of_the_penalty() -> None:
    """Prototype sums for a large penalty, least squares for a small one."""
    rows, targets = normal(90, 12), labels(90, 3)
    sums = Sums(12, 3).add(rows, targets)
    assert error(sums.fit(1e9).weights * 1e9, sums.cross) < 1e-3
    assert error(sums.fit(1e-9).weights, torch.linalg.lstsq(rows, hot(targets, 3)).solution) < 1e-3


def test_factor_solves_and_measures_leverage() -> None:
    rows = normal(700, 60)
    packed = torch.zeros(ridge.packed_size(60), dtype=torch.float64)
    ridge.add_gram(packed, rows, None)
    made = ridge.factor(packed, 60, 2.0)
    inverse = torch.linalg.inv(rows.mT @ rows + 2 * torch.eye(60, dtype=torch.float64))
    right = normal(60, 3, seed=1)
    assert made.penalty == 2.0
    assert torch.equal(made.lower, made.lower.tril())
    assert error(made.solve(right), inverse @ right) < 1e-11
    assert error(made.leverage(rows.float()), ((rows @ inverse) * rows).sum(1)) < 1e-6
    assert error(made.leverage(rows), ((rows @ inverse) * rows).sum(1)) < 1e-11


# Escalation and bad input.


def test_escalation_of_an_indefinite_matrix() -> None:
    """With eigenvalues from −5 up, 10 is the first of 0.01, 0.1, 1, 10 that makes it positive definite."""
    turn = torch.linalg.qr(normal(30, 30)).Q
    matrix = turn @ torch.diag(torch.linspace(-5, 50, 30, dtype=torch.float64)) @ turn.mT
    packed = torch.zeros(ridge.packed_size(30), dtype=torch.float64)
    for start, stop, block in ridge.block_rows(packed, 30):
        block.copy_(matrix[start:stop, :stop])
    fitted = primal(packed, normal(30, 2), 1000, 1000.0, 0.01)
    assert fitted.factor is not None
    assert fitted.penalty == fitted.factor.penalty == pytest.approx(10)
    expected = matrix + 10 * torch.eye(30, dtype=torch.float64)
    assert error(fitted.factor.lower @ fitted.factor.lower.mT, expected) < 1e-12


def test_a_singular_matrix_is_factored() -> None:
    rows = torch.full((20, 50), 1e6, dtype=torch.float64)
    packed = torch.zeros(ridge.packed_size(50), dtype=torch.float64)
    ridge.add_gram(packed, rows, None)
    made = ridge.factor(packed, 50, 1e-6)  # far below rounding of 2e13
    assert made.penalty > 1e-6
    assert torch.isfinite(made.solve(normal(50, 2))).all()


@pytest.mark.parametrize("value", [math.nan, -1e20])
def test_no_penalty_helps(value: float) -> None:
    packed = torch.zeros(ridge.packed_size(6), dtype=torch.float64)
    packed[20] = packed[21] = value
    with pytest.raises(PerpetuneError, match=r"not positive definite with penalties from 1 to 1e\+12") as caught:
        ridge.factor(packed, 6, 1.0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("penalty", [0.0, -1.0, math.nan, math.inf])
def test_penalties_are_positive(penalty: float) -> None:
    rows, targets = clusters(9, 6, 2)
    with pytest.raises(UsageError, match="a positive number is expected"):
        Sums(6, 2).add(rows, targets).fit(penalty)
    with pytest.raises(UsageError, match="a positive number is expected"):
        Dual(rows, targets, 2, None).fit(penalty)
    with pytest.raises(UsageError, match="positive numbers are expected"):
        choose(Dual(rows, targets, 2, None).fit, 1.0, penalty)


def test_what_cannot_be_fitted_is_refused() -> None:
    rows, targets = clusters(9, 6, 2)
    with pytest.raises(UsageError, match="needs rows, got 0"):
        Sums(6, 2).fit(1.0)
    with pytest.raises(UsageError, match="finite rows, got 0"):
        Dual(rows[:0], targets[:0], 2, None)
    with pytest.raises(UsageError, match="not all finite"):
        Dual(rows / 0, targets, 2, None)
    with pytest.raises(UsageError, match="positive weights"):
        Dual(rows, targets, 2, torch.zeros(9))
    with pytest.raises(UsageError, match="targets from 0 to 1 for 1 classes"):
        Dual(rows, targets, 1, None)


# Dual, leave-one-out, the error of left-out rows.


@pytest.mark.parametrize("standard", [False, True], ids=["bare", "standardised"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("count", "width"), [(1, 20), (30, 80), (60, 60), (90, 40)])
def test_dual_is_primal(count: int, width: int, weighted: bool, standard: bool) -> None:
    """For every penalty of the grid."""
    rows, targets = clusters(count, width, 5, seed=count)
    weights = positive(count) if weighted else None
    if standard and count == 1:
        pytest.skip("one row has no deviation")
    sums = Sums(width, 5, standard).add(rows, targets, weights)
    dual, held_out = Dual(rows, targets, 5, weights, sums.standard), normal(15, width, seed=3)
    for kappa in KAPPAS:
        one, two = sums.fit(kappa * sums.scale), dual.fit(kappa * sums.scale)
        for asked in (sums.seen(rows), sums.seen(held_out)):
            torch.testing.assert_close(asked @ one.weights, asked @ two.weights, rtol=1e-8, atol=1e-8)
        assert one.freedom == pytest.approx(two.freedom, rel=1e-7) or two.freedom > 0.998 * count


@pytest.mark.parametrize("standard", [False, True], ids=["bare", "standardised"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("count", "width"), [(25, 40), (40, 40), (60, 20)])
def test_the_error_is_that_of_the_hat_matrix(count: int, width: int, weighted: bool, standard: bool) -> None:
    """Exact from rows, with the mean leverage from sums, and times the quotient of both on a sample with one."""
    rows, targets = clusters(count, width, 4, seed=5)
    weights = positive(count) if weighted else None
    sums = Sums(width, 4, standard).add(rows, targets, weights)
    dual, exactly = Dual(rows, targets, 4, weights, sums.standard), sums.standard
    some = torch.arange(0, count, 2)
    own = torch.ones(count, dtype=torch.float64) if weights is None else weights
    sample = ridge.Sample(rows[some], targets[some], own[some], alone)
    for kappa in (1e-3, 1e-2, 1e-1, 1.0):
        penalty = kappa * sums.scale
        exact = brute_error(rows, targets, 4, penalty, weights, exact=True, standard=exactly)
        rough = brute_error(rows, targets, 4, penalty, weights, standard=exactly)
        assert dual.fit(penalty).error == pytest.approx(exact, rel=1e-7)
        assert sums.fit(penalty).error == pytest.approx(rough, rel=1e-7)
        parts = [
            odds(brute_error(rows, targets, 4, penalty, weights, exact=e, of=some, standard=exactly))
            for e in (True, False)
        ]
        corrected = odds(rough) * parts[0] / parts[1]
        assert odds(sums.fit(penalty, sample).error) == pytest.approx(corrected, rel=1e-6)


@pytest.mark.parametrize("standard", [False, True], ids=["bare", "standardised"])
@pytest.mark.parametrize(
    ("make", "count", "width", "tolerance"),
    [
        ("primal", 80, 50, 1e-6),
        ("dual", 80, 50, 1e-6),
        ("sample", 80, 50, 1e-6),
        ("primal", 800, 600, 1e-6),
        ("primal", 80, 600, 0.04),
    ],
)
def test_slope_and_curvature_are_finite_differences(
    make: str, count: int, width: int, tolerance: float, standard: bool
) -> None:
    """Of estimated traces too: the probes are the same for every penalty.

    With few rows the traces in the slope alone are estimated. It is the difference of the slopes of log residuals and
    of 2 log ρ, both near 2 there; 2 % of the latter are allowed.
    """
    rows, targets = clusters(count, width, 4, seed=7)
    sums = Sums(width, 4, standard).add(rows, targets)
    sample = ridge.Sample(rows[::3], targets[::3], torch.ones(len(rows[::3]), dtype=torch.float64), alone)
    fit = {
        "dual": Dual(rows, targets, 4, None, sums.standard).fit,
        "primal": sums.fit,
        "sample": functools.partial(sums.fit, sample=sample),
    }[make]
    for kappa in (1e-2, 1e-1, 1.0):
        step = 1e-4
        below, at, above = (fit(kappa * sums.scale * math.exp(x)) for x in (-step, 0, step))
        slope = (math.log(odds(above.error)) - math.log(odds(below.error))) / (2 * step)
        curvature = (above.slope - below.slope) / (2 * step)
        assert at.slope == pytest.approx(slope, rel=0, abs=tolerance)
        assert at.curvature == pytest.approx(curvature, rel=0, abs=tolerance)


@pytest.mark.parametrize("standard", [False, True], ids=["bare", "standardised"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("count", "width"), [(18, 30), (30, 12)])
def test_leave_one_out_is_refitting(count: int, width: int, weighted: bool, standard: bool) -> None:
    """Both shortcuts equal one refit per row, with fixed mean and scale of the columns."""
    rows, targets = clusters(count, width, 3, seed=11)
    weights = positive(count) if weighted else None
    sums = Sums(width, 3, standard).add(rows, targets, weights)
    exactly = sums.standard
    dual = Dual(rows, targets, 3, weights, exactly)
    for kappa in (1e-3, 1e-1, 10.0):
        penalty = kappa * sums.scale
        expected = torch.empty(count, 3, dtype=torch.float64)
        for i in range(count):
            rest = torch.arange(count) != i
            own = None if weights is None else weights[rest]
            asked = rows[i] if exactly is None else with_one(exactly.rows(rows[i : i + 1]))[0]
            expected[i] = asked @ joint(rows[rest], targets[rest], 3, penalty, own, exactly)
        fit = sums.fit(penalty)
        assert fit.factor is not None
        short = ridge.leave_one_out(fit.factor, fit.weights, rows, targets, weights, exactly)
        torch.testing.assert_close(short, expected, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(dual.leave_one_out(penalty), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("count", "tolerance", "standard"),
    chiefly(
        [(c, t, s) for c, t in ((500, 1e-6), (1500, 1e-6), (2000, 0.02)) for s in (False, True)],
        [(500, 1e-6, False), (1500, 1e-6, True), (2000, 0.02, True)],
    ),
)
def test_traces_are_estimated_within_two_percent(count: int, tolerance: float, standard: bool) -> None:
    """Hutchinson, M = 1500; where rows are few or near M, the degrees of freedom are exact."""
    rows, targets = clusters(count, 1500, 10)
    sums = Sums(1500, 10, standard).add(rows, targets)
    for kappa in (1e-3, 1e-1):
        fit = sums.fit(kappa * sums.scale)
        assert fit.factor is not None
        freedom = standard + 1500 - fit.penalty * float(torch.cholesky_inverse(fit.factor.lower).trace())
        assert fit.freedom == pytest.approx(freedom, rel=tolerance)
        assert fit.error == pytest.approx(
            brute_error(rows, targets, 10, fit.penalty, standard=sums.standard), rel=tolerance
        )


@pytest.mark.parametrize("width", [1, 256, 300, 700])
def test_exact_trace_of_the_inverse(width: int) -> None:
    rows, _ = clusters(200, width, 5)
    packed = torch.zeros(ridge.packed_size(width), dtype=torch.float64)
    ridge.add_gram(packed, rows, None)
    made = ridge.factor(packed, width, 3.0)
    assert made.inverse_trace() == pytest.approx(float(torch.cholesky_inverse(made.lower).trace()), rel=1e-12)


# The choice of the penalty.

PROBLEMS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "n << M": lambda: clusters(40, 400, 5, spread=1.0),
    "n = M": lambda: clusters(300, 300, 10, spread=1.5, seed=1),
    "n >> M": lambda: clusters(800, 50, 10, spread=1.5, seed=2),
    "noise": lambda: (normal(200, 80, seed=4), labels(200, 5)),
    "clean": lambda: clusters(300, 100, 5, spread=0.05, seed=3),
}


@functools.lru_cache(maxsize=1)
def problem(name: str, standard: bool) -> tuple[Tensor, Tensor, Sums, list[tuple[Callable[[float], Fit], float]]]:
    """Rows, targets, their sums, and two ways to fit with the best error of each on a grid."""
    rows, targets = PROBLEMS[name]()
    classes = int(targets.max()) + 1
    sums = Sums(rows.shape[1], classes, standard).add(rows, targets)
    dual = Dual(rows, targets, classes, None, sums.standard)
    grid = [sums.scale * 10 ** (-9 + 11 * i / 16) for i in range(17)]
    fits: list[Callable[[float], Fit]] = [sums.fit, dual.fit]
    return rows, targets, sums, [(fit, min(fit(penalty).error for penalty in grid)) for fit in fits]


@pytest.mark.parametrize(("start", "standard"), paired([None, 1e-8, 50.0], [True, False]))
@pytest.mark.parametrize("name", PROBLEMS)
def test_choose_is_near_the_best_of_a_grid(name: str, standard: bool, start: float | None) -> None:
    """Within 1 % of the best error of 17 penalties, from the usual start and from either end."""
    rows, targets, sums, fits = problem(name, standard)
    classes, exactly = sums.classes, sums.standard
    for fit, best in fits:
        chosen, evaluations = choose(fit, sums.scale, None if start is None else start * sums.scale)
        assert chosen.error <= 1.01 * best
        assert evaluations <= ridge.EVALUATIONS + 1
        wanted = joint(rows, targets, classes, chosen.penalty, None, exactly)[: rows.shape[1]]
        assert error(chosen.weights, wanted) < 1e-5


def test_a_stream_pays_one_factorisation() -> None:
    """From the last penalty the next task's fit is accepted as it is, most times."""
    rows, targets = clusters(1200, 150, 10, spread=1.5)
    sums = Sums(150, 10)
    penalty: float | None = None
    paid = []
    for part in range(6):
        sums.add(rows[part * 200 : part * 200 + 200], targets[part * 200 : part * 200 + 200])
        chosen, evaluations = choose(sums.fit, sums.scale, penalty)
        penalty = chosen.penalty
        paid.append(evaluations)
    assert sorted(paid[1:])[2] == 1
    assert max(paid[1:]) <= 3


def curve(value: Callable[[float], float], slope: Callable[[float], float]) -> Callable[[float], Fit]:
    """Fits of made-up log odds over `log λ`, without curvature."""

    def fit(penalty: float) -> Fit:
        at = math.log(penalty)
        return Fit(torch.zeros(1, 1), penalty, 1 / (1 + math.exp(-value(at))), slope(at), 0.0, 0.0)

    return fit


@pytest.mark.parametrize("centre", [-12.0, -3.0, 2.0])
def test_choose_brackets_where_curvature_is_no_help(centre: float) -> None:
    chosen, evaluations = choose(curve(lambda x: abs(x - centre), lambda x: math.copysign(1, x - centre)), 1.0, None)
    assert abs(math.log(chosen.penalty) - centre) < 1.2
    assert evaluations <= ridge.EVALUATIONS + 1


def test_a_wrong_slope_is_found_out() -> None:
    """At the start of a plateau the estimated slope may have the wrong sign; values have not."""
    fit = curve(lambda x: max(abs(x), 1.0) + 0.01 * x, lambda x: 1.0 if x > 0 else 0.05 if x < -5 else -1.0)
    chosen, _ = choose(fit, 1.0, 1e-3)
    assert abs(math.log(chosen.penalty)) < 1.2


@functools.lru_cache(maxsize=1)
def few_rows(
    count: int, width: int, dim: int, classes: int, noise: float, seed: int, standard: bool
) -> tuple[Tensor, Tensor, Sums, Dual, float]:
    """Rows, targets, their sums, the rows' own solver, and the best error it has on a grid of penalties."""
    drawn = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=drawn)
    targets = torch.randint(0, classes, (count,), generator=drawn)
    features = centres[targets] + noise * torch.randn(count, dim, generator=drawn)
    projection = torch.randn(dim, width, generator=torch.Generator().manual_seed(5))
    rows = (features @ projection / math.sqrt(dim)).relu().double()
    sums = Sums(width, classes, standard).add(rows, targets)
    dual = Dual(rows, targets, classes, None, sums.standard)
    return rows, targets, sums, dual, min(dual.fit(sums.scale * 10 ** (-6 + i / 5)).error for i in range(41))


@pytest.mark.parametrize("start", every([None, 1e-3, 1e-6], 3))
@pytest.mark.parametrize(("given", "standard"), paired(
    [
        (120, 600, 32, 10, 1.5, 2), (204, 600, 32, 10, 1.5, 2), (300, 600, 128, 20, 3.0, 2),
        (360, 600, 128, 20, 3.0, 2), (200, 1000, 16, 40, 0.5, 1), (340, 1000, 32, 10, 1.5, 1),
        (400, 1000, 32, 10, 1.5, 2), (500, 1000, 128, 20, 3.0, 1), (800, 1000, 16, 40, 0.5, 1),
    ],
    [False, True],
))  # fmt: skip
def test_sums_of_few_rows_find_the_penalty_that_the_rows_find(
    given: tuple[int, int, int, int, float, int], standard: bool, start: float | None
) -> None:
    """Between a third of M and M rows the search from sums has noisy slopes; it once stayed where it started."""
    rows, targets, sums, dual, grid = few_rows(*given, standard)
    sample = ridge.Sample(rows[::2], targets[::2], torch.ones(len(rows[::2]), dtype=torch.float64), alone)
    fit = functools.partial(sums.fit, sample=sample)
    chosen, _ = choose(fit, sums.scale, None if start is None else start * sums.scale)
    assert odds(dual.fit(chosen.penalty).error) < 1.05 * odds(grid)


@pytest.mark.parametrize("standard", [False, True], ids=["bare", "standardised"])
@pytest.mark.parametrize(("count", "width", "repeats", "noise"), [(250, 300, 25, 0.0), (250, 300, 20, 0.1)])
def test_rows_that_are_there_twice_do_not_mislead(
    count: int, width: int, repeats: int, noise: float, standard: bool
) -> None:
    """Their leverage is a half, so the mean one says that all rows are free, and nothing seems to be missed."""
    made, names = clusters(count - repeats, 32, 10, spread=1.5)
    again = made[:repeats] + noise * normal(repeats, 32, seed=9)
    features, targets = torch.cat([made, again]), torch.cat([names, names[:repeats]])
    projection = normal(32, width, seed=5)
    rows = (features @ projection).relu()
    asked, answers = clusters(2000, 32, 10, spread=1.5, part="test")
    sums = Sums(width, 10, standard).add(rows, targets)
    held_out, offset = sums.seen((asked @ projection).relu()), 0.0 if sums.standard is None else sums.standard.target
    dual = Dual(rows, targets, 10, None, sums.standard)

    def accuracy(weights: Tensor, rows: Tensor, targets: Tensor) -> float:
        return float(((rows @ weights + offset).argmax(1) == targets).double().mean())

    sample = ridge.Sample(rows[::2], targets[::2], torch.ones(len(rows[::2]), dtype=torch.float64), alone)
    best = max(accuracy(dual.fit(sums.scale * 10 ** (-5 + i / 2)).weights, held_out, answers) for i in range(15))
    tiny, good = 1e-6 * sums.scale, 0.3 * sums.scale
    assert sums.fit(tiny).error < sums.fit(good).error, "the control: sums alone prefer to interpolate"
    for fit in (dual.fit, functools.partial(sums.fit, sample=sample)):
        assert accuracy(choose(fit, sums.scale, None)[0].weights, held_out, answers) > best - 0.03
    assert accuracy(sums.fit(tiny).weights, held_out, answers) < best - 0.1


def test_where_nothing_can_be_left_out_the_penalty_stays() -> None:
    """One row of a class says nothing of others: any penalty would do equally well or badly."""
    rows = normal(30, 100, seed=1)
    targets = torch.arange(30)
    sums, dual = Sums(100, 30).add(rows, targets), Dual(rows, targets, 30, None)
    for fit in (sums.fit, dual.fit):
        assert choose(fit, sums.scale, None)[0].penalty == pytest.approx(sums.scale)
        assert choose(fit, sums.scale, 0.2 * sums.scale)[0].penalty == pytest.approx(0.2 * sums.scale)


def test_few_rows_of_a_class_do_not_ask_for_a_large_penalty() -> None:
    """Squared errors do: what they gain is that predictions become small, which decides nothing."""
    rows, targets = clusters(100, 1000, 50)
    held_out, answers = clusters(2000, 1000, 50, part="test")
    scale = float(rows.square().sum()) / 1000
    dual = Dual(rows, targets, 50, None)
    chosen = choose(dual.fit, scale, None)[0]
    grid = [dual.fit(scale * 10 ** (-4 + i / 4)) for i in range(25)]
    best = max(accuracy(one.weights, held_out, answers) for one in grid)

    def squared(fit: Fit) -> float:
        left = hot(targets, 50) - rows @ fit.weights
        return float(left.square().sum()) / (1 - fit.freedom / 100) ** 2

    control = min(grid, key=squared)
    assert control.penalty > 3 * chosen.penalty
    assert accuracy(chosen.weights, held_out, answers) > best - 0.02
    assert accuracy(control.weights, held_out, answers) < accuracy(chosen.weights, held_out, answers) - 0.01


@pytest.mark.parametrize(("slope", "end"), [(1.0, 1e-9), (-1.0, 1e2)])
def test_choose_stays_within_bounds(slope: float, end: float) -> None:
    chosen, _ = choose(curve(lambda x: slope * x, lambda x: slope), 7.0, None)
    assert chosen.penalty == pytest.approx(7 * end)


def test_choose_holds_one_factor_at_a_time() -> None:
    """The winner brings its own factor, and none of the others is alive when the next is made."""
    rows, targets = clusters(300, 100, 5, spread=1.5)
    sums = Sums(100, 5).add(rows, targets)
    alive: set[int] = set()
    most = 0

    class Watched(ridge.Factor):
        def __del__(self) -> None:
            alive.discard(id(self))

    def fit(penalty: float) -> Fit:
        nonlocal most
        made = sums.fit(penalty)
        assert made.factor is not None
        watched = Watched(made.factor.lower, made.factor.penalty)
        alive.add(id(watched))
        most = max(most, len(alive))
        return replace(made, factor=watched)

    for start in (None, 1e-9 * sums.scale, 90 * sums.scale):
        chosen, evaluations = choose(fit, sums.scale, start)
        assert evaluations > 1 or start is None
        assert chosen.factor is not None
        assert chosen.factor.penalty == chosen.penalty
        expected = ridge.dense(sums.packed, 100) + chosen.penalty * torch.eye(100, dtype=torch.float64)
        assert error(chosen.factor.lower @ chosen.factor.lower.mT, expected) < 1e-12
        del chosen
        assert not alive
    assert most == 1


def accuracy(weights: Tensor, rows: Tensor, targets: Tensor) -> float:
    return float(((rows @ weights).argmax(1) == targets).double().mean())


def test_the_interpolation_peak_is_avoided() -> None:
    """With 800 rows the accuracy at M = 1000 is that at M = 300 and M = 3000; with a fixed tiny penalty it is not."""
    found: dict[int, float] = {}
    for width in (300, 1000, 3000):
        rows, targets = clusters(800, width, 10, spread=1.8)
        held_out, answers = clusters(2000, width, 10, spread=1.8, part="test")
        scale = float(rows.square().sum()) / width
        dual = Dual(rows, targets, 10, None)
        found[width] = accuracy(choose(dual.fit, scale, None)[0].weights, held_out, answers)
        if width == 1000:
            control = accuracy(dual.fit(1e-8 * scale).weights, held_out, answers)
            sums = Sums(width, 10).add(rows, targets)
            from_sums = choose(sums.fit, sums.scale, None)[0]
            assert accuracy(from_sums.weights, held_out, answers) >= found[width] - 0.01
    assert found[1000] >= max(found[300], found[3000]) - 0.01, found
    assert control < found[1000] - 0.05, (control, found)

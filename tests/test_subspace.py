"""Subspaces of old features: the invariants of gradient projection memory against explicit
singular value decompositions, and the controls that must fail."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from perpetune.errors import UsageError
from perpetune.numerics.moments import Moments
from perpetune.numerics.subspace import Subspace
from perpetune.seeding import generator

SEEDS = st.integers(0, 2**31)
MANY = settings(max_examples=100)
ENERGIES = st.sampled_from([0.3, 0.5, 0.9, 0.99, 0.999, 1.0])


@dataclass(frozen=True)
class Tasks:
    """Features `(n, m)` of some tasks, and how much of each is to be protected."""

    features: list[Tensor]
    energies: list[float]

    @property
    def dim(self) -> int:
        return self.features[0].shape[1]


def randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@st.composite
def tasks(draw: st.DrawFn) -> Tasks:
    """Up to four tasks whose features decay over directions of their own, often of less than full rank."""
    dim = draw(st.integers(1, 10))
    source = generator("subspace", draw(SEEDS))
    features = []
    for _ in range(draw(st.integers(1, 4))):
        count, rank = draw(st.integers(1, 14)), draw(st.integers(1, dim))
        decay = draw(st.sampled_from([1.0, 0.5, 0.1])) ** torch.arange(rank, dtype=torch.float64)
        features.append(draw(st.sampled_from([1.0, 1e-6, 1e4])) * randn(source, count, rank) * decay)
        features[-1] = features[-1] @ randn(source, rank, dim)
    return Tasks(features, [draw(ENERGIES) for _ in features])


def moments(rows: Tensor) -> Tensor:
    seen = Moments(rows.shape[1])
    seen.update(rows)
    return seen.matrix


def learned(given_tasks: Tasks, alpha: float | None = None) -> Subspace:
    subspace = Subspace(given_tasks.dim, alpha)
    for rows, energy in zip(given_tasks.features, given_tasks.energies, strict=True):
        subspace.extend(moments(rows), energy)
    return subspace


def projector(subspace: Subspace) -> Tensor:
    """`UUᵀ`, whichever of the two forms is kept."""
    return subspace.basis @ subspace.basis.mT


def by_svd(given_tasks: Tasks) -> tuple[Tensor, list[int]]:
    """`UUᵀ` and its rank after each task, by singular value decompositions of the features themselves.

    Examples where rounding decides (a tie at the cut, an energy just met) are not taken.
    """
    basis = torch.zeros(given_tasks.dim, 0, dtype=torch.float64)
    ranks = []
    for rows, energy in zip(given_tasks.features, given_tasks.energies, strict=True):
        total = float(rows.square().sum())
        residual = rows - rows @ basis @ basis.mT
        _, sigma, directions = torch.linalg.svd(residual, full_matrices=False)
        shares = (sigma**2 / total).tolist()
        explained, count = 1 - sum(shares), 0
        if energy == 1:
            count = sum(share > 1e-12 for share in shares)
            assume(not any(1e-14 < share < 1e-8 for share in shares))
        else:
            assume(abs(explained - energy) > 1e-9)
            while explained < energy:
                explained += shares[count]
                count += 1
                assume(abs(explained - energy) > 1e-9)
        if 0 < count < len(shares):
            assume(shares[count - 1] - shares[count] > 1e-6)
        basis = torch.linalg.qr(torch.cat([basis, directions[:count].mT], dim=1)).Q
        ranks.append(basis.shape[1])
    return basis @ basis.mT, ranks


@MANY
@given(tasks())
def test_a_basis_is_orthonormal_and_its_projector_idempotent(given_tasks: Tasks) -> None:
    subspace = learned(given_tasks)
    for columns in (subspace.basis, subspace.free):
        gram = columns.mT @ columns
        assert torch.allclose(gram, torch.eye(len(gram), dtype=gram.dtype), rtol=0, atol=1e-10)
    P = projector(subspace)
    assert torch.allclose(P @ P, P, rtol=0, atol=1e-10)
    assert torch.allclose(P, P.mT, rtol=0, atol=1e-10)
    assert float(P.trace()) == pytest.approx(subspace.rank, abs=1e-10)
    assert subspace.basis.shape == (given_tasks.dim, subspace.rank)
    assert torch.allclose(P + subspace.free @ subspace.free.mT, torch.eye(given_tasks.dim, dtype=P.dtype), atol=1e-10)


@MANY
@given(tasks(), SEEDS)
def test_projecting_twice_is_projecting_once_in_float32(given_tasks: Tasks, seed: int) -> None:
    subspace = learned(given_tasks)
    x = randn(generator(seed), 5, given_tasks.dim).float()
    for once in (subspace.keep, subspace.remove):
        assert once(x).dtype == torch.float32
        assert torch.allclose(once(once(x)), once(x), rtol=0, atol=1e-5 * float(x.norm()))
    assert float(subspace.keep(subspace.remove(x)).norm()) <= 1e-5 * float(x.norm())


@MANY
@given(tasks(), st.data())
def test_neither_order_nor_cut_nor_copies_of_the_samples_matter(given_tasks: Tasks, data: st.DataObject) -> None:
    P, _ = by_svd(given_tasks)
    other = Subspace(given_tasks.dim)
    for rows, energy in zip(given_tasks.features, given_tasks.energies, strict=True):
        seen = Moments(given_tasks.dim)
        order = data.draw(st.permutations(range(len(rows))))
        copies = data.draw(st.integers(1, 3))
        for part in rows[list(order)].repeat(copies, 1).split(data.draw(st.integers(1, 5))):
            seen.update(part)
        other.extend(seen.matrix, energy)
    assert torch.allclose(projector(other), P, rtol=0, atol=1e-8)


@MANY
@given(tasks(), SEEDS)
def test_rotated_features_have_a_rotated_subspace(given_tasks: Tasks, seed: int) -> None:
    """`U(X R) = Rᵀ U(X)`."""
    by_svd(given_tasks)  # takes no example where rounding decides
    rotation = torch.linalg.qr(randn(generator(seed), given_tasks.dim, given_tasks.dim)).Q
    turned = Tasks([rows @ rotation for rows in given_tasks.features], given_tasks.energies)
    expected = rotation.mT @ projector(learned(given_tasks)) @ rotation
    assert torch.allclose(projector(learned(turned)), expected, rtol=0, atol=1e-8)


@MANY
@given(tasks())
def test_what_is_left_out_is_at_most_the_rest_of_the_energy(given_tasks: Tasks) -> None:
    """This holds for each task when it is merged, and the rest does not grow afterwards."""
    subspace = Subspace(given_tasks.dim)
    left: list[float] = []
    for i, (rows, energy) in enumerate(zip(given_tasks.features, given_tasks.energies, strict=True)):
        subspace.extend(moments(rows), energy)
        now = [
            float(subspace.remove(earlier).square().sum() / earlier.square().sum())
            for earlier in given_tasks.features[: i + 1]
        ]
        assert now[-1] <= 1 - energy + 1e-10
        assert all(after <= before + 1e-10 for before, after in zip(left, now, strict=False))
        left = now


@MANY
@given(tasks())
def test_a_subspace_only_grows(given_tasks: Tasks) -> None:
    """`extend`, `rank` and `room` agree with it."""
    subspace = Subspace(given_tasks.dim)
    for rows, energy in zip(given_tasks.features, given_tasks.energies, strict=True):
        before, rank = subspace.basis, subspace.rank
        added = subspace.extend(moments(rows), energy)
        assert subspace.rank == rank + added <= given_tasks.dim
        assert subspace.room == pytest.approx(1 - subspace.rank / given_tasks.dim)
        assert float(subspace.remove(before, axis=0).norm()) <= 1e-10
        kept = subspace.vectors
        assert subspace.extend(moments(rows), energy) == 0
        assert torch.equal(subspace.vectors, kept)


@MANY
@given(tasks())
def test_moments_give_what_singular_vectors_of_the_features_give(given_tasks: Tasks) -> None:
    P, ranks = by_svd(given_tasks)
    subspace = Subspace(given_tasks.dim)
    for rows, energy, rank in zip(given_tasks.features, given_tasks.energies, ranks, strict=True):
        subspace.extend(moments(rows), energy)
        assert subspace.rank == rank
    assert torch.allclose(projector(subspace), P, rtol=0, atol=1e-8)


@MANY
@given(tasks(), SEEDS, st.integers(1, 6))
def test_the_change_of_old_outputs_is_bounded_by_the_energy(given_tasks: Tasks, seed: int, out: int) -> None:
    """`‖X ΔWᵀ‖ ≤ √(1 − ε) ‖X‖ ‖ΔW‖₂`."""
    subspace = learned(given_tasks)
    step = subspace.remove(randn(generator(seed), out, given_tasks.dim))
    for rows, energy in zip(given_tasks.features, given_tasks.energies, strict=True):
        bound = math.sqrt(1 - energy) * float(rows.norm()) * float(torch.linalg.matrix_norm(step, 2))
        # Moments resolve σ² to rounding, so singular values to its root.
        slack = 1e-6 * float(rows.norm()) * float(step.norm())
        assert float((rows @ step.mT).norm()) <= bound + slack


@MANY
@given(tasks(), SEEDS, st.sampled_from([0, 1, 2, -1]))
def test_both_forms_project_alike_along_any_axis(given_tasks: Tasks, seed: int, axis: int) -> None:
    subspace = learned(given_tasks)
    assert subspace.vectors.shape[1] <= given_tasks.dim / 2  # the smaller of the two is kept
    other = Subspace(given_tasks.dim)
    other.complement = not subspace.complement
    other.vectors = subspace.free if other.complement else subspace.basis
    assert other.rank == subspace.rank
    assert torch.allclose(projector(other), projector(subspace), rtol=0, atol=1e-10)
    shape = [2, 3, 4]
    shape[axis] = given_tasks.dim
    x = randn(generator(seed), *shape)
    dense = (x.movedim(axis, -1) @ projector(subspace)).movedim(-1, axis)
    for form in (subspace, other):
        assert torch.allclose(form.keep(x, axis), dense, rtol=0, atol=1e-10)
        assert torch.allclose(form.remove(x, axis), x - dense, rtol=0, atol=1e-10)


@MANY
@given(tasks(), st.sampled_from([0.0, 1.0, 10.0]), SEEDS)
def test_the_soft_variant_is_its_dense_formula(given_tasks: Tasks, alpha: float, seed: int) -> None:
    """`I − U Λ Uᵀ`, `λ = min(1, Σ (α + 1) σ / (α σ + σ_max))` with σ along each direction of each task's features."""
    subspace = Subspace(given_tasks.dim, alpha)
    importance = torch.zeros(0, dtype=torch.float64)
    for rows, energy in zip(given_tasks.features, given_tasks.energies, strict=True):
        added = subspace.extend(moments(rows), energy)
        # Where nothing is above rounding, σ of it is noise of no size: the features are then compared as given.
        sigma = (rows @ subspace.basis).norm(dim=0)
        assume(not bool(((sigma > 0) & (sigma < 1e-4 * sigma.max())).any()))
        importance = torch.cat([importance, torch.zeros(added, dtype=torch.float64)])
        importance = (importance + (alpha + 1) * sigma / (alpha * sigma + sigma.max())).clamp(max=1)
    assert torch.allclose(subspace.importance, importance, rtol=0, atol=1e-6)
    assert not subspace.complement
    assert subspace.vectors.shape[1] == subspace.rank == len(subspace.importance)
    U, x = subspace.basis, randn(generator(seed), 3, given_tasks.dim)
    dense = torch.eye(given_tasks.dim, dtype=x.dtype) - U @ torch.diag(subspace.importance) @ U.mT
    assert torch.allclose(subspace.remove(x), x @ dense, rtol=0, atol=1e-10)
    assert torch.allclose(subspace.keep(x), x - x @ dense, rtol=0, atol=1e-10)


@MANY
@given(tasks())
def test_the_soft_variant_protects_the_same_directions(given_tasks: Tasks) -> None:
    by_svd(given_tasks)  # takes no example where rounding decides
    hard, soft = learned(given_tasks), learned(given_tasks, alpha=2.0)
    assert soft.rank == hard.rank
    assert torch.allclose(projector(soft), projector(hard), rtol=0, atol=1e-8)
    assert bool(((soft.importance >= 0) & (soft.importance <= 1)).all())


@given(st.integers(1, 9), st.integers(0, 9), st.integers(0, 12), SEEDS, st.sampled_from([None, 1.0]))
def test_random_directions_are_of_the_rank_asked_for(
    dim: int, first: int, count: int, seed: int, alpha: float | None
) -> None:
    first = min(first, dim)
    rows = torch.eye(dim, dtype=torch.float64)[:first]
    drawn = []
    for _ in range(2):
        subspace = Subspace(dim, alpha)
        subspace.extend(moments(rows), 1.0)
        subspace.extend_random(count, generator("control", seed))
        drawn.append(subspace)
    one, two = drawn
    assert torch.equal(one.vectors, two.vectors)
    assert one.rank == min(first + count, dim)
    assert torch.allclose(one.basis.mT @ one.basis, torch.eye(one.rank, dtype=torch.float64), rtol=0, atol=1e-10)
    assert float((rows - rows @ projector(one)).norm()) <= 1e-10  # what was protected is so still
    if alpha is not None:
        assert torch.allclose(one.importance, torch.ones(one.rank, dtype=torch.float64))


def test_no_energy_and_no_data_add_nothing() -> None:
    rows = randn(generator(0), 20, 4)
    for matrix, energy in ((moments(rows), 0.0), (torch.zeros(4, 4, dtype=torch.float64), 1.0)):
        subspace = Subspace(4)
        assert subspace.extend(matrix, energy) == 0
        assert (subspace.rank, subspace.room) == (0, 1.0)
        assert torch.equal(subspace.remove(rows), rows)
        assert not subspace.keep(rows).any()


def test_all_energy_of_full_rank_leaves_no_room() -> None:
    subspace = Subspace(4)
    rows = randn(generator(1), 20, 4)
    assert subspace.extend(moments(rows), 1.0) == 4
    assert (subspace.rank, subspace.room) == (4, 0.0)
    assert not subspace.remove(rows).any()
    assert torch.equal(subspace.keep(rows), rows)
    assert subspace.vectors.numel() == 0
    assert subspace.extend(moments(randn(generator(2), 20, 4)), 1.0) == 0


def test_the_energy_is_that_of_the_features_and_its_stop_not_strict() -> None:
    """σ², not the σ⁴ of a Gram matrix (D5); one direction that holds the share asked for is enough, and is taken."""
    rows = torch.diag(torch.tensor([3.0, 2.0, 1.0, 1.0], dtype=torch.float64))  # σ² shares .6, .2667, .0667, .0667
    for energy, rank in ((0.0, 0), (0.1, 1), (0.6, 1), (0.61, 2), (0.86, 2), (0.87, 3), (1.0, 4)):
        subspace = Subspace(4)
        assert subspace.extend(moments(rows), energy) == rank


def test_a_shallow_copy_is_extended_alone() -> None:
    """Callers extend copies and keep them only where all went well."""
    source = generator("copy")
    for alpha in (None, 1.0):
        subspace = Subspace(6, alpha)
        subspace.extend(moments(randn(source, 2, 6)), 1.0)
        before, other = vars(copy.deepcopy(subspace)), copy.copy(subspace)
        other.extend(moments(randn(source, 3, 6)), 1.0)
        assert (subspace.rank, other.rank) == (2, 5)
        assert subspace.complement == before["complement"]
        assert torch.equal(subspace.vectors, before["vectors"])
        assert torch.equal(subspace.importance, before["importance"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_moments_that_are_not_finite_change_nothing(bad: float) -> None:
    subspace = Subspace(4, alpha=1.0)
    subspace.extend(moments(randn(generator(3), 2, 4)), 0.9)
    vectors, importance = subspace.vectors.clone(), subspace.importance.clone()
    broken = torch.eye(4, dtype=torch.float64)
    broken[1, 2] = bad
    with pytest.raises(UsageError) as error:
        subspace.extend(broken, 0.9)
    assert str(error.value) == "the moments are not finite"
    assert torch.equal(subspace.vectors, vectors)
    assert torch.equal(subspace.importance, importance)


@pytest.mark.parametrize(
    ("shape", "energy", "expected"),
    [
        ((3, 3), 0.9, "moments (4, 4) are expected, got (3, 3)"),
        ((4,), 0.9, "moments (4, 4) are expected, got (4,)"),
        ((4, 4), 1.1, "energy is 1.1; a share from 0 to 1 is expected"),
        ((4, 4), -0.1, "energy is -0.1; a share from 0 to 1 is expected"),
        ((4, 4), float("nan"), "energy is nan; a share from 0 to 1 is expected"),
    ],
)
def test_what_makes_no_sense(shape: tuple[int, ...], energy: float, expected: str) -> None:
    subspace = Subspace(4)
    with pytest.raises(UsageError) as error:
        subspace.extend(torch.ones(shape, dtype=torch.float64), energy)
    assert str(error.value) == expected
    assert subspace.rank == 0


def test_the_span_of_image_indices_protects_nothing() -> None:
    """Control, D1: as many images as features, and the Gram matrix of images in the place of that of features."""
    source = generator("D1")
    rows = randn(source, 12, 3) @ randn(source, 3, 12)
    order = torch.randperm(12, generator=source)
    step = randn(source, 5, 12)
    change = {}
    for name, matrix, permuted in (
        ("images", rows @ rows.mT, rows[order] @ rows[order].mT),
        ("features", rows.mT @ rows, rows[order].mT @ rows[order]),
    ):
        subspace, other = Subspace(12), Subspace(12)
        subspace.extend(matrix, 1.0)
        other.extend(permuted, 1.0)
        moved = float((projector(subspace) - projector(other)).norm() / projector(subspace).norm())
        kept = float((rows @ subspace.remove(step).mT).norm() / (rows @ step.mT).norm())
        change[name] = (moved, kept)
    assert change["images"][0] > 1e-2
    assert change["images"][1] > 0.5
    assert change["features"][0] < 1e-8
    assert change["features"][1] < 1e-6


def test_the_span_of_pca_scores_is_of_coordinate_axes() -> None:
    """Control, D2: scores are uncorrelated, so their Gram matrix is diagonal and protects the first channels."""
    source = generator("D2")
    rows = randn(source, 40, 3) @ randn(source, 3, 8) + 1
    centred = rows - rows.mean(0)
    scores = centred @ torch.linalg.svd(centred, full_matrices=False).Vh.mT
    gram = scores.mT @ scores
    assert float((gram - gram.diagonal().diag()).norm() / gram.norm()) < 1e-10
    subspace, right = Subspace(8), Subspace(8)
    subspace.extend(gram, 0.999)
    right.extend(moments(rows), 1.0)
    axes = torch.cat([torch.ones(subspace.rank), torch.zeros(8 - subspace.rank)]).double().diag()
    assert torch.allclose(projector(subspace), axes, rtol=0, atol=1e-6)
    step = randn(source, 5, 8)
    assert float((rows @ subspace.remove(step).mT).norm() / (rows @ step.mT).norm()) > 1e-2
    assert float((rows @ right.remove(step).mT).norm() / (rows @ step.mT).norm()) < 1e-6


def test_sums_protect_neither_of_the_two_and_stacks_both() -> None:
    """Control, D3: `(x + p) Δᵀ = 0` says nothing of `x Δᵀ` and `p Δᵀ`."""
    source = generator("D3")
    x, p, step = randn(source, 3, 10), randn(source, 3, 10), randn(source, 4, 10)
    summed, stacked = Subspace(10), Subspace(10)
    summed.extend(moments(x + p), 1.0)
    stacked.extend(moments(torch.cat([x, p])), 1.0)
    change = summed.remove(step)
    assert float(((x + p) @ change.mT).norm()) < 1e-10
    for rows in (x, p):
        assert float((rows @ change.mT).norm() / (rows @ step.mT).norm()) > 1e-2
        assert float((rows @ stacked.remove(step).mT).norm()) < 1e-10

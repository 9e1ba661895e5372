"""Sums of old examples follow their features where training moves those."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from perpetune.heads import NCM, Ridge
from perpetune.models.classifier import learn_statistics
from perpetune.numerics import carry, lowrank, ridge
from perpetune.numerics.moments import Moments
from perpetune.numerics.projection import Operand, Site
from perpetune.numerics.signature import RunningMean
from perpetune.protection.sites import Watched
from perpetune.seeding import generator
from perpetune.tasks import Examples, Task

D = 12


class Rows(Examples):
    """Features as if they were pictures."""

    def __init__(self, features: Tensor, targets: list[int]):
        self.features, self.targets = features, targets

    def __len__(self) -> int:
        return len(self.targets)

    def load(self, index: int, seed: int | None) -> Tensor:
        return self.features[index]


def normal(*shape: int, seed: int | str = 0) -> Tensor:
    return torch.randn(*shape, generator=generator("carry", seed), dtype=torch.float64)


def rows_of(classes: int, each: int, seed: str) -> tuple[Tensor, Tensor]:
    """Features `(n, D)` around a mean for each class, and their classes."""
    targets = torch.arange(classes).repeat_interleave(each)
    return 3 * normal(classes, D, seed=f"{seed} means")[targets] + normal(len(targets), D, seed=seed) + 1, targets


def teach(head: Any, features: Tensor, names: str, targets: Tensor, index: int) -> None:
    task = Task(index, f"t{index}", tuple(names), Rows(features.float(), targets.tolist()))  # type: ignore[arg-type]
    head.grow(task.classes, task.generator("head"))
    learn_statistics(task, 16, [(head, lambda batch: batch.inputs.pixels)])


def moved(rows: Tensor) -> Tensor:
    """A linear change with a shift, the same for old and new rows."""
    return rows @ (torch.eye(D, dtype=torch.float64) + 0.2 * normal(D, D, seed="turn")) + 0.5


OLD, NEW = rows_of(4, 20, "old"), rows_of(5, 40, "new")


@pytest.mark.parametrize("options", [{}, {"standardise": False}, {"balance": True}], ids=str)
def test_a_linear_change_is_carried_exactly(options: dict[str, Any]) -> None:
    """The sums become those that the moved old rows would have given; without an intercept no shift can be followed."""
    shift = moved if options.get("standardise", True) else lambda rows: moved(rows) - 0.5
    kept, wanted, stale = (Ridge(D, **options, carry=True) for _ in range(3))
    for head, rows in ((kept, OLD[0]), (wanted, shift(OLD[0])), (stale, OLD[0])):
        teach(head, rows, "abcd", OLD[1], 0)
    kept.follow(NEW[0], shift(NEW[0]), NEW[1])
    for name in ("packed", "cross"):
        one, other, none = (getattr(head, name) for head in (kept, wanted, stale))
        # Sums are made of rows that torch's loader hands on in float32, and they are what is compared.
        assert float((one - other).norm() / other.norm()) < 1e-6
        assert float((none - other).norm() / other.norm()) > 0.1  # the control


def test_the_map_is_exact_in_float64() -> None:
    h, new = (torch.nn.functional.pad(rows, (0, 1), value=1.0) for rows in (OLD[0], NEW[0]))
    after = torch.nn.functional.pad(moved(NEW[0]), (0, 1), value=1.0)
    scale = torch.nn.functional.pad(1 / OLD[0].std(0), (0, 1), value=1.0)
    found = carry.follow(new, after, NEW[1], scale, OLD[0].mean(0))
    wanted = torch.nn.functional.pad(moved(OLD[0]), (0, 1), value=1.0)
    assert float((found.of_rows(h) - wanted).norm() / wanted.norm()) < 1e-10
    gram = found.of_gram(h.mT @ h)
    assert float((gram - wanted.mT @ wanted).norm() / gram.norm()) < 1e-10
    assert torch.allclose(gram, gram.mT, rtol=0, atol=1e-9)
    assert found.unexplained < 1e-12


def test_it_is_inert_where_nothing_moves() -> None:
    for head in (Ridge(D, carry=True), Ridge(D, projection=20, carry=True), NCM(D, carry=True)):
        teach(head, OLD[0], "abcd", OLD[1], 0)
        before = {name: value.clone() for name, value in head.state_dict().items() if isinstance(value, Tensor)}
        head.follow(NEW[0], NEW[0], NEW[1])
        assert all(torch.equal(before[name], head.state_dict()[name]) for name in before)


@pytest.mark.parametrize(("size", "followed"), [(1e-6, False), (1e-3, True)])
def test_rounding_is_not_followed(size: float, followed: bool) -> None:
    """A linear change, which a map could follow exactly: so small, it is as likely one of rounding."""
    kept = Ridge(D, carry=True)
    teach(kept, OLD[0], "abcd", OLD[1], 0)
    before = kept.packed.clone()
    kept.follow(NEW[0], NEW[0] + size * (moved(NEW[0]) - NEW[0]), NEW[1])
    assert torch.equal(kept.packed, before) is not followed
    teach(kept, NEW[0], "efghi", NEW[1], 1)
    assert kept.facts()["carried"] is followed
    assert 0 < kept.facts()["moved"] < 10 * size


def test_it_does_nothing_where_left_out_classes_say_so() -> None:
    """Movement that has nothing to do with the features, and a task of one class."""
    head = Ridge(D, carry=True)
    teach(head, OLD[0], "abcd", OLD[1], 0)
    before = head.packed.clone()
    head.follow(NEW[0], NEW[0] + normal(*NEW[0].shape, seed="noise"), NEW[1])
    assert torch.equal(head.packed, before)
    head.follow(NEW[0], moved(NEW[0]), torch.zeros(len(NEW[1]), dtype=torch.int64))
    assert torch.equal(head.packed, before)
    teach(head, NEW[0], "efghi", NEW[1], 1)
    assert (head.facts()["carried"], head.facts()["unexplained"]) == (False, 1.0)
    assert head.facts()["moved"] > 0.1


def test_class_means_follow_too() -> None:
    kept, stale = NCM(D, carry=True), NCM(D)
    for head in (kept, stale):
        teach(head, OLD[0], "abcd", OLD[1], 0)
        head.follow(NEW[0], moved(NEW[0]), NEW[1])
        head.settle()
    wanted = torch.stack([moved(OLD[0])[OLD[1] == c].mean(0) for c in range(4)]).float()
    assert float((kept.means - wanted).norm() / wanted.norm()) < 1e-5
    assert kept.counts.tolist() == [20] * 4


@pytest.mark.parametrize("kind", [NCM, Ridge])
def test_a_column_that_is_the_same_everywhere_takes_no_part_where_it_moves(kind: type[NCM] | type[Ridge]) -> None:
    """Its deviation is a rounding error: to divide by that would drown what really moves."""
    noisy = [0.3 + 1e-8 * normal(len(rows), 1, seed=f"rounding {i}") for i, rows in enumerate((OLD[0], NEW[0]))]
    old, before = (torch.cat(pair, 1) for pair in zip((OLD[0], NEW[0]), noisy, strict=True))
    after = torch.cat([moved(NEW[0]), noisy[1] + 0.01 * normal(len(NEW[0]), 1, seed="moves")], 1)
    head = kind(D + 1, carry=True)
    teach(head, old, "abcd", OLD[1], 0)
    head.follow(before, after, NEW[1])
    head.settle()
    facts = head.facts()
    assert facts["carried"]
    assert facts["moved"] < 10
    assert facts["unexplained"] < 1e-6


def test_the_search_equals_brute_force() -> None:
    """`unexplained` is what explicit maps, made without the left-out classes, miss of their movement."""
    new, noise = NEW[0], 0.3 * normal(*NEW[0].shape, seed="some noise")
    after, scale = moved(new) + noise, 1 / new.std(0)
    found = carry.follow(new, after, NEW[1], scale)
    x, d = new * scale, after - new
    unit = float((x @ x.mT).diagonal().mean())
    best = []
    for share in carry.PENALTIES:
        missed = 0.0
        for fold in range(5):
            out = NEW[1] == fold
            square = x[~out].mT @ x[~out] + share * unit * torch.eye(D)
            map_ = torch.linalg.solve(square, x[~out].mT @ d[~out])
            missed += float(((x[out] @ map_ - d[out]) * scale).square().sum())
        best.append(missed / float((d * scale).square().sum()))
    assert found.unexplained == pytest.approx(min(best), rel=1e-6)
    assert found.penalty == carry.PENALTIES[best.index(min(best))]
    assert 0.01 < found.unexplained < 0.9


def test_packing_a_matrix() -> None:
    rows = normal(30, 7, seed="pack")
    packed = torch.zeros(ridge.packed_size(7), dtype=torch.float64)
    ridge.pack(rows.mT @ rows, packed)
    assert torch.equal(ridge.dense(packed, 7), torch.tril(rows.mT @ rows) + torch.tril(rows.mT @ rows, -1).mT)


class Apples(TorchDispatchMode):
    """Refuses what torch cannot do with a tensor of Apple's GPUs: to move it and make it float64 at once."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asked = kwargs or {}
        if func is torch.ops.aten._to_copy.default and asked.get("dtype") == torch.float64:
            assert asked.get("device") is None
        return func(*args, **asked)


def test_what_comes_from_the_device_is_moved_before_it_is_float64() -> None:
    factors = [(torch.randn(6, 2), torch.randn(2, 5)) for _ in range(2)]
    for head in (NCM(D, carry=True), Ridge(D, carry=True), Ridge(D, carry=True, projection=20)):
        teach(head, OLD[0], "abcd", OLD[1], 0)
        with Apples():
            head.follow(NEW[0].float(), moved(NEW[0]).float(), NEW[1])
            if isinstance(head, NCM):
                head.observe(OLD[0].float(), OLD[1])
    with Apples():
        Moments(D).update(NEW[0].float())
        RunningMean((D,)).update(NEW[0].float().mean(0), 1.0)
        lowrank.reduced(factors[0])
        lowrank.merged(factors, [1.0, 1.0], 2)
        Watched("a", Site("a", Operand(torch.nn.Parameter(torch.randn(3, D)))), torch.nn.Linear(D, 3)).values()

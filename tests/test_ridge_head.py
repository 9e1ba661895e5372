"""The head `ridge` over tasks, against regressions on all data at once."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from perpetune.build import build_method
from perpetune.check import tiny_backbone
from perpetune.errors import PerpetuneError, UsageError
from perpetune.heads import Ridge
from perpetune.heads import ridge as module
from perpetune.methods.frozen import Frozen
from perpetune.models.classifier import Classifier, learn_statistics
from perpetune.numerics import ridge
from perpetune.recipe import make_recipe
from perpetune.runtime import Runtime
from perpetune.seeding import generator
from perpetune.snapshot import restore, snapshot
from perpetune.tasks import Examples, Task

D = 8
ALPHABET = "abcdefghijklmnopqrst"


class Rows(Examples):
    """Features as examples: what a frozen model would make of pictures."""

    def __init__(self, features: Tensor, targets: Sequence[int]):
        self.features, self.targets = features, list(targets)

    def __len__(self) -> int:
        return len(self.targets)

    def load(self, index: int, seed: int | None) -> Tensor:
        return self.features[index]


def features(label: str, count: int, *purpose: int | str) -> Tensor:
    centre = torch.randn(D, generator=generator("centre", label)) * 2
    return centre + torch.randn(count, D, generator=generator("features", label, *purpose)) + 1


def task_of(
    index: int, classes: str, each: int | Sequence[int] = 6, runtime: Runtime | None = None, part: str = ""
) -> Task:
    """A task of some examples of each of its classes, in a mixed order."""
    counts = [each] * len(classes) if isinstance(each, int) else each
    found = torch.cat([features(c, n, part) for c, n in zip(classes, counts, strict=True)])
    targets = torch.arange(len(classes)).repeat_interleave(torch.tensor(counts))
    order = torch.randperm(len(targets), generator=generator("order", classes))
    train: Any = Rows(found[order], targets[order].tolist())
    return Task(index, f"task-{index}", tuple(classes), train, runtime=runtime or Runtime())


def teach(head: Ridge, task: Task, batch_size: int = 7) -> None:
    head.grow(task.classes, task.generator("head"))
    learn_statistics(task, batch_size, [(head, lambda batch: batch.inputs.pixels)])


def learned(tasks: Sequence[Task], batch_size: int = 7, **options: Any) -> Ridge:
    head = Ridge(D, **options)
    for task in tasks:
        teach(head, task, batch_size)
    return head


def everything(tasks: Sequence[Task], classes: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Features of all tasks and their rows in `classes`."""
    rows = [classes.index(t.classes[y]) for t in tasks for y in t.train.targets]
    return torch.cat([t.train.features for t in tasks]), torch.tensor(rows)  # type: ignore[attr-defined]


def rows_of(head: Ridge, found: Tensor) -> Tensor:
    """Rows in float64, with the constant 1 of an intercept where there is one."""
    h = head.expand(found.double())
    return F.pad(h, (0, 1), value=1.0) if head.standardise else h


def standard_of(z: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of columns over rows that are there all at once."""
    mean = (own[:, None] * z).sum(0) / own.sum()
    deviation = ((own[:, None] * (z - mean).square()).sum(0) / own.sum()).sqrt()
    return mean, deviation.masked_fill(deviation < 1e-9, torch.inf)  # a constant column takes no part


def affine(weights: Tensor, mean: Tensor, deviation: Tensor, target: Tensor) -> Tensor:
    """Weights `(M + 1, C)` of rows `[z, 1]`, from those of standardised rows."""
    turned = weights / deviation[:, None]
    return torch.cat([turned, (target - mean @ turned)[None]])


def joint(head: Ridge, tasks: Sequence[Task], weights: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
    """G, W and the penalty of a dense float64 regression on all examples of all tasks at once.

    Of a head that standardises, W is that of rows `[z, 1]`: standardised in two passes, with an intercept that is not
    penalised.
    """
    found, targets = everything(tasks, head.classes)
    h = rows_of(head, found)
    own = torch.ones(len(h), dtype=torch.float64) if weights is None else weights
    gram = h.mT @ (own[:, None] * h)
    penalty = float(head.chosen)
    hot = F.one_hot(targets, len(head.classes)).double()
    ridged = penalty * torch.ones(h.shape[1], dtype=torch.float64)
    if not head.standardise:
        return gram, torch.linalg.solve(gram + ridged.diag(), h.mT @ (own[:, None] * hot)), penalty
    mean, deviation = standard_of(h[:, :-1], own)
    x = F.pad((h[:, :-1] - mean) / deviation, (0, 1), value=1.0)
    ridged[-1] = 0
    solved = torch.linalg.solve(x.mT @ (own[:, None] * x) + ridged.diag(), x.mT @ (own[:, None] * hot))
    return gram, affine(solved[:-1], mean, deviation, solved[-1]), penalty


def solution(head: Ridge) -> Tensor:
    """W in float64, from what the head keeps; as that of `joint`."""
    if not head.standardise:
        return ridge.factor(head.packed, head.width, float(head.chosen)).solve(head.cross)
    standard = ridge.Standard.of(head.packed, head.cross)
    made = ridge.factor(head.packed, head.width, float(head.chosen), standard)
    return affine(made.solve(standard.cross(head.cross)), standard.mean, 1 / standard.inverse, standard.target)


def kept_weights(head: Ridge) -> Tensor:
    """W as the head predicts by it, in its float32."""
    if not head.standardise:
        return head.weight.double()
    centre, weight = head.centre.double(), head.weight.double()
    return torch.cat([weight, (head.offset.double() - centre @ weight)[None]])


def close(found: Tensor, wanted: Tensor, share: float) -> None:
    assert float((found - wanted).norm()) <= share * float(wanted.norm())


TEN = [task_of(i, ALPHABET[2 * i : 2 * i + 2]) for i in range(10)]
KINDS: dict[str, dict[str, Any]] = {
    "M=20": {"projection": 20},
    "M=64": {"projection": 64},
    "bare": {"standardise": False},
    "standardised": {},
    "M=20, standardised": {"projection": 20, "standardise": True},
    "orthogonal": {"projection": 5, "kind": "orthogonal"},
    "orthogonal, bare": {"projection": 5, "kind": "orthogonal", "standardise": False},
}
every_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


def test_golden_value() -> None:
    """A value computed by hand."""
    head = Ridge(2, standardise=False, penalty=1 / 3.5)  # of tr G / M = 7 / 2
    train: Any = Rows(torch.tensor([[1.0, 0], [1, 1], [0, 2]]), [0, 1, 1])
    head.grow("abc", generator("golden"))
    learn_statistics(Task(0, "golden", ("a", "b"), train), 2, [(head, lambda batch: batch.inputs.pixels)])
    assert float(head.chosen) == pytest.approx(1)
    wanted = torch.tensor([[0.35294118, 0.17647059, 0], [-0.05882353, 0.47058824, 0]])
    torch.testing.assert_close(head.weight, wanted, rtol=0, atol=1e-6)


# -- any order, any batches ---------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("penalty", [1e-3, "chosen"])
def test_after_ten_tasks_it_is_one_regression_on_all_features(options: dict[str, Any], penalty: float | str) -> None:
    head = learned(TEN, penalty=penalty, **options)
    gram, weights, used = joint(head, TEN)
    assert len(head.classes) == 20
    if penalty != "chosen":
        unit = 120.0 if head.standardise else float(gram.trace()) / head.width  # each column's square is 1
        assert used == pytest.approx(1e-3 * unit, rel=1e-9)
    close(ridge.dense(head.packed, head.rank), gram, 1e-10)
    close(solution(head), weights, 1e-8)
    torch.testing.assert_close(kept_weights(head), weights, rtol=1e-5, atol=2e-6)
    new = torch.cat([features(c, 4, "new") for c in head.classes])
    scores = rows_of(head, new) @ weights
    assert torch.equal(head(new).argmax(1), scores.argmax(1))
    torch.testing.assert_close(head(new).double(), float(head.scale) * scores, rtol=1e-4, atol=1e-4)


@every_kind
@pytest.mark.parametrize("batch_size", [1, 5, 1000])
def test_order_of_tasks_and_size_of_batches_do_not_matter(options: dict[str, Any], batch_size: int) -> None:
    """Only the columns are in the order in which classes came."""
    one = learned(TEN, penalty=1e-3, **options)
    order = torch.randperm(10, generator=generator("tasks", batch_size)).tolist()
    # The first task's generator is what the projection is drawn from, so they are numbered as they come.
    tasks = [task_of(i, TEN[k].classes) for i, k in enumerate(order)]  # type: ignore[arg-type]
    other = learned(tasks, batch_size, penalty=1e-3, **options)
    assert other.classes != one.classes
    columns = one.rows(other.classes)
    # The projection is in float32, and rounds a little otherwise in a product of another shape.
    share = 1e-10
    close(other.packed, one.packed, share)
    close(other.cross, one.cross[:, columns], share)
    assert torch.equal(other.counts, one.counts[columns])
    close(solution(other), solution(one)[:, columns], 1e-8)
    new = torch.cat([features(c, 4, "new") for c in one.classes])
    assert torch.equal(columns[other(new).argmax(1)], one(new).argmax(1))


@every_kind
def test_classes_that_come_back_go_on_from_where_they_stood(options: dict[str, Any]) -> None:
    """Domain-incremental: three domains of the same classes, one of them without the last."""
    tasks = [task_of(0, "abc", part="real"), task_of(1, "ab", 5, part="sketch"), task_of(2, "cab", 4, part="clip")]
    head = learned(tasks, **options)
    assert head.classes == ["a", "b", "c"]
    assert head.counts.tolist() == [15, 15, 10]
    gram, weights, _ = joint(head, tasks)
    close(ridge.dense(head.packed, head.rank), gram, 1e-10)
    close(solution(head), weights, 1e-8)


def test_sums_are_what_they_are_called() -> None:
    """Trace and columns; G is symmetric and positive semidefinite."""
    head = learned(TEN[:3], projection=20)
    found, targets = everything(TEN[:3], head.classes)
    h = head.expand(found.double())
    gram = ridge.dense(head.packed, 20)
    assert torch.equal(gram, gram.mT)
    values = torch.linalg.eigvalsh(gram)
    assert float(values[0]) >= -1e-10 * float(values[-1])
    assert float(gram.trace()) == pytest.approx(float(h.square().sum()), rel=1e-10)
    for row in range(6):
        close(head.cross[:, row], h[targets == row].sum(0), 1e-10)
    assert float(head.mass) == len(h)


def test_a_class_without_examples_is_never_the_answer() -> None:
    head = Ridge(D, projection=20)
    assert head(torch.randn(3, D, generator=generator("f"))).shape == (3, 0)
    head.grow("yxz", generator("grow"))
    assert head(features("a", 2)).isneginf().all()
    task = task_of(0, "ab")
    teach(head, task)
    assert head.classes == ["y", "x", "z", "a", "b"]
    assert not head.cross[:, :3].any()
    assert not head.weight[:, :3].any()
    scores = head(features("a", 5))
    assert scores[:, :3].isneginf().all()
    assert torch.isfinite(scores[:, 3:]).all()
    assert math.isfinite(float(head.scale)), "nor does it spoil the calibration"


@every_kind
@pytest.mark.parametrize("penalty", [1e-2, "chosen"])
def test_balanced_classes_weigh_the_same(penalty: float | str, options: dict[str, Any]) -> None:
    """Each example in inverse proportion to its class's share of its task: the sum of weights stays."""
    tasks = [task_of(0, "ab", [20, 4]), task_of(1, "cad", [3, 9, 12])]
    head = learned(tasks, balance=True, penalty=penalty, **options)
    weights = []
    for task in tasks:
        targets = torch.tensor(task.train.targets)
        counts = torch.bincount(targets)
        weights.append((len(targets) / len(counts) / counts.double())[targets])
    gram, wanted, _ = joint(head, tasks, torch.cat(weights))
    close(ridge.dense(head.packed, head.rank), gram, 1e-10)
    close(solution(head), wanted, 1e-8)
    even = joint(head, tasks)[1]
    assert float((even - wanted).norm()) > 1e-3 * float(wanted.norm()), "the control: without weights"
    assert float(head.mass) == pytest.approx(48)
    assert head.counts.tolist() == [29, 4, 3, 12], "examples are counted as they are"


def test_large_tasks_are_added_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums are the same, and no more rows are held than a part has."""
    one = learned(TEN[:3], batch_size=1000, projection=20)
    monkeypatch.setattr(module, "BUFFER", 4)
    held = []
    observe = Ridge.observe

    def watched(self: Ridge, found: Tensor, rows: Tensor) -> None:
        observe(self, found, rows)
        held.append(sum(map(len, self._features)))

    monkeypatch.setattr(Ridge, "observe", watched)
    other = learned(TEN[:3], batch_size=3, projection=20)
    assert max(held) <= 4
    close(other.packed, one.packed, 1e-10)
    assert torch.equal(other.counts, one.counts)
    assert other.facts()["penalty"] == pytest.approx(one.facts()["penalty"], rel=1e-3)


# -- standardised exactly -----------------------------------------------------------------------------


class Shown(Rows):
    """Examples with given features."""


def shown(found: Tensor, targets: Sequence[int], classes: str = "ab", index: int = 0) -> Task:
    train: Any = Shown(found, targets)
    return Task(index, f"task-{index}", tuple(classes), train)


def mixed(tasks: Sequence[Task]) -> tuple[Tensor, list[int], str]:
    """All examples of some tasks as those of one, with its classes."""
    classes = "".join(dict.fromkeys(c for t in tasks for c in t.classes))
    found, targets = everything(tasks, list(classes))
    return found, targets.tolist(), classes


def test_golden_value_of_standardised_rows() -> None:
    """Three rows by hand: x has mean 2 and variance 2/3, so A = 3 + 1 and W = Σ x (y − ȳ) / 4."""
    head = Ridge(1, penalty=1 / 3)  # of tr Gₓ / M = 3
    teach(head, shown(torch.tensor([[1.0], [2.0], [3.0]]), [0, 1, 1]))
    assert float(head.chosen) == pytest.approx(1)
    deviation = math.sqrt(2 / 3)
    slope = -1 / deviation / 4 / deviation  # of class a: Σ x y = −1 / s
    torch.testing.assert_close(head.weight, torch.tensor([[slope, -slope]]), rtol=0, atol=1e-6)
    torch.testing.assert_close(head.centre, torch.tensor([2.0]))
    torch.testing.assert_close(head.offset, torch.tensor([1 / 3, 2 / 3]))
    wanted = float(head.scale) * torch.tensor([[1 / 3, 2 / 3]])
    torch.testing.assert_close(head(torch.tensor([[2.0]])), wanted, msg="at the mean only the intercept is left")


@pytest.mark.parametrize("penalty", [1e-2, "chosen"])
def test_scale_and_shift_of_features_change_no_score(penalty: float | str) -> None:
    tasks = TEN[:3]
    stretch = 10 ** torch.linspace(-2, 2, D)
    shift = torch.linspace(-3, 3, D) * stretch  # of the size of the deviation, or float32 cannot hold the features
    new = torch.cat([features(c, 4, "new") for c in "abcdef"])
    for standardise in (True, False):
        plain = learned(tasks, penalty=penalty, standardise=standardise)
        other = Ridge(D, penalty=penalty, standardise=standardise)
        for task in tasks:
            # Type: ignore[arg-type,attr-defined]
            teach(other, shown(task.train.features * stretch + shift, task.train.targets, task.classes, task.index))
        one, two = plain(new) / plain.scale, other(new * stretch + shift) / other.scale
        same = float((one - two).abs().max()) < 1e-5
        assert same == standardise, "the control: without standardising they change"
        if standardise:
            # in float64, what the features' own rounding leaves
            close(kept_weights(other)[:-1] * stretch[:, None], kept_weights(plain)[:-1], 1e-5)


@pytest.mark.parametrize("sums", ["float64", "float32"])
@pytest.mark.parametrize("value", [0.0, 1.0, 1234.567, 1e6, -0.1])
def test_columns_that_are_constant_take_no_part(value: float, sums: str) -> None:
    """Nothing blows up when they move afterwards; while they are the same, they change nothing."""
    task = task_of(0, "abc", 40)
    plain: Any = Ridge(D, sums=sums, penalty=0.01)
    teach(plain, task)
    found = torch.cat([task.train.features, torch.full((120, 1), value)], 1)  # type: ignore[attr-defined]
    head: Any = Ridge(D + 1, sums=sums, penalty=0.01 * (D + 1) / D)  # a share of tr Gₓ / M, where it counts as none
    teach(head, shown(found, task.train.targets, "abc"))
    assert not head.weight[-1].any()
    assert float(head.chosen) == pytest.approx(float(plain.chosen))
    chosen: Any = Ridge(D + 1, sums=sums)
    teach(chosen, shown(found, task.train.targets, "abc"))
    assert not chosen.weight[-1].any()
    new = torch.cat([features(c, 4, "new") for c in "abc"])
    at, moved = (F.pad(new, (0, 1), value=v) for v in (value, value + 1000))
    assert torch.equal(head(at), head(moved))
    torch.testing.assert_close(head(at), plain(new), rtol=1e-4, atol=1e-5)
    control = Ridge(D + 1, standardise=False, penalty=1e-9)
    teach(control, shown(found, task.train.targets, "abc"))
    if value and value != 1.0:
        assert not torch.allclose(control(at), control(moved), atol=1e-3), "the control: bare rows do move"


def test_a_column_that_begins_to_vary_takes_part() -> None:
    """What was constant in the first task is not for ever: the sums know all rows."""
    first, second = task_of(0, "ab", 20), task_of(1, "cd", 20)
    for task in (first, second):
        task.train.features[:, 0] = 5.0  # type: ignore[attr-defined]
    second.train.features[torch.tensor(second.train.targets) == 1, 0] = 9.0  # type: ignore[attr-defined]
    head = learned([first])
    assert not head.weight[0].any()
    teach(head, second)
    assert head.weight[0].any()
    _, wanted, _ = joint(head, [first, second])
    close(solution(head), wanted, 1e-8)


@every_kind
def test_one_class_alone_is_the_answer(options: dict[str, Any]) -> None:
    head = learned([task_of(0, "a", 30)], **options)
    new = features("a", 4, "new")
    assert torch.isfinite(head(new)).all()
    assert torch.isfinite(head.weight).all()
    assert math.isfinite(float(head.chosen))
    assert float(head.chosen) > 0
    teach(head, task_of(1, "b", 30))
    assert head(features("b", 9, "new")).argmax(1).float().mean() > 0.8
    _, wanted, _ = joint(head, [task_of(0, "a", 30), task_of(1, "b", 30)])
    close(solution(head), wanted, 1e-8)


@every_kind
def test_one_example_alone(options: dict[str, Any]) -> None:
    train: Any = Rows(features("a", 1), [0])
    head = learned([Task(0, "one", ("a",), train)], **options)
    assert torch.isfinite(head(features("a", 4, "new"))).all()
    assert head(features("a", 4, "new")).argmax(1).tolist() == [0] * 4
    teach(head, task_of(1, "bc", 30))
    assert torch.isfinite(head(features("b", 4, "new"))).all()
    assert head(features("b", 9, "new")).argmax(1).tolist().count(1) > 6


def test_two_identical_examples_are_told() -> None:
    """Of two classes: nothing tells them apart. Of one class too: there is nothing to standardise by."""
    same = features("a", 1).repeat(2, 1)
    for targets in ([0, 1], [0, 0]):
        head = Ridge(D)
        with pytest.raises(PerpetuneError, match="the features of all 2 examples so far are the same") as caught:
            teach(head, shown(same, targets))
        assert "\n" not in str(caught.value)
        teach(head, task_of(1, "ab"))
        assert torch.isfinite(head(features("a", 3))).all()
    bare = Ridge(D, standardise=False)
    teach(bare, shown(same, [0, 0]))
    assert torch.isfinite(bare(same)[:, 0]).all()


def test_float32_sums_are_half_as_many_bytes_and_near() -> None:
    tasks = [task_of(i, ALPHABET[2 * i : 2 * i + 2], 300) for i in range(4)]
    for options in ({}, {"projection": 20}, {"projection": 5, "kind": "orthogonal"}):
        exact = learned(tasks, batch_size=64, penalty=1e-2, **options)  # type: ignore[arg-type]
        small = learned(tasks, batch_size=64, penalty=1e-2, sums="float32", **options)  # type: ignore[arg-type]
        assert small.packed.dtype == torch.float32
        assert 2 * small.packed.nbytes == exact.packed.nbytes
        assert small.cross.dtype == torch.float64
        close(kept_weights(small), kept_weights(exact), 1e-5)
        assert not torch.equal(small.packed.double(), exact.packed), "the control: they are rounded"
        unlike = learned(tasks[:3], batch_size=64, penalty=1e-2, **options)  # type: ignore[arg-type]
        assert float((kept_weights(unlike)[:, :6] - kept_weights(exact)[:, :6]).norm()) > 0.01


def test_what_is_kept_of_another_order_is_the_same_in_float32_sums_too() -> None:
    one = learned(TEN[:4], penalty=1e-2, sums="float32")
    tasks = [task_of(i, TEN[k].classes) for i, k in enumerate((2, 0, 3, 1))]  # type: ignore[arg-type]
    other = learned(tasks, 3, penalty=1e-2, sums="float32")
    close(kept_weights(other), kept_weights(one)[:, one.rows(other.classes)], 1e-5)


class TapRidge:
    """A second implementation as a reference: sums of `[z, 1]`, standardised by a change of basis.

    The one difference is that the intercept is not penalised there.
    """

    def __init__(self, width: int, classes: int):
        self.gram = torch.zeros(width + 1, width + 1, dtype=torch.float64)
        self.cross = torch.zeros(width + 1, classes, dtype=torch.float64)

    def add(self, z: Tensor, targets: Tensor) -> None:
        h = F.pad(z.double(), (0, 1), value=1.0)
        self.gram += h.T @ h
        self.cross += h.T @ F.one_hot(targets, self.cross.shape[1]).double()

    def solve(self, share: float) -> Tensor:
        count, sums = self.gram[-1, -1], self.gram[-1, :-1]
        mean = sums / count
        deviation = (self.gram.diagonal()[:-1] / count - mean.square()).sqrt()
        basis = torch.eye(len(self.gram), dtype=torch.float64)
        basis[:-1, :-1] = torch.diag(1 / deviation)
        basis[-1, :-1] = -mean / deviation
        moved = basis.T @ self.gram @ basis
        ridged = share * moved.diagonal().mean() * torch.ones(len(moved), dtype=torch.float64)
        ridged[-1] = 0
        return basis @ torch.linalg.solve(moved + ridged.diag(), basis.T @ self.cross)


def test_it_is_the_reference_of_the_design_page() -> None:
    """Of `c`, the mean diagonal, the 1 of the intercept is one: all are n."""
    found, targets, classes = mixed(TEN)
    reference = TapRidge(D, len(classes))
    reference.add(found, torch.tensor(targets))
    for share in (1e-4, 1e-2, 1.0):
        head = learned(TEN, penalty=share)
        close(solution(head), reference.solve(share), 1e-8)
        assert head.classes == list(classes)


def test_an_orthogonal_projection_keeps_lengths_in_its_span() -> None:
    head = learned(TEN[:1], projection=5, kind="orthogonal")
    eye = head.projected.double().T @ head.projected.double()
    torch.testing.assert_close(eye, torch.eye(5, dtype=torch.float64), atol=1e-6, rtol=0)
    again = learned(TEN[:1], projection=5, kind="orthogonal")
    assert torch.equal(again.projected, head.projected)
    other = learned([task_of(0, "ab", runtime=Runtime(seed=1))], projection=5, kind="orthogonal")
    assert not torch.allclose(other.projected, head.projected)
    assert (head.expand(features("a", 9)) < 0).any(), "no relu"
    for width in (D, D + 3):
        with pytest.raises(
            UsageError, match="saves nothing, because the features have 8: set projection to 0"
        ) as caught:
            learned(TEN[:1], projection=width, kind="orthogonal")
        assert "\n" not in str(caught.value)


def test_an_orthogonal_projection_that_is_too_wide_is_told_before_anything_is_learned() -> None:
    backbone = tiny_backbone()
    head = {"name": "ridge", "projection": backbone.dim, "kind": "orthogonal"}
    with pytest.raises(UsageError, match="saves nothing"):
        build_method(make_recipe({"method": "frozen", "pet": None, "head": head}), backbone)
    twice = {"method": {"name": "first_session", "concat": True}, "pet": "lora", "head": head}
    build_method(make_recipe(twice), tiny_backbone())  # features are twice as wide there


# -- several processes --------------------------------------------------------------------------------


class Together(Runtime):
    """One of several processes, which are threads here and add up through a list."""

    def __init__(self, rank: int, world: int, barrier: threading.Barrier, sent: list[Tensor | None]):
        super().__init__()
        self._rank, self._world, self._barrier, self._sent = rank, world, barrier, sent

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world(self) -> int:
        return self._world

    def sum(self, value: Tensor) -> Tensor:
        self._sent[self._rank] = value.clone()
        self._barrier.wait(60)
        total = torch.stack([t for t in self._sent if t is not None]).sum(0)
        self._barrier.wait(60)
        return total


def by_several(world: int, tasks: Sequence[tuple[int, str, int]], **options: Any) -> list[Ridge]:
    barrier, sent, heads = threading.Barrier(world), [None] * world, [Ridge(D, **options) for _ in range(world)]
    failed: list[BaseException] = []

    def process(rank: int) -> None:
        try:
            for index, classes, each in tasks:
                runtime = Together(rank, world, barrier, sent)  # type: ignore[arg-type]
                teach(heads[rank], task_of(index, classes, each, runtime), batch_size=4)
        except BaseException as error:  # noqa: BLE001  it is raised again below
            failed.append(error)
            barrier.abort()

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return heads


@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("options", [*KINDS.values(), {"projection": 80}], ids=[*KINDS, "M=80"])
def test_two_processes_sum_up_what_one_does(options: dict[str, Any], balance: bool) -> None:
    """What was there before counts once; every process ends with the same bits."""
    plan = [(0, "ab", 7), (1, "cde", 5), (2, "a", 3)]
    one = learned([task_of(*t) for t in plan], balance=balance, **options)
    first, second = by_several(2, plan, balance=balance, **options)
    for name in (*module.SUMS, *module.SOLVED, "chosen"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert torch.equal(first.counts, one.counts)
    # In float32 the projection rounds otherwise where a batch is of another size.
    share = 1e-10
    close(first.packed, one.packed, share)
    close(first.cross, one.cross, share)
    assert float(first.mass) == pytest.approx(float(one.mass), rel=1e-10)
    new = torch.cat([features(c, 4, "new") for c in one.classes])
    assert torch.equal(first(new).argmax(1), one(new).argmax(1))


def test_more_processes_than_examples() -> None:
    one = learned([task_of(0, "ab", 1), task_of(1, "c", 2)], projection=20, penalty=0.1)
    for head in by_several(3, [(0, "ab", 1), (1, "c", 2)], projection=20, penalty=0.1):
        close(head.packed, one.packed, 1e-10)
        assert torch.equal(head.counts, one.counts)
        torch.testing.assert_close(head.weight, one.weight, rtol=1e-4, atol=1e-5)


# -- the projection -----------------------------------------------------------------------------------


def method_of(**options: Any) -> Frozen:
    method = Frozen(Classifier(tiny_backbone(), Ridge(32, **options)))
    method.requires_grad_(False).eval()
    return method


def test_the_projection_is_stored_as_its_seed() -> None:
    head = learned(TEN[:2], projection=20)
    assert "projected" not in head.state_dict()
    assert sorted(head.state_dict().keys()) == sorted(
        [*module.SUMS, "weight", "chosen", "scale", "_extra_state", "probe.weight", "probe.scale", "probe._extra_state"]
    )
    drawn = torch.randn(D, 20, generator=generator("ridge", head.seed or 0)) / math.sqrt(D)
    assert torch.equal(head.projected, drawn)


@pytest.mark.parametrize("sums", ["float64", "float32"])
@every_kind
def test_it_comes_back_from_files_and_goes_on(options: dict[str, Any], sums: str) -> None:
    method, other = method_of(sums=sums, **options), method_of(sums=sums, **options)
    head = method.model.head
    assert isinstance(head, Ridge)
    head.grow("ab", generator("seed"))
    head.expect(torch.tensor([3, 3]))
    head.observe(torch.randn(6, 32, generator=generator("f")), torch.tensor([0, 1, 0, 1, 0, 1]))
    head.flush()
    head.settle()
    restore(other, snapshot(method), "memory")
    back = other.model.head
    assert isinstance(back, Ridge)
    assert torch.equal(back.projected, head.projected)
    new = torch.randn(5, 32, generator=generator("new"))
    assert torch.equal(back(new), head(new))
    for one in (head, back):
        one.grow("c", generator("another seed"))
        one.expect(torch.tensor([0, 1, 3]))
        one.observe(torch.randn(4, 32, generator=generator("g")), torch.tensor([2, 1, 2, 2]))
        one.flush()
        one.settle()
    assert torch.equal(back(new), head(new))
    assert snapshot(method) == snapshot(other)
    untouched = method_of(sums=sums, **options)
    restore(other, snapshot(untouched), "memory")
    assert snapshot(other) == snapshot(untouched), "back to a head that has learned nothing"
    assert other.model.head(new).shape == (5, 0)


def test_a_state_without_a_centre_is_that_of_rows_as_they_are() -> None:
    """As states were stored before rows could be standardised."""
    head, back = learned(TEN[:2], projection=20), Ridge(D, projection=20)
    stored = head.state_dict()
    assert not {"centre", "offset"} & stored.keys()
    back.set_extra_state(stored["_extra_state"])
    back.probe.set_extra_state(stored["probe._extra_state"])
    back.load_state_dict(stored)
    assert torch.equal(back(features("a", 3)), head(features("a", 3)))
    assert {"centre", "offset"} <= learned(TEN[:2]).state_dict().keys()


@every_kind
def test_the_head_is_one_linear_map_without_the_sums(options: dict[str, Any]) -> None:
    """As it is exported."""
    head = learned(TEN[:3], **options)
    folded, z = head.folded(), features("a", 5)
    if folded.projected is not None:
        z = F.relu(z @ folded.projected)
    assert (folded.projected is None) == (not head.projection or head.kind == "orthogonal")
    scores = z.double() @ folded.weight.mT + folded.bias
    torch.testing.assert_close(head(features("a", 5)), scores.float(), rtol=1e-4, atol=1e-4)


def test_another_run_has_another_projection() -> None:
    heads = [learned([task_of(0, "ab", runtime=Runtime(seed=seed))], projection=20) for seed in (0, 0, 1)]
    assert torch.equal(heads[0].projected, heads[1].projected)
    assert not torch.allclose(heads[0].projected, heads[2].projected)


def test_later_tasks_leave_the_projection() -> None:
    head = learned(TEN[:1], projection=20)
    before = head.projected.clone()
    teach(head, TEN[1])
    assert torch.equal(head.projected, before)


# -- kinds of numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_touches_neither_sums_nor_answers(dtype: torch.dtype) -> None:
    head, other = learned(TEN[:2], projection=20), learned(TEN[:2], projection=20)
    other.to(dtype)
    assert other.probe.weight.dtype == dtype
    for name in (*module.SUMS, "weight", "chosen", "scale", "projected"):
        assert torch.equal(getattr(other, name), getattr(head, name)), name
        assert getattr(other, name).dtype == getattr(head, name).dtype, name
    new = features("a", 5)
    assert torch.equal(other(new), head(new))
    assert torch.equal(other(new.to(dtype)), head(new.to(dtype).float()))
    for one in (head, other):
        one.expect(torch.tensor([2, 0, 0, 0]))
        one.observe(features("a", 2), torch.tensor([0, 0]))
        one.flush()
        one.settle()
    assert torch.equal(other.packed, head.packed)


def test_autocast_touches_neither_sums_nor_answers() -> None:
    plain = learned(TEN[:2], projection=20)
    with torch.autocast("cpu", torch.bfloat16):
        head = learned(TEN[:2], projection=20)
        scores = head(features("a", 5))
    for name in (*module.SUMS, "weight", "scale"):
        assert torch.equal(getattr(head, name), getattr(plain, name)), name
    assert torch.equal(scores, plain(features("a", 5)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite_are_told_and_not_added(bad: float) -> None:
    head = learned(TEN[:1], projection=20)
    before = {k: v.clone() for k, v in head.state_dict().items() if isinstance(v, Tensor)}
    task = task_of(1, "cd")
    task.train.features[8, 3] = bad  # type: ignore[attr-defined]
    name = task.classes[task.train.targets[8]]
    with pytest.raises(PerpetuneError) as caught:
        teach(head, task, batch_size=4)
    message = str(caught.value)
    assert message.startswith(f"head: ridge: features of an example of class {name} are not finite")
    assert "lower train.lr" in message
    assert "\n" not in message
    after = head.state_dict()
    for key in ("packed", "mass", "chosen", "scale"):
        assert torch.equal(after[key], before[key]), key
    assert torch.equal(head.cross[:, :2], before["cross"])
    assert not head.cross[:, 2:].any()
    assert head.counts.tolist() == [*before["counts"].tolist(), 0, 0]
    teach(head, task_of(1, "cd"), batch_size=4)
    gram, _, _ = joint(head, [TEN[0], task_of(1, "cd")])
    close(ridge.dense(head.packed, 20), gram, 1e-10)


def test_features_that_are_all_zero_are_told() -> None:
    head = Ridge(D, projection=20)
    task = task_of(0, "ab")
    task.train.features.zero_()  # type: ignore[attr-defined]
    with pytest.raises(PerpetuneError, match="examples so far are zero") as caught:
        teach(head, task)
    assert "\n" not in str(caught.value)


# -- the scale ----------------------------------------------------------------------------------------


def left_out(head: Ridge, tasks: Sequence[Task], weights: Tensor, at: int) -> Tensor:
    """Scores of one example of all, of a regression that has not seen it; mean and scale of columns are held."""
    found, targets = everything(tasks, head.classes)
    h, ridged = rows_of(head, found), float(head.chosen) * torch.ones(head.rank, dtype=torch.float64)
    if head.standardise:
        mean, deviation = standard_of(h[:, :-1], weights)
        h[:, :-1] = (h[:, :-1] - mean) / deviation
        ridged[-1] = 0
    kept = torch.arange(len(h)) != at
    own = weights[kept, None] * h[kept]
    gram = own.mT @ h[kept] + ridged.diag()
    hot = F.one_hot(targets[kept], len(head.classes)).double()
    return h[at] @ torch.linalg.solve(gram, own.mT @ hot)


@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize("sample", [256, 5])
@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("projection", [12, 200], ids=["primal", "dual"])
def test_the_scale_makes_examples_likeliest_that_were_left_out(
    projection: int, balance: bool, sample: int, standardise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best of `SCALES` by brute force: a regression without each row of the last task's sample."""
    monkeypatch.setattr(module, "SAMPLE", sample)
    tasks: list[Task] = []
    head = Ridge(D, projection=projection, balance=balance, penalty=0.05, standardise=standardise)
    weights = torch.empty(0).double()
    for task in (task_of(0, "ab", [9, 4]), task_of(1, "cd", [6, 7])):
        teach(head, task)
        targets, before = torch.tensor(task.train.targets), len(weights)
        ideal = len(targets) / 2 / torch.bincount(targets).double()[targets]
        weights = torch.cat([weights, ideal if balance else torch.ones(len(targets)).double()])
        tasks.append(task)
        solver = "dual" if projection == 200 and task.index == 0 else "primal"
        assert head.facts()["solver"] == solver
        step = math.ceil(len(targets) / sample)
        picked = range(before, len(weights), step)
        scores = torch.stack([left_out(head, tasks, weights, at) for at in picked])
        rows = head.rows(task.classes)[targets][::step]
        smooth = 1 / (len(rows) + 2)
        losses = [float(F.cross_entropy(scores * s, rows, label_smoothing=smooth)) for s in module.SCALES]
        assert float(head.scale) == pytest.approx(module.SCALES[losses.index(min(losses))])


def test_examples_that_are_all_told_apart_do_not_ask_for_infinity() -> None:
    head = Ridge(D, projection=0, penalty=1e-6)
    features = torch.eye(D)[torch.arange(60) % 2] + 0.01 * torch.randn(60, D, generator=generator("apart"))
    head.grow(["a", "b"], generator("grow"))
    head.expect(torch.tensor([30, 30]))
    head.observe(features, torch.arange(60) % 2)
    head.flush()
    head.settle()
    assert 1 < float(head.scale) < 20  # scores are near 0 and 1


def test_a_given_scale_stays() -> None:
    head, calibrated = learned(TEN[:2], projection=20, scale=3.0), learned(TEN[:2], projection=20)
    assert float(head.scale) == 3.0
    assert 1 <= float(calibrated.scale) <= 1000
    new = torch.cat([features(c, 4, "new") for c in head.classes])
    assert torch.equal(head(new).argmax(1), calibrated(new).argmax(1))
    torch.testing.assert_close(head(new) / 3, calibrated(new) / calibrated.scale)


# -- what it tells ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("penalty", "cure"), [("chosen", "the chosen penalty reduces this"), (0.1, "set penalty: chosen")]
)
def test_as_many_examples_as_random_features_are_warned_of(penalty: float | str, cure: str) -> None:
    head = Ridge(D, projection=20, penalty=penalty)
    found = {}
    for index, classes in enumerate(("ab", "cd", "ef")):
        teach(head, task_of(index, classes, [4, 4]))
        found[head.facts()["rows"]] = head.facts()["warning"]
    assert found[8] is None
    assert found[16] == (
        "head ridge has seen 16 examples with 20 features: a regression overfits most if both numbers are about the "
        f"same; {cure}, or choose a projection well below or above"
    )
    assert found[24] is not None
    teach(head, task_of(3, "gh", 4))
    assert head.facts()["rows"] == 32
    assert head.facts()["warning"] is None


def test_facts_are_plain_and_true() -> None:
    import json

    head = learned(TEN[:2], projection=20)
    facts = head.facts()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["rows"] == 24
    assert facts["dim"] == 20
    assert facts["penalty"] == float(head.chosen)
    unit = ridge.trace(head.packed, 20) / 20
    assert facts["share"] == pytest.approx(facts["penalty"] / unit)
    assert facts["scale"] == float(head.scale)
    assert facts["bytes"] == 8 * (len(head.packed) + 20 * 4 + 4 + 1)
    assert 0 < facts["freedom"] < 20


# -- copies, and starting anew ------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[250] + 10 * [5], [20] + 20 * [6], [100] + 5 * [20]], ids=str)
def test_small_updates_with_repeats_leave_the_penalty_sane(sizes: list[int]) -> None:
    """One in five pictures is nearly one that was there before, as in folders of bursts, and M is not reached."""
    dim, classes, width = 32, 10, 300
    drawn = generator("repeats")
    centres = torch.randn(classes, dim, generator=drawn)

    def pictures(count: int) -> tuple[Tensor, Tensor]:
        of = torch.randint(0, classes, (count,), generator=drawn)
        return centres[of] + 1.5 * torch.randn(count, dim, generator=drawn), of

    head = Ridge(dim, projection=width)
    head.grow([str(c) for c in range(classes)], generator("head"))
    shown, targets = pictures(sum(sizes))
    for first, size in zip(torch.tensor([0, *sizes]).cumsum(0).tolist(), sizes, strict=False):
        again = torch.arange(first + size - size // 5, first + size)
        like = torch.randint(0, int(again[0]), (len(again),), generator=drawn)
        shown[again] = shown[like] + 0.05 * torch.randn(len(again), dim, generator=drawn)
        targets[again] = targets[like]
        head.expect(torch.bincount(targets[first : first + size], minlength=classes))
        head.observe(shown[first : first + size], targets[first : first + size])
        head.flush()
        head.settle()
        assert 0.01 < head.facts()["share"] < 10
    asked, answers = pictures(2000)
    rows = head.expand(asked.double())
    unit = ridge.trace(head.packed, width) / width
    count = int(head.counts.sum())

    def right(share: float) -> float:
        weights = ridge.primal(head.packed, head.cross, count, count, share * unit).weights
        return float(((rows @ weights).argmax(1) == answers).double().mean())

    best = max(right(10 ** (i / 2)) for i in range(-6, 3))
    assert float((head(asked).argmax(1) == answers).double().mean()) > best - 0.05
    assert right(1e-5) < best - 0.1, "the control"


def test_a_copy_learns_alone() -> None:
    head = learned(TEN[:1], projection=20)
    other = copy.deepcopy(head)
    before = {k: v.clone() for k, v in head.state_dict().items() if isinstance(v, Tensor)}
    teach(other, TEN[1])
    assert all(torch.equal(head.state_dict()[k], v) for k, v in before.items())
    teach(head, TEN[1])
    assert torch.equal(other(features("a", 3)), head(features("a", 3)))


def test_reset_is_as_new() -> None:
    head = learned(TEN[:2], projection=20)
    head.reset()
    fresh = Ridge(D, projection=20)
    assert head.facts() == {}
    for name in (*module.SUMS, "weight", "chosen", "scale", "projected"):
        assert torch.equal(getattr(head, name), getattr(fresh, name)), name
        assert getattr(head, name).dtype == getattr(fresh, name).dtype, name
    for one in (head, fresh):
        teach(one, TEN[2])
    assert torch.equal(head(features("e", 3)), fresh(features("e", 3)))


@pytest.mark.parametrize("projection", [0, 20])
def test_wider_statistics_leave_the_probe(projection: int) -> None:
    """As a method asks that shows it two features beside each other."""
    head = Ridge(D, projection=projection)
    head.widen(2 * D)
    task = task_of(0, "ab")
    head.grow(task.classes, task.generator("head"))
    learn_statistics(task, 5, [(head, lambda batch: batch.inputs.pixels.repeat(1, 2))])
    twice = features("a", 3).repeat(1, 2)
    assert head.weight.shape == (projection or 2 * D, 2)
    assert head(twice).argmax(1).tolist() == [0, 0, 0]
    assert head.probe.weight.shape == (2, D)
    assert head.logits(features("a", 3)).shape == (3, 2)


def test_what_is_trained_is_the_probe() -> None:
    head = learned(TEN[:1], projection=20)
    assert [n for n, _ in head.named_parameters()] == ["probe.weight"]
    assert head.per_class()[0] is head.probe.weight
    before = head(features("a", 3))
    with torch.no_grad():
        head.probe.weight.normal_(generator=generator("probe"))
    assert torch.equal(head(features("a", 3)), before)
    assert [n for n, _ in Ridge(D, learn_scale=True).named_parameters()] == ["probe.weight", "probe.scale"]

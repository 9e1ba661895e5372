"""The head `drawn`: its sums against all features at once, and its training against plain SGD on the same draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from test_heads import Holder, assert_equal
from torch import Tensor
from torch.distributions import MultivariateNormal
from torch.nn import functional as F

from perpetune.errors import PerpetuneError
from perpetune.heads import Drawn
from perpetune.heads.drawn import FLOOR
from perpetune.seeding import generator
from perpetune.snapshot import restore, snapshot

D = 5
FAST: dict[str, Any] = {"epochs": 15, "lr": 0.05}
both = pytest.mark.parametrize("covariance", ["diagonal", "full"])
Stored = list[tuple[Tensor, Tensor]]


def stored(tasks: int = 3, each: int = 40, seed: int = 0) -> Stored:
    """For each task features of its two classes, which have a shape of their own, and their rows."""
    found = []
    for task in range(tasks):
        rows = torch.arange(each) % 2 + 2 * task
        mixed = torch.randn(2 * tasks, D, D, generator=generator("shape")) / math.sqrt(D)
        means = 4 * torch.randn(2 * tasks, D, generator=generator("means")) + 1
        noise = torch.randn(each, D, generator=generator("drawn test", task, seed))
        found.append((means[rows] + torch.einsum("nd,nde->ne", noise, mixed[rows]), rows))
    return found


def names(tasks: int) -> list[str]:
    return [str(row) for row in range(2 * tasks)]


def learned(data: Stored, batch: int = 7, word: str = "grow", **options: Any) -> Drawn:
    head = Drawn(D, **{**FAST, **options})
    for task, (features, rows) in enumerate(data):
        head.grow(names(task + 1), generator(word, task))
        show(head, features, rows, batch)
        head.settle()
    return head


def show(head: Drawn, features: Tensor, rows: Tensor, batch: int = 7) -> None:
    for part, of in zip(features.split(batch), rows.split(batch), strict=True):
        head.observe(part, of)


def accuracy(head: Drawn, data: Stored) -> float:
    features, rows = (torch.cat(parts) for parts in zip(*data, strict=True))
    return float((head(features).argmax(1) == rows).float().mean())


# -- sums ---------------------------------------------------------------------------------------------


@both
def test_the_gaussians_are_those_of_all_features_at_once_in_any_order(covariance: str) -> None:
    data = stored()
    order = torch.randperm(40, generator=generator("order"))
    head, other = learned(data, covariance=covariance), Drawn(D, covariance=covariance)  # type: ignore[arg-type]
    other.grow(names(3), generator("grow"))
    for features, rows in reversed(data):
        show(other, features[order], rows[order], 11)
    halves = [Drawn(D, covariance=covariance) for _ in range(2)]  # type: ignore[arg-type]  # two processes
    for number, half in enumerate(halves):
        half.grow(names(3), generator("grow"))
        for features, rows in data:
            show(half, features[number::2], rows[number::2])
    for one, two, *parts in zip(head.additive(), other.additive(), *(h.additive() for h in halves), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(parts[0] + parts[1], one, rtol=1e-12, atol=1e-12)
    assert {t.dtype for t in head.additive()} == {torch.float64, torch.int64}
    features, rows = (torch.cat(parts) for parts in zip(*data, strict=True))
    for row in range(6):
        mine = features[rows == row].double()
        mean, spread = head.gaussian(row)
        wanted = torch.cov(mine.T, correction=0) + FLOOR * torch.eye(D)
        found = spread @ spread.T if covariance == "full" else spread.square()
        torch.testing.assert_close(mean, mine.mean(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found, wanted if covariance == "full" else wanted.diag(), rtol=1e-9, atol=1e-9)


def test_class_after_class_without_variance_is_drawn_at_its_mean() -> None:
    head = Drawn(D, covariance="full", **FAST)
    head.grow("ab", generator("grow"))
    point = 1000 * torch.ones(1, D)  # rounding must not make a variance negative
    head.observe(point.repeat(3, 1), torch.zeros(3, dtype=torch.int64))
    assert torch.allclose(head.gaussian(0)[1] @ head.gaussian(0)[1].T, FLOOR * torch.eye(D).double(), atol=1e-8)
    head.observe(-point, torch.ones(1, dtype=torch.int64))
    head.settle()
    assert head(torch.cat([point, -point])).argmax(1).tolist() == [0, 1]


# -- training -----------------------------------------------------------------------------------------


def by_hand(head: Drawn, start: Tensor, classes: Sequence[int], share: float = 1.0, learning: int | None = None) -> Any:
    """A layer `[W, b]` trained by SGD, written out, on the draws of `head`.

    Args:
        start: `(C, D + 1)`.
        classes: the rows that are drawn.
        share: of the draws that is used.
        learning: only draws of these last classes are used.
    """
    rng = generator("drawn", head.seed or 0, int(head.counts.sum()))
    layer, velocity = start.double(), torch.zeros(start.shape, dtype=torch.float64)
    means, spread = (torch.stack(parts) for parts in zip(*(head.gaussian(row) for row in classes), strict=True))
    for epoch in range(head.epochs):
        noise = torch.randn(len(classes), head.samples, D, generator=rng).double()
        around = noise @ spread.mT if head.full else noise * spread[:, None]
        x = F.pad((means[:, None] + around).flatten(0, 1), (0, 1), value=1.0)
        order = torch.randperm(len(x), generator=rng)
        order = order[: round(share * len(x))]
        if learning is not None:
            order = order[order // head.samples >= len(classes) - learning]
        lr = head.lr * (1 + math.cos(math.pi * epoch / head.epochs)) / 2
        for part in order.split(head.batch_size):
            hot = F.one_hot(part // head.samples, len(classes)).double()
            slope = ((x[part] @ layer.T).softmax(1) - hot).T @ x[part] / len(part) + 5e-4 * layer
            velocity = 0.9 * velocity + slope
            layer = layer - lr * velocity
    return layer


def layer_of(head: Drawn) -> Tensor:
    return torch.cat([head.weight, head.bias[:, None]], 1)


@both
def test_all_that_is_drawn_of_all_classes_is_learned_from_where_the_layer_was(covariance: str) -> None:
    options = {"epochs": 4, "lr": 0.02, "samples": 50, "batch_size": 60, "covariance": covariance}
    data = stored()
    before, head = learned(data[:2], **options), learned(data[:2], **options)
    head.grow(names(3), generator("grow", 2))
    show(head, *data[2])
    probe = torch.cat([head.probe.weight, head.probe.bias[:, None]], 1).detach().clone()
    head.settle()
    start = torch.cat([layer_of(before), probe[4:]])
    wanted = by_hand(head, start, range(6))
    torch.testing.assert_close(layer_of(head).double(), wanted, rtol=1e-4, atol=1e-4)
    fewer = by_hand(head, start, range(6), share=2 / 3)  # P12: what HiDe's code uses of its draws at the third task
    assert float((layer_of(head) - fewer).abs().max()) > 1e-2


def test_it_finds_the_rule_of_bayes() -> None:
    """Classes of one covariance; the best rule is linear and needs the covariance."""
    shape = torch.eye(D)
    shape[0, 1] = shape[1, 0] = 0.97
    means = torch.zeros(3, D)
    means[1, 0], means[2, 2] = 0.8, 4.0
    density = MultivariateNormal(means, covariance_matrix=shape)
    root = torch.linalg.cholesky(shape)
    rows = torch.arange(3000) % 3
    x, asked = (means[rows] + torch.randn(3000, D, generator=generator("x", n)) @ root.T for n in (0, 1))
    best = density.log_prob(asked[:, None]).argmax(1)
    agreed = {}
    for covariance in ("full", "diagonal"):
        head = Drawn(D, covariance=covariance, samples=400, epochs=30, lr=0.3)  # type: ignore[arg-type]
        head.grow("abc", generator("grow"))
        head.observe(x, rows)
        head.settle()
        agreed[covariance] = float((head(asked).argmax(1) == best).float().mean())
    assert agreed["full"] > 0.98
    assert agreed["diagonal"] < 0.8, "the control: variances alone give another rule"


@both
def test_earlier_tasks_are_kept_and_learning_the_last_alone_forgets_them(covariance: str) -> None:
    data, new = stored(), stored(seed=1)
    head = learned(data, covariance=covariance)
    assert accuracy(head, new) > 0.95
    before = learned(data[:2], covariance=covariance)
    layer = by_hand(head, F.pad(layer_of(before), (0, 0, 0, 2)), range(6), learning=2).float()
    head.weight, head.bias = layer[:, :-1].contiguous(), layer[:, -1].contiguous()
    assert accuracy(head, new[2:]) > 0.95
    assert accuracy(head, new[:2]) < 0.6, "the control"


def test_the_seed_decides_all_draws_and_nothing_else_does() -> None:
    data = stored(2)
    before = torch.get_rng_state()
    one, same, other = learned(data), learned(data), learned(data, word="another")
    assert torch.equal(torch.get_rng_state(), before)
    assert_equal(one, same)
    assert not torch.equal(one.weight, other.weight)


# -- the probe ----------------------------------------------------------------------------------------


def test_a_new_row_starts_at_the_probes_and_a_class_that_returns_where_it_was() -> None:
    (features, rows), still = stored(1)[0], {"lr": 1e-12}
    head = Drawn(D, **still)
    head.grow("ab", generator("grow"))
    with torch.no_grad():
        head.probe.weight.normal_(generator=generator("trained"))
        head.probe.bias.fill_(3.0)
    start = head.probe.weight.detach().clone()
    assert torch.isneginf(head(features)).all(), "nothing was learned yet"
    assert torch.equal(head.logits(features), head.probe(features))
    show(head, features, rows)
    head.settle()
    torch.testing.assert_close(head.weight, start)
    torch.testing.assert_close(head.bias, torch.full((2,), 3.0))
    with torch.no_grad():
        head.probe.weight.zero_()
    show(head, features, rows)
    head.settle()
    torch.testing.assert_close(head.weight, start)
    assert not any(p.requires_grad for p in head.parameters())
    assert [id(p) for p in head.per_class()] == [id(p) for p in head.parameters()], "the layer is in no optimizer"


def test_a_probe_reads_some_columns_and_the_layer_all() -> None:
    features, rows = stored(1)[0]
    head = Drawn(D, **FAST)
    head.train_on(slice(3, 5))
    head.grow("ab", generator("grow"))
    assert torch.equal(head.logits(features), head.probe(features[:, 3:]))
    assert torch.equal(head.logits(features[:, 3:]), head.logits(features))
    show(head, features, rows)
    head.settle()
    assert accuracy(head, [(features, rows)]) == 1.0
    wide = Drawn(2, **FAST)
    wide.widen(D)
    wide.grow("ab", generator("grow"))
    show(wide, features, rows)
    wide.settle()
    assert accuracy(wide, [(features, rows)]) == 1.0
    assert wide.probe.weight.shape == (2, 2)


# -- what is kept -------------------------------------------------------------------------------------


@both
def test_what_is_stored_brings_the_head_back_and_it_goes_on(covariance: str) -> None:
    data = stored()
    head, other = learned(data[:2], covariance=covariance), learned(data[:1], word="other", covariance=covariance)
    restore(Holder(other), snapshot(Holder(head)), "memory")
    for one in (head, other):
        one.grow(names(3), generator("grow", 2))
        show(one, *data[2])
        one.settle()
    assert_equal(head, other)
    assert head.get_extra_state() == other.get_extra_state()
    assert torch.equal(head(data[0][0]), other(data[0][0]))
    head.reset()
    assert_equal(head, Drawn(D, covariance=covariance))  # type: ignore[arg-type]
    assert head.facts() == {}


def test_a_class_without_examples_never_wins_and_the_head_is_one_linear_map() -> None:
    data = stored(2)
    head = learned(data)
    head.grow(["empty"], generator("empty"))
    head.settle()
    features = torch.cat([data[0][0], 100 * data[1][0]])
    scores = head(features)
    assert torch.isneginf(scores[:, 4]).all()
    folded = head.folded()
    torch.testing.assert_close(features.double() @ folded.weight.T + folded.bias, scores.double(), rtol=1e-5, atol=1e-4)
    facts = head.facts()
    assert (facts["kind"], facts["rows"], facts["dim"]) == ("drawn", 80, D)
    assert 0 < facts["loss"] < 0.2
    moved = head.to("meta")  # stands for a device without float64
    assert {t.device.type for t in (moved.sums, moved.squares)} == {"cpu"}
    assert moved.weight.device.type == "meta"


def test_what_cannot_be_learned_is_told_and_changes_nothing() -> None:
    head = learned(stored(1))
    before, sums = layer_of(head), [t.clone() for t in head.additive()]
    with pytest.raises(PerpetuneError, match="drawn: features of an example of class 1 are not finite"):
        head.observe(torch.full((2, D), torch.nan), torch.tensor([1, 0]))
    assert all(torch.equal(a, b) for a, b in zip(sums, head.additive(), strict=True))
    head.lr = 1e30
    with pytest.raises(PerpetuneError, match=r"its layer has become infinite .* lower lr"):
        head.settle()
    assert torch.equal(layer_of(head), before)

"""Selectors: golden values, what each promises, and what each stores."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from warm import Warm

from perpetune import registry
from perpetune.errors import PerpetuneError, UsageError
from perpetune.fit import FitConfig, trainable
from perpetune.numerics.choosing import best, lowest, products
from perpetune.numerics.kmeans import kmeans
from perpetune.recipe import make_recipe
from perpetune.seeding import generator
from perpetune.selectors import Chosen, Selection, Selector
from perpetune.selectors.centres import Centres
from perpetune.selectors.classifier import LearnedClasses
from perpetune.selectors.controls import Random, Vote
from perpetune.selectors.gaussian import Gaussian
from perpetune.selectors.keys import Keys
from perpetune.selectors.means import Means
from perpetune.selectors.weights import Weights, not_orthogonal

WIDTH = 12
EVERY: dict[str, dict[str, Any]] = {
    "keys": {"top": 2},
    "keys, mean": {"name": "keys", "start": "mean", "spread": 1.0},
    "weights": {"orthogonal": 0.1},
    "centres": {"count": 3},
    "centres, l1": {"name": "centres", "count": 3, "metric": "l1"},
    "means": {},
    "means, euclidean": {"name": "means", "metric": "euclidean"},
    "gaussian": {},
    "classifier": {},
    "classifier, linear": {"name": "classifier", "head": "linear", "epochs": 20, "lr": 0.05},
    "classifier, full": {"name": "classifier", "head": "linear", "covariance": "full", "epochs": 20, "lr": 0.05},
    "random": {"top": 2},
    "last": {},
    "vote": {"top": 2},
}
STATISTICS = [name for name in EVERY if name.partition(",")[0] in ("centres", "means", "gaussian", "classifier")]


def made(name: str, width: int = WIDTH) -> Selector:
    options = dict(EVERY[name])
    kind = options.pop("name", name)
    selector = Selection(name=kind).bound(
        registry.find("selectors", kind), registry.options("selectors", kind, options)
    )
    return selector.make(width)


def task(number: int, count: int = 40, seed: int = 0, width: int = WIDTH) -> tuple[Tensor, Tensor, list[str]]:
    """Queries of two classes around a common direction; the classes have names of their own."""
    source = generator("queries", number, seed)
    means = torch.randn(2, width, generator=generator("means", number)) + 3
    targets = torch.arange(count) % 2
    return means[targets] + 0.4 * torch.randn(count, width, generator=source), targets, [f"{number}a", f"{number}b"]


def taught(selector: Selector, order: tuple[int, ...] = (0, 1, 2), width: int = WIDTH) -> Selector:
    for member, number in enumerate(order):
        queries, targets, classes = task(number, width=width)
        selector.grow(member + 1, generator("grow", number), queries)
        selector.learn(member, queries, targets, classes, generator("learn", number))
        selector.used(selector.pick(queries).index)
    return selector


def rows(tensor: list[list[float]]) -> Tensor:
    return torch.tensor(tensor, dtype=torch.float64)


# -- golden values ------------------------------------------------------------------------------------

QUERIES = rows([[1, 2, 2], [3, 0, 4], [0, 1, 0]])
KEYS = rows([[1, 0, 0], [0, 2, 0], [0, 0, 3], [1, 1, 1]])


def with_keys(keys: Tensor, kind: type[Keys] = Keys, **options: Any) -> Keys:
    selector = kind(keys.shape[1], **options).to(keys.dtype)
    selector.grow(len(keys), generator("keys"))
    selector.fresh.data = keys.clone()
    return selector


def test_g1_keys_choose_by_cosine_and_the_loss_is_a_mean_over_the_batch() -> None:
    keys = with_keys(KEYS, top=2, pull=0.1)
    cosines = rows([[0.3333, 0.6667, 0.6667, 0.9623], [0.6, 0, 0.8, 0.8083], [0, 1, 0, 0.5774]])
    torch.testing.assert_close(keys.scores(QUERIES), cosines, atol=5e-5, rtol=0)
    chosen = keys.choose(QUERIES)
    assert chosen.index.tolist() == [[3, 1], [3, 2], [1, 3]]  # of the equal ones the lower number
    assert chosen.weight is None
    loss = keys.loss(QUERIES, chosen)
    assert loss is not None
    assert float(loss.detach()) == pytest.approx(-0.1 * 1.6048526, abs=1e-8)
    assert with_keys(KEYS, pull=0.0).loss(QUERIES, chosen) is None


def test_g1_the_vote_of_the_batch_is_another_choice() -> None:
    """The official code breaks the tie of the first query for the third key; so does a query a little nearer to it."""
    queries = QUERIES + rows([[0, 0, 1e-9], [0, 0, 0], [0, 0, 0]])
    vote = with_keys(KEYS, Vote, top=2, pull=1.0)
    chosen = vote.choose(queries)
    assert [sorted(row) for row in chosen.index.tolist()] == [[2, 3]] * 3
    loss = vote.loss(queries, chosen)
    assert loss is not None
    assert float(-loss.detach()) == pytest.approx(1.2715193, abs=1e-7)
    alone = vote.choose(queries[2:])
    assert sorted(alone.index[0].tolist()) == [1, 3], "the companions of an example decide"


def test_g3_weights_are_cosines_of_what_each_member_attends_to() -> None:
    weights = Weights(3).double()
    weights.grow(2, generator("weights"))
    weights.fresh_attention.data, weights.fresh_keys.data = rows([[1, 1, 1], [0, 1, 2]]), rows([[1, 0, 0], [1, 1, 0]])
    chosen = weights.choose(rows([[1, 2, 0]]))
    assert chosen.index.tolist() == [[0, 1]]
    assert chosen.weight is not None
    torch.testing.assert_close(chosen.weight, rows([[0.4472136, 0.7071068]]), atol=5e-8, rtol=0)
    prompt = torch.einsum("bm,mld->bld", chosen.weight, torch.arange(12.0, dtype=torch.float64).view(2, 2, 3))
    wanted = rows([[4.2426407, 5.3969611, 6.5512814], [7.7056018, 8.8599222, 10.0142426]])
    torch.testing.assert_close(prompt[0], wanted, atol=5e-7, rtol=0)


@pytest.mark.parametrize(("metric", "wanted", "first"), [("l1", [0.5, 0.6], 0), ("l2", [0.25, 0.18], 1)])
def test_g4_the_nearest_centre_depends_on_the_metric(metric: Any, wanted: list[float], first: int) -> None:
    query, centres = rows([[0.5, 0.5]]), rows([[1, 0.5], [0.2, 0.2]])
    selector = Centres(2, metric=metric).double()
    selector.centres = centres
    compared, offset = selector._compared()  # for l2, the distance is ‖q‖² minus a score
    found = torch.cdist(query, centres, p=1.0)[0] if metric == "l1" else 0.5 - (query @ compared.mT + offset)[0]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64))
    selector = Centres(2, metric=metric)
    selector.members = 2
    selector.centres, selector.of = (math.sqrt(2) * centres).float(), torch.arange(2)  # queries have length 1
    assert selector.choose(query).index.tolist() == [[first]]


def test_g7_the_gaussian_of_three_classes() -> None:
    gaussian = Gaussian(2)
    for member, points in enumerate(([[0, 0], [2, 0]], [[4, 1], [4, 3]], [[0, 4], [2, 6]])):
        gaussian.grow(member + 1, generator())
        gaussian.learn(member, rows(points), torch.zeros(2, dtype=torch.int64), ["c"], generator())
    found = gaussian.solved(torch.zeros(2, dtype=torch.float64))
    wanted = rows([[1.9672770, -0.9738995], [5.9213089, 0.0389560], [-2.9022205, 8.8624854]])
    torch.testing.assert_close(found.weight, wanted, atol=5e-8, rtol=0)
    offset = torch.tensor([-0.9836385, -11.8815738, -20.7051032], dtype=torch.float64)
    torch.testing.assert_close(found.offset, offset, atol=5e-8, rtol=0)
    query = rows([[2, 2]])
    scores = query @ found.weight.mT + found.offset
    torch.testing.assert_close(scores, rows([[1.0031165, 0.0389560, -8.7845734]]), atol=1e-7, rtol=0)
    torch.testing.assert_close(gaussian.scores(query).diff().double(), scores.diff(), atol=1e-5, rtol=1e-6)
    assert gaussian.choose(query).index.tolist() == [[0]]


# -- V2, V15: each query by itself --------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("width", [7, 192])
@pytest.mark.parametrize("name", [name for name in EVERY if name != "vote"])
def test_v2_a_choice_depends_on_its_query_alone(name: str, width: int) -> None:
    selector = taught(made(name, width), width=width)
    queries = torch.cat([task(number, 21, 5, width)[0] for number in (0, 1, 2)])
    whole = selector.choose(queries)
    assert whole.index.dtype == torch.int64
    order = torch.randperm(len(queries), generator=generator("order"))
    mixed, alone = selector.choose(queries[order]), [selector.choose(query[None]) for query in queries]
    for get in (lambda chosen: chosen.index, lambda chosen: chosen.weight):
        if get(whole) is None:
            assert name.partition(",")[0] != "weights"
            continue
        assert torch.equal(get(mixed), get(whole)[order])
        assert torch.equal(torch.cat([get(one) for one in alone]), get(whole))
    few = selector.choose(queries[:0])
    assert few.index.shape == (0, whole.index.shape[1])


@torch.no_grad()
def test_v2_fails_for_the_vote() -> None:
    selector = taught(Vote(WIDTH, start="mean"))
    queries = torch.cat([task(number, 21, 5)[0] for number in (0, 1, 2)])
    whole = selector.choose(queries).index
    assert len(whole.unique(dim=0)) == 1
    alone = torch.cat([selector.choose(query[None]).index for query in queries])
    assert len(alone.unique(dim=0)) > 1


def test_products_of_a_row_have_its_bits_alone_and_in_any_batch() -> None:
    matrix, queries = torch.randn(301, 77, generator=generator(1)), torch.randn(33, 77, generator=generator(2))
    with torch.no_grad():
        whole = products(queries, matrix)
        assert torch.equal(whole, torch.cat([products(queries[i : i + 1], matrix) for i in range(33)]))
    torch.testing.assert_close(whole, queries @ matrix.T)


def test_equal_scores_go_to_the_lower_number_and_what_is_no_number_to_nobody() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0], [math.nan, -1.0, -2.0, -1.0], [math.nan] * 4])
    assert best(scores, 1).tolist() == [[1], [1], [0]]
    assert best(scores, 3).tolist() == [[1, 2, 3], [1, 3, 2], [0, 1, 2]]
    assert best(scores, 9).shape == (3, 4)
    owners = torch.tensor([2, 2, 1, 0])
    assert lowest(scores, owners).tolist() == [1, 0, 0]


# -- keys ---------------------------------------------------------------------------------------------


def test_v7_scaling_changes_no_choice() -> None:
    keys = taught(made("keys"))
    queries = task(1, seed=3)[0]
    scale = torch.rand(len(queries), 1, generator=generator("scale")) * 9 + 0.1
    before = keys.choose(queries).index
    assert torch.equal(keys.choose(scale * queries).index, before)
    assert isinstance(keys, Keys)
    keys.fresh.data = keys.fresh.data * torch.tensor([[0.01], [3.0], [70.0]])
    assert torch.equal(keys.choose(queries).index, before)


def test_v7_the_gradient_of_the_pull() -> None:
    queries = torch.randn(5, 4, generator=generator("q"), dtype=torch.float64)
    keys = with_keys(torch.randn(3, 4, generator=generator("k"), dtype=torch.float64), top=2, pull=0.7)
    chosen = keys.choose(queries)
    with trainable(keys.trained()):
        loss = keys.loss(queries, chosen)
        assert loss is not None
        loss.backward()
        assert keys.fresh.grad is not None
        found = keys.fresh.grad.clone()
    wanted = torch.zeros_like(found)
    for place in range(found.numel()):
        values = []
        for step in (1e-6, -1e-6):
            keys.fresh.data.view(-1)[place] += step
            values.append(float(keys.loss(queries, chosen) or 0))
            keys.fresh.data.view(-1)[place] -= step
        wanted.view(-1)[place] = (values[0] - values[1]) / 2e-6
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    unused = torch.tensor([m not in chosen.index for m in range(3)])
    assert not found[unused].any()


def test_v7_the_pull_alone_leads_to_the_mean_of_normalised_queries() -> None:
    queries = task(0)[0]
    keys = with_keys(torch.rand(1, WIDTH, generator=generator("k")) * 2 - 1)
    optimizer = torch.optim.Adam(keys.trained(), lr=0.05)
    with trainable(keys.trained()):
        for _ in range(300):
            optimizer.zero_grad()
            loss = keys.loss(queries, keys.pick(queries))
            assert loss is not None
            loss.backward()
            optimizer.step()
    mean = F.normalize(F.normalize(queries, dim=-1).mean(0), dim=0)
    assert float(F.normalize(keys.keys[0].detach(), dim=0) @ mean) > 0.999
    start = made("keys, mean")
    start.grow(1, generator("grow"), queries)
    assert isinstance(start, Keys)
    torch.testing.assert_close(start.keys[0].detach(), mean)


def test_v9_uses_sum_to_k_times_the_examples_and_few_of_many_are_told() -> None:
    keys = Keys(WIDTH, top=2)
    keys.grow(10, generator("grow"))
    count = 0
    for number in range(2):
        chosen = keys.pick(task(0, seed=number)[0])
        keys.used(chosen.index)
        count += len(chosen.index)
    used = keys.facts()["used"]
    assert sum(used) == 2 * count
    assert sum(n > 0 for n in used) < 4
    told = keys.warning(2)
    assert told is not None
    assert f"have chosen {sum(n > 0 for n in used)} of 10 members in 2 tasks" in told
    assert keys.warning(1) is None
    keys.used(torch.tensor([[0, 1], [2, 3]]))
    assert keys.warning(2) is None
    few = with_keys(torch.eye(3), top=2)
    few.used(torch.tensor([[0, 1], [1, 2]]))
    assert few.warning(5) is None, "there are no more"


def test_spread_brings_every_member_into_use_in_training_and_changes_no_answer() -> None:
    queries = torch.cat([task(number)[0] for number in range(3)])

    def used(spread: float) -> tuple[int, Tensor]:
        keys = Keys(WIDTH, spread=spread)
        keys.grow(10, generator("grow"))
        for part in queries.split(10):
            keys.used(keys.pick(part).index)
        return sum(n > 0 for n in keys.facts()["used"]), keys.choose(queries).index

    (few, plain), (many, spread) = used(0.0), used(1.0)
    assert few < 5
    assert many == 10
    assert torch.equal(plain, spread)


@pytest.mark.parametrize("start", ["drawn", "last", "mean"])
def test_where_a_new_key_starts(start: Any) -> None:
    keys = Keys(WIDTH, start=start)
    assert keys.needs_start is (start == "mean")
    for member in range(3):
        before = keys.keys.detach().clone()
        keys.grow(member + 1, generator("grow", member), task(member)[0])
        assert torch.equal(keys.keys[:member], before)
        keys.fresh.data[member] += 0.1  # as training does
    if start == "last":
        torch.testing.assert_close(keys.keys[2], keys.keys[1] + 0.1)
    elif start == "mean":
        mean = F.normalize(F.normalize(task(2)[0], dim=-1).mean(0), dim=0)
        torch.testing.assert_close(keys.keys[2].detach() - 0.1, mean)
        with pytest.raises(UsageError, match="there are none"):
            keys.grow(4, generator("grow"))
    else:
        assert float((keys.keys.detach() - 0.1).abs().max()) <= 1
    several = Keys(WIDTH, start=start)
    several.grow(4, generator("grow"), task(0)[0])
    assert len(several.keys.unique(dim=0)) == 4


@pytest.mark.parametrize("name", ["keys", "weights"])
def test_members_at_rest_do_not_move(name: str) -> None:
    selector = made(name)
    selector.private = True
    selector.grow(2, generator("grow", 0))
    first = {n: t.detach().clone() for n, t in tensors(selector).items()}
    selector.rest(1)
    selector.rest(1)
    selector.grow(3, generator("grow", 1))
    (trained, *_) = selector.trained()
    assert len(trained) == 2
    queries = task(0)[0]
    optimizer = torch.optim.AdamW(selector.trained(), lr=0.1, weight_decay=0.5)
    with trainable(selector.trained()):
        chosen = selector.pick(queries)
        loss = selector.loss(queries, chosen)
        assert loss is not None
        (loss if chosen.weight is None else loss + chosen.weight.sum()).backward()
        optimizer.step()
    for key, now in tensors(selector).items():
        assert torch.equal(now[0], first[key][0])
        assert not torch.equal(now[1], first[key][1])
    selector.rest(3)
    assert selector.trained() == []
    assert selector.choose(queries).index.shape[1] in (2, 3)


def tensors(selector: Selector) -> dict[str, Tensor]:
    if isinstance(selector, Keys):
        return {"keys": selector.keys}
    assert isinstance(selector, Weights)
    return {"keys": selector.keys, "attention": selector.attention}


# -- weights ------------------------------------------------------------------------------------------


def test_new_weights_are_orthogonal_to_the_older_ones_as_these_are_now() -> None:
    weights = Weights(8, orthogonal=0.5)
    weights.grow(3, generator("grow", 0))
    for p in weights.trained():
        p.data += 0.3 * torch.randn(p.shape, generator=generator("moved"))
    weights.rest(3)
    weights.grow(8, generator("grow", 1))
    for whole in (weights.keys, weights.attention):
        inner = whole.detach() @ whole.detach().T
        assert float(inner[3:, :3].abs().max()) < 1e-5
        torch.testing.assert_close(inner[3:, 3:], torch.eye(5), atol=1e-5, rtol=0)
    queries = torch.randn(4, 8, generator=generator("q"))
    loss = weights.loss(queries, weights.choose(queries))
    assert loss is not None
    wanted = 0.5 * (not_orthogonal(weights.keys) + not_orthogonal(weights.attention))
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()))
    assert Weights(8).loss(queries, Chosen(torch.zeros(4, 1))) is None
    weights.grow(10, generator("grow", 2))  # the space is full
    torch.testing.assert_close(weights.keys[8:].detach().norm(dim=1), torch.ones(2))


def test_weights_take_gradients_and_may_be_negative() -> None:
    weights = Weights(WIDTH)
    weights.grow(4, generator("grow"))
    queries = torch.randn(9, WIDTH, generator=generator("q"))
    assert bool((weights.choose(queries).weight < 0).any())  # type: ignore[operator]
    with trainable(weights.trained()):
        chosen = weights.pick(queries)
        assert chosen.weight is not None
        chosen.weight[:, 1].sum().backward()
        for p in weights.trained():
            assert p.grad is not None
            assert p.grad[1].any()
            assert not p.grad[[0, 2, 3]].any()


# -- statistics ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STATISTICS)
def test_v8_tasks_that_look_different_are_told_apart_in_any_order(name: str) -> None:
    first, other = taught(made(name), (0, 1, 2)), taught(made(name), (2, 0, 1))
    for number in range(3):
        queries = task(number, 50, 7)[0]
        assert (first.choose(queries).index == number).float().mean() > 0.95
        again = other.choose(queries).index
        same = torch.tensor([1, 2, 0])[first.choose(queries).index]
        assert torch.equal(again, same) or name.startswith("classifier, ")


@pytest.mark.parametrize("name", ["gaussian", "means", "means, euclidean"])
def test_v8_sums_do_not_depend_on_order_or_parts_and_equal_brute_force(name: str) -> None:
    order = torch.randperm(40, generator=generator("order"))
    whole, parts = made(name), made(name)
    for number in range(3):
        queries, targets, classes = task(number)
        for selector in (whole, parts):
            selector.grow(number + 1, generator())
        whole.learn(number, queries, targets, classes, generator())
        for part in order.split(13):
            parts.learn(number, queries[part], targets[part], classes, generator())
    for key, value in whole.state_dict().items():
        if isinstance(value, Tensor) and "probe" not in key:
            torch.testing.assert_close(
                parts.state_dict()[key], value, rtol=1e-9 if value.dtype == torch.float64 else 1e-5, atol=1e-6
            )
    queries = torch.cat([task(number, 30, 9)[0] for number in range(3)])
    assert torch.equal(whole.choose(queries).index, parts.choose(queries).index)
    assert torch.equal(whole.choose(queries).index[:, 0], brute_force(name, queries.double()))


def brute_force(name: str, queries: Tensor) -> Tensor:
    """The member of the best class from all stored queries, in float64."""
    stored = [(number, task(number)[0].double()[c::2]) for number in range(3) for c in (0, 1)]
    means = torch.stack([rows.mean(0) for _, rows in stored])
    if name == "gaussian":
        total = sum(len(rows) for _, rows in stored)
        within = sum((rows - rows.mean(0)).T @ (rows - rows.mean(0)) for _, rows in stored) / total
        shrunk = within + 0.01 * within.trace() / WIDTH * torch.eye(WIDTH, dtype=torch.float64)
        density = torch.distributions.MultivariateNormal(means, covariance_matrix=shrunk)
        scores = density.log_prob(queries[:, None])
        gaussian = taught(made("gaussian"))
        assert isinstance(gaussian, Gaussian)
        found = gaussian.solved()
        mine = (queries - found.centre) @ found.weight.mT + found.offset
        torch.testing.assert_close(mine - mine[:, :1], scores - scores[:, :1], rtol=1e-9, atol=1e-9)
    elif name == "means":
        scores = F.normalize(queries, dim=-1) @ F.normalize(means, dim=-1).T
    else:
        scores = -torch.cdist(queries, means)
    return scores.argmax(1) // 2


@pytest.mark.parametrize("name", STATISTICS)
def test_v18_a_class_that_returns_has_statistics_of_each_owner(name: str) -> None:
    selector = made(name)
    for member, number in enumerate((0, 1, 2)):  # the same two names, and each time they look different
        queries, targets, _ = task(number)
        selector.grow(member + 1, generator("grow", member))
        selector.learn(member, queries, targets, ["a", "b"], generator("learn", member))
    assert selector.rows == [(m, c) for m in range(3) for c in "ab"]
    assert selector.owner("a") == 2
    assert selector.owner("z") is None
    for number in range(3):
        assert (selector.choose(task(number, 50, 7)[0]).index == number).float().mean() > 0.95
    queries, targets, _ = task(1, seed=2)
    selector.learn(1, queries, targets, ["b", "new"], generator("learn", 3))
    assert selector.rows[6:] == [(1, "new")]
    assert selector.classes_of(1) == ["a", "b", "new"]
    assert [selector.owner(c) for c in ("a", "b", "new")] == [2, 1, 1]
    assert (selector.choose(task(1, 50, 7)[0]).index == 1).float().mean() > 0.9
    if isinstance(selector, Gaussian | LearnedClasses):
        held = selector.counts if isinstance(selector, Gaussian) else selector.head.counts
        assert held.tolist() == [20, 20, 20, 40, 20, 20, 20]  # type: ignore[operator, union-attr]


def test_classes_without_examples_are_never_the_answer() -> None:
    for name in STATISTICS:
        selector = made(name)
        selector.grow(2, generator())
        queries, targets, _ = task(0)
        selector.learn(0, queries, targets, ["a", "b", "empty"], generator("learn", 0))
        selector.learn(1, queries[:0], targets[:0], ["c"], generator("learn", 1))
        assert set(selector.choose(torch.cat([queries, -queries, 0 * queries[:1]])).index.flatten().tolist()) == {0}


def test_members_with_one_example_each_are_told_apart() -> None:
    """There is no variance inside a class then."""
    points = torch.randn(3, WIDTH, generator=generator("points")) + 2
    for name in STATISTICS:
        selector = made(name)
        for member in range(3):
            selector.grow(member + 1, generator())
            if name == "classifier" and not member:
                continue
            selector.learn(member, points[member : member + 1], torch.zeros(1, dtype=torch.int64), ["c"], generator(1))
        if name != "classifier":
            assert selector.choose(points).index.flatten().tolist() == [0, 1, 2], name


def test_kmeans_finds_groups_whatever_the_order_and_weighs_points() -> None:
    means = torch.tensor([[0.0, 0], [5, 0], [0, 5]], dtype=torch.float64)
    points = (means[:, None] + torch.randn(3, 40, 2, generator=generator("p"), dtype=torch.float64) * 0.3).flatten(0, 1)
    centres, mass = kmeans(points, torch.ones(120, dtype=torch.float64), 3, generator("k"))
    torch.testing.assert_close(centres[centres.sum(1).argsort()][0], points[:40].mean(0))
    assert mass.tolist() == [40.0] * 3
    order = torch.randperm(120, generator=generator("order"))
    again, _ = kmeans(points[order], torch.ones(120, dtype=torch.float64), 3, generator("k"))
    torch.testing.assert_close(again, centres, rtol=1e-12, atol=1e-12)
    two, weight = kmeans(points[:2], torch.tensor([3.0, 1.0], dtype=torch.float64), 1, generator("k"))
    torch.testing.assert_close(two[0], (3 * points[0] + points[1]) / 4)
    assert weight.tolist() == [4.0]
    few, _ = kmeans(points[:2].repeat(5, 1), torch.ones(10, dtype=torch.float64), 5, generator("k"))
    assert len(few) == 2


# -- controls -----------------------------------------------------------------------------------------


def test_random_is_even_and_the_same_for_the_same_query() -> None:
    chance = Random(WIDTH, top=2)
    chance.grow(5, generator("grow"))
    queries = torch.cat([task(0, 500, seed)[0] for seed in range(4)])
    index = chance.choose(queries).index
    assert bool((index[:, 0] != index[:, 1]).all())
    share = torch.bincount(index[:, 0], minlength=5) / len(index)
    assert float(share.min()) > 0.15
    assert float(share.max()) < 0.25
    nearly = queries * (1 + 1e-7 * torch.randn(queries.shape, generator=generator("noise")))
    assert (chance.choose(nearly).index == index).float().mean() > 0.99
    other = Random(WIDTH)
    other.grow(5, generator("other"))
    assert (other.choose(queries).index[:, 0] == index[:, 0]).float().mean() < 0.3


def test_last_is_the_newest() -> None:
    assert taught(made("last")).choose(task(0)[0]).index.unique().tolist() == [2]


# -- faults, recipe, state ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_faults_are_told_in_one_line_and_change_nothing(name: str) -> None:
    selector = made(name)
    with pytest.raises(PerpetuneError, match="before it had members"):
        selector.choose(task(0)[0])
    selector = taught(selector)
    before = json.dumps(selector.get_extra_state()), {k: v.clone() for k, v in selector.named_buffers()}
    queries, targets, classes = task(0)
    with pytest.raises(UsageError, match="member 3 learns, and there are 3"):
        selector.learn(3, queries, targets, classes, generator())
    with pytest.raises(UsageError, match="do not fit"):
        selector.learn(0, queries[:, 1:], targets, classes, generator())
    with pytest.raises(UsageError, match="do not fit"):
        selector.learn(0, queries, targets + 1, classes, generator())
    queries[3, 1] = math.nan
    with pytest.raises(PerpetuneError, match="not finite"):
        selector.learn(0, queries, targets, ["other", "names"], generator())
    assert json.dumps(selector.get_extra_state()) == before[0]
    assert all(torch.equal(v, before[1][k]) for k, v in selector.named_buffers())


class Method:
    def __init__(self, model: Any, *, train: FitConfig, select: Selection = Selection(name="gaussian")):
        self.select = select


def test_a_recipe_names_a_selector_and_every_option_is_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.BUILTIN["methods"], "m", f"{__name__}:Method")

    def resolved(select: Any = None) -> Any:
        method = {"name": "m"} if select is None else {"name": "m", "select": select}
        return make_recipe({"method": method})

    assert resolved().method.options["select"] == {"name": "gaussian", "shrink": 0.01}
    recipe = resolved({"name": "keys", "top": 3})
    wanted = {"name": "keys", "top": 3, "pull": 1.0, "spread": 0.0, "start": "drawn"}
    assert recipe.method.options["select"] == wanted
    assert make_recipe(recipe.model_dump(mode="json")) == recipe
    assert "top: 3" in recipe.to_yaml()
    made = recipe.method_options()["select"].make(WIDTH)
    assert isinstance(made, Keys)
    assert (made.top, made.pull) == (3, 1.0)
    assert isinstance(Selection(name="means").make(3), Means)
    dotted = resolved("perpetune.selectors.keys:Keys").method_options()["select"]
    assert isinstance(dotted.make(3), Keys)
    for wrong, told in (
        ("keyz", "there is no 'keyz'; .*keys"),
        ({"name": "keys", "topp": 1}, "topp is not an option; .*top"),
        ({"name": "keys", "top": 0}, "top: input should be greater than or equal to 1"),
        ({"top": 1}, "select.name is missing"),
        ("perpetune.heads.ncm:NCM", "not a class derived from perpetune.selectors.base.Selector"),
    ):
        with pytest.raises(UsageError, match=told) as raised:
            resolved(wrong)
        assert "\n" not in str(raised.value)


def test_another_selector_brings_no_options_of_the_old_one_along(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setitem(registry.BUILTIN["methods"], "m", f"{__name__}:Method")
    base = tmp_path / "base.yaml"
    base.write_text("method: {name: m, select: {name: keys, top: 4}}\n")

    def on_top(select: Any) -> Any:
        return make_recipe({"extends": str(base), "method": {"select": select}}).method.options["select"]

    assert on_top("centres") == {"name": "centres", "count": 5, "metric": "l2"}
    assert on_top({"pull": 0.5})["top"] == 4


def test_the_list_of_choices_has_selectors() -> None:
    about = {name: registry.summary("selectors", name) for name in registry.names("selectors")}
    assert list(about) == ["keys", "weights", "centres", "means", "gaussian", "classifier", "random", "last", "vote"]
    assert about["vote"]["fits"] == "A control for experiments."
    assert about["gaussian"]["options"] == {"shrink": "0.01"}
    assert all(entry["is"].endswith(".") for entry in about.values())
    assert registry.described(registry.schema(Method))["select"] == "gaussian   (a selector)"


@pytest.mark.parametrize("name", EVERY)
def test_v16_what_is_stored_brings_everything_back(name: str) -> None:
    """As a state is restored: extra state first, then the values of tensors of equal names and shapes."""
    selector = taught(made(name))
    if not selector.control and selector.learned:
        selector.private = True
        selector.rest(1)
    other = made(name)
    load(selector, other)
    queries = torch.cat([task(number, 20, 4)[0] for number in range(3)])
    assert torch.equal(selector.choose(queries).index, other.choose(queries).index)
    for one in (selector, other):  # the fourth task, after a stop
        fresh, targets, classes = task(3)
        one.grow(4, generator("grow", 3), fresh)
        one.used(one.pick(fresh).index)
        one.learn(3, fresh, targets, classes, generator("learn", 3))
    assert other.get_extra_state() == selector.get_extra_state()
    assert all(torch.equal(a, b) for a, b in zip(stored(selector).values(), stored(other).values(), strict=True))
    load(made(name), other)
    assert other.members == 0
    with pytest.raises(ValueError, match="is not among"):
        other.set_extra_state({**selector.get_extra_state(), "members": 1})


def stored(selector: Selector) -> dict[str, Tensor]:
    return {name: value for name, value in selector.state_dict().items() if isinstance(value, Tensor)}


def load(source: Selector, target: Selector) -> None:
    for name, module in target.named_modules():
        if type(module).get_extra_state is torch.nn.Module.get_extra_state:
            continue
        state = json.loads(json.dumps(source.get_submodule(name).get_extra_state()))
        if module.get_extra_state() != state:
            module.set_extra_state(state)
    values = stored(source)
    with torch.no_grad():
        for name, tensor in target.state_dict(keep_vars=True).items():
            if isinstance(tensor, Tensor):
                assert tensor.shape == values[name].shape, name
                assert tensor.dtype == values[name].dtype
                tensor.copy_(values[name])


@pytest.mark.parametrize("name", STATISTICS)
def test_sums_stay_exact_wherever_the_rest_goes(name: str) -> None:
    selector = taught(made(name)).to(torch.bfloat16)
    kinds = {key: value.dtype for key, value in selector.named_buffers()}
    exact = {key for key, kind in kinds.items() if kind == torch.float64}
    assert {"centres": {"mass"}, "gaussian": {"sums", "square"}}.get(name.partition(",")[0], exact) == exact
    assert exact


@pytest.mark.parametrize("name", EVERY)
def test_nothing_is_drawn_from_the_global_generator(name: str) -> None:
    before = torch.get_rng_state()
    taught(made(name))
    assert torch.equal(torch.get_rng_state(), before)


def test_v20_the_benchmark_measures_every_selector(warm: Warm, tmp_path: Path) -> None:
    (tmp_path / "benchmark.py").write_text(BENCHMARK)
    command = [*warm.command, str(tmp_path / "benchmark.py"), str(ROOT / "benchmarks")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    assert [one["selector"] for one in results] == STATISTICS_AND_LEARNED
    assert all(set(one["ms"]) == {"forward", "1", "7"} for one in results)


ROOT = Path(__file__).resolve().parents[1]
STATISTICS_AND_LEARNED = ["keys", "weights", "centres", "means", "gaussian", "classifier"]
BENCHMARK = """
import sys, json, time
sys.path.insert(0, sys.argv[1])
import pools
found = pools.choosing([1, 7], list(pools.KINDS), batch=3, width=16, rounds=2, forward=lambda: time.process_time())
print(json.dumps(found))
"""


def test_the_documented_selector_can_be_used() -> None:
    text = (ROOT / "docs" / "selectors.md").read_text()
    code = text.partition("```python\n")[2].partition("```")[0]
    space: dict[str, Any] = {}
    exec(code, space)  # the documentation's own
    selector = space["Longest"](3, length=2.0)
    selector.grow(4, generator())
    assert selector.choose(torch.tensor([[3.0, 0, 0], [1.0, 0, 0]])).index.tolist() == [[3], [0]]

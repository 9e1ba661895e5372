"""The heads against references written out by hand, and what they keep while they grow."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from perpetune.check import tiny_backbone
from perpetune.heads import NCM, Cosine, Head, Linear, Ridge
from perpetune.methods.base import Method
from perpetune.models.classifier import Classifier
from perpetune.seeding import generator
from perpetune.snapshot import restore, snapshot
from perpetune.tasks import Task

D = 6
KINDS: list[tuple[type[Head], dict[str, Any]]] = [
    (Linear, {}),
    (Cosine, {}),
    (Cosine, {"scale": 3.0, "learn_scale": True}),
    (NCM, {}),
    (NCM, {"metric": "euclidean"}),
]
every_head = pytest.mark.parametrize(("kind", "options"), KINDS, ids=str)


def features(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, D, generator=generator("features", seed))


def filled(kind: type[Head], options: dict[str, Any], classes: Sequence[str] = "abc") -> Head:
    """A head that knows some classes and, if it is one of statistics, has seen examples of each."""
    head = kind(D, **options)
    head.grow(classes, generator("grow"))
    teach(head, classes)
    return head


def teach(head: Head, classes: Sequence[str], seed: int = 1, each: int = 4) -> None:
    if head.statistics:
        head.observe(features(each * len(classes), seed), head.rows(classes).repeat(each))
        head.settle()


# -- the scores ---------------------------------------------------------------------------------------


def test_linear_scores() -> None:
    head, f = Linear(D, std=0.5), features(4)
    head.grow("abc", generator(1))
    with torch.no_grad():
        head.bias.copy_(torch.tensor([0.1, -2.0, 3.0]))
    for i, row in enumerate(head(f)):
        for c in range(3):
            by_hand = sum(float(f[i, d]) * float(head.weight[c, d]) for d in range(D)) + float(head.bias[c])
            assert float(row[c]) == pytest.approx(by_hand, abs=1e-5)
    assert torch.equal(head.logits(f), head(f))


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def test_cosine_scores() -> None:
    head, f = Cosine(D, scale=5.0), features(4)
    head.grow("abc", generator(1))
    for i, row in enumerate(head(f).tolist()):
        assert row == pytest.approx([5.0 * cosine(f[i].tolist(), w) for w in head.weight.tolist()], abs=1e-5)


@given(
    factors=st.lists(st.floats(0.01, 100), min_size=3, max_size=3),
    feature=st.floats(0.01, 100),
    scale=st.floats(0.1, 50),
)
def test_in_cosine_scores_lengths_do_not_matter(factors: list[float], feature: float, scale: float) -> None:
    head, f = Cosine(D, scale=scale), features(4)
    head.grow("abc", generator(1))
    before = head(f)
    with torch.no_grad():
        head.weight.mul_(torch.tensor(factors).unsqueeze(1))
    torch.testing.assert_close(head(f * feature), before, rtol=1e-4, atol=1e-4)
    assert before.abs().max() <= scale * (1 + 1e-5)


@st.composite
def streams(draw: st.DrawFn) -> tuple[Tensor, Tensor, list[list[int]]]:
    """Labelled features, and two ways of showing them: an order cut into batches."""
    n = draw(st.integers(3, 30))
    rows = [0, 1, 2, *draw(st.lists(st.integers(0, 2), min_size=n - 3, max_size=n - 3))]
    size = 10.0 ** draw(st.integers(-3, 3))
    order = draw(st.permutations(range(n)))
    batches, at = [], 0
    while at < n:
        step = draw(st.integers(1, n))
        batches.append(list(order[at : at + step]))
        at += step
    return features(n, draw(st.integers(0, 99))) * size, torch.tensor(rows), batches


def means_by_hand(f: Tensor, rows: Tensor) -> np.ndarray[Any, Any]:
    """Correctly rounded means: `math.fsum` loses nothing."""
    found = []
    for c in range(3):
        mine = f[rows == c].double().tolist()
        found.append([math.fsum(column) / len(mine) for column in zip(*mine, strict=True)])
    return np.array(found)


@given(stream=streams())
def test_ncm_means_are_the_same_in_any_order_and_batching(stream: tuple[Tensor, Tensor, list[list[int]]]) -> None:
    f, rows, batches = stream
    head = NCM(D)
    head.grow("abc", generator(1))
    for batch in batches:
        head.observe(f[batch], rows[batch])
    head.settle()
    means = (head.sums / head.counts.unsqueeze(1)).numpy()
    size = float(f.abs().max())
    assert head.sums.dtype == torch.float64
    assert head.counts.tolist() == [int((rows == c).sum()) for c in range(3)]
    np.testing.assert_allclose(means, means_by_hand(f, rows), rtol=1e-12, atol=1e-12 * size)
    np.testing.assert_allclose(head.means.numpy(), means_by_hand(f, rows), rtol=1e-6, atol=1e-6 * size)


@given(stream=streams(), scale=st.floats(0.1, 50))
def test_ncm_scores(stream: tuple[Tensor, Tensor, list[list[int]]], scale: float) -> None:
    f, rows, _ = stream
    f = f / f.abs().max()
    query = features(5, seed=7)
    heads = {m: NCM(D, metric=m, scale=scale) for m in ("cosine", "euclidean")}  # type: ignore[arg-type]
    for head in heads.values():
        head.grow("abc", generator(1))
        head.observe(f, rows)
        head.settle()
    means = means_by_hand(f, rows).tolist()
    for i, q in enumerate(query.tolist()):
        near = [scale * cosine(q, m) for m in means]
        assert heads["cosine"](query)[i].tolist() == pytest.approx(near, abs=scale * 1e-4)
        far = [-scale * sum((x - y) ** 2 for x, y in zip(q, m, strict=True)) / D for m in means]
        assert heads["euclidean"](query)[i].tolist() == pytest.approx(far, abs=scale * 1e-4)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_the_scale_of_ncm_changes_no_winner(metric: Any) -> None:
    f = features(50, seed=3)
    winners = []
    for scale in (0.5, 16.0, 200.0):
        head = filled(NCM, {"metric": metric, "scale": scale})
        winners.append(head(f).argmax(1).tolist())
    assert winners[0] == winners[1] == winners[2]
    assert len(set(winners[0])) == 3


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_a_class_of_which_nothing_was_observed_never_wins(metric: Any) -> None:
    head = filled(NCM, {"metric": metric})
    head.grow(["new"], generator(2))
    scores = head(features(20))
    assert head.classes == ["a", "b", "c", "new"]
    assert torch.isneginf(scores[:, 3]).all()
    assert torch.isfinite(scores[:, :3]).all()
    assert (scores.softmax(1)[:, 3] == 0).all()


def test_ncm_is_trained_through_a_probe_that_takes_no_part_in_the_prediction() -> None:
    head = filled(NCM, {})
    assert isinstance(head, NCM)
    f = features(3)
    before = head(f)
    assert torch.equal(head.logits(f), head.probe(f))
    with torch.no_grad():
        head.probe.weight.normal_(generator=generator(9))
    assert torch.equal(head(f), before)
    assert not torch.equal(head.logits(f), before)


def test_a_domain_that_brings_known_classes_goes_on_where_the_means_stood() -> None:
    f, rows = features(40, seed=5), torch.arange(40) % 3
    parts, whole = NCM(D), NCM(D)
    for head in (parts, whole):
        head.grow("abc", generator(1))
    for part in (slice(0, 17), slice(17, 40)):  # two tasks
        parts.grow("abc", generator(2))
        parts.observe(f[part], rows[part])
        parts.settle()
    whole.observe(f, rows)
    whole.settle()
    assert parts.classes == ["a", "b", "c"]
    assert torch.equal(parts.counts, whole.counts)
    torch.testing.assert_close(parts.sums, whole.sums, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts(features(9)), whole(features(9)), rtol=1e-6, atol=1e-6)


def test_what_two_processes_observed_adds_up() -> None:
    f, rows = features(40, seed=5), torch.arange(40) % 3
    one, two, both = (filled(NCM, {}) for _ in range(3))
    before = [t.clone() for t in both.additive()]
    both.observe(f, rows)
    one.observe(f[::2], rows[::2])
    two.observe(f[1::2], rows[1::2])
    for mine, theirs, old, expected in zip(one.additive(), two.additive(), before, both.additive(), strict=True):
        torch.testing.assert_close(old + (mine - old) + (theirs - old), expected, rtol=1e-12, atol=1e-12)


# -- classes by name ----------------------------------------------------------------------------------


@every_head
@given(groups=st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=4), min_size=1, max_size=5))
def test_growth_keeps_rows_and_adds_each_name_once(
    kind: type[Head], options: dict[str, Any], groups: list[list[str]]
) -> None:
    head, known = kind(D, **options), list[str]()
    f = features(4)
    for i, group in enumerate(groups):
        old_scores, old_logits, old = head(f), head.logits(f), list(known)
        old_rows = {name: t.clone() for name, t in tensors_of(head).items()}
        head.grow(group, generator("grow", i))
        known += [c for c in dict.fromkeys(group) if c not in known]
        assert head.classes == known
        assert head.rows(list(reversed(known))).tolist() == list(reversed(range(len(known))))
        assert head(f).shape == head.logits(f).shape == (4, len(known))
        for name, t in tensors_of(head).items():
            assert torch.equal(t[: len(old)] if t.ndim else t, old_rows[name]), name
        torch.testing.assert_close(head(f)[:, : len(old)], old_scores, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(head.logits(f)[:, : len(old)], old_logits, rtol=1e-6, atol=1e-6)
        new = [c for c in known if c not in old]
        if new:
            teach(head, known, seed=i)
    assert not any(p.requires_grad for p in head.parameters())


@every_head
def test_new_rows_are_drawn_from_the_generator_alone(kind: type[Head], options: dict[str, Any]) -> None:
    logits = []
    for seed, word in ((1, "grow"), (2, "grow"), (1, "other")):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        head = kind(D, **options)
        head.grow("abc", generator(word))
        assert torch.equal(torch.get_rng_state(), before)
        logits.append(head.logits(features(3)))
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


@every_head
def test_an_unknown_class_has_no_row(kind: type[Head], options: dict[str, Any]) -> None:
    head = filled(kind, options)
    with pytest.raises(KeyError, match="zebra"):
        head.rows(["a", "zebra"])


@every_head
def test_the_order_in_which_classes_came_does_not_change_what_they_are(
    kind: type[Head], options: dict[str, Any]
) -> None:
    """For heads of statistics: the same examples under the same names, other rows."""
    if not kind.statistics:
        return
    f, labels = features(30, seed=4), [("a", "b", "c")[i % 3] for i in range(30)]
    scores = []
    for order in ("abc", "cab"):
        head = kind(D, **options)
        head.grow(order, generator(1))
        head.observe(f, head.rows(labels))
        head.settle()
        scores.append(head(features(5))[:, head.rows("abc")])
    assert torch.equal(*scores)


@every_head
def test_reset_forgets_everything(kind: type[Head], options: dict[str, Any]) -> None:
    head, new = filled(kind, options), kind(D, **options)
    with torch.no_grad():
        for p in head.parameters():
            p.add_(1.0)
    head.reset()
    assert head.classes == []
    assert_equal(head, new)
    for one in (head, new):
        one.grow(["x", "y"], generator("again"))
        teach(one, ["x", "y"])
    assert_equal(head, new)
    assert torch.equal(head(features(3)), new(features(3)))


def tensors_of(head: nn.Module) -> dict[str, Tensor]:
    return {**dict(head.named_parameters()), **dict(head.named_buffers())}


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    mine, theirs = tensors_of(a), tensors_of(b)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


# -- kept between runs --------------------------------------------------------------------------------


class Holder(Method):
    """A method that is nothing but its head."""

    def __init__(self, head: Head):
        super().__init__(Classifier(tiny_backbone(), head))

    def learn(self, task: Task) -> None:
        raise NotImplementedError

    def predict(self, inputs: Tensor) -> Tensor:
        raise NotImplementedError


@every_head
def test_what_is_stored_brings_the_head_back_and_it_goes_on(kind: type[Head], options: dict[str, Any]) -> None:
    head = filled(kind, options, ["ä", "b/c", "日本"])
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.25)
    files = snapshot(Holder(head))
    assert json.loads(files["extra.json"])["model.head"] == {"classes": ["ä", "b/c", "日本"]}
    other = filled(kind, options, ["something", "else"])  # and forgets it
    restore(Holder(other), files, "memory")
    assert other.classes == head.classes
    assert_equal(head, other)
    for one in (head, other):
        one.grow(["new", "b/c"], generator("later"))
        teach(one, ["new", "b/c"], seed=8)
    assert_equal(head, other)
    assert torch.equal(head(features(4)), other(features(4)))


@every_head
def test_the_gradient_reaches_every_trained_parameter(kind: type[Head], options: dict[str, Any]) -> None:
    head = filled(kind, options)
    for p in head.parameters():
        p.requires_grad_(True)
    f = features(5).requires_grad_(True)
    nn.functional.cross_entropy(head.logits(f), torch.tensor([0, 1, 2, 0, 1])).backward()
    assert f.grad is not None
    assert f.grad.abs().sum() > 0
    for name, p in head.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name


def test_only_a_learned_scale_of_cosine_is_a_parameter() -> None:
    assert [n for n, _ in Cosine(D).named_parameters()] == ["weight"]
    assert sorted(n for n, _ in Cosine(D, learn_scale=True).named_parameters()) == ["scale", "weight"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ncm_adds_up_in_float64_whatever_the_features_are(dtype: torch.dtype) -> None:
    head = NCM(D)
    head.grow("a", generator(1))
    f = features(1000).to(dtype) + 100
    for part in f.split(10):
        head.observe(part, torch.zeros(len(part), dtype=torch.int64))
    np.testing.assert_allclose(head.sums[0].numpy(), f.double().sum(0).numpy(), rtol=1e-12)


def test_the_sums_of_ncm_stay_on_the_cpu_in_float64() -> None:
    head = NCM(4)
    head.grow(["a", "b"], generator("test"))
    moved = head.to("meta")  # stands for a device without float64
    assert moved.sums.device.type == "cpu"
    assert moved.sums.dtype == torch.float64
    assert moved.means.device.type == "meta"


@pytest.mark.parametrize("kind", [Ridge, NCM])
def test_a_probe_reads_some_columns_and_statistics_all(kind: type[Ridge] | type[NCM]) -> None:
    """With taps, what is trained by gradient reads the end of the net; what is summed up reads all."""
    head = kind(6)
    head.train_on(slice(4, 6))
    head.grow("ab", generator("narrow"))
    features = torch.randn(5, 6, generator=generator("narrow", 1))
    assert head.probe.weight.shape == (2, 2)
    assert torch.equal(head.logits(features), head.probe(features[:, 4:]))
    head.expect(torch.tensor([3, 2]))
    head.observe(features, torch.tensor([0, 0, 0, 1, 1]))
    head.flush()
    head.settle()
    changed = features.clone()
    changed[:, 0] += 1
    assert not torch.equal(head(features), head(changed))

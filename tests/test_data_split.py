"""Properties of the splits: parts do not overlap, classes keep their share, a seed always means the same."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perpetune.data.split import given_order, hold_out, in_tasks, limit, seeded_order
from perpetune.errors import UsageError

names = st.lists(st.text(min_size=1, max_size=4), unique=True, min_size=1, max_size=20)
labels = st.lists(st.sampled_from("abcd"), max_size=60)
shares = st.floats(0, 0.99)
seeds = st.integers(0, 1000)


@given(labels, shares, seeds)
def test_hold_out_is_a_stratified_partition(labels, share, seed):
    kept, out = hold_out(range(len(labels)), labels, str, share=share, seed=seed, purpose="t")
    assert kept == sorted(kept)
    assert out == sorted(out)
    assert sorted(kept + out) == list(range(len(labels)))
    counts, held = Counter(labels), Counter(labels[i] for i in out)
    for label, n in counts.items():
        assert held[label] < n
        assert abs(held[label] - share * n) <= 1
        assert (held[label] > 0) == (share > 0 and n > 1)


@given(labels, st.integers(1, 9), seeds, st.randoms())
def test_choices_depend_on_keys_not_on_the_listing(labels, per_class, seed, random):
    rows = list(range(len(labels)))
    key = [f"k{i}" for i in rows]
    order = random.sample(rows, len(rows))
    shuffled_labels, shuffled_keys = [labels[i] for i in order], [key[i] for i in order]

    def chosen(labels, key, how):
        return {key[i] for i in how(rows, labels, key.__getitem__)}

    def held(rows, labels, key):
        return hold_out(rows, labels, key, share=0.3, seed=seed, purpose="v")[1]

    def few(rows, labels, key):
        return limit(rows, labels, key, per_class=per_class, seed=seed, purpose="l")

    for how in (held, few):
        assert chosen(labels, key, how) == chosen(shuffled_labels, shuffled_keys, how)


@given(labels, st.integers(1, 9), seeds)
def test_limit_keeps_at_most_so_many_of_each(labels, per_class, seed):
    rows = limit(range(len(labels)), labels, str, per_class=per_class, seed=seed, purpose="l")
    assert rows == sorted(set(rows))
    kept = Counter(labels[i] for i in rows)
    assert all(kept[label] == min(n, per_class) for label, n in Counter(labels).items())
    fewer = limit(range(len(labels)), labels, str, per_class=max(1, per_class - 1), seed=seed, purpose="l")
    assert set(fewer) <= set(rows)
    assert limit(range(len(labels)), labels, str, per_class=None, seed=seed, purpose="l") == list(range(len(labels)))


@given(names, seeds)
def test_class_order_is_a_permutation_of_the_seed(names, seed):
    order = seeded_order(names, seed)
    assert sorted(order) == sorted(names)
    assert order == seeded_order(reversed(names), seed)


@given(names, st.text(min_size=5, max_size=6), seeds)
def test_a_class_that_comes_later_moves_no_other(names, new, seed):
    assert [n for n in seeded_order([*names, new], seed) if n != new] == seeded_order(names, seed)


def test_class_order_differs_between_seeds():
    classes = [str(i) for i in range(10)]
    orders = {tuple(seeded_order(classes, seed)) for seed in range(50)}
    assert len(orders) == 50
    first = Counter(order[0] for order in orders)
    assert len(first) >= 8  # every class comes first now and then


@given(st.integers(1, 60), st.integers(1, 60))
def test_tasks_of_equal_size(n, per_task):
    classes = [str(i) for i in range(n)]
    if per_task > n:
        with pytest.raises(UsageError, match=f"{per_task} is too large: there are only {n} classes"):
            in_tasks(classes, per_task)
        return
    tasks, warnings = in_tasks(classes, per_task)
    assert [c for task in tasks for c in task] == classes
    assert all(len(task) == per_task for task in tasks[:-1])
    assert bool(warnings) == (n % per_task != 0)


def test_tasks_of_given_sizes():
    assert in_tasks(list("abcde"), [3, 1, 1])[0] == [["a", "b", "c"], ["d"], ["e"]]
    with pytest.raises(UsageError, match=r"\[3, 1\] adds up to 4, but there are 5 classes"):
        in_tasks(list("abcde"), [3, 1])
    with pytest.raises(UsageError, match="classes_per_task is missing"):
        in_tasks(list("abcde"), None)


def test_given_order():
    assert given_order(["b", "a"], ["a", "b"], "k", "classes") == (["b", "a"], [])
    assert given_order(["b"], ["a", "b", "c"], "k", "classes") == (["b"], ["k: classes left out: a, c"])
    with pytest.raises(UsageError, match="k: 'catt' is not among the classes of the training data; one of cat, dog"):
        given_order(["catt"], ["cat", "dog"], "k", "classes")
    with pytest.raises(UsageError, match="k has a name twice: a"):
        given_order(["a", "a"], ["a"], "k", "classes")

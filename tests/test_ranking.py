"""Ranking: one product for a batch names what the scores of each query by itself name, to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_selectors import made, task, taught
from torch import Tensor
from torch.nn import functional as F

from perpetune.fit import trainable
from perpetune.numerics import ranking
from perpetune.numerics.choosing import best, lowest, products
from perpetune.numerics.ranking import Ranked, Ranking
from perpetune.seeding import generator
from perpetune.selectors.keys import Keys

WIDTH = 24


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows are many, and a table holds few scores, so that the tests are small."""
    monkeypatch.setattr(ranking, "MANY", 6)
    monkeypatch.setattr(ranking, "TABLE", 1500)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator("drawn", seed), dtype=dtype)


def hard(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows, queries and offsets of a kind that is easy or hard to tell apart."""
    rows, queries, offset = drawn(300, WIDTH, dtype=dtype), drawn(41, WIDTH, seed=1, dtype=dtype), None
    if kind == "near":  # many rows whose scores are equal but for rounding
        rows = rows[:5].repeat(60, 1) * (1 + torch.finfo(dtype).eps * drawn(300, WIDTH, seed=2, dtype=dtype))
    elif kind == "equal":
        rows = rows[:3].repeat(100, 1)
    elif kind == "large":  # a sum of large numbers that take each other away
        rows[:, 0] = 1e4
        queries[:, 0] = torch.tensor([-1.0, 1.0], dtype=dtype)[torch.arange(41) % 2]
    elif kind == "offsets":
        offset = drawn(300, seed=3, dtype=dtype)
        offset[::7], offset[5] = -torch.inf, torch.nan
    elif kind == "nothing":
        queries[::3] = 0
    elif kind == "no number":
        queries[2, 3], queries[7], queries[11, 0] = torch.nan, torch.inf, 1e30
    elif kind == "broken row":
        rows[17, 2] = torch.nan
    return rows, queries, offset


KINDS = ("plain", "near", "equal", "large", "offsets", "nothing", "no number", "broken row")


def of_all(queries: Tensor, rows: Tensor, offset: Tensor | None) -> Tensor:
    scores = products(queries, rows)
    return scores if offset is None else scores + offset


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_it_names_what_all_scores_name(kind: str, count: int, dtype: torch.dtype) -> None:
    rows, queries, offset = hard(kind, dtype)
    wanted = best(of_all(queries, rows, offset), count)
    for size in (1, 2, 5, 41):
        found = [Ranking().best(q, (rows,), lambda: (rows, offset), 300, count=count) for q in queries.split(size)]
        assert torch.equal(torch.cat(found), wanted), size
    if count == 1:
        owners = torch.arange(300).flip(0) // 4
        found = Ranking().best(queries, (rows,), lambda: (rows, offset), 300, owners=owners)
        assert torch.equal(found[:, 0], lowest(of_all(queries, rows, offset), owners))


@torch.no_grad()
def test_without_the_bound_of_the_rounding_it_names_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A control: the highest product of the batch, or the highest exact score, is another row than brute force has."""
    monkeypatch.setattr(Ranked, "_error", lambda _self, queries, _dtype: queries.new_zeros(len(queries), 1).double())
    wrong = 0
    for kind in ("near", "equal", "large"):
        rows, queries, offset = hard(kind)
        found = Ranking().best(queries, (rows,), lambda rows=rows, offset=offset: (rows, offset), 300)
        wrong += int((found != best(of_all(queries, rows, offset), 1)).sum())
    assert wrong > 10


@torch.no_grad()
def test_rows_that_lie_apart_are_read_once_for_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def counted(rows: Tensor, matrix: Tensor) -> Tensor:
        asked.append(len(rows))
        return products(rows, matrix)

    monkeypatch.setattr(ranking, "products", counted)
    rows, queries, _ = hard("plain")
    Ranking().best(queries, (rows,), lambda: (rows, None), 300)
    assert sum(asked) <= 2, "only queries whose best rows are nearly equal are asked again"
    asked.clear()
    equal, queries, _ = hard("equal")
    Ranking().best(queries, (equal,), lambda: (equal, None), 300)
    assert asked == [len(queries)], "equal scores are never proved"
    asked.clear()
    Ranking().best(queries[:1], (rows,), lambda: (rows, None), 300)
    assert asked == [1], "for one query there is nothing to save"


@torch.no_grad()
def test_the_memory_of_a_batch_does_not_grow_with_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    tables: list[int] = []
    one = Ranked._highest

    def watched(self: Ranked, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
        tables.append(len(queries) * len(self.rows[0]))
        return one(self, queries, count)

    monkeypatch.setattr(Ranked, "_highest", watched)
    for size in (50, 300, 1500, 3000):
        rows, queries = drawn(size, WIDTH), drawn(41, WIDTH, seed=1)
        Ranking().best(queries, (rows,), lambda rows=rows: (rows, None), size)
    assert max(tables) <= max(ranking.TABLE, 3000), "one query is the least"
    assert len(tables) > 4 + 41


EVERY = ("keys", "centres", "means", "means, euclidean", "gaussian", "classifier", "vote")


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY)
def test_v20_every_selector_chooses_as_with_few_members(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    selector = taught(made(name, WIDTH), order=tuple(range(12)), width=WIDTH)
    if name.startswith("means"):
        selector.means.counts[[3, 8]] = 0  # type: ignore[union-attr, operator]
    queries = torch.cat([task(number, 12, 5, WIDTH)[0] for number in range(12)])
    queries = torch.cat([queries, queries[:5] * 1e-3, queries.new_zeros(2, WIDTH)])
    calls: list[int] = []
    one = Ranked.highest

    def watched(self: Ranked, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
        found = one(self, queries, count)
        calls.append(int(found[1].sum()))
        return found

    monkeypatch.setattr(Ranked, "highest", watched)
    found = selector.choose(queries).index
    assert sum(calls) > 100, "most queries are proved"
    if name != "vote":
        alone = torch.cat([selector.choose(query[None]).index for query in queries])
        assert torch.equal(found, alone)
    monkeypatch.setattr(ranking, "MANY", 10**9)
    assert torch.equal(found, selector.choose(queries).index)


@torch.no_grad()
def test_new_rows_are_noticed() -> None:
    keys = taught(made("keys", WIDTH), order=tuple(range(8)), width=WIDTH)
    assert isinstance(keys, Keys)
    queries = drawn(30, WIDTH, seed=4)

    def right() -> bool:
        return torch.equal(keys.choose(queries).index, best(keys.scores(queries), keys.top))

    assert right()
    before = keys.choose(queries).index
    with torch.enable_grad(), trainable(keys.trained()):
        optimizer = torch.optim.SGD(keys.trained(), lr=5.0)
        loss = keys.loss(queries, keys.pick(queries))
        assert loss is not None
        loss.backward()
        optimizer.step()
    assert right()
    assert not torch.equal(keys.choose(queries).index, before)
    keys.rest(3)
    keys.grow(11, generator("more"))
    assert right()
    state = {name: t.flip(0) if torch.is_tensor(t) and t.dim() == 2 else t for name, t in keys.state_dict().items()}
    before = keys.choose(queries).index
    keys.load_state_dict(state)
    assert right()
    assert not torch.equal(keys.choose(queries).index, before)


@torch.no_grad()
def test_rows_are_prepared_once() -> None:
    made_: list[int] = []
    rows, queries = drawn(20, WIDTH), drawn(4, WIDTH, seed=1)

    def prepared() -> tuple[Tensor, None]:
        made_.append(1)
        return F.normalize(rows, dim=-1), None

    kept = Ranking()
    for _ in range(3):
        kept.best(queries, (rows,), prepared, 20)
    assert len(made_) == 1
    rows.mul_(2)
    kept.best(queries, (rows,), prepared, 20)
    assert len(made_) == 2
    few = Ranking()
    for _ in range(3):
        few.best(queries, (rows,), prepared, 5)
    assert len(made_) == 5, "few rows are made each time"


def test_in_training_all_scores_are_computed() -> None:
    rows, queries = drawn(20, WIDTH), drawn(4, WIDTH, seed=1)
    kept = Ranking()
    found = kept.best(queries, (rows,), lambda: (rows, None), 20)
    assert kept._kept is None
    assert torch.equal(found, best(queries @ rows.T, 1))


def test_inference_mode_is_no_obstacle() -> None:
    rows, queries = drawn(20, WIDTH), drawn(4, WIDTH, seed=1)
    wanted: Any = best(products(queries, rows), 1)
    with torch.inference_mode():
        found = Ranking().best(queries, (rows.clone(),), lambda: (rows, None), 20)
        assert torch.equal(found, wanted)
        assert torch.equal(Ranking().best(queries.clone(), (rows,), lambda: (rows, None), 20), wanted)


@torch.no_grad()
def test_if_torch_may_round_the_factors_nothing_is_proved() -> None:
    rows, queries = drawn(20, WIDTH), drawn(4, WIDTH, seed=1)
    kept = Ranking()
    torch.set_float32_matmul_precision("medium")
    try:
        found = kept.best(queries, (rows,), lambda: (rows, None), 20)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert kept._kept is None
    assert torch.equal(found, best(products(queries, rows), 1))

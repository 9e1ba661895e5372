"""The method `pool` on tiny models: what is trained, who is asked, what is chosen, and what stays as it was."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import every, paired
from torch import Tensor, nn

from perpetune.build import build_method
from perpetune.check import Checker, check_method, tiny_backbone
from perpetune.errors import StateError, UsageError
from perpetune.evaluate import evaluate
from perpetune.export import export_learned
from perpetune.heads.ridge import Ridge
from perpetune.learning import learn_protected
from perpetune.methods.parts.members import average_into, drawn_orthogonal
from perpetune.methods.parts.recall import Recall
from perpetune.methods.parts.repulsion import repulsion
from perpetune.methods.pool import Pool
from perpetune.models.classifier import Classifier
from perpetune.pets import LoRA, parameters, pets, sets, using
from perpetune.recipe import make_recipe
from perpetune.selectors import Chosen
from perpetune.snapshot import restore, snapshot
from perpetune.state import State
from perpetune.store import RESTING
from perpetune.tasks import Inputs, Task

PREFIX = {"name": "prefix", "length": 3}
TRAIN = {"epochs": 2, "batch_size": 8, "lr": 0.01}
STATISTICS = ("gaussian", "means", "centres", "classifier")


def checker(method: dict[str, Any] | str, **sections: Any) -> Checker:
    content = {"pet": PREFIX, "train": TRAIN, "head": "linear", **sections, "method": method}
    return Checker(make_recipe(content))


def pool(method: dict[str, Any] | None = None, **sections: Any) -> tuple[Pool, list[Task]]:
    made = checker({"name": "pool", **(method or {})}, **sections)
    built = made.make()
    assert isinstance(built, Pool)
    return built, made.stream()


def taught(method: dict[str, Any] | None = None, tasks: int = 3, **sections: Any) -> Pool:
    made, stream = pool(method, **sections)
    for task in stream[:tasks]:
        learn_protected(made, task)
    return made


def asked(classes: str = "abcdef") -> Inputs:
    return checker("finetune").kind.asked(classes)


def values(method: nn.Module, name: str) -> list[Tensor]:
    return [p.detach().clone() for p in parameters(method, name)]


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# -- the contract ---------------------------------------------------------------------------------------

KINDS: list[Any] = [
    (["select=gaussian"], "both"),
    (["members=4", "select={name: keys, top: 2, pull: 0.1}"], "pictures"),
    pytest.param(["members=4", "select={name: keys, top: 2, pull: 0.1}"], "texts", marks=pytest.mark.slow),
    pytest.param(["select={name: keys, pull: 0.5, start: mean}"], "pictures", marks=pytest.mark.slow),
    pytest.param(["each=2", "select=weights", "start=orthogonal"], "pictures", marks=pytest.mark.slow),
    pytest.param(["select=centres", "answer=own", "start=fresh"], "pictures", marks=pytest.mark.slow),
    pytest.param(
        ["select=means", "head=ridge", "again=true", "merge=0.1", "repel=0.1"], "pictures", marks=pytest.mark.slow
    ),
    pytest.param(["select=classifier", "query={after: 1}"], "pictures", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("changes", "on"), KINDS, ids=lambda v: v[0] if isinstance(v, list) else v)
def test_it_keeps_the_contract(changes: list[str], on: str) -> None:
    found = check_method("perpetune.methods.pool:Pool", changes, on=None if on == "both" else on)
    assert {(o.on, o.rule): o.fault for o in found if o.fault} == {}


def test_a_batch_that_votes_breaks_the_contract() -> None:
    """The control: the most frequent members of a batch for all its examples, as in the released code of L2P."""
    changes = ["select={name: vote, start: mean}"]
    found = [o for o in check_method("perpetune.methods.pool:Pool", changes, on="pictures") if o.fault]
    assert len(found) == 1
    assert "batch" in found[0].rule


# -- nothing but plain training where there is nothing to choose -------------------------------------------


@pytest.mark.parametrize(
    "method",
    [{"members": 1, "select": {"name": "keys", "pull": 0.0}}, {"members": 1, "select": "random"}],
    ids=["keys", "random"],
)
def test_one_member_for_all_tasks_is_plain_training(method: dict[str, Any]) -> None:
    one = taught(method)
    plain = checker("finetune")
    other = plain.learn(plain.make(), plain.stream())
    assert same(values(one, "default"), values(other, "default"))
    assert torch.equal(one.predict(asked()), other.predict(asked()))


@pytest.mark.parametrize(("select", "head"), paired([*STATISTICS, "keys", "last"], ["linear", "ridge"]))
def test_with_one_task_it_is_plain_training(select: str, head: str) -> None:
    one = taught({"select": select}, tasks=1, head=head)
    plain = checker("finetune", head=head)
    other = plain.learn(plain.make(), plain.stream()[:1])
    assert same(values(one, "task-0"), values(other, "default"))
    assert torch.equal(one.predict(asked("ab")), other.predict(asked("ab")))


# -- who is trained ---------------------------------------------------------------------------------------


def test_later_tasks_do_not_change_a_member() -> None:
    method, stream = pool({"select": "gaussian"})
    learn_protected(method, stream[0])
    first = values(method, "task-0")
    for task in stream[1:]:
        learn_protected(method, task)
    assert same(values(method, "task-0"), first)
    assert not same(values(method, "task-1"), first)


def test_members_that_no_batch_chose_do_not_move_even_with_decay() -> None:
    method, stream = pool({"members": 3, "select": {"name": "keys", "pull": 0.0}}, train={**TRAIN, "weight_decay": 0.5})
    keys = torch.zeros(3, 32)
    keys[0, 0] = 1.0
    before = {name: values(method, name) for name in method.working}
    method.queries._ask = lambda inputs: keys[:1].expand(len(Inputs.of(inputs).pixels), -1)  # all choose one member
    learn_protected(method, stream[0])
    moved = [not same(values(method, name), before[name]) for name in method.working]
    assert sum(moved) == 1
    assert method.use.tolist() == [24 * m for m in moved]


def test_only_chosen_members_get_gradients() -> None:
    method, stream = pool({"members": 4, "select": {"name": "keys", "top": 2}})
    batch = next(stream[0].batches(8))
    for p in method.parameters():
        p.requires_grad_(False)
    wanted = [p for name in method.working for p in parameters(method, name)]
    for p in wanted:
        p.requires_grad_(True)
    method.model.grow(stream[0])
    method.loss(stream[0], batch).backward()
    chosen = set(method.selector.pick(method.queries.features(batch)).index.flatten().tolist())
    for number, name in enumerate(method.working):
        grads = [p.grad for p in parameters(method, name)]
        assert (
            all(g is not None and bool(g.any()) for g in grads) if number in chosen else all(g is None for g in grads)
        )


def test_shared_sets_learn_with_every_task() -> None:
    section = {"general": {**PREFIX, "blocks": [0]}, "member": {**PREFIX, "blocks": [1]}}
    method, stream = pool({"select": "gaussian", "common": ["general"]}, pet="none", pets=section)
    seen = [values(method, "general")]
    for task in stream:
        learn_protected(method, task)
        seen.append(values(method, "general"))
    assert all(not same(a, b) for a, b in itertools.pairwise(seen))
    assert set(sets(method.model)) == {"general", "member", "task-0", "task-1", "task-2"}


@pytest.mark.parametrize("start", ["last", "fresh", "orthogonal"])
def test_where_a_member_starts(start: str) -> None:
    method, stream = pool({"select": "gaussian", "start": start}, train={**TRAIN, "epochs": [2, 0]})
    learn_protected(method, stream[0])
    learn_protected(method, stream[1])  # without a step
    first, second = values(method, "task-0"), values(method, "task-1")
    products = [
        float((a.flatten() @ b.flatten()).abs() / a.norm() / b.norm()) for a, b in zip(first, second, strict=True)
    ]
    if start == "last":
        assert same(first, second)
    elif start == "fresh":
        assert min(products) > 1e-4
    else:
        assert max(products) < 1e-5


# -- queries ------------------------------------------------------------------------------------------------


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Counts the examples that pass through the net with no pet in force, and with one."""
    counts = {"bare": 0, "tuned": 0}
    original = Classifier.features

    from perpetune.models.backbone import Backbone

    bare = Backbone.query

    def query(self: Backbone, inputs: Any, after: int | None = None) -> Tensor:
        found = bare(self, inputs, after)
        counts["bare"] += len(found)
        return found

    def features(self: Classifier, inputs: Inputs) -> Tensor:
        found = original(self, inputs)
        counts["tuned"] += len(found)
        return found

    monkeypatch.setattr(Backbone, "query", query)
    monkeypatch.setattr(Classifier, "features", features)
    return counts


@pytest.mark.parametrize(
    ("method", "learned"),
    [
        ({"select": "gaussian"}, 24),
        ({"select": "keys"}, 24),
        ({"members": 3, "select": "keys"}, 24),
        ({"members": 3, "select": "keys", "query": {"view": "drawn"}}, 72),
        ({"select": "last"}, 0),
    ],
    ids=["statistics", "keys", "shared", "drawn", "last"],
)
def test_each_picture_is_queried_once(forwards: dict[str, int], method: dict[str, Any], learned: int) -> None:
    made, stream = pool(method)
    for task in stream[:2]:
        forwards["bare"] = 0
        learn_protected(made, task)
        assert forwards["bare"] == learned
    forwards.update(bare=0, tuned=0)
    made.predict(asked("ab"))
    assert forwards == {"bare": 6, "tuned": 6}


def test_one_member_is_asked_without_a_query(forwards: dict[str, int]) -> None:
    made = taught({"select": "gaussian"}, tasks=1)
    forwards["bare"] = 0
    made.predict(asked("ab"))
    assert forwards["bare"] == 0


def test_pictures_that_were_asked_before_are_not_queried_again(forwards: dict[str, int]) -> None:
    """Test data of earlier tasks are asked after every task; the frozen net says the same of them each time."""
    made, inputs = taught({"select": "gaussian"}), asked()
    forwards["bare"] = 0
    first = made.predict(inputs)
    assert forwards["bare"] == 18
    assert torch.equal(made.predict(inputs), first)
    mixed = torch.cat([inputs.pixels[:3], 255 - inputs.pixels[3:6], inputs.pixels[:1]])
    forwards["bare"] = 0
    torch.testing.assert_close(made.predict(Inputs(pixels=mixed))[[0, 1, 2, 6]], first[[0, 1, 2, 0]])
    assert forwards["bare"] == 3
    made.recall.most = 4 * 32 * 2
    made.recall.forget()
    made.predict(inputs)
    assert len(made.recall._kept) == 2


def test_texts_are_found_again_whatever_their_padding() -> None:
    asked_for = []
    recall = Recall(lambda inputs: (asked_for.append(len(inputs)), torch.arange(len(inputs)).float()[:, None])[1])
    ids, mask = torch.tensor([[0, 0, 5, 6], [1, 2, 5, 6]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]).bool()
    recall(Inputs(ids=ids, mask=mask))
    assert recall(Inputs(ids=ids[:1, 2:], mask=mask[:1, 2:])).tolist() == [[0.0]]
    assert asked_for == [2]


def test_a_table_of_queries_is_what_batches_give() -> None:
    method, stream = pool({"select": "keys"})
    table = method._table(stream[0])
    rows = torch.cat([method.queries.of(batch.inputs) for batch in stream[0].batches(5)])
    numbers = torch.cat([batch.numbers for batch in stream[0].batches(5) if batch.numbers is not None])
    torch.testing.assert_close(table[numbers], rows, rtol=0, atol=1e-6)


@pytest.mark.parametrize("after", [1, 2])
def test_a_query_behind_a_block_is_what_a_tap_reads_there(after: int) -> None:
    backbone, inputs = tiny_backbone(), asked("ab")
    early = backbone.query(inputs, after)
    tapped = tiny_backbone().tap(2, "class").features(inputs)
    if after == 1:  # behind the last block a tap reads what the net's own norm makes
        torch.testing.assert_close(early, tapped[:, :32], rtol=0, atol=1e-6)
    assert early.shape == (6, 32)
    assert early.dtype == torch.float32
    with pytest.raises(UsageError, match=r"query.after is 3, and the net has 2 blocks"):
        backbone.query(inputs, 3)


def test_queries_are_of_the_bare_net_without_taps() -> None:
    method = taught({"select": "gaussian"}, backbone={"name": "perpetune:micro"})
    backbone, inputs = method.model.backbone, asked("ab")
    with using(method.model, None):
        bare = backbone.query(inputs)
    backbone.tap(2)
    assert torch.equal(method.queries.of(inputs), bare)


# -- choosing -------------------------------------------------------------------------------------------------

METHODS: list[dict[str, Any]] = [
    *({"select": name} for name in STATISTICS),
    {"select": {"name": "keys", "start": "mean"}},
    {"members": 4, "select": {"name": "keys", "top": 2}},
    {"members": 4, "select": {"name": "keys", "top": 2, "start": "mean", "spread": 1.0}},
    {"each": 2, "select": "weights", "start": "fresh"},
]


@pytest.mark.parametrize(("method", "head"), paired(METHODS, ["linear", "ridge"]), ids=str)
def test_companions_and_order_do_not_matter(method: dict[str, Any], head: str) -> None:
    made, inputs = taught(method, head=head), asked()
    made.recall.most = 0  # so that each is asked anew
    whole = made.predict(inputs)
    order = torch.randperm(18, generator=torch.Generator().manual_seed(0)).tolist()
    torch.testing.assert_close(made.predict(inputs.rows(order)), whole[order], rtol=0, atol=1e-5)
    alone = torch.cat([made.predict(inputs.rows([i])) for i in range(18)])
    torch.testing.assert_close(alone, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("select", STATISTICS)
def test_the_right_member_is_chosen_on_pictures_that_differ(select: str) -> None:
    """Patterns of tiny pictures are far from each other: every selector of statistics finds their task."""
    made = taught({"select": select})
    chosen = made.chosen(asked())
    assert chosen is not None
    right = torch.arange(3).repeat_interleave(6)
    assert float((chosen.index[:, 0] == right).float().mean()) >= 0.9


def test_choices_see_no_labels() -> None:
    """Training with permuted class names within a task leaves every choice of `keys` and `centres` as it was."""
    for select in ("centres", {"name": "keys", "start": "mean", "pull": 0.0}):
        made, stream = pool({"select": select})
        other, _ = pool({"select": select})
        for task in stream[:2]:
            learn_protected(made, task)
            renamed = dataclasses.replace(task, classes=task.classes[::-1])
            learn_protected(other, renamed)
        one, two = made.chosen(asked()), other.chosen(asked())
        assert one is not None
        assert two is not None
        assert torch.equal(one.index, two.index)


def test_the_order_of_tasks_does_not_change_what_is_chosen() -> None:
    made, stream = pool({"select": "gaussian"})
    other, _ = pool({"select": "gaussian"})
    for task in stream:
        learn_protected(made, task)
    for index, task in enumerate(reversed(stream)):
        learn_protected(other, dataclasses.replace(task, index=index))
    one, two = made.chosen(asked()), other.chosen(asked())
    assert one is not None
    assert two is not None
    assert torch.equal(one.index, 2 - two.index)


# -- answers ----------------------------------------------------------------------------------------------------


def test_own_lets_the_classes_of_the_chosen_task_answer() -> None:
    made = taught({"select": "gaussian", "answer": "own"})
    chosen = made.chosen(asked())
    assert chosen is not None
    best = made.predict(asked()).argmax(1)
    assert torch.equal(best // 2, chosen.index[:, 0])


def test_all_is_the_head_on_each_ones_features() -> None:
    """The brute force: one picture at a time, with its own member in force by name."""
    made, inputs = taught({"select": "gaussian"}, head="ridge"), asked()
    chosen = made.chosen(inputs)
    assert chosen is not None
    rows = []
    for i, member in enumerate(chosen.index[:, 0].tolist()):
        with using(made.model, f"task-{member}"):
            rows.append(made.model.predict(inputs.rows([i])))
    torch.testing.assert_close(made.predict(inputs), torch.cat(rows), rtol=0, atol=1e-5)


def test_a_wrong_choice_is_asked_again() -> None:
    """With the member of the winning class, where that is another; here the first choice is always the last member."""
    again = taught({"select": "last", "again": True}, head="ridge")
    once = taught({"select": "last"}, head="ridge")
    inputs = asked()
    first = once.predict(inputs)
    owners = (first.argmax(1) // 2).tolist()
    assert set(owners) != {2}
    expected = torch.cat([once.bank.predict(inputs.rows([i]), [owner], own=False) for i, owner in enumerate(owners)])
    torch.testing.assert_close(again.predict(inputs), expected, rtol=0, atol=1e-5)


def test_evaluation_says_who_was_chosen_and_what_the_right_one_gives() -> None:
    made, stream = pool({"select": "last", "answer": "own"})
    kind = checker("finetune").kind
    for task in stream:
        learn_protected(made, task)
    tasks = [dataclasses.replace(t, test=kind.examples(t.classes, 3, 99)) for t in stream]
    cells = [evaluate(made, task, among="seen", batch_size=4, told=True) for task in tasks]
    assert [cell and cell["members"] for cell in cells] == [{"task-3": 6}] * 3
    first = cells[0]
    assert first is not None
    assert first["correct"] == 0
    assert first["told"] >= 4
    untold = evaluate(made, tasks[0], among="seen", batch_size=4)
    assert untold is not None
    assert "told" not in untold


def test_random_members_answer_worse() -> None:
    kind = checker("finetune").kind

    def right(select: str) -> int:
        made, stream = pool({"select": select, "answer": "own"})
        for task in stream:
            learn_protected(made, task)
        tasks = [dataclasses.replace(t, test=kind.examples(t.classes, 8, 99)) for t in stream]
        cells = [evaluate(made, task, among="seen", batch_size=16) for task in tasks]
        return sum(int(cell["correct"]) for cell in cells if cell)

    assert right("gaussian") > 36
    assert right("random") < 30


def test_classes_that_return_have_rows_of_each_member() -> None:
    """Two domains with the same classes: each member keeps the rows of the head that it was trained with."""
    made, stream = pool({"select": "centres", "answer": "own"})
    first = stream[0]
    again = dataclasses.replace(checker("finetune").stream([("a", "b"), ("a", "b")])[1], name="later")
    learn_protected(made, first)
    rows = [p.detach().clone() for p in made.model.per_class()]
    learn_protected(made, again)
    inputs = asked("ab")
    with using(made.model, "task-0"):
        features = made.model.features(inputs)
    assert isinstance(made.model, Classifier)
    expected = features @ rows[0].T + (rows[1] if len(rows) > 1 else 0)
    found = made.bank.predict(inputs, [0] * 6, own=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# -- parts --------------------------------------------------------------------------------------------------------


def test_the_mean_of_loras_is_that_of_products() -> None:
    """Half of two products of rank one is a matrix of rank two: the factors' mean is another one (golden value G5)."""
    backbone = tiny_backbone()
    recipe = make_recipe({"pet": {"name": "lora", "rank": 2, "alpha": 2.0, "at": ["q"], "blocks": [0]}})
    method = build_method(recipe, backbone)
    from perpetune.pets import copy_set

    copy_set(method.model, "default", "other")
    one, other = pets(method.model, "default")[0], pets(method.model, "other")[0]
    assert isinstance(one, LoRA)
    assert isinstance(other, LoRA)

    def unit(at: int) -> tuple[Tensor, Tensor]:
        b, a = torch.zeros(32, 2), torch.zeros(2, 32)
        b[at, 0], a[0, at] = 1.0, 1.0
        return b, a

    one.set_factors([unit(0)])
    other.set_factors([unit(1)])
    average_into(method.model, "default", ["other"], 0.5)
    (b, a) = next(iter(one.factors()))
    expected = torch.zeros(32, 32)
    expected[0, 0] = expected[1, 1] = 0.5
    torch.testing.assert_close(b @ a, expected, rtol=0, atol=1e-7)


def test_the_mean_of_prefixes_is_that_of_values() -> None:
    method = taught({"select": "gaussian", "merge": 0.25, "start": "fresh"}, tasks=2, train={**TRAIN, "epochs": [2, 0]})
    plain = taught({"select": "gaussian", "start": "fresh"}, tasks=2, train={**TRAIN, "epochs": [2, 0]})
    for merged, own, first in zip(
        values(method, "task-1"), values(plain, "task-1"), values(plain, "task-0"), strict=True
    ):
        torch.testing.assert_close(merged, 0.75 * own + 0.25 * first)


def test_orthogonal_values_keep_their_length() -> None:
    method, _ = pool({"members": 4, "select": "keys"})
    before = values(method, method.working[3])
    drawn_orthogonal(method.model, method.working[:3], method.working[3:])
    for place, now in enumerate(values(method, method.working[3])):
        torch.testing.assert_close(now.norm(), before[place].norm())
        for name in method.working[:3]:
            assert float((values(method, name)[place].flatten() @ now.flatten()).abs()) < 1e-6


def test_ridge_over_members_is_ridge_on_the_features_of_each_ones_own() -> None:
    """What the papers train on drawn features of all tasks: here it is one regression on all real ones."""
    ridge = {"name": "ridge", "penalty": 0.1}
    method, stream = pool({"select": "gaussian"}, head=ridge)
    alone = Ridge(32, penalty=0.1)
    for number, task in enumerate(stream):
        learn_protected(method, task)
        with using(method.model, f"task-{number}"):
            rows = torch.cat([method.model.features(batch.inputs) for batch in task.batches(8)])
            targets = torch.cat([batch.targets for batch in task.batches(8)])
        alone.grow(task.classes, torch.Generator())
        counts = torch.zeros(len(alone.classes), dtype=torch.int64)
        counts[-2:] = 12
        alone.expect(counts)
        alone.observe(rows.detach(), alone.rows(task.classes)[targets])
        alone.flush()
        alone.settle()
    shown = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    assert isinstance(method.model, Classifier)
    mine, theirs = method.model.head, alone
    torch.testing.assert_close(mine(shown) / mine.scale, theirs(shown) / theirs.scale, rtol=0, atol=1e-4)


@pytest.mark.parametrize("count", [20, 400])
def test_a_batch_touches_only_the_members_that_it_chooses(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many members are stored: two members act on a batch, and nobody looks for the others."""
    from perpetune.methods.parts.bank import Kept, set_name
    from perpetune.pets import base, copy_set

    method, stream = pool({"select": "random"})
    learn_protected(method, stream[0])
    for slot in range(1, count):
        copy_set(method.model, "task-0", set_name(slot))
        method.bank.kept[slot] = Kept(slot, [f"t{slot}"], [], 1)
    method.selector.grow(count, torch.Generator().manual_seed(0))
    asked_for: list[str] = []
    known = base._known
    monkeypatch.setattr(base, "_known", lambda root, name, *_: (asked_for.append(name), known(root, name, *_))[1])
    chosen = torch.tensor([[3], [7], [3], [7], [3], [7]])
    monkeypatch.setattr(method.selector, "choose", lambda queries: Chosen(chosen[: len(queries)]))
    method.predict(asked("ab"))
    assert set(asked_for) == {"task-3", "task-7"}


def test_the_contrastive_loss() -> None:
    means, features = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.6, 0.8], [0.8, 0.6]])
    assert float(repulsion(means.double(), features.double())) == pytest.approx(1.0938533, abs=1e-7)
    assert float(repulsion(3 * means.double(), 5 * features.double())) == pytest.approx(1.0938533, abs=1e-7)


# -- protection ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("select", [{"name": "keys", "top": 2, "pull": 0.5}], ids=str)
def test_protected_members_keep_the_features_of_old_pictures(select: dict[str, Any]) -> None:
    """Shared members and learned keys: the old pictures' choices and features stay, and move without protection."""

    def moved(protect: dict[str, Any] | None) -> tuple[float, float]:
        method, stream = pool({"members": 3, "select": select}, protect=protect)
        learn_protected(method, stream[0])
        inputs = Inputs(pixels=torch.stack([stream[0].train.load(i, None) for i in range(8)]))
        before, chosen = method.features(inputs), method.chosen(inputs)
        for task in stream[1:]:
            learn_protected(method, task)
        now = method.chosen(inputs)
        assert chosen is not None
        assert now is not None
        changed = float((now.index != chosen.index).float().mean())
        return float((method.features(inputs) - before).norm() / before.norm()), changed

    held, kept = moved({"energy": 0.99999})
    free, _ = moved(None)
    assert kept == 0
    assert held < 0.1 * free


# -- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", every(METHODS, 2), ids=str)
def test_one_object_goes_through_states(method: dict[str, Any]) -> None:
    made, stream = pool(method)
    states = [snapshot(made)]
    for task in stream:
        learn_protected(made, task)
        states.append(snapshot(made))
    for number in (0, 3, 1, 2, 3):
        restore(made, states[number], "memory")
        assert snapshot(made) == states[number]


def test_a_state_stores_each_member_in_the_task_that_brings_it(tmp_path: Path) -> None:
    made, stream = pool({"select": "means"})
    state = State.create(tmp_path / "state", make_recipe({}), {"spec": "x", "fingerprint": "f"})
    asked_of, documents = asked(), {"task.json": {}, "metrics.json": {"cells": {}}}
    answers = []
    for index, task in enumerate(stream):
        learn_protected(made, task)
        state.commit(index, task.name, made, documents)
        answers.append(made.predict(asked_of))
        assert [n for n in state.committed[index].index_of() if RESTING.fullmatch(n)] == [
            f"rest-task-{index}.safetensors"
        ]
        assert {name: one.task for name, one in state.committed[index].rest().items()} == {
            f"task-{i}": i for i in range(index + 1)
        }
    other, _ = pool({"select": "means"})
    for index in (2, 0, 1):
        State(tmp_path / "state").load(other, state.committed[index])
        assert torch.equal(other.predict(asked_of), answers[index])
    state.load(other)
    other.bank.drop(0)  # all behind it have new numbers, so their files are others
    state.commit(3, "after", other, documents)
    assert {name: one.task for name, one in state.committed[3].rest().items()} == {"task-0": 3, "task-1": 3}
    third, _ = pool({"select": "means"})
    files = state.committed[2].read()
    del files["rest-task-1.safetensors"]
    with pytest.raises(StateError, match="sets at rest do not fit the recipe: missing task-1"):
        restore(third, files, "here")


# -- bad options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "sections", "message"),
    [
        ({"members": 3, "select": "gaussian"}, {}, "select: gaussian finds the task of an example"),
        ({"select": {"name": "keys", "top": 2}}, {}, "with members: task one member acts"),
        ({"members": 2, "select": {"name": "keys", "top": 3}}, {}, "select.top is 3, and there are 2 members"),
        ({"each": 2}, {}, "each: 2 needs select: weights"),
        ({"members": 3, "select": "keys", "answer": "own"}, {}, "answer: own needs one member for each task"),
        ({"again": True, "answer": "own"}, {}, "again: true asks the owner"),
        ({"select": "gausian"}, {}, "gaussian"),
        ({"select": {"name": "keys", "tops": 2}}, {}, "tops is not an option; .*top"),
        ({"common": ["other"]}, {}, "names 'other' in common"),
        ({}, {"pet": "none"}, "needs one set of pets"),
        ({}, {"head": {"name": "ridge", "carry": True}}, "leave head.carry out"),
        ({}, {"protect": True}, "has nothing to protect"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(method: dict[str, Any], sections: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        pool(method, **sections)
    assert "\n" not in str(error.value)


def test_members_that_are_never_chosen_are_reported() -> None:
    method, stream = pool({"members": 6, "select": {"name": "keys", "top": 2, "pull": 0.0}})
    query = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    method.queries._ask = lambda inputs: query.expand(len(Inputs.of(inputs).pixels), -1)
    learn_protected(method, stream[0])
    assert not method.facts()["pool"]["warning"]
    learn_protected(method, stream[1])
    assert "2 of 6 members in 2 tasks" in method.facts()["pool"]["warning"]
    assert sum(method.use.tolist()) == 2 * 2 * 24


# -- export ----------------------------------------------------------------------------------------------------------


def test_an_export_has_a_folder_for_each_member_and_the_selector(tmp_path: Path) -> None:
    method = taught({"select": "gaussian"}, tasks=2, pet={"name": "lora", "rank": 2}, head="ridge")
    written = export_learned(method, method.model.backbone, tmp_path / "out")
    names = {str(path.relative_to(tmp_path / "out")) for path in written}
    assert {"task-1/adapter_model.safetensors", "task-2/head.json", "selector.json", "selector.safetensors"} <= names
    about = json.loads((tmp_path / "out" / "selector.json").read_text())
    assert about["folders"] == ["task-1", "task-2"]
    assert about["selector"]["name"] == "gaussian"
    chosen, loaded = method.chosen(asked("abcd")), method.select.make(32)
    loaded.set_extra_state(about["extra"])
    loaded.load_state_dict({**load_file(tmp_path / "out" / "selector.safetensors"), "_extra_state": about["extra"]})
    assert chosen is not None
    again = loaded.choose(method.queries.of(asked("abcd")))
    assert torch.equal(again.index, chosen.index)


def test_a_pool_with_a_common_set_cannot_be_exported(tmp_path: Path) -> None:
    section = {"general": {"name": "lora", "blocks": [0]}, "member": {"name": "lora", "blocks": [1]}}
    method = taught({"select": "gaussian", "common": ["general"]}, tasks=1, pet="none", pets=section)
    with pytest.raises(UsageError, match="holds one set: use the state itself"):
        export_learned(method, method.model.backbone, tmp_path / "out")

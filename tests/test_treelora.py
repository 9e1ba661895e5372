"""TreeLoRA on tiny models: its loss, its search, its adapters, what a stop changes, the plain training inside it."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from plain_tree import PlainTree
from safetensors.torch import load, load_file, save
from tiny import (
    chiefly,
    every,
    paired,
    picture_folder,
    recipe,
    split_folder,
    task_tensors,
    tiny_language_model,
    vit_folder,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from perpetune.build import build_method
from perpetune.check import SIZE, Pictures, rules, tiny_backbone
from perpetune.cli import call
from perpetune.errors import Interrupted, StateError, UsageError
from perpetune.evaluate import evaluate
from perpetune.files import to_json
from perpetune.forecast.trial import held_by
from perpetune.learner import Learner
from perpetune.learning import learn_protected
from perpetune.methods.finetune import FineTune
from perpetune.methods.treelora import adapters
from perpetune.methods.treelora import search as task_search
from perpetune.methods.treelora.method import TreeLoRA
from perpetune.methods.treelora.search import Search
from perpetune.numerics import similarity_tree
from perpetune.numerics.lowrank import Factors
from perpetune.numerics.signature import distance, normalised
from perpetune.numerics.similarity_tree import SimilarityTree
from perpetune.pets import parameters, pets, slots, using
from perpetune.pets.lora import LoRA
from perpetune.recipe import make_recipe
from perpetune.report.sections.tree import grown
from perpetune.runtime import Runtime, Silent
from perpetune.seeding import generator
from perpetune.snapshot import EARLIER, restore, snapshot
from perpetune.state import State
from perpetune.store import RESTING
from perpetune.tasks import Batch, Examples, Inputs, Task

CLASSES = ["a", "b", "c", "d", "e", "f"]


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vit_folder(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return split_folder(tmp_path_factory.mktemp("data"), CLASSES, 8, 4)


def learned(vit: Path, data: Path, method: dict[str, Any], folder: Path | None = None, **changes: Any) -> Learner:
    learner = Learner(recipe(vit, data, method=method, **changes), folder)
    learner.run()
    return learner


def weights(method: torch.nn.Module, name: str = "default") -> list[Tensor]:
    return [p.detach().clone() for pet in pets(method, name) for p in pet.parameters()]


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Domain(Examples):
    """Noisy pictures: a pattern for each class, which are others in each domain."""

    def __init__(self, classes: Sequence[str], domain: int, each: int = 12, seed: int = 0):
        patterns = [torch.randint(0, 256, (3, SIZE, SIZE), generator=generator("pattern", c, domain)) for c in classes]
        self.targets = [y for y in range(len(classes)) for _ in range(each)]
        noise = torch.randint(-40, 41, (len(self.targets), 3, SIZE, SIZE), generator=generator("noise", seed))
        pairs = zip(self.targets, noise, strict=True)
        self.pixels = [(patterns[y] + n).clamp(0, 255).to(torch.uint8) for y, n in pairs]

    def __len__(self) -> int:
        return len(self.targets)

    def load(self, index: int, seed: int | None) -> Tensor:
        return self.pixels[index]


def treelora(train: dict[str, Any] | None = None, **options: Any) -> TreeLoRA:
    method = {"name": "treelora", "groups": 2, **options}
    content = {
        "pet": {"name": "lora", "rank": 2},
        **{key: method.pop(key) for key in ("head", "pet", "protect") if key in method},
        "method": method,
        "train": {"epochs": 2, "batch_size": 8, "lr": 0.01, **(train or {})},
    }
    made = build_method(make_recipe(content), tiny_backbone())
    assert isinstance(made, TreeLoRA)
    return made


def domains(numbers: Sequence[int], classes: Sequence[str] = "ab", each: int = 12, seed: int = 0) -> list[Task]:
    """Tasks with the same classes; those of one number look alike, drawn anew."""
    return [
        Task(i, f"t{i}", tuple(classes), Domain(classes, n, each, 100 * seed + i), runtime=Runtime(seed=seed))
        for i, n in enumerate(numbers)
    ]


def increments(count: int, each: int = 12) -> list[Task]:
    """Tasks of two new classes."""
    pairs = [(f"c{2 * i}", f"c{2 * i + 1}") for i in range(count)]
    return [Task(i, f"t{i}", names, Pictures(names, each, seed=i)) for i, names in enumerate(pairs)]


def taught(method: TreeLoRA, tasks: Sequence[Task]) -> TreeLoRA:
    for task in tasks:
        learn_protected(method, task)
    return method


def updates(method: TreeLoRA, name: str) -> list[Tensor]:
    """`ΔW` of each module, but for the scale, in float64."""
    loras = [pet for pet in pets(method.model, name) if isinstance(pet, LoRA)]
    return [b.detach().double() @ a.detach().double() for pet in loras for b, a in pet.factors()]


def tree(method: TreeLoRA) -> dict[str, Any]:
    found: dict[str, Any] = method.facts()["tree"]
    return found


# -- the plain training inside -----------------------------------------------------------------------

PLAIN_TREE: dict[str, Any] = {"name": "treelora", "regularise": 0.0, "start": "last", "answer": "last"}
PLAIN: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd": {
        "train": {"epochs": 4, "batch_size": 8, "lr": 0.05, "optimizer": "sgd", "clip": 0.5, "accumulate": 2},
    },
    "dropout": {"pet": {"name": "lora", "rank": 2, "dropout": 0.3}},
    "protect": {"protect": {"energy": 0.9}, "head": "ncm"},
    "fused": {"backbone": {"name": "timm:test_vit", "pretrained": False, "image_size": 32}},
}


@pytest.mark.parametrize("case", chiefly(PLAIN, ["dropout", "fused"]))
def test_without_its_regulariser_and_from_the_last_adapter_it_is_plain_training(
    vit: Path, data: Path, case: str
) -> None:
    """The bits are the same after 24 updates."""
    changes = {"train": {"epochs": 4, "batch_size": 8, "lr": 0.01}, **PLAIN[case]}
    plain = learned(vit, data, {"name": "finetune"}, **changes)
    ours = learned(vit, data, PLAIN_TREE, **changes)
    assert isinstance(plain.method, FineTune)
    assert isinstance(ours.method, TreeLoRA)
    assert same(weights(plain.method), weights(ours.method))
    assert same(list(plain.method.model.trained()), list(ours.method.model.trained()))
    cells = {
        name: {k: v for k, v in (c or {}).items() if k not in ("others", "way")} for name, c in ours.evaluate().items()
    }
    assert plain.evaluate() == cells
    if case == "protect":
        one, other = (learner.method.protection for learner in (plain, ours))
        assert one is not None
        assert other is not None
        ours_, theirs = ({n: t for n, t in p.state_dict().items() if isinstance(t, Tensor)} for p in (other, one))
        assert ours_.keys() == theirs.keys()
        assert same(list(ours_.values()), list(theirs.values()))


def test_the_control_with_its_regulariser_it_is_not(vit: Path, data: Path) -> None:
    plain = learned(vit, data, {"name": "finetune"})
    drawn = learned(vit, data, {"name": "treelora", "regularise": 0.1, "start": "last"})
    assert not same(weights(plain.method), weights(drawn.method))


# -- the loss ----------------------------------------------------------------------------------------


def searching(**options: Any) -> tuple[TreeLoRA, Task, Batch]:
    """In float64, before a step of the fourth task, with values of its own."""
    tasks = domains([0, 1, 2, 3])
    method = taught(treelora(**options), tasks[:3])
    method.model.grow(tasks[3])
    method._begin(tasks[3])
    method.double()
    for p in parameters(method.model, "default"):
        p.requires_grad_(True)
    examples: Any = tasks[3].train
    return method, tasks[3], Batch(torch.stack(examples.pixels[10:14]), torch.tensor(examples.targets[10:14]))


def explicit(method: TreeLoRA) -> Tensor:
    """`mean_l (1 − cos(ΔW_l, ΔW'_l))` of whole matrices."""
    assert method.search is not None
    loras = [pet for pet in pets(method.model, "default") if isinstance(pet, LoRA)]
    own = [b @ a for pet in loras for b, a in pet.factors()]
    slot_of = {m: h for layer, h in zip(method.layers, method.search.helpers(), strict=True) for m in layer}
    theirs = [updates(method, f"task-{slot_of[m]}")[m] for m in range(len(own))]
    least = 0.1 * torch.stack([v.norm() for v in theirs]).pow(2).mean().sqrt()
    assert all(w.norm() > least for w in own)
    assert all(v.norm() > least for v in theirs), "so that it is the cosine itself"
    return torch.stack([1 - (w * v).sum() / (w.norm() * v.norm()) for w, v in zip(own, theirs, strict=True)]).mean()


@pytest.mark.parametrize("start", ["nearest", "last"])
@pytest.mark.parametrize("strength", [0.1, 3.0])
def test_the_loss_is_the_tasks_and_the_regulariser_of_whole_matrices(start: str, strength: float) -> None:
    method, task, batch = searching(start=start, regularise=strength)
    trained = parameters(method.model, "default")
    rng = generator("moved")
    with torch.no_grad():
        for p in trained:
            p.add_(torch.randn(p.shape, generator=rng) * 0.05)
    with using(method.model, "default"):
        bare = method.model.loss(task, batch)
    wanted = bare + strength * explicit(method)
    found = method.loss(task, batch)
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    for one, other in zip(torch.autograd.grad(found, trained), torch.autograd.grad(wanted, trained), strict=True):
        assert float((one - other).norm()) <= 1e-5 * float(other.norm())
    assert 0 < float((found - bare).detach()) <= 2 * strength


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
def test_the_regulariser_is_bounded_whatever_the_loss_is(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    method, task, batch = searching(start="last")
    plain = method.model.loss
    monkeypatch.setattr(method.model, "loss", lambda *a: factor * plain(*a))
    with using(method.model, "default"):
        bare = method.model.loss(task, batch)
    first = float((method.loss(task, batch) - bare).detach())
    assert 0 <= first <= 0.2
    assert first == pytest.approx(0.1 * float(explicit(method).detach()), rel=1e-6)
    with torch.no_grad():  # and the other end
        for pet in pets(method.model, "default"):
            assert isinstance(pet, LoRA)
            for up in pet.up:
                up.neg_()
    turned = float((method.loss(task, batch) - bare).detach()) if factor < 1 else 0.2 - first
    assert turned == pytest.approx(0.2 - first, abs=1e-4)


def test_where_there_is_nothing_to_be_drawn_to_it_is_the_tasks_loss_exactly() -> None:
    tasks = domains([0, 1])
    for strength, done in ((0.5, 0), (0.0, 1)):
        method = taught(treelora(regularise=strength), tasks[:done])
        method.model.grow(tasks[done])
        method._begin(tasks[done])
        examples: Any = tasks[done].train
        batch = Batch(torch.stack(examples.pixels), torch.tensor(examples.targets))
        with using(method.model, "default"):
            wanted = method.model.loss(tasks[done], batch)
        assert torch.equal(method.loss(tasks[done], batch), wanted)
        assert method.search is None


def test_modules_with_hardly_an_update_have_hardly_a_say() -> None:
    """Of nearly nothing the direction is rounding; followed, it would be made large by a step of SGD."""
    method, task, batch = searching(start="last", regularise=1.0)
    with torch.no_grad():
        for name in ("default", *(f"task-{slot}" for slot in method.bank.kept)):
            first = pets(method.model, name)[0]
            assert isinstance(first, LoRA)
            first.up[0].mul_(1e-9)
    first = pets(method.model, "default")[0]
    trained = parameters(method.model, "default")
    with using(method.model, "default"):
        bare = method.model.loss(task, batch)
    grads = dict(zip(trained, torch.autograd.grad(method.loss(task, batch) - bare, trained), strict=True))
    assert 0.01 < max(float(g.abs().max()) for g in grads.values()) < 100
    assert max(float(grads[p].abs().max()) for p in first.parameters()) < 1e-4


def test_from_zero_its_gradient_is_bounded() -> None:
    """A fresh adapter's ΔW is zero, where a cosine has no slope; one large step would spoil Adam's memory."""
    method, task, batch = searching(start="fresh", regularise=1.0)
    trained = parameters(method.model, "default")
    assert all(not w.any() for w in updates(method, "default"))
    with using(method.model, "default"):
        bare = method.model.loss(task, batch)
    loss = method.loss(task, batch)
    assert float((loss - bare).detach()) == 1.0
    found = torch.autograd.grad(loss - bare, trained)
    assert all(bool(torch.isfinite(g).all()) for g in found)
    assert 0 < max(float(g.abs().max()) for g in found) < 100
    method = taught(treelora(start="fresh", regularise=1.0), domains([0, 1]))
    norms = [[float(w.norm()) for w in updates(method, f"task-{i}")] for i in (0, 1)]
    assert min(norms[1]) > 0.3 * min(norms[0]), "and it learns"


# -- the search ---------------------------------------------------------------------------------------


@functools.cache
def copies(kind: str, seed: int) -> tuple[TreeLoRA, dict[str, int]]:
    """Learns tasks of which the fourth is the first's likeness; what that was drawn to in the deepest layers."""
    method = taught(treelora({"epochs": 4}, search=kind, start="fresh"), domains([0, 1, 2, 0], seed=seed))
    picks: dict[str, int] = tree(method)["helped"][-1]["steps"]
    assert sum(picks.values()) == 12
    return method, picks


@pytest.mark.parametrize("seed", every([0, 1, 2], 3))
def test_the_search_finds_the_task_that_this_one_is_a_copy_of(seed: int) -> None:
    method, picks = copies("lcb", seed)
    assert max(picks, key=lambda name: picks[name]) == "t0"
    far = tree(method)["distances"][3]
    assert far.index(min(far[:3])) == 0


def test_the_controls_do_not_find_it_and_a_look_at_all_does() -> None:
    assert "t0" not in copies("farthest", 0)[1]
    assert copies("random", 0)[1]["t0"] < copies("lcb", 0)[1]["t0"] <= copies("nearest", 0)[1]["t0"]


def test_it_starts_from_the_nearest() -> None:
    method = taught(treelora(start="nearest"), domains([0, 1, 2, 0]))
    assert (tree(method)["asked"], tree(method)["start"]) == ("nearest", "t0")


@pytest.mark.parametrize(("kind", "every"), paired(["lcb", "nearest", "random", "farthest"], [1, 3]))
def test_what_helped_is_told_for_every_step(kind: str, every: int) -> None:
    method = treelora(search=kind, every=every)
    for i, task in enumerate(domains([0, 1, 2])):
        method.learn(task)
        told = tree(method)["helped"]
        assert [h["group"] for h in told] == (["block 0", "block 1"] if i else [])
        assert all(sum(h["steps"].values()) == 6 for h in told)
        assert {name for h in told for name in h["steps"]} <= {f"t{j}" for j in range(i)}
    taught(other := treelora(search=kind, regularise=0.0), domains([0, 1]))
    assert tree(other)["helped"] == [], "where nothing is drawn, nothing helps"


def stored(count: int, modules: int = 4, size: int = 16) -> tuple[SimilarityTree, Tensor]:
    points = normalised(torch.randn(count, modules, size, generator=generator("points")))
    return SimilarityTree.build(points, [[0, 1], [2], [3]]), points


@pytest.mark.parametrize("count", [2, 8, 64, 512])
def test_a_step_does_not_go_through_all_tasks(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    known, points = stored(count)
    search = Search(known, "lcb", 0.3, 0, points[1])
    called: list[str] = []

    def counting(module: Any, name: str) -> None:
        actual: Callable[..., Any] = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: (called.append(name), actual(*a, **k))[1])

    counting(task_search, "distance")
    counting(similarity_tree, "distance")
    counting(similarity_tree, "_holds")
    counting(SimilarityTree, "point")
    for _ in range(20):
        called.clear()
        search.step(points[1])
        search.helpers()
        assert called.count("distance") == 2
        assert called.count("point") <= 3
        assert called.count("_holds") <= 4 * known.depth
    for kind in ("nearest", "farthest"):  # the control: these look at many
        other = Search(known, kind, 0.3, 0, points[1])  # type: ignore[arg-type]
        called.clear()
        other.step(normalised(torch.randn(4, 16, generator=generator("far"))))
        assert called.count("distance") >= count


class Reads(TorchDispatchMode):
    """Counts numbers that are read out of tensors: on a GPU each read waits for it."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_no_more_is_read_from_the_device_where_there_are_more_modules() -> None:
    """Neither for the loss of a step nor for its gradient."""
    counts = []
    for blocks in ([0], [0, 1]):
        method, reads = treelora(pet={"name": "lora", "rank": 2, "blocks": blocks}, groups=1), Reads()

        def counted(call: Callable[..., Any], reads: Reads = reads) -> Callable[..., Any]:
            def inside(*args: Any) -> Any:
                with reads:
                    return call(*args)

            return inside

        tasks = domains([0, 1, 2])
        taught(method, tasks[:2])
        method.loss, method._look = counted(method.loss), counted(method._look)  # type: ignore[method-assign]
        method.learn(tasks[2])
        counts.append((method.gradients.shape[0], reads.count))
    assert [modules for modules, _ in counts] == [2, 4]
    assert 0 < counts[0][1] == counts[1][1] <= 6 * 8


def test_helpers_stand_for_ever_smaller_branches() -> None:
    known, points = stored(32)
    search = Search(known, "nearest", 0.3, 0, points[5])
    assert search.picked == 5
    path = known.path(5)
    for level, helper in enumerate(search.helpers()[:-1]):
        branch = path[level + 1]
        assert helper in branch.tasks
        far = {task: float(distance(points[task], branch.mean)) for task in branch.tasks}
        assert far[helper] == min(far.values())
    assert search.helpers()[-1] == 5, "in the deepest layers it is the picked one itself, however many tasks there are"
    assert Search(SimilarityTree.build(points[:1]), "lcb", 0.3, 0, points[0]).residual(0, points[3]) == 0.5
    for task in known.ids:
        assert 0 <= search.residual(task, points[7]) <= 1


def test_of_two_which_are_equally_far_from_their_middle_the_earlier_one_stands_for_both() -> None:
    """By rounding alone it would be either, as the processor has it."""
    for seed in range(8):
        points = normalised(torch.randn(4, 4, 16, generator=generator("four", seed)))
        known = SimilarityTree.build(points, groups=[[0], [1], [2, 3]])
        pairs = [node for node in known if len(node.tasks) == 2]
        assert len(pairs) == 2
        for first, second in (node.tasks for node in pairs):
            for picked in (first, second):
                assert Search(known, "nearest", 0.3, 0, points[picked]).helpers() == [first, picked, picked]


def test_a_search_goes_on_from_its_state() -> None:
    known, points = stored(16)
    queries = normalised(torch.randn(20, 4, 16, generator=generator("queries")))
    for kind in ("lcb", "nearest", "random", "farthest"):
        whole, half = (Search(known, kind, 0.3, 7, points[0]) for _ in range(2))  # type: ignore[arg-type]
        for query in queries[:10]:
            whole.step(query)
            half.step(query)
        other = Search(known, kind, 0.3, 7, queries[0])  # type: ignore[arg-type]
        other.load_state(json.loads(json.dumps(half.state())))
        for query in queries[10:]:
            whole.step(query)
            other.step(query)
            assert other.picked == whole.picked
        assert other.state() == whole.state()
    with pytest.raises(StateError, match="belongs to another tree"):
        Search(stored(8)[0], "lcb", 0.3, 7, points[0]).load_state(whole.state())


# -- adapters -----------------------------------------------------------------------------------------


def test_a_slot_holds_exactly_what_was_trained_and_is_not_touched_again() -> None:
    method, after = treelora(), []
    for task in domains([0, 1, 2]):
        learn_protected(method, task)
        after.append(weights(method.model))
    for slot, values in enumerate(after):
        assert same(weights(method.model, f"task-{slot}"), values)
    assert not same(after[0], after[1])
    assert [e["tasks"] for e in tree(method)["adapters"]] == [["t0"], ["t1"], ["t2"]]
    assert {e["bytes"] for e in tree(method)["adapters"]} == {4 * sum(w.numel() for w in after[0])}


@pytest.mark.parametrize("start", ["nearest", "last", "fresh"])
def test_a_task_starts_where_it_is_asked_to(start: str) -> None:
    method = treelora(start=start)
    initial = weights(method.model)
    tasks = domains([0, 1, 2, 0])
    taught(method, tasks[:3])
    method.model.grow(tasks[3])
    method._begin(tasks[3])
    wanted = {"nearest": weights(method.model, "task-0"), "last": weights(method.model, "task-2"), "fresh": initial}
    assert [same(weights(method.model), values) for values in wanted.values()] == [start == name for name in wanted]
    assert method.task_facts["start"] == {"nearest": "t0", "last": "t2", "fresh": None}[start]


def test_the_merged_set_is_the_mean_of_all() -> None:
    """Exactly where the ranks leave room for it, and else the best of its rank."""
    method = taught(treelora(), [*domains([0], each=12), *domains([0, 1], each=6)[1:]])
    sets, mean = [updates(method, f"task-{i}") for i in (0, 1)], updates(method, "merged")
    for one, other, found in zip(*sets, mean, strict=True):
        wanted = (24 * one + 12 * other) / 36
        u, values, v = torch.linalg.svd(wanted)
        best = (u[:, :2] * values[:2]) @ v[:2]
        torch.testing.assert_close(found, best, atol=1e-6, rtol=1e-4)
    one_alone = taught(treelora(), domains([0]))
    for a, b in zip(updates(one_alone, "merged"), updates(one_alone, "task-0"), strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


def test_sets_that_share_a_basis_are_merged_without_a_loss() -> None:
    method = taught(treelora(), domains([0, 1, 2]))
    with torch.no_grad():
        for places in zip(*(pets(method.model, f"task-{i}") for i in range(3)), strict=True):
            for pet in places[1:]:
                pet.down.copy_(places[0].down)  # type: ignore[union-attr, operator, arg-type]
    method.bank.merge_all("merged")
    sets = [updates(method, f"task-{i}") for i in range(3)]
    for one, two, three, found in zip(*sets, updates(method, "merged"), strict=True):
        torch.testing.assert_close(found, (one + two + three) / 3, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("budget", [1, 2])
def test_over_the_budget_the_nearest_become_one(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    method = treelora(budget=budget)
    seen: list[tuple[list[Factors], list[float]]] = []
    actual = adapters.merged
    monkeypatch.setattr(adapters, "merged", lambda parts, w, rank: (seen.append((parts, w)), actual(parts, w, rank))[1])
    for i, task in enumerate(domains([0, 1, 0, 1])):
        learn_protected(method, task)
        told, bank, known = tree(method), method.bank, method.similar.tree
        assert len(bank.kept) == len(known) == min(i + 1, budget)
        assert list(bank.kept) == list(known.ids) == [int(k) for k in told["names"]]
        assert {name for _, s in slots(method.model) for name in s.pets} == {
            "default",
            "merged",
            *(f"task-{slot}" for slot in known.ids),
        }
        assert sorted(t for kept in bank.kept.values() for t in kept.tasks) == [f"t{j}" for j in range(i + 1)]
        assert sum(kept.weight for kept in bank.kept.values()) == 24 * (i + 1)
        assert len(told["merged"]) == (1 if i >= budget else 0)
        assert method.task_facts["start"] is None or "t" in method.task_facts["start"]
    if budget == 2:
        assert [sorted(kept.tasks) for kept in bank.kept.values()] == [["t0", "t2"], ["t1", "t3"]]
    else:
        assert told["names"] == {"0": "t0 + t1 + t2 + t3"}
        assert [24.0 * 3, 24.0] in [w for _, w in seen], "weighted by the examples of each"
    assert method.tasks == ["t0", "t1", "t2", "t3"]
    assert [member for member, _ in method.selector.rows] == [0, 0, 1, 1, 2, 2, 3, 3]
    for number, task in enumerate(domains([0, 1, 0, 1], seed=9)):
        examples: Any = task.train
        routes = method._routes(torch.stack(examples.pixels))
        assert {f"t{number}" in method.bank.kept[slot].tasks for slot in routes} == {True}


def test_merging_weighs_by_examples_at_equal_rank() -> None:
    method = taught(treelora(), [*domains([0], each=12), *domains([0, 1], each=4)[1:]])
    before = [updates(method, f"task-{i}") for i in (0, 1)]
    points = [method.similar.tree.point(i) for i in (0, 1)]
    method.bank.budget = 1
    method._keep(domains([0, 1, 2], each=4)[2])  # a third one, which is the second's adapter once more
    assert len(method.bank.kept) == 1
    assert all(pet.rank == 2 for pet in pets(method.model, "task-0") if isinstance(pet, LoRA))
    assert method.bank.weight(0) == 24 + 8 + 8
    assert len(points) == len(before) == 2
    mean = method.similar.tree.point(0)
    assert float(mean.abs().sum(-1).max()) == pytest.approx(1, abs=1e-5), "of normalised rows"


STREAMS: dict[str, Callable[[], list[Task]]] = {
    "the same classes": lambda: domains([0, 1, 2]),
    "one class each": lambda: [Task(i, f"t{i}", (c,), Pictures(c, 6, seed=i)) for i, c in enumerate("abc")],
    "fewer than a batch": lambda: domains([0, 1, 2], each=1),
    "the same again": lambda: domains([0, 0, 0]),
    "overlapping": lambda: [
        Task(i, f"t{i}", tuple(c), Pictures(c, 6, seed=i)) for i, c in enumerate(("ab", "bc", "ab", "d"))
    ],
}


@pytest.mark.parametrize(("stream", "options"), paired(STREAMS, [{}, {"budget": 1, "start": "fresh"}]))
def test_any_stream_of_tasks_is_learned_and_stored(stream: str, options: dict[str, Any]) -> None:
    tasks = STREAMS[stream]()
    method = taught(treelora(**options), tasks)
    pixels = torch.stack([task.train.load(0, None) for task in tasks])
    with torch.no_grad():
        answers = method.answers(pixels)
    for scores in (answers.scores, *answers.others.values()):
        assert scores.shape == (len(pixels), len(method.classes))
        assert bool(torch.isfinite(scores).all())
    other = treelora(**options)
    restore(other, snapshot(method), "memory")
    assert other.facts() == json.loads(json.dumps(method.facts()))
    assert snapshot(other) == snapshot(method)
    with torch.no_grad():
        assert torch.equal(other.predict(pixels), method.predict(pixels))


def test_no_epoch_and_no_lora() -> None:
    method = taught(treelora({"epochs": 0}), domains([0, 1]))
    assert tree(method)["distances"] == [[0, 0], [0, 0]]
    for pet, told in (("none", "the recipe has no pet: use `pet: lora`"), ("adapter", "made of LoRA's gradients")):
        with pytest.raises(UsageError, match=told):
            build_method(make_recipe({"method": "treelora", "pet": pet}), tiny_backbone())
    for head in ("ridge", "ncm"):
        carried = {"method": "treelora", "pet": "lora", "head": {"name": head, "carry": True}}
        with pytest.raises(UsageError, match=r"leave head\.carry out, or use method: finetune or olora"):
            build_method(make_recipe(carried), tiny_backbone())


# -- prediction ---------------------------------------------------------------------------------------


def test_a_task_answers_as_it_did_whatever_was_learned_of_its_classes_since() -> None:
    """The rows of the head are kept with the adapter; the control without them answers otherwise."""
    first, *later = domains([0, 1, 2])
    inputs = torch.stack([first.train.load(i, None) for i in range(len(first.train))])
    method = taught(treelora(start="last"), [first])
    slots_of = [0] * len(inputs)
    before = method.bank.predict(inputs, slots_of)
    current = [p.clone() for p in method.model.per_class()]
    for task in later:
        method.learn(task)
    assert not same(current, list(method.model.per_class()))
    now = [p.clone() for p in method.model.per_class()]
    torch.testing.assert_close(method.bank.predict(inputs, slots_of), before, atol=1e-6, rtol=1e-6)
    assert same(now, list(method.model.per_class()))  # put back
    other = treelora(start="last")
    restore(other, snapshot(method), "here")
    torch.testing.assert_close(other.bank.predict(inputs, slots_of), before, atol=1e-6, rtol=1e-6)
    method.bank._rows.clear()
    assert (method.bank.predict(inputs, slots_of) - before).abs().max() > 1e-3


def test_a_class_of_two_merged_tasks_has_the_mean_of_its_rows() -> None:
    tasks = domains([0, 1], each=4) + domains([2], classes="bc", each=12)
    tasks[2] = dataclasses.replace(tasks[2], index=2, name="t2")
    method, rows = treelora(start="last"), []
    for task in tasks:
        method.learn(task)
        rows.append({c: method.bank._row(c) for c in task.classes})
    found = method.bank._stored_rows("merged")
    assert set(found) == {"a", "b", "c"}
    sizes = [len(task.train) for task in tasks]
    for name, where in (("a", (0, 1)), ("b", (0, 1, 2)), ("c", (2,))):
        for k, value in enumerate(found[name]):
            mean = sum(sizes[i] * rows[i][name][k] for i in where) / sum(sizes[i] for i in where)
            torch.testing.assert_close(value, mean)


@pytest.fixture(scope="module")
def routed() -> tuple[TreeLoRA, list[Task]]:
    """Four domains of the same two classes, whose patterns are exchanged from one to the next."""
    tasks = domains([0, 1, 2, 3], each=12)
    return taught(treelora({"epochs": 6, "lr": 0.02}, start="fresh", answer="routed"), tasks), domains(
        [0, 1, 2, 3], each=8, seed=5
    )


@torch.no_grad()
def test_where_tasks_look_different_each_input_finds_its_own(routed: tuple[TreeLoRA, list[Task]]) -> None:
    method, tests = routed
    right: dict[str, int] = {}
    for number, task in enumerate(tests):
        examples: Any = task.train
        pixels = torch.stack(examples.pixels)
        assert method._routes(pixels) == [number] * len(pixels)
        answers = method.answers(pixels)
        for name, scores in {"routed": answers.scores, **answers.others}.items():
            hits = scores.argmax(1) == torch.tensor(examples.targets)
            right[name] = right.get(name, 0) + int(hits.sum())
        with using(method.model, f"task-{number}"):
            assert torch.equal(answers.scores.argmax(1), method.model.predict(pixels).argmax(1))
    assert set(right) == {"routed", "last", "merged"}
    assert right["routed"] > right["last"]


@torch.no_grad()
def test_neither_companions_nor_task_nor_label_reach_an_answer(routed: tuple[TreeLoRA, list[Task]]) -> None:
    method, tests = routed
    pixels = torch.stack([task.train.load(i, None) for task in tests for i in (0, 9)])
    whole = method.predict(pixels)
    for row in range(len(pixels)):
        torch.testing.assert_close(method.predict(pixels[row : row + 1])[0], whole[row], atol=1e-4, rtol=1e-4)
    assert torch.equal(method.predict(pixels.flip(0)).flip(0).argmax(1), whole.argmax(1))
    features = method.features(pixels)
    for number in range(4):
        with using(method.model, f"task-{number}"):
            own = method.model.features(pixels[2 * number : 2 * number + 2])
        torch.testing.assert_close(features[2 * number : 2 * number + 2], own)


def test_classes_of_the_found_task_come_first_and_others_keep_finite_scores() -> None:
    tasks = increments(3)
    method = taught(treelora(), tasks)
    for number, task in enumerate(tasks):
        examples: Any = task.train
        with torch.no_grad():
            scores = method.predict(torch.stack(examples.pixels))
        assert scores.shape == (24, 6)
        assert bool(torch.isfinite(scores).all())
        assert set(scores.argmax(1).tolist()) <= {2 * number, 2 * number + 1}
        wrong = tasks[(number + 1) % 3]
        asked = Task(9, "x", wrong.classes, task.train, test=task.train)
        cell = evaluate(method, asked, among="task", batch_size=7)
        assert cell is not None
        assert 0 <= cell["correct"] <= cell["total"] == 24, "the mask leaves only classes that were not chosen"


def test_under_bfloat16_tasks_are_still_told_apart() -> None:
    """Prototypes so near each other that half precision could not."""
    method = taught(treelora(), domains([0, 1]))
    examples: Any = domains([0])[0].train
    pixels = torch.stack(examples.pixels)
    with torch.no_grad(), using(method.model, None), torch.autocast("cpu", torch.bfloat16):
        features = method.model.features(pixels)
        mean = features.float().mean(0)
        means: Any = method.selector.means
        means.means.copy_(mean + 1e-3 * torch.randn(4, len(mean), generator=generator("near")))
        halves = len(means(features).argmax(1).unique())
        found = method._routes(pixels)
    wanted = means(features.float()).argmax(1).tolist()
    assert found == [row // 2 for row in wanted]
    assert len(set(wanted)) > halves, "the control"


# -- stops, stored states, updates --------------------------------------------------------------------


class StopsAt(Silent):
    """Asks for a stop at a step of a task, as a scheduler does."""

    def __init__(self, task: int, step: int):
        self.wanted, self.now = (task, step), -1

    def task(self, index: int, name: str, classes: int, examples: int) -> None:
        self.now = index

    def step(self, done: int, epoch: int, loss: float | None, images: int) -> None:
        if (self.now, done) == self.wanted:
            os.kill(os.getpid(), signal.SIGTERM)


def files(state: Path) -> dict[str, bytes]:
    """All that was learned and measured, but for times."""
    found = sorted(p for p in (state / "tasks").rglob("*") if p.is_file())
    return {
        str(p.relative_to(state)): p.read_bytes()
        for p in found
        if p.name not in ("timings.json", "manifest.json", "task.json")
    }


@pytest.fixture(scope="module")
def whole(vit: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """States of three tasks, never stopped."""
    root = tmp_path_factory.mktemp("whole")
    for name, method in RESUMED.items():
        learned(vit, data, {"name": "treelora", **method}, root / name)
    return {name: root / name for name in RESUMED}


RESUMED: dict[str, dict[str, Any]] = {
    "nearest": {"start": "nearest", "budget": 2},
    "fresh": {"start": "fresh", "search": "random", "every": 2},
}


@pytest.mark.parametrize(("name", "at"), paired(RESUMED, [(0, 2), (2, 3)]))
def test_stopped_and_resumed_is_never_stopped(
    name: str, at: tuple[int, int], whole: dict[str, Path], vit: Path, data: Path, tmp_path: Path
) -> None:
    """Weights, tree, counts and picks have the same bits."""
    task, step = at
    content = recipe(vit, data, method={"name": "treelora", **RESUMED[name]})
    with pytest.raises(Interrupted):
        Learner(content, tmp_path / "state", progress=StopsAt(task, step)).run()
    assert len(State(tmp_path / "state").committed) == task
    (open_,) = [p for p in (tmp_path / "state" / "resume").iterdir() if p.name.startswith("00-train-step")]
    held = [tensor for file in open_.glob("*.safetensors") for tensor in load_file(file)]
    assert any("pets.default" in tensor for tensor in held)
    assert not [tensor for tensor in held if "pets.task-" in tensor or "pets.merged" in tensor or "rows" in tensor]
    for committed in State(tmp_path / "state").committed:
        stored = [
            tensor for file, content in committed.read().items() if RESTING.fullmatch(file) for tensor in load(content)
        ]
        assert any("pets.task-" in tensor for tensor in stored)
    Learner.load(tmp_path / "state").resume()
    assert files(tmp_path / "state") == files(whole[name])


def test_a_learner_that_was_stopped_can_go_on_itself(
    whole: dict[str, Path], vit: Path, data: Path, tmp_path: Path
) -> None:
    content = recipe(vit, data, method={"name": "treelora", **RESUMED["nearest"]})
    learner = Learner(content, tmp_path / "state", progress=StopsAt(2, 3))
    with pytest.raises(Interrupted):
        learner.run()
    learner.resume()
    assert files(tmp_path / "state") == files(whole["nearest"])


def test_states_reload_roll_back_and_take_updates(whole: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "state"
    shutil.copytree(whole["nearest"], folder)
    learner = Learner.load(folder)
    assert isinstance(learner.method, TreeLoRA)
    assert len(learner.method.bank.kept) == 2
    first = learner.evaluate()
    cell = first["a-b"]
    assert cell is not None
    assert set(cell["others"]) == {"last", "merged"}
    for name in ("new", "newer"):
        picture_folder(tmp_path / name / "train", "gh", 4)
        picture_folder(tmp_path / name / "test", "gh", 2, first=1000)
        learner.learn(tmp_path / name, name=name)
    assert len(learner.method.similar.tree) == 2
    assert learner.method.similar.tree.ids == tuple(learner.method.bank.kept)
    with pytest.raises(UsageError, match="already has a task 'new'"):
        learner.learn(tmp_path / "new", name="new")
    reloaded = Learner.load(folder)
    assert reloaded.evaluate() == learner.evaluate()
    State(folder).rollback("e-f")
    back = Learner.load(folder)
    assert back.evaluate() == first
    assert isinstance(back.method, TreeLoRA)
    assert back.method.facts() == Learner.load(whole["nearest"]).method.facts()


def signed(numbers: int | Sequence[int], method: TreeLoRA | None = None, shift: int = 0, **options: Any) -> TreeLoRA:
    """A method that keeps what it has for tasks of these numbers, with signatures that are drawn."""
    made = method or treelora(**options)
    for number in range(numbers) if isinstance(numbers, int) else numbers:
        task = Task(number, f"t{number}", ("a", "b"), Domain("ab", 0, each=number % 3 + 1))
        made.model.grow(task)
        made.mean.mean.copy_(torch.randn(made.gradients.shape, generator=generator("signed", number, shift)))
        made._keep(task)
    return made


def told(method: TreeLoRA) -> dict[str, Any]:
    """All that its tree says."""
    known = method.similar.tree
    points = [known.point(i).tolist() for i in known.ids]
    return {"nodes": known.nodes(), "distances": known.distances.tolist(), "points": points}


@pytest.mark.parametrize("budget", [None, 5])
def test_what_belongs_to_a_task_is_stored_once(budget: int | None) -> None:
    """A task that comes, or is merged, has new tensors; those of all others are the same objects."""
    method = treelora(budget=budget)
    for number in range(13):
        before = dict(method.resting())
        signed([number], method)
        bank, known = method.bank, method.similar.tree
        new = {name for name, of in method.resting().items() if before.get(name) is not of} - {"merged"}
        if budget is None or number < budget:
            assert new == {f"task-{number}"}
        else:  # the new one, and one that stands for two of those before; or the new one was merged itself
            assert new <= {
                f"task-{slot}" for slot, kept in bank.kept.items() if f"t{number}" in kept.tasks or kept.tasks[1:]
            }
            assert 1 <= len(new) <= 2
        assert sum(t.numel() for t in method.similar.buffers()) <= 6 * len(known)
        if number in (0, 5, 12):
            other = treelora(budget=budget)
            restore(other, snapshot(method), "memory")
            assert told(other) == told(method)
            assert snapshot(other) == snapshot(method)


def test_a_tree_as_an_earlier_version_stored_it_goes_on() -> None:
    """All signatures and distances were two tensors then, and the nodes stood in the extra state."""
    method = signed(9)
    plain = PlainTree(method.layers)
    for slot in method.similar.tree.ids:
        plain.insert(method.similar.tree.point(slot))
    tensors, rest = plain.state()
    files = snapshot(method)
    earlier = {name: t for name, t in load(files[EARLIER]).items() if not name.startswith("similar.")}
    old = {**files, EARLIER: save({**earlier, **{f"similar.{name}": t for name, t in tensors.items()}})}
    old["extra.json"] = to_json({**json.loads(files["extra.json"]), "similar": rest}, lines=1)
    for name in [name for name in files if name.startswith("rest-task-")]:
        old[name] = save({key: t for key, t in load(files[name]).items() if not key.startswith("similar.")})
    found = treelora()
    restore(found, old, "memory")
    assert snapshot(found) == old
    assert told(found) == told(method)
    sets = dict(found.resting())
    signed([9], found)
    assert snapshot(found) == snapshot(signed([9], method))
    assert all(found.resting()[name] is not of for name, of in sets.items()), "so that the next commit stores them"
    restore(found, old, "memory")
    assert snapshot(found) == old


def test_other_values_under_the_same_names_are_noticed() -> None:
    """A state was rolled back and has learned others since, in one object: neither its tree nor the mean of all is that
    of before."""
    one, other = signed(40), signed(40, shift=1)
    with torch.no_grad():
        for slot in other.bank.kept:
            for p in (p for pet in pets(other.model, f"task-{slot}") for p in pet.parameters()):
                p.add_(0.1)
    other.bank.reloaded()
    other.bank.merge_all("merged")
    files = snapshot(one), snapshot(other)
    assert files[0] != files[1]
    assert files[0]["extra.json"] == files[1]["extra.json"]
    restore(one, files[1], "memory")
    assert snapshot(signed([40], one)) == snapshot(signed([40], other))


def test_a_task_that_failed_leaves_nothing_in_the_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    method = signed(6)
    before = snapshot(method)
    with monkeypatch.context() as failing:
        failing.setattr(method.bank, "merge_all", lambda name: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            signed([6], method)
    restore(method, before, "memory")
    assert snapshot(signed([6, 7], method)) == snapshot(signed(8))


def test_the_mean_of_many_is_that_of_all_and_is_not_made_from_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after it was loaded, with the same bits."""
    method = treelora()
    for number in range(41):
        with torch.no_grad():
            for i, p in enumerate(parameters(method.model, "default")):
                p.copy_(torch.randn(p.shape, generator=generator("drawn", number, i)))
        signed([number], method)
        if number == 39:
            before = snapshot(method)
    bank = method.bank
    weights, sets = [kept.weight for kept in bank.kept.values()], [updates(method, f"task-{i}") for i in bank.kept]
    for place, found in enumerate(updates(method, "merged")):
        mean = sum(w * one[place] for w, one in zip(weights, sets, strict=True)) / sum(weights)
        u, values, v = torch.linalg.svd(torch.as_tensor(mean))
        assert len(values) < 2 * 40, "so the parts have more ranks than the matrix"
        torch.testing.assert_close(found, (u[:, :2] * values[:2]) @ v[:2], atol=1e-5, rtol=1e-4)
    again = treelora()
    restore(again, before, "memory")
    with torch.no_grad():
        for p, q in zip(parameters(again.model, "default"), parameters(method.model, "default"), strict=True):
            p.copy_(q)
    actual, asked = again.bank._loras, list[str]()
    monkeypatch.setattr(again.bank, "_loras", lambda name: (asked.append(name), actual(name))[1])
    signed([40], again)
    assert snapshot(again) == snapshot(method)
    assert len(set(asked)) == 42
    asked.clear()
    signed([41], again)
    assert set(asked) == {"task-41", "merged"}
    assert snapshot(again) == snapshot(signed([41], method))


@pytest.mark.parametrize(("prototypes", "counts"), [(None, [12, 12]), (2000, [12, 12]), (6, [3, 3])])
def test_prototypes_are_made_of_so_many_examples(prototypes: int | None, counts: list[int]) -> None:
    method = taught(treelora(prototypes=prototypes), domains([0, 1]))
    assert method.selector.means.counts.tolist() == counts * 2


def test_loading_makes_and_takes_away_adapters() -> None:
    """One object through states of more, fewer and merged adapters."""
    tasks = domains([0, 1, 2])
    method, states = treelora(budget=2), []
    states.append(snapshot(method))
    for task in tasks:
        learn_protected(method, task)
        states.append(snapshot(method))
    facts = method.facts()
    for number in (0, 3, 1, 2, 0, 3):
        restore(method, states[number], "memory")
        names = {name for _, slot in slots(method.model) for name in slot.pets}
        assert len(names) == 1 + (number > 0) + min(number, 2)
        assert snapshot(method) == states[number]
    assert method.facts() == facts
    with pytest.raises(StateError):
        restore(method, {**states[1], EARLIER: states[3][EARLIER]}, "memory")


def test_rows_of_the_head_are_made_where_the_head_is() -> None:
    """A state that is loaded on a GPU has them there, as those of tasks learned since."""
    tasks = domains([0])
    stored = taught(treelora(), tasks).bank.get_extra_state()
    method = treelora()
    method.model.grow(tasks[0])
    method.model.to("meta")
    method.bank.set_extra_state(stored)
    rows = [tensor for resting in method.resting().values() for tensor in resting.rows.values()]
    assert [tensor.device.type for tensor in rows] == ["meta"] * 2 * len(method.model.per_class())


def test_an_estimate_counts_the_memory_of_adapters_at_rest() -> None:
    method, task = treelora(), domains([0])[0]
    method.model.grow(task)
    before = held_by(method)
    method.bank.keep(0, task.name, task.classes, 12)
    rows = sum(p.nbytes for p in method.model.per_class())
    assert held_by(method) == before + sum(p.nbytes for p in parameters(method.model, "default")) + rows


def test_what_is_told_is_what_the_report_reads(whole: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from perpetune.results import read_results

    results = read_results(State(whole["nearest"]))
    told = grown(json.loads(json.dumps(results)))
    assert [g.names for g in told][:2] == [["a-b"], ["a-b", "c-d"]]
    assert [g.asked for g in told] == ["nearest"] * 3
    assert [len(g.adapters) for g in told] == [1, 2, 2]
    assert [len(g.merged) for g in told] == [0, 0, 1]
    assert not told[0].helped
    assert all(sum(steps.values()) == 4 for g in told[1:] for _, steps in g.helped)
    assert told[1].root is not None
    method = Learner.load(whole["nearest"]).method
    assert isinstance(method, TreeLoRA)
    assert told[0].signature == 4 * method.gradients.shape[0] * 256
    facts = tree(method)
    assert set(facts) == {
        "kind",
        "tasks",
        "kept",
        "names",
        "nodes",
        "groups",
        "distances",
        "start",
        "asked",
        "helped",
        "adapters",
        "merged",
        "signature_bytes",
    }
    assert facts == json.loads(json.dumps(facts))
    assert facts["tasks"] == 2
    assert facts["kept"] == {"adapters": 2, "bytes": sum(a.size or 0 for a in told[2].adapters)}
    monkeypatch.setattr("perpetune.methods.treelora.method.DRAWN", 1)
    assert facts.keys() - tree(method).keys() == {"names", "nodes", "distances", "adapters"}, "they grow with the tasks"


def test_the_command_checks_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """All rules are in test_contract.py."""
    monkeypatch.setattr(rules, "RULES", rules.RULES[:1])
    assert call(["check", "treelora", "--set", "start=last"]) == 0
    assert "bit-identical" in capsys.readouterr().out


# -- several processes -------------------------------------------------------------------------------


def trained_beside_another(folder: Path, name: str, content: dict[str, Any]) -> None:
    """In a process of its own, forked from this one, which was alone."""
    AcceleratorState._reset_state(reset_partial_state=True)
    trained_in(folder, name, content)


def trained_in(folder: Path, name: str, content: dict[str, Any]) -> None:
    learner = Learner(content, folder / name)
    learner.run()
    told = {**tree(learner.method), "evaluated": learner.evaluate()}  # type: ignore[arg-type]
    (folder / f"{name}-{learner.runtime.rank}.json").write_text(json.dumps(told))


TWO: dict[str, dict[str, Any]] = {
    # Where a task starts from what it is drawn to, the regulariser's slope is rounding, which Adam would make large.
    "nearest": {"method": {"start": "nearest"}, "train": {"optimizer": "sgd", "accumulate": 2}},
    "random": {"method": {"start": "fresh", "search": "random"}},
}


@pytest.mark.parametrize("case", chiefly(TWO, ["nearest"]))
def test_two_processes_pick_what_one_picks(case: str, vit: Path, tmp_path: Path) -> None:
    """Nine examples, three, then one, in batches of four: a process has none in some steps, nor in the last probe."""
    found = split_folder(tmp_path / "data", "abcde", [5, 4, 1, 2, 1], 3)
    method = {"name": "treelora", "probe": 1, "budget": 2, "mask": "seen", **TWO[case]["method"]}
    train = {"epochs": 2, "batch_size": 4, "lr": 0.01, **TWO[case].get("train", {})}
    content = recipe(vit, found, method=method, train=train)
    debug_launcher(trained_beside_another, (tmp_path, "two", content))
    trained_in(tmp_path, "one", content)
    told = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("two-0", "two-1", "one-0")]
    assert told[0] == told[1], "the processes have the same"
    for key in ("helped", "names", "start", "merged", "evaluated"):
        assert told[0][key] == told[2][key]
    assert all(h["steps"] for h in told[0]["helped"])
    one, two = (
        {
            f"{file}/{name}": tensor
            for file, tensors in task_tensors(tmp_path / run).items()
            for name, tensor in tensors.items()
        }
        for run in ("one", "two")
    )
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-5, rtol=1e-4, msg=name)


# -- language -----------------------------------------------------------------------------------------


def questions(root: Path) -> dict[str, Any]:
    """A recipe for three tasks of texts."""
    model = tiny_language_model(root / "lm")
    for name, words in {"sky": ("blue", "grey"), "sum": ("one", "two"), "say": ("yes", "no way")}.items():
        rows = [
            {"prompt": f"{name} {i % 2}: which is it {i}?", "answer": words[i % 2], "options": list(words)}
            for i in range(12)
        ]
        for split, some in (("train", rows[:8]), ("test", rows[8:])):
            path = root / "data" / name / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in some))
    return {
        "name": "lm",
        "backbone": f"hf:{model}",
        "pet": {"name": "lora", "rank": 2},
        "head": "lm",
        "method": {"name": "treelora", "budget": 2},
        "train": {"epochs": 2, "batch_size": 4, "lr": 0.01, "accumulate": 2},
        "data": {"name": "text", "path": str(root / "data")},
        "run": {"device": "cpu"},
    }


def test_for_texts_too_it_is_plain_training_without_its_regulariser(tmp_path: Path) -> None:
    """The bits are the same after 24 updates."""
    content, found = questions(tmp_path), []
    for name, method in (("plain", "finetune"), ("ours", PLAIN_TREE), ("drawn", {**PLAIN_TREE, "regularise": 0.1})):
        learner = Learner({**content, "method": method, "train": {**content["train"], "epochs": 4}}, tmp_path / name)
        learner.run()
        found.append(weights(learner.method))
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


def test_a_language_model_learns_reloads_and_answers_in_three_ways(tmp_path: Path) -> None:
    """Stopped and resumed, it has the same bits as without a stop."""
    content = questions(tmp_path)
    Learner(content, tmp_path / "whole").run()
    with pytest.raises(Interrupted):
        Learner(content, tmp_path / "state", progress=StopsAt(2, 2)).run()
    resumed = Learner.load(tmp_path / "state")
    resumed.resume()
    learner = Learner.load(tmp_path / "state")
    assert snapshot(learner.method) == snapshot(resumed.method)
    assert files(tmp_path / "state") == files(tmp_path / "whole")
    cell = learner.evaluate()["sky"]
    assert cell is not None
    assert set(cell["others"]) == {"last", "merged"}
    method = learner.method
    assert isinstance(method, TreeLoRA)
    assert [sum(h["steps"].values()) for h in tree(method)["helped"]] == [4, 4]
    said = learner.answer(["sky 1: which is it 9?", "sum 0: which is it 8?"])
    assert len(said) == 2


# -- other selectors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "select",
    chiefly(
        ["means", "gaussian", "centres", "classifier", {"name": "classifier", "head": "linear"}],
        ["gaussian", "centres", {"name": "classifier", "head": "linear"}],
    ),
)
def test_another_selector_can_find_the_task(select: Any) -> None:
    method = treelora({"epochs": 1}, select=select, start="fresh")
    for task in domains([0, 1, 2, 3], each=12):
        method.learn(task)
    asked = [torch.stack(task.train.pixels) for task in domains([0, 1, 2, 3], each=8, seed=5)]  # type: ignore[attr-defined]
    with torch.no_grad():
        right = sum(method._routes(pixels).count(number) for number, pixels in enumerate(asked))
    assert right > 0.8 * sum(map(len, asked))
    other = treelora({"epochs": 1}, select=select, start="fresh")
    restore(other, snapshot(method), "memory")
    assert snapshot(other) == snapshot(method)
    with torch.no_grad():
        assert torch.equal(other.predict(asked[0]), method.predict(asked[0]))
    checkpoint = snapshot(method, memory=False)
    restore(other, checkpoint, "memory", memory=False)
    assert snapshot(other) == snapshot(method)


@pytest.mark.parametrize("select", ["keys", "weights", "random", "last", "vote"])
def test_a_selector_without_statistics_is_refused(select: str) -> None:
    with pytest.raises(UsageError, match=f"select: {select} learns nothing"):
        treelora(select=select)


@pytest.mark.parametrize("fault", [{"classes": 3}, {"classes": [3]}, {}, [], {"classes": ["a/b"], "more": 1}])
def test_a_broken_router_of_an_earlier_version_is_told(fault: Any) -> None:
    method = taught(treelora(), domains([0, 1]))
    files = snapshot(method)
    extra = json.loads(files["extra.json"])
    extra["router"] = fault
    files["extra.json"] = json.dumps(extra).encode()
    with pytest.raises(StateError) as told:
        restore(treelora(), files, "here")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("answer", ["last", "merged", "routed"])
def test_it_answers_before_its_first_task(answer: str) -> None:
    """Exams are asked then: the net answers with the pets as they begin, and afterwards as told."""
    method, task = treelora(answer=answer), domains([0])[0]
    examples: Any = task.train
    method.model.grow(task)
    pixels = Inputs(pixels=torch.stack(examples.pixels))
    with torch.no_grad(), using(method.model, "default"):
        assert torch.equal(method.predict(pixels), method.model.predict(pixels))
        assert torch.equal(method.features(pixels), method.model.features(pixels))
    method.learn(task)
    assert method.predict(pixels).shape == (len(task.train), 2)

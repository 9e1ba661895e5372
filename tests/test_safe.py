"""SAFE: its losses, which parameters move in which task, and its answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import paired, picture_folder, recipe, split_folder, vit_folder
from torch import Tensor, nn
from torch.nn import functional as F

from perpetune.check import SIZE, Checker, Pictures, tiny_stream
from perpetune.check import probe as scores_of
from perpetune.errors import Interrupted, UsageError
from perpetune.fit import FitConfig
from perpetune.heads import Cosine, Ridge
from perpetune.learner import Learner
from perpetune.learning import learn_protected
from perpetune.methods.parts.teacher import Teacher
from perpetune.methods.safe import FAST, SLOW, Safe
from perpetune.numerics.alignment import correlation_losses, cosine_distance
from perpetune.numerics.mixing import mix
from perpetune.pets import frozen, parameters, pets, using
from perpetune.recipe import make_recipe
from perpetune.runtime import Runtime
from perpetune.seeding import generator
from perpetune.snapshot import restore, snapshot
from perpetune.state import MidTask
from perpetune.tasks import Batch, Task

RIDGE = {"name": "ridge", "projection": 50}
TRAIN = {"epochs": 2, "batch_size": 8, "lr": 0.01}
EACH = 12  # pictures of a class


def checker(**changes: Any) -> Checker:
    method = {"name": "safe", **changes.pop("options", {})}
    content = {"method": method, "pet": {"name": "lora", "rank": 2}, "head": RIDGE, "train": TRAIN, **changes}
    return Checker(make_recipe(content))


def made(**changes: Any) -> Safe:
    method = checker(**changes).make()
    assert isinstance(method, Safe)
    return method


def taught(tasks: Sequence[Task], **changes: Any) -> Safe:
    method = made(**changes)
    for task in tasks:
        learn_protected(method, task)
    return method


def stream(runtime: Runtime | None = None) -> list[Task]:
    return tiny_stream(runtime or Runtime())


def digest(tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


class Still(Pictures):
    """Pictures that are the same whenever they are loaded."""

    deterministic = True

    def load(self, index: int, seed: int | None) -> Tensor:
        pixels: Tensor = self.pixels[index]
        return pixels


class Unsaid(Still):
    """The same, but nobody is told, so nothing about them is kept."""

    deterministic = False


def shown(kind: type[Pictures], number: int, classes: str, each: int = EACH) -> Task:
    train: Any = kind(classes, each, seed=number)
    return Task(number, f"task-{number}", tuple(classes), train)


# -- golden values ------------------------------------------------------------------------------------


def wide(rows: Sequence[Sequence[float]]) -> Tensor:
    """Three dimensions and 29 that are zero: the tiny backbone's width, with the same cosines."""
    return F.pad(torch.tensor(rows, dtype=torch.float32), (0, 29))


OURS, THEIRS = wide([[1, 2, 2], [3, 0, 4]]), wide([[2, 1, 2], [0, 3, 4]])


@pytest.fixture
def golden(monkeypatch: pytest.MonkeyPatch) -> tuple[Safe, Task, Batch]:
    """Three classes, two of them known, and a batch of two examples of the third."""
    options = {"align": 0.0, "cross": 0.0, "later": {"batch_size": 2}}
    method = made(head={**RIDGE, "probe_scale": 10.0}, options=options)
    train: Any = Still("c", 2, seed=0)
    task = Task(1, "golden", ("c",), train)
    for head in (method.model.head, method.slow):
        head.grow("abc", generator("golden"))
    method.model.seen = ["a", "b", "c"]
    probe(method.model.head).weight.copy_(wide([[1, 0, 0], [0, 1, 0], [1, 1, 1]]))
    probe(method.slow).weight.copy_(wide([[1, 1, 0], [0, 1, 1], [0, 0, 0]]))
    monkeypatch.setattr(method.model, "features", lambda inputs: OURS)
    batch = Batch(torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8), torch.tensor([0, 0]), torch.arange(2))
    return method, task, batch


def knows(method: Safe, table: Tensor) -> Teacher:
    """A teacher whose features are those of the table."""
    return Teacher(method.model, SLOW).keep(table)


def probe(head: nn.Module) -> Cosine:
    found = head.probe
    assert isinstance(found, Cosine)
    return found


def test_golden_fast_losses(golden: tuple[Safe, Task, Batch]) -> None:
    method, task, batch = golden
    taught = knows(method, THEIRS)
    alone = float(method.fast_loss(task, batch, taught, known=2))
    method.align = 1.0
    assert float(method.fast_loss(task, batch, taught, known=2)) - alone == pytest.approx(0.4711111 / 2, abs=1e-6)
    method.align, method.cross = 0.0, 1.0
    assert float(method.fast_loss(task, batch, taught, known=2)) - alone == pytest.approx(4.8127364, abs=3e-6)
    rows = probe(method.model.head).weight.clone()
    method._imprint(task, THEIRS, 2)
    torch.testing.assert_close(
        F.normalize(probe(method.slow).weight[2], dim=0), F.normalize(F.normalize(THEIRS, dim=-1).mean(0), dim=0)
    )
    probe(method.model.head).weight.copy_(rows)
    imprinted = float(method.fast_loss(task, batch, taught, known=2)) - alone
    assert imprinted == pytest.approx(0.7899372 + 0.3567962, abs=3e-6)


def test_golden_slow_losses(golden: tuple[Safe, Task, Batch]) -> None:
    """29 dimensions more in which `C` is zero add 29."""
    method, task, batch = golden
    method.diagonal = method.rest = 0.0
    taught = knows(method, THEIRS)
    alone = float(method.slow_loss(task, batch, taught))
    method.diagonal = 1.0
    assert float(method.slow_loss(task, batch, taught)) - alone - 29 == pytest.approx(1.7898074, abs=1e-5)
    method.diagonal, method.rest = 0.0, 1.0
    assert float(method.slow_loss(task, batch, taught)) - alone == pytest.approx(0.4501926, abs=1e-6)


# -- the losses, and whom they reach ------------------------------------------------------------------


def batch_of(task: Task) -> Batch:
    pixels = torch.stack([task.train.load(i, None) for i in range(len(task.train))])
    return Batch(pixels, torch.tensor(task.train.targets), torch.arange(len(task.train)))


@contextmanager
def open_to_gradients(method: Safe) -> Iterator[None]:
    """Everything that is no statistic takes gradients: what gets none is then the losses' own doing."""
    method.requires_grad_(True)
    yield
    method.requires_grad_(False)
    method.zero_grad()


@pytest.fixture
def ready() -> tuple[Safe, Task, Batch]:
    """At the start of the fast phase of the second task, where slow and fast are not the same any more."""
    tasks = stream()
    method = taught(tasks[:1])
    task = tasks[1]
    for head in (method.model.head, method.slow):
        head.grow(task.classes, generator("grow"))
    method.model.seen = [*"abcd"]
    with torch.no_grad():
        for p in (*parameters(method.model, FAST), probe(method.model.head).weight):
            p += 0.05 * torch.randn(p.shape, generator=generator("moved", p.numel()))
    return method, task, batch_of(task)


def gradients(method: Safe, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Of everything that gets one that is not zero, by name."""
    with open_to_gradients(method):
        method.zero_grad()
        loss().backward()
        return {n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None and p.grad.any()}


def features_of(method: Safe, batch: Batch, name: str | None) -> Tensor:
    with using(method.model, name):
        return method.model.features(batch.inputs)


def test_cross_classification_is_the_formula_and_reaches_whom_it_should(ready: tuple[Safe, Task, Batch]) -> None:
    """`s2f` teaches W_f and σ_f only, `f2s` the fast features and the old rows of W_f only."""
    method, task, batch = ready
    fast, slow = probe(method.model.head), probe(method.slow)
    method.later = method.later.model_copy(update={"batch_size": len(batch)})
    known, targets = 2, batch.targets + 2
    taught_ = features_of(method, batch, SLOW).detach()
    labels = torch.cat([torch.arange(known), targets])

    def s2f() -> Tensor:
        rows = F.normalize(torch.cat([slow.weight[:known].detach(), taught_]), dim=-1)
        return F.cross_entropy(16 * rows @ F.normalize(fast.weight, dim=-1).T, labels)

    def f2s() -> Tensor:
        rows = F.normalize(torch.cat([fast.weight[:known], features_of(method, batch, FAST)]), dim=-1)
        return F.cross_entropy(16 * rows @ F.normalize(slow.weight.detach(), dim=-1).T, labels)

    def whole(cross: float) -> Tensor:
        method.align, method.cross = 0.0, cross
        return method.fast_loss(task, batch, Teacher(method.model, SLOW), known=known)

    assert float(whole(1.0) - whole(0.0)) == pytest.approx(float(s2f() + f2s()), abs=1e-5)
    # With only what `fit` trains open to gradients, the difference is the two losses' own.
    group = {id(p) for own, _ in method.groups(method.later) for p in own}
    trained = {n for n, p in method.named_parameters() if id(p) in group}
    one, none = gradients(method, lambda: whole(1.0)), gradients(method, lambda: whole(0.0))
    apart = [gradients(method, s2f), gradients(method, f2s)]
    weight = next(n for n, p in method.named_parameters() if p is fast.weight)
    assert [n for n in apart[0] if n in trained] == [weight], "s2f: W_f alone"
    assert not apart[1][weight][known:].any(), "f2s: rows of new classes are not trained by it"
    for name in trained:
        found = one.get(name, torch.zeros(1)) - none.get(name, torch.zeros(1))
        wanted = sum((g[name] for g in apart if name in g), torch.zeros(1))
        torch.testing.assert_close(found, wanted.expand_as(found), rtol=1e-3, atol=2e-5)


def test_no_loss_reaches_a_teacher(ready: tuple[Safe, Task, Batch]) -> None:
    """Neither the frozen model nor the slow pets get a gradient; W_s gets none if only the fast head is trained."""
    method, task, batch = ready
    slow_pets = {id(p) for p in parameters(method.model, SLOW)}
    for loss in (
        lambda: method.fast_loss(task, batch, Teacher(method.model, SLOW), known=2),
        lambda: method.slow_loss(task, batch, Teacher(method.model, None)),
    ):
        with open_to_gradients(method):
            loss().backward()
            assert all(p.grad is None for p in method.parameters() if id(p) in slow_pets)
    trained = [p for group, _ in method.groups(method.later) for p in group]
    for p in trained:
        p.requires_grad_(True)
    method.fast_loss(task, batch, Teacher(method.model, SLOW), known=2).backward()
    got = {n for n, p in method.named_parameters() if p.grad is not None}
    assert got == {n for n, p in method.named_parameters() if id(p) in {id(t) for t in trained}}
    assert not any(n.startswith("slow.") or f".{SLOW}." in n for n in got)


def test_the_slow_loss_is_the_formula(ready: tuple[Safe, Task, Batch]) -> None:
    method, task, batch = ready
    student, teacher = features_of(method, batch, FAST), features_of(method, batch, None)
    diagonal, rest = correlation_losses(student, teacher)
    cross_entropy = F.cross_entropy(probe(method.model.head)(student), batch.targets + 2)
    wanted = cross_entropy + 0.01 * diagonal + 10.0 * rest
    torch.testing.assert_close(method.slow_loss(task, batch, Teacher(method.model, None)), wanted)


def test_the_classification_is_among_all_classes_so_far(ready: tuple[Safe, Task, Batch]) -> None:
    method, task, batch = ready
    method.align = method.cross = 0.0
    slow = Teacher(method.model, SLOW)
    logits = probe(method.model.head)(features_of(method, batch, FAST))
    torch.testing.assert_close(method.fast_loss(task, batch, slow, known=2), F.cross_entropy(logits, batch.targets + 2))
    method.align = 48.0
    distance = cosine_distance(features_of(method, batch, FAST), features_of(method, batch, SLOW))
    wanted = F.cross_entropy(logits, batch.targets + 2) + 48 * distance
    torch.testing.assert_close(method.fast_loss(task, batch, slow, known=2), wanted)


def test_teachers_are_without_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the student has it, and pictures are augmented, so that the teacher looks at each batch anew."""
    method = made(pet={"name": "lora", "rank": 2, "dropout": 0.5})
    seen: dict[str, set[bool]] = {FAST: set(), SLOW: set()}

    def watch(name: str) -> None:
        for pet in pets(method.model, name):
            pet.register_forward_pre_hook(lambda m, _: seen[name].add(m.training) if torch.is_grad_enabled() else None)

    for task in (shown(Pictures, 0, "ab"), shown(Pictures, 1, "cd")):
        taught_ = Teacher.features
        modes: list[bool] = []

        def look(self: Teacher, batch: Batch, taught_: Any = taught_, modes: list[bool] = modes) -> Tensor:
            if self.pets == SLOW:
                modes.extend(pet.training for pet in pets(method.model, SLOW))
            result: Tensor = taught_(self, batch)
            return result

        monkeypatch.setattr(Teacher, "features", look)
        watch(FAST)
        learn_protected(method, task)
        monkeypatch.undo()
    assert modes, "the slow learner taught"
    assert not any(modes)
    assert seen[FAST] == {True}
    assert not any(m.training for m in method.modules())


# -- what moves, and what does not --------------------------------------------------------------------


def kept(method: Safe) -> dict[str, str]:
    """Hashes of what must never change after the first task."""
    heads = [head for head in (method.model.head, method.slow) if isinstance(head, Ridge)]
    slow = probe(method.slow)
    return {
        "slow pets": digest({str(i): p for i, p in enumerate(parameters(method.model, SLOW))}),
        "backbone": digest(frozen(method.model.backbone.net)),
        "old rows of the slow probe": digest({"weight": slow.weight[:2], "scale": slow.scale}),
        "projections": digest({str(i): head.projected for i, head in enumerate(heads)}),
        "seeds": f"{[head.seed for head in heads]}",
    }


@pytest.mark.parametrize("head", [RIDGE, "ncm"], ids=["ridge", "ncm"])
def test_after_the_first_task_only_the_fast_learner_moves(head: Any) -> None:
    tasks, method = stream(), made(head=head)
    before = digest(frozen(method.model.backbone.net))
    learn_protected(method, tasks[0])
    assert digest(frozen(method.model.backbone.net)) == before
    for fast, slow in zip(parameters(method.model, FAST), parameters(method.model, SLOW), strict=True):
        assert torch.equal(fast, slow)
        assert fast is not slow
    first = kept(method)
    moved = [p.clone() for p in parameters(method.model, FAST)]
    rows = probe(method.model.head).weight.clone()
    for task in tasks[1:]:
        learn_protected(method, task)
        assert kept(method) == first
    assert any(not torch.equal(a, b) for a, b in zip(moved, parameters(method.model, FAST), strict=True))
    assert not torch.equal(probe(method.model.head).weight[:2], rows), "with mask `seen` old rows are trained too"


def test_both_heads_are_regressions_on_their_own_features() -> None:
    """The released code pools the two (D1): here the slow one is exactly that of all slow features so far."""
    tasks = [shown(Still, 0, "ab"), shown(Still, 1, "cd"), shown(Still, 2, "ab", 5)]
    method = taught(tasks)
    slow, fast = method.slow, method.model.head
    assert isinstance(slow, Ridge)
    assert isinstance(fast, Ridge)
    h = torch.cat([slow.expand(features_of(method, batch_of(t), SLOW).double()) for t in tasks])
    targets = torch.tensor([slow.classes.index(t.classes[y]) for t in tasks for y in t.train.targets])
    gram = h.mT @ h + float(slow.chosen) * torch.eye(slow.width, dtype=torch.float64)
    wanted = torch.linalg.solve(gram, h.mT @ F.one_hot(targets, 4).double())
    assert float((slow.weight - wanted).norm()) < 1e-3 * float(wanted.norm())
    assert slow.counts.tolist() == fast.counts.tolist() == [17, 17, 12, 12]
    assert torch.equal(slow.projected, fast.projected)
    assert not torch.equal(slow.packed, fast.packed)


def test_after_the_first_task_both_answer_alike() -> None:
    """One forward pass is enough then; two are needed later."""
    tasks, method = stream(), made()
    passes: list[int] = []
    method.model.backbone.register_forward_hook(lambda *_: passes.append(1))
    pixels = torch.stack(Pictures("abcd", 3, seed=5).pixels)

    def asked() -> tuple[Any, int]:
        passes.clear()
        with torch.no_grad():
            return method.answers(pixels), len(passes)

    learn_protected(method, tasks[0])
    answers, needed = asked()
    assert needed == 1
    assert torch.equal(answers.others["slow"], answers.others["fast"])
    torch.testing.assert_close(answers.scores, answers.others["fast"], rtol=0, atol=1e-6)
    with torch.no_grad(), using(method.model, SLOW):
        assert torch.equal(method.slow(method.model.features(pixels)), answers.others["slow"])
    learn_protected(method, tasks[1])
    answers, needed = asked()
    assert needed == 2
    assert not torch.equal(answers.others["slow"], answers.others["fast"])
    mixed, share = mix(answers.others["fast"], answers.others["slow"], method.sharpness)
    assert torch.equal(answers.scores, mixed)
    assert torch.equal(answers.gauges["weight of the fast learner"], share)
    with torch.no_grad():
        assert torch.equal(method.predict(pixels), mixed)


# -- rows of new classes ------------------------------------------------------------------------------


class Steps:
    """The probe's rows before and after each step of `fit`."""

    def __init__(self, method: Safe):
        self.method = method
        self.before: list[Tensor] = []
        self.after: list[Tensor] = []

    def rows(self) -> Tensor:
        return probe(self.method.model.head).weight.detach().clone()

    @contextmanager
    def guard(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        first = optimizer.register_step_pre_hook(lambda *_: self.before.append(self.rows()))
        second = optimizer.register_step_post_hook(lambda *_: self.after.append(self.rows()))
        yield
        first.remove()
        second.remove()


SGD = {"epochs": 1, "batch_size": 8, "optimizer": "sgd", "lr": 0.01}


@pytest.mark.parametrize("imprinted", [True, False], ids=["imprinted", "zero rows"])
def test_new_rows_are_imprinted_and_the_first_step_is_small(imprinted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control, rows of zero as in the released code, explodes at the first step."""
    tasks, method = stream(), made(train=SGD)
    learn_protected(method, tasks[0])
    steps = Steps(method)

    def zeros(task: Task, features: Tensor, known: int) -> None:
        for head in (method.model.head, method.slow):
            probe(head).weight[known:] = 0

    if not imprinted:
        monkeypatch.setattr(method, "_imprint", torch.no_grad()(zeros))
    tasks[1].runtime.companions = [steps.guard]
    method.learn(tasks[1])
    moved = (steps.after[0] - steps.before[0])[2:].norm(dim=-1)
    if not imprinted:
        assert float(moved.min()) > 1e6
        return
    assert float(moved.max()) < 1
    start = steps.before[0]
    assert bool(start.any(-1).all())
    torch.testing.assert_close(start[2:].norm(dim=-1), start[:2].norm(dim=-1).mean().expand(2))
    slow = probe(method.slow).weight
    assert bool(slow.any(-1).all())
    batch = batch_of(tasks[1])
    normed = F.normalize(features_of(method, batch, SLOW), dim=-1)
    for row in (0, 1):
        wanted = F.normalize(normed[batch.targets == row].mean(0), dim=0)
        for found in (start[2 + row], slow[2 + row]):
            torch.testing.assert_close(F.normalize(found, dim=0), wanted, rtol=0, atol=1e-5)


def test_rows_of_classes_that_come_back_stay() -> None:
    """Domain-incremental: nothing is imprinted where nothing is new."""
    method = taught([shown(Pictures, 0, "ab")])
    slow = probe(method.slow).weight.clone()
    learn_protected(method, shown(Pictures, 1, "ba"))
    assert method.classes == ["a", "b"]
    assert torch.equal(probe(method.slow).weight, slow)
    assert torch.isfinite(scores_of(method, "ab")).all()
    right = scores_of(method, "ab").argmax(1).tolist()
    assert right == [0] * 3 + [1] * 3


# -- features of the teacher are made once ------------------------------------------------------------


def counted(method: Safe, task: Task) -> int:
    """Images that went through the backbone while `task` was learned."""
    seen: list[int] = []
    handle = method.model.backbone.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    learn_protected(method, task)
    handle.remove()
    return sum(seen)


@pytest.mark.parametrize(("kind", "each_epoch"), [(Still, 1), (Unsaid, 2), (Pictures, 2)])
def test_the_teacher_looks_once_at_what_is_deterministic(kind: type[Pictures], each_epoch: int) -> None:
    """Beside the student's pass of each epoch: one pass for the statistics; the slow ones are in the table."""
    images, epochs = 2 * EACH, 3
    method = made(train={**TRAIN, "epochs": epochs})
    table = images if kind is Still else 0
    assert counted(method, shown(kind, 0, "ab")) == table + each_epoch * epochs * images + images
    assert counted(method, shown(kind, 1, "cd")) == images + each_epoch * epochs * images + images


def test_what_is_kept_changes_nothing() -> None:
    """The same losses, and so the same values, as if the teacher had looked at each batch."""
    losses: dict[type, list[float]] = {Still: [], Unsaid: []}
    methods = []
    for kind, found in losses.items():
        method = made(train={**SGD, "epochs": 3})
        for name in ("slow_loss", "fast_loss"):
            inner = getattr(method, name)

            def noted(task: Task, batch: Batch, inner: Any = inner, found: list[float] = found, **given: Any) -> Tensor:
                loss: Tensor = inner(task, batch, **given)
                found.append(float(loss.detach()))
                return loss

            setattr(method, name, noted)
        for number, classes in enumerate(("ab", "cd")):
            method.learn(shown(kind, number, classes))
        methods.append(method)
    assert len(losses[Still]) == 18
    assert losses[Still] == pytest.approx(losses[Unsaid], abs=1e-5)
    torch.testing.assert_close(scores_of(methods[0], "abcd"), scores_of(methods[1], "abcd"), rtol=0, atol=1e-3)


# -- the same bits ------------------------------------------------------------------------------------


def test_the_same_seed_twice_gives_the_same_bits() -> None:
    """Statistics included; another seed gives other bits."""
    first, second, third = (taught(stream(Runtime(seed=seed))[:2], seed=seed) for seed in (0, 0, 1))
    assert snapshot(first) == snapshot(second)
    assert torch.equal(scores_of(first, "abcd"), scores_of(second, "abcd"))
    assert snapshot(first) != snapshot(third)


@pytest.fixture(scope="module")
def whole() -> list[dict[str, bytes]]:
    """What a run that was never stopped has stored after each task."""
    method, found = made(), []
    for task in stream()[:2]:
        learn_protected(method, task)
        found.append(snapshot(method))
    return found


def test_stopped_between_tasks(whole: list[dict[str, bytes]]) -> None:
    method = made()
    restore(method, whole[0], "memory")
    assert snapshot(method) == whole[0]
    learn_protected(method, stream()[1])
    assert snapshot(method) == whole[1]


@pytest.mark.parametrize(("stop", "number"), paired([1, 4, 5], [1, 0]))
def test_stopped_inside_a_phase(number: int, stop: int, whole: list[dict[str, bytes]], tmp_path: Path) -> None:
    """Six steps each; the features of teachers are computed again, in the same order."""
    method = made()
    if number:
        restore(method, whole[0], "memory")
    asked = iter(range(1, 100))
    runtime = Runtime(stopping=lambda: 15 if next(asked) >= stop else None)
    task = stream(runtime)[number]
    runtime.checkpoints = MidTask(tmp_path, method, (number, task.name, ""), 1)
    with pytest.raises(Interrupted, match=f"phase {'fast' if number else 'slow'}, after step {stop} of 6"):
        learn_protected(method, task)
    method = made()
    if number:
        restore(method, whole[0], "memory")
    runtime.checkpoints = MidTask(tmp_path, method, (number, task.name, ""), 1)
    runtime.stopping = lambda: None
    learn_protected(method, task)
    assert snapshot(method) == whole[number]


# -- what it goes with --------------------------------------------------------------------------------


COMBINED: list[dict[str, Any]] = [
    {"head": "ncm"},
    {"pet": {"name": "adapter", "width": 4}},
    {"pet": {"name": "prompt", "length": 2}, "head": "ncm"},
    {"pet": {"name": "ssf"}},
    {"head": {**RIDGE, "learn_scale": True, "balance": True}},
    {"options": {"mask": "task", "cross": 0.0, "diagonal": 0.0, "rest": 0.0}},
]


@pytest.mark.parametrize("changes", COMBINED, ids=str)
def test_it_goes_with_any_pet_and_head_of_statistics(changes: dict[str, Any]) -> None:
    method = taught(stream()[:2], **changes)
    found = scores_of(method, "abcd")
    assert torch.isfinite(found).all()
    assert float((found.argmax(1) == torch.arange(4).repeat_interleave(3)).float().mean()) >= 0.75
    other = made(**changes)
    restore(other, snapshot(method), "memory")
    assert torch.equal(scores_of(other, "abcd"), found)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"head": "linear"}, "method: safe learns classes from statistics, but head linear does not: use ridge or ncm"),
        ({"head": "cosine"}, "method: safe learns classes from statistics, but head cosine does not: use ridge or ncm"),
        ({"pet": "none"}, "method: safe trains a pet, but the recipe has none: name one, or use method: frozen"),
    ],
)
def test_what_it_does_not_go_with(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError) as caught:
        made(**changes)
    assert str(caught.value) == told


def test_protection_watches_and_holds_the_fast_learner_alone() -> None:
    """With all directions taken, the fast pets cannot move any more: what they are projected against is their own."""
    tasks = stream()
    method = made(protect={"energy": 1.0})
    assert method.protection is not None
    watched = {id(p) for watch in method.protection.sites for p in watch.site.operand.parameters}
    assert watched <= {id(p) for p in parameters(method.model, FAST)}
    assert not watched & {id(p) for p in parameters(method.model, SLOW)}
    learn_protected(method, tasks[0])
    before = [p.clone() for p in parameters(method.model, FAST)]
    free = taught(stream()[:2])
    learn_protected(method, tasks[1])
    moved = [float((a - b).norm()) for a, b in zip(before, parameters(method.model, FAST), strict=True)]
    loose = [float((a - b).norm()) for a, b in zip(before, parameters(free.model, FAST), strict=True)]
    assert sum(moved) < 0.9 * sum(loose)
    batch = batch_of(tasks[0])
    drift = features_of(method, batch, FAST) - features_of(method, batch, SLOW)
    other = features_of(free, batch, FAST) - features_of(free, batch, SLOW)
    assert float(drift.norm()) < 0.1 * float(other.norm()), "old features stay"


# -- through the front door ---------------------------------------------------------------------------


def content(vit: Path, data: Path) -> dict[str, Any]:
    method = {"name": "safe", "later": {"epochs": 1}}
    return recipe(vit, data, method=method, head={"name": "ridge", "projection": 30}, train={**TRAIN, "epochs": 2})


def test_a_run_from_folder_to_answers(tmp_path: Path) -> None:
    """Others, gauge and facts are stored; what is loaded answers alike; `later` starts from `train`."""
    vit, data = vit_folder(tmp_path / "vit"), split_folder(tmp_path / "data", "abcd", 6, 3)
    learner = Learner(content(vit, data), tmp_path / "state")
    assert isinstance(learner.method, Safe)
    assert learner.method.later == FitConfig(**{**TRAIN, "epochs": 1})  # type: ignore[arg-type]
    learner.run()
    folders = sorted((tmp_path / "state/tasks").iterdir())
    metrics = [json.loads((f / "metrics.json").read_text()) for f in folders]
    assert len(metrics) == 2
    for number, found in enumerate(metrics):
        for cell in found["cells"].values():
            assert cell["others"].keys() == {"slow", "fast"}
            assert all(0 <= v <= cell["total"] for v in cell["others"].values())
            gauge = cell["gauges"]["weight of the fast learner"]
            assert gauge == 0.5 if number == 0 else 0 < gauge < 1
        assert found["facts"].keys() == {"slow", "fast"}
        for facts in found["facts"].values():
            assert facts["kind"] == "ridge"
            assert facts["rows"] == 12 * (number + 1)
    pictures = sorted((data / "test").glob("*/*.png"))
    told = learner.predict(pictures)
    again = Learner.load(tmp_path / "state")
    assert again.predict(pictures) == told
    assert again.evaluate() == learner.evaluate()


def test_no_label_of_the_test_reaches_what_is_learned(tmp_path: Path) -> None:
    """With other labels in the test data, values, penalties, scales and answers are the same, and only the counts
    differ."""
    vit, learners = vit_folder(tmp_path / "vit"), []
    for name, labels in (("right", "abcd"), ("permuted", "badc")):
        data = picture_folder(tmp_path / name / "train", "abcd", 6).parent
        for own, label in zip("abcd", labels, strict=True):
            picture_folder(data / "test", own, 3, first=1000)
            (data / "test" / own).rename(data / "test" / f".{label}")
        for label in labels:
            (data / "test" / f".{label}").rename(data / "test" / label)
        learners.append(Learner(content(vit, data), tmp_path / f"{name} state"))
        learners[-1].run()
    one, other = learners
    assert snapshot(one.method) == snapshot(other.method)
    pictures = sorted((tmp_path / "right/test").glob("*/*.png"))
    assert one.predict(pictures) == other.predict(pictures)
    right, wrong = (sum(cell["correct"] for cell in learner.evaluate().values() if cell) for learner in learners)
    assert right > wrong

"""A `GradientSketch` collects the true gradients of the loss, in every place, type and way of training."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_language_model, vit_folder
from torch import Tensor, nn

from perpetune.build import build_method, load_backbone
from perpetune.check import Pictures, tiny_backbone
from perpetune.data.texts.tables import Text
from perpetune.data.texts.view import TextView
from perpetune.errors import UsageError
from perpetune.fit import FitConfig, fit
from perpetune.heads.linear import Linear
from perpetune.methods.treelora.method import TreeLoRA
from perpetune.methods.treelora.sketch import GradientSketch, in_groups
from perpetune.models.base import Model
from perpetune.models.causal_lm import CausalLM
from perpetune.models.classifier import Classifier
from perpetune.models.towers import places
from perpetune.numerics.signature import RunningMean
from perpetune.pets import Place, inject, parameters, slots, using
from perpetune.pets.adapter import Adapter
from perpetune.pets.lora import LoRA
from perpetune.recipe import make_recipe
from perpetune.runtime import Runtime
from perpetune.seeding import generator
from perpetune.tasks import Batch, Examples, Item, Task, load_batches

Loss = Callable[[], Tensor]
TEXTS = (Text("What is it?", "a cat"), Text("hi", "no"), Text("and a much longer question than others", "yes"))


def tuned(root: nn.Module, found: list[Place], rank: int = 2) -> None:
    """LoRA with values that have an effect, at these places."""
    inject(root, found, lambda place: LoRA(place, generator("test", place.path), rank=rank))
    rng = generator("shake")
    with torch.no_grad():
        for p in parameters(root, "default"):
            p.copy_(torch.randn(p.shape, generator=rng) * 0.1)
            p.requires_grad_(True)


class Two(nn.Module):
    """A linear, what follows it, and a fused one of which two parts of three are tuned."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.fused = nn.Linear(5, 4), nn.Linear(4, 9)
        rng = generator("two")
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=rng))
        self.requires_grad_(False)
        self.x = torch.randn(6, 3, 5, generator=rng)

    def forward(self) -> Tensor:
        hidden = torch.tanh(self.one(self.x.to(next(self.parameters()))))
        q, k, v = self.fused(hidden).split(3, -1)
        return (torch.softmax(q @ k.mT, -1) @ v).pow(2).mean()


def two() -> tuple[nn.Module, Loss]:
    net = Two()
    parts = ((0, 3), (6, 9))
    tuned(
        net,
        [
            Place("one", net.one, ("fc1",), ((0, 4),), 0, 5, 4),
            Place("fused", net.fused, ("q", "v"), parts, 1, 4, 9),
        ],
    )
    return net, partial(_used, net, net)


def _used(root: nn.Module, loss: Loss) -> Tensor:
    with using(root, "default"):
        return loss()


def classifier(backbone: Any) -> tuple[Model, Loss]:
    """Pictures of two classes through a vision transformer with LoRA on q and v."""
    head = Linear(backbone.dim)
    model = Classifier(backbone, head)
    tuned(model.backbone.net, places(backbone.net, ("q", "v")))
    head.grow("ab", generator("head"))
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator("weight")))
    task = Task(0, "t", ("a", "b"), Pictures("ab", 2, seed=0))
    size = backbone.preprocess.size
    pixels = torch.nn.functional.interpolate(torch.stack(task.train.pixels), size=size)  # type: ignore[attr-defined]
    batch = Batch(pixels, torch.tensor(task.train.targets))
    model.requires_grad_(False)
    for p in parameters(model, "default"):
        p.requires_grad_(True)
    return model, lambda: _used(model, lambda: model.loss(task, batch))


def language(folder: Path, texts: tuple[Text, ...] = TEXTS, **options: Any) -> tuple[Model, Loss]:
    model = CausalLM(load_backbone(f"hf:{folder}", **options))
    if not any(True for _ in slots(model)):
        tuned(model.backbone.net, places(model.backbone.net, ("q", "v")))
    batch = encoded(model, *texts)
    task = Task(0, "t", (), train=[])  # type: ignore[arg-type]
    return model, lambda: _used(model, lambda: model.loss(task, batch))


def encoded(model: CausalLM, *texts: Text) -> Batch:
    view = model.view
    assert isinstance(view, TextView)
    return view.collate([(view.sequence(t), 0, i) for i, t in enumerate(texts)])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: tiny_language_model(root / kind, kind) for kind in ("llama", "gpt2")} | {
        "vit": vit_folder(root / "vit")
    }


def case(name: str, folders: dict[str, Path]) -> tuple[nn.Module, Loss]:
    if name == "two":
        return two()
    if name == "transformers":
        return classifier(load_backbone(f"folder:{folders['vit']}"))
    if name == "timm":
        return classifier(load_backbone("timm:test_vit", pretrained=False, image_size=32))
    return language(folders[name])


CASES = ("two", "transformers", "timm", "llama", "gpt2")


def bases(root: nn.Module) -> dict[str, Tensor]:
    """`A₀` of each slot, made here once more from what it is said to be."""
    found = {}
    for path, slot in slots(root):
        pet = slot.pet("default")
        assert isinstance(pet, LoRA)
        rank, d_in = pet.rank, pet.down.shape[1]
        found[path] = torch.randn(rank, d_in, generator=generator(0, "signature", path)).double() / d_in**0.5
    return found


@contextlib.contextmanager
def beside(root: nn.Module) -> Iterator[list[Tensor]]:
    """Real `B`s, at zero, on `A₀`, in force beside the trained LoRA: what the gradients are said to be of."""
    ups: list[Tensor] = []
    hooks, found = [], bases(root)

    def add(base: Tensor, pairs: list[tuple[tuple[int, int], Tensor]], pet: LoRA, *called: Any) -> Tensor:
        _, (x, *_), y = called
        for (start, stop), up in pairs:
            y = y + nn.functional.pad(pet.scale * (x.to(up) @ base.to(up).T @ up.T), (start, y.shape[-1] - stop)).to(
                y.dtype
            )
        return y

    for path, slot in slots(root):
        pet: Any = slot.pet("default")
        own = [
            torch.zeros(stop - start, pet.rank, dtype=torch.float64, requires_grad=True) for start, stop in pet.parts
        ]
        ups += own
        pairs = list(zip(pet.parts, own, strict=True))
        hooks.append(slot.register_forward_hook(partial(add, found[path], pairs, pet)))
    try:
        yield ups
    finally:
        for hook in hooks:
            hook.remove()


def true_gradients(root: nn.Module, loss: Loss) -> list[Tensor]:
    with beside(root) as ups:
        return list(torch.autograd.grad(loss(), ups))


def collected(root: nn.Module, loss: Loss, times: int = 1) -> list[Tensor]:
    sketch = GradientSketch(root, "default")
    with sketch.on():
        for _ in range(times):
            loss().backward()
        return [found for found in sketch.gradients() if found is not None]


def off(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The relative difference, in the norm of all numbers."""
    assert [f.shape for f in found] == [w.shape for w in wanted]
    whole = torch.cat([w.flatten().double() for w in wanted])
    return float((torch.cat([f.flatten().double() for f in found]) - whole).norm() / whole.norm())


@pytest.mark.parametrize("name", CASES)
def test_they_are_autograds_of_a_real_factor(name: str, folders: dict[str, Path]) -> None:
    root, loss = case(name, folders)
    root.double()
    wanted = true_gradients(root, loss)
    assert off(collected(root, loss), wanted) < 1e-6
    assert off(collected(root, loss, times=3), [3 * w for w in wanted]) < 1e-6
    assert all(w.norm() > 0 for w in wanted)


@pytest.mark.parametrize(
    ("name", "step", "most"), [("two", 1e-5, 1e-6), ("transformers", 1e-5, 1e-5), ("llama", 1e-2, 2e-3)]
)
def test_they_are_finite_differences(
    name: str, step: float, most: float, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama's norms are in float32 in any case, so that its steps cannot be small."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    root, loss = case(name, folders)
    root.double()
    found = collected(root, loss)
    scale = max(float(gradient.abs().max()) for gradient in found)
    with torch.no_grad(), beside(root) as ups:
        for up, gradient in zip(ups, found, strict=True):
            for place in (0, up.numel() // 2, up.numel() - 1):
                values = []
                for sign in (1, -1):
                    up.view(-1)[place] = sign * step
                    values.append(float(loss()))
                up.view(-1)[place] = 0
                wanted = (values[0] - values[1]) / (2 * step)
                assert float(gradient.view(-1)[place]) == pytest.approx(wanted, rel=0, abs=most * scale)


def test_the_control_another_factor_is_told_apart() -> None:
    """What B of the trained LoRA itself gets is another gradient, for its A is another."""
    root, loss = two()
    root.double()
    pets = [slot.pet("default") for _, slot in slots(root)]
    wanted = true_gradients(root, loss)
    own = torch.autograd.grad(loss(), [up for pet in pets if isinstance(pet, LoRA) for up in pet.up])
    assert off(list(own), wanted) > 0.5


def test_padding_and_companions_without_labels_do_not_matter(folders: dict[str, Path]) -> None:
    model, loss = language(folders["llama"], TEXTS[:1])
    alone = collected(model, loss)
    assert isinstance(model, CausalLM)
    batch = encoded(model, TEXTS[0], TEXTS[2])
    assert batch.inputs.labels is not None
    assert bool((~batch.inputs.mask[0]).any()), "the first is padded"
    batch.inputs.labels[1] = -100
    task = Task(0, "t", (), train=[])  # type: ignore[arg-type]
    beside = collected(model, lambda: _used(model, lambda: model.loss(task, batch)))
    assert off(beside, alone) < 1e-5


def test_blocks_computed_again_give_the_same(folders: dict[str, Path]) -> None:
    model, loss = language(folders["llama"])
    plain = collected(model, loss)
    again, loss = language(folders["llama"], gradient_checkpointing=True)
    ran: list[int] = []
    block = dict(again.backbone.net.named_modules())["model.layers.0.mlp"]
    block.register_forward_pre_hook(lambda *_: ran.append(1))
    assert off(collected(again.train(), loss), plain) == 0
    assert len(ran) == 2, "once more on the way back"


@pytest.mark.parametrize("name", ["two", "transformers", "llama"])
def test_to_collect_changes_nothing(name: str, folders: dict[str, Path]) -> None:
    results = []
    for on in (True, False):
        root, loss = case(name, folders)
        with GradientSketch(root, "default").on() if on else contextlib.nullcontext():
            value = loss()
            value.backward()
        results.append([value, *(p.grad for p in parameters(root, "default"))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_is_taken_is_the_sketch_of_the_sum_and_starts_anew() -> None:
    root, loss = two()
    sketch = GradientSketch(root, "default", size=7)
    assert torch.equal(sketch.take(), torch.zeros(3, 7)), "nothing came back yet"
    with sketch.on():
        loss().backward()
        first = sketch.take()
        loss().backward()
        loss().backward()
        assert torch.allclose(sketch.take(), 2 * first, rtol=1e-5)
        assert torch.equal(sketch.take(), torch.zeros(3, 7))
        sketch.listening = False
        loss().backward()
        assert sketch.gradients() == [None] * 3
        with torch.no_grad():
            loss()
    sketch.listening = True
    loss().backward()
    assert sketch.gradients() == [None] * 3, "nothing is left on the net"
    assert first.norm() > 0
    assert sketch.names == ["one", "fused", "fused"]
    assert sketch.shape == (3, 7)


def test_another_pet_is_refused() -> None:
    net = Two()
    inject(net, [Place("one", net.one, ("mlp",), (), 0, 5, 4)], lambda place: Adapter(place, generator("a")))
    with pytest.raises(UsageError, match="signatures of tasks are made of LoRA's gradients, but one has Adapter"):
        GradientSketch(net, "default")


def test_layers_come_in_groups_of_about_as_many_blocks() -> None:
    blocks = [0, 0, 1, 1, 2, 2, 3, 4, -1]
    names = [f"x{i}" for i in range(len(blocks))]
    assert in_groups(names, blocks, 2) == ([[0, 1, 2, 3], [4, 5, 6, 7, 8]], ["blocks 0-1", "blocks 2-4"])
    assert in_groups(names, blocks, 99)[1] == [f"block {i}" for i in range(5)]
    assert in_groups(names[:2], [-1, -1], 4) == ([[0, 1]], ["all"])
    for count in range(1, 7):
        groups, called = in_groups(names, blocks, count)
        assert sorted(module for group in groups for module in group) == list(range(9))
        assert all(groups)
        assert len(groups) == len(called)


# -- over the steps of a training ---------------------------------------------------------------------


def treelora(train: dict[str, Any] | None = None, **options: Any) -> TreeLoRA:
    content = {
        "method": {"name": "treelora", **options},
        "pet": {"name": "lora", "rank": 2},
        "train": {"epochs": 2, "batch_size": 8, "lr": 0.01, **(train or {})},
    }
    method = build_method(make_recipe(content), tiny_backbone())
    assert isinstance(method, TreeLoRA)
    return method


def pictures(runtime: Runtime | None = None) -> Task:
    """Of 24 pictures less five, so that the last batch is a short one."""
    train = Pictures("ab", 12, seed=0)
    train.targets, train.pixels = train.targets[:-5], train.pixels[:-5]
    return Task(0, "t", ("a", "b"), train, runtime=runtime or Runtime())


class Truth:
    """At each loss, the gradient in float64 of a copy of the model as it is then."""

    def __init__(self, method: TreeLoRA):
        self.method, self.sums = method, torch.zeros(method.gradients.shape, dtype=torch.float64)
        self.seen = 0
        self.loss = method.loss
        method.loss = self  # type: ignore[method-assign, assignment]

    def __call__(self, task: Task, batch: Batch) -> Tensor:
        model = copy.deepcopy(self.method.model)
        model.double()
        for p in parameters(model, "default"):
            p.requires_grad_(True)
        with torch.autocast("cpu", enabled=False):
            found = true_gradients(model, lambda: _used(model, lambda: model.loss(task, batch)))
        rows = [self.method.gradients._sketches[f.numel()](f.flatten()).double() for f in found]
        self.sums += len(batch) * torch.stack(rows)
        self.seen += len(batch)
        return self.loss(task, batch)

    @property
    def mean(self) -> Tensor:
        return self.sums / self.seen


@pytest.mark.parametrize(("precision", "most"), [("no", 1e-5), ("bf16", 1e-2)])
def test_the_running_mean_is_that_of_the_true_gradients(precision: Any, most: float) -> None:
    method = treelora()
    truth = Truth(method)
    method.learn(pictures(Runtime(precision=precision)))
    assert truth.seen == 38 == method.mean.weight
    assert 0 < float((method.mean.mean - truth.mean).norm() / truth.mean.norm()) < most


def test_weights_in_bfloat16_change_nothing_but_the_model(folders: dict[str, Path]) -> None:
    """The mean of many batches is that of a real B in float64 on the same half-precision model."""
    half, _ = language(folders["llama"], dtype="bfloat16")
    task, sketch = Task(0, "t", (), train=TextSet(half)), GradientSketch(half, "default")
    mean, wanted = RunningMean(sketch.shape), RunningMean(sketch.shape)
    order = torch.randperm(100, generator=generator("order")).remainder(10).tolist()
    requests = [[(i, None) for i in order[start : start + 4]] for start in range(0, 100, 4)]
    for batch in load_batches(task.train, requests, task.runtime):
        loss = partial(_used, half, partial(half.loss, task, batch))
        with sketch.on():
            loss().backward()
            mean.update(sketch.take(), 4)
        true = true_gradients(half, loss)
        wanted.update(torch.stack([sketch._sketches[t.numel()](t.flatten()) for t in true]), 4)
    assert float((mean.mean - wanted.mean).norm() / wanted.mean.norm()) < 1e-5


def test_what_a_grad_scaler_scales_is_taken_out() -> None:
    """Powers of two, so that not a bit may change; and a step that overflows leaves no trace."""

    def learned(scaled: bool, spoil: int | None = None) -> TreeLoRA:
        method, runtime = treelora(), Runtime()
        if scaled:
            runtime.accelerator.scaler = torch.amp.GradScaler("cpu")
        calls = iter(range(100))
        loss = method.model.loss
        # Type: ignore[method-assign]
        method.model.loss = lambda *a: loss(*a) * (torch.inf if next(calls) == spoil else 1.0)
        method.learn(pictures(runtime))
        return method

    plain, scaled, spoiled = learned(False), learned(True), learned(True, spoil=1)
    assert torch.equal(plain.mean.mean, scaled.mean.mean)
    assert bool(torch.isfinite(spoiled.mean.mean).all())
    assert spoiled.mean.weight == 38 - 8


def test_the_mean_stays_what_and_where_it_is_when_the_model_moves() -> None:
    method = treelora()
    method.to("meta")
    assert (method.mean.mean.dtype, method.mean.mean.device.type) == (torch.float64, "cpu")


@pytest.mark.parametrize("every", [2, 4])
def test_every_few_steps_only_those_are_looked_at(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    method = treelora(every=every)
    taken: list[int] = []
    take = method.gradients.take
    monkeypatch.setattr(method.gradients, "take", lambda: (taken.append(method.steps), take())[1])
    method.learn(pictures())
    assert taken == list(range(every, 7, every))
    assert method.mean.weight == {2: 8 + 8 + 3, 4: 8}[every]


def test_fit_with_and_without_a_sketch_has_the_same_bits() -> None:
    results = []
    for on in (True, False):
        model, _ = classifier(tiny_backbone())
        model.requires_grad_(False)
        task = pictures()
        sketch = GradientSketch(model, "default")

        def loss(task: Task, batch: Batch, model: Model = model) -> Tensor:
            return _used(model, lambda: model.loss(task, batch))

        with sketch.on() if on else contextlib.nullcontext():
            fit(loss, parameters(model, "default"), task, FitConfig(epochs=3, batch_size=8))
        results.append([p.clone() for p in parameters(model, "default")])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_micro_batches_give_what_the_batch_gives(folders: dict[str, Path]) -> None:
    """For pictures, and for texts, whose examples are weighted by the number of tokens in their answers."""
    whole, parts = treelora(), treelora({"accumulate": 3})
    for method in (whole, parts):
        method.learn(pictures())
    torch.testing.assert_close(parts.mean.mean, whole.mean.mean, rtol=1e-4, atol=1e-7)
    found = []
    for accumulate in (1, 3):
        model, _ = language(folders["llama"])
        model.requires_grad_(False)
        method = TreeLoRA(model, train=FitConfig(epochs=2, batch_size=6, lr=0.01, accumulate=accumulate))
        method.learn(Task(0, "t", (), train=TextSet(model)))
        found.append((method.mean.mean, torch.cat([p.flatten() for p in parameters(model, "default")])))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-6)


class TextSet(Examples):
    """Ten texts with answers of different lengths."""

    def __init__(self, model: Model):
        view = model.view
        assert isinstance(view, TextView)
        self.texts = [Text(f"question {i}" * (1 + i % 3), "answer " * (1 + i % 4)) for i in range(10)]
        self.view, self.targets = view, [0] * 10
        self.weights = [int(view.sequence(t).answer.sum()) for t in self.texts]  # type: ignore[union-attr]

    def __len__(self) -> int:
        return 10

    def load(self, index: int, seed: int | None) -> Any:
        return self.view.sequence(self.texts[index])

    def collate(self, items: Sequence[Item]) -> Batch:
        return self.view.collate(items)


def test_the_probe_is_the_gradient_of_its_batches(folders: dict[str, Path]) -> None:
    """In whatever parts it is computed: by batches, or by the micro-batches that memory allows."""
    found = []
    for accumulate in (1, 3):
        model, _ = language(folders["llama"])
        model.requires_grad_(False)
        method = TreeLoRA(model, train=FitConfig(batch_size=6, accumulate=accumulate), probe=2)
        task = Task(0, "t", (), train=TextSet(model))
        found.append(method._probed(task))
        assert not any(p.requires_grad or p.grad is not None for p in method.parameters())
        whole = next(load_batches(task.train, [[(i, None) for i in range(10)]], task.runtime))
        model.double()
        for p in parameters(model, "default"):
            p.requires_grad_(True)
        wanted = true_gradients(model, partial(_used, model, partial(model.loss, task, whole)))
        rows = torch.stack([method.gradients._sketches[w.numel()](w.flatten()) for w in wanted])
        # Type: ignore[attr-defined]
        torch.testing.assert_close(found[-1], rows * sum(task.train.weights), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)

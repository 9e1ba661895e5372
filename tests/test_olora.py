"""O-LoRA: the penalty is there and is what it says, old LoRAs rest while all act, and one LoRA comes out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from safetensors.torch import load
from tiny import recipe, split_folder, task_tensors, tiny_language_model, vit_folder
from torch import Tensor

from perpetune.check import Checker, check_method, tiny_backbone, tiny_stream
from perpetune.check import probe as scores_of
from perpetune.data.pictures.view import PictureView
from perpetune.errors import Interrupted, StateError, UsageError
from perpetune.export import export_learned
from perpetune.fit import FitConfig
from perpetune.heads import Linear
from perpetune.learner import Learner
from perpetune.learning import learn_protected
from perpetune.methods.base import Method
from perpetune.methods.finetune import FineTune
from perpetune.methods.olora import NEW, OLoRA
from perpetune.models.backbone import Backbone
from perpetune.models.classifier import Classifier
from perpetune.models.towers import places
from perpetune.pets import LoRA, inject, parameters, pets, slots, using
from perpetune.recipe import make_recipe
from perpetune.report.sections import heads
from perpetune.runtime import Runtime, Silent
from perpetune.seeding import generator, own_global_state
from perpetune.snapshot import restore, snapshot
from perpetune.tasks import Batch, Task

TRAIN = {"epochs": 2, "batch_size": 8, "lr": 0.01}
RANK = 2


def made(name: str = "olora", pet: Any = None, train: dict[str, Any] | None = None, **options: Any) -> Any:
    content = {
        "method": {"name": name, **options},
        "pet": pet or {"name": "lora", "rank": RANK},
        "train": {**TRAIN, **(train or {})},
    }
    return Checker(make_recipe(content)).make()


def taught(method: Any, tasks: Sequence[Task] | None = None) -> Any:
    for task in tasks or tiny_stream(Runtime()):
        learn_protected(method, task)
    return method


def fused() -> Backbone:
    """A transformer whose q, k and v are one layer."""
    from timm.models.vision_transformer import VisionTransformer

    with own_global_state("fused"):
        net = VisionTransformer(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=0)
    return Backbone(net, spec="timm:test", dim=24, preprocess=PictureView(16))


def on(backbone: Backbone, roles: Sequence[str] = ("q", "v", "fc2"), rank: int = RANK, **options: Any) -> OLoRA:
    """The method by hand, on layers of several shapes."""
    options = {"train": FitConfig(**TRAIN), **options}
    inject(backbone.net, places(backbone.net, roles), lambda p: LoRA(p, generator(p.path), rank=rank, dropout=0.2))
    method = OLoRA(Classifier(backbone, Linear(backbone.dim)), **options)
    method.requires_grad_(False).eval()
    return method


def matrices(method: Method, name: str) -> list[tuple[Tensor, Tensor]]:
    """`B` and `A` of every module and part; in `default` those of all finished tasks side by side."""
    pairs = [pair for p in pets(method, name) if isinstance(p, LoRA) for pair in p.factors()]
    if isinstance(method, OLoRA) and name == "default" and method.stack.count:
        assert not any(matrix.numel() for pair in pairs for matrix in pair)
        pairs = method.stack.pairs(0, method.stack.count)
    return [(b.clone(), a.clone()) for b, a in pairs]


def half_learned(method: OLoRA, tasks: Sequence[Task]) -> OLoRA:
    """As it stands in the middle of the last of the tasks."""
    taught(method, tasks[:-1])
    seen: list[list[Tensor]] = []

    def stop() -> int | None:
        seen.append([p.detach().clone() for p in parameters(method, NEW)])
        return 15 if len(seen) == 3 else None

    tasks[-1].runtime.stopping = stop
    with pytest.raises(Interrupted):
        method.learn(tasks[-1])
    tasks[-1].runtime.stopping = lambda: None
    assert not any(NEW in slot.pets for _, slot in slots(method)), "what was begun is gone"
    method._begin(tasks[-1])
    with torch.no_grad():
        for p, value in zip(parameters(method, NEW), seen[-1], strict=True):
            p.copy_(value)
    return method


# -- the penalty --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_backbone, fused], ids=["separate", "fused"])
@pytest.mark.parametrize("learned", [1, 2])
def test_the_penalty_is_that_of_the_matrices_written_out(make: Any, learned: int) -> None:
    method = half_learned(on(make()), tiny_stream(Runtime())[: learned + 1]).double()
    trained = parameters(method, NEW)
    for p in trained:
        p.requires_grad_(True)
    olds = [a.split(RANK) for _, a in matrices(method, "default")]
    assert all(len(of_module) == learned for of_module in olds)
    news = [factors for p in pets(method, NEW) if isinstance(p, LoRA) for factors in p.factors()]
    assert len(news) == 6
    overlap = sum((old @ a.T).abs().sum() for of_module, (_, a) in zip(olds, news, strict=True) for old in of_module)
    size = sum(a.square().sum().sqrt() + b.square().sum().sqrt() for b, a in news)
    assert isinstance(overlap, Tensor)
    assert isinstance(size, Tensor)
    assert float(overlap.detach()) > 0.1
    for found, wanted in ((method.overlap(), overlap), (method.size(), size)):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
        one, other = (torch.autograd.grad(v, trained, materialize_grads=True) for v in (found, wanted))
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
        assert any(bool(g.any()) for g in one)


def told_of(method: OLoRA, tasks: Sequence[Task]) -> list[set[tuple[float, ...]]]:
    """What the loss had beside the model's own, for each task: the weights of its two terms."""
    found: list[set[tuple[float, ...]]] = []
    plain = method.loss

    def loss(task: Task, batch: Batch) -> Tensor:
        value = plain(task, batch)
        with torch.no_grad():
            with using(method.model, ("default", NEW) if method.stack.count else "default"):
                more = float(value - method.model.loss(task, batch))
            overlap, size = float(method.overlap()), float(method.size())
        assert (overlap > 0) is bool(method.stack.count)
        assert size > 0
        known = [(w, s) for w in ((0.0, 0.5, 5.0) if overlap else (0.0,)) for s in (0.0, 0.1)]
        found[-1].add(next((pair for pair in known if abs(more - pair[0] * overlap - pair[1] * size) < 1e-4), (more,)))
        return value

    method.loss = loss  # type: ignore[method-assign]
    for task in tasks:
        found.append(set())
        method.learn(task)
    return found


def test_the_loss_has_the_weights_of_its_task() -> None:
    """The first task has no earlier one; the last weight of a list holds for all further ones."""
    classes = (("a", "b"), ("c", "d"), ("e", "f"), ("a", "c"))
    for given, wanted in (
        ({}, [(0.0, 0.0), (0.5, 0.0), (0.5, 0.0), (0.5, 0.0)]),
        ({"orthogonality": 0.0}, [(0.0, 0.0)] * 4),
        ({"orthogonality": [5.0, 0.5, 5.0]}, [(0.0, 0.0), (0.5, 0.0), (5.0, 0.0), (5.0, 0.0)]),
        ({"shrink": 0.1, "orthogonality": 0}, [(0.0, 0.1)] * 4),
        ({"shrink": [0.0, 0.1]}, [(0.0, 0.0), (0.5, 0.1), (0.5, 0.1), (0.5, 0.1)]),
    ):
        found = told_of(made(train={"epochs": 1}, **given), tiny_stream(Runtime(), classes))
        assert found == [{weights} for weights in wanted], given


def test_the_penalty_counts_once_however_a_step_is_cut() -> None:
    whole, cut = (
        taught(made(orthogonality=5.0, train={"accumulate": n, "optimizer": "sgd"})).facts()["olora"] for n in (1, 4)
    )
    assert cut["overlap"] == pytest.approx(whole["overlap"], rel=1e-2)
    assert cut["mean_cosine"] == pytest.approx(whole["mean_cosine"], rel=1e-2)


def test_under_autocast_it_is_of_full_precision() -> None:
    method = half_learned(on(tiny_backbone()), tiny_stream(Runtime())[:2])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(method.overlap(), method.overlap().float())
        found = method.overlap()
    assert torch.equal(found, method.overlap())


# -- what it brings about -----------------------------------------------------------------------------


def test_new_rows_become_orthogonal_where_the_penalty_is_large_and_else_do_not() -> None:
    """And what is learned then moves old outputs less, on inputs in the space of the rows of old `A`."""
    cosines, moved = {}, {}
    for weight in (0.0, 20.0):
        method = taught(made(orthogonality=weight, train={"epochs": 6}))
        cosines[weight] = method.facts()["olora"]["mean_cosine"]
        shares = []
        for b, a in matrices(method, "default"):
            old, new_a, new_b = a[:-RANK], a[-RANK:], b[:, -RANK:]
            space = torch.linalg.qr(old.T).Q  # inputs that the old LoRAs look at
            assert float(new_b.norm()) > 1e-3
            shares.append(float((new_b @ new_a @ space).norm() / (new_b @ new_a).norm()))
        moved[weight] = sum(shares) / len(shares)
    assert cosines[20.0] < 0.05 < 0.2 < cosines[0.0]
    assert moved[20.0] < 0.05 < 0.2 < moved[0.0]


@pytest.mark.parametrize("options", [{}, {"mask": "seen"}, {"orthogonality": 5.0, "train": {"accumulate": 2}}])
def test_with_one_task_it_is_plain_tuning(options: dict[str, Any]) -> None:
    tasks = tiny_stream(Runtime())[:1]
    method = taught(made(**options), tasks)
    plain = taught(made("finetune", **{k: v for k, v in options.items() if k != "orthogonality"}), tasks)
    assert isinstance(plain, FineTune)
    assert snapshot(method)["head.safetensors"] == snapshot(plain)["head.safetensors"]
    stored = load(snapshot(method)["rest-task-0.safetensors"])
    for (b, a), (plain_b, plain_a) in zip(matrices(method, "default"), matrices(plain, "default"), strict=True):
        assert torch.equal(b, plain_b)
        assert torch.equal(a, plain_a)
        assert all(any(torch.equal(m, other) for other in stored.values()) for m in (b, a))
    assert torch.equal(scores_of(method, "ab"), scores_of(plain, "ab"))


@pytest.mark.parametrize("make", [tiny_backbone, fused], ids=["separate", "fused"])
def test_old_loras_the_backbone_and_rows_of_the_head_stay_as_they_are(make: Any) -> None:
    method, tasks = on(make(), train=FitConfig(**TRAIN, weight_decay=0.1)), tiny_stream(Runtime())
    fingerprint = method.model.backbone.fingerprint()
    assert isinstance(method.model, Classifier)
    kept: list[list[tuple[Tensor, Tensor]]] = []
    rows = method.model.head.get_parameter("weight").clone()
    for count, task in enumerate(tasks, 1):
        learn_protected(method, task)
        now, weight = matrices(method, "default"), method.model.head.get_parameter("weight")
        for before, earlier in enumerate(kept, 1):
            for (b, a), (old_b, old_a) in zip(now, earlier, strict=True):
                assert torch.equal(b[:, : before * RANK], old_b)
                assert torch.equal(a[: before * RANK], old_a)
        assert all(b.shape[1] == a.shape[0] == count * RANK for b, a in now)
        assert all(bool(b[:, -RANK:].any()) for b, _ in now), "the new one has learned something"
        assert torch.equal(weight[: len(rows)], rows)
        rows = weight.clone()
        kept.append(now)
    first = [a[:RANK] for _, a in kept[-1]]
    assert not any(torch.allclose(a[RANK : 2 * RANK], other) for (_, a), other in zip(kept[-1], first, strict=True))
    assert method.model.backbone.fingerprint() == fingerprint


def test_all_act_together_in_training_and_after_it() -> None:
    method = half_learned(on(fused()), tiny_stream(Runtime())[:3])
    pixels = torch.randn(3, 3, 16, 16, generator=generator("x"))
    assert all(bool(b.any()) for b, _ in matrices(method, NEW))
    backbone = method.model.backbone
    with torch.no_grad():
        with using(method, ("default", NEW)):
            both = backbone(pixels)
        with using(method, "default"):
            old = backbone(pixels)
            method._add(NEW)
            torch.testing.assert_close(backbone(pixels), both, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(old, both, rtol=1e-3, atol=1e-3)


def test_old_loras_act_without_dropout() -> None:
    method, tasks, modes = on(tiny_backbone()), tiny_stream(Runtime()), []
    plain = method.model.loss

    def loss(task: Task, batch: Batch) -> Tensor:
        names = {name for _, slot in slots(method) for name in slot.pets}
        modes.append({name: {p.training for p in pets(method, name)} for name in names})
        return plain(task, batch)

    method.model.loss = loss  # type: ignore[method-assign]
    method.learn(tasks[0])
    assert all(seen == {"default": {True}} for seen in modes)
    modes.clear()
    method.learn(tasks[1])
    assert all(seen == {"default": {False}, NEW: {True}} for seen in modes)
    assert not any(pet.training for pet in pets(method, "default"))


# -- the contract, and what is stored -----------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    # test_contract has the method without options
    [("orthogonality=[0, 5]", "shrink=0.1", "mask=seen", "head=ncm")],
)
def test_it_keeps_the_contract(changes: tuple[str, ...]) -> None:
    assert [f"{o.rule}: {o.fault}" for o in check_method("olora", changes) if o.fault is not None] == []


def test_it_goes_back_to_any_task_and_on_from_there() -> None:
    tasks, method = tiny_stream(Runtime()), made()
    stages = [snapshot(method)]
    for task in tasks:
        learn_protected(method, task)
        stages.append(snapshot(method))
    scores, facts = scores_of(method), method.facts()
    for back in (2, 0, 3, 1):
        restore(method, stages[back], "memory")
        assert snapshot(method) == stages[back]
        other = made()
        restore(other, stages[back], "memory")
        assert snapshot(other) == stages[back]
        assert snapshot(taught(other, tasks[back:])) == stages[3] if back < 3 else other.facts() == facts
    restore(method, stages[3], "memory")
    assert torch.equal(scores_of(method), scores)


def test_a_state_that_does_not_fit_is_said() -> None:
    files = snapshot(taught(made()))
    extra = json.loads(files["extra.json"])
    foreign = "the entry '' is not what a OLoRA stores"
    for loras, message in (
        *((wrong, foreign) for wrong in (None, True, -1, 1.0, "3", 10**9)),
        (1, "sets at rest do not fit the recipe: missing none; unexpected task-1, task-2"),
        (4, "sets at rest do not fit the recipe: missing task-3"),
    ):
        extra[""]["loras"] = loras
        with pytest.raises(StateError, match=message):
            restore(made(), {**files, "extra.json": json.dumps(extra).encode()}, "memory")


def test_what_it_tells() -> None:
    method = made()
    found = []
    for task in tiny_stream(Runtime()):
        learn_protected(method, task)
        found.append(method.facts()["olora"])
    assert [f["loras"] for f in found] == [1, 2, 3]
    assert [f["adapter_bytes"] for f in found] == [4 * n * 4 * (RANK * 32 + 32 * RANK) for n in (1, 2, 3)]
    assert (found[0]["overlap"], found[0]["mean_cosine"]) == (None, None)
    old, new = zip(*[(a[:-RANK], a[-RANK:]) for _, a in matrices(method, "default")], strict=True)
    overlap = sum(float((o @ n.T).abs().sum()) for o, n in zip(old, new, strict=True))
    assert found[2]["overlap"] == pytest.approx(overlap, rel=1e-4)
    angles = [
        torch.linalg.svdvals(torch.linalg.qr(o.T).Q.T @ torch.linalg.qr(n.T).Q) for o, n in zip(old, new, strict=True)
    ]
    assert found[2]["mean_cosine"] == pytest.approx(float(torch.cat(angles).mean()), rel=1e-4)
    assert json.loads(json.dumps(found)) == found
    results = {"tasks": [{"name": n} for n in "abc"], "facts": [{"task": 1, "of": {"olora": found[1]}}]}
    (row,) = heads.rows(results)
    assert row.texts == ["orthogonal adapters"]
    assert row.more.startswith("loras 2, overlap ")


def test_more_loras_than_the_layers_are_wide() -> None:
    method = taught(made(pet={"name": "lora", "rank": 14}))
    assert method.facts()["olora"]["mean_cosine"] == pytest.approx(1, abs=0.2)
    assert torch.isfinite(scores_of(method)).all()


def trained_beside_another(content: dict[str, Any], folder: Path) -> None:
    """In a process of its own, forked from this one, which was alone."""
    AcceleratorState._reset_state(reset_partial_state=True)
    Learner(content, folder).run()


def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    """Nine examples, then three, in batches of four: in the last step a process has none. The penalty counts once."""
    data = split_folder(tmp_path / "data", "abcd", [5, 4, 1, 2], 2)
    train = {"epochs": 2, "batch_size": 4, "lr": 0.01, "optimizer": "sgd"}
    method = {"name": "olora", "orthogonality": 5.0, "shrink": 0.1}
    content = recipe(vit_folder(tmp_path / "vit"), data, method=method, train=train)
    debug_launcher(trained_beside_another, (content, tmp_path / "two"))
    one = Learner(content, tmp_path / "one")
    one.run()
    assert one.method.facts()["olora"]["overlap"] > 0
    files, others = task_tensors(tmp_path / "one"), task_tensors(tmp_path / "two")
    assert any(file.endswith("pet.safetensors") for file in files)
    for file, found in files.items():
        for name, tensor in found.items():
            torch.testing.assert_close(others[file][name], tensor, atol=2e-5, rtol=1e-4, msg=f"{file}: {name}")


# -- errors -------------------------------------------------------------------------------------------


def test_what_it_cannot_work_with_is_said_in_one_line() -> None:
    for content, message in (
        ({"pet": None}, "olora tunes LoRA, but the recipe has no pet"),
        ({"pet": "adapter"}, "olora tunes LoRA, but the recipe has adapter"),
        ({"pet": "lora", "protect": True}, "olora trains a new LoRA for each task, and protect: cannot hold that"),
        ({"pet": "lora", "method": {"name": "olora", "shrink": -1}}, "shrink: .* greater than or equal to 0"),
        ({"pet": "lora", "method": {"name": "olora", "orthogonality": []}}, "orthogonality: .* at least 1 item"),
        ({"pet": "lora", "method": {"name": "olora", "orthogonality": [0.5, "x"]}}, "orthogonality"),
    ):
        with pytest.raises(UsageError, match=message) as error:
            Checker(make_recipe({"method": "olora", **content})).make()
        assert "\n" not in str(error.value)


# -- a language model ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_language_model(tmp_path_factory.mktemp("model"), "gpt2")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks in files."""
    folder = tmp_path_factory.mktemp("texts")
    for task, answers in {"fruit": ("apple", "plum"), "town": ("Rome", "Oslo"), "verb": ("go", "see")}.items():
        (folder / task).mkdir()
        for split, count in (("train", 12), ("test", 4)):
            rows = [{"prompt": f"Which {task} is {i % 2}?", "answer": answers[i % 2]} for i in range(count)]
            (folder / task / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def content(language: Path, texts: Path | None, **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": "tiny",
        "backbone": {"name": f"hf:{language}"},
        "pet": {"name": "lora", "rank": RANK, "at": ["q", "v", "fc2"]},
        "head": {"name": "lm", "max_new_tokens": 4},
        "method": {"name": "olora"},
        "train": {"epochs": 1, "batch_size": 4, "lr": 0.01},
        "run": {"device": "cpu", "checkpoint_every": 1},
    }
    return {**found, **({"data": {"name": "text", "path": str(texts)}} if texts else {}), **changes}


def test_a_language_model_learns_stops_goes_on_and_goes_back(language: Path, texts: Path, tmp_path: Path) -> None:
    whole = Learner(content(language, texts), tmp_path / "whole")
    expected = whole.run()
    assert [t["name"] for t in expected["tasks"]] == ["fruit", "town", "verb"]
    facts = {entry["task"]: entry["of"]["olora"] for entry in expected["facts"]}
    assert facts[2]["overlap"] > 0

    class Stop(Silent):
        def step(self, done: int, epoch: int, loss: float | None, images: int) -> None:
            if len(stopped.state.committed) == 2 and done == 1:
                stopped.runtime.stopping = lambda: 15

    stopped = Learner(content(language, texts), tmp_path / "stopped", progress=Stop())
    with pytest.raises(Interrupted):
        stopped.run()
    assert [c.name for c in stopped.state.committed] == ["fruit", "town"]
    later = Learner.load(tmp_path / "stopped")
    assert later.resume()["cells"] == expected["cells"]
    assert snapshot(later.method) == snapshot(whole.method)

    with later.state.writing():
        later.state.rollback("fruit")
    again = Learner.load(tmp_path / "stopped")
    assert all(a.shape[0] == RANK for _, a in matrices(again.method, "default"))
    again.run()
    assert snapshot(again.method) == snapshot(whole.method)


def test_a_language_model_is_updated(language: Path, texts: Path, tmp_path: Path) -> None:
    learner = Learner(content(language, None), tmp_path / "state")
    learner.learn(str(texts / "fruit"))
    learner = Learner.load(tmp_path / "state")
    learner.learn(str(texts / "town"))
    assert learner.method.facts()["olora"]["loras"] == 2
    assert set(learner.evaluate()) == {"fruit", "town"}


def test_blocks_computed_again_have_all_loras_in_force(language: Path, texts: Path) -> None:
    found = []
    for again in (False, True):
        backbone = {"name": f"hf:{language}", "gradient_checkpointing": again}
        learner = Learner(content(language, texts, backbone=backbone))
        learner.run()
        found.append(matrices(learner.method, "default"))
    for (b, a), (b2, a2) in zip(*found, strict=True):
        torch.testing.assert_close(b, b2, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a, a2, rtol=1e-4, atol=1e-5)


def test_what_a_language_model_has_learned_goes_to_peft_as_one_lora(
    language: Path, texts: Path, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    learner = Learner(content(language, texts))
    learner.run()
    backbone = learner.method.model.backbone
    export_learned(learner.method, backbone, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert {config["r"], *config["rank_pattern"].values()} == {3 * RANK, 3 * 2 * RANK}  # q and v are one layer
    ids = torch.randint(3, 300, (2, 9), generator=generator("ids"))
    with torch.no_grad(), using(backbone.net, "default"):
        ours = backbone.net(input_ids=ids).logits
    net = AutoModelForCausalLM.from_pretrained(language)
    theirs = peft.PeftModel.from_pretrained(net, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=ids).logits, ours, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(backbone.net(input_ids=ids).logits, ours, atol=1e-3)

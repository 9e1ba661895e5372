"""No step waits for the device: what `perpetune.check.waits` finds, on a machine without one."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SIZE, dual_folder, load_tiny_vlm, tiny_vision_language
from torch import Tensor, nn

from perpetune.build import build_method, load_backbone
from perpetune.check.kind import TinyKind
from perpetune.check.pictures import TinyPictures
from perpetune.check.survey import in_batches, in_steps, survey
from perpetune.check.texts import TinyTexts
from perpetune.check.waits import DEVICE, Stand, Waits, on_stand
from perpetune.data.pictured.view import Shown
from perpetune.data.texts.tables import Text
from perpetune.errors import PerpetuneError
from perpetune.fit import FitConfig, _LossSeen, fit
from perpetune.heads import Ridge
from perpetune.learning import learn_protected
from perpetune.methods.base import Method
from perpetune.methods.treelora.method import TreeLoRA
from perpetune.numerics.handover import Arrivals, Late, sent
from perpetune.pets.choice import Choice
from perpetune.recipe import Recipe, make_recipe
from perpetune.runtime import Runtime
from perpetune.seeding import generator
from perpetune.snapshot import tensors
from perpetune.tasks import Batch, Inputs, Task

TRAIN: dict[str, Any] = {"epochs": 1, "batch_size": 4, "lr": 0.01}
PROTECT = {"energy": 0.9}
POOL = {"name": "pool", "members": 4, "select": {"name": "keys", "top": 2}}
SEEN = {"name": "finetune", "mask": "seen"}
ASKS = {"to host pets/choice.py _read"}  # which members act decides what is computed
LIBRARY = {"read transformers"}  # its masks

PICTURES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "finetune": ({"train": {**TRAIN, "clip": 1.0, "accumulate": 2}, "method": SEEN}, set()),
    "adapter": ({"pet": "adapter", "head": "cosine", "protect": PROTECT}, set()),
    "ssf": ({"pet": "ssf"}, set()),
    "prefix": ({"pet": "prefix", "protect": PROTECT}, set()),
    "prompt": ({"pet": "prompt", "protect": {**PROTECT, "strength": "soft"}}, set()),
    "merge": ({"method": {"name": "finetune", "merge": 0.5}, "protect": {**PROTECT, "renew": True}}, set()),
    "average": ({"average": {"weight": "curvature", "base": 0.9}}, set()),
    "ridge": ({"head": {"name": "ridge", "carry": True}, "train": {**TRAIN, "epochs": [1, 0]}}, set()),
    "random features": ({"method": "first_session", "head": {"name": "ridge", "projection": 64}}, set()),
    "ncm": ({"head": "ncm"}, set()),
    "drawn": ({"head": {"name": "drawn", "covariance": "full", "epochs": 1}}, set()),
    "safe": ({"method": "safe", "head": "ridge"}, set()),
    "olora": ({"method": {"name": "olora", "shrink": 0.1}}, set()),
    "treelora": ({"method": "treelora"}, set()),
    "l2p": ({"pet": "prompt", "method": POOL, "protect": PROTECT}, ASKS),
    "dualprompt": ({"method": {"name": "pool", "members": "task", "select": "keys"}}, set()),
    "hide": ({"method": {"name": "pool", "members": "task", "select": "gaussian", "repel": 0.1}}, set()),
}  # fmt: skip
TEXTS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "language model": ({"head": "lm", "train": {**TRAIN, "clip": 1.0}}, LIBRARY),
    "text treelora": ({"head": "lm", "method": "treelora"}, LIBRARY),
    "text classifier": ({"head": "ridge", "protect": PROTECT}, LIBRARY | {"size protection/sites.py _counting"}),
}
ALL = (*PICTURES, *TEXTS)
QUICK = ("finetune", "adapter", "random features", "drawn", "treelora", "dualprompt", "language model")


def recipe(**changes: Any) -> Recipe:
    base = {"name": "waits", "pet": {"name": "lora", "rank": 2, "at": ["q", "v"]}, "train": TRAIN, "data": None}
    return make_recipe({**base, **changes})


@cache
def kind(name: str) -> TinyKind:
    return TinyTexts() if name == "texts" else TinyPictures()


def made(of: str, changes: dict[str, Any]) -> tuple[Method, list[Task]]:
    method = build_method(recipe(**changes), kind(of).backbone())
    return method, kind(of).stream(Runtime())[: 1 + (changes.get("method") not in (None, SEEN))]


def places(found: dict[str, int]) -> set[str]:
    """Waits without their lines, and those of transformers under one name."""
    return {"read transformers" if "transformers/" in p else re.sub(r":\d+", "", p) for p in found}


# -- the detector ----------------------------------------------------------------------------------


def _controls() -> dict[str, tuple[str, Callable[[Tensor], object]]]:
    return {
        "item": ("read", lambda z: z[0].item()),
        "bool": ("read", lambda z: bool(z[0] > 0)),
        "float": ("read", lambda z: float(z[0])),
        "format": ("read", lambda z: f"{z[0]:.2f}"),
        "equal": ("read", lambda z: torch.equal(z, z)),
        "nonzero": ("size", lambda z: (z > 0).nonzero()),
        "mask": ("size", lambda z: z[z > 0]),
        "put by mask": ("size", lambda z: z.clone().index_put_((z > 0,), z[:3])),
        "masked_select": ("size", lambda z: torch.masked_select(z, z > 0)),
        "unique": ("size", lambda z: z.unique()),
        "repeat": ("size", lambda z: z.repeat_interleave(torch.ones(4, dtype=torch.long, device=DEVICE))),
        "bincount": ("size", lambda z: z.long().bincount()),
        "cpu": ("to host", lambda z: z.cpu()),
        "to": ("to host", lambda z: z.to("cpu")),
        "tolist": ("to host", lambda z: z.tolist()),
        "numpy": ("to host", lambda z: z.numpy()),
        "tensor": ("to device", lambda z: torch.tensor([1.0, 2.0], device=DEVICE)),
        "as_tensor": ("to device", lambda z: torch.as_tensor([1.0], device=DEVICE)),
        "move": ("to device", lambda z: torch.ones(3).to(DEVICE)),
        "index": ("to device", lambda z: z[[0, 1]]),
        "late": ("late", lambda z: Late(z).read()),
    }


@pytest.mark.parametrize("name", _controls())
def test_each_kind_of_wait_is_found_once(name: str) -> None:
    expected, act = _controls()[name]
    with Waits() as waits:
        z = torch.tensor([1.0, -1.0, 2.0, 0.0]).to(DEVICE, non_blocking=True).abs()
        assert isinstance(z, Stand)
        assert waits.count() == {}
        act(z)
    assert [wait.kind for wait in waits.found] == [expected]
    assert "test_waits.py" in waits.found[0].where


def test_what_does_not_wait_is_not_found() -> None:
    with Waits() as waits:
        z = torch.arange(4, device=DEVICE).float()
        z[z > 2] = 0.0
        z[:2] = 1.0
        _ = torch.where(z > 0, z, 1.0), z[torch.arange(2, device=DEVICE)], z.double().sum(), sent([1, 2], DEVICE)
        weight = nn.Parameter(torch.ones(2, 4, device=DEVICE))
        weight.data = torch.zeros(3, 4, device=DEVICE)
        (weight @ z).sum().backward()
        assert weight.grad is not None
        assert weight.grad.shape == (3, 4)
    assert waits.count() == {}


def test_tensors_of_both_places_do_not_mix() -> None:
    with Waits(), pytest.raises(RuntimeError, match="same device"):
        _ = torch.ones(2, device=DEVICE) + torch.ones(2)


def test_a_step_that_waits_is_found() -> None:
    method, tasks = made("pictures", {})
    bare = method.loss  # type: ignore[attr-defined]

    def loss(task: Task, batch: Batch) -> Tensor:
        value: Tensor = bare(task, batch)
        return value * (2.0 if value.item() < 0 else 1.0)

    method.loss = loss  # type: ignore[attr-defined]
    found = in_steps(survey(method, tasks[:1]))
    assert list(found.values()) == [3], "once in each of the steps 3, 4 and 5"


# -- every path ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ALL])
def test_no_step_waits(name: str) -> None:
    of, (changes, known) = ("pictures", PICTURES[name]) if name in PICTURES else ("texts", TEXTS[name])
    waits = survey(*made(of, changes))
    assert waits.found, "there are waits outside of steps"
    asked = {place for place in places(in_steps(waits)) if not place.startswith("late ")}
    assert asked == known
    passes = {place for place in places(in_batches(waits)) if not place.startswith("late ")}
    assert passes <= known


@pytest.mark.parametrize("name", ["drawn", pytest.param("treelora", marks=pytest.mark.slow)])
def test_the_stand_in_learns_the_same(name: str) -> None:
    """What is read late is used as if it had been read at once."""
    here, tasks = made("pictures", PICTURES[name][0])
    for task in tasks:
        learn_protected(here, task, batch_size=4)
    there, tasks = made("pictures", PICTURES[name][0])
    survey(there, tasks)
    for file, group in tensors(here).items():
        for key, value in tensors(there)[file].items():
            held = value.held if isinstance(value, Stand) else value
            assert torch.allclose(group[key], held, rtol=1e-3, atol=1e-4), key  # attention has another kernel


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("at", ["q", "picture.q"])
def test_pictures_in_texts(tmp_path: Path, at: str) -> None:
    """A picture of a frozen tower is computed in the first step, and found again in the second."""
    backbone = load_tiny_vlm(tiny_vision_language(tmp_path, "llava-clip"), "llava-clip")
    pet = {"name": "lora", "rank": 2, "at": [at]}
    method = build_method(recipe(head={"name": "vlm", "projector": True}, pet=pet), backbone)
    texts = [Text("<image> what?", "blue", pictures=1), Text("none here", "red"), Text("<image>?", "red", pictures=1)]
    rows = [Shown(method.model.view.sequence(text), _pixels(n, text.pictures)) for n, text in enumerate(texts)]
    batch = method.model.view.collate([(row, 0, number) for number, row in enumerate(rows)])
    trained = [p for group, _ in method.groups(FitConfig()) for p in group]

    def step(batch: Batch) -> tuple[Tensor, list[Tensor]]:
        loss: Tensor = method.loss(None, batch)  # type: ignore[attr-defined]
        return loss, list(torch.autograd.grad(loss, trained, materialize_grads=True, allow_unused=True))

    for p in trained:
        p.requires_grad_(True)
    loss, wanted = step(batch)
    with Waits() as waits:
        on_stand(method)
        there = batch.to(DEVICE)
        waits.found.clear()
        for _ in range(2):
            value, found = step(there)
    assert {p for p in places(waits.count()) if not p.startswith("late ")} <= LIBRARY
    torch.testing.assert_close(value.held, loss)  # type: ignore[attr-defined]
    torch.testing.assert_close([one.held for one in found], wanted)  # type: ignore[attr-defined]


def _pixels(number: int, count: int) -> tuple[Tensor, ...]:
    drawn = torch.randint(0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator("pixels", number))
    return tuple(drawn)


# -- what is read late -------------------------------------------------------------------------------


def test_arrivals_keep_their_order() -> None:
    with Waits() as waits:
        arrivals, taken = Arrivals(), []
        for number in range(5):
            arrivals.put(torch.full((1,), number, device=DEVICE), torch.zeros(1, device=DEVICE))
            taken.append([int(one) for one, _ in arrivals.take()])
        rest = [int(one) for one, _ in arrivals.take(all=True)]
    assert taken == [[], [], [0], [1], [2]]
    assert rest == [3, 4]
    assert {wait.kind for wait in waits.found} == {"late"}
    here = Arrivals()
    here.put(torch.ones(1), torch.ones(1))
    assert len(list(here.take())) == 1, "on the CPU all is there at once"


def test_features_that_are_not_finite_spoil_no_sum() -> None:
    good, bad = torch.ones(4, 3), torch.full((4, 3), torch.nan)
    with Waits():
        head = Ridge(3)
        head.grow(["a", "b"], torch.Generator())
        on_stand(head)
        head.expect(torch.tensor([8, 8]))
        rows = torch.tensor([0, 0, 1, 1]).to(DEVICE)
        head.observe(good.to(DEVICE), rows)
        head.observe(bad.to(DEVICE), rows)
        head.flush()
        assert bool(torch.isfinite(head.packed).all())
        with pytest.raises(PerpetuneError, match="an example of class a are not finite"):
            head.settle()


@pytest.mark.parametrize("first", [0, 9, 12])
def test_a_loss_that_is_not_finite_is_found_one_step_late(first: int) -> None:
    method, tasks = made("pictures", {})
    with Waits():
        on_stand(method)
        tasks[0].runtime.device = DEVICE
        parameter, calls = next(method.model.backbone.net.parameters()), 0

        def loss(task: Task, batch: Batch) -> Tensor:
            nonlocal calls
            calls += 1
            value: Tensor = parameter.sum()
            return value * float("nan") if calls > first else value

        with pytest.raises(PerpetuneError, match=r"the loss became nan .* by step (10|20)"):
            fit(loss, [parameter], tasks[0], FitConfig(epochs=4, batch_size=4, lr=1e-9))
    assert calls == (11 if first < 10 else 21)


def test_a_loss_is_read_even_if_the_next_one_comes_before() -> None:
    seen = _LossSeen(kind("pictures").stream(Runtime())[0], "train", 6)
    with Waits():
        seen.put(torch.full((), torch.nan, device=DEVICE), 9)
        assert seen.read(now=False) is None
        with pytest.raises(PerpetuneError, match="by step 10"):
            seen.put(torch.zeros((), device=DEVICE), 10)


def test_an_open_gradient_of_a_failed_task_is_forgotten() -> None:
    method, _ = made("pictures", {"method": "treelora"})
    assert isinstance(method, TreeLoRA)
    before = method.get_extra_state()
    method._seen = Late(torch.ones(method.gradients.shape)), 1.0, 4
    method.set_extra_state(before)
    assert method.get_extra_state() == before
    assert not method.mean.mean.any()


def test_a_choice_asks_the_device_once() -> None:
    index = torch.tensor([[2, 0], [0, 2], [2, 0]])
    with Waits() as waits:
        choice = Choice(("a", "b", "c"), index.to(DEVICE, non_blocking=True)).narrowed()
        assert isinstance(choice, Choice)
        assert choice.members == ("a", "c")
        assert choice.examples_of(1, 0).tolist() == [0, 2]
        values = choice.picked([torch.zeros(1, device=DEVICE), torch.ones(1, device=DEVICE)])
    assert places(waits.count()) == ASKS
    assert torch.equal(values.held[..., 0], torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))  # type: ignore[attr-defined]


def test_what_decides_stays_on_the_cpu() -> None:
    with Waits():
        inputs = Inputs(pixels=torch.zeros(2, 3), caption=torch.zeros(2, dtype=torch.int64)).to(DEVICE)
    assert inputs.pixels.device == DEVICE
    assert inputs["caption"].device.type == "cpu"


@pytest.mark.filterwarnings("ignore")
def test_a_dual_encoder_with_captions(tmp_path: Path) -> None:
    backbone = load_backbone(f"hf:{dual_folder(tmp_path)}")
    method = build_method(recipe(head="text", pet={"name": "lora", "rank": 2, "at": ["q", "text.q"]}), backbone)
    pixels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)

    class Captioned:
        def captions(self, index: int) -> list[str]:
            return [f"a {index}", f"one {index}"]

    batch = Batch(Inputs(pixels=pixels, caption=torch.tensor([0, 1, 0, 1])), torch.zeros(4), torch.arange(4))
    wanted = method.model._caption_loss(Captioned(), batch)  # type: ignore[operator]
    with Waits() as waits:
        on_stand(method)
        there = batch.to(DEVICE)
        waits.found.clear()
        value = method.model._caption_loss(Captioned(), there)  # type: ignore[operator]
    assert places(waits.count()) <= LIBRARY
    assert torch.allclose(value.held, wanted)

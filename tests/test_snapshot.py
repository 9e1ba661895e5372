"""A method as files: bit for bit there and back, and strict about what does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from perpetune.build import build_method
from perpetune.check import probe, tiny_backbone, tiny_stream
from perpetune.errors import StateError
from perpetune.files import to_json
from perpetune.methods.base import Method
from perpetune.models.base import Model
from perpetune.recipe import make_recipe
from perpetune.runtime import Runtime
from perpetune.snapshot import EXTRA, FILES, SUMS, restore, restore_optimizer, snapshot, snapshot_optimizer, tensors
from perpetune.tasks import Task

Files = dict[str, bytes]


def make(**change: Any) -> Method:
    recipe = make_recipe({"train": {"epochs": 1, "batch_size": 8, "lr": 0.01}, **change})
    return build_method(recipe, tiny_backbone())


@pytest.fixture(scope="module")
def learned() -> Method:
    method = make(head="ncm")
    for task in tiny_stream(Runtime())[:2]:
        method.learn(task)
    return method


@pytest.fixture(scope="module")
def files(learned: Method) -> Files:
    return snapshot(learned)


def test_a_fresh_method_becomes_the_same(learned: Method, files: Files) -> None:
    other = make(head="ncm")
    restore(other, files, "there")
    assert snapshot(other) == files
    assert other.classes == learned.classes == ["a", "b", "c", "d"]
    assert torch.equal(probe(other, "abcd"), probe(learned, "abcd"))


def test_a_method_that_learned_more_goes_back(files: Files) -> None:
    other = make(head="ncm")
    for task in tiny_stream(Runtime()):
        other.learn(task)
    restore(other, files, "there")
    assert snapshot(other) == files


def test_a_new_method_can_be_had_back() -> None:
    """Zero classes are a snapshot like any other."""
    method = make()
    before = snapshot(method)
    method.learn(tiny_stream(Runtime())[0])
    assert snapshot(method) != before
    restore(method, before, "there")
    assert snapshot(method) == before
    assert method.classes == []


def test_what_is_stored_is_the_pet_the_head_and_the_methods_own(files: Files) -> None:
    assert set(files) == {*FILES, SUMS, EXTRA}
    assert set(snapshot(make())) == {*FILES, EXTRA}, "a head that sums nothing up has no file for it"
    assert all("pets" in name for name in load(files["pet.safetensors"]))
    assert load(files["pet.safetensors"])
    head = load(files["head.safetensors"])
    assert {name: t.dtype for name, t in head.items() if not name.endswith("probe.scale")} == {
        "model.head.means": torch.float32,
        "model.head.probe.weight": torch.float32,
    }
    assert {name: t.dtype for name, t in load(files[SUMS]).items()} == {
        "model.head.sums": torch.float64,
        "model.head.counts": torch.int64,
    }
    assert load(files["method.safetensors"]) == {}


def test_the_frozen_backbone_is_not_stored(learned: Method, files: Files) -> None:
    stored = sum(t.numel() for name in FILES for t in load(files[name]).values())
    assert stored < sum(p.numel() for p in learned.parameters()) / 3


def test_what_no_step_changes_is_left_out_of_a_checkpoint(learned: Method, files: Files) -> None:
    """And where it is left out, what is there stays."""
    light = snapshot(learned, memory=False)
    assert light == {name: content for name, content in files.items() if name != SUMS}
    other = make(head="ncm")
    restore(other, files, "there")
    with torch.no_grad():
        for tensor in other.model.head.additive():  # type: ignore[operator, union-attr]
            tensor.add_(1)
    before = snapshot(other)[SUMS]
    restore(other, light, "there", memory=False)
    assert snapshot(other) == {**files, SUMS: before}


def test_sums_from_before_they_had_a_file_of_their_own(files: Files) -> None:
    """They were stored with the rest of the head."""
    older = {name: content for name, content in files.items() if name != SUMS}
    older[HEAD] = save({**load(files[HEAD]), **load(files[SUMS])})
    other = make(head="ncm")
    restore(other, older, "there")
    assert snapshot(other) == files
    with pytest.raises(StateError, match=f"there/{HEAD}: .* missing model.head.counts, model.head.sums"):
        restore(make(head="ncm"), {name: content for name, content in files.items() if name != SUMS}, "there")


def test_parameters_stay_the_objects_they_are(files: Files) -> None:
    """So an optimizer that holds them goes on with them."""
    method = make(head="ncm")
    restore(method, files, "there")
    before = [id(t) for group in tensors(method).values() for t in group.values()]
    restore(method, files, "there")
    assert [id(t) for group in tensors(method).values() for t in group.values()] == before


PET = "pet.safetensors"
HEAD = "head.safetensors"
MEANS = "model.head.means"


def edited(files: Files, name: str, change: Callable[[dict[str, Tensor]], object]) -> Files:
    found = load(files[name])
    change(found)
    return {**files, name: save(found)}


def a_pet_tensor(files: Files) -> str:
    return sorted(load(files[PET]))[0]


def test_a_missing_tensor_is_named(files: Files) -> None:
    name = a_pet_tensor(files)
    with pytest.raises(StateError) as error:
        restore(make(head="ncm"), edited(files, PET, lambda found: found.pop(name)), "there")
    assert str(error.value) == f"there/{PET}: tensors do not fit the recipe: missing {name}; unexpected none"


def test_an_unexpected_tensor_is_named(files: Files) -> None:
    with pytest.raises(StateError) as error:
        restore(make(head="ncm"), edited(files, HEAD, lambda f: f.update(stranger=torch.zeros(2))), "there")
    assert str(error.value) == f"there/{HEAD}: tensors do not fit the recipe: missing none; unexpected stranger"


def test_a_tensor_of_another_shape_is_named(files: Files) -> None:
    changed = edited(files, HEAD, lambda found: found.update({MEANS: found[MEANS][:, :-1].contiguous()}))
    with pytest.raises(StateError, match=rf"there/{HEAD}: {MEANS} is .*\(4, 31\), but .* \(4, 32\)"):
        restore(make(head="ncm"), changed, "there")


def test_a_tensor_of_another_type_is_named(files: Files) -> None:
    name = a_pet_tensor(files)
    changed = edited(files, PET, lambda found: found.update({name: found[name].half()}))
    with pytest.raises(StateError, match=rf"there/{PET}: {name} is torch.float16 .* it is torch.float32"):
        restore(make(head="ncm"), changed, "there")


def test_tensors_in_the_wrong_file_are_named(files: Files) -> None:
    with pytest.raises(StateError, match=f"there/{PET}: tensors do not fit .*missing model.*unexpected model.head"):
        restore(make(head="ncm"), {**files, PET: files[HEAD], HEAD: files[PET]}, "there")


@pytest.mark.parametrize("change", [{"head": "linear"}, {"head": "ncm", "pet": "none"}])
def test_a_method_of_another_make_is_refused(files: Files, change: dict[str, Any]) -> None:
    with pytest.raises(StateError, match="do not fit the recipe"):
        restore(make(**change), files, "there")


def test_another_rank_is_refused(files: Files) -> None:
    with pytest.raises(StateError, match=r"is .*, but in the recipe's model it is .*do not belong together"):
        restore(make(head="ncm", pet={"name": "lora", "rank": 2}), files, "there")


def test_nothing_is_loaded_when_something_does_not_fit(files: Files) -> None:
    """Also when it is the last tensor of the last file that does not."""
    method = make(head="ncm")
    before = load(snapshot(method)[PET])
    with pytest.raises(StateError):
        restore(method, {**files, FILES[-1]: save({"stranger": torch.zeros(1)})}, "there")
    after = load(snapshot(method)[PET])
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", [*FILES, EXTRA])
def test_a_missing_file_is_named(files: Files, name: str) -> None:
    with pytest.raises(StateError, match=f"there: {name} is missing"):
        restore(make(head="ncm"), {k: v for k, v in files.items() if k != name}, "there")


@pytest.mark.parametrize("name", FILES)
def test_a_torn_safetensors_file_is_named(files: Files, name: str) -> None:
    whole = files[name]
    for length in {0, 4, 8, len(whole) // 2, len(whole) - 1}:
        with pytest.raises(StateError, match=f"there/{name} is not a whole safetensors file"):
            restore(make(head="ncm"), {**files, name: whole[:length]}, "there")


@pytest.mark.parametrize(
    ("content", "says"), [(b"{", "is not JSON"), (b"\xff\xfe", "is not JSON"), (b"[]", "got list")]
)
def test_torn_extra_state_is_named(files: Files, content: bytes, says: str) -> None:
    with pytest.raises(StateError, match=f"there/{EXTRA}.*{says}"):
        restore(make(head="ncm"), {**files, EXTRA: content}, "there")


def test_a_missing_entry_of_the_extra_state_is_named(files: Files) -> None:
    extra = json.loads(files[EXTRA])
    del extra["model.head"]
    with pytest.raises(StateError, match=f"there/{EXTRA}: entries do not fit the recipe: missing model.head"):
        restore(make(head="ncm"), {**files, EXTRA: to_json(extra)}, "there")


class Shares(Method):
    """Holds one tensor under two names, a buffer that is not stored, and own memory."""

    def __init__(self, model: Model):
        super().__init__(model)
        self.first = nn.Parameter(torch.arange(3.0))
        self.second = self.first
        self.register_buffer("memory", torch.zeros(2, dtype=torch.bfloat16))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def learn(self, task: Task) -> None:
        raise NotImplementedError

    def predict(self, inputs: Tensor) -> Tensor:
        raise NotImplementedError


def test_a_shared_tensor_is_stored_once_and_what_is_not_persistent_is_not() -> None:
    model = make().model
    method = Shares(model)
    files = snapshot(method)
    assert set(load(files["method.safetensors"])) == {"first", "memory"}
    other = Shares(model)
    with torch.no_grad():
        other.first.zero_()
        other.memory.add_(3)
    restore(other, files, "there")
    assert torch.equal(other.first, method.first)
    assert other.second is other.first
    assert torch.equal(other.memory, method.memory)


Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
}


def problem(make_optimizer: Make) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    rng = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(4, 3, generator=rng)), nn.Parameter(torch.randn(4, generator=rng))]
    unused = nn.Parameter(torch.randn(2, generator=rng))  # never gets a gradient
    groups: list[dict[str, Any]] = [
        {"params": [weights[0], unused], "peak": 0.01},
        {"params": [weights[1]], "lr": 0.02},
    ]
    return weights, make_optimizer(groups)


def step(weights: list[nn.Parameter], optimizer: torch.optim.Optimizer, number: int) -> None:
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(number))
    (x @ weights[0].T + weights[1]).pow(2).mean().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_bit_for_bit(name: str) -> None:
    weights, optimizer = problem(OPTIMIZERS[name])
    for number in range(3):
        step(weights, optimizer, number)
    files, middle = snapshot_optimizer(optimizer), [w.detach().clone() for w in weights]
    again, other = problem(OPTIMIZERS[name])
    with torch.no_grad():
        for weight, value in zip(again, middle, strict=True):
            weight.copy_(value)
    restore_optimizer(other, files, "there")
    assert snapshot_optimizer(other) == files
    for number in range(3, 6):
        step(weights, optimizer, number)
        step(again, other, number)
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))
    assert other.param_groups[0]["peak"] == 0.01


def test_the_state_of_another_optimizer_is_refused() -> None:
    _, optimizer = problem(OPTIMIZERS["adamw"])
    other = torch.optim.AdamW([nn.Parameter(torch.zeros(2))])
    with pytest.raises(StateError, match="there: the optimizer's state does not fit the recipe"):
        restore_optimizer(other, snapshot_optimizer(optimizer), "there")


def test_a_torn_optimizer_is_named() -> None:
    weights, optimizer = problem(OPTIMIZERS["adamw"])
    step(weights, optimizer, 0)
    files = snapshot_optimizer(optimizer)
    with pytest.raises(StateError, match=r"there/optimizer\.safetensors is not a whole safetensors file"):
        restore_optimizer(optimizer, {**files, "optimizer.safetensors": files["optimizer.safetensors"][:-1]}, "there")
    with pytest.raises(StateError, match=r"there: optimizer\.json is missing"):
        restore_optimizer(optimizer, {"optimizer.safetensors": files["optimizer.safetensors"]}, "there")

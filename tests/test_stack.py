"""The LoRAs of earlier tasks: all act, what acts does not grow with them, and a state stores each of them once."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from test_digests import old_state
from test_olora import RANK, fused, half_learned, made, matrices, on, taught
from tiny import recipe, split_folder, vit_folder
from torch import Tensor

from perpetune.check import probe, tiny_backbone, tiny_stream
from perpetune.errors import UsageError
from perpetune.forecast.trial import held_by
from perpetune.learner import Learner
from perpetune.learning import learn_protected
from perpetune.methods.olora import NEW, OLoRA
from perpetune.methods.parts import stack as module
from perpetune.methods.parts.stack import Stack, block_of, roomy
from perpetune.models.backbone import Backbone
from perpetune.pets import Choice, LoRA, parameters, pets, slots, using
from perpetune.runtime import Runtime
from perpetune.seeding import generator
from perpetune.snapshot import restore, snapshot
from perpetune.state import State
from perpetune.tasks import Task

WIDE = 6  # a rank of which few tasks make a block
CLASSES = (("a", "b"), ("c", "d"), ("e", "f"))


def tasks(count: int) -> list[Task]:
    return tiny_stream(Runtime(), [CLASSES[number % 3] for number in range(count)])


# -- what acts ----------------------------------------------------------------------------------------


def stacked(backbone: Backbone, rank: int, count: int) -> tuple[Stack, list[LoRA], list[list[tuple[Tensor, Tensor]]]]:
    """A stack of random pairs, the LoRAs in which they act, and the pairs of each task; in float64."""
    method = on(backbone, rank=rank).double()
    loras = [pet for pet in pets(method, "default") if isinstance(pet, LoRA)]
    rng, given = generator("pairs", rank), []
    shapes = [(b.shape, a.shape) for pet in loras for b, a in pet.factors()]
    for pet in loras:
        pet.resize(0)
    for _ in range(count):
        given.append([tuple(torch.randn(s, generator=rng).double() / 4 for s in pair) for pair in shapes])
        method.stack.append(given[-1])
        method.stack.act(loras, added=True)
    return method.stack, loras, given


def written_out(lora: LoRA, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """`s Σ B A` of one layer, from the pairs of its parts, task after task."""
    whole = pairs[0][0].new_zeros(lora.d_out, lora.down.shape[1])
    for number, (b, a) in enumerate(pairs):
        start, stop = lora.parts[number % len(lora.parts)]
        whole[start:stop] += lora.scale * b @ a
    return whole


@pytest.mark.parametrize("make", [tiny_backbone, fused], ids=["separate", "fused"])
@pytest.mark.parametrize(("rank", "count"), [(2, 1), (2, 9), (6, 1), (6, 5), (14, 3)])
@torch.no_grad()
def test_all_loras_act_as_their_sum_written_out(make: Any, rank: int, count: int) -> None:
    backbone = make()
    _, loras, given = stacked(backbone, rank, count)
    first = 0
    for lora, (_, slot) in zip(loras, slots(backbone.net), strict=True):
        mine = range(first, first + len(lora.parts))
        first = mine.stop
        update = written_out(lora, [pairs[m] for pairs in given for m in mine])
        x = torch.randn(3, 5, lora.down.shape[1], generator=generator("x")).double()
        plain = slot.base(x)
        torch.testing.assert_close(lora(slot.base, x), plain + x @ update.T, rtol=1e-10, atol=1e-10)
        up, down = lora.whole()
        torch.testing.assert_close(lora.scale * up @ down, update, rtol=1e-10, atol=1e-10)
        assert len(down) <= max(len(mine) * rank * count, min(update.shape)) + len(mine) * rank
        folded = lora.fold(slot.base)
        assert folded is not None
        torch.testing.assert_close(folded(x), plain + x @ update.T, rtol=1e-10, atol=1e-10)
        without = written_out(lora, [pairs[m] for pairs in given[1:] for m in mine]) if count > 1 else 0 * update
        assert not torch.allclose(lora(slot.base, x), plain + x @ without.T, rtol=1e-3), "control: each of them acts"
    assert first == 6


@pytest.mark.parametrize("make", [tiny_backbone, fused], ids=["separate", "fused"])
def test_what_acts_does_not_grow_and_follows_from_the_pairs_alone(make: Any) -> None:
    rank, most = 2, 30
    for count in (1, 7, 8, 9, 16, most):
        stack, loras, _ = stacked(make(), rank, count)
        one_by_one = [pet.leaned_on() for pet in loras]
        stack.act(loras)
        for pet, (rest, dense) in zip(loras, one_by_one, strict=True):
            rest2, dense2 = pet.leaned_on()
            for before, after in zip([*(rest or ()), dense], [*(rest2 or ()), dense2], strict=True):
                assert (before is None) == (after is None)
                assert before is None or torch.equal(before, after), "to the bit, however they came"
            size = sum(t.numel() for t in pet.buffers())
            assert size <= 2 * pet.d_out * pet.down.shape[1]
            assert (dense is not None) == (count >= block_of(pet, rank))
    assert stack.count == most


def test_room_is_made_seldom_and_follows_from_the_number_alone() -> None:
    rooms = [roomy(count) for count in range(1, 2001)]
    assert all(count <= room < count + max(4, count / 4 + 1) for count, room in enumerate(rooms, 1))
    assert rooms == sorted(rooms)
    assert len(set(rooms)) < 45
    assert roomy(0) == 0
    method = taught(on(tiny_backbone()), tasks(6))
    lie = [t.stride() for t in method.stack.buffers()]
    other = on(tiny_backbone())
    restore(other, snapshot(method), "memory")
    assert [t.stride() for t in other.stack.buffers()] == lie
    places = [t.data_ptr() for t in method.stack.buffers()]
    taught(method, tasks(7)[6:])
    assert [t.data_ptr() for t in method.stack.buffers()] == places, "nothing was copied"


def test_it_learns_what_it_learns_with_one_joined_lora(monkeypatch: pytest.MonkeyPatch) -> None:
    """With few tasks to the bit; and to rounding where they act as a matrix."""
    for rank, count in ((RANK, 3), (WIDE, 5)):
        pet = {"name": "lora", "rank": rank}
        method = taught(made(pet=pet), tasks(count))
        acting = [pet.leaned_on()[1] for pet in pets(method, "default")]
        with monkeypatch.context() as joined:
            joined.setattr(module, "block_of", lambda *_: 10**9)
            other = taught(made(pet=pet), tasks(count))
        assert all((dense is not None) == (rank == WIDE) for dense in acting)
        assert all(pet.leaned_on()[1] is None for pet in pets(other, "default"))
        found = [*sum(matrices(method, "default"), ()), probe(method)]
        wanted = [*sum(matrices(other, "default"), ()), probe(other)]
        assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True)) == (rank == RANK)
        for one, two in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_they_move_with_the_method() -> None:
    method = taught(on(tiny_backbone(), rank=WIDE), tasks(4))
    before = probe(method)
    copied = copy.deepcopy(method).double()
    assert {t.dtype for t in copied.stack.buffers()} == {torch.float64}
    assert {t.dtype for pet in pets(copied, "default") for t in pet.buffers()} == {torch.float64}
    assert all(t.dtype == torch.float64 for of in copied.resting().values() for t in of.tensors().values())
    torch.testing.assert_close(probe(copied).float(), before, rtol=1e-4, atol=1e-5)
    taught(copied.float(), tasks(5)[4:])
    assert (copied.stack.count, method.stack.count) == (5, 4)
    assert torch.equal(probe(method), before)


@pytest.mark.slow
def test_a_compiled_net_answers_as_before() -> None:
    method = taught(on(tiny_backbone(), rank=WIDE), tasks(3))
    before = probe(method)
    torch._dynamo.reset()
    for _, slot in slots(method):
        slot.pets["default"].forward = torch.compile(slot.pets["default"].forward, backend="eager")  # type: ignore[method-assign]
    torch.testing.assert_close(probe(method), before)


def test_it_is_no_member_of_a_choice() -> None:
    method = taught(on(tiny_backbone()), tasks(2))
    choice = Choice(("default", "default"), torch.tensor([[0], [1]]))
    pixels = torch.zeros(2, 3, 16, 16)
    with pytest.raises(UsageError, match="is no member of a choice: put its set in force"), using(method, choice):
        method.model.backbone(pixels)


def test_its_memory_counts_once() -> None:
    method = taught(on(tiny_backbone()), tasks(3))
    every = {t.untyped_storage().data_ptr(): t.nbytes for t in [*method.parameters(), *method.buffers()] if t.numel()}
    assert held_by(method) == sum(every.values())
    assert method.stack.bytes() == sum(t.nbytes for of in method.resting().values() for t in of.tensors().values())


# -- what is stored -----------------------------------------------------------------------------------


def test_a_snapshot_does_not_grow_and_each_lora_has_its_own_file() -> None:
    method, sizes = made(pet={"name": "lora", "rank": WIDE}), []
    for task in tasks(4):
        learn_protected(method, task)
        held = [name for name in method.resting() if name != f"task-{task.index}"]
        files = snapshot(method, without=held)
        assert [n for n in files if n.startswith("rest-")] == [f"rest-task-{task.index}.safetensors"]
        assert not any(t.numel() for t in load(files["pet.safetensors"]).values())
        sizes.append({name.partition("-")[0]: len(content) for name, content in files.items()})
    assert sizes[1]["pet.safetensors"] == sizes[3]["pet.safetensors"]
    assert sizes[0]["rest"] == sizes[3]["rest"]
    assert abs(sizes[3]["extra.json"] - sizes[1]["extra.json"]) < 20
    names = load(snapshot(method)["rest-task-1.safetensors"])
    assert {name.split(".")[1] for name in names} == {"task-1"}
    assert {tuple(t.shape) for name, t in names.items() if ".down." in name} == {(WIDE, 32)}


def as_before(files: dict[str, bytes], count: int, names: Sequence[str]) -> dict[str, bytes]:
    """A snapshot as versions wrote it that joined the LoRAs of all tasks into the set `default`."""
    old = {name: content for name, content in files.items() if not name.startswith("rest-")}
    loras = [load(files[f"rest-task-{number}.safetensors"]) for number in range(count)]
    stored = load(files["pet.safetensors"])
    for name in [name for name in stored if ".pets.default." in name and count]:
        path, _, kind = name.partition(".pets.default.")
        path, kind = path.removeprefix("model."), kind.partition(".")[0]
        mine = [sorted((n, t) for n, t in lora.items() if f".{path}.{kind}." in n) for lora in loras]
        parts = list(zip(*([t for _, t in one] for one in mine), strict=True))
        if kind == "up":
            stored[name] = torch.cat(parts[int(name.rpartition(".")[2])], dim=1)
        else:
            stored[name] = torch.cat([torch.cat(part) for part in parts])
    extra = json.loads(files["extra.json"])
    extra[""] = {"tasks": list(names), "told": extra[""]["told"]}
    return {**old, "pet.safetensors": save(stored), "extra.json": json.dumps(extra).encode()}


@pytest.mark.parametrize("rank", [RANK, WIDE])
def test_a_snapshot_of_an_earlier_version_is_taken_apart(rank: int) -> None:
    pet = {"name": "lora", "rank": rank}
    method, names = taught(made(pet=pet), tasks(4)), [f"t{number}" for number in range(4)]
    now, then = snapshot(method), as_before(snapshot(method), 4, names)
    joined = {tuple(t.shape) for t in load(then["pet.safetensors"]).values()}
    assert joined == {(4 * rank, 32), (32, 4 * rank)}
    other = made(pet=pet)
    restore(other, then, "memory")
    assert snapshot(other) == now
    assert torch.equal(probe(other), probe(method))
    assert snapshot(taught(other, tasks(6)[4:])) == snapshot(taught(method, tasks(6)[4:]))
    restore(other, then, "memory")  # from later tasks back
    assert snapshot(other) == now
    start = snapshot(made(pet=pet))
    restore(other, as_before(start, 0, []), "memory")
    assert snapshot(other) == start


def test_a_checkpoint_inside_a_task_of_an_earlier_version_is_taken_apart() -> None:
    """It held the joined LoRA of all tasks beside the new one, whose optimizer goes on."""
    method = half_learned(on(fused(), rank=WIDE), tasks(3))
    inside, whole = snapshot(method, memory=False), snapshot(method)
    assert not any(name.startswith("rest-") for name in inside)
    resting = {name: content for name, content in whole.items() if name.startswith("rest-")}
    then = as_before({**inside, **resting}, 2, ["t0", "t1"])
    values = [p.clone() for p in parameters(method, NEW)]
    trained, before = parameters(method, NEW), matrices(method, "default")
    with torch.no_grad():
        for p in trained:
            p.zero_()
    restore(method, then, "memory", memory=False)
    assert [id(p) for p in parameters(method, NEW)] == [id(p) for p in trained]
    assert all(torch.equal(p, value) for p, value in zip(parameters(method, NEW), values, strict=True))
    for one, two in zip(matrices(method, "default"), before, strict=True):
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])
    assert snapshot(method) == whole


# -- in a state ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vit_folder(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def months(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("months")
    return [split_folder(root / f"m{number}", "ab", 3 + number, 2) for number in range(6)]


def content(vit: Path, **changes: Any) -> dict[str, Any]:
    pet = {"name": "lora", "rank": 2, "at": ["q", "v"]}  # four tasks make a block
    given = {"method": "olora", "pet": pet, "setting": "domain", "train": {"epochs": 1, "batch_size": 4, "lr": 0.01}}
    return recipe(vit, None, **{**given, **changes})


def test_a_state_holds_each_lora_in_its_own_task_and_goes_back_and_on(
    vit: Path, months: list[Path], tmp_path: Path
) -> None:
    learner = Learner(content(vit), tmp_path / "state")
    after = []
    for month in months:
        learner.learn(month)
        after.append(snapshot(learner.method))
    assert holders(learner) == [[number] for number in range(6)]
    assert [pet.leaned_on()[1] is not None for pet in pets(learner.method, "default")] == [True, True]

    loaded = Learner.load(tmp_path / "state")
    assert snapshot(loaded.method) == after[5]
    assert torch.equal(asked(loaded), asked(learner))
    with loaded.state.writing():
        loaded.state.rollback("m3")
    again = Learner.load(tmp_path / "state")
    assert snapshot(again.method) == after[3]
    for month in months[4:]:
        again.learn(month)
    assert snapshot(again.method) == after[5]
    pruned = again.prune(1)
    assert pruned.bytes > 0
    assert len(pruned.dropped) == 5
    assert snapshot(Learner.load(tmp_path / "state").method) == after[5], "earlier packs hold what later tasks need"


def holders(learner: Learner) -> list[list[int]]:
    """For the LoRA of each task the numbers of the tasks in whose packs all of its bytes are."""
    folders = [task.folder for task in learner.state.committed]
    packs = [b"".join(file.read_bytes() for file in folder.glob("pack*.safetensors")) for folder in folders]
    return [
        [
            at
            for at, pack in enumerate(packs)
            if all(t.contiguous().numpy().tobytes() in pack for t in of.tensors().values())
        ]
        for of in learner.method.resting().values()
    ]


@torch.no_grad()
def asked(learner: Learner) -> Tensor:
    return learner.method.predict(torch.arange(4 * 3 * 16 * 16).view(4, 3, 16, 16).to(torch.uint8))


def test_a_state_of_an_earlier_version_goes_on(vit: Path, months: list[Path], tmp_path: Path) -> None:
    old, _ = old_state("olora", tmp_path / "old", vit_folder(tmp_path / "vit", blocks=2))
    joined = load(State(old).committed[-1].read("pet.safetensors")["pet.safetensors"])
    with pytest.warns(UserWarning, match="holds no hash"):
        learner = Learner.load(old)
    assert isinstance(learner.method, OLoRA)
    count, stored = len(learner.state.committed), len(joined)
    assert learner.method.stack.count == count
    every = [matrix for pair in matrices(learner.method, "default") for matrix in pair]
    assert len(every) == stored
    assert all(any(torch.equal(matrix, other) for other in joined.values()) for matrix in every)
    folders = [task.folder for task in learner.state.committed]
    learner.learn(split_folder(tmp_path / "more", "gh", 4, 2))
    learner.learn(split_folder(tmp_path / "yet more", "ij", 4, 2))
    assert holders(learner) == [*[[count]] * (count + 1), [count + 1]], "the next task writes the LoRAs anew, once"
    loaded = Learner.load(old)
    assert snapshot(loaded.method) == snapshot(learner.method)
    with loaded.state.writing():
        loaded.state.rollback(loaded.state.committed[count - 1].name)
    assert [task.folder for task in State(old).committed] == folders
    back = matrices(Learner.load(old).method, "default")
    assert all(torch.equal(m, n) for m, n in zip(sum(back, ()), every, strict=True))

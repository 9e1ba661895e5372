"""A state stores each thing once, and gives what a state gives that stores whole copies.

`Method` and `snapshot` are left out here: what is learned is a dictionary of tensors, and a `World` keeps a whole copy
of each task beside the state.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Collection, Container, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from tiny import chiefly
from torch import Tensor

import perpetune.files
import perpetune.state.folder
from perpetune import store
from perpetune.documents import Tensors
from perpetune.errors import StateError, UsageError
from perpetune.files import MANIFEST, listed
from perpetune.learner import Learner
from perpetune.recipe import Recipe, make_recipe, parse_recipe
from perpetune.state import START, State, committed, prune
from perpetune.state.journal import Journal
from perpetune.store import AT_REST, LARGE, LEAST, cut, parts

Learned = dict[str, dict[str, Tensor]]
BACKBONE = {"spec": "x", "fingerprint": "f"}
DOCUMENTS = ("task.json", "metrics.json", "features.safetensors")


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method is its snapshot, and what is written counts as written."""
    monkeypatch.setattr(perpetune.state.folder, "snapshot", Given.snapshot)
    monkeypatch.setattr(perpetune.state.folder, "parse_recipe", lambda text, where: parsed(text))
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@functools.cache
def recipe(keep: str | int) -> Recipe:
    return make_recipe({"run": {"keep": keep}})


@functools.cache
def parsed(text: str) -> Recipe:
    return parse_recipe(text, "recipe.yaml")


def files_of(learned: Learned) -> dict[str, bytes]:
    files = {name: save(tensors) for name, tensors in learned.items()}
    return {**files, "extra.json": json.dumps({name: sorted(t) for name, t in learned.items()}).encode()}


class Given(dict[str, bytes]):
    """What is learned: files, and sets at rest, whose content is the tensor that stands for them."""

    sets: Mapping[str, torch.Tensor] = MappingProxyType({})

    def resting(self) -> Mapping[str, torch.Tensor]:
        return self.sets

    def snapshot(self, *, without: Collection[str] = ()) -> dict[str, bytes]:
        return {**self, **rest_files({name: t for name, t in self.sets.items() if name not in without})}


def rest_files(sets: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
    return {store.rest_file(name): save({"a": content, "b": content[:2].clone()}) for name, content in sets.items()}


class World:
    """A state, and a whole copy of what each of its tasks had."""

    def __init__(self, folder: Path, keep: str | int = "all"):
        self.state = State.create(folder, recipe(keep), BACKBONE)
        self.copies: list[tuple[str, dict[str, bytes], bool]] = []  # name, files, whether it can be gone back to

    def commit(self, name: str, learned: Learned, sets: Mapping[str, torch.Tensor] = MappingProxyType({})) -> None:
        index, given = len(self.copies), Given(files_of(learned))
        given.sets = sets
        commit(self.state, index, name, given)
        files = {**given, **rest_files(sets)}
        oldest = next(i for i, task in enumerate(self.state.committed) if not task.pruned)
        self.copies.append((name, files, True))
        self._drop_before(oldest)

    def rollback(self, to: str) -> None:
        names = [name for name, _, _ in self.copies]
        with self.state.writing():
            self.state.rollback(to)
        del self.copies[0 if to == START else names.index(to) + 1 :]

    def prune(self, keep: int) -> None:
        with self.state.writing():
            self.state.prune(keep)
        self._drop_before(len(self.copies) - keep)

    def _drop_before(self, oldest: int) -> None:
        self.copies = [(n, f, kept and i >= oldest) for i, (n, f, kept) in enumerate(self.copies)]

    def check(self) -> None:
        """Every task that is kept reads as its copy, and every other is refused; documents are there of all."""
        state = State(self.state.folder)
        assert [task.name for task in state.committed] == [name for name, _, _ in self.copies]
        for task, (name, files, kept) in zip(state.committed, self.copies, strict=True):
            assert bool(task.pruned) != kept
            assert task.json("task.json") == {"index": task.index, "name": name}
            assert task.read("features.safetensors").keys() == {"features.safetensors"}
            sizes = {n: len(content) for n, content in files.items() if n != "extra.json"}
            resting = sum(sizes.pop(n) for n in list(sizes) if store.RESTING.fullmatch(n))
            if resting:
                sizes["earlier.safetensors"] = sizes.get("earlier.safetensors", 0) + resting
            assert {n: size for n, size in task.sizes().items() if n in sizes} == sizes
            if kept:
                found = task.read()
                assert {n: found[n] for n in files} == files
                assert {n for n in found if store.RESTING.fullmatch(n)} <= files.keys()
            else:
                with pytest.raises(StateError, match="was pruned"):
                    task.read()
                with pytest.raises(UsageError, match=f"cannot go back to {name}, which was pruned"):
                    state.rollback(name)
        self.check_disk()

    def check_disk(self) -> None:
        """No file is there that no manifest names; what is shared is on the disk once."""
        state = State(self.state.folder)
        for task in state.committed:
            assert {path.name for path in task.folder.iterdir()} == {*listed(task.folder), MANIFEST}
        on_disk = sum(p.stat().st_size for p in (state.folder / "tasks").rglob("*") if p.is_file())
        assert sum(entry["own"] for entry in state.storage()) == on_disk


def commit(state: State, index: int, name: str, files: dict[str, bytes]) -> None:
    files = files if isinstance(files, Given) else Given(files)
    documents = {"task.json": {"index": index, "name": name}, "metrics.json": {"cells": {}}}
    state.log("task begun", task=index, name=name)
    state.commit(index, name, files, documents, {"features.safetensors": save({"f": torch.ones(3) * index})})  # type: ignore[arg-type]


def pack_as_before(
    files: Mapping[str, bytes], task: int, earlier: store.Index, holder: Any, rest: Mapping[str, store.Rest]
) -> tuple[bytes, bytes | None, dict[str, store.Rest]]:
    """`store.pack` as version 0.1 had it: each index lists all sets at rest, and a set has a piece for each tensor."""
    pieces = {
        name: [(hashlib.sha256(view).hexdigest(), view) for view in cut(content)] for name, content in files.items()
    }
    sets = {name: m[1] for name in files if (m := store.RESTING.fullmatch(name))}
    index = store.Index(
        {
            n: store.Held(len(files[n]), tuple(store.Piece(d, len(v), task) for d, v in found))
            for n, found in pieces.items()
        }
    )
    every = {**rest, **{of: store.Rest(task, len(files[name]), "") for name, of in sets.items()}}
    document = json.loads(store.index_bytes(index)) | {"rest": {name: [r.task, r.size] for name, r in every.items()}}
    return json.dumps(document).encode(), store.pack_bytes({d: v for found in pieces.values() for d, v in found}), every


def changed(rng: random.Random, learned: Learned) -> Learned:
    """What the next task may have: tensors that stay, change, grow by rows, go, come, or come back as they were."""
    made = {file: dict(tensors) for file, tensors in learned.items()}
    for tensors in made.values():
        for name in list(tensors):
            way = rng.choice(("stays", "stays", "changes", "grows", "goes", "back"))
            if way == "changes":
                tensors[name] = torch.full_like(tensors[name], rng.random())
            elif way == "grows":
                tensors[name] = torch.cat([tensors[name], torch.full((1, *tensors[name].shape[1:]), rng.random())])
            elif way == "goes":
                del tensors[name]
            elif way == "back":
                tensors[name] = torch.zeros_like(tensors[name])
        tensors[f"new.{rng.randrange(99)}"] = torch.full((rng.choice((1, 4, 30)), 16), rng.random())
    return made


def rested(rng: random.Random, sets: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the next task may have at rest: sets that stay, go or are others now, and new ones."""
    ways = {name: rng.choice(("stays", "stays", "stays", "stays", "changes", "goes")) for name in sets}
    made = {n: torch.randn(300) if ways[n] == "changes" else t for n, t in sets.items() if ways[n] != "goes"}
    return {**made, **{f"set-{rng.randrange(999)}": torch.randn(rng.choice((3, 300))) for _ in range(rng.randrange(3))}}


FIRST: Learned = {file: {"w": torch.ones(40, 16)} for file in ("pet.safetensors", "earlier.safetensors")}


# -- the same as whole copies -----------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32), keep=st.sampled_from(["all", "auto", 1, 2, 3]))
def test_any_sequence_is_as_with_whole_copies(
    tmp_path_factory: pytest.TempPathFactory, seed: int, keep: str | int
) -> None:
    rng, world = random.Random(seed), World(tmp_path_factory.mktemp("any") / "state", keep)
    learned, number, sets = FIRST, 0, dict[str, torch.Tensor]()
    older = rng.choice((0, 0, 3, 6))  # so many steps are those of an older version
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prune, "FLOOR", rng.choice((0, 5_000, 20_000)))
        for step in range(rng.randrange(3, 12)):
            patch.setattr(perpetune.state.folder, "pack", pack_as_before if step < older else store.pack)
            kept = [name for name, _, kept in world.copies if kept]
            way = rng.random()
            if way < 0.7 or not kept:
                learned, number, sets = changed(rng, learned), number + 1, rested(rng, sets)
                world.commit(f"t{number}", learned, sets)
            elif way < 0.85:
                world.rollback(rng.choice([*kept, *kept, START]))
            else:
                world.prune(rng.randrange(1, 5))
            world.check()


def test_a_file_is_cut_into_its_header_its_tensors_and_parts_of_large_ones() -> None:
    tensors = {
        "large": torch.randn(LARGE // 4 + 100),
        "tensor": torch.randn(200),
        "small": torch.randn(3),
        "smaller": torch.randn(2),
        "none": torch.zeros(0),
        "whole numbers": torch.arange(100),
    }
    content = save(tensors)
    pieces = cut(content)
    assert b"".join(pieces) == content
    header = 8 + int.from_bytes(content[:8], "little")
    # safetensors puts the widest type first, then the names in order; the two small ones are together
    assert [len(p) for p in pieces] == [header, 800, LARGE, 400, 20, 800]
    assert [len(p) for p in cut(save({}))] == [len(save({}))]


@settings(max_examples=30, deadline=None)
@given(size=st.integers(0, 3 * LARGE), more=st.integers(1, 40_000))
def test_what_grows_at_its_end_keeps_its_large_parts(size: int, more: int) -> None:
    """The parts together are the whole. There are few, and none but those behind the first that grew are others."""
    before, after = ([len(p) for p in parts(memoryview(bytes(n)))] for n in (size, size + more))
    for lengths, n in ((before, size), (after, size + more)):
        assert sum(lengths) == n
        assert all(length in {LEAST * 2**k for k in range(9)} for length in lengths[:-1])
        assert lengths == sorted(lengths, reverse=True)
        assert len(lengths) <= n // LARGE + 9
    same = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(before))
    assert all(a < b for a, b in zip(before[same : same + 1], after[same : same + 1], strict=False))


def test_a_table_that_grows_by_rows_takes_its_rows_times_a_logarithm(tmp_path: Path) -> None:
    """300 tasks add 400 bytes each. Control: in parts of one size each task would store all rows anew."""
    stored: dict[bool, int] = {}
    for grows in (True, False):
        index, held = store.Index(), dict[int, set[str]]()
        for task in range(300):
            content = save({"rows": torch.arange(100 * (task + 1.0))})
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(store, "_still_held", lambda pieces, contents, holder: {p.sha256: p for p in pieces})
                if not grows:
                    patch.setattr(store, "parts", lambda view: [view])
                made, _, _ = store.pack({"head.safetensors": content}, task, index, lambda task: None)  # type: ignore[arg-type,return-value]
            index = store.parse_index(made, task, "x", "y")
            pieces = index["head.safetensors"].pieces or ()
            held[task] = {p.sha256 for p in pieces if p.task == task}
            stored[grows] = stored.get(grows, 0) + sum(p.size for p in pieces if p.task == task)
    assert stored[True] < 300 * (400 * 7 + LEAST) < stored[False] / 8


# -- what it takes ----------------------------------------------------------------------------------------------


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_bank_takes_its_newest_and_what_changed(tmp_path: Path) -> None:
    """50 tasks of adapters that stay: as much as the last task alone, and 50 heads and lists of pieces."""
    world, adapter, head = World(tmp_path / "state"), 8 * 1024, 2 * 1024
    learned: Learned = {"pet.safetensors": {}, "head.safetensors": {}}
    for t in range(50):
        learned["pet.safetensors"] = learned["pet.safetensors"] | {f"a{t}": torch.randn(adapter // 4)}
        learned["head.safetensors"] = {"weight": torch.randn(head // 4)}
        world.commit(f"t{t}", learned)
    newest = sum(len(content) for content in world.copies[-1][1].values())
    whole = sum(len(content) for _, files, _ in world.copies for content in files.values())
    taken = bytes_of(tmp_path / "state")
    assert taken < newest + 50 * (head + 8 * 1024)
    assert taken < 0.1 * whole
    world.check()


def test_months_with_sums_take_less_than_three_times_the_first_and_the_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sums are small here, 40 × 40 for 2,000 × 2,000, and so is what earlier tasks may always take."""
    monkeypatch.setattr(prune, "FLOOR", 16 * 10**6 * 40**2 // 2000**2)
    world, adapter, after_one = World(tmp_path / "state", "auto"), 600, 0
    learned: Learned = {"earlier.safetensors": {}}
    documents = 0
    for t in range(60):
        learned["earlier.safetensors"] = learned["earlier.safetensors"] | {f"a{t}": torch.randn(adapter // 4)}
        learned["statistics.safetensors"] = {"gram": torch.randn(40, 40, dtype=torch.float64)}
        world.commit(f"m{t:03d}", learned)
        after_one = after_one or bytes_of(tmp_path / "state")
    for task in world.state.committed:
        documents += sum(size for name, (size, _) in listed(task.folder).items() if name in (*DOCUMENTS, "recipe.json"))
        documents += (task.folder / MANIFEST).stat().st_size
    indices = sum(p.stat().st_size for p in (tmp_path / "state").rglob("tensors*.json"))
    journal = (tmp_path / "state" / "journal.jsonl").stat().st_size
    taken = bytes_of(tmp_path / "state") - documents - indices - journal
    header = len(world.copies[-1][1]["earlier.safetensors"]) - 60 * adapter
    assert taken < 3 * after_one + 60 * (adapter + 150) + 3 * header
    assert sum(not task.pruned for task in world.state.committed) >= 2


def sets_of(count: int) -> dict[str, torch.Tensor]:
    return {f"set-{i}": torch.full((40,), float(i)) for i in range(count)}


def test_the_list_of_sets_at_rest_takes_little_and_its_tasks_are_not_asked_for_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A set for each of 60 tasks: an index is no longer for it, and to read the last task parses one index. Control:
    what an older version wrote parses that of each task."""
    parsed_of: list[str] = []
    parse = store.parse_index
    monkeypatch.setattr(committed, "parse_index", lambda *given: parsed_of.append(given[2]) or parse(*given))
    indices: dict[str, list[int]] = {}
    for version, patched in (("new", store.pack), ("old", pack_as_before)):
        monkeypatch.setattr(perpetune.state.folder, "pack", patched)
        world, every = World(tmp_path / version), sets_of(60)
        for t in range(60):
            world.commit(f"t{t}", {"pet.safetensors": {"w": SHARED}}, dict(list(every.items())[: t + 1]))
        indices[version] = [(task.folder / "tensors.json").stat().st_size for task in world.state.committed]
        parsed_of.clear()
        files = State(tmp_path / version).committed[-1].read()
        assert {n: files[n] for n in rest_files(every)} == rest_files(every)
        assert AT_REST not in files
        assert len(parsed_of) == (1 if version == "new" else 60)
    assert max(indices["new"]) < 1_500
    packs = sum(path.stat().st_size for path in (tmp_path / "new").rglob("pack*.safetensors"))
    assert packs < 60 * (len(rest_files(sets_of(1))["rest-set-0.safetensors"]) + 100 * 5 + LEAST) + 5_000


# -- keep -------------------------------------------------------------------------------------------------------


SHARED = torch.arange(500.0)


def filled(folder: Path, keep: str | int, tasks: int = 6, size: int = 4_000) -> World:
    """Tasks that share one tensor, which is in the pack of the first, and have one of their own."""
    world = World(folder, keep)
    for t in range(tasks):
        world.commit(f"t{t}", {"pet.safetensors": {"shared": SHARED, "own": torch.full((size // 4,), float(t))}})
    return world


def kept(world: World) -> list[str]:
    return [task.name for task in world.state.committed if not task.pruned]


def test_a_number_of_tasks_is_kept(tmp_path: Path) -> None:
    for keep in (1, 3, 9):
        world = filled(tmp_path / str(keep), keep)
        assert kept(world) == [f"t{i}" for i in range(6)][-keep:]
        world.check()


def test_auto_keeps_what_takes_no_more_than_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(kept(filled(tmp_path / "small", "auto"))) == 6  # far below 16 MB
    monkeypatch.setattr(prune, "FLOOR", 0)
    world = filled(tmp_path / "one", "auto")  # the newest needs 6 kB; each earlier one has more than 4 of its own
    assert kept(world) == ["t4", "t5"]
    monkeypatch.setattr(prune, "FLOOR", 15_000)
    world = filled(tmp_path / "three", "auto")
    assert kept(world) == ["t2", "t3", "t4", "t5"]
    world.check()
    assert prune.oldest_kept("auto", 0, 0, [10**12]) == 0  # the one before the newest, however large


def test_auto_drops_many_tasks_at_once_and_then_none_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    def drops(share: float) -> list[int]:
        """How many tasks each of 1,000 commits drops, where each earlier task takes 1 kB of its own."""
        monkeypatch.setattr(prune, "SHARE", share)
        oldest, found = 0, []
        for newest in range(1, 1001):
            now = prune.oldest_kept("auto", oldest, 500, [1_000] * newest)
            assert 1_000 * (newest - now) <= 100_000  # never more than may be
            assert now == oldest or newest - now == int(100 * share)
            found.append(now - oldest)
            oldest = now
        return found

    monkeypatch.setattr(prune, "FLOOR", 100_000)
    assert {n for n in drops(0.75) if n} == {26}
    assert sum(n > 0 for n in drops(0.75)) == 35  # of 900 that are dropped
    assert sum(n > 0 for n in drops(1.0)) == 900  # the control


def test_a_state_of_an_older_version_keeps_all_until_its_recipe_says_so(tmp_path: Path) -> None:
    world = filled(tmp_path / "state", 2, tasks=0)
    path = tmp_path / "state" / "recipe.yaml"
    path.write_text(path.read_text().replace("  keep: 2\n", ""))
    state = State(tmp_path / "state")
    assert state.keep == "all"
    for t in range(4):
        commit(state, t, f"t{t}", files_of({"pet.safetensors": {"w": torch.full((500,), float(t))}}))
    assert not any(task.pruned for task in state.committed)
    Learner.relocate(tmp_path / "state", data=(str(tmp_path), str(tmp_path)))  # it writes the recipe anew
    assert "  keep: all\n" in path.read_text()
    assert world.state.keep == 2


def test_a_refused_rollback_says_where_the_state_can_go_and_why(tmp_path: Path) -> None:
    world = filled(tmp_path / "state", 3)
    with pytest.raises(UsageError) as error:
        world.state.rollback("t1")
    said = str(error.value)
    assert re.fullmatch(
        r".*/state cannot go back to t1, which was pruned \(run\.keep: 3, \d{4}-\d\d-\d\d\); it can go back to t3, t4, "
        r"t5, or to start",
        said,
    )
    with world.state.writing():
        world.state.prune(1, by="perpetune prune --keep 1")
    with pytest.raises(
        UsageError, match=r"t4, which was pruned \(perpetune prune --keep 1, .*; it can go back to t5, or"
    ):
        world.state.rollback("t4")
    world.rollback(START)
    world.check()
    assert not list((tmp_path / "state" / "tasks").iterdir())


def test_a_dry_run_says_what_comes_free_and_changes_nothing(tmp_path: Path) -> None:
    world = filled(tmp_path / "state", "all")
    before = {path: path.read_bytes() for path in (tmp_path / "state").rglob("*") if path.is_file()}
    told = world.state.prune(2, dry_run=True)
    assert before == {path: path.read_bytes() for path in (tmp_path / "state").rglob("*") if path.is_file()}
    assert (told.dropped, told.kept) == (["t0", "t1", "t2", "t3"], ["t4", "t5"])
    size = bytes_of(tmp_path / "state" / "tasks")
    with world.state.writing():
        assert world.state.prune(2) == told
    assert abs(size - bytes_of(tmp_path / "state" / "tasks") - told.bytes) < 0.1 * told.bytes
    with world.state.writing():
        assert world.state.prune(2).dropped == world.state.prune(7).dropped == []


@pytest.mark.parametrize("keep", [0, -1, True, "2"])
def test_nothing_but_a_number_of_tasks_is_kept(tmp_path: Path, keep: Any) -> None:
    world = filled(tmp_path / "state", "all", tasks=2)
    with world.state.writing(), pytest.raises(UsageError, match="a whole number of tasks is expected, at least 1"):
        world.state.prune(keep)
    assert kept(world) == ["t0", "t1"]


def test_a_pack_is_written_anew_only_where_it_is_worth_it(tmp_path: Path) -> None:
    """A tenth of it comes free: it stays as it is. With more, it goes."""
    world = World(tmp_path / "state")
    large, small = torch.randn(10_000), torch.randn(1_000)
    pet = "pet.safetensors"
    world.commit("a", {pet: {"large": large, "small": small, "half": torch.randn(4_000)}})
    world.commit("b", {pet: {"large": large, "half": torch.randn(4_000)}})
    world.commit("c", {pet: {"large": large}})
    world.commit("d", {pet: {"none": small}})
    pack = tmp_path / "state" / "tasks" / "0000-a" / "pack.safetensors"
    world.prune(3)  # `small` and `half` of a: a third
    assert not pack.exists()
    assert 40_000 < pack.with_name("pack.1.safetensors").stat().st_size < 41_000
    world.check()
    world.prune(2)
    assert pack.with_name("pack.1.safetensors").is_file()
    world.prune(1)
    assert sorted(p.name for p in pack.parent.iterdir()) == sorted(
        [MANIFEST, *DOCUMENTS, "recipe.json", "tensors.1.json"]
    )
    world.check()


# -- damage -----------------------------------------------------------------------------------------------------


def packs(state: State) -> list[Path]:
    return sorted((state.folder / "tasks").rglob("pack*.safetensors"))


def flipped(path: Path, at: int | None = None) -> None:
    """Change one bit of a pack, by default of what all tasks share."""
    content = bytearray(path.read_bytes())
    content[content.index(SHARED.numpy().tobytes()) + 99 if at is None else at] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "torn": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "emptied": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "one byte": flipped,
    "its header": lambda path: flipped(path, 20),
    "swapped": lambda path: shutil.copy(packs(State(path.parent.parent.parent))[-1], path),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("pruned", [False, True])
def test_damage_in_an_old_pack_is_named_where_a_later_task_needs_it(tmp_path: Path, damage: str, pruned: bool) -> None:
    world = filled(tmp_path / "state", "all", tasks=3)
    if pruned:
        world.prune(2)
    path = packs(world.state)[0]
    assert path.parent.name == "0000-t0"
    DAMAGES[damage](path)
    with pytest.raises(StateError) as error:
        world.state.committed[-1].read()
    said = str(error.value)
    assert str(path) in said
    assert f"`perpetune rollback {tmp_path / 'state'} --to start`" in said
    assert "\n" not in said


def test_damage_in_a_task_between_is_cured_by_a_rollback_to_the_one_before(tmp_path: Path) -> None:
    world = World(tmp_path / "state")
    for t in range(4):
        extra = {"late": SHARED} if t else {}
        world.commit(f"t{t}", {"pet.safetensors": {"own": torch.full((300,), float(t)), **extra}})
    flipped(packs(world.state)[1])
    with pytest.raises(StateError, match=r"0001-t1/pack\.safetensors is torn .* rollback .*/state --to t0`$"):
        world.state.committed[3].read()
    world.rollback("t0")
    world.check()


BAD_LIST: dict[str, tuple[Callable[[str], str], str]] = {
    "no line of it": (lambda text: text.replace("set-1 1", "set-1 one"), "at-rest.txt, line 2: no name, task, bytes"),
    "a path": (lambda text: text.replace("set-1", "../1"), "at-rest.txt, line 2: no name, task, bytes and hash"),
    "twice": (lambda text: text.replace("set-1", "set-0"), "at-rest.txt, line 2: a set that was named before"),
    "cut off": (lambda text: text[:-1], "at-rest.txt: its last line is not whole"),
    "a later task": (lambda text: text.replace("set-1 1", "set-1 9"), "lie in a task after task 2"),
    "a hash that nothing has": (lambda text: re.sub("[0-9a-f]{64}", "0" * 64, text), "does not hold the piece 0000"),
}


@pytest.mark.parametrize("fault", BAD_LIST)
def test_a_fault_in_the_list_of_sets_at_rest_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    change, message = BAD_LIST[fault]
    world, every, rest_bytes = World(tmp_path / "state"), sets_of(3), store.rest_bytes
    for t in range(3):
        if t == 2:
            monkeypatch.setattr(store, "rest_bytes", lambda rest: change(rest_bytes(rest).decode()).encode())
        world.commit(f"t{t}", {"pet.safetensors": {"w": SHARED}}, dict(list(every.items())[: t + 1]))
    with pytest.raises(StateError, match=re.escape(message)) as error:
        State(tmp_path / "state").committed[2].read()
    assert str(tmp_path / "state") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["torn", "missing", "one byte", "swapped"])
def test_damage_in_the_pack_of_a_set_at_rest_is_named(tmp_path: Path, damage: str) -> None:
    world, every = World(tmp_path / "state"), sets_of(3)
    every["set-1"] = SHARED
    for t in range(3):
        world.commit(f"t{t}", {"pet.safetensors": {"w": torch.full((200,), t)}}, dict(list(every.items())[: t + 1]))
    path = packs(world.state)[1]
    DAMAGES[damage](path)
    with pytest.raises(StateError, match=re.escape(str(path))):
        State(tmp_path / "state").committed[2].read()


@pytest.mark.parametrize("file", ["tensors.json", MANIFEST])
def test_another_index_is_not_read(tmp_path: Path, file: str) -> None:
    world = filled(tmp_path / "state", "all", tasks=3)
    folders = [task.folder for task in world.state.committed]
    shutil.copy(folders[1] / file, folders[2] / file)
    with pytest.raises(StateError, match=re.escape(str(folders[2]))):
        world.state.committed[2].read()


BAD_INDEX: dict[str, Callable[[dict[str, Any]], Any]] = {
    "of another form": lambda index: index["files"].clear() or index.update(files=[]),
    "no hash": lambda index: index["files"]["pet.safetensors"]["pieces"]["sha256"].__setitem__(0, "../../x"),
    "lists of different lengths": lambda index: index["files"]["pet.safetensors"]["pieces"]["task"].pop(),
    "sizes that do not add up": lambda index: index["files"]["pet.safetensors"].update(bytes=3),
    "a later task": lambda index: index["files"]["pet.safetensors"]["pieces"]["task"].__setitem__(0, 9),
    "a piece that is nowhere": lambda index: index["files"]["pet.safetensors"]["pieces"]["sha256"].__setitem__(
        0, "0" * 64
    ),
}


@pytest.mark.parametrize("fault", BAD_INDEX)
def test_a_field_of_the_index_is_named(tmp_path: Path, fault: str) -> None:
    world = filled(tmp_path / "state", "all", tasks=2)
    folder = world.state.committed[1].folder
    index = json.loads((folder / "tensors.json").read_bytes())
    BAD_INDEX[fault](index)
    files = perpetune.files.read_folder(folder) | {"tensors.json": json.dumps(index).encode()}
    shutil.rmtree(folder)
    manifest = perpetune.files.write_folder(folder, files)
    world.state.log("tasks sealed", manifests=[world.state.committed[0].manifests[0], manifest])
    with pytest.raises(StateError, match=re.escape(str(folder.parent))) as error:
        world.state.committed[1].read()
    assert "\n" not in str(error.value)


def commit_after_damage(folder: Path) -> None:
    """A task before is damaged, and nobody has noticed; the next task has the same tensors."""
    world = filled(folder, "all", tasks=2)
    flipped(packs(world.state)[0])
    _, files, _ = world.copies[-1]
    commit(world.state, 2, "t2", files)
    found = world.state.committed[-1].read()
    assert {name: found[name] for name in files} == files


def test_what_is_committed_can_be_read_whatever_happened_to_earlier_folders(tmp_path: Path) -> None:
    commit_after_damage(tmp_path / "state")
    world = filled(tmp_path / "other", "all", tasks=2)
    (world.state.committed[1].folder / "tensors.json").unlink()
    commit(world.state, 2, "t2", world.copies[-1][1])
    assert (
        world.state.committed[-1].read("pet.safetensors")["pet.safetensors"] == world.copies[-1][1]["pet.safetensors"]
    )


def test_control_without_the_check_of_what_is_referred_to_it_could_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store.Pack, "equals", lambda self, piece, content: True)
    with pytest.raises(StateError, match=r"0000-t0/pack\.safetensors is torn or was changed"):
        commit_after_damage(tmp_path / "state")


def test_control_without_the_hash_a_changed_byte_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store.Pack, "read", lambda self, piece: self._get(piece))
    world = filled(tmp_path / "state", "all", tasks=2)
    flipped(packs(world.state)[0])
    with pytest.raises(AssertionError):
        world.check()


def test_a_prune_that_cannot_be_made_changes_nothing(tmp_path: Path) -> None:
    world = filled(tmp_path / "state", "all")
    flipped(packs(world.state)[0])  # of what later tasks need
    before = {path: path.read_bytes() for path in (tmp_path / "state" / "tasks").rglob("*") if path.is_file()}
    with world.state.writing(), pytest.raises(StateError, match=r"0000-t0/pack\.safetensors is torn"):
        world.state.prune(2)
    assert before == {path: path.read_bytes() for path in (tmp_path / "state" / "tasks").rglob("*") if path.is_file()}


# -- states of before -------------------------------------------------------------------------------------------


def test_a_state_with_whole_files_goes_on_and_is_pruned(tmp_path: Path) -> None:
    world = World(tmp_path / "state")
    learned = FIRST
    for t in range(3):
        learned = changed(random.Random(t), learned)
        name, files = f"old{t}", files_of(learned)
        documents = {"task.json": {"index": t, "name": name}, "metrics.json": {"cells": {}}}
        features = {"features.safetensors": save({"f": torch.ones(2)})}
        plain_files = {**files, **features, **{k: json.dumps(v).encode() for k, v in documents.items()}}
        digest = perpetune.files.write_folder(tmp_path / "state" / "tasks" / f"{t:04d}-{name}", plain_files)
        world.state.log("task committed", task=t, name=name, manifest=digest)
        world.copies.append((name, files, True))
    world.check()
    for t in range(3, 6):
        learned = changed(random.Random(t), learned)
        world.commit(f"new{t}", learned)
    world.check()
    world.rollback("new4")
    world.check()
    world.prune(3)
    world.check()
    world.prune(1)
    world.check()


# -- killed -----------------------------------------------------------------------------------------------------


class Moments:
    """Copies a state at some of its durable steps: what a kill at this moment would leave.

    Args:
        state: the state folder.
        copies: where the copies go, each under the number of its step.
        at: the numbers of these steps.
    """

    def __init__(self, patch: pytest.MonkeyPatch, state: Path, copies: Path, at: Container[int] = ()):
        self.state, self.copies, self.at, self.now = state, copies, at, 0
        write, append = perpetune.files._write_synced, Journal.append

        def torn_file(path: Path, content: bytes) -> None:
            self.tick()
            self.tick(lambda: path.write_bytes(content[: len(content) // 2]), lambda: path.unlink())
            write(path, content)
            self.tick()

        def torn_line(journal: Journal, event: str, facts: dict[str, Any]) -> None:
            size = journal.path.stat().st_size if journal.path.exists() else 0
            self.tick(
                lambda: journal.path.open("a").write(f'{{"event": "{event}", "ta'),
                lambda: os.truncate(journal.path, size),
            )
            append(journal, event, facts)
            self.tick()

        patch.setattr(perpetune.files, "_write_synced", torn_file)
        patch.setattr(Journal, "append", torn_line)
        for module, name in ((os, "rename"), (os, "replace"), (os, "unlink"), (shutil, "rmtree")):
            patch.setattr(module, name, self.around(getattr(module, name)))

    def around(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **options: Any) -> None:
            self.tick()
            real(*args, **options)
            self.tick()

        return step

    def tick(self, half: Callable[[], object] = lambda: None, undo: Callable[[], object] = lambda: None) -> None:
        self.now += 1
        if self.now in self.at:
            now, self.now = self.now, -(10**9)  # what is done here is no step
            half()
            shutil.copytree(self.state, self.copies / str(now))
            undo()
            self.now = now


Step = tuple[str, Any]
LEARN: list[Learned] = [{"pet.safetensors": {"w": torch.ones(200), "v": torch.ones(150)}}]
for number in range(1, 6):
    LEARN.append(changed(random.Random(number), LEARN[-1]))
RESTS = [{f"set-{i}": torch.full((50,), float(i)) for i in range(n + 1) if i != 1 or n < 3} for n in range(5)]
RESTS = [{name: RESTS[-1].get(name, RESTS[1]["set-1"]) for name in sets} for sets in RESTS]  # one object for each set
STORIES: dict[str, tuple[str | int, list[Step]]] = {
    "keep two": (2, [("commit", i) for i in range(5)]),
    "prune and roll back": (
        "all",
        [*(("commit", i) for i in range(5)), ("prune", 3), ("rollback", "t3"), ("commit", 4), ("prune", 2)],
    ),
    "roll back past what was pruned": (
        "auto",
        [*(("commit", i) for i in range(4)), ("rollback", START), ("commit", 0)],
    ),
}
EVERY = 7
"""Of so many durable steps one is killed at, more than 100 in all. With `EVERY = 1` it is each of them."""


def follow(folder: Path, story: list[Step]) -> None:
    """Do what of a story is not done yet."""
    state = State(folder)
    done = len([e for e in state.journal() if e["event"] == "story"])
    for way, what in story[done:]:
        with state.writing():
            if way == "commit":
                if f"t{what}" not in [task.name for task in state.committed]:
                    given = Given(files_of(LEARN[what]))
                    given.sets = RESTS[what]
                    held = state.committed[-1].rest() if state.committed else {}
                    state._rested = {n: (RESTS[what][n], rest) for n, rest in held.items() if n in RESTS[what]}  # type: ignore[misc]
                    commit(state, len(state.committed), f"t{what}", given)
            elif way == "prune":
                state.prune(what)
            else:
                state.rollback(what)
            state.log("story")


def picture(folder: Path) -> dict[str, Any]:
    """All of a state but the times in its journal."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    del files["journal.jsonl"]
    tasks = State(folder).committed
    return {**files, "tasks": [(t.name, t.manifests, bool(t.pruned)) for t in tasks]}


@pytest.mark.parametrize("name", chiefly(STORIES, set(STORIES) - {"keep two"}))
def test_killed_at_a_durable_step_and_gone_on_with(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends with the bits of a state that was never killed. Between, before it is mended, readers find it whole."""
    monkeypatch.setattr(prune, "FLOOR", 0)
    keep, story = STORIES[name]
    state = State.create(tmp_path / "state", recipe(keep), BACKBONE)
    steps = range(random.Random(name).randrange(EVERY) + 1, 10**6, EVERY)
    with pytest.MonkeyPatch.context() as patch:
        moments = Moments(patch, state.folder, tmp_path, steps)
        follow(state.folder, story)
    assert {"prune written", "pruned"} <= {e["event"] for e in state.journal()}
    whole = picture(state.folder)
    killed = sorted(tmp_path.glob("[0-9]*"), key=lambda path: int(path.name))
    assert len(killed) >= 200 // EVERY <= moments.now // EVERY
    for folder in killed:
        for task in State(folder).committed:
            if not task.pruned:
                sets = RESTS[int(task.name[1:])]
                files = task.read()
                assert files.keys() >= {"pet.safetensors", "task.json"}
                assert {name: files[name] for name in files if store.RESTING.fullmatch(name)} == rest_files(sets)
        follow(folder, story)
        assert picture(folder) == whole, folder.name
        shutil.rmtree(folder)


def test_the_index_is_a_document() -> None:
    content = store.index_bytes(
        store.Index({"a": store.Held(5, (store.Piece("0" * 64, 5, 0),)), "b": store.Held(3, None)})
    )
    assert Tensors.model_validate(json.loads(content)).files["b"].pieces is None
    assert store.parse_index(content, 0, "x", "y") == {
        "a": store.Held(5, (store.Piece("0" * 64, 5, 0),)),
        "b": store.Held(3, None),
    }
    assert json.loads(store.index_bytes(store.Index())) == {"files": {}}

"""The state folder: its journal, commits, rollback and lock; nothing torn loads; nothing is learned twice."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_server import RECIPE, tiny_vit
from test_faults import learned, pictures
from tiny import chiefly

from perpetune.build import build_backbone, build_method
from perpetune.cli import call
from perpetune.errors import Interrupted, StateError, UsageError
from perpetune.files import MANIFEST, read_folder
from perpetune.fit import FitConfig, make_optimizer
from perpetune.learner import Learner
from perpetune.methods.base import Method
from perpetune.recipe import Recipe, make_recipe
from perpetune.results import read_results
from perpetune.runtime import Runtime, Silent
from perpetune.snapshot import SUMS, snapshot
from perpetune.state import MidTask, State

NAMES = ["0-1", "2-3", "4-5"]
DOCUMENTS = {"task.json": {"index": 0}, "metrics.json": {"cells": {}}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model; `whole`, a state of three tasks; `open`, the same stopped inside the second."""
    world = tmp_path_factory.mktemp("world")
    tiny_vit(world / "vit")
    Learner(recipe(world), world / "whole").run()
    learner = Learner(recipe(world), world / "open", progress=StopAt(14))
    with pytest.raises(KeyboardInterrupt):
        learner.run()
    return world


def recipe(world: Path, **change: Any) -> Recipe:
    return make_recipe({**RECIPE, "backbone": f"folder:{world / 'vit'}", **change})


class StopAt(Silent):
    """Ends the run with an error that nobody expects, inside a step: not even a checkpoint is written."""

    def __init__(self, step: int):
        self.left = step

    def step(self, done: int, epoch: int, loss: float | None, images: int) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def method(world: Path) -> Method:
    return build_method(recipe(world), build_backbone(recipe(world)))


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State.create(tmp_path / "state", make_recipe({}), {"spec": "tiny", "fingerprint": "f"})


@pytest.fixture
def whole(world: Path, tmp_path: Path) -> Path:
    """A copy of the state of three tasks."""
    return shutil.copytree(world / "whole", tmp_path / "state")


def begin(state: State, index: int, name: str) -> None:
    """What a run does before a task is committed."""
    state.log("task begun", task=index, name=name)
    MidTask(state.folder / "resume", torch.nn.Linear(1, 1), (index, name, "data"), 1)  # type: ignore[arg-type]


def commit(state: State, method: Method, *names: str) -> None:
    for index, name in enumerate(names, len(state.committed)):
        begin(state, index, name)
        state.commit(index, name, method, DOCUMENTS)


# -- making and opening -------------------------------------------------------------------------------------


def test_a_new_state_is_empty(state: State) -> None:
    assert state.committed == []
    assert state.journal() == []
    assert state.open_task() is None
    assert state.backbone == {"spec": "tiny", "fingerprint": "f"}
    assert State(state.folder).recipe == make_recipe({})


def test_a_state_of_somebody_else_is_not_changed(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Any, *more: Any, **further: Any) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("perpetune.state.lock.os.open", denied)
    said = f"^{re.escape(str(state.folder))} cannot be changed: Permission denied$"
    with pytest.raises(StateError, match=said), state.writing():
        pass


def test_a_state_is_not_made_over_anything(state: State, tmp_path: Path) -> None:
    taken = [state.folder, tmp_path / "file", tmp_path / "notes", tmp_path / "other"]
    taken[1].write_text("mine")
    for folder, name in ((taken[2], "notes.txt"), (taken[3], "tasks/mine.txt")):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for folder in taken:
        with pytest.raises(UsageError, match=f"{re.escape(str(folder))} already exists: .*choose another folder"):
            State.create(folder, make_recipe({}), {})
    assert sorted(tmp_path.rglob("*")) == before


def test_a_state_is_made_in_an_empty_folder_and_over_half_a_state(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "backbone.json").write_text("{")
    (tmp_path / ".recipe.yaml.tmp").write_text("half")
    State.create(tmp_path, make_recipe({}), {"spec": "tiny", "fingerprint": "f"})
    assert State(tmp_path).backbone["spec"] == "tiny"


@pytest.mark.parametrize("parent", ["file", "file/deeper"])
def test_a_state_that_cannot_be_made_says_why(tmp_path: Path, parent: str) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UsageError, match="Not a directory"):
        State.create(tmp_path / parent / "state", make_recipe({}), {})


def test_a_torn_recipe_does_not_open(state: State) -> None:
    """Its defaults would make another model of it. Only where the last number is cut short does it stay a recipe."""
    path = state.folder / "recipe.yaml"
    text = path.read_text()
    assert text.endswith("checkpoint_every: 200\n")
    for length in [*range(0, len(text) - 40, 37), *range(len(text) - 40, len(text) - 4)]:
        path.write_text(text[:length])
        with pytest.raises(StateError, match="recipe") as error:
            State(state.folder)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"spec": 1}', b"\xff"])
def test_a_torn_backbone_file_is_named(state: State, content: bytes) -> None:
    (state.folder / "backbone.json").write_bytes(content)
    with pytest.raises(StateError, match=r"backbone\.json is missing or torn"):
        _ = state.backbone


# -- journal ------------------------------------------------------------------------------------------------


def test_events_are_appended(state: State) -> None:
    state.log("run begun", seed=0, name="ä\nb")
    state.log("task begun", task=0, name="a")
    events = state.journal()
    assert [e["event"] for e in events] == ["run begun", "task begun"]
    assert events[0]["name"] == "ä\nb"
    assert (state.folder / "journal.jsonl").read_bytes().count(b"\n") == 2


def test_a_torn_last_line_is_left_out_and_then_mended(state: State) -> None:
    path = state.folder / "journal.jsonl"
    state.log("run begun")
    whole = path.read_bytes()
    state.log("task begun", task=0, name="ä")
    line = path.read_bytes()[len(whole) :]
    for length in range(1, len(line) - 1):
        path.write_bytes(whole + line[:length])
        assert [e["event"] for e in state.journal()] == ["run begun"]
    with state.writing():
        assert path.read_bytes() == whole
        state.log("task begun", task=0, name="ä")
    assert [e["event"] for e in state.journal()] == ["run begun", "task begun"]


@pytest.mark.parametrize(
    "line", [b"{", b'{"event": "task beg{"event": "x"}', b"\xff", b"3", b"[]", b"{}", b'{"event": 1}']
)
def test_a_bad_line_in_the_middle_is_named(state: State, line: bytes) -> None:
    state.log("run begun")
    with open(state.folder / "journal.jsonl", "ab") as file:
        file.write(line + b"\n")
    state.log("task begun", task=0, name="a")
    with pytest.raises(StateError, match=r"journal\.jsonl, line 2: not an event in JSON; restore the file or delete"):
        state.journal()


def test_a_task_is_open_from_its_beginning_to_its_commit(state: State, method: Method) -> None:
    begin(state, 0, "a")
    opened = state.open_task()
    assert opened is not None
    assert (opened["task"], opened["name"]) == (0, "a")
    state.commit(0, "a", method, DOCUMENTS)
    assert state.open_task() is None
    begin(state, 1, "b")
    assert state.open_task() is not None
    state.rollback("a")
    assert state.open_task() is None


# -- commits ------------------------------------------------------------------------------------------------


def test_commits_are_found_in_order(state: State, method: Method) -> None:
    commit(state, method, *(f"t{i}" for i in range(12)))
    assert [(t.index, t.name) for t in state.committed] == [(i, f"t{i}") for i in range(12)]
    assert state.committed[3].folder.name == "0003-t3"
    assert state.committed[0].json("task.json") == {"index": 0}
    assert not (state.folder / "resume").exists()


def test_a_name_may_hold_dashes_and_digits(state: State, method: Method) -> None:
    commit(state, method, "0-1", "7", "--")
    assert [t.name for t in state.committed] == ["0-1", "7", "--"]


def test_a_gap_is_named(state: State, method: Method) -> None:
    commit(state, method, "a", "b", "c")
    shutil.rmtree(state.folder / "tasks" / "0001-b")
    with pytest.raises(StateError, match="tasks: task 1 is missing before 0002-c"):
        _ = state.committed


def test_a_number_that_is_there_twice_is_named(state: State, method: Method) -> None:
    commit(state, method, "a", "b")
    shutil.copytree(state.folder / "tasks" / "0001-b", state.folder / "tasks" / "0001-a")
    with pytest.raises(StateError, match=r"0001-b and 0001-a are both task 1: move one of them away"):
        _ = state.committed


@pytest.mark.parametrize("name", ["copy of 0000-a", "0001", "0001-", "-x", "²-x", "x-1"])
def test_a_foreign_folder_is_named(state: State, method: Method, name: str) -> None:
    commit(state, method, "a")
    (state.folder / "tasks" / name).mkdir()
    with pytest.raises(StateError, match=rf"tasks/{re.escape(name)} is not the folder of a task .*: move it away"):
        _ = state.committed


@pytest.mark.parametrize("undone", ["line", "torn line", "checkpoints"])
def test_what_a_crash_in_a_commit_left_undone_is_done_by_the_next_writer(
    state: State, method: Method, undone: str
) -> None:
    commit(state, method, "a")
    begin(state, 1, "b")
    shutil.copytree(state.folder / "resume", state.folder.with_name("kept"))
    state.commit(1, "b", method, DOCUMENTS)
    shutil.copytree(state.folder.with_name("kept"), state.folder / "resume")
    journal = state.folder / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    if undone != "checkpoints":
        journal.write_bytes(b"".join(lines[:-1]) + (lines[-1][:30] if undone == "torn line" else b""))
    with state.writing():
        pass
    assert [e["name"] for e in state.journal() if e["event"] == "task committed"] == ["a", "b"]
    assert not (state.folder / "resume").exists()


def test_checkpoints_of_the_open_task_stay(state: State) -> None:
    with state.writing():
        begin(state, 0, "a")
    with state.writing():
        assert (state.folder / "resume" / "task.json").is_file()


# -- rollback -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to", "kept"),
    [("b", 2), ("0001-b", 2), ("c", 3), ("start", 0)],
)
def test_rollback_by_name_and_folder(state: State, method: Method, to: str, kept: int) -> None:
    commit(state, method, "a", "b", "c")
    begin(state, 3, "d")
    assert state.rollback(to) == ["a", "b", "c"][kept:]
    assert [t.name for t in state.committed] == ["a", "b", "c"][:kept]
    assert not (state.folder / "resume").exists()
    last = state.journal()[-1]
    assert (last["event"], last["to"], last["dropped"]) == ("rolled back", to, ["a", "b", "c"][kept:])


def test_a_number_is_a_task_only_where_it_is_its_name(state: State, method: Method) -> None:
    commit(state, method, "2", "1", "0")
    assert state.rollback("1") == ["0"]
    assert state.rollback("2") == ["1"]
    with pytest.raises(UsageError, match="has no task '0'"):
        state.rollback("0")
    assert [t.name for t in state.committed] == ["2"]


def test_a_number_alone_is_not_guessed(state: State, method: Method) -> None:
    commit(state, method, "may", "june", "july")
    with pytest.raises(
        UsageError,
        match=r"has no task '2'; a number is not taken for one: task 2 is june, the folder with 2 is 0002-july; give "
        "the name$",
    ):
        state.rollback("2")
    with pytest.raises(UsageError, match=r"'3'; a number is not taken for one: task 3 is july; give the name$"):
        state.rollback("3")
    with pytest.raises(UsageError, match=r"has no task '4'; closest: "):
        state.rollback("4")
    assert [t.name for t in state.committed] == ["may", "june", "july"]


def test_rollback_to_an_unknown_task_changes_nothing(state: State, method: Method) -> None:
    commit(state, method, "first", "second")
    before = sorted(state.folder.rglob("*"))
    with pytest.raises(UsageError, match=r"has no task 'secnd'; one of first, second, start"):
        state.rollback("secnd")
    assert sorted(state.folder.rglob("*")) == before


def test_a_rollback_of_nothing_says_nothing(state: State, method: Method) -> None:
    commit(state, method, "a")
    before = state.journal()
    assert state.rollback("a") == []
    assert state.journal() == before


@pytest.mark.parametrize("moves", range(1, 4))
def test_a_crash_in_a_rollback_leaves_a_shorter_state(
    state: State, method: Method, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    commit(state, method, "a", "b", "c", "d")
    rename, left = os.rename, [moves]

    def until(source: Any, target: Any) -> None:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        rename(source, target)

    monkeypatch.setattr(os, "rename", until)
    try:
        state.rollback("a")
    except KeyboardInterrupt:
        assert moves < 3
    monkeypatch.setattr(os, "rename", rename)
    assert [t.name for t in state.committed] == ["a", "b", "c", "d"][: 4 - moves]
    assert state.open_task() is None  # what was dropped is not taken up again
    with state.writing():
        state.rollback("a")
    assert [t.name for t in state.committed] == ["a"]


# -- one writer ---------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused(state: State) -> None:
    with state.writing():
        for _ in range(2):  # the refusal does not break the lock
            with (
                pytest.raises(StateError, match=r"another process is writing to .*: wait for it, or stop it"),
                State(state.folder).writing(),
            ):
                pass
    with State(state.folder).writing():
        pass


def test_the_lock_ends_with_an_error(state: State) -> None:
    with pytest.raises(KeyError), state.writing():
        raise KeyError
    with state.writing():
        pass


def test_the_lock_ends_with_its_process_though_a_child_of_it_lives(state: State) -> None:
    """Processes that load images outlive a killed run by seconds."""
    read, write = os.pipe()
    holder = os.fork()
    if holder == 0:
        with state.writing():
            if os.fork() == 0:
                os.write(write, f"{os.getpid()}\n".encode())
            signal.pause()
    child = int(os.read(read, 20))
    try:
        with pytest.raises(StateError, match="is writing to"), state.writing():
            pass
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        with state.writing():
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.close(read)
        os.close(write)


def test_a_writer_cleans_up_first(state: State) -> None:
    left = [state.folder / ".resume.gone", state.folder / "tasks" / ".0000-a.tmp"]
    for folder in left:
        folder.mkdir()
        (folder / "file").write_bytes(b"x")
    (state.folder / ".report.html.tmp").write_bytes(b"half")
    assert state.committed == []
    with state.writing():
        assert not any(folder.exists() for folder in left)
        assert not (state.folder / ".report.html.tmp").exists()


def test_the_second_of_two_learners_is_told(world: Path, tmp_path: Path) -> None:
    """It would learn on from weights that are not those of the last commit."""
    state = shutil.copytree(world / "open", tmp_path / "state")
    first, second = Learner.load(state), Learner.load(state)
    first.resume()
    with pytest.raises(StateError, match="was changed after this learner loaded it: load it again"):
        second.resume()
    assert learned(state) == learned(world / "whole")


# -- torn folders -------------------------------------------------------------------------------------------

TASK_FILES = [
    *("pack.safetensors", "tensors.json", "features.safetensors", "features.json", "sample.safetensors"),
    *("extra.json", "recipe.json", "task.json", "metrics.json", "timings.json", MANIFEST),
]


def flip(content: bytes, at: int) -> bytes:
    changed = bytearray(content)
    changed[at] ^= 0x10
    return bytes(changed)


Damage = Callable[[Path], None]
DAMAGES: dict[str, Damage] = {
    "emptied": lambda path: path.write_bytes(b"") and None,
    "cut to one byte": lambda path: path.write_bytes(path.read_bytes()[:1]) and None,
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]) and None,
    "without its end": lambda path: path.write_bytes(path.read_bytes()[:-2]) and None,
    "with a byte more": lambda path: path.write_bytes(path.read_bytes() + b"}") and None,
    "with a changed first byte": lambda path: path.write_bytes(flip(path.read_bytes(), 0)) and None,
    "with a changed middle": lambda path: path.write_bytes(flip(path.read_bytes(), path.stat().st_size // 2)) and None,
    "with a changed end": lambda path: path.write_bytes(flip(path.read_bytes(), -1)) and None,
    "deleted": lambda path: path.unlink(),
}


def damaged(folder: Path, other: Path) -> Iterator[tuple[str, str]]:
    """`folder` damaged in every way, one at a time: the file, and what happened to it."""
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for what, damage in DAMAGES.items():
            damage(path)
            yield path.name, what
            path.write_bytes(whole)
        if (other / path.name).is_file() and (other / path.name).read_bytes() != whole:
            shutil.copy(other / path.name, path)
            yield path.name, "another one's"
            path.write_bytes(whole)


def test_no_torn_task_loads(whole: Path, method: Method) -> None:
    state = State(whole)
    last = state.committed[-1]
    state.load(method)
    before, seen = snapshot(method), []
    assert sorted(path.name for path in last.folder.iterdir()) == sorted(TASK_FILES)
    for name, what in damaged(last.folder, state.committed[0].folder):
        with pytest.raises(StateError) as error:
            state.load(method)
        said = str(error.value)
        named = str(last.folder) if name == MANIFEST else str(last.folder / name)
        assert named in said, (name, what)
        assert f"roll back with `perpetune rollback {whole} --to 2-3`" in said
        assert "\n" not in said
        seen.append((name, what))
    assert len(seen) >= len(TASK_FILES) * len(DAMAGES)
    state.load(method)
    assert snapshot(method) == before


def test_no_torn_checkpoint_loads(world: Path, tmp_path: Path, method: Method) -> None:
    folder = shutil.copytree(world / "open" / "resume", tmp_path / "resume")
    header = json.loads((folder / "task.json").read_text())
    task = (header["task"], header["name"], header["data"])
    step = folder / "00-train-step-000000004"
    assert [path.name for path in folder.iterdir() if path.is_dir()] == [step.name]
    method.model.head.set_extra_state({"classes": ["0", "1", "2", "3"]})  # type: ignore[operator, union-attr]
    pets = [p for name, p in method.named_parameters() if "pets" in name]
    head = list(method.model.head.parameters())  # type: ignore[union-attr]
    groups = [{"params": pets, "peak": 0.01}, {"params": head, "peak": 0.01}]

    def go_on() -> int | None:
        optimizer = make_optimizer(groups, FitConfig())
        return MidTask(folder, method, task, 2, writes=False).begin("train", optimizer, Runtime().accelerator)

    assert go_on() == 4
    for name, what in damaged(step, world / "whole" / "tasks" / "0000-0-1"):
        with pytest.raises(StateError) as error:
            go_on()
        said = str(error.value)
        assert (str(step) if name == MANIFEST else str(step / name)) in said, (name, what)
        assert f"delete {folder}, and the task begins again" in said
    assert go_on() == 4


@pytest.mark.parametrize("content", [b"", b"{", b"\xff"])
def test_a_torn_header_of_the_checkpoints_is_named(tmp_path: Path, method: Method, content: bytes) -> None:
    MidTask(tmp_path / "resume", method, (0, "a", "data"), 1)
    (tmp_path / "resume" / "task.json").write_bytes(content)
    with pytest.raises(StateError, match=r"resume/task\.json is torn: delete .*/resume, and the task begins again"):
        MidTask(tmp_path / "resume", method, (0, "a", "data"), 1)


def test_checkpoints_of_another_task_or_of_other_data_are_dropped(world: Path, tmp_path: Path, method: Method) -> None:
    header = json.loads((world / "open" / "resume" / "task.json").read_text())
    task = (header["task"], header["name"], header["data"])
    for other in ((0, task[1], task[2]), (task[0], "other", task[2]), (task[0], task[1], "other")):
        folder = tmp_path / "resume"
        shutil.copytree(world / "open" / "resume", folder)
        MidTask(folder, method, other, 2)
        assert [path.name for path in folder.iterdir()] == ["task.json"]
        shutil.rmtree(folder)


def test_a_torn_last_task_is_rolled_back_as_the_error_says(
    world: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = whole / "tasks" / "0002-4-5" / "pack.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    assert call(["report", str(whole)]) == 0  # it reads what is told of the run, not what was learned
    capsys.readouterr()
    for verb in ("resume", "evaluate"):
        assert call([verb, str(whole), *(["-q"] if verb == "resume" else [])]) == 1
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith(f"perpetune: {path} is torn or was changed")
        assert said.err.count("\n") == 1
    advice = re.search(r"`perpetune (rollback .*)`", said.err)
    assert advice is not None
    assert call(advice[1].split()) == 0
    assert [t.name for t in State(whole).committed] == NAMES[:2]
    assert call(["resume", str(whole), "-q"]) == 0
    assert learned(whole) == learned(world / "whole")


def test_a_torn_checkpoint_is_deleted_as_the_error_says(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = shutil.copytree(world / "open", tmp_path / "state")
    path = state / "resume" / "00-train-step-000000004" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert call(["resume", str(state), "-q"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"perpetune: {path} is torn or was changed")
    assert said.endswith(f": delete {state / 'resume'}, and the task begins again\n")
    shutil.rmtree(state / "resume")
    assert call(["resume", str(state), "-q"]) == 0
    assert learned(state) == learned(world / "whole")


# -- going on -----------------------------------------------------------------------------------------------


def test_a_state_can_be_copied_and_gone_on_with(world: Path, tmp_path: Path) -> None:
    """In the middle of a task too."""
    state = Learner.load(world / "open").save(tmp_path / "copy")
    Learner.load(state).resume()
    assert learned(state) == learned(world / "whole")


@pytest.mark.parametrize("step", chiefly([1, 3, 10, 14], [1, 14]))
def test_the_same_learner_goes_on_after_an_error(world: Path, tmp_path: Path, step: int) -> None:
    """Also before the first checkpoint of a task, where half-learned weights are all it has."""
    learner = Learner(recipe(world), tmp_path / "state", progress=StopAt(step))
    with pytest.raises(KeyboardInterrupt):
        learner.run()
    learner.run()
    assert learned(tmp_path / "state") == learned(world / "whole")


def test_statistics_are_not_counted_twice(world: Path, tmp_path: Path) -> None:
    """A method without `fit` has no checkpoint: what it took in before it was stopped must be gone."""
    plain = {"method": "frozen", "head": "ncm", "pet": "none"}
    Learner(recipe(world, **plain), tmp_path / "whole").run()
    for again in (False, True):
        state = tmp_path / f"stopped-{again}"
        learner = Learner(recipe(world, **plain), state)
        learner.runtime.progress = Terminates()
        with pytest.raises(Interrupted, match=f"continue with `perpetune resume {re.escape(str(state))}`") as stopped:
            learner.run()
        assert stopped.value.exit_code == 143
        assert [t.name for t in State(state).committed] == NAMES[:1]
        (Learner.load(state) if again else learner).resume()
        assert learned(state) == learned(tmp_path / "whole")


def test_a_checkpoint_holds_no_statistics(world: Path, tmp_path: Path) -> None:
    """They are as the last commit left them until the task's training is over, and may be large."""
    changes = {"head": "ncm", "method": {"name": "finetune", "merge": 0.5}}
    Learner(recipe(world, **changes), tmp_path / "whole").run()
    state = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        Learner(recipe(world, **changes), state, progress=StopAt(23)).run()
    phases = sorted(path.name for path in (state / "resume").iterdir() if path.is_dir())
    assert len(phases) == 2, phases  # one phase of the second task is done, the next is open
    assert not list((state / "resume").rglob(SUMS))
    assert [SUMS in task.sizes() for task in State(state).committed] == [True]
    Learner.load(state).resume()
    assert learned(state) == learned(tmp_path / "whole")


class Terminates(Silent):
    """Asks for a stop when the second task begins, once."""

    def __init__(self) -> None:
        self.asked = False

    def task(self, index: int, name: str, classes: int, examples: int) -> None:
        if index == 1 and not self.asked:
            self.asked = True
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_rolled_back_task_was_never_learned(world: Path, tmp_path: Path) -> None:
    """Learning A, B, not B after all, and C gives the bits of learning A and C."""
    given = recipe(world, data=None, stream={}, head="ncm")
    a, b, c = (pictures(tmp_path / n, list(n)) for n in ("ab", "bc", "ad"))
    straight = Learner(given, tmp_path / "straight")
    for data, name in ((a, "A"), (c, "C")):
        straight.learn(data, name=name)
    around = Learner(given, tmp_path / "around")
    for data, name in ((a, "A"), (b, "B")):
        around.learn(data, name=name)
    state = State(tmp_path / "around")
    with state.writing():
        assert state.rollback("A") == ["B"]
    with pytest.raises(StateError, match="was changed after this learner loaded it"):
        around.learn(c, name="C")
    Learner.load(tmp_path / "around").learn(c, name="C")
    assert learned(tmp_path / "around") == learned(tmp_path / "straight")


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.mark.parametrize("way", ["asked", "recipe"])
def test_a_pruned_state_learns_and_reports_as_one_that_keeps_all(world: Path, whole: Path, way: str) -> None:
    """Also drift, which is measured on features of earlier tasks' test images."""
    state, notes = State(whole), Notes()
    with state.writing():
        state.rollback("0-1" if way == "recipe" else "2-3")
    if way == "asked":
        assert Learner.load(whole).prune(1).dropped == ["0-1"]
    else:
        path = whole / "recipe.yaml"
        path.write_text(path.read_text().replace("keep: auto", "keep: 1"))
    learner = Learner.load(whole, progress=notes)
    learner.resume()
    assert [bool(task.pruned) for task in learner.state.committed] == [True, way == "recipe", False]
    said = (
        "0-1 can no longer be rolled back to, nor can more tasks as others are learned (run.keep: 1); the oldest that "
    )
    assert [note for note in notes.notes if "rolled back" in note] == ([f"{said}can is 2-3"] if way == "recipe" else [])
    files, expected = State(whole).committed[-1].read(), State(world / "whole").committed[-1].read()
    assert {n: c for n, c in files.items() if n != "timings.json"} == {
        n: c for n, c in expected.items() if n != "timings.json"
    }
    found, other = read_results(State(whole)), read_results(State(world / "whole"))
    own = {"disk", "timings", "recipe"}
    assert {k: v for k, v in found.items() if k not in own} == {k: v for k, v in other.items() if k not in own}
    assert sum(entry["bytes"] for entry in found["disk"]) < sum(entry["bytes"] for entry in other["disk"])


def test_nothing_is_pickled(world: Path) -> None:
    """Every file is one of a few plain kinds, and says so by its first bytes."""
    kinds = {".safetensors", ".json", ".jsonl", ".yaml"}
    found = [path for name in ("whole", "open") for path in (world / name).rglob("*") if path.is_file()]
    assert {path.suffix for path in found if path.name != ".lock"} == kinds
    for path in found:
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            assert isinstance(json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]), dict)
        else:
            content.decode("utf-8")
            assert not content.startswith((b"\x80", b"PK"))
    assert (world / "whole" / ".lock").read_bytes() == b""


def test_metrics_hold_counts_not_ratios(world: Path) -> None:
    for task in State(world / "whole").committed:
        cells = json.loads(read_folder(task.folder)["metrics.json"])["cells"]
        assert list(cells) == NAMES[: task.index + 1]
        for cell in cells.values():
            assert cell["total"] == 10
            numbers = [cell["correct"], cell["total"], *(n for pair in cell["per_class"].values() for n in pair)]
            assert all(isinstance(number, int) for number in numbers)

"""What a killed export leaves is cleared by the next one, and who discards an interrupted task says which and where."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from tiny import picture_folder, recipe, vit_folder

from perpetune import aside as asides
from perpetune.aside import WRITING, written_aside
from perpetune.cli import call
from perpetune.errors import Interrupted
from perpetune.learner import Learner
from perpetune.runtime import Silent
from perpetune.state import MidTask, State


class StopsAt(Silent):
    """Asks for a stop after a step of the task with this name."""

    def __init__(self, name: str, step: int):
        self.name, self.left, self.here = name, step, False

    def task(self, index: int, name: str, classes: int, examples: int) -> None:
        self.here = name == self.name

    def step(self, done: int, epoch: int, loss: float | None, images: int) -> None:
        self.left -= self.here
        if self.here and self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`open`: a state that has learned `ab` and was stopped in `cd` after its second step."""
    world = tmp_path_factory.mktemp("world")
    model = vit_folder(world / "vit")
    for name in ("ab", "cd", "ef"):
        picture_folder(world / name, list(name), 8)
    content = recipe(model, train={"epochs": 2, "batch_size": 4, "lr": 0.01}, stream={})
    learner = Learner(content, world / "open", progress=StopsAt("cd", 2))
    learner.learn(world / "ab", name="ab")
    with pytest.raises(Interrupted):
        learner.learn(world / "cd", name="cd")
    return world


@pytest.fixture
def state(world: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world / "open", tmp_path / "state"))


WHERE = "task cd, stopped after step 3 of phase train"


def test_a_rollback_says_what_it_discards(state: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert call(["rollback", str(state), "--to", "ab"]) == 0
    assert capfd.readouterr().out == f"discarded {WHERE}; {state} has ab\n"
    assert call(["rollback", str(state), "--to", "ab"]) == 0
    assert capfd.readouterr().out == f"nothing to drop; {state} has ab\n"


def test_a_rollback_says_what_it_drops_and_discards(state: Path, capfd: pytest.CaptureFixture[str]) -> None:
    again = Path(shutil.copytree(state, state.with_name("again")))
    assert call(["rollback", str(state), "--to", "start"]) == 0
    assert capfd.readouterr().out == f"dropped ab; discarded {WHERE}; {state} has no learned tasks\n"
    assert call(["rollback", str(again), "--to", "start", "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == {"dropped": ["ab"], "kept": [], "discarded": WHERE}


def test_an_update_says_what_it_discards(world: Path, state: Path) -> None:
    with pytest.warns(UserWarning, match="discarded") as said:
        assert call(["update", str(state), "--data", str(world / "ef"), "--name", "ef", "-q"]) == 0
    assert [str(w.message) for w in said] == [f"discarded: {WHERE}; task ef begins from its start"]
    assert [t.name for t in State(state).committed] == ["ab", "ef"]


def test_why_the_task_of_the_same_name_is_discarded(world: Path, state: Path) -> None:
    with pytest.warns(UserWarning, match="discarded") as said:
        assert call(["update", str(state), "--data", str(world / "ef"), "--name", "cd", "-q"]) == 0
    assert [str(w.message) for w in said] == [
        f"discarded: {WHERE}, because its data changed; task cd begins from its start"
    ]


@pytest.mark.parametrize(
    ("now", "reason"),
    [
        ((1, "cd", "d/o/2"), ", because the number of processes changed"),
        ((1, "cd", "d/p/1"), ", because the training options changed"),
        ((1, "cd", "e/p/1"), ", because its data and the training options changed"),
        ((1, "ef", "e/o/1"), ""),
        ((2, "cd", "e/o/1"), ""),
    ],
)
def test_what_a_checkpoint_belonged_to(now: tuple[int, str, str], reason: str, tmp_path: Path) -> None:
    net = torch.nn.Linear(1, 1)
    MidTask(tmp_path / "resume", net, (1, "cd", "d/o/1"), 1)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="discarded") as said:
        MidTask(tmp_path / "resume", net, now, 1)  # type: ignore[arg-type]
    assert [str(w.message) for w in said] == [
        f"discarded: task cd, stopped before its first checkpoint{reason}; task {now[1]} begins from its start"
    ]


def test_the_same_update_goes_on_and_discards_nothing(
    world: Path, state: Path, recwarn: pytest.WarningsRecorder
) -> None:
    assert call(["update", str(state), "--data", str(world / "cd"), "--name", "cd", "-q"]) == 0
    assert not [w for w in recwarn if "discarded" in str(w.message)]


# -- exports ------------------------------------------------------------------------------------------------


def test_what_a_killed_export_left_is_cleared_by_the_next(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    child = os.fork()
    if child == 0:
        with written_aside(out) as aside:
            (aside / "adapter_config.json").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    left = [path.name for path in tmp_path.iterdir()]
    assert len(left) == 1
    assert left[0].startswith(".out.")
    mine = tmp_path / ".out.mine.tmp"
    mine.mkdir()
    (mine / WRITING).write_text("mine")
    other = tmp_path / ".out.0123456789abcdef.tmp"  # no marker: not of an export
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    assert call(["export", str(world / "open"), str(out)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.0123456789abcdef.tmp", ".out.mine.tmp", "out"]
    assert not (out / WRITING).exists()
    assert (other / "notes.txt").read_text() == "mine"


def test_an_export_that_goes_on_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with written_aside(out) as aside:
        (aside / "file").write_text("x")
        child = os.fork()
        if child == 0:
            asides.clear_beside(out)
            os._exit(0)
        os.waitpid(child, 0)
        assert (aside / "file").exists()
    assert [path.name for path in out.iterdir()] == ["file"]


def test_a_failed_export_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), written_aside(tmp_path / "out"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


# -- by the next verb on the state --------------------------------------------------------------------------


def killed(state: Path, out: Path, moment: str = "writing") -> None:
    """Start an export of `state` to `out` in another process, and kill it in the middle."""
    child = os.fork()
    if child == 0:

        def kill(*_: object, **__: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        take, mkdir = asides._take, Path.mkdir
        if moment == "before the folder":
            Path.mkdir = lambda path, **how: kill() if path.suffix == ".tmp" else mkdir(path, **how)  # type: ignore[method-assign,assignment]
        elif moment == "before the marker":
            asides._take = lambda marker: kill() if list(out.parent.glob(".out.*.tmp")) else take(marker)  # type: ignore[assignment]
        with written_aside(out, state) as aside:
            (aside / "adapter_config.json").write_text("half")
            kill()
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])


def notes(state: Path) -> list[str]:
    return sorted(path.name for path in state.glob(".export.*"))


VERBS: dict[str, list[str]] = {
    "predict": ["ab/a"],
    "evaluate": [],
    "export": ["elsewhere"],
    "update": ["--data", "cd", "--name", "cd", "-q"],
    "resume": ["-q"],
    "rollback": ["--to", "ab"],
    "report": [],
    "log": [],
    "compare": [],
    "relocate": ["--data", "ab=ab"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_the_next_verb_clears_what_a_killed_export_left(verb: str, world: Path, state: Path, tmp_path: Path) -> None:
    out = tmp_path / "far" / "out"
    killed(state, out)
    assert len(notes(state)) == 1
    (left,) = out.parent.iterdir()
    assert (left / "new" / "adapter_config.json").read_text() == "half"
    for name in ("ab", "cd"):
        (tmp_path / name).symlink_to(world / name)
    places = {"ab/a": str(world / "ab" / "a"), "cd": str(world / "cd"), "elsewhere": str(tmp_path / "elsewhere")}
    places["ab=ab"] = f"{world / 'ab'}={world / 'ab'}"
    assert call([verb, str(state), *(places.get(argument, argument) for argument in VERBS[verb])]) == 0
    assert list(out.parent.iterdir()) == []
    assert notes(state) == []


@pytest.mark.parametrize("moment", ["before the folder", "before the marker"])
def test_an_export_that_was_killed_early(moment: str, state: Path, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    killed(state, tmp_path / "far" / "out", moment)
    assert len(notes(state)) == 1
    State(state)
    assert list((tmp_path / "far").iterdir()) == []
    assert notes(state) == []


def test_an_export_that_goes_on_keeps_its_note(state: Path, tmp_path: Path) -> None:
    with written_aside(tmp_path / "out", state) as aside:
        (aside / "file").write_text("x")
        child = os.fork()
        if child == 0:
            State(state)
            os._exit(0)
        os.waitpid(child, 0)
        assert (aside / "file").exists()
        assert len(notes(state)) == 1
    assert notes(state) == []
    assert (tmp_path / "out" / "file").read_text() == "x"


def test_a_strangers_note_deletes_nothing(state: Path, tmp_path: Path) -> None:
    name = "0123456789abcdef"
    mine = [tmp_path / "mine", tmp_path / f".mine.{name}.tmp", tmp_path / f".linked.{name}.tmp"]
    for folder in mine[:2]:
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / WRITING).write_text("mine")
    mine[2].symlink_to(tmp_path / "target")
    path = state / f".export.{name}.json"
    for folder in mine:
        path.write_text(json.dumps({"folder": str(folder), "host": asides.platform.node()}))
        State(state)
    ours = tmp_path / f".out.{name}.tmp"
    ours.mkdir()
    (ours / WRITING).write_text("")
    path.write_text(json.dumps({"folder": str(ours), "host": "another computer"}))
    State(state)
    assert ours.exists()
    assert (tmp_path / "target" / WRITING).exists()
    assert all((folder / "notes.txt").read_text() == "mine" for folder in mine[:2])


@pytest.mark.parametrize("content", ["", "{", "[1]", "7", '{"folder": 7, "host": ""}', '{"folder": "a\\u0000b"}'])
def test_a_torn_note_is_removed(content: str, state: Path) -> None:
    (state / ".export.0123456789abcdef.json").write_text(content)
    State(state)
    assert notes(state) == []


def test_a_state_that_cannot_be_written_is_exported(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a disk that is read-only: no note, and no error."""
    with written_aside(tmp_path / "out", tmp_path / "none") as aside:
        (aside / "file").write_text("x")
    assert (tmp_path / "out" / "file").read_text() == "x"

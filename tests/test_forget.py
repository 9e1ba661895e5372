"""What is forgotten is out of the model as if it had never been learned, and out of the folder; or nothing changes."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from test_faults import KILLED, Lab, assert_whole, fine, learned, one_line
from test_gate import everything
from tiny import every, picture_folder, recipe, vit_folder, written
from torch import Tensor
from warm import Warm

from perpetune.cli import call
from perpetune.data.sketch import ALL
from perpetune.drifting import FEATURES, SAMPLE
from perpetune.errors import UsageError
from perpetune.learner import Learner
from perpetune.state import State

HEADS: dict[str, Any] = {"ncm": "ncm", "ridge": {"name": "ridge", "penalty": 0.01}}
MONTHS = {"a": ("cat", "dog"), "b": ("fox", "owl"), "c": ("cat", "hen"), "d": ("emu",)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("forget")
    vit_folder(root / "vit")
    for number, (name, classes) in enumerate(MONTHS.items()):
        picture_folder(root / name, classes, 8, first=100 * number)
    return root


def made(world: Path, state: Path, months: str, head: Any = "ncm", **changes: Any) -> Learner:
    content = {"pet": "none", "method": "frozen", "head": HEADS.get(head, head), "stream": {}, **changes}
    learner = Learner(recipe(world / "vit", **content), state)
    for name in months:
        learner.learn(world / name)
    return learner


def sums(state: Path) -> dict[str, Tensor]:
    """The tensors of the newest entry, without the probe, which nothing trains."""
    files = State(state).committed[-1].read()
    found = {n: t for name, content in files.items() if name.endswith("safetensors") for n, t in load(content).items()}
    found = {name: tensor for name, tensor in found.items() if name.startswith("model.")}
    return {name: tensor for name, tensor in found.items() if "probe" not in name and not name.endswith("scale")}


def same(one: Learner, other: Learner, files: Path) -> None:
    a, b = sums(one.state.folder), sums(other.state.folder)
    order = [one.method.classes.index(name) for name in other.method.classes]
    assert sorted(one.method.classes) == sorted(other.method.classes)
    for name, tensor in b.items():
        exact = {"rtol": 1e-9, "atol": 1e-9} if tensor.dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
        for axis, size in enumerate(tensor.shape):  # a class that stays keeps its place, and may have come earlier
            a[name] = a[name].index_select(axis, torch.tensor(order)) if size == len(order) else a[name]
        torch.testing.assert_close(a[name], tensor, **exact)
    predicted = [[p.name for p in learner.predict(sorted(files.rglob("*.png")))] for learner in (one, other)]
    assert predicted[0] == predicted[1]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("months", "task"), [("abc", "b"), ("abc", "a"), ("abcd", "c")])
def test_a_task_is_as_if_it_had_never_been_learned(
    head: str, months: str, task: str, world: Path, tmp_path: Path
) -> None:
    """Also where another task has one of its classes."""
    learner = made(world, tmp_path / "state", months, head)
    results = learner.forget(task=task)
    never = made(world, tmp_path / "never", months.replace(task, ""), head)
    same(learner, never, world / "c")
    same(Learner.load(tmp_path / "state"), never, world / "a")
    assert results["forgot"][0]["tasks"] == [task]
    cells = [cell for cell in results["cells"][-1] if cell]
    assert cells == [cell for cell in never.state.committed[-1].json("metrics.json")["cells"].values() if cell]
    assert task not in learner.evaluate()


def test_a_control_that_subtracts_nothing_is_seen(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from perpetune.heads.ridge import Ridge

    def only_rows(self: Any, part: Any, gone: Any, whole: bool) -> None:
        stay = self.leave_out(gone)
        self.cross, self.weight, self.offset = self.cross[:, stay], self.weight[:, stay], self.offset[stay]
        self.counts = self.counts[stay]
        self.probe.keep_rows(stay)

    monkeypatch.setattr(Ridge, "take_out", only_rows)
    learner = made(world, tmp_path / "state", "abc", "ridge")
    learner.forget(task="b")
    with pytest.raises(AssertionError):
        same(learner, made(world, tmp_path / "never", "ac", "ridge"), world / "c")


def test_a_class(world: Path, tmp_path: Path) -> None:
    """With class means it goes by itself; with one sum over all classes only if it was alone in its tasks."""
    learner = made(world, tmp_path / "state", "abc")
    learner.forget(class_name="cat")
    assert learner.method.classes == ["dog", "fox", "owl", "hen"]
    assert set(learner.evaluate()["c"]["per_class"]) == {"hen"}  # type: ignore[index]
    before = sums(made(world, tmp_path / "whole", "abc").state.folder)
    assert torch.equal(sums(tmp_path / "state")["model.head.sums"], before["model.head.sums"][1:])
    alone = made(world, tmp_path / "alone", "adb", "ridge")
    alone.forget(class_name="emu")
    same(alone, made(world, tmp_path / "never", "ab", "ridge"), world / "a")
    files = everything(tmp_path / "alone")
    with pytest.raises(UsageError, match="keeps one sum over all classes of task a"):
        alone.forget(class_name="cat")
    assert everything(tmp_path / "alone") == files
    assert alone.predict([next((world / "a").rglob("*.png"))])


def test_the_newest_task_of_any_method(world: Path, tmp_path: Path) -> None:
    train = {"epochs": 1, "batch_size": 8, "lr": 0.05}
    changes = {"pet": {"name": "lora", "rank": 2}, "method": "finetune", "train": train}
    learner = made(world, tmp_path / "state", "ab", "linear", **changes)
    before = {n: c for n, c in learned(tmp_path / "state").items() if n.startswith("0000-a")}
    files = everything(tmp_path / "state")
    with pytest.raises(UsageError, match="of method finetune: it trains on each task from where"):
        learner.forget(task="a")
    assert everything(tmp_path / "state") == files
    learner.forget(task="b")
    after = State(tmp_path / "state").committed[-1].read()
    for name in ("pet.safetensors", "head.safetensors", "extra.json"):
        assert after[name] == before[f"0000-a/{name}"]


@pytest.mark.parametrize("select", ["centres", "means"])
def test_a_member_of_a_pool(select: str, world: Path, tmp_path: Path) -> None:
    """Whatever the task was that is forgotten, what is left has the same bits: nothing of it is left."""
    train = {"epochs": 1, "batch_size": 8, "lr": 0.05}
    method = {"name": "pool", "select": select, "answer": "own", "start": "fresh"}
    changes = {"pet": {"name": "prompt", "length": 2}, "method": method, "train": train}
    other = picture_folder(tmp_path / "x", ("yak", "zebra"), 6, first=900)
    states = []
    for name, second in (("one", world / "b"), ("two", other)):
        learner = made(world, tmp_path / name, "a", "linear", **changes)
        learner.learn(second, name="second")
        learner.learn(picture_folder(tmp_path / name / "more", ("hen", "ibis"), 8, first=700))
        learner.forget(task="second")
        assert learner.method.classes == ["cat", "dog", "hen", "ibis"]
        assert {p.name for p in learner.predict(sorted((world / "a").rglob("*.png")))} <= {"cat", "dog"}
        states.append(newest(tmp_path / name))
        learner.learn(world / "d", name="later")
    for file in ("pet.safetensors", "head.safetensors", "method.safetensors", "earlier.safetensors", "extra.json"):
        assert states[0][file] == states[1][file], file


def test_what_a_pool_cannot_forget(world: Path, tmp_path: Path) -> None:
    changes = {"pet": {"name": "prompt", "length": 2}, "train": {"epochs": 1, "batch_size": 8, "lr": 0.05}}
    for name, options, says in (
        ("last", {"select": "centres", "answer": "own"}, r"starts from those before it \(start: last\)"),
        ("gaussian", {"start": "fresh", "answer": "own"}, "select: gaussian weighs all members together"),
    ):
        method = {"name": "pool", **options}
        learner = made(world, tmp_path / name, "ab", "linear", method=method, **changes)
        with pytest.raises(UsageError, match=says):
            learner.forget(task="a")


def test_the_command_and_what_is_left(world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    state = tmp_path / "state"
    made(world, state, "abc", "ridge")
    assert call(["forget", str(state), "--task", "b"]) == 0
    said = capfd.readouterr().out
    assert f"forgotten: task b, class fox, class owl; {state} can no longer be rolled back to earlier tasks" in said
    assert "forgot-b" in (state / "report.md").read_text()
    left = {path.name for path in (state / "tasks" / "0001-b").iterdir()}
    assert left.isdisjoint({FEATURES, SAMPLE, ALL, "pack.safetensors", "head.safetensors", "statistics.safetensors"})
    assert {SAMPLE} <= {path.name for path in (state / "tasks" / "0000-a").iterdir()}
    assert call(["rollback", str(state), "--to", "a"]) == 2
    assert "which was pruned (forget b" in one_line(capfd.readouterr().err)
    assert call(["log", str(state)]) == 0
    assert "forgot tasks b, classes fox, owl" in capfd.readouterr().out
    # learning goes on, and so does forgetting
    assert call(["update", str(state), "--data", str(world / "b"), "--name", "b2", "-q"]) == 0
    assert call(["update", str(state), "--data", str(world / "d"), "-q"]) == 0
    assert call(["forget", str(state), "--task", "b2", "--json"]) == 0
    capfd.readouterr()
    never = made(world, tmp_path / "never", "acd", "ridge")
    same(Learner.load(state), never, world / "c")
    assert call(["evaluate", str(state), "--json"]) == 0
    assert list(written(capfd.readouterr().out)[-1]["cells"]) == ["a", "c", "d"]


def test_the_process(world: Path, tmp_path: Path, warm: Warm) -> None:
    state = tmp_path / "state"
    made(world, state, "ab", "ncm")
    command = [*warm.command, "-m", "perpetune", "forget", str(state), "--task", "a", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "forgotten: task a, " in done.stdout
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "has no task 'a'" in one_line(done.stderr)


def test_bad_input(world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    state = tmp_path / "state"
    learner = made(world, state, "ab", "ridge", run={"device": "cpu", "keep": 1})
    learner.learn(world / "c")
    before = everything(state)
    for arguments, says in (
        ([], "give --task NAME or --class NAME, one of the two"),
        (["--task", "a", "--class", "cat"], "give --task NAME or --class NAME, one of the two"),
        (["--task", "x"], "has no task 'x'; one of a, b, c"),
        (["--class", "x"], "has not learned class 'x'; closest:"),
        (["--task", "a"], "was pruned (run.keep: 1, "),
    ):
        assert call(["forget", str(state), *arguments, "-q"]) == 2
        assert says in one_line(capfd.readouterr().err)
    assert everything(state) == before
    only = made(world, tmp_path / "only", "a")
    with pytest.raises(UsageError, match="nothing would be left: `perpetune rollback"):
        only.forget(task="a")


# -- kills --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("lab"), warm)
    yield lab
    lab.close()


@pytest.fixture(scope="module")
def forgotten(lab: Lab, world: Path) -> tuple[Path, Path]:
    """A state of three tasks, and the same with one of them forgotten."""
    whole = lab.folder / "begun"
    made(world, whole, "abc", "ridge", backbone=f"folder:{lab.folder / 'vit'}")
    done = Path(shutil.copytree(whole, lab.folder / "done"))
    fine(lab.command("forget", done, "--task", "b", "-q"))
    return whole, done


MOMENTS = [
    "log half task begun forgot-b",
    "log after task begun forgot-b",
    "write half */tasks/.0003-forgot-b.tmp/manifest.json",
    "rename after */tasks/0003-forgot-b",
    "log half task committed forgot-b",
    "log after task committed forgot-b",
    "log after prune written",
    "replace after */0001-b/manifest.json",
    "log half pruned",
    "unlink after */kept/*",
]


@pytest.mark.parametrize("at", every(MOMENTS, 4))
def test_killed_and_resumed(at: str, lab: Lab, forgotten: tuple[Path, Path], tmp_path: Path) -> None:
    begun, done = forgotten
    state = Path(shutil.copytree(begun, tmp_path / "state"))
    assert lab.command("forget", state, "--task", "b", "-q", at=at).status == KILLED
    assert_whole(state)
    unfinished = len(State(state).committed) == 3
    again = lab.command("forget", state, "--task", "b", "-q") if "half task begun" in at else lab.resume(state)
    assert again.status == 0, again.err
    one, other = ({n: c for n, c in newest(s).items() if n not in ("timings.json",)} for s in (state, done))
    assert one == other
    assert unfinished == (MOMENTS.index(at) < 3)
    left = {path.name for path in (state / "tasks" / "0001-b").iterdir()}
    assert left == {path.name for path in (done / "tasks" / "0001-b").iterdir()}


def newest(state: Path) -> dict[str, bytes]:
    return State(state).committed[-1].read()

"""What a month of data holds, without learning it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from test_faults import one_line
from test_gate import everything
from tiny import picture_folder, recipe, vit_folder, written
from warm import Warm

from perpetune.cli import call
from perpetune.data.names import edits, spellings
from perpetune.data.sketch import ALL, KEPT, all_of, packed, sketch
from perpetune.errors import UsageError
from perpetune.learner import Learner
from perpetune.state import State


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state of one month, and a second month: a known class, a new one, a known one in another spelling, copies."""
    root = tmp_path_factory.mktemp("month")
    picture_folder(root / "first", ("blackbird", "wren"), 6)
    second = picture_folder(root / "second", ("wren", "Black_birds", "owl"), 5, first=50)
    shutil.copy(root / "first" / "wren" / "0.png", second / "wren" / "again.png")
    shutil.copy(second / "owl" / "50.png", second / "owl" / "twin.png")
    (second / "owl" / "torn.png").write_bytes(b"no picture")
    content = recipe(vit_folder(root / "vit"), pet="none", method="frozen", head="ncm", stream={})
    Learner(content, root / "state").learn(root / "first")
    return root


def test_what_a_month_holds(world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = everything(world / "state")
    command = ["update", str(world / "state"), "--data", str(world / "second"), "--dry-run"]
    assert call([*command, "--json"]) == 0
    found = written(capfd.readouterr().out)[-1]["month"]
    assert found == Learner.load(world / "state").month(world / "second")
    assert found["classes"] == {"new": {"Black_birds": 5, "owl": 6}, "known": {"wren": 6}}
    assert found["train"] + found["test"] == 17
    assert found["spellings"] == [["Black_birds", "blackbird"]]
    copies = found["copies"]
    assert (copies["inside"], copies["of"], copies["untold"]) == (1, {"first": 1}, [])
    assert [(Path(name).name, tasks) for name, tasks in copies["examples"].items()] == [("again.png", ["first"])]
    assert "torn.png" in found["bad"][0]
    assert call(command) == 0
    said = capfd.readouterr().out
    for line in (
        "new classes: 2: Black_birds (5), owl (6)",
        "is 'Black_birds' a spelling of 'blackbird', which was learned?",
        "seen before: 1 picture, with task first (1)",
        "nothing was learned",
    ):
        assert line in said
    assert everything(world / "state") == before


def test_the_process_learns_nothing(world: Path, warm: Warm) -> None:
    before = everything(world / "state")
    command = ["update", str(world / "state"), "--data", str(world / "second"), "--dry-run"]
    done = subprocess.run([*warm.command, "-m", "perpetune", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "new classes: 2: Black_birds (5), owl (6)" in done.stdout
    assert everything(world / "state") == before


def test_bad_input(world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["update", str(world / "state"), "--data", str(world / "nowhere"), "--dry-run"]
    assert call(command) == 1
    assert "nowhere" in one_line(capfd.readouterr().err)
    assert call([*command, "--max-drop", "2"]) == 2
    assert "--dry-run learns nothing, so there is nothing for --max-drop" in one_line(capfd.readouterr().err)
    with pytest.raises(UsageError, match="options need data that are a path"):
        Learner.load(world / "state").month({"name": "folder", "path": str(world)}, options={"label_column": "x"})


def test_hashes_of_all_examples_are_kept(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More examples than a sketch holds: 8 bytes each; an older state without them cannot tell, and says so."""
    monkeypatch.setattr("perpetune.data.sketch.KEPT", 4)
    state = tmp_path / "state"
    content = recipe(world / "vit", pet="none", method="frozen", head="ncm", stream={})
    Learner(content, state).learn(world / "first")
    (task,) = State(state).committed
    files = task.read("task.json", ALL)
    assert len(files[ALL]) == 8 * 12
    assert Learner.load(state).month(world / "first", name="again")["copies"]["of"] == {"first": 12}
    monkeypatch.setattr("perpetune.month.ALL", "absent")
    assert Learner.load(state).month(world / "first", name="again")["copies"]["untold"] == ["first"]


def test_packed() -> None:
    hashes = [f"{i:016x}" for i in range(KEPT + 1)]
    assert packed(hashes[1:]) is None
    assert all_of(sketch(hashes[1:]), None) == set(hashes[1:])
    assert all_of(sketch(hashes), None) is None
    assert all_of(sketch(hashes), packed(hashes)) == set(hashes)


def test_spellings() -> None:
    known = ["red panda", "otter", "class 10", "yak", "kingfisher"]
    names = ["Red_Panda", "otters", "oter", "class 11", "yaks", "cat", "kingfihser", "yuk", "wolf"]
    assert spellings(names, known) == [
        ("kingfihser", "kingfisher"),
        ("oter", "otter"),
        ("otters", "otter"),
        ("Red_Panda", "red panda"),
        ("yaks", "yak"),
    ]
    assert (edits("abc", "abc"), edits("abc", "acb"), edits("abc", "xyz"), edits("", "ab")) == (0, 1, 3, 2)

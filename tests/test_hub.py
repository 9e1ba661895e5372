"""States on the hub and back, against a double of its HTTP interface."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hub_double
import pytest
from hub_double import TOKEN, Double, point
from test_faults import one_line
from test_gate import everything
from tiny import chiefly, fits_schema, picture_folder, recipe, vit_folder
from warm import Warm

import perpetune
from perpetune.cli import call
from perpetune.errors import HubError, StateError
from perpetune.learner import Learner
from perpetune.runtime import Silent
from perpetune.state import State
from perpetune.state.lock import locked

REPO = "me/birds"


class Said(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state after one month, and one of the same after two; `other` has another second month."""
    root = tmp_path_factory.mktemp("hub")
    vit_folder(root / "vit")
    for name, classes in {"m1": ("cat", "dog"), "m2": ("fox", "owl"), "m3": ("hen", "cow")}.items():
        picture_folder(root / name, classes, 8)
    content = recipe(root / "vit", train={"epochs": 1, "batch_size": 8}, stream={})
    Learner(content, root / "one").learn(root / "m1")
    for name, data in {"two": "m2", "other": "m3"}.items():
        shutil.copytree(root / "one", root / name)
        Learner.load(root / name).learn(root / data)
    return root


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Double]:
    from huggingface_hub import constants

    double = Double()
    for name, value in point(double.url).items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_ENDPOINT", double.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield double
    double.close()
    assert not any(TOKEN in path for _, path in double.asked)


def copied(world: Path, tmp_path: Path, name: str, to: str = "birds") -> Path:
    return Path(shutil.copytree(world / name, tmp_path / to))


def committed(state: Path) -> dict[str, bytes]:
    """The files of a state that are pushed."""
    names = ("recipe.yaml", "backbone.json", "journal.jsonl", "tasks/")
    return {name: content for name, content in everything(state).items() if name.startswith(names)}


def state_on(hub: Double) -> dict[str, bytes]:
    files = hub.repos[REPO].files
    return {path: content for path, content in files.items() if path not in (".gitattributes", "README.md")}


def answers(state: Path, world: Path) -> list[Any]:
    return [p.classes for p in Learner.load(state).predict(sorted((world / "m2").rglob("*.png")))]


def one_less(state: Path) -> dict[str, bytes]:
    """All files of a state but its lock, which appears when somebody writes."""
    return {name: content for name, content in everything(state).items() if name != ".lock"}


# -- there and back -----------------------------------------------------------------------------------------


def test_there_and_back(world: Path, hub: Double, tmp_path: Path) -> None:
    state, said = copied(world, tmp_path, "two"), Said()
    (state / "notes.txt").write_text("mine")
    assert (state / "kept").is_dir()
    before = one_less(state)
    done = perpetune.push(state, REPO, progress=said)
    assert one_less(state) == before
    assert hub.repos[REPO].private
    assert len(hub.repos[REPO].commits) == 2
    assert state_on(hub) == committed(state)
    assert done.files == len(committed(state)) + 1
    (line,) = said.notes
    assert line.startswith(f"{done.files} files ({done.bytes:,} bytes) go to {hub.url}/{REPO}, private; 0 are there")
    assert "features of test examples (STATE/kept), checkpoints and reports stay here" in line
    card = hub.repos[REPO].files["README.md"].decode()
    assert f"perpetune pull {REPO} birds" in card
    assert "| m2 | fox, owl |" in card
    target = tmp_path / "elsewhere" / "birds"
    got = perpetune.pull(REPO, target)
    assert everything(target) == committed(state)
    assert got.tasks == ["m1", "m2"]
    assert got.bytes == sum(map(len, committed(state).values()))
    assert os.listdir(tmp_path / "elsewhere") == ["birds"]
    assert answers(target, world) == answers(state, world)
    assert set(hub.fetched) == set(committed(state))


def test_the_next_month_sends_and_fetches_what_is_new(world: Path, hub: Double, tmp_path: Path) -> None:
    perpetune.push(copied(world, tmp_path, "one"), REPO)
    behind = copied(world, tmp_path, "one", "behind")
    (behind / "notes.txt").write_text("mine")
    kept = {name: content for name, content in everything(behind).items() if name.startswith("kept/")}
    assert kept
    hub.forget()
    state = copied(world, tmp_path, "two", "ahead")
    done = perpetune.push(state, REPO)
    new = {path: c for path, c in committed(state).items() if committed(world / "one").get(path) != c}
    assert {path.split("/")[1] for path in new if "/" in path} == {"0001-m2"}
    card = len(hub.repos[REPO].files["README.md"])
    assert done.bytes == sum(hub.sent.values()) == sum(map(len, new.values())) + card
    assert done.unchanged == len(committed(state)) - len(new)
    assert perpetune.push(state, REPO).files == 0
    assert len(hub.repos[REPO].commits) == 3
    hub.forget()
    open_ = Learner.load(behind)
    got = perpetune.pull(REPO, behind)
    assert (got.tasks, set(hub.fetched)) == (["m2"], set(new))
    open_.refresh()  # as `serve` does: a program that has the state open takes it up
    assert open_.method.classes == Learner.load(state).method.classes
    assert got.bytes == sum(hub.fetched.values()) == sum(map(len, new.values()))
    assert one_less(behind) == {**committed(state), **kept, "notes.txt": b"mine"}
    assert answers(behind, world) == answers(state, world)
    Learner.load(behind).learn(world / "m3")  # it goes on here, and is ahead
    said, before = Said(), one_less(behind)
    assert perpetune.pull(REPO, behind, progress=said).tasks == []
    assert said.notes == [f"there is nothing to pull: {behind} has all that {REPO} has, and m3"]
    assert one_less(behind) == before
    assert perpetune.push(behind, REPO).commit == hub.repos[REPO].shas[-1]


def test_a_rollback_and_a_prune_follow(world: Path, hub: Double, tmp_path: Path) -> None:
    state, other = copied(world, tmp_path, "two"), tmp_path / "other"
    perpetune.push(state, REPO)
    perpetune.pull(REPO, other)
    Learner.load(state).prune(1)
    perpetune.push(state, REPO)
    perpetune.pull(REPO, other)
    assert committed(other) == committed(state) == state_on(hub)
    assert State(other).committed[0].pruned
    with State(state).writing():
        State(state).rollback("start")
    Learner.load(state).learn(world / "m3")
    done = perpetune.push(state, REPO)
    assert done.removed > 0
    assert perpetune.pull(REPO, other).tasks == ["m3"]
    assert committed(other) == committed(state) == state_on(hub)
    assert perpetune.pull(REPO, tmp_path / "new").tasks == ["m3"]  # not those that were rolled back


def test_histories_that_part_are_refused(world: Path, hub: Double, tmp_path: Path) -> None:
    two, other, said = copied(world, tmp_path, "two", "two"), copied(world, tmp_path, "other", "other"), Said()
    perpetune.push(two, REPO)
    there, before = state_on(hub), one_less(other)
    with pytest.raises(HubError, match=r"has commits \(m2\) that .*other does not have, and .*other has others, so"):
        perpetune.push(other, REPO)
    with pytest.raises(HubError, match=r"commits \(m3\) that me/birds does not have, and me/birds has others"):
        perpetune.pull(REPO, other)
    with pytest.raises(HubError, match=r"commits \(m2\) that .*: `perpetune pull me/birds .*one` first, or --force"):
        perpetune.push(copied(world, tmp_path, "one", "one"), REPO)
    assert (state_on(hub), one_less(other)) == (there, before)
    perpetune.push(other, REPO, force=True, progress=said)
    assert state_on(hub) == committed(other)
    assert "me/birds has commits (m2) that" in said.notes[0]


def test_only_what_is_committed_goes(world: Path, hub: Double, tmp_path: Path) -> None:
    """A task that was begun stays here; so do checkpoints and half-written files."""
    state = copied(world, tmp_path, "one")
    whole = committed(state)
    State(state).log("task begun", task=1, name="m2", fingerprint="x", **{"from": "y"})
    (state / "resume").mkdir()
    (state / "resume" / "task.json").write_text("{}")
    (state / "tasks" / ".0001-m2.0123456789abcdef.tmp").mkdir()
    (state / "tasks" / ".0001-m2.0123456789abcdef.tmp" / "half").write_text("")
    perpetune.push(state, REPO)
    assert state_on(hub) == whole
    perpetune.push(copied(world, tmp_path, "two", "two"), REPO)
    with pytest.raises(HubError, match=r"has begun task m2, which me/birds does not have; nothing was changed"):
        perpetune.pull(REPO, state)


def test_kept_features_go_where_that_is_asked_for(world: Path, hub: Double, tmp_path: Path) -> None:
    state = copied(world, tmp_path, "one")
    perpetune.push(state, REPO, kept=True)
    kept = {name: content for name, content in everything(state).items() if name.startswith("kept/")}
    assert state_on(hub) == {**committed(state), **kept}
    perpetune.pull(REPO, tmp_path / "new")
    assert everything(tmp_path / "new") == state_on(hub)
    assert perpetune.push(state, REPO).removed == len(kept)


def test_a_branch(world: Path, hub: Double, tmp_path: Path) -> None:
    one, two = copied(world, tmp_path, "one", "one"), copied(world, tmp_path, "two", "two")
    perpetune.push(one, REPO)
    perpetune.push(two, REPO, revision="try")
    assert state_on(hub) == committed(one)
    perpetune.pull(REPO, tmp_path / "new", revision="try")
    assert everything(tmp_path / "new") == committed(two)
    with pytest.raises(HubError, match="me/birds has no such branch, tag or commit; nothing was changed"):
        perpetune.pull(REPO, tmp_path / "none", revision="nope")


def test_places_on_this_computer_stay_as_they_are(world: Path, hub: Double, tmp_path: Path) -> None:
    """A state that was told where its model lies here can still follow; a changed recipe is kept beside the new one."""
    one, said = copied(world, tmp_path, "one", "one"), Said()
    perpetune.push(one, REPO)
    here, edited = tmp_path / "here", tmp_path / "edited"
    for folder in (here, edited):
        perpetune.pull(REPO, folder)
    shutil.copytree(world / "vit", tmp_path / "vit")
    Learner.relocate(here, model=f"folder:{tmp_path / 'vit'}", data=(str(world / "m1"), str(world / "m2")))
    changed = (edited / "recipe.yaml").read_text().replace("epochs: 1", "epochs: 2")
    (edited / "recipe.yaml").write_text(changed)
    perpetune.push(copied(world, tmp_path, "two", "two"), REPO)
    for folder in (here, edited):
        assert perpetune.pull(REPO, folder, progress=said).tasks == ["m2"]
    assert State(here).recipe.backbone.name == f"folder:{tmp_path / 'vit'}"
    assert State(here).backbone["spec"] == f"folder:{tmp_path / 'vit'}"
    assert State(here).moved() == [(str(world / "m1"), str(world / "m2"))]
    assert answers(here, world) == answers(tmp_path / "two", world)
    assert said.notes == [f"recipe.yaml is that of {REPO} now; the one from here is in recipe.before-pull.yaml"]
    assert (edited / "recipe.before-pull.yaml").read_text() == changed


def test_an_export(world: Path, hub: Double, tmp_path: Path) -> None:
    Learner.load(copied(world, tmp_path, "one")).export(tmp_path / "adapter")
    done = perpetune.push(tmp_path / "adapter", "me/adapter")
    files = hub.repos["me/adapter"].files
    whole = everything(tmp_path / "adapter")
    assert {path: content for path, content in files.items() if path != ".gitattributes"} == whole
    assert done.files == len(files) - 1
    perpetune.push(world / "one", REPO)
    with pytest.raises(HubError, match="me/birds holds a state; nothing was changed"):
        perpetune.push(tmp_path / "adapter", REPO)
    with pytest.raises(HubError, match=r"me/adapter holds something else than a state \(adapter_config.json"):
        perpetune.push(world / "one", "me/adapter")
    with pytest.raises(HubError, match=r"me/adapter holds no state, it has no recipe\.yaml"):
        perpetune.pull("me/adapter", tmp_path / "new")


# -- bad input ----------------------------------------------------------------------------------------------


def pack_of(files: dict[str, bytes]) -> str:
    return next(path for path in sorted(files) if "0001-m2/pack" in path)


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


FAULTS: dict[str, tuple[Callable[[dict[str, bytes]], tuple[str, bytes | None]], str]] = {
    "torn": (lambda f: (pack_of(f), f[pack_of(f)][:-9]), r"tasks/0001-m2/pack\.safetensors is torn or was ch"),
    "changed": (
        lambda f: (pack_of(f), flipped(f[pack_of(f)])),
        r"tasks/0001-m2/pack\.safetensors is torn or was ch",
    ),
    "small": (
        lambda f: ("tasks/0001-m2/task.json", f["tasks/0001-m2/task.json"].replace(b"fox", b"cow")),
        r"tasks/0001-m2/task\.json arrived with other bytes than its manifest says",
    ),
    "missing": (lambda f: ("tasks/0001-m2/metrics.json", None), r"tasks/0001-m2/metrics\.json is missing"),
    "manifest": (
        lambda f: ("tasks/0001-m2/manifest.json", f["tasks/0001-m2/manifest.json"] + b" "),
        r"tasks/0001-m2/manifest\.json is not the one that was written",
    ),
    "journal": (
        lambda f: ("journal.jsonl", f["journal.jsonl"].replace(b'"name": "m2"', b'"name": "m9"')),
        r"tasks/0001-m2 is not what the journal says",
    ),
    "no json": (lambda f: ("journal.jsonl", f["journal.jsonl"] + b"{]\n"), r"journal\.jsonl, line \d+: not an event"),
    "recipe": (lambda f: ("recipe.yaml", b"a: [1"), r"recipe\.yaml"),
    "no task": (lambda f: ("journal.jsonl", f["journal.jsonl"].split(b"\n")[0] + b"\n"), "no"),
}


@pytest.mark.parametrize("fault", chiefly(FAULTS, ["torn", "small", "missing", "manifest", "journal"]))
def test_what_is_torn_or_was_changed_is_named(fault: str, world: Path, hub: Double, tmp_path: Path) -> None:
    change, says = FAULTS[fault]
    perpetune.push(copied(world, tmp_path, "two", "two"), REPO)
    hub.repos[REPO].change(*change(hub.repos[REPO].files))
    behind = copied(world, tmp_path, "one", "behind")
    before = one_less(behind)
    for folder in (tmp_path / "new", behind):
        if fault == "no task" and folder == behind:
            continue  # a journal that is shorter than ours: there is nothing to pull
        with pytest.raises((HubError, StateError), match=says) as caught:
            perpetune.pull(REPO, folder)
        assert "nothing was changed" in str(caught.value)
        assert str(tmp_path / ".") not in str(caught.value).replace(str(behind), "")
    assert one_less(behind) == before
    assert sorted(os.listdir(tmp_path)) == ["behind", "two"]
    hub.repos[REPO].add("main", hub.repos[REPO].commits[1])  # the control: as it was, it is taken
    assert perpetune.pull(REPO, behind).tasks == ["m2"]


PATHS = ["../x", "tasks/../../x", "/etc/x", "a\\..\\x", "C:x", "a/./x", "a\nb"]


@pytest.mark.parametrize("path", chiefly(PATHS, ["../x", "a\\..\\x"]))
def test_a_path_that_leads_out_is_refused(path: str, world: Path, hub: Double, tmp_path: Path) -> None:
    perpetune.push(world / "one", REPO)
    hub.repos[REPO].change(path, b"x")
    with pytest.raises(HubError, match=r"has a file with the path .*, which is refused; nothing was changed"):
        perpetune.pull(REPO, tmp_path / "deep" / "new")
    assert os.listdir(tmp_path) == []
    hub.repos[REPO].change(path, None)
    hub.repos[REPO].change("more/x.txt", b"x")
    said = Said()
    perpetune.pull(REPO, tmp_path / "new", progress=said)
    assert said.notes == [f"1 files of {REPO} belong to no state and are left out: more/x.txt"]


def test_links_that_somebody_has_put_are_not_followed(world: Path, hub: Double, tmp_path: Path) -> None:
    perpetune.push(world / "one", REPO)
    aside, victim = tmp_path / ".new.pull", tmp_path / "victim"
    (aside / "new").mkdir(parents=True)
    victim.mkdir()
    (aside / "new" / "tasks").symlink_to(victim)
    (victim / "recipe.yaml").write_text("mine")
    (aside / "new" / "recipe.yaml").symlink_to(victim / "recipe.yaml")
    perpetune.pull(REPO, tmp_path / "new")
    assert everything(tmp_path / "new") == committed(world / "one")
    assert everything(victim) == {"recipe.yaml": b"mine"}
    (tmp_path / ".again.pull").symlink_to(victim)
    with pytest.raises(StateError, match=r"\.again\.pull is a link"):
        perpetune.pull(REPO, tmp_path / "again")


def refused(capfd: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str]:
    code = call([*map(str, arguments)])
    out, err = capfd.readouterr()
    assert out == ""
    assert TOKEN not in err
    return code, one_line(err)


def test_what_the_commands_refuse(
    world: Path, hub: Double, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    state, new = copied(world, tmp_path, "one"), tmp_path / "new"
    before = one_less(state)
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "x").write_text("x")
    perpetune.push(state, "me/public", public=True)
    assert not hub.repos["me/public"].private
    Learner(recipe(world / "vit", stream={}), tmp_path / "empty")
    for arguments, code, says in (
        (["push", state, "birds"], 2, "birds is no name of a repository: OWNER/NAME is expected, such as me/birds"),
        (["push", state, "../x"], 2, "../x is no name of a repository"),
        (["push", tmp_path / "none", REPO], 1, "none does not exist"),
        (["push", tmp_path / "empty", REPO], 1, "has learned nothing yet, so there is nothing to push"),
        (["push", state, "me/public"], 2, "me/public is public, so everybody could read this: say --public"),
        (["push", state, "somebody/birds"], 1, "the token does not allow this (somebody/birds); nothing was changed"),
        (["pull", "me/none", new], 1, "me/none is not on http"),
        (["pull", REPO, tmp_path / "else"], 2, "else exists and is no state folder: choose a new folder"),
    ):
        found = refused(capfd, *arguments)
        assert found[0] == code
        assert says in found[1]
    perpetune.push(state, REPO)
    with State(state).writing():
        assert "another process is writing to" in refused(capfd, "pull", REPO, state)[1]
        assert "another process is writing to" in refused(capfd, "push", state, REPO)[1]
    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrongwrong")
    for arguments in (["push", state, REPO], ["pull", REPO, new]):
        code, line = refused(capfd, *arguments)
        assert (code, "does not accept the token, or there is none" in line) == (1, True)
        assert "hf_wrong" not in line
    (state / "tasks" / "0000-m1" / "task.json").write_text("{}")
    code, line = refused(capfd, "push", state, REPO)
    assert (code, "0000-m1/task.json is torn or was changed" in line) == (1, True)
    assert one_less(state) != before
    assert not new.exists()


def test_without_network(
    world: Path, hub: Double, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    state = copied(world, tmp_path, "one")
    hub.close()
    for arguments in (["push", state, REPO], ["pull", REPO, tmp_path / "new"]):
        code, line = refused(capfd, *arguments)
        assert (code, f"{hub.url} cannot be reached" in line, "nothing was changed" in line) == (1, True, True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, line = refused(capfd, "push", state, REPO)
    assert (code, "HF_HUB_OFFLINE is set" in line) == (1, True)


def test_somebody_who_pushes_at_the_same_time(world: Path, hub: Double, tmp_path: Path) -> None:
    """The commit stands on the one that was looked at, or it is none; and what is left out there is seen."""
    one, two = copied(world, tmp_path, "one", "one"), copied(world, tmp_path, "two", "two")
    perpetune.push(one, REPO)
    before = hub_double._Handler.preupload

    def later(*given: Any, **more: Any) -> None:
        hub.repos[REPO].change("README.md", b"---\n---\nsomebody's\n")
        before(*given, **more)

    with pytest.MonkeyPatch.context() as patch:
        routes = [(r, m, later if act is before else act) for r, m, act in hub_double.ROUTES]
        patch.setattr(hub_double, "ROUTES", routes)
        with pytest.raises(HubError, match="me/birds was changed at the same time, so nothing was changed"):
            perpetune.push(two, REPO)
    assert state_on(hub) == committed(one)
    hub.repos[REPO].change(".gitignore", b"tasks/0001-m2/task.json\n")
    with pytest.raises(HubError, match=r"tasks/0001-m2/task.json is not there as it was sent .*\.gitignore"):
        perpetune.push(two, REPO)


def test_too_much_is_refused(world: Path, hub: Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    perpetune.push(world / "one", REPO)
    pulling = sys.modules["perpetune.hub.pulling"]
    with monkeypatch.context() as patch:
        patch.setitem(pulling.BOUNDS, "recipe.yaml", 10)
        with pytest.raises(HubError, match=r"recipe\.yaml has [\d,]+ bytes"):
            perpetune.pull(REPO, tmp_path / "new")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
        with pytest.raises(HubError, match=r"needs [\d,]+ bytes, and the disk has 0 free"):
            perpetune.pull(REPO, tmp_path / "new")
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["perpetune.hub.remote"], "MOST_FILES", 3)
        with pytest.raises(HubError, match="has more than 3 files"):
            perpetune.pull(REPO, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# -- processes and kills ------------------------------------------------------------------------------------


def command(warm: Warm, *arguments: Any) -> list[str]:
    return [*warm.command, str(Path(hub_double.__file__)), *map(str, arguments)]


def test_the_commands_as_processes(world: Path, hub: Double, tmp_path: Path, warm: Warm) -> None:
    def ran(verb: str, *arguments: Any) -> list[dict[str, Any]]:
        done = subprocess.run(command(warm, verb, *arguments, "--json"), capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        for line in lines[:-1]:
            fits_schema(line)
        fits_schema(lines[-1], verb)
        return lines

    state = copied(world, tmp_path, "two")
    note, done = ran("push", state, REPO, "--dry-run")
    assert "files" in note["message"]
    assert (done["dry_run"], done["commit"]) == (True, None)
    assert {method for method, _ in hub.asked} == {"GET"}
    assert hub.repos == {}
    assert ran("push", state, REPO)[-1]["bytes"] == done["bytes"]
    *files, done = ran("pull", REPO, tmp_path / "new")
    assert {line["path"]: line["bytes"] for line in files} == {p: len(c) for p, c in committed(state).items()}
    assert everything(tmp_path / "new") == committed(state)
    plain = subprocess.run(command(warm, "pull", REPO, tmp_path / "new"), capture_output=True, text=True, check=False)
    assert plain.returncode == 0
    journal = len(committed(state)["journal.jsonl"])
    assert plain.stdout == f"{tmp_path / 'new'}: 1 file, {journal:,} bytes; nothing new\n"
    assert "nothing to pull" in one_line(plain.stderr)
    environment = {**os.environ, "HF_TOKEN": "hf_wrongwrongwrong"}
    for words in (["push", state, REPO], ["pull", REPO, tmp_path / "none"]):
        done = subprocess.run(command(warm, *words), capture_output=True, text=True, env=environment, check=False)
        assert (done.returncode, "does not accept the token" in one_line(done.stderr)) == (1, True)


@pytest.mark.slow
def test_as_a_user_starts_them(world: Path, hub: Double, tmp_path: Path) -> None:
    """New interpreters, which take the address of the hub from the environment alone."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    for words in (["push", world / "two", REPO], ["pull", REPO, tmp_path / "new"]):
        program = [sys.executable, "-m", "perpetune", *map(str, words)]
        done = subprocess.run(program, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
    assert everything(tmp_path / "new") == committed(world / "two")


def free(folder: Path) -> bool:
    """Whether nobody holds the lock of a folder."""
    try:
        with locked(folder):
            return True
    except StateError:
        return False


@pytest.mark.parametrize("there", [False, True])
def test_a_pull_that_is_killed_changes_nothing_and_goes_on(
    there: bool, world: Path, hub: Double, tmp_path: Path, warm: Warm
) -> None:
    perpetune.push(world / "two", REPO)
    state = tmp_path / "birds"
    if there:
        copied(world, tmp_path, "one")
    before = one_less(state) if there else {}
    wait, reached = threading.Event(), threading.Event()

    def gate(path: str) -> None:
        if path == pack_of(hub.repos[REPO].files):
            reached.set()
            wait.wait(30)

    hub.gate = gate
    process = subprocess.Popen(command(warm, "pull", REPO, state))
    assert reached.wait(30)
    while len(hub.fetched) < 6:  # others come at the same time
        assert not wait.wait(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    while not free(tmp_path / ".birds.pull"):  # the fork ends a moment after what stands for it
        assert not wait.wait(0.02)
    wait.set()
    assert (one_less(state) if there else {}) == before
    assert state.exists() is there
    have = {path for path in everything(tmp_path / ".birds.pull" / "new") if not path.startswith(".cache")}
    hub.gate = lambda path: None
    hub.forget()
    assert perpetune.pull(REPO, state).tasks == (["m2"] if there else ["m1", "m2"])
    assert committed(state) == committed(world / "two")
    assert not have & set(hub.fetched) - {"journal.jsonl"}
    assert os.listdir(tmp_path) == ["birds"]


def test_a_file_system_without_an_exchange(
    world: Path, hub: Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two renames then. Where the second one fails, or a kill comes between them, the old state comes back."""
    perpetune.push(world / "two", REPO)
    state = copied(world, tmp_path, "one")
    before, replace = one_less(state), os.replace
    pulling = sys.modules["perpetune.hub.pulling"]

    def none(one: Path, other: Path) -> None:
        raise OSError(38, "Function not implemented")

    def fails(one: Any, other: Any) -> None:
        if Path(other) == state and Path(one).name == "new":
            raise OSError(5, "Input/output error", str(one))
        replace(one, other)

    monkeypatch.setattr(pulling, "exchange", none)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails)
        with pytest.raises(OSError, match="Input/output error"):
            perpetune.pull(REPO, state)
    assert one_less(state) == before
    state.rename(tmp_path / ".birds.before-pull")  # a kill between the two
    shutil.rmtree(tmp_path / ".birds.pull")
    shutil.copytree(world / "other", tmp_path / ".birds.pull" / "new")  # what an older kill has left
    assert perpetune.pull(REPO, state).tasks == ["m2"]
    assert committed(state) == committed(world / "two")
    assert os.listdir(tmp_path) == ["birds"]


def test_a_lock_is_one_of_the_folder_that_has_the_name_now(world: Path, tmp_path: Path) -> None:
    """A writer that has opened the lock of a state, which a pull then replaces, does not write to the new one."""
    from perpetune.state import lock

    state, opened = copied(world, tmp_path, "one"), lock.open_no_link

    def late(path: Any, flags: int) -> int:
        found = opened(path, flags)
        state.rename(tmp_path / "old")
        shutil.copytree(world / "two", state)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lock, "open_no_link", late)
        with pytest.raises(StateError, match="another process has just replaced"), State(state).writing():
            pass
    with State(state).writing():
        pass

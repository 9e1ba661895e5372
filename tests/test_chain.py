"""One chain of hashes over a state, typed documents, and nothing through links: whatever was changed is named."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load, save
from tiny import paired, picture_folder, recipe, seal, split_folder, task_files, vit_folder

from perpetune.cli import call
from perpetune.errors import StateError
from perpetune.files import MANIFEST, read_folder, to_json, write_file, write_folder
from perpetune.learner import Learner
from perpetune.results import read_results
from perpetune.state import State


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`state` of three tasks (ab, cd, ef), `other`, the same with another seed, and pictures to ask about."""
    world = tmp_path_factory.mktemp("world")
    model = vit_folder(world / "vit")
    pictures = split_folder(world / "pictures", "abcdef", 6, 3)
    Learner(recipe(model, pictures), world / "state").run()
    Learner(recipe(model, pictures, seed=5), world / "other").run()
    picture_folder(world / "ask", ["a"], 1)
    picture_folder(world / "more", ["a", "g"], 4)
    return world


@pytest.fixture
def state(world: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world / "state", tmp_path / "state"))


def last(state: Path) -> Path:
    return max((state / "tasks").iterdir())


def rewrite(state: Path, name: str, change: Callable[[bytes], bytes], folder: Path | None = None) -> None:
    """Change one file of a task, by default of the last, and its entry in the manifest."""
    folder = folder or last(state)
    files = task_files(folder)
    shutil.rmtree(folder)
    write_folder(folder, {**files, name: change(files[name])})


def as_json(change: Callable[[Any], Any]) -> Callable[[bytes], bytes]:
    def changed(content: bytes) -> bytes:
        plain = json.loads(content)
        return json.dumps(change(plain) or plain).encode()

    return changed


def as_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[bytes], bytes]:
    def changed(content: bytes) -> bytes:
        found = load(content)
        change(found)
        return save(found)

    return changed


# -- the chain ----------------------------------------------------------------------------------------------


def of_another(state: Path, world: Path) -> None:
    other = task_files(last(world / "other"))["head.safetensors"]
    rewrite(state, "head.safetensors", lambda _: other)


def in_another_order(state: Path, world: Path) -> None:
    def turned(extra: dict[str, Any]) -> None:
        for entry in extra.values():
            if isinstance(entry, dict) and "classes" in entry:
                entry["classes"].reverse()

    rewrite(state, "extra.json", as_json(turned))


def not_finite(state: Path, world: Path) -> None:
    rewrite(state, "pet.safetensors", as_tensors(lambda t: next(iter(t.values())).fill_(float("nan"))))


def older_in_its_place(state: Path, world: Path) -> None:
    folder = last(state)
    files = read_folder(state / "tasks" / "0001-c-d")
    shutil.rmtree(folder)
    write_folder(folder, files)


def other_altogether(state: Path, world: Path) -> None:
    folder = last(state)
    shutil.rmtree(folder)
    shutil.copytree(last(world / "other"), folder)


def written_again(state: Path, world: Path) -> None:
    """The same files, in another order in the manifest."""
    folder = last(state)
    files = read_folder(folder)
    shutil.rmtree(folder)
    write_folder(folder, dict(reversed(files.items())))


CHANGED: dict[str, Callable[[Path, Path], None]] = {
    "a head of another state": of_another,
    "classes in another order": in_another_order,
    "adapters that are not finite": not_finite,
    "an older task's folder in the last one's place": older_in_its_place,
    "the last folder of another state": other_altogether,
    "another manifest of the same files": written_again,
}
VERBS = ["predict", "evaluate", "export", "report", "resume", "update", "compare"]


def command(verb: str, state: Path, world: Path, tmp_path: Path) -> list[str]:
    more = {
        "predict": [str(world / "ask" / "a")],
        "export": [str(tmp_path / "exported")],
        "update": ["--data", str(world / "more"), "-q"],
        "resume": ["-q"],
        "compare": [str(world / "state")],
    }
    return [verb, str(state), *more.get(verb, [])]


def refused(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    capfd.readouterr()
    assert call(arguments) == 1
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1, said.err
    assert "Traceback" not in said.err
    return said.err


@pytest.mark.parametrize("what", CHANGED)
def test_a_changed_folder_is_named_by_every_verb(
    what: str, world: Path, state: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    CHANGED[what](state, world)
    folder = last(state)
    for verb in VERBS:
        said = refused(command(verb, state, world, tmp_path), capfd)
        assert f"{folder / MANIFEST} is not the one that was written when the task was committed" in said
        assert f"`perpetune rollback {state} --to c-d`" in said
    assert call(["rollback", str(state), "--to", "c-d"]) == 0
    assert call(["resume", str(state), "-q"]) == 0
    assert call(command("predict", state, world, tmp_path)) == 0


def test_a_missing_last_folder_is_named_and_rolled_back(
    world: Path, state: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = last(state)
    shutil.rmtree(folder)
    for verb in VERBS:
        said = refused(command(verb, state, world, tmp_path), capfd)
        assert f"{folder} is missing, and the journal says that the task was committed" in said
        assert f"`perpetune rollback {state} --to c-d`" in said
    assert call(["rollback", str(state), "--to", "c-d"]) == 0
    assert capfd.readouterr().out.startswith("dropped e-f; ")
    assert [t.name for t in State(state).committed] == ["a-b", "c-d"]
    assert call(["resume", str(state), "-q"]) == 0
    assert [t.name for t in State(state).committed] == ["a-b", "c-d", "e-f"]


def test_a_folder_that_the_journal_does_not_know(world: Path, state: Path, tmp_path: Path) -> None:
    shutil.copytree(last(state), state / "tasks" / "0003-x")
    with pytest.raises(StateError, match=r"0003-x: the journal says nothing of this task's commit"):
        _ = State(state).committed
    assert call(["rollback", str(state), "--to", "e-f"]) == 0
    assert [t.name for t in State(state).committed] == ["a-b", "c-d", "e-f"]


def test_a_folder_under_another_name(state: Path) -> None:
    last(state).rename(state / "tasks" / "0002-x")
    with pytest.raises(StateError, match=r"0002-x is not what the journal says: task 2 is 'e-f' there"):
        _ = State(state).committed


@pytest.mark.parametrize(
    ("key", "value"),
    [("pet.alpha", 32), ("pet.rank", 3), ("pet.at", ["q"]), ("head.name", "cosine"), ("method.name", "olora")],
)
def test_another_meaning_of_the_recipe_is_named(
    key: str, value: Any, world: Path, state: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = state / "recipe.yaml"
    content = yaml.safe_load(path.read_text())
    section, _, name = key.partition(".")
    assert content[section][name] != value
    content[section] = {**content[section], name: value} if name != "name" else {"name": value}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    said = refused(command("predict", state, world, tmp_path), capfd)
    assert str(state) in said
    if key == "pet.alpha":  # the others do not fit the tensors
        assert f"{path}: pet.alpha is 32.0, and was 16.0 when task e-f was learned: put it back" in said


def edit_recipe(state: Path, **sections: Any) -> None:
    """Change keys of sections of the state's recipe, or values beside the sections; None removes a key."""
    path = state / "recipe.yaml"
    content = yaml.safe_load(path.read_text())
    for section, changes in sections.items():
        if isinstance(changes, dict) and isinstance(content[section], dict):
            content[section] = {k: v for k, v in {**content[section], **changes}.items() if v is not None}
        else:
            content[section] = changes
    path.write_text(yaml.safe_dump(content, sort_keys=False))


def said_of_edits(arguments: list[str]) -> list[str]:
    """The warnings about an edited recipe that a command gives; the command line prints each as one line."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert call(arguments) == 0
    return [str(w.message) for w in said if "was changed since task" in str(w.message)]


EDITS: dict[str, tuple[dict[str, Any], str]] = {
    "an option of the method": ({"method": {"head_first": 0.5}}, "method.head_first is 0.5 (was 0.0)"),
    "a rate": ({"train": {"lr": 0.001}}, "train.lr is 0.001 (was 0.01)"),
    "a key that is gone": ({"train": {"lr": None}}, "train.lr is "),
    "the seed": ({"seed": 7}, "seed is 7 (was 0)"),
    "the setting": ({"setting": "task"}, 'setting is "task" (was "class")'),
    "the stream": ({"stream": {"classes_per_task": 3}}, "stream.classes_per_task is 3 (was 2)"),
    "precision": ({"run": {"precision": "bf16"}}, 'run.precision is "bf16" (was "no")'),
    "several": ({"train": {"lr": 0.001, "epochs": 1}}, "train.epochs is 1 (was 2), train.lr is 0.001 (was 0.01); "),
}


@pytest.mark.parametrize("what", EDITS)
def test_a_changed_training_in_the_recipe_is_said(what: str, world: Path, state: Path, tmp_path: Path) -> None:
    """It may be changed by hand, but every verb that uses the model says it until a task is learned by it."""
    for verb in ("predict", "evaluate", "export") if what == next(iter(EDITS)) else ():
        assert said_of_edits(command(verb, state, world, tmp_path / "before")) == []
    edit_recipe(state, **EDITS[what][0])
    for verb in ("predict", "evaluate", "export"):
        (line,) = said_of_edits(command(verb, state, world, tmp_path))
        assert f"{state / 'recipe.yaml'} was changed since task e-f was learned: {EDITS[what][1]}" in line
        assert line.endswith("; the model answers and learns by the file as it is now")


def test_what_was_learned_by_a_changed_recipe_is_said_no_more(world: Path, state: Path, tmp_path: Path) -> None:
    edit_recipe(state, train={"lr": 0.02})
    assert len(said_of_edits(command("update", state, world, tmp_path))) == 1
    assert said_of_edits(command("predict", state, world, tmp_path)) == []
    assert call(["rollback", str(state), "--to", "e-f"]) == 0
    assert len(said_of_edits(command("predict", state, world, tmp_path))) == 1


def test_an_option_that_decides_answers_is_said(world: Path, tmp_path: Path) -> None:
    content = recipe(world / "vit", world / "pictures", method={"name": "treelora", "answer": "routed"})
    Learner(content, tmp_path / "tree").run()
    edit_recipe(tmp_path / "tree", method={"answer": "merged"})
    (line,) = said_of_edits(command("predict", tmp_path / "tree", world, tmp_path))
    assert 'method.answer is "merged" (was "routed")' in line


def test_places_in_the_recipe_may_change(world: Path, state: Path, tmp_path: Path) -> None:
    """The model's fingerprint says whether it is the same; threads and devices change nothing."""
    moved = shutil.copytree(world / "vit", tmp_path / "moved")
    edit_recipe(state, backbone={"name": f"folder:{moved}"}, run={"threads": 1, "workers": 0})
    assert said_of_edits(command("predict", state, world, tmp_path)) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [("examples", "texts"), ("parameters", 7), ("trainable_parameters", 7), ("date", "2020-01-31"), ("mine", True)],
)
def test_another_backbone_json_is_named(
    key: str, value: Any, world: Path, state: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = state / "backbone.json"
    before = json.loads(path.read_bytes()).get(key)
    path.write_bytes(as_json(put(key, value=value))(path.read_bytes()))
    for verb in ("predict", "evaluate", "export", "update"):
        said = refused(command(verb, state, world, tmp_path), capfd)
        assert f"{path}: {key} is {json.dumps(value)}, and was {json.dumps(before)} when task e-f was learned" in said


# -- states of the version before ---------------------------------------------------------------------------


def older(state: Path) -> Path:
    """What the version before has written: no hashes in the journal, no `recipe.json`, all tensors in each folder."""
    for folder in sorted((state / "tasks").iterdir(), reverse=True):
        files = {name: content for name, content in task_files(folder).items() if name != "recipe.json"}
        shutil.rmtree(folder)
        write_folder(folder, files)
    path = state / "journal.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in e.items() if k != "manifest"}) + "\n" for e in events))
    return state


def test_an_older_state_is_accepted_in_one_line_and_sealed_by_the_next_writer(
    world: Path, state: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    older(state)
    with pytest.warns(UserWarning, match=r"holds no hash of what was committed for a-b, c-d, e-f, as older") as said:
        Learner.load(state)
    assert len([w for w in said if "holds no hash" in str(w.message)]) == 1
    events = State(state).journal()
    assert len(read_results(State(state))["tasks"]) == 3
    assert State(state).journal() == events  # no reader writes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Learner.load(state).learn(world / "more", name="more")
    assert [e["event"] for e in State(state).journal()].count("tasks sealed") == 1
    assert all(task.manifests for task in State(state).committed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Learner.load(state)
    rewrite(state, "metrics.json", lambda content: content + b" ", state / "tasks" / "0001-c-d")
    assert "0001-c-d" in refused(["report", str(state)], capfd)


def test_an_older_state_whose_rollback_was_killed_loads(state: Path) -> None:
    older(state)
    shutil.rmtree(last(state))
    with pytest.warns(UserWarning, match="holds no hash"):
        learner = Learner.load(state)
    learner.resume()
    assert [t.name for t in State(state).committed] == ["a-b", "c-d", "e-f"]


def test_a_state_without_a_journal_is_said(state: Path) -> None:
    (state / "journal.jsonl").unlink()
    with pytest.warns(UserWarning, match="holds no hash"):
        Learner.load(state)


def test_the_journal_names_what_is_there(state: Path) -> None:
    commits = [e for e in State(state).journal() if e["event"] == "task committed"]
    assert [e["manifest"] for e in commits] == [
        hashlib.sha256((t.folder / MANIFEST).read_bytes()).hexdigest() for t in State(state).committed
    ]


def test_a_commit_that_is_told_twice_is_one(state: Path) -> None:
    """As a kill at the wrong moment made it in older versions."""
    path = state / "journal.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[-1], lines[-1], ""]))
    assert [t.name for t in State(state).committed] == ["a-b", "c-d", "e-f"]
    with State(state).writing():
        assert State(state).rollback("c-d") == ["e-f"]
    assert [t.name for t in State(state).committed] == ["a-b", "c-d"]


# -- rollback -----------------------------------------------------------------------------------------------


def test_a_rollback_checks_all_before_it_removes_anything(
    world: Path, state: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    mine = Path(shutil.copytree(state / "tasks" / "0001-c-d", tmp_path / "mine"))
    shutil.rmtree(state / "tasks" / "0001-c-d")
    (state / "tasks" / "0001-c-d").symlink_to(mine)
    before = sorted(tmp_path.rglob("*"))
    said = refused(["rollback", str(state), "--to", "a-b"], capfd)
    assert f"{state / 'tasks' / '0001-c-d'} is a link" in said
    assert sorted(p for p in tmp_path.rglob("*") if p.name != ".lock") == [p for p in before if p.name != ".lock"]


def test_a_rollback_to_a_damaged_task_removes_nothing(state: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = state / "tasks" / "0001-c-d" / "pack.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    said = refused(["rollback", str(state), "--to", "c-d"], capfd)
    assert f"{path} is torn or was changed" in said
    assert f"`perpetune rollback {state} --to a-b`" in said
    assert len(list((state / "tasks").iterdir())) == 3


def test_a_killed_rollback_is_ended_by_the_next_writer(state: Path) -> None:
    opened = State(state)
    opened.log("rollback begun", to="a-b", keep=1)
    shutil.rmtree(last(state))
    assert [t.name for t in State(state).committed] == ["a-b", "c-d"]
    with opened.writing():
        assert [t.name for t in opened.committed] == ["a-b"]
    events = opened.journal()
    assert events[-1] | {"time": ""} == {
        "time": "",
        "event": "rolled back",
        "to": "a-b",
        "dropped": ["c-d", "e-f"],
        "keep": 1,
    }


# -- typed documents ----------------------------------------------------------------------------------------


def put(*keys: Any, value: Any) -> Callable[[Any], None]:
    def change(plain: Any) -> None:
        for key in keys[:-1]:
            plain = plain[key]
        plain[keys[-1]] = value

    return change


def drop(*keys: Any) -> Callable[[Any], None]:
    def change(plain: Any) -> None:
        for key in keys[:-1]:
            plain = plain[key]
        del plain[keys[-1]]

    return change


CELL = ("cells", "e-f")
DOCUMENTS: list[tuple[str, str, Callable[[Any], Any]]] = [
    *(("task.json", key, drop(key)) for key in ("index", "name", "classes", "train", "test", "fingerprint", "bad")),
    *(("task.json", key, put(key, value=7)) for key in ("name", "classes", "from", "fingerprint", "bad", "warnings")),
    *(("task.json", key, put(key, value=value)) for key in ("train", "test") for value in (-1, "3", None, 1.5, True)),
    ("task.json", "is about task 1", put("index", value=1)),
    ("task.json", "is about task 2, x", put("name", value="x")),
    ("task.json", "stands twice", put("classes", value=["e", "e"])),
    ("task.json", "from.holdout", put("from", value={"name": "imagefolder", "holdout": "much"})),
    ("task.json", "from.holdout is missing", put("from", value={"name": "imagefolder"})),
    ("task.json", "a JSON object is expected", lambda _: [1]),
    ("metrics.json", "cells", drop("cells")),
    ("metrics.json", "cells", put("cells", value=[])),
    ("metrics.json", "cells.e-f", put("cells", "e-f", value=3)),
    ("metrics.json", "correct is 99, and there are 6 examples", put(*CELL, "correct", value=99)),
    ("metrics.json", "cells.e-f.correct", put(*CELL, "correct", value=-1)),
    ("metrics.json", "cells.e-f.total", put(*CELL, "total", value="6")),
    ("metrics.json", "cells.e-f.total", drop(*CELL, "total")),
    ("metrics.json", "not a finite number", put(*CELL, "correct", value=float("nan"))),
    ("metrics.json", "not a finite number", put("drift", value={"a-b": float("inf")})),
    ("metrics.json", "per_class.e: 9 right answers of 3", put(*CELL, "per_class", "e", value=[9, 3])),
    ("metrics.json", "cells.e-f.per_class.e", put(*CELL, "per_class", "e", value=[3])),
    ("metrics.json", "more examples than the task", put(*CELL, "per_class", "e", value=[3, 300])),
    ("metrics.json", "facts", put("facts", value=[1])),
    ("metrics.json", "drift", put("drift", value={"a-b": "far"})),
    ("metrics.json", "protection", put("protection", value={"a": 1})),
    *(("timings.json", key, drop(key)) for key in ("learn_s", "evaluate_s", "images")),
    *(("timings.json", "learn_s", put("learn_s", value=value)) for value in ("1", -1.0, None, [1])),
    ("timings.json", "images", put("images", value=1.5)),
]


@pytest.mark.parametrize(("name", "says", "change"), DOCUMENTS)
def test_a_documents_field_is_named(
    name: str, says: str, change: Callable[[Any], Any], state: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rewrite(state, name, as_json(change))
    seal(state)
    said = refused(["report", str(state)], capfd)
    assert str(last(state) / name) in said
    assert says in said
    if name == "task.json":
        said = refused(["evaluate", str(state)], capfd)
        assert says in said


EXTRA: list[tuple[str, Callable[[Any], Any]]] = [
    ("entries do not fit", lambda extra: extra.clear()),
    ("entries do not fit", put("stranger", value=1)),
    ("a JSON object is expected", lambda _: [1]),
    *(
        ("is not what a", lambda extra, value=value: dict.fromkeys(extra, value))
        for value in (None, 1, "x", [], {}, {"classes": 3}, {"classes": "abc"}, {"classes": ["a", "a"]})
    ),
]


@pytest.mark.parametrize(("says", "change"), EXTRA)
def test_an_entry_of_extra_is_named(
    says: str, change: Callable[[Any], Any], world: Path, state: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rewrite(state, "extra.json", as_json(change))
    seal(state)
    said = refused(command("predict", state, world, tmp_path), capfd)
    assert str(last(state)) in said
    assert "extra.json" in said
    assert says in said


@pytest.mark.parametrize("file", ["pet.safetensors", "head.safetensors"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_tensors_that_are_not_finite_are_named(
    file: str, value: float, world: Path, state: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rewrite(state, file, as_tensors(lambda t: next(iter(t.values())).view(-1)[:1].fill_(value)))
    seal(state)
    said = refused(command("predict", state, world, tmp_path), capfd)
    assert f"{last(state)}/{file}: " in said
    assert "holds values that are not finite" in said


JOURNAL: list[tuple[str, dict[str, Any]]] = [
    ("task begun: task", {"event": "task begun", "task": "0", "name": "a"}),
    ("task begun: task", {"event": "task begun", "task": -1, "name": "a"}),
    ("task begun: task", {"event": "task begun", "task": 10**30, "name": "a"}),
    ("task begun: name", {"event": "task begun", "task": 0}),
    ("task begun: from", {"event": "task begun", "task": 0, "name": "a", "from": 3}),
    ("task committed: name", {"event": "task committed", "task": 0, "name": None}),
    ("task committed: manifest", {"event": "task committed", "task": 0, "name": "a", "manifest": "no hash"}),
    ("rolled back: dropped", {"event": "rolled back", "to": "a", "dropped": "a"}),
    ("rolled back: to", {"event": "rolled back", "dropped": []}),
    ("rollback begun: keep", {"event": "rollback begun", "to": "a", "keep": -1}),
    ("run begun: versions", {"event": "run begun", "versions": [1]}),
    ("run begun: tasks", {"event": "run begun", "tasks": "3"}),
    ("tasks sealed: manifests", {"event": "tasks sealed", "manifests": [3]}),
]


@pytest.mark.parametrize(("line", "verb"), paired(JOURNAL, ["report", "log", "predict", "resume"]))
def test_a_field_of_the_journal_is_named(
    line: tuple[str, dict[str, Any]],
    verb: str,
    world: Path,
    state: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (says, event), path = line, state / "journal.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], json.dumps({"time": "", **event}), *lines[1:], ""]))
    said = refused(command(verb, state, world, tmp_path), capfd)
    assert f"{path}, line 2: {says}" in said


BACKBONE = [put("spec", value=1), drop("fingerprint"), put("parameters", value="many"), put("examples", value=[1])]


@pytest.mark.parametrize("change", BACKBONE)
def test_a_field_of_the_backbone_is_named(
    change: Callable[[Any], Any], world: Path, state: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = state / "backbone.json"
    path.write_bytes(as_json(change)(path.read_bytes()))
    for verb in ("predict", "report"):
        assert f"{path} is missing or torn (" in refused(command(verb, state, world, tmp_path), capfd)


MANIFESTS: list[Callable[[Any], Any]] = [
    put("pack.safetensors", value=3),
    put("pack.safetensors", "bytes", value=-1),
    put("pack.safetensors", "bytes", value=True),
    put("pack.safetensors", "sha256", value="x"),
    put("../../recipe.yaml", value={"bytes": 1, "sha256": "0" * 64}),
    lambda _: [1],
]


@pytest.mark.parametrize("change", MANIFESTS)
def test_a_field_of_the_manifest_is_named(
    change: Callable[[Any], Any], world: Path, state: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = last(state) / MANIFEST
    path.write_bytes(as_json(change)(path.read_bytes()))
    seal(state)
    assert f"{path} is missing or torn" in refused(command("predict", state, world, tmp_path), capfd)


# -- links and what is no file ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tasks", "resume", "journal.jsonl", ".lock"])
@pytest.mark.parametrize("verb", ["update", "rollback", "resume"])
def test_nothing_is_written_through_a_link(
    name: str, verb: str, world: Path, state: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine"
    if (state / name).exists():
        shutil.move(state / name, mine)
    elif name == "resume":
        mine.mkdir()
        (mine / "notes.txt").write_text("mine")
    else:
        mine.write_text("mine")
    (state / name).symlink_to(mine)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    more = ["--to", "a-b"] if verb == "rollback" else command(verb, state, world, tmp_path)[2:]
    said = refused([verb, str(state), *more], capfd)
    assert f"{state / name} is a link: perpetune writes and removes nothing through links" in said
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_report_that_is_a_link_is_replaced_and_what_it_points_to_stays(
    state: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.html"
    mine.write_text("mine")
    for name in ("report.html", ".report.html.tmp", ".report.md.tmp"):
        (state / name).unlink(missing_ok=True)
        (state / name).symlink_to(mine)
    assert call(["report", str(state)]) == 0
    assert mine.read_text() == "mine"
    assert not (state / "report.html").is_symlink()
    with State(state).writing():
        pass
    assert mine.read_text() == "mine"
    assert not (state / ".report.html.tmp").is_symlink()


def test_leftovers_of_others_stay(state: Path, tmp_path: Path) -> None:
    mine = [state / ".notes.tmp", state / "tasks" / ".notes.gone", state / ".x.0123456789abcdef.tmp"]
    for path in mine:
        path.write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("mine")
    (state / ".resume.gone").symlink_to(tmp_path / "folder")
    ours = [state / ".recipe.yaml.tmp", state / "tasks" / ".0003-x.0123456789abcdef.tmp"]
    for path in ours:
        path.write_text("half")
    with State(state).writing():
        pass
    assert [path.read_text() for path in [*mine, tmp_path / "folder" / "file"]] == ["mine"] * 4
    assert not any(os.path.lexists(path) for path in [*ours, state / ".resume.gone"])


def test_temporary_names_cannot_be_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    replace = os.replace

    def watched(source: Any, target: Any) -> None:
        names.append(Path(source).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    for _ in range(3):
        write_file(tmp_path / "report.html", b"x")
    assert len(set(names)) == 3
    assert all(re.fullmatch(r"\.report\.html\.[0-9a-f]{16}\.tmp", name) for name in names)


@pytest.mark.parametrize("where", ["recipe.yaml", "backbone.json", "journal.jsonl", "tasks/0002-e-f/pack.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_nothing_but_a_file_is_read(
    where: str, kind: str, world: Path, state: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = state / where
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    said = refused(command("predict", state, world, tmp_path), capfd)
    assert str(path) in said or (where == "recipe.yaml" and "not a state folder" in said)


def test_a_file_that_is_larger_than_its_manifest_says_is_not_read(world: Path, state: Path) -> None:
    path = last(state) / "pack.safetensors"
    with open(path, "ab") as file:
        file.truncate(2**40)  # a hole: nothing on the disk, and more than any memory
    with pytest.raises(StateError, match="is torn or was changed"):
        Learner.load(state)


def test_a_state_is_not_made_in_a_folder_whose_tasks_are_a_link(world: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "tasks").symlink_to(tmp_path / "mine")
    assert call(["init", str(tmp_path / "new"), "--set", "run.device=cpu"]) == 2
    assert list((tmp_path / "mine").iterdir()) == []


def test_json_is_written_as_before(tmp_path: Path) -> None:
    write_folder(tmp_path / "0000-a", {"x.json": to_json({"a": 1})})
    assert read_folder(tmp_path / "0000-a") == {"x.json": b'{\n  "a": 1\n}\n'}

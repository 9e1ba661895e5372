"""The Python API: one object over one state folder."""

from __future__ import annotations

import copy
import inspect
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import SIZE, picture, picture_folder, recipe, split_folder, vit_folder

import perpetune
from perpetune import Examples, Learner, Recipe, Task, load_recipe
from perpetune.data.pictures.folder import FolderSource
from perpetune.data.pictures.manifest import ManifestSource
from perpetune.errors import DataError, Interrupted, PerpetuneError, StateError, UsageError
from perpetune.pets import frozen
from perpetune.recipe import make_recipe
from perpetune.results import read_results
from perpetune.runtime import Silent
from perpetune.snapshot import tensors
from perpetune.state import State
from perpetune.stopping import stop_signals


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vit_folder(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes, with a test split."""
    return split_folder(tmp_path_factory.mktemp("data"), "abcd", 8, 4)


@pytest.fixture(scope="module")
def two_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One known class and a new one, without a test split."""
    return picture_folder(tmp_path_factory.mktemp("two"), ["d", "e"], 10, first=50)


@pytest.fixture(scope="module")
def finished(vit: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state of a run of two tasks; copy it before you change it."""
    folder = tmp_path_factory.mktemp("finished") / "state"
    Learner(recipe(vit, data, head="ncm"), folder).run()
    return folder


@pytest.fixture
def state(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "state"))


class Notes(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.tasks: list[tuple[int, str, int, int]] = []
        self.results_seen: list[int] = []

    def note(self, message: str) -> None:
        if "brings new classes" not in message:  # see tests/test_data_labels.py
            self.notes.append(message)

    def task(self, index: int, name: str, classes: int, examples: int) -> None:
        self.tasks.append((index, name, classes, examples))

    def results(self, results: dict[str, Any]) -> None:
        self.results_seen.append(len(results["tasks"]))


def weights(learner: Learner) -> dict[str, Any]:
    return {name: t.clone() for group in tensors(learner.method).values() for name, t in group.items()}


def assert_equal(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


# -- making one ---------------------------------------------------------------------------------------


def test_a_recipe_may_be_a_name_a_file_a_mapping_or_a_recipe(vit: Path, tmp_path: Path) -> None:
    content = recipe(vit)
    path = tmp_path / "mine.yaml"
    path.write_text(make_recipe(content).to_yaml())
    made = [Learner(given).recipe for given in (content, path, str(path), load_recipe(path), make_recipe(content))]
    assert all(r == made[0] for r in made)
    assert isinstance(made[0], Recipe)
    assert made[0].backbone.name == f"folder:{vit}"
    named = Learner("update")
    assert named.recipe.description == load_recipe("update").description
    assert named.recipe.backbone.name == "perpetune:micro"


def test_the_front_door_is_in_the_package() -> None:
    for name in perpetune.__all__:
        assert not inspect.ismodule(getattr(perpetune, name)), f"{name} is a name and a module"
    with pytest.raises(AttributeError, match="no attribute 'learner_'"):
        perpetune.learner_  # noqa: B018


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"metod": "finetune"}, "metod is not an option; closest: "),
        ({"method": "finetuned"}, "methods: there is no 'finetuned'; "),
        ("demos", "there is no recipe 'demos'; "),
        ({"backbone": "folder:/nowhere/at/all"}, "there is no such folder"),
    ],
)
def test_a_recipe_that_cannot_be_used(given: Any, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        Learner(given)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_a_folder_the_state_is_temporary_until_it_is_saved(
    vit: Path, two_classes: Path, tmp_path: Path
) -> None:
    learner = Learner(recipe(vit))
    learner.learn(two_classes)
    place = learner.state.folder
    assert place.is_dir()
    saved = learner.save(tmp_path / "kept")
    assert saved == tmp_path / "kept"
    expected = learner.predict([two_classes / "e" / "50.png"])
    del learner
    assert not place.exists()
    assert Learner.load(saved).predict([two_classes / "e" / "50.png"]) == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept"]


def test_saving_replaces_nothing(state: Path, tmp_path: Path) -> None:
    learner = Learner.load(state)
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="there already exists"):
        learner.save(tmp_path / "there")
    assert list((tmp_path / "there").iterdir()) == []


def test_a_folder_that_is_taken_stays_as_it_is(vit: Path, state: Path) -> None:
    before = sorted(p.name for p in state.rglob("*"))
    with pytest.raises(UsageError, match="already exists: continue with `perpetune resume"):
        Learner(recipe(vit), state)
    assert sorted(p.name for p in state.rglob("*")) == before


# -- a whole run --------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_data", [True, False])
def test_reference_examples_that_cannot_be_used_leave_no_folder(
    with_data: bool, vit: Path, data: Path, tmp_path: Path
) -> None:
    content = recipe(vit, data if with_data else None)
    (tmp_path / "general").mkdir()
    for path, error in ((tmp_path / "nowhere", UsageError), (tmp_path / "general", DataError)):
        content["protect"] = {"reference": {"path": str(path)}}
        with pytest.raises(error, match=r"protect\.reference: "):
            Learner(content, tmp_path / "state")
    assert not (tmp_path / "state").exists()
    picture_folder(tmp_path / "general", ["g"], 3)
    (tmp_path / "general" / "g" / "0.png").write_bytes(b"torn")
    notes = Notes()
    learner = Learner(content, tmp_path / "state", progress=notes)
    learner.run() if with_data else learner.learn(data)
    assert [note.partition(",")[0] for note in notes.notes] == ["protect.reference: left out"]


def test_a_run_reports_every_task(vit: Path, data: Path) -> None:
    notes = Notes()
    learner = Learner(recipe(vit, data), progress=notes)
    before = {name: t.clone() for name, t in frozen(learner.backbone.net).items()}
    fingerprint = learner.backbone.fingerprint()
    results = learner.run()
    assert [(t["name"], t["classes"]) for t in results["tasks"]] == [("a-b", ["a", "b"]), ("c-d", ["c", "d"])]
    assert notes.tasks == [(0, "a-b", 2, 16), (1, "c-d", 2, 16)]
    assert notes.results_seen == [1, 2]
    assert results == read_results(learner.state)
    assert results["complete"]
    assert learner.backbone.fingerprint() == fingerprint == learner.state.backbone["fingerprint"]
    assert_equal(before, frozen(learner.backbone.net))
    assert results["trainable_parameters"] == sum(
        p.numel() for n, p in learner.method.named_parameters() if "pets" in n
    )
    cells = learner.evaluate()
    assert [cells[t["name"]] for t in results["tasks"]] == results["cells"][-1]


def test_a_run_that_is_finished_is_left_as_it_is(state: Path) -> None:
    learner = Learner.load(state)
    before, files = weights(learner), [p.read_bytes() for p in sorted(state.glob("tasks/*/*"))]
    first = read_results(learner.state)
    for again in (learner.run, learner.resume, Learner.load(state).resume):
        results = again()
        assert {**results, "versions": {}} == {**first, "versions": {}}
    assert_equal(weights(learner), before)
    assert [p.read_bytes() for p in sorted(state.glob("tasks/*/*"))] == files


def test_a_state_without_data_has_nothing_to_run(vit: Path) -> None:
    learner = Learner(recipe(vit))
    with pytest.raises(UsageError, match="recipe tiny has no data"):
        learner.run()
    assert learner.resume()["tasks"] == []


DIGITS: dict[str, Any] = {
    "backbone": "perpetune:micro",
    "data": "digits",
    "stream": {"classes_per_task": 2, "class_order": ["0", "1", "2", "3"], "train_per_class": 12, "test_per_class": 10},
    "train": {"epochs": 2, "batch_size": 12, "lr": 0.003},
    "run": {"device": "cpu"},
}


@pytest.fixture(scope="module")
def digits() -> dict[str, dict[str, Any]]:
    """Four digits in two tasks by each method."""
    choices: dict[str, dict[str, Any]] = {
        "frozen": {"method": "frozen", "head": "ncm", "pet": "none"},
        "finetune": {"method": "finetune"},
        "joint": {"method": "joint"},
    }
    return {name: Learner({**DIGITS, **choice}).run() for name, choice in choices.items()}


def test_the_packaged_model_learns_digits_by_every_method(digits: dict[str, dict[str, Any]]) -> None:
    for name, results in digits.items():
        first = results["cells"][0][0]
        assert first["total"] == 20
        assert first["correct"] >= 15, name  # chance is 10
        assert results["tasks"][0]["train"] == 24


def test_plain_training_forgets_and_its_bounds_do_not(digits: dict[str, dict[str, Any]]) -> None:
    kept = {name: results["cells"][1][0]["correct"] for name, results in digits.items()}
    assert kept["finetune"] < kept["frozen"]
    assert kept["finetune"] < kept["joint"]
    assert digits["finetune"]["metrics"]["forgetting"] > 0.25


# -- one more batch of data ---------------------------------------------------------------------------


def as_path(folder: Path) -> Any:
    return folder


def as_text(folder: Path) -> Any:
    return str(folder)


def as_section(folder: Path) -> Any:
    return {"name": "folder", "path": str(folder)}


def as_source(folder: Path) -> Any:
    return FolderSource(path=str(folder))


@pytest.mark.parametrize("given", [as_path, as_text, as_section, as_source])
def test_data_may_be_a_path_a_section_or_a_source(given: Callable[[Path], Any], vit: Path, two_classes: Path) -> None:
    learner = Learner(recipe(vit))
    results = learner.learn(given(two_classes), holdout=0.3)
    (task,) = results["tasks"]
    name = two_classes.name if given in (as_path, as_text) else "task-1"
    assert (task["name"], task["classes"], task["train"], task["test"]) == (name, ["d", "e"], 14, 6)
    assert results["cells"][0][0]["total"] == 6
    same = Learner(recipe(vit))
    same.learn(two_classes, holdout=0.3)
    assert_equal(weights(learner), weights(same))


class Squares(Examples):
    """Somebody's own examples: dark and bright squares."""

    def __init__(self, n: int = 8):
        self.targets = [i % 2 for i in range(n)]

    def __len__(self) -> int:
        return len(self.targets)

    def load(self, index: int, seed: int | None) -> torch.Tensor:
        return torch.full((3, SIZE, SIZE), 40 + 160 * self.targets[index] + index, dtype=torch.uint8)


def squares() -> Task:
    return Task(0, "theirs", ("dark", "bright"), Squares(), test=Squares(4))


def test_data_may_be_a_task_over_ones_own_examples(state: Path) -> None:
    learner = Learner.load(state)
    results = learner.learn(squares(), name="squares")
    told = {"index": 2, "name": "squares", "classes": ["dark", "bright"], "train": 8, "test": 4}
    assert results["tasks"][2].items() >= told.items()
    assert learner.method.classes == ["a", "b", "c", "d", "dark", "bright"]
    assert results["cells"][2][2]["total"] == 4
    cells = learner.evaluate()
    assert cells["squares"] is not None
    notes = Notes()
    later = Learner.load(state, progress=notes)  # the object is gone
    assert later.evaluate()["squares"] is None
    assert notes.notes == ["task squares is not evaluated, it was given as a Python object"]


def test_an_update_after_a_run_adds_classes_and_keeps_names(state: Path, two_classes: Path) -> None:
    learner = Learner.load(state)
    assert learner.method.classes == ["a", "b", "c", "d"]
    fingerprint = learner.backbone.fingerprint()
    results = learner.learn(two_classes, name="more")
    assert learner.method.classes == ["a", "b", "c", "d", "e"]
    assert [t["name"] for t in results["tasks"]] == ["a-b", "c-d", "more"]
    assert [cell["total"] for cell in results["cells"][2]] == [8, 8, 4]
    assert learner.backbone.fingerprint() == fingerprint
    again = Learner.load(state)
    assert_equal(weights(again), weights(learner))
    assert again.evaluate() == learner.evaluate()
    results = again.learn(two_classes)  # nothing but known classes
    assert again.method.classes == ["a", "b", "c", "d", "e"]
    assert [t["name"] for t in results["tasks"]] == ["a-b", "c-d", "more", two_classes.name]


def test_a_name_is_made_safe_and_is_taken_once(state: Path, two_classes: Path) -> None:
    notes = Notes()
    learner = Learner.load(state, progress=notes)
    results = learner.learn(two_classes, name="new birds/2024")
    assert results["tasks"][2]["name"] == "new_birds_2024"
    assert "the task is called new_birds_2024, because 'new birds/2024' cannot name a folder" in notes.notes
    assert (state / "tasks" / "0002-new_birds_2024").is_dir()
    learner.learn(two_classes, name="neu_2024")
    assert not [note for note in notes.notes if "neu_2024" in note and "cannot name" in note]
    with pytest.raises(UsageError, match="already has a task 'a-b': choose another --name"):
        learner.learn(two_classes, name="a-b")


def test_names_of_updates(vit: Path, two_classes: Path, tmp_path: Path) -> None:
    learner = Learner(recipe(vit, method="frozen", head="ncm", pet="none"), tmp_path / "state")
    october = Path(shutil.copytree(two_classes, tmp_path / "2026-10"))
    listed = tmp_path / "list.csv"
    listed.write_text("\n".join(["path,label", *(f"{p},{p.parent.name}" for p in october.rglob("*.png"))]))
    start = Path(shutil.copytree(two_classes, tmp_path / "start"))
    for data, asked in [
        (october, None),
        (october, None),
        (october, "十月"),
        (october, "?"),
        (listed, None),
        (start, None),
    ]:
        results = learner.learn(data, name=asked)
    names = ["2026-10", "2026-10-2", "十月", "task-4", "list", "start-1"]
    assert [t["name"] for t in results["tasks"]] == names
    with pytest.raises(UsageError, match="a task cannot have the name 'start'"):
        learner.learn(october, name="start")
    state = State(tmp_path / "state")
    assert [t.name for t in state.committed] == names
    assert state.rollback("十月") == names[3:]


def test_a_recipe_with_an_order_of_classes_can_be_updated(vit: Path, data: Path, two_classes: Path) -> None:
    learner = Learner(recipe(vit, data, stream={"classes_per_task": [3, 1], "class_order": ["d", "b", "a", "c"]}))
    learner.run()
    assert learner.learn(two_classes)["tasks"][2]["classes"] == ["d", "e"]


def test_new_images_that_earlier_tasks_are_tested_on_are_named(vit: Path, two_classes: Path, tmp_path: Path) -> None:
    notes = Notes()
    learner = Learner(recipe(vit, method="frozen", head="ncm", pet="none"), progress=notes)
    learner.learn(two_classes, name="one", holdout=0.3)
    again = Path(shutil.copytree(two_classes, tmp_path / "again"))
    learner.learn(again, holdout=0.3)  # the same split of the same names
    count = sum(len(files) for _, _, files in os.walk(again))
    assert notes.notes == [f"task again learns again: {count} of {count} pictures were learned before, as task one"]
    results = learner.learn(again, name="all", holdout=0.0)
    said = [n for n in notes.notes if "trains on" in n]
    assert said[0].startswith("task all trains on 12 test pictures of earlier tasks: ")
    assert "(task one)" in said[0]
    assert str(again / "d") in said[0]
    assert results["tasks"][2]["train"] == 20
    assert len(said) == 1


def test_a_run_is_finished_before_it_is_updated(vit: Path, data: Path, two_classes: Path) -> None:
    learner = Learner(recipe(vit, data))
    with pytest.raises(UsageError, match="has learned 0 of the 2 tasks of its stream: finish them first"):
        learner.learn(two_classes)
    learner.run()
    assert len(learner.learn(two_classes)["tasks"]) == 3


def test_an_upper_bound_cannot_be_updated(vit: Path, two_classes: Path) -> None:
    learner = Learner(recipe(vit, method="joint"))
    with pytest.raises(UsageError, match="method: joint needs the data of all tasks"):
        learner.learn(two_classes)


@pytest.mark.parametrize("given", ["/no/such/place.xyz", "/no/such/folder/at all"])
def test_data_that_are_not_there(given: str, vit: Path) -> None:
    learner = Learner(recipe(vit))
    with pytest.raises(PerpetuneError) as caught:
        learner.learn(given)
    assert given in str(caught.value)
    assert learner.state.committed == []
    assert learner.resume()["tasks"] == []


def test_earlier_tests_are_measured_while_they_are_there(vit: Path, tmp_path: Path) -> None:
    first = picture_folder(tmp_path / "first", ["a", "b"], 5)
    second = picture_folder(tmp_path / "second", ["c", "d"], 5)
    third = picture_folder(tmp_path / "third", ["e", "f"], 5)
    state = tmp_path / "state"
    Learner(recipe(vit, head="ncm"), state).learn(first, name="one", holdout=0.4)
    results = Learner.load(state).learn(second, name="two", holdout=0.2)
    assert [[cell and cell["total"] for cell in row] for row in results["cells"]] == [[4, None], [4, 2]]
    first.rename(tmp_path / "moved")
    notes = Notes()
    learner = Learner.load(state, progress=notes)
    results = learner.learn(third, name="three")
    assert [cell and cell["total"] for cell in results["cells"][2]] == [None, 2, 2]
    assert len(notes.notes) == 1
    assert notes.notes[0].startswith("task one is not evaluated, its data are gone: ")
    assert str(first) in notes.notes[0]
    assert learner.evaluate()["one"] is None
    (tmp_path / "moved").rename(first)
    found = Learner.load(state).evaluate()["one"]
    assert found is not None
    assert found["total"] == 4


def test_earlier_data_that_changed_are_not_evaluated(vit: Path, two_classes: Path, tmp_path: Path) -> None:
    october = picture_folder(tmp_path / "october", ["a", "b"], 5)
    state = tmp_path / "state"
    Learner(recipe(vit, method="frozen", head="ncm", pet="none"), state).learn(october)
    picture_folder(october, ["a", "b"], 6, first=50)
    notes = Notes()
    learner = Learner.load(state, progress=notes)
    results = learner.learn(two_classes)
    assert results["cells"][1][0] is None
    assert notes.notes == [f"task october is not evaluated: its data at {october} changed since it was learned"]
    assert learner.evaluate()["october"] is None


@pytest.mark.parametrize("gone", [["a"], ["a", "b", "c"]])
def test_a_stream_that_changed_is_not_evaluated(gone: list[str], vit: Path, data: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(data, tmp_path / "data"))
    Learner(recipe(vit, mine, method="frozen", head="ncm", pet="none"), tmp_path / "state").run()
    for label in gone:
        shutil.rmtree(mine / "train" / label)
    notes = Notes()
    stream = {"classes_per_task": 2 if len(gone) == 1 else 1, "class_order": "sorted"}
    path = tmp_path / "state" / "recipe.yaml"
    path.write_text(path.read_text().replace("classes_per_task: 2", f"classes_per_task: {stream['classes_per_task']}"))
    assert list(Learner.load(tmp_path / "state", progress=notes).evaluate().values()) == [None, None]
    assert notes.notes == [
        f"task {name} is not evaluated: its data at {mine} changed since it was learned" for name in ("a-b", "c-d")
    ]


def test_training_images_of_earlier_tasks_are_not_opened(vit: Path, two_classes: Path, tmp_path: Path) -> None:
    first = picture_folder(tmp_path / "first", ["a", "b"], 5)
    state = tmp_path / "state"
    learner = Learner(recipe(vit, method="frozen", head="ncm", pet="none", stream={"max_bad": 0}), state)
    learner.learn(first)
    train = learner._tasks._tasks[0].train
    kept = [Path(getattr(train, "name")(i)) for i in range(len(train))]  # noqa: B009
    for path in kept:
        path.write_bytes(b"\0" * path.stat().st_size)
    notes = Notes()
    learner = Learner.load(state, progress=notes)
    results = learner.learn(two_classes)
    assert results["cells"][1][0] is not None
    assert results["cells"][1][0]["total"] == 2
    assert notes.notes == []


def test_a_finished_run_whose_data_were_moved_can_still_be_updated(
    vit: Path, data: Path, two_classes: Path, tmp_path: Path
) -> None:
    mine = Path(shutil.copytree(data, tmp_path / "data"))
    Learner(recipe(vit, mine), tmp_path / "state").run()
    mine.rename(tmp_path / "moved")
    notes = Notes()
    learner = Learner.load(tmp_path / "state", progress=notes)
    results = learner.learn(two_classes)
    assert [cell and cell["total"] for cell in results["cells"][2]] == [None, None, 4]
    assert [n.partition(":")[0] for n in notes.notes] == [
        "task a-b is not evaluated, its data are gone",
        "task c-d is not evaluated, its data are gone",
    ]
    with pytest.raises(DataError, match="no such"):
        learner.run()


# -- stopped, and going on ----------------------------------------------------------------------------


class StopAt(Notes):
    """Asks for a stop at one step."""

    learner: Learner

    def __init__(self, at: int):
        super().__init__()
        self.at = at

    def step(self, done: int, epoch: int, loss: float | None, images: int) -> None:
        if done == self.at:
            self.learner.runtime.stopping = lambda: 15


def stopping(content: dict[str, Any], folder: Path, at: int) -> Learner:
    progress = StopAt(at)
    progress.learner = learner = Learner(content, folder, progress=progress)
    return learner


def test_a_stopped_run_goes_on_where_it_stood(vit: Path, data: Path, tmp_path: Path) -> None:
    content = recipe(vit, data, head="ncm")
    whole = Learner(content)
    expected = whole.run()
    learner = stopping(content, tmp_path / "state", at=2)
    with pytest.raises(Interrupted, match=r"after step 3 of 4; continue with `perpetune resume .*state`"):
        learner.run()
    assert learner.state.committed == []
    with pytest.raises(StateError, match="has learned nothing yet"):  # not half of a task either
        learner.predict([data / "test" / "a" / "1000.png"])
    later = Learner.load(tmp_path / "state")
    results = later.resume()
    assert results["cells"] == expected["cells"]
    assert_equal(weights(later), weights(whole))
    assert not (tmp_path / "state" / "resume").exists()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP on Windows")
def test_a_hangup_stops_in_order_unless_it_is_ignored(vit: Path) -> None:
    runtime, before = Learner(recipe(vit)).runtime, signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with stop_signals(runtime):
            os.kill(os.getpid(), signal.SIGHUP)
            assert runtime.stopping() == signal.SIGHUP
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        with stop_signals(runtime):
            os.kill(os.getpid(), signal.SIGHUP)
            assert runtime.stopping() is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_same_object_can_go_on(vit: Path, data: Path, tmp_path: Path) -> None:
    content = recipe(vit, data)
    learner = stopping(content, tmp_path / "state", at=2)
    with pytest.raises(Interrupted):
        learner.run()
    whole = Learner(content)
    learner.runtime.progress = Silent()
    assert learner.resume()["cells"] == whole.run()["cells"]
    assert_equal(weights(learner), weights(whole))


def test_a_stopped_update_goes_on_with_its_data_and_name(vit: Path, two_classes: Path, tmp_path: Path) -> None:
    learner = stopping(recipe(vit), tmp_path / "state", at=1)
    with pytest.raises(Interrupted):
        learner.learn(two_classes, name="birds", holdout=0.4)
    later = Learner.load(tmp_path / "state")
    results = later.resume()
    whole = Learner(recipe(vit))
    assert results["tasks"] == whole.learn(two_classes, name="birds", holdout=0.4)["tasks"]
    assert results["tasks"][0]["test"] == 8
    assert_equal(weights(later), weights(whole))


def test_a_stopped_update_from_an_object_asks_for_it_again(vit: Path, tmp_path: Path) -> None:
    learner = stopping(recipe(vit), tmp_path / "state", at=1)
    with pytest.raises(Interrupted):
        learner.learn(squares(), name="squares")
    later = Learner.load(tmp_path / "state")
    with pytest.raises(UsageError, match="the data of task squares were a Python object"):
        later.resume()
    later.learn(squares(), name="squares")
    whole = Learner(recipe(vit))
    whole.learn(squares(), name="squares")
    assert_equal(weights(later), weights(whole))


def test_after_a_failure_it_answers_from_the_last_commit(state: Path, data: Path, two_classes: Path) -> None:
    learner = Learner.load(state)
    asked = [data / "test" / "c" / "1000.png"]
    before, answer = weights(learner), learner.predict(asked)

    class Broken(Squares):
        def load(self, index: int, seed: int | None) -> torch.Tensor:
            if index == 5:
                raise DataError("square 5 is gone")
            return super().load(index, seed)

    with pytest.raises(DataError, match="square 5 is gone"):
        learner.learn(Task(0, "x", ("dark", "bright"), Broken()))
    assert learner.predict(asked) == answer
    assert_equal(weights(learner), before)
    learner.learn(two_classes)
    fresh = Learner.load(learner.state.folder)
    assert_equal(weights(learner), weights(fresh))


# -- loading ------------------------------------------------------------------------------------------


def test_other_weights_of_the_same_backbone_are_refused(data: Path, tmp_path: Path) -> None:
    mine = vit_folder(tmp_path / "vit", seed=1)
    Learner(recipe(mine, data, method="frozen", head="ncm", pet="none"), tmp_path / "state").run()
    shutil.rmtree(mine)
    vit_folder(mine, seed=2)
    with pytest.raises(StateError, match=r"was made with other weights of folder:.*restore the checkpoint"):
        Learner.load(tmp_path / "state")
    shutil.rmtree(mine)
    vit_folder(mine, seed=1)
    assert Learner.load(tmp_path / "state").method.classes == ["a", "b", "c", "d"]


def test_what_is_no_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="does not exist"):
        Learner.load(tmp_path / "nowhere")
    with pytest.raises(StateError, match="is not a state folder"):
        Learner.load(tmp_path)


def test_loading_changes_nothing_and_a_device_may_be_named(state: Path) -> None:
    before = {p: p.read_bytes() for p in state.rglob("*") if p.is_file()}
    learner = Learner.load(state, device="cpu")
    assert learner.runtime.device.type == "cpu"
    assert {p: p.read_bytes() for p in state.rglob("*") if p.is_file()} == before
    with pytest.raises(UsageError, match=r"run.device 'tpu:9' cannot be used here"):
        Learner.load(state, device="tpu:9")


def test_a_state_that_somebody_else_went_on_with_is_loaded_again(state: Path, two_classes: Path) -> None:
    first, second = Learner.load(state), Learner.load(state)
    first.learn(two_classes)
    with pytest.raises(StateError, match="was changed after this learner loaded it: load it again"):
        second.learn(two_classes, name="other")
    assert len(State(state).committed) == 3


def test_a_task_that_somebody_else_learned_anew_under_its_name_is_another_one(state: Path, two_classes: Path) -> None:
    """A pool stores a member once. A commit on top of another task would name members that are not those it has."""
    first = Learner.load(state)
    first.learn(two_classes, name="again")
    with first.state.writing():
        first.state.rollback(first.state.committed[-2].name)
    other = Learner.load(state)
    other.learn(two_classes, name="again", holdout=0.5)
    before = len(State(state).committed)
    with pytest.raises(StateError, match="was changed after this learner loaded it: load it again"):
        first.learn(two_classes, name="more")
    assert len(State(state).committed) == before
    other.learn(two_classes, name="more")


# -- using it -----------------------------------------------------------------------------------------


def test_predictions_are_names_with_probabilities(finished: Path, data: Path) -> None:
    learner = Learner.load(finished)
    paths = [data / "test" / c / f"{n}.png" for c in "abcd" for n in (1000, 1001)]
    found = learner.predict([*paths, str(paths[0])], top=3)
    assert [p.image for p in found] == [*map(str, paths), str(paths[0])]
    assert found[-1] == found[0]
    for p in found:
        assert [v for _, v in p.classes] == sorted((v for _, v in p.classes), reverse=True)
        assert len(p.classes) == 3
        assert p.name == p.classes[0][0]
    everything = learner.predict(paths[:1], top=99)[0]
    assert sorted(name for name, _ in everything.classes) == ["a", "b", "c", "d"]
    assert sum(v for _, v in everything.classes) == pytest.approx(1.0, abs=1e-5)
    right = sum(p.name == path.parent.name for p, path in zip(found, paths, strict=False))
    assert right >= 6


def test_paths_pictures_and_tensors_give_the_same_answer(finished: Path, data: Path) -> None:
    learner = Learner.load(finished)
    path = data / "test" / "b" / "1000.png"
    image = Image.open(path).convert("RGB")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().unsqueeze(0)
    (a,), (b,), (c,) = learner.predict([path]), learner.predict([image]), learner.predict(pixels)
    assert a.classes == b.classes == c.classes
    assert (a.image, b.image, c.image) == (str(path), "image 0", "image 0")


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "1", "LA", "CMYK", "I;16"])
def test_pictures_of_every_mode_can_be_given(mode: str, finished: Path, tmp_path: Path) -> None:
    learner = Learner.load(finished)
    image = picture("a", 5)
    image = Image.fromarray(np.full((9, 5), 40000, np.uint16)) if mode == "I;16" else image.convert(mode)
    before = image.tobytes()
    (found,) = learner.predict([image])
    assert image.mode == mode
    assert image.tobytes() == before
    assert found.name in "abcd"
    if mode in ("RGBA", "L", "P"):
        image.save(tmp_path / "same.png")
        assert learner.predict([tmp_path / "same.png"])[0].classes == found.classes


def test_answers_do_not_depend_on_how_many_are_asked_for(vit: Path, data: Path) -> None:
    learner = Learner(recipe(vit, data, evaluate={"batch_size": 3}, method="frozen", head="ncm"))
    learner.run()
    paths = sorted((data / "test").rglob("*.png"))
    together = learner.predict(paths)
    assert [p.image for p in together] == [str(p) for p in paths]
    for path, p in zip(paths, together, strict=True):
        (alone,) = learner.predict([path])
        assert alone.name == p.name
        assert [v for _, v in alone.classes] == pytest.approx([v for _, v in p.classes], abs=1e-5)
    pictures = learner.predict([Image.open(p) for p in paths])
    assert [p.image for p in pictures] == [f"image {i}" for i in range(len(paths))]


@pytest.mark.parametrize(
    "pixels",
    [
        torch.zeros(2, 3, SIZE, SIZE),
        torch.zeros(2, 1, SIZE, SIZE, dtype=torch.uint8),
        torch.zeros(3, SIZE, SIZE, dtype=torch.uint8),
        torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
    ],
    ids=["float", "gray", "one", "small"],
)
def test_a_tensor_is_checked(pixels: torch.Tensor, finished: Path) -> None:
    with pytest.raises(UsageError, match=r"predict: expected a uint8 tensor \(N, 3, 16, 16\), got torch"):
        Learner.load(finished).predict(pixels)


def test_a_picture_that_cannot_be_read_is_named(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    for path in (tmp_path / "torn.png", tmp_path / "none.png"):
        with pytest.raises(DataError, match=path.name):
            Learner.load(finished).predict([path])


def test_nothing_asked_is_nothing_answered(finished: Path) -> None:
    assert Learner.load(finished).predict([]) == []


def test_nothing_learned_is_no_answer(vit: Path, data: Path) -> None:
    learner = Learner(recipe(vit))
    with pytest.raises(StateError, match="has learned nothing yet"):
        learner.predict([data / "test" / "a" / "1000.png"])
    with pytest.raises(StateError, match="has learned nothing yet"):
        learner.evaluate(data)


def test_evaluation_on_data_given(finished: Path, data: Path, two_classes: Path, tmp_path: Path) -> None:
    learner = Learner.load(finished)
    before = weights(learner)
    own = learner.evaluate(data)[str(data)]
    tasks = [c for c in learner.evaluate().values() if c is not None]
    assert own is not None
    assert own["total"] == 16  # its test split
    assert own["correct"] == sum(c["correct"] for c in tasks)
    other = learner.evaluate(str(two_classes))[str(two_classes)]
    assert other is not None
    assert other["total"] == 20  # all of it, as it has no test split
    assert other["per_class"]["e"] == [0, 10]  # never learned
    lines = ["path,label", *(f"{p},{p.parent.name}" for p in sorted((data / "test" / "a").iterdir()))]
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    (listed,) = learner.evaluate(ManifestSource(path=str(tmp_path / "list.csv"))).values()
    assert listed == {"correct": own["per_class"]["a"][0], "total": 4, "per_class": {"a": own["per_class"]["a"]}}
    assert_equal(weights(learner), before)
    assert len(learner.state.committed) == 2


def test_all_of_the_data_given_are_evaluated(vit: Path, data: Path, two_classes: Path) -> None:
    limits = {"validation": 0.3, "train_per_class": 4, "test_per_class": 1}
    stream = {"classes_per_task": 2, "class_order": ["b", "a", "d", "c"], **limits}
    learner = Learner(recipe(vit, data, stream=stream, method="frozen", head="ncm", pet="none"))
    learner.run()
    for given, total in ((two_classes, 20), (data, 16)):
        found = learner.evaluate(given)[str(given)]
        assert found is not None
        assert found["total"] == total


def test_recipes_given_are_not_changed(vit: Path) -> None:
    content = recipe(vit)
    before = copy.deepcopy(content)
    Learner(content)
    assert content == before

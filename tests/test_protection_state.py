"""Protection in the state folder: a run that is stopped at any moment and resumed ends with the same bits, older states
load, and a state that does not fit gives an error in one line."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import chiefly, every, picture_folder, recipe, seal, split_folder, task_files, task_tensors, vit_folder
from torch import Tensor, nn

from perpetune.errors import Interrupted, PerpetuneError, StateError
from perpetune.files import MANIFEST, write_folder
from perpetune.learner import Learner
from perpetune.protection.config import ProtectConfig
from perpetune.report.sections.protection import newly_full
from perpetune.runtime import Silent
from perpetune.snapshot import MEMORY
from perpetune.state import State

PET = {"name": "adapter", "width": 8}
PROTECT = {"energy": 0.9}


class World:
    """A tiny transformer, pictures of six classes, and pictures of something else, made once."""

    def __init__(self, root: Path):
        self.root = root
        self.vit = vit_folder(root / "vit")
        self.data = split_folder(root / "data", "abcdef", 5, 2)
        self.general = picture_folder(root / "general", "xyz", 2)

    def recipe(self, **changes: Any) -> dict[str, Any]:
        content = {"pet": PET, "protect": PROTECT, **changes}
        content.setdefault("run", {"device": "cpu", "checkpoint_every": 2})
        return recipe(self.vit, self.data, **content)

    def reference(self, **changes: Any) -> dict[str, Any]:
        """A `protect:` section with the pictures of something else."""
        return {**PROTECT, "reference": {"path": str(self.general), **changes}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


class StopAt(Silent):
    """Sends a SIGTERM at one step of one phase of one task."""

    def __init__(self, task: int, phase: str, step: int):
        self.at, self.now = (task, phase, step), (0, "")

    def task(self, index: int, name: str, classes: int, examples: int) -> None:
        self.now = (index, "")

    def phase(self, phase: str, steps: int, epochs: int, done: int) -> None:
        self.now = (self.now[0], phase)

    def step(self, done: int, epoch: int, loss: float | None, images: int) -> None:
        if (*self.now, done) == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


def learned(state: Path, *names: str) -> dict[str, bytes]:
    """The files of all tasks that must not depend on how they came about, or those of `names` alone."""
    return {
        f"{task.folder.name}/{name}": content
        for task in State(state).committed
        for name, content in task.read().items()
        if (name in names if names else name != "timings.json")
    }


def differing(one: Path, other: Path) -> list[str]:
    ours, theirs = learned(one), learned(other)
    assert ours.keys() == theirs.keys()
    return [name for name in theirs if ours[name] != theirs[name]]


def certificates(state: Path) -> list[dict[str, Any]]:
    return [entry for task in State(state).committed for entry in task.json("metrics.json").get("protection", [])]


# -- the first task ---------------------------------------------------------------------------------------------


def test_the_first_task_is_learned_the_same_with_and_without(world: World, tmp_path: Path) -> None:
    """Protection has its own generators, and it takes effect from the second task on."""
    Learner(world.recipe(pet={"name": "lora", "rank": 2, "dropout": 0.1}), tmp_path / "with").run()
    Learner(world.recipe(pet={"name": "lora", "rank": 2, "dropout": 0.1}, protect=None), tmp_path / "without").run()
    for name in ("pet.safetensors", "head.safetensors"):
        ours, theirs = learned(tmp_path / "with", name), learned(tmp_path / "without", name)
        same = [ours[task] == theirs[task] for task in ours]
        assert same == [True, False, False], name
    assert MEMORY in State(tmp_path / "with").committed[0].sizes()
    assert not any(MEMORY in task.sizes() for task in State(tmp_path / "without").committed)


@pytest.mark.parametrize("protect", [{"energy": 0.0}, {"directions": "none"}])
def test_with_nothing_closed_the_whole_run_is_the_same(world: World, tmp_path: Path, protect: Any) -> None:
    Learner(world.recipe(protect=protect), tmp_path / "with").run()
    Learner(world.recipe(protect=None), tmp_path / "without").run()
    names = ("pet.safetensors", "head.safetensors")
    assert learned(tmp_path / "with", *names) == learned(tmp_path / "without", *names)
    assert certificates(tmp_path / "with")[1]["worst"] > 0


def test_a_site_without_room_is_told_once_and_stays(world: World, tmp_path: Path) -> None:
    """LoRA's B has two directions, and both are closed after the first task; A has none left after the second."""
    results = Learner(world.recipe(pet={"name": "lora", "rank": 2}, protect={"energy": 1.0}), tmp_path / "state").run()
    assert len(results["tasks"]) == 3
    full = certificates(tmp_path / "state")[0]["full"]
    assert full == [s["site"] for s in results["protection"][0]["sites"] if "/up." in s["site"]]
    told = [newly_full({**results, "protection": results["protection"][: tasks + 1]}) for tasks in range(3)]
    assert "2 of 4 sites no longer learn, because they have no room left" in str(told[0])
    assert "4 of 4 sites" in str(told[1])
    assert told[2] is None
    values = [t for name, t in task_tensors(tmp_path / "state").items() if name.endswith("/pet.safetensors")]
    ups = [name for name in values[0] if ".up." in name]
    assert len(ups) == len(full)
    assert all(torch.equal(values[0][name], later[name]) for name in ups for later in values[1:])


# -- stopped and gone on with -----------------------------------------------------------------------------

MERGED = {"name": "finetune", "head_first": 0.5, "merge": "falling", "merge_epochs": 2}
LORA = {"name": "lora", "rank": 4, "dropout": 0.2}
RENEWED = {"energy": 0.9, "renew": True}
CASES: dict[str, dict[str, Any]] = {  # the recipe's changes
    "plain": {},
    "reference": {"pet": LORA, "reference": {}},
    "samples": {"pet": LORA, "protect": {**PROTECT, "samples": 3}, "reference": {"samples": 4}},
    "soft": {"protect": {**PROTECT, "strength": "soft"}, "head": "ncm"},
    "random": {"protect": {**PROTECT, "directions": "random"}},
    "merged": {"method": MERGED},
    "renewed": {"pet": LORA, "protect": RENEWED, "reference": {}},
    "leading": {"pet": LORA, "protect": {**RENEWED, "start": "leading", "rest": 6}, "method": MERGED},
}
STOPS: list[Any] = [
    ("plain", (0, "protect task", 1)),
    pytest.param("plain", (1, "train", 1), marks=pytest.mark.slow),
    ("plain", (1, "train", 3)),  # the last of four is still made: a stop comes after the step
    ("plain", (1, "protect task", 1)),
    ("reference", (0, "protect reference", 1)),
    pytest.param("reference", (0, "train", 2), marks=pytest.mark.slow),
    ("samples", (0, "train", 2)),
    pytest.param("samples", (1, "protect task", 1), marks=pytest.mark.slow),
    ("soft", (1, "train", 2)),
    pytest.param("random", (1, "train", 2), marks=pytest.mark.slow),
    ("merged", (1, "head", 1)),
    pytest.param("merged", (1, "train", 1), marks=pytest.mark.slow),
    ("merged", (1, "free", 1)),
    pytest.param("merged", (1, "protect task", 1), marks=pytest.mark.slow),
    pytest.param("renewed", (0, "train", 2), marks=pytest.mark.slow),
    ("renewed", (2, "train", 3)),
    ("renewed", (2, "protect task", 1)),
    ("leading", (1, "renew", 1)),
    ("leading", (2, "free", 1)),
]


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[dict[str, Any], Path]]:
    """The recipe of a case, and a state that an uninterrupted run of it left."""
    made: dict[str, Path] = {}

    def find(case: str) -> tuple[dict[str, Any], Path]:
        changes = {**CASES[case]}
        reference = changes.pop("reference", None)
        if reference is not None:
            changes["protect"] = {**changes.get("protect", {}), **world.reference(**reference)}
        content = world.recipe(**changes)
        if case not in made:
            made[case] = tmp_path_factory.mktemp("whole") / case
            Learner(content, made[case]).run()
        return content, made[case]

    return find


@pytest.mark.parametrize("again", every(["loaded", "the same learner"], 2))
@pytest.mark.parametrize(("case", "at"), STOPS, ids=lambda value: str(value))
def test_stopped_and_resumed_is_bit_for_bit_the_same(
    whole: Callable[[str], tuple[dict[str, Any], Path]], tmp_path: Path, case: str, at: tuple[int, str, int], again: str
) -> None:
    content, uninterrupted = whole(case)
    state = tmp_path / "state"
    learner = Learner(content, state, progress=StopAt(*at))
    with pytest.raises(Interrupted) as stop:
        learner.run()
    assert "\n" not in str(stop.value)
    assert len(State(state).committed) == at[0]
    if again == "loaded":
        learner = Learner.load(state)
    learner.runtime.progress = Silent()
    learner.resume()
    assert differing(state, uninterrupted) == []
    assert any(name.endswith(MEMORY) for name in learned(state))


@pytest.mark.parametrize("case", chiefly(CASES, ["samples", "merged", "renewed"]))
def test_loaded_after_every_task_is_bit_for_bit_the_same(
    whole: Callable[[str], tuple[dict[str, Any], Path]], tmp_path: Path, case: str
) -> None:
    content, uninterrupted = whole(case)
    state = tmp_path / "state"
    for task in range(3):
        learner = Learner.load(state) if task else Learner(content, state)
        if task < 2:
            learner.runtime.progress = StopAt(task + 1, "train" if case != "merged" else "head", 1)
            with pytest.raises(Interrupted):
                learner.run()
            shutil.rmtree(state / "resume")  # nothing is left of the task that was begun
        else:
            learner.resume()
    assert differing(state, uninterrupted) == []


def test_rolled_back_and_learned_again(whole: Callable[[str], tuple[dict[str, Any], Path]], tmp_path: Path) -> None:
    for case, keep in (("reference", "start"), ("renewed", "a-b")):
        _, uninterrupted = whole(case)
        state = shutil.copytree(uninterrupted, tmp_path / f"{case}-{keep}")
        State(state).rollback(keep)
        Learner.load(state).resume()
        assert differing(state, uninterrupted) == []


def test_a_resumed_reference_pass_that_rounds_otherwise_keeps_its_memory(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another machine one direction more may be closed; a checkpoint inside the task, which holds no memory, must
    not bring the form of the one before, for that empties it."""
    state = tmp_path / "state"
    with pytest.raises(Interrupted):
        Learner(world.recipe(pet=LORA, protect=world.reference()), state, progress=StopAt(0, "train", 1)).run()
    monkeypatch.setattr(ProtectConfig, "energy_at", lambda self, task: 0.97)
    learner = Learner.load(state)
    protection = learner.method.protection
    assert protection is not None
    starts: list[list[Tensor]] = []

    class Looks(Silent):
        def step(self, done: int, epoch: int, loss: float | None, images: int) -> None:
            starts.append([protection.of(w).vectors.clone() for w in protection.sites])

    learner.runtime.progress = Looks()
    learner.resume()
    for vectors in (v for step in starts[1:] for v in step):  # the first step told of is of the reference
        torch.testing.assert_close(vectors.mT @ vectors, torch.eye(vectors.shape[1], dtype=torch.float64))


# -- updates ----------------------------------------------------------------------------------------------


def test_updates_protect_and_go_on_where_they_were_stopped(world: World, tmp_path: Path) -> None:
    parts = [picture_folder(tmp_path / f"part-{i}", names, 6) for i, names in enumerate(("ab", "bc", "cd"))]
    content = {**world.recipe(pet=LORA, protect=world.reference()), "data": None}
    one = Learner(content, tmp_path / "one")
    for part in parts:
        one.learn(part)
    Learner(content, tmp_path / "several")
    for index, part in enumerate(parts):
        learner = Learner.load(tmp_path / "several", progress=StopAt(index, "train", 2))
        with pytest.raises(Interrupted):
            learner.learn(part)
        Learner.load(tmp_path / "several").resume()
    assert differing(tmp_path / "several", tmp_path / "one") == []
    found = certificates(tmp_path / "one")
    assert [entry["of"] for entry in found] == ["reference", "task", "task", "task"]
    assert [entry["consolidated"] for entry in found] == [0, 1, 2, 3]


# -- settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["domain", "task"])
def test_settings(world: World, tmp_path: Path, setting: str) -> None:
    stream: dict[str, Any] = {"classes_per_task": 2, "class_order": "sorted"}
    data = world.data
    if setting == "domain":
        stream, data = {"by": "domain", "holdout": 0.25}, tmp_path / "domains"
        for domain in ("paint", "photo"):
            picture_folder(data / domain, "ab", 4, domain)
    content = world.recipe(setting=setting, stream=stream)
    content["data"] = {"name": "folder", "path": str(data), **({"layout": "domains"} if setting == "domain" else {})}
    results = Learner(content, tmp_path / "state").run()
    assert len(results["tasks"]) == (2 if setting == "domain" else 3)
    assert len(results["protection"]) == len(results["tasks"])
    assert all(entry["examples"] for entry in results["protection"])
    assert results["protection"][-1]["worst"] > 0


def test_online_goes_through_the_data_once(world: World, tmp_path: Path) -> None:
    told: list[tuple[str, int]] = []

    class Phases(Silent):
        def phase(self, phase: str, steps: int, epochs: int, done: int) -> None:
            told.append((phase, epochs))

    content = world.recipe(online=True, train={"batch_size": 4})
    learner = Learner(content, tmp_path / "state", progress=Phases())
    learner.run()
    assert told == [("train", 1), ("protect task", 1)] * 3
    assert Learner.load(tmp_path / "state").recipe.online


# -- what goes wrong --------------------------------------------------------------------------------------


def test_features_that_are_not_finite(world: World, tmp_path: Path) -> None:
    """One line, the commit before is whole, and once the cause is gone the run goes on as if nothing had been."""
    state = tmp_path / "state"
    learner = Learner(world.recipe(), state)
    whole = tmp_path / "whole"
    Learner(world.recipe(), whole).run()

    def spoil(module: nn.Module, args: Any, output: Any) -> Any:
        spoilt = not learner.method.model.training and learner.method.classes == list("abcd")
        return output * torch.nan if spoilt else output

    hook = learner.backbone.net.embeddings.register_forward_hook(spoil)
    with pytest.raises(PerpetuneError) as error:
        learner.run()
    told = str(error.value)
    assert "\n" not in told
    assert told.startswith("protect: features at ")
    assert "are not finite, so nothing was added" in told
    assert [task.name for task in State(state).committed] == ["a-b"]
    before = learned(state)
    assert before == {name: content for name, content in learned(whole).items() if name.startswith("0000-")}
    with pytest.raises(PerpetuneError):
        learner.run()
    hook.remove()
    learner.run()
    assert differing(state, whole) == []


# -- other states, other recipes --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def states(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("states")
    for name, protect in (("protected", PROTECT), ("free", None)):
        Learner(world.recipe(protect=protect), root / name).run()
    return {name: root / name for name in ("protected", "free")}


def edited(state: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    content = yaml.safe_load((state / "recipe.yaml").read_text())
    change(content)
    (state / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return state


def test_a_state_of_before_protection_loads(world: World, states: dict[str, Path], tmp_path: Path) -> None:
    state = shutil.copytree(states["free"], tmp_path / "state")

    def older(content: dict[str, Any]) -> None:
        assert content.pop("protect") is None
        assert content.pop("online") is False

    edited(state, older)
    assert not any(task.json("metrics.json").keys() - {"cells", "drift"} for task in State(state).committed)
    learner = Learner.load(state)
    assert learner.evaluate() == Learner.load(states["free"]).evaluate()
    learner.learn(picture_folder(tmp_path / "more", "ag", 3))
    assert len(State(state).committed) == 4


CHANGES: dict[str, tuple[str, Callable[[dict[str, Any]], None], tuple[str, ...]]] = {
    "another width of the pet": ("protected", lambda c: c["pet"].update(width=4), ("(1, 8, 17)", "(1, 4, 17)")),
    "another pet": ("protected", lambda c: c.update(pet={"name": "lora", "rank": 2}), ("do not fit the recipe",)),
    "protection removed": ("protected", lambda c: c.update(protect=None), ("unexpected protection",)),
    "protection added": ("free", lambda c: c.update(protect={}), ("missing protection",)),
    "soft instead of hard": ("protected", lambda c: c["protect"].update(strength="soft"), ("do not belong together",)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_recipe_that_does_not_fit_its_state_any_more(states: dict[str, Path], tmp_path: Path, change: str) -> None:
    name, edit, words = CHANGES[change]
    state = edited(Path(shutil.copytree(states[name], tmp_path / "state")), edit)
    with pytest.raises(StateError) as error:
        Learner.load(state)
    told = str(error.value)
    assert "\n" not in told
    assert str(state) in told
    assert all(word in told for word in words), told


@pytest.mark.parametrize("change", [{"energy": 0.5}, {"samples": 2}, {"project": "gradient"}, {"sites": ["up"]}])
def test_what_protect_says_of_tasks_to_come_can_be_changed(
    states: dict[str, Path], tmp_path: Path, change: dict[str, Any]
) -> None:
    state = edited(
        Path(shutil.copytree(states["protected"], tmp_path / "state")), lambda c: c["protect"].update(change)
    )
    State(state).rollback("a-b")
    Learner.load(state).resume()
    assert len(certificates(state)) == 3


def test_a_torn_memory_is_told(states: dict[str, Path], tmp_path: Path) -> None:
    state = Path(shutil.copytree(states["protected"], tmp_path / "state"))
    folder = State(state).committed[-1].folder
    torn = folder / "pack.safetensors"
    torn.write_bytes(torn.read_bytes()[:-10])
    with pytest.raises(StateError) as error:
        Learner.load(state)
    assert str(torn) in str(error.value)
    assert "rollback" in str(error.value)
    files = task_files(states["protected"] / "tasks" / folder.name)
    shutil.rmtree(folder)
    write_folder(folder, {name: content for name, content in files.items() if name not in (MEMORY, MANIFEST)})
    seal(state)
    with pytest.raises(StateError) as error:
        Learner.load(state)
    assert str(error.value) == f"{folder}: {MEMORY} is missing"


def test_the_memory_holds_no_data(world: World, tmp_path: Path) -> None:
    """Its size is that of the sites, whatever the number of pictures or tasks."""
    sizes = []
    for samples in (2, "all"):
        Learner(world.recipe(protect={**PROTECT, "samples": samples}), tmp_path / str(samples)).run()
        stored = task_tensors(tmp_path / str(samples))
        tensors: list[dict[str, Tensor]] = [t for name, t in stored.items() if name.endswith(f"/{MEMORY}")]
        for task in tensors:
            vectors = {n: t for n, t in task.items() if n.endswith("vectors")}
            assert all(t.shape[1] <= t.shape[0] / 2 for t in vectors.values())
        sizes.append([{n: t.shape for n, t in task.items() if not n.endswith("vectors")} for task in tensors])
    assert sizes[0][0] == sizes[0][-1] == sizes[1][0] == sizes[1][-1]
    assert json.loads(json.dumps(certificates(tmp_path / "all"))) == certificates(tmp_path / "all")

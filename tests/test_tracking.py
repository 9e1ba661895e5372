"""`run.track`: trackers get the figures of a run, change nothing of it, and cannot end it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import GeneralTracker
from tiny import picture_folder, recipe, task_tensors, vit_folder
from warm import Warm

from perpetune import tracking
from perpetune.cli import call
from perpetune.errors import Interrupted, MissingExtra, StateError, UsageError
from perpetune.learner import Learner
from perpetune.recipe import load_recipe, make_recipe
from perpetune.report import compare
from perpetune.results import read_results
from perpetune.runtime import Silent
from perpetune.state import State, training_digest
from perpetune.trained import Trained

OWN = "test_tracking:Noted"


class Noted(GeneralTracker):
    """Keeps what it gets."""

    name = "noted"
    requires_logging_directory = True
    runs: list[Noted] = []  # noqa: RUF012
    broken = False

    def __init__(self, run_name: str, logging_dir: str):
        super().__init__()
        self.about, self.config, self.figures, self.ended = (run_name, logging_dir), {}, [], False
        self.seen = {key: os.environ.get(key) for key in ("MLFLOW_DISABLE_TELEMETRY", "WANDB_ERROR_REPORTING")}
        Noted.runs.append(self)

    @property
    def tracker(self) -> Noted:
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, Any], step: int | None = None, **more: Any) -> None:
        if self.broken:
            raise OSError(28, "No space left on device")
        print("chatter")
        self.figures.append((step, values))

    def finish(self) -> None:
        self.ended = True

    def curve(self, name: str) -> list[tuple[int, float]]:
        return [(step, values[name]) for step, values in self.figures if name in values]


class Said(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tracking")
    vit_folder(root / "model")
    for name, classes in {"a": ("cat", "dog"), "b": ("fox", "owl")}.items():
        picture_folder(root / name, classes, 25)
    return root


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Noted, "runs", [])
    monkeypatch.setattr(tracking, "EVERY", 0.0)


def content(world: Path, track: Any, **more: Any) -> dict[str, Any]:
    return recipe(world / "model", stream={}, run={"device": "cpu", "track": track}, **more)


def test_a_tracker_gets_the_figures_and_changes_nothing(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told, plain = Said(), Learner(content(world, [], protect=True), tmp_path / "plain")
    learner = Learner(content(world, OWN, protect=True), tmp_path / "s", progress=told)
    for name in ("a", "b"):
        learner.learn(world / name)
        plain.learn(world / name)
    assert {name: {k: v.tolist() for k, v in of.items()} for name, of in task_tensors(tmp_path / "s").items()} == {
        name: {k: v.tolist() for k, v in of.items()} for name, of in task_tensors(tmp_path / "plain").items()
    }
    out, err = capfd.readouterr()
    assert ("chatter" in out, "chatter" in err) == (False, True)
    first, second = Noted.runs
    assert first.about == ("tiny", str(tmp_path / "s" / "track"))
    assert (first.config["train.lr"], first.config["pet.name"], first.config["run.track"]) == (
        0.01,
        "lora",
        f'["{OWN}"]',
    )
    assert first.seen == {"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false"}
    assert "WANDB_ERROR_REPORTING" not in os.environ
    results = read_results(State(tmp_path / "s"))
    per_task = [timing["images"] for timing in results["timings"]]
    assert per_task == [80, 80]  # 40 training examples in two epochs
    assert [at for at, _ in first.curve("loss/train")] == [80]
    assert [at for at, _ in second.curve("loss/train")] == [160]
    row = {
        task["name"]: cell["correct"] / cell["total"]
        for task, cell in zip(results["tasks"], results["cells"][1], strict=True)
    }
    assert {name: second.curve(f"accuracy/{name}") for name in row} == {
        name: [(160, value)] for name, value in row.items()
    }
    assert second.curve("metrics/forgetting") == [(160, results["metrics"]["forgetting"])]
    assert second.curve("protection/room") == [(160, results["protection"][-1]["room"])]
    assert first.ended
    assert second.ended
    assert told.notes[0] == f"run.track: {OWN} is not perpetune's: it says itself where it writes"
    table = compare([results, read_results(State(tmp_path / "plain"))], ["s", "plain"])
    assert len(table["rows"]) == 1
    assert training_digest(learner.recipe) == training_digest(plain.recipe)


def test_a_run_that_goes_on_goes_on_in_its_curves(world: Path, tmp_path: Path) -> None:
    class Stops(Said):
        def step(self, done: int, epoch: int, loss: float | None, images: int) -> None:
            if done == 12:
                learner.runtime.stopping = lambda: 15

    long = {"epochs": 5, "batch_size": 8, "lr": 0.01}
    learner = Learner(content(world, OWN, train=long), tmp_path / "s", progress=Stops())
    with pytest.raises(Interrupted):
        learner.learn(world / "a")
    Learner.load(tmp_path / "s").resume()
    first, second = Noted.runs
    assert first.ended
    assert [at for at, _ in first.curve("loss/train")] == [80, 104]
    assert [at for at, _ in second.curve("loss/train")] == [160, 200]


def test_a_tracker_that_fails_ends_nothing(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Noted, "broken", True)
    told = Said()
    Learner(content(world, [OWN]), tmp_path / "s", progress=told).learn(world / "a")
    assert [line for line in told.notes if "failed" in line] == [
        f"run.track: {OWN} failed, and gets no more figures: [Errno 28] No space left on device"
    ]
    assert len(State(tmp_path / "s").committed) == 1


def test_tensorboard_reads_what_was_written(world: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told = Said()
    learner = Learner(
        content(world, "tensorboard", method="frozen", pet="none", head="ncm"), tmp_path / "s", progress=told
    )
    for name in ("a", "b"):
        learner.learn(world / name)
    assert told.notes[0] == f"run.track: tensorboard writes to {tmp_path / 's' / 'track' / 'tiny'}"
    events = EventAccumulator(str(tmp_path / "s" / "track" / "tiny"))
    events.Reload()
    results = read_results(State(tmp_path / "s"))
    assert [(e.step, e.value) for e in events.Scalars("metrics/tasks")] == [(40, 1.0), (80, 2.0)]
    assert events.Scalars("accuracy/b")[0].value == pytest.approx(results["cells"][1][1]["correct"] / 10)
    assert list((tmp_path / "s" / "track" / "tiny").glob("*/hparams.yml"))


def test_the_process_writes_for_tensorboard(world: Path, tmp_path: Path, warm: Warm) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    state = tmp_path / "s"
    Learner(content(world, "tensorboard", method="frozen", pet="none", head="ncm"), state)
    command = [*warm.command, "-m", "perpetune", "update", str(state), "--data", str(world / "a"), "-q"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    events = EventAccumulator(str(state / "track" / "tiny"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("metrics/tasks")] == [(40, 1.0)]


def test_what_cannot_be_used_is_one_line_and_makes_no_folder(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(tracking.MODULES, "tensorboard", ("no_such_module",))
    monkeypatch.setitem(tracking.MODULES, "wandb", ("no_such_module",))
    with pytest.raises(MissingExtra, match=r"run.track: tensorboard needs .* pip install 'perpetune\[track\]'"):
        Learner(content(world, "tensorboard"), tmp_path / "s")
    with pytest.raises(UsageError, match=r"run.track: test_tracking:Said is not derived from"):
        Learner(content(world, "test_tracking:Said"), tmp_path / "s")
    with pytest.raises(UsageError, match=r"run.track.*there is no tracker 'tensorbord'.*tensorboard"):
        make_recipe(content(world, "tensorbord"))
    with pytest.raises(UsageError, match="a tracker is named twice"):
        make_recipe(content(world, [OWN, OWN]))
    assert call(["init", str(tmp_path / "s"), "--set", "run.track=wandb", "--set", "run.device=cpu"]) == 2
    assert capfd.readouterr().err == (
        "perpetune: run.track: wandb needs a package that is not installed: pip install wandb\n"
    )
    assert not (tmp_path / "s").exists()


def test_who_only_asks_needs_no_tracker(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = tmp_path / "s"
    Learner(content(world, "tensorboard", method="frozen", pet="none", head="ncm"), state)
    monkeypatch.setitem(tracking.MODULES, "tensorboard", ("no_such_module",))
    with pytest.raises(StateError, match="has learned nothing yet"):
        Trained.load(state).predict([])
    with pytest.raises(MissingExtra, match="tensorboard needs"):
        Learner.load(state)


def test_where_data_go_is_said_and_what_the_user_set_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_DIR", "MLFLOW_TRACKING_URI", "TRACKIO_DIR"):
        monkeypatch.delenv(name, raising=False)
    names, place = ["wandb", "trackio", "mlflow"], tmp_path / "track"
    with tracking._surroundings(names, place):
        assert os.environ["WANDB_MODE"] == "offline"
        said = tracking._whereto(names, place, "x")
    assert said == (
        f"run.track: wandb sends nothing (`wandb sync` does) and writes to {place}; trackio writes to {place}/trackio; "
        f"mlflow writes to sqlite:///{place}/mlflow.db"
    )
    assert "WANDB_MODE" not in os.environ
    monkeypatch.setenv("WANDB_MODE", "online")
    with tracking._surroundings(names, place):
        assert "wandb goes by WANDB_MODE=online" in tracking._whereto(names, place, "x")
    assert os.environ["WANDB_MODE"] == "online"


def test_a_recipe_without_trackers_is_as_before() -> None:
    assert "track" not in load_recipe("demo").model_dump(mode="json")["run"]
    assert list(load_recipe("demo", ["run.track=tensorboard"]).model_dump()["run"])[-1] == "checkpoint_every"

"""What a run or an update will take, told before it: as a process and from Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import fits_schema, picture_folder, recipe, split_folder, vit_folder, written
from warm import Warm

import perpetune
from perpetune.cli import call
from perpetune.errors import UsageError
from perpetune.forecast import trial
from perpetune.forecast.extrapolate import Costs, nonnegative
from perpetune.forecast.trial import Counts, Measured
from perpetune.learner import Learner
from perpetune.report import write_report
from perpetune.tasks import Task

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
CLASSES = [f"c{i}" for i in range(8)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, eight classes (four tasks of 20 training and 6 test pictures), two more batches, and a recipe's file."""
    root = tmp_path_factory.mktemp("estimate")
    vit_folder(root / "model")
    split_folder(root / "data", CLASSES, 10, 3)
    picture_folder(root / "more", ("hen", "cow"), 12)
    (root / "recipe.yaml").write_text(json.dumps(recipe(root / "model", root / "data")))
    return root


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}


def test_a_run_is_as_it_was_told(world: Path, tmp_path: Path) -> None:
    given = recipe(world / "model", world / "data", head="ridge")
    told = perpetune.estimate(given)
    learner = Learner(given, tmp_path / "state")
    results = learner.run()
    write_report(results, tmp_path / "state")  # as the verbs do
    assert [(t["name"], t["train"], t["test"]) for t in told["tasks"]] == [
        (t["name"], t["train"], t["test"]) for t in results["tasks"]
    ]
    assert [t["steps"] for t in told["tasks"]] == [2 * 3] * 4  # 2 epochs of 20 examples in batches of 8
    assert [t["bytes"] for t in told["tasks"]] == pytest.approx([t.own() for t in learner.state.committed], rel=0.1)
    size = sum(path.stat().st_size for path in (tmp_path / "state").rglob("*") if path.is_file())
    assert told["bytes"]["value"] == pytest.approx(size, rel=0.05)
    assert told["memory"]["low"] < results["timings"][-1]["peak_memory_bytes"] < told["memory"]["high"]
    assert told["seconds"]["low"] < told["seconds"]["value"] < told["seconds"]["high"]
    assert told["cpu_seconds"]["value"] > 0
    assert [(one["task"], one["train"]) for one in told["tried"]] == [(0, 10), (1, 10), (2, 10), (0, 20), (1, 20)]


def test_the_process_writes_nothing(warm: Warm, world: Path, tmp_path: Path) -> None:
    place, temporary = tmp_path / "here", tmp_path / "tmp"
    place.mkdir()
    temporary.mkdir()
    before = everything(world)
    command = [*warm.command, "-m", "perpetune", "estimate", str(world / "recipe.yaml"), "--set", "train.epochs=1"]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=place, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert everything(world) == before
    assert everything(place) == everything(temporary) == {}
    lines = done.stdout.splitlines()
    assert {"1 c0-c1", "4 c6-c7"} <= {line[1:8] for line in lines}
    assert [line.split()[0] for line in lines if line[:1].isalpha()][:4] == ["time", "of", "memory", "disk"]
    assert "guess: " in done.stdout


def test_an_update_of_a_state(world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    state = tmp_path / "state"
    Learner(recipe(world / "model", stream={}), state).learn(world / "data" / "test")
    before = everything(state)
    assert call(["estimate", str(state), "--data", str(world / "more"), "--json"]) == 0
    found = written(capfd.readouterr().out)[-1]
    fits_schema(found, "estimate")
    told = found["estimate"]
    assert everything(state) == before
    assert (told["what"], told["tasks"][0]["index"], told["tasks"][0]["name"]) == ("update", 1, "more")
    learner = Learner.load(state)
    results = learner.learn(world / "more")
    write_report(results, state)
    (task,) = told["tasks"]
    assert (task["train"], task["test"]) == (results["tasks"][1]["train"], results["tasks"][1]["test"])
    size = sum(path.stat().st_size for path in state.rglob("*") if path.is_file())
    assert told["bytes"]["low"] < size < told["bytes"]["high"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["update"], 2, "recipe state has no data: say what it would learn (--data)"),
        (["none"], 2, "there is no recipe 'none'"),
        (["demo", "--set", "train.epochs=-1"], 2, "train.epochs"),
        (["update", "--data", "nowhere"], 1, "nowhere: no such file or folder"),
        (["demo", "--holdout", "2"], 2, "holdout"),
    ],
)
def test_what_cannot_be_estimated_is_said_in_one_line(
    arguments: list[str], code: int, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call(["estimate", *arguments]) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1


def test_a_state_needs_data_and_one_process(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Learner(recipe(world / "model", stream={}), tmp_path / "state")
    with pytest.raises(UsageError, match="is a state: say with what it would be updated"):
        perpetune.estimate(tmp_path / "state")
    with pytest.raises(UsageError, match="not a task"):
        perpetune.estimate("update", Task(0, "a", (), train=None))  # type: ignore[arg-type]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="one process"):
        perpetune.estimate("demo")


def made(index: int, train: int, *, growth: float = 0.0) -> Measured:
    """A task of a trial whose parts take a second each and 0.1 s an example more; a later one grows."""
    counts = Counts(index, train + 10, train, 10, index, 10 * index)
    seconds = dict.fromkeys((*trial.PARTS, "in statistics", "in protect"), 0.0)
    each = 0.1 if index else 0.3
    seconds["learn"] = (1 + each * train) * (1 + growth * max(0, index - 1))
    seconds["earlier"] = 0.2 * 10 * index
    return Measured(counts, seconds, 0.0, [], 0, 0, (0, 0), 0, 0, None)


def test_costs_are_found_again() -> None:
    known = [made(0, 32), made(1, 32), made(2, 32), made(0, 64), made(1, 64)]
    costs = Costs(known)
    later = costs.of(replace(made(5, 1000).counts, others=5))
    assert costs.of(made(0, 1000).counts)["learn"] == pytest.approx(301)
    assert later["learn"] == pytest.approx(101)
    assert later["earlier"] == pytest.approx(10)
    assert costs.growth == 0
    dearer = Costs([made(0, 32), made(1, 32), made(2, 32, growth=0.5), made(0, 64), made(1, 64)])
    assert dearer.growth == pytest.approx(0.5)
    assert dearer.of(made(5, 1000).counts)["learn"] == pytest.approx(101 * 3)


def test_factors_are_not_negative() -> None:
    assert nonnegative([[1, 1], [1, 2]], [3, 5]) == pytest.approx([1, 2])
    assert nonnegative([[1, 1], [1, 2]], [5, 3]) == pytest.approx([4, 0])  # a second example that takes less is noise
    assert nonnegative([[0, 0]], [1]) == [0, 0]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", ["frozen, ridge", "finetune, linear", "finetune, protected, ridge", "safe"])
def test_an_estimate_is_within_a_quarter_of_the_run(case: str, tmp_path: Path) -> None:
    import estimate as benchmark

    found: dict[str, Any] = benchmark.compare(benchmark.CASES[case], tmp_path, small=True)
    for key in ("cpu_seconds", "memory", "bytes"):
        assert 0.75 < found[key]["ratio"] < 1.25, (key, found)
    assert found["estimate_cpu_seconds"] < 30 or found["share"] < 0.2

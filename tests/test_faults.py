"""A run that is killed at any moment and resumed ends with the bits of one that was never interrupted.

The commands run in children of `fault_server.py`, which die at the moment a test names. Moments are lines
such as `write half PATH` (half of the bytes are there), `rename before PATH` or `step after PHASE N`. Most first kills
are of forks of one run, which then goes on (`Lab.killed`).
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fault_server import RECIPE, Death
from PIL import Image
from tiny import chiefly
from warm import Warm

from perpetune.files import read_folder
from perpetune.seeding import generator
from perpetune.state import State

HERE = Path(__file__).resolve().parent
SERVER = str(HERE / "fault_server.py")
KILLED = -signal.SIGKILL

CHANGES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd": {"train": {**RECIPE["train"], "optimizer": "sgd", "momentum": 0.9, "accumulate": 2, "clip": 1.0}},
    "phases": {
        "method": {"name": "fault_server:TwoPhases", "first": {"epochs": 1}},
        "head": "ncm",
        "stream": {**RECIPE["stream"], "class_order": ["0", "1", "2", "3"]},
    },
    "protect": {
        "protect": {"energy": 0.9, "reference": {"path": "REFERENCE"}},
        "stream": {**RECIPE["stream"], "class_order": ["0", "1", "2", "3"]},
        "evaluate": {"batch_size": 4},
    },
    "update": {"head": "ncm", "data": None, "stream": {"augment": "flip"}},
}


@dataclass(frozen=True)
class Outcome:
    """How one command ended: its exit code, or a signal's number below zero; what it said; what it did."""

    status: int
    out: str
    err: str
    moments: list[str]

    def did(self, start: str) -> list[str]:
        return [line for line in self.moments if line.startswith(start)]


class Lab:
    """Commands run in children of one warm process, itself a fork of `warm`."""

    def __init__(self, folder: Path, warm: Warm):
        self.folder, self.number = folder, itertools.count()
        self.whole: dict[str, Path] = {}
        for name, change in CHANGES.items():
            recipe = {**RECIPE, "backbone": f"folder:{folder / 'vit'}", **change}
            text = yaml.safe_dump(recipe, sort_keys=False).replace("REFERENCE", str(folder / "reference"))
            self.recipe(name).write_text(text)
        pictures(folder / "reference", ["any"])
        self.process = subprocess.Popen(
            [*warm.command, SERVER, "serve", str(folder / "vit"), str(self.recipe("adamw")), str(folder / "warm")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer("ready")

    def recipe(self, name: str) -> Path:
        return self.folder / f"{name}.yaml"

    def command(
        self,
        *arguments: object,
        at: str | None = None,
        nth: int = 1,
        signum: int = signal.SIGKILL,
        seconds: float = 0,
    ) -> Outcome:
        """Run one command in a child, killed at the `nth` moment that `at` matches, or after some seconds."""
        request = self.request(*arguments, deaths=[Death(at, nth, int(signum))] if at else [])
        return self._ask({**request, "seconds": seconds})

    def _ask(self, request: dict[str, Any]) -> Outcome:
        assert self.process.stdin is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return self.outcome(request, int(self._answer()))

    def request(self, *arguments: object, deaths: Sequence[Death]) -> dict[str, Any]:
        log = str(self.folder / f"command-{next(self.number)}")
        return {"arguments": [str(a) for a in arguments], "deaths": [asdict(death) for death in deaths], "log": log}

    def outcome(self, request: dict[str, Any], status: int) -> Outcome:
        out, err, moments = (Path(f"{request['log']}.{kind}").read_text() for kind in ("out", "err", "moments"))
        return Outcome(status, out, err, moments.splitlines())

    def run(self, name: str, state: Path, **moment: Any) -> Outcome:
        return self.command("run", self.recipe(name), "--out", state, "-q", **moment)

    def resume(self, state: Path, **moment: Any) -> Outcome:
        return self.command("resume", state, "-q", **moment)

    def uninterrupted(self, name: str) -> Path:
        """A state that one whole `run` made, while forks of it were killed at all of `FIRST_KILLS`."""
        if name not in self.whole:
            state = self.folder / f"whole-{name}"
            moments = FIRST_KILLS.get(name, [])
            deaths = [Death(*moment, keep=(str(state), str(self._kept(name, *moment)))) for moment in moments]
            fine(self._ask(self.request("run", self.recipe(name), "--out", state, "-q", deaths=deaths)))
            self.whole[name] = state
        return self.whole[name]

    def killed(self, name: str, state: Path, at: str, nth: int = 1) -> None:
        """Make `state` what a `run` leaves that is killed at a moment, which is one of `FIRST_KILLS`."""
        self.uninterrupted(name)
        shutil.copytree(self._kept(name, at, nth), state)

    def _kept(self, name: str, at: str, nth: int) -> Path:
        return self.folder / f"killed-{name}" / str(FIRST_KILLS[name].index((at, nth)))

    def _answer(self, expected: str | None = None) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        assert line, "the fault server is gone"
        assert expected in (None, line)
        return line

    def close(self) -> None:
        with self.process:  # closes its input, which ends it, and waits
            pass


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("lab"), warm)
    yield lab
    lab.close()


def fine(outcome: Outcome) -> None:
    assert (outcome.status, outcome.err) == (0, "")


def learned(state: Path) -> dict[str, bytes]:
    """What must not depend on interruptions: tensors, extra state, counts and documents of every task."""
    return {
        f"{task.folder.name}/{name}": content
        for task in State(state).committed
        for name, content in task.read().items()
        if name != "timings.json"
    }


def assert_same(state: Path, whole: Path) -> None:
    """`state` has the bits of `whole`, every commit in its journal once, and nothing left over."""
    one, other = learned(state), learned(whole)
    assert one.keys() == other.keys()
    assert [name for name in other if one[name] != other[name]] == []
    assert any(name.endswith("pet.safetensors") for name in one)
    committed = [e["name"] for e in State(state).journal() if e["event"] == "task committed"]
    assert committed == [task.name for task in State(whole).committed]
    assert _files(state) == _files(whole)


def _files(state: Path) -> list[str]:
    """All but kept features: how often the same values were evaluated decides which there are; nothing needs them."""
    found = (path.relative_to(state) for path in state.rglob("*"))
    return sorted(str(path) for path in found if path.parts[0] != "kept")


def assert_whole(state: Path) -> None:
    """After a kill: every folder that can be seen is whole."""
    for folder in [*(state / "tasks").glob("[!.]*"), *(p for p in (state / "resume").glob("[!.]*") if p.is_dir())]:
        read_folder(folder)


STEP_4 = "*/resume/.00-train-step-000000004.tmp"
COMMIT = "*/tasks/.0001-2-3.tmp"

# Each: what is going on, the moment, which of the moments that match.
KILLS: list[tuple[str, str, int]] = [
    ("the journal's first line is torn", "log half run begun", 1),
    ("before a task begins", "log half task begun 0-1", 1),
    ("a later task's line is torn", "log half task begun 2-3", 1),
    ("after a task's line", "log after task begun 2-3", 1),
    ("the header of the checkpoints is torn", "write half */resume/.task.json.tmp", 1),
    ("before the first step", "begin after train at 0", 1),
    ("before the first checkpoint", "step before train 2", 1),
    ("between two checkpoints, inside an epoch", "step after train 5", 2),
    ("at the end of an epoch", "step before train 6", 2),
    ("a checkpoint's folder is empty", f"write before {STEP_4}/pet.safetensors", 1),
    ("a checkpoint's optimizer is torn", f"write half {STEP_4}/optimizer.safetensors", 2),
    ("a checkpoint has no manifest", f"write before {STEP_4}/manifest.json", 1),
    ("a checkpoint's manifest is torn", f"write half {STEP_4}/manifest.json", 1),
    ("a checkpoint is complete but aside", "rename before */resume/00-train-step-000000004", 1),
    ("a checkpoint is there beside the one before", "rename after */resume/00-train-step-000000004", 1),
    ("the old checkpoint is out of sight", "rename after */resume/.00-train-step-000000002.gone", 2),
    ("the old checkpoint is half removed", "unlink after head.safetensors", 1),
    ("a phase's end is torn", "write half */resume/.00-train-finished.tmp/head.safetensors", 1),
    ("a phase's end is aside", "rename before */resume/00-train-finished", 3),
    ("a phase has ended", "rename after */resume/00-train-finished", 2),
    ("before the evaluation", "evaluate before 0-1", 1),
    ("inside the evaluation", "evaluate before 2-3", 2),
    ("a commit's tensors are torn", f"write half {COMMIT}/pack.safetensors", 1),
    ("a commit's metrics are torn", f"write half {COMMIT}/metrics.json", 1),
    ("a commit's manifest is torn", f"write half {COMMIT}/manifest.json", 1),
    ("a commit is complete but aside", "rename before */tasks/0001-2-3", 1),
    ("a commit is there and not in the journal", "rename after */tasks/0001-2-3", 1),
    ("the last commit is there and not in the journal", "rename after */tasks/0002-4-5", 1),
    ("a commit's line is torn", "log half task committed 2-3", 1),
    ("a commit's checkpoints are still there", "log after task committed 2-3", 1),
    ("the last commit's checkpoints are still there", "log after task committed 4-5", 1),
    ("a commit's checkpoints are half removed", "rmtree before */.resume.gone", 2),
    ("a report is torn", "write half */.report.html.tmp", 1),
    ("a report is there without the others", "replace after */report.html", 1),
]


ALIKE = {  # the same is left, in another file or at another task, and the same is done about it
    "before a task begins",
    "a later task's line is torn",
    "before the first step",
    "a checkpoint's folder is empty",
    "a checkpoint has no manifest",
    "a checkpoint's manifest is torn",
    "the old checkpoint is out of sight",
    "a phase's end is torn",
    "a phase has ended",
    "before the evaluation",
    "a commit's metrics are torn",
    "a commit is complete but aside",
    "a commit's manifest is torn",
    "a commit's checkpoints are still there",
    "a commit's checkpoints are half removed",
    "a report is there without the others",
    "at the end of an epoch",
    "in the reference pass",
    "after the reference pass",
    "before the first task's pass",
    "before the second task's pass",
    "after the first task's pass",
    "in the second task",
}


def moments(table: list[tuple[str, str, int]]) -> list[Any]:
    """Parameters of a test of first kills; of those that are alike, one always runs."""
    return [pytest.param(at, nth, id=what, marks=[pytest.mark.slow] * (what in ALIKE)) for what, at, nth in table]


@pytest.mark.parametrize(("at", "nth"), moments(KILLS))
def test_killed_and_resumed_is_bit_for_bit_the_same(lab: Lab, tmp_path: Path, at: str, nth: int) -> None:
    whole, state = lab.uninterrupted("adamw"), tmp_path / "state"
    lab.killed("adamw", state, at, nth)
    assert_whole(state)
    fine(lab.resume(state))
    assert_same(state, whole)


TWICE: list[tuple[str, tuple[str, int], tuple[str, int]]] = [
    (
        "at the same checkpoint",
        (f"write half {STEP_4}/pet.safetensors", 1),
        (f"write half {STEP_4}/pet.safetensors", 1),
    ),
    ("in a step, then while cleaning up", ("write half */.report.md.tmp", 1), ("unlink after *.report.md.tmp", 1)),
    ("in a checkpoint, then a later one", ("step before train 4", 1), ("rename after */00-train-step-000000008", 1)),
    (
        "in a commit, then before its line",
        (f"write half {COMMIT}/pack.safetensors", 1),
        ("log half task committed 2-3", 1),
    ),
    (
        "in a commit, then while the journal is mended",
        ("log half task committed 0-1", 1),
        ("replace before */journal.jsonl", 1),
    ),
    ("after a commit, then before it is told", ("rename after */tasks/0001-2-3", 1), ("log half *", 1)),
]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(a, b, id=what, marks=[pytest.mark.slow] * (i in (0, 2, 3, 5)))
        for i, (what, a, b) in enumerate(TWICE)
    ],
)
def test_killed_twice(lab: Lab, tmp_path: Path, first: tuple[str, int], second: tuple[str, int]) -> None:
    whole, state = lab.uninterrupted("adamw"), tmp_path / "state"
    lab.killed("adamw", state, *first)
    assert lab.resume(state, at=second[0], nth=second[1]).status == KILLED
    assert_whole(state)
    fine(lab.resume(state))
    assert_same(state, whole)


def test_killed_again_and_again(lab: Lab, tmp_path: Path) -> None:
    """Every process dies three steps after it began, until none is left to do."""
    whole, state = lab.uninterrupted("adamw"), tmp_path / "state"
    outcome = lab.run("adamw", state, at="step after *", nth=3)
    deaths = 0
    while outcome.status == KILLED:
        deaths += 1
        outcome = lab.resume(state, at="step after *", nth=3)
    fine(outcome)
    assert deaths >= 9  # of 27 steps
    assert_same(state, whole)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kills"), [("adamw", 40), ("sgd", 20), ("phases", 20), ("protect", 20)])
def test_killed_a_hundred_times_by_the_clock(lab: Lab, tmp_path: Path, name: str, kills: int) -> None:
    """At moments that nobody chose: in a step, in a write, while the state is made or read."""
    whole, rng, killed, lives = lab.uninterrupted(name), random.Random(name), 0, 0
    began = time.perf_counter()
    fine(lab.run(name, tmp_path / "measured"))
    most = time.perf_counter() - began
    while killed < kills:
        state, lives = tmp_path / f"state-{lives}", lives + 1
        ended = -signal.SIGALRM
        while ended == -signal.SIGALRM:
            command = lab.resume if (state / "recipe.yaml").exists() else partial(lab.run, name)
            outcome = command(state, seconds=rng.uniform(0, most) if killed < kills else 0)
            ended, killed = outcome.status, killed + (outcome.status == -signal.SIGALRM)
        fine(outcome)
        assert_same(state, whole)
    assert killed == kills
    assert lives > 1


MAKING = ["write half */.backbone.json.tmp", "replace after */backbone.json", "write half */.recipe.yaml.tmp"]
MADE = "replace after */recipe.yaml"


@pytest.mark.parametrize("at", MAKING)
def test_killed_while_the_state_is_made(lab: Lab, tmp_path: Path, at: str) -> None:
    """It is not a state yet: `resume` says so, and the same `run` works."""
    whole, state = lab.uninterrupted("adamw"), tmp_path / "state"
    lab.killed("adamw", state, at)
    assert not (state / "recipe.yaml").exists()
    refused = lab.resume(state)
    assert refused.status == 1
    says = "is not a state folder (it has no recipe.yaml): `perpetune init` or `perpetune run` makes one"
    assert one_line(refused.err) == f"perpetune: {state} {says}"
    fine(lab.run("adamw", state))
    assert_same(state, whole)


def test_killed_right_after_the_state_is_made(lab: Lab, tmp_path: Path) -> None:
    whole, state = lab.uninterrupted("adamw"), tmp_path / "state"
    lab.killed("adamw", state, MADE)
    fine(lab.resume(state))
    assert_same(state, whole)


def one_line(text: str) -> str:
    assert text.count("\n") == 1, text
    return text.strip()


@pytest.mark.parametrize(
    ("signum", "code", "at", "nth", "says"),
    [
        (signal.SIGTERM, 143, "step after train 4", 2, "stopped in task 2-3, phase train, after step 5 of 9"),
        (signal.SIGINT, 130, "step after train 2", 1, "stopped in task 0-1, phase train, after step 3 of 9"),
        pytest.param(
            signal.SIGTERM,
            143,
            "step after train 8",
            1,
            "stopped in task 0-1, phase train, after step 9 of 9",
            marks=pytest.mark.slow,
        ),
        (signal.SIGTERM, 143, "evaluate before 0-1", 2, "stopped while task 0-1 was evaluated"),
        (signal.SIGINT, 130, "write half */resume/.00-train-finished.tmp/pet.safetensors", 1, "stopped while task 0-1"),
    ],
)
def test_a_signal_stops_in_order(
    lab: Lab, tmp_path: Path, signum: int, code: int, at: str, nth: int, says: str
) -> None:
    whole, state = lab.uninterrupted("adamw"), tmp_path / "state"
    stopped = lab.run("adamw", state, at=at, nth=nth, signum=signum)
    assert stopped.status == code
    line = one_line(stopped.err)
    assert line.startswith(f"perpetune: {says}")
    assert f"`perpetune resume {state}`" in line
    saved = [path.name for path in (state / "resume").iterdir() if path.is_dir()]
    assert saved, "no checkpoint"
    assert_whole(state)
    resumed = lab.resume(state)
    fine(resumed)
    if "after step" in says:  # the step that the signal came in is not repeated
        done = int(says.split("after step ")[1].split()[0])
        assert saved == [f"00-train-step-{done:09d}"]
        assert f"begin after train at {done}" in resumed.moments
    assert_same(state, whole)


MOMENTUM = [("step after train 5", 2), ("write half */optimizer.safetensors", 3)]


@pytest.mark.parametrize(("at", "nth"), MOMENTUM)
def test_momentum_and_accumulation(lab: Lab, tmp_path: Path, at: str, nth: int) -> None:
    whole, state = lab.uninterrupted("sgd"), tmp_path / "state"
    assert learned(whole) != learned(lab.uninterrupted("adamw"))
    lab.killed("sgd", state, at, nth)
    fine(lab.resume(state))
    assert_same(state, whole)


PHASES = [
    ("step after head 3", ["head at 2", "both at 0"]),
    ("rename after */00-head-finished", ["head at the end", "both at 0"]),
    ("step after both 5", ["head at the end", "both at 4"]),
    ("rename after */01-both-finished", ["head at the end", "both at the end"]),
    ("evaluate before *", ["head at the end", "both at the end"]),
]


@pytest.mark.parametrize(("at", "begun"), chiefly(PHASES, [row for row in PHASES if "01-both" not in row[0]]))
def test_finished_phases_are_loaded_not_repeated(lab: Lab, tmp_path: Path, at: str, begun: list[str]) -> None:
    whole, state = lab.uninterrupted("phases"), tmp_path / "state"
    lab.killed("phases", state, at)
    resumed = lab.resume(state)
    fine(resumed)
    first = resumed.moments[: resumed.moments.index("log after task committed 0-1")]
    assert [line.removeprefix("begin after ") for line in first if line.startswith("begin after")] == begun
    steps = [line.removeprefix("step after ") for line in first if line.startswith("step after")]
    expected = [
        f"{phase} {done}"
        for (phase, total), place in zip((("head", 3), ("both", 9)), (b.split(" at ")[1] for b in begun), strict=True)
        if place != "the end"
        for done in range(int(place) + 1, total + 1)
    ]
    assert steps == expected
    assert_same(state, whole)


def pictures(folder: Path, classes: Sequence[str], each: int = 8) -> Path:
    for name in classes:
        (folder / name).mkdir(parents=True)
        pattern = torch.randint(0, 256, (16, 16, 3), generator=generator("pattern", name))
        for i in range(each):
            noise = torch.randint(-50, 51, (16, 16, 3), generator=generator("noise", name, i))
            pixels = (pattern + noise).clamp(0, 255).to(torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / name / f"{i}.png")
    return folder


PROTECTING: list[tuple[str, str, int]] = [
    ("in the reference pass", "protect batch", 1),
    ("in its second look, with A moved in memory", "protect batch", 4),
    ("after the reference pass", "protect after 1", 1),
    ("in the first task, with the reference protected", "step after train 5", 1),
    ("before the first task's pass", "protect before 1", 1),
    ("in the first task's pass", "protect batch", 6),
    ("after the first task's pass", "protect after 2", 1),
    ("the memory is torn in a commit", "write half */tasks/.0000-0-1.tmp/pack.safetensors", 1),
    ("in the second task", "step after train 5", 2),
    ("before the second task's pass", "protect before 2", 1),
    ("a commit is there and not in the journal", "rename after */tasks/0001-2-3", 1),
]


@pytest.mark.parametrize(("at", "nth"), moments(PROTECTING))
def test_killed_under_protection(lab: Lab, tmp_path: Path, at: str, nth: int) -> None:
    """The memory of what is protected is of the commits alone: a pass that was killed is made again."""
    whole, state = lab.uninterrupted("protect"), tmp_path / "state"
    lab.killed("protect", state, at, nth)
    assert_whole(state)
    fine(lab.resume(state))
    assert_same(state, whole)
    assert any(name.endswith("protect.safetensors") for name in learned(state))


FIRST_KILLS: dict[str, list[tuple[str, int]]] = {
    "adamw": list(
        dict.fromkeys(
            [
                *((at, nth) for _, at, nth in KILLS),
                *(first for _, first, _ in TWICE),
                *((at, 1) for at in [*MAKING, MADE]),
            ]
        )
    ),
    "sgd": MOMENTUM,
    "phases": [(at, 1) for at, _ in PHASES],
    "protect": [(at, nth) for _, at, nth in PROTECTING],
}


def test_a_signal_while_features_are_protected(lab: Lab, tmp_path: Path) -> None:
    whole, state = lab.uninterrupted("protect"), tmp_path / "state"
    stopped = lab.run("protect", state, at="protect batch", nth=6, signum=signal.SIGTERM)
    assert stopped.status == 143
    line = one_line(stopped.err)
    assert line.startswith("perpetune: stopped while features were protected")
    assert f"`perpetune resume {state}`" in line
    fine(lab.resume(state))
    assert_same(state, whole)


UPDATING = {
    "here": [
        "step after train 5",
        "write half */tasks/.0001-zoo.tmp/task.json",
        "rename after */tasks/0001-zoo",
        "log half task committed zoo",
    ],
    "more": [
        "begin after train at 0",
        "write half */resume/.00-train-step-000000004.tmp/method.safetensors",
        "log after task committed zoo",
    ],
}


@pytest.mark.parametrize("of", chiefly(UPDATING, ["here"]))
def test_update_killed_and_resumed(lab: Lab, tmp_path: Path, of: str) -> None:
    first, second = pictures(tmp_path / "first", ["cat", "dog"]), pictures(tmp_path / "second", ["dog", "emu"])
    begun = tmp_path / "begun"
    fine(lab.command("init", begun, "--recipe", lab.recipe("update"), "--data", first, "--name", "pets", "-q"))
    update = ("--data", second, "--name", "zoo", "--holdout", 0.25, "-q")
    whole = shutil.copytree(begun, tmp_path / "whole")
    fine(lab.command("update", whole, *update))
    assert [task.name for task in State(whole).committed] == ["pets", "zoo"]
    for i, at in enumerate(UPDATING[of]):
        state = shutil.copytree(begun, tmp_path / f"state-{i}")
        assert lab.command("update", state, *update, at=at).status == KILLED
        assert_whole(state)
        resumed = lab.resume(state)
        fine(resumed)
        if at == "step after train 5":
            assert "begin after train at 4" in resumed.moments
        assert_same(state, whole)
    state = shutil.copytree(begun, tmp_path / "stopped")
    stopped = lab.command("update", state, *update, at="step after train 5", signum=signal.SIGTERM)
    assert stopped.status == 143
    assert f"`perpetune resume {state}`" in one_line(stopped.err)
    fine(lab.resume(state))
    assert_same(state, whole)


def test_rollback_drops_an_update_that_was_begun(lab: Lab, tmp_path: Path) -> None:
    """What was rolled back is not taken up again by `resume`, also when the rollback itself is killed."""
    first, second = pictures(tmp_path / "first", ["cat", "dog"]), pictures(tmp_path / "second", ["dog", "emu"])
    state = tmp_path / "state"
    fine(lab.command("init", state, "--recipe", lab.recipe("update"), "--data", first, "--name", "pets", "-q"))
    assert lab.command("update", state, "--data", second, "--name", "zoo", at="step after train 5").status == KILLED
    before = shutil.copytree(state, tmp_path / "before")
    fine(lab.command("rollback", state, "--to", "pets"))
    assert not (state / "resume").exists()
    assert lab.resume(state).did("step") == []
    fine(lab.command("update", before, "--data", second, "--name", "zoo"))
    assert lab.command("rollback", before, "--to", "pets", at="rename after */tasks/.0001-zoo.gone").status == KILLED
    assert lab.resume(before).did("step") == []
    assert [task.name for task in State(before).committed] == ["pets"]


def test_killed_while_rolling_back(lab: Lab, tmp_path: Path) -> None:
    whole, state = lab.uninterrupted("adamw"), tmp_path / "state"
    for at, kept in (
        ("rename before */tasks/.0002-4-5.gone", 3),
        ("rename after */tasks/.0002-4-5.gone", 2),
        ("rename before */tasks/.0001-2-3.gone", 2),
        ("rmtree before */tasks/.0001-2-3.gone", 1),
    ):
        shutil.copytree(whole, state)
        assert lab.command("rollback", state, "--to", "0-1", at=at).status == KILLED
        assert len(State(state).committed) == kept
        assert_whole(state)
        fine(lab.command("rollback", state, "--to", "0-1"))
        assert [task.name for task in State(state).committed] == ["0-1"]
        assert sorted(path.name for path in (state / "tasks").iterdir()) == ["0000-0-1"]
        shutil.rmtree(state)


def test_rolled_back_and_learned_again(lab: Lab, tmp_path: Path) -> None:
    whole, state = lab.uninterrupted("adamw"), tmp_path / "state"
    shutil.copytree(whole, state)
    fine(lab.command("rollback", state, "--to", "0-1"))
    fine(lab.resume(state))
    one, other = learned(state), learned(whole)
    assert one == other


def test_a_fresh_interpreter_goes_on(lab: Lab, tmp_path: Path) -> None:
    """As a user starts it."""
    whole, state = lab.uninterrupted("adamw"), tmp_path / "state"
    lab.killed("adamw", state, "rename after */tasks/0001-2-3")
    command = [sys.executable, "-m", "perpetune", "resume", str(state), "-q"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert (done.returncode, done.stderr) == (0, "")
    assert_same(state, whole)


@pytest.mark.slow
def test_a_process_of_its_own_is_killed_and_resumed(lab: Lab, tmp_path: Path) -> None:
    """The same without any fork: two fresh interpreters, the second one as a user starts it."""
    whole, state = lab.uninterrupted("adamw"), tmp_path / "state"
    at = f"write half {STEP_4}/pet.safetensors"
    arguments = ("run", lab.recipe("adamw"), "--out", state, "-q")
    request = lab.request(*arguments, deaths=[Death(at, 2)])
    command = [sys.executable, SERVER, "once", json.dumps(request)]
    assert subprocess.run(command, timeout=150).returncode == KILLED
    assert lab.outcome(request, KILLED).moments[-1].startswith("write half")
    command = [sys.executable, "-m", "perpetune", "resume", str(state), "-q"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert (done.returncode, done.stderr) == (0, "")
    assert_same(state, whole)

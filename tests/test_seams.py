"""Where carried sums, oracles, taps, renewal, standardised ridge and heads of classes on texts meet."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import chiefly, every, recipe, split_folder, tiny_language_model, vit_folder

from perpetune import check
from perpetune.check import check_method
from perpetune.errors import Interrupted
from perpetune.heads import Ridge
from perpetune.learner import Learner
from perpetune.report import compare
from perpetune.runtime import Silent
from perpetune.snapshot import SUMS, snapshot

CARRIED = {"name": "ridge", "carry": True}
TRAIN = {"epochs": 3, "batch_size": 8, "lr": 0.05}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    vit_folder(folder / "vit")
    split_folder(folder / "data", "abcdef", 8, 5)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks of two classes, and a language model."""
    root = tmp_path_factory.mktemp("texts")
    tiny_language_model(root / "lm")
    for name, words in {"sky": ("blue", "grey"), "sum": ("one", "two"), "say": ("yes", "no way")}.items():
        rows = [
            {"prompt": f"{name} {i % 2}: which is it {i}?", "answer": words[i % 2], "options": list(words)}
            for i in range(20)
        ]
        (root / "data" / name).mkdir(parents=True)
        for split, some in (("train", rows[:12]), ("test", rows[12:])):
            path = root / "data" / name / f"{split}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in some))
    return root


def pictures_recipe(world: Path, **changes: Any) -> dict[str, Any]:
    return recipe(world / "vit", world / "data", **{"train": TRAIN, "head": CARRIED, **changes})


def texts_recipe(texts: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "texts",
        "backbone": {"name": f"hf:{texts / 'lm'}", "taps": 2},
        "pet": {"name": "lora", "rank": 2},
        "head": CARRIED,
        "train": {"epochs": 3, "batch_size": 4, "lr": 0.02},
        "data": {"name": "text", "path": str(texts / "data")},
        "run": {"device": "cpu"},
        **changes,
    }


RECIPES: dict[str, Callable[[Path], dict[str, Any]]] = {"pictures": pictures_recipe, "texts": texts_recipe}


@pytest.fixture
def made(request: pytest.FixtureRequest, world: Path, texts: Path) -> Callable[..., dict[str, Any]]:
    """The recipe over pictures or texts, with changes."""
    kind = request.param
    return lambda **changes: RECIPES[kind](world if kind == "pictures" else texts, **changes)


both_kinds = pytest.mark.parametrize("made", RECIPES, indirect=True)


def figures(results: dict[str, Any], oracle: bool) -> list[list[int]]:
    return [[(cell["oracle"] if oracle else cell)["correct"] for cell in row if cell] for row in results["cells"]]


def facts(learner: Learner) -> list[dict[str, Any]]:
    """What the head tells of each task."""
    found = [json.loads(path.read_text()) for path in sorted(learner.state.folder.glob("tasks/*/metrics.json"))]
    return [one["facts"]["model.head"] for one in found]


# -- oracle × carry × texts -------------------------------------------------------------------------------


@pytest.mark.parametrize("made", chiefly(RECIPES, ["texts"]), indirect=True)
def test_an_oracle_is_that_of_the_features_however_the_sums_follow_them(
    made: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Features and oracle do not depend on what becomes of old sums; the sums themselves do."""
    learners, results = {}, {}
    for name, head in {"carried": CARRIED, "stale": {"name": "ridge"}}.items():
        learners[name] = Learner(made(head=head, evaluate={"oracle": True}), tmp_path / name)
        results[name] = learners[name].run()
    assert figures(results["carried"], True) == figures(results["stale"], True)
    files = {name: snapshot(learner.method) for name, learner in learners.items()}
    assert files["carried"]["pet.safetensors"] == files["stale"]["pet.safetensors"]
    told = facts(learners["carried"])
    assert "moved" not in told[0], "nothing is old at the first task"
    assert all(one["moved"] > 0.001 for one in told[1:])
    assert (files["carried"][SUMS] != files["stale"][SUMS]) == any(one["carried"] for one in told[1:])
    assert all("moved" not in one for one in facts(learners["stale"]))


@both_kinds
def test_where_features_stay_an_oracle_is_the_head_itself(made: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    learner = Learner(made(method="frozen", pet="none", evaluate={"oracle": True}), tmp_path / "state")
    results = learner.run()
    assert figures(results, True) == figures(results, False)
    assert sum(figures(results, False)[-1]) > 0
    assert all("moved" not in one for one in facts(learner)), "nothing was trained"


# -- carry × a stop anywhere ------------------------------------------------------------------------------


class Crash(Exception):
    """As if the process were gone."""


def crash() -> None:
    raise Crash


class AtPhase(Silent):
    """Does something at a step of a phase of the second task."""

    def __init__(self, phase: str, step: int, act: Callable[[], None]):
        self.wanted, self.act, self.index, self.now = (phase, step), act, 0, ""

    def task(self, index: int, name: str, classes: int, examples: int) -> None:
        self.index = index

    def phase(self, name: str, steps: int, epochs: int, done: int) -> None:
        self.now = name

    def step(self, done: int, epoch: int, loss: float | None, images: int) -> None:
        if self.index == 1 and (self.now, done) == self.wanted:
            self.act()


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


STOPS = [("train", 3, crash, 2), ("train", 2, stop, 3), ("oracle head", 1, stop, None)]


@pytest.mark.parametrize("made", chiefly(RECIPES, ["pictures"]), indirect=True)
def test_a_stop_anywhere_carries_sums_once(made: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    content = made(method={"name": "finetune", "head_first": 0.4}, evaluate={"oracle": True})
    whole = Learner(content, tmp_path / "whole")
    wanted, bits = whole.run(), snapshot(whole.method)
    content["run"] = {**content["run"], "checkpoint_every": 2}
    for number, (phase, step, act, saved) in enumerate(STOPS):
        kept = ["00-head-finished", f"01-train-step-{saved:09d}" if saved else "01-train-finished"]
        begun = Learner(content, tmp_path / str(number), progress=AtPhase(phase, step, act))
        with pytest.raises(Crash if act is crash else Interrupted):
            begun.run()
        assert sorted(path.name for path in (tmp_path / str(number) / "resume").iterdir() if path.is_dir()) == kept
        # The same object goes on from the last commit too, not from sums that were moved already.
        learner = begun if phase == "oracle head" else Learner.load(tmp_path / str(number))
        learner.runtime.progress = Silent()
        results = learner.resume()
        assert snapshot(learner.method) == bits, (phase, step)
        assert results["cells"] == wanted["cells"]


# -- carry × heads × methods × renewal × taps -------------------------------------------------------------

CONTRACT = [
    ("finetune", ("head.name=ridge", "head.carry=true", "protect.renew=true"), 2),
    ("finetune", ("head.name=ridge", "head.carry=true", "head.projection=40", "head.sums=float32"), 1),
    ("finetune", ("head.name=ncm", "head.carry=true", "protect.renew=true", "protect.start=leading"), None),
    ("safe", ("head.name=ridge", "head.carry=true"), 2),
    ("olora", ("head.name=ridge", "head.carry=true"), None),
    ("joint", ("head.name=ridge", "head.carry=true"), 1),
]


@pytest.mark.parametrize(("method", "changes", "taps"), every(CONTRACT, 6))
def test_the_contract_holds_where_sums_are_carried(
    method: str, changes: tuple[str, ...], taps: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = check.tiny_backbone
    monkeypatch.setattr("perpetune.check.pictures.tiny_backbone", lambda: plain().tap(taps))
    faults = [f"{o.rule}: {o.fault}" for o in check_method(method, changes) if o.fault is not None]
    assert faults == []


@pytest.mark.parametrize(("energy", "still"), [(1.0, True), (0.9, False)])
def test_renewed_protected_and_tapped_together(energy: float, still: bool, world: Path, tmp_path: Path) -> None:
    """Behind full protection features move by rounding, which no sums follow; with less they do. A reload is alike."""
    content = pictures_recipe(
        world,
        backbone={"name": f"folder:{world / 'vit'}", "taps": 1},
        protect={"energy": energy, "renew": True},
        evaluate={"oracle": True},
    )
    learner = Learner(content, tmp_path / "state")
    results = learner.run()
    told = facts(learner)[1:]
    assert [one["carried"] for one in told] == [not still] * 2
    assert all((0 < one["moved"] < 1e-5) is still for one in told)
    if still:
        assert figures(results, True) == figures(results, False), "the oracle is the head itself"
    assert Learner.load(tmp_path / "state").evaluate() == learner.evaluate()
    head = learner.method.model.head
    assert isinstance(head, Ridge)
    assert head.rank == head.width + 1 == learner.backbone.dim + 1 == 33
    assert learner.method.protection is not None
    assert learner.method.protection.renewed == 2


# -- headroom × texts -------------------------------------------------------------------------------------


def test_classes_on_texts_have_a_headroom(texts: Path, tmp_path: Path) -> None:
    plain = {"head": "ridge", "evaluate": {"oracle": "last"}}
    runs = {
        "control": {**plain, "method": "frozen", "pet": "none", "backbone": f"hf:{texts / 'lm'}"},
        "taps": {**plain, "method": "frozen", "pet": "none"},
        "joint": {**plain, "method": "joint"},
        "mine": {},
    }
    results = [Learner(texts_recipe(texts, name=n, **c), tmp_path / n).run() for n, c in runs.items()]
    (one,) = compare(results)["headroom"]
    assert [(row["label"], row["role"]) for row in one["rows"] if row["role"] != "diagnosis"] == [
        ("control", "control"),
        ("taps", "frozen taps"),
        ("mine", "method"),
        ("joint", "joint"),
    ]
    assert sum(row["role"] == "diagnosis" for row in one["rows"]) == 3
    assert one["missing"] == []
    assert one["headroom"]["n"] == 1

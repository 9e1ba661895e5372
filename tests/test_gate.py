"""An update that loses too much is refused, and the state is as it was, byte for byte."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_faults import KILLED, Lab, assert_whole, fine, learned, one_line, pictures
from tiny import every, recipe, vit_folder, written
from warm import Warm

from perpetune.cli import call
from perpetune.errors import Refused, StateError, UsageError
from perpetune.evaluate import Asked
from perpetune.gate import judge
from perpetune.learner import Learner
from perpetune.numerics.paired import fall_test, holm, sign_test
from perpetune.report import write_report
from perpetune.results import read_results
from perpetune.seeding import numpy_generator
from perpetune.state import State

CLASSES = ("cat", "dog", "fox", "owl")


def everything(state: Path) -> dict[str, bytes]:
    """All files of a state, of whatever kind."""
    return {str(path.relative_to(state)): path.read_bytes() for path in sorted(state.rglob("*")) if path.is_file()}


def month(path: Path, each: int, first: int, shuffled: bool = False) -> Path:
    """Noisy pictures of four classes that are not easy to tell apart; or with each class under another's name."""
    for label in CLASSES:
        (path / label).mkdir(parents=True)
        for number in range(first, first + each):
            shown = CLASSES[CLASSES.index(label) - 1] if shuffled else label
            pattern = numpy_generator("pattern", shown).integers(0, 200, (4, 4, 3)).repeat(4, 0).repeat(4, 1)
            noise = numpy_generator("noise", label, number).normal(0, 60, pattern.shape)
            pixels = (128 + 0.6 * (pattern - 100) + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(path / label / f"{number}.png")
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two good months, one whose labels were shuffled, and the state `known` after the first."""
    root = tmp_path_factory.mktemp("gate")
    vit_folder(root / "vit")
    month(root / "good-1", 40, 0)
    month(root / "good-2", 40, 100)
    month(root / "bad", 80, 200, shuffled=True)
    content = recipe(root / "vit", pet="none", method="frozen", head="ridge", stream={})
    learner = Learner(content, root / "known")
    learner.learn(root / "good-1")
    write_report(read_results(learner.state), root / "known")
    return root


@pytest.fixture
def state(world: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world / "known", tmp_path / "state"))


def test_good_months_pass_and_shuffled_labels_do_not(world: Path, state: Path) -> None:
    learner = Learner.load(state)
    results = learner.learn(world / "good-2", max_drop=2)
    assert [gate["accepted"] for gate in results["gates"]] == [True]
    before = everything(state)
    with pytest.raises(Refused) as caught:
        learner.learn(world / "bad", max_drop=2)
    refused = caught.value
    assert everything(state) == before
    assert refused.exit_code == 3
    assert len(refused.now["tasks"]) == 2
    assert [task["name"] for task in refused.candidate["tasks"]] == ["good-1", "good-2", "bad"]
    failed = [row for row in refused.gate["rows"] if row["fails"]]
    assert failed
    assert all(row["drop"] > 2 for row in failed)
    assert f"--max-drop {refused.gate['needs']:g} would pass" in str(refused)
    # the learner goes on from the state as it was, and what would pass does
    results = learner.learn(world / "bad", max_drop=refused.gate["needs"])
    assert results["gates"][-1]["accepted"]
    assert results["cells"] == refused.candidate["cells"]


def test_what_a_gate_lets_through_has_the_bits_of_a_plain_update(world: Path, state: Path, tmp_path: Path) -> None:
    plain = shutil.copytree(state, tmp_path / "plain")
    Learner.load(plain).learn(world / "good-2")
    Learner.load(state).learn(world / "good-2", max_drop=0)
    one, other = learned(state), learned(plain)
    metrics = "0001-good-2/metrics.json"
    gated, free = json.loads(one.pop(metrics)), json.loads(other.pop(metrics))
    assert gated.pop("gate")["accepted"]
    assert gated == free
    assert one == other
    begun = [event for event in State(state).journal() if event["event"] == "task begun"]
    assert begun[-1]["gate"] == {"max_drop": 0.0}


def test_the_command(world: Path, state: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = everything(state)
    update = ["update", str(state), "--data", str(world / "bad"), "--max-drop", "2", "-q"]
    assert call(update) == 3
    out, err = capfd.readouterr()
    assert everything(state) == before
    assert one_line(err).startswith("perpetune: task bad is refused, and the state is as it was: good-1 falls by ")
    report = state.with_name("state-refused-bad") / "report.html"
    assert f"report: {report}" in out
    assert "fails" in report.read_text()
    assert call([*update, "--json", "--report", str(state.parent / "elsewhere")]) == 3
    said, failed = written(capfd.readouterr().out, "refused", "failed")
    assert (len(said["state"]["tasks"]), len(said["candidate"]["tasks"]), failed["code"]) == (1, 2, 3)
    assert said["report"] == str(state.parent / "elsewhere" / "report.html")
    assert (state.parent / "elsewhere" / "report.json").is_file()
    assert call([*update[:-2], "100", "-q"]) == 0
    assert "accepted (bar 100 points)" in (state / "report.md").read_text()


def test_the_process_refuses_by_its_exit_code(world: Path, state: Path, warm: Warm) -> None:
    before = everything(state)
    update = [*warm.command, "-m", "perpetune", "update", str(state), "-q", "--max-drop", "2", "--data"]
    done = subprocess.run([*update, str(world / "bad")], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert one_line(done.stderr).startswith(
        "perpetune: task bad is refused, and the state is as it was: good-1 falls by "
    )
    assert everything(state) == before
    done = subprocess.run([*update, str(world / "good-2")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert [task.name for task in State(state).committed] == ["good-1", "good-2"]


def test_the_recipe_has_a_gate_for_updates(world: Path, tmp_path: Path) -> None:
    content = recipe(world / "vit", pet="none", method="frozen", head="ridge", stream={}, gate=True)
    learner = Learner(content, tmp_path / "state")
    assert learner.recipe.gate is not None
    assert learner.recipe.gate.max_drop == 2
    assert "gates" not in learner.learn(world / "good-1")  # the first task has nothing before it
    with pytest.raises(Refused):
        learner.learn(world / "bad")


def test_without_earlier_test_data_the_gate_cannot_judge(world: Path, tmp_path: Path) -> None:
    content = recipe(world / "vit", pet="none", method="frozen", head="ridge", stream={})
    gone = shutil.copytree(world / "good-1", tmp_path / "gone")
    learner = Learner(content, tmp_path / "state")
    learner.learn(gone)
    shutil.rmtree(gone)
    before = everything(tmp_path / "state")
    with pytest.raises(Refused, match="cannot judge it: no earlier task has test data that are still there"):
        Learner.load(tmp_path / "state").learn(world / "good-2", max_drop=50)
    assert everything(tmp_path / "state") == before


@pytest.mark.parametrize("bar", ["-1", "nan", "much"])
def test_a_bar_that_is_none(bar: str, world: Path, state: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = everything(state)
    assert call(["update", str(state), "--data", str(world / "bad"), "--max-drop", bar, "-q"]) == 2
    assert "max" in one_line(capfd.readouterr().err)
    if bar == "nan":
        with pytest.raises(UsageError, match="a number of points is expected, 0 or more"):
            Learner.load(state).learn(world / "bad", max_drop=-1)
    assert everything(state) == before


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "costs"), [(0, True), (1, False), (2, True)])
def test_months_of_digits(seed: int, costs: bool, tmp_path: Path) -> None:
    """With the packaged model and the recipe of `init`: two good months, and one with labels drawn at random. In one of
    three draws that month costs the earlier ones nothing, so the gate lets it through."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = numpy_generator("digits", seed).permutation(len(digits.target))
    labels = digits.target.copy()
    labels[order[900:]] = numpy_generator("wrong", seed).permutation(labels[order[900:]])
    for name, rows in (("1", order[:450]), ("2", order[450:900]), ("3", order[900:])):
        for row in rows:
            (tmp_path / name / str(labels[row])).mkdir(parents=True, exist_ok=True)
            pixels = np.round(digits.images[row] * (255 / 16)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / str(labels[row]) / f"{row}.png")
    learner = Learner("update", tmp_path / "state")
    learner.learn(tmp_path / "1", max_drop=2)
    learner.learn(tmp_path / "2", max_drop=2)
    before = everything(tmp_path / "state")
    if not costs:
        assert learner.learn(tmp_path / "3", max_drop=2)["gates"][-1]["rows"][-1]["drop"] == 0
        return
    with pytest.raises(Refused):
        learner.learn(tmp_path / "3", max_drop=2)
    assert everything(tmp_path / "state") == before
    assert learner.learn(tmp_path / "3", max_drop=100)["gates"][-1]["accepted"]


# -- the rule -----------------------------------------------------------------------------------------------


def asked(right: list[float]) -> Asked:
    import torch

    cell = {"correct": sum(right), "total": len(right), "per_class": {}}
    return Asked(cell, right=torch.tensor(right, dtype=torch.float64))


def judged(lost: int, of: int, bar: float = 2.0, gained: int = 0) -> dict[str, Any]:
    before = asked([1.0] * (of - gained) + [0.0] * gained)
    after = asked([0.0] * lost + [1.0] * (of - lost))
    return judge(bar, {"a": before}, {"a": after}, {}, {}, {})


def test_chance_is_no_fall_and_a_fall_is_none_that_the_bar_allows() -> None:
    assert judged(1, 20)["accepted"]  # five points, and one image
    assert judged(4, 20)["accepted"]
    assert not judged(5, 20)["accepted"]  # 1 in 32
    assert judged(5, 20)["needs"] == 25
    assert judged(5, 20, bar=25)["accepted"]
    assert not judged(5, 20, bar=24.9)["accepted"]
    assert judged(12, 1000, bar=2)["accepted"]  # more than chance, and within the bar
    assert judged(9, 100, gained=4)["accepted"]
    assert not judged(19, 100, gained=4)["accepted"]
    assert "too few to tell" in judged(4, 4)["reason"]
    assert not judged(4, 4)["accepted"]


def test_small_falls_of_many_tasks_are_seen_together() -> None:
    before = {name: asked([1.0] * 20) for name in "abcd"}
    after = {name: asked([0.0] * 3 + [1.0] * 17) for name in "abcd"}
    found = judge(2, before, after, {}, {}, {})
    assert [row["name"] for row in found["rows"] if row["fails"]] == ["all earlier tasks"]
    assert found["needs"] == 15


def test_exams_count_where_more_is_better() -> None:
    then, now = {"x": {"accuracy": 0.9, "threshold": 0.5}}, {"x": {"accuracy": 0.7, "threshold": 0.1}}
    found = judge(2, {}, {}, then, now, {"x": 200})
    assert [(row["name"], row["fails"]) for row in found["rows"]] == [("x accuracy", True)]
    assert judge(2, {}, {}, then, {"x": {"accuracy": 0.89}}, {"x": 200})["accepted"]
    assert not judge(2, {}, {}, then, now, {"x": 4})["accepted"]  # too few questions to judge


def test_tests_of_falls() -> None:
    assert sign_test(0, 0) == 1
    assert sign_test(5, 0) == 1 / 32
    assert sign_test(2, 1) == 0.5
    assert fall_test(0.9, 0.9, 50) == 0.5
    assert fall_test(1, 1, 5) == 1
    assert fall_test(0.9, 0.7, 200) < 1e-6
    assert holm([0.04, 0.001, 0.03], 0.05) == [False, True, False]
    assert holm([0.02, 0.001, 0.03], 0.05) == [True, True, True]


# -- kills --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("lab"), warm)
    yield lab
    lab.close()


def beside(state: Path) -> dict[str, bytes]:
    return {name: content for name, content in everything(state).items() if not name.startswith("candidate/")}


ASIDE = [
    "write half */candidate/.candidate.json.tmp",
    "step after train 5",
    "write half */candidate/resume/.00-train-step-000000004.tmp/method.safetensors",
    "rename after */candidate/resume/00-train-finished",
    "evaluate before pets",
]
DECIDED = [
    "log half task begun zoo",
    "log after task begun zoo",
    "rename after */tasks/0001-zoo",
    "log half task committed zoo",
    "log after task committed zoo",
    "rename after */.candidate.gone",
]


@pytest.fixture(scope="module")
def gated(lab: Lab) -> tuple[Path, Path, tuple[Any, ...]]:
    """A state of one task, what a gated update makes of it, and the update."""
    first = pictures(lab.folder / "first", ["cat", "dog"], 30)
    second = pictures(lab.folder / "second", ["dog", "emu"])
    begun = lab.folder / "begun"
    fine(lab.command("init", begun, "--recipe", lab.recipe("update"), "--data", first, "--name", "pets", "-q"))
    update = ("--data", second, "--name", "zoo", "--holdout", 0.25, "-q", "--max-drop", 100)
    whole = Path(shutil.copytree(begun, lab.folder / "whole"))
    fine(lab.command("update", whole, *update))
    return begun, whole, update


@pytest.mark.parametrize("at", every([*ASIDE, *DECIDED], 4))
def test_killed_and_resumed(at: str, lab: Lab, gated: tuple[Path, Path, tuple[Any, ...]], tmp_path: Path) -> None:
    """Until the gate has decided, a kill leaves the state as it was, byte for byte; then it is the old one or the new
    one; and `resume` goes on from the last checkpoint, with the same bar."""
    begun, whole, update = gated
    state = Path(shutil.copytree(begun, tmp_path / "state"))
    assert lab.command("update", state, *update, at=at).status == KILLED
    assert_whole(state)
    if at in ASIDE:
        assert beside(state) == everything(begun)
    assert learned(state) in (learned(begun), learned(whole))
    known = (state / "candidate" / "candidate.json").exists() or at in DECIDED
    resumed = lab.resume(state) if known else lab.command("update", state, *update)
    assert resumed.status == 0, resumed.err
    if at == "step after train 5":
        assert "begin after train at 4" in resumed.moments
    assert learned(state) == learned(whole)
    assert not (state / "candidate").exists()
    begins = [event for event in State(state).journal() if event["event"] == "task begun"]
    assert begins[-1]["gate"] == {"max_drop": 100.0}


def test_a_refusal_that_is_killed_is_refused_again(
    lab: Lab, gated: tuple[Path, Path, tuple[Any, ...]], tmp_path: Path
) -> None:
    begun, first, wrong = gated[0], lab.folder / "first", tmp_path / "wrong"
    for name, other in (("cat", "dog"), ("dog", "cat")):
        shutil.copytree(first / other, wrong / name)
    update = ("--data", wrong, "-q", "--max-drop", 2)
    state = Path(shutil.copytree(begun, tmp_path / "state"))
    assert lab.command("update", state, *update, at="rmtree before *.candidate.gone").status == KILLED
    assert {n for n in beside(state) if not n.startswith(".candidate")} == set(everything(begun))
    assert lab.command("update", state, *update, at="evaluate before wrong").status == KILLED
    assert lab.resume(state).status == 3
    assert everything(state) == everything(begun)
    assert lab.command("update", state, *update, at="evaluate before wrong").status == KILLED
    plain = lab.command("update", state, "--data", first, "--name", "again", "-q")
    assert "discarded: task wrong, which was learned aside for a gate" in plain.err
    assert not (state / "candidate").exists()


def test_a_torn_candidate_is_named(world: Path, state: Path) -> None:
    (state / "candidate").mkdir()
    (state / "candidate" / "candidate.json").write_text('{"task": 1')
    with pytest.raises(StateError, match=r"candidate\.json is not valid JSON"):
        Learner.load(state).resume()

"""Headroom: its figures by hand, what is missing and how to make it; the oracle head, which may change nothing."""

from __future__ import annotations

import copy
import hashlib
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from test_report import fake_results
from tiny import chiefly, recipe, split_folder, vit_folder
from warm import Warm

from perpetune import cli
from perpetune.cli import jobs
from perpetune.errors import StateError, UsageError
from perpetune.learner import Learner
from perpetune.recipe import load_recipe, make_recipe
from perpetune.report import checked, compare, headroom_beside, write_comparison, write_report
from perpetune.report.sections import answers
from perpetune.report.sections.headroom import changes, missing_lines, role_of
from perpetune.runtime import Silent

RIDGE = {"name": "ridge", "projection": 50}
PARTS: dict[str, dict[str, Any]] = {
    "control": {"method": {"name": "frozen"}, "head": RIDGE, "pet": None},
    "taps": {"method": {"name": "frozen"}, "head": RIDGE, "taps": 7, "pet": None},
    "joint": {"method": {"name": "joint"}, "head": {"name": "linear"}},
    "joint-taps": {"method": {"name": "joint"}, "head": RIDGE, "taps": 7},
    "mine": {"method": {"name": "finetune"}, "head": RIDGE},
}


def run_of(part: str, final: float, seed: int = 0, **more: Any) -> dict[str, Any]:
    """A complete run of two tasks whose final accuracy is `final`, a whole number of per cent."""
    results = fake_results(2, seed=seed)
    about = {**PARTS[part], **more}
    section = results["recipe"]
    section |= {key: about[key] for key in ("method", "head", "pet", "protect", "data", "stream") if key in about}
    section["name"] = results["name"] = part
    section["backbone"] = {**section["backbone"], **({"taps": about["taps"]} if "taps" in about else {})}
    for row in results["cells"]:
        for cell in filter(None, row):
            cell |= {"correct": round(final), "total": 100, "per_class": {}}
            if "oracle" in about:
                cell["oracle"] = {"correct": about["oracle"], "head": "ridge"}
    results["metrics"]["final_accuracy"] = final / 100
    return results


def told(*runs: dict[str, Any]) -> Any:
    found = compare(list(runs))["headroom"]
    assert len(found) == 1
    return found[0]


def by_label(one: Any) -> dict[str, Any]:
    return {row["label"]: row for row in one["rows"]}


# -- numbers --------------------------------------------------------------------------------------------


def test_the_figures_by_hand() -> None:
    finals = {"control": (30, 40), "taps": (36, 45), "joint": (50, 60), "mine": (40, 48), "joint-taps": (44, 70)}
    one = told(*(run_of(part, value, seed) for part, values in finals.items() for seed, value in enumerate(values)))
    # the best joint is the one on taps: 57 against 55
    assert one["headroom"]["values"] == pytest.approx([0.14, 0.30])
    rows = by_label(one)
    assert rows["mine"]["recovered"]["values"] == pytest.approx([10 / 14, 8 / 30])
    assert rows["mine"]["left"]["values"] == pytest.approx([4 / 8, 3 / 25])
    assert rows["taps"]["recovered"]["mean"] == pytest.approx((6 / 14 + 5 / 30) / 2)
    assert rows["taps"]["left"]["mean"] == 0
    assert rows["joint"]["recovered"]["values"] == pytest.approx([20 / 14, 20 / 30])
    assert {name for name, row in rows.items() if row["counts"]} == {"control", "taps", "joint-taps"}
    assert one["missing"] == []
    assert one["told"] == (
        "headroom 22.0 ± 11.3 points (joint, head ridge, taps 7: 57.0; control 35.0): frozen taps recover 30 ± 19 %, "
        "mine 49 ± 32 %"
    )


def test_one_seed_has_no_spread_and_a_loss_is_negative() -> None:
    one = told(run_of("control", 30), run_of("joint", 50), run_of("mine", 25))
    assert one["told"] == "headroom 20.0 points (joint, head linear: 50.0; control 30.0): mine recovers −25 %"


@pytest.mark.parametrize("joint", [30, 20])
def test_where_joint_wins_nothing_there_is_no_headroom(joint: int) -> None:
    one = told(run_of("control", 30), run_of("joint", joint), run_of("mine", 40))
    assert one["told"] == f"no headroom (joint, head linear: {joint}.0; control 30.0)"
    assert all(row["recovered"]["mean"] is None and row["left"]["mean"] is None for row in one["rows"])


def test_a_seed_without_headroom_has_no_share() -> None:
    finals = {"control": (30, 40), "joint": (50, 40), "mine": (40, 48)}
    one = told(*(run_of(part, value, seed) for part, values in finals.items() for seed, value in enumerate(values)))
    assert by_label(one)["mine"]["recovered"]["values"] == [pytest.approx(0.5), None]
    assert one["told"].endswith("no share is defined at seed 1, where joint is less than a point above the control")


def test_only_seeds_with_all_parts_count() -> None:
    runs = [run_of("control", 30, 0), run_of("control", 40, 1), run_of("control", 90, 2)]
    runs += [run_of("joint", 50, 0), run_of("joint", 60, 1)]
    runs += [run_of("mine", 40, 0), run_of("mine", 70, 2)]
    one = told(*runs)
    assert one["seeds"] == [0, 1]
    assert one["headroom"]["mean"] == pytest.approx(0.2)
    assert by_label(one)["mine"]["seeds"] == [0]
    assert "mine recovers 50 % (1 of 2 seeds)" in one["told"]
    assert [(m["part"], m["seeds"]) for m in one["missing"]] == [("frozen taps", [0, 1, 2]), ("joint", [2])]
    assert one["missing"][1]["command"] == "perpetune run joint --seeds 2,"


def test_a_joint_run_with_fewer_seeds_is_compared_on_those_it_has() -> None:
    """One lucky seed more must not decide: where they meet, the other one is better."""
    runs = [run_of("control", 30, seed) for seed in (0, 1)]
    one = told(*runs, run_of("joint", 50, 0), run_of("joint", 90, 1), run_of("joint-taps", 52, 0))
    assert by_label(one)["joint-taps"]["counts"]
    assert one["seeds"] == [0]
    assert one["missing"][-1] == {"part": "joint", "seeds": [1], "command": "perpetune run joint-taps --seeds 1,"}


def test_an_incomplete_run_does_not_count() -> None:
    half = run_of("joint", 90)
    half["complete"] = False
    one = told(run_of("control", 30), half)
    assert one["headroom"]["mean"] is None
    assert [m["part"] for m in one["missing"]] == ["frozen taps", "joint"]


# -- groups ---------------------------------------------------------------------------------------------


def test_other_streams_and_backbones_are_apart() -> None:
    other = [run_of("control", 10, stream={"classes_per_task": 5}), run_of("joint", 60, stream={"classes_per_task": 5})]
    large = [run_of("control", 20), run_of("joint", 30)]
    for run in large:
        run["recipe"]["backbone"]["image_size"] = 112
    found = compare([run_of("control", 30), run_of("joint", 40), *other, *large])["headroom"]
    assert [one["headroom"]["mean"] for one in found] == pytest.approx([0.1, 0.5, 0.1])
    assert found[2]["told"].startswith("digits, 2 tasks, class-incremental, perpetune:micro at 112 px: headroom 10.0")


def test_augmentation_is_no_other_stream_but_other_pictures_are() -> None:
    drawn = {"classes_per_task": 2, "augment": "crop_flip"}
    one = told(run_of("control", 30), run_of("joint", 40, stream=drawn))
    assert one["headroom"]["n"] == 1
    changed = run_of("joint", 40)
    changed["tasks"][0]["fingerprint"] = "other"
    one = told(run_of("control", 30), changed)
    assert one["headroom"]["n"] == 0
    assert "no seed in common" in one["told"]


def test_without_control_and_joint_nothing_is_said() -> None:
    assert compare([run_of("mine", 30), run_of("taps", 40)])["headroom"] == []


def test_texts_have_none() -> None:
    spoken = run_of("joint", 40)
    spoken["recipe"]["head"] = {"name": "lm"}
    assert compare([spoken, run_of("mine", 30)])["headroom"] == []


# -- what is missing ------------------------------------------------------------------------------------


def test_what_is_missing_is_named_with_its_command() -> None:
    protected = run_of("mine", 40, protect={"energy": 0.99})
    protected["recipe"]["head"] = {"name": "linear"}
    one = told(run_of("joint", 50), protected)
    lines = missing_lines(one)
    assert [text for text, _ in lines] == [
        "no control (method frozen, head ridge, no taps) at seed 0",
        "no frozen taps (method frozen, head ridge, backbone.taps) at seed 0",
    ]
    assert lines[0][1] == (
        "perpetune run joint --set method=frozen --set pet=none --set head=ridge --set name=joint-control --seeds 1"
    )
    assert "--set backbone.taps=auto --set head=ridge --set head.projection=0" in lines[1][1]
    assert one["told"] == "headroom is not known: there is no control (method frozen, head ridge, no taps)"
    joint = told(run_of("control", 30), protected)["missing"][-1]
    assert joint["command"] == (
        "perpetune run mine --set method=joint --set protect=null --set name=mine-joint --seeds 1"
    )


def test_the_commands_make_what_they_say() -> None:
    for name in ("demo", "demo-pegp-ridge", "demo-frozen", "demo-safe"):
        content = load_recipe(name).model_dump(mode="json")
        assert role_of(load_recipe(name, changes("control", content, None)).model_dump(mode="json")) == "control"
        assert role_of(load_recipe(name, changes("joint", content, None)).model_dump(mode="json")) == "joint"
    base = {"backbone": {"name": "a", "taps": 3, "tokens": "class"}, "method": {"name": "frozen"}, "head": RIDGE}
    assert changes("control", base, None) == ["backbone.tokens=null", "backbone.taps=null"]
    assert changes("frozen taps", {**base, "head": "linear"}, 3) == ["head=ridge", "head.projection=0"]


def test_runs_that_updates_fed_have_no_command() -> None:
    fed = run_of("control", 30)
    fed["recipe"]["data"] = None
    assert {missing["command"] for missing in told(fed)["missing"]} == {""}


# -- pages and the command line -------------------------------------------------------------------------


def pages() -> list[tuple[str, dict[str, Any]]]:
    return [("c", run_of("control", 30)), ("j", run_of("joint", 50)), ("m", run_of("mine", 40, oracle=48))]


def test_comparisons_show_it(tmp_path: Path) -> None:
    page, document, text = (path.read_text() for path in write_comparison(pages(), tmp_path))
    sentence = (
        "headroom 20.0 points (joint, head linear: 50.0; control 30.0): mine recovers 50 %; with an oracle head "
        "(diagnosis) mine 90 %"
    )
    assert sentence in page
    assert sentence in text
    assert json.loads(document)["headroom"][0]["told"] == sentence
    assert "| diagnosis | mine: oracle head (diagnosis) | head ridge | 1 | 48.0 | 90 | – |" in text


def test_an_oracle_is_no_result() -> None:
    found = compare([run for _, run in pages()])
    (number,) = [i for i, row in enumerate(found["rows"]) if row["way"] == answers.ORACLE]
    assert all(number not in best for best in found["best"].values())
    assert not [effect for effect in found["effects"] if effect["setting"] == "answer"]
    assert "diagnosis, not a result" in answers.meaning(checked(pages()[2][1]))
    assert answers.own_name(pages()[2][1]) == "answer"


def test_an_oracle_that_is_no_count_is_refused() -> None:
    run = run_of("mine", 40, oracle=48)
    run["cells"][0][0]["oracle"]["correct"] = 0.5
    with pytest.raises(StateError, match=r"cells\.0\.0\.oracle"):
        checked(run)


def test_a_report_shows_it_beside_other_runs(tmp_path: Path) -> None:
    (_, control), (_, joint), mine = pages()
    found = headroom_beside(mine, [("c", control), ("j", joint)])
    page, document, text = (path.read_text() for path in write_report(mine[1], tmp_path, found))
    assert 'id="headroom"' in page
    assert "## Headroom" in text
    assert json.loads(document)["headroom"][0]["headroom"]["mean"] == pytest.approx(0.2)
    page, document, text = (path.read_text() for path in write_report(mine[1], tmp_path))
    assert 'id="headroom"' not in page
    assert "## Headroom" not in text
    assert "headroom" not in json.loads(document)


# -- the oracle -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    vit_folder(folder / "vit")
    split_folder(folder / "data", "abcdef", 6, 5)
    return folder


class Heard(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def learned(world: Path, folder: Path, oracle: bool | str, **changed: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """The results document, and the digest of each file of weights."""
    train = {"epochs": 3, "batch_size": 8, "lr": 0.05}
    content = recipe(world / "vit", world / "data", **{"train": train, **changed})
    results = Learner({**content, "evaluate": {"oracle": oracle}}, folder).run()
    files = sorted((folder / "tasks").glob("*/*"))
    stored = {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    return results, {name: digest for name, digest in stored.items() if name.endswith("/pack.safetensors")}


def counts(results: dict[str, Any], oracle: bool) -> list[list[int | None]]:
    return [
        [None if cell is None else cell["oracle"]["correct"] if oracle else cell["correct"] for cell in row]
        for row in results["cells"]
    ]


ALL: dict[str, dict[str, Any]] = {
    "finetune-ridge": {"head": RIDGE},
    "finetune-linear": {"head": "linear"},
    "frozen-ridge": {"method": "frozen", "head": RIDGE},
    "frozen-ncm": {"method": "frozen", "head": "ncm"},
    "first_session": {"method": {"name": "first_session", "concat": True}, "head": "ncm"},
    "safe": {"method": "safe", "head": RIDGE},
    "joint-linear": {"method": "joint"},
    "joint-ridge": {"method": "joint", "head": RIDGE},
}
STILL = {"frozen-ridge", "frozen-ncm", "first_session", "joint-ridge"}  # whose features are those of their sums


@pytest.mark.parametrize(
    "name", chiefly(ALL, ["finetune-ridge", "frozen-ridge", "first_session", "safe", "joint-linear"])
)
def test_the_oracle_changes_nothing_and_is_the_head_where_features_stay(name: str, world: Path, tmp_path: Path) -> None:
    plain, weights = learned(world, tmp_path / "plain", False, **ALL[name])
    seen, same = learned(world, tmp_path / "seen", True, **ALL[name])
    assert weights == same
    assert counts(plain, False) == counts(seen, False)
    assert all(cell is None or "oracle" not in cell for row in plain["cells"] for cell in row)
    if name in STILL:
        assert counts(seen, True) == counts(seen, False)
    head = "ncm" if ALL[name].get("head") == "ncm" else "ridge"
    assert {cell["oracle"]["head"] for row in seen["cells"] for cell in row if cell} == {head}
    assert checked(seen)["timings"][0]["oracle_s"] >= 0


def test_where_features_moved_the_oracle_sees_what_stale_sums_miss(world: Path, tmp_path: Path) -> None:
    """The control of the test above: here own answer and oracle must differ, and the oracle wins."""
    results, _ = learned(world, tmp_path / "state", "last", head=RIDGE)
    assert [any("oracle" in cell for cell in row if cell) for row in results["cells"]] == [False, False, True]
    own, oracle = (sum(filter(None, counts({"cells": results["cells"][-1:]}, o)[0])) for o in (False, True))
    assert oracle > own
    way = answers.ways(checked(results))[-1]
    assert way.name == answers.ORACLE
    assert way.metrics["final_accuracy"] == pytest.approx(oracle / 30)
    assert way.curve[:2] == [None, None]
    for path in write_report(results, tmp_path / "report"):
        assert answers.ORACLE in path.read_text() or path.suffix == ".json"


def test_a_head_without_statistics_is_told(world: Path, tmp_path: Path) -> None:
    content = {**recipe(world / "vit", world / "data"), "evaluate": {"oracle": "last"}}
    heard = Heard()
    results = Learner(content, tmp_path / "state", progress=heard).run()
    assert [n for n in heard.notes if "the oracle uses head ridge with default options" in n]
    assert "Head linear is trained by gradients" in answers.meaning(checked(results))


def test_a_run_that_goes_on_has_the_same_oracle(world: Path, tmp_path: Path) -> None:
    whole, _ = learned(world, tmp_path / "whole", True, head=RIDGE)
    copied = Learner.load(tmp_path / "whole").save(tmp_path / "half")
    cli.call(["rollback", str(copied), "--to", "0000-a-b"])
    assert counts(Learner.load(copied).run(), True) == counts(whole, True)


def test_an_update_has_no_old_data(world: Path, tmp_path: Path) -> None:
    content = recipe(world / "vit", head=RIDGE)
    with pytest.raises(UsageError, match=r"evaluate\.oracle needs the training data of all tasks"):
        Learner({**content, "evaluate": {"oracle": True}}, tmp_path / "state")
    assert not (tmp_path / "state").exists()
    learned(world, tmp_path / "ran", "last", method="frozen", head=RIDGE)
    with pytest.raises(UsageError, match="an update has the data of its own task only"):
        Learner.load(tmp_path / "ran").learn(world / "data")


def test_texts_have_no_oracle(tmp_path: Path) -> None:
    from tiny import tiny_language_model

    (tmp_path / "a.jsonl").write_text('{"prompt": "hi", "answer": "no"}\n' * 4)
    content = {
        "backbone": f"hf:{tiny_language_model(tmp_path / 'lm')}",
        "head": "lm",
        "data": {"name": "text", "path": str(tmp_path / "a.jsonl")},
        "evaluate": {"oracle": True},
        "run": {"device": "cpu"},
    }
    with pytest.raises(UsageError, match="head: lm has no classes"):
        Learner(make_recipe(content), tmp_path / "state")


def test_the_command_line(
    warm: Warm, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "CHILD", (*warm.command, *jobs.CHILD[1:]))
    for name, changed in {"control": {"method": "frozen", "head": RIDGE}, "mine": {"head": RIDGE}}.items():
        content = recipe(world / "vit", world / "data", name=name, **changed)
        (tmp_path / f"{name}.yaml").write_text(make_recipe(content).to_yaml())
    files = [str(tmp_path / f"{name}.yaml") for name in ("control", "mine")]
    out = tmp_path / "runs"
    for name, file in zip(("control", "mine"), files, strict=True):
        assert cli.call(["run", file, "--out", str(out / name), "-q", *(["--oracle"] * (name == "mine"))]) == 0
    assert Learner.load(out / "mine").recipe.evaluate.oracle is True
    capsys.readouterr()
    assert cli.call(["compare", str(out / "control"), str(out / "mine")]) == 0
    shown = capsys.readouterr().out
    assert shown.rstrip().splitlines()[-1] == "headroom is not known: there is no joint run (method joint)"
    (command,) = [line.strip() for line in shown.splitlines() if "method=joint" in line]
    assert str(out / "mine" / "recipe.yaml") in command
    # what it names can be run as it stands
    assert cli.call([*shlex.split(command)[1:], "--out", str(out), "-q"]) == 0
    capsys.readouterr()
    assert cli.call(["report", str(out / "mine"), "--beside", str(out), "--out", str(tmp_path / "report")]) == 0
    last = capsys.readouterr().out
    assert "(joint, head ridge:" in " ".join(last.split())
    assert "## Headroom" in (tmp_path / "report" / "report.md").read_text()


# -- the benchmark --------------------------------------------------------------------------------------


def test_the_benchmark_plans_each_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    monkeypatch.delitem(sys.modules, "headroom", raising=False)
    import headroom as benchmark  # type: ignore[import-not-found]

    recipes = [r for name in ("demo", "demo-pegp-ridge") for r in benchmark.variants(name, ["train.epochs=1"], None)]
    found = {r.name: r for r in benchmark.distinct(recipes)}
    assert list(found) == ["demo-control", "demo", "demo-joint-linear", "demo-joint-ridge", "demo-pegp-ridge"]
    roles = {name: role_of(r.model_dump(mode="json")) for name, r in found.items()}
    assert roles["demo-control"] == "control"
    assert roles["demo-joint-linear"] == roles["demo-joint-ridge"] == "joint"
    assert {name for name, r in found.items() if r.evaluate.oracle} == {"demo", "demo-pegp-ridge"}
    assert copy.copy(found["demo"]).train.epochs == 1

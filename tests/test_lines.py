"""`--json` of the long verbs: one object a line, in the form of the schema, which docs/json.md tells."""

from __future__ import annotations

import json
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tiny import fits_schema, picture_folder, recipe, vit_folder, written

from perpetune.cli import call, jobs
from perpetune.cli import lines as module
from perpetune.cli.events import DONE, EVENTS
from perpetune.cli.lines import LineRuns, Lines, LineView
from perpetune.learner import Learner
from perpetune.recipe import load_recipe
from perpetune.results import read_results
from perpetune.state import State
from perpetune.trained import Trained

DOC = (Path(__file__).resolve().parents[1] / "docs" / "json.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lines")
    vit_folder(root / "model")
    for name, classes in {"a": ("cat", "dog"), "b": ("fox", "owl"), "c": ("hen", "cow")}.items():
        picture_folder(root / name, classes, 6)
    Learner(recipe(root / "model", stream={}), root / "state").learn(root / "a")
    return root


def test_every_verb_writes_lines_of_the_schema(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lines(verb: str, *arguments: Any, code: int = 0) -> list[dict[str, Any]]:
        assert call([verb, *map(str, arguments), "--json"]) == code
        out, err = capfd.readouterr()
        assert (err == "") is (code == 0)
        if code:
            written(out, "failed")
        else:
            fits_schema(written(out)[-1], verb)
        return [line for line in map(json.loads, out.splitlines()) if line["event"] != "note"]

    monkeypatch.setattr(module, "EVERY", 0.0)
    state, out = world / "state", tmp_path
    found = lines("update", state, "--data", world / "b")
    assert [line["event"] for line in found] == ["task", "phase", *["step"] * 4, "learned", "done"]
    assert [line["done"] for line in found if line["event"] == "step"] == [1, 2, 3, 4]
    assert isinstance(found[-3]["loss"], float)
    assert found[-1]["results"] == read_results(State(state))
    assert [line["event"] for line in lines("update", state, "--data", world / "c", "-q")] == ["done"]
    assert [line["event"] for line in lines("resume", state)] == ["done"]
    (out / "torn.png").write_bytes(b"no picture")
    (image,) = lines("predict", state, world / "a" / "cat" / "0.png")[:-1]
    assert {c["name"] for c in image["classes"]} <= {"cat", "dog", "fox", "owl", "hen", "cow"}
    found = lines("predict", state, world / "a" / "cat", out / "torn.png", code=1)
    assert [line["event"] for line in found] == ["prediction"] * 6 + ["unreadable", "failed"]
    assert "1 of 7 pictures cannot be read" in found[-1]["message"]
    assert [line["event"] for line in lines("evaluate", state)] == ["evaluated"] * 3 + ["done"]
    assert {line["event"] for line in lines("export", state, out / "adapter")} == {"file", "done"}
    assert lines("prune", state, "--keep", 2)[-1]["dropped"] == ["a"]
    assert [line["event"] for line in lines("compare", state, state)] == ["read", "read", "done"]
    (failed,) = lines("evaluate", out / "none", code=1)
    assert (failed["event"], failed["code"]) == ("failed", 1)
    assert "does not exist" in failed["message"]
    assert lines("init", out / "new", "--model", f"folder:{world / 'model'}")[-1] == {
        "event": "done", "results": None, "report": None,
    }  # fmt: skip
    assert call(["report", str(state), "--json"]) == 0  # a short verb after long ones
    json.loads(capfd.readouterr().out)
    assert call(["report", str(out / "none"), "--json"]) == 1
    assert capfd.readouterr().out == ""


def test_a_run_of_several_names_its_runs(world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    results = read_results(State(world / "state"))
    (done, broken) = jobs.plan([load_recipe("demo")], range(2), tmp_path, None)
    view = LineRuns(Lines(), [(done, results)])
    view.tell(broken, {"event": "note", "message": "seen"})
    view.tell(broken, {"event": "task", "results": results})
    view.tell(broken, {"event": "failed", "message": "no disk"})
    found = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    for line in found:
        fits_schema(line)
    assert [(line["event"], line["run"]) for line in found] == [
        ("run", "demo-s0"), ("note", "demo-s1"), ("learned", "demo-s1"), ("run", "demo-s1"),
    ]  # fmt: skip


def test_steps_are_written_once_a_second(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    view = LineView(Lines())
    view.phase("train", 100, 1, 0)
    for done in range(1, 101):
        clock[0] += 0.04
        view.step(done, 0, 0.5 if done % 10 == 0 else None, 8)
    steps = [line for line in map(json.loads, capfd.readouterr().out.splitlines()) if line["event"] == "step"]
    assert [line["done"] for line in steps] == [25, 50, 75, 100]
    assert steps[0]["loss"] == 0.5
    assert steps[-1]["examples_per_s"] == pytest.approx(200)


def test_what_libraries_print_is_not_between_the_lines(
    world: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, stream = Trained.evaluate, sys.stdout

    def evaluate(trained: Trained, *arguments: Any, **options: Any) -> Any:
        print("chatter")
        return real(trained, *arguments, **options)

    monkeypatch.setattr(Trained, "evaluate", evaluate)
    assert call(["evaluate", str(world / "state"), "--json"]) == 0
    out, err = capfd.readouterr()
    assert "chatter" in err
    written(out)
    assert sys.stdout is stream
    assert call(["evaluate", str(world / "state")]) == 0
    assert "chatter" in capfd.readouterr().out


def test_only_the_first_process_writes(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    out = module.lines(True)
    assert out is not None
    out.emit("note", message="unheard")
    module.close()
    assert capfd.readouterr().out == ""


def test_the_schema_refuses_what_is_not_in_it() -> None:
    fits_schema({"event": "note", "message": "x"})
    for line in (
        {"event": "note"},
        {"event": "note", "message": "x", "more": 1},
        {"event": "file", "path": "x", "bytes": "1"},
    ):
        with pytest.raises(ValidationError):
            fits_schema(line)


def test_the_page_tells_the_whole_schema() -> None:
    rows = [line.split("|")[1:-1] for line in DOC.splitlines() if line.startswith("| `")]
    for event, kind in EVENTS.items():
        (keys,) = [row[2] for row in rows if row[0].strip() == f"`{event}`" and len(row) == 3]
        assert [key for key in typing.get_type_hints(kind) if f"`{key}`" not in keys] == [], event
    for verb, kinds in DONE.items():
        (*said,) = [row[1] for row in rows if f"`{verb}`" in row[0] and len(row) == 2]
        keys = {key for kind in kinds for key in typing.get_type_hints(kind)} - OPTIONAL.get(verb, set())
        assert [key for key in keys if f"`{key}`" not in " ".join(said)] == [], verb


OPTIONAL = {"run": {"files"}, "compare": {"failed"}}  # keys of the other verb with the same form

"""Every verb does what its help says, prints it for people, and as JSON on standard output alone."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import chiefly, every, picture_folder, recipe, split_folder, vit_folder, written
from warm import Warm

from perpetune._version import __version__
from perpetune.cli import app, call, costs, hub, jobs, learn, look, run, serving, use
from perpetune.errors import Interrupted
from perpetune.learner import Learner
from perpetune.recipe import load_recipe, packaged
from perpetune.runtime import Silent
from perpetune.state import State
from perpetune.trained import Trained

VERBS = [verb.__name__ for module in (run, learn, costs, use, serving, hub, look) for verb in module.VERBS]
RECIPES = sorted(packaged()) + sorted(
    str(p) for p in (Path(__file__).resolve().parents[1] / "benchmarks" / "recipes").glob("*.yaml")
)


@dataclass
class Said:
    """What a command left on its two streams."""

    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.out.splitlines() if line.strip()]


class Shell:
    """Runs commands in this process."""

    def __init__(self, capfd: pytest.CaptureFixture[str]):
        self.capfd = capfd

    def __call__(self, *arguments: str | Path, code: int = 0) -> Said:
        self.capfd.readouterr()
        found = call([str(a) for a in arguments])
        out, err = self.capfd.readouterr()
        assert found == code, err
        if code == 0:
            assert not [line for line in err.splitlines() if not line.startswith("perpetune: note: ")]
        return Said(out, err)

    def json(self, *arguments: str | Path) -> Any:
        """The one JSON document that is all of the output."""
        return json.loads(self(*arguments, "--json").out)

    def done(self, *arguments: str | Path) -> dict[str, Any]:
        """The last line of a verb that writes lines."""
        return written(self(*arguments, "--json").out, "done")[-1]


@pytest.fixture
def shell(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.chdir(tmp_path)
    return Shell(capfd)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, `my.yaml` over two tasks of two classes, and the state `done` that it gives; only read."""
    root = tmp_path_factory.mktemp("cli")
    vit_folder(root / "model")
    split_folder(root / "images", ("cat", "dog", "fox", "owl"), 6, 3)
    picture_folder(root / "more", ("cat", "hen"), 5, first=50)
    content = recipe(root / "model", root / "images")
    (root / "my.yaml").write_text(yaml.safe_dump(content))
    Learner(content, root / "done").run()
    return root


@pytest.fixture
def state(world: Path, tmp_path: Path) -> Path:
    """A copy of `done` to write to."""
    return Path(shutil.copytree(world / "done", tmp_path / "state"))


@pytest.fixture
def children(warm: Warm, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """The command of a run's process, which begins with everything imported."""
    command = (*warm.command, *jobs.CHILD[1:])
    monkeypatch.setattr(jobs, "CHILD", command)
    return command


def reports(folder: Path) -> set[str]:
    return {p.name for p in folder.glob("report.*")}


# -- learning -----------------------------------------------------------------------------------------------


def test_memory_that_is_too_small_is_one_line(shell: Shell, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore is known.")

    monkeypatch.setattr(Trained, "load", full)
    said = shell("evaluate", world / "done", code=1)
    assert "Tried to allocate 2 GiB: lower evaluate.batch_size" in said.err
    assert len(said.err.splitlines()) == 1


def test_run(shell: Shell, world: Path, tmp_path: Path) -> None:
    said = shell("run", world / "my.yaml")
    folder = Path("runs/tiny")  # the recipe's name
    assert said.lines[0] == "task 1 cat-dog  2 classes, 12 training examples"
    assert any(line.startswith("after 2 fox-owl: mean ") for line in said.lines)
    matrix = [line.split() for line in said.lines if line.strip().startswith(("after ", "1 ", "2 "))][-3:]
    assert matrix[0] == ["after", "mean", "cat-dog", "fox-owl"]
    assert [row[:2] for row in matrix[1:]] == [["1", "cat-dog"], ["2", "fox-owl"]]
    assert "final accuracy" in said.out
    assert "forgetting" in said.out
    assert said.lines[-1] == f"report: {folder / 'report.html'}"
    assert reports(folder) == {"report.html", "report.md", "report.json"}
    assert [p.name for p in sorted((folder / "tasks").iterdir())] == ["0000-cat-dog", "0001-fox-owl"]

    again = shell("run", world / "my.yaml", "--quiet", "--seed", "3", "--set", "train.epochs=1", "--set", "pet.rank=1")
    assert "task 1" not in again.out
    assert again.lines[-1] == "report: runs/tiny-2/report.html"  # never over another run
    assert load_recipe("runs/tiny-2/recipe.yaml").seed == 3

    results = shell.done("run", world / "my.yaml", "--out", tmp_path / "out")["results"]
    assert results.items() <= json.loads((tmp_path / "out" / "report.json").read_text()).items()
    assert len(results["tasks"]) == 2


def test_init_and_update(shell: Shell, world: Path, tmp_path: Path) -> None:
    change = ["--model", f"folder:{world / 'model'}", "--device", "cpu", "--set", "train.epochs=1"]
    said = shell("init", "mine", *change)
    assert said.lines == ["mine is ready: add data with `perpetune update mine --data FOLDER`"]
    assert shell("log", "mine").lines == ["nothing has happened yet"]
    assert shell("resume", "mine").lines == ["nothing to resume: no tasks learned, no task unfinished"]

    said = shell("update", "mine", "--data", world / "images")
    assert said.lines[0] == "task 1 images  4 classes, 24 training examples"
    assert reports(Path("mine")) == {"report.html", "report.md", "report.json"}
    done = shell.done("update", "mine", "--data", world / "more", "--name", "birds", "--holdout", "0.4")
    results = done["results"]
    assert [(t["name"], t["classes"], t["train"], t["test"]) for t in results["tasks"]] == [
        ("images", ["cat", "dog", "fox", "owl"], 24, 12),
        ("birds", ["cat", "hen"], 6, 4),
    ]
    assert Learner.load("mine").method.classes == ["cat", "dog", "fox", "owl", "hen"]

    nowhere = ["--set", "method=finetune", "--set", "pet=lora", "--set", "protect.reference.path=nowhere"]
    said = shell("init", "without", *change, *nowhere, code=2)
    assert said.err.startswith("perpetune: protect.reference: ")
    assert not Path("without").exists()

    results = shell.done("init", "other", *change, "--data", world / "more", "--name", "first")["results"]
    assert [t["name"] for t in results["tasks"]] == ["first"]


def test_resume(shell: Shell, world: Path, state: Path) -> None:
    assert shell("resume", state).lines[0] == "nothing to resume: 2 tasks learned, no task unfinished"
    assert len(shell.done("resume", state)["results"]["tasks"]) == 2

    class Stopping(Silent):
        """Raises what a signal leads to, once the second task is being learned."""

        def task(self, index: int, name: str, classes: int, examples: int) -> None:
            if index == 1:
                raise Interrupted("stopped", 15)

    learner = Learner(load_recipe(world / "my.yaml"), "half", progress=Stopping())
    with pytest.raises(Interrupted):
        learner.run()
    said = shell("resume", "half")
    assert "nothing to resume" not in said.out
    assert said.lines[0] == "task 2 fox-owl  2 classes, 12 training examples"
    assert shell.done("evaluate", "half") == shell.done("evaluate", state)


def test_rollback(shell: Shell, state: Path) -> None:
    shell("report", state)
    said = shell("rollback", state, "--to", "cat-dog")
    assert said.lines == [f"dropped fox-owl; {state} has cat-dog"]
    assert "fox-owl" not in json.loads((state / "report.json").read_text())["tasks"][-1]["name"]
    assert shell("rollback", state, "--to", "0000-cat-dog").lines == [f"nothing to drop; {state} has cat-dog"]
    assert shell.json("rollback", state, "--to", "start") == {"dropped": ["cat-dog"], "kept": []}
    said = shell("resume", state)
    assert said.lines[0] == "task 1 cat-dog  2 classes, 12 training examples"


# -- several runs -------------------------------------------------------------------------------------------


@pytest.fixture
def recipes(world: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The recipe of `done` and the same with protection."""
    content = yaml.safe_load((world / "my.yaml").read_text())
    held = tmp_path / "held.yaml"
    held.write_text(yaml.safe_dump({**content, "name": "held", "protect": {"energy": 0.9}}))
    return world / "my.yaml", held


@pytest.mark.usefixtures("children")
def test_several_runs_end_in_one_comparison(
    shell: Shell, recipes: tuple[Path, Path], state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "all"
    out.mkdir()
    state.rename(out / "tiny-s0")
    shell("rollback", out / "tiny-s0", "--to", "cat-dog")  # one of its two tasks is left to learn
    said = shell("run", *recipes, "--out", out, "--jobs", "2")
    told = sorted(line for line in said.lines if line.startswith(("tiny-s0 ", "held-s0 ")) and " after " in line)
    assert [" ".join(line.split()[:4]) for line in told] == [
        "held-s0 after 1 cat-dog:", "held-s0 after 2 fox-owl:", "tiny-s0 after 2 fox-owl:",
    ]  # fmt: skip
    assert re.search(r"^held-s0  after 2 fox-owl: mean \S+  moved [\d.<]+ % \(worst .*\), room \d+ %$", said.out, re.M)
    assert len(re.findall(r"^(?:tiny|held)-s0  done: final [\d.]+ %, .*\[[12]/2\]$", said.out, re.M)) == 2
    assert re.search(r"^protect on instead of off: final accuracy [+−]?[\d.]+ points$", said.out, re.M)
    assert said.lines[-1] == f"comparison: {out / 'comparison.html'}"
    assert reports(out / "tiny-s0") == reports(out / "held-s0") == {"report.html", "report.md", "report.json"}
    assert {p.name for p in out.glob("comparison.*")} == {"comparison.html", "comparison.md", "comparison.json"}
    (row, other) = shell.done("compare", *sorted(out.iterdir()))["comparison"]["rows"]  # what a shell makes of OUT/*
    assert [row["runs"], other["runs"]] == [[str(out / "held-s0")], [str(out / "tiny-s0")]]
    assert load_recipe(out / "held-s0" / "recipe.yaml").run.threads == 1
    assert max(map(len, said.lines[:-1])) <= 80

    monkeypatch.setattr(jobs, "CHILD", ["/there/is/no/such/program"])  # nothing is left to be run
    table = shell.done("run", *recipes, "--out", out)["comparison"]
    assert [row["runs"] for row in table["rows"]] == [[str(out / "tiny-s0")], [str(out / "held-s0")]]
    assert shell("run", *recipes, "--out", out).lines[0] == "2 of 2 runs already complete"
    said = shell("run", *recipes, "--out", out, "--set", "train.epochs=1", code=2)
    assert said.err == (
        f"perpetune: {out / 'tiny-s0'} belongs to another recipe (train differs): choose another --out, or delete "
        "this folder\n"
    )


@pytest.mark.parametrize("started", chiefly(["warm", "as for a user"], ["warm"]))
def test_a_run_that_fails_leaves_the_others(
    started: str, shell: Shell, recipes: tuple[Path, Path], state: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if started == "warm":
        request.getfixturevalue("children")
    out = tmp_path / "all"
    out.mkdir()
    state.rename(out / "tiny-s0")
    broken = yaml.safe_load(recipes[0].read_text())
    broken |= {"name": "broken", "data": {"name": "folder", "path": str(tmp_path / "nowhere")}}
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump(broken))
    said = shell("run", recipes[0], "broken.yaml", "--out", out, code=1)
    assert said.out.splitlines()[1].startswith("broken-s0  failed  [2/2]")
    assert f"comparison: {out / 'comparison.html'}" in said.out
    (line,) = said.err.splitlines()
    assert line.startswith(f"perpetune: {out / 'broken-s0'}: ")
    assert "nowhere" in line


@pytest.mark.usefixtures("children")
def test_ctrl_c_stops_all_and_the_same_command_goes_on(
    shell: Shell, recipes: tuple[Path, Path], tmp_path: Path
) -> None:
    out, before = tmp_path / "all", signal.getsignal(signal.SIGINT)
    training = out / "tiny-s0" / "resume" / "task.json"

    def stop() -> None:
        while not training.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop, daemon=True).start()
    said = shell("run", recipes[0], "--seeds", "2", "--out", out, "--set", "train.epochs=5000", code=130)
    assert said.err == "perpetune: stopped by SIGINT with 0 of 2 runs complete; the same command continues the others\n"
    assert "failed" not in said.out
    assert [p.name for p in out.iterdir()] == ["tiny-s0"]  # the second was not begun
    assert [p.name for p in (out / "tiny-s0" / "resume").iterdir() if p.is_dir()]  # where it goes on
    assert signal.getsignal(signal.SIGINT) is before  # ignored, where the tests run in the background of a script


def child(code: str) -> list[str]:
    """A stand-in for the process of a run, which finds the run in `asked` and has `say`."""
    return [
        sys.executable, "-c",
        "import json, os, signal, sys, time\nasked = json.loads(sys.stdin.readline())\n"
        "def say(event, **facts): print(json.dumps({'event': event, **facts}), flush=True)\n" + code,
    ]  # fmt: skip


def planned(count: int, folder: Path) -> list[jobs.Job]:
    return jobs.plan([load_recipe("demo")], range(count), folder, None)


def test_so_many_runs_go_on_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "CHILD", child("say('note', message='began'); time.sleep(0.05); say('done')"))
    running, most, said = set(), 0, []

    def tell(job: jobs.Job, event: dict[str, Any]) -> None:
        nonlocal most
        said.append((job.name, event["event"]))
        if event["event"] == "note":
            running.add(job.name)
        else:
            running.discard(job.name)
        most = max(most, len(running))

    many = planned(5, tmp_path)
    jobs.run_all(many, 2, tell)
    assert most <= 2
    assert sorted(said) == sorted((f"demo-s{i}", event) for i in range(5) for event in ("note", "done"))
    assert [job.failure for job in many] == [None] * 5


@pytest.mark.parametrize(
    ("code", "failure"),
    [
        ("say('failed', message='no disk')", "no disk"),
        ("sys.exit(3)", "its process ended with exit code 3"),
        ("say('task', results={}); os.kill(os.getpid(), 9)", "its process ended with signal 9"),
        ('os.write(1, b\'{"event": "ta\'); os.kill(os.getpid(), 9)', "its process ended with signal 9"),
    ],
)
def test_why_a_run_failed(code: str, failure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "CHILD", child(f"if asked['recipe']['seed'] == 1: {code}\nelse: say('done')"))
    many = planned(3, tmp_path)
    said: list[tuple[str, str]] = []
    jobs.run_all(many, 1, lambda job, event: said.append((job.name, event["event"])))
    assert [job.failure for job in many] == [None, failure, None]
    assert said[-1] == ("demo-s2", "done")
    assert ("demo-s1", "failed") in said


def test_a_hangup_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wait = "signal.signal(signal.SIGHUP, lambda *_: sys.exit(7)); say('note', message='began'); time.sleep(60)"
    monkeypatch.setattr(jobs, "CHILD", child(wait))
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and stays so
    try:
        many = planned(2, tmp_path)
        with pytest.raises(Interrupted, match="stopped by SIGHUP") as stop:
            jobs.run_all(many, 1, lambda job, event: os.kill(os.getpid(), signal.SIGHUP))
        assert stop.value.exit_code == 129
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_stops_with_a_checkpoint_once_its_parent_is_gone(
    children: tuple[str, ...], world: Path, tmp_path: Path
) -> None:
    asked = {"recipe": load_recipe(world / "my.yaml", ["train.epochs=5000"]).anchored().model_dump(mode="json")}
    run = subprocess.Popen(children, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert run.stdin is not None
    assert run.stdout is not None
    print(json.dumps({**asked, "folder": str(tmp_path / "run"), "device": None}), file=run.stdin, flush=True)
    while not (tmp_path / "run" / "resume" / "task.json").exists():
        assert run.poll() is None
        time.sleep(0.02)
    run.stdin.close()  # as a parent's end does, kill -9 included
    (line,) = run.stdout.read().splitlines()
    assert json.loads(line)["event"] == "failed"
    assert "continue with `perpetune resume" in json.loads(line)["message"]
    assert run.wait() == 128 + signal.SIGTERM
    assert [p.name for p in (tmp_path / "run" / "resume").iterdir() if p.is_dir()]


def test_a_run_without_anybody_to_tell_says_nothing(children: tuple[str, ...], world: Path, tmp_path: Path) -> None:
    run = subprocess.Popen(children, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdin is not None
    assert run.stdout is not None
    assert run.stderr is not None
    run.stdout.close()
    content = load_recipe(world / "my.yaml", ["data.path=nowhere"]).model_dump(mode="json")
    asked = {"recipe": content, "folder": str(tmp_path / "run"), "device": None}
    print(json.dumps(asked), file=run.stdin, flush=True)
    assert run.stderr.read() == ""
    assert run.wait() == 1
    run.stdin.close()
    run.stderr.close()


def test_runs_are_let_go_when_there_is_nobody_to_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "say('note', message='began'); sys.stdin.read(); os.mkdir(asked['folder'])"
    monkeypatch.setattr(jobs, "CHILD", child(code))

    def tell(job: jobs.Job, event: dict[str, Any]) -> None:
        raise BrokenPipeError

    (job,) = planned(1, tmp_path)
    with pytest.raises(BrokenPipeError):
        jobs.run_all([job], 1, tell)
    deadline = time.monotonic() + 60
    while not job.folder.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_without_a_recipe_it_is_the_demo(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[jobs.Job] = []
    monkeypatch.setattr(jobs, "run_all", lambda many, at_once, tell: asked.extend(many))
    assert shell("run").out == ""
    assert [str(job.folder) for job in asked] == [f"runs/turned/{name}-s{s}" for name in run.DEMO for s in range(2)]
    asked.clear()
    Path("runs/turned").mkdir(parents=True)
    Path("runs/turned/recipe.yaml").touch()  # the state of `perpetune run turned`
    shell("run", "--seed", "7", "--set", "train.epochs=1")
    assert [str(job.folder) for job in asked] == [f"runs/turned-2/{name}-s7" for name in run.DEMO]
    assert {job.recipe.train.epochs for job in asked} == {1}
    asked.clear()
    shell("run", "demo", "--seeds", "4,9")
    assert [job.recipe.seed for job in asked] == [4, 9]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["demo", "--seeds", "x"], "--seeds 'x': expected a number of seeds, such as 3, or a list, such as 0,3,5"),
        (["demo", "--seeds", "0"], "--seeds '0': expected a number"),
        (["demo", "--seeds", "-1"], "--seeds '-1': expected a number"),
        (["demo", "--seeds", "1,1"], "--seeds '1,1': the list has a seed twice"),
        (["demo", "--seeds", "2", "--seed", "1"], "--seed and --seeds: choose one of them"),
        (["demo", "demo"], "two recipes have the name 'demo' and would use the same folder: rename one of them"),
        (["demo", "dmo"], "there is no recipe 'dmo'"),
        (["demo", "demo-ncm", "--out", "one"], "one is the state folder of one run: choose another --out for several"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_is(arguments: list[str], says: str, shell: Shell) -> None:
    Path("one").mkdir()
    Path("one/recipe.yaml").touch()
    said = shell("run", *arguments, code=2)
    assert said.err.startswith(f"perpetune: {says}")
    assert len(said.err.splitlines()) == 1
    assert not Path("runs").exists()


# -- using --------------------------------------------------------------------------------------------------


def test_predict(shell: Shell, world: Path) -> None:
    done, folder = world / "done", world / "images" / "test"
    one = folder / "cat" / "1000.png"
    said = shell("predict", done, one, folder / "dog")
    assert [line.partition(": ")[0] for line in said.lines] == [
        str(one),
        *(str(folder / "dog" / f"{i}.png") for i in (1000, 1001, 1002)),
    ]
    pairs = [pair.split() for pair in said.lines[0].partition(": ")[2].split(", ")]
    assert len(pairs) == 3
    assert [float(p) for _, p in pairs] == sorted((float(p) for _, p in pairs), reverse=True)

    found = written(shell("predict", done, one, "--top", "9", "--json").out, "prediction")
    assert [entry["image"] for entry in found] == [str(one)]
    classes = found[0]["classes"]
    assert {c["name"] for c in classes} == {"cat", "dog", "fox", "owl"}
    assert sum(c["probability"] for c in classes) == pytest.approx(1, abs=1e-5)
    assert [f"{c['probability']:.3f}" for c in classes[:3]] == [p for _, p in pairs]

    rows = list(csv.DictReader(io.StringIO(shell("predict", done, folder, "--csv", "--top", "2").out)))
    assert len(rows) == 12
    assert list(rows[0]) == ["image", "name_1", "probability_1", "name_2", "probability_2"]
    assert all(float(row["probability_1"]) >= float(row["probability_2"]) for row in rows)


def test_predict_names_what_cannot_be_read_after_the_rest(shell: Shell, world: Path, tmp_path: Path) -> None:
    whole = (world / "images" / "test" / "cat" / "1000.png").read_bytes()
    for name, content in (("a.png", whole), ("b.png", whole[: len(whole) // 2]), ("c.png", whole)):
        (tmp_path / name).write_bytes(content)
    a, b, c = (tmp_path / f"{name}.png" for name in "abc")
    said = shell("predict", world / "done", a, b, c, code=1)
    assert [line.partition(": ")[0] for line in said.lines] == [str(a), str(c)]
    assert said.err.startswith(f"perpetune: 1 of 3 pictures cannot be read: {b}")
    assert len(said.err.splitlines()) == 1


def test_predict_prints_one_line_for_each_picture(shell: Shell, world: Path, tmp_path: Path) -> None:
    broken = tmp_path / "line\nbreak.png"
    broken.write_bytes((world / "images" / "test" / "cat" / "1000.png").read_bytes())
    (line,) = shell("predict", world / "done", broken).lines
    assert line.startswith(f"{tmp_path}/line\\nbreak.png: ")
    assert written(shell("predict", world / "done", broken, "--json").out)[0]["image"] == str(broken)


def test_evaluate(shell: Shell, world: Path) -> None:
    cells = shell.done("evaluate", world / "done")["cells"]
    assert list(cells) == ["cat-dog", "fox-owl"]
    assert all(cell["total"] == 6 for cell in cells.values())
    right = {name: cell["correct"] for name, cell in cells.items()} | {"all": sum(c["correct"] for c in cells.values())}
    said = shell("evaluate", world / "done")
    assert [line.split() for line in said.lines] == [
        [name, f"{correct / total:.4f}", f"{correct}/{total}"]
        for (name, correct), total in zip(right.items(), (6, 6, 12), strict=True)
    ]
    given = shell.done("evaluate", world / "done", "--data", world / "more")["cells"]
    assert [cell["total"] for cell in given.values()] == [10]
    assert given[str(world / "more")]["per_class"]["hen"] == [0, 5]  # never learned


def test_export(shell: Shell, world: Path, tmp_path: Path) -> None:
    said = shell("export", world / "done", "peft")
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "head.json", "head.safetensors"]
    assert said.lines == [f"peft: {', '.join(names)}"]
    assert sorted(p.name for p in (tmp_path / "peft").iterdir()) == names
    assert json.loads(Path("peft/head.json").read_text())["classes"] == ["cat", "dog", "fox", "owl"]
    assert shell.done("export", world / "done", "again")["files"] == [f"again/{name}" for name in names]


# -- looking ------------------------------------------------------------------------------------------------


def test_report(shell: Shell, state: Path, tmp_path: Path) -> None:
    said = shell("report", state)
    assert {Path(line) for line in said.lines} == {state / name for name in ("report.html", "report.md", "report.json")}
    assert (state / "report.html").read_text().count("fox-owl") > 0
    results = shell.json("report", state, "--out", tmp_path / "pages")
    assert results.items() <= json.loads((tmp_path / "pages" / "report.json").read_text()).items()


def table_at(lines: list[str]) -> int:
    """Where the table of bytes begins."""
    return next(number for number, line in enumerate(lines) if line.split() == ["task", "own", "shared"])


def test_log(shell: Shell, world: Path) -> None:
    said = shell("log", world / "done")
    at = table_at(said.lines)
    told = [line.split(maxsplit=1)[1] for line in said.lines[:at]]
    timed = [line for line in told if line.startswith("task timed")]
    assert [line.split(",")[0] for line in timed] == ["task timed      0000-cat-dog", "task timed      0001-fox-owl"]
    assert [line for line in told if line not in timed] == [
        "run begun       device cpu, seed 0, tasks 2",
        "task begun      0000-cat-dog, from stream",
        "task committed  0000-cat-dog",
        "task begun      0001-fox-owl, from stream",
        "task committed  0001-fox-owl",
    ]
    assert [e["event"] for e in shell.json("log", world / "done")] == [line[:14].rstrip() for line in told]
    assert [line.split()[0] for line in said.lines[at:]] == ["task", "0000-cat-dog", "0001-fox-owl", "all"]
    assert shell("log", world / "done", "--tasks").lines == said.lines[at:]
    tasks = shell.json("log", world / "done", "--tasks")
    assert [(entry["name"], entry["pruned"]) for entry in tasks] == [("cat-dog", ""), ("fox-owl", "")]
    assert tasks[0]["shared"] == 0 < tasks[1]["own"]


def test_prune(shell: Shell, world: Path, state: Path) -> None:
    shell("update", state, "--data", world / "more", "-q")
    asked = ["evaluate", state, "--json"]
    before, answers = (state / "journal.jsonl").read_bytes(), shell(*asked).out
    would = shell("prune", state, "--keep", "2", "--dry-run").lines
    assert len(would) == 1
    assert would[0].startswith("would drop what only a rollback to cat-dog needs; ")
    assert would[0].endswith(f" would come free; {state} can go back to fox-owl, more")
    assert (state / "journal.jsonl").read_bytes() == before
    done = shell.done("prune", state, "--keep", "2")
    assert (done["dropped"], done["kept"]) == (["cat-dog"], ["fox-owl", "more"])
    assert done["bytes"] > 0
    assert shell(*asked).out == answers
    assert shell("prune", state, "--keep", "2").lines == [f"nothing to drop; {state} can go back to fox-owl, more"]
    pruned = shell.json("log", state, "--tasks")[0]["pruned"]
    assert pruned.startswith("perpetune prune --keep 2, 2")
    refused = shell("rollback", state, "--to", "cat-dog", code=2)
    assert refused.err == (
        f"perpetune: {state} cannot go back to cat-dog, which was pruned ({pruned}); it can go back to fox-owl, more, "
        "or to start\n"
    )
    said = shell("prune", state, "--keep", "0", code=2)
    assert said.err == "perpetune: keep is 0: a whole number of tasks is expected, at least 1, for the newest\n"
    with State(state).writing():
        busy = shell("prune", state, "--keep", "1", code=1)
    assert busy.err == f"perpetune: another process is writing to {state}: wait for it, or stop it\n"
    shell("rollback", state, "--to", "start")
    assert shell("log", state, "--tasks").lines == ["no task is learned"]


def test_log_says_where_data_came_from(shell: Shell, world: Path, state: Path) -> None:
    shell("update", state, "--data", world / "more", "-q")
    shell("rollback", state, "--to", "fox-owl")
    said = shell("log", state)
    lines = said.lines[: table_at(said.lines)]
    assert lines[-5].endswith(f"task begun      0002-more, from folder {world / 'more'}")
    assert lines[-1].endswith("rolled back     to fox-owl, dropped more")


def test_compare(shell: Shell, world: Path, tmp_path: Path) -> None:
    for seed in ("1", "2"):
        shell("run", world / "my.yaml", "-q", "--out", seed, "--seed", seed)
    shell("run", world / "my.yaml", "-q", "--out", "short", "--set", "train.epochs=1")
    said = shell("compare", "1", "2/report.json", "short", "--out", "page")
    assert "±" in said.out
    assert {Path(line) for line in said.lines[-3:]} == {Path("page", f"compare.{x}") for x in ("html", "md", "json")}
    table = shell.done("compare", "1", "2/report.json", "short")["comparison"]
    assert [row["runs"] for row in table["rows"]] == [["1", "2/report.json"], ["short"]]
    assert table["settings"] == ["train.epochs"]
    assert table == json.loads((tmp_path / "page" / "compare.json").read_text())
    again = shell.done("compare", "1", "2/report.json", "short", *Path("page").iterdir())  # which are no runs
    assert again["comparison"] == table
    assert shell("compare", *Path("page").iterdir(), code=2).err == "perpetune: compare: name one run or more\n"
    Path("1/report.json").rename("compare.json")  # a run by the name of a comparison
    assert [row["runs"] for row in shell.done("compare", "compare.json")["comparison"]["rows"]] == [["compare.json"]]
    Path("1/report.md").rename("notes.md")
    assert shell("compare", "notes.md", code=1).err.startswith("perpetune: notes.md holds no results: ")


def test_methods(shell: Shell) -> None:
    said = shell("methods")
    assert [line.partition(":")[0] for line in said.lines if line[0] != " " and ":  " in line][:9] == [
        "method", "pet", "head", "select", "backbone", "data", "exams", "protect", "average",
    ]  # fmt: skip
    found = shell.json("methods")
    kinds = ["methods", "pets", "heads", "selectors", "backbones", "data", "exams", "protect", "average"]
    assert list(found) == kinds
    assert found.pop("protect")["project"] == "step   (step, gradient)"
    assert found.pop("average")["over"] == "steps   (steps, end)"
    for kind, choices in found.items():
        for name, about in choices.items():
            assert about["is"], (kind, name)
            assert f"  {name:<10} {about['is']}" in said.out
    # what fits together, and what can be said of each option
    assert "not for `perpetune update`" in found["methods"]["joint"]["fits"]
    assert "for any method" in found["heads"]["ncm"]["fits"]
    assert "for methods that train" in found["heads"]["linear"]["fits"]
    assert found["methods"]["finetune"]["options"]["mask"] == "task   (task, seen, none)"
    assert found["pets"]["lora"]["options"]["at"] == "[q, v]"
    assert found["backbones"]["timm"]["options"]["pretrained"] == "true"
    assert found["data"]["folder"]["options"]["path"] == "required"
    assert max(map(len, said.lines)) <= 120


def test_recipes(shell: Shell) -> None:
    found = shell.json("recipes")
    assert list(found) == list(packaged())
    assert [line.split(maxsplit=1) for line in shell("recipes").lines] == [[k, v] for k, v in found.items()]


@pytest.mark.parametrize("name", every(RECIPES, 16), ids=lambda name: Path(name).stem)
def test_show_prints_a_recipe_that_reads_back_the_same(name: str, shell: Shell) -> None:
    loaded = load_recipe(name)
    assert loaded.description
    shown = shell("show", name)
    Path("shown.yaml").write_text(shown.out)
    assert load_recipe("shown.yaml") == loaded
    assert shell("show", "shown.yaml").out == shown.out  # nothing is left to be filled in
    assert shell.json("show", name) == yaml.safe_load(shown.out)


def test_show_keeps_what_is_set(shell: Shell) -> None:
    shown = yaml.safe_load(
        shell("show", "demo", "--set", "pet={name: lora, blocks: [0, -1], at: v}", "--set", "method.mask=seen").out
    )
    assert shown["pet"] == {
        "name": "lora", "at": ["v"], "blocks": [0, -1], "rank": 8, "alpha": 16.0, "dropout": 0.0, "rslora": False,
    }  # fmt: skip
    assert {k: shown["method"][k] for k in ("name", "mask")} == {"name": "finetune", "mask": "seen"}


def test_check(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = shell("check", "finetune", "--set", "head=ncm", "--set", "pet.rank=2", "--set", "mask=seen")
    assert len(said.lines) >= 10
    assert all(line.startswith("ok    ") for line in said.lines)
    (tmp_path / "greedy.py").write_text(
        "from perpetune.methods.frozen import Frozen\n\n\nclass Greedy(Frozen):\n"
        "    def predict(self, inputs, task=None):\n        return super().predict(inputs)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    outcomes = written(shell("check", "greedy:Greedy", "--set", "head=ncm", "--json", code=1).out, "rule")
    broken = [o for o in outcomes if o["holds"] is False]
    assert [o["fault"] for o in broken] == ["predict takes ['inputs', 'task']"]
    (untested,) = [o for o in outcomes if o["holds"] is None]
    assert "trains no pet" in untested["left_out"]


# -- the program itself -------------------------------------------------------------------------------------


def test_version_and_help(shell: Shell) -> None:
    assert shell("--version").lines == [f"perpetune {__version__}"]
    said = shell("--help")
    assert shell().out == said.out  # no argument: the help
    assert all(f" {verb} " in said.out for verb in VERBS)
    assert sorted(VERBS) == sorted(command.callback.__name__ for command in app.registered_commands if command.callback)


def test_help_of_every_verb_loads_nothing_heavy() -> None:
    code = f"""
import sys
from perpetune.cli import call
for verb in {VERBS!r}:
    assert call([verb, "--help"]) == 0, verb
    heavy = {{"torch", "transformers", "numpy", "yaml", "accelerate"}} & sys.modules.keys()
    assert not heavy, (verb, heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("Usage: perpetune ") == len(VERBS)


def test_the_program_finds_what_lies_beside_it_and_warns_in_one_line(warm: Warm, world: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from perpetune.methods.finetune import FineTune\n\n\nclass Mine(FineTune): pass\n"
    )
    model = Path(shutil.copytree(world / "model", tmp_path / "model"))
    (model / "preprocessor_config.json").unlink()
    command = ["init", "state", "--model", "folder:model", "--set", "method=mine:Mine", "--device", "cpu"]
    program = str(Path(sys.executable).parent / "perpetune")
    done = subprocess.run([*warm.command, program, *command], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("perpetune: warning: folder:")
    assert line.endswith("model has no preprocessor_config.json: ImageNet's mean and std are assumed")
    assert (tmp_path / "state" / "recipe.yaml").is_file()


@pytest.mark.parametrize(
    "arguments",
    [
        ["update", "s", "--data", "a", "--data", "b"],
        ["update", "s", "--data=a", "--data", "b"],
        ["init", "s", "--data", "a", "--data=b"],
        ["evaluate", "s", "--data", "a", "--data", "a"],
        ["update", "s", "--data", "a", "--name", "x", "--name", "y"],
        ["run", "demo", "--seed", "1", "--seed", "2"],
        ["rollback", "s", "--to", "a", "--to", "b"],
        ["predict", "s", "x.png", "--top", "1", "--top=2"],
    ],
)
def test_an_option_with_one_value_is_not_given_twice(arguments: list[str], shell: Shell) -> None:
    assert "is given more than once, and it takes one value" in shell(*arguments, code=2).err


def test_options_that_add_up_are_given_as_often_as_wanted(shell: Shell) -> None:
    said = shell("show", "demo", "--set", "seed=3", "--set", "train.epochs=7")
    assert "seed: 3" in said.out

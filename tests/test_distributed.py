"""Two processes on the CPU, started by accelerate, learn what one process learns.

`accelerate launch --cpu` starts one process unless MPI is there; with `--multi_gpu` it starts as many as it is
told and joins them with gloo where there is no GPU, or where the recipe says `device: cpu`. The launcher is a fork that
begins with everything imported. In one of the tests, a slow one, it starts two new interpreters, as for a user; in the
others two more such forks.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_evaluate import SAID, Says, task_of
from tiny import chiefly, recipe, split_folder, task_tensors, vit_folder, written
from warm import Warm

from perpetune.evaluate import evaluate
from perpetune.learner import Learner
from perpetune.state import State
from perpetune.tasks import part

BIN = Path(sys.executable).parent
LAUNCH = ("-m", "accelerate.commands.launch")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine training pictures in the first task and eight in the second: the last batch of the first has one."""
    return split_folder(tmp_path_factory.mktemp("data"), "abcd", [5, 4, 5, 3], 3)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vit_folder(tmp_path_factory.mktemp("vit"))


def start(what: Sequence[str], *arguments: str | Path, launch: Sequence[str | Path]) -> subprocess.Popen[str]:
    """`accelerate launch` of two processes of `what`: a script, a module or a command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no".split()
    command = [*launch, *options, "--main_process_port", port, *what, *arguments]
    return subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


def start_warm(warm: Warm, what: Sequence[str], *arguments: str | Path) -> subprocess.Popen[str]:
    """The same without any new interpreter; `what` is a script, or `-m` and a module."""
    return start(["--no_python", *warm.command, *what], *arguments, launch=[*warm.command, *LAUNCH])


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=150)
    assert process.returncode == 0, err
    return out, err


def tensors(state: Path) -> dict[str, torch.Tensor]:
    return {f"{name}/{k}": t for name, found in task_tensors(state).items() for k, t in found.items()}


def metrics(state: Path) -> list[Any]:
    return [json.loads(p.read_bytes()) for p in sorted((state / "tasks").glob("*/metrics.json"))]


def assert_same(found: Path, expected: Path) -> None:
    ours, theirs = tensors(found), tensors(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        one, other = ours[name], tensor
        if name.endswith((".last", ".cross")) and other.dim() == 2:  # factors of a product: their signs are free
            one, other = one.mT @ one, other.mT @ other
        if name.endswith(".vectors"):  # a basis: the subspace counts
            one, other = one @ one.mT, other @ other.mT
        scale = max(1.0, float(other.abs().max())) if other.numel() else 1.0
        within = 2e-3 if other.dtype == torch.float16 else 1e-5
        torch.testing.assert_close(one, other, rtol=0, atol=within * scale, msg=name)
    for one, other in zip(metrics(found), metrics(expected), strict=True):
        assert one["cells"] == other["cells"]
        assert one.get("drift") == pytest.approx(other.get("drift"), abs=1e-4)
        certificates, wanted = one.get("protection", []), other.get("protection", [])
        assert [figures(c, None) for c in certificates] == [figures(c, None) for c in wanted]
        for found_, wanted_ in zip(certificates, wanted, strict=True):
            assert figures(found_, float) == pytest.approx(figures(wanted_, float), rel=1e-3, abs=1e-5)


def figures(certificate: dict[str, Any], kind: type | None) -> list[Any]:
    """What a certificate says, its sites in a row: the numbers of `kind`, or all but floating point."""
    values = [*certificate.values(), *(v for site in certificate["sites"] for v in site.values())]
    values = [v for v in values if not isinstance(v, list)]
    return [v for v in values if isinstance(v, kind)] if kind else [v for v in values if not isinstance(v, float)]


def assert_written_by_one(state: Path, tasks: int) -> None:
    """One line for each event, nothing left over."""
    events = [e["event"] for e in State(state).journal()]
    assert events == ["run begun", *["task begun", "task committed", "task timed"] * tasks]
    assert not list(state.rglob("*.tmp"))
    assert not (state / "resume").exists()


SGD = {"epochs": 1, "batch_size": 5, "accumulate": 2, "clip": 0.5, "optimizer": "sgd", "warmup": 0.3}
LONG = {"epochs": 9, "batch_size": 4, "lr": 0.003}
CASES: dict[str, dict[str, Any]] = {
    # 9 examples in batches of 4: the processes have 2 + 2, 2 + 2 and 1 + 0 of them.
    "finetune-linear": {"train": {"epochs": 2, "batch_size": 4, "lr": 0.01}},
    "finetune-ncm": {"head": "ncm", "train": SGD},
    "frozen-ncm": {"method": "frozen", "pet": "none", "head": {"name": "ncm", "metric": "euclidean"}},
    "frozen-drawn": {"method": "frozen", "pet": "none", "head": {"name": "drawn", "epochs": 2}},
    # One process solves the first task from its rows, two from their sums.
    "frozen-ridge": {"method": "frozen", "pet": "none", "head": {"name": "ridge", "projection": 40, "scale": 5.0}},
    # The transfer loss and the sample for the scale are a process's own, so they are left out.
    "safe": {
        "method": {"name": "safe", "diagonal": 0.0, "rest": 0.0, "align": 2.0, "sharpness": 0.0},
        "head": {"name": "ridge", "projection": 20, "scale": 5.0, "penalty": 1.0},
        "train": {"epochs": 1, "batch_size": 4, "optimizer": "sgd"},
    },
    # Each process has looked at half of what the map is learned from, and both have to move the sums alike. Steps are
    # small: features that nearly collapse differ in the last bits, which standardisation makes large.
    "carried": {
        "head": {"name": "ridge", "carry": True, "scale": 5.0, "penalty": 1.0},
        "train": {"epochs": 2, "batch_size": 4, "lr": 0.001, "optimizer": "sgd"},
        "evaluate": {"oracle": "last"},
    },
    "joint-cosine": {"method": "joint", "head": "cosine", "setting": "task", "train": {"epochs": 1, "lr": 0.01}},
    "protected": {
        "protect": {"energy": 0.9},
        "pet": {"name": "adapter", "width": 8},
        "train": {"epochs": 2, "lr": 0.01},
    },
    "averaged": {
        "average": {"keep": 0.5},
        "train": {"epochs": 2, "batch_size": 4, "accumulate": 2, "optimizer": "sgd"},
    },
    "lae": {
        "average": {"weight": 0.9, "restart": False, "answer": "both"},
        "train": {"epochs": 2, "batch_size": 4, "optimizer": "sgd"},
    },
    "reference": {"protect": {"energy": 0.9, "samples": 5, "reference": {"path": "DATA/test"}}},
    "renewed": {"protect": {"energy": 0.9, "renew": True}, "train": {"epochs": 2, "lr": 0.01}},
    "leading": {
        "protect": {"energy": 0.9, "renew": True, "start": "leading"},
        "train": {"epochs": 2, "batch_size": 4, "lr": 0.01},
    },
    # A member may have no gradient in one process and have one in the other; batches of 4 are 2 + 2, and once 1 + 0.
    "pool-shared": {
        "pet": {"name": "prefix", "length": 3},
        "method": {"name": "pool", "members": 4, "select": {"name": "keys", "pull": 0.5, "spread": 1.0}},
        "train": {"epochs": 2, "batch_size": 4, "lr": 0.01, "weight_decay": 0.1},
    },
    "pool-tasks": {
        "method": {"name": "pool", "select": "gaussian", "merge": 0.1},
        "head": {"name": "ridge", "scale": 5.0, "penalty": 1.0},
        "train": {"epochs": 1, "batch_size": 4, "optimizer": "sgd"},
        "evaluate": {"told": True},
    },
    "whole": {"train": LONG},
    "stopped": {"train": LONG},
}


ALIKE = {"frozen-ncm", "averaged", "renewed"}  # what another case has as well, beside something else


def content(case: str, vit: Path, data: Path) -> dict[str, Any]:
    """The recipe of a case."""
    changes: dict[str, Any] = json.loads(json.dumps(CASES[case]).replace("DATA", str(data)))
    return recipe(vit, data, **changes)


COMMANDS = {"module": ["-m", "perpetune"], "script": [str(BIN / "perpetune")]}
COMMAND_CASE = "finetune-linear"


@pytest.fixture(scope="module")
def launched(
    warm: Warm, vit: Path, data: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A folder, and what was started to fill it, all at once."""
    folder = tmp_path_factory.mktemp("launched")
    given = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    asked = {params.get("case") for params in given}
    recipes = {name: content(name, vit, data) for name in CASES if name not in ALIKE or name in asked}
    (folder / "recipes.json").write_text(json.dumps(recipes))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(vit, data, **CASES[COMMAND_CASE])))
    run = ("run", folder / "recipe.yaml", "--json", "--out")
    started = {
        "pair": start_warm(warm, [str(Path(__file__).with_name("pair.py"))], folder),
        "script": start_warm(warm, COMMANDS["script"], *run, folder / "script"),
    }
    if any(params.get("command") == "module" for params in given):
        # The two processes are new interpreters, as for a user.
        started["module"] = start(COMMANDS["module"], *run, folder / "module", launch=[*warm.command, *LAUNCH])
    yield folder, started
    for process in started.values():
        if process.poll() is None:
            process.terminate()


@pytest.fixture(scope="module")
def pair(launched: tuple[Path, dict[str, Any]]) -> Path:
    """What two processes left of all the cases."""
    folder, started = launched
    finish(started["pair"])
    return folder


def seen(pair: Path) -> list[dict[str, Any]]:
    return [json.loads((pair / f"seen-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("case", chiefly(CASES, CASES.keys() - ALIKE))
def test_two_processes_learn_what_one_learns(case: str, pair: Path, vit: Path, data: Path, tmp_path: Path) -> None:
    learner = Learner(content(case, vit, data), tmp_path / "one")
    learner.run()
    assert_same(pair / case, tmp_path / "one")
    if case == "carried":
        assert [m["facts"]["model.head"].get("carried") for m in metrics(pair / case)] == [None, True]
    if case != "stopped":
        assert_written_by_one(pair / case, tasks=2)
        assert [s["evaluated"][case] for s in seen(pair)] == [learner.evaluate()] * 2
        one, other = (s["learned"][case] for s in seen(pair))
        assert one == other, "the processes have the same bits"
        assert ("protect.safetensors" in one) == ("protect" in CASES[case])


def test_one_process_tells_and_both_know_of_each_other(pair: Path) -> None:
    assert [s["world"] for s in seen(pair)] == [2, 2]
    assert [s["device"] for s in seen(pair)] == ["cpu", "cpu"]
    assert [set(s["told"].values()) for s in seen(pair)] == [{2}, {0}]


def test_other_answers_and_gauges_are_of_all_processes(pair: Path) -> None:
    """Also where the second has no image, and so does not know what the method has to tell."""
    for n in range(1, 6):
        one = evaluate(Says("abcd"), task_of("ab", part(SAID, range(n))), among="seen", batch_size=2)
        assert one is not None
        assert one.keys() >= {"others", "gauges"}
        assert [s["answers"][n - 1] for s in seen(pair)] == [one] * 2


def test_a_signal_to_one_process_stops_both_and_both_go_on(pair: Path) -> None:
    kept = ["00-train-step-000000010", "task.json"]  # they ask each other every tenth step
    assert [s["stopped"] for s in seen(pair)] == [{"code": 128 + signal.SIGTERM, "kept": kept, "tasks": 2}] * 2
    same = tensors(pair / "whole")
    assert all(torch.equal(t, same[name]) for name, t in tensors(pair / "stopped").items())
    assert metrics(pair / "stopped") == metrics(pair / "whole")


def test_several_processes_need_a_folder_that_all_can_see(pair: Path) -> None:
    told = "several processes must share one state folder: give `folder` a path that all of them see"
    assert [s["without a folder"] for s in seen(pair)] == [told] * 2


@pytest.mark.parametrize("command", chiefly(COMMANDS, ["script"]))
def test_the_command_line_runs_in_two_processes(
    command: str, launched: tuple[Path, dict[str, Any]], vit: Path, data: Path, tmp_path: Path
) -> None:
    folder, started = launched
    out, _ = finish(started[command])
    assert len(written(out, "done")[0]["results"]["tasks"]) == 2, "one process of the two prints"
    Learner(recipe(vit, data, **CASES[COMMAND_CASE]), tmp_path / "one").run()
    assert_same(folder / command, tmp_path / "one")
    assert_written_by_one(folder / command, tasks=2)
    assert (folder / command / "report.html").is_file()

"""`run.shard: fsdp` in two and three processes on the CPU: the same bits as with the whole model in each process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sharing import drop_in
from test_distributed import assert_same, tensors
from test_language_run import colors, stories, write
from test_language_run import recipe as text_recipe
from tiny import recipe, split_folder, tiny_language_model, vit_folder
from warm import Warm

from perpetune.errors import UsageError
from perpetune.learner import Learner

SCRIPT = Path(__file__).with_name("sharing.py")
SECONDS = 120  # a test that hangs ends after so many


def start(warm: Warm, part: str, folder: Path, count: int) -> list[subprocess.Popen[str]]:
    """So many processes of a part, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    about = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    command = [*warm.command, str(SCRIPT), part, str(folder)]
    return [
        subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **about, "RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""},
        )
        for rank in range(count)
    ]


def ended(processes: list[subprocess.Popen[str]]) -> list[int]:
    """Their exit codes; a process that hangs is killed, and fails the test."""
    try:
        said = [process.communicate(timeout=SECONDS)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    if codes[0] != 0:
        print(*said, sep="\n")
    return codes


def seen(folder: Path, part: str, count: int) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{part}-{rank}.json").read_text()) for rank in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven training pictures in the first task and eight in the second, five test pictures in each; and texts."""
    root = tmp_path_factory.mktemp("sharded")
    vit = vit_folder(root / "vit", blocks=2)
    data = split_folder(root / "data", "abcd", [4, 3, 5, 3], [3, 2, 2, 3])
    model = tiny_language_model(root / "llama")
    for name, rows in {"colors": colors, "stories": stories}.items():
        write(root / "texts" / name / "train.jsonl", rows(range(7)))
        write(root / "texts" / name / "test.jsonl", rows(range(20, 24)))
    ridge = {"name": "ridge", "projection": 20, "scale": 5.0, "penalty": 1.0}
    cpu = {"device": "cpu", "threads": 1}
    recipes = {
        "pictures": recipe(vit, data, protect={"energy": 0.9}, train={"epochs": 1, "batch_size": 4}, run=cpu),
        # Nothing is trained and examples are computed one by one, so that the sums are of the same bits.
        "sums": recipe(
            vit,
            data,
            protect={"energy": 0.9},
            head=ridge,
            train={"epochs": 0, "batch_size": 1},
            evaluate={"batch_size": 1},
            run=cpu,
        ),
        "texts": text_recipe(
            model,
            root / "texts",
            protect={"energy": 0.9},
            train={"epochs": 1, "batch_size": 4, "lr": 0.02},
            stream={"order": ["colors", "stories"]},
        ),
    }
    (root / "recipes.json").write_text(json.dumps(recipes))
    return root


def content(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "recipes.json").read_text())[name]
    return found


@pytest.fixture(scope="module")
def three(warm: Warm, folder: Path) -> list[dict[str, Any]]:
    """What each of three processes saw of all recipes."""
    assert ended(start(warm, "learns", folder, 3)) == [0, 0, 0]
    return seen(folder, "learns", 3)


@pytest.mark.parametrize("name", ["pictures", "sums", "texts"])
def test_a_cut_model_learns_what_a_whole_one_learns(
    name: str, three: list[dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    cut, whole = ([one.get(f"{name}-{how}", {}) for one in three] for how in ("fsdp", "none"))
    if name == "pictures":
        assert [one["tensors"] for one in cut] == [one["tensors"] for one in whole], "the same bits"
    assert all(one["fingerprint"] for one in cut), "read again from all the processes"
    learner = Learner(content(folder, name), tmp_path / "one")
    learner.run()
    assert_same(folder / f"{name}-fsdp", tmp_path / "one")
    assert [one["evaluated"] for one in cut] == [learner.evaluate()] * 3
    if name == "sums":
        ours, theirs = tensors(folder / "sums-fsdp"), tensors(tmp_path / "one")
        exact = [key for key, tensor in theirs.items() if key.endswith((".packed", ".cross", ".total"))]
        assert {key.rpartition(".")[2] for key in exact} >= {"packed", "total"}
        for key in exact:
            assert theirs[key].dtype == torch.float64
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-12, atol=1e-12 * float(theirs[key].abs().max()))


def test_each_process_holds_its_share(three: list[dict[str, Any]]) -> None:
    for name in ("pictures", "texts"):
        shares = [one[f"{name}-fsdp"] for one in three]
        assert all(one["counted"] == one["here"] for one in shares)
        assert all(one["here"] < 0.4 * one["all"] for one in shares), "the nets are so small that thirds are not even"
        assert sum(one["here"] for one in shares) < 1.1 * shares[0]["all"]


def test_processes_help_each_other_where_they_differ(three: list[dict[str, Any]]) -> None:
    """Seven pictures over three processes, in other numbers of batches; the first alone measures the drift."""
    counts = [one["pictures-fsdp"]["counts"] for one in three]
    assert len({(words, sent) for words, sent, _ in counts}) == 1, "all say and send alike"
    assert counts[2][2] > counts[0][2] >= 0, "the last needs less, and sends all the same"
    assert all(one["pictures-none"]["counts"][1] == 0 for one in three)


def test_one_process_refuses_to_learn_and_answers(three: list[dict[str, Any]], folder: Path, tmp_path: Path) -> None:
    shared = content(folder, "pictures")
    shared["run"] = {**shared["run"], "shard": "fsdp"}
    with pytest.raises(UsageError, match="needs several processes"):
        Learner(shared, tmp_path / "alone")
    assert not (tmp_path / "alone").exists()
    learner = Learner.load(folder / "pictures-fsdp")
    assert learner.evaluate() == three[0]["pictures-fsdp"]["evaluated"]
    with pytest.raises(UsageError, match="needs several processes"):
        learner.learn(folder / "data")


def test_the_drop_in_guards_what_is_whole(warm: Warm, folder: Path) -> None:
    """Optimizers and frozen weights may be cut. The processes have four batches and three of the second kind."""
    assert ended(start(warm, "guards", folder, 2)) == [0, 0]
    said = seen(folder, "guards", 2)
    trained, protection, _ = drop_in("none", 0, 1)
    expected = {k: t for k, t in protection.state_dict().items() if isinstance(t, torch.Tensor)}
    for how in ("fsdp", "zero", "both"):
        ours = [load_file(folder / f"guards-{how}-{rank}.safetensors") for rank in range(2)]
        assert all(torch.equal(ours[0][key], ours[1][key]) for key in ours[0]), "both processes have the same bits"
        for i, p in enumerate(trained):
            torch.testing.assert_close(ours[0][f"trained.{i}"], p.detach(), rtol=0, atol=1e-5)
        for key in (key for key in expected if key.endswith(".total")):
            torch.testing.assert_close(ours[0][key], expected[key], rtol=1e-5, atol=1e-5)
        assert all(one[how] < 1e-5 for one in said), "merging the stored products moves nothing"
    for one in said:
        for call in ("guard", "protect"):
            assert "lora_A.default.weight is trained and sharded over processes (a DTensor)" in one[call]
        assert one["few"].startswith("protect: 1 of 2 processes have no batch")


@pytest.mark.slow
def test_a_killed_run_ends_and_goes_on(warm: Warm, three: list[dict[str, Any]], folder: Path) -> None:
    recipes = json.loads((folder / "recipes.json").read_text())
    stopped = recipes["pictures"]
    stopped["run"] |= {"shard": "fsdp", "checkpoint_every": 2}
    stopped["train"] = {"epochs": 3, "batch_size": 4, "lr": 0.003}
    (folder / "recipes.json").write_text(json.dumps({**recipes, "stopped": stopped}))
    codes = ended(start(warm, "killed", folder, 2))
    assert codes[1] != 0
    assert "does not answer any more" in json.loads((folder / "killed-0.json").read_text())["error"]
    assert ended(start(warm, "resumed", folder, 2)) == [0, 0]
    for one in seen(folder, "resumed", 2):
        assert one["resumed"] == one["whole"]
        assert one["evaluated"] == three[0]["pictures-fsdp"]["evaluated"], "what three processes have learned"
    first = seen(folder, "resumed", 2)[0]
    assert len(first["predicted"]) == 10, "the other process sent its parts until the end"
    assert "process 1 of 2 has ended" in first["error"]


@pytest.mark.slow
def test_without_a_word_processes_wait_for_ever(warm: Warm, three: list[dict[str, Any]], folder: Path) -> None:
    assert ended(start(warm, "unsaid", folder, 2)) == [0, 0]
    assert {"error": "no answer"} in seen(folder, "unsaid", 2)

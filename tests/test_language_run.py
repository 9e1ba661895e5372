"""Whole runs of a small language model: learned, stopped, resumed, protected, asked, and given data that are bad."""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_distributed import finish, start_warm
from test_distributed import tensors as tensors_of
from tiny import CHAT, chiefly, seal, task_files, task_tensors, tiny_language_model, tiny_tokenizer, written
from warm import Warm

from perpetune.cli import call
from perpetune.data.texts.tables import Text
from perpetune.data.texts.view import TextView
from perpetune.errors import DataError, Interrupted, StateError, UsageError
from perpetune.files import to_json, write_folder
from perpetune.fit import FitConfig, _order
from perpetune.learner import Learner
from perpetune.methods.joint import union
from perpetune.runtime import Silent
from perpetune.snapshot import snapshot, tensors
from perpetune.tasks import IGNORED, load_batches

Rows = Sequence[Any]
COLORS = {"sky": "blue", "grass": "green", "blood": "red"}
CAPITALS = {"France": "Paris", "Italy": "Rome"}


def write(path: Path, rows: Rows) -> Path:
    """Rows as JSONL; those of type bytes as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


def colors(numbers: Sequence[int]) -> Rows:
    """Answers to choose from."""
    things = list(COLORS)
    options = list(COLORS.values())
    asked = [(things[n % 3], n) for n in numbers]
    return [{"prompt": f"{thing} {n} is", "answer": COLORS[thing], "options": options} for thing, n in asked]


def capitals(numbers: Sequence[int]) -> Rows:
    """Short answers."""
    asked = [(list(CAPITALS)[n % 2], n) for n in numbers]
    return [{"prompt": f"{n} capital of {of}?", "answer": CAPITALS[of]} for of, n in asked]


def stories(numbers: Sequence[int]) -> Rows:
    """Chats with answers in free text, of different lengths."""
    said = ["the fox", "the lazy dog jumps"]
    return [
        {"messages": [{"role": "user", "content": f"story {n}"}, {"role": "assistant", "content": said[n % 2]}]}
        for n in numbers
    ]


MAKERS: dict[str, Callable[[Sequence[int]], Rows]] = {"colors": colors, "capitals": capitals, "stories": stories}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    found = {kind: tiny_language_model(root / kind, kind) for kind in ("llama", "gpt2")}
    return found | {"plain": tiny_language_model(root / "plain", chat=False)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks of eleven training and five test examples."""
    root = tmp_path_factory.mktemp("texts")
    for name, make in MAKERS.items():
        write(root / name / "train.jsonl", make(range(11)))
        write(root / name / "test.jsonl", make(range(20, 25)))
    return root


def recipe(model: Path, data: Path | None = None, **changes: Any) -> dict[str, Any]:
    """Two epochs over tasks in the order of `MAKERS`; `changes` replace whole sections."""
    content: dict[str, Any] = {
        "name": "texts",
        "backbone": f"hf:{model}",
        "pet": {"name": "lora", "at": ["q", "v", "fc1", "fc2"] if model.name == "gpt2" else ["q", "v"], "rank": 4},
        "head": {"name": "lm", "max_new_tokens": 12},
        "train": {"epochs": 2, "batch_size": 4, "lr": 0.02, "schedule": "constant"},
        "evaluate": {"batch_size": 4},
        "run": {"device": "cpu", "threads": 1},
    }
    if data is not None:
        content["data"] = {"name": "text", "path": str(data), "score": {"stories": "rouge_l"}}
        content["stream"] = {"order": list(MAKERS)}
    return {**content, **changes}


def learned(learner: Learner) -> dict[str, bytes]:
    return snapshot(learner.method)


def pet_values(learner: Learner) -> dict[str, torch.Tensor]:
    return {k: v.double() for k, v in tensors(learner.method)["pet.safetensors"].items()}


def state_metrics(folder: Path) -> list[Any]:
    return [json.loads(p.read_bytes()) for p in sorted((folder / "tasks").glob("*/metrics.json"))]


@pytest.fixture(scope="module")
def done(folders: dict[str, Path], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Learner:
    """Trained until it knows something; only read."""
    folder = tmp_path_factory.mktemp("done") / "state"
    train = {"epochs": 40, "batch_size": 4, "lr": 0.01, "order": "length"}
    pet = {"name": "lora", "at": ["q", "k", "v", "proj", "fc1", "fc2"], "rank": 8}
    learner = Learner(recipe(folders["llama"], data, train=train, pet=pet), folder)
    learner.run()
    return learner


# -- learned, scored, asked ---------------------------------------------------------------------------------


def test_three_tasks_are_learned_and_scored_in_their_own_ways(done: Learner) -> None:
    from perpetune.results import read_results

    results = read_results(done.state)
    assert [t["name"] for t in results["tasks"]] == list(MAKERS)
    assert [t["classes"] for t in results["tasks"]] == [["blue", "green", "red"], [], []]
    last = results["cells"][-1]
    assert [cell["score"] for cell in last] == ["exact_match", "exact_match", "rouge_l"]
    shares = [[cell["correct"] / cell["total"] if cell else None for cell in row] for row in results["cells"]]
    assert shares[0][0] > 0.5
    assert shares[1][1] > 0.3
    assert shares[2][2] > 0.1
    for index, timing in enumerate(results["timings"]):
        task = done.stream.tasks[index]
        task.check()
        assert timing["tokens"] == 40 * sum(task.train.lengths)
        assert timing["tokens_per_s"] > 0
        assert timing["images"] == 40 * 11
    metrics = results["metrics"]
    assert metrics["final_accuracy"] == pytest.approx(sum(shares[-1]) / 3)
    backward = sum(shares[2][i] - shares[i][i] for i in range(2)) / 2
    assert metrics["backward_transfer"] == pytest.approx(backward)


def test_loaded_again_it_answers_the_same(done: Learner) -> None:
    again = Learner.load(done.state.folder)
    prompts = ["grass 30 is", "7 capital of Italy?", [("user", "story 9")]]
    assert again.answer(prompts) == done.answer(prompts)
    assert again.answer(prompts, options=["blue", "Rome"]) == done.answer(prompts, options=["blue", "Rome"])
    assert again.evaluate() == done.evaluate() == state_metrics(done.state.folder)[-1]["cells"]


def test_companions_change_no_answer(done: Learner) -> None:
    prompts = ["grass 30 is", "blood", "a much longer question " * 4, "7 capital of Italy?"]
    together, options = done.answer(prompts), ["blue", "green", "the quick brown fox", "b"]
    assert [a.text for a in together] == [done.answer(p)[0].text for p in prompts]
    for answer, prompt in zip(done.answer(prompts, options=options), prompts, strict=True):
        (alone,) = done.answer(prompt, options=options)
        assert dict(answer.options) == pytest.approx(dict(alone.options), abs=1e-5)
        assert sum(dict(answer.options).values()) == pytest.approx(1)


def test_the_size_of_evaluated_batches_changes_no_score(done: Learner) -> None:
    found = done.evaluate()
    for size in (1, 3, 64):
        section = done.recipe.evaluate.model_copy(update={"batch_size": size})
        other = Learner.load(done.state.folder)
        other.recipe = done.recipe.model_copy(update={"evaluate": section})
        assert other.evaluate() == found


def test_training_data_are_evaluated_without_their_answers(done: Learner, data: Path) -> None:
    """What the model is asked is the question, wherever the example comes from."""
    (cell,) = done.evaluate(data / "capitals" / "train.jsonl").values()
    asked = [row["prompt"] for row in capitals(range(11))]
    right = [a.text == row["answer"] for a, row in zip(done.answer(asked), capitals(range(11)), strict=True)]
    assert cell is not None
    assert (cell["correct"], cell["total"]) == (sum(right), 11)


def test_prompts_in_every_form(done: Learner) -> None:
    told = {"role": "user", "content": "story 9"}
    (said,) = done.answer([[told]])
    assert said.prompt == (("user", "story 9"),)
    assert done.answer([(("user", "story 9"),)]) == [said]
    assert done.answer([]) == []
    for wrong, reason in (
        ([""], "prompt 1: the prompt is empty"),
        (["a", " \n"], "prompt 2: the prompt is empty"),
        ([told], "prompt 1: a prompt is dict; expected text, or a list of messages"),
        ([[{"role": "boss", "content": "x"}]], "prompt 1: message 1 has the role 'boss'"),
        ([[{"content": "x"}]], "prompt 1: message 1: the role holds nothing"),
        ([[]], "prompt 1: there is no message before the answer"),
        (["half \ud83d"], "prompt 1: the prompt holds half a character"),
    ):
        with pytest.raises(DataError, match=reason):
            done.answer(wrong)  # type: ignore[arg-type]
    for options in ([], [""], ["a", " a"]):
        with pytest.raises(UsageError, match="expected different texts"):
            done.answer("a", options=options)
    with pytest.raises(UsageError, match="takes texts, not pictures: call `answer`"):
        done.predict(["x.png"])
    (long,) = done.answer("x" * 500)
    assert long.cut == 500 - (128 - 12)


def test_options_are_chosen_among_where_the_recipe_generates(folders: dict[str, Path], data: Path) -> None:
    head = {"name": "lm", "eval": "generate", "max_new_tokens": 4}
    learner = Learner(recipe(folders["llama"], data, head=head, method="frozen", pet="none"))
    learner.run()
    assert {name for name, _ in learner.answer("grass 1 is", options=["x", "y"])[0].options} == {"x", "y"}


def test_what_is_generated_leaves_room_for_a_question(folders: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match=r"head\.max_new_tokens is 128, and .* takes 128 tokens"):
        Learner(recipe(folders["llama"], head={"name": "lm", "max_new_tokens": 128}))


# -- stopped, resumed, rolled back, updated -----------------------------------------------------------------


class At(Silent):
    """Does something at a step of the second task."""

    def __init__(self, step: int, act: Callable[[], None]):
        self.at, self.act, self.index = step, act, 0

    def task(self, index: int, name: str, classes: int, examples: int) -> None:
        self.index = index

    def step(self, done: int, epoch: int, loss: float | None, images: int) -> None:
        if self.index == 1 and done == self.at:
            self.act()


class Crash(Exception):
    """As if the process were gone."""


def crash() -> None:
    raise Crash


TRAIN = {"epochs": 2, "batch_size": 4, "lr": 0.02}
CHANGES: dict[str, dict[str, Any]] = {
    "protect": {"train": {**TRAIN, "order": "length", "accumulate": 2}, "protect": {"energy": 0.9}},
    "joint": {"train": {**TRAIN, "order": "length"}, "method": "joint"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_stop_inside_a_task_changes_no_bit(change: str, folders: dict[str, Path], data: Path, tmp_path: Path) -> None:
    content = recipe(folders["llama"], data, stream={"order": ["colors", "stories"]}, **CHANGES[change])
    content["run"] = {**content["run"], "checkpoint_every": 2}
    whole = Learner(content, tmp_path / "whole")
    whole.run()
    stops = {Interrupted: lambda: os.kill(os.getpid(), signal.SIGTERM), Crash: crash}
    for kind, act in list(stops.items())[:: -1 if change == "joint" else 1][:1]:
        folder = tmp_path / kind.__name__
        with pytest.raises(kind):
            Learner(content, folder, progress=At(3, act)).run()
        assert (folder / "resume").is_dir()
        later = Learner.load(folder)
        later.resume()
        assert learned(later) == learned(whole)
        assert state_metrics(folder) == state_metrics(tmp_path / "whole")


def test_rolled_back_and_updated(folders: dict[str, Path], tmp_path: Path) -> None:
    content = recipe(folders["llama"], protect={"energy": 0.9})
    learner = Learner(content, tmp_path / "state")
    with pytest.raises(StateError, match="has learned nothing yet"):
        learner.answer("hello")
    months = {name: write(tmp_path / f"{name}.jsonl", make(range(10))) for name, make in MAKERS.items()}
    for path in months.values():
        learner.learn(path)
    first = learned(learner)
    assert [c.name for c in learner.state.committed] == list(MAKERS)
    assert set(learner.evaluate()) == set(MAKERS)
    assert call(["rollback", str(tmp_path / "state"), "--to", "colors"]) == 0
    again = Learner.load(tmp_path / "state")
    for name in ("capitals", "stories"):
        again.learn(months[name])
    assert learned(again) == first


# -- joint, zero-shot ---------------------------------------------------------------------------------------


def test_the_union_of_texts_keeps_lengths_and_weights(folders: dict[str, Path], data: Path) -> None:
    learner = Learner(recipe(folders["llama"], data, method="joint"))
    tasks = [learner._tasks._of_stream(i) for i in range(3)]
    whole = union(tasks)
    assert whole.train.lengths == [n for t in tasks for n in t.train.lengths or ()]
    assert whole.train.weights == [n for t in tasks for n in t.train.weights]  # type: ignore[attr-defined]
    (batch,) = load_batches(whole.train, [[(0, None), (12, None), (32, None)]], learner.runtime)
    assert batch.inputs.labels is not None
    assert int((batch.inputs.labels != IGNORED).sum()) == whole.train.weight([0, 12, 32])
    results = learner.run()
    assert results["timings"][-1]["images"] == 2 * 33


def test_zero_shot_is_the_same_after_every_task(folders: dict[str, Path], data: Path) -> None:
    learner = Learner(recipe(folders["llama"], data, method="frozen", pet="none"))
    results = learner.run()
    for column in range(3):
        cells = [row[column] for row in results["cells"] if row[column] is not None]
        assert all(cell == cells[0] for cell in cells)
    assert results["trainable_parameters"] == 0
    assert results["backbone_parameters"] == sum(p.numel() for p in learner.backbone.net.parameters())  # tied ones once
    assert "tokens" not in results["timings"][0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pet": "none"}, "pet: none leaves nothing to train in a language model: use pet: lora, or method: frozen"),
        ({"pet": "none", "method": "joint"}, "pet: none leaves nothing to train"),
        ({"method": "safe"}, "method safe is for a head of classes: use head: ridge or another of classes"),
        ({"method": "first_session"}, "method first_session is for a head of classes: use head: ridge"),
        ({"head": "linear"}, "task capitals: head linear chooses among classes, and this task's answers are free text"),
        ({"head": "ridge"}, "task capitals: head ridge chooses among classes, .* or use head: lm"),
        (
            {"backbone": "perpetune:micro"},
            "perpetune:micro takes pictures, and this head is for texts: use `head: ridge`",
        ),
        ({"data": "digits"}, "these are pictures, but the backbone takes texts"),
        ({"stream": {"classes_per_task": 2}}, r"stream\.classes_per_task works with pictures only"),
        ({"stream": {"by": "class"}}, r"stream\.by: class works with pictures only"),
        ({"stream": {"augment": "flip"}}, r"stream\.augment: flip works with pictures only"),
        ({"stream": {"order": ["colours"]}}, r"stream\.order: 'colours' is not among the tasks"),
        ({"protect": True, "method": "joint"}, "joint keeps all data"),
        ({"protect": True, "method": "treelora"}, "start: nearest; protect: needs start: last"),
        ({"pet": "prompt"}, "pet: prompt adds tokens, but the tokens of a text have a fixed order"),
        ({"pet": "prefix"}, "pet: prefix adds tokens"),
        (
            {"method": {"name": "finetune", "head_first": 0.6}},
            "head_first is for a head of classes; leave it out with head: lm",
        ),
    ],
)
def test_what_does_not_go_together_is_said_in_one_line(
    change: dict[str, Any], reason: str, folders: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    content = {**recipe(folders["llama"], data), **change}
    with pytest.raises(UsageError, match=reason) as told:
        Learner(content, tmp_path / "state")
    assert "\n" not in str(told.value)
    assert not (tmp_path / "state").exists()


def test_float16_needs_a_scaled_loss(folders: dict[str, Path]) -> None:
    backbone = {"name": f"hf:{folders['llama']}", "dtype": "float16"}
    with pytest.raises(UsageError, match=r"add run.precision: fp16, or use dtype bfloat16"):
        Learner(recipe(folders["llama"], backbone=backbone))


# -- protection ---------------------------------------------------------------------------------------------


def short(words: str, answer: str) -> dict[str, str]:
    return {"prompt": words, "answer": answer}


@pytest.mark.parametrize("kind", chiefly(["llama", "gpt2"], ["gpt2"]))
def test_protected_tokens_keep_what_is_said_of_them(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Two short texts span few directions, and with all their energy protected nothing said of them changes."""
    old = write(tmp_path / "old.jsonl", [short("the fox", "lazy dog"), short("France", "Paris")])
    new = write(tmp_path / "new.jsonl", capitals(range(10)))
    moved = {}
    for protect in ({"energy": 1.0}, None):
        learner = Learner(recipe(folders[kind], protect=protect), tmp_path / f"{kind}-{protect is None}")
        learner.learn(old, holdout=0.0)
        view = learner.method.model.view
        assert isinstance(view, TextView)
        table = learner._tasks._tasks[0].train
        (batch,) = load_batches(table, [[(0, None), (1, None)]], learner.runtime)
        before = learner.method.features(batch.inputs)
        alone = [learner.method.loss(learner._tasks._tasks[0], b) for b in singles(learner)]  # type: ignore[attr-defined]
        results = learner.learn(new, holdout=0.0)
        after = learner.method.features(batch.inputs)
        later = [learner.method.loss(learner._tasks._tasks[0], b) for b in singles(learner)]  # type: ignore[attr-defined]
        change = torch.stack(later) - torch.stack(alone)
        moved[protect is None] = max(float((after - before).norm() / before.norm()), float(change.abs().max()))
        if protect is not None:
            first, second = results["protection"]
            assert first["room"] > 0.1
            assert second["worst"] < 1e-5
    assert moved[False] < 1e-4
    assert moved[True] > 100 * moved[False]


def singles(learner: Learner) -> list[Any]:
    """The training texts of the first task, each alone."""
    return list(load_batches(learner._tasks._tasks[0].train, [[(0, None)], [(1, None)]], learner.runtime))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_padding_is_not_protected(kind: str, folders: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """A text beside a long companion adds the moments that it adds alone."""
    long = {"prompt": "a much longer question than the others " * 2, "answer": "no"}
    path = write(tmp_path / "mixed.jsonl", [*capitals(range(5)), long])
    stored = []
    for size in (1, 6):
        content = recipe(folders[kind], protect={"energy": 0.9}, evaluate={"batch_size": size})
        learner = Learner(content, tmp_path / f"state{size}")
        results = learner.learn(path, holdout=0.0)
        stored.append(task_tensors(tmp_path / f"state{size}")["0000-mixed/protect.safetensors"])
        tokens = sum(learner._tasks._tasks[0].train.lengths)  # type: ignore[attr-defined]
        assert results["protection"][0]["rows"] == tokens
    alone, beside = stored
    assert alone.keys() == beside.keys()
    moments = [key for key in alone if key.endswith(".total")]  # Σ aᵀa over all tokens
    assert moments
    for key in moments:
        torch.testing.assert_close(beside[key], alone[key], rtol=1e-5, atol=1e-5 * float(alone[key].abs().max()))


# -- how batches are made -----------------------------------------------------------------------------------


def test_micro_batches_give_the_same_weights(folders: dict[str, Path], data: Path) -> None:
    """Answers of different lengths: each token of a step counts alike, wherever it is cut."""
    found = []
    for accumulate in (1, 4):
        train = {"epochs": 2, "batch_size": 6, "lr": 0.02, "accumulate": accumulate, "optimizer": "sgd"}
        learner = Learner(recipe(folders["llama"], data, train=train, stream={"order": ["stories", "capitals"]}))
        learner.run()
        found.append(pet_values(learner))
    for other in found[1:]:
        for name, value in found[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-6)
    assert any(float(v.abs().max()) > 1e-3 for name, v in found[0].items() if "up" in name)


def test_batches_by_length_pad_less_and_hold_every_example(folders: dict[str, Path], tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [short("word " * (n % 17 + 1), f"{n}") for n in range(50)])
    learner = Learner(recipe(folders["llama"], train={"epochs": 1, "batch_size": 4}))
    learner.learn(path, holdout=0.0)
    task = learner._tasks._tasks[0]
    sizes = task.train.lengths
    assert sizes is not None
    padded, orders = {}, []
    for order in ("random", "length"):
        config = FitConfig(batch_size=4, order=order)  # type: ignore[arg-type]
        rows = _order(task, config, task.generator("order", 0))
        assert sorted(rows) == list(range(50))
        assert rows == _order(task, config, task.generator("order", 0))
        cut = [[sizes[i] for i in rows[s : s + 4]] for s in range(0, 50, 4)]
        padded[order] = sum(max(part) * len(part) - sum(part) for part in cut)
        orders.append(_order(task, config, task.generator("order", 1)))
    assert padded["length"] < 0.3 * padded["random"]
    assert orders[1] != rows  # another epoch, other batches


def test_two_processes_are_one(warm: Warm, folders: dict[str, Path], data: Path, tmp_path: Path) -> None:
    content = recipe(folders["llama"], data, protect={"energy": 0.9}, stream={"order": ["colors", "stories"]})
    content["train"] = {**content["train"], "accumulate": 2, "order": "length", "batch_size": 5}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    run = ("run", tmp_path / "recipe.yaml", "--out", tmp_path / "two", "-q")
    launched = start_warm(warm, ["-m", "perpetune"], *run)
    Learner(content, tmp_path / "one").run()
    finish(launched)
    two, one = tensors_of(tmp_path / "two"), tensors_of(tmp_path / "one")
    assert two.keys() == one.keys()
    for name, value in one.items():
        found, wanted = two[name], value
        if name.endswith(".vectors"):  # a basis: the subspace counts
            found, wanted = found @ found.mT, wanted @ wanted.mT
        scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
        # Sums over all tokens are of large numbers, which add up in another order; what is learned is not.
        share = 1e-4 if "protect" in name else 1e-5
        torch.testing.assert_close(found, wanted, rtol=0, atol=share * scale, msg=name)
    cells = [[m["cells"] for m in state_metrics(tmp_path / folder)] for folder in ("one", "two")]
    assert cells[0] == cells[1]
    assert [[cell["total"] for cell in row.values()] for row in cells[0]] == [[5], [5, 5]]


@pytest.mark.parametrize("kind", chiefly(["llama", "gpt2"], ["llama"]))
def test_blocks_computed_again_train_to_the_same_bits(kind: str, folders: dict[str, Path], data: Path) -> None:
    found = []
    for again in (False, True):
        backbone = {"name": f"hf:{folders[kind]}", "gradient_checkpointing": again}
        stream = {"order": ["colors", "stories"]}
        learner = Learner(recipe(folders[kind], data, backbone=backbone, protect={"energy": 0.9}, stream=stream))
        learner.run()
        found.append(learned(learner))
    assert found[0] == found[1]


def test_half_precision_trains(folders: dict[str, Path], data: Path) -> None:
    backbone = {"name": f"hf:{folders['llama']}", "dtype": "bfloat16"}
    learner = Learner(recipe(folders["llama"], data, backbone=backbone, stream={"order": ["colors"]}))
    before = pet_values(learner)
    learner.run()
    after = pet_values(learner)
    assert all(bool(torch.isfinite(v).all()) for v in after.values())
    assert all(not torch.equal(before[k], v) for k, v in after.items())
    assert {v.dtype for v in tensors(learner.method)["pet.safetensors"].values()} == {torch.float32}


# -- the command line, and data that are bad ----------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder that has learned nothing yet; only read."""
    folder = tmp_path_factory.mktemp("begun") / "state"
    Learner(recipe(folders["llama"], train={"epochs": 1, "batch_size": 8}), folder)
    return folder


@pytest.fixture
def state(begun: Path, tmp_path: Path) -> Path:
    """A copy of `begun` to write to."""
    return Path(shutil.copytree(begun, tmp_path / "state"))


BAD = [
    (b"{not json", "not JSON"),
    (b"\xff\xfe", r"not UTF-8 text \(byte 0\)"),
    ([1], "holds list; expected an object of columns"),
    (short("a", " "), "the answer is empty"),
    (short(" ", "a"), "the prompt is empty"),
    (short("a", "y" * 200), r"the answer alone has 202 tokens, but prompt and answer together can have only 128"),
    ({"messages": [{"role": "user", "content": "a"}]}, "the last message is by 'user'"),
    ({"prompt": "a", "answer": True}, r"the answer \(column 'answer'\) holds bool"),
    ({"prompt": "a", "answer": "c", "options": ["a", "b"]}, "the answer 'c' is not among the options 'a', 'b'"),
    ({"prompt": "a", "answer": "a", "options": ["a", "a"]}, "the option 'a' stands twice"),
    ({"prompt": "a", "answer": "a", "options": ["a", ""]}, "an option is empty"),
    ({"prompt": "a", "answer": "a", "options": []}, "it has no options, but other examples of its task have"),
    ({"prompt": "a", "answer": "a"}, r"the options \(column 'options'\) hold nothing; expected a list"),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_a_bad_line_is_named_and_counted(
    row: Any, reason: str, state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = isinstance(row, dict) and ("options" in row or "'options'" in reason)
    path = write(tmp_path / "new.jsonl", [row, *(colors if chosen else capitals)(range(6))])
    assert call(["update", str(state), "--data", str(path), "--holdout", "0", "--json"]) == 0
    out, err = capsys.readouterr()
    results = written(out, "done")[0]["results"]
    (task,) = results["tasks"]
    assert task["train"] == 6
    (bad,) = results["bad_files"]
    assert f"{bad['file']}: {bad['reason']}".startswith(f"{path} line 1: ")
    assert re.search(reason, bad["reason"]), bad["reason"]
    assert any("1 examples cannot be used and are left out" in line for line in results["warnings"])
    assert err == ""


def test_keys_of_the_data_section_can_be_given_with_an_update(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"question": f"say {n}", "reply": "the lazy fox"} for n in range(8)]
    path = write(tmp_path / "new.jsonl", rows)
    keys = ["prompt_column=question", "answer_column=reply", "score=rouge_l"]
    update = ["update", str(state), "--data", str(path), *(word for key in keys for word in ("--set", key))]
    assert call(["export", str(state), str(tmp_path / "adapter")]) == 1
    assert "has learned nothing yet" in capsys.readouterr().err
    assert call([*update, "--set", "scores=f1"]) == 2
    assert "scores is not an option; closest: score" in capsys.readouterr().err
    assert call(update) == 0
    (cell,) = Learner.load(state).evaluate().values()
    assert cell is not None
    assert cell["score"] == "rouge_l"
    learner = Learner.load(state)
    with pytest.raises(UsageError, match="options need data that are a path or an id"):
        learner.learn({"name": "text", "path": str(path)}, options={"score": "f1"})


def test_more_than_max_bad_stop_it(state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "new.jsonl", [*colors(range(6)), *[b"{"] * 11])
    assert call(["update", str(state), "--data", str(path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "more than 10 examples are bad (stream.max_bad)" in line
    assert Learner.load(state).state.committed == []


@pytest.mark.parametrize(
    ("name", "rows", "code", "reason"),
    [
        ("empty.jsonl", [], 1, "empty.jsonl: no rows"),
        ("other.jsonl", [{"question": "a", "answer": "b"}], 1, "no column 'prompt' and no column 'messages'"),
        ("bad.jsonl", [b"{", short("", "x")], 1, "no training example can be used: .*line 1: not JSON"),
        ("words.txt", [b"hello"], 2, "words.txt"),
        ("mixed/a.parquet", [b"no"], 1, "a.parquet: not a readable parquet file"),
    ],
)
def test_a_file_that_holds_nothing_is_one_line(
    name: str, rows: Rows, code: int, reason: str, state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / name, rows)
    given = path.parent if "/" in name else path
    assert call(["update", str(state), "--data", str(given)]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(reason, line), line


def test_a_bad_first_line_does_not_make_texts_pictures(state: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "new.jsonl", [b"{oops", *capitals(range(6))])
    results = Learner.load(state).learn(path)
    assert [t["name"] for t in results["tasks"]] == ["new"]


def test_messages_without_a_template_are_one_line(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Learner(recipe(folders["plain"]), tmp_path / "state")
    path = write(tmp_path / "new.jsonl", stories(range(4)))
    assert call(["update", str(tmp_path / "state"), "--data", str(path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "no chat template" in line
    learner = Learner.load(tmp_path / "state")
    learner.learn(write(tmp_path / "plain.jsonl", capitals(range(6))))
    with pytest.raises(DataError, match="prompt 1: this model's tokenizer has no chat template"):
        learner.answer([[("user", "hi")]])


def test_long_prompts_are_counted(state: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "new.jsonl", [*capitals(range(6)), short("x" * 300, "y")])
    results = Learner.load(state).learn(path, holdout=0.0)
    (line,) = [w for w in results["warnings"] if "were cut" in w]
    assert "1 of 7 training prompts are longer than the model's 128 tokens and were cut on the left" in line


def test_options_in_texts_are_not_used_and_it_is_said(state: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "new.jsonl", [{**short(f"q {n}", "a"), "options": "a, b"} for n in range(4)])
    results = Learner.load(state).learn(path, holdout=0.0)
    assert any("the column 'options' has no lists and is not used" in w for w in results["warnings"])


def test_predict_on_the_command_line(
    done: Learner, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(done.state.folder)

    def said(*arguments: str, code: int = 0) -> tuple[str, str]:
        assert call(["predict", folder, *arguments]) == code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return out, err

    assert said("grass 30 is", "sky 3 is", "--options", "green, blue")[0].count("green 0.") == 2
    rows = write(tmp_path / "p.jsonl", [{"prompt": "sky 4 is"}, {"messages": [{"role": "user", "content": "hi"}]}])
    found = written(said(str(rows), "--json")[0], "answer")
    assert [entry["prompt"] for entry in found] == ["sky 4 is", [{"role": "user", "content": "hi"}]]
    assert found[0].keys() == {"event", "prompt", "answer"}
    named = write(
        tmp_path / "n.jsonl", [{"messages": [{"role": "user", "content": "hi", "name": "Eva"}]}, {"prompt": "a"}]
    )
    found, err = said(str(named), "--json")
    assert err == "perpetune: in 1 of 2 prompts the model's chat template leaves out the messages' name\n"
    assert [entry.get("left_out") for entry in written(found, "answer")] == [["the messages' name"], None]
    assert written(found)[0]["prompt"] == [{"role": "user", "content": "hi", "name": "Eva"}]
    (one,) = written(said("sky 4 is", "--options", "green,blue", "--json")[0], "answer")
    assert one["answer"] == max(one["options"], key=one["options"].get)
    out, err = said("x" * 400, "--json")
    assert written(out)[0]["cut"] == 400 - 116
    assert err == (
        "perpetune: 1 of 1 prompts, with room for an answer, are longer than the model's 128 tokens and were cut on "
        "the left (the longest by 284)\n"
    )
    for arguments, code, reason in (
        (["x", "--options", ","], 2, "expected different texts"),
        (["x", "--options", ""], 2, "expected different texts"),
        (["x", "--csv"], 2, "--csv works with images"),
        (["", "x"], 1, "prompt 1: the prompt is empty"),
        ([""], 1, "there is no prompt"),
        (["nowhere.jsonl"], 1, "nowhere.jsonl: no such file"),
        ([str(write(tmp_path / "b.jsonl", [{"prompt": "a"}, b"{"]))], 1, "line 2: not JSON"),
        ([str(tmp_path)], 1, "is a folder; "),
        (
            ["x", str(write(tmp_path / "b.csv", [b"prompt"]))],
            1,
            "b.csv: no rows",
        ),
    ):
        (line,) = said(*arguments, code=code)[1].splitlines()
        assert reason in line


def test_exported_it_says_the_same_in_peft(done: Learner, folders: dict[str, Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    assert call(["export", str(done.state.folder), str(tmp_path / "out")]) == 0
    net = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders["llama"]), tmp_path / "out")
    view = done.method.model.view
    assert isinstance(view, TextView)
    for prompt in ("grass 30 is", "1 capital of Italy?"):
        ids = torch.tensor([view.tokenizer(prompt)["input_ids"]])
        said = net.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert view.decode(said[0, ids.shape[1] :]).removeprefix(" ") == done.answer(prompt)[0].text


# -- a template that says the day ---------------------------------------------------------------------------

DATED = '{% if not day is defined %}{% set day = strftime_now("%d %b %Y") %}{% endif %}{{ day }}\n' + CHAT


def at(monkeypatch: pytest.MonkeyPatch, day: str) -> None:
    """It is `day`, for perpetune and for transformers."""
    from transformers.utils import chat_template_utils

    now = datetime.datetime.fromisoformat(day)

    class Day(datetime.date):
        @classmethod
        def today(cls) -> Day:
            return cls(now.year, now.month, now.day)

    class Moment(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Moment:
            return cls(now.year, now.month, now.day)

    monkeypatch.setattr("perpetune.learner.date", Day)
    monkeypatch.setattr(chat_template_utils, "datetime", Moment)


def asked(learner: Learner) -> str:
    view = learner.method.model.view
    assert isinstance(view, TextView)
    (question,) = view.ask([[{"role": "user", "content": "hi"}]])
    whole: str = view.tokenizer.decode(question.item.ids)
    return whole


def test_a_template_is_told_the_day_of_init(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copytree(folders["llama"], tmp_path / "dated"))
    (model / "chat_template.jinja").write_text(DATED)
    at(monkeypatch, "2026-02-01")
    first = Learner(recipe(model, train={"epochs": 1, "batch_size": 8}), tmp_path / "state")
    assert asked(first).startswith("01 Feb 2026\n<|user|>")
    assert first.state.backbone["date"] == "2026-02-01"
    at(monkeypatch, "2026-03-15")
    later = Learner.load(tmp_path / "state")
    assert asked(later).startswith("01 Feb 2026\n<|user|>")
    later.learn(write(tmp_path / "new.jsonl", stories(range(4))), holdout=0.0)
    content = json.loads((tmp_path / "state" / "backbone.json").read_bytes())
    content.pop("date")
    (tmp_path / "state" / "backbone.json").write_text(json.dumps(content))
    with pytest.raises(StateError, match='date is null, and was "2026-02-01" when task new was learned'):
        Learner.load(tmp_path / "state")
    task = later.state.committed[-1].folder  # as earlier versions wrote it
    files = task_files(task)
    shutil.rmtree(task)
    made_by = {key: value for key, value in json.loads(files["recipe.json"]).items() if key != "model"}
    write_folder(task, {**files, "recipe.json": to_json(made_by)})
    seal(tmp_path / "state")
    begun = later.state.journal()[0]["time"]
    old = datetime.datetime.fromisoformat(begun).strftime("%d %b %Y")
    assert asked(Learner.load(tmp_path / "state")).startswith(f"{old}\n<|user|>")
    for wrong, message in {
        7: "date: Input should be a valid string, got 7",
        "soon": "date is 'soon', and no day such as 2026-01-31",
    }.items():
        (tmp_path / "state" / "backbone.json").write_text(json.dumps({**content, "date": wrong}))
        with pytest.raises(StateError, match=message):
            Learner.load(tmp_path / "state")


@pytest.mark.parametrize(
    "way", ["strftime_now('%d %b %Y')", 'strftime_now( format = "%d %b %Y" )', "strftime_now ('%d %b %Y')|upper|title"]
)
@pytest.mark.parametrize("several", [False, True])
def test_every_way_to_ask_for_the_day(way: str, several: bool) -> None:
    tokenizer = tiny_tokenizer()
    template = f"{{% if strftime_now is defined %}}{{{{ {way} }}}}{{% endif %}}.\n{CHAT}"
    other = template.replace(".\n", "!\n", 1)
    tokenizer.chat_template = {"default": template, "tool_use": other} if several else template
    view = TextView(tokenizer, max_length=200)
    view.today = datetime.date(2020, 1, 31)
    told = ("user", "hi", '{"tools": [{"name": "f"}]}')
    for prompt, mark in (((("user", "hi"),), "."), ((told,), "!" if several else ".")):
        whole = tokenizer.decode(view.question(Text(prompt)).ids)
        assert whole.startswith(f"31 Jan 2020{mark}\n<|user|>")


def test_a_state_without_such_a_template_has_no_day(done: Learner) -> None:
    assert "date" not in done.state.backbone
    assert done.method.model.view.today is None

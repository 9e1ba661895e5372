"""A head of classes on a language model: questions are read without their answers, learned, scored, asked, exported."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_language_run import At, Crash, crash, learned, state_metrics, write
from tiny import chiefly, tiny_language_model, written
from torch.nn import functional as F

from perpetune.cli import call
from perpetune.data.texts.tables import Text
from perpetune.data.texts.view import TextView
from perpetune.errors import UsageError
from perpetune.heads import Ridge
from perpetune.learner import Learner
from perpetune.models.classifier import Classifier
from perpetune.results import read_results

COLORS = {"sky": "blue", "grass": "green", "blood": "red"}
MOODS = {"I like it": "good", "I hate it": "bad"}


def colors(numbers: Sequence[int]) -> list[dict[str, Any]]:
    asked = [(list(COLORS)[n % 3], n) for n in numbers]
    return [{"prompt": f"{x} {n} is", "answer": COLORS[x], "options": list(COLORS.values())} for x, n in asked]


def moods(numbers: Sequence[int]) -> list[dict[str, Any]]:
    asked = [(list(MOODS)[n % 2], n) for n in numbers]
    return [{"prompt": f"{n}: {x} much. It is", "answer": MOODS[x], "options": ["good", "bad"]} for x, n in asked]


def free(numbers: Sequence[int]) -> list[dict[str, Any]]:
    return [{"prompt": f"say {n}", "answer": f"the lazy fox {n}"} for n in numbers]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_language_model(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("texts")
    for name, make in (("colors", colors), ("moods", moods)):
        write(root / name / "train.jsonl", make(range(24)))
        write(root / name / "test.jsonl", make(range(40, 52)))
    return root


def recipe(model: Path, data: Path | None = None, **changes: Any) -> dict[str, Any]:
    content: dict[str, Any] = {
        "name": "texts",
        "backbone": f"hf:{model}",
        "pet": "none",
        "method": "frozen",
        "head": "ridge",
        "evaluate": {"batch_size": 5},
        "run": {"device": "cpu", "threads": 1},
    }
    if data is not None:
        content["data"] = {"name": "text", "path": str(data)}
    return {**content, **changes}


TUNED: dict[str, Any] = {
    "method": "finetune",
    "pet": {"name": "lora", "at": ["q", "v"], "rank": 4},
    "train": {"epochs": 4, "batch_size": 6, "lr": 0.02, "order": "length"},
}
KINDS: dict[str, dict[str, Any]] = {
    "frozen ridge": {},
    "frozen ncm": {"head": "ncm"},
    "linear": {**TUNED, "head": "linear"},
    "cosine": {**TUNED, "head": "cosine"},
    "linear alone": {**TUNED, "pet": "none", "head": "linear"},
    "protected ridge": {**TUNED, "protect": {"energy": 0.9}},
    "first session": {**TUNED, "method": "first_session"},
    "safe": {**TUNED, "method": "safe"},
    "treelora": {**TUNED, "method": "treelora", "head": "ncm"},
    "joint": {**TUNED, "method": "joint"},
}


def shares(results: dict[str, Any]) -> list[float]:
    return [cell["correct"] / cell["total"] for cell in results["cells"][-1]]


@pytest.fixture(scope="module")
def tapped(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Learner:
    """Frozen features behind both blocks, ridge; only read."""
    content = recipe(model, data, backbone={"name": f"hf:{model}", "taps": 2})
    learner = Learner(content, tmp_path_factory.mktemp("tapped") / "state")
    learner.run()
    return learner


@pytest.fixture(scope="module")
def tuned(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Learner:
    content = recipe(model, data, **KINDS["protected ridge"])
    learner = Learner(content, tmp_path_factory.mktemp("tuned") / "state")
    learner.run()
    return learner


# -- learned and scored -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", chiefly(KINDS, set(KINDS) - {"frozen ncm", "cosine", "linear alone"}))
def test_a_stream_of_text_tasks_is_learned(kind: str, model: Path, data: Path, tmp_path: Path) -> None:
    learner = Learner(recipe(model, data, **KINDS[kind]), tmp_path / "state")
    results = learner.run()
    assert [t["classes"] for t in results["tasks"]] == [["blue", "green", "red"], ["bad", "good"]]
    assert learner.method.classes == ["blue", "green", "red", "bad", "good"]
    assert results["cells"][-1][0]["total"] == 12
    assert set(results["cells"][-1][0]["per_class"]) == {"blue", "green", "red"}
    assert all("score" not in cell for cell in results["cells"][-1])
    again = Learner.load(tmp_path / "state")
    assert again.evaluate() == learner.evaluate() == state_metrics(tmp_path / "state")[-1]["cells"]
    assert again.answer(["sky 3 is", "9: I like it"]) == learner.answer(["sky 3 is", "9: I like it"])


def test_taps_are_wider_and_tell_what_the_words_say(tapped: Learner, model: Path, data: Path) -> None:
    results = read_results(tapped.state)
    assert tapped.backbone.dim == 2 * 2 * 32
    assert min(shares(results)) > 0.6
    bare = Learner(recipe(model, data))
    bare.run()
    assert isinstance(bare.method.model, Classifier)
    assert bare.method.model.head.dim == 32
    assert set(results["drift"][-1]["of"].values()) == {0.0}, "frozen features do not move"


def test_it_is_one_regression_on_the_features_of_the_questions(tapped: Learner) -> None:
    """From the questions alone, each read by itself; the control reads answers too."""
    head = tapped.method.model.head  # type: ignore[union-attr]
    assert isinstance(head, Ridge)
    view = tapped.method.model.view
    assert isinstance(view, TextView)
    rows, targets = [], []
    for make in (colors, moods):
        for row in make(range(24)):
            inputs = view.collate([(view.question(Text(row["prompt"])), 0, 0)]).inputs
            assert inputs.options is None
            with torch.no_grad():
                rows.append(tapped.backbone.features(inputs)[0].double())
            targets.append(head.classes.index(row["answer"]))
    z, y = torch.stack(rows), F.one_hot(torch.tensor(targets), 5).double()
    mean, deviation = z.mean(0), z.std(0, unbiased=False)
    x = F.pad((z - mean) / deviation, (0, 1), value=1.0)
    ridged = float(head.chosen) * torch.ones(x.shape[1], dtype=torch.float64)
    ridged[-1] = 0
    wanted = torch.linalg.solve(x.T @ x + ridged.diag(), x.T @ y)
    found = head(z.float()).double() / float(head.scale)
    torch.testing.assert_close(found, x @ wanted, atol=2e-4, rtol=1e-3)


def test_the_size_of_batches_changes_no_answer(tapped: Learner) -> None:
    prompts = ["sky 3 is", "a much longer question " * 3 + "grass", "9: I like it much. It is"]
    together = tapped.answer(prompts)
    for prompt, answer in zip(prompts, together, strict=True):
        (alone,) = tapped.answer(prompt)
        assert alone.text == answer.text
        assert dict(alone.options) == pytest.approx(dict(answer.options), abs=1e-4)


def test_the_benchmark_of_o_lora(model: Path, tmp_path: Path) -> None:
    from test_data_text import benchmark

    content = recipe(model, setting="task")
    content["data"] = {"name": "cl_benchmark", "path": str(benchmark(tmp_path / "CL"))}
    content["backbone"] = {"name": f"hf:{model}", "taps": 2}
    learner = Learner(content, tmp_path / "state")
    results = learner.run()
    assert learner.method.classes == ["Sports", "World", "Bad", "Good", "negative", "neutral", "positive"]
    assert [cell["total"] for cell in results["cells"][-1]] == [4, 4, 4]


def test_a_stop_inside_a_task_changes_no_bit(model: Path, data: Path, tmp_path: Path, tuned: Learner) -> None:
    content = recipe(model, data, **KINDS["protected ridge"])
    content["run"] = {**content["run"], "checkpoint_every": 2}
    with pytest.raises(Crash):
        Learner(content, tmp_path / "state", progress=At(3, crash)).run()
    later = Learner.load(tmp_path / "state")
    later.resume()
    assert learned(later) == learned(tuned)


# -- asked --------------------------------------------------------------------------------------------------


def test_answers_are_classes_with_probabilities(tapped: Learner) -> None:
    first, second = tapped.answer(["sky 30 is", (("user", "31: I hate it much. It is"),)])
    assert first.text == "blue"
    assert first.text == first.options[0][0]
    for answer in (first, second):
        names, values = zip(*answer.options, strict=True)
        assert sorted(names) == sorted(tapped.method.classes)
        assert sum(values) == pytest.approx(1)
        assert list(values) == sorted(values, reverse=True)
    (some,) = tapped.answer("sky 30 is", options=["green", "red"])
    assert {name for name, _ in some.options} == {"green", "red"}
    whole = dict(first.options)
    share = whole["green"] / (whole["green"] + whole["red"])
    assert dict(some.options)["green"] == pytest.approx(share, rel=1e-4)
    with pytest.raises(UsageError, match="options: 'gren' is not a learned class; closest: green") as caught:
        tapped.answer("sky", options=["gren"])
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="expected different texts"):
        tapped.answer("sky", options=[])
    with pytest.raises(UsageError, match="call `answer`"):
        tapped.predict(["x.png"])
    (long,) = tapped.answer("x" * 500)
    assert long.cut == 500 - 128, "no room is kept for an answer"


def test_a_class_that_had_no_example_is_never_likely(model: Path, tmp_path: Path) -> None:
    rows = [{**row, "options": ["good", "bad", "so so"]} for row in moods(range(10))]
    learner = Learner(recipe(model), tmp_path / "state")
    learner.learn(write(tmp_path / "m.jsonl", rows))
    (answer,) = learner.answer("3: I like it much. It is")
    assert dict(answer.options)["so so"] == 0
    (odd,) = learner.answer("3: I like it much. It is", options=["so so"])
    assert odd.options == [("so so", 0.0)]


def test_predict_on_the_command_line(tapped: Learner, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tapped.state.folder)

    def said(*arguments: str, code: int = 0) -> tuple[str, str]:
        assert call(["predict", folder, *arguments]) == code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return out, err

    (line,) = said("sky 30 is")[0].splitlines()
    assert line.startswith("blue  (blue 0.")
    assert line.count(", ") == 2, "three names by default"
    assert said("sky 30 is", "--top", "1")[0].count(",") == 0
    (entry,) = written(said("sky 30 is", "--json", "--top", "2")[0], "answer")
    assert entry["prompt"] == "sky 30 is"
    assert entry["answer"] == "blue"
    assert len(entry["options"]) == 2
    (entry,) = written(said("sky 30 is", "--json", "--options", "green,red")[0], "answer")
    assert set(entry["options"]) == {"green", "red"}
    assert "is not a learned class" in said("sky", "--options", "gren", code=2)[1]
    assert "--csv works with images" in said("sky", "--csv", code=2)[1]
    told = said("x" * 400)[1]
    assert told.startswith("perpetune: 1 of 1 prompts are longer than the model's 128 tokens and were cut on the left")


def test_evaluate_report_log_and_compare(
    tapped: Learner, tuned: Learner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for learner in (tapped, tuned):
        folder = str(learner.state.folder)
        assert call(["evaluate", folder]) == 0
        assert "colors" in capsys.readouterr().out
        assert call(["log", folder]) == 0
        assert "moods" in capsys.readouterr().out
        assert call(["report", folder]) == 0
        page = (learner.state.folder / "report.html").read_text()
        assert "moods" in page
        assert "accuracy" in page.lower()
        capsys.readouterr()
    assert call(["compare", str(tapped.state.folder), str(tuned.state.folder), "--out", str(tmp_path / "c")]) == 0
    capsys.readouterr()


def test_export(
    model: Path, tapped: Learner, tuned: Learner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file

    assert call(["export", str(tuned.state.folder), str(tmp_path / "out")]) == 0
    about = json.loads((tmp_path / "out" / "head.json").read_text())
    assert about == {
        "format": 2,
        "head": "Ridge",
        "classes": ["blue", "green", "red", "bad", "good"],
        "normalise": False,
        "library": "transformers",
        "base": str(model),
        "options": {"dtype": "float32"},
        "call": {},
        "adapter": True,
        "frozen_beside": False,
        "reads": "texts",
        "taps": 1,
        "tokens": [[0, None]],
        "modules": {},
        "chat": None,
        "opening": 0,
        "room": 128,
    }
    head = load_file(tmp_path / "out" / "head.safetensors")
    assert {name: tuple(t.shape) for name, t in head.items()} == {"weight": (5, 32), "bias": (5,)}
    capsys.readouterr()
    assert call(["export", str(tapped.state.folder), str(tmp_path / "none")]) == 0, "a head alone is exported too"
    assert json.loads((tmp_path / "none" / "head.json").read_text())["taps"] == 2


def test_export_says_where_features_are_read(model: Path, data: Path, tmp_path: Path) -> None:
    content = recipe(model, data, **TUNED, stream={"order": ["moods"]})
    content["backbone"] = {"name": f"hf:{model}", "taps": 2, "tokens": "mean"}
    content["train"] = {"epochs": 1, "batch_size": 8}
    learner = Learner(content, tmp_path / "state")
    learner.run()
    assert call(["export", str(tmp_path / "state"), str(tmp_path / "out")]) == 0
    about = json.loads((tmp_path / "out" / "head.json").read_text())
    assert (about["taps"], about["tokens"]) == (2, [[0, None]])
    assert about["modules"] == {"model.layers.0": True, "model.norm": False}


# -- updates, and what is no task of classes ----------------------------------------------------------------


def test_init_and_update(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "state")
    assert call(["init", folder, "--recipe", "update", "--model", f"hf:{model}"]) == 0
    for name, make in (("colors", colors), ("moods", moods)):
        path = write(tmp_path / f"{name}.jsonl", make(range(20)))
        assert call(["update", folder, "--data", str(path), "-q"]) == 0
    # options can be given, where the rows have none
    bare = [{k: v for k, v in row.items() if k != "options"} for row in colors(range(12))]
    path = write(tmp_path / "bare.jsonl", bare)
    capsys.readouterr()
    assert call(["update", folder, "--data", str(path), "-q"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "task bare: head ridge chooses among classes, and this task's answers are free text" in line
    assert "give `options`" in line
    assert "use head: lm" in line
    assert [c.name for c in Learner.load(folder).state.committed] == ["colors", "moods"]
    assert [e for e in Learner.load(folder).state.journal() if e.get("name") == "bare"] == []
    assert call(["update", folder, "--data", str(path), "--set", "options=[blue,green,red]", "-q"]) == 0
    learner = Learner.load(folder)
    assert learner.method.classes == ["blue", "green", "red", "bad", "good"]
    assert call(["predict", folder, "grass 3 is"]) == 0


@pytest.mark.parametrize("kind", ["free", "mixed"])
def test_free_texts_are_told_before_anything_is_learned(kind: str, model: Path, tmp_path: Path) -> None:
    """Also where the task is not the first."""
    write(tmp_path / "data" / "a" / "train.jsonl", colors(range(9)))
    rows = free(range(9))
    if kind == "mixed":
        rows = [{**row, "options": [row["answer"], f"not {n}"]} for n, row in enumerate(rows)]
    write(tmp_path / "data" / "b" / "train.jsonl", rows)
    with pytest.raises(UsageError, match="task b: head ridge chooses among classes, and this task's answers are") as e:
        Learner(recipe(model, tmp_path / "data"), tmp_path / "state")
    assert "\n" not in str(e.value)
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"head": "linear"}, "frozen trains nothing, so head linear would stay random"),
        ({"method": "safe", "head": "lm", "pet": "lora"}, "method safe is for a head of classes: use head: ridge"),
        ({"method": "olora", "pet": "lora"}, None),
        (
            {"pet": "prompt", "method": "finetune"},
            "pet: prompt adds tokens, but the tokens of a text have a fixed order",
        ),
    ],
)
def test_what_goes_together(change: dict[str, Any], reason: str | None, model: Path, data: Path) -> None:
    if reason is None:
        content = recipe(model, data, **{**change, "train": {"epochs": 1, "batch_size": 8}})
        assert shares(Learner(content).run())
        return
    with pytest.raises(UsageError, match=reason) as caught:
        Learner(recipe(model, data, **change))
    assert "\n" not in str(caught.value)

"""The recipes of issue 5, TreeLoRA on pictures and on texts and what it is measured beside; and `extends`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_recipes import learned, sets
from tiny import chiefly, split_folder, tiny_language_model

from perpetune.data.texts.cl_benchmark import INSTRUCTIONS
from perpetune.data.texts.trace import ORDER, SCORES
from perpetune.errors import UsageError
from perpetune.learner import Learner
from perpetune.recipe import load_recipe, make_recipe, packaged, parse_recipe

METHODS = {"seqlora": "finetune", "olora": "olora", "treelora": "treelora", "pegp-lora": "finetune"}
ORDERS = {  # the orders of tasks in the papers of O-LoRA and TreeLoRA
    1: "dbpedia amazon yahoo agnews",
    2: "dbpedia amazon agnews yahoo",
    3: "yahoo amazon agnews dbpedia",
    4: "MNLI CB WiC COPA QQP BoolQA RTE IMDB yelp amazon SST-2 dbpedia agnews MultiRC yahoo",
    5: "MultiRC BoolQA WiC MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yelp amazon yahoo",
    6: "yelp amazon MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yahoo MultiRC BoolQA WiC",
}
GROUPS = {"SC": "yelp amazon IMDB SST-2", "TC": "dbpedia yahoo agnews", "NLI": "MNLI CB RTE"}  # the others: their own
BENCHMARKS = ["trace", *(f"order{n}" for n in ORDERS)]
LANGUAGE = [f"{kind}-lm-{benchmark}" for kind in METHODS for benchmark in BENCHMARKS]
VISION = {"treelora-cifar100": (20, 10), "treelora-imagenet-r": (50, 20), "treelora-cub200": (50, 20)}
SOURCE = re.compile(r"\[(paper|code|T|O|H|ours)\]")
# Figures of TreeLoRA's tables 3 and 10: overall performance / forgetting.
PUBLISHED: dict[str, Sequence[str]] = {
    "trace": ("29.73 / 17.03", "32.94 / 12.89", "36.14 / 7.36"),
    "order1": ("55.71 / 8.63", "59.50 / 2.51", "59.73 / 2.22"),
    "order2": ("45.26 / 7.70", "52.53 / 5.65", "53.78 / 5.74"),
    "order3": ("49.03 / 19.05", "63.82 / 2.03", "62.76 / 2.23"),
    "order4": ("", "59.89 / 4.67", "58.45 / 4.98"),
    "order5": ("", "57.05 / 4.42", "58.12 / 3.31"),
    "order6": ("", "58.02 / 4.73", "59.00 / 4.12"),
}


def text_of(name: str) -> str:
    return packaged()[name].read_text(encoding="utf-8")


def test_there_is_one_for_every_method_and_benchmark() -> None:
    mine = [n for n in packaged() if "-lm-" in n or n.startswith("treelora-")]
    assert sorted(mine) == sorted([*LANGUAGE, *VISION])


@pytest.mark.parametrize("name", LANGUAGE)
def test_it_trains_as_long_as_the_others_and_says_what_the_papers_say(name: str) -> None:
    kind, _, benchmark = name.partition("-lm-")
    recipe, base = load_recipe(name), load_recipe(f"seqlora-lm-{benchmark}")
    own = {"name", "description", "method", "protect"}
    assert recipe.model_dump(exclude=own) == base.model_dump(exclude=own)
    assert recipe.method.name == METHODS[kind]
    assert (recipe.protect is not None) == (kind == "pegp-lora")
    assert recipe.backbone.name == "hf:meta-llama/Llama-3.2-1B-Instruct"
    assert recipe.pet is not None
    assert (recipe.pet.name, recipe.pet.at, recipe.pet.blocks) == ("lora", ["q", "v"], None)
    assert {k: recipe.pet.options[k] for k in ("rank", "alpha", "dropout")} == {"rank": 8, "alpha": 32, "dropout": 0.1}
    train = recipe.train
    assert (train.batch_size, train.accumulate, train.lr, train.betas) == (32, 8, 1e-4, (0.9, 0.95))
    assert (train.optimizer, train.weight_decay, train.schedule, train.clip) == ("adamw", 0, "constant", 1)
    assert train.epochs == ([5, 3, 7, 5, 3, 5, 5, 7] if benchmark == "trace" else 1)
    assert recipe.data is not None
    assert recipe.head.options["eval"] == "generate"
    assert recipe.backbone.options["max_length"] == (1024 + 512 if benchmark == "trace" else 512 + 50)
    if benchmark == "trace":
        assert (recipe.data.name, recipe.data.options["tasks"]) == ("trace", None)  # the reader knows the order
        assert isinstance(train.epochs, list)
        assert len(train.epochs) == len(ORDER)
    else:
        tasks = recipe.data.options["tasks"]
        assert (recipe.data.name, tasks) == ("cl_benchmark", ORDERS[int(benchmark[-1])].split())
        known = {*INSTRUCTIONS, *(recipe.data.options["instructions"] or {})}
        assert {group_of(task) for task in tasks} <= known
    options = recipe.method_options()
    if kind == "treelora":
        assert (options["regularise"], options["answer"]) == (0.5, "routed")
    if kind == "olora" and benchmark in ("trace", "order1", "order2", "order3"):
        assert (options["orthogonality"], options["shrink"]) == (0.5, 0)
    elif kind == "olora":
        assert options["orthogonality"] == [0, *[0.5] * 8, 5]
        assert options["shrink"] == ([0, 0, 0, 0, 0.1, 0.1, 0.3, 0, 0.1, 0, 0, 0.1, 0, 0.1, 0.3] if "6" in name else 0)


@pytest.mark.parametrize("name", VISION)
def test_it_is_treelora_for_pictures(name: str) -> None:
    recipe, (epochs, classes) = load_recipe(name), VISION[name]
    assert recipe.pet is not None
    assert recipe.data is not None
    assert (recipe.method.name, recipe.head.name, recipe.pet.name) == ("treelora", "linear", "lora")
    assert (recipe.pet.at, recipe.pet.blocks) == (["k", "v"], [0, 1, 2, 3, 4])
    assert (recipe.pet.options["rank"], recipe.pet.options["alpha"]) == (10, 1)
    train, options = recipe.train, recipe.method_options()
    assert (train.epochs, train.batch_size, train.lr, train.schedule) == (epochs, 192, 5e-3, "constant")
    assert (options["regularise"], options["mask"], recipe.stream.classes_per_task) == (0.1, "task", classes)
    source = {
        "treelora-cifar100": "pegp-lora-cifar100-10",
        "treelora-imagenet-r": "pegp-lora-imagenet-r-10",
        "treelora-cub200": "safe-cub200",
    }[name]
    assert recipe.data == load_recipe(source).data
    assert recipe.stream.holdout == load_recipe(source).stream.holdout


@pytest.mark.parametrize("name", [*LANGUAGE, *VISION])
def test_each_number_has_its_source_beside_it(name: str) -> None:
    text = text_of(name)
    section = ""
    for line in text.splitlines():
        if re.match(r"\w+:", line):
            section = line.partition(":")[0]
        value, _, comment = line.strip().partition(": ")[2].partition("  # ")
        numbers = re.match(r"[{\[]?-?\d", value) or (section == "evaluate" and value)
        if section not in ("name", "description", "run", "") and numbers:
            assert SOURCE.search(comment), line
    kind, _, benchmark = name.partition("-lm-")
    place = list(METHODS).index(kind) if benchmark else 0
    wanted = PUBLISHED[benchmark][place] if benchmark and place < 3 else ""
    head = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    figures = re.findall(r"\d\d\.\d\d / \d+\.\d\d", head)
    if benchmark:
        assert figures == ([wanted] if wanted else [])
    assert ("Not reproduced here." in head) == bool(figures)
    assert bool(re.search(r"Table (1|3|10)\)|Table 3, ", head)) == bool(figures)
    extends = re.search(r"^extends: (\S+)$", text, re.M)
    assert extends is not None or "# Sources: [paper]" in text


@pytest.mark.parametrize("name", [*LANGUAGE, *VISION])
def test_what_its_comments_suggest_can_be_set(name: str) -> None:
    for line in re.findall(r"^#.*--set .*$", text_of(name), re.M):
        changes = [change.rstrip(",.").replace("hf:ID", "hf:google/gemma-2b-it") for change in sets(line)]
        if "data.score=" not in line:
            load_recipe(name, changes)
    scores = "data.score={C-STANCE: prefix, FOMC: prefix, NumGLUE-cm: prefix, NumGLUE-ds: prefix}"
    if name == "seqlora-lm-trace":
        assert f"'{scores.partition('=')[2]}'" in text_of(name)
        assert load_recipe(name, [scores]).data is not None


# -- miniatures ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_language_model(tmp_path_factory.mktemp("lm"))


def group_of(task: str) -> str:
    return next((group for group, tasks in GROUPS.items() if task in tasks.split()), task)


def cl_benchmark(root: Path, tasks: Sequence[str]) -> Path:
    """Four training and two test examples of each task, in the benchmark's layout."""
    for number, task in enumerate(tasks):
        folder = root / group_of(task) / task
        folder.mkdir(parents=True)
        labels = ["no", "yes"] if number % 2 else ["bad", "good"]
        (folder / "labels.json").write_text(json.dumps(labels))
        for split, count in (("train", 4), ("test", 2)):
            rows = [{"sentence": f"{task} {split} {i}", "label": labels[i % 2]} for i in range(count)]
            (folder / f"{split}.json").write_text(json.dumps(rows))
    return root


def trace(root: Path, tasks: Sequence[str]) -> Path:
    for task in tasks:
        (root / task).mkdir(parents=True)
        for split, count in (("train", 4), ("eval", 1), ("test", 2)):
            rows = [{"prompt": f"{task} {split} {i}?", "answer": f"{'AB'[i % 2]}, so"} for i in range(count)]
            (root / task / f"{split}.json").write_text(json.dumps(rows))
    return root


def small(name: str, model: Path, data: Path, *changes: str) -> Learner:
    """The recipe with the tiny model on other data, a few tokens and one epoch."""
    return Learner(
        load_recipe(
            name,
            [
                f"backbone.name=hf:{model}",
                "backbone.dtype=float32",
                "backbone.max_length=128",
                "head.max_new_tokens=2",
                f"data.path={data}",
                "train.epochs=1",
                "train.batch_size=4",
                "train.accumulate=2",
                "run.device=cpu",
                *changes,
            ],
        )
    )


def check(kind: str, results: Mapping[str, Any], tasks: Sequence[str]) -> None:
    assert [task["name"] for task in results["tasks"]] == list(tasks)
    assert results["complete"]
    cells = results["cells"][-1]
    assert len(cells) == len(tasks)
    assert all(cells)
    if kind == "treelora":
        assert all(set(cell["others"]) == {"last", "merged"} for cell in cells)
    if kind == "pegp-lora":
        assert results["protection"]


@pytest.mark.parametrize("kind", chiefly(METHODS, ["olora", "pegp-lora"]))
def test_a_miniature_of_an_order_runs(kind: str, model: Path, tmp_path: Path) -> None:
    tasks = ORDERS[3].split()[:3]
    data = cl_benchmark(tmp_path / "data", tasks)
    learner = small(f"{kind}-lm-order3", model, data, f"data.tasks=[{', '.join(tasks)}]")
    check(kind, learner.run(), tasks)


def test_a_state_for_texts_is_fed_month_by_month(model: Path, tmp_path: Path) -> None:
    learner = small("update-lm", model, tmp_path, "data=null", "head.max_new_tokens=4")
    for month in ("2026-10", "2026-11"):
        rows = [{"prompt": f"{month}: what is {i}?", "answer": str(i)} for i in range(8)]
        path = tmp_path / f"{month}.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        results = learner.learn(str(path))
    assert [task["name"] for task in results["tasks"]] == ["2026-10", "2026-11"]
    assert [c["consolidated"] for c in results["protection"]] == [0, 1]
    assert learner.answer("good or bad?", options=["good", "bad"])[0].text in ("good", "bad")


@pytest.mark.parametrize("kind", chiefly(METHODS, ["seqlora", "treelora"]))
def test_a_miniature_of_trace_runs(kind: str, model: Path, tmp_path: Path) -> None:
    tasks = ("C-STANCE", "MeetingBank", "20Minuten")
    results = small(f"{kind}-lm-trace", model, trace(tmp_path / "data", tasks)).run()
    check(kind, results, tasks)
    assert [cell["score"] for cell in results["cells"][-1]] == [SCORES[task] for task in tasks]


def test_all_fifteen_tasks_of_the_long_orders_are_read(model: Path, tmp_path: Path) -> None:
    data = cl_benchmark(tmp_path / "data", ORDERS[4].split())
    stream = small("seqlora-lm-order5", model, data).stream
    assert [task.name for task in stream.tasks] == ORDERS[5].split()


def test_a_miniature_of_treelora_for_pictures_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {"name": "folder", "path": str(split_folder(tmp_path / "data", ["a", "b", "c", "d"], 6, 2))}
    few, stream = {"epochs": 1, "batch_size": 4}, {"classes_per_task": 2}
    recipe = load_recipe("treelora-cub200")
    results = learned(recipe, tmp_path / "state", monkeypatch, data=data, train=few, stream=stream)
    assert sorted(c for task in results["tasks"] for c in task["classes"]) == ["a", "b", "c", "d"]


# -- extends ------------------------------------------------------------------------------------------


def written(path: Path, content: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(content)), encoding="utf-8")
    return path


def test_a_recipe_on_top_of_another_is_the_whole_written_out(tmp_path: Path) -> None:
    written(tmp_path / "base.yaml", {"extends": "demo", "train": {"epochs": 9, "lr": 0.5}, "seed": 4})
    top = written(tmp_path / "top.yaml", {"extends": "base.yaml", "name": "top", "train": {"lr": 0.25}})
    demo, recipe = load_recipe("demo"), load_recipe(top)
    assert (recipe.name, recipe.seed, recipe.train.epochs, recipe.train.lr) == ("top", 4, 9, 0.25)
    assert recipe.train.batch_size == demo.train.batch_size
    assert (recipe.data, recipe.stream, recipe.backbone) == (demo.data, demo.stream, demo.backbone)
    assert "extends" not in recipe.to_yaml()
    assert parse_recipe(recipe.to_yaml(), "shown") == recipe
    assert load_recipe(top, ["train.epochs=1"]).train.epochs == 1
    assert make_recipe({"extends": str(top), "seed": 5}).train == recipe.train


def test_options_belong_to_what_they_are_of(tmp_path: Path) -> None:
    base = {"pet": {"name": "lora", "rank": 3, "alpha": 5}, "head": "ncm", "method": "finetune", "protect": {}}
    written(tmp_path / "base.yaml", base)

    def on_top(**own: Any) -> Any:
        return load_recipe(written(tmp_path / "top.yaml", {"extends": "base.yaml", **own}))

    assert on_top(pet={"alpha": 7}).pet.options["rank"] == 3
    assert on_top(pet="lora").pet.options["rank"] == 3
    assert on_top(pet={"name": "adapter", "width": 4}).pet.options["width"] == 4
    assert on_top(pet="none", protect=None).pet is None
    assert on_top(method={"mask": "seen"}).method.options["mask"] == "seen"
    assert on_top(head={"name": "ridge", "projection": 9}).head.options["projection"] == 9
    assert on_top(protect={"energy": 0.5}).protect.energy == 0.5
    assert on_top(protect=None).protect is None
    assert on_top(backbone={"image_size": 32, "name": "timm:x"}).backbone.options["image_size"] == 32


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"extends": "nothing.yaml"}, "cannot read the recipe "),
        ({"extends": "dmo"}, "there is no recipe 'dmo'; "),
        ({"extends": ["demo"]}, r"extends is \['demo'\]; the name or the file of a recipe is expected"),
        ({"extends": None}, "extends is None; the name or the file"),
        ({"extends": "top.yaml"}, "extends 'top.yaml', which extends this one in turn"),
        ({"extends": "round.yaml"}, r"recipe round.yaml: extends 'top.yaml', which .* in turn \(recipe .*top.yaml"),
        ({"extends": "bad.yaml"}, r"recipe bad.yaml, line 1: not YAML: .* \(recipe .*top.yaml extends it\)"),
        ({"extends": "demo", "trian": {}}, "trian"),
    ],
)
def test_what_is_wrong_with_extends_is_one_line(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    written(tmp_path / "round.yaml", {"extends": "top.yaml"})
    (tmp_path / "bad.yaml").write_text("{", encoding="utf-8")
    with pytest.raises(UsageError, match=said) as raised:
        load_recipe(written(tmp_path / "top.yaml", given))
    assert "\n" not in str(raised.value)

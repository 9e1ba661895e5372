"""The recipes for CoIN, and those of the benchmark on a real pair: they differ only in the method, and they run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tiny import chiefly, picture, tiny_vision_language

from perpetune.learner import Learner
from perpetune.recipe import load_recipe, packaged

COIN = ("coin-finetune", "coin-pgp", "coin-average-fixed", "coin-average-published", "coin-olora", "coin-treelora")
BENCHMARK = Path(__file__).parents[1] / "benchmarks/recipes"
SOURCE = re.compile(r"\[(paper|code|page|ours)\]")
PUBLISHED = {"coin-finetune": "28.74 / 37.29", "coin-pgp": "55.77 / 12.94", "coin-average-published": "64.64 / 1.93"}
OWN = {"name", "description", "method", "protect", "average"}


def test_the_recipes_of_coin_differ_in_the_method_alone() -> None:
    assert sorted(name for name in packaged() if name.startswith("coin-")) == sorted(COIN)
    base = load_recipe("coin-finetune")
    for name in COIN:
        recipe = load_recipe(name)
        assert recipe.model_dump(exclude=OWN) == base.model_dump(exclude=OWN)
        kind = name.removeprefix("coin-") if name in ("coin-olora", "coin-treelora") else "finetune"
        assert recipe.method.name == kind
        assert (recipe.protect is not None, recipe.average is not None) == (name == "coin-pgp", "average" in name)
    assert base.train.epochs == 1
    assert base.pet is not None
    assert (base.pet.options["rank"], base.pet.options["alpha"]) == (128, 256)
    assert (base.train.lr, base.train.head_lr, base.train.warmup) == (2e-4, 2e-5, 0.03)
    fixed, published = (load_recipe(f"coin-average-{name}").average for name in ("fixed", "published"))
    assert fixed is not None
    assert published is not None
    assert (fixed.keep, fixed.weight, published.keep, published.weight) == (0.5, None, None, "dynamic")


@pytest.mark.parametrize("name", COIN)
def test_each_number_has_its_source_beside_it(name: str) -> None:
    text, section = packaged()[name].read_text(encoding="utf-8"), ""
    for line in text.splitlines():
        if re.match(r"\w+:", line):
            section = line.partition(":")[0]
        value, _, comment = line.strip().partition(": ")[2].partition("  # ")
        if section not in ("name", "description", "") and re.match(r"[{\[]?-?\d", value):
            assert SOURCE.search(comment), line
    head = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    assert re.findall(r"\d\d\.\d\d / \d+\.\d\d", head) == [PUBLISHED[n] for n in PUBLISHED if n == name]
    assert ("Not reproduced here." in head) == (name in PUBLISHED)


@pytest.mark.parametrize(
    "name",
    chiefly(COIN, ["coin-pgp", "coin-average-published", "coin-treelora"]),
)
def test_a_miniature_of_coin_runs(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "CoIN"
    (tmp_path / "cl_dataset").mkdir()
    for kind in "ab":
        picture(kind, 0).save(tmp_path / "cl_dataset" / f"{kind}.png")
    for task, answer in (("VizWiz", "a book"), ("Grounding", "[0.1,0.2,0.5,0.6]"), ("GQA", "yes")):
        said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": answer}]
        train = [{"id": str(i), "image": f"{'ab'[i % 2]}.png", "conversations": said} for i in range(4)]
        asked = [{"question_id": 3, "image": "b.png", "text": "Which?", "answer": answer}]
        (folder / task).mkdir(parents=True)
        (folder / task / "train.json").write_text(json.dumps(train))
        (folder / task / "test.json").write_text(json.dumps(asked))
    model = tiny_vision_language(tmp_path / "model", "llava-clip")
    changes = [f"backbone.name=hf:{model}", "backbone.dtype=float32", "backbone.max_length=128", "pet.rank=2"]
    changes += [f"data.path={folder}", "train.batch_size=4", "train.accumulate=2", "head.max_new_tokens=4"]
    results = Learner(load_recipe(name, [*changes, "run.device=cpu"]), tmp_path / "state").run()
    assert [task["name"] for task in results["tasks"]] == ["GQA", "VizWiz", "Grounding"]
    assert [cell["score"] for cell in results["cells"][-1] if cell] == ["exact_match", "exact_match", "box"]
    assert bool(results.get("protection")) == (name == "coin-pgp")


def test_the_recipes_of_the_benchmark_train_for_as_long() -> None:
    base = load_recipe(str(BENCHMARK / "vlm5-finetune.yaml"))
    for name in ("protect", "average", "olora", "treelora", "joint"):
        recipe = load_recipe(str(BENCHMARK / f"vlm5-{name}.yaml"))
        own = OWN | ({"train"} if name == "joint" else set())
        assert recipe.model_dump(exclude=own) == base.model_dump(exclude=own)
        if name == "joint":  # trains once, on all tasks
            assert recipe.train.epochs == [0, 0, 0, 0, base.train.epochs]

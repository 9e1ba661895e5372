"""The recipes of dual encoders (CLIP-PGP, PEGP-CLIP, S-liPrompts, the analytic expert, updates): what they say, and
that they learn."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_recipes import changed, sets
from tiny import commented, dual_folder, every, picture_folder, split_folder

from perpetune.build import build_method, load_backbone
from perpetune.learner import Learner
from perpetune.methods.base import Method
from perpetune.pets import parameters, pets
from perpetune.pets import sets as sets_of
from perpetune.pets.context import Context
from perpetune.recipe import Recipe, load_recipe, packaged
from perpetune.tasks import Task

STREAMS = ("cifar100", "imagenet-r", "domainnet", "core50", "mtil-1", "mtil-2", "xtail")
PROTECTED = ("pgp", "pegp-prompt", "pegp-linear", "pegp-lora", "pegp-prefix")
KINDS = (*PROTECTED, "sliprompts", "rail")
PAPER = "clip-pgp-cifar100-paper"
NAMES = [*(f"clip-{kind}-{stream}" for kind in KINDS for stream in STREAMS), PAPER]
UPDATES = ["update-text", "update-text-lora"]
MTIL = "aircraft caltech101 cifar100 dtd eurosat flowers food mnist oxford_pets stanford_cars sun397".split()
TAGS = re.compile(r"\[(paper|code|ours)\]|RAIL")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dual_folder(tmp_path_factory.mktemp("dual"), blocks=5)


def built(recipe: Recipe, folder: Path) -> Method:
    return build_method(small(recipe), load_backbone(f"folder:{folder}"))


def small(recipe: Recipe, **sections: Any) -> Recipe:
    """The recipe with a small projection."""
    head = {**recipe.head.options}
    if head.get("expert"):
        head["expert"] = {**head["expert"], "projection": 50}
    return changed(recipe, head={"name": recipe.head.name, **head}, **sections)


def parts(name: str) -> tuple[str, str]:
    """The method and the stream in the name of a recipe."""
    stream = next(s for s in STREAMS if name.removesuffix("-paper").endswith(s))
    return name.removeprefix("clip-").partition(f"-{stream}")[0], stream


def test_there_is_one_for_every_method_and_stream() -> None:
    assert sorted(n for n in packaged() if n.startswith("clip-")) == sorted(NAMES)
    assert {f"sprompts-{stream}" for stream in STREAMS} <= packaged().keys()  # S-iPrompts, test_recipes_pools.py


@pytest.mark.parametrize("name", [*every(NAMES, 3), *UPDATES])
def test_it_fits_a_tiny_clip_and_protects_every_parameter(name: str, folder: Path) -> None:
    recipe = load_recipe(name)
    method = built(recipe, folder)
    assert (method.protection is not None) == (recipe.protect is not None)
    if method.protection is not None:
        assert not method.protection.still
    assert recipe.head.name == "text"
    assert recipe.backbone.name.startswith("openclip:ViT-B-16.")


@pytest.mark.parametrize("name", every(NAMES, 3))
def test_it_is_the_method_and_the_stream_that_its_name_says(name: str, folder: Path) -> None:
    recipe, (kind, stream) = load_recipe(name), parts(name)
    by_class = stream in ("cifar100", "imagenet-r")
    setting = {"mtil-1": "task", "mtil-2": "task", "xtail": "class"}.get(stream, "class" if by_class else "domain")
    assert (recipe.setting, recipe.stream.by) == (setting, "class" if by_class else "domain")
    assert recipe.evaluate.future == (stream in ("mtil-1", "mtil-2", "xtail"))
    wanted = {"cifar100": 10, "imagenet-r": 20}.get(stream)
    assert recipe.stream.classes_per_task == wanted
    assert recipe.stream.train_per_class == (16 if stream == "xtail" else None)
    if stream == "mtil-1":
        assert recipe.stream.order == sorted(MTIL) == MTIL
    if stream == "xtail":
        assert recipe.stream.order == [one for one in MTIL if one != "cifar100"]
    if stream == "mtil-2":
        order = recipe.stream.order
        assert isinstance(order, list)
        assert (sorted(order), order[0], order[-1]) == (MTIL, "stanford_cars", "cifar100")
    assert recipe.method.name == {"sliprompts": "pool", "rail": "frozen"}.get(kind, "finetune")
    contexts = [p for n in ("default",) if recipe.pet for p in pets(built(recipe, folder).model, n)]
    context = any(isinstance(pet, Context) for pet in contexts)
    assert context == (kind == "sliprompts" or (kind in PROTECTED and by_class))
    assert recipe.head.options["templates"] == ("context" if context else "photo")
    assert (recipe.protect is not None) == (kind in PROTECTED)
    if kind == "rail":
        expert = recipe.head.options["expert"]
        assert (expert["name"], expert["projection"], recipe.head.options["fusion"]) == ("ridge", 15000, 0.8)
        return
    assert recipe.pet is not None
    pet = recipe.pet.options
    assert recipe.pet.name == {"pegp-linear": "adapter", "pegp-lora": "lora", "pegp-prefix": "prefix"}.get(
        kind, "prompt"
    )
    train = recipe.train
    assert (train.optimizer, train.lr, train.momentum, train.weight_decay) == ("sgd", 0.01, 0.9, 2e-4)
    if kind == "sliprompts":
        assert (train.epochs, train.batch_size) == (30 if stream == "domainnet" else 20, 128)
        assert (pet["length"], pet["deep"], pet["through"]) == (10, False, "norm_pre")
        return
    assert (train.epochs, train.batch_size) == (5, 32)
    if kind == "pegp-linear":
        assert (pet["width"], pet["scale"], pet["activation"], pet["bias"]) == (5, 1.0, "none", False)
    assert recipe.protect is not None
    paper = name == PAPER
    assert (recipe.protect.conditions, recipe.protect.project) == (
        ("paper", "gradient") if paper else ("exact", "step")
    )
    assert recipe.protect.energy == (0.9 if recipe.pet.name == "prompt" else 0.99)


@pytest.mark.parametrize("name", NAMES)
def test_each_number_has_its_source_beside_it(name: str) -> None:
    text = packaged()[name].read_text(encoding="utf-8")
    for line, comment in commented(text, ("pet", "method", "protect", "train", "head"), r".*\d"):
        assert TAGS.search(comment), line
    assert "Sources: " in text or "# The sources are those of " in text
    assert ("Published" in text) == bool(re.search("[Nn]ot\\s(# )?reproduced here", text))


@pytest.mark.parametrize("name", every(NAMES, 3))
def test_the_changes_that_it_offers_fit(name: str, folder: Path, tmp_path: Path) -> None:
    text = packaged()[name].read_text(encoding="utf-8")
    for change in (found.rstrip(".,;") for found in sets(text)):
        built(load_recipe(name, [change]), folder)


@pytest.mark.parametrize(
    "stream", ["cifar100", *(pytest.param(name, marks=pytest.mark.slow) for name in ("domainnet", "mtil-1", "xtail"))]
)
@pytest.mark.parametrize("kind", KINDS)
def test_it_learns(kind: str, stream: str, folder: Path, tmp_path: Path) -> None:
    recipe, size = load_recipe(f"clip-{kind}-{stream}"), {"epochs": 1, "batch_size": 4}
    if stream == "cifar100":
        data = {"name": "folder", "path": str(split_folder(tmp_path / "data", ["cat", "dog", "elk", "owl"], 6, 2))}
        cut: dict[str, Any] = {"classes_per_task": 2}
    else:
        order = [] if stream == "domainnet" else (recipe.stream.order or [])[:2]
        for number, domain in enumerate(order or ["clipart", "real"]):
            classes = ["cat", "dog"] if not (order and number) else ["elk", "owl"]
            picture_folder(tmp_path / "data" / domain / "train", classes, 6, domain=domain)
            picture_folder(tmp_path / "data" / domain / "test", classes, 2, domain=domain, first=50)
        data = {"name": "folder", "path": str(tmp_path / "data"), "layout": "domains"}
        cut = {"order": order} if order else {}
    given = small(recipe, train=size, data=data, stream=cut, run={"device": "cpu", "workers": 0})
    given = given.model_copy(update={"backbone": given.backbone.model_copy(update={"name": f"folder:{folder}"})})
    results = Learner(given, tmp_path / "state").run()
    assert len(results["tasks"]) == 2
    assert (results["protection"] != []) == (recipe.protect is not None)
    if recipe.evaluate.future:
        assert results["cells"][0][1] is not None or results.get("unlearned")


@pytest.mark.parametrize("library", ["transformers", "open_clip"])
def test_clip_pgp_is_asked_without_the_leak_of_its_released_code(
    library: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the labels of a batch say which names may be answered. Made again, it raises the accuracy, and the answer
    to a picture depends on the pictures beside it. Ours does neither."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from clip_more import asked, leaked

    if library == "open_clip":
        pytest.importorskip("open_clip")
        from test_openclip import folder_of

        folder = folder_of(tmp_path / "net", "plain")
    data = {"name": "folder", "path": str(split_folder(tmp_path / "data", ["cat", "dog", "elk", "owl"], 6, 8))}
    given = small(load_recipe("clip-pgp-cifar100"), train={"epochs": 1, "batch_size": 8}, data=data,
                  stream={"classes_per_task": 2}, run={"device": "cpu", "workers": 0})  # fmt: skip
    given = given.model_copy(update={"backbone": given.backbone.model_copy(update={"name": f"folder:{folder}"})})
    learner = Learner(given, tmp_path / "state")
    tasks: list[Task] = []
    learn = learner.method.learn
    monkeypatch.setattr(learner.method, "learn", lambda task: (tasks.append(task), learn(task)))
    cells = learner.run()["cells"][-1]
    scores, targets = asked(learner, tasks)
    task_of = torch.tensor([0, 0, 1, 1])
    honest = scores.argmax(1)
    assert [int((honest == targets)[task_of[targets] == n].sum()) for n in (0, 1)] == [
        cell["correct"] for cell in cells
    ]
    told = leaked(scores, targets, task_of, 8)
    assert int((told == targets).sum()) > int((honest == targets).sum())
    assert set(told[task_of[targets] == 0].tolist()) <= {0, 1}, "the batch says that no later name may be answered"
    mixed = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    assert torch.equal(leaked(scores[mixed], targets[mixed], task_of, 16), honest[mixed])
    assert not torch.equal(told, honest), "so the same pictures have other answers in another order"


def test_updates_learn_month_by_month_and_names_ask_the_untouched_model(folder: Path, tmp_path: Path) -> None:
    first = split_folder(tmp_path / "first", ["cat", "dog"], 6, 2)
    second = split_folder(tmp_path / "second", ["elk"], 6, 2)
    cosines = []
    for name in UPDATES:
        given = small(load_recipe(name, ["train.epochs=1", "train.batch_size=4"]), run={"device": "cpu"})
        given = given.model_copy(update={"backbone": given.backbone.model_copy(update={"name": f"folder:{folder}"})})
        learner = Learner(given, tmp_path / name)
        learner.learn(str(first))
        results = learner.learn(str(second))
        assert [task["classes"] for task in results["tasks"]] == [["cat", "dog"], ["elk"]]
        asked = sorted((tmp_path / "second" / "test").rglob("*.png"))
        assert Learner.load(tmp_path / name).predict(asked) == learner.predict(asked)
        moved = [p for name in sets_of(learner.method.model) for p in parameters(learner.method.model, name)]
        assert all(bool(p.any()) for p in moved), "the pet has learned"
        cosines.append(learner.match(asked, ["a photo of a fox.", "a photo of an elk."]))
    assert torch.equal(*cosines)

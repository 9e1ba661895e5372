"""The recipes of classifiers from statistics (SAFE, RanPAC, APER, SimpleCIL): what they say, and that they learn."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_recipes import SOURCE, built, domains, learned
from tiny import chiefly, commented, split_folder

from perpetune.pets import pets
from perpetune.pets.ssf import SSF
from perpetune.recipe import load_recipe, packaged

KINDS = ("safe", "ranpac", "aper", "simplecil")
# Pet, whether the checkpoint was fine-tuned on ImageNet-1k, classes per task, as in the papers of RanPAC and SAFE
DATASETS = {
    "cifar100": ("adapter", False, 10),
    "imagenet-r": ("ssf", True, 20),
    "imagenet-a": ("ssf", True, 20),
    "cub200": ("adapter", True, 20),
    "omnibenchmark": ("prompt", False, 30),
    "vtab": ("ssf", True, 10),
    "domainnet": ("adapter", True, None),
}
NAMES = [f"{kind}-{dataset}" for kind in KINDS for dataset in DATASETS]
FEW = {"epochs": 1, "batch_size": 4}


def test_there_is_one_for_every_kind_and_data_set() -> None:
    assert sorted(n for n in packaged() if n.startswith(KINDS)) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_the_papers_say(name: str) -> None:
    recipe, (kind, _, dataset) = load_recipe(name), name.partition("-")
    pet, tuned, classes = DATASETS[dataset]
    assert recipe.backbone.name == f"timm:vit_base_patch16_224.augreg_in21k{'_ft_in1k' if tuned else ''}"
    assert recipe.stream.classes_per_task == classes
    assert (recipe.setting, recipe.stream.by) == (("domain",) * 2 if dataset == "domainnet" else ("class",) * 2)
    assert recipe.method.name == {"safe": "safe", "simplecil": "frozen"}.get(kind, "first_session")
    assert recipe.head.name == ("ridge" if kind in ("safe", "ranpac") else "ncm")
    if kind == "simplecil":
        assert recipe.pet is None
        return
    assert recipe.pet is not None
    assert recipe.pet.name == pet
    options, train = recipe.pet.options, recipe.train
    sizes = {"adapter": ("width", 64), "ssf": ("std", 0.02), "prompt": ("length", 5)}
    assert options[sizes[pet][0]] == sizes[pet][1]
    assert (train.epochs, train.batch_size, train.optimizer, train.schedule) == (20, 48, "sgd", "cosine")
    assert (train.lr, train.momentum, train.weight_decay) == (0.01, 0.9, 5e-4)
    if recipe.head.name == "ridge":
        assert recipe.head.options["projection"] == 10000
    if kind == "aper":
        assert recipe.method.options["concat"] is True
    if kind == "safe":
        given = recipe.method_options()
        weights = [given[n] for n in ("diagonal", "rest", "align", "cross", "sharpness")]
        assert weights == ([0.01, 10, 48, 0, 100] if pet == "ssf" else [5e-10, 5e-9, 24, 1, 1])
        assert (given["train"].epochs, given["later"].epochs, given["later"].lr) == (20, 15, 0.01)


@pytest.mark.parametrize("name", NAMES)
def test_each_number_has_its_source_beside_it(name: str) -> None:
    text = packaged()[name].read_text(encoding="utf-8")
    for line, comment in commented(text, ("pet", "method", "train", "head"), r"[{\[]?-?\d"):
        assert SOURCE.search(comment) or "[PILOT]" in comment, line
    assert "Not reproduced here." in text
    released = name in ("safe-cifar100", "safe-imagenet-a")
    assert ("not released" in text) == (name.startswith("safe") and not released)


@pytest.mark.parametrize(
    "name",
    chiefly(
        ["safe-vtab", "safe-cifar100", "ranpac-omnibenchmark", "aper-cub200", "simplecil-vtab"],
        ["safe-vtab", "aper-cub200", "simplecil-vtab"],
    ),
)
def test_it_learns_classes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(name)
    sections = {} if recipe.head.name == "ncm" else {"head": {"projection": 50}}
    if name.startswith("safe"):
        sections["method"] = {"later": FEW}
    data = {"name": "folder", "path": str(split_folder(tmp_path / "data", ["a", "b", "c", "d"], 6, 2))}
    stream = {"classes_per_task": 2}
    results = learned(recipe, tmp_path / "state", monkeypatch, data=data, train=FEW, stream=stream, **sections)
    assert sorted(c for task in results["tasks"] for c in task["classes"]) == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    "name",
    chiefly(["safe-domainnet", "aper-domainnet", "ranpac-domainnet", "simplecil-domainnet"], ["ranpac-domainnet"]),
)
def test_it_learns_domains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(name)
    sections = {} if recipe.head.name == "ncm" else {"head": {"projection": 50}}
    if name.startswith("safe"):
        sections["method"] = {"later": FEW}
    data = domains(tmp_path / "data", ("clipart", "real"))
    assert recipe.stream.order == ["real", "quickdraw", "painting", "sketch", "infograph", "clipart"]
    stream = {"holdout": 0.2, "order": ["real", "clipart"]}
    results = learned(recipe, tmp_path / "state", monkeypatch, data=data, train=FEW, stream=stream, **sections)
    assert [task["name"] for task in results["tasks"]] == ["real", "clipart"]


def test_protected_ridge_is_pegp_with_another_head() -> None:
    ridge, pegp = load_recipe("pegp-ridge-cifar100"), load_recipe("pegp-lora-cifar100-10")
    assert ridge.head.name == "ridge"
    for section in ("seed", "setting", "backbone", "pet", "method", "protect", "train", "data", "stream"):
        assert getattr(ridge, section) == getattr(pegp, section), section
    for demo, like in (("demo-pegp-ridge", "demo-pegp-ncm"), ("demo-ridge", "demo-ncm")):
        mine, theirs = load_recipe(demo).model_dump(), load_recipe(like).model_dump()
        assert {k for k in mine if mine[k] != theirs[k]} == {"name", "description", "head"}


def test_ssf_recipes_start_beside_the_pretrained_model() -> None:
    found = pets(built(load_recipe("ranpac-imagenet-r")), "default")
    assert len(found) == 6 * 6 + 2
    assert all(isinstance(pet, SSF) and pet.scale.any() and pet.shift.any() for pet in found)

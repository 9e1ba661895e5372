"""The recipes in the package: each reads back as it was, fits a model, and learns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import chiefly, commented, every, picture, picture_folder, split_folder

from perpetune.build import build_data, build_method
from perpetune.data.pictures.view import PictureView
from perpetune.learner import Learner
from perpetune.methods.base import Method
from perpetune.models.backbone import Backbone
from perpetune.recipe import Recipe, load_recipe, make_recipe, packaged
from perpetune.seeding import own_global_state

NAMES = list(packaged())
BOTH = [name for name in NAMES if name.startswith(("clip-", "update-text", "coin-"))]  # of texts too
PICTURES = [n for n in NAMES if not {"lm", "vlm"} & {*n.split("-")} and n not in BOTH]  # others have their own files
PEGP = [name for name in PICTURES if name.startswith("pegp-") and "ridge" not in name]  # as the papers have it
PETS = ("lora", "adapter", "prefix", "prompt")
STREAMS = ("cifar100-10", "cifar100-20", "imagenet-r-10", "domainnet", "core50")
SOURCE = re.compile(r"\[(paper|code|LAE|ours)\]|PGP's code")


def tiny_vit(*_: Any) -> Backbone:
    """A timm transformer of six blocks, width 32 and 16 pixels, its weights drawn by a fixed seed."""
    import timm

    with own_global_state("tiny", "recipes"):
        net = timm.create_model(
            "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=32, depth=6, num_heads=2, num_classes=0
        )
    return Backbone(net, spec="tiny", dim=32, preprocess=PictureView(16))


def built(recipe: Recipe) -> Method:
    return build_method(recipe, tiny_vit())


def changed(recipe: Recipe, **sections: Any) -> Recipe:
    """The recipe with keys of its sections replaced; a section that is no mapping is replaced whole."""
    content = recipe.model_dump(mode="json")
    for name, values in sections.items():
        content[name] = {**content[name], **values} if isinstance(content[name], dict) and name != "data" else values
    return make_recipe(content)


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_it_is_and_reads_back_as_it_was(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.description.endswith(".")
    assert recipe.name in (name, "state")  # what `init` makes is called by its folder
    assert make_recipe(yaml.safe_load(recipe.to_yaml())) == recipe
    assert recipe.resolved() == recipe


@pytest.mark.parametrize("name", every(PICTURES, 3))
def test_it_fits_a_transformer_of_six_blocks(name: str) -> None:
    recipe = load_recipe(name)
    method = built(recipe)
    if recipe.protect is None:
        assert method.protection is None
    else:
        assert method.protection is not None
        assert not method.protection.still  # every parameter of the pet is at a site


def test_every_pet_has_a_recipe_for_every_benchmark() -> None:
    assert sorted(PEGP) == sorted([f"pegp-{p}-{s}" for p in PETS for s in STREAMS] + ["pegp-lora-online-cifar100-10"])


@pytest.mark.parametrize("name", PEGP)
def test_it_is_pegp(name: str) -> None:
    recipe = load_recipe(name)
    pet = name.split("-")[1]
    assert recipe.pet is not None
    assert recipe.protect is not None
    assert (recipe.pet.name, recipe.method.name, recipe.head.name) == (pet, "finetune", "linear")
    assert recipe.pet.blocks == [0, 1, 2, 3, 4]
    assert (recipe.protect.energy, recipe.protect.conditions, recipe.protect.project) == (0.99, "exact", "step")
    assert (recipe.train.batch_size, recipe.train.optimizer, recipe.train.schedule) == (24, "adamw", "constant")
    assert (recipe.train.weight_decay, recipe.train.clip) == (0, None)
    long = "imagenet" in name or "domainnet" in name
    epochs = 1 if recipe.online else 50 if long else 5
    assert (recipe.train.epochs, recipe.train.lr) == (epochs, 4.6875e-4 if long else 2.8125e-3)
    by_domain = name.endswith(("domainnet", "core50"))
    assert (recipe.setting, recipe.stream.by) == (("domain",) * 2 if by_domain else ("class",) * 2)
    options = recipe.method_options()
    assert (options["mask"], options["head_first"], options["merge"]) == ("task", 0, 0)


@pytest.mark.parametrize("name", PEGP)
def test_each_number_has_its_source_beside_it(name: str) -> None:
    text = packaged()[name].read_text(encoding="utf-8")
    for line, comment in commented(text, ("pet", "protect", "train"), r"\[?-?\d"):
        assert SOURCE.search(comment), line
    head = text.partition("\nseed:")[0]
    for figure in re.findall(r"\d\d\.\d\d / \d+\.\d\d", head):
        assert re.search(r"Table \d", head), figure
        assert "Not\n# reproduced here." in head or "Not reproduced here." in head


@pytest.mark.parametrize("pet", ["lora", "adapter", "prefix"])
@pytest.mark.parametrize(("data", "epochs", "lr"), [("cifar100", 5, 2.8125e-3), ("imagenet-r", 50, 4.6875e-4)])
def test_it_is_lae(pet: str, data: str, epochs: int, lr: float) -> None:
    recipe = load_recipe(f"lae-{pet}-{data}")
    assert recipe.pet is not None
    assert recipe.average is not None
    assert (recipe.pet.name, recipe.pet.blocks, recipe.method.name) == (pet, [0, 1, 2, 3, 4], "finetune")
    about = recipe.average
    assert (about.weight, about.restart, about.answer, about.head, about.first) == (0.9999, False, "both", False, 2)
    assert (recipe.train.epochs, recipe.train.lr, recipe.train.batch_size, recipe.train.clip) == (epochs, lr, 24, None)
    assert (recipe.train.schedule, recipe.method.options["head_first"]) == ("constant", 0.6)
    method = built(recipe)
    assert method.average is not None
    size = {"lora": ("rank", 5), "adapter": ("width", 5), "prefix": ("length", 10)}[pet]
    assert recipe.pet.options[size[0]] == size[1]


@pytest.mark.parametrize("name", PEGP)
def test_what_the_published_numbers_include_can_be_switched_on(name: str) -> None:
    text = packaged()[name].read_text(encoding="utf-8")
    given = [change for line in re.findall(r"^#.*--set (?:method|pet)\.\S+=.*$", text, re.M) for change in sets(line)]
    recipe = load_recipe(name, given)
    built(recipe)
    if not recipe.online:
        assert recipe.method.options["merge"] == "falling"
        assert recipe.method.options["head_first"] == 0.6


def sets(line: str) -> list[str]:
    return re.findall(r"--set (\S+=\S+)", line)


def classes(path: Path) -> dict[str, Any]:
    return {"name": "folder", "path": str(split_folder(path, ["a", "b", "c", "d"], 6, 2))}


def domains(path: Path, names: tuple[str, ...]) -> dict[str, Any]:
    for domain in names:
        picture_folder(path / domain, ["a", "b"], 6, domain=domain)
    return {"name": "folder", "path": str(path), "layout": "domains"}


HUB: dict[str, tuple[tuple[str, ...], dict[str, Sequence[str] | None], list[list[str]]]] = {
    # splits, columns beside the picture with their class names (None: text), the tasks that become of the rows
    "cifar100-20": (("train", "test"), {"fine_label": list("fedcba"), "coarse_label": ["x"]}, [list("abcde"), ["f"]]),
    "imagenet-r-10": (("test",), {"wnid": None, "class_name": None}, [["n1", "n2"]]),
    "domainnet": (("train", "test"), {"label": ["a", "b"], "domain": ["sketch", "clipart"]}, [["a", "b"]] * 2),
}


@pytest.mark.parametrize("stream", HUB)
def test_it_reads_the_columns_that_the_hub_has(stream: str, tmp_path: Path) -> None:
    import datasets

    splits, columns, tasks = HUB[stream]
    image = "img" if stream.startswith("cifar") else "image"
    kinds = {
        name: datasets.Value("string") if n is None else datasets.ClassLabel(names=n) for name, n in columns.items()
    }
    rows: list[dict[str, Any]] = []
    for number in range(60):
        labels = {
            n: f"{'nc'[n != 'wnid']}{number % 2 + 1}" if c is None else number % len(c) for n, c in columns.items()
        }
        if stream == "domainnet":
            labels["domain"] = number // 2 % 2
        rows.append({image: picture("x", number), **labels})
    features = datasets.Features({image: datasets.Image(), **kinds})
    made = {split: datasets.Dataset.from_list(rows, features) for split in splits}
    datasets.DatasetDict(made).save_to_disk(tmp_path / "data")
    recipe = load_recipe(
        f"pegp-lora-{stream}",
        [f"data.path={tmp_path / 'data'}", *(["stream.classes_per_task=2"] if "net-r" in stream else [])],
    )
    found = build_data(recipe, tiny_vit().preprocess)
    assert [list(task.classes) for task in found.tasks] == tasks
    assert all(len(task.train) > 0 and task.test is not None and len(task.test) > 0 for task in found.tasks)
    if stream == "domainnet":
        assert [task.name for task in found.tasks] == ["clipart", "sketch"]


def learned(recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch, **sections: Any) -> dict[str, Any]:
    """The results of the recipe on other data, with few epochs and the tiny transformer."""
    monkeypatch.setattr("perpetune.trained.build_backbone", tiny_vit)
    learner = Learner(changed(recipe, run={"device": "cpu", "workers": 0}, **sections), folder)
    return learner.run()


@pytest.mark.parametrize(
    "name",
    chiefly(
        [*(f"pegp-{p}-cifar100-10" for p in PETS), "pegp-lora-online-cifar100-10"],
        ["pegp-adapter-cifar100-10", "pegp-prompt-cifar100-10", "pegp-lora-online-cifar100-10"],
    ),
)
def test_it_learns_two_tasks_and_keeps_the_first(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(name)
    data = {"name": "folder", "path": str(split_folder(tmp_path / "data", ["a", "b", "c", "d"], 6, 2))}
    moved = {}
    for directions in ("features", "none"):
        certificates = learned(
            recipe,
            tmp_path / directions,
            monkeypatch,
            data=data,
            train={"batch_size": 4},
            stream={"classes_per_task": 2},
            protect={"directions": directions},
        )["protection"]
        assert [(c["task"], c["of"], c["consolidated"]) for c in certificates] == [(0, "task", 0), (1, "task", 1)]
        moved[directions] = certificates[1]["worst"]
    assert moved["features"] < moved["none"] / 4


@pytest.mark.parametrize(
    "name",
    chiefly(
        [*(f"pegp-{p}-domainnet" for p in PETS), "pegp-lora-core50"], ["pegp-prefix-domainnet", "pegp-lora-core50"]
    ),
)
def test_it_learns_domains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(name)
    wanted = recipe.stream.order or ["clipart", "real"]
    for domain in [*wanted, *(["s3"] if recipe.stream.order else [])]:
        picture_folder(tmp_path / "data" / domain, ["a", "b"], 5, domain=domain)
    results = learned(
        recipe,
        tmp_path / "state",
        monkeypatch,
        data={"name": "folder", "path": str(tmp_path / "data"), "layout": "domains"},
        train={"epochs": 1},
        stream={"holdout": 0.2},
    )
    assert [task["name"] for task in results["tasks"]] == wanted
    assert all(task["classes"] == ["a", "b"] for task in results["tasks"])

"""The recipes of pools (L2P, DualPrompt, CODA-Prompt, S-Prompts, HiDe, PGP on pools): what they say, and that they
learn."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from test_recipes import built, changed, domains, learned, sets
from tiny import chiefly, commented, split_folder

from perpetune.heads import Drawn
from perpetune.methods.pool import Pool
from perpetune.recipe import Recipe, load_recipe, packaged
from perpetune.selectors.classifier import LearnedClasses

SETS = ("mtil-1", "mtil-2", "xtail")  # data sets one after the other, of S-iPrompts alone
DATASETS = ("cifar100", "imagenet-r", "cub200", "domainnet", "core50")
PROTECTED = ("cifar100", "imagenet-r", "cub200")  # the data sets of PGP's own runs
METHODS = ("l2p", "dualprompt", "coda-prompt", "sprompts", "hide-prompt", "hide-lora", "hide-adapter")
PLAIN = [f"{method}-{dataset}" for method in METHODS for dataset in DATASETS]
PGP = [f"{m}-pgp-{d}{end}" for m in ("l2p", "dualprompt") for d in PROTECTED for end in ("", "-paper")]
HIDE = ["hide-lora-cifar100-paper"]  # with both classifiers as published
NAMES = [*PLAIN, *PGP, *HIDE, *(f"sprompts-{dataset}" for dataset in SETS)]
FEW = {"epochs": 1, "batch_size": 4}
TAGS = re.compile(r"\[(paper|code|ours|HP|CODA|PGP)\]")


def parts(name: str) -> tuple[str, str]:
    """The method and the data set in the name of a recipe."""
    dataset = next(d for d in (*DATASETS, *SETS) if name.removesuffix("-paper").endswith(d))
    return name.partition(f"-{dataset}")[0], dataset


def test_there_is_one_for_every_method_and_data_set() -> None:
    assert sorted(n for n in packaged() if n.startswith(METHODS)) == sorted(NAMES)
    pools = [n for n in packaged() if load_recipe(n).method.name == "pool" and not n.startswith("clip-")]
    assert sorted(pools) == sorted(NAMES)


def selector(recipe: Recipe) -> str:
    return str(recipe.method_options()["select"].name)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_method_that_its_name_says(name: str) -> None:
    recipe, (kind, dataset) = load_recipe(name), parts(name)
    options = recipe.method_options()
    l2p = kind.startswith("l2p")
    assert options["members"] == (10 if l2p else "task")
    wanted = {"l2p": "keys", "dua": "keys", "cod": "weights", "spr": "centres", "hid": "gaussian"}[kind[:3]]
    assert selector(recipe) == ("classifier" if name in HIDE else wanted)
    assert options["common"] == (("general",) if kind.startswith("dual") else ())
    assert options["answer"] == ("own" if kind == "sprompts" else "all")
    head = "drawn" if name in HIDE else "ridge"
    assert recipe.head.name == (head if kind.startswith("hide") else "linear")
    assert options["mask"] == "task"
    assert (options["merge"] > 0, options["repel"] > 0) == (kind.startswith("hide"),) * 2
    by_domain = dataset in ("domainnet", "core50")
    setting = ("domain",) * 2 if by_domain else ("class",) * 2
    if dataset in SETS:
        setting = ("class" if dataset == "xtail" else "task", "domain")
    assert (recipe.setting, recipe.stream.by) == setting
    assert (recipe.protect is not None) == ("-pgp" in kind)
    pet = {"l2p": "prompt", "cod": "prefix", "spr": "prompt", "hid": kind.partition("-")[2]}.get(kind[:3], "")
    assert [p.name for p in recipe.pets.values()] == (["prefix"] * 2 if kind.startswith("dual") else [])
    assert kind.startswith("dual") == (recipe.pet is None)
    if recipe.pet is not None:
        assert recipe.pet.name == {"prompt": "prefix" if kind.startswith("hide") else "prompt"}.get(pet, pet)


# Epochs, batch size, effective learning rate, classes a task: prompt-pools.md §2 and pgp-pegp.md §3.1
NUMBERS: dict[str, tuple[int, int, float, int | None]] = {
    "l2p-cifar100": (5, 16, 0.03 * 16 / 256, 10),
    "l2p-imagenet-r": (50, 24, 0.005 * 24 / 256, 20),
    "dualprompt-cifar100": (5, 24, 0.03 * 24 / 256, 10),
    "dualprompt-imagenet-r": (50, 24, 0.005 * 24 / 256, 20),
    "dualprompt-domainnet": (5, 128, 1e-3, None),
    "coda-prompt-cifar100": (20, 128, 1e-3, 10),
    "coda-prompt-imagenet-r": (50, 128, 1e-3, 20),
    "sprompts-domainnet": (30, 128, 0.01, None),
    "sprompts-core50": (20, 128, 0.01, None),
    "hide-prompt-cifar100": (50, 192, 0.03 * 24 / 256, 10),
    "hide-prompt-imagenet-r": (150, 192, 0.03 * 24 / 256, 20),
    "hide-lora-imagenet-r": (50, 192, 0.01 * 24 / 256, 20),
    "hide-adapter-imagenet-r": (50, 192, 0.01 * 24 / 256, 20),
    "l2p-pgp-cifar100": (5, 16, 0.03 * 16 / 256, 10),
    "l2p-pgp-cub200": (5, 16, 0.03 * 16 / 256, 40),
    "l2p-pgp-imagenet-r": (50, 16, 0.005 * 16 / 256, 20),
    "dualprompt-pgp-cifar100": (20, 24, 0.03 * 24 / 256, 10),
    "dualprompt-pgp-cub200": (10, 24, 0.03 * 24 / 256, 40),
    "dualprompt-pgp-imagenet-r": (50, 24, 0.005 * 24 / 256, 20),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_it_trains_as_its_source_says(name: str) -> None:
    for end in ("", "-paper") if "-pgp-" in name else ("",):
        recipe = load_recipe(name + end)
        train = recipe.train
        found = (train.epochs, train.batch_size, train.lr, recipe.stream.classes_per_task)
        assert found == pytest.approx(NUMBERS[name]) if None not in found else found == NUMBERS[name]


@pytest.mark.parametrize("name", PGP)
def test_projection_is_exact_or_that_of_the_paper(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.protect is not None
    paper = name.endswith("-paper")
    wanted = ("paper", "gradient", 0.5) if paper else ("exact", "step", 0.99)
    assert (recipe.protect.conditions, recipe.protect.project, recipe.protect.energy) == wanted
    method = built(recipe)
    assert method.protection is not None
    kinds = {watched.name.rpartition("/")[2] for watched in method.protection.sites}
    exact = {"keys", "values"} if not paper else {"keys.inputs"}
    assert kinds == (exact | {"choice"} if name.startswith("l2p") else exact)


@pytest.mark.parametrize("name", NAMES)
def test_each_number_has_its_source_beside_it(name: str) -> None:
    text = packaged()[name].read_text(encoding="utf-8")
    for line, comment in commented(text, ("pet", "pets", "method", "protect", "train"), r".*\d"):
        assert TAGS.search(comment), line
    assert "Sources: " in text or "# The sources are those of " in text
    assert ("Published" in text) == bool(re.search("[Nn]ot\\s(# )?reproduced here", text))


@pytest.mark.parametrize("name", NAMES)
def test_the_changes_that_it_offers_fit(name: str) -> None:
    text = packaged()[name].read_text(encoding="utf-8")
    quoted = re.findall(r'--set "(\S+=\{[^"]*\})"', text)
    given = [*quoted, *(change for change in sets(text) if not change.startswith('"'))]
    for change in given:
        built(load_recipe(name, [change]))
    if name in ("hide-prompt-cifar100", "hide-lora-imagenet-r", "hide-adapter-imagenet-r"):
        assert quoted


# On other data a method's recipe has other numbers and nothing else.
# Each method once, on classes or on domains in turn.
ONCE = [f"{method}-{('cifar100', 'domainnet')[i % 2]}" for i, method in enumerate(METHODS)]
ONCE += ["l2p-pgp-cifar100", "dualprompt-pgp-cifar100-paper", *HIDE]


@pytest.mark.parametrize("name", chiefly(NAMES, ONCE))
def test_it_learns(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(name)
    sections: dict[str, Any] = {"train": FEW}
    if recipe.stream.by == "domain":
        wanted = ["s1", "s2"] if recipe.stream.order else ["clipart", "real"]
        data = domains(tmp_path / "data", tuple(wanted))
        stream = {"holdout": 0.2, "order": wanted if recipe.stream.order else None}
        tasks = wanted
    else:
        data = {"name": "folder", "path": str(split_folder(tmp_path / "data", ["a", "b", "c", "d"], 6, 2))}
        stream, tasks = {"classes_per_task": 2, "holdout": 0.0}, []
    results = learned(recipe, tmp_path / "state", monkeypatch, data=data, stream=stream, **sections)
    assert len(results["tasks"]) == 2
    assert not tasks or [task["name"] for task in results["tasks"]] == tasks
    assert (results["protection"] != []) == (recipe.protect is not None)
    facts = results["facts"][-1]["of"]["pool"]
    shared, each = parts(name)[0].startswith("l2p"), recipe.method_options()["each"]
    assert (len(facts["members"]), facts.get("count")) == ((10, None) if shared else (each, 2 * each))


def test_the_number_of_processes_is_no_option() -> None:
    """HiDe's batch of 24 on each of 8 processes is a batch of 192 here, with the learning rate of 24."""
    for kind in ("prompt", "lora", "adapter"):
        for dataset in DATASETS:
            assert load_recipe(f"hide-{kind}-{dataset}").train.batch_size == 192


@pytest.mark.parametrize("name", HIDE)
def test_the_two_classifiers_of_hide_are_trained_on_draws_as_published(name: str) -> None:
    recipe = load_recipe(name)
    method = built(changed(recipe, train=FEW))
    assert isinstance(method, Pool)
    assert isinstance(method.selector, LearnedClasses)
    for head in (method.selector.head, method.model.head):  # HiDe's code: 24 on a process, times 5
        assert isinstance(head, Drawn)
        assert (head.samples, head.batch_size, head.epochs, head.lr, head.full) == (120, 120, 30, 0.005, False)

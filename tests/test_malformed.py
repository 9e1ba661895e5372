"""Inputs a person may get wrong: each ends with exit code 1 or 2 and one line that names the culprit and a way out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load, save
from tiny import picture_folder, recipe, seal, task_files, vit_folder

from perpetune.cli import call
from perpetune.files import MANIFEST, write_folder
from perpetune.learner import Learner

CLASSES = ("cat", "dog", "fox", "owl")


@dataclass
class Place:
    """What is there for all cases, and a folder of one's own.

    Attributes:
        tmp: the working folder of the case.
        world: made once and only read: `model`, `images`, the state `learned` of two tasks, the state `fresh`.
    """

    tmp: Path
    world: Path

    def base(self) -> dict[str, Any]:
        return base_recipe(self.world)

    def text(self, content: str | bytes, name: str = "my.yaml") -> str:
        """A file with that content in the working folder."""
        path = self.tmp / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    def run(self, *options: str, **changes: Any) -> list[str]:
        """`run` of a good recipe in which whole sections are replaced, and those that are `...` left out."""
        content = {k: v for k, v in {**self.base(), **changes}.items() if v is not ...}
        path = self.text(yaml.safe_dump(content, sort_keys=False))
        return ["run", path, "--out", str(self.tmp / "out"), "--quiet", *options]

    def data(self, **data: Any) -> list[str]:
        """`run` on other data."""
        return self.run(data=data)

    def state(self, name: str = "learned") -> Path:
        """A copy of a state of the world."""
        return Path(shutil.copytree(self.world / name, self.tmp / "state"))

    def picture(self) -> str:
        return str(self.world / "images" / "cat" / "0.png")

    def predict(self, state: Path) -> list[str]:
        return ["predict", str(state), self.picture()]


def base_recipe(world: Path) -> dict[str, Any]:
    stream = {"classes_per_task": 2, "class_order": "sorted", "holdout": 0.25}
    return recipe(world / "model", world / "images", head="ncm", stream=stream)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    vit_folder(root / "model")
    picture_folder(root / "images", CLASSES, 4)
    Learner(base_recipe(root), root / "learned").run()
    Learner({**base_recipe(root), "data": None}, root / "fresh")
    return root


Arguments = Callable[[Place], list[str]]
CASES: dict[str, tuple[Arguments, int, tuple[str, ...]]] = {}


def case(code: int, *words: str) -> Callable[[Arguments], Arguments]:
    """A case called by the function's name: the exit code, and words that the line has to hold."""

    def register(arguments: Arguments) -> Arguments:
        assert arguments.__name__ not in CASES
        CASES[arguments.__name__] = arguments, code, words
        return arguments

    return register


# -- recipes ------------------------------------------------------------------------------------------------


@case(2, "my.yaml", "line 3", "not YAML")
def recipe_is_not_yaml(p: Place) -> list[str]:
    return ["run", p.text("name: a\nhead: {name: ncm\nseed: 1\n")]


@case(2, "my.yaml", "a mapping of keys is expected", "list")
def recipe_is_a_list(p: Place) -> list[str]:
    return ["run", p.text("- name: a\n- seed: 1\n")]


@case(2, "my.yaml", "empty")
def recipe_is_empty(p: Place) -> list[str]:
    return ["run", p.text("# nothing yet\n")]


@case(2, "my.yaml", "line 3", "'seed' stands twice")
def recipe_with_a_key_twice(p: Place) -> list[str]:
    return ["run", p.text("seed: 1\nname: a\nseed: 2\n")]


@case(2, "my.yaml", "not YAML", "64 deep")
def recipe_is_endless(p: Place) -> list[str]:
    return ["run", p.text("[" * 5000)]


@case(2, "my.yaml", "not YAML")
def recipe_makes_python_objects(p: Place) -> list[str]:
    return ["run", p.text("name: !!python/object/apply:os.getcwd []\n")]


@case(2, "my.yaml", "keys should be strings", "got 1")
def recipe_key_is_a_number(p: Place) -> list[str]:
    return ["run", p.text("1: 2\n")]


@case(2, "no recipe 'dmo'", "demo", "demo-ncm", "closest")
def recipe_unknown(p: Place) -> list[str]:
    return ["run", "dmo"]


@case(2, "nowhere/my.yaml", "No such file or directory")
def recipe_file_missing(p: Place) -> list[str]:
    return ["run", "nowhere/my.yaml"]


@case(2, "recipe", "Is a directory")
def recipe_is_a_folder(p: Place) -> list[str]:
    return ["run", str(p.tmp)]


@case(2, "my.yaml", "not UTF-8 text")
def recipe_is_binary(p: Place) -> list[str]:
    return ["run", p.text(b"\x80\x02}q\x00\xff\xfe")]


@case(2, "my.yaml", "not UTF-8 text")
def recipe_is_latin_1(p: Place) -> list[str]:
    return ["run", p.text("description: Vögel\n".encode("latin-1"))]


@case(2, "my.yaml", "sed is not an option", "closest", "seed")
def unknown_top_key(p: Place) -> list[str]:
    return p.run(sed=1)


@case(2, "my.yaml", "train.epoch is not an option", "closest", "epochs")
def unknown_nested_key(p: Place) -> list[str]:
    return p.run(train={"epoch": 1})


@case(2, "run.worker", "workers")
def unknown_key_in_run(p: Place) -> list[str]:
    return p.run(run={"worker": 1})


@case(2, "stream.class_per_task", "classes_per_task")
def unknown_key_in_stream(p: Place) -> list[str]:
    return p.run(stream={"class_per_task": 2})


@case(2, "train.epochs", "integer", "'many'")
def wrong_type(p: Place) -> list[str]:
    return p.run(train={"epochs": "many"})


@case(2, "train", "a mapping of keys", "3")
def section_is_a_number(p: Place) -> list[str]:
    return p.run(train=3)


@case(2, "train.epochs", "greater than or equal to 0", "-1")
def negative_epochs(p: Place) -> list[str]:
    return p.run(train={"epochs": -1})


@case(2, "train.lr", "greater than 0", "got 0")
def learning_rate_zero(p: Place) -> list[str]:
    return p.run(train={"lr": 0})


@case(2, "train.lr", "a finite number", "got nan")
def learning_rate_not_a_number(p: Place) -> list[str]:
    return p.run(train={"lr": float("nan")})


@case(2, "train.betas.0", "less than 1", "got 2")
def betas_out_of_range(p: Place) -> list[str]:
    return p.run(train={"betas": [2, 3]})


@case(2, "methods: finetune: train", "a mapping of keys", "got 3")
def section_of_a_method_is_a_number(p: Place) -> list[str]:
    return p.run(method={"name": "finetune", "train": 3})


@case(2, "no place to put a pet", "role")
def no_role(p: Place) -> list[str]:
    return p.run(pet={"name": "lora", "at": []})


@case(2, "seed", "greater than or equal to 0", "-1")
def negative_seed(p: Place) -> list[str]:
    return p.run("--seed", "-1")


@case(2, "name", "my/run", "'.', '_' and '-' only")
def name_with_a_slash(p: Place) -> list[str]:
    return p.run(name="my/run")


@case(2, "setting", "'class', 'domain' or 'task'", "'clas'")
def unknown_setting(p: Place) -> list[str]:
    return p.run(setting="clas")


@case(2, "run.precision", "'no', 'tf32', 'bf16' or 'fp16'", "'fp8'")
def unknown_precision(p: Place) -> list[str]:
    return p.run(run={"precision": "fp8"})


@case(2, "method", "no 'finetun'", "finetune", "frozen", "joint")
def unknown_method(p: Place) -> list[str]:
    return p.run(method="finetun")


@case(2, "pet", "no 'lorra'", "lora")
def unknown_pet(p: Place) -> list[str]:
    return p.run(pet="lorra")


@case(2, "head", "no 'nmc'", "vlm", "lm", "ncm")
def unknown_head(p: Place) -> list[str]:
    return p.run(head="nmc")


@case(2, "data", "no 'mnist'", "closest")
def unknown_data(p: Place) -> list[str]:
    return p.run(data="mnist")


@case(2, "backbone", "no prefix 'tim'", "timm")
def unknown_backbone_prefix(p: Place) -> list[str]:
    return p.run(backbone="tim:vit_base_patch16_224")


@case(2, "backbone", "'micro'", "PREFIX:NAME", "timm, hf, openclip, folder, perpetune")
def backbone_without_prefix(p: Place) -> list[str]:
    return p.run(backbone="micro")


@case(2, "vit_bse_patch16_224", "closest", "vit_base_patch16_224")
def unknown_timm_model(p: Place) -> list[str]:
    return p.run(backbone="timm:vit_bse_patch16_224")


@case(2, "folder:", "modle", "no such folder", "closest", "model")
def backbone_folder_missing(p: Place) -> list[str]:
    return p.run(backbone=f"folder:{p.world / 'modle'}")


@case(2, "backbone.name", "missing")
def backbone_without_name(p: Place) -> list[str]:
    return p.run(backbone={"image_size": 32})


@case(2, "pets: lora: rnk is not an option", "closest", "rank")
def unknown_option_of_a_pet(p: Place) -> list[str]:
    return p.run(pet={"name": "lora", "rnk": 4})


@case(2, "lora", "rank is 0", "at least 1")
def rank_zero(p: Place) -> list[str]:
    return p.run(pet={"name": "lora", "rank": 0})


@case(2, "methods: finetune: masc is not an option", "mask", "closest")
def unknown_option_of_a_method(p: Place) -> list[str]:
    return p.run(method={"name": "finetune", "masc": "task"})


@case(2, "no role 'query'", "q, k, v, proj")
def unknown_role(p: Place) -> list[str]:
    return p.run(pet={"name": "lora", "at": ["query"]})


@case(2, "block 7 is out of range", "1 block")
def block_out_of_range(p: Place) -> list[str]:
    return p.run(pet={"name": "lora", "blocks": [7]})


@case(2, "frozen", "linear", "head: ncm")
def frozen_with_a_head_to_train(p: Place) -> list[str]:
    return p.run(method="frozen", head="linear", pet="none")


@case(2, "protect.enrgy is not an option", "closest", "energy")
def unknown_key_in_protect(p: Place) -> list[str]:
    return p.run(protect={"enrgy": 0.9})


@case(2, "protect.energy", "less than or equal to 1", "got 1.5")
def energy_out_of_range(p: Place) -> list[str]:
    return p.run(protect={"energy": 1.5})


@case(2, "protect.samples", "greater than or equal to 1", "got 0")
def no_sample_to_protect(p: Place) -> list[str]:
    return p.run(protect={"samples": 0})


@case(2, "protect", "no site 'dwn'", "down, up")
def unknown_site(p: Place) -> list[str]:
    return p.run(protect={"sites": ["up", "dwn"]})


@case(2, "protect", "nothing can be protected", "put in a pet")
def protection_of_a_head_alone(p: Place) -> list[str]:
    return p.run(protect=True, pet="none")


@case(2, "protect", "nothing can be protected", "put in a pet")
def protection_without_a_pet(p: Place) -> list[str]:
    return p.run(protect=True, pet="none", method="finetune", head="ncm")


@case(2, "method: frozen trains no pet", "leave protect out", "finetune")
def protection_of_a_pet_that_frozen_leaves_out(p: Place) -> list[str]:
    return p.run(protect=True, method="frozen", head="ncm", train=...)


@case(2, "joint keeps all data", "nothing for protect")
def protection_of_joint(p: Place) -> list[str]:
    return p.run(protect=True, method="joint")


@case(2, "prompt", "no linear condition that keeps old outputs exactly", "deep: true", "conditions: paper")
def exact_protection_of_a_prompt_that_is_not_deep(p: Place) -> list[str]:
    return p.run(protect=True, pet={"name": "prompt", "deep": False, "at": ["block"]})


@case(2, "generel", "protect.reference")
def reference_folder_missing(p: Place) -> list[str]:
    return p.run(protect={"reference": {"path": str(p.world / "generel")}})


@case(1, "protect.reference", "no picture")
def reference_without_pictures(p: Place) -> list[str]:
    p.text("no picture", "texts/a.txt")
    return p.run(protect={"reference": {"path": str(p.tmp / "texts")}})


@case(2, "protect.reference", "give path")
def reference_without_a_path(p: Place) -> list[str]:
    return p.run(protect={"reference": {"samples": 3}})


@case(2, "online: true trains on each example once", "train.epochs is 5")
def online_with_epochs(p: Place) -> list[str]:
    return p.run(online=True, train={"epochs": 5})


@case(2, "online: true trains on each example once", "train.epochs is [1, 2]")
def online_with_epochs_by_task(p: Place) -> list[str]:
    return p.run(online=True, train={"epochs": [1, 2]})


@case(2, "online: true trains on each example once", "method.train.epochs is 3")
def online_with_epochs_of_the_method(p: Place) -> list[str]:
    return p.run(online=True, train={}, method={"name": "finetune", "train": {"epochs": 3}})


@case(2, "finetune", "merge", "less than or equal to 1")
def merge_out_of_range(p: Place) -> list[str]:
    return p.run(method={"name": "finetune", "merge": 1.5})


@case(2, "has no data", "data:", "perpetune update")
def recipe_without_data(p: Place) -> list[str]:
    return p.run(data=...)


@case(2, "stream.classes_per_task", "9 is too large: there are only 4 classes")
def more_classes_per_task_than_classes(p: Place) -> list[str]:
    return p.run(stream={"classes_per_task": 9})


@case(2, "stream.classes_per_task", "greater than 0", "got 0")
def no_class_per_task(p: Place) -> list[str]:
    return p.run(stream={"classes_per_task": 0})


@case(2, "stream.classes_per_task", "[1, 2]", "3", "4 classes")
def tasks_that_do_not_add_up(p: Place) -> list[str]:
    return p.run(stream={"classes_per_task": [1, 2]})


@case(2, "stream.classes_per_task is missing", "4 classes")
def classes_per_task_missing(p: Place) -> list[str]:
    return p.run(stream={"by": "class"})


@case(2, "stream.class_order", "'cow'", "closest")
def class_order_with_an_unknown_name(p: Place) -> list[str]:
    return p.run(stream={"classes_per_task": 2, "class_order": ["cat", "cow"]})


@case(2, "stream.class_order", "'seeded' or 'sorted'", "'random'")
def class_order_is_a_word(p: Place) -> list[str]:
    return p.run(stream={"classes_per_task": 2, "class_order": "random"})


@case(1, "by: domain", "PATH/DOMAIN/CLASS/PICTURE")
def domains_without_domains(p: Place) -> list[str]:
    return p.run(stream={"by": "domain"})


# -- the command line ---------------------------------------------------------------------------------------


@case(2, "'rnu'", "closest", "run", "perpetune --help")
def unknown_verb(p: Place) -> list[str]:
    return ["rnu"]


@case(2, "--epochs", "perpetune run --help")
def unknown_option(p: Place) -> list[str]:
    return ["run", "--epochs", "3"]


@case(2, "STATE", "perpetune predict --help")
def missing_argument(p: Place) -> list[str]:
    return ["predict"]


@case(2, "--data", "perpetune update --help")
def missing_option(p: Place) -> list[str]:
    return ["update", str(p.world / "fresh")]


@case(2, "--top", "perpetune predict --help")
def top_zero(p: Place) -> list[str]:
    return [*p.predict(p.world / "learned"), "--top", "0"]


@case(2, "--json", "--csv")
def two_formats(p: Place) -> list[str]:
    return [*p.predict(p.world / "learned"), "--json", "--csv"]


@case(2, "--set 'train.epochs'", "KEY=VALUE", "train.epochs=3")
def set_without_a_value(p: Place) -> list[str]:
    return p.run("--set", "train.epochs")


@case(2, "--set 'seed.first=1'", "seed is 0", "no keys")
def set_below_a_number(p: Place) -> list[str]:
    return p.run("--set", "seed.first=1", seed=0)


@case(2, "--set", "not YAML", "train.epochs")
def set_to_what_is_not_yaml(p: Place) -> list[str]:
    return p.run("--set", "train.epochs=[1")


@case(2, "run.device", "'cuda:99'", "auto")
def device_that_is_not_there(p: Place) -> list[str]:
    return p.run("--device", "cuda:99")


@case(2, "run.device", "'gpu'", "auto")
def device_that_does_not_exist(p: Place) -> list[str]:
    return p.run("--device", "gpu")


@case(2, "run.device", "'meta'", "auto")
def device_that_holds_nothing(p: Place) -> list[str]:
    return p.run("--device", "meta")


@case(2, "out", "already exists", "perpetune resume", "another folder")
def out_is_there_already(p: Place) -> list[str]:
    (p.tmp / "out").mkdir()
    (p.tmp / "out" / "notes.txt").write_text("mine")
    return p.run()


@case(2, "out", "Not a directory")
def out_is_below_a_file(p: Place) -> list[str]:
    p.text("mine", "file")
    arguments = p.run()
    arguments[arguments.index("--out") + 1] = str(p.tmp / "file" / "out")
    return arguments


# -- data ---------------------------------------------------------------------------------------------------


@case(1, "nowhere", "no such file or folder")
def data_folder_missing(p: Place) -> list[str]:
    return p.data(name="folder", path=str(p.tmp / "nowhere"))


@case(2, "data", "folder", "path is missing")
def data_without_path(p: Place) -> list[str]:
    return p.data(name="folder")


@case(1, "empty", "no pictures", "PATH/CLASS/PICTURE")
def data_folder_empty(p: Place) -> list[str]:
    (p.tmp / "empty").mkdir()
    return p.data(name="folder", path=str(p.tmp / "empty"))


@case(1, "texts", "no pictures", "no picture in cat")
def data_without_pictures(p: Place) -> list[str]:
    p.text("a cat", "texts/cat/cat.txt")
    return p.data(name="folder", path=str(p.tmp / "texts"))


@case(1, "bad/cat/0.png", "no training picture can be read", "not a picture")
def all_pictures_corrupt(p: Place) -> list[str]:
    for name in CLASSES:
        for i in range(2):
            p.text("not a picture", f"bad/{name}/{i}.png")
    return p.data(name="folder", path=str(p.tmp / "bad"))


@case(1, "more than 1 pictures are bad", "stream.max_bad", "bad0.png", "bad1.png")
def more_pictures_corrupt_than_allowed(p: Place) -> list[str]:
    picture_folder(p.tmp / "some", CLASSES, 4)
    for i in range(8):
        p.text("not a picture", f"some/cat/bad{i}.png")
    stream = {"classes_per_task": 2, "class_order": "sorted", "max_bad": 1}
    return p.run(data={"name": "folder", "path": str(p.tmp / "some")}, stream=stream)


@case(1, "cat/0.png", "a.png", "test pictures are also training pictures", "stream.overlap")
def train_and_test_overlap(p: Place) -> list[str]:
    picture_folder(p.tmp / "split" / "train", CLASSES, 4)
    (p.tmp / "split" / "test" / "cat").mkdir(parents=True)
    shutil.copy(p.tmp / "split" / "train" / "cat" / "0.png", p.tmp / "split" / "test" / "cat" / "a.png")
    return p.data(name="folder", path=str(p.tmp / "split"))


@case(1, "list.csv", "'label'", "path", "class")
def manifest_without_label_column(p: Place) -> list[str]:
    return p.data(name="manifest", path=p.text(f"path,class\n{p.picture()},cat\n", "list.csv"))


@case(1, "list.csv line 3", "3 cells", "2")
def manifest_with_ragged_rows(p: Place) -> list[str]:
    return p.data(name="manifest", path=p.text("path,label\na.png,cat\nb.png,dog,extra\n", "list.csv"))


@case(1, "list.jsonl line 2", "not JSON")
def manifest_with_a_bad_line(p: Place) -> list[str]:
    return p.data(name="manifest", path=p.text('{"path": "a.png", "label": "cat"}\n{"path": \n', "list.jsonl"))


@case(1, "list.csv line 3", "label")
def manifest_with_an_empty_label(p: Place) -> list[str]:
    return p.data(name="manifest", path=p.text("path,label\na.png,cat\nb.png,\n", "list.csv"))


@case(1, "list.csv line 2", "'cow'", "data.labels", "closest")
def manifest_with_a_label_that_is_not_declared(p: Place) -> list[str]:
    path = p.text(f"path,label\n{p.picture()},cow\n", "list.csv")
    return p.data(name="manifest", path=path, labels=list(CLASSES))


@case(1, "gone0.png", "no such file")
def manifest_with_missing_files(p: Place) -> list[str]:
    rows = "".join(f"gone{i}.png,{name}\n" for i, name in enumerate(CLASSES))
    return p.data(name="manifest", path=p.text(f"path,label\n{rows}", "list.csv"))


@case(1, "list.csv", "not UTF-8")
def manifest_is_binary(p: Place) -> list[str]:
    return p.data(name="manifest", path=p.text(b"path,label\n\xff\xfe,\x00\n", "list.csv"))


@case(1, "list.csv", "no rows")
def manifest_with_a_header_alone(p: Place) -> list[str]:
    return p.data(name="manifest", path=p.text("path,label\n", "list.csv"))


@case(1, "no.parquet", "not a readable parquet file")
def parquet_is_not_parquet(p: Place) -> list[str]:
    return p.data(name="parquet", path=p.text("path,label\n", "no.parquet"))


@case(1, "some.parquet", "no column 'image'", "picture")
def parquet_without_the_column(p: Place) -> list[str]:
    pa = pytest.importorskip("pyarrow", reason="the extra `data` is not installed")
    from pyarrow import parquet

    parquet.write_table(pa.table({"picture": [b""], "label": ["cat"]}), p.tmp / "some.parquet")
    return p.data(name="parquet", path=str(p.tmp / "some.parquet"))


@case(1, "no test picture", "wolf", "cat, dog, fox, owl")
def no_test_class_is_in_train(p: Place) -> list[str]:
    picture_folder(p.tmp / "split" / "train", CLASSES, 4)
    picture_folder(p.tmp / "split" / "test", ["wolf"], 4)
    return p.data(name="folder", path=str(p.tmp / "split"))


@case(2, "data: the path is empty", "a folder")
def update_with_an_empty_path(p: Place) -> list[str]:
    return ["update", str(p.world / "fresh"), "--data", ""]


@case(2, "list.txt", ".csv, .jsonl or .json", "folder")
def update_with_what_is_no_data(p: Place) -> list[str]:
    return ["update", str(p.world / "fresh"), "--data", p.text("a b c", "list.txt")]


# -- pictures to predict ------------------------------------------------------------------------------------


@case(2, "gone.png", "no such file or folder")
def predict_a_missing_file(p: Place) -> list[str]:
    return ["predict", str(p.world / "learned"), str(p.tmp / "gone.png")]


@case(1, "notes.txt", "not a picture")
def predict_a_text_file(p: Place) -> list[str]:
    return ["predict", str(p.world / "learned"), p.text("no picture", "notes.txt")]


@case(1, "torn.jpg", "truncated")
def predict_a_truncated_jpeg(p: Place) -> list[str]:
    whole = p.tmp / "whole.jpg"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(whole)
    return ["predict", str(p.world / "learned"), p.text(whole.read_bytes()[:1500], "torn.jpg")]


@case(1, "empty", "no picture found", ".png")
def predict_an_empty_folder(p: Place) -> list[str]:
    (p.tmp / "empty").mkdir()
    return ["predict", str(p.world / "learned"), str(p.tmp / "empty")]


@case(1, "fresh", "learned nothing yet", "perpetune update")
def predict_with_nothing_learned(p: Place) -> list[str]:
    return p.predict(p.world / "fresh")


# -- state folders ------------------------------------------------------------------------------------------


def rewrite(folder: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """Change one file of a task's folder and make the manifest fit: a writer's fault, not a torn file."""
    files = task_files(folder)
    shutil.rmtree(folder)
    write_folder(folder, {**files, name: change(files[name])})
    seal(folder.parent.parent)


def last_task(state: Path) -> Path:
    return max((state / "tasks").iterdir())


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[bytes], bytes]:
    return lambda content: save(change(load(content)))


@case(1, "nowhere", "does not exist", "perpetune init")
def state_missing(p: Place) -> list[str]:
    return p.predict(p.tmp / "nowhere")


@case(1, "images", "not a state folder", "recipe.yaml", "perpetune init")
def state_is_a_folder_of_pictures(p: Place) -> list[str]:
    return p.predict(p.world / "images")


@case(1, "state", "not a state folder", "recipe.yaml")
def state_without_recipe(p: Place) -> list[str]:
    state = p.state()
    (state / "recipe.yaml").unlink()
    return ["report", str(state)]


@case(1, "state/recipe.yaml", "line", "not YAML")
def state_with_a_torn_recipe(p: Place) -> list[str]:
    state = p.state()
    whole = (state / "recipe.yaml").read_text()
    (state / "recipe.yaml").write_text(whole[: whole.index("rank") + 2])
    return ["log", str(state)]


@case(1, "state/recipe.yaml", "torn", "restore")
def state_with_a_recipe_that_ends_early(p: Place) -> list[str]:
    state = p.state()
    whole = (state / "recipe.yaml").read_text()
    (state / "recipe.yaml").write_text(whole[: whole.index("stream:")])
    return p.predict(state)


@case(1, "backbone.json", "torn")
def state_with_a_torn_backbone_file(p: Place) -> list[str]:
    state = p.state()
    (state / "backbone.json").write_bytes((state / "backbone.json").read_bytes()[:20])
    return p.predict(state)


@case(1, "journal.jsonl, line 2", "JSON", "restore")
def state_with_a_torn_journal(p: Place) -> list[str]:
    state = p.state()
    lines = (state / "journal.jsonl").read_text().splitlines()
    (state / "journal.jsonl").write_text("\n".join([lines[0], lines[1][:15], *lines[2:], ""]))
    return ["log", str(state)]


@case(1, "pack.safetensors", "torn or was changed", "perpetune rollback", "--to cat-dog")
def state_with_torn_tensors(p: Place) -> list[str]:
    state = p.state()
    path = last_task(state) / "pack.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    return p.predict(state)


@case(1, "pack.safetensors", "torn or was changed", "perpetune rollback", "--to cat-dog")
def state_with_one_bit_changed(p: Place) -> list[str]:
    state = p.state()
    path = last_task(state) / "pack.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return p.predict(state)


@case(1, "pack.safetensors", "No such file", "restore")
def state_with_a_missing_file(p: Place) -> list[str]:
    state = p.state()
    (last_task(state) / "pack.safetensors").unlink()
    return p.predict(state)


@case(1, MANIFEST, "not valid JSON", "restore")
def state_with_a_torn_manifest(p: Place) -> list[str]:
    state = p.state()
    path = last_task(state) / MANIFEST
    path.write_bytes(path.read_bytes()[:30])
    return p.predict(state)


@case(1, "pet.safetensors", "missing", ".down")
def state_with_a_missing_tensor(p: Place) -> list[str]:
    state = p.state()
    rewrite(last_task(state), "pet.safetensors", tensors(lambda t: {n: v for n, v in t.items() if "down" not in n}))
    return p.predict(state)


@case(1, "pet.safetensors", "unexpected", "stranger")
def state_with_an_unexpected_tensor(p: Place) -> list[str]:
    state = p.state()
    rewrite(last_task(state), "pet.safetensors", tensors(lambda t: {**t, "stranger": torch.zeros(2)}))
    return p.predict(state)


@case(1, "pet.safetensors", ".down", "(2, 15)", "(2, 16)")
def state_with_a_tensor_of_the_wrong_shape(p: Place) -> list[str]:
    def narrower(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: v[:, :-1].contiguous() if n.endswith(".down") else v for n, v in found.items()}

    state = p.state()
    rewrite(last_task(state), "pet.safetensors", tensors(narrower))
    return p.predict(state)


@case(1, "pet.safetensors", "float64", "float32")
def state_with_a_tensor_of_the_wrong_type(p: Place) -> list[str]:
    state = p.state()
    rewrite(last_task(state), "pet.safetensors", tensors(lambda t: {n: v.double() for n, v in t.items()}))
    return p.predict(state)


@case(1, "head.safetensors", "not a whole safetensors file")
def state_with_tensors_that_are_none(p: Place) -> list[str]:
    state = p.state()
    rewrite(last_task(state), "head.safetensors", lambda _: b"no tensors")
    return p.predict(state)


@case(1, "extra.json", "'model'", "Classifier")
def state_with_extra_state_of_another_form(p: Place) -> list[str]:
    state = p.state()
    rewrite(last_task(state), "extra.json", lambda content: json.dumps({n: {} for n in json.loads(content)}).encode())
    return p.predict(state)


@case(1, "0001-fox-owl", "cells", "cells")
def state_with_metrics_of_another_form(p: Place) -> list[str]:
    state = p.state()
    rewrite(last_task(state), "metrics.json", lambda _: b"{}")
    return ["report", str(state)]


@case(1, "other weights", "fingerprint", "checkpoint")
def state_of_another_backbone(p: Place) -> list[str]:
    state = p.state()
    path, other = state / "recipe.yaml", vit_folder(p.tmp / "other", seed=1)
    path.write_text(path.read_text().replace(str(p.world / "model"), str(other)))
    return p.predict(state)


@case(1, "task 0 is missing", "0001-")
def state_with_a_gap_in_its_tasks(p: Place) -> list[str]:
    state = p.state()
    shutil.rmtree(min((state / "tasks").iterdir()))
    return p.predict(state)


@case(1, "notes", "not the folder of a task", "0003-NAME")
def state_with_a_strange_folder(p: Place) -> list[str]:
    state = p.state()
    (state / "tasks" / "notes").mkdir()
    return p.predict(state)


@case(2, "no task 'birds'", "start", "cat-dog", "fox-owl")
def rollback_to_an_unknown_task(p: Place) -> list[str]:
    return ["rollback", str(p.state()), "--to", "birds"]


@case(1, "nowhere", "does not exist")
def resume_of_nothing(p: Place) -> list[str]:
    return ["resume", str(p.tmp / "nowhere")]


@case(2, "'cat-dog'", "already", "--name")
def update_with_a_taken_name(p: Place) -> list[str]:
    return ["update", str(p.state()), "--data", str(p.world / "images"), "--name", "cat-dog", "-q"]


@case(2, "joint", "perpetune run")
def update_of_joint(p: Place) -> list[str]:
    state = str(p.tmp / "state")
    change = ["--set", "method=joint", "--model", f"folder:{p.world / 'model'}", "--device", "cpu"]
    return ["init", state, *change, "--data", str(p.world / "images"), "-q"]


@case(2, "state", "already", "perpetune update")
def init_of_what_is_there(p: Place) -> list[str]:
    return ["init", str(p.state())]


@case(2, "LoRA only", "Adapter")
def export_without_lora(p: Place) -> list[str]:
    state = p.tmp / "plain"
    Learner({**p.base(), "pet": "adapter", "data": None}, state).learn(p.world / "images")
    return ["export", str(state), str(p.tmp / "peft")]


@case(2, "peft", "already", "new folder")
def export_onto_a_folder(p: Place) -> list[str]:
    p.text("mine", "peft/notes.txt")
    return ["export", str(p.world / "learned"), str(p.tmp / "peft")]


@case(1, "images", "not a state folder")
def compare_with_what_is_no_state(p: Place) -> list[str]:
    return ["compare", str(p.world / "learned"), str(p.world / "images")]


@case(1, "report.json", "results")
def compare_with_json_that_is_no_report(p: Place) -> list[str]:
    return ["compare", str(p.world / "learned"), p.text("[1, 2]", "report.json")]


# -- somebody's method --------------------------------------------------------------------------------------


@case(2, "'no.such.module:Method'", "PACKAGE.MODULE:NAME", "No module named 'no'")
def check_of_a_missing_module(p: Place) -> list[str]:
    return ["check", "no.such.module:Method"]


@case(2, "'perpetune.fit:Fit'", "PACKAGE.MODULE:NAME", "no attribute 'Fit'")
def check_of_a_missing_class(p: Place) -> list[str]:
    return ["check", "perpetune.fit:Fit"]


@case(2, "perpetune.fit:FitConfig", "not a class derived from", "perpetune.methods.base.Method")
def check_of_a_class_that_is_no_method(p: Place) -> list[str]:
    return ["check", "perpetune.fit:FitConfig"]


@case(2, "unfinished:Half", "does not define learn")
def check_of_half_a_method(p: Place) -> list[str]:
    p.text("from perpetune import Method\n\n\nclass Half(Method):\n    pass\n", "unfinished.py")
    return ["check", "unfinished:Half"]


@case(2, "'fintune'", "finetune")
def check_of_an_unknown_method(p: Place) -> list[str]:
    return ["check", "fintune"]


@case(2, "--set 'head'", "KEY=VALUE")
def check_with_a_set_without_a_value(p: Place) -> list[str]:
    return ["check", "finetune", "--set", "head"]


@pytest.mark.parametrize("name", CASES)
def test_malformed(
    name: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    make, code, words = CASES[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    arguments = make(Place(tmp_path, world))
    capfd.readouterr()
    assert call(arguments) == code
    said = capfd.readouterr()
    lines = [line for line in said.err.splitlines() if line.strip()]
    assert len(lines) == 1, said.err
    assert lines[0].startswith("perpetune: ")
    assert "Traceback" not in said.err + said.out
    assert not [word for word in words if word not in lines[0]], lines[0]
    assert said.out == ""


@pytest.mark.parametrize("name", ["data_folder_missing", "no_test_class_is_in_train", "unknown_role"])
def test_a_run_that_cannot_begin_leaves_no_folder(
    name: str, world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call(CASES[name][0](Place(tmp_path, world))) == CASES[name][1]
    assert not (tmp_path / "out").exists()

"""What the pretrained model knows of pictures and texts, protected from the first step on: with data, or without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_dual import load, side
from tiny import DUAL, SIZE, chiefly, dual_folder, picture_folder, recipe, split_folder, tiny_language_model, vit_folder
from torch import Tensor
from torch.nn import functional as F

from perpetune import Learner
from perpetune.build import build_method, load_backbone
from perpetune.errors import PerpetuneError, UsageError
from perpetune.models.backbone import Backbone
from perpetune.pets import parameters, pets, using
from perpetune.pets.base import submodule
from perpetune.pets.lora import LoRA
from perpetune.protection.protection import Protection
from perpetune.recipe import load_recipe, make_recipe

KINDS = (*DUAL, "open_clip")
RNG = torch.Generator().manual_seed(5)
OLD, NEW = torch.randint(0, 256, (2, 3, 3, SIZE, SIZE), dtype=torch.uint8, generator=RNG)
BEFORE, AFTER = ["a", "b"], ["dog", "fox", "good"]
AT = ["q", "v", "fc1", "fc2"]
PET = {"name": "lora", "rank": 4, "at": [f"{tower}.{role}" for tower in ("picture", "text") for role in AT]}


def wide_folder(path: Path, kind: str) -> Path:
    """A dual encoder whose text tower has room beside the tokens of two short texts."""
    if kind == "open_clip":
        test_openclip = pytest.importorskip("test_openclip")
        return Path(test_openclip.folder_of(path, "plain"))
    more = {"projection_size": 16, "intermediate_size": 128} if kind.startswith("Siglip") else {}
    return dual_folder(path, kind, hidden_size=64, **more)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for kind in KINDS:
        try:
            made[kind] = wide_folder(tmp_path_factory.mktemp(kind.split()[0]), kind)
        except pytest.skip.Exception:
            continue
    return made


def scores(backbone: Backbone, pixels: Tensor, texts: list[str]) -> Tensor:
    words = F.normalize(side(backbone).of(texts), dim=-1)
    return side(backbone).scale * F.normalize(backbone.features(pixels), dim=-1) @ words.T


def tuned(folder: Path, protect: dict[str, Any] | None, only: str | None = None) -> tuple[float, float]:
    """How far old scores move in 60 steps of AdamW on other pairs, as a share of their size; and the share of the new
    loss that is left.

    Args:
        only: the tower that is protected; the other one trains free.
    """
    backbone = load(folder)
    given = {"backbone": "perpetune:micro", "pet": PET, "head": {"name": "text"}, "protect": {"energy": 1.0}}
    method = build_method(make_recipe(given | {"protect": {"energy": 1.0, **(protect or {})}}), backbone)
    protection = method.protection
    assert isinstance(protection, Protection)
    if only is not None:
        protection.sites = [w for w in protection.sites if w.tower == only]

    def show(item: Any) -> None:
        if isinstance(item, Tensor):
            method.model.features(item)  # type: ignore[arg-type]
        else:
            method.observe_texts(item)

    with using(backbone.net, "default"):
        old = scores(backbone, OLD[:2], BEFORE).detach()
        protection.consolidate([OLD[:2], BEFORE], show)
        torch.testing.assert_close(scores(backbone, OLD[:2], BEFORE), old)
        trained = [p.requires_grad_() for p in parameters(backbone.net, "default")]
        optimizer = torch.optim.AdamW(trained, lr=0.01)
        guard = None if protect is None else protection.guard(optimizer)
        losses = []
        for _ in range(61):
            optimizer.zero_grad()
            loss = F.cross_entropy(scores(backbone, NEW, AFTER), torch.arange(3))
            losses.append(float(loss.detach()))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        if guard is not None:
            guard.remove()
        moved = (scores(backbone, OLD[:2], BEFORE).detach() - old).abs().max() / old.abs().max()
    return float(moved), losses[-1] / losses[0]


@pytest.mark.parametrize("kind", chiefly(KINDS, [kind for kind in KINDS if kind != "Siglip2"]))
def test_old_scores_of_pictures_and_texts_stay_while_new_pairs_are_learned(folders: dict[str, Path], kind: str) -> None:
    if kind not in folders:
        pytest.skip("open_clip is not installed")
    moved, left = tuned(folders[kind], {})
    assert moved <= 1e-5
    assert left < 0.05


@pytest.mark.parametrize("kind", chiefly(KINDS, ["CLIP"]))
def test_the_controls_move_them(folders: dict[str, Path], kind: str) -> None:
    if kind not in folders:
        pytest.skip("open_clip is not installed")
    free, _ = tuned(folders[kind], None)
    gradient, _ = tuned(folders[kind], {"project": "gradient"})
    picture, text = (tuned(folders[kind], {}, only=tower)[0] for tower in ("picture", "text"))
    assert free > 0.5
    assert gradient > 0.1
    assert picture > 0.3
    assert text > 0.3


# -- in a recipe ----------------------------------------------------------------------------------------


def plan(folder: Path, data: Path | None, **changes: Any) -> dict[str, Any]:
    given = {"pet": PET, "head": {"name": "text"}, "train": {"epochs": 1, "batch_size": 8, "lr": 0.01}}
    return recipe(folder, data, **{**given, **changes})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("world")
    split_folder(path / "data", ["cat", "elk", "fox", "owl"], 6, 2)
    picture_folder(path / "photos", ["g", "h"], 4)
    (path / "names.txt").write_text("red panda\n\notter\n")
    return path


def moments(learner: Learner) -> dict[str, int]:
    """The rows that each site of a tower's first layer has seen."""
    protection = learner.method.protection
    assert protection is not None
    return {f"{w.tower}.{w.kind}": int(protection.of(w).figures["count"]) for w in protection.sites}


def test_reference_texts_and_the_texts_of_a_task_are_seen_once_in_all_templates(
    folders: dict[str, Path], world: Path
) -> None:
    names = {"list": ["red panda", "otter"], "file": str(world / "names.txt"), "vocabulary": None}
    templates = ["a {}.", "one {}"]
    for how, texts in names.items():
        vocabulary = names["list"] if texts is None else None
        protect = {"energy": 0.9, "reference": {"path": str(world / "photos"), "texts": texts}}
        head = {"name": "text", "templates": templates, "vocabulary": vocabulary}
        learner = Learner(plan(folders["CLIP"], world / "data", protect=protect, head=head))
        results = learner.run()
        first, *later = results["protection"]
        assert (first["of"], first["examples"], first["texts"]) == ("reference", 8, 4), how
        assert [(e["of"], e["examples"], e["texts"]) for e in later] == [("task", 12, 4)] * 2
        texts_of = side(learner.method.model.backbone)
        asked = ["red panda", "otter", "cat", "elk", "fox", "owl"]
        rows = int(texts_of.inputs([t.format(name) for name in asked for t in templates]).mask.sum())
        seen = moments(learner)
        assert seen["text.down"] == seen["text.up"] == rows
        assert seen["picture.down"] == (8 + 24) * 5


def test_only_texts_where_only_their_tower_is_tuned(folders: dict[str, Path], world: Path) -> None:
    pet = {"name": "lora", "rank": 4, "at": ["text.q", "text.v"]}
    protect = {"reference": {"texts": ["red panda", "otter"]}}
    results = Learner(plan(folders["CLIP"], world / "data", pet=pet, protect=protect)).run()
    first = results["protection"][0]
    assert (first["of"], first["examples"], first["texts"]) == ("reference", 0, 2)


@pytest.mark.parametrize(
    ("reference", "changes", "said"),
    [
        ({"path": "photos"}, {}, "and no text is: give protect.reference.texts, or head.vocabulary"),
        ({"texts": ["otter"]}, {}, "and no picture is: give protect.reference.path"),
        ({"path": "photos", "texts": ["otter"]}, {"pet": "lora"}, "no pet in a text tower is protected"),
        ({}, {}, "nothing is named: give path"),
        ({"weights": True, "path": "photos"}, {}, "weights needs no data"),
        ("weights", {"pet": {"name": "adapter"}}, "weights is for pets at linear layers, such as lora, and"),
        ({"path": "photos", "texts": "nowhere.txt"}, {}, "protect.reference.texts: cannot read 'nowhere.txt'"),
        ({"path": "photos", "texts": ["otter", " "]}, {}, "protect.reference.texts has an empty name"),
    ],
)
def test_what_nobody_would_see_is_said_before_anything_is_learned(
    folders: dict[str, Path], world: Path, reference: Any, changes: dict[str, Any], said: str
) -> None:
    if isinstance(reference, dict) and "path" in reference:
        reference = {**reference, "path": str(world / "photos")}
    with pytest.raises(UsageError, match=said) as caught:
        Learner(plan(folders["CLIP"], world / "data", protect={"reference": reference}, **changes)).run()
    assert "\n" not in str(caught.value)


def test_a_text_tower_that_nobody_reads_is_named(folders: dict[str, Path], world: Path) -> None:
    learner = Learner(plan(folders["CLIP"], world / "data", head="linear", protect=True))
    with pytest.raises(PerpetuneError, match=r"is in the text tower and saw no text: give protect.reference.texts"):
        learner.run()


# -- without data ---------------------------------------------------------------------------------------


def test_weights_protect_the_leading_directions_of_the_frozen_layers(folders: dict[str, Path]) -> None:
    """By hand: the fewest right singular vectors of q's and v's rows with 60 % of the sum of σ²."""
    protect = {"energy": 0.95, "reference": {"weights": True, "energy": 0.6}}
    backbone = load(folders["open_clip"] if "open_clip" in folders else folders["CLIP"])
    given = {"backbone": "perpetune:micro", "pet": {**PET, "at": ["q", "v"]}, "head": "text", "protect": protect}
    method = build_method(make_recipe(given), backbone)
    protection = method.protection
    assert isinstance(protection, Protection)
    with torch.no_grad(), using(backbone.net, "default"):
        plain = backbone.features(OLD)
        protection.consolidate_weights()
        assert torch.equal(backbone.features(OLD), plain)
    places = {place.path: place for place in backbone.pet_places(["q", "v"])}
    downs = [w for w in protection.sites if w.kind == "down"]
    assert len(downs) == len(places)
    for watched, place in zip(downs, places.values(), strict=True):
        layer = submodule(backbone.net, place.path)
        assert isinstance(layer, torch.nn.Linear)
        rows = torch.cat([layer.weight[start:stop] for start, stop in place.parts]).double()
        _, sizes, vectors = torch.linalg.svd(rows, full_matrices=False)
        shares = sizes.square().cumsum(0) / sizes.square().sum()
        count = int((shares < 0.6).sum()) + 1
        (subspace,) = protection.of(watched).subspaces
        assert subspace.rank == count
        leading = vectors[:count]
        torch.testing.assert_close(subspace.keep(leading), leading, atol=1e-9, rtol=0)
        assert float((watched.site.operand.weight @ leading.float().T).abs().max()) < 1e-5  # A begins in what is free
    assert all(protection.of(w).room > 0 for w in protection.sites if w.kind == "up")


def test_weights_in_a_run_of_any_backbone_and_their_control(tmp_path: Path, world: Path) -> None:
    """The rows of the frozen weights are answered as before; without protection they are not."""
    vit = vit_folder(tmp_path / "vit")
    changed = {}
    for protect in ({"energy": 0.9, "reference": {"weights": True, "energy": 1.0 - 1e-9}}, None):
        plan_ = recipe(vit, world / "data", protect=protect, train={"epochs": 3, "batch_size": 8, "lr": 0.02})
        plan_["pet"] = {"name": "lora", "rank": 4, "at": ["fc2"]}  # 32 columns and 16 rows: half is free
        learner = Learner(plan_)
        results = learner.run()
        (pet,) = pets(learner.method.model, "default")
        assert isinstance(pet, LoRA)
        (place,) = learner.method.model.backbone.pet_places(["fc2"])
        layer: Any = place.module
        with torch.no_grad():
            moved = layer.weight @ pet.down.T @ pet.up_matrix().T
            changed[protect is not None] = float(moved.norm() / (layer.weight @ layer.weight.T).norm())
        if protect is not None:
            assert [e["of"] for e in results["protection"]] == ["reference", "task", "task"]
            assert results["protection"][0]["energy"] == 1.0 - 1e-9
    assert changed[True] < 1e-5 < 1e-3 < changed[False]


def test_weights_of_a_language_model(tmp_path: Path) -> None:
    for kind in ("llama", "gpt2"):
        backbone = load_backbone(f"hf:{tiny_language_model(tmp_path / kind, kind)}")
        given = {"backbone": "perpetune:micro", "pet": {"name": "lora", "at": ["q", "v"]}, "head": "lm"}
        method = build_method(make_recipe({**given, "protect": {"reference": "weights", "energy": 0.5}}), backbone)
        assert isinstance(method.protection, Protection)
        certificate = method.protection.consolidate_weights()
        assert all(0 < s["room"] < 1 for s in certificate["sites"] if s["site"].endswith("down"))


def test_a_short_form_and_what_recipes_wrote_before(tmp_path: Path) -> None:
    made = make_recipe({"protect": {"reference": "weights"}})
    assert made.protect is not None
    assert made.protect.reference is not None
    assert made.protect.reference.weights
    plain = make_recipe({"protect": {"reference": {"path": "photos"}}}).model_dump(mode="json")["protect"]
    assert plain["reference"] == {"path": "photos", "samples": "all"}
    assert "text_energy" not in plain
    (tmp_path / "weights").mkdir()
    (tmp_path / "photos").mkdir()
    (tmp_path / "names.txt").write_text("otter\n")
    for given, wanted in (
        ("weights", ("weights", None)),
        ("photos", (str(tmp_path / "photos"), None)),
        ("{path: photos, texts: names.txt}", (str(tmp_path / "photos"), str(tmp_path / "names.txt"))),
    ):
        (tmp_path / "own.yaml").write_text(f"protect: {{reference: {given}}}\n")
        found = load_recipe(tmp_path / "own.yaml").protect
        assert found is not None
        assert found.reference is not None
        named = "weights" if found.reference.weights else found.reference.path
        assert (named, found.reference.texts) == wanted


def test_energy_of_each_tower(folders: dict[str, Path], world: Path) -> None:
    protect = {"energy": 0.99, "text_energy": 0.3}
    learner = Learner(plan(folders["CLIP"], world / "data", protect=protect))
    results = learner.run()
    protection = learner.method.protection
    assert protection is not None
    for watched, entry in zip(protection.sites, results["protection"][0]["sites"], strict=True):
        assert entry.get("energy") == (0.3 if watched.tower == "text" else None)
    both = Learner(plan(folders["CLIP"], world / "data", protect={"energy": 0.99}))
    both.run()
    assert both.method.protection is not None
    ranks = [{w.name: p.of(w).rank for w in p.sites} for p in (protection, both.method.protection)]
    fewer = [w.name for w in protection.sites if ranks[0][w.name] < ranks[1][w.name]]
    assert fewer
    assert all("text" in name for name in fewer)

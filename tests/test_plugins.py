"""Another package adds a choice on every axis: it is installed as anybody would, and used by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import vit_folder, written
from warm import Warm

from perpetune import registry
from perpetune.build import load_backbone
from perpetune.check import check_method
from perpetune.cli import call
from perpetune.errors import UsageError
from perpetune.learner import Learner
from perpetune.sequence import origin_of

PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "perpetune-garden"
version = "0.1"

[project.entry-points."perpetune.methods"]
prune = "garden:Prune"
[project.entry-points."perpetune.pets"]
graft = "garden:Graft"
[project.entry-points."perpetune.heads"]
bloom = "garden:Bloom"
[project.entry-points."perpetune.backbones"]
trunk = "garden:load_trunk"
[project.entry-points."perpetune.data"]
seeds = "garden:Seeds"

[tool.hatch.build.targets.wheel]
only-include = ["garden.py"]
"""

GARDEN = '''
"""A plug-in that uses nothing but what perpetune gives away."""

import io
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import perpetune
from perpetune.data.pictures.tables import MemoryTable
from perpetune.data.sources import Source
from perpetune.fit import fit
from perpetune.data.pictures.view import PictureView
from perpetune.pets import parameters, using


class Prune(perpetune.Method):
    """Trains the pet and the head, then makes small weights of the pet zero."""

    def __init__(self, model, *, train: perpetune.FitConfig, below: float = 1e-6):
        super().__init__(model)
        self.config, self.below = train, below

    def learn(self, task):
        self.model.grow(task)
        pet = parameters(self.model, "default")
        fit(self.loss, [*pet, *self.model.head.parameters()], task, self.config)
        with torch.no_grad():
            for p in pet:
                p[p.abs() < self.below] = 0
        with using(self.model, "default"):
            self.model.summarise(task, self.config.batch_size)

    def loss(self, task, batch):
        with using(self.model, "default"):
            return self.model.loss(task, batch)

    def predict(self, inputs: Tensor) -> Tensor:
        with using(self.model, "default"):
            return self.model.predict(inputs)


class Graft(perpetune.PET):
    """Adds a learned offset to what the frozen layer gives."""

    default_at = ("fc1",)

    def __init__(self, place, generator, *, factor: float = 1.0):
        super().__init__()
        self.factor, self.offset = factor, nn.Parameter(torch.zeros(place.d_out))

    def forward(self, base, x, *args, **kwargs):
        return base(x, *args, **kwargs) + self.factor * self.offset


class Bloom(perpetune.Head):
    """A linear head without an offset."""

    def __init__(self, dim: int, *, shape: Literal["round", "star"] = "round"):
        super().__init__(dim)
        self.shape, self.weight = shape, nn.Parameter(torch.empty(0, dim), requires_grad=False)

    def forward(self, features):
        return features @ self.weight.T

    def resize(self, rows, generator):
        new = torch.randn(max(0, rows - len(self.weight)), self.dim, generator=generator) / 10
        self.weight = nn.Parameter(torch.cat([self.weight.detach()[:rows], new.to(self.weight)]), requires_grad=False)


def load_trunk(rest, *, pretrained, image_size, architecture, load_in_4bit, seed):
    """`trunk:FOLDER`: a transformer whose features are doubled."""
    inner = perpetune.load_backbone(f"folder:{rest}", pretrained=pretrained)
    view = PictureView(inner.preprocess.size)
    return perpetune.Backbone(
        inner.net, spec=f"trunk:{rest}", dim=inner.dim, preprocess=view, forward=lambda net, x: 2 * inner(x)
    )


class Seeds(Source):
    """Coloured squares."""

    def __init__(self, *, colours: list[str] = ["red", "green", "blue", "white"], each: int = 6):  # noqa: B006
        self.colours, self.each = colours, each

    def train(self):
        return self._sow(0, self.each)

    def test(self):
        return self._sow(1000, 3)

    def _sow(self, first, count):
        numbers = range(first, first + count)
        labels = [colour for colour in self.colours for _ in numbers]
        keys = [f"{colour}-{n}" for colour in self.colours for n in numbers]
        return MemoryTable([_square(c, n) for c in self.colours for n in numbers], labels, keys, "seeds")


def _square(colour, number):
    pixels = np.array(Image.new("RGB", (16, 16), colour), dtype=np.int16)
    pixels += np.random.default_rng(number).integers(-20, 21, pixels.shape, dtype=np.int16)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()
'''


@pytest.fixture(scope="module")
def garden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a plug-in was installed into by pip."""
    project, target = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("site")
    (project / "pyproject.toml").write_text(PROJECT)
    (project / "garden.py").write_text(GARDEN)
    options = "--quiet --no-index --no-deps --no-build-isolation --disable-pip-version-check --no-compile".split()
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(project)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture
def installed(garden: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The plug-in is there for this process."""
    monkeypatch.syspath_prepend(str(garden))
    return garden


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vit_folder(tmp_path_factory.mktemp("vit"))


def planted(vit: Path) -> dict[str, Any]:
    return {
        "name": "planted",
        "backbone": f"trunk:{vit}",
        "pet": {"name": "graft", "factor": 2.0},
        "method": {"name": "prune", "below": 1e-5, "train": {"epochs": 2}},
        "head": {"name": "bloom", "shape": "star"},
        "train": {"batch_size": 6, "lr": 0.05},
        "data": {"name": "seeds", "each": 5},
        "stream": {"classes_per_task": 2, "class_order": "sorted"},
        "run": {"device": "cpu"},
    }


def test_a_recipe_that_names_nothing_of_ours_runs_from_the_command_line(
    warm: Warm, garden: Path, vit: Path, tmp_path: Path
) -> None:
    (tmp_path / "planted.yaml").write_text(yaml.safe_dump(planted(vit)))
    python_path = os.pathsep.join([str(garden), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = subprocess.run(
        [*warm.command, "-m", "perpetune", "run", "planted.yaml", "--out", "state", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": python_path},
    )
    assert done.returncode == 0, done.stderr
    results = written(done.stdout, "done")[0]["results"]
    assert [t["classes"] for t in results["tasks"]] == [["blue", "green"], ["red", "white"]]
    assert results["cells"][0][0]["correct"] >= 5  # of 6
    assert results["trainable_parameters"] == 32  # one offset over the width of fc1
    recipe = yaml.safe_load((tmp_path / "state" / "recipe.yaml").read_text())
    assert recipe["pet"] == {"name": "graft", "at": ["fc1"], "blocks": None, "factor": 2.0}
    assert recipe["head"] == {"name": "bloom", "shape": "star"}
    assert recipe["method"]["below"] == 1e-5
    assert recipe["data"] == {"name": "seeds", "colours": ["red", "green", "blue", "white"], "each": 5}


def test_its_state_is_loaded_and_used_like_any_other(installed: Path, vit: Path, tmp_path: Path) -> None:
    learner = Learner(planted(vit), tmp_path / "state")
    learner.run()
    again = Learner.load(tmp_path / "state")
    assert again.evaluate() == learner.evaluate()
    assert again.learn({"name": "seeds", "colours": ["black", "red"]}, name="more")["tasks"][2]["classes"] == [
        "black",
        "red",
    ]
    assert again.method.classes == ["blue", "green", "red", "white", "black"]


def test_its_choices_go_with_ours(installed: Path, vit: Path) -> None:
    bare = {"method": "finetune", "pet": "none"}
    for changes in ({"method": "finetune"}, {"pet": "lora"}, {"head": "ncm"}, bare, {"data": "digits"}):
        few = {"stream": {"classes_per_task": 4, "train_per_class": 2, "test_per_class": 1}}
        results = Learner({**planted(vit), **few, **changes}).run()
        assert results["complete"]


def test_its_method_keeps_the_contract(installed: Path) -> None:
    outcomes = check_method("prune", ["pet=graft", "head=bloom"])
    assert [f"{o.rule}: {o.fault}" for o in outcomes if o.fault] == []


def test_everything_it_brings_is_listed_beside_ours(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["methods", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    brought = {"methods": "prune", "pets": "graft", "heads": "bloom", "backbones": "trunk", "data": "seeds"}
    for kind, name in brought.items():
        assert list(found[kind])[-1] == name
        assert len(found[kind]) > 1
    assert found["pets"]["graft"]["is"] == "Adds a learned offset to what the frozen layer gives."
    assert found["pets"]["graft"]["options"]["factor"] == "1.0"
    assert call(["methods"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in brought.values())
    assert "Adds a learned offset to what the frozen layer gives." in out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pet": {"name": "graft", "faktor": 2}}, "pets: graft: faktor is not an option; one of factor"),
        ({"head": {"name": "bloom", "shape": "square"}}, "heads: bloom: shape: input should be 'round' or 'star'"),
        ({"data": {"name": "seeds", "each": "many"}}, "data: seeds: each: input should be a valid integer"),
        ({"method": "prunes"}, "methods: there is no 'prunes'; closest: prune"),
        ({"method": "x" * 5000}, "methods: there is no '" + "x" * 100 + "'… (5,000 characters); closest: "),
        ({"backbone": "trunks:x"}, "there is no prefix 'trunks'; closest: trunk"),
    ],
)
def test_its_options_are_checked_as_ours_are(changes: dict[str, Any], said: str, installed: Path, vit: Path) -> None:
    with pytest.raises(UsageError) as caught:
        Learner({**planted(vit), **changes})
    assert said in str(caught.value)


def test_without_it_its_names_are_unknown(vit: Path) -> None:
    for kind, name in (("methods", "prune"), ("pets", "graft"), ("heads", "bloom"), ("data", "seeds")):
        assert name not in registry.names(kind)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="there is no 'prune'"):
        Learner(planted(vit))
    with pytest.raises(UsageError, match="there is no prefix 'trunk'"):
        load_backbone(f"trunk:{vit}")


def weed(folder: Path, points: str, code: str = "") -> Path:
    """A plug-in as pip leaves it, written by hand because it is not whole."""
    info = folder / "weeds-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: weeds\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(points)
    (folder / "weeds.py").write_text(code)
    return folder


BROKEN = [
    ("methods", "x = weeds_gone:X", "'x' of an installed package cannot be loaded: No module named 'weeds_gone'"),
    ("heads", "x = weeds:Missing", "'x' of an installed package cannot be loaded: module 'weeds' has no attribute"),
    ("pets", "x = weeds:Thing", "'x' is not a class derived from perpetune.pets.base.PET"),
    ("data", "x = weeds:Thing", "'x' is not a class derived from perpetune.data.sources.Source"),
    ("methods", "x = weeds:Half", "'x' does not define learn"),
    ("backbones", "x = weeds_gone:load", "'x' of an installed package cannot be loaded: No module named 'weeds_gone'"),
]


@pytest.mark.parametrize(("kind", "point", "said"), BROKEN)
def test_a_plug_in_that_is_broken_is_told_in_one_line(
    kind: str, point: str, said: str, vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "from perpetune import Method\nclass Thing: pass\nclass Half(Method): pass\n"
    monkeypatch.syspath_prepend(str(weed(tmp_path / "site", f"[perpetune.{kind}]\n{point}\n", code)))
    monkeypatch.delitem(sys.modules, "weeds", raising=False)
    key = {"methods": "method", "heads": "head", "pets": "pet", "data": "data", "backbones": "backbone"}[kind]
    with pytest.raises(UsageError) as caught:
        Learner({"backbone": f"folder:{vit}", key: "x:y" if kind == "backbones" else "x"})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


PACKETS = """
from perpetune.data.pictures.folder import FolderSource
from perpetune.data.sources import Fit

class Packets(FolderSource):
    @classmethod
    def fits(cls, path, wanted=None):
        return Fit.NAME if path.endswith(".packet") else Fit.NO
"""


def test_where_nobody_names_a_source_plug_ins_are_asked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = "[perpetune.data]\npackets = weeds:Packets\ngone = weeds_gone:X\n"
    monkeypatch.syspath_prepend(str(weed(tmp_path / "site", points, PACKETS)))
    monkeypatch.delitem(sys.modules, "weeds", raising=False)
    theirs, ours = tmp_path / "spring.packet", tmp_path / "spring"
    theirs.mkdir()
    ours.mkdir()
    assert origin_of(theirs) == {"name": "packets", "path": str(theirs)}
    assert origin_of(ours) == {"name": "folder", "path": str(ours)}


def test_a_plug_in_without_a_path_is_meant_by_its_name(installed: Path) -> None:
    assert origin_of("seeds") == {"name": "seeds"}


def test_a_plug_in_does_not_take_the_place_of_ours(vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = "[perpetune.heads]\nlinear = weeds_gone:X\n[perpetune.backbones]\nfolder = weeds_gone:X\n"
    monkeypatch.syspath_prepend(str(weed(tmp_path / "site", points)))
    assert registry.find("heads", "linear").__module__ == "perpetune.heads.linear"
    assert registry.names("heads").count("linear") == 1
    assert load_backbone(f"folder:{vit}").dim == 16

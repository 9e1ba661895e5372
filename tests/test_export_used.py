"""An exported folder alone gives the same answers, with the code of docs/export.md and without perpetune."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny import picture_folder, recipe, tiny_language_model, vit_folder

from perpetune import Learner
from perpetune.cli import call

pytest.importorskip("peft")
DOCS = Path(__file__).resolve().parents[1] / "docs" / "export.md"
CODE = re.search(r"<!-- loader -->\n```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)[1]  # type: ignore[index]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("used")
    vit_folder(root / "model", blocks=2)
    (root / "model" / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "size": {"height": 20, "width": 20},
                "do_center_crop": True,
                "rescale_factor": 0.0078,
                "crop_size": 16,
                "resample": 3,
                "image_mean": [0.4, 0.5, 0.6],
                "image_std": [0.2, 0.3, 0.4],
            }
        )
    )
    picture_folder(root / "m1", ("犬", "b"), 6)
    picture_folder(root / "m2", ("c", "d"), 6)
    Image.open(root / "m1" / "b" / "0.png").resize((31, 17)).save(root / "wide.png")
    return root


def same(made: Learner, folder: Path, world: Path) -> None:
    """The exported folder says what the learner says."""
    assert call(["export", str(made.state.folder), str(folder)]) == 0
    names = {"__name__": "reader"}
    exec(CODE, names)
    pictures = [str(world / p) for p in ("m1/犬/0.png", "m1/b/1.png", "m2/c/2.png", "m2/d/3.png", "wide.png")]
    theirs: list[tuple[str, float]] = names["predict"](folder, pictures)  # type: ignore[operator]
    for own, (name, value) in zip(made.predict(pictures), theirs, strict=True):
        assert own.name == name
        assert value == pytest.approx(own.classes[0][1], abs=2e-4)


HEADS: list[Any] = [
    "linear", "cosine", {"name": "cosine", "learn_scale": True}, "ncm", {"name": "ncm", "metric": "euclidean"}, "ridge",
    {"name": "ridge", "projection": 24}, {"name": "ridge", "projection": 12, "kind": "orthogonal"},
    {"name": "ridge", "standardise": False},
]  # fmt: skip


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("taps", [None, 2])
def test_every_head_with_lora(head: Any, taps: int | None, world: Path, tmp_path: Path) -> None:
    backbone = {"name": f"folder:{world / 'model'}", "taps": taps}
    made = Learner(recipe(world / "model", backbone=backbone, head=head), tmp_path / "s")
    made.learn(world / "m1")
    made.learn(world / "m2")
    same(made, tmp_path / "out", world)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("tokens", ["class", "mean", "both"])
def test_a_head_alone(tokens: str, world: Path, tmp_path: Path) -> None:
    backbone = {"name": f"folder:{world / 'model'}", "taps": 1, "tokens": tokens}
    content = recipe(world / "model", backbone=backbone, pet="none", method="frozen", head="ridge")
    made = Learner({k: v for k, v in content.items() if k != "train"}, tmp_path / "s")
    made.learn(world / "m1")
    made.learn(world / "m2")
    same(made, tmp_path / "out", world)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"head.json", "head.safetensors"}


@pytest.mark.parametrize("name", ["update", "update-lora"])
def test_a_state_of_a_recipe_of_init(name: str, world: Path, tmp_path: Path) -> None:
    changes = ["--set", "train.epochs=1"] if name == "update-lora" else []
    assert call(["init", str(tmp_path / "s"), "--recipe", name, *changes, "-q"]) == 0
    made = Learner.load(tmp_path / "s", device="cpu")
    made.learn(world / "m1")
    made.learn(world / "m2")
    same(made, tmp_path / "out", world)
    about = json.loads((tmp_path / "out" / "head.json").read_bytes())
    assert about["base"] == "base"
    assert (tmp_path / "out" / "base" / "model.safetensors").is_file()


def test_the_code_needs_no_perpetune(world: Path, tmp_path: Path) -> None:
    made = Learner(recipe(world / "model"), tmp_path / "s")
    made.learn(world / "m1")
    assert call(["export", str(tmp_path / "s"), str(tmp_path / "out")]) == 0
    block = "import sys; sys.modules['perpetune'] = None\n"
    code = f"{block}{CODE}\nprint(predict({str(tmp_path / 'out')!r}, [{str(world / 'm1/b/0.png')!r}]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[('")


def test_a_language_model_without_pet_has_nothing_to_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_language_model(tmp_path / "lm")
    rows = [{"prompt": f"q {n}", "answer": str(n), "options": ["0", "1"]} for n in (0, 1, 0, 1)]
    (tmp_path / "d.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    made = Learner(
        {"name": "t", "backbone": f"folder:{tmp_path / 'lm'}", "pet": "none", "method": "frozen", "head": "lm"},
        tmp_path / "s",
    )
    made.learn(tmp_path / "d.jsonl")
    assert call(["export", str(tmp_path / "s"), str(tmp_path / "out")]) == 1 + 1
    assert "there is nothing to export: the recipe has `pet: none`" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

"""ONNX exports: one graph that answers as the state does, for any batch."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_export_used import world as world
from tiny import recipe, tiny_language_model
from warm import Warm

from perpetune import Learner
from perpetune.check import Checker
from perpetune.cli import call
from perpetune.errors import MissingExtra, PerpetuneError, UsageError
from perpetune.export import export_learned
from perpetune.recipe import make_recipe

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def learned(world: Path, folder: Path, **changes: Any) -> Learner:
    made = Learner(recipe(world / "model", **changes), folder)
    made.learn(world / "m1")
    made.learn(world / "m2")
    return made


def test_the_command_writes_one_graph(world: Path, tmp_path: Path, warm: Warm) -> None:
    """With taps, LoRA, a projection, and frozen features beside; for one picture and for several."""
    backbone = {"name": f"folder:{world / 'model'}", "taps": 2}
    method = {"name": "first_session", "concat": True}
    made = learned(world, tmp_path / "s", backbone=backbone, method=method, head={"name": "ridge", "projection": 24})
    shown = [*warm.command, "-m", "perpetune", "export", str(tmp_path / "s"), str(tmp_path / "out"), "--to", "onnx"]
    done = subprocess.run([*shown, "--images", str(world / "m1")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == f"{tmp_path / 'out'}: README.md, model.onnx"
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    said = session.get_modelmeta().custom_metadata_map
    assert json.loads(said["classes"]) == made.method.classes
    assert json.loads(said["image"])["size"] == 16
    view: Any = made.method.model.view
    files = sorted((world / "m2").glob("*/*.png"))
    pixels = torch.stack([view.load(file) for file in files])
    for some in (pixels, pixels[:1]):
        (scores,) = session.run(["scores"], {"pixels": some.numpy()})
        ours = made.predict(some)
        for row, one in zip(torch.tensor(scores).softmax(1), ours, strict=True):
            wanted = pytest.approx(dict(one.classes), abs=1e-4)
            assert dict(zip(made.method.classes, row.tolist(), strict=True)) == wanted
    assert "largest difference" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow  # the same check keeps merged models out, and runs there
def test_a_graph_that_answers_otherwise_is_not_kept(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import perpetune.export.onnx as module

    made = learned(world, tmp_path / "s", head="linear")
    real = module._runtime

    def turned(file: Path) -> Any:
        answer = real(file)
        return lambda pixels: np.flip(answer(pixels), 1).copy()

    monkeypatch.setattr(module, "_runtime", turned)
    with pytest.raises(PerpetuneError, match=r"does not answer as the state does, so it is not kept. On 12 pictures"):
        made.export(tmp_path / "out", to="onnx", images=world / "m1")
    monkeypatch.setattr(module, "PACKAGES", ("onnx_that_is_not_there",))
    with pytest.raises(MissingExtra, match=r"perpetune\[onnx\]"):
        made.export(tmp_path / "out", to="onnx")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"method": {"name": "treelora", "answer": "routed"}},
        {"method": {"name": "pool", "select": "gaussian"}, "head": "ridge"},
        {"average": {"keep": 0.5, "answer": "both"}},
    ],
    ids=["treelora", "pool", "average"],
)
def test_answers_that_differ_by_example_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    lora = {"name": "lora", "rank": 2}
    checker = Checker(make_recipe({"pet": lora, "train": {"epochs": 1, "batch_size": 8}, **changes}))
    with pytest.raises(UsageError, match=r"--to onnx: .* one graph cannot hold: use the state itself"):
        export_learned(checker.learned(), checker.backbone, tmp_path / "out", to="onnx")
    assert not (tmp_path / "out").exists()


def test_a_language_model_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_language_model(tmp_path / "lm")
    (tmp_path / "d.jsonl").write_text(
        json.dumps({"prompt": "sky", "answer": "blue", "options": ["blue", "red"]}) + "\n"
    )
    plain = {"name": "t", "backbone": f"hf:{tmp_path / 'lm'}", "pet": "none", "method": "frozen", "head": "ncm"}
    made = Learner({**plain, "run": {"device": "cpu"}}, tmp_path / "s")
    made.learn(tmp_path / "d.jsonl", holdout=0)
    assert call(["export", str(tmp_path / "s"), str(tmp_path / "out"), "--to", "onnx"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert "takes texts, and the graph is for pictures: use --to merged or peft" in said[-1]
    assert len(said) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pet", "head", "method"),
    [
        ("lora", "ridge", "first_session"),
        ("adapter", {"name": "ncm"}, "first_session"),
        ("prompt", "cosine", "finetune"),
        ("lora", "ridge", "safe"),
    ],
    ids=["lora", "adapter", "prompt", "safe"],
)
def test_five_hundred_digits_with_the_packaged_model(pet: str, head: Any, method: str, tmp_path: Path) -> None:
    content = {"name": "digits", "backbone": "perpetune:micro", "pet": pet, "head": head, "method": method}
    stream = {"stream": {"classes_per_task": 5}, "data": "digits", "train": {"epochs": 1}, "run": {"device": "cpu"}}
    made = Learner({**content, **stream}, tmp_path / "s")
    made.run()
    made.export(tmp_path / "out", to="onnx")
    card = (tmp_path / "out" / "README.md").read_text()
    print(card[card.index("On 500") :].splitlines()[0])
    assert "On 500 pictures the largest difference" in card

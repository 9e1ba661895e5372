"""tools/pretrain_micro.py: a tiny run writes a folder that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import micro_features
import pretrain_micro
import train_projector
from perpetune.build import load_backbone
from perpetune.errors import PerpetuneError, UsageError

TINY: dict[str, Any] = {
    "image_size": 16,
    "patch": 8,
    "width": 16,
    "depth": 1,
    "heads": 2,
    "epochs": 3,
    "batch_size": 8,
    "held_out": 0.25,
    "device": "cpu",
}


def picture(label: int, rng: np.random.Generator) -> Image.Image:
    """A reddish or a bluish one."""
    pixels = rng.integers(0, 120, (20, 24, 3), dtype=np.uint8)
    pixels[..., 2 * label] += 130
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for label, name in enumerate(("blue-free", "red-free")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(16):
            picture(label, rng).save(tmp_path / "pictures" / name / f"{i}.png")
    return tmp_path / "pictures"


def features(out: Path) -> torch.Tensor:
    from transformers import ViTModel

    model, info = ViTModel.from_pretrained(out, dtype=torch.float32, add_pooling_layer=False, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        return model(torch.zeros(2, 3, 16, 16)).last_hidden_state[:, 0]


def test_supervised_run_writes_a_transformers_folder(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "micro"
    figures = pretrain_micro.pretrain(folder, out, **TINY)
    found = features(out)
    assert found.shape == (2, 16)
    assert found.isfinite().all()
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"
    fed = json.loads((out / "preprocessor_config.json").read_text())
    assert fed["size"] == {"height": 16, "width": 16}
    card = (out / "README.md").read_text()
    assert set(figures) == {
        "held-out pictures: own classifier",
        "held-out pictures: ridge",
        "held-out pictures: nearest mean",
        "scikit-learn digits: ridge",
        "scikit-learn digits: nearest mean",
    }
    for name, accuracy in figures.items():
        assert f"| {name} | {accuracy:.3f} |" in card
    assert figures["held-out pictures: ridge"] == 1.0  # red and blue


def test_same_seed_same_weights_and_a_teacher_changes_them(folder: Path, tmp_path: Path) -> None:
    def run(name: str, **options: Any) -> torch.Tensor:
        pretrain_micro.pretrain(folder, tmp_path / name, **TINY, **options)
        return features(tmp_path / name)

    teacher = {"teacher": "test_efficientnet", "teacher_size": 32, "teacher_pretrained": False}
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    first, again, alone = run("a", **teacher), run("b", **teacher), run("c")
    assert first.isfinite().all()
    assert torch.equal(first, again)
    assert not torch.equal(first, alone)
    assert torch.equal(state, torch.random.get_rng_state())
    assert "test_efficientnet at 32 px" in (tmp_path / "a" / "README.md").read_text()


def test_stopped_run_goes_on_from_its_checkpoint(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: nine steps in one go, and with a stop after step 5 whose checkpoint is of step 4."""

    class Stop(Exception):
        pass

    def stopping(self: pretrain_micro.Lines, done: int, *_: Any) -> None:
        if done == 5:
            raise Stop

    pretrain_micro.pretrain(folder, tmp_path / "whole", **TINY)
    options = {**TINY, "checkpoint": tmp_path / "checkpoint", "checkpoint_every": 2}
    monkeypatch.setattr(pretrain_micro.Lines, "step", stopping)
    with pytest.raises(Stop):
        pretrain_micro.pretrain(folder, tmp_path / "resumed", **options)
    assert json.loads((tmp_path / "checkpoint" / "position.json").read_text())["done"] == 4
    monkeypatch.undo()
    pretrain_micro.pretrain(folder, tmp_path / "resumed", **options)
    assert not (tmp_path / "checkpoint").exists()
    whole, resumed = (tmp_path / name / "model.safetensors" for name in ("whole", "resumed"))
    assert whole.read_bytes() == resumed.read_bytes()


def test_training_lowers_the_loss_on_the_teacher(folder: Path) -> None:
    """The student's projection comes closer to the teacher's features than chance would."""
    from perpetune.data.pictures.view import PictureView
    from perpetune.fit import FitConfig
    from perpetune.runtime import Runtime, Silent

    class Seen(Silent):
        def __init__(self) -> None:
            self.losses: list[float] = []

        def step(self, done: int, epoch: int, loss: float | None, images: int) -> None:
            self.losses += [] if loss is None else [loss]

    preprocess, seen = PictureView(16), Seen()
    runtime = Runtime(progress=seen)
    known, _ = pretrain_micro.split(pretrain_micro.read_table(folder), 0.25, preprocess, 0)
    student = micro_features.Encoder(pretrain_micro.make_student(16, 8, 16, 1, 2, 0), preprocess)
    goal = torch.tensor([[1.0, -1.0, 0.5], [-1.0, 1.0, 0.5]])[known.labels].half()
    weights = pretrain_micro.LossWeights(label=0.0, teacher=1.0)
    config = FitConfig(epochs=20, batch_size=8, lr=3e-3)
    pretrain_micro.train(student, torch.nn.Linear(16, 2), known, goal, weights, config, runtime)
    assert seen.losses[-1] < 0.2
    assert seen.losses[-1] < seen.losses[0]


def test_teacher_features_are_standardised(folder: Path) -> None:
    from perpetune.data.pictures.view import PictureView
    from perpetune.runtime import Runtime

    known, _ = pretrain_micro.split(pretrain_micro.read_table(folder), 0.25, PictureView(16), 0)
    teacher = pretrain_micro.make_teacher("test_efficientnet", 32, pretrained=False, seed=0)
    goal = pretrain_micro.teacher_features(teacher, known, Runtime()).float()
    assert len(goal) == len(known) == 24
    torch.testing.assert_close(goal.mean(0), torch.zeros(goal.shape[1]), atol=1e-2, rtol=0)
    torch.testing.assert_close(goal.std(0), torch.ones(goal.shape[1]), atol=1e-2, rtol=0)


def test_parquet_is_read(tmp_path: Path) -> None:
    import io

    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rng = np.random.default_rng(0)
    rows = []
    for label in (1, 0, 1, 0):
        buffer = io.BytesIO()
        picture(label, rng).save(buffer, "PNG")
        rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "label": label})
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    table = pretrain_micro.read_table(tmp_path / "train.parquet")
    assert list(table.labels) == ["1", "0", "1", "0"]
    assert table.open(0).size == (24, 20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": Path("nowhere")}, "nowhere: no such file or folder"),
        ({"patch": 5}, "--image-size 16 must be a multiple of --patch 5"),
        ({"heads": 3}, "--width 16 of --heads 3"),
        ({"lr": 0.0}, "lr: input should be greater than 0"),
        ({"teacher": "resnet51"}, "--teacher resnet51: not a model of timm"),
    ],
)
def test_bad_usage_leaves_nothing(folder: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(PerpetuneError, match=message):
        pretrain_micro.pretrain(**{"data": folder, "out": tmp_path / "out", **TINY, **change})
    assert not (tmp_path / "out").exists()


def test_never_overwrites_a_model(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match="a model is there already"):
        pretrain_micro.pretrain(folder, tmp_path, **TINY)


@pytest.mark.filterwarnings("ignore:.*no projector is given")
def test_a_projector_is_trained_and_a_pair_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq
    from tiny import tiny_language_model, vit_folder

    rng, rows = np.random.default_rng(0), []
    for i in range(8):
        file = io.BytesIO()
        picture(i % 2, rng).save(file, "PNG")
        rows.append({"image": {"bytes": file.getvalue()}, "label": i % 2})
    about = {"info": {"features": {"label": {"names": ["red_thing", "blue"]}}}}
    table = pa.Table.from_pylist(rows).replace_schema_metadata({"huggingface": json.dumps(about)})
    for split in ("train", "test"):
        pq.write_table(table, tmp_path / f"{split}.parquet")
    vit, lm = vit_folder(tmp_path / "vit"), tiny_language_model(tmp_path / "lm")
    given: dict[str, Any] = {"data": tmp_path, "picture": f"folder:{vit}", "text": f"folder:{lm}"}
    given |= {"architecture": None, "image_size": None, "pool": None, "dtype": "float32"}
    given |= {"per_class": 3, "tested": 2, "epochs": 1, "batch_size": 4}
    out = tmp_path / "out"
    write, whole = train_projector.write_file, train_projector.train_projector

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train_projector, "write_file", killed)  # the run is stopped before the last file
    with pytest.raises(KeyboardInterrupt):
        whole(out=out, **given)
    monkeypatch.setattr(train_projector, "write_file", write)
    figures = whole(out=out, **given)  # and goes on
    assert set(figures) == {"names", "names, pictures of other rows", "tested", "chance"}
    assert (figures["tested"], figures["chance"]) == (4, 0.5)
    answers = [row["answer"] for row in pq.read_table(out / "rows/train.parquet").to_pylist()]
    assert (answers.count("red thing"), answers.count("blue")) == (3, 3)
    file = out / "projector.safetensors"
    assert f"{file.stat().st_size / 1e6:.2f} MB in float16" in (out / "README.md").read_text("utf-8")
    pair = load_backbone(f"pair:{{picture: folder:{vit}, text: folder:{lm}, projector: {file}}}")
    assert pair.pictures is not None
    assert not pair.pictures.drawn
    with pytest.raises(UsageError, match="a projector is there already"):
        whole(out=out, **given)

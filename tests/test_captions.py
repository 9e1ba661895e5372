"""Pictures with captions: how they are read, learned with a contrastive loss, and evaluated by retrieval."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import picture, recipe, vit_folder
from torch.nn import functional as F
from two_towers import caption_file, install, plan

from perpetune.data.guess import guess_source
from perpetune.data.pictures.captions import CaptionSource
from perpetune.data.pictures.view import PictureView
from perpetune.data.stream import StreamOptions, build_stream
from perpetune.errors import DataError, UsageError
from perpetune.evaluate import evaluate
from perpetune.learner import Learner
from perpetune.numerics.retrieval import recall
from perpetune.pets import using
from perpetune.registry import every
from perpetune.report import form, write_report
from perpetune.results import read_results
from perpetune.runtime import Runtime
from perpetune.tasks import captioned, load_batches

NAMES = ["cat", "elk", "fox"]


def write(folder: Path, rows: list[dict[str, Any]], name: str = "some.jsonl") -> str:
    for row in rows:
        if row.get("image"):
            picture(row["image"], 0).save(folder / row["image"])
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def test_rows_of_one_picture_are_one_example_with_all_captions(tmp_path: Path) -> None:
    rows = [
        {"image": "a.png", "caption": " a dog "},
        {"image": "b.png", "caption": "two cats"},
        {"image": "a.png", "caption": "it barks"},
        {"image": "./a.png", "caption": "a dog"},
    ]
    (tmp_path / "csv").mkdir()
    for row in rows:
        picture(row["image"], 0).save(tmp_path / "csv" / row["image"])
    lines = ["image,caption", *(f"{row['image']},{row['caption']}" for row in rows)]
    (tmp_path / "csv" / "some.csv").write_text("\n".join(lines))
    for path in (write(tmp_path, rows), str(tmp_path / "csv" / "some.csv")):
        source = CaptionSource(path=path)
        table = source.train()
        assert [list(table.captions(i)) for i in range(len(table))] == [["a dog", "it barks"], ["two cats"]]
        assert source.test() is None
        assert "a caption stands twice at 1 pictures and is used once" in table.warnings[-1]
        assert guess_source(path, every("data"), "pictures")[0] == "captions"


def test_parquet_holds_the_pictures_itself(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    contents = []
    for number in range(4):
        buffer = io.BytesIO()
        picture("fox", number).save(buffer, "PNG")
        contents.append({"bytes": buffer.getvalue(), "path": None})
    captions = [["a", "b"], ["c"], ["d", "e"], ["f"]]
    splits = ["train", "test", "train", "test"]
    pq.write_table(pa.table({"image": contents, "captions": captions, "split": splits}), tmp_path / "some.parquet")
    source = CaptionSource(path=str(tmp_path / "some.parquet"))
    train, test = source.train(), source.test()
    assert test is not None
    assert [list(train.captions(i)) for i in range(2)] == [["a", "b"], ["d", "e"]]
    assert [list(test.captions(i)) for i in range(2)] == [["c"], ["f"]]
    assert train.open(1).tobytes() == picture("fox", 2).convert("RGB").tobytes()
    assert train.digest(0) != train.digest(1)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"image": "a.png", "caption": ""}, "line 1: column 'caption' holds ''; a caption or a list"),
        ({"image": "a.png", "captions": []}, "line 1: column 'captions' holds no caption"),
        ({"image": "a.png", "captions": ["a", 3]}, "line 1: column 'captions' holds '3'; a caption or a list"),
        ({"image": "a.png", "captions": "x" * 10_001}, "holds 10001 characters; at most 10000 are a caption"),
        ({"image": "", "caption": "a"}, "line 1: no picture .column 'image'."),
        ({"picture": "a.png", "caption": "a"}, "no column 'image'; found: picture, caption; another one is named with"),
        ({"image": "a.png", "text": "a"}, "no column 'captions'; found: image, text; another one is named with"),
        ({"image": "a.png", "caption": "a", "split": "half"}, "line 1: split 'half' is not one of train, test, val"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        CaptionSource(path=write(tmp_path, [row])).train()


def test_there_are_no_classes_to_cut_by(tmp_path: Path) -> None:
    source, view = CaptionSource(path=str(caption_file(tmp_path, NAMES, 3))), PictureView(16)
    for wrong in ({"by": "class"}, {"classes_per_task": 2}, {"class_order": ["cat"]}):
        with pytest.raises(UsageError, match="these pictures have captions and no classes; cut them by task or domain"):
            build_stream(source, StreamOptions(**wrong), view, seed=0)
    stream = build_stream(source, StreamOptions(), view, seed=0)
    assert [(t.name, t.classes, len(t.train), t.score) for t in stream.tasks] == [("captions", (), 9, "retrieval")]
    (tmp_path / "two").mkdir()
    rows = [{"image": f"{i}.png", "caption": f"number {i}", "domain": "ab"[i % 2]} for i in range(6)]
    grouped = CaptionSource(path=write(tmp_path / "two", rows))
    stream = build_stream(grouped, StreamOptions(by="domain", holdout=0.34), view, seed=0)
    assert [t.name for t in stream.tasks] == ["a", "b"]
    assert [len(t.test or ()) for t in stream.tasks] == [1, 1]


def test_a_seed_draws_the_caption(tmp_path: Path) -> None:
    stream = build_stream(
        CaptionSource(path=str(caption_file(tmp_path, NAMES, 3))), StreamOptions(), PictureView(16), seed=0
    )
    train = stream.tasks[0].train
    assert captioned(train)
    assert not train.deterministic
    assert train.load(0, None)[1] == 0
    drawn = [train.load(0, seed)[1] for seed in range(30)]
    assert drawn == [train.load(0, seed)[1] for seed in range(30)]
    assert set(drawn) == {0, 1}
    batch = train.collate([(train.load(i, 4), 0, i) for i in range(3)])
    assert batch.inputs["caption"].shape == (3,)
    assert batch.inputs.pixels.shape == (3, 3, 16, 16)


@pytest.fixture
def learner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Learner:
    install(tmp_path, monkeypatch)
    data = {"name": "captions", "path": str(caption_file(tmp_path / "data", NAMES, 6))}
    train = {"epochs": 20, "batch_size": 9, "lr": 0.03}
    exams = {"find": {"name": "retrieval", "source": data, "nouns": NAMES}}
    return Learner(plan(tmp_path, data, train=train, exams=exams, stream={}), tmp_path / "state")


def shown_both_ways(said: str, before: dict[str, float], after: dict[str, float]) -> None:
    """The report has retrieval from pictures to texts and back, and the gap of what is recognised."""
    section = said.split("\n## Retrieval")[1].split("\n## ")[0]
    for key, label in (("image_to_text_r1", "picture → text R@1"), ("text_to_image_r5", "text → picture R@5")):
        assert f"| find | {label} | {form.percent(before[key])} | {form.percent(after[key])} |" in section
    recognition = said.split("\n## False recognition")[1].split("\n## ")[0]
    assert f"| find | gap | {before['gap']:.3f} | {after['gap']:.3f} |" in recognition
    assert "\n## Exams" not in said, "each number stands once"


def test_a_run_learns_captions_and_is_scored_by_retrieval(learner: Learner, tmp_path: Path) -> None:
    begun = {n: p.detach().clone() for n, p in learner.method.named_parameters() if "default" in n}
    results = learner.run()
    moved = {n for n, p in learner.method.named_parameters() if n in begun and not torch.equal(p, begun[n])}
    assert {tower for tower in ("eye", "ear") for n in moved if f".{tower}." in n} == {"eye", "ear"}
    cell = results["cells"][0][0]
    assert (cell["score"], cell["total"], cell["per_class"]) == ("retrieval", 6, {})
    before, after = (entry["of"]["find"] for entry in results["exams"])
    for direction in ("image_to_text", "text_to_image"):
        assert after[f"{direction}_r1"] > before[f"{direction}_r1"]
        assert after[f"{direction}_r1"] <= after[f"{direction}_r5"] <= after[f"{direction}_r10"]
    assert cell["correct"] == pytest.approx(6 * (after["image_to_text_r1"] + after["text_to_image_r1"]) / 2, abs=1e-5)
    assert after["foils"] > before["foils"]
    assert after["pair_cosine"] > before["pair_cosine"]
    shown_both_ways(write_report(read_results(learner.state), tmp_path)[2].read_text("utf-8"), before, after)
    loaded = Learner.load(learner.state.folder)
    assert loaded.evaluate() == learner.evaluate() == {"captions": cell}


def test_the_loss_shares_targets_and_the_score_is_the_one_of_the_whole_gallery(learner: Learner) -> None:
    task, method = learner._tasks._of_stream(0), learner.method
    batch = next(load_batches(task.train, [[(i, 7 + i) for i in range(9)]], task.runtime))
    side = learner.backbone.texts
    said = [task.train.captions(i) for i in range(9)]
    texts = [said[i][c] for i, c in enumerate(batch.inputs["caption"].tolist())]
    with torch.no_grad(), using(method.model, method.trained):
        loss = method.model.loss(task, batch)
        f = F.normalize(learner.backbone.features(batch.inputs), dim=-1)
        t = F.normalize(side.of(texts), dim=-1)
    shares = torch.tensor([[float(text in captions) for text in texts] for captions in said])
    assert shares.sum() > 9, "captions repeat in this batch"
    logits = 7.0 * f @ t.T
    rows = F.cross_entropy(logits, shares / shares.sum(1, keepdim=True))
    columns = F.cross_entropy(logits.T, (shares / shares.sum(0)).T)
    assert torch.allclose(loss, (rows + columns) / 2, atol=1e-6)
    test = task.test
    assert test is not None
    every_text = list(dict.fromkeys(c for i in range(6) for c in test.captions(i)))
    own = torch.tensor([[text in test.captions(i) for text in every_text] for i in range(6)])
    with torch.no_grad():
        pixels = torch.stack([test.load(i, None)[0] for i in range(6)])
        scores = F.normalize(method.features(pixels), dim=-1) @ F.normalize(side.of(every_text), dim=-1).T
    assert own.sum(0).max() == 2, "a template is the caption of several pictures"
    expected = 6 * (recall(scores, own, 1, 1e-6) + recall(scores.T, own.T, 1, 1e-6)) / 2
    cell = evaluate(method, task, among="seen", batch_size=4)
    assert cell is not None
    assert cell["correct"] == pytest.approx(expected, abs=1e-6)


def test_what_cannot_compare_texts_refuses_captions_before_the_run(tmp_path: Path) -> None:
    data = {"name": "captions", "path": str(caption_file(tmp_path / "data", NAMES, 3))}
    content = recipe(vit_folder(tmp_path / "vit")) | {"data": data, "stream": {}}
    with pytest.raises(
        UsageError, match="task captions has captions and no classes: these need a backbone of pictures"
    ):
        Learner(content, tmp_path / "state")
    assert not (tmp_path / "state").exists()


def by_task(path: Path) -> Path:
    """The file with a task for each kind of picture."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row | {"task": row["image"][:3]}) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"method": {"name": "finetune", "merge": 0.5}},
            "what trains here compares classes: use method: finetune without merge, or joint",
        ),
        ({"evaluate": {"oracle": True}}, "evaluate.oracle solves a head of classes, and task cat has captions"),
    ],
)
def test_what_needs_classes_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], said: str
) -> None:
    install(tmp_path, monkeypatch)
    path = by_task(caption_file(tmp_path / "data", NAMES, 3))
    with pytest.raises(UsageError, match=said):
        Learner(plan(tmp_path, {"name": "captions", "path": str(path)}, stream={}, **changes), tmp_path / "state").run()


def test_several_processes_are_refused(learner: Learner, monkeypatch: pytest.MonkeyPatch) -> None:
    task = learner._tasks.of_stream(0, []).task
    monkeypatch.setattr(Runtime, "world", 2)
    with pytest.raises(UsageError, match="compared with each other inside a batch: train with one process"):
        learner.method.model.grow(task)


def test_joint_training_draws_from_all_captions_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch)
    path = by_task(caption_file(tmp_path / "data", NAMES, 3))
    train = {"epochs": 1, "batch_size": 4, "lr": 0.01}
    content = plan(tmp_path, {"name": "captions", "path": str(path)}, stream={}, method="joint", train=train)
    results = Learner(content, tmp_path / "state").run()
    assert [[cell and cell["total"] for cell in row] for row in results["cells"]] == [
        [2, None, None],
        [2, 2, None],
        [2, 2, 2],
    ]

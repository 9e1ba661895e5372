"""The life of a vision-language model: init, update, predict, evaluate, export, for each family and for pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SIZE, VLMS, chiefly, picture, tiny_language_model, tiny_vision_language, vit_folder, written

from perpetune.cli import call
from perpetune.errors import UsageError
from perpetune.learner import Learner
from perpetune.models.vision_language import VisionLanguage

SMALL = ("train.epochs=2", "train.batch_size=4", "train.accumulate=1", "train.lr=0.01", "head.max_new_tokens=4")
SMALL += ("backbone.chat=null", "pet.rank=2", "pet.alpha=4", "run.device=cpu")


def month(folder: Path, name: str, *, count: int = 8) -> Path:
    """Rows about pictures of two kinds, one row in four without a picture; with options."""
    folder.mkdir(exist_ok=True)
    rows = []
    for number in range(count):
        kind = "ab"[number % 2]
        picture(kind, number).save(folder / f"{name}-{number}.png")
        row: dict[str, Any] = {"prompt": f"{name}: which?", "answer": kind, "options": ["a", "b"]}
        rows.append(row if number % 4 == 3 else {**row, "image": f"{name}-{number}.png"})
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def model_of(kind: str, folder: Path) -> str:
    if kind != "pair":
        return f"hf:{tiny_vision_language(folder / kind, kind)}"
    vit, text = vit_folder(folder / "vit", blocks=2), tiny_language_model(folder / "lm")
    return f"pair:{{picture: folder:{vit}, text: hf:{text}}}"


def options_of(kind: str) -> list[str]:
    return [*SMALL, *([f"backbone.image_size={SIZE}"] if kind == "qwen2_5_vl" else [])]


def said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = call(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.filterwarnings("ignore:.*squeezed to a square", "ignore:.*no projector is given")
@pytest.mark.parametrize("kind", chiefly([*VLMS, "pair"], ["idefics3", "qwen2_5_vl", "pair"]))
def test_a_state_lives_from_month_to_month(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    change = [argument for option in options_of(kind) for argument in ("--set", option)]
    code, _, error = said(
        ["init", "eyes", "--recipe", "update-vlm", "--model", model_of(kind, tmp_path), "-q", *change], capsys
    )
    assert code == 0, error
    for name in ("2026-10", "2026-11"):
        data = month(tmp_path / "data", name)
        code, _, error = said(["update", "eyes", "--data", str(data), "-q"], capsys)
        assert code == 0, error
    code, out, error = said(["predict", "eyes", "data/2026-10-0.png", "What is this?", "Which?", "--json"], capsys)
    assert code == 0, error
    assert [answer["prompt"] for answer in written(out, "answer")] == ["<image>\nWhat is this?", "<image>\nWhich?"]
    code, out, _ = said(
        ["predict", "eyes", "data/2026-10-0.png", "2026-10: which?", "--options", "a,b", "--json"], capsys
    )
    assert code == 0
    assert set(written(out)[0]["options"]) == {"a", "b"}
    code, out, _ = said(["evaluate", "eyes", "--json"], capsys)
    cells = written(out, "done")[0]["cells"]
    assert list(cells) == ["2026-10", "2026-11"]
    assert all(cell["total"] for cell in cells.values())
    learner = Learner.load("eyes")
    asked = {"prompt": "2026-10: which?", "images": ["data/2026-10-0.png"]}
    assert learner.answer(asked, options=["a", "b"])[0].text in ("a", "b")
    assert learner.answer("hi", options=["a", "b"])[0].text in ("a", "b")
    with pytest.raises(UsageError, match="takes pictured, not pictures: call `answer`"):
        learner.predict("data/2026-10-0.png")


@pytest.mark.filterwarnings("ignore:.*no projector is given")
def test_a_pair_can_be_told_with_paths_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    vit_folder(Path("vit"), blocks=2), tiny_language_model(Path("lm"))
    content = {"name": "x", "backbone": "pair:{picture: folder:vit, text: folder:lm}", "head": "vlm", "pet": "lora"}
    learner = Learner(content, "eyes")
    learner.learn(str(month(tmp_path / "data", "one")))
    monkeypatch.chdir("/")
    again = Learner.load(tmp_path / "eyes")
    assert again.recipe.backbone.name == f"pair:{{picture: 'folder:{tmp_path}/vit', text: 'folder:{tmp_path}/lm'}}"
    assert isinstance(again.method.model, VisionLanguage)
    trained, fresh = again.method.model.projector, again.backbone.net.get_submodule("picture_projector")
    assert trained is not None
    own = learner.method.model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in again.method.model.state_dict().items())
    assert not torch.equal(trained.linear_1.weight, fresh.linear_1.weight)  # type: ignore[arg-type,union-attr]


@pytest.mark.filterwarnings("ignore:.*no projector is given")
def test_a_projector_trained_alone_is_the_file_that_a_pair_takes(tmp_path: Path) -> None:
    spec = model_of("pair", tmp_path)
    content = {"name": "x", "backbone": spec, "head": "vlm", "pet": "none", "train": {"epochs": 2, "lr": 0.01}}
    learner = Learner(content, tmp_path / "eyes")
    data = month(tmp_path / "data", "one")
    learner.learn(str(data))
    assert call(["export", str(tmp_path / "eyes"), str(tmp_path / "out")]) == 0
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == ["README.md", "projector.safetensors"]
    spec = spec.replace("}", f", projector: {tmp_path / 'out' / 'projector.safetensors'}}}")
    second = Learner({**content, "backbone": spec, "pet": {"name": "lora", "rank": 2}}, tmp_path / "second")
    second.learn(str(data))
    assert isinstance(second.method.model, VisionLanguage)
    assert second.method.model.projector is None
    first = learner.method.model
    assert isinstance(first, VisionLanguage)
    assert first.projector is not None
    given = second.backbone.net.get_submodule("picture_projector").state_dict()
    assert all(torch.equal(given[name], value) for name, value in first.projector.state_dict().items())


@torch.no_grad()
def test_peft_opens_what_is_exported(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForImageTextToText

    folder = tiny_vision_language(tmp_path / "llava", "llava-clip")
    content = {
        "name": "x",
        "backbone": f"folder:{folder}",
        "head": {"name": "vlm", "projector": True},
        "pet": {"name": "lora", "rank": 2, "at": ["q", "picture.v"]},
        "train": {"epochs": 3, "lr": 0.05},
    }
    learner = Learner(content, tmp_path / "eyes")
    with torch.enable_grad():
        learner.learn(str(month(tmp_path / "data", "one")))
    assert call(["export", str(tmp_path / "eyes"), str(tmp_path / "out")]) == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("CAUSAL_LM", ["model.multi_modal_projector"])
    net = AutoModelForImageTextToText.from_pretrained(folder)
    tuned = peft.PeftModel.from_pretrained(net, str(tmp_path / "out")).eval()
    view = learner.method.model.view
    (asked,) = view.ask([{"prompt": "which?", "images": [tmp_path / "data" / "one-0.png"]}], choose=False)
    batch = view.collate([(asked.item, 0, 0)])
    pixels = learner.backbone.normalised(batch.inputs.pixels[0])
    wanted = tuned(input_ids=batch.inputs.ids, pixel_values=pixels, attention_mask=batch.inputs.mask.long()).logits
    model = learner.method.model
    assert isinstance(model, VisionLanguage)
    with learner.method.acting("default"), model._projecting():
        found = model._logits(batch.inputs, keep=batch.inputs.ids.shape[1])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    plain = AutoModelForImageTextToText.from_pretrained(folder)
    base = plain(input_ids=batch.inputs.ids, pixel_values=pixels).logits
    assert not torch.allclose(base, wanted, atol=1e-3)


METHODS: dict[str, dict[str, Any]] = {
    "protect": {"method": "finetune", "protect": {"energy": 0.95}},
    "protect in the tower": {
        "method": "finetune",
        "protect": {"energy": 0.95},
        "pet": {"name": "lora", "rank": 2, "at": ["q", "picture.v"], "blocks": [0]},
    },
    "average": {"method": "finetune", "average": {"keep": 0.5}},
    "olora": {"method": "olora"},
    "treelora": {"method": "treelora"},
    "pool": {"method": {"name": "pool", "members": "task", "select": "centres"}},
    "pool in the tower": {
        "method": {"name": "pool", "members": "task", "select": "centres"},
        "pet": {"name": "lora", "rank": 2, "at": ["picture.v"], "blocks": [0]},
    },
}


@pytest.mark.parametrize("way", METHODS)
def test_methods_go_on_working(way: str, tmp_path: Path) -> None:
    folder = tiny_vision_language(tmp_path / "m", "llava-clip")
    content = {
        "name": "x",
        "backbone": f"folder:{folder}",
        "head": {"name": "vlm", "max_new_tokens": 4},
        "pet": {"name": "lora", "rank": 2},
        "train": {"epochs": 1, "batch_size": 4, "lr": 0.01},
        **METHODS[way],
    }
    learner = Learner(content, tmp_path / "eyes")
    for name in ("one", "two"):
        results = learner.learn(str(month(tmp_path / "data", name)))
    assert len(results["cells"][-1]) == 2
    assert all(cell["total"] for cell in results["cells"][-1])


@pytest.mark.filterwarnings("ignore:.*squeezed to a square")
@pytest.mark.parametrize("kind", chiefly(["llava-clip", "qwen2_5_vl"], ["qwen2_5_vl"]))
@torch.no_grad()
def test_protection_holds_old_pictures_in_both_towers(kind: str, tmp_path: Path) -> None:
    """Rows of the picture tower are no tokens of the batch: none is left out, and none is taken for another."""
    folder = tiny_vision_language(tmp_path / "m", kind)
    size = {"image_size": SIZE} if kind == "qwen2_5_vl" else {}
    moved = []
    for protect in ({"energy": 0.9999999}, None):
        content = {
            "name": "x",
            "backbone": {"name": f"folder:{folder}", **size},
            "head": "vlm",
            "pet": {"name": "lora", "rank": 2, "at": ["q", "v", "picture.q", "picture.v"], "blocks": [0]},
            "train": {"epochs": 3, "batch_size": 4, "lr": 0.05},
            "protect": protect,
        }
        learner = Learner(content, tmp_path / f"eyes-{protect is None}")
        with torch.enable_grad():
            learner.learn(str(month(tmp_path / "data", "one")))
        view = learner.method.model.view
        given = [{"prompt": "one: which?", "images": [tmp_path / "data" / f"one-{i}.png"]} for i in range(3)]
        items = [(asked.item, 0, i) for i, asked in enumerate(view.ask([*given, "one: which?"], choose=False))]
        inputs = view.collate(items).inputs
        before = learner.method.features(inputs)
        with torch.enable_grad():
            learner.learn(str(month(tmp_path / "data", "two")))
        moved.append(float((learner.method.features(inputs) - before).norm() / before.norm()))
    assert moved[0] < 1e-3
    assert moved[1] > 0.1


def test_yes_and_no_are_asked_before_and_after_each_task(tmp_path: Path) -> None:
    folder = tiny_vision_language(tmp_path / "m", "llava-clip")
    rows = []
    (tmp_path / "exam").mkdir()
    for number in range(4):
        picture("ab"[number % 2], number).save(tmp_path / "exam" / f"{number}.png")
        row = {"prompt": "Is there an a?", "answer": ["Yes", "No"][number % 2], "options": ["Yes", "No"]}
        rows.append({**row, "image": f"{number}.png"})
    exam = tmp_path / "exam" / "pope.jsonl"
    exam.write_text("\n".join(map(json.dumps, rows)))
    content: dict[str, Any] = {
        "name": "x",
        "backbone": f"folder:{folder}",
        "head": "vlm",
        "pet": {"name": "lora", "rank": 2},
        "train": {"epochs": 1, "lr": 0.01},
        "exams": {"pope-random": {"name": "yes_no", "source": str(exam)}},
    }
    results = Learner(content, tmp_path / "eyes").learn(str(month(tmp_path / "data", "one")))
    taken = results["exams"]
    assert set(json.dumps(taken).split('"')) >= {"accuracy", "precision", "recall", "f1", "yes"}
    other = month(tmp_path / "data", "two")
    content["exams"] = {"pope": {"name": "yes_no", "source": str(other)}}
    with pytest.raises(UsageError, match="exam pope: yes_no needs questions that all have the same two options"):
        Learner(content, tmp_path / "other").learn(str(other))

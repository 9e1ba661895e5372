"""An exported folder alone gives the same answers, with the code of docs/export.md and without perpetune."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_backbones import timm_folder
from tiny import chiefly, paired, picture_folder, recipe, tiny_language_model, vit_folder
from torch.nn import functional as F

from perpetune import Learner
from perpetune.cli import call

pytest.importorskip("peft")
DOCS = (Path(__file__).resolve().parents[1] / "docs" / "export.md").read_text(encoding="utf-8")
CODE = dict(re.findall(r"<!-- loader: (.*?) -->\n```python\n(.*?)```", DOCS, re.DOTALL))
OLD: str = re.search(r"<!-- format 1 -->\n```python\n(.*?)```", DOCS, re.DOTALL)[1]  # type: ignore[index]
ADAPTER = "tuned = peft.PeftModel.from_pretrained(model, folder)\n"


@pytest.mark.parametrize("kind", ["transformers", "timm", "texts"])
def test_the_code_has_at_most_20_lines(kind: str) -> None:
    assert len([line for line in CODE[kind].splitlines() if line.strip()]) <= 20
    assert "perpetune" not in CODE[kind] + CODE["frozen beside"]


def loader(kind: str, folder: Path) -> str:
    """The code of the page for an exported folder, with what the page says of adapters and frozen features."""
    about, code = json.loads((folder / "head.json").read_bytes()), CODE[kind]
    if kind == "timm" and about["adapter"]:
        code = re.sub(r"(model, states = .*\n)", rf"import peft\n\1{ADAPTER}", code)
    elif kind != "timm" and not about["adapter"]:
        code = code.replace(ADAPTER, "").replace("peft, ", "")
        assert "peft" not in code
    assert code.count('"FOLDER"') == 1
    return code.replace('"FOLDER"', repr(str(folder))) + (CODE["frozen beside"] if about["frozen_beside"] else "")


def asked(kind: str, folder: Path, inputs: Sequence[str]) -> list[dict[str, float]]:
    """What the code answers."""
    names: dict[str, Any] = {"__name__": "reader"}
    exec(loader(kind, folder), names)
    return [names["predict"](given) for given in inputs]


def alone(codes: Sequence[tuple[str, Sequence[str]]], folder: Path) -> list[list[dict[str, float]]]:
    """What each code answers to its inputs, in a process in which perpetune cannot be imported."""
    program = (
        "import json, sys\nsys.modules['perpetune'] = None\nfor code, inputs in json.load(sys.stdin):\n"
        "    names = {'__name__': 'reader'}\n    exec(code, names)\n"
        "    print(json.dumps([names['predict'](given) for given in inputs]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(codes),
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()[-len(codes) :]]


def equal(made: Learner, theirs: Sequence[dict[str, float]], inputs: Sequence[str]) -> None:
    """The answers are the learner's, for each class that it names."""
    if made.method.model.takes == "pictures":
        ours = [one.classes for one in made.predict(inputs)]
    else:
        ours = [one.options for one in made.answer(inputs)]
    for own, other in zip(ours, theirs, strict=True):
        assert max(other, key=other.__getitem__) == own[0][0]
        assert other == pytest.approx(dict(own), abs=1e-4)


def exported(made: Learner, folder: Path) -> Path:
    assert call(["export", str(made.state.folder), str(folder)]) == 0
    return folder


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
    for name in ("test_vit", "test_vit2", "test_vit3", "test_vit4", "test_vit_relpos", "test_resnet"):
        timm_folder(root / name, 3, name=name)
    timm_folder(root / "bare", 3, config=False)
    picture_folder(root / "m1", ("犬", "b"), 6)
    picture_folder(root / "m2", ("c", "d"), 6)
    picture = Image.open(root / "m1" / "b" / "0.png")
    picture.resize((31, 17)).save(root / "wide.png")
    picture.resize((17, 31)).rotate(20, expand=True, fillcolor=(0, 0, 0)).convert("RGBA").save(root / "high.png")
    clear = picture.resize((20, 20)).convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize((20, 20)))
    clear.save(root / "clear.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    picture.resize((40, 20)).save(root / "turned.jpg", exif=turned)
    return root


def pictures(world: Path) -> list[str]:
    names = ("m1/犬/0.png", "m1/b/1.png", "m2/c/2.png", "m2/d/3.png", "wide.png", "high.png", "clear.png", "turned.jpg")
    return [str(world / name) for name in names]


def learned(content: dict[str, Any], world: Path, folder: Path) -> Learner:
    made = Learner(content, folder)
    made.learn(world / "m1")
    made.learn(world / "m2")
    return made


FROZEN: dict[str, Any] = {"pet": "none", "method": "frozen", "train": None}


def frozen(world: Path, head: Any, **backbone: Any) -> dict[str, Any]:
    content = recipe(world / "model", backbone=backbone, head=head, **FROZEN)
    return {key: value for key, value in content.items() if value is not None}


HEADS: list[Any] = [
    "linear", "cosine", {"name": "cosine", "learn_scale": True}, "ncm", {"name": "ncm", "metric": "euclidean"}, "ridge",
    {"name": "ridge", "projection": 24}, {"name": "ridge", "projection": 12, "kind": "orthogonal"},
    {"name": "ridge", "standardise": False},
]  # fmt: skip


@pytest.mark.parametrize(("head", "taps"), paired(HEADS, [None, 2]), ids=str)
def test_every_head_with_lora(head: Any, taps: int | None, world: Path, tmp_path: Path) -> None:
    backbone = {"name": f"folder:{world / 'model'}", "taps": taps}
    made = learned(recipe(world / "model", backbone=backbone, head=head), world, tmp_path / "s")
    folder = exported(made, tmp_path / "out")
    equal(made, asked("transformers", folder, pictures(world)), pictures(world))
    assert (folder / "adapter_model.safetensors").is_file()
    assert load_file(folder / "head.safetensors").keys() - {"projected"} == {"weight", "bias"}


@pytest.mark.parametrize("tokens", ["class", "mean", "both"])
def test_a_head_alone(tokens: str, world: Path, tmp_path: Path) -> None:
    backbone = {"name": f"folder:{world / 'model'}", "taps": 1, "tokens": tokens}
    made = learned(frozen(world, "ridge", **backbone), world, tmp_path / "s")
    folder = exported(made, tmp_path / "out")
    equal(made, asked("transformers", folder, pictures(world)), pictures(world))
    assert {p.name for p in folder.iterdir()} == {"README.md", "head.json", "head.safetensors"}


def test_another_size_of_pictures(world: Path, tmp_path: Path) -> None:
    made = learned(frozen(world, "ridge", name=f"folder:{world / 'model'}", image_size=24), world, tmp_path / "s")
    folder = exported(made, tmp_path / "out")
    assert json.loads((folder / "head.json").read_bytes())["call"] == {"interpolate_pos_encoding": True}
    equal(made, asked("transformers", folder, pictures(world)), pictures(world))


def test_a_model_that_was_named_from_another_folder(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    made = learned(recipe(world / "model", backbone="folder:model"), world, tmp_path / "s")
    folder = exported(made, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    for name, key in (("head.json", "base"), ("adapter_config.json", "base_model_name_or_path")):
        assert json.loads((folder / name).read_bytes())[key] == str(world / "model")
    asked("transformers", folder, pictures(world)[:1])


@pytest.mark.parametrize(
    ("head", "taps"),
    [
        ("ncm", 2),
        pytest.param({"name": "ridge", "projection": 24}, None, marks=pytest.mark.slow),
        pytest.param({"name": "ridge", "projection": 24}, 2, marks=pytest.mark.slow),
        pytest.param("ncm", None, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_frozen_features_beside_those_with_the_adapter(
    head: Any, taps: int | None, world: Path, tmp_path: Path
) -> None:
    backbone = {"name": f"folder:{world / 'model'}", "taps": taps}
    method = {"name": "first_session", "concat": True}
    made = learned(recipe(world / "model", backbone=backbone, head=head, method=method), world, tmp_path / "s")
    folder = exported(made, tmp_path / "out")
    assert json.loads((folder / "head.json").read_bytes())["frozen_beside"] is True
    equal(made, asked("transformers", folder, pictures(world)), pictures(world))
    about = json.loads((folder / "head.json").read_bytes()) | {"frozen_beside": False}
    (folder / "head.json").write_text(json.dumps(about))
    with pytest.raises(RuntimeError, match="shape"):  # the code without these lines cannot answer
        asked("transformers", folder, pictures(world))


@pytest.mark.parametrize("name", chiefly(["update", "update-lora"], ["update-lora"]))
def test_a_state_of_a_recipe_of_init(name: str, world: Path, tmp_path: Path) -> None:
    changes = ["--set", "train.epochs=1"] if name == "update-lora" else []
    assert call(["init", str(tmp_path / "s"), "--recipe", name, *changes, "-q"]) == 0
    made = Learner.load(tmp_path / "s", device="cpu")
    made.learn(world / "m1")
    made.learn(world / "m2")
    folder = exported(made, tmp_path / "out")
    assert (folder / "base" / "model.safetensors").is_file()
    assert json.loads((folder / "head.json").read_bytes())["base"] is None
    equal(made, asked("transformers", folder, pictures(world)), pictures(world))


# -- timm ---------------------------------------------------------------------------------------------------


TIMM = ["test_vit", "test_vit2", "test_vit3", "test_vit4", "test_vit_relpos", "test_resnet"]


@pytest.mark.parametrize(
    ("name", "taps"),
    chiefly(itertools.product(TIMM, ["auto", None]), zip(TIMM[::2], ["auto", None, "auto"], strict=True)),
)
def test_timm_with_the_default_recipe(name: str, taps: Any, world: Path, tmp_path: Path) -> None:
    backbone = {"name": f"folder:{world / name}", "taps": taps}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the blocks of some of them are not known
        made = learned(frozen(world, {"name": "ridge", "sums": "float32"}, **backbone), world, tmp_path / "s")
        folder = exported(made, tmp_path / "out")
    equal(made, asked("timm", folder, pictures(world)), pictures(world))


BACKBONES: dict[str, dict[str, Any]] = {
    "without a config": {"name": "bare", "architecture": "test_vit"},
    "of another size": {"name": "test_vit", "image_size": 96},
    "with taps": {"name": "test_vit", "taps": 2, "tokens": "class"},
}


@pytest.mark.parametrize("case", BACKBONES)
def test_timm_with_lora(case: str, world: Path, tmp_path: Path) -> None:
    backbone = {**BACKBONES[case], "name": f"folder:{world / BACKBONES[case]['name']}"}
    made = learned(recipe(world / "model", backbone=backbone, head="cosine"), world, tmp_path / "s")
    equal(made, asked("timm", exported(made, tmp_path / "out"), pictures(world)), pictures(world))


def test_timm_with_frozen_features_beside(world: Path, tmp_path: Path) -> None:
    method, backbone = {"name": "first_session", "concat": True}, {"name": f"folder:{world / 'test_vit'}", "taps": 1}
    made = learned(recipe(world / "model", backbone=backbone, head="ncm", method=method), world, tmp_path / "s")
    equal(made, asked("timm", exported(made, tmp_path / "out"), pictures(world)), pictures(world))


# -- texts --------------------------------------------------------------------------------------------------


COLORS = {"sky": "blue", "grass": "green", "blood": "red"}
PROMPTS = ["sky 3 is", "grass 7 is ", "blood is\n", "what? ", "the sky, again and again and " * 30 + "is", " x", "é 犬"]
TUNED: dict[str, Any] = {
    "method": "finetune",
    "pet": {"name": "lora", "at": ["q", "v"], "rank": 4},
    "train": {"epochs": 2, "batch_size": 6, "lr": 0.02},
}
TEXTS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "lora": TUNED,
    "linear": {**TUNED, "head": "linear"},
    "first session": {**TUNED, "method": {"name": "first_session", "concat": True}, "head": "ncm"},
}


def classifier(root: Path, model: dict[str, Any], **changes: Any) -> Learner:
    rows = [
        {"prompt": f"{x} {n} is", "answer": c, "options": list(COLORS.values())}
        for n in range(4)
        for x, c in COLORS.items()
    ]
    (root / "d.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    plain = {"name": "t", "backbone": model, "pet": "none", "method": "frozen", "head": "ridge"}
    made = Learner({**plain, "run": {"device": "cpu"}, **changes}, root / "s")
    made.learn(root / "d.jsonl")
    return made


@pytest.mark.parametrize(("kind", "taps"), paired(TEXTS, [None, 2]))
def test_a_head_of_classes_on_texts(kind: str, taps: int | None, tmp_path: Path) -> None:
    tiny_language_model(tmp_path / "lm")
    made = classifier(tmp_path, {"name": f"hf:{tmp_path / 'lm'}", "taps": taps}, **TEXTS[kind])
    equal(made, asked("texts", exported(made, tmp_path / "out"), PROMPTS), PROMPTS)


@pytest.mark.parametrize(("kind", "chat"), paired(["gpt2", "opt", "qwen3"], [False, True]))
def test_kinds_of_language_models(kind: str, chat: bool, tmp_path: Path) -> None:
    tiny_language_model(tmp_path / "lm", kind)
    model = {"name": f"hf:{tmp_path / 'lm'}", "taps": 2, "tokens": "class", "chat": chat, "dtype": "bfloat16"}
    made = classifier(tmp_path, model, evaluate={"batch_size": 1})  # padding changes the last digits of bfloat16
    equal(made, asked("texts", exported(made, tmp_path / "out"), PROMPTS), PROMPTS)


def test_a_tokenizer_that_opens_and_closes_each_text(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tiny_language_model(tmp_path / "lm")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "lm")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    tokenizer.save_pretrained(tmp_path / "lm")
    made = classifier(tmp_path, {"name": f"hf:{tmp_path / 'lm'}", "max_length": 20})
    folder = exported(made, tmp_path / "out")
    about = json.loads((folder / "head.json").read_bytes())
    assert (about["opening"], about["room"]) == (1, 19)
    equal(made, asked("texts", folder, PROMPTS), PROMPTS)


def test_a_chat_template_keeps_the_day_of_the_state(tmp_path: Path) -> None:
    tiny_language_model(tmp_path / "lm")
    config = json.loads((tmp_path / "lm" / "tokenizer_config.json").read_text())
    (tmp_path / "lm" / "chat_template.jinja").unlink(missing_ok=True)
    config["chat_template"] = (
        "{{ strftime_now('%d %B %Y') }} {% for m in messages %}{{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}> {% endif %}"
    )
    (tmp_path / "lm" / "tokenizer_config.json").write_text(json.dumps(config))
    made = classifier(tmp_path, {"name": f"hf:{tmp_path / 'lm'}", "chat": True})
    folder = exported(made, tmp_path / "out")
    template = json.loads((folder / "head.json").read_bytes())["chat"]["chat_template"]
    assert "strftime_now" not in template
    equal(made, asked("texts", folder, PROMPTS[:3]), PROMPTS[:3])


def test_the_code_needs_no_perpetune(world: Path, tmp_path: Path) -> None:
    tiny_language_model(tmp_path / "lm")
    backbone = {"name": f"folder:{world / 'model'}", "taps": 2}
    timm = frozen(world, {"name": "ridge", "sums": "float32"}, name=f"folder:{world / 'test_vit'}", taps="auto")
    made = {
        "transformers": learned(recipe(world / "model", backbone=backbone), world, tmp_path / "transformers"),
        "timm": learned(timm, world, tmp_path / "timm"),
        "texts": classifier(tmp_path, {"name": f"hf:{tmp_path / 'lm'}", "taps": 2, "chat": True}, **TUNED),
    }
    inputs = {kind: PROMPTS if kind == "texts" else pictures(world) for kind in made}
    codes = [(loader(kind, exported(one, tmp_path / f"{kind}-out")), inputs[kind]) for kind, one in made.items()]
    for (kind, one), answers in zip(made.items(), alone(codes, tmp_path), strict=True):
        equal(one, answers, inputs[kind])


def test_a_language_model_without_pet_has_nothing_to_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_language_model(tmp_path / "lm")
    made = classifier(tmp_path, {"name": f"folder:{tmp_path / 'lm'}"}, head="lm")
    assert call(["export", str(made.state.folder), str(tmp_path / "out")]) == 1 + 1
    assert "there is nothing to export: the recipe has `pet: none`" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# -- what cannot be rebuilt, and what was before ------------------------------------------------------------


def test_random_weights_are_said(world: Path, tmp_path: Path) -> None:
    made = learned(frozen(world, "ncm", name=f"folder:{world / 'model'}", pretrained=False), world, tmp_path / "s")
    with pytest.warns(UserWarning, match="its weights are random, or its loader does not say"):
        folder = exported(made, tmp_path / "out")
    assert json.loads((folder / "head.json").read_bytes())["library"] is None


def test_a_head_of_another_kind_keeps_its_own_tensors(tmp_path: Path) -> None:
    from perpetune.export.head import head_of
    from perpetune.heads import Linear

    class Own(Linear):
        def folded(self) -> None:  # type: ignore[override]
            return None

    head = Own(3)
    head.grow(["a"], torch.Generator())
    about, tensors = head_of(head)
    assert about == {"format": 2, "head": "Own", "classes": ["a"]}
    assert tensors.keys() == {"weight", "bias"}


def test_the_page_reads_heads_of_format_1() -> None:
    """As `head.safetensors` and `head.json` of earlier exports held them."""
    names: dict[str, Any] = {}
    exec(OLD, names)
    scores, f = names["scores"], torch.randn(3, 4)
    rows, bias, scale = torch.randn(2, 4), torch.randn(2), torch.tensor(3.0)
    linear = scores(f, {"weight": rows, "bias": bias}, {"head": "Linear"})
    torch.testing.assert_close(linear, F.linear(f, rows, bias))
    near = 3 * F.cosine_similarity(f[:, None], rows[None], dim=2)
    torch.testing.assert_close(scores(f, {"weight": rows, "scale": scale}, {"head": "Cosine"}), near)
    about = {"head": "NCM", "metric": "cosine", "scale": 3.0}
    torch.testing.assert_close(scores(f, {"means": rows}, about), near)
    distance = -3 * (f[:, None] - rows[None]).square().mean(2)
    torch.testing.assert_close(scores(f, {"means": rows}, {**about, "metric": "euclidean"}), distance)
    drawn, centre, offset = torch.randn(4, 5), torch.randn(5), torch.randn(2)
    ridge = {"projected": drawn, "centre": centre, "offset": offset, "weight": torch.randn(5, 2), "scale": scale}
    wanted = 3 * (((f @ drawn).relu() - centre) @ ridge["weight"] + offset)
    torch.testing.assert_close(scores(f, ridge, {"head": "Ridge", "relu": True}), wanted)

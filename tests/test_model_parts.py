"""The parts of a model fit each other, or `init` says in one line which do not, and makes no state folder."""

from __future__ import annotations

import itertools
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import chiefly, recipe, tiny_language_model, tiny_tokenizer, vit_folder

from perpetune import Learner
from perpetune.build import load_backbone
from perpetune.cli import call
from perpetune.data.texts.tables import Text
from perpetune.errors import DataError, PerpetuneError, UsageError


def edit(folder: Path, file: str = "config.json", **changes: Any) -> None:
    content = json.loads((folder / file).read_text())
    content.update(changes)
    (folder / file).write_text(json.dumps(content))


def refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], **options: Any) -> str:
    """The one line that `init` prints; no state folder is left."""
    more = [f"--set=backbone.{key}={value}" for key, value in options.items()]
    capsys.readouterr()
    assert call(["init", str(tmp_path / "s"), "--model", f"folder:{folder}", *more]) in (1, 2)
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert "did not foresee" not in err
    assert not (tmp_path / "s").exists()
    return err


# -- language models ----------------------------------------------------------------------------------------


def language(folder: Path, change: Callable[[Any], None]) -> Path:
    tiny_language_model(folder)
    tokenizer = tiny_tokenizer()
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_tokenizer_with_more_tokens_than_the_embedding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = language(tmp_path / "lm", lambda t: t.add_tokens(["paris", *(f"<t{i}>" for i in range(45))]))
    said = refused(folder, tmp_path, capsys)
    assert "the model's embedding has 300 rows, and the tokenizer has 346 tokens, among them" in said
    assert "'<t0>'" in said or "'paris'" in said
    assert "resize_token_embeddings" in said


def special(tokenizer: Any, used: bool) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<s{i}>" for i in range(60)]})
    if used:
        tokenizer.chat_template = "{% for m in messages %}<s50>{{ m['content'] }}<s51>{% endfor %}"


def test_a_chat_form_with_tokens_that_the_model_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(language(tmp_path / "lm", lambda t: special(t, True)), tmp_path, capsys)
    assert "among them '<s50>', '<s51>' beyond the last row" in said


def test_special_tokens_that_nobody_uses_are_refused_in_a_text_only(tmp_path: Path) -> None:
    backbone = load_backbone(f"folder:{language(tmp_path / 'lm', lambda t: special(t, False))}")
    view = backbone.preprocess
    assert len(view.sequence(Text("a question", "an answer")).ids)  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="the tokenizer makes '<s50>' of it, and the model's embedding has no row"):
        view.sequence(Text("a <s50> question", "an answer"))  # type: ignore[attr-defined]


def test_an_end_token_that_the_model_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(tokenizer: Any) -> None:
        special(tokenizer, False)
        tokenizer.eos_token = "<s59>"

    assert "'<s59>' beyond the last row" in refused(language(tmp_path / "lm", change), tmp_path, capsys)


def test_a_tokenizer_without_an_end_token_is_said(tmp_path: Path) -> None:
    folder = tiny_language_model(tmp_path / "lm")
    edit(folder, "tokenizer_config.json", eos_token=None)
    with pytest.warns(UserWarning, match=r"no end token \(eos_token\)"):
        load_backbone(f"folder:{folder}")


# -- configurations of strangers ----------------------------------------------------------------------------

NUMBERS: list[Any] = [None, [16, 16], 10**12, -1, 0, 1.5, "wide", True, {"a": 1}]


SIZES = [
    *(
        (kind, of)
        for kind in ("vit", "llama")
        for of in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    ),
    ("llama", "vocab_size"),
]


@pytest.mark.parametrize(
    ("size", "value"),
    chiefly(
        itertools.product(SIZES, NUMBERS),
        [(size, value) for i, size in enumerate(SIZES) for j, value in enumerate(NUMBERS) if (i + j) % 3 == 0],
    ),
    ids=repr,
)
def test_sizes_that_are_none(
    size: tuple[str, str], value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, key = size
    folder = vit_folder(tmp_path / "m") if kind == "vit" else tiny_language_model(tmp_path / "m")
    edit(folder, **{key: value})
    for pretrained in (True, False):
        said = refused(folder, tmp_path, capsys, pretrained=pretrained)
        assert str(folder) in said


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("vit", {"num_channels": 1}, "it takes pictures of 1 channel(s), and perpetune gives it 3 (RGB)"),
        ("vit", {"num_attention_heads": 3}, "the checkpoint does not hold this model's tensors"),
        ("vit", {"image_size": 32}, "of another shape: embeddings.position_embeddings"),
        ("vit", {"patch_size": 0}, ""),
        ("vit", {"hidden_size": 10**7}, "its config describes a model of"),
        ("llama", {"num_attention_heads": 3}, ""),
        ("llama", {"vocab_size": 10**8}, "its config describes a model of"),
        ("llama", {"num_hidden_layers": 3}, "missing: model.layers.2."),
        ("llama", {"hidden_act": "none"}, ""),
    ],
)
def test_a_config_that_does_not_fit(
    kind: str, changes: dict[str, Any], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = vit_folder(tmp_path / "m") if kind == "vit" else tiny_language_model(tmp_path / "m")
    edit(folder, **changes)
    assert says in refused(folder, tmp_path, capsys)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("vit", {"num_labels": 10**10}),
        ("vit", {"image_size": 10**9}),
        ("vit", {"image_size": [16, 10**9]}),
        ("vit", {"num_hidden_layers": 10**9}),
        ("llama", {"num_labels": 10**10}),
        ("llama", {"num_hidden_layers": 10**9}),
        ("llama", {"max_position_embeddings": 10**12}),
        ("gpt2", {"n_layer": 10**9}),
        ("gemma3_text", {"num_hidden_layers": 10**9, "layer_types": None}),
        ("timm", {"model_args": {"depth": 10**9}}),
        ("timm", {"model_args": {"embed_dim": 10**12}}),
        ("timm", {"model_args": {"img_size": [10**9, 16]}}),
        ("timm", {"num_classes": 10**12}),
    ],
)
def test_sizes_that_no_model_has_take_no_memory(
    kind: str, changes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "m"
    if kind == "vit":
        vit_folder(folder)
    elif kind == "timm":
        timm = pytest.importorskip("timm")
        timm.models.save_for_hf(timm.create_model("test_vit", num_classes=3), str(folder), safe_serialization=True)
    else:
        tiny_language_model(folder, kind)
    edit(folder, **changes)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    said = refused(folder, tmp_path, capsys)
    assert time.monotonic() - began < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB
    assert str(folder) in said
    (name, value) = next(iter(changes.get("model_args", changes).items()))
    assert f"{name} in its config is {value}; a whole number from 1 to 10" in said


@pytest.mark.parametrize(
    "side", [10**9, 10**12, -3, 0, True, "wide", [[16]], [], None, {"height": 10**9, "width": 10**9}]
)
@pytest.mark.parametrize("key", ["size", "crop_size"])
def test_a_side_that_no_picture_has(key: str, side: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = vit_folder(tmp_path / "m")
    edit(folder, "preprocessor_config.json", **{key: side}, do_center_crop=True)
    said = refused(folder, tmp_path, capsys)
    assert f"image size {side} in its config; one side in pixels is expected, from 1 to 8192" in said


@pytest.mark.parametrize("value", ["x", None, [1], True])
def test_a_length_of_a_tokenizer_that_is_none(value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_language_model(tmp_path / "m")
    edit(folder, "tokenizer_config.json", model_max_length=value)
    if value is None:  # as if it were not there
        assert load_backbone(f"folder:{folder}").preprocess.max_length == 128  # type: ignore[attr-defined]
        return
    assert f"model_max_length in its tokenizer_config.json is {value!r}; a number is" in refused(
        folder, tmp_path, capsys
    )


@pytest.mark.parametrize(
    "changes",
    [{"model_args": [1]}, {"model_args": {"depth": None}}, {"pretrained_cfg": {"input_size": [3, 10**9, 10**9]}}],
)
def test_a_config_of_timm_that_is_none(
    changes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    timm = pytest.importorskip("timm")
    folder = tmp_path / "m"
    timm.models.save_for_hf(timm.create_model("test_vit", num_classes=3), str(folder), safe_serialization=True)
    edit(folder, **changes)
    assert str(folder) in refused(folder, tmp_path, capsys)


def test_one_channel_of_timm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    timm = pytest.importorskip("timm")
    net = timm.create_model("test_vit", in_chans=1, num_classes=3)
    timm.models.save_for_hf(net, str(tmp_path / "grey"), safe_serialization=True)
    assert "1 channel" in refused(tmp_path / "grey", tmp_path, capsys)


@pytest.mark.parametrize("kind", ["vit", "llama"])
def test_weights_that_are_not_finite(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = vit_folder(tmp_path / "m") if kind == "vit" else tiny_language_model(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if "norm" in n and n.endswith("weight"))
    save_file(
        {**tensors, name: torch.full_like(tensors[name], torch.nan)}, folder / "model.safetensors", {"format": "pt"}
    )
    assert "its features are not finite numbers: the checkpoint is damaged" in refused(folder, tmp_path, capsys)


def test_a_model_that_fits_is_checked_without_a_trace(tmp_path: Path) -> None:
    made = Learner(recipe(vit_folder(tmp_path / "m")), tmp_path / "s")
    assert made.backbone.check() is None  # type: ignore[func-returns-value]
    made.backbone.dim = 7
    with pytest.raises(UsageError, match="its features have 16 numbers; 7 are expected"):
        made.backbone.check()


def test_too_little_memory_is_not_taken_for_a_misfit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load_backbone(f"folder:{vit_folder(tmp_path / 'm')}")

    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(backbone, "features", full)
    with pytest.raises(torch.OutOfMemoryError):
        backbone.check()
    assert issubclass(UsageError, PerpetuneError)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}", "{% for i in range(10**9) %}a{% endfor %}", "{{ messages[99]['content'] }}", "{{ none.x.y }}",
        "{% for m in messages %}{{ m['content'] }}{{ 'a' * 20000000 }}{% endfor %}", "{% if %}",
    ],
)  # fmt: skip
def test_a_chat_template_of_a_stranger(template: str, tmp_path: Path) -> None:
    folder = tiny_language_model(tmp_path / "lm")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    view = load_backbone(f"folder:{folder}").preprocess
    with pytest.raises(DataError, match="the model's chat template"):
        view.sequence(Text((("user", "a"),), "b"))  # type: ignore[attr-defined]

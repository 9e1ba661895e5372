"""Causal language models: loaded from folders and GGUF files, their parts by role, their blocks computed again."""

from __future__ import annotations

import copy
import json
import shutil
import sys
import types
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_language_model, tiny_tokenizer, vit_folder
from torch import Tensor, nn

from perpetune.build import load_backbone
from perpetune.errors import MissingExtra, PerpetuneError, UsageError
from perpetune.models.backbone import Backbone
from perpetune.models.families import LINEAR_ROLES
from perpetune.models.loaders import causal_lm, hf
from perpetune.models.towers import places, roles, towers
from perpetune.pets import Place, inject, parameters, slots, using
from perpetune.pets.adapter import Adapter
from perpetune.pets.lora import LoRA
from perpetune.pets.prefix import Prefix
from perpetune.pets.ssf import SSF
from perpetune.seeding import generator

KINDS = ("llama", "qwen3", "gemma", "gemma3_text", "phi3", "gpt2", "gpt_neox", "opt")
IDS = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each kind; gpt2 without a chat template."""
    root = tmp_path_factory.mktemp("models")
    return {kind: tiny_language_model(root / kind, kind, chat=kind != "gpt2") for kind in KINDS}


def lora(place: Place) -> LoRA:
    return LoRA(place, generator("test", place.path), rank=2)


def shake(backbone: Backbone, name: str = "default", size: float = 0.3) -> None:
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters(backbone.net, name):
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * size)


def logits(backbone: Backbone, name: str | None = None) -> Tensor:
    with using(backbone.net, name):
        out: Tensor = backbone.net(input_ids=IDS, use_cache=False).logits
    return out


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_kind_is_loaded_and_tuned_at_every_role(kind: str, folders: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM

    backbone = load_backbone(f"hf:{folders[kind]}")
    assert (backbone.takes, backbone.dim) == ("texts", 32)
    view: Any = backbone.preprocess
    assert (view.max_length, view.tokenizer.pad_token, bool(view.tokenizer.chat_template)) == (
        128,
        "<pad>",
        kind != "gpt2",
    )
    assert "max_length=128" in repr(backbone)
    plain = AutoModelForCausalLM.from_pretrained(folders[kind], dtype=torch.float32).eval()
    before = logits(backbone)
    assert torch.equal(before, plain(input_ids=IDS).logits)
    head = plain.get_output_embeddings()
    features = backbone(IDS)
    assert features.shape == (2, 9, 32)
    torch.testing.assert_close(head(features), before)
    half = backbone(IDS, attention_mask=torch.ones_like(IDS))
    torch.testing.assert_close(half, features)

    printed = backbone.fingerprint()
    linear = [role for role in backbone.roles() if role in LINEAR_ROLES]
    expected = {"qkv", "proj", "fc1", "fc2"} if kind == "gpt_neox" else {"q", "k", "v", "proj", "fc1", "fc2"}
    gated = {"gate"} if kind not in ("gpt2", "gpt_neox", "opt") else set()
    assert set(linear) == expected | gated
    assert {"attn", "block", "norm1", "norm2", "norm"} <= set(backbone.roles())
    for role in linear:
        inject(backbone.net, places(backbone.net, [role], [-1]), lora, role)
        assert torch.equal(logits(backbone, role), before), role
        shake(backbone, role)
        assert not torch.equal(logits(backbone, role), before), role
    assert torch.equal(logits(backbone), before)
    assert backbone.fingerprint() == printed == load_backbone(f"folder:{folders[kind]}").fingerprint()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@torch.no_grad()
def test_other_pets_start_as_nothing_too(kind: str, folders: dict[str, Path]) -> None:
    backbone = load_backbone(f"hf:{folders[kind]}")
    before = logits(backbone)
    inject(backbone.net, places(backbone.net, ["operations"]), lambda p: SSF(p, generator(p.path)), "ssf")
    assert torch.equal(logits(backbone, "ssf"), before)
    count = {"llama": 2 * 9 + 1, "gpt2": 2 * 6 + 1, "opt": 2 * 8 + 1}[kind]  # q, k and v of gpt2 are one layer
    assert len([1 for _, slot in slots(backbone.net) if "ssf" in slot.pets]) == count
    at = ["mlp"] if kind != "opt" else ["attn"]  # OPT's block holds the layers of its MLP itself
    inject(backbone.net, places(backbone.net, at), lambda p: Adapter(p, generator(p.path)), "adapter")
    assert torch.equal(logits(backbone, "adapter"), before)
    # transformers names the first argument of attention in some blocks and not in others
    inject(backbone.net, places(backbone.net, ["attn"]), lambda p: Prefix(p, generator(p.path)), "prefix")
    assert not torch.allclose(logits(backbone, "prefix"), before)


def test_a_norm_of_its_own_class_cannot_be_folded_and_says_so(folders: dict[str, Path]) -> None:
    from perpetune.pets import fold

    backbone = load_backbone(f"hf:{folders['llama']}")
    inject(backbone.net, places(backbone.net, ["norm1"]), lambda p: SSF(p, generator(p.path)))
    with pytest.raises(UsageError, match="SSF cannot be folded into LlamaRMSNorm"):
        fold(backbone.net, "default")


@pytest.mark.parametrize(
    ("kind", "asked", "roles_there", "parts"),
    [
        ("phi3", ["v", "q"], ("q", "v"), ((0, 32), (48, 64))),
        ("phi3", ["k"], ("k",), ((32, 48),)),
        ("phi3", ["fc1"], ("fc1",), ((48, 96),)),
        ("phi3", ["fc1", "gate"], ("gate", "fc1"), ((0, 48), (48, 96))),
        ("gpt2", ["v", "k"], ("k", "v"), ((32, 64), (64, 96))),
        ("gpt_neox", ["qkv"], ("qkv",), ((0, 96),)),
    ],
)
@torch.no_grad()
def test_parts_of_fused_layers(
    kind: str, asked: list[str], roles_there: tuple[str, ...], parts: tuple[Any, ...], folders: dict[str, Path]
) -> None:
    backbone = load_backbone(f"hf:{folders[kind]}")
    (place,) = places(backbone.net, asked, [0])
    assert (place.roles, place.parts) == (roles_there, parts)
    (pet,) = inject(backbone.net, [place], lora)
    shake(backbone)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))
    moved = (pet(place.module, x) - place.module(x)).abs().amax((0, 1)) > 0
    inside = torch.zeros(place.d_out, dtype=torch.bool)
    for start, stop in parts:
        inside[start:stop] = True
    assert torch.equal(moved, inside)


@torch.no_grad()
def test_the_rows_of_phi3_are_what_its_attention_takes_them_for(folders: dict[str, Path]) -> None:
    """With v at zero attention gives nothing, with q or k at zero it looks at all tokens alike."""
    backbone = load_backbone(f"hf:{folders['phi3']}")
    caught: list[tuple[Tensor, Tensor, Tensor]] = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def catch(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        caught.append((query, key, value))
        return sdpa(query, key, value, *args, **kwargs)

    for n, role in enumerate(("q", "k", "v")):
        net = copy.deepcopy(backbone.net)
        (place,) = places(net, [role], [0])
        ((start, stop),) = place.parts
        place.module.get_parameter("weight")[start:stop] = 0
        caught.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", catch)
            net(input_ids=IDS, use_cache=False)
        assert [not bool(t.any()) for t in caught[0]] == [i == n for i in range(3)], role


def test_a_fused_qkv_that_does_not_fit_its_config(folders: dict[str, Path]) -> None:
    backbone = load_backbone(f"hf:{folders['phi3']}")
    backbone.net.get_submodule("model.layers.0.self_attn").config.num_key_value_heads = 3
    with pytest.raises(UsageError, match=r"64 rows, but 4 \+ 2 \* 3 heads of width 8 need 80"):
        places(backbone.net, ["q"])


def test_what_a_language_model_lacks_is_told(folders: dict[str, Path]) -> None:
    net = load_backbone(f"hf:{folders['gpt_neox']}").net
    with pytest.raises(UsageError, match=r"GPT-NeoX: block 0 has no role 'q'; it has qkv, proj, fc1, fc2, attn"):
        places(net, ["q", "proj"])
    with pytest.raises(UsageError, match="Linear is of no family whose parts are known"):
        roles(nn.Linear(2, 2))


def test_blocks_of_several_kinds(folders: dict[str, Path]) -> None:
    """Some nets have attention in every fourth block only, or experts where others have an MLP."""
    net = load_backbone(f"hf:{folders['llama']}").net
    net.set_submodule("model.layers.0.self_attn", nn.Identity())
    net.set_submodule("model.layers.1.mlp", nn.Identity())
    assert towers(net)["text"].family.name == "Llama and its kin"
    assert [p.path for p in places(net, ["q", "fc1"])] == [
        "model.layers.0.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    with pytest.raises(UsageError, match="block 0 has no role 'q'"):
        places(net, ["q"], [0])
    assert len(places(net, ["operations"])) == 4 + 3 + 2 * 2 + 1


def test_the_tower_for_texts_answers_where_a_language_model_takes_pictures_too() -> None:
    """It comes before the language model, and its blocks are named alike."""
    from transformers import AutoModelForCausalLM, Gemma3Config

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 32, "num_key_value_heads": 1, "head_dim": 8}
    vision = {**sizes, "image_size": 28, "patch_size": 14}
    net = AutoModelForCausalLM.from_config(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))
    assert [p.path for p in places(net, ["q"])] == ["model.language_model.layers.0.self_attn.q_proj"]
    inject(net, places(net, ["q"]), lora)
    assert [(name, tower.path) for name, tower in towers(net).items()] == [
        ("text", "model.language_model"),
        ("picture", "model.vision_tower"),
    ]
    assert [p.path for p in places(net, ["picture.fc1"])] == ["model.vision_tower.encoder.layers.0.mlp.fc1"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype: str, folders: dict[str, Path]) -> None:
    backbone = load_backbone(f"hf:{folders['llama']}", dtype=dtype)  # type: ignore[arg-type]
    assert {p.dtype for p in backbone.parameters()} == {getattr(torch, dtype)}
    assert backbone.fingerprint() != load_backbone(f"hf:{folders['llama']}").fingerprint()
    inject(backbone.net, places(backbone.net, ["q", "v", "fc2"]), lora)
    assert {p.dtype for p in parameters(backbone.net, "default")} == {torch.float32}
    assert torch.equal(logits(backbone, "default"), logits(backbone))
    shake(backbone)
    out = logits(backbone, "default")
    assert out.dtype == getattr(torch, dtype)
    out.float().square().mean().backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 and p.grad.any() for p in parameters(backbone, "default")
    )


def test_options(folders: dict[str, Path]) -> None:
    view: Any = load_backbone(f"hf:{folders['llama']}", max_length=20, chat=True).preprocess
    assert (view.max_length, view.chat) == (20, True)
    first, again, other = (
        load_backbone(f"hf:{folders['llama']}", pretrained=False, seed=s, dtype="bfloat16") for s in (1, 1, 2)
    )
    assert {p.dtype for p in first.parameters()} == {torch.bfloat16}
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()


def test_nothing_is_dropped_and_nothing_drawn(tmp_path: Path) -> None:
    folder = tiny_language_model(tmp_path, "opt", dropout=0.5, attention_dropout=0.5, layerdrop=0.5)
    state = torch.random.get_rng_state()
    backbone = load_backbone(f"hf:{folder}")
    assert torch.equal(torch.random.get_rng_state(), state)
    config: Any = backbone.net.config
    assert (config.dropout, config.attention_dropout, config.layerdrop) == (0, 0, 0)
    for module in backbone.net.modules():
        module.training = True  # whatever depends on it
    assert torch.equal(logits(backbone), logits(backbone.eval()))


def test_loading_is_silent(folders: dict[str, Path], capfd: pytest.CaptureFixture[str], recwarn: Any) -> None:
    load_backbone(f"hf:{folders['llama']}")
    assert capfd.readouterr() == ("", "")
    assert not list(recwarn)


# What is wrong, and what is said.

CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "image_size": (
        "hf:{llama}",
        {"image_size": 32},
        "this is a language model, which takes pretrained, .*, but not image_size",
    ),
    "dtype": ("hf:{llama}", {"dtype": "int8"}, "dtype: input should be 'float32', 'bfloat16' or 'float16'; got 'int8'"),
    "short": ("hf:{llama}", {"max_length": 1}, "max_length: input should be greater than or equal to 2; got 1"),
    "long": ("folder:{llama}", {"max_length": 129}, "max_length is 129, and the model has 128 positions"),
    "no chat": ("hf:{gpt2}", {"chat": True}, "no chat template; leave chat out"),
    "architecture": ("hf:{llama}", {"architecture": "x"}, "hf: architecture is not an option; closest"),
    "vit": (
        "hf:{vit}",
        {"max_length": 9},
        "a model of pictures, which takes pretrained, image_size, load_in_4bit, but not max",
    ),
    "vit folder": ("folder:{vit}", {"chat": True, "dtype": "bfloat16"}, "a model of pictures, .*, but not dtype"),
    "micro": ("perpetune:micro", {"gradient_checkpointing": True}, "gradient_checkpointing is not an option"),
    "timm": ("timm:test_vit", {"dtype": "float16", "pretrained": False}, "timm: dtype is not an option; closest"),
    "no gguf": ("hf:{llama}/model.gguf", {}, r"there is no such file; .*llama has no GGUF file$"),
    "no gguf here": ("hf:none.gguf", {}, r"such file; \. has no GGUF .*; on the hub it is OWNER/NAME/FILE.gguf$"),
    "no gguf folder": ("folder:{llama}/x.gguf", {}, "there is no such file; .*llama has no GGUF file$"),
    "torn gguf": ("hf:{torn}", {}, "torn.gguf: the file is torn: "),
    "no tokenizer": ("hf:{mute}", {}, "tokenizer"),
    "missing": ("hf:{missing}", {}, "missing: model.layers.0.mlp.up_proj.weight"),
    "unexpected": ("hf:{unexpected}", {}, "unexpected: model.layers.7.surprise"),
    "shape": ("hf:{shape}", {}, "of another shape: model.layers.0.mlp.up_proj.weight"),
    "cut": ("hf:{cut}", {}, "safetensors file cannot be read"),
    "pickle": ("hf:{pickle}", {}, "safetensors"),
    "rope": ("hf:{rope}", {}, "cannot be .*: .*longest"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_loaded_is_said_in_one_line(case: str, folders: dict[str, Path], tmp_path: Path) -> None:
    spec, options, message = CASES[case]
    made = {"vit": vit_folder(tmp_path / "vit"), "torn": tmp_path / "torn.gguf"}
    made["torn"].write_bytes(b"GGUF\3\0\0\0torn")
    for change in ("mute", "missing", "unexpected", "shape", "cut", "pickle", "rope"):
        made[change] = broken(folders["llama"], tmp_path / change, change)
    with pytest.raises(PerpetuneError, match=message) as error:
        load_backbone(spec.format(**{**folders, **made}), **options)
    assert "\n" not in str(error.value)


def broken(good: Path, folder: Path, change: str) -> Path:
    folder.mkdir()
    for file in good.iterdir():
        if change != "mute" or "token" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    if change == "rope":  # a kind of positions that this version of transformers does not know
        config = json.loads((folder / "config.json").read_text())
        config["rope_parameters"] = {**(config.get("rope_parameters") or {}), "rope_type": "longest"}
        (folder / "config.json").write_text(json.dumps(config))
    weights, name = folder / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(weights)
    if change == "missing":
        del tensors[name]
    elif change == "unexpected":
        tensors["model.layers.7.surprise"] = torch.zeros(3)
    elif change == "shape":
        tensors[name] = tensors[name][:3].clone()
    save_file(tensors, weights, metadata={"format": "pt"})
    if change == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif change == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize(
    ("config", "usable"),
    [
        ({"model_type": "bert"}, False),
        ({"model_type": "bert", "is_decoder": True}, True),
        ({"model_type": "bart"}, False),
        ({"model_type": "t5"}, False),
        ({"model_type": "clip"}, False),
        ({"model_type": "llama"}, True),
        ({"model_type": "mistral"}, True),
        ({"model_type": "gpt_neox"}, True),
    ],
)
def test_what_counts_as_a_causal_language_model(config: dict[str, Any], usable: bool) -> None:
    from transformers import AutoConfig

    assert causal_lm.is_causal(AutoConfig.for_model(**config)) is usable


@pytest.mark.parametrize(("added", "pad"), [({}, "<eos>"), ({"pad_token": "<new>"}, "<eos>"), (None, "<unk>")])
def test_a_tokenizer_without_a_pad_token_that_the_model_knows(
    added: dict[str, str] | None, pad: str, tmp_path: Path
) -> None:
    """The last token of a published tokenizer is often a pad token that the model has no row for."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.add_special_tokens(added or {})
    if added is None:
        tokenizer.eos_token, tokenizer.unk_token = None, "<bos>"
        pad = "<bos>"
    folder = tiny_language_model(tmp_path)
    tokenizer.save_pretrained(folder)
    view: Any = load_backbone(f"hf:{folder}").preprocess
    assert view.tokenizer.pad_token == pad
    assert view.pad == view.tokenizer.convert_tokens_to_ids(pad) < 300


def test_a_tokenizer_with_nothing_to_pad_with(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    folder = tiny_language_model(tmp_path)
    tokenizer.save_pretrained(folder)
    with pytest.raises(UsageError, match="no pad, eos or unk token among the 300"):
        load_backbone(f"hf:{folder}")


def test_the_length_where_nobody_says_one(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 10**30
    folder = tiny_language_model(tmp_path, max_position_embeddings=77)
    tokenizer.save_pretrained(folder)
    view: Any = load_backbone(f"hf:{folder}").preprocess
    assert view.max_length == 77


# Blocks computed again in the backward pass.


def trained(backbone: Backbone, ids: Tensor) -> tuple[float, list[Tensor], int]:
    """Loss, gradients, and how many numbers were kept for the backward pass, which begins when no PET is in force."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        with using(backbone.net, "default"):
            loss = backbone.net(input_ids=ids, labels=ids, use_cache=False).loss
        size = sum(t.numel() for t in kept.values())
        loss.backward()
    grads = [p.grad for p in parameters(backbone.net, "default")]
    for p in parameters(backbone.net, "default"):
        p.grad = None
    return loss.item(), [g for g in grads if g is not None], size


@pytest.mark.parametrize("kind", KINDS)
def test_computed_again_is_the_same_with_less_kept(kind: str, folders: dict[str, Path]) -> None:
    plain = load_backbone(f"hf:{folders[kind]}")
    again = load_backbone(f"hf:{folders[kind]}", gradient_checkpointing=True)
    assert again.fingerprint() == plain.fingerprint()
    for backbone in (plain, again):
        linear = [r for r in ("q", "v", "qkv", "fc2") if r in backbone.roles()]
        inject(backbone.net, places(backbone.net, linear), lambda p: LoRA(p, generator(p.path), rank=2, dropout=0.3))
        shake(backbone)
    plain.train()
    copied = copy.deepcopy(again)
    results = {}
    for name, backbone in (("plain", plain), ("again", again.train()), ("copied", copied.train())):
        with torch.random.fork_rng():
            torch.manual_seed(3)  # what the pets drop
            results[name] = trained(backbone, IDS)
    for name in ("again", "copied"):
        assert results[name][0] == results["plain"][0]
        assert len(results[name][1]) == len(results["plain"][1]) == len(parameters(plain.net, "default"))
        assert all(torch.equal(a, b) for a, b in zip(results[name][1], results["plain"][1], strict=True))
        assert results[name][2] < results["plain"][2] / 2
    training = {type(m).__name__ for m in again.net.modules() if m.training and not isinstance(m, LoRA)}
    assert [name for name in training if name.endswith(("Layer", "Block"))] != []
    assert not any("Attention" in name or "MLP" in name or "ForCausalLM" in name for name in training)


def test_nothing_is_computed_again_at_prediction(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    actual = causal_lm.checkpoint
    monkeypatch.setattr(causal_lm, "checkpoint", lambda *a, **k: called.append(1) or actual(*a, **k))
    backbone = load_backbone(f"hf:{folders['llama']}", gradient_checkpointing=True)
    inject(backbone.net, places(backbone.net, ["q"]), lora)
    backbone.train()
    logits(backbone, "default")
    assert len(called) == 2
    backbone.eval()
    assert not any(m.training for m in backbone.modules())
    logits(backbone, "default")
    with torch.no_grad():
        net: Any = backbone.net
        net.generate(input_ids=IDS, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert len(called) == 2


def test_a_net_that_cannot_compute_again(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.modeling_layers

    monkeypatch.setattr(transformers.modeling_layers, "GradientCheckpointingLayer", nn.Conv2d)
    with pytest.raises(UsageError, match="LlamaForCausalLM has no gradient checkpointing"):
        load_backbone(f"hf:{folders['llama']}", gradient_checkpointing=True)


# 4 bits.


class Linear4bit(nn.Linear):
    """Called as bitsandbytes' one."""

    def __init__(self, d_in: int, d_out: int, bias: bool, quant_type: str):
        super().__init__(d_in, d_out, bias)
        assert quant_type == "nf4"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
@torch.no_grad()
def test_4_bits(kind: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    fake = types.ModuleType("bitsandbytes")
    fake.nn = types.SimpleNamespace(Linear4bit=Linear4bit)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", fake)
    plain = load_backbone(f"hf:{folders[kind]}")
    packed = load_backbone(f"hf:{folders[kind]}", load_in_4bit=True)
    linear = [role for role in plain.roles() if role in LINEAR_ROLES]
    assert roles(packed.net) == roles(plain.net)
    assert all(isinstance(p.module, Linear4bit) for p in places(packed.net, linear))
    torch.testing.assert_close(logits(packed), logits(plain))  # also where the weight was the other way round
    assert packed.fingerprint() == f"nf4 of {plain.fingerprint()}"


def test_a_model_that_comes_quantised_stays_as_it_is(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    config: Any = hf.config_of("x", str(folders["llama"]))
    config.quantization_config = {"quant_method": "bitsandbytes"}
    net = load_backbone(f"hf:{folders['llama']}").net
    monkeypatch.setattr(hf, "config_of", lambda *a, **k: config)
    monkeypatch.setattr(causal_lm, "_pretrained", lambda *a: net)
    monkeypatch.setattr(causal_lm, "in_4bit", lambda backbone: pytest.fail("it is quantised again"))
    assert load_backbone(f"hf:{folders['llama']}", load_in_4bit=True).quantised_from is None
    del config.quantization_config  # the control
    with pytest.raises(pytest.fail.Exception, match="quantised again"):
        load_backbone(f"hf:{folders['llama']}", load_in_4bit=True)


# GGUF.


def gguf_of(folder: Path, file: Path, scaled: bool = False) -> Path:
    """The tiny Llama as llama.cpp writes it: the two halves of each head of q and k interleaved, for its rotation."""
    gguf = pytest.importorskip("gguf")
    tensors, tokenizer = load_file(folder / "model.safetensors"), json.loads((folder / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(300)
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if i < 3 else 1 for i in range(len(vocabulary))])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    for add, number in ((writer.add_pad_token_id, 0), (writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2)):
        add(number)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    names |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    writer.add_tensor("token_embd.weight", tensors["model.embed_tokens.weight"].numpy())
    if scaled:
        writer.add_tensor("rope_freqs.weight", torch.tensor([1.0, 1.0, 8.0, 8.0]).numpy())
    writer.add_tensor("output_norm.weight", tensors["model.norm.weight"].numpy())
    for block in range(2):
        for ours, theirs in names.items():
            values = tensors[f"model.layers.{block}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):
                values = values.view(-1, 2, 4, 32).transpose(1, 2).reshape(values.shape)
            writer.add_tensor(f"blk.{block}.{theirs}.weight", values.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@torch.no_grad()
def test_a_gguf_file(folders: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = gguf_of(folders["llama"], tmp_path / "model.gguf")
    backbone = load_backbone(f"hf:{file}")
    assert capfd.readouterr() == ("", "")
    assert backbone.spec == f"hf:{file}"
    plain = load_backbone(f"hf:{folders['llama']}")
    torch.testing.assert_close(logits(backbone), logits(plain))
    view: Any = backbone.preprocess
    assert (view.max_length, view.tokenizer.pad_token, view.tokenizer.eos_token) == (128, "<pad>", "<eos>")
    text = "the capital, ünd 12?"
    assert view.tokenizer(text)["input_ids"] == plain.preprocess.tokenizer(text)["input_ids"]
    assert view.tokenizer.chat_template
    assert not getattr(backbone.net, "is_quantized", False)
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:-3000])
    with pytest.raises(PerpetuneError, match=r"cut.gguf: ") as error:
        load_backbone(f"hf:{tmp_path / 'cut.gguf'}")
    assert "\n" not in str(error.value)
    half = load_backbone(f"folder:{file}", dtype="bfloat16", gradient_checkpointing=True)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert load_backbone(f"folder:{file}", pretrained=False).fingerprint() != backbone.fingerprint()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gguf_file_is_unpacked_once(
    dtype: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy is the same model with the same tokenizer; a torn or outdated one is not read."""
    file = gguf_of(folders["llama"], tmp_path / "model.gguf")
    fresh = load_backbone(f"hf:{file}", dtype=dtype)
    monkeypatch.setenv("PERPETUNE_CACHE", str(tmp_path / "cache"))
    with pytest.warns(UserWarning, match=r"model.gguf: 0 MB, unpacked into .*cache/gguf/.*, which later loads read$"):
        first = load_backbone(f"hf:{file}", dtype=dtype)
    (copy,) = (tmp_path / "cache" / "gguf").iterdir()
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("error")
        patch.setattr(causal_lm, "_check_positions", lambda *_: pytest.fail("it is unpacked again"))
        again = load_backbone(f"folder:{file}", dtype=dtype)
    assert first.fingerprint() == again.fingerprint() == fresh.fingerprint()
    assert again.opens == first.opens == {"library": "transformers", "base": str(tmp_path), "options": ANY}
    texts = [backbone.preprocess.tokenizer for backbone in (fresh, again)]
    assert texts[0].backend_tokenizer.to_str() == texts[1].backend_tokenizer.to_str()
    assert texts[0].chat_template == texts[1].chat_template
    ends = [backbone.net.generation_config.eos_token_id for backbone in (fresh, again)]  # type: ignore[union-attr]
    assert ends[0] == ends[1]
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.warns(UserWarning, match="which later loads read"):
        assert load_backbone(f"hf:{file}", dtype=dtype).fingerprint() == fresh.fingerprint()
    assert load_backbone(f"hf:{file}", dtype=dtype).fingerprint() == fresh.fingerprint()
    with open(file, "r+b") as changed:  # other weights, so another name
        changed.seek(-4, 2)
        changed.write(b"\0\0\0\0")
    with pytest.warns(UserWarning, match="which later loads read"):
        assert load_backbone(f"hf:{file}", dtype=dtype).fingerprint() != fresh.fingerprint()
    assert len(list((tmp_path / "cache" / "gguf").iterdir())) == 2


def test_no_copy_of_a_gguf_file_is_half_written(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two processes the first wins; where nothing can be written one line says why."""
    from perpetune.models.loaders import unpacked

    file = gguf_of(folders["llama"], tmp_path / "model.gguf")
    cache = tmp_path / "cache" / "gguf"
    monkeypatch.setenv("PERPETUNE_CACHE", str(tmp_path / "cache"))
    write = unpacked._write

    def slower(folder: Path, net: Any, tokenizer: Any) -> None:
        write(folder, net, tokenizer)
        monkeypatch.setattr(unpacked, "_write", write)
        load_backbone(f"hf:{file}")  # the other process, which is done first

    monkeypatch.setattr(unpacked, "_write", slower)
    with pytest.warns(UserWarning, match="unpacked into") as said:
        load_backbone(f"hf:{file}")
    assert [str(w.message).partition(", which")[2] for w in said] == [" later loads read"]
    assert len(list(cache.iterdir())) == 1
    shutil.rmtree(cache)
    for name, value, reason in (("_write", torn, "disk full"), ("MOST", 10, "it has 0.0 GiB, more than 0")):
        monkeypatch.setattr(unpacked, name, value)
        with pytest.warns(UserWarning, match=f"unpacked at each load, as no copy could be kept: .*{reason}"):
            load_backbone(f"hf:{file}")
        assert not list(cache.iterdir())


def torn(folder: Path, *_: Any) -> None:
    (folder / "model.safetensors").write_bytes(b"half")
    raise OSError("disk full")


def test_a_gguf_file_whose_positions_are_scaled(folders: dict[str, Path], tmp_path: Path) -> None:
    file = gguf_of(folders["llama"], tmp_path / "model.gguf", scaled=True)
    with pytest.raises(UsageError, match=r"a tensor \(rope_freqs.weight\) scales its rotary positions"):
        load_backbone(f"hf:{file}")


def test_gguf_files_without_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal_lm, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"hf:a/b/c.gguf needs .* pip install 'perpetune\[lm\]'"):
        load_backbone("hf:a/b/c.gguf")


def test_a_gguf_file_on_the_hub() -> None:
    assert causal_lm.gguf_source("hf:a/b/c/d.gguf", "a/b/c/d.gguf", hub=True) == causal_lm.Source("a/b", "c/d.gguf")
    with pytest.raises(UsageError, match="there is no such file"):
        causal_lm.gguf_source("hf:b/d.gguf", "b/d.gguf", hub=True)
    with pytest.raises(UsageError, match=r"hf:a/b/c.gguf: .* neither the hub nor its cache has it"):
        load_backbone("hf:a/b/c.gguf")


@pytest.mark.parametrize(
    ("said", "base"),
    [
        ({}, None),
        ({"general.source.huggingface.repository": "owner/model"}, "owner/model"),
        ({"general.source.url": "https://huggingface.co/owner/model"}, "owner/model"),
        ({"general.source.url": "https://example.org/owner/model"}, None),
        ({"general.url": "https://huggingface.co/owner/model-GGUF"}, None),
        ({"general.base_model.0.repo_url": "https://huggingface.co/o/m"}, "o/m"),
    ],
)
def test_the_adapter_of_a_gguf_model_names_a_base_that_peft_can_open(
    said: dict[str, str], base: str | None, folders: dict[str, Path], tmp_path: Path
) -> None:
    from perpetune.export import write_peft
    from perpetune.models.loaders.causal_lm import gguf_origin

    gguf = pytest.importorskip("gguf")
    written = gguf.GGUFWriter.write_header_to_file

    def more(writer: Any, *args: Any, **options: Any) -> None:
        for key, value in said.items():
            writer.add_string(key, value)
        if "general.base_model.0.repo_url" in said:
            writer.add_uint32("general.base_model.count", 1)
        written(writer, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_header_to_file", more)
        file = gguf_of(folders["llama"], tmp_path / "model.gguf")
    assert gguf_origin(str(file)) == base
    backbone = load_backbone(f"hf:{file}")
    inject(backbone.net, places(backbone.net, ["q"]), lambda p: LoRA(p, generator(p.path), rank=2))
    if base is None:
        with pytest.warns(UserWarning, match="the file does not say which model it was made from"):
            write_peft(backbone, "default", tmp_path / "out")
    else:
        write_peft(backbone, "default", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base

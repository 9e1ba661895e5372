"""Dual encoders of open_clip: the same function with layers that pets can reach, and the same parameters."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SIZE, dual_tokenizer, paired
from torch import Tensor, nn
from torch.nn import functional as F

from perpetune.build import load_backbone
from perpetune.errors import MissingExtra, PerpetuneError, UsageError
from perpetune.models.backbone import Backbone
from perpetune.models.loaders import openclip
from perpetune.models.split_attention import SplitAttention, stock_names
from perpetune.models.text_side import TextSide
from perpetune.pets import inject, parameters, pets, using
from perpetune.pets.base import outermost
from perpetune.pets.lora import LoRA
from perpetune.pets.prefix import Prefix
from perpetune.pets.prompt import Prompt
from perpetune.pets.ssf import SSF
from perpetune.protection import sites
from perpetune.seeding import generator, own_global_state

open_clip: Any = pytest.importorskip("open_clip")

TEXTS = ("a photo of a cat.", "The quick brown fox jumps", "dog", "is this review good or bad?")
PIXELS = torch.randint(0, 256, (3, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

VISION = {"layers": 3, "width": 16, "head_width": 8, "patch_size": 8, "image_size": SIZE}
TEXT = {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
SIGLIP = {
    **TEXT,
    "vocab_size": 300,
    "context_length": 26,
    "hf_tokenizer_name": "here",
    "no_causal_mask": True,
    "proj_bias": True,
}
SIGLIP |= {"pool_type": "last"}
TIMM = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"vision_cfg": VISION, "text_cfg": TEXT},
    "quick": {"vision_cfg": VISION, "text_cfg": TEXT, "quick_gelu": True},
    "qk_norm": {"vision_cfg": {**VISION, "qk_norm": True}, "text_cfg": {**TEXT, "qk_norm": True, "scale_heads": True}},
    "siglip": {"vision_cfg": {**VISION, "no_ln_pre": True}, "text_cfg": SIGLIP, "init_logit_bias": -10},
    "timm": {"vision_cfg": {**TIMM, "timm_pool": "token"}, "text_cfg": TEXT},
}
KINDS = list(CONFIGS)


def folder_of(path: Path, kind: str) -> Path:
    """A net of open_clip with random weights, in a folder of its layout, as OpenAI's weights are stored."""
    path.mkdir(exist_ok=True)
    config = {"embed_dim": 8, **copy.deepcopy(CONFIGS[kind])}
    with own_global_state("open_clip", kind):
        net = open_clip.model.CLIP(**copy.deepcopy(config)) if kind != "siglip" else open_clip.CustomTextCLIP(**config)
        for name, parameter in net.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.3)
            elif "logit" in name:
                parameter.data.fill_(-1.5 if "bias" in name else 2.0)
    save_file({k: v.clone() for k, v in net.state_dict().items()}, path / "open_clip_model.safetensors")
    pictures = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "resize_mode": "squash", "interpolation": "bilinear"}
    (path / openclip.CONFIG).write_text(json.dumps({"model_cfg": config, "preprocess_cfg": pictures}))
    if kind == "siglip":
        dual_tokenizer("Siglip").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: folder_of(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


def load(folder: Path, **options: Any) -> Backbone:
    return load_backbone(f"openclip:{folder}", **options)


def side(backbone: Backbone) -> TextSide:
    assert backbone.texts is not None
    return backbone.texts


def stock(folder: Path) -> tuple[Any, Any]:
    """The net and the tokenizer that open_clip itself makes of the folder."""
    name = f"local-dir:{folder}"
    return open_clip.create_model(name, force_custom_text=True).eval(), open_clip.get_tokenizer(name)


def pixels_of(kind: str) -> Tensor:
    return PIXELS if kind != "timm" else PIXELS.repeat_interleave(10, 2).repeat_interleave(10, 3)


def put(backbone: Backbone, *at: str, kind: Any = LoRA, name: str = "default", **options: Any) -> list[nn.Parameter]:
    given = {"rank": 2, **options} if kind is LoRA else options
    places = backbone.pet_places(list(at))
    inject(backbone.net, places, lambda place: kind(place, generator("open_clip", place.path), **given), name)
    return parameters(backbone.net, name)


def shake(changed: list[nn.Parameter]) -> None:
    with torch.no_grad():
        for number, parameter in enumerate(changed):
            parameter.add_(torch.randn(parameter.shape, generator=generator("shake", number)) * 0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_open_clip(folders: dict[str, Path], kind: str) -> None:
    backbone, (net, tokenizer) = load(folders[kind]), stock(folders[kind])
    backbone.check()
    pixels, texts = pixels_of(kind), side(backbone)
    with torch.no_grad():
        normalised = (pixels / 255 - backbone.mean) / backbone.std
        expected = net.get_logits(normalised, tokenizer(list(TEXTS)))[0]
        cosines = F.normalize(backbone.features(pixels), dim=-1) @ F.normalize(texts.of(TEXTS), dim=-1).T
        scores = texts.scale * cosines + (0 if texts.bias is None else texts.bias)
        assert expected.std() > 0.1
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
        assert (texts.bias is None) == (kind != "siglip")
        width = texts.inputs(TEXTS).ids.shape[1]
        assert width == (26 if kind == "siglip" else 9)  # a causal tower takes texts of their own length
        for number, text in enumerate(TEXTS):
            torch.testing.assert_close(texts.of([text])[0], texts.of(TEXTS)[number], atol=1e-5, rtol=1e-5)
        if kind == "quick":
            other = load(folders["plain"])
            other.net.load_state_dict(backbone.net.state_dict())
            assert (other.features(pixels) - backbone.features(pixels)).abs().max() > 1e-3  # GELU is something else
    view: Any = backbone.preprocess
    assert (view.mean, view.interpolation, view.crop) == ((0.1, 0.2, 0.3), "bilinear", None)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_get_their_names_in_open_clip_back_and_are_shared(folders: dict[str, Path], kind: str) -> None:
    backbone, (net, _) = load(folders[kind]), stock(folders[kind])
    names = stock_names(backbone.net)
    assert names.keys() == net.state_dict().keys()
    assert all(torch.equal(names[name], value) for name, value in net.state_dict().items())
    before = {name: value.data_ptr() for name, value in net.state_dict().items()}
    openclip.split("here", net)
    assert {name: value.data_ptr() for name, value in stock_names(net).items()} == before


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("custom", [False, True])
def test_split_attention_is_the_attention_that_it_replaces(masked: bool, custom: bool) -> None:
    """Outputs and all gradients; without gradients torch's attention goes another way, and that one too."""
    from open_clip.transformer import Attention

    with own_global_state("split"):
        attention: Any = Attention(16, 2, qk_norm=True, scale_heads=True, inner_norm=True) if custom else None
        attention = attention or nn.MultiheadAttention(16, 2, batch_first=True)
        for parameter in attention.parameters():
            nn.init.normal_(parameter, std=0.5)
    attention.eval()
    made = SplitAttention(attention)
    mask = torch.full((5, 5), -torch.inf).triu(1) if masked else None
    x, weight = torch.randn(3, 5, 16), torch.randn(3, 5, 16)

    def run(module: Any) -> tuple[Tensor, ...]:
        given = x.clone().requires_grad_()
        more = () if custom else (given, given)
        y = module(given, *more, attn_mask=mask) if custom else module(given, *more, need_weights=False, attn_mask=mask)
        y = y if custom else y[0]
        wanted = [p for p in attention.parameters() if p.requires_grad]
        return (y, *torch.autograd.grad((y * weight).sum(), [given, *wanted]))

    for ours, theirs in zip(run(made), run(attention), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        more = () if custom else (x, x)
        ours, theirs = (m(x, *more, attn_mask=mask) for m in (made, attention))
        torch.testing.assert_close(ours if custom else ours[0], theirs if custom else theirs[0], atol=1e-5, rtol=1e-5)
        if masked:  # a mask for more tokens than there are is cut
            wide = torch.full((9, 9), -torch.inf).triu(1)
            cut = made(x, attn_mask=wide)
            assert torch.equal(cut if custom else cut[0], ours if custom else ours[0])
    assert made.qkv.weight is attention.in_proj_weight
    assert made.proj.weight is attention.out_proj.weight


@pytest.mark.parametrize("kind", KINDS)
def test_pets_reach_every_tower_and_leave_the_other_bit_for_bit(folders: dict[str, Path], kind: str) -> None:
    backbone, pixels = load(folders[kind]), pixels_of(kind)
    plain = backbone.features(pixels), side(backbone).of(TEXTS)
    for tower in ("picture", "text"):
        for pet, roles in ((LoRA, ["q", "v", "proj", "fc1", "out"]), (Prefix, ["attn"]), (SSF, ["operations"])):
            name = f"{tower}-{pet.__name__}"
            changed = put(backbone, *(f"{tower}.{role}" for role in roles), kind=pet, name=name)
            with using(backbone.net, name):
                if not pet.adds_tokens:
                    assert torch.equal(backbone.features(pixels), plain[0])
                    assert torch.equal(side(backbone).of(TEXTS), plain[1])
                shake(changed)
                moved = backbone.features(pixels), side(backbone).of(TEXTS)
            assert torch.equal(moved[0], plain[0]) == (tower == "text")
            assert torch.equal(moved[1], plain[1]) == (tower == "picture")
            sum(f.square().sum() for f in moved).backward()  # type: ignore[union-attr]
            assert all(p.grad is not None and p.grad.any() for p in changed), name
    prompt = put(backbone, "picture.attn", kind=Prompt, name="deep")
    with using(backbone.net, "deep"):
        backbone.features(pixels).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in prompt)


def test_lora_at_q_leaves_the_rows_of_k_and_v(folders: dict[str, Path]) -> None:
    backbone = load(folders["plain"])
    shake(put(backbone, "text.q"))
    caught: list[Tensor] = []
    outermost(backbone.net, backbone.pet_places(["text.q"])[0].path).register_forward_hook(
        lambda _m, _a, output: caught.append(output)
    )
    with torch.no_grad():
        side(backbone).of(TEXTS)
        with using(backbone.net, "default"):
            side(backbone).of(TEXTS)
    (q, *kv), (tuned, *tuned_kv) = (made.chunk(3, -1) for made in caught)
    assert not torch.equal(q, tuned)
    assert all(torch.equal(a, b) for a, b in zip(kv, tuned_kv, strict=True))


@pytest.mark.parametrize("tower", ["picture", "text"])
def test_a_prefix_is_more_keys_and_values_and_a_causal_tower_stays_causal(folders: dict[str, Path], tower: str) -> None:
    backbone = load(folders["plain"])
    put(backbone, f"{tower}.attn", kind=Prefix, length=3, std=1.0)
    place, pet = backbone.pet_places([f"{tower}.attn"])[0], pets(backbone.net, "default")[0]
    attention = place.module
    assert isinstance(pet, Prefix)
    assert isinstance(attention, SplitAttention)
    caught: list[tuple[Tensor, Tensor]] = []
    outermost(backbone.net, place.path).register_forward_hook(lambda _m, args, y: caught.append((args[0], y[0])))
    made = side(backbone).inputs(TEXTS)
    with torch.no_grad(), using(backbone.net, "default"):
        backbone.features(PIXELS)
        side(backbone).encode(made)
        changed = made.ids.clone()
        changed[:, 2] = 77
        side(backbone).encode(type(made)(ids=changed, mask=made.mask))
        x, y = caught[0]
        if tower == "text":
            assert torch.equal(caught[1][1][:, :2], y[:, :2])  # a later token changes no earlier one
            assert not torch.equal(caught[1][1][:, 2:], y[:, 2:])
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in attention.qkv(x).chunk(3, -1))
        keys, values = (pet._by_head(p).expand(len(x), -1, -1, -1) for p in (pet.keys, pet.values))
        logits = q @ torch.cat([keys, k], 2).mT / 8**0.5
        width = x.shape[1]
        sees = torch.ones(width, width, dtype=torch.bool)
        sees = torch.cat([torch.ones(width, 3, dtype=torch.bool), sees.tril() if tower == "text" else sees], 1)
        mixed = logits.masked_fill(~sees, -torch.inf).softmax(-1) @ torch.cat([values, v], 2)
        torch.testing.assert_close(y, attention.proj(mixed.transpose(1, 2).flatten(2)), atol=1e-5, rtol=1e-5)


def test_a_mask_belongs_to_the_tower_that_reads_the_texts(folders: dict[str, Path]) -> None:
    backbone = load(folders["plain"])
    put(backbone, "picture.q", "text.q")
    watched, _, _ = sites.pet_sites(backbone, "exact")
    mask = torch.zeros(len(PIXELS), 5, dtype=torch.bool)
    mask[:, :3] = True
    watch = sites.Watch(watched)
    watch.mask = mask
    with torch.no_grad(), using(backbone.net, "default"), watch.on():
        backbone.features(PIXELS)
        side(backbone).of(TEXTS)
    counted = {name: moments.count for name, moments in watch.moments.items()}
    words = int(side(backbone).inputs(TEXTS).mask.sum())
    assert {n for name, n in counted.items() if ".visual." in name} == {15}
    assert {n for name, n in counted.items() if ".text." in name} == {words}


@pytest.mark.parametrize(("kind", "dtype"), paired(["plain", "qk_norm", "siglip"], ["bfloat16", "float16"]))
def test_pets_in_a_net_of_half_precision_are_float32(folders: dict[str, Path], kind: str, dtype: str) -> None:
    backbone = load(folders[kind], dtype=dtype)
    changed = put(backbone, "picture.q", "text.fc1", "text.q") + put(backbone, "text.attn", kind=Prefix, name="more")
    shake(changed)
    with using(backbone.net, ("default", "more")):
        result = backbone.features(PIXELS), side(backbone).of(TEXTS)
    assert {f.dtype for f in result} == {torch.float32}
    assert all(f.isfinite().all() for f in result)
    assert {p.dtype for p in changed} == {torch.float32}
    exact = load(folders[kind])
    torch.testing.assert_close(
        load(folders[kind], dtype=dtype).features(PIXELS), exact.features(PIXELS), atol=0.3, rtol=0.1
    )


def test_taps_sizes_and_roles(folders: dict[str, Path]) -> None:
    backbone = load(folders["plain"], taps=2)
    assert backbone.dim == backbone.features(PIXELS).shape[1] == 8 + 2 * 2 * 16  # its own feature stands first
    assert backbone.tap(None).dim == 8
    assert {"norm_pre", "text.embed", "picture.out", "text.out", "text.feature"} < set(backbone.roles())
    assert [p.path for p in backbone.pet_places(["out", "text.out"])] == ["visual_projection", "text_projection"]
    assert load(folders["timm"]).pet_places(["out"])[0].path == "visual.head.proj"
    assert "norm_pre" not in load(folders["siglip"]).roles()
    larger = load(folders["plain"], image_size=24)
    assert larger.features(torch.zeros(1, 3, 24, 24, dtype=torch.uint8)).shape == (1, 8)
    through_folder = load_backbone(f"folder:{folders['plain']}")
    assert torch.equal(through_folder.features(PIXELS), load(folders["plain"]).features(PIXELS))


def test_a_long_text_loses_its_end_and_that_is_said(folders: dict[str, Path]) -> None:
    for kind, length in (("plain", 20), ("siglip", 26)):
        texts = side(load(folders[kind]))
        with pytest.warns(UserWarning, match=f"takes {length} tokens; longer texts lose their end: the fox the"):
            made = texts.inputs(["the fox " * 40, "dog", " ".join("a" * (18 if kind == "plain" else 10))])
        assert made.ids.shape == (3, length)
        if kind == "plain":
            assert int(made.ids[0, -1]) == 49407
            assert int(made.ids[2, -1]) == 49407  # just as long as there is room: nothing was said of it


def test_a_picture_tower_of_unknown_parts_gets_no_pet_by_mistake(tmp_path: Path) -> None:
    """`q` alone may not land in the text tower."""
    resnet = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "image_size": 32}
    CONFIGS["resnet"] = {"vision_cfg": resnet, "text_cfg": TEXT}
    try:
        backbone = load(folder_of(tmp_path / "resnet", "resnet"))
    finally:
        del CONFIGS["resnet"]
    with pytest.raises(UsageError, match="the parts of its picture tower are not known; name the tower for texts"):
        backbone.pet_places(["q"])
    assert backbone.pet_places(["text.q"])
    assert backbone.features(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 8)


class Fake:
    """What `openclip` asks of open_clip's tables, and the folder from which it takes weights instead of the hub."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, **tag: Any) -> None:
        config = json.loads((folder / openclip.CONFIG).read_text())["model_cfg"]
        tag = {"hf_hub": "own/it/", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "resize_mode": "shortest", **tag}
        monkeypatch.setattr(
            open_clip, "get_model_config", lambda name: copy.deepcopy(config) if name == "Tiny" else None
        )
        monkeypatch.setattr(open_clip, "list_models", lambda: ["Tiny", "Other"])
        monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda name: ["ours", "theirs"])
        monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, which: tag)
        monkeypatch.setattr(open_clip, "get_tokenizer", lambda name: open_clip.SimpleTokenizer(context_length=20))
        monkeypatch.setattr(openclip, "hub_file", self.file)
        self.folder, self.asked = folder, [""]

    def file(self, spec: str, repository: str, name: str) -> Path | None:
        self.asked.append(f"{repository}: {name}")
        path = self.folder / name
        return path if path.is_file() else None


def test_a_tag_says_which_activation_and_which_pictures(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake(folders["plain"], monkeypatch, quick_gelu=True)
    backbone = load_backbone("openclip:Tiny.ours")
    assert fake.asked[-1] == "own/it: open_clip_model.safetensors"
    quick = load(folders["plain"])
    acts = [type(module).__name__ for module in backbone.net.modules() if "GELU" in type(module).__name__]
    assert set(acts) == {"QuickGELU"}
    assert len(acts) == 5  # a block each
    assert {type(m).__name__ for m in quick.net.modules() if "GELU" in type(m).__name__} == {"GELU"}
    view: Any = backbone.preprocess
    assert (view.mean, view.crop, view.interpolation) == ((0.5, 0.5, 0.5), 1.0, "bicubic")
    assert load_backbone("openclip:Tiny", pretrained=False).dim == 8


def test_what_cannot_be_loaded_is_one_line(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(spec: str, said: str, kind: type[PerpetuneError] = PerpetuneError, **options: Any) -> None:
        with pytest.raises(kind, match=said) as caught:
            load_backbone(spec, **options)
        assert "\n" not in str(caught.value)

    with monkeypatch.context() as patched:
        fake = Fake(folders["quick"], patched)
        refused("openclip:Tiny.ours", "Tiny has QuickGELU, and these weights were trained with GELU", UsageError)
        fake = Fake(folders["plain"], patched)
        refused("openclip:Tinny.ours", "open_clip has no model 'Tinny'; one of Other, Tiny", UsageError)
        refused("openclip:Tiny", "weights by tag only; write Tiny.TAG: one of ours, theirs", UsageError)
        refused("openclip:Tiny.our", "no weights tagged 'our' of Tiny", UsageError)
        fake.folder = tmp_path
        refused("openclip:Tiny.ours", "own/it has no open_clip_model.safetensors; weights as pickle are not loaded")
        Fake(folders["plain"], patched, hf_hub="")
        refused("openclip:Tiny.ours", "only as a pickle file")
    coca = tmp_path / "coca"
    coca.mkdir()
    config = {"embed_dim": 8, **CONFIGS["plain"], "multimodal_cfg": {}}
    (coca / openclip.CONFIG).write_text(json.dumps({"model_cfg": config}))
    refused(f"openclip:{coca}", "there is no open_clip_model.safetensors in the folder", UsageError)
    refused(f"openclip:{coca}", "CoCa, which also writes texts, cannot be used", UsageError, pretrained=False)
    config = {"embed_dim": 8, "vision_cfg": {**VISION, "scaled_cosine_attn": True}, "text_cfg": TEXT}
    (coca / openclip.CONFIG).write_text(json.dumps({"model_cfg": config}))
    refused(f"openclip:{coca}", "compares by cosine", UsageError, pretrained=False)
    tensors = load_file(folders["plain"] / "open_clip_model.safetensors")
    del tensors["ln_final.weight"]
    torn = folder_of(tmp_path / "torn", "plain")
    save_file(tensors, torn / "open_clip_model.safetensors")
    refused(f"openclip:{torn}", "cannot be built or loaded: .*ln_final.weight")
    wrong = folder_of(tmp_path / "wrong", "plain")
    given = json.loads((wrong / openclip.CONFIG).read_text())
    given["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "here"
    (wrong / openclip.CONFIG).write_text(json.dumps(given))
    dual_tokenizer("CLIP").save_pretrained(wrong)
    refused(f"openclip:{wrong}", "reads a text at the highest token, and its tokenizer does not end", UsageError)
    (wrong / openclip.CONFIG).unlink()
    refused(f"openclip:{wrong}", "there is no open_clip_config.json", UsageError)
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    refused("openclip:ViT-B-16.openai", r"pip install 'perpetune\[openclip\]'", MissingExtra)


def test_names_and_tags_of_the_real_tables() -> None:
    """Every tag of OpenAI's weights has QuickGELU and safetensors on the hub, so far as the tables say."""
    found = [name for name, tag in open_clip.list_pretrained() if tag == "openai"]
    assert len(found) > 5
    for name in found:
        of_tag = SimpleNamespace(**open_clip.get_pretrained_cfg(name, "openai"))
        assert of_tag.quick_gelu
        assert of_tag.hf_hub.count("/") == 2
        assert "." not in name

"""A plain net stands for that of timm or transformers to the bit or not at all, and a state is opened by it."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from perpetune.build import load_backbone
from perpetune.data.pictures.view import PictureView
from perpetune.errors import PerpetuneError, StateError
from perpetune.learner import Learner
from perpetune.models.backbone import Backbone
from perpetune.models.loaders import plain
from perpetune.models.plain_timm import PlainTimmViT
from perpetune.pets import inject, parameters, using
from perpetune.pets.lora import LoRA
from perpetune.pets.prefix import Prefix
from perpetune.seeding import generator, own_global_state

SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}
COVERED: dict[str, dict[str, Any]] = {
    "plain": {},
    "DINOv2": {"init_values": 0.1},
    "registers": {"init_values": 0.1, "reg_tokens": 3, "no_embed_class": True},
    "CLIP": {"pre_norm": True},
    "mean": {"global_pool": "avg", "class_token": False, "reg_tokens": 2},
    "mean, norm of tokens": {"global_pool": "avg", "fc_norm": False, "qkv_bias": False},
    "any size": {"dynamic_img_size": True, "final_norm": False},
}


def timm_vit(**options: Any) -> Any:
    from timm.models.vision_transformer import VisionTransformer

    with own_global_state("test", "plain timm"):
        net = VisionTransformer(**{**SMALL, **options})
        for parameter in net.parameters():  # timm starts with zeros and ones, which hide a missing part
            nn.init.normal_(parameter, std=0.3)
    return net.requires_grad_(False).eval()


def sizes_of(net: Any) -> dict[str, Any] | None:
    whole = Backbone(net, spec="timm:x", dim=24, preprocess=PictureView(16))
    return plain.covered(whole, plain.FORMS["VisionTransformer"])


def plain_of(net: Any) -> PlainTimmViT:
    sizes = sizes_of(net)
    assert sizes is not None
    made = PlainTimmViT(**json.loads(json.dumps(sizes)))
    made.load(net.state_dict())
    return made.requires_grad_(False).eval()


def pixels(count: int, side: int = 16) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("form", COVERED)
def test_features_and_gradients_are_the_same_to_the_bit(form: str) -> None:
    theirs = timm_vit(**COVERED[form])
    ours = plain_of(theirs)
    assert [name for name, _ in theirs.named_parameters()] == [name for name, _ in ours.named_parameters()]
    for count, half in ((1, False), (3, False), (3, True)):
        found = []
        for net in (theirs, ours):
            weights = list(net.requires_grad_(True).parameters())
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                features = net(pixels(count))
            found.append([features.detach(), *torch.autograd.grad(features.float().square().sum(), weights)])
            net.requires_grad_(False)
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.equal(ours(-pixels(3)), theirs(pixels(3)))  # the control


def test_pets_find_the_same_places_and_change_the_same_bits() -> None:
    found = []
    for net in (timm_vit(init_values=0.1), plain_of(timm_vit(init_values=0.1))):
        backbone = Backbone(net, spec="timm:x", dim=24, preprocess=PictureView(16))
        roles = backbone.roles()
        for kind, at, options in ((LoRA, ["q", "v", "fc1"], {"rank": 2}), (Prefix, ["attn"], {"length": 2})):
            inject(backbone.net, backbone.pet_places(at), lambda p, k=kind, o=options: k(p, generator(p.path), **o))
        trained = list(parameters(backbone, "default"))
        draw = generator("test")
        for parameter in trained:
            parameter.data = torch.randn(parameter.shape, generator=draw) * 0.1
            parameter.requires_grad_(True)
        with using(backbone, "default"):
            features = backbone(pixels(2))
        gradients = torch.autograd.grad(features.square().sum(), trained)
        found.append((roles, backbone.fingerprint(), features.detach(), gradients))
    (roles, print_, features, gradients), (roles2, print2, features2, gradients2) = found
    assert (roles, print_) == (roles2, print2)
    assert torch.equal(features, features2)
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients2, strict=True))
    assert not torch.equal(features, timm_vit(init_values=0.1)(pixels(2)))  # the control: the pets act


class Shifted(nn.GELU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def _hooked(net: Any) -> None:
    net.blocks[1].mlp.fc1.register_forward_hook(lambda *_: None)


NOT_COVERED: dict[str, Any] = {
    "norm of queries": {"qk_norm": True},
    "attention pool": {"global_pool": "map"},
    "maximum": {"global_pool": "max"},
    "dropout": {"proj_drop_rate": 0.1},
    "other activation": {"act_layer": "gelu_tanh"},
    "mean of all": {"global_pool": "avg", "pool_include_prefix": True},
    "another net": lambda net: nn.Linear(3, 3),
    "slow attention": lambda net: setattr(net.blocks[0].attn, "fused_attn", False),
    "a hook": _hooked,
    "heads of one block": lambda net: vars(net.blocks[1].attn).update(num_heads=4, head_dim=6),
    "computes something else": lambda net: setattr(net.blocks[1].mlp, "act", Shifted()),
}


@pytest.mark.parametrize("form", NOT_COVERED)
def test_another_net_is_not_covered(form: str) -> None:
    change = NOT_COVERED[form]
    net = timm_vit(**(change if isinstance(change, dict) else {}))
    if callable(change):
        net = change(net) or net
    assert sizes_of(net) is None


def timm_folder(path: Path, config: bool = True, size: int = 16, **form: Any) -> Path:
    """A folder as timm writes it; its `test_vit` takes this form."""
    import timm

    args = {"img_size": size, "embed_dim": 24, "depth": 2, "num_heads": 2, "init_values": 0.1, **form}
    path.mkdir()
    with own_global_state("test", "plain timm"):
        net = timm.create_model("test_vit", pretrained=False, num_classes=3, **args)
    save_file(
        {n: v.half() if form.get("reg_tokens") else v for n, v in net.state_dict().items()}, path / "model.safetensors"
    )
    if config:
        own = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, size, size], "fixed_input_size": True}
        own |= {"interpolation": "bilinear", "crop_pct": 0.9, "num_classes": 3, "classifier": "head"}
        layout = {"architecture": "test_vit", "num_classes": 3, "model_args": args, "pretrained_cfg": own}
        (path / "config.json").write_text(json.dumps(layout))
    return path


@pytest.mark.parametrize(
    ("options", "form"),
    [({}, {}), ({"image_size": 48}, {}), ({"image_size": 64}, {"reg_tokens": 2}), ({"pixels": "fast", "taps": 1}, {})],
)
def test_a_folder_opens_again_as_timm_opens_it(options: dict[str, Any], form: dict[str, Any], tmp_path: Path) -> None:
    spec = f"folder:{timm_folder(tmp_path / 'm', **form)}"
    given = {k: v for k, v in options.items() if k == "image_size"}
    theirs = load_backbone(spec, **given)
    about = plain.described(theirs, given)
    assert about is not None
    ours = plain.reopened(spec, given, json.loads(json.dumps(about)))
    assert ours is not None
    assert isinstance(ours.net, PlainTimmViT)
    assert ours.fingerprint() == theirs.fingerprint()
    for field in ("spec", "dim", "preprocess", "prefix", "class_token", "opens", "width"):
        assert getattr(ours, field) == getattr(theirs, field), field
    picture = pixels(2, ours.preprocess.size)
    assert torch.equal(ours(picture), theirs(picture))
    assert plain.reopened(spec, {**given, "image_size": 80}, about) is None
    assert plain.reopened(f"folder:{tmp_path}", given, about) is None
    (tmp_path / "m").rename(tmp_path / "elsewhere")
    moved, there = (
        plain.reopened(f"folder:{tmp_path / 'elsewhere'}", given, about),
        load_backbone(f"folder:{tmp_path / 'elsewhere'}", **given),
    )
    assert moved is not None
    assert (moved.spec, moved.opens, moved.fingerprint()) == (there.spec, there.opens, theirs.fingerprint())
    assert plain.reopened(f"hf:{tmp_path / 'elsewhere'}", given, about) is None


def test_a_model_by_name_opens_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    import timm

    with own_global_state("test", "plain timm"):
        net = timm.create_model("test_vit", pretrained=False)
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(tmp_path / "model.safetensors"))
    theirs = load_backbone("timm:test_vit.r160_in1k", image_size=32)
    about = plain.described(theirs, {"pretrained": True, "image_size": 32})
    assert about is not None
    ours = plain.reopened("timm:test_vit.r160_in1k", {"pretrained": True, "image_size": 32}, about)
    assert ours is not None
    assert (ours.fingerprint(), ours.preprocess, ours.opens) == (theirs.fingerprint(), theirs.preprocess, theirs.opens)
    assert plain.described(load_backbone("timm:test_vit", pretrained=False), {"pretrained": False}) is None


def hf_folder(path: Path, kind: str = "vit", headed: bool = False, **config: Any) -> Path:
    import transformers as t

    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    names = {"vit": "ViT", "deit": "DeiT", "dinov2": "Dinov2"}
    sizes |= {"mlp_ratio": 2} if kind == "dinov2" else {"intermediate_size": 48}
    made = getattr(t, f"{names[kind]}Config")(**{**sizes, **config})
    with own_global_state("test", kind):
        model = getattr(t, f"{names[kind]}{'ForImageClassification' if headed else 'Model'}")(made)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    view = {"size": {"height": 16, "width": 16}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (path / "preprocessor_config.json").write_text(json.dumps({**view, "resample": 3}))
    return path


HF: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ViT": ("vit", {}, {}),
    "ViT with a classifier": ("vit", {"headed": True, "qkv_bias": False}, {"taps": 1}),
    "DINOv2": ("dinov2", {}, {}),
    "DINOv2 of another size": ("dinov2", {"use_mask_token": False}, {"image_size": 32}),
    "DINOv2 with a classifier": ("dinov2", {"headed": True, "dtype": torch.float16}, {"pixels": "fast"}),
}


@pytest.mark.parametrize("form", HF)
def test_a_model_of_transformers_opens_again_to_the_same_bits(form: str, tmp_path: Path) -> None:
    kind, config, options = HF[form]
    spec = f"hf:{hf_folder(tmp_path / 'm', kind, **config)}"
    given = {k: v for k, v in options.items() if k == "image_size"}
    theirs = load_backbone(spec, **given)
    about = plain.described(theirs, given)
    assert about is not None
    ours = plain.reopened(spec, given, json.loads(json.dumps(about)))
    assert ours is not None
    assert type(ours.net).__name__ in ("PlainViT", "PlainDinov2")
    assert [name for name, _ in theirs.net.named_parameters()] == [name for name, _ in ours.net.named_parameters()]
    for field in ("spec", "dim", "preprocess", "prefix", "class_token", "opens", "width"):
        assert getattr(ours, field) == getattr(theirs, field), field
    assert ours.fingerprint() == theirs.fingerprint()
    assert ours.roles() == theirs.roles()
    read = [f"{place.path} {place.roles} {place.heads}" for place in ours.pet_places(ours.roles())]
    assert read == [f"{place.path} {place.roles} {place.heads}" for place in theirs.pet_places(theirs.roles())]
    for count, half in ((1, False), (3, False), (3, True)):
        found = []
        for backbone in (theirs, ours):
            weights = [p for name, p in backbone.net.named_parameters() if "mask_token" not in name]
            backbone.net.requires_grad_(True)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                features = backbone(pixels(count, theirs.preprocess.size))
            found.append([features.detach(), *torch.autograd.grad(features.float().square().sum(), weights)])
            backbone.net.requires_grad_(False)
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    (tmp_path / "m").rename(tmp_path / "elsewhere")
    spec = f"hf:{tmp_path / 'elsewhere'}"
    moved, there = plain.reopened(spec, given, about), load_backbone(spec, **given)
    assert moved is not None
    assert (moved.spec, moved.opens) == (there.spec, there.opens)
    files = tmp_path / "elsewhere" / "preprocessor_config.json"
    files.write_text(files.read_text().replace("0.1", "0.2"))
    assert plain.reopened(spec, given, about) is None


@pytest.mark.parametrize(
    ("kind", "config", "options"),
    [
        ("vit", {}, {"image_size": 32}),
        ("vit", {"hidden_act": "gelu_new"}, {}),
        ("vit", {"hidden_dropout_prob": 0.1}, {}),
        ("dinov2", {"use_swiglu_ffn": True}, {}),
        ("deit", {}, {}),
    ],
)
def test_another_model_of_transformers_is_left_to_it(
    kind: str, config: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    backbone = load_backbone(f"folder:{hf_folder(tmp_path / 'm', kind, **config)}", **options)
    assert plain.described(backbone, options) is None


def test_the_packaged_model_and_random_weights_are_not_described() -> None:
    assert plain.described(load_backbone("perpetune:micro"), {}) is None
    assert plain.described(load_backbone("perpetune:micro", image_size=16), {"image_size": 16}) is None


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    timm_folder(folder / "m")
    tiny.picture_folder(folder / "data", ("a", "b"), 4)
    tiny.picture_folder(folder / "more", ("b", "c"), 4)
    Learner(tiny.recipe(folder / "m"), folder / "state").learn(folder / "data", holdout=0.25)
    return folder


def _copied(world: Path, tmp_path: Path) -> Path:
    """A state of its own, whose model also lies in a folder of its own."""
    import shutil

    shutil.copytree(world / "state", tmp_path / "state")
    return tmp_path / "state"


def test_a_state_opens_without_timm_and_goes_on_to_the_same_bits(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, answers = [], []
    for by in ("plain", "timm"):
        state = _copied(world, tmp_path / by)
        if by == "timm":
            monkeypatch.setattr(plain, "reopened", lambda *_: None)
        learner = Learner.load(state)
        assert type(learner.backbone.net).__name__ == ("PlainTimmViT" if by == "plain" else "VisionTransformer")
        answers.append(learner.predict(sorted((world / "data" / "a").iterdir())))
        learner.learn(world / "more", holdout=0.25)
        answers.append(learner.predict(sorted((world / "more" / "c").iterdir())))
        tensors.append(tiny.task_tensors(state))
    assert answers[:2] == answers[2:]
    assert tensors[0].keys() == tensors[1].keys()
    for task, group in tensors[0].items():
        assert all(torch.equal(tensor, tensors[1][task][name]) for name, tensor in group.items())


def test_predict_imports_nothing_of_timm(world: Path) -> None:
    code = (
        "import sys; from perpetune import cli; code = cli.call(sys.argv[1:]); "
        "print([m for m in ('timm', 'torchvision', 'torch._dynamo', 'sympy', 'transformers') if m in sys.modules]); "
        "sys.exit(code)"
    )
    arguments = ["predict", str(world / "state"), str(world / "data" / "a" / "0.png")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "[]"), done.stderr


def test_what_has_changed_is_left_to_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm_folder(tmp_path / "m")
    tiny.picture_folder(tmp_path / "data", ("a", "b"), 3)
    Learner(tiny.recipe(tmp_path / "m", pet=None, method="frozen", head="ncm"), tmp_path / "state").learn(
        tmp_path / "data", holdout=0.0
    )
    config, weights = tmp_path / "m" / "config.json", tmp_path / "m" / "model.safetensors"
    config.write_text(config.read_text() + "\n")
    assert type(Learner.load(tmp_path / "state").backbone.net).__name__ == "VisionTransformer"
    config.write_text(config.read_text()[:-1])
    before, settings = config.read_text(), json.loads(config.read_text())
    settings["pretrained_cfg"]["mean"] = [0.1, 0.2, 0.5]  # the fingerprint does not know it
    config.write_text(json.dumps(settings))
    for open_it in (Learner.load, partial(Learner.relocate, model=f"folder:{tmp_path / 'm'}")):
        with pytest.raises(StateError, match=r"its settings are not: mean is \[0.1, 0.2, 0.5\], and was"):
            open_it(tmp_path / "state")
    config.write_text(before)
    assert type(Learner.load(tmp_path / "state").backbone.net).__name__ == "PlainTimmViT"
    good = load_file(weights)
    save_file({**good, "blocks.0.attn.qkv.bias": good["blocks.0.attn.qkv.bias"] + 1}, weights)
    with pytest.raises(StateError, match="was made with other weights"):
        Learner.load(tmp_path / "state")
    save_file({**good, "surprise": torch.zeros(1)}, weights)
    with pytest.raises(PerpetuneError, match="surprise"):
        Learner.load(tmp_path / "state")
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(PerpetuneError, match="safetensors file cannot be read"):
        Learner.load(tmp_path / "state")
    save_file(good, weights)
    document = tmp_path / "state" / "backbone.json"
    content = json.loads(document.read_text())
    content["plain"]["sizes"]["heads"] = 4  # the tensors have the same shapes, and the features would be others
    document.write_text(json.dumps(content))
    with pytest.raises(StateError, match=r"backbone.json: plain is"):
        Learner.load(tmp_path / "state")


def test_a_merged_export_is_a_model_of_its_library(world: Path, tmp_path: Path) -> None:
    import timm
    import transformers

    learner = Learner.load(world / "state")
    learner.export(tmp_path / "timm", to="merged")  # compares its answers with those of the state
    net = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    assert type(net).__name__ == "VisionTransformer"
    assert type(learner.backbone.net).__name__ == "PlainTimmViT"
    made = Learner(tiny.recipe(hf_folder(tmp_path / "m", "dinov2"), head="ncm"), tmp_path / "state")
    made.learn(world / "data", holdout=0.25)
    learner = Learner.load(tmp_path / "state")
    assert type(learner.backbone.net).__name__ == "PlainDinov2"
    learner.export(tmp_path / "hf", to="merged")
    assert type(transformers.AutoModel.from_pretrained(tmp_path / "hf")).__name__ == "Dinov2Model"

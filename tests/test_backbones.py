"""Where backbones come from, how strictly they are loaded, and what is said when they cannot be."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from perpetune.build import load_backbone
from perpetune.data.pictures.view import PictureView
from perpetune.errors import MissingExtra, PerpetuneError, UsageError
from perpetune.models.backbone import Backbone
from perpetune.models.towers import places
from perpetune.pets import inject, parameters, using
from perpetune.pets.lora import LoRA
from perpetune.recipe import make_recipe, parse_recipe
from perpetune.registry import BUILTIN
from perpetune.seeding import generator, own_global_state

HF = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 16}
PROCESSOR = {
    "size": {"height": 16, "width": 16},
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.4, 0.5, 0.6],
    "resample": 3,
}


def hf_model(kind: str, headed: bool = False) -> nn.Module:
    import transformers as t

    names = {"vit": "ViT", "deit": "DeiT", "dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters"}
    names |= {"vit_msn": "ViTMSN", "dinov3_vit": "DINOv3ViT"}
    config = getattr(t, f"{names[kind]}Config")(**HF, patch_size=8)
    with own_global_state("test", kind):
        model: nn.Module = getattr(t, f"{names[kind]}{'ForImageClassification' if headed else 'Model'}")(config)
    return model.eval()


def hf_folder(path: Path, kind: str, headed: bool = False) -> Path:
    hf_model(kind, headed).save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return path


def timm_folder(
    path: Path,
    classes: int = 0,
    config: bool = True,
    dtype: torch.dtype = torch.float32,
    name: str = "test_vit",
) -> Path:
    import timm

    path.mkdir(exist_ok=True)
    with own_global_state("test", "timm"):
        net = timm.create_model(name, pretrained=False, num_classes=classes)
    save_file({name: value.to(dtype) for name, value in net.state_dict().items()}, path / "model.safetensors")
    if config:
        own = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 160, 160]}
        own |= {"fixed_input_size": "vit" in name}
        own |= {
            "interpolation": "bilinear",
            "crop_pct": 0.9,
            "num_classes": classes,
            "classifier": net.default_cfg["classifier"],
        }
        layout = {"architecture": name, "num_classes": classes, "num_features": 64, "pretrained_cfg": own}
        (path / "config.json").write_text(json.dumps(layout))
    return path


def pixels(backbone: Backbone, count: int = 2) -> Tensor:
    size = backbone.preprocess.size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def check(backbone: Backbone) -> Tensor:
    """What every backbone has to be, whatever it comes from; its features."""
    assert not backbone.train().net.training
    backbone.eval()
    assert all(not p.requires_grad and p.dtype == torch.float32 for p in backbone.parameters())
    features = backbone(pixels(backbone))
    assert features.shape == (2, backbone.dim)
    assert features.isfinite().all()
    assert features.dtype == torch.float32
    torch.testing.assert_close(backbone(pixels(backbone)[1:]), features[1:], atol=1e-5, rtol=1e-5)
    inject(backbone.net, places(backbone.net, ["q", "v"]), lambda p: LoRA(p, generator(p.path), rank=2))
    with using(backbone, "default"):
        assert torch.equal(backbone(pixels(backbone)), features)
        for parameter in parameters(backbone, "default"):
            parameter.add_(0.1)
        assert not torch.equal(backbone(pixels(backbone)), features)
    return features


def test_the_packaged_model() -> None:
    backbone = load_backbone("perpetune:micro")
    assert backbone.spec == "perpetune:micro"
    assert backbone.dim == 192
    assert backbone.preprocess == PictureView(32)
    assert check(backbone).std() > 0.1
    assert check(load_backbone("perpetune:micro", image_size=48)).shape == (2, 192)


@pytest.mark.parametrize("kind", ["vit", "deit", "vit_msn", "dinov2", "dinov2_with_registers", "dinov3_vit"])
def test_transformers_folders(kind: str, tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / kind, kind)
    backbone = load_backbone(f"hf:{folder}")
    assert backbone.preprocess == PictureView(16, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bicubic", None)
    with torch.no_grad():
        expected = hf_model(kind)(pixel_values=pixels(backbone)).last_hidden_state[:, 0]
    torch.testing.assert_close(check(backbone), expected)
    assert load_backbone(f"folder:{folder}").fingerprint() == backbone.fingerprint()
    larger = load_backbone(f"folder:{folder}", image_size=32)
    assert larger.preprocess.size == 32
    check(larger)
    if kind in ("vit", "deit", "dinov2"):
        headed = load_backbone(f"hf:{hf_folder(tmp_path / 'headed', kind, headed=True)}")
        check(headed)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"size": 20}, (20, None)),
        ({"size": {"shortest_edge": 20}, "do_center_crop": True, "crop_size": {"height": 15, "width": 15}}, (15, 0.75)),
        ({"size": {"height": 20, "width": 24}}, "image size {'height': 20, 'width': 24}"),
        ({"size": 20, "resample": 9}, "resample 9"),
        ({"size": 20, "image_mean": [0.5]}, r"its config gives \[0.5\] as mean or std"),
        (None, "is not valid JSON"),
    ],
)
def test_preprocessing_is_the_models_own(given: dict[str, Any] | None, expected: Any, tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "vit", "vit")
    (folder / "preprocessor_config.json").write_text("no" if given is None else json.dumps(PROCESSOR | given))
    if isinstance(expected, str):
        with pytest.raises(UsageError, match=expected):
            load_backbone(f"hf:{folder}")
    else:
        preprocess = load_backbone(f"hf:{folder}").preprocess
        assert (preprocess.size, preprocess.crop) == expected


def test_without_a_preprocessor_config_a_warning_says_what_is_assumed(tmp_path: Path) -> None:
    hf_model("vit").save_pretrained(tmp_path / "vit")
    with pytest.warns(UserWarning, match="ImageNet's mean and std are assumed"):
        assert load_backbone(f"hf:{tmp_path / 'vit'}").preprocess == PictureView(16)


def broken(file: Path, change: str) -> None:
    tensors = load_file(file)
    name = next(n for n in sorted(tensors) if "patch_embed" in n and n.endswith("weight"))
    if change == "missing":
        del tensors[name]
    elif change == "unexpected":
        tensors["blocks.7.surprise"] = torch.zeros(3)
    elif change == "shape":
        tensors[name] = tensors[name][:3].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    if change == "torn":
        file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize("layout", ["transformers", "timm"])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("missing", "patch_embed"),
        ("unexpected", "surprise"),
        ("shape", "patch_embed"),
        ("torn", "safetensors file cannot be read"),
    ],
)
def test_loading_is_strict(layout: str, change: str, named: str, tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "m", "vit") if layout == "transformers" else timm_folder(tmp_path / "m")
    broken(folder / "model.safetensors", change)
    with pytest.raises(PerpetuneError, match=named) as error:
        load_backbone(f"folder:{folder}")
    assert "\n" not in str(error.value)


def test_timm_by_name() -> None:
    backbone = load_backbone("timm:test_vit", pretrained=False)
    assert (backbone.dim, backbone.preprocess.size, backbone.preprocess.crop) == (64, 160, 0.95)
    check(backbone)
    small = load_backbone("timm:test_vit", pretrained=False, image_size=64)
    assert small.preprocess.size == 64
    check(small)


def test_timm_weights_come_from_the_hub_as_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    folder = timm_folder(tmp_path / "m", classes=1000)
    asked = []

    def download(repository: str, name: str, *, revision: str | None = None) -> str:
        asked.append((repository, name))
        return str(folder / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    backbone = load_backbone("timm:test_vit.r160_in1k")
    assert asked == [("timm/test_vit.r160_in1k", "model.safetensors")]
    expected = {n: v for n, v in load_file(folder / "model.safetensors").items() if not n.startswith("head.")}
    got = backbone.net.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    check(backbone)
    check(load_backbone("timm:test_vit.r160_in1k", image_size=96))


@pytest.mark.parametrize("classes", [0, 7])
def test_timm_folders(classes: int, tmp_path: Path) -> None:
    folder = timm_folder(tmp_path / "m", classes)
    backbone = load_backbone(f"folder:{folder}")
    assert backbone.preprocess == PictureView(160, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", 0.9)
    check(backbone)
    bare = timm_folder(tmp_path / "bare", classes, config=False, dtype=torch.float16)
    named = load_backbone(f"folder:{bare}", architecture="test_vit")
    assert named.preprocess == PictureView(160, (0.5,) * 3, (0.5,) * 3, "bicubic", 0.95)
    with torch.no_grad():
        torch.testing.assert_close(named(pixels(named)), backbone(pixels(named)), atol=2e-2, rtol=2e-2)
    check(named)


def test_position_embeddings_are_resampled_for_another_image_size(tmp_path: Path) -> None:
    from timm.layers import resample_abs_pos_embed

    folder = timm_folder(tmp_path / "m", config=False)
    backbone = load_backbone(f"folder:{folder}", architecture="test_vit", image_size=96)
    expected = resample_abs_pos_embed(load_file(folder / "model.safetensors")["pos_embed"], [6, 6], num_prefix_tokens=1)
    assert torch.equal(backbone.net.get_parameter("pos_embed"), expected)


SPECS: dict[str, tuple[str, dict[str, Any], str]] = {
    "no prefix": (
        "vit_base_patch16_224",
        {},
        "PREFIX:NAME is expected; prefixes: timm, hf, openclip, folder, perpetune",
    ),
    "no name": ("timm:", {}, "PREFIX:NAME is expected"),
    "prefix": ("tim:vit", {}, "there is no prefix 'tim'; closest: timm"),
    "packaged": ("perpetune:mikro", {}, "no such packaged model; one of micro"),
    "timm name": ("timm:vit_base_patch16_225", {}, "closest: vit_base_patch16_224, "),
    "timm tag": ("timm:test_vit.nope", {}, "no weights tagged 'nope'; one of test_vit.r160_in1k"),
    "timm architecture": ("folder:{timm}", {"architecture": "test_vi"}, "closest: test_vit, "),
    "hf name": ("hf:dinov2-smal", {}, "an id on the hub is OWNER/NAME; closest: facebook/dinov2-small"),
    "hf id": ("hf:google/vit-base-patch16-225", {}, "closest: google/vit-base-patch16-224, "),
    "hf family": ("hf:{bert}", {}, "a 'bert' model cannot be used; usable are vit, deit"),
    "timm folder": ("folder:{odd}", {}, "timm has no model 'test_vitt'; closest: test_vit, "),
    "timm config": ("folder:{wrong}", {}, "cannot be built with this config"),
    "config no object": ("folder:{listed}", {}, "config.json holds a list"),
    "config no json": ("folder:{broken}", {}, "config.json is not valid JSON"),
    "torn": ("folder:{torn}", {"architecture": "test_vit"}, "safetensors file cannot be read"),
    "folder": ("folder:{parent}/tim", {}, "no such folder; in .*: closest: timm, "),
    "empty folder": ("folder:{empty}", {}, "no config.json that names"),
    "no weights": ("folder:{empty}", {"architecture": "test_vit"}, "no model.safetensors"),
    "hf no weights": ("hf:{empty}", {}, "config.json"),
    "architecture elsewhere": (
        "perpetune:micro",
        {"architecture": "x"},
        "backbones: perpetune: architecture is not an option; closest: ",
    ),
    "architecture beside a config": ("folder:{vit}", {"architecture": "x"}, "timm has no model 'x'"),
    "unknown": ("timm:test_vit", {"max_length": 7}, "backbones: timm: max_length is not an option; closest: "),
    "size 0": ("perpetune:micro", {"image_size": 0}, "image_size: input should be greater than or equal to 1; got 0"),
    "size below a patch": ("perpetune:micro", {"image_size": 3}, "image_size 3 does not fit"),
    "timm size below a patch": ("timm:test_vit", {"image_size": 3, "pretrained": False}, "image_size 3|test_vit"),
    "no size": ("timm:test_resnet", {"image_size": 64, "pretrained": False}, "cannot be built for another image size"),
}


@pytest.mark.parametrize("case", SPECS)
def test_what_cannot_be_loaded_is_said_in_one_line(case: str, tmp_path: Path) -> None:
    spec, options, message = SPECS[case]
    (tmp_path / "empty").mkdir()
    timm_folder(tmp_path / "timm", config=False)
    hf_folder(tmp_path / "vit", "vit")
    configs = {
        "bert": {"model_type": "bert"},
        "odd": {"architecture": "test_vitt"},
        "wrong": {"architecture": "test_vit", "pretrained_cfg": {"surprise": 1}},
        "listed": [],
        "broken": None,
        "torn": {},
    }
    for name, config in configs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{" if config is None else json.dumps(config))
        (tmp_path / name / "model.safetensors").write_bytes(b"torn")
    spec = spec.format(parent=tmp_path, **{n: tmp_path / n for n in ("empty", "timm", "vit", *configs)})
    with pytest.raises(PerpetuneError, match=message) as error:
        load_backbone(spec, **options)
    assert "\n" not in str(error.value)


def test_weights_that_cannot_be_fetched() -> None:
    with pytest.raises(PerpetuneError, match=r"the hub cannot be reached; .* folder:PATH"):
        load_backbone("timm:test_vit.r160_in1k")


@pytest.mark.parametrize(
    ("failure", "expected", "message"),
    [
        ("raise ModuleNotFoundError('no', name='timm')", MissingExtra, r"pip install 'perpetune\[timm\]'"),
        (
            "raise RuntimeError('operator torchvision::nms does not exist')",
            PerpetuneError,
            "torchvision was built for another torch; pip install",
        ),
    ],
)
def test_timm_that_cannot_be_imported(
    failure: str, expected: type[PerpetuneError], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "timm.py").write_text(failure)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [n for n in sys.modules if n.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(expected, match=message):
        load_backbone("timm:test_vit", pretrained=False)


def test_4_bits_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(PerpetuneError, match="pip install bitsandbytes"):
        load_backbone("perpetune:micro", load_in_4bit=True)


@pytest.mark.parametrize("spec", ["timm:test_vit", "perpetune:micro", "hf"])
def test_random_weights_are_those_of_the_seed_and_no_global_generator_is_touched(spec: str, tmp_path: Path) -> None:
    spec = f"hf:{hf_folder(tmp_path / 'vit', 'vit')}" if spec == "hf" else spec
    torch_state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    prints = [load_backbone(spec, pretrained=False, seed=seed).fingerprint() for seed in (1, 1, 2)]
    if not spec.startswith("timm"):
        load_backbone(spec)
    assert prints[0] == prints[1] != prints[2]
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


def test_the_fingerprint_is_of_the_frozen_tensors() -> None:
    backbone = load_backbone("perpetune:micro")
    before = backbone.fingerprint()
    assert before == load_backbone("perpetune:micro").fingerprint()
    inject(backbone.net, places(backbone.net, ["q"]), lambda p: LoRA(p, generator(0)))
    assert backbone.fingerprint() == before
    with torch.no_grad():
        places(backbone.net, ["q"], [3])[0].module.get_parameter("bias")[5] += 1e-6
    assert backbone.fingerprint() != before


def test_a_net_of_ones_own() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).mean((2, 3))

    backbone = Backbone(Net(), spec="own", dim=5, preprocess=PictureView(8))
    assert backbone(pixels(backbone)).shape == (2, 5)
    with pytest.raises(UsageError, match="Net is of no family"):
        backbone.roles()
    doubled = Backbone(Net(), spec="own", dim=5, preprocess=PictureView(8), forward=lambda net, x: 2 * net(x))
    torch.testing.assert_close(doubled(pixels(doubled)), 2 * doubled.net(pixels(doubled)))
    assert copy.deepcopy(doubled).fingerprint() == doubled.fingerprint()


def test_another_packages_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(rest: str, *, outputs: int = 2, pretrained: bool) -> Backbone:
        net, view = nn.Linear(int(rest), outputs), PictureView(8)
        return Backbone(net, spec=f"mine:{rest}", dim=outputs, preprocess=view, forward=lambda n, x: n(x[:, 0, 0]))

    bring(monkeypatch, load)
    one, two = (load_backbone("mine:8", pretrained=False, seed=3) for _ in range(2))
    assert one.fingerprint() == two.fingerprint()
    assert load_backbone("mine:8", outputs=3).dim == 3
    with pytest.raises(UsageError, match="backbones: mine: output is not an option; closest: outputs"):
        load_backbone("mine:8", output=3)


def bring(monkeypatch: pytest.MonkeyPatch, load: Callable[..., Backbone]) -> None:
    """`load` is the loader of the prefix `mine`."""
    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(load=load))
    monkeypatch.setitem(BUILTIN["backbones"], "mine", "mine:load")


def test_another_packages_loader_is_given_what_it_names_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaders of before name four options and the seed, without a default, or take whatever comes."""
    asked: list[dict[str, Any]] = []

    def load(rest: str, **options: Any) -> Backbone:
        asked.append(options)
        return Backbone(nn.Linear(2, 2), spec=f"mine:{rest}", dim=2, preprocess=PictureView(8))

    def old(rest: str, *, pretrained: bool, image_size: int | None, seed: int) -> Backbone:
        return load(rest, pretrained=pretrained, image_size=image_size, seed=seed)

    def new(rest: str, *, depth: int = 1) -> Backbone:
        return load(rest, depth=depth)

    before = {"pretrained": True, "image_size": None, "architecture": None, "load_in_4bit": False}
    for loader, given, wanted in (
        (load, {}, {**before, "seed": 0}),
        (load, {"dtype": "bfloat16", "chat": None}, {**before, "dtype": "bfloat16", "seed": 0}),
        (old, {"image_size": 8}, {"pretrained": True, "image_size": 8, "seed": 0}),
        (new, {**before, "dtype": "float32", "chat": False, "tokens": None}, {"depth": 1}),  # asks for nothing
    ):
        bring(monkeypatch, loader)
        load_backbone("mine:x", **given)
        assert asked.pop() == wanted
    with pytest.raises(UsageError, match="backbones: mine: pretrained is not an option; closest: pixels, taps, tokens"):
        load_backbone("mine:x", pretrained=False)


def test_a_recipe_that_names_every_option_of_before_is_read_and_names_those_of_its_loader() -> None:
    before = {"name": "perpetune:micro", "pretrained": True, "image_size": None, "architecture": None}
    before |= {"load_in_4bit": False, "dtype": None, "max_length": None, "chat": None, "gradient_checkpointing": None}
    recipe = make_recipe({"backbone": {**before, "taps": None, "tokens": None}})
    own = {"name": "perpetune:micro", "taps": None, "tokens": None}
    assert recipe.backbone.model_dump() == own | {"pretrained": True, "image_size": None, "load_in_4bit": False}
    assert make_recipe({"backbone": "perpetune:micro"}) == recipe
    text = make_recipe({"backbone": {"name": "hf:some/model", "chat": True, "max_length": 9, "taps": "auto"}})
    assert parse_recipe(text.to_yaml(), "stored") == text
    assert (text.backbone.taps, text.backbone.options["max_length"], text.backbone.options["dtype"]) == (
        "auto",
        9,
        None,
    )
    for wrong, said in (
        ({"chat": True}, "backbones: perpetune: chat is not an option; closest: "),
        ({"image_size": "big"}, "backbones: perpetune: image_size: input should be a valid integer"),
        ({"taps": 0}, "backbone.taps: input should be greater than or equal to 1"),
    ):
        with pytest.raises(UsageError, match=said) as caught:
            make_recipe({"backbone": {"name": "perpetune:micro", **wrong}})
        assert "\n" not in str(caught.value)


@pytest.mark.shared
def test_the_shared_dinov2(shared: Path) -> None:
    import timm
    from timm.layers import resample_abs_pos_embed

    folder, name = shared / "models" / "vit_small_patch14_dinov2_saliency", "vit_small_patch14_dinov2.lvd142m"
    backbone = load_backbone(f"folder:{folder}", architecture=name, image_size=112)
    net = timm.create_model(name, pretrained=False, img_size=112, num_classes=0).eval()
    tensors = load_file(folder / "model.safetensors")
    tensors["pos_embed"] = resample_abs_pos_embed(tensors["pos_embed"], [8, 8])
    net.load_state_dict({n: v.float() for n, v in tensors.items()})
    with torch.no_grad():
        expected = net(pixels(backbone))
    assert torch.equal(check(backbone), expected)


@pytest.mark.parametrize("count", [0, 1, 4, 9])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pixels_are_normalised_a_few_at_a_time_to_the_same_bits(count: int, layout: torch.memory_format) -> None:
    backbone = load_backbone("perpetune:micro")
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator("pixels", count))
    pixels = pixels.to(memory_format=layout)
    whole = (pixels.float() / 255 - backbone.mean) / backbone.std
    found = backbone.normalised(pixels)
    assert torch.equal(found, whole)
    assert found.stride() == whole.stride()
    assert torch.equal(backbone.normalised(pixels.float()), whole)
    assert count == 0 or not torch.equal(found.flip(1), whole)  # the control

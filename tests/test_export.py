"""LoRA in PEFT's format, against the PEFT library itself, both ways."""

from __future__ import annotations

import copy
import errno
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_language_model
from torch import Tensor, nn

from perpetune.build import load_backbone
from perpetune.check import Checker
from perpetune.data.pictures.view import PictureView
from perpetune.errors import PerpetuneError, StateError, UsageError
from perpetune.export import export_learned, read_peft, write_peft
from perpetune.methods.treelora.method import TreeLoRA
from perpetune.models.backbone import Backbone
from perpetune.models.loaders.vit import class_token
from perpetune.models.towers import places
from perpetune.pets import PET, Place, inject, parameters, pets, remove, slots, using
from perpetune.pets.lora import LoRA
from perpetune.recipe import make_recipe
from perpetune.seeding import generator, own_global_state

peft = pytest.importorskip("peft")

PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
HF = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 16}


def timm_vit() -> Backbone:
    from timm.models.vision_transformer import VisionTransformer

    net = VisionTransformer(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=0)
    return Backbone(net, spec="timm:test", dim=24, preprocess=PictureView(16))


def timm_beit() -> Backbone:
    from timm.models.beit import Beit

    net = Beit(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=0)
    return Backbone(net, spec="timm:beit", dim=24, preprocess=PictureView(16))


def hf_vit() -> Backbone:
    from transformers import ViTConfig, ViTModel

    net = ViTModel(ViTConfig(**HF, patch_size=8), add_pooling_layer=False)
    return Backbone(net, spec="hf:owner/vit", dim=24, preprocess=PictureView(16), forward=class_token)


def hf_dinov2() -> Backbone:
    from transformers import Dinov2Config, Dinov2Model

    net = Dinov2Model(Dinov2Config(**HF, patch_size=8))
    return Backbone(net, spec="hf:owner/dinov2", dim=24, preprocess=PictureView(16), forward=class_token)


def micro() -> Backbone:
    return load_backbone("perpetune:micro", image_size=16)


FILES = ("adapter_config.json", "adapter_model.safetensors")
NETS: list[Callable[[], Backbone]] = [timm_vit, timm_beit, hf_vit, hf_dinov2, micro]


def built(make: Callable[[], Backbone]) -> Backbone:
    with own_global_state("test", make.__name__):
        return make()


def shake(root: nn.Module, name: str = "default") -> None:
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters(root, name):
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.05)


def tuned(make: Callable[[], Backbone], roles: list[str], **options: Any) -> Backbone:
    backbone = built(make)
    inject(backbone.net, places(backbone.net, roles), lambda p: LoRA(p, generator(p.path), **{"rank": 3, **options}))
    shake(backbone)
    return backbone


@torch.no_grad()
def features(backbone: Backbone, name: str | None = "default") -> Tensor:
    with using(backbone, name):
        return backbone(PIXELS)


@torch.no_grad()
def peft_features(make: Callable[[], Backbone], folder: Path, **options: Any) -> Tensor:
    """Features of the same net with the adapter loaded by PEFT, which must use every tensor and miss none."""
    backbone = built(make)
    kept = load_file(next(folder.rglob("adapter_model.safetensors")))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        backbone.net = peft.PeftModel.from_pretrained(backbone.net, str(folder), **options)
    state = peft.get_peft_model_state_dict(backbone.net)
    assert state.keys() == kept.keys()
    assert all(torch.equal(state[name].cpu(), kept[name]) for name in kept)
    backbone.net.eval()
    return backbone(PIXELS)


@pytest.mark.parametrize("make", NETS)
@pytest.mark.parametrize("roles", [["q", "v"], ["k", "proj", "fc1", "fc2"], ["q", "k", "v"]], ids="-".join)
def test_peft_computes_the_same_from_what_is_written(
    make: Callable[[], Backbone], roles: list[str], tmp_path: Path
) -> None:
    backbone = tuned(make, roles)
    ours = features(backbone)
    assert (ours - features(backbone, None)).abs().max() > 1e-3
    write_peft(backbone, "default", tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == list(FILES)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    torch.testing.assert_close(peft_features(make, tmp_path / "adapter"), ours, atol=1e-5, rtol=1e-5)

    again = built(make)
    read_peft(again, tmp_path / "adapter", "other")
    torch.testing.assert_close(features(again, "other"), ours, atol=1e-5, rtol=1e-5)
    write_peft(again, "other", tmp_path / "again")
    for file in FILES:
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "adapter" / file).read_bytes()


@pytest.mark.parametrize("make", NETS)
@pytest.mark.parametrize("adapter", ["default", "named"])
@torch.no_grad()
def test_we_compute_the_same_from_what_peft_writes(make: Callable[[], Backbone], adapter: str, tmp_path: Path) -> None:
    theirs = built(make)
    wanted = ["qkv", "fc1"] if "timm" in make.__name__ else ["q_proj", "v_proj", "fc1"]
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=wanted,
        rank_pattern={r"1\.mlp\.fc1": 2},
        alpha_pattern={"fc1": 3},
        use_rslora=adapter == "named",
        lora_dropout=0.1,
        init_lora_weights=False,
    )
    with own_global_state("peft"):
        theirs.net = peft.get_peft_model(theirs.net, config, adapter_name=adapter)
    theirs.net.eval()
    theirs.net.save_pretrained(str(tmp_path))
    backbone = built(make)
    made = read_peft(backbone, tmp_path, adapter)
    assert all(isinstance(pet, LoRA) and pet.dropout == 0.1 for pet in made)
    torch.testing.assert_close(features(backbone, adapter), theirs(PIXELS), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(features(backbone, None), theirs(PIXELS), atol=1e-3)


def test_different_ranks_and_scales_are_written(tmp_path: Path) -> None:
    def make(place: Place) -> LoRA:
        wide = place.block == 1 and "fc1" in place.roles
        return LoRA(place, generator(place.path), rank=5 if wide else 2, alpha=7.5, rslora=wide)

    backbone = built(timm_vit)
    inject(backbone.net, places(backbone.net, ["q", "fc1"]), make)
    shake(backbone)
    write_peft(backbone, "default", tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {r"^blocks\.1\.mlp\.fc1": 5}
    assert config["alpha_pattern"].keys() == {r"^blocks\.1\.mlp\.fc1"}
    assert (config["r"], config["lora_alpha"]) == (2, 7.5)
    assert config["base_model_name_or_path"] == "timm:test"
    torch.testing.assert_close(peft_features(timm_vit, tmp_path / "a"), features(backbone), atol=1e-5, rtol=1e-5)


def test_a_path_that_ends_another_path_is_not_mixed_up(tmp_path: Path) -> None:
    def make() -> Backbone:
        net = nn.Sequential()
        net.add_module("fc", nn.Linear(4, 4))
        net.add_module("deep", nn.Sequential())
        net.deep.add_module("fc", nn.Linear(4, 4))
        return Backbone(net, spec="own", dim=4, preprocess=PictureView(16), forward=lambda n, x: n(x[:, 0, 0, :4]))

    backbone = built(make)
    place = Place("fc", backbone.net.get_submodule("fc"), (), ((0, 4),), -1, 4, 4)
    inject(backbone.net, [place], lambda p: LoRA(p, generator(0), rank=2))
    shake(backbone)
    write_peft(backbone, "default", tmp_path / "a")
    torch.testing.assert_close(peft_features(make, tmp_path / "a"), features(backbone))
    other = built(make)
    assert len(read_peft(other, tmp_path / "a", "default")) == 1
    torch.testing.assert_close(features(other), features(backbone))


def test_writing_is_refused_in_one_line(tmp_path: Path) -> None:
    class Other(PET):
        def forward(self, base: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            y: Tensor = base(x)
            return y

    backbone = tuned(timm_vit, ["q"])
    with pytest.raises(UsageError, match="no set of pets called 'x'; one of default"):
        write_peft(backbone, "x", tmp_path / "a")
    inject(backbone.net, places(backbone.net, ["mlp"]), lambda place: Other(), "mixed")
    with pytest.raises(UsageError, match="the set 'mixed' has Other"):
        write_peft(backbone, "mixed", tmp_path / "a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="not empty"):
        write_peft(backbone, "default", tmp_path / "full")
    assert [p.name for p in tmp_path.iterdir()] == ["full"]
    (tmp_path / "empty").mkdir()
    write_peft(backbone, "default", tmp_path / "empty")


def test_a_failure_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left")

    backbone = tuned(timm_vit, ["q"])
    monkeypatch.setattr("perpetune.export.peft.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        write_peft(backbone, "default", tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_an_error_while_writing_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a"

    def denied(path: Path, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    backbone = tuned(timm_vit, ["q"])
    for place in ("perpetune.aside.open", "perpetune.aside.os.replace"):
        with monkeypatch.context() as patch:
            patch.setattr(place, denied, raising=False)
            with pytest.raises(PermissionError) as found:
                write_peft(backbone, "default", folder)
        assert found.value.filename == str(folder)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "sets use_dora"),
    "a variant of tomorrow": ({"use_new": {"x": 1}}, "sets use_new"),
    "lora_bias": ({"lora_bias": True}, "sets lora_bias"),
    "bias": ({"bias": "all"}, "bias 'all'"),
    "saved modules": ({"modules_to_save": ["head"]}, "sets modules_to_save"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
    "another method": ({"peft_type": "LOHA"}, "is 'LOHA'"),
    "no rank": ({"r": None}, "r is None"),
    "no targets": ({"target_modules": None}, "target_modules is None"),
    "foreign targets": ({"target_modules": ["q_proj"]}, "unexpected: base_model.model.blocks.0.attn.qkv.lora_A.weight"),
    "one more target": ({"target_modules": ["qkv", "fc1"]}, "missing: base_model.model.blocks.0.mlp.fc1.lora_A.weight"),
    "another rank": ({"r": 5}, r"blocks.0.attn.qkv: a LoRA matrix has shape \(6, 24\); expected \(5, 24\)"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_reading_a_foreign_config_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    write_peft(tuned(timm_vit, ["q", "v"]), "default", tmp_path / "a")
    change, message = CONFIGS[case]
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    backbone = built(timm_vit)
    with pytest.raises(PerpetuneError, match=message) as error:
        read_peft(backbone, tmp_path / "a", "default")
    assert "\n" not in str(error.value)
    assert not list(slots(backbone.net))


def test_reading_tensors_is_strict(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    write_peft(tuned(timm_vit, ["q", "v"]), "default", folder)
    file = folder / "adapter_model.safetensors"
    whole = load_file(file)
    name = "base_model.model.blocks.1.attn.qkv.lora_B.weight"

    def read(tensors: dict[str, Tensor]) -> None:
        save_file(tensors, file)
        read_peft(built(timm_vit), folder, "default")

    read(copy.deepcopy(whole))
    with pytest.raises(StateError, match=f"missing: {name}"):
        read({k: v for k, v in whole.items() if k != name})
    with pytest.raises(StateError, match="unexpected: extra"):
        read({**whole, "extra": torch.zeros(1)})
    with pytest.raises(StateError, match=r"blocks.1.attn.qkv: a LoRA matrix has shape \(3, 6\); expected \(72, 6\)"):
        read({**whole, name: torch.zeros(3, 6)})
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(StateError, match="cannot be read"):
        read_peft(built(timm_vit), folder, "default")
    file.unlink()
    with pytest.raises(UsageError, match=r"has no adapter_model.safetensors"):
        read_peft(built(timm_vit), folder, "default")
    with pytest.raises(UsageError, match="has no PEFT adapter"):
        read_peft(built(timm_vit), tmp_path, "default")


def test_an_exported_head_holds_what_answers_need_and_no_sums(tmp_path: Path) -> None:
    recipe = {"head": {"name": "ridge", "projection": 20}, "train": {"epochs": 1, "batch_size": 8}}
    checker = Checker(make_recipe(recipe))
    method = checker.learned()
    export_learned(method, checker.backbone, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "head.safetensors")
    assert stored.keys() == {"weight", "bias", "projected"}
    features = torch.randn(5, 32, generator=generator("features"))
    scores = (features @ stored["projected"]).relu().double() @ stored["weight"].T + stored["bias"]
    torch.testing.assert_close(scores.float(), method.model.head(features))


def test_several_sets_of_pets_have_no_place_in_pefts_format(tmp_path: Path) -> None:
    recipe = {"method": "safe", "head": {"name": "ridge", "projection": 20}, "train": {"epochs": 1, "batch_size": 8}}
    checker = Checker(make_recipe(recipe))
    with pytest.raises(UsageError, match="more than one set of pets"):
        export_learned(checker.learned(), checker.backbone, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("answer", ["last", "merged", "routed"])
def test_adapters_that_can_be_used_by_themselves_get_a_folder_each(answer: str, tmp_path: Path) -> None:
    recipe = {"method": {"name": "treelora", "answer": answer}, "train": {"epochs": 1, "batch_size": 8}}
    checker = Checker(make_recipe({**recipe, "pet": {"name": "lora", "rank": 2}}))
    method = checker.learned()
    export_learned(method, checker.backbone, tmp_path / "out")
    assert isinstance(method, TreeLoRA)
    folders = {"": method.exported()[""]} if answer != "routed" else method.exported()
    assert len(folders) == (1 if answer != "routed" else 1 + len(method.bank.kept))
    for folder, name in folders.items():
        assert (tmp_path / "out" / folder / "head.safetensors").is_file()
        read_peft(checker.backbone, tmp_path / "out" / folder, "back")
        for own, back in zip(pets(checker.backbone.net, name), pets(checker.backbone.net, "back"), strict=True):
            assert isinstance(own, LoRA)
            assert isinstance(back, LoRA)
            torch.testing.assert_close(
                back.scale * back.up_matrix() @ back.down, own.scale * own.up_matrix() @ own.down
            )
        remove(checker.backbone.net, "back")


def test_an_export_that_fails_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = {"method": "treelora", "pet": {"name": "lora", "rank": 2}, "train": {"epochs": 1, "batch_size": 8}}
    checker = Checker(make_recipe(recipe))
    method, written = checker.learned(), []

    def fails(backbone: Backbone, name: str, folder: Path, whole: Any) -> None:
        if written:
            raise OSError("no space left on device")
        written.append(folder)
        write_peft(backbone, name, folder, whole)

    monkeypatch.setattr("perpetune.export.learned.write_peft", fails)
    with pytest.raises(OSError, match="no space"):
        export_learned(method, checker.backbone, tmp_path / "out")
    assert written
    assert not list(tmp_path.iterdir())


IDS = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
LANGUAGE = {
    "llama": (["q", "v"], ["self_attn.q_proj", "self_attn.v_proj"]),
    "phi3": (["k", "gate", "fc2"], ["self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"]),
    "gpt2": (["q", "v", "fc1"], ["attn.c_attn", "mlp.c_fc"]),
    "gpt_neox": (["qkv", "proj"], ["attention.query_key_value", "attention.dense"]),
    "opt": (["k", "fc2"], ["self_attn.k_proj", "fc2"]),
}


@torch.no_grad()
def logits(backbone: Backbone, name: str | None = "default") -> Tensor:
    with using(backbone.net, name):
        out: Tensor = backbone.net(input_ids=IDS).logits
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", LANGUAGE)
def test_a_language_models_lora_goes_to_peft_and_back(kind: str, dtype: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder, (asked, modules) = tiny_language_model(tmp_path / "model", kind), LANGUAGE[kind]

    def load() -> Backbone:
        return load_backbone(f"hf:{folder}", dtype=dtype)

    backbone = tuned(load, asked, alpha=6.0)
    ours = logits(backbone)
    assert (ours - logits(backbone, None)).abs().max() > 1e-2
    write_peft(backbone, "default", tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == list(FILES)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", str(folder))
    assert config["fan_in_fan_out"] is (kind == "gpt2")
    assert len(config["target_modules"]) == 2 * len(modules)
    assert all(any(path.endswith(m) for m in modules) for path in config["target_modules"])
    assert {t.dtype for t in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()} == {torch.float32}

    net = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a missing key, a weight that is the other way round
        theirs = peft.PeftModel.from_pretrained(net, str(tmp_path / "adapter")).eval()
    close = 1e-5 if dtype == "float32" else 3e-2
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=IDS).logits, ours, atol=close, rtol=close)

    again = load()
    read_peft(again, tmp_path / "adapter", "default")
    torch.testing.assert_close(logits(again), ours, atol=close, rtol=close)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    back = load()
    read_peft(back, tmp_path / "theirs", "default")
    assert torch.equal(logits(back), logits(again))


STRANGE: dict[str, tuple[dict[str, Any], str]] = {
    "a pattern that backtracks": ({"target_modules": "(.*)*q"}, "too many repetitions"),
    "another": ({"target_modules": "(a|b.*)+x"}, "too many repetitions"),
    "a long one": ({"target_modules": ".*" * 30 + "!"}, "too many repetitions"),
    "no pattern": ({"target_modules": "(q"}, "not a regular expression"),
    "in an exception": ({"rank_pattern": {"(.+)+$": 2}}, "too many repetitions"),
    "no numbers": ({"alpha_pattern": {"q": "x"}}, "alpha_pattern"),
    "a list": ({"rank_pattern": [1]}, "rank_pattern"),
    "not finite": ({"alpha_pattern": {"q": float("inf")}}, "alpha_pattern"),
    "dropout": ({"lora_dropout": "much"}, "lora_dropout"),
    "dropout of all": ({"lora_dropout": 1}, "lora_dropout"),
    "names": ({"target_modules": [1, 2]}, "target_modules"),
    "excluded": ({"exclude_modules": {"a": 1}}, "exclude_modules"),
    "a rank that no model has": ({"r": 10**12}, "LoRA matrix has shape"),
}


@pytest.mark.parametrize("case", STRANGE)
@pytest.mark.timeout(60)
def test_a_config_of_a_stranger_is_one_line(case: str, tmp_path: Path) -> None:
    changes, says = STRANGE[case]
    write_peft(tuned(hf_vit, ["q"]), "default", tmp_path / "out")
    file = tmp_path / "out" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises((UsageError, StateError), match=says):
        read_peft(built(hf_vit), tmp_path / "out", "back")


def test_a_config_that_is_nested_too_deep(tmp_path: Path) -> None:
    write_peft(tuned(hf_vit, ["q"]), "default", tmp_path / "out")
    (tmp_path / "out" / "adapter_config.json").write_text("[" * 200_000)
    with pytest.raises(UsageError, match="is not valid JSON"):
        read_peft(built(hf_vit), tmp_path / "out", "back")


@pytest.mark.parametrize("pattern", [r".*\.layers\.\d+\..*\.(q_proj|v_proj)", r".*(query|value)", "a|b|c", r"(.*\.)?q"])
def test_patterns_that_people_write_are_read(pattern: str) -> None:
    from perpetune.export.peft import _check_pattern

    _check_pattern(Path("x"), "target_modules", pattern)

"""What is read behind the last blocks, against hooks by hand on each family of nets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from test_backbones import hf_model
from tiny import tiny_language_model
from torch import Tensor, nn

from perpetune.build import load_backbone
from perpetune.data.pictures.view import PictureView
from perpetune.data.texts.tables import Text
from perpetune.data.texts.view import TextView
from perpetune.errors import UsageError
from perpetune.models.backbone import Backbone
from perpetune.models.loaders import timm as from_timm
from perpetune.models.loaders.vit import class_token
from perpetune.models.taps import Read, Taps
from perpetune.models.towers import places
from perpetune.pets import inject, parameters, using
from perpetune.pets.adapter import Adapter
from perpetune.pets.base import PET, Conditions, Place, Site
from perpetune.pets.lora import LoRA
from perpetune.pets.prompt import Prompt
from perpetune.pets.ssf import SSF
from perpetune.recipe import make_recipe
from perpetune.seeding import generator, own_global_state
from perpetune.tasks import Inputs

READS: tuple[Read, ...] = ("class", "mean", "both")
HF = ("vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit")
TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "timm": ("vit_tiny_patch16_224", {}),
    "timm registers": ("vit_tiny_patch16_224", {"reg_tokens": 3}),
    "timm mean": ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False, "fc_norm": True}),
    "timm mean beside class": ("vit_tiny_patch16_224", {"global_pool": "avg", "fc_norm": True}),
    "timm mean, norm before it": (
        "vit_tiny_patch16_224",
        {"global_pool": "avg", "class_token": False, "fc_norm": False},
    ),
    "eva": ("eva02_tiny_patch14_224", {"patch_size": 16}),
    "eva, norm before the mean": ("eva02_tiny_patch14_224", {"patch_size": 16, "use_fc_norm": False}),
    "beit": ("beit_base_patch16_224", {}),
    "beit class": ("beit_base_patch16_224", {"global_pool": "token"}),
}
KINDS = ("micro", *HF, *TIMM)
PETS = ["q", "v"]


@dataclass(frozen=True)
class Net:
    """A backbone, and what a person who looks into the net sees of it."""

    backbone: Backbone
    blocks: Sequence[nn.Module]
    norm: nn.Module | None
    """What the net puts behind its last block and acts on tokens."""
    prefix: int
    class_token: bool


def shaken(net: nn.Module) -> nn.Module:
    """Norms are ones and zeros in a new net, and then it cannot be seen whether they act."""
    with torch.no_grad():
        for name, p in sorted(net.named_parameters()):
            p.add_(0.3 * torch.randn(p.shape, generator=generator("shaken", name)))
    return net


def net_of(kind: str) -> Net:
    if kind in TIMM:
        import timm

        name, options = TIMM[kind]
        small = {"img_size": 32, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 0}
        with own_global_state("taps", kind):
            made: Any = shaken(timm.create_model(name, pretrained=False, **small, **options))
        norm = None if isinstance(made.norm, nn.Identity) else made.norm
        there = made.cls_token is not None
        return Net(from_timm._wrap(timm, kind, made, 32), list(made.blocks), norm, made.num_prefix_tokens, there)
    if kind == "micro":
        backbone = load_backbone("perpetune:micro")
        micro: Any = backbone.net
        return Net(backbone, list(micro.layers), micro.layernorm, 1, True)
    net: Any = shaken(hf_model(kind))
    registers = {"deit": 1, "dinov2_with_registers": 4}.get(kind, getattr(net.config, "num_register_tokens", 0))
    backbone = Backbone(net, spec=kind, dim=24, preprocess=PictureView(16), forward=class_token, prefix=1 + registers)
    blocks = net.encoder.layer if kind.startswith("dinov2") else net.model.layer if "v3" in kind else net.layers
    return Net(backbone, list(blocks), net.norm if "v3" in kind else net.layernorm, 1 + registers, True)


def pictures(backbone: Backbone, count: int = 3) -> Tensor:
    size = cast(PictureView, backbone.preprocess).size
    return torch.randint(0, 256, (count, 3, size, size), generator=generator("pictures"), dtype=torch.uint8)


def standard(x: Tensor) -> Tensor:
    """A layer norm without scale and shift, written out."""
    x = x.double()
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()


def behind(blocks: Sequence[nn.Module], compute: Callable[[], object]) -> list[Tensor]:
    """What each of `blocks` gives while `compute` runs."""
    states: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _m, _a, out: states.append(out[0] if isinstance(out, tuple) else out))
        for block in blocks
    ]
    try:
        compute()
    finally:
        for hook in hooks:
            hook.remove()
    return states


@torch.no_grad()
def reference(net: Net, asked: Tensor, count: int, read: str) -> Tensor:
    """The features, by hand."""
    backbone = net.backbone
    pixels = (asked / 255 - backbone.mean) / backbone.std
    states = behind(net.blocks, lambda: backbone(pixels))
    assert len(states) == len(net.blocks)
    normed = [standard(x) for x in states]
    if net.norm is not None:
        normed[-1] = net.norm(states[-1]).double()
    kinds = {"class": ["class"], "mean": ["mean"], "both": ["class", "mean"]}[read]
    kinds = kinds if net.class_token else ["mean"]
    columns = []
    for x in normed[-count:]:
        columns += [x[:, 0] if kind == "class" else x[:, net.prefix :].mean(1) for kind in kinds]
    return torch.cat(columns, 1)


def hooks_of(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


# -- pictures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_features_are_those_behind_the_blocks(kind: str) -> None:
    net = net_of(kind)
    backbone, asked, before = net.backbone, pictures(net.backbone), hooks_of(net.backbone)
    own, width = backbone.features(asked), backbone.dim
    depth = len(net.blocks)
    for count in (1, 2, depth):
        for read in READS:
            if read == "class" and not net.class_token:
                with pytest.raises(UsageError, match="has no class token: set tokens to mean, or leave it out"):
                    backbone.tap(count, read)
                continue
            wanted = reference(net, asked, count, read)
            found = backbone.tap(count, read).features(asked)
            assert found.shape == wanted.shape == (3, backbone.dim)
            assert backbone.dim == width * count * (2 if read == "both" and net.class_token else 1)
            torch.testing.assert_close(found.double(), wanted, atol=2e-5, rtol=1e-5)
            if count > 1:  # the control: neither unnormed, nor in another order
                assert not torch.allclose(found.double(), wanted.flip(1), atol=1e-2)
    assert hooks_of(backbone) == before
    again = backbone.tap(None).features(asked)
    assert torch.equal(again, own)
    assert backbone.dim == width


@pytest.mark.parametrize("kind", ["micro", *HF, "timm", "timm registers", "beit class"])
@torch.no_grad()
def test_one_tap_at_the_class_token_is_the_nets_own_feature(kind: str) -> None:
    backbone = net_of(kind).backbone
    asked = pictures(backbone)
    own = backbone.features(asked)
    assert torch.equal(backbone.tap(1, "class").features(asked), own)
    assert not torch.equal(backbone.tap(1, "mean").features(asked), own)


@torch.no_grad()
def test_means_leave_out_registers_and_the_token_to_distill_by() -> None:
    """The control of `prefix`: with one token too many in the mean it is another one."""
    for kind in ("deit", "dinov2_with_registers", "timm registers"):
        net = net_of(kind)
        asked = pictures(net.backbone)
        found = net.backbone.tap(2, "mean").features(asked)
        wrong = Net(net.backbone, net.blocks, net.norm, net.prefix - 1, True)
        assert not torch.allclose(found.double(), reference(wrong, asked, 2, "mean"), atol=1e-2)


@torch.no_grad()
def test_one_forward_pass_and_no_hook_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    net = net_of("dinov2")
    asked = pictures(net.backbone)
    calls: list[int] = []
    watch = net.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    before = hooks_of(net.backbone)
    net.backbone.tap(2)
    assert calls == []
    net.backbone.features(asked)
    assert calls == [1]
    watch.remove()

    def fail(*_: Any) -> None:
        raise ZeroDivisionError("in the net")

    last = net.blocks[-1].register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError, match="in the net"):
        net.backbone.features(asked)
    last.remove()
    assert hooks_of(net.backbone) == before - 1
    assert net.backbone.features(asked).isfinite().all()


@torch.no_grad()
def test_companions_change_nothing() -> None:
    backbone = net_of("vit").backbone.tap(2)
    asked = pictures(backbone, 5)
    whole = backbone.features(asked)
    torch.testing.assert_close(torch.cat([backbone.features(part) for part in asked.split(2)]), whole)


# -- pets ---------------------------------------------------------------------------------------------


def with_pet(backbone: Backbone, at: Sequence[str], make: Callable[..., Any]) -> None:
    inject(backbone.net, places(backbone.net, list(at)), make)


class Around(PET):
    """Somebody's pet that changes what a whole block gives."""

    def __init__(self, place: Place):
        super().__init__()
        self.turn = nn.Parameter(torch.zeros(place.d_in, place.d_in))

    def forward(self, base: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        y = base(x, *args, **kwargs)
        return y + y @ self.turn

    def sites(self, conditions: Conditions = "exact") -> list[Site]:
        return []


def stirred(backbone: Backbone) -> None:
    with torch.no_grad():
        for number, p in enumerate(parameters(backbone, "default")):
            p.add_(0.2 * torch.randn(p.shape, generator=generator("stirred", number)))


PETS_AT: dict[str, tuple[tuple[str, ...], Callable[..., Any]]] = {
    "lora": (("q", "v"), lambda p: LoRA(p, generator(p.path), rank=2)),
    "ssf at the last norm": (("norm",), lambda p: SSF(p, generator(p.path))),
    "adapter": (("mlp",), lambda p: Adapter(p, generator(p.path), width=4)),
    "around blocks": (("block",), lambda p: Around(p)),
}


@pytest.mark.parametrize("kind", ["vit", "dinov2", "timm"])
@pytest.mark.parametrize("pet", PETS_AT)
def test_pets_act_on_what_is_read(pet: str, kind: str) -> None:
    at, make = PETS_AT[pet]
    backbone = net_of(kind).backbone.tap(2)
    asked = pictures(backbone)
    with torch.no_grad():
        plain = backbone.features(asked)
        with_pet(backbone, at, make)
        assert torch.equal(backbone.features(asked), plain), "a pet that is not in force"
        with using(backbone, "default"):
            torch.testing.assert_close(backbone.features(asked), plain)
            stirred(backbone)
            moved = backbone.features(asked)
    # behind one block the class token and the mean: half of the columns are of the last block
    first, last = moved.chunk(2, 1)
    before, after = plain.chunk(2, 1)
    assert not torch.allclose(last, after, atol=1e-3)
    assert torch.equal(first, before) == (pet == "ssf at the last norm"), "the norm acts behind the last block alone"
    backbone.train()
    with using(backbone, "default"):
        features = backbone.features(asked)
        (features * torch.randn(features.shape, generator=generator("loss"))).sum().backward()
    for p in parameters(backbone, "default"):
        assert p.grad is not None
        assert bool(p.grad.abs().max() > 0)


@torch.no_grad()
def test_a_pet_around_a_block_is_read_with_it() -> None:
    """What is read behind a block is what the next block gets."""
    net = net_of("vit")
    backbone, asked = net.backbone.tap(2), pictures(net.backbone)
    with_pet(backbone, ["block"], Around)
    stirred(backbone)
    inputs: list[Tensor] = []
    watch = net.blocks[-1].register_forward_pre_hook(lambda _m, given: inputs.append(given[0]))
    with using(backbone, "default"):
        found = backbone.features(asked)
        watch.remove()
    torch.testing.assert_close(found[:, :24].double(), standard(inputs[0])[:, 0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_tokens_that_a_pet_carries_are_not_read() -> None:
    net = net_of("vit")
    backbone, asked = net.backbone.tap(2), pictures(net.backbone)
    with_pet(backbone, ["block"], lambda p: Prompt(p, generator(p.path), length=5, deep=False, std=1.0))
    with using(backbone, "default"):
        found = backbone.features(asked)
        states = behind(net.blocks, lambda: backbone.features(asked))
    patches = 1 + 4
    assert [x.shape[1] for x in states] == [patches + 5, patches + 5]
    first, last = states[0][:, :patches], states[1][:, :patches]
    assert net.norm is not None
    wanted = [standard(first)[:, 0], standard(first)[:, 1:].mean(1)]
    wanted += [net.norm(last).double()[:, 0], net.norm(last).double()[:, 1:].mean(1)]
    torch.testing.assert_close(found.double(), torch.cat(wanted, 1), atol=1e-5, rtol=1e-5)
    spoiled = standard(states[0])[:, 1:].mean(1)
    assert not torch.allclose(found[:, 24:48].double(), spoiled, atol=1e-3), "the control: with the carried tokens"


# -- texts --------------------------------------------------------------------------------------------

LANGUAGE = ("llama", "gpt2", "gpt_neox", "opt", "lfm2", "gemma3_text")
TEXTS = (
    Text("What is it?", "a cat"),
    Text("hi", "no"),
    Text((("user", "one"), ("assistant", "two"), ("user", "and a much longer question")), "four"),
)


@pytest.fixture(scope="module", params=LANGUAGE)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_language_model(tmp_path_factory.mktemp(request.param), request.param)


def parts_of(net: Any) -> tuple[list[nn.Module], nn.Module]:
    """The blocks and the norm behind them."""
    core = net.model.decoder if hasattr(getattr(net, "model", None), "decoder") else net.base_model
    blocks = core.h if hasattr(core, "h") else core.layers
    names = ("norm", "ln_f", "final_layer_norm", "embedding_norm")
    return list(blocks), next(getattr(core, name) for name in names if hasattr(core, name))


def asked_of(backbone: Backbone, *texts: Text, answers: bool = False) -> Inputs:
    view = cast(TextView, backbone.preprocess)
    make = view.sequence if answers else view.question
    return view.collate([(make(t), 0, i) for i, t in enumerate(texts)]).inputs


@torch.no_grad()
def test_a_text_is_read_at_its_last_token_and_over_all(folder: Path) -> None:
    """Beside longer texts it reads as it does alone, without padding."""
    backbone = load_backbone(f"hf:{folder}", taps=2)
    assert backbone.dim == 2 * 2 * 32
    together = backbone.features(asked_of(backbone, *TEXTS))
    blocks, norm = parts_of(backbone.net)
    assert len(blocks) == 2
    net: Any = backbone.net
    for row, text in zip(together, TEXTS, strict=True):
        ids = cast(TextView, backbone.preprocess).question(text).ids
        first, second = behind(blocks, lambda ids=ids: net.base_model(input_ids=ids[None], use_cache=False))
        normed = [standard(first)[0], norm(second)[0].double()]
        wanted = torch.cat([part for x in normed for part in (x[-1], x.mean(0))])
        torch.testing.assert_close(row.double(), wanted, atol=3e-5, rtol=1e-4)
        assert not torch.allclose(row.double(), torch.cat([p for x in normed for p in (x[0], x.mean(0))]), atol=1e-3)
    one = backbone.tap(1, "class").features(asked_of(backbone, *TEXTS))
    assert torch.equal(one, together[:, 64:96])


@torch.no_grad()
def test_an_answer_behind_a_question_is_not_read(folder: Path) -> None:
    """Each token sees those before it alone; so do earlier answers of a chat, which are part of the question."""
    backbone = load_backbone(f"hf:{folder}")
    for taps in (2, None):
        backbone.tap(taps)
        alone = backbone.features(asked_of(backbone, *TEXTS))
        answered = backbone.features(asked_of(backbone, *TEXTS, answers=True))
        torch.testing.assert_close(answered, alone, atol=1e-5, rtol=1e-4)
        other = [Text(t.prompt, "another one") for t in TEXTS]
        torch.testing.assert_close(
            backbone.features(asked_of(backbone, *other, answers=True)), alone, atol=1e-5, rtol=1e-4
        )
        changed = [Text("What is that?"), *TEXTS[1:]]
        assert not torch.allclose(backbone.features(asked_of(backbone, *changed))[0], alone[0], atol=1e-3)


def test_blocks_computed_again_give_the_same_bits(folder: Path) -> None:
    found = []
    for again in (False, True):
        backbone = load_backbone(f"hf:{folder}", taps=2, gradient_checkpointing=again)
        roles = [r for r in ("q", "v", "qkv") if r in backbone.roles()]
        with_pet(backbone, roles, lambda p: LoRA(p, generator(p.path), rank=2))
        stirred(backbone)
        backbone.train()
        calls: list[int] = []
        last = next(children := iter(parts_of(backbone.net)[0][-1].children()))  # the norm that the block begins with
        last = next(m for m in (last, *children) if "norm" in type(m).__name__.lower())
        watch = last.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        with using(backbone, "default"):
            features = backbone.features(asked_of(backbone, *TEXTS))
        forward = len(calls)
        (features * torch.randn(features.shape, generator=generator("loss"))).sum().backward()
        watch.remove()
        assert (len(calls) > forward) == again
        grads = [p.grad for p in parameters(backbone, "default")]
        assert all(g is not None and bool(g.abs().max() > 0) for g in grads)
        found.append([features.detach(), *grads])
        assert hooks_of(backbone.net) == hooks_of(load_backbone(f"hf:{folder}", gradient_checkpointing=again).net)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


# -- what cannot be read ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "options", "reason"),
    [
        ("perpetune:micro", {"taps": 99}, r"taps is 99, and the net has \d+ blocks: 1 to \d+, or auto, is expected"),
        ("timm:test_resnet", {"taps": 1}, r"leave taps out; ResNet is of no family .*`pet: none` uses .*; the known"),
    ],
)
def test_what_cannot_be_tapped_is_one_line(spec: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        load_backbone(spec, pretrained=False, **options)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(spec)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"taps": 0}, "backbones: perpetune: taps: input should be greater than or equal to 1, or .*'auto'; got 0"),
        ({"taps": 1, "tokens": "patches"}, "tokens: input should be 'class', 'mean' or 'both'; got 'patches'"),
    ],
)
def test_what_taps_cannot_be_is_one_line(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        load_backbone("perpetune:micro", **options)
    assert "\n" not in str(caught.value)


def test_a_recipe_says_which_tokens_only_where_there_are_taps() -> None:
    content = {"name": "x", "backbone": {"name": "perpetune:micro", "tokens": "mean"}}
    with pytest.raises(
        UsageError, match="tokens: mean says what taps read, and there are none: set taps too"
    ) as caught:
        make_recipe(content)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("or leave tokens out")
    with pytest.raises(UsageError, match="taps") as caught:
        make_recipe({"name": "x", "backbone": {"name": "perpetune:micro", "taps": 0}})
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=r"evaluate\.oracle: input should be a valid boolean.*, or 'last'; got 'lasd'"):
        make_recipe({"name": "x", "evaluate": {"oracle": "lasd"}})
    backbone = make_recipe({"name": "x", "backbone": {"name": "perpetune:micro", "taps": 2}}).backbone
    assert (backbone.taps, backbone.tokens) == (2, None)


def test_auto_is_seven_blocks_or_as_many_as_are_narrow_enough() -> None:
    backbone = load_backbone("perpetune:micro")
    assert backbone.tap("auto").taps is not None
    depth, width = 6, backbone.width
    assert (backbone.taps.count, backbone.dim) == (depth, depth * 2 * width)
    backbone.width = 1024  # of a large net: 6144 / 2048
    assert Taps(backbone, "auto", "both").count == 3
    assert Taps(backbone, "auto", "class").count == 6
    backbone.width = 9000
    assert Taps(backbone, "auto", "both").count == 1

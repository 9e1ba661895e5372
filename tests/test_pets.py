"""PETs, slots and LoRA on every layout of linear layers there is: fused, separate, 4-bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_language_model
from torch import Tensor, nn

from perpetune.data.pictures.view import PictureView
from perpetune.errors import UsageError
from perpetune.models.backbone import Backbone
from perpetune.models.families import LINEAR_ROLES
from perpetune.models.towers import places, roles
from perpetune.pets import (
    PET,
    Place,
    Slot,
    copies_at_rest,
    copy_set,
    form,
    frozen,
    inject,
    parameters,
    pets,
    remove,
    rest,
    sets,
    slots,
    submodule,
    using,
)
from perpetune.pets.base import twin
from perpetune.pets.lora import LoRA
from perpetune.pets.prompt import Prompt
from perpetune.pets.ssf import SSF
from perpetune.seeding import generator, own_global_state

PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}
HF = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 16}


def timm_net(kind: str, **options: Any) -> nn.Module:
    from timm.models import beit, eva, vision_transformer

    made = {
        "vit": vision_transformer.VisionTransformer,
        "eva": eva.Eva,
        "beit": beit.Beit,
    }[kind](**{**SMALL, **options})
    for module in made.modules():  # BEiT and EVA begin with biases of zero, which would hide a lost one
        for name in ("q_bias", "v_bias"):
            if isinstance(bias := getattr(module, name, None), nn.Parameter):
                nn.init.normal_(bias)
    return made


def hf_net(kind: str, **options: Any) -> nn.Module:
    import transformers as t

    config, model, extra = {
        "vit": (t.ViTConfig, t.ViTModel, {"add_pooling_layer": False}),
        "deit": (t.DeiTConfig, t.DeiTModel, {"add_pooling_layer": False}),
        "dinov2": (t.Dinov2Config, t.Dinov2Model, {}),
        "registers": (t.Dinov2WithRegistersConfig, t.Dinov2WithRegistersModel, {}),
    }[kind]
    net: nn.Module = model(config(**{**HF, "patch_size": 8, **options}), **extra)
    return net


NETS = {
    "timm vit": lambda: timm_net("vit"),
    "timm vit swiglu": lambda: timm_net("vit", mlp_layer=__import__("timm.layers", fromlist=["SwiGLU"]).SwiGLU),
    "timm eva fused": lambda: timm_net("eva"),
    "timm eva separate": lambda: timm_net("eva", qkv_fused=False),
    "timm beit": lambda: timm_net("beit"),
    "hf vit": lambda: hf_net("vit"),
    "hf deit": lambda: hf_net("deit"),
    "hf dinov2": lambda: hf_net("dinov2"),
    "hf dinov2 swiglu": lambda: hf_net("dinov2", use_swiglu_ffn=True),
    "hf registers": lambda: hf_net("registers"),
}


def backbone_of(name: str) -> Backbone:
    with own_global_state("test", name):
        net = NETS[name]()
    forward = (lambda n, x: n(pixel_values=x).last_hidden_state[:, 0]) if name.startswith("hf") else None
    return Backbone(net, spec=name, dim=24, preprocess=PictureView(16), forward=forward)


def lora(place: Place, **options: Any) -> LoRA:
    return LoRA(place, generator("test", place.path), **{"rank": 3, **options})


def shake(root: nn.Module, name: str = "default", seed: int = 1) -> None:
    """Give a set of PETs values with which it does something."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters(root, name):
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.3)


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_on_every_family_lora_starts_as_nothing_and_then_acts_at_every_role(name: str) -> None:
    backbone = backbone_of(name)
    before, print_before = backbone(PIXELS), backbone.fingerprint()
    linear = [role for role in backbone.roles() if role in LINEAR_ROLES]
    assert {"q", "k", "v", "proj", "fc1", "fc2"} <= set(linear)
    for role in linear:
        inject(backbone.net, places(backbone.net, [role], [-1]), lora, role)
        with using(backbone, role):
            assert torch.equal(backbone(PIXELS), before), role
        shake(backbone, role)
        with using(backbone, role):
            assert not torch.equal(backbone(PIXELS), before), role
        assert torch.equal(backbone(PIXELS), before), role
    assert backbone.fingerprint() == print_before


@pytest.mark.parametrize("name", ["timm vit", "timm eva fused", "timm beit"])
@torch.no_grad()
def test_parts_of_a_fused_linear_get_exactly_their_own_rows(name: str) -> None:
    backbone = backbone_of(name)
    (place,) = places(backbone.net, ["v", "q"], [0])
    assert place.path == "blocks.0.attn.qkv"
    assert (place.roles, place.parts, place.d_in, place.d_out) == (("q", "v"), ((0, 24), (48, 72)), 24, 72)
    (pet,) = inject(backbone.net, [place], lora)
    assert isinstance(pet, LoRA)
    assert [tuple(p.shape) for p in pet.parameters()] == [(6, 24), (24, 3), (24, 3)]
    shake(backbone)
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(3))
    expected = place.module(x)
    expected[..., :24] += pet.scale * x @ pet.down[:3].T @ pet.up[0].T
    expected[..., 48:] += pet.scale * x @ pet.down[3:].T @ pet.up[1].T
    torch.testing.assert_close(pet(place.module, x), expected)
    assert torch.equal(pet(place.module, x)[..., 24:48], place.module(x)[..., 24:48])


@torch.no_grad()
def test_separate_linears_get_a_place_each() -> None:
    net = hf_net("vit")
    found = places(net, ["fc2", "v", "q"])
    assert [p.path for p in found] == [
        f"layers.{i}.{leaf}" for i in (0, 1) for leaf in ("attention.q_proj", "attention.v_proj", "mlp.fc2")
    ]
    assert [(p.block, p.roles, p.parts) for p in found[:3]] == [
        (0, ("q",), ((0, 24),)),
        (0, ("v",), ((0, 24),)),
        (0, ("fc2",), ((0, 24),)),
    ]
    assert (found[2].d_in, found[2].d_out) == (48, 24)


def test_places_of_whole_modules_and_blocks() -> None:
    net = timm_net("vit")
    block, attn, mlp = (places(net, [role], [-1])[0] for role in ("block", "attn", "mlp"))
    assert (block.path, attn.path, mlp.path) == ("blocks.1", "blocks.1.attn", "blocks.1.mlp")
    assert {(p.block, p.parts, p.d_in, p.d_out) for p in (block, attn, mlp)} == {(1, (), 24, 24)}
    assert [p.block for p in places(net, ["q"], [1, -1, 0])] == [0, 1]


def test_places_say_what_is_wrong() -> None:
    net = timm_net("vit")
    with pytest.raises(UsageError, match="no role 'query'; it has q, k, v, proj, fc1, fc2, attn, mlp, block"):
        places(net, ["q", "query"])
    with pytest.raises(UsageError, match="no role 'gate'"):
        places(net, ["gate"])
    for block in (2, -3):
        with pytest.raises(UsageError, match=f"block {block} is out of range: the net has 2 blocks, 0 to 1"):
            places(net, ["q"], [block])
    with pytest.raises(UsageError, match=r"Linear is of no family.*timm VisionTransformer.*transformers DINOv2"):
        places(nn.Linear(2, 2), ["q"])
    with pytest.raises(UsageError, match="no place"):
        inject(net, [], lora)
    (elsewhere,) = places(timm_net("vit"), ["q"], [0])
    with pytest.raises(UsageError, match="does not lead to the module"):
        inject(net, [elsewhere], lora)


def test_a_family_is_found_inside_a_wrapper() -> None:
    wrapper = nn.Sequential(nn.Identity(), timm_net("vit"))
    assert [p.path for p in places(wrapper, ["proj"])] == ["1.blocks.0.attn.proj", "1.blocks.1.attn.proj"]
    inject(wrapper, places(wrapper, ["proj"]), lora)
    assert [p.path for p in places(wrapper, ["proj"])] == ["1.blocks.0.attn.proj", "1.blocks.1.attn.proj"]


@pytest.mark.parametrize("name", ["timm vit", "hf vit"])
def test_paths_do_not_change_by_what_is_injected(name: str) -> None:
    backbone = backbone_of(name)
    asked = backbone.roles()
    before = places(backbone.net, asked)
    inject(backbone.net, places(backbone.net, ["q", "fc1"]), lora, "inner")

    class Twice(PET):
        def __init__(self, place: Place):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))

        def forward(self, base: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            y: Tensor = base(x, *args, **kwargs)
            return y * self.gain

    print_before, tensors = backbone.fingerprint(), frozen(backbone.net)
    inject(backbone.net, places(backbone.net, ["mlp", "block"]), Twice, "outer")  # slots around slots
    assert places(backbone.net, asked) == before
    assert roles(backbone.net) == asked
    assert frozen(backbone.net).keys() == tensors.keys()
    assert not any("pets" in key or ".base" in key for key in tensors)
    assert backbone.fingerprint() == print_before
    assert {path for path, _ in slots(backbone.net)} >= {before[0].path, "blocks.0" if "timm" in name else "layers.0"}
    inject(backbone.net, places(backbone.net, ["q", "fc1"]), lora, "again")
    for s in ("inner", "again", "outer"):
        remove(backbone.net, s)
    assert not list(slots(backbone.net))
    assert places(backbone.net, asked) == before


@torch.no_grad()
def test_several_sets_are_independent_and_using_restores() -> None:
    backbone = backbone_of("timm vit")
    bare = backbone(PIXELS)
    inject(backbone.net, places(backbone.net, ["q", "v"]), lora, "a")
    inject(backbone.net, places(backbone.net, ["q", "v", "fc1"]), lora, "b")
    shake(backbone, "a", 1)
    with using(backbone, "a"):
        a = backbone(PIXELS)
    shake(backbone, "b", 2)
    with using(backbone, "b"):
        b = backbone(PIXELS)
        with using(backbone, "a"):
            assert torch.equal(backbone(PIXELS), a)
            with using(backbone, None):
                assert torch.equal(backbone(PIXELS), bare)
            assert torch.equal(backbone(PIXELS), a)
        assert torch.equal(backbone(PIXELS), b)
    assert torch.equal(backbone(PIXELS), bare)
    assert not torch.equal(a, b)

    def fail() -> None:
        with using(backbone, "a"):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(backbone(PIXELS), bare)

    with using(backbone, "b"):
        remove(backbone, "b")
    with using(backbone, "a"):
        assert torch.equal(backbone(PIXELS), a)
    assert torch.equal(backbone(PIXELS), bare)


@torch.no_grad()
@pytest.mark.parametrize("name", ["timm vit", "hf vit", "timm eva fused"])
def test_several_sets_act_together(name: str) -> None:
    """Each adds its update, at the places it is at; so does one set of their matrices side by side."""
    backbone = backbone_of(name)
    inject(backbone.net, places(backbone.net, ["q", "v", "fc1"]), lora, "a")
    shake(backbone, "a", 1)
    copy_set(backbone.net, "a", "b")
    shake(backbone, "b", 2)
    inject(backbone.net, places(backbone.net, ["v", "fc2"], [-1]), lora, "c")
    shake(backbone, "c", 3)
    found = {}
    for names in (None, (), "a", ("a",), ("a", "b"), ["b", "a"], ("a", "c"), ("a", "b", "c")):
        with using(backbone, names):
            found[str(names)] = backbone(PIXELS)
            here = [(slot.active, len(slot.pets.keys() & set(names or ()))) for _, slot in slots(backbone)]
        assert all(isinstance(active, tuple) is (count > 1) for active, count in here), "one is called as ever"
    assert all(slot.active is None for _, slot in slots(backbone))
    assert torch.equal(found["()"], found["None"])
    assert torch.equal(found["('a',)"], found["a"])
    torch.testing.assert_close(found["['b', 'a']"], found["('a', 'b')"], rtol=1e-4, atol=1e-5)
    different = [found[key] for key in ("None", "a", "('a', 'b')", "('a', 'c')", "('a', 'b', 'c')")]
    assert not any(torch.allclose(x, y, atol=1e-3) for i, x in enumerate(different) for y in different[:i])

    for one, other in zip(pets(backbone, "a"), pets(backbone, "b"), strict=True):
        assert isinstance(one, LoRA)
        assert isinstance(other, LoRA)
        pairs = list(zip(one.factors(), other.factors(), strict=True))
        one.resize(6)
        one.set_factors([(torch.cat([b, b2], 1), torch.cat([a, a2])) for (b, a), (b2, a2) in pairs])
    with using(backbone, "a"):
        torch.testing.assert_close(backbone(PIXELS), found["('a', 'b')"], rtol=1e-4, atol=1e-5)
    with using(backbone, ("a", "c")):
        torch.testing.assert_close(backbone(PIXELS), found["('a', 'b', 'c')"], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_later_of_several_sets_stands_around_the_earlier() -> None:
    backbone = backbone_of("timm vit")
    (place,) = places(backbone.net, ["fc1"], [0])
    inject(backbone.net, [place], lora, "a")
    inject(backbone.net, [place], lambda p: SSF(p, generator("ssf")), "b")
    shake(backbone, "a", 1)
    shake(backbone, "b", 2)
    ((_, slot),) = slots(backbone.net)
    x = torch.randn(5, 24, generator=generator("x"))
    one, other = slot.pet("a"), slot.pet("b")
    with using(backbone, ("a", "b")):
        torch.testing.assert_close(slot(x), slot(hidden_states=x))
        inner = slot(x)
        with using(backbone, ("b", "a")):
            outer = slot(x)
            with using(backbone, "a"):
                assert torch.equal(slot(x), one(slot.base, x))
            assert torch.equal(slot(x), outer)
        assert torch.equal(slot(x), inner)
        assert torch.equal(inner, other(lambda rows: one(slot.base, rows), x))
        assert torch.equal(outer, one(lambda rows: other(slot.base, rows), x))
        assert not torch.allclose(inner, outer)
        remove(backbone, "b")  # what is left stays in force
        assert torch.equal(slot(x), one(slot.base, x))
        with pytest.raises(UsageError, match="no set of pets called 'b'; one of a"), using(backbone, ("a", "b")):
            pass
        assert torch.equal(slot(x), one(slot.base, x))


def test_the_gradient_reaches_all_sets_in_force() -> None:
    backbone = backbone_of("timm vit").train()
    for number, name in enumerate("abc"):
        inject(backbone.net, places(backbone.net, ["q", "v"]), lora, name)
        shake(backbone, name, number)
    with using(backbone, ("a", "b")):
        backbone(PIXELS).square().sum().backward()
    for name in "abc":
        assert all((p.grad is not None) is (name != "c") for p in parameters(backbone, name))


def test_to_use_a_set_does_not_go_through_the_names_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is done at every step, and there may be a set for each of a thousand tasks."""
    backbone = backbone_of("timm vit")
    inject(backbone.net, places(backbone.net, ["q", "v"]), lora, "a")
    monkeypatch.setattr("perpetune.pets.base.sets", lambda root: pytest.fail("all names were asked for"))
    with using(backbone, "a"), using(backbone, ("a",)), using(backbone, None):
        pass


@torch.no_grad()
def test_a_set_becomes_a_copy_of_another() -> None:
    backbone = backbone_of("timm vit")
    inject(backbone.net, places(backbone.net, ["q", "v"]), lora, "a")
    shake(backbone, "a", 1)
    copy_set(backbone.net, "a", "b")
    assert [type(pet) for pet in pets(backbone.net, "b")] == [type(pet) for pet in pets(backbone.net, "a")]
    with using(backbone, "a"):
        first = backbone(PIXELS)
    with using(backbone, "b"):
        assert torch.equal(backbone(PIXELS), first)
    kept = parameters(backbone.net, "b")
    assert not {id(p) for p in kept} & {id(p) for p in parameters(backbone.net, "a")}
    shake(backbone, "a", 2)
    with using(backbone, "b"):
        assert torch.equal(backbone(PIXELS), first), "what is done to one is not done to the other"
    copy_set(backbone.net, "a", "b")  # once more: an optimizer that holds the parameters goes on with them
    assert [id(p) for p in parameters(backbone.net, "b")] == [id(p) for p in kept]
    with using(backbone, "a"):
        second = backbone(PIXELS)
    with using(backbone, "b"):
        assert torch.equal(backbone(PIXELS), second)
    assert not torch.equal(first, second)


def test_a_copied_set_shares_what_is_frozen() -> None:
    """A deep prompt knows the attention it is at: a copy of it would be as large as the backbone's."""
    backbone = backbone_of("timm vit")
    inject(backbone.net, places(backbone.net, ["attn"]), lambda place: Prompt(place, generator("t", place.path)), "a")
    copy_set(backbone.net, "a", "b")
    for _, slot in slots(backbone.net):
        first, second = slot.pets["a"], slot.pets["b"]
        assert isinstance(first, Prompt)
        assert isinstance(second, Prompt)
        assert second.place.module is first.place.module is slot.base
        assert second.tokens is not first.tokens


def test_sets_at_rest_act_as_before_and_no_walk_through_the_net_meets_them() -> None:
    backbone = backbone_of("timm vit")
    inject(backbone.net, places(backbone.net, ["q"]), lora, "working")

    def met() -> list[int]:
        net = backbone.net
        return [len(list(walked)) for walked in (net.modules(), net.parameters(), net.state_dict())]

    alone, found = met(), {}
    for number in range(5):
        shake(backbone.net, "working", seed=number)
        copy_set(backbone.net, "working", f"task-{number}")
        assert met() > alone, "the control: a set that does not rest is met"
        with using(backbone, f"task-{number}"), torch.no_grad():
            found[f"task-{number}"] = backbone(PIXELS)
        rest(backbone.net, f"task-{number}")
        assert met() == alone
    assert sets(backbone.net) == ["working", *found]
    for name, before in found.items():
        with using(backbone, name), torch.no_grad():
            assert torch.equal(backbone(PIXELS), before)
    backbone.net.train()
    assert all(pet.training for pet in pets(backbone.net, "task-1"))
    backbone.net.eval()
    assert not any(pet.training for pet in pets(backbone.net, "task-1"))
    twin = copy.deepcopy(backbone).double()
    assert {p.dtype for name in found for p in parameters(twin.net, name)} == {torch.float64}
    copy_set(backbone.net, "task-3", "working")
    with using(backbone, "working"), torch.no_grad():
        assert torch.equal(backbone(PIXELS), found["task-3"])
    for name in found:
        remove(backbone.net, name)
    assert sets(backbone.net) == ["working"]
    with pytest.raises(UsageError, match="no set of pets called 'task-1'"):
        rest(backbone.net, "task-1")


def test_many_copies_at_rest_are_those_that_are_made_one_by_one() -> None:
    backbone = backbone_of("timm vit")
    inject(backbone.net, places(backbone.net, ["q"]), lora, "working")
    shake(backbone.net, "working")
    copies_at_rest(backbone.net, "working", ["a", "b"])
    copy_set(backbone.net, "working", "c")
    rest(backbone.net, "c")
    assert sets(backbone.net) == ["working", "a", "b", "c"]
    assert {form(backbone.net, name) for name in "abc"} == {form(backbone.net, "working")}
    tensors = {name: parameters(backbone.net, name) for name in ("working", *"abc")}
    assert all(torch.equal(p, q) for name in "abc" for p, q in zip(tensors[name], tensors["working"], strict=True))
    assert len({p.data_ptr() for found in tensors.values() for p in found}) == 4 * len(tensors["a"])
    assert all(slot.pets.rests(name) == (name != "working") for _, slot in slots(backbone.net) for name in tensors)
    with pytest.raises(UsageError, match="no set of pets called 'other'"):
        copies_at_rest(backbone.net, "other", ["d"])


class Tied(nn.Module):
    """Two names for one parameter, a list that is its own, a module twice, and no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(2), requires_grad=False)
        self.other, self.none = self.one, nn.Linear(2, 2, bias=False)
        nn.init.ones_(self.none.weight)
        self.again, self.values, self.place = self.none, [1, [2]], ("x", 1.5)
        self.register_buffer("seen", torch.arange(3), persistent=False)


class Own(Tied):
    def __deepcopy__(self, memo: dict[int, Any]) -> Own:
        made = Own()
        made.values = ["own"]
        return made


@pytest.mark.parametrize("of", ["lora", "prompt", "ssf", "tied", "own", "hooked"])
def test_a_twin_is_what_deepcopy_makes(of: str) -> None:
    if of in ("tied", "own", "hooked"):
        module: nn.Module = Own() if of == "own" else Tied()
        if of == "hooked":
            module.register_forward_hook(lambda *given: None)
    else:
        makers: dict[str, Any] = {"lora": lora, "prompt": lambda p: Prompt(p, generator("x"), length=2)}
        make, role = makers.get(of, lambda p: SSF(p, generator("x"))), {"lora": "q", "prompt": "attn"}.get(of, "norm")
        net = timm_net("vit")
        module = inject(net, places(net, [role]), make, "a")[0]
        shake(net, "a")
    module.eval()
    found, expected = twin(module, {}), copy.deepcopy(module, {})
    assert described(found) == described(expected) == (described(module) if of != "own" else described(expected))
    assert not {id(t) for t in owned(found)} & {id(t) for t in owned(module)}
    if of == "tied":
        assert isinstance(found, Tied)
        assert found.one is found.other
        assert found.none is found.again
        assert found.values is not module.values
        assert found.values[1] is not module.values[1]  # type: ignore[index]


def owned(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def described(module: nn.Module) -> list[Any]:
    """All that a module holds, part by part: types, tensors by their values, and which of them are one."""
    seen: dict[int, int] = {}
    found: list[Any] = []
    for name, part in module.named_modules(remove_duplicate=False):
        tensors = {**part._parameters, **part._buffers}
        found.append((name, type(part), seen.setdefault(id(part), len(seen)), sorted(vars(part))))
        found += [(k, type(v), str(v)) for k, v in sorted(vars(part).items()) if k[0] != "_" or k == "_size"]
        found += [
            (k, type(v), None if v is None else (v.tolist(), v.dtype, v.requires_grad)) for k, v in tensors.items()
        ]
        found += [(k, None if v is None else seen.setdefault(id(v), len(seen))) for k, v in tensors.items()]
        found += [(k, type(v), len(v)) for k, v in sorted(vars(part).items()) if isinstance(v, dict)]
    return found


def test_a_set_that_is_not_there_is_not_copied() -> None:
    net = timm_net("vit")
    inject(net, places(net, ["q"]), lora, "first")
    with pytest.raises(UsageError, match="no set of pets called 'x'; one of first"):
        copy_set(net, "x", "y")
    assert {name for _, slot in slots(net) for name in slot.pets} == {"first"}


def test_names_of_sets_are_checked() -> None:
    net = timm_net("vit")
    at = places(net, ["q"])
    inject(net, at, lora, "first")
    with pytest.raises(UsageError, match=r"blocks.0.attn.qkv has a pet called 'first' already"):
        inject(net, at, lora, "first")
    for bad in ("", "a.b", "a b", "keys"):
        with pytest.raises(UsageError, match="cannot name a set"):
            inject(net, at, lora, bad)
    for use in (lambda: pets(net, "x"), lambda: parameters(net, "x"), lambda: remove(net, "x")):
        with pytest.raises(UsageError, match="no set of pets called 'x'; one of first"):
            use()
    with pytest.raises(UsageError, match="no set of pets called 'x'"), using(net, "x"):
        pass


def test_a_failing_constructor_leaves_the_net_as_it_was() -> None:
    net = timm_net("vit")
    with pytest.raises(UsageError, match="rank is 0"):
        inject(net, places(net, ["q"]), lambda p: lora(p, rank=0 if p.block else 2))
    assert not list(slots(net))


def test_the_gradient_reaches_the_active_pets_and_nothing_else() -> None:
    backbone = backbone_of("timm vit").train()
    inject(backbone.net, places(backbone.net, ["q", "v"]), lora, "a")
    inject(backbone.net, places(backbone.net, ["q", "v"]), lora, "b")
    shake(backbone, "a")
    shake(backbone, "b")
    with using(backbone, "a"):
        backbone(PIXELS).square().sum().backward()
    trained = parameters(backbone, "a")
    assert len(trained) == 2 * 3
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    mine = {id(p) for p in trained}
    assert all(p.grad is None for p in backbone.parameters() if id(p) not in mine)
    assert {id(p) for p in backbone.parameters() if p.requires_grad} == mine | {
        id(p) for p in parameters(backbone, "b")
    }


def test_the_frozen_net_stays_in_evaluation_mode_and_pets_follow() -> None:
    net = timm_net("vit", proj_drop_rate=0.5, drop_path_rate=0.5)
    backbone = Backbone(net, spec="x", dim=24, preprocess=PictureView(16))
    inject(backbone.net, places(backbone.net, ["fc1"]), lambda p: lora(p, dropout=0.5))
    shake(backbone)
    backbone.train()
    with torch.no_grad():
        assert torch.equal(backbone(PIXELS), backbone(PIXELS))
        with using(backbone, "default"), own_global_state("dropout"):
            assert not torch.equal(backbone(PIXELS), backbone(PIXELS))
        backbone.eval()
        with using(backbone, "default"):
            assert torch.equal(backbone(PIXELS), backbone(PIXELS))


def test_a_pet_on_any_module_that_is_like_a_linear() -> None:
    class Linear4bit(nn.Module):
        """As bitsandbytes' one seems from outside: no float weight, its own forward."""

        def __init__(self, linear: nn.Linear):
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.packed = nn.Parameter(linear.weight.detach().mul(50).round().to(torch.int8), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.packed.to(x.dtype) / 50).T

    backbone = backbone_of("hf vit")
    for place in places(backbone.net, ["q", "k", "v", "proj", "fc1", "fc2"]):
        assert isinstance(place.module, nn.Linear)
        backbone.net.set_submodule(place.path, Linear4bit(place.module))
    with torch.no_grad():
        before, fingerprint = backbone(PIXELS), backbone.fingerprint()
    inject(backbone.net, places(backbone.net, ["q", "v", "fc2"]), lora)
    with using(backbone, "default"):
        after = backbone(PIXELS)
        assert torch.equal(after, before)
        after.sum().backward()
    assert all(p.grad is not None for p in parameters(backbone, "default"))
    assert backbone.fingerprint() == fingerprint
    assert isinstance(submodule(backbone.net, "layers.0.attention.q_proj"), Linear4bit)


def test_a_slot_hides_the_weight_that_code_might_use_without_calling_it() -> None:
    with pytest.raises(AttributeError):
        _ = Slot(nn.Linear(2, 2)).weight


def test_lora_options() -> None:
    (place,) = places(timm_net("vit"), ["fc1"], [0])
    assert lora(place, rank=4, alpha=8).scale == 2
    assert lora(place, rank=4, alpha=8, rslora=True).scale == 4
    assert torch.equal(lora(place).down, lora(place).down)
    state = torch.random.get_rng_state()
    lora(place)
    assert torch.equal(torch.random.get_rng_state(), state)
    for wrong in ({"rank": 0}, {"alpha": 0.0}, {"alpha": float("nan")}, {"dropout": 1.0}, {"dropout": -0.1}):
        with pytest.raises(UsageError, match=f"lora: {next(iter(wrong))} is"):
            lora(place, **wrong)
    (block,) = places(timm_net("vit"), ["block"], [0])
    with pytest.raises(UsageError, match=r"blocks.0 \(block\) is not a linear layer"):
        lora(block)


@torch.no_grad()
def test_lora_takes_another_rank_and_starts_anew() -> None:
    (place,) = places(timm_net("vit"), ["q", "v"], [0])
    pet, rng = LoRA(place, generator("test"), rank=3, alpha=6.0), generator("test")
    first = [p.clone() for p in pet.parameters()]
    kept = list(pet.parameters())
    pet.resize(3)
    assert all(a is b for a, b in zip(pet.parameters(), kept, strict=True))
    pet.resize(5)
    assert [tuple(p.shape) for p in pet.parameters()] == [(10, 24), (24, 5), (24, 5)]
    assert not any(p.any() for p in pet.parameters())
    assert (pet.rank, pet.scale) == (5, 2.0)
    x = torch.randn(4, 24, generator=generator("x"))
    pet.set_factors([(torch.ones_like(b), torch.ones_like(a)) for b, a in pet.factors()])
    assert not torch.equal(pet(place.module, x), place.module(x))
    pet.requires_grad_(False).resize(3)
    assert not any(p.requires_grad for p in pet.parameters())
    pet.restart(rng)
    assert all(torch.equal(a, b) for a, b in zip(pet.parameters(), first, strict=True))
    assert torch.equal(pet(place.module, x), place.module(x))
    pet.restart(rng)
    assert not torch.equal(pet.down, first[0])
    fresh = LoRA(place, generator("test"), rank=5, alpha=10.0)
    fresh.load_state_dict({name: torch.zeros_like(v) for name, v in fresh.state_dict().items()})
    pet.resize(5)
    assert pet.state_dict().keys() == fresh.state_dict().keys()


@torch.no_grad()
def test_lora_at_rows_in_the_middle_and_under_autocast() -> None:
    linear = nn.Linear(6, 10)
    pet = LoRA(Place("x", linear, ("k",), ((2, 5),), 0, 6, 10), torch.Generator().manual_seed(0), rank=2)
    pet.up[0].normal_(generator=torch.Generator().manual_seed(1))
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
    expected = linear(x)
    expected[:, 2:5] += pet.scale * x @ pet.down.T @ pet.up[0].T
    torch.testing.assert_close(pet(linear, x), expected)
    torch.testing.assert_close(pet(linear, x[0]), expected[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert pet(linear, x).dtype == torch.bfloat16


def conv1d(d_in: int, d_out: int) -> nn.Module:
    """GPT-2's linear layer, whose weight is the other way round."""
    from transformers.pytorch_utils import Conv1D

    with own_global_state("conv1d"):
        module: nn.Module = Conv1D(d_out, d_in)
    nn.init.normal_(module.get_parameter("bias"), generator=generator("bias"))
    return module.requires_grad_(False)


@pytest.mark.parametrize("parts", [((0, 10),), ((0, 3), (6, 10))])
@torch.no_grad()
def test_lora_on_a_transposed_linear(parts: tuple[tuple[int, int], ...]) -> None:
    base = conv1d(6, 10)
    pet = LoRA(Place("x", base, ("q", "v")[: len(parts)], parts, 0, 6, 10), generator("test"), rank=2)
    x = torch.randn(3, 6, generator=generator("x"))
    assert torch.equal(pet(base, x), base(x))
    for up in pet.up:
        up.normal_(generator=generator("up"))
    before = base.get_parameter("weight").clone()
    folded = pet.fold(base)
    assert type(folded) is type(base)
    torch.testing.assert_close(folded(x), pet(base, x))
    assert not torch.allclose(folded(x), base(x))
    assert torch.equal(base.get_parameter("weight"), before)

    class Own(type(base)):  # type: ignore[misc]
        """Of that class, and with a forward of its own."""

    odd = Own(10, 6)
    assert pet.fold(odd) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 10), lambda: conv1d(6, 10)], ids=["linear", "conv1d"])
def test_lora_on_a_base_of_half_precision(make: Any, dtype: torch.dtype) -> None:
    """Its parameters and their gradients are float32, its output what the base gives, its values those of float32."""
    with own_global_state("half"):
        base = make().requires_grad_(False)
    half = copy.deepcopy(base).to(dtype)
    place = Place("x", half, ("q",), ((0, 10),), 0, 6, 10)
    pet = LoRA(place, generator("test"), rank=2, alpha=2.0)
    x = torch.randn(50, 6, generator=generator("x")).to(dtype)
    assert torch.equal(pet(half, x), half(x))
    with torch.no_grad():
        pet.up[0].normal_(generator=generator("up"))
    grads = []
    for b, inputs in ((half, x), (base, x.float())):
        out = pet(b, inputs)
        assert out.dtype == inputs.dtype
        grads.append(torch.autograd.grad(out.float().square().sum(), list(pet.parameters())))
        assert all(g.dtype == torch.float32 for g in grads[-1])
    for low, full in zip(*grads, strict=True):
        assert (low - full).norm() / full.norm() < 0.02
    folded = pet.fold(half)
    assert folded is not None
    torch.testing.assert_close(folded(x), pet(half, x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_on_half_precision_under_autocast(dtype: torch.dtype) -> None:
    base = nn.Linear(6, 10).to(dtype).requires_grad_(False)
    pet = LoRA(Place("x", base, ("q",), ((0, 10),), 0, 6, 10), generator("test"), rank=2)
    x = torch.randn(3, 6, generator=generator("x"))  # as a norm in float32 gives it
    with torch.autocast("cpu", torch.bfloat16):
        out = pet(base, x)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, base(x))
        out.float().sum().backward()
    assert pet.up[0].grad is not None
    assert pet.up[0].grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_is_pefts(dtype: Any, tmp_path: Path) -> None:
    """Logits and gradients of PEFT's LoRA on the same language model, from the same matrices."""
    peft = pytest.importorskip("peft")
    from perpetune.build import load_backbone

    folder, ids = tiny_language_model(tmp_path), torch.randint(3, 300, (2, 9), generator=generator("ids"))
    ours = load_backbone(f"hf:{folder}", dtype=dtype)
    theirs: Any = load_backbone(f"hf:{folder}", dtype=dtype).net
    names = ["q_proj", "v_proj", "down_proj"]
    inject(ours.net, places(ours.net, ["q", "v", "fc2"]), lambda p: lora(p, rank=4, alpha=6.0))
    shake(ours.net)
    tuned = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=6.0, target_modules=names))
    pairs = []
    for path, slot in slots(ours.net):
        pet, layer = slot.pet("default"), theirs.get_submodule(path)
        assert isinstance(pet, LoRA)
        pairs += [(pet.down, layer.lora_A["default"].weight), (pet.up[0], layer.lora_B["default"].weight)]
    assert len(pairs) == 2 * 2 * 3
    with torch.no_grad():
        for mine, other in pairs:
            assert mine.dtype == other.dtype == torch.float32
            other.copy_(mine)
    with using(ours.net, "default"):
        out = ours.net(input_ids=ids, labels=ids)
    expected = tuned(input_ids=ids, labels=ids)
    out.loss.backward()
    expected.loss.backward()
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == "float32" else {"rtol": 0.05, "atol": 0.02}
    assert out.logits.dtype == expected.logits.dtype == getattr(torch, dtype)
    torch.testing.assert_close(out.logits, expected.logits, **close)
    for mine, other in pairs:
        assert mine.grad is not None
        assert other.grad is not None
        assert (mine.grad - other.grad).norm() <= (1e-5 if dtype == "float32" else 0.05) * other.grad.norm()

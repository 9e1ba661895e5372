"""SSF: what it computes behind every operation of every family, how many numbers that is, and where it cannot go."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_pets_adapter import backbone_of, pixels_for, put, rand, shake
from tiny import recipe, split_folder, vit_folder
from torch import Tensor, nn

from perpetune.build import build_backbone, build_method
from perpetune.check import check_method
from perpetune.errors import UsageError
from perpetune.models.towers import places
from perpetune.pets import PET, Place, inject, parameters, slots, using
from perpetune.pets.adapter import Adapter
from perpetune.pets.lora import LoRA
from perpetune.pets.prompt import Prompt
from perpetune.pets.ssf import SSF
from perpetune.recipe import make_recipe
from perpetune.seeding import generator

FAMILIES = (
    "timm vit",
    "timm vit qk-norm",
    "timm eva",
    "timm eva rope gqa",
    "timm beit",
    "timm relpos",
    "hf vit",
    "hf deit",
    "hf dinov2",
    "hf dinov3",
    "micro",
)
PARTS = {  # the operations of one block, and those that a net has once
    "timm vit": ("norm1 attn.qkv attn.proj norm2 mlp.fc1 mlp.fc2", "patch_embed.proj norm"),
    "timm beit": ("norm1 attn.qkv attn.proj norm2 mlp.fc1 mlp.fc2", "patch_embed.proj fc_norm"),
    "timm eva rope gqa": (
        "norm1 attn.q_proj attn.k_proj attn.v_proj attn.proj norm2 mlp.fc1 mlp.fc2",
        "patch_embed.proj fc_norm",
    ),
    "hf vit": (
        "layernorm_before attention.q_proj attention.k_proj attention.v_proj attention.o_proj layernorm_after mlp.fc1 "
        "mlp.fc2",
        "embeddings.patch_embeddings.projection layernorm",
    ),
    "hf dinov2": (
        "norm1 attention.q_proj attention.k_proj attention.v_proj attention.o_proj norm2 mlp.fc1 mlp.fc2",
        "embeddings.patch_embeddings.projection layernorm",
    ),
    "hf dinov3": (
        "norm1 attention.q_proj attention.k_proj attention.v_proj attention.o_proj norm2 mlp.up_proj mlp.down_proj",
        "embeddings.patch_embeddings norm",
    ),
}


def ssf(place: Place, **options: float) -> SSF:
    return SSF(place, generator("test", place.path), **options)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FAMILIES)
def test_as_made_it_leaves_every_bit_and_then_acts(name: str, dtype: torch.dtype) -> None:
    backbone = backbone_of(name, dtype)
    pixels, print_before = pixels_for(backbone), backbone.fingerprint()
    before = backbone(pixels)
    put(backbone, SSF, "operations")
    with using(backbone, "default"):
        assert torch.equal(backbone(pixels), before)
        shake(backbone.net)
        assert not torch.allclose(backbone(pixels), before)
    assert torch.equal(backbone(pixels), before)
    assert backbone.fingerprint() == print_before


@pytest.mark.parametrize("name", PARTS)
def test_it_goes_to_every_operation_and_once_to_those_of_the_net(name: str) -> None:
    backbone = backbone_of(name)
    one, once = ([*part.split()] for part in PARTS[name])
    blocks = next(p.path for p in places(backbone.net, ["block"])).removesuffix(".0")
    for asked, numbers in ((None, [0, 1]), ([1], [1]), ([-2], [0])):
        found = places(backbone.net, ["operations"], asked)
        assert {p.path for p in found} == {f"{blocks}.{i}.{path}" for i in numbers for path in one} | set(once)
        assert [(p.path, p.block) for p in found[-2:]] == [(path, -1) for path in once]
    assert all(p.block >= 0 for p in found[:-2])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_gradient_reaches_every_scale_and_shift(name: str) -> None:
    backbone = backbone_of(name)
    put(backbone, SSF, "operations")
    shake(backbone.net)
    backbone.train()
    with using(backbone, "default"):
        (backbone(pixels_for(backbone)) * rand(1, backbone.dim)).sum().backward()
    found = dict(backbone.net.named_parameters())
    still = [n for n, p in found.items() if "pets" in n and (p.grad is None or not p.grad.any())]
    # The softmax takes out again what is added to all keys alike, so there the gradient is 0 but for rounding.
    assert all(name.endswith("k_proj.pets.default.shift") for name in still), still
    assert all(p.grad is None for n, p in found.items() if "pets" not in n)


@torch.no_grad()
@pytest.mark.parametrize("at", ["patch", "norm1", "q", "fc1", "norm"])
@pytest.mark.parametrize("name", ["timm vit", "hf vit", "hf dinov3"])
def test_it_scales_and_shifts_channels(name: str, at: str) -> None:
    backbone = backbone_of(name)
    (place,) = places(backbone.net, [at], [0])
    (pet,) = put(backbone, SSF, at, blocks=[0])
    assert isinstance(pet, SSF)
    shake(backbone.net)
    x = pixels_for(backbone) if at == "patch" else rand(2, 5, place.d_in)
    y = place.module(x)
    axis = 1 if at == "patch" else -1
    expected = y.movedim(axis, -1).clone()
    start, stop = place.parts[0] if place.parts else (0, place.d_out)
    expected[..., start:stop] = expected[..., start:stop] * (1 + pet.scale) + pet.shift
    torch.testing.assert_close(pet(place.module, x), expected.movedim(-1, axis), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_parts_of_a_fused_linear_are_scaled_alone() -> None:
    backbone = backbone_of("timm vit")
    (place,) = places(backbone.net, ["v", "q"], [0])
    pet = ssf(place, std=0.5).double()
    assert (len(pet.scale), place.d_out) == (32, 48)
    x = rand(2, 5, 16)
    y, own = pet(place.module, x), place.module(x)
    assert torch.equal(y[..., 16:32], own[..., 16:32])
    torch.testing.assert_close(y[..., 32:], own[..., 32:] * (1 + pet.scale[16:]) + pet.shift[16:])
    assert list(pet.state_dict()) == ["scale", "shift"]


@pytest.mark.parametrize(
    ("kind", "at", "options", "count"),
    [
        (Adapter, "mlp", {"width": 64}, 1_189_632),
        (SSF, "operations", {}, 205_824),
        (Prompt, "attn", {"length": 5}, 46_080),
    ],
)
def test_a_vit_b_gets_as_many_parameters_as_published(
    kind: type[PET], at: str, options: dict[str, int], count: int
) -> None:
    import timm

    with torch.device("meta"):
        net = timm.create_model("vit_base_patch16_224", num_classes=0)
    assert sum(p.numel() for p in net.parameters()) == 85_798_656
    inject(net, places(net, [at]), lambda place: kind(place, generator("test"), **options))  # type: ignore[call-arg]
    assert sum(p.numel() for p in parameters(net, "default")) == count


def test_what_it_starts_with_is_drawn_from_its_generator() -> None:
    (place,) = places(backbone_of("timm vit").net, ["fc1"], [0])
    first, again = ssf(place, std=0.02), ssf(place, std=0.02)
    assert torch.equal(first.scale, again.scale)
    assert not torch.equal(first.scale, first.shift)
    many = torch.cat([ssf(p, std=0.02).scale.detach() for p in places(backbone_of("micro").net, ["operations"])])
    assert 0.018 < float(many.std()) < 0.022
    assert not ssf(place).scale.any()


@torch.no_grad()
def test_weight_decay_pulls_the_scale_to_one() -> None:
    backbone = backbone_of("timm vit")
    put(backbone, SSF, "operations")
    shake(backbone.net)
    optimizer = torch.optim.SGD(parameters(backbone.net, "default"), lr=1.0, weight_decay=1.0)
    for parameter in parameters(backbone.net, "default"):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    pixels = pixels_for(backbone)
    with using(backbone, "default"):
        tuned = backbone(pixels)
    assert torch.equal(tuned, backbone(pixels))


@torch.no_grad()
def test_the_output_keeps_its_type() -> None:
    linear = nn.Linear(4, 6).bfloat16()
    pet = ssf(Place("x", linear, ("q",), ((0, 6),), 0, 4, 6), std=0.1)
    assert pet(linear, torch.ones(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("at", ["attn", "mlp", "block"])
def test_it_cannot_go_to_whole_modules(at: str) -> None:
    backbone = backbone_of("timm vit")
    with pytest.raises(UsageError, match=rf"ssf: blocks.0\S* \({at}\) is not a single operation; use operations, or"):
        put(backbone, SSF, at)
    assert not list(slots(backbone.net))


@pytest.mark.parametrize("std", [-0.1, float("nan"), float("inf")])
def test_its_noise_is_checked(std: float) -> None:
    (place,) = places(backbone_of("timm vit").net, ["fc1"], [0])
    with pytest.raises(UsageError, match=r"ssf: std is \S+; a number from 0 is expected"):
        ssf(place, std=std)


def test_other_pets_say_that_a_norm_is_no_place_for_them() -> None:
    net = backbone_of("timm vit").net
    for role in ("norm1", "norm", "patch"):
        (place,) = places(net, [role], [0])
        with pytest.raises(UsageError, match=rf"lora: \S+ \({role}\) is not a linear layer"):
            LoRA(place, generator("test"))
        with pytest.raises(UsageError, match=rf"adapter: \S+ \({role}\) is not a whole module"):
            Adapter(place, generator("test"))


def test_a_net_without_a_role_says_so() -> None:
    class Bare(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    net = backbone_of("timm vit").net
    net.norm = Bare()
    net.fc_norm = nn.Identity()
    assert [p.path for p in places(net, ["operations"], [0]) if p.block < 0] == ["patch_embed.proj"]
    with pytest.raises(UsageError, match="VisionTransformer has no role 'norm'"):
        places(net, ["norm"])


def test_a_recipe_has_it_everywhere_unless_told_otherwise_and_learns(tmp_path: Path) -> None:
    vit, data = vit_folder(tmp_path / "vit"), split_folder(tmp_path / "data", ["a", "b"], 4, 2)
    plain = make_recipe(recipe(vit, data, pet={"name": "ssf", "std": 0.02}))
    assert plain.pet is not None
    assert plain.pet.at == ["operations"]
    assert plain.resolved() == plain
    method = build_method(plain, build_backbone(plain))
    assert len(list(slots(method))) == 1 * 8 + 2
    few = make_recipe(recipe(vit, data, pet={"name": "ssf", "at": ["norm1", "norm"]}))
    assert len(list(slots(build_method(few, build_backbone(few))))) == 2
    lacking = make_recipe(recipe(vit, data, pet={"name": "ssf", "at": "gate"}))
    with pytest.raises(UsageError, match="no role 'gate'"):
        build_method(lacking, build_backbone(lacking))
    protected = make_recipe(recipe(vit, data, pet="ssf", protect=True))
    with pytest.raises(UsageError, match=r"^ssf cannot be protected: .*; leave protect: out, or use lora or adapter$"):
        build_method(protected, build_backbone(protected))


@pytest.mark.parametrize("on", ["pictures", pytest.param("texts", marks=pytest.mark.slow)])
def test_fine_tuning_by_it_keeps_the_contract(on: str) -> None:
    faults = [f"{o.rule}: {o.fault}" for o in check_method("finetune", ["pet=ssf"], on=on) if o.fault is not None]
    assert faults == []

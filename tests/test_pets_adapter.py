"""The adapter: what it computes beside attention and MLP, and what keeps old outputs as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_pets_attention import (
    DIM,
    backbone_of,
    change,
    first,
    pixels_for,
    place,
    put,
    rand,
    shake,
    spaces,
    spanned,
)
from torch import Tensor, nn
from torch.nn import functional as F

from perpetune.errors import UsageError
from perpetune.models.towers import places
from perpetune.numerics.moments import Moments
from perpetune.numerics.projection import Operand
from perpetune.pets import PET, parameters, using
from perpetune.pets.adapter import Adapter
from perpetune.pets.lora import LoRA
from perpetune.seeding import generator

THREE = ("timm vit", "hf vit", "micro")


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "at"), [(Adapter, "mlp"), (Adapter, "attn"), (LoRA, "q"), (LoRA, "fc2")])
@pytest.mark.parametrize("name", THREE)
def test_as_made_it_leaves_every_bit_and_then_acts(name: str, kind: type[PET], at: str, dtype: torch.dtype) -> None:
    backbone = backbone_of(name, dtype)
    pixels = pixels_for(backbone)
    before = backbone(pixels)
    put(backbone, kind, at)
    with using(backbone, "default"):
        assert torch.equal(backbone(pixels), before)
        shake(backbone.net)
        assert not torch.allclose(backbone(pixels), before)
    assert torch.equal(backbone(pixels), before)


@torch.no_grad()
@pytest.mark.parametrize(("activation", "act"), [("gelu", F.gelu), ("relu", F.relu)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("at", ["mlp", "attn"])
@pytest.mark.parametrize("name", ["timm vit", "hf vit"])
def test_it_is_a_bottleneck_beside_the_module(name: str, at: str, bias: bool, activation: str, act: Any) -> None:
    backbone = backbone_of(name)
    (pet,) = put(backbone, Adapter, at, blocks=[0], width=5, scale=0.7, bias=bias, activation=activation)
    assert isinstance(pet, Adapter)
    shake(backbone.net)
    base, x = places(backbone.net, [at], [0])[0].module, rand(2, 5, DIM)
    zero = torch.zeros((), dtype=torch.float64)
    b_d, b_u = (zero if b is None else b for b in (pet.down_bias, pet.up_bias))
    expected = first(base(x)) + 0.7 * (act(x @ pet.down.T + b_d) @ pet.up.T + b_u)
    got = pet(base, x)
    assert type(got) is type(base(x))
    torch.testing.assert_close(first(got), expected, rtol=1e-12, atol=1e-12)
    names = ["down", "up", "down_bias", "up_bias"] if bias else ["down", "up"]
    assert list(pet.state_dict()) == names


@pytest.mark.parametrize("at", ["mlp", "attn"])
@pytest.mark.parametrize("name", THREE)
def test_each_parameter_acts_on_every_picture_alone(name: str, at: str) -> None:
    backbone = backbone_of(name)
    put(backbone, Adapter, at, width=5)
    shake(backbone.net)
    with using(backbone, "default"):
        features = backbone(pixels_for(backbone))
        alone = torch.cat([backbone(p[None]) for p in pixels_for(backbone)])
        features.square().sum().backward()
    torch.testing.assert_close(alone, features, rtol=1e-9, atol=1e-9)
    grads = [p.grad for p in parameters(backbone.net, "default")]
    assert all(g is not None and g.isfinite().all() and g.any() for g in grads)


@torch.no_grad()
@pytest.mark.parametrize("at", ["mlp", "attn"])
def test_under_autocast_it_follows_the_precision(at: str) -> None:
    backbone = backbone_of("hf vit", torch.float32)
    put(backbone, Adapter, at, width=5)
    pixels = pixels_for(backbone)
    with torch.autocast("cpu", torch.bfloat16):
        bare = backbone(pixels)
        with using(backbone, "default"):
            assert torch.equal(backbone(pixels), bare)
    shake(backbone.net)
    with using(backbone, "default"):
        exact = backbone(pixels)
        with torch.autocast("cpu", torch.bfloat16):
            close = backbone(pixels)
    assert (close - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("at", ["mlp", "attn"])
@pytest.mark.parametrize("name", ["timm vit", "hf vit"])
def test_its_sites_keep_old_outputs_and_leave_room_to_learn(name: str, at: str, bias: bool, seed: int) -> None:
    backbone = backbone_of(name)
    (pet,) = put(backbone, Adapter, at, blocks=[0], width=10, scale=1.0, bias=bias)
    shake(backbone.net)
    base, old = places(backbone.net, [at], [0])[0].module, rand(1, 3, DIM, seed=seed)

    def adapted(x: Tensor) -> Any:
        return pet(base, x)

    protected = spaces(backbone.net, lambda: adapted(old))
    assert {p for operand, _ in protected for p in operand.parameters} == set(pet.parameters())
    at_old, at_new = change(adapted, pet, old, protected)
    assert at_old < 1e-12
    assert at_new > 1e-2


def test_one_side_alone_or_a_bias_that_is_left_out_moves_old_outputs() -> None:
    for kept in ([0], [1], "biases"):
        backbone = backbone_of("timm vit")
        (pet,) = put(backbone, Adapter, blocks=[0], at="mlp", width=10, scale=1.0)
        assert isinstance(pet, Adapter)
        shake(backbone.net)
        base, old = places(backbone.net, ["mlp"], [0])[0].module, rand(1, 3, DIM)
        if isinstance(kept, list):
            protected = [spaces(backbone.net, lambda p=pet, b=base, o=old: p(b, o))[i] for i in kept]
        else:
            hidden = F.gelu(F.linear(old, pet.down, pet.down_bias))
            protected = []
            for weight, rows in ((pet.down, old), (pet.up, hidden)):
                moments = Moments(rows.shape[-1])
                moments.update(rows[0])
                protected.append((Operand(weight), [spanned(moments.matrix)]))
        assert change(lambda x, p=pet, b=base: p(b, x), pet, old, protected)[0] > 1e-2


def test_the_way_down_is_idle_until_the_way_up_does_something() -> None:
    pet = Adapter(place(roles=("mlp",)), generator("test"), width=3)
    assert pet.idle() == ["down"]
    assert pet.up_bias is not None
    for parameter in (pet.up, pet.up_bias):
        with torch.no_grad():
            parameter.view(-1)[0] = 1
            assert pet.idle() == []
            parameter.zero_()
    assert Adapter(place(roles=("mlp",)), generator("test"), bias=False).idle() == ["down"]


def test_its_values_come_from_the_generator_alone() -> None:
    torch_state = torch.get_rng_state()
    one, two, three = (Adapter(place(roles=("mlp",)), generator("test", n)) for n in (1, 1, 2))
    assert torch.equal(one.down, two.down)
    assert not torch.equal(one.down, three.down)
    assert torch.equal(torch.get_rng_state(), torch_state)


@pytest.mark.parametrize(
    ("options", "changes", "said"),
    [
        ({"width": 0}, {}, "adapter: width is 0; at least 1"),
        ({"scale": 0.0}, {}, "adapter: scale is 0.0; a number above 0"),
        ({"scale": float("inf")}, {}, "adapter: scale is inf"),
        ({}, {"roles": ("block",)}, r"adapter: blocks.0.attn \(block\) is not a whole module; use attn or mlp"),
        ({}, {"roles": ("q", "v"), "parts": ((0, 8), (16, 24))}, r"\(q, v\) is not a whole module; use attn or mlp"),
    ],
)
def test_what_cannot_be_is_told(options: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said) as told:
        Adapter(place(**{"roles": ("mlp",), **changes}), generator("test"), **options)
    assert "\n" not in str(told.value)


def test_a_tuple_keeps_what_comes_after_its_first_element() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, str]:
            return x, "weights"

    pet = Adapter(place(roles=("attn",)), generator("test"), width=3)
    x = torch.ones(1, 2, 8)
    y, rest = pet(Pair(), x)
    assert rest == "weights"
    assert torch.equal(y, x)

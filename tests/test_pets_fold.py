"""Folding: a net whose pets became part of it computes the same and has none."""

from __future__ import annotations

import copy

import pytest
import torch
from test_pets_adapter import backbone_of, pixels_for, put, rand, shake
from torch import Tensor, nn

from perpetune.errors import UsageError
from perpetune.models.backbone import Backbone
from perpetune.models.families import LINEAR_ROLES
from perpetune.models.towers import places
from perpetune.pets import PET, Place, fold, inject, pets, remove, slots, using
from perpetune.pets.adapter import Adapter
from perpetune.pets.lora import LoRA
from perpetune.pets.prefix import Prefix
from perpetune.pets.prompt import Prompt
from perpetune.pets.ssf import SSF
from perpetune.seeding import generator

FAMILIES = ("timm vit", "timm vit qk-norm", "timm eva", "timm beit", "timm relpos", "hf vit", "hf dinov2", "hf dinov3")


def put_everywhere(backbone: Backbone, kind: type[PET], name: str = "default") -> list[PET]:
    if kind is SSF:
        return put(backbone, SSF, "operations", name)
    found = places(backbone.net, [role for role in backbone.roles() if role in LINEAR_ROLES])
    made = inject(backbone.net, found, lambda place: kind(place, generator("test")), name)  # type: ignore[call-arg]
    dtype = next(backbone.net.parameters()).dtype
    return [pet.to(dtype) for pet in made]


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("kind", [SSF, LoRA])
@pytest.mark.parametrize("name", FAMILIES)
def test_folded_is_the_same_as_the_pets_in_force(name: str, kind: type[PET], dtype: torch.dtype, close: float) -> None:
    backbone = backbone_of(name, dtype).train()
    pixels, bare = pixels_for(backbone), copy.deepcopy(backbone)
    tensors = {n: (t, t.clone()) for n, t in backbone.net.state_dict(keep_vars=True).items()}
    count = len(put_everywhere(backbone, kind))
    shake(backbone.net)
    with using(backbone, "default"):
        tuned = backbone(pixels)
        assert fold(backbone.net, "default") == count
        assert not list(slots(backbone.net))
        torch.testing.assert_close(backbone(pixels), tuned, rtol=close, atol=close)
    assert not torch.allclose(bare(pixels), tuned, rtol=1e-3)
    for key, (tensor, before) in tensors.items():
        assert torch.equal(tensor, before), key  # the old ones, which somebody else may hold
    assert {m.training for _, m in backbone.net.named_modules()} == {False}
    assert not any(p.requires_grad for p in backbone.parameters())


@torch.no_grad()
def test_a_folded_net_can_be_tuned_and_folded_again() -> None:
    backbone = backbone_of("timm vit")
    pixels = pixels_for(backbone)
    for kind in (SSF, LoRA, SSF):
        put_everywhere(backbone, kind)
        shake(backbone.net)
        with using(backbone, "default"):
            tuned = backbone(pixels)
        fold(backbone.net, "default")
        torch.testing.assert_close(backbone(pixels), tuned, rtol=1e-11, atol=1e-11)


@torch.no_grad()
@pytest.mark.parametrize(
    "base",
    [
        nn.LayerNorm(6),
        nn.LayerNorm(6, elementwise_affine=False),
        nn.LayerNorm(6, bias=False),
        nn.Linear(6, 6, bias=False),
        nn.Linear(6, 6).bfloat16(),
    ],
    ids=["norm", "norm without values", "norm without bias", "linear without bias", "linear in bfloat16"],
)
def test_what_it_is_folded_into_may_lack_a_bias(base: nn.Module) -> None:
    pet = SSF(Place("x", base, ("q",), (), 0, 6, 6), generator("test"), std=0.3)
    dtype = next((p.dtype for p in base.parameters()), torch.float32)
    for _ in range(2):
        folded, x = pet.fold(base), rand(2, 6).to(dtype)
        assert folded is not None
        assert folded is not base
        assert {p.dtype for p in folded.parameters()} == {dtype}
        close = 2e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(folded(x), pet(base, x), rtol=close, atol=close)
        base = folded


def test_lora_is_folded_as_at_prediction() -> None:
    linear = nn.Linear(6, 9)
    place = Place("x", linear, ("q", "v"), ((0, 3), (6, 9)), 0, 6, 9)
    pet = LoRA(place, generator("test"), rank=2, dropout=0.5).train()
    with torch.no_grad():
        for up in pet.up:
            up.normal_(generator=generator("up"))
    folded, x = pet.fold(linear), rand(4, 6).float()
    assert isinstance(folded, nn.Linear)
    torch.testing.assert_close(folded(x), pet.eval()(linear, x))
    assert torch.equal(folded.weight[3:6], linear.weight[3:6])


@pytest.mark.parametrize(
    ("kind", "at", "said"),
    [
        (Adapter, "mlp", r"^blocks.0.mlp: Adapter cannot be folded into Mlp; predict with the set 'a' in force$"),
        (Prefix, "attn", r"^blocks.0.attn: Prefix cannot be folded into Attention; predict with"),
        (Prompt, "attn", r"^blocks.0.attn: Prompt cannot be folded into Attention; predict with"),
    ],
)
def test_a_pet_that_cannot_be_folded_changes_nothing(kind: type[PET], at: str, said: str) -> None:
    backbone = backbone_of("timm vit")
    put(backbone, kind, at, "a", blocks=[0])
    with pytest.raises(UsageError, match=said):
        fold(backbone.net, "a")
    assert len(pets(backbone.net, "a")) == 1


def test_one_place_that_cannot_be_folded_leaves_the_others_too() -> None:
    class Packed(nn.Linear):
        """As a 4-bit layer: of torch's class, with a forward of its own."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 50

    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return self._conv_forward(x, self.weight / self.weight.std(), self.bias)

    backbone = backbone_of("timm vit")
    backbone.net.set_submodule("blocks.1.mlp.fc2", Packed(64, 16))
    for kind in (SSF, LoRA):
        put_everywhere(backbone, kind, "a")
        before = dict(slots(backbone.net))
        with pytest.raises(UsageError, match=r"^blocks.1.mlp.fc2: \w+ cannot be folded into Packed; predict with"):
            fold(backbone.net, "a")
        assert dict(slots(backbone.net)) == before
        remove(backbone.net, "a")
    backbone.net.set_submodule("patch_embed.proj", Standardised(3, 16, 8, 8))
    put(backbone, SSF, "patch", "b")
    with pytest.raises(UsageError, match=r"^patch_embed.proj: SSF cannot be folded into Standardised"):
        fold(backbone.net, "b")


def test_a_place_with_other_sets_is_told() -> None:
    backbone = backbone_of("timm vit")
    put(backbone, SSF, "operations", "slow")
    put(backbone, LoRA, "fc1", "fast", blocks=[1])
    with pytest.raises(UsageError, match=r"^blocks.1.mlp.fc1 also carries the set of pets 'fast'; remove it before"):
        fold(backbone.net, "slow")
    assert len(pets(backbone.net, "slow")) == 2 * 6 + 2
    with pytest.raises(UsageError, match="there is no set of pets called 'x'; one of fast, slow"):
        fold(backbone.net, "x")


@torch.no_grad()
def test_sets_elsewhere_stay() -> None:
    backbone = backbone_of("timm vit")
    pixels = pixels_for(backbone)
    put(backbone, Adapter, "mlp", "outer")
    put(backbone, SSF, "fc1", "inner")
    shake(backbone.net, "inner")
    with using(backbone, "inner"):
        tuned = backbone(pixels)
    assert fold(backbone.net, "inner") == 2
    assert [path for path, _ in slots(backbone.net)] == ["blocks.0.mlp", "blocks.1.mlp"]
    torch.testing.assert_close(backbone(pixels), tuned)

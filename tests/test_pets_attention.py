"""Prefix and prompt: what they compute on every kind of attention, and what keeps old outputs as they are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perpetune.check import tiny_backbone
from perpetune.errors import UsageError
from perpetune.models.backbone import Backbone
from perpetune.models.backbones import load_backbone
from perpetune.models.families import places
from perpetune.models.preprocess import Preprocess
from perpetune.numerics.moments import Moments
from perpetune.numerics.projection import Operand, ProjectedStep
from perpetune.numerics.subspace import Subspace
from perpetune.pets import PET, Place, inject, parameters, using
from perpetune.pets.attention import extended, projected
from perpetune.pets.lora import LoRA
from perpetune.pets.prefix import Prefix
from perpetune.pets.prompt import Prompt
from perpetune.protection.sites import Watch, pet_sites
from perpetune.seeding import generator, own_global_state

DIM, HEADS, SIDE = 16, 2, 16
PIXELS = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
SMALL = {"img_size": SIDE, "patch_size": 8, "embed_dim": DIM, "depth": 2, "num_heads": HEADS, "num_classes": 0}


def timm_net(module: str, kind: str, **options: Any) -> nn.Module:
    models = __import__("timm.models", fromlist=[module])
    net: nn.Module = getattr(getattr(models, module), kind)(**{**SMALL, **options})
    for name, parameter in net.named_parameters():  # relative positions and biases begin at zero, which hides them
        if "bias" in name:
            nn.init.normal_(parameter)
    return net


def hf_net(kind: str, attention: str = "sdpa", **options: Any) -> nn.Module:
    import transformers

    config = {"hidden_size": DIM, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": 32}
    made = getattr(transformers, f"{kind}Config")(**{**config, "image_size": SIDE, "patch_size": 8, **options})
    made._attn_implementation = attention
    net: nn.Module = getattr(transformers, f"{kind}Model")(made)
    return net


NETS: dict[str, Callable[[], nn.Module]] = {
    "timm vit": lambda: timm_net("vision_transformer", "VisionTransformer"),
    "timm vit qk-norm": lambda: timm_net("vision_transformer", "VisionTransformer", qk_norm=True),
    "timm eva": lambda: timm_net("eva", "Eva", use_rot_pos_emb=True),
    "timm eva rope gqa": lambda: timm_net(
        "eva", "Eva", use_rot_pos_emb=True, attn_type="rope", qkv_fused=False, num_heads=4, num_kv_heads=2
    ),
    "timm beit": lambda: timm_net("beit", "Beit", use_rel_pos_bias=True),
    "timm relpos": lambda: timm_net("vision_transformer_relpos", "VisionTransformerRelPos"),
    "hf vit": lambda: hf_net("ViT"),
    "hf deit": lambda: hf_net("Deit" if False else "DeiT"),
    "hf dinov2": lambda: hf_net("Dinov2"),
    "hf dinov3": lambda: hf_net("DINOv3ViT"),
}
PLAIN = ("timm vit", "hf vit", "hf dinov2")  # no mask and no rotary positions


def backbone_of(name: str, dtype: torch.dtype = torch.float64) -> Backbone:
    if name == "micro":
        return load_backbone("perpetune:micro").to(dtype)
    with own_global_state("test", name):
        net = NETS[name]()
    forward = (lambda n, x: n(pixel_values=x).last_hidden_state[:, 0]) if name.startswith("hf") else None
    return Backbone(net, spec=name, dim=DIM, preprocess=Preprocess(SIDE), forward=forward).to(dtype)


def put(
    backbone: Backbone, kind: type[PET], at: str = "attn", name: str = "default", blocks: Any = None, **options: Any
) -> list[PET]:
    rng = generator("test", name)
    made = inject(backbone.net, places(backbone.net, [at], blocks), lambda place: kind(place, rng, **options), name)
    dtype = next(p for p in backbone.net.parameters() if p.is_floating_point()).dtype
    return [pet.to(dtype) for pet in made]  # type: ignore[call-arg]


def pixels_for(backbone: Backbone) -> Tensor:
    side = backbone.preprocess.size
    pixels = PIXELS if side == SIDE else F.interpolate(PIXELS, (side, side))
    return pixels.to(next(backbone.net.parameters()).dtype)


def dense(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention as it is defined, and its weights."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        logits = logits.masked_fill(~torch.ones(logits.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    weights = logits.softmax(-1)
    return weights @ v, weights


class Bare(nn.Module):
    """Just the call: queries, keys and values are given."""

    def __init__(self, k: Tensor, v: Tensor, times: int = 1, **how: Any):
        super().__init__()
        self.k, self.v, self.times, self.how = k, v, times, how

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            y = F.scaled_dot_product_attention(x, self.k, self.v, **self.how)
        return y


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


B, H, N, L, W = 2, 4, 5, 3, 6
MASKS = {
    "none": {},
    "scale": {"scale": 0.7},
    "causal": {"is_causal": True},
    "bool": {"attn_mask": rand(B, 1, N, N, seed=5) > -0.5},
    "bool for all queries": {"attn_mask": rand(B, 1, 1, N, seed=6) > -0.5},
    "bool for all keys": {"attn_mask": torch.ones(N, 1, dtype=torch.bool)},
    "float": {"attn_mask": rand(H, N, N, seed=7)},
    "float and scale": {"attn_mask": rand(N, N, seed=8), "scale": 0.3},
}


@pytest.mark.parametrize("which", MASKS)
@pytest.mark.parametrize(("own", "further"), [(H, H), (2, 2), (2, H)])
def test_further_keys_and_values_are_seen_by_all_whatever_the_mask(which: str, own: int, further: int) -> None:
    how = MASKS[which]
    q, k, v = rand(B, H, N, W, seed=1), rand(B, own, N, W, seed=2), rand(B, own, N, W, seed=3)
    more_k, more_v = rand(1, further, L, W, seed=4), rand(1, further, L, W, seed=9)
    seen: list[tuple[Tensor, Tensor]] = []
    base = Bare(k, v, enable_gqa=own < H, **how)
    got = extended(base, more_k, more_v, q, watch=lambda *rows: seen.append(rows))

    causal = torch.ones(N, N, dtype=torch.bool).tril() if how.get("is_causal") else None
    mask = how.get("attn_mask", causal)
    if mask is not None:
        mask = mask.expand(*mask.shape[:-1], N)
        mask = torch.cat([torch.full((*mask.shape[:-1], L), mask.dtype == torch.bool).to(mask), mask], dim=-1)
    wide = [t.repeat_interleave(H // t.shape[1], 1).expand(B, -1, -1, -1) for t in (more_k, k, more_v, v)]
    expected, weights = dense(
        q, torch.cat(wide[:2], 2), torch.cat(wide[2:], 2), mask, scale=how.get("scale")
    )
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(seen[0][0], q, rtol=0, atol=0)
    torch.testing.assert_close(seen[0][1], weights[..., :L], rtol=1e-12, atol=1e-12)


def test_a_call_that_is_not_as_expected_is_told() -> None:
    q, more = rand(B, H, N, W), rand(1, H, L, W)
    with pytest.raises(UsageError, match="Bare calls scaled_dot_product_attention more than once"):
        extended(Bare(q, q, times=2), more, more, q)
    with pytest.raises(UsageError, match=r"Bare does not call .*attn_implementation=\"sdpa\".*fused_attn"):
        extended(Bare(q, q, times=1).register_forward_hook and nn.Identity() or q, more, more, q)  # type: ignore
    with pytest.raises(UsageError, match=r"3 heads of width 6 do not fit"):
        extended(Bare(q, q), more[:, :3], more[:, :3], q)
    with pytest.raises(RuntimeError, match="is_causal"):  # torch's own fault stays torch's
        extended(Bare(q, q, is_causal=True, attn_mask=torch.zeros(N, N, dtype=torch.float64)), more, more, q)

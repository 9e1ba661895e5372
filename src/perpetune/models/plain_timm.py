"""timm's vision transformer in plain torch, so that a state is opened without timm, which takes long to import.

The names of its parts, their order and every call of torch are those of timm's `VisionTransformer` in the forms that
`sizes_of` admits: what one computes, and its gradients, are those of the other to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perpetune.models.plain_vit import fill


class PlainTimmViT(nn.Module):
    """A vision transformer with norms before attention and MLP, and no dropout (arXiv:2010.11929), without classifier.

    Args:
        image_size, patch_size: sides of the input and of a patch, in pixels.
        width, inner: width of the tokens, and inside the MLP.
        depth, heads: numbers of blocks, and of heads in each.
        eps: what the norms add to the variance.
        class_token: whether there is a class token.
        registers: the number of further tokens before those of the patches.
        embed_prefix: whether positions are added to the class token and to registers.
        patch_bias, qkv_bias: whether these layers have a bias.
        layer_scale: whether what a block adds is scaled.
        pre_norm: whether the tokens pass a norm before the first block.
        norm: where the last norm is: before the pooling (`tokens`), after it (`pooled`), or nowhere (`none`).
        pool: the feature is the class token (`token`) or the mean of the patches (`avg`).
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        width: int,
        inner: int,
        depth: int,
        heads: int,
        eps: float,
        class_token: bool,
        registers: int,
        embed_prefix: bool,
        patch_bias: bool,
        qkv_bias: bool,
        layer_scale: bool,
        pre_norm: bool,
        norm: str,
        pool: str,
    ):
        super().__init__()
        self.image_size, self.embed_prefix, self.pool = image_size, embed_prefix, pool
        self.width, self.class_token, self.num_prefix_tokens = width, class_token, int(class_token) + registers
        self.grid = image_size // patch_size
        count = self.grid**2 + (self.num_prefix_tokens if embed_prefix else 0)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width)) if class_token else None
        self.reg_token = nn.Parameter(torch.empty(1, registers, width)) if registers else None
        self.pos_embed = nn.Parameter(torch.empty(1, count, width))
        self.patch_embed = _Patches(image_size, patch_size, width, patch_bias)

        def normed(there: bool) -> nn.Module:
            return nn.LayerNorm(width, eps=eps) if there else nn.Identity()

        self.norm_pre = normed(pre_norm)
        self.blocks = nn.Sequential(
            *(_Block(width, heads, inner, eps, qkv_bias, layer_scale, normed) for _ in range(depth))
        )
        self.norm, self.fc_norm = normed(norm == "tokens"), normed(norm == "pooled")

    def forward(self, pixels: Tensor) -> Tensor:
        """Features `(B, width)` of normalised pixels `(B, 3, S, S)`."""
        tokens = self.patch_embed(pixels)
        prefix = [part.expand(len(tokens), -1, -1) for part in (self.cls_token, self.reg_token) if part is not None]
        if self.embed_prefix:
            tokens = (torch.cat([*prefix, tokens], dim=1) if prefix else tokens) + self.pos_embed
        else:
            tokens = tokens + self.pos_embed
            tokens = torch.cat([*prefix, tokens], dim=1) if prefix else tokens
        tokens = self.norm(self.blocks(self.norm_pre(tokens)))
        pooled = tokens[:, 0] if self.pool == "token" else tokens[:, self.num_prefix_tokens :].mean(dim=1)
        feature: Tensor = self.fc_norm(pooled)
        return feature

    def load(self, stored: Mapping[str, Tensor]) -> None:
        """Load the tensors of a file by timm's names; see `fill`. Positions of another square grid are interpolated as
        timm does it."""
        tensors, prefix = dict(stored), self.num_prefix_tokens if self.embed_prefix else 0
        before = stored["pos_embed"]
        side = round((before.shape[1] - prefix) ** 0.5)
        if side != self.grid:
            grid = before[:, prefix:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
            grid = F.interpolate(grid, size=[self.grid] * 2, mode="bicubic", antialias=True)
            grid = grid.permute(0, 2, 3, 1).reshape(1, -1, before.shape[2])
            tensors["pos_embed"] = torch.cat([before[:, :prefix], grid.to(before.dtype)], dim=1)
        fill(self, tensors)


class _Patches(nn.Module):
    def __init__(self, image_size: int, size: int, width: int, bias: bool):
        super().__init__()
        self.side = image_size
        self.proj = nn.Conv2d(3, width, kernel_size=size, stride=size, bias=bias)

    def forward(self, pixels: Tensor) -> Tensor:
        if tuple(pixels.shape[2:]) != (self.side, self.side):
            raise ValueError(f"pictures of {self.side} pixels are expected, not {tuple(pixels.shape[2:])}")
        patches: Tensor = self.proj(pixels)
        return patches.flatten(2).transpose(1, 2)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, qkv_bias: bool):
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        rows, count, width = tokens.shape
        fused = self.qkv(tokens).reshape(rows, count, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = fused.unbind(0)
        read = F.scaled_dot_product_attention(q, k, v)
        projected: Tensor = self.proj(read.transpose(1, 2).reshape(rows, count, width))
        return projected


class _MLP(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, tokens: Tensor) -> Tensor:
        changed: Tensor = self.fc2(F.gelu(self.fc1(tokens)))
        return changed


class _Scale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens * self.gamma


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, inner: int, eps: float, qkv_bias: bool, layer_scale: bool, normed: Any):
        super().__init__()
        self.norm1 = normed(True)
        self.attn = _Attention(width, heads, qkv_bias)
        self.ls1 = _Scale(width) if layer_scale else nn.Identity()
        self.norm2 = normed(True)
        self.mlp = _MLP(width, inner)
        self.ls2 = _Scale(width) if layer_scale else nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.ls1(self.attn(self.norm1(tokens)))
        changed: Tensor = tokens + self.ls2(self.mlp(self.norm2(tokens)))
        return changed


def sizes_of(net: Any) -> dict[str, Any]:
    """What `PlainTimmViT` takes, from a net of timm.

    Raises:
        AttributeError, IndexError, TypeError, ValueError: it is no such net, or has a part that is not covered.
    """
    first, patches = net.blocks[0], net.patch_embed
    rows, columns = patches.img_size
    settled = (
        net.pool_include_prefix is False
        and net.attn_pool is None
        and patches.dynamic_img_pad is False
        and patches.flatten is not net.dynamic_img_size  # else it gives the patches in another form
    )
    if rows != columns or net.global_pool not in ("token", "avg") or not settled:
        raise ValueError("not covered")
    norms = [place for place, norm in (("tokens", net.norm), ("pooled", net.fc_norm)) if type(norm) is not nn.Identity]
    return {
        "image_size": rows,
        "patch_size": patches.proj.kernel_size[0],
        "width": net.embed_dim,
        "inner": first.mlp.fc1.out_features,
        "depth": len(net.blocks),
        "heads": first.attn.num_heads,
        "eps": first.norm1.eps,
        "class_token": net.cls_token is not None,
        "registers": 0 if net.reg_token is None else net.reg_token.shape[1],
        "embed_prefix": not net.no_embed_class,
        "patch_bias": patches.proj.bias is not None,
        "qkv_bias": first.attn.qkv.bias is not None,
        "layer_scale": hasattr(first.ls1, "gamma"),
        "pre_norm": type(net.norm_pre) is not nn.Identity,
        "norm": norms[0] if norms else "none",
        "pool": net.global_pool,
    }

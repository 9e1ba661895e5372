"""The net of the packaged model: a vision transformer in plain torch, so that it is ready as soon as torch is.

The names of its parts and its arithmetic are those of transformers' `ViTModel`, bit by bit: a pet, a state and an
export made with one fit the other. To import transformers' class takes longer than everything else that a prediction
with a small model does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Transformers 5 renames the parts of a stored `ViTModel` while it reads them. In this order, because the longer names
# contain the shorter ones.
_RENAMED = (
    (r"^encoder\.layer\.", "layers."),
    (r"\.attention\.attention\.(query|key|value)\.", lambda found: f".attention.{found[1][0]}_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)


class PlainViT(nn.Module):
    """A vision transformer with a class token, norms before attention and MLP, and no dropout (arXiv:2010.11929).

    Args:
        image_size, patch_size: sides of the input and of a patch, in pixels.
        hidden_size: width of the tokens.
        num_hidden_layers, num_attention_heads: numbers of blocks, and of heads in each.
        intermediate_size: width inside the MLP.
        layer_norm_eps: what the norms add to the variance.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        hidden_size: int,
        num_hidden_layers: int,
        num_attention_heads: int,
        intermediate_size: int,
        layer_norm_eps: float,
    ):
        super().__init__()
        self.embeddings = _Embeddings(image_size, patch_size, hidden_size)
        self.layers = nn.ModuleList(
            _Layer(hidden_size, num_attention_heads, intermediate_size, layer_norm_eps)
            for _ in range(num_hidden_layers)
        )
        self.layernorm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """Tokens after the final norm, `(B, 1 + patches, hidden_size)`, of normalised pixels `(B, 3, S, S)`."""
        tokens = self.embeddings(pixels)
        for layer in self.layers:
            tokens = layer(tokens)
        normed: Tensor = self.layernorm(tokens)
        return normed

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the tensors of a stored `ViTModel`, by the names of transformers 4 or 5; RuntimeError if one is missing
        or left over."""
        self.load_state_dict({_renamed(name): tensor for name, tensor in tensors.items()})


def _renamed(name: str) -> str:
    for old, new in _RENAMED:
        name = re.sub(old, new, name)
    return name


class _Embeddings(nn.Module):
    def __init__(self, image_size: int, patch_size: int, width: int):
        super().__init__()
        count = (image_size // patch_size) ** 2
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.patch_embeddings = _Patches(patch_size, width)
        self.position_embeddings = nn.Parameter(torch.empty(1, 1 + count, width))

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = self.patch_embeddings(pixels)
        return torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1) + self.position_embeddings


class _Patches(nn.Module):
    def __init__(self, size: int, width: int):
        super().__init__()
        self.projection = nn.Conv2d(3, width, kernel_size=size, stride=size)

    def forward(self, pixels: Tensor) -> Tensor:
        patches: Tensor = self.projection(pixels)
        return patches.flatten(2).transpose(1, 2)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.num_heads, self.scale = heads, (width // heads) ** -0.5
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.o_proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        rows, count, width = tokens.shape
        q, k, v = (
            layer(tokens).view(rows, count, self.num_heads, -1).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        read = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        projected: Tensor = self.o_proj(read.transpose(1, 2).reshape(rows, count, width))
        return projected


class _MLP(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, tokens: Tensor) -> Tensor:
        changed: Tensor = self.fc2(F.gelu(self.fc1(tokens)))
        return changed


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, inner: int, eps: float):
        super().__init__()
        self.attention = _Attention(width, heads)
        self.layernorm_before = nn.LayerNorm(width, eps=eps)
        self.layernorm_after = nn.LayerNorm(width, eps=eps)
        self.mlp = _MLP(width, inner)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.attention(self.layernorm_before(tokens)) + tokens
        changed: Tensor = self.mlp(self.layernorm_after(tokens)) + tokens
        return changed


def sizes_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What `PlainViT` takes, from the `config.json` of a `ViTModel`."""
    names = ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return {name: config[name] for name in (*names, "layer_norm_eps")}

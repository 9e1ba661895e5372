"""Vision transformers of transformers in plain torch, so that they are ready as soon as torch is.

The names of their parts and their arithmetic are those of `ViTModel` and `Dinov2Model`, bit by bit: a pet, a state and
an export made with one fit the other. To import transformers' class takes longer than everything else that a
prediction with a small model does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Transformers 5 renames the parts of a stored model while it reads them. In this order, because the longer names
# contain the shorter ones.
_RENAMED = (
    (r"\.attention\.attention\.(query|key|value)\.", lambda found: f".attention.{found[1][0]}_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)

# Beginnings of the names of heads, which a file may have and no net here.
_HEADS = ("head.", "pooler.", "classifier.")


class PlainViT(nn.Module):
    """A vision transformer with a class token, norms before attention and MLP, and no dropout (arXiv:2010.11929).

    Args:
        image_size, patch_size: sides of the input and of a patch, in pixels.
        hidden_size: width of the tokens.
        num_hidden_layers, num_attention_heads: numbers of blocks, and of heads in each.
        intermediate_size: width inside the MLP.
        layer_norm_eps: what the norms add to the variance.
        qkv_bias: whether the projections to queries, keys and values have a bias.
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
        qkv_bias: bool = True,
    ):
        super().__init__()
        self.width, self.class_token, self.num_prefix_tokens = hidden_size, True, 1
        self.embeddings = _Embeddings(image_size, patch_size, hidden_size)
        self.layers = nn.ModuleList(
            _Layer(hidden_size, num_attention_heads, intermediate_size, layer_norm_eps, qkv_bias)
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

    def load(self, stored: Mapping[str, Tensor]) -> None:
        """Load the tensors of a stored `ViTModel`, by the names of transformers 4 or 5; see `fill`."""
        plain = {name.removeprefix("vit."): tensor for name, tensor in stored.items()}
        fill(self, {re.sub(r"^encoder\.layer\.", "layers.", _renamed(name)): tensor for name, tensor in plain.items()})


def fill(net: nn.Module, stored: Mapping[str, Tensor]) -> None:
    """Give a net its tensors, as float32; those of a classifier or pooler are left out.

    Raises:
        LookupError, RuntimeError: a tensor is missing, unexpected, or does not fit.
    """
    names = net.state_dict().keys()
    for name in stored.keys() - names:
        if not name.startswith(_HEADS):
            raise LookupError(f"unexpected: {name}")
    # New memory: the net may be on the device `meta`, and kernels see tensors of a file at other addresses.
    fresh = {name: torch.empty(stored[name].shape).copy_(stored[name]) for name in names}
    net.load_state_dict(fresh, assign=True)


class PlainDinov2(nn.Module):
    """DINOv2 with a class token and an MLP of two layers (arXiv:2304.07193).

    Args:
        mask_token: whether the net has the token that stands for hidden patches in its training; nothing here reads it.

    The others are those of `PlainViT`. Pictures may have another size; positions are interpolated.
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
        qkv_bias: bool,
        mask_token: bool,
    ):
        super().__init__()
        self.width, self.class_token, self.num_prefix_tokens = hidden_size, True, 1
        self.embeddings = _AnySize(image_size, patch_size, hidden_size, mask_token)
        self.encoder = _Encoder(
            _ScaledLayer(hidden_size, num_attention_heads, intermediate_size, layer_norm_eps, qkv_bias)
            for _ in range(num_hidden_layers)
        )
        self.layernorm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """Tokens after the final norm, `(B, 1 + patches, hidden_size)`, of normalised pixels `(B, 3, S, S)`."""
        normed: Tensor = self.layernorm(self.encoder(self.embeddings(pixels)))
        return normed

    def load(self, stored: Mapping[str, Tensor]) -> None:
        """Load the tensors of a stored `Dinov2Model`, by the names of transformers 4 or 5; see `fill`."""
        fill(self, {_renamed(name.removeprefix("dinov2.")): tensor for name, tensor in stored.items()})


def class_token(net: nn.Module, pixels: Tensor) -> Tensor:
    """Class token after the final norm, `(B, D)`, of a net in this file."""
    tokens: Tensor = net(pixels)
    return tokens[:, 0]


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


class _AnySize(nn.Module):
    def __init__(self, image_size: int, patch_size: int, width: int, mask_token: bool):
        super().__init__()
        self.patch_size, self.grid = patch_size, image_size // patch_size
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.mask_token = nn.Parameter(torch.empty(1, width)) if mask_token else None
        self.patch_embeddings = _Patches(patch_size, width)
        self.position_embeddings = nn.Parameter(torch.empty(1, 1 + self.grid**2, width))

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = self.patch_embeddings(pixels)
        tokens = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        return tokens + self._positions(*pixels.shape[2:])

    def _positions(self, height: int, width: int) -> Tensor:
        rows, columns = height // self.patch_size, width // self.patch_size
        if rows * columns == self.grid**2 and height == width:
            return self.position_embeddings
        patches = self.position_embeddings[:, 1:].reshape(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)
        patches = F.interpolate(patches, size=(rows, columns), mode="bicubic", align_corners=False)
        patches = patches.permute(0, 2, 3, 1).view(1, rows * columns, -1)
        return torch.cat([self.position_embeddings[:, :1], patches], dim=1)


class _Encoder(nn.Module):
    def __init__(self, layers: Iterable[nn.Module]):
        super().__init__()
        self.layer = nn.ModuleList(layers)

    def forward(self, tokens: Tensor) -> Tensor:
        for layer in self.layer:
            tokens = layer(tokens)
        return tokens


class _Patches(nn.Module):
    def __init__(self, size: int, width: int):
        super().__init__()
        self.projection = nn.Conv2d(3, width, kernel_size=size, stride=size)

    def forward(self, pixels: Tensor) -> Tensor:
        patches: Tensor = self.projection(pixels)
        return patches.flatten(2).transpose(1, 2)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool):
        super().__init__()
        self.num_heads, self.scale = heads, (width // heads) ** -0.5
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=bias) for _ in range(3))
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
    def __init__(self, width: int, heads: int, inner: int, eps: float, qkv_bias: bool):
        super().__init__()
        self.attention = _Attention(width, heads, qkv_bias)
        self.layernorm_before = nn.LayerNorm(width, eps=eps)
        self.layernorm_after = nn.LayerNorm(width, eps=eps)
        self.mlp = _MLP(width, inner)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.attention(self.layernorm_before(tokens)) + tokens
        changed: Tensor = self.mlp(self.layernorm_after(tokens)) + tokens
        return changed


class _Scale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.lambda1 = nn.Parameter(torch.empty(width))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens * self.lambda1


class _ScaledLayer(nn.Module):
    def __init__(self, width: int, heads: int, inner: int, eps: float, qkv_bias: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attention = _Attention(width, heads, qkv_bias)
        self.layer_scale1 = _Scale(width)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = _MLP(width, inner)
        self.layer_scale2 = _Scale(width)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.layer_scale1(self.attention(self.norm1(tokens))) + tokens
        changed: Tensor = self.layer_scale2(self.mlp(self.norm2(tokens))) + tokens
        return changed


def sizes_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What `PlainViT` takes, from the `config.json` of a `ViTModel`."""
    names = ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return {name: config[name] for name in (*names, "layer_norm_eps")}

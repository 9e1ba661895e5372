"""An attention whose projections are modules and whose core is one call, in place of one that hides both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perpetune.pets.base import frozen, walk


class SplitAttention(nn.Module):
    """Computes what torch's `nn.MultiheadAttention`, or open_clip's `Attention`, computes from its own parameters.

    Pets cannot reach those two: torch's reads the weights of its layers instead of calling them, and without gradients
    it takes a path without `scaled_dot_product_attention`. Here `qkv` and `proj` are linear layers that hold the very
    parameters of `attention`, and there is one call of `scaled_dot_product_attention`.

    A mask is cut to the number of tokens, so a tower with a mask for 77 tokens also takes fewer.

    Args:
        attention: a self-attention over `(B, N, width)`, without dropout.
    """

    def __init__(self, attention: Any):
        super().__init__()
        self.num_heads: int = attention.num_heads
        rows, width = attention.in_proj_weight.shape
        self.qkv = nn.Linear(width, rows, bias=False, device="meta")
        self.qkv.weight, self.qkv.bias = attention.in_proj_weight, attention.in_proj_bias
        self.proj = nn.Linear(width, width, bias=False, device="meta")
        self.proj.weight, self.proj.bias = attention.out_proj.weight, attention.out_proj.bias
        self.pair = isinstance(attention, nn.MultiheadAttention)  # whether it returns weights too, here None
        self.ln_q: nn.Module = getattr(attention, "ln_q", None) or nn.Identity()
        self.ln_k: nn.Module = getattr(attention, "ln_k", None) or nn.Identity()
        self.ln_inner: nn.Module = getattr(attention, "ln_inner", None) or nn.Identity()
        self.head_scale: nn.Parameter | None = getattr(attention, "head_scale", None)

    def forward(self, x: Tensor, *_: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Any:
        """The output `(B, N, width)`, for torch's attention with None in place of the weights.

        Args:
            x: queries, keys and values. What stands behind it is the same tensor again, by torch's signature.
            attn_mask: `(N, N)` or `(B · heads, N, N)`; false or `-inf` where a query does not see a key. Torch's own
                attention has true there, open_clip gives it numbers only.
        """
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)
        )  # (B, H, N, dh)
        mask = attn_mask
        if mask is not None:
            count = x.shape[1]
            mask = mask[..., :count, :count].to(q.dtype)
            mask = mask.unflatten(0, (len(x), self.num_heads)) if mask.dim() == 3 else mask
        y = F.scaled_dot_product_attention(self.ln_q(q), self.ln_k(k), v, attn_mask=mask)
        if self.head_scale is not None:
            y = y * self.head_scale
        y = self.proj(self.ln_inner(y.transpose(1, 2).flatten(2)))
        return (y, None) if self.pair else y


def shared_linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear layer on the memory of `weight (out, in)`, which may be a transposed view of a parameter."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight.detach(), requires_grad=False)
    made.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)  # type: ignore[assignment]
    return made


@torch.no_grad()
def stock_names(net: nn.Module) -> dict[str, Tensor]:
    """The tensors of a net of `loaders.openclip` under open_clip's own names and in its shapes."""
    tensors = frozen(net)
    split = {path for path, module in walk(net) if isinstance(module, SplitAttention)}
    renamed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        parent, _, leaf = name.rpartition(".")
        path, _, part = parent.rpartition(".")
        if path in split and part in ("qkv", "proj"):
            renamed[f"{path}.in_proj_{leaf}" if part == "qkv" else f"{path}.out_proj.{leaf}"] = value
        elif name == "visual_projection.weight":
            renamed["visual.proj"] = value.T
        elif name == "text_projection.weight" and "text_projection.bias" not in tensors:
            renamed["text.text_projection"] = value.T
        elif name.startswith("text_projection."):
            renamed[f"text.{name}"] = value
        else:
            renamed[name] = value
    return renamed

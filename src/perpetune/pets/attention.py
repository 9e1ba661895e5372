"""Functions that change what an attention module computes, without a copy of its source.

The attention modules of timm and transformers all call `torch.nn.functional.scaled_dot_product_attention`. The
functions here intercept that one call while the module runs. What the module does before and after the call stays as
it is: fused or separate projections, rotary positions, norms of queries and keys, 4-bit layers, LoRA inside it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from perpetune.errors import UsageError
from perpetune.numerics.exact import exactly

Watch = Callable[[Tensor, Tensor], None]


class _Call(NamedTuple):
    """The arguments of `scaled_dot_product_attention`: queries `(B, H, N, dh)`, keys and values `(B, H_kv, M, dh)`."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def attend(self) -> Tensor:
        return F.scaled_dot_product_attention(**self._asdict())


class _Instead(TorchFunctionMode):
    """Inside this mode, `instead` answers each call of `scaled_dot_product_attention`. `instead` may call it too."""

    def __init__(self, instead: Callable[[_Call], Tensor]):
        super().__init__()
        self.instead, self.calls = instead, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return self.instead(_Call(*args, **(kwargs or {})))


def extended(
    base: nn.Module,
    keys: Tensor,
    values: Tensor,
    x: Tensor,
    *args: Any,
    watch: Watch | None = None,
    **kwargs: Any,
) -> Any:
    """Compute `base(x, *args, **kwargs)`, where `base` is an attention, with more keys and values before its own.

    Every query sees the added keys, whatever mask the module uses.

    Args:
        keys: the added keys `(B or 1, H, L, dh)`. `H` is the number of heads of `base`'s queries or of its keys. If
            `base` has several rows (windows) for each of `B` examples, one example after the other, every row gets
            the keys of its example.
        values: the added values, of the same shape as `keys`.
        watch: called with the queries `(B, H, N, dh)` and the weights `(B, H, N, L)` that the added keys received.

    Raises:
        UsageError: `base` does not call `scaled_dot_product_attention`, calls it more than once, or has another number
            or width of heads.
    """

    def instead(call: _Call) -> Tensor:
        call = _extend(type(base).__name__, call, keys, values)
        if watch is not None:
            watch(call.query, _weights(call, keys.shape[-2]))
        return call.attend()

    return _once(base, instead, (x, *args), kwargs)


def projected(base: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values `(B, H_kv, L, dh)` that the attention `base` makes of `tokens (B, L, d)`.

    The attention itself is not computed. The tokens have no position: rotary positions do not change them, as they do
    not change a class token.

    Raises:
        UsageError: `base` does not call `scaled_dot_product_attention`, or calls it more than once.
    """
    caught: list[_Call] = []

    def instead(call: _Call) -> Tensor:
        caught.append(call)
        return call.query.new_zeros(*call.query.shape[:-1], call.value.shape[-1])

    nowhere = tokens.new_zeros(0, 1)  # cos and sin of no patches: all tokens count as class tokens
    _once(base, instead, (tokens,), {"position_embeddings": (nowhere, nowhere)} if _rotary(type(base).forward) else {})
    return caught[0].key, caught[0].value


def unmasked(base: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Compute `base(x, *args, **kwargs)`, and check that its attention has no mask.

    Raises:
        UsageError: the attention has a mask, or a bias by relative positions. Neither has entries for added tokens.
    """

    def instead(call: _Call) -> Tensor:
        if call.attn_mask is not None or call.is_causal:
            raise UsageError(
                f"the attention in {type(base).__name__} has a mask or relative positions, which have no entries for "
                "the tokens that the prompt adds; use prompt with deep: true"
            )
        return call.attend()

    with _Instead(instead):
        return base(x, *args, **kwargs)


def _once(base: nn.Module, instead: Callable[[_Call], Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`base(*args, **kwargs)` with its one call of `scaled_dot_product_attention` answered by `instead`."""
    name = type(base).__name__

    def only_one(call: _Call) -> Tensor:
        if mode.calls > 1:
            raise UsageError(
                f"{name} calls scaled_dot_product_attention more than once; prefix and prompt need one call"
            )
        return instead(call)

    mode = _Instead(only_one)
    with mode:
        y = base(*args, **kwargs)
    if not mode.calls:
        raise UsageError(
            f"{name} does not call scaled_dot_product_attention, and prefix and prompt work inside that call: with "
            'transformers, load the model with attn_implementation="sdpa"; with timm, switch fused_attn on '
            "(TIMM_FUSED_ATTN=1)"
        )
    return y


@cache
def _rotary(forward: Callable[..., Any]) -> bool:
    """Whether this `forward` takes rotary positions, as the attention of transformers' DINOv3 does."""
    return "position_embeddings" in inspect.signature(forward).parameters


def _extend(name: str, call: _Call, keys: Tensor, values: Tensor) -> _Call:
    """The call with the added keys and values before its own."""
    query, key, value = call.query, call.key, call.value
    heads, own_heads = keys.shape[1], key.shape[1]
    if query.dim() != 4 or heads not in (own_heads, query.shape[1]) or keys.shape[-1] != key.shape[-1]:
        raise UsageError(
            f"{name} attends with queries {tuple(query.shape)} and keys {tuple(key.shape)} (batch, heads, tokens, "
            f"width); {heads} heads of width {keys.shape[-1]} do not fit it"
        )
    if heads != own_heads:  # the added keys have one head for each query head, so the module's keys need as many
        key, value = (t.repeat_interleave(heads // own_heads, dim=1) for t in (key, value))
    length, count = keys.shape[-2], key.shape[-2]
    mask, causal = call.attn_mask, call.is_causal
    if causal and mask is None:
        mask = torch.ones(query.shape[-2], count, dtype=torch.bool, device=query.device).tril()
        causal = False
    if mask is not None:
        mask = mask.expand(*mask.shape[:-1], count)
        visible = mask.new_full((*mask.shape[:-1], length), 1 if mask.dtype == torch.bool else 0)
        mask = torch.cat([visible, mask], dim=-1)
    return call._replace(
        key=torch.cat([_like(keys, key), key], dim=-2),
        value=torch.cat([_like(values, value), value], dim=-2),
        attn_mask=mask,
        is_causal=causal,
    )


def _like(added: Tensor, existing: Tensor) -> Tensor:
    """`added` in the type of `existing`, with a row for each of its rows (windows of an example share one)."""
    added = added.to(existing.dtype)
    if 1 < len(added) < len(existing):
        return added.repeat_interleave(len(existing) // len(added), dim=0)
    return added.expand(existing.shape[0], -1, -1, -1)


@torch.no_grad()
def _weights(call: _Call, length: int) -> Tensor:
    """Attention weights `(B, H, N, length)` of the first `length` keys; the softmax is over all keys."""
    wide = torch.promote_types(call.query.dtype, torch.float32)
    with exactly(call.query.device):
        query, key = call.query.to(wide), call.key.to(wide)
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        logits = query @ key.mT * (query.shape[-1] ** -0.5 if call.scale is None else call.scale)
        mask = call.attn_mask
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        return (logits[..., :length] - logits.logsumexp(-1, keepdim=True)).exp()

"""Trained keys and values in an attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from perpetune.errors import UsageError
from perpetune.numerics.projection import Operand
from perpetune.pets.attention import extended
from perpetune.pets.base import PET, Conditions, Place, Site
from perpetune.pets.choice import Choice


class Prefix(PET):
    """Further keys and values in a frozen attention; Li & Liang 2021, arXiv:2101.00190.

    `y = softmax(q [K; k]ᵀ / √dh) [V; v]`. `K` and `V` are `(length, d)`, head by head, and stand behind the
    projections: PEGP eq. 3 and 4, arXiv:2405.13383.

    Args:
        length: keys and values in each attention.
        std: of the values they start with.

    Raises:
        UsageError: an option out of range, or a place that is no attention whose heads are known.
    """

    default_at: ClassVar[tuple[str, ...]] = ("attn",)
    adds_tokens: ClassVar[bool] = True

    def __init__(self, place: Place, generator: torch.Generator, *, length: int = 10, std: float = 0.02):
        super().__init__()
        check_options("prefix", length, std)
        check_attention("prefix", place)
        self.heads = place.heads
        self.keys = nn.Parameter(torch.randn(length, place.d_in, generator=generator) * std)
        self.values = nn.Parameter(torch.randn(length, place.d_in, generator=generator) * std)

    def forward(self, base: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.seen("keys.inputs", x)
        watch = None if self.watch is None else self._attended
        return extended(base, self._by_head(self.keys), self._by_head(self.values), x, *args, watch=watch, **kwargs)

    def _by_head(self, rows: Tensor) -> Tensor:
        """`(1, H, L, dh)` of `(L, d)`; of `(B, L, d)`, those of each example, `(B, H, L, dh)`."""
        return rows.view(-1, rows.shape[-2], self.heads, rows.shape[-1] // self.heads).transpose(1, 2)

    def blend(self, members: Sequence[PET], choice: Choice) -> dict[str, Tensor]:
        found = [pet for pet in members if isinstance(pet, Prefix)]
        return {
            "keys": choice.tokens([pet.keys for pet in found]),
            "values": choice.tokens([pet.values for pet in found]),
        }

    def part_seen(self, site: str, rows: Tensor, position: int, choice: Choice) -> Tensor:
        return tokens_seen(site, rows, position, choice)

    def _attended(self, queries: Tensor, weights: Tensor) -> None:
        self.seen("keys", queries)
        self.seen("values", weights)

    def sites(self, conditions: Conditions = "exact") -> list[Site]:
        """Exact: `q ΔKᵀ = 0` in each head, so the attention weights `a` stay, and `a ΔV = 0`.

        Paper: `x ΔKᵀ = 0`, PEGP eq. 12, which has the inputs in the place of the queries and leaves the values free.
        """
        if conditions == "paper":
            return [Site("keys.inputs", Operand(self.keys))]
        length, heads = len(self.keys), self.heads
        return [
            Site("keys", Operand(self.keys, heads=heads), groups=heads),
            Site("values", Operand(self.values, axis=0, heads=heads), groups=heads, width=length),
        ]

    def free(self, conditions: Conditions = "exact") -> list[nn.Parameter]:
        return [self.values] if conditions == "paper" else []

    def extra_repr(self) -> str:
        length, d = self.keys.shape
        return f"length={length}, d={d}, heads={self.heads}"


def tokens_seen(site: str, rows: Tensor, position: int, choice: Choice) -> Tensor:
    """Of rows at a site of blended tokens those of one member: of attention weights, the columns of its own tokens."""
    if site == "values" and choice.join == "beside":
        return rows.chunk(choice.each, dim=-1)[position]
    return rows


def check_options(pet: str, length: int, std: float) -> None:
    """UsageError for an option of prefix or prompt that is out of range."""
    if length < 1:
        raise UsageError(f"{pet}: length is {length}; at least 1 is expected")
    if not 0 < std < float("inf"):
        raise UsageError(f"{pet}: std is {std}; a number above 0 is expected")


def check_attention(pet: str, place: Place) -> None:
    """UsageError for a place that is no attention whose heads are known."""
    if place.roles != ("attn",):
        raise UsageError(f"{pet}: {place.path} ({', '.join(place.roles)}) is no attention; use the role attn")
    if place.heads < 1 or place.d_in % place.heads:
        raise UsageError(
            f"{pet}: {place.path} ({type(place.module).__name__}) has width {place.d_in} and {place.heads} heads, as "
            "far as is known; an attention whose heads divide its width is expected"
        )

"""The pet `prefix`: trained keys and values in an attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from perpetune.errors import UsageError
from perpetune.numerics.projection import Operand, Site
from perpetune.pets.attention import extended
from perpetune.pets.base import PET, Conditions, Place
from perpetune.pets.choice import Choice


class Prefix(PET):
    """Trained keys and values before those of a frozen attention; Li & Liang 2021, arXiv:2101.00190.

    `y = softmax(q [K; k]ᵀ / √dh) [V; v]`. `K` and `V` are `(length, d)`, head by head. The frozen projections do not
    act on them: PEGP eq. 3 and 4, arXiv:2405.13383.

    Args:
        length: the number of trained keys, and of trained values, in each attention.
        std: the standard deviation of the initial values.

    Raises:
        UsageError: an option is out of range, or the place is not an attention with a known number of heads.
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
        """`(L, d)` in the shape `(1, H, L, dh)`, or `(B, L, d)` in the shape `(B, H, L, dh)`."""
        return rows.view(-1, rows.shape[-2], self.heads, rows.shape[-1] // self.heads).transpose(1, 2)

    def blend(self, members: Sequence[PET], choice: Choice) -> dict[str, Tensor]:
        pets = [pet for pet in members if isinstance(pet, Prefix)]
        return {
            "keys": choice.tokens([pet.keys for pet in pets]),
            "values": choice.tokens([pet.values for pet in pets]),
        }

    def part_seen(self, site: str, rows: Tensor, position: int, choice: Choice) -> Tensor:
        return tokens_seen(site, rows, position, choice)

    def _attended(self, queries: Tensor, weights: Tensor) -> None:
        self.seen("keys", queries)
        self.seen("values", weights)

    def sites(self, conditions: Conditions = "exact") -> list[Site]:
        """The conditions on a step `ΔK`, `ΔV`.

        `exact`: `q ΔKᵀ = 0` in each head keeps the attention weights `a`, and `a ΔV = 0` keeps the sum of values.

        `paper`: `x ΔKᵀ = 0`, PEGP eq. 12. It uses the inputs instead of the queries and leaves the values free.
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
    """The rows that one member sees at a site where several members' tokens are joined.

    At the site `values` the rows are attention weights, so the member sees the columns of its own tokens.
    """
    if site == "values" and choice.join == "beside":
        return rows.chunk(choice.each, dim=-1)[position]
    return rows


def check_options(pet: str, length: int, std: float) -> None:
    """Raise UsageError if an option of prefix or prompt is out of range."""
    if length < 1:
        raise UsageError(f"{pet}: length is {length}; at least 1 is expected")
    if not 0 < std < float("inf"):
        raise UsageError(f"{pet}: std is {std}; a number above 0 is expected")


def check_attention(pet: str, place: Place) -> None:
    """Raise UsageError if the place is not an attention with a known number of heads."""
    if place.roles != ("attn",):
        raise UsageError(f"{pet}: {place.path} ({', '.join(place.roles)}) is not an attention; use the role attn")
    if place.heads < 1 or place.d_in % place.heads:
        raise UsageError(
            f"{pet}: {place.path} ({type(place.module).__name__}) has width {place.d_in} and {place.heads} heads (0 "
            "means unknown); an attention whose heads divide its width is expected"
        )

"""Trained tokens beside those of the picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from perpetune.errors import UsageError
from perpetune.numerics.projection import Operand
from perpetune.pets.attention import extended, projected, unmasked
from perpetune.pets.base import PET, Conditions, Place, Site
from perpetune.pets.choice import Choice
from perpetune.pets.prefix import check_attention, check_options, tokens_seen


class Prompt(PET):
    """Further tokens `P (length, d)` that a frozen transformer attends to; Jia et al. 2022, arXiv:2203.12119.

    Deep (VPT-deep, and PEGP's prompt, arXiv:2405.13383): each attention has tokens of its own, behind the block's
    norm. They are keys and values of the pictures' tokens by the frozen projections; what the attention would give
    for themselves goes nowhere, so it is not computed. Shallow (VPT-shallow): tokens are put behind those that enter
    block 0, go through all blocks and are taken off after the last; only the pet of block 0 has parameters.

    Args:
        length: tokens, in each attention where deep.
        deep: deep goes to the role `attn`, shallow to `block`.
        std: of the values they start with.

    Raises:
        UsageError: an option out of range, or a place of another role.
    """

    default_at: ClassVar[tuple[str, ...]] = ("attn",)
    adds_tokens: ClassVar[bool] = True
    tokens: nn.Parameter | None

    def __init__(
        self, place: Place, generator: torch.Generator, *, length: int = 10, deep: bool = True, std: float = 0.02
    ):
        super().__init__()
        check_options("prompt", length, std)
        if deep:
            check_attention("prompt", place)
        elif place.roles != ("block",):
            where = f"{place.path} ({', '.join(place.roles)})"
            raise UsageError(f"prompt: {where} is no block, where tokens that are not deep go: set at: block")
        self.place, self.length, self.deep = place, length, deep
        self._carried = length  # tokens that go through the blocks, where they are not deep
        own = deep or place.block == 0
        self.tokens = nn.Parameter(torch.randn(length, place.d_in, generator=generator) * std) if own else None

    def joined(self, pets: Sequence[PET]) -> None:
        last = self.place.depth - 1
        blocks = {pet.place.block for pet in pets if isinstance(pet, Prompt)}
        if not self.deep and not blocks.issuperset({0, last}):
            raise UsageError(
                f"prompt: tokens that are not deep enter at block 0 and leave after block {last}, and the pets are at "
                f"blocks {', '.join(map(str, sorted(blocks)))}; leave `blocks` out"
            )

    def forward(self, base: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.deep:
            return self._attend(base, x, *args, **kwargs)
        if self.tokens is None:
            y = base(x, *args, **kwargs)
        else:
            if any(isinstance(given, Tensor | tuple | list) for given in (*args, *kwargs.values())):
                raise UsageError(
                    f"prompt: {type(base).__name__} is given positions or a mask with its tokens, in which carried "
                    "tokens have no place; use deep: true"
                )
            y = unmasked(base, torch.cat([x, self._seen_tokens(x).expand(len(x), -1, -1)], dim=1), *args, **kwargs)
        return y[:, : -self._carried] if self.place.block == self.place.depth - 1 else y

    def mixed(self, members: Sequence[PET], choice: Choice, base: Any, *args: Any, **kwargs: Any) -> Any:
        """As of any pet; after the last block all the tokens that came in at block 0 are taken off."""
        before = self._carried
        self._carried = self.length * (choice.each if choice.join == "beside" else 1)
        try:
            return super().mixed(members, choice, base, *args, **kwargs)
        finally:
            self._carried = before

    def blend(self, members: Sequence[PET], choice: Choice) -> dict[str, Tensor]:
        found = [pet.tokens for pet in members if isinstance(pet, Prompt) and pet.tokens is not None]
        return {"tokens": choice.tokens(found)} if found else {}

    def part_seen(self, site: str, rows: Tensor, position: int, choice: Choice) -> Tensor:
        return tokens_seen(site, rows, position, choice)

    def _attend(self, base: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        tokens = self._seen_tokens(x)
        keys, values = projected(base, tokens if tokens.dim() == 3 else tokens[None])
        watch = None if self.watch is None else self._attended
        return extended(base, keys, values, x, *args, watch=watch, **kwargs)

    def _seen_tokens(self, x: Tensor) -> Tensor:
        """The tokens `(L, d)`, or those of each example `(B, L, d)`, as what goes along with `x (B, N, d)`."""
        assert self.tokens is not None
        if self.watch is not None:
            self.seen("keys.inputs", x)
            self.seen("keys.inputs", self.tokens.expand(len(x), -1, -1))  # [p; x] of each picture
        return self.tokens.to(x.dtype)

    def _attended(self, queries: Tensor, weights: Tensor) -> None:
        self.seen("keys", queries)
        self.seen("values", weights)

    def sites(self, conditions: Conditions = "exact") -> list[Site]:
        """Exact: `q W_k ΔPᵀ = 0` in each head, so the attention weights `a` stay, and `a ΔP = 0`, for the values.

        Paper: `x ΔPᵀ = 0` and `p ΔPᵀ = 0` of the tokens that go in, PEGP eq. 10, which leaves out the projections and
        the values: old outputs move.
        """
        if conditions == "exact" and not self.deep:
            raise UsageError(
                "prompt: tokens carried through the net have no exact linear condition; "
                "use deep: true, or conditions: paper"
            )
        if self.tokens is None:
            return []
        if conditions == "paper":
            return [Site("keys.inputs", Operand(self.tokens))]
        heads = self.place.heads
        return [
            Site("keys", Operand(self.tokens), groups=heads, width=self.place.d_in // heads, lift=self._through_keys),
            Site("values", Operand(self.tokens, axis=0), width=self.length),
        ]

    def _through_keys(self, moments: Tensor) -> Tensor:
        """`Σ_h W_hᵀ C_h W_h (1, d, d)`, of what meets a token, from the queries' moments `C (H, dh, dh)`."""
        weight = self._key_weight().to(moments)
        weight = weight.repeat_interleave(len(moments) // len(weight), dim=0)
        return (weight.mT @ moments @ weight).sum(0, keepdim=True)

    @torch.no_grad()
    def _key_weight(self) -> Tensor:
        """`W_k (H_kv, dh, d)` of the frozen attention, read off the keys that it makes of unit vectors."""
        assert self.tokens is not None
        unit = torch.eye(self.place.d_in, dtype=self.tokens.dtype, device=self.tokens.device)
        with torch.autocast(unit.device.type, enabled=False):
            made = projected(self.place.module, torch.cat([torch.zeros_like(unit[:1]), unit, 2 * unit])[None])
        for what, rows in zip(("keys", "values"), made, strict=True):
            once, twice = (rows[0, :, 1:] - rows[0, :, :1]).chunk(2, dim=1)  # (H_kv, d, dh)
            if (twice - 2 * once).abs().max() > 0.01 * once.abs().max():
                raise UsageError(
                    f"prompt: the {what} of {self.place.path} ({type(self.place.module).__name__}) are not linear in "
                    "its tokens (they are normed), so there is no exact condition; use prefix, or conditions: paper"
                )
        keys = made[0][0]
        return (keys[:, 1 : len(unit) + 1] - keys[:, :1]).mT

    def extra_repr(self) -> str:
        return f"length={self.length}, d={self.place.d_in}, deep={self.deep}"

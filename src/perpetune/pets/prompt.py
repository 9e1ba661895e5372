"""The pet `prompt`: trained tokens beside the tokens of the input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from perpetune.errors import UsageError
from perpetune.numerics.exact import exactly
from perpetune.numerics.projection import Operand, Site
from perpetune.pets.attention import extended, projected, unmasked
from perpetune.pets.base import PET, Conditions, Place
from perpetune.pets.choice import Choice
from perpetune.pets.prefix import check_attention, check_options, tokens_seen


class Prompt(PET):
    """Trained tokens `P (length, d)` that a frozen transformer attends to; Jia et al. 2022, arXiv:2203.12119.

    Deep (VPT-deep, and PEGP's prompt, arXiv:2405.13383): each attention has its own trained tokens, placed after the
    block's norm. The frozen projections turn them into more keys and values, which the tokens of the input attend to.
    The outputs of the trained tokens themselves are never used, so they are not computed.

    Shallow (VPT-shallow): the trained tokens are appended to the tokens that enter block 0. They go through all blocks
    and are removed after the last one. Only the pet of block 0 has parameters.

    Args:
        length: the number of trained tokens; with `deep`, in each attention.
        deep: a deep prompt needs the role `attn`, a shallow one the role `block`.
        std: the standard deviation of the initial values.
        through: `norm_pre` sends the tokens of a shallow prompt through the norm before the first block, as if they
            stood beside the embedded patches (CLIP; so do S-Prompts and PGP). None puts them behind this norm.
        readout: for a shallow prompt. `class` leaves the net's class token as it is. `prompts` replaces it after the
            last block by the mean of the outputs of the trained tokens, as in L2P (Wang et al. 2022, arXiv:2112.08654).
            The net's last norm acts on this mean; L2P takes the mean of normed outputs.

    Raises:
        UsageError: an option is out of range, or the place has another role.
    """

    default_at: ClassVar[tuple[str, ...]] = ("attn",)
    adds_tokens: ClassVar[bool] = True
    tokens: nn.Parameter | None

    def __init__(
        self,
        place: Place,
        generator: torch.Generator,
        *,
        length: int = 10,
        deep: bool = True,
        std: float = 0.02,
        through: Literal["norm_pre"] | None = None,
        readout: Literal["class", "prompts"] = "class",
    ):
        super().__init__()
        check_options("prompt", length, std)
        if deep:
            check_attention("prompt", place)
        elif place.roles != ("block",):
            where = f"{place.path} ({', '.join(place.roles)})"
            raise UsageError(
                f"prompt: {where} is not a block, and a prompt with deep: false needs blocks: set at: block"
            )
        if deep and readout == "prompts":
            raise UsageError("prompt: readout: prompts needs deep: false, because deep tokens have no outputs")
        if through is not None and (deep or (place.block == 0 and place.before is None)):
            raise UsageError(
                "prompt: through: norm_pre is for deep: false in a net with a norm before its first block, as CLIP's "
                "picture tower has it; leave through out"
            )
        self.place, self.length, self.deep, self.through = place, length, deep, through
        self.replaces_class_token = readout == "prompts"
        self._carried = length  # trained tokens that go through the blocks, if the prompt is shallow
        own = deep or place.block == 0
        self.tokens = nn.Parameter(torch.randn(length, place.d_in, generator=generator) * std) if own else None

    def joined(self, pets: Sequence[PET]) -> None:
        last = self.place.depth - 1
        blocks = {pet.place.block for pet in pets if isinstance(pet, Prompt)}
        if not self.deep and not blocks.issuperset({0, last}):
            raise UsageError(
                f"prompt: with deep: false the tokens enter at block 0 and leave after block {last}, but the pets are "
                f"at blocks {', '.join(map(str, sorted(blocks)))}; leave `blocks` out"
            )

    def forward(self, base: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.deep:
            return self._attend(base, x, *args, **kwargs)
        if self.tokens is None:
            y = base(x, *args, **kwargs)
        else:
            if any(isinstance(given, Tensor | tuple | list) for given in (*args, *kwargs.values())):
                raise UsageError(
                    f"prompt: {type(base).__name__} gets positions or a mask with its tokens, and these have no "
                    "entries "
                    "for the tokens that the prompt adds; use deep: true"
                )
            own = self._seen_tokens(x)
            if self.through is not None and self.place.before is not None:
                own = self.place.before(own)
            y = unmasked(base, torch.cat([x, own.expand(x.shape[0], -1, -1)], dim=1), *args, **kwargs)
        if self.place.block < self.place.depth - 1:
            return y
        tokens, added = y[:, : -self._carried], y[:, -self._carried :]
        if not self.replaces_class_token:
            return tokens
        return torch.cat([added.mean(1, keepdim=True), tokens[:, 1:]], dim=1)

    def mixed(self, members: Sequence[PET], choice: Choice, base: Any, *args: Any, **kwargs: Any) -> Any:
        """As in `PET.mixed`. Also sets how many tokens to remove after the last block: all that entered at block 0."""
        before = self._carried
        self._carried = self.length * (choice.each if choice.join == "beside" else 1)
        try:
            return super().mixed(members, choice, base, *args, **kwargs)
        finally:
            self._carried = before

    def blend(self, members: Sequence[PET], choice: Choice) -> dict[str, Tensor]:
        tokens = [pet.tokens for pet in members if isinstance(pet, Prompt) and pet.tokens is not None]
        return {"tokens": choice.tokens(tokens)} if tokens else {}

    def part_seen(self, site: str, rows: Tensor, position: int, choice: Choice) -> Tensor:
        return tokens_seen(site, rows, position, choice)

    def _attend(self, base: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        tokens = self._seen_tokens(x)
        keys, values = projected(base, tokens if tokens.dim() == 3 else tokens[None])
        watch = None if self.watch is None else self._attended
        return extended(base, keys, values, x, *args, watch=watch, **kwargs)

    def _seen_tokens(self, x: Tensor) -> Tensor:
        """The trained tokens in the type of `x (B, N, d)`: `(L, d)`, or `(B, L, d)` if each example has its own."""
        assert self.tokens is not None
        if self.watch is not None:
            self.seen("keys.inputs", x)
            self.seen("keys.inputs", self.tokens.expand(len(x), -1, -1))  # [p; x] of each picture
        return self.tokens.to(x.dtype)

    def _attended(self, queries: Tensor, weights: Tensor) -> None:
        self.seen("keys", queries)
        self.seen("values", weights)

    def sites(self, conditions: Conditions = "exact") -> list[Site]:
        """The conditions on a step `ΔP`.

        `exact`: `q W_k ΔPᵀ = 0` in each head keeps the attention weights `a`, and `a ΔP = 0` keeps the sum of values.

        `paper`: `x ΔPᵀ = 0` and `p ΔPᵀ = 0` for the tokens that go in, PEGP eq. 10. It ignores the projections and the
        values, so old outputs move.
        """
        if conditions == "exact" and not self.deep:
            raise UsageError(
                "prompt: with deep: false there is no linear condition that keeps old outputs exactly; "
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
        """Moments `Σ_h W_hᵀ C_h W_h (1, d, d)` of the rows that meet a token, from the queries' moments
        `C (H, dh, dh)`."""
        weight = self._key_weight().to(moments)
        weight = weight.repeat_interleave(len(moments) // len(weight), dim=0)
        return (weight.mT @ moments @ weight).sum(0, keepdim=True)

    @torch.no_grad()
    def _key_weight(self) -> Tensor:
        """`W_k (H_kv, dh, d)` of the frozen attention, computed from the keys that it makes of unit vectors.

        Raises:
            UsageError: the keys or values are not linear in the tokens.
        """
        assert self.tokens is not None
        unit = torch.eye(self.place.d_in, dtype=self.tokens.dtype, device=self.tokens.device)
        with exactly(unit.device):
            made = projected(self.place.module, torch.cat([torch.zeros_like(unit[:1]), unit, 2 * unit])[None])
        for what, rows in zip(("keys", "values"), made, strict=True):
            once, twice = (rows[0, :, 1:] - rows[0, :, :1]).chunk(2, dim=1)  # (H_kv, d, dh)
            if (twice - 2 * once).abs().max() > 0.01 * once.abs().max():
                raise UsageError(
                    f"prompt: the {what} of {self.place.path} ({type(self.place.module).__name__}) are not linear in "
                    "its tokens (the attention norms them), so no exact condition exists; use prefix, or conditions: "
                    "paper"
                )
        keys = made[0][0]
        return (keys[:, 1 : len(unit) + 1] - keys[:, :1]).mT

    def extra_repr(self) -> str:
        return f"length={self.length}, d={self.place.d_in}, deep={self.deep}"

"""What a head reads: the tokens behind the last blocks of a transformer, in the one forward pass.

One block's class token is a small part of what a pretrained net knows. Reading the class token and the mean of the
patches behind several blocks is LayUP's idea: Ahrens et al. 2023, arXiv:2312.08888.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from perpetune.errors import UsageError
from perpetune.pets.base import outermost

if TYPE_CHECKING:
    from perpetune.models.backbone import Backbone

SOME, WIDE = 7, 6144  # what `auto` reads at most: blocks, and the width of the features

Count = Annotated[int, Field(ge=1)] | Literal["auto"]
"""Blocks that are read; `auto` is the last seven, or fewer where the features would be wider than 6144: sums over them
grow with the square of that."""
Read = Literal["class", "mean", "both"]
"""Which tokens are read behind a block: the class token, the mean of the patches, or both. A text has no class token:
its last token, which alone has seen all others, stands in its place."""


class Taps:
    """The places behind the last blocks of a net, and how their tokens become features.

    Of block `l` with tokens `x_l (B, N, D)` are read `n(x_l)` at the class token and the mean of `n(x_l)` over patches,
    those of all blocks joined, the earliest first. `n` is a layer norm without scale and shift, so that no block is
    louder than another; behind the last block it is the net's own norm, where that acts on tokens.

    Tokens that a pet carries behind the others are not read.

    Args:
        backbone: a transformer of a family whose blocks are known.
        count: blocks, from the last one backwards; see `Count`.
        read: tokens of each block; of a net without a class token `both` is the mean alone.

    Raises:
        UsageError: a net of unknown family, fewer blocks than asked for, or no class token where it was asked for.
    """

    def __init__(self, backbone: Backbone, count: Count, read: Read):
        spec = backbone.spec
        if read not in get_args(Read):
            raise UsageError(f"{spec}: tokens is {read!r}; one of {', '.join(get_args(Read))} is expected")
        try:
            tower = backbone.tower
        except UsageError as error:
            raise UsageError(
                f"{spec}: taps are read behind the blocks of a transformer: leave taps out; {error}"
            ) from error
        self.sequence, depth = tower.sequence, len(tower.blocks)
        if count != "auto" and not 1 <= count <= depth:
            raise UsageError(
                f"{spec}: taps is {count}, and the net has {depth} blocks: 1 to {depth}, or auto, is expected"
            )
        if read == "class" and not backbone.class_token:
            raise UsageError(f"{spec}: the net has no class token: set tokens to mean, or leave it out")
        self.prefix = backbone.prefix
        self.kinds = [kind for kind in ("class", "mean") if read in (kind, "both")]
        """What is read behind each block."""
        if not backbone.class_token:
            self.kinds = ["mean"]
        most = max(1, WIDE // (backbone.width * len(self.kinds)))
        self.count = min(SOME, depth, most) if count == "auto" else count
        self.norm = tower.norm
        """The path of the net's last norm; None where it has none."""

    @contextlib.contextmanager
    def listening(self, net: nn.Module) -> Iterator[list[Tensor]]:
        """Inside, the tokens behind the blocks, and the last as its norm leaves them, are caught as `net` computes."""
        caught: dict[int, Tensor] = {}
        blocks = list(net.get_submodule(self.sequence).children())[-self.count :]
        norm = None if self.norm is None else outermost(net, self.norm)
        states: list[Tensor] = []

        def keep(number: int, output: Any) -> None:
            caught[number] = output[0] if isinstance(output, tuple | list) else output

        hooks = [
            block.register_forward_hook(lambda _m, _a, output, number=number: keep(number, output))
            for number, block in enumerate(blocks)
        ]
        if norm is not None:
            hooks.append(norm.register_forward_hook(lambda _m, _a, output: keep(self.count, output)))
        try:
            yield states
        finally:
            for hook in hooks:
                hook.remove()
        last = caught[self.count - 1]
        own = caught.get(self.count)
        states += [_normed(caught[number][:, : last.shape[1]]) for number in range(self.count - 1)]
        states.append(own if own is not None and own.shape == last.shape else _normed(last))

    def features(self, states: list[Tensor], mask: Tensor | None = None) -> Tensor:
        """`(B, count · len(kinds) · D)` of normed tokens `(B, N, D)` of each block.

        Args:
            mask: `(B, N)` of texts: tokens that count, the last of which is read as the class token.
        """
        read: list[Tensor] = []
        for tokens in states:
            if "class" in self.kinds:
                read.append(tokens[:, 0] if mask is None else last_token(tokens, mask))
            if "mean" in self.kinds:
                read.append(tokens[:, self.prefix :].mean(1) if mask is None else mean_token(tokens, mask))
        return torch.cat(read, dim=1)


def _normed(tokens: Tensor) -> Tensor:
    """Layer norm without scale and shift, in float32: what is near zero in one block is not in another."""
    return F.layer_norm(tokens.float(), tokens.shape[-1:])


def last_token(tokens: Tensor, mask: Tensor) -> Tensor:
    """`(B, D)`: of tokens `(B, N, D)` the last for which `mask (B, N)` is true."""
    places = torch.arange(mask.shape[1], device=mask.device).expand_as(mask).masked_fill(~mask, -1).amax(1)
    return tokens[torch.arange(len(tokens), device=mask.device), places]


def mean_token(tokens: Tensor, mask: Tensor) -> Tensor:
    """`(B, D)`: the mean of tokens `(B, N, D)` for which `mask (B, N)` is true."""
    there = mask.unsqueeze(-1)
    return tokens.float().masked_fill(~there, 0).sum(1) / there.sum(1)

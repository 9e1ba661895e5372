"""Taps: features from the tokens after the last blocks of a transformer, all read in one forward pass.

The class token of one block holds a small part of what a pretrained net knows. LayUP reads the class token and the mean
of the patches after several blocks: Ahrens et al. 2023, arXiv:2312.08888.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from perpetune.errors import UsageError
from perpetune.pets.base import outermost

if TYPE_CHECKING:
    from perpetune.models.backbone import Backbone

SOME, WIDE = 7, 6144  # limits of `auto`: the most blocks, and the most columns of the features

Count = Annotated[int, Field(ge=1)] | Literal["auto"]
"""The number of blocks that are read. `auto` reads the last seven, or fewer so that the features have at most 6144
columns: the size of a head's sums grows with the square of that number."""
Read = Literal["class", "mean", "both"]
"""The tokens that are read after a block: the class token, the mean of the patches, or both. A text has no class token.
Its last token is read instead, because it is the only one that has seen all others."""


class Taps:
    """Reads the tokens after the last blocks of a net and turns them into features.

    After block `l` with tokens `x_l (B, N, D)`, two features are read: `n(x_l)` at the class token, and the mean of
    `n(x_l)` over the patches. The features of all blocks are joined, the earliest block first. `n` is a layer norm
    without scale and shift, so that all blocks have the same size. After the last block `n` is the net's own norm, if
    that norm acts on tokens.

    Tokens that a shallow prompt adds are not read.

    Args:
        backbone: a transformer of a family whose blocks are known.
        count: the number of blocks, counted from the last one backwards; see `Count`.
        read: the tokens of each block. If the net has no class token, `both` is the mean alone.

    Raises:
        UsageError: the net belongs to no known family, has fewer blocks than `count`, or has no class token to read.
    """

    def __init__(self, backbone: Backbone, count: Count, read: Read):
        spec = backbone.spec
        if read not in get_args(Read):
            raise UsageError(f"{spec}: tokens is {read!r}; one of {', '.join(get_args(Read))} is expected")
        try:
            tower = backbone.tower
        except UsageError as error:
            raise UsageError(
                f"{spec}: taps read the tokens after the blocks of a transformer: leave taps out; {error}"
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
        """The features that are read after each block."""
        if not backbone.class_token:
            self.kinds = ["mean"]
        most = max(1, WIDE // (backbone.width * len(self.kinds)))
        self.count = min(SOME, depth, most) if count == "auto" else count
        self.norm = tower.norm
        """The path of the net's last norm; None if it has none."""
        self.normed_by_net = False
        """Whether that norm acted on the tokens of the last pass."""

    @contextlib.contextmanager
    def listening(self, net: nn.Module) -> Iterator[list[Tensor]]:
        """Inside this context, hooks catch the tokens after the blocks and after the last norm while `net` computes.

        The list is filled when the context ends: normed tokens `(B, N, D)` of each block.
        """
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
        normed = caught.get(self.count)
        states += [_normed(caught[number][:, : last.shape[1]]) for number in range(self.count - 1)]
        self.normed_by_net = normed is not None and normed.shape == last.shape
        states.append(normed if normed is not None and self.normed_by_net else _normed(last))

    def modules(self, net: nn.Module) -> dict[str, bool]:
        """The paths of the modules whose outputs were read in the last pass, and whether `n` is to act on each."""
        blocks = [f"{self.sequence}.{name}" for name, _ in net.get_submodule(self.sequence).named_children()]
        paths = dict.fromkeys(blocks[-self.count :], True)
        if self.norm is not None and self.normed_by_net:
            del paths[blocks[-1]]
            paths[self.norm] = False
        return paths

    def features(self, states: list[Tensor], mask: Tensor | None = None) -> Tensor:
        """Features `(B, count · len(kinds) · D)` from the normed tokens `(B, N, D)` of each block.

        Args:
            states: the tokens of each block, as `listening` gives them.
            mask: for texts `(B, N)`, true for the tokens that count; the last of them is read as the class token.
        """
        read: list[Tensor] = []
        for tokens in states:
            if "class" in self.kinds:
                read.append(tokens[:, 0] if mask is None else last_token(tokens, mask))
            if "mean" in self.kinds:
                read.append(tokens[:, self.prefix :].mean(1) if mask is None else mean_token(tokens, mask))
        return torch.cat(read, dim=1)


class _Reached(Exception):
    """The net has computed the blocks that are needed. It carries their tokens and ends the forward pass."""

    def __init__(self, tokens: Tensor):
        super().__init__("the tokens behind a block")
        self.tokens = tokens


def until_block(backbone: Backbone, count: int, compute: Callable[[], object], mask: Tensor | None = None) -> Tensor:
    """Features `(B, D)` behind the first `count` blocks of a net, while `compute` runs it; later blocks do not run.

    Args:
        mask: for texts `(B, N)`, true for the tokens that are read.

    Raises:
        UsageError: the blocks of the net are not known, or it has fewer.
    """
    tower = backbone.tower
    if not 1 <= count <= len(tower.blocks):
        raise UsageError(
            f"{backbone.spec}: query.after is {count}, and the net has {len(tower.blocks)} blocks: 1 to "
            f"{len(tower.blocks)} is expected"
        )
    block = list(backbone.net.get_submodule(tower.sequence).children())[count - 1]

    def stop(_module: nn.Module, _arguments: Any, output: Any) -> None:
        raise _Reached(output[0] if isinstance(output, tuple | list) else output)

    hook = block.register_forward_hook(stop)
    try:
        compute()
    except _Reached as reached:
        tokens = _normed(reached.tokens)
    finally:
        hook.remove()
    if mask is not None:
        return mean_token(tokens, mask)
    return tokens[:, 0] if backbone.class_token else tokens[:, backbone.prefix :].mean(1)


def _normed(tokens: Tensor) -> Tensor:
    """Layer norm without scale and shift, in float32. It gives the tokens of all blocks the same size."""
    return F.layer_norm(tokens.float(), tokens.shape[-1:])


def last_token(tokens: Tensor, mask: Tensor) -> Tensor:
    """`(B, D)`: from tokens `(B, N, D)` the last one for which `mask (B, N)` is true."""
    places = torch.arange(mask.shape[1], device=mask.device).expand_as(mask).masked_fill(~mask, -1).amax(1)
    return tokens[torch.arange(len(tokens), device=mask.device), places]


def mean_token(tokens: Tensor, mask: Tensor) -> Tensor:
    """`(B, D)`: the mean of the tokens `(B, N, D)` for which `mask (B, N)` is true."""
    counted = mask.unsqueeze(-1)
    return tokens.float().masked_fill(~counted, 0).sum(1) / counted.sum(1)

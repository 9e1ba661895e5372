"""The pet `adapter`: a small two-layer network beside an attention or an MLP, or behind a tower of a dual encoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perpetune.errors import UsageError
from perpetune.numerics.projection import Operand, Site
from perpetune.pets.base import PET, Conditions, Place
from perpetune.pets.choice import Choice


class Adapter(PET):
    """A bottleneck beside a frozen attention or MLP; AdaptFormer, Chen et al. 2022, arXiv:2205.13535.

    `y = base(x) + s (W_u φ(W_d x + b_d) + b_u)`, PEGP eq. 5, arXiv:2405.13383. `W_d` is `(width, d)` and `W_u`
    `(d, width)`; `W_u` and both biases start at zero. If the base returns a tuple, the adapter changes its first
    element only.

    At the feature of a dual encoder (`picture.feature`, `text.feature`) it changes this feature before it is
    normalised. With `activation: none`, `bias: false` and `scale: 1` this is the linear adapter of PEGP on CLIP.

    Args:
        width: the number of hidden units.
        scale: `s`, a constant. It is not learned, because a learned scale would move old outputs even when the
            matrices are protected.
        bias: whether the biases `b_d` and `b_u` exist.
        activation: `φ`; `none` is the identity.

    Raises:
        UsageError: an option is out of range, or the place is neither an attention nor an MLP nor a feature.
    """

    compiles = True
    default_at: ClassVar[tuple[str, ...]] = ("mlp",)

    def __init__(
        self,
        place: Place,
        generator: torch.Generator,
        *,
        width: int = 64,
        scale: float = 0.1,
        bias: bool = True,
        activation: Literal["relu", "gelu", "none"] = "gelu",
    ):
        super().__init__()
        if place.roles[0] not in ("attn", "mlp", "feature"):
            raise UsageError(
                f"adapter: {place.path} ({', '.join(place.roles)}) is not a whole module; use attn or mlp, or feature "
                "in a dual encoder"
            )
        if width < 1:
            raise UsageError(f"adapter: width is {width}; at least 1 is expected")
        if not (scale > 0 and math.isfinite(scale)):
            raise UsageError(f"adapter: scale is {scale}; a number above 0 is expected")
        self.scale, self.activation = scale, activation
        self.down = nn.Parameter(torch.empty(width, place.d_in))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5), generator=generator)
        self.up = nn.Parameter(torch.zeros(place.d_out, width))
        self.down_bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.up_bias = nn.Parameter(torch.zeros(place.d_out)) if bias else None

    def forward(self, base: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        y = base(x, *args, **kwargs)
        made = _linear(x, self.down, self.down_bias)  # (..., width)
        hidden = F.gelu(made) if self.activation == "gelu" else F.relu(made) if self.activation == "relu" else made
        self.seen("down", x)
        self.seen("up", hidden)
        update = _linear(hidden, self.up, self.up_bias)
        if isinstance(y, tuple):
            return self._sum(y[0], update), *y[1:]
        return self._sum(y, update)

    def blend(self, members: Sequence[PET], choice: Choice) -> dict[str, Tensor]:
        """The members of one example act as one adapter of their joined width; the choice's weights multiply `W_u`."""
        pets = [pet for pet in members if isinstance(pet, Adapter)]
        ups = choice.weighted(choice.picked([pet.up for pet in pets]))  # (B, k, d, width)
        values = {
            "down": choice.picked([pet.down for pet in pets]).flatten(1, 2),
            "up": ups.transpose(1, 2).flatten(2, 3),
        }
        if self.down_bias is not None:
            values["down_bias"] = choice.picked([p for pet in pets if (p := pet.down_bias) is not None]).flatten(1, 2)
            values["up_bias"] = choice.summed([p for pet in pets if (p := pet.up_bias) is not None])
        return values

    def part_seen(self, site: str, rows: Tensor, position: int, choice: Choice) -> Tensor:
        return rows if site == "down" else rows.chunk(choice.each, dim=-1)[position]

    def _sum(self, y: Tensor, update: Tensor) -> Tensor:
        return torch.add(y, update.to(y.dtype), alpha=self.scale)

    def sites(self, conditions: Conditions = "exact") -> list[Site]:
        """`W_d` meets the inputs `x`, and `W_u` meets `φ(W_d x + b_d)`: PEGP eq. 13 and 14. Both are exact, and they
        include the biases."""
        return [Site("down", Operand(self.down, self.down_bias)), Site("up", Operand(self.up, self.up_bias))]

    def idle(self) -> list[str]:
        ends = (self.up, self.up_bias)
        return ["down"] if not any(end.any() for end in ends if end is not None) else []

    def extra_repr(self) -> str:
        width, d = self.down.shape
        return f"d={d}, width={width}, scale={self.scale:g}, activation={self.activation}"


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`W x + b`.

    With `W (B, o, d)` and `b (B, o)`, the rows of `x` that belong to example `i` meet `W[i]` and `b[i]`.
    """
    if weight.dim() == 2:
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.promote_types(x.dtype, weight.dtype))  # the frozen net may have half precision
        return F.linear(x, weight, bias)
    rows, across = x.reshape(len(weight), -1, x.shape[-1]), weight.mT.to(x.dtype)
    y = rows @ across if bias is None else torch.baddbmm(bias[:, None].to(x.dtype), rows, across)
    return y.view(*x.shape[:-1], weight.shape[-2])

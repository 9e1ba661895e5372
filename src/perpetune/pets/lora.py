"""Low-rank updates of linear layers."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perpetune.errors import UsageError
from perpetune.numerics.projection import Operand
from perpetune.pets.base import PET, Conditions, Place, Site, is_plain, with_values


class LoRA(PET):
    """A low-rank update beside a frozen linear layer, `y = base(x) + s B A x`; Hu et al. 2021, arXiv:2106.09685.

    `A` is `(P r, d_in)` and `B` `(d_out, P r)`. `P` is the number of parts of the layer that are tuned: 1
    for a linear of its own, 2 for q and v in a fused qkv. Each part has its own `r` rows of `A` and its
    own block of `B`; rows of the output that belong to no part stay as they are. `B` starts at zero.

    Args:
        rank: `r`, of each part.
        alpha: `s = alpha / r`.
        dropout: probability with which entries of `x` are dropped on this path in training.
        rslora: `s = alpha / sqrt(r)` instead; Kalajdzievski 2023, arXiv:2312.03732.

    Raises:
        UsageError: an option out of range, or a place that is no linear layer.
    """

    default_at: ClassVar[tuple[str, ...]] = ("q", "v")

    def __init__(
        self,
        place: Place,
        generator: torch.Generator,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        rslora: bool = False,
    ):
        super().__init__()
        if not place.parts:
            roles = ", ".join(place.roles)
            raise UsageError(f"lora: {place.path} ({roles}) is no linear layer; use roles such as q, v, proj, fc1, fc2")
        if rank < 1:
            raise UsageError(f"lora: rank is {rank}; at least 1 is expected")
        if not (alpha > 0 and math.isfinite(alpha)):
            raise UsageError(f"lora: alpha is {alpha}; a number above 0 is expected")
        if not 0 <= dropout < 1:
            raise UsageError(f"lora: dropout is {dropout}; a probability below 1 is expected")
        self.rank, self.dropout, self.d_out, self.parts = rank, dropout, place.d_out, place.parts
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        self.down = nn.Parameter(torch.empty(len(place.parts) * rank, place.d_in))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5), generator=generator)
        self.up = nn.ParameterList([torch.zeros(stop - start, rank) for start, stop in place.parts])

    def forward(self, base: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = base(x, *args, **kwargs)  # (..., d_out)
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        down = F.linear(x, self.down)  # (..., P r)
        if self.watch is not None:
            self.seen("down", x)
            for i, rows in enumerate(down.split(self.rank, dim=-1)):
                self.seen(f"up.{i}", rows)
        # One pass over the wide output: the scale and the sum are part of the product.
        flat: Tensor = torch.addmm(
            y.reshape(-1, self.d_out), down.reshape(-1, len(self.down)), self.up_matrix().t(), alpha=self.scale
        )
        return flat.view(y.shape)

    def up_matrix(self) -> Tensor:
        """`B (d_out, P r)`: each part's block on its own rows and columns, zero elsewhere."""
        if len(self.parts) == 1 and len(self.up[0]) == self.d_out:
            whole: Tensor = self.up[0]
            return whole
        rows, end = [], 0
        for i, ((start, stop), up) in enumerate(zip(self.parts, self.up, strict=True)):
            rows.append(up.new_zeros(start - end, len(self.down)))
            rows.append(F.pad(up, (i * self.rank, (len(self.parts) - 1 - i) * self.rank)))
            end = stop
        rows.append(self.down.new_zeros(self.d_out - end, len(self.down)))
        return torch.cat(rows)

    def fold(self, base: nn.Module) -> nn.Module | None:
        """A linear layer of weight `W + s B A`; dropout is for training only."""
        if not is_plain(base, nn.Linear):
            return None
        return with_values(base, base.weight + self.scale * (self.up_matrix() @ self.down), base.bias)

    def sites(self, conditions: Conditions = "exact") -> list[Site]:
        """`A` by the inputs `x`, `B` by `A x`: `(B + ΔB)(A + ΔA) x = B A x`; PEGP eq. 13, 14, which are exact here."""
        return [Site("down", Operand(self.down)), *(Site(f"up.{i}", Operand(up)) for i, up in enumerate(self.up))]

    def idle(self) -> list[str]:
        return ["down"] if not any(up.any() for up in self.up) else []

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}, parts={self.parts}, d_out={self.d_out}"

"""The selector `weights`: all members act on each example, with learned weights."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from perpetune.numerics.choosing import products
from perpetune.selectors.base import Chosen, Selector

SMALL = 1e-12  # the least length of a vector that is divided by


class Weights(Selector):
    """Weighs every member by `α_m = cos(q ⊙ a_m, κ_m)`: CODA-Prompt.

    Smith et al., CVPR 2023, arXiv:2211.13218. A weight may be negative, and no softmax compares them. Each `κ` and each
    `a` of a new member starts orthogonal to those before it, of length 1.

    Args:
        orthogonal: the factor of the loss `mean((V Vᵀ − I)²)`, summed over `V = κ` and `V = a`.
    """

    learned: ClassVar[bool] = True
    every: ClassVar[bool] = True
    kept_keys: Tensor
    kept_attention: Tensor

    def __init__(self, dim: int, *, orthogonal: Annotated[float, Field(ge=0)] = 0.0):
        super().__init__(dim)
        self.orthogonal = orthogonal
        for name in ("keys", "attention"):
            self.register_buffer(f"kept_{name}", torch.zeros(0, dim))
            self.register_parameter(f"fresh_{name}", nn.Parameter(torch.zeros(0, dim), requires_grad=False))

    @property
    def keys(self) -> Tensor:
        """All `κ (M, D)`."""
        return self._whole("keys")

    @property
    def attention(self) -> Tensor:
        """All `a (M, D)`."""
        return self._whole("attention")

    def _whole(self, name: str) -> Tensor:
        kept, fresh = self._parts(name)
        return torch.cat([kept, fresh]) if len(kept) else fresh

    def _parts(self, name: str) -> tuple[Tensor, nn.Parameter]:
        kept, fresh = self._buffers[f"kept_{name}"], self._parameters[f"fresh_{name}"]
        assert kept is not None
        assert fresh is not None
        return kept, fresh

    def _set(self, name: str, kept: Tensor, fresh: Tensor) -> None:
        _, parameter = self._parts(name)
        self._buffers[f"kept_{name}"], parameter.data, parameter.grad = kept.clone(), fresh.clone(), None

    # -- growing and training -------------------------------------------------------------------------

    @torch.no_grad()
    def grow(self, members: int, generator: torch.Generator, queries: Tensor | None = None) -> None:
        new = members - self.members
        super().grow(members, generator, queries)
        for name in ("keys", "attention") if new > 0 else ():
            kept, fresh = self._parts(name)
            rows = orthogonal_rows(self._whole(name), new, generator)
            self._set(name, kept, torch.cat([fresh.detach(), rows.to(fresh)]))

    def rest(self, members: int) -> None:
        for name in ("keys", "attention"):
            kept, fresh = self._parts(name)
            finished = members - len(kept)
            if finished > 0:
                values = fresh.detach()
                self._set(name, torch.cat([kept, values[:finished]]), values[finished:])

    def trained(self) -> list[nn.Parameter]:
        fresh = [self._parts(name)[1] for name in ("keys", "attention")]
        return fresh if len(fresh[0]) else []

    def loss(self, queries: Tensor, chosen: Chosen) -> Tensor | None:
        if not self.orthogonal:
            return None
        with torch.autocast(queries.device.type, enabled=False):
            return self.orthogonal * sum((not_orthogonal(v) for v in (self.keys, self.attention)), torch.zeros(()))

    # -- choosing -------------------------------------------------------------------------------------

    def choose(self, queries: Tensor) -> Chosen:
        self.ready(self.members)
        with torch.autocast(queries.device.type, enabled=False):
            keys, attention = self.keys, self.attention
            queries = queries.detach().to(keys)
            # Without a tensor (B, M, D): the dot products and the lengths of q ⊙ a are sums over the width.
            dots = products(queries, attention * keys)
            lengths = products(queries.square(), attention.square()).clamp(min=SMALL**2).sqrt()
            weight = dots / (lengths * torch.linalg.vector_norm(keys, dim=1).clamp(min=SMALL))
        index = torch.arange(self.members, device=queries.device).expand(len(queries), -1)
        return Chosen(index, weight)

    # -- reporting and storing ------------------------------------------------------------------------

    def earlier(self) -> list[Tensor]:
        return [self._parts(name)[0] for name in ("keys", "attention")]

    def get_extra_state(self) -> dict[str, Any]:
        return {**super().get_extra_state(), "kept": len(self.kept_keys)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        super().set_extra_state(state)
        rest = int(state["kept"])
        if not 0 <= rest <= self.members:
            raise ValueError(f"{rest} members rest, and there are {self.members}")
        for name in ("keys", "attention"):
            kept, fresh = self._parts(name)
            if (len(kept), len(fresh)) != (rest, self.members - rest):
                self._set(name, kept.new_zeros(rest, self.dim), fresh.detach().new_zeros(self.members - rest, self.dim))


def orthogonal_rows(old: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` rows of length 1, drawn at random and made orthogonal to the rows of `old (M, D)` and to each other, in
    float64 on the CPU. When no orthogonal direction is left, a row keeps the direction in which it was drawn."""
    dim = old.shape[1]
    rows: list[Tensor] = []
    u, values, _ = torch.linalg.svd(old.cpu().double().mT, full_matrices=False)
    basis = u[:, values > 1e-10 * values.amax()] if len(values) else u
    for _ in range(count):
        drawn = F.normalize(torch.randn(dim, generator=generator, dtype=torch.float64), dim=0)
        if basis.shape[1] < dim:
            for _ in range(2):  # the second time takes away what rounding has left
                drawn = F.normalize(drawn - basis @ (basis.mT @ drawn), dim=0)
            basis = torch.cat([basis, drawn[:, None]], dim=1)
        rows.append(drawn)
    return torch.stack(rows)


def not_orthogonal(rows: Tensor) -> Tensor:
    """`mean((V Vᵀ − I)²)` of rows `V (M, D)`, a scalar."""
    return (rows @ rows.mT - torch.eye(len(rows), device=rows.device, dtype=rows.dtype)).square().mean()

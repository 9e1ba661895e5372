"""Renewal: what was learned comes to rest, and a new pair starts where old features do not reach.

With `U` the protected directions of a layer's inputs and a new `A` with `A U = 0`, `A x = 0` for old `x`, so whatever
`B` becomes, `B A x` stays zero: `B` needs no protection and has its full rank for every task. (InfLoRA, Liang & Li,
CVPR 2024, keeps such an `A` fixed; here its steps are projected.)
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perpetune.errors import UsageError
from perpetune.numerics.lowrank import Factors, reduced, summed
from perpetune.numerics.subspace import Subspace
from perpetune.pets.base import is_plain

NOTHING = 1e-6  # of a matrix's norm: what is left of it in the free directions is rounding


def kaiming(rows: int, dim: int, rng: torch.Generator) -> Tensor:
    """`(rows, dim)` as LoRA's `A` is drawn, float64."""
    drawn = torch.empty(rows, dim)
    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=rng)
    return drawn.double()


def random_start(drawn: Tensor, closed: Subspace | None) -> Tensor | None:
    """`drawn (rows, dim)` in the free directions, as large as it was; None where there are none."""
    if closed is None:
        return drawn
    free = closed.remove(drawn)
    if free.norm() <= NOTHING * drawn.norm():
        return None
    start: Tensor = free * (drawn.norm() / free.norm())
    return start


def leading_start(
    drawn: Tensor, closed: Subspace | None, moments: Tensor, parts: int, rounding: float
) -> Tensor | None:
    """Along the leading directions of inputs with `moments (dim, dim)` inside the free ones; None where there are none.

    Each of the `parts` gets the same ones, as many as it has rows, all rows of one length and together as large as
    `drawn (rows, dim)`. Where the inputs have fewer free directions than that, `eigh` fills up with vectors of
    eigenvalue zero, which may lie in the closed directions: rows of `drawn` take their place.

    Args:
        rounding: eigenvalues up to this share of the moments' trace are noise.
    """
    rank, length = len(drawn) // parts, float(drawn.norm()) / math.sqrt(len(drawn))

    def free(rows: Tensor) -> Tensor:
        return rows if closed is None else closed.remove(rows)

    inside = free(free(moments.double()).mT)
    values, vectors = torch.linalg.eigh((inside + inside.mT) / 2)
    found = int((values > rounding * float(moments.trace())).sum())
    leading = free(vectors.flip(1).mT[: min(rank, found)])  # (k, dim)
    signs = leading.gather(1, leading.abs().argmax(1, keepdim=True)).sign()  # rounding decides which one eigh gives
    leading = leading * signs / leading.norm(dim=1, keepdim=True)
    start = []
    for rows in drawn.split(rank):
        rest = free(rows[len(leading) :])
        rest = free(rest - (rest @ leading.mT) @ leading)
        norms = rest.norm(dim=1, keepdim=True)
        there = norms > NOTHING * rows.norm() / math.sqrt(rank)
        start += [leading, torch.where(there, rest / norms.clamp(min=torch.finfo(rest.dtype).tiny), 0.0)]
    whole = torch.cat(start) * length
    return whole if bool(whole.any()) else None


# -- layers of PEFT -------------------------------------------------------------------------------------


class Rest(nn.Module):
    """What rests of earlier tasks at a layer of PEFT: `B' A'`, added to what the layer gives.

    It is no part of PEFT's adapter, whose rank stays what it is, and no part of the model's state: the protection
    stores it. It acts while its adapter does, and not while adapters are switched off or others are active.

    Args:
        adapter: its name.
        weight: of the adapter's `A`.
        d_out: width of what the layer gives.
    """

    up: Tensor
    down: Tensor

    def __init__(self, adapter: str, weight: Tensor, d_out: int):
        super().__init__()
        self.adapter = adapter
        self.register_buffer("up", weight.detach().new_zeros(d_out, 0))
        self.register_buffer("down", weight.detach().new_zeros(0, weight.shape[1]))
        self.merged = False
        """Whether the frozen weight holds it now."""

    def act(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """The hook on the layer's forward."""
        if self.merged or len(self.down) == 0 or getattr(layer, "disable_adapters", False):
            return output
        if self.adapter not in getattr(layer, "active_adapters", (self.adapter,)):
            return output
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        if self.down.device != x.device:
            self.to(x.device)
        inside = F.linear(x.to(self.down.dtype), self.down)
        return output + F.linear(inside, self.up).to(output.dtype)

    def fits(self, up: Tensor, down: Tensor) -> bool:
        """Whether these could be its tensors, of any one rank."""
        shaped = up.dim() == down.dim() == 2 and up.shape[1] == len(down)
        return shaped and len(up) == len(self.up) and down.shape[1] == self.down.shape[1]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("up", "down"):
            value = state_dict.get(f"{prefix}{name}")
            if isinstance(value, Tensor):
                setattr(self, name, getattr(self, name).new_zeros(value.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)


def rest_of(layer: nn.Module, adapter: str, weight: Tensor, d_out: int) -> Rest:
    """What rests at an adapter of a layer of PEFT; made and put on where there is none yet."""
    rests: dict[str, Rest] = layer.__dict__.setdefault("_perpetune_rests", {})  # no submodule: the state is PEFT's
    if adapter not in rests:
        rests[adapter] = rest = Rest(adapter, weight, d_out)
        layer.register_forward_hook(rest.act, with_kwargs=True)
        layer.__dict__["merge"] = partial(_merge, layer)
    return rests[adapter]


def _merge(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """Stands for PEFT's `merge`, which would leave out what rests, and lose it where the layer is unloaded."""
    if any(len(rest.down) and not rest.merged for rest in layer._perpetune_rests.values()):
        raise UsageError(
            "protect: products of earlier tasks rest beside PEFT's adapter, and merging would leave them out: call "
            "protection.merge_rest() first"
        )
    return type(layer).merge(layer, *args, **kwargs)


class PeftPair:
    """The pair of one adapter in a linear layer of PEFT; a `Pair`.

    Args:
        layer: PEFT's, with `lora_A`, `lora_B` and `scaling` by adapter.
        adapter: its name.
    """

    def __init__(self, layer: Any, adapter: str):
        self.layer, self.adapter = layer, adapter
        self.a, self.b = layer.lora_A[adapter], layer.lora_B[adapter]
        self.parts = ((0, len(self.b.weight)),)
        self.rest = rest_of(layer, adapter, self.a.weight, len(self.b.weight))

    def trained(self) -> list[nn.Parameter]:
        return [self.a.weight, self.b.weight]

    @torch.no_grad()
    def product(self) -> Factors:
        pair = float(self.layer.scaling[self.adapter]) * self.b.weight.detach(), self.a.weight.detach()
        return summed([pair, (self.rest.up.to(pair[0]), self.rest.down.to(pair[1]))])

    @torch.no_grad()
    def renew(self, start: Tensor, rank: int | None = None, moments: Tensor | None = None) -> None:
        if self.rest.merged:
            raise UsageError("protect: what rests was merged into the frozen weights, and nothing can be renewed then")
        if self.b.weight.any():
            up, down = self.product()
            most = min(len(up), down.shape[1])
            most = most if rank is None else min(most, rank)
            if len(down) > most:
                kept, new_down = reduced((up, down), most, moments)
                up, down = kept.to(up), new_down.to(down)
            self.rest.up, self.rest.down = up.clone(), down.clone()
        self.a.weight.copy_(start)
        self.b.weight.zero_()

    @property
    def mergeable(self) -> bool:
        """Whether the frozen layer is a plain linear one, or GPT-2's, whose weight is the transpose."""
        base = self.layer.get_base_layer()
        plain = is_plain(base, nn.Linear) or (type(base).__name__ == "Conv1D" and hasattr(base, "nf"))
        return bool(plain and base.weight.is_floating_point())

    @torch.no_grad()
    def merge(self) -> None:
        """Put what rests into the frozen weight."""
        if self.rest.merged:
            return
        weight, update = self.layer.get_base_layer().weight, self.rest.up @ self.rest.down
        weight += (update if isinstance(self.layer.get_base_layer(), nn.Linear) else update.mT).to(weight)
        self.rest.merged = True


@torch.no_grad()
def forget(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    """Take what an optimizer has gathered of these parameters from it: it is of the values they had before."""
    if isinstance(optimizer, torch.optim.LBFGS):  # its whole history is of all parameters together
        optimizer.state.clear()
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not any(parameter is p for p in parameters):
                continue
            state = optimizer.state.pop(parameter, {})
            if isinstance(optimizer, torch.optim.Adagrad):  # the one that makes its state when it is made itself
                state["step"].zero_()
                state["sum"].fill_(group["initial_accumulator_value"])
                optimizer.state[parameter] = state

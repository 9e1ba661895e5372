"""Renewal: the product of a LoRA's factors is stored (it rests), and a new pair starts in the free directions.

Let `U` be the protected directions of a layer's inputs. The new `A` has `A U = 0`, so `A x = 0` for old inputs `x`, and
`B A x` stays zero whatever `B` becomes. So `B` needs no protection and has its full rank for every task. (InfLoRA,
Liang & Li, CVPR 2024, keeps such an `A` fixed; here the steps of `A` are projected.)
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

NOTHING = 1e-6  # a projected matrix whose norm is at most this share of the original norm is only rounding errors


def kaiming(rows: int, dim: int, rng: torch.Generator) -> Tensor:
    """A random matrix `(rows, dim)`, float64, drawn in the way of LoRA's `A`."""
    drawn = torch.empty(rows, dim)
    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=rng)
    return drawn.double()


def random_start(drawn: Tensor, closed: Subspace | None) -> Tensor | None:
    """`drawn (rows, dim)` projected into the free directions, with its old norm; None if there are none."""
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
    """A start along the leading directions of the new task's inputs within the free directions; None if there are none.

    Each of the `parts` gets the same directions, one for each of its rows. All rows have the same length, and the
    result has the norm of `drawn (rows, dim)`. If the inputs have fewer free directions than rows, `eigh` gives vectors
    of eigenvalue zero for the others. These may lie in closed directions, so rows of `drawn` replace them.

    Args:
        moments: second moments `(dim, dim)` of the inputs.
        rounding: eigenvalues up to this share of the moments' trace are noise.
    """
    rank, length = len(drawn) // parts, float(drawn.norm()) / math.sqrt(len(drawn))

    def free(rows: Tensor) -> Tensor:
        return rows if closed is None else closed.remove(rows)

    inside = free(free(moments.double()).mT)
    values, vectors = torch.linalg.eigh((inside + inside.mT) / 2)
    count = int((values > rounding * float(moments.trace())).sum())
    leading = free(vectors.flip(1).mT[: min(rank, count)])  # (k, dim)
    # In `eigh` rounding decides the sign of a vector, so it is set here.
    signs = leading.gather(1, leading.abs().argmax(1, keepdim=True)).sign()
    leading = leading * signs / leading.norm(dim=1, keepdim=True)
    start = []
    for rows in drawn.split(rank):
        rest = free(rows[len(leading) :])
        rest = free(rest - (rest @ leading.mT) @ leading)
        norms = rest.norm(dim=1, keepdim=True)
        usable = norms > NOTHING * rows.norm() / math.sqrt(rank)
        start += [leading, torch.where(usable, rest / norms.clamp(min=torch.finfo(rest.dtype).tiny), 0.0)]
    whole = torch.cat(start) * length
    return whole if bool(whole.any()) else None


# -- layers of PEFT -------------------------------------------------------------------------------------


class Rest(nn.Module):
    """The resting product `B' A'` of earlier tasks at a layer of PEFT. It is added to the layer's output.

    It does not belong to PEFT's adapter, whose rank does not change, nor to the model's state: the protection stores
    it. It acts while its adapter is active, and not while adapters are switched off or others are active.

    Args:
        adapter: the name of the adapter.
        weight: the weight of the adapter's `A`.
        d_out: the width of the layer's output.
    """

    up: Tensor
    down: Tensor

    def __init__(self, adapter: str, weight: Tensor, d_out: int):
        super().__init__()
        self.adapter = adapter
        self.register_buffer("up", weight.detach().new_zeros(d_out, 0))
        self.register_buffer("down", weight.detach().new_zeros(0, weight.shape[1]))
        self.merged = False
        """Whether the product was added to the frozen weight."""

    def act(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """The hook on the layer's forward; returns the output with the product added."""
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
        """Whether these tensors have the shapes of `up` and `down`, for any rank."""
        shaped = up.dim() == down.dim() == 2 and up.shape[1] == len(down)
        return shaped and len(up) == len(self.up) and down.shape[1] == self.down.shape[1]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("up", "down"):
            value = state_dict.get(f"{prefix}{name}")
            if isinstance(value, Tensor):
                setattr(self, name, getattr(self, name).new_zeros(value.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)


def rest_of(layer: nn.Module, adapter: str, weight: Tensor, d_out: int) -> Rest:
    """The resting product at an adapter of a layer of PEFT; a new one is made and hooked in if there is none yet."""
    # Not a submodule, because the module's state belongs to PEFT
    rests: dict[str, Rest] = layer.__dict__.setdefault("_perpetune_rests", {})
    if adapter not in rests:
        rests[adapter] = rest = Rest(adapter, weight, d_out)
        layer.register_forward_hook(rest.act, with_kwargs=True)
        layer.__dict__["merge"] = partial(_merge, layer)
    return rests[adapter]


def _merge(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """Replaces PEFT's `merge`, which would leave out the resting product and lose it when the layer is unloaded."""
    if any(len(rest.down) and not rest.merged for rest in layer._perpetune_rests.values()):
        raise UsageError(
            "protect: products of earlier tasks are stored beside PEFT's adapter, and merging would leave them out: "
            "call protection.merge_rest() first"
        )
    return type(layer).merge(layer, *args, **kwargs)


class PeftPair:
    """The pair of one adapter in a linear layer of PEFT; a `Pair`.

    Args:
        layer: a layer of PEFT, with `lora_A`, `lora_B` and `scaling` by adapter.
        adapter: the name of the adapter.
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
            raise UsageError(
                "protect: the products of earlier tasks were merged into the frozen weights, so nothing can be renewed "
                "any more"
            )
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
        """Whether the frozen layer is a plain linear layer, or GPT-2's, whose weight is transposed."""
        base = self.layer.get_base_layer()
        plain = is_plain(base, nn.Linear) or (type(base).__name__ == "Conv1D" and hasattr(base, "nf"))
        return bool(plain and base.weight.is_floating_point())

    @torch.no_grad()
    def merge(self) -> None:
        """Add the resting product to the frozen weight."""
        if self.rest.merged:
            return
        weight, update = self.layer.get_base_layer().weight, self.rest.up @ self.rest.down
        update = update if isinstance(self.layer.get_base_layer(), nn.Linear) else update.mT
        weight += like(update, weight)
        self.rest.merged = True


def cut(parameter: Tensor) -> str:
    """How a parameter is cut over processes, in words; empty if each process has all of it."""
    if "_is_flat_param" in vars(parameter) or type(parameter).__name__ == "FlatParameter":
        return "flattened and sharded over processes (FSDP1)"
    placements = getattr(parameter, "placements", None)  # of a DTensor
    return "sharded over processes (a DTensor)" if placements is not None else ""


def like(values: Tensor, weight: Tensor) -> Tensor:
    """Values of a whole weight, cut and typed as the weight is."""
    if not cut(weight):
        return values.to(weight)
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = weight
    return distribute_tensor(values.to(weight.dtype), sharded.device_mesh, sharded.placements)


@torch.no_grad()
def forget(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    """Delete the optimizer's state of these parameters, because it belongs to the values that they had before."""
    if isinstance(optimizer, torch.optim.LBFGS):  # its history holds all parameters together
        optimizer.state.clear()
        return
    if isinstance(inner := getattr(optimizer, "optim", None), torch.optim.Optimizer):
        forget(inner, parameters)  # of ZeroRedundancyOptimizer: each process has the state of some parameters
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not any(parameter is p for p in parameters):
                continue
            state = optimizer.state.pop(parameter, {})
            # Adagrad makes its state in its constructor, so it needs a fresh one
            if isinstance(optimizer, torch.optim.Adagrad):
                state["step"].zero_()
                state["sum"].fill_(group["initial_accumulator_value"])
                optimizer.state[parameter] = state

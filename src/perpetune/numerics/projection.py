"""Projection of an optimizer's steps out of protected subspaces, for any optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perpetune.errors import UsageError
from perpetune.numerics.exact import exactly
from perpetune.numerics.subspace import Subspace

Project = Literal["step", "gradient"]


@dataclass(frozen=True, eq=False)
class Operand:
    """Parameters that are multiplied by vectors of width `m`, seen as matrices `(heads, out, m)`.

    Attributes:
        weight: a matrix.
        bias: `(out,)`; a constant 1 appended to the vectors multiplies it. None without a bias.
        axis: the axis of `weight` that the vectors multiply: 1 for `W a` with `W (out, in)`, 0 for `a W`.
        heads: the number of heads into which axis 1 of `weight` is divided; each head has its own vectors.
        length: whether the rows of the matrices keep their lengths, for rows that are compared by cosine. A projected
            step keeps the products of a row with the protected vectors. If its length changes, its cosines change.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None = None
    axis: Literal[0, 1] = 1
    heads: int = 1
    length: bool = False

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(heads, out, m)`."""
        rows, columns = self.weight.shape
        columns //= self.heads
        out, m = (rows, columns) if self.axis == 1 else (columns, rows)
        return self.heads, out, m + (self.bias is not None)

    def read(self, tensors: Sequence[Tensor]) -> Tensor:
        """The matrices `(heads, out, m)` from tensors that have the shapes of the parameters."""
        weight: Tensor = tensors[0].unflatten(1, (self.heads, -1))  # (rows, heads, columns)
        matrix = weight.permute(1, 0, 2) if self.axis == 1 else weight.permute(1, 2, 0)
        if self.bias is not None:
            matrix = torch.cat([matrix, tensors[1].view(self.heads, -1, 1)], dim=2)
        return matrix

    def split(self, matrix: Tensor) -> list[Tensor]:
        """The inverse of `read`: tensors with the shapes of the parameters, from matrices `(heads, out, m)`."""
        bias = [] if self.bias is None else [matrix[:, :, -1].reshape(-1)]
        weight = matrix if self.bias is None else matrix[:, :, :-1]
        weight = weight.permute(1, 0, 2) if self.axis == 1 else weight.permute(2, 0, 1)
        return [weight.flatten(1), *bias]


@dataclass(frozen=True, eq=False)
class Site:
    """A place in a module where rows of features multiply parameters. Protection observes the rows there.

    Attributes:
        name: the name of the site in its module. The module reports the rows by `seen(name, rows)`.
        operand: the parameters that the rows multiply, and the axis on which they do.
        groups: the number of kinds of rows; each kind has its own moments. It equals the operand's number of heads,
            unless `lift` maps one to the other.
        width: the width of the observed rows, without the constant 1 that meets a bias; None means the operand's.
        lift: computes the moments `(heads, m, m)` of the rows that multiply the operand from the observed moments
            `(groups, width, width)`; None if both are the same.
        always: True if every pass over data reaches the site. If False, a task may never reach it, and then what is
            known about the site does not change.
        energy: the least share of the rows' energy that is protected here, unless nothing is to be protected at all.
    """

    name: str
    operand: Operand
    groups: int = 1
    width: int | None = None
    lift: Callable[[Tensor], Tensor] | None = None
    always: bool = True
    energy: float = 0.0


Closed = tuple[Sequence[tuple[Operand, Sequence[Subspace]]], Sequence[nn.Parameter]]


class ProjectedStep:
    """Keeps an optimizer's steps out of subspaces: `W ← W_old + (W_new − W_old)(I − UUᵀ)`.

    The projection acts on the actual step, after `optimizer.step()`. So momentum, Adam's scaling, weight decay and
    clipping cannot leave the free subspace. A projected gradient can leave it, because Adam divides the gradient
    element by element. The projection runs in the optimizer's own hooks, so every call of `step` includes it.

    Parameters with several operands (a prompt: keys on one side, values on the other) are projected by one operand
    after the other; the order does not matter if both have one head and no bias. Operands of the same shape are
    projected together in one batched product. Parameters that the optimizer gets later (`add_param_group`) are
    projected too.

    After a projected step, the rows of an operand with `length` have the lengths that they had: the free part of each
    row, `w_⊥ = w (I − UUᵀ)`, is scaled by `‖w_⊥,old‖ / ‖w_⊥‖`. So their cosines with protected vectors stay, and the
    free part can still turn. With `project: gradient` the lengths are not kept.

    Args:
        optimizer: an optimizer of torch; of a wrapper pass the inner one (`accelerate`: `wrapper.optimizer`).
        operands: the protected operands, with one subspace for each head.
        still: parameters that may not move at all, whatever `project` is.
        project: `step`, or `gradient` to project only the gradient before the step, as the papers' code does. If a
            closure computes new gradients within the step (LBFGS), only `step` projects all of them.

    Raises:
        UsageError: a subspace does not fit its operand, or the optimizer has only a part of an operand.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        operands: Iterable[tuple[Operand, Sequence[Subspace]]],
        *,
        still: Iterable[nn.Parameter] = (),
        project: Project = "step",
    ):
        self._given: Closed = list(operands), list(still)
        self.project: Project = project
        self._attach(optimizer)

    def _closed(self) -> Closed:
        """The operands that are protected now, whether or not the optimizer has them, and the parameters that may not
        move."""
        return self._given

    def _attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Register the hooks, if there is anything to protect."""
        self._hooks: list[Any] = []
        if self._prepare(optimizer):
            self._hooks = [
                optimizer.register_step_pre_hook(self._pre),
                optimizer.register_step_post_hook(lambda *_: self._post()),
            ]

    def _prepare(self, optimizer: torch.optim.Optimizer) -> bool:
        """Prepare for the parameters that the optimizer has now. If this fails, nothing changes.

        Returns:
            Whether anything is protected, in this optimizer or elsewhere.
        """
        operands, still = self._closed()
        trained = _trained(optimizer)
        kept = []
        for operand, subspaces in operands:
            heads, _, m = operand.shape
            if len(subspaces) != heads or any(s.dim != m for s in subspaces):
                dims = sorted({s.dim for s in subspaces})
                raise UsageError(f"{len(subspaces)} subspaces of width {dims} do not fit {heads} heads of width {m}")
            held = [p in trained for p in operand.parameters]
            if any(held) and not all(held):
                raise UsageError(
                    "the optimizer has only one of a protected weight and its bias: give it both, or protect the "
                    "weight without the bias"
                )
            if all(held) and any(s.rank for s in subspaces):
                kept.append((operand, subspaces))
        self._stages = _stages(kept)
        self._trained = trained
        self.still = [p for p in still if p in trained]
        self._parameters = list(dict.fromkeys([*(p for o, _ in kept for p in o.parameters), *self.still]))
        self._before: dict[nn.Parameter, Tensor] = {}
        return bool(still) or any(s.rank for _, subspaces in operands for s in subspaces)

    def remove(self) -> None:
        """Remove the hooks; the optimizer's steps are not projected any more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._before = [], {}

    def __enter__(self) -> ProjectedStep:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    @torch.no_grad()
    def _pre(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if _trained(optimizer) != self._trained:
            self._prepare(optimizer)
        # Weight decay and momentum move a parameter even without a gradient
        held = self._parameters if self.project == "step" else self.still
        self._before = {p: p.detach().clone() for p in held}
        if self.project == "step":
            return None
        self._project_gradients()
        # A closure computes the gradients within the step. The first of `args` is the optimizer itself.
        if len(args) > 1 and args[1] is not None:
            return (args[0], self._after(args[1]), *args[2:]), kwargs
        if kwargs.get("closure") is not None:
            return args, {**kwargs, "closure": self._after(kwargs["closure"])}
        return None

    def _after(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """A closure that calls `closure` and then projects the gradients."""

        def projected() -> Any:
            value = closure()
            self._project_gradients()
            return value

        return projected

    @torch.no_grad()
    def _project_gradients(self) -> None:
        grads = {p: p.grad for p in self._parameters if p.grad is not None}
        for parameter, grad in self._projected(grads).items():
            grads[parameter].copy_(grad)

    @torch.no_grad()
    def _post(self) -> None:
        steps = {p: p - before for p, before in self._before.items()}
        for parameter, step in self._projected(steps).items():
            parameter.copy_(self._before[parameter] + step)
        for stack in (stack for stage in self._stages for stack in stage if stack.length and self.project == "step"):
            with exactly(stack.vectors.device):
                stack.keep_lengths(self._before)
        self._before = {}

    def _projected(self, changes: Mapping[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        changed = {**changes, **{p: torch.zeros_like(changes[p]) for p in self.still if p in changes}}
        for stack in (stack for stage in self._stages for stack in stage):
            with exactly(stack.vectors.device):
                stack.apply(changed)
        return changed


def _trained(optimizer: torch.optim.Optimizer) -> set[nn.Parameter]:
    return {p for group in optimizer.param_groups for p in group["params"]}


class _Stack:
    """Operands of the same shape and form, which are projected in one product."""

    def __init__(self, members: Sequence[tuple[Operand, Sequence[Subspace]]]):
        self.operands = [operand for operand, _ in members]
        subspaces = [s for _, several in members for s in several]
        self.complement, self.length = subspaces[0].complement, self.operands[0].length
        weight = self.operands[0].weight
        widest = max(s.vectors.shape[1] for s in subspaces)
        vectors = torch.zeros(len(subspaces), subspaces[0].dim, widest, dtype=torch.float64)
        weighted = torch.zeros_like(vectors)
        # Shorter bases are filled up with columns of zeros, which change nothing
        for i, subspace in enumerate(subspaces):
            columns = subspace.vectors.shape[1]
            vectors[i, :, :columns] = subspace.vectors
            weighted[i, :, :columns] = subspace.vectors * (1 if subspace.alpha is None else subspace.importance)
        self.vectors = vectors.to(weight)  # (stacked, m, k)
        self.weighted = weighted.mT.contiguous().to(weight)  # (stacked, k, m)

    def apply(self, changes: dict[nn.Parameter, Tensor]) -> None:
        changed = [o for o in self.operands if all(p in changes for p in o.parameters)]
        if len(changed) < len(self.operands):
            self._apply_some(changed, changes)
            return
        matrices = torch.cat([o.read([changes[p] for p in o.parameters]) for o in changed])
        through = torch.bmm(torch.bmm(matrices, self.vectors), self.weighted)
        self._write(changed, through if self.complement else matrices - through, changes)

    def _apply_some(self, changed: list[Operand], changes: dict[nn.Parameter, Tensor]) -> None:
        """As `apply`, if some parameters have no gradient."""
        heads = self.operands[0].heads
        for i, operand in enumerate(self.operands):
            if operand not in changed:
                continue
            at = slice(i * heads, (i + 1) * heads)
            matrix = operand.read([changes[p] for p in operand.parameters])
            through = torch.bmm(torch.bmm(matrix, self.vectors[at]), self.weighted[at])
            self._write([operand], through if self.complement else matrix - through, changes)

    def keep_lengths(self, before: Mapping[nn.Parameter, Tensor]) -> None:
        """Give the rows of all operands the lengths that they had with the values `before` the step."""
        new, old = (
            torch.cat([o.read([values(p) for p in o.parameters]) for o in self.operands])
            for values in (lambda p: p.detach(), lambda p: before[p])
        )
        free, was = self._free(new), self._free(old)
        now, then = (torch.linalg.vector_norm(rows, dim=-1, keepdim=True) for rows in (free, was))
        share = torch.where(now > 0, then / now, 1.0)  # where nothing is free, nothing has moved
        changes: dict[nn.Parameter, Tensor] = {}
        self._write(self.operands, new + (share - 1) * free, changes)
        for parameter, values in changes.items():
            parameter.copy_(values)

    def _free(self, matrices: Tensor) -> Tensor:
        """The parts of rows that no protected direction has, also if protection is soft."""
        through = torch.bmm(torch.bmm(matrices, self.vectors), self.vectors.mT)
        return through if self.complement else matrices - through

    @staticmethod
    def _write(operands: Sequence[Operand], matrices: Tensor, changes: dict[nn.Parameter, Tensor]) -> None:
        for operand, matrix in zip(operands, matrices.split([o.heads for o in operands]), strict=True):
            for parameter, change in zip(operand.parameters, operand.split(matrix), strict=True):
                changes[parameter] = change


def _stages(operands: Sequence[tuple[Operand, Sequence[Subspace]]]) -> list[list[_Stack]]:
    """Stacks of operands, in stages so that no parameter is in a stage twice."""
    stages: list[dict[Any, list[tuple[Operand, Sequence[Subspace]]]]] = []
    uses: dict[nn.Parameter, int] = {}
    for operand, subspaces in operands:
        number = max(uses.get(p, 0) for p in operand.parameters)
        for p in operand.parameters:
            uses[p] = number + 1
        if number == len(stages):
            stages.append({})
        # The heads of one operand may differ in form; in the same form they can be projected in one product.
        form = _alike(subspaces)
        weight = operand.weight
        key = (operand.shape, operand.length, form[0].complement, weight.dtype, weight.device)
        stages[number].setdefault(key, []).append((operand, form))
    return [[_Stack(members) for members in stage.values()] for stage in stages]


def _alike(subspaces: Sequence[Subspace]) -> Sequence[Subspace]:
    """The same subspaces in one form: all by their bases, or all by their complements."""
    if len({s.complement for s in subspaces}) == 1:
        return subspaces
    by_complement = sum(s.complement for s in subspaces) * 2 > len(subspaces)
    return [_in_form(s, by_complement) for s in subspaces]


def _in_form(subspace: Subspace, complement: bool) -> Subspace:
    if subspace.complement == complement:
        return subspace
    other = Subspace(subspace.dim, subspace.alpha)
    other.vectors, other.complement = (subspace.free if complement else subspace.basis), complement
    return other

"""An average of the parameters that a method trains: it follows the steps of a task, and it can answer.

Between tasks the pets hold what answers: the average, or with `answer: online` what training left. So a method sees one
set of pets and need not know of the average. Inside `fit` the pets are the online ones. They turn into the average when
`fit` ends, so that a head of statistics, or a bank of pets, gets what answers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from perpetune.averages.config import AverageConfig
from perpetune.errors import UsageError
from perpetune.numerics.averaging import curvature_weight, published_weight, weight_that_keeps
from perpetune.numerics.lowrank import Factors, exact, inner, summed
from perpetune.pets import LoRA, parameters, pets
from perpetune.pets.base import slots

OUTSIDE = 0.99  # the published weight where the formula gives none in (0, 1)
GROUPS = ("average", "online", "gradient")  # of buffers, each with one tensor for each averaged parameter
MEANT = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


class Average(nn.Module):
    """An average of the trained pets, and of the head if wanted, in float32 or wider.

    Args:
        root: the model, whose pets are averaged.
        trained: names of the sets of pets that the method trains.
        config: the options of the average.
        head: gives the head's parameters that are trained by gradient.
        steady: whether the method trains the same sets in every task and answers with them alone; if not, the average
            follows whatever pets an optimizer trains, and is over at the end of `fit`.
        solved: whether the head is solved from statistics. It fits one set of features then, that of the answer, so
            the other ways to answer are not shown.
    """

    sums: Tensor
    """Where the weight is computed in each step: the sums over the steps of its mean and of the share in (0, 1)."""
    logs: Tensor
    """The sum of the logarithms of the weight over the steps, for each parameter."""

    def __init__(
        self,
        root: nn.Module,
        trained: Sequence[str],
        config: AverageConfig,
        *,
        head: Callable[[], Sequence[nn.Parameter]] = list,
        steady: bool = True,
        solved: bool = False,
    ):
        super().__init__()
        self._roots = (root,)  # in a tuple, so that it is not a submodule: it is one of the method already
        self.trained, self.config, self._head = tuple(trained), config, head
        self.steady, self.solved, self.compared = steady, solved, steady and not solved
        self.index = 0
        """The number of the open task, from 0."""
        self.open = False
        """Whether `fit` is in a phase that is averaged."""
        self.steps = 0
        """The steps of this phase that were averaged."""
        self.task_facts: dict[str, Any] = {}
        self._start: list[Tensor] = []
        self._open_for: list[nn.Parameter] = []  # what is averaged in the open phase
        self._before: list[Tensor] = []

    # -- tasks ----------------------------------------------------------------------------------------

    def begin(self, index: int) -> None:
        """The task with that number begins: called before the method learns it, also where it is learned again."""
        self.index, self.open, self.task_facts, self._open_for = index, False, {}, []
        if not self.config.carried:
            self._drop(*GROUPS)
        # For the facts. It is no state: a task that is entered again begins from the same values.
        average = self._tensors("average") or [p.detach() for p in self._pets()]
        wanted = self.steady and self._acts() and bool(self._loras())
        self._start = [t.clone() for t in average] if wanted else []

    def put_away(self) -> None:
        """The task was measured: drop the online values, if neither the answer nor the next task needs them."""
        if not self.config.carried:
            self._drop("online")

    def _acts(self) -> bool:
        return self.index + 1 >= self.config.first

    # -- beside an optimizer --------------------------------------------------------------------------

    @contextlib.contextmanager
    def beside(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Inside this context the average follows the optimizer's steps. Afterwards the pets hold what answers.

        Put it around the optimizer after the protection, so that it sees each step as the protection leaves it.

        Raises:
            UsageError: the optimizer does not say how many steps it takes, and `keep` needs that; or, where the weight
                is computed in each step, a parameter has no gradient or the optimizer gets a closure.
        """
        self._open_for = self._chosen(optimizer)
        if not self._open_for:
            yield
            return
        if not self.open:  # a phase that was stopped inside is open, and its tensors are loaded
            self._begin_phase()
        hooks = []
        if self.config.over == "steps":
            weight = self._fixed_weight(optimizer)
            if weight is None:
                hooks.append(optimizer.register_step_pre_hook(self._look))
            hooks.append(optimizer.register_step_post_hook(lambda *_: self._follow(weight)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self._end_phase(self._fixed_weight(optimizer))

    def _chosen(self, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
        """What is averaged along with this optimizer; empty if nothing is."""
        if not self._acts():
            return []
        mine = {p for group in optimizer.param_groups for p in group["params"]}
        every = [pet for _, slot in slots(self._root) for pet in slot.pets.values()]
        moved = list(dict.fromkeys(p for pet in every for p in pet.parameters() if p in mine))
        if every and not moved:
            # A weight per step acts in every step of the task, as LAE does it, also while the head is trained alone
            return self._everything() if self.config.carried and isinstance(self.config.weight, float) else []
        return self._everything() if self.steady else [*moved, *self._averaged_head()]

    def _fixed_weight(self, optimizer: torch.optim.Optimizer) -> float | None:
        """The weight of each step; None if it is computed in each. With `over: end` that of the one interpolation."""
        if self.config.keep is None:
            return None if isinstance(self.config.weight, str) else self.config.weight
        if self.config.over == "end":
            return self.config.keep
        steps = optimizer.param_groups[0].get("steps")
        if not steps:
            raise UsageError(
                "average.keep needs the number of steps, which perpetune.fit gives, and this method trains without it: "
                "give average.weight"
            )
        return weight_that_keeps(self.config.keep, steps)

    @torch.no_grad()
    def _begin_phase(self) -> None:
        """Let the average start where the task starts, and put the online values into the pets."""
        online, average = self._tensors("online"), self._tensors("average")
        if average and self.config.restart and not online:  # the pets are the online ones
            self._write(average)
        self._keep("average", average or [_wide(p).clone() for p in self._open_for])
        if online and not self.config.restart:
            self._write(online)
        self._drop("online", "gradient")
        self.open, self.steps = True, 0
        if self.config.ruled:
            device, count = self._open_for[0].device, len(self._open_for)
            self.register_buffer("sums", torch.zeros(2, device=device))  # Σ mean weight, Σ share in range
            self.register_buffer("logs", torch.zeros(count, device=device))  # Σ log weight, for each parameter

    @torch.no_grad()
    def _look(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a step: remember where it starts."""
        if any(argument is not None for argument in [*args[1:], *kwargs.values()]):  # the first is the optimizer
            raise UsageError(
                f"average.weight: {self.config.weight} needs one gradient in each step, and this optimizer is given a "
                "closure: use average.keep"
            )
        self._before = [_wide(p).clone() for p in self._open_for]

    @torch.no_grad()
    def _follow(self, weight: float | None) -> None:
        """After a step. Nothing here waits for the device."""
        average, now = self._tensors("average"), [_wide(p) for p in self._open_for]
        self.steps += 1
        if weight is not None:
            torch._foreach_lerp_(average, now, 1 - weight)
            return
        for tensor, new, share in zip(average, now, (1 - self._weights(average, now)).unbind(), strict=True):
            tensor.lerp_(new, share.to(tensor.dtype))

    def _weights(self, average: Sequence[Tensor], now: Sequence[Tensor]) -> Tensor:
        """The weight of the old average for each parameter in this step, `(K,)`."""
        config, gradients = self.config, [p.grad for p in self._open_for]
        if any(g is None for g in gradients):
            raise UsageError(
                f"average.weight: {config.weight} needs the gradient of every averaged parameter, and one has none: "
                "use average.keep"
            )
        wide, before = [_wide(g) for g in gradients if g is not None], self._tensors("gradient")
        outside = config.base if config.weight == "curvature" else OUTSIDE
        weights = self.logs.new_full((len(wide),), outside)
        inside = torch.zeros_like(weights)
        if before:
            gradient, change = _norms(wide), _norms(torch._foreach_sub(wide, before))
            step = _norms(torch._foreach_sub(list(now), self._before))
            distance = _norms(torch._foreach_sub(list(now), list(average)))
            sizes = (gradient, change, step, distance)
            found = curvature_weight(*sizes, config.base) if config.weight == "curvature" else published_weight(*sizes)
            usable = (found > 0) & (found < 1)  # false where it is not a number
            inside, weights = usable.to(weights), torch.where(usable, found.to(weights), weights)
            torch._foreach_copy_(before, wide)
        else:
            self._keep("gradient", [g.clone() for g in wide])
        self.sums += torch.stack([weights.mean(), inside.mean()])
        self.logs += weights.clamp(min=1e-30).log()  # a checkpoint holds finite values only
        self._before = []
        return weights

    @torch.no_grad()
    def _end_phase(self, weight: float | None) -> None:
        """The phase is complete: put what answers into the pets."""
        average = self._tensors("average")
        if self.config.over == "end":
            torch._foreach_lerp_(average, [_wide(p) for p in self._open_for], 1 - (weight or 0.0))
        online = [p.detach().clone() for p in self._open_for]
        self._note(weight, average, online)
        self.open = False
        self._drop("gradient")
        if self.config.answer != "online":
            self._write(average)
            if self.compared or self.config.carried:
                self._keep("online", online)
            narrow = any(one.dtype != p.dtype for one, p in zip(average, online, strict=True))
            if not (self.config.carried and narrow):
                self._drop("average")  # the pets hold it, to the bit
        self._open_for = []

    # -- answers --------------------------------------------------------------------------------------

    def ask(self, call: Callable[[], Tensor]) -> Tensor:
        """The result of `call()` by the configured answer; `call` computes scores with the pets as they are.

        Answers that are tokens are those of the average.
        """
        own = call()
        if self.config.answer != "both" or not own.is_floating_point():
            return own
        other = self._by_other(call)
        return own.log_softmax(-1) if other is None else stronger(own, other)

    def ways(self, call: Callable[[], Tensor]) -> dict[str, Tensor]:
        """The results of `call()` by each way to answer, the configured one first.

        That one is alone if the other values are not known any more. Before the first task that is averaged, all are
        equal.
        """
        own = call()
        other = self._by_other(call)
        if other is None and not self.task_facts:
            other = own
        chosen = self.config.answer
        if other is None:
            return {chosen: own.log_softmax(-1) if chosen == "both" and own.is_floating_point() else own}
        found = {"average": own, "online": other} if chosen != "online" else {"average": other, "online": own}
        if own.is_floating_point():
            found["both"] = stronger(own, other)
        elif chosen == "both":
            chosen = "average"
        return {chosen: found.pop(chosen), **found}

    def _by_other(self, call: Callable[[], Tensor]) -> Tensor | None:
        """The result with the values that the pets do not hold; None if there are none."""
        other = self._tensors("online") or self._tensors("average")
        if not other:
            return None
        with self._holding(other):
            return call()

    @contextlib.contextmanager
    def _holding(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Inside this context the averaged parameters have these values. If there are fewer, the last keep theirs."""
        own = [p.detach().clone() for p in self._open_for or self._everything()]
        self._write(values)
        try:
            yield
        finally:
            self._write(own)

    # -- facts ----------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """Facts about the average of the task just learned, in JSON's types; empty if it was not averaged."""
        if not self.task_facts:
            return {}
        config = self.config
        rule = config.weight if config.ruled else config.over
        return {
            "kind": "average",
            "rule": rule,
            "restart": config.restart,
            "answer": config.answer,
            "compared": self.compared,
            "solved": self.solved,
            **self.task_facts,
        }

    def _note(self, weight: float | None, average: Sequence[Tensor], online: Sequence[Tensor]) -> None:
        """Facts about a phase: its steps, the weight, the share in range, and what is left of the start."""
        steps, inside = self.steps, None
        if self.config.over == "end":
            kept = mean = weight or 0.0
            steps = 1
        elif weight is not None:
            kept, mean = weight**steps, weight
        else:
            total, share = self.sums.tolist()
            mean, inside = (total / steps, share / steps) if steps else (1.0, 0.0)
            kept = float(self.logs.exp().mean())
        told = self.task_facts
        if told:  # an earlier phase of the task was averaged too
            every = told["steps"] + steps
            both = [(told["weight"], told["steps"]), (mean, steps)]
            mean = sum(value * n for value, n in both) / max(1, every)
            steps, kept = every, kept * told["kept"]
        self.task_facts = {
            "steps": steps,
            "weight": _short(mean),
            "in_range": None if inside is None else _short(inside),
            "kept": _short(kept),
            "gap": self._gap(kept, average, online),
        }

    def _gap(self, kept: float, average: Sequence[Tensor], online: Sequence[Tensor]) -> float | None:
        """How far the averaged factors of LoRA are from an average of their products `B A`, as a share of the move.

        The products of the start and of the end are mixed with `kept`, which is exact for one interpolation. None if no
        pet is a LoRA, or nothing moved.
        """
        if not self._start:
            return None
        # The pets come first, and the head may have grown since the start
        points = [self._factors(values[: len(self._start)]) for values in (average, self._start, online)]
        apart, moved = 0.0, 0.0
        for mean, start, end in zip(*points, strict=True):
            apart += _square([(1.0, mean), (-kept, start), (kept - 1, end)])
            moved += _square([(1.0, mean), (-1.0, start)])
        return _short(math.sqrt(apart / moved)) if moved > 0 else None

    def _factors(self, values: Sequence[Tensor]) -> list[Factors]:
        with self._holding(values):
            found = [exact(factors) for pet in self._loras() for factors in pet.factors()]
            return [(b.clone(), a.clone()) for b, a in found]  # those of a pet in float64 are not copies yet

    def _loras(self) -> list[LoRA]:
        return [pet for name in self.trained for pet in pets(self._root, name) if isinstance(pet, LoRA)]

    # -- tensors --------------------------------------------------------------------------------------

    @property
    def _root(self) -> nn.Module:
        return self._roots[0]

    def _pets(self) -> list[nn.Parameter]:
        """The parameters of the trained sets."""
        return list(dict.fromkeys(p for name in self.trained for p in parameters(self._root, name)))

    def _averaged_head(self) -> list[nn.Parameter]:
        return list(self._head()) if self.config.head else []

    def _everything(self) -> list[nn.Parameter]:
        """What is averaged of a steady method."""
        return [*self._pets(), *self._averaged_head()]

    @torch.no_grad()
    def _write(self, values: Sequence[Tensor]) -> None:
        for p, value in zip(self._open_for or self._everything(), values, strict=False):
            p.copy_(value)

    def _tensors(self, group: str) -> list[Tensor]:
        """The buffers of a group, in the order of the averaged parameters; empty if there are none."""
        found: list[Tensor] = []
        while (tensor := self._buffers.get(f"{group}-{len(found)}")) is not None:
            found.append(tensor)
        return found

    def _keep(self, group: str, tensors: Sequence[Tensor]) -> None:
        for number, tensor in enumerate(tensors):
            self.register_buffer(f"{group}-{number}", tensor)

    def _drop(self, *groups: str) -> None:
        for key in [key for key in self._buffers if key.partition("-")[0] in groups]:
            del self._buffers[key]
        if "gradient" in groups:
            for key in ("sums", "logs"):
                self._buffers.pop(key, None)

    def get_extra_state(self) -> dict[str, Any]:
        tensors = {key: t for key, t in self._buffers.items() if t is not None}
        kept = {key: [str(t.dtype).removeprefix("torch."), *t.shape] for key, t in tensors.items()}
        return {"open": self.open, "steps": self.steps, "facts": self.task_facts, "tensors": kept}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.open, self.steps, self.task_facts = bool(state["open"]), int(state["steps"]), dict(state["facts"])
        self._drop(*GROUPS)
        device = next(self._root.parameters()).device
        for key, (dtype, *shape) in state["tensors"].items():
            if key not in ("sums", "logs") and key.partition("-")[0] not in GROUPS:
                raise ValueError(f"{key!r} is no tensor of an average")
            self.register_buffer(key, torch.zeros(shape, dtype=MEANT[dtype], device=device))


def stronger(one: Tensor, other: Tensor) -> Tensor:
    """For each class the larger of two probabilities, as logarithms; both `(B, C)` scores, whose softmax counts."""
    return torch.maximum(one.log_softmax(-1), other.log_softmax(-1))


def _wide(tensor: Tensor) -> Tensor:
    """A tensor in float32, or in its own type if that is wider; without a copy where it can be."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _norms(tensors: Sequence[Tensor]) -> Tensor:
    """The L1 norms of the tensors, `(K,)`."""
    return torch.stack(list(torch._foreach_norm(list(tensors), 1)))


def _square(parts: Sequence[tuple[float, Factors]]) -> float:
    """`‖Σ w_i B_i A_i‖²`."""
    whole = summed([(share * b, a) for share, (b, a) in parts])
    return max(0.0, float(inner(whole, whole)))


def _short(value: float) -> float:
    return float(f"{value:.6g}")

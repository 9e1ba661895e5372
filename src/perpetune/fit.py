"""The library's only loop of gradient descent. Methods call it; it does not know any method.

One step always takes `batch_size` examples, over all processes and micro-batches together. So a step means the same
for every number of processes and every `accumulate`. One number, the count of finished steps, says how far the loop
is: order, augmentation and dropout are functions of (seed, task, phase, epoch or step), so no random state is stored.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from perpetune.errors import Interrupted, PerpetuneError
from perpetune.numerics.handover import Late, sent
from perpetune.runtime import Runtime
from perpetune.seeding import own_global_state, seed_of
from perpetune.tasks import Batch, Task, load_batches

Loss = Callable[[Task, Batch], Tensor]
Groups = list[tuple[list[nn.Parameter], float]]
"""Lists of parameters, each with the learning rate of its parameters."""
CURE = "lower train.lr, set train.clip, or use run.precision: no, in the state's recipe.yaml"
LOG_EVERY = 10  # steps between two readings of the loss


class FitConfig(BaseModel):
    """The settings of one phase of gradient training; the `train:` section of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    epochs: Annotated[int, Field(ge=0)] | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = 5
    """One number for all tasks, or a list with one for each task; further tasks use the last number of the list."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Examples per optimizer step, over all processes together."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """The number of micro-batches for one step's examples. More of them save memory; the result is the same."""
    order: Literal["random", "length"] = "random"
    """How an epoch's examples are put into batches: at random, or (for texts) so that the examples of a batch have
    similar lengths and need little padding."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    head_lr: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of the head; None takes `lr`, the rate of the PET."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Betas of AdamW."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the steps at the start in which the learning rate rises linearly from zero."""
    clip: Annotated[float, Field(gt=0)] | None = None
    """The largest allowed norm of the gradient of all trained parameters; None does not clip."""

    def epochs_of(self, task: int) -> int:
        """The number of epochs for the task with that index."""
        return self.epochs if isinstance(self.epochs, int) else self.epochs[min(task, len(self.epochs) - 1)]


def fit(
    loss: Loss,
    parameters: Sequence[nn.Parameter] | Sequence[tuple[Sequence[nn.Parameter], float]],
    task: Task,
    config: FitConfig,
    *,
    phase: str = "train",
    guarded: bool = True,
    each_step: Callable[[int], None] | None = None,
) -> None:
    """Minimise the mean of `loss(task, batch)` over the task's training data, in place.

    Args:
        loss: gives the mean loss of a batch, a scalar.
        parameters: the parameters to train, or groups of (parameters, learning rate). `fit` turns their `requires_grad`
            on during the call; the other parameters keep it off.
        task: has the data, and in `task.runtime` the device, processes, checkpoints and progress.
        config: epochs, batch size, optimizer, schedule.
        phase: a name that no other call in the same `learn` uses. A resumed run loads a finished phase instead of
            repeating it, and continues the unfinished phase.
        guarded: whether the run's companions (first of all the protection of old answers) are put around the optimizer.
        each_step: is called in every process with the step's number of examples, after the gradient is complete and
            before the optimizer takes the step.

    Raises:
        PerpetuneError: the loss is not finite; the message says where.
        Interrupted: a signal asked the run to stop. A checkpoint was written.
    """
    run = task.runtime
    per_epoch = math.ceil(len(task.train) / config.batch_size)
    epochs = config.epochs_of(task.index)
    total = per_epoch * epochs
    about = {"steps": total}  # for companions, which see the optimizer alone
    given = [(list(p), lr) for p, lr in _grouped(parameters, config.lr) if len(p) > 0]
    groups = [{"params": p, "lr": lr, "peak": lr, **about} for p, lr in given]
    trained = [p for some, _ in given for p in some]
    if not trained or total == 0:
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(trainable(trained))
        optimizer, scaler = make_optimizer(groups, config), run.accelerator.scaler
        if scaler is not None:  # each phase starts from the same scale, so that it does not depend on earlier phases
            scaler.load_state_dict(torch.amp.GradScaler(run.device.type).state_dict())
        done = run.checkpoints.begin(phase, optimizer, run.accelerator) if run.checkpoints else 0
        if done is None:
            return
        run.progress.phase(phase, total, epochs, done)
        for companion in run.companions if guarded else ():
            stack.enter_context(companion(optimizer))
        seen = _LossSeen(task, phase, per_epoch)
        for step, shares, images, tokens in _steps(task, config, phase, done):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(config, step, total)
            with own_global_state(run.seed, "task", task.index, phase, "step", step, run.rank):
                value = _backward(loss, task, shares, run)
            if run.world > 1:
                _sum_gradients(trained, run)
                value = run.sum(value)
            if each_step is not None:
                each_step(images)
            _update(optimizer, trained, config.clip, scaler)
            done = step + 1
            # A checkpoint must not store values after a nan that nobody has noticed: every resumed run would fail.
            every = run.checkpoints.every if run.checkpoints else total
            now = done % every == 0 or done == total
            due = now or done % LOG_EVERY == 0
            stop = run.stop_requested(due=due)
            if due or stop is not None:
                seen.put(value, step)
            run.progress.step(done, step // per_epoch, seen.read(now=now or stop is not None), images)
            if run.checkpoints:
                run.checkpoints.step(done, total, images, tokens, force=stop is not None)
            if stop is not None:
                run.wait()  # a launcher ends all processes as soon as one of them ends
                raise Interrupted(f"stopped in task {task.name}, phase {phase}, after step {done} of {total}", stop)
        # No loss shows what the last step changed
        if not bool(torch.stack([torch.isfinite(p).all() for p in trained]).all()):
            raise PerpetuneError(f"task {task.name}, phase {phase} ended with values that are not finite: {CURE}")
    if run.checkpoints:
        run.checkpoints.finish()


def make_optimizer(groups: Iterable[dict[str, Any]], config: FitConfig) -> torch.optim.Optimizer:
    """The optimizer that `config` names, for `groups` of parameters."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    return torch.optim.AdamW(groups, config.lr, betas=config.betas, weight_decay=config.weight_decay)


def schedule(config: FitConfig, step: int, total: int) -> float:
    """The factor on the learning rate at `step` of `total`: first warm-up, then constant, linear or cosine to zero."""
    warm = config.warmup * total
    if step < warm:
        return (step + 1) / (warm + 1)
    share = (step - warm) / max(1.0, total - warm)
    return {"constant": 1.0, "linear": 1 - share, "cosine": 0.5 * (1 + math.cos(math.pi * share))}[config.schedule]


def _grouped(parameters: Sequence[Any], lr: float) -> list[tuple[Sequence[nn.Parameter], float]]:
    if all(isinstance(p, nn.Parameter) for p in parameters):
        return [(parameters, lr)]
    return list(parameters)


@contextlib.contextmanager
def trainable(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, these parameters take gradients; afterwards they do not, and no gradient is left on them."""
    for p in parameters:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(False)
            p.grad = None


def _steps(
    task: Task, config: FitConfig, phase: str, done: int
) -> Iterator[tuple[int, list[tuple[Batch, float]], int, int]]:
    """Yield a tuple for each step after the first `done` steps.

    The tuple has the step's number; this process's micro-batches with their weights in the step's mean; and the numbers
    of examples and of tokens of the step in all processes.
    """
    run, n, sizes = task.runtime, len(task.train), task.train.lengths
    per_epoch = math.ceil(n / config.batch_size)
    planned: deque[tuple[int, list[float], tuple[int, int]]] = deque()  # steps whose batches are asked for

    def requests() -> Iterator[list[tuple[int, int | None]]]:
        for epoch in range(done // per_epoch, config.epochs_of(task.index)):
            order = _order(task, config, task.generator(phase, "order", epoch))
            first = done % per_epoch if epoch == done // per_epoch else 0
            for step in range(first, per_epoch):
                rows = order[step * config.batch_size : (step + 1) * config.batch_size]
                mine = rows[run.rank :: run.world]
                # A process without examples takes part with weight 0, so that each has the same gradients to sum.
                parts = [(part, task.train.weight(part)) for part in _cut(mine, config.accumulate, sizes)]
                whole = task.train.weight(rows)
                shares = [(part, share / whole) for part, share in parts] or [(rows[:1], 0.0)]
                counts = len(rows), sum(sizes[i] for i in rows) if sizes is not None else 0
                planned.append((epoch * per_epoch + step, [share for _, share in shares], counts))
                for part, _ in shares:
                    yield [(i, seed_of(run.seed, task.index, phase, epoch, i)) for i in part]

    batches = load_batches(task.train, requests(), run)  # one loader for all epochs: workers start once
    for batch in batches:
        step, weights, counts = planned.popleft()
        some = [batch, *itertools.islice(batches, len(weights) - 1)]
        yield step, list(zip(some, weights, strict=True)), *counts


ALIKE = 32  # `_order` sorts the examples of so many batches by length together: more pads less, but mixes less


def _order(task: Task, config: FitConfig, rng: torch.Generator) -> list[int]:
    """An epoch's examples, in the order in which they are cut into batches."""
    order: list[int] = torch.randperm(len(task.train), generator=rng).tolist()
    sizes = task.train.lengths
    if config.order == "random" or sizes is None:
        return order
    size = config.batch_size
    chunk = ALIKE * size
    for start in range(0, len(order), chunk):
        order[start : start + chunk] = sorted(order[start : start + chunk], key=lambda i: sizes[i])
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    last = [batches.pop()] if len(batches[-1]) < size else []  # a short batch must stay last, or all cuts shift
    mixed = [batches[i] for i in torch.randperm(len(batches), generator=rng).tolist()]
    return [i for batch in mixed + last for i in batch]


def _cut(rows: list[int], parts: int, sizes: Sequence[int] | None) -> list[list[int]]:
    """Cut `rows` into `parts` micro-batches. If `sizes` are known, examples of similar length go together."""
    if parts > 1 and sizes is not None:
        rows = sorted(rows, key=lambda i: sizes[i])
    size = max(1, math.ceil(len(rows) / parts))
    return [rows[s : s + size] for s in range(0, len(rows), size)]


def _backward(loss: Loss, task: Task, shares: list[tuple[Batch, float]], run: Runtime) -> Tensor:
    """Add the gradient of this process's part of the step, and return this part of the loss."""
    total: Tensor | None = None
    for batch, share in shares:
        with run.autocast():
            value = loss(task, batch)
        value = value if share == 1.0 else value * share
        with run.products():
            run.accelerator.backward(value)
        total = value.detach() if total is None else total + value.detach()
    assert total is not None
    return total


def _sum_gradients(parameters: list[nn.Parameter], run: Runtime) -> None:
    """Sum the gradients over the processes in one message. PETs are small enough for this.

    A member of a pool has a gradient only in the processes whose examples chose it. So the message says of each
    parameter whether its process has a gradient; the optimizer skips those that no process has one for.
    """
    mine = [p.grad is not None for p in parameters]
    has = sent(mine, run.device).float()
    flat = torch.cat([has, *((torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters)])
    counts, *sums = run.sum(flat).split([len(parameters), *(p.numel() for p in parameters)])
    # Only a process that lacks a gradient has to learn whether another one has it, and waits for that.
    others = mine if all(mine) else counts.tolist()
    for p, count, part in zip(parameters, others, sums, strict=True):
        p.grad = part.view_as(p).to(p.dtype, copy=True) if count else None


def _update(
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    clip: float | None,
    scaler: torch.amp.GradScaler | None,
) -> None:
    """Clip the gradients and take one step. fp16 has a `scaler`, which skips a step whose gradient overflowed."""
    if clip is not None:
        if scaler is not None:
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, clip)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad()


class _LossSeen:
    """The loss of some steps, read one step later, so that the program does not wait for the step that runs."""

    def __init__(self, task: Task, phase: str, per_epoch: int):
        self.task, self.phase, self.per_epoch = task, phase, per_epoch
        self._late: tuple[Late, int] | None = None
        self._new = False

    def put(self, loss: Tensor, step: int) -> None:
        """Let the loss of a step come; one that was not read yet is looked at first."""
        self.read(now=True)
        self._late, self._new = (Late(loss), step), True

    def read(self, *, now: bool) -> float | None:
        """The loss that was put in before this step; on the CPU, or if `now` is true, also that of this step.

        It does not depend on how fast the device is, so that all processes find a fault after the same step.

        Raises:
            PerpetuneError: it is not finite.
        """
        new, self._new = self._new, False
        if self._late is None or (new and not now and not self._late[0].here):
            return None
        (late, step), self._late = self._late, None
        value = float(late.read())
        if not math.isfinite(value):
            raise PerpetuneError(
                f"the loss became {value} in task {self.task.name}, phase {self.phase}, "
                f"epoch {step // self.per_epoch + 1}, by step {step + 1}: {CURE}"
            )
        return value

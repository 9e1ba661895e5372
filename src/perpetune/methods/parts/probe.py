"""A pass with gradients that is no training: what the loss of some examples says of the parameters as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from perpetune.fit import FitConfig, trainable
from perpetune.seeding import own_global_state
from perpetune.tasks import Batch, Task, balanced, load_batches


def gradients_of(
    loss: Callable[[Task, Batch], Tensor], parameters: Sequence[nn.Parameter], task: Task, config: FitConfig, steps: int
) -> None:
    """Run `loss` and its gradient over the first examples of a task, and leave everything as it was.

    Whoever wants the gradients listens to the pass by hooks. The loss of a batch counts by the weight of its examples;
    a process has its share of them.

    Args:
        loss: the mean loss of a batch, a scalar.
        parameters: those whose `requires_grad` is set for the time of the call.
        config: of the training that will follow: the size of a batch.
        steps: batches of that size whose examples are looked at, balanced over the classes.
    """
    run = task.runtime
    few = balanced(task.train, steps * config.batch_size, task.generator("probe"))
    size = max(1, config.batch_size // (config.accumulate * run.world))
    mine = range(run.rank, len(few), run.world)
    parts = [mine[start : start + size] for start in range(0, len(mine), size)]
    batches = load_batches(few, [[(i, None) for i in part] for part in parts], run)
    with trainable(parameters):
        for part, batch in zip(parts, batches, strict=True):
            with own_global_state(task.seed_of("probe", part[0])), run.autocast():
                value = loss(task, batch)
            (value * few.weight(part)).backward()

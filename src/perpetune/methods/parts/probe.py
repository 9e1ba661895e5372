"""A pass with gradients outside of training: the gradients of the loss on some examples, at the present parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from perpetune.fit import FitConfig, trainable
from perpetune.seeding import own_global_state
from perpetune.tasks import Batch, Task, balanced, load_batches


def gradients_of(
    loss: Callable[[Task, Batch], Tensor], parameters: Sequence[nn.Parameter], task: Task, config: FitConfig, steps: int
) -> None:
    """Compute `loss` and its gradient on some examples of a task, and leave no gradient behind.

    The caller reads the gradients by hooks during the pass. The loss of a batch is multiplied by the weight of its
    examples. Each process computes its share of the examples.

    Args:
        loss: the mean loss of a batch, a scalar.
        parameters: the parameters whose `requires_grad` is set during the call.
        config: the config of the training that follows; it gives the size of a batch.
        steps: the number of batches of that size. Their examples are balanced over the classes.
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
            with run.products():
                (value * few.weight(part)).backward()

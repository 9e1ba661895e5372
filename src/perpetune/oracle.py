"""What a head would answer if all old data were still there: a diagnosis of the features, never a method's result.

A head that sums up features is right as long as the features of old data stay what they were. Here the same head is
solved anew, on the training data of all tasks so far, with the features as they are now. What it gains over the
method's own head is what stale sums cost; what it gains over frozen features is what tuning is worth at most.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perpetune import registry
from perpetune.errors import Interrupted, UsageError
from perpetune.heads.base import Head
from perpetune.methods.base import Method
from perpetune.methods.joint import union
from perpetune.models.classifier import learn_statistics
from perpetune.recipe import Recipe
from perpetune.seeding import own_global_state
from perpetune.tasks import Batch, Inputs, Task, load_batches

FALLBACK = "ridge"  # with its default options, where the recipe's head is trained and not solved
NO_OLD_DATA = (
    "evaluate.oracle solves the head on the training data of all tasks, and an update has only its own: leave it out, "
    "or use `perpetune run`"
)


@dataclass(frozen=True)
class Oracle:
    """The head solved on all data so far, on the features of `method` as they are at prediction.

    Attributes:
        name: of the kind of head.
    """

    method: Method
    head: Head
    name: str

    @property
    def classes(self) -> list[str]:
        return self.head.classes

    def __call__(self, inputs: Inputs) -> Tensor:
        """Scores `(B, C)` over `classes`."""
        scores: Tensor = self.head(self.method.features(inputs).float())
        return scores.float()


def check(recipe: Recipe, method: Method) -> str | None:
    """What to know of the oracle of this recipe before anything is learned; None where there is nothing to say.

    Raises:
        UsageError: the method's answers are texts, which no head is solved for.
    """
    head = getattr(method.model, "head", None)
    if not isinstance(head, Head):
        raise UsageError(
            f"evaluate.oracle solves a head of classes, and head: {recipe.head.name} has none: leave it out"
        )
    if head.statistics:
        return None
    return (
        f"evaluate.oracle: head {recipe.head.name} is trained, not solved from statistics; the oracle is head "
        f"{FALLBACK} with its default options"
    )


@torch.no_grad()
def solve(method: Method, tasks: Sequence[Task], recipe: Recipe) -> Oracle:
    """The oracle after the last of `tasks`.

    It goes through the tasks one by one as the method's own head did, so that with features that never moved it is
    that head: same sums, same penalty. A method that sees all data at once has an oracle that does too. Nothing of
    the method is changed.

    Args:
        method: has learned the tasks.
        tasks: all so far, with their training data.
        recipe: says which head, and how many examples go through the model at a time.
    """
    own = method.model.head
    assert isinstance(own, Head)
    name, options = (recipe.head.name, recipe.head.options) if own.statistics else (FALLBACK, {})
    run, size = tasks[-1].runtime, recipe.evaluate.batch_size
    asked = [dataclasses.replace(task, train=task.train.questions(), earlier=None) for task in tasks]
    if method.needs_earlier_data:
        asked = [union(asked)]
    one = next(load_batches(asked[0].train, [[(0, None)]], run))
    with run.autocast():
        width = method.features(one.inputs).shape[-1]
    with own_global_state(recipe.seed, "oracle"):
        made: Any = registry.find("heads", name)(width, **registry.options("heads", name, options))
    head: Head = made.requires_grad_(False).eval().to(run.device)
    steps = sum(math.ceil(len(range(run.rank, len(task.train), run.world)) / size) for task in asked)
    run.progress.phase("oracle head", steps, 1, 0)
    done = 0

    def features(batch: Batch) -> Tensor:
        nonlocal done
        done += 1
        run.progress.step(done, 0, None, len(batch))
        signum = run.stop_requested(due=False)
        if signum is not None:
            raise Interrupted("stopped while the oracle head was solved", signum)
        return method.features(batch.inputs)

    for task in asked:
        head.grow(task.classes, task.generator("head"))
        learn_statistics(task, size, [(head, features)])
    return Oracle(method, head, name)

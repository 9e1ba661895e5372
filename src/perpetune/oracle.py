"""The oracle head: the answers of a head that still has all old data. It is a diagnosis of the features, never a
method's result.

Some heads are solved from sums over features. They are right as long as the features of the old data do not change.
The oracle solves the same head again, on the training data of all tasks so far, with today's features. Its gain over
the method's own head is the cost of sums that are out of date. Its gain over frozen features is the most that tuning
can bring.
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

FALLBACK = "ridge"  # the oracle's head, with default options, if the recipe's head is trained by gradients
NO_OLD_DATA = (
    "evaluate.oracle needs the training data of all tasks, but an update has the data of its own task only: leave "
    "evaluate.oracle out, or use `perpetune run`"
)


@dataclass(frozen=True)
class Oracle:
    """A head that was solved on all data so far, with the features that `method` has at prediction.

    Attributes:
        name: the name of the kind of head.
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
    """A note about this recipe's oracle, for the user before learning begins; None if there is nothing to note.

    Raises:
        UsageError: the method's answers are texts, so there is no head of classes.
    """
    head = getattr(method.model, "head", None)
    if not isinstance(head, Head):
        raise UsageError(
            f"evaluate.oracle needs a head of classes, but head: {recipe.head.name} has no classes: leave "
            "evaluate.oracle out"
        )
    if head.statistics:
        return None
    return (
        f"evaluate.oracle: head {recipe.head.name} is trained by gradients, so the oracle uses head {FALLBACK} with "
        "default options"
    )


@torch.no_grad()
def solve(method: Method, tasks: Sequence[Task], recipe: Recipe) -> Oracle:
    """Make the oracle after the last of `tasks`.

    The oracle reads the tasks one by one, as the method's own head did. So if the features never changed, it equals
    that head: it has the same sums and the same penalty. If the method reads the data of all tasks at once, so does
    its oracle. The method itself is not changed.

    Args:
        method: has learned the tasks.
        tasks: all tasks so far, with their training data.
        recipe: names the head, and says how many examples go through the model at a time.
    """
    own_head = method.model.head
    assert isinstance(own_head, Head)
    name, options = (recipe.head.name, recipe.head.options) if own_head.statistics else (FALLBACK, {})
    run, size = tasks[-1].runtime, recipe.evaluate.batch_size
    questions = [dataclasses.replace(task, train=task.train.questions(), earlier=None) for task in tasks]
    if method.needs_earlier_data:
        questions = [union(questions)]
    one = next(load_batches(questions[0].train, [[(0, None)]], run))
    with run.autocast():
        width = method.features(one.inputs).shape[-1]
    with own_global_state(recipe.seed, "oracle"):
        made: Any = registry.find("heads", name)(width, **registry.options("heads", name, options))
    head: Head = made.requires_grad_(False).eval().to(run.device)
    steps = sum(math.ceil(len(range(run.rank, len(task.train), run.world)) / size) for task in questions)
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

    for task in questions:
        head.grow(task.classes, task.generator("head"))
        learn_statistics(task, size, [(head, features)])
    return Oracle(method, head, name)

"""The method `frozen`: no training; the pretrained model, with a head that learns from statistics."""

from __future__ import annotations

from perpetune.errors import UsageError
from perpetune.methods.base import Method
from perpetune.models.base import Model
from perpetune.models.classifier import Classifier
from perpetune.pets import using
from perpetune.tasks import Task


class Frozen(Method):
    """Trains nothing by gradient: its head learns from statistics, or knows classes by their names.

    With `ncm` this is SimpleCIL, arXiv:2303.07338; with `text` it is zero-shot, and with its expert RAIL.
    A language model answers without any tuning (zero-shot).

    Args:
        batch_size: examples in a forward pass.

    Raises:
        UsageError: the head does not learn from statistics and knows no class by its name.
    """

    several = True  # any sets may be given, because it trains none of them
    unaveraged = "trains no pet, so there is nothing to average"
    unprotectable = (
        "trains no pet, so there is nothing for protect: to keep: leave protect out, or use method: finetune"
    )

    def __init__(self, model: Model, *, batch_size: int = 64):
        super().__init__(model)
        self.trained, self.answering = (), None
        if isinstance(model, Classifier) and not (model.head.statistics or model.head.any_class):
            raise UsageError(
                f"method: frozen trains nothing, so head {type(model.head).__name__.lower()} would stay random: use "
                "head: ncm, or method: finetune with pet: none to train the head alone"
            )
        self.batch_size = batch_size

    def depends(self, task: int) -> str:
        return ""

    def learn(self, task: Task) -> None:
        self.model.grow(task)
        with using(self.model, self.answering):
            self.model.summarise(task, self.batch_size)

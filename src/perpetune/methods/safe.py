"""SAFE: a slow learner keeps what the pretrained model knows, a fast one learns new tasks; both answers are mixed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from perpetune.errors import UsageError
from perpetune.fit import FitConfig, fit
from perpetune.heads import Cosine, Head
from perpetune.methods.base import Answers, Method, training
from perpetune.methods.first_session import need_statistics
from perpetune.methods.parts.teacher import Teacher, rows_of
from perpetune.models.base import Mask, Model
from perpetune.models.classifier import Classifier, learn_statistics
from perpetune.numerics.alignment import correlation_losses, cosine_distance
from perpetune.numerics.mixing import mix
from perpetune.pets import copy_set, pets, using
from perpetune.tasks import Batch, Inputs, Task

FAST, SLOW = "default", "slow"  # two sets of pets around one backbone

Weight = Annotated[float, Field(ge=0)]


class Safe(Method):
    """SAFE, Zhao et al. 2024, arXiv:2411.02175: a slow and a fast learner, mixed by the entropy of their scores.

    This follows the paper. Its released code differs; docs/statistics.md lists the differences.

    The slow learner is trained on the first task. A loss keeps its features close to those of the pretrained model.
    After that it is frozen. The fast learner starts as a copy of the slow one and is trained on each later task, while
    losses keep its features and its cosine classifier close to those of the slow learner. Each learner has its own head
    that learns from statistics (`ridge`, as in the paper, or `ncm`). While features are trained, the cosine probes of
    these heads are the classifiers W of the paper.

    The correlation in the transfer loss is computed over the micro-batch of one process. It is the only part that
    depends on how the examples of a step are divided among processes.

    Args:
        model: with a pet injected under the name `default`, and a head with statistics and a probe.
        train: how the slow learner is trained, on the first task.
        later: how the fast learner is trained, on each later task.
        diagonal: weight of `Σ_i (C_ii − 1)²` in the slow learner's loss.
        rest: weight of `Σ_{i≠j} C_ij²` in the slow learner's loss.
        align: weight of the mean of `1 − cos(fast, slow)` over a batch. The released code sums over the batch, so its
            1.0 at batch size 48 is 48 here.
        cross: weight of the two cross-classification losses.
        sharpness: γ of the mixture; 0 is the plain mean of the scores.
        mask: the classes that the fast learner's loss compares; see `Classifier`.

    Raises:
        UsageError: there is no pet, or no head with statistics and a probe.
    """

    fits: ClassVar[type[Model]] = Classifier

    def __init__(
        self,
        model: Classifier,
        *,
        train: FitConfig,
        later: FitConfig,
        diagonal: Weight = 0.01,
        rest: Weight = 10.0,
        align: Weight = 48.0,
        cross: Weight = 1.0,
        sharpness: Weight = 1.0,
        mask: Mask = "seen",
    ):
        super().__init__(model)
        self.model: Classifier = model
        need_statistics("safe", model)
        self._probe(model.head)
        self.train_config, self.later, model.mask = train, later, mask
        self.diagonal, self.rest, self.align, self.cross = diagonal, rest, align, cross
        self.sharpness, self.tasks = sharpness, 0
        copy_set(model, FAST, SLOW)
        self.slow = copy.deepcopy(model.head)

    # -- learning ---------------------------------------------------------------------------------------

    def learn(self, task: Task) -> None:
        known = len(self.model.classes)
        self.model.grow(task)
        if task.index == 0:
            self._learn_slow(task)
        else:
            self.slow.grow(task.classes, task.generator("head"))
            self._learn_fast(task, known)
        self.tasks = task.index + 1

    def _learn_slow(self, task: Task) -> None:
        config = self.train_config
        teacher = Teacher(self.model, None)
        if task.train.deterministic and config.epochs_of(task.index) > 1:
            teacher.keep(teacher.table(task, config.batch_size))
        with training(self.model):
            fit(partial(self.slow_loss, teacher=teacher), self.groups(config), task, config, phase="slow")
        copy_set(self.model, FAST, SLOW)
        head = self.model.head
        learn_statistics(task, config.batch_size, [(head, lambda batch: self.features(batch.inputs))])
        self.slow = copy.deepcopy(head)

    def _learn_fast(self, task: Task, known: int) -> None:
        config = self.later
        teacher = Teacher(self.model, SLOW)
        slow = teacher.table(task, config.batch_size)
        self._imprint(task, slow, known)
        teacher.keep(slow if task.train.deterministic else None)
        with self.model.following(task, config.batch_size, self.features), training(self.model):
            for pet in pets(self.model, SLOW):
                pet.eval()  # a teacher's features are computed without dropout
            fit(partial(self.fast_loss, teacher=teacher, known=known), self.groups(config), task, config, phase="fast")
        heads: list[tuple[Head, Callable[[Batch], Tensor]]] = [
            (self.model.head, lambda batch: self.features(batch.inputs)),
            (self.slow, lambda batch: rows_of(slow, batch)),
        ]
        learn_statistics(task, config.batch_size, heads)

    def slow_loss(self, task: Task, batch: Batch, teacher: Teacher) -> Tensor:
        """`CE + λ_diag L_diag + λ_rdn L_rdn`; the teacher is the pretrained model."""
        with using(self.model, FAST):
            features = self.model.features(batch.inputs)
        diagonal, rest = correlation_losses(features.float(), teacher.features(batch))
        loss = self.model.head_loss(task, features, batch.targets)
        return loss + self.diagonal * diagonal + self.rest * rest

    def fast_loss(self, task: Task, batch: Batch, teacher: Teacher, known: int) -> Tensor:
        """`CE + λ_cos L_cos + λ_cc (L_s2f + L_f2s)`; the teacher is the slow learner.

        Args:
            known: the number of classes before this task. Their rows of the classifiers serve as prototypes.
        """
        with using(self.model, FAST):
            features = self.model.features(batch.inputs)
        slow_features = teacher.features(batch)
        loss = self.model.head_loss(task, features, batch.targets)
        loss = loss + self.align * cosine_distance(features.float(), slow_features)
        if self.cross == 0:
            return loss
        fast, slow = self._probe(self.model.head), self._probe(self.slow)
        target_rows = self.model.head.rows(task.classes, batch.targets.device)[batch.targets]
        old, whole = torch.arange(known, device=target_rows.device), min(self.later.batch_size, len(task.train))

        def crossed(judge: Cosine, rows: Tensor, samples: Tensor) -> Tensor:
            """The mean over K rows and B samples. B is that of the whole step, of which this batch may be a part."""
            learned = F.cross_entropy(judge(rows[:known]), old, reduction="sum")
            return (learned + whole * F.cross_entropy(judge(samples), target_rows)) / (known + whole)

        return loss + self.cross * (
            crossed(fast, slow.weight, slow_features) + crossed(slow, fast.weight, features.float())
        )

    @torch.no_grad()
    def _imprint(self, task: Task, features: Tensor, known: int) -> None:
        """Set the rows of new classes in both classifiers to the mean of the class's normalised slow features.

        They get the length of the other rows, so that the first steps do not turn them faster than the others.
        """
        rows = self.model.head.rows(task.classes, features.device)
        rows = rows[torch.tensor(task.train.targets, device=features.device)]
        for head in (self.model.head, self.slow):
            probe = self._probe(head)
            weight = probe.weight
            sums = torch.zeros_like(weight).index_add_(0, rows, F.normalize(probe.read(features), dim=-1).to(weight))
            means = F.normalize(sums[known:], dim=-1) * weight[:known].norm(dim=-1).mean()
            weight[known:] = torch.where(sums[known:].any(-1, keepdim=True), means, weight[known:])

    @staticmethod
    def _probe(head: Head) -> Cosine:
        probe = getattr(head, "probe", None)
        if not isinstance(probe, Cosine):
            name = type(head).__name__.lower()
            raise UsageError(
                f"method: safe needs a head with a cosine probe, but {name} has none: use head: ridge or ncm"
            )
        return probe

    # -- prediction -------------------------------------------------------------------------------------

    def predict(self, inputs: Inputs) -> Tensor:
        return self.answers(inputs).scores

    def answers(self, inputs: Inputs) -> Answers:
        """The mixture of both learners, the answer of each one alone, and the weight of the fast one."""
        with using(self.model, FAST):
            fast = self.model.predict(inputs)
        slow = fast
        if self.tasks > 1:  # after the first task both learners are the same
            with using(self.model, SLOW):
                slow = self.slow(self.model.features(inputs)).float()
        mixed, share = mix(fast, slow, self.sharpness)
        return Answers(mixed, {"slow": slow, "fast": fast}, {"weight of the fast learner": share}, name="mixed")

    def observe(self, inputs: Inputs) -> None:
        self.features(inputs)  # protection watches the trained pets, and the head has none

    def facts(self) -> dict[str, Any]:
        found = super().facts()
        return {"fast": found.pop("model.head", {}), "slow": found.pop("slow", {}), **found}

    def get_extra_state(self) -> dict[str, int]:
        return {"tasks": self.tasks}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.tasks = int(state["tasks"])

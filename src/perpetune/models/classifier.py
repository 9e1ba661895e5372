"""A classifier: a frozen backbone and a head that grows by class name."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perpetune.errors import UsageError
from perpetune.heads.base import Head
from perpetune.models.backbone import Backbone
from perpetune.models.base import Mask, Model
from perpetune.numerics.handover import sent
from perpetune.numerics.retrieval import contrastive
from perpetune.pets import using
from perpetune.runtime import Runtime
from perpetune.tasks import Batch, Examples, Inputs, Task, balanced, captioned, evaluation_batches

SEEN_TWICE = 1000  # most examples of a task whose features are computed before and after its training


class Classifier(Model):
    """Turns pictures or texts into scores of classes.

    The classes of a text are the answers that its task offers; the text is read without its answer. Answers with the
    same spelling are one class, even in different tasks.

    Args:
        mask: the classes that the training loss compares. `task`: those of the present task, so rows of earlier
            classes do not change; `seen`: those of all tasks so far; `none`: every row of the head, the same as `seen`
            unless the head was given rows ahead of its tasks. One class alone has nothing to compare with, so a trained
            head compares a task of one class with all seen so far, also under `task`.
    """

    def __init__(self, backbone: Backbone, head: Head, *, mask: Mask = "task"):
        super().__init__(backbone)
        self.head, self.mask = head, mask
        self.seen: list[str] = []
        self.view.read_alone()

    @property
    def classes(self) -> list[str]:
        return self.head.classes

    def posed(self, task: Task) -> Task:
        earlier = None if task.earlier is None else tuple(self.posed(one) for one in task.earlier)
        held = None if task.validation is None else task.validation.questions()
        return dataclasses.replace(task, train=task.train.questions(), validation=held, earlier=earlier)

    def admits(self, name: str, classes: Sequence[str]) -> None:
        if not classes:
            raise UsageError(
                f"task {name}: head {type(self.head).__name__.lower()} chooses among classes, and this task's answers "
                "are free text, or its options differ from question to question: give `options`, the answers that all "
                "questions of the task offer, or use head: lm"
            )

    def admits_captions(self, name: str) -> None:
        if self.backbone.texts is None or not self.head.any_class:
            raise UsageError(
                f"task {name} has captions and no classes: these need a backbone of pictures and texts, such as "
                f"CLIP, and a head that reads names; here are {self.backbone.spec} and head "
                f"{type(self.head).__name__.lower()}"
            )

    def grow(self, task: Task) -> None:
        if captioned(task.train):
            self.admits_captions(task.name)
            if task.runtime.world > 1:
                raise UsageError(
                    f"task {task.name} has captions, which are compared with each other inside a batch: train with one "
                    "process"
                )
            return
        self.admits(task.name, task.classes)
        self.seen += [c for c in task.classes if c not in self.seen]
        self.head.grow(task.classes, task.generator("head"))

    @contextlib.contextmanager
    def resting(self, task: Task) -> Iterator[None]:
        """Inside this context the head is trained on `task`. With mask `task`, the rows of other classes are unchanged
        afterwards.

        The loss does not contain these rows, so weight decay alone would move them.
        """
        rows = set(self.head.rows(task.classes).tolist())
        others = [row for row in range(len(self.classes)) if row not in rows] if self.mask == "task" else []
        before = [p.detach()[others].clone() for p in self.head.per_class()]
        yield
        with torch.no_grad():
            for p, values in zip(self.head.per_class(), before, strict=True):
                p[others] = values

    def compare(self, among: Mask) -> None:
        self.mask = among

    def _alone(self, task: Task) -> bool:
        """Whether a task has one class and its head is trained by gradient: then it is compared with all seen classes.

        Cross-entropy over one row is 0, so the head would never learn the class. A head with sums learns it from these.
        """
        return len(task.classes) == 1 and not self.head.statistics

    def notes(self, task: Task) -> list[str]:
        if captioned(task.train) and self.head.statistics:
            return ["it has captions and no classes, so the head's sums learn nothing from it"]
        if len(task.classes) != 1 or self.head.statistics:
            return []
        name, others = task.classes[0], sum(c not in task.classes for c in self.seen)
        if not others:
            return [
                f"it has one class, {name!r}, and no other was learned before: there is nothing to compare it with, so "
                "every answer is this class until another one is learned"
            ]
        if self.mask != "task":
            return []
        before = f"{others} classes" if others > 1 else "one class"
        return [
            f"it has one class alone, {name!r}. Mask `task` would compare it with nothing, so it is compared with the "
            f"{before} learned before; the head's rows for {'these' if others > 1 else 'this one'} do not change"
        ]

    def trained(self) -> list[nn.Parameter]:
        return self.head.trained()

    def per_class(self) -> list[nn.Parameter]:
        return self.head.per_class()

    def reset(self) -> None:
        self.head.reset()

    def features(self, inputs: Inputs) -> Tensor:
        """Features `(B, D)` of uint8 pixels `(B, 3, H, W)` or of texts, computed with the pets in force.

        If the head answers with the net as it was too (`head.bare`), its own feature without pets stands before them.
        """
        tuned = self.tuned(inputs)
        if not self.head.bare:
            return tuned
        with torch.no_grad(), using(self, None):
            bare = self.backbone.compared(self.backbone.features(inputs))
        return torch.cat([bare.to(tuned.dtype), tuned], dim=-1)

    def tuned(self, inputs: Inputs) -> Tensor:
        """Features `(B, D)` with the pets in force alone, which a loss reads."""
        return self.backbone.features(inputs)

    def loss(self, task: Task, batch: Batch) -> Tensor:
        if captioned(task.train):
            return self._caption_loss(task.train, batch)
        return self.head_loss(task, self.tuned(batch.inputs), batch.targets)

    def _caption_loss(self, examples: Examples, batch: Batch) -> Tensor:
        """The contrastive loss of pictures with the caption that each is loaded with; a caption that describes several
        pictures of the batch is right for each."""
        side = self.backbone.texts
        assert side is not None and batch.numbers is not None
        said = [examples.captions(number) for number in batch.numbers.tolist()]
        texts = [captions[drawn] for captions, drawn in zip(said, batch.inputs["caption"].tolist(), strict=True)]
        pictures = F.normalize(self.backbone.compared(self.tuned(batch.inputs)).float(), dim=-1)
        words = F.normalize(side.encode(side.inputs(texts, pictures.device)).float(), dim=-1)
        logits = side.scale.to(pictures.device) * pictures @ words.T
        matches = sent([[text in captions for text in texts] for captions in said], logits.device)
        return contrastive(logits if side.bias is None else logits + side.bias.to(logits.device), matches)

    def head_loss(self, task: Task, features: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of features `(B, D)` over the classes that `mask` selects.

        Raises:
            UsageError: the task has captions and no classes.
        """
        if captioned(task.train):
            raise UsageError(
                f"task {task.name} has captions, and what trains here compares classes: use method: finetune without "
                "merge, or joint"
            )
        rows = self.head.rows(task.classes, features.device)
        if self.mask == "none":
            return F.cross_entropy(self.head.logits(features).float(), rows[targets])
        if self.mask == "task" and not self._alone(task):
            return F.cross_entropy(self.head.logits_of(features, rows).float(), targets)
        columns = self.head.rows(self.seen, features.device)
        logits = self.head.logits_of(features, columns).float()
        return F.cross_entropy(logits, torch.searchsorted(columns, rows[targets]))

    def predict(self, inputs: Inputs) -> Tensor:
        return self.scores(self.features(inputs))

    @property
    def any_class(self) -> bool:
        return self.head.any_class

    def among(self, inputs: Inputs, classes: Sequence[str]) -> Tensor:
        return self.head.among(self.features(inputs), classes).float()

    def gated(self, inputs: Inputs, classes: Sequence[str]) -> tuple[Tensor, Mapping[str, Tensor]]:
        features = self.features(inputs)
        return self.head.among(features, classes).float(), self.head.gates(features, classes)

    def scores(self, features: Tensor) -> Tensor:
        """Scores `(B, C)` of features `(B, D)`."""
        scores: Tensor = self.head(features)
        return scores.float()

    def summarise(self, task: Task, batch_size: int) -> None:
        if captioned(task.train):
            return
        if self.head.statistics:
            learn_statistics(task, batch_size, [(self.head, lambda batch: self.features(batch.inputs))])
        self.head.finish(task.classes)

    @property
    def vocabulary(self) -> list[str]:
        found: list[str] = getattr(self.head, "vocabulary", [])
        return found

    def sentences(self, classes: Sequence[str], examples: Examples | None = None) -> list[str]:
        if examples is not None and captioned(examples):
            said = (caption for number in range(len(examples)) for caption in examples.captions(number))
            return list(dict.fromkeys(said))
        if examples is None and not self.head.reads:
            return list(classes)  # of a reference, for a head without templates
        return self.head.sentences(classes)

    def observe_texts(self, sentences: Sequence[str]) -> None:
        if self.backbone.texts is not None:
            self.backbone.texts.of(sentences)

    def observe(self, inputs: Inputs) -> None:
        features = self.tuned(inputs)
        if not self.head.reads:
            self.scores(features)

    @contextlib.contextmanager
    def following(self, task: Task, batch_size: int, features: Callable[[Inputs], Tensor]) -> Iterator[None]:
        if captioned(task.train):
            yield
            return
        with following(self.head, task, batch_size, features):
            yield

    def take_out(self, part: Callable[[], tuple[Head | None, Head]], gone: Sequence[str], whole: bool) -> None:
        self.head.take_out(part, gone, whole)
        self.seen = [name for name in self.seen if name not in gone]

    def leave_out(self, gone: Sequence[str]) -> None:
        """Leave classes out of a head whose rows were trained apart (`Head.apart`)."""
        self.head.keep_rows(self.head.leave_out(gone))
        self.seen = [name for name in self.seen if name not in gone]

    def get_extra_state(self) -> dict[str, list[str]]:
        return {"seen": self.seen}

    def set_extra_state(self, state: dict[str, list[str]]) -> None:
        self.seen = list(state["seen"])


@contextlib.contextmanager
def following(head: Head, task: Task, batch_size: int, features: Callable[[Inputs], Tensor]) -> Iterator[None]:
    """Inside this context `features` are trained on `task`. Afterwards a head with `carry` moves its sums as the
    features have moved.

    For this the features of some examples, balanced over their classes, are computed before and after the training.
    """
    if not (head.carry and task.index):
        yield
        return
    some = balanced(task.train, SEEN_TWICE, task.generator("carry"))
    before = feature_table(some, batch_size, task.runtime, features)
    yield
    after = feature_table(some, batch_size, task.runtime, features)
    head.follow(before, after, torch.tensor(some.targets))


@torch.no_grad()
def feature_table(examples: Examples, batch_size: int, run: Runtime, features: Callable[[Inputs], Tensor]) -> Tensor:
    """Features `(N, D)`, float32, of all `examples` in the form they have at evaluation, on every process.

    The features are computed in one fixed order, so that a resumed run has the same bits.
    """
    table: Tensor | None = None
    for batch in evaluation_batches(examples, batch_size, run):
        assert batch.numbers is not None
        with run.autocast():
            rows = features(batch.inputs).float()
        if table is None:
            table = rows.new_zeros(len(examples), rows.shape[1])
        table[sent(batch.numbers, table.device)] = rows
    width: int = run.of_first(0 if table is None else table.shape[1])  # the first process always has a batch
    if table is None:
        table = torch.zeros(len(examples), width, device=run.device)
    return run.sum(table)  # each process has filled in its own rows


@torch.no_grad()
def learn_statistics(task: Task, batch_size: int, heads: Sequence[tuple[Head, Callable[[Batch], Tensor]]]) -> None:
    """One pass over the task's training data, in the form of evaluation, for heads that learn from statistics.

    Args:
        task: the task; every head has its classes already.
        batch_size: examples in a batch.
        heads: each head, with the function that computes its features `(B, D)` of a batch.
    """
    with task.runtime.timed("statistics"):
        _learn_statistics(task, batch_size, heads)


def _learn_statistics(task: Task, batch_size: int, heads: Sequence[tuple[Head, Callable[[Batch], Tensor]]]) -> None:
    run = task.runtime
    counts = torch.bincount(torch.tensor(task.train.targets), minlength=len(task.classes))
    rows = [head.rows(task.classes, run.device) for head, _ in heads]
    for (head, _), places in zip(heads, rows, strict=True):
        head.expect(torch.zeros(len(head.classes), dtype=torch.int64).index_add_(0, places.cpu(), counts))
        for tensor in head.additive() if run.rank else ():
            tensor.zero_()  # only the first process keeps the earlier sums, so that they are counted once
    for batch in task.batches(batch_size):
        for (head, features), places in zip(heads, rows, strict=True):
            with run.autocast():
                values = features(batch)
            head.observe(values.float(), places[batch.targets])
    for head, _ in heads:
        head.flush()
        for tensor in head.additive() if run.world > 1 else ():
            for part in tensor.flatten().split(1 << 24):  # sending copies a tensor, so a large one is sent in parts
                part.copy_(run.sum(part.to(run.device)))
        head.settle(run.sum)

"""One task is learned under the protection of its recipe, and its features are added to what is protected."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from perpetune.errors import Interrupted
from perpetune.methods.base import Method
from perpetune.runtime import Runtime
from perpetune.tasks import Batch, Examples, Task, balanced, evaluation_batches

LEADING = 256  # examples of a task that say where its pet starts, with protect.start: leading


def learn_protected(
    method: Method,
    task: Task,
    reference: Examples | None = None,
    batch_size: int = 64,
    names: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Learn a task under the method's protection, if it has one, and add its features to what is protected.

    Where the protection renews pets, that is done first: it follows from what was committed and from the task alone, so
    a task that is entered again has the same.

    Args:
        method: what learns.
        task: what is learned.
        reference: data without labels, protected before the first step.
        batch_size: of the passes over what is protected.
        names: names whose texts are protected beside the reference.

    Returns:
        The certificates of these passes; none without protection.
    """
    task = method.model.posed(task)
    certificates = _protect_reference(method, task, reference, names, batch_size)
    _renew(method, task, batch_size)
    method.task_begins(task)
    with task.runtime.accompanied(method.companions()):
        method.learn(task)
    if method.protection is None:
        return certificates
    samples = method.protection.config.samples
    examples = task.train if samples == "all" else balanced(task.train, samples, task.generator("protect", "task"))
    texts = method.model.sentences(task.classes, examples) if method.protection.reads_texts else []
    return [*certificates, _protect(method, task, "task", examples, texts, batch_size)]


def _protect_reference(
    method: Method, task: Task, pictures: Examples | None, names: Sequence[str], batch_size: int
) -> list[dict[str, Any]]:
    """Protect what stands for the knowledge of the pretrained model, before anything was protected."""
    protection = method.protection
    reference = None if protection is None else protection.config.reference
    if protection is None:
        return []
    if reference is not None and reference.weights and not protection.consolidated:
        began = task.runtime.clock()
        certificate = protection.consolidate_weights(method.model.backbone.whole)
        seconds = round(task.runtime.clock() - began, 3)
        return [{"of": "reference", "examples": 0, "seconds": seconds, **certificate}]
    if pictures is None and not names:
        return []
    if pictures is not None and reference is not None and reference.samples != "all":
        pictures = balanced(pictures, reference.samples, task.generator("protect", "reference"))
    texts = method.model.sentences(names) if protection.reads_texts else []
    return [_protect(method, task, "reference", pictures, texts, batch_size)]


def _protect(
    method: Method, task: Task, purpose: str, examples: Examples | None, texts: Sequence[str], batch_size: int
) -> dict[str, Any]:
    """Protect what `method` makes of examples, and of texts that it reads beside them; returns the certificate."""
    protection, run = method.protection, task.runtime
    assert protection is not None
    batches = _Pass(examples, batch_size, run, texts)
    run.progress.phase(f"protect {purpose}", len(batches), 1, 0)
    began = task.runtime.clock()
    certificate = protection.consolidate(batches, lambda item: _observe(method, item, run), mask=_mask, total=run.sum)
    seconds = round(task.runtime.clock() - began, 3)
    counts = {"examples": 0 if examples is None else len(examples), **({"texts": len(texts)} if texts else {})}
    return {"of": purpose, **counts, "seconds": seconds, **certificate}


def _renew(method: Method, task: Task, batch_size: int) -> None:
    """Renew the pets before the task, once anything is protected and where the protection is to."""
    protection, run = method.protection, task.runtime
    if protection is None or not protection.waiting:
        return
    batches: Iterable[Batch | Sequence[str]] = ()
    if protection.config.start == "leading":
        some = balanced(task.train, LEADING, task.generator("renew", "examples"))
        batches = _Pass(some, batch_size, run)
        run.progress.phase("renew", len(batches), 1, 0)
    protection.renew_pairs(
        task.generator("renew"),
        batches,
        lambda batch: _observe(method, batch, run),
        mask=_mask,
        total=run.sum,
    )


class _Pass:
    """This process's share of some examples and then of some texts, batch by batch, as often as it is gone through."""

    def __init__(self, examples: Examples | None, size: int, run: Runtime, texts: Sequence[str] = ()):
        self.examples, self.size, self.run = examples, size, run
        self.texts = texts[run.rank :: run.world]

    def __len__(self) -> int:
        mine = 0 if self.examples is None else len(range(self.run.rank, len(self.examples), self.run.world))
        return math.ceil(mine / self.size) + math.ceil(len(self.texts) / self.size)

    def __iter__(self) -> Iterator[Batch | Sequence[str]]:
        pictures = () if self.examples is None else evaluation_batches(self.examples, self.size, self.run)
        texts = (self.texts[start : start + self.size] for start in range(0, len(self.texts), self.size))
        items: Iterator[Batch | Sequence[str]] = itertools.chain(pictures, texts)
        for done, item in enumerate(items, 1):
            yield item
            self.run.progress.step(done, 0, None, len(item))
            signum = self.run.stop_requested(due=False)
            if signum is not None:
                raise Interrupted("stopped while features were protected", signum)


def _observe(method: Method, item: Batch | Sequence[str], run: Runtime) -> None:
    with run.autocast():
        if isinstance(item, Batch):
            method.observe(item.inputs)
        else:
            method.observe_texts(item)


def _mask(item: Batch | Sequence[str]) -> Tensor | None:
    """Which tokens of a batch of texts count; a tower that reads texts beside it says that by itself."""
    return item.mask if isinstance(item, Batch) else None

"""False recognition as an exam: does the model see what is not there, more than it did before its first task?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from perpetune.errors import UsageError
from perpetune.evaluate import evaluate
from perpetune.exams.base import Exam, Opener, Suite, Values
from perpetune.exams.retrieval import TEMPLATE, checked_template, filled
from perpetune.methods.base import Method
from perpetune.methods.parts.pairs import picture_features, text_features
from perpetune.numerics.recognition import equal_error_threshold, false_yes, missed_yes, modality_gap
from perpetune.seeding import generator


class Recognition(Suite):
    """One exam on pictures with classes that are never learned: yes or no to a name, and where their answers go.

    A pair of a picture and `a photo of a NAME.` is a yes if its cosine reaches a threshold. The threshold is set once,
    before the first task: where the untouched model misses as many true names as it says a false yes. After each task
    there are at this threshold `missed_yes`, and `false_yes_*` for names that are not in the picture: a `random` other
    name of the exam, the name `near`est to the true one (by the texts of the frozen net), a name that was `learned` so
    far, and a `frequent` one, one of those with the most training examples so far. `attraction` is the share of
    pictures that are answered with a learned class, if these may answer beside the exam's own. `gap` and `pair_cosine`
    are as in the exam `retrieval`.

    Args:
        source: a `data:` section, or a path, with two classes or more; its test data are asked, or all its data where
            it has no test data.
        template: makes a sentence of the name of a class.
    """

    def __init__(self, *, source: str | dict[str, Any], template: str = TEMPLATE):
        self.source, self.template = source, checked_template(template)

    def exams(self, name: str, opened: Opener) -> Sequence[Exam]:
        task = dataclasses.replace(opened(self.source), name=name)
        if len(task.classes) < 2:
            raise UsageError(
                f"exam {name}: recognition needs two classes or more, and the data have {len(task.classes)}"
            )
        return [Exam(name, task, "own", partial(_judge, self.template))]


def _judge(template: str, method: Method, exam: Exam, batch_size: int) -> Values:
    task, run = exam.task, exam.task.runtime
    assert task.test is not None
    pictures = picture_features(method, task.test, batch_size, run)
    targets = torch.tensor(task.test.targets, device=pictures.device)
    names = [filled(template, name) for name in task.classes]
    words = text_features(method, names, batch_size, run)
    rng = generator("recognition", exam.name)
    scores = pictures @ words.T
    present = scores.gather(1, targets[:, None])[:, 0]
    away = torch.randint(1, len(names), (len(targets),), generator=rng).to(targets.device)
    absent = {"random": scores.gather(1, ((targets + away) % len(names))[:, None])[:, 0]}
    absent["near"] = scores.gather(1, _nearest(method, names, batch_size, exam)[targets][:, None])[:, 0]
    learned = [name for name in method.classes if name not in task.classes]
    begun = exam.begun.get("threshold")
    threshold = equal_error_threshold(present, torch.cat(list(absent.values()))) if begun is None else begun
    if learned:
        known = text_features(method, [filled(template, name) for name in learned], batch_size, run)
        drawn = torch.randint(len(learned), (len(targets),), generator=rng).to(targets.device)
        absent["learned"] = (pictures * known[drawn]).sum(1)
        most = max(exam.trained.get(name, 0) for name in learned)
        often = torch.tensor([n for n, name in enumerate(learned) if exam.trained.get(name, 0) == most])
        drawn = often[torch.randint(len(often), (len(targets),), generator=rng)].to(targets.device)
        absent["frequent"] = (pictures * known[drawn]).sum(1)
    values = {"threshold": threshold, "missed_yes": missed_yes(present, threshold)}
    values |= {f"false_yes_{way}": false_yes(some, threshold) for way, some in absent.items()}
    if learned and method.model.any_class:
        every = {exam.name: task.classes, "learned": learned}
        cell = evaluate(method, task, among="seen", batch_size=batch_size, future=every)
        assert cell is not None
        values["attraction"] = cell["goes_to"].get("learned", 0) / cell["total"]
    values |= {"gap": modality_gap(pictures, words), "pair_cosine": float(present.double().mean())}
    return {name: value if name == "threshold" else round(value, 6) for name, value in values.items()}


def _nearest(method: Method, names: Sequence[str], batch_size: int, exam: Exam) -> Tensor:
    """For each name the other one whose text is nearest to it in the frozen net, int64 `(C,)`: always the same."""
    bare = text_features(method, names, batch_size, exam.task.runtime, bare=True)
    return (bare @ bare.T).fill_diagonal_(-torch.inf).argmax(1)

"""Questions of yes and no as an exam: does the model see what is not there (hallucination)?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from perpetune.errors import UsageError
from perpetune.evaluate import evaluate
from perpetune.exams.base import Exam, Opener, Suite, Values
from perpetune.methods.base import Method
from perpetune.numerics.text_scores import said, yes_no_figures


class YesNo(Suite):
    """One exam on questions whose options are a yes and a no, such as POPE's "Is there a dog in the image?".

    Its numbers are `accuracy`, `precision`, `recall` and `f1` of yes, and `yes`, the share of questions that are
    answered with yes. Options are scored, so a model that would write neither has an answer too. POPE's three kinds of
    negatives (random, popular, adversarial) are three exams.

    Args:
        source: a `data:` section, or a path; its test data are asked, or all its data where it has no test data. All
            questions have the same two options.
    """

    def __init__(self, *, source: str | dict[str, Any]):
        self.source = source

    def exams(self, name: str, opened: Opener) -> Sequence[Exam]:
        task = dataclasses.replace(opened(self.source), name=name)
        if sorted(str(said(option)) for option in task.classes) != ["False", "True"]:
            listed = ", ".join(task.classes) or "none that all of them have"
            raise UsageError(
                f"exam {name}: yes_no needs questions that all have the same two options, a yes and a no; their "
                f"options are: {listed}"
            )
        return [Exam(name, task, "task", _judge)]


def _judge(method: Method, exam: Exam, batch_size: int) -> Values:
    if not method.model.chooses and not getattr(method.model.view, "chooses", True):
        raise UsageError(f"exam {exam.name}: yes_no scores options, and head.eval is generate: use eval: options")
    if method.model.chooses and not method.classes:
        return {}
    cell = evaluate(method, exam.task, among=exam.among, batch_size=batch_size)
    if cell is None:
        return {}
    answers: list[bool | None] = []
    rights: list[bool] = []
    for option, (correct, total) in cell["per_class"].items():
        right = bool(said(option))
        answers += [right] * int(correct) + [not right] * (total - int(correct))
        rights += [right] * total
    return {name: round(value, 6) for name, value in yes_no_figures(answers, rights).items()}

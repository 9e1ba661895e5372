"""The test data of a data source as an exam."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

from perpetune.errors import UsageError
from perpetune.evaluate import Among
from perpetune.exams.base import Exam, Opener, Suite, Values, right_answers
from perpetune.heads.base import Head
from perpetune.heads.templates import templates_of
from perpetune.methods.base import Method


class Dataset(Suite):
    """One exam on the test data of a data source: another domain, or what a language model could do before.

    Args:
        source: a `data:` section, or a path; its test data are asked, or all its data where it has no test data.
        among: the classes that may be answered; see `Exam`.
        templates: sentences in which this exam's names are read, as in head `text`; by default those of the head.
    """

    def __init__(
        self, *, source: str | dict[str, Any], among: Among = "seen", templates: str | list[str] | None = None
    ):
        self.source, self.among = source, among
        self.templates = None if templates is None else templates_of(templates, "exams: dataset")

    def exams(self, name: str, opened: Opener) -> Sequence[Exam]:
        task = dataclasses.replace(opened(self.source), name=name)
        judge = right_answers if self.templates is None else partial(_in_templates, self.templates)
        return [Exam(name, task, self.among, judge)]


def _in_templates(templates: Sequence[str], method: Method, exam: Exam, batch_size: int) -> Values:
    head = getattr(method.model, "head", None)
    if not isinstance(head, Head):
        raise UsageError(f"exam {exam.name}: templates are for a head that reads names, such as text")
    try:
        reading = head.reading(templates)
    except UsageError as error:
        raise UsageError(f"exam {exam.name}: {error}") from error
    with reading:
        return right_answers(method, exam, batch_size)

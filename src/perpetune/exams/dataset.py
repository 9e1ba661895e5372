"""The test data of a data source as an exam."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from perpetune.evaluate import Among
from perpetune.exams.base import Exam, Opener, Suite


class Dataset(Suite):
    """One exam on the test data of a data source: another domain, or what a language model could do before.

    Args:
        source: a `data:` section, or a path; its test data are asked, or all its data where it has no test data.
        among: the classes that may be answered; see `Exam`.
    """

    def __init__(self, *, source: str | dict[str, Any], among: Among = "seen"):
        self.source, self.among = source, among

    def exams(self, name: str, opened: Opener) -> Sequence[Exam]:
        task = dataclasses.replace(opened(self.source), name=name)
        return [Exam(name, task, self.among)]
